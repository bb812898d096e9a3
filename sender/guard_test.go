package sender

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
)

func prefixes(s ...string) (p []netip.Prefix) {
	for _, x := range s {
		p = append(p, netip.MustParsePrefix(x))
	}
	return p
}

func TestOtherPeoplesEndpointsReachPublicAddressesOnly(t *testing.T) {
	g := guard{origin: outbox.FromTable}
	for _, addr := range []string{
		"1.1.1.1", "8.8.8.8", "172.15.0.1", "172.32.0.1", "100.63.255.255", "2606:4700:4700::1111", "2a00:1450::1",
		"::ffff:1.1.1.1", // the same address, written another way
	} {
		require.NoError(t, g.judge(netip.MustParseAddr(addr)), addr)
	}
	for _, addr := range []string{
		"0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.8.8.8", "169.254.169.254", "172.16.0.1", "172.31.255.255",
		"192.0.0.1", "192.0.2.1", "192.31.196.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1",
		"224.0.0.1", "240.0.0.1", "255.255.255.255",
		"::", "::1", "::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:169.254.169.254", "::127.0.0.1",
		"64:ff9b::1.1.1.1", "64:ff9b::7f00:1", "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "3fff::1",
		"2620:4f:8000::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%lo", "2606:4700::1%eth0", "fec0::1", "ff02::1",
	} {
		require.Error(t, g.judge(netip.MustParseAddr(addr)), addr)
	}
}

func TestTheOperatorsEndpointsReachAnyAddress(t *testing.T) {
	g := guard{origin: outbox.FromFile, plain: true}
	for _, addr := range []string{"127.0.0.1", "10.0.0.1", "::1", "fe80::1%lo", "1.1.1.1", "169.254.169.254"} {
		require.NoError(t, g.judge(netip.MustParseAddr(addr)), addr)
	}
}

func TestNetworkWidensAndNarrowsEitherKind(t *testing.T) {
	for _, origin := range []outbox.Origin{outbox.FromFile, outbox.FromTable} {
		g := guard{origin: origin, allow: prefixes("10.0.0.0/8", "64:ff9b::/96"), deny: prefixes("10.9.0.0/16", "1.1.1.0/24", "fe80::/10")}
		for addr, ok := range map[string]bool{
			"10.1.0.1": true, "::ffff:10.1.0.1": true, "8.8.8.8": true, "64:ff9b::8.8.8.8": true,
			"10.9.0.1": false, "::ffff:10.9.0.1": false, "1.1.1.1": false, "64:ff9b::1.1.1.1": false, "fe80::1%lo": false,
			"64:ff9b::127.0.0.1": origin == outbox.FromFile, "192.168.0.1": origin == outbox.FromFile,
		} {
			require.Equal(t, ok, g.judge(netip.MustParseAddr(addr)) == nil, "%s %s", origin, addr)
		}
	}
}

func TestPlainHTTPOfOtherPeopleReachesAllowedAddressesOnly(t *testing.T) {
	g := guard{origin: outbox.FromTable, plain: true, allow: prefixes("10.0.0.0/8")}
	require.NoError(t, g.judge(netip.MustParseAddr("10.0.0.1")))
	require.Error(t, g.judge(netip.MustParseAddr("1.1.1.1")))
}

func TestWhatIsDialledMustBeAnAddress(t *testing.T) {
	g := guard{origin: outbox.FromTable}
	require.Error(t, g.control("unix", "/var/run/docker.sock", nil))
	require.Error(t, g.control("tcp", "localhost:443", nil))
	require.NoError(t, g.control("tcp6", "[2606:4700:4700::1111]:443", nil))
}
