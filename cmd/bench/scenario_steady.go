package main

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// steady is scenario 3.
func steady(ctx context.Context, l *lab) error {
	for _, rate := range []int{500, 2000} {
		if err := l.steadyAt(ctx, rate, l.span(30*time.Second)); err != nil {
			return fmt.Errorf("%d/s: %w", rate, err)
		}
	}
	return nil
}

func (l *lab) steadyAt(ctx context.Context, rate int, span time.Duration) error {
	const keys = 1000
	db, err := l.database(ctx)
	if err != nil {
		return err
	}
	rows := int(float64(rate) * span.Seconds())
	e := expectation{First: l.takeIDs(rows), Count: rows, Keys: keys, Signed: true, Timed: true}
	var load loadResult
	m, err := db.deliver(ctx, fmt.Sprintf("%s-steady-%d", db.slot, rate), e, func(*sidecar) (err error) {
		load, err = db.steady(ctx, e.First, rows, rate, keys, 1000)
		return err
	}, l.endpoint("steady"))
	if err != nil {
		return err
	}
	of := fmt.Sprintf("%d/s", rate)
	demands := map[string]demand{}
	if rate == 500 {
		demands = map[string]demand{"p50": atMost(1.5), "p99": atMost(10)}
	}
	l.latencies(of, "commit → receipt", m.seen.FromCommit, demands)
	l.latencies(of, "before INSERT → receipt", m.seen.FromInsert, nil)
	slices.Sort(load.inserts)
	insert, _ := percentile(load.inserts, 0.5)
	l.report.add(of, "INSERT p50, beside it", float64(insert)/1e6, "ms", demand{})
	l.report.add(of, fmt.Sprintf("sent more than %s late", lateAfter), float64(load.late)/float64(rows)*100, "%", demand{})
	l.report.add(of, "CPU a delivery", m.cpu, "µs", demand{})
	l.report.add(of, "peak RSS", mebibytes(m.usage.peak), "MiB", demand{})
	l.report.add(of, "parked", float64(m.written.parked), "", demand{})
	l.report.Plots = append(l.report.Plots,
		latencyPlot(fmt.Sprintf("3-latency-%d", rate), fmt.Sprintf("Steady %d/s: commit → receipt", rate), m.seen),
		ratePlot(fmt.Sprintf("3-throughput-%d", rate), fmt.Sprintf("Steady %d/s: deliveries a second", rate), curve{"walhook", m.seen.Rate}))
	return db.drop(ctx)
}

// latencies adds p50, p95, p99 and the maximum of nanoseconds, in milliseconds.
func (l *lab) latencies(of, what string, all []int64, demands map[string]demand) {
	sorted := slices.Sorted(slices.Values(all))
	for _, p := range []struct {
		name string
		q    float64
	}{{"p50", 0.5}, {"p95", 0.95}, {"p99", 0.99}, {"max", 1}} {
		v, _ := percentile(sorted, p.q)
		l.report.add(of, what+" "+p.name, float64(v)/1e6, "ms", demands[p.name])
	}
}
