package outbox

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Rate is how many attempts may begin in a time. The zero Rate is no limit.
type Rate struct {
	Attempts float64
	Per      time.Duration // a second, a minute or an hour
}

// RateForms says which rates ParseRate reads, and what they may be.
const RateForms = "100/s, 300/m, 20/h, 0.5/s; from 1/h to 100000/s"

// ParseRate reads a rate: a number, a slash, and s, m or h.
func ParseRate(s string) (Rate, error) {
	number, unit, _ := strings.Cut(s, "/")
	per, known := map[string]time.Duration{"s": time.Second, "m": time.Minute, "h": time.Hour}[unit]
	n, err := strconv.ParseFloat(number, 64)
	if !known || err != nil || strings.Trim(number, "0123456789.") != "" {
		return Rate{}, errors.New("is not a rate; allowed: " + RateForms)
	}
	r := Rate{n, per}
	if n*float64(time.Hour) < float64(per) || r.perSecond() > 100_000 {
		return Rate{}, errors.New("is out of range; allowed: " + RateForms)
	}
	return r, nil
}

func (r Rate) perSecond() float64 { return r.Attempts / r.Per.Seconds() }

// same tells whether two rates are one: 300/m is 5/s.
func (r Rate) same(o Rate) bool {
	return r.Attempts*float64(o.Per) == o.Attempts*float64(r.Per)
}

func (r Rate) slower(o Rate) bool { return r.perSecond() < o.perSecond() }

// String is what ParseRate reads; empty is no limit.
func (r Rate) String() string {
	if r == (Rate{}) {
		return ""
	}
	unit := map[time.Duration]string{time.Second: "s", time.Minute: "m", time.Hour: "h"}[r.Per]
	return strconv.FormatFloat(r.Attempts, 'f', -1, 64) + "/" + unit
}

// RateLimit bounds how fast an endpoint is called, retries and probes included: every attempt
// waits for its turn.
type RateLimit struct {
	Group string // whose members share one rate; empty where the endpoint has one of its own
	Rate  Rate
}

// Groups holds one endpoint of each group that shares a rate.
type Groups map[string]*Endpoint

// Join takes in an endpoint, and refuses one that has another rate than its group. Where two
// that differ meet at run time all the same, the lower rate holds for the whole group.
func (g Groups) Join(ep *Endpoint) error {
	limit := ep.RateLimit
	if limit.Group == "" || limit.Rate == (Rate{}) {
		return nil
	}
	first := g[limit.Group]
	if first == nil {
		g[limit.Group] = ep
		return nil
	}
	if was := first.RateLimit.Rate; !was.same(limit.Rate) {
		return fmt.Errorf("rate_limit: %s of endpoint %q is not the rate of group %q, which is %s by endpoint %q",
			limit.Rate, ep.ID, limit.Group, was, first.ID)
	}
	return nil
}

// catchUp is how much of what was not sent in time may be sent at once. Up to 100/s that is one
// attempt, so attempts are spaced evenly and no window of a second sees more than the rate says;
// above, it is a hundredth of a second's, so that a lane need not be woken for each.
const catchUp = 10 * time.Millisecond

// pace is one rate and the lanes that share it. Each lane waits for one turn at a time, and the
// turns are given in the order in which they were asked for, so none of them starves.
type pace struct {
	mu      sync.Mutex      // guards what follows
	rates   map[string]Rate // as the endpoints, by id, have it
	rate    Rate            // the lowest of them
	limiter *rate.Limiter   // a change of the rate brings a new one
}

// turn is when a lane may make its next attempt; the zero turn is none.
type turn struct {
	at time.Time
	of *rate.Limiter
}

// next is the turn that a lane has: the one it waits for, or a new one where it waits for none
// or the rate has changed since.
func (p *pace) next(t turn, now time.Time) turn {
	p.mu.Lock()
	defer p.mu.Unlock()
	if t.of == p.limiter {
		return t
	}
	return turn{now.Add(p.limiter.ReserveN(now, 1).DelayFrom(now)), p.limiter}
}

// settle takes up the lowest rate, and tells whether it is another one than before.
func (p *pace) settle() (changed bool) {
	var lowest Rate
	for _, r := range p.rates {
		if lowest == (Rate{}) || r.slower(lowest) {
			lowest = r
		}
	}
	if lowest == (Rate{}) || p.limiter != nil && lowest.same(p.rate) {
		return false
	}
	again := p.limiter != nil
	p.rate = lowest
	p.limiter = rate.NewLimiter(rate.Limit(lowest.perSecond()), max(1, int(lowest.perSecond()*catchUp.Seconds())))
	if again { // what was sent before counts: the first goes after one step of the new rate
		p.limiter.AllowN(time.Now(), p.limiter.Burst())
	}
	return again
}

// paces are those of all lanes: one for each group, and one for each endpoint with a rate of its own.
type paces struct {
	mu  sync.Mutex // guards all; taken before that of a pace
	all map[paceKey]*pace
}

type paceKey struct{ group, endpoint string }

func keyOfPace(ep *Endpoint) (k paceKey, limited bool) {
	if k.group = ep.RateLimit.Group; k.group == "" {
		k.endpoint = ep.ID
	}
	return k, ep.RateLimit.Rate != (Rate{})
}

// join is the pace that an endpoint keeps from now on; nil where it has no limit. changed tells
// that lanes wait for turns that are no longer theirs.
func (ps *paces) join(ep *Endpoint) (p *pace, changed bool) {
	k, limited := keyOfPace(ep)
	if !limited {
		return nil, false
	}
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if p = ps.all[k]; p == nil {
		p = &pace{rates: map[string]Rate{}}
		if ps.all == nil {
			ps.all = map[paceKey]*pace{}
		}
		ps.all[k] = p
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rates[ep.ID] = ep.RateLimit.Rate
	return p, p.settle()
}

// leave takes an endpoint out of the pace that it kept by those settings.
func (ps *paces) leave(ep *Endpoint) (changed bool) {
	k, limited := keyOfPace(ep)
	if !limited {
		return false
	}
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p := ps.all[k]
	if p == nil {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if delete(p.rates, ep.ID); len(p.rates) == 0 {
		delete(ps.all, k)
	}
	return p.settle()
}

// setPace takes up the rate of the lane's endpoint; old has the settings before, nil where there
// were none.
func (l *Lane) setPace(old *Endpoint) {
	p, changed := l.relay.paces.join(l.ep)
	if old != nil {
		was, _ := keyOfPace(old)
		if is, limited := keyOfPace(l.ep); was != is || !limited {
			changed = l.relay.paces.leave(old) || changed
		}
	}
	if l.pace = p; changed {
		l.relay.rouse() // the others ask for their turns anew
	}
}

// mayBegin tells whether an attempt may begin now, and so use up the lane's turn. Where not, the
// lane goes on when its turn comes.
func (l *Lane) mayBegin() bool {
	if l.pace == nil {
		return true
	}
	now := time.Now()
	if l.turn = l.pace.next(l.turn, now); l.turn.at.After(now) {
		l.wakeAt(l.turn.at)
		return false
	}
	return true
}

// wakeAt makes the lane look at t at the latest whether something may be sent.
func (l *Lane) wakeAt(t time.Time) {
	if !l.bellAt.IsZero() && !t.Before(l.bellAt) {
		return
	}
	l.bellAt = t
	if l.bell == nil {
		l.bell = time.AfterFunc(time.Until(t), l.wake)
		return
	}
	l.bell.Reset(time.Until(t))
}

func (l *Lane) wake() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.bellAt = time.Time{}
	l.dispatch()
	if at := l.turn.at; at.After(time.Now()) {
		l.wakeAt(at)
	} else {
		l.turn = turn{} // it came, and there was nothing to send: it is lost
	}
}
