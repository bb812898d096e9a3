package outbox_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
)

func batched(events int, linger time.Duration) func(*outbox.Endpoint) {
	return func(e *outbox.Endpoint) { e.Batch = outbox.Batch{MaxEvents: events, Linger: linger} }
}

// batches is how many events each attempt had.
func (w *world) batches(id string) []int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.receiverLocked(id).batches)
}

// ---- what goes together

func TestABatchTakesAllThatMayGo(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", hangs(100*time.Millisecond, ok))
		w.start()
		w.commit("0:z")
		pass(time.Millisecond) // it goes at once, alone, and takes the one place
		w.commit(numbered(25, "%02d:k%[1]d")...)
		pass(500 * time.Millisecond)
		require.Equal(t, []int{1, 10, 10, 5}, w.batches("a"))
		require.Equal(t, append([]string{"0"}, numbered(25, "%02d")...), w.arrived("a"))
		require.Zero(t, w.store.Writes())
	}, endpoint("a", concurrency(1), batched(10, 0)))
}

// Those of a key are in order in one batch, and no other batch with the key is under way meanwhile.
func TestABatchTakesTheEventsOfAKeyTogether(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", hangs(100*time.Millisecond, ok))
		w.start()
		w.commit("0:k")
		pass(10 * time.Millisecond)
		w.commit("1:k", "2:l", "3:k", "4:k", "5:l", "6:k", "7:")
		pass(50 * time.Millisecond)
		require.Equal(t, []string{"0", "2", "5", "7"}, w.attempted("a"), "not those behind 0")
		pass(100 * time.Millisecond)
		require.Equal(t, []string{"1", "3", "4", "6"}, w.attempted("a")[4:])
		require.Equal(t, []int{1, 3, 4}, w.batches("a"))
	}, endpoint("a", concurrency(16), batched(10, 5*time.Millisecond)))
}

func TestOrderingAllHasOneBatchAtATime(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", hangs(100*time.Millisecond, ok))
		w.start()
		w.commit("0:k")
		pass(time.Millisecond)
		w.commit(numbered(12, "%02d:k%[1]d")...)
		pass(time.Second)
		require.Equal(t, []int{1, 5, 5, 2}, w.batches("a"))
		require.Equal(t, append([]string{"0"}, numbered(12, "%02d")...), w.arrived("a"))
		w.set(func() { require.Equal(t, 1, w.receivers["a"].most) })
	}, endpoint("a", concurrency(16), ordering(outbox.OrderAll), batched(5, 0)))
}

func TestABatchIsBoundedInBytes(t *testing.T) {
	for name, c := range map[string]struct {
		set  func(*outbox.Endpoint)
		want []int
	}{
		"max_bytes":    {func(e *outbox.Endpoint) { e.Batch.MaxBytes = 4 << 10 }, []int{1, 3, 3, 3, 1}},
		"max_payload":  {func(e *outbox.Endpoint) { e.MaxPayload = 6 << 10 }, []int{1, 5, 5}},
		"larger alone": {func(e *outbox.Endpoint) { e.Batch.MaxBytes = 200 }, slices.Repeat([]int{1}, 11)},
		"ids of raw":   {func(e *outbox.Endpoint) { e.Format = outbox.FormatRaw }, []int{1, 20, 10}},
	} {
		t.Run(name, func(t *testing.T) {
			story(t, func(t *testing.T, w *world) {
				w.answers("a", hangs(10*time.Millisecond, ok))
				w.start()
				w.commit("0")
				pass(time.Millisecond)
				var rows []*outboxRow
				if name == "ids of raw" {
					for i := range 30 {
						rows = append(rows, &outboxRow{id: fmt.Sprintf("%0200d", i), typ: "order.created", data: "1"})
					}
				} else {
					for i := range 10 {
						rows = append(rows, &outboxRow{id: fmt.Sprint(i), typ: "order.created", data: `"` + strings.Repeat("x", 1000) + `"`})
					}
				}
				w.commitRows(rows)
				pass(500 * time.Millisecond)
				require.Equal(t, c.want, w.batches("a"))
			}, endpoint("a", concurrency(1), batched(100, 0), c.set))
		})
	}
}

func TestAnEndpointOfBatchesGetsASingleEventAsOne(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		var seen []outbox.Attempt
		w.answers("a", func(a outbox.Attempt) answer {
			seen = append(seen, a)
			return ok(a)
		})
		w.start()
		w.commit("1:k")
		pass(time.Millisecond)
		w.set(func() {
			require.Len(t, seen, 1)
			require.Equal(t, []*outbox.Event{seen[0].Event}, seen[0].Batch)
		})
	}, endpoint("a", batched(10, 0)))
}

// ---- linger

func TestABatchWaitsForOthersAndGoesWhenItIsFull(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.start()
		w.commit("1:k")
		pass(300 * time.Millisecond)
		w.commit("2:l")
		pass(190 * time.Millisecond)
		require.Empty(t, w.attempted("a"))
		pass(11 * time.Millisecond)
		require.Equal(t, []string{"1", "2"}, w.arrived("a"), "half a second after the first")
		w.commit(numbered(6, "n%d:k%[1]d")...)
		pass(time.Millisecond)
		require.Equal(t, []int{2, 5}, w.batches("a"), "a full one at once")
		pass(500 * time.Millisecond)
		require.Equal(t, []int{2, 5, 1}, w.batches("a"))
		require.Zero(t, w.store.Writes())
		require.Zero(t, w.life.relay.Stuck())
	}, endpoint("a", batched(5, 500*time.Millisecond)))
}

func TestWhatWaitedForAPlaceDoesNotLingerAgain(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", hangs(700*time.Millisecond, ok))
		w.start()
		w.commit("1")
		pass(550 * time.Millisecond) // 1 is in flight
		w.commit("2")
		pass(720 * time.Millisecond)
		require.Equal(t, []string{"1", "2"}, w.attempted("a"))
	}, endpoint("a", concurrency(1), batched(5, 500*time.Millisecond)))
}

// A linger beyond spill_after holds no watermark: what waits for it waits in the store, is read
// and parked again with each that comes, and goes all the same when its time is over.
func TestALongLingerHoldsNoWatermark(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.start()
		for i := range 12 {
			w.commit(fmt.Sprintf("%02d:k", i))
			pass(time.Second)
			require.Less(t, w.life.relay.Stuck(), 1500*time.Millisecond)
		}
		require.GreaterOrEqual(t, len(w.arrived("a")), 4, "after five seconds")
		require.Less(t, len(w.batches("a")), 4)
		pass(20 * time.Second)
		require.Len(t, w.arrived("a"), 12)
	}, endpoint("a", batched(100, 5*time.Second)))
}

func TestNothingLingersWhileTheBufferIsFull(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.maxEvents = 10
		w.start()
		w.commit(numbered(10, "first%d")...)
		pass(100 * time.Millisecond)
		require.Empty(t, w.arrived("a"))
		w.commit("next")
		pass(10 * time.Millisecond)
		require.Len(t, w.arrived("a"), 10, "the next one waits for their place")
		pass(2 * time.Minute)

		w.commit(numbered(100, "%d")...)
		pass(time.Second)
		require.GreaterOrEqual(t, len(w.arrived("a")), 111-w.maxEvents, "nobody waits for the place of the last ones")
		pass(2 * time.Minute)
		require.Len(t, w.arrived("a"), 111)
	}, endpoint("a", batched(1000, time.Minute)))
}

func TestACleanStopParksWhatLingers(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.start()
		w.commit("1:k", "2:l")
		pass(100 * time.Millisecond)
		w.haltClean()
		require.Equal(t, []string{"1:parked", "2:parked"}, w.stored("a"))
		w.start()
		pass(time.Second)
		require.Equal(t, []int{2}, w.batches("a"))
	}, endpoint("a", batched(5, 800*time.Millisecond)))
}

func TestABatchIsOneTurnOfTheRate(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.start()
		w.commit(numbered(100, "%02d:k%[1]d")...)
		pass(900 * time.Millisecond)
		require.Len(t, w.batches("a"), 5)
		require.Len(t, w.arrived("a"), 50)
		pass(1100 * time.Millisecond)
		require.Len(t, w.arrived("a"), 100)
	}, endpoint("a", batched(10, 0), limited("", 5, time.Second), func(e *outbox.Endpoint) { e.Batch.Linger = 50 * time.Millisecond }))
}

// ---- all or nothing

func TestABatchFailsAsAWhole(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", script(fails, fails, ok))
		w.start()
		w.commit("1:k", "2:l", "3:k", "4:")
		pass(100 * time.Millisecond)
		require.Equal(t, []string{"1:parked", "2:parked", "3:parked", "4:parked"}, w.stored("a"))
		for _, row := range w.store.Rows() {
			require.Equal(t, 1, row.Attempts, row.Event.ID)
			require.Equal(t, w.store.Rows()[0].Due, row.Due)
		}
		pass(3 * time.Second)
		require.Equal(t, []int{4, 4, 4}, w.batches("a"), "they come together again")
		require.Equal(t, []string{"1", "2", "3", "4"}, w.arrived("a"))
	}, endpoint("a", batched(10, 20*time.Millisecond), func(e *outbox.Endpoint) { e.Retry.Jitter = 0.2 }))
}

// The receiver refuses every batch with this one in it.
func TestAPoisonedEventBringsNoOtherOneDown(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", func(a outbox.Attempt) answer {
			if slices.ContainsFunc(a.Batch, func(e *outbox.Event) bool { return e.ID == "3" }) {
				r := fails(a)
				r.Status = 400
				return r
			}
			return ok(a)
		})
		w.start()
		w.commit("1:k", "2:l", "3:k", "4:k", "5:", "6:m")
		pass(20 * time.Second)
		require.Equal(t, []string{"3:dead"}, w.stored("a"))
		got := w.arrived("a")
		slices.Sort(got)
		require.Equal(t, []string{"1", "2", "4", "5", "6"}, got)
	}, endpoint("a", batched(10, 0)))
}

func TestAStatusThatIsTheEndIsTheEndOfTheWholeBatch(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", script(dies, ok))
		w.set(func() { w.delay = func(string) time.Duration { return 300 * time.Millisecond } })
		w.start()
		pass(time.Second)
		w.commit("1:k", "2:l", "3:k", "4:k")
		pass(10 * time.Millisecond)
		w.commit("5:k", "6:m")
		pass(10 * time.Millisecond)
		require.Equal(t, []string{"1", "2", "3", "4", "6"}, w.attempted("a"), "5 waits until the deaths are written")
		pass(2 * time.Second)
		require.Equal(t, []string{"1:dead", "2:dead", "3:dead", "4:dead"}, w.stored("a"))
		require.Equal(t, []string{"6", "5"}, w.arrived("a"))
	}, endpoint("a", batched(10, 5*time.Millisecond)))
}

// What cannot be sent dies alone; what is behind it in its key goes with the rest.
func TestAnUnfitEventDiesAloneAndTheRestGoes(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.receiver("a").unfit = func(e *outbox.Event) bool { return e.ID == "2" || e.ID == "7" }
		w.answers("a", script(ok, fails, ok))
		w.start()
		w.commit("1:k", "2:k", "3:k", "4:l")
		pass(100 * time.Millisecond)
		require.Equal(t, []string{"1", "3", "4"}, w.arrived("a"))
		require.Equal(t, []string{"2:dead"}, w.stored("a"))
		require.Equal(t, outbox.ReasonNotJSON, w.store.Rows()[0].Reason)
		require.Zero(t, w.store.Rows()[0].Attempts)
		w.commit("5:l", "6:k", "7:k", "8:k")
		pass(100 * time.Millisecond)
		require.Equal(t, []string{"2:dead", "5:parked", "6:parked", "7:dead", "8:parked"}, w.stored("a"))
		pass(time.Second)
		require.Equal(t, []string{"1", "3", "4", "5", "6", "8"}, w.arrived("a"))
		w.set(func() { w.receivers["a"].unfit = func(*outbox.Event) bool { return true } })
		w.commit("9:k")
		pass(time.Second)
		require.Contains(t, w.stored("a"), "9:dead")
	}, endpoint("a", batched(10, 5*time.Millisecond)))
}

// The death of an unfit one is still being written when the retry of those before and behind it
// is due: what follows in the key must not be read before.
func TestARetryOfABatchWaitsForTheDeathsInIt(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Paused })...)
		w.start()
		w.commit("1:k", "2:k", "3:k", "4:k")
		pass(time.Second)
		w.receiver("a").unfit = func(e *outbox.Event) bool { return e.ID == "1" }
		w.answers("a", script(hangs(50*time.Millisecond, fails), ok))
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Enabled })...)
		pass(20 * time.Millisecond)
		w.set(func() {
			w.delay = func(call string) time.Duration {
				if call == "write" {
					return 3 * time.Second
				}
				return 0
			}
		})
		pass(20 * time.Second)
		require.Equal(t, []string{"2", "3", "4"}, w.arrived("a"))
	}, endpoint("a", batched(10, 0)))
}

func TestATooOldEventDiesAloneAndUnsent(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Paused })...)
		w.start()
		w.commit("1:k")
		pass(5 * time.Second)
		w.commit("2:k", "3:l")
		w.set(func() {
			for id, d := range w.deliveries {
				d.mayDie = id.event == "1"
				d.unfit = d.mayDie
			}
		})
		pass(100 * time.Millisecond)
		w.set(func() {
			for id, d := range w.deliveries {
				d.mayDie = id.event == "1"
				d.unfit = d.mayDie
			}
		})
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Enabled })...)
		pass(time.Second)
		require.Equal(t, []string{"2", "3"}, w.arrived("a"))
		require.Equal(t, []string{"2", "3"}, w.attempted("a"))
		require.Equal(t, outbox.ReasonMaxAge, w.store.Rows()[0].Reason)
		w.commit("4")
		pass(100 * time.Millisecond)
		w.set(func() {
			require.Equal(t, []int{2, 1}, w.receivers["a"].batches)
		})
	}, endpoint("a", batched(10, 0), func(e *outbox.Endpoint) { e.Retry.MaxAge = 4 * time.Second }))
}

// What does not fit after all goes next, in its place, from memory and without an attempt spent.
func TestWhatDoesNotFitGoesNext(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.receiver("a").leaves = 3
		w.answers("a", hangs(20*time.Millisecond, ok))
		w.start()
		for i := range 20 {
			w.commit(numbered(10, fmt.Sprintf("%02d-%%d:k%%[1]d", i))...)
			pass(10 * time.Millisecond)
		}
		pass(500 * time.Millisecond)
		require.Len(t, w.arrived("a"), 200)
		require.Zero(t, w.store.Writes())
		require.Greater(t, len(w.batches("a")), 20)
	}, endpoint("a", concurrency(2), batched(8, 0)))
}

func TestABatchThatASlowReceiverHasIsInTheStoreMeanwhile(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", script(hangs(3*time.Second, ok), ok))
		w.start()
		w.commit("1:k", "2:k", "3:l")
		pass(500 * time.Millisecond)
		w.commit("4:k", "5:k", "6:m")
		pass(1700 * time.Millisecond)
		require.Equal(t, w.end, w.life.relay.Low().LSN)
		require.Equal(t, []string{"1:sending", "2:sending", "3:sending", "4:parked", "5:parked"}, w.stored("a"))
		pass(3 * time.Second)
		require.Equal(t, []string{"6", "1", "2", "3", "4", "5"}, w.arrived("a"))
	}, endpoint("a", concurrency(4), batched(10, 5*time.Millisecond)))
}

func TestABatchIsOneResultForTheCircuit(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.receiver("a").circuit = true
		w.answers("a", fails)
		w.start()
		w.commit(numbered(40, "%02d:k%[1]d")...)
		pass(100 * time.Millisecond)
		w.set(func() { require.True(t, w.receivers["a"].until.IsZero(), "one failure is not three") })
		pass(1500 * time.Millisecond)
		w.set(func() { require.False(t, w.receivers["a"].until.IsZero()) })
		w.answers("a", ok)
		pass(5 * time.Second)
		require.Len(t, w.arrived("a"), 40)
	}, endpoint("a", batched(100, 5*time.Millisecond)))
}

func TestABacklogGoesInFullBatches(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.configure(change(w.endpoints, "", func(e *outbox.Endpoint) { e.Status = outbox.Paused })...)
		w.start()
		w.commit(numbered(2000, "%d:k")...)
		pass(time.Second)
		w.answers("one", hangs(10*time.Millisecond, ok))
		w.answers("loose", hangs(10*time.Millisecond, ok))
		w.configure(change(w.endpoints, "", func(e *outbox.Endpoint) { e.Status = outbox.Enabled })...)
		pass(10 * time.Second)
		for _, id := range []string{"one", "loose"} {
			require.Len(t, w.arrived(id), 2000)
			require.LessOrEqual(t, len(w.batches(id)), 2000/200+4, "%v", w.batches(id))
		}
	}, endpoint("one", batched(200, 50*time.Millisecond)), endpoint("loose", ordering(outbox.OrderNone), batched(200, 50*time.Millisecond)))
}
