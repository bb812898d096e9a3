package outbox_test

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/outbox/outboxtest"
)

// world is everything around a relay: a WAL, receivers, and a schema walhook. It outlives
// relays, of which it runs one after the other, and it watches each of their steps: whatever
// breaks a promise is noted in broken, and the test fails by check.
type world struct {
	store     *outboxtest.Store
	maxEvents int
	maxBytes  int64
	labels    *outbox.Labels       // of endpoints in metrics
	metrics   *prometheus.Registry // of the last relay

	traced  bool
	tracing sync.Mutex // guards trace
	trace   []string

	feeding sync.Mutex // held while a row is handed on, and while endpoints change

	mu         sync.Mutex // guards what follows
	broken     error      // the first promise that was broken
	wal        []*transaction
	end        cdc.LSN
	grown      chan struct{} // closed when the WAL grows, or when the stream is to look up
	endpoints  []*outbox.Endpoint
	receivers  map[string]*receiver
	deliveries map[deliveryID]*delivery
	lines      map[lineID]*line
	touched    time.Time // when the relay last heard of Postgres
	silent     bool      // Postgres is not heard of
	reconnects int
	saved      outbox.Checkpoint
	confirmed  cdc.LSN
	crashes    int
	hurt       time.Time // when the store was last known to misbehave
	life       *life

	// How the store behaves.
	writesFail, answersLost, readsFail, savesFail, countsFail, claimsFail bool

	creep, creeps int64 // bytes by which the WAL grows with each look at it, and has grown

	// delay is how long a call of the store takes: before it does its work (write, save, claim) or
	// after (told, scan, key, due, count). nil is no time at all.
	delay func(call string) time.Duration
	calls map[string]int
	got   map[string][]string    // by endpoint, the ids as they first arrived
	tries map[string][]string    // by endpoint, the ids as they were attempted
	begun map[string][]time.Time // attempts by what shares their rate, since the settings or the relay changed
}

// life is one relay from its start to its end.
type life struct {
	w      *world
	relay  *outbox.Relay
	stop   context.CancelFunc
	done   chan struct{}
	err    error // of Run, once done is closed
	dead   chan struct{}
	drain  bool           // guarded by world.mu
	next   int            // of wal, for its stream
	ord    int            // in it
	claims map[string]int // calls of SetStatus
}

type transaction struct {
	commit, end cdc.LSN
	at          time.Time
	rows        []*outboxRow
}

type outboxRow struct {
	id, typ, key, data string
	broken             bool // it has no id
}

type deliveryID struct{ endpoint, event string }

type lineID struct{ endpoint, key string }

// line is what one endpoint is owed of one key, in commit order. The first done of it have ended.
type line struct {
	all  []*delivery
	done int
}

// delivery is what the world knows of one event for one endpoint.
type delivery struct {
	deliveryID
	pos       cdc.Position
	end       cdc.LSN
	ended     bool // delivered or dead: the next of its line may go
	removed   bool // its endpoint is gone
	delivered time.Time
	life      *life // in which it was delivered
	spent     int   // attempts that failed
	flying    int
	mayDie    bool
	settled   bool  // nothing may send it again
	handed    *life // the last in which it was handed on
	handedAt  time.Time
	repeated  *life // it was handed on again in this life
	dup       bool  // it was handed on more than once
	unfit     bool  // no sender can send it
}

type receiver struct {
	endpoint string
	answer   func(a outbox.Attempt) answer
	circuit  bool                     // keep one, by the endpoint's policy
	unfit    func(*outbox.Event) bool // of a batch: what dies alone
	leaves   int                      // of a batch: how many are left now and then

	batches  []int // how many events each attempt had
	inflight int
	most     int // in flight at once
	failures int // in a row
	until    time.Time
	probing  bool
	held     int
	attempts int
	changed  time.Time // its settings; what was about to be sent goes by the old ones
	paused   time.Time // since when nothing may be sent; zero where it may
}

// answer is an outcome and how long it takes. It is cut short when the relay says so.
type answer struct {
	outbox.Outcome
	after time.Duration
}

// firstLSN is where the slot begins.
const firstLSN = 1000

func newWorld(endpoints ...*outbox.Endpoint) *world {
	w := &world{
		store: outboxtest.New(), maxEvents: 10_000, maxBytes: 64 << 20,
		end: firstLSN, grown: make(chan struct{}), endpoints: endpoints,
		receivers: map[string]*receiver{}, deliveries: map[deliveryID]*delivery{}, lines: map[lineID]*line{},
		got: map[string][]string{}, tries: map[string][]string{}, calls: map[string]int{}, begun: map[string][]time.Time{},
	}
	for _, e := range endpoints {
		w.receiverLocked(e.ID)
	}
	w.store.Prove(func() cdc.LSN { return w.end })
	return w
}

// endpoint is one with a short schedule and no jitter.
func endpoint(id string, set ...func(*outbox.Endpoint)) *outbox.Endpoint {
	e := outbox.DefaultEndpoint()
	e.ID, e.URL = id, "https://"+id+".example/hook"
	e.Concurrency = 4
	e.Timeout = 3 * time.Second
	e.Retry = outbox.RetryPolicy{Schedule: []time.Duration{300 * time.Millisecond, time.Second, 4 * time.Second}}
	e.Breaker = outbox.BreakerPolicy{ConsecutiveFailures: 3, OpenFor: 2 * time.Second}
	e.DisableAfter = 0
	for _, f := range set {
		f(&e)
	}
	return &e
}

// tracef notes what happens, for the one who looks for a mistake.
func (w *world) tracef(format string, args ...any) {
	if w.traced {
		w.tracing.Lock()
		defer w.tracing.Unlock()
		w.trace = append(w.trace, fmt.Sprintf("%s: "+format, append([]any{time.Now().Format("15:04:05.000000")}, args...)...))
	}
}

func (w *world) breakf(format string, args ...any) {
	w.tracef("BROKEN "+format, args...)
	if w.broken == nil {
		w.broken = fmt.Errorf("%s: "+format, append([]any{time.Now().Format("15:04:05.000")}, args...)...)
	}
}

func (w *world) err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.broken
}

func (w *world) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
}

func (w *world) receiverLocked(id string) *receiver {
	r := w.receivers[id]
	if r == nil {
		r = &receiver{endpoint: id, answer: ok}
		w.receivers[id] = r
	}
	return r
}

func (w *world) receiver(id string) *receiver {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.receiverLocked(id)
}

// answers says how a receiver answers from now on.
func (w *world) answers(id string, answer func(a outbox.Attempt) answer) {
	w.set(func() { w.receiverLocked(id).answer = answer })
}

func ok(outbox.Attempt) answer {
	return answer{Outcome: outbox.Outcome{Verdict: outbox.Delivered, Status: 200}}
}

func fails(outbox.Attempt) answer {
	return answer{Outcome: outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonStatus, Status: 500}}
}

func dies(outbox.Attempt) answer {
	return answer{Outcome: outbox.Outcome{Verdict: outbox.Dead, Reason: outbox.ReasonStatus, Status: 400}}
}

// hangs answers after so long.
func hangs(d time.Duration, then func(outbox.Attempt) answer) func(outbox.Attempt) answer {
	return func(a outbox.Attempt) answer {
		r := then(a)
		r.after = d
		return r
	}
}

// only answers some events differently.
func only(ids string, then, others func(outbox.Attempt) answer) func(outbox.Attempt) answer {
	return func(a outbox.Attempt) answer {
		if slices.Contains(strings.Fields(ids), a.Event.ID) {
			return then(a)
		}
		return others(a)
	}
}

// script answers the attempts one after the other; the last one stays.
func script(answers ...func(outbox.Attempt) answer) func(outbox.Attempt) answer {
	n := 0
	return func(a outbox.Attempt) answer {
		n++
		return answers[min(n, len(answers))-1](a)
	}
}

// commit writes a transaction. A row is id:key, or id alone.
func (w *world) commit(rows ...string) {
	tx := &transaction{}
	for _, r := range rows {
		id, key, _ := strings.Cut(r, ":")
		tx.rows = append(tx.rows, &outboxRow{id: id, typ: "order.created", key: key, data: `{}`})
	}
	w.commitRows(tx.rows)
}

func (w *world) commitRows(rows []*outboxRow) {
	w.mu.Lock()
	defer w.mu.Unlock()
	tx := &transaction{rows: rows, at: time.Now(), commit: w.end + 100}
	tx.end = tx.commit + 48
	w.end = tx.end
	w.wal = append(w.wal, tx)
	w.wakeLocked()
}

func (w *world) wakeLocked() {
	close(w.grown)
	w.grown = make(chan struct{})
}

// start runs a new relay from what the store and the WAL hold.
func (w *world) start() *outbox.Relay {
	m, err := outbox.NewMapper([]outbox.Source{{Table: "public.outbox"}})
	if err != nil {
		panic(err)
	}
	w.metrics = prometheus.NewRegistry()
	l := &life{w: w, done: make(chan struct{}), dead: make(chan struct{}), claims: map[string]int{}}
	r, err := outbox.New(outbox.Config{
		Mapper: m, Store: &flaky{l}, Claims: &flaky{l}, Sender: &sender{l}, Endpoints: w.endpoints,
		MaxEvents: w.maxEvents, MaxBytes: w.maxBytes, SpillAfter: time.Second,
		Logger: logger, Registerer: w.metrics, Labels: w.labels,
	})
	if err != nil {
		panic(err)
	}
	l.relay = r
	w.set(func() {
		w.life, w.touched = l, time.Now()
		clear(w.begun)
	})
	ctx, cancel := context.WithCancel(context.Background())
	l.stop = cancel
	go func() {
		defer close(l.done)
		l.err = r.Run(ctx, &stream{l}, 10*time.Second)
	}()
	return r
}

var logger = zap.NewNop()

// halt stops the relay in order.
func (w *world) halt() {
	l := w.life
	l.stop()
	<-l.done
	w.mu.Lock()
	defer w.mu.Unlock()
	if l.err != nil && w.broken == nil {
		w.breakf("the relay ended with %v", l.err)
	}
	w.life = nil
}

// haltClean is halt where nothing hinders: what was delivered must never be sent again.
func (w *world) haltClean() {
	l := w.life
	w.halt()
	w.mu.Lock()
	defer w.mu.Unlock()
	stored := w.storedLocked()
	for id, d := range w.deliveries {
		if !d.delivered.IsZero() && stored[id] == "" && (d.handed == l || d.end <= w.saved.LSN) {
			d.settled = true
		}
	}
}

// crash ends the relay at once: nothing that it does from here on has an effect.
func (w *world) crash() {
	l := w.life
	w.mu.Lock()
	w.crashes++
	// What was delivered a while ago is in a checkpoint, if the store was well.
	now := time.Now()
	if w.hurt.Before(now.Add(-12 * time.Second)) {
		stored := w.storedLocked()
		long := now.Add(-4 * time.Second)
		for id, d := range w.deliveries {
			if !d.delivered.IsZero() && d.delivered.Before(long) && d.handedAt.Before(long) && stored[id] == "" && (d.handed == l || d.end <= w.saved.LSN) {
				d.settled = true
			}
		}
	}
	close(l.dead)
	w.mu.Unlock()
	l.stop()
	<-l.done
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range w.receivers {
		r.inflight, r.probing = 0, false
	}
	for _, d := range w.deliveries {
		d.flying = 0
	}
	w.doubtLocked()
	w.life = nil
}

// doubtLocked notes that the last that happened to a delivery may not be in its row.
func (w *world) doubtLocked() {
	stored := w.storedLocked()
	for id, d := range w.deliveries {
		d.dup = d.dup || stored[id] != ""
	}
}

func (w *world) storedLocked() map[deliveryID]outbox.State {
	rows := map[deliveryID]outbox.State{}
	for _, r := range w.store.Rows() {
		rows[deliveryID{r.EndpointID, r.Event.ID}] = r.State
	}
	return rows
}

// configure replaces the endpoints.
func (w *world) configure(endpoints ...*outbox.Endpoint) {
	w.feeding.Lock()
	defer w.feeding.Unlock()
	w.mu.Lock()
	kept := map[string]bool{}
	now := time.Now()
	for _, e := range endpoints {
		kept[e.ID] = true
		r := w.receiverLocked(e.ID)
		if r.changed = now; e.Status == outbox.Enabled {
			r.paused = time.Time{}
		}
	}
	w.endpoints = endpoints
	relay := w.life
	w.mu.Unlock()
	if relay != nil {
		if err := relay.relay.SetEndpoints(endpoints); err != nil {
			panic(err)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	clear(w.begun)
	for _, e := range endpoints {
		if r := w.receiverLocked(e.ID); e.Status != outbox.Enabled && r.paused.IsZero() {
			r.paused = now
		}
	}
	for _, d := range w.deliveries {
		if d.endpoint != "" && !kept[d.endpoint] {
			d.removed, d.ended = true, true
		}
	}
}

// stored lists what the store has for an endpoint as id:state.
func (w *world) stored(endpoint string) []string {
	out := []string{}
	for _, r := range w.store.Rows() {
		if r.EndpointID == endpoint {
			out = append(out, r.Event.ID+":"+string(r.State))
		}
	}
	return out
}

func (w *world) arrived(endpoint string) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.got[endpoint])
}

func (w *world) attempted(endpoint string) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.tries[endpoint])
}

// quiet tells what is still to be done; nil where nothing is.
func (w *world) quiet() error {
	w.mu.Lock()
	end, life := w.end, w.life
	uncounted := w.countsFail && w.crashes > 0 // what was parked twice around a crash is one row, and counted twice
	var endpoints []string
	for _, e := range w.endpoints {
		endpoints = append(endpoints, e.ID)
	}
	w.mu.Unlock()
	for _, r := range w.store.Rows() {
		if r.State != outbox.StateDead {
			return fmt.Errorf("%s for %s is %s in the store, due %v", r.Event.ID, r.EndpointID, r.State, r.Due)
		}
	}
	if low := life.relay.Low(); low.LSN < end {
		return fmt.Errorf("the watermark is at %v of %v", low.LSN, end)
	}
	if events, bytes := life.relay.Buffer(); events != 0 || bytes != 0 {
		return fmt.Errorf("%d events and %d bytes are held in memory", events, bytes)
	}
	for _, id := range endpoints {
		v, ok := life.relay.View(id)
		if !ok {
			continue
		}
		v.Limit = 0
		if uncounted {
			v.Parked = 0
		}
		if v != (outbox.LaneView{State: "flowing"}) {
			return fmt.Errorf("lane %s is not at rest: %+v", id, v)
		}
	}
	return nil
}

// finish checks what must be true when everything that was committed has had its time.
func (w *world) finish() error {
	if err := cmp.Or(w.err(), w.quiet()); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	stored := w.storedLocked()
	for id, d := range w.deliveries {
		dead := stored[id] == outbox.StateDead
		switch {
		case d.removed:
		case d.delivered.IsZero() && !dead:
			return fmt.Errorf("%s for %s is lost", id.event, id.endpoint)
		case dead && !d.mayDie:
			return fmt.Errorf("%s for %s died after %d attempts", id.event, id.endpoint, d.spent)
		case dead && !d.delivered.IsZero() && !d.dup:
			return fmt.Errorf("%s for %s is dead and delivered", id.event, id.endpoint)
		case d.flying != 0:
			return fmt.Errorf("%s for %s is in flight", id.event, id.endpoint)
		}
	}
	for id := range stored {
		if w.deliveries[id] == nil {
			return fmt.Errorf("%s for %s was never owed", id.event, id.endpoint)
		}
	}
	return nil
}

// until lets time pass until a condition holds, and fails the world where it never does.
func (w *world) until(limit time.Duration, cond func() error) error {
	var err error
	for begin := time.Now(); time.Since(begin) < limit; pass(250 * time.Millisecond) {
		if err = cmp.Or(w.err(), cond()); err == nil || w.err() != nil {
			return err
		}
	}
	return fmt.Errorf("after %v: %w", limit, err)
}

// check waits until all is done, stops the relay, and fails the test for every broken promise.
func (w *world) check(t *testing.T) {
	t.Helper()
	err := w.until(2*time.Minute, w.quiet)
	if err == nil {
		err = w.finish()
	}
	w.halt()
	require.NoError(t, err)
	require.NoError(t, w.err())
}

// pass lets the bubble's time pass.
func pass(d time.Duration) { time.Sleep(d) }

// ---- the stream

type stream struct{ *life }

var outboxRelation = &cdc.Relation{OID: 16385, Schema: "public", Name: "outbox", Columns: []cdc.Column{
	{Name: "id", TypeOID: 25}, {Name: "type", TypeOID: 25}, {Name: "key", TypeOID: 25}, {Name: "data", TypeOID: 3802},
}}

func (s *stream) Run(ctx context.Context) error {
	w := s.w
	resume, err := s.claim(ctx)
	if err != nil {
		return nil //nolint:nilerr // the context ended
	}
	w.mu.Lock()
	seen := w.reconnects
	for s.next < len(w.wal) && w.wal[s.next].commit < resume.LSN {
		s.next++
	}
	w.mu.Unlock()
	for ctx.Err() == nil {
		w.mu.Lock()
		grown, silent := w.grown, w.silent
		again := w.reconnects != seen
		seen = w.reconnects
		var tx *transaction
		if s.next < len(w.wal) {
			tx = w.wal[s.next]
		}
		end := w.end
		if !silent {
			w.touched = time.Now()
		}
		drained := s.drain
		w.mu.Unlock()
		if again {
			if _, err := s.claim(ctx); err != nil {
				return nil //nolint:nilerr // the context ended
			}
		}
		if !silent {
			s.relay.Touch()
		}
		switch {
		case silent || drained:
		case tx == nil:
			s.relay.Idle(end)
		case s.ord == len(tx.rows):
			s.relay.Commit(tx.end)
			s.next, s.ord = s.next+1, 0
			continue
		default:
			pos := cdc.Position{Commit: tx.commit, Ordinal: uint64(s.ord + 1)}
			if pos.Compare(resume.Position) <= 0 {
				s.ord++
				continue
			}
			if room := s.relay.Room(); room != nil {
				select {
				case <-room:
				case <-ctx.Done():
				case <-time.After(time.Second):
				}
				continue
			}
			s.hand(tx, pos)
			s.ord++
			continue
		}
		select {
		case <-grown:
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
	return nil
}

func (s *stream) claim(ctx context.Context) (cdc.Resume, error) {
	for {
		resume, err := s.relay.Claim(ctx, cdc.Session{})
		if err == nil {
			return resume, nil
		}
		select {
		case <-ctx.Done():
			return cdc.Resume{}, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// hand gives a row to the relay and notes who is owed it.
func (s *stream) hand(tx *transaction, pos cdc.Position) {
	w := s.w
	w.feeding.Lock()
	defer w.feeding.Unlock()
	row := tx.rows[pos.Ordinal-1]
	w.mu.Lock()
	if s.drain || s.isDead() {
		s.ord--
		w.mu.Unlock()
		return
	}
	if row.broken {
		w.owe("", row, tx, pos, "", s.life)
	} else {
		for _, e := range w.endpoints {
			if e.Status != outbox.Disabled && (e.Events[0] == "*" || e.Events[0] == row.typ) {
				key := row.key
				switch e.Ordering {
				case outbox.OrderAll:
					key = "*"
				case outbox.OrderNone:
					key = ""
				}
				switch wants, err := filtered(e, row); {
				case err != nil:
					w.owe(e.ID, row, tx, pos, "", s.life) // its death is in no order
					w.deliveries[deliveryID{e.ID, row.id}].mayDie = true
				case wants:
					w.owe(e.ID, row, tx, pos, key, s.life)
				}
			}
		}
	}
	w.mu.Unlock()
	values := [][]byte{[]byte(row.id), []byte(row.typ), []byte(row.key), []byte(row.data)}
	if row.broken {
		values[0] = nil
	}
	if err := s.relay.Row(&cdc.Row{Position: pos, CommitTime: tx.at, Relation: outboxRelation, Values: values}); err != nil {
		w.set(func() { w.breakf("row %v: %v", pos, err) })
	}
}

// filtered asks the endpoint's filter, if it has one.
func filtered(e *outbox.Endpoint, row *outboxRow) (bool, error) {
	if e.Filter == nil {
		return true, nil
	}
	return e.Filter.Wants((&outbox.Event{ID: row.id, Type: row.typ, Key: row.key, Data: []byte(row.data), JSON: json.Valid([]byte(row.data))}).View())
}

func (w *world) owe(endpoint string, row *outboxRow, tx *transaction, pos cdc.Position, key string, by *life) {
	w.tracef("row %v: %s for %s, key %q", pos, row.id, endpoint, key)
	id := deliveryID{endpoint, row.id}
	if row.broken {
		id.event = fmt.Sprintf("unmappable_%s_%d", strings.ReplaceAll(pos.Commit.String(), "/", "-"), pos.Ordinal)
	}
	if d := w.deliveries[id]; d != nil {
		if d.settled {
			w.breakf("%v was handed on again", id)
		}
		d.repeated, d.handed, d.handedAt, d.dup = by, by, time.Now(), true
		return
	}
	d := &delivery{deliveryID: id, handed: by, handedAt: time.Now(), pos: pos, end: tx.end, mayDie: row.broken}
	w.deliveries[id] = d
	if key != "" {
		l := w.lines[lineID{endpoint, key}]
		if l == nil {
			l = &line{}
			w.lines[lineID{endpoint, key}] = l
		}
		l.all = append(l.all, d)
	}
}

// disabled are the endpoints that the relay has disabled, and how often.
func (l *life) disabled() map[string]int {
	l.w.mu.Lock()
	defer l.w.mu.Unlock()
	return maps.Clone(l.claims)
}

func (l *life) isDead() bool {
	select {
	case <-l.dead:
		return true
	default:
		return false
	}
}

func (s *stream) Drain() { s.w.set(func() { s.drain = true }) }

func (s *stream) Confirm(at, _ cdc.LSN) {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	if s.isDead() {
		return
	}
	if at > s.w.saved.LSN {
		s.w.breakf("%v was confirmed, the checkpoint is at %v", at, s.w.saved.LSN)
	}
	s.w.confirmed = max(s.w.confirmed, at)
}

func (s *stream) Confirmed(context.Context) error { return nil }

func (s *stream) Lag(context.Context) (cdc.Lag, error) {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	s.w.creeps += s.w.creep
	return cdc.Lag{Behind: int64(len(s.w.wal)-s.next)<<23 + s.w.creeps}, nil
}

// ---- the store, as one life sees it

type flaky struct{ *life }

var errDead = errors.New("this relay is no more")

func (s *flaky) lag(ctx context.Context, call string) error {
	s.w.mu.Lock()
	s.w.calls[call]++
	delay := s.w.delay
	var d time.Duration
	if delay != nil {
		d = delay(call)
	}
	s.w.mu.Unlock()
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return ctx.Err()
		case <-s.dead:
		}
	}
	if s.isDead() {
		return errDead
	}
	return nil
}

// write does a call that may fail before it has done its work, or after.
func (s *flaky) write(ctx context.Context, do func() error) error {
	if err := s.lag(ctx, "write"); err != nil {
		return err
	}
	w := s.w
	w.mu.Lock()
	fail, lose := w.writesFail, w.answersLost
	if fail || lose {
		w.hurt = time.Now()
	}
	if s.isDead() {
		w.mu.Unlock()
		return errDead
	}
	var err error
	if fail {
		err = errors.New("the store cannot be written")
	} else {
		err = do() // under the lock, so that what is noted is what is stored
	}
	w.mu.Unlock()
	if err != nil {
		return err
	}
	if err := s.lag(ctx, "told"); err != nil {
		return err
	}
	if lose {
		return errors.New("the answer of the store was lost")
	}
	return nil
}

func (s *flaky) Write(ctx context.Context, changes []outbox.Change) error {
	return s.write(ctx, func() error {
		if err := s.w.store.Write(ctx, changes); err != nil {
			return err
		}
		var rows map[deliveryID]outbox.State
		if slices.ContainsFunc(changes, func(c outbox.Change) bool { return c.State == outbox.StateDead }) {
			rows = s.w.storedLocked()
		}
		seen := map[deliveryID]bool{}
		for _, c := range changes {
			s.w.tracef("write %s %s %s insert %v %s due %v", c.EndpointID, c.Event.ID, c.State, c.Insert, c.Reason, c.Due)
			id := deliveryID{c.EndpointID, c.Event.ID}
			d := s.w.deliveries[id]
			switch {
			case d == nil:
				s.w.breakf("%v is written and was never owed", id)
			case rows[id] == outbox.StateDead:
				d.ended = true
			}
			if seen[id] {
				s.w.breakf("%v is changed twice in one write", id)
			}
			seen[id] = true
		}
		return nil
	})
}

func (s *flaky) WriteInParts(ctx context.Context, changes []outbox.Change, pause func() bool) error {
	if pause() {
		pause()
	}
	return s.Write(ctx, changes)
}

func (s *flaky) Bury(ctx context.Context, endpointID string, reason outbox.Reason) (n int64, err error) {
	err = s.write(ctx, func() (err error) {
		n, err = s.w.store.Bury(ctx, endpointID, reason)
		return err
	})
	return n, err
}

// read does a call first and answers late: what it returns may be old.
func (s *flaky) read(ctx context.Context, call string, do func() error) error {
	if s.isDead() {
		return errDead
	}
	s.w.mu.Lock()
	fail := s.w.readsFail
	s.w.mu.Unlock()
	if fail {
		return errors.New("the store cannot be read")
	}
	if err := do(); err != nil {
		return err
	}
	return s.lag(ctx, call)
}

func (s *flaky) Scan(ctx context.Context, endpointID string, after cdc.Position, skip []string, limit int, maxBytes int64) (rows []outbox.Stored, more bool, err error) {
	err = s.read(ctx, "scan", func() (err error) {
		rows, more, err = s.w.store.Scan(ctx, endpointID, after, skip, limit, maxBytes)
		s.w.tracef("scan %s after %v without %v limit %d: %s more %v %v", endpointID, after, skip, limit, names(rows), more, err)
		return err
	})
	return rows, more, err
}

func (s *flaky) ScanKey(ctx context.Context, endpointID, key string, after cdc.Position, limit int, maxBytes int64) (rows []outbox.Stored, more bool, err error) {
	err = s.read(ctx, "key", func() (err error) {
		rows, more, err = s.w.store.ScanKey(ctx, endpointID, key, after, limit, maxBytes)
		s.w.tracef("scan key %s %s after %v limit %d: %s more %v %v", endpointID, key, after, limit, names(rows), more, err)
		return err
	})
	return rows, more, err
}

func (s *flaky) Due(ctx context.Context, endpointID string, now time.Time, limit int, maxBytes int64) (keys []string, loose []outbox.Stored, next time.Time, err error) {
	err = s.read(ctx, "due", func() (err error) {
		keys, loose, next, err = s.w.store.Due(ctx, endpointID, now, limit, maxBytes)
		s.w.tracef("due %s: %v %s next %v %v", endpointID, keys, names(loose), next, err)
		return err
	})
	return keys, loose, next, err
}

func (s *flaky) Backlogs(ctx context.Context) (all []outbox.Backlog, err error) {
	s.w.mu.Lock()
	fail := s.w.countsFail && s.next > 0
	s.w.mu.Unlock()
	if fail {
		return nil, errors.New("the store cannot be counted")
	}
	err = s.read(ctx, "count", func() (err error) {
		all, err = s.w.store.Backlogs(ctx)
		return err
	})
	return all, err
}

// SaveCheckpoint checks that nothing below the watermark is owed.
func (s *flaky) SaveCheckpoint(ctx context.Context, c outbox.Checkpoint) (proof cdc.LSN, err error) {
	// One whose context ends lands all the same: nobody knows.
	if err = s.lag(ctx, "save"); errors.Is(err, errDead) {
		return 0, err
	}
	w := s.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if s.isDead() {
		return 0, errDead
	}
	if w.savesFail {
		w.hurt = time.Now()
		return 0, errors.New("the checkpoint cannot be written")
	}
	if c.LSN < w.saved.LSN || c.Position.Compare(w.saved.Position) < 0 {
		w.breakf("the checkpoint goes back from %v to %v", w.saved, c)
	}
	rows := w.storedLocked()
	for id, d := range w.deliveries {
		if (d.end <= c.LSN || d.pos.Compare(c.Position) <= 0) && d.delivered.IsZero() && rows[id] == "" && !d.removed {
			w.breakf("the checkpoint %v passes %v, which is neither delivered nor stored", c, id)
		}
	}
	w.saved = c
	w.tracef("save %v", c)
	proof, saveErr := w.store.SaveCheckpoint(context.WithoutCancel(ctx), c)
	return proof, cmp.Or(err, saveErr)
}

// Claim, Fill, Alone and SetStatus make it an outbox.Claims.
func (s *flaky) Claim(ctx context.Context, _ cdc.Session) (outbox.Checkpoint, bool, error) {
	if err := s.lag(ctx, "claim"); err != nil {
		return outbox.Checkpoint{}, false, err
	}
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	if s.w.claimsFail {
		return outbox.Checkpoint{}, false, errors.New("the slot cannot be claimed")
	}
	c, _ := s.w.store.Checkpoint()
	s.w.store.Claim()
	s.w.touched = time.Now()
	if c.LSN == 0 {
		c.LSN = firstLSN
	}
	return c, false, nil
}

func (s *flaky) Fill(context.Context, cdc.Session, uint64) (outbox.Filling, error) {
	return nil, errors.New("the model has no tables")
}

func (s *flaky) Alone(context.Context) (bool, error) { return true, nil }

func (s *flaky) Emit(context.Context, [][]byte) error { return nil }

func (s *flaky) SetStatus(_ context.Context, endpointID string, _ outbox.Status, _ string) error {
	s.w.set(func() { s.claims[endpointID]++ })
	return nil
}

// ---- the receivers, as one life sees them

type sender struct{ *life }

func (s *sender) Forget(endpointID string) {}

func (s *sender) Send(ctx context.Context, a outbox.Attempt) outbox.Outcome {
	w := s.w
	cut := outbox.Outcome{Verdict: outbox.Cut, Reason: outbox.ReasonShutdown}
	w.mu.Lock()
	if s.isDead() || ctx.Err() != nil {
		w.mu.Unlock()
		return cut
	}
	r := w.receiverLocked(a.Endpoint.ID)
	now := time.Now()
	if r.circuit && !r.until.IsZero() {
		if until := r.until; now.Before(until) || r.probing {
			if r.probing {
				until = now.Add(500 * time.Millisecond)
			}
			r.held++
			w.mu.Unlock()
			return outbox.Outcome{Verdict: outbox.Held, Reason: outbox.ReasonBreakerOpen, Until: until}
		}
		r.probing = true
	}
	sent, apart := []*outbox.Event{a.Event}, (*outbox.Apart)(nil)
	if a.Batch != nil {
		sent, apart = w.takeApart(r, a)
	}
	w.tracef("send %s %s #%d", a.Endpoint.ID, ids(sent), a.Number)
	if len(sent) == 0 {
		r.probing = false
		w.mu.Unlock()
		return outbox.Outcome{Verdict: outbox.Dead, Apart: apart}
	}
	ds := w.began(s.life, r, a, sent)
	ans := r.answer(a)
	ans.Apart = apart
	w.mu.Unlock()

	if ans.after > 0 {
		t := time.NewTimer(ans.after)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			ans.Outcome = cut
			ans.Apart = apart
		case <-s.dead:
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tracef("sent %s %s %v", a.Endpoint.ID, ids(sent), ans.Outcome)
	if s.isDead() {
		if rand.IntN(2) == 0 { // it arrived, but nobody heard the answer
			for _, d := range ds {
				w.arrive(d, s.life)
			}
		}
		return cut
	}
	r.inflight--
	for _, d := range ds {
		d.flying--
		switch ans.Verdict {
		case outbox.Delivered:
			w.arrive(d, s.life)
		case outbox.Dead:
			d.mayDie = true
		case outbox.Retry:
			if d.spent++; d.spent > len(a.Endpoint.Retry.Schedule) {
				d.mayDie = true
			}
		}
	}
	switch ans.Verdict {
	case outbox.Delivered:
		r.failures, r.until, r.probing = 0, time.Time{}, false
	case outbox.Dead:
		r.probing = false
	case outbox.Retry:
		if ans.Status == 429 {
			r.probing = false
			break
		}
		if r.failures++; r.probing || r.failures >= a.Endpoint.Breaker.ConsecutiveFailures {
			r.until = time.Now().Add(a.Endpoint.Breaker.OpenFor)
		}
		r.probing = false
	default:
		r.probing = false
	}
	return ans.Outcome
}

func (w *world) arrive(d *delivery, l *life) {
	if d.delivered.IsZero() {
		w.got[d.endpoint] = append(w.got[d.endpoint], d.event)
	} else if d.life == l && d.repeated != l {
		w.breakf("%v is delivered twice in one life", d.deliveryID)
	}
	d.delivered, d.life, d.ended = time.Now(), l, true
}

// pace checks that the attempt that begins now is within the endpoint's rate.
func (w *world) pace(ep *outbox.Endpoint) {
	limit := ep.RateLimit.Rate
	if limit == (outbox.Rate{}) {
		return
	}
	shared := cmp.Or(ep.RateLimit.Group, ep.ID)
	now := time.Now()
	w.begun[shared] = slices.DeleteFunc(append(w.begun[shared], now), func(at time.Time) bool { return now.Sub(at) > limit.Per-time.Millisecond })
	most := max(1, limit.Attempts)
	if limit.Attempts/limit.Per.Seconds() > 100 {
		most *= 1.01
	}
	if n := len(w.begun[shared]); float64(n) > most {
		w.breakf("%d attempts for %s within %v, the rate is %v", n, shared, limit.Per, limit)
	}
}

// takeApart checks a batch and says which of it the sender leaves out: what its receiver calls
// unfit, and now and then, where there is one who leaves some, what would be too much.
func (w *world) takeApart(r *receiver, a outbox.Attempt) (sent []*outbox.Event, apart *outbox.Apart) {
	if n := len(a.Batch); n == 0 || n > a.Endpoint.Batch.MaxEvents || a.Batch[0] != a.Event {
		w.breakf("a batch of %d events for %s, which takes %d", n, r.endpoint, a.Endpoint.Batch.MaxEvents)
	}
	if !slices.IsSortedFunc(a.Batch, func(x, y *outbox.Event) int { return x.Position.Compare(y.Position) }) {
		w.breakf("%s is not in commit order", ids(a.Batch))
	}
	highest := 0
	for _, e := range a.Batch {
		if d := w.deliveries[deliveryID{r.endpoint, e.ID}]; d != nil {
			highest = max(highest, d.spent+1)
			if d.spent > 0 && d.spent == len(a.Endpoint.Retry.Schedule) && w.crashes == 0 && len(a.Batch) > 1 && time.Now().After(r.changed) {
				w.breakf("%s: %s has its last attempt with others", ids(a.Batch), e.ID)
			}
		}
		if r.unfit != nil && r.unfit(e) {
			if apart == nil {
				apart = &outbox.Apart{}
			}
			apart.Unfit = append(apart.Unfit, outbox.Unfit{Event: e, Reason: outbox.ReasonNotJSON})
			if d := w.deliveries[deliveryID{r.endpoint, e.ID}]; d != nil {
				d.mayDie, d.unfit = true, true
			}
			continue
		}
		sent = append(sent, e)
	}
	if a.Number > highest || a.Number < highest && w.crashes == 0 {
		w.breakf("%s is attempted for the %dth time, and should be for the %dth", ids(a.Batch), a.Number, highest)
	}
	if n := len(sent); r.leaves > 0 && n > r.leaves && hash(n, sent[0].ID, a.Number)%3 == 0 {
		if apart == nil {
			apart = &outbox.Apart{}
		}
		sent, apart.Left = sent[:n-r.leaves], sent[n-r.leaves:]
	}
	return sent, apart
}

// began checks that an attempt may be made now.
func (w *world) began(l *life, r *receiver, a outbox.Attempt, sent []*outbox.Event) (ds []*delivery) {
	r.inflight++
	r.attempts++
	r.most = max(r.most, r.inflight)
	r.batches = append(r.batches, len(sent))
	w.pace(a.Endpoint)
	now := time.Now()
	if (a.Batch != nil) != (a.Endpoint.Batch.MaxEvents > 1) {
		w.breakf("%s: a batch where there is to be none, or none where there is to be one", ids(sent))
	}
	if r.inflight > a.Endpoint.Concurrency && now.After(r.changed) {
		w.breakf("%d attempts at once for %s", r.inflight, r.endpoint)
	}
	if now.Sub(w.touched) > 15*time.Second {
		w.breakf("%s is sent although Postgres was last heard of %v ago", ids(sent), now.Sub(w.touched))
	}
	if !r.paused.IsZero() && now.After(r.paused) {
		w.breakf("%s is sent to an endpoint that does not want anything since %v", ids(sent), r.paused)
	}
	mates := map[*delivery]bool{}
	for _, e := range sent {
		w.tries[r.endpoint] = append(w.tries[r.endpoint], e.ID)
		id := deliveryID{r.endpoint, e.ID}
		d := w.deliveries[id]
		if d == nil {
			w.breakf("%v is sent and was never owed", id)
			d = &delivery{deliveryID: id}
		}
		d.flying++
		mates[d] = true
		ds = append(ds, d)
	}
	for i, d := range ds {
		w.begins(d, a, sent[i].Key, mates)
	}
	return ds
}

// begins checks that a delivery may be attempted now, together with others.
func (w *world) begins(d *delivery, a outbox.Attempt, key string, mates map[*delivery]bool) {
	id := d.deliveryID
	if d.flying > 1 && !d.dup {
		w.breakf("%v is sent twice at once", id)
	}
	if d.settled {
		w.breakf("%v is sent again", id)
	}
	if d.removed {
		return // what was in flight when its endpoint went
	}
	if a.Number > len(a.Endpoint.Retry.Schedule)+1 {
		w.breakf("%v is attempted for the %dth time", id, a.Number)
	}
	if a.Batch == nil && (a.Number > d.spent+1 || a.Number < d.spent+1 && w.crashes == 0) {
		w.breakf("%v is attempted for the %dth time, %d attempts were spent", id, a.Number, d.spent)
	}
	if d.ended && !d.dup {
		w.breakf("%v is sent although it has ended", id)
	}
	switch a.Endpoint.Ordering {
	case outbox.OrderAll:
		key = "*"
	case outbox.OrderNone:
		key = ""
	}
	if key == "" {
		return
	}
	line := w.lines[lineID{d.endpoint, key}]
	if line == nil { // it is of a time when the endpoint had another ordering
		return
	}
	for line.done < len(line.all) && line.all[line.done].ended && line.all[line.done].flying == 0 {
		line.done++
	}
	for _, o := range line.all[line.done:] {
		if mates[o] || o.pos.Compare(d.pos) > 0 && o.flying == 0 {
			continue
		}
		if o.flying > 0 {
			w.breakf("%v is sent while %v of its key is in flight", id, o.event)
		}
		if o.pos.Compare(d.pos) < 0 && !o.ended && !o.unfit { // what is unfit dies whatever is sent meanwhile
			w.breakf("%v is sent before %v of its key has ended", id, o.event)
		}
	}
}

func ids(events []*outbox.Event) string {
	var all []string
	for _, e := range events {
		all = append(all, e.ID)
	}
	return strings.Join(all, " ")
}

func names(rows []outbox.Stored) (ids []string) {
	for _, r := range rows {
		ids = append(ids, r.Event.ID)
	}
	return ids
}

func hash(parts ...any) uint64 {
	h := fnv.New64a()
	fmt.Fprint(h, parts...)
	return h.Sum64()
}
