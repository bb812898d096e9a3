package cdc

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Schema is what one look finds of the schema walhook, where the checkpoint and what is parked live.
type Schema struct {
	Database string
	Role     string
	Pooler   string // what stands between us and Postgres; empty where nothing does
	Prepares bool   // the URL has the store prepare statements, which a session keeps
	System   string // system_identifier; empty where it could not be asked
	ReadOnly bool
	CreateDB bool // the role may create in the database

	Exists bool
	Usage  bool
	Create bool     // the role may create in it
	Owned  bool     // the role may alter it and all that is in it
	Denied []string // tables and functions in it that the role may not use

	Version     int // of the last migration; zero where there is none, or where it cannot be read
	Readable    bool
	Checkpoints []Checkpointed
	FlushLSN    LSN // how far the WAL was flushed after the checkpoints had been read
}

// Checkpointed is a row of walhook.checkpoints.
type Checkpointed struct {
	Slot string
	Record
}

const schemaSQL = `
select current_database(), current_user, current_setting('transaction_read_only')::bool,
       has_database_privilege(current_database(), 'create'),
       n.oid is not null,
       coalesce(has_schema_privilege(n.oid, 'usage'), false),
       coalesce(has_schema_privilege(n.oid, 'create'), false),
       coalesce(pg_has_role(n.nspowner, 'usage'), false)
         and not exists (select from pg_class c where c.relnamespace = n.oid and not pg_has_role(c.relowner, 'usage')),
       array(select c.relname::text from pg_class c where c.relnamespace = n.oid and c.relkind in ('r', 'p')
             and not (has_table_privilege(c.oid, 'select') and has_table_privilege(c.oid, 'insert')
                      and has_table_privilege(c.oid, 'update') and has_table_privilege(c.oid, 'delete'))
             order by 1)
         || array(select p.proname || '()' from pg_proc p where p.pronamespace = n.oid and not has_function_privilege(p.oid, 'execute') order by 1),
       exists (select from pg_class c where c.relnamespace = n.oid and c.relname = 'schema_migrations' and has_table_privilege(c.oid, 'select')),
       exists (select from pg_class c where c.relnamespace = n.oid and c.relname = 'checkpoints' and has_table_privilege(c.oid, 'select'))
from (select) as one
left join pg_namespace n on n.nspname = 'walhook'`

const schemaVersionSQL = `
select coalesce(max(version), 0)
from walhook.schema_migrations`

// What a migration to come brings is read where it is there already.
const checkpointsSQL = `
select slot, lsn::text, coalesce(snap_xmin, 0)::text::bigint,
       coalesce((to_jsonb(c) ->> 'proven_xmin')::bigint, 0), coalesce(to_jsonb(c) ->> 'gap', ''), to_jsonb(c) -> 'tables'
from walhook.checkpoints c
order by slot`

const flushedSQL = `
select (case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_flush_lsn() end)::text`

const systemSQL = `
select system_identifier::text
from pg_control_system()`

// InspectSchema looks at the schema walhook as the store's connections see it, which may go
// another way than those of replication. The error is a *Fault.
func InspectSchema(ctx context.Context, url func() (string, error)) (*Schema, error) {
	cfg := &Config{URL: url}
	conn, err := cfg.connectPooled(ctx)
	if err != nil {
		return nil, connectFault(err)
	}
	defer closeSQL(conn)
	sc, err := inspectSchema(ctx, conn)
	if err != nil {
		return nil, FaultOf(err)
	}
	var backend uint32
	if err := conn.QueryRow(ctx, "select pg_backend_pid()").Scan(&backend); err != nil {
		return nil, FaultOf(fmt.Errorf("ask for the process id: %w", err))
	}
	provider, err := providerOf(ctx, conn)
	if err != nil {
		return nil, FaultOf(err)
	}
	sc.Pooler = poolerOf(conn, routeOf(conn), backend, provider)
	if asked, err := cfg.parse(); err == nil {
		sc.Prepares = asked.DefaultQueryExecMode == pgx.QueryExecModeCacheStatement
	}
	return sc, nil
}

func inspectSchema(ctx context.Context, conn *pgx.Conn) (*Schema, error) {
	sc := &Schema{}
	var migrations, checkpoints bool
	err := conn.QueryRow(ctx, schemaSQL).Scan(&sc.Database, &sc.Role, &sc.ReadOnly, &sc.CreateDB, &sc.Exists, &sc.Usage, &sc.Create, &sc.Owned,
		&sc.Denied, &migrations, &checkpoints)
	if err != nil {
		return nil, fmt.Errorf("look at schema walhook: %w", err)
	}
	var pg *pgconn.PgError
	err = conn.QueryRow(ctx, systemSQL).Scan(&sc.System)
	if err != nil && !(errors.As(err, &pg) && pg.Code == codeDenied) { // everybody may, unless somebody revoked it
		return nil, fmt.Errorf("identify server: %w", err)
	}
	if sc.Usage && migrations {
		if err := conn.QueryRow(ctx, schemaVersionSQL).Scan(&sc.Version); err != nil {
			return nil, fmt.Errorf("read version: %w", err)
		}
		sc.Readable = true
	}
	if sc.Usage && checkpoints {
		rows, _ := conn.Query(ctx, checkpointsSQL) // its error comes from CollectRows
		sc.Checkpoints, err = pgx.CollectRows(rows, func(r pgx.CollectableRow) (c Checkpointed, err error) {
			var at string
			if err = r.Scan(&c.Slot, &at, &c.Xmin, &c.Proven, &c.Gap, &c.Tables); err == nil {
				c.LSN, err = ParseLSN(at)
			}
			return c, err
		})
		if err != nil {
			return nil, fmt.Errorf("read checkpoints: %w", err)
		}
	}
	var flushed string
	if err := conn.QueryRow(ctx, flushedSQL).Scan(&flushed); err != nil {
		return nil, fmt.Errorf("read the end of the WAL: %w", err)
	}
	if sc.FlushLSN, err = ParseLSN(flushed); err != nil {
		return nil, err
	}
	return sc, nil
}
