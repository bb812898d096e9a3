package sender

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/sender/sendertest"
)

// The frames of HTTP/2 (RFC 9113, 6), and the error codes that a test sends (7).
const (
	frameData, frameHeaders, frameReset, frameSettings, framePing, frameGoAway, frameContinuation = 0, 1, 3, 4, 6, 7, 9

	noError, internalError, refusedStream, enhanceYourCalm = 0, 2, 7, 11
)

// frames is the receiver's side of a HTTP/2 connection, frame by frame.
type frames struct {
	io.Writer
	in *bufio.Reader
}

func (f *frames) send(kind, flags byte, stream uint32, payload ...byte) error {
	head := make([]byte, 9, 9+len(payload))
	binary.BigEndian.PutUint32(head, uint32(len(payload))<<8)
	head[3], head[4] = kind, flags
	binary.BigEndian.PutUint32(head[5:], stream)
	_, err := f.Write(append(head, payload...))
	return err
}

// status answers a stream with a status that HPACK's static table knows.
func (f *frames) status(stream uint32, indexed byte) error {
	return f.send(frameHeaders, 0x4|0x1, stream, indexed)
}

const ok204, failed500 = 0x89, 0x8e

func (f *frames) reset(stream, code uint32) error {
	return f.send(frameReset, 0, stream, binary.BigEndian.AppendUint32(nil, code)...)
}

func (f *frames) goAway(last, code uint32) error {
	return f.send(frameGoAway, 0, 0, binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, last), code)...)
}

// request reads up to the end of the next request and returns its stream.
func (f *frames) request() (stream uint32, err error) {
	for {
		var head [9]byte
		if _, err := io.ReadFull(f.in, head[:]); err != nil {
			return 0, err
		}
		payload := make([]byte, int(head[0])<<16|int(head[1])<<8|int(head[2]))
		if _, err := io.ReadFull(f.in, payload); err != nil {
			return 0, err
		}
		stream := binary.BigEndian.Uint32(head[5:])
		switch kind, flags := head[3], head[4]; {
		case kind == frameSettings && flags&0x1 == 0:
			err = f.send(frameSettings, 0x1, 0)
		case kind == framePing && flags&0x1 == 0:
			err = f.send(framePing, 0x1, 0, payload...)
		case (kind == frameHeaders || kind == frameData) && flags&0x1 != 0:
			return stream, nil
		}
		if err != nil {
			return 0, err
		}
	}
}

// rawHTTP2 is a receiver that speaks frames: serve gets each connection with its number, from 1.
func rawHTTP2(t *testing.T, serve func(n int, f *frames)) (url string, trusting func(*outbox.Endpoint)) {
	t.Helper()
	cert, ca, err := sendertest.Certificate("127.0.0.1", time.Time{})
	require.NoError(t, err)
	cfg := &tls.Config{Certificates: []tls.Certificate{*cert}, NextProtos: []string{"h2"}}
	url = raw(t, func(n int, conn net.Conn, _ *bufio.Reader) {
		c := tls.Server(conn, cfg)
		defer c.Close()
		if c.Handshake() != nil {
			return
		}
		f := &frames{Writer: c, in: bufio.NewReader(c)}
		preface := make([]byte, len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
		if _, err := io.ReadFull(f.in, preface); err != nil || f.send(frameSettings, 0, 0) != nil {
			return
		}
		serve(n, f)
	})
	return strings.Replace(url, "http:", "https:", 1), func(e *outbox.Endpoint) { e.TLS.CA = ca }
}

// What a HTTP/2 receiver says it has not processed costs no attempt; what it may have does.
func TestHTTP2StreamsThatWereNotProcessedCostNoAttempt(t *testing.T) {
	// begin answers the first of a connection's requests, so that the next one is on a kept connection.
	begin := func(f *frames) (stream uint32) {
		if first, err := f.request(); err != nil || f.status(first, ok204) != nil {
			return 0
		}
		stream, _ = f.request()
		return stream
	}
	fine := func(f *frames) {
		for {
			stream, err := f.request()
			if err != nil || f.status(stream, ok204) != nil {
				return
			}
		}
	}
	drained := func(f *frames) { until(f.in) }
	for name, c := range map[string]struct {
		bad  func(f *frames) // what the first connection does
		want []outbox.Outcome
	}{
		"REFUSED_STREAM on a fresh connection": {func(f *frames) {
			stream, _ := f.request()
			_ = f.reset(stream, refusedStream)
			fine(f)
		}, []outbox.Outcome{{Verdict: outbox.Delivered, Status: 204}}},
		"REFUSED_STREAM on a kept one": {func(f *frames) {
			_ = f.reset(begin(f), refusedStream)
			fine(f)
		}, []outbox.Outcome{{Verdict: outbox.Delivered, Status: 204}, {Verdict: outbox.Delivered, Status: 204}}},
		"GOAWAY that did not see the stream": {func(f *frames) {
			stream := begin(f)
			_ = f.goAway(stream-2, noError)
			drained(f)
		}, []outbox.Outcome{{Verdict: outbox.Delivered, Status: 204}, {Verdict: outbox.Delivered, Status: 204}}},
		"GOAWAY with an error that did not see the stream": {func(f *frames) {
			stream := begin(f)
			_ = f.goAway(stream-2, enhanceYourCalm)
			drained(f)
		}, []outbox.Outcome{{Verdict: outbox.Delivered, Status: 204}, {Verdict: outbox.Delivered, Status: 204}}},
		"GOAWAY on a fresh connection": {func(f *frames) {
			_, _ = f.request()
			_ = f.goAway(0, noError)
			drained(f)
		}, []outbox.Outcome{{Verdict: outbox.Delivered, Status: 204}}},
		"GOAWAY between two requests": {func(f *frames) {
			stream, _ := f.request()
			_ = f.status(stream, ok204)
			_ = f.goAway(stream, noError)
			drained(f)
		}, []outbox.Outcome{{Verdict: outbox.Delivered, Status: 204}, {Verdict: outbox.Delivered, Status: 204}}},
		"GOAWAY, and the answer all the same": {func(f *frames) {
			stream, _ := f.request()
			_ = f.goAway(stream, noError)
			_ = f.status(stream, failed500)
			drained(f)
		}, []outbox.Outcome{{Verdict: outbox.Retry, Reason: outbox.ReasonStatus, Status: 500}, {Verdict: outbox.Delivered, Status: 204}}},
		"GOAWAY that saw the stream, and the end": {func(f *frames) {
			stream, _ := f.request()
			_ = f.goAway(stream, noError)
		}, []outbox.Outcome{{Verdict: outbox.Retry, Reason: outbox.ReasonReset}, {Verdict: outbox.Delivered, Status: 204}}},
		"INTERNAL_ERROR": {func(f *frames) {
			stream, _ := f.request()
			_ = f.reset(stream, internalError)
			fine(f)
		}, []outbox.Outcome{{Verdict: outbox.Retry, Reason: outbox.ReasonReset}, {Verdict: outbox.Delivered, Status: 204}}},
		"reset in the middle of the answer": {func(f *frames) {
			stream, _ := f.request()
			_ = f.send(frameHeaders, 0x4, stream, ok204-1) // 200, with a body to come
			_ = f.send(frameData, 0, stream, []byte("abc")...)
			_ = f.reset(stream, internalError)
			fine(f)
		}, []outbox.Outcome{{Verdict: outbox.Delivered, Status: 200}, {Verdict: outbox.Delivered, Status: 204}}},
	} {
		t.Run(name, func(t *testing.T) {
			url, trusting := rawHTTP2(t, func(n int, f *frames) {
				if n == 1 {
					c.bad(f)
					return
				}
				fine(f)
			})
			b := setup(t, nil)
			failures := 0
			for i, want := range c.want {
				o := b.send(endpoint(url, trusting, func(e *outbox.Endpoint) { e.Breaker = outbox.BreakerPolicy{ConsecutiveFailures: 2} }))
				if want.Verdict != outbox.Delivered {
					require.NotEmpty(t, o.Detail)
					failures++
				}
				o.Detail = ""
				require.Equal(t, want, o, "%d", i)
			}
			require.Less(t, failures, 2)
			require.Empty(t, b.moves)
		})
	}
}

// But a receiver that refuses every stream is heard, in the end.
func TestAReceiverThatRefusesEveryStreamCostsItsAttempts(t *testing.T) {
	var requests atomic.Int32
	url, trusting := rawHTTP2(t, func(_ int, f *frames) {
		for {
			stream, err := f.request()
			if err != nil || f.reset(stream, refusedStream) != nil {
				return
			}
			requests.Add(1)
		}
	})
	b := setup(t, nil)
	o := b.send(endpoint(url, trusting, timeout(300*time.Millisecond), func(e *outbox.Endpoint) { e.Breaker = outbox.BreakerPolicy{ConsecutiveFailures: 1} }))
	require.Equal(t, outbox.Retry, o.Verdict)
	require.Equal(t, outbox.ReasonTimeout, o.Reason, o.Detail)
	require.Len(t, b.moves, 1)
	require.LessOrEqual(t, requests.Load(), int32(3), "and it is not hammered meanwhile")
}

// docs/faults.md 91, over HTTP/2.
func TestEndlessHTTP2AnswersCostLittleMemory(t *testing.T) {
	junk := append([]byte{0x00, 1, 'x', 100}, bytes.Repeat([]byte{'y'}, 100)...) // a literal header field: x with 100 bytes
	for name, c := range map[string]struct {
		serve func(f *frames, stream uint32)
		want  outbox.Outcome
	}{
		"headers": {func(f *frames, stream uint32) {
			err := f.send(frameHeaders, 0, stream, ok204)
			for more := bytes.Repeat(junk, 100); err == nil; {
				err = f.send(frameContinuation, 0, stream, more...)
			}
		}, outbox.Outcome{Verdict: outbox.Retry}},
		"1xx": {func(f *frames, stream uint32) {
			var err error
			for err == nil { // :status 103, a literal with an indexed name
				err = f.send(frameHeaders, 0x4, stream, append([]byte{0x08, 3, '1', '0', '3'}, junk...)...)
			}
		}, outbox.Outcome{Verdict: outbox.Retry}},
		"body": {func(f *frames, stream uint32) {
			err := f.send(frameHeaders, 0x4, stream, ok204-1)
			for more := make([]byte, 16<<10); err == nil; {
				err = f.send(frameData, 0, stream, more...)
			}
		}, outbox.Outcome{Verdict: outbox.Delivered, Status: 200}},
		"pings": {func(f *frames, _ uint32) {
			go until(f.in)
			var err error
			for err == nil {
				err = f.send(framePing, 0, 0, make([]byte, 8)...)
			}
		}, outbox.Outcome{Verdict: outbox.Retry}},
		"settings": {func(f *frames, _ uint32) {
			go until(f.in)
			var err error
			for err == nil {
				err = f.send(frameSettings, 0, 0)
			}
		}, outbox.Outcome{Verdict: outbox.Retry}},
	} {
		t.Run(name, func(t *testing.T) {
			url, trusting := rawHTTP2(t, func(_ int, f *frames) {
				if stream, err := f.request(); err == nil {
					c.serve(f, stream)
				}
			})
			b := setup(t, nil)
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			o := b.send(endpoint(url, trusting, timeout(500*time.Millisecond)))
			require.Equal(t, c.want.Verdict, o.Verdict, o.Detail)
			require.Equal(t, c.want.Status, o.Status)
			require.Eventually(t, func() bool { // net/http gives up a stream in a goroutine of its own
				runtime.GC()
				runtime.ReadMemStats(&after)
				return int64(after.HeapAlloc)-int64(before.HeapAlloc) < 8<<20
			}, patience, 10*time.Millisecond, "bytes kept")
		})
	}
}
