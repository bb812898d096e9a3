package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
)

// Saved is a row of walhook.checkpoints.
type Saved struct {
	outbox.Checkpoint // at zero the slot's first snapshot is announced and not taken yet
	Identity
	Epoch      int64
	SnapXmin   uint64            // every transaction id below it had ended before Checkpoint.LSN; zero not known
	ProvenXmin uint64            // SnapXmin as of the last look that found the catalogue as it should be; zero not known
	Gap        string            // why committed rows may be missing from the stream; empty where none are
	Tables     map[string]uint32 // of the holder; nil not known
	Registry   bool              // the versions of the registry are complete as of this checkpoint
	UpdatedAt  time.Time
}

// announced tells that the row was made by Announce, and that nobody has gone on from it.
func (c Saved) announced() bool { return c.LSN == 0 && c.Epoch == 0 }

// Holder is who takes a slot, and what it streams.
type Holder struct {
	SystemIdentifier string            // as IDENTIFY_SYSTEM told the connection that has the slot
	At               cdc.LSN           // where the slot stands
	Tables           map[string]uint32 // OIDs of the published tables by their quoted names; nil leaves what is recorded
	Xmin             uint64            // every transaction id below it had ended when the slot was made; zero is not known
}

// tables is null where nothing is known of them.
func (h Holder) tables() (any, error) {
	if h.Tables == nil {
		return nil, nil
	}
	text, err := json.Marshal(h.Tables)
	return string(text), err
}

// Claimed is what a holder finds when it takes the slot.
type Claimed struct {
	Saved
	First  bool  // there was no checkpoint: this one was made
	Parked int64 // deliveries that the holder before had in flight, parked now
}

const selectCheckpoints = `
select
	slot, instance, system_identifier, database, coalesce(hosts, ''), coalesce(server, ''), epoch, lsn::text,
	coalesce(commit_lsn, '0/0')::text, coalesce(ordinal, 0), coalesce(snap_xmin, 0)::text, coalesce(proven_xmin, 0)::text,
	coalesce(gap, ''), coalesce(tables, 'null')::text, registry, updated_at
from walhook.checkpoints
order by slot`

func scanSaved(row pgx.Row) (slot string, c Saved, err error) {
	var lsn, commit, snap, proven, tables string
	err = row.Scan(&slot, &c.Instance, &c.SystemIdentifier, &c.Database, &c.Hosts, &c.Server, &c.Epoch, &lsn,
		&commit, &c.Position.Ordinal, &snap, &proven, &c.Gap, &tables, &c.Registry, &c.UpdatedAt)
	if err != nil {
		return "", Saved{}, err
	}
	if c.LSN, err = cdc.ParseLSN(lsn); err != nil {
		return "", Saved{}, err
	}
	if c.Position.Commit, err = cdc.ParseLSN(commit); err != nil {
		return "", Saved{}, err
	}
	if c.SnapXmin, err = strconv.ParseUint(snap, 10, 64); err != nil {
		return "", Saved{}, fmt.Errorf("snap_xmin: %w", err)
	}
	if c.ProvenXmin, err = strconv.ParseUint(proven, 10, 64); err != nil {
		return "", Saved{}, fmt.Errorf("proven_xmin: %w", err)
	}
	if err := json.Unmarshal([]byte(tables), &c.Tables); err != nil {
		return "", Saved{}, fmt.Errorf("tables: %w", err)
	}
	c.UpdatedAt = c.UpdatedAt.UTC()
	return slot, c, nil
}

// readCheckpoints reads the slot's checkpoint and looks at those of all slots: a copy whose slot
// was given another name is a copy. here is nil where that is not the question.
func (s *Store) readCheckpoints(ctx context.Context, conn *pgx.Conn, sql string, here *Identity) (c Saved, ok bool, err error) {
	rows, err := conn.Query(ctx, sql)
	if err != nil {
		return Saved{}, false, err
	}
	defer rows.Close()
	var copied *CopyError
	for rows.Next() {
		slot, saved, err := scanSaved(rows)
		if err != nil {
			return Saved{}, false, err
		}
		if here != nil && len(here.Differs(saved.Identity)) > 0 {
			if copied == nil {
				copied = &CopyError{Slot: slot, Stored: saved.Identity, Here: *here}
			}
			copied.more = append(copied.more, saved.Identity)
		}
		if slot == s.slot {
			c, ok = saved, true
		}
	}
	if err := rows.Err(); err != nil {
		return Saved{}, false, err
	}
	if copied != nil {
		return Saved{}, false, copied
	}
	return c, ok, nil
}

// Checkpoint reads the slot's checkpoint; ok is false where there is none. It fails with a
// CopyError where Claim would, unless systemIdentifier is empty: then nobody asks.
func (s *Store) Checkpoint(ctx context.Context, systemIdentifier string) (c Saved, ok bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err = s.pool.AcquireFunc(ctx, func(conn *pgxpool.Conn) error {
		var here *Identity
		if systemIdentifier != "" {
			identity, err := s.identify(ctx, conn.Conn(), systemIdentifier)
			if err != nil {
				return err
			}
			here = &identity
		}
		c, ok, err = s.readCheckpoints(ctx, conn.Conn(), selectCheckpoints, here)
		return err
	})
	if err != nil {
		return Saved{}, false, fmt.Errorf("read checkpoint: %w", err)
	}
	if ok {
		s.seen.Store(c.Epoch)
	}
	return c, ok, nil
}

const onlyOne = `
select count(*) = 1
from walhook.checkpoints`

// Alone tells whether the schema serves one slot only.
func (s *Store) Alone(ctx context.Context) (alone bool, err error) {
	err = s.plain(ctx, step{what: "count", sql: onlyOne, row: func(r pgx.Rows) error { return r.Scan(&alone) }})
	if err != nil {
		return false, fmt.Errorf("count checkpoints: %w", err)
	}
	return alone, nil
}

// ErrUnfinished is what Claim answers where the slot's first snapshot was announced: whoever
// streamed from here would leave out the rows that were there before.
var ErrUnfinished = errors.New("the slot's first snapshot was announced and is not finished")

// claimTries is how often Claim waits a second for a lock of the holder before.
const claimTries = 5

// fillName is what a session is called while it fills, so that it is not taken for a frozen one.
const fillName = `left(current_setting('application_name'), 50) || ' fill'`

// endFrozen ends sessions like ours that have stood still for a second in a transaction, because
// their process was stopped or is out of reach: it may hold locks for hours. One that fills is
// waiting for its rows most of the time, but gives a sign of life.
const endFrozen = `
select count(pg_terminate_backend(pid))
from pg_stat_activity
where datname = current_database()
and usename = current_user
and backend_type = 'client backend'
and pid <> pg_backend_pid()
and wait_event = 'ClientRead'
and xact_start < clock_timestamp() - interval '1 second'
and (
	application_name = current_setting('application_name')
	and state_change < clock_timestamp() - interval '1 second'
	or application_name = ` + fillName + `
	and state_change < clock_timestamp() - make_interval(secs => $1)
)`

// Claim takes the checkpoint over for the instance that has just got the slot: from here on
// writes of the holder before fail with ErrFenced. Where that was ourselves, and nobody since, the
// epoch stays, or a write of ours that is under way would fail. Where there is no checkpoint, it is made at
// where the slot stands; one that was announced is refused with ErrUnfinished. What is recorded of the
// holder is brought up to date; what is returned was there before.
func (s *Store) Claim(ctx context.Context, h Holder) (Claimed, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	claimed, err := s.claim(ctx, h)
	for try := 1; try < claimTries && isLocked(err); try++ {
		claimed, err = s.claim(ctx, h)
	}
	if err != nil {
		return Claimed{}, fmt.Errorf("claim checkpoint: %w", err)
	}
	s.epoch.Store(claimed.Epoch)
	s.sample.forget()
	s.sayParked(claimed.Parked)
	return claimed, nil
}

func (s *Store) sayParked(n int64) {
	if n > 0 {
		s.log.Info("parked what the holder before had in flight", zap.Int64("deliveries", n))
	}
}

func isLocked(err error) bool {
	var refused *pgconn.PgError
	const lockNotAvailable = "55P03"
	return errors.As(err, &refused) && refused.Code == lockNotAvailable
}

const claimCheckpoint = `
update walhook.checkpoints
set
	epoch = epoch + case when epoch = $2 then 0 else 1 end,
	tables = coalesce($3::text::jsonb, tables),
	hosts = $4,
	server = $5
where slot = $1
returning epoch, updated_at`

func (s *Store) claim(ctx context.Context, h Holder) (Claimed, error) {
	t, err := s.take(ctx, h, h.At)
	if err != nil {
		return Claimed{}, err
	}
	defer t.rollback()
	if t.saved.announced() && !t.made {
		return Claimed{}, ErrUnfinished
	}
	claimed := Claimed{Saved: t.saved, First: t.made}
	tag, err := t.tx.Exec(ctx, parkSending)
	if err != nil {
		return Claimed{}, fmt.Errorf("park what was sending: %w", err)
	}
	claimed.Parked = tag.RowsAffected()
	tables, err := h.tables()
	if err != nil {
		return Claimed{}, err
	}
	err = t.tx.QueryRow(ctx, claimCheckpoint, s.slot, s.epoch.Load(), tables, t.here.Hosts, t.here.Server).
		Scan(&claimed.Epoch, &claimed.UpdatedAt)
	if err != nil {
		return Claimed{}, fmt.Errorf("take over: %w", err)
	}
	claimed.UpdatedAt = claimed.UpdatedAt.UTC()
	if err := t.tx.Commit(ctx); err != nil {
		return Claimed{}, fmt.Errorf("commit: %w", err)
	}
	return claimed, nil
}

// taken is a transaction in which no other holder of the slot can write.
type taken struct {
	tx    pgx.Tx
	here  Identity
	saved Saved
	made  bool // there was no checkpoint
}

func (t *taken) rollback() {
	ctx, cancel := context.WithTimeout(context.Background(), connectTimeout)
	defer cancel()
	_ = t.tx.Rollback(ctx)
}

// A checkpoint that is there stays as it is. One that was made has no holder yet.
const insertCheckpoint = `
insert into walhook.checkpoints (slot, instance, system_identifier, database, epoch, lsn, tables, hosts, server, snap_xmin, proven_xmin)
values ($1, $2, $3, $4, 0, $5::text::pg_lsn, $6::text::jsonb, $7, $8, nullif($9::text, '0')::numeric, nullif($9::text, '0')::numeric)
on conflict (slot) do nothing`

func (s *Store) makeCheckpoint(ctx context.Context, tx pgx.Tx, h Holder, here Identity, at cdc.LSN) (made bool, err error) {
	tables, err := h.tables()
	if err != nil {
		return false, err
	}
	tag, err := tx.Exec(ctx, insertCheckpoint, s.slot, here.Instance, here.SystemIdentifier, here.Database, at.String(), tables,
		here.Hosts, here.Server, strconv.FormatUint(h.Xmin, 10))
	return tag.RowsAffected() == 1, err
}

// Those of other slots are left alone: their holders write on while we fill.
const lockCheckpoint = `
select
from walhook.checkpoints
where slot = $1
for update`

const parkSending = `
update walhook.deliveries
set state = 'parked'
where state = 'sending'`

// take begins a transaction that has waited for all writes before it, a second at most, and
// makes those behind it wait. The slot has a checkpoint in it, made at first where there was none.
func (s *Store) take(ctx context.Context, h Holder, first cdc.LSN) (_ *taken, err error) {
	if err := s.sameServer(ctx, h.SystemIdentifier); err != nil {
		return nil, err
	}
	if _, err := s.pool.Exec(ctx, endFrozen, s.silence.Seconds()); err != nil {
		return nil, fmt.Errorf("end frozen sessions: %w", err)
	}
	tx, err := s.pool.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.ReadCommitted})
	if err != nil {
		return nil, fmt.Errorf("begin: %w", err)
	}
	t := &taken{tx: tx}
	defer func() {
		if err != nil {
			t.rollback()
		}
	}()
	for _, sql := range []string{settings, "set local lock_timeout = '1s'"} {
		if _, err := tx.Exec(ctx, sql); err != nil {
			return nil, fmt.Errorf("settings: %w", err)
		}
	}
	if t.here, err = s.identify(ctx, tx.Conn(), h.SystemIdentifier); err != nil {
		return nil, err
	}
	if t.made, err = s.makeCheckpoint(ctx, tx, h, t.here, first); err != nil {
		return nil, fmt.Errorf("make: %w", err)
	}
	if _, err := tx.Exec(ctx, lockCheckpoint, s.slot); err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	if t.saved, _, err = s.readCheckpoints(ctx, tx.Conn(), selectCheckpoints, &t.here); err != nil {
		return nil, fmt.Errorf("read: %w", err)
	}
	return t, nil
}

// Announce records, before the slot is made, that its first snapshot is to be taken: until a
// Fill has done it, nobody gets to stream. It does nothing where the slot has a checkpoint.
func (s *Store) Announce(ctx context.Context, h Holder) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := s.announce(ctx, h); err != nil {
		return fmt.Errorf("announce snapshot: %w", err)
	}
	return nil
}

func (s *Store) announce(ctx context.Context, h Holder) error {
	if err := s.sameServer(ctx, h.SystemIdentifier); err != nil {
		return err
	}
	return pgx.BeginTxFunc(ctx, s.pool, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, settings); err != nil {
			return fmt.Errorf("settings: %w", err)
		}
		here, err := s.identify(ctx, tx.Conn(), h.SystemIdentifier)
		if err != nil {
			return err
		}
		if _, _, err := s.readCheckpoints(ctx, tx.Conn(), selectCheckpoints, &here); err != nil {
			return fmt.Errorf("read: %w", err)
		}
		_, err = s.makeCheckpoint(ctx, tx, h, here, 0)
		return err
	})
}

const saveGap = `
update walhook.checkpoints
set gap = $2
where slot = $1
and gap is null
and epoch = coalesce($3, epoch)`

// SaveGap records why committed rows may be missing from the stream. The first reason stays,
// until a Fill has closed the gap. Who has no claim may do it too, as nobody can claim a slot that is gone;
// but not once another instance has gone on since it read the checkpoint.
func (s *Store) SaveGap(ctx context.Context, why string) error {
	write, epoch := s.held, any(nil)
	if s.epoch.Load() == unclaimed {
		write = s.plain
		if seen := s.seen.Load(); seen != unclaimed {
			epoch = seen
		}
	}
	why = cleanDetail(why, s.asciiOnly.Load())
	if err := write(ctx, step{what: "update", sql: saveGap, args: []any{s.slot, why, epoch}}); err != nil {
		return fmt.Errorf("save gap: %w", err)
	}
	return nil
}

const saveCheckpoint = `
update walhook.checkpoints
set
	lsn = $3::text::pg_lsn,
	commit_lsn = $4::text::pg_lsn,
	ordinal = $5,
	snap_xmin = coalesce($6::text::numeric, snap_xmin),
	proven_xmin = greatest(proven_xmin, $7::text::numeric),
	updated_at = now()
where slot = $1
and epoch = $2`

// The end of the WAL that is on disk is behind our commit, which waited for it. The insert
// position would be too, but in one of a thousand cases it points behind the header of a page
// that is not begun yet, and no stream of an idle server ever gets there.
// The snapshot is taken before either position is read.
const selectProof = `
select pg_current_wal_flush_lsn()::text, pg_current_wal_insert_lsn()::text, pg_snapshot_xmin(pg_current_snapshot())::text`

// SaveCheckpoint records how far the slot is settled. A stream that has passed proof has also
// passed every Write that returned before the call.
func (s *Store) SaveCheckpoint(ctx context.Context, c outbox.Checkpoint) (proof cdc.LSN, err error) {
	var commit, ordinal, xmin, proven any
	if c.Position != (cdc.Position{}) {
		commit, ordinal = c.Position.Commit.String(), int64(c.Position.Ordinal)
	}
	settled, ok := s.sample.below(c.LSN)
	if ok {
		xmin = settled.xmin
	}
	if p := s.sample.proof(); p != "" {
		proven = p
	}
	var (
		updated                           int64
		flushText, insertText, sampleXmin string
	)
	save := step{
		what: "update", sql: saveCheckpoint, args: []any{s.slot, s.epoch.Load(), c.LSN.String(), commit, ordinal, xmin, proven},
		tag: func(t pgconn.CommandTag) { updated = t.RowsAffected() },
	}
	prove := step{what: "read position", sql: selectProof, row: func(r pgx.Rows) error {
		return r.Scan(&flushText, &insertText, &sampleXmin)
	}}
	if err := s.run(ctx, []step{
		{what: "begin", sql: begin}, {what: "settings", sql: settings}, save, {what: "commit", sql: "commit"}, prove,
	}); err != nil {
		return 0, fmt.Errorf("save checkpoint: %w", err)
	}
	if updated == 0 {
		return 0, fmt.Errorf("save checkpoint: %w", outbox.ErrFenced)
	}
	if proof, err = cdc.ParseLSN(flushText); err != nil {
		return 0, fmt.Errorf("save checkpoint: %w", err)
	}
	insert, err := cdc.ParseLSN(insertText)
	if err != nil {
		return 0, fmt.Errorf("save checkpoint: %w", err)
	}
	if ok {
		s.sample.wrote(settled)
	}
	s.sample.offer(horizon{lsn: insert, xmin: sampleXmin, taken: time.Now()})
	return proof, nil
}

// Proven tells that a look at the catalogue, which began at asOf, found publication and tables
// as they should be. What SaveCheckpoint had recorded of transactions before is then proven to have been
// streamed, and the next SaveCheckpoint says so.
func (s *Store) Proven(asOf time.Time) { s.sample.prove(asOf) }

// horizon is the oldest running transaction of a moment, and the end of the WAL a little later.
// Once everything below that end is settled, every transaction id below xmin is, and the next
// checkpoint may say so: after the loss of the slot, the rows of the others are sent again.
type horizon struct {
	lsn   cdc.LSN // zero: there is none
	xmin  string
	taken time.Time // not before the snapshot was
}

// sample follows one horizon after the other into the checkpoint.
type sample struct {
	mu      sync.Mutex // guards what follows
	waiting horizon    // for everything below it to be settled
	written horizon    // the last one that is in the checkpoint
	proven  string     // the xmin of a written one that was followed by a good look
}

// offer keeps the horizon unless an earlier one still waits.
func (s *sample) offer(h horizon) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting.lsn == 0 {
		s.waiting = h
	}
}

// below returns the horizon where everything below settled includes its position, and drops it.
func (s *sample) below(settled cdc.LSN) (h horizon, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting.lsn == 0 || s.waiting.lsn > settled {
		return horizon{}, false
	}
	h, s.waiting = s.waiting, horizon{}
	return h, true
}

func (s *sample) wrote(h horizon) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.written = h
}

func (s *sample) prove(asOf time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.written.lsn != 0 && s.written.taken.Before(asOf) {
		s.proven = s.written.xmin
	}
}

// proof is empty where nothing is proven.
func (s *sample) proof() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.proven
}

func (s *sample) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiting, s.written, s.proven = horizon{}, horizon{}, ""
}
