package outbox

import (
	"context"
	"sync/atomic"
)

// mostAtRest is how many goroutines wait for the next attempt, of whatever lane.
const mostAtRest = 128

// crew are the goroutines that attempts run in. A new one would begin with a small stack, and grow it in each
// attempt anew: where there are thousands of lanes with an event now and then, that costs as much as the request.
type crew struct {
	over context.Context // of the relay
	jobs chan job
	rest atomic.Int32 // goroutines that wait for a job, or are about to
}

// job is an attempt that was taken from its lane, with the settings it was taken with.
type job struct {
	lane *Lane
	it   *item
	ep   *Endpoint
}

// do has somebody do it, and does not wait for that.
func (c *crew) do(j job) {
	select {
	case c.jobs <- j:
	default:
		go c.work(j)
	}
}

func (c *crew) work(j job) {
	for {
		j.lane.work(j.it, j.ep)
		j = job{}
		if c.rest.Add(1) > mostAtRest {
			c.rest.Add(-1)
			return
		}
		select {
		case j = <-c.jobs:
			c.rest.Add(-1)
		case <-c.over.Done():
			c.rest.Add(-1)
			return
		}
	}
}
