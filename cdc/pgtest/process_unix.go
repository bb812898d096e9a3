//go:build unix

package pgtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// owner is the user that the server's processes run as; nil is the user that we are.
type owner = syscall.Credential

// unprivileged finds somebody for Postgres to run as where we are root. Postgres wants a user
// with an entry in passwd: a made-up number is not enough.
func unprivileged() (*owner, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, errUID := strconv.ParseInt(u.Uid, 10, 64) // macOS' nobody is -2
		gid, errGID := strconv.ParseInt(u.Gid, 10, 64)
		if errUID == nil && errGID == nil {
			return &owner{Uid: uint32(uid), Gid: uint32(gid)}, nil
		}
	}
	return nil, errors.New("no user postgres or nobody to run Postgres as, which refuses to run as root")
}

// give makes a file or directory the owner's.
func give(path string, to *owner) error {
	if to == nil {
		return nil
	}
	return os.Lchown(path, int(to.Uid), int(to.Gid))
}

// reaches tells whether the owner may pass every directory down to path, and path itself.
func reaches(path string, who *owner) bool {
	if who == nil {
		return true
	}
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return false
	}
	for {
		info, err := os.Stat(path)
		if err != nil {
			return false
		}
		mode := info.Mode().Perm()
		if stat, ok := info.Sys().(*syscall.Stat_t); ok {
			switch {
			case stat.Uid == who.Uid:
				mode >>= 6
			case stat.Gid == who.Gid:
				mode >>= 3
			}
		}
		if mode&1 == 0 {
			return false
		}
		if path == filepath.Dir(path) {
			return true
		}
		path = filepath.Dir(path)
	}
}

// spawn starts a program as the owner in a session of its own, so that a Ctrl-C at the terminal
// is ours alone to act on. Whoever spawns must reap; os/exec's Wait is not used, because it
// would need a goroutine for as long as the server runs.
func spawn(who *owner, dir string, output *os.File, path string, args ...string) (pid int, err error) {
	cmd := exec.Command(path, args...)
	cmd.Dir = dir
	cmd.Stdout, cmd.Stderr = output, output
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: who}
	// Nothing of ours: PGDATA, PGPORT and their like would change what the server does.
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "TMPDIR=" + dir, "LC_ALL=C"}
	if libs := os.Getenv("LD_LIBRARY_PATH"); libs != "" {
		cmd.Env = append(cmd.Env, "LD_LIBRARY_PATH="+libs)
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	pid = cmd.Process.Pid
	return pid, cmd.Process.Release()
}

// reap tells, without waiting, whether a process that we spawned has ended, and then how.
func reap(pid int) (ended bool, how error) {
	var status syscall.WaitStatus
	for {
		got, err := syscall.Wait4(pid, &status, syscall.WNOHANG, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return true, fmt.Errorf("wait for process %d: %w", pid, err)
		case got == 0:
			return false, nil
		case status.Signaled():
			return true, fmt.Errorf("ended by %s", status.Signal())
		case status.ExitStatus() != 0:
			return true, fmt.Errorf("ended with exit code %d", status.ExitStatus())
		default:
			return true, nil
		}
	}
}

// signals are those by which Postgres knows how to stop.
var signals = map[Mode]syscall.Signal{Smart: syscall.SIGTERM, Fast: syscall.SIGINT, Immediate: syscall.SIGQUIT}

func signalStop(pid int, mode Mode) error { return syscall.Kill(pid, signals[mode]) }
func signalReload(pid int) error          { return syscall.Kill(pid, syscall.SIGHUP) }

// killTree kills a server process and all its children at one stroke. It is held still first,
// so that it can neither start a child nor see one die; its own end is still to be reaped.
func killTree(pid int) error {
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		return err
	}
	children, err := childrenOf(pid)
	for _, p := range append(children, pid) {
		_ = syscall.Kill(p, syscall.SIGKILL)
	}
	if err != nil {
		return err
	}
	deadline := time.NewTimer(5 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for _, p := range children {
		for syscall.Kill(p, 0) == nil && !zombie(p) {
			select {
			case <-tick.C:
			case <-deadline.C:
				return fmt.Errorf("process %d is still there after SIGKILL", p)
			}
		}
	}
	return nil
}

func childrenOf(parent int) ([]int, error) {
	if list, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", parent)); err == nil {
		var pids []int
		for _, field := range strings.Fields(string(list)) {
			if pid, err := strconv.Atoi(field); err == nil {
				pids = append(pids, pid)
			}
		}
		return pids, nil
	}
	out, err := exec.Command("ps", "-A", "-o", "pid=,ppid=").Output()
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for line := range strings.Lines(string(out)) {
		var pid, ppid int
		if _, err := fmt.Sscan(line, &pid, &ppid); err == nil && ppid == parent {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// zombie tells of a dead process that its new parent has not reaped, as happens in containers
// whose first process is no init. Only Linux is asked.
func zombie(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return errors.Is(err, fs.ErrNotExist) && pathExists("/proc/self")
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return strings.HasPrefix(rest, "Z")
}

func pathExists(path string) bool { _, err := os.Stat(path); return err == nil }

// removeSharedMemory frees the small System V segment by which Postgres knows of a server on
// the same data; only a killed server leaves it behind. Best effort: it is a few bytes.
func removeSharedMemory(pidFile []byte) {
	if lines := strings.Split(string(pidFile), "\n"); len(lines) > 6 {
		if ids := strings.Fields(lines[6]); len(ids) == 2 {
			_ = exec.Command("ipcrm", "-m", ids[1]).Run()
		}
	}
}

// watchdog clears up after a process that ended without a Close, however it ended: a shell that
// reads our pipe, which closes with us. Each line it reads is the process to end then, 0 is none.
// (Linux' Pdeathsig would leave the directory, is bound to a thread, and is Linux' alone.)
type watchdog struct {
	pid  int
	pipe *os.File
}

const watchdogScript = `
while read -r line; do pid=$line; done
if [ "${pid:-0}" -gt 0 ]; then
	kill -QUIT "$pid"
	n=0
	while [ $n -lt 50 ] && kill -0 "$pid" 2>/dev/null; do sleep 0.1; n=$((n+1)); done
	kill -KILL "$pid"
fi
rm -rf -- "$1"
`

// startWatchdog runs as we ourselves do, not as the owner: so it may end and remove all that we may.
func startWatchdog(dir string) (*watchdog, error) {
	read, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer read.Close()
	cmd := exec.Command("/bin/sh", "-c", watchdogScript, "pgtest-watchdog", dir)
	cmd.Dir = "/"
	cmd.Stdin = read
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		write.Close()
		return nil, err
	}
	pid := cmd.Process.Pid
	return &watchdog{pid, write}, cmd.Process.Release()
}

func (w *watchdog) watch(pid int) error {
	_, err := io.WriteString(w.pipe, strconv.Itoa(pid)+"\n")
	return err
}

// close returns when the watchdog has ended, and so has removed the directory.
func (w *watchdog) close() error {
	err := w.pipe.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return errors.Join(err, await(ctx, func() bool { ended, _ := reap(w.pid); return ended }))
}
