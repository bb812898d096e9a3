package main

import (
	"encoding/xml"
	"io"
	"math"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func TestTicksAreFewRoundAndReachTheHighest(t *testing.T) {
	t.Parallel()
	require.Equal(t, []float64{0, 5, 10, 15, 20, 25, 30}, ticks(30))
	require.Equal(t, []float64{0, 5000, 10000, 15000}, ticks(14_300))
	require.Equal(t, []float64{0, 1}, ticks(0), "of nothing")
	rapid.Check(t, func(t *rapid.T) {
		highest := rapid.Float64Range(1e-6, 1e9).Draw(t, "highest")
		all := ticks(highest)
		require.GreaterOrEqual(t, len(all), 4)
		require.LessOrEqual(t, len(all), 10)
		require.GreaterOrEqual(t, all[len(all)-1], highest*(1-1e-6))
		require.Less(t, all[len(all)-2], highest)
	})
}

func TestAPlotIsWellFormedAndInItsFrame(t *testing.T) {
	t.Parallel()
	p := Plot{Title: `less <than> & "more"`, Unit: "ms", Series: []Series{
		{Name: "p50", X: []float64{0, 15, 30}, Y: []float64{1, 2, 3}},
		{Name: "max & all", X: []float64{0, 30}, Y: []float64{0, 1234.5}},
		{Name: "nothing came"},
	}}
	var texts []string
	lines := 0
	dec := xml.NewDecoder(strings.NewReader(string(p.SVG())))
	for {
		token, err := dec.Token()
		if err == io.EOF {
			break
		}
		require.NoError(t, err)
		switch token := token.(type) {
		case xml.CharData:
			if text := strings.TrimSpace(string(token)); text != "" {
				texts = append(texts, text)
			}
		case xml.StartElement:
			require.NotEqual(t, "rect", token.Name.Local, "the page's own background shows through")
			for _, a := range token.Attr {
				if a.Name.Local != "points" {
					continue
				}
				lines++
				for point := range strings.FieldsSeq(a.Value) {
					x, y, _ := strings.Cut(point, ",")
					atX, err := strconv.ParseFloat(x, 64)
					require.NoError(t, err)
					atY, err := strconv.ParseFloat(y, 64)
					require.NoError(t, err)
					require.True(t, atX >= plotLeft && atX <= plotWidth-plotRight, point)
					require.True(t, atY >= plotTop && atY <= plotHeight-plotBottom, point)
				}
			}
		}
	}
	require.Equal(t, 2, lines)
	for _, want := range []string{`less <than> & "more"`, "time (s)", "ms", "p50", "max & all", "nothing came", "0", "30", "1500"} {
		require.Contains(t, texts, want)
	}
}

func TestThroughputIsThatOfWholeSteps(t *testing.T) {
	t.Parallel()
	p := ratePlot("f", "t", curve{"walhook", []int{10, 10, 10, 10, 10, 20, 20, 20, 20, 20, 7}})
	require.Equal(t, []Series{{Name: "walhook", X: []float64{0.25, 0.75}, Y: []float64{100, 200}}}, p.Series)
}

func TestLatencyOverTimeKeepsItsWorst(t *testing.T) {
	t.Parallel()
	seen := &observations{Begin: 1000}
	for i := range 100 {
		seen.At = append(seen.At, 1000+int64(i)*int64(10*time.Millisecond))
		seen.FromCommit = append(seen.FromCommit, int64(time.Millisecond))
	}
	seen.FromCommit[77] = int64(time.Second)
	p := latencyPlot("f", "t", seen)
	require.Equal(t, "max", p.Series[2].Name)
	require.Equal(t, []float64{1, 1000}, p.Series[2].Y)
	require.Equal(t, []float64{1, 1}, p.Series[0].Y)
	require.False(t, math.IsNaN(p.Series[1].Y[0]))
}
