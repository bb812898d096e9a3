package outbox

import (
	"context"
	"errors"
	"fmt"

	"go.uber.org/zap"

	"github.com/walhook/walhook/cdc"
)

// Filling is one transaction of the store that parks rows and moves the checkpoint, all or nothing.
type Filling interface {
	// Write parks new deliveries. What is stored already stays as it is.
	Write(ctx context.Context, changes []Change) error
	Commit(ctx context.Context) error
	// Abort drops what was written. After Commit it does nothing.
	Abort()
}

// fill parks rows that did not come by the stream: those that were there before the slot, and
// those that a lost slot may have missed. They go the slow way, so that memory and order are
// those of any other backlog. It is a cdc.Fill.
type fill struct {
	relay   *Relay
	into    Filling
	changes []Change
	bytes   int64
	dead    int
}

// Fill begins to park rows for a slot that begins at s.Slot.
func (r *Relay) Fill(ctx context.Context, s cdc.Session, xmin uint64) (cdc.Fill, error) {
	into, err := r.cfg.Claims.Fill(ctx, s, xmin)
	if err != nil {
		return nil, err
	}
	if s.Mirror != nil && r.cfg.Roll != nil && !r.foreign {
		r.enroll(r.decode(s.Mirror.Rows))
	}
	return &fill{relay: r, into: into}, nil
}

// Order is the column of a serial id: it grows in the order of inserts, which is as near to the
// order of commits as a table can tell.
func (f *fill) Order(rel *cdc.Relation) string { return f.relay.cfg.Mapper.Serial(rel) }

// Row maps a row and parks it for everyone who wants it.
func (f *fill) Row(ctx context.Context, row *cdc.Row) error {
	r := f.relay
	ev, err := r.cfg.Mapper.Map(row)
	var unmappable *UnmappableError
	switch {
	case errors.As(err, &unmappable):
		r.metrics.unmappable.Inc()
		f.dead++
		f.put(Change{Event: ev, Insert: true, State: StateDead, Reason: ReasonUnmappable, Detail: clip(unmappable.Reason)})
	case err != nil:
		return &cdc.Fault{State: cdc.Waiting, Reason: "the rows of the outbox table cannot be read", Err: err}
	case ev == nil:
		return nil
	default:
		r.mu.Lock()
		to := r.registry.Match(ev.Tenant, ev.Type)
		r.mu.Unlock()
		before := len(f.changes)
		for _, ep := range to {
			c := Change{EndpointID: ep.ID, Event: ev, OrderKey: ep.orderKey(ev), Insert: true, State: StateParked, Reason: ReasonSnapshot}
			switch yes, err := wants(ev, ep); {
			case err != nil:
				c.State, c.Reason, c.Detail = StateDead, ReasonFilter, filterDetail(err)
			case !yes:
				continue
			}
			f.put(c)
		}
		if len(f.changes) == before {
			r.metrics.unmatched.Inc()
			return nil
		}
		r.metrics.routed.Inc()
	}
	f.bytes += ev.Size()
	if len(f.changes) < journalBatch && f.bytes < journalBatchBytes {
		return nil
	}
	return f.flush(ctx)
}

func (f *fill) put(c Change) { f.changes = append(f.changes, c) }

func (f *fill) flush(ctx context.Context) error {
	if len(f.changes) == 0 {
		return nil
	}
	if err := f.into.Write(ctx, f.changes); err != nil {
		return fmt.Errorf("park rows of the table: %w", err)
	}
	f.changes, f.bytes = f.changes[:0], 0
	return nil
}

// Commit makes it all visible at once.
func (f *fill) Commit(ctx context.Context) error {
	if err := f.flush(ctx); err != nil {
		return err
	}
	if f.dead > 0 {
		f.relay.log.Warn("rows of the table cannot be mapped: they are dead deliveries", zap.Int("rows", f.dead))
	}
	if err := f.into.Commit(ctx); err != nil {
		return fmt.Errorf("park rows of the table: %w", err)
	}
	return nil
}

// Abort drops what was parked.
func (f *fill) Abort() { f.into.Abort() }
