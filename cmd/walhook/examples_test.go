package main

import (
	"crypto/hmac"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/sender/sendertest"
)

const (
	exampleSecret = "s3cret-of-an-example"
	exampleToken  = "t0ken-of-an-example"
)

// example is one configuration of docs/examples and the service that it talks to.
type example struct {
	sql    string   // the file with the outbox
	insert []string // what the app does besides what the files say
	env    []string // URL stands for the service's address
	// takes is the service: what it understood of a request that it accepts, or why it refuses it.
	takes func(q sendertest.Request) (understood string, err error)
	pace  func() sendertest.Answer // before takes is asked; nil answers go on
	want  []string                 // all that the service understood
}

// row is the statement that puts an event into the table of outbox.sql.
func outboxRow(eventType, key, payload string) string {
	return fmt.Sprintf("insert into outbox (event_type, aggregate_id, payload) values ('%s', '%s', '%s')", eventType, key, payload)
}

// mac is an HMAC of the request's body.
func mac(algorithm func() hash.Hash, secret string, content ...string) []byte {
	h := hmac.New(algorithm, []byte(secret))
	h.Write([]byte(strings.Join(content, "")))
	return h.Sum(nil)
}

// demand collects why a request is refused.
type demand struct{ errs []error }

func (d *demand) that(ok bool, format string, args ...any) {
	if !ok {
		d.errs = append(d.errs, fmt.Errorf(format, args...))
	}
}

func (d *demand) header(q sendertest.Request, name, want string) {
	got := q.Header.Get(name)
	d.that(got == want, "%s is %q and not %q", name, got, want)
}

// object is the body as JSON, with numbers as they are written.
func (d *demand) object(q sendertest.Request) (o map[string]any) {
	d.header(q, "Content-Type", "application/json")
	dec := json.NewDecoder(strings.NewReader(string(q.Body)))
	dec.UseNumber()
	err := dec.Decode(&o)
	d.that(err == nil, "body: %v", err)
	return o
}

// form is the body as a form.
func (d *demand) form(q sendertest.Request) url.Values {
	d.header(q, "Content-Type", "application/x-www-form-urlencoded")
	v, err := url.ParseQuery(string(q.Body))
	d.that(err == nil, "body: %v", err)
	return v
}

// fields is an object of which every member has to be known.
func (d *demand) fields(o any, known ...string) map[string]any {
	m, ok := o.(map[string]any)
	d.that(ok, "%v is no object", o)
	for name := range m {
		d.that(slices.Contains(known, name), "unknown member %q", name)
	}
	return m
}

func nfeio(q sendertest.Request) (string, error) {
	var d demand
	d.header(q, "X-Hub-Signature", "sha1="+strings.ToUpper(hex.EncodeToString(mac(sha1.New, exampleSecret, string(q.Body)))))
	checksum := md5.Sum(q.Body)
	d.header(q, "Content-MD5", base64.StdEncoding.EncodeToString(checksum[:]))
	d.that(q.Header.Get("X-Hook-Id") != "", "no X-Hook-Id")
	d.header(q, "X-Hook-Attempts", strconv.Itoa(q.Attempt-1))
	switch q.Path {
	case "/nfeio/json":
		o := d.fields(d.object(q), "action", "payload")
		payload, _ := o["payload"].(map[string]any)
		return fmt.Sprint("json ", o["action"], " ", payload["number"], " ", payload["amount"]), errors.Join(d.errs...)
	case "/nfeio/form":
		v := d.form(q)
		return fmt.Sprint("form ", v.Get("action"), " ", v.Get("payload[number]"), " ", v.Get("payload[amount]")), errors.Join(d.errs...)
	}
	return "", errors.New("404")
}

// proviStatuses are the statuses of a checkout.
var proviStatuses = []string{
	"created", "started", "simulated", "filling", "documents_sent", "documents_refused", "in_analysis", "approved", "refused", "waiting_payment", "paid",
	"payment_failed", "payment_refused", "contract_sent", "contract_signed", "contract_expired", "abandoned", "cancelled", "refunded", "chargeback",
	"renegotiated", "finished",
}

func provi(q sendertest.Request) (string, error) {
	var d demand
	d.header(q, "Api-Token", exampleToken)
	o := d.fields(d.object(q), "id", "webhook", "amount", "student", "reason")
	status, _ := o["webhook"].(string)
	d.that(slices.Contains(proviStatuses, status), "unknown status %q", status)
	d.that(o["id"] != nil, "no id")
	if reason, there := o["reason"]; there {
		d.that(reason != nil && reason != "", "an empty reason")
		status += " because " + fmt.Sprint(reason)
	}
	student := d.fields(o["student"], "name", "email")
	return fmt.Sprint(strings.TrimPrefix(q.Path, "/provi/"), " ", status, " ", o["amount"], " ", student["email"]), errors.Join(d.errs...)
}

func activeCampaign(q sendertest.Request) (string, error) {
	var d demand
	d.header(q, "Api-Token", exampleToken)
	contact := d.fields(d.fields(d.object(q), "contact")["contact"], "email", "firstName", "lastName", "phone", "fieldValues")
	for name, value := range contact {
		_, text := value.(string)
		d.that(text, "%s is no text", name)
	}
	id, known := strings.CutPrefix(q.Path, "/api/3/contacts/")
	switch {
	case q.Method == "POST" && q.Path == "/api/3/contact/sync":
		d.that(strings.Contains(fmt.Sprint(contact["email"]), "@"), "no email")
		return fmt.Sprint("sync ", contact["email"]), errors.Join(d.errs...)
	case q.Method == "PUT" && known:
		_, err := strconv.Atoi(id)
		d.that(err == nil, "no contact %q", id)
		return fmt.Sprint("update ", id, " ", slices.Sorted(maps.Keys(contact))), errors.Join(d.errs...)
	}
	return "", errors.New("404")
}

// fiveASecond answers 429 to what comes above five requests a second, as a bucket that fills evenly.
func fiveASecond() func() sendertest.Answer {
	var mu sync.Mutex // guards what follows
	tokens, at := 5.0, time.Now()
	return func() sendertest.Answer {
		mu.Lock()
		defer mu.Unlock()
		now := time.Now()
		tokens, at = min(5, tokens+5*now.Sub(at).Seconds()), now
		if tokens < 1 {
			return sendertest.Status(429, "Retry-After", "1")
		}
		tokens--
		return nil
	}
}

func activeCampaignForm(q sendertest.Request) (string, error) {
	var d demand
	d.that(q.Path == "/activecampaign?token="+exampleToken, "no such path: %s", q.Path)
	v := d.form(q)
	for name := range v {
		d.that(slices.Contains([]string{"type", "date_time", "contact[id]", "contact[email]", "contact[first_name]", "contact[tags]"}, name), "unknown field %q", name)
	}
	_, err := time.Parse(time.RFC3339, v.Get("date_time"))
	d.that(err == nil, "date_time: %v", err)
	return fmt.Sprint(v.Get("type"), " ", v.Get("contact[id]"), " ", v.Get("contact[email]"), " ", v.Get("contact[first_name]"), " ", v.Get("contact[tags]")), errors.Join(d.errs...)
}

func github(q sendertest.Request) (string, error) {
	var d demand
	d.header(q, "X-Hub-Signature-256", "sha256="+hex.EncodeToString(mac(sha256.New, exampleSecret, string(q.Body))))
	d.that(q.Header.Get("X-GitHub-Delivery") != "", "no X-GitHub-Delivery")
	o := d.object(q)
	repository, _ := o["repository"].(map[string]any)
	return fmt.Sprint(q.Header.Get("X-GitHub-Event"), " ", repository["full_name"], " ", o["ref"]), errors.Join(d.errs...)
}

func stripe(q sendertest.Request) (string, error) {
	var d demand
	at, signature, _ := strings.Cut(strings.TrimPrefix(q.Header.Get("Stripe-Signature"), "t="), ",v1=")
	d.that(signature == hex.EncodeToString(mac(sha256.New, testSecret, at, ".", string(q.Body))), "the signature is wrong")
	unix, err := strconv.ParseInt(at, 10, 64)
	d.that(err == nil && q.At.Sub(time.Unix(unix, 0)).Abs() < 5*time.Minute, "signed too long ago")
	o := d.object(q)
	d.that(o["object"] == "event", "object is %v", o["object"])
	d.that(strings.HasPrefix(fmt.Sprint(o["id"]), "evt_"), "id is %v", o["id"])
	created, err := strconv.ParseInt(fmt.Sprint(o["created"]), 10, 64)
	d.that(err == nil && created > 1e9, "created is %v", o["created"])
	data := d.fields(o["data"], "object")
	object, _ := data["object"].(map[string]any)
	return fmt.Sprint(o["type"], " ", object["id"], " ", object["amount_paid"]), errors.Join(d.errs...)
}

func shopify(q sendertest.Request) (string, error) {
	var d demand
	d.header(q, "X-Shopify-Hmac-Sha256", base64.StdEncoding.EncodeToString(mac(sha256.New, exampleSecret, string(q.Body))))
	d.header(q, "X-Shopify-Shop-Domain", "acme.example.com")
	d.that(q.Header.Get("X-Shopify-Webhook-Id") != "", "no X-Shopify-Webhook-Id")
	_, err := time.Parse(time.RFC3339, q.Header.Get("X-Shopify-Triggered-At"))
	d.that(err == nil, "X-Shopify-Triggered-At: %v", err)
	return fmt.Sprint(q.Header.Get("X-Shopify-Topic"), " ", d.object(q)["id"]), errors.Join(d.errs...)
}

// standardWebhooks is a receiver of walhook's own form; the library of Standard Webhooks has judged the signature.
func standardWebhooks(q sendertest.Request) (string, error) {
	var d demand
	d.that(q.Path == "/hooks", "404")
	o := d.fields(d.object(q), "type", "timestamp", "data")
	data, _ := o["data"].(map[string]any)
	return fmt.Sprint(q.ID, " ", o["type"], " ", data["id"], " ", q.Header.Get("traceparent")), errors.Join(append(d.errs, q.Invalid)...)
}

func examples() map[string]example {
	standard := []string{"ORDERS_URL=URL", "ORDERS_SECRET=" + testSecret}
	checkouts := make([]string, 0, len(proviStatuses))
	for i, status := range proviStatuses {
		reason := ""
		if strings.HasSuffix(status, "refused") {
			reason = `, "reason": "income"`
		}
		checkouts = append(checkouts, outboxRow("checkout."+status, "c_7", fmt.Sprintf(`{"id": "c_7", "amount": %d.50, "student": {"name": "Ana", "email": "ana@example.com"}%s}`, 990+i, reason)))
	}
	contacts := []string{outboxRow("customer.registered", "none", `{"first_name": "Nobody"}`)}
	var synced []string
	for i := range 10 {
		contacts = append(contacts,
			outboxRow("customer.registered", fmt.Sprint("a", i), fmt.Sprintf(`{"email": "a%d@example.com", "first_name": "Ana"}`, i)),
			outboxRow("customer.changed", fmt.Sprint("b", i), fmt.Sprintf(`{"activecampaign_id": %d, "phone": "+41 1"}`, i)))
		synced = append(synced, fmt.Sprintf("sync a%d@example.com", i), fmt.Sprintf("update %d [phone]", i))
	}
	return map[string]example{
		"nfeio": {
			sql: "outbox.sql", env: []string{"NFEIO_URL=URL", "NFEIO_SECRET=" + exampleSecret}, takes: nfeio,
			insert: []string{
				outboxRow("product_invoice.cancelled_successfully", "in_7", `{"id": "in_7", "number": 7, "amount": 1e2, "reason": "não há & nada=\"x\""}`),
				outboxRow("customer.created", "c", `{}`),
			},
			want: []string{
				"json service_invoice.issued_successfully 1042 120.50", "form service_invoice.issued_successfully 1042 120.50",
				"json product_invoice.cancelled_successfully 7 100", "form product_invoice.cancelled_successfully 7 100",
			},
		},
		"provi": {
			sql: "outbox.sql", env: []string{"PROVI_URL=URL", "PROVI_TOKEN=" + exampleToken}, takes: provi, insert: checkouts,
			want: []string{
				"enrolment paid 1250.00 ana@example.com", // what the file says
				"enrolment paid 1000.50 ana@example.com", "enrolment contract_sent 1003.50 ana@example.com", "enrolment contract_signed 1004.50 ana@example.com",
				"enrolment contract_expired 1005.50 ana@example.com", "enrolment cancelled 1007.50 ana@example.com",
				"refusals payment_refused because income 1002.50 ana@example.com",
			},
		},
		"activecampaign": {
			sql: "outbox.sql", env: []string{"ACTIVECAMPAIGN_URL=URL", "ACTIVECAMPAIGN_TOKEN=" + exampleToken}, takes: activeCampaign, pace: fiveASecond(),
			insert: contacts, want: append(synced, "sync ana@example.com"),
		},
		"activecampaign-form": {
			sql: "outbox.sql", env: []string{"CRM_URL=URL", "CRM_TOKEN=" + exampleToken}, takes: activeCampaignForm,
			insert: []string{
				outboxRow("customer.changed", "6", `{"id": 6, "email": "zoë&co=1@example.com"}`),
			},
			want: []string{"subscribe 5 ana+shop@example.com Ana new, shop", "update 6 zoë&co=1@example.com  "},
		},
		"github": {
			sql: "outbox.sql", env: []string{"GITHUB_STYLE_URL=URL", "GITHUB_STYLE_SECRET=" + exampleSecret}, takes: github,
			insert: []string{
				outboxRow("release", "shop", `{"ref": "v1", "repository": {"full_name": "acme/shöp"}}`),
				outboxRow("star", "shop", `{}`),
			},
			want: []string{"push acme/shop refs/heads/main", "release acme/shöp v1"},
		},
		"stripe": {
			sql: "outbox.sql", env: []string{"STRIPE_STYLE_URL=URL", "STRIPE_STYLE_SECRET=" + testSecret}, takes: stripe,
			insert: []string{
				outboxRow("customer.created", "c", `{}`),
			},
			want: []string{"invoice.paid in_1042 12050"},
		},
		"shopify": {
			sql: "outbox.sql", env: []string{"SHOPIFY_STYLE_URL=URL", "SHOPIFY_STYLE_SECRET=" + exampleSecret}, takes: shopify,
			insert: []string{
				outboxRow("app.uninstalled", "1", `{"id": 12345678901234567890123}`),
				outboxRow("app.installed", "1", `{}`),
			},
			want: []string{"orders/create 820982911946154508", "app/uninstalled 12345678901234567890123"},
		},
		"debezium": {
			sql: "debezium.sql", env: standard, takes: standardWebhooks,
			want: []string{"a4b1ae63-1b5c-4fe0-8f3a-6f0a2c9f7d11 order.OrderCreated 42 ", "5d9d1b6c-93a5-4b1e-8d53-0f4c6b1f0a22 order.OrderShipped 42 "},
		},
		"watermill": {
			sql: "watermill.sql", env: standard, takes: standardWebhooks,
			want: []string{
				"a4b1ae63-1b5c-4fe0-8f3a-6f0a2c9f7d11 order.created 42 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
				"5d9d1b6c-93a5-4b1e-8d53-0f4c6b1f0a22 order.shipped 42 ",
			},
		},
		"messages": {
			sql: "messages.sql", env: standard, takes: standardWebhooks,
			want: []string{"o-42-1 order.created 42 ", "o-42-2 order.shipped 42 "},
		},
	}
}

// Each configuration of docs/examples, as it stands there, beside a receiver that refuses what the real one would.
func TestEveryExampleIsAcceptedByTheServiceItIsFor(t *testing.T) {
	t.Parallel()
	dir := filepath.Join("..", "..", "docs", "examples")
	files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	require.NoError(t, err)
	all := examples()
	require.Len(t, files, len(all), "every file has its test")
	readme, err := os.ReadFile(filepath.Join(dir, "README.md"))
	require.NoError(t, err)
	for name, e := range all {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			require.Contains(t, string(readme), "("+name+".yaml)")
			text, err := os.ReadFile(filepath.Join(dir, name+".yaml"))
			require.NoError(t, err)
			sql, err := os.ReadFile(filepath.Join(dir, e.sql))
			require.NoError(t, err)
			require.Contains(t, string(text), e.sql)
			table, does, _ := strings.Cut(string(sql), "-- What the app does:\n")
			if _, comment, ok := strings.Cut(string(text), "#   insert into "); ok {
				comment, _, ok = strings.Cut(comment, ";\n")
				require.True(t, ok)
				does = "insert into " + strings.ReplaceAll(comment, "\n#", "\n")
			}
			require.NotEmpty(t, does)

			b := newBench(t)
			b.exec("drop table outbox") // of the bench: the example brings its own
			b.exec(table)
			secrets := []string(nil)
			if slices.Contains(e.env, "ORDERS_SECRET="+testSecret) {
				secrets = []string{testSecret}
			}
			rx := sendertest.New(t, sendertest.Config{Secrets: secrets, Respond: func(q sendertest.Request) sendertest.Answer {
				if e.pace != nil {
					if refused := e.pace(); refused != nil {
						return refused
					}
				}
				if _, err := e.takes(q); err != nil {
					return sendertest.Body(422, err.Error())
				}
				return sendertest.Body(200, `{"ok":true}`)
			}})
			base := "http://" + rx.Addr()
			config := filepath.Join(b.dir, "walhook.yaml")
			text = fmt.Appendf(text, "\ncdc: {slot: %s, publication: %[1]s}\nserver: {listen: \"127.0.0.1:0\"}\n", b.slot) // what tests side by side need of their own
			require.NoError(t, os.WriteFile(config, text, 0o600))
			env := map[string]string{"WALHOOK_DATABASE_URL": b.url}
			for _, v := range e.env {
				name, value, _ := strings.Cut(v, "=")
				env[name] = value
				if value == "URL" {
					env[name] = base
				}
			}
			code, out, errs := runWith(t, env, "check", "--config", config)
			require.Equal(t, exitDone, code, out+errs)
			p := startBy(t, `exec "$0" run --config "$1"`, config, func(cmd *exec.Cmd) {
				for name, value := range env {
					cmd.Env = append(cmd.Env, name+"="+value)
				}
			})
			began := time.Now()
			for _, statement := range append([]string{does}, e.insert...) {
				b.exec(statement)
			}
			requireAtLeast(t, rx, len(e.want))
			eventually(t, "the service to have taken all", func() bool { return len(succeeded(rx)) >= len(e.want) })
			eventually(t, "nothing to wait any more", func() bool { return b.ask("select count(*) from walhook.deliveries where state <> 'dead'") == 0 })
			p.stop()
			require.Zero(t, b.ask("select count(*) from walhook.deliveries"))

			var understood []string
			var last time.Time
			for _, q := range succeeded(rx) {
				what, err := e.takes(q)
				require.NoError(t, err)
				understood = append(understood, what)
				last = q.At
				// The receiver does look: another one's request is refused.
				q.Body = append(slices.Clone(q.Body), ' ')
				q.Header = q.Header.Clone()
				q.Header.Set("Api-Token", "another")
				q.Path = strings.Replace(q.Path, exampleToken, "another", 1)
				if secrets == nil {
					_, err = e.takes(q)
					require.Error(t, err)
				}
			}
			require.ElementsMatch(t, e.want, understood)
			if e.pace != nil { // five a second: the turn of the last one comes 200 ms after that of each before it
				require.GreaterOrEqual(t, last.Sub(began), time.Duration(len(e.want)-1)*200*time.Millisecond)
			}
			for _, q := range rx.Requests() {
				require.Contains(t, []int{200, 429}, q.Status)
			}
			for _, secret := range []string{exampleSecret, exampleToken, testSecret} {
				require.NotContains(t, p.log.String(), secret)
			}
		})
	}
}
