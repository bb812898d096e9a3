package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/promql/promqltest"
	"github.com/prometheus/prometheus/rules"
	"sigs.k8s.io/yaml"
)

// suite is as much of the form of `promtool test rules` as our tests use. An alert is judged by all of
// its labels; annotations are not looked at.
type suite struct {
	RuleFiles []string       `json:"rule_files"` // read by promtool
	Every     model.Duration `json:"evaluation_interval"`
	Tests     []struct {
		Name           string                            `json:"name"`
		Interval       model.Duration                    `json:"interval"`
		InputSeries    []struct{ Series, Values string } `json:"input_series"`
		AlertRuleTests []struct {
			EvalTime  model.Duration `json:"eval_time"`
			Alertname string         `json:"alertname"`
			Expected  []struct {
				Labels map[string]string `json:"exp_labels"`
			} `json:"exp_alerts"`
		} `json:"alert_rule_test"`
	}
}

// tryOut evaluates the rules over the series of each test, minute by minute, and compares the alerts that
// fire. Every alert has to fire in one test at least, and to be silent in another.
func tryOut(spec []byte, file string) (said string, err error) {
	src, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	var s suite
	if err := yaml.UnmarshalStrict(src, &s, yaml.DisallowUnknownFields); err != nil {
		return "", fmt.Errorf("%s: %w", file, err)
	}
	dir, err := os.MkdirTemp("", "promrules")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "rules.yaml")
	if err := os.WriteFile(path, spec, 0o600); err != nil {
		return "", err
	}
	fired, silent, known := map[string]bool{}, map[string]bool{}, map[string]bool{}
	var errs []error
	for _, t := range s.Tests {
		var load strings.Builder
		fmt.Fprintf(&load, "load %s\n", t.Interval)
		for _, in := range t.InputSeries {
			fmt.Fprintf(&load, "  %s %s\n", in.Series, in.Values)
		}
		last := time.Duration(0)
		for _, a := range t.AlertRuleTests {
			last = max(last, time.Duration(a.EvalTime))
		}
		firing, err := evaluate(load.String(), path, time.Duration(t.Interval), last, known)
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
func evaluate(load, path string, every, last time.Duration, known map[string]bool) (map[time.Duration]map[string][]string, error) {
	p := parser.NewParser(parser.Options{})
	world, err := promqltest.NewLazyLoader(load, promqltest.LazyLoaderOpts{EnableAtModifier: true, EnableNegativeOffset: true, Parser: p})
	if err != nil {
		return nil, err
	}
	defer world.Close()
	m := rules.NewManager(&rules.ManagerOptions{
		QueryFunc: rules.EngineQueryFunc(world.QueryEngine(), world.Storage()), AppendableV2: world.Storage(), Context: context.Background(),
		NotifyFunc: func(context.Context, string, ...*rules.Alert) {}, Logger: slog.New(slog.DiscardHandler), Parser: p,
	})
	groups, errs := m.LoadGroups(every, labels.EmptyLabels(), "", nil, false, path)
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	all := map[time.Duration]map[string][]string{}
	for at := time.Duration(0); at <= last; at += every {
		firing := map[string][]string{}
		var failed error
		world.WithSamplesTill(time.Unix(0, 0).UTC().Add(at), func(err error) {
			if failed = err; err != nil {
				return
			}
			for _, g := range groups {
				g.Eval(world.Context(), time.Unix(0, 0).UTC().Add(at))
				for _, r := range g.Rules() {
					alert, is := r.(*rules.AlertingRule)
					if !is {
						continue
					}
					known[r.Name()] = true
					failed = errors.Join(failed, r.LastError())
					for _, a := range alert.ActiveAlerts() {
						if a.State == rules.StateFiring {
							its := a.Labels.Map()
							delete(its, "alertname")
							firing[r.Name()] = append(firing[r.Name()], labelText(its))
						}
					}
				}
			}
		})
		if failed != nil {
			return nil, failed
		}
		all[at] = firing
	}
	return all, nil
}

func labelText(of map[string]string) string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(of)) {
		fmt.Fprintf(&b, "%s=%s ", name, of[name])
	}
	return strings.TrimSpace(b.String())
}
