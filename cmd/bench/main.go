package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Exit codes.
const (
	exitDone   = 0
	exitMissed = 1 // a demand, or the run failed
	exitUsage  = 2
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// options are what the command line says.
type options struct {
	walhook string
	only    []int
	scale   float64
	json    string
	svg     string
	docs    string
	telling []string // what of the command line bears on the figures
	profile string
	rounds  int
	fsync   bool
	keep    bool
}

// run is the program: the bench, or one of its roles.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	if len(args) == 2 && args[0] == roleFlag {
		if err := play(ctx, args[1], stdin, stdout); err != nil {
			fmt.Fprintf(stderr, "bench: %v\n", err)
			return exitMissed
		}
		return exitDone
	}
	o, err := parse(args, stderr)
	if err == nil && o.docs != "" {
		err = checkDocs(o.docs)
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		return exitDone
	case err != nil:
		fmt.Fprintf(stderr, "bench: %v\n", err)
		return exitUsage
	}
	report, err := measure(ctx, o, stderr)
	if report != nil {
		if err != nil {
			o.docs = "" // not of half a run
		}
		err = errors.Join(err, publish(report, o, stdout))
	}
	if err != nil {
		fmt.Fprintf(stderr, "bench: %v\n", err)
		return exitMissed
	}
	if missed := report.missed(); missed > 0 {
		fmt.Fprintf(stderr, "bench: %d of the demands missed\n", missed)
		return exitMissed
	}
	return exitDone
}

func parse(args []string, stderr io.Writer) (options, error) {
	var o options
	var only string
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.walhook, "walhook", "bin/walhook", "the program that is measured")
	f.StringVar(&only, "only", "", "scenarios to run, as 1,3 (default: all)")
	f.Float64Var(&o.scale, "scale", 1, "times the rows and the seconds of each scenario")
	f.StringVar(&o.json, "json", "", "file for the figures as JSON")
	f.StringVar(&o.svg, "svg", "", "directory for the plots")
	f.StringVar(&o.docs, "docs", "", "Markdown file whose part between the marks of the bench becomes the figures of this run")
	f.StringVar(&o.profile, "profile", "", "directory for CPU and allocation profiles of walhook; it is built anew for them")
	f.IntVar(&o.rounds, "rounds", 3, "how often scenario 1 and its limits take turns; the median counts")
	f.BoolVar(&o.fsync, "fsync", false, "let Postgres wait for the disk")
	f.BoolVar(&o.keep, "keep", false, "keep the directory of logs and configurations")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("unknown argument %q", f.Arg(0))
	}
	f.Visit(func(set *flag.Flag) {
		switch set.Name {
		case "only", "scale", "rounds", "fsync":
			o.telling = append(o.telling, "--"+set.Name+"="+set.Value.String())
		}
	})
	if o.scale <= 0 || o.rounds < 1 {
		return o, errors.New("--scale and --rounds: want more than zero")
	}
	for field := range strings.SplitSeq(only, ",") {
		if field = strings.TrimSpace(field); field == "" {
			continue
		}
		n, err := strconv.Atoi(field)
		if err != nil || nameOf(n) == "" {
			return o, fmt.Errorf("--only: there is no scenario %q", field)
		}
		o.only = append(o.only, n)
	}
	return o, nil
}

// scenario is one line of the table of what is measured.
type scenario struct {
	number int
	name   string
	run    func(context.Context, *lab) error
}

func allScenarios() []scenario {
	return []scenario{
		{1, "drain", drain},
		{2, "drain, in other forms", drainForms},
		{3, "steady", steady},
		{4, "three of ten endpoints are sick", sick},
		{5, "a slow receiver", slow},
		{6, "a dead endpoint under a full drain", dead},
		{7, "its recovery", recovery},
		{8, "many endpoints", many},
		{9, "one large transaction", large},
		{10, "idle", idle},
		{11, "rules and formats", rules},
		{12, "the app's side", app},
	}
}

// measure runs the scenarios. The report has what was measured also where it ends with an error.
func measure(ctx context.Context, o options, progress io.Writer) (report *Report, err error) {
	l, err := openLab(ctx, o, progress)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	for _, s := range allScenarios() {
		if !l.wants(s.number) {
			continue
		}
		began := time.Now()
		before, known := stolen()
		fmt.Fprintf(progress, "%d %s\n", s.number, s.name)
		l.report.begin(s)
		if err := s.run(ctx, l); err != nil {
			return l.report, fmt.Errorf("scenario %d: %w", s.number, err)
		}
		took := time.Since(began)
		if after, still := stolen(); known && still { // it is the machine, not walhook, that such a run measured
			share := 100 * (after - before).Seconds() / took.Seconds() / float64(runtime.NumCPU())
			l.report.add("the machine", "CPU that its host gave to others", share, "%", demand{})
		}
		fmt.Fprintf(progress, "%d took %s\n", s.number, took.Round(time.Second))
	}
	return l.report, nil
}

// publish writes what was measured to where it was asked for.
func publish(r *Report, o options, stdout io.Writer) error {
	r.writeTable(stdout)
	if o.json != "" {
		text, err := json.MarshalIndent(r, "", "  ")
		if err == nil {
			err = os.WriteFile(o.json, append(text, '\n'), 0o644)
		}
		if err != nil {
			return fmt.Errorf("write figures: %w", err)
		}
	}
	if o.svg != "" {
		if err := r.writePlots(o.svg); err != nil {
			return fmt.Errorf("write plots: %w", err)
		}
	}
	if o.docs != "" {
		if err := r.fillDocs(o.docs); err != nil {
			return fmt.Errorf("write %s: %w", o.docs, err)
		}
	}
	return nil
}

// machine says where the figures are from.
func machine() string {
	return fmt.Sprintf("%s/%s, %d CPUs, %s", runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), runtime.Version())
}
