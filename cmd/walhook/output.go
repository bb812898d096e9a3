package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/outbox/store"
)

// outputFlag gives a command, and those below it, its --output.
func outputFlag(cmd *cobra.Command, o *options) {
	cmd.PersistentFlags().StringVarP(&o.output, "output", "o", "table", "table or json")
	cmd.PersistentPreRunE = func(*cobra.Command, []string) error {
		if o.output != "table" && o.output != "json" {
			return usageError{fmt.Errorf("--output %s: want table or json", o.output)}
		}
		return nil
	}
}

// group is a command that only has others below it.
func group(use, short string, below ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, RunE: func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usageError{fmt.Errorf("unknown command %q; see %s --help", args[0], cmd.CommandPath())}
		}
		return cmd.Help()
	}}
	cmd.AddCommand(below...)
	return cmd
}

// oneArg is for commands that act on one thing, which is what in words.
func oneArg(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return usageError{fmt.Errorf("%s takes %s, got %d arguments", cmd.CommandPath(), what, len(args))}
		}
		return nil
	}
}

// desk is what the commands act with.
type desk struct {
	cfg   *Config
	store *store.Store
}

// desk opens the tables, which must be there.
func (o *options) desk(ctx context.Context) (*desk, error) {
	cfg, err := o.load()
	if err != nil {
		return nil, err
	}
	st, err := store.Open(ctx, store.Config{
		URL: func() (string, error) { return cfg.Database.URL.Reveal(), nil }, Slot: cfg.CDC.Slot, Instance: cfg.CDC.Instance, Logger: zap.NewNop(),
	})
	if err != nil {
		return nil, failed{said(err), exitUsage}
	}
	if err := st.Ready(ctx); err != nil {
		st.Close()
		if errors.Is(err, store.ErrNoSchema) {
			return nil, fmt.Errorf("%w: start walhook run, or run the SQL that `walhook init` prints", err)
		}
		return nil, said(err)
	}
	return &desk{cfg: cfg, store: st}, nil
}

func (d *desk) close() { d.store.Close() }

// said is an error of the database in the words of walhook check.
func said(err error) error {
	f := cdc.FaultOf(err)
	text := f.Cause()
	if f.State == cdc.Connecting && f.Err != nil {
		text = f.Err.Error()
	}
	if f.Remedy != "" {
		text += "\n    → " + f.Remedy
	}
	return errors.New(text)
}

// writeJSON prints one value. What a terminal would obey stands in it as an escape.
func writeJSON(w io.Writer, v any, indent string) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", indent)
	if err := enc.Encode(v); err != nil {
		return err
	}
	var out strings.Builder
	for text := b.String(); text != ""; {
		r, n := utf8.DecodeRuneInString(text)
		switch {
		case r == '\n' || unicode.IsPrint(r):
			out.WriteString(text[:n])
		case r > 0xffff:
			high, low := (r-0x10000)>>10+0xd800, (r-0x10000)&0x3ff+0xdc00
			fmt.Fprintf(&out, `\u%04x\u%04x`, high, low)
		default:
			fmt.Fprintf(&out, `\u%04x`, r)
		}
		text = text[n:]
	}
	_, err := io.WriteString(w, out.String())
	return err
}

// printable is text that others have written, on one line and with nothing in it that a terminal
// would obey.
func printable(s string) string { return escape(s, "") }

func escape(s, keep string) string {
	clean := func(r rune) bool { return unicode.IsPrint(r) || strings.ContainsRune(keep, r) }
	if utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !clean(r) }) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case clean(r):
			b.WriteRune(r)
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\t':
			b.WriteString(`\t`)
		case r == '\r':
			b.WriteString(`\r`)
		case r < 0x80:
			fmt.Fprintf(&b, `\x%02x`, r)
		case r <= 0xffff:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			fmt.Fprintf(&b, `\U%08x`, r)
		}
		i += n
	}
	return b.String()
}

// page is printable for text of several lines.
func page(s string) string { return escape(strings.ReplaceAll(s, "\r\n", "\n"), "\n\t") }

// columns is a table whose cells line up.
type columns struct{ w *tabwriter.Writer }

func newColumns(w io.Writer, names ...string) *columns {
	c := &columns{tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)}
	cells := make([]any, len(names))
	for i, name := range names {
		cells[i] = name
	}
	if len(names) > 0 {
		c.row(cells...)
	}
	return c
}

// row prints its cells: a time as RFC 3339, an empty cell as a dash.
func (c *columns) row(cells ...any) {
	texts := make([]string, len(cells))
	for i, cell := range cells {
		switch cell := cell.(type) {
		case time.Time:
			texts[i] = when(cell)
		default:
			texts[i] = printable(fmt.Sprint(cell))
		}
		if texts[i] == "" {
			texts[i] = "-"
		}
	}
	fmt.Fprintln(c.w, strings.Join(texts, "\t"))
}

func (c *columns) flush() error { return c.w.Flush() }

// when is a time as everything prints it; empty where there is none.
func when(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// optional is a time in JSON; null where there is none.
func optional(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

// age is how long ago something was, roughly; empty where it was not.
func age(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	switch d := max(time.Since(t), 0); {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 2*day:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	default:
		return fmt.Sprintf("%dd", int(d/day))
	}
}

// payload is an event's data in JSON: itself where it is JSON, else as text.
func payload(e *outbox.Event) any {
	if e.JSON && json.Valid(e.Data) {
		return json.RawMessage(e.Data)
	}
	return strings.ToValidUTF8(string(e.Data), "\uFFFD")
}
