package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walhook/walhook/cdc/pgtest"
)

// serverSettings are those of Postgres that bear on the figures; doc.go says why.
var serverSettings = map[string]string{
	"shared_buffers":     "256MB",
	"max_wal_size":       "16GB", // no checkpoint in a measurement
	"checkpoint_timeout": "1h",
	"autovacuum":         "off",
	"max_connections":    "200",
	"log_min_messages":   "fatal",
	"log_line_prefix":    "%a: ", // scenario 10 tells walhook's statements by it
}

// lab is where everything is measured: one Postgres, one receiver.
type lab struct {
	options  options
	progress io.Writer
	report   *Report
	server   *pgtest.Server
	receiver *player
	addr     string // of the receiver
	dir      string
	program  string // walhook
	nextID   int64  // of the next event; never used twice
	made     int    // databases
	running  []*process
	outages  []*outage // of scenario 6, for 7
}

func openLab(ctx context.Context, o options, progress io.Writer) (*lab, error) {
	l := &lab{options: o, progress: progress, nextID: 1, report: &Report{Began: time.Now(), Machine: machine(), Args: o.telling}}
	if err := l.open(ctx); err != nil {
		return nil, errors.Join(err, l.close())
	}
	return l, nil
}

func (l *lab) open(ctx context.Context) (err error) {
	if l.dir, err = os.MkdirTemp("", "walhook-bench-"); err != nil {
		return err
	}
	if err := l.findProgram(ctx); err != nil {
		return err
	}
	settings := maps.Clone(serverSettings)
	settings["fsync"] = map[bool]string{true: "on", false: "off"}[l.options.fsync]
	if l.server, err = pgtest.Start(ctx, pgtest.Config{Settings: settings}); err != nil {
		return err
	}
	var said []string
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		said = append(said, name+"="+settings[name])
	}
	l.report.Settings = strings.Join(said, " ")
	if l.receiver, err = l.cast(roleReceiver, nil); err != nil {
		return err
	}
	l.running = append(l.running, l.receiver.process)
	ready, err := l.receiver.hear(ctx, "ready")
	if err != nil {
		return err
	}
	l.addr = ready.Addr
	conn, err := pgx.Connect(ctx, l.server.URL())
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	l.report.Postgres = conn.PgConn().ParameterStatus("server_version")
	// What comes first would else pay for the first touch of each shared buffer and each WAL segment.
	for _, sql := range []string{
		"create table warm (n int, content text)",
		"insert into warm select n, repeat(md5(n::text), 30) from generate_series(1, 400000) n",
		"drop table warm",
		"checkpoint",
	} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return fmt.Errorf("warm the server up: %w", err)
		}
	}
	return nil
}

// findProgram looks at the walhook that is measured, or builds one that writes profiles.
func (l *lab) findProgram(ctx context.Context) error {
	l.program = l.options.walhook
	if l.options.profile != "" {
		dir, err := filepath.Abs(l.options.profile)
		if err != nil {
			return err
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		l.options.profile = dir
		l.program = filepath.Join(dir, "walhook")
		build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-tags", "bench_profile", "-o", l.program, "./cmd/walhook")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("build walhook for profiles (from the module's directory): %w: %s", err, out)
		}
	}
	version, err := exec.CommandContext(ctx, l.program, "version").Output()
	if err != nil {
		return fmt.Errorf("%s: %w", l.program, err)
	}
	l.report.Walhook = strings.TrimSpace(string(version))
	return nil
}

// close ends all that the lab has started.
func (l *lab) close() (err error) {
	for _, p := range l.running {
		p.kill()
	}
	if l.server != nil {
		err = l.server.Close()
	}
	if l.options.keep {
		fmt.Fprintf(l.progress, "logs and configurations are in %s\n", l.dir)
		return err
	}
	return errors.Join(err, os.RemoveAll(l.dir))
}

// wants tells whether a scenario is to be run.
func (l *lab) wants(scenario int) bool {
	return len(l.options.only) == 0 || slices.Contains(l.options.only, scenario)
}

// rows is a number of rows at the chosen scale.
func (l *lab) rows(full int) int { return max(1, int(float64(full)*l.options.scale)) }

// span is a duration at the chosen scale.
func (l *lab) span(full time.Duration) time.Duration {
	return max(time.Second, time.Duration(float64(full)*l.options.scale))
}

func (l *lab) say(format string, a ...any) { fmt.Fprintf(l.progress, "  "+format+"\n", a...) }

// expect has the receiver forget what it saw.
func (l *lab) expect(ctx context.Context, e expectation) error {
	if err := l.receiver.tell(order{Do: "expect", Expect: &e}); err != nil {
		return err
	}
	_, err := l.receiver.hear(ctx, "expecting")
	return err
}

// takeIDs gives out ids of n events.
func (l *lab) takeIDs(n int) (first int64) {
	first = l.nextID
	l.nextID += int64(n)
	return first
}

// stalled is how long nothing new may arrive before the rest counts as lost.
const stalled = 30 * time.Second

// reached waits until the receiver has seen all that it expects.
func (l *lab) reached(ctx context.Context, watch ...*process) error {
	var before int64 = -1
	for {
		err := l.reachedWithin(ctx, stalled, watch)
		if !errors.Is(err, errStalled) {
			return err
		}
		if err := l.receiver.tell(order{Do: "count"}); err != nil {
			return err
		}
		w, err := l.receiver.hear(ctx, "counted")
		switch {
		case err != nil || w.Reached:
			return err
		case w.Count == before:
			return fmt.Errorf("nothing new has arrived for %s, after %d deliveries", stalled, before)
		}
		before = w.Count
	}
}

var errStalled = errors.New("not yet")

func (l *lab) reachedWithin(ctx context.Context, patience time.Duration, watch []*process) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errStalled)
	defer cancel()
	for _, p := range watch {
		stop := make(chan struct{})
		defer close(stop)
		ctx2, end := context.WithCancelCause(ctx)
		defer end(nil)
		go func() {
			select {
			case <-p.done:
				end(fmt.Errorf("%s ended too early: %w", p.name, p.err))
			case <-stop:
			}
		}()
		ctx = ctx2
	}
	_, err := l.receiver.hear(ctx, "reached")
	return err
}

// result is what the receiver has seen since expect.
func (l *lab) result(ctx context.Context) (*observations, error) {
	if err := l.receiver.tell(order{Do: "result"}); err != nil {
		return nil, err
	}
	w, err := l.receiver.hear(ctx, "result")
	if err != nil {
		return nil, err
	}
	return w.Result, nil
}

// wrong tells what was lost, repeated, invented, out of order or unsigned.
func (o *observations) wrong(target int64) error {
	lost := target - o.Distinct
	if lost == 0 && o.Repeated+o.Invented+o.Overtaken+o.Unsigned == 0 {
		return nil
	}
	return fmt.Errorf("of %d deliveries %d were lost, %d repeated, %d invented, %d out of order, %d wrongly signed",
		target, lost, o.Repeated, o.Invented, o.Overtaken, o.Unsigned)
}

// span is from the first receipt to the last.
func (o *observations) span() time.Duration { return time.Duration(o.End - o.Begin) }

// rate is deliveries in a second.
func (o *observations) rate() float64 { return perSecond(int(o.Distinct-1), o.span()) }

// latencies are those from the commit to the receipt in each step of the run, sorted.
func (o *observations) latencies(step time.Duration) (steps [][]int64) {
	for i, at := range o.At {
		n := max(0, int((at-o.Begin)/int64(step))) // the clock may be set back
		for len(steps) <= n {
			steps = append(steps, nil)
		}
		steps[n] = append(steps[n], o.FromCommit[i])
	}
	for _, all := range steps {
		slices.Sort(all)
	}
	return steps
}

// usualP99 is the median, in milliseconds, of the p99 of each second: a machine that stands still once in a run is in one of them.
func (o *observations) usualP99() float64 {
	var each []float64
	for _, all := range o.latencies(time.Second) {
		if p99, ok := percentile(all, 0.99); ok {
			each = append(each, milliseconds(time.Duration(p99)))
		}
	}
	return median(each)
}
