package main

import (
	"errors"
	"maps"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"golang.org/x/net/http/httpproxy"

	"github.com/walhook/walhook/outbox"
)

// environmentProxy tells which proxy HTTPS_PROXY, HTTP_PROXY and NO_PROXY, in capitals or not, name
// for a URL; none for this host's own addresses. It knows the rules as other programs do.
func environmentProxy(env func(string) (string, bool)) func(*url.URL) (*url.URL, error) {
	first := func(names ...string) string {
		for _, name := range names {
			if s, _ := env(name); s != "" {
				return s
			}
		}
		return ""
	}
	// What it cannot parse, the library takes for no proxy at all.
	proxy := func(s string) string {
		_, as := url.Parse(s)
		if _, within := url.Parse("http://" + s); s != "" && as != nil && within != nil {
			return "invalid://proxy"
		}
		return s
	}
	return (&httpproxy.Config{
		HTTPSProxy: proxy(first("HTTPS_PROXY", "https_proxy")),
		HTTPProxy:  proxy(first("HTTP_PROXY", "http_proxy")),
		NoProxy:    first("NO_PROXY", "no_proxy"),
	}).ProxyFunc()
}

// proxied gives an endpoint the proxy that the environment names for its URL, where its settings
// name none. The error shows nothing of what the environment says.
func proxied(e *outbox.Endpoint, environment func(*url.URL) (*url.URL, error)) error {
	to, err := url.Parse(e.URL)
	if e.Proxy != "" || environment == nil || err != nil {
		return nil // a URL that is none is said elsewhere
	}
	through, err := environment(to)
	switch {
	case err != nil, through != nil && through.Scheme != "http" && through.Scheme != "https":
		return errors.New("goes through the proxy that the environment names in HTTPS_PROXY or HTTP_PROXY, which is no http:// or https:// URL")
	case through != nil:
		e.Proxy = outbox.Secret(through.String())
	}
	return nil
}

// narrow is the network of an endpoint of the table, whose own settings can take from the
// defaults and never add to them: what either denies is denied, and what both allow is allowed.
// Settings without an allow (nil) leave that of the defaults; an empty one allows nothing.
func narrow(defaults, own outbox.Network) outbox.Network {
	n := outbox.Network{Allow: slices.Clone(defaults.Allow), Deny: slices.Concat(defaults.Deny, own.Deny)}
	if own.Allow == nil {
		return n
	}
	n.Allow = []netip.Prefix{}
	for _, theirs := range own.Allow {
		for _, ours := range defaults.Allow {
			if !ours.Overlaps(theirs) {
				continue
			}
			both := ours // of two prefixes that overlap, one holds the other
			if theirs.Bits() > ours.Bits() {
				both = theirs
			}
			if !slices.Contains(n.Allow, both) {
				n.Allow = append(n.Allow, both)
			}
		}
	}
	return n
}

// stranger is what an endpoint of the table is before its own settings: the defaults, without
// what would show the operator's own credentials to whoever registers a URL.
func (c *Config) stranger() outbox.Endpoint {
	e := c.Defaults
	e.Origin = outbox.FromTable
	e.Headers = maps.Clone(e.Headers)
	maps.DeleteFunc(e.Headers, func(name, _ string) bool { return strings.EqualFold(name, "Authorization") })
	e.Auth, e.Secrets = outbox.Auth{}, nil
	return e
}
