package sender

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/sender/sendertest"
)

// middleman is a proxy that remembers what it was asked for, and connects to one receiver whatever that was.
type middleman struct {
	url string
	ca  string

	mu    sync.Mutex // guards what follows
	asked []string   // method and address, or URL
	by    []string   // Proxy-Authorization
}

// newMiddleman starts a proxy whose connections go to a receiver. refuse, where it is not empty,
// is what it answers instead.
func newMiddleman(t *testing.T, secure bool, to, refuse string) *middleman {
	t.Helper()
	m := &middleman{}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	m.url = "http://" + l.Addr().String()
	if secure {
		cert, ca, err := sendertest.Certificate("127.0.0.1", time.Time{})
		require.NoError(t, err)
		l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{*cert}})
		m.ca, m.url = ca, "https://"+l.Addr().String()
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer conn.Close()
				m.serve(conn, to, refuse)
			})
		}
	})
	t.Cleanup(func() { l.Close(); all.Wait() })
	return m
}

func (m *middleman) serve(conn net.Conn, to, refuse string) {
	in := bufio.NewReader(conn)
	req, err := http.ReadRequest(in)
	if err != nil {
		return
	}
	m.mu.Lock()
	m.asked = append(m.asked, req.Method+" "+req.RequestURI)
	m.by = append(m.by, req.Header.Get("Proxy-Authorization"))
	m.mu.Unlock()
	if refuse != "" {
		_, _ = io.WriteString(conn, refuse)
		_, _ = in.ReadByte() // until the other side goes
		return
	}
	if req.Method != http.MethodConnect {
		_, _ = io.Copy(io.Discard, req.Body)
		_, _ = io.WriteString(conn, "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
		return
	}
	out, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	defer out.Close()
	_, _ = io.WriteString(conn, "HTTP/1.1 200 Connection established\r\n\r\n")
	var back sync.WaitGroup
	back.Go(func() { _, _ = io.Copy(conn, out); conn.Close() })
	_, _ = io.Copy(out, in)
	out.Close()
	back.Wait()
}

func (m *middleman) seen() (asked, by []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.asked, m.by
}

func through(m *middleman) func(*outbox.Endpoint) {
	return func(e *outbox.Endpoint) {
		e.Proxy = outbox.Secret(strings.Replace(m.url, "://", "://me:TOP%20SECRET@", 1))
	}
}

func theirs(e *outbox.Endpoint) { e.Origin = outbox.FromTable }

// named answers every name with these addresses.
func named(t *testing.T, addrs ...string) *net.Resolver {
	t.Helper()
	return nameServer(t, func(kind uint16) (byte, []netip.Addr, bool) { return codeFine, ofKind(kind, addrs...), false })
}

// ofKind are those of the addresses that a question for A or AAAA is about.
func ofKind(kind uint16, addrs ...string) (some []netip.Addr) {
	for _, s := range addrs {
		if addr := netip.MustParseAddr(s); addr.Is4() == (kind == typeA) {
			some = append(some, addr)
		}
	}
	return some
}

func TestAProxyIsAskedForAJudgedAddressAndForAName(t *testing.T) {
	cert, ca, err := sendertest.Certificate("hooks.example", time.Time{})
	require.NoError(t, err)
	rx := sendertest.New(t, sendertest.Config{TLS: cert, HTTP2: true})
	trusting := func(e *outbox.Endpoint) { e.TLS.CA = ca }
	allow := func(p ...string) func(*outbox.Endpoint) {
		return func(e *outbox.Endpoint) { e.Network.Allow = prefixes(p...) }
	}
	deny := func(p ...string) func(*outbox.Endpoint) {
		return func(e *outbox.Endpoint) { e.Network.Deny = prefixes(p...) }
	}
	for name, c := range map[string]struct {
		url      string
		endpoint []func(*outbox.Endpoint)
		addrs    []string
		asked    string // empty: nothing, it is refused
	}{
		"the operator's":                     {"https://hooks.example:8443/", nil, nil, "CONNECT hooks.example:8443"},
		"the operator's, by plain http":      {"http://hooks.example:8080/x", nil, nil, "POST http://hooks.example:8080/x"},
		"the operator's, judged":             {"https://hooks.example/", []func(*outbox.Endpoint){deny("10.0.0.0/8")}, []string{"1.1.1.1"}, "CONNECT 1.1.1.1:443"},
		"the operator's, denied":             {"https://hooks.example/", []func(*outbox.Endpoint){deny("10.0.0.0/8")}, []string{"10.1.1.1"}, ""},
		"the operator's, one denied":         {"https://hooks.example/", []func(*outbox.Endpoint){deny("10.0.0.0/8")}, []string{"10.1.1.1", "172.16.0.1"}, "CONNECT 172.16.0.1:443"},
		"the operator's, denied, plain":      {"http://hooks.example/", []func(*outbox.Endpoint){deny("10.0.0.0/8")}, []string{"10.1.1.1"}, ""},
		"other people's":                     {"https://hooks.example/", []func(*outbox.Endpoint){theirs}, []string{"1.1.1.1"}, "CONNECT 1.1.1.1:443"},
		"other people's, IPv6":               {"https://hooks.example/", []func(*outbox.Endpoint){theirs}, []string{"2606:4700:4700::1111"}, "CONNECT [2606:4700:4700::1111]:443"},
		"other people's, private":            {"https://hooks.example/", []func(*outbox.Endpoint){theirs}, []string{"10.0.0.1"}, ""},
		"other people's, mixed":              {"https://hooks.example/", []func(*outbox.Endpoint){theirs}, []string{"1.1.1.1", "fd00::1"}, ""},
		"other people's, an address":         {"https://169.254.169.254/", []func(*outbox.Endpoint){theirs}, nil, ""},
		"other people's, mapped":             {"https://[::ffff:10.0.0.1]/", []func(*outbox.Endpoint){theirs}, nil, ""},
		"other people's, a number":           {"https://2130706433/", []func(*outbox.Endpoint){theirs}, []string{"1.1.1.1"}, ""},
		"other people's, the proxy's own":    {"https://PROXY/", []func(*outbox.Endpoint){theirs}, nil, ""},
		"other people's, allowed":            {"https://hooks.example/", []func(*outbox.Endpoint){theirs, allow("10.0.0.0/8")}, []string{"10.0.0.1"}, "CONNECT 10.0.0.1:443"},
		"other people's, plain, not allowed": {"http://hooks.example/", []func(*outbox.Endpoint){theirs, allow("10.0.0.0/8")}, []string{"1.1.1.1"}, ""},
		"other people's, beside NAT64":       {"https://hooks.example/", []func(*outbox.Endpoint){theirs}, []string{"1.1.1.1", "64:ff9b::1.1.1.1"}, "CONNECT 1.1.1.1:443"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMiddleman(t, false, rx.Addr(), "")
			b := setup(t, nil)
			b.resolver = named(t, c.addrs...)
			url := strings.Replace(c.url, "PROXY", strings.TrimPrefix(m.url, "http://"), 1)
			e := endpoint(url, append(c.endpoint, trusting, through(m))...)
			for range 2 {
				o := b.send(e)
				// The certificate is for the name, whatever the proxy was asked for.
				if c.asked == "" {
					require.Equal(t, outbox.Dead, o.Verdict, o.Detail)
					require.Equal(t, outbox.ReasonRefusedAddress, o.Reason)
				} else {
					require.Equal(t, outbox.Delivered, o.Verdict, o.Detail)
				}
			}
			b.leave()
			asked, by := m.seen()
			if c.asked == "" {
				require.Empty(t, asked)
				return
			}
			require.Equal(t, c.asked, asked[0])
			require.Equal(t, "Basic bWU6VE9QIFNFQ1JFVA==", by[0])
		})
	}
	for _, r := range rx.Requests() {
		require.Empty(t, r.Header.Get("Proxy-Authorization"))
	}
}

func TestAProxyIsSpokenToByTLSToo(t *testing.T) {
	cert, ca, err := sendertest.Certificate("hooks.example", time.Time{})
	require.NoError(t, err)
	rx := sendertest.New(t, sendertest.Config{TLS: cert})
	m := newMiddleman(t, true, rx.Addr(), "")
	e := endpoint("https://hooks.example/", through(m), func(e *outbox.Endpoint) { e.TLS.CA = ca })

	o := setup(t, nil).send(e)
	require.Equal(t, outbox.ReasonTLS, o.Reason)
	require.Equal(t, "the proxy: x509: certificate signed by unknown authority", o.Detail)

	made, err := parse(e)
	require.NoError(t, err)
	made.way.proxy.roots = x509.NewCertPool()
	require.True(t, made.way.proxy.roots.AppendCertsFromPEM([]byte(m.ca)))
	tr := newTransport(made.way, made.tls, 1)
	defer tr.CloseIdleConnections()
	b := setup(t, tr)
	o = b.send(e)
	require.Equal(t, outbox.Delivered, o.Verdict, o.Detail)
	o = b.send(endpoint("http://hooks.example/", through(m), func(e *outbox.Endpoint) { e.ID = "plain" }))
	require.Equal(t, outbox.Delivered, o.Verdict, o.Detail)
	asked, _ := m.seen()
	require.Equal(t, []string{"CONNECT hooks.example:443", "POST http://hooks.example/"}, asked)
}

func TestAProxyThatFailsIsNamedAndItsPasswordIsNot(t *testing.T) {
	status := func(s string) string { return "HTTP/1.1 " + s + "\r\nContent-Length: 9\r\n\r\nTOPSECRET" }
	for name, c := range map[string]struct {
		answer string
		reason outbox.Reason
		detail string
	}{
		"407":          {status("407 TOPSECRET"), outbox.ReasonConnect, "the proxy refused: it answered 407 Proxy Authentication Required"},
		"403":          {status("403 x"), outbox.ReasonConnect, "the proxy refused: it answered 403 Forbidden"},
		"502":          {status("502 x"), outbox.ReasonConnect, "the proxy refused: it answered 502 Bad Gateway"},
		"not HTTP":     {"SSH-2.0-TOPSECRET\r\n\r\n", outbox.ReasonConnect, "what the proxy answered is not HTTP"},
		"more":         {"HTTP/1.1 200 OK\r\n\r\nTOPSECRET", outbox.ReasonConnect, "the proxy sent more than its answer"},
		"endless":      {"HTTP/1.1 200 OK\r\n" + strings.Repeat("X: y\r\n", 20000), outbox.ReasonReset, "the proxy: the connection broke before an answer: the receiver closed it"},
		"half a line":  {"HTTP/1.1 200", outbox.ReasonTimeout, "no answer within 300ms"},
		"of a promise": {status("100 Continue"), outbox.ReasonConnect, "the proxy refused: it answered 100 Continue"},
	} {
		for _, origin := range []outbox.Origin{outbox.FromFile, outbox.FromTable} {
			t.Run(name+", "+string(origin), func(t *testing.T) {
				m := newMiddleman(t, false, "", c.answer)
				b := setup(t, nil)
				b.resolver = named(t, "1.1.1.1", "1.0.0.1")
				o := b.send(endpoint("https://hooks.example/", through(m), func(e *outbox.Endpoint) {
					e.Origin, e.Breaker.ConsecutiveFailures, e.Timeout = origin, 1, patience
					if c.reason == outbox.ReasonTimeout {
						e.Timeout = 300 * time.Millisecond
					}
				}))
				require.Equal(t, outbox.Outcome{Verdict: outbox.Retry, Reason: c.reason, Detail: c.detail}, o)
				require.Len(t, b.moves, 1, "it counts")
			})
		}
	}
	t.Run("not there", func(t *testing.T) {
		o := setup(t, nil).send(endpoint("https://hooks.example/", func(e *outbox.Endpoint) { e.Proxy = "http://me:TOPSECRET@127.0.0.1:1" }))
		require.Equal(t, outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonConnect, Detail: "the proxy: connect to 127.0.0.1:1: connection refused"}, o)
	})
	t.Run("no such name", func(t *testing.T) {
		b := setup(t, nil)
		b.resolver = nameServer(t, func(uint16) (byte, []netip.Addr, bool) { return codeNXDomain, nil, false })
		o := b.send(endpoint("https://hooks.example/", func(e *outbox.Endpoint) { e.Proxy = "http://me:TOPSECRET@proxy.example:1" }))
		require.Equal(t, outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonDNS, Detail: "the proxy: the host name does not exist"}, o)
		o = b.send(endpoint("https://hooks.example/", theirs, func(e *outbox.Endpoint) { e.Proxy = "http://127.0.0.1:1" }))
		require.Equal(t, outbox.Outcome{Verdict: outbox.Retry, Reason: outbox.ReasonDNS, Detail: "the host name does not exist"}, o)
	})
}

// Whose connections go through a proxy, and whose do not, is no accident of who came first.
func TestConnectionsThroughAProxyAreNotLent(t *testing.T) {
	rx := sendertest.New(t, sendertest.Config{})
	m := newMiddleman(t, false, rx.Addr(), "")
	b := setup(t, nil)
	for range 2 {
		require.Equal(t, outbox.Delivered, b.send(endpoint(rx.URL())).Verdict)
		require.Equal(t, outbox.Delivered, b.send(endpoint(rx.URL(), through(m), func(e *outbox.Endpoint) { e.ID = "through" })).Verdict)
	}
	asked, _ := m.seen()
	require.Len(t, asked, 2)
	require.Equal(t, 2, rx.Count())
}

func TestReachGoesThroughTheProxyToo(t *testing.T) {
	cert, ca, err := sendertest.Certificate("hooks.example", time.Time{})
	require.NoError(t, err)
	rx := sendertest.New(t, sendertest.Config{TLS: cert})
	m := newMiddleman(t, false, rx.Addr(), "")
	got, err := Reach(t.Context(), endpoint("https://hooks.example/", through(m), func(e *outbox.Endpoint) { e.TLS.CA = ca }))
	require.NoError(t, err)
	require.True(t, got.Proxy)
	require.True(t, got.TLS)
	got, err = Reach(t.Context(), endpoint("http://hooks.example/", through(m)))
	require.NoError(t, err)
	require.Equal(t, Reached{Address: strings.TrimPrefix(m.url, "http://"), Proxy: true}, got)
	_, err = Reach(t.Context(), endpoint("https://127.0.0.1/", theirs, through(m)))
	require.EqualError(t, err, "the address 127.0.0.1 is not public")
	asked, _ := m.seen()
	require.Equal(t, []string{"CONNECT hooks.example:443"}, asked)
}
