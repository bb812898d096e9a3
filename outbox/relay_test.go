package outbox_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/outbox/outboxtest"
)

// ---- stopping and starting

func TestACleanStopRepeatsNothing(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", hangs(700*time.Millisecond, ok))
		w.answers("b", hangs(time.Minute, ok)) // cut short
		w.start()
		for i := range 5 {
			w.commit(numbered(20, fmt.Sprintf("%d-%%d:k%%[1]d", i))...)
			pass(time.Duration(i) * 400 * time.Millisecond)
			begin := time.Now()
			w.haltClean()
			require.LessOrEqual(t, time.Since(begin), 10*time.Second)
			require.Zero(t, w.receiver("a").inflight)
			require.Zero(t, w.receiver("b").inflight)
			w.start()
			pass(50 * time.Millisecond)
		}
		w.answers("b", ok)
	}, endpoint("a"), endpoint("b"))
}

func TestAStopWaitsForWhatIsInFlightAndThenCutsIt(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", only("1", hangs(5*time.Second, ok), hangs(time.Hour, ok)))
		w.start()
		w.commit("1:", "2:", "3:k")
		pass(10 * time.Millisecond)
		begin := time.Now()
		w.haltClean()
		require.Equal(t, 10*time.Second, time.Since(begin))
		require.Equal(t, []string{"1"}, w.arrived("a"))
		require.Equal(t, []string{"2:parked", "3:parked"}, w.stored("a"))
		require.Equal(t, w.end, w.saved.LSN)
		require.Equal(t, w.end, w.confirmed)
		require.Zero(t, w.store.Rows()[0].Attempts, "an attempt that we cut is none")
		w.answers("a", ok)
		w.start()
		pass(time.Second)
		require.ElementsMatch(t, []string{"1", "2", "3"}, w.arrived("a"))
	}, endpoint("a"))
}

func TestAStopWhileTheStoreIsDownEndsAllTheSame(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", fails)
		w.start()
		w.commit("1:k", "2:k", "3:l")
		pass(time.Millisecond)
		w.set(func() { w.writesFail, w.savesFail, w.readsFail = true, true, true })
		w.commit("4:k", "5:m")
		w.configure(w.endpoints[0]) // removing b cannot be written either
		pass(time.Second)
		begin := time.Now()
		w.halt()
		require.Less(t, time.Since(begin), 20*time.Second)
		w.set(func() {
			w.writesFail, w.savesFail, w.readsFail = false, false, false
			w.crashes++
			w.doubtLocked()
		})
		w.answers("a", ok)
	}, endpoint("a"), endpoint("b"))
}

// After a crash what was settled in the last second comes again, and what was in flight; the
// world notes whatever else does.
func TestACrashRepeatsLittleAlsoInsideATransaction(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", hangs(20*time.Millisecond, ok))
		w.maxEvents = 50
		w.start()
		w.commit(numbered(3000, "%d:k%[1]d")...) // takes 15 s
		pass(8 * time.Second)
		before := len(w.arrived("a"))
		w.set(func() { require.Zero(t, w.confirmed-firstLSN, "the transaction is not over") })
		require.Greater(t, before, 1000)
		w.crash()
		repeated := w.attempts("a")
		w.start()
		pass(3 * time.Second)
		w.set(func() {
			n := 0
			for _, d := range w.deliveries {
				if d.dup {
					n++
				}
			}
			require.Less(t, n, 600, "two seconds' worth and what was parked")
		})
		require.Greater(t, w.attempts("a"), repeated)
		pass(10 * time.Second)
	}, endpoint("a"))
}

func (w *world) attempts(endpoint string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.receivers[endpoint].attempts
}

func TestAHolderThatWasFencedEnds(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.start()
		w.commit("1:k")
		pass(2 * time.Second)
		w.store.Fence()
		w.commit("2:k")
		l := w.life
		<-l.done
		require.ErrorIs(t, l.err, outbox.ErrFenced)
		w.life = nil
		w.set(func() { w.crashes++ })
		w.start() // claims it again
		pass(time.Second)
		require.Equal(t, []string{"1", "2"}, w.arrived("a"))
	}, endpoint("a"))
}

func TestWhatIsParkedIsFoundAtTheStart(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", fails)
		w.receiver("a").circuit = true
		w.start()
		w.commit(numbered(20, "%d:k")...)
		w.commit(numbered(20, "n%d:")...)
		pass(2 * time.Second)
		w.haltClean()
		w.answers("a", ok)
		w.start()
		w.commit("last:k")
		pass(10 * time.Second)
		require.Len(t, w.arrived("a"), 41)
	}, endpoint("a"))
}

func TestANewEventIsNotSentAfterTheStopBegan(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", hangs(3*time.Second, ok))
		w.start()
		w.commit("1:")
		pass(time.Millisecond)
		relay := w.life.relay
		w.life.stop()
		synctest.Wait()
		// The stream had one more row in its hands, for an endpoint that has no lane yet.
		w.set(func() { w.deliveries[deliveryID{"b", "late"}] = &delivery{deliveryID: deliveryID{"b", "late"}} })
		tx := &transaction{commit: w.end + 100, end: w.end + 148, at: time.Now()}
		require.NoError(t, relay.Row(&cdc.Row{
			Position: cdc.Position{Commit: tx.commit, Ordinal: 1}, CommitTime: tx.at, Relation: outboxRelation,
			Values: [][]byte{[]byte("late"), []byte("other"), nil, []byte("{}")},
		}))
		w.halt()
		require.Empty(t, w.attempted("b"))
		require.Equal(t, []string{"late:parked"}, w.stored("b"))
	}, endpoint("a", wants("order.created")), endpoint("b", wants("other")))
}

func wants(events ...string) func(*outbox.Endpoint) {
	return func(e *outbox.Endpoint) { e.Events = events }
}

// ---- rows

func TestARowThatCannotBeMappedIsOneDeadDelivery(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.set(func() { w.writesFail = true })
		w.start()
		w.commitRows([]*outboxRow{
			{id: "1", typ: "order.created", key: "k", data: "{}"},
			{broken: true, typ: "order.created", key: "k", data: `{"n":1}`},
			{id: "2", typ: "order.created", key: "k", data: "{}"},
		})
		pass(3 * time.Second)
		require.Equal(t, []string{"1", "2"}, w.arrived("a"), "it stops nothing")
		require.Less(t, w.life.relay.Low().LSN, w.end, "but is not forgotten")
		w.set(func() { w.writesFail = false })
		pass(6 * time.Second)
		rows := w.store.Rows()
		require.Len(t, rows, 1)
		require.Empty(t, rows[0].EndpointID)
		require.Equal(t, outbox.StateDead, rows[0].State)
		require.Equal(t, outbox.ReasonUnmappable, rows[0].Reason)
		require.Contains(t, string(rows[0].Event.Data), `{"n":1}`)
	}, endpoint("a"), endpoint("b"))
}

func TestATableThatCannotBeReadEndsTheSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(endpoint("a"))
		r := w.start()
		defer w.halt()
		gone := &cdc.Relation{OID: 1, Schema: "public", Name: "outbox", Columns: []cdc.Column{{Name: "id", TypeOID: 25}}}
		err := r.Row(&cdc.Row{Position: cdc.Position{Commit: 2000, Ordinal: 1}, Relation: gone, Values: [][]byte{[]byte("1")}})
		var fault *cdc.Fault
		require.ErrorAs(t, err, &fault)
		require.Equal(t, cdc.Waiting, fault.State)
		require.NoError(t, r.Row(&cdc.Row{Position: cdc.Position{Commit: 2000, Ordinal: 2}, Relation: &cdc.Relation{OID: 2, Schema: "public", Name: "other"}}))
		pass(2 * time.Second)
		require.Empty(t, w.store.Rows())
	})
}

func TestAnEventThatNobodyWantsIsDone(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.start()
		w.commitRows([]*outboxRow{{id: "1", typ: "order.deleted", data: "{}"}})
		pass(2 * time.Second)
		w.set(func() { require.Equal(t, w.end, w.saved.LSN) })
		require.Empty(t, w.attempted("a"))
	}, endpoint("a", wants("order.created")))
}

func TestEachEndpointHasItsOwnDelivery(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("b", only("1", script(fails, ok), ok))
		w.start()
		w.commit("1:k", "2:k")
		pass(time.Millisecond)
		require.Equal(t, []string{"1", "2"}, w.arrived("a"))
		pass(60 * time.Millisecond) // small writes wait for each other
		require.Equal(t, []string{"1:parked", "2:parked"}, w.stored("b"))
	}, endpoint("a"), endpoint("b"))
}

// ---- the checkpoint

func TestTheSlotIsToldWhatACheckpointSays(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.start()
		pass(2 * time.Second)
		w.set(func() { w.savesFail = true })
		w.commit("1:k")
		pass(5 * time.Second)
		w.set(func() {
			require.Equal(t, []string{"1"}, w.got["a"])
			require.Less(t, w.confirmed, w.end)
			w.savesFail = false
		})
		pass(1100 * time.Millisecond)
		w.set(func() { require.Equal(t, w.end, w.confirmed) })
	}, endpoint("a"))
}

func TestAnIdleOutboxWritesNothing(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.start()
		w.commit("1:k")
		pass(3 * time.Second)
		_, saves := w.store.Checkpoint()
		require.LessOrEqual(t, saves, 2)
		pass(time.Hour)
		_, later := w.store.Checkpoint()
		require.Equal(t, saves, later)
		require.Zero(t, w.store.Writes())
	}, endpoint("a"))
}

func TestOneCheckpointASecondAtMost(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.start()
		for i := range 1000 {
			w.commit(fmt.Sprintf("%d:", i))
			pass(10 * time.Millisecond)
		}
		_, saves := w.store.Checkpoint()
		require.LessOrEqual(t, saves, 11)
		require.Zero(t, w.store.Writes())
	}, endpoint("a"))
}

// A checkpoint that the store takes long to write must not land behind the last one.
func TestTheLastCheckpointIsTheLast(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		n := 0
		w.delay = func(call string) time.Duration {
			if call != "save" {
				return 0
			}
			if n++; n == 2 {
				return 3 * time.Second
			}
			return 0
		}
		w.start()
		w.commit("1:k")
		pass(1500 * time.Millisecond)
		w.commit("2:k")
		pass(600 * time.Millisecond)
		w.commit("3:k")
		pass(100 * time.Millisecond)
		w.haltClean()
		w.set(func() { require.Equal(t, w.end, w.saved.LSN) })
		w.start()
		pass(time.Second)
		require.Equal(t, []string{"1", "2", "3"}, w.attempted("a"))
	}, endpoint("a"))
}

// ---- a full buffer

func TestAFullBufferIsParkedWhereTheEndpointsAreTheLimit(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.maxEvents = 100
		w.answers("a", hangs(500*time.Millisecond, ok))
		w.start()
		for i := range 50 {
			w.commit(numbered(20, fmt.Sprintf("%d-%%d:", i))...)
		}
		pass(10 * time.Second)
		w.set(func() { require.Equal(t, len(w.wal), w.life.next, "all of it was read") })
		events, _ := w.life.relay.Buffer()
		require.LessOrEqual(t, events, int64(100+25+512))
		w.answers("a", ok)
	}, endpoint("a"))
}

// In a large transaction the stream's position stands still, while our own checkpoints make the WAL grow by a little.
func TestALargeTransactionIsNotParkedForWhatWeWriteOurselves(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.maxEvents = 20
		w.answers("a", hangs(20*time.Millisecond, ok))
		w.set(func() { w.creep, w.creeps = 500, 200<<20 })
		w.start()
		w.commit(numbered(500, "%d:")...)
		pass(9 * time.Second)
		w.set(func() {
			require.Zero(t, w.calls["write"])
			w.creep = 20 << 20 // somebody else writes much
		})
		w.commit(numbered(500, "b%d:")...)
		pass(9 * time.Second)
		w.set(func() { require.NotZero(t, w.calls["write"]) })
		w.answers("a", ok)
	}, endpoint("a", ordering(outbox.OrderNone), concurrency(1)))
}

func TestAFullBufferThatCannotBeParkedHoldsTheStream(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.maxEvents = 20
		w.answers("a", hangs(3*time.Second, fails))
		w.start()
		pass(time.Millisecond)
		w.set(func() { w.writesFail = true })
		for i := range 10 {
			w.commit(numbered(10, fmt.Sprintf("%d-%%d:", i))...)
		}
		pass(time.Minute)
		events, _ := w.life.relay.Buffer()
		require.EqualValues(t, 20, events)
		require.NotNil(t, w.life.relay.Room())
		require.Error(t, w.life.relay.Fault())
		w.answers("a", ok)
		w.set(func() { w.writesFail = false })
	}, endpoint("a"))
}

// Everything is delivered, and the slot keeps its WAL all the same.
func TestAWatermarkThatCannotBeWrittenDownIsStuck(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.answers("a", ok)
		w.start()
		w.commit(numbered(10, "1-%d:")...)
		pass(time.Minute)
		require.NoError(t, w.life.relay.Fault())
		w.set(func() { w.savesFail = true })
		w.commit(numbered(10, "2-%d:")...)
		pass(time.Minute)
		require.Error(t, w.life.relay.Fault())
		require.InDelta(t, time.Minute, w.life.relay.Stuck(), float64(3*time.Second))
		w.set(func() { w.savesFail = false })
		pass(3 * time.Second)
		require.NoError(t, w.life.relay.Fault())
		require.Zero(t, w.life.relay.Stuck())
	}, endpoint("a"))
}

// ---- endpoints

// A reload and a 410 at the same time: neither undoes the other.
func TestAReloadIsNotUndoneByAnEndpointThatIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(endpoint("a"))
		w.answers("a", func(a outbox.Attempt) answer {
			r := fails(a)
			r.Gone = true
			return r
		})
		r := w.start()
		defer w.halt()
		w.commit("1:")
		pass(time.Millisecond)
		require.NoError(t, r.SetEndpoints([]*outbox.Endpoint{endpoint("a", func(e *outbox.Endpoint) { e.Status = outbox.Disabled }), endpoint("b")}))
		pass(time.Second)
		w.set(func() {
			w.endpoints = []*outbox.Endpoint{endpoint("a", func(e *outbox.Endpoint) { e.Status = outbox.Disabled }), endpoint("b")}
		})
		w.commit("2:")
		pass(time.Second)
		require.Equal(t, []string{"2"}, w.arrived("b"))
		require.Equal(t, []string{"1"}, w.attempted("a"))
	})
}

func TestARegistryThatIsWrongIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(endpoint("a"))
		r := w.start()
		defer w.halt()
		require.Error(t, r.SetEndpoints([]*outbox.Endpoint{endpoint("x"), endpoint("x")}))
		w.commit("1:k")
		pass(time.Second)
		require.Equal(t, []string{"1"}, w.arrived("a"))
	})
	_, err := outbox.New(outbox.Config{
		Store: outboxtest.New(), Endpoints: []*outbox.Endpoint{endpoint("x"), endpoint("x")}, Logger: logger, Registerer: prometheus.NewRegistry(),
	})
	require.Error(t, err)
}

func TestARelayThatNeverGotTheSlotStopsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(endpoint("a"))
		w.claimsFail = true
		w.start()
		pass(time.Minute)
		begin := time.Now()
		w.halt()
		require.Less(t, time.Since(begin), time.Second)
		require.NoError(t, w.err())
		_, saves := w.store.Checkpoint()
		require.Zero(t, saves)
	})
}

func TestRunEndsWithTheStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(endpoint("a"))
		w.answers("a", hangs(time.Hour, ok))
		m, err := outbox.NewMapper([]outbox.Source{{Table: "public.outbox"}})
		require.NoError(t, err)
		l := &life{w: w, dead: make(chan struct{})}
		r, err := outbox.New(outbox.Config{
			Mapper: m, Store: &flaky{l}, Claims: &flaky{l}, Sender: &sender{l}, Endpoints: w.endpoints,
			MaxEvents: 10, MaxBytes: 1 << 20, SpillAfter: time.Second, Logger: logger, Registerer: prometheus.NewRegistry(),
		})
		require.NoError(t, err)
		l.relay = r
		err = r.Run(t.Context(), &broken{&stream{l}}, time.Second)
		require.ErrorIs(t, err, cdc.ErrNewHistory)
		require.Zero(t, w.receiver("a").inflight)
	})
}

// broken is a stream that ends while something is in flight.
type broken struct{ *stream }

func (s *broken) Run(ctx context.Context) error {
	if _, err := s.claim(ctx); err != nil {
		return err
	}
	w := s.w
	w.commit("1:k")
	s.hand(w.wal[0], cdc.Position{Commit: w.wal[0].commit, Ordinal: 1})
	pass(2 * time.Second)
	return cdc.ErrNewHistory
}
