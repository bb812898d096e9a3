package sender

import (
	"context"
	"fmt"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"
	otelcodes "go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/walhook/walhook/outbox"
)

const (
	rowTrace  = "0af7651916cd43dd8448eb211c80319c"
	rowSpan   = "b7ad6b7169203331"
	rowParent = "00-" + rowTrace + "-" + rowSpan + "-01"
)

// traced is a client with a tracer, and what went over the wire.
func traced(t *testing.T, rt fake, options ...sdktrace.TracerProviderOption) (*Client, *tracetest.SpanRecorder, *[]string) {
	t.Helper()
	spans, parents := tracetest.NewSpanRecorder(), new([]string)
	provider := sdktrace.NewTracerProvider(append(options, sdktrace.WithSpanProcessor(spans))...)
	c, err := New(Config{Tracer: provider.Tracer("x"), RoundTripper: fake(func(r *http.Request) (*http.Response, error) {
		*parents = append(*parents, map[string][]string(r.Header)[headerTraceparent]...)
		return rt(r)
	})})
	require.NoError(t, err)
	return c, spans, parents
}

func attributesOf(s sdktrace.ReadOnlySpan) map[string]string {
	all := map[string]string{}
	for _, a := range s.Attributes() {
		all[string(a.Key)] = a.Value.String()
	}
	return all
}

func TestAnAttemptIsASpanBetweenTheRowAndTheReceiver(t *testing.T) {
	c, spans, parents := traced(t, script(503, 204))
	e := event()
	e.Headers = []byte(`{"traceparent": "` + rowParent + `"}`)
	to := endpoint("https://hooks.example:8443/services/TOPSECRET?token=TOPSECRET", signed)
	for n := range 2 {
		c.Send(t.Context(), outbox.Attempt{Event: e, Endpoint: to, Number: n + 1})
	}
	require.Len(t, spans.Ended(), 2)
	for i, s := range spans.Ended() {
		require.Equal(t, rowTrace, s.SpanContext().TraceID().String())
		require.Equal(t, rowSpan, s.Parent().SpanID().String())
		require.True(t, s.Parent().IsRemote())
		require.Equal(t, trace.SpanKindClient, s.SpanKind())
		require.Equal(t, fmt.Sprintf("00-%s-%s-01", rowTrace, s.SpanContext().SpanID()), (*parents)[i])
		require.NotContains(t, fmt.Sprint(s.Name(), s.Attributes(), s.Status()), "TOPSECRET")
	}
	want := map[string]string{
		"messaging.system": "walhook", "messaging.operation.name": "send", "messaging.operation.type": "send",
		"messaging.destination.name": "billing", "messaging.message.id": "evt_1", "messaging.message.body.size": "95",
		"walhook.event.type": "invoice.paid", "http.request.method": "POST", "server.address": "hooks.example", "server.port": "8443",
		"http.response.status_code": "503", "network.protocol.version": "1.1", "error.type": "503", "walhook.verdict": "retry",
	}
	failed, delivered := spans.Ended()[0], spans.Ended()[1]
	got := attributesOf(failed)
	want["network.protocol.version"], want["messaging.message.body.size"] = got["network.protocol.version"], got["messaging.message.body.size"]
	require.Equal(t, want, got)
	require.Equal(t, otelcodes.Error, failed.Status().Code)

	delete(want, "error.type")
	delete(want, "walhook.verdict")
	want["http.response.status_code"], want["http.request.resend_count"] = "204", "1"
	require.Equal(t, want, attributesOf(delivered))
	require.Equal(t, otelcodes.Unset, delivered.Status().Code)
}

func TestAnAttemptWithoutAnAnswerSaysWhyInItsSpan(t *testing.T) {
	c, spans, parents := traced(t, script(0))
	c.Send(t.Context(), outbox.Attempt{Event: event(), Endpoint: endpoint("https://x.example/"), Number: 1})
	require.Len(t, spans.Ended(), 1)
	s := spans.Ended()[0]
	require.False(t, s.Parent().IsValid(), "a row without a trace context begins a trace")
	require.Equal(t, "00-"+s.SpanContext().TraceID().String()+"-"+s.SpanContext().SpanID().String()+"-01", (*parents)[0])
	got := attributesOf(s)
	require.Equal(t, "443", got["server.port"])
	require.NotContains(t, got, "http.response.status_code")
	require.Equal(t, string(outbox.ReasonProtocol), got["error.type"])
}

func TestWhatTheSamplerLeavesOutIsNotRecordedByTheReceiverEither(t *testing.T) {
	c, spans, parents := traced(t, script(204), sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.AlwaysSample())))
	e := event()
	e.Headers = []byte(`{"traceparent": "00-` + rowTrace + `-` + rowSpan + `-00"}`)
	c.Send(t.Context(), outbox.Attempt{Event: e, Endpoint: endpoint("https://x.example/"), Number: 1})
	require.Empty(t, spans.Ended())
	require.Regexp(t, "^00-"+rowTrace+"-[0-9a-f]{16}-00$", (*parents)[0])
}

func TestABatchIsOneSpanThatLinksItsRows(t *testing.T) {
	c, spans, parents := traced(t, script(204))
	batch := eventsOf(3, func(i int, e *outbox.Event) {
		if i > 0 {
			e.Headers = fmt.Appendf(nil, `{"traceparent": "00-%s-000000000000000%d-01"}`, rowTrace, i)
		}
	})
	to := endpoint("https://x.example/", func(e *outbox.Endpoint) { e.Batch.MaxEvents = 10 })
	c.Send(t.Context(), outbox.Attempt{Event: batch[0], Batch: batch, Endpoint: to, Number: 1})
	require.Len(t, spans.Ended(), 1)
	s := spans.Ended()[0]
	require.False(t, s.Parent().IsValid())
	require.Len(t, s.Links(), 2)
	require.Equal(t, "0000000000000002", s.Links()[1].SpanContext.SpanID().String())
	require.Equal(t, "3", attributesOf(s)["messaging.batch.message_count"])
	require.Contains(t, (*parents)[0], s.SpanContext().SpanID().String())
}

func TestAnAttemptThatIsCutShortEndsItsSpan(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	c, spans, _ := traced(t, func(r *http.Request) (*http.Response, error) {
		cancel()
		<-r.Context().Done()
		return nil, r.Context().Err()
	})
	c.Send(ctx, outbox.Attempt{Event: event(), Endpoint: endpoint("https://x.example/"), Number: 1})
	require.Len(t, spans.Ended(), 1)
	require.Equal(t, "cut", attributesOf(spans.Ended()[0])["error.type"])
}
