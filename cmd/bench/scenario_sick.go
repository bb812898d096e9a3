package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"time"
)

// freeAddr is an address where nobody listens. It is none that a system gives to connections
// that go out, so that nobody takes it by chance.
func freeAddr() (string, error) {
	for range 100 {
		ln, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 20_000+rand.IntN(10_000)))
		if err == nil {
			return ln.Addr().String(), ln.Close()
		}
	}
	return "", errors.New("there is no free port")
}

// The endpoints of scenario 4, of which the last three may be sick.
const (
	manyEndpoints    = 10
	healthyEndpoints = 7
	sickTimeout      = 5 * time.Second // so that some end within the run
)

// sick is scenario 4: the same load with ten healthy endpoints and with three that are not, in turns.
func sick(ctx context.Context, l *lab) error {
	span := l.span(30 * time.Second)
	var latency, usual, rate [2][]float64 // healthy, sick
	var worst [2]walKept
	var peak [2]float64
	for turn := range 4 {
		ill := turn%2 == 1
		m, wal, err := l.tenEndpoints(ctx, ill, span)
		if err != nil {
			return err
		}
		i, name := 0, "ten healthy"
		if ill {
			i, name = 1, "three sick"
		}
		p99, _ := percentile(slices.Sorted(slices.Values(m.seen.FromCommit)), 0.99)
		latency[i] = append(latency[i], float64(p99)/1e6)
		usual[i] = append(usual[i], m.seen.usualP99())
		rate[i] = append(rate[i], m.seen.rate())
		wal.kept, wal.owed = max(wal.kept, worst[i].kept), max(wal.owed, worst[i].owed)
		worst[i] = wal
		peak[i] = max(peak[i], mebibytes(m.usage.peak))
		n := len(usual[i]) - 1
		l.say("%s: p99 %s ms (%s in the median second), %s/s to seven, %d parked", name, number(latency[i][n]), number(usual[i][n]), number(m.seen.rate()), m.written.parked)
		if turn >= 2 {
			l.report.Plots = append(l.report.Plots, latencyPlot(fmt.Sprintf("4-latency-%s", []string{"healthy", "sick"}[i]),
				fmt.Sprintf("500/s to ten endpoints, %s: commit → receipt of the seven", name), m.seen))
		}
	}
	const of = "500/s, 7 of 10"
	l.report.compare(of, "p99 beside three sick", median(latency[1]), "ms", median(latency[0]), "ten healthy", median(ratios(latency[1], latency[0])), atMost(1.2))
	l.report.compare(of, "p99 of the median second, beside three sick", median(usual[1]), "ms", median(usual[0]), "ten healthy", median(ratios(usual[1], usual[0])), demand{})
	l.report.compare(of, "deliveries beside three sick", median(rate[1]), "/s", median(rate[0]), "ten healthy", median(ratios(rate[1], rate[0])), atLeast(0.95))
	for i, name := range []string{"ten healthy", "three sick"} {
		d := demand{}
		if i == 1 {
			d = atMost(32)
		}
		worst[i].add(l.report, of, ", "+name, d)
		l.report.add(of, "peak RSS, "+name, peak[i], "MiB", demand{})
	}
	return nil
}

func (l *lab) tenEndpoints(ctx context.Context, ill bool, span time.Duration) (m measured, wal walKept, err error) {
	const keys, perSecond = 1000, 500
	db, err := l.prepared(ctx)
	if err != nil {
		return m, wal, err
	}
	closed, err := freeAddr()
	if err != nil {
		return m, wal, err
	}
	rows := int(perSecond * span.Seconds())
	e := expectation{
		First: l.takeIDs(rows), Count: rows, Target: int64(rows) * healthyEndpoints, Keys: keys, Signed: true, Timed: true,
		Conduct: map[string]conduct{},
	}
	var endpoints []string
	for i := range manyEndpoints {
		id := fmt.Sprintf("e%d", i)
		endpoint := l.endpoint(id, "timeout: "+sickTimeout.String())
		switch how := (conduct{Aside: true}); {
		case i < healthyEndpoints:
		case ill && i == healthyEndpoints:
			endpoint = endpointAt(id, "http://"+closed, "timeout: "+sickTimeout.String())
		case ill && i == healthyEndpoints+1:
			how.Hang = true
			e.Conduct["/"+id] = how
		case ill:
			how.Status = 503
			e.Conduct["/"+id] = how
		default:
			e.Conduct["/"+id] = how
		}
		endpoints = append(endpoints, endpoint)
	}
	label := db.slot + map[bool]string{false: "-healthy", true: "-sick"}[ill]
	watch, err := db.watchWAL(ctx)
	if err != nil {
		return m, wal, err
	}
	m, err = db.deliver(ctx, label, e, func(*sidecar) error {
		_, err := db.steady(ctx, e.First, rows, perSecond, keys, 1000)
		return err
	}, endpoints...)
	wal, watched := watch()
	if err := errors.Join(err, watched); err != nil {
		return m, wal, err
	}
	return m, wal, db.drop(ctx)
}

// outage is a walhook whose only endpoint is dead, and all of whose events are parked.
type outage struct {
	db      *database
	form    form
	name    string
	walhook *sidecar
	expect  expectation
	heal    func() error
	parked  measured // rate is parked deliveries a second
	read    float64  // rows a second

	recovered, plain measured
	first            time.Duration // until the first delivery
}

// The ways to be dead.
const (
	refusing = "refuses connections"
	erring   = "answers 503"
)

// dead is scenario 6.
func dead(ctx context.Context, l *lab) error {
	all, err := l.outagesOf(ctx)
	if err != nil {
		return err
	}
	for _, o := range all {
		l.report.compare(o.name, "parked", o.parked.rate, "/s", o.read, "read", o.parked.rate/o.read, atLeast(0.5))
		l.report.add(o.name, "CPU of one parked", o.parked.cpu, "µs", demand{})
		l.report.add(o.name, "peak RSS", mebibytes(o.parked.usage.peak), "MiB", demand{})
		l.report.add(o.name, "requests meanwhile", float64(o.parked.requests), "", demand{})
	}
	return nil
}

// outagesOf has everything parked, and delivered where scenario 7 is wanted too: one outage after the other, since
// each walhook's walsender would read what the other one's database writes.
func (l *lab) outagesOf(ctx context.Context) ([]*outage, error) {
	if l.outages != nil {
		return l.outages, nil
	}
	for _, name := range []string{refusing, erring} {
		o, err := l.outage(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		l.say("%s: %s parked a second, read %s/s", name, number(o.parked.rate), number(o.read))
		if l.wants(7) {
			err = l.recover(ctx, o)
		} else {
			_, err = o.walhook.end()
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if err := o.db.drop(ctx); err != nil {
			return nil, err
		}
		l.outages = append(l.outages, o)
	}
	return l.outages, nil
}

// outage parks the rows of scenario 1, between two readers of the same WAL. It leaves walhook running.
func (l *lab) outage(ctx context.Context, name string) (o *outage, err error) {
	o = &outage{form: l.plainForm(), name: name}
	// The probe goes on all the while, with the oldest delivery. It must not die of that.
	patience := []string{"retry: {schedule: [" + strings.TrimSuffix(strings.Repeat("1s, ", 100), ", ") + "], jitter: 0}", "breaker: {open_for: 1s}"}
	endpoint := endpointAt("dead", l.url("errs"), patience...)
	o.expect = expectation{Count: o.form.rows, Keys: int64(o.form.keys), Signed: true}
	during := expectation{Count: o.form.rows}
	if name == refusing {
		addr, err := freeAddr()
		if err != nil {
			return nil, err
		}
		endpoint = endpointAt("dead", "http://"+addr+"/refuses", patience...)
		o.heal = func() error {
			if err := l.receiver.tell(order{Do: "open", Addr: addr}); err != nil {
				return err
			}
			_, err := l.receiver.hear(ctx, "open")
			return err
		}
	} else {
		during.Conduct = map[string]conduct{"/errs": {Status: 503}}
		o.heal = func() error { return nil } // expecting heals it
	}
	db, err := l.prepared(ctx, endpoint)
	if err != nil {
		return nil, err
	}
	o.db = db
	slots := []string{"read_before", "read_after"}
	for i := range slots {
		if slots[i], err = db.copySlot(ctx, slots[i]); err != nil {
			return nil, err
		}
	}
	read := func(slot string) error {
		m, err := l.limit(ctx, roleRead, limitOrder{Count: o.form.rows, Database: db.url, Slot: slot, Publication: db.slot}, nil)
		o.read += m.rate / float64(len(slots))
		return err
	}
	o.expect.First = l.takeIDs(o.form.rows)
	during.First = o.expect.First
	if err := db.fill(ctx, o.expect.First, o.form.rows, o.form.per, o.form.keys, o.form.size); err != nil {
		return nil, err
	}
	if err := read(slots[0]); err != nil {
		return nil, err
	}
	if err := l.expect(ctx, during); err != nil {
		return nil, err
	}
	if o.walhook, err = db.walhook(ctx, db.slot+"-dead", endpoint); err != nil {
		return nil, err
	}
	if o.parked.rate, err = db.parking(ctx, o.form.rows, o.walhook); err != nil {
		return nil, fmt.Errorf("%w; the end of walhook's log: %s", err, o.walhook.tail())
	}
	o.parked.usage, _ = o.walhook.used()
	o.parked.cpu = o.parked.usage.cpuEach(o.form.rows)
	seen, err := l.result(ctx)
	if err != nil {
		return nil, err
	}
	if seen.Distinct != 0 {
		return nil, fmt.Errorf("%d events arrived at an endpoint that is dead", seen.Distinct)
	}
	o.parked.requests = seen.Requests
	if err := read(slots[1]); err != nil { // beside a walhook that only probes
		return nil, err
	}
	return o, db.dropSlots(ctx, db.slot+"_")
}

// parking waits until all rows are parked, and says how many were in a second. An identity's
// sequence tells how many there are without counting them.
func (db *database) parking(ctx context.Context, rows int, s *sidecar) (rate float64, err error) {
	type point struct {
		at time.Time
		n  int64
	}
	var first, last point
	progress := time.Now()
	err = eventually(ctx, "park", func() (bool, error) {
		if err := s.ended(); err != nil {
			return false, err
		}
		now := point{at: time.Now()}
		if err := db.conn.QueryRow(ctx, "select case when is_called then last_value else 0 end from walhook.deliveries_id_seq").Scan(&now.n); err != nil {
			return false, err
		}
		switch {
		case now.n > last.n:
			last, progress = now, now.at
			if first.n == 0 {
				first = now
			}
		case time.Since(progress) > stalled:
			return false, fmt.Errorf("nothing new was parked for %s, after %d deliveries", stalled, last.n)
		}
		if now.n < int64(rows) {
			return false, nil
		}
		var n int
		err := db.conn.QueryRow(ctx, "select count(*) from walhook.deliveries").Scan(&n)
		if n == rows {
			last.at = time.Now()
			return true, err
		}
		return false, err
	})
	return perSecond(int(last.n-first.n), last.at.Sub(first.at)), err
}

// recovery is scenario 7.
func recovery(ctx context.Context, l *lab) error {
	all, err := l.outagesOf(ctx)
	if err != nil {
		return err
	}
	for _, o := range all {
		l.report.compare(o.name, "parked ones delivered", o.recovered.rate, "/s", o.plain.rate, "drain", o.recovered.rate/o.plain.rate, atLeast(0.6))
		l.report.compare(o.name, "CPU a delivery", o.recovered.cpu, "µs", o.plain.cpu, "drain", o.recovered.cpu/o.plain.cpu, demand{})
		l.report.add(o.name, "the first after", o.first.Seconds(), "s", demand{})
		l.report.add(o.name, "peak RSS", mebibytes(o.recovered.usage.peak), "MiB", demand{})
		l.report.Plots = append(l.report.Plots, ratePlot(map[string]string{refusing: "7-recovery-refused", erring: "7-recovery-503"}[o.name],
			"An endpoint that "+o.name+" is well again: deliveries a second", curve{"parked ones", o.recovered.seen.Rate}, curve{"drain", o.plain.seen.Rate}))
	}
	return nil
}

// recover has delivered what the outage parked, and then as many rows from the WAL as scenario 1 does.
func (l *lab) recover(ctx context.Context, o *outage) error {
	before, _ := o.walhook.used()
	if err := l.expect(ctx, o.expect); err != nil {
		return err
	}
	began := time.Now()
	if err := o.heal(); err != nil {
		return err
	}
	if err := l.reached(ctx, o.walhook.process); err != nil {
		return fmt.Errorf("%w; the end of walhook's log: %s", err, o.walhook.tail())
	}
	u, err := o.walhook.end()
	if err != nil {
		return err
	}
	o.recovered.usage = usage{cpu: u.cpu - before.cpu, peak: u.peak}
	if err := l.take(ctx, &o.recovered, o.expect); err != nil {
		return err
	}
	o.first = time.Unix(0, o.recovered.seen.Begin).Sub(began)
	var left int
	if err := o.db.conn.QueryRow(ctx, "select count(*) from walhook.deliveries").Scan(&left); err != nil {
		return err
	}
	if left > 0 {
		return fmt.Errorf("%d deliveries are still parked or dead", left)
	}
	// The same in scenario 1, now.
	e := o.expect
	e.First = l.takeIDs(o.form.rows)
	if err := o.db.fill(ctx, e.First, o.form.rows, o.form.per, o.form.keys, o.form.size); err != nil {
		return err
	}
	if o.plain, err = o.db.drainOwn(ctx, o.form, o.db.slot+"-alive", e); err != nil {
		return err
	}
	l.say("%s: %s/s, first after %s, of a plain drain %s/s", o.name, number(o.recovered.rate), o.first.Round(time.Millisecond), number(o.plain.rate))
	return nil
}
