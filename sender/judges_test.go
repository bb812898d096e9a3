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
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc"
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

// judged is a request that one of the npm packages of testdata/judges is to judge.
type judged struct {
	Judge   string            `json:"judge"`
	Headers map[string]string `json:"headers"`
	Body    []byte            `json:"body"`
	Secret  string            `json:"secret"`
	Want    any               `json:"want"` // of cloudevents: the events that it has to find
}

// askJudges tells what each request's judge says: nothing where it accepts it, else why not.
func askJudges(t *testing.T, all []judged) (said []string) {
	t.Helper()
	dir := os.Getenv("WALHOOK_TEST_JUDGES")
	if dir == "" {
		t.Skip("needs npm packages, which `make judges` installs")
	}
	node, err := exec.LookPath("node")
	if err != nil {
		t.Skip("needs node: ", err)
	}
	in, err := json.Marshal(all)
	require.NoError(t, err)
	script, err := filepath.Abs(filepath.Join("testdata", "judges", "judge.cjs"))
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), node, script)
	cmd.Dir, cmd.Stdin = dir, bytes.NewReader(in)
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	require.NoError(t, err, complaints.String())
	require.NoError(t, json.Unmarshal(out, &said))
	require.Len(t, said, len(all))
	return said
}

// The verifiers that receivers have, at the versions of testdata/judges. Each has to accept what
// is sent, by every secret that is to sign, and to refuse it with a byte changed.
func TestOtherPeoplesCodeAcceptsEverySignature(t *testing.T) {
	const second outbox.Secret = "whsec_YW5vdGhlciBrZXksIG9mIHRoaXJ0eS10d28gYnl0ZXM="
	var names []string
	var requests []judged
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
				requests = append(requests, judged{Judge: c.judge, Headers: got.header, Body: body, Secret: secret.Reveal()})
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

	said := askJudges(t, requests)
	for i, name := range names {
		if strings.HasSuffix(name, "refused") {
			require.NotEmpty(t, said[i], name)
		} else {
			require.Empty(t, said[i], name)
		}
	}
	t.Logf("%d requests judged", len(names))
}

// The JavaScript SDK of CloudEvents finds the event that was sent, in each form and in a batch, and none in what
// lacks an attribute.
func TestOtherPeoplesCodeReadsEveryCloudEvent(t *testing.T) {
	type found struct {
		ID           string          `json:"id"`
		Type         string          `json:"type"`
		Source       string          `json:"source"`
		Time         string          `json:"time"`
		ContentType  string          `json:"datacontenttype"`
		PartitionKey string          `json:"partitionkey"`
		Sequence     string          `json:"sequence"`
		Data         json.RawMessage `json:"data"`
	}
	event := func(id, sequence, data string) found {
		return found{
			ID: id, Type: "invoice.paid", Source: "/walhook/default/walhook", Time: "2026-03-01T11:30:15.123Z", ContentType: "application/json",
			PartitionKey: "inv-7", Sequence: sequence, Data: json.RawMessage(data),
		}
	}
	one := []found{event("evt_1", "00000016b374d848-0000000000000003", `{"amount": 120.5}`)}
	at := func(e *outbox.Event) { e.Position = cdc.Position{Commit: 0x16B374D848, Ordinal: 3} }
	structured, binary := sentTo(t, endpoint("https://x.example/", cloudEvents), at), sentTo(t, endpoint("https://x.example/", cloudEventsBinary), at)
	text := sentTo(t, endpoint("https://x.example/", cloudEvents), at, func(e *outbox.Event) { e.JSON, e.Data = false, []byte("grüezi") })
	bytesToo := sentTo(t, endpoint("https://x.example/", cloudEvents), at, func(e *outbox.Event) { e.JSON, e.Data = false, []byte{1, 0xff} })
	texts := []found{event(one[0].ID, one[0].Sequence, `[103, 114, 195, 188, 101, 122, 105]`)} // no JSON, so it goes as data_base64
	texts[0].ContentType = "text/plain; charset=utf-8"
	many := []found{event("evt_1", "00000016b374d848-0000000000000001", `{"n": 1}`), event("evt_2", "00000016b374d848-0000000000000002", `{"n": 2}`)}
	raw := []found{event(one[0].ID, one[0].Sequence, `[1, 255]`)}
	raw[0].ContentType = "application/octet-stream"
	batch := sent{header: map[string]string{}}
	client := setup(t, fake(func(r *http.Request) (*http.Response, error) {
		for name := range r.Header {
			batch.header[strings.ToLower(name)] = r.Header.Get(name)
		}
		var err error
		batch.body, err = io.ReadAll(r.Body)
		require.NoError(t, err)
		return answer(200)
	}))
	require.Equal(t, outbox.Delivered, client.Send(t.Context(), attemptOf(endpoint("https://x.example/", cloudEvents, batched), eventsOf(2)...)).Verdict)

	without := func(s sent, header string) sent {
		s.header = maps.Clone(s.header)
		delete(s.header, header)
		return s
	}
	changed := func(s sent) sent {
		s.body = bytes.Replace(s.body, []byte(`"type"`), []byte(`"kind"`), 1)
		return s
	}
	cases := []struct {
		name    string
		sent    sent
		want    []found
		refused bool
	}{
		{"structured", structured, one, false},
		{"structured, text", text, texts, false},
		{"structured, bytes", bytesToo, raw, false},
		{"binary", binary, one, false},
		{"batch", batch, many, false},
		{"structured, another event", structured, many[:1], true},
		{"structured, without a type", changed(structured), one, true},
		{"binary, without a type", without(binary, "ce-type"), one, true},
		{"batch, one without a type", changed(batch), many, true},
	}
	var requests []judged
	for _, c := range cases {
		requests = append(requests, judged{Judge: "cloudevents", Headers: c.sent.header, Body: c.sent.body, Want: c.want})
	}
	for i, said := range askJudges(t, requests) {
		if cases[i].refused {
			require.NotEmpty(t, said, cases[i].name)
		} else {
			require.Empty(t, said, cases[i].name)
		}
	}
}

// Debian's program webhook (adnanh/webhook) runs a command for what is signed as its rule says, and for nothing else.
func TestOtherPeoplesCodeRunsItsHookForOurSignatures(t *testing.T) {
	program, err := exec.LookPath("webhook")
	if err != nil {
		t.Skip("needs Debian's package webhook: ", err)
	}
	dir := t.TempDir()
	ran := filepath.Join(dir, "ran")
	script := filepath.Join(dir, "hook")
	require.NoError(t, os.WriteFile(script, []byte("#!/bin/sh\nprintf '%s %s\\n' \"$1\" \"$2\" >>'"+ran+"'\n"), 0o700))
	hook := func(id, algorithm, header string) map[string]any {
		parameter := func(source, name string) map[string]any { return map[string]any{"source": source, "name": name} }
		return map[string]any{
			"id": id, "execute-command": script, "http-methods": []string{"POST"}, "trigger-rule-mismatch-http-response-code": 403, "trigger-signature-soft-failures": true,
			"include-command-output-in-response": true, // so that it has ended when the answer comes
			"pass-arguments-to-command":          []any{map[string]any{"source": "string", "name": id}, parameter("payload", "data.amount")},
			"trigger-rule": map[string]any{"or": []any{map[string]any{"match": map[string]any{ // in an or a wrong signature is a mismatch, else an error
				"type": "payload-hmac-" + algorithm, "secret": plainSecret, "parameter": parameter("header", header),
			}}}},
		}
	}
	hooks, err := json.Marshal([]any{
		hook("github-256", "sha256", "X-Hub-Signature-256"), hook("github-1", "sha1", "X-Hub-Signature"), hook("own-512", "sha512", "X-Own"),
	})
	require.NoError(t, err)
	file := filepath.Join(dir, "hooks.json")
	require.NoError(t, os.WriteFile(file, hooks, 0o600))

	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	address := l.Addr().(*net.TCPAddr)
	require.NoError(t, l.Close())
	cmd := exec.Command(program, "-hooks", file, "-ip", "127.0.0.1", "-port", strconv.Itoa(address.Port), "-verbose")
	var log bytes.Buffer // read it when the program has ended
	cmd.Stdout, cmd.Stderr = &log, &log
	require.NoError(t, cmd.Start())
	ended := sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	defer ended()
	require.Eventually(t, func() bool {
		conn, err := net.Dial("tcp", address.String())
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	}, patience, 10*time.Millisecond)

	own := custom("X-Own")
	own.Algorithm, own.Prefix = "sha512", "sha512="
	b := setup(t, nil)
	send := func(id string, signing []outbox.Signing, secret outbox.Secret) outbox.Outcome {
		return b.send(endpoint("http://"+address.String()+"/hooks/"+id, func(e *outbox.Endpoint) {
			e.ID, e.Signing, e.Secrets = id, signing, []outbox.Secret{secret}
		}))
	}
	var want string
	for _, c := range []struct {
		id      string
		signing []outbox.Signing
	}{
		{"github-256", signing("github")},
		{"github-1", signing("github")},
		{"own-512", []outbox.Signing{own}},
	} {
		require.Equal(t, outbox.Delivered, send(c.id, c.signing, plainSecret).Verdict, c.id)
		require.Equal(t, 403, send(c.id, c.signing, "another one").Status, c.id)
		require.NotEqual(t, outbox.Delivered, send(c.id, signing("none"), plainSecret).Verdict, c.id)
		want += c.id + " 120.50\n"
	}
	ended()
	got, err := os.ReadFile(ran)
	require.NoError(t, err)
	require.Equal(t, want, string(got), log.String())
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
