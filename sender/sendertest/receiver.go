package sendertest

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"
)

// Request is one that the receiver got.
type Request struct {
	Turn      int       // from 1, in the order of arrival
	At        time.Time // of arrival
	Method    string
	Path      string
	Proto     string
	ID        string    // webhook-id
	Attempt   int       // webhook-attempt
	Timestamp time.Time // webhook-timestamp
	Header    http.Header
	Body      []byte

	Type string          // of a body of format standard
	Data json.RawMessage // of a body of format standard, else the whole body

	Status  int   // that we answered; zero where we gave no answer, or none yet
	Invalid error // what is wrong with its signature; nil also where no secret is known
}

// Config of a Receiver. Its zero value answers 204 to all, over plain HTTP.
type Config struct {
	Addr    string           // where to listen; empty picks a port of 127.0.0.1
	TLS     *tls.Certificate // speak TLS with this certificate: see Certificate
	HTTP2   bool             // also HTTP/2; such a receiver cannot Reset or Raw
	Secrets []string         // every one of them has to have signed: whsec_…, whsk_… or whpk_…
	Keep    int              // how many of the last requests to remember; zero all

	// Respond picks the answer to a request for which the script has none; nil answers 204.
	Respond func(Request) Answer
	// OnRequest hears of each request before it is answered.
	OnRequest func(Request)
}

// Receiver is a scripted webhook endpoint. Its methods may be called from any goroutine.
type Receiver struct {
	cfg       Config
	addr      string
	verifiers []verifier
	over      context.Context // ends with Close: a hanging answer gives up
	end       context.CancelFunc

	mu       sync.Mutex // guards what follows
	server   *http.Server
	serving  chan struct{} // closed when server has ended
	requests []*Request
	turns    int
	script   []Answer
	changed  chan struct{} // closed, and made anew, when a request comes or is answered
	closed   bool
}

// Open starts a receiver.
func Open(cfg Config) (*Receiver, error) {
	if cfg.Addr == "" {
		cfg.Addr = "127.0.0.1:0"
	}
	r := &Receiver{cfg: cfg, addr: cfg.Addr, changed: make(chan struct{})}
	for i, s := range cfg.Secrets {
		v, err := newVerifier(s)
		if err != nil {
			return nil, fmt.Errorf("secrets[%d]: %w", i, err)
		}
		r.verifiers = append(r.verifiers, v)
	}
	r.over, r.end = context.WithCancel(context.Background())
	if err := r.Reopen(); err != nil {
		return nil, err
	}
	return r, nil
}

// TB is what New needs of testing.TB; so this package, and with it the demo, is free of testing.
type TB interface {
	Helper()
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Cleanup(func())
}

// New opens a receiver for a test, closes it at the test's end, and fails the test where a
// request's signature was not valid.
func New(t TB, cfg Config) *Receiver {
	t.Helper()
	r, err := Open(cfg)
	if err != nil {
		t.Fatalf("open receiver: %v", err)
	}
	t.Cleanup(func() {
		r.Close()
		for _, req := range r.Requests() {
			if req.Invalid != nil {
				t.Errorf("request %d (%s, attempt %d): %v", req.Turn, req.ID, req.Attempt, req.Invalid)
			}
		}
	})
	return r
}

// URL is where the receiver listens. It stays the same while it refuses.
func (r *Receiver) URL() string {
	if r.cfg.TLS != nil {
		return "https://" + r.addr + "/hooks"
	}
	return "http://" + r.addr + "/hooks"
}

// Addr is the host and port of URL.
func (r *Receiver) Addr() string { return r.addr }

// Script appends answers for the requests to come, one each. When they are used up,
// Config.Respond answers.
func (r *Receiver) Script(answers ...Answer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.script = append(r.script, answers...)
}

// Refuse closes every connection and the listener: who connects is refused.
func (r *Receiver) Refuse() {
	r.mu.Lock()
	server, serving := r.server, r.serving
	r.server = nil
	r.mu.Unlock()
	if server != nil {
		_ = server.Close()
		<-serving
	}
}

// Reopen listens again, on the same port.
func (r *Receiver) Reopen() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.server != nil {
		return errors.New("the receiver is closed, or open")
	}
	l, err := net.Listen("tcp", r.addr)
	if err != nil {
		return err
	}
	if addr := l.Addr().String(); addr != r.addr { // only at first, when nobody else has the receiver
		r.addr = addr
	}
	server := &http.Server{
		Handler:           http.HandlerFunc(r.serve),
		ErrorLog:          log.New(io.Discard, "", 0),
		ReadHeaderTimeout: time.Minute,
		Protocols:         new(http.Protocols),
	}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetHTTP2(r.cfg.HTTP2)
	serving := make(chan struct{})
	r.server, r.serving = server, serving
	go func() {
		defer close(serving)
		if r.cfg.TLS != nil {
			server.TLSConfig = &tls.Config{Certificates: []tls.Certificate{*r.cfg.TLS}}
			_ = server.ServeTLS(l, "", "")
			return
		}
		_ = server.Serve(l)
	}()
	return nil
}

// Close ends the receiver and every answer in the making.
func (r *Receiver) Close() {
	r.end()
	r.Refuse()
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
}

// Requests returns what came so far, oldest first.
func (r *Receiver) Requests() []Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.copies()
}

func (r *Receiver) copies() []Request {
	all := make([]Request, len(r.requests))
	for i, req := range r.requests {
		all[i] = *req
	}
	return all
}

// Count is how many requests came so far.
func (r *Receiver) Count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.turns
}

// WaitFor waits until n requests in all have come.
func (r *Receiver) WaitFor(ctx context.Context, n int) error {
	return r.wait(ctx, func() bool { return r.turns >= n }, fmt.Sprintf("%d requests", n))
}

// WaitUntil waits until enough is true of what came so far. It is asked whenever a request
// comes and when it is answered.
func (r *Receiver) WaitUntil(ctx context.Context, enough func([]Request) bool) error {
	return r.wait(ctx, func() bool { return enough(r.copies()) }, "enough of them")
}

func (r *Receiver) wait(ctx context.Context, enough func() bool, what string) error {
	for {
		r.mu.Lock()
		ok, got, changed := enough(), r.turns, r.changed
		r.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for %s, got %d requests: %w", what, got, ctx.Err())
		}
	}
}

// serve records a request and gives it its answer.
func (r *Receiver) serve(w http.ResponseWriter, hr *http.Request) {
	at := time.Now()
	body, err := io.ReadAll(hr.Body)
	if err != nil {
		return // cut short: nothing was received
	}
	req := read(hr, body)
	req.At = at
	req.Invalid = verify(r.verifiers, hr.Header, body)

	r.mu.Lock()
	r.turns++
	req.Turn = r.turns
	r.requests = append(r.requests, req)
	if r.cfg.Keep > 0 && len(r.requests) > r.cfg.Keep {
		r.requests = slices.Delete(r.requests, 0, len(r.requests)-r.cfg.Keep)
	}
	var answer Answer
	if len(r.script) > 0 {
		answer, r.script = r.script[0], r.script[1:]
	}
	seen := *req
	r.signal()
	r.mu.Unlock()

	if r.cfg.OnRequest != nil {
		r.cfg.OnRequest(seen)
	}
	if answer == nil && r.cfg.Respond != nil {
		answer = r.cfg.Respond(seen)
	}
	if answer == nil {
		answer = Status(http.StatusNoContent)
	}
	ctx, cancel := context.WithCancel(hr.Context())
	defer cancel()
	defer context.AfterFunc(r.over, cancel)()
	answer(&writer{ResponseWriter: w, wrote: func(status int) {
		r.mu.Lock()
		req.Status = status
		r.signal()
		r.mu.Unlock()
	}}, hr.WithContext(ctx))
}

// signal wakes who waits. r.mu is held.
func (r *Receiver) signal() {
	close(r.changed)
	r.changed = make(chan struct{})
}

// writer notes the status before it is on its way.
type writer struct {
	http.ResponseWriter
	wrote func(status int)
	done  bool
}

func (w *writer) WriteHeader(status int) {
	if !w.done && status >= 200 {
		w.done = true
		w.wrote(status)
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *writer) Write(p []byte) (int, error) {
	if !w.done {
		w.WriteHeader(http.StatusOK)
	}
	return w.ResponseWriter.Write(p)
}

func (w *writer) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// read notes what a request says.
func read(hr *http.Request, body []byte) *Request {
	req := &Request{
		Method: hr.Method, Path: hr.URL.RequestURI(), Proto: hr.Proto, Header: hr.Header.Clone(), Body: body,
		ID: hr.Header.Get("webhook-id"), Data: body,
	}
	req.Attempt, _ = strconv.Atoi(hr.Header.Get("webhook-attempt"))
	if s, err := strconv.ParseInt(hr.Header.Get("webhook-timestamp"), 10, 64); err == nil {
		req.Timestamp = time.Unix(s, 0)
	}
	if bytes.HasPrefix(body, []byte(`{"type":`)) {
		var standard struct {
			Type string
			Data json.RawMessage
		}
		if json.Unmarshal(body, &standard) == nil && standard.Data != nil {
			req.Type, req.Data = standard.Type, standard.Data
		}
	}
	return req
}
