package sender

import (
	"bytes"
	"encoding/json"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/binding"
	cloudeventshttp "github.com/cloudevents/sdk-go/v2/protocol/http"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
)

// The SDK of the specification's authors reads what we send, and finds the event that it was.
func TestCloudEventsSDKReadsEveryEvent(t *testing.T) {
	at := cdc.Position{Commit: 0x16B374D848, Ordinal: 3}
	for name, c := range map[string]struct {
		change   func(*outbox.Event)
		dataType string
	}{
		"plain":    {func(*outbox.Event) {}, "application/json"},
		"null":     {func(e *outbox.Event) { e.Data = []byte("null") }, "application/json"},
		"odd JSON": {func(e *outbox.Event) { e.Data = []byte(` [1.00, "\u0000é", 12345678901234567890123] `) }, "application/json"},
		"large":    {func(e *outbox.Event) { e.Data = []byte(`"` + strings.Repeat("ü", 200_000) + `"`) }, "application/json"},
		"text":     {func(e *outbox.Event) { e.JSON, e.Data = false, []byte("grüezi") }, "text/plain; charset=utf-8"},
		"bytes":    {func(e *outbox.Event) { e.JSON, e.Data = false, []byte{0, 0xff, '"', '%'} }, "application/octet-stream"},
		"odd names": {func(e *outbox.Event) {
			e.Type, e.Key, e.ID = `größe "50%" \ €😀`, ` a "b" %20 `, "order:50%25:7"
		}, "application/json"},
		"no key, no position": {func(e *outbox.Event) { e.Key, e.Position = "", cdc.Position{} }, "application/json"},
		"no time of its own":  {func(e *outbox.Event) { e.Time, e.Commit = time.Time{}, time.Unix(1e9, 5000) }, "application/json"},
	} {
		for mode, format := range map[string]func(*outbox.Endpoint){"structured": cloudEvents, "binary": cloudEventsBinary} {
			t.Run(name+", "+mode, func(t *testing.T) {
				var want outbox.Event
				got := sentTo(t, endpoint("https://x.example/", format), func(e *outbox.Event) {
					e.Position = at
					c.change(e)
					want = *e
				})
				req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://x.example/", bytes.NewReader(got.body))
				require.NoError(t, err)
				for name, value := range got.header {
					req.Header.Set(name, value)
				}

				message := cloudeventshttp.NewMessageFromHttpRequest(req)
				encoding := map[string]binding.Encoding{"structured": binding.EncodingStructured, "binary": binding.EncodingBinary}[mode]
				require.Equal(t, encoding, message.ReadEncoding())
				ev, err := binding.ToEvent(t.Context(), message)
				require.NoError(t, err)
				require.NoError(t, ev.Validate())
				require.Equal(t, "1.0", ev.SpecVersion())
				decoded := func(s string) string { return s }
				if mode == "binary" { // the SDK leaves to its user what the binding has receivers do
					decoded = func(s string) string {
						s, err := url.PathUnescape(s)
						require.NoError(t, err)
						return s
					}
				}
				require.Equal(t, want.ID, decoded(ev.ID()))
				require.Equal(t, want.ID, got.header["webhook-id"])
				require.Equal(t, "/walhook/default/walhook", ev.Source())
				require.Equal(t, want.Type, decoded(ev.Type()))
				require.Equal(t, c.dataType, ev.DataContentType())
				require.Empty(t, ev.Subject())
				if want.Time.IsZero() {
					want.Time = want.Commit
				}
				require.True(t, want.Time.Equal(ev.Time()), ev.Time())
				if data := ev.Data(); mode == "structured" && want.JSON {
					require.Equal(t, string(bytes.TrimSpace(want.Data)), string(bytes.TrimSpace(data)), "the SDK cuts off what is around a value")
					require.True(t, bytes.HasSuffix(got.body, append(append([]byte(`"data":`), want.Data...), '}')))
				} else {
					require.Equal(t, string(want.Data), string(data))
				}
				extensions := map[string]string{}
				if want.Key != "" {
					extensions["partitionkey"], extensions["sequence"] = want.Key, "00000016b374d848-0000000000000003"
				}
				require.Equal(t, len(extensions), len(ev.Extensions()))
				for name, value := range extensions {
					got, text := ev.Extensions()[name].(string)
					require.True(t, text, name)
					require.Equal(t, value, decoded(got), name)
				}
			})
		}
	}
}

func TestSequencesSortAsTheirPositions(t *testing.T) {
	var positions []cdc.Position
	for _, commit := range []cdc.LSN{1, 9, 0x10, 0xff, 0x100, 1 << 32, math.MaxUint64} {
		for _, ordinal := range []uint64{0, 1, 9, 10, 0xffff, 1 << 20, 1 << 32, math.MaxUint64} {
			positions = append(positions, cdc.Position{Commit: commit, Ordinal: ordinal})
		}
	}
	require.True(t, slices.IsSortedFunc(positions, cdc.Position.Compare))
	require.True(t, slices.IsSortedFunc(positions, func(p, q cdc.Position) int { return strings.Compare(sequence(p), sequence(q)) }))
	require.Empty(t, sequence(cdc.Position{}))
}

// A large payload is in the request once: the event's own bytes.
func TestALargePayloadIsNotCopied(t *testing.T) {
	ev := event()
	ev.Data = []byte(`"` + strings.Repeat("x", 1<<19) + `"`)
	for _, format := range []outbox.Format{outbox.FormatStandard, outbox.FormatRaw, outbox.FormatCloudEvents, outbox.FormatCloudEventsBinary} {
		to := &target{endpoint: endpoint("https://x.example/", func(e *outbox.Endpoint) { e.Format = format })}
		b, _, bad := to.render(ev, nil)
		require.Nil(t, bad)
		require.True(t, slices.ContainsFunc(b.parts[:], func(part []byte) bool { return len(part) == len(ev.Data) && &part[0] == &ev.Data[0] }), format)
	}
}

// Whatever type, key and payload hold, the one object stays valid JSON, and headers stay headers.
func FuzzCloudEvent(f *testing.F) {
	f.Add("invoice.paid", "inv-7", `{"a":1}`)
	f.Add("a\"\\\x00\u2028<>&", "é%\r\n", "\xff")
	f.Fuzz(func(t *testing.T, typ, key, data string) {
		ev := event()
		ev.Type, ev.Key, ev.Data, ev.JSON = typ, key, []byte(data), json.Valid([]byte(data))
		to := &target{endpoint: endpoint("https://x.example/", cloudEvents), source: "/walhook"}
		b, bad := to.structured(ev)
		set := map[string]string{}
		badToo := to.setAttributes(func(name, value string) { set[name] = value }, ev)
		require.Equal(t, typ == "", badToo != nil)
		for name, value := range set {
			require.True(t, validHeaderValue(value), "%s: %q", name, value)
		}
		if bad != nil {
			require.True(t, typ == "" || len(data) > 700_000)
			return
		}
		all := bytes.Join(b.parts[:], nil)
		require.True(t, json.Valid(all), "%q", all)
	})
}
