package outbox

import (
	"fmt"
	"slices"
)

// Registry is a snapshot of all endpoints: who wants which events. It never changes; a reload
// makes a new one.
type Registry struct {
	endpoints []*Endpoint
	byID      map[string]*Endpoint
	globs     [][]Glob // of endpoints, in their order
}

// NewRegistry makes a Registry. Two endpoints with one id, or a glob that cannot be read, are
// an error.
func NewRegistry(endpoints []*Endpoint) (*Registry, error) {
	r := &Registry{endpoints: endpoints, byID: make(map[string]*Endpoint, len(endpoints))}
	for _, e := range endpoints {
		if r.byID[e.ID] != nil {
			return nil, fmt.Errorf("endpoint id %q is used twice", e.ID)
		}
		r.byID[e.ID] = e
		globs := make([]Glob, len(e.Events))
		for i, g := range e.Events {
			globs[i] = CompileGlob(g)
		}
		r.globs = append(r.globs, globs)
	}
	return r, nil
}

// Endpoint is the endpoint of that id, or nil.
func (r *Registry) Endpoint(id string) *Endpoint { return r.byID[id] }

// Endpoints are all endpoints in the order of their registration.
func (r *Registry) Endpoints() []*Endpoint { return r.endpoints }

// Match lists the endpoints that want events of that tenant and type. Tenants come first and
// fail closed: an endpoint without a tenant gets only events without one.
func (r *Registry) Match(tenant, eventType string) []*Endpoint {
	var out []*Endpoint
	for i, e := range r.endpoints {
		if e.Status == Disabled || (e.Tenant != "*" && e.Tenant != tenant) {
			continue
		}
		if slices.ContainsFunc(r.globs[i], func(g Glob) bool { return g.Match(eventType) }) {
			out = append(out, e)
		}
	}
	return out
}
