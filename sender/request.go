package sender

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/walhook/walhook/outbox"
)

// Header names as Standard Webhooks writes them: lower case also where HTTP/1.1 would allow
// another, so that a receiver that compares bytes sees one spelling over HTTP/1.1 and HTTP/2.
const (
	headerID          = "webhook-id"
	headerTimestamp   = "webhook-timestamp"
	headerSignature   = "webhook-signature"
	headerAttempt     = "webhook-attempt"
	headerReplay      = "webhook-replay"
	headerTraceparent = "traceparent"

	headerIdempotencyKey = "Idempotency-Key"

	// What NFE.io sends beside its signatures, spelled as it does.
	headerHookID       = "X-Hook-Id"
	headerHookAttempts = "X-Hook-Attempts"
	headerContentMD5   = "Content-MD5"
)

// oneWrite is up to how many bytes a body is worth a copy: in one piece that net/http knows
// how to read, it goes out with its headers in one packet.
const oneWrite = 3 << 10

// body is a request's body. A large one stays in pieces, of which the payload is the event's
// own bytes. It is immutable: net/http may still be reading it after an answer came.
type body struct {
	parts [3][]byte
}

func (b *body) size() int64 {
	return int64(len(b.parts[0]) + len(b.parts[1]) + len(b.parts[2]))
}

// open returns a reader from the body's beginning; it is the request's GetBody.
func (b *body) open() (io.ReadCloser, error) {
	if len(b.parts[1])+len(b.parts[2]) == 0 {
		return io.NopCloser(bytes.NewReader(b.parts[0])), nil
	}
	return &bodyReader{rest: b.parts}, nil
}

type bodyReader struct {
	rest [3][]byte
	next int
}

func (r *bodyReader) Read(p []byte) (n int, err error) {
	for r.next < len(r.rest) {
		m := copy(p[n:], r.rest[r.next])
		n += m
		if r.rest[r.next] = r.rest[r.next][m:]; len(r.rest[r.next]) > 0 {
			return n, nil
		}
		r.next++
	}
	return n, io.EOF
}

func (r *bodyReader) Close() error { return nil }

// unsendable says why an event can never be sent to an endpoint.
type unsendable struct {
	reason outbox.Reason
	detail string
}

func (u *unsendable) outcome() outbox.Outcome {
	return outbox.Outcome{Verdict: outbox.Dead, Reason: u.reason, Detail: u.detail}
}

// message is a request as it will go on the wire, before it is one of net/http's or so many bytes.
type message struct {
	method string
	url    *url.URL
	fields []field
	body   *body
	inLine *atomic.Bool // the attempt's; nil where nobody asks

	lent   body   // that body may be: it ends with the attempt, and is written over by the next one
	buffer []byte // of it
}

// maxLent is how large a buffer a message keeps for the next one, in bytes.
const maxLent = 32 << 10

// field is a header with its value. Names are spelled as they are sent.
type field struct{ name, value string }

var messages = sync.Pool{New: func() any { return new(message) }}

// free gives the message back. Its body and its values may live on, and are nobody's to change.
func (m *message) free() {
	clear(m.fields)
	*m = message{fields: m.fields[:0], buffer: m.buffer}
	if cap(m.buffer) > maxLent {
		m.buffer = nil
	}
	messages.Put(m)
}

// add sets a header that is not there yet.
func (m *message) add(name, value string) { m.fields = append(m.fields, field{name, value}) }

// set replaces a header, however it is spelled there.
func (m *message) set(name, value string) {
	m.fields = slices.DeleteFunc(m.fields, func(f field) bool { return strings.EqualFold(f.name, name) })
	m.add(name, value)
}

// get is the value of a header by the name with which it was set; empty where there is none.
func (m *message) get(name string) string {
	for _, f := range m.fields {
		if f.name == name {
			return f.value
		}
	}
	return ""
}

// size is about what the message takes on the wire of HTTP/1.1, in bytes.
func (m *message) size() int64 {
	n := m.body.size()
	for _, f := range m.fields {
		n += int64(len(f.name) + len(f.value) + len(": \r\n"))
	}
	return n
}

// request is the message as net/http takes it. Nothing in it is shared with another request but what
// nobody writes to: net/http's write loop may outlive the attempt.
func (m *message) request(ctx context.Context, t *target) *http.Request {
	header := make(http.Header, len(m.fields)+1)
	values := make([]string, len(m.fields)) // one allocation for all of them
	for i, f := range m.fields {
		values[i] = f.value
		header[f.name] = values[i : i+1 : i+1]
	}
	if _, given := header[headerIdempotencyKey]; !given {
		header[headerIdempotencyKey] = nil // never sent, but has net/http repeat a POST whose idle connection turns out to be closed
	}
	if m.body == &m.lent {
		m.body = &body{parts: [3][]byte{bytes.Clone(m.lent.parts[0]), m.lent.parts[1], m.lent.parts[2]}}
	}
	req := t.base.WithContext(ctx)
	req.URL, req.Header = m.url, header
	req.ContentLength = m.body.size()
	req.GetBody = m.body.open
	if req.Body, _ = m.body.open(); req.ContentLength == 0 {
		req.Body = http.NoBody
	}
	return req
}

// latestSecond is the text that thousands of attempts of a second share.
var latestSecond atomic.Pointer[second]

type second struct {
	unix int64
	text string
}

// unixText is a time in seconds since 1970, as text.
func unixText(at time.Time) string {
	s := latestSecond.Load()
	if unix := at.Unix(); s == nil || s.unix != unix {
		s = &second{unix, strconv.FormatInt(unix, 10)}
		latestSecond.Store(s)
	}
	return s.text
}

// write renders the attempt; together is its batch, nil where it has none.
func (t *target) write(m *message, a outbox.Attempt, together *batch, now time.Time) *unsendable {
	id, parent := a.Event.ID, a.Event.Headers
	var contentType string
	if together != nil {
		id, m.body, contentType = together.id, together.body, together.contentType
		if parent = nil; len(together.events) == 1 { // several have no parent in common
			parent = together.events[0].Headers
		}
	} else {
		var bad *unsendable
		if m.body, contentType, bad = t.render(a.Event, m); bad != nil {
			return bad
		}
		if !validID(id) {
			return badID
		}
	}
	m.method, m.url = t.base.Method, t.base.URL

	timestamp := unixText(now)
	m.fields = append(m.fields, t.fields...)
	m.add("Content-Type", contentType)
	m.add(headerID, id)
	m.add(headerTimestamp, timestamp)
	m.add(headerAttempt, strconv.Itoa(a.Number))
	if a.Replay {
		m.add(headerReplay, "true")
	}
	if t.endpoint.Format == outbox.FormatCloudEventsBinary {
		if bad := t.setAttributes(m.add, a.Event); bad != nil {
			return bad
		}
	}
	if together != nil && together.ids != "" {
		m.add(headerBatchIDs, together.ids)
	}
	signatures := t.signatures
	if until := t.endpoint.PreviousUntil; !until.IsZero() && !now.Before(until) {
		signatures = t.newest
	}
	for i := range signatures {
		m.add(signatures[i].header, signatures[i].sign(id, timestamp, m.body))
	}
	if t.nfeio {
		m.add(headerHookID, id)
		m.add(headerHookAttempts, strconv.Itoa(a.Number-1))
		m.add(headerContentMD5, contentMD5(m.body))
	}
	if parent := traceparent(parent); parent != "" {
		m.set(headerTraceparent, parent)
	}
	for _, f := range m.fields {
		if len(f.value) > maxHeaderValue {
			return &unsendable{outbox.ReasonBadRequest, fmt.Sprintf("the header %s would be larger than %d bytes", f.name, maxHeaderValue)}
		}
	}
	if bad := t.transformHeaders(m, a.Event); bad != nil {
		return bad
	}
	return t.transformURL(m, a.Event)
}

// contentMD5 is the header of RFC 1864: a checksum, which proves nothing of who sent the body.
func contentMD5(b *body) string {
	h := md5.New()
	for _, part := range b.parts {
		h.Write(part)
	}
	return base64.StdEncoding.EncodeToString(h.Sum(nil))
}

var (
	notJSON        = &unsendable{outbox.ReasonNotJSON, "the payload is not JSON; format raw sends it as it is"}
	noTime         = &unsendable{outbox.ReasonBadRequest, "the event's time has no RFC 3339 form"}
	notJSONInBatch = &unsendable{outbox.ReasonNotJSON, "the payload is not JSON, and a batch is a JSON array"}
	badID          = &unsendable{outbox.ReasonBadRequest, "the event's id cannot be a webhook-id"}
	noType         = &unsendable{outbox.ReasonBadRequest, "the event has no type, which CloudEvents demands"}
)

// render makes the body of an event in the endpoint's format, and its content type. The body may be lent by m,
// where that is not nil.
func (t *target) render(e *outbox.Event, m *message) (b *body, contentType string, bad *unsendable) {
	switch transform, format := &t.endpoint.Transform, t.endpoint.Format; {
	case transform.Body != nil || transform.Form != nil:
		b, contentType, bad = t.transformBody(e)
	case format == outbox.FormatRaw, format == outbox.FormatCloudEventsBinary:
		b, contentType = &body{parts: [3][]byte{e.Data}}, dataType(e)
	case format == outbox.FormatStandard:
		contentType = "application/json"
		b, bad = standardBody(e, m)
	case format == outbox.FormatCloudEvents:
		contentType = typeCloudEvents
		b, bad = t.structured(e)
	default:
		bad = &unsendable{outbox.ReasonBadRequest, "the endpoint's format is unknown"}
	}
	if bad == nil {
		bad = t.tooLarge(b.size())
	}
	if bad != nil {
		return nil, "", bad
	}
	return b, contentType, nil
}

// tooLarge judges a body by its size in bytes.
func (t *target) tooLarge(size int64) *unsendable {
	if limit := t.endpoint.MaxPayload; limit > 0 && size > limit {
		return &unsendable{outbox.ReasonTooLarge, fmt.Sprintf("the body has %d bytes, max_payload is %d", size, limit)}
	}
	return nil
}

// dataType is the media type of an event's payload.
func dataType(e *outbox.Event) string {
	switch {
	case e.JSON:
		return "application/json"
	case utf8.Valid(e.Data):
		return "text/plain; charset=utf-8"
	}
	return "application/octet-stream"
}

// standardBody is the format of Standard Webhooks. The order of its members is part of the contract.
func standardBody(e *outbox.Event, m *message) (*body, *unsendable) {
	if !e.JSON || len(e.Data) == 0 {
		return nil, notJSON
	}
	room := len(e.Type) + 96
	if len(e.Data) <= oneWrite {
		room += len(e.Data)
	}
	var head []byte
	if m != nil && room <= cap(m.buffer) {
		head = m.buffer[:0]
	} else {
		head = make([]byte, 0, room)
	}
	head = append(head, `{"type":`...)
	head = appendJSONString(head, e.Type)
	head = append(head, `,"timestamp":"`...)
	head, ok := appendTime(head, e)
	if !ok {
		return nil, noTime
	}
	b := enveloped(append(head, `","data":`...), e.Data)
	if m == nil {
		return &b, nil
	}
	m.lent, m.buffer = b, b.parts[0]
	return &m.lent, nil
}

var envelopeEnd = []byte{'}'}

// enveloped is a body of a payload behind a head and before a brace; a large payload is not copied.
func enveloped(head, data []byte) body {
	if len(data) <= oneWrite {
		return body{parts: [3][]byte{append(append(head, data...), '}')}}
	}
	return body{parts: [3][]byte{head, data, envelopeEnd}}
}

// appendTime appends the event's time, or its commit's where it has none. ok is false where
// Postgres knows a year that RFC 3339 does not.
func appendTime(dst []byte, e *outbox.Event) (out []byte, ok bool) {
	at := e.Time
	if at.IsZero() {
		at = e.Commit
	}
	at = at.UTC()
	if y := at.Year(); y < 0 || y > 9999 {
		return nil, false
	}
	return at.AppendFormat(dst, time.RFC3339Nano), true
}

// appendJSONString appends s in quotes, without the HTML escapes that encoding/json likes.
func appendJSONString(dst []byte, s string) []byte {
	plain := true
	for i := 0; i < len(s) && plain; i++ {
		plain = s[i] >= ' ' && s[i] < utf8.RuneSelf && s[i] != '"' && s[i] != '\\'
	}
	if plain {
		dst = append(dst, '"')
		dst = append(dst, s...)
		return append(dst, '"')
	}
	var quoted bytes.Buffer
	enc := json.NewEncoder(&quoted)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(s) // a string always encodes
	return append(dst, bytes.TrimSuffix(quoted.Bytes(), []byte("\n"))...)
}

// validID tells whether id may be a webhook-id: visible ASCII without the dot that separates
// the parts of what is signed.
func validID(id string) bool {
	for i := range len(id) {
		if id[i] <= ' ' || id[i] > '~' || id[i] == '.' {
			return false
		}
	}
	return id != ""
}

// traceparent returns the W3C trace context in an event's headers, or nothing where there is
// no valid one (https://www.w3.org/TR/trace-context/#traceparent-header).
func traceparent(headers []byte) string {
	if !bytes.Contains(headers, []byte("raceparent")) { // Traceparent too; most rows have neither
		return ""
	}
	var h struct {
		Traceparent string `json:"traceparent"`
	}
	var other *json.UnmarshalTypeError
	if err := json.Unmarshal(headers, &h); err != nil && !errors.As(err, &other) {
		return ""
	}
	v := h.Traceparent
	if len(v) < 55 || v[2] != '-' || v[35] != '-' || v[52] != '-' {
		return ""
	}
	version, trace, parent, flags := v[:2], v[3:35], v[36:52], v[53:55]
	if !lowerHex(version) || !lowerHex(trace) || !lowerHex(parent) || !lowerHex(flags) ||
		version == "ff" || strings.Trim(trace, "0") == "" || strings.Trim(parent, "0") == "" {
		return ""
	}
	// A later version may say more, behind another dash; all of it is unknown to us, so it is left out.
	if len(v) > 55 && (version == "00" || v[55] != '-') {
		return ""
	}
	return v[:55]
}

func lowerHex(s string) bool {
	for i := range len(s) {
		if (s[i] < '0' || s[i] > '9') && (s[i] < 'a' || s[i] > 'f') {
			return false
		}
	}
	return true
}
