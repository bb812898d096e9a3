package cdc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/walhook/walhook/cdc/pgtest"
)

// requireInOrder holds that no row came twice or out of turn, and that the ordinals of each
// transaction count from 1.
func requireInOrder(t *testing.T, rows []got) {
	t.Helper()
	for i, r := range rows {
		if i > 0 {
			require.Negative(t, rows[i-1].Compare(r.Position), "row %d", i)
		}
		want := uint64(1)
		if i > 0 && rows[i-1].Commit == r.Commit {
			want = rows[i-1].Ordinal + 1
		}
		require.Equal(t, want, r.Ordinal, "row %d", i)
	}
}

func numbers(from, to int) (notes []string) {
	for n := from; n <= to; n++ {
		notes = append(notes, strconv.Itoa(n))
	}
	return notes
}

func TestCommittedRowsComeInCommitOrder(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	r := l.run(&sink{})
	r.untilState(Streaming)

	l.exec(`begin; insert into outbox (note) values ('rolled back'); rollback`)
	l.exec(`begin;
		insert into outbox (note) values ('a1');
		savepoint s; insert into outbox (note) values ('undone'); rollback to s;
		insert into outbox (note) values ('a2'), (null);
		commit`)
	l.exec(`insert into outbox (id, note) values (1000, 'b1')`)
	l.exec(`insert into outbox (id, note) values (1000, 'in conflict') on conflict do nothing`)
	l.exec(`insert into outbox (id, note) values (1000, 'updated') on conflict (id) do update set note = excluded.note`)

	// The lower id commits later.
	early := l.session()
	tx, err := early.Begin(t.Context())
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), `insert into outbox (id, note) values (2000, 'd1')`)
	require.NoError(t, err)
	between := l.walEnd()
	l.exec(`insert into outbox (id, note) values (2001, 'c1')`)
	_, err = tx.Exec(t.Context(), `insert into outbox (id, note) values (1999, 'd2')`)
	require.NoError(t, err)
	require.NoError(t, tx.Commit(t.Context()))

	l.copyIn([]string{"copy0", "copy1", "copy2"})

	r.untilRows(10)
	require.Equal(t, []string{"a1", "a2", "NULL", "b1", "c1", "d1", "d2", "copy0", "copy1", "copy2"}, r.sink.notes())
	rows := r.sink.all()
	requireInOrder(t, rows)
	require.Greater(t, rows[5].Commit, between, "the commit places a row, not its own record")
	require.Equal(t, rows[7].Commit, rows[9].Commit)
	require.WithinDuration(t, time.Now(), rows[9].at, time.Minute)
	r.until("all commits", func() bool { return r.sink.end() > rows[9].Commit })
	require.GreaterOrEqual(t, r.Received(), r.sink.end())
}

func TestStopBetweenInterleavedTransactionsLosesNothing(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{confirms: true}
	r := l.run(s)
	r.untilState(Streaming)

	long, err := l.session().Begin(t.Context())
	require.NoError(t, err)
	insert := func(note string) {
		_, err := long.Exec(t.Context(), `insert into outbox (note) values ($1)`, note)
		require.NoError(t, err)
	}
	insert("long 1")
	end := l.insert("short")
	r.untilRows(1)
	r.until("the short one is confirmed", func() bool { return l.confirmed() >= s.all()[0].Commit && r.Received() >= end })
	r.halt()

	insert("long 2")
	require.NoError(t, long.Commit(t.Context()))
	again := l.run(s)
	again.untilRows(3)
	require.Equal(t, []string{"short", "long 1", "long 2"}, s.notes())

	l.insert("last")
	again.untilRows(4)
	requireInOrder(t, s.all())
}

func TestKilledWalsenderIsResumedInsideTheTransaction(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{}
	killer := l.session()
	killed := 0
	s.onRow = func(n int) error {
		if n == 10_000 || n == 60_000 {
			killed++
			_, err := killer.Exec(context.Background(), `select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = $1`, l.slot)
			return err
		}
		return nil
	}
	r := l.run(s)
	r.untilState(Streaming)
	l.exec(`insert into outbox (id, note) select n, repeat('x', 500) from generate_series(1, 100000) n`)
	r.untilRows(100_000) // up to 14, transactions without rows end too
	r.until("the commit", func() bool { return s.end() > s.all()[99_999].Commit })
	require.Equal(t, 2, killed)
	require.Equal(t, 3, s.sessionCount())
	rows := s.all()
	require.Len(t, rows, 100_000)
	requireInOrder(t, rows)
	for i, g := range rows {
		require.Equal(t, strconv.Itoa(i+1), g.values[0])
	}
}

func TestNewStreamResumesInsideTheTransaction(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{}
	r := l.run(s)
	r.untilState(Streaming)
	l.copyIn(numbers(1, 1000)) // the rows of one COPY share their LSN
	r.until("the commit", func() bool { return s.end() > 0 })
	before := s.at.LSN
	r.halt()

	middle := s.all()[499].Position
	s = &sink{at: Resume{LSN: before, Position: middle}, made: true}
	r = l.run(s)
	r.until("the commit", func() bool { return s.end() > 0 })
	require.Equal(t, numbers(501, 1000), s.notes())
	require.Equal(t, Position{middle.Commit, middle.Ordinal + 1}, s.all()[0].Position)
	r.halt()

	// All rows are settled, and their commit is not.
	s = &sink{at: Resume{LSN: before, Position: Position{middle.Commit, 1000}}, made: true}
	r = l.run(s)
	r.until("the commit", func() bool { return s.end() > 0 })
	require.Zero(t, s.count())
	r.halt()

	// The holder before us wrote a checkpoint behind the commit when we had asked for it.
	end := s.end()
	s = &sink{at: Resume{LSN: before}, made: true}
	s.onClaim = func(Session) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.at.LSN = end
		return nil
	}
	r = l.run(s)
	l.insert("next")
	r.until("a commit", func() bool { return s.end() > 0 })
	require.Equal(t, []string{"next"}, s.notes())
}

func TestIdleSlotMovesWhileOtherTablesAreWritten(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{confirms: true}
	r := l.run(s)
	r.untilState(Streaming)
	l.exec(`create table other (filling text)`)
	l.exec(`insert into other select repeat('x', 1000) from generate_series(1, 1000)`)
	written := l.walEnd()
	r.until("the slot to move", func() bool { return l.confirmed() >= written })
	require.Zero(t, s.count())
}

func TestSlotNeverPassesAnUnconfirmedRow(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{}
	r := l.run(s)
	r.untilState(Streaming)
	l.insert("unconfirmed")
	r.untilRows(1)
	l.exec(`create table other (filling text)`)
	l.exec(`insert into other select repeat('x', 1000) from generate_series(1, 1000)`)
	written := l.walEnd()
	r.until("a keepalive", func() bool { return s.idleAt() >= written })
	r.poke()
	row := s.all()[0]
	require.LessOrEqual(t, l.confirmed(), row.Commit)
	r.halt()
	require.LessOrEqual(t, l.confirmed(), row.Commit)

	r = l.run(s)
	r.untilRows(2)
	require.Equal(t, row.Position, s.all()[1].Position)
}

// A status whose write position is that of the confirmed row makes Postgres 14 and later ask
// again at once, tens of thousands of times a second.
func TestUnconfirmedRowCausesNoStormOfStatuses(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	p := l.through()
	s := &sink{}
	r := l.run(s)
	r.untilState(Streaming)
	l.insert("unconfirmed")
	r.until("the commit", func() bool { return s.end() > 0 })
	l.exec(`create table other (n int)`)
	before, began := len(p.seen()), time.Now()
	for n := 0; time.Since(began) < 2*time.Second; n++ {
		l.exec(`insert into other values ($1)`, n)
	}
	written := l.walEnd()
	r.until("a keepalive", func() bool { return s.idleAt() >= written })
	took := time.Since(began).Seconds()
	require.Less(t, float64(len(p.seen())-before)/took, 10.0, "statuses a second")
	require.Less(t, p.asks(), 10)
	before = len(p.seen())
	r.until("a status", func() bool { r.poke(); return len(p.seen()) > before })
	last := p.seen()[before]
	require.GreaterOrEqual(t, last.write, written)
	require.Less(t, last.flush, s.end())
}

func TestConfirmWaitsForItsProof(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	p := l.through()
	s := &sink{}
	r := l.run(s)
	r.untilState(Streaming)
	l.insert("one")
	r.until("the commit", func() bool { return s.end() > 0 })
	end := s.end()
	r.Confirm(end, l.walEnd()+1<<40)
	before := len(p.seen())
	r.until("a status", func() bool { r.poke(); return len(p.seen()) > before+1 })
	require.Less(t, p.seen()[before+1].flush, end)
	require.Less(t, l.confirmed(), end)

	proof := l.insert("two")
	r.until("the next commit", func() bool { return s.end() > end })
	end = s.end()
	r.Confirm(end, proof)
	r.until("the slot to move", func() bool { return l.confirmed() == end })
	ctx, cancel := context.WithTimeout(t.Context(), testPatience)
	defer cancel()
	require.NoError(t, r.Confirmed(ctx))
}

func TestConfirmIsMonotonic(t *testing.T) {
	t.Parallel()
	s := New(Config{Logger: zap.NewNop()}, &sink{}, &sink{})
	s.told, s.received = 100, 1000
	s.Confirm(300, 400)
	s.Confirm(200, 100)
	require.True(t, s.advance())
	require.Equal(t, LSN(300), s.told)
	s.Confirm(250, 100)
	require.False(t, s.advance())
	require.Equal(t, LSN(300), s.told)
}

func TestConfirmIsNeverAheadOfWhatWasReceived(t *testing.T) {
	t.Parallel()
	s := New(Config{Logger: zap.NewNop()}, &sink{}, &sink{})
	s.told, s.received = 100, 200
	s.Confirm(300, 150)
	require.False(t, s.advance())
	s.received = 300
	require.True(t, s.advance())
	require.Equal(t, LSN(300), s.told)
}

// Where the stream is two seconds behind the end of the WAL and each second brings a checkpoint,
// the newest proof is never passed, but the ones before are.
func TestStreamThatIsBehindConfirmsAllTheSame(t *testing.T) {
	t.Parallel()
	s := New(Config{Logger: zap.NewNop()}, &sink{}, &sink{})
	s.told = 1
	for second := LSN(1); second <= 100; second++ {
		s.received = 1000*second - 2000
		if second < 2 {
			s.received = 1
		}
		s.advance()
		s.Confirm(max(2, s.received), 1000*second)
	}
	require.GreaterOrEqual(t, s.told, LSN(95_000))
}

// A wake that comes while the timer is at work must not be lost: the next look may be 10 s off.
func TestTimerSeesTheEndOfItsContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r := &reader{s: New(Config{Logger: zap.NewNop()}, &sink{}, &sink{})}
	require.ErrorIs(t, r.timer(ctx), context.Canceled)
}

func TestRestartOfTheServerLosesNothing(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{})
	l := labAt(t, server.URL())
	s := &sink{confirms: true}
	r := l.run(s)
	r.untilState(Streaming)
	n := 0
	for _, mode := range []pgtest.Mode{pgtest.Fast, pgtest.Immediate} {
		l.insert(strconv.Itoa(n))
		n++
		r.untilRows(n)
		sessions := s.sessionCount()
		stopServer(t, server, mode)
		require.NoError(t, server.Start(t.Context()))
		l.connect()
		l.insert(strconv.Itoa(n))
		n++
		r.untilRows(n)
		require.Greater(t, s.sessionCount(), sessions)
		require.Equal(t, numbers(0, n-1), s.notes(), "after a stop by way of %s", mode)
	}
	r.until("the last commit", func() bool { return s.end() > s.all()[n-1].Commit })
	r.halt()
	require.NoError(t, server.Stop(t.Context(), pgtest.Immediate))
	require.NoError(t, server.Start(t.Context()))
	l.connect()
	r = l.run(s)
	l.insert(strconv.Itoa(n))
	r.untilRows(n + 1)
	require.Equal(t, numbers(0, n), s.notes(), "in a new stream, from the checkpoint")
}

func stopServer(t *testing.T, server *pgtest.Server, mode pgtest.Mode) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	require.NoError(t, server.Stop(ctx, mode), "within 5 s")
}

func TestFastShutdownIsNotHeldUp(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{})
	l := labAt(t, server.URL())
	s := &sink{}
	var blind atomic.Bool // there is no connection left for the watch
	s.onClaim = func(Session) error { blind.Store(s.sessionCount() == 0); return nil }
	r := l.run(s, func(s *Stream) {
		s.cfg.MaxStall = time.Second
		s.cfg.URL = func() (string, error) {
			if blind.Load() {
				return "", errors.New("not now")
			}
			return l.url, nil
		}
	})
	r.untilState(Streaming)
	back := func() {
		t.Helper()
		require.NoError(t, server.Start(t.Context()))
		l.connect()
		r.untilState(Streaming)
	}

	l.insert("cannot be confirmed")
	r.untilRows(1)
	stopServer(t, server, pgtest.Fast)
	blind.Store(false)
	r.untilState(Connecting)
	back()

	empty := s.fill()
	l.exec(`insert into outbox (note) select 'x' from generate_series(1, 2000)`)
	l.exec(`insert into outbox (note) select repeat('x', 500) from generate_series(1, 60000)`)
	stopServer(t, server, pgtest.Fast)
	// There is always some room soon, but not for all that a walsender has to send before it ends.
	s.mu.Lock()
	s.slow = 50 * time.Millisecond
	s.mu.Unlock()
	empty()
	back()
	some := s.count() + 10
	r.untilRows(some)
	require.Less(t, some, 2000)
	stopServer(t, server, pgtest.Fast)
	s.mu.Lock()
	s.slow = 0
	s.mu.Unlock()
	back()
	r.untilRows(62_001)
	require.Len(t, s.all(), 62_001)
	requireInOrder(t, s.all())
}

func TestSinkWithoutRoomIsAnsweredFor(t *testing.T) {
	t.Parallel()
	for _, timeout := range []string{"1000", "0"} {
		t.Run(timeout, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			l.url += "&wal_sender_timeout=" + timeout
			s := &sink{confirms: true}
			r := l.run(s)
			r.untilState(Streaming)
			empty := s.fill()
			l.exec(`insert into outbox (note) select n::text from generate_series(1, 1000) n`)
			time.AfterFunc(3*time.Second, empty)
			r.untilRows(1000)
			l.insert("1001") // what the server had to say before would come before this
			r.untilRows(1001)
			require.Equal(t, 1, s.sessionCount())
			require.Equal(t, numbers(1, 1001), s.notes())
		})
	}
}

func TestStreamWithoutRoomLetsTheSlotGo(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{confirms: true}
	r := l.run(s, func(s *Stream) { s.cfg.MaxStall = 200 * time.Millisecond })
	r.untilState(Streaming)
	empty := s.fill()
	l.exec(`insert into outbox (note) select n::text from generate_series(1, 1000) n`)
	f := r.untilState(Waiting)
	require.NotEmpty(t, f.Remedy)
	r.until("nobody holds the slot", func() bool { return l.holder() == "" })
	for began := time.Now(); time.Since(began) < time.Second; { // far longer than the backoff
		require.Empty(t, l.holder())
	}
	require.Equal(t, 1, s.sessionCount())
	require.Equal(t, 1, s.leftCount(), "what is settled is written down before another may take the slot")
	empty()
	r.untilRows(1000)
	require.Equal(t, numbers(1, 1000), s.notes())
}

// An unread walsender whose slot is to be thrown away holds up the checkpointer, and with it the
// whole cluster.
func TestSinkWithoutRoomDoesNotHangTheCheckpointer(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{Settings: map[string]string{
		"max_slot_wal_keep_size": "16MB", "max_wal_size": "32MB", "min_wal_size": "32MB", "checkpoint_timeout": "1h",
	}})
	l := labAt(t, server.URL())
	s := &sink{}
	r := l.run(s, func(s *Stream) { s.cfg.MaxStall = time.Second })
	r.untilState(Streaming)
	s.fill()
	for range 4 {
		l.exec(`insert into outbox (note) select repeat('x', 500) from generate_series(1, 30000)`)
	}
	began := time.Now()
	l.exec(`checkpoint`)
	require.Less(t, time.Since(began), 8*time.Second)
	r.until("nobody holds the slot", func() bool { return l.holder() == "" })
}

func TestPublicationIsMadeUnderALock(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	writer, err := l.session().Begin(t.Context())
	require.NoError(t, err)
	_, err = writer.Exec(t.Context(), `insert into outbox (note) values ('before')`)
	require.NoError(t, err)
	r := l.run(&sink{})
	f := r.untilReason("a long transaction writes to")
	require.Equal(t, Connecting, f.State)
	require.Empty(t, l.value(`select pubname from pg_publication where pubname = 'p_' || $1`, l.slot))
	require.NoError(t, writer.Commit(t.Context()))
	r.untilState(Streaming)
	l.insert("after")
	r.untilRows(1)
	require.Equal(t, []string{"after"}, r.sink.notes())
	require.Equal(t, "t,f,f,f,t", l.value(`select concat_ws(',', pubinsert, pubupdate, pubdelete, pubtruncate, pubviaroot) from pg_publication where pubname = 'p_' || $1`, l.slot))
}

func TestTablesOfTheConfigArePublished(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{confirms: true}
	r := l.run(s)
	r.untilState(Streaming)
	l.exec(`create schema "Other"; create table "Other"."Late comer" (id int, note text);
		create table parted (id int, note text) partition by range (id);
		create table parted_low partition of parted for values from (0) to (100)`)
	r.halt()

	more := func(s *Stream) {
		s.cfg.Tables = append(s.cfg.Tables, Table{"Other", "Late comer"}, Table{"public", "parted"})
	}
	r = l.run(s, more)
	r.untilState(Streaming)
	for _, f := range r.Status().Survey.Tables {
		require.True(t, f.Published, f.String())
	}
	l.exec(`create table parted_high partition of parted for values from (100) to (200)`)
	l.exec(`begin;
		insert into outbox (note) values ('one');
		insert into "Other"."Late comer" values (2, 'two');
		insert into parted values (3, 'three'), (103, 'four');
		insert into parted_high values (105, 'five');
		commit`)
	r.untilRows(5)
	var tables []string
	for _, g := range s.all() {
		tables = append(tables, g.table+" "+g.note())
	}
	require.Equal(t, []string{"public.outbox one", "Other.Late comer two", "public.parted three", "public.parted four", "public.parted five"}, tables)
	requireInOrder(t, s.all())
}

func TestTransactionalMessagesAreRows(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	r := l.run(&sink{}, func(s *Stream) { s.cfg.Messages = true })
	r.untilState(Streaming)
	l.insert("first")
	l.exec(`begin;
		select pg_logical_emit_message(false, 'walhook', 'at once');
		select pg_logical_emit_message(true, 'walhook', '{"id": 1}');
		insert into outbox (note) values ('between');
		select pg_logical_emit_message(true, 'somebody else''s', '');
		commit`)
	l.exec(`begin; select pg_logical_emit_message(true, 'walhook', 'rolled back'); rollback`)
	l.insert("last")
	r.untilRows(5)
	var seen []string
	for _, g := range r.sink.all() {
		seen = append(seen, g.prefix+"|"+g.note())
	}
	require.Equal(t, []string{`|first`, `walhook|{"id": 1}`, `|between`, `somebody else's|`, `|last`}, seen)
	requireInOrder(t, r.sink.all())
}

// Up to 17 the server then reports an error for ever; from 18 on it only warns, and skips events.
func TestDroppedPublicationIsTheEnd(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{confirms: true}
	r := l.run(s)
	r.untilState(Streaming)
	l.insert("one")
	r.untilRows(1)
	l.exec(`drop publication ` + quoteName("p_"+l.slot))
	l.insert("lost")
	lost := l.walEnd()
	f := r.untilState(Lost)
	require.Contains(t, f.Reason, "publication p_"+l.slot)
	f = r.untilRemedy("--recover")
	require.Contains(t, f.Reason, "publication p_"+l.slot)
	require.Less(t, l.confirmed(), lost)
	require.Equal(t, []string{"one"}, s.notes())
}

func TestTableMadeAnewIsFound(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]string{
		"dropped":           `drop table outbox; create table outbox (id bigint generated always as identity, note text)`,
		"another's name":    `alter table outbox rename to outbox_old; create table outbox (id bigint generated always as identity, note text)`,
		"added by somebody": `begin; drop table outbox; create table outbox (id bigint generated always as identity, note text); alter publication $p add table outbox; commit`,
		"not published":     `alter publication $p drop table outbox`,
		"inserts left out":  `alter publication $p set (publish = 'update')`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			r := l.run(&sink{confirms: true}, func(s *Stream) { s.limits.survey = 50 * time.Millisecond })
			r.untilState(Streaming)
			p := quoteName("p_" + l.slot)
			l.exec(strings.ReplaceAll(change, "$p", p))
			r.until("it is written down", func() bool { return r.sink.marked() != "" })
			if name == "inserts left out" {
				l.exec(r.untilReason("does not publish inserts").Remedy)
			}
			f := r.untilRemedy("--recover")
			require.Equal(t, Lost, f.State)
			require.Contains(t, f.Reason, r.sink.marked())
			require.Equal(t, 1, r.sink.sessionCount())
		})
	}
}

func TestDroppedSlotIsNeverMadeAnew(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{confirms: true}
	r := l.run(s)
	r.untilState(Streaming)
	l.insert("one")
	r.untilRows(1)
	l.dropSlot()
	f := r.untilState(Lost)
	require.Contains(t, f.Reason, "is gone")
	require.Empty(t, l.confirmed())
	r.halt()
	r = l.run(s)
	f = r.untilState(Lost)
	require.Contains(t, f.Remedy, "delete from walhook.checkpoints")
	require.Empty(t, l.confirmed())

	// The remedy is to forget the checkpoint.
	s.mu.Lock()
	s.made = false
	s.mu.Unlock()
	r.untilState(Streaming)
	l.insert("two")
	r.untilRows(2)
}

// dropSlot takes the slot from whoever has it.
func (l *lab) dropSlot() {
	l.t.Helper()
	l.exec(`do $$
		begin
			loop
				begin
					perform pg_terminate_backend(active_pid, 5000) from pg_replication_slots where slot_name = '` + l.slot + `';
					perform pg_drop_replication_slot('` + l.slot + `');
					return;
				exception when object_in_use then
				end;
			end loop;
		end $$`)
}

func TestSlotAdvancedBySomebodyElseIsLost(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{confirms: true}
	r := l.run(s)
	r.untilState(Streaming)
	r.halt()
	r.until("nobody holds the slot", func() bool { return l.holder() == "" })
	l.insert("stolen")
	l.exec(`select pg_replication_slot_advance($1, pg_current_wal_lsn())`, l.slot)
	r = l.run(s)
	f := r.untilState(Lost)
	require.Contains(t, f.Reason, "somebody else read or advanced it")
	require.Contains(t, f.Remedy, "--recover")
	require.Zero(t, s.count())
	s.mu.Lock()
	s.at.LSN = l.confirmed()
	s.mu.Unlock()
	r.untilState(Streaming)
	l.insert("next")
	r.untilRows(1)
	require.Equal(t, []string{"next"}, s.notes())
}

func TestCheckpointOfAnotherHistoryIsLost(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	r := l.run(&sink{confirms: true})
	r.untilState(Streaming)
	r.halt()
	s := &sink{made: true, at: Resume{LSN: l.walEnd() + 1<<30}, xmin: 1}
	r = l.run(s, once(RecoverMissed, 20))
	f := r.untilRemedy("--recover=all")
	require.Equal(t, Lost, f.State)
	require.Contains(t, f.Reason, "another history")
	require.Contains(t, f.Remedy, "--recover=none")
	r.halt()
	r = l.run(s, once(RecoverNone, 20)) // as the remedy says
	r.untilState(Streaming)
	l.insert("after")
	r.untilNote("after")
}

// A slot that is not ours ends a start, because the configuration is wrong; later it is waited for.
func TestForeignSlotEndsTheStartAlone(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.exec(`select pg_create_physical_replication_slot($1)`, l.slot)
	var f *Fault
	require.ErrorAs(t, l.run(&sink{}).untilEnd(), &f)
	require.True(t, f.Config)
	require.Contains(t, f.Reason, "physical replication")
	require.Contains(t, f.Remedy, "cdc.slot")
	l.dropSlot()

	other := newLab(t)
	other.exec(`select pg_create_logical_replication_slot($1, 'pgoutput')`, l.slot)
	require.ErrorAs(t, l.run(&sink{}).untilEnd(), &f)
	require.Contains(t, f.Reason, "belongs to database")
	other.slot = l.slot
	other.dropSlot()

	s := &sink{confirms: true}
	r := l.run(s)
	r.untilState(Streaming)
	l.exec(`do $$ begin
		perform pg_terminate_backend(active_pid, 5000) from pg_replication_slots where slot_name = '` + l.slot + `';
		perform pg_drop_replication_slot('` + l.slot + `');
		perform pg_create_physical_replication_slot('` + l.slot + `');
	end $$`)
	f = r.untilState(Waiting)
	require.Contains(t, f.Reason, "physical replication")
	l.dropSlot()
	r.untilState(Lost)
}

func TestMistakeInTheConfigEndsTheStart(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{onResolve: func(tables []Found) error {
		require.Equal(t, "note", tables[0].Columns[1].Name)
		return &Fault{State: Waiting, Config: true, Reason: "no column"}
	}}
	require.ErrorContains(t, l.run(s).untilEnd(), "no column")
	require.Empty(t, l.confirmed())
}

func TestStandbyTakesOver(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{confirms: true}
	first := l.run(s)
	first.untilState(Streaming)
	other := &sink{confirms: true, made: true}
	other.onCheckpoint = func() error { // they share it
		s.mu.Lock()
		defer s.mu.Unlock()
		other.mu.Lock()
		defer other.mu.Unlock()
		other.at = s.at
		return nil
	}
	other.onClaim = func(Session) error { return other.onCheckpoint() }
	second := l.run(other)
	f := second.untilState(Standby)
	require.Contains(t, f.Reason, "another process holds the slot")
	l.insert("one")
	first.until("the commit", func() bool { return s.count() == 1 && s.end() > s.all()[0].Commit })
	first.halt()
	began := time.Now()
	second.untilState(Streaming)
	require.Less(t, time.Since(began), 2*time.Second)
	l.insert("two")
	second.untilRows(1)
	require.Equal(t, []string{"two"}, other.notes())
}

// A holder goes on writing checkpoints while a standby looks at the catalogue and at them.
func TestStandbyIsNotFooledByAHolderAtWork(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{confirms: true}
	conn := l.session()
	s.onCheckpoint = func() error {
		var at string
		err := conn.QueryRow(context.Background(), `select pg_current_wal_flush_lsn()::text from pg_logical_emit_message(true, 'holder', repeat('x', 100000))`).Scan(&at)
		if err == nil {
			_, err = conn.Exec(context.Background(), `select pg_logical_emit_message(true, 'holder', 'x')`)
		}
		if err == nil {
			err = conn.QueryRow(context.Background(), `select pg_current_wal_flush_lsn()::text`).Scan(&at)
		}
		if err != nil {
			return err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.at.LSN, err = ParseLSN(at)
		s.made = true
		return err
	}
	l.exec(`select pg_create_logical_replication_slot($1, 'pgoutput')`, l.slot)
	l.exec(`create publication ` + quoteName("p_"+l.slot) + ` for table outbox`)
	r := l.run(s)
	r.untilState(Streaming)
	requireNeverLost(t, r)
}

// The slot and its checkpoint may be made by another instance between two looks.
func TestSlotMadeMeanwhileIsNotMissing(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{confirms: true}
	conn := l.session()
	looks := 0
	s.onCheckpoint = func() (err error) {
		if looks++; looks == 2 { // the catalogue was looked at before
			_, err = conn.Exec(context.Background(), `select pg_create_logical_replication_slot($1, 'pgoutput')`, l.slot)
			s.mu.Lock()
			s.made, s.at.LSN = true, l.confirmedBy(conn)
			s.mu.Unlock()
		}
		return err
	}
	r := l.run(s)
	r.untilState(Streaming)
	requireNeverLost(t, r)
}

func (l *lab) confirmedBy(conn *pgx.Conn) LSN {
	var text string
	if err := conn.QueryRow(context.Background(), `select confirmed_flush_lsn::text from pg_replication_slots where slot_name = $1`, l.slot).Scan(&text); err != nil {
		return 0
	}
	at, _ := ParseLSN(text)
	return at
}

func requireNeverLost(t *testing.T, r *running) {
	t.Helper()
	for _, e := range r.logs.All() {
		require.False(t, strings.HasPrefix(e.Message, string(Lost)), e.Message)
	}
}

func TestSlotCreationTellsForWhomItWaits(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	writer, err := l.session().Begin(t.Context())
	require.NoError(t, err)
	_, err = writer.Exec(t.Context(), `create table elsewhere ()`)
	require.NoError(t, err)
	pid := writer.Conn().PgConn().PID()
	r := l.run(&sink{})
	f := r.untilReason("the new slot waits for the write transaction of pid " + strconv.Itoa(int(pid))) // maybe for other tests' before
	require.Equal(t, Waiting, f.State)
	require.Contains(t, f.Remedy, "pg_stat_activity")
	r.halt()
	require.Empty(t, l.confirmed(), "nothing is left of a slot that was not finished")

	r = l.run(&sink{})
	r.untilState(Waiting)
	require.NoError(t, writer.Rollback(t.Context()))
	r.untilState(Streaming)
}

func TestValuesPrintTheSameWhateverTheDefaults(t *testing.T) {
	t.Parallel()
	plain, odd := newLab(t), newLab(t)
	odd.exec(`do $$ begin
		execute format('alter database %I set datestyle = ''SQL, DMY''', current_database());
		execute format('alter database %I set intervalstyle = ''sql_standard''', current_database());
		execute format('alter database %I set timezone = ''Asia/Kolkata''', current_database());
		execute format('alter database %I set extra_float_digits = -3', current_database());
		execute format('alter database %I set bytea_output = ''escape''', current_database());
		execute format('alter database %I set search_path = ''public''', current_database());
	end $$`)
	var printed [2][]string
	for i, l := range []*lab{plain, odd} {
		l.exec(`alter table outbox add t timestamptz, add d date, add i interval, add f float8, add b bytea, add r regclass, add z text`)
		r := l.run(&sink{})
		r.untilState(Streaming)
		l.exec(`insert into outbox (t, d, i, f, b, r) values ('2026-02-03 04:05:06.7+00', '2026-02-03', '1 day 02:03:04', 0.1::float8 + 0.2, '\x00ff41', 'public.outbox')`)
		r.untilRows(1)
		printed[i] = r.sink.all()[0].values
	}
	require.Equal(t, printed[0], printed[1])
	require.Equal(t, []string{"2026-02-03 04:05:06.7+00", "2026-02-03", "1 day 02:03:04", "0.30000000000000004", `\x00ff41`, "public.outbox"}, printed[0][2:8])
}

func TestSlotIsAFailoverSlotWhereTheServerKnowsThem(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	r := l.run(&sink{}, func(s *Stream) { s.cfg.Failover = true })
	r.untilState(Streaming)
	want := ""
	if r.Status().Survey.Version >= 170000 {
		want = "true"
	}
	require.Equal(t, want, l.value(`select to_jsonb(s) ->> 'failover' from pg_replication_slots s where slot_name = $1`, l.slot))
}

func TestDrainHandsNothingOnAndStillConfirms(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{}
	r := l.run(s)
	r.untilState(Streaming)
	l.insert("whole")
	r.until("the commit", func() bool { return s.end() > 0 })
	half := make(chan struct{})
	s.onRow = func(n int) error {
		if n == 400 {
			s.fill()
			close(half)
		}
		return nil
	}
	l.exec(`insert into outbox (note) select n::text from generate_series(1, 1000) n`)
	<-half
	r.Drain()
	r.Drain()
	handed := s.count()
	l.insert("after")
	written := l.walEnd()
	at := Resume{LSN: s.end(), Position: s.all()[handed-1].Position}
	s.settle(at)
	ctx, cancel := context.WithTimeout(t.Context(), testPatience)
	defer cancel()
	require.NoError(t, r.Confirmed(ctx))
	require.Equal(t, at.LSN, l.confirmed())
	r.until("the stream to read on", func() bool { return r.Received() >= written })
	require.Equal(t, handed, s.count())
	require.Less(t, s.idleAt(), at.Position.Commit, "what was not handed on is not idle")
	require.Equal(t, at.LSN, s.end())
	require.Equal(t, 1, s.sessionCount())
	r.halt()

	rest := &sink{at: at, made: true}
	r = l.run(rest)
	r.until("the commits", func() bool { return len(rest.all()) == 1002-handed })
	require.Equal(t, append(append([]string{"whole"}, numbers(1, 1000)...), "after"), append(s.notes(), rest.notes()...))
}

func TestDrainBetweenTransactionsMovesTheSlotNoFurther(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{confirms: true}
	r := l.run(s)
	r.untilState(Streaming)
	before := l.insert("one")
	r.until("the commit", func() bool { return l.confirmed() >= before })
	r.Drain()
	l.insert("two")
	l.exec(`create table other (n int)`)
	written := l.walEnd()
	r.until("the stream to read on", func() bool { return r.Received() >= written })
	r.halt()
	require.Equal(t, []string{"one"}, s.notes())
	r = l.run(s)
	r.untilRows(2)
	require.Equal(t, []string{"one", "two"}, s.notes())
}

// A keepalive may come before the first row of a transaction, while the server looks for one.
func TestKeepaliveInsideATransactionSaysNothing(t *testing.T) {
	t.Parallel()
	s := &sink{}
	r := &reader{s: New(Config{Logger: zap.NewNop()}, s, s)}
	wal := func(message ...byte) *pgproto3.CopyData {
		return &pgproto3.CopyData{Data: append(make([]byte, 25), message...)}
	}
	begin, commit := append([]byte{'B'}, make([]byte, 20)...), append([]byte{'C'}, make([]byte, 25)...)
	begin[8], commit[9], commit[17] = 100, 100, 110
	keepalive := func(at byte) *pgproto3.CopyData {
		return &pgproto3.CopyData{Data: append([]byte{'k', 0, 0, 0, 0, 0, 0, 0, at}, make([]byte, 9)...)}
	}
	play := func(m *pgproto3.CopyData) {
		t.Helper()
		if len(m.Data) > 18 {
			m.Data[0] = 'w'
		}
		require.NoError(t, r.message(t.Context(), m))
	}
	play(keepalive(90))
	play(wal(begin...))
	play(keepalive(105))
	require.Equal(t, LSN(90), s.idleAt())
	play(wal(commit...))
	play(keepalive(120))
	require.Equal(t, LSN(120), s.idleAt())
}

func TestPromotedStandbyIsANewHistory(t *testing.T) {
	t.Parallel()
	primary := pgtest.New(t, pgtest.Config{})
	standby, err := primary.Standby(t.Context(), pgtest.Config{})
	require.NoError(t, err)
	t.Cleanup(func() { _ = standby.Close() })
	l := labAt(t, primary.URL())
	l.url = fmt.Sprintf("postgres://postgres@127.0.0.1:%d,127.0.0.1:%d/postgres?sslmode=disable", standby.Port(), primary.Port())
	s := &sink{confirms: true}
	r := l.run(s)
	r.untilState(Streaming)
	l.insert("one")
	r.untilRows(1)
	end := l.walEnd()
	there, err := pgx.Connect(t.Context(), standby.URL())
	require.NoError(t, err)
	t.Cleanup(func() { closeSQL(there) })
	r.until("the standby to follow", func() bool {
		var passed bool
		require.NoError(t, there.QueryRow(t.Context(), `select pg_last_wal_replay_lsn() >= $1::text::pg_lsn`, end.String()).Scan(&passed))
		return passed
	})
	require.NoError(t, primary.Kill())
	require.NoError(t, standby.Promote(t.Context()))
	require.ErrorIs(t, r.untilEnd(), ErrNewHistory)
}

func TestCutConnectionIsMadeAgain(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	p := l.through()
	s := &sink{}
	r := l.run(s)
	r.untilState(Streaming)
	l.exec(`insert into outbox (note) select n::text from generate_series(1, 20000) n`)
	for _, n := range []int{1, 5000, 12000} {
		r.untilRows(n)
		p.cut()
	}
	r.until("the commit", func() bool { return s.end() > 0 })
	require.Equal(t, numbers(1, 20000), s.notes())
	requireInOrder(t, s.all())
	l.insert("last")
	r.untilRows(20_001)
}

// The server keeps the walsender of a connection that went silent until wal_sender_timeout. It is
// ours, so nobody is stood by for.
func TestSilentConnectionIsGivenUp(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.url += "&wal_sender_timeout=9000"
	p := l.through()
	s := &sink{confirms: true}
	r := l.run(s, func(s *Stream) { s.limits.silence = 500 * time.Millisecond })
	r.untilState(Streaming)
	l.insert("one")
	r.untilRows(1)
	began := time.Now()
	p.freeze()
	l.insert("two")
	r.untilRows(2)
	require.Equal(t, []string{"one", "two"}, s.notes())
	require.Equal(t, 2, s.sessionCount())
	require.Less(t, time.Since(began), 8*time.Second)
	for _, e := range r.logs.All() {
		require.NotContains(t, e.Message, "standing by")
	}
}

// A server that takes a connection, or a command, and then says nothing more is not waited for.
func TestServerThatStopsAnsweringIsGivenUp(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"catalogue", "identify", "start"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			l.url += "&wal_sender_timeout=6000"
			p := l.through()
			s := &sink{}
			var once sync.Once
			freeze := func(at string) error {
				if at == step {
					once.Do(p.freeze)
				}
				return nil
			}
			s.onResolve = func([]Found) error { return freeze("catalogue") }
			s.onCheckpoint = func() error { return freeze("identify") }
			s.onClaim = func(Session) error { return freeze("start") }
			r := l.run(s, func(s *Stream) { s.limits.open, s.limits.silence = time.Second, time.Second })
			if step != "start" {
				require.Equal(t, Connecting, r.untilReason("Postgres does not answer").State)
			}
			r.until("a session", func() bool { return s.sessionCount() > 0 })
			l.insert("one")
			r.untilRows(1)
		})
	}
}

func TestEndOfTheContextEndsRunAtOnce(t *testing.T) {
	t.Parallel()
	quick := func(t *testing.T, r *running) {
		t.Helper()
		began := time.Now()
		r.halt()
		require.NoError(t, r.err)
		require.Less(t, time.Since(began), 1500*time.Millisecond)
	}
	t.Run("streaming", func(t *testing.T) {
		t.Parallel()
		l := newLab(t)
		r := l.run(&sink{})
		r.untilState(Streaming)
		quick(t, r)
	})
	t.Run("no room", func(t *testing.T) {
		t.Parallel()
		l := newLab(t)
		s := &sink{}
		r := l.run(s)
		r.untilState(Streaming)
		s.fill()
		l.insert("one")
		r.until("a row to wait", func() bool { return r.Received() > 0 })
		quick(t, r)
	})
	t.Run("stalled", func(t *testing.T) {
		t.Parallel()
		l := newLab(t)
		s := &sink{}
		r := l.run(s, func(s *Stream) { s.cfg.MaxStall = time.Millisecond })
		r.untilState(Streaming)
		s.fill()
		l.insert("one")
		r.untilState(Waiting)
		quick(t, r)
	})
	t.Run("a silent server", func(t *testing.T) {
		t.Parallel()
		listen, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		t.Cleanup(func() { _ = listen.Close() })
		l := &lab{t: t, url: "postgres://app@" + listen.Addr().String() + "/db?sslmode=disable", slot: "none"}
		r := l.run(&sink{})
		conn, err := listen.Accept()
		require.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close() })
		quick(t, r)
	})
	t.Run("frozen", func(t *testing.T) {
		t.Parallel()
		l := newLab(t)
		p := l.through()
		r := l.run(&sink{})
		r.untilState(Streaming)
		p.freeze()
		quick(t, r)
	})
}

func TestTransientErrorOfTheSinkEndsASessionOnly(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	claims, rows := 0, 0
	s := &sink{
		onClaim: func(Session) error {
			if claims++; claims < 3 {
				return errors.New("not now")
			}
			return nil
		},
		onRow: func(int) error {
			if rows++; rows == 2 {
				return errors.New("not this one")
			}
			return nil
		},
	}
	r := l.run(s)
	r.untilReason("the replication connection ended")
	r.untilState(Streaming)
	require.Equal(t, 3, claims)
	l.exec(`insert into outbox (note) select n::text from generate_series(1, 3) n`)
	r.untilRows(3)
	require.Equal(t, []string{"1", "2", "3"}, s.notes())
	require.Equal(t, 4, rows)
}

func TestHaltEndsTheRun(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	fenced := errors.New("fenced")
	r := l.run(&sink{onClaim: func(Session) error { return Halt(fenced) }})
	require.Equal(t, fenced, r.untilEnd())
}

// Where somebody else settled the transaction that a lost connection had cut in two, it does not
// come again, and the stream must not wait for it.
func TestTransactionSettledElsewhereIsClosed(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{}
	half := make(chan struct{})
	var once sync.Once
	s.onRow = func(n int) error {
		if n == 400 {
			once.Do(func() { s.fill(); close(half) })
		}
		return nil
	}
	r := l.run(s, func(s *Stream) { s.cfg.MaxStall = 100 * time.Millisecond })
	r.untilState(Streaming)
	l.exec(`insert into outbox (note) select n::text from generate_series(1, 1000) n`)
	<-half
	r.until("nobody holds the slot", func() bool { return l.holder() == "" })
	end := l.walEnd()
	s.settle(Resume{LSN: end})
	s.mu.Lock()
	close(s.full)
	s.full = nil
	s.mu.Unlock()
	l.exec(`create table other (filling text)`)
	written := l.walEnd()
	r.until("a keepalive to count", func() bool { return s.idleAt() >= written })
	require.Equal(t, 400, s.count())
	s.mu.Lock()
	defer s.mu.Unlock()
	require.Equal(t, end, s.ends[0])
}

// The password may be wrong, and then everybody reads the log.
func TestNoPasswordIsTold(t *testing.T) {
	t.Parallel()
	const secret = "hunter2secret"
	for name, address := range map[string]string{
		"nothing listens": "postgres://app:" + secret + "@127.0.0.1:1/db?sslmode=disable",
		"no URL":          "postgres://app:" + secret + "@127.0.0.1:port/db",
		"no port":         "host=127.0.0.1 port=many password=" + secret,
		"no host":         "postgres://app:" + secret + "@host.invalid/db",
		"a bad parameter": "postgres://app:" + secret + "@127.0.0.1/db?sslmode=never",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := &lab{t: t, url: address, slot: "none"}
			r := l.run(&sink{})
			var text string
			r.until("a fault", func() bool {
				select {
				case <-r.ended:
					text = r.err.Error()
				default:
					if f := r.Status().Fault; f != nil {
						text = f.Error()
					}
				}
				return text != ""
			})
			require.NotContains(t, text, secret)
			for _, e := range r.logs.All() {
				require.NotContains(t, fmt.Sprint(e.Message, e.ContextMap()), secret)
			}
			_, err := r.Lag(t.Context())
			require.NotContains(t, err.Error(), secret)
			r.Confirm(1, 1)
			err = r.Confirmed(t.Context())
			require.NotContains(t, err.Error(), secret)
		})
	}
}

func TestLagIsWhatWasNotReceived(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{confirms: true}
	r := l.run(s)
	r.untilState(Streaming)
	r.halt()
	before, err := r.Lag(t.Context())
	require.NoError(t, err)
	l.exec(`select pg_logical_emit_message(true, 'filling', repeat('x', 1000000))`)
	after, err := r.Lag(t.Context())
	require.NoError(t, err)
	require.Greater(t, after.Behind, before.Behind+900_000)
	require.Zero(t, after.Limit)
}

// Whatever can be mended outside is waited for, and told with what mends it.
func TestWhatIsMendedOutsideIsWaitedFor(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{Settings: map[string]string{"wal_level": "replica", "max_replication_slots": "1"}})
	admin := labAt(t, server.URL())
	l := *admin
	u, err := url.Parse(server.URLFor("shop"))
	require.NoError(t, err)
	u.User, u.RawQuery = url.UserPassword("app", "right"), "sslmode=disable"
	l.url = u.String()
	password := "wrong"
	var mu sync.Mutex // guards password
	s := &sink{confirms: true}
	require.NoError(t, server.Stop(t.Context(), pgtest.Fast))
	r := l.run(s, func(s *Stream) {
		s.limits.backoff = 500 * time.Millisecond
		s.cfg.Tables = []Table{{"public", "orders"}}
		s.cfg.URL = func() (string, error) {
			mu.Lock()
			defer mu.Unlock()
			return strings.Replace(l.url, ":right@", ":"+password+"@", 1), nil
		}
	})

	f := r.untilReason("nothing listens at 127.0.0.1")
	require.Equal(t, Connecting, f.State)
	require.Contains(t, f.Remedy, "start Postgres")

	hba := "host all app 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\nhost replication all 127.0.0.1/32 trust\n"
	writeHBA(t, server, hba)
	require.NoError(t, server.Start(t.Context()))
	admin.connect()
	step := func(reason, remedy string) *Fault {
		t.Helper()
		f := r.untilReason(reason)
		require.Equal(t, Waiting, f.State, reason)
		require.Contains(t, f.Remedy, remedy)
		return f
	}
	step("refuses the password", "password")
	admin.exec(`create role app login password 'right'`)
	mu.Lock()
	password = "right"
	mu.Unlock()
	step("there is no database shop", "create database")
	admin.exec(`create database shop owner app`)
	step("wal_level is replica", "wal_level = logical")
	require.NoError(t, server.Set(t.Context(), map[string]string{"wal_level": "logical"}))
	require.NoError(t, server.Stop(t.Context(), pgtest.Fast))
	require.NoError(t, server.Start(t.Context()))
	admin.connect()
	f = step("role app lacks REPLICATION", "alter role")
	admin.exec(strings.SplitN(f.Remedy, " (", 2)[0])
	step(`"public"."orders" does not exist`, "create it")
	admin.exec(`select pg_create_physical_replication_slot('taken')`)
	shop := l
	shop.connect()
	shop.exec(`create table orders (id int, note text)`)
	step("no replication slot is left", "max_replication_slots")
	admin.exec(`select pg_drop_replication_slot('taken')`)
	r.untilState(Streaming)
	shop.exec(`insert into orders values (1, 'one')`)
	r.untilRows(1)
	require.Equal(t, []string{"one"}, s.notes())
	require.True(t, slices.ContainsFunc(s.all(), func(g got) bool { return g.table == "public.orders" }))
}
