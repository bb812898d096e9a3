package sender

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/sender/sendertest"
)

func TestAddressIsJudgedWhereItIsDialled(t *testing.T) {
	cert, ca, err := sendertest.Certificate("localhost", time.Time{})
	require.NoError(t, err)
	rx := sendertest.New(t, sendertest.Config{TLS: cert})
	url := strings.Replace(rx.URL(), "127.0.0.1", "localhost", 1)
	trusting := func(e *outbox.Endpoint) { e.TLS.CA = ca }
	b := setup(t, nil)

	// The operator's endpoint opens a connection and leaves it idle.
	o := b.send(endpoint(url, trusting))
	require.Equal(t, outbox.Delivered, o.Verdict, o.Detail)

	// Other people's endpoint with the same URL must not ride on it.
	theirs := func(e *outbox.Endpoint) { e.ID, e.Origin = "theirs", outbox.FromTable }
	for range 30 { // often, since it must count for nothing
		o = b.send(endpoint(url, trusting, theirs))
		require.Equal(t, outbox.Dead, o.Verdict)
		require.Equal(t, outbox.ReasonRefusedAddress, o.Reason)
		require.Regexp(t, `^the address (127\.0\.0\.1|::1) is not public$`, o.Detail)
	}
	require.Empty(t, b.moves)

	o = b.send(endpoint(url, trusting, theirs, func(e *outbox.Endpoint) { e.Network.Allow = prefixes("127.0.0.0/8") }))
	require.Equal(t, outbox.Delivered, o.Verdict, o.Detail)
	o = b.send(endpoint(url, trusting, func(e *outbox.Endpoint) { e.Network.Deny = prefixes("127.0.0.0/8", "::1/128") }))
	require.Equal(t, outbox.Dead, o.Verdict)
	require.Equal(t, 2, rx.Count())
}

func TestProxyOfTheEnvironmentIsNotUsed(t *testing.T) {
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	rx := sendertest.New(t, sendertest.Config{})
	require.Equal(t, outbox.Delivered, setup(t, nil).send(endpoint(rx.URL())).Verdict)
}

func TestHTTP2IsSpokenWhereTheReceiverCan(t *testing.T) {
	cert, ca, err := sendertest.Certificate("127.0.0.1", time.Time{})
	require.NoError(t, err)
	rx := sendertest.New(t, sendertest.Config{TLS: cert, HTTP2: true, Secrets: []string{hmacSecret}})
	rx.Script(sendertest.Status(204), sendertest.EndlessBody(200), sendertest.Reset(), sendertest.Status(503, "Retry-After", "7"))
	b := setup(t, nil)
	e := endpoint(rx.URL(), signed, func(e *outbox.Endpoint) { e.TLS.CA = ca })
	require.Equal(t, outbox.Delivered, b.send(e).Verdict)
	require.Equal(t, outbox.Delivered, b.send(e).Verdict)
	o := b.send(e)
	require.Equal(t, outbox.Retry, o.Verdict)
	require.Equal(t, outbox.ReasonReset, o.Reason, o.Detail)
	require.Equal(t, 7*time.Second, b.send(e).RetryAfter)
	require.Equal(t, "HTTP/2.0", rx.Requests()[0].Proto)
}

func TestReloadTakesNewSettingsAtOnce(t *testing.T) {
	rx := sendertest.New(t, sendertest.Config{})
	b := setup(t, nil)
	for _, env := range []string{"one", "two"} {
		e := endpoint(rx.URL(), func(e *outbox.Endpoint) { e.Headers = map[string]string{"X-Env": env} })
		for range 2 {
			require.Equal(t, outbox.Delivered, b.send(e).Verdict)
		}
	}
	var got []string
	for _, r := range rx.Requests() {
		got = append(got, r.Header.Get("X-Env"))
	}
	require.Equal(t, []string{"one", "one", "two", "two"}, got)
}

func TestAnEndpointThatNobodyValidatedLosesNoEvent(t *testing.T) {
	b := setup(t, nil)
	o := b.send(endpoint("https://x.example/?token=TOPSECRET", func(e *outbox.Endpoint) {
		e.Secrets = []outbox.Secret{"TOPSECRET"}
	}))
	require.Equal(t, outbox.Retry, o.Verdict)
	require.Equal(t, outbox.ReasonBadRequest, o.Reason)
	require.Contains(t, o.Detail, "secrets[0]")
	require.NotContains(t, o.Detail, "TOPSECRET")
}

func TestMetricsTellOfAttempts(t *testing.T) {
	b := setup(t, script(200, 200, 503, 0, 200))
	for range 5 {
		b.send(endpoint("https://x.example/"))
	}
	dead := event()
	dead.ID = ""
	b.Send(t.Context(), outbox.Attempt{Event: dead, Endpoint: endpoint("https://x.example/"), Number: 1})
	require.NoError(t, testutil.GatherAndCompare(b.registry, strings.NewReader(`
# HELP walhook_attempts_total Requests made, by the answer's status, or the reason where no answer came. Worry when an endpoint has no 2xx for hours.
# TYPE walhook_attempts_total counter
walhook_attempts_total{code="200",endpoint="billing"} 3
walhook_attempts_total{code="503",endpoint="billing"} 1
walhook_attempts_total{code="protocol",endpoint="billing"} 1
# HELP walhook_breaker_state The endpoint's circuit: 0 closed, 1 half-open, 2 open; of the endpoints in other, the highest. Worry when it stays open: its deliveries are parked and wait.
# TYPE walhook_breaker_state gauge
walhook_breaker_state{endpoint="billing"} 0
`), "walhook_attempts_total", "walhook_breaker_state"))
	require.Equal(t, 1, testutil.CollectAndCount(b.metrics.duration))
	problems, err := testutil.GatherAndLint(b.registry)
	require.NoError(t, err)
	require.Empty(t, problems)

	b.Forget("billing")
	require.Zero(t, testutil.CollectAndCount(b.metrics.attempts))
	require.Zero(t, testutil.CollectAndCount(b.metrics.breaker))
	require.Empty(t, b.targets)
}

func TestAnAttemptInFlightBringsNoForgottenSeriesBack(t *testing.T) {
	var b *bundle
	b = setup(t, fake(func(*http.Request) (*http.Response, error) {
		b.Forget("billing")
		return answer(200)
	}))
	require.Equal(t, outbox.Delivered, b.send(endpoint("https://x.example/")).Verdict)
	require.Zero(t, testutil.CollectAndCount(b.metrics.attempts))
	require.Zero(t, testutil.CollectAndCount(b.metrics.breaker))
}

func TestAReceiverCannotMakeSeriesWithoutEnd(t *testing.T) {
	status := 399
	b := setup(t, fake(func(*http.Request) (*http.Response, error) {
		status++
		return answer(status)
	}))
	e := endpoint("https://x.example/", func(e *outbox.Endpoint) { e.Breaker = outbox.BreakerPolicy{} })
	for range 200 {
		b.send(e)
	}
	require.Equal(t, maxCodes+1, testutil.CollectAndCount(b.metrics.attempts))
}

// docs/faults.md 103.
func TestAHangingEndpointSlowsNoOther(t *testing.T) {
	hanging, healthy := sendertest.New(t, sendertest.Config{}), sendertest.New(t, sendertest.Config{})
	hanging.Script(sendertest.Times(64, sendertest.Hang())...)
	b := setup(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	for range 64 {
		all.Go(func() {
			b.Send(ctx, outbox.Attempt{Event: event(), Endpoint: endpoint(hanging.URL()), Number: 1})
		})
	}
	require.NoError(t, hanging.WaitFor(ctx, 64))
	e := endpoint(healthy.URL(), func(e *outbox.Endpoint) { e.ID = "healthy" })
	for range 200 {
		begin := time.Now()
		require.Equal(t, outbox.Delivered, b.send(e).Verdict)
		require.Less(t, time.Since(begin), time.Second)
	}
	cancel()
	all.Wait()
}

func TestTwoClientsCannotShareARegistry(t *testing.T) {
	r := prometheus.NewRegistry()
	_, err := New(Config{Registerer: r})
	require.NoError(t, err)
	_, err = New(Config{Registerer: r})
	require.ErrorContains(t, err, "register the sender's metrics")
}

func TestForgetClosesConnectionsThatNobodySharesAnyMore(t *testing.T) {
	rx := sendertest.New(t, sendertest.Config{})
	b := setup(t, nil)
	for _, id := range []string{"a", "b", "c"} {
		b.send(endpoint(rx.URL(), func(e *outbox.Endpoint) {
			if e.ID = id; id == "c" {
				e.Network.Deny = prefixes("10.0.0.0/8")
			}
		}))
	}
	require.Len(t, b.transports, 2, "a and b share one")
	b.Forget("a")
	require.Len(t, b.transports, 2)
	b.Forget("b")
	b.Forget("c")
	require.Empty(t, b.transports)
}

// docs/faults.md 102: memory and connections stay small, whatever the number of endpoints.
func TestTenThousandEndpointsShareOneTransport(t *testing.T) {
	rx := sendertest.New(t, sendertest.Config{Keep: 1})
	b := setup(t, nil)
	const n = 10_000
	endpoints := make([]*outbox.Endpoint, n)
	for i := range endpoints {
		endpoints[i] = endpoint(rx.URL(), signed, func(e *outbox.Endpoint) { e.ID = fmt.Sprint("endpoint-", i) })
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var all sync.WaitGroup
	for w := range 8 {
		all.Go(func() {
			for i := w; i < n; i += 8 {
				if o := b.send(endpoints[i]); o.Verdict != outbox.Delivered {
					t.Errorf("%+v", o)
					return
				}
			}
		})
	}
	all.Wait()
	runtime.GC()
	runtime.ReadMemStats(&after)
	require.Equal(t, n, rx.Count())
	require.Len(t, b.transports, 1)
	perEndpoint := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) / n
	t.Logf("%d bytes an endpoint", perEndpoint)
	require.Less(t, perEndpoint, int64(16<<10))
	runtime.KeepAlive(endpoints)
}

func TestSendIsSafeForManyGoroutinesReloadsAndForgets(t *testing.T) {
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{hmacSecret}})
	b := setup(t, nil)
	var all sync.WaitGroup
	for w := range 8 {
		all.Go(func() {
			e := endpoint(rx.URL(), signed)
			for i := range 100 {
				switch {
				case i%20 == 19 && w == 0:
					b.Forget(e.ID)
				case i%10 == 9:
					e = endpoint(rx.URL(), signed)
				}
				ev := event()
				ev.ID = fmt.Sprintf("evt_%d_%d", w, i)
				if o := b.Send(t.Context(), outbox.Attempt{Event: ev, Endpoint: e, Number: 1}); o.Verdict != outbox.Delivered {
					t.Errorf("%+v", o)
				}
			}
		})
	}
	all.Wait()
	require.Equal(t, 800, rx.Count())
	require.Empty(t, sendertest.Duplicates(rx.Requests()))
	require.Len(t, b.transports, 1)
	require.LessOrEqual(t, b.transports[b.targets["billing"].route].users, 1)
	b.Close()
	require.Zero(t, b.room.connections(), "also those of transports that are gone are closed")
}

func TestMissingSecretIsSaidOnce(t *testing.T) {
	b := setup(t, script(200))
	for range 3 {
		b.send(endpoint("https://x.example/"))
	}
	require.Equal(t, 1, b.logs.FilterMessageSnippet("not signed").Len())
	require.Equal(t, "sender", b.logs.All()[0].LoggerName)
}

// BenchmarkSend is a delivery over a real socket; BenchmarkPost is the least that net/http
// could do for the same bytes, without signature, circuit, guard or metrics.
func BenchmarkSend(b *testing.B) {
	rx, err := sendertest.Open(sendertest.Config{Keep: 1})
	require.NoError(b, err)
	defer rx.Close()
	c, err := New(Config{Registerer: prometheus.NewRegistry()})
	require.NoError(b, err)
	defer c.Close()
	for name, e := range map[string]*outbox.Endpoint{"unsigned": endpoint(rx.URL()), "signed": endpoint(rx.URL(), signed)} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			a := outbox.Attempt{Event: event(), Endpoint: e, Number: 1}
			for b.Loop() {
				if o := c.Send(b.Context(), a); o.Verdict != outbox.Delivered {
					b.Fatalf("%+v", o)
				}
			}
		})
	}
}

func BenchmarkPost(b *testing.B) {
	rx, err := sendertest.Open(sendertest.Config{Keep: 1})
	require.NoError(b, err)
	defer rx.Close()
	client := &http.Client{Transport: &http.Transport{}, Timeout: 15 * time.Second}
	defer client.CloseIdleConnections()
	body := []byte(`{"type":"invoice.paid","timestamp":"2026-03-01T11:30:15.123456Z","data":{"amount": 120.50}}`)
	b.ReportAllocs()
	for b.Loop() {
		req, _ := http.NewRequestWithContext(b.Context(), http.MethodPost, rx.URL(), bytes.NewReader(body))
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("User-Agent", "walhook/1.2.3")
		req.Header.Set("webhook-id", "evt_1")
		req.Header.Set("webhook-timestamp", "946684800")
		req.Header.Set("webhook-attempt", "1")
		res, err := client.Do(req)
		if err != nil {
			b.Fatal(err)
		}
		_ = res.Body.Close()
	}
}

// BenchmarkAttempt is what we add to net/http: the same without a network.
func BenchmarkAttempt(b *testing.B) {
	res := &http.Response{StatusCode: 204, Body: http.NoBody, Header: http.Header{}}
	c, err := New(Config{Registerer: prometheus.NewRegistry(), RoundTripper: fake(func(*http.Request) (*http.Response, error) { return res, nil })})
	require.NoError(b, err)
	a := outbox.Attempt{Event: event(), Endpoint: endpoint("https://x.example/", signed), Number: 1}
	b.ReportAllocs()
	for b.Loop() {
		c.Send(b.Context(), a)
	}
}
