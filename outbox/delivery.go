package outbox

import (
	"context"
	"sync/atomic"
	"time"
)

// Attempt is what a Sender is asked to do once: post this event, or this batch, to this endpoint.
type Attempt struct {
	Event    *Event
	Batch    []*Event // all events of the request in commit order, Event the first; nil where the endpoint takes no batches
	Endpoint *Endpoint
	Number   int  // from 1, over all restarts; of a batch, the highest of its events
	Replay   bool // somebody asked for the event once more

	InLine *atomic.Bool // set while it waits for a connection that others of its host have; nil where nobody asks
}

// Alone is an attempt of one event, in a batch of its own where the endpoint takes batches.
func Alone(e *Event, to *Endpoint) Attempt {
	a := Attempt{Event: e, Endpoint: to, Number: 1}
	if to.Batch.MaxEvents > 1 {
		a.Batch = []*Event{e}
	}
	return a
}

// Sender makes one attempt and judges its answer. It waits for nothing but the network,
// spends at most the endpoint's timeout and a tenth of a second, and never returns an error: a 503 is a normal day.
type Sender interface {
	Send(ctx context.Context, a Attempt) Outcome
	// Forget drops what was learned of an endpoint that is gone: its circuit, its connections.
	Forget(endpointID string)
}

// Verdict is what an Outcome means for the delivery.
type Verdict uint8

// The verdicts.
const (
	Delivered Verdict = iota + 1 // the receiver has it
	Retry                        // the attempt failed and was spent
	Dead                         // no attempt will ever do better
	Held                         // the circuit is open, or this host short: nothing was sent, no attempt was spent
	Cut                          // we ended the attempt ourselves: no attempt was spent
)

func (v Verdict) String() string {
	switch v {
	case Delivered:
		return "delivered"
	case Retry:
		return "retry"
	case Dead:
		return "dead"
	case Held:
		return "held"
	case Cut:
		return "cut"
	}
	return "unknown"
}

// Reason says why a delivery was parked or died. It is a closed set: it labels metrics and
// stands in walhook.deliveries.
type Reason string

// Why an attempt failed.
const (
	ReasonStatus         Reason = "status" // the answer's status; Outcome.Status has it
	ReasonTimeout        Reason = "timeout"
	ReasonConnect        Reason = "connect"
	ReasonReset          Reason = "reset" // the connection broke before an answer
	ReasonDNS            Reason = "dns"
	ReasonTLS            Reason = "tls"
	ReasonProtocol       Reason = "protocol" // the answer was not HTTP
	ReasonAuth           Reason = "auth"     // no access token was to be had
	ReasonRefusedAddress Reason = "refused_address"
)

// Why a delivery waits or died without an attempt that failed.
const (
	ReasonBreakerOpen    Reason = "breaker_open"
	ReasonShortage       Reason = "shortage" // this host lacks descriptors, ports or memory
	ReasonPaused         Reason = "paused"
	ReasonRetryAfter     Reason = "retry_after"     // the receiver asked us to wait
	ReasonBehindKey      Reason = "behind_key"      // an earlier event of its key is parked
	ReasonBehindEndpoint Reason = "behind_endpoint" // earlier events of its endpoint are parked, or its lane is full
	ReasonSlow           Reason = "slow"            // it held the watermark longer than spill_after
	ReasonSnapshot       Reason = "snapshot"        // read from its table, as the slot did not bring it
	ReasonShutdown       Reason = "shutdown"
	ReasonMaxAge         Reason = "max_age"
	ReasonTooLarge       Reason = "too_large"
	ReasonNotJSON        Reason = "not_json"
	ReasonBadRequest     Reason = "bad_request"      // no valid request can be made of this event
	ReasonFilter         Reason = "filter_failed"    // the endpoint's filter gave an error
	ReasonTransform      Reason = "transform_failed" // a rule of the endpoint's transform did
	ReasonUnmappable     Reason = "unmappable"       // the row cannot be understood
	ReasonRemoved        Reason = "endpoint_removed"
)

// Outcome is the result of an Attempt, a value and not an error.
type Outcome struct {
	Verdict Verdict
	Reason  Reason
	Status  int    // of the answer; zero where there was none
	Detail  string // for people; holds no secret and no URL

	RetryAfter time.Duration // what the receiver asked for; zero where it did not
	Until      time.Time     // Held: when to ask again
	Slow       bool          // the receiver asks for less: 429, 502, 503, 504
	Gone       bool          // 410: the endpoint is to be disabled
	Apart      *Apart        // of a batch: what was not in the request; nil where all was
	Waited     time.Duration // before the request, for a connection that others had
}
