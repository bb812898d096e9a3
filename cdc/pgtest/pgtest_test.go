//go:build unix

package pgtest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// TestMain has a second life as a process that starts a server and dies without a Close.
func TestMain(m *testing.M) {
	if os.Getenv("PGTEST_ABANDON") != "" {
		abandon()
	}
	goleak.VerifyTestMain(m)
}

func abandon() {
	server, err := Start(context.Background(), Config{Dir: os.Getenv("PGTEST_ABANDON")})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(strings.SplitN(string(server.pidFile()), "\n", 2)[0], server.watchdog.pid)
	select {}
}

func TestServerAnswers(t *testing.T) {
	server := New(t, Config{Settings: map[string]string{"application_name": `it's a \ test`}})
	for setting, want := range map[string]string{
		"wal_level": "logical", "fsync": "off", "listen_addresses": "127.0.0.1", "unix_socket_directories": "",
		"server_encoding": "UTF8", "lc_collate": "C", "application_name": `it's a \ test`, "port": strconv.Itoa(server.Port()),
	} {
		got, err := server.query(t.Context(), "select current_setting('"+setting+"', true)")
		require.NoError(t, err)
		if setting != "lc_collate" || got != "" { // from 16 on, it is the database's alone
			require.Equal(t, want, got, setting)
		}
	}
}

func TestServersStandSideBySide(t *testing.T) {
	a, b := New(t, Config{}), New(t, Config{})
	require.NotEqual(t, a.Port(), b.Port())
	identity := "select system_identifier from pg_control_system()"
	idA, err := a.query(t.Context(), identity)
	require.NoError(t, err)
	idB, err := b.query(t.Context(), identity)
	require.NoError(t, err)
	require.NotEqual(t, idA, idB)
}

func TestRestartKeepsDataAndPort(t *testing.T) {
	server := New(t, Config{})
	port := server.Port()
	Exec(t, server.URL(), "create table kept (way text)")
	for way, end := range map[string]func() error{
		"fast":      func() error { return server.Stop(t.Context(), Fast) },
		"smart":     func() error { return server.Stop(t.Context(), Smart) },
		"immediate": func() error { return server.Stop(t.Context(), Immediate) },
		"kill":      server.Kill,
	} {
		Exec(t, server.URL(), "insert into kept values ('"+way+"')")
		require.NoError(t, end(), way)
		_, err := pgconn.Connect(t.Context(), server.URL())
		require.Error(t, err, way)
		require.NoError(t, end(), "%s again", way)

		require.NoError(t, server.Start(t.Context()), way)
		require.Equal(t, port, server.Port())
		got, err := server.query(t.Context(), "select count(*) from kept where way = '"+way+"'")
		require.NoError(t, err)
		require.Equal(t, "1", got, way)
	}
	require.ErrorContains(t, server.Start(t.Context()), "it is running")
}

func TestStopTellsWhenItIsHeldUp(t *testing.T) {
	server := New(t, Config{})
	session, err := pgconn.Connect(t.Context(), server.URL())
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, server.Stop(ctx, Smart), context.DeadlineExceeded)
	require.NoError(t, session.Close(t.Context()))
	require.NoError(t, server.Stop(t.Context(), Smart))
}

func TestCrashIsNoticed(t *testing.T) {
	server := New(t, Config{})
	require.NoError(t, signalStop(server.pid, Immediate))
	require.NoError(t, await(t.Context(), func() bool { return !server.running() }))
	require.NoError(t, server.Start(t.Context()))
}

func TestSetIsInForceWhenItReturns(t *testing.T) {
	server := New(t, Config{})
	require.NoError(t, server.Set(t.Context(), map[string]string{"work_mem": "7MB", "max_connections": "33"}))
	value := func(name string) string {
		got, err := server.query(t.Context(), "show "+name)
		require.NoError(t, err)
		return got
	}
	require.Equal(t, "7MB", value("work_mem"))
	require.Equal(t, "100", value("max_connections"), "needs a start")
	require.NoError(t, server.Stop(t.Context(), Fast))
	require.NoError(t, server.Set(t.Context(), map[string]string{"work_mem": "8MB"}), "while stopped")
	require.NoError(t, server.Start(t.Context()))
	require.Equal(t, "33", value("max_connections"))
	require.Equal(t, "8MB", value("work_mem"))
}

func TestBadSettingIsNamed(t *testing.T) {
	dir := tempDir(t)
	_, err := Start(t.Context(), Config{Dir: dir, Settings: map[string]string{"wal_level": "sideways"}})
	require.ErrorContains(t, err, "wal_level")
	require.NotContains(t, err.Error(), "\n")
	requireEmpty(t, dir)
}

func TestCloseLeavesNothing(t *testing.T) {
	for name, before := range map[string]func(*Server) error{
		"running": func(*Server) error { return nil },
		"stopped": func(s *Server) error { return s.Stop(t.Context(), Fast) },
		"killed":  (*Server).Kill,
	} {
		dir := tempDir(t)
		server, err := Start(t.Context(), Config{Dir: dir})
		require.NoError(t, err)
		pid, watchdog := server.pid, server.watchdog.pid
		children, err := childrenOf(pid)
		require.NoError(t, err)
		require.NotEmpty(t, children)

		require.NoError(t, before(server), name)
		require.NoError(t, server.Close(), name)
		require.NoError(t, server.Close(), "%s, again", name)
		for _, p := range append(children, pid, watchdog) {
			require.True(t, zombie(p), "%s: process %d is still there", name, p)
		}
		requireEmpty(t, dir)
		require.ErrorContains(t, server.Start(t.Context()), "closed")
	}
}

// A process that is killed cannot clear up, so its watchdog does.
func TestDeathOfTheProcessLeavesNothing(t *testing.T) {
	dir := tempDir(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "PGTEST_ABANDON="+dir)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	var pid, watchdog int
	_, err = fmt.Sscan(line, &pid, &watchdog)
	require.NoError(t, err, line)
	require.False(t, zombie(pid))

	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	require.NoError(t, await(ctx, func() bool { return zombie(pid) && zombie(watchdog) }))
	requireEmpty(t, dir)
}

func TestDBIsFreshAndGoesWithItsSlots(t *testing.T) {
	var database, slot string
	t.Run("use", func(t *testing.T) {
		one, two := DB(t), DB(t)
		require.NotEqual(t, one, two)
		Exec(t, one, "create table a ()")
		Exec(t, one, "select pg_create_logical_replication_slot('s_' || current_database(), 'pgoutput')")
		Exec(t, two, "create table a ()")
		database = one[strings.LastIndex(one, "/")+1:]
		slot = "s_" + database

		// A client that goes away only when its slot is taken from it.
		conn, err := pgconn.Connect(t.Context(), one+"?replication=database")
		require.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close(context.Background()) })
		Exec(t, one, "create publication p")
		require.NoError(t, startReplication(t.Context(), conn, slot))
	})
	admin, err := shared()
	require.NoError(t, err)
	conn, err := pgconn.Connect(t.Context(), admin())
	require.NoError(t, err)
	defer conn.Close(t.Context())
	left, err := queryOn(t.Context(), conn, "select (select count(*) from pg_database where datname = '"+database+
		"') + (select count(*) from pg_replication_slots where slot_name = '"+slot+"')")
	require.NoError(t, err)
	require.Equal(t, "0", left)
}

func startReplication(ctx context.Context, conn *pgconn.PgConn, slot string) error {
	_, err := conn.Exec(ctx, "IDENTIFY_SYSTEM").ReadAll()
	if err != nil {
		return err
	}
	conn.Frontend().SendQuery(&pgproto3.Query{String: "START_REPLICATION SLOT " + slot + " LOGICAL 0/0 (proto_version '1', publication_names 'p')"})
	if err := conn.Frontend().Flush(); err != nil {
		return err
	}
	_, err = conn.ReceiveMessage(ctx)
	return err
}

func TestStandbyStreamsAndIsPromoted(t *testing.T) {
	primary := New(t, Config{})
	Exec(t, primary.URL(), "create table a as select generate_series(1, 1000) n")
	standby, err := primary.Standby(t.Context(), Config{})
	require.NoError(t, err)
	closeAfter(t, standby)
	Exec(t, primary.URL(), "insert into a values (1001)")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	require.NoError(t, await(ctx, func() bool {
		n, err := standby.query(ctx, "select count(*) from a")
		return err == nil && n == "1001"
	}))
	require.NoError(t, primary.Kill())
	require.NoError(t, standby.Promote(t.Context()))
	Exec(t, standby.URL(), "insert into a values (1002)")
}

// A logical slot goes with its database to the standby, and again to the standby's own.
func TestFailoverSlotSurvivesPromotions(t *testing.T) {
	server := New(t, Config{Settings: map[string]string{"autovacuum": "off"}})
	version, err := server.Version(t.Context())
	require.NoError(t, err)
	if version < 170000 {
		t.Skipf("Postgres %d has no failover slots", version/10000)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Second)
	defer cancel()
	Exec(t, server.URL(), "select pg_create_logical_replication_slot('s', 'pgoutput', failover => true)")
	for range 2 {
		standby, err := server.FailoverStandby(ctx, Config{})
		require.NoError(t, err)
		closeAfter(t, standby)
		require.NoError(t, await(ctx, func() bool {
			Exec(t, server.URL(), "select pg_log_standby_snapshot(); select pg_replication_slot_advance('s', pg_current_wal_lsn())")
			ready, err := standby.FailoverReady(ctx, "s")
			return err == nil && ready
		}))
		require.NoError(t, server.Close())
		require.NoError(t, standby.Promote(ctx))
		server = standby
		left, err := server.query(ctx, "select count(*) from pg_replication_slots where slot_name = 's' and failover")
		require.NoError(t, err)
		require.Equal(t, "1", left)
	}
}

// An installation in a place that the server's user cannot see, as a download in root's home.
func TestInstallationOutOfReachIsCopied(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root has another user to run Postgres as")
	}
	bin, err := Find()
	require.NoError(t, err)
	if _, err := os.Stat(filepath.Join(filepath.Dir(bin), "share")); err != nil {
		t.Skipf("%s is not an installation that may be moved", bin)
	}
	hidden := filepath.Join(t.TempDir(), "pg") // of mode 0700, like all that testing makes
	require.NoError(t, os.CopyFS(hidden, os.DirFS(filepath.Dir(bin))))
	require.NoError(t, os.Chmod(filepath.Dir(hidden), 0o700))
	server := New(t, Config{Bin: filepath.Join(hidden, "bin")})
	require.Equal(t, filepath.Join(server.Dir(), "postgres", "bin"), server.Bin())
}

func TestFindPrefersWhatItIsTold(t *testing.T) {
	found, err := Find()
	require.NoError(t, err)
	t.Setenv("WALHOOK_TEST_PG_BIN", found)
	again, err := Find()
	require.NoError(t, err)
	require.Equal(t, found, again)

	t.Setenv("WALHOOK_TEST_PG_BIN", t.TempDir())
	_, err = Find()
	require.ErrorContains(t, err, "WALHOOK_TEST_PG_BIN: no initdb and postgres in ")
}

func TestFindWithoutAnyPostgresSaysWhatToInstall(t *testing.T) {
	t.Setenv("WALHOOK_TEST_PG_BIN", "")
	t.Setenv("PATH", t.TempDir())
	defer func(places []string) { usualPlaces = places }(usualPlaces)
	usualPlaces = []string{filepath.Join(t.TempDir(), "*")}
	_, err := Find()
	require.ErrorIs(t, err, ErrNoPostgres)
	require.NotContains(t, err.Error(), "\n")
	require.Contains(t, err.Error(), "install")
}

func TestFindTakesTheNewest(t *testing.T) {
	places := t.TempDir()
	t.Setenv("WALHOOK_TEST_PG_BIN", "")
	t.Setenv("PATH", "")
	defer func(places []string) { usualPlaces = places }(usualPlaces)
	usualPlaces = []string{filepath.Join(places, "postgresql-*", "bin")}
	for _, version := range []string{"9", "17", "100"} {
		bin := filepath.Join(places, "postgresql-"+version, "bin")
		require.NoError(t, os.MkdirAll(bin, 0o755))
		for _, program := range []string{"initdb", "postgres"} {
			if version != "100" || program == "initdb" { // the last is a client package
				require.NoError(t, os.WriteFile(filepath.Join(bin, program), nil, 0o755))
			}
		}
	}
	got, err := Find()
	require.NoError(t, err)
	require.Equal(t, filepath.Join(places, "postgresql-17", "bin"), got)
}

func TestFailedDownloadIsOneLine(t *testing.T) {
	nothing := httptest.NewServer(http.NotFoundHandler())
	defer nothing.Close()
	cache := t.TempDir()
	_, err := fetch(t.Context(), io.Discard, embeddedpostgres.DefaultConfig().BinaryRepositoryURL(nothing.URL), cache)
	require.ErrorContains(t, err, "download Postgres: ")
	require.ErrorIs(t, err, ErrNoPostgres)
	require.NotContains(t, err.Error(), "\n")
	requireEmpty(t, cache)
}

// tempDir is one that the server's user can reach; testing's own is not, for another user.
func tempDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/tmp", "pgtest-")
	require.NoError(t, err)
	require.NoError(t, os.Chmod(dir, 0o755))
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	return dir
}

func requireEmpty(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, entries)
}
