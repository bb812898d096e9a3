package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// walKept is how much WAL a slot kept at most, in bytes.
type walKept struct {
	// kept is what the server keeps for the slot, from its restart_lsn on. That moves when the slot has
	// confirmed a later record of running transactions, of which Postgres writes one every 15 s.
	kept int64
	owed int64 // from what walhook has confirmed

	written int64         // WAL that all have written meanwhile
	span    time.Duration // between the first look and the last
}

// snapshotEvery is how often Postgres writes the record that lets a slot's restart_lsn move. So long
// no consumer can let WAL go, whatever it confirms.
const snapshotEvery = 15 * time.Second

// rate is the WAL written in a second, in MiB.
func (w walKept) rate() float64 { return mebibytes(w.written) / w.span.Seconds() }

// add reports what was kept. What is demanded is that what walhook decides, namely what is confirmed.
func (w walKept) add(r *Report, of, beside string, d demand) {
	r.add(of, "WAL written"+beside, w.rate(), "MiB/s", demand{})
	r.add(of, "WAL not confirmed at most"+beside, mebibytes(w.owed), "MiB", d)
	inPeriod := w.rate() * min(snapshotEvery, w.span).Seconds()
	r.compare(of, "WAL kept at most"+beside, mebibytes(w.kept), "MiB", inPeriod, "written in 15 s", mebibytes(w.kept)/inPeriod, demand{})
}

// watchWAL looks each second, from now until the result is asked for.
func (db *database) watchWAL(ctx context.Context) (end func() (walKept, error), err error) {
	conn, err := pgx.Connect(ctx, db.url)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	type answer struct {
		walKept
		err error
	}
	answers := make(chan answer, 1)
	go func() {
		var most answer
		var began time.Time
		var first int64
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		defer func() {
			_ = conn.Close(context.WithoutCancel(ctx))
			answers <- most
		}()
		for {
			var kept, owed, at int64
			if err := conn.QueryRow(ctx, slotKeeps, db.slot).Scan(&kept, &owed, &at); err != nil {
				if ctx.Err() == nil && !errors.Is(err, pgx.ErrNoRows) {
					most.err = fmt.Errorf("watch WAL: %w", err)
				}
				return
			}
			if began.IsZero() {
				began, first = time.Now(), at
			}
			most.written, most.span = at-first, time.Since(began)
			most.kept, most.owed = max(most.kept, kept), max(most.owed, owed)
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	}()
	return func() (walKept, error) {
		cancel()
		a := <-answers
		return a.walKept, a.err
	}, nil
}

const slotKeeps = `
select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), restart_lsn)::bigint,
       pg_wal_lsn_diff(pg_current_wal_insert_lsn(), confirmed_flush_lsn)::bigint,
       pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint
from pg_replication_slots
where slot_name = $1`
