package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
)

// The tables of docs/configuration.md are half generated: the loader says which keys there are and
// what each of them allows, defaultConfig what stands where none is given. What a key is for is
// written by hand. go test ./cmd/walhook -run TestTheReference -update puts defaults and ranges
// in; a key that is new wants its row.

// referenceKeys are all keys that the loader knows, as the reference writes them, sections aside.
func referenceKeys(t *testing.T) (keys []string) {
	t.Helper()
	sections := []string{
		"database", "cdc", "outbox", "buffer", "server", "metrics", "log",
		"retry", "breaker", "batch", "network", "tls", "columns", "basic", "oauth2", "mtls",
	}
	_, err := load(`
nonesuch: 1
database: {nonesuch: 1, url: host=h}
cdc: {nonesuch: 1}
outbox: [{table: t, nonesuch: 1, columns: {nonesuch: 1}}]
defaults: {nonesuch: 1}
endpoints: [{nonesuch: 1, signing: {nonesuch: 1}, retry: {nonesuch: 1}, breaker: {nonesuch: 1}, batch: {nonesuch: 1}, rate_limit: {nonesuch: 1}, network: {nonesuch: 1}, tls: {nonesuch: 1},
  transform: {nonesuch: 1}, auth: {nonesuch: 1, basic: {nonesuch: 1}, oauth2: {nonesuch: 1}, mtls: {nonesuch: 1}}}]
buffer: {nonesuch: 1}
server: {nonesuch: 1}
metrics: {nonesuch: 1}
log: {nonesuch: 1}
`, noEnv)
	var cerr *ConfigError
	require.ErrorAs(t, err, &cerr)
	index := regexp.MustCompile(`\[\d+\]`)
	for _, p := range cerr.Problems {
		section, found := strings.CutSuffix(p.Key, "nonesuch")
		if !found || section == "defaults." {
			continue
		}
		section = strings.TrimPrefix(index.ReplaceAllString(section, "[]"), "endpoints[].")
		for key := range strings.SplitSeq(p.Allowed, ", ") {
			if !slices.Contains(sections, key) {
				keys = append(keys, section+key)
			}
		}
	}
	require.Greater(t, len(keys), 80)
	return keys
}

// referenceDefaults are the defaults of the code, as a file would say them. A key that is not here is
// required, or has none that one could write.
func referenceDefaults() map[string]string {
	c := defaultConfig()
	e, own := c.Defaults, outbox.CustomSigning()
	list := func(items ...string) string { return "[" + strings.Join(items, ", ") + "]" }
	globs := make([]string, len(e.Events))
	for i, glob := range e.Events {
		globs[i] = strconv.Quote(glob)
	}
	steps := make([]string, len(e.Retry.Schedule))
	for i, step := range e.Retry.Schedule {
		steps[i] = strings.Replace(formatDuration(step), "1d", "24h", 1) // as the steps before it are written
	}
	codes := make([]string, len(e.Retry.DeadOn))
	for i, code := range e.Retry.DeadOn {
		codes[i] = strconv.Itoa(code)
	}
	rate := ""
	if e.RateLimit.Rate != (outbox.Rate{}) {
		rate = fmt.Sprint(e.RateLimit.Rate)
	}
	number := func(x float64) string { return strconv.FormatFloat(x, 'g', -1, 64) }
	return map[string]string{
		"database.replication_url": strconv.Quote(c.Database.ReplicationURL.Reveal()), "database.password": `""`,
		"cdc.slot": c.CDC.Slot, "cdc.publication": c.CDC.Publication, "cdc.instance": c.CDC.Instance, "cdc.create": strconv.FormatBool(c.CDC.Create),
		"cdc.snapshot": c.CDC.Snapshot, "cdc.recover": c.CDC.Recover, "cdc.max_recovery": strconv.Itoa(c.CDC.MaxRecovery), "cdc.failover": c.CDC.Failover,
		"outbox[].id_prefix": strconv.Quote(outbox.Source{}.IDPrefix),
		"endpoints":          list(), "defaults": "{}",
		"buffer.events": strconv.Itoa(c.Buffer.Events), "buffer.bytes": formatSize(c.Buffer.Bytes), "buffer.spill_after": formatDuration(c.Buffer.SpillAfter),
		"server.listen": strconv.Quote(c.Server.Listen), "server.token": strconv.Quote(c.Server.Token.Reveal()),
		"metrics.max_endpoints": strconv.Itoa(c.Metrics.MaxEndpoints),
		"log.level":             c.Log.Level, "log.format": c.Log.Format,

		"tenant": strconv.Quote(e.Tenant), "events": list(globs...), "filter": `""`, "secrets": list(), "signing": string(e.Signing[0].Scheme),
		"format": string(e.Format), "transform": "{}", "transform.method": orPost(e.Transform.Method), "auth": "{}", "headers": "{}",
		"ordering": string(e.Ordering), "timeout": formatDuration(e.Timeout), "concurrency": strconv.Itoa(e.Concurrency), "rate_limit": strconv.Quote(rate),
		"disable_after": formatDuration(e.DisableAfter), "max_payload": formatSize(e.MaxPayload), "proxy": strconv.Quote(e.Proxy.Reveal()),
		"signing.algorithm": own.Algorithm, "signing.encoding": own.Encoding, "signing.prefix": strconv.Quote(own.Prefix), "signing.content": strconv.Quote(own.Content),
		"auth.basic.password": `""`, "auth.oauth2.scopes": list(),
		"batch.max_events": strconv.Itoa(e.Batch.MaxEvents), "batch.linger": formatDuration(e.Batch.Linger),
		"retry.schedule": list(steps...), "retry.jitter": number(e.Retry.Jitter), "retry.max_age": formatDuration(e.Retry.MaxAge), "retry.dead_on": list(codes...),
		"breaker.consecutive_failures": strconv.Itoa(e.Breaker.ConsecutiveFailures), "breaker.failure_rate": number(e.Breaker.FailureRate),
		"breaker.min_requests": strconv.Itoa(e.Breaker.MinRequests), "breaker.window": formatDuration(e.Breaker.Window), "breaker.open_for": formatDuration(e.Breaker.OpenFor),
		"network.allow": list(), "network.deny": list(), "tls.ca": strconv.Quote(e.TLS.CA), "tls.min_version": strconv.Quote(e.TLS.MinVersion),
	}
}

// orPost is the method of requests without a rule for it.
func orPost(method string) string {
	if method == "" {
		return "POST"
	}
	return method
}

// fileWith is a whole file that says one key besides what it must.
func fileWith(key, text string) string {
	path := strings.Split(key, ".")
	for _, name := range slices.Backward(path[1:]) {
		text = "{" + name + ": " + text + "}"
	}
	const database, source, endpoint = `database: {url: "postgres://localhost/shop"`, "outbox: [{table: t", `endpoints: [{url: "https://h"`
	in := func() string { return ", " + text[1:] } // into the braces of a section that is there
	switch path[0] {
	case "database":
		return database + in() + "\n" + source + "}]\n" + endpoint + "}]\n"
	case "outbox[]":
		if key == "outbox[].table" || key == "outbox[].messages" {
			return database + "}\noutbox: [" + text + "]\n" + endpoint + "}]\n"
		}
		return database + "}\n" + source + in() + "]\n" + endpoint + "}]\n"
	case "cdc", "buffer", "server", "metrics", "log", "defaults":
		return database + "}\n" + source + "}]\n" + endpoint + "}]\n" + path[0] + ": " + text + "\n"
	case "endpoints":
		return database + "}\n" + source + "}]\nendpoints: " + text + "\n"
	case "signing":
		if len(path) > 1 && key != "signing.header" {
			text = "{header: X-Sig" + in()
		}
	}
	return database + "}\n" + source + "}]\n" + endpoint + ", " + path[0] + ": " + text + "}]\n"
}

// allowedFor is what the loader says is allowed where a value will not do, or nothing where any will.
func allowedFor(key string) string {
	for _, bad := range []string{`"no such thing ü"`, `["no such thing ü"]`, `""`, `[""]`} {
		_, err := load(fileWith(key, bad), noEnv)
		var cerr *ConfigError
		if !errors.As(err, &cerr) {
			continue
		}
		name := key[strings.LastIndex(key, ".")+1:]
		for _, p := range cerr.Problems {
			at := strings.TrimSuffix(p.Key, "[0]")
			if p.Allowed != "" && (at == name || strings.HasSuffix(at, "."+name)) && !strings.Contains(p.Text, "not a list") && !strings.HasPrefix(p.Text, "is a list") {
				return p.Allowed
			}
		}
	}
	return ""
}

var (
	span      = regexp.MustCompile("`[^`]*`")
	ofRange   = regexp.MustCompile(`^\S+ to \S+(, or 0 for never)?$`)
	ofNames   = regexp.MustCompile(`^[A-Za-z0-9.-]+(, [A-Za-z0-9.-]+)*$`)
	inCell    = regexp.MustCompile(`\d\S* to \d[^\s,]*(, or 0 for never)?`)
	ofNumber  = regexp.MustCompile(`\d[\w./]*`)
	tableLine = regexp.MustCompile("(?m)^\\| `([^`]+)` \\| (.*?) ?\\| (.*?) ?\\| (.*)\\|$")
)

// The reference is read by people who have no other: a key that is not there does not exist, and a
// default or a limit that stands there is taken for true.
func TestTheReferenceIsThatOfTheCode(t *testing.T) {
	path := filepath.Join("..", "..", "docs", "configuration.md")
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	keys, defaults := referenceKeys(t), referenceDefaults()
	rows := map[string]bool{}
	var wrong []string
	page := tableLine.ReplaceAllStringFunc(string(text), func(line string) string {
		m := tableLine.FindStringSubmatch(line)
		key, given, allowed := m[1], m[2], m[3]
		if !slices.Contains(keys, key) {
			return line // of another table
		}
		if rows[key] {
			wrong = append(wrong, key+" has two rows")
		}
		rows[key] = true
		is, literal := defaults[key]
		switch {
		case literal && !strings.HasPrefix(given, "`"):
			given = "`" + is + "`"
		case literal:
			given = strings.Replace(given, span.FindString(given), "`"+is+"`", 1)
		case strings.HasPrefix(given, "`") && key != "batch.max_bytes":
			wrong = append(wrong, key+" has a default on the page and none in the code")
		}
		switch may := allowedFor(key); {
		case strings.HasPrefix(allowed, "as `"): // another key, which has its own row
		case ofRange.MatchString(may):
			if !strings.Contains(allowed, may) {
				allowed = inCell.ReplaceAllLiteralString(allowed, may)
			}
			if !strings.Contains(allowed, may) {
				wrong = append(wrong, key+" allows "+may)
			}
		case ofNames.MatchString(may):
			names := strings.Split(may, ", ")
			var have []string
			for _, s := range span.FindAllString(allowed, -1) {
				have = append(have, strings.Trim(s, "`"))
			}
			if !slices.Equal(names, have) {
				wrong = append(wrong, fmt.Sprintf("%s allows %s, not %s", key, may, strings.Join(have, ", ")))
			}
		default:
			for _, n := range ofNumber.FindAllString(may, -1) {
				if !strings.Contains(allowed, n) && !strings.Contains(may, "as in") {
					wrong = append(wrong, fmt.Sprintf("%s allows %s, and the page has no %s", key, may, n))
				}
			}
		}
		return strings.ReplaceAll(fmt.Sprintf("| `%s` | %s | %s | %s|", key, given, allowed, m[4]), "|  |", "| |")
	})
	for _, key := range keys {
		if !rows[key] {
			wrong = append(wrong, key+" has no row")
		}
	}
	for key := range defaults {
		if !slices.Contains(keys, key) {
			wrong = append(wrong, key+" is no key any more")
		}
	}
	slices.Sort(wrong)
	require.Empty(t, wrong)
	if *update {
		require.NoError(t, os.WriteFile(path, []byte(page), 0o600))
		return
	}
	require.Equal(t, string(text), page, "go test ./cmd/walhook -run TestTheReference -update")
}

// A default that is written out is the same as none.
func TestADefaultOfTheReferenceChangesNothing(t *testing.T) {
	whole := func(key, text string) *Config {
		c := mustLoad(t, fileWith(key, text), noEnv)
		c.environment, c.inputs = nil, nil
		return c
	}
	plain := whole("log", "{}")
	for key, text := range referenceDefaults() {
		if strings.HasPrefix(key, "auth.") || strings.HasPrefix(key, "signing.") {
			continue // their sections change something by being there
		}
		if key == "transform.method" || key == "headers" || strings.HasPrefix(key, "network.") {
			continue // equal in effect alone: none is POST, and what is empty differs from nil
		}
		got := whole(key, text)
		if key == "endpoints" { // the one that a file has here
			require.Empty(t, got.Endpoints)
			got.Endpoints = plain.Endpoints
		}
		require.Equal(t, plain, got, key)
	}
}
