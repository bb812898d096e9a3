package main

import (
	"math"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func TestPercentilesAreOfNearestRank(t *testing.T) {
	t.Parallel()
	hundred := make([]int64, 100)
	for i := range hundred {
		hundred[i] = int64(i + 1)
	}
	for q, want := range map[float64]int64{0: 1, 0.001: 1, 0.5: 50, 0.95: 95, 0.99: 99, 0.991: 100, 1: 100} {
		got, ok := percentile(hundred, q)
		require.True(t, ok)
		require.Equal(t, want, got, q)
	}
	_, ok := percentile([]int64(nil), 0.5)
	require.False(t, ok, "of nothing there is none")
}

func TestAPercentileIsNotExceededByItsShare(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		all := rapid.SliceOfN(rapid.Int64(), 1, 200).Draw(t, "all")
		q := rapid.Float64Range(0.01, 1).Draw(t, "q")
		slices.Sort(all)
		v, ok := percentile(all, q)
		require.True(t, ok)
		notAbove, below := 0, 0
		for _, other := range all {
			if other <= v {
				notAbove++
			}
			if other < v {
				below++
			}
		}
		require.GreaterOrEqual(t, float64(notAbove), q*float64(len(all))-1e-9)
		require.Less(t, float64(below), q*float64(len(all)))
	})
}

func TestMedian(t *testing.T) {
	t.Parallel()
	require.InDelta(t, 2, median([]float64{9, 1, 2}), 0)
	require.InDelta(t, 2.5, median([]float64{4, 1, 3, 2}), 0)
	require.True(t, math.IsNaN(median(nil)))
	all := []float64{3, 1, 2}
	median(all)
	require.Equal(t, []float64{3, 1, 2}, all, "left as it was")
}

func TestRatiosAreOfPairs(t *testing.T) {
	t.Parallel()
	// The machine was twice as slow in the second round: the ratios say nothing of it.
	require.Equal(t, []float64{0.5, 0.5, 0.25}, ratios([]float64{10, 5, 5}, []float64{20, 10, 20}))
}

func TestARateNeedsASpan(t *testing.T) {
	t.Parallel()
	require.InDelta(t, 500, perSecond(1000, 2*time.Second), 0)
	require.True(t, math.IsNaN(perSecond(1000, 0)))
}
