package outbox_test

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/walhook/walhook/outbox"
)

// modelTime is how long TestModel looks for a plan that breaks a promise; WALHOOK_MODEL has
// another time.
const modelTime = 10 * time.Second

// plan is a life's story: what the app commits, how receivers and Postgres behave, and how the
// relay is stopped, killed and configured.
type plan struct {
	seed      uint64
	endpoints []planned
	maxEvents int
	maxBytes  int64
	faulty    bool // the store fails now and then
	crashing  bool
	counted   bool // recounts work, and so heal what a lane has lost sight of
	steps     []step
}

type planned struct {
	ordering    outbox.Ordering
	concurrency int
	circuit     bool
	limit       outbox.RateLimit
	batch       outbox.Batch
	unfit       int // one event of so many; zero is none
	leaves      int
}

type step struct {
	do   action
	n, m int
	pass time.Duration
}

type action int

const (
	commit action = iota
	commitMore
	commitSame
	mood
	moodAgain
	storeMood
	lease
	pause
	resume
	settings
	remove
	add
	reconnect
	restart
	kill
	actions
)

func (a action) String() string {
	return [...]string{
		"commit", "commit more", "commit same key", "mood", "mood", "store mood", "lease", "pause", "resume",
		"settings", "remove", "add", "reconnect", "restart", "kill",
	}[a]
}

var moods = []string{"well", "flaky", "down", "hangs", "slow", "throttles", "poison", "late"}

func (p plan) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d, %d events, %d bytes, faulty %v, crashing %v, counted %v\n", p.seed, p.maxEvents, p.maxBytes, p.faulty, p.crashing, p.counted)
	for i, e := range p.endpoints {
		fmt.Fprintf(&b, "  e%d: ordering %s, concurrency %d, circuit %v, rate %v of group %q, batch %+v, unfit %d, leaves %d\n",
			i, e.ordering, e.concurrency, e.circuit, e.limit.Rate, e.limit.Group, e.batch, e.unfit, e.leaves)
	}
	for i, s := range p.steps {
		fmt.Fprintf(&b, "  %2d %s n=%d m=%d, pass %v\n", i, s.do, s.n, s.m, s.pass)
	}
	return b.String()
}

var batches = []outbox.Batch{
	{MaxEvents: 1}, {MaxEvents: 1}, {MaxEvents: 2}, {MaxEvents: 5, MaxBytes: 400}, {MaxEvents: 20, Linger: 30 * time.Millisecond}, {MaxEvents: 100, Linger: 1700 * time.Millisecond},
}

func genPlan(t *rapid.T) plan {
	p := plan{
		seed:      rapid.Uint64().Draw(t, "seed"),
		maxEvents: rapid.SampledFrom([]int{4, 30, 10_000}).Draw(t, "events"),
		maxBytes:  rapid.SampledFrom([]int64{3000, 64 << 20}).Draw(t, "bytes"),
		faulty:    rapid.Bool().Draw(t, "faulty"),
		crashing:  rapid.Bool().Draw(t, "crashing"),
		counted:   rapid.Bool().Draw(t, "counted"),
	}
	perSecond := func(n float64) outbox.Rate { return outbox.Rate{Attempts: n, Per: time.Second} }
	shared := perSecond(rapid.SampledFrom([]float64{60, 400}).Draw(t, "shared rate"))
	for range rapid.IntRange(1, 2).Draw(t, "endpoints") {
		p.endpoints = append(p.endpoints, planned{
			ordering:    rapid.SampledFrom([]outbox.Ordering{outbox.OrderKey, outbox.OrderKey, outbox.OrderNone, outbox.OrderAll}).Draw(t, "ordering"),
			concurrency: rapid.SampledFrom([]int{1, 2, 4, 16}).Draw(t, "concurrency"),
			circuit:     rapid.Bool().Draw(t, "circuit"),
			limit:       rapid.SampledFrom([]outbox.RateLimit{{}, {}, {Rate: perSecond(50)}, {Group: "g", Rate: shared}}).Draw(t, "rate limit"),
			batch:       rapid.SampledFrom(batches).Draw(t, "batch"),
			unfit:       rapid.SampledFrom([]int{0, 0, 7}).Draw(t, "unfit"),
			leaves:      rapid.SampledFrom([]int{0, 0, 1, 3}).Draw(t, "leaves"),
		})
	}
	pauses := []time.Duration{0, 0, time.Millisecond, 20 * time.Millisecond, 300 * time.Millisecond, time.Second, 2500 * time.Millisecond, 6 * time.Second}
	for range rapid.IntRange(3, 25).Draw(t, "steps") {
		p.steps = append(p.steps, step{
			do:   action(rapid.IntRange(0, int(actions)-1).Draw(t, "do")),
			n:    rapid.IntRange(0, 15).Draw(t, "n"),
			m:    rapid.IntRange(0, 15).Draw(t, "m"),
			pass: rapid.SampledFrom(pauses).Draw(t, "pass"),
		})
	}
	return p
}

// TestModel plays plans at random and checks the promises of doc.go at every step.
func TestModel(t *testing.T) {
	limit := modelTime
	if s := os.Getenv("WALHOOK_MODEL"); s != "" {
		var err error
		limit, err = time.ParseDuration(s)
		require.NoError(t, err)
	}
	if testing.Short() {
		limit /= 8
	}
	plans := 0
	var trace []string
	defer func() {
		if name := os.Getenv("WALHOOK_TRACE"); t.Failed() && name != "" {
			require.NoError(t, os.WriteFile(name, []byte(strings.Join(trace, "\n")), 0o600))
		}
	}()
	for begin := time.Now(); time.Since(begin) < limit; {
		rapid.Check(t, func(rt *rapid.T) {
			p := genPlan(rt)
			plans++
			if err := play(t, p, &trace); err != nil {
				rt.Fatalf("%v\n%v", err, p)
			}
		})
		if t.Failed() {
			return
		}
	}
	t.Logf("%d plans", plans)
}

// A plan that did not end: a retry that failed again is due in the store until its new time is written there,
// and was read again at once, and again. A loop of reads stops the clock of a bubble.
func TestWhatIsDueAndNotYetWrittenIsNotAskedForInALoop(t *testing.T) {
	p := plan{
		seed: 7, maxEvents: 30, maxBytes: 3000, faulty: true, counted: true,
		endpoints: []planned{
			{ordering: outbox.OrderNone, concurrency: 4, circuit: true, batch: batches[5]},
			{ordering: outbox.OrderKey, concurrency: 4, circuit: true, limit: outbox.RateLimit{Rate: outbox.Rate{Attempts: 50, Per: time.Second}}, batch: batches[4], leaves: 3},
		},
		steps: []step{
			{commitSame, 2, 11, 0},
			{commit, 15, 1, 300 * time.Millisecond},
			{commit, 9, 2, 0},
			{commitSame, 15, 7, time.Millisecond},
			{lease, 1, 9, 300 * time.Millisecond},
			{commit, 6, 9, time.Millisecond},
			{commitMore, 2, 5, 6 * time.Second},
			{commitMore, 13, 1, 0},
			{mood, 2, 0, 6 * time.Second},
			{moodAgain, 15, 11, 20 * time.Millisecond},
			{commitMore, 5, 5, time.Millisecond},
			{lease, 3, 1, time.Second},
			{storeMood, 2, 2, 2500 * time.Millisecond},
			{kill, 2, 6, 300 * time.Millisecond},
			{storeMood, 0, 4, 2500 * time.Millisecond},
		},
	}
	for range 100 { // retries are spread at random
		var trace []string
		require.NoError(t, play(t, p, &trace))
	}
}

func play(t *testing.T, p plan, trace *[]string) (err error) {
	synctest.Test(t, func(*testing.T) {
		var seen []string
		if seen, err = run(p); err != nil {
			*trace = seen
		}
	})
	return err
}

// run plays a plan in a world of its own.
func run(p plan) ([]string, error) {
	rnd := rand.New(rand.NewPCG(p.seed, 1))
	var endpoints []*outbox.Endpoint
	for i, e := range p.endpoints {
		endpoints = append(endpoints, endpoint(fmt.Sprintf("e%d", i), func(o *outbox.Endpoint) {
			o.Ordering, o.Concurrency, o.Retry.Jitter = e.ordering, e.concurrency, 0.2
			o.RateLimit, o.Batch = e.limit, e.batch
		}))
	}
	w := newWorld(endpoints...)
	w.traced = os.Getenv("WALHOOK_TRACE") != ""
	w.maxEvents, w.maxBytes, w.countsFail = p.maxEvents, p.maxBytes, !p.counted
	for i, e := range p.endpoints {
		r := w.receivers[fmt.Sprintf("e%d", i)]
		if r.circuit, r.leaves = e.circuit, e.leaves; e.unfit > 0 {
			r.unfit = func(ev *outbox.Event) bool { return hash(p.seed, ev.ID)%uint64(e.unfit) == 0 }
		}
	}
	delays := []time.Duration{0, time.Millisecond, 30 * time.Millisecond, 700 * time.Millisecond}
	delay := delays[rnd.IntN(len(delays))]
	chance := rand.New(rand.NewPCG(p.seed, 2))
	w.delay = func(string) time.Duration { return time.Duration(chance.Int64N(int64(delay) + 1)) }
	w.start()
	events, added := 0, 0
	for i, s := range p.steps {
		w.tracef("---- %d %v n=%d m=%d pass %v", i, s.do, s.n, s.m, s.pass)
		if w.err() != nil {
			break
		}
		one := endpoints[s.m%len(endpoints)].ID
		switch s.do {
		case commit, commitMore, commitSame:
			n := s.n + 1
			if s.do == commitMore {
				n *= 3
			}
			var rows []*outboxRow
			for range n {
				events++
				r := &outboxRow{id: fmt.Sprintf("%03d", events), typ: "order.created", data: `"` + strings.Repeat("x", s.m*40) + `"`}
				switch x := rnd.IntN(10); {
				case s.do == commitSame:
					r.key = "a"
				case x < 7:
					r.key = string(rune('a' + rnd.IntN(4)))
				case x == 9 && rnd.IntN(4) == 0:
					r.broken = true
				}
				rows = append(rows, r)
			}
			w.commitRows(rows)
		case mood, moodAgain:
			w.answers(one, feels(p.seed, moods[s.n%len(moods)]))
		case storeMood:
			if p.faulty {
				w.set(func() {
					w.writesFail, w.answersLost, w.readsFail, w.savesFail = s.n&1 != 0, s.n&2 != 0, s.n&4 != 0, s.n&8 != 0
					delay = delays[s.m%len(delays)]
				})
			}
		case lease:
			w.set(func() { w.silent = s.n%2 == 0 })
		case pause, resume:
			status := outbox.Paused
			if s.do == resume {
				status = outbox.Enabled
			}
			endpoints = change(endpoints, one, func(e *outbox.Endpoint) { e.Status = status })
			w.configure(endpoints...)
		case settings:
			endpoints = change(endpoints, one, func(e *outbox.Endpoint) {
				e.Concurrency = 1 + s.n%5
				if s.m%4 == 1 {
					e.Batch = batches[s.n%len(batches)]
				}
				if e.RateLimit.Group == "" && s.m%3 == 0 {
					e.RateLimit.Rate = []outbox.Rate{{}, {Attempts: 40, Per: time.Second}, {Attempts: 200, Per: time.Second}, {Attempts: 2700, Per: time.Minute}}[s.n%4]
				}
			})
			w.configure(endpoints...)
		case remove:
			if len(endpoints) > 1 {
				endpoints = slices.DeleteFunc(slices.Clone(endpoints), func(e *outbox.Endpoint) bool { return e.ID == one })
				w.configure(endpoints...)
			}
		case add:
			if added++; len(endpoints) < 4 {
				endpoints = append(slices.Clone(endpoints), endpoint(fmt.Sprintf("x%d", added), func(e *outbox.Endpoint) { e.Concurrency = 2 }))
				w.configure(endpoints...)
			}
		case reconnect:
			w.set(func() { w.reconnects++; w.wakeLocked() })
		case restart:
			clean := false
			w.set(func() {
				clean = !w.writesFail && !w.answersLost && !w.savesFail && !w.silent && delay < 100*time.Millisecond
			})
			if clean && time.Since(w.hurt) > 10*time.Second {
				w.haltClean()
			} else {
				w.set(func() { w.crashes++ })
				w.halt()
				w.set(w.doubtLocked)
			}
			w.start()
		case kill:
			if p.crashing {
				w.crash()
				w.start()
			}
		}
		pass(s.pass)
	}
	// The faults end.
	endpoints = change(endpoints, "", func(e *outbox.Endpoint) { e.Status = outbox.Enabled })
	w.configure(endpoints...)
	w.set(func() {
		w.writesFail, w.answersLost, w.readsFail, w.savesFail, w.silent = false, false, false, false, false
		delay = min(delay, 30*time.Millisecond)
		for _, r := range w.receivers {
			r.answer = ok
		}
		w.wakeLocked()
	})
	err := w.until(3*time.Minute, w.quiet)
	if err == nil {
		err = w.finish()
	}
	w.halt()
	return w.trace, cmp.Or(w.err(), err)
}

// change copies endpoints with one of them, or all, changed.
func change(endpoints []*outbox.Endpoint, id string, set func(*outbox.Endpoint)) []*outbox.Endpoint {
	out := make([]*outbox.Endpoint, len(endpoints))
	for i, e := range endpoints {
		if id == "" || e.ID == id {
			c := *e
			set(&c)
			e = &c
		}
		out[i] = e
	}
	return out
}

// feels is how a receiver in some mood answers. The same attempt has the same answer.
func feels(seed uint64, mood string) func(outbox.Attempt) answer {
	return func(a outbox.Attempt) answer {
		h := hash(seed, mood, a.Endpoint.ID, a.Event.ID, a.Number)
		took := time.Duration(h>>8%20) * time.Millisecond
		r := ok(a)
		switch mood {
		case "flaky":
			if h%3 == 0 {
				r = fails(a)
			}
		case "down":
			r = fails(a)
		case "hangs":
			r = fails(a)
			r.Reason, r.Status, took = outbox.ReasonTimeout, 0, a.Endpoint.Timeout
		case "slow":
			took += time.Duration(500+h>>16%2500) * time.Millisecond
		case "late":
			took += 1100 * time.Millisecond
			if h%2 == 0 {
				r = fails(a)
			}
		case "throttles":
			if h%3 != 0 {
				r = fails(a)
				r.Status, r.Slow, r.RetryAfter = 429, true, time.Duration(h>>16%3)*time.Second
			}
		case "poison":
			if h%3 == 0 {
				r = dies(a)
			}
		}
		r.after = took
		return r
	}
}
