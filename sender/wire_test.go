package sender

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/sender/sendertest"
)

// wiresOf are those of the bundle's only transport.
func (b *bundle) wiresOf() *wires {
	require.Len(b.t, b.transports, 1)
	for _, tr := range b.transports {
		return tr.wires
	}
	return nil
}

// aged makes every idle wire one that has been idle for a time, and tells how many there are.
func (ws *wires) aged(by time.Duration) (n int) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for w := ws.resting.first; w != nil; w = w.next {
		w.idleAt = w.idleAt.Add(-by)
		n++
	}
	return n
}

// A wire writes what net/http would, but for the order of the headers: Try goes by net/http.
func TestAWireSendsTheSameRequestAsNetHTTP(t *testing.T) {
	type seen struct {
		line, body string
		header     []string
	}
	requests := make(chan seen, 2)
	url := raw(t, func(_ int, conn net.Conn, in *bufio.Reader) {
		for {
			var copied bytes.Buffer
			r, body, err := take(bufio.NewReader(io.TeeReader(in, &copied)))
			if err != nil {
				return
			}
			head, _, _ := strings.Cut(copied.String(), "\r\n\r\n")
			lines := strings.Split(head, "\r\n")
			slices.Sort(lines[1:])
			requests <- seen{fmt.Sprint(r.Method, " ", r.RequestURI, " ", r.Proto), body, slices.DeleteFunc(lines[1:], func(l string) bool {
				return strings.HasPrefix(l, headerTimestamp) || strings.HasPrefix(l, headerSignature) // of the second they were made in
			})}
			_, _ = io.WriteString(conn, ok)
		}
	})
	for name, change := range map[string]func(*outbox.Endpoint){
		"standard":    signed,
		"unsigned":    func(*outbox.Endpoint) {},
		"path, query": func(e *outbox.Endpoint) { e.URL += "a%2Fb/ü?q=1&token=x%20y" },
		"empty body":  func(e *outbox.Endpoint) { e.Format = outbox.FormatRaw; e.ID = "empty" },
		"PUT":         func(e *outbox.Endpoint) { e.Transform.Method = http.MethodPut },
		"empty DELETE": func(e *outbox.Endpoint) {
			e.Transform.Method, e.Format, e.ID = http.MethodDelete, outbox.FormatRaw, "empty"
		},
		"headers": func(e *outbox.Endpoint) {
			e.Headers = map[string]string{"X-Env": "prod", "idempotency-key": "k", "user-agent": "acme/9", "Authorization": "Bearer abc"}
		},
		"cloudevents-binary": cloudEventsBinary,
		"nfeio":              plain("nfeio"),
	} {
		t.Run(name, func(t *testing.T) {
			b := setup(t, nil)
			e, ev := endpoint(url, change), event()
			if e.ID == "empty" {
				ev.Data = nil
			}
			a := outbox.Attempt{Event: ev, Endpoint: e, Number: 3, Replay: true}
			require.Equal(t, outbox.Delivered, b.Send(t.Context(), a).Verdict)
			byWire := <-requests
			require.Equal(t, 1, b.wiresOf().aged(0), "it went by a wire")
			require.Equal(t, outbox.Delivered, b.Try(t.Context(), a).Outcome.Verdict)
			require.Equal(t, <-requests, byWire)
		})
	}
}

func TestOverTLSAWireServesFromWhenTheHostHasSpokenHTTP11(t *testing.T) {
	cert, ca, err := sendertest.Certificate("127.0.0.1", time.Time{})
	require.NoError(t, err)
	for name, c := range map[string]struct {
		http2 bool
		wires int
	}{"HTTP/1.1": {false, 1}, "HTTP/2": {true, 0}} {
		t.Run(name, func(t *testing.T) {
			rx := sendertest.New(t, sendertest.Config{TLS: cert, HTTP2: c.http2, Secrets: []string{hmacSecret}})
			b := setup(t, nil)
			e := endpoint(rx.URL(), signed, func(e *outbox.Endpoint) { e.TLS.CA = ca })
			for range 3 {
				require.Equal(t, outbox.Delivered, b.send(e).Verdict)
			}
			require.Equal(t, c.wires, b.wiresOf().aged(0))
			for _, r := range rx.Requests() {
				require.NoError(t, r.Invalid)
			}

			// After a while it is asked again.
			ws := b.wiresOf()
			for address := range ws.http1 {
				ws.learn(address, true, time.Now().Add(-2*protocolKnown))
			}
			require.Equal(t, outbox.Delivered, b.send(e).Verdict)
			require.Len(t, ws.http1, c.wires)
			for _, seen := range ws.http1 {
				require.WithinDuration(t, time.Now(), seen, patience)
			}
		})
	}
}

// A host that has given up HTTP/1.1, or whose certificate is another one by now.
func TestAWireOverTLSIsJudgedAtEachHandshake(t *testing.T) {
	cert, ca, err := sendertest.Certificate("127.0.0.1", time.Time{})
	require.NoError(t, err)
	rx := sendertest.New(t, sendertest.Config{TLS: cert})
	b := setup(t, nil)
	e := endpoint(rx.URL(), func(e *outbox.Endpoint) { e.TLS.CA = ca })
	for range 2 {
		require.Equal(t, outbox.Delivered, b.send(e).Verdict)
	}
	rx.Refuse()
	other, _, err := sendertest.Certificate("127.0.0.1", time.Time{})
	require.NoError(t, err)
	second := sendertest.New(t, sendertest.Config{TLS: other, Addr: e.URL[len("https://"):strings.LastIndexByte(e.URL, '/')]})
	o := b.send(e)
	require.Equal(t, outbox.ReasonTLS, o.Reason, o.Detail)
	require.Zero(t, second.Count())
}

// What a receiver says unasked, as an end of its patience, is no answer to the next request.
func TestWhatComesUnaskedIsNoAnswer(t *testing.T) {
	for name, after := range map[string]string{
		"408 and the end": "HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
		"a 200":           ok,
		"the end alone":   "",
	} {
		for _, together := range []bool{true, false} {
			t.Run(fmt.Sprint(name, " together=", together), func(t *testing.T) {
				answered, said := make(chan struct{}), make(chan struct{}, 1)
				var requests atomic.Int32
				url := raw(t, func(n int, conn net.Conn, in *bufio.Reader) {
					for {
						if _, _, err := take(in); err != nil {
							return
						}
						requests.Add(1)
						switch {
						case n > 1:
							_, _ = io.WriteString(conn, "HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
							continue
						case together:
							_, _ = io.WriteString(conn, ok+after)
						default:
							_, _ = io.WriteString(conn, ok)
							<-answered
							_, _ = io.WriteString(conn, after)
						}
						_ = conn.(*net.TCPConn).CloseWrite()
						said <- struct{}{}
						until(in)
						return
					}
				})
				b := setup(t, nil)
				require.Equal(t, 200, b.send(endpoint(url)).Status)
				if !together {
					close(answered)
				}
				<-said
				require.Equal(t, outbox.Outcome{Verdict: outbox.Delivered, Status: 201}, b.send(endpoint(url)))
				require.EqualValues(t, 2, requests.Load())
			})
		}
	}
}

func TestIdleWiresAreFewAndEnd(t *testing.T) {
	ws := newWires(nil, new(tls.Config), 3)
	far := make(map[*wire]net.Conn)
	idle := func(address string) *wire {
		near, other := net.Pipe()
		w := &wire{Conn: near, address: address, reused: true}
		far[w] = other
		ws.mu.Lock()
		if ws.hosts[address] == nil {
			ws.hosts[address] = &host{}
		}
		ws.hosts[address].open++
		ws.hosts[address].use(w, time.Now())
		ws.mu.Unlock()
		ws.put(w, time.Now())
		return w
	}
	closed := func(w *wire) bool {
		_ = far[w].SetReadDeadline(time.Now().Add(time.Millisecond))
		_, err := far[w].Read(make([]byte, 1))
		return err == io.EOF
	}
	a, b, c := idle("a"), idle("b"), idle("a")
	d := idle("c")
	require.True(t, closed(a), "of too many the one that was used least lately")
	take := func(address string) *wire {
		w, turn := ws.take(address, time.Now())
		require.Nil(t, turn)
		if w == nil {
			ws.gone(address) // it was counted as one to be made
		}
		return w
	}
	require.Nil(t, take("x"))
	require.Same(t, c, take("a"))
	require.Nil(t, take("a"))
	ws.put(c, time.Now())
	require.Equal(t, 3, ws.aged(idleConnTimeout/2))
	ws.put(take("a"), time.Now())
	require.Equal(t, 3, ws.aged(idleConnTimeout/2+time.Second))
	ws.expire()
	require.True(t, closed(b) && closed(d))
	require.False(t, closed(c))
	ws.closeIdle()
	require.True(t, closed(c))
	require.Zero(t, ws.count)
	require.Nil(t, ws.timer)
	require.Empty(t, ws.hosts)
}

// Where a receiver is quick, many attempts share its connections; where it is slow, each has one in the end.
func TestManyAttemptsAtOneHostShareItsConnections(t *testing.T) {
	const attempts = 2 * sharedFrom
	for name, hangs := range map[string]bool{"quick": false, "slow": true} {
		t.Run(name, func(t *testing.T) {
			var conns, arrived atomic.Int32
			all := make(chan struct{})
			url := raw(t, func(_ int, conn net.Conn, in *bufio.Reader) {
				conns.Add(1)
				for {
					if _, _, err := take(in); err != nil {
						return
					}
					if arrived.Add(1) == attempts {
						close(all)
					}
					if hangs {
						<-all
					}
					_, _ = io.WriteString(conn, ok)
				}
			})
			b := setup(t, nil)
			e := endpoint(url, timeout(patience))
			outcomes := make(chan outbox.Outcome, attempts)
			for range attempts {
				go func() {
					outcomes <- b.Send(t.Context(), outbox.Attempt{Event: event(), Endpoint: e, Number: 1})
				}()
			}
			waited := 0
			for range attempts {
				o := <-outcomes
				require.Equal(t, outbox.Delivered, o.Verdict, o.Detail)
				if o.Waited > 0 {
					waited++
				}
			}
			if hangs {
				require.EqualValues(t, attempts, conns.Load())
				require.Equal(t, attempts-sharedFrom, waited)
			}
			require.LessOrEqual(t, conns.Load(), int32(attempts))
			ws := b.wiresOf()
			require.LessOrEqual(t, ws.aged(0), maxIdlePerHost)
			b.Close()
			ws.mu.Lock()
			defer ws.mu.Unlock()
			require.Empty(t, ws.hosts, "what is open is counted exactly")
		})
	}
}

// Connections of requests that hang count no more after a moment, and the others of the host go on as before.
func TestHangingRequestsKeepNoConnectionFromOthers(t *testing.T) {
	now := time.Now()
	h := &host{}
	var all []*wire
	for range sharedFrom {
		require.False(t, h.full(now))
		w := &wire{}
		all = append(all, w)
		h.open++
		h.use(w, now)
	}
	require.True(t, h.full(now))
	require.True(t, h.full(now.Add(stuckAfter)))
	require.False(t, h.full(now.Add(stuckAfter+1)))
	require.Equal(t, 1, h.stuck, "as many as need be")
	h.open++
	h.use(&wire{}, now.Add(stuckAfter+1))
	require.False(t, h.full(now.Add(stuckAfter+2)))
	for _, w := range all {
		h.unuse(w)
		h.open--
	}
	require.Zero(t, h.stuck)
	require.Same(t, h.busy.first, h.busy.last)
	require.Same(t, h.busy.first, h.young)
	require.False(t, h.full(now))
}

// An attempt that waits for a connection is cut with its context, and hands on what it was given too late.
func TestAWaitForAConnectionEndsWithItsContext(t *testing.T) {
	ws := newWires(func(ctx context.Context, _, _ string) (net.Conn, error) { return nil, ctx.Err() }, new(tls.Config), 3)
	ws.hosts["a"] = &host{open: sharedFrom}
	to := &target{address: "a", way: way{guard: guard{plain: true}}}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, err := ws.get(ctx, to, nil, time.Now(), time.Now().Add(patience))
	require.ErrorIs(t, err, context.Canceled)
	require.Equal(t, sharedFrom, ws.hosts["a"].open)
	require.Empty(t, ws.hosts["a"].waiting)

	_, turn := ws.take("a", time.Now())
	ws.gone("a") // one that was in use is closed: the next attempt makes its own
	require.Nil(t, <-turn)
	require.Equal(t, sharedFrom, ws.hosts["a"].open)
}

// The end of a context cuts its attempt, and none of another context that has the same wire.
func TestAContextCutsItsOwnAttemptsOnly(t *testing.T) {
	hang := make(chan struct{})
	arrived := make(chan struct{}, 10)
	url := raw(t, func(_ int, conn net.Conn, in *bufio.Reader) {
		for {
			r, _, err := take(in)
			if err != nil {
				return
			}
			if arrived <- struct{}{}; r.Header.Get(headerAttempt) == "2" {
				<-hang
			}
			_, _ = io.WriteString(conn, ok)
		}
	})
	b := setup(t, nil)
	e := endpoint(url)
	first, end := context.WithCancel(t.Context())
	require.Equal(t, outbox.Delivered, b.Send(first, outbox.Attempt{Event: event(), Endpoint: e, Number: 1}).Verdict)
	end()
	require.Equal(t, outbox.Cut, b.Send(first, outbox.Attempt{Event: event(), Endpoint: e, Number: 1}).Verdict)
	require.Equal(t, outbox.Delivered, b.send(e).Verdict)
	<-arrived
	<-arrived

	second, cut := context.WithCancel(t.Context())
	over := make(chan outbox.Outcome)
	go func() { over <- b.Send(second, outbox.Attempt{Event: event(), Endpoint: e, Number: 2}) }()
	<-arrived
	cut()
	require.Equal(t, outbox.Cut, (<-over).Verdict)
	close(hang)
	require.Equal(t, outbox.Delivered, b.send(e).Verdict)
}

// overTLS is raw behind TLS. hold gathers what is written, until release writes it in one piece.
func overTLS(t *testing.T, cert *tls.Certificate, serve func(n int, conn net.Conn, in *bufio.Reader, hold, release func())) (url string) {
	return strings.Replace(raw(t, func(n int, conn net.Conn, _ *bufio.Reader) {
		g := &gathering{Conn: conn}
		secured := tls.Server(g, &tls.Config{Certificates: []tls.Certificate{*cert}})
		if secured.Handshake() == nil {
			serve(n, secured, bufio.NewReader(secured), func() { g.hold = true }, func() {
				g.hold = false
				_, _ = g.Conn.Write(g.held)
				g.held = nil
			})
		}
	}), "http", "https", 1)
}

type gathering struct {
	net.Conn
	hold bool
	held []byte
}

func (g *gathering) Write(p []byte) (int, error) {
	if !g.hold {
		return g.Conn.Write(p)
	}
	g.held = append(g.held, p...)
	return len(p), nil
}

// TLS reads ahead: what came with the answer is in no socket any more, and in no buffer of ours yet.
func TestARecordBehindTheAnswersIsNoAnswer(t *testing.T) {
	cert, ca, err := sendertest.Certificate("127.0.0.1", time.Time{})
	require.NoError(t, err)
	url := overTLS(t, cert, func(n int, conn net.Conn, in *bufio.Reader, hold, release func()) {
		for turn := 0; ; turn++ {
			if _, _, err := take(in); err != nil {
				return
			}
			if n != 2 || turn > 0 { // the first connection is net/http's
				_, _ = io.WriteString(conn, "HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
				continue
			}
			hold()
			_, _ = io.WriteString(conn, ok)
			_, _ = io.WriteString(conn, ok)
			release()
		}
	})
	b := setup(t, nil)
	e := endpoint(url, func(e *outbox.Endpoint) { e.TLS.CA = ca })
	for _, want := range []int{201, 200, 201, 201} {
		require.Equal(t, want, b.send(e).Status)
	}
}

// One port may speak both, and what is meant for TLS never goes without.
func TestHTTPAndHTTPSOfOneAddressShareNoConnection(t *testing.T) {
	cert, ca, err := sendertest.Certificate("127.0.0.1", time.Time{})
	require.NoError(t, err)
	came := make(chan string, 10)
	url := raw(t, func(_ int, conn net.Conn, in *bufio.Reader) {
		first, err := in.Peek(1)
		if err != nil {
			return
		}
		way := " plain"
		if first[0] == 0x16 { // a handshake
			secured := tls.Server(&ahead{conn, in}, &tls.Config{Certificates: []tls.Certificate{*cert}})
			way, conn, in = " TLS", secured, bufio.NewReader(secured)
		}
		for {
			r, _, err := take(in)
			if err != nil {
				return
			}
			came <- r.URL.Path + way
			_, _ = io.WriteString(conn, ok)
		}
	})
	b := setup(t, nil)
	open := endpoint(url+"open", func(e *outbox.Endpoint) { e.ID, e.TLS.CA = "open", ca })
	secure := endpoint(strings.Replace(url, "http", "https", 1)+"secure", func(e *outbox.Endpoint) { e.TLS.CA, e.Auth.Bearer = ca, "s3cret" })
	for range 3 {
		for _, e := range []*outbox.Endpoint{secure, open} {
			require.Equal(t, outbox.Delivered, b.send(e).Verdict)
		}
		require.Equal(t, "/secure TLS", <-came)
		require.Equal(t, "/open plain", <-came)
	}
}

// ahead is a connection of which in has read something already.
type ahead struct {
	net.Conn
	in *bufio.Reader
}

func (a *ahead) Read(p []byte) (int, error) { return a.in.Read(p) }

func TestAnIdleWireOutlivesTheDeadlineOfItsLastAttempt(t *testing.T) {
	var conns atomic.Int32
	url := raw(t, func(_ int, conn net.Conn, in *bufio.Reader) {
		conns.Add(1)
		for {
			if _, _, err := take(in); err != nil {
				return
			}
			_, _ = io.WriteString(conn, ok)
		}
	})
	b := setup(t, nil)
	for range 3 {
		require.Equal(t, outbox.Delivered, b.send(endpoint(url)).Verdict)
		ws := b.wiresOf()
		ws.mu.Lock()
		require.NoError(t, ws.resting.first.limit(time.Unix(1, 0)))
		ws.mu.Unlock()
	}
	require.EqualValues(t, 1, conns.Load())
}

func TestWiresOfAnEndedContextCostNoAttempt(t *testing.T) {
	const wires = 20
	var arrived atomic.Int32
	all := make(chan struct{})
	url := raw(t, func(_ int, conn net.Conn, in *bufio.Reader) {
		for {
			if _, _, err := take(in); err != nil {
				return
			}
			if arrived.Add(1) == wires {
				close(all)
			}
			<-all
			_, _ = io.WriteString(conn, ok)
		}
	})
	b := setup(t, nil)
	e := endpoint(url)
	ctx, end := context.WithCancel(t.Context())
	var sent sync.WaitGroup
	for range wires {
		sent.Go(func() { b.Send(ctx, outbox.Attempt{Event: event(), Endpoint: e, Number: 1}) })
	}
	sent.Wait()
	end()
	require.Equal(t, outbox.Delivered, b.send(e).Verdict)
}

func TestAHostThatGivesUpHTTP11IsAskedAgain(t *testing.T) {
	cert, ca, err := sendertest.Certificate("127.0.0.1", time.Time{})
	require.NoError(t, err)
	rx := sendertest.New(t, sendertest.Config{TLS: cert})
	b := setup(t, nil)
	e := endpoint(rx.URL(), func(e *outbox.Endpoint) { e.TLS.CA = ca })
	for range 2 {
		require.Equal(t, outbox.Delivered, b.send(e).Verdict)
	}
	rx.Refuse()
	l, err := net.Listen("tcp", e.URL[len("https://"):strings.LastIndexByte(e.URL, '/')])
	require.NoError(t, err)
	only := new(http.Protocols)
	only.SetHTTP2(true)
	second := &http.Server{
		Protocols: only, TLSConfig: &tls.Config{Certificates: []tls.Certificate{*cert}, NextProtos: []string{"h2"}},
		Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}),
	}
	over := make(chan struct{})
	go func() { defer close(over); _ = second.ServeTLS(l, "", "") }()
	defer func() { b.Close(); _ = second.Close(); <-over }()
	b.send(e) // one attempt may find out
	o := b.send(e)
	require.Equal(t, outbox.Delivered, o.Verdict, o.Detail)
}

// A short timeout leaves time for the request, whoever has the host's connections.
func TestAShortAttemptWaitsForAConnectionAQuarterOfItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer far.Close()
		ws := newWires(func(context.Context, string, string) (net.Conn, error) { return near, nil }, new(tls.Config), 3)
		ws.hosts["a"] = &host{open: sharedFrom}
		to := &target{address: "a", way: way{guard: guard{plain: true}}}
		w, waited, err := ws.get(t.Context(), to, nil, time.Now(), time.Now().Add(200*time.Millisecond))
		require.NoError(t, err)
		require.Equal(t, 50*time.Millisecond, waited)
		ws.drop(w)
	})
}

// The goodbye of TLS would wait for a receiver that reads nothing.
func TestAWireOverTLSIsClosedAtOnce(t *testing.T) {
	cert, _, err := sendertest.Certificate("127.0.0.1", time.Time{})
	require.NoError(t, err)
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer far.Close()
		go func() { _ = tls.Server(far, &tls.Config{Certificates: []tls.Certificate{*cert}}).Handshake() }()
		secured := tls.Client(near, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12})
		require.NoError(t, secured.Handshake())
		begin := time.Now()
		(&wire{Conn: secured}).close()
		require.Zero(t, time.Since(begin))
	})
}

func TestWhatHostsSpokeIsForgotten(t *testing.T) {
	ws := newWires(nil, new(tls.Config), 3)
	now := time.Now()
	for i := range 10_000 {
		ws.learn(fmt.Sprint(i), true, now.Add(time.Duration(i)*time.Second))
	}
	require.Less(t, len(ws.http1), 4*int(protocolKnown/time.Second))
}

func TestALargeHeadGoesByNetHTTPToo(t *testing.T) {
	tr := &transport{wires: newWires(nil, new(tls.Config), 3)}
	to := &target{wired: true, way: way{guard: guard{plain: true}}}
	m := &message{body: &body{parts: [3][]byte{make([]byte, 10<<10)}}, fields: []field{{"a", strings.Repeat("x", 5<<10)}}}
	require.True(t, tr.takes(to, m, time.Now()))
	m.add("b", strings.Repeat("x", 2<<10))
	require.False(t, tr.takes(to, m, time.Now()))
}

// canned is a connection with bytes to read.
type canned struct {
	net.Conn
	in io.Reader
}

func (c canned) Read(p []byte) (int, error)     { return c.in.Read(p) }
func (canned) SetDeadline(time.Time) error      { return nil }
func (canned) Close() error                     { return nil }
func (canned) SetReadDeadline(time.Time) error  { return nil }
func (canned) SetWriteDeadline(time.Time) error { return nil }

// Whatever an answer holds: where a wire takes it and keeps the connection, net/http reads the same from it,
// to the same byte. So no receiver can have the answer to one request taken for that to another.
func FuzzAnswer(f *testing.F) {
	for _, s := range []string{
		ok, "HTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\nx",
		"HTTP/1.1 100 Continue\r\n\r\n" + ok, "HTTP/1.1 503 X\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: y\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
		"HTTP/1.1 200\r\ncontent-length: 2\r\ncontent-length:2\r\n\r\nhi", "HTTP/1.1 101 X\r\nUpgrade: x\r\n\r\n",
		"HTTP/1.1 200 OK\nX: y\n z\nContent-Length: 0\n\n", "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\nx", "HTTP/1.1 200 OK\r\nContent-Length: 0x1\r\n\r\nx",
		"HTTP/1.1 200 OK\r\nContent-Length : 1\r\n\r\nx", "HTTP/1.1 200 OK\r\nX\x00: 1\r\nContent-Length: 0\r\n\r\n",
	} {
		f.Add([]byte(s + ok))
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, answers []byte) {
		source := bytes.NewReader(answers)
		w := &wire{Conn: canned{in: source}, cutBy: context.Background()}
		w.in = bufio.NewReaderSize(w.Conn, wireBuffer)
		got, err := w.receive()
		if err != nil || !w.drained(time.Time{}, time.Time{}) || !w.keep {
			return
		}
		left, err := io.ReadAll(w.in)
		require.NoError(t, err)

		in := bufio.NewReader(bytes.NewReader(answers))
		var res *http.Response
		for res == nil || res.StatusCode/100 == 1 && res.StatusCode != http.StatusSwitchingProtocols {
			res, err = http.ReadResponse(in, &http.Request{Method: http.MethodPost})
			require.NoError(t, err)
		}
		_, err = io.Copy(io.Discard, res.Body)
		require.NoError(t, err)
		want, err := io.ReadAll(in)
		require.NoError(t, err)
		require.Equal(t, res.StatusCode, got.status)
		require.Equal(t, res.Header.Get("Retry-After"), got.retryAfter)
		require.False(t, res.Close, "net/http would not keep it")
		require.Equal(t, string(want), string(left))
	})
}

// The queue that we make ourselves at a host must not look like a host that is slow.
func TestAHostThatTakesLongForMuchAtOnceMayBeQuick(t *testing.T) {
	h, now := &host{}, time.Now()
	answers := func(n int, took time.Duration) {
		for range n {
			h.note(took, now)
		}
	}
	answers(100, 2*quickHost)
	require.False(t, h.quick(), "it is far away")
	answers(100, 6*quickHost)
	require.False(t, h.quick(), "three times as long says nothing")
	answers(100, 10*quickHost)
	require.True(t, h.quick())
	answers(100, 2*quickHost)
	require.False(t, h.quick(), "asked for less, it is as far away as before")
}
