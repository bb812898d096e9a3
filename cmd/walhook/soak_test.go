package main

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc/pgtest"
	"github.com/walhook/walhook/outbox"
)

// This file has the long runs of one fault each, in the world of the torture run: the same
// producers, receivers and judge, and a hand that does one thing as often as it is told. Each is
// behind a target of the Makefile, and skipped without its variable.

// asked is how often, or how much; a run that nobody asks for is skipped.
func asked(t *testing.T, variable string) int {
	t.Helper()
	s := os.Getenv(variable)
	if s == "" {
		t.Skip("a long run: see make help")
	}
	n, err := strconv.Atoi(s)
	require.NoError(t, err)
	return n
}

// soak makes a world whose receivers each keep one mood, and no script.
func soak(t *testing.T, p plan, moods ...mood) *world {
	t.Helper()
	p.script = &script{seed: 1, moods: map[string][]spell{}, senderTimeout: time.Minute, buffer: 10_000}
	for i, e := range p.endpoints {
		p.script.moods[e.id] = []spell{{moods[i], 1000 * time.Hour}}
	}
	p.every = 16 * time.Millisecond
	if raceEnabled {
		p.every = 60 * time.Millisecond
	}
	p.large = 2000
	return newWorld(t, p)
}

// threeEndpoints are one of each ordering that a crowd of keys makes busy, and one for what is down.
func threeEndpoints() []witness {
	all := func(string) bool { return true }
	return []witness{
		{id: "keyed", wants: all, ordering: "key", attempts: 101, concurrency: 32},
		{id: "loose", wants: all, ordering: "none", attempts: 101, concurrency: 32},
		{id: "down", wants: all, ordering: "key", attempts: 101, concurrency: 16, step: "10s"},
	}
}

// next raises a walhook in the seat and waits until somebody streams.
func (w *world) next(seat int) {
	w.t.Helper()
	w.toWalhook(deed{act: raise, seat: seat})
	<-w.streaming(w.t.Context())
}

// gone waits for a process that was asked to end.
func (w *world) gone(v *victim) {
	w.t.Helper()
	select {
	case <-v.ended:
	case <-time.After(patience):
		w.t.Fatalf("stalled: %s has not ended", filepath.Base(v.log))
	}
}

// finish ends the load, waits for all that is owed, and judges.
func (w *world) finish(over func()) (*verdict, *figures) {
	over()
	w.settle()
	return w.judge()
}

// TestSoak is the torture run with one walhook process that lives from its beginning to its end, so
// that there is something that could grow: memory, goroutines, file descriptors, connections.
func TestSoak(t *testing.T) {
	minutes := asked(t, "WALHOOK_SOAK")
	w := newWorld(t, random(t, "soak", seeded(t), time.Duration(minutes)*time.Minute, 0, hand{spares: true}))
	w.play()
	w.settle()
	_, f := w.judge()
	f.publish(t, w.version(), w.began)
}

// TestSoakStop shows that a clean stop under load repeats nothing: attempts are in flight, and
// what one endpoint refuses is being parked.
func TestSoakStop(t *testing.T) {
	n := asked(t, "WALHOOK_SOAK_STOP")
	w := soak(t, plan{name: fmt.Sprintf("SIGTERM under load, %d times", n), clients: 4, endpoints: threeEndpoints()}, brisk, brisk, refusing)
	w.open()
	over := w.load()
	defer over()
	for i := range n {
		if i == n/2 {
			w.vitals.turn()
		}
		w.flow(300)
		v := w.seats[0]
		from := time.Now()
		w.toWalhook(deed{act: dismiss})
		w.gone(v)
		w.measure("from SIGTERM until the process has ended", time.Since(from))
		w.next(0)
	}
	v, f := w.finish(over)
	f.publish(t, w.version(), w.began)
	require.Zero(t, v.repeats, "repeats")
}

// TestSoakTransaction shows that of a large transaction that is cut short by kills not much more
// is sent again than what was sent in the second before each.
func TestSoakTransaction(t *testing.T) {
	const deaths = 5
	rows := asked(t, "WALHOOK_SOAK_TRANSACTION")
	all := func(string) bool { return true }
	w := soak(t, plan{
		name:      fmt.Sprintf("a transaction of %d rows, killed %d times", rows, deaths),
		endpoints: []witness{{id: "keyed", wants: all, ordering: "key", attempts: 101, concurrency: 64}},
	}, healthy)
	w.open()
	over := w.load()
	defer over()
	w.faulty.Store(false) // nothing is refused
	pgtest.Exec(t, w.url(), fmt.Sprintf(`insert into outbox (aggregatetype, aggregateid, type, payload)
		select 'order', 'k' || i %% 997, '%s', format('{"n":%%s}', i) from generate_series(1, %d) i`, orderKind, rows))
	committed := time.Now()
	p := w.patients[0]
	for i := range deaths {
		if i == deaths/2 {
			w.vitals.turn()
		}
		w.came(p, rows*(2*i+1)/(2*deaths))
		w.toWalhook(deed{act: murder})
		w.next(0)
	}
	w.came(p, rows)
	w.measure("from the COMMIT until the last row's delivery", time.Since(committed))
	v, f := w.finish(over)

	p.mu.Lock()
	seconds, first := map[int64]int{}, map[int64]bool{}
	for i := range p.sightings {
		if s := &p.sightings[i]; s.accepted() && !first[s.id] {
			first[s.id] = true
			seconds[int64(s.at.Sub(committed)/time.Second)]++
		}
	}
	p.mu.Unlock()
	var traffic []int
	for _, n := range seconds {
		traffic = append(traffic, n)
	}
	median, _, most := spread(traffic)
	f.spread("first deliveries in a second", traffic)
	f.add("repeats in seconds of traffic", float64(v.repeats)/float64(max(1, median)))
	f.publish(t, w.version(), w.began)
	require.LessOrEqual(t, v.repeats, deaths*2*most, "repeats")
}

// came waits until a receiver has that many different events.
func (w *world) came(p *patient, n int) {
	w.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for last, moved := 0, time.Now(); ; <-tick.C {
		p.mu.Lock()
		got := len(p.done)
		p.mu.Unlock()
		if got >= n {
			return
		}
		if got > last {
			last, moved = got, time.Now()
		}
		if time.Since(moved) > patience {
			w.t.Fatalf("stalled: %s has %d of %d events, and none came for %s", p.id, got, n, patience)
		}
	}
}

// TestSoakSlot shows that a slot that is dropped under load costs repeats and no event.
func TestSoakSlot(t *testing.T) {
	n := asked(t, "WALHOOK_SOAK_SLOT")
	w := soak(t, plan{
		name: fmt.Sprintf("slot dropped under load, %d times", n), clients: 4, endpoints: threeEndpoints(),
		cdc: "{recover: auto, max_recovery: 100000}",
	}, brisk, healthy, refusing)
	w.open()
	over := w.load()
	defer over()
	w.proven()
	for i := range n {
		if i == n/2 {
			w.vitals.turn()
		}
		w.flow(300)
		from := time.Now()
		w.dropSlot()
		dropped := time.Now()
		if w.await(t.Context(), patience, "select count(*) = 1 from pg_replication_slots where slot_name = 'walhook' and active") {
			w.measure("from the slot's drop until there is another that streams", time.Since(dropped))
		} else {
			t.Fatalf("stalled: no slot %s after it was dropped: %s", patience, tail(w.seats[0].log, 2000))
		}
		w.note(harm{kind: "dropped slot", from: from, to: time.Now(), database: true, repeats: true})
		w.measure("to terminate the walsender and drop the slot", dropped.Sub(from))
	}
	_, f := w.finish(over)
	f.publish(t, w.version(), w.began)
}

// proven waits for the first checkpoint that tells what a recovery may leave out. Before it, a
// slot that is lost within a second of its making is for a person to decide about.
func (w *world) proven() {
	w.t.Helper()
	require.True(w.t, w.await(w.t.Context(), patience, "select count(*) = 1 from walhook.checkpoints where snap_xmin > 0"))
}

// dropSlot drops the slot under its reader, who comes back at once.
func (w *world) dropSlot() {
	w.t.Helper()
	conn, err := pgx.Connect(w.t.Context(), w.url())
	require.NoError(w.t, err)
	defer conn.Close(context.Background())
	for end := time.Now().Add(patience); time.Now().Before(end); {
		_, err = conn.Exec(w.t.Context(), "select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = 'walhook' and active")
		require.NoError(w.t, err)
		if _, err = conn.Exec(w.t.Context(), "select pg_drop_replication_slot('walhook')"); err == nil {
			return
		}
	}
	w.t.Fatalf("the slot cannot be dropped: %v", err)
}

// TestSoakFailover shows that a failover by the book of Postgres 17 loses nothing, parked events included.
func TestSoakFailover(t *testing.T) {
	n := asked(t, "WALHOOK_SOAK_FAILOVER")
	if major := postgresMajor(t); major < 17 {
		t.Skipf("Postgres %d has no failover slots", major)
	}
	failOvers(t, n, plan{name: fmt.Sprintf("failover to a synchronized standby, %d times", n), standby: synced})
}

// TestSoakFailoverWithoutSlot shows that a standby that knows nothing of the slot loses nothing that it has itself.
func TestSoakFailoverWithoutSlot(t *testing.T) {
	n := asked(t, "WALHOOK_SOAK_FAILOVER")
	failOvers(t, n, plan{
		name: fmt.Sprintf("failover to a standby without the slot, %d times", n), standby: unready,
		cdc: "{recover: auto, max_recovery: 100000}",
	})
}

func failOvers(t *testing.T, n int, p plan) {
	p.clients, p.endpoints = 4, threeEndpoints()
	w := soak(t, p, brisk, healthy, refusing)
	w.open()
	over := w.load()
	defer over()
	if w.cdc != "" {
		w.proven()
	}
	for i := range n {
		if i == n/2 {
			w.vitals.turn()
		}
		w.flow(300)
		ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
		moved, err := w.failOver(ctx)
		cancel()
		require.NoError(t, err)
		if !moved {
			t.Fatalf("stalled: the standby has not become ready")
		}
		w.count(failover)
	}
	w.flow(300)
	_, f := w.finish(over)
	f.publish(t, w.version(), w.began)
}

// promisedStop is how long a fast stop of Postgres takes at most, whatever walhook has on its hands.
const promisedStop = 5 * time.Second

// TestSoakShutdown shows that Postgres stops while walhook holds all it can hold and every
// receiver hangs.
func TestSoakShutdown(t *testing.T) {
	n := asked(t, "WALHOOK_SOAK_SHUTDOWN")
	w := soak(t, plan{name: fmt.Sprintf("fast stop of Postgres under a full backlog, %d times", n), clients: 4, endpoints: threeEndpoints()}, hanging, hanging, hanging)
	r := rand.New(rand.NewPCG(w.script.seed, 2))
	w.open()
	over := w.load()
	defer over()
	for i := range n {
		if i == n/2 {
			w.vitals.turn()
		}
		<-w.streaming(t.Context())
		// More than the buffer holds, in one go; then a stop while it is being sent, or parked.
		pgtest.Exec(t, w.url(), fmt.Sprintf(`insert into outbox (aggregatetype, aggregateid, type, payload)
			select 'order', 'burst' || i %% 50, '%s', format('{"n":%%s}', %d + i) from generate_series(1, 12000) i`, orderKind, 12_000*i))
		wait(t.Context(), between(r, 0, 2*time.Second))
		w.toPostgres(deed{act: halt})
		w.toPostgres(deed{act: revive})
	}
	stops := w.took["fast stop of Postgres"]
	_, f := w.finish(over)
	f.publish(t, w.version(), w.began)
	require.Len(t, stops, n)
	require.LessOrEqual(t, slices.Max(stops), promisedStop)
}

// TestSoakCheckpoint shows that walhook, with all it can hold and receivers that hang, does not
// delay Postgres' checkpoints, which a reader of a slot that nears max_slot_wal_keep_size can.
func TestSoakCheckpoint(t *testing.T) {
	n := asked(t, "WALHOOK_SOAK_SHUTDOWN")
	w := soak(t, plan{
		name: fmt.Sprintf("%d checkpoints under a full backlog", n), clients: 4, endpoints: threeEndpoints(),
		settings: map[string]string{"max_slot_wal_keep_size": "16MB", "max_wal_size": "64MB"},
	}, hanging, hanging, hanging)
	pgtest.Exec(t, w.url(), "create table other (n int, filler text)")
	statuses := map[string]int{}
	checkpoints := func(name string) {
		conn, err := pgx.Connect(t.Context(), w.url())
		require.NoError(t, err)
		defer conn.Close(context.Background())
		for range n {
			_, err = conn.Exec(t.Context(), "insert into other select i, repeat('x', 1000) from generate_series(1, 1000) i")
			require.NoError(t, err)
			_, err = conn.Exec(t.Context(), fmt.Sprintf(`insert into outbox (aggregatetype, aggregateid, type, payload)
				select 'order', 'burst' || i %% 50, '%s', format('{"pad":%%s}', to_json(repeat('x', 1000))) from generate_series(1, 1000) i`, orderKind))
			require.NoError(t, err)
			from := time.Now()
			_, err = conn.Exec(t.Context(), "checkpoint")
			require.NoError(t, err)
			w.measure(name, time.Since(from))
			var status string
			w.ask("select coalesce(max(wal_status), 'none') from pg_replication_slots where slot_name = 'walhook'", &status)
			statuses[status]++
		}
	}
	w.open()
	over := w.load()
	defer over()
	checkpoints("checkpoint with walhook")
	v := w.seats[0]
	v.kill()
	w.dropSlot()
	checkpoints("checkpoint without")
	over()
	f := &figures{run: w.name}
	with, without := w.took["checkpoint with walhook"], w.took["checkpoint without"]
	f.spread("checkpoint with walhook", with)
	f.spread("checkpoint without", without)
	for _, s := range slices.Sorted(maps.Keys(statuses)) {
		f.add("wal_status of the slot after a checkpoint: "+s, statuses[s])
	}
	f.publish(t, w.version(), w.began)
	require.LessOrEqual(t, slices.Max(with), 3*slices.Max(without)+2*time.Second)
}

// promisedTakeover is how soon another instance streams after a kill -9 of the holder. The run wants
// no more than twice that, for a machine that has other things to do.
const promisedTakeover = 2 * time.Second

// TestSoakTakeover measures how soon another instance has the slot when the holder dies, stops, or freezes.
func TestSoakTakeover(t *testing.T) {
	n := asked(t, "WALHOOK_SOAK_TAKEOVER")
	w := soak(t, plan{name: fmt.Sprintf("takeovers, %d of a kind", n), clients: 4, endpoints: threeEndpoints()}, brisk, healthy, healthy)
	w.open()
	over := w.load()
	defer over()
	holder := 0
	for _, how := range []act{murder, dismiss, freeze} {
		if how == freeze {
			w.vitals.turn()
		}
		// A frozen holder keeps the slot for long.
		for range map[bool]int{true: max(1, n/10), false: n}[how == freeze] {
			other := 1 - holder
			w.toWalhook(deed{act: raise, seat: other})
			w.says(w.seats[other], "standing by")
			w.flow(200)
			old := w.seats[holder]
			from := time.Now()
			w.toWalhook(deed{act: how, seat: holder})
			w.says(w.seats[other], `"msg":"streaming"`)
			w.measure("from "+string(how)+" of the holder until the other streams", time.Since(from))
			w.flow(1)
			w.measure("from "+string(how)+" of the holder until the next delivery", time.Since(from))
			if how == freeze {
				w.thaw(old)
				w.says(old, outbox.ErrFenced.Error())
				w.toWalhook(deed{act: dismiss, seat: holder})
			}
			w.gone(old)
			holder = other
		}
	}
	if holder == 1 {
		w.seats[0], w.seats[1] = w.seats[1], nil
	}
	_, f := w.finish(over)
	f.publish(t, w.version(), w.began)
	require.LessOrEqual(t, slices.Max(w.took["from "+string(murder)+" of the holder until the other streams"]), 2*promisedTakeover)
}

// says waits for a text in a process' log.
func (w *world) says(v *victim, text string) {
	w.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(3 * patience); len(v.said(text)) == 0; <-tick.C {
		if time.Now().After(end) || !v.alive() {
			w.t.Fatalf("%s does not say %s: %s", filepath.Base(v.log), text, tail(v.log, 2000))
		}
	}
}
