package rule

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
)

// ParseJSON reads a JSON value for an expression: objects and arrays as map[string]any and
// []any, numbers as int64 where they are written as integers and fit, else uint64, else
// float64. So 12.30 becomes 12.3, and an integer of more than 64 bits loses digits; text that
// no expression touches never comes by here.
func ParseJSON(text []byte) (any, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("more than one JSON value")
	}
	return numbers(v)
}

// numbers replaces every json.Number below v, in place.
func numbers(v any) (any, error) {
	var err error
	switch v := v.(type) {
	case json.Number:
		return number(string(v))
	case []any:
		for i := range v {
			if v[i], err = numbers(v[i]); err != nil {
				return nil, err
			}
		}
	case map[string]any:
		for k := range v {
			if v[k], err = numbers(v[k]); err != nil {
				return nil, err
			}
		}
	}
	return v, nil
}

func number(s string) (any, error) {
	if !strings.ContainsAny(s, ".eE") {
		if i, err := strconv.ParseInt(s, 10, 64); err == nil {
			return i, nil
		}
		if u, err := strconv.ParseUint(s, 10, 64); err == nil {
			return u, nil
		}
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil {
		return nil, fmt.Errorf("the number %.40s is out of range", s)
	}
	return f, nil
}

var errTooLong = fmt.Errorf("the result is longer than %d MiB", maxText>>20)

// textOf turns a result into the text of a field.
func textOf(v ref.Val) (text string, null bool, err error) {
	switch v := v.(type) {
	case types.String:
		text = string(v)
	case types.Null:
		return "", true, nil
	case *types.Optional:
		if !v.HasValue() {
			return "", true, nil
		}
		return textOf(v.GetValue())
	case types.Bytes:
		if !utf8.Valid(v) {
			return "", false, errors.New("the result is bytes that are not text: base64.encode() makes it text")
		}
		text = string(v)
	case types.Double:
		if text, err = numberText(float64(v)); err != nil {
			text, err = strconv.FormatFloat(float64(v), 'g', -1, 64), nil // NaN and infinity have a text, but no JSON
		}
	case types.Timestamp:
		text = v.UTC().Format(time.RFC3339Nano)
	case types.Duration:
		text = durationText(v)
	default:
		var w jsonWriter
		if err := w.value(v); err != nil {
			return "", false, err
		}
		text = w.String()
	}
	if len(text) > maxText {
		return "", false, errTooLong
	}
	return text, false, nil
}

func durationText(d types.Duration) string {
	return strconv.FormatFloat(d.Seconds(), 'f', -1, 64) + "s"
}

// numberText writes a double as encoding/json does: integers without a point, no exponent
// unless it is far from one.
func numberText(f float64) (string, error) {
	b, err := json.Marshal(f)
	return string(b), err
}

// jsonWriter writes values as compact JSON. Unlike cel-go's own it sorts the keys, keeps the digits of
// integers, and leaves <, > and & alone.
type jsonWriter struct {
	strings.Builder
}

func (w *jsonWriter) value(v ref.Val) error {
	if w.Len() > maxText {
		return errTooLong
	}
	switch v := v.(type) {
	case types.Null:
		w.WriteString("null")
	case types.Bool:
		w.WriteString(strconv.FormatBool(bool(v)))
	case types.Int:
		w.WriteString(strconv.FormatInt(int64(v), 10))
	case types.Uint:
		w.WriteString(strconv.FormatUint(uint64(v), 10))
	case types.Double:
		s, err := numberText(float64(v))
		if err != nil {
			return fmt.Errorf("JSON has no number %v", float64(v))
		}
		w.WriteString(s)
	case types.String:
		return w.string(string(v))
	case types.Timestamp:
		return w.string(v.UTC().Format(time.RFC3339Nano))
	case types.Duration:
		return w.string(durationText(v))
	case *types.Optional:
		if !v.HasValue() {
			w.WriteString("null")
			return nil
		}
		return w.value(v.GetValue())
	case traits.Mapper:
		return w.object(v)
	case traits.Lister:
		return w.array(v)
	case types.Bytes:
		return w.bytes(v)
	default:
		return fmt.Errorf("a value of type %s has no JSON", v.Type().TypeName())
	}
	return nil
}

func (w *jsonWriter) string(s string) error {
	e := json.NewEncoder(trimNewline{&w.Builder})
	e.SetEscapeHTML(false)
	return e.Encode(s)
}

// bytes writes base64, as JSON has no bytes.
func (w *jsonWriter) bytes(b []byte) error {
	text, err := json.Marshal(b)
	if err != nil {
		return err
	}
	w.Write(text)
	return nil
}

// trimNewline takes from what a json.Encoder writes at once the newline that it ends with.
type trimNewline struct{ to *strings.Builder }

func (t trimNewline) Write(b []byte) (int, error) {
	t.to.Write(bytes.TrimSuffix(b, []byte("\n")))
	return len(b), nil
}

func (w *jsonWriter) array(l traits.Lister) error {
	w.WriteByte('[')
	for i, it := 0, l.Iterator(); it.HasNext() == types.True; i++ {
		if i > 0 {
			w.WriteByte(',')
		}
		if err := w.value(it.Next()); err != nil {
			return err
		}
	}
	w.WriteByte(']')
	return nil
}

func (w *jsonWriter) object(m traits.Mapper) error {
	type member struct {
		name  string
		value ref.Val
	}
	var members []member
	for it := m.Iterator(); it.HasNext() == types.True; {
		key := it.Next()
		name, null, err := textOf(key)
		if err != nil || null {
			return fmt.Errorf("a key of type %s has no JSON", key.Type().TypeName())
		}
		members = append(members, member{name, m.Get(key)})
	}
	slices.SortFunc(members, func(a, b member) int { return strings.Compare(a.name, b.name) })
	w.WriteByte('{')
	for i, m := range members {
		if i > 0 {
			w.WriteByte(',')
		}
		if err := w.string(m.name); err != nil {
			return err
		}
		w.WriteByte(':')
		if err := w.value(m.value); err != nil {
			return err
		}
	}
	w.WriteByte('}')
	return nil
}
