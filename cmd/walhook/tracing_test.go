package main

import (
	"compress/gzip"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	"github.com/walhook/walhook/sender/sendertest"
)

// collected is an OTLP/HTTP receiver.
type collected struct {
	*httptest.Server
	mu    sync.Mutex // guards what follows
	posts int
	fail  int // of the next posts
	bad   error
	spans map[string]*tracepb.Span // by id
	of    []string                 // the attributes of the resource, as text
}

func newCollected(t *testing.T) *collected {
	c := &collected{spans: map[string]*tracepb.Span{}}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.posts++
		if c.fail > 0 {
			c.fail--
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		if err := c.take(r); err != nil {
			c.bad = err
			w.WriteHeader(http.StatusBadRequest)
		}
	}))
	t.Cleanup(c.Close)
	return c
}

func (c *collected) take(r *http.Request) error {
	if r.Method != http.MethodPost || r.URL.Path != "/v1/traces" || r.Header.Get("Content-Type") != "application/x-protobuf" ||
		r.Header.Get("X-Token") != "a b" || r.Header.Get("Content-Encoding") != "gzip" {
		return fmt.Errorf("%s %s %v", r.Method, r.URL, r.Header)
	}
	unzipped, err := gzip.NewReader(r.Body)
	if err != nil {
		return err
	}
	body, err := io.ReadAll(unzipped)
	if err != nil {
		return err
	}
	var data tracepb.TracesData
	if err := proto.Unmarshal(body, &data); err != nil {
		return err
	}
	for _, rs := range data.ResourceSpans {
		c.of = nil
		for _, a := range rs.Resource.Attributes {
			c.of = append(c.of, a.Key+"="+a.Value.GetStringValue())
		}
		for _, ss := range rs.ScopeSpans {
			for _, s := range ss.Spans {
				c.spans[hex.EncodeToString(s.SpanId)] = s
			}
		}
	}
	return nil
}

// Not parallel: it sets variables of the environment.
func TestTracesGoOnFromTheRowToTheReceiver(t *testing.T) {
	c := newCollected(t)
	c.fail = 1
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", c.URL)
	t.Setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-token=a%20b")
	t.Setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
	t.Setenv("OTEL_SERVICE_NAME", "shop-webhooks")
	t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000") // so that all that comes is the flush at the end
	b := newBench(t)
	b.exec("alter table outbox add headers jsonb")
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	p := start(t, b.config(endpoint("billing", rx, ""))).streaming()
	const rows = 5
	for i := range rows {
		b.exec(fmt.Sprintf(`insert into outbox (aggregatetype, aggregateid, type, payload, headers)
			values ('order', '%d', 'order.changed', '{"n": %d}', '{"traceparent": "00-%032x-%016x-01"}')`, i, i+1, i+1, i+100))
	}
	require.NoError(t, rx.WaitFor(t.Context(), rows))
	p.stop()

	c.mu.Lock()
	defer c.mu.Unlock()
	require.NoError(t, c.bad)
	require.Len(t, c.spans, rows)
	require.Greater(t, c.posts, 1, "what the collector could not take came again")
	require.Contains(t, c.of, "service.name=shop-webhooks")
	require.Contains(t, c.of, "service.version="+version)
	for _, q := range rx.Requests() {
		parent := q.Header.Get("traceparent")
		require.Len(t, parent, 55)
		s := c.spans[parent[36:52]]
		require.NotNil(t, s, "the receiver's parent %s is a span of ours", parent)
		require.Equal(t, parent[3:35], hex.EncodeToString(s.TraceId))
		var n int
		_, err := fmt.Sscanf(hex.EncodeToString(s.TraceId), "%x", &n)
		require.NoError(t, err)
		require.Equal(t, fmt.Sprintf("%016x", n+99), hex.EncodeToString(s.ParentSpanId), "and the row's span its parent")
		require.Equal(t, tracepb.Span_SPAN_KIND_CLIENT, s.Kind)
	}
}

func TestTracesAreOffUnlessAskedFor(t *testing.T) {
	t.Parallel()
	env := func(pairs ...string) func(string) (string, bool) {
		return func(name string) (string, bool) {
			for i := 0; i < len(pairs); i += 2 {
				if pairs[i] == name {
					return pairs[i+1], true
				}
			}
			return "", false
		}
	}
	for _, off := range [][]string{
		nil,
		{"OTEL_SERVICE_NAME", "x"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT", " "},
		{"OTEL_EXPORTER_OTLP_ENDPOINT", "http://x:4318", "OTEL_SDK_DISABLED", "true"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT", "http://x:4318", "OTEL_TRACES_EXPORTER", "none"},
	} {
		c, err := newCollector(env(off...))
		require.NoError(t, err)
		require.Nil(t, c, off)
	}
	var none *tracing
	require.Nil(t, none.tracer())
	none.close()
	require.Nil(t, newTracing(env(), zap.NewNop()))

	for _, wrong := range [][]string{
		{"OTEL_EXPORTER_OTLP_ENDPOINT", "TOPSECRET:4318"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT", "http://u:TOPSECRET@:x"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT", "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT", "http://x", "OTEL_EXPORTER_OTLP_HEADERS", "TOPSECRET"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT", "http://x", "OTEL_EXPORTER_OTLP_TIMEOUT", "1s"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT", "http://x", "OTEL_EXPORTER_OTLP_COMPRESSION", "zstd"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT", "http://x", "OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT", "http://x", "OTEL_TRACES_EXPORTER", "zipkin"},
	} {
		_, err := newCollector(env(wrong...))
		require.ErrorContains(t, err, "OTEL_", wrong)
		require.NotContains(t, err.Error(), "TOPSECRET")
		require.Nil(t, newTracing(env(wrong...), zap.NewNop()), "a wrong variable keeps no webhook")
	}

	for want, given := range map[string][]string{
		"http://x:4318/v1/traces":    {"OTEL_EXPORTER_OTLP_ENDPOINT", "http://x:4318"},
		"https://x/otlp/v1/traces":   {"OTEL_EXPORTER_OTLP_ENDPOINT", "https://x/otlp/"},
		"http://x:4318/as-it-is?a=b": {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://x:4318/as-it-is?a=b", "OTEL_EXPORTER_OTLP_ENDPOINT", "http://y"},
	} {
		c, err := newCollector(env(given...))
		require.NoError(t, err)
		require.Equal(t, want, c.url.String())
	}
}
