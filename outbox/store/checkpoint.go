package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/zap"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
)

// Saved is a row of walhook.checkpoints.
type Saved struct {
	outbox.Checkpoint
	Identity
	Epoch     int64
	SnapXmin  uint64 // every transaction id below it had ended before Checkpoint.LSN; zero not known
	UpdatedAt time.Time
}

// Claimed is what a holder finds when it takes the slot.
type Claimed struct {
	Saved
	First  bool  // there was no checkpoint: this one was made
	Parked int64 // deliveries that the holder before had in flight, parked now
}

// Identity is whose checkpoint it is.
type Identity struct {
	SystemIdentifier string // of the cluster, as IDENTIFY_SYSTEM tells it
	Database         string
	Instance         string
}

func (i Identity) String() string {
	return fmt.Sprintf("instance %s of database %s in cluster %s", i.Instance, i.Database, i.SystemIdentifier)
}

// CopyError is what Claim answers where a checkpoint was written by another instance or in
// another database: this one is a restore or a copy, and may be about to send again what the
// original sends. Nothing was changed.
type CopyError struct {
	Slot   string   // of the checkpoint
	Stored Identity // what the checkpoint says
	Here   Identity // where we are
}

func (e *CopyError) Error() string {
	return fmt.Sprintf("the checkpoint of slot %s is of %s, but this is %s; to go on in its place run: %s",
		e.Slot, e.Stored, e.Here, e.AdoptSQL())
}

// AdoptSQL is the statement after which Claim succeeds. Positions of another cluster or
// database mean nothing here, so then the slot begins anew; what is parked stays and is sent.
func (e *CopyError) AdoptSQL() string {
	if e.Stored.SystemIdentifier == e.Here.SystemIdentifier && e.Stored.Database == e.Here.Database {
		return fmt.Sprintf("update walhook.checkpoints set instance = %s;", literal(e.Here.Instance))
	}
	return fmt.Sprintf("delete from walhook.checkpoints where system_identifier <> %s or database <> %s;",
		literal(e.Here.SystemIdentifier), literal(e.Here.Database))
}

func literal(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }

// ErrOtherServer is what Claim answers where the replication connection and ours lead to
// different clusters.
var ErrOtherServer = errors.New("database.url and database.replication_url lead to different clusters")

const selectCheckpoints = `
select
	slot, instance, system_identifier, database, epoch, lsn::text, coalesce(commit_lsn, '0/0')::text, coalesce(ordinal, 0),
	coalesce(snap_xmin, 0)::text, updated_at
from walhook.checkpoints
where slot = coalesce($1, slot)`

func scanSaved(row pgx.Row) (slot string, c Saved, err error) {
	var lsn, commit, xmin string
	err = row.Scan(&slot, &c.Instance, &c.SystemIdentifier, &c.Database, &c.Epoch, &lsn, &commit, &c.Position.Ordinal, &xmin, &c.UpdatedAt)
	if err != nil {
		return "", Saved{}, err
	}
	if c.LSN, err = cdc.ParseLSN(lsn); err != nil {
		return "", Saved{}, err
	}
	if c.Position.Commit, err = cdc.ParseLSN(commit); err != nil {
		return "", Saved{}, err
	}
	if _, err := fmt.Sscan(xmin, &c.SnapXmin); err != nil {
		return "", Saved{}, fmt.Errorf("snap_xmin %s: %w", xmin, err)
	}
	c.UpdatedAt = c.UpdatedAt.UTC()
	return slot, c, nil
}

// Checkpoint reads the slot's checkpoint; ok is false where there is none.
func (s *Store) Checkpoint(ctx context.Context) (c Saved, ok bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, c, err = scanSaved(s.pool.QueryRow(ctx, selectCheckpoints, s.slot))
	if errors.Is(err, pgx.ErrNoRows) {
		return Saved{}, false, nil
	}
	if err != nil {
		return Saved{}, false, fmt.Errorf("read checkpoint: %w", err)
	}
	return c, true, nil
}

// claimTries is how often Claim waits a second for a lock of the holder before.
const claimTries = 5

// endFrozen ends sessions like ours that have stood still for a second in a transaction, because
// their process was stopped or is out of reach: it may hold locks for hours.
const endFrozen = `
select count(pg_terminate_backend(pid))
from pg_stat_activity
where datname = current_database()
and usename = current_user
and application_name = current_setting('application_name')
and backend_type = 'client backend'
and pid <> pg_backend_pid()
and wait_event = 'ClientRead'
and xact_start < clock_timestamp() - interval '1 second'`

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

// Claim takes the checkpoint over for the instance that has just got the slot: from here on
// writes of the holder before fail with ErrFenced. Where that was ourselves, and nobody since, the
// epoch stays, or a write of ours that is under way would fail. Where there is no checkpoint, it is made at
// first. systemIdentifier is what IDENTIFY_SYSTEM told the connection that has the slot.
func (s *Store) Claim(ctx context.Context, systemIdentifier string, first cdc.LSN) (Claimed, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := s.sameServer(ctx, systemIdentifier); err != nil {
		return Claimed{}, fmt.Errorf("claim checkpoint: %w", err)
	}
	claimed, err := s.tryClaim(ctx, systemIdentifier, first)
	for try := 1; try < claimTries && isLocked(err); try++ {
		claimed, err = s.tryClaim(ctx, systemIdentifier, first)
	}
	if err != nil {
		return Claimed{}, fmt.Errorf("claim checkpoint: %w", err)
	}
	s.epoch.Store(claimed.Epoch)
	s.sample.forget()
	if claimed.Parked > 0 {
		s.log.Info("parked what the holder before had in flight", zap.Int64("deliveries", claimed.Parked))
	}
	return claimed, nil
}

func isLocked(err error) bool {
	var refused *pgconn.PgError
	const lockNotAvailable = "55P03"
	return errors.As(err, &refused) && refused.Code == lockNotAvailable
}

func (s *Store) tryClaim(ctx context.Context, systemIdentifier string, first cdc.LSN) (claimed Claimed, err error) {
	if _, err := s.pool.Exec(ctx, endFrozen); err != nil {
		return Claimed{}, fmt.Errorf("end frozen sessions: %w", err)
	}
	err = pgx.BeginTxFunc(ctx, s.pool, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(tx pgx.Tx) (err error) {
		if _, err := tx.Exec(ctx, settings); err != nil {
			return fmt.Errorf("settings: %w", err)
		}
		if _, err := tx.Exec(ctx, "set local lock_timeout = '1s'"); err != nil {
			return fmt.Errorf("settings: %w", err)
		}
		claimed, err = s.claim(ctx, tx, systemIdentifier, first)
		return err
	})
	return claimed, err
}

// sameServer compares the cluster of our connections with the one of the slot's.
func (s *Store) sameServer(ctx context.Context, systemIdentifier string) error {
	var ours string
	err := s.pool.QueryRow(ctx, "select system_identifier::text from pg_control_system()").Scan(&ours)
	var refused *pgconn.PgError
	const insufficientPrivilege = "42501" // everybody may, unless somebody revoked it
	if errors.As(err, &refused) && refused.Code == insufficientPrivilege {
		return nil
	}
	if err != nil {
		return fmt.Errorf("identify server: %w", err)
	}
	if ours != systemIdentifier {
		return fmt.Errorf("%w: %s and %s", ErrOtherServer, ours, systemIdentifier)
	}
	return nil
}

const claimCheckpoint = `
insert into walhook.checkpoints as c (slot, instance, system_identifier, database, epoch, lsn)
values ($1, $2, $3, $4, 1, $5::text::pg_lsn)
on conflict (slot) do update
	set epoch = c.epoch + case when c.epoch = $6 then 0 else 1 end
returning epoch, updated_at`

const parkSending = `
update walhook.deliveries
set state = 'parked'
where state = 'sending'`

func (s *Store) claim(ctx context.Context, tx pgx.Tx, systemIdentifier string, first cdc.LSN) (Claimed, error) {
	here := Identity{SystemIdentifier: systemIdentifier, Instance: s.instance}
	if err := tx.QueryRow(ctx, "select current_database()").Scan(&here.Database); err != nil {
		return Claimed{}, fmt.Errorf("identify database: %w", err)
	}
	claimed := Claimed{First: true, Saved: Saved{Checkpoint: outbox.Checkpoint{LSN: first}, Identity: here}}

	// Checkpoints of all slots are looked at: a copy whose slot was given another name is a copy.
	rows, err := tx.Query(ctx, selectCheckpoints+"\nfor update", nil)
	if err != nil {
		return Claimed{}, fmt.Errorf("read: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		slot, saved, err := scanSaved(rows)
		if err != nil {
			return Claimed{}, fmt.Errorf("read: %w", err)
		}
		if saved.Identity != here {
			return Claimed{}, &CopyError{Slot: slot, Stored: saved.Identity, Here: here}
		}
		if slot == s.slot {
			claimed.Saved, claimed.First = saved, false
		}
	}
	if err := rows.Err(); err != nil {
		return Claimed{}, fmt.Errorf("read: %w", err)
	}
	err = tx.QueryRow(ctx, claimCheckpoint, s.slot, here.Instance, here.SystemIdentifier, here.Database, first.String(), s.epoch.Load()).
		Scan(&claimed.Epoch, &claimed.UpdatedAt)
	if err != nil {
		return Claimed{}, fmt.Errorf("take over: %w", err)
	}
	claimed.UpdatedAt = claimed.UpdatedAt.UTC()
	tag, err := tx.Exec(ctx, parkSending)
	if err != nil {
		return Claimed{}, fmt.Errorf("park what was sending: %w", err)
	}
	claimed.Parked = tag.RowsAffected()
	return claimed, nil
}

const saveCheckpoint = `
update walhook.checkpoints
set
	lsn = $3::text::pg_lsn,
	commit_lsn = $4::text::pg_lsn,
	ordinal = $5,
	snap_xmin = coalesce($6::text::numeric, snap_xmin),
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
	var commit, ordinal, xmin any
	if c.Position != (cdc.Position{}) {
		commit, ordinal = c.Position.Commit.String(), int64(c.Position.Ordinal)
	}
	if x, ok := s.sample.below(c.LSN); ok {
		xmin = x
	}
	var (
		updated                           int64
		flushText, insertText, sampleXmin string
	)
	save := step{
		what: "update", sql: saveCheckpoint, args: []any{s.slot, s.epoch.Load(), c.LSN.String(), commit, ordinal, xmin},
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
	s.sample.offer(insert, sampleXmin)
	return proof, nil
}

// sample is the oldest running transaction of a moment, and the end of the WAL a little later.
// Once everything below that end is settled, every transaction id below xmin is, and the next
// checkpoint may say so: after the loss of the slot, the rows of the others are sent again.
type sample struct {
	mu   sync.Mutex // guards lsn, xmin
	lsn  cdc.LSN    // zero: none is taken
	xmin string
}

// offer keeps the sample unless an earlier one still waits.
func (s *sample) offer(lsn cdc.LSN, xmin string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lsn == 0 {
		s.lsn, s.xmin = lsn, xmin
	}
}

// below returns the sample where everything below settled includes its position, and drops it.
func (s *sample) below(settled cdc.LSN) (xmin string, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lsn == 0 || s.lsn > settled {
		return "", false
	}
	xmin, s.lsn = s.xmin, 0
	return xmin, true
}

func (s *sample) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lsn = 0
}
