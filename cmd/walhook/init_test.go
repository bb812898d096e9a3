package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc/pgtest"
)

// newRole names a role that init is to make, and has the config connect as it.
func (s *site) newRole(role string) {
	s.role = role
	s.dropRole(role)
	s.as(role, "it's a $ecret")
}

func (s *site) dropRole(role string) {
	s.t.Cleanup(func() {
		s.exec(`do $$ begin
			if exists (select from pg_roles where rolname = %[1]s) then
				execute format('drop owned by %%1$I cascade; drop role %%1$I', %[1]s);
			end if;
		end $$`, "'"+strings.ReplaceAll(role, "'", "''")+"'")
	})
}

func (s *site) ask(sql string, args ...any) (answer string) {
	s.t.Helper()
	conn, err := pgx.Connect(s.t.Context(), s.admin)
	require.NoError(s.t, err)
	defer conn.Close(context.Background())
	require.NoError(s.t, conn.QueryRow(s.t.Context(), sql, args...).Scan(&answer))
	return answer
}

// fingerprint is all that init can change.
func (s *site) fingerprint() string {
	s.t.Helper()
	return s.ask(`select jsonb_pretty(jsonb_build_array(
		(select to_jsonb(r) - 'rolpassword' from pg_roles r where rolname = $1),
		(select jsonb_build_array(datacl) from pg_database where datname = current_database()),
		(select jsonb_agg(to_jsonb(n) order by nspname) from pg_namespace n where nspname in ('public', 'walhook')),
		(select jsonb_agg(jsonb_build_array(oid::regclass, relowner, relacl) order by oid) from pg_class where relnamespace in ('public'::regnamespace, 'walhook'::regnamespace)),
		(select jsonb_agg(jsonb_build_array(oid, proowner, proacl) order by oid) from pg_proc where pronamespace = 'walhook'::regnamespace),
		(select jsonb_agg(to_jsonb(p)) from pg_publication p where pubname = $2),
		(select jsonb_agg(to_jsonb(p) order by tablename) from pg_publication_tables p where pubname = $2),
		(select jsonb_agg(to_jsonb(m)) from pg_auth_members m where roleid = $3::regrole)))::text`,
		s.role, s.name, pgx.Identifier{s.role}.Sanitize())
}

// A role with nothing but LOGIN, REPLICATION and what init grants runs the whole way, from an
// empty server to a webhook.
func TestInitIsAllThatRunNeeds(t *testing.T) {
	for _, c := range []struct {
		name, role string
		flags      []string
	}{
		{name: "schema of its own", role: ""},
		{name: "schema granted", role: "_granted", flags: []string{"--grant"}},
		{name: "a name that must be quoted", role: ` "Wal" hook's $walhook$ %s`},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSite(t, pgtest.DB(t))
			s.newRole(s.name + c.role)
			got := make(chan string, 8)
			rx := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				got <- string(body)
			}))
			t.Cleanup(rx.Close)
			s.hooks = rx.URL

			code, out, errs := s.walhook(append([]string{"init", "--apply", "--admin-url", s.admin}, c.flags...)...)
			require.Equal(t, exitDone, code, out+errs)
			require.Equal(t, "true", s.ask(`select (rolcanlogin and rolreplication and not (rolsuper or rolcreatedb or rolcreaterole or rolbypassrls))::text from pg_roles where rolname = $1`, s.role))
			require.Equal(t, "false", s.ask(`select has_database_privilege($1, current_database(), 'create')::text`, s.role))
			require.NotContains(t, out+errs, "$ecret")

			code, out, errs = s.walhook("check")
			require.Equal(t, exitDone, code, out+errs)
			requireLine(t, out, "✓", "schema", "schema walhook, version", "")
			require.NotContains(t, strings.ReplaceAll(out, "! limits", ""), "! ", "nothing but max_slot_wal_keep_size is amiss")

			s.runs(func() {
				s.exec(`insert into public.outbox (event_type, payload) values ('order.created', '{"n": 1}')`)
				var event struct {
					Type string
					Data struct{ N int }
				}
				require.NoError(t, json.Unmarshal([]byte(<-got), &event))
				require.Equal(t, "order.created", event.Type)
				require.Equal(t, 1, event.Data.N)

				code, out, errs := s.walhook("check")
				require.Equal(t, exitDone, code, out+errs)
				requireLine(t, out, "✓", "slot", "in use by pid", "")
				requireLine(t, out, "✓", "checkpoint", "of instance default", "")
			})

			before := s.fingerprint()
			code, out, errs = s.walhook(append([]string{"init", "--apply", "--admin-url", s.admin}, c.flags...)...)
			require.Equal(t, exitDone, code, out+errs)
			require.Equal(t, before, s.fingerprint(), "a second init changes nothing")
		})
	}
}

// runs has a sidecar beside while it streams, and stops it.
func (s *site) runs(while func()) {
	s.t.Helper()
	ctx, stop := context.WithCancel(s.t.Context())
	log := &watched{until: `"msg":"streaming"`, seen: make(chan struct{})}
	ended := make(chan int, 1)
	go func() { ended <- run(ctx, []string{"run", "--config", s.write()}, noEnv, io.Discard, log) }()
	select {
	case <-log.seen:
		while()
	case code := <-ended:
		ended <- code
		s.t.Errorf("run ended before it streamed: %s", log.String())
	}
	stop()
	require.Equal(s.t, exitDone, <-ended, log.String())
}

// watched is a log that tells when a text came.
type watched struct {
	bytes.Buffer // written under the logger's lock
	until        string
	seen         chan struct{}
}

func (w *watched) Write(p []byte) (int, error) {
	if w.until != "" && bytes.Contains(p, []byte(w.until)) {
		close(w.seen)
		w.until = ""
	}
	return w.Buffer.Write(p)
}

func TestInitPrintsWithoutADatabase(t *testing.T) {
	path := filepath.Join(t.TempDir(), "walhook.yaml")
	text := strings.NewReplacer("app@localhost", `we%22ird:s3cret@127.0.0.1:1`, "public.outbox}", `public.outbox}, {table: 'shop."Out""Box"', id_prefix: s_}`).Replace(threeLines)
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	code, out, errs := walhook(t, "init", "-c", path)
	require.Equal(t, exitDone, code, errs)
	require.Empty(t, errs)
	for _, want := range []string{
		`create role "we""ird" login password 'SCRAM-SHA-256$4096:`,
		`alter role "we""ird" with replication`,
		`grant usage on schema "shop" to "we""ird"`,
		`grant select on table "shop"."Out""Box" to "we""ird"`,
		`alter schema walhook owner to "we""ird"`,
		`create publication "walhook" for table "public"."outbox", "shop"."Out""Box" with (publish = 'insert', publish_via_partition_root = true)`,
		`-- select pg_create_logical_replication_slot('walhook', 'pgoutput');`,
	} {
		require.Contains(t, out, want)
	}
	require.NotContains(t, out, "s3cret")

	_, out, _ = walhook(t, "init", "-c", path, "--role", "other", "--grant")
	require.Contains(t, out, `create role "other" login;`)
	require.Contains(t, out, `\password other`)
	require.Contains(t, out, `on all tables in schema walhook to "other"`)
	require.NotContains(t, out, "alter schema walhook")

	code, _, errs = walhook(t, "init", "-c", path, "--apply")
	require.Equal(t, exitFailed, code)
	require.Contains(t, errs, "nothing listens at 127.0.0.1:1")
	require.NotContains(t, errs, "s3cret")

	code, _, errs = walhook(t, "init", "-c", path, "--admin-url", "postgres://admin@localhost/postgres")
	require.Equal(t, exitUsage, code)
	require.Contains(t, errs, "--admin-url leads to database postgres, but database.url to shop")
}

// What is printed is what is applied: psql runs it, twice, and check has nothing left to say.
func TestWhatInitPrintsRunsInPsql(t *testing.T) {
	psql, err := exec.LookPath("psql")
	if err != nil {
		t.Skip("there is no psql here")
	}
	for name, exists := range map[string]bool{"role to be made": false, "role without a right": true} {
		t.Run(name, func(t *testing.T) { initThroughPsql(t, psql, exists) })
	}
}

func initThroughPsql(t *testing.T, psql string, exists bool) {
	s := newSite(t, pgtest.DB(t))
	s.newRole(s.name + "_role")
	if exists {
		s.exec("create role %s login", s.role)
	}
	code, before, errs := s.walhook("init")
	require.Equal(t, exitDone, code, errs)
	for range 2 {
		cmd := exec.CommandContext(t.Context(), psql, "--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1", s.admin)
		cmd.Stdin = strings.NewReader(before)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, string(out))
	}
	code, out, errs := s.walhook("check")
	require.Equal(t, exitDone, code, out+errs)

	_, after, _ := s.walhook("init", "--admin-url", s.admin)
	require.Contains(t, after, "-- Not needed: exists.\n-- do $walhook$")
	require.Contains(t, after, "-- Not needed: has it.")
}

func TestInitMendsAPublication(t *testing.T) {
	s := newSite(t, pgtest.DB(t))
	s.exec("create publication $slot with (publish = 'update')")
	code, out, errs := s.walhook("init", "--apply")
	require.Equal(t, exitDone, code, out+errs)
	require.Contains(t, out, "- the role postgres: exists")
	require.Contains(t, out, "- its rights on the database and the outbox: is the role that runs this")
	require.Contains(t, out, "✓ the publication "+s.name)
	require.Equal(t, "true", s.ask("select (pubinsert and pubviaroot)::text from pg_publication where pubname = $1", s.name))
	code, out, errs = s.walhook("check")
	require.Equal(t, exitDone, code, out+errs)
}

func TestInitForMessagesAlone(t *testing.T) {
	s := newSite(t, pgtest.DB(t))
	s.newRole(s.name + "_role")
	s.source = "messages: shop"
	for range 2 {
		code, out, errs := s.walhook("init", "--apply", "--admin-url", s.admin)
		require.Equal(t, exitDone, code, out+errs)
	}
	code, out, errs := s.walhook("check")
	require.Equal(t, exitDone, code, out+errs)
}

func TestInitSaysWhichStepFailed(t *testing.T) {
	t.Parallel()
	t.Run("table missing", func(t *testing.T) {
		s := newSite(t, pgtest.DB(t))
		s.newRole(s.name + "_role")
		s.table = "public.gone"
		code, out, errs := s.walhook("init", "--apply", "--admin-url", s.admin)
		require.Equal(t, exitFailed, code)
		require.Contains(t, out, "✗ its rights on the database and the outbox\n    ERROR: relation \"public.gone\" does not exist")
		require.Contains(t, errs, "create the outbox table first")
	})
	t.Run("rights missing", func(t *testing.T) {
		s := newSite(t, pgtest.DB(t))
		s.restrict("")
		code, out, errs := s.walhook("init", "--apply")
		require.Equal(t, exitFailed, code)
		require.Contains(t, out, "✗ its right to replicate")
		require.Contains(t, errs, "it needs a superuser")
	})
	t.Run("outbox locked", func(t *testing.T) {
		t.Parallel() // it waits for as long as init is willing to
		s := newSite(t, pgtest.DB(t))
		conn, err := pgx.Connect(t.Context(), s.admin)
		require.NoError(t, err)
		defer conn.Close(context.Background())
		_, err = conn.Exec(t.Context(), "begin; lock table public.outbox")
		require.NoError(t, err)
		code, out, errs := s.walhook("init", "--apply")
		require.Equal(t, exitFailed, code)
		require.Contains(t, out, "✗ the publication")
		require.Contains(t, errs, "a long transaction writes to the outbox")
	})
}

// The owner of the database and its tables, who may create roles but is no superuser, is as
// much of an admin as managed services have.
func TestInitByAnOwnerWhoIsNoSuperuser(t *testing.T) {
	s := newSite(t, pgtest.DB(t))
	owner := s.name + "_owner"
	s.exec("create role %s login createrole password 'x'", owner)
	s.dropRole(owner)
	s.exec("do $$ begin execute format('alter database %%I owner to %s', current_database()); end $$; alter table public.outbox owner to %[1]s; alter schema public owner to %[1]s", owner)
	t.Cleanup(func() {
		s.exec("do $$ begin execute format('alter database %%I owner to postgres', current_database()); end $$")
	})
	s.newRole(s.name + "_role")
	s.exec("create role %s login replication password 'it''s a $ecret'", s.role) // REPLICATION is for a superuser to give
	if serverVersion(t, s.admin) >= 16 {
		s.exec("grant %s to %s with admin true, inherit false, set false", s.role, owner) // as who creates a role gets it
	}
	u, err := url.Parse(s.admin)
	require.NoError(t, err)
	u.User = url.UserPassword(owner, "x")

	code, out, errs := s.walhook("init", "--apply", "--admin-url", u.String())
	require.Equal(t, exitDone, code, out+errs)
	code, out, errs = s.walhook("check")
	require.Equal(t, exitDone, code, out+errs)
	code, out, errs = s.walhook("init", "--apply", "--admin-url", u.String())
	require.Equal(t, exitDone, code, out+errs)
}

// The verifier is the password to Postgres: the server that asks for a password takes it.
func TestTheVerifierIsThePassword(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{})
	s := newSite(t, server.URL())
	s.newRole(s.name + "_role")
	require.NoError(t, os.WriteFile(filepath.Join(server.DataDir(), "pg_hba.conf"), []byte("host all postgres all trust\nhost all all all scram-sha-256\n"), 0o600))
	require.NoError(t, server.Reload(t.Context()))
	code, out, errs := s.walhook("init", "--apply", "--admin-url", s.admin)
	require.Equal(t, exitDone, code, out+errs)
	code, out, errs = s.walhook("check")
	require.Equal(t, exitDone, code, out+errs)
	log, err := os.ReadFile(server.LogFile())
	require.NoError(t, err)
	require.NotContains(t, string(log), "$ecret")

	for _, password := range []string{"", "pässword", "line\nbreak"} {
		verifier, err := scramVerifier(password)
		require.NoError(t, err)
		require.Empty(t, verifier)
	}
}
