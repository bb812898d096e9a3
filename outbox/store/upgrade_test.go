package store

import (
	"context"
	"fmt"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/cdc/pgtest"
	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/outbox/outboxtest"
)

// What the program of schema version 1 says to walhook.checkpoints. Its other statements are
// of tables that are as they were.
const (
	v1Select = `
select
	slot, instance, system_identifier, database, epoch, lsn::text, coalesce(commit_lsn, '0/0')::text, coalesce(ordinal, 0),
	coalesce(snap_xmin, 0)::text, updated_at
from walhook.checkpoints
where slot = coalesce($1, slot)`
	v1Claim = `
insert into walhook.checkpoints as c (slot, instance, system_identifier, database, epoch, lsn)
values ($1, $2, $3, $4, 1, $5::text::pg_lsn)
on conflict (slot) do update
	set epoch = c.epoch + case when c.epoch = $6 then 0 else 1 end
returning epoch, updated_at`
	v1Save = `
update walhook.checkpoints
set
	lsn = $3::text::pg_lsn,
	commit_lsn = $4::text::pg_lsn,
	ordinal = $5,
	snap_xmin = coalesce($6::text::numeric, snap_xmin),
	updated_at = now()
where slot = $1
and epoch = $2`
)

// version1 is a program of schema version 1.
type version1 struct {
	b     *bundle
	conn  *pgx.Conn
	epoch int64
}

func (b *bundle) version1() *version1 {
	conn, err := pgx.Connect(b.t.Context(), b.url)
	require.NoError(b.t, err)
	b.t.Cleanup(func() { conn.Close(context.Background()) })
	return &version1{b: b, conn: conn}
}

func (v *version1) claim(at cdc.LSN) (first bool) {
	ctx, here := v.b.t.Context(), v.b.here("default")
	rows, err := v.conn.Query(ctx, v1Select+"\nfor update", nil)
	require.NoError(v.b.t, err)
	found, err := pgx.CollectRows(rows, pgx.RowToMap)
	require.NoError(v.b.t, err)
	var ignored any
	err = v.conn.QueryRow(ctx, v1Claim, "walhook", here.Instance, here.SystemIdentifier, here.Database, at.String(), v.epoch).Scan(&v.epoch, &ignored)
	require.NoError(v.b.t, err)
	_, err = v.conn.Exec(ctx, parkSending)
	require.NoError(v.b.t, err)
	return len(found) == 0
}

func (v *version1) save(at cdc.LSN, xmin any) (updated int64) {
	tag, err := v.conn.Exec(v.b.t.Context(), v1Save, "walhook", v.epoch, at.String(), nil, nil, xmin)
	require.NoError(v.b.t, err)
	return tag.RowsAffected()
}

func (v *version1) write(changes ...outbox.Change) error {
	return pgx.BeginFunc(v.b.t.Context(), v.conn, func(tx pgx.Tx) error {
		return send(v.b.t.Context(), tx, append([]step{{what: "hold slot", sql: hold, args: []any{"walhook", v.epoch}}}, insertSteps(changes, false)...))
	})
}

// atVersion gives a database whose schema was made by an earlier version.
func atVersion(t *testing.T, version int) *bundle {
	b := empty(t, pgtest.DB(t))
	b.exec("create schema walhook")
	for i, sql := range migrations()[:version] {
		b.exec(sql + fmt.Sprintf(recordMigration, i+1))
	}
	return b
}

func TestSchemaOfVersion1IsMigratedAndNothingLost(t *testing.T) {
	b := atVersion(t, 1)
	old := b.version1()
	require.True(t, old.claim(100))
	require.NoError(t, old.write(park(1), outboxtest.Park("b", outboxtest.Event(2, "k"))))
	require.EqualValues(t, 1, old.save(200, "70"))

	require.NoError(t, b.Migrate(t.Context()))
	require.Equal(t, SchemaVersion(), b.count("schema_migrations"))
	saved := b.saved()
	require.Equal(t, Saved{
		Checkpoint: outbox.Checkpoint{LSN: 200},
		Identity:   Identity{SystemIdentifier: b.system, Database: b.here("").Database, Instance: "default"},
		Epoch:      1, SnapXmin: 70, UpdatedAt: saved.UpdatedAt,
	}, saved)
	claimed, err := b.Claim(t.Context(), b.holder(1))
	require.NoError(t, err)
	require.Equal(t, saved.Checkpoint, claimed.Checkpoint)
	for _, endpoint := range []string{"a", "b"} {
		rows, _, err := b.Scan(t.Context(), endpoint, cdc.Position{}, nil, 10, 1000)
		require.NoError(t, err)
		require.Len(t, rows, 1)
	}
	require.NoError(t, b.Migrate(t.Context()), "again")
	b.exec(SetupSQL())
	require.Equal(t, b.here("default"), b.saved().Identity)
}

// docs/faults.md 87: during a rolling upgrade both are at work, and either may take over from the other.
func TestProgramOfVersion1WorksBesideThis(t *testing.T) {
	b := atVersion(t, 1)
	old := b.version1()
	old.claim(100)
	require.NoError(t, b.Migrate(t.Context()))
	require.NoError(t, old.write(park(1)))
	require.EqualValues(t, 1, old.save(200, "70"))

	h := b.holder(1)
	h.Tables = map[string]uint32{`"public"."outbox"`: 16384}
	claimed, err := b.Claim(t.Context(), h)
	require.NoError(t, err)
	require.EqualValues(t, 200, claimed.LSN)
	require.ErrorContains(t, old.write(park(2)), fenced)
	require.Zero(t, old.save(300, nil))
	require.NoError(t, b.fill(700, 70).Commit(t.Context()))
	require.NoError(t, b.SaveGap(t.Context(), "the slot is gone"))

	next := b.version1()
	require.False(t, next.claim(1))
	require.ErrorIs(t, b.Write(t.Context(), []outbox.Change{park(2)}), outbox.ErrFenced)
	require.NoError(t, next.write(park(2)))
	require.EqualValues(t, 1, next.save(800, "90"))
	saved := b.saved()
	require.Equal(t, Saved{
		Checkpoint: outbox.Checkpoint{LSN: 800}, Identity: b.here("default"), Epoch: next.epoch,
		SnapXmin: 90, ProvenXmin: 70, Gap: "the slot is gone", Tables: h.Tables, UpdatedAt: saved.UpdatedAt,
	}, saved, "what it does not know it leaves")
	_, err = b.Claim(t.Context(), b.holder(1))
	require.NoError(t, err)
	require.Equal(t, 2, b.count("deliveries"))
}

// A process that was stopped in the middle of a write does not keep the next version from starting.
func TestFrozenHolderDoesNotHoldUpTheMigration(t *testing.T) {
	b := atVersion(t, 1)
	old := b.version1()
	old.claim(100)
	frozen := open(t, b.url, "walhook", "default")
	tx, err := frozen.pool.Begin(t.Context())
	require.NoError(t, err)
	defer func() { _ = tx.Rollback(context.Background()) }()
	_, err = tx.Exec(t.Context(), hold, "walhook", old.epoch)
	require.NoError(t, err)
	b.await(`select count(*) > 0 from pg_stat_activity where datname = current_database() and state = 'idle in transaction'
		and xact_start < clock_timestamp() - interval '1 second'`)
	require.NoError(t, b.Migrate(t.Context()))
	require.Error(t, tx.Commit(t.Context()))
}
