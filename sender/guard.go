package sender

import (
	"fmt"
	"net/netip"
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

func within(addr netip.Addr, prefixes []netip.Prefix) bool {
	for _, p := range prefixes {
		if p.Contains(addr) {
			return true
		}
	}
	return false
}
