package sender

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/sony/gobreaker/v2"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
)

// script answers with one status after the other; zero is a refused connection, and the last
// one stays.
func script(statuses ...int) fake {
	next := 0
	return func(*http.Request) (*http.Response, error) {
		s := statuses[min(next, len(statuses)-1)]
		next++
		if s == 0 {
			return nil, errors.New("EOF")
		}
		return answer(s)
	}
}

func gauge(b *bundle, id string) float64 {
	return testutil.ToFloat64(b.metrics.breaker.WithLabelValues(id))
}

func TestCircuitOpensAfterFailuresInARowAndClosesAfterAProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := setup(t, script(500, 500, 500, 500, 500, 503, 200))
		e := endpoint("https://x.example/")
		for range 5 {
			require.Zero(t, gauge(b, e.ID))
			require.Equal(t, outbox.Retry, b.send(e).Verdict)
		}
		require.EqualValues(t, Open, gauge(b, e.ID))

		o := b.send(e)
		require.Equal(t, outbox.Held, o.Verdict)
		require.Equal(t, outbox.ReasonBreakerOpen, o.Reason)
		require.WithinDuration(t, time.Now().Add(30*time.Second), o.Until, 10*time.Millisecond)
		pass(29 * time.Second)
		require.Equal(t, outbox.Held, b.send(e).Verdict)

		pass(time.Until(o.Until)) // at Until, to the nanosecond, a probe may go
		require.Equal(t, 503, b.send(e).Status)
		o = b.send(e)
		require.Equal(t, outbox.Held, o.Verdict, "the failed probe opened it again")

		pass(time.Until(o.Until))
		require.Equal(t, outbox.Delivered, b.send(e).Verdict)
		require.EqualValues(t, Closed, gauge(b, e.ID))
		require.Equal(t, outbox.Delivered, b.send(e).Verdict)
		require.Equal(t, []string{
			"billing: closed → open", "billing: open → half-open", "billing: half-open → open",
			"billing: open → half-open", "billing: half-open → closed",
		}, b.moves)
		require.Equal(t, 2, b.logs.FilterMessage("circuit open").Len())
	})
}

// Five failures, each an hour after the one before: a rolling window alone would forget them.
func TestFailuresInARowOpenTheCircuitHoweverSlowlyTheyCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := setup(t, script(0))
		e := endpoint("https://x.example/")
		for range 5 {
			require.Equal(t, outbox.Retry, b.send(e).Verdict)
			pass(time.Hour)
		}
		require.Equal(t, []string{"billing: closed → open"}, b.moves)
	})
}

func TestASuccessBetweenFailuresKeepsTheCircuitClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := setup(t, script(500, 500, 500, 500, 200, 500, 500, 500, 500, 200))
		for range 10 {
			require.NotEqual(t, outbox.Held, b.send(endpoint("https://x.example/")).Verdict)
		}
		require.Empty(t, b.moves)
	})
}

func TestCircuitOpensAtTheFailureRateOfWhatCompleted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turn := 0
		b := setup(t, fake(func(*http.Request) (*http.Response, error) {
			if turn++; turn%2 == 0 {
				return answer(500)
			}
			return answer(200)
		}))
		e := endpoint("https://x.example/")
		for range 19 {
			b.send(e)
		}
		require.Empty(t, b.moves, "19 of the 20 that the rate needs")
		b.send(e)
		require.Equal(t, []string{"billing: closed → open"}, b.moves)
	})
}

// With the timeout near the window, gobreaker would drop the result of every attempt that timed out.
func TestTimeoutsLongerThanTheWindowOpenTheCircuit(t *testing.T) {
	for name, policy := range map[string]outbox.BreakerPolicy{
		"in a row": {ConsecutiveFailures: 5, OpenFor: time.Minute, Window: time.Second},
		"rate":     {FailureRate: 0.5, MinRequests: 20, OpenFor: time.Minute, Window: time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := setup(t, fake(hang))
				e := endpoint("https://x.example/", func(e *outbox.Endpoint) { e.Breaker = policy })
				var all sync.WaitGroup
				for range 20 {
					all.Go(func() {
						o := b.send(e)
						if o.Verdict != outbox.Retry || o.Reason != outbox.ReasonTimeout {
							t.Errorf("got %+v", o)
						}
					})
				}
				all.Wait()
				require.Equal(t, []string{"billing: closed → open"}, b.moves)
				require.Equal(t, outbox.Held, b.send(e).Verdict)
			})
		})
	}
}

func TestOldFailuresLeaveTheRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turn := 0
		b := setup(t, fake(func(*http.Request) (*http.Response, error) {
			turn++
			if turn <= 19 && turn%4 != 0 { // 15 of the first 19 fail, never 5 in a row
				return answer(500)
			}
			return answer(200)
		}))
		e := endpoint("https://x.example/")
		for range 19 {
			b.send(e)
		}
		pass(2 * time.Minute)
		for range 40 {
			b.send(e)
		}
		require.Empty(t, b.moves)
	})
}

func TestOnlyOneProbeGoesAndTheOthersAreHeldShortly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var sent atomic.Int32
		b := setup(t, fake(func(*http.Request) (*http.Response, error) {
			if sent.Add(1) <= 5 {
				return answer(500)
			}
			<-release
			return answer(200)
		}))
		e := endpoint("https://x.example/")
		for range 5 {
			b.send(e)
		}
		pass(31 * time.Second)
		probe := make(chan outbox.Outcome)
		go func() { probe <- b.send(e) }()
		synctest.Wait()
		for range 10 {
			o := b.send(e)
			require.Equal(t, outbox.Held, o.Verdict)
			require.Equal(t, time.Now().Add(probeWait), o.Until)
		}
		require.EqualValues(t, 6, sent.Load())
		require.EqualValues(t, HalfOpen, gauge(b, e.ID))
		close(release)
		require.Equal(t, outbox.Delivered, (<-probe).Verdict)
		require.Equal(t, outbox.Delivered, b.send(e).Verdict)
	})
}

// Everything that ends a probe has to free its place: gobreaker itself would wait for ever.
func TestAProbeThatCountsNeitherWayLetsTheNextOneThrough(t *testing.T) {
	for name, probe := range map[string]struct {
		rt   fake
		send func(*bundle, *outbox.Endpoint)
	}{
		"refused event": {rt: func(*http.Request) (*http.Response, error) { return answer(422) }},
		"pause":         {rt: func(*http.Request) (*http.Response, error) { return answer(429, "Retry-After", "1") }},
		"guard":         {rt: func(*http.Request) (*http.Response, error) { return nil, &refusedAddress{"x"} }},
		"cut": {rt: hang, send: func(b *bundle, e *outbox.Endpoint) {
			ctx, cancel := context.WithTimeout(b.t.Context(), time.Second)
			defer cancel()
			o := b.Send(ctx, outbox.Attempt{Event: event(), Endpoint: e, Number: 1})
			require.Equal(b.t, outbox.Cut, o.Verdict)
		}},
		"panic": {rt: func(*http.Request) (*http.Response, error) { panic("boom") }, send: func(b *bundle, e *outbox.Endpoint) {
			require.Panics(b.t, func() { b.send(e) })
		}},
		"unsendable": {send: func(b *bundle, e *outbox.Endpoint) {
			bad := event()
			bad.ID = ""
			require.Equal(b.t, outbox.Dead, b.Send(b.t.Context(), outbox.Attempt{Event: bad, Endpoint: e, Number: 1}).Verdict)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var now fake = script(500)
				b := setup(t, fake(func(r *http.Request) (*http.Response, error) { return now(r) }))
				e := endpoint("https://x.example/")
				for range 5 {
					b.send(e)
				}
				pass(31 * time.Second)
				for range 3 {
					now = probe.rt
					if probe.send != nil {
						probe.send(b, e)
					} else {
						require.NotEqual(t, outbox.Held, b.send(e).Verdict)
					}
					require.EqualValues(t, HalfOpen, gauge(b, e.ID))
				}
				now = script(200)
				require.Equal(t, outbox.Delivered, b.send(e).Verdict)
				require.EqualValues(t, Closed, gauge(b, e.ID))
			})
		})
	}
}

func TestWhatIsNotTheEndpointsFaultNeverOpensItsCircuit(t *testing.T) {
	for _, status := range []int{400, 409, 410, 413, 415, 422, 429} {
		b := setup(t, script(status))
		for range 30 {
			require.Equal(t, status, b.send(endpoint("https://x.example/")).Status)
		}
		require.Empty(t, b.moves)
	}
	b := setup(t, fake(func(*http.Request) (*http.Response, error) { return answer(503, "Retry-After", "3") }))
	for range 30 {
		require.Equal(t, 3*time.Second, b.send(endpoint("https://x.example/")).RetryAfter)
	}
	require.Empty(t, b.moves)
}

func TestWhatCountsNeitherWayDoesNotBreakAStreak(t *testing.T) {
	b := setup(t, script(500, 500, 422, 500, 429, 500, 500))
	for range 7 {
		b.send(endpoint("https://x.example/"))
	}
	require.Equal(t, []string{"billing: closed → open"}, b.moves)
}

// Results of attempts that began before the circuit opened must not open it again once it closed.
func TestLateFailuresDoNotReopenTheCircuit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		late := make(chan struct{})
		var sent atomic.Int32
		b := setup(t, fake(func(*http.Request) (*http.Response, error) {
			switch n := sent.Add(1); {
			case n <= 20:
				<-late
				return answer(500)
			case n <= 25:
				return answer(500)
			}
			return answer(200)
		}))
		e := endpoint("https://x.example/", timeout(time.Hour))
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() { b.send(e) })
		}
		synctest.Wait()
		for range 5 {
			b.send(e)
		}
		pass(31 * time.Second)
		require.Equal(t, outbox.Delivered, b.send(e).Verdict)
		close(late)
		all.Wait()
		require.Equal(t, outbox.Delivered, b.send(e).Verdict)
		require.EqualValues(t, Closed, gauge(b, e.ID))
	})
}

func TestReloadKeepsTheCircuitAndItsMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := setup(t, script(500))
		for range 4 {
			b.send(endpoint("https://x.example/"))
		}
		require.Empty(t, b.moves)
		b.send(endpoint("https://other.example/", signed)) // a new *Endpoint with the same id
		require.Equal(t, []string{"billing: closed → open"}, b.moves)
	})
}

func TestReloadWithOtherBreakerSettingsKeepsAnOpenCircuitOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := setup(t, script(500, 500, 500, 500, 500, 200))
		for range 5 {
			b.send(endpoint("https://x.example/"))
		}
		e := endpoint("https://x.example/", func(e *outbox.Endpoint) { e.Breaker.OpenFor = 5 * time.Second })
		o := b.send(e)
		require.Equal(t, outbox.Held, o.Verdict)
		require.WithinDuration(t, time.Now().Add(5*time.Second), o.Until, 10*time.Millisecond)
		require.EqualValues(t, Open, gauge(b, e.ID))
		pass(time.Until(o.Until))
		require.Equal(t, outbox.Delivered, b.send(e).Verdict)
		require.Equal(t, []string{"billing: closed → open", "billing: open → half-open", "billing: half-open → closed"}, b.moves)
	})
}

func TestReloadWithOtherBreakerSettingsAppliesThemToAClosedCircuit(t *testing.T) {
	b := setup(t, script(500))
	b.send(endpoint("https://x.example/"))
	b.send(endpoint("https://x.example/", func(e *outbox.Endpoint) { e.Breaker.ConsecutiveFailures = 1 }))
	require.Equal(t, []string{"billing: closed → open"}, b.moves)
}

func TestAnEndpointWithAForgottenIDIsAStranger(t *testing.T) {
	b := setup(t, script(500, 500, 500, 500, 500, 200))
	for range 5 {
		b.send(endpoint("https://x.example/"))
	}
	b.Forget("billing")
	b.Forget("billing")
	require.Equal(t, outbox.Delivered, b.send(endpoint("https://x.example/")).Verdict)
}

// docs/faults.md 113: gobreaker's State() would make an open circuit half-open, and say so, when it is looked at.
func TestAScrapeMovesNoCircuit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := setup(t, script(500))
		for range 5 {
			b.send(endpoint("https://x.example/"))
		}
		pass(time.Hour)
		for range 3 {
			_, err := b.registry.Gather()
			require.NoError(t, err)
		}
		require.EqualValues(t, Open, gauge(b, "billing"))
		require.Equal(t, []string{"billing: closed → open"}, b.moves)
	})
}

func TestAStateChangeMayCallTheSender(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c *Client
		var seen []State
		e := endpoint("https://x.example/")
		c, err := New(Config{RoundTripper: script(500), OnStateChange: func(_ string, _, to State) {
			seen = append(seen, to)
			c.Send(t.Context(), outbox.Attempt{Event: event(), Endpoint: e, Number: 1})
		}})
		require.NoError(t, err)
		for range 5 {
			c.Send(t.Context(), outbox.Attempt{Event: event(), Endpoint: e, Number: 1})
		}
		require.Equal(t, []State{Open}, seen)
	})
}

func TestStatesAreNumberedAsGobreakerNumbersThem(t *testing.T) {
	for s, g := range map[State]gobreaker.State{Closed: gobreaker.StateClosed, HalfOpen: gobreaker.StateHalfOpen, Open: gobreaker.StateOpen} {
		require.EqualValues(t, g, s)
		require.Equal(t, s, stateOf(g))
		require.Equal(t, g.String(), s.String())
	}
}

// Many goroutines, random results: each permit is reported once, and never two probes at a time.
func TestCircuitUnderLoadIsExact(t *testing.T) {
	policy := policyOf(endpoint("https://x.example/", func(e *outbox.Endpoint) {
		e.Breaker.OpenFor = time.Microsecond
		e.Breaker.ConsecutiveFailures = 2
	}))
	var told []move
	var telling sync.Mutex
	c := newCircuit(policy, false, func(from, to State) {
		telling.Lock()
		defer telling.Unlock()
		told = append(told, move{from, to})
	})
	var all sync.WaitGroup
	for g := range 8 {
		all.Go(func() {
			for i := range 3000 {
				p, until, ok := c.allow()
				if !ok {
					if until.IsZero() {
						t.Error("held until never")
					}
					continue
				}
				c.report(p, effect((i*7+g)%3))
			}
		})
	}
	all.Wait()
	require.NotEmpty(t, told)
	for i, m := range told { // each move begins where the one before ended: told in order, none lost
		if i > 0 {
			require.Equal(t, told[i-1].to, m.from)
		}
	}
	require.Equal(t, c.state, told[len(told)-1].to)
}
