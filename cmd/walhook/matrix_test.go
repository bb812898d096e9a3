package main

import (
	"context"
	"fmt"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/sender/sendertest"
)

// What is here holds the cases of docs/faults.md that need the whole program.

// A publication of all tables has our own writes in it. They are no events, must not cause writes
// that cause writes, and neither do tables that are nobody's business, one without columns among them.
func TestAPublicationOfAllTablesMakesNoLoop(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.exec("create publication " + b.slot + " for all tables; create table nothing (); create table busy (id int primary key, n int)")
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	rx.Refuse()
	p := start(t, b.config(endpoint("billing", rx, ""))).streaming()
	b.produce(2, 100, 5)
	b.exec("insert into nothing default values; insert into busy values (1, 1); update busy set n = 2; truncate busy, nothing")
	eventually(t, "the deliveries to be parked", func() bool { return b.ask("select count(*) from walhook.deliveries") == 200 })
	require.NoError(t, rx.Reopen())
	requireAll(t, rx, 200)
	require.Zero(t, repeats(rx))
	eventually(t, "walhook.deliveries to be empty", func() bool { return b.ask("select count(*) from walhook.deliveries") == 0 })

	// Each checkpoint is itself a change in the stream. It is not worth another one.
	quiet, last := 0, int64(-1)
	eventually(t, "no checkpoint to follow for twice the time between two", func() bool {
		if at := b.ask("select (extract(epoch from max(updated_at)) * 1000000)::bigint from walhook.checkpoints"); at != last {
			quiet, last = 0, at
		}
		quiet++
		return quiet > 100 // looks, at least 20 ms apart
	})
	_, metrics := p.get("/metrics")
	require.Contains(t, metrics, `walhook_events_total{outcome="routed"} 200`)
	require.Contains(t, metrics, `walhook_events_total{outcome="unmappable"} 0`)
	p.stop()
}

// Whatever the app does to its own rows afterwards, what they became is sent.
func TestAPurgeOfTheOutboxTakesNoEventAway(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	rx.Refuse()
	config := b.config(endpoint("billing", rx, ""))
	p := start(t, config).streaming()
	ctx, cancel := context.WithCancel(t.Context())
	purged := make(chan error, 1)
	purge := b.conn()
	go func() {
		for n := 0; ctx.Err() == nil; n++ {
			sql := "delete from outbox"
			if n%7 == 6 {
				sql = "truncate outbox"
			}
			if _, err := purge.Exec(context.Background(), sql); err != nil {
				purged <- err
				return
			}
		}
		purged <- nil
	}()
	b.produce(2, 300, 5)
	eventually(t, "something to be parked", func() bool { return b.ask("select count(*) from walhook.deliveries") > 0 })
	p.kill()
	cancel()
	require.NoError(t, <-purged)
	b.exec("truncate outbox")
	require.NoError(t, rx.Reopen())
	start(t, config).streaming()
	requireAll(t, rx, 600)
}

// A row may be of any size and content: it is sent as it was written, or it is a dead delivery
// that says why, and what stands behind it is sent.
func TestRowsOfAnySizeAndContent(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.exec("alter table outbox alter payload type json using payload::json")
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	p := start(t, b.config(endpoint("billing", rx, ""))).streaming()
	insert := func(key, kind, payload string) {
		b.exec("insert into outbox (aggregateid, type, payload) values (" + key + ", " + kind + ", " + payload + ")")
	}
	const odd = `{"n" : 1234567890123456789012345678901234567890.10, "a":1, "a":2,  "é":"\u0000\ud800", "z":[ ]}`
	insert("'k'", "'odd'", "'"+odd+"'")
	insert("null", "'no.key'", "'1'")
	insert("'k'", "'no.payload'", "null")
	insert("'k'", "null", "'1'")
	insert("repeat('k', 65536)", "'long.key'", "'1'")
	insert("'k'", "'at.the.limit'", "to_json(repeat('x', 1048576 - 200))")
	insert("'k'", "'too.large'", "to_json(repeat('x', 1048576))")
	insert("'k'", "'far.too.large'", "to_json(repeat('x', 20 * 1048576))")
	insert("'k'", "'last'", "'1'")

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	require.NoError(t, rx.WaitUntil(ctx, func(got []sendertest.Request) bool { return len(got) >= 5 }))
	bodies := map[string]string{}
	for _, q := range rx.Requests() {
		bodies[q.Type] = string(q.Body)
	}
	require.Contains(t, bodies["odd"], `,"data":`+odd+`}`)
	require.Contains(t, bodies["no.key"], `,"data":1}`)
	require.Contains(t, bodies["no.payload"], `,"data":null}`)
	require.Contains(t, bodies, "at.the.limit")
	require.Contains(t, bodies, "last")
	require.Len(t, bodies, 5)
	eventually(t, "the dead deliveries", func() bool { return b.ask("select count(*) from walhook.deliveries where state = 'dead'") == 4 })
	for _, of := range []struct{ reason, says string }{
		{"unmappable", "type is NULL"}, {"unmappable", "key is too long"}, {"too_large", "max_payload is 1048576"},
	} {
		require.NotZero(t, b.ask(fmt.Sprintf("select count(*) from walhook.deliveries where reason = '%s' and last_error like '%%%s%%'", of.reason, of.says)), of.says)
	}
	code, ready := p.get("/readyz")
	require.Equal(t, http.StatusOK, code, ready)
	p.stop()
}
