package sender

import (
	"context"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
)

const (
	// roomWait is how long an attempt waits for its place, before it is held instead.
	roomWait = time.Second
	// shortageHold is how long to hold a delivery for want of something on this host.
	shortageHold = time.Second
	// shortageOver is how long nothing must have been missing for a shortage to be over.
	shortageOver = 10 * time.Second
)

// room is what this host has for all endpoints together: places for attempts in flight, and
// connections. It is bounded below the process' descriptors, since one that runs out of those
// cannot reach Postgres either, nor say so on /readyz.
//
// An endpoint may have as many attempts in flight as there are places free. So one that is
// alone has half of them, one that comes to others half of what they left, in time all of k the
// same part of k+1, and those that hang cannot have them all.
type room struct {
	places int // for attempts in flight; zero is no bound
	conns  int // open ones, at which idle ones are closed; zero is no bound
	log    *zap.Logger
	missed prometheus.Counter

	mu     sync.Mutex // guards what follows, and every share
	flying int
	open   int
	queue  []*share  // those that wait, in turn
	short  time.Time // since when something is short; zero while nothing is
	last   time.Time // that something was
}

// share is one endpoint's part of the room.
type share struct {
	flying  int
	waiting []chan struct{} // each closed when its place is there
}

// enter takes a place for an attempt. It waits a moment for one, and tells false where none
// became free; leave gives it back.
func (r *room) enter(ctx context.Context, s *share) bool {
	if r.places == 0 {
		return true
	}
	r.mu.Lock()
	if len(s.waiting) == 0 && r.fits(s) {
		r.give(s)
		r.mu.Unlock()
		return true
	}
	place := make(chan struct{})
	if s.waiting = append(s.waiting, place); len(s.waiting) == 1 {
		r.queue = append(r.queue, s)
	}
	r.mu.Unlock()

	timer := time.NewTimer(roomWait)
	defer timer.Stop()
	select {
	case <-place:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.Index(s.waiting, place)
	if i < 0 { // it was given this moment
		return true
	}
	if s.waiting = slices.Delete(s.waiting, i, i+1); len(s.waiting) == 0 {
		r.queue = slices.DeleteFunc(r.queue, func(q *share) bool { return q == s })
	}
	return false
}

func (r *room) leave(s *share) {
	if r.places == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	s.flying--
	r.flying--
	for i := 0; i < len(r.queue) && r.flying < r.places; {
		next := r.queue[i]
		if !r.fits(next) {
			i++
			continue
		}
		r.give(next)
		close(next.waiting[0])
		next.waiting = next.waiting[1:]
		r.queue = slices.Delete(r.queue, i, i+1)
		if len(next.waiting) > 0 {
			r.queue = append(r.queue, next)
		}
	}
}

// fits tells whether an endpoint may have one more. r.mu is held.
func (r *room) fits(s *share) bool { return s.flying < r.places-r.flying }

// give counts a place as taken. r.mu is held.
func (r *room) give(s *share) {
	s.flying++
	r.flying++
}

type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// counting returns dial with its connections counted. At the bound, free is called first: to
// close what is idle.
func (r *room) counting(dial dialFunc, free func()) dialFunc {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		r.mu.Lock()
		full := r.conns > 0 && r.open >= r.conns
		r.mu.Unlock()
		if full {
			free()
		}
		conn, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		r.mu.Lock()
		r.open++
		r.enough(time.Now())
		r.mu.Unlock()
		return &countedConn{Conn: conn, room: r}, nil
	}
}

type countedConn struct {
	net.Conn
	room   *room
	closed sync.Once
}

func (c *countedConn) Close() error {
	c.closed.Do(func() {
		c.room.mu.Lock()
		c.room.open--
		c.room.mu.Unlock()
	})
	return c.Conn.Close()
}

// missing notes that an attempt had to be put off. It is said once for each time of shortage.
func (r *room) missing(what string) {
	r.missed.Inc()
	now := time.Now()
	r.mu.Lock()
	first := r.short.IsZero()
	if first {
		r.short = now
	}
	r.last = now
	r.mu.Unlock()
	if first {
		r.log.Warn("this host is short of what connections need: attempts are put off, none is spent", zap.String("missing", what))
	}
}

// enough notes that a connection was made. r.mu is held.
func (r *room) enough(now time.Time) {
	if r.short.IsZero() || now.Sub(r.last) < shortageOver {
		return
	}
	r.log.Info("this host has again what connections need", zap.Duration("short_for", r.last.Sub(r.short)))
	r.short = time.Time{}
}
