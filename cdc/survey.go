package cdc

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
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
	Version      int      // server_version_num, 150018
	Provider     Provider // who runs the server, by what it shows
	Database     string
	Role         string
	WALLevel     string
	Recovering   bool
	ReadOnly     bool
	Replication  bool   // the role may open replication connections
	CreateDB     bool   // the role may create in the database
	FlushLSN     LSN    // how far the WAL is flushed
	KeepSize     int64  // max_slot_wal_keep_size in MB; -1 is no limit
	MaxSlots     int    // max_replication_slots
	SlotsFree    int    // of them
	MaxSenders   int    // max_wal_senders
	SendersFree  int    // of them
	SyncNames    string // synchronous_standby_names
	StandbyNames string // synchronized_standby_slots, Postgres 17 and later
	Application  string // application_name of our connections

	SenderTimeout time.Duration // wal_sender_timeout; zero is none

	Slot        *Slot   // nil where there is none of the name
	Tables      []Found // one for each of Config.Tables, in their order
	Publication *Publication
	Mirror      MirrorFound

	Around *Around // nil but where Examine looked

	Clock time.Duration // how far the server's clock is ahead of ours, give or take Blur
	Blur  time.Duration // half of what asking for it took

	at time.Time // when the look began
}

// Slot is a row of pg_replication_slots.
type Slot struct {
	Name      string
	Plugin    string
	Database  string
	ActivePID int32
	WALStatus string // reserved, extended, unreserved, lost
	Invalid   string // invalidation_reason, Postgres 17 and later
	Failover  bool   // standbys take it over, Postgres 17 and later
	Synced    bool   // it is a standby's copy of its primary's, Postgres 17 and later
	Temporary bool
	Wait      string // wait event of its walsender
	Restart   LSN
	Confirmed LSN
	Retained  int64 // bytes of WAL that the slot keeps
}

// Publication is a row of pg_publication.
type Publication struct {
	Name      string
	AllTables bool
	Insert    bool
	Changes   bool // updates or deletes too
	ViaRoot   bool
	Owned     bool // the role may alter it
}

// Found is what the catalogue has under a Table's name.
type Found struct {
	Table
	OID         uint32 // zero where there is no such table
	Kind        byte   // relkind: r table, p partitioned table
	Unlogged    bool
	Select      bool // the role may read it
	Owned       bool // the role may publish it
	Keyless     bool // nothing tells its rows apart, so that Postgres refuses to publish updates and deletes
	Columns     []Column
	Types       []string // of Columns, as format_type prints them
	Published   bool
	Listed      bool     // by itself, not with its schema or with all tables
	Entry       uint32   // where Listed: the transaction that made the entry, which a row filter that is set or taken away makes anew
	RowFilter   string   // of the publication, Postgres 15 and later
	Unpublished []string // columns that the publication leaves out, generated ones by default
}

// Relation is the table as the stream will announce it.
func (f *Found) Relation() *Relation {
	columns := slices.DeleteFunc(slices.Clone(f.Columns), func(c Column) bool { return slices.Contains(f.Unpublished, c.Name) })
	return &Relation{OID: f.OID, Schema: f.Schema, Name: f.Name, Columns: columns}
}

// Around is what the stream itself does not look at: what a start would find out only by
// trying, and what may hurt some day.
type Around struct {
	System      string        // system_identifier; empty where it could not be asked
	Holder      string        // application_name of Slot.ActivePID
	Greedy      []Slot        // other slots that keep more WAL than max_wal_size
	Physical    []string      // slots of standbys
	Attached    []string      // those of Physical that are in use
	Standbys    []StandbyHost // among the hosts of the URL
	Names       []Table       // of the tables there are, at most maxNames
	IdleTimeout time.Duration // idle_replication_slot_timeout, Postgres 18 and later; zero is none
	Encrypted   bool          // the connection is
	Fallback    bool          // where the server offers no encryption, it goes without
	Remote      bool          // the connection leaves this machine
	Replicating *Fault        // what became of a replication connection; nil: it works
	Route       Route         // of the connection
	Pooler      string        // what stands between us and Postgres; empty where nothing does
	Pinned      []Pin         // what keeps the slot from moving, oldest first

	ConnectionLimit int           // of the role; -1 is none
	PasswordLeft    time.Duration // until the role's password expires; zero is for ever
}

// Pin is a transaction that has written and does not end: the slot keeps the WAL from its begin on, and a
// slot that is yet to be made waits for it.
type Pin struct {
	Prepared string // the name under which it was prepared, in Database; empty where a session has it
	Database string
	PID      int32
	Role     string // of the session, and its application_name
	App      string
	Age      time.Duration
}

const maxNames = 10_000

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

// Examine is Inspect with a look around. It opens a replication connection too, and closes it.
func Examine(ctx context.Context, cfg *Config) (*Survey, error) {
	conn, err := cfg.connectSQL(ctx)
	if err != nil {
		return nil, cfg.pastPooler(ctx, cfg.Provider.connectFault(err), err)
	}
	defer closeSQL(conn)
	s, err := survey(ctx, conn, cfg)
	if err != nil {
		return nil, FaultOf(err)
	}
	if s.Around, err = lookAround(ctx, conn, s); err != nil {
		return nil, FaultOf(err)
	}
	s.Around.Standbys = cfg.lookAtStandbys(ctx)
	if s.Replication && s.SendersFree > 0 { // else it is clear what would become of it
		s.Around.System, err = cfg.tryReplication(ctx)
		if err != nil {
			s.Around.Replicating = s.advise(cfg).connectFault(err)
		}
	}
	return s, nil
}

const serverSQL = `
select coalesce((select host(inet_server_addr()) || ':' || inet_server_port()), '')`

// pastPooler adds to the fault of a connection that a pooler refused where the pooler leads to: it lets an
// ordinary connection through.
func (cfg *Config) pastPooler(ctx context.Context, f *Fault, err error) *Fault {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) || !refusedByPooler(pg) {
		return f
	}
	conn, err := cfg.connectPooled(ctx)
	if err != nil {
		return f
	}
	defer closeSQL(conn)
	route, p := routeOf(conn), cfg.Provider
	if p == "" {
		if p, err = providerOf(ctx, conn); err != nil {
			return f
		}
	}
	if err := conn.QueryRow(ctx, serverSQL).Scan(&route.Server); err != nil {
		return f
	}
	f.Remedy = p.direct(route)
	return f
}

func (cfg *Config) tryReplication(ctx context.Context) (system string, err error) {
	conn, err := cfg.connectReplication(ctx, func(*pgconn.Notice) {})
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.Conn().Close() }()
	id, err := pglogrepl.IdentifySystem(ctx, conn)
	if err != nil {
		return "", fmt.Errorf("identify system: %w", err)
	}
	return id.SystemID, nil
}

const clockSQL = `
select clock_timestamp()`

const aroundSQL = `
select coalesce((select a.application_name from pg_stat_activity a where a.pid = $1), ''),
       coalesce((select setting::bigint from pg_settings where name = 'idle_replication_slot_timeout'), 0),
       coalesce((select host(inet_server_addr()) || ':' || inet_server_port()), ''),
       pg_backend_pid(),
       (select rolconnlimit from pg_roles where rolname = current_user),
       coalesce((select greatest(extract(epoch from rolvaliduntil - clock_timestamp()), 1)::bigint from pg_roles
                 where rolname = current_user and rolvaliduntil < 'infinity'), 0)`

// Of other roles' sessions only a member of pg_read_all_stats sees since when a transaction is open.
const pinsSQL = `
select '', coalesce(datname, ''), pid, coalesce(usename, ''), application_name, extract(epoch from clock_timestamp() - xact_start)::bigint
from pg_stat_activity
where backend_xid is not null
and pid <> pg_backend_pid()
and xact_start < clock_timestamp()
union all
select gid, database, 0, owner, '', extract(epoch from clock_timestamp() - prepared)::bigint
from pg_prepared_xacts
order by 6 desc
limit 3`

const greedySQL = `
select slot_name, coalesce(active_pid, 0), coalesce(wal_status, ''), pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint
from pg_replication_slots
where slot_name <> $1
and not pg_is_in_recovery()
and wal_status in ('extended', 'unreserved')
order by 4 desc
limit 5`

const namesSQL = `
select n.nspname, c.relname
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'p')
and not c.relispartition
and n.nspname !~ '^pg_'
and n.nspname not in ('information_schema', 'walhook')
order by 1, 2
limit $1`

func lookAround(ctx context.Context, conn *pgx.Conn, s *Survey) (*Around, error) {
	a := &Around{}

	var pid int32
	own := ""
	if s.Slot != nil {
		pid, own = s.Slot.ActivePID, s.Slot.Name
	}
	var idle int64 // seconds
	var server string
	var backend uint32
	var left int64 // seconds
	if err := conn.QueryRow(ctx, aroundSQL, pid).Scan(&a.Holder, &idle, &server, &backend, &a.ConnectionLimit, &left); err != nil {
		return nil, fmt.Errorf("look around: %w", err)
	}
	a.IdleTimeout, a.PasswordLeft = time.Duration(idle)*time.Second, time.Duration(left)*time.Second
	a.Route = routeOf(conn)
	a.Route.Server = server
	a.Pooler = poolerOf(conn, a.Route, backend, s.Provider)
	rows, _ := conn.Query(ctx, pinsSQL) // its error comes from CollectRows
	pins, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (p Pin, err error) {
		var age int64
		err = r.Scan(&p.Prepared, &p.Database, &p.PID, &p.Role, &p.App, &age)
		p.Age = time.Duration(age) * time.Second
		return p, err
	})
	if err != nil {
		return nil, fmt.Errorf("read open transactions: %w", err)
	}
	a.Pinned = pins

	rows, _ = conn.Query(ctx, greedySQL, own)
	greedy, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (o Slot, err error) {
		err = r.Scan(&o.Name, &o.ActivePID, &o.WALStatus, &o.Retained)
		return o, err
	})
	if err != nil {
		return nil, fmt.Errorf("read other slots: %w", err)
	}
	a.Greedy = greedy
	if err := a.readPhysical(ctx, conn); err != nil {
		return nil, err
	}
	rows, _ = conn.Query(ctx, namesSQL, maxNames)
	if a.Names, err = pgx.CollectRows(rows, pgx.RowToStructByPos[Table]); err != nil {
		return nil, fmt.Errorf("read names of tables: %w", err)
	}
	socket := conn.PgConn().Conn()
	_, a.Encrypted = socket.(*tls.Conn)
	c := conn.Config()
	a.Fallback = c.TLSConfig == nil || slices.ContainsFunc(c.Fallbacks, func(f *pgconn.FallbackConfig) bool { return f.TLSConfig == nil })
	if to, ok := socket.RemoteAddr().(*net.TCPAddr); ok {
		a.Remote = !to.IP.IsLoopback()
	}
	return a, nil
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
       current_setting('max_replication_slots')::int,
       current_setting('max_replication_slots')::int - (select count(*)::int from pg_replication_slots),
       current_setting('max_wal_senders')::int,
       current_setting('max_wal_senders')::int - (select count(*)::int from pg_stat_replication),
       current_setting('synchronous_standby_names'),
       coalesce(current_setting('synchronized_standby_slots', true), ''),
       current_setting('application_name'),
       (select setting::bigint from pg_settings where name = 'wal_sender_timeout')`

const slotSQL = `
select slot_name, coalesce(plugin, ''), coalesce(database, ''), coalesce(active_pid, 0), coalesce(wal_status, ''),
       coalesce(to_jsonb(s) ->> 'invalidation_reason', ''), coalesce((to_jsonb(s) ->> 'failover')::bool, false),
       coalesce((to_jsonb(s) ->> 'synced')::bool, false), temporary,
       coalesce((select a.wait_event from pg_stat_activity a where a.pid = s.active_pid), ''),
       coalesce(restart_lsn::text, '0/0'), coalesce(confirmed_flush_lsn::text, '0/0'),
       case when pg_is_in_recovery() then 0 else coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), 0) end::bigint
from pg_replication_slots s
where slot_name = $1`

const publicationSQL = `
select pubname, puballtables, pubinsert, pubupdate or pubdelete, pubviaroot, pg_has_role(pubowner, 'usage')
from pg_publication
where pubname = $1`

// The publication's view of a table knows row filters and column lists from 15 on; to_jsonb
// reads them where they are. A table published by way of its partition root is listed under
// the root's name. Where no list of columns says so, generated ones are not published; before 18
// they never are, although the view of 15 lists them.
const tableSQL = `
select c.oid, c.relkind::text, c.relpersistence = 'u',
       has_table_privilege(c.oid, 'select') and has_schema_privilege(n.oid, 'usage'),
       pg_has_role(c.relowner, 'usage'),
       c.relreplident = 'n' or c.relreplident = 'd' and not exists (select from pg_index i where i.indrelid = c.oid and i.indisprimary),
       coalesce((select array_agg(a.attname::text order by a.attnum) from pg_attribute a
                 where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped), '{}'),
       coalesce((select array_agg(a.atttypid order by a.attnum) from pg_attribute a
                 where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped), '{}'),
       coalesce((select array_agg(format_type(a.atttypid, a.atttypmod) order by a.attnum) from pg_attribute a
                 where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped), '{}'),
       p.tablename is not null,
       coalesce((select r.xmin::text::bigint from pg_publication_rel r join pg_publication pub on pub.oid = r.prpubid
                 where pub.pubname = $3 and r.prrelid = c.oid), 0),
       coalesce(to_jsonb(p) ->> 'rowfilter', ''),
       coalesce((select array_agg(a.attname::text) from pg_attribute a
                 where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
                   and case when a.attgenerated <> '' and current_setting('server_version_num')::int < 180000 then true
                            when jsonb_typeof(to_jsonb(p) -> 'attnames') = 'array' then not to_jsonb(p) -> 'attnames' ? a.attname
                            else a.attgenerated <> '' end), '{}')
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
left join pg_publication_tables p on p.pubname = $3 and p.schemaname = n.nspname and p.tablename = c.relname
where n.nspname = $1 and c.relname = $2 and c.relkind in ('r', 'p', 'v', 'm', 'f')`

func survey(ctx context.Context, conn *pgx.Conn, cfg *Config) (*Survey, error) {
	s := &Survey{at: time.Now()}
	var flushed string
	var timeout int64 // milliseconds
	var theirs time.Time
	if err := conn.QueryRow(ctx, clockSQL).Scan(&theirs); err != nil {
		return nil, fmt.Errorf("read clock: %w", err)
	}
	s.Blur = time.Since(s.at) / 2
	s.Clock = theirs.Sub(s.at.Add(s.Blur))
	err := conn.QueryRow(ctx, surveySQL).Scan(&s.Version, &s.Database, &s.Role, &s.WALLevel, &s.Recovering, &s.ReadOnly,
		&s.Replication, &s.CreateDB, &flushed, &s.KeepSize, &s.MaxSlots, &s.SlotsFree, &s.MaxSenders, &s.SendersFree, &s.SyncNames, &s.StandbyNames, &s.Application, &timeout)
	if err != nil {
		return nil, fmt.Errorf("survey: %w", err)
	}
	s.SenderTimeout = time.Duration(timeout) * time.Millisecond
	if s.Provider, err = providerOf(ctx, conn); err != nil {
		return nil, err
	}
	if s.FlushLSN, err = ParseLSN(flushed); err != nil {
		return nil, err
	}
	if s.Slot, err = readSlot(ctx, conn, cfg.Slot); err != nil {
		return nil, err
	}
	p := &Publication{}
	err = conn.QueryRow(ctx, publicationSQL, cfg.Publication).Scan(&p.Name, &p.AllTables, &p.Insert, &p.Changes, &p.ViaRoot, &p.Owned)
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
			Scan(&f.OID, &kind, &f.Unlogged, &f.Select, &f.Owned, &f.Keyless, &names, &types, &f.Types, &f.Published, &f.Entry, &f.RowFilter, &f.Unpublished)
		if err != nil && !errors.Is(err, pgx.ErrNoRows) {
			return nil, fmt.Errorf("read table %s: %w", t, err)
		}
		if err == nil {
			f.Kind, f.Listed = kind[0], f.Entry != 0
			for i, n := range names {
				f.Columns = append(f.Columns, Column{Name: n, TypeOID: types[i]})
			}
		}
		s.Tables = append(s.Tables, f)
	}
	if s.Mirror, err = cfg.surveyMirror(ctx, conn); err != nil {
		return nil, err
	}
	return s, nil
}

func readSlot(ctx context.Context, conn *pgx.Conn, name string) (*Slot, error) {
	s := &Slot{}
	var restart, confirmed string
	err := conn.QueryRow(ctx, slotSQL, name).Scan(&s.Name, &s.Plugin, &s.Database, &s.ActivePID, &s.WALStatus,
		&s.Invalid, &s.Failover, &s.Synced, &s.Temporary, &s.Wait, &restart, &confirmed, &s.Retained)
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
	Topic string // server, role, wal_level, table, publication, slot, limits
	Text  string
	Fault *Fault // nil where all is well
	Warn  string // what might hurt later, with what to do; empty where nothing
	Table *Found // what a topic table is about
}

// Findings judges the survey, in the order in which a start meets the obstacles. What
// create may make by itself is not a fault while it is missing. What Examine looked at beside
// the rest is judged where it did.
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

	p := s.advise(cfg)
	version := fmt.Sprintf("Postgres %d.%d", s.Version/10000, s.Version%10000)
	if s.Provider != "" && s.Provider != Plain {
		version += " of " + s.Provider.Title()
	}
	if p != s.Provider && s.Provider != "" {
		version += " (advice for " + p.Title() + ")"
	}
	switch fixed := fixedAddTable(s.Version); {
	case s.Version < 140000:
		bad("server", &Fault{Reason: version + " is too old", Remedy: "walhook needs Postgres 14 or later"})
	case s.Version < fixed:
		warn("server", version+", database "+s.Database, fmt.Sprintf("this minor version can lose events when a table is added to a publication: update to %d.%d or later", fixed/10000, fixed%10000))
	default:
		ok("server", "%s, database %s", version, s.Database)
	}
	switch {
	case s.Recovering:
		bad("server", &Fault{Reason: "the server is a standby in recovery", Remedy: "point database.url at the primary, or list all hosts: postgres://a,b/db?target_session_attrs=read-write"})
	case s.ReadOnly:
		bad("server", &Fault{Reason: "the database is read-only, so nothing could be parked", Remedy: "alter role " + quoteName(s.Role) + " set default_transaction_read_only = off"})
	}
	if s.WALLevel != "logical" {
		bad("wal_level", &Fault{Reason: "wal_level is " + s.WALLevel + ", it must be logical", Remedy: p.set(logicalLevel())})
	} else {
		ok("wal_level", "wal_level is logical")
	}
	if !s.Replication {
		bad("role", &Fault{
			Reason: "role " + s.Role + " lacks REPLICATION",
			Remedy: p.replicate(s.Role, s.Version),
		})
	} else {
		ok("role", "role %s may replicate", s.Role)
	}
	if s.Around != nil {
		s.judgeConnection(p, bad, warn)
	}
	for i := range s.Tables {
		before := len(out)
		s.judgeTable(&s.Tables[i], cfg, ok, bad, warn)
		for j := range out[before:] {
			out[before+j].Table = &s.Tables[i]
		}
	}
	s.judgePublication(cfg, ok, bad, warn)
	s.judgeMirror(cfg, ok, warn)
	s.judgeSlot(cfg, ok, bad, warn)
	switch {
	case s.KeepSize < 0:
		warn("limits", "max_slot_wal_keep_size is not limited", "while walhook is down, WAL is kept until the disk is full. "+p.limit())
	case s.KeepSize < keepTolerance:
		warn("limits", "max_slot_wal_keep_size is "+bytesText(s.KeepSize<<20), "walhook's slot is lost when it is down while the database writes as much. "+p.limit())
	}
	if waitsFor(s.SyncNames, s.Application) {
		warn("limits", "synchronous_standby_names is "+s.SyncNames, "it matches "+s.Application+", so every commit of the app would wait for its webhooks. Name the real standbys alone: "+p.set(syncNamesParameter(withoutUs(s.SyncNames, s.Application))))
	}
	if s.Around != nil {
		s.judgeAround(p, warn)
		s.judgeFailover(cfg, ok, warn)
	}
	return out
}

// waitsFor tells whether synchronous_standby_names has commits wait for a walsender of that
// application_name. In an unquoted list a * is everybody, and case does not count.
func waitsFor(syncNames, application string) bool {
	list := syncNames
	if open := strings.IndexByte(list, '('); open >= 0 { // FIRST 2 (a, b)
		list = strings.TrimSuffix(strings.TrimSpace(list[open+1:]), ")")
	}
	for name := range strings.SplitSeq(list, ",") {
		name = strings.TrimSpace(name)
		if name == "*" || name != "" && strings.EqualFold(strings.Trim(name, `"`), application) {
			return true
		}
	}
	return false
}

// advise is the provider whose advice is given.
func (s *Survey) advise(cfg *Config) Provider {
	if cfg.Provider != "" {
		return cfg.Provider
	}
	return s.Provider
}

// roomToRaise is how much a limit is raised that is used up: two instances, a new slot beside the old one,
// and some for others.
const roomToRaise = 5

// withoutUs is synchronous_standby_names without what matches us. Where nothing is left, no commit waits.
func withoutUs(syncNames, application string) string {
	head, list, tail := "", syncNames, ""
	if open := strings.IndexByte(list, '('); open >= 0 { // FIRST 2 (a, b)
		head, list, tail = list[:open+1], strings.TrimSuffix(strings.TrimSpace(list[open+1:]), ")"), ")"
	}
	var kept []string
	for name := range strings.SplitSeq(list, ",") {
		if name = strings.TrimSpace(name); name != "" && !waitsFor(name, application) {
			kept = append(kept, name)
		}
	}
	if len(kept) == 0 {
		return ""
	}
	return head + strings.Join(kept, ", ") + tail
}

func (s *Survey) judgeConnection(p Provider, bad func(string, *Fault), warn func(string, string, string)) {
	a := s.Around
	held := s.Slot != nil && s.Slot.ActivePID != 0
	more := p.set(sendersParameter(s.MaxSenders + roomToRaise))
	switch f := a.Replicating; {
	case s.SendersFree <= 0 && held:
		warn("role", "no further replication connection is free", "a second instance could not stand by: "+more)
	case s.SendersFree <= 0:
		bad("role", &Fault{Reason: "no replication connection is free", Remedy: more + "; or end one that nobody needs (select * from pg_stat_replication)"})
	case f != nil && a.Pooler != "":
		g := *f
		g.Reason, g.Remedy = "between walhook and Postgres stands "+a.Pooler+", which does not pass replication on", p.direct(a.Route)
		if g.Err == nil {
			g.Err = errors.New(f.Reason)
		}
		bad("pooler", &g)
	case f != nil && f.State == Connecting && f.Remedy == "":
		g := *f
		g.Remedy = "where a pooler or proxy stands in between: " + p.direct(a.Route)
		bad("role", &g)
	case f != nil:
		bad("role", f)
	case a.Pooler != "":
		warn("pooler", "between walhook and Postgres stands "+a.Pooler, "it passes replication on, but every restart and timeout of its own ends the stream: "+p.direct(a.Route))
	}
	switch {
	case a.Remote && !a.Encrypted:
		warn("server", "the connection is not encrypted", "payloads cross the network as plain text: add sslmode=verify-full (or require) to database.url")
	case a.Remote && a.Fallback:
		warn("server", "the connection is encrypted, but need not be", "where somebody in between says that the server knows no TLS, payloads and password go as plain text: add sslmode=verify-full (or require) to database.url")
	}
	if a.PasswordLeft > 0 && a.PasswordLeft < passwordSoon {
		warn("role", fmt.Sprintf("the password of role %s expires in %s", s.Role, a.PasswordLeft.Round(time.Second)), "from then on it cannot connect any more: alter role "+quoteName(s.Role)+" valid until 'infinity'")
	}
}

const (
	clockTolerance = 30 * time.Second
	idleTolerance  = 24 * time.Hour
	passwordSoon   = 14 * 24 * time.Hour
	// pinTolerance is how long a transaction may write before somebody should look.
	pinTolerance = 15 * time.Minute
	// keepTolerance, in MB, is less than what a busy database writes while walhook is updated.
	keepTolerance = 1024
	// patienceTolerance is what a stumble of the network takes.
	patienceTolerance = 3 * time.Second
)

// ClockOff says how far the clocks of server and machine are apart, where that is much.
func (s *Survey) ClockOff() string {
	off, way := s.Clock.Abs(), "ahead of"
	if off <= clockTolerance+s.Blur {
		return ""
	}
	if s.Clock < 0 {
		way = "behind"
	}
	return fmt.Sprintf("the server's clock is %s %s this machine's", off.Round(time.Second), way)
}

func (s *Survey) judgeAround(p Provider, warn func(string, string, string)) {
	a := s.Around
	for _, o := range a.Greedy {
		use := "not in use"
		if o.ActivePID != 0 {
			use = fmt.Sprintf("in use by pid %d", o.ActivePID)
		}
		warn("limits", fmt.Sprintf("slot %s, %s, keeps %s of WAL", o.Name, use, bytesText(o.Retained)),
			fmt.Sprintf("it is not walhook's, but fills the same disk; if nobody needs it: select pg_drop_replication_slot(%s)", quoteText(o.Name)))
	}
	if a.IdleTimeout > 0 && a.IdleTimeout < idleTolerance {
		warn("limits", "idle_replication_slot_timeout is "+a.IdleTimeout.String(), "walhook's slot is lost when it is down for longer: "+p.set(idleParameter()))
	}
	switch {
	case s.SenderTimeout == 0 && s.Version > 0:
		warn("limits", "wal_sender_timeout is off", "the server never gives up a walhook that is cut off; another instance ends it only where the role may see that it does not answer (pg_read_all_stats): "+p.set(patienceParameter()))
	case s.SenderTimeout > 0 && s.SenderTimeout < patienceTolerance:
		warn("limits", "wal_sender_timeout is "+s.SenderTimeout.String(), "every short pause of the network ends the stream: "+p.set(patienceParameter()))
	}
	for _, pin := range a.Pinned {
		if pin.Age < pinTolerance {
			continue
		}
		const harm = "all WAL since then is kept, and a new slot would wait for its end. "
		if pin.Prepared != "" {
			warn("limits", fmt.Sprintf("prepared transaction %s of database %s has been open for %s", quoteText(pin.Prepared), pin.Database, pin.Age),
				harm+"In that database, as its owner "+pin.Role+": commit prepared "+quoteText(pin.Prepared)+", or rollback prepared "+quoteText(pin.Prepared))
			continue
		}
		warn("limits", fmt.Sprintf("a transaction of role %s (pid %d, %q, database %s) has been writing for %s", pin.Role, pin.PID, pin.App, pin.Database, pin.Age),
			fmt.Sprintf("%sIf it hangs: select pg_terminate_backend(%d)", harm, pin.PID))
	}
	if off := s.ClockOff(); off != "" {
		warn("clock", off,
			"latencies, retry times and max_age mean little, and receivers refuse timestamps that are minutes off; let both follow NTP")
	}
}

func (s *Survey) judgeTable(f *Found, cfg *Config, ok func(string, string, ...any), bad func(string, *Fault), warn func(string, string, string)) {
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
	case s.Around != nil && !f.Select:
		warn("table", "role "+s.Role+" may not read "+f.String(), "what is streamed needs no such right, but sending past rows again does: grant usage on schema "+quoteName(f.Schema)+" to "+quoteName(s.Role)+"; grant select on "+f.String()+" to "+quoteName(s.Role))
	default:
		ok("table", "table %s, %d columns", f, len(f.Columns))
	}
}

// unpublished are the tables that are there and not in the publication yet.
func (s *Survey) unpublished() (tables []Table, owned bool) {
	owned = true
	for _, f := range s.Tables {
		if f.OID != 0 && !f.Published && (f.Kind == 'r' || f.Kind == 'p') {
			tables, owned = append(tables, f.Table), owned && f.Owned
		}
	}
	return tables, owned
}

// mayPublish says beforehand why the stream could not create the publication or add tables to it.
func (s *Survey) mayPublish(cfg *Config) *Fault {
	tables, owned := s.unpublished()
	switch p := s.Publication; {
	case p == nil && !s.CreateDB:
		return &Fault{Reason: "role " + s.Role + " may not create publication " + cfg.Publication, Remedy: "as the owner of the tables: " + createPublication(cfg.Publication, tables)}
	case p == nil && !owned:
		return &Fault{Reason: "role " + s.Role + " may not publish " + tableList(tables) + ", which it does not own", Remedy: "as the owner: " + createPublication(cfg.Publication, tables)}
	case p != nil && len(tables) > 0 && !(p.Owned && owned):
		return &Fault{Reason: "publication " + cfg.Publication + " lacks " + tableList(tables) + ", and role " + s.Role + " may not add it", Remedy: "as the owner of both: " + addTables(cfg.Publication, tables)}
	}
	return nil
}

func (s *Survey) judgePublication(cfg *Config, ok func(string, string, ...any), bad func(string, *Fault), warn func(string, string, string)) {
	p := s.Publication
	name := quoteName(cfg.Publication)
	var denied *Fault
	if s.Around != nil && cfg.Create {
		denied = s.mayPublish(cfg)
	}
	switch {
	case p == nil && denied != nil:
		bad("publication", denied)
	case p == nil && cfg.Create:
		ok("publication", "publication %s will be created", cfg.Publication)
	case p == nil:
		tables, _ := s.unpublished()
		bad("publication", &Fault{Reason: "publication " + cfg.Publication + " does not exist", Remedy: "as the owner of the tables: " + createPublication(cfg.Publication, tables) + "; or run the SQL that `walhook init` prints"})
	case !p.Insert:
		bad("publication", &Fault{Reason: "publication " + cfg.Publication + " does not publish inserts", Remedy: "alter publication " + name + " set (publish = 'insert')"})
	case !p.ViaRoot && slices.ContainsFunc(s.Tables, func(f Found) bool { return f.Kind == 'p' }):
		bad("publication", &Fault{Reason: "publication " + cfg.Publication + " publishes partitions under their own names", Remedy: "alter publication " + name + " set (publish_via_partition_root = true)"})
	case denied != nil:
		bad("publication", denied)
	case p.AllTables:
		warn("publication", "publication "+cfg.Publication+" publishes all tables", "the server sends walhook every row of every table, its own included, to be thrown away: choose another cdc.publication, of the outbox alone, and run the SQL that `walhook init` prints")
	default:
		ok("publication", "publication %s", cfg.Publication)
	}
	if p == nil || !p.Changes {
		return
	}
	for i := range s.Tables {
		if f := &s.Tables[i]; f.Published && f.Keyless {
			warn("publication", "publication "+cfg.Publication+" publishes updates or deletes of "+f.String()+", whose rows nothing tells apart",
				"Postgres refuses updates and deletes of such rows to the app itself: alter publication "+name+" set (publish = 'insert')")
		}
	}
}

func (s *Survey) judgeSlot(cfg *Config, ok func(string, string, ...any), bad func(string, *Fault), warn func(string, string, string)) {
	slot := s.Slot
	if slot == nil {
		switch {
		case !cfg.Create:
			bad("slot", &Fault{Reason: "slot " + cfg.Slot + " does not exist", Remedy: fmt.Sprintf("select pg_create_logical_replication_slot('%s', 'pgoutput')", cfg.Slot)})
		case s.SlotsFree <= 0:
			bad("slot", &Fault{Reason: "no replication slot is left for " + cfg.Slot, Remedy: s.advise(cfg).set(slotsParameter(s.MaxSlots+roomToRaise)) + "; or drop a slot that nobody uses (select * from pg_replication_slots)"})
		default:
			ok("slot", "slot %s will be created", cfg.Slot)
		}
		return
	}
	drop := fmt.Sprintf("choose another cdc.slot, or, if nobody needs it: select pg_drop_replication_slot('%s')", slot.Name)
	switch {
	case slot.unmade():
		ok("slot", "slot %s is being made", slot.Name)
	case slot.Plugin != "pgoutput":
		what := "plugin " + slot.Plugin
		if slot.Plugin == "" {
			what = "physical replication"
		}
		bad("slot", &Fault{Reason: "slot " + slot.Name + " is one of " + what + ", not of pgoutput", Remedy: drop, Config: true})
	case slot.Database != s.Database:
		bad("slot", &Fault{Reason: "slot " + slot.Name + " belongs to database " + slot.Database + ", not to " + s.Database, Remedy: drop, Config: true})
	case !slot.usable():
		bad("slot", cfg.lostSlot(slot, nil))
	case slot.ActivePID != 0 && s.Around != nil && s.Around.Holder != s.Application:
		warn("slot", fmt.Sprintf("slot %s is in use by pid %d, which calls itself %q and not %s", slot.Name, slot.ActivePID, s.Around.Holder, s.Application),
			"where that is no walhook, events go to it and walhook only stands by: choose another cdc.slot")
	case slot.ActivePID != 0 && s.Around != nil:
		ok("slot", "slot %s, in use by pid %d (%s: another instance would stand by), keeps %s of WAL", slot.Name, slot.ActivePID, s.Around.Holder, bytesText(slot.Retained))
	case slot.ActivePID != 0:
		ok("slot", "slot %s, in use by pid %d, keeps %s of WAL", slot.Name, slot.ActivePID, bytesText(slot.Retained))
	default:
		ok("slot", "slot %s, not in use, keeps %s of WAL", slot.Name, bytesText(slot.Retained))
	}
	switch slot.WALStatus {
	case "unreserved":
		warn("slot", "slot "+slot.Name+" is about to be lost: it keeps "+bytesText(slot.Retained)+" of WAL, more than max_slot_wal_keep_size",
			"start walhook before the next checkpoint of Postgres, and raise the limit. "+s.advise(cfg).limit())
	case "extended":
		warn("slot", "slot "+slot.Name+" keeps "+bytesText(slot.Retained)+" of WAL, more than max_wal_size",
			"while walhook is down or behind, WAL piles up: start it; select pg_drop_replication_slot('"+slot.Name+"') only where its events are not wanted any more")
	}
}

// firstFault is the obstacle that a start meets first. A slot that is lost is none yet: what
// becomes of it is told by its record.
func firstFault(findings []Finding) *Fault {
	for _, f := range findings {
		if f.Fault != nil && f.Fault.State != Lost {
			return f.Fault
		}
	}
	return nil
}

// losesOnAddTable tells minor versions in which a transaction that is open while its table is
// added to a publication loses its rows, and every later one of the session.
func losesOnAddTable(version int) bool { return version < fixedAddTable(version) }

// fixedAddTable is the version of the same major in which that is mended; zero where it never was so.
func fixedAddTable(version int) int {
	minor, known := map[int]int{14: 18, 15: 13, 16: 9, 17: 5}[version/10000]
	if !known {
		return 0
	}
	return version/10000*10000 + minor
}

func quoteName(name string) string { return pgx.Identifier{name}.Sanitize() }

func quoteText(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }

func tableList(tables []Table) string {
	names := make([]string, len(tables))
	for i, t := range tables {
		names[i] = t.String()
	}
	return strings.Join(names, ", ")
}

func createPublication(name string, tables []Table) string {
	sql := "create publication " + quoteName(name)
	if len(tables) > 0 {
		sql += " for table " + tableList(tables)
	}
	return sql + " with (publish = 'insert', publish_via_partition_root = true)"
}

func addTables(publication string, tables []Table) string {
	return "alter publication " + quoteName(publication) + " add table " + tableList(tables)
}

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
