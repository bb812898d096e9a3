package outboxtest_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/outbox/outboxtest"
)

func TestSuite(t *testing.T) {
	outboxtest.Suite(t, func(*testing.T) outbox.Store { return outboxtest.New() })
}

func TestFailuresAreAsAskedFor(t *testing.T) {
	s, ctx := outboxtest.New(), t.Context()
	park := []outbox.Change{outboxtest.Park("a", outboxtest.Event(1, ""))}

	s.FailWrites(2, nil)
	require.ErrorIs(t, s.Write(ctx, park), outboxtest.ErrInjected)
	_, err := s.Bury(ctx, "a", outbox.ReasonRemoved)
	require.ErrorIs(t, err, outboxtest.ErrInjected)
	require.Empty(t, s.Rows())
	require.NoError(t, s.Write(ctx, park))
	require.Len(t, s.Rows(), 1)

	s.LoseAnswers(1, nil)
	require.ErrorIs(t, s.Write(ctx, []outbox.Change{outboxtest.Park("b", outboxtest.Event(1, ""))}), outboxtest.ErrInjected)
	require.Len(t, s.Rows(), 2, "it was applied all the same")
	require.Equal(t, 1, s.EventCount())

	s.FailReads(1, context.DeadlineExceeded)
	_, _, err = s.Scan(ctx, "a", cdc.Position{}, nil, 1, 1)
	require.ErrorIs(t, err, context.DeadlineExceeded)

	s.FailCheckpoints(1, nil)
	_, err = s.SaveCheckpoint(ctx, outbox.Checkpoint{LSN: 7})
	require.ErrorIs(t, err, outboxtest.ErrInjected)
	s.Prove(func() cdc.LSN { return 4711 })
	proof, err := s.SaveCheckpoint(ctx, outbox.Checkpoint{LSN: 8})
	require.NoError(t, err)
	require.EqualValues(t, 4711, proof)
	saved, saves := s.Checkpoint()
	require.Equal(t, outbox.Checkpoint{LSN: 8}, saved)
	require.Equal(t, 1, saves)

	s.Fence()
	require.ErrorIs(t, s.Write(ctx, park), outbox.ErrFenced)
	_, err = s.SaveCheckpoint(ctx, outbox.Checkpoint{LSN: 9})
	require.ErrorIs(t, err, outbox.ErrFenced)
}

func TestBlockedWritesWaitForTheirRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := outboxtest.New()
		release := s.BlockWrites()
		done := make(chan error, 1)
		go func() { done <- s.Write(t.Context(), []outbox.Change{outboxtest.Park("a", outboxtest.Event(1, ""))}) }()
		time.Sleep(time.Hour) // the bubble's
		require.Empty(t, done)
		require.Empty(t, s.Rows())
		release()
		require.NoError(t, <-done)
		require.Len(t, s.Rows(), 1)

		defer s.BlockWrites()()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		require.ErrorIs(t, s.Write(ctx, []outbox.Change{outboxtest.Park("a", outboxtest.Event(2, ""))}), context.DeadlineExceeded)
		require.Len(t, s.Rows(), 1)
	})
}
