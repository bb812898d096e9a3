package outbox

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/walhook/walhook/cdc"
)

// Ledger knows what is owed. Rows are opened in commit order and settled in any order; Low is
// the watermark below which nothing is owed. It also counts the memory that events hold, and
// so knows whether there is room for more.
//
// Settled means: delivered, wanted by nobody, or committed to the schema walhook. A commit of
// ours is safe on this server at once; that it is safe on a standby too is proved where the slot
// is told (cdc.Stream.Confirm waits until the stream has passed the checkpoint's own commit,
// which lies behind every commit that the checkpoint counts on).
type Ledger struct {
	maxEvents int64
	maxBytes  int64

	came   pool         // what the stream brought
	read   pool         // what was read back from the store: a quarter of the buffer, or little more
	owed   atomic.Int64 // deliveries of what the stream brought that are in memory
	window atomic.Int64 // of events: at most maxEvents, less while the machine is the limit
	full   atomic.Bool  // somebody waits for room
	wait   atomic.Int64 // shortest wait from arrival to attempt since the last Adapt, ns; -1 none
	busy   atomic.Int64 // what all attempts since then took, ns

	adapted time.Time // when Adapt was last called, by the one goroutine that does

	mu         sync.Mutex // guards what follows
	head, tail *span      // what is not settled, and settled runs between; head is always owed
	low        Checkpoint
	opened     Checkpoint    // the last row given to its lanes, and the last end closed
	opening    cdc.Position  // the last row opened
	room       chan struct{} // closed when there is room again; nil while there is
	fullSince  time.Time
}

// pool is a part of the buffer.
type pool struct{ events, bytes atomic.Int64 }

func (p *pool) add(events, bytes int64) {
	p.events.Add(events)
	p.bytes.Add(bytes)
}

// span is a run of rows, one row while something of it is owed. Settled neighbours melt into
// one, so a million settled rows behind one that is owed are one span.
type span struct {
	pos        cdc.Position // of its last row
	end        cdc.LSN      // what is settled for good with it: a commit's end; zero inside a transaction
	owed       int
	arrived    time.Time
	held       atomic.Int32 // deliveries that have its event in memory
	prev, next *span
}

// minWindow is how many events are in memory at least before intake waits, startWindow how many
// until it has shown how fast they leave. With parkWindow there is a transaction of the journal's to come, whatever it is
// writing.
const (
	minWindow   = 512
	startWindow = 1024
	parkWindow  = 2 * journalBatch
)

// NewLedger makes a Ledger for at most that many events and bytes in memory.
func NewLedger(maxEvents int, maxBytes int64) *Ledger {
	l := &Ledger{maxEvents: int64(maxEvents), maxBytes: maxBytes}
	l.window.Store(min(startWindow, l.maxEvents))
	l.wait.Store(-1)
	return l
}

// Reset starts the ledger at a checkpoint. Nothing may be owed.
func (l *Ledger) Reset(at Checkpoint) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.head == nil && l.low == (Checkpoint{}) {
		l.low, l.opened, l.opening = at, at, at.Position
	}
}

// Open enters a row that is owed to n endpoints; n may be zero.
func (l *Ledger) Open(pos cdc.Position, n int, now time.Time) *span {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.opened.Position, l.opening = l.opening, pos
	switch {
	case n == 0 && l.tail == nil:
		l.low.Position = pos
		return nil
	case n == 0 && l.tail.owed == 0:
		l.tail.pos = pos
		return nil
	}
	s := &span{pos: pos, owed: n, arrived: now, prev: l.tail}
	s.held.Store(int32(n))
	if l.tail == nil {
		l.head = s
	} else {
		l.tail.next = s
	}
	l.tail = s
	return s
}

// Close says that everything up to end was opened: a commit ends there, or a keepalive between
// transactions does.
func (l *Ledger) Close(end cdc.LSN) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.opened.LSN, l.opened.Position = max(l.opened.LSN, end), l.opening
	if l.tail == nil {
		l.low.LSN = max(l.low.LSN, end)
		return
	}
	l.tail.end = max(l.tail.end, end)
}

// Settle takes one delivery off what is owed for a row.
func (l *Ledger) Settle(s *span) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.owed--; s.owed > 0 {
		return
	}
	if s.owed < 0 {
		panic("outbox: a delivery was settled twice")
	}
	if s != l.head {
		if p := s.prev; p.owed == 0 {
			p.absorb(l)
			s = p
		}
		if s.next != nil && s.next.owed == 0 {
			s.absorb(l)
		}
		return
	}
	for l.head != nil && l.head.owed == 0 {
		h := l.head
		l.low.Position = h.pos
		l.low.LSN = max(l.low.LSN, h.end)
		if l.head = h.next; l.head == nil {
			l.tail = nil
		} else {
			l.head.prev, h.next = nil, nil // or one that somebody still points to would keep all that came after it
		}
	}
}

// absorb melts the next span into s; both are settled.
func (s *span) absorb(l *Ledger) {
	n := s.next
	s.pos = n.pos
	s.end = max(s.end, n.end)
	if s.next = n.next; s.next == nil {
		l.tail = s
	} else {
		s.next.prev = s
	}
}

// Low is the watermark: nothing that committed below its LSN is owed, and inside the
// transaction that follows nothing up to its Position. It never passes an unsettled delivery,
// whatever order the lanes finish in.
func (l *Ledger) Low() Checkpoint {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.low
}

// Opened is how far rows were opened and given to their lanes: those up to its Position, and those
// that committed below its LSN. The latest may be on its way to them, and is none of it yet.
func (l *Ledger) Opened() Checkpoint {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.opened
}

// Oldest is when the row that holds the watermark arrived; zero where nothing is owed.
func (l *Ledger) Oldest() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.head == nil {
		return time.Time{}
	}
	return l.head.arrived
}

// Hold counts an event of the stream into memory, and its n deliveries, each of which is released. It never refuses:
// whoever brings an event has asked Room.
func (l *Ledger) Hold(e *Event, n int) {
	l.came.add(1, e.Size())
	l.owed.Add(int64(n))
}

// Release says that a delivery no longer has its row's event in memory; the last one counts it
// out.
func (l *Ledger) Release(s *span, e *Event) {
	l.owed.Add(-1)
	if s.held.Add(-1) == 0 {
		l.came.add(-1, -e.Size())
	}
	l.wake()
}

// wake tells who waits for room that there is some: for several events, or a full buffer would be one hand-over for each.
func (l *Ledger) wake() {
	if !l.full.Load() || !l.fits(roomAtOnce) {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.room != nil && l.fits(roomAtOnce) {
		close(l.room)
		l.room, l.fullSince = nil, time.Time{}
		l.full.Store(false)
	}
}

// roomAtOnce is for how many events there is to be room, once it ran out.
const roomAtOnce = 32

// fits tells whether there is room for so many events, or for an eighth of the window where that is less.
func (l *Ledger) fits(events int64) bool {
	window := l.window.Load()
	return l.came.events.Load() <= window-max(1, min(events, window/8)) && l.came.bytes.Load() < l.maxBytes*3/4 &&
		l.owed.Load() < deliveriesPerEvent*window
}

// deliveriesPerEvent is for how many endpoints an event in memory may be on average. Each delivery takes memory too, and
// time before those behind it.
const deliveriesPerEvent = 2

// mayRead tells whether there is room for more of what the store holds. It has a room of its own,
// so that the backlog of one endpoint keeps no new event of another one out.
func (l *Ledger) mayRead() bool {
	return l.read.events.Load() < max(1, l.maxEvents/4) && l.read.bytes.Load() < l.maxBytes/4
}

// tight tells that memory is full, and what holds it should go.
func (l *Ledger) tight() bool { return l.full.Load() || !l.mayRead() }

// Room is nil while there is room for an event, else a channel that is closed when there is.
func (l *Ledger) Room() <-chan struct{} {
	if l.fits(1) {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.room == nil {
		l.full.Store(true)
		if l.fits(1) { // asked again now that every Release looks, so that none is missed
			l.full.Store(false)
			return nil
		}
		l.room, l.fullSince = make(chan struct{}), time.Now()
	}
	return l.room
}

// FullSince is when Room last ran out; zero while there is room.
func (l *Ledger) FullSince() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.fullSince
}

// Held tells how many events, and bytes of them, are in memory.
func (l *Ledger) Held() (events, bytes int64) {
	return l.came.events.Load() + l.read.events.Load(), l.came.bytes.Load() + l.read.bytes.Load()
}

// Attempted notes how long a delivery waited in memory for its attempt, and how long that took.
func (l *Ledger) Attempted(wait, took time.Duration) {
	l.busy.Add(int64(took))
	for {
		w := l.wait.Load()
		if w >= 0 && w <= int64(wait) || l.wait.CompareAndSwap(w, int64(wait)) {
			return
		}
	}
}

// Adapt sizes the window so that an event waits in memory for no more than a hundredth of target where the machine
// itself is the limit: otherwise a backlog that we read faster than we send would grow old in memory and be parked
// for nothing, and fill memory to no gain. The shortest wait decides, so one slow endpoint does not narrow the window for
// the others. It has twice as many events as attempts were under way on average (which is, as Little's law says,
// the time they took over the time that went by), so that receivers that are far away find the next one ready.
// Where no attempt ended since the last call and memory is full all the same, it waits for what is being parked, and more
// of that at once costs less: so up to parkWindow.
//
// It tells whether the machine is the limit: then whatever waits does so for the machine, and not for an endpoint.
func (l *Ledger) Adapt(target time.Duration, now time.Time) (strained bool) {
	busy, gone := l.busy.Swap(0), now.Sub(l.adapted)
	l.adapted = now
	least := int64(minWindow)
	if gone > 0 {
		least = max(least, 2*busy/int64(gone))
	}
	w := time.Duration(l.wait.Swap(-1))
	switch parking := w < 0 && l.full.Load() && l.window.Load() < parkWindow; {
	case w > target/100:
		strained = true
		l.window.Store(min(l.maxEvents, max(least, l.window.Load()*3/4)))
	case parking, w >= 0 && w < target/200:
		l.window.Store(min(l.maxEvents, max(least, l.window.Load()*5/4+64)))
		l.wake()
	}
	return strained
}
