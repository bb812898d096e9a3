package sender

import (
	"encoding/base64"
	"fmt"
	"unicode/utf8"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
)

// CloudEvents 1.0.2 (https://github.com/cloudevents/spec/tree/v1.0.2/cloudevents) over HTTP, structured
// and binary, with the extensions sequence and partitionkey.

const typeCloudEvents = "application/cloudevents+json"

// The attributes an event has, as the headers of binary mode.
const (
	headerCESpecVersion  = "ce-specversion"
	headerCEID           = "ce-id"
	headerCESource       = "ce-source"
	headerCEType         = "ce-type"
	headerCETime         = "ce-time"
	headerCESequence     = "ce-sequence"
	headerCEPartitionKey = "ce-partitionkey"
)

var attributeHeaders = []string{
	headerCESpecVersion, headerCEID, headerCESource, headerCEType, headerCETime, headerCESequence, headerCEPartitionKey,
}

// structured renders an event as one JSON object. A JSON payload stands in it byte for byte.
func (t *target) structured(e *outbox.Event) (*body, *unsendable) {
	room := len(e.Type) + len(e.Key) + len(t.source) + 288
	if e.JSON && len(e.Data) <= oneWrite {
		room += len(e.Data)
	}
	head, bad := t.appendAttributes(make([]byte, 0, room), e)
	if bad != nil {
		return nil, bad
	}
	if e.JSON {
		if len(e.Data) == 0 {
			return nil, notJSON
		}
		b := enveloped(append(head, `,"data":`...), e.Data)
		return &b, nil
	}
	// A payload too large is not made larger first.
	const around = len(`,"data_base64":""}`)
	size := int64(len(head)+around) + int64(base64.StdEncoding.EncodedLen(len(e.Data)))
	if bad := t.tooLarge(size); bad != nil {
		return nil, bad
	}
	whole := append(make([]byte, 0, size), head...)
	whole = append(whole, `,"data_base64":"`...)
	whole = base64.StdEncoding.AppendEncode(whole, e.Data)
	return &body{parts: [3][]byte{append(whole, `"}`...)}}, nil
}

// appendAttributes appends the object up to its data.
func (t *target) appendAttributes(dst []byte, e *outbox.Event) ([]byte, *unsendable) {
	if e.Type == "" {
		return nil, noType
	}
	member := func(name, value string) {
		dst = append(dst, name...)
		dst = appendJSONString(dst, value)
	}
	member(`{"specversion":"1.0","id":`, e.ID)
	member(`,"source":`, t.source)
	member(`,"type":`, e.Type)
	dst = append(dst, `,"time":"`...)
	dst, ok := appendTime(dst, e)
	if !ok {
		return nil, noTime
	}
	dst = append(dst, '"')
	member(`,"datacontenttype":`, dataType(e))
	if s := sequence(e.Position); s != "" {
		member(`,"sequence":`, s)
	}
	if e.Key != "" {
		member(`,"partitionkey":`, e.Key)
	}
	return dst, nil
}

// setAttributes sets the headers of binary mode.
func (t *target) setAttributes(set func(name, value string), e *outbox.Event) *unsendable {
	at, ok := appendTime(make([]byte, 0, 36), e)
	switch {
	case e.Type == "":
		return noType
	case !ok:
		return noTime
	}
	set(headerCESpecVersion, "1.0")
	set(headerCEID, percentEncoded(e.ID))
	set(headerCESource, percentEncoded(t.source))
	set(headerCEType, percentEncoded(e.Type))
	set(headerCETime, string(at))
	if s := sequence(e.Position); s != "" {
		set(headerCESequence, s)
	}
	if e.Key != "" {
		set(headerCEPartitionKey, percentEncoded(e.Key))
	}
	return nil
}

// sequence is an event's position in a form that sorts as text: the commit's LSN and the row's
// turn in it, both in hex and padded. It is empty where the position is not known.
func sequence(p cdc.Position) string {
	if p.Commit == 0 {
		return ""
	}
	return fmt.Sprintf("%016x-%016x", uint64(p.Commit), p.Ordinal)
}

// percentEncoded is a value as a header of binary mode carries it: outside printable ASCII, and
// for space, quote and percent sign, the bytes of UTF-8 as %XX.
func percentEncoded(s string) string {
	plain := func(r rune) bool { return r > ' ' && r <= '~' && r != '"' && r != '%' }
	encode := false
	for i := 0; i < len(s) && !encode; i++ {
		encode = !plain(rune(s[i]))
	}
	if !encode {
		return s
	}
	out := make([]byte, 0, 3*len(s))
	var char [utf8.UTFMax]byte
	for _, r := range s { // what is no UTF-8 comes as U+FFFD, as in JSON
		if plain(r) {
			out = append(out, byte(r))
			continue
		}
		for _, c := range char[:utf8.EncodeRune(char[:], r)] {
			out = fmt.Appendf(out, "%%%02X", c)
		}
	}
	return string(out)
}
