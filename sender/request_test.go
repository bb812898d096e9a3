package sender

import (
	"bytes"
	"encoding/json"
	"flag"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// A bubble's clock begins at midnight UTC of 2000-01-01, so even the signatures are golden.
func TestBytesOfARequestAreGolden(t *testing.T) {
	for name, c := range map[string]struct {
		endpoint func(*outbox.Endpoint)
		event    func(*outbox.Event)
		number   int
	}{
		"standard":          {},
		"standard_unsigned": {endpoint: func(e *outbox.Endpoint) { e.Secrets = nil }},
		"standard_two_secrets": {endpoint: func(e *outbox.Endpoint) {
			e.Secrets = []outbox.Secret{hmacSecret, edSecret}
		}, number: 7},
		"standard_odd_type_and_payload": {event: func(e *outbox.Event) {
			e.Type = "a<b>&\"\\\u2028ü\n"
			e.Data = []byte("  { \"n\": 1.00, \"n\": 12345678901234567890123456789012345678901 }\n")
			e.Time = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
		}},
		"standard_null": {event: func(e *outbox.Event) { e.Data = []byte("null") }},
		"standard_traceparent": {event: func(e *outbox.Event) {
			e.Headers = []byte(`{"x": 1, "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}`)
		}},
		"raw": {endpoint: func(e *outbox.Endpoint) { e.Format = outbox.FormatRaw }},
		"raw_text": {endpoint: func(e *outbox.Endpoint) { e.Format = outbox.FormatRaw }, event: func(e *outbox.Event) {
			e.JSON, e.Data = false, []byte("grüezi")
		}},
		"github":  {endpoint: plain("github")},
		"stripe":  {endpoint: plain("stripe"), number: 2},
		"shopify": {endpoint: plain("shopify")},
		"nfeio":   {endpoint: plain("nfeio"), number: 3},
		"none": {endpoint: func(e *outbox.Endpoint) {
			e.Secrets, e.Signing = []outbox.Secret{hmacSecret}, signing(outbox.SchemeNone)
		}},
		"several_schemes": {endpoint: func(e *outbox.Endpoint) {
			e.Secrets, e.Signing = []outbox.Secret{hmacSecret}, append(signing("standard", "github", "stripe", "shopify"), custom("X-Sig"))
		}},
		"custom": {endpoint: func(e *outbox.Endpoint) {
			own := outbox.Signing{
				Scheme: outbox.SchemeCustom, Algorithm: "sha512", Encoding: "base64", Header: "x-acme-HMAC", Prefix: "v0=", Content: "v0:{id}:{timestamp}:{body}",
			}
			e.Secrets, e.Signing = []outbox.Secret{plainSecret, "older"}, []outbox.Signing{own}
		}},
		"cloudevents": {endpoint: cloudEvents, event: func(e *outbox.Event) {
			e.Position = cdc.Position{Commit: 0x16B374D848, Ordinal: 3}
		}},
		"cloudevents_bytes": {endpoint: cloudEvents, event: func(e *outbox.Event) {
			e.JSON, e.Data, e.Key = false, []byte{0, 0xff, '"'}, ""
		}},
		"cloudevents_binary": {endpoint: cloudEventsBinary, event: func(e *outbox.Event) {
			e.Position = cdc.Position{Commit: 0x16B374D848, Ordinal: 3}
			e.Type, e.Key = "größe \"50%\"\n", "Euro € 😀"
		}},
		"cloudevents_binary_text": {endpoint: cloudEventsBinary, event: func(e *outbox.Event) {
			e.JSON, e.Data, e.Key = false, []byte("grüezi"), ""
		}},
		"headers": {endpoint: func(e *outbox.Endpoint) {
			e.Headers = map[string]string{"X-Env": "prod", "authorization": "Bearer abc", "user-agent": "acme/9"}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var wire bytes.Buffer
				client := setup(t, fake(func(r *http.Request) (*http.Response, error) {
					require.NoError(t, r.Write(&wire))
					return answer(200)
				}))
				ev, to := event(), endpoint("https://billing.example.com/hooks?tenant=7", signed)
				if c.event != nil {
					c.event(ev)
				}
				if c.endpoint != nil {
					c.endpoint(to)
				}
				o := client.Send(t.Context(), outbox.Attempt{Event: ev, Endpoint: to, Number: max(1, c.number)})
				require.Equal(t, outbox.Outcome{Verdict: outbox.Delivered, Status: 200}, o)
				golden(t, name+".http", wire.Bytes())
			})
		})
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		require.NoError(t, os.MkdirAll("testdata", 0o755))
		require.NoError(t, os.WriteFile(path, got, 0o644))
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, string(want), string(got))
}

func TestWhatCannotBeSentDiesWithoutARequest(t *testing.T) {
	client := setup(t, fake(func(*http.Request) (*http.Response, error) {
		t.Error("a request was made")
		return answer(200)
	}))
	for name, c := range map[string]struct {
		event    func(*outbox.Event)
		endpoint func(*outbox.Endpoint)
		reason   outbox.Reason
	}{
		"too large":                     {event: func(e *outbox.Event) { e.Data = []byte(`"` + strings.Repeat("x", 1<<20) + `"`) }, reason: outbox.ReasonTooLarge},
		"not JSON":                      {event: func(e *outbox.Event) { e.JSON, e.Data = false, []byte("hello") }, reason: outbox.ReasonNotJSON},
		"empty as JSON":                 {event: func(e *outbox.Event) { e.Data = nil }, reason: outbox.ReasonNotJSON},
		"id with a break":               {event: func(e *outbox.Event) { e.ID = "a\r\nx: y" }, reason: outbox.ReasonBadRequest},
		"id with a dot":                 {event: func(e *outbox.Event) { e.ID = "a.b" }, reason: outbox.ReasonBadRequest},
		"no id":                         {event: func(e *outbox.Event) { e.ID = "" }, reason: outbox.ReasonBadRequest},
		"year 10000":                    {event: func(e *outbox.Event) { e.Time = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) }, reason: outbox.ReasonBadRequest},
		"cloudevents, empty as JSON":    {event: func(e *outbox.Event) { e.Data = nil }, endpoint: cloudEvents, reason: outbox.ReasonNotJSON},
		"cloudevents, no type":          {event: func(e *outbox.Event) { e.Type = "" }, endpoint: cloudEvents, reason: outbox.ReasonBadRequest},
		"cloudevents, year 10000":       {event: func(e *outbox.Event) { e.Time = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) }, endpoint: cloudEvents, reason: outbox.ReasonBadRequest},
		"cloudevents, large in base64":  {event: func(e *outbox.Event) { e.JSON, e.Data = false, make([]byte, 1<<20-1000) }, endpoint: cloudEvents, reason: outbox.ReasonTooLarge},
		"cloudevents-binary, no type":   {event: func(e *outbox.Event) { e.Type = "" }, endpoint: cloudEventsBinary, reason: outbox.ReasonBadRequest},
		"cloudevents-binary, year -1":   {event: func(e *outbox.Event) { e.Time = time.Date(-1, 1, 1, 0, 0, 0, 0, time.UTC) }, endpoint: cloudEventsBinary, reason: outbox.ReasonBadRequest},
		"cloudevents-binary, too large": {event: func(e *outbox.Event) { e.Data = make([]byte, 1<<20+1) }, endpoint: cloudEventsBinary, reason: outbox.ReasonTooLarge},
		"raw too large": {
			event: func(e *outbox.Event) { e.Data = make([]byte, 101) }, reason: outbox.ReasonTooLarge,
			endpoint: func(e *outbox.Endpoint) { e.Format, e.MaxPayload = outbox.FormatRaw, 100 },
		},
	} {
		t.Run(name, func(t *testing.T) {
			ev, to := event(), endpoint("https://x.example/")
			c.event(ev)
			if c.endpoint != nil {
				c.endpoint(to)
			}
			o := client.Send(t.Context(), outbox.Attempt{Event: ev, Endpoint: to, Number: 1})
			require.Equal(t, outbox.Dead, o.Verdict)
			require.Equal(t, c.reason, o.Reason)
			require.NotEmpty(t, o.Detail)
		})
	}
}

func TestABodyAtTheLimitIsSent(t *testing.T) {
	client := setup(t, fake(func(*http.Request) (*http.Response, error) { return answer(200) }))
	ev := event()
	ev.Data = make([]byte, 100)
	to := endpoint("https://x.example/", func(e *outbox.Endpoint) { e.Format, e.MaxPayload = outbox.FormatRaw, 100 })
	require.Equal(t, outbox.Delivered, client.Send(t.Context(), outbox.Attempt{Event: ev, Endpoint: to, Number: 1}).Verdict)
}

func TestBodyCanBeReadAgainInAnySlices(t *testing.T) {
	b := &body{parts: [3][]byte{[]byte("head"), []byte("payload"), []byte("}")}}
	for _, size := range []int{1, 2, 3, 5, 64} {
		r, err := b.open()
		require.NoError(t, err)
		var got bytes.Buffer
		_, err = io.CopyBuffer(struct{ io.Writer }{&got}, r, make([]byte, size))
		require.NoError(t, err)
		require.Equal(t, "headpayload}", got.String())
	}
}

func TestOnlyAValidTraceparentIsPassedOn(t *testing.T) {
	const good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	for headers, want := range map[string]string{
		``:                                "",
		`{}`:                              "",
		`{"traceparent": "` + good + `"}`: good,
		`{"Traceparent": "` + good + `"}`: good,
		`{"a": [1], "traceparent": "` + good + `", "b": {"traceparent": 5}}`:         good,
		`{"traceparent": "cc` + good[2:] + `-what-comes"}`:                           "cc" + good[2:],
		`{"traceparent": "` + good + `-x"}`:                                          "",
		`{"traceparent": "ff` + good[2:] + `"}`:                                      "",
		`{"traceparent": "` + strings.ToUpper(good) + `"}`:                           "",
		`{"traceparent": "00-00000000000000000000000000000000-b7ad6b7169203331-01"}`: "",
		`{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01"}`: "",
		`{"traceparent": "` + good + `\r\nx: y"}`:                                    "",
		`{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-"}`:   "",
		`{"traceparent": "00-0af7651916cd43dd8448eb211c80319-cb7ad6b7169203331-01"}`: "",
		`{"traceparent": 7}`: "",
		`traceparent`:        "",
	} {
		require.Equal(t, want, traceparent([]byte(headers)), headers)
	}
}

// Whatever a type holds, the body stays valid JSON with the payload untouched.
func FuzzEnvelope(f *testing.F) {
	f.Add("invoice.paid", `{"a":1}`)
	f.Add("a\"\\\x00\u2028<>&", `[1,2,"ü"]`)
	f.Add("\xff\xfe", `null`)
	f.Fuzz(func(t *testing.T, typ, data string) {
		ev := event()
		ev.Type, ev.Data, ev.JSON = typ, []byte(data), json.Valid([]byte(data))
		b, _, bad := (&target{endpoint: endpoint("https://x.example/")}).render(ev, nil)
		if bad != nil {
			require.False(t, ev.JSON)
			return
		}
		r, _ := b.open()
		all, err := io.ReadAll(r)
		require.NoError(t, err)
		require.Equal(t, b.size(), int64(len(all)))
		require.True(t, json.Valid(all), "%q", all)
		require.True(t, bytes.Contains(all, []byte(`,"data":`+data+`}`)))
		var back struct{ Type, Timestamp string }
		require.NoError(t, json.Unmarshal(all, &back))
		if utf8.ValidString(typ) {
			require.Equal(t, typ, back.Type)
		}
		require.Equal(t, "2026-03-01T11:30:15.123456Z", back.Timestamp)
	})
}
