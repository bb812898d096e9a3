package sender

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/sender/sendertest"
)

func TestCredentialsComeAsReceiversReadThem(t *testing.T) {
	for name, c := range map[string]struct {
		auth outbox.Auth
		want string
	}{
		"none":             {outbox.Auth{}, ""},
		"basic":            {outbox.Auth{Basic: &outbox.Basic{Username: "Aladdin", Password: "open sesame"}}, "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="}, // RFC 7617
		"basic, no ASCII":  {outbox.Auth{Basic: &outbox.Basic{Username: "test", Password: "123£"}}, "Basic dGVzdDoxMjPCow=="},                       // RFC 7617
		"basic, user only": {outbox.Auth{Basic: &outbox.Basic{Username: "sk_live"}}, "Basic c2tfbGl2ZTo="},
		"bearer":           {outbox.Auth{Bearer: "abc.def"}, "Bearer abc.def"},
	} {
		t.Run(name, func(t *testing.T) {
			got := sentTo(t, endpoint("https://x.example/", func(e *outbox.Endpoint) { e.Auth = c.auth }))
			require.Equal(t, c.want, got.header["authorization"])
		})
	}
}

func TestAClientsCertificateIsShownAndItsConnectionsAreNotLent(t *testing.T) {
	own, ca, err := sendertest.Certificate("127.0.0.1", time.Time{})
	require.NoError(t, err)
	cert, key := clientPair(t)
	var served atomic.Int32
	rx := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if len(r.TLS.PeerCertificates) == 1 {
			served.Add(1)
		}
	}))
	rx.TLS = &tls.Config{Certificates: []tls.Certificate{*own}, ClientAuth: tls.RequestClientCert}
	rx.EnableHTTP2 = true
	rx.Config.ErrorLog = log.New(io.Discard, "", 0)
	rx.StartTLS()
	t.Cleanup(rx.Close)
	b := setup(t, nil)
	with := func(e *outbox.Endpoint) {
		e.TLS.CA = ca
		e.Auth.MTLS = &outbox.KeyPair{Cert: cert, Key: key}
	}
	for range 3 {
		o := b.send(endpoint(rx.URL, with))
		require.Equal(t, outbox.Delivered, o.Verdict, o.Detail)
		o = b.send(endpoint(rx.URL, with, func(e *outbox.Endpoint) { e.ID, e.Auth = "other", outbox.Auth{} }))
		require.Equal(t, outbox.Delivered, o.Verdict, o.Detail)
	}
	require.EqualValues(t, 3, served.Load(), "who has no certificate rode on a connection with one")
}

// idp is a network with a token server at idp.example and a receiver elsewhere.
type idp struct {
	mu     sync.Mutex // guards what follows
	asked  int        // for tokens
	grants func(n int, r *http.Request, form url.Values) (status int, answer string)
	got    []string // Authorization of the requests that are no question for a token
	status func(authorization string) int
}

func (i *idp) RoundTrip(r *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	i.mu.Lock()
	if r.URL.Host != "idp.example" {
		defer i.mu.Unlock()
		i.got = append(i.got, r.Header.Get("Authorization"))
		status := 204
		if i.status != nil {
			status = i.status(r.Header.Get("Authorization"))
		}
		return answer(status)
	}
	i.asked++
	n := i.asked
	i.mu.Unlock()
	form, err := url.ParseQuery(string(body))
	if err != nil {
		return nil, err
	}
	select {
	case <-time.After(100 * time.Millisecond):
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
	status, text := i.grants(n, r, form)
	if status == 0 {
		return hang(r)
	}
	res, _ := answer(status, "Retry-After", "7")
	res.Body = io.NopCloser(strings.NewReader(text))
	return res, nil
}

// counted grants token1, token2, … for as many seconds each.
func counted(seconds int) func(int, *http.Request, url.Values) (int, string) {
	return func(n int, _ *http.Request, _ url.Values) (int, string) {
		return 200, fmt.Sprintf(`{"access_token":"token%d","token_type":"bearer","expires_in":%d}`, n, seconds)
	}
}

func byOAuth2(e *outbox.Endpoint) {
	e.Auth.OAuth2 = &outbox.OAuth2{
		TokenURL: "https://idp.example/token?TOPSECRET", ClientID: "shop & co", ClientSecret: "TOPSECRET %", Scopes: []string{"a", "b:c"},
	}
}

func TestOneTokenServesAllUntilShortlyBeforeItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := &idp{grants: counted(600)}
		b := setup(t, net)
		e := endpoint("https://x.example/", byOAuth2)
		together := func(n int) {
			var wg sync.WaitGroup
			for range n {
				wg.Go(func() {
					o := b.send(e)
					if o.Verdict != outbox.Delivered {
						t.Errorf("%+v", o)
					}
				})
			}
			wg.Wait()
		}
		together(20)
		require.Equal(t, 1, net.asked, "attempts at once share one request")
		pass(539 * time.Second)
		together(20)
		require.Equal(t, 1, net.asked)
		require.NotContains(t, net.got, "Bearer token2")

		pass(2 * time.Second) // less than a minute is left
		net.got = nil
		together(20)
		require.Equal(t, 2, net.asked, "one attempt fetches the next")
		old := 0
		for _, a := range net.got {
			if a == "Bearer token1" {
				old++
			}
		}
		require.Equal(t, 19, old, "while the others go on with the old")

		pass(time.Hour) // far beyond its end
		net.got = nil
		together(20)
		require.Equal(t, 3, net.asked)
		require.NotContains(t, net.got, "Bearer token2")

		// A reload keeps it; other credentials are another client.
		for range 3 {
			b.send(endpoint("https://x.example/other", byOAuth2))
		}
		require.Equal(t, 3, net.asked)
		b.send(endpoint("https://x.example/", byOAuth2, func(e *outbox.Endpoint) { e.Auth.OAuth2.ClientSecret = "new" }))
		require.Equal(t, 4, net.asked)
	})
}

func TestARefreshThatFailsCostsNothingWhileTheOldTokenServes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		works := counted(600)
		down := 0
		net := &idp{}
		net.grants = func(n int, r *http.Request, f url.Values) (int, string) {
			if down > 0 {
				return down % 1000, "" // 1000 hangs
			}
			return works(n, r, f)
		}
		b := setup(t, net)
		e := endpoint("https://x.example/", byOAuth2, timeout(6*time.Second)) // less than a fetch may take
		require.Equal(t, outbox.Delivered, b.send(e).Verdict)
		pass(545 * time.Second)
		for _, down = range []int{503, 1000} {
			for range 5 {
				require.Equal(t, outbox.Delivered, b.send(e).Verdict)
			}
			pass(tokenRefreshPause)
		}
		require.LessOrEqual(t, net.asked, 4, "and is not tried with every attempt")
		pass(10 * time.Minute)
		o := b.send(e)
		require.Equal(t, outbox.ReasonAuth, o.Reason)
	})
}

func TestARefusedTokenIsDroppedAndTheNextAttemptBringsAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := &idp{grants: counted(0)} // without an end
		net.status = func(a string) int {
			if a == "Bearer token1" {
				return 401
			}
			return 204
		}
		b := setup(t, net)
		e := endpoint("https://x.example/", byOAuth2)
		o := b.send(e)
		require.Equal(t, outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonStatus, Status: 401, Detail: "401 Unauthorized"}, o)
		pass(48 * time.Hour)
		require.Equal(t, outbox.Delivered, b.send(e).Verdict)
		require.Equal(t, outbox.Delivered, b.send(e).Verdict)
		require.Equal(t, 2, net.asked)
	})
}

func TestEachWayToGetNoTokenIsAFailureOfTheEndpoint(t *testing.T) {
	for name, c := range map[string]struct {
		status int
		answer string
		want   string
	}{
		"wrong secret":   {401, `{"error":"invalid_client","error_description":"TOPSECRET"}`, "the token server answered 401 Unauthorized: invalid_client"},
		"own words":      {400, `{"error":"TOPSECRET"}`, "the token server answered 400 Bad Request"},
		"down":           {503, "TOPSECRET", "the token server answered 503 Service Unavailable"},
		"redirect":       {302, "", "the token server answered 302 Found: redirects are not followed"},
		"no JSON":        {200, "<html>TOPSECRET", "the token server's answer is not the JSON of RFC 6749"},
		"no token":       {200, `{"expires_in":3600}`, "the token server's answer holds no access_token that can stand in a header"},
		"a header more":  {200, `{"access_token":"TOPSECRET\r\nX-Evil: 1"}`, "the token server's answer holds no access_token that can stand in a header"},
		"large token":    {200, `{"access_token":"` + strings.Repeat("x", 9000) + `"}`, "the access token makes a header larger than 8192 bytes"},
		"endless answer": {200, strings.Repeat(" ", 1<<20), "the token server's answer is larger than 65536 bytes"},
		"silence":        {0, "", "no answer within 10s"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				bad := true
				net := &idp{grants: func(n int, r *http.Request, f url.Values) (int, string) {
					if bad {
						return c.status, c.answer
					}
					return counted(600)(n, r, f)
				}}
				b := setup(t, net)
				e := endpoint("https://x.example/", byOAuth2, func(e *outbox.Endpoint) { e.Breaker.ConsecutiveFailures = 3 })
				want := outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonAuth, Detail: "no access token: " + c.want, RetryAfter: 7 * time.Second}
				if c.status == 0 {
					want.RetryAfter = 0
				}
				for range 3 {
					require.Equal(t, want, b.send(e))
				}
				require.Equal(t, outbox.Held, b.send(e).Verdict, "it counts")
				require.Empty(t, net.got, "nothing goes out without a token")
				bad = false
				pass(e.Breaker.OpenFor + time.Second)
				require.Equal(t, outbox.Delivered, b.send(e).Verdict)
			})
		})
	}
}

func TestAnAttemptWaitsForATokenWithinItsOwnTimeAndHoldsUpNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var first context.CancelFunc
		net := &idp{grants: func(n int, r *http.Request, f url.Values) (int, string) {
			switch n {
			case 1:
				first() // the one that fetches is cut short
				return 0, ""
			case 2:
				return 0, ""
			}
			return counted(600)(n, r, f)
		}}
		b := setup(t, net)
		e := endpoint("https://x.example/", byOAuth2, timeout(2*time.Second))
		var ctx context.Context
		ctx, first = context.WithCancel(t.Context())
		defer first()
		outcomes := make(chan outbox.Outcome, 3)
		go func() { outcomes <- b.Send(ctx, outbox.Attempt{Event: event(), Endpoint: e, Number: 1}) }()
		synctest.Wait()
		for range 2 {
			go func() { outcomes <- b.send(e) }()
		}
		synctest.Wait()
		require.Equal(t, outbox.Delivered, b.send(endpoint("https://x.example/", func(e *outbox.Endpoint) { e.ID = "free" })).Verdict)
		require.Equal(t, outbox.Cut, (<-outcomes).Verdict)
		for range 2 { // one of them fetched anew, and neither got an answer in its time
			require.Equal(t, outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonAuth, Detail: "no access token: none within 2s"}, <-outcomes)
		}
		require.Equal(t, outbox.Delivered, b.send(e).Verdict)
	})
}

// Most servers look into Authorization, as they have to; some only into the body.
func TestTheSecretGoesWhereTheServerLooksForIt(t *testing.T) {
	for _, inBody := range []bool{false, true} {
		t.Run(fmt.Sprint(inBody), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				net := &idp{grants: func(n int, r *http.Request, f url.Values) (int, string) {
					id, secret := f.Get("client_id"), f.Get("client_secret")
					if !inBody {
						id, secret, _ = r.BasicAuth()
						id, _ = url.QueryUnescape(id)
						secret, _ = url.QueryUnescape(secret)
					}
					if id != "shop & co" || secret != "TOPSECRET %" {
						return 401, `{"error":"invalid_client"}`
					}
					if f.Get("grant_type") != "client_credentials" || f.Get("scope") != "a b:c" || r.Method != "POST" ||
						r.Header.Get("Content-Type") != "application/x-www-form-urlencoded" || r.URL.RawQuery != "TOPSECRET" {
						t.Errorf("asked with %v", f)
					}
					return 200, `{"access_token":"x","expires_in":"600"}`
				}}
				b := setup(t, net)
				e := endpoint("https://x.example/", byOAuth2)
				require.Equal(t, outbox.Delivered, b.send(e).Verdict)
				first := net.asked
				pass(time.Hour)
				require.Equal(t, outbox.Delivered, b.send(e).Verdict)
				require.Equal(t, first+1, net.asked, "what works is remembered")
			})
		})
	}
}

// By real sockets: the token's way is the endpoint's, its CA included.
func TestATokenIsFetchedByTheEndpointsWay(t *testing.T) {
	cert, ca, err := sendertest.Certificate("127.0.0.1", time.Time{})
	require.NoError(t, err)
	server := sendertest.New(t, sendertest.Config{TLS: cert, Respond: func(sendertest.Request) sendertest.Answer {
		return sendertest.Body(200, `{"access_token":"x"}`)
	}})
	rx := sendertest.New(t, sendertest.Config{TLS: cert})
	b := setup(t, nil)
	by := func(e *outbox.Endpoint) {
		e.TLS.CA = ca
		e.Auth.OAuth2 = &outbox.OAuth2{TokenURL: outbox.Secret(server.URL()), ClientID: "me", ClientSecret: "TOPSECRET"}
	}
	require.Equal(t, outbox.Delivered, b.send(endpoint(rx.URL(), by)).Verdict)
	require.Equal(t, "Bearer x", rx.Requests()[0].Header.Get("Authorization"))

	o := b.send(endpoint(rx.URL(), by, func(e *outbox.Endpoint) { e.ID, e.TLS.CA = "trusts", "" }))
	require.Equal(t, outbox.ReasonAuth, o.Reason)
	require.Equal(t, "no access token: x509: certificate signed by unknown authority", o.Detail)
	require.Equal(t, 1, server.Count())

	server.Refuse()
	o = b.send(endpoint(rx.URL(), by, func(e *outbox.Endpoint) { e.ID = "late" }))
	require.Equal(t, outbox.ReasonAuth, o.Reason)
	require.Regexp(t, `^no access token: connect to 127\.0\.0\.1:\d+: connection refused$`, o.Detail)
	require.Equal(t, 1, rx.Count())
}

func FuzzToken(f *testing.F) {
	f.Add(200, []byte(`{"access_token":"x","expires_in":3600}`))
	f.Add(200, []byte(`{"access_token":"x","expires_in":"1e400"}`))
	f.Add(400, []byte(`{"error":"invalid_scope"}`))
	f.Fuzz(func(t *testing.T, status int, said []byte) {
		got, fault := readToken(status, said)
		if fault == nil {
			require.True(t, visible(got.token))
			require.GreaterOrEqual(t, got.life, time.Duration(0))
			require.LessOrEqual(t, got.life, maxTokenLife)
			return
		}
		var m map[string]any
		if json.Unmarshal(said, &m) == nil {
			if s, _ := m["access_token"].(string); len(s) > 20 {
				require.NotContains(t, fault.detail, s)
			}
		}
	})
}
