package sender

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/sender/sendertest"
)

const (
	typeA, typeAAAA                      = 1, 28
	codeServFail, codeNXDomain, codeFine = 2, 3, 0
)

// nameServer answers each question over UDP as it is told: with addresses, or with a code; nil
// answers nothing at all.
func nameServer(t *testing.T, answer func(kind uint16) (code byte, addrs []netip.Addr, silent bool)) *net.Resolver {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	over := make(chan struct{})
	go func() {
		defer close(over)
		q := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(q)
			if err != nil {
				return
			}
			end := 12 // of the question: its name, type and class (RFC 1035, 4.1)
			for end < n && q[end] != 0 {
				end += 1 + int(q[end])
			}
			if end += 5; end > n {
				continue
			}
			code, addrs, silent := answer(binary.BigEndian.Uint16(q[end-4:]))
			if silent {
				continue
			}
			a := append([]byte(nil), q[:end]...)
			a[2], a[3] = 0x84, 0x80|code
			binary.BigEndian.PutUint16(a[6:], uint16(len(addrs)))
			binary.BigEndian.PutUint32(a[8:], 0)
			for _, addr := range addrs {
				a = append(a, 0xc0, 12) // the name of the question
				kind := uint16(typeAAAA)
				if addr.Is4() {
					kind = typeA
				}
				a = binary.BigEndian.AppendUint16(a, kind)
				a = append(a, 0, 1, 0, 0, 0, 0)
				a = binary.BigEndian.AppendUint16(a, uint16(len(addr.AsSlice())))
				a = append(a, addr.AsSlice()...)
			}
			_, _ = conn.WriteTo(a, from)
		}
	}()
	t.Cleanup(func() { conn.Close(); <-over })
	return &net.Resolver{PreferGo: true, StrictErrors: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "udp", conn.LocalAddr().String())
	}}
}

// docs/faults.md 99.
func TestEachDNSFaultIsRetriedAndSaysWhatIsWrong(t *testing.T) {
	rx := sendertest.New(t, sendertest.Config{})
	_, port, err := net.SplitHostPort(rx.Addr())
	require.NoError(t, err)
	live, dead := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.9.9.9") // where nobody listens
	for name, c := range map[string]struct {
		answer func(kind uint16) (byte, []netip.Addr, bool)
		want   outbox.Outcome // Detail is checked where it is given
	}{
		"an address": {func(kind uint16) (byte, []netip.Addr, bool) {
			if kind == typeA {
				return codeFine, []netip.Addr{live}, false
			}
			return codeFine, nil, false
		}, outbox.Outcome{Verdict: outbox.Delivered, Status: 204}},
		"one dead address of two": {func(kind uint16) (byte, []netip.Addr, bool) {
			if kind == typeA {
				return codeFine, []netip.Addr{dead, live}, false
			}
			return codeFine, nil, false
		}, outbox.Outcome{Verdict: outbox.Delivered, Status: 204}},
		"dead addresses": {func(kind uint16) (byte, []netip.Addr, bool) {
			if kind == typeA {
				return codeFine, []netip.Addr{dead}, false
			}
			return codeFine, nil, false
		}, outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonConnect}},
		"only IPv6": {func(kind uint16) (byte, []netip.Addr, bool) {
			if kind == typeAAAA {
				return codeFine, []netip.Addr{netip.MustParseAddr("::1")}, false
			}
			return codeFine, nil, false
		}, outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonConnect}}, // the receiver has only IPv4
		"no address": {
			func(uint16) (byte, []netip.Addr, bool) { return codeFine, nil, false },
			outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonDNS, Detail: "the host name does not exist"},
		},
		"NXDOMAIN": {
			func(uint16) (byte, []netip.Addr, bool) { return codeNXDomain, nil, false },
			outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonDNS, Detail: "the host name does not exist"},
		},
		"SERVFAIL": {
			func(uint16) (byte, []netip.Addr, bool) { return codeServFail, nil, false },
			outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonDNS, Detail: "the host name cannot be looked up: the name server failed"},
		},
		"silence": {
			func(uint16) (byte, []netip.Addr, bool) { return 0, nil, true },
			outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonTimeout, Detail: "no answer within 500ms"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			dialer := &net.Dialer{Timeout: dialTimeout, Resolver: nameServer(t, c.answer)}
			tr := newTransport(way{guard: guard{}}, new(tls.Config), 1)
			tr.DialContext = dialer.DialContext
			defer tr.CloseIdleConnections()
			b := setup(t, tr)
			o := b.send(endpoint("http://hooks.example.:"+port+"/?TOPSECRET", timeout(500*time.Millisecond), func(e *outbox.Endpoint) {
				e.Breaker = outbox.BreakerPolicy{ConsecutiveFailures: 1}
			}))
			require.NotContains(t, o.Detail, "TOPSECRET")
			if c.want.Detail == "" {
				o.Detail = ""
			}
			require.Equal(t, c.want, o)
			require.Equal(t, c.want.Verdict == outbox.Delivered, len(b.moves) == 0, "what is no success counts: %v", b.moves)
		})
	}
}

// docs/faults.md 99: a name that moved is noticed when its idle connection is closed, and that is soon.
func TestAnIdleConnectionIsNotKeptForLong(t *testing.T) {
	tr := newTransport(way{guard: guard{origin: outbox.FromFile}}, new(tls.Config), 1)
	require.LessOrEqual(t, tr.IdleConnTimeout, 90*time.Second)
	require.Positive(t, tr.IdleConnTimeout)
	tr.IdleConnTimeout = time.Millisecond // what it does when that is over
	rx := sendertest.New(t, sendertest.Config{})
	room := &room{places: 1}
	tr.DialContext = room.counting(tr.DialContext, func() {})
	b := setup(t, tr)
	require.Equal(t, outbox.Delivered, b.send(endpoint(rx.URL())).Verdict)
	require.Eventually(t, func() bool { return room.connections() == 0 }, patience, time.Millisecond)
}
