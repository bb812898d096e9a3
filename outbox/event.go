package outbox

import (
	"time"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox/rule"
)

// Event is what an outbox row becomes. It is immutable once mapped, owns its bytes, and is
// shared by the deliveries to all endpoints that want it.
type Event struct {
	ID      string // the webhook-id: prefix and row id, percent-encoded; the same for ever
	Type    string
	Key     string // orders events; empty has no order to keep
	Tenant  string
	Time    time.Time // the row's own time, or its commit's
	Headers []byte    // a JSON object, or nil
	Data    []byte    // the payload, byte for byte as the row holds it
	JSON    bool      // Data is valid JSON

	Position cdc.Position
	Commit   time.Time // when its transaction committed, by the server's clock

	// view is the event as rules see it, with what they have parsed of it. It is set before the event is
	// shared, and only where an endpoint that wants it has rules.
	view   *rule.Event
	parses bool // they parse it, and Size counts that
}

// eventOverhead is what an event costs beside its bytes: the struct, its deliveries, map entries.
const eventOverhead = 512

// Size is how many bytes of memory the event holds, for the buffer's budget.
func (e *Event) Size() int64 {
	text := len(e.Headers) + len(e.Data)
	if e.parses {
		text += rule.ParsedSize(text)
	}
	return int64(eventOverhead + len(e.ID) + len(e.Type) + len(e.Key) + len(e.Tenant) + text)
}

// View is the event as rules see it: the one that all share, where a rule was known when
// the event came, else one of the caller's own.
func (e *Event) View() *rule.Event {
	if e.view != nil {
		return e.view
	}
	at := e.Time
	if at.IsZero() {
		at = e.Commit
	}
	return &rule.Event{ID: e.ID, Type: e.Type, Key: e.Key, Tenant: e.Tenant, Time: at, Headers: e.Headers, Data: e.Data, JSON: e.JSON}
}

// prepare makes the view that the rules of an endpoint share. It is called before anybody else has the event.
func (e *Event) prepare(ep *Endpoint) {
	some, parses := ep.rules()
	if some && e.view == nil {
		e.view = e.View()
	}
	e.parses = e.parses || parses
}
