package main

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/valyala/fasthttp"
	"golang.org/x/sync/errgroup"
)

const roleReceiver = "receiver"

// secretKey signs all that walhook sends in a run.
var secretKey = []byte("the bench signs with this key...")

func secret() string { return "whsec_" + base64.StdEncoding.EncodeToString(secretKey) }

// expectation is what the receiver is to see next. It forgets all that it saw before.
type expectation struct {
	First  int64 `json:"first"`            // id of the first event
	Count  int   `json:"count"`            // of events; their ids are consecutive
	Target int64 `json:"target,omitempty"` // deliveries of which "reached" is said; zero is Count
	Keys   int64 `json:"keys,omitempty"`   // events with the same id modulo this stay in order; zero: no order
	Signed bool  `json:"signed,omitempty"` // each thousandth signature is checked
	Batch  bool  `json:"batch,omitempty"`  // bodies are arrays
	Timed  bool  `json:"timed,omitempty"`  // each receipt's latency is kept

	Conduct map[string]conduct `json:"conduct,omitempty"` // by path; elsewhere the answer is 204, at once
}

// conduct is how the receiver answers on a path. What it refuses or leaves hanging is no receipt.
type conduct struct {
	Delay  time.Duration `json:"delay,omitempty"`  // before the answer
	Status int           `json:"status,omitempty"` // instead of 204
	Hang   bool          `json:"hang,omitempty"`   // no answer until the bench expects something else
	Aside  bool          `json:"aside,omitempty"`  // not counted, whatever the answer
}

// observations are what a receiver has seen.
type observations struct {
	Requests  int64 `json:"requests"`
	Refused   int64 `json:"refused"`   // of them: answered with another status, or not at all
	Bytes     int64 `json:"bytes"`     // of all requests, headers and bodies
	Distinct  int64 `json:"distinct"`  // deliveries
	Repeated  int64 `json:"repeated"`  // of them
	Invented  int64 `json:"invented"`  // of events that nobody committed
	Overtaken int64 `json:"overtaken"` // came after a later one of their key
	Unsigned  int64 `json:"unsigned"`  // of those checked
	Begin     int64 `json:"begin"`     // Unix nanoseconds of the first receipt
	End       int64 `json:"end"`       // of the last new one

	Rate []int `json:"rate"` // receipts in each rateStep from Begin on

	// Of each new receipt, where Timed: when it came, and how long before that it was inserted
	// and committed, in nanoseconds.
	At         []int64 `json:"at,omitempty"`
	FromInsert []int64 `json:"from_insert,omitempty"`
	FromCommit []int64 `json:"from_commit,omitempty"`
}

// rateStep is how finely throughput is plotted.
const rateStep = 100 * time.Millisecond

// signatureSample: checking every signature would cost more than receiving.
const signatureSample = 1000

// inbox is what one path of the receiver has seen.
type inbox struct {
	seen []uint64 // a bit for each event
	last []int64  // by key, the highest id
}

// receiver answers as cheaply as it can and counts.
type receiver struct {
	stage *stage

	mu      sync.Mutex // guards what follows
	want    expectation
	changed chan struct{} // closed when the bench expects something else
	got     observations
	inboxes map[string]*inbox
}

// playReceiver serves until the bench says no more.
func playReceiver(s *stage) error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	r := &receiver{stage: s, inboxes: map[string]*inbox{}, changed: make(chan struct{})}
	server := &fasthttp.Server{
		Handler:                       r.serve,
		DisableHeaderNamesNormalizing: true,
		NoDefaultServerHeader:         true,
		NoDefaultDate:                 true,
		NoDefaultContentType:          true,
		ReadBufferSize:                16 << 10,
		MaxRequestBodySize:            64 << 20,
	}
	var serving errgroup.Group
	listeners := []net.Listener{ln}
	serving.Go(func() error { return server.Serve(ln) })
	if err := s.say(word{Event: "ready", Addr: ln.Addr().String()}); err != nil {
		return err
	}
	for {
		var o order
		if err := s.orders.Decode(&o); err != nil {
			r.expect(expectation{})
			for _, ln := range listeners {
				_ = ln.Close()
			}
			return serving.Wait()
		}
		if o.Do == "open" {
			ln, err := net.Listen("tcp", o.Addr)
			if err != nil {
				return err
			}
			listeners = append(listeners, ln)
			serving.Go(func() error { return server.Serve(ln) })
			if err := s.say(word{Event: "open"}); err != nil {
				return err
			}
			continue
		}
		if err := r.obey(o); err != nil {
			return err
		}
	}
}

// expect forgets all that was, and lets go whoever was left hanging.
func (r *receiver) expect(e expectation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.want = e
	if r.want.Target == 0 {
		r.want.Target = int64(r.want.Count)
	}
	r.got = observations{}
	r.inboxes = map[string]*inbox{}
	close(r.changed)
	r.changed = make(chan struct{})
}

func (r *receiver) obey(o order) error {
	if o.Do == "expect" {
		r.expect(*o.Expect)
		return r.stage.say(word{Event: "expecting"})
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch o.Do {
	case "count":
		return r.stage.say(word{Event: "counted", Count: r.got.Distinct, Reached: r.got.Distinct >= r.want.Target})
	case "result":
		return r.stage.say(word{Event: "result", Result: &r.got})
	}
	return fmt.Errorf("receiver: unknown order %q", o.Do)
}

// serve is the endpoint.
func (r *receiver) serve(ctx *fasthttp.RequestCtx) {
	now := time.Now().UnixNano()
	ctx.SetStatusCode(fasthttp.StatusNoContent)
	c, changed := r.receive(ctx, now)
	if c.Status != 0 {
		ctx.SetStatusCode(c.Status)
	}
	if c.Hang {
		<-changed
	}
	if c.Delay > 0 {
		time.Sleep(c.Delay)
	}
}

// receive counts a request, and says how to answer it.
func (r *receiver) receive(ctx *fasthttp.RequestCtx, now int64) (c conduct, changed <-chan struct{}) {
	body := ctx.PostBody()
	id := ctx.Request.Header.Peek("webhook-id")

	r.mu.Lock()
	defer r.mu.Unlock()
	c, changed = r.want.Conduct[string(ctx.Path())], r.changed
	if c.Aside {
		return c, changed
	}
	r.got.Requests++
	if c.Status != 0 || c.Hang {
		r.got.Refused++
		return c, changed
	}
	r.got.Bytes += int64(len(ctx.Request.Header.RawHeaders()) + len(body))
	if r.want.Signed && r.got.Requests%signatureSample == 1 && !signed(&ctx.Request.Header, id, body) {
		r.got.Unsigned++
	}
	box := r.inboxes[string(ctx.Path())]
	if box == nil {
		box = &inbox{seen: make([]uint64, (r.want.Count+63)/64), last: make([]int64, r.want.Keys)}
		r.inboxes[string(ctx.Path())] = box
	}
	if r.want.Batch {
		eachInBatch(body, func(id []byte) { r.note(box, id, body, now) })
		return c, changed
	}
	r.note(box, id, body, now)
	return c, changed
}

// note counts one event. The lock is held.
func (r *receiver) note(box *inbox, text, body []byte, now int64) {
	if r.got.Begin == 0 {
		r.got.Begin = now
	}
	id, err := strconv.ParseInt(string(text), 10, 64)
	n := id - r.want.First
	if err != nil || n < 0 || n >= int64(r.want.Count) {
		r.got.Invented++
		return
	}
	if box.seen[n/64]&(1<<(n%64)) != 0 {
		r.got.Repeated++
		return
	}
	box.seen[n/64] |= 1 << (n % 64)
	if r.want.Keys > 0 {
		if last := &box.last[id%r.want.Keys]; *last > id {
			r.got.Overtaken++
		} else {
			*last = id
		}
	}
	r.got.Distinct++
	r.got.End = max(r.got.End, now)
	step := int(max(0, now-r.got.Begin) / int64(rateStep))
	for len(r.got.Rate) <= step {
		r.got.Rate = append(r.got.Rate, 0)
	}
	r.got.Rate[step]++
	if r.want.Timed {
		r.got.At = append(r.got.At, now)
		r.got.FromInsert = append(r.got.FromInsert, now-insertedAt(body))
		r.got.FromCommit = append(r.got.FromCommit, now-committedAt(body))
	}
	if r.got.Distinct == r.want.Target {
		_ = r.stage.say(word{Event: "reached"})
	}
}

// insertedAt is the time that the load wrote into the payload, as jsonb prints it; zero where there is none.
func insertedAt(body []byte) int64 {
	_, rest, found := bytes.Cut(body, []byte(`"at": `))
	if !found {
		return 0
	}
	digits := 0
	for digits < len(rest) && rest[digits] >= '0' && rest[digits] <= '9' {
		digits++
	}
	at, _ := strconv.ParseInt(string(rest[:digits]), 10, 64)
	return at
}

// committedAt is the timestamp of the format standard: the commit's, where the outbox has no
// column for a time. Zero where there is none.
func committedAt(body []byte) int64 {
	_, rest, found := bytes.Cut(body, []byte(`"timestamp":"`))
	if !found {
		return 0
	}
	text, _, _ := bytes.Cut(rest, []byte{'"'})
	at, err := time.Parse(time.RFC3339Nano, string(text))
	if err != nil {
		return 0
	}
	return at.UnixNano()
}

// eachInBatch sees the ids of a batch of format standard: each element begins with its own.
func eachInBatch(body []byte, see func(id []byte)) {
	for mark := []byte(`{"id":"`); ; {
		_, rest, found := bytes.Cut(body, mark)
		if !found {
			return
		}
		id, after, _ := bytes.Cut(rest, []byte{'"'})
		see(id)
		body = after
	}
}

// signed checks a signature by Standard Webhooks.
func signed(h *fasthttp.RequestHeader, id, body []byte) bool {
	mac := hmac.New(sha256.New, secretKey)
	mac.Write(id)
	mac.Write([]byte{'.'})
	mac.Write(h.Peek("webhook-timestamp"))
	mac.Write([]byte{'.'})
	mac.Write(body)
	want := "v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil))
	return hmac.Equal([]byte(want), h.Peek("webhook-signature"))
}
