package main

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc/pgtest"
	"github.com/walhook/walhook/outbox/store"
	"github.com/walhook/walhook/sender/sendertest"
)

// This file holds what only a real process beside a real Postgres can show.

// edit replaces text of the configuration.
func (b *bench) edit(path string, oldnew ...string) string {
	b.t.Helper()
	text, err := os.ReadFile(path)
	require.NoError(b.t, err)
	for i := 0; i < len(oldnew); i += 2 {
		require.Contains(b.t, string(text), oldnew[i])
		text = bytes.Replace(text, []byte(oldnew[i]), []byte(oldnew[i+1]), 1)
	}
	require.NoError(b.t, os.WriteFile(path+".new", text, 0o600))
	require.NoError(b.t, os.Rename(path+".new", path))
	return path
}

// role makes a role that may do what walhook needs and owns nothing, and gives its URL.
func (b *bench) role() (name, address string) {
	b.t.Helper()
	name = b.slot + "_role"
	b.exec("create role " + name + " login replication password 'first'")
	b.t.Cleanup(func() {
		b.exec("drop owned by " + name)
		b.exec("drop role " + name)
	})
	b.exec(store.SetupSQL())
	b.exec(store.GrantSQL(name))
	b.exec("grant select on outbox to " + name)
	b.exec("create publication " + b.slot + " for table outbox with (publish = 'insert')")
	u, err := url.Parse(b.url)
	require.NoError(b.t, err)
	u.User = url.UserPassword(name, "first")
	return name, u.String()
}

func (b *bench) parked() int64 { return b.ask("select count(*) from walhook.deliveries") }

// tinyDisk is a tablespace that holds a few megabytes.
func tinyDisk(t *testing.T, megabytes int) (name string) {
	t.Helper()
	if runtime.GOOS != "linux" || os.Getuid() != 0 {
		t.Skip("only root can mount a small disk")
	}
	admin := pgtest.DB(t)
	conn, err := pgx.Connect(t.Context(), admin)
	require.NoError(t, err)
	defer conn.Close(context.Background())
	var data string
	require.NoError(t, conn.QueryRow(t.Context(), "show data_directory").Scan(&data))
	info, err := os.Stat(data)
	if err != nil {
		t.Skip("the server is on another machine")
	}
	owner := info.Sys().(*syscall.Stat_t)
	dir, err := os.MkdirTemp("/tmp", "walhook-disk-") //nolint:usetesting // its parents must be open to the server's user
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.Remove(dir) })
	require.NoError(t, os.Chmod(dir, 0o755))
	options := fmt.Sprintf("size=%dm,uid=%d,gid=%d,mode=700", megabytes, owner.Uid, owner.Gid)
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", options, "tmpfs", dir).CombinedOutput(); err != nil {
		t.Skipf("a small disk cannot be mounted here: %s", out)
	}
	t.Cleanup(func() { require.NoError(t, exec.Command("umount", dir).Run()) })
	name = fmt.Sprintf("tiny_%d", time.Now().UnixNano())
	pgtest.Exec(t, admin, fmt.Sprintf("create tablespace %s location '%s'", name, dir))
	t.Cleanup(func() { pgtest.Exec(t, admin, "drop tablespace "+name) })
	return name
}

// Whatever keeps us from parking: what can be sent is sent, what cannot waits in memory, and the
// slot waits with it.
func TestAStoreThatCannotBeWrittenLosesNothing(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	name, address := b.role()
	rx := func() *sendertest.Receiver {
		return sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	}
	well, sick := rx(), rx()
	sick.Refuse()
	config := b.edit(b.config(endpoint("well", well, ""), endpoint("sick", sick, "")), b.url, address)
	p := start(t, config).streaming()
	ends := fmt.Sprintf("select pg_terminate_backend(pid) from pg_stat_activity where usename = '%s' and backend_type = 'client backend'", name)
	locker := b.conn()
	n := 0
	for _, harm := range []struct{ what, begin, end string }{
		{"no right to write", "revoke insert on walhook.deliveries from " + name, "grant insert on walhook.deliveries to " + name},
		{"table gone", "alter table walhook.events rename to away", "alter table walhook.away rename to events"},
		{"table locked", "lock", ""},
		{"read-only", "alter role " + name + " set default_transaction_read_only = on;" + ends, "alter role " + name + " reset all;" + ends},
		{
			"limits of the role", fmt.Sprintf("alter role %[1]s set statement_timeout = '5ms'; alter role %[1]s set lock_timeout = '1ms'; alter role %[1]s set idle_in_transaction_session_timeout = '1ms'; %[2]s", name, ends),
			"alter role " + name + " reset all;" + ends,
		},
	} {
		t.Log(harm.what)
		n += 20
		if harm.begin == "lock" {
			tx, err := locker.Begin(t.Context())
			require.NoError(t, err)
			_, err = tx.Exec(t.Context(), "lock table walhook.deliveries in share mode")
			require.NoError(t, err)
			b.produce(1, 20, 3)
			requireAll(t, well, n)
			require.EqualValues(t, n-20, b.parked())
			require.NoError(t, tx.Rollback(t.Context()))
		} else {
			b.exec(harm.begin)
			b.produce(1, 20, 3)
			requireAll(t, well, n)
			if strings.HasPrefix(harm.begin, "revoke") {
				p.log.line(t, "nothing can be parked", "permission denied") // else it may end before anything was to be parked
			}
			b.exec(harm.end)
		}
		eventually(t, "everything to be parked after: "+harm.what, func() bool { return b.parked() == int64(n) })
	}
	require.Zero(t, repeats(well))
	p.log.line(t, "nothing can be parked", "permission denied")
	p.log.line(t, "can be written again")

	// What was not parked is not confirmed either.
	b.exec("revoke insert on walhook.deliveries from " + name)
	b.produce(1, 20, 3)
	requireAll(t, well, n+20)
	p.kill()
	b.exec("grant insert on walhook.deliveries to " + name)
	require.NoError(t, sick.Reopen())
	start(t, config).streaming()
	requireAll(t, sick, n+20)
	require.Zero(t, repeats(sick))
}

func TestAFullDiskLosesNothing(t *testing.T) {
	t.Parallel()
	disk := tinyDisk(t, 3)
	b := newBench(t)
	rx := func() *sendertest.Receiver {
		return sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	}
	well, sick := rx(), rx()
	sick.Refuse()
	p := start(t, b.config(endpoint("well", well, ""), endpoint("sick", sick, ""))).streaming()
	b.exec("alter table walhook.events set tablespace " + disk)
	const rows = 60 // of 100 kB that cannot be compressed
	rnd := rand.NewChaCha8([32]byte{})
	conn := b.conn()
	for i := range rows {
		noise := make([]byte, 50_000)
		_, _ = rnd.Read(noise)
		_, err := conn.Exec(t.Context(), "insert into outbox (aggregateid, type, payload) values ($1, 'order.changed', $2)",
			fmt.Sprint(i%5), fmt.Sprintf(`{"key":"%d","n":%d,"noise":"%x"}`, i%5, i, noise))
		require.NoError(t, err)
	}
	requireAll(t, well, rows)
	p.log.line(t, "nothing can be parked", "No space left on device")
	require.Less(t, b.parked(), int64(rows))
	b.exec("alter table walhook.events set tablespace pg_default")
	eventually(t, "everything to be parked", func() bool { return b.parked() == rows })
	require.NoError(t, sick.Reopen())
	requireAll(t, sick, rows)
	require.Zero(t, repeats(well)+repeats(sick))
}

// forgetful is a way to Postgres that cuts the connection when a COMMIT has been done and before
// its answer is through, as often as it is told.
type forgetful struct {
	net.Listener
	cuts atomic.Int32

	mu    sync.Mutex // guards conns
	conns []net.Conn
}

// end cuts everything, for ever.
func (f *forgetful) end() {
	_ = f.Close()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.conns {
		_ = c.Close()
	}
}

func newForgetful(t *testing.T, database string) (f *forgetful, address string) {
	t.Helper()
	u, err := url.Parse(database)
	require.NoError(t, err)
	f = &forgetful{}
	f.Listener, err = net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = f.Close() })
	target := u.Host
	go func() {
		for {
			near, err := f.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", target)
			if err != nil {
				_ = near.Close()
				continue
			}
			f.mu.Lock()
			f.conns = append(f.conns, near, far)
			f.mu.Unlock()
			end := func() { _ = near.Close(); _ = far.Close() }
			go func() { defer end(); carry(near, far, nil) }()
			go func() { defer end(); carry(far, near, f.loses()) }()
		}
	}()
	u.Host = f.Addr().String()
	return f, u.String()
}

// carry moves bytes until an end, or until judge says that they are to be held back: then those
// gathered since come together, or never.
func carry(from, to net.Conn, judge func(gathered []byte) (hold, cut bool)) {
	buf, held := make([]byte, 64<<10), []byte(nil)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			held = append(held, buf[:n]...)
			hold, cut := false, false
			if judge != nil {
				hold, cut = judge(held)
			}
			if cut {
				return
			}
			if !hold {
				if _, err := to.Write(held); err != nil {
					return
				}
				held = nil
			}
		}
		if err != nil {
			return
		}
	}
}

// loses holds back the answer to a transaction with an INSERT, until it shows how that ended.
func (f *forgetful) loses() func([]byte) (hold, cut bool) {
	return func(b []byte) (hold, cut bool) {
		switch {
		case f.cuts.Load() <= 0 || !bytes.Contains(b, []byte("INSERT 0 ")):
			return false, false
		case bytes.Contains(b, []byte("COMMIT\x00")):
			return false, f.cuts.Add(-1) >= 0
		}
		return !bytes.HasSuffix(b, []byte("Z\x00\x00\x00\x05I")), false
	}
}

func TestACommitWhoseAnswerIsLostParksOnce(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	way, address := newForgetful(t, b.url)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	rx.Refuse()
	config := b.edit(b.config(endpoint("sick", rx, "")), fmt.Sprintf("url: %q", b.url), fmt.Sprintf("url: %q, replication_url: %q", address, b.url))
	p := start(t, config).streaming()
	way.cuts.Store(4)
	b.produce(1, 50, 5)
	eventually(t, "four answers to be lost", func() bool { return way.cuts.Load() <= 0 })
	eventually(t, "everything to be parked", func() bool { return b.parked() == 50 })
	p.log.line(t, "nothing can be parked")
	require.NoError(t, rx.Reopen())
	requireAll(t, rx, 50)
	eventually(t, "walhook.deliveries to be empty", func() bool {
		return b.parked() == 0 && b.ask("select count(*) from walhook.events") == 0
	})
	require.Zero(t, repeats(rx))
}

// A crash between the answer and its record is the one thing that repeats a parked delivery: once,
// and under its id.
func TestACrashBetweenTheAnswerAndItsRecordRepeatsTheSameID(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	rx.Script(sendertest.Status(503))
	config := b.edit(b.config(endpoint("a", rx, "")), "schedule: [200ms", "schedule: [1s")
	p := start(t, config).streaming()
	b.produce(1, 1, 1)
	eventually(t, "it to be parked", func() bool {
		return b.ask("select count(*) from walhook.deliveries where state = 'parked' and attempts = 1") == 1
	})
	tx, err := b.conn().Begin(t.Context())
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), "lock table walhook.deliveries in share mode") // it can be read
	require.NoError(t, err)
	requireAtLeast(t, rx, 2)
	p.kill()
	require.NoError(t, tx.Rollback(t.Context()))
	start(t, config).streaming()
	requireAtLeast(t, rx, 3)
	eventually(t, "walhook.deliveries to be empty", func() bool { return b.parked() == 0 })
	all := rx.Requests()
	require.Len(t, all, 3)
	for i, attempt := range []int{1, 2, 2} {
		require.Equal(t, all[0].ID, all[i].ID)
		require.Equal(t, attempt, all[i].Attempt)
	}
}

// A rolling deploy starts the new one before it ends the old one.
func TestARollingDeployRepeatsNothing(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	config := b.config(endpoint("billing", rx, ""))
	old := start(t, config).streaming()
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.produce(2, 1000, 7)
	}()
	for i := range 2 {
		requireAtLeast(t, rx, (i+1)*300)
		fresh := start(t, config)
		fresh.log.line(t, "standing by")
		old.stop()
		old = fresh.streaming()
	}
	<-done
	requireAll(t, rx, 2000)
	require.Zero(t, repeats(rx))
	require.Zero(t, b.ask("select count(*) from walhook.deliveries where state = 'dead'"))
	require.EqualValues(t, 3, b.ask("select epoch from walhook.checkpoints"), "a holder each")
}

func TestInstancesThatStartAtOnceOnANewDatabaseMakeOneSlot(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	config := b.config(endpoint("billing", rx, ""))
	var all [3]*program
	var wg sync.WaitGroup
	for i := range all {
		wg.Go(func() { all[i] = start(t, config) })
	}
	wg.Wait()
	eventually(t, "one to stream and two to stand by", func() bool {
		n := map[string]int{}
		for _, p := range all {
			if strings.Contains(p.log.String(), `"msg":"streaming"`) {
				n["streaming"]++
			} else if strings.Contains(p.log.String(), "standing by") {
				n["standby"]++
			}
		}
		return n["streaming"] == 1 && n["standby"] == 2
	})
	b.produce(2, 50, 3)
	requireAll(t, rx, 100)
	require.Zero(t, repeats(rx))
	require.EqualValues(t, 1, b.ask("select count(*) from pg_replication_slots where database = current_database()"))
	for _, p := range all {
		require.NotContains(t, p.log.String(), `"level":"error"`)
	}
}

// freeze stops a process as a host does that hangs, until the returned function is called.
func (p *program) freeze() (thaw func()) {
	p.t.Helper()
	require.NoError(p.t, p.cmd.Process.Signal(syscall.SIGSTOP))
	return func() { require.NoError(p.t, p.cmd.Process.Signal(syscall.SIGCONT)) }
}

// A holder that was frozen for longer than its lease has deliveries in memory, and workers that
// were about to send them. This one wakes cut off, and so cannot hear that another has the slot.
func TestAFrozenHolderThatWakesSendsNothing(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	way, address := newForgetful(t, b.url)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}, Respond: func(sendertest.Request) sendertest.Answer {
		return sendertest.After(100*time.Millisecond, sendertest.Status(204))
	}})
	config := b.edit(b.config(endpoint("billing", rx, ", concurrency: 16, timeout: 60s")), "server:", "buffer: {spill_after: 60s}\nserver:", b.url, address)
	straight := config + ".straight" // a file of its own: the first one reads its URL anew
	text, err := os.ReadFile(config)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(straight, bytes.Replace(text, []byte(address), []byte(b.url), 1), 0o600))
	first := start(t, config).streaming()
	second := start(t, straight)
	second.log.line(t, "standing by")
	b.produce(2, 300, 40)
	requireAtLeast(t, rx, 50)
	thaw := first.freeze()
	frozen := time.Now()
	begun := func() (n int) { // after the freeze; what was begun before is on its way
		for _, q := range rx.Requests() {
			if q.Turn > 600 && q.Timestamp.After(frozen.Add(2*time.Second)) {
				n++
			}
		}
		return n
	}
	way.end()
	second.streaming()
	requireAll(t, rx, 600)
	eventually(t, "the lease to end", func() bool { return time.Since(frozen) > 15500*time.Millisecond })
	before := begun()
	thaw()
	first.log.line(t, "reconnecting")
	b.produce(1, 20, 1) // one after the other: two seconds
	requireAll(t, rx, 620)
	require.Less(t, begun()-before, 20+4, "by the second, and what a worker of the first was just about to send")
}

// The password is read from its file at every connect.
func TestARotatedPasswordIsTakenUpWhileRunning(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{})
	b := newBenchOn(t, server.URL())
	name, address := b.role()
	require.NoError(t, os.WriteFile(filepath.Join(server.DataDir(), "pg_hba.conf"), []byte(
		"host all "+name+" all scram-sha-256\nhost replication "+name+" all scram-sha-256\nhost all postgres all trust\n"), 0o600))
	require.NoError(t, server.Reload(t.Context()))
	secret := filepath.Join(b.dir, "password")
	require.NoError(t, os.WriteFile(secret, []byte("first\n"), 0o600))
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	config := b.edit(b.config(endpoint("billing", rx, "")), b.url, strings.Replace(address, ":first@", ":${file:"+secret+"}@", 1))
	p := start(t, config).streaming()
	b.produce(1, 10, 2)
	requireAll(t, rx, 10)

	b.exec("alter role " + name + " password 'second'")
	require.NoError(t, os.WriteFile(secret, []byte("second\n"), 0o600))
	b.exec("select pg_terminate_backend(pid) from pg_stat_activity where usename = '" + name + "'")
	b.produce(1, 10, 2)
	requireAll(t, rx, 20)
	require.Zero(t, repeats(rx))
	require.NotContains(t, p.log.String(), "password authentication failed")
	p.stop()
}

// A secret in a mounted volume is changed while events flow: each is signed by the old one or the new
// one, none is lost, and what is half written in between changes nothing.
func TestARotatedSecretIsTakenUpWhileRunning(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	const fresh = "whsec_dGhlIG5ldyBvbmUsIG9mIHRoaXJ0eS10d28gYnl0ZXM="
	at := func(name string) string { return filepath.Join(b.dir, name) }
	mount := func(folder, secret string) {
		require.NoError(t, os.Mkdir(at(folder), 0o700))
		require.NoError(t, os.WriteFile(at(folder+"/secret"), []byte(secret), 0o600))
		require.NoError(t, os.Symlink(folder, at("..new")))
		require.NoError(t, os.Rename(at("..new"), at("..data")))
	}
	mount("..1", testSecret+"\n")
	require.NoError(t, os.Symlink("..data/secret", at("secret")))
	rx, err := sendertest.Open(sendertest.Config{Secrets: []string{testSecret}})
	require.NoError(t, err)
	t.Cleanup(rx.Close)
	p := start(t, b.config(fmt.Sprintf("{id: billing, url: %q, secrets: [\"${file:%s}\"]}", rx.URL(), at("secret")))).streaming()
	b.produce(1, 20, 3)
	requireAll(t, rx, 20)

	mount("..2", "whsec_half wri")
	p.log.line(t, "the configuration is broken, the old one stays in force", "endpoints[0].secrets[0]")
	b.produce(1, 20, 3)
	requireAll(t, rx, 40)
	for _, r := range rx.Requests() {
		require.NoError(t, r.Invalid)
	}

	mount("..3", fresh+"\n")
	p.log.line(t, "configuration reloaded")
	b.produce(1, 20, 3)
	requireAll(t, rx, 60)
	for _, r := range rx.Requests()[40:] {
		require.Error(t, r.Invalid, "signed by the old one")
	}
	require.Zero(t, repeats(rx))
	log := p.log.String()
	require.Equal(t, 1, strings.Count(log, "the configuration is broken"), "said once")
	require.NotContains(t, log, "wait for a restart")
	for _, secret := range []string{"half wri", fresh[6:], testSecret[6:]} {
		require.NotContains(t, log, secret)
	}
	p.stop()
}

// Of several hosts the primary is taken, wherever it stands in the URL, by the stream too.
func TestOfSeveralHostsThePrimaryIsTaken(t *testing.T) {
	t.Parallel()
	primary := pgtest.New(t, pgtest.Config{})
	standby, err := primary.Standby(t.Context(), pgtest.Config{})
	require.NoError(t, err)
	t.Cleanup(func() { _ = standby.Close() })
	b := newBenchOn(t, primary.URL())
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	several := fmt.Sprintf("postgres://postgres@127.0.0.1:%d,127.0.0.1:%d/postgres?target_session_attrs=read-write", standby.Port(), primary.Port())
	start(t, b.edit(b.config(endpoint("billing", rx, "")), b.url, several)).streaming()
	b.produce(1, 10, 2)
	requireAll(t, rx, 10)
}

// Names are what they are: nothing in them is SQL.
func TestStrangeNamesReachSQLQuotedAlone(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	const table = `"My; drop ""schema"" é"."Out box; --"`
	b.exec(`create schema "My; drop ""schema"" é"; create table ` + table + ` ("Row's Id" bigserial primary key, "aggregateId" text, "typ; e" text, "☃ ""data""" jsonb)`)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	rx.Script(sendertest.Times(3, sendertest.Status(500))...)
	config := b.edit(b.config(endpoint("bill'ing", rx, "")),
		"publication: "+b.slot, fmt.Sprintf("publication: %q", b.slot+`"; Drop 'é`),
		"{table: outbox}", fmt.Sprintf("{table: %q, columns: {id: %q, key: aggregateId, type: %q, data: %q}}", table, "Row's Id", "typ; e", `☃ "data"`),
		"{id: bill'ing", "{id: billing")
	start(t, config).streaming()
	b.exec(`insert into ` + table + ` ("aggregateId", "typ; e", "☃ ""data""") select 'k', 'order.changed', jsonb_build_object('key', 'k', 'n', i) from generate_series(1, 20) i`)
	requireAll(t, rx, 20)
	eventually(t, "walhook.deliveries to be empty", func() bool { return b.parked() == 0 })
	b.exec("drop publication \"" + b.slot + `""; Drop 'é"`)
}

// payloads are what an app may put into a text column, and nobody should have to read.
func payloads() map[string]string {
	return map[string]string{
		"number of 40 digits": `{"n":1234567890123456789012345678901234567890,"f":0.1234567890123456789012345678901234567890}`,
		"number without end":  `{"n":1e999999,"z":-0.0,"x":1E+2}`,
		"duplicate keys":      `{"a":1,"a":2,"A":3,"a":{"a":1,"a":2}}`,
		"NUL in a text":       `{"a":"\u0000","\u0000":1}`,
		"half a surrogate":    `{"a":"\ud800"}`,
		"spaces":              "\t{ \"a\" :\n1 }\r\n ",
		"deep":                strings.Repeat("[", 9_999) + strings.Repeat("]", 9_999),
		"quotes":              `{"a":"</script>'\"\\ ; drop table outbox; -- ☃ \u2028"}`,
		"null":                `null`,
	}
}

// Rows as no example shows them: each is sent byte for byte, in its turn and when it was parked
// before, or dies with its reason; none stops the stream.
func TestHostilePayloadsPassUntouchedOrDieWithTheirReason(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	direct := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	var failed sync.Map
	parked := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}, Respond: func(q sendertest.Request) sendertest.Answer {
		if _, again := failed.LoadOrStore(q.ID, true); !again {
			return sendertest.Status(400)
		}
		return sendertest.Status(204)
	}})
	p := start(t, b.config(
		endpoint("direct", direct, ", format: raw, max_payload: 64MiB"),
		endpoint("parked", parked, ", format: raw, max_payload: 64MiB"),
		endpoint("small", direct, `, format: raw, events: ["order.large"]`),
		endpoint("wrapped", direct, `, events: ["order.odd"]`),
	)).streaming()
	conn := b.conn()
	insert := func(kind, key, payload string) (id string) {
		require.NoError(t, conn.QueryRow(t.Context(), "insert into outbox (type, aggregateid, payload) values ($1, $2, $3) returning id::text", kind, key, payload).Scan(&id))
		return id
	}
	want := map[string]string{}
	for name, payload := range payloads() {
		want[insert("order.changed", name, payload)] = payload
	}
	for _, bad := range []string{"{", strings.Repeat("[", 20_000) + strings.Repeat("]", 20_000), ""} {
		want[insert("order.odd", "odd", bad)] = bad // raw needs no JSON
	}
	insert("order.odd", strings.Repeat("k", 64<<10), "{}") // an ordering key no index could hold
	size := 50 << 20
	if raceEnabled { // each byte costs fifty times as much
		size = 8 << 20
	}
	large := `"` + strings.Repeat("x", size) + `"`
	want[insert("order.large", "large", large)] = large
	last := insert("order.changed", "last", "1")
	want[last] = "1"
	for _, rx := range []*sendertest.Receiver{direct, parked} {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		got := map[string]string{}
		require.NoError(t, rx.WaitUntil(ctx, func(all []sendertest.Request) bool {
			clear(got)
			for _, q := range all {
				if q.Status == 204 {
					got[q.ID] = string(q.Body)
				}
			}
			return len(got) == len(want)
		}), "%d of %d", len(got), len(want))
		for id, payload := range want {
			require.True(t, got[id] == payload, "%s: %.100q is not %.100q", id, got[id], payload)
		}
		for _, q := range rx.Requests() {
			require.NoError(t, q.Invalid)
		}
	}
	eventually(t, "the dead to be all that is left", func() bool { return b.parked() == 5 })
	require.EqualValues(t, 1, b.ask("select count(*) from walhook.deliveries where state = 'dead' and reason = 'too_large' and endpoint_id = 'small'"))
	require.EqualValues(t, 3, b.ask("select count(*) from walhook.deliveries where state = 'dead' and reason = 'not_json' and endpoint_id = 'wrapped'"))
	require.EqualValues(t, 1, b.ask("select count(*) from walhook.deliveries where state = 'dead' and reason = 'unmappable' and endpoint_id is null and last_error = 'key is too long: 65536 bytes of at most 1024'"))
	p.stop()
}

// A database that checks no encoding holds bytes that are no text in any.
func TestBytesThatAreNoTextPassUntouched(t *testing.T) {
	t.Parallel()
	admin := pgtest.DB(t)
	name := fmt.Sprintf("walhook_ascii_%d", time.Now().UnixNano())
	pgtest.Exec(t, admin, "create database "+name+" encoding 'SQL_ASCII' lc_collate 'C' lc_ctype 'C' template template0")
	address, err := url.Parse(admin)
	require.NoError(t, err)
	address.Path = "/" + name
	t.Cleanup(func() {
		pgtest.Exec(t, admin, "select pg_drop_replication_slot(slot_name) from pg_replication_slots where database = '"+name+"'")
		pgtest.Exec(t, admin, "drop database "+name+" with (force)")
	})
	b := newBenchOn(t, address.String())
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	rx.Script(sendertest.Times(2, sendertest.Status(500))...) // parked and read back
	start(t, b.config(endpoint("billing", rx, ""))).streaming()
	b.exec(
		`insert into outbox (type, aggregateid, payload) select 'order.changed', 'k', '{"n":' || i || ',"a":"' || convert_from('\xfffec3', 'SQL_ASCII') || '"}' from generate_series(1, 3) i`)
	eventually(t, "three deliveries", func() bool { return len(succeeded(rx)) == 3 })
	for i, q := range succeeded(rx) {
		require.Equal(t, fmt.Sprintf("{\"n\":%d,\"a\":\"\xff\xfe\xc3\"}", i+1), string(q.Data))
	}
	b.exec(`insert into outbox (type, aggregateid, payload) values ('order.changed', convert_from('\xff', 'SQL_ASCII'), '{}')`)
	eventually(t, "a dead delivery", func() bool {
		return b.ask("select count(*) from walhook.deliveries where state = 'dead' and reason = 'unmappable'") == 1
	})
}

// within is eventually with a patience of its own.
func within(t *testing.T, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	timeout := time.After(limit)
	for !ok() {
		select {
		case <-tick.C:
		case <-timeout:
			t.Fatalf("not in time: %s", what)
		}
	}
}

// scale multiplies what WALHOOK_TEST_SCALE says: the figures of large backlogs are made by hand.
func scale() int {
	n, _ := strconv.Atoi(os.Getenv("WALHOOK_TEST_SCALE"))
	return max(1, n)
}

// A backlog of many keys, and one key that has as many: each row is found once by its index,
// whatever is dead around it, and memory holds what is about to be sent. A session that keeps old
// rows from being cleared away is there all the while.
func TestABacklogIsReadOnceAndNotKept(t *testing.T) {
	t.Parallel()
	n, limit := 2000*scale(), patience*time.Duration(scale())
	b := newBench(t)
	var count atomic.Int64
	rx := sendertest.New(t, sendertest.Config{Keep: 1, OnRequest: func(sendertest.Request) { count.Add(1) }})
	rx.Refuse()
	config := b.config(fmt.Sprintf("{id: a, url: %q}", rx.URL()))
	p := start(t, config).streaming()
	b.exec(fmt.Sprintf("insert into outbox (type, aggregateid, payload) select 't', 'k' || i, '{}' from generate_series(1, %d) i", n))
	b.exec(fmt.Sprintf("insert into outbox (type, aggregateid, payload) select 't', 'hot', '{}' from generate_series(1, %d) i", n))
	within(t, limit, "everything to be parked", func() bool { return b.parked() == int64(2*n) })
	p.stop()
	reader := b.conn()
	_, err := reader.Exec(t.Context(), "begin isolation level repeatable read; select count(*) from outbox")
	require.NoError(t, err)

	// Statistics are written when a session ends.
	usage := func() (seq, entries int64) {
		return b.ask("select sum(seq_tup_read)::bigint from pg_stat_user_tables where schemaname = 'walhook' and relname in ('deliveries', 'events')"),
			b.ask("select sum(idx_tup_read)::bigint from pg_stat_user_indexes where schemaname = 'walhook' and relname in ('deliveries', 'events')")
	}
	_, before := usage()
	begin := time.Now()
	require.NoError(t, rx.Reopen())
	p = start(t, config).streaming()
	within(t, limit, "everything to be delivered", func() bool {
		return count.Load() >= int64(2*n) && b.ask("select count(*) from (select from walhook.deliveries limit 1) d") == 0
	})
	took := time.Since(begin)
	memory := resident(t, p)
	p.stop()
	_, after := usage()
	t.Logf("%d deliveries in %v (%.0f/s), %.1f index entries each, %d MiB at most", 2*n, took, float64(2*n)/took.Seconds(), float64(after-before)/float64(2*n), memory>>20)
	require.Less(t, after-before, int64(12*2*n))
}

// resident is the most memory that a process has had.
func resident(t *testing.T, p *program) (bytes int64) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(text)
	require.NotNil(t, m)
	kib, err := strconv.ParseInt(string(m[1]), 10, 64)
	require.NoError(t, err)
	return kib << 10
}

// The buffer is a bound in bytes: what does not fit waits in the database.
func TestMemoryIsBoundedWhateverTheRowsWeigh(t *testing.T) {
	t.Parallel()
	rows, limit := 200*scale(), patience*time.Duration(scale()) // of a megabyte
	if raceEnabled {
		rows = 20 // whose memory says nothing
	}
	b := newBench(t)
	var hang atomic.Bool
	hang.Store(true)
	var count atomic.Int64
	rx := sendertest.New(t, sendertest.Config{Keep: 1, Respond: func(sendertest.Request) sendertest.Answer {
		if hang.Load() {
			return sendertest.Status(503)
		}
		count.Add(1)
		return sendertest.Status(204)
	}})
	p := start(t, b.edit(b.config(fmt.Sprintf("{id: a, url: %q, max_payload: 2MiB}", rx.URL())), "server:", "buffer: {bytes: 8MiB}\nserver:")).streaming()
	b.exec(fmt.Sprintf(`insert into outbox (type, aggregateid, payload) select 't', 'k' || i %% 40, '"' || repeat('x', 1000000) || '"' from generate_series(1, %d) i`, rows))
	within(t, limit, "everything to be parked", func() bool { return b.parked() == int64(rows) })
	hang.Store(false)
	within(t, limit, "everything to be delivered", func() bool { return count.Load() >= int64(rows) })
	memory := resident(t, p)
	t.Logf("%d MiB", memory>>20)
	require.True(t, raceEnabled || memory < 128<<20)
}

// Thousands of events of one transaction for one key, sent in their order through memory and store.
func TestATransactionOfOneKeyComesInItsOrder(t *testing.T) {
	t.Parallel()
	n := 1000 * scale()
	b := newBench(t)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	rx.Script(slices.Concat(sendertest.Times(100, sendertest.Status(204)), sendertest.Times(1, sendertest.Status(500)))...)
	start(t, b.config(endpoint("a", rx, ""))).streaming()
	begin := time.Now()
	b.exec(fmt.Sprintf(`insert into outbox (type, aggregateid, payload) select 't', 'k', '{"key":"k","n":' || i || '}' from generate_series(1, %d) i`, n))
	requireAll(t, rx, n)
	t.Logf("%d in %v", n, time.Since(begin))
	require.Zero(t, repeats(rx))
	for i, q := range succeeded(rx) {
		require.Contains(t, string(q.Data), fmt.Sprintf(`"n":%d}`, i+1))
	}
}

// What an app can make many of makes no series; an endpoint that is gone takes its own along; a
// broken file changes nothing.
func TestSeriesAreAsManyAsTheEndpoints(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	p := start(t, b.config(endpoint("a", rx, ""))).streaming()
	reload := func() { require.NoError(t, p.cmd.Process.Signal(syscall.SIGHUP)) }
	series := func() (own, strangers int) {
		_, text := p.get("/metrics")
		for l := range strings.Lines(text) {
			if strings.HasPrefix(l, "walhook_") {
				own++
			}
			if strings.Contains(l, "stranger") {
				strangers++
			}
		}
		return own, strangers
	}
	b.produce(1, 5, 5)
	requireAll(t, rx, 5)
	before, _ := series()
	b.exec(`insert into outbox (type, aggregateid, payload) select 'stranger.' || i, 'stranger' || i, '{"n":1,"key":"' || i || '"}' from generate_series(1, 500) i`)
	requireAll(t, rx, 505)
	after, strangers := series()
	require.Equal(t, before, after)
	require.Zero(t, strangers)

	endpoints := []string{endpoint("a", rx, "")}
	for i := range 20 {
		endpoints = append(endpoints, endpoint(fmt.Sprintf("stranger-%d", i), rx, `, events: ["other"]`))
	}
	b.config(endpoints...)
	reload()
	p.log.line(t, "configuration reloaded", `"endpoints":21`)
	b.exec(`insert into outbox (type, aggregateid, payload) values ('other', 'x', '{"n":1,"key":"x"}')`)
	eventually(t, "all to have it", func() bool { return len(succeeded(rx)) == 505+21 })
	_, strangers = series()
	require.Positive(t, strangers)
	b.config(endpoint("a", rx, ""))
	reload()
	eventually(t, "the series to be gone", func() bool { _, strangers := series(); return strangers == 0 })

	b.config("{id: a, url: [}")
	reload()
	p.log.line(t, "the configuration is broken")
	code, ready := p.get("/readyz")
	require.Equal(t, http.StatusOK, code, ready)
	b.produce(1, 5, 5)
	eventually(t, "the old configuration to be in force", func() bool { return len(succeeded(rx)) == 505+21+5 })
}
