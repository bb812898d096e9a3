package rule

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
)

// Body makes the JSON body of a request. Like all that follow it is immutable and may be used by many
// goroutines, and an error says nothing about the next event.
type Body struct{ eventRule }

// CompileBody compiles an expression that gives whatever JSON can say.
func CompileBody(source string) (*Body, error) {
	r, err := compileEvent(source, maxCost, "something that JSON can say",
		types.BoolKind, types.IntKind, types.UintKind, types.DoubleKind, types.StringKind, types.BytesKind, types.NullTypeKind,
		types.ListKind, types.MapKind, types.TimestampKind, types.DurationKind, types.OpaqueKind)
	if err != nil {
		return nil, err
	}
	return &Body{r}, nil
}

// JSON evaluates the expression: compact JSON, the keys of maps sorted, each number as the payload
// has it unless it was computed. Where data stands whole it is the payload's own text.
func (b *Body) JSON(e *Event, limit int64) ([]byte, error) {
	v, err := b.eval(e)
	if err != nil {
		return nil, err
	}
	w := e.writer(bound(limit))
	if err := w.value(v); err != nil {
		return nil, err
	}
	return w.buf, nil
}

// bound is how long a result may be where so much is allowed; zero is no word on it.
func bound(limit int64) int {
	if limit > 0 {
		return int(min(limit, maxText))
	}
	return maxText
}

// Form makes a form-urlencoded body.
type Form struct{ eventRule }

// CompileForm compiles an expression that gives a map.
func CompileForm(source string) (*Form, error) {
	r, err := compileEvent(source, maxCost, "a map", types.MapKind)
	if err != nil {
		return nil, err
	}
	return &Form{r}, nil
}

// Encode evaluates the expression and writes its map as application/x-www-form-urlencoded, sorted by names. What
// lies deeper has a name as PHP and Rack read it: contact[email]=…, items[0][sku]=…. What is null
// is left out, and so are empty lists and maps.
func (f *Form) Encode(e *Event, limit int64) ([]byte, error) {
	v, err := f.eval(e)
	if err != nil {
		return nil, err
	}
	m, ok := v.(traits.Mapper)
	if !ok {
		return nil, fmt.Errorf("the result is %s, not a map", v.Type().TypeName())
	}
	w := formWriter{event: e, limit: bound(limit)}
	if err := w.object("", m, 0); err != nil {
		return nil, err
	}
	return w.buf, nil
}

// maxFormDepth is how deep a form may go; PHP reads no deeper.
const maxFormDepth = 64

type formWriter struct {
	event *Event
	buf   []byte
	limit int
}

func (w *formWriter) object(name string, m traits.Mapper, depth int) error {
	members, err := membersOf(m)
	if err != nil {
		return err
	}
	for _, m := range members {
		inner := m.name
		if depth > 0 {
			inner = name + "[" + m.name + "]"
		}
		if err := w.value(inner, m.value, depth+1); err != nil {
			return err
		}
	}
	return nil
}

func (w *formWriter) value(name string, v ref.Val, depth int) error {
	if depth > maxFormDepth {
		return fmt.Errorf("a form goes no deeper than %d", maxFormDepth)
	}
	switch v := v.(type) {
	case types.Null:
		return nil
	case *types.Optional:
		if !v.HasValue() {
			return nil
		}
		return w.value(name, v.GetValue(), depth)
	case traits.Mapper:
		return w.object(name, v, depth)
	case traits.Lister:
		for i, it := 0, v.Iterator(); it.HasNext() == types.True; i++ {
			if err := w.value(name+"["+strconv.Itoa(i)+"]", it.Next(), depth+1); err != nil {
				return err
			}
		}
		return nil
	}
	text, _, err := textOf(v)
	if err != nil {
		return err
	}
	if len(w.buf)+len(name)+len(text) > w.limit {
		return ErrTooLong
	}
	if len(w.buf) > 0 {
		w.buf = append(w.buf, '&')
	}
	w.buf = appendPercent(w.buf, name, "*-._", true)
	w.buf = append(w.buf, '=')
	w.buf = appendPercent(w.buf, text, "*-._", true)
	return nil
}

// Headers makes headers of a request.
type Headers struct{ eventRule }

// Header is one of them.
type Header struct{ Name, Value string }

// CompileHeaders compiles an expression that gives a map of strings.
func CompileHeaders(source string) (*Headers, error) {
	const wanted = "a map of strings"
	r, err := compileEvent(source, maxCost, wanted, types.MapKind)
	if err != nil {
		return nil, err
	}
	for _, t := range r.result.Parameters() {
		switch t.Kind() {
		case types.StringKind, types.DynKind, types.TypeParamKind:
		default:
			return nil, fmt.Errorf("gives %s, where %s is wanted; string() makes one of a value", r.result, wanted)
		}
	}
	return &Headers{r}, nil
}

// All evaluates the expression. The headers are sorted by name; one whose value is null is left out. Whether
// they can be sent is for the caller to judge.
func (h *Headers) All(e *Event) ([]Header, error) {
	v, err := h.eval(e)
	if err != nil {
		return nil, err
	}
	m, ok := v.(traits.Mapper)
	if !ok {
		return nil, fmt.Errorf("the result is %s, not a map of strings", v.Type().TypeName())
	}
	members, err := membersOf(m)
	if err != nil {
		return nil, err
	}
	all := make([]Header, 0, len(members))
	for _, m := range members {
		if o, ok := m.value.(*types.Optional); ok {
			if m.value = types.NullValue; o.HasValue() {
				m.value = o.GetValue()
			}
		}
		switch v := m.value.(type) {
		case types.Null:
		case types.String:
			all = append(all, Header{m.name, string(v)})
		default:
			return nil, fmt.Errorf("the header %.40q is %s, not a string; string() makes one of it", m.name, v.Type().TypeName())
		}
	}
	return all, nil
}

// Target makes the path and query of a URL.
type Target struct{ eventRule }

// CompileTarget compiles an expression that gives a string.
func CompileTarget(source string) (*Target, error) {
	r, err := compileEvent(source, maxCost, "a string", types.StringKind)
	if err != nil {
		return nil, err
	}
	return &Target{r}, nil
}

// Path evaluates the expression: a path, with a query or without, as it stands in a request. It
// begins with one slash and names no host, whatever the payload holds.
func (t *Target) Path(e *Event) (string, error) {
	v, err := t.eval(e)
	if err != nil {
		return "", err
	}
	s, ok := v.(types.String)
	if !ok {
		return "", fmt.Errorf("the result is %s, not a string", v.Type().TypeName())
	}
	return string(s), checkPath(string(s))
}

// maxPath is how long a path with its query may be; most servers refuse longer ones.
const maxPath = 8192

func checkPath(s string) error {
	switch {
	case !strings.HasPrefix(s, "/"):
		return errors.New("the result does not begin with /, as a path does")
	case strings.HasPrefix(s, "//"):
		return errors.New("the result begins with //, which names a host")
	case len(s) > maxPath:
		return fmt.Errorf("the result is longer than %d bytes", maxPath)
	}
	for i := range len(s) {
		switch c := s[i]; {
		case c == '%' && (i+2 >= len(s) || !isHex(s[i+1]) || !isHex(s[i+2])):
			return errors.New("the result has a % without two hex digits; url.encode() writes it")
		case c == '#':
			return errors.New("the result has a fragment; url.encode() writes a # that is none")
		case c <= ' ' || c > '~' || strings.IndexByte("\"\\<>^`{|}", c) >= 0:
			return fmt.Errorf("the result has the byte %#02x, which no URL holds as it is; url.encode() writes it", c)
		}
	}
	path, _, _ := strings.Cut(s, "?")
	for segment := range strings.SplitSeq(path, "/") {
		switch strings.ReplaceAll(strings.ToLower(segment), "%2e", ".") {
		case ".", "..": // a receiver may go up by it, out of where the expression meant to be
			return errors.New("the result has . or .. as a segment")
		}
	}
	return nil
}

func isHex(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}
