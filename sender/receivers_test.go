package sender

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/sender/sendertest"
)

// raw is a receiver that speaks bytes: serve gets each connection with its number, from 1.
func raw(t *testing.T, serve func(n int, conn net.Conn, in *bufio.Reader)) (url string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	over := make(chan struct{})
	go func() {
		defer close(over)
		for n := 1; ; n++ {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				serve(n, conn, bufio.NewReader(conn))
			}()
		}
	}()
	t.Cleanup(func() { l.Close(); <-over })
	return "http://" + l.Addr().String() + "/"
}

// take reads one request to its end.
func take(in *bufio.Reader) (*http.Request, string, error) {
	r, err := http.ReadRequest(in)
	if err != nil {
		return nil, "", err
	}
	body, err := io.ReadAll(r.Body)
	return r, string(body), err
}

// until blocks until the other side closes the connection.
func until(in *bufio.Reader) { _, _ = io.Copy(io.Discard, in) }

func abort(conn net.Conn) { _ = conn.(*net.TCPConn).SetLinger(0); _ = conn.Close() }

const ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

// Every way of misbehaving has its outcome and its effect on the circuit, ends, costs little
// memory and leaves nothing behind: no goroutine, no descriptor.
func TestMisbehavingReceivers(t *testing.T) {
	bomb := func() string {
		var b bytes.Buffer
		z, _ := gzip.NewWriterLevel(&b, gzip.BestCompression)
		_, _ = z.Write(make([]byte, 50<<20))
		_ = z.Close()
		return b.String()
	}()
	says := func(s string) func(int, net.Conn, *bufio.Reader) { // and keeps the connection
		return func(_ int, conn net.Conn, in *bufio.Reader) {
			if _, _, err := take(in); err != nil {
				return
			}
			_, _ = io.WriteString(conn, s)
			until(in)
		}
	}
	ends := func(s string) func(int, net.Conn, *bufio.Reader) { // and closes it
		return func(_ int, conn net.Conn, in *bufio.Reader) {
			if _, _, err := take(in); err == nil {
				_, _ = io.WriteString(conn, s)
			}
		}
	}
	endless := func(first, again string) func(int, net.Conn, *bufio.Reader) {
		return func(_ int, conn net.Conn, in *bufio.Reader) {
			if _, _, err := take(in); err != nil {
				return
			}
			_, err := io.WriteString(conn, first)
			for more := []byte(again); err == nil; {
				_, err = conn.Write(more)
			}
		}
	}
	slowly := func(first, again string) func(int, net.Conn, *bufio.Reader) {
		return func(_ int, conn net.Conn, in *bufio.Reader) {
			if _, _, err := take(in); err != nil {
				return
			}
			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			_, err := io.WriteString(conn, first)
			for err == nil {
				<-tick.C
				_, err = io.WriteString(conn, again)
			}
		}
	}
	delivered := outbox.Outcome{Verdict: outbox.Delivered, Status: 200}
	const deadline = 400 * time.Millisecond

	for name, c := range map[string]struct {
		serve func(int, net.Conn, *bufio.Reader)
		want  outbox.Outcome // Detail is checked where it is given
	}{
		"88 reset after processing": {
			serve: func(_ int, conn net.Conn, in *bufio.Reader) { _, _, _ = take(in); abort(conn) },
			want:  outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonReset, Detail: "the connection broke before an answer: connection reset by peer"},
		},
		"88 closed after processing": {
			serve: ends(""),
			want:  outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonReset, Detail: "the connection broke before an answer: the receiver closed it"},
		},
		"88 broken in the status line": {serve: ends("HTTP/1.1 20"), want: outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonProtocol}},
		"88 broken in the headers":     {serve: ends("HTTP/1.1 200 OK\r\nContent-"), want: outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonProtocol}},
		"90 body hangs":                {serve: says("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc"), want: delivered},
		"90 body breaks": {serve: func(_ int, conn net.Conn, in *bufio.Reader) {
			_, _, _ = take(in)
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
			abort(conn)
		}, want: delivered},
		"90 body is endless":        {serve: endless("HTTP/1.1 200 OK\r\n\r\n", strings.Repeat("x", 4096)), want: delivered},
		"90 body of lies":           {serve: says("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzzzz\r\n"), want: delivered},
		"90 body as announced huge": {serve: says("HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"), want: delivered},
		"90 error with endless body": {
			serve: endless("HTTP/1.1 500 Oops\r\n\r\n", strings.Repeat("x", 4096)),
			want:  outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonStatus, Status: 500, Detail: "500 Internal Server Error"},
		},
		"91 endless 1xx": {
			serve: endless("", "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"),
			want:  outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonProtocol},
		},
		"91 endless headers": {
			serve: endless("HTTP/1.1 200 OK\r\n", "X-Header: "+strings.Repeat("x", 1000)+"\r\n"),
			want:  outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonProtocol, Detail: "the answer's headers are larger than 32768 bytes"},
		},
		"91 endless header line": {
			serve: endless("HTTP/1.1 200 OK\r\nX: ", "xxxxxxxxxxxxxxxxxxxxxxxxxxxxx"),
			want:  outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonProtocol, Detail: "the answer's headers are larger than 32768 bytes"},
		},
		"92 gzip bomb":         {serve: says(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s", len(bomb), bomb)), want: delivered},
		"93 no answer":         {serve: says(""), want: outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonTimeout, Detail: "no answer within 400ms"}},
		"93 headers drip":      {serve: slowly("HTTP/1.1 200 OK\r\nX: ", "x"), want: outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonTimeout}},
		"93 status line drips": {serve: slowly("HTTP/1.1 200 O", "K"), want: outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonTimeout}},
		"90 body drips":        {serve: slowly("HTTP/1.1 200 OK\r\n\r\n", "x"), want: delivered},
		"91 1xx drip":          {serve: slowly("", "HTTP/1.1 102 Processing\r\n\r\n"), want: outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonTimeout}},
		"90 endless chunk header": {
			serve: endless("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", strings.Repeat("x", 4096)),
			want:  delivered,
		},
		"90 endless trailers": {
			serve: endless("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", "X-Header: "+strings.Repeat("x", 1000)+"\r\n"),
			want:  delivered,
		},
		"94 redirects in a circle": {
			serve: says("HTTP/1.1 307 Temporary Redirect\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"),
			want:  outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonStatus, Status: 307},
		},
		"length and chunks": {
			serve: says("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
			want:  delivered,
		},
		"negative length": {serve: says("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"), want: outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonProtocol}},
		"HTTP/2 unasked":  {serve: says("\x00\x00\x00\x04\x00\x00\x00\x00\x00"), want: outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonTimeout}},
		"TLS unasked":     {serve: says("\x15\x03\x01\x00\x02\x02\x16\n\n"), want: outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonProtocol}},
		"93 never read":   {serve: func(_ int, _ net.Conn, in *bufio.Reader) { until(in) }, want: outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonTimeout}},
		"93 headers stop": {
			serve: says("HTTP/1.1 200 OK\r\nX-A: b\r\n"),
			want:  outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonTimeout},
		},
		"garbage":         {serve: says("SSH-2.0-OpenSSH_9.2p1\r\n\x00\x01\x02"), want: outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonProtocol, Detail: "what came back is not HTTP"}},
		"garbage status":  {serve: says("HTTP/1.1 abc OK\r\n\r\n"), want: outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonProtocol}},
		"garbage headers": {serve: says("HTTP/1.1 200 OK\r\nthis is no header\r\n\r\n"), want: outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonProtocol}},
		"two lengths":     {serve: says("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n"), want: outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonProtocol}},
		"status 000":      {serve: says("HTTP/1.1 000 Zero\r\nContent-Length: 0\r\n\r\n"), want: outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonProtocol}},
		"status 999":      {serve: says("HTTP/1.1 999 Max\r\nContent-Length: 0\r\n\r\n"), want: outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonProtocol, Status: 999}},
		"switches protocols": {
			serve: says("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n"),
			want:  outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonStatus, Status: 101},
		},
		"100 continue, then fine": {serve: says("HTTP/1.1 100 Continue\r\n\r\n" + ok), want: delivered},
		"204 with a body":         {serve: says("HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\nabc"), want: outbox.Outcome{Verdict: outbox.Delivered, Status: 204}},
		"HTTP/1.0":                {serve: ends("HTTP/1.0 200 OK\r\n\r\nfine"), want: delivered},
	} {
		both(t, name, func(t *testing.T, nethttp *http.Transport) {
			url := raw(t, c.serve)
			b := setup(t, nil)
			if nethttp != nil {
				b.roundTripper = nethttp
			}
			goroutines := runtime.NumGoroutine()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			begin := time.Now()
			o := b.send(endpoint(url+"?token=TOPSECRET", timeout(deadline), func(e *outbox.Endpoint) {
				e.Breaker = outbox.BreakerPolicy{ConsecutiveFailures: 1}
			}))
			took := time.Since(begin)
			runtime.ReadMemStats(&after)

			require.NotContains(t, o.Detail, "TOPSECRET")
			require.NotContains(t, o.Detail, "127.0.0.1")
			if c.want.Verdict == outbox.Delivered {
				require.Empty(t, b.moves)
			} else {
				require.NotEmpty(t, o.Detail)
				require.Equal(t, []string{"billing: closed → open"}, b.moves)
			}
			if c.want.Detail == "" {
				o.Detail = ""
			}
			require.Equal(t, c.want, o)
			require.Less(t, took, patience, "it ends")
			require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(2<<20), "bytes allocated")

			b.Close()
			if nethttp != nil {
				nethttp.CloseIdleConnections()
			}
			require.Eventually(t, func() bool {
				return runtime.NumGoroutine() <= goroutines+1 && sockets() <= 1 && b.room.connections() == 0 // Eventually's own; the receiver's
			}, patience, 5*time.Millisecond)
		})
	}
}

// both runs a test over wires, and over net/http, which has to mean the same by the same bytes.
func both(t *testing.T, name string, test func(t *testing.T, nethttp *http.Transport)) {
	t.Run(name, func(t *testing.T) { test(t, nil) })
	t.Run(name+" by net_http", func(t *testing.T) {
		test(t, newTransport(way{guard: guard{origin: outbox.FromFile}}, new(tls.Config), 1))
	})
}

// sockets counts those that the process has open.
func sockets() (n int) {
	links, _ := os.ReadDir("/proc/self/fd")
	for _, l := range links {
		if to, _ := os.Readlink("/proc/self/fd/" + l.Name()); strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n
}

// A body that is announced large is not read at all, nor waited for.
func TestABodyAnnouncedLargeIsNotRead(t *testing.T) {
	b := setup(t, fake(func(*http.Request) (*http.Response, error) {
		res, err := answer(200)
		res.ContentLength = 99999999999
		res.Body = io.NopCloser(readerFunc(func([]byte) (int, error) {
			t.Error("it was read")
			return 0, io.EOF
		}))
		return res, err
	}))
	require.Equal(t, outbox.Delivered, b.send(endpoint("https://x.example/")).Verdict)
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// The deadline is an hour: what ends the wait is the second that a body has.
func TestAHangingBodyIsLeftAfterASecond(t *testing.T) {
	rx := sendertest.New(t, sendertest.Config{})
	rx.Script(sendertest.HangInBody(200), sendertest.HangInBody(503))
	b := setup(t, nil)
	for _, status := range []int{200, 503} {
		require.Equal(t, status, b.send(endpoint(rx.URL(), timeout(time.Hour))).Status)
	}
}

// docs/faults.md 89: the receiver closes a connection just as we use it again.
func TestAStaleConnectionCostsNoAttempt(t *testing.T) {
	bodies := make(chan string, 10)
	url := raw(t, func(n int, conn net.Conn, in *bufio.Reader) {
		for turn := 1; ; turn++ {
			r, body, err := take(in)
			if err != nil {
				return
			}
			if n == 1 && turn == 2 {
				abort(conn)
				return
			}
			bodies <- body
			if _, has := r.Header["Idempotency-Key"]; has {
				bodies <- "Idempotency-Key was sent"
			}
			_, _ = io.WriteString(conn, ok)
		}
	})
	b := setup(t, nil)
	for range 2 {
		require.Equal(t, outbox.Outcome{Verdict: outbox.Delivered, Status: 200}, b.send(endpoint(url)))
	}
	first, second := <-bodies, <-bodies
	require.Equal(t, first, second)
	require.Contains(t, second, `"data":{"amount": 120.50}}`)
	require.Empty(t, bodies)
}

func TestAReceiverThatRestartedCostsNoAttempt(t *testing.T) {
	rx := sendertest.New(t, sendertest.Config{})
	b := setup(t, nil)
	for range 5 {
		require.Equal(t, outbox.Delivered, b.send(endpoint(rx.URL())).Verdict)
		rx.Refuse()
		require.NoError(t, rx.Reopen())
	}
	require.Equal(t, 5, rx.Count())
}

// The same where much of a body is on its way when the connection turns out to be dead, which
// net/http by itself does not repeat.
func TestAStaleConnectionCostsNoAttemptWhateverTheSize(t *testing.T) {
	for _, size := range []int{2 << 10, 64 << 10, 900 << 10} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			var got atomic.Int64
			url := raw(t, func(n int, conn net.Conn, in *bufio.Reader) {
				for turn := 1; ; turn++ {
					if n == 1 && turn == 2 {
						_, _ = in.ReadByte()
						abort(conn)
						return
					}
					_, body, err := take(in)
					if err != nil {
						return
					}
					got.Store(int64(len(body)))
					_, _ = io.WriteString(conn, ok)
				}
			})
			b := setup(t, nil)
			ev := event()
			ev.Data = []byte(`"` + strings.Repeat("x", size) + `"`)
			for range 2 {
				got.Store(0)
				o := b.Send(t.Context(), outbox.Attempt{Event: ev, Endpoint: endpoint(url), Number: 1})
				require.Equal(t, outbox.Outcome{Verdict: outbox.Delivered, Status: 200}, o)
				require.Greater(t, got.Load(), int64(size))
			}
		})
	}
}

// But a receiver that resets each request is heard: a fresh connection's end is an answer.
func TestAReceiverThatAlwaysResetsCostsItsAttempts(t *testing.T) {
	var requests atomic.Int32
	url := raw(t, func(_ int, conn net.Conn, in *bufio.Reader) {
		if _, _, err := take(in); err == nil {
			requests.Add(1)
			abort(conn)
		}
	})
	b := setup(t, nil)
	for range 3 {
		require.Equal(t, outbox.ReasonReset, b.send(endpoint(url)).Reason)
	}
	require.EqualValues(t, 3, requests.Load())
}

// docs/faults.md 94: neither the body nor its signature goes to another host.
func TestRedirectsAreNeverFollowed(t *testing.T) {
	other := sendertest.New(t, sendertest.Config{})
	rx := sendertest.New(t, sendertest.Config{})
	b := setup(t, nil)
	for _, status := range []int{301, 302, 303, 307, 308} {
		rx.Script(sendertest.Status(status, "Location", other.URL()))
		o := b.send(endpoint(rx.URL(), func(e *outbox.Endpoint) { e.ID = fmt.Sprint(status) }))
		require.Equal(t, outbox.Retry, o.Verdict)
		require.Contains(t, o.Detail, "redirects are not followed")
		require.NotContains(t, o.Detail, other.Addr())
	}
	require.Zero(t, other.Count())
}

// docs/faults.md 96: the answer counts, though the body was not sent to its end. (Where a reset
// overtakes the answer, the kernel throws the answer away: that is a reset, and retried.)
func TestAnEarlyAnswerIsTheAnswer(t *testing.T) {
	url := raw(t, func(_ int, conn net.Conn, in *bufio.Reader) {
		_, _ = in.ReadString('\n')
		_, _ = io.WriteString(conn, "HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
		until(in)
	})
	b := setup(t, nil)
	ev := event()
	ev.Data = []byte(`"` + strings.Repeat("x", 8<<20) + `"`)
	for range 5 {
		o := b.Send(t.Context(), outbox.Attempt{Event: ev, Endpoint: endpoint(url, func(e *outbox.Endpoint) { e.MaxPayload = 16 << 20 }), Number: 1})
		require.Equal(t, 413, o.Status, o.Detail)
	}
}

// A payload of 50 MB goes out as it lies in memory: it is neither copied nor read twice, and a
// connection that broke in the middle of it sends it again from its beginning.
func TestALargePayloadIsSentWithoutACopy(t *testing.T) {
	const size = 50 << 20
	var got atomic.Int64
	url := raw(t, func(n int, conn net.Conn, in *bufio.Reader) {
		for turn := 1; ; turn++ {
			r, err := http.ReadRequest(in)
			if err != nil {
				return
			}
			if n == 1 && turn == 2 {
				_, _ = io.CopyN(io.Discard, r.Body, size/2)
				abort(conn)
				return
			}
			sent, _ := io.Copy(io.Discard, r.Body)
			got.Store(sent)
			_, _ = io.WriteString(conn, ok)
		}
	})
	b := setup(t, nil)
	ev := event()
	ev.Data = bytes.Repeat([]byte("x"), size)
	ev.Data[0], ev.Data[size-1] = '"', '"'
	e := endpoint(url, signed, func(e *outbox.Endpoint) { e.MaxPayload = 64 << 20 })
	for range 2 {
		got.Store(0)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		o := b.Send(t.Context(), outbox.Attempt{Event: ev, Endpoint: e, Number: 1})
		runtime.ReadMemStats(&after)
		require.Equal(t, outbox.Outcome{Verdict: outbox.Delivered, Status: 200}, o)
		require.Greater(t, got.Load(), int64(size))
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(2<<20), "bytes allocated")
	}
	e = endpoint(url, signed)
	require.Equal(t, outbox.ReasonTooLarge, b.Send(t.Context(), outbox.Attempt{Event: ev, Endpoint: e, Number: 1}).Reason)
}

// docs/faults.md 97: a second answer that nobody asked for ends the connection. (One that is there
// before net/http looks may still be taken for the next request's; it comes from the receiver itself.)
func TestASmuggledAnswerEndsItsConnection(t *testing.T) {
	dropped := make(chan struct{})
	url := raw(t, func(n int, conn net.Conn, in *bufio.Reader) {
		if _, _, err := take(in); err != nil {
			return
		}
		if n == 1 {
			_, _ = io.WriteString(conn, "HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"+ok)
			until(in)
			close(dropped)
			return
		}
		_, _ = io.WriteString(conn, "HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
	})
	b := setup(t, nil)
	require.Equal(t, 500, b.send(endpoint(url)).Status)
	<-dropped
	require.Equal(t, 201, b.send(endpoint(url)).Status)
}

// docs/faults.md 98: a HTTP/2 connection whose other end is gone without a word.
func TestADeadHTTP2ConnectionIsNoticed(t *testing.T) {
	cert, _, err := sendertest.Certificate("x.example", time.Now().AddDate(-20, 0, 0)) // a bubble begins in 2000
	require.NoError(t, err)
	synctest.Test(t, func(t *testing.T) {
		l := &pipes{conns: make(chan net.Conn), over: make(chan struct{})}
		server := &http.Server{
			Handler:   http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(200 + r.ProtoMajor) }),
			TLSConfig: &tls.Config{Certificates: []tls.Certificate{*cert}, NextProtos: []string{"h2"}},
			ErrorLog:  nil,
		}
		go func() { _ = server.ServeTLS(l, "", "") }()
		tr := newTransport(way{guard: guard{}}, &tls.Config{InsecureSkipVerify: true}, 10)
		tr.DialContext = l.dial
		b := setup(t, tr)
		e := endpoint("https://x.example/", timeout(20*time.Second))

		require.Equal(t, 202, b.send(e).Status, "HTTP/2 is spoken")
		l.last.dead.Store(true)
		begin := time.Now()
		o := b.send(e)
		require.Equal(t, 202, o.Status, "sent again on a fresh connection: %+v", o)
		require.LessOrEqual(t, time.Since(begin), http2PingAfter+http2PingTimeout+time.Second)

		l.last.dead.Store(true)
		e = endpoint("https://x.example/", timeout(5*time.Second))
		require.Equal(t, outbox.ReasonTimeout, b.send(e).Reason, "not noticed in time")
		pass(http2PingAfter + http2PingTimeout)
		require.Equal(t, 202, b.send(e).Status, "but now")

		tr.CloseIdleConnections()
		_ = server.Close()
		l.closeAll()
	})
}

// pipes is a network inside a bubble, whose connections can fall silent.
type pipes struct {
	conns chan net.Conn
	over  chan struct{}
	last  *mute
	all   []net.Conn
}

type mute struct {
	net.Conn
	dead atomic.Bool
}

func (m *mute) Write(p []byte) (int, error) {
	if m.dead.Load() {
		return len(p), nil // into a void
	}
	return m.Conn.Write(p)
}

func (p *pipes) dial(context.Context, string, string) (net.Conn, error) {
	client, server := net.Pipe()
	p.last = &mute{Conn: client}
	p.all = append(p.all, client, server)
	p.conns <- server
	return p.last, nil
}

func (p *pipes) closeAll() {
	for _, c := range p.all {
		_ = c.Close()
	}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.over:
		return nil, net.ErrClosed
	}
}
func (p *pipes) Close() error   { close(p.over); return nil }
func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

// docs/faults.md 100.
func TestEachTLSFaultSaysWhatIsWrong(t *testing.T) {
	good, ca, err := sendertest.Certificate("127.0.0.1", time.Time{})
	require.NoError(t, err)
	expired, expiredCA, err := sendertest.Certificate("127.0.0.1", time.Now().Add(-time.Hour))
	require.NoError(t, err)
	other, otherCA, err := sendertest.Certificate("other.example", time.Time{})
	require.NoError(t, err)

	serve := func(cfg *tls.Config) string {
		url := raw(t, func(_ int, conn net.Conn, _ *bufio.Reader) {
			c := tls.Server(conn, cfg)
			if c.Handshake() != nil {
				return
			}
			in := bufio.NewReader(c)
			if _, _, err := take(in); err == nil {
				_, _ = io.WriteString(c, ok)
			}
			_ = c.Close()
		})
		return strings.Replace(url, "http://", "https://", 1)
	}
	with := func(c *tls.Certificate) *tls.Config { return &tls.Config{Certificates: []tls.Certificate{*c}} }
	old := with(good)
	old.MinVersion, old.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	twelve := with(good)
	twelve.MaxVersion = tls.VersionTLS12
	mutual := with(good)
	mutual.ClientAuth = tls.RequireAnyClientCert

	for name, c := range map[string]struct {
		url    string
		tls    outbox.TLS
		detail string // empty: delivered
	}{
		"good":               {serve(with(good)), outbox.TLS{CA: ca}, ""},
		"TLS 1.2":            {serve(twelve), outbox.TLS{CA: ca}, ""},
		"expired":            {serve(with(expired)), outbox.TLS{CA: expiredCA}, "x509: certificate has expired or is not yet valid"},
		"another name":       {serve(with(other)), outbox.TLS{CA: otherCA}, "x509: cannot validate certificate for 127.0.0.1 because it doesn't contain any IP SANs"},
		"unknown authority":  {serve(with(good)), outbox.TLS{}, "x509: certificate signed by unknown authority"},
		"another authority":  {serve(with(good)), outbox.TLS{CA: otherCA}, "x509: certificate signed by unknown authority"},
		"TLS 1.1 at most":    {serve(old), outbox.TLS{CA: ca}, "protocol version not supported"},
		"1.2 where 1.3 must": {serve(twelve), outbox.TLS{CA: ca, MinVersion: "1.3"}, "protocol version not supported"},
		"certificate wanted": {serve(mutual), outbox.TLS{CA: ca}, "certificate required"},
		"plain HTTP instead": {strings.Replace(raw(t, func(_ int, c net.Conn, _ *bufio.Reader) { _, _ = io.WriteString(c, ok) }), "http:", "https:", 1), outbox.TLS{}, "the receiver answers in plain HTTP, not TLS"},
		"another protocol":   {strings.Replace(raw(t, func(_ int, c net.Conn, _ *bufio.Reader) { _, _ = io.WriteString(c, "220 smtp ready\r\n") }), "http:", "https:", 1), outbox.TLS{}, "the receiver does not speak TLS"},
	} {
		t.Run(name, func(t *testing.T) {
			b := setup(t, nil)
			o := b.send(endpoint(c.url+"?TOPSECRET", func(e *outbox.Endpoint) { e.TLS = c.tls }))
			if c.detail == "" {
				require.Equal(t, outbox.Delivered, o.Verdict, o.Detail)
				return
			}
			require.Equal(t, outbox.Retry, o.Verdict)
			require.Equal(t, outbox.ReasonTLS, o.Reason, o.Detail)
			require.Contains(t, o.Detail, c.detail)
			require.NotContains(t, o.Detail, "TOPSECRET")
		})
	}
}

func TestATLSHandshakeThatHangsEndsWithTheDeadline(t *testing.T) {
	url := raw(t, func(_ int, _ net.Conn, in *bufio.Reader) { until(in) })
	o := setup(t, nil).send(endpoint(strings.Replace(url, "http:", "https:", 1), timeout(200*time.Millisecond)))
	require.Equal(t, outbox.Retry, o.Verdict)
	require.Equal(t, outbox.ReasonTimeout, o.Reason)
}

// A listener whose queue is full: the kernel drops our SYN, as a firewall does.
func TestAConnectThatHangsEndsWithTheDeadline(t *testing.T) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	require.NoError(t, err)
	defer syscall.Close(fd)
	require.NoError(t, syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	require.NoError(t, syscall.Listen(fd, 0))
	at, err := syscall.Getsockname(fd)
	require.NoError(t, err)
	addr := fmt.Sprintf("127.0.0.1:%d", at.(*syscall.SockaddrInet4).Port)
	for range 3 {
		if conn, err := net.DialTimeout("tcp", addr, 100*time.Millisecond); err == nil {
			defer conn.Close()
		}
	}
	o := setup(t, nil).send(endpoint("http://"+addr+"/", timeout(200*time.Millisecond)))
	require.Equal(t, outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonTimeout, Detail: "no answer within 200ms"}, o)
}

func TestARefusedConnectionIsOurAnswer(t *testing.T) {
	rx := sendertest.New(t, sendertest.Config{})
	rx.Refuse()
	o := setup(t, nil).send(endpoint(rx.URL()))
	require.Equal(t, outbox.Retry, o.Verdict)
	require.Equal(t, outbox.ReasonConnect, o.Reason)
	require.Equal(t, "connect to "+rx.Addr()+": connection refused", o.Detail)
}

func TestWhatWeCutShortSpendsNoAttempt(t *testing.T) {
	rx := sendertest.New(t, sendertest.Config{})
	rx.Script(sendertest.Hang())
	b := setup(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		_ = rx.WaitFor(ctx, 1)
		cancel()
	}()
	o := b.Send(ctx, outbox.Attempt{Event: event(), Endpoint: endpoint(rx.URL()), Number: 1})
	require.Equal(t, outbox.Cut, o.Verdict)
	require.Equal(t, outbox.Cut, b.Send(ctx, outbox.Attempt{Event: event(), Endpoint: endpoint(rx.URL()), Number: 1}).Verdict)
	require.Equal(t, 1, rx.Count(), "a context that has ended sends nothing")
}

// docs/faults.md 105, and what of a request could bring a receiver into trouble.
func TestRequestsArePlainHTTP(t *testing.T) {
	heads := make(chan string, 1)
	url := raw(t, func(_ int, conn net.Conn, in *bufio.Reader) {
		var head strings.Builder
		for {
			line, err := in.ReadString('\n')
			if head.WriteString(line); err != nil || line == "\r\n" {
				break
			}
		}
		heads <- head.String()
		_, _ = io.WriteString(conn, ok)
	})
	require.Equal(t, outbox.Delivered, setup(t, nil).send(endpoint(url, signed)).Verdict)
	head := <-heads
	require.Contains(t, head, "\r\nContent-Length: 91\r\n")
	require.Contains(t, head, "\r\nwebhook-id: evt_1\r\n")
	for _, absent := range []string{"Expect", "Transfer-Encoding", "Accept-Encoding", "Idempotency-Key", "Referer"} {
		require.NotContains(t, head, absent)
	}
}

func TestSmallAnswersLeaveTheirConnectionForTheNext(t *testing.T) {
	var conns atomic.Int32
	url := raw(t, func(_ int, conn net.Conn, in *bufio.Reader) {
		conns.Add(1)
		for turn := 0; ; turn++ {
			if _, _, err := take(in); err != nil {
				return
			}
			body := strings.Repeat("x", []int{0, 10, 1000, maxBodyBytes}[turn%4])
			_, _ = fmt.Fprintf(conn, "HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s", []int{200, 404}[turn%2], len(body), body)
		}
	})
	b := setup(t, nil)
	for range 20 {
		b.send(endpoint(url))
	}
	require.EqualValues(t, 1, conns.Load())
}

func TestMisbehaviourLeavesNoDescriptorBehind(t *testing.T) {
	if _, err := os.Stat("/proc/self/fd"); err != nil {
		t.Skip("needs /proc")
	}
	rx := sendertest.New(t, sendertest.Config{})
	b := setup(t, nil)
	for i, a := range []sendertest.Answer{
		sendertest.Reset(), sendertest.Raw("garbage"), sendertest.EndlessBody(200), sendertest.Hang(), sendertest.HangInBody(200),
		sendertest.Drip("HTTP/1.1 200 OK\r\n", 20*time.Millisecond), sendertest.Body(500, "no"),
	} {
		rx.Script(sendertest.Times(3, a)...)
		for range 3 {
			b.send(endpoint(rx.URL(), timeout(100*time.Millisecond), func(e *outbox.Endpoint) { e.ID = fmt.Sprint(i) }))
		}
	}
	b.Close()
	rx.Refuse() // waits for its own connections, so what is left is ours
	require.Eventually(t, func() bool { return sockets() == 0 }, patience, 10*time.Millisecond)
}
