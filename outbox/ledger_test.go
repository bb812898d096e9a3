package outbox

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/walhook/walhook/cdc"
)

// TestLowNeverPassesWhatIsOwed plays rows that end in any order, with commits and keepalives
// between them, against a list of all that was opened and closed.
func TestLowNeverPassesWhatIsOwed(t *testing.T) {
	type entry struct {
		pos  cdc.Position
		owed int
		span *span
		end  cdc.LSN // of what closes; zero for a row
	}
	rapid.Check(t, func(t *rapid.T) {
		start := Checkpoint{LSN: 100, Position: cdc.Position{Commit: 90, Ordinal: 2}}
		l := NewLedger(1000, 1<<20)
		l.Reset(start)
		var all []*entry
		at, ordinal := cdc.LSN(100), uint64(0)
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			switch rapid.IntRange(0, 4).Draw(t, "step") {
			case 0, 1:
				ordinal++
				e := &entry{pos: cdc.Position{Commit: at, Ordinal: ordinal}, owed: rapid.IntRange(0, 3).Draw(t, "owed")}
				e.span = l.Open(e.pos, e.owed, time.Unix(1, 0))
				all = append(all, e)
			case 2:
				at, ordinal = at+50, 0
				l.Close(at)
				all = append(all, &entry{end: at})
			default:
				var open []*entry
				for _, e := range all {
					if e.owed > 0 {
						open = append(open, e)
					}
				}
				if len(open) > 0 {
					e := rapid.SampledFrom(open).Draw(t, "which")
					e.owed--
					l.Settle(e.span)
				}
			}
			want, owing := start, false
			for _, e := range all {
				if owing = e.owed > 0; owing {
					break
				}
				if e.end > 0 {
					want.LSN = e.end
				} else {
					want.Position = e.pos
				}
			}
			require.Equal(t, want, l.Low())
			require.Equal(t, owing, !l.Oldest().IsZero())
		}
	})
}

func TestSettledRowsBehindOneAreOneSpan(t *testing.T) {
	l := NewLedger(10, 1<<20)
	first := l.Open(cdc.Position{Commit: 1, Ordinal: 1}, 1, time.Now())
	for i := range uint64(100_000) {
		s := l.Open(cdc.Position{Commit: 1, Ordinal: i + 2}, int(i%2), time.Now())
		if s != nil && i%2 == 1 {
			l.Settle(s)
		}
	}
	l.Close(500)
	spans := 0
	for s := l.head; s != nil; s = s.next {
		spans++
	}
	require.Equal(t, 2, spans)
	require.Zero(t, l.Low())
	l.Settle(first)
	require.Equal(t, Checkpoint{LSN: 500, Position: cdc.Position{Commit: 1, Ordinal: 100_001}}, l.Low())
	require.Nil(t, l.head)
	require.Nil(t, l.tail)
}

func TestSettlingTwiceEndsLoudly(t *testing.T) {
	l := NewLedger(10, 1<<20)
	s := l.Open(cdc.Position{Commit: 1, Ordinal: 1}, 1, time.Now())
	l.Settle(s)
	require.Panics(t, func() { l.Settle(s) })
}

func TestResetHoldsForTheStartOnly(t *testing.T) {
	l := NewLedger(10, 1<<20)
	l.Reset(Checkpoint{LSN: 100})
	l.Reset(Checkpoint{LSN: 50}) // a session later
	require.Equal(t, cdc.LSN(100), l.Low().LSN)
	require.Equal(t, cdc.LSN(100), l.Opened().LSN)
	l.Close(90)
	require.Equal(t, cdc.LSN(100), l.Low().LSN, "it never goes back")
}

func TestTheLastDeliveryOfAnEventFreesItsMemory(t *testing.T) {
	l := NewLedger(1, 1<<20)
	e := &Event{ID: "a", Data: make([]byte, 100)}
	l.Hold(e, 3)
	s := l.Open(cdc.Position{Commit: 1, Ordinal: 1}, 3, time.Now())
	for range 2 {
		l.Release(s, e)
		events, bytes := l.Held()
		require.EqualValues(t, 1, events)
		require.EqualValues(t, e.Size(), bytes)
	}
	require.NotNil(t, l.Room())
	l.Release(s, e)
	events, bytes := l.Held()
	require.Zero(t, events)
	require.Zero(t, bytes)
	require.Nil(t, l.Room())
}

func TestWhoWaitsForRoomIsWoken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, c := range map[string]struct {
			events int
			bytes  int64
		}{"events": {2, 1 << 20}, "bytes": {1000, 1500}} {
			l := NewLedger(c.events, c.bytes)
			e := &Event{ID: "a", Data: make([]byte, 300)}
			spans := []*span{l.Open(cdc.Position{Ordinal: 1}, 1, time.Now()), l.Open(cdc.Position{Ordinal: 2}, 1, time.Now())}
			for range spans {
				require.Nil(t, l.Room(), name)
				require.Zero(t, l.FullSince())
				l.Hold(e, 1)
			}
			room := l.Room()
			require.NotNil(t, room, name)
			require.Equal(t, time.Now(), l.FullSince())
			got := make(chan struct{})
			go func() {
				<-room
				close(got)
			}()
			synctest.Wait()
			select {
			case <-got:
				t.Fatal("there is no room yet")
			default:
			}
			l.Release(spans[0], e)
			<-got
			require.Zero(t, l.FullSince())
		}
	})
}

func TestAWiderWindowWakesWhoWaits(t *testing.T) {
	l := NewLedger(10_000, 1<<30)
	for l.Room() == nil {
		l.Hold(&Event{}, 1)
	}
	room := l.Room()
	l.Attempted(time.Millisecond, time.Millisecond)
	l.Adapt(time.Second, time.Now())
	<-room
	require.Nil(t, l.Room())
	require.Zero(t, l.FullSince())
}

// An event for many endpoints takes the room of many.
func TestEventsForManyEndpointsFillTheBuffer(t *testing.T) {
	l := NewLedger(10_000, 1<<30)
	var spans []*span
	for l.Room() == nil {
		l.Hold(&Event{}, 100)
		spans = append(spans, l.Open(cdc.Position{Commit: cdc.LSN(len(spans) + 1)}, 100, time.Now()))
	}
	require.Len(t, spans, deliveriesPerEvent*startWindow/100+1)
	room := l.Room()
	for range 100 {
		l.Release(spans[0], &Event{})
	}
	<-room
	require.Nil(t, l.Room())
	events, _ := l.Held()
	require.EqualValues(t, len(spans)-1, events)
}

// What is read back from the store has a room of its own.
func TestABacklogKeepsNoNewEventOut(t *testing.T) {
	l := NewLedger(100, 1<<20)
	for l.mayRead() {
		l.read.add(1, 100)
	}
	require.Nil(t, l.Room())
	events, _ := l.Held()
	require.EqualValues(t, 25, events)
}

func TestTheWindowFollowsTheMachine(t *testing.T) {
	l := NewLedger(10_000, 1<<30)
	require.EqualValues(t, startWindow, l.window.Load())
	now := time.Now()
	adapt := func() {
		now = now.Add(100 * time.Millisecond)
		l.Adapt(time.Second, now)
	}
	for range 50 {
		l.Attempted(5*time.Second, 0)
		l.Attempted(time.Millisecond, 0) // the shortest decides: one slow endpoint is not the machine
		adapt()
	}
	require.EqualValues(t, 10_000, l.window.Load())
	adapt()
	require.EqualValues(t, 10_000, l.window.Load(), "nothing was sent")
	for range 50 {
		l.Attempted(800*time.Millisecond, time.Millisecond)
		adapt()
	}
	require.EqualValues(t, minWindow, l.window.Load())
	for range 50 { // 1,500 at once under way, each for 100 ms
		l.Attempted(800*time.Millisecond, 1500*100*time.Millisecond)
		adapt()
	}
	require.EqualValues(t, 3000, l.window.Load())
	for range 50 {
		adapt()
	}
	require.EqualValues(t, 3000, l.window.Load(), "nothing was sent")
	for range 50 { // nor is it, as all of it is being parked
		for l.Room() == nil {
			l.Hold(&Event{}, 1)
		}
		adapt()
	}
	require.Greater(t, l.window.Load(), int64(parkWindow))
	require.Less(t, l.window.Load(), int64(parkWindow*3/2))
}
