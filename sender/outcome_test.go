package sender

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func TestEveryStatusHasItsMeaning(t *testing.T) {
	plain := endpoint("https://x.example/")
	picky := endpoint("https://x.example/", func(e *outbox.Endpoint) { e.Retry.DeadOn = []int{400, 422, 503} })
	eventsFault := func(s int) bool { // 4xx that say nothing bad of the endpoint
		return s/100 == 4 && !slices.Contains([]int{401, 403, 404, 405, 407, 408, 425}, s)
	}
	for status := 100; status <= 599; status++ {
		for _, retryAfter := range []string{"", "30"} {
			r := result{status: status, retryAfter: retryAfter}
			o, counts := judge(r, plain, noon)
			name := fmt.Sprint(status, " ", retryAfter)

			if status/100 == 2 {
				require.Equal(t, outbox.Outcome{Verdict: outbox.Delivered, Status: status}, o, name)
				require.Equal(t, success, counts, name)
				continue
			}
			require.Equal(t, outbox.Retry, o.Verdict, name)
			require.Equal(t, outbox.ReasonStatus, o.Reason, name)
			require.Equal(t, status, o.Status, name)
			require.Contains(t, o.Detail, fmt.Sprint(status), name)
			require.Equal(t, status == 410, o.Gone, name)
			require.Equal(t, slices.Contains([]int{429, 502, 503, 504}, status), o.Slow, name)
			require.Equal(t, retryAfter != "", o.RetryAfter == 30*time.Second, name)

			want := failure
			if eventsFault(status) || status == 503 && retryAfter != "" {
				want = neither
			}
			require.Equal(t, want, counts, name)

			dead, same := judge(r, picky, noon)
			require.Equal(t, slices.Contains(picky.Retry.DeadOn, status), dead.Verdict == outbox.Dead, name)
			require.Equal(t, counts, same, name)
		}
	}
	o, counts := judge(result{status: 302}, plain, noon)
	require.Equal(t, "302 Found: redirects are not followed; give the endpoint its final URL", o.Detail)
	require.Equal(t, failure, counts)
	for _, status := range []int{0, 42, 600, 999} {
		o, counts := judge(result{status: status}, plain, noon)
		require.Equal(t, outbox.Retry, o.Verdict)
		require.Equal(t, outbox.ReasonProtocol, o.Reason)
		require.Equal(t, failure, counts)
	}
}

func TestEveryErrorHasItsReasonAndTellsNoSecret(t *testing.T) {
	const hidden = "https://x.example/hook?token=TOPSECRET"
	dial := func(err error) error {
		return &net.OpError{Op: "dial", Net: "tcp", Addr: &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 443}, Err: os.NewSyscallError("connect", err)}
	}
	for name, c := range map[string]struct {
		r       result
		verdict outbox.Verdict
		reason  outbox.Reason
		detail  string
		counts  effect
	}{
		"cut by us":    {result{err: context.Canceled, cut: true}, outbox.Cut, outbox.ReasonShutdown, "cut short before an answer came", neither},
		"out of time":  {result{err: context.Canceled, timedOut: true}, outbox.Retry, outbox.ReasonTimeout, "no answer within 15s", failure},
		"guard":        {result{err: dial(&refusedAddress{"the address 10.0.0.1 is not public"})}, outbox.Dead, outbox.ReasonRefusedAddress, "the address 10.0.0.1 is not public", neither},
		"refused":      {result{err: dial(syscall.ECONNREFUSED)}, outbox.Retry, outbox.ReasonConnect, "connect to 10.0.0.1:443: connection refused", failure},
		"unreachable":  {result{err: dial(syscall.EHOSTUNREACH)}, outbox.Retry, outbox.ReasonConnect, "connect to 10.0.0.1:443: no route to host", failure},
		"descriptors":  {result{err: dial(syscall.EMFILE)}, outbox.Held, outbox.ReasonShortage, "too many open files", neither},
		"ports":        {result{err: dial(syscall.EADDRNOTAVAIL)}, outbox.Held, outbox.ReasonShortage, "no local port is free", neither},
		"dial timeout": {result{err: dial(os.ErrDeadlineExceeded)}, outbox.Retry, outbox.ReasonTimeout, "no connection within 5s", failure},
		"nxdomain":     {result{err: &net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", Name: "x", IsNotFound: true}}}, outbox.Retry, outbox.ReasonDNS, "the host name does not exist", failure},
		"servfail":     {result{err: &net.DNSError{Err: "server misbehaving", IsTemporary: true}}, outbox.Retry, outbox.ReasonDNS, "the host name cannot be looked up: the name server failed", failure},
		"slow dns":     {result{err: &net.DNSError{Err: "i/o timeout", IsTimeout: true}}, outbox.Retry, outbox.ReasonDNS, "the name server did not answer in time", failure},
		"reset":        {result{err: &net.OpError{Op: "read", Err: os.NewSyscallError("read", syscall.ECONNRESET)}}, outbox.Retry, outbox.ReasonReset, "the connection broke before an answer: connection reset by peer", failure},
		"http2 lost":   {result{err: errors.New("http2: client connection lost")}, outbox.Retry, outbox.ReasonReset, "the connection broke before an answer: it was lost", failure},
		"http2 stream": {result{err: errors.New("stream error: stream ID 1; INTERNAL_ERROR; received from peer")}, outbox.Retry, outbox.ReasonReset, "the connection broke before an answer: it was lost", failure},
		"malformed":    {result{err: errors.New(`malformed HTTP response "TOPSECRET"`)}, outbox.Retry, outbox.ReasonProtocol, "what came back is not HTTP", failure},
		"unknown":      {result{err: errors.New("TOPSECRET")}, outbox.Retry, outbox.ReasonProtocol, "no valid HTTP answer came back", failure},
	} {
		for _, r := range []result{c.r, {err: &url.Error{Op: "Post", URL: hidden, Err: c.r.err}, cut: c.r.cut, timedOut: c.r.timedOut}} {
			o, counts := judge(r, endpoint(hidden), noon)
			want := outbox.Outcome{Verdict: c.verdict, Reason: c.reason, Detail: c.detail}
			if c.verdict == outbox.Held {
				want.Until = noon.Add(shortageHold)
			}
			require.Equal(t, want, o, name)
			require.Equal(t, c.counts, counts, name)
			require.NotContains(t, o.Detail, "SECRET", name)
		}
	}
}

func TestRetryAfterIsObeyedWithinReason(t *testing.T) {
	for header, want := range map[string]time.Duration{
		"":      0,
		"120":   2 * time.Minute,
		" 5 ":   5 * time.Second,
		"0":     time.Second,
		"000":   time.Second,
		"86400": 24 * time.Hour, "86401": 24 * time.Hour,
		"99999999999999999999999": 24 * time.Hour,
		"-5":                      0, "1.5": 0, "soon": 0, "5s": 0, "٣": 0,
		noon.Add(90 * time.Second).Format(http.TimeFormat):     90 * time.Second,
		noon.Add(-time.Hour).Format(http.TimeFormat):           time.Second,
		noon.Add(365 * 24 * time.Hour).Format(http.TimeFormat): 24 * time.Hour,
		noon.Add(time.Minute).Format(time.RFC850):              time.Minute,
		noon.Add(time.Minute).Format(time.ANSIC):               time.Minute,
		"Fri, 31 Feb 2026 99:99:99 GMT":                        0,
	} {
		require.Equal(t, want, parseRetryAfter(header, noon), header)
	}
}

func FuzzRetryAfter(f *testing.F) {
	for _, s := range []string{"", "1", "-1", "1e9", "18446744073709551616", "Sun, 06 Nov 1994 08:49:37 GMT", "Mon, 01 Jan 0001 00:00:00 GMT", "Fri, 31 Dec 9999 23:59:59 GMT"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, header string) {
		d := parseRetryAfter(header, noon)
		require.True(t, d == 0 || d >= minRetryAfter && d <= maxRetryAfter, "%q: %s", header, d)
	})
}
