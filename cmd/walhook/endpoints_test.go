package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/outbox/store"
	"github.com/walhook/walhook/sender/sendertest"
)

// counter is a bench with the tables that commands need, and a config.
type counter struct {
	*bench
	path string
}

// counter makes the tables and a config with these endpoints, which lets those of the table reach
// this machine.
func newCounter(t *testing.T, endpoints ...string) *counter {
	t.Helper()
	b := newBench(t)
	st, err := store.Open(t.Context(), store.Config{URL: func() (string, error) { return b.url, nil }, Slot: b.slot, Instance: "default"})
	require.NoError(t, err)
	defer st.Close()
	require.NoError(t, st.Migrate(t.Context()))
	return &counter{b, b.loopback(b.config(endpoints...))}
}

// does runs a command that must end with this code.
func (c *counter) does(code int, args ...string) (out, errs string) {
	c.t.Helper()
	got, out, errs := walhook(c.t, append(args, "-c", c.path)...)
	require.Equal(c.t, code, got, "%v\n%s%s", args, out, errs)
	return out, errs
}

// json runs a command for its JSON.
func (c *counter) json(into any, args ...string) {
	c.t.Helper()
	out, _ := c.does(exitDone, append(args, "-o", "json")...)
	require.NoError(c.t, json.Unmarshal([]byte(out), into), out)
}

func TestEndpointOfTheTableFromAddToRemove(t *testing.T) {
	t.Parallel()
	c := newCounter(t, `{id: filed, url: "https://filed.example/hooks?token=s3cret", secrets: [whsec_YW55], events: ["a.*", "b"]}`)
	out, _ := c.does(exitDone, "endpoints", "add", "--id", "crm", "--url", "https://crm.example/x?token=s3cret", "--events", "invoice.*,order.paid",
		"--tenant", "acme", "--description", "bell \a", "--set", "retry.max_age=2d", "--set", "headers.X-Key=s3cret", "--set", "format=raw", "--set", "concurrency=3")
	require.Regexp(t, `(?m)^secret: whsec_[A-Za-z0-9+/]{43}=$`, out)
	secret := strings.Fields(out[strings.Index(out, "secret: "):])[1]

	list, _ := c.does(exitDone, "endpoints", "list")
	require.Regexp(t, `(?m)^ID +ORIGIN +STATUS +TENANT +EVENTS +URL +PARKED +DEAD +OLDEST$`, list)
	require.Regexp(t, `(?m)^filed +file +enabled +- +a\.\*,b +https://filed\.example/hooks\?\[redacted\] +0 +0 +-$`, list)
	require.Regexp(t, `(?m)^crm +table +enabled +acme +invoice\.\*,order\.paid +https://crm\.example/x\?\[redacted\] +0 +0 +-$`, list)

	show, _ := c.does(exitDone, "endpoints", "show", "crm")
	require.Regexp(t, `(?m)^secrets: +1$`, show)
	require.Regexp(t, `(?m)^retry.max_age: +2d$`, show)
	require.Regexp(t, `(?m)^description: +bell \\x07$`, show)
	require.Regexp(t, `(?m)^settings: .*"X-Key":"\[redacted\]"`, show)
	jsonShow, _ := c.does(exitDone, "endpoints", "show", "crm", "-o", "json")
	filed, _ := c.does(exitDone, "endpoints", "show", "filed")
	require.Regexp(t, `(?m)^origin: +file$`, filed)

	c.does(exitDone, "endpoints", "update", "crm", "--set", "retry.max_age=3d", "--unset", "format", "--unset", "headers.X-Key", "--tenant", "")
	var one shownEndpoint
	c.json(&one, "endpoints", "show", "crm")
	require.Equal(t, "3d", one.Effective["retry.max_age"])
	require.Equal(t, "standard", one.Effective["format"])
	require.Empty(t, one.Tenant)
	require.Equal(t, []string{"invoice.*", "order.paid"}, one.Events, "what is not given stays")

	for _, step := range [][2]string{{"pause", "paused"}, {"resume", "enabled"}, {"disable", "disabled"}, {"enable", "enabled"}} {
		out, _ := c.does(exitDone, "endpoints", step[0], "crm")
		require.Equal(t, "endpoint crm is "+step[1]+"\n", out)
		c.json(&one, "endpoints", "show", "crm")
		require.EqualValues(t, step[1], one.Status)
	}
	c.does(exitDone, "endpoints", "disable", "crm", "--reason", "unpaid")
	_, errs := c.does(exitFailed, "endpoints", "resume", "crm")
	require.Contains(t, errs, "disabled and not paused (unpaid): walhook endpoints enable crm")

	c.does(exitDone, "endpoints", "remove", "crm")
	_, errs = c.does(exitFailed, "endpoints", "show", "cmr")
	require.Contains(t, errs, `there is no endpoint "cmr"`)
	for _, said := range []string{list, show, jsonShow, filed} {
		require.NotContains(t, said, "s3cret")
		require.NotContains(t, said, secret)
		require.NotContains(t, said, "YW55")
	}
}

func TestWhatDoesNotValidateIsNotWritten(t *testing.T) {
	t.Parallel()
	c := newCounter(t, `{id: filed, url: "https://filed.example", secrets: [whsec_YW55]}`)
	add := func(says string, args ...string) {
		t.Helper()
		_, errs := c.does(exitUsage, append([]string{"endpoints", "add"}, args...)...)
		require.Contains(t, errs, says)
		require.NotContains(t, errs, "s3cret")
	}
	add("url: is empty")
	add("url: does not begin with https://", "--url", "ftp://s3cret")
	add("retry.max_age", "--url", "https://a.example", "--set", "retry.max_age=soon")
	add("unknown key, did you mean timeout", "--url", "https://a.example", "--set", "timout=3s")
	add("--set url: it has a flag", "--url", "https://a.example", "--set", "url=x")
	add("--set wants key=value", "--url", "https://a.example", "--set", "x")
	add("has an endpoint of this id", "--url", "https://a.example", "--id", "filed")
	add("id:", "--url", "https://a.example", "--id", "no good")
	add("secrets[0]", "--url", "https://a.example", "--secret", "s3cret")
	require.Zero(t, c.ask("select count(*) from walhook.endpoints"))

	c.does(exitDone, "endpoints", "add", "--url", "https://a.example", "--id", "a")
	add("there is an endpoint of that id already", "--url", "https://a.example", "--id", "a")
	_, errs := c.does(exitFailed, "endpoints", "remove", "filed")
	require.Contains(t, errs, "stands in the configuration file: remove it in "+c.path)
	_, errs = c.does(exitUsage, "endpoints", "nonsense")
	require.Contains(t, errs, `unknown command "nonsense"`)
	c.does(exitUsage, "endpoints", "list", "-o", "xml")
	c.does(exitUsage, "endpoints", "show")
}

func TestTextOfTheTableIsTakenLiterally(t *testing.T) {
	t.Parallel()
	row := store.Registered{Registration: outbox.Registration{ID: "a", URL: "https://a.example/${HOME}", Events: []string{"${HOME}"}, Secrets: []outbox.Secret{"whsec_YW55"}, Settings: json.RawMessage(`{"headers": {"X-A": "${file:/etc/passwd} \\ \"é\u0001f"}}`)}}
	_, err := parseRegistered(defaultConfig(), row.Registration)
	require.ErrorContains(t, err, "headers.X-A", "a control character")
	row.Settings = json.RawMessage(`{"headers": {"X-A": "${file:/etc/passwd} $${X} \\ \"é"}, "timeout": "3s", "retry": {"jitter": 0.10, "dead_on": [400]}}`)
	ep, err := parseRegistered(defaultConfig(), row.Registration)
	require.NoError(t, err)
	require.Equal(t, "https://a.example/${HOME}", ep.URL)
	require.Equal(t, []string{"${HOME}"}, ep.Events)
	require.Equal(t, `${file:/etc/passwd} $${X} \ "é`, ep.Headers["X-A"])
	require.Equal(t, []int{400}, ep.Retry.DeadOn)
	require.Equal(t, outbox.FromTable, ep.Origin)
	row.Tenant = string(rune(maskBase + '{'))
	_, err = parseRegistered(defaultConfig(), row.Registration)
	require.Error(t, err)
}

func TestInvalidRowIsShownWithItsMistake(t *testing.T) {
	t.Parallel()
	c := newCounter(t)
	c.exec(`insert into walhook.endpoints (id, url, settings) values ('bad', 'https://a.example', '{"timeout": "forever"}')`)
	var one shownEndpoint
	c.json(&one, "endpoints", "show", "bad")
	require.Equal(t, outbox.Invalid, one.Status)
	require.Contains(t, one.Reason, "timeout")
	_, errs := c.does(exitFailed, "endpoints", "pause", "bad")
	require.Contains(t, errs, "is invalid: timeout")
	c.does(exitDone, "endpoints", "update", "bad", "--set", "timeout=3s")
	c.json(&one, "endpoints", "show", "bad")
	require.Equal(t, outbox.Enabled, one.Status)
}

func TestRotatedSecretsOverlap(t *testing.T) {
	t.Parallel()
	c := newCounter(t)
	rx := sendertest.New(t, sendertest.Config{})
	var made struct{ ID, Secret string }
	c.json(&made, "endpoints", "add", "--url", rx.URL(), "--id", "a")
	old := made.Secret
	c.json(&made, "endpoints", "rotate-secret", "a", "--overlap", "24h")
	require.NotEqual(t, old, made.Secret)
	require.EqualValues(t, 1, c.ask("select count(*) from walhook.endpoints where secrets = array['"+made.Secret+"', '"+old+"'] and previous_secrets_until between now() + interval '23 h' and now() + interval '25 h'"))
	both := sendertest.New(t, sendertest.Config{Secrets: []string{old, made.Secret}})
	c.does(exitDone, "endpoints", "update", "a", "--url", both.URL())
	c.does(exitDone, "endpoints", "test", "a")
	require.Len(t, both.Requests(), 1)

	c.exec("update walhook.endpoints set previous_secrets_until = now() - interval '1 s'")
	newest := sendertest.New(t, sendertest.Config{Secrets: []string{made.Secret}})
	c.does(exitDone, "endpoints", "update", "a", "--url", newest.URL())
	c.does(exitDone, "endpoints", "test", "a")
	require.Len(t, strings.Fields(newest.Requests()[0].Header.Get("Webhook-Signature")), 1, "the old secret signs no more")
	_, errs := c.does(exitUsage, "endpoints", "rotate-secret", "a", "--overlap", "1")
	require.Contains(t, errs, "has no unit")

	c.does(exitDone, "endpoints", "rotate-secret", "a", "--overlap", "0")
	require.EqualValues(t, 1, c.ask("select count(*) from walhook.endpoints where cardinality(secrets) = 1 and previous_secrets_until is null"))
	c.does(exitDone, "endpoints", "update", "a", "--set", "signing=github")
	_, errs = c.does(exitFailed, "endpoints", "rotate-secret", "a")
	require.Contains(t, errs, "room for one signature")
	c.does(exitDone, "endpoints", "rotate-secret", "a", "--overlap", "0")
}

// The same seen from the receiver of a walhook that runs: what is committed behind the rotation is signed by both secrets
// until the overlap is over, and by the new one alone from then on.
func TestARotatedSecretOfTheTableOverlapsWhileRunning(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := sendertest.New(t, sendertest.Config{})
	c := &counter{b, b.loopback(b.config())}
	p := start(t, c.path).streaming()
	var made struct{ Secret string }
	c.json(&made, "endpoints", "add", "--url", rx.URL(), "--id", "a")
	oldest := made.Secret

	// next is the delivery of one more event.
	n := 0
	next := func() sendertest.Request {
		t.Helper()
		n++
		b.insert(fmt.Sprint("k", n))
		requireAll(t, rx, n)
		return rx.Requests()[n-1]
	}
	verifies := func(q sendertest.Request, secret string) bool {
		wh, err := standardwebhooks.NewWebhook(secret)
		require.NoError(t, err)
		return wh.Verify(q.Body, q.Header) == nil
	}
	q := next()
	require.True(t, verifies(q, oldest))

	c.json(&made, "endpoints", "rotate-secret", "a", "--overlap", "1h")
	second := made.Secret
	q = next()
	require.True(t, verifies(q, oldest) && verifies(q, second), "for the overlap both verify")

	c.json(&made, "endpoints", "rotate-secret", "a", "--overlap", "3s")
	third := made.Secret
	var until time.Time
	require.NoError(t, b.conn().QueryRow(t.Context(), "select previous_secrets_until from walhook.endpoints").Scan(&until))
	for over := false; !over; {
		q = next()
		require.True(t, verifies(q, third), "the new one verifies at all times")
		require.False(t, verifies(q, oldest), "two rotations ago")
		over = !verifies(q, second)
		require.False(t, over && q.At.Before(until), "at %s it still has to verify, until %s", q.At, until)
		require.False(t, !over && !q.Timestamp.Before(until), "signed at %s, later than %s", q.Timestamp, until)
	}
	require.Len(t, strings.Fields(q.Header.Get("Webhook-Signature")), 1)
	require.Zero(t, repeats(rx))
	p.stop()
	for _, secret := range []string{oldest, second, third} {
		require.NotContains(t, p.log.String(), secret[6:])
	}
}

func TestTestShowsRequestAndAnswer(t *testing.T) {
	t.Parallel()
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	c := newCounter(t, endpoint("filed", rx, `, headers: {Authorization: "Bearer s3cret"}`), `{id: denied, url: "http://127.0.0.1:1", network: {deny: [127.0.0.0/8]}}`)
	rx.Script(sendertest.Body(200, "got \x1b[31mBearer s3cret\n"+testSecret+"\nbye"))
	out, _ := c.does(exitDone, "endpoints", "test", "filed")
	for _, line := range []string{
		"> POST " + rx.URL(), "> Authorization: [redacted]", "> webhook-signature: v1,", `> {"type":"walhook.test","timestamp":"`,
		"< HTTP/1.1 200 OK", `< got \x1b[31m[redacted]`, "< [redacted]\n< bye\n", "delivered in",
	} {
		require.Contains(t, out, line)
	}
	require.NotContains(t, out, "s3cret")
	require.NotContains(t, out, testSecret)
	require.Equal(t, "walhook.test", rx.Requests()[0].Type)

	rx.Script(sendertest.Status(500))
	out, errs := c.does(exitFailed, "endpoints", "test", "filed", "-o", "json")
	require.Contains(t, out, `"verdict": "retry"`)
	require.Contains(t, out, `"status": 500`)
	require.Contains(t, errs, "500 Internal Server Error")
	_, errs = c.does(exitFailed, "endpoints", "test", "denied")
	require.Contains(t, errs, "is in network.deny")
}

func TestStatusOfAnEndpointOfTheFileIsTakenUpWhileRunning(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := newReceiver(t)
	c := &counter{b, b.config(endpoint("billing", rx, ""))}
	p := start(t, c.path).streaming()
	b.insert("one")
	requireAll(t, rx, 1)
	c.does(exitDone, "endpoints", "pause", "billing")
	p.log.line(t, "endpoint is paused", "by command")
	b.insert("two")
	eventually(t, "it to be parked", func() bool { return b.ask("select count(*) from walhook.deliveries where reason = 'paused'") == 1 })
	var list struct{ Endpoints []shownEndpoint }
	c.json(&list, "endpoints", "list")
	require.Equal(t, outbox.Paused, list.Endpoints[0].Status)
	require.EqualValues(t, 1, list.Endpoints[0].Parked)
	require.NotNil(t, list.Endpoints[0].Oldest)
	c.does(exitDone, "endpoints", "resume", "billing")
	requireAll(t, rx, 2)
}

func TestCommandsSayWhatIsMissing(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	c := &counter{b, b.config()}
	_, errs := c.does(exitFailed, "endpoints", "list")
	require.Contains(t, errs, "start walhook run, or run the SQL that `walhook init` prints")
	text, err := os.ReadFile(c.path)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(c.path, []byte(strings.Replace(string(text), b.url, "postgres://a:s3cret@127.0.0.1:1/b", 1)), 0o600))
	_, errs = c.does(exitFailed, "deliveries", "list")
	require.Contains(t, errs, "refused")
	require.NotContains(t, errs, "s3cret")
}

func TestEndpointThatA410DisabledIsEnabledWhileRunning(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := newReceiver(t)
	rx.Script(sendertest.Status(410))
	c := &counter{b, b.config(endpoint("billing", rx, ""))}
	p := start(t, c.path).streaming()
	b.insert("one")
	p.log.line(t, "endpoint disabled", "410")
	eventually(t, "it to be written", func() bool { return b.ask("select count(*) from walhook.endpoint_states") == 1 })
	out, _ := c.does(exitDone, "endpoints", "show", "billing")
	require.Regexp(t, `(?m)^reason: +it answered 410 Gone$`, out)
	c.does(exitDone, "endpoints", "enable", "billing")
	p.log.line(t, "endpoint is enabled again", "billing")
	requireAll(t, rx, 1)
}

// A test goes through the same guard as any delivery.
func TestTestOfAnEndpointOfTheTableReachesNothingInside(t *testing.T) {
	t.Parallel()
	rx := sendertest.New(t, sendertest.Config{})
	c := newCounter(t)
	text, err := os.ReadFile(c.path)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(c.path, []byte(strings.Replace(string(text), "127.0.0.0/8", "10.0.0.0/8", 1)), 0o600))
	c.does(exitDone, "endpoints", "add", "--id", "a", "--url", "https://"+rx.Addr())
	out, errs := c.does(exitFailed, "endpoints", "test", "a", "-o", "json")
	require.Contains(t, out, `"reason": "refused_address"`)
	require.Contains(t, errs, "is not public")
	require.Empty(t, rx.Requests())
}

// Whatever command is asked for whatever, no credential of the file or of the table is in its answer.
func TestNoCommandPrintsASecret(t *testing.T) {
	t.Parallel()
	rx := sendertest.New(t, sendertest.Config{Respond: func(q sendertest.Request) sendertest.Answer {
		return sendertest.Body(500, q.Header.Get("Authorization")+q.Header.Get("X-Key")) // an echo
	}})
	own := `, headers: {Authorization: "Bearer s3cret-file"}, retry: {dead_on: [500]}`
	c := newCounter(t, strings.Replace(endpoint("filed", rx, own), rx.URL(), rx.URL()+"?token=s3cret-query", 1))
	c.timed()
	c.past(1, 1)
	c.dead("filed", "e1", "1 hour")
	c.exec(fmt.Sprintf(`insert into walhook.endpoints (id, url, secrets, settings) values
		('rowed', '%s?token=s3cret-query', '{whsec_czNjcmV0}', '{"headers": {"X-Key": "s3cret-header"}, "retry": {"dead_on": [500]}}'),
		('bad', 'https://user:s3cret-password@a.example', '{whsec_czNjcmV0}', '{"auth": {"bearer": "s3cret-bearer"}, "nonesuch": "s3cret-value"}')`, rx.URL()))
	for _, args := range [][]string{
		{"endpoints", "list"},
		{"endpoints", "show", "filed"},
		{"endpoints", "show", "rowed"},
		{"endpoints", "show", "bad"},
		{"endpoints", "test", "filed"},
		{"endpoints", "test", "rowed"},
		{"endpoints", "test", "bad"},
		{"endpoints", "pause", "bad"},
		{"endpoints", "update", "bad", "--tenant", "x"},
		{"endpoints", "update", "rowed", "--set", "headers.X-Key=[s3cret-new]"},
		{"endpoints", "rotate-secret", "bad"},
		{"endpoints", "add", "--url", "https://u:s3cret-password@a.example"},
		{"endpoints", "add", "--url", "https://a.example", "--secret", "s3cret-secret"},
		{"deliveries", "list"},
		{"deliveries", "show", "1"},
		{"deliveries", "retry", "--all", "--dry-run"},
		{"replay", "--since", "2026-01-01T00:00:00Z", "--rate", "1000/s"},
		{"tail", "--endpoint", "bad"},
	} {
		for _, form := range []string{"table", "json"} {
			_, out, errs := walhook(t, append(args, "-c", c.path, "-o", form)...)
			for _, secret := range []string{"s3cret", "czNjcmV0", testSecret} {
				require.NotContains(t, out+errs, secret, args)
			}
		}
	}
}
