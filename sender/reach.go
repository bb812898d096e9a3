package sender

import (
	"context"
	"crypto/tls"
	"net"
	"time"

	"github.com/walhook/walhook/outbox"
)

// Reached is what a connection to an endpoint shows.
type Reached struct {
	Address     string    // that was dialled: the receiver's, or the proxy's
	Proxy       bool      // it is a proxy's
	TLS         bool      // there was a handshake
	CertExpires time.Time // the receiver's certificate; zero without TLS
}

// Reach makes one connection to the endpoint's host, by the way that attempts go: through the
// guard, with a handshake where the URL says https. It sends no request. The error is an
// *Unreached, in the words of an attempt's outcome.
func Reach(ctx context.Context, e *outbox.Endpoint) (Reached, error) {
	t, err := parse(e)
	if err != nil {
		return Reached{}, err
	}
	host, port := t.base.URL.Hostname(), t.base.URL.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[t.base.URL.Scheme]
	}
	to := net.JoinHostPort(host, port)
	if t.way.forwards() && t.base.URL.Scheme == "http" {
		to = t.way.proxy.address // which gets the requests themselves
	}
	conn, err := t.way.dial(ctx, "tcp", to)
	if err != nil {
		return Reached{}, unreached(ctx, err, e)
	}
	defer conn.Close()
	r := Reached{Address: conn.RemoteAddr().String(), Proxy: t.way.proxy != nil}
	if t.base.URL.Scheme != "https" {
		return r, nil
	}
	cfg := t.tls.Clone()
	cfg.ServerName = host
	cfg.NextProtos = []string{"h2", "http/1.1"}
	handshake, cancel := context.WithTimeout(ctx, tlsTimeout)
	defer cancel()
	secured := tls.Client(conn, cfg)
	if err := secured.HandshakeContext(handshake); err != nil {
		if handshake.Err() != nil && ctx.Err() == nil {
			return Reached{}, &Unreached{Reason: outbox.ReasonTimeout, Detail: "no TLS handshake within " + tlsTimeout.String()}
		}
		return Reached{}, unreached(ctx, err, e)
	}
	r.TLS = true
	r.CertExpires = secured.ConnectionState().PeerCertificates[0].NotAfter
	return r, nil
}

// Unreached says why there was no connection.
type Unreached struct {
	Reason outbox.Reason
	Detail string
}

func (u *Unreached) Error() string { return u.Detail }

// unreached has the one function judge what came of it.
func unreached(ctx context.Context, err error, e *outbox.Endpoint) error {
	o, _ := judge(result{err: err, cut: ctx.Err() != nil}, e, time.Now())
	return &Unreached{Reason: o.Reason, Detail: o.Detail}
}
