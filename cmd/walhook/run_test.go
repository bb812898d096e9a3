package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/cdc/pgtest"
	"github.com/walhook/walhook/sender/sendertest"
)

// TestMain lets the test binary be walhook itself, so that a real process can be killed.
func TestMain(m *testing.M) {
	if os.Getenv("WALHOOK_TEST_AS_PROGRAM") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

const (
	testSecret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
	patience   = 60 * time.Second // for what has to come on a busy machine
)

// bench is a database with an app's outbox table in Debezium's shape, and a place for configs.
type bench struct {
	t    *testing.T
	url  string
	slot string
	dir  string
	sql  *pgx.Conn // of ask
	base int       // what the numbers of the next produce begin behind
}

func newBench(t *testing.T) *bench {
	t.Helper()
	return newBenchOn(t, pgtest.DB(t))
}

func newBenchOn(t *testing.T, url string) *bench {
	t.Helper()
	b := &bench{t: t, url: url, dir: t.TempDir(), slot: fmt.Sprintf("t%d", time.Now().UnixNano())}
	b.exec("create table outbox (id bigserial primary key, aggregatetype text, aggregateid text, type text, payload text)")
	return b
}

func (b *bench) exec(sql string) {
	b.t.Helper()
	pgtest.Exec(b.t, b.url, sql)
}

func (b *bench) conn() *pgx.Conn {
	b.t.Helper()
	conn, err := pgx.Connect(b.t.Context(), b.url)
	require.NoError(b.t, err)
	b.t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func (b *bench) ask(sql string) (n int64) {
	b.t.Helper()
	if b.sql == nil {
		b.sql = b.conn()
	}
	require.NoError(b.t, b.sql.QueryRow(b.t.Context(), sql).Scan(&n))
	return n
}

// config writes a configuration; endpoints are the lines below `endpoints:`.
func (b *bench) config(endpoints ...string) string {
	b.t.Helper()
	path := filepath.Join(b.dir, "walhook.yaml")
	text := fmt.Sprintf("database: {url: %q}\noutbox: [{table: outbox}]\ncdc: {slot: %s, publication: %s}\nserver: {listen: \"127.0.0.1:0\"}\n"+
		"defaults: {retry: {schedule: [200ms"+strings.Repeat(", 500ms", 5)+strings.Repeat(", 1s", 90)+"], jitter: 0}, breaker: {open_for: 500ms}}\n"+
		"endpoints:\n", b.url, b.slot, b.slot)
	for _, e := range endpoints {
		text += "  - " + e + "\n"
	}
	// In one step, as editors and ConfigMaps do it.
	require.NoError(b.t, os.WriteFile(path+".new", []byte(text), 0o600))
	require.NoError(b.t, os.Rename(path+".new", path))
	return path
}

func endpoint(id string, r *sendertest.Receiver, more string) string {
	return fmt.Sprintf("{id: %s, url: %q, secrets: [%q]%s}", id, r.URL(), testSecret, more)
}

// produce inserts n rows a client, each client with keys of its own and a number that grows
// with every row of a key; now and then it rolls back or puts several rows into a transaction.
func (b *bench) produce(clients, n, keys int) {
	b.t.Helper()
	var wg sync.WaitGroup
	for c := range clients {
		conn := b.conn()
		wg.Go(func() {
			for i := 0; i < n; {
				err := pgx.BeginFunc(context.Background(), conn, func(tx pgx.Tx) error {
					rows := 1 + i%7/5
					for range min(rows, n-i) {
						key := fmt.Sprintf("%d-%d", c, i%keys)
						payload := fmt.Sprintf(`{"key":%q,"n":%d}`, key, b.base+i+1)
						if _, err := tx.Exec(context.Background(), "insert into outbox (aggregatetype, aggregateid, type, payload) values ('order', $1, 'order.changed', $2)", key, payload); err != nil {
							return err
						}
						i++
					}
					return nil
				})
				if err != nil {
					b.t.Errorf("insert: %v", err)
					return
				}
				if i%50 == 0 {
					_ = pgx.BeginFunc(context.Background(), conn, func(tx pgx.Tx) error {
						_, _ = tx.Exec(context.Background(), "insert into outbox (aggregatetype, aggregateid, type, payload) values ('order', 'rolled-back', 'order.changed', '{}')")
						return io.EOF
					})
				}
			}
		})
	}
	wg.Wait()
	b.base += n
}

// requireAll waits until the receiver has n events and checks what it got: in order, none
// repeated more than allowed, none that was never committed.
func requireAll(t *testing.T, r *sendertest.Receiver, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var delivered map[string]bool
	err := r.WaitUntil(ctx, func(reqs []sendertest.Request) bool {
		if len(reqs) < n {
			return false
		}
		delivered = map[string]bool{}
		for i := range reqs {
			if reqs[i].Status/100 == 2 {
				delivered[reqs[i].ID] = true
			}
		}
		return len(delivered) >= n
	})
	require.NoError(t, err, "%d of %d delivered", len(delivered), n)
	require.Len(t, delivered, n)
	require.NoError(t, sendertest.Disorder(succeeded(r), sendertest.Fields("key", "n")))
}

func succeeded(r *sendertest.Receiver) []sendertest.Request {
	return slices.DeleteFunc(r.Requests(), func(q sendertest.Request) bool { return q.Status/100 != 2 })
}

func repeats(r *sendertest.Receiver) int {
	n := 0
	for _, times := range sendertest.Duplicates(succeeded(r)) {
		n += times - 1
	}
	return n
}

// program is a walhook process.
type program struct {
	t    *testing.T
	cmd  *exec.Cmd
	log  *logBuffer
	addr string
}

// logBuffer keeps a process' log and lets a test wait for a line.
type logBuffer struct {
	mu      sync.Mutex // guards what follows
	text    bytes.Buffer
	changed chan struct{}
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.changed)
	l.changed = make(chan struct{})
	return l.text.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// line waits for a log line that contains all of parts.
func (l *logBuffer) line(t *testing.T, parts ...string) string {
	t.Helper()
	timeout := time.After(patience)
	for {
		l.mu.Lock()
		text, changed := l.text.String(), l.changed
		l.mu.Unlock()
		for sc := bufio.NewScanner(strings.NewReader(text)); sc.Scan(); {
			if !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(sc.Text(), p) }) {
				return sc.Text()
			}
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("no log line with %q in:\n%s", parts, text)
		}
	}
}

func start(t *testing.T, config string, args ...string) *program {
	t.Helper()
	p := &program{t: t, log: &logBuffer{changed: make(chan struct{})}}
	p.cmd = exec.Command(os.Args[0], append([]string{"run", "--config", config}, args...)...)
	p.cmd.Env = append(os.Environ(), "WALHOOK_TEST_AS_PROGRAM=1")
	p.cmd.Stderr = p.log
	p.cmd.SysProcAttr = dieWithUs()
	require.NoError(t, p.cmd.Start())
	t.Cleanup(func() {
		if p.cmd.ProcessState == nil {
			_ = p.cmd.Process.Kill()
			_ = p.cmd.Wait()
		}
		if t.Failed() {
			t.Logf("log of pid %d:\n%s", p.cmd.Process.Pid, p.log)
		}
	})
	var line struct{ Addr string }
	require.NoError(t, json.Unmarshal([]byte(p.log.line(t, "serving health")), &line))
	p.addr = line.Addr
	return p
}

func (p *program) streaming() *program {
	p.t.Helper()
	p.log.line(p.t, `"msg":"streaming"`)
	return p
}

// stop sends SIGTERM and wants exit code 0.
func (p *program) stop() {
	p.t.Helper()
	require.NoError(p.t, p.cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(p.t, p.cmd.Wait(), "exit code; log:\n%s", p.log)
}

func (p *program) kill() {
	p.t.Helper()
	require.NoError(p.t, p.cmd.Process.Kill())
	_ = p.cmd.Wait()
}

func (p *program) get(path string) (int, string) {
	p.t.Helper()
	resp, err := http.Get("http://" + p.addr + path)
	require.NoError(p.t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(p.t, err)
	return resp.StatusCode, string(body)
}

// eventually waits for a state of the database, which tells nobody when it changes.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	timeout := time.After(patience)
	for !ok() {
		select {
		case <-tick.C:
		case <-timeout:
			t.Fatalf("not in time: %s", what)
		}
	}
}

func TestEveryCommittedRowArrivesOnceSignedAndInKeyOrder(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	p := start(t, b.config(endpoint("billing", rx, ""))).streaming()
	b.produce(4, 500, 7)
	requireAll(t, rx, 2000)
	require.Zero(t, repeats(rx))

	code, ready := p.get("/readyz")
	require.Equal(t, http.StatusOK, code, ready)
	require.Contains(t, ready, `"status":"streaming"`)
	_, metrics := p.get("/metrics")
	for _, series := range []string{
		`walhook_events_total{outcome="routed"} 2000`,
		`walhook_deliveries_total{endpoint="billing",outcome="delivered"} 2000`,
		`walhook_attempts_total{code="204",endpoint="billing"} 2000`,
		`walhook_commit_to_delivery_seconds_count 2000`,
		`walhook_breaker_state{endpoint="billing"} 0`,
		`walhook_parked{endpoint="billing"} 0`,
	} {
		require.Contains(t, metrics, series)
	}
	require.NotContains(t, metrics, testSecret)
	p.stop()
	require.NotContains(t, p.log.String(), testSecret)
}

func TestThreeSickEndpointsLeaveTheFourthAndTheWALAlone(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	well := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	refusing := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	refusing.Refuse()
	var sick sync.Map // "busy" and "hanging" while they are
	sick.Store("busy", true)
	sick.Store("hanging", true)
	respond := func(name string, bad sendertest.Answer) func(sendertest.Request) sendertest.Answer {
		return func(sendertest.Request) sendertest.Answer {
			if _, ill := sick.Load(name); ill {
				return bad
			}
			return sendertest.Status(204)
		}
	}
	busy := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}, Respond: respond("busy", sendertest.Status(503))})
	hanging := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}, Respond: respond("hanging", sendertest.Hang())})
	start(t, b.config(
		endpoint("refusing", refusing, ""),
		endpoint("busy", busy, ""),
		endpoint("hanging", hanging, ", timeout: 2s, concurrency: 8"),
		endpoint("well", well, ""),
	)).streaming()
	b.produce(4, 500, 7)
	requireAll(t, well, 2000)

	// What the three cannot take is in the database, and the slot has moved on to the present.
	end := b.ask("select (pg_current_wal_lsn() - '0/0')::bigint")
	eventually(t, "the slot to pass the load", func() bool {
		return b.ask(fmt.Sprintf("select (confirmed_flush_lsn - '0/0')::bigint from pg_replication_slots where slot_name = '%s'", b.slot)) >= end
	})
	require.EqualValues(t, 6000, b.ask("select count(*) from walhook.deliveries"))
	require.EqualValues(t, 2000, b.ask("select count(*) from walhook.events"))
	require.Zero(t, repeats(well))

	sick.Clear()
	require.NoError(t, refusing.Reopen())
	for _, r := range []*sendertest.Receiver{refusing, busy, hanging} {
		requireAll(t, r, 2000)
		require.Zero(t, repeats(r))
	}
	eventually(t, "walhook.deliveries to be empty", func() bool {
		return b.ask("select count(*) from walhook.deliveries") == 0 && b.ask("select count(*) from walhook.events") == 0
	})
}

func TestStopAndStartUnderLoadLosesAndRepeatsNothing(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	config := b.config(endpoint("billing", rx, ""))
	p := start(t, config).streaming()
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.produce(4, 1500, 7)
	}()
	for i := range 4 {
		requireAtLeast(t, rx, (i+1)*300)
		p.stop()
		p = start(t, config).streaming()
	}
	<-done
	requireAll(t, rx, 6000)
	require.Zero(t, repeats(rx))
	p.stop()
	p = start(t, config).streaming()
	b.produce(1, 1, 1)
	requireAtLeast(t, rx, 6001)
	p.stop()
	require.Zero(t, repeats(rx))
}

func requireAtLeast(t *testing.T, r *sendertest.Receiver, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	require.NoError(t, r.WaitFor(ctx, n))
}

func TestKillLosesNothingAndRepeatsOnlyTheLatest(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	config := b.config(endpoint("billing", rx, ""))
	p := start(t, config).streaming()
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.produce(4, 1500, 7)
	}()
	var kills []time.Time
	for i := range 4 {
		requireAtLeast(t, rx, (i+1)*400)
		p.kill()
		kills = append(kills, time.Now())
		p = start(t, config).streaming()
	}
	<-done
	requireAll(t, rx, 6000)

	// A repeat is explained by a kill not long after the first delivery. (What was on its way at the
	// kill may be served a moment after it.)
	first := map[string]time.Time{}
	for _, q := range succeeded(rx) {
		at, again := first[q.ID]
		if !again {
			first[q.ID] = q.At
			continue
		}
		explained := slices.ContainsFunc(kills, func(k time.Time) bool { return q.At.After(k) && k.Sub(at).Abs() < 10*time.Second })
		require.True(t, explained, "event %s, delivered at %s, came again at %s", q.ID, at, q.At)
	}
}

func TestReloadAddsAndRemovesEndpointsWithoutLossOrRepeat(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	old := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	added := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	p := start(t, b.config(endpoint("old", old, ""))).streaming()
	b.produce(1, 100, 3)
	requireAll(t, old, 100)

	b.config("{id: old, url: nonsense}")
	require.NoError(t, p.cmd.Process.Signal(syscall.SIGHUP))
	p.log.line(t, "the configuration is broken", "endpoints[0].url")
	_, metrics := p.get("/metrics")
	require.Contains(t, metrics, "\nwalhook_config_reload_failed 1\n")

	b.config(endpoint("old", old, ""), endpoint("added", added, ""))
	require.NoError(t, p.cmd.Process.Signal(syscall.SIGHUP))
	p.log.line(t, "configuration reloaded", `"endpoints":2`)
	_, metrics = p.get("/metrics")
	require.Contains(t, metrics, "\nwalhook_config_reload_failed 0\n")
	b.exec("insert into outbox (aggregatetype, aggregateid, type, payload) values ('order', 'x', 'order.changed', '{\"key\":\"x\",\"n\":1}')")
	requireAll(t, old, 101)
	requireAll(t, added, 1)
	require.Zero(t, repeats(old))
}

func TestStartWaitsForWhatCanBeMendedOutside(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	b.exec("alter table outbox rename to outbox_away")
	p := start(t, b.config(endpoint("billing", rx, "")))
	p.log.line(t, `"level":"error"`, `table \"public\".\"outbox\" does not exist`, "remedy")
	code, ready := p.get("/readyz")
	require.Equal(t, http.StatusServiceUnavailable, code)
	require.Contains(t, ready, `"status":"waiting"`)
	require.Contains(t, ready, "does not exist")
	b.exec("alter table outbox_away rename to outbox")
	p.streaming()
	b.produce(1, 10, 2)
	requireAll(t, rx, 10)
	p.stop()
}

// A start that waits before there is a stream says so in /metrics as it does in /readyz.
func TestTheStateInMetricsIsTheOneOfReadyz(t *testing.T) {
	s := newSidecar(mustLoad(t, threeLines, noEnv), &options{env: noEnv}, zap.NewNop())
	p, err := newPipeline(s.cfg, cdc.RecoverAsk, s.databaseURL, nil, s.log)
	require.NoError(t, err)
	defer p.close()
	s.now = p
	for _, preparing := range []error{nil, &cdc.Fault{State: cdc.Waiting, Reason: "the password is wrong"}} {
		p.preparing = preparing
		families, err := p.reg.Gather()
		require.NoError(t, err)
		present := ""
		for _, f := range families {
			for _, m := range f.GetMetric() {
				if f.GetName() == "walhook_stream_state" && m.GetGauge().GetValue() == 1 {
					present += m.GetLabel()[0].GetValue()
				}
			}
		}
		require.Equal(t, s.health().Status, present)
	}
}

func TestMistakesInTheConfigEndWithCode2(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := sendertest.New(t, sendertest.Config{})
	good := b.config(fmt.Sprintf("{id: a, url: %q}", rx.URL()))
	text, err := os.ReadFile(good)
	require.NoError(t, err)
	for name, c := range map[string]struct {
		from, to string
		says     []string
	}{
		"unknown key":      {"defaults:", "defualts:", []string{"walhook.yaml:5:1", "defualts", "defaults"}},
		"malformed secret": {"{id: a,", "{id: a, secrets: [whsec_!],", []string{"endpoints[0].secrets[0]"}},
		"bad URL":          {rx.URL(), "ftp://x", []string{"endpoints[0].url"}},
		"missing column":   {"[{table: outbox}]", "[{table: outbox, columns: {key: agregateid}}]", []string{"agregateid", "aggregateid"}},
		"missing variable": {"{id: a,", "{id: a, secrets: [\"${WALHOOK_TEST_NOT_SET}\"],", []string{"WALHOOK_TEST_NOT_SET"}},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "walhook.yaml")
			require.Contains(t, string(text), c.from)
			require.NoError(t, os.WriteFile(path, []byte(strings.Replace(string(text), c.from, c.to, 1)), 0o600))
			var stdout, stderr bytes.Buffer
			code := run(t.Context(), []string{"run", "--config", path}, os.LookupEnv, &stdout, &stderr)
			require.Equal(t, exitUsage, code, stderr.String())
			for _, s := range c.says {
				require.Contains(t, stderr.String(), s)
			}
		})
	}
}

func TestASecondInstanceStandsByAndTakesOver(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	config := b.config(endpoint("billing", rx, ""))
	first := start(t, config).streaming()
	second := start(t, config)
	second.log.line(t, "standing by")
	code, ready := second.get("/readyz")
	require.Equal(t, http.StatusOK, code)
	require.Contains(t, ready, `"status":"standby"`)
	b.produce(1, 50, 3)
	requireAll(t, rx, 50)
	first.kill()
	second.streaming()
	b.exec("insert into outbox (aggregatetype, aggregateid, type, payload) values ('order', 'x', 'order.changed', '{\"key\":\"x\",\"n\":1}')")
	requireAll(t, rx, 51)
}

func TestARowThatCannotBeMappedIsADeadDeliveryAndStopsNothing(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	p := start(t, b.config(endpoint("billing", rx, ""))).streaming()
	b.exec("insert into outbox (aggregateid, type, payload) values ('k', null, '{}')")
	b.exec("insert into outbox (aggregateid, type, payload) values ('k', 'order.changed', 'not json')")
	b.exec("insert into outbox (aggregateid, type, payload) values ('k', 'order.changed', '{\"key\":\"k\",\"n\":1}')")
	requireAll(t, rx, 1)
	eventually(t, "two dead deliveries", func() bool {
		return b.ask("select count(*) from walhook.deliveries where state = 'dead'") == 2
	})
	require.EqualValues(t, 1, b.ask("select count(*) from walhook.deliveries where endpoint_id is null and reason = 'unmappable'"))
	require.EqualValues(t, 1, b.ask("select count(*) from walhook.deliveries where endpoint_id = 'billing' and reason = 'not_json'"))
	p.stop()
}

func TestMessagesAndPartitionsNeedNoTableOfTheirOwn(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.exec(`create table parted (id uuid primary key default gen_random_uuid(), event_type text not null, aggregate_id text, payload jsonb) partition by hash (id);
		create table parted_0 partition of parted for values with (modulus 2, remainder 0);
		create table parted_1 partition of parted for values with (modulus 2, remainder 1)`)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	config := b.config(endpoint("billing", rx, ""))
	text, err := os.ReadFile(config)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(config, bytes.Replace(text, []byte("[{table: outbox}]"),
		[]byte("[{table: outbox, id_prefix: o_}, {table: parted}, {messages: walhook, id_prefix: m_}]"), 1), 0o600))
	start(t, config).streaming()
	b.exec("insert into parted (event_type, aggregate_id, payload) select 'part.changed', 'p', jsonb_build_object('key', 'p', 'n', i) from generate_series(1, 10) i")
	b.exec(`select pg_logical_emit_message(true, 'walhook', '{"id": 7, "type": "message.sent", "key": "m", "data": {"key": "m", "n": 1}}')`)
	b.exec(`select pg_logical_emit_message(true, 'other', 'not ours')`)
	b.exec(`select pg_logical_emit_message(false, 'walhook', '{"id": 8, "type": "message.sent"}')`)
	b.exec("insert into outbox (aggregateid, type, payload) values ('k', 'order.changed', '{\"key\":\"k\",\"n\":1}')")
	requireAll(t, rx, 12)
	types := map[string]int{}
	for _, q := range rx.Requests() {
		types[q.Type]++
		if q.Type == "message.sent" {
			require.Equal(t, "m_7", q.ID)
		}
	}
	require.Equal(t, map[string]int{"part.changed": 10, "message.sent": 1, "order.changed": 1}, types, "%v", slices.Sorted(maps.Keys(types)))
}

func TestPostgresStopsAndCrashesLoseAndRepeatNothing(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{Settings: map[string]string{"fsync": "on"}})
	b := newBenchOn(t, server.URL())
	var hanging atomic.Bool
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}, Respond: func(sendertest.Request) sendertest.Answer {
		if hanging.Load() {
			return sendertest.Hang()
		}
		return sendertest.Status(204)
	}})
	p := start(t, b.config(endpoint("billing", rx, ", timeout: 3s"))).streaming()
	b.produce(2, 200, 5)
	requireAll(t, rx, 400)

	// A fast shutdown waits for us to confirm everything; with a receiver that hangs it would wait
	// for ever if we kept the connection.
	hanging.Store(true)
	b.produce(2, 200, 5)
	requireAtLeast(t, rx, 401)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	require.NoError(t, server.Stop(ctx, pgtest.Fast))
	hanging.Store(false)
	require.NoError(t, server.Start(ctx))
	requireAll(t, rx, 800)
	require.Zero(t, repeats(rx))

	for range 3 {
		require.NoError(t, server.Kill())
		require.NoError(t, server.Start(ctx))
		b.produce(1, 100, 5)
	}
	requireAll(t, rx, 1100)
	require.Zero(t, repeats(rx))
	p.stop()
	start(t, filepath.Join(b.dir, "walhook.yaml")).streaming()
	b.produce(1, 1, 5)
	requireAll(t, rx, 1101)
	require.Zero(t, repeats(rx))
}
