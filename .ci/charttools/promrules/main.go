// Command promrules is what promtool does to a rule file and to the expressions of a dashboard: it reads
// a PrometheusRule, or a Grafana dashboard, as YAML or JSON on its standard input and fails where Prometheus would
// not take a rule or parse an expression. A file in the form of `promtool test rules` as its argument is tried out
// on the rules.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql/parser"
	"sigs.k8s.io/yaml"
)

func main() {
	said, err := judge(os.Stdin, os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "promrules:", err)
		os.Exit(1)
	}
	fmt.Println(said)
}

func judge(r io.Reader, tests []string) (string, error) {
	src, err := io.ReadAll(r)
	if err != nil {
		return "", err
	}
	var doc struct {
		Kind   string          `json:"kind"`
		Spec   json.RawMessage `json:"spec"`
		Panels []json.RawMessage
	}
	if err := yaml.Unmarshal(src, &doc); err != nil {
		return "", err
	}
	p := parser.NewParser(parser.Options{})
	switch {
	case doc.Kind == "PrometheusRule":
		groups, errs := rulefmt.Parse(doc.Spec, false, model.UTF8Validation, p, slog.New(slog.DiscardHandler))
		if len(errs) > 0 {
			return "", errors.Join(errs...)
		}
		n := 0
		for _, g := range groups.Groups {
			n += len(g.Rules)
		}
		said := fmt.Sprintf("%d rules", n)
		for _, file := range tests {
			tried, err := tryOut(groups, file)
			if err != nil {
				return "", err
			}
			said += ", " + tried
		}
		return said, nil
	case len(doc.Panels) > 0:
		var all any
		if err := yaml.Unmarshal(src, &all); err != nil {
			return "", err
		}
		var errs []error
		n := 0
		expressions(all, func(expr string) {
			n++
			if _, err := p.ParseExpr(grafana.Replace(expr)); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", expr, err))
			}
		})
		return fmt.Sprintf("%d expressions", n), errors.Join(errs...)
	}
	return "", errors.New("neither a PrometheusRule nor a dashboard")
}

// grafana puts in what Grafana would for its own variables.
var grafana = strings.NewReplacer("$__rate_interval", "5m", "$__range", "1h", "$__interval", "1m")

func expressions(node any, found func(string)) {
	switch node := node.(type) {
	case map[string]any:
		for key, v := range node {
			if expr, ok := v.(string); ok && key == "expr" {
				found(expr)
			}
			expressions(v, found)
		}
	case []any:
		for _, v := range node {
			expressions(v, found)
		}
	}
}
