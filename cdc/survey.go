package cdc

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Table names a table to be published, as the catalogue spells it.
type Table struct {
	Schema string
	Name   string
}

// String is the name as SQL takes it.
func (t Table) String() string { return pgx.Identifier{t.Schema, t.Name}.Sanitize() }

// Survey is what one look at a database finds about everything the stream needs. The stream
// and `walhook check` judge by the same Survey, so that they cannot disagree.
type Survey struct {
	Version     int // server_version_num, 150018
	Database    string
	Role        string
	WALLevel    string
	Recovering  bool
	ReadOnly    bool
	Replication bool   // the role may open replication connections
	CreateDB    bool   // the role may create in the database
	FlushLSN    LSN    // how far the WAL is flushed
	KeepSize    int64  // max_slot_wal_keep_size in MB; -1 is no limit
	SlotsFree   int    // of max_replication_slots
	SendersFree int    // of max_wal_senders
	SyncNames   string // synchronous_standby_names

	SenderTimeout time.Duration // wal_sender_timeout; zero is none

	Slot        *Slot   // nil where there is none of the name
	Tables      []Found // one for each of Config.Tables, in their order
	Publication *Publication
}

// Slot is a row of pg_replication_slots.
type Slot struct {
	Name      string
	Plugin    string
	Database  string
	ActivePID int32
	WALStatus string // reserved, extended, unreserved, lost
	Invalid   string // invalidation_reason, Postgres 17 and later
	Temporary bool
	Restart   LSN
	Confirmed LSN
	Retained  int64 // bytes of WAL that the slot keeps
}

// Publication is a row of pg_publication.
type Publication struct {
	Name      string
	AllTables bool
	Insert    bool
	ViaRoot   bool
}

// Found is what the catalogue has under a Table's name.
type Found struct {
	Table
	OID         uint32 // zero where there is no such table
	Kind        byte   // relkind: r table, p partitioned table
	Unlogged    bool
	Select      bool // the role may read it
	Columns     []Column
	Types       []string // of Columns, as format_type prints them
	Published   bool
	RowFilter   string   // of the publication, Postgres 15 and later
	Unpublished []string // columns that the publication leaves out
}

// Relation is the table as the stream will announce it.
func (f *Found) Relation() *Relation {
	return &Relation{OID: f.OID, Schema: f.Schema, Name: f.Name, Columns: f.Columns}
}

// Inspect looks at the database that cfg names. The error is a *Fault where the database
// cannot be asked at all.
func Inspect(ctx context.Context, cfg *Config) (*Survey, error) {
	conn, err := cfg.connectSQL(ctx)
	if err != nil {
		return nil, FaultOf(err)
	}
	defer closeSQL(conn)
	s, err := survey(ctx, conn, cfg)
	if err != nil {
		return nil, FaultOf(err)
	}
	return s, nil
}

const surveySQL = `
select current_setting('server_version_num')::int,
       current_database(),
       current_user,
       current_setting('wal_level'),
       pg_is_in_recovery(),
       current_setting('transaction_read_only')::bool,
       (select rolreplication or rolsuper from pg_roles where rolname = current_user)
         or exists (select from pg_roles where rolname = 'rds_replication' and pg_has_role(oid, 'usage')),
       has_database_privilege(current_database(), 'create'),
       (case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_flush_lsn() end)::text,
       (select setting::bigint from pg_settings where name = 'max_slot_wal_keep_size'),
       current_setting('max_replication_slots')::int - (select count(*)::int from pg_replication_slots),
       current_setting('max_wal_senders')::int - (select count(*)::int from pg_stat_replication),
       current_setting('synchronous_standby_names'),
       (select setting::bigint from pg_settings where name = 'wal_sender_timeout')`

const slotSQL = `
select slot_name, coalesce(plugin, ''), coalesce(database, ''), coalesce(active_pid, 0), coalesce(wal_status, ''),
       coalesce(to_jsonb(s) ->> 'invalidation_reason', ''), temporary,
       coalesce(restart_lsn::text, '0/0'), coalesce(confirmed_flush_lsn::text, '0/0'),
       case when pg_is_in_recovery() then 0 else coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), 0) end::bigint
from pg_replication_slots s
where slot_name = $1`

const publicationSQL = `
select pubname, puballtables, pubinsert, pubviaroot
from pg_publication
where pubname = $1`

// The publication's view of a table knows row filters and column lists from 15 on; to_jsonb
// reads them where they are. A table published by way of its partition root is listed under
// the root's name.
const tableSQL = `
select c.oid, c.relkind::text, c.relpersistence = 'u',
       has_table_privilege(c.oid, 'select'),
       coalesce((select array_agg(a.attname::text order by a.attnum) from pg_attribute a
                 where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped), '{}'),
       coalesce((select array_agg(a.atttypid order by a.attnum) from pg_attribute a
                 where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped), '{}'),
       coalesce((select array_agg(format_type(a.atttypid, a.atttypmod) order by a.attnum) from pg_attribute a
                 where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped), '{}'),
       p.tablename is not null,
       coalesce(to_jsonb(p) ->> 'rowfilter', ''),
       coalesce((select array_agg(a.attname::text) from pg_attribute a
                 where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
                   and p.tablename is not null and to_jsonb(p) -> 'attnames' is not null
                   and not to_jsonb(p) -> 'attnames' ? a.attname), '{}')
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
left join pg_publication_tables p on p.pubname = $3 and p.schemaname = n.nspname and p.tablename = c.relname
where n.nspname = $1 and c.relname = $2 and c.relkind in ('r', 'p', 'v', 'm', 'f')`

func survey(ctx context.Context, conn *pgx.Conn, cfg *Config) (*Survey, error) {
	s := &Survey{}
	var flushed string
	var timeout int64 // milliseconds
	err := conn.QueryRow(ctx, surveySQL).Scan(&s.Version, &s.Database, &s.Role, &s.WALLevel, &s.Recovering, &s.ReadOnly,
		&s.Replication, &s.CreateDB, &flushed, &s.KeepSize, &s.SlotsFree, &s.SendersFree, &s.SyncNames, &timeout)
	if err != nil {
		return nil, fmt.Errorf("survey: %w", err)
	}
	s.SenderTimeout = time.Duration(timeout) * time.Millisecond
	if s.FlushLSN, err = ParseLSN(flushed); err != nil {
		return nil, err
	}
	if s.Slot, err = readSlot(ctx, conn, cfg.Slot); err != nil {
		return nil, err
	}
	p := &Publication{}
	err = conn.QueryRow(ctx, publicationSQL, cfg.Publication).Scan(&p.Name, &p.AllTables, &p.Insert, &p.ViaRoot)
	switch {
	case err == nil:
		s.Publication = p
	case !errors.Is(err, pgx.ErrNoRows):
		return nil, fmt.Errorf("read publication: %w", err)
	}
	for _, t := range cfg.Tables {
		f := Found{Table: t}
		var kind string
		var types []uint32
		var names []string
		err := conn.QueryRow(ctx, tableSQL, t.Schema, t.Name, cfg.Publication).
			Scan(&f.OID, &kind, &f.Unlogged, &f.Select, &names, &types, &f.Types, &f.Published, &f.RowFilter, &f.Unpublished)
		if err != nil && !errors.Is(err, pgx.ErrNoRows) {
			return nil, fmt.Errorf("read table %s: %w", t, err)
		}
		if err == nil {
			f.Kind = kind[0]
			for i, n := range names {
				f.Columns = append(f.Columns, Column{Name: n, TypeOID: types[i]})
			}
		}
		s.Tables = append(s.Tables, f)
	}
	return s, nil
}

func readSlot(ctx context.Context, conn *pgx.Conn, name string) (*Slot, error) {
	s := &Slot{}
	var restart, confirmed string
	err := conn.QueryRow(ctx, slotSQL, name).Scan(&s.Name, &s.Plugin, &s.Database, &s.ActivePID, &s.WALStatus,
		&s.Invalid, &s.Temporary, &restart, &confirmed, &s.Retained)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read slot: %w", err)
	}
	if s.Restart, err = ParseLSN(restart); err != nil {
		return nil, err
	}
	if s.Confirmed, err = ParseLSN(confirmed); err != nil {
		return nil, err
	}
	return s, nil
}

// Finding is one line of what a Survey means: well, a warning, or a fault that keeps the
// stream from running.
type Finding struct {
	Topic string // server, role, wal_level, table, publication, slot
	Text  string
	Fault *Fault // nil where all is well
	Warn  string // what might hurt later, with what to do; empty where nothing
}

// Findings judges the survey, in the order in which a start meets the obstacles. What
// create may make by itself is not a fault while it is missing.
func (s *Survey) Findings(cfg *Config) []Finding {
	var out []Finding
	ok := func(topic, format string, a ...any) {
		out = append(out, Finding{Topic: topic, Text: fmt.Sprintf(format, a...)})
	}
	bad := func(topic string, f *Fault) {
		if f.State == "" {
			f.State = Waiting
		}
		out = append(out, Finding{Topic: topic, Text: f.Reason, Fault: f})
	}
	warn := func(topic, text, what string) {
		out = append(out, Finding{Topic: topic, Text: text, Warn: what})
	}

	version := fmt.Sprintf("%d.%d", s.Version/10000, s.Version%10000)
	switch {
	case s.Version < 140000:
		bad("server", &Fault{Reason: "Postgres " + version + " is too old", Remedy: "walhook needs Postgres 14 or later"})
	case losesOnAddTable(s.Version):
		warn("server", "Postgres "+version, "this minor version can lose events when a table is added to a publication; update to 14.18, 15.13, 16.9, 17.5 or later")
	default:
		ok("server", "Postgres %s, database %s", version, s.Database)
	}
	switch {
	case s.Recovering:
		bad("server", &Fault{Reason: "the server is a standby in recovery", Remedy: "point database.url at the primary, or list all hosts: postgres://a,b/db?target_session_attrs=read-write"})
	case s.ReadOnly:
		bad("server", &Fault{Reason: "the database is read-only, so nothing could be parked", Remedy: "alter role " + quoteName(s.Role) + " set default_transaction_read_only = off"})
	}
	if s.WALLevel != "logical" {
		bad("wal_level", &Fault{Reason: "wal_level is " + s.WALLevel + ", it must be logical", Remedy: remedyWALLevel})
	} else {
		ok("wal_level", "wal_level is logical")
	}
	if !s.Replication {
		bad("role", &Fault{
			Reason: "role " + s.Role + " lacks REPLICATION",
			Remedy: "alter role " + quoteName(s.Role) + " with replication (on Amazon RDS: grant rds_replication to " + quoteName(s.Role) + ")",
		})
	} else {
		ok("role", "role %s may replicate", s.Role)
	}
	for i := range s.Tables {
		s.judgeTable(&s.Tables[i], cfg, ok, bad)
	}
	s.judgePublication(cfg, ok, bad)
	s.judgeSlot(cfg, ok, bad)
	if s.KeepSize < 0 {
		warn("limits", "max_slot_wal_keep_size is not limited", "while walhook is down, WAL is kept until the disk is full; alter system set max_slot_wal_keep_size = '10GB' (less than the free space) puts the database first")
	}
	if names := s.SyncNames; strings.Contains(names, "*") || strings.Contains(names, applicationName) {
		warn("limits", "synchronous_standby_names is "+names, "it matches walhook, so every commit of the app would wait for its webhooks; name the real standbys instead")
	}
	return out
}

func (s *Survey) judgeTable(f *Found, cfg *Config, ok func(string, string, ...any), bad func(string, *Fault)) {
	switch {
	case f.OID == 0:
		bad("table", &Fault{Reason: "table " + f.String() + " does not exist in database " + s.Database, Remedy: "create it, or correct outbox[].table (upper and lower case count)"})
	case f.Kind != 'r' && f.Kind != 'p':
		bad("table", &Fault{Reason: f.String() + " is not a table", Remedy: "views and foreign tables leave no rows in the WAL; name the table that the app inserts into", Config: true})
	case f.Unlogged:
		bad("table", &Fault{Reason: f.String() + " is unlogged: its rows are not in the WAL", Remedy: "alter table " + f.String() + " set logged"})
	case s.Publication == nil && !cfg.Create:
	case s.Publication != nil && !f.Published && !cfg.Create:
		bad("table", &Fault{Reason: "publication " + cfg.Publication + " lacks table " + f.String(), Remedy: "alter publication " + quoteName(cfg.Publication) + " add table " + f.String()})
	case f.RowFilter != "":
		bad("table", &Fault{Reason: "publication " + cfg.Publication + " leaves out rows of " + f.String() + " by a row filter: " + f.RowFilter, Remedy: "alter publication " + quoteName(cfg.Publication) + " set table " + f.String()})
	default:
		ok("table", "table %s, %d columns", f, len(f.Columns))
	}
}

func (s *Survey) judgePublication(cfg *Config, ok func(string, string, ...any), bad func(string, *Fault)) {
	p := s.Publication
	name := quoteName(cfg.Publication)
	switch {
	case p == nil && cfg.Create:
		ok("publication", "publication %s will be created", cfg.Publication)
	case p == nil:
		bad("publication", &Fault{Reason: "publication " + cfg.Publication + " does not exist", Remedy: "run the SQL that `walhook init` prints"})
	case !p.Insert:
		bad("publication", &Fault{Reason: "publication " + cfg.Publication + " does not publish inserts", Remedy: "alter publication " + name + " set (publish = 'insert')"})
	case !p.ViaRoot && slices.ContainsFunc(s.Tables, func(f Found) bool { return f.Kind == 'p' }):
		bad("publication", &Fault{Reason: "publication " + cfg.Publication + " publishes partitions under their own names", Remedy: "alter publication " + name + " set (publish_via_partition_root = true)"})
	default:
		ok("publication", "publication %s", cfg.Publication)
	}
}

func (s *Survey) judgeSlot(cfg *Config, ok func(string, string, ...any), bad func(string, *Fault)) {
	slot := s.Slot
	if slot == nil {
		switch {
		case !cfg.Create:
			bad("slot", &Fault{Reason: "slot " + cfg.Slot + " does not exist", Remedy: fmt.Sprintf("select pg_create_logical_replication_slot('%s', 'pgoutput')", cfg.Slot)})
		case s.SlotsFree <= 0:
			bad("slot", &Fault{Reason: "no replication slot is left for " + cfg.Slot, Remedy: "raise max_replication_slots and restart Postgres, or drop a slot that nobody uses (select * from pg_replication_slots)"})
		default:
			ok("slot", "slot %s will be created", cfg.Slot)
		}
		return
	}
	drop := fmt.Sprintf("choose another cdc.slot, or, if nobody needs it: select pg_drop_replication_slot('%s')", slot.Name)
	switch {
	case slot.Plugin != "pgoutput":
		what := "plugin " + slot.Plugin
		if slot.Plugin == "" {
			what = "physical replication"
		}
		bad("slot", &Fault{Reason: "slot " + slot.Name + " is one of " + what + ", not of pgoutput", Remedy: drop, Config: true})
	case slot.Database != s.Database:
		bad("slot", &Fault{Reason: "slot " + slot.Name + " belongs to database " + slot.Database + ", not to " + s.Database, Remedy: drop, Config: true})
	case slot.WALStatus == "lost" || slot.Invalid != "":
		why := slot.Invalid
		if why == "" {
			why = "its WAL was removed"
		}
		bad("slot", &Fault{State: Lost, Reason: "slot " + slot.Name + " is invalid (" + why + "): events since " + slot.Confirmed.String() + " may be in the outbox table only", Remedy: remedyLost(slot.Name)})
	case slot.ActivePID != 0:
		ok("slot", "slot %s, in use by pid %d, keeps %s of WAL", slot.Name, slot.ActivePID, bytesText(slot.Retained))
	default:
		ok("slot", "slot %s, not in use, keeps %s of WAL", slot.Name, bytesText(slot.Retained))
	}
}

func remedyLost(slot string) string {
	return fmt.Sprintf("to go on from now on, without what was missed: select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = '%s'; delete from walhook.checkpoints where slot = '%s'", slot, slot)
}

// firstFault is the obstacle that a start meets first.
func firstFault(findings []Finding) *Fault {
	for _, f := range findings {
		if f.Fault != nil {
			return f.Fault
		}
	}
	return nil
}

// losesOnAddTable tells minor versions in which a transaction that is open while its table is
// added to a publication loses its rows, and every later one of the session.
func losesOnAddTable(version int) bool {
	fixed := map[int]int{14: 18, 15: 13, 16: 9, 17: 5}
	minor, known := fixed[version/10000]
	return known && version%10000 < minor
}

func quoteName(name string) string { return pgx.Identifier{name}.Sanitize() }

func bytesText(n int64) string {
	switch {
	case n < 1<<10:
		return fmt.Sprintf("%d B", n)
	case n < 1<<20:
		return fmt.Sprintf("%d kB", n>>10)
	case n < 1<<30:
		return fmt.Sprintf("%d MB", n>>20)
	}
	return fmt.Sprintf("%.1f GB", float64(n)/(1<<30))
}

const applicationName = "walhook"

// pinned are the settings that decide how values print. A row that is read again must give
// the same bytes, or its signature changes with the role's defaults.
var pinned = map[string]string{
	"datestyle":          "ISO",
	"intervalstyle":      "postgres",
	"extra_float_digits": "3",
	"bytea_output":       "hex",
	"timezone":           "UTC",
	"client_encoding":    "UTF8",
	"search_path":        "pg_catalog",
}

func (cfg *Config) parse() (*pgx.ConnConfig, error) {
	url, err := cfg.URL()
	if err != nil {
		return nil, err
	}
	c, err := pgx.ParseConfig(url)
	if err != nil {
		return nil, err
	}
	for k, v := range pinned {
		c.RuntimeParams[k] = v
	}
	if c.RuntimeParams["application_name"] == "" {
		c.RuntimeParams["application_name"] = applicationName
	}
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = 10 * time.Second
	}
	if c.ValidateConnect == nil && len(c.Fallbacks) > 0 {
		c.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	}
	return c, nil
}

// connectSQL opens an ordinary connection, for the catalogue.
func (cfg *Config) connectSQL(ctx context.Context) (*pgx.Conn, error) {
	c, err := cfg.parse()
	if err != nil {
		return nil, err
	}
	c.RuntimeParams["statement_timeout"] = "30000"
	c.RuntimeParams["lock_timeout"] = "2000"
	return pgx.ConnectConfig(ctx, c)
}

// connectReplication opens a connection that takes replication commands. notice hears what
// the server says beside the stream.
func (cfg *Config) connectReplication(ctx context.Context, notice func(*pgconn.Notice)) (*pgconn.PgConn, error) {
	c, err := cfg.parse()
	if err != nil {
		return nil, err
	}
	c.RuntimeParams["replication"] = "database"
	c.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) { notice(n) }
	return pgconn.ConnectConfig(ctx, &c.Config)
}

func closeSQL(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = conn.Close(ctx)
}
