package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestMain lets the test binary play the roles, as the bench itself does.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == roleFlag {
		main()
	}
	os.Exit(m.Run())
}

// Of a few rows no figure says anything: what is tested is that all of them are there, and that
// nothing was lost, repeated or overtaken, which ends the run.
func TestABenchOfAFewRows(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "walhook")
	out, err := exec.Command("go", "build", "-o", program, "../walhook").CombinedOutput()
	require.NoError(t, err, "%s", out)
	figures := filepath.Join(dir, "figures.json")
	var stdout, stderr bytes.Buffer
	code := run(context.Background(), []string{"--walhook", program, "--only", "1,3,7", "--scale", "0.002", "--rounds", "2", "--json", figures, "--svg", filepath.Join(dir, "svg")},
		nil, &stdout, &stderr)
	require.NotContains(t, stderr.String(), "bench: scenario")
	require.Contains(t, []int{exitDone, exitMissed}, code)
	text, err := os.ReadFile(figures)
	require.NoError(t, err, "%s", stderr.String())
	var report struct {
		Figures []struct {
			Scenario int
			Figure   string
			Value    *float64
		}
	}
	require.NoError(t, json.Unmarshal(text, &report))
	seen := map[int]int{}
	for _, f := range report.Figures {
		require.NotNil(t, f.Value, "%d %s", f.Scenario, f.Figure)
		seen[f.Scenario]++
	}
	for _, s := range allScenarios() {
		if !slices.Contains([]int{1, 3, 7}, s.number) {
			continue
		}
		require.NotZero(t, seen[s.number], s.name)
	}
	plots, err := filepath.Glob(filepath.Join(dir, "svg", "*.svg"))
	require.NoError(t, err)
	require.NotEmpty(t, plots)
}

func TestWrongUsage(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"--only", "99"}, {"--only", "x"}, {"--scale", "0"}, {"--rounds", "0"}, {"more"}, {"--nope"}} {
		var stderr bytes.Buffer
		require.Equal(t, exitUsage, run(context.Background(), args, nil, &stderr, &stderr), args)
		require.NotEmpty(t, stderr.String())
	}
	var stderr bytes.Buffer
	require.Equal(t, exitMissed, run(context.Background(), []string{"--walhook", "/nowhere/walhook"}, nil, &stderr, &stderr))
	require.Contains(t, stderr.String(), "/nowhere/walhook")
}
