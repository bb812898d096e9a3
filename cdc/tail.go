package cdc

import (
	"context"
	"crypto/rand"
	"errors"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"go.uber.org/zap"
)

// Tail hands on the rows that commit from now on, read through a temporary slot of its own: nothing
// is written down, no other slot is touched, and the slot is gone with the connection. begun is called when
// it reads. It returns nil when ctx ends; the error is a *Fault, or what resolve or row returned.
func Tail(ctx context.Context, cfg Config, resolve func([]Found) error, begun func(LSN), row func(*Row) error) error {
	cfg.Slot = "walhook_tail_" + strings.ToLower(rand.Text()[:12])
	cfg.Create, cfg.Failover, cfg.temporary = true, false, true
	s := New(cfg, nil, nil)
	s.sink = &tail{stream: s, row: row}
	err := s.tail(ctx, resolve, begun)
	var of *tailError
	switch {
	case ctx.Err() != nil:
		return nil
	case errors.As(err, &of):
		return of.err
	}
	return FaultOf(err)
}

func (s *Stream) tail(ctx context.Context, resolve func([]Found) error, begun func(LSN)) error {
	open, cancel := context.WithTimeout(ctx, s.limits.open)
	defer cancel()
	sv, err := Inspect(open, &s.cfg)
	if err != nil {
		return err
	}
	if sv.Publication == nil {
		return &Fault{State: Waiting, Reason: "publication " + s.cfg.Publication + " does not exist", Remedy: "start walhook run, which makes it, or run the SQL that `walhook init` prints"}
	}
	if f := firstFault(sv.Findings(&s.cfg)); f != nil {
		return f
	}
	if missing, _ := sv.unpublished(); len(missing) > 0 {
		return &Fault{State: Waiting, Reason: "publication " + s.cfg.Publication + " lacks " + tableList(missing), Remedy: "start walhook run, which adds it, or run the SQL that `walhook init` prints"}
	}
	if err := resolve(sv.Tables); err != nil {
		return &tailError{err}
	}
	notices := make(chan *pgconn.Notice, 1)
	conn, err := s.cfg.connectReplication(open, func(n *pgconn.Notice) {
		s.log.Info("Postgres says", zap.String("message", n.Message))
		if fatalNotice(n) {
			select {
			case notices <- n:
			default:
			}
		}
	})
	if err != nil {
		return connectFault(err)
	}
	defer func() { // with a goodbye, so that the slot goes at once
		_ = conn.Conn().SetWriteDeadline(time.Now().Add(time.Second))
		conn.Frontend().Send(&pgproto3.Terminate{})
		_ = conn.Frontend().Flush()
		_ = conn.Conn().Close()
	}()
	slot, _, err := s.createSlot(ctx, conn, sv, false)
	if err != nil {
		return err
	}
	if err := s.start(ctx, conn, slot.Confirmed, false); err != nil {
		return err
	}
	s.mu.Lock()
	s.conn, s.received, s.told = conn, slot.Confirmed, slot.Confirmed
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.conn = nil
		s.mu.Unlock()
	}()
	s.patience = s.limits.silence
	begun(slot.Confirmed)
	r := &reader{s: s, conn: conn, interval: statusInterval(sv.SenderTimeout), notices: notices}
	return r.run(ctx)
}

// tail is the Sink of Tail: what was handed on may be forgotten.
type tail struct {
	stream *Stream
	row    func(*Row) error
}

// tailError is what a callback returned.
type tailError struct{ err error }

func (e *tailError) Error() string { return e.err.Error() }

func (t *tail) Row(r *Row) error {
	if err := t.row(r); err != nil {
		return &tailError{err}
	}
	return nil
}

func (t *tail) Commit(end LSN) { t.stream.Confirm(end, end) }
func (t *tail) Idle(at LSN)    { t.stream.Confirm(at, at) }

func (t *tail) Resolve([]Found) error                          { return nil }
func (t *tail) Claim(context.Context, Session) (Resume, error) { return Resume{}, nil }
func (t *tail) Room() <-chan struct{}                          { return nil }
func (t *tail) Touch()                                         {}
func (t *tail) Leave(context.Context)                          {}
func (t *tail) Fill(context.Context, Session, uint64) (Fill, error) {
	return nil, errors.New("a tail is not filled")
}
