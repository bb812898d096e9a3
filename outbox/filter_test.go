package outbox_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/outbox/rule"
)

func filter(t *testing.T, source string) func(*outbox.Endpoint) {
	f, err := rule.CompileFilter(source)
	require.NoError(t, err)
	return func(e *outbox.Endpoint) { e.Filter = f }
}

// Every third event of a key is one that a filter cannot judge, every fifth one that it turns
// down; what an outage, a crash and a reload do is the same with a filter as without.
func TestFiltersDisturbNoOrder(t *testing.T) {
	const source = `int(id) % 3 == 0 ? data.missing == 1 : int(id) % 5 != 0`
	story(t, func(t *testing.T, w *world) {
		w.start()
		n := 0
		more := func(count int) {
			for range count {
				n++
				w.commit(fmt.Sprintf("%d:k%d", n, n%2))
			}
		}
		more(30)
		pass(time.Second)
		require.NotContains(t, w.arrived("a"), "3")
		require.NotContains(t, w.arrived("a"), "5")
		require.Len(t, w.arrived("a"), 16)
		require.Len(t, w.arrived("b"), 30)
		require.Len(t, w.stored("a"), 10)
		for _, r := range w.store.Rows() {
			require.Equal(t, outbox.StateDead, r.State)
			require.Equal(t, outbox.ReasonFilter, r.Reason)
			require.Equal(t, "filter: no such key: missing", r.Detail)
			require.NotEmpty(t, r.OrderKey)
			require.Zero(t, r.Attempts)
		}

		w.answers("a", fails)
		more(30)
		pass(time.Second)
		w.crash()
		w.answers("a", ok)
		w.start()
		more(30)
		pass(time.Minute)
		w.configure(endpoint("a", filter(t, "int(id) > 100")), endpoint("b"))
		more(30)
		pass(time.Minute)
		require.Len(t, w.arrived("b"), 120)
		require.Len(t, w.arrived("a"), 3*16+20)
	}, endpoint("a", filter(t, source)), endpoint("b"))
}

func TestAnEventThatEveryFilterTurnsDownIsDone(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.start()
		w.commit("1:k", "2:", "3:k")
		pass(2 * time.Second)
		require.Empty(t, w.arrived("a"))
		require.Equal(t, w.end, w.saved.LSN)
		require.Zero(t, w.store.EventCount())
	}, endpoint("a", filter(t, "key == 'other'")))
}
