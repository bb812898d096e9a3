package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/sender/sendertest"
)

// told lists the types of notices that came, with whom each is about.
func told(requests []sendertest.Request) map[string]int {
	all := map[string]int{}
	for _, r := range requests {
		var about struct{ Endpoint string }
		_ = json.Unmarshal(r.Data, &about)
		all[r.Type+" "+about.Endpoint]++
	}
	return all
}

// Who asks for them by name hears of what happens to endpoints, once each, also of what a restart has
// cut; who asks for everything does not.
func TestWhatHappensToEndpointsIsItselfAnEvent(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ops, all, gone, down, picky := newReceiver(t), newReceiver(t), newReceiver(t), newReceiver(t), newReceiver(t)
	gone.Script(sendertest.Status(http.StatusGone))
	down.Refuse()
	config := b.loopback(b.config(
		endpoint("ops", ops, `, events: ["walhook.endpoint.*", walhook.delivery.dead]`), endpoint("all", all, ""),
		endpoint("gone", gone, ""), endpoint("down", down, ", breaker: {consecutive_failures: 2}"),
		endpoint("picky", picky, `, events: ["order.*"], filter: "data.n > 0"`)))
	p := start(t, config).streaming()
	b.exec("insert into walhook.endpoints (id, url) values ('invalid', 'nothing')")
	b.insert("k")
	b.exec("insert into outbox (aggregatetype, aggregateid, type, payload) values ('order', 'odd', 'order.changed', '{\"m\":1}')")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	want := map[string]int{
		"walhook.endpoint.disabled gone": 1, "walhook.endpoint.invalid invalid": 1, "walhook.endpoint.opened down": 1, "walhook.delivery.dead picky": 1,
	}
	require.NoError(t, ops.WaitUntil(ctx, func(got []sendertest.Request) bool {
		have := told(got)
		for what := range want {
			if have[what] == 0 {
				return false
			}
		}
		return true
	}))
	p.kill()
	require.NoError(t, down.Reopen())
	p = start(t, config).streaming()
	b.insert("again")
	require.NoError(t, down.WaitFor(ctx, 3))
	p.stop()
	for what, n := range told(ops.Requests()) {
		if want[what] == 0 && what != "walhook.endpoint.closed down" {
			t.Errorf("%d times %q", n, what)
		}
	}
	for what := range told(all.Requests()) {
		require.NotContains(t, what, "walhook.")
	}
	for _, r := range ops.Requests() {
		require.NoError(t, r.Invalid)
	}
}

// An endpoint that cannot be told is not told of that, and a notice that dies makes no other.
func TestNoticesMakeNoNotices(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ops, other := newReceiver(t), newReceiver(t)
	ops.Refuse()
	events := `, events: ["*", "walhook.*"], breaker: {consecutive_failures: 1}, retry: {schedule: [10ms]}`
	p := start(t, b.config(endpoint("ops", ops, events), endpoint("other", other, events))).streaming()
	for i := range 5 {
		b.insert(fmt.Sprint(i))
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	require.NoError(t, other.WaitUntil(ctx, func(got []sendertest.Request) bool {
		return told(got)["walhook.endpoint.opened ops"] > 0 && told(got)["walhook.delivery.dead ops"] >= 5
	}))
	eventually(t, "nothing is parked", func() bool { return b.ask("select count(*) from walhook.deliveries where state <> 'dead'") == 0 })
	p.stop()
	require.Zero(t, b.ask("select count(*) from walhook.deliveries where endpoint_id = 'other'"))
	require.Equal(t, 5, told(other.Requests())["walhook.delivery.dead ops"])
}
