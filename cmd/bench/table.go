package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"
)

// Report is what a run has measured.
type Report struct {
	Began    time.Time `json:"began"`
	Machine  string    `json:"machine"`
	Postgres string    `json:"postgres"`
	Walhook  string    `json:"walhook"`
	Settings string    `json:"settings"`
	Args     []string  `json:"args"`
	Figures  []Figure  `json:"figures"`
	Plots    []Plot    `json:"plots,omitempty"`

	now scenario
}

// Figure is one value, and what it is held against.
type Figure struct {
	Scenario int
	Of       string // the variant
	Name     string
	Unit     string
	Value    float64
	Limit    float64 // NaN: none
	LimitOf  string
	Ratio    float64 // NaN: none
	Demand   demand
}

// demand is what the issue of a figure asks of it, or of its ratio. The zero demand asks nothing.
type demand struct {
	sign  string // "≥" or "≤"; empty asks nothing
	bound float64
	ratio bool // of the ratio, or else of the value
}

func atLeast(bound float64) demand { return demand{sign: "≥", bound: bound} }
func atMost(bound float64) demand  { return demand{sign: "≤", bound: bound} }

// timesLimit makes a demand one of the ratio to the limit.
func (d demand) timesLimit() demand { d.ratio = true; return d }

func (d demand) String() string {
	if d.sign == "" {
		return ""
	}
	text := d.sign + " " + number(d.bound)
	if d.ratio {
		text += " ×"
	}
	return text
}

// meets tells whether the figure is as demanded. What could not be measured is not.
func (f *Figure) meets() bool {
	v := f.Value
	if f.Demand.ratio {
		v = f.Ratio
	}
	switch f.Demand.sign {
	case "≥":
		return v >= f.Demand.bound
	case "≤":
		return v <= f.Demand.bound
	}
	return true
}

func (f *Figure) mark() string {
	switch {
	case f.Demand.sign == "":
		return ""
	case f.meets():
		return "✓"
	}
	return "✗"
}

// MarshalJSON leaves out what is not there: JSON has no NaN.
func (f Figure) MarshalJSON() ([]byte, error) {
	known := func(v float64) *float64 {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return nil
		}
		return &v
	}
	var ok *bool
	if f.Demand.sign != "" {
		meets := f.meets()
		ok = &meets
	}
	return json.Marshal(struct {
		Scenario int      `json:"scenario"`
		Of       string   `json:"of,omitempty"`
		Name     string   `json:"figure"`
		Unit     string   `json:"unit"`
		Value    *float64 `json:"value"`
		Limit    *float64 `json:"limit,omitempty"`
		LimitOf  string   `json:"limit_of,omitempty"`
		Ratio    *float64 `json:"ratio,omitempty"`
		Demand   string   `json:"demanded,omitempty"`
		OK       *bool    `json:"ok,omitempty"`
	}{f.Scenario, f.Of, f.Name, f.Unit, known(f.Value), known(f.Limit), f.LimitOf, known(f.Ratio), f.Demand.String(), ok})
}

func (r *Report) begin(s scenario) { r.now = s }

// add a value that stands alone.
func (r *Report) add(of, name string, value float64, unit string, d demand) {
	r.Figures = append(r.Figures, Figure{
		Scenario: r.now.number, Of: of, Name: name, Unit: unit, Value: value,
		Limit: math.NaN(), Ratio: math.NaN(), Demand: d,
	})
}

// compare adds a value and what it is of a limit. ratio is not always the one of the two: that of
// medians is not the median of ratios.
func (r *Report) compare(of, name string, value float64, unit string, limit float64, limitOf string, ratio float64, d demand) {
	r.Figures = append(r.Figures, Figure{
		Scenario: r.now.number, Of: of, Name: name, Unit: unit, Value: value,
		Limit: limit, LimitOf: limitOf, Ratio: ratio, Demand: d.timesLimit(),
	})
}

func (r *Report) missed() (n int) {
	for i := range r.Figures {
		if !r.Figures[i].meets() {
			n++
		}
	}
	return n
}

// writeTable is the report for people.
func (r *Report) writeTable(w io.Writer) {
	fmt.Fprintf(w, "%s\n%s; Postgres %s; %s\n%s\n\n", r.Began.UTC().Format(time.RFC3339), r.Machine, r.Postgres, r.Walhook, r.Settings)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "\tOF\tFIGURE\tVALUE\tLIMIT\tRATIO\tDEMANDED\t")
	for i := range r.Figures {
		fmt.Fprintln(t, strings.Join(r.Figures[i].cells(), "\t"))
	}
	t.Flush()
}

// cells are a figure's line in a table.
func (f *Figure) cells() []string {
	limit := number(f.Limit)
	if limit != "" {
		limit += " " + f.LimitOf
	}
	value := number(f.Value)
	if value == "" {
		value = "?"
	}
	return []string{
		strconv.Itoa(f.Scenario), f.Of, f.Name, strings.TrimSpace(value + " " + f.Unit),
		limit, number(f.Ratio), f.Demand.String(), f.mark(),
	}
}

// number is a value with three digits that count, or all in front of the point. NaN is nothing.
func number(v float64) string {
	switch a := math.Abs(v); {
	case math.IsNaN(v) || math.IsInf(v, 0):
		return ""
	case a == 0 || a >= 100 || a == math.Trunc(a):
		return grouped(strconv.FormatFloat(v, 'f', 0, 64))
	case a >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case a >= 1:
		return strconv.FormatFloat(v, 'f', 2, 64)
	}
	return strconv.FormatFloat(v, 'f', 3, 64)
}

// grouped sets off thousands from ten thousand on.
func grouped(digits string) string {
	sign := ""
	if strings.HasPrefix(digits, "-") {
		sign, digits = "-", digits[1:]
	}
	if utf8.RuneCountInString(digits) < 5 {
		return sign + digits
	}
	var out strings.Builder
	for i, d := range digits {
		if i > 0 && (len(digits)-i)%3 == 0 {
			out.WriteByte(',')
		}
		out.WriteRune(d)
	}
	return sign + out.String()
}
