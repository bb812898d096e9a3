package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// process is something measured: walhook, a limit, the receiver.
type process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // how, once done is closed
}

// start runs cmd.
func start(name string, cmd *exec.Cmd) (*process, error) {
	apart(cmd)
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p := &process{name: name, cmd: cmd, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// stopPatience is longer than walhook's grace period.
const stopPatience = 20 * time.Second

// stop asks the process to end and waits until it has.
func (p *process) stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop %s: %w", p.name, err)
	}
	return p.wait()
}

func (p *process) wait() error {
	select {
	case <-p.done:
	case <-time.After(stopPatience):
		_ = p.cmd.Process.Kill()
		<-p.done
		return fmt.Errorf("stop %s: it had to be killed after %s", p.name, stopPatience)
	}
	if p.err != nil {
		return fmt.Errorf("%s: %w", p.name, p.err)
	}
	return nil
}

// kill is for a bench that ends early.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

func (p *process) ended() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s ended: %w", p.name, errors.Join(errors.New("too early"), p.err))
	default:
		return nil
	}
}

// usage is what a process has used since its start.
type usage struct {
	cpu      time.Duration // user and system
	peak     int64         // resident bytes at most
	resident int64         // bytes now
}

// used is the usage now, or, where the system does not tell of others, known false.
func (p *process) used() (u usage, known bool) { return processUsage(p.cmd.Process.Pid) }

// usedInAll is the usage of a process that has ended.
func (p *process) usedInAll() usage {
	state := p.cmd.ProcessState
	return usage{cpu: state.UserTime() + state.SystemTime(), peak: peakInAll(state)}
}

// cpuEach is the CPU time of one of n things, in microseconds.
func (u usage) cpuEach(n int) float64 {
	if n == 0 {
		return math.NaN()
	}
	return float64(u.cpu.Microseconds()) / float64(n)
}

// eventually asks every few milliseconds until the answer is yes, an error, or ctx ends.
func eventually(ctx context.Context, what string, done func() (bool, error)) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, err := done()
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, context.Cause(ctx))
		case <-tick.C:
		}
	}
}
