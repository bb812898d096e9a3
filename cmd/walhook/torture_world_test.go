package main

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walhook/walhook/cdc/pgtest"
	"github.com/walhook/walhook/sender/sendertest"
)

// This file is what a torture run consists of: producers, receivers, walhook processes, and the
// lines between walhook and Postgres.

const (
	strictKind  = "ledger.moved"
	invoiceKind = "invoice.paid"
	orderKind   = "order.changed"

	pathOfStrict = 7 // advisory lock of all that insert rows of strictKind
)

var theSumSeed = maphash.MakeSeed()

func sum(b []byte) uint64 { return maphash.Bytes(theSumSeed, b) }

// mixed is a number that only the seed and what it is asked about decide.
func mixed(seed uint64, about ...uint64) uint64 {
	for _, a := range about {
		seed = (seed ^ a) * 0x9e3779b97f4a7c15
		seed ^= seed >> 29
	}
	return seed * 0xbf58476d1ce4e5b9 >> 7
}

// producer is a client of the database with keys of its own, so that the order of its numbers is
// the order of its commits.
type producer struct {
	url    func() string
	name   int
	rng    *rand.Rand
	every  time.Duration // a transaction
	large  int           // rows of a large transaction
	number int
	acked  int // rows whose COMMIT has returned
}

const insertRow = "insert into outbox (aggregatetype, aggregateid, type, payload) values ('order', $1, $2, $3)"

// run commits and rolls back until ctx ends. Errors are the faults of the run.
func (p *producer) run(ctx context.Context) {
	tick := time.NewTicker(p.every)
	defer tick.Stop()
	var conn *pgx.Conn
	defer func() {
		if conn != nil {
			_ = conn.Close(context.Background())
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if conn == nil || conn.IsClosed() {
			var err error
			if conn, err = pgx.Connect(ctx, p.url()); err != nil {
				conn = nil
				continue
			}
		}
		// Not ctx: a COMMIT that we give up could come after the next one.
		rows, err := p.transaction(context.Background(), conn)
		if err == nil {
			p.acked += rows
		} else {
			_ = conn.Close(context.Background())
			conn = nil
		}
	}
}

// transaction tells how many rows it has committed.
func (p *producer) transaction(ctx context.Context, conn *pgx.Conn) (rows int, err error) {
	n, how := 1+p.rng.IntN(5), p.rng.IntN(1000)
	b := &pgx.Batch{}
	b.Queue("begin")
	commit := how >= 120
	switch {
	case how == 7 || how == 507: // large
		n = p.large
		p.many(b, n)
	case how >= 900:
		b.Queue("select pg_advisory_xact_lock($1)", pathOfStrict)
		for range n {
			p.number++
			b.Queue(`insert into outbox (aggregatetype, aggregateid, type, payload)
				values ('ledger', $1, $2, format('{"n":%s,"g":%s}', $3::bigint, nextval('strict')))`, p.key(), strictKind, p.number)
		}
	case how >= 750: // savepoints
		rows := n
		for i := range rows {
			p.one(b)
			b.Queue("savepoint s")
			p.one(b)
			if i%2 == 0 {
				b.Queue("rollback to savepoint s")
			} else {
				b.Queue("release savepoint s")
				n++
			}
		}
	default:
		for range n {
			p.one(b)
		}
	}
	if !commit {
		n = 0
		b.Queue("rollback")
	} else {
		b.Queue("commit")
	}
	return n, conn.SendBatch(ctx, b).Close()
}

func (p *producer) key() string { return fmt.Sprintf("p%d-%d", p.name, p.number%11) }

func (p *producer) one(b *pgx.Batch) {
	p.number++
	kind, pad := orderKind, p.rng.IntN(200)
	switch r := p.rng.IntN(100); {
	case r < 25:
		kind = invoiceKind
	case r == 99:
		pad = 20_000
	}
	var key any = p.key()
	if p.number%13 == 0 {
		key = nil
	}
	b.Queue(insertRow, key, kind, fmt.Sprintf(`{"n":%d,"pad":%q}`, p.number, strings.Repeat("ü", pad/2)))
}

func (p *producer) many(b *pgx.Batch, n int) {
	b.Queue(`insert into outbox (aggregatetype, aggregateid, type, payload)
		select 'order', 'p' || $1::int || '-' || i % 11, $2, format('{"n":%s}', i)
		from generate_series($3::bigint, $4::bigint) i`, p.name, orderKind, p.number+1, p.number+n)
	p.number += n
}

// committed reads what the outbox holds in the end: the truth, also where no producer heard of it.
func committed(ctx context.Context, url string) (all []row, err error) {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return nil, err
	}
	defer conn.Close(ctx)
	rows, err := conn.Query(ctx, `select id, type, coalesce(aggregateid, ''), payload, coalesce((payload::json->>'n')::bigint, 0), coalesce((payload::json->>'g')::bigint, 0) from outbox order by id`)
	if err != nil {
		return nil, err
	}
	var r row
	var payload []byte
	_, err = pgx.ForEachRow(rows, []any{&r.id, &r.kind, &r.key, &payload, &r.number, &r.global}, func() error {
		r.data = sum(payload)
		all = append(all, r)
		return nil
	})
	return all, err
}

// patient is a receiver with moods.
type patient struct {
	witness
	seed    uint64
	rx      *sendertest.Receiver
	world   *world
	forever bool // answers 400 to some events for as long as the faults last

	mood atomic.Value // mood

	mu        sync.Mutex // guards what follows
	sightings []sighting
	done      map[int64]bool
	refused   map[int64]int // poisoned events: how often
}

func newPatient(w *world, e witness) (*patient, error) {
	p := &patient{witness: e, seed: mixed(w.script.seed, uint64(len(w.patients))), world: w, done: map[int64]bool{}, refused: map[int64]int{}, forever: e.ordering == "none"}
	p.mood.Store(healthy)
	var err error
	p.rx, err = sendertest.Open(sendertest.Config{Secrets: []string{testSecret}, Keep: 1, Respond: p.respond})
	return p, err
}

// live goes through the spells, then is healthy.
func (p *patient) live(ctx context.Context, spells []spell) {
	defer p.be(healthy)
	for _, sp := range spells {
		p.be(sp.mood)
		from := time.Now()
		ok := wait(ctx, sp.lasts)
		switch sp.mood {
		case refusing, breaking, flaky, hanging:
			p.world.note(harm{kind: p.id + " " + string(sp.mood), from: from, to: time.Now(), answers: true, endpoint: p.id})
		}
		if !ok {
			return
		}
	}
}

func (p *patient) be(m mood) {
	was := p.mood.Swap(m)
	switch {
	case m == refusing && was != refusing:
		p.rx.Refuse()
	case m != refusing && was == refusing:
		if err := p.rx.Reopen(); err != nil {
			p.world.complain("the receiver of %s does not open again: %v", p.id, err)
		}
	}
}

// respond is what the mood says, but for events that are poison whatever the mood.
func (p *patient) respond(q sendertest.Request) sendertest.Answer {
	id, err := strconv.ParseInt(q.ID, 10, 64)
	if err != nil {
		p.world.complain("invented: %s got an event with id %q", p.id, q.ID)
		return sendertest.Status(204)
	}
	if q.Invalid != nil {
		p.world.complain("%s: event %d: %v", p.id, id, q.Invalid)
	}
	if status := p.poison(id); status != 0 {
		return p.give(q, id, status)
	}
	chance := mixed(p.seed, uint64(id), uint64(q.Turn))
	switch m := p.mood.Load().(mood); m {
	case busy:
		return p.give(q, id, 503)
	case asking:
		status := []int{429, 503}[chance%2]
		after := "1"
		if chance%4 > 1 {
			after = time.Now().Add(1500 * time.Millisecond).UTC().Format(http.TimeFormat)
		}
		return p.give(q, id, status, "Retry-After", after)
	case hanging:
		return p.keep(q, id, sendertest.Hang())
	case breaking:
		return p.keep(q, id, sendertest.Reset())
	case brisk:
		return sendertest.After(time.Duration(chance%50)*time.Millisecond, p.give(q, id, 200))
	case slow:
		return sendertest.After(time.Duration(chance%300)*time.Millisecond, p.give(q, id, 200))
	case flaky:
		switch chance % 8 {
		case 0:
			return p.give(q, id, 500)
		case 1:
			return p.keep(q, id, sendertest.Reset())
		case 2:
			return p.give(q, id, 404)
		case 3:
			return p.keep(q, id, sendertest.Raw("HTTP/1.1 boo\r\n\r\n"))
		case 4:
			return sendertest.After(50*time.Millisecond, p.give(q, id, 204))
		case 5: // it has it, and walhook will not know
			p.note(q, id, 200)
			return sendertest.Reset()
		}
	}
	return p.give(q, id, 204)
}

// poison is the status that an event gets for being what it is; zero for most.
func (p *patient) poison(id int64) int {
	chance := mixed(p.seed, uint64(id))
	if len(p.deadOn) > 0 {
		if chance%200 == 0 {
			return p.deadOn[0]
		}
		return 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case !p.world.faulty.Load():
		return 0
	case p.forever && chance%3000 == 1:
		return 400
	case chance%300 == 0 && p.refused[id] < int(2+chance>>20%4):
		p.refused[id]++
		return 400
	}
	return 0
}

// give answers, and notes that it does right before.
func (p *patient) give(q sendertest.Request, id int64, status int, headers ...string) sendertest.Answer {
	return func(w http.ResponseWriter, r *http.Request) {
		p.note(q, id, status)
		sendertest.Status(status, headers...)(w, r)
	}
}

// keep does something else.
func (p *patient) keep(q sendertest.Request, id int64, a sendertest.Answer) sendertest.Answer {
	p.note(q, id, 0)
	return a
}

func (p *patient) note(q sendertest.Request, id int64, status int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sightings = append(p.sightings, sighting{
		endpoint: p.id, id: id, attempt: q.Attempt, status: status, came: q.At, at: time.Now(),
		data: sum(q.Data), body: sum(q.Body),
	})
	if status/100 == 2 {
		p.done[id] = true
		p.world.arrived.Add(1)
	}
}

// setting is the endpoint's line in the configuration. Every seed gives another.
func (p *patient) setting(seed uint64) string {
	r := rand.New(rand.NewPCG(seed, p.seed))
	concurrency := []int{1, 4, 16, 64}[r.IntN(4)]
	if p.ordering != "all" && concurrency == 1 {
		concurrency = 32
	}
	if p.concurrency > 0 {
		concurrency = p.concurrency
	}
	step := []string{"100ms", "200ms", "500ms"}[r.IntN(3)]
	if p.forever {
		step = "100ms"
	}
	if p.step != "" {
		step = p.step
	}
	events := map[string]string{"all": `"ledger.*"`, "some": `"invoice.*"`}[map[bool]string{true: "all", false: "some"}[p.ordering == "all"]]
	if p.wants(orderKind) {
		events = `"*"`
	}
	dead := strings.Join(strings.Fields(strings.Trim(fmt.Sprint(p.deadOn), "[]")), ", ")
	return fmt.Sprintf("{id: %s, url: %q, secrets: [%q], events: [%s], ordering: %s, timeout: %dms, concurrency: %d, "+
		"breaker: {open_for: %dms}, retry: {schedule: [%s], jitter: 0.2, dead_on: [%s]}}",
		p.id, p.rx.URL(), testSecret, events, p.ordering, 1500+r.IntN(500), concurrency, 300+r.IntN(200),
		strings.Join(slices.Repeat([]string{step}, p.attempts-1), ", "), dead)
}

// line is a TCP line to Postgres that can be cut, stopped and slowed down.
type line struct {
	ln     net.Listener
	target atomic.Pointer[string]
	lag    atomic.Int64

	mu    sync.Mutex // guards what follows
	conns map[net.Conn]bool
	open  chan struct{} // closed while bytes pass
	over  bool
}

func newLine() (*line, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	l := &line{ln: ln, conns: map[net.Conn]bool{}, open: make(chan struct{})}
	close(l.open)
	go l.serve()
	return l, nil
}

// aim has new connections lead to a server.
func (l *line) aim(s *pgtest.Server) {
	target := net.JoinHostPort("127.0.0.1", strconv.Itoa(s.Port()))
	l.target.Store(&target)
}

func (l *line) serve() {
	for {
		near, err := l.ln.Accept()
		if err != nil {
			return
		}
		go l.join(near)
	}
}

func (l *line) join(near net.Conn) {
	defer near.Close()
	far, err := net.Dial("tcp", *l.target.Load())
	if err != nil {
		return
	}
	defer far.Close()
	l.mu.Lock()
	if l.over {
		l.mu.Unlock()
		return
	}
	l.conns[near], l.conns[far] = true, true
	l.mu.Unlock()
	ended := make(chan struct{}, 2)
	for _, way := range [][2]net.Conn{{near, far}, {far, near}} {
		go func() {
			defer func() { ended <- struct{}{} }()
			l.carry(way[0], way[1])
		}()
	}
	<-ended // either end's end is the other's
	l.mu.Lock()
	delete(l.conns, near)
	delete(l.conns, far)
	l.mu.Unlock()
}

func (l *line) carry(from, to net.Conn) {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if d := time.Duration(l.lag.Load()); d > 0 {
				wait(context.Background(), d)
			}
			l.mu.Lock()
			open := l.open
			l.mu.Unlock()
			<-open
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// cut resets every connection.
func (l *line) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.conns {
		if t, ok := c.(*net.TCPConn); ok {
			_ = t.SetLinger(0)
		}
		_ = c.Close()
	}
}

func (l *line) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.open:
		l.open = make(chan struct{})
	default:
	}
}

// pass lets everything through again.
func (l *line) pass() {
	l.lag.Store(0)
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.open:
	default:
		close(l.open)
	}
}

func (l *line) close() {
	l.mu.Lock()
	l.over = true
	l.mu.Unlock()
	_ = l.ln.Close()
	l.pass()
	l.cut()
}

// victim is a walhook process.
type victim struct {
	cmd     *exec.Cmd
	log     string // file
	addr    string // of its metrics; empty until known. Only feel reads it
	ended   chan struct{}
	asked   atomic.Bool // to end
	termAt  time.Time
	memory  int64 // highest RSS, bytes
	exit    error
	endedAt time.Time
}

func newVictim(log, config string) (*victim, error) {
	f, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	v := &victim{log: log, ended: make(chan struct{})}
	v.cmd = exec.Command(os.Args[0], "run", "--config", config)
	v.cmd.Env = append(os.Environ(), "WALHOOK_TEST_AS_PROGRAM=1")
	v.cmd.Stderr = f // a file: no pipe that a frozen or dead process could block
	v.cmd.SysProcAttr = dieWithUs()
	if err := v.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		v.exit = v.cmd.Wait()
		v.endedAt = time.Now()
		close(v.ended)
	}()
	return v, nil
}

func (v *victim) alive() bool {
	select {
	case <-v.ended:
		return false
	default:
		return true
	}
}

func (v *victim) signal(s os.Signal) {
	if err := v.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		panic(err)
	}
}

func (v *victim) kill() {
	v.asked.Store(true)
	v.look()
	v.signal(syscall.SIGKILL)
	<-v.ended
}

// look reads the process' highest RSS, where the system tells it.
func (v *victim) look() {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", v.cmd.Process.Pid))
	if err != nil {
		return
	}
	for l := range strings.Lines(string(b)) {
		if f := strings.Fields(l); len(f) > 1 && f[0] == "VmHWM:" {
			kib, _ := strconv.ParseInt(f[1], 10, 64)
			v.memory = max(v.memory, kib<<10)
		}
	}
}

// said tells which of some texts stand in the log, after the end.
func (v *victim) said(texts ...string) (found []string) {
	b, err := os.ReadFile(v.log)
	if err != nil {
		return []string{err.Error()}
	}
	for l := range strings.Lines(string(b)) {
		for _, t := range texts {
			if strings.Contains(l, t) && len(found) < 5 {
				found = append(found, strings.TrimSpace(l))
			}
		}
	}
	return found
}

func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// tail is the end of a file.
func tail(path string, n int64) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > n {
		_, _ = f.Seek(-n, io.SeekEnd)
	}
	b, _ := io.ReadAll(f)
	return filepath.Base(path) + ": …" + string(b)
}
