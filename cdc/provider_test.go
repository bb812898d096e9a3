package cdc

import (
	"context"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc/pgtest"
)

// advised are the faults whose remedy differs from provider to provider, each as Findings or a connection
// would ask for it.
func advised(p Provider) map[string]string {
	of := func(host string, port uint16) Route { return Route{Host: host, Port: port, User: "walhook.abcd"} }
	hosts := map[Provider]Route{
		Plain: {Host: "pool.example.com", Port: 6432, User: "walhook", Server: "10.0.0.5:5432"}, RDS: of("shop.proxy-c9.eu-west-1.rds.amazonaws.com", 5432),
		CloudSQL: of("10.1.2.3", 6432), Azure: of("shop.postgres.database.azure.com", 6432), Supabase: of("aws-0-eu.pooler.supabase.com", 6543),
		Neon: of("ep-cool-1-pooler.eu-central-1.aws.neon.tech", 5432), CloudNativePG: of("shop-pooler-rw", 5432),
	}
	return map[string]string{
		"wal_level":   p.WALLevel(),
		"replication": p.replicate("walhook", 170000),
		"slots":       p.set(slotsParameter(15)),
		"senders":     p.set(sendersParameter(15)),
		"keep":        p.limit(),
		"idle":        p.set(idleParameter()),
		"patience":    p.set(patienceParameter()),
		"synchronous": p.set(syncNamesParameter("a, b")),
		"standbys":    p.set(standbySlotsParameter([]string{"a", "b"})),
		"sync":        p.standby(slotSyncParameter()),
		"feedback":    p.standby(feedbackParameter()),
		"pooler":      p.direct(hosts[p]),
		"admin":       p.Admin(),
	}
}

// Every fault has an answer at every provider, in that provider's own terms.
func TestAdviceForEveryFaultAtEveryProvider(t *testing.T) {
	t.Parallel()
	want := map[string]map[Provider]string{
		"wal_level": {
			Plain: "alter system set wal_level = logical; then restart Postgres", RDS: "rds.logical_replication = 1; then reboot", CloudSQL: "cloudsql.logical_decoding = on",
			Azure: "Server parameters: wal_level = logical, save and restart", Supabase: "ask Supabase for wal_level = logical", Neon: "Settings, Logical Replication: Enable",
			CloudNativePG: `spec.postgresql.parameters.wal_level: "logical"`,
		},
		"replication": {
			Plain: `alter role "walhook" with replication`, RDS: `grant rds_replication to "walhook"`, CloudSQL: `alter role "walhook" with replication`,
			Azure: `alter role "walhook" with replication`, Supabase: `as the role postgres: alter role "walhook" with replication`, Neon: `as a member of neon_superuser, where Neon lets you: alter role "walhook" with replication`,
			CloudNativePG: `spec.managed.roles: [{name: "walhook", ensure: present, login: true, replication: true`,
		},
		"slots": {
			Plain: "alter system set max_replication_slots = 15; then restart", RDS: "max_replication_slots = 15; then reboot", CloudSQL: "Flags: max_replication_slots = 15",
			Azure: "Server parameters: max_replication_slots = 15, save and restart", Supabase: "postgres-config update --config max_replication_slots=15", Neon: "ask its support for max_replication_slots = 15",
			CloudNativePG: `parameters.max_replication_slots: "15"`,
		},
		"senders": {
			Plain: "alter system set max_wal_senders = 15; then restart", RDS: "max_wal_senders = 15; then reboot", CloudSQL: "Flags: max_wal_senders = 15",
			Azure: "Server parameters: max_wal_senders = 15", Supabase: "--config max_wal_senders=15", Neon: "ask its support for max_wal_senders = 15",
			CloudNativePG: `parameters.max_wal_senders: "15"`,
		},
		"keep": {
			Plain: "alter system set max_slot_wal_keep_size = '10GB'; select pg_reload_conf()", RDS: "max_slot_wal_keep_size = 10240 (MB", CloudSQL: "max_slot_wal_keep_size = 10240 (MB",
			Azure: "keeps max_slot_wal_keep_size at -1 and lets nobody change it", Supabase: "--config max_slot_wal_keep_size=10GB", Neon: "about 40 hours",
			CloudNativePG: `parameters.max_slot_wal_keep_size: "10GB"`,
		},
		"idle": {
			Plain: "alter system set idle_replication_slot_timeout = 0; select pg_reload_conf()", RDS: "idle_replication_slot_timeout = 0", CloudSQL: "Flags: idle_replication_slot_timeout = 0",
			Azure: "Server parameters: idle_replication_slot_timeout = 0", Supabase: "ask Supabase for idle_replication_slot_timeout = 0", Neon: "ask its support for idle_replication_slot_timeout = 0",
			CloudNativePG: `parameters.idle_replication_slot_timeout: "0"`,
		},
		"patience": {
			Plain: "alter system set wal_sender_timeout = '60s'; select pg_reload_conf()", RDS: "wal_sender_timeout = 60000 (where it may be set there", CloudSQL: "Flags: wal_sender_timeout = 60000",
			Azure: "Server parameters: wal_sender_timeout = 60000", Supabase: "wal_sender_timeout=60s", Neon: "ask its support for wal_sender_timeout = 60s",
			CloudNativePG: `parameters.wal_sender_timeout: "60s"`,
		},
		"synchronous": {
			Plain: "alter system set synchronous_standby_names = 'a, b'; select pg_reload_conf()", RDS: "synchronous_standby_names = a, b", CloudSQL: "synchronous_standby_names = a, b",
			Azure: "synchronous_standby_names = a, b", Supabase: "ask Supabase for synchronous_standby_names = a, b", Neon: "ask its support for synchronous_standby_names = a, b",
			CloudNativePG: "spec.postgresql.synchronous",
		},
		"standbys": {
			Plain: "alter system set synchronized_standby_slots = 'a,b'; select pg_reload_conf()", RDS: "synchronized_standby_slots = a,b", CloudSQL: "synchronized_standby_slots = a,b",
			Azure: "synchronized_standby_slots = a,b", Supabase: "ask Supabase for synchronized_standby_slots = a,b", Neon: "ask its support for synchronized_standby_slots = a,b",
			CloudNativePG: "synchronizeLogicalDecoding: true",
		},
		"sync": {
			Plain: "there: alter system set sync_replication_slots = on; select pg_reload_conf()", RDS: "rds.logical_slot_sync_dbname", CloudSQL: "Enterprise Plus",
			Azure: "does not carry logical slots over", Supabase: "ask Supabase for sync_replication_slots = on", Neon: "ask its support", CloudNativePG: `sync_replication_slots: "on"`,
		},
		"feedback": {
			Plain: "there: alter system set hot_standby_feedback = on; select pg_reload_conf()", RDS: "hot_standby_feedback = 1", CloudSQL: "Enterprise Plus",
			Azure: "does not carry logical slots over", Supabase: "ask Supabase for hot_standby_feedback = on", Neon: "ask its support", CloudNativePG: `hot_standby_feedback: "on"`,
		},
		"pooler": {
			Plain: "which the pooler reaches at 10.0.0.5:5432", RDS: "the endpoint of the DB instance", CloudSQL: "port 5432",
			Azure: "shop.postgres.database.azure.com:5432", Supabase: "db.abcd.supabase.co:5432", Neon: "ep-cool-1.eu-central-1.aws.neon.tech:5432", CloudNativePG: "<cluster>-rw",
		},
		"admin": {
			Plain: "superuser", RDS: "rds_superuser", CloudSQL: "cloudsqlsuperuser", Azure: "azure_pg_admin", Supabase: "role postgres", Neon: "neon_superuser", CloudNativePG: "enableSuperuserAccess",
		},
	}
	for _, p := range Providers() {
		got := advised(p)
		require.ElementsMatch(t, slices.Collect(maps.Keys(want)), slices.Collect(maps.Keys(got)))
		for fault, text := range got {
			require.NotEmpty(t, want[fault][p], "%s at %s is not told here", fault, p)
			require.Contains(t, text, want[fault][p], "%s at %s", fault, p)
			if p != Plain && p != Supabase { // which can be self-hosted
				require.NotContains(t, text, "alter system", "%s at %s: nobody may there", fault, p)
			}
		}
	}
}

func TestSupabaseLetsTheRolePostgresAloneReplicateBefore17(t *testing.T) {
	t.Parallel()
	require.Contains(t, Supabase.replicate("walhook", 150008), "connect as the role postgres: before Postgres 17 Supabase")
	require.False(t, Supabase.MayReplicate("walhook", 150008))
	require.True(t, Supabase.MayReplicate("postgres", 150008))
	require.True(t, Supabase.MayReplicate("walhook", 170004))
	require.True(t, Plain.MayReplicate("walhook", 140000))
}

func TestProviderIsReadByName(t *testing.T) {
	t.Parallel()
	for _, p := range Providers() {
		got, err := ParseProvider(string(p))
		require.NoError(t, err)
		require.Equal(t, p, got)
		require.NotEmpty(t, p.Title())
	}
	_, err := ParseProvider("heroku")
	require.EqualError(t, err, `provider "heroku": want plain, rds, cloudsql, azure, supabase, neon, cloudnativepg`)
	require.Equal(t, Plain.Title(), Provider("").Title())
}

func TestRouteTellsProviderAndPooler(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		host     string
		port     uint16
		provider Provider
		pooler   string
		sure     bool
	}{
		{"shop.c9.eu-west-1.rds.amazonaws.com", 5432, RDS, "a pooler", false},
		{"shop.proxy-c9.eu-west-1.rds.amazonaws.com", 5432, RDS, "RDS Proxy", true},
		{"shop.c9.rds.cn-north-1.amazonaws.com.cn", 5432, RDS, "a pooler", false},
		{"shop.postgres.database.azure.com", 5432, Azure, "a pooler", false},
		{"shop.postgres.database.azure.com", 6432, Azure, "PgBouncer or its like", false},
		{"db.abcd.supabase.co", 5432, Supabase, "a pooler", false},
		{"db.abcd.supabase.co", 6543, Supabase, "Supabase's PgBouncer", true},
		{"aws-0-eu-west-1.pooler.supabase.com", 5432, Supabase, "Supavisor", true},
		{"EP-cool-1.eu-central-1.aws.neon.tech", 5432, Neon, "a pooler", false},
		{"ep-cool-1-pooler.eu-central-1.aws.neon.tech", 5432, Neon, "Neon's PgBouncer", true},
		{"localhost", 5432, "", "a pooler", false},
		{"/var/run/postgresql", 5432, "", "a pooler", false},
	} {
		r := Route{Host: c.host, Port: c.port}
		require.Equal(t, c.provider, r.provider(), c.host)
		name, sure := r.pooler()
		require.Equal(t, c.pooler, name, c.host)
		require.Equal(t, c.sure, sure, c.host)
	}
}

// A server shows whose it is by settings and roles. This one is made to show each.
func TestServerShowsItsProvider(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{})
	found := func(settings string) Provider {
		t.Helper()
		at := server.URL() + "?options=" + strings.ReplaceAll(url.QueryEscape(settings), "+", "%20")
		sv, err := Inspect(t.Context(), &Config{URL: func() (string, error) { return at, nil }, Slot: "s", Publication: "p"})
		require.NoError(t, err)
		return sv.Provider
	}
	require.Equal(t, Plain, found(""))
	for role, p := range map[string]Provider{
		"rds_superuser": RDS, "rds_replication": RDS, "cloudsqlsuperuser": CloudSQL, "azure_pg_admin": Azure,
		"supabase_admin": Supabase, "neon_superuser": Neon, "streaming_replica": CloudNativePG,
	} {
		pgtest.Exec(t, server.URL(), "create role "+role)
		require.Equal(t, p, found(""), role)
		pgtest.Exec(t, server.URL(), "drop role "+role)
	}
	// A dump brings roles along from elsewhere; settings it does not.
	pgtest.Exec(t, server.URL(), "create role rds_superuser")
	for name, p := range marks {
		require.Equal(t, p, found("-c "+name+"=on"), name)
	}
}

// A transaction that has written is seen with its age, one that only reads is not.
func TestOpenTransactionsAreSeen(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{Settings: map[string]string{"max_prepared_transactions": "1"}})
	pgtest.Exec(t, server.URL(), "create table t (i int)")
	open := func(sql string) *pgx.Conn {
		conn, err := pgx.Connect(t.Context(), server.URL())
		require.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close(context.Background()) })
		_, err = conn.Exec(t.Context(), sql)
		require.NoError(t, err)
		return conn
	}
	writer := open("set application_name = 'writer'; begin; insert into t values (1)")
	open("begin; select from t")
	open("begin; insert into t values (2); prepare transaction 'it''s'")
	cfg := &Config{URL: func() (string, error) { return server.URL(), nil }, Slot: "s", Publication: "p", Create: true}
	sv, err := Examine(t.Context(), cfg)
	require.NoError(t, err)
	require.Len(t, sv.Around.Pinned, 2)
	var texts []string
	for i := range sv.Around.Pinned {
		sv.Around.Pinned[i].Age += time.Hour
	}
	for _, f := range sv.Findings(cfg) {
		if f.Warn != "" {
			texts = append(texts, f.Text+": "+f.Warn)
		}
	}
	all := strings.Join(texts, "\n")
	require.Contains(t, all, fmt.Sprintf(`role postgres (pid %d, "writer", database postgres) has been writing`, writer.PgConn().PID()))
	require.Contains(t, all, "prepared transaction 'it''s' of database postgres has been open")
	pgtest.Exec(t, server.URL(), "rollback prepared 'it''s'") // as it says
	pgtest.Exec(t, server.URL(), fmt.Sprintf("select pg_terminate_backend(%d)", writer.PgConn().PID()))
	require.Eventually(t, func() bool {
		sv, err := Examine(t.Context(), cfg)
		return err == nil && len(sv.Around.Pinned) == 0
	}, 10*time.Second, 10*time.Millisecond)
}

func TestNamesLeftWithoutUs(t *testing.T) {
	t.Parallel()
	for names, want := range map[string]string{
		"*": "", "walhook": "", `"walhook"`: "", "Walhook, a": "a", "FIRST 1 (a, walhook)": "FIRST 1 (a)", "ANY 2 (a, walhook, b)": "ANY 2 (a, b)", "ANY 1 (walhook)": "",
	} {
		got := withoutUs(names, "walhook")
		require.Equal(t, want, got, names)
		require.False(t, waitsFor(got, "walhook"), names)
	}
}

func TestConninfoNamesADatabase(t *testing.T) {
	t.Parallel()
	for conninfo, want := range map[string]bool{
		"host=a user=b": false, "host=a dbname=postgres": true, "dbname = 'a b' host=c": true, "host=a password='x dbname=y'": false,
		`host=a password='it\'s dbname=y'`: false, "host=a dbname=": false, "postgres://a/b": true,
	} {
		require.Equal(t, want, namesDatabase(conninfo), conninfo)
	}
}

func TestWordsOfPoolersAreKnown(t *testing.T) {
	t.Parallel()
	for message, want := range map[string]bool{
		"unsupported startup parameter: bytea_output":                                                   true,
		"unsupported startup parameter: replication":                                                    true,
		"Feature not supported: RDS Proxy currently doesn’t support streaming replication mode":         true,
		"must be superuser or replication role to start walsender":                                      false,
		`no pg_hba.conf entry for replication connection from host "10.0.0.1", user "a", no encryption`: false,
	} {
		pg := &pgconn.PgError{Code: "08P01", Message: message}
		require.Equal(t, want, refusedByPooler(pg), message)
		f := FaultOf(fmt.Errorf("connect: %w", pg))
		require.Equal(t, want, strings.Contains(f.Remedy, "database.replication_url"), message)
		if want {
			require.Equal(t, Waiting, f.State)
		}
	}
}
