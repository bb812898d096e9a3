package outbox

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/walhook/walhook/cdc"
)

// NoticePrefix is the prefix of the logical messages by which walhook tells of itself: a notice goes
// into the WAL and comes back in the stream, so it has a place among all events, outlives a crash, and is
// delivered like any other.
const NoticePrefix = "walhook.events"

// The types of notices. An endpoint gets them by a name or glob that begins with walhook.
const (
	TypeOpened   = ownTypes + "endpoint.opened"
	TypeClosed   = ownTypes + "endpoint.closed"
	TypeDisabled = ownTypes + "endpoint.disabled"
	TypeInvalid  = ownTypes + "endpoint.invalid"
	TypeDead     = ownTypes + "delivery.dead"
)

// notice is the content of a logical message.
type notice struct {
	ID       string    `json:"id"`
	Type     string    `json:"type"`
	Endpoint string    `json:"endpoint"` // whom it is about
	Tenant   string    `json:"tenant"`
	Time     time.Time `json:"time"`
	Data     any       `json:"data"`
}

// endpointNotice is the data of walhook.endpoint.….
type endpointNotice struct {
	Endpoint string `json:"endpoint"`
	Reason   string `json:"reason,omitempty"`
}

// deathNotice is the data of walhook.delivery.dead.
type deathNotice struct {
	Endpoint string      `json:"endpoint,omitempty"` // empty: a row that could not be mapped
	Event    eventNotice `json:"event"`
	Reason   Reason      `json:"reason"`
	Status   int         `json:"status,omitempty"`
	Detail   string      `json:"detail,omitempty"`
	Attempts int         `json:"attempts"`
}

type eventNotice struct {
	ID   string `json:"id"`
	Type string `json:"type"`
	Key  string `json:"key,omitempty"`
}

// noticeID is how the ids of notices begin.
const noticeID = "walhook_"

// isNotice tells whether an event is one of ours.
func (e *Event) isNotice() bool {
	return strings.HasPrefix(e.Type, ownTypes) && strings.HasPrefix(e.ID, noticeID)
}

// noticeOf is the content of a notice; nil where no endpoint wants any. It takes no lock, as a lane may hold its own.
func (r *Relay) noticeOf(eventType, endpointID, tenant string, data any) []byte {
	if tenant == "*" {
		tenant = ""
	}
	if !r.eager.Load() {
		return nil
	}
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails
	content, err := json.Marshal(notice{
		ID: noticeID + hex.EncodeToString(id), Type: eventType, Endpoint: endpointID, Tenant: tenant, Time: time.Now().UTC(), Data: data,
	})
	if err != nil {
		panic(err) // texts and numbers always encode
	}
	return content
}

// noticed is the event of a notice; nil where a message is none of ours.
func noticed(row *cdc.Row) *Event {
	var n struct {
		notice
		Data json.RawMessage `json:"data"`
	}
	if json.Unmarshal(row.Content, &n) != nil || n.ID == "" || !strings.HasPrefix(n.Type, ownTypes) {
		return nil
	}
	return &Event{
		ID: n.ID, Type: n.Type, Key: n.Endpoint, Tenant: n.Tenant, Time: n.Time, Data: n.Data, JSON: true,
		Position: row.Position, Commit: row.CommitTime,
	}
}

// maxNotices is how many notices may wait to be written; what is more than that is not told.
const maxNotices = 10_000

// herald writes notices that belong to no other write.
type herald struct {
	emit func(context.Context, [][]byte) error
	log  *zap.Logger

	mu      sync.Mutex // guards what follows
	waiting [][]byte
	signal  chan struct{}
}

func (h *herald) tell(content []byte) {
	if content == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.waiting) == maxNotices {
		h.log.Warn("too many notices wait to be written: this one is not told", zap.ByteString("notice", content))
		return
	}
	h.waiting = append(h.waiting, content)
	select {
	case h.signal <- struct{}{}:
	default:
	}
}

// run writes until ctx ends.
func (h *herald) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-h.signal:
		}
		h.flush(ctx)
	}
}

// flush writes what waits, and tries for as long as ctx lasts.
func (h *herald) flush(ctx context.Context) {
	h.mu.Lock()
	all := h.waiting
	h.waiting = nil
	h.mu.Unlock()
	for backoff := 50 * time.Millisecond; len(all) > 0; backoff = min(2*backoff, journalMaxBackoff) {
		if h.emit(ctx, all) == nil {
			return
		}
		t := time.NewTimer(backoff)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}

// CircuitMoved tells of an endpoint's circuit that it opened, or closed again.
func (r *Relay) CircuitMoved(endpointID string, opened bool) {
	r.mu.Lock()
	ep := r.registry.Endpoint(endpointID)
	r.mu.Unlock()
	if ep == nil {
		return
	}
	eventType := TypeClosed
	if opened {
		eventType = TypeOpened
	}
	r.herald.tell(r.noticeOf(eventType, endpointID, ep.Tenant, endpointNotice{Endpoint: endpointID}))
}

// deathOf is the notice of a dead delivery; nil for one of a notice, so that none makes another.
func (r *Relay) deathOf(e *Event, endpointID string, attempts int, out Outcome) []byte {
	if e.isNotice() {
		return nil
	}
	return r.noticeOf(TypeDead, endpointID, e.Tenant, deathNotice{
		Endpoint: endpointID, Event: eventNotice{e.ID, e.Type, e.Key}, Reason: out.Reason, Status: out.Status, Detail: out.Detail, Attempts: attempts,
	})
}

// notice gives a notice to the endpoints that want it, but not to the one that it is about: that would be
// told for ever that it cannot be told.
func (r *Relay) notice(row *cdc.Row) {
	now := time.Now()
	ev := noticed(row)
	if ev == nil {
		r.ledger.Open(row.Position, 0, now)
		return
	}
	to := slices.DeleteFunc(slices.Clone(r.lanesFor(ev)), func(l *Lane) bool { return l.id == ev.Key })
	r.route(ev, to, now)
}
