package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/cdc/pgtest"
	"github.com/walhook/walhook/outbox/store"
)

const ourOutbox = `create table public.outbox (
	id uuid primary key default gen_random_uuid(), event_type text not null, aggregate_id text,
	payload jsonb not null, created_at timestamptz not null default now())`

// site is a database with a config that fits it.
type site struct {
	t      *testing.T
	admin  string // URL of a superuser
	url    string // database.url
	direct string // database.replication_url
	name   string // of slot and publication
	role   string // that url connects as
	table  string
	source string // in place of a table
	more   string // further lines of the config
	cdc    string // further keys of its section
	hooks  string // URL of the endpoint
	config string // path
}

// newSite makes the app's table in an empty database, and a receiver.
func newSite(t *testing.T, admin string) *site {
	t.Helper()
	u, err := url.Parse(admin)
	require.NoError(t, err)
	rx := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(rx.Close)
	s := &site{
		t: t, admin: admin, url: admin, role: "postgres", table: "public.outbox", hooks: rx.URL,
		name: "wh_" + strings.TrimPrefix(strings.TrimPrefix(u.Path, "/"), "walhook_test_"),
	}
	s.exec(ourOutbox)
	return s
}

func (s *site) exec(sql string, args ...any) {
	s.t.Helper()
	pgtest.Exec(s.t, s.admin, fmt.Sprintf(strings.ReplaceAll(sql, "$slot", s.name), args...))
}

// restrict makes a role that may log in and has what attributes say, and has the config connect as it.
func (s *site) restrict(attributes string) {
	s.t.Helper()
	s.role = s.name + "_role"
	s.exec("create role %s login password 'pa%%ss' %s", s.role, attributes)
	s.dropRole(s.role)
	s.as(s.role, "pa%ss")
}

func (s *site) as(role, password string) {
	u, err := url.Parse(s.admin)
	require.NoError(s.t, err)
	u.User = url.UserPassword(role, password)
	s.url = u.String()
}

// write writes the config, and gives its path.
func (s *site) write() string {
	s.t.Helper()
	s.config = filepath.Join(s.t.TempDir(), "walhook.yaml")
	direct := ""
	if s.direct != "" {
		direct = fmt.Sprintf(", replication_url: %q", s.direct)
	}
	text := fmt.Sprintf(`database: {url: %q%s}
cdc: {slot: %s, publication: %[3]s%s}
outbox: [{%s%s}]
endpoints: [{id: shop, url: %q, secrets: [whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw]}]
server: {listen: "127.0.0.1:0"}
log: {level: debug}
`, s.url, direct, s.name, s.cdc, cmp.Or(s.source, fmt.Sprintf("table: %q", s.table)), s.more, s.hooks)
	require.NoError(s.t, os.WriteFile(s.config, []byte(text), 0o600))
	return s.config
}

// walhook runs a command with the site's config.
func (s *site) walhook(args ...string) (code int, stdout, stderr string) {
	s.t.Helper()
	return walhook(s.t, append(args, "--config", s.write())...)
}

func walhook(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), args, noEnv, &out, &errs)
	return code, out.String(), errs.String()
}

// finds demands one line of the check: its mark, its topic and part of its text, and part of
// what it says to do.
func (s *site) finds(code int, mark, topic, text, remedy string) {
	s.t.Helper()
	got, out, errs := s.walhook("check")
	require.Equal(s.t, code, got, out+errs)
	requireLine(s.t, out, mark, topic, text, remedy)
}

func requireLine(t *testing.T, out, mark, topic, text, remedy string) {
	t.Helper()
	lines := strings.Split(out, "\n")
	for i, line := range lines {
		if !strings.HasPrefix(line, fmt.Sprintf("%s %-12s", mark, topic)) || !strings.Contains(line, text) {
			continue
		}
		var what []string
		for _, next := range lines[i+1:] {
			if strings.HasPrefix(next, " ") || next == "" {
				what = append(what, next)
				continue
			}
			break
		}
		require.Contains(t, strings.Join(what, "\n"), remedy)
		return
	}
	t.Fatalf("no line with %s %s … %s in\n%s", mark, topic, text, out)
}

func TestCheckOfAHealthyDatabase(t *testing.T) {
	s := newSite(t, pgtest.DB(t))
	code, out, errs := s.walhook("check")
	require.Equal(t, exitDone, code, out+errs)
	require.Empty(t, errs)
	require.Equal(t, `✓ config      FILE: 1 source, 1 endpoint
✓ server      Postgres N, database DB
✓ wal_level   wal_level is logical
✓ role        role postgres may replicate
✓ table       table "public"."outbox", 5 columns
✓ publication publication SLOT will be created
✓ slot        slot SLOT will be created
! limits      max_slot_wal_keep_size is not limited
    → while walhook is down, WAL is kept until the disk is full. A limit below the free space puts the database first: alter system set max_slot_wal_keep_size = '10GB'; select pg_reload_conf()
✓ columns     "public"."outbox": id: id (uuid), type: event_type (text), key: aggregate_id (text), data: payload (jsonb), tenant: none, headers: none, time: created_at (timestamptz)
✓ schema      schema walhook will be created
✓ checkpoint  no checkpoint yet: the first start makes it
✓ endpoint    shop: 127.0.0.1 answers at 127.0.0.1:PORT
`, s.stable(out))
}

func TestCheckOfASickDatabase(t *testing.T) {
	s := newSite(t, replicaServer(t))
	s.restrict("")
	s.table, s.hooks = "public.outbx", "https://no-such-host.invalid/hooks?token=s3cret"
	code, out, errs := s.walhook("check")
	require.Equal(t, exitFailed, code)
	require.Equal(t, "walhook: check found 6 faults\n", errs)
	require.Equal(t, `✓ config      FILE: 1 source, 1 endpoint
✓ server      Postgres N, database DB
✗ wal_level   wal_level is replica, it must be logical
    → alter system set wal_level = logical; then restart Postgres
✗ role        role ROLE lacks REPLICATION
    → alter role "ROLE" with replication
✗ table       table "public"."outbx" does not exist in database DB
    → did you mean public.outbox? create it, or correct outbox[].table (upper and lower case count)
✗ publication role ROLE may not create publication SLOT
    → as the owner of the tables: create publication "SLOT" with (publish = 'insert', publish_via_partition_root = true)
✓ slot        slot SLOT will be created
! limits      max_slot_wal_keep_size is not limited
    → while walhook is down, WAL is kept until the disk is full. A limit below the free space puts the database first: alter system set max_slot_wal_keep_size = '10GB'; select pg_reload_conf()
✗ schema      schema walhook does not exist, and role ROLE may not create it
    → run the SQL that `+"`walhook init`"+` prints (walhook init --apply --admin-url 'postgres://…')
✓ checkpoint  no checkpoint yet: the first start makes it
✗ endpoint    shop: no-such-host.invalid: the host name LOOKUP
    → correct the host in endpoints[0].url, or the DNS of this machine; until then its deliveries are parked
`, s.stable(out))
}

// stable puts words in place of what differs from run to run.
func (s *site) stable(out string) string {
	out = strings.ReplaceAll(out, s.config, "FILE")
	if s.role != "postgres" {
		out = strings.ReplaceAll(out, s.role, "ROLE")
	}
	out = strings.ReplaceAll(out, s.name, "SLOT")
	out = regexp.MustCompile(`Postgres [\d.]+`).ReplaceAllString(out, "Postgres N")
	out = regexp.MustCompile(`database (postgres|walhook_test_\w+)`).ReplaceAllString(out, "database DB")
	out = regexp.MustCompile(`127\.0\.0\.1:\d+`).ReplaceAllString(out, "127.0.0.1:PORT")
	return regexp.MustCompile(`the host name (does not exist|cannot be looked up.*)`).ReplaceAllString(out, "the host name LOOKUP")
}

// replicaServer is a server with wal_level = replica, for one test.
func replicaServer(t *testing.T) string {
	return pgtest.New(t, pgtest.Config{Settings: map[string]string{"wal_level": "replica"}}).URL()
}

// TestCheckFindsBeforehand has every obstacle that a role, a table, a publication, a slot or the
// schema can be. Each is judged by the code that a start judges it by.
func TestCheckFindsBeforehand(t *testing.T) {
	checkpoint := func(s *site, identity, lsn string) {
		s.exec("%s", store.SetupSQL())
		s.exec(`insert into walhook.checkpoints (slot, instance, system_identifier, database, epoch, lsn)
			select '$slot', instance, coalesce(nullif(system, ''), system_identifier::text), coalesce(nullif(db, ''), current_database()), 1, lsn
			from pg_control_system(), (values (%s, '%s'::pg_lsn)) as v (instance, system, db, lsn)`, identity, lsn)
	}
	const itself = "'default', '', ''"
	for _, c := range []struct {
		name               string
		given              func(s *site)
		code               int
		mark, topic, text  string
		remedy             string
		olderServersDiffer bool
	}{
		{
			name: "role without REPLICATION", given: func(s *site) { s.restrict("") },
			code: 1, mark: "✗", topic: "role", text: "lacks REPLICATION", remedy: "with replication",
		},
		{
			name: "role may not create a publication", given: func(s *site) { s.restrict("replication") },
			code: 1, mark: "✗", topic: "publication", text: "may not create publication", remedy: `as the owner of the tables: create publication "`,
		},
		{
			name: "role does not own the table", given: func(s *site) {
				s.restrict("replication")
				s.exec("do $$ begin execute format('grant create on database %%I to %s', current_database()); end $$", s.role)
			},
			code: 1, mark: "✗", topic: "publication", text: `may not publish "public"."outbox", which it does not own`, remedy: `create publication "`,
		},
		{
			name: "publication lacks the table, of which the role is not the owner", given: func(s *site) {
				s.restrict("replication")
				s.exec("create publication $slot")
			},
			code: 1, mark: "✗", topic: "publication", text: `lacks "public"."outbox", and role`, remedy: `add table "public"."outbox"`,
		},
		{
			name: "publication lacks the table, which may be added", given: func(s *site) { s.exec("create publication $slot") },
			mark: "✓", topic: "publication", text: "publication",
		},
		{
			name: "publication missing, create: false", given: func(s *site) { s.cdc = ", create: false" },
			code: 1, mark: "✗", topic: "publication", text: "does not exist", remedy: "walhook init",
		},
		{
			name: "slot missing, create: false", given: func(s *site) { s.cdc = ", create: false" },
			code: 1, mark: "✗", topic: "slot", text: "does not exist", remedy: "pg_create_logical_replication_slot",
		},
		{
			name: "table not readable", given: func(s *site) { s.restrict("replication") },
			code: 1, mark: "!", topic: "table", text: "may not read", remedy: `grant select on "public"."outbox"`,
		},
		{
			name: "table missing, another alike", given: func(s *site) { s.table = "OutBox" },
			code: 1, mark: "✗", topic: "table", text: `"public"."OutBox" does not exist`, remedy: "did you mean public.outbox?",
		},
		{
			name: "table in another schema", given: func(s *site) { s.table = "shop.outbox"; s.exec("create schema shop") },
			code: 1, mark: "✗", topic: "table", text: "does not exist", remedy: "did you mean public.outbox?",
		},
		{
			name: "a view", given: func(s *site) { s.exec("create view public.v as table public.outbox"); s.table = "v" },
			code: 1, mark: "✗", topic: "table", text: "is not a table", remedy: "views",
		},
		{
			name: "unlogged", given: func(s *site) { s.exec("alter table public.outbox set unlogged") },
			code: 1, mark: "✗", topic: "table", text: "unlogged", remedy: "set logged",
		},
		{
			name: "column that is not there", given: func(s *site) { s.more = ", columns: {type: evnt_type}" },
			code: 1, mark: "✗", topic: "columns", text: "columns.type", remedy: "type: event_type",
		},
		{
			name: "generated column, which is not published", given: func(s *site) {
				s.exec("alter table public.outbox add column topic text generated always as (lower(event_type)) stored")
				s.more = ", columns: {type: topic}"
			},
			code: 1, mark: "✗", topic: "columns", text: "columns.type", remedy: "type: event_type",
		},
		{
			name: "publication without insert", given: func(s *site) {
				s.exec("create publication $slot for table public.outbox with (publish = 'update')")
			},
			code: 1, mark: "✗", topic: "publication", text: "does not publish inserts", remedy: "set (publish = 'insert')",
		},
		{
			name: "publication with a row filter", olderServersDiffer: true, given: func(s *site) {
				s.exec("create publication $slot for table public.outbox where (event_type = 'a')")
			},
			code: 1, mark: "✗", topic: "table", text: "by a row filter", remedy: "alter publication",
		},
		{
			name: "publication that leaves out a column", olderServersDiffer: true, given: func(s *site) {
				s.exec("create publication $slot for table public.outbox (id, event_type) with (publish = 'insert')")
			},
			code: 1, mark: "✗", topic: "columns", text: "columns.data", remedy: "id uuid, event_type text",
		},
		{
			name: "publication of partitions", given: func(s *site) {
				s.exec(`create table public.parts (id bigint, type text, payload jsonb) partition by hash (id);
					create table public.p0 partition of public.parts for values with (modulus 1, remainder 0);
					create publication $slot for table public.parts with (publish = 'insert')`)
				s.table = "parts"
			},
			code: 1, mark: "✗", topic: "publication", text: "under their own names", remedy: "publish_via_partition_root = true",
		},
		{
			name: "slot of another plugin", given: func(s *site) { s.exec("select pg_create_logical_replication_slot('$slot', 'test_decoding')") },
			code: 1, mark: "✗", topic: "slot", text: "plugin test_decoding", remedy: "another cdc.slot",
		},
		{
			name: "physical slot", given: func(s *site) {
				s.exec("select pg_create_physical_replication_slot('$slot')")
				s.t.Cleanup(func() { s.exec("select pg_drop_replication_slot('$slot')") })
			},
			code: 1, mark: "✗", topic: "slot", text: "physical replication", remedy: "another cdc.slot",
		},
		{
			name: "slot of another database", given: func(s *site) {
				pgtest.Exec(s.t, pgtest.DB(s.t), "select pg_create_logical_replication_slot('"+s.name+"', 'pgoutput')")
			},
			code: 1, mark: "✗", topic: "slot", text: "belongs to database", remedy: "another cdc.slot",
		},
		{
			name: "slot in use by somebody else", given: func(s *site) {
				s.exec("select pg_create_logical_replication_slot('$slot', 'pgoutput'); create publication $slot for table public.outbox")
				s.hold("debezium")
			},
			mark: "!", topic: "slot", text: `calls itself "debezium"`, remedy: "another cdc.slot",
		},
		{
			name: "slot in use by another walhook", given: func(s *site) {
				s.exec("select pg_create_logical_replication_slot('$slot', 'pgoutput'); create publication $slot for table public.outbox")
				s.hold("walhook")
			},
			mark: "✓", topic: "slot", text: "(walhook: another instance would stand by)",
		},
		{
			name: "slot ahead of the checkpoint", given: func(s *site) {
				s.exec("select pg_create_logical_replication_slot('$slot', 'pgoutput')")
				checkpoint(s, itself, "0/1")
			},
			code: 1, mark: "✗", topic: "checkpoint", text: "somebody else read or advanced it", remedy: "--recover",
		},
		{
			name: "checkpoint ahead of the WAL", given: func(s *site) {
				s.exec("select pg_create_logical_replication_slot('$slot', 'pgoutput')")
				checkpoint(s, itself, "FFFF/0")
			},
			code: 1, mark: "✗", topic: "checkpoint", text: "the WAL of this server ends at", remedy: "pg_drop_replication_slot",
		},
		{
			name: "slot gone, checkpoint there", given: func(s *site) { checkpoint(s, itself, "0/1") },
			code: 1, mark: "✗", topic: "checkpoint", text: "is gone, although a checkpoint", remedy: "delete from walhook.checkpoints",
		},
		{
			name: "checkpoint of the slot's own time", given: func(s *site) {
				s.exec("select pg_create_logical_replication_slot('$slot', 'pgoutput')")
				checkpoint(s, itself, s.ask("select confirmed_flush_lsn::text from pg_replication_slots where slot_name = $1", s.name))
			},
			mark: "✓", topic: "checkpoint", text: "of instance default",
		},
		{
			name: "messages alone", given: func(s *site) { s.source = "messages: shop" },
			mark: "✓", topic: "publication", text: "will be created",
		},
		{
			name: "copy of a database", given: func(s *site) { checkpoint(s, "'default', '', 'production'", "0/1") },
			code: 1, mark: "✗", topic: "checkpoint", text: "this database is a copy", remedy: "delete from walhook.checkpoints",
		},
		{
			name: "copy of a cluster", given: func(s *site) { checkpoint(s, "'default', '4711', ''", "0/1") },
			code: 1, mark: "✗", topic: "checkpoint", text: "cluster 4711", remedy: "delete from walhook.checkpoints",
		},
		{
			name: "another instance's database", given: func(s *site) { checkpoint(s, "'production', '', ''", "0/1") },
			code: 1, mark: "✗", topic: "checkpoint", text: "instance production", remedy: "set instance = 'default'",
		},
		{
			name: "newer schema", given: func(s *site) {
				checkpoint(s, itself, "0/1")
				s.exec("insert into walhook.schema_migrations values (999)")
			},
			code: 1, mark: "✗", topic: "schema", text: "it is at version 999", remedy: "run the newer walhook",
		},
		{
			name: "older schema of somebody else", given: func(s *site) {
				checkpoint(s, itself, "0/1")
				s.restrict("replication")
				s.exec("%s; delete from walhook.schema_migrations", store.GrantSQL(s.role))
			},
			code: 1, mark: "✗", topic: "schema", text: "may not migrate it", remedy: "walhook init",
		},
		{
			name: "no right to use the schema", given: func(s *site) {
				checkpoint(s, itself, "0/1")
				s.restrict("replication")
			},
			code: 1, mark: "✗", topic: "schema", text: "may not use schema walhook", remedy: "grant usage on schema walhook to",
		},
		{
			name: "no right on a table of the schema", given: func(s *site) {
				checkpoint(s, itself, "0/1")
				s.restrict("replication")
				s.exec("%s; revoke update on walhook.deliveries from %s", store.GrantSQL(s.role), s.role)
			},
			code: 1, mark: "✗", topic: "schema", text: "may not use deliveries of schema walhook", remedy: "grant select, insert, update, delete",
		},
		{
			name: "read-only", given: func(s *site) {
				s.restrict("replication")
				s.exec("alter role %s set default_transaction_read_only = on", s.role)
			},
			code: 1, mark: "✗", topic: "server", text: "read-only", remedy: "set default_transaction_read_only = off",
		},
		{
			name: "sources whose ids may be equal", given: func(s *site) {
				s.exec("create table public.events (id bigint, type text, payload jsonb)")
				s.more = "}, {table: public.events"
			},
			mark: "✓", topic: "columns", text: `"public"."events": id: id (bigint)`,
		},
		{
			name: "two sources of integers", given: func(s *site) {
				s.exec(`create table public.a (id bigint, type text, payload jsonb); create table public.b (id int, type text, payload jsonb)`)
				s.table, s.more = "public.a", "}, {table: public.b"
			},
			code: 1, mark: "✗", topic: "columns", text: "may be equal", remedy: "give each source an id_prefix",
		},
		{
			name: "no such database", given: func(s *site) { s.url += "_gone" },
			code: 1, mark: "✗", topic: "database", text: "there is no database", remedy: "create database",
		},
		{
			name: "no such role", given: func(s *site) { s.as("nobody_here", "x") },
			code: 1, mark: "✗", topic: "database", text: "there is no role nobody_here", remedy: "walhook init",
		},
		{
			name: "role that may not log in", given: func(s *site) { s.restrict("replication"); s.exec("alter role %s nologin", s.role) },
			code: 1, mark: "✗", topic: "database", text: "may not log in", remedy: "with login",
		},
		{
			name: "no TLS", given: func(s *site) { s.url += "?sslmode=require" },
			code: 1, mark: "✗", topic: "database", text: "speaks no TLS", remedy: "sslmode=disable",
		},
		{
			name: "parameter that Postgres does not know", given: func(s *site) { s.url += "?sslmod=require" },
			code: 1, mark: "✗", topic: "database", text: "does not take a parameter of database.url", remedy: "behind the ?",
		},
		{
			name: "host that does not exist", given: func(s *site) { s.url = "postgres://a:s3cret@no-such-host.invalid/b" },
			code: 1, mark: "✗", topic: "database", text: "no-such-host.invalid of database.url cannot be looked up", remedy: "DNS",
		},
		{
			name: "port where nothing listens", given: func(s *site) { s.url = "postgres://a:s3cret@127.0.0.1:1/b" },
			code: 1, mark: "✗", topic: "database", text: "nothing listens at 127.0.0.1:1", remedy: "start Postgres there",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, pgtest.DB(t))
			if c.olderServersDiffer && serverVersion(t, s.admin) < 15 {
				t.Skip("Postgres before 15 has none")
			}
			c.given(s)
			s.finds(c.code, c.mark, c.topic, c.text, c.remedy)
		})
	}
}

func serverVersion(t *testing.T, url string) (major int) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	require.NoError(t, err)
	defer conn.Close(context.Background())
	require.NoError(t, conn.QueryRow(t.Context(), "select current_setting('server_version_num')::int / 10000").Scan(&major))
	return major
}

// hold streams from the slot under an application's name until the test ends.
func (s *site) hold(application string) *pgconn.PgConn {
	s.t.Helper()
	u, err := url.Parse(s.admin)
	require.NoError(s.t, err)
	u.RawQuery = url.Values{"replication": {"database"}, "application_name": {application}}.Encode()
	conn, err := pgconn.Connect(s.t.Context(), u.String())
	require.NoError(s.t, err)
	s.t.Cleanup(func() { _ = conn.Conn().Close() })
	conn.Frontend().SendQuery(&pgproto3.Query{String: fmt.Sprintf("START_REPLICATION SLOT %s LOGICAL 0/0 (proto_version '1', publication_names '%[1]s')", s.name)})
	require.NoError(s.t, conn.Frontend().Flush())
	_, err = conn.ReceiveMessage(s.t.Context()) // CopyBothResponse: the slot is ours
	require.NoError(s.t, err)
	return conn
}

func TestCheckFindsAServerWithoutRoom(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{Settings: map[string]string{"max_replication_slots": "1", "max_wal_senders": "1"}})
	s := newSite(t, server.URL())
	name := s.name
	s.name = "other"
	s.exec("select pg_create_logical_replication_slot('$slot', 'pgoutput'); create publication $slot for table public.outbox")
	s.hold("somebody")
	s.name = name

	s.finds(1, "✗", "slot", "no replication slot is left", "max_replication_slots")
	s.finds(1, "✗", "role", "no replication connection is free", "max_wal_senders")
}

func TestCheckFindsWALThatPilesUpAndASlotThatIsLost(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{Settings: map[string]string{"max_wal_size": "32MB", "min_wal_size": "32MB", "max_slot_wal_keep_size": "1GB", "synchronous_standby_names": ""}})
	s := newSite(t, server.URL())
	s.exec("select pg_create_logical_replication_slot('$slot', 'pgoutput'); select pg_create_logical_replication_slot('greedy', 'pgoutput')")
	for range 5 {
		s.exec("select pg_logical_emit_message(false, '', ''); select pg_switch_wal()")
	}
	s.exec("checkpoint")
	s.finds(0, "!", "slot", "more than max_wal_size", "start it")
	s.finds(0, "!", "limits", "slot greedy, not in use, keeps", "pg_drop_replication_slot('greedy')")

	require.NoError(t, server.Set(t.Context(), map[string]string{"max_slot_wal_keep_size": "1MB"}))
	s.exec("select pg_logical_emit_message(false, '', ''); select pg_switch_wal()")
	s.exec("checkpoint")
	s.finds(1, "✗", "slot", "is invalid (", "pg_drop_replication_slot")

	require.NoError(t, server.Set(t.Context(), map[string]string{"synchronous_standby_names": "FIRST 1 (a, Walhook)"}))
	s.finds(1, "!", "limits", "synchronous_standby_names is FIRST 1 (a, Walhook)", "commit of the app would wait")
}

func TestCheckTellsAWrongPasswordFromAClosedDoor(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{})
	s := newSite(t, server.URL())
	s.restrict("replication")
	s.as(s.role, "wrong")
	hba := func(lines string) {
		require.NoError(t, os.WriteFile(filepath.Join(server.DataDir(), "pg_hba.conf"), []byte(lines+"\nhost all postgres all trust\n"), 0o600))
		require.NoError(t, server.Reload(t.Context()))
	}
	hba("host all " + s.role + " all scram-sha-256")
	s.finds(1, "✗", "database", "refuses the password of role "+s.role, "alter role")
	hba("")
	s.finds(1, "✗", "database", "does not let us in", "pg_hba.conf")
	_, out, _ := s.walhook("check")
	require.Equal(t, 1, strings.Count(out, "✗"), out)
	requireLine(t, out, "✓", "endpoint", "shop", "")

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"db.example.com"}}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	owner, err := os.Stat(server.DataDir())
	require.NoError(t, err)
	for name, block := range map[string]*pem.Block{"server.crt": {Type: "CERTIFICATE", Bytes: cert}, "server.key": {Type: "PRIVATE KEY", Bytes: der}} {
		file := filepath.Join(server.DataDir(), name)
		require.NoError(t, os.WriteFile(file, pem.EncodeToMemory(block), 0o600))
		require.NoError(t, os.Chown(file, int(owner.Sys().(*syscall.Stat_t).Uid), -1))
	}
	require.NoError(t, server.Set(t.Context(), map[string]string{"ssl": "on"}))
	s.url = s.admin + "?sslmode=verify-full"
	s.finds(1, "✗", "database", "is not trusted: x509", "sslrootcert")
	s.url = s.admin + "?sslmode=require"
	s.finds(0, "✓", "server", "Postgres", "")
}

// What no test server can be made to be is judged here.
func TestFindingsOfRareServers(t *testing.T) {
	judge := func(change func(*cdc.Survey)) (warned, well, faulty string) {
		s := &cdc.Survey{
			Version: 170005, WALLevel: "logical", Replication: true, CreateDB: true, SlotsFree: 1, SendersFree: 1, KeepSize: 1024,
			Application: "walhook", SenderTimeout: time.Minute, Around: &cdc.Around{ConnectionLimit: -1},
		}
		change(s)
		for _, f := range s.Findings(&cdc.Config{Slot: "walhook", Publication: "walhook", Create: true}) {
			switch {
			case f.Fault != nil:
				faulty += f.Text + "\n"
			case f.Warn != "":
				warned += f.Text + ": " + f.Warn + "\n"
			default:
				well += f.Text + "\n"
			}
		}
		return warned, well, faulty
	}
	for _, c := range []struct {
		name   string
		change func(*cdc.Survey)
		want   string
	}{
		{"clock ahead", func(s *cdc.Survey) { s.Clock = 31 * time.Second }, "31s ahead of"},
		{"clock behind", func(s *cdc.Survey) { s.Clock = -2 * time.Hour }, "2h0m0s behind"},
		{"old minor", func(s *cdc.Survey) { s.Version = 170004 }, "can lose events"},
		{"old minor of 14", func(s *cdc.Survey) { s.Version = 140017 }, "can lose events"},
		{"no limit", func(s *cdc.Survey) { s.KeepSize = -1 }, "max_slot_wal_keep_size"},
		{"plain text", func(s *cdc.Survey) { s.Around.Remote = true }, "not encrypted"},
		{"idle timeout", func(s *cdc.Survey) { s.Around.IdleTimeout = time.Hour }, "idle_replication_slot_timeout is 1h"},
		{"everybody is synchronous", func(s *cdc.Survey) { s.SyncNames = "*" }, "commit of the app"},
		{"any of us", func(s *cdc.Survey) { s.SyncNames = `ANY 1 (x, "walhook")` }, "commit of the app"},
		{"unreserved", func(s *cdc.Survey) {
			s.Slot = &cdc.Slot{Name: "walhook", Plugin: "pgoutput", WALStatus: "unreserved", Retained: 3 << 30}
		}, "about to be lost: it keeps 3.0 GB"},
		{"an old minor's own mending", func(s *cdc.Survey) { s.Version = 160008 }, "update to 16.9 or later"},
		{"tiny limit", func(s *cdc.Survey) { s.KeepSize = 512 }, "max_slot_wal_keep_size is 512 MB"},
		{"encrypted by chance", func(s *cdc.Survey) { s.Around.Remote, s.Around.Encrypted, s.Around.Fallback = true, true, true }, "encrypted, but need not be"},
		{"no patience", func(s *cdc.Survey) { s.SenderTimeout = 2 * time.Second }, "wal_sender_timeout is 2s"},
		{"endless patience", func(s *cdc.Survey) { s.SenderTimeout = 0 }, "wal_sender_timeout is off"},
		{"password that expires", func(s *cdc.Survey) { s.Around.PasswordLeft = 48 * time.Hour }, "expires in 48h0m0s"},
		{"long transaction", func(s *cdc.Survey) {
			s.Around.Pinned = []cdc.Pin{{PID: 4711, Role: "app", App: "psql", Database: "shop", Age: time.Hour}}
		}, "select pg_terminate_backend(4711)"},
		{"prepared transaction", func(s *cdc.Survey) {
			s.Around.Pinned = []cdc.Pin{{Prepared: "it's", Role: "app", Database: "shop", Age: time.Hour}}
		}, "rollback prepared 'it''s'"},
		{"replication through a pooler", func(s *cdc.Survey) { s.Around.Pooler = "a pooler" }, "it passes replication on"},
		{"updates without a key", func(s *cdc.Survey) {
			s.Publication = &cdc.Publication{Name: "walhook", Insert: true, Changes: true, ViaRoot: true, Owned: true}
			s.Tables = []cdc.Found{{Table: cdc.Table{Schema: "public", Name: "outbox"}, OID: 1, Kind: 'r', Select: true, Published: true, Keyless: true}}
		}, `set (publish = 'insert')`},
		{"all tables", func(s *cdc.Survey) {
			s.Publication = &cdc.Publication{Name: "walhook", AllTables: true, Insert: true, ViaRoot: true, Owned: true}
		}, "publishes all tables"},
		{"second instance without a connection", func(s *cdc.Survey) {
			s.SendersFree = 0
			s.Slot = &cdc.Slot{Name: "walhook", Plugin: "pgoutput", WALStatus: "reserved", ActivePID: 7}
			s.Around.Holder = "walhook"
		}, "could not stand by"},
	} {
		t.Run(c.name, func(t *testing.T) {
			warned, _, faulty := judge(c.change)
			require.Contains(t, warned, c.want)
			require.Empty(t, faulty)
		})
	}
	for name, change := range map[string]func(*cdc.Survey){
		"clock nearly right":       func(s *cdc.Survey) { s.Clock = 29 * time.Second },
		"clock asked from afar":    func(s *cdc.Survey) { s.Clock, s.Blur = 40*time.Second, 11*time.Second },
		"another's standby":        func(s *cdc.Survey) { s.SyncNames = "walhook2, notwalhook" },
		"encrypted":                func(s *cdc.Survey) { s.Around.Remote, s.Around.Encrypted = true, true },
		"patched minor":            func(s *cdc.Survey) { s.Version = 160009 },
		"short transaction":        func(s *cdc.Survey) { s.Around.Pinned = []cdc.Pin{{PID: 1, Age: 14 * time.Minute}} },
		"CloudNativePG's patience": func(s *cdc.Survey) { s.SenderTimeout = 5 * time.Second },
		"password of a year":       func(s *cdc.Survey) { s.Around.PasswordLeft = 8760 * time.Hour },
		"updates with a key": func(s *cdc.Survey) {
			s.Publication = &cdc.Publication{Name: "walhook", Insert: true, Changes: true, ViaRoot: true, Owned: true}
			s.Tables = []cdc.Found{{Table: cdc.Table{Schema: "public", Name: "outbox"}, OID: 1, Kind: 'r', Select: true, Published: true}}
		},
		"idle timeout of a month": func(s *cdc.Survey) { s.Around.IdleTimeout = 30 * 24 * time.Hour },
	} {
		t.Run(name, func(t *testing.T) {
			warned, _, faulty := judge(change)
			require.Empty(t, warned+faulty)
		})
	}
	_, _, faulty := judge(func(s *cdc.Survey) { s.Version = 130022 })
	require.Contains(t, faulty, "too old")
	_, _, faulty = judge(func(s *cdc.Survey) { s.Recovering = true })
	require.Contains(t, faulty, "standby in recovery")
}

func TestCheckOfEndpoints(t *testing.T) {
	secure := httptest.NewTLSServer(http.NotFoundHandler())
	t.Cleanup(secure.Close)
	plain := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(plain.Close)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, closed.Close())

	path := filepath.Join(t.TempDir(), "walhook.yaml")
	secret := "secrets: [whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw]"
	require.NoError(t, os.WriteFile(path, []byte(fmt.Sprintf(`database: {url: "postgres://a:s3cret@127.0.0.1:1/b"}
outbox: [{table: public.outbox}]
endpoints:
  - {id: good, url: "%s/?token=s3cret", %[5]s}
  - {id: unsigned, url: "%[1]s"}
  - {id: unsigned-on-purpose, url: "%[1]s", signing: none}
  - {id: self-signed, url: "%[2]s", %[5]s}
  - {id: no-tls, url: "%[3]s", %[5]s}
  - {id: closed, url: "http://%[4]s", %[5]s}
  - {id: denied, url: "%[1]s", network: {deny: [127.0.0.0/8]}, %[5]s}
  - {id: nowhere, url: "http://no-such-host.invalid/s3cret", %[5]s}
`, plain.URL, secure.URL, strings.Replace(plain.URL, "http:", "https:", 1), closed.Addr(), secret)), 0o600))
	code, out, _ := walhook(t, "check", "-c", path)
	require.Equal(t, exitFailed, code)
	require.NotContains(t, out, "s3cret")

	requireLine(t, out, "✗", "database", "nothing listens", "start Postgres")
	requireLine(t, out, "✓", "endpoint", "good: 127.0.0.1 answers", "")
	requireLine(t, out, "!", "endpoint", "unsigned: its requests are not signed", "endpoints[1].secrets")
	requireLine(t, out, "✓", "endpoint", "unsigned-on-purpose: ", "")
	require.NotContains(t, out, "unsigned-on-purpose: its requests")
	requireLine(t, out, "✗", "endpoint", "self-signed: 127.0.0.1: x509", "endpoints[3].tls.ca")
	requireLine(t, out, "✗", "endpoint", "no-tls: 127.0.0.1: the receiver answers in plain HTTP", "certificate")
	requireLine(t, out, "✗", "endpoint", "closed: 127.0.0.1: connect to", "start the receiver")
	requireLine(t, out, "✗", "endpoint", "denied: ", "endpoints[6].network.allow")
	requireLine(t, out, "✗", "endpoint", "nowhere: no-such-host.invalid: the host name", "DNS")
	requireLine(t, out, "!", "endpoint", "nowhere: its URL is plain http", "https")
}

func TestCheckOfABrokenConfig(t *testing.T) {
	path := filepath.Join(t.TempDir(), "walhook.yaml")
	for _, c := range []struct{ name, text, want, remedy string }{
		{"unknown key", threeLines + "bufer: {}\n", "unknown key, did you mean buffer?", "allowed: database, cdc"},
		{"bad URL", strings.Replace(threeLines, "https://", "ftp://", 1), "endpoints[0].url: does not begin with", "allowed: https://host"},
		{"bad database URL", strings.Replace(threeLines, "postgres://app@localhost/shop", "mysql://app", 1), "database.url: is not the address", "allowed: postgres://"},
		{"database URL that Postgres cannot read", strings.Replace(threeLines, "localhost/shop", "localhost:many/shop", 1), "database.url: it is not a Postgres URL", "allowed: postgres://"},
		{"file that the database URL names", strings.Replace(threeLines, "/shop", "/shop?sslmode=verify-full&sslrootcert=/gone.pem", 1), "/gone.pem: no such file", "allowed: postgres://"},
		{"malformed secret", in("secrets: [whsec_???]"), "endpoints[0].secrets[0]", ""},
		{"column without a name", strings.Replace(threeLines, "public.outbox", "public.outbox, columns: {id: \"\"}", 1), "columns.id: is empty", "allowed: a column's name"},
	} {
		t.Run(c.name, func(t *testing.T) {
			require.NoError(t, os.WriteFile(path, []byte(c.text), 0o600))
			code, out, errs := walhook(t, "check", "-c", path)
			require.Equal(t, exitUsage, code, out)
			requireLine(t, out, "✗", "config", c.want, c.remedy)
			require.Contains(t, errs, "is broken: 1 mistake")
			require.NotContains(t, out, "whsec_?")
		})
	}
	code, out, _ := walhook(t, "check", "-c", path+".gone")
	require.Equal(t, exitUsage, code)
	requireLine(t, out, "✗", "config", "no such file", "--config or WALHOOK_CONFIG")
	code, _, errs := walhook(t, "check", "--output", "xml")
	require.Equal(t, exitUsage, code)
	require.Contains(t, errs, "table or json")
}

func TestCheckAsJSON(t *testing.T) {
	path := filepath.Join(t.TempDir(), "walhook.yaml")
	require.NoError(t, os.WriteFile(path, []byte(strings.Replace(threeLines, "localhost", "127.0.0.1:1", 1)), 0o600))
	code, out, _ := walhook(t, "check", "-c", path, "--output", "json")
	require.Equal(t, exitFailed, code)
	var got struct {
		Status  string
		Results []struct{ Topic, Status, Text, Remedy string }
	}
	require.NoError(t, json.Unmarshal([]byte(out), &got))
	require.Equal(t, "failed", got.Status)
	require.Equal(t, "config", got.Results[0].Topic)
	require.Equal(t, "ok", got.Results[0].Status)
	require.Equal(t, "database", got.Results[1].Topic)
	require.Equal(t, "failed", got.Results[1].Status)
	require.NotEmpty(t, got.Results[1].Remedy)
}

// A config is looked at where there is no database yet.
func TestCheckOfTheConfigAloneAsksNobody(t *testing.T) {
	path := filepath.Join(t.TempDir(), "walhook.yaml")
	require.NoError(t, os.WriteFile(path, []byte(threeLines), 0o600))
	code, out, _ := walhook(t, "check", "--config-only", "--config", path)
	require.Zero(t, code)
	require.Equal(t, 1, strings.Count(out, "\n"), out)
	requireLine(t, out, "✓", "config", "1 source, 1 endpoint", "")

	require.NoError(t, os.WriteFile(path, []byte(threeLines+"defaults: {filter: 'data.amount >'}\n"), 0o600))
	code, out, _ = walhook(t, "check", "--config-only", "--config", path)
	require.Equal(t, exitUsage, code)
	require.Contains(t, out, "defaults.filter: is no valid CEL")
}
