package outboxtest

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
)

const (
	manyRows  = 1000
	manyBytes = int64(1 << 40)
)

// noon is a time that any store keeps exactly.
var noon = time.Date(2026, 2, 3, 12, 0, 0, 123456000, time.UTC)

// Event is one that can be stored: the n-th row of a WAL, with a few bytes of JSON.
func Event(n int, key string) *outbox.Event {
	return &outbox.Event{
		ID:       "evt_" + strconv.Itoa(n),
		Type:     "order.created",
		Key:      key,
		Time:     noon.Add(time.Duration(n) * time.Second),
		Data:     []byte(`{"n": ` + strconv.Itoa(n) + `}`),
		JSON:     true,
		Position: cdc.Position{Commit: 1<<32 + cdc.LSN(n/10)*64, Ordinal: uint64(n%10) + 1},
		Commit:   noon,
	}
}

// Park is the change that parks a new delivery to wait for its turn.
func Park(endpoint string, e *outbox.Event) outbox.Change {
	return outbox.Change{EndpointID: endpoint, Event: e, OrderKey: e.Key, Insert: true, State: outbox.StateParked, Reason: outbox.ReasonBreakerOpen}
}

// Move is the change of a stored delivery to a state.
func Move(endpoint string, e *outbox.Event, state outbox.State) outbox.Change {
	return outbox.Change{EndpointID: endpoint, Event: e, OrderKey: e.Key, State: state}
}

// Suite tests the promises of an outbox.Store. open gives an empty one whose slot is held.
func Suite(t *testing.T, open func(t *testing.T) outbox.Store) {
	for _, c := range []struct {
		name string
		test func(*testing.T, outbox.Store)
	}{
		{"WhatGoesInComesOut", whatGoesInComesOut},
		{"HostileTextIsStored", hostileTextIsStored},
		{"LongKeysAreKeys", longKeysAreKeys},
		{"AFullWriteIsReadBack", aFullWriteIsReadBack},
		{"InsertAgainChangesNothing", insertAgainChangesNothing},
		{"UpdateOfNoRowMakesNone", updateOfNoRowMakesNone},
		{"OnlyParkedIsScanned", onlyParkedIsScanned},
		{"AnEventStaysForItsLastDelivery", anEventStaysForItsLastDelivery},
		{"GoneAtOnceIsGone", goneAtOnceIsGone},
		{"ScanIsInCommitOrder", scanIsInCommitOrder},
		{"ScanGoesOnBehind", scanGoesOnBehind},
		{"ScanLeavesKeysOut", scanLeavesKeysOut},
		{"ScanStopsAtItsBytes", scanStopsAtItsBytes},
		{"ScanKeySeesItsKeyAlone", scanKeySeesItsKeyAlone},
		{"DueNamesKeysOnceAndLooseThemselves", dueNamesKeysOnceAndLooseThemselves},
		{"DueTellsWhenTheNextIs", dueTellsWhenTheNextIs},
		{"DueStopsAtItsLimit", dueStopsAtItsLimit},
		{"OneKeyHidesNoOther", oneKeyHidesNoOther},
		{"BacklogsCount", backlogsCount},
		{"BuryEndsWhatIsParked", buryEndsWhatIsParked},
		{"ProofGrows", proofGrows},
		{"EndedContextWritesNothing", endedContextWritesNothing},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, open(t)) })
	}
	t.Run("BehavesAsTheStoreInMemory", func(t *testing.T) { behavesAsTheStoreInMemory(t, open(t)) })
}

func write(t testing.TB, s outbox.Store, changes ...outbox.Change) {
	t.Helper()
	require.NoError(t, s.Write(t.Context(), changes))
}

func scan(t testing.TB, s outbox.Store, endpoint string) []outbox.Stored {
	t.Helper()
	rows, more, err := s.Scan(t.Context(), endpoint, cdc.Position{}, nil, manyRows, manyBytes)
	require.NoError(t, err)
	require.False(t, more)
	return rows
}

func ids(rows []outbox.Stored) []string {
	names := []string{}
	for _, r := range rows {
		names = append(names, r.Event.ID)
	}
	return names
}

func whatGoesInComesOut(t *testing.T, s outbox.Store) {
	payloads := [][]byte{
		[]byte(`{"a": 1,  "b":[ ]}`),
		{},
		nil,
		[]byte("null"),
		[]byte(" \t{\"dup\":1,\"dup\":2}\r\n"),
		[]byte(`{"n":1234567890123456789012345678901234567890.00}`),
		[]byte("\x00\x01\x02"),
		[]byte("\xff\xfe not UTF-8"),
		[]byte("snow ☃, emoji 😀, combining é"),
		[]byte(`"\u0000 and \ud800"`),
		[]byte(`\x6162 looks like bytea`),
		bytes.Repeat([]byte("0123456789abcdef"), 20000),
		[]byte(strings.Repeat("[", 20000) + strings.Repeat("]", 20000)),
	}
	headers := [][]byte{
		nil,
		[]byte(`{"traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}`),
		[]byte("{ \"b\" : 1,\n\"a\":2, \"a\":3 }"),
		[]byte(`{"z":"\u0000\ud800"}`),
		[]byte("{\"bad\":\"\xff\"}"),
		[]byte("not json"),
		[]byte("{\"nul\":\"\x00\"}"),
		[]byte(`{"deep":` + strings.Repeat("[", 20000) + strings.Repeat("]", 20000) + `}`),
	}
	var want []*outbox.Event
	var changes []outbox.Change
	for i, data := range payloads {
		for j, h := range headers {
			e := Event(i*len(headers)+j, "ключ "+strconv.Itoa(i))
			e.Data, e.Headers, e.JSON, e.Tenant = data, h, i%2 == 0, "tenant "+strconv.Itoa(j)
			want = append(want, e)
			changes = append(changes, Park("a", e))
		}
	}
	write(t, s, changes...)
	rows := scan(t, s, "a")
	require.Len(t, rows, len(want))
	for i, w := range want {
		got := rows[i].Event
		if !bytes.Equal(w.Data, got.Data) || !bytes.Equal(w.Headers, got.Headers) {
			t.Fatalf("event %d: %.80q with headers %.80q came back as %.80q with %.80q", i, w.Data, w.Headers, got.Data, got.Headers)
		}
		require.Equal(t, len(w.Headers) == 0, got.Headers == nil)
		requireSame(t, w, got)
		require.Equal(t, w.Key, rows[i].OrderKey)
	}

	edge := Event(5000, "")
	edge.Time, edge.Commit = time.Time{}, time.Time{}
	edge.Position = cdc.Position{Commit: math.MaxInt64, Ordinal: math.MaxInt64}
	write(t, s, Park("b", edge))
	requireSame(t, edge, scan(t, s, "b")[0].Event)

	zoned := Event(5001, "")
	zoned.Time = time.Date(2026, 7, 1, 9, 30, 0, 999999999, time.FixedZone("", 19800))
	write(t, s, Park("c", zoned))
	got := scan(t, s, "c")[0].Event.Time
	require.Equal(t, time.UTC, got.Location())
	require.Equal(t, zoned.Time.Truncate(time.Microsecond).UTC(), got)
}

func requireSame(t *testing.T, want, got *outbox.Event) {
	t.Helper()
	require.Equal(t, want.ID, got.ID)
	require.Equal(t, want.Type, got.Type)
	require.Equal(t, want.Key, got.Key)
	require.Equal(t, want.Tenant, got.Tenant)
	require.Equal(t, want.Time, got.Time)
	require.Equal(t, want.JSON, got.JSON)
	require.Equal(t, want.Position, got.Position)
	require.Equal(t, want.Commit, got.Commit)
}

// A batch that cannot be stored would be tried again for ever.
func hostileTextIsStored(t *testing.T, s outbox.Store) {
	var changes []outbox.Change
	for i, bad := range []string{"\x00", "\xff\xfe", "ok\x00\xc3", strings.Repeat("é\xc3", 100000), "\ud7ff\uffff", "'; drop table walhook.events; --"} {
		c := Park("a", Event(i, ""))
		c.Event.Type, c.Event.Tenant, c.Event.Key, c.OrderKey = bad, bad, bad, bad
		c.Detail, c.Status, c.Reason = bad, -1, outbox.Reason(bad)
		changes = append(changes, c)
	}
	write(t, s, changes...)
	require.Len(t, scan(t, s, "a"), len(changes))
	for i := range changes {
		changes[i].Insert, changes[i].State = false, outbox.StateDead
	}
	write(t, s, changes...)
	require.Empty(t, scan(t, s, "a"))
	for i := range changes {
		changes[i].State = outbox.StateGone
	}
	write(t, s, changes...)
	rows, err := s.Backlogs(t.Context())
	require.NoError(t, err)
	require.Empty(t, rows)
}

// An entry of a Postgres index holds 2.7 kB.
func longKeysAreKeys(t *testing.T, s outbox.Store) {
	var long strings.Builder
	for i := range 20000 {
		long.WriteRune(rune('a' + (i*i*7+i*13)%26))
		long.WriteString(strconv.Itoa(i * 7919 % 10007))
	}
	one, other := long.String()+"1", long.String()+"2"
	changes := []outbox.Change{Park("a", Event(1, one)), Park("a", Event(2, other)), Park("a", Event(3, one))}
	for i := range changes {
		changes[i].Due = noon
	}
	write(t, s, changes...)
	rows, _, err := s.ScanKey(t.Context(), "a", one, cdc.Position{}, manyRows, manyBytes)
	require.NoError(t, err)
	require.Equal(t, []string{"evt_1", "evt_3"}, ids(rows))
	require.Equal(t, one, rows[0].OrderKey)
	rows, _, err = s.Scan(t.Context(), "a", cdc.Position{}, []string{one}, manyRows, manyBytes)
	require.NoError(t, err)
	require.Equal(t, []string{"evt_2"}, ids(rows))
	keys, _, _, err := s.Due(t.Context(), "a", noon, 10, manyBytes)
	require.NoError(t, err)
	require.ElementsMatch(t, []string{one, other}, keys)
}

func aFullWriteIsReadBack(t *testing.T, s outbox.Store) {
	var changes []outbox.Change
	for i := range 10000 {
		c := Park("a", Event(i, "k"+strconv.Itoa(i%7)))
		if i%1000 == 0 {
			c.Event.Data = bytes.Repeat([]byte("x"), 1<<20)
		}
		changes = append(changes, c)
	}
	write(t, s, changes...)
	n, after := 0, cdc.Position{}
	for more := true; more; {
		var rows []outbox.Stored
		var err error
		rows, more, err = s.Scan(t.Context(), "a", after, nil, 3000, 4<<20)
		require.NoError(t, err)
		for _, r := range rows {
			require.Equal(t, "evt_"+strconv.Itoa(n), r.Event.ID)
			require.Equal(t, len(changes[n].Event.Data), len(r.Event.Data))
			after = r.Event.Position
			n++
		}
	}
	require.Equal(t, len(changes), n)
	for i := range changes {
		changes[i].Insert, changes[i].State = false, outbox.StateGone
	}
	write(t, s, changes...)
	require.Empty(t, scan(t, s, "a"))
}

// After a crash rows come again that were stored before, as if they were new.
func insertAgainChangesNothing(t *testing.T, s outbox.Store) {
	first := Park("a", Event(1, "k"))
	first.Attempts, first.Due = 3, noon
	dead := Park("a", Event(2, "k"))
	dead.State = outbox.StateDead
	write(t, s, first, dead)

	write(t, s, Park("a", Event(1, "k")), Park("a", Event(2, "k")), Park("b", Event(1, "k")))
	rows := scan(t, s, "a")
	require.Equal(t, []string{"evt_1"}, ids(rows))
	require.Equal(t, 3, rows[0].Attempts)
	require.Equal(t, noon, rows[0].Due)
	require.Equal(t, []string{"evt_1"}, ids(scan(t, s, "b")))
}

func updateOfNoRowMakesNone(t *testing.T, s outbox.Store) {
	write(t, s, Move("a", Event(1, ""), outbox.StateParked), Move("a", Event(2, ""), outbox.StateGone))
	require.Empty(t, scan(t, s, "a"))
}

func onlyParkedIsScanned(t *testing.T, s outbox.Store) {
	parked, sending, dead := Park("a", Event(1, "k")), Park("a", Event(2, "k")), Park("a", Event(3, "k"))
	sending.State, dead.State = outbox.StateSending, outbox.StateDead
	write(t, s, parked, sending, dead)
	require.Equal(t, []string{"evt_1"}, ids(scan(t, s, "a")))

	back := Move("a", sending.Event, outbox.StateParked)
	back.Attempts, back.Due = 2, noon
	write(t, s, back, Move("a", parked.Event, outbox.StateSending), Move("a", dead.Event, outbox.StateParked))
	rows := scan(t, s, "a")
	require.Equal(t, []string{"evt_2", "evt_3"}, ids(rows))
	require.Equal(t, 2, rows[0].Attempts)
	require.Equal(t, noon, rows[0].Due)
	require.Zero(t, rows[1].Due)

	write(t, s, Move("a", Event(2, "k"), outbox.StateDead), Move("a", Event(3, "k"), outbox.StateGone))
	require.Empty(t, scan(t, s, "a"))
}

func anEventStaysForItsLastDelivery(t *testing.T, s outbox.Store) {
	e := Event(1, "")
	write(t, s, Park("a", e), Park("b", e))
	write(t, s, Move("a", e, outbox.StateGone))
	require.Equal(t, e.Data, scan(t, s, "b")[0].Event.Data)
	write(t, s, Move("b", e, outbox.StateGone), Park("c", e))
	require.Equal(t, e.Data, scan(t, s, "c")[0].Event.Data)
	write(t, s, Move("c", e, outbox.StateGone))

	// Nothing is left of it: the same id may come with other content.
	again := Event(1, "")
	again.Data = []byte(`"new"`)
	write(t, s, Park("a", again))
	require.Equal(t, again.Data, scan(t, s, "a")[0].Event.Data)
}

func goneAtOnceIsGone(t *testing.T, s outbox.Store) {
	stored, never := Park("a", Event(1, "")), Park("a", Event(2, ""))
	write(t, s, stored)
	stored.State, never.State = outbox.StateGone, outbox.StateGone
	write(t, s, stored, never)
	require.Empty(t, scan(t, s, "a"))
}

func scanIsInCommitOrder(t *testing.T, s outbox.Store) {
	var changes []outbox.Change
	for _, n := range []int{25, 3, 0, 11, 9, 10, 24, 1, 100, 12} {
		changes = append(changes, Park("a", Event(n, "k"+strconv.Itoa(n%3))))
	}
	write(t, s, changes[:4]...)
	write(t, s, changes[4:]...)
	want := []string{"evt_0", "evt_1", "evt_3", "evt_9", "evt_10", "evt_11", "evt_12", "evt_24", "evt_25", "evt_100"}
	require.Equal(t, want, ids(scan(t, s, "a")))
	require.Empty(t, scan(t, s, "b"))
}

func scanGoesOnBehind(t *testing.T, s outbox.Store) {
	for n := range 7 {
		write(t, s, Park("a", Event(n*5, "k")))
	}
	for name, read := range map[string]func(cdc.Position) ([]outbox.Stored, bool, error){
		"Scan": func(after cdc.Position) ([]outbox.Stored, bool, error) {
			return s.Scan(t.Context(), "a", after, nil, 3, manyBytes)
		},
		"ScanKey": func(after cdc.Position) ([]outbox.Stored, bool, error) {
			return s.ScanKey(t.Context(), "a", "k", after, 3, manyBytes)
		},
	} {
		t.Run(name, func(t *testing.T) {
			rows, more, err := read(cdc.Position{})
			require.NoError(t, err)
			require.True(t, more)
			require.Equal(t, []string{"evt_0", "evt_5", "evt_10"}, ids(rows))
			rows, more, err = read(Event(10, "").Position)
			require.NoError(t, err)
			require.True(t, more)
			require.Equal(t, []string{"evt_15", "evt_20", "evt_25"}, ids(rows))
			rows, more, err = read(Event(15, "").Position)
			require.NoError(t, err)
			require.False(t, more)
			require.Equal(t, []string{"evt_20", "evt_25", "evt_30"}, ids(rows))
			rows, more, err = read(Event(30, "").Position)
			require.NoError(t, err)
			require.False(t, more)
			require.Empty(t, rows)
		})
	}
}

func scanLeavesKeysOut(t *testing.T, s outbox.Store) {
	for n := range 9 {
		write(t, s, Park("a", Event(n, []string{"", "k", "l"}[n%3])))
	}
	skip := []string{"l", "other"}
	for n := range 5000 {
		skip = append(skip, "key "+strconv.Itoa(n))
	}
	rows, more, err := s.Scan(t.Context(), "a", cdc.Position{}, skip, 5, manyBytes)
	require.NoError(t, err)
	require.True(t, more)
	require.Equal(t, []string{"evt_0", "evt_1", "evt_3", "evt_4", "evt_6"}, ids(rows))
	rows, more, err = s.Scan(t.Context(), "a", cdc.Position{}, []string{"k", "l"}, 3, manyBytes)
	require.NoError(t, err)
	require.False(t, more)
	require.Equal(t, []string{"evt_0", "evt_3", "evt_6"}, ids(rows))
}

func scanStopsAtItsBytes(t *testing.T, s outbox.Store) {
	for n := range 6 {
		c := Park("a", Event(n, "k"))
		c.Event.Data, c.Event.Headers = bytes.Repeat([]byte("x"), 900), []byte(`{"a":"`+strings.Repeat("y", 92)+`"}`)
		write(t, s, c)
	}
	for _, c := range []struct {
		limit int
		bytes int64
		want  int
	}{{10, 0, 1}, {10, 1, 1}, {10, 1999, 1}, {10, 2000, 2}, {10, 3500, 3}, {2, 3500, 2}, {10, 5999, 5}, {10, 6000, 6}, {6, 6000, 6}} {
		for _, key := range []string{"", "k"} {
			rows, more, err := s.Scan(t.Context(), "a", cdc.Position{}, nil, c.limit, c.bytes)
			if key != "" {
				rows, more, err = s.ScanKey(t.Context(), "a", key, cdc.Position{}, c.limit, c.bytes)
			}
			require.NoError(t, err)
			require.Len(t, rows, c.want, "%+v", c)
			require.Equal(t, c.want < 6, more, "%+v", c)
		}
	}
}

func scanKeySeesItsKeyAlone(t *testing.T, s outbox.Store) {
	for n := range 9 {
		write(t, s, Park("a", Event(n, []string{"", "k", "K"}[n%3])), Park("b", Event(n, "k")))
	}
	for key, want := range map[string][]string{"k": {"evt_1", "evt_4", "evt_7"}, "K": {"evt_2", "evt_5", "evt_8"}, "": {}, "x": {}} {
		rows, more, err := s.ScanKey(t.Context(), "a", key, cdc.Position{}, manyRows, manyBytes)
		require.NoError(t, err)
		require.False(t, more)
		require.Equal(t, want, ids(rows), key)
	}
}

func due(c outbox.Change, at time.Time) outbox.Change {
	c.Due = at
	return c
}

func dueNamesKeysOnceAndLooseThemselves(t *testing.T, s outbox.Store) {
	write(
		t, s,
		due(Park("a", Event(1, "k")), noon.Add(-3*time.Second)),
		due(Park("a", Event(2, "k")), noon.Add(-time.Second)),
		due(Park("a", Event(3, "l")), noon),
		due(Park("a", Event(4, "m")), noon.Add(time.Microsecond)),
		due(Park("a", Event(5, "")), noon.Add(-time.Second)),
		due(Park("a", Event(6, "")), noon.Add(-2*time.Second)),
		due(Park("a", Event(7, "")), noon.Add(time.Hour)),
		Park("a", Event(8, "n")), Park("a", Event(9, "")),
		due(Park("b", Event(10, "o")), noon.Add(-time.Hour)),
	)
	sending := due(Park("a", Event(11, "p")), noon.Add(-time.Hour))
	sending.State = outbox.StateSending
	dead := due(Park("a", Event(12, "q")), noon.Add(-time.Hour))
	dead.State = outbox.StateDead
	write(t, s, sending, dead)

	keys, loose, next, err := s.Due(t.Context(), "a", noon, 100, manyBytes)
	require.NoError(t, err)
	require.Equal(t, []string{"k", "l"}, keys)
	require.Equal(t, []string{"evt_6", "evt_5"}, ids(loose))
	require.Equal(t, noon.Add(-2*time.Second), loose[0].Due)
	require.Equal(t, noon.Add(time.Microsecond), next)
}

func dueTellsWhenTheNextIs(t *testing.T, s outbox.Store) {
	none := func(endpoint string, want time.Time) {
		t.Helper()
		keys, loose, next, err := s.Due(t.Context(), endpoint, noon, 100, manyBytes)
		require.NoError(t, err)
		require.Empty(t, keys)
		require.Empty(t, loose)
		require.Equal(t, want, next)
	}
	write(t, s, Park("a", Event(1, "k")), Park("a", Event(2, "")))
	none("a", time.Time{})
	write(t, s, due(Park("a", Event(3, "k")), noon.Add(time.Hour)))
	none("a", noon.Add(time.Hour))
	write(t, s, due(Park("a", Event(4, "")), noon.Add(time.Minute)))
	none("a", noon.Add(time.Minute))
	none("b", time.Time{})
}

func dueStopsAtItsLimit(t *testing.T, s outbox.Store) {
	for n := range 6 {
		key := []string{"", "k" + strconv.Itoa(n)}[n%2]
		write(t, s, due(Park("a", Event(n, key)), noon.Add(time.Duration(n)*time.Second)))
	}
	write(t, s, due(Park("a", Event(9, "z")), noon.Add(time.Hour)))
	now := noon.Add(time.Minute)
	keys, loose, next, err := s.Due(t.Context(), "a", now, 3, manyBytes)
	require.NoError(t, err)
	require.Equal(t, []string{"k1"}, keys)
	require.Equal(t, []string{"evt_0", "evt_2"}, ids(loose))
	require.Equal(t, now, next, "more is due already")

	keys, loose, next, err = s.Due(t.Context(), "a", now, 6, manyBytes)
	require.NoError(t, err)
	require.Equal(t, []string{"k1", "k3", "k5"}, keys)
	require.Equal(t, []string{"evt_0", "evt_2", "evt_4"}, ids(loose))
	require.Equal(t, noon.Add(time.Hour), next)

	keys, loose, next, err = s.Due(t.Context(), "a", now, 6, 1)
	require.NoError(t, err)
	require.Len(t, keys, 3)
	require.Equal(t, []string{"evt_0"}, ids(loose))
	require.Equal(t, now, next)
}

// As when somebody has all deliveries of one key sent again.
func oneKeyHidesNoOther(t *testing.T, s outbox.Store) {
	var changes []outbox.Change
	for n := range 3000 {
		changes = append(changes, due(Park("a", Event(n, "big")), noon.Add(-time.Hour)))
	}
	changes = append(changes, due(Park("a", Event(5000, "small")), noon), due(Park("a", Event(5001, "")), noon))
	write(t, s, changes...)
	keys, loose, next, err := s.Due(t.Context(), "a", noon, 10, manyBytes)
	require.NoError(t, err)
	require.Equal(t, []string{"big", "small"}, keys)
	require.Equal(t, []string{"evt_5001"}, ids(loose))
	require.Zero(t, next)
}

func backlogsCount(t *testing.T, s outbox.Store) {
	all, err := s.Backlogs(t.Context())
	require.NoError(t, err)
	require.Empty(t, all)

	sending, dead, unmapped := Park("a", Event(3, "k")), Park("b", Event(4, "k")), Park("", Event(5, ""))
	sending.State, dead.State, unmapped.State = outbox.StateSending, outbox.StateDead, outbox.StateDead
	unmapped.Reason = outbox.ReasonUnmappable
	write(
		t, s,
		due(Park("a", Event(1, "k")), noon.Add(time.Hour)), due(Park("a", Event(2, "")), noon), sending,
		dead, unmapped, Park("c", Event(1, "")),
	)
	all, err = s.Backlogs(t.Context())
	require.NoError(t, err)
	require.Equal(t, []outbox.Backlog{
		{EndpointID: "", Dead: 1},
		{EndpointID: "a", Parked: 3, NextDue: noon},
		{EndpointID: "b", Dead: 1},
		{EndpointID: "c", Parked: 1},
	}, timeless(t, all))

	write(t, s, Move("", unmapped.Event, outbox.StateGone), Move("b", dead.Event, outbox.StateGone))
	all, err = s.Backlogs(t.Context())
	require.NoError(t, err)
	require.Len(t, all, 2)
}

func buryEndsWhatIsParked(t *testing.T, s outbox.Store) {
	for n := range 5 {
		write(t, s, due(Park("a", Event(n, "k")), noon), Park("b", Event(n, "k")))
	}
	write(t, s, Move("a", Event(0, ""), outbox.StateSending), Move("a", Event(1, ""), outbox.StateDead))
	n, err := s.Bury(t.Context(), "a", outbox.ReasonRemoved)
	require.NoError(t, err)
	require.EqualValues(t, 4, n)
	require.Empty(t, scan(t, s, "a"))
	require.Len(t, scan(t, s, "b"), 5)
	_, _, next, err := s.Due(t.Context(), "a", noon, 10, manyBytes)
	require.NoError(t, err)
	require.Zero(t, next)
	n, err = s.Bury(t.Context(), "a", outbox.ReasonRemoved)
	require.NoError(t, err)
	require.Zero(t, n)
	all, err := s.Backlogs(t.Context())
	require.NoError(t, err)
	require.Equal(t, []outbox.Backlog{{EndpointID: "a", Dead: 5}, {EndpointID: "b", Parked: 5}}, timeless(t, all))
}

func proofGrows(t *testing.T, s outbox.Store) {
	var last cdc.LSN
	for n := range 20 {
		c := outbox.Checkpoint{LSN: cdc.LSN(100 + n)}
		if n%2 == 0 {
			c.Position = cdc.Position{Commit: c.LSN + 8, Ordinal: 7}
		}
		proof, err := s.SaveCheckpoint(t.Context(), c)
		require.NoError(t, err)
		require.Greater(t, proof, last)
		last = proof
	}
}

func endedContextWritesNothing(t *testing.T, s outbox.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, s.Write(ctx, []outbox.Change{Park("a", Event(1, ""))}), context.Canceled)
	require.Empty(t, scan(t, s, "a"))
}

// Any sequence of calls has the same answers from s as from the store in memory.
func behavesAsTheStoreInMemory(t *testing.T, s outbox.Store) {
	round := 0
	rapid.Check(t, func(r *rapid.T) {
		round++ // endpoints and events of its own, in place of an empty store
		run := model{s: s, memory: New(), prefix: fmt.Sprintf("r%d_", round)}
		r.Repeat(map[string]func(*rapid.T){
			"write": run.write, "scan": run.scan, "scan key": run.scanKey, "due": run.due, "": run.backlogs, "bury": run.bury,
		})
		for _, endpoint := range []string{"a", "b", ""} {
			run.clear(r, endpoint)
		}
	})
}

type model struct {
	s      outbox.Store
	memory *Store
	prefix string
}

var (
	someKeys = []string{"", "k", "l", "m"}
	someDue  = []time.Time{{}, noon, noon.Add(time.Second), noon.Add(2 * time.Second), noon.Add(time.Hour)}
)

func (m model) endpoint(r *rapid.T, names ...string) string {
	if name := rapid.SampledFrom(names).Draw(r, "endpoint"); name != "" {
		return m.prefix + name
	}
	return ""
}

func (m model) event(n int) *outbox.Event {
	e := Event(n, someKeys[n%len(someKeys)])
	e.ID = m.prefix + e.ID
	e.Data = bytes.Repeat([]byte("x"), n*10)
	return e
}

func (m model) write(r *rapid.T) {
	var changes []outbox.Change
	named := map[rowKey]bool{}
	for range rapid.IntRange(1, 12).Draw(r, "changes") {
		e := m.event(rapid.IntRange(0, 20).Draw(r, "event"))
		c := outbox.Change{
			EndpointID: m.endpoint(r, "a", "b", "b", ""), Event: e, OrderKey: e.Key,
			Insert:   rapid.Bool().Draw(r, "insert"),
			State:    rapid.SampledFrom([]outbox.State{outbox.StateParked, outbox.StateParked, outbox.StateSending, outbox.StateDead, outbox.StateGone}).Draw(r, "state"),
			Attempts: rapid.IntRange(0, 3).Draw(r, "attempts"),
			Due:      rapid.SampledFrom(someDue).Draw(r, "due"),
		}
		if key := (rowKey{c.EndpointID, e.ID}); !named[key] {
			named[key] = true
			changes = append(changes, c)
		}
	}
	m.same(r, m.s.Write(r.Context(), changes), m.memory.Write(r.Context(), changes))
}

func (m model) same(r *rapid.T, err, memory error) {
	r.Helper()
	require.NoError(r, err)
	require.NoError(r, memory)
}

func (m model) scan(r *rapid.T) {
	endpoint, after := m.endpoint(r, "a", "b"), m.event(rapid.IntRange(0, 20).Draw(r, "after")).Position
	skip := rapid.SliceOfN(rapid.SampledFrom(someKeys), 0, 2).Draw(r, "skip")
	limit, size := rapid.IntRange(1, 8).Draw(r, "limit"), rapid.Int64Range(0, 800).Draw(r, "bytes")
	rows, more, err := m.s.Scan(r.Context(), endpoint, after, skip, limit, size)
	wantRows, wantMore, wantErr := m.memory.Scan(r.Context(), endpoint, after, skip, limit, size)
	m.same(r, err, wantErr)
	require.Equal(r, wantRows, rows)
	require.Equal(r, wantMore, more)
}

func (m model) scanKey(r *rapid.T) {
	endpoint, after := m.endpoint(r, "a", "b"), m.event(rapid.IntRange(0, 20).Draw(r, "after")).Position
	key := rapid.SampledFrom(someKeys).Draw(r, "key")
	limit, size := rapid.IntRange(1, 8).Draw(r, "limit"), rapid.Int64Range(0, 800).Draw(r, "bytes")
	rows, more, err := m.s.ScanKey(r.Context(), endpoint, key, after, limit, size)
	wantRows, wantMore, wantErr := m.memory.ScanKey(r.Context(), endpoint, key, after, limit, size)
	m.same(r, err, wantErr)
	require.Equal(r, wantRows, rows)
	require.Equal(r, wantMore, more)
}

// The limit is above what can be due, since which of those due at one time come first is free.
func (m model) due(r *rapid.T) {
	endpoint, now := m.endpoint(r, "a", "b"), rapid.SampledFrom(someDue[1:]).Draw(r, "now")
	size := rapid.Int64Range(0, 800).Draw(r, "bytes")
	keys, loose, next, err := m.s.Due(r.Context(), endpoint, now, 50, size)
	wantKeys, wantLoose, wantNext, wantErr := m.memory.Due(r.Context(), endpoint, now, 50, size)
	m.same(r, err, wantErr)
	require.ElementsMatch(r, wantKeys, keys)
	require.Equal(r, wantLoose, loose)
	require.Equal(r, wantNext, next)
}

func (m model) backlogs(r *rapid.T) {
	all, err := m.s.Backlogs(r.Context())
	want, wantErr := m.memory.Backlogs(r.Context())
	m.same(r, err, wantErr)
	slices.SortFunc(all, func(a, b outbox.Backlog) int { return cmp.Compare(a.EndpointID, b.EndpointID) })
	require.Equal(r, timeless(r, want), timeless(r, all))
}

// timeless is backlogs without when their first delivery was parked, which every store has by a
// clock of its own.
func timeless(t require.TestingT, all []outbox.Backlog) []outbox.Backlog {
	for i := range all {
		require.Equal(t, all[i].EndpointID != "" && all[i].Parked > 0, !all[i].Oldest.IsZero(), "%+v", all[i])
		all[i].Oldest = time.Time{}
	}
	return all
}

func (m model) bury(r *rapid.T) {
	endpoint := m.endpoint(r, "a", "b")
	n, err := m.s.Bury(r.Context(), endpoint, outbox.ReasonRemoved)
	want, wantErr := m.memory.Bury(r.Context(), endpoint, outbox.ReasonRemoved)
	m.same(r, err, wantErr)
	require.Equal(r, want, n)
}

// clear leaves the store to the next round as it was.
func (m model) clear(r *rapid.T, name string) {
	endpoint := name
	if name != "" {
		endpoint = m.prefix + name
	}
	var changes []outbox.Change
	for n := range 21 {
		changes = append(changes, Move(endpoint, m.event(n), outbox.StateGone))
	}
	m.same(r, m.s.Write(r.Context(), changes), m.memory.Write(r.Context(), changes))
	if name == "" {
		require.Zero(r, m.memory.EventCount())
	}
}
