package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// This file judges a torture run: from what producers committed and what receivers saw. It
// knows nothing of processes, so histories made by hand can show that it finds each violation.

// row is a committed row of the outbox table.
type row struct {
	id     int64
	kind   string // its type
	key    string // empty: no order
	number int64  // grows with each row of its key, in commit order
	global int64  // of strictKind: grows with each of them, in commit order
	data   uint64 // sum of its payload
}

// sighting is a request as a receiver saw it. Sights stand in the order of their answers.
type sighting struct {
	endpoint string
	id       int64
	attempt  int
	status   int // zero: no answer was given
	came     time.Time
	at       time.Time // of the answer
	data     uint64    // sum of what was committed, as it arrived
	body     uint64    // sum of the whole body, which no attempt may change
}

func (s *sighting) accepted() bool { return s.status/100 == 2 }

// deadRow is a dead delivery in walhook.deliveries.
type deadRow struct {
	endpoint string
	id       int64
	reason   string
	status   int
}

// harm is what the hand did, and what may follow from it.
type harm struct {
	kind     string
	from, to time.Time
	repeats  bool   // who was sending may not have known what was delivered
	database bool   // nothing could be written down meanwhile
	answers  bool   // answers may have been lost
	endpoint string // answers: only of this one; empty all
}

// witness is an endpoint as its configuration has it.
type witness struct {
	id       string
	wants    func(kind string) bool
	ordering string // key, none, all
	deadOn   []int
	attempts int // after which a delivery is dead

	concurrency int    // zero: as the seed has it
	step        string // of the retry schedule; empty: as the seed has it
}

type history struct {
	began     time.Time
	retimed   bool // rows may be read from the table again: one without a time then carries another
	rows      []row
	sightings []sighting
	dead      []deadRow
	harms     []harm
	endpoints []witness
}

// The bounds of guarantee 3 as a run can see them. What was settled is written down once a
// second, and what is not settled after a second is parked; the rest is for a busy machine.
// While the database is out of reach nothing can be written down, so that time counts to it.
const (
	repeatWindow = 4 * time.Second
	// recovery is how long after its end a fault of the database still delays what is written.
	recovery = 2 * time.Second
	// late is how long after a kill a receiver may still answer what it had been sent before.
	late = 3 * time.Second
	// slowAnswer is one that may have come too late for its request.
	slowAnswer = 500 * time.Millisecond
	// onceMore is how soon a request is made again whose connection broke.
	onceMore = 500 * time.Millisecond
)

// verdict is what a run has shown.
type verdict struct {
	lost, invented, altered, disorder, unexplained, deaths []string // violations

	deliveries  int
	repeats     int
	lostAnswers int              // repeats for which a lost answer is the reason
	perHarm     map[string][]int // kind: how many repeats each of it led to
	ages        []time.Duration  // from the success before a repeat to the harm behind it, or to the outage that led to it
}

func (v *verdict) violations() []string {
	return slices.Concat(v.lost, v.invented, v.altered, v.disorder, v.unexplained, v.deaths)
}

// judge is the whole proof.
func judge(h history) *verdict {
	v := &verdict{perHarm: map[string][]int{}}
	rows := make(map[int64]*row, len(h.rows))
	for i := range h.rows {
		rows[h.rows[i].id] = &h.rows[i]
	}
	for i := range h.endpoints {
		e := &h.endpoints[i]
		var sightings []sighting
		for _, s := range h.sightings {
			if s.endpoint == e.id {
				sightings = append(sightings, s)
			}
		}
		v.content(e, rows, sightings, h.retimed)
		v.order(e, rows, sightings)
		v.complete(&h, e, sightings)
	}
	v.repetition(&h)
	return v
}

// content: nothing invented, nothing altered, nothing that the endpoint does not want.
func (v *verdict) content(e *witness, rows map[int64]*row, sightings []sighting, retimed bool) {
	bodies := map[int64]uint64{}
	for _, s := range sightings {
		r := rows[s.id]
		switch {
		case r == nil:
			v.invented = append(v.invented, fmt.Sprintf("invented: %s got event %d, which was never committed", e.id, s.id))
			continue
		case !e.wants(r.kind):
			v.invented = append(v.invented, fmt.Sprintf("invented: %s got event %d of type %s, which it does not want", e.id, s.id, r.kind))
		case s.data != r.data:
			v.altered = append(v.altered, fmt.Sprintf("altered: %s got event %d with another payload than was committed", e.id, s.id))
		}
		if before, again := bodies[s.id]; again && before != s.body && !retimed {
			v.altered = append(v.altered, fmt.Sprintf("altered: %s got event %d with two different bodies", e.id, s.id))
		}
		bodies[s.id] = s.body
	}
}

// order: the first successes of a key, or of the whole endpoint, are in commit order.
func (v *verdict) order(e *witness, rows map[int64]*row, sightings []sighting) {
	if e.ordering == "none" {
		return
	}
	newest := map[string]*row{}
	place := func(r *row) (string, int64) {
		if e.ordering == "all" {
			return "*", r.global
		}
		return r.key, r.number
	}
	seen := map[int64]bool{}
	for _, s := range sightings {
		r := rows[s.id]
		if r == nil || !s.accepted() || seen[s.id] {
			continue
		}
		seen[s.id] = true
		key, n := place(r)
		if key == "" {
			continue
		}
		if before := newest[key]; before != nil {
			if _, m := place(before); n < m {
				v.disorder = append(v.disorder, fmt.Sprintf("disorder: %s got event %d (key %s, number %d) behind event %d (number %d)", e.id, r.id, key, n, before.id, m))
				continue
			}
		}
		newest[key] = r
	}
}

// complete: every row is delivered to everyone who wants it, or dead for a reason that the receiver gave.
func (v *verdict) complete(h *history, e *witness, sightings []sighting) {
	done, died := map[int64]bool{}, map[int64]bool{}
	for _, s := range sightings {
		if s.accepted() && !done[s.id] {
			done[s.id] = true
			v.deliveries++
		}
	}
	for _, d := range h.dead {
		if d.endpoint != e.id {
			continue
		}
		died[d.id] = true
		given := slices.ContainsFunc(sightings, func(s sighting) bool {
			return s.id == d.id && s.status == d.status && (slices.Contains(e.deadOn, s.status) || s.attempt >= e.attempts)
		})
		if (d.reason != "status" || !given) && !h.exhausted(e, sightings, d) {
			v.deaths = append(v.deaths, fmt.Sprintf("died: event %d is dead at %s (%s, %d), which the receiver does not explain", d.id, e.id, d.reason, d.status))
		}
	}
	for _, r := range h.rows {
		if e.wants(r.kind) && !done[r.id] && !died[r.id] {
			v.lost = append(v.lost, fmt.Sprintf("lost: event %d (key %s, number %d, type %s) never came to %s", r.id, r.key, r.number, r.kind, e.id))
		}
	}
}

// exhausted tells a delivery that the receiver has refused time and again, and whose last attempt,
// by a spell of its own, it did not get at all.
func (h *history) exhausted(e *witness, sightings []sighting, d deadRow) bool {
	return d.reason != "status" && d.status == 0 &&
		slices.ContainsFunc(sightings, func(s sighting) bool { return s.id == d.id && s.attempt >= e.attempts/2 }) &&
		slices.ContainsFunc(h.harms, func(c harm) bool { return c.answers && c.endpoint == e.id })
}

// repetition: between a success and the next one of the same delivery somebody crashed, not long
// after the former, or its answer was lost.
func (v *verdict) repetition(h *history) {
	counts := make([]int, len(h.harms))
	type delivery struct {
		endpoint string
		id       int64
	}
	last := map[delivery]*sighting{}
	for i := range h.sightings {
		s := &h.sightings[i]
		if !s.accepted() {
			continue
		}
		d := delivery{s.endpoint, s.id}
		before := last[d]
		last[d] = s
		if before == nil {
			continue
		}
		v.repeats++
		switch cause := h.cause(before, s); {
		case cause >= 0:
			counts[cause]++
			v.ages = append(v.ages, max(0, h.calm(h.harms[cause].from).Sub(before.at)))
		case h.lostAnswer(before, s):
			v.lostAnswers++
		default:
			// So that the figures show what a clean stop did, which must be nothing.
			for i := range h.harms {
				if c := &h.harms[i]; c.kind == string(dismiss) && c.from.After(before.at.Add(-repeatWindow)) && c.from.Before(s.at) {
					counts[i]++
				}
			}
			v.unexplained = append(v.unexplained, fmt.Sprintf("repeated: %s got event %d at %s (attempt %d) and again at %s (attempt %d)%s",
				s.endpoint, s.id, h.clock(before.at), before.attempt, h.clock(s.at), s.attempt, h.around(before.at, s.at)))
		}
	}
	for i, c := range h.harms {
		if c.repeats || c.kind == string(dismiss) {
			v.perHarm[c.kind] = append(v.perHarm[c.kind], counts[i])
		}
	}
}

// cause finds the latest harm that explains a repeat, a kill rather than another; -1 is none.
func (h *history) cause(before, again *sighting) int {
	best := -1
	for i := range h.harms {
		c := &h.harms[i]
		if !c.repeats || !c.from.Before(again.at) || before.at.After(c.to.Add(late)) || before.at.Before(h.calm(c.from).Add(-repeatWindow)) {
			continue
		}
		if best < 0 || c.sure() > h.harms[best].sure() || c.sure() == h.harms[best].sure() && c.from.After(h.harms[best].from) {
			best = i
		}
	}
	return best
}

// takenOver is the harm that explains a repeat where no other does.
const takenOver = "takeover by the other"

// sure is how surely a harm leads to repeats.
func (c *harm) sure() int {
	switch c.kind {
	case string(murder):
		return 2
	case takenOver:
		return 0
	}
	return 1
}

// calm is when, before t, the database was last well.
func (h *history) calm(t time.Time) time.Time {
	for found := true; found; {
		found = false
		for i := range h.harms {
			if c := &h.harms[i]; c.database && c.from.Before(t) && !c.to.Add(recovery).Before(t) {
				t, found = c.from, true
			}
		}
	}
	return t
}

// lostAnswer tells a retry: our answer did not arrive, or came too late. A request on a connection
// that breaks just as it is used again is made once more at once, and is the same attempt.
func (h *history) lostAnswer(before, again *sighting) bool {
	atOnce := again.attempt == before.attempt && again.came.Sub(before.at) < onceMore
	if again.attempt <= before.attempt && !atOnce {
		return false
	}
	return before.at.Sub(before.came) > slowAnswer || slices.ContainsFunc(h.harms, func(c harm) bool {
		return c.answers && (c.endpoint == "" || c.endpoint == before.endpoint) &&
			c.from.Before(before.at.Add(time.Second)) && before.at.Before(c.to.Add(time.Second))
	})
}

func (h *history) clock(t time.Time) string { return fmt.Sprintf("%.3f", t.Sub(h.began).Seconds()) }

// around tells what happened near two moments.
func (h *history) around(from, to time.Time) string {
	var b strings.Builder
	for _, c := range h.harms {
		if c.to.After(from.Add(-repeatWindow)) && c.from.Before(to) {
			fmt.Fprintf(&b, "; %s at %s–%s", c.kind, h.clock(c.from), h.clock(c.to))
		}
	}
	return b.String()
}

// spread is the median, the 99th percentile and the maximum.
func spread[N cmp.Ordered](all []N) (median, p99, most N) {
	if len(all) == 0 {
		return median, p99, most
	}
	s := slices.Sorted(slices.Values(all))
	return s[len(s)/2], s[len(s)*99/100], s[len(s)-1]
}

// fable is a history that is all right: two rows of a key and one of another, delivered to two endpoints.
func fable() history {
	began := time.Unix(1e9, 0)
	h := history{began: began, endpoints: []witness{
		{id: "keyed", wants: func(string) bool { return true }, ordering: "key", deadOn: []int{422}, attempts: 3},
		{id: "strict", wants: func(k string) bool { return k == strictKind }, ordering: "all", attempts: 3},
	}}
	for i, key := range []string{"a", "a", "b", "b"} {
		h.rows = append(h.rows, row{id: int64(i + 1), kind: strictKind, key: key, number: int64(i + 1), global: int64(i + 1), data: uint64(i + 1)})
	}
	h.rows[3].kind = "other"
	for i := range 4 {
		h.see("keyed", int64(i+1), time.Duration(i)*time.Second)
		if i < 3 {
			h.see("strict", int64(i+1), time.Duration(i)*time.Second)
		}
	}
	return h
}

// see adds a delivery.
func (h *history) see(endpoint string, id int64, at time.Duration) *sighting {
	h.sightings = append(h.sightings, sighting{endpoint: endpoint, id: id, attempt: 1, status: 204, came: h.began.Add(at), at: h.began.Add(at), data: uint64(id), body: uint64(id)})
	return &h.sightings[len(h.sightings)-1]
}

func (h *history) hurt(c harm, from, to time.Duration) {
	c.from, c.to = h.began.Add(from), h.began.Add(to)
	h.harms = append(h.harms, c)
}

func TestTheJudgeFindsEachViolation(t *testing.T) {
	t.Parallel()
	kill := harm{kind: string(murder), repeats: true}
	for name, c := range map[string]struct {
		change func(h *history)
		want   string // how each violation begins; empty: all is well
		n      int
	}{
		"all is well":       {func(*history) {}, "", 0},
		"lost":              {func(h *history) { h.sightings = h.sightings[1:] }, "lost: event 1", 1},
		"only refused":      {func(h *history) { h.sightings[0].status = 503 }, "lost: event 1", 1},
		"never answered":    {func(h *history) { h.sightings[0].status = 0 }, "lost: event 1", 1},
		"rolled back":       {func(h *history) { h.see("keyed", 99, 9*time.Second) }, "invented: keyed got event 99", 1},
		"unwanted":          {func(h *history) { h.see("strict", 4, 9*time.Second) }, "invented: strict got event 4", 1},
		"refused invention": {func(h *history) { h.see("keyed", 99, 9*time.Second).status = 503 }, "invented: keyed got event 99", 1},
		"altered":           {func(h *history) { h.sightings[0].data = 7 }, "altered: keyed got event 1", 1},
		"two bodies": {func(h *history) {
			s := h.see("keyed", 1, 9*time.Second)
			s.body, s.status = 7, 500
		}, "altered: keyed got event 1", 1},
		"overtaken in its key": {func(h *history) {
			h.sightings[0], h.sightings[2] = h.sightings[2], h.sightings[0]
		}, "disorder: keyed got event 1", 1},
		"overtaken by another key": {func(h *history) {
			h.sightings[2], h.sightings[4] = h.sightings[4], h.sightings[2]
		}, "", 0},
		"overtaken in a strict lane": {func(h *history) {
			h.sightings[3], h.sightings[5] = h.sightings[5], h.sightings[3]
		}, "disorder: strict got event 2", 1},
		"an old one again is no disorder": {func(h *history) {
			h.see("keyed", 1, 9*time.Second)
			h.hurt(kill, time.Second, time.Second)
		}, "", 0},
		"repeated for nothing": {func(h *history) { h.see("keyed", 1, time.Second) }, "repeated: keyed got event 1", 1},
		"repeated before the kill": {func(h *history) {
			h.see("keyed", 1, time.Second)
			h.hurt(kill, 2*time.Second, 2*time.Second)
		}, "repeated: keyed got event 1", 1},
		"repeated long after the success": {func(h *history) {
			h.see("keyed", 1, 20*time.Second)
			h.hurt(kill, 10*time.Second, 10*time.Second)
		}, "repeated: keyed got event 1", 1},
		"repeated after an outage and a kill": {func(h *history) {
			h.see("keyed", 1, 20*time.Second)
			h.hurt(harm{kind: "black hole", database: true}, 2*time.Second, 9*time.Second)
			h.hurt(kill, 10*time.Second, 10*time.Second)
		}, "", 0},
		"repeated after an outage alone": {func(h *history) {
			h.see("keyed", 1, 20*time.Second)
			h.hurt(harm{kind: "black hole", database: true}, 0, 9*time.Second)
		}, "repeated: keyed got event 1", 1},
		"killed and killed again": {func(h *history) {
			h.see("keyed", 1, 20*time.Second)
			h.hurt(kill, time.Second, time.Second)
			h.hurt(kill, 19*time.Second, 19*time.Second)
		}, "", 0},
		"the answer was lost": {func(h *history) {
			h.see("keyed", 1, time.Second).attempt = 2
			h.hurt(harm{kind: "refusing", answers: true, endpoint: "keyed"}, 0, time.Second)
		}, "", 0},
		"another's answer was lost": {func(h *history) {
			h.see("keyed", 1, time.Second).attempt = 2
			h.hurt(harm{kind: "refusing", answers: true, endpoint: "strict"}, 0, time.Second)
		}, "repeated: keyed got event 1", 1},
		"the answer was lost with an old connection": {func(h *history) {
			h.see("keyed", 1, 100*time.Millisecond)
			h.hurt(harm{kind: "flaky", answers: true, endpoint: "keyed"}, 0, time.Second)
		}, "", 0},
		"no retry, so no lost answer": {func(h *history) {
			h.see("keyed", 1, time.Second)
			h.hurt(harm{kind: "refusing", answers: true}, 0, time.Second)
		}, "repeated: keyed got event 1", 1},
		"dead as told": {func(h *history) {
			h.sightings[0].status = 422
			h.dead = append(h.dead, deadRow{"keyed", 1, "status", 422})
		}, "", 0},
		"dead after its last attempt": {func(h *history) {
			h.sightings[0].status, h.sightings[0].attempt = 400, 3
			h.dead = append(h.dead, deadRow{"keyed", 1, "status", 400})
		}, "", 0},
		"dead after a last attempt that did not arrive": {func(h *history) {
			h.sightings[0].status, h.sightings[0].attempt = 400, 2
			h.hurt(harm{kind: "refusing", answers: true, endpoint: "keyed"}, 0, time.Second)
			h.dead = append(h.dead, deadRow{"keyed", 1, "connect", 0})
		}, "", 0},
		"dead without a last attempt": {func(h *history) {
			h.sightings[0].status, h.sightings[0].attempt = 400, 2
			h.dead = append(h.dead, deadRow{"keyed", 1, "connect", 0})
		}, "died: event 1", 1},
		"dead too early": {func(h *history) {
			h.sightings[0].status, h.sightings[0].attempt = 400, 2
			h.dead = append(h.dead, deadRow{"keyed", 1, "status", 400})
		}, "died: event 1", 1},
		"dead for no reason of the receiver's": {func(h *history) {
			h.sightings = h.sightings[1:]
			h.dead = append(h.dead, deadRow{"keyed", 1, "timeout", 0})
		}, "died: event 1", 1},
		"dead at another endpoint": {func(h *history) {
			h.sightings = h.sightings[1:]
			h.dead = append(h.dead, deadRow{"strict", 1, "status", 422})
		}, "", 2},
	} {
		t.Run(name, func(t *testing.T) {
			h := fable()
			c.change(&h)
			got := judge(h).violations()
			require.Len(t, got, c.n, "%v", got)
			for _, line := range got {
				require.True(t, strings.HasPrefix(line, c.want), line)
			}
		})
	}
}

func TestTheJudgeCountsRepeatsByTheirCrash(t *testing.T) {
	t.Parallel()
	h := fable()
	h.hurt(harm{kind: string(murder), repeats: true}, 3500*time.Millisecond, 3500*time.Millisecond)
	h.hurt(harm{kind: string(murder), repeats: true}, time.Minute, time.Minute)
	h.see("keyed", 3, 4*time.Second)
	h.see("keyed", 4, 4*time.Second)
	v := judge(h)
	require.Empty(t, v.violations())
	require.Equal(t, 2, v.repeats)
	require.Equal(t, []int{2, 0}, v.perHarm[string(murder)])
	median, p99, most := spread(v.ages)
	require.Equal(t, []time.Duration{1500 * time.Millisecond, 1500 * time.Millisecond, 1500 * time.Millisecond}, []time.Duration{median, p99, most})
}
