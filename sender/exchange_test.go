package sender

import (
	"fmt"
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
