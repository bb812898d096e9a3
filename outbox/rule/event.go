package rule

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/types"
)

// The variables of filters and transforms.
const (
	idVar      = "id"
	typeVar    = "type"
	keyVar     = "key"
	tenantVar  = "tenant"
	timeVar    = "time"
	headersVar = "headers"
	dataVar    = "data"
)

// Variables are those of filters and transforms.
var Variables = []string{idVar, typeVar, keyVar, tenantVar, timeVar, headersVar, dataVar}

// eventEnv is the language of filters and transforms.
var eventEnv = sync.OnceValues(func() (*cel.Env, error) {
	env, err := base()
	if err != nil {
		return nil, err
	}
	return env.Extend(
		cel.Variable(idVar, cel.StringType),
		cel.Variable(typeVar, cel.StringType),
		cel.Variable(keyVar, cel.StringType),
		cel.Variable(tenantVar, cel.StringType),
		cel.Variable(timeVar, cel.TimestampType),
		cel.Variable(headersVar, cel.MapType(cel.StringType, cel.DynType)),
		cel.Variable(dataVar, cel.DynType))
})

// Event is an event as filters and transforms see it. All rules of all endpoints share one, at
// the same time if need be: headers and data are parsed when the first rule looks at them, once, and not at
// all where none does.
type Event struct {
	ID, Type, Key, Tenant string
	Time                  time.Time
	Headers               []byte // a JSON object, or nothing
	Data                  []byte
	JSON                  bool // Data is valid JSON

	headers, data parsed
}

// parsed is JSON that is read once.
type parsed struct {
	once  sync.Once
	value any // an *types.Err where it cannot be read
}

func (p *parsed) read(text []byte) any {
	p.once.Do(func() {
		v, err := ParseJSON(text)
		if p.value = v; err != nil {
			p.value = types.WrapErr(err)
		}
	})
	return p.value
}

var (
	noHeaders = map[string]any{}
	notJSON   = types.WrapErr(errors.New("the payload is not JSON"))
)

// ResolveName gives cel-go the variables.
func (e *Event) ResolveName(name string) (any, bool) {
	switch name {
	case idVar:
		return e.ID, true
	case typeVar:
		return e.Type, true
	case keyVar:
		return e.Key, true
	case tenantVar:
		return e.Tenant, true
	case timeVar:
		return e.Time, true
	case headersVar:
		if len(e.Headers) == 0 {
			return noHeaders, true
		}
		return e.headers.read(e.Headers), true
	case dataVar:
		if !e.JSON {
			return notJSON, true
		}
		return e.data.read(e.Data), true
	}
	return nil, false
}

// Parent is none.
func (e *Event) Parent() cel.Activation { return nil }

// ParsedSize is about how many bytes the parsed form of so many bytes of JSON holds.
func ParsedSize(text int) int { return 8 * text }

// writer writes JSON in which data, where it stands whole, is the text that the payload has.
func (e *Event) writer(limit int) *jsonWriter {
	w := &jsonWriter{limit: limit}
	if e.JSON {
		w.text = bytes.TrimSpace(e.Data)
		w.whole = e.data.value // read by now, if the result has it
	}
	return w
}

// eventRule is a program over an event.
type eventRule struct {
	program
	parses bool
}

// Source is the expression as it was written. It may hold credentials.
func (r *eventRule) Source() string { return r.source }

// Parses tells whether the expression may look into data or headers.
func (r *eventRule) Parses() bool { return r.parses }

// compileEvent compiles an expression over an event that gives one of so many kinds, or is not
// known to until it runs.
func compileEvent(source string, limit uint64, wanted string, kinds ...types.Kind) (eventRule, error) {
	env, err := eventEnv()
	if err != nil {
		return eventRule{}, fmt.Errorf("set up the expression language: %w", err)
	}
	p, err := compile(env, source, limit)
	if err != nil {
		return eventRule{}, err
	}
	if p.result.Kind() != types.DynKind && !slices.Contains(kinds, p.result.Kind()) {
		return eventRule{}, fmt.Errorf("gives %s, where %s is wanted", p.result, wanted)
	}
	r := eventRule{program: p}
	for _, ident := range ast.MatchDescendants(ast.NavigateAST(p.ast), ast.KindMatcher(ast.IdentKind)) {
		name := strings.TrimPrefix(ident.AsIdent(), ".")
		r.parses = r.parses || name == dataVar || name == headersVar
	}
	return r, nil
}

// Filter says whether an endpoint wants an event. It is immutable and may be used by many
// goroutines.
type Filter struct{ eventRule }

// CompileFilter compiles an expression that gives true or false.
func CompileFilter(source string) (*Filter, error) {
	r, err := compileEvent(source, maxFilterCost, "true or false", types.BoolKind)
	if err != nil {
		return nil, err
	}
	return &Filter{r}, nil
}

// Wants evaluates the filter. An error says nothing about the next event.
func (f *Filter) Wants(e *Event) (bool, error) {
	v, err := f.eval(e)
	if err != nil {
		return false, err
	}
	wants, ok := v.(types.Bool)
	if !ok {
		return false, fmt.Errorf("the result is %s, not true or false", v.Type().TypeName())
	}
	return bool(wants), nil
}
