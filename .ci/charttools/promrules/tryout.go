package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/util/annotations"
	"sigs.k8s.io/yaml"
)

// suite is as much of the form of `promtool test rules` as our tests use. An alert is judged by all of
// its labels; annotations are not looked at.
type suite struct {
	RuleFiles []string       `json:"rule_files"` // read by promtool
	Every     model.Duration `json:"evaluation_interval"`
	Tests     []struct {
		Name           string         `json:"name"`
		Interval       model.Duration `json:"interval"`
		InputSeries    []series       `json:"input_series"`
		AlertRuleTests []struct {
			EvalTime  model.Duration `json:"eval_time"`
			Alertname string         `json:"alertname"`
			Expected  []struct {
				Labels map[string]string `json:"exp_labels"`
			} `json:"exp_alerts"`
		} `json:"alert_rule_test"`
	}
}

type series struct{ Series, Values string }

// tryOut evaluates the rules over the series of each test, minute by minute, and compares the alerts that
// fire. Every alert has to fire in one test at least, and to be silent in another.
func tryOut(groups *rulefmt.RuleGroups, file string) (said string, err error) {
	src, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	var s suite
	if err := yaml.UnmarshalStrict(src, &s, yaml.DisallowUnknownFields); err != nil {
		return "", fmt.Errorf("%s: %w", file, err)
	}
	fired, silent, known := map[string]bool{}, map[string]bool{}, map[string]bool{}
	var errs []error
	for _, t := range s.Tests {
		last := time.Duration(0)
		for _, a := range t.AlertRuleTests {
			last = max(last, time.Duration(a.EvalTime))
		}
		firing, err := evaluate(t.InputSeries, groups, time.Duration(t.Interval), last, known)
		if err != nil {
			return "", fmt.Errorf("%s: %w", t.Name, err)
		}
		for _, a := range t.AlertRuleTests {
			var want []string
			for _, e := range a.Expected {
				want = append(want, labelText(e.Labels))
			}
			slices.Sort(want)
			got := firing[time.Duration(a.EvalTime)][a.Alertname]
			slices.Sort(got)
			if !slices.Equal(got, want) {
				errs = append(errs, fmt.Errorf("%s: %s after %s: %q fire, want %q", t.Name, a.Alertname, a.EvalTime, got, want))
			}
			if len(want) > 0 {
				fired[a.Alertname] = true
			} else {
				silent[a.Alertname] = true
			}
		}
	}
	for name := range known {
		if !fired[name] || !silent[name] {
			errs = append(errs, fmt.Errorf("%s has to fire in one test and to be silent in another", name))
		}
	}
	return fmt.Sprintf("%d alerts tried out in %d tests", len(known), len(s.Tests)), errors.Join(errs...)
}

// evaluate gives the labels of the alerts that fire, by time and name.
func evaluate(input []series, groups *rulefmt.RuleGroups, every, last time.Duration, known map[string]bool) (map[time.Duration]map[string][]string, error) {
	p := parser.NewParser(parser.Options{})
	var world []storage.Series
	for _, in := range input {
		its, values, err := p.ParseSeriesDesc(in.Series + " " + in.Values)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", in.Series, err)
		}
		s := promql.Series{Metric: its}
		for i, v := range values {
			at := (time.Duration(i) * every).Milliseconds()
			switch {
			case v.Omitted:
			case v.Histogram != nil:
				s.Histograms = append(s.Histograms, promql.HPoint{T: at, H: v.Histogram})
			default:
				s.Floats = append(s.Floats, promql.FPoint{T: at, F: v.Value})
			}
		}
		world = append(world, promql.NewStorageSeries(s))
	}
	data := &storage.MockQueryable{MockQuerier: &storage.MockQuerier{SelectMockFunction: func(_ bool, _ *storage.SelectHints, want ...*labels.Matcher) storage.SeriesSet {
		found := &selection{}
		for _, s := range world {
			if !slices.ContainsFunc(want, func(m *labels.Matcher) bool { return !m.Matches(s.Labels().Get(m.Name)) }) {
				found.series = append(found.series, s)
			}
		}
		return found
	}}}
	engine := promql.NewEngine(promql.EngineOpts{MaxSamples: 1e6, Timeout: time.Minute, LookbackDelta: 5 * time.Minute, EnableAtModifier: true, EnableNegativeOffset: true, Parser: p})
	defer engine.Close()
	since := map[string]time.Duration{} // when an alert became true, by its name and labels
	all := map[time.Duration]map[string][]string{}
	for at := time.Duration(0); at <= last; at += every {
		all[at] = map[string][]string{}
		for _, g := range groups.Groups {
			for _, rule := range g.Rules {
				known[rule.Alert] = true
				holds, err := ask(engine, data, rule.Expr, at)
				if err != nil {
					return nil, fmt.Errorf("%s: %w", rule.Alert, err)
				}
				for id := range since {
					if name, its, _ := strings.Cut(id, " "); name == rule.Alert && !slices.ContainsFunc(holds, func(of map[string]string) bool { return labelText(of) == its }) {
						delete(since, id)
					}
				}
				for _, its := range holds {
					id := rule.Alert + " " + labelText(its)
					began, before := since[id]
					if !before {
						began, since[id] = at, at
					}
					if at-began >= time.Duration(rule.For) {
						maps.Copy(its, rule.Labels)
						all[at][rule.Alert] = append(all[at][rule.Alert], labelText(its))
					}
				}
			}
		}
	}
	return all, nil
}

// ask gives the labels of what an expression has at a time.
func ask(engine *promql.Engine, data storage.Queryable, expr string, at time.Duration) (all []map[string]string, err error) {
	q, err := engine.NewInstantQuery(context.Background(), data, nil, expr, time.Unix(0, 0).Add(at))
	if err != nil {
		return nil, err
	}
	defer q.Close()
	res := q.Exec(context.Background())
	found, err := res.Vector()
	if err != nil {
		return nil, err
	}
	for _, sample := range found {
		its := sample.Metric.Map()
		delete(its, "__name__")
		all = append(all, its)
	}
	return all, nil
}

// selection is a storage.SeriesSet.
type selection struct {
	series []storage.Series
	next   int
}

func (s *selection) Next() bool                        { s.next++; return s.next <= len(s.series) }
func (s *selection) At() storage.Series                { return s.series[s.next-1] }
func (s *selection) Err() error                        { return nil }
func (s *selection) Warnings() annotations.Annotations { return nil }

func labelText(of map[string]string) string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(of)) {
		fmt.Fprintf(&b, "%s=%s ", name, of[name])
	}
	return strings.TrimSpace(b.String())
}
