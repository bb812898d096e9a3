package main

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
)

// database is one scenario's: an outbox without a column for a time, so that an event's is its commit's.
type database struct {
	lab  *lab
	url  string
	slot string // also the publication
	conn *pgx.Conn

	// What else is to stand in walhook's configuration: of the outbox table, as ", columns: {…}",
	// and sections, each with its line's end.
	columns, sections string
}

const schema = `
create table outbox (id bigint primary key, aggregate_id text, event_type text, payload jsonb);
create procedure fill(first bigint, rows int, per int, keys int, pad text, len int) language plpgsql as $$
begin
	for i in 0 .. rows - 1 loop
		insert into outbox values (first + i, 'key-' || (first + i) % keys, '` + eventType + `',
			jsonb_build_object('at', 0, 'pad', substr(pad, 1 + i % 4096 * 7919 % 4096, len)));
		if i % per = per - 1 then
			commit;
		end if;
	end loop;
	commit;
end $$`

func (l *lab) database(ctx context.Context) (*database, error) {
	l.made++
	name := fmt.Sprintf("bench_%03d", l.made)
	admin, err := pgx.Connect(ctx, l.server.URL())
	if err != nil {
		return nil, err
	}
	defer admin.Close(ctx)
	if _, err := admin.Exec(ctx, "create database "+name+" template template0"); err != nil {
		return nil, err
	}
	db := &database{lab: l, url: l.server.URLFor(name), slot: name}
	if db.conn, err = pgx.Connect(ctx, db.url); err != nil {
		return nil, err
	}
	_, err = db.conn.PgConn().Exec(ctx, schema).ReadAll()
	return db, err
}

// drop makes room for the next one, and lets the WAL go.
func (db *database) drop(ctx context.Context) error {
	err := db.dropSlots(ctx, db.slot)
	_ = db.conn.Close(ctx)
	if err != nil {
		return err
	}
	admin, err := pgx.Connect(ctx, db.lab.server.URL())
	if err != nil {
		return err
	}
	defer admin.Close(ctx)
	_, err = admin.Exec(ctx, "drop database "+db.slot)
	return err
}

// copySlot makes a slot behind all that was written so far, for a limit that reads what walhook will. walhook's own may be a transaction
// behind: where it was stopped before it had read the end of the last one, only its checkpoint knows that all of that was delivered.
func (db *database) copySlot(ctx context.Context, name string) (slot string, err error) {
	slot = db.slot + "_" + name
	_, err = db.conn.Exec(ctx, `
select pg_replication_slot_advance(copy.slot_name, pg_current_wal_lsn())
from pg_copy_logical_replication_slot($1, $2) copy`, db.slot, slot)
	if err != nil {
		return "", fmt.Errorf("copy slot: %w", err)
	}
	return slot, nil
}

// dropSlots drops those that begin so, once their walsenders have seen that nobody is there any more.
func (db *database) dropSlots(ctx context.Context, prefix string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	return eventually(ctx, "drop slots", func() (bool, error) {
		var left int
		if _, err := db.conn.Exec(ctx, "select pg_drop_replication_slot(slot_name) from pg_replication_slots where starts_with(slot_name, $1) and active_pid is null", prefix); err != nil {
			return false, err
		}
		err := db.conn.QueryRow(ctx, "select count(*) from pg_replication_slots where starts_with(slot_name, $1)", prefix).Scan(&left)
		return left == 0, err
	})
}

// fill commits rows of size bytes, some to a transaction, in the order of their ids.
func (db *database) fill(ctx context.Context, first int64, rows, per, keys, size int) error {
	long := max(0, size-payloadFrame)
	call := fmt.Sprintf("call fill(%d, %d, %d, %d, '%s', %d)", first, rows, per, keys, padding(long+4096), long)
	_, err := db.conn.PgConn().Exec(ctx, call).ReadAll()
	if err == nil {
		// Else the hint bits of all these rows are written by whoever reads them next.
		_, err = db.conn.Exec(ctx, "checkpoint")
	}
	if err != nil {
		return fmt.Errorf("fill outbox: %w", err)
	}
	return nil
}

// pacers are the connections of a steady load. Each has keys of its own, so that the order of ids
// is that of commits for each key.
const pacers = 8

// loadResult is how a steady load went.
type loadResult struct {
	inserts []int64 // nanoseconds that each INSERT took
	late    int     // sent more than lateAfter behind the schedule
	worst   time.Duration
	span    time.Duration // of all of it
}

const lateAfter = 5 * time.Millisecond

// asFastAsItGoes is the rate of a load in which each connection waits for its commit and for nothing else.
const asFastAsItGoes = 0

// steady inserts rows at a rate by a schedule that waits for nobody, each in a transaction of its own.
func (db *database) steady(ctx context.Context, first int64, rows, rate, keys, size int) (loadResult, error) {
	if keys%pacers != 0 {
		return loadResult{}, fmt.Errorf("%d keys cannot be shared out to %d connections", keys, pacers)
	}
	pad := padding(size)
	results := make([]loadResult, pacers)
	conns := make([]*pgx.Conn, pacers)
	defer func() {
		for _, c := range conns {
			if c != nil {
				_ = c.Close(context.WithoutCancel(ctx))
			}
		}
	}()
	for i := range conns {
		var err error
		if conns[i], err = pgx.Connect(ctx, db.url); err != nil {
			return loadResult{}, err
		}
		if _, err = conns[i].Prepare(ctx, "insert", insertRow); err != nil {
			return loadResult{}, err
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	begin := time.Now().Add(100 * time.Millisecond)
	for p, conn := range conns {
		g.Go(func() error {
			result := &results[p]
			// The ids of a connection are those that leave its number over.
			from := (int64(p) - first%pacers + pacers) % pacers
			for i := from; i < int64(rows); i += pacers {
				due := begin
				if rate != asFastAsItGoes {
					due = begin.Add(time.Duration(math.Round(float64(i) / float64(rate) * float64(time.Second))))
				}
				if err := until(ctx, due); err != nil {
					return err
				}
				now := time.Now()
				if behind := now.Sub(due); behind > lateAfter {
					result.late++
					result.worst = max(result.worst, behind)
				}
				id := first + i
				if _, err := conn.Exec(ctx, "insert", id, fmt.Sprintf("key-%d", id%int64(keys)), eventType, payload(now.UnixNano(), pad, size)); err != nil {
					return fmt.Errorf("insert: %w", err)
				}
				result.inserts = append(result.inserts, int64(time.Since(now)))
			}
			return nil
		})
	}
	err := g.Wait()
	all := loadResult{span: time.Since(begin)}
	for _, r := range results {
		all.inserts = append(all.inserts, r.inserts...)
		all.late += r.late
		all.worst = max(all.worst, r.worst)
	}
	return all, err
}

const insertRow = "insert into outbox values ($1, $2, $3, $4)"

func until(ctx context.Context, due time.Time) error {
	wait := time.Until(due)
	if wait <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
