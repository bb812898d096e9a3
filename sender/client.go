package sender

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"

	"github.com/walhook/walhook/outbox"
)

const (
	// Stages of an attempt that fail sooner than its deadline, so that the outcome can say which it was.
	dialTimeout = 5 * time.Second
	tlsTimeout  = 5 * time.Second

	// What is read of an answer: the body only so that the connection can be used again.
	maxHeaderBytes = 32 << 10
	maxBodyBytes   = 64 << 10
	bodyTime       = time.Second

	// An idle connection is kept as long as a receiver's move to another address may go unnoticed.
	idleConnTimeout    = 75 * time.Second
	maxIdlePerHost     = 256 // four lanes of the default concurrency on one host
	defaultMaxIdle     = 1024
	maxKept            = 4 // dead ones to meet in one attempt
	tlsSessionsPerPool = 512

	// HTTP/2 connections that died in silence are noticed within one default attempt (golang/go#30702).
	http2PingAfter   = 10 * time.Second
	http2PingTimeout = 5 * time.Second
)

var (
	// errOutOfTime is the cause of an attempt's context when its own deadline ended it.
	errOutOfTime = errors.New("the attempt's time is over")
	// errNoRoom is why an attempt was not made that found no place.
	errNoRoom = errors.New("as many attempts are in flight as the limit of open files allows")
)

// Config of a Client.
type Config struct {
	Logger     *zap.Logger           // nil logs nothing
	Version    string                // of walhook, for the user-agent
	Registerer prometheus.Registerer // nil keeps the metrics to itself
	Labels     *outbox.Labels        // of endpoints in metrics
	Tracer     trace.Tracer          // of attempts; nil makes no spans, and passes traceparents on as they are
	Source     string                // of events, for CloudEvents: a URI reference, best unique with their ids; empty is /walhook

	// MaxAttempts bounds the attempts in flight at once, of all endpoints together; zero is no
	// bound. See room for how they share it.
	MaxAttempts int
	// MaxIdleConns bounds the idle connections of endpoints that share a transport, which all
	// do that need no network or TLS rules of their own; zero is 1024. Where MaxAttempts is
	// given, connections beyond both together close all idle ones.
	MaxIdleConns int

	// OnStateChange, if set, hears of every move of an endpoint's circuit, in order for each
	// endpoint, from within Send but under no lock. It should not wait.
	OnStateChange func(endpointID string, from, to State)

	// RoundTripper, if set, takes the place of the network, guard and TLS included. For tests.
	RoundTripper http.RoundTripper
}

// Client is the outbox.Sender that speaks HTTP. All its methods may be called at any time
// from any goroutine.
type Client struct {
	log           *zap.Logger
	userAgent     string
	source        string
	metrics       *metrics
	tracer        trace.Tracer // nil: no spans
	room          *room
	maxIdle       int
	onStateChange func(endpointID string, from, to State)
	roundTripper  http.RoundTripper
	resolver      *net.Resolver // nil: the host's own

	mu         sync.RWMutex          // guards what follows
	targets    map[string]*target    // by endpoint id
	transports map[string]*transport // by route
}

var _ outbox.Sender = (*Client)(nil)

// transport is a pool of connections with its users counted: net/http's, and the wires beside it.
type transport struct {
	*http.Transport
	wires *wires
	users int
	gone  atomic.Bool // the last of them left
}

// CloseIdleConnections closes those of both kinds.
func (tr *transport) CloseIdleConnections() {
	tr.Transport.CloseIdleConnections()
	tr.wires.closeIdle()
}

// takes tells whether a request goes by a wire.
func (tr *transport) takes(t *target, m *message, now time.Time) bool {
	return tr != nil && t.wired && m.size() <= maxWireRequest && tr.wires.know(t, now)
}

// learn notes what an answer shows of its host.
func (tr *transport) learn(t *target, res *http.Response) {
	if tr != nil && t.wired && res.TLS != nil {
		tr.wires.learn(t.address, res.ProtoMajor == 1, time.Now())
	}
}

// used ends an attempt: the last ones of a transport that is gone leave it no idle connection.
func (tr *transport) used() {
	if tr != nil && tr.gone.Load() {
		tr.CloseIdleConnections()
	}
}

// New returns a Client. It starts nothing.
func New(cfg Config) (*Client, error) {
	m, err := newMetrics(cfg.Registerer, cfg.Labels)
	if err != nil {
		return nil, fmt.Errorf("register the sender's metrics: %w", err)
	}
	c := &Client{
		log:           cfg.Logger,
		userAgent:     "walhook/" + cfg.Version,
		source:        cmp.Or(cfg.Source, "/walhook"),
		metrics:       m,
		tracer:        cfg.Tracer,
		maxIdle:       cfg.MaxIdleConns,
		onStateChange: cfg.OnStateChange,
		roundTripper:  cfg.RoundTripper,
		targets:       make(map[string]*target),
		transports:    make(map[string]*transport),
	}
	if c.log == nil {
		c.log = zap.NewNop()
	}
	c.log = c.log.Named("sender")
	if cfg.Version == "" {
		c.userAgent = "walhook"
	}
	if !validHeaderValue(c.userAgent) {
		return nil, errors.New("the version cannot stand in a user-agent")
	}
	if c.maxIdle <= 0 {
		c.maxIdle = defaultMaxIdle
	}
	c.room = &room{places: max(0, cfg.MaxAttempts), log: c.log, missed: m.shortages}
	if c.room.places > 0 {
		c.room.conns = c.room.places + c.maxIdle
	}
	return c, nil
}

// Send makes one attempt and judges it. It returns within the endpoint's timeout and deadlineSlack, and at once
// where the circuit is open. While this host has no place for one more attempt, it waits up to
// roomWait for one before all that.
func (c *Client) Send(ctx context.Context, a outbox.Attempt) outbox.Outcome {
	return c.send(ctx, a, nil)
}

// send is Send; what goes over the wire is noted in seen, where that is not nil.
func (c *Client) send(ctx context.Context, a outbox.Attempt, seen *Exchange) (o outbox.Outcome) {
	t, err := c.target(a.Endpoint)
	if err != nil {
		// The registry lets no such endpoint through; if one comes, its events are worth keeping.
		return outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonBadRequest, Detail: clip("the endpoint's settings: " + err.Error())}
	}
	if ctx.Err() != nil {
		o, _ = judge(result{err: ctx.Err(), cut: true}, t.endpoint, time.Time{})
		return o
	}
	permit, until, ok := t.circuit.allow()
	if !ok {
		return outbox.Outcome{Verdict: outbox.Held, Reason: outbox.ReasonBreakerOpen, Detail: "the circuit is open", Until: until}
	}
	effect := neither
	defer func() { t.circuit.report(permit, effect) }() // exactly once, and also when what follows panics

	if !c.room.enter(ctx, t.share) {
		r := result{err: errNoRoom}
		if ctx.Err() != nil {
			r = result{err: ctx.Err(), cut: true}
		}
		o, effect = judge(r, t.endpoint, time.Now())
		if !r.cut {
			c.room.missing(o.Detail)
		}
		return o
	}
	defer c.room.leave(t.share)
	if a.Batch != nil {
		o, effect = c.postBatch(ctx, t, a, seen)
	} else {
		o, effect = c.post(ctx, t, a, nil, seen)
	}
	return o
}

// post makes the request, of together where that is not nil, reads the answer and judges it.
func (c *Client) post(parent context.Context, t *target, a outbox.Attempt, together *batch, seen *Exchange) (outbox.Outcome, effect) {
	begin := time.Now()
	m := messages.Get().(*message)
	defer m.free()
	if bad := t.write(m, a, together, begin); bad != nil {
		return bad.outcome(), neither
	}
	var span trace.Span
	if c.tracer != nil {
		span = c.span(parent, m, t, a, together, begin)
	}
	defer t.pool.used()
	if seen == nil && t.pool.takes(t, m, begin) {
		m.inLine = a.InLine
		return c.postByWire(parent, t, m, begin, span)
	}
	return c.postByNetHTTP(parent, t, m, begin, span, seen)
}

// postByWire is post over HTTP/1.1, which needs neither a context nor a timer of its own.
func (c *Client) postByWire(parent context.Context, t *target, m *message, begin time.Time, span trace.Span) (outbox.Outcome, effect) {
	deadline := begin.Add(t.endpoint.Timeout)
	w, r, waited := t.pool.wires.exchange(parent, t, m, begin, deadline)
	now := time.Now()
	if r.err != nil {
		r.cut = parent.Err() != nil
		r.timedOut = !r.cut && !now.Before(deadline)
	}
	o, effect := c.conclude(t, r, begin, now, span)
	if o.Waited = waited; r.err == nil {
		t.pool.wires.done(w, now, deadline)
	}
	return o, effect
}

// postByNetHTTP is post by net/http, for HTTP/2 and for whatever wires are not for.
func (c *Client) postByNetHTTP(parent context.Context, t *target, m *message, begin time.Time, span trace.Span, seen *Exchange) (outbox.Outcome, effect) {
	ctx, cancel := context.WithCancelCause(parent)
	defer cancel(nil)
	// One timer for the whole attempt, which ends sooner once the status is known: a context
	// with a deadline could not be shortened.
	timer := time.AfterFunc(t.endpoint.Timeout, func() { cancel(errOutOfTime) })
	defer timer.Stop()

	req := m.request(ctx, t)
	seen.asked(t, req)
	token, err := t.authorize(ctx, req)
	var res *http.Response
	if err == nil {
		res, err = t.trip(ctx, req)
	}
	r := result{err: err}
	if err == nil {
		r = result{status: res.StatusCode, retryAfter: res.Header.Get("Retry-After"), major: res.ProtoMajor, minor: res.ProtoMinor}
		if r.status == http.StatusUnauthorized && t.tokens != nil {
			t.tokens.drop(token) // the next attempt fetches another
		}
		t.pool.learn(t, res)
	} else if parent.Err() != nil {
		r.cut = true
	} else if context.Cause(ctx) == errOutOfTime {
		r.timedOut = true
	}
	now := time.Now()
	o, effect := c.conclude(t, r, begin, now, span)
	if err != nil {
		return o, effect
	}
	if t.endpoint.Timeout-now.Sub(begin) > bodyTime {
		timer.Reset(bodyTime)
	}
	seen.answered(t, req, res)
	drain(res)
	return o, effect
}

// conclude judges what came of a request, and tells of it.
func (c *Client) conclude(t *target, r result, begin, now time.Time, span trace.Span) (outbox.Outcome, effect) {
	o, effect := judge(r, t.endpoint, now)
	if span != nil {
		endSpan(span, o, r, now)
	}
	switch o.Verdict {
	case outbox.Cut:
	case outbox.Held:
		c.room.missing(o.Detail)
		c.Close() // idle connections are the first thing to give back
	default:
		t.codes.inc(o)
		c.metrics.duration.Observe(now.Sub(begin).Seconds())
	}
	return o, effect
}

// trip makes the request, and makes it again where a connection that was kept turns out to be
// dead: its end says nothing of how the receiver fares, so it costs no attempt. net/http does
// so by itself (see message.request), but not where part of a body larger than its buffer was written.
func (t *target) trip(ctx context.Context, req *http.Request) (*http.Response, error) {
	var kept bool
	traced := req.WithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(c httptrace.GotConnInfo) { kept = c.Reused },
	}))
	for tries := 1; ; tries++ {
		kept = false
		res, err := t.rt.RoundTrip(traced)
		if err == nil || !kept || tries > maxKept || ctx.Err() != nil || !connectionEnded(err) {
			return res, err
		}
		again := *traced
		if again.ContentLength > 0 {
			again.Body, _ = req.GetBody()
		}
		traced = &again
	}
}

// drain reads a small body to its end, so that its connection can be used again, and leaves a
// large one. Nothing that happens here matters: the answer was its status.
func drain(res *http.Response) {
	if res.StatusCode != http.StatusSwitchingProtocols && res.ContentLength <= maxBodyBytes {
		_, _ = io.CopyN(io.Discard, res.Body, maxBodyBytes+1)
	}
	_ = res.Body.Close()
}

// target returns the endpoint made ready: the one at hand, if it was made of this very endpoint.
func (c *Client) target(e *outbox.Endpoint) (*target, error) {
	c.mu.RLock()
	t := c.targets[e.ID]
	c.mu.RUnlock()
	if t != nil && t.endpoint == e {
		return t, nil
	}
	return c.renew(e)
}

// renew makes an endpoint ready that is new or was reloaded. What was learned of it before stays.
func (c *Client) renew(e *outbox.Endpoint) (*target, error) {
	t, err := parse(e) // reads files: under no lock
	if err != nil {
		return nil, err
	}
	if _, given := t.header["User-Agent"]; !given {
		t.header["User-Agent"] = []string{c.userAgent}
	}
	for _, name := range slices.Sorted(maps.Keys(t.header)) {
		t.fields = append(t.fields, field{name, t.header[name][0]})
	}

	t.source = c.source
	t.way.resolver = c.resolver

	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.targets[e.ID]
	if old != nil && old.endpoint == e { // another goroutine was first
		return old, nil
	}
	c.acquire(t)
	policy := policyOf(e)
	if old == nil {
		t.codes, t.lamp, t.share = c.metrics.codes(e.ID), c.metrics.lamp(e.ID), new(share)
		t.circuit = newCircuit(policy, false, c.teller(e.ID, t.lamp))
		t.lamp.set(Closed)
		c.warnUnsigned(t)
	} else {
		t.codes, t.lamp, t.circuit, t.share = old.codes, old.lamp, old.circuit, old.share
		t.takeOver(old)
		if t.circuit.policy != policy {
			was := old.circuit.retire()
			t.circuit = newCircuit(policy, was != Closed, c.teller(e.ID, t.lamp))
			t.lamp.set(t.circuit.state)
		}
		c.release(old)
	}
	c.targets[e.ID] = t
	return t, nil
}

// warnUnsigned says once that an endpoint's requests will carry no signature.
func (c *Client) warnUnsigned(t *target) {
	if t.endpoint.SignsBy(outbox.SchemeStandard) && len(t.signatures) == 0 {
		c.log.Warn("requests are not signed: the endpoint has no secret", zap.String("endpoint", t.endpoint.ID))
	}
}

// teller returns what tells the world of an endpoint's circuit.
func (c *Client) teller(id string, show *lamp) func(from, to State) {
	return func(from, to State) {
		show.set(to)
		level := zap.InfoLevel
		if to == Open {
			level = zap.WarnLevel
		}
		c.log.Log(level, "circuit "+to.String(), zap.String("endpoint", id), zap.Stringer("from", from), zap.Stringer("to", to))
		if c.onStateChange != nil {
			c.onStateChange(id, from, to)
		}
	}
}

// Forget drops all that is known of an endpoint: its circuit, its metrics, its connections
// where it shares them with no other. An attempt in flight ends as it would have. An endpoint
// that later comes with the same id is a stranger.
func (c *Client) Forget(endpointID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.targets[endpointID]
	if t == nil {
		return
	}
	delete(c.targets, endpointID)
	t.circuit.retire()
	c.metrics.forget(t.codes, t.lamp)
	c.release(t)
}

// Close closes the idle connections. The Client stays usable, and opens new ones as it needs them.
func (c *Client) Close() {
	c.mu.RLock()
	defer c.mu.RUnlock()
	for _, tr := range c.transports {
		tr.CloseIdleConnections()
	}
}

// acquire gives the target the transport of its route, a new one where there is none. c.mu is held.
func (c *Client) acquire(t *target) {
	if t.rt = c.roundTripper; t.rt != nil {
		return
	}
	tr := c.transports[t.route]
	if tr == nil {
		tr = &transport{Transport: newTransport(t.way, t.tls, c.maxIdle)}
		tr.DialContext = c.room.counting(tr.DialContext, c.Close)
		tr.wires = newWires(tr.DialContext, tr.TLSClientConfig, c.maxIdle)
		c.transports[t.route] = tr
	}
	tr.users++
	t.rt, t.pool = tr.Transport, tr
}

// release gives the target's transport up, and closes it after its last user. c.mu is held.
func (c *Client) release(t *target) {
	tr := c.transports[t.route]
	if tr == nil {
		return
	}
	if tr.users--; tr.users == 0 {
		delete(c.transports, t.route)
		tr.gone.Store(true)
		tr.CloseIdleConnections()
	}
}

// newTransport is net/http's transport made safe for other people's servers.
func newTransport(w way, cfg *tls.Config, maxIdle int) *http.Transport {
	cfg = cfg.Clone()
	cfg.ClientSessionCache = tls.NewLRUClientSessionCache(tlsSessionsPerPool)
	var forward func(*http.Request) (*url.URL, error) // never that of the environment: the guard would see only the proxy
	if w.forwards() {
		forward = w.forward
	}
	return &http.Transport{
		Proxy:                  forward,
		DialContext:            w.dial,
		TLSClientConfig:        cfg,
		TLSHandshakeTimeout:    tlsTimeout,
		DisableCompression:     true, // or 100 kB on the wire become 100 MB here
		MaxResponseHeaderBytes: maxHeaderBytes,
		MaxIdleConns:           maxIdle,
		MaxIdleConnsPerHost:    maxIdlePerHost,
		IdleConnTimeout:        idleConnTimeout,
		ForceAttemptHTTP2:      true, // net/http tries it by itself only with its own dialer and TLS settings
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: http2PingAfter, PingTimeout: http2PingTimeout},
	}
}
