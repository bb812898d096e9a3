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
	cert, key := clientPair(t)
	file := filepath.Join(t.TempDir(), "ca.pem")
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

	auth := func(a outbox.Auth) func(*outbox.Endpoint) { return func(e *outbox.Endpoint) { e.Auth = a } }
	oauth := func(change func(*outbox.OAuth2)) func(*outbox.Endpoint) {
		o := outbox.OAuth2{TokenURL: "https://idp.example/token", ClientID: "me", ClientSecret: "TOPSECRET", Scopes: []string{"hooks:write"}}
		change(&o)
		return auth(outbox.Auth{OAuth2: &o})
	}
	proxy := func(s outbox.Secret) func(*outbox.Endpoint) { return func(e *outbox.Endpoint) { e.Proxy = s } }

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
		"userinfo":           {url("https://me:TOPSECRET@x.example/"), "url: holds a user name or password, which are given in auth"},
		"table, userinfo":    {table("https://me:TOPSECRET@x.example/"), "url: holds a user name or password, which are given in auth"},
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

		"header":              {header("X-Env", "prod"), ""},
		"user-agent":          {header("User-Agent", "acme"), ""},
		"authorization":       {header("Authorization", "Bearer x"), ""},
		"host":                {header("Host", "x"), "headers.Host: is set by walhook and cannot be given"},
		"content-type":        {header("content-TYPE", "x"), "headers.content-TYPE: is set by walhook and cannot be given"},
		"content-length":      {header("Content-Length", "1"), "headers.Content-Length: is set by walhook and cannot be given"},
		"transfer-encoding":   {header("Transfer-Encoding", "chunked"), "headers.Transfer-Encoding: is set by walhook and cannot be given"},
		"connection":          {header("connection", "close"), "headers.connection: is set by walhook and cannot be given"},
		"webhook-id":          {header("Webhook-Id", "x"), "headers.Webhook-Id: is set by walhook and cannot be given"},
		"bad name":            {header("X Env:", "x"), `headers."X Env:": is not a valid header name`},
		"empty name":          {header("", "x"), `headers."": is not a valid header name`},
		"CR LF":               {header("X-Env", "TOPSECRET\r\nX-Evil: 1"), "headers.X-Env: its value holds a line break, NUL or another control character"},
		"NUL":                 {header("X-Env", "TOPSECRET\x00"), "headers.X-Env: its value holds a line break, NUL or another control character"},
		"proxy-authorization": {header("Proxy-Authorization", "x"), "headers.Proxy-Authorization: is set by walhook and cannot be given"},
		"large":               {header("X-Env", strings.Repeat("x", 8193)), "headers.X-Env: its value is larger than 8192 bytes"},
		"largest":             {header("X-Env", strings.Repeat("x", 8192)), ""},
		"large together": {func(e *outbox.Endpoint) {
			e.Headers = map[string]string{}
			for _, name := range []string{"A", "B", "C", "D"} {
				e.Headers[name] = strings.Repeat("x", 8192)
			}
		}, "headers: have 32788 bytes together, 32768 are allowed"},
		"twice": {func(e *outbox.Endpoint) { e.Headers = map[string]string{"X-A": "1", "x-a": "2"} }, "headers.x-a: is the same header as X-A"},

		"CA in PEM":             {ca(pem), ""},
		"CA in a file":          {ca(file), "tls.ca: is not PEM, and no file is read for an endpoint"},
		"CA, no file":           {ca("/TOPSECRET"), "tls.ca: is not PEM, and no file is read for an endpoint"},
		"CA, no PEM":            {ca("-----BEGIN nonsense"), "tls.ca: holds no certificate in PEM"},
		"TLS version":           {func(e *outbox.Endpoint) { e.TLS.MinVersion = "1.1" }, `tls.min_version: "1.1" is not one of "1.2", "1.3"`},
		"TLS 1.3":               {func(e *outbox.Endpoint) { e.TLS.MinVersion = "1.3" }, ""},
		"TLS undecided":         {func(e *outbox.Endpoint) { e.TLS.MinVersion = "" }, ""},
		"basic":                 {auth(outbox.Auth{Basic: &outbox.Basic{Username: "me", Password: "grüezi: x"}}), ""},
		"basic, password alone": {auth(outbox.Auth{Basic: &outbox.Basic{Password: "TOPSECRET"}}), ""},
		"basic, nothing":        {auth(outbox.Auth{Basic: &outbox.Basic{}}), "auth.basic.username: is missing"},
		"basic, colon":          {auth(outbox.Auth{Basic: &outbox.Basic{Username: "TOP:SECRET"}}), "auth.basic.username: holds a colon, which ends a user name (RFC 7617)"},
		"basic, CR LF":          {auth(outbox.Auth{Basic: &outbox.Basic{Username: "me", Password: "TOPSECRET\r\nX-Evil: 1"}}), "auth.basic.password: holds a line break, NUL or another control character"},
		"basic, large":          {auth(outbox.Auth{Basic: &outbox.Basic{Username: "me", Password: outbox.Secret(strings.Repeat("x", 8000))}}), "auth.basic: makes a header larger than 8192 bytes"},
		"bearer":                {auth(outbox.Auth{Bearer: "abc.def~+/=="}), ""},
		"bearer, CR LF":         {auth(outbox.Auth{Bearer: "TOPSECRET\r\nX-Evil: 1"}), "auth.bearer: holds a space, a line break or another character that a token cannot have"},
		"basic and bearer":      {auth(outbox.Auth{Basic: &outbox.Basic{Username: "TOPSECRET"}, Bearer: "TOPSECRET"}), "auth: has both basic and bearer; they share a header, so it is one of basic, bearer, oauth2"},
		"auth and its header":   {func(e *outbox.Endpoint) { auth(outbox.Auth{Bearer: "x"})(e); header("authorization", "TOPSECRET")(e) }, "headers.authorization: is set by auth; give one of them"},
		"auth and signing": {func(e *outbox.Endpoint) {
			own(func(s *outbox.Signing) { s.Header = "Authorization" })(e)
			e.Auth.Bearer = "TOPSECRET"
		}, "signing: sets the header Authorization, which auth sets already"},
		"oauth2":           {oauth(func(*outbox.OAuth2) {}), ""},
		"oauth2, nothing":  {auth(outbox.Auth{OAuth2: &outbox.OAuth2{}}), "auth.oauth2.token_url: is missing\nauth.oauth2.client_id: is missing\nauth.oauth2.client_secret: is missing"},
		"oauth2, userinfo": {oauth(func(o *outbox.OAuth2) { o.TokenURL = "https://me:TOPSECRET@x.example/" }), "auth.oauth2.token_url: holds a user name or password, which are given in auth"},
		"oauth2, scope":    {oauth(func(o *outbox.OAuth2) { o.Scopes = []string{"a", "TOP SECRET"} }), "auth.oauth2.scopes[1]: is not the name of a scope"},
		"oauth2, plain":    {oauth(func(o *outbox.OAuth2) { o.TokenURL = "http://idp.internal/token" }), ""},
		"oauth2, plain of table": {func(e *outbox.Endpoint) {
			table("http://x.example/")(e)
			e.Network.Allow = prefixes("10.0.0.0/8")
			oauth(func(o *outbox.OAuth2) { o.TokenURL = "http://10.0.0.1/token" })(e)
		}, "auth.oauth2.token_url: must begin with https://"},
		"mtls":             {auth(outbox.Auth{MTLS: &outbox.KeyPair{Cert: cert, Key: key}}), ""},
		"mtls and bearer":  {auth(outbox.Auth{MTLS: &outbox.KeyPair{Cert: cert, Key: key}, Bearer: "x"}), ""},
		"mtls, nothing":    {auth(outbox.Auth{MTLS: &outbox.KeyPair{}}), "auth.mtls.cert: is missing"},
		"mtls, no key":     {auth(outbox.Auth{MTLS: &outbox.KeyPair{Cert: cert}}), "auth.mtls.key: is missing"},
		"mtls, a path":     {auth(outbox.Auth{MTLS: &outbox.KeyPair{Cert: cert, Key: outbox.Secret(file)}}), "auth.mtls.key: is not a private key in PEM"},
		"mtls, two of one": {auth(outbox.Auth{MTLS: &outbox.KeyPair{Cert: cert, Key: outbox.Secret(cert)}}), "auth.mtls: tls: found a certificate rather than a key in the PEM for the private key"},
		"mtls, of another": {auth(outbox.Auth{MTLS: &outbox.KeyPair{Cert: pem, Key: key}}), "auth.mtls: tls: private key does not match public key"},
		"mtls, plain http": {func(e *outbox.Endpoint) {
			url("http://x.example/")(e)
			e.Auth.MTLS = &outbox.KeyPair{Cert: cert, Key: key}
		}, "auth.mtls: needs a url that begins with https://"},
		"proxy":             {proxy("http://me:TOPSECRET@proxy.internal:3128"), ""},
		"proxy by TLS":      {proxy("https://proxy.internal/"), ""},
		"no proxy":          {proxy(outbox.NoProxy), ""},
		"proxy, socks":      {proxy("socks5://me:TOPSECRET@proxy.internal"), "proxy: must begin with http:// or https://, or be none"},
		"proxy, no scheme":  {proxy("TOPSECRET"), "proxy: must begin with http:// or https://, or be none"},
		"proxy, a mess":     {proxy("http://TOPSECRET:%zz@x"), "proxy: is not a valid URL"},
		"proxy, port":       {proxy("http://proxy:0"), "proxy: its port is not one of 1 to 65535"},
		"proxy with a path": {proxy("http://proxy:3128/TOPSECRET"), "proxy: has a path; a proxy is a host and a port"},

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
