package main

import (
	"encoding/json"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func someReport() *Report {
	r := &Report{Began: time.Unix(0, 0), Machine: "a machine", Postgres: "15", Walhook: "walhook dev", Settings: "fsync=off"}
	r.begin(scenario{number: 1})
	r.compare("1 KB", "deliveries", 13_500, "/s", 15_000, "chain net/http", 0.9, atLeast(0.9))
	r.compare("1 KB", "deliveries", 13_500, "/s", 30_000, "read", 0.45, demand{})
	r.add("1 KB", "peak RSS", 64.1, "MiB", atMost(64))
	r.begin(scenario{number: 3})
	r.add("500/s", "p50", math.NaN(), "ms", atMost(1.5))
	return r
}

func TestTheTableSaysWhatIsDemandedAndMissed(t *testing.T) {
	t.Parallel()
	r := someReport()
	var b strings.Builder
	r.writeTable(&b)
	var lines [][]string
	for line := range strings.Lines(b.String()) {
		lines = append(lines, strings.Fields(line))
	}
	require.Equal(t, [][]string{
		{"1970-01-01T00:00:00Z"},
		{"a", "machine;", "Postgres", "15;", "walhook", "dev"},
		{"fsync=off"},
		{},
		{"OF", "FIGURE", "VALUE", "LIMIT", "RATIO", "DEMANDED"},
		{"1", "1", "KB", "deliveries", "13,500", "/s", "15,000", "chain", "net/http", "0.900", "≥", "0.900", "×", "✓"},
		{"1", "1", "KB", "deliveries", "13,500", "/s", "30,000", "read", "0.450"},
		{"1", "1", "KB", "peak", "RSS", "64.1", "MiB", "≤", "64", "✗"},
		{"3", "500/s", "p50", "?", "ms", "≤", "1.50", "✗"},
	}, lines)
	require.Equal(t, 2, r.missed(), "what could not be measured is missed")
}

func TestFiguresAsJSONHaveNoValueForWhatIsUnknown(t *testing.T) {
	t.Parallel()
	text, err := json.Marshal(someReport().Figures)
	require.NoError(t, err)
	require.JSONEq(t, `[
		{"scenario":1,"of":"1 KB","figure":"deliveries","unit":"/s","value":13500,"limit":15000,"limit_of":"chain net/http","ratio":0.9,"demanded":"≥ 0.900 ×","ok":true},
		{"scenario":1,"of":"1 KB","figure":"deliveries","unit":"/s","value":13500,"limit":30000,"limit_of":"read","ratio":0.45},
		{"scenario":1,"of":"1 KB","figure":"peak RSS","unit":"MiB","value":64.1,"demanded":"≤ 64","ok":false},
		{"scenario":3,"of":"500/s","figure":"p50","unit":"ms","value":null,"demanded":"≤ 1.50","ok":false}
	]`, string(text))
}

func TestDemandsOfTheValueAndOfTheRatio(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		value, ratio float64
		demand       demand
		meets        bool
	}{
		{5, 0.1, demand{}, true},
		{5, 0.1, atLeast(5), true},
		{4.99, 9, atLeast(5), false},
		{5, 9, atMost(5), true},
		{5.01, 0, atMost(5), false},
		{0, 0.9, atLeast(0.9).timesLimit(), true},
		{9, 0.89, atLeast(0.9).timesLimit(), false},
		{9, 1.2, atMost(1.2).timesLimit(), true},
		{0, 1.21, atMost(1.2).timesLimit(), false},
		{9, math.NaN(), atLeast(0.9).timesLimit(), false},
		{9, math.NaN(), atMost(1.2).timesLimit(), false},
	} {
		f := Figure{Value: c.value, Ratio: c.ratio, Demand: c.demand}
		require.Equal(t, c.meets, f.meets(), "%+v", c)
	}
}

func TestNumbersHaveThreeDigitsThatCount(t *testing.T) {
	t.Parallel()
	for v, want := range map[float64]string{
		0: "0", 0.0123: "0.012", 0.9: "0.900", 1.234: "1.23", 12.34: "12.3", 123.4: "123", 1234: "1234",
		12_345: "12,345", 1_234_567.8: "1,234,568", -12_345: "-12,345", 3: "3", math.NaN(): "",
	} {
		require.Equal(t, want, number(v))
	}
}
