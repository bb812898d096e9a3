package sender

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/walhook/walhook/outbox"
)

// headerBatchIDs lists the ids of a batch whose elements do not carry them, with a comma between
// them, as many as there are elements and in their order.
const headerBatchIDs = "webhook-batch-ids"

// typeCloudEventsBatch is the JSON batch format of CloudEvents 1.0.2
// (https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md#4-json-batch-format).
const typeCloudEventsBatch = "application/cloudevents-batch+json"

// batch is several events as one body: a JSON array, also of one.
type batch struct {
	events []*outbox.Event // that are in it, in their order
	apart  *outbox.Apart   // what is not; nil where all are

	id          string // its webhook-id
	ids         string // for headerBatchIDs; empty where the elements carry their own
	body        *body
	contentType string
}

// postBatch is post for a batch. What can be said of one event alone, because no request can be
// made of it, says nothing of the others.
func (c *Client) postBatch(ctx context.Context, t *target, a outbox.Attempt, seen *Exchange) (outbox.Outcome, effect) {
	b := t.batch(a.Batch)
	if len(b.events) == 0 {
		first := b.apart.Unfit[0]
		return outbox.Outcome{Verdict: outbox.Dead, Reason: first.Reason, Detail: first.Detail, Apart: b.apart}, neither
	}
	o, effect := c.post(ctx, t, a, b, seen)
	o.Apart = b.apart
	return o, effect
}

// batch renders events in their order, as far as they fit.
func (t *target) batch(events []*outbox.Event) *batch {
	b := &batch{events: make([]*outbox.Event, 0, len(events)), contentType: "application/json"}
	if t.endpoint.Format == outbox.FormatCloudEvents {
		b.contentType = typeCloudEventsBatch
	}
	apart := func() *outbox.Apart {
		if b.apart == nil {
			b.apart = &outbox.Apart{}
		}
		return b.apart
	}
	limit := t.endpoint.MaxBatchBytes()
	whole, digest := []byte{'['}, sha256.New()
	var ids strings.Builder
	for i, e := range events {
		element, bad := t.element(e)
		if bad == nil && limit > 0 && 2+element.size() > limit {
			bad = t.tooLargeAlone(2 + element.size())
		}
		if bad != nil {
			apart().Unfit = append(apart().Unfit, outbox.Unfit{Event: e, Reason: bad.reason, Detail: bad.detail})
			continue
		}
		if len(b.events) > 0 {
			if limit > 0 && int64(len(whole))+element.size()+2 > limit || ids.Len()+1+len(e.ID) > outbox.BatchIDs {
				apart().Left = events[i:]
				break
			}
			whole = append(whole, ',')
		}
		for _, part := range element.parts {
			whole = append(whole, part...)
		}
		digest.Write(append([]byte(e.ID), '\n')) // an id holds no line break
		if t.bare() {
			if ids.Len() > 0 {
				ids.WriteByte(',')
			}
			ids.WriteString(e.ID)
		}
		b.events = append(b.events, e)
	}
	b.body = &body{parts: [3][]byte{append(whole, ']')}}
	b.id = "batch_" + hex.EncodeToString(digest.Sum(nil)[:16])
	b.ids = ids.String()
	return b
}

// element is an event as it stands in a batch: as it would stand alone, with its id where its
// format has none.
func (t *target) element(e *outbox.Event) (*body, *unsendable) {
	if !validID(e.ID) {
		return nil, badID
	}
	b, _, bad := t.render(e, nil)
	switch {
	case bad != nil:
		return nil, bad
	case t.endpoint.Transform.Body != nil: // whatever it makes of the event
	case t.endpoint.Format == outbox.FormatRaw && (!e.JSON || len(e.Data) == 0):
		return nil, notJSONInBatch
	case t.endpoint.Format == outbox.FormatStandard:
		head := append(make([]byte, 0, len(b.parts[0])+len(e.ID)+9), `{"id":`...)
		head = append(appendJSONString(head, e.ID), ',')
		b.parts[0] = append(head, b.parts[0][1:]...)
	}
	return b, nil
}

// bare tells whether the elements of a batch do not carry their ids.
func (t *target) bare() bool {
	return t.endpoint.Format == outbox.FormatRaw || t.endpoint.Transform.Body != nil
}

func (t *target) tooLargeAlone(size int64) *unsendable {
	key := "max_payload"
	if t.endpoint.Batch.MaxBytes > 0 {
		key = "batch.max_bytes"
	}
	return &unsendable{outbox.ReasonTooLarge, fmt.Sprintf("the body has %d bytes with this event alone, %s is %d", size, key, t.endpoint.MaxBatchBytes())}
}
