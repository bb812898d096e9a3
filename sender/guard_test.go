package sender

import (
	"errors"
	"fmt"
	"net"
	"net/http/httptrace"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/sender/sendertest"
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

// lookout sees every connection that is begun, whether or not somebody is there to take it: the
// guard's refusal comes before a packet leaves, and any other end of a connection after.
type lookout struct {
	mu   sync.Mutex // guards left
	left []string   // connections that were not refused
}

func (l *lookout) sendTo(b *bundle, e *outbox.Endpoint) outbox.Outcome {
	ctx := httptrace.WithClientTrace(b.t.Context(), &httptrace.ClientTrace{ConnectDone: func(_, addr string, err error) {
		var refused *refusedAddress
		if err == nil || !errors.As(err, &refused) {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.left = append(l.left, addr)
		}
	}})
	return b.Send(ctx, outbox.Attempt{Event: event(), Endpoint: e, Number: 1})
}

// Whatever strangers register, nothing inside is reached, and each delivery ends with that reason.
func TestNoRequestOfOtherPeopleLeavesForAnAddressInside(t *testing.T) {
	// Somebody is there, on every address of this host, to notice what comes.
	listener, err := net.Listen("tcp", ":0")
	require.NoError(t, err)
	var came atomic.Int32
	over := make(chan struct{})
	go func() {
		defer close(over)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			came.Add(1)
			conn.Close()
		}
	}()
	t.Cleanup(func() { listener.Close(); <-over })
	port := fmt.Sprint(listener.Addr().(*net.TCPAddr).Port)

	inside := []string{
		"127.0.0.1", "127.8.8.8", "169.254.169.254", "10.0.0.1", "10.255.255.255", "172.16.0.1", "192.168.1.1", "100.64.0.1", "0.0.0.0",
		"::1", "::", "::ffff:10.0.0.1", "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "fd00:ec2::254", "fe80::1",
	}
	type attempt struct {
		host  string
		addrs []string // that its name has
	}
	attempts := map[string]attempt{
		"localhost":                {"localhost", nil}, // by the hosts file
		"a number":                 {"2130706433", []string{"127.0.0.1"}},
		"a number, octal":          {"017700000001", []string{"127.0.0.1"}},
		"hex and a rest":           {"0x7f.1", []string{"127.0.0.1"}},
		"hex":                      {"0x7F000001", []string{"127.0.0.1"}},
		"octal":                    {"0177.0.0.1", []string{"127.0.0.1"}},
		"a number nobody resolves": {"2130706433", nil},
		"a dot behind":             {"127.0.0.1.", []string{"127.0.0.1"}},
		"other digits":             {"１２７.０.０.１", nil},
		"a circled digit":          {"127.0.0.①", nil},
		"two names' worth":         {"hooks.example", []string{"10.0.0.1", "127.0.0.1", "::1"}},
		"public and private":       {"hooks.example", []string{"1.1.1.1", "10.0.0.1"}},
		"private and public":       {"hooks.example", []string{"10.0.0.1", "1.1.1.1"}},
		"public 4, private 6":      {"hooks.example", []string{"1.1.1.1", "::1"}},
		"private 4, public 6":      {"hooks.example", []string{"127.0.0.1", "2606:4700:4700::1111"}},
		"private behind NAT64":     {"hooks.example", []string{"1.1.1.1", "64:ff9b::10.0.0.1"}},
	}
	for _, addr := range inside {
		literal := addr
		if strings.Contains(addr, ":") {
			literal = "[" + addr + "]"
		}
		attempts["itself, "+addr] = attempt{literal, nil}
		attempts["by name, "+addr] = attempt{"hooks.example", []string{addr}}
	}
	ways := map[string]func(url string, e *outbox.Endpoint){
		"https": func(url string, e *outbox.Endpoint) { e.URL = url },
		"plain": func(url string, e *outbox.Endpoint) { // as far as the operator lets it be
			e.URL, e.Network.Allow = strings.Replace(url, "https:", "http:", 1), prefixes("203.0.113.0/24")
		},
		"token": func(url string, e *outbox.Endpoint) {
			e.URL = "https://elsewhere.example/"
			e.Auth.OAuth2 = &outbox.OAuth2{TokenURL: outbox.Secret(url), ClientID: "me", ClientSecret: "TOPSECRET"}
		},
	}
	for name, a := range attempts {
		for way, set := range ways {
			t.Run(way+", "+name, func(t *testing.T) {
				b := setup(t, nil)
				b.resolver = named(t, a.addrs...)
				e := endpoint("", theirs, func(e *outbox.Endpoint) { e.Breaker.ConsecutiveFailures = 1 })
				set("https://"+a.host+":"+port+"/", e)
				var l lookout
				o := l.sendTo(b, e)
				require.Equal(t, outbox.Dead, o.Verdict, "%+v", o)
				require.Equal(t, outbox.ReasonRefusedAddress, o.Reason)
				require.Empty(t, l.left)
				require.Empty(t, b.moves, "a refusal counts against nobody")
			})
		}
	}
	require.Zero(t, came.Load())
}

// DNS rebinding: the name was public when it was looked at first.
func TestANameIsJudgedEachTimeItIsAsked(t *testing.T) {
	var asked atomic.Int32
	b := setup(t, nil)
	b.resolver = nameServer(t, func(kind uint16) (byte, []netip.Addr, bool) {
		if asked.Add(1) <= 2 { // for A and AAAA
			return codeFine, ofKind(kind, "192.0.2.1"), false
		}
		return codeFine, ofKind(kind, "127.0.0.1"), false
	})
	var l lookout
	// 192.0.2.1 stands in for a public address at which nobody answers.
	e := endpoint("https://hooks.example/", theirs, timeout(50*time.Millisecond), func(e *outbox.Endpoint) { e.Network.Allow = prefixes("192.0.2.0/24") })
	require.Equal(t, outbox.Retry, l.sendTo(b, e).Verdict)
	for range 3 {
		o := l.sendTo(b, e)
		require.Equal(t, outbox.Dead, o.Verdict, "%+v", o)
		require.Equal(t, "the address 127.0.0.1 is not public", o.Detail)
	}
	require.NotContains(t, fmt.Sprint(l.left), "127.0.0.1")
}

func TestARedirectInsideIsAFailedStatus(t *testing.T) {
	cert, ca, err := sendertest.Certificate("hooks.example", time.Time{})
	require.NoError(t, err)
	rx := sendertest.New(t, sendertest.Config{TLS: cert})
	secret := sendertest.New(t, sendertest.Config{})
	_, port, _ := net.SplitHostPort(rx.Addr())
	b := setup(t, nil)
	b.resolver = named(t, "127.0.0.1")
	// The receiver stands on an address that is allowed here, as if it were public.
	e := endpoint("https://hooks.example:"+port+"/", theirs, func(e *outbox.Endpoint) {
		e.TLS.CA, e.Network.Allow = ca, prefixes("127.0.0.1/32")
		e.Breaker = outbox.BreakerPolicy{}
	})
	for _, status := range []int{301, 302, 303, 307, 308} {
		for _, to := range []string{secret.URL(), "http://169.254.169.254/latest/meta-data/", "//10.0.0.1/"} {
			rx.Script(sendertest.Status(status, "Location", to))
			var l lookout
			o := l.sendTo(b, e)
			require.Equal(t, outbox.Retry, o.Verdict)
			require.Equal(t, status, o.Status)
			require.Contains(t, o.Detail, "redirects are not followed")
			require.NotContains(t, fmt.Sprint(l.left), "169.254")
		}
	}
	require.Zero(t, secret.Count())
}

// A connection of HTTP/2 whose certificate is good for another name too carries no request for that
// one, and a connection made by other rules none at all.
func TestNoConnectionIsLentToANameOrARuleThatWasNotJudged(t *testing.T) {
	cert, ca, err := sendertest.Certificate("127.0.0.1", time.Time{}, "a.example", "b.example")
	require.NoError(t, err)
	rx := sendertest.New(t, sendertest.Config{TLS: cert, HTTP2: true})
	_, port, _ := net.SplitHostPort(rx.Addr())
	trusting := func(e *outbox.Endpoint) { e.TLS.CA, e.Network.Allow = ca, prefixes("127.0.0.1/32") }
	b := setup(t, nil)
	b.resolver = named(t, "127.0.0.1")
	require.Equal(t, outbox.Delivered, b.send(endpoint("https://a.example:"+port+"/", theirs, trusting)).Verdict)
	require.Equal(t, "HTTP/2.0", rx.Requests()[0].Proto)

	// The same rules, another name: it is asked for, and judged.
	asked := make(chan struct{}, 16)
	inside := nameServer(t, func(kind uint16) (byte, []netip.Addr, bool) {
		asked <- struct{}{}
		return codeFine, ofKind(kind, "10.0.0.1"), false
	})
	b.resolver.Dial = inside.Dial
	o := b.send(endpoint("https://b.example:"+port+"/", theirs, trusting, func(e *outbox.Endpoint) { e.ID = "b" }))
	require.Equal(t, outbox.ReasonRefusedAddress, o.Reason, o.Detail)
	require.NotEmpty(t, asked)

	// The same name, stricter rules.
	for id, change := range map[string]func(*outbox.Endpoint){
		"not allowed": func(e *outbox.Endpoint) { e.Network.Allow = nil },
		"denied":      func(e *outbox.Endpoint) { e.Network.Deny = prefixes("127.0.0.0/8") },
		"mapped":      func(e *outbox.Endpoint) { e.Network.Deny = prefixes("::ffff:127.0.0.0/104") },
	} {
		b.resolver.Dial = named(t, "127.0.0.1").Dial
		o := b.send(endpoint("https://a.example:"+port+"/", theirs, trusting, change, func(e *outbox.Endpoint) { e.ID = id }))
		require.Equal(t, outbox.ReasonRefusedAddress, o.Reason, "%s: %+v", id, o)
	}
	require.Equal(t, 1, rx.Count())
}
