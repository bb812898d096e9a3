package outbox

import (
	"slices"
	"time"

	"go.uber.org/zap"
)

// wants says whether an endpoint that an event was routed to wants it by its filter too.
func wants(ev *Event, ep *Endpoint) (bool, error) {
	ev.prepare(ep)
	if ep.Filter == nil {
		return true, nil
	}
	return ep.Filter.Wants(ev.view)
}

// filterDetail is what a dead delivery says of a filter that failed.
func filterDetail(err error) string { return "filter: " + err.Error() }

// refusal is a lane whose filter could not judge an event.
type refusal struct {
	lane *Lane
	why  error
}

// sift leaves the lanes whose endpoints' filters want an event. The list it is given, which is
// remembered for the event's type, stays as it is.
func sift(ev *Event, lanes []*Lane) (wanted []*Lane, refused []refusal) {
	all := true
	for i, l := range lanes {
		yes, err := wants(ev, l.now.Load())
		switch {
		case err == nil && yes && all:
			continue
		case err == nil && yes:
			wanted = append(wanted, l)
			continue
		case err != nil:
			refused = append(refused, refusal{l, err})
		}
		if all {
			all, wanted = false, slices.Clone(lanes[:i])
		}
	}
	if all {
		return lanes, nil
	}
	return wanted, refused
}

// refuse makes a dead delivery of an event that the endpoint's filter could not judge. It never
// was in the order of its key, so nothing waits for it.
func (l *Lane) refuse(e *Event, sp *span, now time.Time, why error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if h := l.held[e.Position]; l.gone || h != nil && h.event != nil && h.event.ID == e.ID {
		l.relay.ledger.Settle(sp)
		l.relay.ledger.Release(sp, e)
		return
	}
	it := &item{event: e, key: l.ep.orderKey(e), span: sp, arrived: now}
	detail := filterDetail(why)
	l.log.Warn("delivery is dead", zap.String("event", e.ID), zap.String("reason", string(ReasonFilter)), zap.String("detail", detail))
	l.m.deadTotal.Inc()
	l.m.dead.Add(1)
	l.owed.push(it)
	l.insert(it, Change{
		State: StateDead, Reason: ReasonFilter, Detail: detail,
		Notice: l.relay.deathOf(e, l.id, 0, Outcome{Reason: ReasonFilter, Detail: detail}),
	}, nil)
	l.leave(it, over)
}
