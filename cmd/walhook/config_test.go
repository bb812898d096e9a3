package main

import (
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// noEnv is an empty environment.
func noEnv(string) (string, bool) { return "", false }

// envOf is an environment with these variables.
func envOf(vars map[string]string) func(string) (string, bool) {
	return func(name string) (string, bool) { v, ok := vars[name]; return v, ok }
}

// load reads src as if it were walhook.yaml.
func load(src string, env func(string) (string, bool)) (*Config, error) {
	return (&loader{file: "walhook.yaml", env: env}).load([]byte(src))
}

func mustLoad(t *testing.T, src string, env func(string) (string, bool)) *Config {
	t.Helper()
	c, err := load(src, env)
	require.NoError(t, err)
	return c
}

const threeLines = `database: {url: "postgres://app@localhost/shop"}
outbox: [{table: public.outbox}]
endpoints: [{url: "https://billing.example.com"}]
`

// in puts settings into the one endpoint of a config.
func in(settings string) string {
	return strings.Replace(threeLines, `.com"}`, `.com", `+settings+`}`, 1)
}

func TestThreeLinesAreEnough(t *testing.T) {
	c := mustLoad(t, threeLines, noEnv)

	require.Equal(t, "postgres://app@localhost/shop", c.Database.URL.Reveal())
	require.Equal(t, c.Database.URL, c.Database.Replication())
	require.Equal(t, CDC{Slot: "walhook", Publication: "walhook", Instance: "default", Create: true, Snapshot: "never", Recover: "ask", MaxRecovery: 10_000, Failover: "auto"}, c.CDC)
	require.Equal(t, []outbox.Source{{Table: "public.outbox"}}, c.Outbox)
	require.Equal(t, Buffer{Events: 10000, Bytes: 64 << 20, SpillAfter: time.Second}, c.Buffer)
	require.Equal(t, Server{Listen: ":8080"}, c.Server)
	require.Equal(t, Metrics{MaxEndpoints: 200}, c.Metrics)
	require.Equal(t, Log{Level: "info", Format: "json"}, c.Log)

	want := outbox.DefaultEndpoint()
	want.ID, want.URL = "billing.example.com", "https://billing.example.com"
	require.Equal(t, []*outbox.Endpoint{&want}, c.Endpoints)
}

func TestEveryKeyAtItsDefaultIsAccepted(t *testing.T) {
	path := filepath.Join("testdata", "config", "full.yaml")
	env := envOf(map[string]string{"WALHOOK_DATABASE_URL": "postgres://app@localhost/shop", "BILLING_SECRET": "whsec_c2VjcmV0"})
	c, err := LoadConfig(path, env)
	require.NoError(t, err)

	want := outbox.DefaultEndpoint()
	require.Equal(t, want.Retry, c.Endpoints[0].Retry)
	require.Equal(t, want.Breaker, c.Endpoints[0].Breaker)
	require.Equal(t, want.DisableAfter, c.Endpoints[0].DisableAfter)
	require.Equal(t, want.MaxPayload, c.Endpoints[0].MaxPayload)
	require.Equal(t, []string{"invoice.*"}, c.Endpoints[0].Events)
	require.Equal(t, map[string]string{"X-Env": "prod"}, c.Endpoints[0].Headers)
	require.Equal(t, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, c.Endpoints[0].Network.Allow)
	require.Equal(t, "whsec_c2VjcmV0", c.Endpoints[0].Secrets[0].Reveal())
	require.Equal(t, outbox.Secret(""), c.Server.Token)
	require.Equal(t, "event_type", c.Outbox[0].Type.Name)
	require.Equal(t, outbox.Source{Messages: "walhook", IDPrefix: "msg_"}, c.Outbox[1])
}

func TestRateLimitsAreReadInEveryForm(t *testing.T) {
	perSecond := func(n float64) outbox.RateLimit {
		return outbox.RateLimit{Rate: outbox.Rate{Attempts: n, Per: time.Second}}
	}
	crm := perSecond(5)
	crm.Group = "crm"
	for text, want := range map[string]outbox.RateLimit{
		`""`:                      {},
		"100/s":                   perSecond(100),
		"0.5/s":                   perSecond(0.5),
		"300/m":                   {Rate: outbox.Rate{Attempts: 300, Per: time.Minute}},
		"1/h":                     {Rate: outbox.Rate{Attempts: 1, Per: time.Hour}},
		"{rate: 100/s}":           perSecond(100),
		"{group: crm}":            {Group: "crm", Rate: outbox.Rate{Attempts: 7, Per: time.Second}}, // over the defaults
		"{group: crm, rate: 5/s}": crm,
		"${RATE}":                 perSecond(2),
	} {
		src := in("rate_limit: "+text) + "defaults: {rate_limit: 7/s}\n"
		c := mustLoad(t, src, envOf(map[string]string{"RATE": "2/s"}))
		require.Equal(t, want, c.Endpoints[0].RateLimit, text)
	}
}

// The golden files hold every message, so that a change of one is seen and judged.
func TestConfigMistakesSayWhereWhatAndWhatIsAllowed(t *testing.T) {
	env := envOf(map[string]string{"WORD": "hunter2hunter2", "EMPTY": "", "LONG": strings.Repeat("hunter2", 2000)})
	files, err := filepath.Glob("testdata/config/bad/*.yaml")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".yaml"), func(t *testing.T) {
			_, err := LoadConfig(file, env)
			var cerr *ConfigError
			require.ErrorAs(t, err, &cerr)
			require.Equal(t, 2, cerr.ExitCode())
			got := strings.ReplaceAll(err.Error(), filepath.ToSlash(file), "walhook.yaml") + "\n"
			require.NotContains(t, got, "hunter2")

			golden := strings.TrimSuffix(file, ".yaml") + ".golden"
			if *update {
				require.NoError(t, os.WriteFile(golden, []byte(got), 0o644))
			}
			want, err := os.ReadFile(golden)
			require.NoError(t, err)
			require.Equal(t, string(want), got)
		})
	}
}

func TestMissingConfigFileSaysHowToNameOne(t *testing.T) {
	t.Chdir(t.TempDir())
	_, err := LoadConfig("", noEnv)
	require.EqualError(t, err, "walhook.yaml: cannot be read: no such file or directory (allowed: a file named by --config or WALHOOK_CONFIG, or ./walhook.yaml)")

	_, err = LoadConfig("", envOf(map[string]string{"WALHOOK_CONFIG": "elsewhere.yaml"}))
	require.ErrorContains(t, err, "elsewhere.yaml: cannot be read")

	_, err = LoadConfig("given.yaml", envOf(map[string]string{"WALHOOK_CONFIG": "elsewhere.yaml"}))
	require.ErrorContains(t, err, "given.yaml: cannot be read")

	_, err = LoadConfig(".", noEnv)
	require.ErrorContains(t, err, "not a regular file")
}

func TestVariablesServeEveryKindOfValue(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	require.NoError(t, os.WriteFile(file, []byte("whsec_ZmlsZQ==\r\n"), 0o600))
	env := envOf(map[string]string{
		"URL": "postgres://app:p#a:s{s},\"w@db/shop", "PORT": "9090", "N": "7", "T": "3s", "SIZE": "2MiB",
		"RATE": "0.25", "NO": "false", "LIST": "a, b]", "DOLLARS": "${N}", "EMPTY": "",
	})
	c := mustLoad(t, `
database: {url: ${URL}}
outbox: [{table: "${SCHEMA:-public}.outbox"}]
cdc: {create: ${NO}}
server: {listen: ":${PORT}", token: ${EMPTY}}   # braces inside braces
buffer: {events: ${N}, bytes: ${SIZE}}
endpoints:
  - {id: a, url: "https://${HOST:-h}/x", concurrency: ${N}, timeout: ${T}, tenant: $${N}-${DOLLARS}, events: [${LIST}], secrets: [${file:`+file+`}]}
  - id: b
    url: https://h/y
    tenant: ${EMPTY:-acme, inc: #1}
    breaker: {failure_rate: ${RATE}}
    timeout: ${EMPTY:-4s}
`, env)

	require.Equal(t, "postgres://app:p#a:s{s},\"w@db/shop", c.Database.URL.Reveal())
	require.Equal(t, "public.outbox", c.Outbox[0].Table)
	require.False(t, c.CDC.Create)
	require.Equal(t, ":9090", c.Server.Listen)
	require.Equal(t, Buffer{Events: 7, Bytes: 2 << 20, SpillAfter: time.Second}, c.Buffer)
	a, b := c.Endpoints[0], c.Endpoints[1]
	require.Equal(t, "https://h/x", a.URL)
	require.Equal(t, "${N}-${N}", a.Tenant, "an escape, and a value that is not searched again")
	require.Equal(t, 7, a.Concurrency)
	require.Equal(t, 3*time.Second, a.Timeout)
	require.Equal(t, []string{"a, b]"}, a.Events, "a value cannot bring YAML with it")
	require.Equal(t, "whsec_ZmlsZQ==", a.Secrets[0].Reveal(), "without the line's end")
	require.Equal(t, "acme, inc: #1", b.Tenant)
	require.InDelta(t, 0.25, b.Breaker.FailureRate, 0)
	require.Equal(t, 4*time.Second, b.Timeout)
}

func TestAPasswordBesideTheAddressNeedsNoEncoding(t *testing.T) {
	const given = `it's a \ p@ss/w:rd?&%20 #1`
	env := envOf(map[string]string{"PASSWORD": given})
	for address, want := range map[string]cdc.Address{
		"postgres://app@db:5433/shop":                 {User: "app", Password: given, Database: "shop"},
		"postgres://app@a,b/shop?sslmode=disable":     {User: "app", Password: given, Database: "shop"},
		"host=db user=app dbname='the shop'":          {User: "app", Password: given, Database: "the shop"},
		"postgresql://app@db/shop?application_name=x": {User: "app", Password: given, Database: "shop"},
	} {
		text := strings.Replace(threeLines, `"postgres://app@localhost/shop"`, fmt.Sprintf("%q, replication_url: %[1]q, password: ${PASSWORD}", address), 1)
		c := mustLoad(t, text, env)
		for _, url := range []outbox.Secret{c.Database.URL, c.Database.ReplicationURL} {
			got, err := cdc.ReadURL(url.Reveal())
			require.NoError(t, err, address)
			require.Equal(t, want.User, got.User, address)
			require.Equal(t, want.Password, got.Password, address)
			require.Equal(t, want.Database, got.Database, address)
		}
		rotated := mustLoad(t, text, envOf(map[string]string{"PASSWORD": "another"}))
		require.False(t, needsRestart(c, rotated), address)
	}
	for _, address := range []string{"postgres://app:old@db/shop", "host=db password=old", "postgres://app@db/shop?password=old"} {
		_, err := load(strings.Replace(threeLines, `"postgres://app@localhost/shop"`, fmt.Sprintf("%q, password: new", address), 1), noEnv)
		require.ErrorContains(t, err, "has a password beside an address that has one")
		require.NotContains(t, err.Error(), "old")
	}
}

func TestColumnsTakeANameAnExpressionOrAConstant(t *testing.T) {
	c := mustLoad(t, `
database: {url: host=/run dbname=shop}
outbox:
  - table: public."Outbox"
    columns: {id: id, type: {expr: "row.kind + '.' + row.type"}, key: {value: order}, tenant: {value: ""}, headers: h7}
endpoints: [{url: "https://h"}]
`, noEnv)
	require.Equal(t, []outbox.Source{{
		Table:   `public."Outbox"`,
		ID:      outbox.Column{Name: "id"},
		Type:    outbox.Column{Expr: "row.kind + '.' + row.type"},
		Key:     outbox.Column{Value: "order", Constant: true},
		Tenant:  outbox.Column{Constant: true},
		Headers: outbox.Column{Name: "h7"},
	}}, c.Outbox)
}

func TestDefaultsAreUnderEveryEndpoint(t *testing.T) {
	c := mustLoad(t, `
database: {url: postgres://localhost/shop}
outbox: [{messages: walhook}]
endpoints:
  - url: https://a.example.com
  - url: https://b.example.com
    timeout: 1s
    retry: {jitter: 0}
    breaker: {open_for: 1m}
    headers: {x-env: test, X-More: "1"}
    events: [b]
    max_payload: 1MB
    disable_after: 0
defaults:
  timeout: 2s
  retry: {schedule: [], jitter: 0.5, max_age: 0, dead_on: [400, 422]}
  breaker: {consecutive_failures: 9}
  headers: {X-Env: prod}
  events: [a, "a.*"]
  ordering: all
`, noEnv)
	a, b := c.Endpoints[0], c.Endpoints[1]

	require.Equal(t, 2*time.Second, a.Timeout)
	require.Empty(t, a.Retry.Schedule)
	require.Zero(t, a.Retry.MaxAge)
	require.Equal(t, map[string]string{"X-Env": "prod"}, a.Headers)
	require.Equal(t, outbox.OrderAll, a.Ordering)
	require.Equal(t, 30*time.Second, a.Breaker.OpenFor)

	require.Equal(t, time.Second, b.Timeout)
	require.Zero(t, b.Retry.Jitter, "a zero that is written is meant")
	require.Equal(t, []int{400, 422}, b.Retry.DeadOn)
	require.Equal(t, 9, b.Breaker.ConsecutiveFailures)
	require.Equal(t, time.Minute, b.Breaker.OpenFor)
	require.Equal(t, map[string]string{"x-env": "test", "X-More": "1"}, b.Headers)
	require.Equal(t, []string{"b"}, b.Events)
	require.Equal(t, int64(1_000_000), b.MaxPayload)
	require.Zero(t, b.DisableAfter)

	require.Equal(t, map[string]string{"X-Env": "prod"}, c.Defaults.Headers)
	require.Equal(t, 2*time.Second, c.Defaults.Timeout)
}

func TestSigningIsOneSchemeOrSeveral(t *testing.T) {
	c := mustLoad(t, `
database: {url: postgres://localhost/shop}
outbox: [{table: outbox}]
defaults: {secrets: [plain]}
endpoints:
  - {id: a, url: "https://a", signing: stripe}
  - {id: b, url: "https://b", secrets: [whsec_YW55], signing: [standard, github]}
  - {id: c, url: "https://c", signing: {header: X-Sig}}
  - {id: d, url: "https://d", signing: [shopify, {algorithm: sha512, encoding: HEX, header: X-Sig, prefix: "v0=", content: "{id}.{timestamp}.{body}"}]}
  - {id: e, url: "https://e", signing: ${NONE}}
`, envOf(map[string]string{"NONE": "none"}))
	for i, want := range [][]outbox.Signing{
		{{Scheme: outbox.SchemeStripe}},
		{{Scheme: outbox.SchemeStandard}, {Scheme: outbox.SchemeGitHub}},
		{{Scheme: outbox.SchemeCustom, Algorithm: "sha256", Encoding: "hex", Header: "X-Sig", Content: "{body}"}},
		{{Scheme: outbox.SchemeShopify}, {Scheme: outbox.SchemeCustom, Algorithm: "sha512", Encoding: "HEX", Header: "X-Sig", Prefix: "v0=", Content: "{id}.{timestamp}.{body}"}},
		{{Scheme: outbox.SchemeNone}},
	} {
		require.Equal(t, want, c.Endpoints[i].Signing)
	}
}

// Secrets and schemes meet in an endpoint: defaults may bring either without the other.
func TestDefaultsMayBringSecretsOrASchemeAlone(t *testing.T) {
	for name, settings := range map[string][2]string{
		"secrets": {`secrets: [plain]`, `signing: github`},
		"scheme":  {`signing: github`, `secrets: [plain]`},
		"both":    {`signing: github, secrets: [plain]`, `timeout: 1s`},
	} {
		t.Run(name, func(t *testing.T) {
			c := mustLoad(t, "defaults: {"+settings[0]+"}\n"+in(settings[1]), noEnv)
			require.Equal(t, []outbox.Signing{{Scheme: outbox.SchemeGitHub}}, c.Endpoints[0].Signing)
			require.Equal(t, []outbox.Secret{"plain"}, c.Endpoints[0].Secrets)
		})
	}
	_, err := load("defaults: {signing: github}\n"+threeLines, noEnv)
	require.ErrorContains(t, err, "endpoints[0].secrets: is missing; github signing needs one")
}

func TestAnchorsAndMergeKeysWork(t *testing.T) {
	c := mustLoad(t, `
database: {url: postgres://localhost/shop}
outbox: [{table: outbox}]
endpoints:
  - &a
    id: a
    url: https://a.example.com
    retry: &r {jitter: 0.1}
    timeout: 1s
  - <<: *a
    id: b
    retry: *r
    timeout: 2s
`, noEnv)
	require.Equal(t, "https://a.example.com", c.Endpoints[1].URL)
	require.Equal(t, "b", c.Endpoints[1].ID)
	require.Equal(t, 2*time.Second, c.Endpoints[1].Timeout)
	require.InDelta(t, 0.1, c.Endpoints[1].Retry.Jitter, 0)
}

func TestIDsAreDerivedFromTheURLWithoutShowingIt(t *testing.T) {
	for url, want := range map[string]string{
		"https://billing.example.com":            "billing.example.com",
		"https://Billing.example.com/":           "billing.example.com",
		"http://localhost:8080":                  "localhost-8080",
		"http://[::1]:8080/":                     "1--8080",
		"https://hooks.example.com/T0/B0/token":  "hooks.example.com-57a878aa",
		"http://hooks.example.com/T0/B0/token":   "hooks.example.com-57a878aa",
		"https://hooks.example.com/T0/B0/other":  "hooks.example.com-6e7ae10b",
		"https://hooks.example.com?token=secret": "hooks.example.com-0eed6cf4",
		"https://u:p@hooks.example.com":          "hooks.example.com",
	} {
		require.Equal(t, want, derivedID(url), url)
		require.Regexp(t, endpointID, derivedID(url))
	}
	require.Regexp(t, endpointID, derivedID("https://"+strings.Repeat("long.", 60)+"example.com"))
	require.Regexp(t, endpointID, derivedID("https://ü"))
}

// Every place that may hold a credential holds one here, and the file is broken at every
// byte in several ways: whatever the loader says about it, it never says a secret.
func TestConfigErrorsNeverShowASecret(t *testing.T) {
	const k = "KKKKKKKKKKKKKKKK"
	src := strings.ReplaceAll(`database:
  url: postgres://app:@@@@@db/shop
  replication_url: "postgres://app:@@@@@db/shop"
outbox: [{table: o}]
defaults:
  headers: {Authorization: Bearer @@@@}
endpoints:
  - url: https://h.example.com/@@@@?token=@@@@
    secrets:
      - whsec_@@@@
      - "whsk_@@@@"
      - '@@@@'
    headers:
      X-Key: "@@@@"
  - {url: "https://@@@@:@@@@@h/", secrets: [whsec_@@@@, @@@@]}
  - url: https://i
    auth: {basic: {username: me, password: @@@@}, bearer: @@@@, mtls: {cert: @@@@, key: @@@@}}
    proxy: http://me:@@@@@proxy:3128
  - url: https://j
    auth:
      oauth2: {token_url: "https://idp/?@@@@", client_id: me, client_secret: "@@@@"}
    tls: {ca: @@@@}
server: {listen: ":8080", token: @@@@}
`, "@@@@", k)
	leaks := func(src string) {
		if _, err := load(src, noEnv); err != nil && strings.Contains(err.Error(), "KKKK") {
			t.Fatalf("shows a secret:\n%s\nof\n%s", err, src)
		}
	}
	leaks(src)
	for i := range src {
		if strings.HasPrefix(src[i:], "KK") && i > 0 && src[i-1] == 'K' {
			continue // as its neighbours
		}
		leaks(src[:i])
		leaks(src[:i] + src[i+1:])
		for _, with := range []string{":", ": ", "\n", "\n  ", "{", "}", "[", "]", "\"", "'", ",", "-", "&a ", "*a ", "!t ", "#", "|\n", "\t", "${", "? ", "%", "\x00"} {
			leaks(src[:i] + with + src[i:])
		}
	}
	for _, key := range []string{"timeout", "concurrency", "ordering", "id", "tenant", "events", "max_payload", "tls", "retry", "signing", "batch", "rate_limit"} {
		c := in(key + ": ${SECRET}")
		if _, err := load(c, envOf(map[string]string{"SECRET": k})); err != nil {
			require.NotContains(t, err.Error(), "KKKK")
		}
	}
}

func TestAConfigPrintsWithoutItsSecrets(t *testing.T) {
	c := mustLoad(t, `
database: {url: "postgres://app:KKKK@db/shop"}
outbox: [{table: o}]
defaults: {headers: {X-Key: KKKK}, proxy: "http://me:KKKK@proxy"}
endpoints:
  - {url: "https://h/KKKK?KKKK", secrets: [whsec_KKKK], headers: {Authorization: KKKK}}
  - {id: b, url: "https://h", auth: {basic: {username: me, password: KKKK}}}
  - {id: c, url: "https://h", auth: {bearer: KKKK}}
  - {id: d, url: "https://h", auth: {oauth2: {token_url: "https://idp/?KKKK", client_id: me, client_secret: KKKK}}}
server: {token: KKKK}
`, noEnv)
	things := []any{*c, c, c.Database, c.Server, c.Defaults, c.Endpoints, c.Database.URL, &c.Database.URL}
	for _, e := range c.Endpoints {
		things = append(things, *e, e, e.Auth, e.Secrets, e.Proxy)
		if e.Auth.Basic != nil {
			things = append(things, *e.Auth.Basic)
		}
		if e.Auth.OAuth2 != nil {
			things = append(things, *e.Auth.OAuth2)
		}
	}
	for _, thing := range things {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X"} {
			if s := fmt.Sprintf(verb, thing); strings.Contains(s, "KKKK") || strings.Contains(strings.ToLower(s), "4b4b4b4b") {
				t.Errorf("%s of a %T: %s", verb, thing, s)
			}
		}
	}
}

func TestDurations(t *testing.T) {
	for in, want := range map[string]time.Duration{
		"0": 0, "0s": 0, "15s": 15 * time.Second, "1m30s": 90 * time.Second, "7d": 7 * day, "1d12h": 36 * time.Hour,
		"1.5d": 36 * time.Hour, "250ms": 250 * time.Millisecond, "100000d": 100000 * day,
	} {
		got, wrong := parseDuration(in)
		require.Empty(t, wrong, in)
		require.Equal(t, want, got, in)
		again, wrong := parseDuration(formatDuration(got))
		require.Empty(t, wrong, in)
		require.Equal(t, got, again, in)
	}
	for _, in := range []string{"", "15", "-1s", "+1s", "1d-1h", "1w", "d", "s", "1 s", "forever", "1e9s", "200000d", "106751d24h", "99999999999h", "7D"} {
		_, wrong := parseDuration(in)
		require.NotEmpty(t, wrong, in)
	}
}

func TestSizes(t *testing.T) {
	for in, want := range map[string]int64{
		"0": 0, "1048576": 1 << 20, "64MiB": 64 << 20, "1MB": 1_000_000, "1.5 KiB": 1536, "2gib": 2 << 30, "10B": 10, "1TiB": 1 << 40,
	} {
		got, ok := parseSize(in)
		require.True(t, ok, in)
		require.Equal(t, want, got, in)
		again, ok := parseSize(formatSize(got))
		require.True(t, ok, in)
		require.Equal(t, got, again, in)
	}
	for _, in := range []string{"", "-1", "MiB", "1 PiB", "1M", "0.3B", "1e6", "99999999999TiB", "0x10"} {
		_, ok := parseSize(in)
		require.False(t, ok, in)
	}
}

func TestNearestKeyIsSuggested(t *testing.T) {
	known := []string{"timeout", "retry", "max_payload", "ordering", "url", "id"}
	for name, want := range map[string]string{
		"timout": "timeout", "tiemout": "timeout", "maxPayload": "max_payload", "max-payload": "max_payload", "Timeout": "timeout",
		"retries": "retry", "uri": "url", "zzz": "", "ordreing": "ordering",
	} {
		got := strings.TrimSuffix(strings.TrimPrefix(didYouMean(name, known), ", did you mean "), "?")
		require.Equal(t, want, got, name)
	}
}

// What people copy from the pages must be taken as it is.
func TestExamplesOfTheDocsLoad(t *testing.T) {
	blocks := regexp.MustCompile("(?s)```yaml\n(.*?)```")
	env := func(string) (string, bool) { return "whsec_c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0", true }
	for _, page := range []string{"README.md", "docs/configuration.md"} {
		text, err := os.ReadFile(filepath.Join("..", "..", filepath.FromSlash(page)))
		require.NoError(t, err)
		examples := blocks.FindAllSubmatch(text, -1)
		require.NotEmpty(t, examples, page)
		for _, example := range examples {
			_, err := load(string(example[1]), env)
			var cerr *ConfigError
			if !errors.As(err, &cerr) {
				continue
			}
			for _, p := range cerr.Problems {
				// A part of a file lacks the rest, the files are elsewhere, and the variable is no URL.
				if p.Text != "is missing" && !strings.Contains(p.Text, "no such file") && p.Key != "database.url" {
					t.Errorf("%s: %s: %s in\n%s", page, p.Key, p.Text, example[1])
				}
			}
		}
	}
}

func FuzzLoadConfig(f *testing.F) {
	files, _ := filepath.Glob("testdata/config/*.yaml")
	bad, _ := filepath.Glob("testdata/config/bad/*.yaml")
	for _, file := range append(files, bad...) {
		src, err := os.ReadFile(file)
		require.NoError(f, err)
		f.Add(string(src))
	}
	f.Add("a: &a [*a]\n<<: *a\n")
	f.Add("? [a]\n: b\n")
	f.Fuzz(func(t *testing.T, src string) {
		c, err := load(src, envOf(map[string]string{"X": "1"}))
		if err == nil {
			if len(c.Endpoints) == 0 || len(c.Outbox) == 0 || c.Database.URL == "" {
				t.Fatal("accepted without what is required")
			}
			return
		}
		var cerr *ConfigError
		if !errors.As(err, &cerr) || len(cerr.Problems) == 0 || c != nil {
			t.Fatalf("%T with %v", err, c)
		}
	})
}

func TestEndpointsMayAllStandInTheTable(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"", "endpoints:\n", "endpoints: []\n", "defaults: {timeout: 3s}\n"} {
		path := filepath.Join(t.TempDir(), "walhook.yaml")
		require.NoError(t, os.WriteFile(path, []byte("database: {url: \"postgres://app@localhost/shop\"}\noutbox: [{table: public.outbox}]\n"+text), 0o600))
		cfg, err := LoadConfig(path, noEnv)
		require.NoError(t, err, text)
		require.Empty(t, cfg.Endpoints)
	}
}
