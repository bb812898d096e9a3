package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc/pgtest"
)

// audience reads what the demo prints, while it does.
type audience struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer

	cue  string // once this is read,
	then func() // this is called; or, where it is nil, nothing is read any more
}

func (a *audience) Write(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.text.Write(p)
	if a.cue != "" && strings.Contains(a.text.String(), a.cue) {
		if a.then == nil {
			return 0, errors.New("nobody reads")
		}
		a.cue = ""
		a.then()
	}
	return len(p), nil
}

func (a *audience) String() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.text.String()
}

// play runs the demo as main does.
func play(ctx context.Context, t *testing.T, to *audience, args ...string) (code int, errs string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	var stderr bytes.Buffer
	code = run(ctx, append([]string{"demo"}, args...), noEnv, to, &stderr)
	t.Log(to.String() + stderr.String())
	return code, stderr.String()
}

var (
	demoAddresses = regexp.MustCompile(`127\.0\.0\.1:\d+`)
	demoFiles     = regexp.MustCompile(`/\S+/walhook\.(?:log|yaml)`)
)

// requireNothingLeft looks for every address and file that the demo spoke of.
func requireNothingLeft(t *testing.T, said string, but ...string) {
	t.Helper()
	addresses := demoAddresses.FindAllString(said, -1)
	require.NotEmpty(t, addresses)
	for _, addr := range addresses {
		if len(but) > 0 && strings.Contains(but[0], addr) {
			continue
		}
		conn, err := net.DialTimeout("tcp", addr, time.Second)
		if err == nil {
			conn.Close()
		}
		require.Error(t, err, "somebody still listens on %s", addr)
	}
	files := demoFiles.FindAllString(said, -1)
	require.NotEmpty(t, files)
	for _, file := range files {
		require.NoDirExists(t, filepath.Dir(file))
		if above := filepath.Dir(filepath.Dir(file)); above != filepath.Clean(os.TempDir()) {
			require.NoDirExists(t, above)
		}
	}
}

// traces counts what a demo makes in a database.
func traces(t *testing.T, url string) (n int) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	require.NoError(t, err)
	defer conn.Close(t.Context())
	const count = `
select
	(select count(*) from pg_replication_slots where database = current_database())
	+ (select count(*) from pg_publication)
	+ (select count(*) from pg_namespace where nspname in ('walhook', 'walhook_demo'))`
	require.NoError(t, conn.QueryRow(t.Context(), count).Scan(&n))
	return n
}

func TestDemoDeliversEverythingAndLeavesNothing(t *testing.T) {
	t.Parallel()
	var out audience
	code, errs := play(t.Context(), t, &out, "--exit", "--events", "300")
	said := out.String()

	require.Equal(t, exitDone, code, errs)
	require.Contains(t, said, "PASS: every committed event arrived at both")
	require.Regexp(t, `delivered +300 +300 +of 300 events`, said)
	require.Regexp(t, `lost +0 +0\n`, said)
	require.Regexp(t, `repeated +0 +0\n`, said)
	require.Regexp(t, `out of order +0 +0 +in \d+ keys`, said)
	require.Regexp(t, `signatures wrong +0 +0\n`, said)
	require.Regexp(t, `commit to delivery, p50 +[\d.]+ m?s +[\d.]+ m?s`, said)
	for _, turn := range []string{"crm answers 503", "crm's breaker opened", "crm refuses connections", "crm is back", "crm's breaker closed", "crm has caught up"} {
		require.Contains(t, said, turn)
	}
	requireNothingLeft(t, said)
}

func TestDemoInADatabaseOfYoursLeavesItAsItWas(t *testing.T) {
	t.Parallel()
	url := pgtest.DB(t)
	var out audience
	code, errs := play(t.Context(), t, &out, "--exit", "--events", "50", "--database-url", url)

	require.Equal(t, exitDone, code, errs)
	require.Contains(t, out.String(), "PASS")
	require.Zero(t, traces(t, url))
	requireNothingLeft(t, out.String(), url)
}

func TestDemoClearsUpWhatAKilledOneLeft(t *testing.T) {
	t.Parallel()
	url := pgtest.DB(t)
	pgtest.Exec(t, url, createShop+"create schema walhook; comment on schema walhook is '"+demoMark+"'; create table walhook.checkpoints (slot text)")
	pgtest.Exec(t, url, "create publication walhook_demo for table walhook_demo.outbox")
	pgtest.Exec(t, url, "select pg_create_logical_replication_slot('walhook_demo_' || oid, 'pgoutput') from pg_database where datname = current_database()")
	var out audience
	code, errs := play(t.Context(), t, &out, "--exit", "--events", "1", "--database-url", url)

	require.Equal(t, exitDone, code, errs)
	require.Zero(t, traces(t, url))
}

func TestDemoRefusesADatabaseThatHasAWalhook(t *testing.T) {
	t.Parallel()
	url := pgtest.DB(t)
	pgtest.Exec(t, url, "create schema walhook; create table walhook.precious ()")
	var out audience
	code, errs := play(t.Context(), t, &out, "--exit", "--database-url", url)

	require.Equal(t, exitFailed, code)
	require.Contains(t, errs, "has a schema walhook already")
	require.Equal(t, 1, traces(t, url))
	pgtest.Exec(t, url, "select from walhook.precious")
}

func TestDemoSaysWhatADatabaseLacks(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{Settings: map[string]string{"wal_level": "replica"}})
	var out audience
	code, errs := play(t.Context(), t, &out, "--exit", "--database-url", server.URL())

	require.Equal(t, exitFailed, code)
	require.Contains(t, errs, "alter system set wal_level = logical")
	require.Zero(t, traces(t, server.URL()))
}

func TestInterruptedDemoStillAddsUpAndLeavesNothing(t *testing.T) {
	t.Parallel()
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	out := audience{cue: "crm refuses connections", then: interrupt}
	code, errs := play(ctx, t, &out, "--events", "300")

	require.Equal(t, exitDone, code, errs)
	require.Contains(t, out.String(), "PASS")
	requireNothingLeft(t, out.String())
}

func TestDemoThatNobodyReadsEnds(t *testing.T) {
	t.Parallel()
	out := audience{cue: "crm answers 503"}
	code, errs := play(t.Context(), t, &out, "--exit", "--events", "300")

	require.Equal(t, exitFailed, code)
	require.Contains(t, errs, "interrupted")
	requireNothingLeft(t, out.String())
}

func TestDemoWantsAnEvent(t *testing.T) {
	t.Parallel()
	var out audience
	code, errs := play(t.Context(), t, &out, "--events", "0")

	require.Equal(t, exitUsage, code)
	require.Contains(t, errs, "--events")
}

func TestAuditNoticesWhatWentWrong(t *testing.T) {
	t.Parallel()
	sum := func(s string) uint64 { return sumOf("order.paid", s) }
	committed := []sale{
		{id: "a1", kind: "order.created", key: "a", version: 1, sum: sum("a1")},
		{id: "a2", kind: "order.paid", key: "a", version: 2, sum: sum("a2")},
		{id: "b1", kind: "order.created", key: "b", version: 1, sum: sum("b1")},
		{id: "a3", kind: "order.packed", key: "a", version: 3, sum: sum("a3")},
	}
	undone := map[string]bool{"x": true}
	for name, test := range map[string]struct {
		came string
		want account
	}{
		"all well, keys interleaved":       {"b1 a1 a2 a3", account{delivered: 4}},
		"one is swallowed":                 {"a1 b1 a3", account{delivered: 3, lost: 1, problems: []string{"crm: 1 events never arrived, as order.paid of a, a2"}}},
		"nothing came":                     {"", account{lost: 4, problems: []string{"crm: 4 events never arrived, as order.created of a, a1"}}},
		"one comes twice":                  {"a1 a2 b1 a3 b1", account{delivered: 4, repeated: 1, problems: []string{"crm: 1 events came more than once, as order.created of b, b1"}}},
		"a repeat is no disorder":          {"a1 a2 a3 a1 b1", account{delivered: 4, repeated: 1, problems: []string{"crm: 1 events came more than once, as order.created of a, a1"}}},
		"two of a key change places":       {"a2 a1 b1 a3", account{delivered: 4, disordered: 1, problems: []string{"crm: 1 events came in the wrong order, as order.created of a (its number 1) after order.paid (2)"}}},
		"the last of a key comes first":    {"a3 a1 a2 b1", account{delivered: 4, disordered: 2, problems: []string{"crm: 2 events came in the wrong order, as order.created of a (its number 1) after order.packed (3)"}}},
		"a rolled-back one comes":          {"a1 a2 x b1 a3", account{delivered: 4, undone: 1, problems: []string{"crm: 1 events came although rolled back, as x"}}},
		"one comes that nobody inserted":   {"a1 a2 b1 a3 ?", account{delivered: 4, unknown: 1, problems: []string{`crm: 1 events came that nobody inserted, as "?"`}}},
		"one comes with another's payload": {"a1 a2! b1 a3", account{delivered: 4, changed: 1, problems: []string{"crm: 1 events came changed, as order.paid of a, a2"}}},
	} {
		t.Run(name, func(t *testing.T) {
			var receipts []receipt
			for id := range strings.FieldsSeq(test.came) {
				receipts = append(receipts, receipt{id: strings.TrimSuffix(id, "!"), sum: sum(id)})
			}
			require.Equal(t, test.want, audit("crm", committed, undone, receipts))
		})
	}
}

func TestLineOfProgressStaysUnderWhatIsSaid(t *testing.T) {
	t.Parallel()
	var out audience
	s := newScreen(&out)
	s.live = true
	s.progress("one")
	s.line("said")
	s.progress("two")
	s.clear()
	shown := regexp.MustCompile(` *\d+\.\ds  `).ReplaceAllString(out.String(), "@ ")
	require.Equal(t, "\r@ one\x1b[K\r\x1b[Ksaid\n@ one\r@ two\x1b[K\r\x1b[K", shown)
}

func TestNumbersReadWell(t *testing.T) {
	t.Parallel()
	require.Equal(t, []string{"0", "999", "1,000", "1,234,567"}, []string{thousands(0), thousands(999), thousands(1000), thousands(1234567)})
	require.Equal(t, []string{"-", "0.5 ms", "12 ms", "1.5 s"}, []string{shortly(0), shortly(500 * time.Microsecond), shortly(12 * time.Millisecond), shortly(1500 * time.Millisecond)})
	require.Equal(t, []string{"296 B", "97 kB", "16 MB"}, []string{size(296), size(100_000), size(16 << 20)})
}
