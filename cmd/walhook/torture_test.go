package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc/pgtest"
	"github.com/walhook/walhook/outbox"
)

// TestTorture runs real walhook processes on a real Postgres while a hand kills, freezes, cuts
// and stops whatever there is, by a script that a seed makes; then it proves that nothing was
// lost, invented, altered or overtaken, and that each repeat has its crash (torture_check_test.go).
// A short run is part of `make test`; `make torture SEED=… MINUTES=… KILLS=…` runs longer.
//
// It does not run beside the other tests of the package: their load would be the fault.
func TestTorture(t *testing.T) {
	seed, length, least := rand.Uint64()>>32, 18*time.Second, 10
	if s := os.Getenv("WALHOOK_TORTURE_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		require.NoError(t, err)
		seed = n
	}
	if s := os.Getenv("WALHOOK_TORTURE_MINUTES"); s != "" {
		n, err := strconv.ParseFloat(s, 64)
		require.NoError(t, err)
		length = time.Duration(n * float64(time.Minute))
	}
	if s := os.Getenv("WALHOOK_TORTURE_KILLS"); s != "" {
		n, err := strconv.Atoi(s)
		require.NoError(t, err)
		least = n
	}
	w := newWorld(t, newScript(seed, length, least, []string{"keyed", "loose", "strict", "some"}))
	t.Logf("seed %d: %d steps, %d kills, %s; again: make torture SEED=%d MINUTES=%.2f KILLS=%d", seed, len(w.script.steps), w.script.kills(),
		w.script.length().Round(time.Second), seed, length.Minutes(), least)
	w.play()
	w.settle()
	w.judge()
}

// takeover is how long before a holder learns of it the other may have taken the slot.
const takeover = 2 * time.Second

// world is a torture run.
type world struct {
	t        *testing.T
	script   *script
	began    time.Time
	dir      string // of logs; kept where the run fails
	server   *pgtest.Server
	lines    []*line // to Postgres: SQL, replication
	patients []*patient
	produce  []*producer
	faulty   atomic.Bool
	config   string

	seats   [2]*victim
	victims []*victim

	mu         sync.Mutex // guards what follows
	harms      []harm
	complaints []string
	down       time.Time    // since when Postgres is; zero while it is up
	holes      map[int]harm // lines that pass slowly or not at all
	frozen     map[*victim]harm
	done       map[act]int
}

func newWorld(t *testing.T, s *script) *world {
	t.Helper()
	w := &world{t: t, script: s, holes: map[int]harm{}, frozen: map[*victim]harm{}, done: map[act]int{}}
	var err error
	w.dir, err = os.MkdirTemp("", "walhook-torture-")
	require.NoError(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the logs are in %s", w.dir)
		} else {
			_ = os.RemoveAll(w.dir)
		}
	})
	w.server = pgtest.New(t, pgtest.Config{Settings: map[string]string{
		"wal_sender_timeout": strconv.Itoa(int(s.senderTimeout.Milliseconds())), "checkpoint_timeout": "30s",
	}})
	pgtest.Exec(t, w.server.URL(), `create table outbox (id bigserial primary key, aggregatetype text, aggregateid text, type text, payload text);
		create sequence strict`)
	for range 2 {
		l, err := newLine(net.JoinHostPort("127.0.0.1", strconv.Itoa(w.server.Port())))
		require.NoError(t, err)
		t.Cleanup(l.close)
		w.lines = append(w.lines, l)
	}
	all := func(string) bool { return true }
	only := func(k string) func(string) bool { return func(kind string) bool { return kind == k } }
	for _, e := range []witness{
		{id: "keyed", wants: all, ordering: "key", attempts: 91},
		{id: "loose", wants: all, ordering: "none", attempts: 91},
		{id: "strict", wants: only(strictKind), ordering: "all", attempts: 91},
		{id: "some", wants: only(invoiceKind), ordering: "key", deadOn: []int{422}, attempts: 91},
	} {
		p, err := newPatient(w, e)
		require.NoError(t, err)
		t.Cleanup(p.rx.Close)
		w.patients = append(w.patients, p)
	}
	clients, every, large := 4, 16*time.Millisecond, 5000
	if raceEnabled {
		every, large = 60*time.Millisecond, 2000
	}
	for i := range clients {
		w.produce = append(w.produce, &producer{url: w.server.URL(), name: i, rng: rand.New(rand.NewPCG(s.seed, uint64(100+i))), every: every, large: large})
	}
	w.config = filepath.Join(w.dir, "walhook.yaml")
	w.configure(s.seed)
	t.Cleanup(func() {
		for _, v := range w.victims {
			if v.alive() {
				v.kill()
			}
		}
	})
	return w
}

// configure writes a configuration in one step.
func (w *world) configure(seed uint64) {
	through := func(l *line) string {
		u, err := url.Parse(w.server.URL())
		require.NoError(w.t, err)
		u.Host = l.ln.Addr().String()
		return u.String()
	}
	text := fmt.Sprintf("database: {url: %q, replication_url: %q}\noutbox: [{table: outbox}]\nserver: {listen: \"127.0.0.1:0\"}\nbuffer: {events: %d}\nendpoints:\n",
		through(w.lines[0]), through(w.lines[1]), w.script.buffer)
	for _, p := range w.patients {
		text += "  - " + p.setting(seed) + "\n"
	}
	require.NoError(w.t, os.WriteFile(w.config+".new", []byte(text), 0o600))
	require.NoError(w.t, os.Rename(w.config+".new", w.config))
}

func (w *world) complain(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.complaints = append(w.complaints, fmt.Sprintf(format, args...))
}

// note remembers a harm that is over.
func (w *world) note(h harm) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.harms = append(w.harms, h)
}

// play performs the script.
func (w *world) play() {
	// What was committed before there was a slot is nobody's.
	w.toWalhook(w.script.steps[0])
	w.until("missing slot", "select count(*) = 1, count(*) from pg_replication_slots where slot_name = 'walhook' and active")
	w.began = time.Now()
	w.faulty.Store(true)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var busy sync.WaitGroup
	for _, p := range w.produce {
		busy.Go(func() { p.run(ctx) })
	}
	for _, p := range w.patients {
		busy.Go(func() { p.live(ctx, w.script.moods[p.id]) })
	}
	busy.Go(func() { w.watch(ctx) })
	postgres := make(chan deed, len(w.script.steps))
	served := make(chan struct{})
	go func() {
		defer close(served)
		for s := range postgres {
			w.toPostgres(s)
		}
	}()
	for _, s := range w.script.steps[1:] {
		wait(ctx, time.Until(w.began.Add(s.at)))
		switch s.act {
		case crash, halt, revive, behead:
			postgres <- s
		default:
			w.toWalhook(s)
		}
	}
	for _, l := range w.lines {
		l.pass()
	}
	for _, v := range w.seats {
		w.thaw(v)
	}
	w.passed(0, 1)
	postgres <- deed{act: revive}
	close(postgres)
	<-served
	w.faulty.Store(false)
	cancel()
	busy.Wait()
}

// watch notes the memory of processes, and when the machine itself stood still.
func (w *world) watch(ctx context.Context) {
	const beat, stall = 50 * time.Millisecond, 300 * time.Millisecond
	for last := time.Now(); wait(ctx, beat); last = time.Now() {
		if time.Since(last) > stall {
			w.note(harm{kind: "stall", from: last, to: time.Now(), answers: true})
		}
	}
}

func (w *world) count(a act) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.done[a]++
}

// alive is how many walhooks there are. Where there are two, whoever loses the slot for a moment
// may lose it to the other, and what it had in flight is sent by both. mu is held.
func (w *world) alive() (n int) {
	for _, v := range w.victims {
		if v.alive() {
			n++
		}
	}
	return n
}

// toWalhook performs a step upon walhook and what leads to it.
func (w *world) toWalhook(s deed) {
	now := time.Now()
	v := w.seats[s.seat]
	switch s.act {
	case raise:
		if v != nil && v.alive() && !v.asked.Load() {
			return
		}
		v, err := newVictim(filepath.Join(w.dir, fmt.Sprintf("walhook-%d.log", len(w.victims))), w.config)
		require.NoError(w.t, err)
		w.mu.Lock()
		w.victims = append(w.victims, v)
		w.mu.Unlock()
		w.seats[s.seat] = v
		return
	case reconfigure:
		w.configure(s.seed)
		for _, v := range w.seats {
			if v != nil && v.alive() {
				v.signal(syscall.SIGHUP)
			}
		}
	case cut:
		for _, i := range s.lines {
			w.lines[i].cut()
		}
		w.mu.Lock()
		w.harms = append(w.harms, harm{kind: string(cut), from: now, to: now, database: true, repeats: w.alive() > 1})
		w.mu.Unlock()
	case blackhole, lag:
		for _, i := range s.lines {
			if s.act == blackhole {
				w.lines[i].stop()
			} else {
				w.lines[i].lag.Store(int64(s.lag))
			}
		}
		w.mu.Lock()
		for _, i := range s.lines {
			if _, known := w.holes[i]; !known {
				w.holes[i] = harm{kind: string(s.act), from: now, database: true, repeats: w.alive() > 1}
			}
		}
		w.mu.Unlock()
	case pass:
		for _, i := range s.lines {
			w.lines[i].pass()
		}
		w.passed(s.lines...)
	default:
		if v == nil || !v.alive() || v.asked.Load() {
			return
		}
		w.toVictim(s.act, v, now)
	}
	w.count(s.act)
}

// passed notes what hindered lines until now.
func (w *world) passed(lines ...int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, i := range lines {
		if h, ok := w.holes[i]; ok {
			h.to = time.Now()
			h.repeats = h.repeats || w.alive() > 1
			w.harms = append(w.harms, h)
			delete(w.holes, i)
		}
	}
}

func (w *world) toVictim(a act, v *victim, now time.Time) {
	switch a {
	case murder:
		v.kill()
		w.note(harm{kind: string(murder), from: now, to: time.Now(), repeats: true})
	case dismiss:
		w.thaw(v)
		v.asked.Store(true)
		v.termAt = now
		v.look()
		v.signal(syscall.SIGTERM)
	case freeze:
		w.mu.Lock()
		w.frozen[v] = harm{kind: string(freeze), from: now, answers: true}
		w.mu.Unlock()
		v.signal(syscall.SIGSTOP)
	case thaw:
		w.thaw(v)
	}
}

func (w *world) thaw(v *victim) {
	if v == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	h, ok := w.frozen[v]
	if !ok {
		return
	}
	delete(w.frozen, v)
	h.to = time.Now()
	// Alone, and with a server that waited, it has lost nothing but time.
	h.repeats = w.alive() > 1 || h.to.Sub(h.from) > w.script.senderTimeout/2
	h.database = true
	w.harms = append(w.harms, h)
	v.signal(syscall.SIGCONT)
}

// toPostgres performs a step upon the server. The next one waits until it is done.
func (w *world) toPostgres(s deed) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	now := time.Now()
	w.mu.Lock()
	down := w.down
	two := w.alive() > 1
	w.mu.Unlock()
	var err error
	switch {
	case s.act == revive && !down.IsZero():
		if err = w.server.Start(ctx); err == nil {
			w.mu.Lock()
			w.down = time.Time{}
			w.harms = append(w.harms, harm{kind: "restart of Postgres", from: down, to: time.Now(), database: true, repeats: true})
			w.mu.Unlock()
		}
	case s.act == revive || !down.IsZero():
		return
	case s.act == crash:
		err = w.server.Kill()
	case s.act == halt:
		if err = w.server.Stop(ctx, pgtest.Fast); err == nil && time.Since(now) > 10*time.Second {
			w.complain("stalled: a fast stop of Postgres at %.3f took %s", now.Sub(w.began).Seconds(), time.Since(now))
		}
	case s.act == behead:
		var conn *pgx.Conn
		if conn, err = pgx.Connect(ctx, w.server.URL()); err == nil {
			_, err = conn.Exec(ctx, "select pg_terminate_backend(pid) from pg_stat_replication")
			_ = conn.Close(ctx)
			w.note(harm{kind: string(behead), from: now, to: time.Now(), database: true, repeats: two})
		}
	}
	if err != nil {
		w.complain("%s: %v", s, err)
	}
	w.mu.Lock()
	if s.act == crash || s.act == halt {
		w.down = now
	}
	w.mu.Unlock()
	w.count(s.act)
}

// settle waits, all faults over, until everything that was committed has arrived or died and
// nothing is left to do.
func (w *world) settle() {
	alone := w.seats[0]
	if alone == nil || !alone.alive() || alone.asked.Load() {
		w.toWalhook(deed{act: raise})
	}
	if v := w.seats[1]; v != nil && v.alive() && !v.asked.Load() {
		w.toVictim(dismiss, v, time.Now())
	}
	for _, v := range w.victims {
		if v.asked.Load() {
			select {
			case <-v.ended:
			case <-time.After(patience):
				w.complain("stalled: %s has not ended", filepath.Base(v.log))
			}
		}
	}
}

// conn is one of the judge's own.
func (w *world) ask(sql string, to ...any) {
	w.t.Helper()
	conn, err := pgx.Connect(w.t.Context(), w.server.URL())
	require.NoError(w.t, err)
	defer conn.Close(context.Background())
	require.NoError(w.t, conn.QueryRow(w.t.Context(), sql).Scan(to...))
}

// drained waits until all rows have come, or until nothing has moved for a while.
func (w *world) drained(rows []row) {
	type owed struct {
		p  *patient
		id int64
	}
	var missing []owed
	for _, r := range rows {
		for _, p := range w.patients {
			if p.wants(r.kind) {
				missing = append(missing, owed{p, r.id})
			}
		}
	}
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	moved := time.Now()
	for {
		dead := map[owed]bool{}
		for _, d := range w.dead() {
			for _, p := range w.patients {
				if p.id == d.endpoint {
					dead[owed{p, d.id}] = true
				}
			}
		}
		before := len(missing)
		missing = slices.DeleteFunc(missing, func(o owed) bool {
			o.p.mu.Lock()
			defer o.p.mu.Unlock()
			return o.p.done[o.id] || dead[o]
		})
		if len(missing) == 0 {
			return
		}
		if len(missing) < before {
			moved = time.Now()
		}
		if time.Since(moved) > patience {
			w.complain("stalled: %d deliveries are missing and none has come for %s", len(missing), patience)
			return
		}
		<-tick.C
	}
}

func (w *world) dead() (all []deadRow) {
	w.t.Helper()
	conn, err := pgx.Connect(w.t.Context(), w.server.URL())
	require.NoError(w.t, err)
	defer conn.Close(context.Background())
	rows, err := conn.Query(w.t.Context(), "select coalesce(endpoint_id, ''), event_id::bigint, reason, coalesce(last_status, 0) from walhook.deliveries where state = 'dead'")
	require.NoError(w.t, err)
	var d deadRow
	_, err = pgx.ForEachRow(rows, []any{&d.endpoint, &d.id, &d.reason, &d.status}, func() error {
		all = append(all, d)
		return nil
	})
	require.NoError(w.t, err)
	return all
}

// until waits for a state of the database.
func (w *world) until(what, sql string) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for began, end := time.Now(), time.Now().Add(patience); ; <-tick.C {
		var ok bool
		var n int64
		w.ask(sql, &ok, &n)
		if ok {
			w.t.Logf("waited %s for: no %s", time.Since(began).Round(time.Millisecond), what)
			return
		}
		if time.Now().After(end) {
			w.complain("stalled: %s: %d", what, n)
			return
		}
	}
}

// judge proves what the run has shown, and prints it.
func (w *world) judge() {
	t := w.t
	ended := time.Now()
	rows, err := committed(t.Context(), w.server.URL())
	require.NoError(t, err)
	acked := 0
	for _, p := range w.produce {
		acked += p.acked
	}
	require.GreaterOrEqual(t, len(rows), acked, "Postgres itself has lost rows")
	w.drained(rows)
	took := time.Since(ended)
	w.until("deliveries that are parked", "select count(*) = 0, count(*) from walhook.deliveries where state <> 'dead'")
	w.until("events without a delivery", "select count(*) = 0, count(*) from walhook.events e where not exists (select from walhook.deliveries d where d.event_id = e.id)")
	w.until("bytes of WAL that the slot holds back", "select coalesce(max(pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)), 1e9)::bigint < 16 << 20, coalesce(max(pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)), 1e9)::bigint from pg_replication_slots where slot_name = 'walhook'")
	w.stopAndStart()
	rows, err = committed(t.Context(), w.server.URL())
	require.NoError(t, err)
	w.drained(rows)

	h := history{began: w.began, rows: rows, dead: w.dead()}
	w.readLogs()
	h.harms = w.harms
	requests := 0
	for _, p := range w.patients {
		h.endpoints = append(h.endpoints, p.witness)
		p.mu.Lock()
		h.sightings = append(h.sightings, p.sightings...)
		requests += len(p.sightings)
		p.mu.Unlock()
	}
	v := judge(h)
	w.report(v, len(rows), requests, len(h.dead), took)
	for i, c := range slices.Concat(w.complaints, v.violations()) {
		if i == 40 {
			t.Errorf("and %d more", len(w.complaints)+len(v.violations())-i)
			break
		}
		t.Error(c)
	}
}

// stopAndStart ends the last process cleanly, and starts another that must repeat nothing.
func (w *world) stopAndStart() {
	for range 2 {
		w.until("slot that nobody reads", "select count(*) = 1, count(*) from pg_replication_slots where slot_name = 'walhook' and active")
		v := w.seats[0]
		w.toVictim(dismiss, v, time.Now())
		select {
		case <-v.ended:
		case <-time.After(patience):
			w.complain("stalled: %s has not ended", filepath.Base(v.log))
		}
		w.toWalhook(deed{act: raise})
	}
	w.ask("insert into outbox (aggregatetype, type, payload) values ('order', 'order.changed', '{}') returning id, id", new(int64), new(int64))
}

// readLogs finds in the logs what no receiver saw.
func (w *world) readLogs() {
	for _, v := range w.victims {
		name := filepath.Base(v.log)
		if !v.asked.Load() && !v.alive() {
			w.complain("%s ended by itself: %v\n%s", name, v.exit, tail(v.log, 3000))
		}
		// Whoever had to let the connection go, if only because its buffer was full, may find that the
		// other has the slot. What it had not written down is sent by both.
		for _, l := range v.said(outbox.ErrFenced.Error()) {
			var line struct{ Time time.Time }
			if json.Unmarshal([]byte(l), &line) == nil && !line.Time.IsZero() {
				w.note(harm{kind: "takeover by the other", from: line.Time.Add(-takeover), to: line.Time, repeats: true})
			}
		}
		for _, l := range v.said("DATA RACE", "panic:", "fatal error:", `"level":"panic"`) {
			w.complain("%s says: %s", name, l)
		}
		if v.termAt.IsZero() || v.alive() {
			continue
		}
		if v.exit != nil && len(v.said("")) > 0 { // else it had not begun
			w.complain("%s: exit after SIGTERM at %.3f: %v", name, v.termAt.Sub(w.began).Seconds(), v.exit)
		}
		if unclean := v.said("will come again"); unclean != nil {
			// It could not write down what it had delivered. That needs a database out of reach.
			h := history{harms: w.harms}
			if !h.calm(v.endedAt).Before(v.endedAt) {
				w.complain("%s: SIGTERM at %.3f, the database was well, and yet: %s", name, v.termAt.Sub(w.began).Seconds(), unclean)
			}
			w.note(harm{kind: "SIGTERM without a database", from: v.termAt, to: v.endedAt, repeats: true})
		}
	}
}

func (w *world) report(v *verdict, rows, requests, dead int, took time.Duration) {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d, wal_sender_timeout %s, buffer %d, race detector %t\n", w.script.seed, w.script.senderTimeout, w.script.buffer, raceEnabled)
	out := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "  %-26s "+format+"\n", append([]any{name}, args...)...)
	}
	out("events committed", "%d", rows)
	out("deliveries", "%d by %d requests", v.deliveries, requests)
	out("dead with a reason", "%d", dead)
	sum := 0
	for _, a := range slices.Sorted(maps.Keys(w.done)) {
		out(string(a), "%d", w.done[a])
		if slices.Contains(kills, a) {
			sum += w.done[a]
		}
	}
	out("kills", "%d", sum)
	out("processes", "%d", len(w.victims))
	out("repeats", "%d, and %d after a lost answer", v.repeats-v.lostAnswers, v.lostAnswers)
	for _, k := range slices.Sorted(maps.Keys(v.perHarm)) {
		median, p99, most := spread(v.perHarm[k])
		out("  a "+k, "median %d, p99 %d, max %d (of %d)", median, p99, most, len(v.perHarm[k]))
	}
	median, p99, most := spread(v.ages)
	out("  age before the harm", "median %s, p99 %s, max %s", median.Round(time.Millisecond), p99.Round(time.Millisecond), most.Round(time.Millisecond))
	out("lost", "%d", len(v.lost))
	out("invented", "%d", len(v.invented))
	out("altered", "%d", len(v.altered))
	out("disorder", "%d", len(v.disorder))
	out("unexplained repeats", "%d", len(v.unexplained))
	out("unexplained deaths", "%d", len(v.deaths))
	memory := int64(0)
	for _, v := range w.victims {
		v.look()
		memory = max(memory, v.memory)
	}
	out("highest RSS", "%d MiB", memory>>20)
	out("drained after", "%s", took.Round(time.Millisecond))
	w.t.Log(b.String())
}
