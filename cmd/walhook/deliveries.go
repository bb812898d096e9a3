package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/outbox/store"
)

func deliveriesCommand(o *options) *cobra.Command {
	d := &deliveriesCommands{o}
	cmd := group("deliveries", "Look at what waits or died; retry or discard it", d.list(), d.show(), d.retry(), d.discard())
	outputFlag(cmd, o)
	return cmd
}

type deliveriesCommands struct{ *options }

// picks are the flags that pick deliveries.
type picks struct {
	filter store.Filter
	since  string
	state  string
	reason string
}

func (p *picks) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&p.filter.Endpoint, "endpoint", "", "of this endpoint")
	f.StringVar(&p.filter.Event, "event", "", "of the event of this webhook-id")
	f.StringVar(&p.filter.Type, "type", "", "of events of this type; a glob")
	f.StringVar(&p.filter.Tenant, "tenant", "", "of this tenant's events; \"\" for events without one")
	f.StringVar(&p.state, "state", "", "parked, sending or dead")
	f.StringVar(&p.reason, "reason", "", "parked or dead for this reason, as in status or breaker_open")
	f.StringVar(&p.since, "since", "", "parked or dead since: RFC 3339, or a duration ago, as in 2h")
}

func (p *picks) read(cmd *cobra.Command, args []string) (f store.Filter, err error) {
	f = p.filter
	if f.IDs, err = deliveryIDs(args); err != nil {
		return f, err
	}
	f.State, f.Reason = outbox.State(p.state), outbox.Reason(p.reason)
	if known := []string{"", "parked", "sending", "dead"}; !slices.Contains(known, p.state) {
		return f, usageError{fmt.Errorf("--state %s: want parked, sending or dead", printable(p.state))}
	}
	for _, name := range []string{"endpoint", "event", "type", "state", "reason"} {
		if flag := cmd.Flags().Lookup(name); flag.Changed && flag.Value.String() == "" { // an unset variable of a script must not mean all
			return f, usageError{fmt.Errorf("--%s is empty", name)}
		}
	}
	f.NoTenant = cmd.Flags().Changed("tenant") && f.Tenant == ""
	f.Since, err = flagTime(cmd, "since", p.since)
	return f, err
}

func deliveryIDs(args []string) (ids []int64, err error) {
	for _, arg := range args {
		id, err := strconv.ParseInt(arg, 10, 64)
		if err != nil || id <= 0 {
			return nil, usageError{fmt.Errorf("%q is not the id of a delivery, which is a number", printable(arg))}
		}
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// flagTime reads a moment: RFC 3339, or how long ago it was. It is zero where the flag was not given.
func flagTime(cmd *cobra.Command, name, text string) (time.Time, error) {
	if !cmd.Flags().Changed(name) {
		return time.Time{}, nil
	}
	if at, err := time.Parse(time.RFC3339Nano, text); err == nil {
		return at.UTC(), nil
	}
	if ago, wrong := parseDuration(text); wrong == "" {
		return time.Now().Add(-ago).UTC(), nil
	}
	return time.Time{}, usageError{fmt.Errorf("--%s %q is no time: want RFC 3339, as in 2026-01-31T15:00:00Z, or how long ago, as in 2h", name, printable(text))}
}

// shownDelivery is a delivery in JSON.
type shownDelivery struct {
	ID        int64           `json:"id"`
	Endpoint  *string         `json:"endpoint"` // null: a row that could not be mapped
	State     outbox.State    `json:"state"`
	Reason    outbox.Reason   `json:"reason"`
	Attempts  int             `json:"attempts"`
	Due       *time.Time      `json:"next_attempt_at"`
	Status    int             `json:"last_status,omitempty"`
	Detail    string          `json:"last_error,omitempty"`
	Created   time.Time       `json:"created_at"`
	Event     string          `json:"event"`
	Type      string          `json:"type"`
	Key       string          `json:"key"`
	Tenant    string          `json:"tenant"`
	Committed *time.Time      `json:"committed_at"`
	Time      *time.Time      `json:"time,omitempty"`
	Headers   json.RawMessage `json:"headers,omitempty"`
	Data      any             `json:"data,omitempty"`
}

func shownRecord(r *store.Record) shownDelivery {
	s := shownDelivery{
		ID: r.ID, State: r.State, Reason: r.Reason, Attempts: r.Attempts, Due: optional(r.Due), Status: r.Status, Detail: r.Detail,
		Created: r.Created, Event: r.EventID, Type: r.Type, Key: r.Key, Tenant: r.Tenant, Committed: optional(r.Committed),
	}
	if r.EndpointID != "" {
		s.Endpoint = &r.EndpointID
	}
	if e := r.Event; e != nil {
		s.Time, s.Data = optional(e.Time), payload(e)
		if json.Valid(e.Headers) {
			s.Headers = e.Headers
		}
	}
	return s
}

func (d *deliveriesCommands) list() *cobra.Command {
	p := &picks{}
	limit := 0
	cmd := &cobra.Command{Use: "list", Short: "List deliveries that wait or died, the newest first", Args: noArgs, RunE: d.do(func(ctx context.Context, desk *desk, cmd *cobra.Command, _ []string) error {
		f, err := p.read(cmd, nil)
		if err != nil {
			return err
		}
		if limit < 1 {
			return usageError{errors.New("--limit: want 1 or more")}
		}
		found, more, err := desk.store.Records(ctx, f, 0, limit)
		if err != nil {
			return said(err)
		}
		if d.output == "json" {
			list := make([]shownDelivery, len(found))
			for i := range found {
				list[i] = shownRecord(&found[i])
			}
			return writeJSON(cmd.OutOrStdout(), struct {
				Deliveries []shownDelivery `json:"deliveries"`
				More       bool            `json:"more"`
			}{list, more}, "  ")
		}
		c := newColumns(cmd.OutOrStdout(), "ID", "ENDPOINT", "STATE", "REASON", "ATTEMPTS", "STATUS", "DUE", "CREATED", "EVENT", "TYPE", "KEY")
		for _, r := range found {
			c.row(r.ID, r.EndpointID, r.State, r.Reason, r.Attempts, number(r.Status), r.Due, r.Created, r.EventID, r.Type, r.Key)
		}
		if err := c.flush(); err != nil {
			return err
		}
		if more {
			fmt.Fprintf(cmd.OutOrStdout(), "There are more than these %d; see --limit.\n", limit)
		}
		return nil
	})}
	p.flags(cmd)
	cmd.Flags().IntVar(&limit, "limit", 100, "at most so many")
	return cmd
}

func (d *deliveriesCommands) show() *cobra.Command {
	return &cobra.Command{Use: "show ID", Short: "Show one delivery with its event and its last answer", Args: oneArg("the id of a delivery"), RunE: d.do(func(ctx context.Context, desk *desk, cmd *cobra.Command, args []string) error {
		ids, err := deliveryIDs(args)
		if err != nil {
			return err
		}
		r, err := desk.store.Delivery(ctx, ids[0])
		switch {
		case err != nil:
			return said(err)
		case r == nil:
			return fmt.Errorf("there is no delivery %d: it was delivered or discarded", ids[0])
		case d.output == "json":
			return writeJSON(cmd.OutOrStdout(), shownRecord(r), "  ")
		}
		return printDelivery(cmd.OutOrStdout(), r)
	})}
}

func printDelivery(w io.Writer, r *store.Record) error {
	c := newColumns(w)
	line := func(name string, cell any) { c.row(name+":", cell) }
	line("id", r.ID)
	line("endpoint", r.EndpointID)
	line("state", r.State)
	line("reason", r.Reason)
	line("attempts", r.Attempts)
	line("next attempt", r.Due)
	line("last status", number(r.Status))
	line("last error", r.Detail)
	line("created", r.Created)
	line("event", r.EventID)
	line("type", r.Type)
	line("key", r.Key)
	line("tenant", r.Tenant)
	line("committed", r.Committed)
	if r.Event == nil {
		line("data", "the event was deleted")
		return c.flush()
	}
	line("time", r.Event.Time)
	line("headers", string(r.Event.Headers))
	if err := c.flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\n%s\n", strings.TrimSuffix(page(string(r.Event.Data)), "\n"))
	return err
}

// change is what retry or discard does to deliveries.
type change struct {
	use, short, long string
	done, would      string // in words: retried, would be retried
	// skip says why a delivery is left alone; empty where it is not.
	skip func(r *store.Record, endpoints map[string]known) string
	act  func(ctx context.Context, st *store.Store, all []store.Record) (int64, error)
}

func (d *deliveriesCommands) retry() *cobra.Command {
	return d.change(change{
		use: "retry", short: "Make dead deliveries parked again, and parked ones due now",
		long: `What is dead begins anew, with all its attempts; what is parked is due now. The order of a key holds:
what waits behind an earlier event goes on doing so. A running walhook looks at once.`,
		done: "retried", would: "would be retried",
		skip: func(r *store.Record, endpoints map[string]known) string {
			k, there := endpoints[r.EndpointID]
			switch {
			case r.EndpointID == "":
				return "its row could not be mapped: mend the row or the configuration, and insert it again"
			case !there:
				return "endpoint " + r.EndpointID + " is gone"
			case k.ep == nil:
				return "endpoint " + r.EndpointID + " is invalid"
			case r.State == outbox.StateSending:
				return "it is being sent"
			case r.State == outbox.StateDead && k.ep.Retry.MaxAge > 0 && !r.Committed.IsZero() && time.Since(r.Committed) > k.ep.Retry.MaxAge:
				return "it is older than retry.max_age of endpoint " + r.EndpointID + " (" + formatDuration(k.ep.Retry.MaxAge) + ") and would die again at once: raise that, or use walhook replay --id"
			}
			return ""
		},
		act: func(ctx context.Context, st *store.Store, all []store.Record) (int64, error) {
			ids := make([]int64, len(all))
			for i, r := range all {
				ids[i] = r.ID
			}
			return st.Retry(ctx, ids)
		},
	})
}

func (d *deliveriesCommands) discard() *cobra.Command {
	return d.change(change{
		use: "discard", short: "Delete deliveries for good",
		long: "Deletes deliveries, and each event that no other delivery needs. What a walhook has in memory already may still be sent.",
		done: "discarded", would: "would be discarded",
		skip: func(r *store.Record, _ map[string]known) string {
			if r.State == outbox.StateSending {
				return "it is being sent"
			}
			return ""
		},
		act: func(ctx context.Context, st *store.Store, all []store.Record) (int64, error) {
			return st.Discard(ctx, all)
		},
	})
}

// changePage is how many deliveries one transaction of a command changes.
const changePage = 1000

func (d *deliveriesCommands) change(c change) *cobra.Command {
	p := &picks{}
	var all, dry bool
	cmd := &cobra.Command{Use: c.use + " [ID…]", Short: c.short, Long: c.long, Args: cobra.ArbitraryArgs, RunE: d.do(func(ctx context.Context, desk *desk, cmd *cobra.Command, args []string) error {
		f, err := p.read(cmd, args)
		if err != nil {
			return err
		}
		if f.Empty() && !all {
			return usageError{fmt.Errorf("%s wants ids, a filter, or --all", cmd.CommandPath())}
		}
		endpoints, err := desk.endpoints(ctx)
		if err != nil {
			return err
		}
		byID := map[string]known{}
		for _, k := range endpoints {
			if _, ofFile := byID[k.id]; !ofFile {
				byID[k.id] = k
			}
		}
		done, err := c.run(ctx, desk.store, f, byID, dry)
		if err != nil {
			return said(err)
		}
		if done.Done > 0 && !dry {
			if err := desk.store.Nudge(ctx); err != nil {
				return said(err)
			}
		}
		done.DryRun = dry
		if d.output == "json" {
			err = writeJSON(cmd.OutOrStdout(), done, "  ")
		} else {
			err = done.print(cmd.OutOrStdout(), map[bool]string{false: c.done, true: c.would}[dry])
		}
		if left := int64(len(f.IDs)) - done.Done; err == nil && left > 0 && len(f.IDs) > 0 {
			return failed{fmt.Errorf("%d of %s: not %s", left, count(len(f.IDs), "delivery id"), c.done), exitFailed}
		}
		return err
	})}
	p.flags(cmd)
	cmd.Flags().BoolVar(&all, "all", false, "all there are")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "only count")
	return cmd
}

// changed is what became of deliveries.
type changed struct {
	DryRun  bool             `json:"dry_run"`
	Matched int64            `json:"matched"`
	Done    int64            `json:"done"`
	Skipped map[string]int64 `json:"skipped"` // by why
}

func (c *change) run(ctx context.Context, st *store.Store, f store.Filter, endpoints map[string]known, dry bool) (changed, error) {
	out := changed{Skipped: map[string]int64{}}
	for after, more := int64(-1), true; more; {
		var found []store.Record
		var err error
		if found, more, err = st.Records(ctx, f, after, changePage); err != nil {
			return out, err
		}
		var take []store.Record
		for i := range found {
			after = found[i].ID
			if why := c.skip(&found[i], endpoints); why != "" {
				out.Skipped[why]++
				continue
			}
			take = append(take, found[i])
		}
		out.Matched += int64(len(found))
		n := int64(len(take))
		if !dry && n > 0 {
			if n, err = c.act(ctx, st, take); err != nil {
				return out, err
			}
		}
		out.Done += n
	}
	return out, nil
}

func (c *changed) print(w io.Writer, word string) error {
	var b strings.Builder
	of := "deliveries"
	if c.Matched == 1 {
		of = "delivery"
	}
	fmt.Fprintf(&b, "%d of %d %s %s\n", c.Done, c.Matched, of, word)
	for _, why := range slices.Sorted(maps.Keys(c.Skipped)) {
		fmt.Fprintf(&b, "%d left alone: %s\n", c.Skipped[why], printable(why))
	}
	_, err := io.WriteString(w, b.String())
	return err
}
