package store

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walhook/walhook/outbox"
)

const (
	// fillBeat is how often a Fill that waits for its rows gives a sign of life, and fillSilence
	// how long it may give none before whoever wants the slot takes its process for frozen.
	fillBeat    = 5 * time.Second
	fillSilence = 30 * time.Second
	// commitTimeout is long, as a standby may have to receive all rows first.
	commitTimeout = 5 * time.Minute
)

var (
	errFillEnded = errors.New("the fill has ended")
	errNotNew    = errors.New("a fill only takes deliveries that are new and stay")
)

// Fill parks rows that no stream brings, and in the same transaction moves the checkpoint to a
// slot that brings all others: no gap, no overlap, and nothing half done. Nothing can be seen of
// it before Commit. Until it ends, other holders' writes and claims wait, and fail with their time-out, and
// another Fill waits for as long as it takes. It has a connection and a goroutine until Commit or Abort,
// one of which must follow. Its methods may be called from any goroutine.
type Fill struct {
	store  *Store
	holder Holder
	xmin   uint64
	stop   chan struct{} // closed at the end
	beats  sync.WaitGroup

	mu  sync.Mutex // guards what follows, and is held while a statement runs
	t   *taken     // nil at the end
	err error      // why it can no longer be committed
}

// fillSettings are for a session that waits for its caller, maybe long. (transaction_timeout is
// there from 17 on.)
const fillSettings = `
select set_config(name, case name when 'lock_timeout' then '10s' else '0' end, true)
from pg_settings
where name in ('idle_in_transaction_session_timeout', 'transaction_timeout', 'lock_timeout')
union all
select set_config('application_name', ` + fillName + `, true)`

// Fill begins. xmin is what snap_xmin and proven_xmin will be: every transaction id below it had
// ended when the slot was made, and its rows are written or were sent before; zero is not known. It
// fails with a CopyError as Claim does, and waits for another Fill as long as ctx lasts.
func (s *Store) Fill(ctx context.Context, h Holder, xmin uint64) (*Fill, error) {
	if h.At == 0 {
		return nil, errors.New("begin fill: the slot's position is not known")
	}
	f := &Fill{store: s, holder: h, xmin: xmin, stop: make(chan struct{})}
	for {
		err := f.begin(ctx)
		if err == nil {
			break
		}
		if !isLocked(err) || ctx.Err() != nil {
			return nil, fmt.Errorf("begin fill: %w", err)
		}
	}
	f.beats.Go(f.beat)
	return f, nil
}

func (f *Fill) begin(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	t, err := f.store.take(ctx, f.holder, 0)
	if err != nil {
		return err
	}
	if _, err := t.tx.Exec(ctx, fillSettings); err != nil {
		t.rollback()
		return fmt.Errorf("settings: %w", err)
	}
	f.t = t
	return nil
}

// beat keeps the session from looking like that of a frozen process.
func (f *Fill) beat() {
	tick := time.NewTicker(f.store.beat)
	defer tick.Stop()
	for {
		select {
		case <-f.stop:
			return
		case <-tick.C:
		}
		if !f.mu.TryLock() {
			continue // it is at work
		}
		if f.t != nil && f.err == nil {
			f.err = f.send(context.Background(), callTimeout, step{what: "sign of life", sql: "select"})
		}
		f.mu.Unlock()
	}
}

// Write parks new deliveries as Store.Write does: those that are there stay as they are. What
// one call is given is in memory, but no more.
func (f *Fill) Write(ctx context.Context, changes []outbox.Change) error {
	for _, c := range changes {
		if !c.Insert || c.State == outbox.StateGone {
			return fmt.Errorf("fill: %s: %w", c.Event.ID, errNotNew)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.t == nil {
		return fmt.Errorf("fill: %w", errFillEnded)
	}
	for _, st := range insertSteps(changes, f.store.asciiOnly.Load()) {
		if f.err == nil {
			f.err = f.send(ctx, callTimeout, st)
		}
	}
	if f.err != nil {
		return fmt.Errorf("fill: %w", f.err)
	}
	return nil
}

const commitFill = `
update walhook.checkpoints
set
	epoch = epoch + 1,
	lsn = $2::text::pg_lsn,
	commit_lsn = null,
	ordinal = null,
	snap_xmin = $3::text::numeric,
	proven_xmin = $3::text::numeric,
	gap = null,
	registry = false,
	tables = coalesce($4::text::jsonb, tables),
	hosts = $5,
	server = $6,
	updated_at = clock_timestamp()
where slot = $1
returning epoch`

// Commit makes all of it durable and visible, and fences holders of before. Where it fails, it
// may have been done, as its answer can get lost: the checkpoint tells.
func (f *Fill) Commit(ctx context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.t == nil {
		return fmt.Errorf("commit fill: %w", errFillEnded)
	}
	defer f.end()
	if f.err != nil {
		return fmt.Errorf("commit fill: %w", f.err)
	}
	tables, err := f.holder.tables()
	if err != nil {
		return fmt.Errorf("commit fill: %w", err)
	}
	var xmin any
	if f.xmin != 0 {
		xmin = strconv.FormatUint(f.xmin, 10)
	}
	var epoch int64
	update := step{
		what: "update", sql: commitFill,
		args: []any{f.store.slot, f.holder.At.String(), xmin, tables, f.t.here.Hosts, f.t.here.Server},
		row:  func(r pgx.Rows) error { return r.Scan(&epoch) },
	}
	if err := f.send(ctx, callTimeout, update); err != nil {
		return fmt.Errorf("commit fill: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, commitTimeout)
	defer cancel()
	if err := f.t.tx.Commit(ctx); err != nil {
		return fmt.Errorf("commit fill: %w", err)
	}
	f.store.epoch.Store(epoch)
	f.store.sample.forget()
	return nil
}

// Abort leaves everything as it was. After Commit, or again, it does nothing.
func (f *Fill) Abort() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.end()
}

// end gives the connection back. The beat never waits for mu, so that it can be waited for here.
func (f *Fill) end() {
	if f.t == nil {
		return
	}
	close(f.stop)
	f.beats.Wait()
	f.t.rollback()
	f.t = nil
}

func (f *Fill) send(ctx context.Context, timeout time.Duration, st step) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return send(ctx, f.t.tx, []step{st})
}
