package outbox

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

// book is a Store that is only written to.
type book struct {
	Store
	writes [][]Change
	answer func(n int) error // to the nth write, from 1
	took   time.Duration
	pauses atomic.Int32  // of writes in parts
	lull   chan struct{} // nil is always
}

func (b *book) Write(ctx context.Context, changes []Change) error {
	select {
	case <-time.After(b.took):
	case <-ctx.Done():
		return ctx.Err()
	}
	b.writes = append(b.writes, slices.Clone(changes))
	if b.answer == nil {
		return nil
	}
	return b.answer(len(b.writes))
}

func (b *book) WriteInParts(ctx context.Context, changes []Change, pause func() bool) error {
	for range 3 {
		more := pause()
		if b.pauses.Add(1); !more {
			break
		}
	}
	return b.Write(ctx, changes)
}

type scribe struct {
	*journal
	book *book
	told []string
	stop context.CancelFunc
	done chan error
}

// keep runs a journal in a bubble.
func keep(t *testing.T, b *book) *scribe {
	s := &scribe{journal: newJournal(b, zap.NewNop(), 10*journalMany, 1<<30), book: b, done: make(chan error, 1)}
	s.lull = func() <-chan struct{} { return b.lull }
	if b.lull == nil { // always
		b.lull = make(chan struct{})
		close(b.lull)
	}
	ctx, cancel := context.WithCancel(t.Context())
	s.stop = cancel
	go func() { s.done <- s.run(ctx) }()
	t.Cleanup(cancel)
	return s
}

func (s *scribe) note(c Change, what string) {
	s.put(c, func() { s.told = append(s.told, what) })
}

func change(id string, state State) Change {
	return Change{EndpointID: "e", Event: &Event{ID: id}, State: state}
}

func inserted(id string, state State) Change {
	c := change(id, state)
	c.Insert = true
	return c
}

func states(changes []Change) (out []string) {
	for _, c := range changes {
		what := c.Event.ID + " " + string(c.State)
		if c.Insert {
			what = "new " + what
		}
		out = append(out, what)
	}
	return out
}

func TestWhatGathersWhileAWriteIsUnderWayGoesTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := keep(t, &book{took: time.Second})
		s.note(inserted("a", StateParked), "a")
		synctest.Wait()
		s.note(inserted("b", StateParked), "b")
		s.note(change("a", StateDead), "a dead")
		s.note(inserted("c", StateSending), "c")
		s.note(change("c", StateParked), "c parked")
		require.NoError(t, s.flush(t.Context()))
		require.Equal(t, [][]string{{"new a parked"}, {"new b parked", "a dead", "new c parked"}}, [][]string{states(s.book.writes[0]), states(s.book.writes[1])})
		require.Equal(t, []string{"a", "b", "a dead", "c", "c parked"}, s.told)
		require.Equal(t, 2*time.Second, time.Since(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)))
	})
}

// A transaction each would cost more than what is in it.
func TestFewChangesWaitForMoreAMoment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var writes atomic.Int32
		s := keep(t, &book{took: time.Millisecond, answer: func(int) error {
			writes.Add(1)
			return nil
		}})
		began := time.Now()
		written := func(n int, after time.Duration, why string) {
			time.Sleep(time.Until(began.Add(after)) - 1)
			synctest.Wait()
			require.EqualValues(t, n-1, writes.Load(), why)
			time.Sleep(time.Nanosecond)
			synctest.Wait()
			require.EqualValues(t, n, writes.Load(), why)
		}
		s.note(inserted("a", StateParked), "a")
		written(1, time.Millisecond, "the first one goes at once")
		s.note(inserted("b", StateParked), "b")
		time.Sleep(2 * time.Millisecond)
		s.note(inserted("c", StateParked), "c")
		written(2, journalPause+time.Millisecond, "they wait a moment")

		s.note(inserted("d", StateDead), "d")
		written(3, journalPause+2*time.Millisecond, "somebody may wait for it")
		for i := range journalMany {
			s.note(inserted(strconv.Itoa(i), StateParked), "")
		}
		written(4, journalPause+3*time.Millisecond, "they are many")
		time.Sleep(journalPause)
		began = time.Now()
		s.note(inserted("e", StateParked), "e")
		written(5, time.Millisecond, "the one before is long ago")
		s.note(inserted("f", StateParked), "f")
		require.NoError(t, s.flush(t.Context()))
		require.Equal(t, 2*time.Millisecond, time.Since(began), "somebody waits")
		require.Len(t, s.book.writes[1], 2)

		s.much = 1000
		s.note(inserted("g", StateParked), "g")
		large := inserted("h", StateParked)
		large.Event = &Event{ID: "h", Data: make([]byte, 1000)}
		s.note(large, "h")
		written(7, time.Since(began)+time.Millisecond, "they are large")
		require.Zero(t, s.size)
	})
}

// Its parts wait for good moments, but not for long, and not while somebody waits.
func TestASmallTransactionGoesInLulls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &book{lull: make(chan struct{})}
		s := keep(t, b)
		began := time.Now()
		paused := func(n int, after time.Duration, why string) {
			t.Helper()
			synctest.Wait()
			require.EqualValues(t, n, b.pauses.Load(), why)
			require.Equal(t, after, time.Since(began), why)
		}
		s.note(inserted("a", StateParked), "a")
		paused(0, 0, "no lull yet")
		b.lull <- struct{}{}
		paused(1, 0, "a lull")
		time.Sleep(lullWait)
		paused(2, lullWait, "no lull for long")
		s.note(inserted("b", StateParked), "b")
		paused(2, lullWait, "it waits for the next transaction")
		s.note(inserted("c", StateDead), "c")
		paused(3, lullWait, "somebody waits for the next transaction")
		require.NoError(t, s.flush(t.Context()))
		require.Equal(t, []string{"a", "b", "c"}, s.told)
		require.Len(t, b.writes, 2)
		require.EqualValues(t, 3, b.pauses.Load(), "what somebody waits for has no pauses")

		time.Sleep(journalPause)
		s.note(inserted("d", StateParked), "d")
		synctest.Wait()
		began = time.Now()
		require.NoError(t, s.flush(t.Context()))
		paused(4, 0, "somebody waits for this transaction")
		time.Sleep(journalPause)
		s.note(inserted("e", StateParked), "e")
		synctest.Wait()
		began = time.Now()
		s.stop()
		require.NoError(t, <-s.done)
		paused(5, 0, "the end")
	})
}

func TestARowThatIsGoneBeforeItWasWrittenNeedsNoWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := keep(t, &book{took: time.Second})
		s.note(inserted("a", StateParked), "a")
		synctest.Wait()
		s.note(inserted("b", StateSending), "b")
		s.note(change("b", StateGone), "b gone")
		s.note(change("a", StateGone), "a gone")
		require.NoError(t, s.flush(t.Context()))
		require.Len(t, s.book.writes, 2)
		require.Equal(t, []string{"a gone"}, states(s.book.writes[1]))
		require.Equal(t, []string{"a", "b", "b gone", "a gone"}, s.told)
	})
}

func TestAFailedWriteIsTriedAgainAsItWas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		down := errors.New("disk full")
		s := keep(t, &book{answer: func(n int) error {
			if n <= 10 {
				return down
			}
			return nil
		}})
		s.note(inserted("a", StateParked), "a")
		synctest.Wait()
		require.ErrorIs(t, s.err(), down)
		s.note(change("a", StateGone), "a gone") // the write may have been applied: it is not folded into it
		require.NoError(t, s.flush(t.Context()))
		for _, w := range s.book.writes[:11] {
			require.Equal(t, []string{"new a parked"}, states(w))
		}
		require.Equal(t, []string{"a gone"}, states(s.book.writes[11]))
		require.Equal(t, []string{"a", "a gone"}, s.told)
		require.NoError(t, s.err())
		require.Less(t, time.Since(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)), 10*journalMaxBackoff)
	})
}

func TestABatchHasItsLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := keep(t, &book{took: time.Second})
		s.note(inserted("first", StateParked), "")
		synctest.Wait()
		for i := range journalBatch + 1 {
			s.note(inserted(strconv.Itoa(i), StateParked), "")
		}
		for i := range 5 {
			c := inserted("large"+strconv.Itoa(i), StateParked)
			c.Event.Data = make([]byte, journalBatchBytes/2)
			s.note(c, "")
		}
		require.NoError(t, s.flush(t.Context()))
		var sizes []int
		for _, w := range s.book.writes {
			sizes = append(sizes, len(w))
		}
		require.Equal(t, []int{1, journalBatch, 2, 1, 1, 1, 1}, sizes)
	})
}

func TestAFenceEndsTheJournal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := keep(t, &book{answer: func(int) error { return ErrFenced }})
		s.note(inserted("a", StateParked), "a")
		require.ErrorIs(t, <-s.done, ErrFenced)
		require.Empty(t, s.told)
	})
}

func TestFlushEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := keep(t, &book{answer: func(int) error { return errors.New("down") }})
		require.NoError(t, s.flush(t.Context()))
		s.note(inserted("a", StateParked), "a")
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		require.ErrorIs(t, s.flush(ctx), context.DeadlineExceeded)
		s.stop()
		require.NoError(t, <-s.done)
	})
}

// It ended a stop in order with the error of the last write.
func TestAWriteThatFailsAtTheEndIsNoErrorOfTheJournal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s *scribe
		s = keep(t, &book{answer: func(int) error {
			s.stop()
			return errors.New("down")
		}})
		s.note(inserted("a", StateParked), "a")
		require.NoError(t, <-s.done)
	})
}
