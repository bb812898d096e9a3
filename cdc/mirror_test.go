package cdc

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// mirror has the stream of a lab mirror a table.
func (l *lab) mirror() func(*Stream) {
	l.t.Helper()
	return func(s *Stream) {
		s.cfg.Mirror = Mirror{Table: Table{Schema: "public", Name: "registry"}, Publication: "m_" + l.slot}
	}
}

func (l *lab) registry() {
	l.t.Helper()
	l.exec("create table registry (id text primary key, note text); alter table registry replica identity full")
}

// ops are the changes of the mirrored table that came, and the rows of the others.
func (s *sink) ops() (all []string) {
	for _, g := range s.all() {
		word := []string{"insert", "update", "delete", "truncate"}[g.op]
		all = append(all, strings.TrimSpace(fmt.Sprint(strings.TrimPrefix(g.table, "public."), " ", word, " ", strings.Join(g.old, ","), "→", strings.Join(g.values, ","))))
	}
	return all
}

// mirrored are the rows that each session began with, and whether changes came; "-" where it had them from before.
func (s *sink) begun() (all []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, session := range s.sessions {
		if session.Mirror == nil {
			all = append(all, "-")
			continue
		}
		text := fmt.Sprint(session.Mirror.Live)
		for _, r := range session.Mirror.Rows {
			text += " " + string(r.Values[0])
		}
		all = append(all, text)
	}
	return all
}

func TestMirroredTableComesWithEveryChange(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.registry()
	l.exec("insert into registry values ('before', 'x')")
	s := &sink{confirms: true}
	r := l.run(s, l.mirror())
	r.untilState(Streaming)
	large := strings.Repeat("0123456789", 2000)
	l.exec("alter table registry alter note set storage external")
	l.insert("one")
	l.exec("begin; insert into registry values ('a', 'x'); insert into outbox (note) values ('two'); update registry set note = '" + large + "' where id = 'a'; commit")
	l.exec("update registry set id = 'b' where id = 'a'")
	l.exec("update outbox set note = 'unseen'; delete from outbox")
	l.exec("delete from registry where id = 'b'; truncate registry")
	r.untilRows(7)
	require.Equal(t, []string{
		"outbox insert →1,one", "registry insert →a,x", "outbox insert →2,two", "registry update a,x→a," + large,
		"registry update a," + large + "→b," + large, "registry delete b," + large + "→", "registry truncate →",
	}, s.ops())
	require.Equal(t, []string{"true before"}, s.begun())
	requireInOrder(t, s.all())
}

func TestNewSlotBeginsWithTheMirroredTableOfItsSnapshot(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.registry()
	l.exec("insert into registry values ('before', 'x')")
	open := l.session()
	tx, err := open.Begin(t.Context())
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), "insert into registry values ('open', 'x')")
	require.NoError(t, err)
	s := &sink{confirms: true}
	r := l.run(s, l.mirror())
	r.untilReason("waits for the write transaction")
	require.NoError(t, tx.Commit(t.Context()))
	r.untilState(Streaming)
	l.exec("insert into registry values ('after', 'x')")
	r.untilRows(1)
	require.Equal(t, []string{"true before open"}, s.begun())
	require.Equal(t, []string{"registry insert →after,x"}, s.ops())
}

// whole tells whether the last transaction has ended.
func (s *sink) whole() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.open
}

// The slot's WAL is from before the publication, which Postgres refuses to read with it: the stream goes
// on without the changes until its checkpoint is behind.
func TestSlotOlderThanThePublicationOfTheMirroredTable(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.registry()
	s := &sink{confirms: true}
	r := l.run(s)
	r.untilState(Streaming)
	l.insert("one")
	r.untilRows(1)
	r.until("its transaction ends", s.whole)
	r.halt()
	l.insert("two")
	l.exec("insert into registry values ('before', 'x')")
	r = l.run(s, l.mirror())
	r.until("the second row", func() bool { return strings.Contains(strings.Join(s.ops(), " "), "two") })
	r.until("the changes come", func() bool { return strings.HasPrefix(s.begun()[len(s.begun())-1], "true") })
	l.exec("insert into registry values ('after', 'x')")
	r.until("a change", func() bool { return strings.Contains(strings.Join(s.ops(), " "), "after") })
	require.NotContains(t, strings.Join(s.ops(), " "), "before", "it was read with the table")
	r.until("its transaction ends", s.whole)
	r.halt()
	r = l.run(s, l.mirror())
	l.exec("insert into registry values ('later', 'x')")
	r.until("another change", func() bool { return strings.Contains(strings.Join(s.ops(), " "), "later") })
	require.Equal(t, "-", s.begun()[len(s.begun())-1])
}

func TestDroppedPublicationOfTheMirroredTableStopsNothing(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.registry()
	s := &sink{confirms: true}
	r := l.run(s, l.mirror())
	r.untilState(Streaming)
	l.insert("one")
	r.untilRows(1)
	l.exec("drop publication " + quoteName("m_"+l.slot))
	l.exec("insert into registry values ('meanwhile', 'x')")
	l.insert("two")
	r.until("the second row", func() bool { return strings.Contains(strings.Join(s.ops(), " "), "two") })
	r.until("the changes come again", func() bool { return strings.HasPrefix(s.begun()[len(s.begun())-1], "true meanwhile") })
	l.exec("insert into registry values ('after', 'x')")
	r.until("a change", func() bool { return strings.Contains(strings.Join(s.ops(), " "), "after") })
	require.Empty(t, s.gap)
}
