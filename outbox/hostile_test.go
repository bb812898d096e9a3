package outbox_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
)

// byHand writes to the store as an operator does, of whom the lane knows nothing.
func (w *world) byHand(t *testing.T, state outbox.State, ids ...string) {
	t.Helper()
	var changes []outbox.Change
	for _, r := range w.store.Rows() {
		if slices.Contains(ids, r.Event.ID) {
			changes = append(changes, outbox.Change{EndpointID: r.EndpointID, Event: r.Event, OrderKey: r.OrderKey, State: state})
		}
	}
	require.Len(t, changes, len(ids))
	w.set(func() {
		for id, d := range w.deliveries {
			if !slices.Contains(ids, id.event) {
				continue
			}
			if state == outbox.StateGone {
				d.removed, d.ended = true, true
			} else {
				d.ended, d.dup = false, true
			}
		}
		for _, l := range w.lines {
			l.done = 0
		}
		w.crashes++ // attempts are counted from zero again
	})
	require.NoError(t, w.store.Write(t.Context(), changes))
}

func schedule(steps ...time.Duration) func(*outbox.Endpoint) {
	return func(e *outbox.Endpoint) { e.Retry.Schedule = steps }
}

// Its row stays dead when it is parked again, so no retry of it is ever due, and its key waited
// for a recount.
func TestADeadDeliveryThatComesAgainAndFailsHoldsItsKeyUntilItsRetryAlone(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.savesFail, w.countsFail = true, true
		w.answers("a", only("1", script(dies, fails), ok))
		w.start()
		w.commit("1:k")
		pass(time.Second)
		require.Equal(t, []string{"1:dead"}, w.stored("a"))
		w.crash()
		w.start()
		w.commit("2:k")
		pass(100 * time.Millisecond)
		require.Equal(t, []string{"1", "1"}, w.attempted("a"))
		pass(500 * time.Millisecond) // its retry would be due after 300 ms
		require.Equal(t, []string{"2"}, w.arrived("a"))
		w.set(func() { w.savesFail = false })
	}, endpoint("a"))
}

// With keys blocked the count of one recount became what the next one expected, and the delivery
// waited until the endpoint had a breakdown.
func TestADeliveryThatAnOperatorRetriesIsFoundWhileKeysAreBlocked(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", only("bad", fails, only("1 2", dies, ok)))
		w.start()
		w.commit("bad:b", "1:k", "2:l")
		pass(time.Second)
		require.Equal(t, []string{"bad:parked", "1:dead", "2:dead"}, w.stored("a"))
		w.answers("a", only("bad", fails, ok))
		w.byHand(t, outbox.StateParked, "1", "2")
		pass(31 * time.Second)
		require.ElementsMatch(t, []string{"1", "2"}, w.arrived("a"))
		w.answers("a", ok)
		pass(time.Hour)
	}, endpoint("a", schedule(time.Hour)))
}

// What is written and removed while the store is counted is no sign of an operator.
func TestARecountOfABusyLaneFindsNothingStrange(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.delay = func(call string) time.Duration {
			switch call {
			case "count":
				return 200 * time.Millisecond
			case "write":
				return 30 * time.Millisecond
			}
			return 0
		}
		tries := map[string]int{}
		w.answers("a", func(a outbox.Attempt) answer {
			if tries[a.Event.ID]++; tries[a.Event.ID] == 1 || a.Event.ID == "bad" {
				return fails(a)
			}
			return ok(a)
		})
		w.start()
		w.commit("bad:b")
		pass(time.Second)
		for i := range 1500 {
			w.commit(fmt.Sprintf("%d:k%d", i, i%50))
			pass(20 * time.Millisecond)
			if i%25 == 0 {
				w.life.relay.Recount()
			}
			require.Equal(t, "flowing", w.view(t, "a").State)
		}
		w.set(func() { require.Zero(t, w.calls["scan"]) })
		w.answers("a", ok)
		pass(time.Hour)
	}, endpoint("a", concurrency(64), schedule(300*time.Millisecond, time.Hour)))
}

// Whoever deletes a parked row takes it from us, and frees its key.
func TestARowThatAnOperatorDeletesFreesItsKey(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", only("1", fails, ok))
		w.start()
		w.commit("1:k", "2:k")
		pass(100 * time.Millisecond)
		w.byHand(t, outbox.StateGone, "1")
		pass(time.Minute + time.Second)
		require.Equal(t, []string{"2"}, w.arrived("a"))
		w.commit("3:k")
		pass(time.Second)
		require.Equal(t, []string{"2", "3"}, w.arrived("a"))
		require.EqualValues(t, 0, w.view(t, "a").Parked)
	}, endpoint("a", schedule(20*time.Second)))
}

// What a lane knew of an endpoint's health is gone with the process; that rows are parked is not.
func TestAfterARestartASickEndpointGetsOneProbe(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.receiver("a").circuit = true
		w.answers("a", fails)
		w.start()
		w.commit(numbered(60, "%02d:k%[1]d")...)
		pass(time.Second)
		w.haltClean()
		before := len(w.attempted("a"))
		w.set(func() { w.receivers["a"].until, w.receivers["a"].failures = time.Time{}, 0 }) // it is in the sender's memory
		w.answers("a", hangs(100*time.Millisecond, fails))
		w.start()
		pass(50 * time.Millisecond)
		require.Equal(t, []string{"00"}, w.attempted("a")[before:])
		pass(100 * time.Millisecond)
		require.Len(t, w.attempted("a"), before+2, "no more before one has succeeded")
		w.answers("a", ok)
	}, endpoint("a", concurrency(16), schedule(slices.Repeat([]time.Duration{time.Second}, 10)...)))
}

func TestAStrictLaneWaitsForItsHeadNoLongerThanMaxAge(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", only("1", fails, ok))
		w.start()
		w.commit("1:k")
		pass(30 * time.Minute)
		w.commit("2:l", "3:")
		pass(29 * time.Minute)
		require.Empty(t, w.arrived("a"))
		w.set(func() { w.deliveries[deliveryID{"a", "1"}].mayDie = true })
		pass(12 * time.Minute)
		require.Equal(t, []string{"2", "3"}, w.arrived("a"))
		require.Equal(t, []string{"1:dead"}, w.stored("a"))
		require.Equal(t, outbox.ReasonMaxAge, w.store.Rows()[0].Reason)
	}, endpoint("a", ordering(outbox.OrderAll), func(e *outbox.Endpoint) { e.Retry.MaxAge = time.Hour },
		schedule(slices.Repeat([]time.Duration{10 * time.Minute}, 100)...)))
}

// What failed in one moment is not tried again in one.
func TestRetriesAreSpread(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		var begin time.Time
		seconds := map[int]int{}
		w.answers("a", func(a outbox.Attempt) answer {
			if a.Number == 1 {
				return fails(a)
			}
			seconds[int(time.Since(begin)/time.Second)]++
			return ok(a)
		})
		w.start()
		begin = time.Now()
		w.commit(numbered(400, "%d:k%[1]d")...)
		pass(15 * time.Second)
		require.Len(t, w.arrived("a"), 400)
		w.set(func() {
			for s := 8; s < 12; s++ {
				require.Greater(t, seconds[s], 50, "%v", seconds)
			}
			require.Equal(t, 400, seconds[8]+seconds[9]+seconds[10]+seconds[11])
		})
	}, endpoint("a", concurrency(64), schedule(10*time.Second), func(e *outbox.Endpoint) { e.Retry.Jitter = 0.2 }))
}

// Keys that fail one by one without end are an endpoint that fails.
func TestEverMoreBlockedKeysAreNotRemembered(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.maxEvents = 100
		w.answers("a", fails)
		w.start()
		most := 0
		for i := range 26 {
			w.commit(numbered(50, fmt.Sprintf("%d-%%d:k%d-%%[1]d", i, i))...)
			pass(100 * time.Millisecond)
			v := w.view(t, "a")
			most = max(most, v.Blocked)
			require.LessOrEqual(t, v.Queues, 1000+2*64, "%+v", v)
		}
		require.Greater(t, most, 900)
		require.Len(t, w.store.Rows(), 1300)
		w.answers("a", ok)
	}, endpoint("a", concurrency(64), schedule(time.Minute, time.Minute)))
}

// Thousands of parked keys in front of a lane: it reads what it can send, and remembers no
// more than that.
func TestAHugeBacklogIsReadAsItIsSent(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		const rows = 3000
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Paused })...)
		w.start()
		for i := range rows / 500 {
			w.commit(numbered(500, fmt.Sprintf("%d-%%d:k%d-%%[1]d", i, i))...)
			pass(100 * time.Millisecond)
		}
		require.Len(t, w.store.Rows(), rows)
		w.halt()
		w.answers("a", hangs(10*time.Millisecond, ok))
		w.endpoints = change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Enabled })
		w.receiver("a").paused = time.Time{}
		w.set(func() { clear(w.calls) })
		w.start()
		for len(w.arrived("a")) < rows {
			pass(100 * time.Millisecond)
			v := w.view(t, "a")
			require.LessOrEqual(t, v.Queues, 1024, "%+v", v)
			require.LessOrEqual(t, v.Loaded, 1024, "%+v", v)
			require.NoError(t, w.err())
		}
		w.set(func() { require.LessOrEqual(t, w.calls["scan"]+w.calls["key"]+w.calls["due"], rows/16) })
	}, endpoint("a", concurrency(16)))
}

// A panic ends the process with its stack: what limps on with a lock held would stall for ever,
// and what was owed comes again.
func TestAPanicInALaneEndsTheProcess(t *testing.T) {
	const env = "WALHOOK_TEST_PANIC"
	if os.Getenv(env) != "" {
		w := newWorld(endpoint("a"))
		w.answers("a", func(outbox.Attempt) answer { panic("the sender is broken") })
		w.start()
		w.commit("1:k")
		<-w.life.done
		return
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), env+"=1")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	require.True(t, errors.As(err, &exit), "%v", err)
	require.Equal(t, 2, exit.ExitCode())
	require.Contains(t, stderr.String(), "panic: the sender is broken")
	require.Contains(t, stderr.String(), "outbox.(*Lane).work")
	require.False(t, strings.Contains(stderr.String(), "recovered"))
}
