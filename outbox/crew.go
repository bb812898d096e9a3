package outbox

import (
	"context"
	"runtime"
	sched "runtime/metrics"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// quickAttempt is how long an attempt may take and still be one that the machine is at work on. From then on it
	// waits for its receiver, or up to lineAttempt for a connection that others of its host have, or for the machine.
	quickAttempt = 2 * time.Millisecond
	lineAttempt  = 5 * quickAttempt
	// withReceiver is how long after its beginning an attempt is with its receiver rather than with us.
	withReceiver = time.Millisecond
	// mostAtRest is how many goroutines wait for the next attempt, of whatever lane.
	mostAtRest = 128
)

// crew are the goroutines that attempts run in. A new one would begin with a small stack, and grow it in each
// attempt anew: where there are thousands of lanes with an event now and then, that costs as much as the request.
//
// As many attempts as the machine can be at work on begin within quickAttempt, and the others wait for one of those
// goroutines: a thousand that run at once get no more done, and each finds the caches cold and the connections taken. One
// that waits for its receiver gives its place away after that time, and one that waits for a connection, or for a processor, a
// little later: more of them would only make that line longer. The only attempt of its lane comes before all others, so that
// it does not wait behind the many of an endpoint that hangs.
type crew struct {
	most    int // attempts that began within quickAttempt
	run     func(job, *hand)
	starved func() bool // more goroutines could run than there are processors for

	mu     sync.Mutex  // guards what follows
	alone  line[job]   // that wait for somebody, each its lane's only one
	queue  line[job]   // the others
	rest   []*hand     // those who wait for a job
	quick  int         // attempts of late that have not ended
	late   line[stint] // the beginnings of late, in the order of their look; some have ended
	timer  *time.Timer
	closed bool
	latest time.Time     // beginning of an attempt
	lull   chan struct{} // closed at the next lull; nil while nobody waits for one

	handing atomic.Bool // an event is being given to its lanes
	wanted  atomic.Bool // lull is not nil
}

// job is an attempt that was taken from its lane, with the settings it was taken with, and whatever the lane has ready when
// that has ended.
type job struct {
	lane  *Lane
	it    *item
	ep    *Endpoint
	alone bool // the lane has no other under way
}

// hand is one of the goroutines.
type hand struct {
	jobs   chan job
	turn   uint64      // counts beginnings and ends
	slow   bool        // the attempt under way is none of late
	inLine atomic.Bool // it waits for a connection
}

// stint is the beginning of an attempt, which is under way while turn is its hand's.
type stint struct {
	hand  *hand
	turn  uint64
	began time.Time
	look  time.Time // when to see whether it still is
}

// newCrew makes a crew whose hands go home when ctx ends.
func newCrew(ctx context.Context) *crew {
	c := &crew{
		most:    max(64, 32*runtime.GOMAXPROCS(0)),
		run:     func(j job, h *hand) { j.lane.work(j.it, j.ep, &h.inLine) },
		starved: starved,
	}
	context.AfterFunc(ctx, c.close)
	return c
}

// starved reads one number of the runtime, in a tenth of a microsecond.
func starved() bool {
	runnable := []sched.Sample{{Name: "/sched/goroutines/runnable:goroutines"}}
	sched.Read(runnable)
	return runnable[0].Value.Kind() == sched.KindUint64 && runnable[0].Value.Uint64() > 2*uint64(runtime.GOMAXPROCS(0))
}

// do has somebody do it, and does not wait for that.
func (c *crew) do(j job) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if j.alone {
		c.alone.push(j)
	} else {
		c.queue.push(j)
	}
	c.look(time.Now())
}

// look gives what waits to those who may begin. It is called with mu locked.
func (c *crew) look(now time.Time) {
	for c.waiting() && c.mayBegin(now) {
		var h *hand
		if n := len(c.rest); n > 0 {
			h, c.rest = c.rest[n-1], c.rest[:n-1]
		} else {
			h = &hand{jobs: make(chan job, 1)}
			go c.work(h)
		}
		h.jobs <- c.begin(h, now)
	}
	if !c.waiting() || c.timer != nil {
		return
	}
	c.timer = time.AfterFunc(c.late.first().look.Sub(now), func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.timer = nil
		c.look(time.Now())
	})
}

func (c *crew) waiting() bool { return c.alone.len() > 0 || c.queue.len() > 0 }

// mayBegin tells whether fewer attempts than most are of late.
func (c *crew) mayBegin(now time.Time) bool {
	c.sift(now)
	return c.quick < c.most
}

// sift finds out which attempts are none of late any more.
func (c *crew) sift(now time.Time) {
	for c.late.len() > 0 {
		s := c.late.first()
		if s.turn == s.hand.turn && now.Before(s.look) {
			break
		}
		c.late.pop()
		switch {
		case s.turn != s.hand.turn:
		case now.Sub(s.began) < lineAttempt && (s.hand.inLine.Load() || c.starved()):
			s.look = now.Add(quickAttempt)
			c.late.push(s)
		default:
			s.hand.slow = true
			c.quick--
		}
	}
}

// begin takes the next job for a hand.
func (c *crew) begin(h *hand, now time.Time) job {
	from := &c.alone
	if from.len() == 0 {
		from = &c.queue
	}
	j := from.pop()
	h.turn++
	h.slow = false
	c.quick++
	c.latest = now
	c.late.push(stint{h, h.turn, now, now.Add(quickAttempt)})
	return j
}

func (c *crew) end(h *hand) {
	h.turn++
	if !h.slow {
		c.quick--
	}
}

func (c *crew) work(h *hand) {
	for j := range h.jobs {
		for again := true; again; {
			c.run(j, h)
			j, again = c.next(h)
		}
	}
}

// next ends a hand's attempt and gives it another one. It tells false where there is none: the hand rests.
func (c *crew) next(h *hand) (j job, more bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.end(h)
	now := time.Now()
	switch {
	case c.waiting() && c.mayBegin(now):
		return c.begin(h, now), true
	case c.closed || len(c.rest) == mostAtRest:
		close(h.jobs)
	default:
		c.rest = append(c.rest, h)
	}
	c.calm(now)
	return job{}, false
}

// nextLull is closed when next an attempt ends and leaves the machine without work: no event is being given to its lanes, no attempt
// waits for its turn, and none of late is under way but such as have been with their receivers for a while. Where events come
// now and then, that is the best moment for what is in no hurry: a while before the next one.
func (c *crew) nextLull() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lull == nil {
		c.lull = make(chan struct{})
		c.wanted.Store(true)
	}
	return c.lull
}

// calm tells who waits for a lull, if this is one. It is called with mu locked.
func (c *crew) calm(now time.Time) {
	if c.lull == nil || c.waiting() || c.handing.Load() {
		return
	}
	if c.sift(now); c.quick == 0 || now.Sub(c.latest) >= withReceiver {
		close(c.lull)
		c.lull = nil
		c.wanted.Store(false)
	}
}

// handOver gives an event to its lanes. Between two of its deliveries is no lull, however quickly the first one ends.
func (c *crew) handOver(give func()) {
	c.handing.Store(true)
	give()
	if c.handing.Store(false); c.wanted.Load() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.calm(time.Now())
	}
}

// close sends home those who rest, and the others when they have ended.
func (c *crew) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for _, h := range c.rest {
		close(h.jobs)
	}
	c.rest = nil
}
