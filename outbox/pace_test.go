package outbox_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
)

func TestRatesAreReadAsTheyAreWritten(t *testing.T) {
	for text, want := range map[string]outbox.Rate{
		"100/s":    {Attempts: 100, Per: time.Second},
		"0.5/s":    {Attempts: 0.5, Per: time.Second},
		"300/m":    {Attempts: 300, Per: time.Minute},
		"1/h":      {Attempts: 1, Per: time.Hour},
		"100000/s": {Attempts: 100_000, Per: time.Second},
	} {
		got, err := outbox.ParseRate(text)
		require.NoError(t, err, text)
		require.Equal(t, want, got)
		require.Equal(t, text, got.String())
	}
	for _, text := range []string{"", "/", "5", "5/", "/s", "5/d", "5/S", "5 /s", "-5/s", "+5/s", "5e1/s", "0x5/s", "NaN/s", "Inf/s", "1.2.3/s", "0/s", "0.9/h", "100001/s", "7000000/m", "5/s/s"} {
		_, err := outbox.ParseRate(text)
		require.Error(t, err, text)
		require.Contains(t, err.Error(), "allowed: ", text)
	}
	require.Empty(t, outbox.Rate{}.String())
}

func TestAGroupHasOneRate(t *testing.T) {
	groups := outbox.Groups{}
	require.NoError(t, groups.Join(endpoint("a", limited("crm", 5, time.Second))))
	require.NoError(t, groups.Join(endpoint("b", limited("crm", 300, time.Minute))))
	require.NoError(t, groups.Join(endpoint("c", limited("", 7, time.Second))))
	require.NoError(t, groups.Join(endpoint("d", limited("other", 7, time.Second))))
	require.NoError(t, groups.Join(endpoint("e")))
	err := groups.Join(endpoint("f", limited("crm", 6, time.Second)))
	require.EqualError(t, err, `rate_limit: 6/s of endpoint "f" is not the rate of group "crm", which is 5/s by endpoint "a"`)
}

func limited(group string, n float64, per time.Duration) func(*outbox.Endpoint) {
	return func(e *outbox.Endpoint) {
		e.RateLimit = outbox.RateLimit{Group: group, Rate: outbox.Rate{Attempts: n, Per: per}}
	}
}

// What waits for its turn for longer than it may hold the watermark waits in the store, and goes
// from there at the same rate. The world checks every window.
func TestAttemptsAreSpacedByTheRate(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.start()
		w.commit(numbered(21, "%02d:k%[1]d")...)
		pass(time.Millisecond)
		require.Len(t, w.attempted("a"), 1, "no burst at the beginning")
		pass(800 * time.Millisecond)
		require.Len(t, w.attempted("a"), 5)
		pass(700 * time.Millisecond)
		require.Equal(t, w.end, w.life.relay.Low().LSN, "the WAL is free")
		pass(2500 * time.Millisecond)
		require.GreaterOrEqual(t, len(w.arrived("a")), 20, "neither the store nor the timer costs a turn")
		require.IsNonDecreasing(t, w.arrived("a"))
		pass(time.Second)
		w.commit("x", "y")
		pass(time.Millisecond)
		require.Equal(t, "x", w.arrived("a")[21], "nothing is due after a pause")
		require.Len(t, w.arrived("a"), 22, "and nothing was saved up")
	}, endpoint("a", limited("", 5, time.Second)))
}

func TestAHighRateIsReached(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.start()
		for i := range 200 {
			w.commit(numbered(30, fmt.Sprintf("%d-%%d", i))...)
			pass(10 * time.Millisecond)
		}
		require.InDelta(t, 4000, len(w.arrived("a")), 60)
	}, endpoint("a", concurrency(16), limited("", 2000, time.Second)))
}

func TestAGroupTakesTurnsAndNoneOfItStarves(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.start()
		w.commitRows(rowsOfType("big", 200))
		pass(time.Millisecond)
		w.commitRows(rowsOfType("small", 5))
		pass(999 * time.Millisecond)
		require.Len(t, w.arrived("small"), 5, "a hundred of each of the others wait since before")
		pass(time.Second)
		one, other := len(w.arrived("one")), len(w.arrived("other"))
		require.InDelta(t, one, other, 2)
		require.InDelta(t, 2*20, one+other+5, 2)
		require.Len(t, w.arrived("free"), 205, "whose rate is its own")
		pass(20 * time.Second)
	},
		endpoint("one", limited("g", 20, time.Second), wants("big")), endpoint("other", limited("g", 20, time.Second), wants("big")),
		endpoint("small", limited("g", 20, time.Second), wants("small")), endpoint("free"))
}

func rowsOfType(typ string, n int) (rows []*outboxRow) {
	for _, id := range numbered(n, typ+"%d") {
		rows = append(rows, &outboxRow{id: id, typ: typ, data: "{}"})
	}
	return rows
}

func TestRetriesAndProbesWaitForTheirTurn(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.receiver("a").circuit = true
		w.answers("a", fails)
		w.start()
		w.commit(numbered(40, "%d:k%[1]d")...)
		pass(20 * time.Second)
		w.answers("a", ok)
		pass(30 * time.Second)
	}, endpoint("a", limited("", 4, time.Second)))
}

// 429 slows the lane and opens no circuit, with a Retry-After and without.
func TestARateLimitAndA429GoTogether(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.receiver("a").circuit = true
		after := 3 * time.Second
		throttles := func(a outbox.Attempt) answer {
			r := fails(a)
			r.Status, r.Slow, r.RetryAfter = 429, true, after
			return r
		}
		w.answers("a", throttles)
		w.start()
		w.commit(numbered(10, "%d:k%[1]d")...)
		pass(2900 * time.Millisecond)
		require.Len(t, w.attempted("a"), 1, "the receiver asked for three seconds")
		w.set(func() { after = 0 })
		pass(time.Second)
		require.Greater(t, len(w.attempted("a")), 4, "one after the other")
		w.answers("a", ok)
		pass(20 * time.Second)
		w.set(func() { require.Zero(t, w.receivers["a"].held) })
		require.Len(t, w.arrived("a"), 10)
	}, endpoint("a", limited("", 10, time.Second)))
}

func TestAChangedRateHoldsAtOnceForAllOfTheGroup(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.start()
		w.commit(numbered(40, "%d:")...)
		pass(10 * time.Second)
		require.Equal(t, 1, len(w.arrived("a"))+len(w.arrived("b")), "the next one in an hour")
		w.configure(change(w.endpoints, "", limited("g", 20, time.Second))...)
		pass(2 * time.Second)
		require.InDelta(t, 40, len(w.arrived("a"))+len(w.arrived("b")), 3)
		w.configure(change(w.endpoints, "", limited("g", 1, time.Hour))...)
		pass(time.Minute)
		require.InDelta(t, 40, len(w.arrived("a"))+len(w.arrived("b")), 3)
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.RateLimit = outbox.RateLimit{} })...)
		pass(time.Second)
		require.Len(t, w.arrived("a"), 40, "it has none any more")
		w.configure(change(w.endpoints, "b", limited("", 100, time.Second))...)
		pass(time.Second)
		require.Len(t, w.arrived("b"), 40)
	}, endpoint("a", limited("g", 1, time.Hour)), endpoint("b", limited("g", 1, time.Hour)))
}

// The config refuses it; should it come to pass, the receiver is better off with the lower one.
func TestOfTwoRatesOfAGroupTheLowerHolds(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.start()
		w.commit(numbered(100, "%d:")...)
		pass(2 * time.Second)
		require.InDelta(t, 20, len(w.arrived("a"))+len(w.arrived("b")), 2)
		w.configure(w.endpoints[0])
		pass(1100 * time.Millisecond)
		require.Greater(t, len(w.arrived("a")), 50, "whose rate was the lower is gone")
	}, endpoint("a", limited("g", 50, time.Second)), endpoint("b", limited("g", 10, time.Second)))
}

// A turn that comes while there is nothing to send is lost, and the next one is an hour later: it
// must not be kept, to be used with the one after it.
func TestATurnIsNotSavedUp(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.start()
		w.commit("1", "2")
		pass(time.Second)
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Paused })...) // 2 has a turn in an hour
		pass(3 * time.Hour)
		w.configure(change(w.endpoints, "a", func(e *outbox.Endpoint) { e.Status = outbox.Enabled })...)
		w.commit("3")
		pass(59 * time.Minute)
		require.Equal(t, []string{"1", "2"}, w.arrived("a"))
		pass(2 * time.Minute)
		require.Equal(t, []string{"1", "2", "3"}, w.arrived("a"))
	}, endpoint("a", limited("", 1, time.Hour)))
}

func TestALimitedEndpointHoldsUpNoOther(t *testing.T) {
	story(t, func(t *testing.T, w *world) {
		w.maxEvents = 200
		w.start()
		for i := range 50 {
			w.commit(numbered(10, fmt.Sprintf("%d-%%d:k%%[1]d", i))...)
			pass(200 * time.Millisecond)
			require.Len(t, w.arrived("well"), 10*(i+1))
		}
		require.Less(t, w.life.relay.Stuck(), 1500*time.Millisecond)
		w.configure(change(w.endpoints, "slow", limited("", 100, time.Second))...)
	}, endpoint("slow", limited("", 3, time.Second)), endpoint("well"))
}
