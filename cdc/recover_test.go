package cdc

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc/pgtest"
)

// quick looks and tries again all the time.
func quick(s *Stream) { s.limits.survey, s.limits.backoff = 30*time.Millisecond, 200*time.Millisecond }

func initial(s *Stream) { quick(s); s.cfg.Snapshot = true }

// recovering sends again what may have been missed.
func recovering(s *Stream) {
	quick(s)
	s.cfg.Recover, s.cfg.MaxRecovery = RecoverMissed, 10_000
	s.recovery = RecoverMissed
}

func once(order Recovery, most int) func(*Stream) {
	return func(s *Stream) {
		quick(s)
		s.cfg.MaxRecovery, s.recovery = most, order
	}
}

// table are the rows of the outbox: the transaction of each by its note.
func (l *lab) table() map[string]uint64 {
	l.t.Helper()
	rows, err := l.conn.Query(l.t.Context(), "select note, xmin::text::bigint from outbox")
	require.NoError(l.t, err)
	notes := map[string]uint64{}
	for rows.Next() {
		var note string
		var xid int64
		require.NoError(l.t, rows.Scan(&note, &xid))
		notes[note] = uint64(xid)
	}
	require.NoError(l.t, rows.Err())
	return notes
}

// requireOnce holds that every row of the table came exactly once, and nothing else.
func (l *lab) requireOnce(s *sink) {
	l.t.Helper()
	l.requireAgain(s, ^uint64(0))
}

// requireAgain holds that every row of the table came, and that none came again but one of a transaction
// that the record did not know to be settled. Rows that came may be in the table no more.
func (l *lab) requireAgain(s *sink, xmin uint64) {
	l.t.Helper()
	table, came := l.table(), map[string]int{}
	for _, note := range s.notes() {
		came[note]++
	}
	for note, xid := range table {
		switch n := came[note]; {
		case n == 0:
			l.t.Errorf("row %s is missing", note)
		case n > 1 && xid < xmin, n > 2:
			l.t.Errorf("row %s came %d times", note, n)
		}
	}
	if xmin == ^uint64(0) {
		require.Len(l.t, came, len(table))
	}
}

func (r *running) untilNote(note string) {
	r.t.Helper()
	r.until("row "+note, func() bool { return slices.Contains(r.sink.notes(), note) })
}

// writers insert rows, in transactions of all kinds, until done is called.
func (l *lab) writers(n int) (done func()) {
	l.t.Helper()
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for w := range n {
		conn := l.session()
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				note := func(what string) string { return fmt.Sprintf("writer %d, %d, %s", w, i, what) }
				_, err := conn.Exec(context.Background(), fmt.Sprintf(`begin;
					insert into outbox (note) values ('%s');
					savepoint a; insert into outbox (note) values ('%s'); release a;
					savepoint b; insert into outbox (note) values ('undone'); rollback to b;
					insert into outbox (note) values ('%s');
					%s`, note("top"), note("sub"), note("last"), []string{"commit", "commit", "rollback"}[i%3]))
				if err != nil {
					l.t.Errorf("insert: %v", err)
					return
				}
			}
		})
	}
	return sync.OnceFunc(func() { close(stop); wg.Wait() })
}

func TestFirstSnapshotAndStreamAreWholeAndDoNotOverlap(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.exec(`insert into outbox (note) select 'before ' || n from generate_series(1, 3000) n`)
	done := l.writers(4)
	defer done()
	s := &sink{}
	r := l.run(s, initial)
	r.untilState(Streaming)
	r.untilRows(s.count() + 1000)
	done()
	l.insert("last")
	r.untilNote("last")
	l.requireOnce(s)
	require.Equal(t, 1, s.filled)
	rows := s.all()
	for i := 1; i < len(rows); i++ {
		require.Negative(t, rows[i-1].Compare(rows[i].Position), "row %d", i)
	}
	begin := s.sessions[0].Slot.Confirmed
	filled := slices.IndexFunc(rows, func(g got) bool { return g.Commit >= begin })
	require.GreaterOrEqual(t, filled, 3000)
	for i := 1; i < filled; i++ {
		before, _ := strconv.Atoi(rows[i-1].values[0])
		id, _ := strconv.Atoi(rows[i].values[0])
		require.Less(t, before, id, "in the order of the serial id")
	}
}

func TestSnapshotThatFailsIsTakenAnewAndLeavesNothing(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.exec(`insert into outbox (note) select 'before ' || n from generate_series(1, 1000) n`)
	done := l.writers(2)
	defer done()
	s := &sink{}
	tries := 0
	s.onFill = func(n int) error {
		if n == 500 && tries < 2 {
			tries++
			return errors.New("the database is away")
		}
		return nil
	}
	conn := l.session()
	looked := 0
	s.onResolve = func([]Found) error { // before the next try
		if tries > 0 && s.filled == 0 {
			looked++
			if at := l.confirmedBy(conn); at != 0 {
				t.Errorf("a slot is left at %s", at)
			}
		}
		return nil
	}
	r := l.run(s, initial)
	r.untilState(Streaming)
	require.Equal(t, 2, tries)
	require.Positive(t, looked)
	done()
	l.insert("last")
	r.untilNote("last")
	l.requireOnce(s)
	require.Equal(t, 1, s.filled)
	for _, e := range r.logs.All() {
		require.NotContains(t, e.Message, "could not be dropped")
	}
}

// Of instances that start at once, one makes publication, slot and record between two looks of the other.
func TestInstanceThatIsOvertakenAtTheStartSeesNoLoss(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{confirms: true}
	conn := l.session()
	var first sync.Once
	s.onCheckpoint = func() (err error) {
		first.Do(func() {
			for _, sql := range []string{"create publication " + quoteName("p_"+l.slot) + " for table outbox", "select pg_create_logical_replication_slot('" + l.slot + "', 'pgoutput')"} {
				if _, e := conn.Exec(context.Background(), sql); e != nil {
					err = e
				}
			}
			var oid uint32
			if e := conn.QueryRow(context.Background(), "select 'public.outbox'::regclass::oid").Scan(&oid); e != nil {
				err = e
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			s.made, s.at.LSN, s.tables = true, l.confirmedBy(conn), map[string]uint32{`"public"."outbox"`: oid}
		})
		return err
	}
	r := l.run(s, quick)
	r.untilState(Streaming)
	require.Empty(t, s.marked())
	requireNeverLost(t, r)
}

// A process that is killed leaves the slot, whose snapshot is gone with it.
func TestSlotOfASnapshotThatWasKilledIsMadeAnew(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.exec(`create publication ` + quoteName("p_"+l.slot) + ` for table outbox`)
	l.exec(`insert into outbox (note) values ('before')`)
	l.exec(`select pg_create_logical_replication_slot($1, 'pgoutput')`, l.slot)
	l.exec(`insert into outbox (note) values ('in both')`)
	old := l.confirmed()
	s := &sink{announced: true}
	r := l.run(s) // the configuration may have changed meanwhile
	r.untilState(Streaming)
	l.insert("after")
	r.untilNote("after")
	l.requireOnce(s)
	require.Greater(t, s.sessions[0].Slot.Confirmed, old)
}

func TestEndAmidstTheSnapshotLeavesNoSlot(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.exec(`insert into outbox (note) select 'before ' || n from generate_series(1, 1000) n`)
	s := &sink{}
	var r *running
	s.onFill = func(n int) error {
		if n == 500 {
			r.stop()
		}
		return nil
	}
	began := make(chan struct{})
	s.onCheckpoint = func() error { <-began; return nil }
	r = l.run(s, initial)
	close(began)
	require.NoError(t, r.untilEnd())
	require.Empty(t, l.confirmed())
	s.onFill = nil
	r = l.run(s, initial)
	r.untilState(Streaming)
	l.requireOnce(s)
}

func TestSnapshotWhoseCommitIsNotAnsweredStands(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.exec(`insert into outbox (note) select 'before ' || n from generate_series(1, 100) n`)
	s := &sink{}
	s.onFilled = func() error { return errors.New("the answer is lost") }
	r := l.run(s, initial)
	r.untilState(Streaming)
	l.insert("after")
	r.untilNote("after")
	l.requireOnce(s)
	require.Equal(t, 1, s.filled)
}

func TestSlotWithoutARecordIsNoFirstSnapshot(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.exec(`select pg_create_logical_replication_slot($1, 'pgoutput')`, l.slot)
	l.insert("one")
	s := &sink{}
	r := l.run(s, initial)
	f := r.untilReason("slot " + l.slot + " is there already")
	require.Equal(t, Waiting, f.State)
	require.Contains(t, f.Remedy, "pg_drop_replication_slot")
	require.Contains(t, f.Remedy, "snapshot: never")
	require.Zero(t, s.filled)
	l.dropSlot()
	r.untilState(Streaming)
	l.requireOnce(s)
}

func TestOneInstanceTakesTheSnapshotAndTheOtherStandsBy(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"first snapshot", "recovery"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			l.exec(`insert into outbox (note) select 'before ' || n from generate_series(1, 100) n`)
			s := &sink{}
			change := initial
			if what == "recovery" {
				s.made, s.at = true, Resume{LSN: l.walEnd()}
				change = once(RecoverAll, 10)
			}
			begun, goOn := make(chan struct{}), make(chan struct{})
			var first sync.Once
			release := sync.OnceFunc(func() { close(goOn) })
			defer release()
			s.onFill = func(int) error { first.Do(func() { close(begun) }); <-goOn; return nil }
			a := l.run(s, change)
			<-begun
			b := l.run(s, change)
			b.untilState(Standby)
			release()
			a.untilState(Streaming)
			b.untilReason("another process holds the slot")
			l.insert("after")
			a.untilNote("after")
			l.requireOnce(s)
			require.Equal(t, 1, s.filled)
			requireNeverLost(t, b)
		})
	}
}

// The new slot waits for transactions that write; then rows are read, and that is told too.
func TestReadingIsToldWhateverCameBefore(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{})
	l := labAt(t, server.URL())
	l.exec(`insert into outbox (note) values ('before')`)
	writer, err := l.session().Begin(t.Context())
	require.NoError(t, err)
	_, err = writer.Exec(t.Context(), `create table elsewhere ()`)
	require.NoError(t, err)
	s := &sink{}
	goOn := make(chan struct{})
	release := sync.OnceFunc(func() { close(goOn) })
	s.onFill = func(int) error { <-goOn; return nil }
	r := l.run(s, initial)
	defer release()
	r.untilReason("waits for the write transaction of pid")
	require.NoError(t, writer.Rollback(t.Context()))
	r.untilState(Recovering)
	release()
	r.untilState(Streaming)
}

// loss is something that happens to what the stream reads. A step of + is a row that is inserted.
type loss struct {
	since   int // the version of Postgres that knows it
	steps   []string
	reason  string
	stopped bool // it cannot happen while a Stream runs
}

const (
	publish = "create publication $p for table outbox with (publish = 'insert')"
	create  = "create table outbox (id bigint generated by default as identity, note text)"
	drop    = "select pg_drop_replication_slot('$s')"
)

var losses = map[string]loss{
	"slot dropped":                  {steps: []string{"$drop", "+", "+"}, reason: "slot $s is gone"},
	"slot advanced":                 {steps: []string{"+", "select pg_replication_slot_advance('$s', pg_current_wal_lsn())", "+"}, reason: "somebody else read or advanced it", stopped: true},
	"slot read by somebody":         {steps: []string{"+", "select count(*) from pg_logical_slot_get_binary_changes('$s', null, null, 'proto_version', '1', 'publication_names', '$p')", "+"}, reason: "somebody else read or advanced it", stopped: true},
	"slot made anew":                {steps: []string{"$drop", "+", "select pg_create_logical_replication_slot('$s', 'pgoutput')", "+"}, reason: "somebody else read or advanced it", stopped: true},
	"publication dropped":           {steps: []string{"+", "drop publication $p", "+", "+"}, reason: "publication"},
	"publication made anew":         {steps: []string{"drop publication $p", "+", publish, "+"}, reason: "publication"},
	"table taken out":               {steps: []string{"alter publication $p drop table outbox", "+"}, reason: "was not in publication"},
	"table taken out and put back":  {steps: []string{"alter publication $p drop table outbox", "+", "alter publication $p add table outbox", "+"}, reason: "publication"},
	"row filter":                    {since: 15, steps: []string{"alter publication $p set table outbox where (id < 0)", "+"}, reason: "left out rows"},
	"row filter set and taken away": {since: 15, steps: []string{"alter publication $p set table outbox where (id < 0)", "+", "alter publication $p set table outbox", "+"}, reason: "publication"},
	"inserts not published":         {steps: []string{"alter publication $p set (publish = 'update')", "+"}, reason: "did not publish inserts"},
	"table made anew":               {steps: []string{"+", "drop table outbox", create, "+", "+"}, reason: "is not the one that it was"},
	"table made anew and published": {steps: []string{"drop table outbox", create, "+", "alter publication $p add table outbox", "+"}, reason: "is not the one that it was"},
	"another table of the name":     {steps: []string{"+", "alter table outbox rename to outbox_old", create, "+"}, reason: "is not the one that it was"},
	"dropped and filtered at once":  {since: 15, steps: []string{"$drop", "alter publication $p set table outbox where (id < 0)", "+"}, reason: "left out rows", stopped: true},
}

// do runs steps of a loss, and returns the notes of its rows.
func (l *lab) do(steps []string) (notes []string) {
	l.t.Helper()
	for _, step := range steps {
		switch step {
		case "+":
			notes = append(notes, fmt.Sprintf("missed %d", len(notes)+1))
			l.exec(`insert into outbox (note) values ($1)`, notes[len(notes)-1])
		case "$drop":
			l.dropSlot()
		default:
			l.exec(strings.NewReplacer("'$p'", quoteText(quoteName("p_"+l.slot)), "$p", quoteName("p_"+l.slot), "$s", l.slot).Replace(step))
		}
	}
	return notes
}

func TestLossIsToldAndRecovered(t *testing.T) {
	t.Parallel()
	for name, c := range losses {
		for _, stopped := range []bool{false, true} {
			if c.stopped && !stopped {
				continue
			}
			when := " while running"
			if stopped {
				when = " while stopped"
			}
			t.Run(name+when, func(t *testing.T) {
				t.Parallel()
				l := newLab(t)
				if l.version()/10000 < c.since {
					t.Skip("this Postgres does not know it")
				}
				s := &sink{confirms: true}
				r := l.run(s, quick)
				r.untilState(Streaming)
				for n := range 3 {
					l.insert("before " + strconv.Itoa(n))
				}
				r.untilRows(3)
				xmin := r.remember(l)
				if stopped {
					r.halt()
					r.until("nobody holds the slot", func() bool { return l.holder() == "" })
				}
				l.do(c.steps)
				if stopped {
					r = l.run(s, quick)
				}
				if name == "inserts not published" || name == "row filter" || name == "dropped and filtered at once" {
					l.exec(r.untilRemedy("alter publication").Remedy)
				}
				r.untilState(Lost)
				f := r.untilRemedy("--recover")
				require.Contains(t, f.Reason, strings.ReplaceAll(c.reason, "$s", l.slot))
				require.Contains(t, f.Remedy, "--recover=none")
				again := l.value("select count(*) from outbox where xmin::text::bigint >= $1::text::bigint", strconv.FormatUint(xmin, 10))
				require.Contains(t, f.Remedy, "the "+again+" rows that may have been missed")
				require.Zero(t, s.filled, "nobody has asked for it")
				l.insert("while it is lost")
				r.halt()

				r = l.run(s, recovering)
				r.untilState(Streaming)
				l.insert("after")
				r.untilNote("after")
				l.requireAgain(s, xmin)
				require.Equal(t, 1, s.filled)
				require.Empty(t, s.marked())

				sessions := s.sessionCount()
				l.exec(`select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = $1`, l.slot)
				r.until("another session", func() bool { return s.sessionCount() > sessions })
				l.insert("at last")
				r.untilNote("at last")
				require.Equal(t, 1, s.filled, "a loss is recovered once")
			})
		}
	}
}

func TestWhatChangesWithoutLossIsNone(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]loss{
		"all tables, made anew":       {steps: []string{"drop publication $p", "create publication $p for all tables with (publish = 'insert')", "$start", "+", "drop table outbox", create, "+"}},
		"tables in schema, made anew": {since: 15, steps: []string{"drop publication $p", "create publication $p for tables in schema public with (publish = 'insert')", "$start", "+", "drop table outbox", create, "+"}},
		"renamed and back":            {steps: []string{"alter table outbox rename to away", "insert into away (note) values ('as another')", "alter table away rename to outbox", "+"}},
		"another table published":     {steps: []string{"create table other ()", "alter publication $p add table other", "+", "alter publication $p drop table other", "+"}},
		"another owner":               {steps: []string{"alter publication $p owner to pg_database_owner", "+"}},
		"columns and indexes":         {steps: []string{"alter table outbox add column more int default 7", "alter table outbox drop column more", "create index on outbox (note)", "+", "vacuum full outbox", "+"}},
		"settings as they were":       {steps: []string{"alter publication $p set (publish_via_partition_root = true)", "alter publication $p set (publish = 'insert, update')", "+"}},
	} {
		for _, stopped := range []bool{false, true} {
			when := " while running"
			if stopped {
				when = " while stopped"
			}
			t.Run(name+when, func(t *testing.T) {
				t.Parallel()
				l := newLab(t)
				if l.version()/10000 < c.since {
					t.Skip("this Postgres does not know it")
				}
				steps := c.steps
				if at := slices.Index(steps, "$start"); at >= 0 {
					l.exec("create publication " + quoteName("p_"+l.slot))
					l.do(steps[:at])
					steps = steps[at+1:]
				}
				s := &sink{confirms: true}
				r := l.run(s, quick)
				r.untilState(Streaming)
				l.insert("before")
				r.untilRows(1)
				r.remember(l)
				if stopped {
					r.halt()
				}
				l.do(steps)
				if stopped {
					r = l.run(s, quick)
				}
				l.insert("after")
				r.untilNote("after")
				looks := func() int { s.mu.Lock(); defer s.mu.Unlock(); return s.proven }
				before := looks()
				r.until("good looks", func() bool { return looks() > before+1 })
				came := map[string]int{}
				for _, note := range s.notes() {
					came[note]++
					require.Equal(t, 1, came[note], note)
				}
				for note := range l.table() {
					require.Equal(t, 1, came[note], note)
				}
				require.Empty(t, s.marked())
				requireNeverLost(t, r)
			})
		}
	}
}

func TestLossWhileRunningEndsTheRunAndTheNextRecovers(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{confirms: true}
	r := l.run(s, recovering)
	r.untilState(Streaming)
	l.insert("before")
	r.untilRows(1)
	xmin := r.remember(l)
	done := l.writers(3)
	defer done()
	r.untilRows(300)
	l.dropSlot()
	require.ErrorIs(t, r.untilEnd(), ErrLost)
	require.Equal(t, Lost, r.Status().State, "while what runs ends its work")
	require.Empty(t, l.confirmed())
	r = l.run(s, recovering)
	r.untilState(Streaming)
	r.untilRows(s.count() + 300)
	done()
	l.insert("after")
	r.untilNote("after")
	l.requireAgain(s, xmin)
}

func TestInvalidatedSlotIsRecovered(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{Settings: map[string]string{
		"max_slot_wal_keep_size": "1MB", "max_wal_size": "32MB", "min_wal_size": "32MB", "checkpoint_timeout": "1h",
	}})
	l := labAt(t, server.URL())
	s := &sink{confirms: true}
	r := l.run(s, quick)
	r.untilState(Streaming)
	l.insert("before")
	r.untilRows(1)
	r.remember(l)
	r.halt()
	l.insert("missed")
	for range 3 {
		l.exec(`select pg_logical_emit_message(false, 'filling', repeat('x', 1000000))`)
		l.exec(`select pg_switch_wal()`)
	}
	l.exec(`checkpoint`)
	require.Equal(t, "lost", l.value(`select wal_status from pg_replication_slots where slot_name = $1`, l.slot))
	r = l.run(s, quick)
	f := r.untilRemedy("--recover")
	require.Equal(t, Lost, f.State)
	require.Contains(t, f.Reason, "slot "+l.slot+" is invalid")
	require.Contains(t, f.Remedy, "the 1 rows that may have been missed")
	r.halt()
	r = l.run(s, recovering)
	r.untilState(Streaming)
	l.insert("after")
	r.untilRows(3)
	require.Equal(t, []string{"before", "missed", "after"}, s.notes())
}

// rememberAndLose leaves a lab whose slot is gone, with rows that were missed.
func rememberAndLose(t *testing.T, missed int) (l *lab, s *sink, xmin uint64) {
	t.Helper()
	l = newLab(t)
	s = &sink{confirms: true}
	r := l.run(s, quick)
	r.untilState(Streaming)
	l.insert("before")
	r.untilRows(1)
	xmin = r.remember(l)
	r.halt()
	l.dropSlot()
	l.exec(`insert into outbox (note) select 'missed ' || n from generate_series(1, $1::int) n`, missed)
	return l, s, xmin
}

func TestSuspiciouslyManyRowsAreNotSentWithoutAQuestion(t *testing.T) {
	t.Parallel()
	l, s, xmin := rememberAndLose(t, 500)
	r := l.run(s, once(RecoverMissed, 20))
	f := r.untilRemedy("--recover=all")
	require.Equal(t, Lost, f.State)
	again := l.value("select count(*) from outbox where xmin::text::bigint >= $1::text::bigint", strconv.FormatUint(xmin, 10))
	require.Contains(t, f.Reason, "it would send the "+again+" rows")
	require.Contains(t, f.Reason, "more than the")
	require.Empty(t, l.confirmed())
	r.halt()
	r = l.run(s, once(RecoverAll, 20))
	r.untilState(Streaming)
	l.requireAgain(s, xmin)
}

// Whoever makes the slot by hand is not told to, as that alone would leave out what was missed.
func TestSlotThatWeMayNotCreateIsLostToo(t *testing.T) {
	t.Parallel()
	l, _, _ := rememberAndLose(t, 5)
	s := &sink{made: true, at: Resume{LSN: l.walEnd()}, xmin: 3}
	r := l.run(s, func(s *Stream) { quick(s); s.cfg.Create = false })
	f := r.untilRemedy("--recover")
	require.Equal(t, Lost, f.State)
	require.Contains(t, f.Reason, "is gone")
}

func TestOrderToGoOnWithoutWhatWasMissed(t *testing.T) {
	t.Parallel()
	l, s, _ := rememberAndLose(t, 5)
	r := l.run(s, once(RecoverNone, 20))
	r.untilState(Streaming)
	l.insert("after")
	r.untilNote("after")
	require.Equal(t, []string{"before", "after"}, s.notes())
	require.Equal(t, 1, s.filled)
}

// Neither is one that came while another instance held the slot, and found no loss.
func TestOrderIsForgottenWhereTheStartFindsNoLoss(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{confirms: true}
	first := l.run(s, quick)
	first.untilState(Streaming)
	second := l.run(s, once(RecoverNone, 20))
	second.untilState(Standby)
	l.insert("before")
	first.untilRows(1)
	first.remember(l)
	first.halt()
	second.until("the other one takes the slot", func() bool { return second.Status().State == Streaming })
	second.halt()
	require.Equal(t, RecoverAsk, second.recovery)
}

// Where the first start takes a snapshot, to forget the slot would send the whole table.
func TestNobodyIsToldToForgetASlotWithASnapshot(t *testing.T) {
	t.Parallel()
	for _, snapshot := range []bool{false, true} {
		cfg := &Config{Slot: "s", Snapshot: snapshot}
		f := (&Survey{}).Judge(cfg, &Record{LSN: 8}, 16)
		require.Contains(t, f.Remedy, "--recover=none")
		require.Equal(t, !snapshot, strings.Contains(f.Remedy, "delete from walhook.checkpoints"))
	}
}

// An order is for what the start finds: a loss of later waits for another one.
func TestOrderIsCarriedOutOnce(t *testing.T) {
	t.Parallel()
	l, s, _ := rememberAndLose(t, 5)
	r := l.run(s, once(RecoverAll, 20))
	r.untilState(Streaming)
	r.remember(l)
	l.dropSlot()
	l.insert("missed later")
	f := r.untilRemedy("--recover")
	require.Equal(t, Lost, f.State)
	require.Equal(t, 1, s.filled)
}

func TestRowsThatNothingIsKnownOfAreSentWhenAsked(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.insert("one")
	l.insert("two")
	s := &sink{made: true, at: Resume{LSN: l.walEnd()}}
	r := l.run(s, once(RecoverMissed, 20))
	f := r.untilRemedy("--recover=all")
	require.Equal(t, Lost, f.State)
	require.Contains(t, f.Reason, "nothing tells since when")
	require.Contains(t, f.Remedy, "all 2 rows of the outbox")
	r.halt()
	r = l.run(s, once(RecoverAll, 20))
	r.untilState(Streaming)
	l.requireOnce(s)
}

func TestRowsThatWereDeletedAreTold(t *testing.T) {
	t.Parallel()
	l, s, _ := rememberAndLose(t, 5)
	pgtest.Exec(t, l.url, `delete from outbox where note = 'missed 1'`) // by a session that ends, so that it is counted
	r := l.run(s, quick)
	r.untilRemedy("rows that were deleted from the outbox meanwhile cannot be sent")
}

// Transactions that were open at the last record may commit after the loss.
func TestTransactionsOpenAtTheLossAreRecovered(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{Settings: map[string]string{"max_prepared_transactions": "5"}})
	l := labAt(t, server.URL())
	s := &sink{confirms: true}
	r := l.run(s, quick)
	r.untilState(Streaming)
	l.insert("settled")
	begin := func(first string) func(sql string) {
		conn := l.session()
		do := func(sql string) {
			t.Helper()
			_, err := conn.Exec(t.Context(), sql)
			require.NoError(t, err, sql)
		}
		do(`begin; ` + first)
		return do
	}
	long := begin(`insert into outbox (note) values ('long, before')`)
	sub := begin(`savepoint a; insert into outbox (note) values ('sub, before')`)
	undone := begin(`insert into outbox (note) values ('undone')`)
	prepared := begin(`insert into outbox (note) values ('prepared')`)
	prepared(`prepare transaction 'p'`)
	l.insert("settled later")
	r.untilRows(2)
	xmin := r.remember(l)
	l.insert("settled at last, which the record does not know")
	r.untilRows(3)
	r.halt()
	l.dropSlot()
	l.insert("missed")
	long(`insert into outbox (note) values ('long, after'); commit`)
	sub(`insert into outbox (note) values ('sub, after'); release a; savepoint b; insert into outbox (note) values ('rolled back'); rollback to b; insert into outbox (note) values ('sub, last'); commit`)
	undone(`rollback`)
	l.exec(`commit prepared 'p'`)
	r = l.run(s, recovering)
	r.untilState(Streaming)
	l.insert("after")
	r.untilNote("after")
	l.requireAgain(s, xmin)
	came := map[string]int{}
	for _, note := range s.notes() {
		came[note]++
	}
	require.Equal(t, map[string]int{
		"settled": 1, "settled later": 2, "settled at last, which the record does not know": 2,
		"long, before": 1, "long, after": 1, "sub, before": 1, "sub, after": 1, "sub, last": 1, "prepared": 1, "missed": 1, "after": 1,
	}, came, "the bound is what committed behind the oldest transaction that ran")
}

func TestGapThatCannotBeWrittenIsWrittenBeforeTheNextSession(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{confirms: true}
	r := l.run(s, quick)
	r.untilState(Streaming)
	r.remember(l)
	var fails atomic.Int32
	fails.Store(3)
	s.onMark = func() error {
		if fails.Add(-1) >= 0 {
			return errNotWritten
		}
		return nil
	}
	l.exec(`alter publication ` + quoteName("p_"+l.slot) + ` drop table outbox`)
	l.insert("missed")
	r.until("the gap is not written", func() bool { return fails.Load() < 3 })
	l.exec(`alter publication ` + quoteName("p_"+l.slot) + ` add table outbox`) // nothing is to be seen of it any more
	f := r.untilRemedy("--recover")
	require.Contains(t, f.Reason, "was not in publication")
	require.Contains(t, s.marked(), "was not in publication")
	require.Equal(t, 1, s.sessionCount())
}

// The answer of a write may be lost, and then the gap is there all the same. It is not written again
// once it is recovered.
func TestGapThatWasWrittenIsForgottenWithItsRecovery(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{confirms: true}
	r := l.run(s, quick)
	r.untilState(Streaming)
	r.remember(l)
	r.halt()
	l.do([]string{"alter publication $p drop table outbox", "+"})
	var lost sync.Once
	s.onMark = func() (err error) {
		lost.Do(func() { err = errors.New("the answer is lost") })
		return err
	}
	r = l.run(s, recovering)
	r.untilState(Streaming)
	sessions := s.sessionCount()
	l.exec(`select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = $1`, l.slot)
	r.until("another session", func() bool { return s.sessionCount() > sessions })
	require.Empty(t, s.marked())
	require.Equal(t, 1, s.filled)
}

// While its column is away, rows go into the WAL without it. They are not read as something else later.
func TestRowsOfATableThatCannotBeReadAreRecovered(t *testing.T) {
	t.Parallel()
	for _, stopped := range []bool{false, true} {
		t.Run(fmt.Sprintf("stopped %t", stopped), func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			s := &sink{confirms: true, column: "note"}
			r := l.run(s, quick)
			r.untilState(Streaming)
			l.insert("before")
			r.untilRows(1)
			r.remember(l)
			if stopped {
				r.halt()
			}
			l.exec(`alter table outbox drop column note`)
			l.exec(`insert into outbox default values`)
			if !stopped {
				require.Equal(t, Waiting, r.untilReason("column note is missing").State)
			}
			l.exec(`alter table outbox add column note text`)
			l.insert("back")
			if stopped {
				r = l.run(s, quick)
			}
			f := r.untilRemedy("--recover")
			require.Equal(t, Lost, f.State)
			require.Contains(t, f.Reason, "cannot be read as the outbox table was then")
			r.halt()
			r = l.run(s, recovering)
			r.untilState(Streaming)
			l.insert("after")
			r.untilNote("after")
			came := map[string]int{}
			for _, g := range s.all() {
				came[g.values[0]]++
			}
			for _, id := range []string{"2", "3", "4"} {
				require.Equal(t, 1, came[id], "row %s", id)
			}
		})
	}
}

func TestTransactionOfARowIsToldAcrossEpochs(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	const epoch = 1 << 32
	for _, c := range []struct{ xmin, next, want int64 }{
		{700, 701, 700},
		{3, 3, 3},
		{0, 5 * epoch, 0},
		{1, 5 * epoch, 0},
		{2, 5*epoch + 100, 0},
		{epoch - 1, epoch + 3, epoch - 1},
		{3, epoch + 4, epoch + 3},
		{epoch - 1, epoch - 1, epoch - 1},
		{epoch - 100, epoch + 100, epoch - 100},
		{100, epoch + 101, epoch + 100},
		{epoch/2 + 7, 3*epoch + 7, 2*epoch + epoch/2 + 7},
		{epoch/2 - 7, 3*epoch + epoch/2, 3*epoch + epoch/2 - 7},
	} {
		got := l.value(fmt.Sprintf("select %s from (values ('%d'::xid)) as t(xmin)", rowXID(fmt.Sprintf("%d::bigint", c.next)), c.xmin))
		require.Equal(t, strconv.FormatInt(c.want, 10), got, "xmin %d, next %d", c.xmin, c.next)
	}
}

// resetXID has the next transaction of a stopped server be xid. The page of its status must be there.
func resetXID(t *testing.T, server *pgtest.Server, xid uint32) {
	t.Helper()
	stopServer(t, server, pgtest.Fast)
	data := server.DataDir()
	owner, err := os.Stat(data)
	require.NoError(t, err)
	who := owner.Sys().(*syscall.Stat_t)
	const perFile = 32 * 8192 * 4
	segment := filepath.Join(data, "pg_xact", fmt.Sprintf("%04X", xid/perFile))
	if _, err := os.Stat(segment); err != nil {
		require.NoError(t, os.WriteFile(segment, make([]byte, 32*8192), 0o600))
		require.NoError(t, os.Chown(segment, int(who.Uid), int(who.Gid)))
	}
	cmd := exec.Command(filepath.Join(server.Bin(), "pg_resetwal"), "-x", strconv.FormatUint(uint64(xid), 10), "-D", data)
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: who.Uid, Gid: who.Gid}}
	}
	cmd.Dir = data
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.NoError(t, server.Start(t.Context()))
}

func TestLossAcrossTheEndOfAnEpochIsRecovered(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{})
	if _, err := os.Stat(filepath.Join(server.Bin(), "pg_resetwal")); err != nil {
		t.Skip("this installation has no pg_resetwal")
	}
	pgtest.Exec(t, server.URL(), "alter database template0 allow_connections true")
	for _, xid := range []uint32{1_500_000_000, 3_000_000_000, 4_294_967_000} {
		for _, db := range []string{"postgres", "template0", "template1"} {
			pgtest.Exec(t, server.URLFor(db), "vacuum freeze")
		}
		resetXID(t, server, xid)
	}
	l := labAt(t, server.URL())
	s := &sink{confirms: true}
	r := l.run(s, quick)
	r.untilState(Streaming)
	l.insert("settled before the end")
	r.untilRows(1)
	xmin := r.remember(l)
	require.Less(t, xmin, uint64(1<<32))
	r.halt()
	l.dropSlot()
	l.insert("missed before the end")
	l.exec(`do $$ begin for n in 1..400 loop perform pg_current_xact_id(); commit; end loop; end $$`)
	l.insert("missed behind it")
	require.Equal(t, "t", l.value(`select bool_or(xmin::text::bigint < 1000) and bool_or(xmin::text::bigint > 4000000000) from outbox`)[:1])
	r = l.run(s, recovering)
	r.untilState(Streaming)
	require.Equal(t, []string{"settled before the end", "missed before the end", "missed behind it"}, s.notes())

	xmin = r.remember(l)
	require.Greater(t, xmin, uint64(1<<32))
	r.halt()
	l.dropSlot()
	l.insert("missed in the new epoch")
	r = l.run(s, recovering)
	r.untilState(Streaming)
	require.Equal(t, "missed in the new epoch", s.notes()[3])
	require.Equal(t, 4, s.count(), "rows of the old epoch are not new again")
}

// hold takes the slot as somebody else.
func (l *lab) hold(application string) *pgconn.PgConn {
	l.t.Helper()
	u, err := url.Parse(l.url)
	require.NoError(l.t, err)
	q := u.Query()
	q.Set("replication", "database")
	q.Set("application_name", application)
	u.RawQuery = q.Encode()
	conn, err := pgconn.Connect(l.t.Context(), u.String())
	require.NoError(l.t, err)
	l.t.Cleanup(func() { _ = conn.Conn().Close() })
	require.NoError(l.t, pglogrepl.StartReplication(l.t.Context(), conn, l.slot, 0, pglogrepl.StartReplicationOptions{
		Mode: pglogrepl.LogicalReplication, PluginArgs: []string{"proto_version '1'", "publication_names '" + quoteName("p_"+l.slot) + "'"},
	}))
	return conn
}

// newRole makes a role that may replicate and nothing else.
func (l *lab) newRole() string {
	l.t.Helper()
	admin, role := l.url, "reader_"+strings.TrimPrefix(l.slot, "slot_walhook_test_")
	l.exec(`create role ` + role + ` login replication`)
	l.t.Cleanup(func() {
		conn, err := pgx.Connect(context.Background(), admin)
		if err != nil {
			l.t.Errorf("drop role: %v", err)
			return
		}
		defer closeSQL(conn)
		if _, err := conn.Exec(context.Background(), `drop owned by `+role+`; drop role `+role); err != nil {
			l.t.Errorf("drop role: %v", err)
		}
	})
	return role
}

// as has Streams connect as the role.
func (l *lab) as(role string) {
	l.t.Helper()
	u, err := url.Parse(l.url)
	require.NoError(l.t, err)
	u.User = url.User(role)
	l.url = u.String()
}

func frozen(after time.Duration) func(*Stream) {
	return func(s *Stream) { quick(s); s.limits.frozen = after }
}

func TestFrozenHolderIsEnded(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	direct := *l
	p := l.through()
	s := &sink{confirms: true}
	first := l.run(s, func(s *Stream) { s.limits.silence = time.Hour })
	first.untilState(Streaming)
	second := direct.run(s, frozen(time.Second))
	second.untilState(Standby)
	began := time.Now()
	p.freeze()
	l.insert("one")
	second.untilState(Streaming)
	second.untilRows(1)
	require.Less(t, time.Since(began), 20*time.Second, "wal_sender_timeout is a minute")
	require.NotEmpty(t, second.logs.FilterMessageSnippet("does not answer the server").All())
}

// What the server tells of replies is not told to every role.
func TestHolderThatAnswersIsLeftAlone(t *testing.T) {
	t.Parallel()
	for _, plain := range []bool{false, true} {
		t.Run(fmt.Sprintf("role without rights %t", plain), func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			s := &sink{confirms: true}
			r := l.run(s)
			r.untilState(Streaming)
			r.halt()
			r.until("nobody holds the slot", func() bool { return l.holder() == "" })
			if plain {
				l.as(l.newRole())
			}
			conn := l.hold(applicationName)
			stop := make(chan struct{})
			var answering sync.WaitGroup
			answering.Go(func() {
				at := pglogrepl.LSN(l.confirmedBy(l.conn))
				for tick := time.NewTicker(200 * time.Millisecond); ; {
					select {
					case <-stop:
						return
					case now := <-tick.C:
						status := pglogrepl.StandbyStatusUpdate{WALWritePosition: at, ClientTime: now.AddDate(-7, 0, 0)}
						if err := pglogrepl.SendStandbyStatusUpdate(context.Background(), conn, status); err != nil {
							t.Errorf("the holder was ended: %v", err)
							return
						}
					}
				}
			})
			defer answering.Wait()
			defer close(stop)
			second := l.run(s, frozen(1500*time.Millisecond))
			second.untilState(Standby)
			for began := time.Now(); time.Since(began) < 4*time.Second; {
				require.Equal(t, Standby, second.Status().State)
			}
			require.Equal(t, 1, s.sessionCount())
		})
	}
}

func TestForeignHolderIsLeftAlone(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{confirms: true}
	r := l.run(s)
	r.untilState(Streaming)
	r.halt()
	r.until("nobody holds the slot", func() bool { return l.holder() == "" })
	conn := l.hold("somebody else")
	second := l.run(s, frozen(100*time.Millisecond))
	second.untilState(Standby)
	for began := time.Now(); time.Since(began) < 3*time.Second; {
		require.Equal(t, Standby, second.Status().State)
	}
	require.Equal(t, strconv.Itoa(int(conn.PID())), l.value(`select active_pid from pg_replication_slots where slot_name = $1`, l.slot))
}

func TestTablesOfAllKindsAreRead(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		table   string
		ordered bool
	}{
		"text ids":    {`create table outbox (id text primary key, note text)`, true},
		"uuids":       {`create table outbox (id uuid primary key default gen_random_uuid(), note text)`, true},
		"no ids":      {`create table outbox (note text)`, true},
		"partitioned": {`create table outbox (id bigint, note text) partition by hash (id); create table a partition of outbox for values with (modulus 2, remainder 0); create table b partition of outbox for values with (modulus 2, remainder 1)`, true},
		"partitioned by uuid": {`create table outbox (id uuid default gen_random_uuid(), note text) partition by hash (id);
			create table a partition of outbox for values with (modulus 2, remainder 0); create table b partition of outbox for values with (modulus 2, remainder 1)`, false},
		"inherited": {`create table outbox (id text, note text); create table child () inherits (outbox); insert into child values ('x', 'of the child')`, true},
		"generated": {`create table outbox (id bigint, made text generated always as ('x') stored, note text)`, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			l.exec(`drop table outbox`)
			l.exec(c.table)
			fill := func(from int) {
				t.Helper()
				id := map[string]string{"text ids": "(100 - n)::text", "uuids": "gen_random_uuid()", "partitioned by uuid": "gen_random_uuid()", "inherited": "n::text", "no ids": ""}
				column, value := "id, ", "n, "
				if v, special := id[name]; special {
					if value = v + ", "; v == "" {
						column, value = "", ""
					}
				}
				l.exec(fmt.Sprintf(`insert into outbox (%snote) select %s'row ' || n from generate_series(%d, %d) n`, column, value, from, from+49))
			}
			fill(1)
			s := &sink{}
			r := l.run(s, initial)
			r.untilState(Streaming)
			fill(51)
			r.untilRows(100)
			var want []string
			for n := 1; n <= 100; n++ {
				want = append(want, "row "+strconv.Itoa(n))
			}
			got := s.notes()
			if !c.ordered {
				require.ElementsMatch(t, want, got)
				return
			}
			require.Equal(t, want, got)
			for _, g := range s.all() {
				require.Equal(t, "public.outbox", g.table)
				require.Len(t, g.values, len(s.all()[99].values), "as the stream has them")
			}
		})
	}
}

// Rows that may not be read are missed in silence by nobody.
func TestRowsThatMayNotBeReadAreTold(t *testing.T) {
	t.Parallel()
	for _, first := range []bool{true, false} {
		t.Run(fmt.Sprintf("first snapshot %t", first), func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			role := l.newRole()
			l.exec(`create publication ` + quoteName("p_"+l.slot) + ` for table outbox`)
			l.exec(`create policy hidden on outbox using (note <> 'hidden'); alter table outbox enable row level security`)
			l.insert("seen")
			l.insert("hidden")
			l.as(role)
			s := &sink{announced: true}
			change := initial
			if !first {
				s = &sink{made: true, at: Resume{LSN: l.walEnd()}}
				change = once(RecoverAll, 10)
			}
			r := l.run(s, change)
			f := r.untilRemedy("bypassrls")
			require.Contains(t, f.Reason, "role "+role+" may not read")
			require.Contains(t, f.Remedy, "grant select on")
			l.exec(`grant select on outbox to ` + role)
			r.until("row security is told", func() bool {
				f := r.Status().Fault
				return f != nil && strings.Contains(f.Cause(), "row-level security")
			})
			require.Contains(t, r.Status().Fault.Remedy, "bypassrls")
			require.Zero(t, s.count())
			l.exec(`alter role ` + role + ` bypassrls`)
			r.untilState(Streaming)
			require.ElementsMatch(t, []string{"seen", "hidden"}, s.notes())
		})
	}
}

// Defaults of a role or of the server that end long waits do not end a snapshot.
func TestTimeoutsOfTheServerDoNotEndASnapshot(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	db := l.value("quote_ident(current_database())")
	for _, name := range strings.Fields("statement_timeout idle_in_transaction_session_timeout idle_session_timeout transaction_timeout lock_timeout") {
		if l.value("select name from pg_settings where name = $1", name) != "" {
			l.exec(fmt.Sprintf("alter database %s set %s = '300ms'", db, name))
		}
	}
	l.exec(`insert into outbox (note) select 'before ' || n from generate_series(1, 100) n`)
	s := &sink{}
	tries := 0
	s.onFill = func(n int) error {
		if n != 50 {
			return nil
		}
		tries++
		wait := time.NewTimer(time.Second)
		<-wait.C
		return nil
	}
	r := l.run(s, initial)
	r.untilState(Streaming)
	require.Equal(t, 1, tries)
	requireNeverLost(t, r)
	l.requireOnce(s)

	// Nor do they keep the catalogue from being looked at.
	s.mu.Lock()
	before := s.proven
	s.mu.Unlock()
	r.halt()
	r = l.run(s, func(s *Stream) { s.limits.survey = 600 * time.Millisecond })
	r.until("looks", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.proven > before+2 })
}

// Whoever was making the slot may be frozen, with the lock.
func TestAFirstSnapshotThatStandsStillIsTakenOver(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.insert("before")
	reading := l.session()
	_, err := reading.Exec(t.Context(), "select pg_advisory_lock(hashtextextended('walhook ' || $1, 0))", l.slot)
	require.NoError(t, err)
	writing := l.session()
	_, err = writing.Exec(t.Context(), "set application_name = 'walhook fill'")
	require.NoError(t, err)
	r := l.run(&sink{}, func(s *Stream) { s.cfg.Snapshot, s.limits.frozen = true, 3*time.Second })
	r.until("the one that stands by", func() bool { return r.Status().State == Standby })
	r.untilState(Streaming)
	require.Equal(t, []string{"before"}, r.sink.notes())
	require.Error(t, reading.Ping(t.Context()))
}
