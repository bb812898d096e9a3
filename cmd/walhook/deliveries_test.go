package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/sender/sendertest"
)

// dead writes a dead delivery for an endpoint, and its event where it is not there.
func (b *bench) dead(endpoint, event, age string) {
	b.t.Helper()
	b.exec(fmt.Sprintf(`
		insert into walhook.events (id, type, key, tenant, time, data, is_json, bytes, commit_lsn, ordinal, committed_at)
		values ('%[2]s', 'order.changed', 'k', '', now() - interval '%[3]s', '{"key":"k","n":1,"bell":"\u0007"}', true, 20, '0/1', 1, now() - interval '%[3]s')
		on conflict do nothing;
		insert into walhook.deliveries (endpoint_id, event_id, state, reason, attempts, last_status, last_error, order_key, commit_lsn, ordinal)
		values (nullif('%[1]s', ''), '%[2]s', 'dead', 'status', 11, 500, E'500 \u009b31m', 'k', '0/1', 1)`, endpoint, event, age))
}

func TestDeliveriesAreListedAndShown(t *testing.T) {
	t.Parallel()
	c := newCounter(t, `{id: a, url: "https://a.example"}`)
	c.dead("a", "e1", "1 hour")
	c.dead("a", "e2", "1 hour")
	c.dead("", "e3", "1 hour")
	out, _ := c.does(exitDone, "deliveries", "list", "--endpoint", "a", "--state", "dead", "--type", "order.*", "--since", "1h")
	require.Regexp(t, `(?m)^ID +ENDPOINT +STATE +REASON +ATTEMPTS +STATUS +DUE +CREATED +EVENT +TYPE +KEY$`, out)
	require.Regexp(t, `(?m)^2 +a +dead +status +11 +500 +- +\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ +e2 +order\.changed +k$`, out)
	require.Equal(t, 3, strings.Count(out, "\n"))
	out, _ = c.does(exitDone, "deliveries", "list", "--limit", "1")
	require.Contains(t, out, "There are more than these 1")
	var list struct {
		Deliveries []shownDelivery
		More       bool
	}
	c.json(&list, "deliveries", "list", "--limit", "2")
	require.True(t, list.More)
	require.Nil(t, list.Deliveries[0].Endpoint)
	require.Equal(t, "e2", list.Deliveries[1].Event)

	out, _ = c.does(exitDone, "deliveries", "show", "1")
	require.Regexp(t, `(?m)^last error: +500 \\u009b31m$`, out)
	require.Contains(t, out, `{"key":"k","n":1,"bell":"\u0007"}`)
	out, _ = c.does(exitDone, "deliveries", "show", "1", "-o", "json")
	require.Contains(t, out, `500 \u009b31m`)
	require.NotContains(t, out, "\u009b")
	_, errs := c.does(exitFailed, "deliveries", "show", "99")
	require.Contains(t, errs, "there is no delivery 99")
	for _, args := range [][]string{{"show", "x"}, {"list", "--state", "gone"}, {"list", "--since", "yesterday"}, {"list", "--endpoint", ""}, {"list", "--limit", "0"}} {
		c.does(exitUsage, append([]string{"deliveries"}, args...)...)
	}
}

func TestRetryLeavesAloneWhatItCannotHelp(t *testing.T) {
	t.Parallel()
	c := newCounter(t, `{id: a, url: "https://a.example", retry: {max_age: 2d}}`)
	c.dead("a", "e1", "1 hour")
	c.dead("a", "old", "3 days")
	c.dead("gone", "e1", "1 hour")
	c.dead("", "e2", "1 hour")
	for _, command := range []string{"retry", "discard"} {
		_, errs := c.does(exitUsage, "deliveries", command)
		require.Contains(t, errs, "wants ids, a filter, or --all")
		c.does(exitUsage, "deliveries", command, "--endpoint", "")
	}
	out, _ := c.does(exitDone, "deliveries", "retry", "--all", "--dry-run")
	require.Equal(t, `1 of 4 deliveries would be retried
1 left alone: endpoint gone is gone
1 left alone: it is older than retry.max_age of endpoint a (2d) and would die again at once: raise that, or use walhook replay --id
1 left alone: its row could not be mapped: mend the row or the configuration, and insert it again
`, out)
	require.EqualValues(t, 4, c.ask("select count(*) from walhook.deliveries where state = 'dead'"))
	_, errs := c.does(exitFailed, "deliveries", "retry", "1", "3", "77")
	require.Contains(t, errs, "2 of 3 delivery ids: not retried")
	require.EqualValues(t, 1, c.ask("select count(*) from walhook.deliveries where state = 'parked' and attempts = 0 and next_attempt_at <= now()"))
}

func TestDiscardTakesTheEventWithItsLastDelivery(t *testing.T) {
	t.Parallel()
	c := newCounter(t)
	c.dead("a", "e1", "1 hour")
	c.dead("b", "e1", "1 hour")
	c.dead("b", "e2", "1 hour")
	out, _ := c.does(exitDone, "deliveries", "discard", "--endpoint", "b", "--dry-run", "-o", "json")
	require.Contains(t, out, `"done": 2`)
	require.EqualValues(t, 3, c.ask("select count(*) from walhook.deliveries"))
	out, _ = c.does(exitDone, "deliveries", "discard", "--endpoint", "b")
	require.Equal(t, "2 of 2 deliveries discarded\n", out)
	require.EqualValues(t, 1, c.ask("select count(*) from walhook.events where id = 'e1'"))
	require.EqualValues(t, 1, c.ask("select count(*) from walhook.events"))
	c.does(exitDone, "deliveries", "discard", "--all")
	require.Zero(t, c.ask("select count(*) from walhook.events"))
}

func TestRunningWalhookSendsWhatWasRetriedAtOnce(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := newReceiver(t)
	rx.Script(sendertest.Times(3, sendertest.Status(400))...)
	c := &counter{b, b.config(endpoint("billing", rx, ", retry: {dead_on: [400], schedule: [1h]}"))}
	start(t, c.path).streaming()
	for _, key := range []string{"one", "two", "three"} {
		b.insert(key)
	}
	eventually(t, "three dead deliveries", func() bool { return b.ask("select count(*) from walhook.deliveries where state = 'dead'") == 3 })
	out, _ := c.does(exitDone, "deliveries", "retry", "--state", "dead")
	require.Equal(t, "3 of 3 deliveries retried\n", out)
	requireAll(t, rx, 3)
	eventually(t, "nothing to be stored", func() bool {
		return b.ask("select count(*) from walhook.deliveries") == 0 && b.ask("select count(*) from walhook.events") == 0
	})

	rx.Script(sendertest.Status(500))
	b.insert("four")
	eventually(t, "it to be parked", func() bool {
		return b.ask("select count(*) from walhook.deliveries where state = 'parked' and next_attempt_at > now() + interval '30 min'") == 1
	})
	c.does(exitDone, "deliveries", "retry", "--reason", "status")
	requireAll(t, rx, 4)
}
