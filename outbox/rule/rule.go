package rule

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/cost"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/overloads"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
	"cel.dev/cel-go/ext"
	"cel.dev/cel-go/interpreter"
)

const (
	// maxSource is how many characters an expression may have.
	maxSource = 16 << 10
	// maxCost is what one evaluation may cost, in cel-go's units: about one an operation, one for every
	// ten characters looked at. The expressions of a real configuration cost less than 1,000; this
	// is some tens of milliseconds, and lets a rule look once through ten megabytes.
	maxCost = 1_000_000
	// maxFilterCost is what a filter may cost: filters run where rows come in, before all endpoints.
	maxFilterCost = 200_000
	// maxText is how long a result may be. A cost limit does not bound it: a list of a million
	// times the same megabyte costs little to build.
	maxText = 64 << 20
	// maxEstimated is how many loops and binds an expression may have for its cost to be estimated
	// when it is loaded: the estimate looks at each use of each again, twice as long with each one more.
	maxEstimated = 8
	// maxRegex bounds the program of a regular expression. Each of its instructions may look at each character,
	// so that one of these reads a megabyte in a second.
	maxRegex = 250
	// maxPattern bounds a regular expression that is no literal, in bytes. It is compiled for each event, and maxRegex
	// looks at the program that comes of it: a megabyte took a third of a second.
	maxPattern = 2048
	// regexPrice is what each character costs that a regular expression reads, before it does: the cost
	// limit ends it after some ten thousand of them.
	regexPrice = 4
)

// base is the language all kinds of rules share: CEL's standard library, optionals, and the
// string, math, list and base64 functions. Numbers of different types compare, and times are UTC.
var base = sync.OnceValues(func() (*cel.Env, error) {
	env, err := cel.NewEnv(
		cel.OptionalTypes(),
		ext.Strings(),
		ext.Math(),
		ext.Lists(ext.ListsVersion(4), ext.ListsMaxRangeSize(maxList)),
		ext.Bindings(),
		cel.CrossTypeNumericComparisons(true),
		cel.DefaultUTCTimeZone(true),
		cel.EnableIdentifierEscapeSyntax(),
		cel.EnableHiddenAccumulatorName(true),
		cel.ParserExpressionSizeLimit(maxSource),
		cel.RegexProgramSizeLimit(maxRegex),
		cel.ASTValidators(
			cel.ValidateRegexLiterals(),
			cel.ValidateTimestampLiterals(),
			cel.ValidateDurationLiterals(),
		),
	)
	if err != nil {
		return nil, err
	}
	return env.Extend(slices.Concat(functions, guards)...)
})

// program is a compiled rule of any kind.
type program struct {
	source string
	run    cel.Program
	ast    *ast.AST
	result *cel.Type
}

// compile parses, checks and plans an expression that may cost so much. Its error is cel-go's: a line for each
// mistake, with the place and a caret.
func compile(env *cel.Env, source string, limit uint64) (program, error) {
	checked, issues := env.Compile(source)
	if err := issues.Err(); err != nil {
		return program{}, err
	}
	loops := ast.MatchDescendants(ast.NavigateAST(checked.NativeRep()), ast.KindMatcher(ast.ComprehensionKind))
	if len(loops) <= maxEstimated {
		if estimate, err := env.EstimateCost(checked, noEstimates{}); err == nil && estimate.Min > limit {
			return program{}, fmt.Errorf("%w: at least %d, where %d is allowed", ErrTooExpensive, estimate.Min, limit)
		}
	}
	optimizer, err := cel.NewStaticOptimizer(guarded{})
	if err != nil {
		return program{}, fmt.Errorf("plan the expression: %w", err)
	}
	safe, issues := optimizer.Optimize(env, checked)
	if err := issues.Err(); err != nil {
		return program{}, fmt.Errorf("plan the expression: %w", err)
	}
	run, err := env.Program(safe, cel.CostLimit(limit), cel.CostTracking(sizeCost{}), cel.EvalOptions(cel.OptOptimize))
	if err != nil {
		return program{}, fmt.Errorf("plan the expression: %w", err)
	}
	return program{source: source, run: run, ast: checked.NativeRep(), result: checked.OutputType()}, nil
}

// noEstimates leaves the sizes of what a rule reads unknown.
type noEstimates struct{}

func (noEstimates) EstimateSize(cost.AstNode) *cost.SizeEstimate { return nil }

func (noEstimates) EstimateCallCost(string, string, *cost.AstNode, []cost.AstNode) *cost.CallEstimate {
	return nil
}

// eval runs the program. Its error is for people, short, and shows none of the texts that the expression holds,
// which may be credentials.
func (p *program) eval(vars cel.Activation) (ref.Val, error) {
	v, _, err := p.run.Eval(vars)
	if err == nil {
		return v, nil
	}
	var cut interpreter.EvalCancelledError
	if errors.As(err, &cut) && cut.Cause == interpreter.CostLimitExceeded {
		return nil, ErrTooExpensive
	}
	return nil, p.shown(err)
}

// shown is an error as it may be shown: clipped, and without the texts that stand in the
// expression. The names of members are no such texts.
func (p *program) shown(err error) error {
	text := strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(err.Error(), "�"))
	for _, e := range ast.MatchDescendants(ast.NavigateAST(p.ast), ast.KindMatcher(ast.LiteralKind)) {
		literal, ok := e.AsLiteral().(types.String)
		if !ok || len(literal) < 4 || isName(e) {
			continue
		}
		text = strings.ReplaceAll(text, string(literal), "…")
		quoted := strconv.Quote(string(literal))
		text = strings.ReplaceAll(text, quoted[1:len(quoted)-1], "…")
	}
	if len(text) > maxErrorText {
		text = strings.ToValidUTF8(text[:maxErrorText], "") + "…"
	}
	if text == err.Error() {
		return err
	}
	return errors.New(text)
}

// maxErrorText is how long an error of an evaluation may be: it may quote the payload.
const maxErrorText = 300

// isName tells whether a text names a member of a map: row["id"], "id" in row.
func isName(e ast.NavigableExpr) bool {
	parent, ok := e.Parent()
	if !ok || parent.Kind() != ast.CallKind {
		return false
	}
	switch parent.AsCall().FunctionName() {
	case operators.Index, operators.OptIndex, operators.OptSelect, operators.In:
		return true
	}
	return false
}

// sizeCost charges for the length of what calls read and make where cel-go charges one. Seen without it:
// the values of a row have no type before they are there, cel-go prices a call by the overload it
// was checked as, and so a kilobyte doubled 22 times over took half a minute and gigabytes at a cost of 69.
// Lists are added lazily, so that the doubled list is nothing until something walks it.
type sizeCost struct{}

// CallCost is asked after each call; nil leaves the price to cel-go.
func (sizeCost) CallCost(function, overload string, args []ref.Val, _ ref.Val) *uint64 {
	switch function {
	case asNumber:
		return new(uint64)
	case pattern:
		text, _ := args[0].(types.String)
		p := regexSize(string(text))
		return &p
	case weighed, inside:
		return price(args[0])
	case matched:
		text, _ := args[0].(types.String)
		p := uint64(regexPrice * len(text))
		return &p
	case elements:
		if _, ok := args[0].(traits.Mapper); ok {
			return new(uint64)
		}
		return price(args[0])
	}
	if overload != "" && overload != overloads.AddList && !slices.Contains(unpriced, overload) {
		return nil
	}
	var text, elements uint64
	for i, arg := range args {
		switch arg := arg.(type) {
		case types.String:
			text += uint64(len(arg))
		case types.Bytes:
			text += uint64(len(arg))
		case traits.Sizer:
			n, _ := arg.Size().(types.Int)
			if i == 0 || function == operators.In {
				elements += uint64(n)
			} else {
				elements = min(elements, uint64(n)) // map() adds one element to many, and should pay for one
			}
		}
	}
	price := 1 + text/10 + elements
	return &price
}

// regexSize is about how many instructions a regular expression is compiled to, or more: its length, times what its counts
// multiply each other to, as a{30}{30} does, and package regexp allows a thousand of.
func regexSize(pattern string) uint64 {
	const most = 1000
	times := 1
	for _, part := range strings.Split(pattern, "{")[1:] {
		counts, _, _ := strings.Cut(part, "}")
		least, greatest, _ := strings.Cut(counts, ",")
		n, _ := strconv.Atoi(cmp.Or(greatest, least))
		times = min(most, times*min(most, max(1, n)))
	}
	return uint64(len(pattern) * times)
}

// unpriced are overloads that cel-go has no price for.
var unpriced = []string{"walhook_url_encode", "walhook_json_encode"}

// ErrTooExpensive tells that an evaluation was ended because it cost more than a rule may.
var ErrTooExpensive = errors.New("the expression costs too much to evaluate")
