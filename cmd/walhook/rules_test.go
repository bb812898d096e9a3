package main

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/sender/sendertest"
)

// Of a hundred orders every tenth lacks what a filter needs, every other tenth what a transform
// needs, and every twentieth is no order at all.
const oddOrders = `insert into outbox (aggregateid, type, payload)
	select 'k' || n % 7, 'order.changed', case n % 10
		when 3 then '{"n":' || n || '}'
		when 7 then '{"n":' || n || ',"amount":"' || n || '"}'
		when 9 then case n % 20 when 19 then 'no json' else '{"n":' || n || ',"amount":1e400,"email":"a"}' end
		else '{"n":' || n || ',"amount":' || n || '.10,"email":"a@example.com","big":12345678901234567890123}' end
	from generate_series(1, 100) n`

func TestWhatARuleCannotJudgeIsADeadDeliveryAndTheRestIsDelivered(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	filtered := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	transformed := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	typed := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	config := b.config(
		endpoint("filtered", filtered, `, filter: "data.amount > 50"`),
		endpoint("transformed", transformed, `, format: raw, transform: {form: "{'contact': {'email': data.email, 'big': data.big, 'amount': data.amount}}", `+
			`headers: "{'X-Number': string(data.n)}", method: PUT, url: "'/contacts/' + url.encode(data.email)"}`),
		endpoint("typed", typed, `, format: raw, filter: "type == 'order.changed' || data.x"`))
	p := start(t, config).streaming()
	b.exec(oddOrders)

	// 1 to 100 without those of 3, 7 and 9: 70, of which 36 are more than 50.
	requireAll(t, filtered, 36)
	requireAll(t, transformed, 70)
	requireAll(t, typed, 100)
	eventually(t, "the dead deliveries", func() bool {
		return b.ask("select count(*) from walhook.deliveries where state = 'dead'") == 30+30
	})
	count := func(endpoint, reason, detail string) int64 {
		return b.ask(fmt.Sprintf("select count(*) from walhook.deliveries where state = 'dead' and attempts = 0 and endpoint_id = '%s' and reason = '%s' and last_error like '%s'", endpoint, reason, detail))
	}
	require.EqualValues(t, 10, count("filtered", "filter_failed", "filter: no such key: amount"))
	require.EqualValues(t, 10, count("filtered", "filter_failed", "filter: no such overload%"))
	require.EqualValues(t, 5, count("filtered", "filter_failed", "filter: the number 1e400 is out of range"))
	require.EqualValues(t, 5, count("filtered", "filter_failed", "filter: the payload is not JSON"))
	require.EqualValues(t, 25, count("transformed", "transform_failed", "transform.form: no such key: %"))
	require.EqualValues(t, 5, count("transformed", "transform_failed", "transform.form: the payload is not JSON"))
	require.Zero(t, b.ask("select count(*) from walhook.deliveries where state <> 'dead'"))

	for _, r := range transformed.Requests() {
		require.NoError(t, r.Invalid)
		require.Equal(t, "PUT", r.Method)
		require.Equal(t, "/contacts/a%40example.com", r.Path)
		n := r.Header.Get("X-Number")
		require.Equal(t, "contact%5Bamount%5D="+n+".10&contact%5Bbig%5D=12345678901234567890123&contact%5Bemail%5D=a%40example.com", string(r.Body))
	}
	requireKeyOrder(t, transformed)
	p.stop()

	// What was dead is not born again, and what was filtered out stays so.
	p = start(t, config).streaming()
	b.exec("insert into outbox (aggregateid, type, payload) values ('k', 'order.changed', '{\"n\":101,\"amount\":101.0,\"email\":\"b\",\"big\":1}')")
	requireAll(t, filtered, 37)
	requireAll(t, transformed, 71)
	require.EqualValues(t, 60, b.ask("select count(*) from walhook.deliveries"))
	p.stop()
}

// The numbers of a key grow in the order of the commits.
func requireKeyOrder(t *testing.T, r *sendertest.Receiver) {
	t.Helper()
	last := map[int]int{}
	for _, q := range r.Requests() {
		var n int
		_, err := fmt.Sscan(q.Header.Get("X-Number"), &n)
		require.NoError(t, err)
		require.Greater(t, n, last[n%7])
		last[n%7] = n
	}
}

func TestFiltersHoldForASnapshotToo(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.exec(oddOrders)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	p := start(t, b.cdc(b.config(endpoint("filtered", rx, `, filter: "data.amount > 50"`)), "snapshot: initial")).streaming()
	requireAll(t, rx, 36)
	require.EqualValues(t, 30, b.ask("select count(*) from walhook.deliveries where state = 'dead' and reason = 'filter_failed'"))
	p.stop()
}

func TestEndpointsTakeAndDropTheRulesOfTheDefaults(t *testing.T) {
	t.Parallel()
	c, err := load(`
database: {url: "postgres://localhost/shop"}
outbox: [{table: outbox}]
defaults:
  filter: data.amount > 1
  transform: {form: "{'a': data}", method: PUT}
endpoints:
  - {id: a, url: "https://a"}
  - {id: b, url: "https://b", filter: "", transform: {body: "[data]"}}
  - {id: c, url: "https://c", filter: "true", transform: {form: "", method: PATCH}}
  - {id: d, url: "https://d", transform: {form: "{}", url: "'/x'"}}
`, noEnv)
	require.NoError(t, err)
	a, bb, cc, d := c.Endpoints[0], c.Endpoints[1], c.Endpoints[2], c.Endpoints[3]
	require.Equal(t, "data.amount > 1", a.Filter.Source())
	require.Equal(t, "{'a': data}", a.Transform.Form.Source())
	require.Equal(t, "PUT", a.Transform.Method)
	require.Nil(t, bb.Filter)
	require.Nil(t, bb.Transform.Form)
	require.Equal(t, "[data]", bb.Transform.Body.Source())
	require.Equal(t, "PUT", bb.Transform.Method)
	require.Equal(t, "true", cc.Filter.Source())
	require.Nil(t, cc.Transform.Form)
	require.Nil(t, cc.Transform.Body)
	require.Equal(t, "PATCH", cc.Transform.Method)
	require.Equal(t, "{}", d.Transform.Form.Source())
	require.Equal(t, "'/x'", d.Transform.URL.Source())
}
