package sender

import (
	"errors"
	"sync"
	"time"

	"github.com/sony/gobreaker/v2"

	"github.com/walhook/walhook/outbox"
)

// State of a circuit. Its number is the value of walhook_breaker_state.
type State uint8

// The states, drawn in doc.go.
const (
	Closed State = iota
	HalfOpen
	Open
)

func (s State) String() string {
	switch s {
	case Closed:
		return "closed"
	case HalfOpen:
		return "half-open"
	case Open:
		return "open"
	}
	return "unknown"
}

// effect is what the result of an attempt means for the endpoint's circuit.
type effect uint8

// The effects. The zero value blames nobody and frees a probe's place: what a panic reports.
const (
	neither effect = iota
	success
	failure
)

const (
	// probeWait is how long to hold a delivery that met a probe in flight. The probe may take
	// as long as the endpoint's timeout, or a millisecond.
	probeWait = 500 * time.Millisecond
	// windowBuckets is how finely the rolling window forgets.
	windowBuckets = 12
	// defaultOpenFor stands in where a policy has none: gobreaker would make it a minute.
	defaultOpenFor = 30 * time.Second
)

// circuit is the breaker of one endpoint. Nothing else knows that it is gobreaker's.
//
// Three facts about gobreaker v2.4.0 shape it. It drops the result of a request that outlived
// its window, and its rolling window forgets a streak of failures: so the streak is counted
// here, and the window is at least four timeouts long. It calls back under its mutex: so the
// callbacks only note what happened, and announce tells it afterwards. And State() itself moves
// the state: so it is never called.
type circuit struct {
	policy  circuitPolicy
	breaker *gobreaker.TwoStepCircuitBreaker[struct{}]
	tell    func(from, to State) // log, metric and Config.OnStateChange; never under a lock

	// Guarded by the breaker's own mutex, because only its callbacks touch them.
	streak uint32 // failures since the last success or change of state
	forced bool   // trip at the next failure, whatever the policy says

	mu         sync.Mutex // guards what follows; whoever holds it never calls the breaker
	state      State
	until      time.Time // while open: when a probe may go
	moves      []move    // that nobody was told of yet
	announcing bool      // somebody tells of moves now, in their order
	retired    bool      // replaced or forgotten: its moves concern nobody
}

type move struct{ from, to State }

// circuitPolicy is all of an endpoint that a circuit depends on; equal policies need no new one.
type circuitPolicy struct {
	outbox.BreakerPolicy
	timeout time.Duration
}

func policyOf(e *outbox.Endpoint) circuitPolicy {
	p := circuitPolicy{BreakerPolicy: e.Breaker, timeout: e.Timeout}
	if p.OpenFor <= 0 {
		p.OpenFor = defaultOpenFor
	}
	return p
}

var (
	errFailure = errors.New("failure")
	errNeither = errors.New("counts neither way")
)

// newCircuit returns a closed circuit, or an open one where its predecessor was not closed.
func newCircuit(policy circuitPolicy, open bool, tell func(from, to State)) *circuit {
	c := &circuit{policy: policy, tell: tell}
	window := max(policy.Window, 4*policy.timeout)
	c.breaker = gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
		MaxRequests:  1,
		Interval:     window,
		BucketPeriod: window / windowBuckets,
		Timeout:      policy.OpenFor,
		ReadyToTrip:  c.readyToTrip,
		IsExcluded:   func(err error) bool { return err == errNeither },
		// The breaker asks this once for each result that counts, and for no result of a
		// state gone by: the one place where a streak can be kept exactly.
		IsSuccessful: func(err error) bool {
			if err == nil {
				c.streak = 0
				return true
			}
			c.streak++
			return false
		},
		OnStateChange: c.moved,
	})
	if open {
		c.forced = true
		if done, err := c.breaker.Allow(); err == nil {
			done(errFailure)
		}
		c.forced = false
		c.moves = nil // it was open before: no news
	}
	return c
}

// readyToTrip is asked after a failure of a closed circuit. Requests counts what is in flight,
// so the rate is taken of what completed.
func (c *circuit) readyToTrip(n gobreaker.Counts) bool {
	p := c.policy
	if c.forced || p.ConsecutiveFailures > 0 && c.streak >= uint32(p.ConsecutiveFailures) {
		return true
	}
	completed := n.TotalSuccesses + n.TotalFailures
	return p.FailureRate > 0 && p.MinRequests > 0 && completed >= uint32(p.MinRequests) &&
		float64(n.TotalFailures) >= p.FailureRate*float64(completed)
}

// moved is the breaker's callback, under its mutex: it must neither call it nor wait.
func (c *circuit) moved(_ string, from, to gobreaker.State) {
	c.streak = 0
	c.mu.Lock()
	defer c.mu.Unlock()
	c.state = stateOf(to)
	if c.state == Open {
		// A little later than the breaker's own time, which has to be past and not just reached.
		c.until = time.Now().Add(c.policy.OpenFor + time.Millisecond)
	}
	c.moves = append(c.moves, move{stateOf(from), c.state})
}

func stateOf(s gobreaker.State) State {
	switch s {
	case gobreaker.StateOpen:
		return Open
	case gobreaker.StateHalfOpen:
		return HalfOpen
	}
	return Closed
}

// permit is the right to one attempt. It is given back exactly once, by report.
type permit struct{ done func(error) }

// allow gives a permit, or the time when to ask again.
func (c *circuit) allow() (p permit, until time.Time, ok bool) {
	done, err := c.breaker.Allow()
	c.announce()
	if err == nil {
		return permit{done}, time.Time{}, true
	}
	now := time.Now()
	if errors.Is(err, gobreaker.ErrOpenState) {
		c.mu.Lock()
		until = c.until
		c.mu.Unlock()
	}
	if !until.After(now) { // a probe is in flight, or the state moved since the breaker answered
		until = now.Add(probeWait)
	}
	return permit{}, until, false
}

// report gives a permit back with the attempt's effect.
func (c *circuit) report(p permit, e effect) {
	switch e {
	case success:
		p.done(nil)
	case failure:
		p.done(errFailure)
	default:
		p.done(errNeither)
	}
	c.announce()
}

// announce tells of the moves not yet told. One goroutine tells at a time, so that they are
// told in their order; another that comes meanwhile leaves its moves to it and goes on.
func (c *circuit) announce() {
	c.mu.Lock()
	if c.announcing {
		c.mu.Unlock()
		return
	}
	c.announcing = true
	for len(c.moves) > 0 && !c.retired {
		m := c.moves[0]
		c.moves = c.moves[1:]
		c.mu.Unlock()
		c.tell(m.from, m.to)
		c.mu.Lock()
	}
	c.announcing = false
	c.mu.Unlock()
}

// retire silences the circuit and returns the state it was in.
func (c *circuit) retire() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.retired = true
	return c.state
}
