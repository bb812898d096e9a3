package cdc

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/zap"
)

// Recovery is what becomes of rows that the stream may have missed.
type Recovery string

// The ways out of the state lost.
const (
	RecoverAsk    Recovery = ""       // wait, and say how many rows would be sent again
	RecoverMissed Recovery = "missed" // send what may have been missed, unless that is suspiciously much
	RecoverAll    Recovery = "all"    // send it, however much it is
	RecoverNone   Recovery = "none"   // go on without it
)

// Fill takes rows that are read from their table instead of the stream. All of them, and with
// them the place where the stream goes on, are taken in Commit or not at all.
type Fill interface {
	// Order names the column by which the rows of a table are to come; empty is the table's own order.
	Order(rel *Relation) string
	// Row takes a row. It may wait for the database.
	Row(ctx context.Context, r *Row) error
	// Commit makes the rows ours, and the slot's position the checkpoint.
	Commit(ctx context.Context) error
	// Abort drops what Row took. After Commit it does nothing.
	Abort()
}

// markTimeout bounds how long a stop may wait for a mark.
const markTimeout = 5 * time.Second

// dropTimeout bounds how long a stop waits for the slot of a snapshot that it cut short.
const dropTimeout = 5 * time.Second

// ErrLost says that rows were missed and are to be sent again, which needs a stop of what
// runs: the next start does it.
var ErrLost = errors.New("the stream has missed rows and is recovered")

// recover makes a new slot for one that is lost or not yet there, and hands the rows that the
// stream may have missed to the sink as the tables have them. The split is exact: the rows are
// read under the snapshot that the new slot begins with.
//
// Transactions are told by the xmin of their rows, against the oldest one that was running at
// the last checkpoint. Whether a snapshot of then would see a row (pg_visible_in_snapshot) is not asked:
// the answer is wrong for subtransactions.
func (s *Stream) recover(ctx context.Context, conn *pgconn.PgConn, id pglogrepl.IdentifySystemResult, sv *Survey, rec *Record, f *Fault) (*Slot, *Mirrored, error) {
	m, mode := *f.missed, s.recovery
	if m.initial {
		mode = RecoverAll
	} else {
		if s.cost == nil || s.cost.missed != m || time.Since(s.cost.at) > s.cost.holds {
			s.cost = s.count(ctx, sv, m)
		}
		if f := s.judgeCost(f, mode, sv); f != nil {
			return nil, nil, f
		}
		if s.streamed { // what is in memory must come to rest first
			s.setStatus(Lost, &Fault{State: Lost, Reason: f.Reason})
			return nil, nil, Halt(fmt.Errorf("%w: %s", ErrLost, f.Reason))
		}
	}
	sql, err := s.cfg.connectLong(ctx)
	if err != nil {
		return nil, nil, connectFault(err)
	}
	defer closeSQL(sql)
	// One of several instances does it.
	var alone bool
	if err := sql.QueryRow(ctx, "select pg_try_advisory_lock(hashtextextended('walhook ' || $1, 0))", s.cfg.Slot).Scan(&alone); err != nil {
		return nil, nil, fmt.Errorf("lock: %w", err)
	}
	if !alone {
		s.endFrozenFill(ctx, sql)
		return nil, nil, &Fault{State: Standby, Reason: "another instance is making the slot"}
	}
	if sv.Slot != nil && sv.Slot.ActivePID != 0 {
		return nil, nil, &Fault{State: Lost, Reason: fmt.Sprintf("%s; pid %d is using slot %s, so it cannot be made anew", f.Reason, sv.Slot.ActivePID, s.cfg.Slot), Remedy: "end what uses it, if it is no walhook: select * from pg_stat_replication"}
	}
	now, err := s.book.Read(ctx, id.SystemID)
	if err != nil {
		return nil, nil, err
	}
	slot, err := readSlot(ctx, sql, s.cfg.Slot)
	if err != nil {
		return nil, nil, err
	}
	if now == nil || now.LSN != rec.LSN || now.Gap != rec.Gap || (slot == nil) != (sv.Slot == nil) || slot != nil && slot.Confirmed != sv.Slot.Confirmed {
		return nil, nil, &Fault{State: Connecting, Reason: "another instance has made the slot"}
	}

	s.setStatus(Recovering, &Fault{State: Recovering, Reason: f.Reason})
	// Before the slot is made: whatever has ended by now, the new slot's snapshot sees.
	xmin, err := readXmin(ctx, sql)
	if err != nil {
		return nil, nil, err
	}
	if slot != nil {
		if _, err := sql.Exec(ctx, "select pg_drop_replication_slot($1)", s.cfg.Slot); err != nil {
			return nil, nil, fmt.Errorf("drop slot: %w", err)
		}
	}
	slot, snapshot, err := s.createSlot(ctx, conn, sv, true)
	if err != nil {
		return nil, nil, err
	}
	s.setStatus(Recovering, &Fault{State: Recovering, Reason: f.Reason}) // it may have been waiting meanwhile
	var n int64
	mirror, err := s.mirrorOf(ctx, sv, snapshot)
	if err == nil {
		n, err = s.fill(ctx, sql, Session{
			SystemID: id.SystemID, Timeline: id.Timeline, Database: sv.Database, Version: sv.Version, Slot: *slot, Tables: sv.tables(), Mirror: mirror,
		}, sv, snapshot, xmin, m, mode)
	}
	if err != nil {
		// It would keep WAL until the next try, and nothing was read from it.
		if dropErr := s.dropUnread(ctx, sql, slot); dropErr != nil {
			s.log.Warn("the slot of a recovery that failed could not be dropped; the next try does it", zap.Error(dropErr))
		}
		return nil, nil, err
	}
	s.cost = nil
	s.recovery = s.cfg.Recover // an order is carried out once
	what := "recovered: the rows that may have been missed are parked"
	if m.initial {
		what = "the first snapshot is taken: the rows that were there are parked"
	}
	s.log.Info(what, zap.Int64("rows", n), zap.Stringer("lsn", slot.Confirmed), zap.String("cause", f.Reason))
	return slot, mirror, nil
}

// dropUnread drops the slot that we made, also where the end of ctx has closed sql: not one that
// another instance has made since, nor where the commit of the rows was done and only its answer lost.
func (s *Stream) dropUnread(ctx context.Context, sql *pgx.Conn, slot *Slot) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), dropTimeout)
	defer cancel()
	rec, err := s.book.Read(ctx, "")
	if err != nil || rec != nil && rec.LSN == slot.Confirmed {
		return err
	}
	if sql.IsClosed() {
		if sql, err = s.cfg.connectSQL(ctx); err != nil {
			return redact(err)
		}
		defer closeSQL(sql)
	}
	_, err = sql.Exec(ctx, "select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = $1 and confirmed_flush_lsn = $2::text::pg_lsn", slot.Name, slot.Confirmed.String())
	return err
}

// cost is what a recovery would send again.
type cost struct {
	missed missed
	at     time.Time
	holds  time.Duration // for how long it is good enough: it reads whole tables
	rows   int64
	before int64 // rows of as many transactions before those
	gone   bool  // rows were deleted from a table, so some that were missed may be gone
	err    error // of counting, whose numbers then mean nothing
}

// rowXID is a row's transaction as a 64-bit id. xmin has the lower half; the upper one is that of
// ref, a transaction id that was not given out yet, or the one before. Ids below 3 are no transactions.
func rowXID(ref string) string {
	return "case when xmin::text::bigint < 3 then 0 else xmin::text::bigint + ((" + ref + " >> 32) << 32)" +
		" - case when xmin::text::bigint + ((" + ref + " >> 32) << 32) > " + ref + " then 4294967296 else 0 end end"
}

// from names the table so that exactly the rows are read that the stream would bring under its name.
func (f *Found) from() string {
	if f.Kind == 'p' {
		return f.String()
	}
	return "only " + f.String()
}

func (s *Stream) count(ctx context.Context, sv *Survey, m missed) *cost {
	c := &cost{missed: m, at: time.Now()}
	defer func() { c.holds = max(5*time.Second, 50*time.Since(c.at)) }()
	conn, err := s.cfg.connectLong(ctx)
	if err != nil {
		c.err = redact(err)
		return c
	}
	defer closeSQL(conn)
	for i := range sv.Tables {
		f := &sv.Tables[i]
		var rows, before int64
		var gone bool
		err := conn.QueryRow(ctx, "select count(*) filter (where x >= $1), count(*) filter (where x < $1 and x >= $1 - (r - $1)),"+
			" coalesce((select n_tup_del > 0 from pg_stat_all_tables where relid = $2), false)"+
			" from (select pg_snapshot_xmax(pg_current_snapshot())::text::bigint as r) ref"+
			" cross join lateral (select "+rowXID("r")+" as x from "+f.from()+") t", int64(m.xmin), f.OID).Scan(&rows, &before, &gone)
		if err != nil {
			c.err = err
			return c
		}
		c.rows, c.before, c.gone = c.rows+rows, c.before+before, c.gone || gone
	}
	return c
}

// suspicious is how many times as much may be sent again as the same number of transactions
// brought before, where that is more than Config.MaxRecovery.
const suspicious = 10

// judgeCost says what would be sent again, where that is not done by itself.
func (s *Stream) judgeCost(f *Fault, mode Recovery, sv *Survey) *Fault {
	c := s.cost
	lost := &Fault{State: Lost, Reason: f.Reason}
	what := "what may have been missed"
	switch {
	case c.err == nil && c.missed.xmin == 0:
		what = fmt.Sprintf("all %d rows of the outbox, as nothing tells which may have been missed", c.rows)
	case c.err == nil:
		what = fmt.Sprintf("the %d rows that may have been missed", c.rows)
	}
	if c.gone {
		what += " (rows that were deleted from the outbox meanwhile cannot be sent)"
	}
	if s.cfg.Messages {
		what += " (messages of pg_logical_emit_message are in no table and cannot be sent)"
	}
	var pg *pgconn.PgError
	switch limit := max(int64(s.cfg.MaxRecovery), suspicious*c.before); {
	case mode == RecoverNone, mode == RecoverAll && c.err == nil:
		return nil
	case errors.As(c.err, &pg) && pg.Code == codeDenied:
		lost.Reason += "; role " + sv.Role + " may not read the outbox to find it (" + pg.Message + ")"
		lost.Remedy = remedyRead(sv.Role)
	case c.err != nil:
		lost.Reason += "; what would be sent again cannot be counted"
		lost.Err = c.err
	case c.missed.xmin == 0:
		lost.Reason += "; nothing tells since when"
		lost.Remedy = "`walhook run --recover=all` sends " + what + "; " + s.cfg.remedyNone()
	case mode == RecoverAsk:
		lost.Remedy = s.cfg.remedyRecover(what)
	case c.rows > limit:
		lost.Reason += fmt.Sprintf("; it would send %s, more than the %d that are sent without being asked for (a table that was rewritten or updated looks new)", what, limit)
		lost.Remedy = "`walhook run --recover=all` sends them; a higher cdc.max_recovery allows it for good; " + s.cfg.remedyNone()
	default:
		return nil
	}
	return lost
}

// codeDenied is insufficient_privilege, which row security answers too.
const codeDenied = "42501"

func remedyRead(role string) string {
	return "grant select on the outbox tables to " + quoteName(role) + "; where row security hides rows: alter role " + quoteName(role) + " bypassrls"
}

// denied says of an error of reading a table what mends it, where a right is missing.
func (sv *Survey) denied(err error) error {
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == codeDenied {
		return &Fault{State: Waiting, Reason: "role " + sv.Role + " may not read the rows of the outbox", Err: err, Remedy: remedyRead(sv.Role)}
	}
	return err
}

// fill reads the rows under the snapshot and gives them to the sink.
func (s *Stream) fill(ctx context.Context, sql *pgx.Conn, session Session, sv *Survey, snapshot string, xmin uint64, m missed, mode Recovery) (n int64, err error) {
	fill, err := s.sink.Fill(ctx, session, xmin)
	if err != nil {
		return 0, err
	}
	defer fill.Abort()
	if mode == RecoverNone {
		return 0, fill.Commit(ctx)
	}
	// Not inside the snapshot: the slot's may have an xmax below its xmin.
	var ref int64
	p := progress{s: s, status: time.Now(), log: time.Now()}
	if err := sql.QueryRow(ctx, "select pg_snapshot_xmax(pg_current_snapshot())::text::bigint, clock_timestamp()").Scan(&ref, &p.read); err != nil {
		return 0, fmt.Errorf("read snapshot: %w", err)
	}
	exec := func(text string) error {
		_, err := sql.PgConn().Exec(ctx, text).ReadAll()
		return err
	}
	if err := exec("begin isolation level repeatable read read only; set transaction snapshot " + quoteText(snapshot)); err != nil {
		return 0, fmt.Errorf("take the slot's snapshot: %w", err)
	}
	defer func() { _ = exec("rollback") }()

	where := ""
	if !m.initial {
		where = fmt.Sprintf(" where %s >= %d", rowXID(fmt.Sprintf("%d::bigint", ref)), m.xmin)
	}
	for i := range sv.Tables {
		var rows int64
		if err := sql.QueryRow(ctx, "select count(*) from "+sv.Tables[i].from()+where).Scan(&rows); err != nil {
			return 0, sv.denied(fmt.Errorf("count rows of %s: %w", sv.Tables[i].Table, err))
		}
		p.total += rows
	}
	for i := range sv.Tables {
		if err := s.fillTable(ctx, sql, fill, &sv.Tables[i], where, session.Slot.Confirmed, &p); err != nil {
			return 0, fmt.Errorf("read %s: %w", sv.Tables[i].Table, err)
		}
	}
	return p.done, fill.Commit(ctx)
}

// fillTable streams the rows of one table as text, as pgoutput prints them.
//
// Their place is before all that the slot brings: an LSN below its beginning, which is no
// transaction's own, since records begin at multiples of eight. Among each other they are in the
// order of a serial id, else of the table.
func (s *Stream) fillTable(ctx context.Context, sql *pgx.Conn, fill Fill, f *Found, where string, begin LSN, p *progress) error {
	rel := f.Relation()
	var order []string
	if by := fill.Order(rel); by != "" {
		order = []string{by}
	}
	ctx, cancel := context.WithCancel(ctx)
	results := sql.PgConn().Exec(ctx, f.selection(rel, where, order...))
	defer func() { _ = results.Close() }()
	defer cancel() // before Close, which else would read what is left of the table
	for results.NextResult() {
		rows := results.ResultReader()
		for rows.NextRow() {
			p.count()
			row := Row{
				Position:   Position{Commit: begin - 1, Ordinal: uint64(p.done)},
				CommitTime: p.read, Relation: rel, Values: rows.Values(),
			}
			if err := fill.Row(ctx, &row); err != nil {
				return err
			}
		}
		if _, err := rows.Close(); err != nil {
			return err
		}
	}
	return results.Close()
}

// progress tells how far the rows were read.
type progress struct {
	s           *Stream
	read        time.Time // by the server's clock; rows carry it, as nothing tells when they committed
	total, done int64
	status, log time.Time // when it was last told there
}

func (p *progress) count() {
	p.done++
	if p.done%1000 != 0 {
		return
	}
	now := time.Now()
	if now.Sub(p.status) > time.Second {
		p.status = now
		p.s.mu.Lock()
		p.s.status.Fault = &Fault{State: Recovering, Reason: fmt.Sprintf("reading rows of the outbox table: %d of %d", p.done, p.total)}
		p.s.mu.Unlock()
	}
	if now.Sub(p.log) > 10*time.Second {
		p.log = now
		p.s.log.Info("reading rows of the outbox table", zap.Int64("rows", p.done), zap.Int64("of", p.total))
	}
}

// frozenFillSQL ends the session that has the lock of a recovery whose other session, which writes
// what is read, has not been heard of for $2 seconds: it says something every 5.
const frozenFillSQL = `
select count(pg_terminate_backend(l.pid))
from pg_locks l
where l.locktype = 'advisory'
and l.granted
and l.objsubid = 1
and l.database = (select oid from pg_database where datname = current_database())
and (l.classid::bigint << 32 | l.objid::bigint) = hashtextextended('walhook ' || $1, 0)
and exists (
	select
	from pg_stat_activity a
	where a.usename = current_user
	and a.application_name = current_setting('application_name') || ' fill'
	and a.state_change < clock_timestamp() - make_interval(secs => $2)
)`

// endFrozenFill lets us go on where the instance that was making the slot is frozen or cut off.
func (s *Stream) endFrozenFill(ctx context.Context, sql *pgx.Conn) {
	var ended int
	if err := sql.QueryRow(ctx, frozenFillSQL, s.cfg.Slot, s.limits.frozen.Seconds()).Scan(&ended); err == nil && ended > 0 {
		s.log.Warn("the instance that was making the slot has stood still: its session is ended")
	}
}

// mark writes down that rows may be missing. Where it fails, the next session does it before it
// believes the record.
func (s *Stream) mark(ctx context.Context, gap string) error {
	if s.gap == "" {
		s.gap = gap
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), min(s.limits.open, markTimeout)) // it must not get lost by a stop
	defer cancel()
	if err := s.book.Mark(ctx, s.gap); err != nil {
		return fmt.Errorf("write down that %s: %w", s.gap, err)
	}
	s.log.Error("rows may be missing from the stream: "+s.gap, zap.String("slot", s.cfg.Slot))
	s.gap = ""
	return nil
}
