package cdc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"pgregory.net/rapid"

	"github.com/walhook/walhook/cdc/pgtest"
)

// What is here holds the cases of docs/faults.md that the tests beside the code leave open.

// version is the server's, as 150018.
func (l *lab) version() int {
	l.t.Helper()
	v, err := strconv.Atoi(l.value(`current_setting('server_version_num')`))
	require.NoError(l.t, err)
	return v
}

// idle is a Stream that does not run, to call its parts.
func idle(s *sink) *Stream { return New(Config{Logger: zap.NewNop()}, s, s) }

// A flush position of zero is sent as the write position: everything would be confirmed.
func TestAStatusWithoutAConfirmedPositionIsNotSent(t *testing.T) {
	t.Parallel()
	s := idle(&sink{})
	s.received = 100
	require.PanicsWithValue(t, "cdc: a status without a confirmed position", func() { _ = (&reader{s: s}).sendStatus(false) })
}

// Postgres takes any position that it is told, also one ahead of its WAL, and skips what is below.
func TestWhateverIsConfirmedTheServerIsToldNothingTooMuch(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		s := idle(&sink{})
		s.told, s.received = 10, 10
		r := &reader{s: s}
		wanted := map[LSN]LSN{10: 0} // with the least proof
		lsn := rapid.Map(rapid.Uint64Range(1, 200), func(n uint64) LSN { return LSN(n) })
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			before := s.told
			if rapid.Bool().Draw(t, "confirm") {
				at, proof := lsn.Draw(t, "at"), lsn.Draw(t, "proof")
				s.Confirm(at, proof)
				if least, ok := wanted[at]; !ok || proof < least {
					wanted[at] = proof
				}
			} else {
				r.receive(lsn.Draw(t, "received"))
				moved := s.advance()
				require.Equal(t, before != s.told, moved)
			}
			require.GreaterOrEqual(t, s.told, before, "it went back")
			require.LessOrEqual(t, s.told, s.received, "it is ahead of what was received")
			proof, ok := wanted[s.told]
			require.True(t, ok, "nobody confirmed %s", s.told)
			require.LessOrEqual(t, proof, s.received, "its proof was not passed")
		}
	})
}

// The end of a transaction is confirmed, not its commit: the last one would come again at each start.
func TestStartingAndStoppingRepeatsNothing(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{confirms: true}
	const cycles = 25
	for n := range cycles {
		r := l.run(s)
		r.untilState(Streaming)
		l.insert(strconv.Itoa(n))
		r.untilRows(n + 1)
		r.until("the commit", func() bool { return s.end() > s.all()[n].Commit })
		ctx, cancel := context.WithTimeout(t.Context(), testPatience)
		require.NoError(t, r.Confirmed(ctx))
		cancel()
		require.GreaterOrEqual(t, l.confirmed(), s.end())
		r.halt()
	}
	// What the slot says is enough, without any checkpoint.
	last := &sink{}
	r := l.run(last)
	l.insert("last")
	r.untilRows(1)
	require.Equal(t, []string{"last"}, last.notes())
	require.Equal(t, numbers(0, cycles-1), s.notes())
}

// Where one commit ends the next may begin, so a sum of positions, or a comparison that takes in
// the bound, leaves a transaction out.
func TestACommitThatBeginsWhereTheConfirmedOneEndsIsRead(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{}
	r := l.run(s)
	r.untilState(Streaming)
	one, other := l.session(), l.session()
	do := func(conn *pgx.Conn, sql string) {
		_, err := conn.Exec(t.Context(), sql, pgx.QueryExecModeSimpleProtocol)
		require.NoError(t, err)
	}
	var end LSN
	var next got
	for n := 0; end == 0; n += 2 { // others write to the WAL too, in between
		require.Less(t, n, 4000, "no two commits stood side by side")
		do(one, `begin; insert into outbox (note) values ('later')`)
		do(other, `begin; insert into outbox (note) values ('earlier'); commit`)
		do(one, `commit`)
		r.untilRows(n + 2)
		r.until("the commit", func() bool { return s.end() > s.all()[n+1].Commit })
		s.mu.Lock()
		for _, e := range s.ends {
			if e == s.rows[n+1].Commit {
				end, next = e, s.rows[n+1]
			}
		}
		s.mu.Unlock()
	}
	r.halt()

	s = &sink{made: true, at: Resume{LSN: end}}
	r = l.run(s)
	l.insert("last")
	r.untilRows(2)
	require.Equal(t, []string{"later", "last"}, s.notes())
	require.Equal(t, next.Position, s.all()[0].Position)
}

// With wal_sender_timeout = 0 the server never asks whether we are there, and never lets the slot
// of a lost connection go.
func TestALostConnectionIsNoticedWhereTheServerNeverAsks(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.url += "&wal_sender_timeout=0"
	p := l.through()
	s := &sink{confirms: true}
	r := l.run(s, func(s *Stream) { s.limits.silence = 500 * time.Millisecond })
	r.untilState(Streaming)
	l.insert("one")
	r.untilRows(1)
	p.freeze()
	l.insert("two")
	r.until("the row behind the loss", func() bool {
		r.poke() // or the timer would look at it in 10 s
		return s.count() > 1
	})
	require.Equal(t, []string{"one", "two"}, s.notes())
	require.GreaterOrEqual(t, maxSilence, 2*statusInterval(0), "a server is asked before it is given up")
}

func TestAnIdleServerIsAskedWhetherItIsThere(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{Settings: map[string]string{"autovacuum": "off", "checkpoint_timeout": "1h"}})
	l := labAt(t, server.URL())
	l.url += "&wal_sender_timeout=1500"
	p := l.through()
	s := &sink{}
	r := l.run(s, func(s *Stream) { s.limits.silence = 1500 * time.Millisecond })
	r.untilState(Streaming)
	begun := len(p.seen())
	r.until("statuses of four seconds", func() bool { return len(p.seen()) >= begun+8 })
	require.Equal(t, 1, s.sessionCount())
}

// The slot's own position is written to disk only where its restart point moves, which a long
// transaction of somebody else keeps from moving for hours.
func TestACrashDuringSomebodysLongTransactionRepeatsNothing(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{})
	l := labAt(t, server.URL())
	s := &sink{confirms: true}
	r := l.run(s)
	r.untilState(Streaming)
	long, err := l.session().Begin(t.Context())
	require.NoError(t, err)
	_, err = long.Exec(t.Context(), `create table elsewhere (n int); insert into elsewhere values (1)`, pgx.QueryExecModeSimpleProtocol)
	require.NoError(t, err)
	for n := range 100 {
		l.insert(strconv.Itoa(n))
		if n%20 == 19 {
			l.exec(`checkpoint`)
		}
	}
	r.untilRows(100)
	r.until("the slot to be told", func() bool { return l.confirmed() > s.all()[99].Commit })
	r.halt()
	require.NoError(t, server.Kill())
	require.NoError(t, server.Start(t.Context()))
	l.connect()
	require.Less(t, l.confirmed(), s.end(), "the slot was thrown back")
	r = l.run(s)
	l.insert("100")
	r.untilRows(101)
	require.Equal(t, numbers(0, 100), s.notes())
}

func TestReconnectsAreSpacedOut(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var tries []time.Time
		s := New(Config{Logger: zap.NewNop(), URL: func() (string, error) {
			tries = append(tries, time.Now())
			return "", errors.New("not now")
		}}, &sink{}, &sink{})
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		require.NoError(t, s.Run(ctx))
		require.Less(t, tries[1].Sub(tries[0]), time.Second, "a passing error costs little")
		for i := range tries[1:] {
			gap := tries[i+1].Sub(tries[i])
			require.GreaterOrEqual(t, gap, minBackoff*8/10)
			require.LessOrEqual(t, gap, maxBackoff*12/10)
			if i > 8 {
				require.GreaterOrEqual(t, gap, maxBackoff*8/10)
			}
		}
		require.Greater(t, len(tries), 600/12)
	})
}

// A server that decodes a huge transaction says nothing for a while. The more patient we are
// after each loss the sooner it is read, but once it speaks an ordinary silence counts again.
func TestPatienceGrowsWithEachSilence(t *testing.T) {
	t.Parallel()
	s := idle(&sink{})
	s.patience = s.limits.silence
	for _, patience := range []time.Duration{60 * time.Second, 2 * time.Minute, 4 * time.Minute, 8 * time.Minute, 10 * time.Minute, 10 * time.Minute} {
		r := &reader{s: s, heard: time.Now().Add(-s.patience - time.Second)}
		require.ErrorIs(t, r.timer(t.Context()), errSilent)
		require.Equal(t, patience, s.patience)
	}
	r := &reader{s: s, began: time.Now().Add(-11 * time.Minute), heard: time.Now()}
	require.NoError(t, r.keepalive(make([]byte, 17)))
	require.Equal(t, maxSilence, s.patience)
}

// A transaction larger than logical_decoding_work_mem goes through files of the server, and from
// the start again after each lost connection. One that rolls back is never sent.
func TestSpilledTransactionsComeWholeAndOnlyIfTheyCommit(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{}
	killer := l.session()
	s.onRow = func(n int) error {
		if n == 3000 {
			_, err := killer.Exec(context.Background(), `select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = $1`, l.slot)
			return err
		}
		return nil
	}
	spilling := l.url + "&logical_decoding_work_mem=64kB"
	r := l.run(s, func(stream *Stream) { stream.cfg.URL = func() (string, error) { return spilling, nil } })
	r.untilState(Streaming)
	l.exec(`begin; insert into outbox (note) select 'rolled back' from generate_series(1, 20000); rollback`)
	l.exec(`begin;
		insert into outbox (note) select n::text from generate_series(1, 10000) n;
		savepoint s; insert into outbox (note) select 'undone' from generate_series(1, 10000); rollback to s;
		insert into outbox (note) select n::text from generate_series(10001, 20000) n;
		commit`)
	r.until("the commit", func() bool { return s.end() > 0 })
	require.Equal(t, numbers(1, 20000), s.notes())
	requireInOrder(t, s.all())
	require.Equal(t, 2, s.sessionCount())
	r.until("the server to count", func() bool {
		n, _ := strconv.Atoi(l.value(`select spill_txns from pg_stat_replication_slots where slot_name = $1`, l.slot))
		return n > 0
	})
}

// TestServerAtItsLimits is one server that is refused us in every way that a server has, and is
// then set right. Nothing of it ends a process.
func TestServerAtItsLimits(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{Settings: map[string]string{"max_wal_senders": "1", "max_prepared_transactions": "5"}})
	admin := labAt(t, server.URL())
	soon := func(s *Stream) { s.limits.backoff = 300 * time.Millisecond }
	database := func(t *testing.T, name string) *lab {
		admin.exec(`create database ` + name)
		return labAt(t, server.URLFor(name))
	}

	t.Run("no connection left", func(t *testing.T) {
		l := database(t, "connections")
		l.exec(`create role app login replication connection limit 0; create publication ` + quoteName("p_"+l.slot) + ` for table outbox with (publish = 'insert')`)
		sender, err := pgconn.Connect(t.Context(), l.url+"&replication=database")
		require.NoError(t, err)
		defer sender.Close(context.Background())
		app := strings.Replace(l.url, "postgres@", "app@", 1)
		s := &sink{confirms: true}
		r := l.run(s, soon, func(s *Stream) { s.cfg.URL = func() (string, error) { return app, nil } })
		f := r.untilReason("no connection left")
		require.Equal(t, Waiting, f.State)
		require.Contains(t, f.Err.Error(), "too many connections for role")
		require.Contains(t, f.Remedy, "CONNECTION LIMIT")

		writeHBA(t, server, "host all app 127.0.0.1/32 reject\nhost all all 127.0.0.1/32 trust\n")
		require.NoError(t, server.Reload(t.Context()))
		l.exec(`alter role app connection limit -1`)
		f = r.untilReason("does not let us in")
		require.Equal(t, Waiting, f.State)
		require.Contains(t, f.Remedy, "pg_hba.conf")

		writeHBA(t, server, "host all all 127.0.0.1/32 trust\n")
		require.NoError(t, server.Reload(t.Context()))
		f = r.untilReason("no connection left")
		require.Contains(t, f.Err.Error(), "max_wal_senders")
		require.Contains(t, f.Remedy, "max_wal_senders")

		require.NoError(t, sender.Close(t.Context()))
		r.untilState(Streaming)
		l.insert("one")
		r.untilRows(1)
	})

	t.Run("prepared transactions", func(t *testing.T) {
		l := database(t, "prepared")
		s := &sink{confirms: true}
		r := l.run(s, soon)
		r.untilState(Streaming)
		l.exec(`begin; insert into outbox (note) values ('prepared'); prepare transaction 'kept'`)
		l.exec(`begin; insert into outbox (note) values ('never'); prepare transaction 'undone'`)
		l.insert("other")
		r.untilRows(1)
		r.until("the slot to go on meanwhile", func() bool { return l.confirmed() > s.all()[0].Commit })
		l.exec(`rollback prepared 'undone'`)
		l.exec(`commit prepared 'kept'`)
		r.untilRows(2)
		l.insert("last")
		r.untilRows(3)
		require.Equal(t, []string{"other", "prepared", "last"}, s.notes())
		r.halt()

		// One that somebody forgot keeps a new slot waiting.
		l.exec(`begin; insert into outbox (note) values ('forgotten'); prepare transaction 'forgotten'`)
		l.slot += "_new"
		l.exec(`create publication ` + quoteName("p_"+l.slot) + ` for table outbox with (publish = 'insert')`)
		s = &sink{confirms: true}
		r = l.run(s, soon)
		f := r.untilReason("the new slot waits for the write transaction of pid 0")
		require.Contains(t, f.Remedy, "pg_prepared_xacts")
		l.exec(`rollback prepared 'forgotten'`)
		r.untilState(Streaming)
	})

	t.Run("wal_level lowered", func(t *testing.T) {
		l := database(t, "lowered")
		s := &sink{confirms: true}
		r := l.run(s, soon)
		r.untilState(Streaming)
		l.insert("one")
		r.untilRows(1)
		require.NoError(t, server.Set(t.Context(), map[string]string{"wal_level": "replica"}))
		stopServer(t, server, pgtest.Fast)
		err := server.Start(t.Context())
		require.Error(t, err, "Postgres would do without its slots")
		require.Regexp(t, `HINT:  Change "?wal_level"? to be "?logical`, err.Error())
		r.untilReason("nothing listens at")
		require.NoError(t, server.Set(t.Context(), map[string]string{"wal_level": "logical"}))
		require.NoError(t, server.Start(t.Context()))
		l.connect()
		l.insert("two")
		r.untilRows(2)
		require.Equal(t, []string{"one", "two"}, s.notes())
	})
}

// A holder that is cut off keeps the slot, in the server's eyes, until wal_sender_timeout.
func TestAHolderThatIsCutOffIsReplaced(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	direct := *l
	l.url += "&wal_sender_timeout=2000"
	p := l.through()
	s := &sink{confirms: true}
	first := l.run(s, func(s *Stream) { s.limits.silence = time.Second })
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
	second := direct.run(other)
	second.untilState(Standby)
	l.insert("one")
	first.until("the commit", func() bool { return s.count() == 1 && s.end() > s.all()[0].Commit })
	_ = p.listen.Close()
	p.freeze()
	second.untilState(Streaming)
	l.insert("two")
	second.untilRows(1)
	first.untilState(Connecting)
	require.Equal(t, []string{"one"}, s.notes())
	require.Equal(t, []string{"two"}, other.notes())
}

// A pooler speaks Postgres, but for replication: who looks is told where to point it.
func TestAPoolerInBetweenIsFoundOut(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	p := l.through()
	require.NoError(t, p.listen.Close())
	u, err := url.Parse(l.url)
	require.NoError(t, err)
	pooler, err := net.Listen("tcp", u.Host)
	require.NoError(t, err)
	t.Cleanup(func() { _ = pooler.Close() })
	p.wg.Go(func() {
		for {
			client, err := pooler.Accept()
			if err != nil {
				return
			}
			p.wg.Go(func() { pool(client, p.server) })
		}
	})
	cfg := l.config()
	sv, err := Examine(t.Context(), &cfg)
	require.NoError(t, err)
	f := firstFault(sv.Findings(&cfg))
	require.NotNil(t, f)
	require.Contains(t, f.Err.Error(), "unsupported startup parameter")
	require.Contains(t, f.Remedy, "database.replication_url")
}

// pool passes a client on to a server, and refuses replication in a pooler's words.
func pool(client net.Conn, server string) {
	defer client.Close()
	start := make([]byte, 4096)
	n, err := client.Read(start)
	if err != nil {
		return
	}
	if bytes.Contains(start[:n], []byte("replication\x00")) {
		refusal, _ := (&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "unsupported startup parameter: replication"}).Encode(nil)
		_, _ = client.Write(refusal)
		return
	}
	conn, err := net.Dial("tcp", server)
	if err != nil {
		return
	}
	defer conn.Close()
	_, _ = conn.Write(start[:n])
	go func() {
		_, _ = io.Copy(conn, client)
		_ = conn.Close()
	}()
	_, _ = io.Copy(client, conn)
}

// Nothing could be parked there, and no checkpoint written.
func TestAReadOnlyDatabaseIsNotStreamed(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	name := quoteName(l.value(`current_database()`))
	l.exec(`alter database ` + name + ` set default_transaction_read_only = on`)
	s := &sink{confirms: true}
	r := l.run(s)
	f := r.untilReason("read-only")
	require.Equal(t, Waiting, f.State)
	require.Contains(t, f.Remedy, "default_transaction_read_only")
	require.Zero(t, l.confirmed())
	l.exec(`alter database ` + name + ` reset default_transaction_read_only`)
	r.untilState(Streaming)
}

// A row filter leaves rows out without a word, and the slot moves past them.
func TestAPublicationThatLeavesRowsOutIsNotStreamed(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	if l.version() < 150000 {
		t.Skip("row filters came with Postgres 15")
	}
	l.exec(`create publication ` + quoteName("p_"+l.slot) + ` for table outbox where (id > 1) with (publish = 'insert')`)
	r := l.run(&sink{confirms: true})
	f := r.untilReason("by a row filter")
	require.Equal(t, Waiting, f.State)
	l.exec(f.Remedy)
	r.untilState(Streaming)
	l.insert("one")
	r.untilRows(1)
}

// A publication with updates would have Postgres refuse the app's own, where the table has no key.
func TestTheAppMayUpdateAndDeleteRowsOfATableWithoutAKey(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.exec(`drop table outbox; create table outbox (id int, note text)`)
	r := l.run(&sink{})
	r.untilState(Streaming)
	l.exec(`insert into outbox values (1, 'one'), (2, 'two')`)
	l.exec(`update outbox set note = 'changed'`)
	l.exec(`delete from outbox where id = 1`)
	l.exec(`truncate outbox`)
	l.exec(`insert into outbox values (3, 'three')`)
	r.untilRows(3)
	require.Equal(t, []string{"one", "two", "three"}, r.sink.notes())
}

// The rows of a partition are the table's, in the order of the table's columns, from the moment
// it is attached.
func TestPartitionsComeAndGo(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.exec(`drop table outbox;
		create table outbox (id int, note text) partition by range (id);
		create table low partition of outbox for values from (0) to (100);
		create table loose (junk int, note text, id int);
		alter table loose drop column junk`)
	r := l.run(&sink{})
	r.untilState(Streaming)
	if l.version() >= 150000 {
		// 14 remembers of a table with rows that it is not published, for as long as the connection
		// stands: what is inserted after it was attached is not sent.
		l.exec(`insert into loose (id, note) values (101, 'not yet ours')`)
	}
	l.exec(`insert into outbox values (1, 'one')`)
	l.exec(`alter table outbox attach partition loose for values from (100) to (200)`)
	l.exec(`insert into loose (id, note) values (102, 'two')`)
	l.exec(`insert into outbox values (103, 'three')`)
	l.exec(`alter table outbox detach partition low`)
	l.exec(`insert into low values (2, 'no longer ours')`)
	l.exec(`create table newer partition of outbox for values from (0) to (100)`)
	l.exec(`insert into outbox values (4, 'four'), (104, 'five')`)
	r.until("the last row", func() bool { n := r.sink.notes(); return len(n) > 0 && n[len(n)-1] == "five" })
	var seen []string
	for _, g := range r.sink.all() {
		require.Equal(t, "public.outbox", g.table)
		if note := g.note(); note != "no longer ours" { // which one server sends and another does not
			seen = append(seen, g.values[0]+" "+note)
		}
	}
	require.Equal(t, []string{"1 one", "102 two", "103 three", "4 four", "104 five"}, seen)
	requireInOrder(t, r.sink.all())
}

// Generated columns are not in the stream, unless Postgres 18 is told so; the survey must know,
// because the columns are chosen by it.
func TestTheSurveyHasTheColumnsThatTheStreamWillHave(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.exec(`alter table outbox add doubled text generated always as (note || note) stored, add last text`)
	s := &sink{confirms: true}
	step := func(row ...string) {
		t.Helper()
		r := l.run(s)
		r.until("a look that has it published", func() bool { return r.Status().State == Streaming && r.Status().Survey.Publication != nil })
		found := r.Status().Survey.Tables[0]
		before := s.count()
		l.exec(`insert into outbox (note, last) values ('ab', 'z')`)
		r.until("the commit", func() bool { return s.count() > before && s.end() > s.all()[before].Commit })
		require.Len(t, found.Relation().Columns, len(s.all()[before].values))
		require.Equal(t, row, s.all()[before].values[1:])
		r.halt()
	}
	r := l.run(s)
	r.untilState(Streaming)
	r.halt()
	step("ab", "z")
	if l.version() < 180000 {
		return
	}
	l.exec(`alter publication ` + quoteName("p_"+l.slot) + ` set (publish_generated_columns = stored)`)
	step("ab", "abab", "z")
}

// Rows of an unlogged table are not in the WAL. Postgres itself sees to it that a published table
// is logged.
func TestAnUnloggedTableIsNeverPublished(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.exec(`alter table outbox set unlogged`)
	r := l.run(&sink{})
	f := r.untilReason("is unlogged")
	require.Equal(t, Waiting, f.State)
	l.exec(f.Remedy)
	r.untilState(Streaming)
	_, err := l.conn.Exec(t.Context(), `alter table outbox set unlogged`)
	require.Error(t, err)
	l.insert("one")
	r.untilRows(1)
}

// What a database cannot print as UTF-8 is a row like any other: it must not end the stream.
func TestDatabasesOfOtherEncodings(t *testing.T) {
	t.Parallel()
	server := pgtest.DB(t)
	for _, c := range []struct{ encoding, insert, want string }{
		{"LATIN1", `e'caf\xe9'`, "café"},
		{"SQL_ASCII", `e'caf\xe9'`, "caf\xe9"},
		{"SQL_ASCII", `'café'`, "café"},
	} {
		t.Run(c.encoding, func(t *testing.T) {
			u, err := url.Parse(server)
			require.NoError(t, err)
			u.Path = fmt.Sprintf("/walhook_encoding_%d_%d", os.Getpid(), time.Now().UnixNano())
			name := quoteName(u.Path[1:])
			pgtest.Exec(t, server, `create database `+name+` encoding '`+c.encoding+`' lc_collate 'C' lc_ctype 'C' template template0`)
			t.Cleanup(func() { pgtest.Exec(t, server, `drop database `+name+` with (force)`) })
			l := labAt(t, u.String())
			r := l.run(&sink{})
			r.untilState(Streaming)
			l.exec(`insert into outbox (note) values (` + c.insert + `)`)
			l.insert("next")
			r.untilRows(2)
			require.Equal(t, []string{c.want, "next"}, r.sink.notes())
			r.halt()
			l.dropSlot()
		})
	}
}

// What a subscription replicates into the outbox is an event like any other.
func TestRowsThatWereReplicatedHereAreRows(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	r := l.run(&sink{})
	r.untilState(Streaming)
	l.exec(`select pg_replication_origin_create($1)`, l.slot)
	defer l.exec(`select pg_replication_origin_drop($1)`, l.slot)
	l.exec(`select pg_replication_origin_session_setup($1)`, l.slot)
	l.exec(`begin; select pg_replication_origin_xact_setup('1/2', now()); insert into outbox (note) values ('from elsewhere'); commit`)
	l.exec(`select pg_replication_origin_session_reset()`)
	l.insert("from here")
	r.untilRows(2)
	require.Equal(t, []string{"from elsewhere", "from here"}, r.sink.notes())
}

// The app may tidy up as it likes, in the same transaction or by a job that never ends.
func TestWhatTheAppDeletesStillComes(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &sink{confirms: true}
	r := l.run(s)
	r.untilState(Streaming)
	purge := l.session()
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				stopped <- nil
				return
			default:
			}
			sql := `delete from outbox`
			if n%5 == 4 {
				sql = `truncate outbox`
			}
			if _, err := purge.Exec(context.Background(), sql); err != nil {
				stopped <- err
				return
			}
		}
	}()
	for n := 1; n <= 200; n += 2 {
		l.exec(`begin; insert into outbox (note) values ('` + strconv.Itoa(n) + `'); delete from outbox; commit`)
		l.insert(strconv.Itoa(n + 1))
	}
	close(stop)
	require.NoError(t, <-stopped)
	r.untilRows(200)
	require.Equal(t, numbers(1, 200), s.notes())
}

// A server may take long over what others wrote. The slot gets past it, and what comes behind it comes.
func TestAHugeTransactionElsewhereIsPassed(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.url += "&wal_sender_timeout=2000&logical_decoding_work_mem=64kB"
	s := &sink{confirms: true}
	r := l.run(s)
	r.untilState(Streaming)
	l.exec(`create table elsewhere (n int, filling text)`)
	l.exec(`insert into elsewhere select n, 'x' from generate_series(1, 200000) n`)
	l.insert("behind it")
	written := l.walEnd()
	r.untilRows(1)
	l.exec(`update elsewhere set n = n + 1 where n <= 50000`)
	r.until("the slot to pass it", func() bool { return l.confirmed() >= written })
	require.Equal(t, []string{"behind it"}, s.notes())
	requireNeverLost(t, r)
}

// A row of tens of megabytes takes its memory and its time, and nothing else.
func TestALargeRowComesWhole(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.exec(`alter table outbox add b bytea`)
	r := l.run(&sink{})
	r.untilState(Streaming)
	const size = 16 << 20
	l.exec(`insert into outbox (b) select decode(repeat('ab', ` + strconv.Itoa(size) + `), 'hex')`)
	l.exec(`insert into outbox (b) values ('\x01')`)
	r.untilRows(2)
	rows := r.sink.all()
	require.Len(t, rows[0].note(), 2+2*size)
	require.True(t, strings.HasPrefix(rows[0].note(), `\xabab`))
	require.Equal(t, `\x01`, rows[1].note())
}

// play gives a reader the messages of a stream, one after the other.
func play(t *testing.T, r *reader, messages ...[]byte) error {
	t.Helper()
	for _, m := range messages {
		if err := r.message(t.Context(), &pgproto3.CopyData{Data: append(append([]byte{'w'}, make([]byte, 24)...), m...)}); err != nil {
			return err
		}
	}
	return nil
}

// A later protocol's message may be one that holds rows: it is not skipped, and not retried in silence.
func TestAMessageThatNobodyKnowsStopsTheStreamLoudly(t *testing.T) {
	t.Parallel()
	for name, m := range map[string][]byte{
		"unknown":         {'b', 0, 0},
		"cut short":       {'C', 0},
		"too long":        append(relationFrame(7, "public", "outbox", "note"), 0),
		"of no known row": insertFrame(9, "x"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := &sink{}
			err := play(t, &reader{s: idle(s)}, m)
			require.Error(t, err)
			f := FaultOf(err)
			require.Equal(t, Waiting, f.State)
			require.Contains(t, f.Cause(), strconv.QuoteRune(rune(m[0])))
			require.NotEmpty(t, f.Remedy)
			require.Zero(t, s.count())
		})
	}
}

// A transaction's number has 32 bits and comes round again.
func TestATransactionsNumberPlacesNothing(t *testing.T) {
	t.Parallel()
	begin := func(commit byte, xid ...byte) []byte {
		return append(append([]byte{'B', 0, 0, 0, 0, 0, 0, 0, commit}, make([]byte, 8)...), xid...)
	}
	commit := func(at byte) []byte {
		return bytes.Join([][]byte{{'C', 0}, {0, 0, 0, 0, 0, 0, 0, at}, {0, 0, 0, 0, 0, 0, 0, at + 1}, make([]byte, 8)}, nil)
	}
	s := &sink{}
	r := &reader{s: idle(s)}
	require.NoError(t, play(t, r,
		relationFrame(7, "public", "outbox", "note"),
		begin(10, 0xff, 0xff, 0xff, 0xff), insertFrame(7, "the last number"), commit(10),
		begin(20, 0, 0, 0, 3), insertFrame(7, "the first"), commit(20),
		begin(30, 0, 0, 0, 3), insertFrame(7, "the same again"), commit(30),
	))
	require.Equal(t, []string{"the last number", "the first", "the same again"}, s.notes())
	requireInOrder(t, s.all())
	require.Equal(t, []LSN{11, 21, 31}, s.ends)
}
