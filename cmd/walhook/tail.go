package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
)

// tailLook is how old what is known of the endpoints may be when an event comes.
const tailLook = 2 * time.Second

const (
	// A server whose replication connection is not read can come to hang as a whole: so nobody who
	// stops reading our output, as Ctrl-S does, may stop us for longer than tailStall.
	tailLines = 1000
	tailStall = 5 * time.Second
)

func tailCommand(o *options) *cobra.Command {
	t := &tailing{options: o}
	cmd := &cobra.Command{
		Use:   "tail",
		Short: "Show what would be sent, live; send nothing",
		Long: `Shows each event that commits from now on, and which endpoints it is for, until Ctrl-C. It reads a
temporary slot of its own: it sends nothing, writes nothing, and leaves the slot of walhook run alone.
With --output json there is a line for each event, with headers and data.`,
		Args: noArgs,
	}
	f := cmd.Flags()
	f.StringSliceVar(&t.only, "endpoint", nil, "only events for one of these endpoints")
	f.StringSliceVar(&t.globs, "type", nil, "only events of these types; globs")
	f.StringArrayVar(&t.tenants, "tenant", nil, "only events of this tenant; \"\" for events without one")
	outputFlag(cmd, o)
	cmd.RunE = o.do(func(ctx context.Context, d *desk, cmd *cobra.Command, _ []string) error {
		t.desk, t.out, t.errs = d, cmd.OutOrStdout(), cmd.ErrOrStderr()
		return t.run(ctx)
	})
	return cmd
}

// tailing is one run of the command.
type tailing struct {
	*options
	only, globs, tenants []string

	desk      *desk
	out, errs io.Writer
	mapper    *outbox.Mapper
	picked    outbox.Past
	endpoints *outbox.Registry
	looked    time.Time
	lines     chan string // on their way out
}

// shownEvent is an event in JSON.
type shownEvent struct {
	Committed  time.Time       `json:"committed_at"`
	Position   string          `json:"position"`
	ID         string          `json:"id"`
	Type       string          `json:"type"`
	Key        string          `json:"key"`
	Tenant     string          `json:"tenant"`
	Time       *time.Time      `json:"time"`
	Headers    json.RawMessage `json:"headers,omitempty"`
	Data       any             `json:"data"`
	Endpoints  []string        `json:"endpoints"`
	Unmappable string          `json:"unmappable,omitempty"` // why
}

func (t *tailing) run(ctx context.Context) error {
	t.picked.Tenants = t.tenants
	for _, g := range t.globs {
		t.picked.Types = append(t.picked.Types, outbox.CompileGlob(g))
	}
	var err error
	if t.mapper, err = outbox.NewMapper(t.desk.cfg.Outbox); err != nil {
		return failed{err, exitUsage}
	}
	if err := t.look(ctx); err != nil {
		return err
	}
	for _, id := range t.only {
		if t.endpoints.Endpoint(id) == nil {
			k, err := t.desk.endpoint(ctx, id)
			if err != nil {
				return err
			}
			return fmt.Errorf("endpoint %s is %s: %s", k.id, k.status, printable(k.reason))
		}
	}
	log, err := newLogger(Log{Level: "warn", Format: "console"}, t.errs) // for whom the new slot waits, say
	if err != nil {
		return err
	}
	stream := streamConfig(t.desk.cfg, func() (string, error) { return t.desk.cfg.Database.Replication().Reveal(), nil }, log)
	resolve := func(found []cdc.Found) error {
		for i := range found {
			if err := t.mapper.Resolve(found[i].Relation()); err != nil {
				return failed{err, exitUsage}
			}
		}
		return nil
	}
	begun := func(at cdc.LSN) {
		fmt.Fprintf(t.errs, "reading from %s on; Ctrl-C ends it\n", at)
	}
	t.lines = make(chan string, tailLines)
	written := make(chan error, 1)
	go func() {
		var err error
		for line := range t.lines {
			if err == nil {
				_, err = io.WriteString(t.out, line)
			}
		}
		written <- err
	}()
	err = cdc.Tail(ctx, stream, resolve, begun, func(row *cdc.Row) error { return t.row(ctx, row) })
	close(t.lines)
	select {
	case wrong := <-written:
		err = cmp.Or(err, wrong)
	case <-time.After(tailStall):
	}
	var of interface{ ExitCode() int }
	if err == nil || errors.As(err, &of) {
		return err
	}
	return said(err)
}

// look reads the endpoints.
func (t *tailing) look(ctx context.Context) error {
	all, err := t.desk.endpoints(ctx)
	if err != nil {
		return err
	}
	var valid []*outbox.Endpoint
	for _, k := range all {
		if k.ep != nil && k.status != outbox.Invalid {
			valid = append(valid, k.ep)
		}
	}
	t.endpoints, err = outbox.NewRegistry(valid)
	t.looked = time.Now()
	return err
}

// row shows a row as the event that it becomes.
func (t *tailing) row(ctx context.Context, row *cdc.Row) error {
	ev, err := t.mapper.Map(row)
	var unmappable *outbox.UnmappableError
	reason := ""
	switch {
	case errors.As(err, &unmappable):
		reason = unmappable.Reason
	case err != nil:
		return err
	case ev == nil:
		return nil
	}
	if !t.picked.Has(ev) {
		return nil
	}
	if time.Since(t.looked) > tailLook {
		if err := t.look(ctx); err != nil {
			return err
		}
	}
	to := []string{}
	if reason == "" {
		wanting, refused := t.endpoints.Wants(ev)
		for _, ep := range wanting {
			to = append(to, ep.ID)
		}
		for _, ep := range refused {
			to = append(to, ep.ID+" (its filter fails)")
		}
	}
	if len(t.only) > 0 && !slices.ContainsFunc(to, func(id string) bool { id, _, _ = strings.Cut(id, " "); return slices.Contains(t.only, id) }) {
		return nil
	}
	if t.output == "json" {
		s := shownEvent{
			Committed: ev.Commit.UTC(), Position: ev.Position.String(), ID: ev.ID, Type: ev.Type, Key: ev.Key, Tenant: ev.Tenant,
			Time: optional(ev.Time), Data: payload(ev), Endpoints: to, Unmappable: reason,
		}
		if json.Valid(ev.Headers) {
			s.Headers = ev.Headers
		}
		var b strings.Builder
		if err := writeJSON(&b, s, ""); err != nil {
			return err
		}
		return t.say(b.String())
	}
	dash := func(s string) string {
		if s == "" {
			return "-"
		}
		return printable(s)
	}
	end := "→ " + strings.Join(to, ", ")
	switch {
	case reason != "":
		end = "✗ " + printable(reason)
	case len(to) == 0:
		end = "→ nobody"
	}
	return t.say(fmt.Sprintf("%s  %s  %s  %s  key %s  tenant %s  %s\n",
		when(ev.Commit), ev.Position, dash(ev.ID), dash(ev.Type), dash(ev.Key), dash(ev.Tenant), end))
}

func (t *tailing) say(line string) error {
	select {
	case t.lines <- line:
		return nil
	default:
	}
	stall := time.NewTimer(tailStall)
	defer stall.Stop()
	select {
	case t.lines <- line:
		return nil
	case <-stall.C:
		return failed{errors.New("nobody reads the output"), exitFailed}
	}
}
