package main

import (
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestUsageIsReadWhateverTheNameOfTheProgram(t *testing.T) {
	t.Parallel()
	cpu, ok := cpuOfStat("42 (a) b) S 1 42 42 0 -1 4194304 100 0 0 0 150 25 0 0 20 0 9 0 100 1000 10 18446744073709551615")
	require.True(t, ok)
	require.Equal(t, 1750*time.Millisecond, cpu)
	_, ok = cpuOfStat("42 (a")
	require.False(t, ok)
	status := "Name:\tx\nVmPeak:\t  9 kB\nVmHWM:\t   65536 kB\nVmRSS:\t 5 kB\n"
	peak, ok := ofStatus(status, "VmHWM:")
	require.True(t, ok)
	require.EqualValues(t, 64<<20, peak)
	resident, ok := ofStatus(status, "VmRSS:")
	require.True(t, ok)
	require.EqualValues(t, 5<<10, resident)
	_, ok = ofStatus("Name:\tx\n", "VmHWM:")
	require.False(t, ok)
}

func TestUsageOfAProcessThatRuns(t *testing.T) {
	t.Parallel()
	u, known := processUsage(os.Getpid())
	require.True(t, known)
	require.Greater(t, u.resident, int64(1<<20))
	require.GreaterOrEqual(t, u.peak, u.resident)
	_, known = processUsage(-1)
	require.False(t, known)
}

func TestWhatTheHostTookIsRead(t *testing.T) {
	t.Parallel()
	took, ok := stealOfStat("cpu  10 20 30 40 50 60 70 250 90 100\ncpu0 1 2 3 4 5 6 7 8 9 10\n")
	require.True(t, ok)
	require.Equal(t, 2500*time.Millisecond, took)
	for _, bad := range []string{"", "cpu 1 2 3 4 5 6 7\n", "intr 1 2 3 4 5 6 7 8 9\n"} {
		_, ok = stealOfStat(bad)
		require.False(t, ok, bad)
	}
	_, ok = stolen()
	require.True(t, ok)
}
