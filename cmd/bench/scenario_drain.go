package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
)

// form is one way to fill the outbox and to send what is in it.
type form struct {
	name     string
	rows     int
	per      int // rows of a transaction
	keys     int
	size     int // bytes of a payload
	settings []string
	unordered,
	batch bool
}

// drainWorkers is the default concurrency of an endpoint.
const drainWorkers = 64

func (l *lab) plainForm() form {
	return form{name: "1 row, 1 KB", rows: l.rows(200_000), per: 1, keys: 10_000, size: 1000}
}

// measured is one thing's turn.
type measured struct {
	rate     float64 // a second
	usage    usage
	cpu      float64 // microseconds of each
	perEvent float64 // bytes of a request, headers and body
	requests int64
	seen     *observations
	written  written
}

// round is what all took turns at, on the same WAL.
type round struct {
	walhook measured
	read    measured
	chain   map[string]measured // by client
	send    map[string]measured
}

// drainRound commits the rows of a form and has walhook and the limits drain them, each from a
// slot of its own at the same place. Every second round the limits come first, so that none has always the warm machine.
func (db *database) drainRound(ctx context.Context, f form, number int, sends bool) (r round, err error) {
	l := db.lab
	r = round{chain: map[string]measured{}, send: map[string]measured{}}
	slots := map[string]string{}
	for _, name := range []string{"read", "net", "fast"} {
		if slots[name], err = db.copySlot(ctx, name); err != nil {
			return r, err
		}
	}
	first := l.takeIDs(f.rows)
	if err := db.fill(ctx, first, f.rows, f.per, f.keys, f.size); err != nil {
		return r, err
	}
	e := expectation{First: first, Count: f.rows}
	limits := func() error {
		for i, client := range clients {
			o := limitOrder{Count: f.rows, Database: db.url, Slot: slots[[]string{"net", "fast"}[i]], Publication: db.slot, Client: client, Workers: drainWorkers, URL: l.url("limit")}
			if r.chain[client], err = l.limit(ctx, roleChain, o, &e); err != nil {
				return err
			}
		}
		return nil
	}
	own := func() error {
		mine := e
		mine.Signed, mine.Batch = true, f.batch
		if !f.unordered {
			mine.Keys = int64(f.keys)
		}
		r.walhook, err = db.drainOwn(ctx, f, fmt.Sprintf("%s-%d", db.slot, number), mine)
		return err
	}
	turns := []func() error{own, limits}
	if number%2 == 1 {
		turns = []func() error{limits, own}
	}
	for _, turn := range turns {
		if err := turn(); err != nil {
			return r, err
		}
	}
	o := limitOrder{Count: f.rows, Database: db.url, Slot: slots["read"], Publication: db.slot}
	if r.read, err = l.limit(ctx, roleRead, o, nil); err != nil {
		return r, err
	}
	if sends {
		for _, client := range clients {
			o := limitOrder{Count: f.rows, Client: client, Workers: drainWorkers, URL: l.url("limit"), First: first, Size: f.size}
			if r.send[client], err = l.limit(ctx, roleSend, o, &e); err != nil {
				return r, err
			}
		}
	}
	err = db.dropSlots(ctx, db.slot+"_")
	_, truncated := db.conn.Exec(ctx, "truncate outbox")
	return r, errors.Join(err, truncated)
}

// drainOwn is walhook's turn.
func (db *database) drainOwn(ctx context.Context, f form, label string, e expectation) (m measured, err error) {
	return db.deliver(ctx, label, e, nil, db.lab.endpoint("drain", f.settings...))
}

// deliver has walhook run until the receiver has seen all that it is to expect. meanwhile, if
// there is any, begins when walhook streams.
func (db *database) deliver(ctx context.Context, label string, e expectation, meanwhile func(*sidecar) error, endpoints ...string) (m measured, err error) {
	l := db.lab
	if err := l.expect(ctx, e); err != nil {
		return m, err
	}
	before, err := db.written(ctx)
	if err != nil {
		return m, err
	}
	s, err := db.walhook(ctx, label, endpoints...)
	if err != nil {
		return m, err
	}
	if meanwhile != nil {
		err = meanwhile(s)
	}
	if err == nil {
		err = l.reached(ctx, s.process)
	}
	if err != nil {
		return m, fmt.Errorf("%w; the end of walhook's log: %s", err, s.tail())
	}
	if m.usage, err = s.end(); err != nil {
		return m, err
	}
	after, err := db.written(ctx)
	if err != nil {
		return m, err
	}
	m.written = after.since(before)
	err = l.take(ctx, &m, e)
	return m, err
}

// limit is a limit's turn. Without an expectation it sends nothing.
func (l *lab) limit(ctx context.Context, role string, o limitOrder, e *expectation) (m measured, err error) {
	if e != nil {
		if err := l.expect(ctx, *e); err != nil {
			return m, err
		}
	}
	p, err := l.cast(role, &order{Limit: &o})
	if err != nil {
		return m, err
	}
	l.running = append(l.running, p.process)
	if _, err := p.hear(ctx, "ready"); err != nil {
		return m, err
	}
	if err := p.tell(order{Do: "go"}); err != nil {
		return m, err
	}
	done, err := p.hear(ctx, "done")
	if err != nil {
		return m, err
	}
	u, known := p.used()
	if err := p.leave(); err != nil {
		return m, err
	}
	if !known {
		u = p.usedInAll()
	}
	m.usage = u
	if e != nil {
		err = l.take(ctx, &m, *e)
		return m, err
	}
	m.rate = float64(done.Rows) / (float64(done.End-done.Begin) / 1e9)
	m.cpu = u.cpuEach(done.Rows)
	return m, nil
}

// take asks the receiver what came.
func (l *lab) take(ctx context.Context, m *measured, e expectation) error {
	seen, err := l.result(ctx)
	if err != nil {
		return err
	}
	m.seen, m.requests = seen, seen.Requests
	m.rate = seen.rate()
	m.cpu = m.usage.cpuEach(int(seen.Distinct))
	m.perEvent = float64(seen.Bytes) / float64(seen.Requests)
	return seen.wrong(max(e.Target, int64(e.Count)))
}

// prepared is a database whose slot walhook has made.
func (l *lab) prepared(ctx context.Context, endpoints ...string) (*database, error) {
	db, err := l.database(ctx)
	if err != nil {
		return nil, err
	}
	s, err := db.walhook(ctx, db.slot+"-start", endpoints...)
	if err != nil {
		return nil, err
	}
	_, err = s.end()
	return db, err
}

// drain is scenario 1.
func drain(ctx context.Context, l *lab) error {
	f := l.plainForm()
	rounds, err := l.drainRounds(ctx, f, l.options.rounds, true)
	if err != nil {
		return err
	}
	each := func(value func(*round) float64) (all []float64) {
		for i := range rounds {
			all = append(all, value(&rounds[i]))
		}
		return all
	}
	own := each(func(r *round) float64 { return r.walhook.rate })
	against := func(name string, of func(*round) float64, d demand) {
		limit := each(of)
		l.report.compare(f.name, "deliveries", median(own), "/s", median(limit), name, median(ratios(own, limit)), d)
	}
	chained := func(client string) []float64 {
		return each(func(r *round) float64 { return r.chain[client].rate })
	}
	faster := netHTTP
	if median(chained(fastHTTP)) > median(chained(netHTTP)) {
		faster = fastHTTP
	}
	for _, client := range clients {
		d := demand{}
		if client == faster {
			d = atLeast(0.9)
		}
		against("chain "+client, func(r *round) float64 { return r.chain[client].rate }, d)
	}
	for _, client := range clients {
		against("send "+client, func(r *round) float64 { return r.send[client].rate }, demand{})
	}
	against("read", func(r *round) float64 { return r.read.rate }, demand{})
	cpu := each(func(r *round) float64 { return r.walhook.cpu })
	for _, client := range clients {
		limit := each(func(r *round) float64 { return r.chain[client].cpu })
		l.report.compare(f.name, "CPU a delivery", median(cpu), "µs", median(limit), "chain "+client, median(ratios(cpu, limit)), demand{})
	}
	for _, client := range clients {
		limit := each(func(r *round) float64 { return r.send[client].cpu })
		l.report.compare(f.name, "CPU a delivery", median(cpu), "µs", median(limit), "send "+client, median(ratios(cpu, limit)), demand{})
	}
	read := each(func(r *round) float64 { return r.read.cpu })
	l.report.add(f.name, "CPU a row of read", median(read), "µs", demand{})
	peak, limit := 0.0, 0.0
	for _, r := range rounds {
		peak = max(peak, mebibytes(r.walhook.usage.peak))
		limit = max(limit, mebibytes(r.chain[faster].usage.peak))
	}
	l.report.add(f.name, "peak RSS", peak, "MiB", atMost(64))
	l.report.add(f.name, "peak RSS of chain "+faster, limit, "MiB", demand{})
	size := each(func(r *round) float64 { return r.walhook.perEvent })
	written := each(func(r *round) float64 { return float64(r.walhook.written.all) })
	l.report.add(f.name, "rows written to the database", median(written), "", demand{})
	parked := each(func(r *round) float64 { return float64(r.walhook.written.parked) })
	l.report.add(f.name, "parked", slices.Max(parked), "", demand{})
	chain := each(func(r *round) float64 { return r.chain[faster].perEvent })
	l.report.compare(f.name, "bytes a request", median(size), "", median(chain), "chain", median(ratios(size, chain)), demand{})
	last := rounds[len(rounds)-1]
	l.report.Plots = append(l.report.Plots, ratePlot("1-throughput", "Drain: deliveries a second",
		curve{"walhook", last.walhook.seen.Rate}, curve{"chain " + netHTTP, last.chain[netHTTP].seen.Rate}, curve{"chain " + fastHTTP, last.chain[fastHTTP].seen.Rate}))
	return nil
}

// drainRounds has a database to itself.
func (l *lab) drainRounds(ctx context.Context, f form, rounds int, sends bool) (all []round, err error) {
	db, err := l.prepared(ctx, l.endpoint("drain", f.settings...))
	if err != nil {
		return nil, err
	}
	for i := range rounds {
		r, err := db.drainRound(ctx, f, i, sends)
		if err != nil {
			return nil, err
		}
		all = append(all, r)
		l.say("%s, round %d: walhook %s/s, chain %s %s/s, %s %s/s, read %s/s; %d parked", f.name, i+1, number(math.Round(r.walhook.rate)),
			netHTTP, number(math.Round(r.chain[netHTTP].rate)), fastHTTP, number(math.Round(r.chain[fastHTTP].rate)), number(math.Round(r.read.rate)), r.walhook.written.parked)
	}
	return all, db.drop(ctx)
}

// drainForms is scenario 2: one round for each form, because nothing is demanded of it.
func drainForms(ctx context.Context, l *lab) error {
	plain := l.plainForm()
	with := func(name string, change func(*form)) form {
		f := plain
		f.name = name
		change(&f)
		return f
	}
	for _, f := range []form{
		with("1000 rows, 1 KB", func(f *form) { f.per = 1000 }),
		with("1 row, 200 B", func(f *form) { f.size = 200 }),
		// An eighth of the rows: 200,000 would be 3 GB of WAL, and as much of table.
		with("1 row, 16 KB", func(f *form) { f.size = 16_000; f.rows = max(1, f.rows/8) }),
		with("ordering none", func(f *form) { f.settings = []string{"ordering: none"}; f.unordered = true }),
		with("batch of 100", func(f *form) { f.settings = []string{"batch: {max_events: 100, linger: 10ms}"}; f.batch = true }),
	} {
		rounds, err := l.drainRounds(ctx, f, 1, false)
		if err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
		r := rounds[0]
		for _, client := range clients {
			chain := r.chain[client]
			l.report.compare(f.name, "deliveries", r.walhook.rate, "/s", chain.rate, "chain "+client, r.walhook.rate/chain.rate, demand{})
		}
		l.report.compare(f.name, "deliveries", r.walhook.rate, "/s", r.read.rate, "read", r.walhook.rate/r.read.rate, demand{})
		for _, client := range clients {
			chain := r.chain[client]
			l.report.compare(f.name, "CPU a delivery", r.walhook.cpu, "µs", chain.cpu, "chain "+client, r.walhook.cpu/chain.cpu, demand{})
		}
		l.report.add(f.name, "peak RSS", mebibytes(r.walhook.usage.peak), "MiB", demand{})
		l.report.add(f.name, "parked", float64(r.walhook.written.parked), "", demand{})
		if f.batch {
			l.report.add(f.name, "events a request", float64(r.walhook.seen.Distinct)/float64(r.walhook.requests), "", demand{})
		}
	}
	return nil
}
