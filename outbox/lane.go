package outbox

import (
	"cmp"
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/walhook/walhook/cdc"
)

// laneState is where a lane stands. See doc.go for the picture.
type laneState uint8

const (
	// flowing: new deliveries are sent from memory; what is parked belongs to keys that are
	// blocked, or waits for the time of its retry.
	flowing laneState = iota
	// parking: nothing is sent; everything is parked. until says when a probe may go.
	parking
	// draining: what is parked is read back in commit order and sent; new deliveries are
	// parked behind it.
	draining
	// closed: nothing is taken, nothing is sent.
	closed
)

func (s laneState) String() string {
	return [...]string{"flowing", "parking", "draining", "closed"}[s]
}

const (
	scanPage  = 512
	keyPage   = 64
	duePage   = 256
	shortPage = 32  // while the buffer is full
	maxSkip   = 256 // blocked keys that a scan leaves out by name; others are passed over here
	// A lane whose keys fail one by one remembers so many for each event that the buffer may
	// hold, and at least minBlockedKeys. Beyond it the endpoint counts as failing as a whole.
	blockedPerEvent = 5
	minBlockedKeys  = 1000
	maxRetryAfter   = 24 * time.Hour
	loadBackoff     = 500 * time.Millisecond
	recountSlack    = 5 * time.Second
	overflowPause   = time.Minute
)

// itemState is where a delivery in memory stands.
type itemState uint8

const (
	waiting itemState = iota // its turn will come
	flying                   // its request is in flight
	ending                   // its death is being written; its key waits for that
	left                     // no longer memory's to send: the store has it, to be read again later
	over                     // delivered or dead
)

// item is a delivery in memory. Its lane's mu guards it.
type item struct {
	event    *Event
	key      string // what orders it; empty is no order
	attempts int    // spent
	arrived  time.Time
	state    itemState
	read     bool   // it was read back from the store
	maybe    bool   // it came when the store may have had its row already, left by a crash
	round    uint64 // flying: the lane's when it began
	stored   bool   // it has a row in walhook.deliveries, or one on its way there
	changes  int    // of its row, not yet committed
	changed  bool   // its row was changed after the insert, so that a load may have seen an older state
	span     *span  // its row's in the ledger; nil where it was read back from the store
	next     *item  // in the list of owed
	prev     *item
	mate     *item // flying: the next one in its batch
}

// queue holds the deliveries of one key, in commit order. The first one is sent or waits to be.
type queue struct {
	key     string
	items   []*item
	blocked bool         // rows of this key are stored that are not in items
	due     time.Time    // blocked: when the first of them may be tried; zero follows items
	after   cdc.Position // blocked: rows up to here are in items or done
	untold  positions    // parked rows on their way to the store, new or changed
	parks   uint64       // counts them, so that a load can tell whether it saw them all
	wanted  bool         // in the lane's list of keys to load
}

// Lane is the queue of one endpoint: what waits in memory, what is parked, and when it goes.
// All order and all waiting of the endpoint's deliveries is decided here, under one lock.
//
// While anything of a lane (ordering all), or of a key (ordering key), is parked, nothing newer
// of it is sent. A lane whose store holds something starts draining, never flowing; a park that
// fails is tried until it succeeds, and its key stays blocked meanwhile.
type Lane struct {
	relay *Relay
	id    string
	log   *zap.Logger
	m     *laneMetrics
	now   atomic.Pointer[Endpoint] // ep, for who asks without the lock

	workers sync.WaitGroup // attempts and loads

	mu       sync.Mutex // guards what follows
	ep       *Endpoint
	state    laneState
	why      Reason    // parking: what new deliveries are parked for
	until    time.Time // parking: when to probe; zero waits for somebody
	failing  time.Time // since when nothing but failures; zero while well
	limit    int       // fresh attempts at once, up to the endpoint's concurrency; grows with success
	inflight int       // attempts
	fresh    int       // attempts of this round
	ready    fifo      // the deliveries that may go now
	loaded   int       // deliveries read back from the store and waiting
	reads    int       // those in memory, in whatever state
	readSize int64     // bytes of them
	queues   map[string]*queue
	blocked  int                    // queues with blocked set
	owed     itemList               // deliveries that the store does not have, as they arrived
	held     map[cdc.Position]*item // stored deliveries that memory answers for
	ghosts   []ghost                // of held, to be dropped when the load under way has ended

	loading  bool         // one load at a time
	cursor   cdc.Position // draining: the scan has been here
	more     bool         // draining: rows may follow the cursor
	parks    uint64       // counts inserts
	told     uint64       // counts those that are committed
	untold   positions    // of them, those that wait for nothing but their turn
	catching bool         // draining: the end is near, new deliveries wait in tail
	tail     []*item
	probing  bool         // draining: the first delivery is to be the oldest, due or not
	keys     []*queue     // to be loaded
	nextDue  time.Time    // the soonest retry in the store; zero is none
	doubts   []string     // keys that wait for a retry that may not be in the store
	round    uint64       // counts clear, so that a load can tell that it is stale
	ahead    bool         // a load met a row that the stream has not come to
	unseen   int          // recounts in a row that found rows while we waited for none
	removed  int64        // counts rows that are to go, or to be dead
	cleared  int64        // counts those of them that are committed
	counted  tally        // of what recount is told next
	gone     bool         // the endpoint was removed: nothing more is taken for it
	last     cdc.Position // gone: what comes behind it is another endpoint's of the same id; zero is nothing
	waits    bool         // an earlier endpoint of its id is leaving

	timer   *time.Timer
	timerAt time.Time

	pace   *pace // nil where the endpoint has no rate_limit
	turn   turn  // that the next attempt waits for
	bell   *time.Timer
	bellAt time.Time // when it rings; zero where it does not

	gathering time.Time // since when a batch that is not full could have gone; zero where there is none
	batch     []*item   // of gather, which uses it again
}

// tally is what a count of the store surely shows: what was committed before it began.
type tally struct {
	told    uint64
	cleared int64
}

// ghost is a delivery that has ended or was parked again while a load was under way.
type ghost struct {
	pos cdc.Position
	it  *item
}

func newLane(r *Relay, ep *Endpoint) *Lane {
	l := &Lane{
		relay: r, id: ep.ID, ep: ep,
		log:    r.log.Named("lane").WithLazy(zap.String("endpoint", ep.ID)), // most write nothing, and it keeps a kilobyte
		m:      r.metrics.lane(ep.ID),
		limit:  ep.Concurrency,
		queues: map[string]*queue{},
		held:   map[cdc.Position]*item{},
	}
	l.now.Store(ep)
	if ep.Status != Enabled {
		l.state, l.why = parking, ReasonPaused
	}
	l.setPace(nil)
	return l
}

// open tells the lane what the store holds for it, before its first delivery.
func (l *Lane) open(b Backlog) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.m.parked.Store(b.Parked)
	l.m.dead.Store(b.Dead)
	if l.state == flowing && b.Parked > 0 {
		l.probe()
	}
}

// counting tells that the store is about to be counted.
func (l *Lane) counting() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.counted = tally{l.told, l.cleared}
}

// recount takes up what the store says, which others may have changed: an operator may have
// made a dead delivery parked again, or a retry due at once.
func (l *Lane) recount(b Backlog) {
	l.mu.Lock()
	defer l.mu.Unlock()
	strange := l.compare(b.Parked)
	l.m.dead.Store(b.Dead)
	overdue := time.Now().Add(-recountSlack)
	for _, q := range l.queues {
		if q.blocked && q.due.Before(overdue) && len(q.items) == 0 && l.state != parking {
			l.want(q) // its row was changed under us, or is gone
		}
	}
	if l.state != flowing || l.told < l.parks || b.Parked == 0 || l.blocked > 0 || !l.nextDue.IsZero() {
		l.unseen = 0
	} else {
		l.unseen++
	}
	if l.state == flowing && (strange > 0 || l.unseen > 1) {
		l.unseen = 0
		l.log.Info("draining: walhook.deliveries has rows that somebody else made parked")
		l.drain(l.limit)
	}
	if l.state == flowing {
		l.dueAt(b.NextDue)
	}
}

// compare tells how many rows were counted that are none of ours, and counts them from now on.
// What was on its way when the store was counted may have been counted or not. While draining,
// rows that the drain has passed are left for the next recount.
func (l *Lane) compare(parked int64) (strange int64) {
	own := l.m.parked.Load()
	most, least := own+l.removed-l.counted.cleared, own-int64(l.parks-l.counted.told)
	switch {
	case parked < least:
		l.m.parked.Add(parked - least) // some were removed, or were there already when we parked them
	case parked > most && l.state != draining:
		strange = parked - most
		l.m.parked.Add(strange)
	}
	return strange
}

// add takes a new delivery. It never waits.
func (l *Lane) add(e *Event, sp *span, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if h := l.held[e.Position]; l.gone || h != nil && h.event != nil && h.event.ID == e.ID {
		// Its endpoint has just gone; or it came again after a crash, and we have it from the store.
		l.relay.ledger.Settle(sp)
		l.relay.ledger.Release(sp, e)
		return
	}
	it := &item{event: e, key: l.ep.orderKey(e), span: sp, arrived: now, maybe: !l.relay.caught.Load()}
	l.owed.push(it)
	switch {
	case l.state == draining && l.catching && !it.maybe: // one that comes again may be in the store, before its time in the tail
		l.tail = append(l.tail, it)
	case l.state == flowing:
		l.enqueue(it)
		l.dispatch()
	default:
		l.park(it, l.parkReason())
	}
}

func (l *Lane) parkReason() Reason {
	switch l.state {
	case parking:
		return l.why
	case closed:
		return ReasonShutdown
	}
	return ReasonBehindEndpoint
}

// enqueue puts a delivery behind those of its key, in memory or in the store.
func (l *Lane) enqueue(it *item) {
	if it.key == "" {
		l.ready.push(it)
		return
	}
	q := l.queue(it.key)
	if q.blocked && !it.stored {
		l.park(it, ReasonBehindKey)
		return
	}
	if q.items = append(q.items, it); len(q.items) == 1 {
		l.ready.push(it)
	}
}

func (l *Lane) queue(key string) *queue {
	q := l.queues[key]
	if q == nil {
		q = &queue{key: key}
		l.queues[key] = q
	}
	return q
}

func (l *Lane) block(q *queue, due time.Time) {
	if !q.blocked {
		q.blocked = true
		l.blocked++
	}
	q.due, q.after = due, cdc.Position{}
}

func (l *Lane) unblock(q *queue) {
	if q.blocked {
		q.blocked = false
		l.blocked--
	}
	q.due = time.Time{}
	l.tidy(q)
}

func (l *Lane) tidy(q *queue) {
	if len(q.items) == 0 && !q.blocked && len(q.untold) == 0 && !q.wanted {
		delete(l.queues, q.key)
	}
}

// park writes a delivery that waits in memory to the store, to wait for its turn there.
func (l *Lane) park(it *item, why Reason) {
	if it.key != "" && l.state == flowing {
		if q := l.queue(it.key); !q.blocked {
			l.block(q, time.Time{})
		}
	}
	l.untold.push(it.event.Position)
	l.insert(it, Change{State: StateParked, Reason: why}, func() { l.untold.pop() })
	l.leave(it, left)
}

// insert sends a new row on its way. When it is committed the delivery is settled, and done runs
// under the lane's lock.
func (l *Lane) insert(it *item, c Change, done func()) {
	it.stored = true
	l.owed.remove(it)
	l.held[it.event.Position] = it
	l.parks++
	if c.State != StateDead {
		l.m.parked.Add(1)
	}
	c.Insert = true
	l.put(it, c, func() {
		l.relay.ledger.Settle(it.span)
		l.told++
		if done != nil {
			done()
		}
	})
}

// put writes a change of a stored delivery; done runs under the lane's lock after the commit.
// Until then memory answers for the delivery, and nothing of its key is read back that might
// overtake it.
func (l *Lane) put(it *item, c Change, done func()) {
	c.EndpointID, c.Event, c.OrderKey = l.id, it.event, it.key
	c.Attempts = it.attempts
	it.changes++
	it.changed = it.changed || !c.Insert
	var q *queue
	if it.key != "" && (c.Insert || c.State == StateParked) {
		q = l.queue(it.key)
		q.untold.push(it.event.Position)
		q.parks++
	}
	due := c.Due // else all of c would stay with done
	l.relay.journal.put(c, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		it.changes--
		if done != nil {
			done()
		}
		l.forget(it)
		l.dueAt(due)
		l.more = true
		if q != nil {
			q.untold.pop()
			l.wantNext(q)
			l.tidy(q)
		}
		l.load()
	})
}

// uncount is put for a row that is parked no more.
func (l *Lane) uncount(it *item, c Change, done func()) {
	l.m.parked.Add(-1)
	l.removed++
	l.put(it, c, func() {
		l.cleared++
		if done != nil {
			done()
		}
	})
}

// leave ends memory's part in a delivery, once its changes are committed: it is over, or left
// to the store.
func (l *Lane) leave(it *item, to itemState) {
	if it.state == waiting && it.read {
		l.loaded--
	}
	it.state = to
	l.owed.remove(it)
	l.forget(it)
}

// forget drops what memory knows of a delivery that has left. A load under way may have read
// its row before it was changed, so memory answers for it until that load has ended; one that
// was only inserted is what a load is to find.
func (l *Lane) forget(it *item) {
	if it.state < left || it.changes > 0 || it.event == nil {
		return
	}
	if pos := it.event.Position; it.stored && l.held[pos] == it {
		if l.loading && it.changed {
			l.ghosts = append(l.ghosts, ghost{pos, it})
		} else {
			delete(l.held, pos)
		}
	}
	if it.read {
		l.reads--
		l.readSize -= it.event.Size()
		l.relay.ledger.read.add(-1, -it.event.Size())
	} else {
		l.relay.ledger.Release(it.span, it.event)
	}
	it.event, it.span = nil, nil // nothing more is owed for it, and who still points to it must keep neither
}

// mayWork tells whether sending and loading are allowed at all now.
func (l *Lane) mayWork() bool { return l.state != closed && l.relay.leased() }

// kick lets the lane go on after whatever held all lanes has passed.
func (l *Lane) kick() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ahead {
		l.ahead, l.more = false, true
		l.dueAt(time.Now())
		for _, q := range l.queues {
			l.wantNext(q)
		}
	}
	l.dispatch()
	l.arm()
}

// look lets the lane see whether anything may go now.
func (l *Lane) look() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dispatch()
}

// dispatch starts as many attempts as may be in flight, and loads more where memory runs low.
func (l *Lane) dispatch() {
	for it := l.next(); it != nil; it = l.next() {
		l.workers.Add(1)
		l.relay.crew.do(job{l, it, l.ep, l.inflight == 1})
	}
	l.load()
}

// next takes the delivery to be sent now, with its mates where the endpoint takes batches; nil
// where none may be.
func (l *Lane) next() *item {
	if l.state == parking || l.fresh >= l.limit || l.inflight >= l.ep.Concurrency || l.ready.len() == 0 || !l.mayWork() {
		return nil
	}
	it := l.ready.peek()
	switch {
	case it == nil:
		return nil
	case l.batches():
		if it = l.nextBatch(); it == nil {
			return nil
		}
	case !l.mayBegin():
		return nil
	default:
		l.ready.pop()
		if it.read {
			l.loaded--
		}
		it.state, it.round = flying, l.round
	}
	l.turn = turn{}
	l.inflight++
	l.fresh++
	return it
}

// work makes attempts until nothing may be sent, the first by the settings with which it was taken.
func (l *Lane) work(it *item, ep *Endpoint, inLine *atomic.Bool) {
	defer l.workers.Done()
	l.mu.Lock()
	defer l.mu.Unlock()
	for it != nil {
		a := it.attempt(ep)
		a.InLine = inLine
		l.mu.Unlock()
		now := time.Now()
		var out Outcome
		if a.Batch != nil {
			out = l.sendBatch(a, now)
		} else if age := ep.Retry.MaxAge; age > 0 && now.Sub(a.Event.Commit) > age {
			out = Outcome{Verdict: Dead, Reason: ReasonMaxAge, Detail: "older than " + age.String()}
		} else {
			out = l.relay.sender.Send(l.relay.sendCtx, a)
		}
		end := time.Now()
		if !it.read {
			l.relay.ledger.Attempted(max(0, now.Sub(it.arrived)-ep.Batch.Linger)+out.Waited, end.Sub(now)-out.Waited)
		}
		l.mu.Lock()
		l.inflight--
		if it.round == l.round {
			l.fresh--
		}
		out.Gone = out.Gone && a.Endpoint.URL == l.ep.URL // else it says nothing of the address that the endpoint has now
		l.ended(it, out, end)
		it, ep = l.next(), l.ep
		l.dispatch()
	}
}

// ended takes in the outcome of an attempt: what it means for the delivery, and each of its mates,
// and what for the endpoint.
func (l *Lane) ended(it *item, out Outcome, now time.Time) {
	var late []*item
	if out.Apart != nil {
		it, late = l.takeApart(it, out.Apart)
	}
	if it != nil {
		l.judged(it, out, now)
	}
	for _, it := range late {
		l.again(it, Change{State: StateParked, Reason: ReasonBehindEndpoint, Due: now})
	}
}

func (l *Lane) judged(it *item, out Outcome, now time.Time) {
	switch out.Verdict {
	case Delivered:
		l.failing = time.Time{}
		if l.limit < l.ep.Concurrency {
			l.limit++ // one more for every success doubles it with every round
		}
		for ; it != nil; it = it.unmate() {
			l.delivered(it, now)
		}
	case Held:
		for ; it != nil; it = it.unmate() {
			l.again(it, Change{State: StateParked, Reason: cmp.Or(out.Reason, ReasonBreakerOpen)})
		}
		if !out.Until.After(now) {
			out.Until = now.Add(loadBackoff)
		}
		l.pause(cmp.Or(out.Reason, ReasonBreakerOpen), out.Until)
	case Cut:
		c := Change{State: StateParked, Reason: ReasonShutdown}
		if l.state != closed {
			c.Due = now.Add(loadBackoff)
		}
		for ; it != nil; it = it.unmate() {
			l.again(it, c)
		}
	case Dead:
		for ; it != nil; it = it.unmate() {
			if out.Status != 0 { // else no request was made
				it.attempts++
			}
			l.bury(it, out)
		}
	default:
		l.failed(it, out, now)
	}
}

func (l *Lane) delivered(it *item, now time.Time) {
	l.m.delivered.Inc()
	l.relay.metrics.latency.Observe(now.Sub(it.event.Commit).Seconds())
	if it.stored {
		l.uncount(it, Change{State: StateGone}, nil)
	} else {
		l.relay.ledger.Settle(it.span)
	}
	l.leave(it, over)
	l.advance(it)
}

// failed parks a delivery and its mates until their next attempt, or buries those that had their
// last.
func (l *Lane) failed(it *item, out Outcome, now time.Time) {
	if l.failing.IsZero() {
		l.failing = now
	}
	l.log.Info("attempt failed",
		zap.String("event", it.event.ID), zap.Bool("batch", it.mate != nil), zap.Int("attempt", it.attempts+1),
		zap.String("reason", string(out.Reason)), zap.Int("status", out.Status), zap.String("detail", out.Detail))
	if out.Slow {
		l.limit = max(1, l.limit/2)
	}
	asked := min(out.RetryAfter, maxRetryAfter)
	policy := l.ep.Retry
	spread := 1 - policy.Jitter + 2*policy.Jitter*rand.Float64() // one for a batch, so that those with as many attempts stay together
	for ; it != nil; it = it.unmate() {
		if it.attempts++; it.attempts > len(policy.Schedule) {
			l.bury(it, out)
			continue
		}
		step := time.Duration(float64(policy.Schedule[it.attempts-1]) * spread)
		l.again(it, Change{State: StateParked, Reason: out.Reason, Due: now.Add(max(step, asked)), Status: out.Status, Detail: out.Detail})
	}
	switch {
	case out.Gone && !l.gone: // else another endpoint may have its id by now
		l.relay.disable(l.ep, "it answered 410 Gone")
	case !l.gone && l.ep.DisableAfter > 0 && now.Sub(l.failing) > l.ep.DisableAfter:
		l.relay.disable(l.ep, "it has failed for "+l.ep.DisableAfter.String())
	case asked > 0 && (out.Status == 429 || out.Status == 503):
		l.pause(ReasonRetryAfter, now.Add(asked))
	case l.blocked > max(minBlockedKeys, blockedPerEvent*l.relay.cfg.MaxEvents) && l.state == flowing:
		l.pause(ReasonBehindEndpoint, now.Add(overflowPause))
	}
}

// again parks a delivery whose attempt ended without success: its key waits for it.
func (l *Lane) again(it *item, c Change) {
	if it.stored {
		l.put(it, c, nil)
	} else {
		l.insert(it, c, nil)
		if it.maybe && it.key != "" {
			l.doubts = append(l.doubts, it.key)
		}
	}
	if it.key != "" {
		q := l.queue(it.key)
		l.block(q, c.Due)
		rest := q.items
		q.items = nil
		for _, f := range rest {
			if f != it {
				l.unload(f, ReasonBehindKey)
			}
		}
	}
	l.leave(it, left)
	l.dueAt(c.Due)
}

// unload takes a delivery that waits out of memory. One that the store lacks is parked.
func (l *Lane) unload(it *item, why Reason) {
	switch {
	case it.state != waiting:
	case it.stored:
		l.leave(it, left)
	default:
		l.park(it, why)
	}
}

// bury makes a delivery dead. The next one of its key goes when that is written.
func (l *Lane) bury(it *item, out Outcome) {
	l.log.Warn("delivery is dead",
		zap.String("event", it.event.ID), zap.Int("attempts", it.attempts),
		zap.String("reason", string(out.Reason)), zap.Int("status", out.Status), zap.String("detail", out.Detail))
	l.m.deadTotal.Inc()
	l.m.dead.Add(1)
	it.state = ending
	done := func() {
		l.leave(it, over)
		l.advance(it)
		l.dispatch()
	}
	c := Change{State: StateDead, Reason: out.Reason, Status: out.Status, Detail: out.Detail}
	if it.stored {
		c.Notice = l.relay.deathOf(it.event, l.id, it.attempts, out)
		l.uncount(it, c, done)
		return
	}
	l.insert(it, c, nil)
	c.Notice = l.relay.deathOf(it.event, l.id, it.attempts, out)
	l.put(it, c, done)
}

// advance takes an ended delivery from the head of its key and lets the next one go.
func (l *Lane) advance(it *item) {
	q := l.queues[it.key]
	if it.key == "" || q == nil {
		return
	}
	for len(q.items) > 0 && q.items[0].state >= left { // of a batch, those behind it may have ended before it
		q.items[0] = nil
		q.items = q.items[1:]
	}
	if len(q.items) > 0 {
		if q.items[0].state == waiting {
			l.ready.push(q.items[0])
		}
		return
	}
	l.wantNext(q)
	l.tidy(q)
}

// pause stops sending until a time, or until somebody resumes it where that is zero, and takes
// out of memory what is not in flight.
func (l *Lane) pause(why Reason, until time.Time) {
	switch {
	case l.state == closed:
		return
	case l.state == parking && l.until.IsZero():
		return
	case l.state == parking && !until.IsZero() && !until.After(l.until):
		return
	}
	if l.state != parking {
		l.log.Info("parking", zap.String("reason", string(why)), zap.Time("until", until))
	}
	l.state, l.why, l.until = parking, why, until
	l.clear(why)
	l.arm()
}

// drain starts to read back what is parked, from the oldest, with so many attempts at once.
func (l *Lane) drain(limit int) {
	if l.state == closed {
		return
	}
	l.state = draining
	l.clear(ReasonBehindEndpoint)
	l.limit = min(limit, l.ep.Concurrency)
	l.cursor, l.more, l.probing = cdc.Position{}, true, false
	l.dispatch()
	l.arm()
}

// probe drains with one attempt at first, and that is of the oldest delivery.
func (l *Lane) probe() {
	l.drain(1)
	l.probing = true
}

// flow ends the drain: everything that is parked is in memory, or belongs to keys that wait for
// their retry.
func (l *Lane) flow() {
	l.state, l.catching = flowing, false
	tail := l.tail
	l.tail = nil
	for _, it := range tail {
		if it.state == waiting {
			l.enqueue(it)
		}
	}
	l.arm()
}

// close ends the lane: what waits is parked, what is in flight goes on. wait tells when that has
// ended too.
func (l *Lane) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state == closed {
		return
	}
	l.state = closed
	l.relay.lingering.drop(l)
	l.clear(ReasonShutdown)
	for _, t := range []*time.Timer{l.timer, l.bell} {
		if t != nil {
			t.Stop()
		}
	}
}

// remove closes the lane of an endpoint that is gone.
func (l *Lane) remove() {
	l.close()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.gone = true
	if l.relay.paces.leave(l.ep) {
		l.relay.rouse()
	}
}

const (
	restLook = 20 * time.Millisecond
	restTime = 30 * time.Second
)

// strike tells that the endpoint was struck out of the registry at a position: nothing behind it is
// this lane's.
func (l *Lane) strike(at cdc.Position) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.gone, l.last = true, at
}

// retire ends the lane after strike. What it has may still be sent while all goes well.
func (l *Lane) retire(ctx context.Context) {
	look := time.NewTicker(restLook)
	defer look.Stop()
	for end := time.Now().Add(restTime); !l.rests() && time.Now().Before(end); {
		select {
		case <-look.C:
		case <-ctx.Done():
			end = time.Now()
		}
	}
	l.close()
}

// rests tells whether a lane that takes nothing more has nothing to send, or is not allowed to.
func (l *Lane) rests() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state == parking || l.state == closed || !l.failing.IsZero() {
		return true
	}
	if l.inflight > 0 || l.owed.first != nil || l.reads > 0 || l.loading || l.told < l.parks {
		return false
	}
	return l.state == flowing && l.blocked == 0 || l.state == draining && !l.more && !l.ahead
}

// wait has a new lane take nothing but to the store, until goOn: another one of its id is leaving.
func (l *Lane) wait() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.waits = true
	l.state, l.why, l.until = parking, ReasonBehindEndpoint, time.Time{}
}

// goOn ends wait.
func (l *Lane) goOn() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.waits {
		return
	}
	l.waits = false
	l.m.parked.Add(0) // whoever left took the series along
	if l.state == closed {
		return
	}
	if l.ep.Status == Enabled {
		l.drain(l.limit)
	} else {
		l.why = ReasonPaused
	}
}

// setEndpoint takes up new settings. Nothing of what the lane has learned is lost.
func (l *Lane) setEndpoint(ep *Endpoint) {
	l.mu.Lock()
	defer l.mu.Unlock()
	old := l.ep
	l.ep = ep
	l.now.Store(ep)
	l.setPace(old)
	if old.URL != ep.URL {
		l.failing = time.Time{} // that was another address
	}
	if l.limit > ep.Concurrency || l.limit >= old.Concurrency {
		l.limit = ep.Concurrency
	}
	switch {
	case l.waits:
	case ep.Status != Enabled:
		l.pause(ReasonPaused, time.Time{})
	case old.Status != Enabled:
		l.failing = time.Time{}
		l.probe()
	case old.Ordering != ep.Ordering:
		if l.state == flowing {
			l.drain(l.limit)
		}
	default:
		l.dispatch()
	}
}

// clear takes out of memory whatever waits: the next drain finds it in the store, from the
// oldest on. Keys are free again, but those of which something is on its way to the store: what
// is there already may be newer.
func (l *Lane) clear(why Reason) {
	l.catching, l.tail = false, nil
	for it := l.owed.first; it != nil; {
		next := it.next
		l.unload(it, why)
		it = next
	}
	for l.ready.len() > 0 {
		l.unload(l.ready.pop(), why)
	}
	l.keys = nil
	for _, q := range l.queues {
		for _, it := range q.items {
			l.unload(it, why)
		}
		q.items = slices.DeleteFunc(q.items, func(it *item) bool { return it.state >= left })
		q.wanted = false
		q.after = cdc.Position{}
		if len(q.untold) == 0 {
			l.unblock(q)
		}
	}
	l.fresh = 0
	l.round++
}

// letGo parks the deliveries that waited for the end of the drain.
func (l *Lane) letGo() {
	if !l.catching {
		return
	}
	l.catching = false
	tail := l.tail
	l.tail = nil
	for _, it := range tail {
		l.unload(it, ReasonBehindEndpoint)
	}
}

// spill writes to the store whatever arrived before a time and is not settled, so that it no
// longer holds the watermark. What is in flight goes on; what only waits shows that the lane
// cannot keep up, so all of it goes the slow way.
func (l *Lane) spill(before time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	behind := false
	var slow []*queue
	for it := l.owed.first; it != nil && it.arrived.Before(before); {
		next := it.next
		if it.state == flying {
			l.insert(it, Change{State: StateSending, Reason: ReasonSlow}, nil)
		} else if q := l.queues[it.key]; l.catching || it.key == "" || q == nil || len(q.items) == 0 || q.items[0] == it || q.items[0].state == waiting {
			behind = behind || it.state == waiting
		} else if len(slow) == 0 || slow[len(slow)-1] != q {
			slow = append(slow, q)
		}
		it = next
	}
	switch {
	case behind && l.catching:
		l.letGo()
	case behind && l.state == flowing:
		if l.ep.Batch.Linger < l.relay.cfg.SpillAfter {
			l.log.Info("draining: the endpoint cannot keep up, its deliveries go through walhook.deliveries")
		}
		l.drain(l.limit)
	default:
		for _, q := range slow {
			n := slices.IndexFunc(q.items, func(it *item) bool { return it.state == waiting }) // behind what is in flight
			if n < 0 {
				continue
			}
			rest := q.items[n:]
			q.items = q.items[:n:n]
			for _, it := range rest {
				l.unload(it, ReasonBehindKey)
			}
		}
	}
}

// overflow sends what waits the slow way.
func (l *Lane) overflow() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state == flowing && l.ready.len() > 0 {
		l.drain(l.limit)
	}
}

// dueAt makes the lane look into the store at t at the latest.
func (l *Lane) dueAt(t time.Time) {
	if !t.IsZero() && (l.nextDue.IsZero() || t.Before(l.nextDue)) {
		l.nextDue = t
		l.arm()
	}
}

// arm sets the timer to what the lane waits for. What is overdue waits for a load under way, or
// for the lease: the end of either looks again.
func (l *Lane) arm() {
	at := l.nextDue
	switch l.state {
	case parking:
		at = l.until
	case closed:
		at = time.Time{}
	}
	now := time.Now()
	switch {
	case at.IsZero() || at.Equal(l.timerAt):
		return
	case l.state != parking && !at.After(now):
		l.load()
		return
	}
	l.timerAt = at
	if l.timer == nil {
		l.timer = time.AfterFunc(at.Sub(now), l.ring)
		return
	}
	l.timer.Reset(at.Sub(now))
}

func (l *Lane) ring() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.timerAt = time.Time{}
	if l.state == parking && !l.until.IsZero() && !time.Now().Before(l.until) {
		l.probe()
		return
	}
	l.arm()
}

// want puts a key on the list of those to be loaded.
func (l *Lane) want(q *queue) {
	if q.wanted {
		return
	}
	q.wanted = true
	l.keys = append(l.keys, q)
	l.load()
}

// wantNext loads more of a key that waits for nothing else.
func (l *Lane) wantNext(q *queue) {
	if q.blocked && len(q.items) == 0 && l.state != parking && !q.due.After(time.Now()) {
		l.want(q)
	}
}

// load reads from the store what may go next: keys whose head is done, retries that are due,
// and while draining the next page. One load is under way at a time. While there is no room it
// reads little, and only when what it read before is done and written: a store that can be read
// and not written would else come to stand in memory as a whole.
func (l *Lane) load() {
	if len(l.keys) == 0 && l.nextDue.IsZero() && (l.state != draining || !l.more) {
		return // as on most calls: nothing of it is in the store
	}
	ahead := min(max(8*l.limit*max(1, l.ep.Batch.MaxEvents), 32), 2*scanPage)
	if l.loading || l.state == parking || l.loaded > ahead/2 && l.ready.len() > 0 || !l.mayWork() {
		return
	}
	ledger, most := l.relay.ledger, min(scanPage, ahead)
	bytes := ledger.maxBytes / 16
	if !ledger.mayRead() {
		if l.reads > 0 {
			return
		}
		most, bytes = shortPage, bytes/64
	}
	var read reading
	switch {
	case len(l.keys) > 0:
		read = l.loadKey(min(l.keyPage(), most), bytes)
	case !l.nextDue.IsZero() && !time.Now().Before(l.nextDue):
		read = l.loadDue(min(duePage, most)+l.reads, bytes+l.readSize) // it shows what is in memory too
	case l.state == draining && l.more:
		read = l.scan(most, bytes)
	default:
		return
	}
	ledger.read.add(0, bytes)
	l.loading = true
	l.workers.Add(1)
	go func() {
		defer l.workers.Done()
		take, err := read(l.relay.sendCtx)
		l.mu.Lock()
		defer l.mu.Unlock()
		ledger.read.add(0, -bytes)
		if err == nil {
			take()
		}
		l.loading = false
		for _, g := range l.ghosts {
			if l.held[g.pos] == g.it {
				delete(l.held, g.pos)
			}
		}
		l.ghosts = nil
		if err != nil {
			if l.relay.sendCtx.Err() == nil {
				l.log.Warn("parked deliveries cannot be read", zap.Error(err))
			}
			l.dueAt(time.Now().Add(loadBackoff))
			return
		}
		l.dispatch()
		l.arm()
	}()
}

// reading reads from the store without the lane's lock and returns what to do with it under the lock.
type reading func(context.Context) (take func(), err error)

// sight is how far what a load reads can be relied on: behind it rows may be missing that come
// before those that are there. It is taken before the load.
type sight struct {
	untold cdc.Position // the first of what is on its way to the store; zero where nothing is
	reach  reach        // how far the stream has come
}

// sees tells whether a row may be taken up. Where not, the load is to be made again: at once, or
// by whoever tells of a commit or of the stream's progress.
func (l *Lane) sees(v sight, untold positions, row Stored) (ok, again bool) {
	pos := row.Event.Position
	h := l.held[pos]
	switch {
	case v.untold != (cdc.Position{}) && pos.Compare(v.untold) > 0:
		return false, untold.least() != v.untold
	case !v.reach.has(pos):
		l.ahead = true
		l.relay.rouse()
		return false, false
	case h != nil && h.state == left: // it was parked again, maybe since the row was read
		return false, h.changes == 0
	}
	return true, false
}

// beyond tells whether a row is of another endpoint, which came later.
func (l *Lane) beyond(row Stored) bool {
	return l.last != (cdc.Position{}) && row.Event.Position.Compare(l.last) > 0
}

// own cuts off the rows, in commit order, that are beyond.
func (l *Lane) own(rows []Stored, more bool) ([]Stored, bool) {
	if i := slices.IndexFunc(rows, l.beyond); i >= 0 {
		return rows[:i], false
	}
	return rows, more
}

// scan is the reading that reads the next page of what is parked, in commit order.
func (l *Lane) scan(limit int, maxBytes int64) reading {
	var skip []string
	for key, q := range l.queues {
		if q.blocked {
			if skip = append(skip, key); len(skip) == maxSkip {
				break
			}
		}
	}
	cursor, parks, round, settled, v := l.cursor, l.parks, l.round, l.told == l.parks, sight{l.untold.least(), l.relay.reached()}
	return func(ctx context.Context) (func(), error) {
		rows, more, err := l.relay.store.Scan(ctx, l.id, cursor, skip, limit, maxBytes)
		return func() {
			if l.round == round && l.state == draining {
				l.scanned(v, rows, more, settled && l.parks == parks)
			}
		}, err
	}
}

// scanned takes up a page. whole tells that nothing was on its way to the store meanwhile that
// the page may lack.
func (l *Lane) scanned(v sight, rows []Stored, more, whole bool) {
	now := time.Now()
	rows, more = l.own(rows, more)
	for _, row := range rows {
		if ok, again := l.sees(v, l.untold, row); !ok {
			l.more = again
			return
		}
		l.cursor = row.Event.Position
		q := l.queues[row.OrderKey]
		switch {
		case l.held[row.Event.Position] != nil: // memory has it, and had it perhaps before its time
		case row.OrderKey != "" && q != nil && q.blocked:
		// Better the oldest a little before its time than a newer one.
		case row.Due.After(now) && !(l.probing && row.Due.Before(now.Add(l.ep.Breaker.OpenFor))):
			if row.OrderKey != "" {
				l.block(l.queue(row.OrderKey), row.Due)
			}
			l.dueAt(row.Due)
		default:
			l.take(row)
			l.probing = false
			if q = l.queues[row.OrderKey]; q != nil && len(q.items) >= l.keyPage() {
				l.block(q, time.Time{}) // the rest of it is read by its key
				q.after = row.Event.Position
			}
		}
	}
	switch l.more = more; {
	case more:
	case whole:
		l.flow()
	default:
		l.catching = true
		l.more = l.told == l.parks
	}
}

// keyPage is how many deliveries of one key are read at once.
func (l *Lane) keyPage() int { return min(max(keyPage, l.ep.Batch.MaxEvents), scanPage) }

// loadKey is the reading that reads the next rows of the first key on the list.
func (l *Lane) loadKey(limit int, maxBytes int64) reading {
	q := l.keys[0]
	after, parks, round, settled, v := q.after, q.parks, l.round, len(q.untold) == 0, sight{q.untold.least(), l.relay.reached()}
	return func(ctx context.Context) (func(), error) {
		rows, more, err := l.relay.store.ScanKey(ctx, l.id, q.key, after, limit, maxBytes)
		return func() {
			if l.round != round || len(l.keys) == 0 || l.keys[0] != q {
				return
			}
			l.keys = l.keys[1:]
			q.wanted = false
			if q.blocked && len(q.items) == 0 {
				l.keyLoaded(q, v, rows, more, settled && q.parks == parks)
			}
			l.tidy(q)
		}, err
	}
}

func (l *Lane) keyLoaded(q *queue, v sight, rows []Stored, more, whole bool) {
	now := time.Now()
	rows, more = l.own(rows, more)
	for _, row := range rows {
		if ok, again := l.sees(v, q.untold, row); !ok {
			if again {
				l.wantNext(q)
			}
			return
		}
		if len(q.items) == 0 && row.Due.After(now) {
			l.block(q, row.Due)
			l.dueAt(row.Due)
			return
		}
		q.after = row.Event.Position
		q.due = time.Time{}
		l.take(row)
	}
	switch {
	case more:
		l.wantNext(q)
	case whole:
		l.unblock(q) // all of them are in memory
	case len(q.untold) == 0:
		l.wantNext(q)
	}
}

// loadDue is the reading that finds the retries whose time has come.
func (l *Lane) loadDue(limit int, maxBytes int64) reading {
	round, reach := l.round, l.relay.reached()
	now := time.Now()
	l.nextDue = time.Time{}
	return func(ctx context.Context) (func(), error) {
		keys, loose, next, err := l.relay.store.Due(ctx, l.id, now, limit, maxBytes)
		return func() {
			if l.round != round {
				next = now
			} else {
				news := false
				for _, key := range keys {
					if q := l.queue(key); len(q.items) == 0 && !q.wanted {
						l.block(q, time.Time{})
						l.want(q)
						news = news || len(q.untold) == 0 // else what was read may be from before a change that is on its way
					}
				}
				for _, row := range loose {
					if !reach.has(row.Event.Position) { // it comes again, and would go twice
						l.ahead = true
						l.relay.rouse()
						continue
					}
					news = l.take(row) || news
				}
				l.settleDoubts(now)
				if (!news || l.ahead) && !next.IsZero() && !next.After(now) {
					next = now.Add(loadBackoff) // more are due, but those are all in memory, or wait for the stream
				}
			}
			l.dueAt(next)
		}, err
	}
}

// settleDoubts reads the keys whose time has come although no row of them may be due: a row that
// a crash left in the store stays as it is when we park it again, and may be dead.
func (l *Lane) settleDoubts(now time.Time) {
	l.doubts = slices.DeleteFunc(l.doubts, func(key string) bool {
		q := l.queues[key]
		if q != nil && q.blocked && q.due.After(now) {
			return false
		}
		if q != nil {
			l.wantNext(q)
		}
		return true
	})
}

// take puts a row that was read back into memory. It tells false where memory knows better.
func (l *Lane) take(row Stored) bool {
	if l.held[row.Event.Position] != nil || l.beyond(row) {
		return false
	}
	row.Event.prepare(l.ep)
	it := &item{event: row.Event, key: row.OrderKey, attempts: row.Attempts, stored: true, read: true, arrived: time.Now()}
	l.held[row.Event.Position] = it
	l.loaded++
	l.reads++
	l.readSize += row.Event.Size()
	l.relay.ledger.read.add(1, row.Event.Size())
	l.enqueue(it)
	return true
}

// itemList is a list of items in the order in which they arrived.
type itemList struct{ first, last *item }

func (l *itemList) push(it *item) {
	if it.prev = l.last; l.last == nil {
		l.first = it
	} else {
		l.last.next = it
	}
	l.last = it
}

// remove takes an item out; one that is not in the list is left alone.
func (l *itemList) remove(it *item) {
	if it.prev == nil && it.next == nil && l.first != it {
		return
	}
	if it.prev == nil {
		l.first = it.next
	} else {
		it.prev.next = it.next
	}
	if it.next == nil {
		l.last = it.prev
	} else {
		it.next.prev = it.prev
	}
	it.prev, it.next = nil, nil
}

// fifo are the items that are ready, and some that no longer are.
type fifo struct{ line[*item] }

// peek is the first that waits, which pop is to return; nil where there is none.
func (f *fifo) peek() *item {
	for f.len() > 0 {
		if it := f.first(); it.state == waiting {
			return it
		}
		f.pop()
	}
	return nil
}

// maxIdleLine is for how many an empty line keeps its memory.
const maxIdleLine = 16 << 10

// line is a queue that allocates nothing while it gets no longer.
type line[T any] struct {
	all  []T
	head int
}

func (q *line[T]) len() int { return len(q.all) - q.head }

func (q *line[T]) push(v T) { q.all = append(q.all, v) }

func (q *line[T]) rest() []T { return q.all[q.head:] }

// first and pop are of a line with somebody in it.
func (q *line[T]) first() T { return q.all[q.head] }

func (q *line[T]) pop() T {
	var none T
	v := q.all[q.head]
	q.all[q.head] = none
	q.head++
	switch {
	case q.head == len(q.all):
		if q.all, q.head = q.all[:0], 0; cap(q.all) > maxIdleLine {
			q.all = nil
		}
	case q.head > 1024 && q.head > len(q.all)/2:
		n := copy(q.all, q.all[q.head:])
		clear(q.all[n:])
		q.all, q.head = q.all[:n], 0
	}
	return v
}

// unpop puts somebody in front.
func (q *line[T]) unpop(v T) {
	if q.head > 0 {
		q.head--
		q.all[q.head] = v
		return
	}
	q.all = slices.Insert(q.all, 0, v)
}

// positions are those of rows on their way to the store. They are told of in the order in which
// they were put, which is not always that of the rows.
type positions []cdc.Position

func (p *positions) push(pos cdc.Position) { *p = append(*p, pos) }

func (p *positions) pop() {
	if *p = (*p)[1:]; len(*p) == 0 {
		*p = nil
	}
}

// least is zero where there are none.
func (p positions) least() cdc.Position {
	if len(p) == 0 {
		return cdc.Position{}
	}
	return slices.MinFunc(p, cdc.Position.Compare)
}
