package sender

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"net/textproto"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// maxWireRequest is how large a request a wire takes, in bytes, headers and body together. The socket's buffer
	// holds so much: a receiver that answers before it has read the request keeps no writer waiting. net/http reads while it writes.
	maxWireRequest = 16 << 10
	// wireBuffer is how much of an answer is read at once; most have less in all.
	wireBuffer = 2 << 10
	// sharedFrom is how many connections to one host there are before an attempt waits for one of them, up to
	// shareWait, rather than open another. Only at a host that can answer within quickHost, where one comes back about as soon
	// as another could be opened: thousands of endpoints of one host have a hundred connections then, and no more requests stand
	// in the host's own queue. At a slow one each attempt has its own.
	sharedFrom = 128
	shareWait  = 250 * time.Millisecond
	quickHost  = 50 * time.Millisecond
	// stuckAfter is from when on a connection in use is none that may come back soon, and counts no more: an endpoint that
	// hangs keeps none from the others of its host.
	stuckAfter = 250 * time.Millisecond
	// hostMemory is for how long, and up to twice that, the quickest answer of a host is remembered. The quickest tells what
	// it can; the usual one also how many we ask at once.
	hostMemory = 10 * time.Second
	// deadlineSlack is how much longer than its timeout an attempt may take at most.
	deadlineSlack = 100 * time.Millisecond
	// protocolKnown is for how long it is remembered that a host speaks HTTP/1.1 over TLS: it may learn HTTP/2.
	protocolKnown = 15 * time.Minute
)

// wire is one connection of HTTP/1.1 (RFC 9112), used by one attempt at a time, in the attempt's own goroutine: it
// writes the request in one piece and reads the answer. net/http hands both to two other goroutines for each
// connection, which costs more than all the rest of an attempt.
//
// fasthttp's client would cost as little, and was not taken: it knows no context, so that a stop could not cut
// an attempt; it repeats requests by rules of its own; it takes what comes unasked on an idle connection for the
// next answer; and what it reads is not held to what net/http reads, as a wire is by FuzzAnswer.
//
// What is hard stays with net/http: HTTP/2, proxies, access tokens, large requests, and whatever goes over TLS until the host
// has shown there that it speaks HTTP/1.1.
//
// It trusts an answer as far as it must. Framing that could be read in two ways, or that was not read to its end, ends the
// connection, and so does every byte that comes before it was asked for.
type wire struct {
	net.Conn
	raw     syscall.RawConn // below any TLS
	peek    func(uintptr)   // notes in empty whether nothing has come on it
	empty   bool
	in      *bufio.Reader
	address string

	reused bool            // it has brought an answer before
	until  time.Time       // the deadline that it has; zero where that is not known
	cutBy  context.Context // whose end cuts the attempt under way
	uncut  func() bool     // ends that

	// Of the answer under way.
	spent   int   // bytes of its head
	length  int64 // of its body
	chunked bool  // or else
	endless bool  // or else the body ends with the connection
	keep    bool  // the connection may serve again

	idleAt     time.Time // idle: since when; else when it was taken
	next, prev *wire     // idle: in the list of all; in use: in that of its host
	stuck      bool      // in use: for longer than stuckAfter
}

// wires are the connections of a transport that are wires, and know which hosts they are for.
type wires struct {
	dial    dialFunc
	tls     *tls.Config
	maxIdle int

	mu      sync.Mutex           // guards what follows
	hosts   map[string]*host     // by address, those that have connections
	resting wireList             // all idle ones, that idle for longest first
	count   int                  // of idle ones
	http1   map[string]time.Time // addresses that spoke HTTP/1.1 over TLS, and when they were last seen to
	swept   int                  // how many http1 had when the old ones were last taken out
	timer   *time.Timer          // nil while nothing is idle
}

// host is what there is of connections to one address.
type host struct {
	idle    []*wire       // that used last at the end
	open    int           // of them, and of those in use or being made
	least   time.Duration // that an attempt took since; zero where none ended
	before  time.Duration // the same of the time before that
	usual   time.Duration // what an attempt takes, the last ones counting most
	since   time.Time
	busy    wireList     // in use, that for longest first
	young   *wire        // of those the first that is not stuck
	stuck   int          // how many are
	waiting []chan *wire // attempts that wait for one, in turn; nil tells one to make its own
}

// use enters a connection into those in use.
func (h *host) use(w *wire, now time.Time) {
	w.idleAt, w.stuck = now, false
	if h.busy.push(w); h.young == nil {
		h.young = w
	}
}

// unuse takes one out of them.
func (h *host) unuse(w *wire) {
	if w.stuck {
		h.stuck--
	}
	if h.young == w {
		h.young = w.next
	}
	h.busy.remove(w)
}

// wireList is a list of connections in the order in which they came.
type wireList struct{ first, last *wire }

func (l *wireList) push(w *wire) {
	if w.prev = l.last; l.last == nil {
		l.first = w
	} else {
		l.last.next = w
	}
	l.last = w
}

func (l *wireList) remove(w *wire) {
	if w.prev == nil {
		l.first = w.next
	} else {
		w.prev.next = w.next
	}
	if w.next == nil {
		l.last = w.prev
	} else {
		w.next.prev = w.prev
	}
	w.next, w.prev = nil, nil
}

// full tells whether an attempt may hope for a connection in use rather than open one more.
func (h *host) full(now time.Time) bool {
	for h.open-h.stuck >= sharedFrom && h.young != nil && now.Sub(h.young.idleAt) > stuckAfter {
		h.young.stuck = true
		h.stuck++
		h.young = h.young.next
	}
	return h.open-h.stuck >= sharedFrom && h.quick()
}

// note takes in how long an attempt took.
func (h *host) note(took time.Duration, now time.Time) {
	if now.Sub(h.since) > hostMemory {
		h.before, h.least, h.since = h.least, took, now
	}
	h.least = min(h.least, took)
	h.usual += (took - h.usual) / 16
}

// quick tells whether the host can answer quickly. One that has not answered yet may, and one that takes four times as
// long as it must may too, if only we asked less of it at once: ten thousand requests to a host that answers a hundred
// at a time would never let us see how quick it is.
func (h *host) quick() bool {
	least := h.least
	if h.before != 0 {
		least = min(least, h.before)
	}
	return least <= quickHost || h.usual > 4*least
}

func newWires(dial dialFunc, secure *tls.Config, maxIdle int) *wires {
	cfg := secure.Clone()
	cfg.NextProtos = []string{"http/1.1"}
	return &wires{dial: dial, tls: cfg, maxIdle: maxIdle, hosts: map[string]*host{}, http1: map[string]time.Time{}}
}

// know tells whether the target's host is known to speak HTTP/1.1.
func (ws *wires) know(t *target, now time.Time) bool {
	if t.way.guard.plain {
		return true
	}
	ws.mu.Lock()
	defer ws.mu.Unlock()
	seen, ok := ws.http1[t.address]
	if ok && now.Sub(seen) > protocolKnown {
		delete(ws.http1, t.address)
		return false
	}
	return ok
}

// learn notes what a host spoke over TLS.
func (ws *wires) learn(address string, http1 bool, now time.Time) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if !http1 {
		delete(ws.http1, address)
		return
	}
	if ws.http1[address] = now; len(ws.http1) > 2*ws.swept {
		maps.DeleteFunc(ws.http1, func(_ string, seen time.Time) bool { return now.Sub(seen) > protocolKnown })
		ws.swept = max(len(ws.http1), 64)
	}
}

// exchange makes the request and reads the head of the answer, until the deadline, or the parent's end. It is made
// again where a connection that was kept turns out to be dead: see trip. waited is for how long there was none.
func (ws *wires) exchange(parent context.Context, t *target, m *message, begin, deadline time.Time) (w *wire, r result, waited time.Duration) {
	for tries := 1; ; tries++ {
		w, late, err := ws.get(parent, t, m.inLine, begin, deadline)
		waited += late
		if err != nil {
			return nil, result{err: err}, waited
		}
		if err = w.begin(parent, deadline, min(deadlineSlack, deadline.Sub(begin)/16)); err == nil {
			if err = w.send(t, m); err == nil || connectionEnded(err) { // it may have answered before it hung up
				if got, wrong := w.receive(); wrong == nil {
					return w, got, waited
				} else if err == nil {
					err = wrong
				}
			}
		}
		ws.drop(w)
		if _, secured := w.Conn.(*tls.Conn); secured && !w.reused && parent.Err() == nil {
			ws.learn(t.address, false, begin) // it may have given up HTTP/1.1: net/http asks the next time
		}
		if !w.reused || tries > maxKept || parent.Err() != nil || !connectionEnded(err) {
			return nil, result{err: err}, waited
		}
	}
}

// get takes an idle connection, waits for one, or makes one.
func (ws *wires) get(parent context.Context, t *target, inLine *atomic.Bool, now, deadline time.Time) (w *wire, waited time.Duration, err error) {
	for {
		w, turn := ws.take(t.address, now.Add(waited))
		if turn != nil {
			var late time.Duration
			if inLine != nil {
				inLine.Store(true)
			}
			w, late = ws.await(parent, t.address, turn, min(shareWait, deadline.Sub(now)/4))
			if inLine != nil {
				inLine.Store(false)
			}
			waited += late
		}
		if w == nil {
			if w, err = ws.open(parent, t, deadline); err != nil {
				if parent.Err() == nil {
					ws.learn(t.address, false, now)
				}
				ws.gone(t.address)
				return nil, waited, err
			}
			ws.mu.Lock()
			ws.hosts[t.address].use(w, time.Now())
			ws.mu.Unlock()
			return w, waited, nil
		}
		if (w.cutBy == parent || w.cutBy.Err() == nil) && w.quiet() {
			return w, waited, nil
		}
		ws.drop(w)
	}
}

// await waits for a connection that another attempt gives back; nil where the caller is to make one.
func (ws *wires) await(parent context.Context, address string, turn chan *wire, most time.Duration) (w *wire, waited time.Duration) {
	begin := time.Now()
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case w = <-turn:
		return w, time.Since(begin)
	case <-timer.C:
	case <-parent.Done():
	}
	ws.mu.Lock()
	h := ws.hosts[address]
	if i := slices.Index(h.waiting, turn); i >= 0 {
		h.waiting = slices.Delete(h.waiting, i, i+1)
		h.open++
		ws.mu.Unlock()
		return nil, time.Since(begin)
	}
	ws.mu.Unlock()
	return <-turn, time.Since(begin) // it was given one this moment
}

// open makes a connection.
func (ws *wires) open(parent context.Context, t *target, deadline time.Time) (*wire, error) {
	ctx, cancel := context.WithDeadline(parent, deadline)
	defer cancel()
	conn, err := ws.dial(ctx, "tcp", t.address)
	if err != nil {
		return nil, err
	}
	w := &wire{Conn: conn, address: t.address}
	under := conn
	if counted, ok := conn.(*countedConn); ok {
		under = counted.Conn
	}
	if sc, ok := under.(syscall.Conn); ok {
		w.raw, _ = sc.SyscallConn()
		w.peek = func(fd uintptr) { w.empty = empty(fd) }
	}
	if !t.way.guard.plain {
		cfg := ws.tls.Clone()
		cfg.ServerName = t.base.URL.Hostname()
		secured := tls.Client(conn, cfg)
		shake, cancel := context.WithTimeout(ctx, tlsTimeout)
		defer cancel()
		if err := secured.HandshakeContext(shake); err != nil {
			_ = conn.Close()
			if shake.Err() != nil && ctx.Err() == nil {
				err = errHandshake
			}
			return nil, err
		}
		w.Conn = secured
	}
	w.in = bufio.NewReaderSize(w.Conn, wireBuffer)
	return w, nil
}

// errHandshake says of a handshake that it took too long, as net/http's own does.
var errHandshake error = handshakeTimeout{}

type handshakeTimeout struct{}

func (handshakeTimeout) Error() string   { return "TLS handshake timeout" }
func (handshakeTimeout) Timeout() bool   { return true }
func (handshakeTimeout) Temporary() bool { return true }

// begin gives the connection to an attempt, which may last until the deadline, and slack longer: with that, the deadline of
// an attempt shortly before serves this one too.
func (w *wire) begin(parent context.Context, deadline time.Time, slack time.Duration) error {
	if w.cutBy != parent {
		if w.uncut != nil && !w.uncut() {
			return net.ErrClosed // the end of another attempt's context has cut it, or is about to
		}
		// One for all attempts of a context, which are all that a run makes.
		w.cutBy, w.uncut = parent, context.AfterFunc(parent, func() { _ = w.SetDeadline(time.Unix(1, 0)) })
	}
	if left := w.until.Sub(deadline); left < 0 || left > slack {
		if err := w.limit(deadline.Add(slack)); err != nil {
			return err
		}
	}
	return parent.Err() // it may have ended before there was a deadline for it to cut
}

// limit sets the deadline.
func (w *wire) limit(deadline time.Time) error {
	w.until = deadline
	return w.SetDeadline(deadline)
}

func (w *wire) close() {
	if w.uncut != nil {
		w.uncut()
	}
	if secured, ok := w.Conn.(*tls.Conn); ok {
		_ = secured.NetConn().Close() // its own Close waits up to 5 s for room for an alert
		return
	}
	_ = w.Close()
}

// quiet tells whether nothing has come on a connection between two attempts, not its end either. Receivers end idle ones, some
// with an answer (408) to nothing; it would be taken for that to the next request.
func (w *wire) quiet() bool {
	if w.raw == nil || w.in.Buffered() > 0 {
		return false
	}
	if _, secured := w.Conn.(*tls.Conn); secured { // it may hold a record that it has read with the last one
		w.until = time.Time{} // and not by limit: what it may have to write, as for new keys, is not to fail
		if w.SetReadDeadline(time.Unix(1, 0)) != nil {
			return false
		}
		if _, err := w.in.Peek(1); !errors.Is(err, os.ErrDeadlineExceeded) {
			return false
		}
	}
	return w.raw.Control(w.peek) == nil && w.empty // its Read would mind the deadline of the last attempt
}

var requestBuffers = sync.Pool{New: func() any { b := make([]byte, 0, 4<<10); return &b }}

// send writes the request.
func (w *wire) send(t *target, m *message) error {
	buffer := requestBuffers.Get().(*[]byte)
	b := append((*buffer)[:0], m.method...)
	b = append(b, ' ')
	if m.url == t.base.URL {
		b = append(b, t.path...)
	} else {
		b = append(b, m.url.RequestURI()...)
	}
	b = append(b, " HTTP/1.1\r\nHost: "...)
	b = append(b, t.base.Host...)
	b = append(b, "\r\n"...)
	bad := ""
	for _, f := range m.fields {
		if !validHeaderValue(f.value) {
			bad = f.name
		}
		b = append(append(append(append(b, f.name...), ": "...), f.value...), "\r\n"...)
	}
	if size := m.body.size(); size > 0 || m.method != http.MethodDelete {
		b = strconv.AppendInt(append(b, "Content-Length: "...), size, 10)
		b = append(b, "\r\n"...)
	}
	b = append(b, "\r\n"...)
	for _, part := range m.body.parts {
		b = append(b, part...)
	}
	var err error
	if bad == "" {
		_, err = w.Write(b)
	} else {
		err = fmt.Errorf("the value of header %s is not one", bad)
	}
	*buffer = b
	requestBuffers.Put(buffer)
	return err
}

// receive reads the head of the answer, past those of 1xx, of which there may be as many as one head has room for.
func (w *wire) receive() (got result, err error) {
	w.spent = 0
	for {
		if got, err = w.head(); err != nil || got.status/100 != 1 || got.status == http.StatusSwitchingProtocols {
			return got, err
		}
	}
}

// head reads one status line and the headers behind it.
func (w *wire) head() (result, error) {
	line, err := w.line()
	if err != nil {
		return result{}, err
	}
	got, ok := parseStatusLine(line)
	if !ok {
		return result{}, errNotHTTP
	}
	w.length, w.chunked, w.endless, w.keep = -1, false, false, got.minor > 0
	ambiguous, retry := false, false
	for first := true; ; first = false {
		line, err := w.line()
		if err != nil {
			return result{}, err
		}
		if len(line) == 0 {
			break
		}
		if line[0] == ' ' || line[0] == '\t' {
			if first {
				return result{}, errNotHTTP
			}
			w.keep, ambiguous = false, true // a folded line, which nobody should send any more
			continue
		}
		colon := bytes.IndexByte(line, ':')
		if colon <= 0 || !validHeaderName(line[:colon]) {
			return result{}, errNotHTTP
		}
		name, value := line[:colon], bytes.Trim(line[colon+1:], " \t")
		if !validHeaderValue(value) {
			return result{}, errNotHTTP
		}
		switch {
		case is(name, "content-length"):
			n, err := strconv.ParseUint(string(value), 10, 63)
			if err != nil || w.length >= 0 && w.length != int64(n) {
				return result{}, errNotHTTP
			}
			w.length = int64(n)
		case is(name, "transfer-encoding"):
			if w.chunked || !is(value, "chunked") {
				return result{}, errNotHTTP
			}
			w.chunked = true
		case is(name, "connection"):
			if has(value, "close") {
				w.keep, ambiguous = false, true
			} else if got.minor == 0 && has(value, "keep-alive") && !ambiguous {
				w.keep = true
			}
		case is(name, "retry-after") && !retry:
			got.retryAfter, retry = string(value), true
		}
	}
	switch {
	case got.status/100 == 1 || got.status == http.StatusNoContent || got.status == http.StatusNotModified:
		if got.status == http.StatusSwitchingProtocols || w.chunked || w.length > 0 { // what follows is whatever it likes
			w.keep = false
		}
		w.length, w.chunked = 0, false
	case w.chunked:
		if w.length >= 0 || got.minor == 0 { // two ways to read it
			w.keep = false
		}
	case w.length < 0:
		w.endless, w.keep = true, false
	}
	return got, nil
}

var errNotHTTP = textproto.ProtocolError("malformed answer")

// is tells whether a is the lower-case word, in whatever case.
func is(a []byte, word string) bool {
	return len(a) == len(word) && strings.EqualFold(string(a), word)
}

// has tells whether a list of words with commas has one.
func has(list []byte, word string) bool {
	for item := range bytes.SplitSeq(list, []byte{','}) {
		if is(bytes.Trim(item, " \t"), word) {
			return true
		}
	}
	return false
}

// parseStatusLine reads HTTP-version SP status-code SP reason (RFC 9112, 4); the reason may be missing.
func parseStatusLine(line []byte) (got result, ok bool) {
	const before = "HTTP/1.1 "
	if len(line) < len(before)+3 || string(line[:7]) != before[:7] || line[8] != ' ' || len(line) > 12 && line[12] != ' ' {
		return result{}, false
	}
	if line[7] != '0' && line[7] != '1' {
		return result{}, false
	}
	for _, c := range line[9:12] {
		if c < '0' || c > '9' {
			return result{}, false
		}
		got.status = 10*got.status + int(c-'0')
	}
	got.major, got.minor = 1, int(line[7]-'0')
	return got, true
}

// line reads a line of the head, without its end. It holds until the next read.
func (w *wire) line() ([]byte, error) {
	line, err := w.in.ReadSlice('\n')
	if err == bufio.ErrBufferFull {
		long := bytes.Clone(line)
		for err == bufio.ErrBufferFull && w.spent+len(long) <= maxHeaderBytes {
			line, err = w.in.ReadSlice('\n')
			long = append(long, line...)
		}
		line = long
	}
	if w.spent += len(line); w.spent > maxHeaderBytes {
		return nil, errLongHead
	}
	if err == io.EOF && w.spent > 0 {
		err = errNotHTTP // half an answer, and no more will come
	}
	if err != nil {
		return nil, err
	}
	line = line[:len(line)-1]
	return bytes.TrimSuffix(line, []byte{'\r'}), nil
}

// errLongHead is in the words of net/http's own.
var errLongHead = errors.New("server response headers exceeded the limit")

// done reads what is left of the answer, as far as it is worth it, and keeps the connection for the next attempt
// where it can be.
func (ws *wires) done(w *wire, now, deadline time.Time) {
	if !w.drained(now, deadline) || !w.keep || w.in.Buffered() > 0 {
		ws.drop(w)
		return
	}
	w.reused = true
	ws.put(w, now)
}

// drained reads a small body to its end, within bodyTime. Nothing that happens here matters: the answer was its status.
func (w *wire) drained(now, deadline time.Time) bool {
	switch {
	case !w.chunked && !w.endless && w.length <= int64(w.in.Buffered()):
		_, err := w.in.Discard(int(w.length))
		return err == nil
	case w.length > maxBodyBytes:
		return false
	}
	if soon := now.Add(bodyTime); soon.Before(deadline) {
		deadline = soon
	}
	if w.limit(deadline) != nil || w.cutBy.Err() != nil {
		return false
	}
	switch {
	case w.chunked:
		n, err := io.Copy(io.Discard, io.LimitReader(httputil.NewChunkedReader(w.in), maxBodyBytes+1))
		if err != nil || n > maxBodyBytes {
			return false
		}
		var end [2]byte // behind the last chunk; who sends trailers there has a new connection each time
		_, err = io.ReadFull(w.in, end[:])
		return err == nil && string(end[:]) == "\r\n"
	case w.endless:
		_, _ = io.CopyN(io.Discard, w.in, maxBodyBytes+1) // so that its writer does not meet a reset
		return false
	}
	_, err := w.in.Discard(int(w.length))
	return err == nil
}

// take takes the idle connection that was used last. Where there is none, the caller is to make one, which is counted
// already, or to wait for its turn.
func (ws *wires) take(address string, now time.Time) (w *wire, turn chan *wire) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	h := ws.hosts[address]
	if h == nil {
		h = &host{}
		ws.hosts[address] = h
	}
	switch {
	case len(h.idle) > 0:
		w = h.idle[len(h.idle)-1]
		ws.remove(w)
		h.use(w, now)
	case !h.full(now):
		h.open++
	default:
		turn = make(chan *wire, 1)
		h.waiting = append(h.waiting, turn)
	}
	return w, turn
}

// drop closes a connection that was taken.
func (ws *wires) drop(w *wire) {
	w.close()
	ws.mu.Lock()
	defer ws.mu.Unlock()
	ws.hosts[w.address].unuse(w)
	ws.goneLocked(w.address)
}

// gone tells that a connection that was to be made is none.
func (ws *wires) gone(address string) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	ws.goneLocked(address)
}

func (ws *wires) goneLocked(address string) {
	h := ws.hosts[address]
	if h.open--; len(h.waiting) > 0 && h.open-h.stuck < sharedFrom {
		h.open++
		h.next() <- nil
	} else if h.open == 0 {
		delete(ws.hosts, address)
	}
}

// next is the attempt whose turn it is.
func (h *host) next() chan *wire {
	turn := h.waiting[0]
	h.waiting[0] = nil
	h.waiting = h.waiting[1:]
	return turn
}

// remove takes a connection out of the idle ones. ws.mu is held.
func (ws *wires) remove(w *wire) {
	h := ws.hosts[w.address]
	i := len(h.idle) - 1
	for i >= 0 && h.idle[i] != w {
		i--
	}
	h.idle = slices.Delete(h.idle, i, i+1)
	ws.resting.remove(w)
	ws.count--
}

// put gives a connection to whoever waits for one, or keeps it, and closes the one that has been idle for longest where
// there are too many.
func (ws *wires) put(w *wire, now time.Time) {
	var extra *wire
	ws.mu.Lock()
	h := ws.hosts[w.address]
	h.note(now.Sub(w.idleAt), now)
	h.unuse(w)
	w.idleAt = now
	if len(h.waiting) > 0 {
		h.use(w, now)
		h.next() <- w
		for len(h.waiting) > 0 && !h.quick() {
			h.open++
			h.next() <- nil
		}
		ws.mu.Unlock()
		return
	}
	switch {
	case len(h.idle) >= maxIdlePerHost:
		extra = h.idle[0]
	case ws.count >= ws.maxIdle:
		extra = ws.resting.first
	}
	if extra != nil {
		ws.remove(extra)
	}
	h.idle = append(h.idle, w)
	ws.resting.push(w)
	ws.count++
	if ws.timer == nil {
		ws.timer = time.AfterFunc(idleConnTimeout, ws.expire)
	}
	if extra != nil {
		ws.goneLocked(extra.address)
	}
	ws.mu.Unlock()
	if extra != nil {
		extra.close()
	}
}

// expire closes what has been idle for too long.
func (ws *wires) expire() { ws.shut(time.Now().Add(-idleConnTimeout)) }

// closeIdle closes all that is idle.
func (ws *wires) closeIdle() { ws.shut(time.Time{}) }

// shut closes what has been idle since before a time; zero is whatever is idle.
func (ws *wires) shut(before time.Time) {
	var old []*wire
	ws.mu.Lock()
	for w := ws.resting.first; w != nil && (before.IsZero() || !w.idleAt.After(before)); w = ws.resting.first {
		ws.remove(w)
		ws.goneLocked(w.address)
		old = append(old, w)
	}
	switch {
	case ws.resting.first != nil && ws.timer != nil:
		ws.timer.Reset(time.Until(ws.resting.first.idleAt.Add(idleConnTimeout)))
	case ws.timer != nil:
		ws.timer.Stop()
		ws.timer = nil
	}
	ws.mu.Unlock()
	for _, w := range old {
		w.close()
	}
}

// plainHost tells whether a host can stand in a Host header as it is.
func plainHost(host string) bool {
	for i := range len(host) {
		if host[i] <= ' ' || host[i] >= 0x7f || host[i] == '%' {
			return false
		}
	}
	return true
}
