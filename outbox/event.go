package outbox

import (
	"time"

	"github.com/walhook/walhook/cdc"
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
}

// eventOverhead is what an event costs beside its bytes: the struct, its deliveries, map entries.
const eventOverhead = 512

// Size is how many bytes of memory the event holds, for the buffer's budget.
func (e *Event) Size() int64 {
	return int64(eventOverhead + len(e.ID) + len(e.Type) + len(e.Key) + len(e.Tenant) + len(e.Headers) + len(e.Data))
}
