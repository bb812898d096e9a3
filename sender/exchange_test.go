package sender

import (
	"fmt"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/sender/sendertest"
)

func TestTryShowsTheExchangeWithoutCredentials(t *testing.T) {
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}})
	rx.Script(sendertest.Body(418, strings.Repeat("x", 5000)))
	c, err := New(Config{})
	require.NoError(t, err)
	defer c.Close()
	ep := outbox.DefaultEndpoint()
	ep.ID, ep.URL, ep.Secrets = "a", rx.URL()+"?token=s3cret", []outbox.Secret{"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}
	ep.Headers = map[string]string{"Authorization": "Bearer s3cret", "User-Agent": "s3cret"}
	x := c.Try(t.Context(), outbox.Attempt{Event: &outbox.Event{ID: "e1", Type: "t", Data: []byte("{}"), JSON: true, Time: time.Now()}, Endpoint: &ep, Number: 1, Replay: true})
	require.Equal(t, outbox.Retry, x.Outcome.Verdict)
	require.Equal(t, 418, x.Outcome.Status)
	require.Equal(t, "POST", x.Method)
	require.Equal(t, rx.URL()+"?[redacted]", x.URL)
	header := map[string][]string(x.Header) // spelled as they are sent
	require.Equal(t, []string{"e1"}, header[headerID])
	require.Equal(t, []string{"true"}, header[headerReplay])
	require.NotEmpty(t, header[headerSignature])
	require.Contains(t, string(x.Body), `"type":"t"`)
	require.Len(t, x.Text, 4096)
	require.True(t, x.Cut)
	require.NotContains(t, fmt.Sprintf("%+v", x), "s3cret")
	require.Equal(t, "true", rx.Requests()[0].Header.Get("Webhook-Replay"))
}

// A receiver that sends back all that it got, and what it knows besides.
func TestTryTakesOurCredentialsOutOfAnEcho(t *testing.T) {
	rx := sendertest.New(t, sendertest.Config{Respond: func(q sendertest.Request) sendertest.Answer {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Echo", q.Header.Get("Authorization"))
			w.WriteHeader(418)
			_ = q.Header.Write(w)
			_, _ = fmt.Fprintln(w, q.Path, planted, "mine:", q.Header.Get("X-Key"))
			n, _ := strconv.Atoi(q.Header.Get("X-Fill")) // planted stands across the end of what is read
			_, _ = w.Write([]byte(strings.Repeat("x", n) + strings.Repeat(planted, 200)))
		}
	}})
	idp := sendertest.New(t, sendertest.Config{Respond: func(sendertest.Request) sendertest.Answer {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_, _ = w.Write([]byte(`{"access_token": "` + planted + `-token", "token_type": "bearer"}`))
		}
	}})
	for name, auth := range map[string]outbox.Auth{
		"basic":  {Basic: &outbox.Basic{Username: "me", Password: planted}},
		"bearer": {Bearer: planted},
		"oauth2": {OAuth2: &outbox.OAuth2{TokenURL: outbox.Secret(idp.URL()), ClientID: "me", ClientSecret: planted}},
	} {
		t.Run(name, func(t *testing.T) {
			e := full(rx.URL(), func(e *outbox.Endpoint) { e.Auth, e.Timeout = auth, patience })
			e.Headers["X-Key"] = planted + ` "own"`
			c, err := New(Config{})
			require.NoError(t, err)
			defer c.Close()
			try := func(fill int) *Exchange {
				to := *e
				to.Headers = maps.Clone(e.Headers)
				to.Headers["X-Fill"] = strconv.Itoa(fill)
				return c.Try(t.Context(), outbox.Attempt{Event: event(), Endpoint: &to, Number: 1})
			}
			for fill := maxSeen - 1000; fill < maxSeen-960; fill++ {
				x := try(fill)
				for cut := 4; cut < len(planted); cut++ {
					require.NotContains(t, string(x.Text), planted[:cut])
				}
			}
			x := try(maxSeen)
			require.Equal(t, 418, x.Outcome.Status, x.Outcome.Detail)
			text := fmt.Sprintf("%+v %s", x, x.Text)
			require.False(t, lets(text), text)
			require.Contains(t, string(x.Text), "mine: [redacted]")
			require.NotContains(t, string(x.Text), `"own"`, "the longest that fits is taken out")
			require.Contains(t, string(x.Text), "Webhook-Id: evt_1")
			require.LessOrEqual(t, len(x.Text), maxSeen)
			require.Greater(t, len(x.Text), maxSeen/2)
			require.True(t, x.Cut)
		})
	}
}

func TestShownURLKeepsItsQueryToItself(t *testing.T) {
	for in, want := range map[string]string{
		"https://a.example":                 "https://a.example",
		"https://a.example/p?token=s&x=1#f": "https://a.example/p?[redacted]",
		"https://u:p@a.example/p":           "https://[redacted]@a.example/p",
		"no url":                            "[redacted]",
	} {
		require.Equal(t, want, ShownURL(in))
	}
}
