package sendertest

import (
	"crypto/tls"
	"net"
	"net/http"
	"slices"
	"strconv"
	"time"
)

// Answer is what the receiver does with a request whose body it has read. The request's
// context ends when the client goes away or the receiver closes.
type Answer func(w http.ResponseWriter, r *http.Request)

// Times is n times the same answer, for a script.
func Times(n int, a Answer) []Answer { return slices.Repeat([]Answer{a}, n) }

// Status answers with a status, an empty body and the headers given as name, value, name, value, …
func Status(status int, headers ...string) Answer {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i+1 < len(headers); i += 2 {
			w.Header().Add(headers[i], headers[i+1])
		}
		w.WriteHeader(status)
	}
}

// Body answers with a status and a body.
func Body(status int, body string) Answer {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.WriteHeader(status)
		_, _ = w.Write([]byte(body))
	}
}

// After answers as a does when d has passed.
func After(d time.Duration, a Answer) Answer {
	return func(w http.ResponseWriter, r *http.Request) {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
			a(w, r)
		case <-r.Context().Done():
		}
	}
}

// On answers as a does when the signal comes.
func On(signal <-chan struct{}, a Answer) Answer {
	return func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-signal:
			a(w, r)
		case <-r.Context().Done():
		}
	}
}

// Hang never answers; the connection stays open until the client gives up.
func Hang() Answer {
	return func(_ http.ResponseWriter, r *http.Request) {
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	}
}

// HangInBody answers with a status, a first byte of body, and nothing more.
func HangInBody(status int) Answer {
	return func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(status)
		_, _ = w.Write([]byte("."))
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	}
}

// EndlessBody answers with a status and a body without an end.
func EndlessBody(status int) Answer {
	return func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(status)
		chunk := make([]byte, 32<<10)
		for r.Context().Err() == nil {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
		panic(http.ErrAbortHandler)
	}
}

// Reset closes the connection with a TCP reset instead of an answer.
func Reset() Answer {
	return func(w http.ResponseWriter, _ *http.Request) {
		if conn := hijack(w); conn != nil {
			reset(conn)
		}
	}
}

// Raw writes bytes in place of an answer and closes the connection.
func Raw(b string) Answer {
	return func(w http.ResponseWriter, _ *http.Request) {
		if conn := hijack(w); conn != nil {
			_, _ = conn.Write([]byte(b))
			_ = conn.Close()
		}
	}
}

// Drip writes bytes one by one with a pause between, in place of an answer: slow headers.
func Drip(b string, pause time.Duration) Answer {
	return func(w http.ResponseWriter, r *http.Request) {
		conn := hijack(w)
		if conn == nil {
			return
		}
		defer conn.Close()
		tick := time.NewTicker(pause)
		defer tick.Stop()
		for i := range len(b) {
			select {
			case <-tick.C:
			case <-r.Context().Done():
				return
			}
			if _, err := conn.Write([]byte{b[i]}); err != nil {
				return
			}
		}
	}
}

// hijack takes the connection over; over HTTP/2, where that cannot be, it aborts the stream.
func hijack(w http.ResponseWriter) net.Conn {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	return conn
}

// reset closes a connection so that the other side sees ECONNRESET, not the end of a stream.
func reset(conn net.Conn) {
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	if t, ok := conn.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	_ = conn.Close()
}
