//go:build linux

package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/sender/sendertest"
)

func TestLimitsLeaveRoomForAllButSending(t *testing.T) {
	t.Parallel()
	for descriptors := 4; descriptors < 3000; descriptors++ {
		l := limitsOf(descriptors)
		require.Positive(t, l.attempts)
		require.Positive(t, l.idle)
		require.LessOrEqual(t, descriptorsPerAttempt*l.attempts+min(ownDescriptors, descriptors/2), descriptors+2, descriptors)
	}
	require.Equal(t, limits{descriptors: 1024, attempts: 320, idle: 320}, limitsOf(1024))
	require.Equal(t, limits{descriptors: 1 << 20, attempts: 349504, idle: mostIdle}, limitsOf(1<<20))
	require.Equal(t, limits{idle: mostIdle}, limitsOf(0))
	require.Positive(t, hostLimits().descriptors)
}

func TestLimitsAreSaidOnceAndWarnedOfWhereTheyAreLow(t *testing.T) {
	t.Parallel()
	endpoints := func(n, concurrency int) []*outbox.Endpoint {
		all := make([]*outbox.Endpoint, n)
		for i := range all {
			e := outbox.DefaultEndpoint()
			e.Concurrency = concurrency
			all[i] = &e
		}
		return all
	}
	for name, c := range map[string]struct {
		descriptors int
		endpoints   []*outbox.Endpoint
		sensible    int // zero: no warning
	}{
		"a few":          {1024, endpoints(5, 64), 0},
		"some":           {1024, endpoints(10, 64), 1984},
		"many":           {1024, endpoints(500, 64), 3064},
		"very many":      {4096, endpoints(10_000, 64), 30064},
		"a usual server": {1 << 20, endpoints(10_000, 64), 0},
		"one at a time":  {256, endpoints(60, 1), 0},
	} {
		core, logs := observer.New(zap.InfoLevel)
		limitsOf(c.descriptors).say(zap.New(core), c.endpoints)
		require.Equal(t, 1, logs.Len(), name)
		line := logs.All()[0]
		require.EqualValues(t, c.descriptors, line.ContextMap()["limit"], name)
		if c.sensible == 0 {
			require.Equal(t, zap.InfoLevel, line.Level, name)
			continue
		}
		require.Equal(t, zap.WarnLevel, line.Level, name)
		require.EqualValues(t, c.sensible, line.ContextMap()["sensible_limit"], name)
		require.GreaterOrEqual(t, limitsOf(c.sensible).attempts, attemptsWanted(c.endpoints), name)
	}
}

// startBy starts walhook by way of a shell command, with the program's path as $0 and the config as $1.
func startBy(t *testing.T, shell, config string, change ...func(*exec.Cmd)) *program {
	t.Helper()
	p := &program{t: t, log: &logBuffer{changed: make(chan struct{})}}
	p.cmd = exec.Command("sh", "-c", shell, os.Args[0], config)
	p.cmd.Env = append(os.Environ(), "WALHOOK_TEST_AS_PROGRAM=1")
	p.cmd.Stderr = p.log
	for _, f := range change {
		f(p.cmd)
	}
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
	line := p.log.line(t, "serving health")
	_, addr, _ := strings.Cut(line, `"addr":"`)
	p.addr, _, _ = strings.Cut(addr, `"`)
	return p.streaming()
}

// docs/faults.md 102, 125, 134: four hundred endpoints, each on an address of its own, with 256 descriptors.
func TestTheCollectorKnowsTheContainersMemory(t *testing.T) {
	before := debug.SetMemoryLimit(-1)
	t.Cleanup(func() { debug.SetMemoryLimit(before) })
	container := func() (uint64, error) { return 1000 << 20, nil }
	keepWithinMemory(zap.NewNop(), container)
	require.EqualValues(t, 800<<20, debug.SetMemoryLimit(-1))

	t.Setenv("GOMEMLIMIT", "123MiB") // which the runtime has read by itself
	debug.SetMemoryLimit(123 << 20)
	keepWithinMemory(zap.NewNop(), container)
	require.EqualValues(t, 123<<20, debug.SetMemoryLimit(-1))

	require.NoError(t, os.Unsetenv("GOMEMLIMIT"))
	keepWithinMemory(zap.NewNop(), func() (uint64, error) { return 0, memlimit.ErrNoCgroup })
	require.EqualValues(t, 123<<20, debug.SetMemoryLimit(-1), "a host without cgroups changes nothing")
}

func TestFewDescriptorsAreEnoughForManyEndpoints(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := sendertest.New(t, sendertest.Config{Addr: "0.0.0.0:0", Secrets: []string{testSecret}})
	_, port, err := net.SplitHostPort(rx.Addr())
	require.NoError(t, err)
	const endpoints, rows = 400, 20
	all := make([]string, endpoints)
	for i := range all {
		all[i] = fmt.Sprintf("{id: e%d, url: \"http://127.0.%d.%d:%s/e%d\", secrets: [%q]}", i, 1+i/200, 1+i%200, port, i, testSecret)
	}
	p := startBy(t, `ulimit -n 256; exec "$0" run --config "$1"`, b.config(all...))
	p.log.line(t, `"level":"warn"`, "few file descriptors", `"limit":256`)
	b.produce(1, rows, 7)
	requireAtLeast(t, rx, endpoints*rows)
	eventually(t, "the last one to have its answer", func() bool { return len(succeeded(rx)) >= endpoints*rows })
	seen := map[string]int{}
	for _, q := range succeeded(rx) {
		seen[q.Path+" "+q.ID]++
		require.Equal(t, 1, q.Attempt)
	}
	require.Len(t, seen, endpoints*rows)
	for what, times := range seen {
		require.Equal(t, 1, times, what)
	}
	eventually(t, "nothing to be parked", func() bool { return b.ask("select count(*) from walhook.deliveries") == 0 })
	_, metrics := p.get("/metrics")
	require.NotRegexp(t, `(?m)^walhook_breaker_state\{[^}]*\} [12]`, metrics)
	p.stop()
	require.NotContains(t, p.log.String(), "too many open files")
	require.NotContains(t, p.log.String(), "attempt failed")
}

// limitDescriptors sets the soft limit of a process that runs, and returns what it was.
func limitDescriptors(t *testing.T, pid int, soft uint64) (was uint64) {
	t.Helper()
	var old syscall.Rlimit
	prlimit := func(set, get *syscall.Rlimit) {
		_, _, no := syscall.RawSyscall6(syscall.SYS_PRLIMIT64, uintptr(pid), syscall.RLIMIT_NOFILE,
			uintptr(unsafe.Pointer(set)), uintptr(unsafe.Pointer(get)), 0, 0)
		require.Zero(t, no)
	}
	prlimit(nil, &old)
	prlimit(&syscall.Rlimit{Cur: soft, Max: old.Max}, nil)
	return old.Cur
}

// docs/faults.md 125: somebody else ate the descriptors, so each dial fails at once.
func TestAHostWithoutDescriptorsSpendsNoAttempt(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	var receivers []*sendertest.Receiver
	var all []string
	for i := range 5 {
		receivers = append(receivers, sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}}))
		all = append(all, endpoint(fmt.Sprint("e", i), receivers[i], ""))
	}
	p := startBy(t, `exec "$0" run --config "$1"`, b.config(all...))
	pid := p.cmd.Process.Pid
	was := limitDescriptors(t, pid, 1)
	b.produce(1, 100, 7)
	p.log.line(t, `"level":"warn"`, "this host is short", "too many open files")
	eventually(t, "everything to be parked", func() bool { return b.ask("select count(*) from walhook.deliveries") == 500 })
	require.Zero(t, b.ask("select count(*) from walhook.deliveries where state = 'dead' or attempts > 0"))
	require.Positive(t, b.ask("select count(*) from walhook.deliveries where reason = 'shortage'"))
	require.Zero(t, b.ask("select count(*) from walhook.deliveries where reason = 'breaker_open'"))
	for _, rx := range receivers {
		require.Zero(t, rx.Count())
	}
	limitDescriptors(t, pid, was)
	for _, rx := range receivers {
		requireAll(t, rx, 100)
		require.Zero(t, repeats(rx))
		for _, q := range rx.Requests() {
			require.Equal(t, 1, q.Attempt)
		}
	}
	p.stop()
	require.NotContains(t, p.log.String(), "circuit open")
	require.NotContains(t, p.log.String(), "attempt failed")
	require.Equal(t, 1, strings.Count(p.log.String(), "this host is short"), "said once")
}

// docs/faults.md 134: no HOME, no entry in passwd, nowhere to write, not a byte of a file written.
func TestItNeedsNoHomeNoNameAndNoFileOfItsOwn(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	config := b.config(endpoint("billing", rx, ""))
	run := `ulimit -f 0; exec "$0" run --config "$1"`
	p := startBy(t, run, config, func(cmd *exec.Cmd) {
		cmd.Env = []string{"WALHOOK_TEST_AS_PROGRAM=1", "TMPDIR=/nowhere"}
		cmd.Dir = "/"
		if os.Getuid() != 0 {
			return
		}
		// Whoever we are now reaches the program and its config only in a place open to all.
		open, err := os.MkdirTemp("", "walhook")
		require.NoError(t, err)
		t.Cleanup(func() { os.RemoveAll(open) })
		require.NoError(t, os.Chmod(open, 0o755))
		for i, from := range []string{os.Args[0], config} {
			bytes, err := os.ReadFile(from)
			require.NoError(t, err)
			to := filepath.Join(open, filepath.Base(from))
			require.NoError(t, os.WriteFile(to, bytes, 0o755))
			cmd.Args[3+i] = to
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 54321, Gid: 54321, NoSetGroups: true}}
	})
	b.produce(2, 100, 7)
	requireAll(t, rx, 200)
	p.stop()
}
