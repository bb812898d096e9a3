package cdc

import (
	"context"
	"errors"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

// found is the lab's outbox as a survey sees it.
func (l *lab) found(cfg *Config) *Found {
	l.t.Helper()
	sv, err := Inspect(l.t.Context(), cfg)
	require.NoError(l.t, err)
	return &sv.Tables[0]
}

func TestReadTableReadsWhatMeetsAllConditionsInOrder(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.exec("alter table outbox add column at timestamp default '2026-01-01'")
	l.exec("insert into outbox (id, note, at) select i, 'n' || i % 3, timestamp '2026-01-01' + i * interval '1 s' from generate_series(350, 1, -1) i")
	l.exec("insert into outbox (id, note, at) values (1000, 'n0', null)")
	cfg := l.config()
	var ids []string
	var total int64
	read := func(conditions ...Condition) {
		t.Helper()
		ids = nil
		require.NoError(t, ReadTable(t.Context(), &cfg, l.found(&cfg), conditions, []string{"id"}, func(n int64) { total = n }, func(r *Row) error {
			ids = append(ids, string(r.Values[0]))
			return nil
		}))
		require.EqualValues(t, len(ids), total)
	}
	read()
	require.Len(t, ids, 351)
	require.Equal(t, "1", ids[0])
	require.Equal(t, "1000", ids[350])

	read(Condition{Column: "at", Is: From, Values: []string{"2026-01-01T00:01:00Z"}, Type: AsTime},
		Condition{Column: "at", Is: Before, Values: []string{"2026-01-01T01:01:10+01:00"}, Type: AsTime},
		Condition{Column: "note", Is: Equal, Values: []string{"n1", "'; drop table outbox; --"}, Type: AsText})
	require.Equal(t, []string{"61", "64", "67"}, ids)
	read(Condition{Column: "id", Is: Equal, Values: []string{"7", "1000"}, Type: AsInteger})
	require.Equal(t, []string{"7", "1000"}, ids)

	full := errors.New("full")
	require.ErrorIs(t, ReadTable(t.Context(), &cfg, l.found(&cfg), nil, nil, func(int64) {}, func(*Row) error { return full }), full)
}

func TestReadTableKeepsNoTransactionOpen(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.exec("insert into outbox (note) select 'x' from generate_series(1, 250)")
	cfg := l.config()
	n := 0
	require.NoError(t, ReadTable(t.Context(), &cfg, l.found(&cfg), nil, nil, func(int64) {}, func(*Row) error {
		if n++; n == 150 {
			require.Equal(t, "0", l.value("select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() and (state <> 'idle' or backend_xmin is not null) and backend_type = 'client backend'"))
		}
		return nil
	}))
	require.Equal(t, 250, n)
}

// tailing is a Tail under way.
type tailing struct {
	rows chan string
	done chan error
	stop context.CancelFunc
}

func (l *lab) tail(cfg Config) *tailing {
	l.t.Helper()
	ctx, stop := context.WithCancel(l.t.Context())
	x := &tailing{rows: make(chan string, 100), done: make(chan error, 1), stop: stop}
	begun := make(chan struct{})
	var once sync.Once
	go func() {
		x.done <- Tail(ctx, cfg, func([]Found) error { return nil }, func(LSN) { once.Do(func() { close(begun) }) }, func(r *Row) error {
			x.rows <- string(r.Values[1])
			return nil
		})
	}()
	l.t.Cleanup(stop)
	select {
	case <-begun:
	case err := <-x.done:
		require.NoError(l.t, err)
	}
	return x
}

func TestTailSeesWhatCommitsAndLeavesNothing(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	cfg := l.config()
	cfg.Logger = zap.NewNop()
	l.exec("create publication " + quoteName(cfg.Publication) + " for table outbox")
	slots := "select count(*) from pg_replication_slots where database = current_database()"
	l.insert("before")
	x := l.tail(cfg)
	require.Equal(t, "1", l.value(slots+" and temporary and slot_name like 'walhook\\_tail\\_%'"))
	for i := range 20 {
		l.insert(strconv.Itoa(i))
	}
	for i := range 20 {
		require.Equal(t, strconv.Itoa(i), <-x.rows)
	}
	l.insert("last")
	require.Equal(t, "last", <-x.rows)
	x.stop()
	require.NoError(t, <-x.done)
	require.Eventually(t, func() bool { return l.value(slots) == "0" }, testPatience, 10*time.Millisecond)
}

func TestTailNeedsAPublicationWithItsTables(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	cfg := l.config()
	cfg.Logger = zap.NewNop()
	err := Tail(t.Context(), cfg, func([]Found) error { return nil }, func(LSN) {}, func(*Row) error { return nil })
	var f *Fault
	require.ErrorAs(t, err, &f)
	require.Contains(t, f.Reason, "does not exist")
	l.exec("create publication " + quoteName(cfg.Publication))
	err = Tail(t.Context(), cfg, func([]Found) error { return nil }, func(LSN) {}, func(*Row) error { return nil })
	require.ErrorAs(t, err, &f)
	require.Contains(t, f.Reason, `lacks "public"."outbox"`)
	require.Equal(t, "0", l.value("select count(*) from pg_replication_slots where database = current_database()"))
}

func TestTailEndsWithWhatItsReaderSays(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	cfg := l.config()
	cfg.Logger = zap.NewNop()
	l.exec("create publication " + quoteName(cfg.Publication) + " for table outbox")
	full := errors.New("full")
	refuse := func([]Found) error { return full }
	require.ErrorIs(t, Tail(t.Context(), cfg, refuse, func(LSN) {}, func(*Row) error { return nil }), full)
	begun := func(LSN) { l.insert("x") }
	require.ErrorIs(t, Tail(t.Context(), cfg, func([]Found) error { return nil }, begun, func(*Row) error { return full }), full)
}

func TestNotificationsReachTheHolderOfTheSlot(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	heard := make(chan struct{}, 100)
	r := l.run(&sink{}, func(s *Stream) {
		s.cfg.Channel, s.cfg.Notified = "Some Channel", func() { heard <- struct{}{} }
	})
	r.untilState(Streaming)
	<-heard // the beginning
	l.exec(`notify "Some Channel"`)
	<-heard
	l.exec(`notify "Some Channel", 'again'`)
	<-heard
}
