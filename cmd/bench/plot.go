package main

import (
	"bytes"
	"fmt"
	"html"
	"math"
	"strconv"
	"time"
)

// Plot is a picture of something over time.
type Plot struct {
	File   string   `json:"file"`
	Title  string   `json:"title"`
	Unit   string   `json:"unit"` // of the vertical axis; the horizontal one has seconds
	Series []Series `json:"series"`
}

// Series is one line of a plot.
type Series struct {
	Name string    `json:"name"`
	X    []float64 `json:"x"` // seconds
	Y    []float64 `json:"y"`
}

// curve is what a receiver has counted in each rateStep.
type curve struct {
	name   string
	counts []int
}

// ratePlot shows throughput. The last step is not a whole one, and is left out.
func ratePlot(file, title string, curves ...curve) Plot {
	p := Plot{File: file, Title: title, Unit: "deliveries/s"}
	const each = 5 // of rateStep in one point
	for _, c := range curves {
		s := Series{Name: c.name}
		for i := 0; i+each <= len(c.counts); i += each {
			sum := 0
			for _, n := range c.counts[i : i+each] {
				sum += n
			}
			span := each * rateStep
			s.X = append(s.X, (time.Duration(i)*rateStep + span/2).Seconds())
			s.Y = append(s.Y, perSecond(sum, span))
		}
		p.Series = append(p.Series, s)
	}
	return p
}

// latencyPlot shows percentiles of each half second.
func latencyPlot(file, title string, seen *observations) Plot {
	const step = 500 * time.Millisecond
	buckets := seen.latencies(step)
	p := Plot{File: file, Title: title, Unit: "ms"}
	for _, line := range []struct {
		name string
		q    float64
	}{{"p50", 0.5}, {"p99", 0.99}, {"max", 1}} {
		s := Series{Name: line.name}
		for i, all := range buckets {
			if v, ok := percentile(all, line.q); ok {
				s.X = append(s.X, (time.Duration(i)*step + step/2).Seconds())
				s.Y = append(s.Y, milliseconds(time.Duration(v)))
			}
		}
		p.Series = append(p.Series, s)
	}
	return p
}

// The geometry of a picture, in its own units.
const (
	plotWidth, plotHeight                    = 720, 320
	plotLeft, plotRight, plotTop, plotBottom = 72, 16, 56, 44
)

// Colours that can be read on white and on black.
var plotColours = []string{"#1f77b4", "#d9660a", "#2a9d4a", "#b8459e", "#8a8f00"}

const plotGrey = "#7f7f7f"

// SVG draws the plot: no background, so that the page's own shows through, and grey for all
// that is neither.
func (p *Plot) SVG() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12" role="img">`+"\n", plotWidth, plotHeight)
	fmt.Fprintf(&b, "<title>%s</title>\n", html.EscapeString(p.Title))
	maxX, maxY := 0.0, 0.0
	for _, s := range p.Series {
		for i := range s.X {
			maxX, maxY = max(maxX, s.X[i]), max(maxY, s.Y[i])
		}
	}
	ticksX, ticksY := ticks(maxX), ticks(maxY)
	maxX, maxY = max(maxX, ticksX[len(ticksX)-1]), ticksY[len(ticksY)-1]
	x := func(v float64) float64 { return plotLeft + v/maxX*(plotWidth-plotLeft-plotRight) }
	y := func(v float64) float64 { return plotHeight - plotBottom - v/maxY*(plotHeight-plotTop-plotBottom) }

	fmt.Fprintf(&b, `<g fill="%s" stroke="none">`+"\n", plotGrey)
	fmt.Fprintf(&b, `<text x="%d" y="20" font-size="14" font-weight="bold">%s</text>`+"\n", plotLeft, html.EscapeString(p.Title))
	for _, v := range ticksY {
		fmt.Fprintf(&b, `<text x="%d" y="%.1f" text-anchor="end">%s</text>`+"\n", plotLeft-6, y(v)+4, tickLabel(v))
	}
	for _, v := range ticksX {
		fmt.Fprintf(&b, `<text x="%.1f" y="%d" text-anchor="middle">%s</text>`+"\n", x(v), plotHeight-plotBottom+18, tickLabel(v))
	}
	fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="middle">time (s)</text>`+"\n", (plotLeft+plotWidth-plotRight)/2, plotHeight-6)
	fmt.Fprintf(&b, `<text transform="translate(14 %d) rotate(-90)" text-anchor="middle">%s</text>`+"\n", (plotTop+plotHeight-plotBottom)/2, html.EscapeString(p.Unit))
	b.WriteString("</g>\n")

	fmt.Fprintf(&b, `<g stroke="%s" stroke-width="1" stroke-opacity="0.35">`+"\n", plotGrey)
	for _, v := range ticksY {
		fmt.Fprintf(&b, `<path d="M%d %.1fH%d"/>`+"\n", plotLeft, y(v), plotWidth-plotRight)
	}
	b.WriteString("</g>\n")

	at := plotLeft
	for i, s := range p.Series {
		colour := plotColours[i%len(plotColours)]
		fmt.Fprintf(&b, `<path d="M%d 38h18" stroke="%s" stroke-width="3"/><text x="%d" y="42" fill="%s">%s</text>`+"\n",
			at, colour, at+24, colour, html.EscapeString(s.Name))
		at += 24 + 7*len(s.Name) + 24
		if len(s.X) == 0 {
			continue
		}
		fmt.Fprintf(&b, `<polyline fill="none" stroke="%s" stroke-width="1.5" stroke-linejoin="round" points="`, colour)
		for j := range s.X {
			if j > 0 {
				b.WriteByte(' ')
			}
			fmt.Fprintf(&b, "%.1f,%.1f", x(s.X[j]), y(s.Y[j]))
		}
		b.WriteString("\"/>\n")
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

// ticks are four to ten round values from zero to the first that reaches highest.
func ticks(highest float64) []float64 {
	if !(highest > 0) || math.IsInf(highest, 0) {
		return []float64{0, 1}
	}
	step := math.Pow(10, math.Floor(math.Log10(highest/4)))
	for _, times := range []float64{1, 2, 5, 10} {
		if highest/(step*times) <= 6 {
			step *= times
			break
		}
	}
	all := []float64{0}
	for i := 1; all[len(all)-1] < highest*(1-1e-9); i++ {
		all = append(all, float64(i)*step)
	}
	return all
}

func tickLabel(v float64) string {
	text := strconv.FormatFloat(v, 'f', -1, 64)
	if math.Abs(v) >= 10_000 {
		text = grouped(strconv.FormatFloat(v, 'f', 0, 64))
	} else if len(text) > 6 {
		text = strconv.FormatFloat(v, 'g', 4, 64)
	}
	return text
}
