package sender

import (
	"bytes"
	"crypto/hmac"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"hash"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
)

// sent is a request as a receiver gets it.
type sent struct {
	header map[string]string // by the name in lower case
	body   []byte
}

// sentTo is the third attempt of an event at an endpoint, now.
func sentTo(t *testing.T, to *outbox.Endpoint, change ...func(*outbox.Event)) sent {
	t.Helper()
	got := sent{header: map[string]string{}}
	client := setup(t, fake(func(r *http.Request) (*http.Response, error) {
		for name, values := range r.Header {
			if len(values) > 0 {
				got.header[strings.ToLower(name)] = strings.Join(values, ", ")
			}
		}
		var err error
		got.body, err = io.ReadAll(r.Body)
		require.NoError(t, err)
		return answer(200)
	}))
	ev := event()
	for _, f := range change {
		f(ev)
	}
	o := client.Send(t.Context(), outbox.Attempt{Event: ev, Endpoint: to, Number: 3})
	require.Equal(t, outbox.Delivered, o.Verdict, o.Detail)
	return got
}

// bodies are what is signed: small, in several pieces, and beyond ASCII.
var bodies = map[string]func(*outbox.Event){
	"small": func(*outbox.Event) {},
	"large": func(e *outbox.Event) { e.Data = []byte(`{"a": "` + strings.Repeat("ü", 100_000) + `"}`) },
	"odd":   func(e *outbox.Event) { e.Type, e.Data = "é\u2028<>", []byte(" [1.00, \"\\u0000\",\n null] ") },
}

// The verifiers that receivers have, at the versions of testdata/judges. Each has to accept what
// is sent, by every secret that is to sign, and to refuse it with a byte changed.
func TestOtherPeoplesCodeAcceptsEverySignature(t *testing.T) {
	dir := os.Getenv("WALHOOK_TEST_JUDGES")
	if dir == "" {
		t.Skip("needs npm packages, which `make judges` installs")
	}
	node, err := exec.LookPath("node")
	if err != nil {
		t.Skip("needs node: ", err)
	}
	const second outbox.Secret = "whsec_YW5vdGhlciBrZXksIG9mIHRoaXJ0eS10d28gYnl0ZXM="
	type request struct {
		Judge   string            `json:"judge"`
		Headers map[string]string `json:"headers"`
		Body    []byte            `json:"body"`
		Secret  string            `json:"secret"`
	}
	var names []string
	var requests []request
	for _, c := range []struct {
		judge   string
		signing []outbox.Signing
		signs   []outbox.Secret // these have to be accepted
		silent  []outbox.Secret // of these there is no signature
	}{
		{"standardwebhooks", signing("standard"), []outbox.Secret{hmacSecret, second}, nil},
		{"standardwebhooks", signing("github", "standard", "stripe"), []outbox.Secret{hmacSecret}, nil},
		{"svix", signing("standard"), []outbox.Secret{hmacSecret, second}, nil},
		{"stripe", signing("stripe"), []outbox.Secret{plainSecret, hmacSecret}, nil}, // Stripe's own begin with whsec_ too
		{"octokit", signing("github"), []outbox.Secret{plainSecret}, []outbox.Secret{second}},
		{"nfe-io", signing("nfeio"), []outbox.Secret{plainSecret}, []outbox.Secret{second}},
		{"octokit", signing("standard", "github", "shopify"), []outbox.Secret{hmacSecret}, []outbox.Secret{second}},
	} {
		for name, body := range bodies {
			got := sentTo(t, endpoint("https://x.example/", func(e *outbox.Endpoint) {
				e.Signing, e.Secrets = c.signing, append(c.signs[:len(c.signs):len(c.signs)], c.silent...)
			}), body)
			add := func(verdict string, secret outbox.Secret, body []byte) {
				names = append(names, c.judge+", "+name+", "+verdict)
				requests = append(requests, request{c.judge, got.header, body, secret.Reveal()})
			}
			for _, secret := range c.signs {
				add("accepted", secret, got.body)
				add("refused", secret, bytes.Replace(got.body, []byte(`"type"`), []byte(`"typo"`), 1))
			}
			for _, secret := range c.silent {
				add("refused", secret, got.body)
			}
		}
	}

	in, err := json.Marshal(requests)
	require.NoError(t, err)
	script, err := filepath.Abs(filepath.Join("testdata", "judges", "judge.cjs"))
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), node, script)
	cmd.Dir, cmd.Stdin = dir, bytes.NewReader(in)
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	require.NoError(t, err, complaints.String())
	var said []string
	require.NoError(t, json.Unmarshal(out, &said))
	require.Len(t, said, len(names))
	for i, name := range names {
		if strings.HasSuffix(name, "refused") {
			require.NotEmpty(t, said[i], name)
		} else {
			require.Empty(t, said[i], name)
		}
	}
	t.Logf("%d requests judged", len(names))
}

// What each receiver's documentation tells it to compute, computed by crypto/hmac over the bytes
// that came.
func TestEverySchemeIsWhatItsReceiverComputes(t *testing.T) {
	sum := func(algorithm func() hash.Hash, key string, content ...[]byte) []byte {
		h := hmac.New(algorithm, []byte(key))
		h.Write(bytes.Join(content, nil))
		return h.Sum(nil)
	}
	lower, b64 := hex.EncodeToString, base64.StdEncoding.EncodeToString
	upper := func(b []byte) string { return strings.ToUpper(hex.EncodeToString(b)) }
	own := func(algorithm, encoding, prefix, content string) []outbox.Signing {
		return []outbox.Signing{{
			Scheme: outbox.SchemeCustom, Algorithm: algorithm, Encoding: encoding, Header: "X-Sig", Prefix: prefix, Content: content,
		}}
	}
	for name, c := range map[string]struct {
		signing []outbox.Signing
		want    func(s sent, key string) map[string]string
	}{
		"github": {signing("github"), func(s sent, key string) map[string]string {
			return map[string]string{
				"x-hub-signature-256": "sha256=" + lower(sum(sha256.New, key, s.body)),
				"x-hub-signature":     "sha1=" + lower(sum(sha1.New, key, s.body)),
			}
		}},
		"stripe": {signing("stripe"), func(s sent, key string) map[string]string {
			at := s.header["webhook-timestamp"]
			content := []byte(at + "." + string(s.body))
			return map[string]string{"stripe-signature": "t=" + at + ",v1=" + lower(sum(sha256.New, key, content)) + ",v1=" + lower(sum(sha256.New, "older", content))}
		}},
		"shopify": {signing("shopify"), func(s sent, key string) map[string]string {
			return map[string]string{"x-shopify-hmac-sha256": b64(sum(sha256.New, key, s.body))}
		}},
		"nfeio": {signing("nfeio"), func(s sent, key string) map[string]string {
			checksum := md5.Sum(s.body)
			return map[string]string{
				"x-hub-signature": "sha1=" + upper(sum(sha1.New, key, s.body)),
				"x-nfe-signature": lower(sum(sha256.New, key, s.body)),
				"x-hook-id":       "evt_1",
				"x-hook-attempts": "2",
				"content-md5":     b64(checksum[:]),
			}
		}},
		"none": {signing("none"), func(sent, string) map[string]string { return nil }},
		"custom at its defaults": {[]outbox.Signing{custom("X-Sig")}, func(s sent, key string) map[string]string {
			return map[string]string{"x-sig": lower(sum(sha256.New, key, s.body))}
		}},
		"custom, sha1 HEX": {own("sha1", "HEX", "", "{body}"), func(s sent, key string) map[string]string {
			return map[string]string{"x-sig": upper(sum(sha1.New, key, s.body))}
		}},
		"custom, sha512 HEX": {own("sha512", "HEX", "HMAC ", "{body}"), func(s sent, key string) map[string]string {
			return map[string]string{"x-sig": "HMAC " + upper(sum(sha512.New, key, s.body))}
		}},
		"custom, base64 of several parts": {own("sha512", "base64", "v0=", "v0:{timestamp}:{body}:{id}:{body}!"), func(s sent, key string) map[string]string {
			return map[string]string{"x-sig": "v0=" + b64(sum(sha512.New, key, []byte("v0:"+s.header["webhook-timestamp"]+":"), s.body, []byte(":evt_1:"), s.body, []byte("!")))}
		}},
		"custom, without the body": {own("sha256", "hex", "", "{id}"), func(_ sent, key string) map[string]string {
			return map[string]string{"x-sig": lower(sum(sha256.New, key, []byte("evt_1")))}
		}},
		"several": {append(signing("shopify", "github"), custom("X-Sig")), func(s sent, key string) map[string]string {
			return map[string]string{
				"x-hub-signature-256":   "sha256=" + lower(sum(sha256.New, key, s.body)),
				"x-hub-signature":       "sha1=" + lower(sum(sha1.New, key, s.body)),
				"x-shopify-hmac-sha256": b64(sum(sha256.New, key, s.body)),
				"x-sig":                 lower(sum(sha256.New, key, s.body)),
			}
		}},
	} {
		for kind, body := range bodies {
			t.Run(name+", "+kind, func(t *testing.T) {
				got := sentTo(t, endpoint("https://x.example/", func(e *outbox.Endpoint) {
					e.Signing, e.Secrets = c.signing, []outbox.Secret{plainSecret, "older"}
				}), body)
				want := c.want(got, plainSecret)
				for name, value := range want {
					require.Equal(t, value, got.header[name], name)
				}
				others := map[string]string{"content-type": "application/json", "user-agent": "walhook/1.2.3", "webhook-id": "evt_1", "webhook-attempt": "3"}
				for name, value := range others {
					require.Equal(t, value, got.header[name], name)
				}
				require.Len(t, got.header, len(want)+len(others)+1, "and webhook-timestamp")
			})
		}
	}
}
