package outbox_test

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/expfmt"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
)

func TestAnEndpointKeepsItsLabel(t *testing.T) {
	l := outbox.NewLabels(2)
	for range 2 {
		for id, own := range map[string]bool{"a": true, "other": false} {
			label, got := l.Of(id)
			require.Equal(t, own, got)
			require.Equal(t, id, label)
		}
	}
	_, own := l.Of("b")
	require.True(t, own)
	label, own := l.Of("c")
	require.False(t, own)
	require.Equal(t, outbox.OtherEndpoints, label)

	label, own = (*outbox.Labels)(nil).Of("other")
	require.True(t, own)
	require.Equal(t, "other", label)
	_, own = outbox.NewLabels(0).Of("a")
	require.False(t, own)
}

// metric is one line of a series, or nothing.
func (w *world) metric(t *testing.T, series string) string {
	t.Helper()
	name, _, _ := strings.Cut(series, "{")
	text, err := testutil.CollectAndFormat(w.metrics, expfmt.TypeTextPlain, name)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, series+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func TestEndpointsWithoutALabelOfTheirOwnAreSummed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hourly := func(e *outbox.Endpoint) { e.Retry.Schedule = []time.Duration{time.Hour, time.Hour} }
		w := newWorld(endpoint("a"), endpoint("b"), endpoint("c", hourly), endpoint("d", hourly))
		w.labels = outbox.NewLabels(2)
		w.answers("c", fails)
		w.answers("d", fails)
		w.start()
		defer w.halt()
		w.commit("1:k", "2:k", "3:k")
		pass(40 * time.Second)

		want := func(want string, series string, args ...any) {
			t.Helper()
			series = fmt.Sprintf(series, args...)
			require.Equal(t, want, w.metric(t, series), series)
		}
		want("3", `walhook_deliveries_total{endpoint="a",outcome="delivered"}`)
		want("3", `walhook_deliveries_total{endpoint="b",outcome="delivered"}`)
		want("0", `walhook_deliveries_total{endpoint="other",outcome="delivered"}`)
		want("0", `walhook_parked{endpoint="a"}`)
		want("6", `walhook_parked{endpoint="other"}`)
		for _, id := range []string{"c", "d", ""} {
			want("", `walhook_parked{endpoint=%q}`, id)
			want("", `walhook_dead{endpoint=%q}`, id)
			want("", `walhook_deliveries_total{endpoint=%q,outcome="delivered"}`, id)
		}
		want("", `walhook_oldest_parked_seconds{endpoint="a"}`)
		age, err := strconv.ParseFloat(w.metric(t, `walhook_oldest_parked_seconds{endpoint="other"}`), 64)
		require.NoError(t, err)
		require.InDelta(t, 40, age, 1)

		// One that leaves takes its part of the sum along, and frees what it had.
		w.configure(endpoint("b"), endpoint("c", hourly))
		pass(time.Minute)
		want("3", `walhook_parked{endpoint="other"}`)
		want("", `walhook_parked{endpoint="a"}`)
		w.configure(endpoint("b"), endpoint("c", hourly), endpoint("e"))
		w.answers("c", ok)
		pass(12 * time.Hour)
		w.commit("4:k")
		pass(time.Minute)
		want("0", `walhook_parked{endpoint="other"}`)
		want("", `walhook_oldest_parked_seconds{endpoint="other"}`)
		want("4", `walhook_deliveries_total{endpoint="other",outcome="delivered"}`)
		want("1", `walhook_deliveries_total{endpoint="e",outcome="delivered"}`)
		want("4", `walhook_deliveries_total{endpoint="b",outcome="delivered"}`)
	})
}
