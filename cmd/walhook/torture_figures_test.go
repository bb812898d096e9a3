package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
)

// This file is what a long run is published with: its figures, and what it has seen of the
// processes on its way.

// figures are a run's results, in the order in which they were added: a line of JSON for
// programs, and a table for docs/faults.md.
type figures struct {
	run  string
	rows []figure
}

type figure struct {
	name  string
	value any // as JSON has it
	text  string
}

func (f *figures) add(name string, value any) {
	text := fmt.Sprint(value)
	switch v := value.(type) {
	case time.Duration:
		value, text = v.Seconds(), rounded(v).String()
	case float64:
		text = strconv.FormatFloat(v, 'f', 1, 64)
	}
	f.rows = append(f.rows, figure{name, value, text})
}

// spread adds a median, a 99th percentile and a maximum.
func (f *figures) spread(name string, all any) {
	var value map[string]any
	var text string
	switch all := all.(type) {
	case []int:
		median, p99, most := spread(all)
		total := 0
		for _, n := range all {
			total += n
		}
		value = map[string]any{"median": median, "p99": p99, "max": most, "sum": total, "of": len(all)}
		text = fmt.Sprintf("median %d, p99 %d, max %d (of %d)", median, p99, most, len(all))
	case []time.Duration:
		median, p99, most := spread(all)
		value = map[string]any{"median": median.Seconds(), "p99": p99.Seconds(), "max": most.Seconds(), "of": len(all)}
		text = fmt.Sprintf("median %s, p99 %s, max %s (of %d)", rounded(median), rounded(p99), rounded(most), len(all))
	}
	f.rows = append(f.rows, figure{name, value, text})
}

// halves adds what was highest in the first half of a run and in the second.
func (f *figures) halves(name string, first, second int64) {
	f.rows = append(f.rows, figure{name, map[string]any{"first_half": first, "second_half": second}, fmt.Sprintf("%d, %d", first, second)})
}

func rounded(d time.Duration) time.Duration {
	if d > 10*time.Second {
		return d.Round(100 * time.Millisecond)
	}
	return d.Round(time.Millisecond)
}

var notInKeys = regexp.MustCompile(`[^a-z0-9]+`)

// keyOf is a name as JSON has it: kill -9 is kill_9.
func keyOf(name string) string {
	return strings.Trim(notInKeys.ReplaceAllString(strings.ToLower(name), "_"), "_")
}

// String is the line of JSON, which begins with FIGURES, and the table.
func (f *figures) String() string {
	var table, line bytes.Buffer
	fmt.Fprintf(&table, "| %s | |\n| --- | --- |\n", f.run)
	line.WriteString(`{"run":` + strconv.Quote(f.run))
	for _, r := range f.rows {
		fmt.Fprintf(&table, "| %s | %s |\n", r.name, r.text)
		value, err := json.Marshal(r.value)
		if err != nil {
			value = []byte(strconv.Quote(err.Error()))
		}
		fmt.Fprintf(&line, ",%q:%s", keyOf(r.name), value)
	}
	return "FIGURES " + line.String() + "}\n" + table.String()
}

// publish prints figures with what every run has to say of itself.
func (f *figures) publish(t *testing.T, postgres string, began time.Time) {
	t.Helper()
	f.add("duration", time.Since(began))
	f.add("Postgres", postgres)
	f.add("walhook", commit())
	f.add("processors", runtime.NumCPU())
	f.add("race detector", raceEnabled)
	t.Log("\n" + f.String())
}

// commit is what was tested, for where it was built from a clone.
func commit() string {
	out, err := exec.Command("git", "describe", "--tags", "--always", "--dirty").Output()
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(out))
}

// vitals are the highest values seen of what must not grow, in the first half of a run and in the second.
type vitals struct {
	mu   sync.Mutex // guards what follows
	half time.Time
	peak map[string]*[2]int64
}

func (v *vitals) see(name string, value int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.peak == nil {
		v.peak = map[string]*[2]int64{}
	}
	p := v.peak[name]
	if p == nil {
		p = new([2]int64)
		v.peak[name] = p
	}
	i := 0
	if time.Now().After(v.half) {
		i = 1
	}
	p[i] = max(p[i], value)
}

// turn begins the second half of a run whose length nobody knows before.
func (v *vitals) turn() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.half = time.Now()
}

const (
	theMemory      = "RSS of a process, MiB"
	theGoroutines  = "goroutines of a process"
	theFiles       = "file descriptors of a process"
	theConnections = "connections to Postgres per process"
	theWAL         = "WAL kept by the slot, MiB"
	theLag         = "WAL not confirmed, MiB"
	theBacklog     = "rows of walhook.deliveries"
)

// beside is of what is only told: producers that outrun a machine are no fault, and in the end
// the judge wants all of it gone.
const beside = 1 << 40

// bounds are what flat means: the second half may have that much more than half as much again.
// (A run's faults are drawn by lot, and so is what each of them holds up.)
var bounds = []struct {
	name  string
	slack int64
}{
	{theMemory, 96}, {theGoroutines, 300}, {theFiles, 300}, {theConnections, 3}, {theWAL, beside}, {theLag, beside}, {theBacklog, beside},
}

// flat names what grew. It says nothing of a run of which a half is too short to tell.
func (v *vitals) flat(enough bool) (grown []string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, b := range bounds {
		if p := v.peak[b.name]; enough && p != nil && p[1] > p[0]+p[0]/2+b.slack {
			grown = append(grown, fmt.Sprintf("grown: %s: %d in the first half, %d in the second", b.name, p[0], p[1]))
		}
	}
	return grown
}

func (v *vitals) report(f *figures) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, b := range bounds {
		if p := v.peak[b.name]; p != nil {
			f.halves("highest "+b.name+" (1st, 2nd half)", p[0], p[1])
		}
	}
}

// feel looks at all that lives until ctx ends.
func (w *world) feel(ctx context.Context) {
	var conn *pgx.Conn
	defer func() {
		if conn != nil {
			_ = conn.Close(context.Background())
		}
	}()
	url := ""
	for turn := 0; wait(ctx, 500*time.Millisecond); turn++ {
		w.mu.Lock()
		var alive []*victim
		for _, v := range w.victims {
			if _, frozen := w.frozen[v]; v.alive() && !frozen {
				alive = append(alive, v)
			}
		}
		w.mu.Unlock()
		for _, v := range alive {
			v.feel(ctx, &w.vitals)
		}
		if now := w.url(); conn == nil || conn.IsClosed() || now != url {
			if conn != nil {
				_ = conn.Close(ctx)
			}
			url = now
			var err error
			if conn, err = pgx.Connect(ctx, url); err != nil {
				conn = nil
				continue
			}
		}
		w.feelPostgres(ctx, conn, turn, len(alive))
	}
}

func (w *world) feelPostgres(ctx context.Context, conn *pgx.Conn, turn, processes int) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var kept, lag, clients int64
	err := conn.QueryRow(ctx, `select coalesce((select pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) from pg_replication_slots where slot_name = 'walhook'), 0)::bigint,
		coalesce((select pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn) from pg_replication_slots where slot_name = 'walhook'), 0)::bigint,
		(select count(*) from pg_stat_activity where application_name like 'walhook%' and backend_type in ('client backend', 'walsender'))`).Scan(&kept, &lag, &clients)
	if err != nil {
		return
	}
	w.vitals.see(theWAL, kept>>20)
	w.vitals.see(theLag, lag>>20)
	// Where one of several processes is gone or frozen, some of them are not of those that we have counted.
	if processes > 0 && !w.troubled() {
		w.vitals.see(theConnections, clients/int64(processes))
	}
	if turn%10 == 0 {
		var parked int64
		if conn.QueryRow(ctx, "select count(*) from walhook.deliveries").Scan(&parked) == nil {
			w.vitals.see(theBacklog, parked)
		}
	}
}

// troubled tells that a process or a line has a harm that is not over.
func (w *world) troubled() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for v := range w.frozen {
		if v.alive() {
			return true
		}
	}
	return len(w.holes) > 0
}

var (
	addrLine      = regexp.MustCompile(`"serving health and metrics","addr":"([^"]+)"`)
	goroutineLine = regexp.MustCompile(`(?m)^go_goroutines ([0-9]+)`)
	lonely        = &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
)

// feel takes a process' measures, as far as the system and the process tell them.
func (v *victim) feel(ctx context.Context, to *vitals) {
	pid := v.cmd.Process.Pid
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid)); err == nil {
		if f := strings.Fields(string(b)); len(f) > 1 {
			pages, _ := strconv.ParseInt(f[1], 10, 64)
			to.see(theMemory, pages*int64(os.Getpagesize())>>20)
		}
	}
	if d, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid)); err == nil {
		to.see(theFiles, int64(len(d)))
	}
	if v.addr == "" {
		b, err := os.ReadFile(v.log)
		if m := addrLine.FindSubmatch(b); err == nil && m != nil {
			v.addr = string(m[1])
		}
		return
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+v.addr+"/metrics", nil)
	if err != nil {
		return
	}
	resp, err := lonely.Do(req)
	if err != nil {
		return
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	if m := goroutineLine.FindSubmatch(b); m != nil {
		n, _ := strconv.ParseInt(string(m[1]), 10, 64)
		to.see(theGoroutines, n)
	}
}

func TestFiguresAreALineOfJSONAndATable(t *testing.T) {
	t.Parallel()
	f := &figures{run: "short"}
	f.add("kill -9", 3)
	f.add("took", 1500*time.Millisecond)
	f.spread("repeats per kill -9", []int{1, 2, 9})
	f.halves("RSS", 7, 8)
	line, table, _ := strings.Cut(f.String(), "\n")
	line, isLine := strings.CutPrefix(line, "FIGURES ")
	require.True(t, isLine, line)
	require.JSONEq(t, `{"run": "short", "kill_9": 3, "took": 1.5, "repeats_per_kill_9": {"median": 2, "p99": 9, "max": 9, "sum": 12, "of": 3},
		"rss": {"first_half": 7, "second_half": 8}}`, line)
	require.Equal(t, "| short | |\n| --- | --- |\n| kill -9 | 3 |\n| took | 1.5s |\n| repeats per kill -9 | median 2, p99 9, max 9 (of 3) |\n| RSS | 7, 8 |\n", table)
}

func TestWhatGrowsInTheSecondHalfIsNamed(t *testing.T) {
	t.Parallel()
	v := &vitals{half: time.Now().Add(time.Hour)}
	v.see(theFiles, 100)
	v.see(theMemory, 100)
	v.half = time.Now()
	v.see(theFiles, 440)
	v.see(theMemory, 900)
	require.Empty(t, v.flat(false))
	grown := v.flat(true)
	require.Len(t, grown, 1)
	require.Contains(t, grown[0], theMemory)
}
