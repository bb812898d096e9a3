package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
)

// roleFlag is followed by the name of what this process is, where it is not the bench itself.
const roleFlag = "--role"

// order is what the bench tells a role, as a line of JSON. The first one says all that it needs.
type order struct {
	Do     string       `json:"do"`
	Limit  *limitOrder  `json:"limit,omitempty"`
	Expect *expectation `json:"expect,omitempty"`
	Addr   string       `json:"addr,omitempty"` // of open: where to listen too
}

// word is what a role says, as a line of JSON.
type word struct {
	Event   string        `json:"event"`
	Addr    string        `json:"addr,omitempty"`    // of ready
	Count   int64         `json:"count,omitempty"`   // of counted
	Reached bool          `json:"reached,omitempty"` // of counted
	Begin   int64         `json:"begin,omitempty"`   // of done, Unix nanoseconds
	End     int64         `json:"end,omitempty"`     // of done
	Rows    int           `json:"rows,omitempty"`    // of done
	Result  *observations `json:"result,omitempty"`  // of result
}

// stage is a role's line to the bench.
type stage struct {
	orders *json.Decoder
	mu     sync.Mutex // guards words
	words  *json.Encoder
}

func (s *stage) say(w word) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.words.Encode(w)
}

// play is a role's whole life. It ends when its stdin does, so that none outlives the bench.
func play(ctx context.Context, role string, stdin io.Reader, stdout io.Writer) error {
	s := &stage{orders: json.NewDecoder(stdin), words: json.NewEncoder(stdout)}
	if role == roleReceiver {
		return playReceiver(s)
	}
	var first order
	if err := s.orders.Decode(&first); err != nil {
		return fmt.Errorf("%s: read order: %w", role, err)
	}
	if first.Limit == nil {
		return fmt.Errorf("%s: there is no such role, or it was told nothing", role)
	}
	if err := first.Limit.play(ctx, role, s); err != nil {
		return fmt.Errorf("%s: %w", role, err)
	}
	return s.end()
}

// await waits for the next order, whatever it is.
func (s *stage) await() error {
	var o order
	return s.orders.Decode(&o)
}

// end waits for the end of stdin: until then the bench may read what the process has used.
func (s *stage) end() error {
	for {
		if err := s.await(); err != nil {
			return nil //nolint:nilerr // the end
		}
	}
}

// player is a role as the bench sees it.
type player struct {
	*process
	orders *json.Encoder
	stdin  io.Closer
	words  chan word
}

// cast starts this program in a role.
func (l *lab) cast(role string, first *order) (*player, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, roleFlag, role)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	// Not StdoutPipe, which Wait would close under its reader.
	stdout, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd.Stdout = write
	cmd.Stderr = os.Stderr
	p := &player{orders: json.NewEncoder(stdin), stdin: stdin, words: make(chan word, 16)}
	p.process, err = start(filepath.Base(role), cmd)
	write.Close()
	if err != nil {
		stdout.Close()
		return nil, err
	}
	go func() {
		defer stdout.Close()
		defer close(p.words)
		for dec := json.NewDecoder(stdout); ; {
			var w word
			if dec.Decode(&w) != nil {
				return
			}
			p.words <- w
		}
	}()
	if first != nil {
		if err := p.orders.Encode(first); err != nil {
			return nil, fmt.Errorf("%s: %w", role, err)
		}
	}
	return p, nil
}

func (p *player) tell(o order) error {
	if err := p.orders.Encode(o); err != nil {
		return fmt.Errorf("tell %s to %s: %w", p.name, o.Do, err)
	}
	return nil
}

// hear waits for a word, past all others.
func (p *player) hear(ctx context.Context, event string) (word, error) {
	for {
		select {
		case <-ctx.Done():
			return word{}, fmt.Errorf("wait for %s of %s: %w", event, p.name, context.Cause(ctx))
		case w, ok := <-p.words:
			if !ok {
				return word{}, fmt.Errorf("%s ended before it was %s", p.name, event)
			}
			if w.Event == event {
				return w, nil
			}
		}
	}
}

// leave ends the role and waits for it.
func (p *player) leave() error {
	_ = p.stdin.Close()
	go func() { //nolint:revive // until the pipe ends
		for range p.words {
		}
	}()
	return p.wait()
}
