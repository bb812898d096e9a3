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
	f := form{rows: l.rows(200_000), per: 1, keys: 10_000, size: 1000}
	e := expectation{Count: f.rows, Conduct: map[string]conduct{"/slow": {Delay: slowAnswer}}}
	plain := map[string]measured{}
	faster := clients[0]
	for _, client := range clients {
		e.First = l.takeIDs(f.rows)
		o := limitOrder{Count: f.rows, Client: client, Workers: slowWorkers, URL: l.url("slow"), First: e.First, Size: f.size}
		m, err := l.limit(ctx, roleSend, o, &e)
		if err != nil {
			return err
		}
		plain[client] = m
		if m.rate > plain[faster].rate {
			faster = client
		}
		l.report.add("send "+client, "peak RSS", mebibytes(m.usage.peak), "MiB", demand{})
	}
	e.Signed = true
	curves := []curve{}
	for _, v := range []struct {
		of, buffer string
		demanded   bool
	}{
		{"buffer as by default", "", true},
		// While the buffer is full, walhook parks what waits for a quarter of spill_after: less than 10,000
		// events take here. So this one shows what it does when it is more patient.
		{"spill_after 10s", "buffer: {spill_after: 10s}\n", false},
	} {
		m, err := l.slowly(ctx, f, e, v.buffer)
		if err != nil {
			return fmt.Errorf("%s: %w", v.of, err)
		}
		l.say("%s: %s/s, send %s %s/s, %d parked", v.of, number(m.rate), faster, number(plain[faster].rate), m.written.parked)
		ceiling := slowWorkers / slowAnswer.Seconds()
		// Of the ceiling and the faster sender, the lower one may be asked for.
		toCeiling, toPlain, rss := demand{}, demand{}, demand{}
		if v.demanded {
			rss = atMost(150)
			if plain[faster].rate < ceiling {
				toPlain = atLeast(0.8)
			} else {
				toCeiling = atLeast(0.8)
			}
		}
		l.report.compare(v.of, "deliveries", m.rate, "/s", ceiling, "ceiling", m.rate/ceiling, toCeiling)
		for _, client := range clients {
			d := demand{}
			if client == faster {
				d = toPlain
			}
			l.report.compare(v.of, "deliveries", m.rate, "/s", plain[client].rate, "send "+client, m.rate/plain[client].rate, d)
		}
		l.report.add(v.of, "CPU a delivery", m.cpu, "µs", demand{})
		l.report.add(v.of, "parked", float64(m.written.parked), "", demand{})
		l.report.add(v.of, "peak RSS", mebibytes(m.usage.peak), "MiB", rss)
		curves = append(curves, curve{v.of, m.seen.Rate})
	}
	for _, client := range clients {
		curves = append(curves, curve{"send " + client, plain[client].seen.Rate})
	}
	l.report.Plots = append(l.report.Plots, ratePlot("5-throughput", "A receiver that answers after 100 ms, 2,000 in flight: deliveries a second", curves...))
	return nil
}

func (l *lab) slowly(ctx context.Context, f form, e expectation, buffer string) (m measured, err error) {
	endpoint := l.endpoint("slow", "ordering: none", fmt.Sprintf("concurrency: %d", slowWorkers))
	db, err := l.prepared(ctx, endpoint)
	if err != nil {
		return m, err
	}
	db.sections = buffer
	e.First = l.takeIDs(f.rows)
	if err := db.fill(ctx, e.First, f.rows, f.per, f.keys, f.size); err != nil {
		return m, err
	}
	if m, err = db.deliver(ctx, db.slot+"-slow", e, nil, endpoint); err != nil {
		return m, err
	}
	return m, db.drop(ctx)
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
