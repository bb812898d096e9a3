package sender

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/sender/sendertest"
)

// planted is in every place that takes a secret; wherever else it is found, it was let out.
const planted = "KKhunter2KK"

// lets tells whether text holds the planted secret, in any form in which it goes about.
func lets(text string) bool {
	forms := []string{
		planted, hex.EncodeToString([]byte(planted)), strings.ToUpper(hex.EncodeToString([]byte(planted))),
		base64.StdEncoding.EncodeToString([]byte("me:" + planted)), "[75 75 104", // a slice of bytes
	}
	for shift := range 3 { // the middle of its base64, wherever it begins in what is encoded
		forms = append(forms, base64.StdEncoding.EncodeToString([]byte(strings.Repeat("x", shift) + planted))[4:12])
	}
	return slices.ContainsFunc(forms, func(f string) bool { return strings.Contains(text, f) })
}

// full is an endpoint with a secret in every place.
func full(url string, change ...func(*outbox.Endpoint)) *outbox.Endpoint {
	return endpoint(url+"?token="+planted, append([]func(*outbox.Endpoint){func(e *outbox.Endpoint) {
		e.Secrets = []outbox.Secret{outbox.Secret("whsec_" + base64.StdEncoding.EncodeToString([]byte(planted))), hmacSecret}
		e.Signing = signing("standard", "github")
		e.Headers = map[string]string{"X-Key": planted, "Cookie": "a=" + planted}
		e.Auth.Basic = &outbox.Basic{Username: "me", Password: planted}
		e.Breaker = outbox.BreakerPolicy{ConsecutiveFailures: 2}
		e.Timeout = 500 * time.Millisecond
	}}, change...)...)
}

func TestNoFailureLetsASecretOut(t *testing.T) {
	cert, ca, err := sendertest.Certificate("127.0.0.1", time.Time{})
	require.NoError(t, err)
	_, key := clientPair(t)
	// An echo tells a sender its own secrets, in every place that an answer has.
	echo := func(status int) sendertest.Answer {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "https://"+planted+"/")
			w.Header().Set("X-"+planted, r.Header.Get("Authorization"))
			w.Header().Set("Retry-After", planted)
			w.WriteHeader(status)
			_, _ = w.Write([]byte(`{"error":"` + planted + `","access_token":"` + planted + `\r\n"}`))
		}
	}
	plain := sendertest.New(t, sendertest.Config{})
	secure := sendertest.New(t, sendertest.Config{TLS: cert})
	b := setup(t, nil)
	var said []string
	say := func(what ...any) {
		for _, w := range what {
			said = append(said, fmt.Sprintf("%v", w), fmt.Sprintf("%+v", w), fmt.Sprintf("%#v", w), fmt.Sprintf("%q", w))
		}
	}
	n := 0
	attempt := func(e *outbox.Endpoint, reasons ...outbox.Reason) {
		t.Helper()
		n++
		e.ID = fmt.Sprint("n", n)
		for range 2 {
			o := b.send(e)
			require.Contains(t, reasons, o.Reason, "%d: %+v", n, o)
			say(o)
			made, _ := b.target(e)
			say(made, e, *e, e.Auth, e.Secrets, e.Proxy)
			if made != nil {
				say(made.tokens, made.way.proxy)
			}
		}
		_, err := Reach(t.Context(), e)
		say(err)
	}
	oauth := func(url string) func(*outbox.Endpoint) {
		return func(e *outbox.Endpoint) {
			e.Auth = outbox.Auth{OAuth2: &outbox.OAuth2{TokenURL: outbox.Secret(url + "?" + planted), ClientID: "me", ClientSecret: planted}}
		}
	}
	proxy := func(address string) func(*outbox.Endpoint) {
		return func(e *outbox.Endpoint) { e.Proxy = outbox.Secret("http://me:" + planted + "@" + address) }
	}
	trusting := func(e *outbox.Endpoint) { e.TLS.CA = ca }

	for _, status := range []int{301, 401, 403, 407, 410, 429, 500, 503} {
		plain.Script(echo(status), echo(status))
		attempt(full(plain.URL()), outbox.ReasonStatus)
	}
	plain.Script(sendertest.Times(2, sendertest.Raw(planted))...)
	attempt(full(plain.URL()), outbox.ReasonProtocol)
	plain.Script(sendertest.Times(2, sendertest.Raw("HTTP/1.1 200 "+planted+"\r\n"+planted+"\r\n\r\n"))...)
	attempt(full(plain.URL()), outbox.ReasonProtocol)
	plain.Script(sendertest.Times(2, sendertest.Reset())...)
	attempt(full(plain.URL()), outbox.ReasonReset)
	plain.Script(sendertest.Times(2, sendertest.Hang())...)
	attempt(full(plain.URL()), outbox.ReasonTimeout)
	attempt(full(secure.URL()), outbox.ReasonTLS)
	attempt(full(strings.Replace(plain.URL(), "http:", "https:", 1)), outbox.ReasonTLS)
	attempt(full("http://127.0.0.1:1/"+planted), outbox.ReasonConnect)
	attempt(full("https://127.0.0.1:1/"+planted, theirs), outbox.ReasonRefusedAddress)
	attempt(full("https://2130706433/"+planted, theirs), outbox.ReasonRefusedAddress)
	attempt(full("https://no-such-name.invalid/"+planted), outbox.ReasonDNS, outbox.ReasonTimeout)
	attempt(full(plain.URL(), func(e *outbox.Endpoint) { e.Timeout = -1 }), outbox.ReasonBadRequest)
	attempt(full(plain.URL(), func(e *outbox.Endpoint) { e.Secrets[1] = planted }), outbox.ReasonBadRequest)
	attempt(full(secure.URL(), func(e *outbox.Endpoint) { e.Auth.MTLS = &outbox.KeyPair{Cert: planted, Key: key + planted} }), outbox.ReasonBadRequest)

	for _, status := range []int{200, 302, 400, 401, 503} {
		plain.Script(sendertest.Times(4, echo(status))...)
		attempt(full(secure.URL(), trusting, oauth(plain.URL())), outbox.ReasonAuth)
		plain.Script()
	}
	attempt(full(secure.URL(), trusting, oauth("http://127.0.0.1:1/"+planted)), outbox.ReasonAuth)
	attempt(full(plain.URL(), oauth(secure.URL())), outbox.ReasonAuth)
	attempt(full("https://hooks.example/", theirs, oauth("https://10.0.0.1/"+planted)), outbox.ReasonRefusedAddress)

	attempt(full(secure.URL(), trusting, proxy("127.0.0.1:1")), outbox.ReasonConnect)
	for _, answer := range []string{"HTTP/1.1 407 " + planted + "\r\nProxy-Authenticate: " + planted + "\r\n\r\n", planted + "\r\n\r\n"} {
		attempt(full(secure.URL(), trusting, proxy(strings.TrimPrefix(newMiddleman(t, false, "", answer).url, "http://"))), outbox.ReasonConnect)
	}
	attempt(full(plain.URL(), proxy("127.0.0.1:1")), outbox.ReasonConnect)

	for name, change := range map[string]func(*outbox.Endpoint){
		"url": func(e *outbox.Endpoint) { e.URL = planted }, "url 2": func(e *outbox.Endpoint) { e.URL = "https://me:" + planted + "@x/" },
		"url 3":   func(e *outbox.Endpoint) { e.URL = "https://x:" + planted + "/" },
		"secret":  func(e *outbox.Endpoint) { e.Secrets[0] = "whsec_" + planted + "!" },
		"header":  func(e *outbox.Endpoint) { e.Headers["X-Key"] = planted + "\n" },
		"bearer":  func(e *outbox.Endpoint) { e.Auth.Bearer = planted + "\n" },
		"both":    func(e *outbox.Endpoint) { e.Headers["authorization"] = planted },
		"token":   oauth("https://me:" + planted + "@x/"),
		"proxy":   func(e *outbox.Endpoint) { e.Proxy = "socks5://me:" + planted + "@x" },
		"proxy 2": proxy("x:" + planted), "proxy 3": proxy("x/" + planted),
		"ca":   func(e *outbox.Endpoint) { e.TLS.CA = planted },
		"mtls": func(e *outbox.Endpoint) { e.Auth.MTLS = &outbox.KeyPair{Cert: ca, Key: "-----BEGIN " + planted} },
	} {
		err := Validate(*full("https://x.example/", change))
		require.Error(t, err, name)
		say(err)
	}

	for _, entry := range b.logs.All() {
		line, err := zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()).EncodeEntry(entry.Entry, entry.Context)
		require.NoError(t, err)
		said = append(said, line.String())
	}
	require.NotEmpty(t, b.logs.All())
	families, err := b.registry.Gather()
	require.NoError(t, err)
	for _, f := range families {
		said = append(said, f.String())
	}
	for _, text := range said {
		require.False(t, lets(text), text)
	}
	require.True(t, lets(fmt.Sprint(outbox.Secret(planted).Reveal())))
	require.True(t, lets("Authorization: "+basic("me", planted)))
}

func TestASecretPrintsAsNothingByEveryWayToPrint(t *testing.T) {
	e := full("https://x.example/")
	e.Auth.OAuth2 = &outbox.OAuth2{TokenURL: planted, ClientSecret: planted}
	e.Auth.MTLS = &outbox.KeyPair{Key: planted}
	s := outbox.Secret(planted)
	held := struct {
		S  outbox.Secret
		P  *outbox.Secret
		M  map[string]outbox.Secret
		L  []outbox.Secret
		A  any
		E  *outbox.Endpoint
		V  outbox.Endpoint
		Au outbox.Auth
		O  *outbox.OAuth2
	}{s, &s, map[string]outbox.Secret{"a": s}, []outbox.Secret{s}, s, e, *e, e.Auth, e.Auth.OAuth2}
	var out strings.Builder
	for _, v := range []any{s, &s, held, &held, e, *e, e.Auth, e.Auth.Basic, *e.Auth.OAuth2, e.Auth.MTLS, errors.Join(fmt.Errorf("with %v", s), fmt.Errorf("%x", s))} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "% X"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
		text, err := json.Marshal(v)
		require.NoError(t, err)
		out.Write(text)
		encoder := zapcore.NewJSONEncoder(zap.NewDevelopmentEncoderConfig())
		line, err := encoder.EncodeEntry(zapcore.Entry{}, []zapcore.Field{zap.Any("a", v), zap.Reflect("b", v), zap.Any("c", []any{v})})
		require.NoError(t, err)
		out.WriteString(line.String())
		for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
			slog.New(h).Info("x", "a", v)
		}
	}
	require.False(t, lets(out.String()), out.String())
	require.Equal(t, planted, s.Reveal())
}

// A crash prints what it panicked with, and the arguments of every function on every stack.
func TestACrashPrintsNoSecret(t *testing.T) {
	e := full("https://x.example/")
	ways := map[string]func(r *http.Request){
		"endpoint": func(*http.Request) { panic(e) },
		"value":    func(*http.Request) { panic(*e) },
		"secret":   func(*http.Request) { panic(e.Secrets[0]) },
		"auth":     func(*http.Request) { panic(e.Auth) },
		"request":  func(r *http.Request) { panic(r) },
		"error":    func(*http.Request) { panic(fmt.Errorf("with %+v, %s and %v", e, e.Auth, e.Secrets)) },
		"fault":    func(r *http.Request) { r.URL = nil; _ = r.URL.Host },
	}
	if way := ways[os.Getenv("WALHOOK_TEST_CRASH")]; way != nil {
		c, err := New(Config{RoundTripper: fake(func(r *http.Request) (*http.Response, error) { way(r); return nil, nil })})
		require.NoError(t, err)
		c.Send(context.Background(), outbox.Attempt{Event: event(), Endpoint: e, Number: 1})
		return
	}
	for name := range ways {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command(os.Args[0], "-test.run=^TestACrashPrintsNoSecret$")
			cmd.Env = append(os.Environ(), "WALHOOK_TEST_CRASH="+name, "GOTRACEBACK=system")
			out, err := cmd.CombinedOutput()
			require.Error(t, err)
			require.Contains(t, string(out), "panic: ")
			require.Contains(t, string(out), "sender.(*target).trip")
			require.False(t, lets(string(out)), "%s", out)
		})
	}
}

// A token is a secret that nobody configured.
func TestATokenIsSeenNowhere(t *testing.T) {
	net := &idp{grants: func(int, *http.Request, url.Values) (int, string) {
		return 200, `{"access_token":"` + planted + `"}`
	}}
	net.status = func(string) int { return 401 }
	b := setup(t, net)
	e := endpoint("https://x.example/", byOAuth2)
	o := b.send(e)
	require.Equal(t, 401, o.Status)
	net.status = nil
	require.Equal(t, outbox.Delivered, b.send(e).Verdict)
	made, err := b.target(e)
	require.NoError(t, err)
	require.Equal(t, planted, made.tokens.token)
	for _, v := range []any{o, made, made.tokens, e} {
		require.False(t, lets(fmt.Sprintf("%v %+v %#v %s", v, v, v, v)))
	}
}
