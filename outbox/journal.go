package outbox

import (
	"context"
	"errors"
	"sync"
	"time"

	"go.uber.org/zap"
)

const (
	journalBatch      = 2000    // changes in one transaction
	journalBatchBytes = 8 << 20 // of event content in one transaction, beyond the first
	journalMaxBackoff = 5 * time.Second

	// A transaction of few changes costs Postgres as much as one of many. So one that follows the one before it
	// within journalPause waits so long for more, unless that many are there.
	journalPause = 50 * time.Millisecond
	journalMany  = 500
	// lullWait is how long the next part of a small transaction waits for a lull. Parts that begin right behind an event, while the
	// next one is still to come, are as if they were not there; a transaction in one piece keeps one of two
	// processors from three events, and they show in the 99th percentile.
	lullWait = 5 * time.Millisecond
)

// journal writes changes to the store in batches: whatever gathered while the last commit was
// under way, or for a moment after it, goes with the next one. A batch that fails is tried again for ever, in its order;
// meanwhile the deliveries in it stay in memory and owed, and the full buffer carries that to
// the slot.
type journal struct {
	store Store
	log   *zap.Logger
	many  int                    // changes that do not wait for more
	much  int64                  // bytes of content that do not
	lull  func() <-chan struct{} // closed at the next good moment for a part of a transaction

	mu      sync.Mutex // guards what follows
	queue   []*entry
	size    int64                  // of the events that are new in queue
	byKey   map[deliveryKey]*entry // those of queue: not yet in a transaction
	writing int                    // entries in the transaction under way
	failed  error                  // of the latest write; nil once one succeeded
	urgent  bool                   // somebody waits for one of queue
	idle    chan struct{}          // closed when nothing is queued or under way; nil while nobody waits
	signal  chan struct{}

	changes []Change // of the transaction under way; run's alone
}

type deliveryKey struct{ endpoint, event string }

// entry is a change on its way. done runs after its commit, on the journal's goroutine, and so do
// those of the older changes whose place it took, before it.
type entry struct {
	change Change
	size   int64 // of the event, where it is to be written too
	older  []func()
	done   func()
}

// newJournal makes a journal for a buffer of so many events and bytes. A full one waits for commits, so many changes are fewer
// in a small one.
func newJournal(store Store, log *zap.Logger, events int, bytes int64) *journal {
	return &journal{
		store: store, log: log.Named("journal"), many: max(1, min(journalMany, events/4)), much: bytes / 4,
		byKey:  map[deliveryKey]*entry{},
		signal: make(chan struct{}, 1),
	}
}

// put queues a change. One that meets an older one of its delivery in the queue takes its place:
// only the last state counts, and a row that was to be inserted and is gone again needs no write.
func (j *journal) put(c Change, done func()) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if c.State == StateDead && !j.urgent { // the next one of its key goes when that is written
		j.urgent = true
		j.tell()
	}
	k := deliveryKey{c.EndpointID, c.Event.ID}
	if e := j.byKey[k]; e != nil {
		c.Insert = e.change.Insert
		e.change = c
		e.older, e.done = append(e.older, e.done), done
		return
	}
	e := &entry{change: c, done: done}
	if c.Insert {
		e.size = c.Event.Size()
	}
	j.byKey[k] = e
	j.queue = append(j.queue, e)
	if j.size += e.size; len(j.queue) == 1 || j.hurry() {
		j.tell()
	}
}

// hurry tells whether what is queued is not to wait. It is called with mu locked.
func (j *journal) hurry() bool {
	return len(j.queue) >= j.many || j.size >= j.much || j.urgent || j.idle != nil
}

// tell has gather look again.
func (j *journal) tell() {
	select {
	case j.signal <- struct{}{}:
	default:
	}
}

// run writes until ctx ends. It returns ErrFenced where another instance has taken over.
func (j *journal) run(ctx context.Context) error {
	backoff := time.Duration(0)
	var began time.Time // the latest transaction
	for {
		if !j.gather(ctx, began) {
			return nil
		}
		began = time.Now()
		batch, hurry := j.take()
		for {
			err := j.write(ctx, batch, hurry)
			if err == nil {
				backoff = 0
				break
			}
			hurry = true
			if errors.Is(err, ErrFenced) {
				return err
			}
			if ctx.Err() != nil {
				return nil
			}
			backoff = min(max(2*backoff, 50*time.Millisecond), journalMaxBackoff)
			j.fail(err)
			t := time.NewTimer(backoff)
			select {
			case <-ctx.Done():
				t.Stop()
				return nil
			case <-t.C:
			}
		}
		for _, e := range batch {
			for _, done := range e.older {
				done()
			}
			e.done()
		}
		j.settled()
	}
}

// gather waits until there is something to write, and then, where the latest transaction has only just begun, for
// more. It tells false where ctx ended.
func (j *journal) gather(ctx context.Context, began time.Time) bool {
	var pause *time.Timer
	var over <-chan time.Time
	for {
		j.mu.Lock()
		queued := len(j.queue)
		enough := j.hurry()
		j.mu.Unlock()
		if queued > 0 {
			if enough || time.Since(began) >= journalPause {
				return true
			}
			if pause == nil {
				pause = time.NewTimer(journalPause - time.Since(began))
				defer pause.Stop()
				over = pause.C
			}
		}
		select {
		case <-ctx.Done():
			return false
		case <-j.signal:
		case <-over:
			return true
		}
	}
}

// pause waits for the next lull, but for no longer than lullWait. It tells false, and waits no more, where somebody waits for what is
// queued: that is behind what is under way.
func (j *journal) pause(ctx context.Context) bool {
	lull := j.lull()
	timer := time.NewTimer(lullWait)
	defer timer.Stop()
	for {
		j.mu.Lock()
		hurry := j.hurry()
		j.mu.Unlock()
		if hurry {
			return false
		}
		select {
		case <-ctx.Done():
			return false
		case <-lull:
			return true
		case <-timer.C:
			return true
		case <-j.signal: // gather looks for itself
		}
	}
}

func (j *journal) write(ctx context.Context, batch []*entry, hurry bool) error {
	defer func() {
		clear(j.changes) // else it would keep the events
		j.changes = j.changes[:0]
	}()
	for _, e := range batch {
		if !e.change.Insert || e.change.State != StateGone {
			j.changes = append(j.changes, e.change)
		}
	}
	if len(j.changes) == 0 {
		return nil
	}
	if hurry {
		return j.store.Write(ctx, j.changes)
	}
	return j.store.WriteInParts(ctx, j.changes, func() bool { return j.pause(ctx) })
}

// take takes from the queue what makes a transaction, and tells whether that is in a hurry.
func (j *journal) take() (batch []*entry, hurry bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	hurry = j.hurry()
	n, size := 0, int64(0)
	for n < len(j.queue) && n < journalBatch {
		more := j.queue[n].size
		if n > 0 && size+more > journalBatchBytes {
			break
		}
		size += more
		n++
	}
	j.size -= size
	batch = j.queue[:n:n]
	if j.queue = j.queue[n:]; len(j.queue) == 0 {
		j.queue, j.urgent = nil, false
	}
	for _, e := range batch {
		delete(j.byKey, deliveryKey{e.change.EndpointID, e.change.Event.ID})
	}
	j.writing = n
	return batch, hurry
}

func (j *journal) fail(err error) {
	j.mu.Lock()
	first := j.failed == nil
	j.failed = err
	j.mu.Unlock()
	if first {
		j.log.Error("nothing can be parked: the schema walhook cannot be written; deliveries wait in memory", zap.Error(err))
	}
}

func (j *journal) settled() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.writing = 0
	if j.failed != nil {
		j.failed = nil
		j.log.Info("the schema walhook can be written again")
	}
	if j.idle != nil && len(j.queue) == 0 {
		close(j.idle)
		j.idle = nil
	}
}

// err is why nothing can be written now; nil where nothing is known against it.
func (j *journal) err() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.failed
}

// flush waits until everything that was put is committed, or until ctx ends.
func (j *journal) flush(ctx context.Context) error {
	for {
		j.mu.Lock()
		if len(j.queue) == 0 && j.writing == 0 {
			j.mu.Unlock()
			return nil
		}
		if j.idle == nil {
			j.idle = make(chan struct{})
			j.tell()
		}
		idle := j.idle
		j.mu.Unlock()
		select {
		case <-idle:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
