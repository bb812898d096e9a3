package main

import (
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/sender/sendertest"
)

func network(allow, deny []string) (n outbox.Network) {
	for _, s := range allow {
		n.Allow = append(n.Allow, netip.MustParsePrefix(s))
	}
	for _, s := range deny {
		n.Deny = append(n.Deny, netip.MustParsePrefix(s))
	}
	if allow != nil && n.Allow == nil {
		n.Allow = []netip.Prefix{}
	}
	return n
}

func TestATableEndpointTakesFromTheNetworkAndNeverAddsToIt(t *testing.T) {
	for name, c := range map[string]struct{ defaults, own, want outbox.Network }{
		"nothing":             {network(nil, nil), network(nil, nil), network(nil, nil)},
		"of the defaults":     {network([]string{"10.0.0.0/8"}, []string{"10.9.0.0/16"}), network(nil, nil), network([]string{"10.0.0.0/8"}, []string{"10.9.0.0/16"})},
		"more":                {network(nil, nil), network([]string{"10.0.0.0/8"}, nil), network([]string{}, nil)},
		"all":                 {network([]string{"10.0.0.0/8"}, nil), network([]string{"0.0.0.0/0", "::/0"}, nil), network([]string{"10.0.0.0/8"}, nil)},
		"less":                {network([]string{"10.0.0.0/8", "fd00::/8"}, nil), network([]string{"10.1.0.0/16"}, nil), network([]string{"10.1.0.0/16"}, nil)},
		"beside":              {network([]string{"10.0.0.0/8"}, nil), network([]string{"11.0.0.0/8"}, nil), network([]string{}, nil)},
		"none":                {network([]string{"10.0.0.0/8"}, nil), network([]string{}, nil), network([]string{}, nil)},
		"the same":            {network([]string{"10.0.0.0/8"}, nil), network([]string{"10.0.0.0/8"}, nil), network([]string{"10.0.0.0/8"}, nil)},
		"denied by either":    {network(nil, []string{"1.1.1.0/24"}), network(nil, []string{"8.8.8.0/24"}), network(nil, []string{"1.1.1.0/24", "8.8.8.0/24"})},
		"mapped is not wider": {network([]string{"10.0.0.0/8"}, nil), network([]string{"::ffff:0:0/96"}, nil), network([]string{}, nil)},
	} {
		got := narrow(c.defaults, c.own)
		require.Equal(t, c.want.Allow, got.Allow, name)
		require.ElementsMatch(t, c.want.Deny, got.Deny, name)
	}

	// Whatever is given: what is allowed was allowed by both, what either denied is denied.
	rapid.Check(t, func(t *rapid.T) {
		prefix := rapid.Custom(func(t *rapid.T) netip.Prefix {
			b := rapid.SliceOfN(rapid.ByteRange(0, 3), 4, 4).Draw(t, "address")
			return netip.PrefixFrom(netip.AddrFrom4([4]byte(b)), rapid.IntRange(0, 32).Draw(t, "bits")).Masked()
		})
		some := rapid.SliceOfN(prefix, 0, 4)
		draw := func(name string) outbox.Network {
			return outbox.Network{Allow: some.Draw(t, name+" allow"), Deny: some.Draw(t, name+" deny")}
		}
		defaults, own := draw("defaults"), draw("own")
		n := narrow(defaults, own)
		within := func(a netip.Addr, all []netip.Prefix) bool {
			for _, p := range all {
				if p.Contains(a) {
					return true
				}
			}
			return false
		}
		for range 20 {
			a := prefix.Draw(t, "of").Addr()
			both := within(a, defaults.Allow) && (own.Allow == nil || within(a, own.Allow))
			if within(a, n.Allow) != both {
				t.Fatalf("%s: allowed %t", a, !both)
			}
			if within(a, n.Deny) != (within(a, defaults.Deny) || within(a, own.Deny)) {
				t.Fatalf("%s: denied wrongly", a)
			}
		}
	})
}

func TestTheEnvironmentsProxyIsForThoseWithoutOne(t *testing.T) {
	src := `
database: {url: postgres://localhost/shop}
outbox: [{table: outbox}]
endpoints:
  - {id: a, url: "https://a.example.com/"}
  - {id: b, url: "http://b.example.com/"}
  - {id: inside, url: "https://hooks.internal/"}
  - {id: here, url: "http://127.0.0.1:8080/"}
  - {id: none, url: "https://a.example.com/x", proxy: none}
  - {id: own, url: "https://hooks.internal/y", proxy: "http://me:secret@other:3128"}
`
	of := func(src string, env map[string]string) map[string]string {
		c := mustLoad(t, src, envOf(env))
		all := map[string]string{}
		for _, e := range c.Endpoints {
			all[e.ID] = e.Proxy.Reveal()
		}
		return all
	}
	env := map[string]string{"HTTPS_PROXY": "http://me:secret@proxy:3128", "http_proxy": "plain:8080", "NO_PROXY": ".internal"}
	require.Equal(t, map[string]string{
		"a": "http://me:secret@proxy:3128", "b": "http://plain:8080", "inside": "", "here": "", "none": "none", "own": "http://me:secret@other:3128",
	}, of(src, env))
	require.Equal(t, map[string]string{"a": "", "b": "", "inside": "", "here": "", "none": "none", "own": "http://me:secret@other:3128"}, of(src, nil))
	all := "http://proxy:1"
	require.Equal(t, map[string]string{"a": all, "b": all, "inside": all, "here": all, "none": "none", "own": "http://me:secret@other:3128"},
		of("defaults: {proxy: \"http://proxy:1\"}\n"+src, env))

	for _, bad := range []string{"socks5://me:hunter2@proxy", "http://me:hunter2@%zz", "invalid://hunter2"} {
		_, err := load(src, envOf(map[string]string{"HTTPS_PROXY": bad}))
		require.ErrorContains(t, err, "endpoints[0]: goes through the proxy that the environment names in HTTPS_PROXY or HTTP_PROXY")
		require.NotContains(t, err.Error(), "hunter2")
		require.NotContains(t, err.Error(), "endpoints[4]")
	}
}

func TestAStrangerGetsNoneOfTheOperatorsCredentials(t *testing.T) {
	c := mustLoad(t, `
database: {url: postgres://localhost/shop}
outbox: [{table: outbox}]
defaults:
  secrets: [whsec_YW55]
  auth: {basic: {username: me, password: secret}}
  headers: {X-Env: prod}
  network: {deny: [1.1.1.1]}
  timeout: 3s
  proxy: http://me:secret@proxy:3128
endpoints: [{url: "https://a.example.com/"}]
`, envOf(map[string]string{"HTTPS_PROXY": "http://other"}))
	e := c.stranger()
	require.Equal(t, outbox.FromTable, e.Origin)
	require.Zero(t, e.Auth)
	require.Empty(t, e.Secrets)
	require.Equal(t, 3*time.Second, e.Timeout)
	require.Equal(t, "http://me:secret@proxy:3128", e.Proxy.Reveal(), "the way out is the operator's for all")
	e.Headers["X-More"] = "1"
	require.Equal(t, map[string]string{"X-Env": "prod"}, c.Defaults.Headers)

	c = mustLoad(t, `
database: {url: postgres://localhost/shop}
outbox: [{table: outbox}]
defaults: {headers: {authorization: Bearer x, X-Env: prod}}
endpoints: [{url: "https://a.example.com/"}]
`, envOf(map[string]string{"HTTPS_PROXY": "http://other"}))
	e = c.stranger()
	require.Equal(t, map[string]string{"X-Env": "prod"}, e.Headers)
	e.URL = "https://theirs.example/"
	require.NoError(t, proxied(&e, c.environment))
	require.Equal(t, "http://other", e.Proxy.Reveal())
}

// What a row says is read by the same code as the file, but no file of this host for it.
func TestNoFileIsReadForAnEndpointOfTheTable(t *testing.T) {
	_, ca, err := sendertest.Certificate("x", time.Time{})
	require.NoError(t, err)
	file := filepath.Join(t.TempDir(), "ca.pem")
	require.NoError(t, os.WriteFile(file, []byte(ca), 0o600))
	for _, origin := range []outbox.Origin{outbox.FromFile, outbox.FromTable} {
		l := &loader{env: noEnv}
		root, ok := l.parse([]byte("tls: {ca: " + file + "}\nauth: {mtls: {cert: " + file + ", key: " + file + "}}\nproxy: http://proxy:1\n"))
		require.True(t, ok)
		e := outbox.Endpoint{Origin: origin}
		l.section(root, l.endpointFields(&e)...)
		if origin == outbox.FromFile {
			require.Empty(t, l.problems)
			require.Equal(t, ca, e.TLS.CA)
			require.Equal(t, ca, e.Auth.MTLS.Key.Reveal())
			require.Contains(t, l.inputs(), file)
			continue
		}
		require.Empty(t, l.inputs())
		require.Len(t, l.problems, 4)
		require.Equal(t, "is not PEM", l.problems[0].Text)
		require.Equal(t, "proxy", l.problems[3].Key)
		require.Equal(t, "is the operator's to say", l.problems[3].Text)
	}
}

func TestChangesOfEachFileThatAConfigIsMadeOfAreSeen(t *testing.T) {
	_, ca, err := sendertest.Certificate("x", time.Time{})
	require.NoError(t, err)
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, text string) {
		require.NoError(t, os.WriteFile(at(name), []byte(text), 0o600))
	}
	// A mounted volume: names are links through ..data, which is swapped for a new folder.
	mount := func(folder, secret string) {
		require.NoError(t, os.Mkdir(at(folder), 0o700))
		write(folder+"/secret", secret)
		require.NoError(t, os.Symlink(folder, at("..new")))
		require.NoError(t, os.Rename(at("..new"), at("..data")))
	}
	mount("..1", "whsec_b25l\n")
	require.NoError(t, os.Symlink("..data/secret", at("secret")))
	write("ca.pem", ca)
	write("token", "abc")
	write("walhook.yaml", in(`secrets: ["${file:`+at("secret")+`}"], tls: {ca: `+at("ca.pem")+`}, auth: {bearer: "${file:`+at("token")+`}"}`))
	loaded := func() *Config {
		c, err := LoadConfig(at("walhook.yaml"), noEnv)
		require.NoError(t, err)
		require.Len(t, c.inputs, 4)
		require.False(t, c.inputs.changed())
		return c
	}
	c := loaded()
	mount("..2", "whsec_dHdv\n")
	require.True(t, c.inputs.changed())
	c = loaded()
	require.Equal(t, "whsec_dHdv", c.Endpoints[0].Secrets[0].Reveal())
	write("token", "def")
	require.True(t, c.inputs.changed())
	c = loaded()
	write("ca.pem", ca+"\n")
	require.True(t, c.inputs.changed())
	c = loaded()
	require.NoError(t, os.Remove(at("token")))
	require.True(t, c.inputs.changed())
	_, read, err := loadConfig(at("walhook.yaml"), noEnv)
	require.ErrorContains(t, err, "no such file")
	require.False(t, read.changed(), "what is broken is no news")
	write("token", "ghi")
	require.True(t, read.changed(), "until it is mended")
	loaded()
}

func TestARotatedPasswordNeedsNoRestart(t *testing.T) {
	restarts := func(a, b string) bool {
		return needsRestart(&Config{Database: Database{URL: outbox.Secret(a)}}, &Config{Database: Database{URL: outbox.Secret(b)}})
	}
	for _, f := range []string{
		"postgres://app:%@db/shop", "host=db password=% dbname=shop", "host=db password='% x' dbname=shop", "postgres://app@db/shop?password=%&sslmode=require",
	} {
		one, two := strings.Replace(f, "%", "one", 1), strings.Replace(f, "%", "t@w:o", 1)
		require.False(t, restarts(one, two), f)
		require.True(t, restarts(one, strings.Replace(two, "shop", "show", 1)), f)
		require.True(t, restarts(one, strings.Replace(two, "db", "bd", 1)), f)
	}
}

// The proxy of the environment is a URL like any other.
func TestEnvironmentProxyKnowsBothSpellings(t *testing.T) {
	p := environmentProxy(envOf(map[string]string{"https_proxy": "http://lower", "HTTPS_PROXY": "http://upper", "no_proxy": "x.example"}))
	for to, want := range map[string]string{"https://y.example": "http://upper", "https://x.example": "", "http://y.example": ""} {
		u, err := url.Parse(to)
		require.NoError(t, err)
		got, err := p(u)
		require.NoError(t, err)
		if want == "" {
			require.Nil(t, got, to)
			continue
		}
		require.Equal(t, want, got.String())
	}
}
