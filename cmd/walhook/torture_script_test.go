package main

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// This file makes all that a torture run does from its seed.

// act is one thing that the hand does.
type act string

const (
	raise       act = "raise"                   // start a walhook in the seat, where none lives
	murder      act = "kill -9"                 // of the walhook in the seat
	dismiss     act = "SIGTERM"                 // of the walhook in the seat
	freeze      act = "SIGSTOP"                 // of the walhook in the seat
	thaw        act = "SIGCONT"                 // of the walhook in the seat
	crash       act = "Postgres crash"          // SIGKILL of all its processes
	stun        act = "Postgres immediate stop" // as pg_ctl does it: recovery at the next start
	halt        act = "Postgres fast stop"
	revive      act = "start"       // of Postgres
	failover    act = "failover"    // the primary is killed and the standby promoted, where there is one
	behead      act = "walsender"   // pg_terminate_backend of walsenders
	cut         act = "cut"         // reset connections to Postgres
	blackhole   act = "black hole"  // nothing passes between walhook and Postgres
	lag         act = "lag"         // everything between walhook and Postgres takes longer
	pass        act = "pass"        // ends a black hole or lag
	reconfigure act = "reconfigure" // the endpoints, by SIGHUP
	rewrite     act = "rewrite"     // the endpoints, by the file alone
)

// kills are the acts that end a process.
var kills = []act{murder, dismiss, crash, stun, halt, behead, failover}

// deed is an act at its time.
type deed struct {
	at    time.Duration
	act   act
	seat  int           // of a walhook
	lines []int         // to Postgres: 0 SQL, 1 replication
	lag   time.Duration // of lag
	seed  uint64        // of the new settings
}

func (s deed) String() string {
	return fmt.Sprintf("%.3f %s seat=%d lines=%v", s.at.Seconds(), s.act, s.seat, s.lines)
}

// mood is how a receiver is for a while.
type mood string

const (
	healthy  mood = "healthy"
	busy     mood = "busy"     // 503
	asking   mood = "asking"   // 429 or 503 with Retry-After
	hanging  mood = "hanging"  // beyond every timeout
	breaking mood = "breaking" // resets the connection
	refusing mood = "refusing" // refuses connections
	brisk    mood = "brisk"    // up to 50 ms
	slow     mood = "slow"
	flaky    mood = "flaky" // a little of all
)

// spell is a mood and how long it lasts.
type spell struct {
	mood  mood
	lasts time.Duration
}

// script is a run.
type script struct {
	seed          uint64
	steps         []deed
	moods         map[string][]spell // by receiver
	senderTimeout time.Duration      // of Postgres: how long a frozen walhook keeps the slot
	buffer        int                // events
}

func (s *script) kills() (n int) {
	for _, st := range s.steps {
		if slices.Contains(kills, st.act) {
			n++
		}
	}
	return n
}

// length is zero for a world that plays no script.
func (s *script) length() time.Duration {
	if len(s.steps) == 0 {
		return 0
	}
	return s.steps[len(s.steps)-1].at
}

// hand is what the hand may do.
type hand struct {
	failovers bool // where Postgres can
	spares    bool // the walhook in the first seat lives as long as the run
}

// newScript makes a script of at least that length and that many kills. What the hand may not do
// is left out, and all else is the same.
func newScript(seed uint64, length time.Duration, least int, may hand, receivers []string) *script {
	r := rand.New(rand.NewPCG(seed, 1))
	s := &script{
		seed: seed, moods: map[string][]spell{},
		senderTimeout: []time.Duration{3 * time.Second, time.Minute}[r.IntN(2)],
		buffer:        []int{2000, 10000}[r.IntN(2)],
	}
	s.add(deed{at: 0, act: raise})
	at, n, up := 2*time.Second, 0, time.Duration(0) // up: Postgres is, from then on
	for at < length || n < least {
		at += between(r, 300*time.Millisecond, 1300*time.Millisecond)
		if r.IntN(12) == 0 {
			at += between(r, 2*time.Second, 5*time.Second) // a little peace
		}
		seat := 0
		if r.IntN(3) == 0 {
			seat = 1
		}
		again := at + between(r, 0, 700*time.Millisecond)
		lines := [][]int{{0}, {1}, {0, 1}, {0, 1}}[r.IntN(4)]
		switch p := r.IntN(100); {
		case p < 42 && may.spares:
			s.add(deed{at: at, act: []act{behead, cut}[p%2], lines: lines})
			n++
		case p < 30:
			s.add(deed{at: at, act: murder, seat: 0}, deed{at: again, act: raise})
			n++
		case p < 42:
			s.add(deed{at: at, act: dismiss, seat: 0}, deed{at: again, act: raise})
			n++
		case p < 50:
			lasts := between(r, 200*time.Millisecond, 1500*time.Millisecond)
			if r.IntN(4) == 0 {
				lasts = between(r, 4*time.Second, 6*time.Second)
			}
			s.add(deed{at: at, act: freeze, seat: seat}, deed{at: at + lasts, act: thaw, seat: seat})
		case p < 58:
			if at > up {
				up = at + between(r, 100*time.Millisecond, time.Second)
				s.add(deed{at: at, act: []act{crash, stun}[r.IntN(2)]}, deed{at: up, act: revive})
				n++
			}
		case p < 64:
			if at > up {
				up = at + between(r, 100*time.Millisecond, time.Second)
				s.add(deed{at: at, act: halt}, deed{at: up, act: revive})
				n++
			}
		case p < 72:
			s.add(deed{at: at, act: behead})
			n++
		case p < 80:
			s.add(deed{at: at, act: cut, lines: lines})
		case p < 85:
			end := at + between(r, 300*time.Millisecond, 3*time.Second)
			s.add(deed{at: at, act: blackhole, lines: lines}, deed{at: end, act: pass, lines: lines})
			if r.IntN(2) == 0 {
				s.add(deed{at: end, act: cut, lines: lines})
			}
		case p < 90:
			s.add(deed{at: at, act: lag, lines: lines, lag: between(r, 5*time.Millisecond, 80*time.Millisecond)},
				deed{at: at + between(r, 500*time.Millisecond, 3*time.Second), act: pass, lines: lines})
		case p < 95:
			s.add(deed{at: at, act: []act{reconfigure, rewrite}[r.IntN(2)], seed: r.Uint64()})
		case p >= 98:
			if may.failovers && at > up {
				up = at + 4*time.Second // it is at least as long before it can happen again
				s.add(deed{at: at, act: failover}, deed{at: up, act: revive})
				n++
			}
		default:
			// A second instance for a while, which is killed or stopped in the end.
			end := at + between(r, 3*time.Second, 10*time.Second)
			last := []act{murder, dismiss}[r.IntN(2)]
			s.add(deed{at: at, act: raise, seat: 1}, deed{at: end, act: last, seat: 1})
			n++
		}
	}
	slices.SortStableFunc(s.steps, func(a, b deed) int { return int(a.at - b.at) })
	for _, name := range receivers {
		s.moods[name] = spells(r, s.length())
	}
	return s
}

func (s *script) add(steps ...deed) { s.steps = append(s.steps, steps...) }

func spells(r *rand.Rand, length time.Duration) (all []spell) {
	sick := []mood{busy, asking, hanging, breaking, refusing, slow, slow, flaky, flaky}
	for at := time.Duration(0); at < length; {
		for _, sp := range []spell{
			{healthy, between(r, 500*time.Millisecond, 4*time.Second)},
			{sick[r.IntN(len(sick))], between(r, 200*time.Millisecond, 2*time.Second)},
		} {
			all = append(all, sp)
			at += sp.lasts
		}
	}
	return all
}

func between(r *rand.Rand, from, to time.Duration) time.Duration {
	return from + time.Duration(r.Int64N(int64(to-from)))
}

func TestASeedRepeatsItsScript(t *testing.T) {
	t.Parallel()
	names := []string{"a", "b"}
	one, same, other := newScript(7, time.Minute, 20, hand{failovers: true}, names), newScript(7, time.Minute, 20, hand{failovers: true}, names), newScript(8, time.Minute, 20, hand{failovers: true}, names)
	require.Equal(t, one, same)
	require.NotEqual(t, one.steps, other.steps)
	require.GreaterOrEqual(t, one.kills(), 20)
	require.GreaterOrEqual(t, one.length(), time.Minute)
	seen := map[act]bool{}
	for _, s := range newScript(1, 10*time.Minute, 0, hand{failovers: true}, names).steps {
		seen[s.act] = true
	}
	var missing []string
	for _, a := range []act{raise, murder, dismiss, freeze, thaw, crash, stun, halt, revive, behead, failover, cut, blackhole, lag, pass, reconfigure, rewrite} {
		if !seen[a] {
			missing = append(missing, string(a))
		}
	}
	require.Empty(t, strings.Join(missing, ", "))
	for _, s := range newScript(1, 10*time.Minute, 0, hand{}, names).steps {
		require.NotEqual(t, failover, s.act)
	}
	for _, s := range newScript(1, 10*time.Minute, 0, hand{spares: true}, names).steps {
		require.False(t, s.seat == 0 && (s.act == murder || s.act == dismiss), s)
	}
}
