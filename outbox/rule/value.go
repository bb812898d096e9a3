package rule

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
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
// []any, numbers as ParseNumber does, so that each can be written again as it was.
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
	return numbers(v), nil
}

// numbers replaces every json.Number below v, in place.
func numbers(v any) any {
	switch v := v.(type) {
	case json.Number:
		return ParseNumber(string(v))
	case []any:
		for i, e := range v {
			switch e.(type) {
			case json.Number, []any, map[string]any:
				v[i] = numbers(e)
			}
		}
	case map[string]any:
		for k, e := range v {
			switch e.(type) {
			case json.Number, []any, map[string]any:
				v[k] = numbers(e)
			}
		}
	}
	return v
}

// ErrTooLong tells that a result is longer than it may be.
var ErrTooLong = errors.New("the result is too long")

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
	case Number:
		text = string(v)
	case types.Double:
		if text = string(appendDouble(nil, float64(v))); !finite(float64(v)) {
			text = strconv.FormatFloat(float64(v), 'g', -1, 64) // NaN and infinity have a text, but no JSON
		}
	case types.Timestamp:
		text = v.UTC().Format(time.RFC3339Nano)
	case types.Duration:
		text = durationText(v)
	default:
		w := jsonWriter{limit: maxText}
		if err := w.value(v); err != nil {
			return "", false, err
		}
		text = string(w.buf)
	}
	if len(text) > maxText {
		return "", false, ErrTooLong
	}
	return text, false, nil
}

func durationText(d types.Duration) string {
	return strconv.FormatFloat(d.Seconds(), 'f', -1, 64) + "s"
}

func finite(f float64) bool { return f-f == 0 }

// jsonWriter writes values as compact JSON. Unlike cel-go's own it sorts the keys, keeps the digits of
// numbers, and leaves <, > and & alone.
type jsonWriter struct {
	buf   []byte
	limit int // of bytes

	whole any    // an object or array that is written as
	text  []byte // it was read, its members in their order
}

func (w *jsonWriter) value(v ref.Val) error {
	if len(w.buf) > w.limit {
		return ErrTooLong
	}
	switch v := v.(type) {
	case types.Null:
		w.buf = append(w.buf, "null"...)
	case types.Bool:
		w.buf = strconv.AppendBool(w.buf, bool(v))
	case types.Int:
		w.buf = strconv.AppendInt(w.buf, int64(v), 10)
	case types.Uint:
		w.buf = strconv.AppendUint(w.buf, uint64(v), 10)
	case Number:
		w.buf = append(w.buf, v...)
	case types.Double:
		return w.double(float64(v))
	case types.String:
		return w.string(string(v))
	case types.Timestamp:
		return w.string(v.UTC().Format(time.RFC3339Nano))
	case types.Duration:
		return w.string(durationText(v))
	case *types.Optional:
		if !v.HasValue() {
			return w.value(types.NullValue)
		}
		return w.value(v.GetValue())
	case traits.Mapper:
		if native, ok := v.Value().(map[string]any); ok {
			return w.native(native)
		}
		return w.object(v)
	case traits.Lister:
		if native, ok := v.Value().([]any); ok {
			return w.native(native)
		}
		return w.array(v)
	case types.Bytes:
		return w.bytes(v)
	default:
		return fmt.Errorf("a value of type %s has no JSON", v.Type().TypeName())
	}
	return w.fits()
}

func (w *jsonWriter) fits() error {
	if len(w.buf) > w.limit {
		return ErrTooLong
	}
	return nil
}

// native writes what ParseJSON read.
func (w *jsonWriter) native(v any) error {
	if len(w.buf) > w.limit {
		return ErrTooLong
	}
	switch v := v.(type) {
	case nil:
		w.buf = append(w.buf, "null"...)
	case bool:
		w.buf = strconv.AppendBool(w.buf, v)
	case int64:
		w.buf = strconv.AppendInt(w.buf, v, 10)
	case uint64:
		w.buf = strconv.AppendUint(w.buf, v, 10)
	case float64:
		return w.double(v)
	case Number:
		w.buf = append(w.buf, v...)
	case string:
		return w.string(v)
	case map[string]any:
		if w.isWhole(v) {
			w.buf = append(w.buf, w.text...)
			break
		}
		w.buf = append(w.buf, '{')
		for i, name := range slices.Sorted(maps.Keys(v)) {
			if i > 0 {
				w.buf = append(w.buf, ',')
			}
			if err := w.string(name); err != nil {
				return err
			}
			w.buf = append(w.buf, ':')
			if err := w.native(v[name]); err != nil {
				return err
			}
		}
		w.buf = append(w.buf, '}')
	case []any:
		if w.isWhole(v) {
			w.buf = append(w.buf, w.text...)
			break
		}
		w.buf = append(w.buf, '[')
		for i, e := range v {
			if i > 0 {
				w.buf = append(w.buf, ',')
			}
			if err := w.native(e); err != nil {
				return err
			}
		}
		w.buf = append(w.buf, ']')
	default:
		return w.value(types.DefaultTypeAdapter.NativeToValue(v))
	}
	return w.fits()
}

// isWhole tells whether v is the very object or array that there is the text of.
func (w *jsonWriter) isWhole(v any) bool {
	switch whole := w.whole.(type) {
	case map[string]any:
		v, ok := v.(map[string]any)
		return ok && reflect.ValueOf(v).Pointer() == reflect.ValueOf(whole).Pointer()
	case []any:
		v, ok := v.([]any)
		return ok && len(v) > 0 && len(v) == len(whole) && &v[0] == &whole[0]
	}
	return false
}

func (w *jsonWriter) double(f float64) error {
	if !finite(f) {
		return fmt.Errorf("JSON has no number %v", f)
	}
	w.buf = appendDouble(w.buf, f)
	return w.fits()
}

func (w *jsonWriter) string(s string) error {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c >= utf8.RuneSelf || c == '"' || c == '\\' {
			e := json.NewEncoder(trimNewline{w})
			e.SetEscapeHTML(false)
			if err := e.Encode(s); err != nil {
				return err
			}
			return w.fits()
		}
	}
	w.buf = append(w.buf, '"')
	w.buf = append(w.buf, s...)
	w.buf = append(w.buf, '"')
	return w.fits()
}

// bytes writes base64, as JSON has no bytes.
func (w *jsonWriter) bytes(b []byte) error {
	w.buf = append(w.buf, '"')
	w.buf = base64.StdEncoding.AppendEncode(w.buf, b)
	w.buf = append(w.buf, '"')
	return w.fits()
}

// trimNewline takes from what a json.Encoder writes at once the newline that it ends with.
type trimNewline struct{ to *jsonWriter }

func (t trimNewline) Write(b []byte) (int, error) {
	t.to.buf = append(t.to.buf, bytes.TrimSuffix(b, []byte("\n"))...)
	return len(b), nil
}

func (w *jsonWriter) array(l traits.Lister) error {
	w.buf = append(w.buf, '[')
	for i, it := 0, l.Iterator(); it.HasNext() == types.True; i++ {
		if i > 0 {
			w.buf = append(w.buf, ',')
		}
		if err := w.value(it.Next()); err != nil {
			return err
		}
	}
	w.buf = append(w.buf, ']')
	return w.fits()
}

func (w *jsonWriter) object(m traits.Mapper) error {
	members, err := membersOf(m)
	if err != nil {
		return err
	}
	w.buf = append(w.buf, '{')
	for i, m := range members {
		if i > 0 {
			w.buf = append(w.buf, ',')
		}
		if err := w.string(m.name); err != nil {
			return err
		}
		w.buf = append(w.buf, ':')
		if err := w.value(m.value); err != nil {
			return err
		}
	}
	w.buf = append(w.buf, '}')
	return w.fits()
}

type member struct {
	name  string
	value ref.Val
}

// membersOf are the members of a map, sorted by name.
func membersOf(m traits.Mapper) ([]member, error) {
	var members []member
	for it := m.Iterator(); it.HasNext() == types.True; {
		key := it.Next()
		name, null, err := textOf(key)
		if err != nil || null {
			return nil, fmt.Errorf("a key of type %s has no JSON", key.Type().TypeName())
		}
		members = append(members, member{name, m.Get(key)})
	}
	slices.SortFunc(members, func(a, b member) int { return strings.Compare(a.name, b.name) })
	return members, nil
}
