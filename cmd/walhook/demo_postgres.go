package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/cdc/pgtest"
)

// demoMark is the comment on the schemas that the demo made, so that it never drops another's.
const demoMark = "made by walhook demo, which drops it at its end"

// demoDatabase is the shop's database: a throwaway Postgres, or one that was given.
type demoDatabase struct {
	url    string
	slot   string         // slots are the whole server's, hence a name for each database
	server *pgtest.Server // nil where a database was given
	conn   *pgx.Conn      // of the story alone
	origin cdc.LSN        // where the WAL ended before the shop opened
	made   bool
}

// openDemoDatabase finds a Postgres, says which, and makes the shop's tables there.
func openDemoDatabase(ctx context.Context, given string, out *screen) (*demoDatabase, error) {
	db := &demoDatabase{url: given, slot: "walhook_demo"}
	which := "yours; the schemas walhook_demo and walhook go at the end"
	if given == "" {
		var err error
		if which, err = db.startServer(ctx, out); err != nil {
			return nil, err
		}
	}
	err := db.connect(ctx)
	if err != nil && given != "" {
		err = fmt.Errorf("--database-url: %w", err)
	}
	if err == nil {
		out.line("  Postgres    " + db.conn.PgConn().ParameterStatus("server_version") + ", " + which)
	}
	if err == nil {
		err = db.create(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, db.close())
	}
	return db, nil
}

// startServer also says where the server's programs are from.
func (db *demoDatabase) startServer(ctx context.Context, out *screen) (from string, err error) {
	bin, err := pgtest.Find()
	from = "of "
	if errors.Is(err, pgtest.ErrNoPostgres) {
		out.line("  Postgres    none on this machine, so one is fetched once (about 30 MB)")
		from = "fetched to "
		bin, err = pgtest.Fetch(ctx, out)
	}
	if err != nil {
		return "", fmt.Errorf("%w; or give a database of yours: --database-url", err)
	}
	if db.server, err = pgtest.Start(ctx, pgtest.Config{Bin: bin}); err != nil {
		return "", err
	}
	db.url = db.server.URL()
	return from + bin + ", a throwaway server", nil
}

// directory is for the demo's files. In that of a throwaway server they go with it, however we end.
func (db *demoDatabase) directory() (string, error) {
	parent := ""
	if db.server != nil {
		parent = db.server.Dir()
	}
	return os.MkdirTemp(parent, "walhook-demo-")
}

func (db *demoDatabase) connect(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	if db.conn, err = pgx.Connect(ctx, db.url); err != nil {
		return cdc.FaultOf(err)
	}
	return nil
}

// shown is the address without a password.
func (db *demoDatabase) shown() string {
	u, err := url.Parse(db.url)
	if err != nil || u.Host == "" {
		return "the database that you gave"
	}
	return u.Redacted()
}

// The shop's tables. A row's version counts its events: whoever changes a row locks it until the
// commit, so versions rise in commit order, and tell later in which order a key's events have to come.
const createShop = `
create schema walhook_demo;
comment on schema walhook_demo is '` + demoMark + `';
create table walhook_demo.outbox (
	id uuid primary key default gen_random_uuid(),
	event_type text not null,
	aggregate_id text not null,
	payload jsonb not null,
	headers jsonb,
	created_at timestamptz not null default clock_timestamp()
);
create table walhook_demo.products (
	id int primary key,
	title text not null,
	stock int not null,
	waiting int not null default 0,
	version int not null default 0
);
create table walhook_demo.orders (
	id bigint generated always as identity primary key,
	product text not null,
	customer text not null,
	status text not null,
	version int not null default 1,
	updated_at timestamptz not null default clock_timestamp()
);
create index on walhook_demo.orders (updated_at) where status <> 'delivered';`

// create makes the schemas. That of walhook is made here only to carry the mark: its tables are
// walhook's own business.
func (db *demoDatabase) create(ctx context.Context) error {
	if db.server == nil {
		const lock = `
select pg_try_advisory_lock(hashtextextended('walhook.demo', 0)), 'walhook_demo_' || oid
from pg_database
where datname = current_database()`
		var alone bool
		if err := db.conn.QueryRow(ctx, lock).Scan(&alone, &db.slot); err != nil {
			return err
		}
		if !alone {
			return errors.New("another walhook demo runs in this database")
		}
		for _, schema := range []string{"walhook", "walhook_demo"} {
			var exists, ours bool
			const look = "select count(*) > 0, coalesce(bool_or(obj_description(oid, 'pg_namespace') = $2), false) from pg_namespace where nspname = $1"
			if err := db.conn.QueryRow(ctx, look, schema, demoMark).Scan(&exists, &ours); err != nil {
				return err
			}
			if exists && !ours {
				return fmt.Errorf("this database has a schema %s already, which the demo leaves alone: give it another database (create database walhook_demo)", schema)
			}
		}
		db.made = true
		if err := db.drop(ctx); err != nil { // what a demo that was killed has left
			return fmt.Errorf("clear up after an earlier demo: %w", err)
		}
	}
	if _, err := db.conn.Exec(ctx, createShop+"create schema walhook; comment on schema walhook is '"+demoMark+"'"); err != nil {
		return fmt.Errorf("make the shop's tables: %w", err)
	}
	var err error
	db.origin, err = db.end(ctx)
	return err
}

func (db *demoDatabase) end(ctx context.Context) (cdc.LSN, error) {
	var text string
	if err := db.conn.QueryRow(ctx, "select pg_current_wal_lsn()::text").Scan(&text); err != nil {
		return 0, err
	}
	return cdc.ParseLSN(text)
}

// slotWAL is the WAL that was written since the demo began, and what of it the slot needs.
type slotWAL struct{ written, unconfirmed, kept int64 }

const askSlot = `
select
	pg_wal_lsn_diff(pg_current_wal_lsn(), $2::text::pg_lsn)::bigint,
	pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)::bigint,
	pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint
from pg_replication_slots
where slot_name = $1`

func (db *demoDatabase) slotWAL(ctx context.Context) (w slotWAL, err error) {
	// An interruption must not cost the connection, which is needed to clear up.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	err = db.conn.QueryRow(ctx, askSlot, db.slot, db.origin.String()).Scan(&w.written, &w.unconfirmed, &w.kept)
	return w, err
}

const askLeftovers = `
select
	(select count(*) from walhook.deliveries),
	(select confirmed_flush_lsn >= $2::text::pg_lsn from pg_replication_slots where slot_name = $1)`

// leftovers tells what is not as it should be when everything has arrived. last is the place in
// the WAL of the last row.
func (db *demoDatabase) leftovers(ctx context.Context, last string) (left []string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	var rows int
	var confirmed *bool
	if err := db.conn.QueryRow(ctx, askLeftovers, db.slot, last).Scan(&rows, &confirmed); err != nil {
		return []string{"the database: " + err.Error()}
	}
	if rows > 0 {
		left = append(left, fmt.Sprintf("walhook.deliveries still has %s rows although everything arrived", thousands(rows)))
	}
	switch {
	case confirmed == nil:
		left = append(left, "the slot "+db.slot+" is gone")
	case !*confirmed:
		left = append(left, "the slot still keeps WAL of events that have arrived")
	}
	return left
}

const dropSlot = `
select pg_drop_replication_slot(slot_name)
from pg_replication_slots
where slot_name = $1
and database = current_database()
and not active`

const slotLeft = `
select count(*)
from pg_replication_slots
where slot_name = $1
and database = current_database()`

// The schema walhook stays where another walhook has moved in meanwhile.
const dropRest = `
drop publication if exists walhook_demo, walhook_demo_endpoints;
drop schema if exists walhook_demo cascade;
do $$
begin
	if to_regclass('walhook.checkpoints') is not null then
		if exists (select from walhook.checkpoints where slot not like 'walhook\_demo%') then
			return;
		end if;
	end if;
	drop schema if exists walhook cascade;
end
$$`

// drop removes all that a demo makes in a database. The slot goes when the server has noticed
// that its reader did.
func (db *demoDatabase) drop(ctx context.Context) error {
	for {
		if _, err := db.conn.Exec(ctx, dropSlot, db.slot); err != nil {
			return err
		}
		var left int
		if err := db.conn.QueryRow(ctx, slotLeft, db.slot).Scan(&left); err != nil {
			return err
		}
		if left == 0 {
			break
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("the slot %s is still in use: %w", db.slot, ctx.Err())
		}
	}
	_, err := db.conn.Exec(ctx, dropRest)
	return err
}

// close leaves nothing behind. It may come after a failed open.
func (db *demoDatabase) close() (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if db.made {
		if db.conn.IsClosed() {
			err = db.connect(ctx)
		}
		if err == nil {
			err = db.drop(ctx)
		}
		if err != nil {
			err = fmt.Errorf("clear up the database: %w (what is left: the slot %s, the publication walhook_demo, the schemas walhook_demo and walhook; the next demo there drops them)", err, db.slot)
		}
	}
	if db.conn != nil {
		err = errors.Join(err, db.conn.Close(ctx))
	}
	if db.server != nil {
		err = errors.Join(err, db.server.Close())
	}
	return err
}
