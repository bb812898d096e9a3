package sender

import (
	"context"
	"encoding/hex"
	"net/url"
	"strconv"
	"time"

	"go.opentelemetry.io/otel/attribute"
	otelcodes "go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/walhook/walhook/outbox"
)

// span begins the span of an attempt: a child of the trace context that the request carries,
// which is the row's. The request carries the span's from here on.
//
// Names are those of OpenTelemetry's semantic conventions for HTTP clients and for messaging. There
// is no url.full: the paths of other people's webhooks are credentials as often as queries are.
func (c *Client) span(parent context.Context, m *message, t *target, a outbox.Attempt, together *batch, begin time.Time) trace.Span {
	id, attributes := a.Event.ID, make([]attribute.KeyValue, 0, 12)
	var links []trace.Link
	if together != nil {
		id = together.id
		attributes = append(attributes, attribute.Int("messaging.batch.message_count", len(together.events)))
		if len(together.events) > 1 { // several have no parent in common
			for _, e := range together.events {
				if sc := spanContext(traceparent(e.Headers)); sc.IsValid() {
					links = append(links, trace.Link{SpanContext: sc})
				}
			}
		}
	} else {
		attributes = append(attributes, attribute.String("walhook.event.type", a.Event.Type))
	}
	attributes = append(
		attributes,
		attribute.String("messaging.system", "walhook"),
		attribute.String("messaging.operation.name", "send"),
		attribute.String("messaging.operation.type", "send"),
		attribute.String("messaging.destination.name", t.endpoint.ID),
		attribute.String("messaging.message.id", id),
		attribute.Int64("messaging.message.body.size", m.body.size()),
		attribute.String("http.request.method", m.method),
		attribute.String("server.address", m.url.Hostname()),
		attribute.Int("server.port", port(m.url)),
	)
	if a.Number > 1 {
		attributes = append(attributes, attribute.Int("http.request.resend_count", a.Number-1))
	}

	if sc := spanContext(m.get(headerTraceparent)); sc.IsValid() {
		parent = trace.ContextWithRemoteSpanContext(parent, sc)
	}
	_, span := c.tracer.Start(
		parent, "send webhook", trace.WithSpanKind(trace.SpanKindClient), trace.WithTimestamp(begin),
		trace.WithAttributes(attributes...), trace.WithLinks(links...),
	)
	if sc := span.SpanContext(); sc.IsValid() {
		m.set(headerTraceparent, "00-"+sc.TraceID().String()+"-"+sc.SpanID().String()+"-"+sc.TraceFlags().String())
	}
	return span
}

// endSpan says how the attempt ended; the status is zero where there was none.
func endSpan(span trace.Span, o outbox.Outcome, r result, now time.Time) {
	if r.status != 0 {
		version := strconv.Itoa(r.major)
		if r.major == 1 {
			version += "." + strconv.Itoa(r.minor)
		}
		span.SetAttributes(attribute.Int("http.response.status_code", r.status), attribute.String("network.protocol.version", version))
	}
	if o.Verdict != outbox.Delivered {
		what := string(o.Reason)
		switch {
		case r.status != 0:
			what = strconv.Itoa(r.status)
		case o.Verdict == outbox.Cut:
			what = "cut"
		}
		span.SetAttributes(attribute.String("error.type", what), attribute.String("walhook.verdict", o.Verdict.String()))
		span.SetStatus(otelcodes.Error, what)
	}
	span.End(trace.WithTimestamp(now))
}

// spanContext is that of a valid traceparent; of an empty one, an invalid one.
func spanContext(traceparent string) trace.SpanContext {
	if len(traceparent) < 55 {
		return trace.SpanContext{}
	}
	traceID, _ := trace.TraceIDFromHex(traceparent[3:35])
	spanID, _ := trace.SpanIDFromHex(traceparent[36:52])
	flags, _ := hex.DecodeString(traceparent[53:55])
	if len(flags) != 1 {
		return trace.SpanContext{}
	}
	return trace.NewSpanContext(trace.SpanContextConfig{TraceID: traceID, SpanID: spanID, TraceFlags: trace.TraceFlags(flags[0]), Remote: true})
}

func port(u *url.URL) int {
	if p, err := strconv.Atoi(u.Port()); err == nil {
		return p
	}
	if u.Scheme == "http" {
		return 80
	}
	return 443
}
