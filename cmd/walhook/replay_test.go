package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/sender/sendertest"
)

// timed gives the outbox columns of time and tenant.
func (b *bench) timed() {
	b.t.Helper()
	b.exec("alter table outbox add column created_at timestamptz not null default now(), add column tenant_id text not null default ''")
}

// past commits rows from to to, each of a minute of the first day of 2026 and one of 3 keys.
func (b *bench) past(from, to int) {
	b.t.Helper()
	b.exec(fmt.Sprintf(`insert into outbox (aggregatetype, aggregateid, type, payload, created_at)
		select 'order', 'k' || i %% 3, case i %% 2 when 0 then 'order.changed' else 'order.paid' end,
			jsonb_build_object('key', 'k' || i %% 3, 'n', i)::text, timestamptz '2026-01-01 00:00Z' + i * interval '1 min'
		from generate_series(%d, %d) i`, from, to))
}

func replayed(r *sendertest.Receiver) (all []sendertest.Request) {
	for _, q := range succeeded(r) {
		if q.Header.Get("Webhook-Replay") == "true" {
			all = append(all, q)
		}
	}
	return all
}

// What is replayed waits here until all live events have come: so these cannot have waited for it.
func TestReplaySendsWhatTheDryRunCountedWhileLiveEventsGoOn(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.timed()
	live := make(chan struct{})
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}, Respond: func(q sendertest.Request) sendertest.Answer {
		if q.Header.Get("Webhook-Replay") != "" {
			return sendertest.On(live, sendertest.Status(204))
		}
		return sendertest.Status(204)
	}})
	c := &counter{b, b.config(endpoint("billing", rx, ""))}
	start(t, c.path).streaming()
	b.past(1, 300)
	requireAll(t, rx, 300)
	first := map[string]sendertest.Request{}
	for _, q := range rx.Requests() {
		first[q.ID] = q
		require.Empty(t, q.Header.Get("Webhook-Replay"))
	}

	span := []string{"replay", "--since", "2026-01-01T01:00:00Z", "--until", "2026-01-01T02:40:00+00:00", "--rate", "100/s"}
	var sum replaySum
	c.json(&sum, append(span, "--dry-run")...)
	require.EqualValues(t, 100, sum.Matched, "01:00 is included, 02:40 is not")
	require.EqualValues(t, 100, sum.Endpoints["billing"].Deliveries)
	require.Len(t, rx.Requests(), 300)

	type ended struct {
		code      int
		out, errs string
	}
	done := make(chan ended, 1)
	begin := time.Now()
	go func() {
		var out, errs bytes.Buffer
		code := run(context.Background(), append(span, "-c", c.path, "-o", "json"), noEnv, &out, &errs)
		done <- ended{code, out.String(), errs.String()}
	}()
	requireAtLeast(t, rx, 301) // the replay is under way
	b.produce(2, 100, 5)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	require.NoError(t, rx.WaitUntil(ctx, func(all []sendertest.Request) bool {
		n := 0
		for _, q := range all {
			if q.Header.Get("Webhook-Replay") == "" && q.Status == http.StatusNoContent {
				n++
			}
		}
		return n == 500
	}))
	require.Empty(t, replayed(rx))
	close(live)
	e := <-done
	require.Equal(t, exitDone, e.code, e.out+e.errs)
	require.Contains(t, e.out, `"delivered": 100`)
	require.GreaterOrEqual(t, time.Since(begin), 99*10*time.Millisecond, "100 requests at 100 a second")

	got := replayed(rx)
	require.Len(t, got, 100)
	last := map[string]int{}
	for _, q := range got {
		was := first[q.ID]
		require.Equal(t, string(was.Body), string(q.Body), "the same body as at first")
		var n int
		var key string
		_, err := fmt.Sscanf(string(q.Data), `{"n": %d, "key": %q}`, &n, &key)
		require.NoError(t, err, string(q.Data))
		require.Greater(t, n, last[key], "in the order of the key")
		require.GreaterOrEqual(t, n, 60)
		require.Less(t, n, 160)
		last[key] = n
	}
	require.EqualValues(t, 0, b.ask("select count(*) from walhook.deliveries"))
}

func TestReplayPicksByIdKeyTypeAndTenant(t *testing.T) {
	t.Parallel()
	a, paid, ofAcme := newReceiver(t), newReceiver(t), newReceiver(t)
	c := newCounter(t, endpoint("a", a, ""), endpoint("paid", paid, `, events: ["*.paid"]`), endpoint("acme", ofAcme, ", tenant: acme"))
	c.timed()
	c.sources("{table: outbox, id_prefix: o_, columns: {tenant: tenant_id}}")
	c.past(1, 30)
	c.exec("update outbox set tenant_id = 'acme' where id = 7")
	dry := func(want map[string]int64, args ...string) {
		t.Helper()
		var sum replaySum
		c.json(&sum, append([]string{"replay", "--dry-run"}, args...)...)
		got := map[string]int64{}
		for id, n := range sum.Endpoints {
			got[id] = n.Deliveries
		}
		require.Equal(t, want, got, args)
	}
	dry(map[string]int64{"a": 2, "paid": 1}, "--id", "o_1,o_2")
	dry(map[string]int64{"acme": 1}, "--id", "o_7,7,x")
	dry(map[string]int64{"a": 9, "paid": 4, "acme": 1}, "--key", "k1")
	dry(map[string]int64{"a": 14, "paid": 14, "acme": 1}, "--since", "2026-01-01T00:00:00Z", "--type", "*.paid")
	dry(map[string]int64{"a": 15}, "--since", "2026-01-01T00:00:00Z", "--type", "order.changed")
	dry(map[string]int64{"acme": 1}, "--since", "2026-01-01T00:00:00Z", "--tenant", "acme")
	dry(map[string]int64{"paid": 14}, "--since", "2026-01-01T00:00:00Z", "--endpoint", "paid")
	dry(map[string]int64{}, "--until", "2025-01-01T00:00:00Z", "--key", "k1")

	out, _ := c.does(exitDone, "replay", "--id", "o_1,o_2,o_7", "--rate", "6000/m")
	require.Regexp(t, `(?m)^3 events$`, out)
	require.Regexp(t, `(?m)^ENDPOINT +DELIVERIES +DELIVERED +FAILED$`, out)
	require.Regexp(t, `(?m)^a +2 +2 +0$`, out)
	require.Len(t, replayed(a), 2)
	require.Len(t, replayed(paid), 1)
	require.Len(t, replayed(ofAcme), 1)
	require.Equal(t, "o_7", replayed(ofAcme)[0].ID)
}

// sources puts other sources into the config.
func (c *counter) sources(list string) {
	c.t.Helper()
	text, err := os.ReadFile(c.path)
	require.NoError(c.t, err)
	changed := strings.Replace(string(text), "outbox: [{table: outbox}]", "outbox: ["+list+"]", 1)
	require.NotEqual(c.t, string(text), changed)
	require.NoError(c.t, os.WriteFile(c.path, []byte(changed), 0o600))
}

func TestReplayTriesAgainAndTellsWhatFailed(t *testing.T) {
	t.Parallel()
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}, Respond: func(q sendertest.Request) sendertest.Answer {
		switch {
		case q.ID == "2":
			return sendertest.Status(400)
		case q.ID == "3" && q.Attempt == 1:
			return sendertest.Status(429, "Retry-After", "1")
		}
		return sendertest.Status(204)
	}})
	c := newCounter(t, endpoint("a", rx, ", retry: {dead_on: [400]}"))
	c.timed()
	c.past(1, 6)
	out, errs := c.does(exitFailed, "replay", "--since", "2026-01-01T00:00:00Z", "--rate", "1000/s")
	require.Regexp(t, `(?m)^a +6 +5 +1$`, out)
	require.Regexp(t, `(?m)^2 +a +400 +400 Bad Request$`, out)
	require.Contains(t, errs, "1 event could not be delivered; to send them again:\n    walhook replay --endpoint a --id 2\n")
	require.Len(t, replayed(rx), 5)
	for _, q := range rx.Requests() {
		if q.ID == "3" && q.Attempt == 2 {
			return
		}
	}
	t.Fatal("the third was not tried again")
}

func TestReplayGivesUpOnAnEndpointAndGoesOnWithTheOthers(t *testing.T) {
	t.Parallel()
	well := newReceiver(t)
	sick := sendertest.New(t, sendertest.Config{Respond: func(sendertest.Request) sendertest.Answer { return sendertest.Status(410) }})
	c := newCounter(t, endpoint("sick", sick, ", concurrency: 1"), endpoint("well", well, ""))
	c.timed()
	c.past(1, 40)
	_, errs := c.does(exitFailed, "replay", "--since", "2026-01-01T00:00:00Z", "--rate", "1000/s")
	require.Contains(t, errs, "walhook replay --endpoint sick --since 2026-01-01T00:01:00Z")
	require.Len(t, replayed(well), 40)
	require.Len(t, sick.Requests(), giveUpAfter)
}

func TestReplayInterruptedSaysWhereToGoOn(t *testing.T) {
	t.Parallel()
	ctx, interrupt := context.WithCancel(t.Context())
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}, OnRequest: func(q sendertest.Request) {
		if q.Turn == 5 {
			interrupt()
		}
	}})
	c := newCounter(t, endpoint("a", rx, ", ordering: all"))
	c.timed()
	c.past(1, 200)
	var out, errs bytes.Buffer
	code := run(ctx, []string{"replay", "--since", "2026-01-01T00:00:00Z", "--rate", "1000/s", "-c", c.path}, noEnv, &out, &errs)
	require.Equal(t, exitFailed, code)
	require.Regexp(t, `(?m)^a +\d+ +5 +0$`, out.String())
	require.Contains(t, errs.String(), "to go on: walhook replay --since 2026-01-01T00:06:00Z")
	c.does(exitDone, "replay", "--since", "2026-01-01T00:06:00Z", "--rate", "10000/s")
	require.Len(t, replayed(rx), 200, "nothing twice, nothing missing")
}

func TestReplaySaysWhatItCannot(t *testing.T) {
	t.Parallel()
	rx := newReceiver(t)
	c := newCounter(t, endpoint("a", rx, ""))
	c.insert("k")
	no := func(code int, says string, args ...string) {
		t.Helper()
		_, errs := c.does(code, append([]string{"replay"}, args...)...)
		require.Contains(t, errs, says)
	}
	no(exitUsage, "nothing tells the time of its events; name their column in columns.time, or pick events by --id or --key alone", "--since", "1h")
	no(exitUsage, "say which events")
	no(exitUsage, "--rate", "--id", "1", "--rate", "fast")
	no(exitUsage, "--since", "--since", "yesterday")
	no(exitUsage, "--until is not behind --since", "--since", "1h", "--until", "2h")
	no(exitUsage, "--endpoint is empty", "--id", "1", "--endpoint", "")
	no(exitFailed, `there is no endpoint "b"`, "--id", "1", "--endpoint", "b")
	c.does(exitDone, "replay", "--id", "1")
	require.Len(t, replayed(rx), 1)
	c.does(exitDone, "endpoints", "pause", "a")
	no(exitFailed, "endpoint a is paused (by command), so nothing is sent to it", "--id", "1", "--endpoint", "a")
	no(exitFailed, "there is no endpoint to send to", "--id", "1")
	c.does(exitDone, "endpoints", "resume", "a")
	c.sources("{messages: walhook}")
	no(exitFailed, "messages of pg_logical_emit_message are kept nowhere", "--id", "1")
}
