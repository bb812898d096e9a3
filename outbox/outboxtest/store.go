package outboxtest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
)

// ErrInjected is what a call answers that was told to fail.
var ErrInjected = errors.New("injected failure")

// Row is a row of walhook.deliveries.
type Row struct {
	EndpointID string
	Event      *outbox.Event
	OrderKey   string
	State      outbox.State
	Reason     outbox.Reason
	Attempts   int
	Due        time.Time
	Status     int
	Detail     string

	at time.Time // when it was written first
}

type rowKey struct{ endpoint, event string }

// Store is an outbox.Store in memory. Use New.
type Store struct {
	mu          sync.Mutex // guards what follows
	rows        map[rowKey]*Row
	events      map[string]*outbox.Event
	checkpoint  outbox.Checkpoint
	checkpoints int
	writes      int
	fenced      bool
	wal         cdc.LSN
	proof       func() cdc.LSN
	failWrites  fault
	loseAnswers fault
	failReads   fault
	failSaves   fault
	blocked     chan struct{} // closed by release; nil while writes are free
}

var _ outbox.Store = (*Store)(nil)

// fault is an error for the next n calls.
type fault struct {
	n   int
	err error
}

func (f *fault) take() error {
	if f.n == 0 {
		return nil
	}
	f.n--
	return f.err
}

// New is an empty store whose slot is held.
func New() *Store {
	return &Store{rows: map[rowKey]*Row{}, events: map[string]*outbox.Event{}, wal: 1 << 32}
}

// FailWrites makes the next n calls of Write and Bury fail with err (ErrInjected where it is
// nil) and change nothing. A negative n is for ever, zero ends it.
func (s *Store) FailWrites(n int, err error) { s.fail(&s.failWrites, n, err) }

// LoseAnswers makes the next n calls of Write and Bury do their work and then answer err.
func (s *Store) LoseAnswers(n int, err error) { s.fail(&s.loseAnswers, n, err) }

// FailReads makes the next n calls of Scan, ScanKey, Due and Backlogs fail.
func (s *Store) FailReads(n int, err error) { s.fail(&s.failReads, n, err) }

// FailCheckpoints makes the next n calls of SaveCheckpoint fail and change nothing.
func (s *Store) FailCheckpoints(n int, err error) { s.fail(&s.failSaves, n, err) }

func (s *Store) fail(f *fault, n int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	*f = fault{n: n, err: cmp.Or(err, ErrInjected)}
}

// BlockWrites makes Write and Bury wait, until release is called or their context ends.
func (s *Store) BlockWrites() (release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.blocked == nil {
		s.blocked = make(chan struct{})
	}
	gate := s.blocked
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.blocked == gate {
			s.blocked = nil
			close(gate)
		}
	}
}

// Fence takes the slot away: every write fails with outbox.ErrFenced from here on.
func (s *Store) Fence() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fenced = true
}

// Claim gives the slot to a new holder, as after a restart: what was sending is parked.
func (s *Store) Claim() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fenced = false
	for _, r := range s.rows {
		if r.State == outbox.StateSending {
			r.State = outbox.StateParked
		}
	}
}

// Prove makes position the source of what SaveCheckpoint returns: the end of a simulated WAL.
// It is called with the store locked. Without it a position of our own grows with each write.
func (s *Store) Prove(position func() cdc.LSN) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.proof = position
}

// Rows are all deliveries, by endpoint and then in commit order.
func (s *Store) Rows() []Row {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]Row, 0, len(s.rows))
	for _, r := range s.rows {
		all = append(all, *r)
	}
	slices.SortFunc(all, func(a, b Row) int {
		return cmp.Or(cmp.Compare(a.EndpointID, b.EndpointID), a.Event.Position.Compare(b.Event.Position), cmp.Compare(a.Event.ID, b.Event.ID))
	})
	return all
}

// EventCount is how many events have their content here.
func (s *Store) EventCount() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.events)
}

// Writes is how many calls of Write and Bury changed something or could have.
func (s *Store) Writes() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.writes
}

// Checkpoint is the latest one saved and how many were.
func (s *Store) Checkpoint() (c outbox.Checkpoint, saves int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.checkpoint, s.checkpoints
}

// write does change between the failures that were asked for.
func (s *Store) write(ctx context.Context, what string, change func()) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.blocked != nil && ctx.Err() == nil {
		gate := s.blocked
		s.mu.Unlock()
		select {
		case <-gate:
		case <-ctx.Done():
		}
		s.mu.Lock()
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if s.fenced {
		return fmt.Errorf("%s: %w", what, outbox.ErrFenced)
	}
	if err := s.failWrites.take(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	s.writes++
	s.wal += 64
	change()
	if err := s.loseAnswers.take(); err != nil {
		return fmt.Errorf("%s: commit: %w", what, err)
	}
	return nil
}

// Write applies the changes.
func (s *Store) Write(ctx context.Context, changes []outbox.Change) error {
	if len(changes) == 0 {
		return nil
	}
	return s.write(ctx, "write deliveries", func() {
		for _, c := range changes {
			s.apply(c)
		}
		for _, c := range changes {
			if c.State == outbox.StateGone {
				s.collect(c.Event.ID)
			}
		}
	})
}

// WriteInParts pauses twice before the changes.
func (s *Store) WriteInParts(ctx context.Context, changes []outbox.Change, pause func() bool) error {
	if len(changes) == 0 {
		return nil
	}
	if pause() {
		pause()
	}
	return s.Write(ctx, changes)
}

func (s *Store) apply(c outbox.Change) {
	key := rowKey{c.EndpointID, c.Event.ID}
	row := s.rows[key]
	switch {
	case c.State == outbox.StateGone:
		delete(s.rows, key)
		return
	case c.Insert && row != nil, !c.Insert && row == nil:
		return
	case c.Insert:
		if s.events[c.Event.ID] == nil {
			s.events[c.Event.ID] = stored(c.Event)
		}
		event := *s.events[c.Event.ID]
		event.Position = c.Event.Position
		row = &Row{EndpointID: c.EndpointID, Event: &event, OrderKey: c.OrderKey, at: time.Now()}
		s.rows[key] = row
	}
	row.State, row.Attempts, row.Due = c.State, c.Attempts, instant(c.Due)
	if c.State == outbox.StateDead {
		row.Due = time.Time{}
	}
	row.Reason = cmp.Or(c.Reason, row.Reason)
	if c.Status != 0 || c.Detail != "" {
		row.Status, row.Detail = c.Status, c.Detail
	}
}

// collect drops an event that no delivery needs.
func (s *Store) collect(event string) {
	for key := range s.rows {
		if key.event == event {
			return
		}
	}
	delete(s.events, event)
}

// stored is the event as a table gives it back: bytes of its own, no time zone, microseconds.
func stored(e *outbox.Event) *outbox.Event {
	c := outbox.Event{ID: e.ID, Type: e.Type, Key: e.Key, Tenant: e.Tenant, JSON: e.JSON, Position: e.Position}
	c.Data = append([]byte{}, e.Data...)
	c.Headers = nil
	if len(e.Headers) > 0 {
		c.Headers = bytes.Clone(e.Headers)
	}
	c.Time, c.Commit = instant(e.Time), instant(e.Commit)
	return &c
}

func instant(t time.Time) time.Time {
	if t.IsZero() {
		return time.Time{}
	}
	return t.UTC().Truncate(time.Microsecond)
}

// parked are the rows of an endpoint that may be read, in commit order.
func (s *Store) parked(endpoint string, wanted func(*Row) bool) []*Row {
	var found []*Row
	for key, r := range s.rows {
		if key.endpoint == endpoint && endpoint != "" && r.State == outbox.StateParked && wanted(r) {
			found = append(found, r)
		}
	}
	slices.SortFunc(found, func(a, b *Row) int { return a.Event.Position.Compare(b.Event.Position) })
	return found
}

// page cuts rows to what a call may return.
func page(rows []*Row, limit int, maxBytes int64) (cut []outbox.Stored, more bool) {
	var size int64
	for i, r := range rows {
		size += int64(len(r.Event.Headers) + len(r.Event.Data))
		if i == limit || i > 0 && size > maxBytes {
			return cut, true
		}
		cut = append(cut, outbox.Stored{Event: stored(r.Event), OrderKey: r.OrderKey, Attempts: r.Attempts, Due: r.Due})
	}
	return cut, false
}

func (s *Store) read(ctx context.Context, what string) error {
	if err := cmp.Or(ctx.Err(), s.failReads.take()); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// Scan reads an endpoint's parked deliveries in commit order.
func (s *Store) Scan(ctx context.Context, endpointID string, after cdc.Position, skip []string, limit int, maxBytes int64) ([]outbox.Stored, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.read(ctx, "read parked"); err != nil {
		return nil, false, err
	}
	skipped := map[string]bool{}
	for _, key := range skip {
		skipped[key] = true
	}
	rows, more := page(s.parked(endpointID, func(r *Row) bool {
		return r.Event.Position.Compare(after) > 0 && !skipped[r.OrderKey]
	}), limit, maxBytes)
	return rows, more, nil
}

// ScanKey reads the parked deliveries of one order key in commit order; of the empty key, none.
func (s *Store) ScanKey(ctx context.Context, endpointID, key string, after cdc.Position, limit int, maxBytes int64) ([]outbox.Stored, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.read(ctx, "read parked"); err != nil {
		return nil, false, err
	}
	rows, more := page(s.parked(endpointID, func(r *Row) bool {
		return r.Event.Position.Compare(after) > 0 && r.OrderKey == key && key != ""
	}), limit, maxBytes)
	return rows, more, nil
}

// Due names what has a retry due at now.
func (s *Store) Due(ctx context.Context, endpointID string, now time.Time, limit int, maxBytes int64) (keys []string, loose []outbox.Stored, next time.Time, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.read(ctx, "read due"); err != nil {
		return nil, nil, time.Time{}, err
	}
	all := s.parked(endpointID, func(r *Row) bool { return !r.Due.IsZero() })
	slices.SortStableFunc(all, func(a, b *Row) int { return a.Due.Compare(b.Due) })
	named := map[string]bool{}
	var rows []*Row // the loose ones
	cut := false
	for _, r := range all {
		switch {
		case r.Due.After(now):
			if next.IsZero() {
				next = r.Due
			}
		case named[r.OrderKey]:
		case len(keys)+len(rows) == limit:
			cut = true
		case r.OrderKey == "":
			rows = append(rows, r)
		default:
			named[r.OrderKey] = true
			keys = append(keys, r.OrderKey)
		}
	}
	loose, more := page(rows, limit, maxBytes)
	if cut || more {
		next = now
	}
	return keys, loose, next, nil
}

// Backlogs counts what is stored.
func (s *Store) Backlogs(ctx context.Context) ([]outbox.Backlog, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.read(ctx, "count backlogs"); err != nil {
		return nil, err
	}
	counts, first := map[string]*outbox.Backlog{}, map[string]*Row{}
	for key, r := range s.rows {
		b := counts[key.endpoint]
		if b == nil {
			b = &outbox.Backlog{EndpointID: key.endpoint}
			counts[key.endpoint] = b
		}
		if r.State == outbox.StateDead {
			b.Dead++
			continue
		}
		b.Parked++
		if r.State == outbox.StateParked && key.endpoint != "" && !r.Due.IsZero() && (b.NextDue.IsZero() || r.Due.Before(b.NextDue)) {
			b.NextDue = r.Due
		}
		if f := first[key.endpoint]; key.endpoint != "" && (f == nil || r.Event.Position.Compare(f.Event.Position) < 0) {
			first[key.endpoint], b.Oldest = r, r.at
		}
	}
	var all []outbox.Backlog
	for _, b := range counts {
		all = append(all, *b)
	}
	slices.SortFunc(all, func(a, b outbox.Backlog) int { return cmp.Compare(a.EndpointID, b.EndpointID) })
	return all, nil
}

// Bury makes the parked deliveries of an endpoint dead, those that are being sent too.
func (s *Store) Bury(ctx context.Context, endpointID string, reason outbox.Reason) (n int64, err error) {
	err = s.write(ctx, "bury deliveries", func() {
		for key, r := range s.rows {
			if key.endpoint == endpointID && endpointID != "" && r.State != outbox.StateDead {
				r.State, r.Reason, r.Due = outbox.StateDead, reason, time.Time{}
				n++
			}
		}
	})
	return n, err
}

// SaveCheckpoint records how far the slot is settled.
func (s *Store) SaveCheckpoint(ctx context.Context, c outbox.Checkpoint) (cdc.LSN, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fenced {
		return 0, fmt.Errorf("save checkpoint: %w", outbox.ErrFenced)
	}
	if err := cmp.Or(ctx.Err(), s.failSaves.take()); err != nil {
		return 0, fmt.Errorf("save checkpoint: %w", err)
	}
	s.checkpoint = c
	s.checkpoints++
	if s.proof != nil {
		return s.proof(), nil
	}
	s.wal += 64
	return s.wal, nil
}
