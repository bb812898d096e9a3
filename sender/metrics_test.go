package sender

import (
	"net/http"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/expfmt"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
)

func TestEndpointsWithoutALabelOfTheirOwnShareTheirSeries(t *testing.T) {
	registry := prometheus.NewRegistry()
	c, err := New(Config{Registerer: registry, Labels: outbox.NewLabels(1), RoundTripper: fake(func(r *http.Request) (*http.Response, error) {
		status := http.StatusNoContent
		if r.URL.Host == "sick.example" {
			status = http.StatusInternalServerError
		}
		return &http.Response{StatusCode: status, Body: http.NoBody, Header: http.Header{}}, nil
	})})
	require.NoError(t, err)
	defer c.Close()
	send := func(id, host string, times int) {
		e := endpoint("https://"+host+"/", func(e *outbox.Endpoint) { e.ID = id })
		for range times {
			c.Send(t.Context(), outbox.Attempt{Event: event(), Endpoint: e, Number: 1})
		}
	}
	expect := func(text string) {
		t.Helper()
		var lines strings.Builder
		for _, name := range []string{"walhook_attempts_total", "walhook_breaker_state"} {
			got, err := testutil.CollectAndFormat(registry, expfmt.TypeTextPlain, name)
			require.NoError(t, err)
			for line := range strings.Lines(string(got)) {
				if !strings.HasPrefix(line, "#") {
					lines.WriteString(line)
				}
			}
		}
		require.Equal(t, text, lines.String())
	}
	send("a", "well.example", 2)
	send("b", "well.example", 3)
	send("c", "sick.example", 5)
	send("d", "sick.example", 5)
	expect(`walhook_attempts_total{code="204",endpoint="a"} 2
walhook_attempts_total{code="204",endpoint="other"} 3
walhook_attempts_total{code="500",endpoint="other"} 10
walhook_breaker_state{endpoint="a"} 0
walhook_breaker_state{endpoint="other"} 2
`)
	c.Forget("c")
	expect(`walhook_attempts_total{code="204",endpoint="a"} 2
walhook_attempts_total{code="204",endpoint="other"} 3
walhook_attempts_total{code="500",endpoint="other"} 10
walhook_breaker_state{endpoint="a"} 0
walhook_breaker_state{endpoint="other"} 2
`)
	c.Forget("d")
	c.Forget("a")
	expect(`walhook_attempts_total{code="204",endpoint="other"} 3
walhook_attempts_total{code="500",endpoint="other"} 10
walhook_breaker_state{endpoint="other"} 0
`)
}
