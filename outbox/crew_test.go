package outbox

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// shift is a crew whose jobs take as long as their endpoint's timeout, and counts them.
type shift struct {
	*crew
	began, ended atomic.Int32
	stop         context.CancelFunc
}

// onShift runs a test with a crew in a bubble.
func onShift(t *testing.T, test func(*testing.T, *shift)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		c := &shift{crew: newCrew(ctx), stop: cancel}
		c.starved = func() bool { return false }
		c.run = func(j job, h *hand) {
			h.inLine.Store(j.ep.ID == "in line")
			c.began.Add(1)
			time.Sleep(j.ep.Timeout)
			c.ended.Add(1)
		}
		test(t, c)
	})
}

func lasting(d time.Duration) job { return job{ep: &Endpoint{Timeout: d}} }

// What is quick gets no quicker by more of it at once.
func TestQuickAttemptsTakeTurns(t *testing.T) {
	onShift(t, func(t *testing.T, c *shift) {
		for range 3 * c.most {
			c.do(lasting(time.Millisecond))
		}
		for turn := 1; turn <= 3; turn++ {
			synctest.Wait()
			require.EqualValues(t, turn*c.most, c.began.Load())
			require.EqualValues(t, (turn-1)*c.most, c.ended.Load())
			time.Sleep(time.Millisecond)
		}
		synctest.Wait()
		require.EqualValues(t, 3*c.most, c.ended.Load())
		require.Len(t, c.rest, min(c.most, mostAtRest))
		require.Zero(t, c.queue.len())
		require.Zero(t, c.quick)
	})
}

// However many wait for their receivers, the next one waits for them no longer than quickAttempt.
func TestSlowAttemptsKeepNobodyWaiting(t *testing.T) {
	onShift(t, func(t *testing.T, c *shift) {
		for range 10 * c.most {
			c.do(lasting(time.Minute))
		}
		for turn := 1; turn <= 10; turn++ {
			synctest.Wait()
			require.EqualValues(t, turn*c.most, c.began.Load())
			time.Sleep(quickAttempt)
		}
		c.do(lasting(time.Millisecond))
		synctest.Wait()
		require.EqualValues(t, 10*c.most+1, c.began.Load())
		time.Sleep(time.Millisecond)
		synctest.Wait()
		require.EqualValues(t, 1, c.ended.Load())
		time.Sleep(time.Minute)
		synctest.Wait()
		require.EqualValues(t, 10*c.most+1, c.ended.Load())

		// Nor the many of one endpoint that came just before.
		for range 10 * c.most {
			c.do(lasting(time.Minute))
		}
		lone := lasting(time.Millisecond)
		lone.alone = true
		c.do(lone)
		time.Sleep(quickAttempt + time.Millisecond)
		synctest.Wait()
		require.EqualValues(t, 10*c.most+2, c.ended.Load())
		time.Sleep(time.Hour)
		synctest.Wait()
		require.Zero(t, c.quick)
		require.LessOrEqual(t, len(c.rest), mostAtRest)
	})
}

// Those who wait for a connection that others have, or for the machine, are let through later: more of them would only make that
// line longer.
func TestAttemptsInLineKeepOthersWaitingALittle(t *testing.T) {
	for name, starved := range map[string]bool{"in line": false, "starved": true} {
		t.Run(name, func(t *testing.T) {
			onShift(t, func(t *testing.T, c *shift) {
				c.starved = func() bool { return starved }
				for range 2 * c.most {
					c.do(job{ep: &Endpoint{ID: name, Timeout: time.Minute}})
				}
				time.Sleep(lineAttempt - 1)
				synctest.Wait()
				require.EqualValues(t, c.most, c.began.Load())
				time.Sleep(time.Nanosecond)
				synctest.Wait()
				require.EqualValues(t, 2*c.most, c.began.Load())
				time.Sleep(time.Hour)
				synctest.Wait()
				require.Zero(t, c.quick)
			})
		})
	}
}

// The relay's end cuts attempts short, but each is made: its lane waits for it.
func TestWhatWaitsAtTheEndIsDone(t *testing.T) {
	onShift(t, func(t *testing.T, c *shift) {
		for range 3 * c.most {
			c.do(lasting(time.Second))
		}
		c.stop()
		c.do(lasting(time.Second))
		time.Sleep(time.Minute)
		synctest.Wait() // and no goroutine is left, or the bubble would not end
		require.EqualValues(t, 3*c.most+1, c.ended.Load())
		require.Empty(t, c.rest)
	})
}

// isClosed tells whether it is closed.
func isClosed(c <-chan struct{}) bool {
	synctest.Wait()
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// An event's deliveries, from the first that begins to the last that ends, are no lull; what hangs is no work.
func TestALullIsWhereNothingIsUnderWay(t *testing.T) {
	onShift(t, func(t *testing.T, c *shift) {
		lull := c.nextLull()
		require.False(t, isClosed(lull), "nothing has ended yet")
		c.handOver(func() {
			c.do(lasting(time.Millisecond))
			time.Sleep(2 * time.Millisecond)
			require.False(t, isClosed(lull), "more of the event is to come")
			c.do(lasting(time.Minute))
			c.do(lasting(quickAttempt + time.Millisecond))
		})
		require.False(t, isClosed(lull))
		require.Equal(t, lull, c.nextLull())
		time.Sleep(quickAttempt + time.Millisecond)
		require.True(t, isClosed(lull), "the last one ended, but for one that waits for its receiver")

		lull = c.nextLull()
		require.False(t, isClosed(lull), "it is the next one that is asked for")
		c.handOver(func() {})
		require.True(t, isClosed(lull), "an event whose lanes are all shut")

		lull = c.nextLull()
		for range c.most + 1 {
			c.do(lasting(time.Millisecond))
		}
		time.Sleep(time.Millisecond)
		require.False(t, isClosed(lull), "one had to wait")
		time.Sleep(time.Millisecond)
		require.True(t, isClosed(lull))

		lull = c.nextLull()
		c.do(lasting(20 * time.Millisecond))
		time.Sleep(20*time.Millisecond - withReceiver)
		c.do(lasting(20 * time.Millisecond))
		time.Sleep(withReceiver - time.Nanosecond)
		require.False(t, isClosed(lull))
		time.Sleep(time.Nanosecond)
		require.True(t, isClosed(lull), "the one under way waits for its receiver")
		time.Sleep(time.Minute) // the one that hangs
	})
}
