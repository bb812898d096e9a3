package main

import (
	"context"
	"fmt"
	"time"
)

// The receiver and the endpoint of scenario 5.
const (
	slowAnswer  = 100 * time.Millisecond
	slowWorkers = 2000
)

// slow is scenario 5: a receiver that takes its time, and as many attempts in flight as make up for it.
func slow(ctx context.Context, l *lab) error {
	const of = "answers after 100 ms"
	ceiling := slowWorkers / slowAnswer.Seconds()
	f := form{name: of, rows: l.rows(200_000), per: 1, keys: 10_000, size: 1000}
	e := expectation{Count: f.rows, Conduct: map[string]conduct{"/slow": {Delay: slowAnswer}}}
	endpoint := l.endpoint("slow", "ordering: none", fmt.Sprintf("concurrency: %d", slowWorkers))
	db, err := l.prepared(ctx, endpoint)
	if err != nil {
		return err
	}
	plain := map[string]measured{}
	best := 0.0
	for _, client := range clients {
		e.First = l.takeIDs(f.rows)
		o := limitOrder{Count: f.rows, Client: client, Workers: slowWorkers, URL: l.url("slow"), First: e.First, Size: f.size}
		if plain[client], err = l.limit(ctx, roleSend, o, &e); err != nil {
			return err
		}
		best = max(best, plain[client].rate)
	}
	e.First, e.Signed = l.takeIDs(f.rows), true
	if err := db.fill(ctx, e.First, f.rows, f.per, f.keys, f.size); err != nil {
		return err
	}
	m, err := db.deliver(ctx, db.slot+"-slow", e, nil, endpoint)
	if err != nil {
		return err
	}
	// The lower one of the two may be asked for.
	toCeiling, toPlain := demand{}, demand{}
	if best < ceiling {
		toPlain = atLeast(0.8)
	} else {
		toCeiling = atLeast(0.8)
	}
	l.report.compare(of, "deliveries", m.rate, "/s", ceiling, "ceiling", m.rate/ceiling, toCeiling)
	for _, client := range clients {
		d := demand{}
		if plain[client].rate >= best {
			d = toPlain
		}
		l.report.compare(of, "deliveries", m.rate, "/s", plain[client].rate, "send "+client, m.rate/plain[client].rate, d)
	}
	l.report.add(of, "CPU a delivery", m.cpu, "µs", demand{})
	l.report.add(of, "parked", float64(m.written.parked), "", demand{})
	l.report.add(of, "peak RSS", mebibytes(m.usage.peak), "MiB", atMost(150))
	for _, client := range clients {
		l.report.add(of, "peak RSS of send "+client, mebibytes(plain[client].usage.peak), "MiB", demand{})
	}
	l.report.Plots = append(l.report.Plots, ratePlot("5-throughput", "A receiver that answers after 100 ms, 2,000 in flight: deliveries a second",
		curve{"walhook", m.seen.Rate}, curve{"send " + netHTTP, plain[netHTTP].seen.Rate}, curve{"send " + fastHTTP, plain[fastHTTP].seen.Rate}))
	return db.drop(ctx)
}

// large is scenario 9: one transaction of a million rows.
func large(ctx context.Context, l *lab) error {
	rows := l.rows(1_000_000)
	f := form{name: "one transaction", rows: rows, per: rows, keys: 10_000, size: 200}
	db, err := l.prepared(ctx, l.endpoint("drain"))
	if err != nil {
		return err
	}
	e := expectation{First: l.takeIDs(rows), Count: rows, Keys: int64(f.keys), Signed: true}
	if err := db.fill(ctx, e.First, f.rows, f.per, f.keys, f.size); err != nil {
		return err
	}
	m, err := db.drainOwn(ctx, f, db.slot+"-large", e)
	if err != nil {
		return err
	}
	of := number(float64(rows)) + " rows of 200 B"
	l.report.add(of, "deliveries", m.rate, "/s", demand{})
	l.report.add(of, "CPU a delivery", m.cpu, "µs", demand{})
	l.report.add(of, "peak RSS", mebibytes(m.usage.peak), "MiB", atMost(128))
	l.report.add(of, "rows written to the database", float64(m.written.all), "", demand{})
	l.report.add(of, "parked", float64(m.written.parked), "", demand{})
	l.report.Plots = append(l.report.Plots, ratePlot("9-throughput", "One transaction of "+of+": deliveries a second", curve{"walhook", m.seen.Rate}))
	return db.drop(ctx)
}
