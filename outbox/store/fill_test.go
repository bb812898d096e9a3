package store

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/cdc/pgtest"
	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/outbox/outboxtest"
)

func (b *bundle) fill(at cdc.LSN, xmin uint64) *Fill {
	b.t.Helper()
	f, err := b.Fill(b.t.Context(), b.holder(at), xmin)
	require.NoError(b.t, err)
	b.t.Cleanup(f.Abort)
	return f
}

// fills is what pg_stat_activity tells of the session that fills.
const fills = ` from pg_stat_activity where datname = current_database() and application_name = 'walhook fill'`

// await returns once the SQL's bool is true.
func (b *bundle) await(sql string) {
	b.t.Helper()
	conn, err := pgx.Connect(b.t.Context(), b.url)
	require.NoError(b.t, err)
	defer conn.Close(context.Background())
	for ok := false; !ok; {
		require.NoError(b.t, conn.QueryRow(b.t.Context(), sql).Scan(&ok))
	}
}

func TestAnnouncedSnapshotIsNotStreamedFrom(t *testing.T) {
	b := empty(t, pgtest.DB(t))
	require.NoError(t, b.Migrate(t.Context()))
	h := b.holder(0)
	h.Tables = map[string]uint32{`"public"."outbox"`: 16384}
	require.NoError(t, b.Announce(t.Context(), h))
	saved := b.saved()
	require.Equal(t, Saved{Identity: b.here("default"), Tables: h.Tables, UpdatedAt: saved.UpdatedAt}, saved)

	// Neither by who announced it nor by another, and as often as they try.
	other := open(t, b.url, "walhook", "default")
	for _, s := range []*Store{b.Store, other, b.Store} {
		_, err := s.Claim(t.Context(), b.holder(500))
		require.ErrorIs(t, err, ErrUnfinished)
		require.ErrorIs(t, s.Write(t.Context(), []outbox.Change{park(1)}), outbox.ErrFenced)
		_, err = s.SaveCheckpoint(t.Context(), outbox.Checkpoint{LSN: 5})
		require.ErrorIs(t, err, outbox.ErrFenced)
	}
	require.NoError(t, other.Announce(t.Context(), b.holder(0)), "again, as after a crash")
	require.Equal(t, saved, b.saved())

	f := b.fill(700, 70)
	require.NoError(t, f.Write(t.Context(), []outbox.Change{park(1)}))
	require.NoError(t, f.Commit(t.Context()))
	claimed, err := other.Claim(t.Context(), b.holder(800))
	require.NoError(t, err)
	require.False(t, claimed.First)
	require.EqualValues(t, 700, claimed.LSN)
	require.EqualValues(t, 2, claimed.Epoch)

	before := b.saved()
	require.NoError(t, b.Announce(t.Context(), b.holder(0)))
	require.Equal(t, before, b.saved(), "a checkpoint that is there stays")
	require.NoError(t, other.Write(t.Context(), []outbox.Change{park(2)}))
}

// Where the slot itself stood at nothing when it was claimed, nothing was announced.
func TestClaimAtNothingCanBeRepeated(t *testing.T) {
	b := empty(t, pgtest.DB(t))
	require.NoError(t, b.Migrate(t.Context()))
	for range 2 {
		_, err := open(t, b.url, "walhook", "default").Claim(t.Context(), b.holder(0))
		require.NoError(t, err)
	}
}

func TestClaimRecordsTheTables(t *testing.T) {
	b := setup(t)
	require.Nil(t, b.saved().Tables)
	for _, tables := range []map[string]uint32{
		{`"public"."outbox"`: 16384, `"it's"."a ""b"""`: 4294967295}, {`"public"."outbox"`: 4}, {},
	} {
		h := b.holder(1)
		h.Tables = tables
		before := b.saved().Tables
		claimed, err := b.Claim(t.Context(), h)
		require.NoError(t, err)
		require.Equal(t, before, claimed.Tables, "as found")
		require.Equal(t, tables, b.saved().Tables)
		_, err = b.Claim(t.Context(), b.holder(1))
		require.NoError(t, err)
		require.Equal(t, tables, b.saved().Tables, "who does not know leaves them")
	}
}

func TestFirstReasonOfAGapStays(t *testing.T) {
	b := setup(t)
	require.Empty(t, b.saved().Gap)
	require.NoError(t, b.SaveGap(t.Context(), "publication walhook was dropped\x00"+strings.Repeat("é", 5000)))
	gap := b.saved().Gap
	require.True(t, strings.HasPrefix(gap, "publication walhook was dropped\uFFFDé"))
	require.NoError(t, b.SaveGap(t.Context(), "the slot is gone"))
	require.Equal(t, gap, b.saved().Gap)
	b.save(300)
	_, err := b.Claim(t.Context(), b.holder(1))
	require.NoError(t, err)
	require.Equal(t, gap, b.saved().Gap, "only a fill closes it")

	f := b.fill(700, 70)
	require.NoError(t, f.Commit(t.Context()))
	require.Empty(t, b.saved().Gap)
}

func TestGapIsRecordedWithoutAClaimToo(t *testing.T) {
	b := empty(t, pgtest.DB(t))
	require.NoError(t, b.Migrate(t.Context()))
	require.NoError(t, b.SaveGap(t.Context(), "x"), "no checkpoint: nothing can be missing")
	require.Zero(t, b.count("checkpoints"))
	_, err := b.Claim(t.Context(), b.holder(100))
	require.NoError(t, err)

	waiting := open(t, b.url, "walhook", "default")
	_, _, err = waiting.Checkpoint(t.Context(), b.system)
	require.NoError(t, err)
	stranger := open(t, b.url, "walhook", "default")
	require.NoError(t, stranger.SaveGap(t.Context(), "the slot is gone"))
	require.Equal(t, "the slot is gone", b.saved().Gap)

	// Another was faster, and has closed it. What is known of the time before says nothing any more.
	next := &bundle{Store: open(t, b.url, "walhook", "default"), t: t, url: b.url, system: b.system}
	require.NoError(t, next.fill(700, 70).Commit(t.Context()))
	require.NoError(t, waiting.SaveGap(t.Context(), "the slot is gone"))
	require.ErrorIs(t, b.SaveGap(t.Context(), "the slot is gone"), outbox.ErrFenced)
	require.Empty(t, b.saved().Gap)
}

func TestProofFollowsTheSnapshot(t *testing.T) {
	b := setup(t)
	early, late := time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	advance := func(at cdc.LSN) cdc.LSN { // until a snapshot that is taken now is recorded
		t.Helper()
		b.exec("select pg_current_xact_id()")
		before := b.saved().SnapXmin
		for {
			at = max(b.save(at+1<<20), at)
			if b.saved().SnapXmin > before {
				return at
			}
		}
	}
	b.Proven(late)
	at := b.save(101)
	b.Proven(late)
	b.save(102)
	require.Zero(t, b.saved().ProvenXmin, "no snapshot was recorded")

	at = advance(at)
	b.Proven(early)
	b.save(102) // settles no further snapshot, like those below
	first := b.saved().SnapXmin
	require.Zero(t, b.saved().ProvenXmin, "the look began before the snapshot was taken")
	b.Proven(late)
	require.Zero(t, b.saved().ProvenXmin, "it does nothing by itself")
	b.save(102)
	require.Equal(t, first, b.saved().ProvenXmin)
	require.LessOrEqual(t, first, b.saved().SnapXmin)

	at = advance(at)
	second := b.saved().SnapXmin
	require.Greater(t, second, first)
	require.Equal(t, first, b.saved().ProvenXmin, "nobody has looked since")
	b.Proven(early)
	at = advance(at)
	require.Equal(t, first, b.saved().ProvenXmin)

	// What was found by the holder before says nothing to the next, and takes nothing from it.
	b.Proven(late)
	_, err := b.Claim(t.Context(), b.holder(1))
	require.NoError(t, err)
	b.save(103)
	require.Equal(t, first, b.saved().ProvenXmin)
	b.Proven(late)
	b.save(104)
	require.Equal(t, first, b.saved().ProvenXmin, "this holder has recorded no snapshot")
	b.exec("update walhook.checkpoints set proven_xmin = 4000000000000000000")
	at = advance(at)
	b.Proven(late)
	b.save(at)
	require.EqualValues(t, uint64(4000000000000000000), b.saved().ProvenXmin, "it never goes back")
	require.NoError(t, b.fill(at+1<<30, 18446744073709551615).Commit(t.Context()))
	require.EqualValues(t, uint64(18446744073709551615), b.saved().ProvenXmin)
	require.NoError(t, b.fill(at+1<<30, 70).Commit(t.Context()))
	require.EqualValues(t, 70, b.saved().ProvenXmin, "but by a fill")
	b.save(at + 1<<31)
	b.save(at + 1<<31)
	require.EqualValues(t, 70, b.saved().ProvenXmin, "a look of before the fill says nothing")
}

func TestFillParksRowsAndMovesTheCheckpointAtOnce(t *testing.T) {
	b := setup(t)
	sending := park(1)
	sending.State = outbox.StateSending
	there := park(2)
	there.Attempts, there.Reason = 3, outbox.ReasonTimeout
	require.NoError(t, b.Write(t.Context(), []outbox.Change{sending, there}))
	_, err := b.SaveCheckpoint(t.Context(), outbox.Checkpoint{LSN: 200, Position: cdc.Position{Commit: 210, Ordinal: 3}})
	require.NoError(t, err)
	require.NoError(t, b.SaveGap(t.Context(), "the slot is gone"))
	before := b.saved()

	s := &bundle{Store: open(t, b.url, "walhook", "default"), t: t, url: b.url, system: b.system}
	h := s.holder(0x16B374D848)
	h.Tables = map[string]uint32{`"public"."outbox"`: 16384}
	f, err := s.Fill(t.Context(), h, 4711)
	require.NoError(t, err)
	defer f.Abort()
	dead := outboxtest.Park("", outboxtest.Event(9, ""))
	dead.State, dead.Reason = outbox.StateDead, outbox.ReasonUnmappable
	require.NoError(t, f.Write(t.Context(), nil))
	require.NoError(t, f.Write(t.Context(), []outbox.Change{park(2), park(3), outboxtest.Park("b", outboxtest.Event(3, "k"))}))
	require.NoError(t, f.Write(t.Context(), []outbox.Change{park(1), park(3), dead}))
	require.ErrorIs(t, f.Write(t.Context(), []outbox.Change{gone(1)}), errNotNew)

	require.Equal(t, 2, b.count("deliveries"), "nothing can be seen")
	require.Equal(t, 2, b.count("events"))
	require.Equal(t, before, b.saved())

	require.NoError(t, f.Commit(t.Context()))
	f.Abort()
	f.Abort()
	require.ErrorIs(t, f.Write(t.Context(), []outbox.Change{park(4)}), errFillEnded)
	require.ErrorIs(t, f.Commit(t.Context()), errFillEnded)
	var got string
	b.query(`
		select string_agg(concat_ws('|', coalesce(endpoint_id, 'null'), event_id, state, reason, attempts), e'\n' order by event_id, endpoint_id)
		from walhook.deliveries`, &got)
	require.Equal(t, ""+
		"a|evt_1|sending|breaker_open|0\n"+ // until the claim that follows
		"a|evt_2|parked|timeout|3\n"+
		"a|evt_3|parked|breaker_open|0\n"+
		"b|evt_3|parked|breaker_open|0\n"+
		"null|evt_9|dead|unmappable|0", got)
	require.Equal(t, 4, b.count("events"))
	saved := b.saved()
	require.Equal(t, Saved{
		Checkpoint: outbox.Checkpoint{LSN: 0x16B374D848}, Identity: b.here("default"), Epoch: before.Epoch + 1,
		SnapXmin: 4711, ProvenXmin: 4711, Tables: h.Tables, UpdatedAt: saved.UpdatedAt,
	}, saved)
	require.False(t, saved.UpdatedAt.Before(before.UpdatedAt))

	require.ErrorIs(t, b.Write(t.Context(), []outbox.Change{park(5)}), outbox.ErrFenced, "the holder of before")
	_, err = b.SaveCheckpoint(t.Context(), outbox.Checkpoint{LSN: 300})
	require.ErrorIs(t, err, outbox.ErrFenced)
	require.NoError(t, s.Write(t.Context(), []outbox.Change{park(5)}), "who filled may go on")
	claimed, err := s.Claim(t.Context(), s.holder(1))
	require.NoError(t, err)
	require.Equal(t, saved.Epoch, claimed.Epoch)
	require.EqualValues(t, 1, s.pool.Stat().TotalConns(), "the connection was given back")
}

func TestFillMakesTheCheckpointWhereThereIsNone(t *testing.T) {
	b := empty(t, pgtest.DB(t))
	require.NoError(t, b.Migrate(t.Context()))
	_, err := b.Fill(t.Context(), b.holder(0), 70)
	require.ErrorContains(t, err, "the slot's position is not known")
	f := b.fill(700, 0)
	f.Abort()
	require.Zero(t, b.count("checkpoints"))
	f = b.fill(700, 0)
	require.NoError(t, f.Write(t.Context(), []outbox.Change{park(1)}))
	require.NoError(t, f.Commit(t.Context()))
	saved := b.saved()
	require.EqualValues(t, 700, saved.LSN)
	require.EqualValues(t, 1, saved.Epoch)
	require.Zero(t, saved.SnapXmin, "not known")
	var known bool
	b.query("select snap_xmin is not null or proven_xmin is not null from walhook.checkpoints", &known)
	require.False(t, known)
	_, err = b.Fill(t.Context(), Holder{SystemIdentifier: "4711", At: 1}, 1)
	require.ErrorIs(t, err, ErrOtherServer)
}

func TestFillThatEndsEarlyLeavesNothing(t *testing.T) {
	for name, end := range map[string]func(b *bundle, f *Fill){
		"aborted": func(_ *bundle, f *Fill) { f.Abort() },
		"its session is ended": func(b *bundle, f *Fill) {
			b.exec("select pg_terminate_backend(pid, 10000)" + fills)
			require.Error(b.t, f.Commit(b.t.Context()))
		},
		"its session is ended and it writes": func(b *bundle, f *Fill) {
			b.exec("select pg_terminate_backend(pid, 10000)" + fills)
			require.Error(b.t, f.Write(b.t.Context(), []outbox.Change{park(3)}))
			require.Error(b.t, f.Commit(b.t.Context()))
		},
		"a write fails": func(b *bundle, f *Fill) {
			c := park(3)
			c.State = "nonsense"
			require.ErrorContains(b.t, f.Write(b.t.Context(), []outbox.Change{c}), "fill: insert deliveries: ")
			require.ErrorContains(b.t, f.Write(b.t.Context(), []outbox.Change{park(4)}), "fill: insert deliveries: ", "the first reason stays")
			require.ErrorContains(b.t, f.Commit(b.t.Context()), "commit fill: insert deliveries: ")
		},
		"a write is cancelled": func(b *bundle, f *Fill) {
			ctx, cancel := context.WithCancel(b.t.Context())
			cancel()
			require.ErrorIs(b.t, f.Write(ctx, []outbox.Change{park(3)}), context.Canceled)
			require.ErrorIs(b.t, f.Commit(b.t.Context()), context.Canceled)
		},
		"its commit is cancelled": func(b *bundle, f *Fill) {
			ctx, cancel := context.WithCancel(b.t.Context())
			cancel()
			require.ErrorIs(b.t, f.Commit(ctx), context.Canceled)
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := setup(t)
			sending := park(1)
			sending.State = outbox.StateSending
			require.NoError(t, b.Write(t.Context(), []outbox.Change{sending}))
			before := b.saved()
			f := b.fill(700, 70)
			require.NoError(t, f.Write(t.Context(), []outbox.Change{park(2)}))
			end(b, f)
			f.Abort()
			b.await("select count(*) = 0" + fills)
			require.Equal(t, before, b.saved())
			require.Equal(t, 1, b.count("deliveries"))
			require.Equal(t, 1, b.count("events"))
			var state string
			b.query("select state from walhook.deliveries", &state)
			require.Equal(t, "sending", state)
			require.NoError(t, b.Write(t.Context(), []outbox.Change{park(5)}), "the holder goes on")

			f = b.fill(700, 70)
			require.NoError(t, f.Write(t.Context(), []outbox.Change{park(2)}))
			require.NoError(t, f.Commit(t.Context()))
			require.Equal(t, 3, b.count("deliveries"))
		})
	}
}

// docs/faults.md 76: it was done, and nobody was told.
func TestLostAnswerToACommitIsAnError(t *testing.T) {
	b := setup(t)
	p := newProxy(t, b)
	p.cutAfter = []byte("commit\x00")
	s := open(t, p.url, "walhook", "default")
	f, err := s.Fill(t.Context(), b.holder(700), 70)
	require.NoError(t, err)
	require.NoError(t, f.Write(t.Context(), []outbox.Change{park(1)}))
	require.ErrorContains(t, f.Commit(t.Context()), "commit fill: ")
	f.Abort()
	require.EqualValues(t, 700, b.saved().LSN, "the checkpoint tells")
	require.Equal(t, 1, b.count("deliveries"))
	require.ErrorIs(t, b.Write(t.Context(), []outbox.Change{park(2)}), outbox.ErrFenced)
}

func TestSecondFillWaitsAndFences(t *testing.T) {
	b := setup(t)
	first := b.fill(700, 70)
	require.NoError(t, first.Write(t.Context(), []outbox.Change{park(1)}))

	second := &bundle{Store: open(t, b.url, "walhook", "default"), t: t, url: b.url, system: b.system}
	type result struct {
		f   *Fill
		err error
	}
	begun := make(chan result, 1)
	go func() {
		f, err := second.Fill(t.Context(), b.holder(800), 80)
		begun <- result{f, err}
	}()
	// Longer than a session that stands still in a transaction is left alone.
	b.await("select count(*) > 0" + fills + " and xact_start < clock_timestamp() - interval '2.5 seconds'")
	b.awaitLockWait()
	require.Empty(t, begun)
	require.NoError(t, first.Write(t.Context(), []outbox.Change{park(2)}))
	require.NoError(t, first.Commit(t.Context()))
	epoch := b.saved().Epoch

	r := <-begun
	require.NoError(t, r.err)
	defer r.f.Abort()
	require.NoError(t, r.f.Write(t.Context(), []outbox.Change{park(2), park(3)}))
	require.NoError(t, r.f.Commit(t.Context()))
	require.EqualValues(t, 800, b.saved().LSN)
	require.Equal(t, epoch+1, b.saved().Epoch)
	require.Equal(t, 3, b.count("deliveries"))
	require.ErrorIs(t, b.Write(t.Context(), []outbox.Change{park(4)}), outbox.ErrFenced)
	require.NoError(t, second.Write(t.Context(), []outbox.Change{park(4)}))
}

func TestSecondFillGivesUpWithItsContext(t *testing.T) {
	b := setup(t)
	first := b.fill(700, 70)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	other := open(t, b.url, "walhook", "default")
	go func() {
		_, err := other.Fill(ctx, b.holder(800), 80)
		done <- err
	}()
	b.awaitLockWait()
	cancel()
	require.Error(t, <-done)
	require.NoError(t, first.Commit(t.Context()))
	require.EqualValues(t, 700, b.saved().LSN)
}

// What the holder of before had begun is part of what the fill finds.
func TestFillWaitsForTheWriteBeforeIt(t *testing.T) {
	b := setup(t)
	tx, err := b.pool.Begin(t.Context())
	require.NoError(t, err)
	defer func() { _ = tx.Rollback(context.Background()) }()
	_, err = tx.Exec(t.Context(), hold, "walhook", b.epoch.Load())
	require.NoError(t, err)
	done := make(chan error, 1)
	other := open(t, b.url, "walhook", "default")
	go func() {
		f, err := other.Fill(t.Context(), b.holder(800), 80)
		if err == nil {
			err = f.Commit(t.Context())
		}
		done <- err
	}()
	b.awaitLockWait()
	require.Empty(t, done)
	require.NoError(t, tx.Commit(t.Context()))
	require.NoError(t, <-done)
}

// A schema may serve several slots. One that is filled for an hour does not hold up the others.
func TestFillLeavesOtherSlotsAlone(t *testing.T) {
	b := setup(t)
	other := open(t, b.url, "another", "default")
	_, err := other.Claim(t.Context(), b.holder(500))
	require.NoError(t, err)
	ev := outboxtest.Event(1, "")
	sending := outboxtest.Park("theirs", ev)
	sending.State = outbox.StateSending
	require.NoError(t, other.Write(t.Context(), []outbox.Change{sending}))
	f := b.fill(800, 80)
	require.NoError(t, other.Write(t.Context(), []outbox.Change{outboxtest.Move("theirs", ev, outbox.StateGone)}))
	_, err = other.SaveCheckpoint(t.Context(), outbox.Checkpoint{LSN: 600})
	require.NoError(t, err)
	_, err = other.Claim(t.Context(), b.holder(600))
	require.NoError(t, err)
	require.NoError(t, f.Commit(t.Context()))
}

// Rows may be long in coming. A process that is stopped in the middle gives no sign of life.
func TestFrozenFillDoesNotHoldUpTheNext(t *testing.T) {
	b := setup(t)
	b.beat = time.Millisecond
	f := b.fill(700, 70)
	conn, err := pgx.Connect(t.Context(), b.url)
	require.NoError(t, err)
	defer conn.Close(context.Background())
	var since time.Time
	require.NoError(t, conn.QueryRow(t.Context(), "select state_change"+fills).Scan(&since))
	for beats := false; !beats; {
		require.NoError(t, conn.QueryRow(t.Context(), "select state_change > $1"+fills, since).Scan(&beats))
	}
	f.Abort()

	b.beat = time.Hour
	f = b.fill(700, 70)
	require.NoError(t, f.Write(t.Context(), []outbox.Change{park(1)}))
	b.await("select bool_and(xact_start < clock_timestamp() - interval '1 second')" + fills)
	next := open(t, b.url, "walhook", "default")
	next.silence = time.Millisecond
	_, err = next.Claim(t.Context(), b.holder(1))
	require.NoError(t, err)
	require.Error(t, f.Commit(t.Context()))
	require.Zero(t, b.count("deliveries"))
}

func TestFillIsDurableAndMayTakeLongWhateverTheDefault(t *testing.T) {
	b := setup(t)
	var name string
	b.query("select quote_ident(current_database())", &name)
	b.exec("alter database " + name + " set idle_in_transaction_session_timeout = '20s'; alter database " + name + " set synchronous_commit = off")
	var version int
	b.query("select current_setting('server_version_num')::int", &version)
	if version >= 170000 {
		b.exec("alter database " + name + " set transaction_timeout = '30s'")
	}
	f, err := open(t, b.url, "walhook", "default").Fill(t.Context(), b.holder(700), 70)
	require.NoError(t, err)
	defer f.Abort()
	var got string
	require.NoError(t, f.t.tx.QueryRow(t.Context(), `
		select concat_ws(' ', current_setting('synchronous_commit'), current_setting('idle_in_transaction_session_timeout'),
			coalesce(current_setting('transaction_timeout', true), '0'), current_setting('lock_timeout'), current_setting('transaction_isolation'))`).Scan(&got))
	require.Equal(t, "on 0 0 10s read committed", got)
	require.NoError(t, f.Commit(t.Context()))
}

func TestEveryExecModeOfTheDriverFills(t *testing.T) {
	for _, mode := range []string{"cache_describe", "exec"} {
		b := setup(t)
		s := open(t, b.url+"?default_query_exec_mode="+mode, "walhook", "default")
		f, err := s.Fill(t.Context(), b.holder(700), 70)
		require.NoError(t, err)
		defer f.Abort()
		require.NoError(t, f.Write(t.Context(), []outbox.Change{park(1), park(2)}))
		require.NoError(t, f.Commit(t.Context()))
		require.NoError(t, s.SaveGap(t.Context(), "x"))
		require.Equal(t, "x", b.saved().Gap)
	}
}

func TestFillOfAnyLengthTakesLittleMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("200,000 rows")
	}
	b := setup(t)
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	const rows, batch = 200_000, 2000
	content := strings.Repeat("x", 500)
	f := b.fill(700, 70)
	before, most := heap(), uint64(0)
	for n := 0; n < rows; n += batch {
		changes := make([]outbox.Change, batch)
		for i := range changes {
			e := outboxtest.Event(n+i, "")
			e.Data = fmt.Appendf(nil, `{"n":%d,"x":"%s"}`, n+i, content)
			changes[i] = outboxtest.Park("a", e)
		}
		require.NoError(t, f.Write(t.Context(), changes))
		if n%(10*batch) == 0 {
			most = max(most, heap())
		}
	}
	require.NoError(t, f.Commit(t.Context()))
	require.Less(t, most, before+24<<20, "120 MB went through")
	require.Equal(t, rows, b.count("deliveries"))
	require.Equal(t, rows, b.count("events"))
}
