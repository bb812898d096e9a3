package outbox

// LaneView is what tests see of a lane's inside.
type LaneView struct {
	State                                string
	Limit, Inflight, Fresh, Loaded       int
	Ready, Queues, Blocked, Keys, Tail   int
	Owed, Held, Ghosts, Pending, Waiting int
	Loading                              bool
	Parked                               int64 // by the lane's own count
}

// View looks into the lane of an endpoint; ok is false where there is none.
func (r *Relay) View(endpointID string) (v LaneView, ok bool) {
	r.mu.Lock()
	l := r.lanes[endpointID]
	r.mu.Unlock()
	if l == nil {
		return LaneView{}, false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	v = LaneView{
		State: l.state.String(), Limit: l.limit, Inflight: l.inflight, Fresh: l.fresh, Loaded: l.loaded,
		Ready: l.ready.len(), Queues: len(l.queues), Blocked: l.blocked, Keys: len(l.keys), Tail: len(l.tail),
		Held: len(l.held), Ghosts: len(l.ghosts), Pending: int(l.parks - l.told), Loading: l.loading,
		Parked: l.m.parked.Load(),
	}
	for it := l.owed.first; it != nil; it = it.next {
		v.Owed++
	}
	for _, q := range l.queues {
		v.Waiting += len(q.items)
	}
	return v, true
}

// Recount compares the lanes with the store now, and not in half a minute.
func (r *Relay) Recount() { r.recount(r.sendCtx) }

// Span is a run of rows in the ledger.
type Span = span
