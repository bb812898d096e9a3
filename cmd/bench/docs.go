package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// The marks of a Markdown file between which the figures of a run stand.
const (
	docsBegin = "<!-- bench:begin -->"
	docsEnd   = "<!-- bench:end -->"
)

// splitDocs is what stands before and after the figures, the marks with it.
func splitDocs(page string) (before, after string, err error) {
	before, rest, found := strings.Cut(page, docsBegin)
	_, after, ended := strings.Cut(rest, docsEnd)
	if !found || !ended {
		return "", "", errors.New("want the lines " + docsBegin + " and " + docsEnd)
	}
	return before + docsBegin + "\n", docsEnd + after, nil
}

// checkDocs is asked before a run, which takes long.
func checkDocs(file string) error {
	page, err := os.ReadFile(file)
	if err == nil {
		_, _, err = splitDocs(string(page))
	}
	if err != nil {
		return fmt.Errorf("--docs %s: %w", file, err)
	}
	return nil
}

// fillDocs puts the figures into a Markdown file, and the plots into the directory beside it that
// has its name. The plots of earlier runs go.
func (r *Report) fillDocs(file string) error {
	page, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, after, err := splitDocs(string(page))
	if err != nil {
		return err
	}
	dir := strings.TrimSuffix(file, filepath.Ext(file))
	old, err := filepath.Glob(filepath.Join(dir, "*.svg"))
	if err != nil {
		return err
	}
	for _, plot := range old {
		if err := os.Remove(plot); err != nil {
			return err
		}
	}
	if err := r.writePlots(dir); err != nil {
		return err
	}
	return os.WriteFile(file, []byte(before+r.markdown(filepath.Base(dir))+after), 0o644)
}

func (r *Report) writePlots(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, p := range r.Plots {
		if err := os.WriteFile(filepath.Join(dir, p.File+".svg"), p.SVG(), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// markdown is the report as a part of a page; plots are in a directory beside it.
func (r *Report) markdown(plots string) string {
	var b strings.Builder
	command := "make bench"
	if len(r.Args) > 0 {
		command += fmt.Sprintf(" ARGS=%q", strings.Join(r.Args, " "))
	}
	fmt.Fprintf(&b, "\nOf %s, by `%s`, on %s. %s. Postgres %s with `%s`.\n",
		r.Began.UTC().Format(time.DateOnly), command, r.Machine, r.Walhook, r.Postgres, strings.ReplaceAll(r.Settings, ": ", ":"))
	scenario := 0
	for i := range r.Figures {
		f := &r.Figures[i]
		if f.Scenario != scenario {
			r.showPlots(&b, plots, scenario)
			scenario = f.Scenario
			fmt.Fprintf(&b, "\n### %d: %s\n\n| of | figure | value | limit | ratio | demanded | |\n| --- | --- | ---: | ---: | ---: | --- | --- |\n", scenario, nameOf(scenario))
		}
		cells := f.cells()
		fmt.Fprintf(&b, "| %s |\n", strings.Join(cells[1:], " | "))
	}
	r.showPlots(&b, plots, scenario)
	b.WriteString("\n")
	return b.String()
}

// showPlots of a scenario, whose number their files begin with.
func (r *Report) showPlots(b *strings.Builder, dir string, scenario int) {
	for _, p := range r.Plots {
		if strings.HasPrefix(p.File, fmt.Sprintf("%d-", scenario)) {
			fmt.Fprintf(b, "\n![%s](%s/%s.svg)\n", p.Title, dir, p.File)
		}
	}
}

func nameOf(number int) string {
	for _, s := range allScenarios() {
		if s.number == number {
			return s.name
		}
	}
	return ""
}
