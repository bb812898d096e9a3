package pgtest

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// T is what is needed of a testing.TB. (Package testing itself stays out of the demo's binary.)
type T interface {
	Helper()
	Cleanup(func())
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// New starts a server of the test's own, which is closed when the test ends.
func New(t T, config Config) *Server {
	t.Helper()
	server, err := Start(context.Background(), config)
	if err != nil {
		t.Fatalf("%v", err)
	}
	closeAfter(t, server)
	return server
}

func closeAfter(t T, server *Server) {
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Errorf("%v", err)
		}
	})
}

// shared tells the address of the server for all of a process' DBs. It is never closed here: the
// watchdog ends it with the process, so that no package needs a TestMain. What is remembered is
// the server's own method, not its result: the watchdog waits for the end of a pipe, which the
// garbage collector would close with the last reference to the server.
var shared = sync.OnceValues(func() (url func() string, err error) {
	if existing := os.Getenv("WALHOOK_TEST_DATABASE_URL"); existing != "" {
		return func() string { return existing }, nil
	}
	server, err := Start(context.Background(), Config{})
	if err != nil {
		return nil, err
	}
	return server.URL, nil
})

// cleanupTimeout bounds what a DB's cleanup waits for.
const cleanupTimeout = 30 * time.Second

// DB makes an empty database for the test and returns its URL. When the test ends, the database
// is dropped, with its sessions and its replication slots, whoever still uses them. Tests may
// run in parallel; what all databases of a server share (roles, slot names, the WAL) they share.
func DB(t T) string {
	t.Helper()
	serverURL, err := shared()
	if err != nil {
		t.Fatalf("%v", err)
	}
	server := serverURL()
	address, err := url.Parse(server)
	if err != nil {
		t.Fatalf("WALHOOK_TEST_DATABASE_URL: want a URL as postgres://user@host:port/postgres: %v", err)
	}
	name := "walhook_test_" + strings.ToLower(rand.Text()[:12])
	Exec(t, server, "create database "+name+" template template0")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
		defer cancel()
		if err := dropDB(ctx, server, name); err != nil {
			t.Errorf("drop database %s: %v", name, err)
		}
	})
	address.Path = "/" + name
	return address.String()
}

func dropDB(ctx context.Context, server, name string) error {
	conn, err := pgconn.Connect(ctx, server)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	// A slot can be dropped once its walsender is gone, and a walsender that starts in between
	// takes it again: so until none is left.
	const dropSlots = `
do $$
declare slot record;
begin
	for slot in select slot_name, active_pid from pg_replication_slots where database = '%s' loop
		if slot.active_pid is not null then
			perform pg_terminate_backend(slot.active_pid);
		else
			begin
				perform pg_drop_replication_slot(slot.slot_name);
			exception when object_in_use or undefined_object then
			end;
		end if;
	end loop;
end $$;
select count(*) from pg_replication_slots where database = '%[1]s'`
	var failure error
	err = await(ctx, func() bool {
		var left string
		left, failure = queryOn(ctx, conn, fmt.Sprintf(dropSlots, name))
		return failure != nil || left == "0"
	})
	if failure != nil {
		return fmt.Errorf("drop slots: %w", failure)
	}
	if err != nil {
		return fmt.Errorf("drop slots: %w", err)
	}
	_, err = queryOn(ctx, conn, "drop database if exists "+name+" with (force)")
	return err
}

// Exec runs SQL, of one or many statements, or fails the test.
func Exec(t T, url, sql string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	conn, err := pgconn.Connect(ctx, url)
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	defer conn.Close(ctx)
	if _, err := queryOn(ctx, conn, sql); err != nil {
		t.Fatalf("execute %s: %v", firstLine(sql), err)
	}
}
