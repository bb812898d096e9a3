package main

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
)

// tailed is a walhook tail under way.
type tailed struct {
	out  *logBuffer
	stop context.CancelFunc
	code chan int
}

func (c *counter) tail(args ...string) *tailed {
	c.t.Helper()
	ctx, stop := context.WithCancel(c.t.Context())
	x := &tailed{out: &logBuffer{changed: make(chan struct{})}, stop: stop, code: make(chan int, 1)}
	errs := &logBuffer{changed: make(chan struct{})}
	go func() { x.code <- run(ctx, append([]string{"tail", "-c", c.path}, args...), noEnv, x.out, errs) }()
	c.t.Cleanup(stop)
	errs.line(c.t, "reading from")
	return x
}

func TestTailShowsWhatWouldBeSentAndLeavesEverythingAlone(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.timed()
	rx := newReceiver(t)
	c := &counter{b, b.config(endpoint("billing", rx, ""), endpoint("paid", rx, `, events: ["order.paid"]`), endpoint("acme", rx, ", tenant: acme"))}
	c.sources("{table: outbox, columns: {tenant: tenant_id}}")
	start(t, c.path).streaming()
	own := fmt.Sprintf("select (confirmed_flush_lsn - '0/0')::bigint from pg_replication_slots where slot_name = '%s'", b.slot)
	require.NotZero(t, b.ask(own))
	x, lines, only := c.tail(), c.tail("-o", "json"), c.tail("--endpoint", "paid", "--type", "order.*", "--tenant", "")
	require.EqualValues(t, 3, b.ask("select count(*) from pg_replication_slots where temporary and database = current_database()"))

	b.past(1, 2)
	b.exec("insert into outbox (aggregatetype, aggregateid, type, payload, tenant_id) values ('order', E'k\\u0007', 'order.sent', '{}', 'nobody')")
	b.exec("insert into outbox (aggregatetype, aggregateid, type, payload) values ('order', 'k', '', '{}')")
	requireAtLeast(t, rx, 3)
	x.out.line(t, "  1  order.paid  key k1  tenant -  → billing, paid")
	x.out.line(t, "  2  order.changed  key k2  tenant -  → billing")
	x.out.line(t, `  3  order.sent  key k\x07  tenant nobody  → nobody`)
	x.out.line(t, "✗ type is empty")
	var ev shownEvent
	require.NoError(t, json.Unmarshal([]byte(lines.out.line(t, `"id":"1"`)), &ev))
	require.Equal(t, []string{"billing", "paid"}, ev.Endpoints)
	require.Equal(t, map[string]any{"n": 1.0, "key": "k1"}, ev.Data)
	require.Regexp(t, `^[0-9A-F]+/[0-9A-F]+:1$`, ev.Position)
	lines.out.line(t, `"unmappable":"type is empty"`)
	only.out.line(t, "  1  order.paid")

	b.insert("last")
	x.out.line(t, "key last")
	for _, x := range []*tailed{x, lines, only} {
		x.stop()
		require.Equal(t, exitDone, <-x.code)
	}
	require.NotContains(t, only.out.String(), "order.changed")
	eventually(t, "the slots to be gone", func() bool {
		return b.ask("select count(*) from pg_replication_slots where database = current_database()") == 1
	})
	requireAtLeast(t, rx, 4)
	require.EqualValues(t, 1, b.ask("select count(*) from walhook.deliveries"), "the row that cannot be mapped, once")
	require.EqualValues(t, 1, b.ask("select count(*) from walhook.checkpoints"))
}

func TestTailSaysWhatIsMissing(t *testing.T) {
	t.Parallel()
	c := newCounter(t, `{id: a, url: "https://a.example"}`)
	_, errs := c.does(exitFailed, "tail")
	require.Contains(t, errs, "publication "+c.slot+" does not exist")
	_, errs = c.does(exitFailed, "tail", "--endpoint", "b")
	require.Contains(t, errs, `there is no endpoint "b"`)
	require.Zero(t, c.ask("select count(*) from pg_replication_slots where database = current_database()"))
}
