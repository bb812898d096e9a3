package sender

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/sender/sendertest"
)

// narrow is a client with so many places.
func narrow(t *testing.T, places int, rt http.RoundTripper) *bundle {
	t.Helper()
	core, logs := observer.New(zap.DebugLevel)
	b := &bundle{t: t, registry: prometheus.NewRegistry(), logs: logs}
	c, err := New(Config{
		Logger: zap.New(core), Registerer: b.registry, RoundTripper: rt, MaxAttempts: places, MaxIdleConns: places,
		OnStateChange: func(id string, from, to State) { b.moves = append(b.moves, fmt.Sprintf("%s: %s → %s", id, from, to)) },
	})
	require.NoError(t, err)
	b.Client = c
	t.Cleanup(b.leave)
	return b
}

func (r *room) connections() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.open
}

func dialError(err error, ip string) error {
	return &net.OpError{Op: "dial", Net: "tcp", Addr: &net.TCPAddr{IP: net.ParseIP(ip), Port: 443}, Err: os.NewSyscallError("socket", err)}
}

// docs/faults.md 125: it spends no attempt, blames no endpoint, and is said once a shortage.
func TestWhatThisHostLacksIsNoFaultOfTheEndpoint(t *testing.T) {
	for name, err := range map[string]error{
		"descriptors":                   dialError(syscall.EMFILE, "10.0.0.1"),
		"descriptors of the system":     dialError(syscall.ENFILE, "10.0.0.1"),
		"memory":                        dialError(syscall.ENOMEM, "10.0.0.1"),
		"buffers":                       dialError(syscall.ENOBUFS, "10.0.0.1"),
		"ports":                         dialError(syscall.EADDRNOTAVAIL, "10.0.0.1"),
		"descriptors to look a name up": &net.OpError{Op: "dial", Err: &net.DNSError{Err: "dial udp 10.0.0.2:53: socket: too many open files", Name: "x"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				lacking := true
				b := setup(t, nil)
				b.roundTripper = fake(func(*http.Request) (*http.Response, error) {
					if lacking {
						return nil, err
					}
					b.room.mu.Lock()
					b.room.enough(time.Now()) // a connection was made
					b.room.mu.Unlock()
					return answer(200)
				})
				e := endpoint("https://x.example/")
				for shortage := range 2 {
					lacking = true
					for range 50 {
						o := b.send(e)
						require.Equal(t, outbox.Held, o.Verdict)
						require.Equal(t, outbox.ReasonShortage, o.Reason)
						require.Equal(t, time.Now().Add(shortageHold), o.Until)
						require.NotEmpty(t, o.Detail)
						pass(time.Until(o.Until))
					}
					require.Empty(t, b.moves)
					require.Equal(t, shortage+1, b.logs.FilterMessageSnippet("this host is short").Len())
					lacking = false
					require.Equal(t, outbox.Delivered, b.send(e).Verdict)
					require.Equal(t, shortage, b.logs.FilterMessageSnippet("has again").Len(), "a moment is no end of it")
					pass(shortageOver)
					require.Equal(t, outbox.Delivered, b.send(e).Verdict)
					require.Equal(t, shortage+1, b.logs.FilterMessageSnippet("has again").Len())
				}
				require.EqualValues(t, 100, testutil.ToFloat64(b.metrics.shortages))
				require.Equal(t, 1, testutil.CollectAndCount(b.metrics.attempts), "200 alone: no request was made")
			})
		})
	}
}

// A host that has no IPv6 says the same as one without a free port, but for ever.
func TestAnAddressThatCannotBeReachedFromHereSpendsAttempts(t *testing.T) {
	o, counts := judge(result{err: dialError(syscall.EADDRNOTAVAIL, "2606:4700::1")}, endpoint("https://x.example/"), noon)
	require.Equal(t, outbox.Retry, o.Verdict)
	require.Equal(t, outbox.ReasonConnect, o.Reason)
	require.Equal(t, failure, counts)
}

// docs/faults.md 103, 125: endpoints that hang take their part of the places and no more.
func TestEndpointsThatHangLeavePlacesForTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var inFlight, most atomic.Int32
		b := narrow(t, 32, fake(func(r *http.Request) (*http.Response, error) {
			n := inFlight.Add(1)
			defer inFlight.Add(-1)
			for was := most.Load(); n > was && !most.CompareAndSwap(was, n); was = most.Load() {
			}
			if r.URL.Host == "well.example" {
				pass(10 * time.Millisecond)
				return answer(200)
			}
			return hang(r)
		}))
		quiet := func(e *outbox.Endpoint) { e.Breaker = outbox.BreakerPolicy{} }
		ctx, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		for i := range 3 {
			sick := endpoint("https://sick.example/", quiet, func(e *outbox.Endpoint) { e.ID = fmt.Sprint("sick-", i) })
			for range 64 {
				all.Go(func() {
					for ctx.Err() == nil {
						o := b.Send(ctx, outbox.Attempt{Event: event(), Endpoint: sick, Number: 1})
						if o.Verdict == outbox.Held && o.Reason != outbox.ReasonShortage {
							t.Errorf("%+v", o)
						}
					}
				})
			}
		}
		pass(500 * time.Millisecond)
		synctest.Wait()
		require.LessOrEqual(t, int(inFlight.Load()), 16+8+4, "each has half of what it found at most")
		well := endpoint("https://well.example/", func(e *outbox.Endpoint) { e.ID = "well" })
		for range 500 {
			begin := time.Now()
			require.Equal(t, outbox.Delivered, b.send(well).Verdict)
			require.Equal(t, 10*time.Millisecond, time.Since(begin), "no wait")
		}
		cancel()
		all.Wait()
		require.LessOrEqual(t, most.Load(), int32(32))
		b.room.mu.Lock()
		defer b.room.mu.Unlock()
		require.Zero(t, b.room.flying)
		require.Empty(t, b.room.queue)
		for id, target := range b.targets {
			require.Zero(t, target.share.flying, id)
			require.Empty(t, target.share.waiting, id)
		}
	})
}

// docs/faults.md 141: a thousand endpoints, a handful of places, and each comes to its turn.
func TestManyEndpointsShareFewPlacesAndNoneStarves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n, places, rounds = 1000, 100, 5
		b := narrow(t, places, fake(func(*http.Request) (*http.Response, error) {
			pass(20 * time.Millisecond)
			return answer(200)
		}))
		var all sync.WaitGroup
		for i := range n {
			e := endpoint("https://one.example/", func(e *outbox.Endpoint) { e.ID = fmt.Sprint("e-", i) })
			all.Go(func() {
				for range rounds {
					if o := b.send(e); o.Verdict != outbox.Delivered {
						t.Errorf("%s: %+v", e.ID, o)
					}
				}
			})
		}
		begin := time.Now()
		all.Wait()
		require.Equal(t, time.Duration(n*rounds/places)*20*time.Millisecond, time.Since(begin), "no place was idle")
		require.Empty(t, b.room.queue)
	})
}

func TestAnAttemptThatFindsNoPlaceIsHeldAfterAMoment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := narrow(t, 1, fake(hang))
		first := make(chan outbox.Outcome)
		go func() { first <- b.send(endpoint("https://x.example/")) }()
		synctest.Wait()
		other := endpoint("https://y.example/", func(e *outbox.Endpoint) { e.ID = "other" })
		begin := time.Now()
		o := b.send(other)
		require.Equal(t, roomWait, time.Since(begin))
		require.Equal(t, outbox.Outcome{Verdict: outbox.Held, Reason: outbox.ReasonShortage, Detail: errNoRoom.Error(), Until: time.Now().Add(shortageHold)}, o)
		require.Equal(t, 1, b.logs.FilterMessageSnippet("this host is short").Len())

		ctx, cancel := context.WithTimeout(t.Context(), roomWait/2)
		defer cancel()
		require.Equal(t, outbox.Cut, b.Send(ctx, outbox.Attempt{Event: event(), Endpoint: other, Number: 1}).Verdict)
		require.Equal(t, outbox.ReasonTimeout, (<-first).Reason)
		require.Empty(t, b.moves, "neither is a probe, nor a failure, lost on the circuit")
		require.Zero(t, b.room.flying)
	})
}

// A panic gives its place back, as it frees its probe's.
func TestAPanicLeavesItsPlace(t *testing.T) {
	b := narrow(t, 1, fake(func(*http.Request) (*http.Response, error) { panic("boom") }))
	for range 3 {
		require.Panics(t, func() { b.send(endpoint("https://x.example/")) })
	}
	require.Zero(t, b.room.flying)
}

// docs/faults.md 102: idle connections of all transports together stay within the bound.
func TestConnectionsStayWithinTheirBoundHoweverManyHostsAndTransports(t *testing.T) {
	rx := sendertest.New(t, sendertest.Config{Addr: "0.0.0.0:0", Keep: 1})
	_, port, err := net.SplitHostPort(rx.Addr())
	require.NoError(t, err)
	b := narrow(t, 5, nil)
	for i := range 200 {
		e := endpoint(fmt.Sprintf("http://127.0.1.%d:%s/", 1+i, port), func(e *outbox.Endpoint) {
			e.ID = fmt.Sprint(i)
			if i%2 == 0 {
				e.Network.Deny = prefixes(fmt.Sprintf("10.%d.0.0/16", i)) // a transport of its own
			}
		})
		require.Equal(t, outbox.Delivered, b.send(e).Verdict)
		require.LessOrEqual(t, b.room.connections(), 5+5+1)
	}
	require.Len(t, b.transports, 101)
	b.Close()
	require.Eventually(t, func() bool { return b.room.connections() == 0 }, patience, time.Millisecond)
}

// Random comings and goings: the counts stay exact, the bound holds, nobody is forgotten.
func TestRoomUnderLoadIsExact(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &room{places: 7, log: zap.NewNop(), missed: prometheus.NewCounter(prometheus.CounterOpts{Name: "x"})}
		shares := make([]*share, 5)
		for i := range shares {
			shares[i] = new(share)
		}
		var in atomic.Int32
		var all sync.WaitGroup
		for g := range 40 {
			all.Go(func() {
				s := shares[g%len(shares)]
				for i := range 500 {
					ctx, cancel := context.WithCancel(t.Context())
					if i%3 == g%3 {
						cancel()
					}
					if r.enter(ctx, s) {
						if in.Add(1) > 7 {
							t.Error("more than there are places")
						}
						in.Add(-1)
						r.leave(s)
					} else if !errors.Is(ctx.Err(), context.Canceled) {
						t.Error("nobody came to the turn in a second")
					}
					cancel()
				}
			})
		}
		all.Wait()
		require.Zero(t, r.flying)
		require.Empty(t, r.queue)
		for _, s := range shares {
			require.Zero(t, s.flying)
			require.Empty(t, s.waiting)
		}
	})
}
