package sender

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/walhook/walhook/outbox"
)

const (
	maxRetryAfter = 24 * time.Hour
	minRetryAfter = time.Second
	maxDetail     = 300 // bytes
)

// result is what came of a request, as far as it matters for what it means.
type result struct {
	status     int    // zero where no answer came
	retryAfter string // the answer's header
	err        error  // where no answer came

	major, minor int // of the answer's HTTP

	cut      bool // the caller's context ended before an answer came
	timedOut bool // the attempt's own deadline did
}

// judge is the one place that decides what an answer, or the lack of one, means: for the
// delivery, and for the endpoint's circuit. What counts against the circuit is the endpoint's
// fault alone: not an event it refuses, not a pause it asks for, not what is our own doing.
func judge(r result, e *outbox.Endpoint, now time.Time) (outbox.Outcome, effect) {
	if r.status == 0 && r.err != nil {
		return judgeError(r, e, now)
	}
	if r.status/100 == 2 {
		return outbox.Outcome{Verdict: outbox.Delivered, Status: r.status}, success
	}
	o := outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonStatus, Status: r.status, Detail: statusDetail(r.status)}
	if r.status < 100 || r.status > 599 {
		o.Reason, o.Detail = outbox.ReasonProtocol, "the answer's status "+strconv.Itoa(r.status)+" is not one of HTTP"
		return o, failure
	}
	o.RetryAfter = parseRetryAfter(r.retryAfter, now)
	counts := failure
	switch r.status {
	case http.StatusTooManyRequests:
		o.Slow = true
		counts = neither
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		o.Slow = true
		if r.status == http.StatusServiceUnavailable && o.RetryAfter > 0 {
			counts = neither
		}
	case http.StatusGone:
		o.Gone = true
		counts = neither
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed,
		http.StatusProxyAuthRequired, http.StatusRequestTimeout, http.StatusTooEarly:
	default:
		if r.status/100 == 4 { // 400, 413, 415, 422 and their kin: this event's fault
			counts = neither
		}
	}
	if slices.Contains(e.Retry.DeadOn, r.status) {
		o.Verdict = outbox.Dead
	}
	return o, counts
}

func statusDetail(status int) string {
	d := strconv.Itoa(status)
	if text := http.StatusText(status); text != "" {
		d += " " + text
	}
	if status/100 == 3 {
		d += ": redirects are not followed; give the endpoint its final URL"
	}
	return d
}

// judgeError judges an attempt that got no answer.
func judgeError(r result, e *outbox.Endpoint, now time.Time) (outbox.Outcome, effect) {
	if r.cut {
		return outbox.Outcome{Verdict: outbox.Cut, Reason: outbox.ReasonShutdown, Detail: "cut short before an answer came"}, neither
	}
	o := outbox.Outcome{Verdict: outbox.Retry}
	if refused, ok := errors.AsType[*refusedAddress](r.err); ok {
		o.Verdict, o.Reason, o.Detail = outbox.Dead, outbox.ReasonRefusedAddress, clip(refused.why)
		return o, neither
	}
	if token, ok := errors.AsType[*tokenFault](r.err); ok {
		return judgeToken(r, token, e, now)
	}
	if r.timedOut {
		o.Reason, o.Detail = outbox.ReasonTimeout, "no answer within "+e.Timeout.String()
		return o, failure
	}
	if what, ours := shortage(r.err); ours {
		return outbox.Outcome{Verdict: outbox.Held, Reason: outbox.ReasonShortage, Detail: what, Until: now.Add(shortageHold)}, neither
	}
	reason, detail := fault(r.err)
	o.Reason, o.Detail = reason, clip(detail)
	return o, failure
}

// judgeToken judges an attempt for which there was no access token.
func judgeToken(r result, token *tokenFault, e *outbox.Endpoint, now time.Time) (outbox.Outcome, effect) {
	o := outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonAuth, RetryAfter: parseRetryAfter(token.retryAfter, now)}
	why := token.detail
	if r.timedOut {
		why = "none within " + e.Timeout.String()
	} else if token.err != nil {
		if what, ours := shortage(token.err); ours {
			return outbox.Outcome{Verdict: outbox.Held, Reason: outbox.ReasonShortage, Detail: what, Until: now.Add(shortageHold)}, neither
		}
		_, why = fault(token.err)
	}
	o.Detail = clip("no access token: " + why)
	return o, failure
}

// shortage tells whether err is for want of something on this host, and of what: descriptors,
// ports, memory. It says nothing of the endpoint, which as a rule saw nothing of the attempt.
func shortage(err error) (what string, ours bool) {
	if err == errNoRoom {
		return err.Error(), true
	}
	dns, asked := errors.AsType[*net.DNSError](err)
	for _, lack := range []syscall.Errno{syscall.ENFILE, syscall.EMFILE, syscall.ENOMEM, syscall.ENOBUFS} {
		// A DNSError wraps nothing but its text.
		if errors.Is(err, lack) || asked && strings.Contains(dns.Err, lack.Error()) {
			return lack.Error(), true
		}
	}
	// No port is left for this address. For one of IPv6 it is rather that this host has no IPv6 at
	// all, which no waiting mends.
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" && errors.Is(err, syscall.EADDRNOTAVAIL) {
		if to, ok := op.Addr.(*net.TCPAddr); ok && to.IP.To4() != nil {
			return "no local port is free", true
		}
	}
	return "", false
}

// fault says in which of the closed set of ways a request got no answer, and how to tell a
// person. It never quotes what the receiver sent, nor the URL: url.Error, for one, holds the query.
func fault(err error) (outbox.Reason, string) {
	if wrapped, ok := errors.AsType[*url.Error](err); ok {
		err = wrapped.Err
	}
	if by, ok := errors.AsType[*proxyFault](err); ok {
		if by.err == nil {
			return outbox.ReasonConnect, by.detail
		}
		reason, detail := fault(by.err)
		return reason, "the proxy: " + detail
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		switch {
		case dns.IsNotFound:
			return outbox.ReasonDNS, "the host name does not exist"
		case dns.IsTimeout:
			return outbox.ReasonDNS, "the name server did not answer in time"
		}
		return outbox.ReasonDNS, "the host name cannot be looked up: the name server failed"
	}
	if detail, ok := tlsFault(err); ok {
		return outbox.ReasonTLS, detail
	}
	op, _ := errors.AsType[*net.OpError](err)
	dialled := op != nil && op.Op == "dial"
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
		switch {
		case strings.Contains(err.Error(), "TLS handshake"):
			return outbox.ReasonTimeout, "no TLS handshake within " + tlsTimeout.String()
		case dialled:
			return outbox.ReasonTimeout, "no connection within " + dialTimeout.String()
		}
		return outbox.ReasonTimeout, "the connection timed out"
	}
	if dialled {
		to := ""
		if op.Addr != nil {
			to = " to " + op.Addr.String()
		}
		return outbox.ReasonConnect, "connect" + to + ": " + errno(err)
	}
	if strings.Contains(err.Error(), "server response headers exceeded") ||
		strings.Contains(err.Error(), "response header list larger") {
		return outbox.ReasonProtocol, fmt.Sprintf("the answer's headers are larger than %d bytes", maxHeaderBytes)
	}
	if connectionEnded(err) || strings.Contains(err.Error(), "; received from peer") {
		return outbox.ReasonReset, "the connection broke before an answer: " + errno(err)
	}
	if _, ok := errors.AsType[textproto.ProtocolError](err); ok || strings.Contains(err.Error(), "malformed") {
		return outbox.ReasonProtocol, "what came back is not HTTP"
	}
	return outbox.ReasonProtocol, "no valid HTTP answer came back"
}

// connectionEnded tells whether err is a connection that ended under a request.
func connectionEnded(err error) bool {
	for _, known := range []error{
		io.EOF, io.ErrUnexpectedEOF, io.ErrClosedPipe, net.ErrClosed,
		syscall.ECONNRESET, syscall.EPIPE, syscall.ECONNABORTED, syscall.ENETRESET,
	} {
		if errors.Is(err, known) {
			return true
		}
	}
	// net/http and its HTTP/2 export neither types nor sentinels for these.
	text := err.Error()
	for _, known := range []string{
		"server closed idle connection", "client connection lost", "GOAWAY",
		"client connection force closed", "client conn could not be established", "client conn not usable",
	} {
		if strings.Contains(text, known) {
			return true
		}
	}
	return false
}

// tlsFault tells what is wrong with the receiver's TLS, if that is what err is about.
func tlsFault(err error) (string, bool) {
	if cert, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return cert.Err.Error(), true // names the x509 reason, and the names the certificate is good for
	}
	if _, ok := errors.AsType[x509.SystemRootsError](err); ok {
		return "this host has no system certificate authorities; give tls.ca", true
	}
	if record, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		if string(record.RecordHeader[:]) == "HTTP/" {
			return "the receiver answers in plain HTTP, not TLS", true
		}
		return "the receiver does not speak TLS", true
	}
	if alert, ok := errors.AsType[tls.AlertError](err); ok {
		return "the receiver refused the handshake: " + alert.Error(), true
	}
	if op, ok := errors.AsType[*net.OpError](err); ok && (op.Op == "remote error" || op.Op == "local error") {
		return "the handshake failed: " + op.Err.Error(), true
	}
	if text := err.Error(); strings.HasPrefix(text, "tls: ") || strings.HasPrefix(text, "x509: ") {
		return text, true
	}
	return "", false
}

// errno is the innermost plain words of err: no addresses, no names.
func errno(err error) string {
	if number, ok := errors.AsType[syscall.Errno](err); ok {
		return number.Error()
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return "the receiver closed it"
	}
	return "it was lost"
}

func clip(s string) string {
	if len(s) <= maxDetail {
		return s
	}
	return strings.ToValidUTF8(s[:maxDetail], "") + "…"
}

// parseRetryAfter reads the header Retry-After (RFC 9110, 10.2.3): seconds, or an HTTP date.
// What is neither asks for nothing; what is, for at least a second and at most a day.
func parseRetryAfter(v string, now time.Time) time.Duration {
	v = textproto.TrimString(v)
	if v == "" {
		return 0
	}
	var wait time.Duration
	if strings.Trim(v, "0123456789") == "" {
		seconds, err := strconv.ParseInt(v, 10, 64)
		if err != nil || seconds > int64(maxRetryAfter/time.Second) { // out of int64's range: long enough
			return maxRetryAfter
		}
		wait = time.Duration(seconds) * time.Second
	} else {
		at, err := http.ParseTime(v)
		if err != nil {
			return 0
		}
		wait = at.Sub(now)
	}
	return min(max(wait, minRetryAfter), maxRetryAfter)
}
