package cdc

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc/pgtest"
)

// pair is a primary with a standby set up by the book for failover slots, and a lab at both.
func pair(t *testing.T) (primary, standby *pgtest.Server, l *lab) {
	t.Helper()
	primary = pgtest.New(t, pgtest.Config{})
	if v, err := primary.Version(t.Context()); err != nil || v < failoverVersion {
		require.NoError(t, err)
		t.Skip("slots survive a failover from Postgres 17 on")
	}
	standby, err := primary.FailoverStandby(t.Context(), pgtest.Config{})
	require.NoError(t, err)
	t.Cleanup(func() { _ = standby.Close() })
	l = labAt(t, primary.URL())
	l.url = fmt.Sprintf("postgres://postgres@127.0.0.1:%d,127.0.0.1:%d/postgres?sslmode=disable", primary.Port(), standby.Port())
	return primary, standby, l
}

// said are the texts of what check would print under the topic failover; well tells whether all is.
func (l *lab) said() (texts []string, well bool) {
	l.t.Helper()
	cfg := l.config()
	cfg.Failover = true
	sv, err := Examine(l.t.Context(), &cfg)
	require.NoError(l.t, err)
	well = true
	for _, f := range sv.Findings(&cfg) {
		if f.Topic == "failover" {
			texts = append(texts, f.Text+" "+f.Warn)
			well = well && f.Warn == ""
		}
	}
	return texts, well
}

func TestCheckTellsWhetherAStandbyIsReady(t *testing.T) {
	t.Parallel()
	primary, standby, l := pair(t)
	s := &sink{confirms: true}
	r := l.run(s, func(s *Stream) { s.cfg.Failover = true })
	r.untilState(Streaming)
	r.until("the standby's copy of the slot to last", func() bool {
		l.exec(`select pg_log_standby_snapshot()`) // its copy lasts when the slot has moved behind one
		l.insert("row")
		ready, err := standby.FailoverReady(t.Context(), l.slot)
		require.NoError(t, err)
		return ready
	})
	texts, well := l.said()
	require.True(t, well, "%v", texts)
	require.Contains(t, texts[0], "is ready to take slot")

	require.NoError(t, standby.Set(t.Context(), map[string]string{"sync_replication_slots": "off"}))
	texts, well = l.said()
	require.False(t, well)
	require.Contains(t, texts[0], "sync_replication_slots = on")

	require.NoError(t, primary.Set(t.Context(), map[string]string{"synchronized_standby_slots": ""}))
	texts, _ = l.said()
	require.Contains(t, fmt.Sprint(texts), "synchronized_standby_slots is empty")
}

// What is said of a standby is what sets it right: run there as it stands, it is not said again.
func TestWhatCheckSaysSetsAStandbyRight(t *testing.T) {
	t.Parallel()
	primary, standby, l := pair(t)
	conninfo := func(database string) map[string]string {
		return map[string]string{"primary_conninfo": fmt.Sprintf("host=127.0.0.1 port=%d user=postgres application_name=standby_1%s", primary.Port(), database)}
	}
	for _, c := range []struct {
		wrong map[string]string
		says  string
	}{
		{map[string]string{"hot_standby_feedback": "off"}, "there: alter system set hot_standby_feedback = on; select pg_reload_conf()"},
		{map[string]string{"sync_replication_slots": "off"}, "there: alter system set sync_replication_slots = on; select pg_reload_conf()"},
	} {
		require.NoError(t, standby.Set(t.Context(), c.wrong))
		texts, _ := l.said()
		require.Contains(t, texts[0], c.says)
		set, _, _ := strings.Cut(strings.TrimPrefix(c.says, "there: "), ";")
		pgtest.Exec(t, standby.URL(), set)
		require.NoError(t, standby.Reload(t.Context()))
		texts, _ = l.said()
		require.NotContains(t, texts[0], c.says)
	}
	require.NoError(t, standby.Set(t.Context(), conninfo("")))
	texts, _ := l.said()
	require.Contains(t, texts[0], "there: alter system set primary_conninfo = '<as it is> dbname=postgres'")
	require.NoError(t, standby.Set(t.Context(), conninfo(" dbname=postgres")))
	texts, _ = l.said()
	require.NotContains(t, texts[0], "primary_conninfo = ")

	require.NoError(t, primary.Set(t.Context(), map[string]string{"synchronized_standby_slots": ""}))
	texts, _ = l.said()
	const says = "on the primary: alter system set synchronized_standby_slots = 'standby_1'; select pg_reload_conf()"
	require.Contains(t, fmt.Sprint(texts), says)
	pgtest.Exec(t, primary.URL(), "alter system set synchronized_standby_slots = 'standby_1'")
	require.NoError(t, primary.Reload(t.Context()))
	texts, _ = l.said()
	require.NotContains(t, fmt.Sprint(texts), says)
}

// A walsender that waits for a standby looks like an idle one.
func TestTheWaitForAStandbyIsAReasonOfItsOwn(t *testing.T) {
	t.Parallel()
	_, standby, l := pair(t)
	s := &sink{confirms: true}
	r := l.run(s, func(s *Stream) { s.cfg.Failover, s.limits.survey = true, 50*time.Millisecond })
	r.untilState(Streaming)
	l.insert("one")
	r.untilRows(1)
	require.NoError(t, standby.Stop(t.Context(), pgtest.Fast))
	l.insert("two")
	f := r.untilReason("until the standbys of synchronized_standby_slots")
	require.Equal(t, Waiting, f.State)
	require.NotEmpty(t, f.Remedy)
	texts, _ := l.said()
	require.Contains(t, fmt.Sprint(texts), "no standby is attached to slot")
	require.Equal(t, 1, s.count())
	require.NoError(t, standby.Start(t.Context()))
	r.untilRows(2)
	r.untilState(Streaming)
	require.Equal(t, 1, s.sessionCount(), "the connection was kept")
}

func TestASlotFromBeforeIsMadeOneThatStandbysTakeOver(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.exec(`create publication ` + quoteName("p_"+l.slot) + ` for table outbox`)
	l.exec(`select pg_create_logical_replication_slot($1, 'pgoutput')`, l.slot)
	r := l.run(&sink{}, func(s *Stream) { s.cfg.Failover = true })
	r.untilState(Streaming)
	if r.Status().Survey.Version < failoverVersion {
		t.Skip("slots survive a failover from Postgres 17 on")
	}
	require.Equal(t, "true", l.value(`select failover from pg_replication_slots where slot_name = $1`, l.slot))
}
