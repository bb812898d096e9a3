//go:build unix

package main

import (
	"os"
	"os/exec"
	"syscall"
)

// apart puts what cmd starts in a process group of its own, so that Ctrl-C reaches the bench
// alone, which then ends what it started.
func apart(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }

// peakInAll is the most resident memory of a process that has ended, in bytes.
func peakInAll(state *os.ProcessState) int64 {
	if r, ok := state.SysUsage().(*syscall.Rusage); ok {
		return int64(r.Maxrss) * maxrssUnit
	}
	return 0
}
