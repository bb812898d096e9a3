package sender

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http/httptrace"
	"net/netip"
	"strings"
	"syscall"

	"code.dny.dev/ssrf"

	"github.com/walhook/walhook/outbox"
)

// guard judges the addresses that an endpoint's connections go to. It stands in
// net.Dialer.Control, behind name resolution, so that what is judged is what is dialled: a name
// that resolves differently the second time, and every way of writing an address, ends here.
type guard struct {
	origin outbox.Origin
	plain  bool // the URL is http, not https
	allow  []netip.Prefix
	deny   []netip.Prefix
}

// refusedAddress is the guard's refusal. It reaches judge through net.OpError.
type refusedAddress struct{ why string }

func (r *refusedAddress) Error() string { return r.why }

// public holds IANA's special-purpose registries: of IPv6 only 2000::/3 passes, without the
// ranges reserved in it, so mapped, NAT64, unique-local and link-local forms all fall out.
var public = ssrf.New(ssrf.WithAnyPort(), ssrf.WithAnyNetwork())

// nat64 is the well-known prefix behind which an IPv6-only network reaches IPv4 (RFC 6052).
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

// control is the net.Dialer.Control of the endpoint's transport.
func (g *guard) control(_, address string, _ syscall.RawConn) error {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return &refusedAddress{"the address dialled is not an IP address"}
	}
	return g.judge(to.Addr())
}

// judge returns nil where addr may be dialled. deny stands above allow, allow above the rest.
func (g *guard) judge(addr netip.Addr) error {
	if addr.Zone() != "" {
		// netip.Prefix.Contains is false for every zoned address: it would pass each deny list.
		if g.origin != outbox.FromFile {
			return &refusedAddress{fmt.Sprintf("the address %s has a zone", addr)}
		}
		addr = addr.WithZone("")
	}
	addr = addr.Unmap()
	if within(addr, g.deny) {
		return &refusedAddress{fmt.Sprintf("the address %s is in network.deny", addr)}
	}
	allowed := within(addr, g.allow)
	if nat64.Contains(addr) && (allowed || g.origin == outbox.FromFile) {
		// Who allows the prefix allows a way, not all that lies behind it.
		b := addr.As16()
		return g.judge(netip.AddrFrom4([4]byte(b[12:])))
	}
	switch {
	case allowed, g.origin == outbox.FromFile:
		return nil
	case g.plain:
		return &refusedAddress{fmt.Sprintf("plain http is for addresses in network.allow, which %s is not", addr)}
	case public.SafeAddr(addr) != nil:
		return &refusedAddress{fmt.Sprintf("the address %s is not public", addr)}
	}
	return nil
}

// judges tells whether the guard has anything to refuse.
func (g *guard) judges() bool { return g.origin != outbox.FromFile || len(g.deny) > 0 }

// dial connects to the host of address. A name of other people's endpoints is refused as soon as one of its
// addresses is: whether the good one answers first is not to decide over the bad one.
func (g *guard) dial(ctx context.Context, dialer *net.Dialer, network, address, host string) (net.Conn, error) {
	if g.origin == outbox.FromFile {
		return dialer.DialContext(ctx, network, address)
	}
	if err := g.judgeHost(host); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// The dialer goes on to connect when this returns, unless its context has ended.
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{DNSDone: func(found httptrace.DNSDoneInfo) {
		addrs := make([]netip.Addr, len(found.Addrs))
		for i, a := range found.Addrs {
			addrs[i], _ = netip.AddrFromSlice(a.IP)
			addrs[i] = addrs[i].WithZone(a.Zone)
		}
		if err := g.judgeAll(addrs); err != nil {
			cancel(err)
		}
	}})
	conn, err := dialer.DialContext(ctx, network, address)
	if refused, ok := errors.AsType[*refusedAddress](context.Cause(ctx)); ok {
		if err == nil {
			_ = conn.Close()
		}
		return nil, refused
	}
	return conn, err
}

// judgeHost refuses an address in a form that some resolvers take for one, and others for a
// name: 2130706433, 0x7f.1, 0177.0.0.1. No name ends in a number.
func (g *guard) judgeHost(host string) error {
	if _, err := netip.ParseAddr(host); err == nil || g.origin == outbox.FromFile {
		return nil
	}
	host = strings.TrimSuffix(host, ".")
	last := strings.ToLower(host[strings.LastIndexByte(host, '.')+1:])
	digits := "0123456789"
	if hex, ok := strings.CutPrefix(last, "0x"); ok {
		last, digits = "0"+hex, "0123456789abcdef"
	}
	if last != "" && strings.Trim(last, digits) == "" {
		return &refusedAddress{"the host is a number; an address has the form 192.0.2.1"}
	}
	return nil
}

// judgeAll judges what a name resolves to. What an IPv6-only network makes of an IPv4 address
// is judged as that one here: it comes by itself, beside the address that it stands for.
func (g *guard) judgeAll(addrs []netip.Addr) error {
	for _, addr := range addrs {
		if nat64.Contains(addr) {
			b := addr.As16()
			addr = netip.AddrFrom4([4]byte(b[12:]))
		}
		if err := g.judge(addr); err != nil {
			return err
		}
	}
	return nil
}

// plainPrefixes are prefixes in the form that addresses are judged in: ::ffff:10.0.0.0/104 is 10.0.0.0/8.
func plainPrefixes(given []netip.Prefix) []netip.Prefix {
	out := make([]netip.Prefix, len(given))
	for i, p := range given {
		if out[i] = p; p.Addr().Is4In6() && p.Bits() >= 96 {
			out[i] = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		}
	}
	return out
}

func within(addr netip.Addr, prefixes []netip.Prefix) bool {
	for _, p := range prefixes {
		if p.Contains(addr) {
			return true
		}
	}
	return false
}
