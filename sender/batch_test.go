package sender

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	cloudeventshttp "github.com/cloudevents/sdk-go/v2/protocol/http"
	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/sender/sendertest"
)

func batched(e *outbox.Endpoint) { e.Batch.MaxEvents = 100 }

// eventsOf are several, each changed by its turn.
func eventsOf(n int, change ...func(i int, e *outbox.Event)) (all []*outbox.Event) {
	for i := range n {
		e := event()
		e.ID, e.Data = fmt.Sprintf("evt_%d", i+1), fmt.Appendf(nil, `{"n": %d.0}`, i+1)
		e.Position = cdc.Position{Commit: 0x16B374D848, Ordinal: uint64(i + 1)}
		for _, f := range change {
			f(i, e)
		}
		all = append(all, e)
	}
	return all
}

func attemptOf(to *outbox.Endpoint, events ...*outbox.Event) outbox.Attempt {
	return outbox.Attempt{Event: events[0], Batch: events, Endpoint: to, Number: 2}
}

func TestBytesOfABatchAreGolden(t *testing.T) {
	for name, c := range map[string]struct {
		format outbox.Format
		n      int
	}{
		"batch_standard":    {outbox.FormatStandard, 3},
		"batch_of_one":      {outbox.FormatStandard, 1},
		"batch_raw":         {outbox.FormatRaw, 3},
		"batch_cloudevents": {outbox.FormatCloudEvents, 2},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var wire bytes.Buffer
				client := setup(t, fake(func(r *http.Request) (*http.Response, error) {
					require.NoError(t, r.Write(&wire))
					return answer(200)
				}))
				to := endpoint("https://billing.example.com/hooks", signed, batched, func(e *outbox.Endpoint) { e.Format = c.format })
				o := client.Send(t.Context(), attemptOf(to, eventsOf(c.n, func(i int, e *outbox.Event) {
					if i == 1 {
						e.Type, e.Data = "a<b>\"ü", []byte(" [1.00,\n null] ")
					}
					e.Headers = []byte(`{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}`)
				})...))
				require.Equal(t, outbox.Outcome{Verdict: outbox.Delivered, Status: 200}, o)
				golden(t, name+".http", wire.Bytes())
			})
		})
	}
}

// A receiver with a real socket, and the verifier that others use.
func TestABatchIsSignedAndItsEventsAreInIt(t *testing.T) {
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{hmacSecret}})
	client := setup(t, nil)
	events := eventsOf(100, func(i int, e *outbox.Event) {
		if i%7 == 0 {
			e.Data = []byte(`"` + strings.Repeat("ü", 10_000) + `"`)
		}
	})
	o := client.Send(t.Context(), attemptOf(endpoint(rx.URL(), signed, batched), events...))
	require.Equal(t, outbox.Outcome{Verdict: outbox.Delivered, Status: 204}, o)
	got := rx.Requests()[0]
	require.NoError(t, got.Invalid)
	verifier, err := standardwebhooks.NewWebhook(hmacSecret)
	require.NoError(t, err)
	require.NoError(t, verifier.VerifyIgnoringTimestamp(got.Body, got.Header))
	require.Regexp(t, `^batch_[0-9a-f]{32}$`, got.Header.Get("webhook-id"))
	require.Equal(t, "2", got.Header.Get("webhook-attempt"))
	require.Empty(t, got.Header.Get("traceparent"))
	var elements []struct {
		ID, Type, Timestamp string
		Data                json.RawMessage
	}
	require.NoError(t, json.Unmarshal(got.Body, &elements))
	require.Len(t, elements, 100)
	for i, e := range elements {
		require.Equal(t, events[i].ID, e.ID)
		require.Equal(t, events[i].Type, e.Type)
		require.Equal(t, "2026-03-01T11:30:15.123456Z", e.Timestamp)
		require.Equal(t, string(events[i].Data), string(e.Data))
	}
}

// The specification's SDK finds each event in the batch.
func TestCloudEventsSDKReadsABatch(t *testing.T) {
	var events []*outbox.Event
	var header http.Header
	var body []byte
	client := setup(t, fake(func(r *http.Request) (*http.Response, error) {
		header = r.Header.Clone()
		var err error
		body, err = io.ReadAll(r.Body)
		require.NoError(t, err)
		return answer(200)
	}))
	events = eventsOf(5, func(i int, e *outbox.Event) {
		if i == 2 {
			e.JSON, e.Data = false, []byte{0, 0xff, '"'}
		}
	})
	o := client.Send(t.Context(), attemptOf(endpoint("https://x.example/", cloudEvents, batched), events...))
	require.Equal(t, outbox.Delivered, o.Verdict)
	require.True(t, cloudeventshttp.IsHTTPBatch(header))
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://x.example/", bytes.NewReader(body))
	require.NoError(t, err)
	req.Header = header
	read, err := cloudeventshttp.NewEventsFromHTTPRequest(req)
	require.NoError(t, err)
	require.Len(t, read, 5)
	for i, ev := range read {
		require.NoError(t, ev.Validate())
		require.Equal(t, events[i].ID, ev.ID())
		require.Equal(t, string(events[i].Data), string(ev.Data()))
		require.Equal(t, fmt.Sprintf("00000016b374d848-%016x", i+1), ev.Extensions()["sequence"])
	}
}

func TestTheIDOfABatchIsThatOfItsEvents(t *testing.T) {
	to := &target{endpoint: endpoint("https://x.example/", batched)}
	a := to.batch(eventsOf(3))
	require.Equal(t, a.id, to.batch(eventsOf(3, func(_ int, e *outbox.Event) { e.Type = "other" })).id)
	seen := map[string]bool{a.id: true}
	for _, events := range [][]*outbox.Event{eventsOf(2), eventsOf(4), eventsOf(1), {eventsOf(3)[2], eventsOf(3)[1], eventsOf(3)[0]}} {
		id := to.batch(events).id
		require.False(t, seen[id])
		seen[id] = true
	}
}

// One that no request can be made of dies alone, by whatever it lacks, and the rest goes.
func TestAnUnfitEventIsLeftOutOfItsBatch(t *testing.T) {
	notJSONAtAll := func(e *outbox.Event) { e.JSON, e.Data = false, []byte("hello") }
	large := func(e *outbox.Event) { e.Data = []byte(`"` + strings.Repeat("x", 3000) + `"`) }
	for name, c := range map[string]struct {
		format outbox.Format
		spoil  func(*outbox.Event)
		reason outbox.Reason
	}{
		"not JSON":              {outbox.FormatStandard, notJSONAtAll, outbox.ReasonNotJSON},
		"raw, not JSON":         {outbox.FormatRaw, notJSONAtAll, outbox.ReasonNotJSON},
		"raw, empty":            {outbox.FormatRaw, func(e *outbox.Event) { e.Data = nil }, outbox.ReasonNotJSON},
		"too large":             {outbox.FormatStandard, large, outbox.ReasonTooLarge},
		"raw, too large":        {outbox.FormatRaw, large, outbox.ReasonTooLarge},
		"id with a dot":         {outbox.FormatStandard, func(e *outbox.Event) { e.ID = "a.b" }, outbox.ReasonBadRequest},
		"raw, id with a break":  {outbox.FormatRaw, func(e *outbox.Event) { e.ID = "a\r\nb" }, outbox.ReasonBadRequest},
		"year 10000":            {outbox.FormatStandard, func(e *outbox.Event) { e.Time = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) }, outbox.ReasonBadRequest},
		"cloudevents, no type":  {outbox.FormatCloudEvents, func(e *outbox.Event) { e.Type = "" }, outbox.ReasonBadRequest},
		"cloudevents, too much": {outbox.FormatCloudEvents, large, outbox.ReasonTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			bodies := 0
			client := setup(t, fake(func(r *http.Request) (*http.Response, error) {
				bodies++
				var elements []json.RawMessage
				require.NoError(t, json.NewDecoder(r.Body).Decode(&elements))
				require.Len(t, elements, 3)
				return answer(503, "Retry-After", "7")
			}))
			to := endpoint("https://x.example/", batched, func(e *outbox.Endpoint) { e.Format, e.Batch.MaxBytes = c.format, 2000 })
			events := eventsOf(5, func(i int, e *outbox.Event) {
				if i == 0 || i == 3 {
					c.spoil(e)
				}
			})
			o := client.Send(t.Context(), attemptOf(to, events...))
			require.Equal(t, 1, bodies)
			require.Equal(t, outbox.Retry, o.Verdict)
			require.Equal(t, 7*time.Second, o.RetryAfter)
			require.Len(t, o.Apart.Unfit, 2)
			require.Empty(t, o.Apart.Left)
			for i, u := range o.Apart.Unfit {
				require.Same(t, events[3*i], u.Event)
				require.Equal(t, c.reason, u.Reason)
				require.NotEmpty(t, u.Detail)
			}

			o = client.Send(t.Context(), attemptOf(to, events[0], events[3]))
			require.Equal(t, 1, bodies, "nothing is left to send")
			require.Equal(t, outbox.Dead, o.Verdict)
			require.Equal(t, c.reason, o.Reason)
			require.Len(t, o.Apart.Unfit, 2)
		})
	}
}

func TestABatchIsNeverLargerThanItsLimits(t *testing.T) {
	for name, set := range map[string]func(*outbox.Endpoint){
		"max_bytes":   func(e *outbox.Endpoint) { e.Batch.MaxBytes = 1000 },
		"max_payload": func(e *outbox.Endpoint) { e.MaxPayload = 1000 },
		"ids":         func(e *outbox.Endpoint) { e.Format = outbox.FormatRaw },
	} {
		t.Run(name, func(t *testing.T) {
			to := &target{endpoint: endpoint("https://x.example/", batched, set)}
			for size := 1; size < 900; size += 7 {
				events := eventsOf(12, func(_ int, e *outbox.Event) {
					e.Data = []byte(`"` + strings.Repeat("x", size) + `"`)
					if name == "ids" {
						e.ID += strings.Repeat("i", size)
					}
				})
				b := to.batch(events)
				require.True(t, json.Valid(b.body.parts[0]))
				if name != "ids" {
					require.LessOrEqual(t, b.body.size(), int64(1000))
				}
				require.LessOrEqual(t, len(b.ids), outbox.BatchIDs)
				if len(b.events) == 12 {
					require.Nil(t, b.apart)
					continue
				}
				if b.apart.Unfit != nil {
					require.Greater(t, size, 900-100)
					continue
				}
				require.Equal(t, events[len(b.events):], b.apart.Left)
				require.NotEmpty(t, b.events)
			}
		})
	}
}

// Whatever types, ids and payloads hold, a batch is valid JSON with as many elements as events.
func FuzzBatch(f *testing.F) {
	f.Add("invoice.paid", "evt", `{"a":1}`, "", "evt2", "1")
	f.Add("a\"\\\x00\u2028<>&", "é", "\xff", "b", "\"", " null ")
	f.Fuzz(func(t *testing.T, typ1, id1, data1, typ2, id2, data2 string) {
		events := eventsOf(2)
		for i, s := range [][3]string{{typ1, id1, data1}, {typ2, id2, data2}} {
			e := events[i]
			e.Type, e.ID, e.Data, e.JSON = s[0], s[1], []byte(s[2]), json.Valid([]byte(s[2]))
		}
		for _, format := range []outbox.Format{outbox.FormatStandard, outbox.FormatRaw, outbox.FormatCloudEvents} {
			to := &target{endpoint: endpoint("https://x.example/", batched), source: "/walhook"}
			to.endpoint.Format = format
			b := to.batch(events)
			var elements []json.RawMessage
			require.NoError(t, json.Unmarshal(b.body.parts[0], &elements))
			require.Len(t, elements, len(b.events))
			unfit := 0
			if b.apart != nil {
				unfit = len(b.apart.Unfit)
			}
			require.Equal(t, 2, len(b.events)+unfit)
			require.True(t, validHeaderValue(b.ids))
		}
	})
}

// BenchmarkBatch is a batch without a network.
func BenchmarkBatch(b *testing.B) {
	c, err := New(Config{RoundTripper: fake(func(*http.Request) (*http.Response, error) { return answer(204) })})
	require.NoError(b, err)
	a := attemptOf(endpoint("https://x.example/", signed, batched), eventsOf(100)...)
	b.ReportAllocs()
	for b.Loop() {
		c.Send(b.Context(), a)
	}
}
