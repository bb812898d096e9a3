package outbox

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Registry is all endpoints: who wants which events. Its owner guards it.
type Registry struct {
	byID  map[string]*member
	exact map[subscription][]*member // by every type that an endpoint without globs names
	globs map[string][]*member       // of a tenant: those with a glob
	turn  uint64
	own   int // endpoints that want events of walhook itself
}

// subscription is a type of one tenant's events; tenant "*" is for those of all.
type subscription struct{ tenant, eventType string }

type member struct {
	*Endpoint
	globs []Glob // nil: every one of Events is a type as it stands
	turn  uint64 // of its registration
}

// ownTypes is how the types begin of events that tell of walhook itself. A glob matches them only
// where it begins so too: who asks for everything means the app's events.
const ownTypes = "walhook."

// NewRegistry makes a Registry. Two endpoints with one id are an error.
func NewRegistry(endpoints []*Endpoint) (*Registry, error) {
	r := &Registry{byID: make(map[string]*member, len(endpoints)), exact: map[subscription][]*member{}, globs: map[string][]*member{}}
	for _, e := range endpoints {
		if r.byID[e.ID] != nil {
			return nil, fmt.Errorf("endpoint id %q is used twice", e.ID)
		}
		r.set(e)
	}
	return r, nil
}

// set enters an endpoint, in the place of the one that had its id.
func (r *Registry) set(e *Endpoint) {
	r.turn++
	m := &member{Endpoint: e, turn: r.turn}
	if old := r.byID[e.ID]; old != nil {
		m.turn = old.turn
		r.remove(e.ID)
	}
	r.byID[e.ID] = m
	if e.Status == Disabled {
		return
	}
	if m.wantsOwn() {
		r.own++
	}
	if slices.ContainsFunc(e.Events, func(g string) bool { return strings.ContainsAny(g, "*?") }) {
		for _, g := range e.Events {
			m.globs = append(m.globs, CompileGlob(g))
		}
		r.globs[e.Tenant] = append(r.globs[e.Tenant], m)
		return
	}
	for _, s := range m.subscriptions() {
		r.exact[s] = append(r.exact[s], m)
	}
}

func (m *member) wantsOwn() bool {
	return slices.ContainsFunc(m.Events, func(g string) bool { return strings.HasPrefix(g, ownTypes) })
}

func (m *member) subscriptions() []subscription {
	types := slices.Compact(slices.Sorted(slices.Values(m.Events)))
	all := make([]subscription, len(types))
	for i, t := range types {
		all[i] = subscription{m.Tenant, t}
	}
	return all
}

// remove takes an endpoint out; one that is not there is left alone.
func (r *Registry) remove(id string) {
	m := r.byID[id]
	delete(r.byID, id)
	if m != nil && m.Status != Disabled && m.wantsOwn() {
		r.own--
	}
	switch {
	case m == nil || m.Status == Disabled:
	case m.globs != nil:
		if r.globs[m.Tenant] = without(r.globs[m.Tenant], m); len(r.globs[m.Tenant]) == 0 {
			delete(r.globs, m.Tenant)
		}
	default:
		for _, s := range m.subscriptions() {
			if r.exact[s] = without(r.exact[s], m); len(r.exact[s]) == 0 {
				delete(r.exact, s)
			}
		}
	}
}

func without(all []*member, m *member) []*member {
	if i := slices.Index(all, m); i >= 0 {
		return slices.Delete(all, i, i+1)
	}
	return all
}

// Endpoint is the endpoint of that id, or nil.
func (r *Registry) Endpoint(id string) *Endpoint {
	if m := r.byID[id]; m != nil {
		return m.Endpoint
	}
	return nil
}

// Endpoints are all endpoints in the order of their registration.
func (r *Registry) Endpoints() []*Endpoint {
	all := make([]*member, 0, len(r.byID))
	for _, m := range r.byID {
		all = append(all, m)
	}
	return inTurn(all)
}

// Wants lists the endpoints that want an event, by their filters too, and those of which the filter
// cannot judge it.
func (r *Registry) Wants(e *Event) (to, refused []*Endpoint) {
	for _, ep := range r.Match(e.Tenant, e.Type) {
		switch yes, err := wants(e, ep); {
		case err != nil:
			refused = append(refused, ep)
		case yes:
			to = append(to, ep)
		}
	}
	return to, refused
}

// Match lists the endpoints that want events of that tenant and type. Tenants come first and
// fail closed: an endpoint without a tenant gets only events without one.
func (r *Registry) Match(tenant, eventType string) []*Endpoint {
	var found []*member
	of := func(tenant string) {
		found = append(found, r.exact[subscription{tenant, eventType}]...)
		for _, m := range r.globs[tenant] {
			if m.wants(eventType) {
				found = append(found, m)
			}
		}
	}
	if of(tenant); tenant != "*" {
		of("*")
	}
	return inTurn(found)
}

func inTurn(all []*member) []*Endpoint {
	slices.SortFunc(all, func(a, b *member) int { return cmp.Compare(a.turn, b.turn) })
	var out []*Endpoint
	for _, m := range all {
		out = append(out, m.Endpoint)
	}
	return out
}

func (m *member) wants(eventType string) bool {
	own := strings.HasPrefix(eventType, ownTypes)
	return slices.ContainsFunc(m.globs, func(g Glob) bool {
		return g.Match(eventType) && (!own || strings.HasPrefix(g.pattern, ownTypes))
	})
}
