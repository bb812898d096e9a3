package outbox_test

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
)

// play runs a story in a bubble and then waits for everything to come to rest. The world checks
// order, attempts, concurrency and watermark at every step.
func story(t *testing.T, tell func(t *testing.T, w *world), endpoints ...*outbox.Endpoint) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(endpoints...)
		defer func() {
			if w.life != nil { // the test failed: nothing may be left in the bubble
				w.halt()
			}
		}()
		tell(t, w)
		if w.life == nil {
			w.start()
		}
		w.check(t)
	})
}

func ordering(o outbox.Ordering) func(*outbox.Endpoint) {
	return func(e *outbox.Endpoint) { e.Ordering = o }
}

func concurrency(n int) func(*outbox.Endpoint) {
	return func(e *outbox.Endpoint) { e.Concurrency = n }
}

func (w *world) view(t *testing.T, id string) outbox.LaneView {
	t.Helper()
	synctest.Wait()
	v, ok := w.life.relay.View(id)
	require.True(t, ok)
	return v
}

func numbered(n int, format string) (rows []string) {
	for i := range n {
		rows = append(rows, fmt.Sprintf(format, i))
	}
	return rows
}

// ---- order

func TestEventsOfAKeyComeOneAtATimeInCommitOrder(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", hangs(10*time.Millisecond, ok))
		w.start()
		w.commit("1:k", "2:l", "3:k", "4:", "5:l", "6:k")
		w.commit("7:k", "8:l")
		pass(35 * time.Millisecond)
		got := w.arrived("a")
		require.ElementsMatch(t, []string{"1", "2", "3", "4", "5", "6", "8"}, got, "three rounds of ten milliseconds")
		require.Zero(t, w.store.Writes())
	}, endpoint("a", concurrency(16)))
}

func TestOrderingAllIsOneSequence(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", only("2", script(fails, ok), ok))
		w.start()
		w.commit("1:k", "2:l", "3:", "4:m")
		pass(200 * time.Millisecond)
		require.Equal(t, []string{"1"}, w.arrived("a"))
		pass(200 * time.Millisecond)
		require.Equal(t, []string{"1", "2", "3", "4"}, w.arrived("a"))
	}, endpoint("a", ordering(outbox.OrderAll)))
}

func TestAFailedEventHoldsItsKeyAndNoOther(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", only("1", script(fails, fails, ok), ok))
		w.start()
		w.commit("1:k", "2:k", "3:l", "4:")
		pass(time.Second)
		require.ElementsMatch(t, []string{"3", "4"}, w.arrived("a"))
		require.Equal(t, []string{"1:parked", "2:parked"}, w.stored("a"))
		w.commit("5:k", "6:l")
		pass(time.Second)
		require.Equal(t, []string{"1", "2", "5"}, slices.DeleteFunc(w.arrived("a"), func(id string) bool { return id == "3" || id == "4" || id == "6" }))
	}, endpoint("a"))
}

func TestADeadDeliveryFreesItsKeyWhenItIsWritten(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", only("1", dies, ok))
		w.writesFail = true
		w.start()
		w.commit("1:k", "2:k", "3:l")
		pass(500 * time.Millisecond)
		require.Equal(t, []string{"3"}, w.arrived("a"))
		w.set(func() { w.writesFail = false })
		pass(2 * time.Second)
		require.Equal(t, []string{"3", "2"}, w.arrived("a"))
		require.Equal(t, []string{"1:dead"}, w.stored("a"))
	}, endpoint("a"))
}

func TestADeliveryDiesAfterTheLastStepOfItsSchedule(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", only("1", fails, ok))
		w.start()
		w.commit("1:k", "2:k")
		pass(10 * time.Second)
		require.Equal(t, []string{"1", "1", "1", "1", "2"}, w.attempted("a"))
		row := w.store.Rows()[0]
		require.Equal(t, outbox.StateDead, row.State)
		require.Equal(t, 4, row.Attempts)
		require.Equal(t, 500, row.Status)
	}, endpoint("a"))
}

func TestADeliveryOlderThanItsMaxAgeDiesUnsent(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", fails)
		w.start()
		w.commit("1:k")
		pass(time.Second)
		w.set(func() {
			for _, d := range w.deliveries {
				d.mayDie = true
			}
		})
		w.check4(t, "1:dead")
		row := w.store.Rows()[0]
		require.Equal(t, outbox.ReasonMaxAge, row.Reason)
		require.Equal(t, 2, row.Attempts)
	}, endpoint("a", func(e *outbox.Endpoint) { e.Retry.MaxAge = 1200 * time.Millisecond }))
}

// check4 waits until the store holds just these rows for endpoint a.
func (w *world) check4(t *testing.T, rows ...string) {
	t.Helper()
	require.NoError(t, w.until(time.Minute, func() error {
		if got := w.stored("a"); !slices.Equal(got, rows) {
			return fmt.Errorf("the store has %v, not %v", got, rows)
		}
		return nil
	}))
}

// A load that began before a retry was written showed the delivery as it was before: due, or
// not there at all. What came behind it in its key was sent.
func TestNothingOvertakesARetryThatIsBeingWritten(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		slow := false
		w.delay = func(call string) time.Duration {
			if slow && call == "write" {
				return 3 * time.Second
			}
			return 0
		}
		w.answers("a", only("1 9", script(fails, fails, fails, fails, ok), ok))
		w.start()
		w.commit("1:k", "2:k", "3:k", "9:z")
		pass(200 * time.Millisecond)
		w.set(func() { slow = true }) // the second attempts fail at 300 ms, and are written at 3.3 s
		pass(5 * time.Second)
		w.set(func() { slow = false })
	}, endpoint("a"))
}

// The same with loads that take long and show what was.
func TestNothingOvertakesARetryThatALoadMissed(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.delay = func(call string) time.Duration {
			switch call {
			case "key", "due":
				return 30 * time.Millisecond
			case "write":
				return 20 * time.Millisecond
			}
			return 0
		}
		n := 0
		w.answers("a", func(a outbox.Attempt) answer {
			n++
			return hangs(time.Duration(n*7%40)*time.Millisecond, fails)(a)
		})
		w.start()
		w.commit(slices.Concat(numbered(10, "%d:k%[1]d"), numbered(10, "n%d:k%[1]d"), numbered(10, "l%d:"))...)
		pass(5 * time.Second)
		w.answers("a", ok)
	}, endpoint("a", concurrency(16), func(e *outbox.Endpoint) {
		e.Retry.Schedule = slices.Repeat([]time.Duration{40 * time.Millisecond}, 100)
	}))
}

// An open circuit parks its delivery without a time; where that was being written when the
// circuit let a probe through, the drain passed it over, and a newer one of its key went.
func TestADeliveryThatWasHeldIsReadAgain(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Paused })...)
		w.start()
		w.commit("1:k", "2:k")
		pass(100 * time.Millisecond)
		w.set(func() {
			w.receivers["a"].circuit, w.receivers["a"].until = true, time.Now().Add(500*time.Millisecond)
			w.delay = func(call string) time.Duration {
				if call == "write" {
					return 3 * time.Second
				}
				return 0
			}
		})
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Enabled })...)
		pass(10 * time.Second)
		require.Equal(t, []string{"1", "2"}, w.arrived("a"))
	}, endpoint("a"))
}

// A scan went on behind a row of which it could not know: its insert was still on its way, while
// a newer one's was through.
func TestAScanLeavesNothingBehindThatIsOnItsWay(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.countsFail = true
		w.answers("a", only("1", script(fails, ok), only("2", hangs(3*time.Second, ok), ok)))
		w.start()
		w.commit("1:k")
		pass(time.Millisecond)
		w.commit("2:", "3:l", "4:k") // 2 takes the place, 3 waits in memory, 4 is parked behind 1
		pass(500 * time.Millisecond)
		w.set(func() {
			w.delay = func(call string) time.Duration {
				if call == "write" {
					return 400 * time.Millisecond
				}
				return 0
			}
		}) // so is 3, when it has waited for a second
		pass(10 * time.Second)
		require.ElementsMatch(t, []string{"1", "2", "3", "4"}, w.arrived("a"))
	}, endpoint("a", concurrency(1)))
}

// A drain ended although its last page lacked what was committed while the page was read.
func TestADrainEndsOnlyWhereItHasSeenAll(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.countsFail = true
		w.delay = func(call string) time.Duration {
			switch call {
			case "scan":
				return 30 * time.Millisecond
			case "write":
				return 20 * time.Millisecond
			}
			return 0
		}
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Paused })...)
		w.start()
		w.commit(numbered(50, "p%d:k")...)
		pass(time.Second)
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Enabled })...)
		for i := range 100 {
			w.commit(fmt.Sprintf("n%d:k", i), fmt.Sprintf("o%d:l", i))
			pass(7 * time.Millisecond)
		}
	}, endpoint("a"))
}

// At the end of a drain new deliveries wait in memory, for as long as any may.
func TestAFloodAtTheEndOfADrainKeepsItsOrder(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		slow := false
		w.delay = func(call string) time.Duration {
			if slow && (call == "scan" || call == "write") {
				return 300 * time.Millisecond
			}
			return 0
		}
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Paused })...)
		w.start()
		w.commit("0:k")
		pass(time.Second)
		w.set(func() { slow = true })
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Enabled })...)
		w.commit("first:k") // is being written when the scan reads
		pass(310 * time.Millisecond)
		w.commit(numbered(4500, "%d-:k")...)
		pass(20 * time.Millisecond)
		require.Equal(t, "draining", w.view(t, "a").State)
		pass(2 * time.Second)
		w.set(func() { slow = false })
	}, endpoint("a"))
}

// What was in memory when the process died comes again; what was parked behind it does not, and
// was sent first.
func TestAfterACrashWhatIsParkedWaitsForWhatComesAgain(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", hangs(time.Minute, ok))
		w.maxEvents = 100
		w.start()
		w.commit("1:k")
		pass(800 * time.Millisecond)
		w.commit("2:k", "3:k")
		w.answers("a", hangs(time.Second, fails))
		pass(50 * time.Millisecond)
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Paused })...) // parks 2 and 3
		pass(120 * time.Millisecond)                                                                    // small writes wait for each other, and for a lull
		require.Equal(t, []string{"2:parked", "3:parked"}, w.stored("a"))
		w.crash()
		w.endpoints = change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Enabled })
		w.receiver("a").paused = time.Time{}
		w.answers("a", ok)
		w.set(func() { w.silent = true })
		w.start()
		pass(2 * time.Second) // the stream does not come
		require.Empty(t, w.attempted("a")[1:])
		w.set(func() { w.silent = false; w.wakeLocked() })
		pass(3 * time.Second)
		require.Subset(t, w.arrived("a"), []string{"1", "2", "3"})
	}, endpoint("a"))
}

// One without a key waits for itself: sent before it comes again, it would be sent twice.
func TestAfterACrashARetryWaitsForItsRowToComeAgain(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", fails)
		w.start()
		w.commit("0:")
		pass(2 * time.Second) // the checkpoint has passed it
		w.set(func() { w.savesFail = true })
		w.commit("1:", "2:")
		pass(100 * time.Millisecond)
		require.Equal(t, []string{"0:parked", "1:parked", "2:parked"}, w.stored("a"))
		w.crash()
		w.answers("a", ok)
		w.set(func() { w.silent = true })
		w.start()
		pass(12 * time.Second) // all are due, and the stream does not come
		require.Equal(t, []string{"0"}, w.arrived("a"))
		w.set(func() { w.silent, w.savesFail = false, false; w.wakeLocked() })
		pass(20 * time.Second)
		require.Equal(t, []string{"0", "1", "2"}, slices.Sorted(slices.Values(w.arrived("a"))), "each once")
	}, endpoint("a", ordering(outbox.OrderNone), schedule(8*time.Second, time.Second)))
}

// A row that was parked and comes again in the stream is one delivery, in memory and in the store.
func TestWhatComesAgainIsHeldOnce(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.savesFail = true
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Paused })...)
		w.start()
		w.commit(numbered(40, "%d:")...)
		pass(time.Second)
		require.Len(t, w.store.Rows(), 40)
		w.crash()
		w.endpoints = change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Enabled })
		w.receiver("a").paused = time.Time{}
		w.answers("a", hangs(500*time.Millisecond, ok))
		w.receiver("a").circuit = true
		w.start()
		pass(700 * time.Millisecond)
		w.answers("a", hangs(100*time.Millisecond, fails))
		pass(10 * time.Second)
		w.answers("a", ok)
		w.set(func() { w.savesFail = false })
	}, endpoint("a", ordering(outbox.OrderNone), concurrency(2)))
}

// ---- the circuit

func TestAnOpenCircuitSpendsNoAttempt(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.receiver("a").circuit = true
		w.answers("a", fails)
		w.start()
		w.commit(numbered(50, "%d:k%[1]d")...)
		pass(time.Second)
		spent := len(w.attempted("a"))
		require.LessOrEqual(t, spent, 3+4, "those that were in flight")
		pass(900 * time.Millisecond)
		require.Len(t, w.attempted("a"), spent)
		require.Equal(t, "parking", w.view(t, "a").State)
		pass(4 * time.Second)
		require.LessOrEqual(t, len(w.attempted("a")), spent+2, "one probe for each time it is half-open")
		w.answers("a", ok)
	}, endpoint("a"))
}

func TestTheProbeIsTheOldestAndTheRestFollowsSlowly(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.receiver("a").circuit = true
		w.answers("a", fails)
		w.start()
		w.commit(numbered(60, "%02d:k%[1]d")...)
		pass(1900 * time.Millisecond)
		w.answers("a", hangs(100*time.Millisecond, ok))
		before := len(w.attempted("a"))
		r := w.receiver("a")
		var rounds []int
		for range 6 {
			pass(101 * time.Millisecond)
			w.set(func() { rounds = append(rounds, r.inflight) })
		}
		require.Equal(t, "00", w.attempted("a")[before], "the oldest, although its retry is due later")
		require.Equal(t, []int{1, 2, 4, 8, 16, 16}, rounds)
	}, endpoint("a", concurrency(16), func(e *outbox.Endpoint) {
		e.Retry.Schedule = []time.Duration{3 * time.Second, time.Second}
	}))
}

// A probe is sent a little before its retry is due. Where the lane drained anew while it was in
// flight, its key waited for that time, and when it had passed for nothing more.
func TestAProbeBeforeItsTimeDoesNotHoldItsKey(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.countsFail = true
		w.answers("a", script(fails, hangs(3*time.Second, ok), ok))
		w.start()
		w.commit("1:k", "2:k")
		pass(100 * time.Millisecond)
		w.haltClean()
		w.start() // the probe is 1
		pass(100 * time.Millisecond)
		require.Equal(t, []string{"1", "1"}, w.attempted("a"))
		w.commit("3:l") // waits for the one place, until the lane drains for it
		pass(5 * time.Second)
		require.ElementsMatch(t, []string{"1", "2", "3"}, w.arrived("a"))
	}, endpoint("a", concurrency(1), func(e *outbox.Endpoint) { e.Retry.Schedule = []time.Duration{1900 * time.Millisecond} }))
}

func TestRetryAfterPausesTheEndpoint(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", script(func(a outbox.Attempt) answer {
			r := fails(a)
			r.Status, r.Slow, r.RetryAfter = 429, true, 10*time.Second
			return r
		}, ok))
		w.start()
		w.commit("1:k")
		pass(time.Millisecond)
		w.commit("2:l", "3:")
		pass(9900 * time.Millisecond)
		require.Equal(t, []string{"1"}, w.attempted("a"))
		require.Len(t, w.store.Rows(), 3)
		pass(time.Second)
		require.Equal(t, []string{"1", "1"}, w.attempted("a")[:2])
		require.Len(t, w.arrived("a"), 3)
	}, endpoint("a"))
}

func TestAnEndpointThatIsGoneIsDisabledOnceAndKeepsWhatIsParked(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", func(a outbox.Attempt) answer {
			r := fails(a)
			r.Status, r.Gone = 410, true
			return r
		})
		w.start()
		w.commit("1:k")
		pass(time.Second)
		require.Equal(t, map[string]int{"a": 1}, w.life.disabled())
		w.set(func() {
			w.endpoints = change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Disabled })
		})
		w.commit("2:k") // passes it by
		pass(time.Minute)
		require.Equal(t, []string{"1"}, w.attempted("a"))
		require.Equal(t, []string{"1:parked"}, w.stored("a"))
		w.answers("a", ok)
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Enabled })...)
		w.commit("3:k")
		pass(time.Second)
		require.Equal(t, []string{"1", "3"}, w.arrived("a"))
	}, endpoint("a"))
}

func TestAnEndpointThatFailsForTooLongIsDisabled(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", fails)
		w.start()
		for i := 0; i < 20 && len(w.life.disabled()) == 0; i++ {
			w.commit(fmt.Sprintf("%d:", i))
			pass(time.Second)
		}
		require.NotEmpty(t, w.life.disabled())
		pass(time.Minute)
		v := w.view(t, "a")
		require.Equal(t, "parking", v.State)
		tries := len(w.attempted("a"))
		pass(time.Minute)
		require.Len(t, w.attempted("a"), tries)
		w.answers("a", ok)
		w.configure(w.endpoints...)
	}, endpoint("a", func(e *outbox.Endpoint) { e.DisableAfter = 10 * time.Second }))
}

// ---- slowness

func TestASlowDeliveryLetsGoOfTheWatermark(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", only("1", hangs(20*time.Second, ok), ok))
		w.start()
		w.commit("1:k", "2:k", "3:l")
		pass(900 * time.Millisecond)
		require.Less(t, w.life.relay.Low().LSN, w.end)
		pass(300 * time.Millisecond)
		require.Equal(t, w.end, w.life.relay.Low().LSN)
		require.Equal(t, []string{"1:sending", "2:parked"}, w.stored("a"))
		require.Equal(t, []string{"3"}, w.arrived("a"))
		pass(20 * time.Second)
		require.Equal(t, []string{"3", "1", "2"}, w.arrived("a"))
		require.Equal(t, []string{"1", "2"}, slices.DeleteFunc(w.attempted("a"), func(id string) bool { return id == "3" }))
	}, endpoint("a"))
}

func TestALaneThatCannotKeepUpDrainsAndFlowsAgain(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", hangs(100*time.Millisecond, ok))
		w.start()
		seen := map[string]bool{}
		for i := range 100 { // a hundred a second for forty
			w.commit(numbered(10, fmt.Sprintf("%d-%%d:k%%[1]d", i))...)
			pass(100 * time.Millisecond)
			seen[w.view(t, "a").State] = true
		}
		require.True(t, seen["draining"])
		require.Equal(t, w.end, max(w.end, w.life.relay.Low().LSN))
		require.Less(t, w.life.relay.Stuck(), 1500*time.Millisecond)
		require.NoError(t, w.until(time.Minute, w.quiet))
		writes := w.store.Writes()
		w.commit("last:k")
		pass(time.Second)
		require.Equal(t, writes, w.store.Writes(), "it goes from memory again")
	}, endpoint("a"))
}

func TestASlowEndpointHoldsUpNoOther(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.maxEvents = 200
		w.answers("hangs", hangs(3*time.Second, fails))
		w.answers("slow", hangs(2*time.Second, ok))
		w.start()
		for i := range 100 {
			w.commit(numbered(10, fmt.Sprintf("%d-%%d:k%%[1]d", i))...)
			pass(200 * time.Millisecond)
			require.Len(t, w.arrived("well"), 10*(i+1))
		}
		w.answers("hangs", ok)
		w.answers("slow", ok)
	}, endpoint("hangs"), endpoint("slow"), endpoint("well"))
}

// A backlog that is read back from the store fills no buffer that new events need.
func TestABacklogOfManyKeysKeepsNoNewEventOut(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.maxEvents = 200
		down := change(w.endpoints, "back", func(e *outbox.Endpoint) { e.Status = outbox.Paused })
		w.configure(down...)
		w.start()
		for i := range 20 {
			w.commit(numbered(50, fmt.Sprintf("%d-%%d:k%%[1]d", i))...)
			pass(50 * time.Millisecond)
		}
		n := 0
		w.answers("back", func(a outbox.Attempt) answer {
			if n++; n < 200 {
				return ok(a)
			}
			return hangs(20*time.Second, ok)(a)
		})
		w.configure(change(w.endpoints, "back", func(e *outbox.Endpoint) { e.Status = outbox.Enabled })...)
		pass(time.Second)
		for i := range 20 {
			w.commit(numbered(50, fmt.Sprintf("n%d-%%d:k%%[1]d", i))...)
			pass(50 * time.Millisecond)
			require.Len(t, w.arrived("well"), 1000+50*(i+1))
		}
		w.answers("back", ok)
	}, endpoint("back", concurrency(64)), endpoint("well"))
}

// A store that can be read and not written must not come to stand in memory as a whole.
func TestAStoreThatCannotBeWrittenIsReadNoFurther(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.maxEvents = 100
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Paused })...)
		w.start()
		for i := range 20 {
			w.commit(numbered(50, fmt.Sprintf("%d-%%d:", i))...)
			pass(100 * time.Millisecond)
		}
		require.Len(t, w.store.Rows(), 1000)
		w.set(func() { w.writesFail = true })
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Enabled })...)
		pass(time.Minute)
		events, _ := w.life.relay.Buffer()
		require.LessOrEqual(t, events, int64(100))
		require.LessOrEqual(t, len(w.arrived("a")), 100)
		w.set(func() { w.writesFail = false })
	}, endpoint("a"))
}

func TestWhileTheStoreIsDownWhatIsWellGoesOn(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", only("1", script(fails, ok), ok))
		w.start()
		pass(time.Millisecond)
		w.set(func() { w.writesFail, w.readsFail = true, true })
		w.commit("1:k", "2:k", "3:l")
		pass(30 * time.Second)
		require.Equal(t, []string{"3"}, w.arrived("a"))
		require.Error(t, w.life.relay.Fault())
		require.Less(t, w.life.relay.Low().LSN, w.end)
		w.commit("4:l")
		pass(time.Second)
		require.Equal(t, []string{"3", "4"}, w.arrived("a"))
		w.set(func() { w.writesFail, w.readsFail = false, false })
		pass(10 * time.Second)
		require.Equal(t, []string{"3", "4", "1", "2"}, w.arrived("a"))
		require.NoError(t, w.life.relay.Fault())
	}, endpoint("a"))
}

// Thousands of events of one transaction for one key, of which the first fails.
func TestThousandsOfEventsOfOneKey(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", script(fails, ok))
		w.start()
		w.commit(numbered(2000, "%d:k")...)
		pass(250 * time.Millisecond)
		require.Equal(t, w.end, w.life.relay.Low().LSN)
		pass(10 * time.Second)
		require.Len(t, w.arrived("a"), 2000)
		w.set(func() { require.LessOrEqual(t, w.calls["key"], 2000/64+10) })
	}, endpoint("a", concurrency(16)))
}

// A hot key in front of a backlog is read as far as it can be sent, and then by itself.
func TestADrainReadsPastAHotKey(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Paused })...)
		w.start()
		w.commit(numbered(1500, "hot%d:hot")...)
		w.commit(numbered(100, "%d:k%[1]d")...)
		pass(2 * time.Second)
		w.answers("a", hangs(10*time.Millisecond, ok))
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Enabled })...)
		pass(2 * time.Second)
		cold := slices.DeleteFunc(w.arrived("a"), func(id string) bool { return id[0] == 'h' })
		require.Len(t, cold, 100)
	}, endpoint("a", concurrency(8)))
}

// Hundreds of keys that fail one by one, and one that does not.
func TestManyBlockedKeysAreNoneOfTheOthersBusiness(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", func(a outbox.Attempt) answer {
			if a.Event.Key == "well" {
				return ok(a)
			}
			return fails(a)
		})
		w.start()
		w.commit(numbered(500, "%d:k%[1]d")...)
		pass(200 * time.Millisecond)
		require.Equal(t, 500, w.view(t, "a").Blocked)
		w.commit("x:well")
		pass(time.Millisecond)
		require.Equal(t, []string{"x"}, w.arrived("a"))
		w.set(func() { clear(w.calls) })
		pass(time.Minute)
		require.Len(t, w.attempted("a"), 500*4+1)
		w.set(func() { require.Less(t, w.calls["due"]+w.calls["key"]+w.calls["scan"], 3*500*3) })
	}, endpoint("a", concurrency(64)))
}

// Retries that are due and in memory neither hide the others nor are asked for again and again.
func TestWhatIsDueAndInFlightIsNotAskedForInALoop(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.maxBytes = 64 << 10
		w.answers("a", fails)
		w.start()
		for i := range 20 {
			w.commitRows([]*outboxRow{{id: fmt.Sprint(i), typ: "order.created", data: fmt.Sprintf(`"%02000d"`, i)}})
		}
		pass(100 * time.Millisecond)
		w.answers("a", hangs(30*time.Second, ok))
		w.set(func() { clear(w.calls) })
		pass(25 * time.Second)
		w.set(func() {
			require.Equal(t, 7, w.receivers["a"].inflight, "as many as a quarter of the buffer holds")
			require.Less(t, w.calls["due"], 60)
		})
	}, endpoint("a", concurrency(20)))
}

// ---- the lease, and what an operator does

func TestNothingIsSentWhilePostgresIsNotHeardOf(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", only("1", script(fails, ok), ok))
		w.start()
		w.commit("1:k", "2:k")
		pass(time.Second)
		w.set(func() { w.silent = true })
		pass(18 * time.Second)
		w.set(func() { clear(w.calls) })
		pass(time.Hour) // the retry is due
		require.Equal(t, []string{"1"}, w.attempted("a"))
		w.set(func() { require.Zero(t, w.calls["due"]+w.calls["key"]+w.calls["scan"]) })
		w.commit("3:k", "4:")
		w.set(func() { w.silent = false; w.wakeLocked() })
		pass(5 * time.Second)
		require.ElementsMatch(t, []string{"1", "2", "3", "4"}, w.arrived("a"))
	}, endpoint("a", func(e *outbox.Endpoint) { e.Retry.Schedule = []time.Duration{20 * time.Second} }))
}

func TestAPausedEndpointIsSentNothingAndThenAllInOrder(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.start()
		w.commit("1:k")
		pass(time.Millisecond)
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Paused })...)
		w.commit("2:k", "3:l", "4:")
		pass(time.Hour)
		require.Equal(t, []string{"1"}, w.arrived("a"))
		require.Equal(t, w.end, w.life.relay.Low().LSN)
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Enabled })...)
		w.commit("5:k")
		pass(time.Second)
		require.ElementsMatch(t, []string{"1", "2", "3", "4", "5"}, w.arrived("a"))
	}, endpoint("a"))
}

func TestWhatIsParkedForAnEndpointThatIsRemovedDies(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", fails)
		w.start()
		w.commit("1:k", "2:l", "3:k")
		pass(100 * time.Millisecond)
		w.set(func() { w.writesFail = true })
		w.configure(w.endpoints[1])
		pass(10 * time.Second)
		require.Equal(t, []string{"1:parked", "2:parked", "3:parked"}, w.stored("a"))
		w.set(func() { w.writesFail = false })
		w.check4(t, "1:dead", "2:dead", "3:dead")
		require.Len(t, w.arrived("b"), 3)
	}, endpoint("a"), endpoint("b"))
}

// An endpoint that is removed and comes back under its id is another one: what was parked for the
// first one dies, what is parked for the second one does not.
func TestAnEndpointThatComesBackInheritsNothing(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", only("1", fails, only("2", hangs(500*time.Millisecond, fails), ok)))
		w.start()
		w.commit("1:k", "2:l")
		pass(10 * time.Millisecond)
		first := w.endpoints[0]
		w.configure()
		w.set(func() {
			clear(w.lines) // a new life
			w.endpoints = []*outbox.Endpoint{first}
		})
		begin := time.Now()
		require.NoError(t, w.life.relay.SetEndpoints([]*outbox.Endpoint{first}))
		require.GreaterOrEqual(t, time.Since(begin), 480*time.Millisecond, "it waits for what is in flight")
		require.Equal(t, []string{"1:dead", "2:dead"}, w.stored("a"))
		w.answers("a", only("3", script(fails, ok), ok))
		w.commit("3:k", "4:k", "5:l")
		pass(time.Second)
		require.ElementsMatch(t, []string{"3", "4", "5"}, w.arrived("a"))
		require.Equal(t, []string{"1:dead", "2:dead"}, w.stored("a"))
	}, endpoint("a"))
}

func TestSettingsAreTakenUpAndNothingLearnedIsLost(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", hangs(100*time.Millisecond, ok))
		w.start()
		w.commit(numbered(20, "%d:")...)
		pass(10 * time.Millisecond)
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Concurrency = 16 })...)
		pass(10 * time.Millisecond)
		w.set(func() { require.Equal(t, 16, w.receivers["a"].inflight) })
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Concurrency = 2 })...)
		pass(101 * time.Millisecond)
		w.set(func() { require.Equal(t, 2, w.receivers["a"].inflight) })
	}, endpoint("a"))
}

// An operator made a dead delivery parked again; nobody told the lane.
func TestADeliveryThatAnOperatorRetriesIsFound(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", dies)
		w.start()
		w.commit("1:k", "2:k")
		pass(time.Second)
		require.Equal(t, []string{"1:dead", "2:dead"}, w.stored("a"))
		w.answers("a", ok)
		var changes []outbox.Change
		for _, r := range w.store.Rows() {
			changes = append(changes, outbox.Change{EndpointID: "a", Event: r.Event, OrderKey: r.OrderKey, State: outbox.StateParked})
		}
		w.set(func() {
			for _, d := range w.deliveries {
				d.ended, d.dup = false, true
			}
			for _, l := range w.lines {
				l.done = 0
			}
			w.crashes++ // their attempts are counted from zero again
		})
		require.NoError(t, w.store.Write(t.Context(), changes))
		pass(2 * time.Minute)
		require.Equal(t, []string{"1", "2"}, w.arrived("a"))
	}, endpoint("a"))
}
