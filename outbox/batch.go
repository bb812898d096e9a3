package outbox

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Batch says how many events go in one request. Such a request is one delivery of all of them:
// it succeeds or fails as a whole, and they stand in it in commit order.
type Batch struct {
	MaxEvents int           // 1: each event in a request of its own, and no array around it
	MaxBytes  int64         // of the body; zero is the endpoint's MaxPayload
	Linger    time.Duration // how long an event may wait for others to go with
}

// BatchIDs is how many bytes the ids of a batch may have, with a comma between them, where they
// stand in a header because the elements do not carry them (FormatRaw).
const BatchIDs = 4 << 10

// MaxBatchBytes bounds the body of a batch.
func (ep *Endpoint) MaxBatchBytes() int64 {
	if ep.Batch.MaxBytes > 0 && (ep.MaxPayload <= 0 || ep.Batch.MaxBytes < ep.MaxPayload) {
		return ep.Batch.MaxBytes
	}
	return ep.MaxPayload
}

// Apart is what a Sender left out of the request of a batch. What is said of the attempt does not
// hold for it.
type Apart struct {
	Unfit []Unfit  // can never be sent to this endpoint
	Left  []*Event // the last ones, which did not fit: they go next
}

// Unfit is an event that can never be sent to an endpoint, and why.
type Unfit struct {
	Event  *Event
	Reason Reason
	Detail string
}

func (l *Lane) batches() bool { return l.ep.Batch.MaxEvents > 1 }

// nextBatch takes the deliveries that go in the next request, linked by mate, the oldest first;
// nil where they are to wait for others, or for their turn.
func (l *Lane) nextBatch() *item {
	if l.turn != (turn{}) && !l.mayBegin() {
		return nil
	}
	batch, full := l.gather()
	if !full && l.lingers(batch[0]) || !l.mayBegin() {
		for _, it := range batch {
			it.state = waiting
		}
		clear(batch)
		return nil
	}
	l.gathering = time.Time{}
	slices.SortFunc(batch, func(a, b *item) int { return a.event.Position.Compare(b.event.Position) })
	for i, it := range batch {
		if it.round = l.round; it.read {
			l.loaded--
		}
		if i > 0 {
			batch[i-1].mate = it
		}
	}
	first := batch[0]
	clear(batch)
	return first
}

// gather marks as flying what may go together now: of each key that is ready, its first delivery
// and those right behind it. full tells that no other could go with them. There is one at least.
func (l *Lane) gather() (batch []*item, full bool) {
	batch = l.batch[:0]
	events, bytes, ids := l.ep.Batch.MaxEvents, l.ep.MaxBatchBytes()-int64(len("[]")), BatchIDs
	if l.ep.MaxBatchBytes() <= 0 {
		bytes = 1 << 62
	}
	add := func(it *item) {
		bytes -= elementSize(l.ep.Format, it.event)
		if events--; l.ep.Format == FormatRaw {
			ids -= len(it.event.ID) + len(",")
		}
		it.state = flying
		batch = append(batch, it)
		full = full || events == 0 || bytes <= 0 || ids <= 0
	}
	fits := func(it *item) bool {
		if l.goesAlone(it) || bytes < elementSize(l.ep.Format, it.event) || l.ep.Format == FormatRaw && ids < len(it.event.ID) {
			full = true
		}
		return !full
	}
	for _, it := range l.ready.rest() {
		if it.state != waiting {
			continue
		}
		if len(batch) > 0 && !fits(it) {
			break
		}
		if add(it); l.goesAlone(it) {
			full = true
		}
		if q := l.queues[it.key]; it.key != "" && q != nil && len(q.items) > 0 && q.items[0] == it {
			for _, next := range q.items[1:] {
				if full || next.state != waiting || !fits(next) {
					break
				}
				add(next)
			}
		}
		if full {
			break
		}
	}
	l.batch = batch
	return batch, full
}

// goesAlone tells whether a delivery has its last attempt before it, after others that failed:
// should it be its own fault, no other one dies for it; should it be another one's, it does not.
func (l *Lane) goesAlone(it *item) bool {
	return it.attempts > 0 && it.attempts >= len(l.ep.Retry.Schedule)
}

// elementSize is how many bytes an event takes in a batch, near enough: where it takes more, what
// does not fit is left by the sender.
func elementSize(f Format, e *Event) int64 {
	n := len(e.Data) + len(",")
	switch f {
	case FormatStandard:
		n += len(`{"id":"","type":"","timestamp":"2006-01-02T15:04:05.999999Z","data":}`) + len(e.ID) + len(e.Type)
	case FormatCloudEvents:
		if n += 256 + len(e.ID) + len(e.Type) + len(e.Key); !e.JSON {
			n += len(e.Data)/3 + 32
		}
	}
	return int64(n)
}

// lingers tells whether a batch that is not full is to wait for more: until its first delivery
// has been in memory for so long, or until one could have gone for so long, since what is parked
// and read again meanwhile seems new. Memory that others wait for is not held for that.
func (l *Lane) lingers(first *item) bool {
	linger := l.ep.Batch.Linger
	if linger <= 0 || l.goesAlone(first) {
		return false
	}
	l.relay.lingering.add(l) // before the look at memory: whoever fills it later wakes those who are on the list
	if l.relay.ledger.tight() {
		return false
	}
	now := time.Now()
	if l.gathering.IsZero() {
		l.gathering = now
	}
	until := l.gathering
	if first.arrived.Before(until) {
		until = first.arrived
	}
	if until = until.Add(linger); !until.After(now) {
		return false
	}
	l.wakeAt(until)
	return true
}

// lingering are the lanes with a batch that waits for more, and some that had one.
type lingering struct {
	any   atomic.Bool
	mu    sync.Mutex
	lanes map[*Lane]bool
}

func (g *lingering) add(l *Lane) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.lanes == nil {
		g.lanes = map[*Lane]bool{}
	}
	g.lanes[l] = true
	g.any.Store(true)
}

func (g *lingering) drop(l *Lane) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.lanes, l)
}

// wake lets them look again whether they are to wait.
func (g *lingering) wake() {
	if !g.any.Load() {
		return
	}
	g.mu.Lock()
	lanes := g.lanes
	g.lanes = nil
	g.any.Store(false)
	g.mu.Unlock()
	for l := range lanes {
		l.look()
	}
}

// attempt is the next attempt of a delivery and those that go with it.
func (it *item) attempt(ep *Endpoint) Attempt {
	a := Attempt{Event: it.event, Endpoint: ep, Number: it.attempts + 1}
	if ep.Batch.MaxEvents > 1 {
		n := 0
		for m := it; m != nil; m = m.mate {
			n++
		}
		a.Batch = make([]*Event, 0, n)
		for m := it; m != nil; m = m.mate {
			a.Batch = append(a.Batch, m.event)
			a.Number = max(a.Number, m.attempts+1)
		}
	}
	return a
}

// unmate is the one that goes with a delivery, and no longer does.
func (it *item) unmate() *item {
	m := it.mate
	it.mate = nil
	return m
}

// sendBatch is Send but for what is too old, which dies unsent.
func (l *Lane) sendBatch(a Attempt, now time.Time) Outcome {
	var old []Unfit
	if age := a.Endpoint.Retry.MaxAge; age > 0 {
		a.Batch = slices.DeleteFunc(a.Batch, func(e *Event) bool {
			if now.Sub(e.Commit) <= age {
				return false
			}
			old = append(old, Unfit{e, ReasonMaxAge, "older than " + age.String()})
			return true
		})
	}
	if len(a.Batch) == 0 {
		return Outcome{Verdict: Dead, Reason: ReasonMaxAge, Apart: &Apart{Unfit: old}}
	}
	a.Event = a.Batch[0]
	out := l.relay.sender.Send(l.relay.sendCtx, a)
	if len(old) > 0 {
		apart := Apart{Unfit: old}
		if out.Apart != nil {
			apart.Unfit, apart.Left = append(old, out.Apart.Unfit...), out.Apart.Left
		}
		out.Apart = &apart
	}
	return out
}

// takeApart takes out of a batch what was not sent. What is unfit dies, and its death is on its way
// before any retry of the others, so that none of its key is read back before it is written. What
// was left waits in front of all others, or is late: to be parked when the rest has ended.
func (l *Lane) takeApart(first *item, apart *Apart) (sent *item, late []*item) {
	var last *item
	var back []*item
	for it := first; it != nil; {
		next := it.unmate()
		if i := slices.IndexFunc(apart.Unfit, func(u Unfit) bool { return u.Event == it.event }); i >= 0 {
			u := apart.Unfit[i]
			l.bury(it, Outcome{Verdict: Dead, Reason: u.Reason, Detail: u.Detail})
		} else if !slices.Contains(apart.Left, it.event) {
			if last == nil {
				sent = it
			} else {
				last.mate = it
			}
			last = it
		} else if it.round != l.round || it.stored && !it.read { // it was cleared meanwhile, or its row says that it is being sent
			late = append(late, it)
		} else {
			if it.state = waiting; it.read {
				l.loaded++
			}
			back = append(back, it)
		}
		it = next
	}
	for _, it := range slices.Backward(back) {
		if q := l.queues[it.key]; it.key == "" || q != nil && len(q.items) > 0 && q.items[0] == it {
			l.ready.unpop(it)
		}
	}
	return sent, late
}
