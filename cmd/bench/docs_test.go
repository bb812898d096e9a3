package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestAPageGetsTheFiguresBetweenItsMarks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	page := filepath.Join(dir, "speed.md")
	require.NoError(t, os.WriteFile(page, []byte("# Speed\n\n"+docsBegin+"\nold\n"+docsEnd+"\n\nMore.\n"), 0o600))
	stale := filepath.Join(dir, "speed", "9-gone.svg")
	require.NoError(t, os.MkdirAll(filepath.Dir(stale), 0o755))
	require.NoError(t, os.WriteFile(stale, nil, 0o600))
	r := someReport()
	r.Args = []string{"--rounds=5"}
	r.Plots = []Plot{{File: "1-throughput", Title: "Deliveries", Series: []Series{{Name: "a", X: []float64{0, 1}, Y: []float64{1, 2}}}}}
	for range 2 { // the second run takes the place of the first
		require.NoError(t, r.fillDocs(page))
	}
	text, err := os.ReadFile(page)
	require.NoError(t, err)
	got := string(text)
	require.True(t, strings.HasPrefix(got, "# Speed\n\n"+docsBegin+"\n"))
	require.True(t, strings.HasSuffix(got, docsEnd+"\n\nMore.\n"))
	require.NotContains(t, got, "old")
	require.Equal(t, 1, strings.Count(got, "| 1 KB | deliveries | 13,500 /s | 15,000 chain net/http | 0.900 | ≥ 0.900 × | ✓ |\n"))
	require.Contains(t, got, "| 1 KB | peak RSS | 64.1 MiB |  |  | ≤ 64 | ✗ |\n")
	require.Contains(t, got, "by `make bench ARGS=\"--rounds=5\"`")
	require.Contains(t, got, "### 1: drain\n")
	require.Contains(t, got, "![Deliveries](speed/1-throughput.svg)\n")
	require.FileExists(t, filepath.Join(dir, "speed", "1-throughput.svg"))
	require.NoFileExists(t, stale)
}

func TestAPageWithoutMarksIsRefusedBeforeTheRun(t *testing.T) {
	t.Parallel()
	page := filepath.Join(t.TempDir(), "speed.md")
	require.NoError(t, os.WriteFile(page, []byte(docsEnd+docsBegin), 0o600))
	var stderr strings.Builder
	require.Equal(t, exitUsage, run(context.Background(), []string{"--docs", page}, nil, &stderr, &stderr))
	require.Contains(t, stderr.String(), "want the lines "+docsBegin)
}

// The page of this repository is one that a run can fill.
func TestThePageOfPerformanceHasItsMarks(t *testing.T) {
	t.Parallel()
	require.NoError(t, checkDocs("../../docs/performance.md"))
}

func TestStatementsAreThoseOfWalhook(t *testing.T) {
	t.Parallel()
	log := "walhook: LOG:  statement: begin\n" +
		"walhook: LOG:  execute stmtcache_1: \n\tselect 1\n\tfrom t\n" +
		"walhook: DETAIL:  parameters: $1 = '1'\n" +
		"walhook: LOG:  duration: 1 ms\n" +
		"psql: LOG:  statement: select 1\n\tas other\n" +
		": LOG:  checkpoint starting: time\n"
	require.Equal(t, []string{"begin", "select 1 from t"}, statements([]byte(log)))
}
