package sender

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/walhook/walhook/outbox"
)

const (
	// proxyTimeout bounds what a proxy may take to open a tunnel, its own connection included.
	proxyTimeout = 10 * time.Second
	// maxTunnels is how many of a name's addresses a proxy is asked for, one after the other.
	maxTunnels = 4
)

// proxy is a host of the operator's that an endpoint's connections go through. Its own address
// is not judged by the guard; what it is asked to connect to is: see way.
type proxy struct {
	host    string
	address string // with its port
	secure  bool   // it is spoken to by TLS
	user    *url.Userinfo
	roots   *x509.CertPool // nil: the system's
}

// Format keeps the password out of whatever prints by reflection.
func (p *proxy) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[proxy]") }

// proxyFault is what went wrong on the way to a proxy, or what it answered.
type proxyFault struct {
	detail string // where it answered
	err    error  // where it did not
}

func (f *proxyFault) Error() string { return "the proxy" }
func (f *proxyFault) Unwrap() error { return f.err }

// parseProxy reads a proxy's URL. Its errors show nothing of it: it may hold a password.
func parseProxy(given outbox.Secret) (*proxy, error) {
	if given == "" || given == outbox.NoProxy {
		return nil, nil
	}
	u, err := url.Parse(given.Reveal())
	if err != nil {
		return nil, errors.New("is not a valid URL")
	}
	port := map[string]string{"http": "80", "https": "443"}[u.Scheme]
	switch {
	case port == "":
		return nil, errors.New("must begin with http:// or https://, or be none")
	case u.Hostname() == "":
		return nil, errors.New("has no host")
	case u.Path != "" && u.Path != "/", u.RawQuery != "", u.Fragment != "":
		return nil, errors.New("has a path; a proxy is a host and a port")
	}
	if own := u.Port(); own != "" {
		if n, err := strconv.Atoi(own); err != nil || n < 1 || n > 65535 {
			return nil, errors.New("its port is not one of 1 to 65535")
		}
		port = own
	}
	return &proxy{host: u.Hostname(), address: net.JoinHostPort(u.Hostname(), port), secure: u.Scheme == "https", user: u.User}, nil
}

// connect opens a connection to the proxy itself.
func (p *proxy) connect(ctx context.Context, dialer *net.Dialer) (net.Conn, error) {
	conn, err := dialer.DialContext(ctx, "tcp", p.address)
	if err != nil {
		return nil, &proxyFault{err: err}
	}
	if !p.secure {
		return conn, nil
	}
	// The endpoint's CA and its certificate for clients are not the proxy's business.
	secured := tls.Client(conn, &tls.Config{ServerName: p.host, MinVersion: tls.VersionTLS12, RootCAs: p.roots})
	ctx, cancel := context.WithTimeout(ctx, tlsTimeout)
	defer cancel()
	if err := secured.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		return nil, &proxyFault{err: err}
	}
	return secured, nil
}

// tunnel has the proxy connect to an address (RFC 9110, 9.3.6).
func (p *proxy) tunnel(ctx context.Context, dialer *net.Dialer, to string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, proxyTimeout)
	defer cancel()
	conn, err := p.connect(ctx, dialer)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	err = p.shake(conn, to)
	if !stop() && err == nil {
		err = &proxyFault{err: ctx.Err()}
	}
	if err != nil {
		_ = conn.Close()
		if ctx.Err() == context.DeadlineExceeded {
			return nil, &proxyFault{detail: "the proxy opened no connection within " + proxyTimeout.String()}
		}
		return nil, err
	}
	return conn, nil
}

// shake is the CONNECT and its answer.
func (p *proxy) shake(conn net.Conn, to string) error {
	var ask strings.Builder
	fmt.Fprintf(&ask, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n", to, to)
	if p.user != nil {
		password, _ := p.user.Password()
		ask.WriteString("Proxy-Authorization: " + basic(p.user.Username(), password) + "\r\n")
	}
	ask.WriteString("\r\n")
	if _, err := io.WriteString(conn, ask.String()); err != nil {
		return &proxyFault{err: err}
	}
	answer := bufio.NewReader(io.LimitReader(conn, maxHeaderBytes))
	res, err := http.ReadResponse(answer, &http.Request{Method: http.MethodConnect})
	if err != nil {
		if connectionEnded(err) || errors.Is(err, net.ErrClosed) {
			return &proxyFault{err: err}
		}
		return &proxyFault{detail: "what the proxy answered is not HTTP"}
	}
	_ = res.Body.Close()
	switch {
	case res.StatusCode/100 != 2:
		detail := "the proxy refused: it answered " + strconv.Itoa(res.StatusCode)
		if text := http.StatusText(res.StatusCode); text != "" {
			detail += " " + text
		}
		return &proxyFault{detail: detail}
	case answer.Buffered() > 0: // clients speak first, so this is not the receiver's
		return &proxyFault{detail: "the proxy sent more than its answer"}
	}
	return nil
}

// way is how an endpoint's connections are made: by whose judgement, and through what.
type way struct {
	guard    guard
	proxy    *proxy        // nil: none
	resolver *net.Resolver // nil: the host's own
}

// dial is the DialContext of the endpoint's transport.
func (w way) dial(ctx context.Context, network, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	if w.proxy == nil {
		return w.guard.dial(ctx, &net.Dialer{Timeout: dialTimeout, Control: w.guard.control, Resolver: w.resolver}, network, address, host)
	}
	dialer := &net.Dialer{Timeout: dialTimeout, Resolver: w.resolver}
	if w.forwards() && address == w.proxy.address {
		return w.proxy.connect(ctx, dialer)
	}
	if !w.guard.judges() {
		return w.proxy.tunnel(ctx, dialer, address)
	}
	// The proxy is told an address that was judged, never a name: it might resolve to another one there.
	addrs, err := w.lookUp(ctx, host)
	if err != nil {
		return nil, err
	}
	for _, addr := range addrs[:min(len(addrs), maxTunnels)] {
		var conn net.Conn
		if conn, err = w.proxy.tunnel(ctx, dialer, net.JoinHostPort(addr.String(), port)); err == nil {
			return conn, nil
		}
		if fault, ok := errors.AsType[*proxyFault](err); !ok || fault.detail == "" || ctx.Err() != nil {
			break
		}
	}
	return nil, err
}

// forwards tells whether requests by plain http are given to the proxy whole, as proxies expect
// it, and not through a tunnel. It has to do without a judgement of their addresses.
func (w way) forwards() bool { return w.proxy != nil && !w.guard.judges() }

// forward is the Proxy of the endpoint's transport.
func (w way) forward(r *http.Request) (*url.URL, error) {
	if r.URL.Scheme != "http" {
		return nil, nil // dial makes a tunnel
	}
	// http even where it is spoken to by TLS: that is connect's part.
	return &url.URL{Scheme: "http", Host: w.proxy.address, User: w.proxy.user}, nil
}

// lookUp resolves a host for a proxy, to those of its addresses that stand before the guard; of
// other people's hosts all have to, as in guard.dial.
func (w way) lookUp(ctx context.Context, host string) ([]netip.Addr, error) {
	if addr, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{addr.Unmap()}, w.guard.judge(addr)
	}
	if err := w.guard.judgeHost(host); err != nil {
		return nil, err
	}
	resolver := w.resolver
	if resolver == nil {
		resolver = net.DefaultResolver
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	addrs, err := resolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	if w.guard.origin != outbox.FromFile {
		if err := w.guard.judgeAll(addrs); err != nil {
			return nil, err
		}
	}
	var good []netip.Addr
	for _, addr := range addrs {
		if err = w.guard.judge(addr); err == nil {
			good = append(good, addr.Unmap())
		}
	}
	if len(good) == 0 {
		return nil, err
	}
	return good, nil
}
