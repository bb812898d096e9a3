package store

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"go.uber.org/zap/zaptest"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/cdc/pgtest"
	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/outbox/outboxtest"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bundle is a store on a database of its own.
type bundle struct {
	*Store
	t      testing.TB
	url    string
	system string
	parts  bool // it writes in parts
}

// setup gives a store that holds its slot.
func setup(t testing.TB) *bundle {
	t.Helper()
	b := empty(t, pgtest.DB(t))
	require.NoError(t, b.Migrate(t.Context()))
	_, err := b.Claim(t.Context(), b.holder(100))
	require.NoError(t, err)
	return b
}

// empty gives a store without its schema.
func empty(t testing.TB, address string) *bundle {
	t.Helper()
	b := &bundle{Store: open(t, address, "walhook", "default"), t: t, url: address}
	b.query("select system_identifier::text from pg_control_system()", &b.system)
	return b
}

func open(t testing.TB, address, slot, instance string) *Store {
	t.Helper()
	s, err := Open(t.Context(), Config{
		URL: func() (string, error) { return address, nil }, Slot: slot, Instance: instance,
		Logger: zaptest.NewLogger(t),
	})
	require.NoError(t, err)
	t.Cleanup(s.Close)
	return s
}

func (b *bundle) Write(ctx context.Context, changes []outbox.Change) error {
	if b.parts {
		return b.WriteInParts(ctx, changes, func() bool { return true })
	}
	return b.Store.Write(ctx, changes)
}

// tear makes parts of one row each.
func (b *bundle) tear() { b.parts, b.partEvents, b.partRows, b.partUpdates = true, 1, 1, 1 }

func (b *bundle) exec(sql string) { b.t.Helper(); pgtest.Exec(b.t, b.url, sql) }

func (b *bundle) query(sql string, into ...any) {
	b.t.Helper()
	conn, err := pgx.Connect(b.t.Context(), b.url)
	require.NoError(b.t, err)
	defer conn.Close(context.Background())
	require.NoError(b.t, conn.QueryRow(b.t.Context(), sql).Scan(into...))
}

func (b *bundle) holder(at cdc.LSN) Holder { return Holder{SystemIdentifier: b.system, At: at} }

// saved is the slot's checkpoint.
func (b *bundle) saved() Saved {
	b.t.Helper()
	saved, ok, err := b.Checkpoint(b.t.Context(), "")
	require.NoError(b.t, err)
	require.True(b.t, ok)
	return saved
}

func (b *bundle) save(lsn cdc.LSN) (proof cdc.LSN) {
	b.t.Helper()
	proof, err := b.SaveCheckpoint(b.t.Context(), outbox.Checkpoint{LSN: lsn})
	require.NoError(b.t, err)
	return proof
}

func (b *bundle) count(table string) (n int) {
	b.t.Helper()
	b.query("select count(*) from walhook."+table, &n)
	return n
}

func park(n int) outbox.Change { return outboxtest.Park("a", outboxtest.Event(n, "")) }

func gone(n int) outbox.Change {
	return outboxtest.Move("a", outboxtest.Event(n, ""), outbox.StateGone)
}

func TestSuite(t *testing.T) { eachWay(t, func(t *testing.T, b *bundle) { suite(t, b, "") }) }

// eachWay is for what may not depend on whether new rows are copied or inserted, at once or in parts.
func eachWay(t *testing.T, test func(*testing.T, *bundle)) {
	t.Helper()
	for name, rows := range map[string]int{"insert": math.MaxInt, "copy": 1, "parts": math.MaxInt} {
		t.Run(name, func(t *testing.T) {
			b := setup(t)
			if b.copyRows = rows; name == "parts" {
				b.tear()
			}
			test(t, b)
		})
	}
}

// suite runs the suite on the database of b, emptied for each case. settings go into the URL.
func suite(t *testing.T, b *bundle, settings string) {
	t.Helper()
	outboxtest.Suite(t, func(t *testing.T) outbox.Store {
		b.exec("truncate walhook.deliveries, walhook.events, walhook.checkpoints")
		address, err := url.Parse(b.url)
		require.NoError(t, err)
		address.RawQuery = strings.Trim(address.RawQuery+"&"+settings, "&")
		s := &bundle{Store: open(t, address.String(), "walhook", "default")}
		if s.copyRows = b.copyRows; b.parts {
			s.tear()
		}
		_, err = s.Claim(t.Context(), b.holder(100))
		require.NoError(t, err)
		return s
	})
}

func TestOpenNeedsNoPostgres(t *testing.T) {
	s := open(t, "postgres://nobody@127.0.0.1:1/none?connect_timeout=1", "walhook", "default")
	err := s.Write(t.Context(), []outbox.Change{park(1)})
	require.ErrorContains(t, err, "write deliveries: connect: ")
	_, err = Open(t.Context(), Config{URL: func() (string, error) { return "", os.ErrNotExist }})
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = Open(t.Context(), Config{URL: func() (string, error) { return "postgres://user:secret@host:port/", nil }})
	require.Error(t, err)
	require.NotContains(t, err.Error(), "secret")
}

func TestEachConnectReadsTheURLAnew(t *testing.T) {
	good := pgtest.DB(t)
	address := "postgres://nobody@127.0.0.1:1/none"
	s, err := Open(t.Context(), Config{URL: func() (string, error) { return address, nil }, Slot: "walhook"})
	require.NoError(t, err)
	defer s.Close()
	_, err = s.LoadEndpointStates(t.Context())
	require.ErrorContains(t, err, "connect")
	address = good
	require.NoError(t, s.Migrate(t.Context()))
}

// The role of a walhook often has settings of its own, and so has the database of a strange app.
func TestSettingsOfTheRoleDoNotMatter(t *testing.T) {
	b := empty(t, pgtest.DB(t))
	var name string
	b.query("select quote_ident(current_database())", &name)
	for _, setting := range []string{
		"synchronous_commit = off", "default_transaction_isolation = 'serializable'", "default_transaction_read_only = off",
		"timezone = 'Asia/Kathmandu'", "datestyle = 'SQL, DMY'", "search_path = ''", "client_encoding = 'LATIN1'",
		"statement_timeout = '20min'", "enable_indexscan = on", "bytea_output = 'escape'", "plan_cache_mode = force_generic_plan",
	} {
		b.exec("alter database " + name + " set " + setting)
	}
	require.NoError(t, b.Migrate(t.Context()))
	suite(t, b, "")
}

// A transaction in parts waits for its next part, and for the machine.
func TestTimeoutsOfTheRoleEndNoTransactionInParts(t *testing.T) {
	b := setup(t)
	var name string
	var version int
	b.query("select quote_ident(current_database()), current_setting('server_version_num')::int", &name, &version)
	b.exec("alter database " + name + " set idle_in_transaction_session_timeout = '50ms'")
	if version >= 17_00_00 {
		b.exec("alter database " + name + " set transaction_timeout = '250ms'")
	}
	s := &bundle{Store: open(t, b.url, "walhook", "default")}
	s.tear()
	_, err := s.Claim(t.Context(), b.holder(100))
	require.NoError(t, err)
	require.NoError(t, s.WriteInParts(t.Context(), []outbox.Change{park(1), park(2)}, func() bool {
		time.Sleep(100 * time.Millisecond)
		return true
	}))
	require.Equal(t, 2, b.count("deliveries"))
}

func TestReadOnlyServerIsLeftAlone(t *testing.T) {
	b := setup(t)
	var name string
	b.query("select quote_ident(current_database())", &name)
	b.exec("alter database " + name + " set default_transaction_read_only = on")
	err := open(t, b.url, "walhook", "default").Write(t.Context(), []outbox.Change{park(1)})
	require.ErrorContains(t, err, "read only connection")
}

func TestParkingIsDurableWhateverTheDefault(t *testing.T) {
	b := setup(t)
	var got, isolation string
	read := step{what: "look", sql: "select current_setting('synchronous_commit'), current_setting('transaction_isolation')", row: func(r pgx.Rows) error {
		return r.Scan(&got, &isolation)
	}}
	require.NoError(t, b.held(t.Context(), read))
	require.Equal(t, "on", got)
	require.Equal(t, "read committed", isolation)
}

// A database whose encoding has no ☃, and a peer that answers with one.
func TestDatabaseOfAnotherEncoding(t *testing.T) {
	server := pgtest.DB(t)
	name := "walhook_latin1_" + strconv.Itoa(os.Getpid())
	pgtest.Exec(t, server, "create database "+name+" encoding 'LATIN1' lc_collate 'C' lc_ctype 'C' template template0")
	t.Cleanup(func() { pgtest.Exec(t, server, "drop database "+name+" with (force)") })
	address, err := url.Parse(server)
	require.NoError(t, err)
	address.Path = "/" + name
	b := empty(t, address.String())
	require.NoError(t, b.Migrate(t.Context()))
	_, err = b.Claim(t.Context(), b.holder(100))
	require.NoError(t, err)

	c := outboxtest.Park("a", outboxtest.Event(1, "clé"))
	c.Event.Data, c.Event.Headers = []byte(`"snow ☃"`), []byte(`{"é":"☃"}`)
	c.Detail = "says ☃"
	require.NoError(t, b.Write(t.Context(), []outbox.Change{c}))
	rows, _, err := b.ScanKey(t.Context(), "a", "clé", cdc.Position{}, 10, 1000)
	require.NoError(t, err)
	require.Equal(t, c.Event.Data, rows[0].Event.Data)
	require.Equal(t, c.Event.Headers, rows[0].Event.Headers)
	require.Equal(t, "clé", rows[0].Event.Key)
	var detail string
	b.query("select last_error from walhook.deliveries", &detail)
	require.Equal(t, "says ?", detail)

	b.copyRows = 1
	c.Event.ID = "evt_copied"
	require.NoError(t, b.Write(t.Context(), []outbox.Change{c}))
	rows, _, err = b.ScanKey(t.Context(), "a", "clé", cdc.Position{}, 10, 1000)
	require.NoError(t, err)
	require.Len(t, rows, 2)
	require.Equal(t, rows[0].Event.Headers, rows[1].Event.Headers)
	require.Equal(t, rows[0].Event.Data, rows[1].Event.Data)
}

func TestPeersTextIsShortened(t *testing.T) {
	b := setup(t)
	c := park(1)
	c.Detail = strings.Repeat("é", 5000)
	require.NoError(t, b.Write(t.Context(), []outbox.Change{c}))
	var detail string
	b.query("select last_error from walhook.deliveries", &detail)
	require.Equal(t, strings.Repeat("é", detailLimit/2), detail)
}

// The tables are a supported way to look.
func TestTablesReadWell(t *testing.T) {
	b := setup(t)
	c := outboxtest.Park("a", outboxtest.Event(1, "k"))
	c.Event.Headers = []byte(`{"a": 1}`)
	c.Attempts, c.Status, c.Detail, c.Reason, c.Due = 2, 503, "try later", outbox.ReasonStatus, c.Event.Time
	bad := outboxtest.Park("", outboxtest.Event(2, ""))
	bad.State, bad.Reason, bad.Event.Data, bad.Due = outbox.StateDead, outbox.ReasonUnmappable, []byte{0xff}, c.Event.Time
	require.NoError(t, b.Write(t.Context(), []outbox.Change{c, bad}))

	var got string
	b.query(`
		select string_agg(concat_ws('|', coalesce(endpoint_id, 'null'), event_id, state, reason, attempts, coalesce(next_attempt_at::text, 'null'),
			coalesce(last_status::text, 'null'), coalesce(last_error, 'null'), commit_lsn, ordinal), e'\n' order by id)
		from walhook.deliveries, lateral set_config('timezone', 'UTC', false)`, &got)
	require.Equal(t, ""+
		"a|evt_1|parked|status|2|2026-02-03 12:00:01.123456+00|503|try later|1/0|2\n"+
		"null|evt_2|dead|unmappable|0|null|null|null|1/0|3", got)
	b.query(`
		select string_agg(concat_ws('|', id, type, key, tenant, headers, coalesce(data, 'null'), coalesce(raw::text, 'null'), bytes), e'\n' order by id)
		from walhook.events`, &got)
	require.Equal(t, ""+
		`evt_1|order.created|k||{"a": 1}|{"n": 1}|null|16`+"\n"+
		`evt_2|order.created|||null|\xff|1`, got)

	// An attempt that is begun has met nothing yet; a dead delivery that is sent again, neither.
	require.NoError(t, b.Write(t.Context(), []outbox.Change{outboxtest.Move("a", c.Event, outbox.StateSending)}))
	b.query("select concat_ws('|', state, reason, last_status, last_error) from walhook.deliveries where endpoint_id = 'a'", &got)
	require.Equal(t, "sending|status|503|try later", got)
	timeout := outboxtest.Move("a", c.Event, outbox.StateParked)
	timeout.Reason, timeout.Detail = outbox.ReasonTimeout, "no answer in 15s"
	require.NoError(t, b.Write(t.Context(), []outbox.Change{timeout}))
	b.query("select concat_ws('|', state, reason, coalesce(last_status::text, 'null'), last_error) from walhook.deliveries where endpoint_id = 'a'", &got)
	require.Equal(t, "parked|timeout|null|no answer in 15s", got)
}

func TestSecondHolderFencesTheFirst(t *testing.T) {
	b := setup(t)
	sending := park(1)
	sending.State = outbox.StateSending
	require.NoError(t, b.Write(t.Context(), []outbox.Change{sending, park(2)}))
	_, err := b.SaveCheckpoint(t.Context(), outbox.Checkpoint{LSN: 200, Position: cdc.Position{Commit: 210, Ordinal: 3}})
	require.NoError(t, err)

	other := open(t, b.url, "walhook", "default")
	require.ErrorIs(t, other.Write(t.Context(), []outbox.Change{park(3)}), outbox.ErrFenced, "it has not claimed yet")
	claimed, err := other.Claim(t.Context(), b.holder(999))
	require.NoError(t, err)
	require.False(t, claimed.First)
	require.Equal(t, outbox.Checkpoint{LSN: 200, Position: cdc.Position{Commit: 210, Ordinal: 3}}, claimed.Checkpoint)
	require.EqualValues(t, 2, claimed.Epoch)
	require.EqualValues(t, 1, claimed.Parked)
	require.WithinDuration(t, time.Now(), claimed.UpdatedAt, time.Minute)

	require.ErrorIs(t, b.Write(t.Context(), []outbox.Change{park(4), gone(1)}), outbox.ErrFenced)
	_, err = b.SaveCheckpoint(t.Context(), outbox.Checkpoint{LSN: 300})
	require.ErrorIs(t, err, outbox.ErrFenced)
	_, err = b.Bury(t.Context(), "a", outbox.ReasonRemoved)
	require.ErrorIs(t, err, outbox.ErrFenced)

	rows, _, err := other.Scan(t.Context(), "a", cdc.Position{}, nil, 10, 1000)
	require.NoError(t, err)
	require.Len(t, rows, 2)
	saved, ok, err := other.Checkpoint(t.Context(), "")
	require.NoError(t, err)
	require.True(t, ok)
	require.EqualValues(t, 200, saved.LSN)
	require.NoError(t, other.Write(t.Context(), []outbox.Change{park(5)}))
}

// A write that has begun is either seen by the new holder or fenced, never applied behind its back.
func TestClaimWaitsForTheWriteBeforeIt(t *testing.T) {
	b := setup(t)
	tx, err := b.pool.Begin(t.Context())
	require.NoError(t, err)
	defer func() { _ = tx.Rollback(context.Background()) }()
	_, err = tx.Exec(t.Context(), hold, "walhook", b.epoch.Load())
	require.NoError(t, err)

	other := open(t, b.url, "walhook", "default")
	done := make(chan error, 1)
	go func() {
		_, err := other.Claim(t.Context(), b.holder(1))
		done <- err
	}()
	b.awaitLockWait()
	require.Empty(t, done)
	require.NoError(t, tx.Commit(t.Context()))
	require.NoError(t, <-done)
}

// A holder that was stopped in the middle of a write keeps its locks as long as it is stopped.
func TestFrozenHolderDoesNotHoldUpTheNext(t *testing.T) {
	b := setup(t)
	require.NoError(t, b.Write(t.Context(), []outbox.Change{park(1)}))
	tx, err := b.pool.Begin(t.Context())
	require.NoError(t, err)
	defer func() { _ = tx.Rollback(context.Background()) }()
	_, err = tx.Exec(t.Context(), hold, "walhook", b.epoch.Load())
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), "update walhook.deliveries set state = 'sending'")
	require.NoError(t, err)

	next := open(t, b.url, "walhook", "default")
	_, err = next.Claim(t.Context(), b.holder(1))
	require.NoError(t, err)
	require.NoError(t, next.Write(t.Context(), []outbox.Change{gone(1)}))
	require.Error(t, tx.Commit(t.Context()))
}

// Its parts become visible together, or not at all, and a pause in which it is stopped does not hold up the next holder.
func TestAWriteInPartsIsOneTransaction(t *testing.T) {
	b := setup(t)
	require.NoError(t, b.Write(t.Context(), []outbox.Change{outboxtest.Park("b", outboxtest.Event(1, "")), outboxtest.Park("b", outboxtest.Event(2, ""))}))
	const events = 30 // more than go into parts of the usual size
	var changes []outbox.Change
	for n := range events {
		for _, endpoint := range []string{"a", "c", "d"} {
			changes = append(changes, outboxtest.Park(endpoint, outboxtest.Event(n, "")))
		}
	}
	changes = append(changes, outboxtest.Move("b", outboxtest.Event(1, ""), outbox.StateGone), outboxtest.Move("b", outboxtest.Event(2, ""), outbox.StateDead))

	pauses := 0
	unchanged := func() bool {
		pauses++
		require.Equal(t, 2, b.count("deliveries"))
		require.Equal(t, 2, b.count("events"))
		return true
	}
	b.exec("alter table walhook.deliveries add constraint none_dead check (state <> 'dead')")
	require.ErrorContains(t, b.WriteInParts(t.Context(), changes, unchanged), "write deliveries: update delivery: ")
	unchanged()
	b.exec("alter table walhook.deliveries drop constraint none_dead")

	pauses = 0
	require.NoError(t, b.WriteInParts(t.Context(), changes, unchanged))
	require.Equal(t, 1+mostParts+mostParts+1+1, pauses, "before it, events, deliveries, the update, what is gone")
	require.Equal(t, 3*events+1, b.count("deliveries"))
	require.Equal(t, events, b.count("events"))
	require.Equal(t, 1, b.count("deliveries where state = 'dead'"))

	// Where there is no time for pauses, the rest goes at once.
	pauses = 0
	require.NoError(t, b.WriteInParts(t.Context(), changes, func() bool { pauses++; return pauses < 3 }))
	require.Equal(t, 3, pauses)
	require.Equal(t, 3*events+1, b.count("deliveries"), "as they were")

	next := open(t, b.url, "walhook", "default")
	pauses = 0
	err := b.WriteInParts(t.Context(), changes, func() bool {
		if pauses++; pauses == 3 {
			_, err := next.Claim(t.Context(), b.holder(1))
			require.NoError(t, err)
			require.NoError(t, next.Write(t.Context(), []outbox.Change{gone(3)}))
		}
		return true
	})
	require.Error(t, err)
	require.Equal(t, 3*events, b.count("deliveries"))
}

// Poolers that know no prepared statements want one of these in the URL.
func TestEveryExecModeOfTheDriverWorks(t *testing.T) {
	for _, mode := range []string{"cache_describe", "exec"} {
		t.Run(mode, func(t *testing.T) { suite(t, setup(t), "default_query_exec_mode="+mode) })
	}
}

// awaitLockWait returns once a session of this database waits for a lock.
func (b *bundle) awaitLockWait() {
	b.t.Helper()
	conn, err := pgx.Connect(b.t.Context(), b.url)
	require.NoError(b.t, err)
	defer conn.Close(context.Background())
	const waiting = `select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'`
	for n := 0; n == 0; {
		require.NoError(b.t, conn.QueryRow(b.t.Context(), waiting).Scan(&n))
	}
}

func TestFirstClaimMakesTheCheckpoint(t *testing.T) {
	b := empty(t, pgtest.DB(t))
	require.NoError(t, b.Migrate(t.Context()))
	_, ok, err := b.Checkpoint(t.Context(), "")
	require.NoError(t, err)
	require.False(t, ok)
	claimed, err := b.Claim(t.Context(), b.holder(0x16B374D848))
	require.NoError(t, err)
	require.True(t, claimed.First)
	require.EqualValues(t, 1, claimed.Epoch)
	require.EqualValues(t, 0x16B374D848, claimed.LSN)
	saved, ok, err := b.Checkpoint(t.Context(), "")
	require.NoError(t, err)
	require.True(t, ok)
	require.Equal(t, claimed.Saved, saved)
}

func TestSlotOfAnotherClusterIsRefused(t *testing.T) {
	b := setup(t)
	_, err := b.Claim(t.Context(), Holder{SystemIdentifier: "4711", At: 1})
	require.ErrorIs(t, err, ErrOtherServer)
	var copied *CopyError
	require.False(t, errors.As(err, &copied))
}

// docs/faults.md 2.5: the slot may be told once the stream has passed the proof, and it must get there.
func TestProofIsBehindTheCommitAndOnDisk(t *testing.T) {
	b := setup(t)
	conn, err := pgx.Connect(t.Context(), b.url)
	require.NoError(t, err)
	defer conn.Close(context.Background())
	for n := range 50 {
		var before, flushed string
		require.NoError(t, conn.QueryRow(t.Context(), "select pg_current_wal_insert_lsn()::text").Scan(&before))
		proof, err := b.SaveCheckpoint(t.Context(), outbox.Checkpoint{LSN: cdc.LSN(100 + n)})
		require.NoError(t, err)
		require.NoError(t, conn.QueryRow(t.Context(), "select pg_current_wal_flush_lsn()::text").Scan(&flushed))
		least, err := cdc.ParseLSN(before)
		require.NoError(t, err)
		most, err := cdc.ParseLSN(flushed)
		require.NoError(t, err)
		require.Greater(t, proof, least)
		require.LessOrEqual(t, proof, most, "an idle server never sends more")
	}
	// Where a commit ends with its page, the next record's place is behind that page's header.
	for n := range 3000 {
		proof, err := b.SaveCheckpoint(t.Context(), outbox.Checkpoint{LSN: cdc.LSN(200 + n)})
		require.NoError(t, err)
		const page, header = 8192, 24
		require.NotEqualValues(t, header, proof%page, "an idle server never sends so far")
	}
}

// docs/faults.md 3.2: what is recorded had ended below the checkpoint, also while others run on.
func TestSnapshotIsOlderThanItsCheckpoint(t *testing.T) {
	b := setup(t)
	xmin := func() uint64 { return b.saved().SnapXmin }
	save := b.save
	conn, err := pgx.Connect(t.Context(), b.url)
	require.NoError(t, err)
	defer conn.Close(context.Background())
	tx, err := conn.Begin(t.Context())
	require.NoError(t, err)
	var open uint64
	require.NoError(t, tx.QueryRow(t.Context(), "select pg_current_xact_id()::text::numeric").Scan(&open))

	end := save(100) // takes the first sample
	require.Zero(t, xmin())
	save(101)
	require.Zero(t, xmin(), "the sample's position is not settled yet")
	end = save(end + 1<<20)
	first := xmin()
	require.NotZero(t, first)
	require.LessOrEqual(t, first, open, "the open transaction had not ended")
	require.NoError(t, tx.Commit(t.Context()))
	end = save(end + 1<<20)
	save(end + 1<<20)
	require.Greater(t, xmin(), open)

	_, err = b.Claim(t.Context(), b.holder(1))
	require.NoError(t, err)
	last := xmin()
	save(end + 1<<30)
	require.Equal(t, last, xmin(), "a sample of the claim before says nothing")
}

// Rows that are there, or come meanwhile, stay as they are.
func TestCopyMeetsWhatIsThere(t *testing.T) {
	b := setup(t)
	b.copyRows = 1
	require.NoError(t, b.Write(t.Context(), []outbox.Change{park(1), park(2)}))
	b.exec("update walhook.deliveries set attempts = 7")
	b.exec("delete from walhook.events where id = 'evt_2'") // by hand: a delivery is left that nobody looks for

	ctx := t.Context()
	tx, err := b.pool.Begin(ctx)
	require.NoError(t, err)
	defer func() { _ = tx.Rollback(context.Background()) }()
	require.NoError(t, send(ctx, tx, insertSteps([]outbox.Change{park(3)}, false)))

	other := outboxtest.Park("b", outboxtest.Event(1, ""))
	again := make(chan error, 1)
	go func() { again <- b.Write(ctx, []outbox.Change{park(4), park(3), park(2), park(1), other}) }()
	b.awaitLockWait()
	require.NoError(t, tx.Commit(ctx))
	require.NoError(t, <-again)

	require.Equal(t, 4, b.count("events"))
	require.Equal(t, 5, b.count("deliveries"))
	require.Equal(t, 2, b.count("deliveries where attempts = 7"))
}

// One endpoint gets rid of an event in the moment in which another needs it.
func TestEventSurvivesWhileOthersWrite(t *testing.T) { eachWay(t, eventSurvives) }

func eventSurvives(t *testing.T, b *bundle) {
	t.Helper()
	const endpoints, rounds, events = 4, 60, 5
	var group sync.WaitGroup
	for e := range endpoints {
		group.Go(func() {
			name := "endpoint " + strconv.Itoa(e)
			for range rounds {
				var in, out []outbox.Change
				for n := range events {
					c := outboxtest.Park(name, outboxtest.Event(n, ""))
					in = append(in, c)
					c.State, c.Insert = outbox.StateGone, false
					out = append(out, c)
				}
				if err := b.Write(t.Context(), in); err != nil {
					t.Error(err)
				}
				rows, _, err := b.Scan(t.Context(), name, cdc.Position{}, nil, 100, 1<<20)
				if err != nil || len(rows) != events {
					t.Errorf("%d of %d parked deliveries have their event: %v", len(rows), events, err)
				}
				if err := b.Write(t.Context(), out); err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	require.Zero(t, b.count("deliveries"))
	require.Zero(t, b.count("events"), "whoever was last removed it")
}

// Two writes that lock the same events in opposite order: Postgres ends one, which is begun again.
func TestDeadlockIsTriedAgain(t *testing.T) { eachWay(t, deadlockIsTriedAgain) }

func deadlockIsTriedAgain(t *testing.T, b *bundle) {
	t.Helper()
	both := func(endpoint string, in, out int) []outbox.Change {
		return []outbox.Change{
			outboxtest.Park(endpoint, outboxtest.Event(in, "")),
			outboxtest.Move(endpoint, outboxtest.Event(out, ""), outbox.StateGone),
		}
	}
	require.NoError(t, b.Write(t.Context(), []outbox.Change{
		outboxtest.Park("a", outboxtest.Event(1, "")), outboxtest.Park("b", outboxtest.Event(2, "")),
		outboxtest.Park("c", outboxtest.Event(1, "")), outboxtest.Park("c", outboxtest.Event(2, "")),
	}))
	// We hold event 2 and then want event 1, as b's write holds 1 and wants 2.
	tx, err := b.pool.Begin(t.Context())
	require.NoError(t, err)
	defer func() { _ = tx.Rollback(context.Background()) }()
	_, err = tx.Exec(t.Context(), "set local deadlock_timeout = '1h'")
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), lockEvents, []string{"evt_2"})
	require.NoError(t, err)
	done := make(chan error, 1)
	go func() { done <- b.Write(t.Context(), both("b", 1, 2)) }()
	b.awaitLockWait()
	_, err = tx.Exec(t.Context(), lockEvents, []string{"evt_1"})
	require.NoError(t, err, "the other was ended")
	// What it had seen of event 1 is no longer so.
	for _, sql := range []string{"delete from walhook.deliveries where event_id = 'evt_1'", "delete from walhook.events where id = 'evt_1'"} {
		_, err = tx.Exec(t.Context(), sql)
		require.NoError(t, err)
	}
	require.NoError(t, tx.Commit(t.Context()))
	require.NoError(t, <-done)
	rows, _, err := b.Scan(t.Context(), "b", cdc.Position{}, nil, 10, 1000)
	require.NoError(t, err)
	require.Len(t, rows, 1)
	require.Equal(t, "evt_1", rows[0].Event.ID)
}

// docs/faults.md 77: it fails as long as the table cannot be written, and goes on afterwards.
func TestFailedWriteCanBeDoneAgain(t *testing.T) {
	b := setup(t)
	b.exec("alter table walhook.deliveries rename to away")
	err := b.Write(t.Context(), []outbox.Change{park(1)})
	var refused *pgconn.PgError
	require.ErrorAs(t, err, &refused)
	require.Equal(t, "42P01", refused.Code)
	require.ErrorContains(t, err, "write deliveries: ")
	require.Zero(t, b.count("events"), "all or nothing")
	b.exec("alter table walhook.away rename to deliveries")
	require.NoError(t, b.Write(t.Context(), []outbox.Change{park(1)}))
	require.NoError(t, b.Write(t.Context(), []outbox.Change{park(1)}), "as after an answer that was lost")
	require.Equal(t, 1, b.count("deliveries"))

	b.exec("alter table walhook.deliveries add constraint no_two check (event_id <> 'evt_2')")
	for rows, how := range map[int]string{2: "copy", 3: "insert"} {
		b.copyRows = rows
		require.ErrorContains(t, b.Write(t.Context(), []outbox.Change{park(3), park(2)}), "write deliveries: "+how+" deliveries: ")
		require.Equal(t, 1, b.count("deliveries"))
		require.Equal(t, 1, b.count("events"))
	}
	require.EqualValues(t, 1, b.pool.Stat().TotalConns(), "the connection is kept")
}

func TestCutConnectionsAreReplaced(t *testing.T) {
	b := setup(t)
	require.NoError(t, b.Write(t.Context(), []outbox.Change{park(1)}))
	b.exec("select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and application_name = 'walhook'")
	// The first call may meet a connection that is dead already; the next one has a new one.
	if err := b.Write(t.Context(), []outbox.Change{park(2)}); err != nil {
		require.NoError(t, b.Write(t.Context(), []outbox.Change{park(2)}))
	}
	require.Equal(t, 2, b.count("deliveries"))
}

func TestBuryTakesMoreThanABatch(t *testing.T) {
	b := setup(t)
	var changes []outbox.Change
	for n := range buryBatch + 7 {
		c := park(n)
		c.Event.Position.Commit = 77 // many share one position
		c.Event.Position.Ordinal = uint64(n / 5)
		changes = append(changes, c)
	}
	require.NoError(t, b.Write(t.Context(), changes))
	n, err := b.Bury(t.Context(), "a", outbox.ReasonRemoved)
	require.NoError(t, err)
	require.EqualValues(t, len(changes), n)
	all, err := b.Backlogs(t.Context())
	require.NoError(t, err)
	require.Equal(t, []outbox.Backlog{{EndpointID: "a", Dead: int64(len(changes))}}, all)
}

func TestGCRemovesWhatHandsLeftBehind(t *testing.T) {
	b := setup(t)
	var changes []outbox.Change
	for n := range 2*gcBatch + 300 {
		changes = append(changes, park(n))
	}
	require.NoError(t, b.Write(t.Context(), changes))
	n, err := b.GC(t.Context())
	require.NoError(t, err)
	require.Zero(t, n)
	b.exec("delete from walhook.deliveries where ordinal <> 4")
	n, err = b.GC(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, len(changes)*9/10, n)
	require.Equal(t, b.count("deliveries"), b.count("events"))
	n, err = b.GC(t.Context())
	require.NoError(t, err)
	require.Zero(t, n)
}

// An event that was deleted by hand must not stop what is behind it.
func TestDeliveryWithoutEventIsPassedOver(t *testing.T) {
	b := setup(t)
	require.NoError(t, b.Write(t.Context(), []outbox.Change{park(1), park(2), park(3)}))
	b.exec("delete from walhook.events where id in ('evt_1', 'evt_2')")
	rows, more, err := b.Scan(t.Context(), "a", cdc.Position{}, nil, 1, 1000)
	require.NoError(t, err)
	require.False(t, more)
	require.Equal(t, "evt_3", rows[0].Event.ID)
}

func TestEndpointStatesOutliveRestarts(t *testing.T) {
	b := setup(t)
	since := time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)
	want := []EndpointState{
		{"a", outbox.Disabled, "answered 410", since},
		{"b", outbox.Paused, "", since},
	}
	for _, e := range []EndpointState{want[1], {"a", outbox.Paused, "x\x00", time.Now()}, want[0], {"c", outbox.Disabled, "", since}} {
		require.NoError(t, b.SaveEndpointState(t.Context(), e))
	}
	require.NoError(t, b.DeleteEndpointState(t.Context(), "c"))
	require.NoError(t, b.DeleteEndpointState(t.Context(), "never was"))
	got, err := open(t, b.url, "walhook", "default").LoadEndpointStates(t.Context())
	require.NoError(t, err)
	require.Equal(t, want, got)
}

func TestInstancesThatStartAtOnceMigrateOnce(t *testing.T) {
	address := pgtest.DB(t)
	var group sync.WaitGroup
	for range 5 {
		s := open(t, address, "walhook", "default")
		group.Go(func() {
			if err := s.Migrate(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	b := empty(t, address)
	require.Equal(t, SchemaVersion(), b.count("schema_migrations"))
}

func TestNewerSchemaIsRefused(t *testing.T) {
	b := setup(t)
	b.exec("insert into walhook.schema_migrations values (4711)")
	err := b.Migrate(t.Context())
	require.ErrorIs(t, err, ErrNewerSchema)
	require.ErrorContains(t, err, "version 4711, this program at "+strconv.Itoa(SchemaVersion()))
}

// A DBA runs the SQL; the role that walhook runs as may create nothing.
func TestRoleThatOwnsNothingCanWork(t *testing.T) {
	b := empty(t, pgtest.DB(t))
	role := fmt.Sprintf("walhook \"test\" %d", os.Getpid())
	quoted := pgx.Identifier{role}.Sanitize()
	b.exec("create role " + quoted + " login")
	t.Cleanup(func() {
		b.exec("drop owned by " + quoted)
		b.exec("drop role " + quoted)
	})
	address, err := url.Parse(b.url)
	require.NoError(t, err)
	address.User = url.User(role)
	s := open(t, address.String(), "walhook", "default")
	require.ErrorContains(t, s.Migrate(t.Context()), "migrate schema walhook: create schema: ERROR: permission denied")

	b.exec(SetupSQL())
	b.exec(SetupSQL()) // does nothing more
	b.exec(GrantSQL(role))
	require.NoError(t, s.Migrate(t.Context()))
	_, err = s.Claim(t.Context(), b.holder(1))
	require.NoError(t, err)
	c := park(1)
	require.NoError(t, s.Write(t.Context(), []outbox.Change{c}))
	c.Insert, c.State = false, outbox.StateDead
	require.NoError(t, s.Write(t.Context(), []outbox.Change{c}))
	require.NoError(t, s.Write(t.Context(), []outbox.Change{gone(1)}))
	_, err = s.Bury(t.Context(), "a", outbox.ReasonRemoved)
	require.NoError(t, err)
	_, err = s.Backlogs(t.Context())
	require.NoError(t, err)
	_, err = s.SaveCheckpoint(t.Context(), outbox.Checkpoint{LSN: 2})
	require.NoError(t, err)
	_, err = s.GC(t.Context())
	require.NoError(t, err)
	require.NoError(t, s.SaveEndpointState(t.Context(), EndpointState{EndpointID: "a", Since: time.Now()}))
}

// A DBA made the schema for the role, and nothing in it.
func TestSchemaWithoutTablesIsFilled(t *testing.T) {
	b := empty(t, pgtest.DB(t))
	role := "walhook_test_owner_" + strconv.Itoa(os.Getpid())
	b.exec("create role " + role + " login; create schema walhook authorization " + role)
	t.Cleanup(func() {
		b.exec("drop owned by " + role + "; drop role " + role)
	})
	address, err := url.Parse(b.url)
	require.NoError(t, err)
	address.User = url.User(role)
	require.NoError(t, open(t, address.String(), "walhook", "default").Migrate(t.Context()))
}

// describe is the schema as Postgres sees it.
const describe = `
select string_agg(line, e'\n' order by sort, line)
from (
	select c.relname || ' 1 ' || lpad(a.attnum::text, 2) as sort, c.relname || '.' || a.attname || ' ' || format_type(a.atttypid, a.atttypmod)
		|| coalesce(' collate ' || nullif(l.collname, 'default'), '') || case when a.attnotnull then ' not null' else '' end
		|| coalesce(' default ' || pg_get_expr(d.adbin, d.adrelid), '') || case a.attidentity when 'd' then ' identity' else '' end as line
	from pg_class c
	join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
	left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
	left join pg_collation l on l.oid = a.attcollation
	where c.relnamespace = 'walhook'::regnamespace and c.relkind = 'r'
	union all
	select r.relname || ' 2', r.relname || ': ' || pg_get_constraintdef(o.oid)
	from pg_constraint o join pg_class r on r.oid = o.conrelid
	where o.connamespace = 'walhook'::regnamespace and o.contype in ('p', 'u', 'c', 'f')
	union all
	select r.relname || ' 3', pg_get_indexdef(i.indexrelid)
	from pg_index i join pg_class r on r.oid = i.indrelid
	where r.relnamespace = 'walhook'::regnamespace
	union all
	select relname || ' 4', relname || ' with (' || array_to_string(reloptions, ', ') || ')'
	from pg_class where relnamespace = 'walhook'::regnamespace and relkind = 'r' and reloptions is not null
	union all
	select '~', pg_get_functiondef(oid) from pg_proc where pronamespace = 'walhook'::regnamespace
) lines`

func TestSchemaIsTheGoldenOne(t *testing.T) {
	b := setup(t)
	var got string
	b.query(describe, &got)
	golden := filepath.Join("testdata", "schema.golden")
	if *update {
		require.NoError(t, os.MkdirAll("testdata", 0o755))
		require.NoError(t, os.WriteFile(golden, []byte(got+"\n"), 0o644))
	}
	want, err := os.ReadFile(golden)
	require.NoError(t, err)
	require.Equal(t, string(want), got+"\n", "go test -run TestSchemaIsTheGoldenOne -update rewrites it")

	other := empty(t, pgtest.DB(t))
	other.exec(SetupSQL())
	var setup string
	other.query(describe, &setup)
	require.Equal(t, got, setup, "what a DBA runs makes the same")
}
