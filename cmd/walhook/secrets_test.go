package main

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/sender/sendertest"
)

// planted is in every place of the file and of the table that takes a secret; wherever else it is found, it was let out.
const planted = "KKhunter2KK"

// inPath stands in the path of URLs, which the commands about endpoints show and nothing else does.
const inPath = "KKpathKK"

// letsOut tells whether text holds the planted secret, in any form in which it goes about.
func letsOut(text string) bool {
	forms := []string{planted, "hunter2", hex.EncodeToString([]byte(planted)), strings.ToUpper(hex.EncodeToString([]byte(planted)))}
	for shift := range 3 { // the middle of its base64, wherever it begins in what is encoded
		forms = append(forms, base64.StdEncoding.EncodeToString([]byte(strings.Repeat("x", shift) + planted))[4:12])
	}
	return slices.ContainsFunc(forms, func(f string) bool { return strings.Contains(text, f) })
}

// A process in which everything fails in turn, with a secret in every place that takes one, at log level debug.
func TestNoSecretIsInAnythingThatARunWrites(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	// It tells a sender its own secrets, in every place that an answer has.
	tells := func(status int) func(sendertest.Request) sendertest.Answer {
		return func(q sendertest.Request) sendertest.Answer {
			return func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Location", "https://example.com/"+q.Header.Get("Authorization"))
				w.Header().Set("WWW-Authenticate", q.Header.Get("Authorization"))
				w.WriteHeader(status)
				fmt.Fprintf(w, "%v\n%s\n", q.Header, q.Path)
			}
		}
	}
	receiver := func(respond func(sendertest.Request) sendertest.Answer) *sendertest.Receiver {
		return sendertest.New(t, sendertest.Config{Respond: respond})
	}
	always := func(a sendertest.Answer) func(sendertest.Request) sendertest.Answer {
		return func(sendertest.Request) sendertest.Answer { return a }
	}
	broken, denied, gone := receiver(tells(500)), receiver(tells(401)), receiver(tells(410))
	hanging, waiting := receiver(always(sendertest.Hang())), receiver(always(sendertest.Hang()))
	garbled := receiver(always(sendertest.Raw("HTTP/1.1 " + planted + "\r\n\r\n")))
	certificate, _, err := sendertest.Certificate("127.0.0.1", time.Time{})
	require.NoError(t, err)
	secure := sendertest.New(t, sendertest.Config{TLS: certificate})
	pair, cert, err := sendertest.Certificate("client.example", time.Time{})
	require.NoError(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	require.NoError(t, err)
	key := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	at := func(name, content string) string {
		path := filepath.Join(b.dir, name)
		require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
		return path
	}
	signingSecret := "whsec_" + base64.StdEncoding.EncodeToString([]byte(planted))

	database := strings.Replace(b.url, "postgres@", "postgres:"+planted+"-database@", 1)
	require.NotEqual(t, b.url, database)
	env := map[string]string{
		"DATABASE": database, "TOKEN": planted + "-server", "SECRET": signingSecret, "BEARER": planted + "-bearer",
		"HTTPS_PROXY": "http://me:" + planted + "-environment@127.0.0.1:1",
	}
	endpoints := []string{
		`{id: refused, url: "http://127.0.0.1:1/` + inPath + `?token=` + planted + `", secrets: ["${SECRET}"], auth: {basic: {username: me, password: ` + planted + `-basic}}}`,
		`{id: broken, url: "` + broken.URL() + `?token=` + planted + `", secrets: ["${SECRET}", ` + testSecret + `], headers: {Authorization: "Bearer ` + planted + `-header"}}`,
		`{id: denied, url: "` + denied.URL() + `", signing: github, secrets: ["${file:` + at("plain", planted+"-file\n") + `}"], auth: {bearer: "${BEARER}"}, retry: {dead_on: [401]}}`,
		`{id: gone, url: "` + gone.URL() + `", signing: stripe, secrets: [` + planted + `-stripe], headers: {Cookie: "a=` + planted + `"}}`,
		`{id: hanging, url: "` + hanging.URL() + `", timeout: 150ms, signing: {header: X-Sig, prefix: "v0="}, secrets: ["${file:` + at("own", planted+"-own") + `}"]}`,
		`{id: garbled, url: "` + garbled.URL() + `", auth: {bearer: "${file:` + at("bearer", planted+"-mounted") + `}"}}`,
		`{id: unknown-ca, proxy: none, url: "` + secure.URL() + `?` + planted + `", auth: {mtls: {cert: ` + at("cert.pem", cert) + `, key: ` + at("key.pem", key) + `}}}`,
		`{id: nowhere, proxy: none, url: "https://no-such-name.invalid/` + inPath + `", timeout: 2s, secrets: ["${SECRET}"]}`,
		`{id: no-token, url: "` + broken.URL() + `", auth: {oauth2: {token_url: "` + denied.URL() + `?` + planted + `", client_id: me, client_secret: ` + planted + `-oauth2}}}`,
		`{id: no-proxy, url: "https://hooks.example.com/` + inPath + `", proxy: "http://me:` + planted + `-proxy@127.0.0.1:1"}`,
		`{id: no-proxy-around, url: "https://hooks.example.com/?` + planted + `"}`,
		`{id: no-body, url: "` + broken.URL() + `?` + planted + `", secrets: ["${SECRET}"], transform: {body: "{'a': data.nothing}"}}`,
		`{id: no-filter, url: "` + broken.URL() + `?` + planted + `", filter: "data.nothing > 1"}`,
		`{id: odd-header, url: "` + broken.URL() + `?` + planted + `", transform: {headers: "{'X-A': data.line}"}}`,
	}
	write := func(more ...string) string {
		path := b.edit(b.config(append(endpoints, more...)...), fmt.Sprintf("%q", b.url), "${DATABASE}",
			"server: {", "log: {level: debug}\nserver: {token: \"${TOKEN}\", ", "defaults: {", "defaults: {network: {allow: [127.0.0.0/8]}, ")
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		from, to := bytes.Index(text, []byte("schedule: [")), bytes.Index(text, []byte("], jitter"))
		text = slices.Concat(text[:from], []byte("schedule: [100ms"), text[to:])
		require.NoError(t, os.WriteFile(path, text, 0o600))
		return path
	}
	config := write()
	p := startBy(t, `exec "$0" run --config "$1"`, config, func(cmd *exec.Cmd) {
		cmd.Env = append(cmd.Env, "GOTRACEBACK=system")
		for name, value := range env {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
	})

	// The table: what works but for its receiver, and what is invalid.
	settings := func(s any) string {
		text, err := json.Marshal(s)
		require.NoError(t, err)
		return string(text)
	}
	type object = map[string]any
	for id, row := range map[string][2]string{
		"t-header":   {broken.URL() + "?" + planted, settings(object{"headers": object{"Authorization": planted}})},
		"t-bearer":   {denied.URL(), settings(object{"auth": object{"bearer": planted}})},
		"t-basic":    {"http://127.0.0.1:1/" + inPath, settings(object{"auth": object{"basic": object{"username": "me", "password": planted}}})},
		"t-oauth2":   {broken.URL(), settings(object{"auth": object{"oauth2": object{"token_url": secure.URL() + "?" + planted, "client_id": "me", "client_secret": planted}}})},
		"t-inside":   {"https://10.0.0.1/" + inPath, `{}`},
		"t-tls":      {secure.URL() + "?" + planted, settings(object{"auth": object{"mtls": object{"cert": cert, "key": key}}})},
		"i-userinfo": {"https://me:" + planted + "@example.com/", `{}`},
		"i-scheme":   {"ftp://example.com/?" + planted, `{}`},
		"i-both":     {"https://example.com/?" + planted, settings(object{"auth": object{"bearer": planted}, "headers": object{"authorization": planted}})},
		"i-line":     {"https://example.com/", settings(object{"headers": object{"X-Key": planted + "\n"}})},
		"i-unknown":  {"https://example.com/", settings(object{"nonesuch": planted, "auth": object{"basic": planted}})},
		"i-mtls":     {"https://example.com/", settings(object{"auth": object{"mtls": object{"cert": cert, "key": "-----BEGIN " + planted}}})},
		"i-proxy":    {"https://example.com/", settings(object{"proxy": "http://me:" + planted + "@proxy"})},
	} {
		_, err := b.conn().Exec(t.Context(), "insert into walhook.endpoints (id, url, secrets, settings) values ($1, $2, $3, $4)", id, row[0], []string{signingSecret}, row[1])
		require.NoError(t, err)
	}
	_, err = b.conn().Exec(t.Context(), "insert into walhook.endpoints (id, url, secrets) values ('i-secret', 'https://example.com', $1)", []string{"whsec_" + planted + "!"})
	require.NoError(t, err)
	eventually(t, "the invalid endpoints", func() bool { return b.ask("select count(*) from walhook.endpoints where status = 'invalid'") >= 8 })
	require.Zero(t, b.ask("select count(*) from walhook.endpoints where (status = 'invalid') <> (id like 'i-%')"))

	for i := range 3 {
		b.exec(fmt.Sprintf(`insert into outbox (aggregatetype, aggregateid, type, payload) values ('order', 'k%d', 'order.changed', '{"n": 1, "line": "a\nb"}')`, i))
	}
	b.exec("insert into outbox (aggregatetype, aggregateid, type, payload) values ('order', 'k', '', '{}'), ('order', 'k', 'order.changed', 'no json')")
	for _, id := range []string{
		"refused", "broken", "denied", "hanging", "garbled", "unknown-ca", "nowhere", "no-token", "no-proxy", "no-proxy-around", "no-body", "no-filter", "odd-header",
		"t-header", "t-bearer", "t-basic", "t-oauth2", "t-inside", "t-tls",
	} {
		eventually(t, "a dead delivery of "+id, func() bool {
			return b.ask("select count(*) from walhook.deliveries where state = 'dead' and endpoint_id = '"+id+"'") > 0
		})
	}
	p.log.line(t, "endpoint disabled", "gone")

	// A configuration that is broken at its secrets changes nothing but the log.
	write(`{id: new, url: "https://me:`+planted+`@example.com/", secrets: ["whsec_`+planted+`!"], headers: {X-Key: "`+planted+`\n", Authorization: x}, auth: {bearer: `+planted+`, mtls: {cert: `+planted+`, key: `+planted+`}}}`,
		`{id: newer, url: "${`+"NO_SUCH_VARIABLE"+`}", proxy: "socks5://`+planted+`@x"}`)
	require.NoError(t, p.cmd.Process.Signal(syscall.SIGHUP))
	p.log.line(t, "the configuration is broken")
	brokenToo, _, _ := runWith(t, env, "check", "-c", config)
	require.Equal(t, exitUsage, brokenToo)
	_, out, errs := runWith(t, env, "check", "-c", config)
	said := map[string]string{"check of a broken file": out + errs}
	write()
	p.log.line(t, "configuration reloaded")

	for _, path := range []string{"/metrics", "/readyz", "/healthz", "/api", "/debug/pprof/goroutine?debug=2", "/debug/vars"} {
		_, said[path] = p.get(path)
	}
	require.Contains(t, said["/metrics"], `outcome="dead"`)

	// Every table of the schema, but for what the app itself keeps in walhook.endpoints.
	rows, err := b.conn().Query(t.Context(), "select table_name::text from information_schema.tables where table_schema = 'walhook'")
	require.NoError(t, err)
	var tables []string
	for rows.Next() {
		var name string
		require.NoError(t, rows.Scan(&name))
		tables = append(tables, name)
	}
	require.NoError(t, rows.Err())
	require.Contains(t, tables, "deliveries")
	for _, name := range tables {
		var text string
		require.NoError(t, b.conn().QueryRow(t.Context(), `select coalesce(string_agg(case '`+name+`' when 'endpoints' then to_jsonb(t) - array['url', 'secrets', 'settings'] else to_jsonb(t) end::text, E'\n'), '') from walhook.`+name+` t`).Scan(&text))
		said["table "+name] = text
	}
	require.Contains(t, said["table deliveries"], "last_error")
	require.Contains(t, said["table endpoints"], "status_reason")

	for _, args := range [][]string{
		{"check"},
		{"endpoints", "list"},
		{"deliveries", "list", "--limit", "1000"},
		{"deliveries", "retry", "--all", "--dry-run"},
		{"replay", "--key", "k1", "--endpoint", "denied", "--rate", "1000/s"},
	} {
		for _, form := range []string{"table", "json"} {
			_, out, errs := runWith(t, env, append(args, "-c", config, "-o", form)...)
			said[fmt.Sprint(args, form)] = out + errs
		}
	}
	var list struct {
		Deliveries []struct {
			ID       int64
			Endpoint string
		}
		Endpoints []struct{ ID string }
	}
	require.NoError(t, json.Unmarshal([]byte(said["[deliveries list --limit 1000]json"]), &list))
	require.NoError(t, json.Unmarshal([]byte(said["[endpoints list]json"]), &list))
	require.Greater(t, len(list.Endpoints), 25)
	require.Greater(t, len(list.Deliveries), 19)
	for i, e := range list.Endpoints {
		form := []string{"table", "json"}[i%2]
		for _, what := range []string{"show", "test"} {
			_, out, errs := runWith(t, env, "endpoints", what, e.ID, "-c", config, "-o", form)
			said["endpoints "+what+" "+e.ID+" "+form] = out + errs
		}
	}
	shown := map[string]bool{}
	for _, d := range list.Deliveries {
		if shown[d.Endpoint] {
			continue
		}
		shown[d.Endpoint] = true
		for _, form := range []string{"table", "json"} {
			_, out, errs := runWith(t, env, "deliveries", "show", fmt.Sprint(d.ID), "-c", config, "-o", form)
			said["deliveries show of "+d.Endpoint+" "+form] = out + errs
		}
	}
	// A database that is not there.
	away := map[string]string{"DATABASE": "postgres://me:" + planted + "@127.0.0.1:1/shop?application_name=" + planted, "TOKEN": planted, "SECRET": signingSecret, "BEARER": planted}
	for _, command := range []string{"check", "endpoints list", "deliveries list", "tail", "init", "replay --id x"} {
		_, out, errs := runWith(t, away, append(strings.Fields(command), "-c", config)...)
		said[command+" without a database"] = out + errs
	}

	// The dump of a crash: every stack with its arguments, while attempts are in flight: several, as the
	// dump has no stack of what is running just then.
	const attempts = 8
	_, err = b.conn().Exec(t.Context(), "insert into walhook.endpoints (id, url, secrets, settings) values ('waiting', $1, $2, $3)",
		waiting.URL()+"?"+planted, []string{signingSecret}, settings(object{"timeout": "30s", "auth": object{"bearer": planted}}))
	require.NoError(t, err)
	for i := range attempts {
		b.insert(fmt.Sprintf("last%d", i))
	}
	requireAtLeast(t, waiting, attempts)
	require.NoError(t, p.cmd.Process.Signal(syscall.SIGQUIT))
	require.Error(t, p.cmd.Wait())
	said["log and dump"] = p.log.String()
	require.Contains(t, said["log and dump"], "SIGQUIT: quit")
	require.Contains(t, said["log and dump"], "walhook/sender.(*wire).receive(")

	require.Greater(t, len(said), 60)
	needle := strings.Split(key, "\n")[1][8:40]
	for where, text := range said {
		for line := range strings.Lines(text) {
			if letsOut(line) || (strings.Contains(line, inPath) && !strings.Contains(where, "endpoints")) || strings.Contains(line, needle) || strings.Contains(line, testSecret[6:]) {
				t.Errorf("%s: %s", where, line)
			}
		}
	}
	require.True(t, letsOut(signingSecret) && letsOut(base64.StdEncoding.EncodeToString([]byte("me:"+planted))))
}

// runWith runs a command with an environment.
func runWith(t *testing.T, env map[string]string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), args, envOf(env), &out, &errs)
	return code, out.String(), errs.String()
}
