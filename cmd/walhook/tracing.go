package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"
)

// flushPatience is how long an end waits for the last spans to be taken.
const flushPatience = 3 * time.Second

// tracing sends spans to a collector, as the variables OTEL_… of OpenTelemetry say. A nil one
// makes none.
type tracing struct {
	provider *sdktrace.TracerProvider
	log      *zap.Logger
}

// newTracing is nil where nobody asked for traces. Nor are there any where the variables are
// wrong: the log says so. They are often the same for every program of a cluster, so they do
// not keep webhooks from going.
func newTracing(env func(string) (string, bool), log *zap.Logger) *tracing {
	log = log.Named("traces")
	c, err := newCollector(env)
	if c == nil && err == nil {
		return nil
	}
	var r *resource.Resource
	var exporter *otlptrace.Exporter
	if err == nil {
		exporter, err = otlptrace.New(context.Background(), c)
	}
	if err == nil {
		r, err = resource.New(context.Background(), resource.WithAttributes(
			attribute.String("service.name", "walhook"), attribute.String("service.version", version),
		), resource.WithTelemetrySDK(), resource.WithFromEnv()) // what comes later goes above
	}
	if err != nil {
		log.Warn("no traces are sent", zap.Error(err))
		return nil
	}
	log.Info("sending traces", zap.String("collector", c.url.Host))
	told := &toldExporter{SpanExporter: exporter, log: log}
	return &tracing{log: log, provider: sdktrace.NewTracerProvider(sdktrace.WithBatcher(told), sdktrace.WithResource(r))}
}

func (t *tracing) tracer() trace.Tracer {
	if t == nil {
		return nil
	}
	return t.provider.Tracer("github.com/walhook/walhook", trace.WithInstrumentationVersion(version))
}

// close sends what is left.
func (t *tracing) close() {
	if t == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), flushPatience)
	defer cancel()
	if err := t.provider.Shutdown(ctx); err != nil {
		t.log.Warn("the last spans could not be sent", zap.Error(err))
	}
}

// toldExporter says once that the collector takes nothing, and when it does again. The SDK
// exports one batch at a time.
type toldExporter struct {
	sdktrace.SpanExporter
	log  *zap.Logger
	lost int
}

func (e *toldExporter) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	err := e.SpanExporter.ExportSpans(ctx, spans)
	switch {
	case err != nil:
		if e.lost == 0 {
			e.log.Warn("spans are lost: the collector does not take them", zap.Error(err))
		}
		e.lost += len(spans)
	case e.lost > 0:
		e.log.Info("the collector takes spans again", zap.Int("lost", e.lost))
		e.lost = 0
	}
	return nil
}

// collector speaks OTLP over HTTP, in protobuf
// (https://opentelemetry.io/docs/specs/otlp/#otlphttp). OpenTelemetry's own otlptracehttp does the same
// and brings all of gRPC along, 6 MB of it, although it never uses it.
type collector struct {
	url      *url.URL
	header   http.Header
	compress bool
	timeout  time.Duration // of an export, with what it tries again
	client   *http.Client
}

const (
	otlp       = "OTEL_EXPORTER_OTLP_"
	otlpTraces = "OTEL_EXPORTER_OTLP_TRACES_"
)

// newCollector reads the variables; nil where none names an endpoint, or one turns traces off.
// (https://opentelemetry.io/docs/specs/otel/protocol/exporter/)
func newCollector(env func(string) (string, bool)) (*collector, error) {
	get := func(names ...string) string { // the first that is not empty
		for _, name := range names {
			if v, _ := env(name); strings.TrimSpace(v) != "" {
				return strings.TrimSpace(v)
			}
		}
		return ""
	}
	either := func(name string) string { return get(otlpTraces+name, otlp+name) }

	address, path := get(otlpTraces+"ENDPOINT"), ""
	if address == "" {
		address, path = get(otlp+"ENDPOINT"), "v1/traces"
	}
	exporter := get("OTEL_TRACES_EXPORTER")
	if address == "" || strings.EqualFold(get("OTEL_SDK_DISABLED"), "true") || exporter == "none" {
		return nil, nil
	}
	if exporter != "" && exporter != "otlp" {
		return nil, errors.New("OTEL_TRACES_EXPORTER: want otlp or none")
	}
	if protocol := either("PROTOCOL"); protocol != "" && protocol != "http/protobuf" {
		return nil, errors.New(otlp + "PROTOCOL: want http/protobuf, and its endpoint, which is mostly at port 4318")
	}
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, errors.New(otlp + "ENDPOINT: want http://host:port or https://…") // without its text: it may hold a password
	}
	if path != "" {
		u = u.JoinPath(path)
	}
	c := &collector{url: u, header: http.Header{}, timeout: 10 * time.Second}
	for pair := range strings.SplitSeq(either("HEADERS"), ",") {
		if strings.TrimSpace(pair) == "" {
			continue
		}
		name, value, ok := strings.Cut(pair, "=")
		value, err := url.PathUnescape(strings.TrimSpace(value))
		if name = strings.TrimSpace(name); !ok || err != nil || !headerName.MatchString(name) {
			return nil, errors.New(otlp + "HEADERS: want name=value, with a comma between them, values percent-encoded")
		}
		c.header.Set(name, value)
	}
	switch v := either("COMPRESSION"); v {
	case "gzip":
		c.compress = true
	case "", "none":
	default:
		return nil, errors.New(otlp + "COMPRESSION: want gzip or none")
	}
	if v := either("TIMEOUT"); v != "" {
		ms, err := strconv.Atoi(v)
		if err != nil || ms <= 0 {
			return nil, errors.New(otlp + "TIMEOUT: want milliseconds")
		}
		c.timeout = time.Duration(ms) * time.Millisecond
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	if path := either("CERTIFICATE"); path != "" {
		pem, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf(otlp+"CERTIFICATE: %w", err)
		}
		transport.TLSClientConfig.RootCAs = x509.NewCertPool()
		if !transport.TLSClientConfig.RootCAs.AppendCertsFromPEM(pem) {
			return nil, errors.New(otlp + "CERTIFICATE: holds no certificate in PEM")
		}
	}
	if cert, key := either("CLIENT_CERTIFICATE"), either("CLIENT_KEY"); cert != "" || key != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf(otlp+"CLIENT_CERTIFICATE and CLIENT_KEY: %w", err)
		}
		transport.TLSClientConfig.Certificates = []tls.Certificate{pair}
	}
	c.client = &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse // the headers are for nobody else
	}}
	return c, nil
}

func (c *collector) Start(context.Context) error { return nil }

func (c *collector) Stop(context.Context) error {
	c.client.CloseIdleConnections()
	return nil
}

// UploadTraces exports a batch, and tries again for a while where that may help.
func (c *collector) UploadTraces(ctx context.Context, spans []*tracepb.ResourceSpans) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	// On the wire a TracesData is an ExportTraceServiceRequest, whose package needs gRPC.
	body, err := proto.Marshal(&tracepb.TracesData{ResourceSpans: spans})
	if err != nil {
		return err
	}
	if c.compress {
		var zipped bytes.Buffer
		w := gzip.NewWriter(&zipped)
		_, _ = w.Write(body) // to memory
		_ = w.Close()
		body = zipped.Bytes()
	}
	for wait := 500 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		again, err := c.post(ctx, body)
		if err == nil || !again {
			return err
		}
		t := time.NewTimer(time.Duration(float64(wait) * (0.5 + rand.Float64())))
		select {
		case <-ctx.Done():
			t.Stop()
			return err
		case <-t.C:
		}
	}
}

// retryable are the answers that OTLP wants an export tried again for.
var retryable = []int{http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout}

func (c *collector) post(ctx context.Context, body []byte) (again bool, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url.String(), bytes.NewReader(body))
	if err != nil {
		return false, err
	}
	req.Header = c.header.Clone()
	req.Header.Set("Content-Type", "application/x-protobuf")
	req.Header.Set("User-Agent", "walhook/"+version)
	if c.compress {
		req.Header.Set("Content-Encoding", "gzip")
	}
	res, err := c.client.Do(req)
	if err != nil {
		var where *url.Error
		if errors.As(err, &where) {
			err = where.Err // without the address: it may hold a password
		}
		return true, err
	}
	_, _ = io.CopyN(io.Discard, res.Body, 64<<10)
	_ = res.Body.Close()
	if res.StatusCode/100 != 2 {
		return slices.Contains(retryable, res.StatusCode), errors.New(res.Status)
	}
	return false, nil
}
