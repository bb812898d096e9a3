package main

import (
	"cmp"
	"math"
	"slices"
	"time"
)

// percentile is the value of nearest rank: the smallest one that q of all values do not exceed.
// sorted must be; of none it is NaN.
func percentile[T cmp.Ordered](sorted []T, q float64) (v T, ok bool) {
	if len(sorted) == 0 {
		return v, false
	}
	rank := int(math.Ceil(q * float64(len(sorted))))
	return sorted[min(max(rank, 1), len(sorted))-1], true
}

// median of some measurements; where their number is even, the mean of the two in the middle. Of none it is NaN.
func median(all []float64) float64 {
	if len(all) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(all))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}

// ratios of measurements that were taken in pairs, one after the other: so what disturbs both
// leaves their ratio alone.
func ratios(over, under []float64) []float64 {
	all := make([]float64, 0, len(over))
	for i := range min(len(over), len(under)) {
		all = append(all, over[i]/under[i])
	}
	return all
}

// perSecond is a rate; without a span there is none.
func perSecond(n int, span time.Duration) float64 {
	if span <= 0 {
		return math.NaN()
	}
	return float64(n) / span.Seconds()
}

// nan is what could not be measured.
var nan = math.NaN()

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func mebibytes(n int64) float64 { return float64(n) / (1 << 20) }
