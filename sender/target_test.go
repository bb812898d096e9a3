package sender

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/sender/sendertest"
)

func TestValidateNamesEachMistakeByItsKeyAndShowsNoSecret(t *testing.T) {
	_, pem, err := sendertest.Certificate("x.example", time.Time{})
	require.NoError(t, err)
	dir := t.TempDir()
	file := filepath.Join(dir, "ca.pem")
	require.NoError(t, os.WriteFile(file, []byte(pem), 0o600))

	secret := func(s string) func(*outbox.Endpoint) {
		return func(e *outbox.Endpoint) { e.Secrets = []outbox.Secret{hmacSecret, outbox.Secret(s)} }
	}
	url := func(s string) func(*outbox.Endpoint) { return func(e *outbox.Endpoint) { e.URL = s } }
	table := func(s string) func(*outbox.Endpoint) {
		return func(e *outbox.Endpoint) { e.URL, e.Origin = s, outbox.FromTable }
	}
	header := func(name, value string) func(*outbox.Endpoint) {
		return func(e *outbox.Endpoint) { e.Headers = map[string]string{name: value} }
	}
	ca := func(s string) func(*outbox.Endpoint) { return func(e *outbox.Endpoint) { e.TLS.CA = s } }

	own := func(change func(*outbox.Signing)) func(*outbox.Endpoint) {
		return func(e *outbox.Endpoint) {
			s := custom("X-Sig")
			change(&s)
			e.Secrets, e.Signing = []outbox.Secret{"TOPSECRET"}, []outbox.Signing{s}
		}
	}

	for name, c := range map[string]struct {
		change func(*outbox.Endpoint)
		want   string // empty is valid
	}{
		"default":            {func(*outbox.Endpoint) {}, ""},
		"plain http of file": {url("http://10.0.0.1:8080/x"), ""},
		"IPv6":               {url("https://[2606:4700::1]:8443/x"), ""},
		"umlaut":             {url("https://bücher.example/x?q=1#frag"), ""},
		"no url":             {url(""), "url: is missing"},
		"scheme":             {url("ftp://x.example/TOPSECRET"), "url: must begin with https:// or http://"},
		"no scheme":          {url("x.example/TOPSECRET"), "url: must begin with https:// or http://"},
		"no host":            {url("https:///TOPSECRET"), "url: has no host"},
		"userinfo":           {url("https://me:TOPSECRET@x.example/"), "url: holds a user name or password; send them in headers.Authorization"},
		"port":               {url("https://x.example:99999/"), "url: its port is not one of 1 to 65535"},
		"port zero":          {url("https://x.example:0/"), "url: its port is not one of 1 to 65535"},
		"control character":  {url("https://x.example/TOPSECRET\n"), "url: is not a valid URL"},
		"escape":             {url("https://x.example/%zzTOPSECRET"), "url: is not a valid URL"},
		"long":               {url("https://x.example/" + strings.Repeat("x", maxURL)), "url: is longer than 8192 bytes"},
		"table":              {table("https://x.example/"), ""},
		"table, plain http":  {table("http://x.example/"), "url: must begin with https://"},
		"table, zone":        {table("https://[fe80::1%25eth0]/"), "url: its address has a zone"},
		"table, plain, allowed network": {func(e *outbox.Endpoint) {
			table("http://x.example/")(e)
			e.Network.Allow = prefixes("10.0.0.0/8")
		}, ""},

		"seed":                 {secret(edSecret), ""},
		"newline of a file":    {secret(edSecret + "\n"), ""},
		"empty secret":         {secret(""), "secrets[1]: is empty"},
		"no prefix":            {secret("TOPSECRET"), "secrets[1]: must begin with whsec_ (HMAC-SHA256) or whsk_ (ed25519)"},
		"not base64":           {secret("whsec_TOPSECRET!"), "secrets[1]: what follows whsec_ is not base64 (standard alphabet, padded)"},
		"no key":               {secret("whsec_"), "secrets[1]: no key follows whsec_"},
		"short seed":           {secret("whsk_AAECAwQ="), "secrets[1]: whsk_ holds 5 bytes; an ed25519 seed has 32, a private key 64"},
		"wrong halves":         {secret("whsk_" + strings.Repeat("A", 86) + "=="), "secrets[1]: the two halves of the ed25519 key do not belong together"},
		"public key":           {secret("whpk_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="), "secrets[1]: whpk_ is a public key, which cannot sign; use the whsk_ that belongs to it"},
		"none ignores secrets": {func(e *outbox.Endpoint) { secret("x")(e); e.Signing = signing(outbox.SchemeNone) }, ""},
		"signing":              {func(e *outbox.Endpoint) { e.Signing = signing("magic") }, `signing: "magic" is not one of standard, github, stripe, shopify, nfeio, none, custom`},
		"signing by nothing":   {func(e *outbox.Endpoint) { e.Signing = nil }, "signing: is empty; none sends unsigned"},
		"none and another":     {func(e *outbox.Endpoint) { e.Signing = signing("standard", "none") }, "signing[1]: none stands alone"},
		"one scheme twice":     {func(e *outbox.Endpoint) { e.Signing = signing("standard", "standard") }, "signing[1]: standard sets the header webhook-signature, which standard sets already"},
		"one header, two schemes": {
			func(e *outbox.Endpoint) { plain("github")(e); e.Signing = signing("nfeio", "github") },
			"signing[1]: github sets the header X-Hub-Signature, which nfeio sets already",
		},
		"custom, header of another": {
			func(e *outbox.Endpoint) {
				plain("stripe")(e)
				e.Signing = append(e.Signing, custom("stripe-SIGNATURE"))
			},
			"signing[1]: custom sets the header stripe-SIGNATURE, which stripe sets already",
		},
		"custom, header of NFE.io": {
			func(e *outbox.Endpoint) { plain("nfeio")(e); e.Signing = append(e.Signing, custom("x-hook-id")) },
			"signing[1]: custom sets the header x-hook-id, which nfeio sets already",
		},
		"without a secret":        {func(e *outbox.Endpoint) { e.Signing = signing("standard", "github") }, "secrets: is missing; github signing needs one"},
		"custom without a secret": {func(e *outbox.Endpoint) { e.Signing = []outbox.Signing{custom("X-Sig")} }, "secrets: is missing; custom signing needs one"},
		"plain secrets":           {plain("stripe"), ""},
		"plain secret, empty":     {func(e *outbox.Endpoint) { plain("stripe")(e); e.Secrets[1] = "" }, "secrets[1]: is empty"},
		"plain secret for several": {func(e *outbox.Endpoint) {
			e.Secrets, e.Signing = []outbox.Secret{"TOPSECRET"}, signing("github", "standard")
		}, "secrets[0]: must begin with whsec_ (HMAC-SHA256) or whsk_ (ed25519)"},
		"custom":                  {own(func(*outbox.Signing) {}), ""},
		"custom, borrowed name":   {own(func(s *outbox.Signing) { s.Header = "Webhook-Signature" }), ""},
		"custom, braces as text":  {own(func(s *outbox.Signing) { s.Content = `{"id":"{id}", {}}` }), ""},
		"custom, algorithm":       {own(func(s *outbox.Signing) { s.Algorithm = "TOPSECRET" }), "signing.algorithm: is not one of sha1, sha256, sha512"},
		"custom, encoding":        {own(func(s *outbox.Signing) { s.Encoding = "Hex" }), "signing.encoding: is not one of hex, HEX, base64"},
		"custom, no header":       {own(func(s *outbox.Signing) { s.Header = "" }), "signing.header: is missing"},
		"custom, bad header":      {own(func(s *outbox.Signing) { s.Header = "X Sig" }), "signing.header: is not a valid header name"},
		"custom, reserved header": {own(func(s *outbox.Signing) { s.Header = "Content-Length" }), "signing.header: Content-Length is set by walhook and cannot be given"},
		"custom, webhook-id":      {own(func(s *outbox.Signing) { s.Header = "webhook-ID" }), "signing.header: webhook-ID is set by walhook and cannot be given"},
		"custom, prefix":          {own(func(s *outbox.Signing) { s.Prefix = "a\r\nb: TOPSECRET" }), "signing.prefix: holds a line break, NUL or another control character"},
		"custom, placeholder":     {own(func(s *outbox.Signing) { s.Content = "{TOPSECRET}.{body}" }), "signing.content: holds a {…} that is not one of {body}, {id}, {timestamp}"},
		"custom, constant":        {own(func(s *outbox.Signing) { s.Content = "body" }), "signing.content: holds none of {body}, {id}, {timestamp}"},
		"custom, all at once": {func(e *outbox.Endpoint) {
			e.Secrets, e.Signing = []outbox.Secret{"TOPSECRET"}, []outbox.Signing{{Scheme: outbox.SchemeGitHub}, {Scheme: outbox.SchemeCustom}}
		}, "signing[1].algorithm: is not one of sha1, sha256, sha512\n" +
			"signing[1].encoding: is not one of hex, HEX, base64\n" +
			"signing[1].header: is missing\n" +
			"signing[1].content: holds none of {body}, {id}, {timestamp}"},
		"header of the scheme":     {func(e *outbox.Endpoint) { plain("github")(e); header("x-hub-signature-256", "TOPSECRET")(e) }, "headers.x-hub-signature-256: is set by walhook and cannot be given"},
		"header of another scheme": {func(e *outbox.Endpoint) { plain("stripe")(e); header("X-Hub-Signature", "x")(e) }, ""},
		"header of NFE.io":         {func(e *outbox.Endpoint) { plain("nfeio")(e); header("X-HOOK-ATTEMPTS", "x")(e) }, "headers.X-HOOK-ATTEMPTS: is set by walhook and cannot be given"},
		"format":                   {func(e *outbox.Endpoint) { e.Format = "xml" }, `format: "xml" is not one of standard, raw, cloudevents, cloudevents-binary`},
		"timeout":                  {timeout(0), "timeout: must be more than 0"},

		"header":            {header("X-Env", "prod"), ""},
		"user-agent":        {header("User-Agent", "acme"), ""},
		"authorization":     {header("Authorization", "Bearer x"), ""},
		"host":              {header("Host", "x"), "headers.Host: is set by walhook and cannot be given"},
		"content-type":      {header("content-TYPE", "x"), "headers.content-TYPE: is set by walhook and cannot be given"},
		"content-length":    {header("Content-Length", "1"), "headers.Content-Length: is set by walhook and cannot be given"},
		"transfer-encoding": {header("Transfer-Encoding", "chunked"), "headers.Transfer-Encoding: is set by walhook and cannot be given"},
		"connection":        {header("connection", "close"), "headers.connection: is set by walhook and cannot be given"},
		"webhook-id":        {header("Webhook-Id", "x"), "headers.Webhook-Id: is set by walhook and cannot be given"},
		"bad name":          {header("X Env:", "x"), `headers."X Env:": is not a valid header name`},
		"empty name":        {header("", "x"), `headers."": is not a valid header name`},
		"CR LF":             {header("X-Env", "TOPSECRET\r\nX-Evil: 1"), "headers.X-Env: its value holds a line break, NUL or another control character"},
		"NUL":               {header("X-Env", "TOPSECRET\x00"), "headers.X-Env: its value holds a line break, NUL or another control character"},
		"twice":             {func(e *outbox.Endpoint) { e.Headers = map[string]string{"X-A": "1", "x-a": "2"} }, "headers.x-a: is the same header as X-A"},

		"CA in PEM":     {ca(pem), ""},
		"CA in a file":  {ca(file), ""},
		"CA, no file":   {ca(filepath.Join(dir, "none")), "tls.ca: stat " + filepath.Join(dir, "none") + ": no such file or directory"},
		"CA, a device":  {ca("/dev/zero"), "tls.ca: /dev/zero is not a file"},
		"CA, no PEM":    {ca("-----BEGIN nonsense"), "tls.ca: holds no certificate in PEM"},
		"TLS version":   {func(e *outbox.Endpoint) { e.TLS.MinVersion = "1.1" }, `tls.min_version: "1.1" is not one of "1.2", "1.3"`},
		"TLS 1.3":       {func(e *outbox.Endpoint) { e.TLS.MinVersion = "1.3" }, ""},
		"TLS undecided": {func(e *outbox.Endpoint) { e.TLS.MinVersion = "" }, ""},
		"all at once": {func(e *outbox.Endpoint) {
			e.URL, e.TLS.MinVersion = "", "9"
			secret("TOPSECRET")(e)
			header("Host", "TOPSECRET")(e)
		}, "url: is missing\n" +
			"secrets[1]: must begin with whsec_ (HMAC-SHA256) or whsk_ (ed25519)\n" +
			"headers.Host: is set by walhook and cannot be given\n" +
			`tls.min_version: "9" is not one of "1.2", "1.3"`},
	} {
		t.Run(name, func(t *testing.T) {
			e := endpoint("https://x.example/hooks")
			c.change(e)
			err := Validate(*e)
			if c.want == "" {
				require.NoError(t, err)
				return
			}
			require.EqualError(t, err, c.want)
			require.NotContains(t, err.Error(), "TOPSECRET")
		})
	}
}

func FuzzSecret(f *testing.F) {
	f.Add(hmacSecret)
	f.Add(edSecret)
	f.Add("whsk_" + strings.Repeat("A", 86) + "==")
	f.Fuzz(func(t *testing.T, s string) {
		k, err := parseSecret(s)
		if err == nil {
			require.NotEmpty(t, (&signature{keys: []secretKey{k}}).sign("a", "1", &body{}))
			return
		}
		for _, prefix := range []string{"whsec_", "whsk_"} {
			if hidden, ok := strings.CutPrefix(s, prefix); ok && len(hidden) >= 8 {
				require.NotContains(t, err.Error(), hidden)
			}
		}
	})
}
