package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/cdc/pgtest"
)

// remedies are what a check says to do about one line; none where the line is not there.
func (s *site) remedies(mark, topic, text string) (remedies []string) {
	s.t.Helper()
	_, out, _ := s.walhook("check", "--output", "json")
	var got struct{ Results []result }
	require.NoError(s.t, json.Unmarshal([]byte(out), &got), out)
	for _, r := range got.Results {
		if r.Grade.mark() == mark && r.Topic == topic && strings.Contains(r.Text, text) {
			remedies = append(remedies, r.Remedy)
		}
	}
	return remedies
}

var sqlWithin = regexp.MustCompile(`(alter|create|grant|select|drop|delete|update|rollback) .*`)

// mends runs what a check says, statement by statement as psql would, and demands that the line is gone.
func (s *site) mends(mark, topic, text string, server *pgtest.Server) {
	s.t.Helper()
	remedies := s.remedies(mark, topic, text)
	require.Len(s.t, remedies, 1, "%s %s %s", mark, topic, text)
	sql := sqlWithin.FindString(remedies[0])
	require.NotEmpty(s.t, sql, "there is no SQL in: %s", remedies[0])
	for statement := range strings.SplitSeq(sql, "; ") {
		switch {
		case statement == "then restart Postgres":
			require.NotNil(s.t, server, remedies[0])
			restart(s.t, server)
		case statement == "select pg_reload_conf()":
			s.exec("%s", statement)
			require.NoError(s.t, server.Reload(s.t.Context())) // which waits for it
		case strings.HasPrefix(statement, "or "): // another way
		default:
			s.exec("%s", statement)
		}
	}
	require.Empty(s.t, s.remedies(mark, topic, text), "it is still there after: %s", sql)
}

func restart(t *testing.T, server *pgtest.Server) {
	t.Helper()
	require.NoError(t, server.Stop(t.Context(), pgtest.Fast))
	require.NoError(t, server.Start(t.Context()))
}

// What check prints is exact: run as it stands, it mends what it was printed for.
func TestWhatCheckPrintsMends(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name              string
		given             func(s *site)
		mark, topic, text string
	}{
		{"right to replicate", func(s *site) { s.restrict("") }, "✗", "role", "lacks REPLICATION"},
		{"publication to be made", func(s *site) { s.restrict("replication") }, "✗", "publication", "may not create publication"},
		{"publication, create: false", func(s *site) { s.cdc = ", create: false" }, "✗", "publication", "does not exist"},
		{"slot, create: false", func(s *site) { s.cdc = ", create: false" }, "✗", "slot", "does not exist"},
		{"table to be added", func(s *site) { s.restrict("replication"); s.exec("create publication $slot") }, "✗", "publication", `lacks "public"."outbox", and role`},
		{"table to be added, create: false", func(s *site) { s.cdc = ", create: false"; s.exec("create publication $slot") }, "✗", "table", "lacks table"},
		{"inserts", func(s *site) {
			s.exec("create publication $slot for table public.outbox with (publish = 'update')")
		}, "✗", "publication", "does not publish inserts"},
		{"updates without a key", func(s *site) {
			s.exec("alter table public.outbox drop constraint outbox_pkey; create publication $slot for table public.outbox")
		}, "!", "publication", "whose rows nothing tells apart"},
		{"partitions", func(s *site) {
			s.exec(`create table public.parts (id bigint, type text, payload jsonb) partition by hash (id);
				create table public.p0 partition of public.parts for values with (modulus 1, remainder 0);
				create publication $slot for table public.parts with (publish = 'insert')`)
			s.table = "parts"
		}, "✗", "publication", "under their own names"},
		{"unlogged", func(s *site) { s.exec("alter table public.outbox set unlogged") }, "✗", "table", "unlogged"},
		{"table not readable", func(s *site) { s.restrict("replication") }, "!", "table", "may not read"},
		{"read-only", func(s *site) {
			s.restrict("replication")
			s.exec("alter role %s set default_transaction_read_only = on", s.role)
		}, "✗", "server", "read-only"},
		{"slot of another plugin", func(s *site) { s.exec("select pg_create_logical_replication_slot('$slot', 'test_decoding')") }, "✗", "slot", "plugin test_decoding"},
		{"role that may not log in", func(s *site) { s.restrict("replication"); s.exec("alter role %s nologin", s.role) }, "✗", "database", "may not log in"},
		{"too few connections", func(s *site) { s.restrict("replication connection limit 8") }, "!", "role", "may have 8 connections"},
		{"password that expires", func(s *site) {
			s.restrict("replication")
			s.exec("do $$ begin execute format('alter role %s valid until %%L', now() + interval '2 days'); end $$", s.role)
		}, "!", "role", "expires in"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, pgtest.DB(t))
			c.given(s)
			s.mends(c.mark, c.topic, c.text, nil)
		})
	}
}

// Of what belongs to the whole server there is one for each setting, which is set wrong and mended in turn.
func TestWhatCheckPrintsMendsTheServer(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{})
	s := newSite(t, server.URL())
	s.mends("!", "limits", "max_slot_wal_keep_size is not limited", server)
	for sql, text := range map[string]string{
		"max_slot_wal_keep_size = '64MB'":                 "max_slot_wal_keep_size is 64 MB",
		"wal_sender_timeout = 0":                          "wal_sender_timeout is off",
		"wal_sender_timeout = '1s'":                       "wal_sender_timeout is 1s",
		"synchronous_standby_names = 'FIRST 1 (walhook)'": "synchronous_standby_names is FIRST 1 (walhook)",
	} {
		s.exec("alter system set %s", sql)
		require.NoError(t, server.Reload(t.Context()))
		s.mends("!", "limits", text, server)
	}
	s.exec("alter system set wal_level = replica")
	s.exec("alter system set max_replication_slots = 0")
	restart(t, server)
	s.mends("✗", "wal_level", "wal_level is replica", server)
	s.mends("✗", "slot", "no replication slot is left", server)
	s.exec("alter system set max_wal_senders = 0")
	s.exec("alter system set wal_level = logical")
	restart(t, server)
	s.mends("✗", "role", "no replication connection is free", server)
	code, out, errs := s.walhook("check", "--strict")
	require.Equal(t, exitDone, code, out+errs)
}

// A server that shows itself to be Amazon's is given Amazon's advice, which the SQL of init follows.
func TestCheckKnowsTheProvider(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{})
	s := newSite(t, server.URL())
	s.exec("create role rds_superuser; create role rds_replication")
	s.restrict("")
	s.finds(1, "✓", "server", "of Amazon RDS or Aurora, database postgres", "")
	s.finds(1, "!", "limits", "max_slot_wal_keep_size", "where the DB parameter group has it")
	s.mends("✗", "role", "lacks REPLICATION", nil)

	_, out, _ := s.walhook("init", "--admin-url", s.admin)
	require.Contains(t, out, "-- What walhook needs at Amazon RDS or Aurora")
	require.Contains(t, out, "-- Not needed: has it.")
	s.exec("revoke rds_replication from %s", s.role)
	_, out, _ = s.walhook("init", "--admin-url", s.admin)
	require.Contains(t, out, "\ngrant rds_replication to "+`"`+s.role+`"`)
	code, out, errs := s.walhook("init", "--apply", "--admin-url", s.admin)
	require.Equal(t, exitDone, code, out+errs)
	require.Equal(t, "true", s.ask("select pg_has_role($1, 'rds_replication', 'member')::text", s.role))
	require.Equal(t, "false", s.ask("select rolreplication::text from pg_roles where rolname = $1", s.role))
}

func TestProviderCanBeNamed(t *testing.T) {
	t.Parallel()
	s := newSite(t, pgtest.DB(t))
	s.restrict("")
	code, out, _ := s.walhook("check", "--provider", "neon")
	require.Equal(t, exitFailed, code)
	requireLine(t, out, "✓", "server", "(advice for Neon)", "")
	requireLine(t, out, "✗", "role", "lacks REPLICATION", "as a member of neon_superuser, where Neon lets you: alter role")
	code, _, errs := s.walhook("check", "--provider", "heroku")
	require.Equal(t, exitUsage, code)
	require.Contains(t, errs, "want plain, rds, cloudsql, azure, supabase, neon, cloudnativepg")
	code, _, _ = s.walhook("init", "--provider", "heroku")
	require.Equal(t, exitUsage, code)
}

func TestInitPrintsWhatFitsTheProvider(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "walhook.yaml")
	require.NoError(t, os.WriteFile(path, []byte(strings.Replace(threeLines, "app@localhost", "app:s3cret@127.0.0.1:1", 1)), 0o600))
	for provider, want := range map[cdc.Provider][]string{
		cdc.Plain:         {"by\n-- a superuser, or the owner", "login password 'SCRAM-SHA-256$", `alter role "app" with replication`, "-- alter system set wal_level"},
		cdc.RDS:           {"at Amazon RDS or Aurora", "-- the master user", "login password 'SCRAM-SHA-256$", "\ngrant rds_replication to \"app\";", "rds.logical_replication = 1"},
		cdc.CloudSQL:      {"at Google Cloud SQL", "cloudsqlsuperuser", "\nalter role \"app\" with replication;", "cloudsql.logical_decoding = on"},
		cdc.Azure:         {"at Azure Database for PostgreSQL", "azure_pg_admin", "\nalter role \"app\" with replication;", "Server parameters: wal_level"},
		cdc.Supabase:      {"at Supabase", "-- the role postgres", "\nalter role \"app\" with replication;"},
		cdc.Neon:          {"at Neon", "neon_superuser", `create role "app" login;`, `alter role "app" password '<as in database.url>'`, "Settings, Logical Replication"},
		cdc.CloudNativePG: {"at CloudNativePG", "enableSuperuserAccess", `spec.managed.roles: [{name: "app"`, "\nalter role \"app\" with replication;"},
	} {
		code, out, errs := walhook(t, "init", "-c", path, "--provider", string(provider))
		require.Equal(t, exitDone, code, errs)
		for _, text := range want {
			require.Contains(t, out, text, provider)
		}
		require.NotContains(t, out, "s3cret")
		require.Equal(t, provider == cdc.Neon, !strings.Contains(out, "SCRAM-SHA-256"), provider)
	}
}

// Supabase gives the right to no role of one's own before 17.
func TestInitAtSupabaseBefore17(t *testing.T) {
	t.Parallel()
	s := newSite(t, pgtest.DB(t))
	s.newRole(s.name + "_role")
	code, out, errs := s.walhook("init", "--apply", "--admin-url", s.admin, "--provider", "supabase")
	require.Equal(t, exitDone, code, out+errs)
	if serverVersion(t, s.admin) < 17 {
		require.Contains(t, out, "- its right to replicate: not to be had")
		require.Equal(t, "false", s.ask("select rolreplication::text from pg_roles where rolname = $1", s.role))
		return
	}
	require.Contains(t, out, "✓ its right to replicate")
}

func TestStrictCountsWarnings(t *testing.T) {
	t.Parallel()
	s := newSite(t, pgtest.DB(t))
	s.finds(exitDone, "!", "limits", "max_slot_wal_keep_size", "")
	code, out, errs := s.walhook("check", "--strict")
	require.Equal(t, exitFailed, code, out)
	require.Contains(t, errs, "check found 1 warning, which --strict does not let pass")
}

// The keys of the JSON, and the words of topic and status, are what docs/commands.md says.
func TestJSONOfCheckIsStable(t *testing.T) {
	t.Parallel()
	s := newSite(t, pgtest.DB(t))
	_, out, _ := s.walhook("check", "--output", "json")
	var got map[string]json.RawMessage
	require.NoError(t, json.Unmarshal([]byte(out), &got))
	require.Len(t, got, 3)
	require.JSONEq(t, `"warning"`, string(got["status"]))
	require.JSONEq(t, `"plain"`, string(got["provider"]))
	var results []map[string]string
	require.NoError(t, json.Unmarshal(got["results"], &results))
	for _, r := range results {
		require.NotEmpty(t, r["topic"])
		require.Contains(t, []string{"ok", "warning", "failed"}, r["status"])
		require.NotEmpty(t, r["text"])
		require.Equal(t, r["status"] != "ok", r["remedy"] != "", r)
		for key := range r {
			require.Contains(t, []string{"topic", "status", "text", "remedy"}, key)
		}
	}
}

var topicOf = regexp.MustCompile(`\b(?:ok|bad|warn)\("([a-z_]+)"|Topic: "([a-z_]+)"|faultResult\("([a-z_]+)"|\(topic, "([a-z_]+)"`)

// docs/commands.md has every topic that the code knows, and no other.
func TestTopicsOfCheckAreDocumented(t *testing.T) {
	t.Parallel()
	known := map[string]bool{}
	for _, file := range []string{"check.go", "../../cdc/survey.go", "../../cdc/failover.go", "../../cdc/mirror.go"} {
		source, err := os.ReadFile(file)
		require.NoError(t, err)
		for _, m := range topicOf.FindAllStringSubmatch(string(source), -1) {
			known[strings.Join(m[1:], "")] = true
		}
	}
	require.Greater(t, len(known), 10)
	page, err := os.ReadFile("../../docs/commands.md")
	require.NoError(t, err)
	_, table, _ := strings.Cut(string(page), "| topic |")
	table, _, _ = strings.Cut(table, "\n\n")
	documented := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\|").FindAllStringSubmatch(table, -1) {
		documented[m[1]] = true
	}
	require.Equal(t, known, documented)
}
