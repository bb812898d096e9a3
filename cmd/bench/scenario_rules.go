package main

import (
	"context"
	"fmt"
)

// rules is scenario 11: what each way to look into an event, or to send it differently, costs.
func rules(ctx context.Context, l *lab) error {
	f := l.plainForm()
	kinds := []struct{ name, setting string }{
		{"plain", ""},
		{"filter", `filter: "data.at >= 0 && type == 'order.changed'"`},
		{"transform", `transform: {body: "{'action': type, 'payload': data}"}`},
		{"cloudevents", "format: cloudevents"},
	}
	db, err := l.prepared(ctx, l.endpoint("drain"))
	if err != nil {
		return err
	}
	rate, cpu := map[string][]float64{}, map[string][]float64{}
	for turn := range 2 {
		for i := range kinds {
			k := kinds[i]
			if turn == 1 { // back the same way, so that none has always the later place
				k = kinds[len(kinds)-1-i]
			}
			g := f
			if k.setting != "" {
				g.settings = []string{k.setting}
			}
			e := expectation{First: l.takeIDs(f.rows), Count: f.rows, Keys: int64(f.keys), Signed: true}
			if err := db.fill(ctx, e.First, f.rows, f.per, f.keys, f.size); err != nil {
				return err
			}
			m, err := db.drainOwn(ctx, g, fmt.Sprintf("%s-%s-%d", db.slot, k.name, turn), e)
			if err != nil {
				return fmt.Errorf("%s: %w", k.name, err)
			}
			l.say("%s: %s/s, %s µs, %d parked", k.name, number(m.rate), number(m.cpu), m.written.parked)
			rate[k.name], cpu[k.name] = append(rate[k.name], m.rate), append(cpu[k.name], m.cpu)
			if _, err := db.conn.Exec(ctx, "truncate outbox"); err != nil {
				return err
			}
		}
	}
	for _, k := range kinds[1:] {
		slower, dearer := median(ratios(rate[k.name], rate["plain"])), median(ratios(cpu[k.name], cpu["plain"]))
		l.report.compare(k.name, "deliveries", median(rate[k.name]), "/s", median(rate["plain"]), "plain", slower, demand{})
		l.report.add(k.name, "costs of the rate", (1-slower)*100, "%", demand{})
		l.report.compare(k.name, "CPU a delivery", median(cpu[k.name]), "µs", median(cpu["plain"]), "plain", dearer, demand{})
		l.report.add(k.name, "costs of CPU", (dearer-1)*100, "%", demand{})
	}
	return db.drop(ctx)
}
