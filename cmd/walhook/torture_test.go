package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
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
	seed, length, least := seeded(t), 18*time.Second, 10
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
	w := newWorld(t, random(t, "torture", seed, length, least, hand{}))
	t.Logf("seed %d: %d steps, %d kills, %s; again: make torture SEED=%d MINUTES=%.2f KILLS=%d", seed, len(w.script.steps), w.script.kills(),
		w.script.length().Round(time.Second), seed, length.Minutes(), least)
	w.play()
	w.settle()
	_, f := w.judge()
	f.publish(t, w.version(), w.began)
}

// seeded is the seed that was asked for, or any.
func seeded(t *testing.T) uint64 {
	t.Helper()
	s := os.Getenv("WALHOOK_TORTURE_SEED")
	if s == "" {
		return rand.Uint64() >> 32
	}
	seed, err := strconv.ParseUint(s, 10, 64)
	require.NoError(t, err)
	return seed
}

// random is the plan of a run whose script a seed makes.
func random(t *testing.T, name string, seed uint64, length time.Duration, least int, may hand) plan {
	t.Helper()
	may.failovers = postgresMajor(t) >= 17
	s := newScript(seed, length, least, may, []string{"keyed", "loose", "strict", "some"})
	p := plan{
		name: fmt.Sprintf("%s, seed %d", name, seed), script: s, endpoints: fourEndpoints(), clients: 4, every: 16 * time.Millisecond, large: 5000,
		settings: map[string]string{"wal_sender_timeout": strconv.Itoa(int(s.senderTimeout.Milliseconds())), "checkpoint_timeout": "30s"},
		flat:     length >= 5*time.Minute,
	}
	if raceEnabled {
		p.every, p.large = 60*time.Millisecond, 2000
	}
	if slices.ContainsFunc(s.steps, func(d deed) bool { return d.act == failover }) {
		p.standby = synced
	}
	return p
}

// fourEndpoints are one of each ordering, and one that gets only some types and refuses some for good.
func fourEndpoints() []witness {
	all := func(string) bool { return true }
	only := func(k string) func(string) bool { return func(kind string) bool { return kind == k } }
	return []witness{
		{id: "keyed", wants: all, ordering: "key", attempts: 91},
		{id: "loose", wants: all, ordering: "none", attempts: 91},
		{id: "strict", wants: only(strictKind), ordering: "all", attempts: 91},
		{id: "some", wants: only(invoiceKind), ordering: "key", deadOn: []int{422}, attempts: 91},
	}
}

// postgresMajor is 15 for 15.18: of what scripts are made for, before there is a server.
func postgresMajor(t *testing.T) int {
	t.Helper()
	bin, err := pgtest.Find()
	require.NoError(t, err)
	out, err := exec.Command(filepath.Join(bin, "postgres"), "--version").Output()
	require.NoError(t, err)
	m := regexp.MustCompile(`\) (\d+)`).FindSubmatch(out)
	require.NotNil(t, m, "%s", out)
	major, err := strconv.Atoi(string(m[1]))
	require.NoError(t, err)
	return major
}

// takeover is how long before a holder learns of it the other may have taken the slot.
const takeover = 2 * time.Second

// takeoverRepeats allows repeats where a holder finds that the other has taken the slot from it. It
// is to be false as soon as every relay that lets its connection go has saved a checkpoint first;
// the figure "takeover by the other" tells how many repeats still need it.
const takeoverRepeats = true

// standbys says what stands by for Postgres itself.
type standbys int

const (
	none    standbys = iota
	synced           // by the book for failover slots: 17 and later
	unready          // an asynchronous standby that knows nothing of slots
)

// plan says what world to make.
type plan struct {
	name      string
	script    *script
	settings  map[string]string // of Postgres
	standby   standbys
	cdc       string // the section cdc of the configuration
	endpoints []witness
	clients   int           // producers
	every     time.Duration // a transaction of each
	large     int           // rows of a large transaction
	flat      bool          // the run is long enough to ask whether anything grew
}

// stand is a host of the database's URL.
type stand struct {
	server *pgtest.Server // nil where there is none at the moment
	lines  [2]*line       // of walhook: SQL, replication
}

// world is a torture run.
type world struct {
	plan
	t        *testing.T
	began    time.Time
	dir      string // of logs; kept where the run fails
	patients []*patient
	produce  []*producer
	faulty   atomic.Bool
	arrived  atomic.Int64 // successes
	config   string
	vitals   vitals

	seats   [2]*victim
	victims []*victim

	mu         sync.Mutex // guards what follows
	sites      []*stand   // one, or two where there is a standby
	home       int        // the site of the primary
	harms      []harm
	complaints []string
	down       time.Time // since when Postgres is; zero while it is up
	downBy     act
	holes      map[int]harm // kinds of lines that pass slowly or not at all
	frozen     map[*victim]harm
	done       map[act]int
	took       map[string][]time.Duration // measured on the way, by name
	phantoms   int                        // requests with rows that are gone with a primary
}

func newWorld(t *testing.T, p plan) *world {
	t.Helper()
	w := &world{t: t, plan: p, holes: map[int]harm{}, frozen: map[*victim]harm{}, done: map[act]int{}, took: map[string][]time.Duration{}}
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
	primary, err := pgtest.Start(t.Context(), pgtest.Config{Settings: p.settings})
	require.NoError(t, err)
	t.Cleanup(func() {
		for _, s := range w.sites {
			if s.server != nil {
				_ = s.server.Close()
			}
		}
	})
	w.sites = []*stand{{server: primary}}
	if p.standby != none {
		w.sites = append(w.sites, &stand{})
	}
	pgtest.Exec(t, primary.URL(), `create table outbox (id bigserial primary key, aggregatetype text, aggregateid text, type text, payload text);
		create sequence strict`)
	for _, s := range w.sites {
		for i := range s.lines {
			s.lines[i], err = newLine()
			require.NoError(t, err)
			t.Cleanup(s.lines[i].close)
			s.lines[i].aim(primary)
		}
	}
	if p.standby != none {
		require.NoError(t, w.restock(t.Context()))
	}
	for _, e := range p.endpoints {
		p, err := newPatient(w, e)
		require.NoError(t, err)
		t.Cleanup(p.rx.Close)
		w.patients = append(w.patients, p)
	}
	for i := range p.clients {
		w.produce = append(w.produce, &producer{url: w.url, name: i, rng: rand.New(rand.NewPCG(p.script.seed, uint64(100+i))), every: p.every, large: p.large})
	}
	w.config = filepath.Join(w.dir, "walhook.yaml")
	w.configure(p.script.seed)
	t.Cleanup(func() {
		for _, v := range w.victims {
			if v.alive() {
				v.kill()
			}
		}
	})
	return w
}

// primary is the server that takes writes, or did before it was stopped.
func (w *world) primary() *pgtest.Server {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.sites[w.home].server
}

// version is the server's.
func (w *world) version() (v string) {
	w.ask("show server_version", &v)
	return v
}

// url is the primary's, without a line between.
func (w *world) url() string { return w.primary().URL() }

// configure writes a configuration in one step.
func (w *world) configure(seed uint64) {
	through := func(kind int) string {
		var hosts []string
		for _, s := range w.sites {
			hosts = append(hosts, s.lines[kind].ln.Addr().String())
		}
		u := "postgres://postgres@" + strings.Join(hosts, ",") + "/postgres"
		if len(hosts) > 1 {
			u += "?target_session_attrs=read-write"
		}
		return u
	}
	text := fmt.Sprintf("database: {url: %q, replication_url: %q}\noutbox: [{table: outbox}]\nserver: {listen: \"127.0.0.1:0\"}\nbuffer: {events: %d}\n",
		through(0), through(1), w.script.buffer)
	if w.cdc != "" {
		text += "cdc: " + w.cdc + "\n"
	}
	text += "endpoints:\n"
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

// open starts the first walhook. What was committed before there was a slot is nobody's.
func (w *world) open() {
	w.t.Helper()
	w.toWalhook(deed{act: raise})
	select {
	case <-w.seats[0].ended:
		w.t.Fatalf("walhook has ended at once: %s", tail(w.seats[0].log, 3000))
	case <-w.streaming(w.t.Context()):
	}
	w.began = time.Now()
	w.vitals.half = w.began.Add(1000 * time.Hour)
	if l := w.script.length(); l > 0 {
		w.vitals.half = w.began.Add(l / 2)
	}
}

// streaming is closed when somebody reads the slot.
func (w *world) streaming(ctx context.Context) <-chan struct{} {
	there := make(chan struct{})
	go func() {
		if w.await(ctx, patience, "select count(*) = 1 from pg_replication_slots where slot_name = 'walhook' and active") {
			close(there)
		}
	}()
	return there
}

// load has producers produce and receivers be as they are, until over is called.
func (w *world) load() (over func()) {
	w.faulty.Store(true)
	ctx, cancel := context.WithCancel(context.Background())
	var busy sync.WaitGroup
	for _, p := range w.produce {
		busy.Go(func() { p.run(ctx) })
	}
	for _, p := range w.patients {
		busy.Go(func() { p.live(ctx, w.script.moods[p.id]) })
	}
	busy.Go(func() { w.watch(ctx) })
	busy.Go(func() { w.feel(ctx) })
	return func() {
		w.faulty.Store(false)
		cancel()
		busy.Wait()
	}
}

// play performs the script.
func (w *world) play() {
	w.open()
	over := w.load()
	defer over()
	postgres := make(chan deed, len(w.script.steps))
	served := make(chan struct{})
	go func() {
		defer close(served)
		for s := range postgres {
			w.toPostgres(s)
		}
	}()
	for _, s := range w.script.steps[1:] {
		wait(w.t.Context(), time.Until(w.began.Add(s.at)))
		switch s.act {
		case crash, stun, halt, revive, behead, failover:
			postgres <- s
		default:
			w.toWalhook(s)
		}
	}
	w.eachLine([]int{0, 1}, (*line).pass)
	for _, v := range w.seats {
		w.thaw(v)
	}
	w.passed(0, 1)
	postgres <- deed{act: revive}
	close(postgres)
	<-served
}

// eachLine does something to lines of some kinds, wherever they lead.
func (w *world) eachLine(kinds []int, do func(*line)) {
	for _, s := range w.sites {
		for _, i := range kinds {
			do(s.lines[i])
		}
	}
}

// flow waits until n more deliveries have succeeded.
func (w *world) flow(n int64) {
	w.t.Helper()
	target := w.arrived.Load() + n
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); w.arrived.Load() < target; <-tick.C {
		if time.Now().After(end) {
			w.t.Fatalf("stalled: %d of %d deliveries in %s", n-target+w.arrived.Load(), n, patience)
		}
	}
}

// await asks the primary until it says true; errors are the faults of the run.
func (w *world) await(ctx context.Context, most time.Duration, sql string) bool {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	for first := true; first || wait(ctx, 10*time.Millisecond); first = false {
		conn, err := pgx.Connect(ctx, w.url())
		if err != nil {
			continue
		}
		var ok bool
		for err == nil && !ok {
			if err = conn.QueryRow(ctx, sql).Scan(&ok); err == nil && !ok {
				wait(ctx, 10*time.Millisecond)
			}
		}
		_ = conn.Close(context.Background())
		if ok {
			return true
		}
	}
	return false
}

func (w *world) measure(name string, d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.took[name] = append(w.took[name], d)
}

// watch notes when the machine itself stood still.
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
	case rewrite: // and it is found by who looks
		w.configure(s.seed)
	case reconfigure:
		w.configure(s.seed)
		for _, v := range w.seats {
			if v != nil && v.alive() {
				v.signal(syscall.SIGHUP)
			}
		}
	case cut:
		w.eachLine(s.lines, (*line).cut)
		w.mu.Lock()
		w.harms = append(w.harms, harm{kind: string(cut), from: now, to: now, database: true, repeats: w.alive() > 1})
		w.mu.Unlock()
	case blackhole, lag:
		w.eachLine(s.lines, func(l *line) {
			if s.act == blackhole {
				l.stop()
			} else {
				l.lag.Store(int64(s.lag))
			}
		})
		w.mu.Lock()
		for _, i := range s.lines {
			if _, known := w.holes[i]; !known {
				w.holes[i] = harm{kind: string(s.act), from: now, database: true, repeats: w.alive() > 1}
			}
		}
		w.mu.Unlock()
	case pass:
		w.eachLine(s.lines, (*line).pass)
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
		w.note(harm{kind: string(dismiss), from: now, to: now})
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
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	now := time.Now()
	w.mu.Lock()
	down := w.down
	two := w.alive() > 1
	w.mu.Unlock()
	server := w.primary()
	var err error
	switch {
	case s.act == revive && !down.IsZero():
		if err = server.Start(ctx); err == nil {
			w.mu.Lock()
			w.down = time.Time{}
			w.harms = append(w.harms, harm{kind: string(w.downBy), from: down, to: time.Now(), database: true, repeats: true})
			w.mu.Unlock()
		}
	case s.act == revive || !down.IsZero():
		return
	case s.act == crash:
		err = server.Kill()
	case s.act == stun:
		err = server.Stop(ctx, pgtest.Immediate)
	case s.act == halt:
		err = server.Stop(ctx, pgtest.Fast)
		if took := time.Since(now); err == nil {
			w.measure("fast stop of Postgres", took)
			if took > 10*time.Second {
				w.complain("stalled: a fast stop of Postgres at %.3f took %s", now.Sub(w.began).Seconds(), took)
			}
		}
	case s.act == behead:
		var conn *pgx.Conn
		if conn, err = pgx.Connect(ctx, server.URL()); err == nil {
			_, err = conn.Exec(ctx, "select pg_terminate_backend(pid) from pg_stat_replication")
			_ = conn.Close(ctx)
			w.note(harm{kind: string(behead), from: now, to: time.Now(), database: true, repeats: two})
		}
	case s.act == failover:
		var moved bool
		if moved, err = w.failOver(ctx); err == nil && !moved {
			return
		}
	}
	if err != nil {
		w.complain("%s: %v", s, err)
	}
	w.mu.Lock()
	if s.act == crash || s.act == stun || s.act == halt {
		w.down, w.downBy = now, s.act
	}
	w.mu.Unlock()
	w.count(s.act)
}

// failOver kills the primary and promotes the standby, once that is ready to be, and gives the
// new primary a standby of its own. It tells false where the standby was not ready in time.
func (w *world) failOver(ctx context.Context) (moved bool, err error) {
	old, away := w.primary(), w.sites[1-w.home]
	if !w.ready(ctx, away.server) {
		return false, ctx.Err()
	}
	from := time.Now()
	if err := old.Kill(); err != nil {
		return false, err
	}
	if err := away.server.Promote(ctx); err != nil {
		return false, err
	}
	if w.standby == unready {
		// A row that is gone may have been delivered. No other may come under its id.
		conn, err := pgx.Connect(ctx, away.server.URL())
		if err != nil {
			return false, err
		}
		_, err = conn.Exec(ctx, "select setval('outbox_id_seq', nextval('outbox_id_seq') + 1000000)")
		_ = conn.Close(ctx)
		if err != nil {
			return false, err
		}
	}
	w.mu.Lock()
	w.home = 1 - w.home
	w.sites[1-w.home].server = nil
	w.mu.Unlock()
	// Until somebody reads the slot again nothing is written down.
	back := w.await(ctx, patience, "select count(*) = 1 from pg_replication_slots where slot_name = 'walhook' and active")
	w.note(harm{kind: string(failover), from: from, to: time.Now(), database: true, repeats: true})
	if back {
		w.measure("from the primary's death until walhook streams again", time.Since(from))
	}
	return true, errors.Join(old.Close(), w.restock(ctx))
}

// ready waits until the standby could take over.
func (w *world) ready(ctx context.Context, standby *pgtest.Server) bool {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, w.url())
	if err != nil {
		return false
	}
	defer conn.Close(context.Background())
	other, err := pgx.Connect(ctx, standby.URL())
	if err != nil {
		return false
	}
	defer other.Close(context.Background())
	var at string
	if conn.QueryRow(ctx, "select pg_current_wal_lsn()::text").Scan(&at) != nil {
		return false
	}
	for first := true; first || wait(ctx, 50*time.Millisecond); first = false {
		var passed bool
		if other.QueryRow(ctx, "select pg_last_wal_replay_lsn() >= $1::pg_lsn", at).Scan(&passed) != nil {
			return false
		}
		if w.standby == synced {
			if _, err := conn.Exec(ctx, "select pg_log_standby_snapshot()"); err != nil {
				return false
			}
			if ready, err := standby.FailoverReady(ctx, "walhook"); err != nil || !ready {
				continue
			}
		}
		if passed {
			return true
		}
	}
	return false
}

// restock makes a standby at the other site.
func (w *world) restock(ctx context.Context) (err error) {
	away := w.sites[1-w.home]
	var standby *pgtest.Server
	if w.standby == synced {
		standby, err = w.primary().FailoverStandby(ctx, pgtest.Config{})
	} else {
		standby, err = w.primary().Standby(ctx, pgtest.Config{})
	}
	if err != nil {
		return err
	}
	w.mu.Lock()
	away.server = standby
	w.mu.Unlock()
	for _, l := range away.lines {
		l.aim(standby)
	}
	return nil
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
	conn, err := pgx.Connect(w.t.Context(), w.url())
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
	conn, err := pgx.Connect(w.t.Context(), w.url())
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
func (w *world) judge() (*verdict, *figures) {
	t := w.t
	ended := time.Now()
	rows, err := committed(t.Context(), w.url())
	require.NoError(t, err)
	acked := 0
	for _, p := range w.produce {
		acked += p.acked
	}
	if w.done[failover] == 0 {
		require.GreaterOrEqual(t, len(rows), acked, "Postgres itself has lost rows")
	}
	w.drained(rows)
	took := time.Since(ended)
	w.until("deliveries that are parked", "select count(*) = 0, count(*) from walhook.deliveries where state <> 'dead'")
	w.until("events without a delivery", "select count(*) = 0, count(*) from walhook.events e where not exists (select from walhook.deliveries d where d.event_id = e.id)")
	w.until("bytes of WAL that the slot holds back", "select coalesce(max(pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)), 1e9)::bigint < 16 << 20, coalesce(max(pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)), 1e9)::bigint from pg_replication_slots where slot_name = 'walhook'")
	w.stopAndStart()
	rows, err = committed(t.Context(), w.url())
	require.NoError(t, err)
	w.drained(rows)

	h := history{began: w.began, retimed: strings.Contains(w.plan.cdc, "recover: auto"), rows: rows, dead: w.dead()}
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
	if w.standby == unready { // what was delivered before it went down with the old primary
		w.phantoms, v.invented = len(v.invented), nil
	}
	w.complaints = append(w.complaints, w.vitals.flat(w.flat)...)
	f := w.report(v, len(rows), requests, len(h.dead), took)
	for i, c := range slices.Concat(w.complaints, v.violations()) {
		if i == 40 {
			t.Errorf("and %d more", len(w.complaints)+len(v.violations())-i)
			break
		}
		t.Error(c)
	}
	return v, f
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
			if takeoverRepeats && json.Unmarshal([]byte(l), &line) == nil && !line.Time.IsZero() {
				w.note(harm{kind: takenOver, from: line.Time.Add(-takeover), to: line.Time, repeats: true})
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

// report collects and prints the figures.
func (w *world) report(v *verdict, rows, requests, dead int, took time.Duration) *figures {
	f := &figures{run: w.name}
	f.add("seed", w.script.seed)
	f.add("wal_sender_timeout", w.script.senderTimeout)
	f.add("buffer.events", w.script.buffer)
	f.add("events committed", rows)
	f.add("deliveries", v.deliveries)
	f.add("requests", requests)
	f.add("lost", len(v.lost))
	f.add("invented", len(v.invented))
	f.add("altered", len(v.altered))
	f.add("disorder", len(v.disorder))
	f.add("repeats that nothing explains", len(v.unexplained))
	f.add("deaths that nothing explains", len(v.deaths))
	f.add("dead with a reason", dead)
	if w.standby == unready {
		f.add("requests with rows that are gone with an old primary", w.phantoms)
	}
	sum := 0
	for _, a := range kills {
		sum += w.done[a]
	}
	f.add("kills", sum)
	for _, a := range slices.Sorted(maps.Keys(w.done)) {
		f.add("act: "+string(a), w.done[a])
	}
	f.add("processes", len(w.victims))
	f.add("repeats", v.repeats)
	f.add("repeats after a lost answer", v.lostAnswers)
	for _, k := range slices.Sorted(maps.Keys(v.perHarm)) {
		f.spread("repeats per "+k, v.perHarm[k])
	}
	f.spread("age of a repeat before the harm", v.ages)
	for _, k := range slices.Sorted(maps.Keys(w.took)) {
		f.spread(k, w.took[k])
	}
	memory := int64(0)
	for _, v := range w.victims {
		v.look()
		memory = max(memory, v.memory)
	}
	f.add("highest RSS, MiB", memory>>20)
	w.vitals.report(f)
	f.add("drained after", took)
	return f
}
