package main

import (
	"context"
	"time"
)

// app is scenario 12: what the app's own inserts lose, and what walhook writes.
func app(ctx context.Context, l *lab) error {
	const of = "8 connections insert"
	rows := l.rows(100_000)
	var rate [2][]float64 // without, with
	for turn := range 4 {
		with := turn%2 == 1
		db, err := l.database(ctx)
		if err != nil {
			return err
		}
		e := expectation{First: l.takeIDs(rows), Count: rows, Keys: 1000, Signed: true}
		var inserted float64
		insert := func(*sidecar) error {
			load, err := db.steady(ctx, e.First, rows, asFastAsItGoes, 1000, 1000)
			inserted = perSecond(rows, load.span)
			return err
		}
		if with {
			_, err = db.deliver(ctx, db.slot+"-app", e, insert, l.endpoint("drain"))
		} else {
			err = insert(nil)
		}
		if err != nil {
			return err
		}
		i := map[bool]int{false: 0, true: 1}[with]
		rate[i] = append(rate[i], inserted)
		l.say("%s walhook: %s inserts/s", []string{"without", "with"}[i], number(inserted))
		if err := db.drop(ctx); err != nil {
			return err
		}
	}
	lost := median(ratios(rate[1], rate[0]))
	l.report.compare(of, "inserts beside walhook", median(rate[1]), "/s", median(rate[0]), "without", lost, demand{})
	l.report.add(of, "lost", (1-lost)*100, "%", demand{})
	return l.appWrites(ctx)
}

func (l *lab) appWrites(ctx context.Context) error {
	rows := l.rows(1_000_000)
	f := form{rows: rows, per: 1, keys: 10_000, size: 200}
	db, err := l.prepared(ctx, l.endpoint("drain"))
	if err != nil {
		return err
	}
	// Start and end have writes of their own, which are the same with and without events.
	before, err := db.written(ctx)
	if err != nil {
		return err
	}
	s, err := db.walhook(ctx, db.slot+"-empty", l.endpoint("drain"))
	if err != nil {
		return err
	}
	if _, err := s.end(); err != nil {
		return err
	}
	after, err := db.written(ctx)
	if err != nil {
		return err
	}
	around := after.since(before).all
	e := expectation{First: l.takeIDs(rows), Count: rows, Keys: int64(f.keys), Signed: true}
	if err := db.fill(ctx, e.First, rows, f.per, f.keys, f.size); err != nil {
		return err
	}
	began := time.Now()
	m, err := db.drainOwn(ctx, f, db.slot+"-writes", e)
	if err != nil {
		return err
	}
	whole := time.Since(began)
	of := number(float64(rows)) + " events"
	l.report.add(of, "delivered in", m.seen.span().Seconds(), "s", demand{})
	l.report.add(of, "parked", float64(m.written.parked), "", demand{})
	l.report.add(of, "rows written to the database", float64(m.written.all), "", demand{})
	l.report.add(of, "of them by a run without events", float64(around), "", demand{})
	l.report.add(of, "rows written a second, without those", perSecond(int(m.written.all-around), whole), "/s", atMost(1))
	return db.drop(ctx)
}
