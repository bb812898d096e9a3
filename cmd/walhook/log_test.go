//go:build linux

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/walhook/walhook/sender/sendertest"
)

// sink is where a log goes: it blocks while it is shut, and fails as it is told.
type sink struct {
	mu   sync.Mutex // guards what follows; held, it blocks a write
	text bytes.Buffer
	fail func(p []byte) (int, error)
}

func (s *sink) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		n, err := s.fail(p)
		s.text.Write(p[:n])
		return n, err
	}
	return s.text.Write(p)
}

func queued(t *testing.T, to io.Writer) (*zap.Logger, *logQueue) {
	t.Helper()
	q := newLogQueue(to)
	log, err := newLogger(Log{Level: "debug", Format: "json"}, q)
	require.NoError(t, err)
	return log, q
}

type logLine struct {
	Msg   string
	N     int64
	Lines int64
}

func parseLog(t *testing.T, text string) (lines []logLine) {
	t.Helper()
	for sc := bufio.NewScanner(strings.NewReader(text)); sc.Scan(); {
		var l logLine
		if json.Unmarshal(sc.Bytes(), &l) == nil {
			lines = append(lines, l)
		}
	}
	return lines
}

func TestALogThatNobodyReadsHoldsNothingUpAndSaysWhatItLost(t *testing.T) {
	t.Parallel()
	var to sink
	log, q := queued(t, &to)
	const first = 50_000
	n := int64(0)
	say := func(count int) {
		for range count {
			n++
			log.Info("attempt failed", zap.Int64("n", n), zap.String("detail", "connection refused"))
		}
	}
	to.mu.Lock() // nobody reads
	say(first)
	require.Less(t, len(q.next.text)+len(q.now.text), logQueueBytes+1, "bytes that wait")
	require.Positive(t, q.dropped.Load())
	to.mu.Unlock()
	require.NoError(t, q.Sync())
	say(10)
	require.NoError(t, q.Sync())

	got, missing := int64(0), int64(0)
	for _, l := range parseLog(t, to.text.String()) {
		if l.Lines > 0 {
			require.Contains(t, l.Msg, "dropped")
			missing += l.Lines
			got += l.Lines
			continue
		}
		require.Equal(t, got+1, l.N, "in order, and the gap is where the line says")
		got = l.N
	}
	require.EqualValues(t, first+10, got)
	require.Equal(t, q.dropped.Load(), missing)
}

func TestALineThatCannotBeWrittenIsCountedAndSpoilsNoOther(t *testing.T) {
	t.Parallel()
	full := false
	to := sink{}
	to.fail = func(p []byte) (int, error) {
		if full {
			return min(7, len(p)), syscall.ENOSPC
		}
		return len(p), nil
	}
	log, q := queued(t, &to)
	for n := range int64(30) {
		to.mu.Lock()
		full = n >= 10 && n < 20
		to.mu.Unlock()
		log.Info("x", zap.Int64("n", n))
		require.NoError(t, q.Sync())
	}
	require.EqualValues(t, 10, q.dropped.Load())
	var got []int64
	for _, l := range parseLog(t, to.text.String()) {
		if l.Lines > 0 {
			require.EqualValues(t, 10, l.Lines)
			continue
		}
		got = append(got, l.N)
	}
	want := []int64{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29}
	require.Equal(t, want, got)
}

func TestALastWordWaitsForItsReaderAMomentAndNoLonger(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		read, write := io.Pipe()
		log, q := queued(t, write)
		begin := time.Now()
		require.Panics(t, func() { log.Panic("the end") })
		require.Equal(t, logPatience, time.Since(begin))
		require.ErrorIs(t, q.Sync(), errLogStuck)

		go func() { _, _ = io.Copy(io.Discard, read) }()
		require.NoError(t, q.Sync())
		require.NoError(t, read.Close())
		log.Info("to nobody")
		require.NoError(t, q.Sync())
		require.EqualValues(t, 1, q.dropped.Load())
	})
}

func TestALineLargerThanTheQueueIsDropped(t *testing.T) {
	t.Parallel()
	var to sink
	log, q := queued(t, &to)
	log.Info(strings.Repeat("x", logQueueBytes))
	log.Info("small", zap.Int64("n", 1))
	require.NoError(t, q.Sync())
	require.Contains(t, to.text.String(), `"lines":`)
	require.Equal(t, int64(1+1-strings.Count(to.text.String(), "small")), q.dropped.Load())
}

// pipe returns a pipe of one page.
func pipe(t *testing.T) (read, write *os.File) {
	t.Helper()
	read, write, err := os.Pipe()
	require.NoError(t, err)
	t.Cleanup(func() { read.Close(); write.Close() })
	_, _, no := syscall.Syscall(syscall.SYS_FCNTL, write.Fd(), 1031 /* F_SETPIPE_SZ */, 4096)
	require.Zero(t, no)
	return read, write
}

// startInto starts walhook with a log of level debug that goes into a file, by way of a shell
// command with the program's path as $0 and the config as $1.
func startInto(t *testing.T, stderr *os.File, shell, config string) *exec.Cmd {
	t.Helper()
	text, err := os.ReadFile(config)
	require.NoError(t, err)
	loud := filepath.Join(t.TempDir(), "loud.yaml")
	require.NoError(t, os.WriteFile(loud, append(text, "log: {level: debug}\n"...), 0o600))
	cmd := exec.Command("sh", "-c", shell, os.Args[0], loud)
	cmd.Env = append(os.Environ(), "WALHOOK_TEST_AS_PROGRAM=1")
	cmd.Stderr = stderr
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	return cmd
}

// docs/faults.md 126, 133: whatever becomes of stderr, rows arrive and the process ends when it is told.
func TestDeliveryGoesOnWhateverBecomesOfTheLog(t *testing.T) {
	t.Parallel()
	const plain = `exec "$0" run --config "$1"`
	for name, c := range map[string]struct {
		shell  string
		stderr func(t *testing.T) (into *os.File, started func() string) // the address it serves at, where that is known
	}{
		"a pipe that nobody reads": {plain, func(t *testing.T) (*os.File, func() string) {
			read, write := pipe(t)
			return write, func() string { return served(t, read) }
		}},
		"a pipe whose reader is gone": {plain, func(t *testing.T) (*os.File, func() string) {
			read, write := pipe(t)
			return write, func() string {
				write.Close()
				addr := served(t, read)
				read.Close()
				return addr
			}
		}},
		"a full disk": {plain, func(t *testing.T) (*os.File, func() string) {
			full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
			require.NoError(t, err)
			t.Cleanup(func() { full.Close() })
			return full, func() string { return "" }
		}},
		"closed from the start": {plain + " 2>&-", func(*testing.T) (*os.File, func() string) { return nil, func() string { return "" } }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
			picky := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}, Keep: 1, Respond: func(sendertest.Request) sendertest.Answer { return sendertest.Status(422) }})
			stderr, started := c.stderr(t)
			cmd := startInto(t, stderr, c.shell, b.config(endpoint("billing", rx, ""), endpoint("picky", picky, ", ordering: none")))
			addr := started()
			eventually(t, "the stream", func() bool { // of which the log cannot tell
				return b.ask(fmt.Sprintf("select count(*) from pg_replication_slots s join pg_stat_replication r on r.pid = s.active_pid where s.slot_name = '%s' and r.state = 'streaming'", b.slot)) == 1
			})
			b.produce(4, 500, 7)
			requireAll(t, rx, 2000)
			require.Zero(t, repeats(rx))
			if addr != "" {
				p := &program{t: t, addr: addr}
				dropped := regexp.MustCompile(`(?m)^walhook_log_dropped_total [1-9]`)
				eventually(t, "lines to be dropped", func() bool {
					_, metrics := p.get("/metrics")
					return dropped.MatchString(metrics)
				})
			}
			require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
			require.NoError(t, cmd.Wait(), "exit code 0, and no signal")
		})
	}
}

// served reads a log until it says where walhook serves, and no further.
func served(t *testing.T, log io.Reader) string {
	t.Helper()
	one := make([]byte, 1)
	var line []byte
	for {
		_, err := log.Read(one)
		require.NoError(t, err)
		if line = append(line, one[0]); one[0] != '\n' {
			continue
		}
		var l struct{ Msg, Addr string }
		if json.Unmarshal(line, &l) == nil && strings.HasPrefix(l.Msg, "serving health") {
			return l.Addr
		}
		line = nil
	}
}

func TestAMistakeInTheConfigEndsAlsoWhereNobodyReadsWhy(t *testing.T) {
	t.Parallel()
	_, write := pipe(t)
	_, err := write.Write(make([]byte, 4096)) // full
	require.NoError(t, err)
	cmd := exec.Command(os.Args[0], "run", "--config", filepath.Join(t.TempDir(), "none.yaml"))
	cmd.Env = append(os.Environ(), "WALHOOK_TEST_AS_PROGRAM=1")
	cmd.Stderr = write
	var exit *exec.ExitError
	require.True(t, errors.As(cmd.Run(), &exit), "it ended")
	require.Equal(t, exitUsage, exit.ExitCode(), fmt.Sprint(exit))
}
