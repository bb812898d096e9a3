package rule

import (
	"errors"
	"fmt"
	"sync"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/overloads"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
	"cel.dev/cel-go/ext"
)

const (
	// maxSource is how many characters an expression may have.
	maxSource = 16 << 10
	// maxCost is what one evaluation may cost, in cel-go's units: about one an operation, one for every
	// ten characters looked at. The expressions of a real configuration cost less than 1,000; this
	// is some tens of milliseconds, and lets a rule look once through ten megabytes.
	maxCost = 1_000_000
	// maxText is how long a result may be. A cost limit does not bound it: a list of a million
	// times the same megabyte costs little to build.
	maxText = 64 << 20
	// maxRegex bounds the program of a constant regular expression.
	maxRegex = 1000
)

// base is the language all kinds of rules share: CEL's standard library, optionals, and the
// string, math, list and base64 functions. Numbers of different types compare, and times are UTC.
var base = sync.OnceValues(func() (*cel.Env, error) {
	return cel.NewEnv(
		cel.OptionalTypes(),
		ext.Strings(),
		ext.Math(),
		ext.Lists(),
		ext.Encoders(),
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
})

// program is a compiled rule of any kind.
type program struct {
	source string
	run    cel.Program
	ast    *ast.AST
	result *cel.Type
}

// compile parses, checks and plans an expression. Its error is cel-go's: a line for each
// mistake, with the place and a caret.
func compile(env *cel.Env, source string) (program, error) {
	checked, issues := env.Compile(source)
	if err := issues.Err(); err != nil {
		return program{}, err
	}
	run, err := env.Program(checked, cel.CostLimit(maxCost), cel.CostTracking(sizeCost{}), cel.EvalOptions(cel.OptOptimize))
	if err != nil {
		return program{}, fmt.Errorf("plan %q: %w", source, err)
	}
	return program{source: source, run: run, ast: checked.NativeRep(), result: checked.OutputType()}, nil
}

// sizeCost charges for the length of what calls read and make where cel-go charges one. Seen without it:
// the values of a row have no type before they are there, cel-go prices a call by the overload it
// was checked as, and so a kilobyte doubled 22 times over took half a minute and gigabytes at a cost of 69.
// Lists are added lazily, so that the doubled list is nothing until something walks it.
type sizeCost struct{}

// CallCost is asked after each call; nil leaves the price to cel-go.
func (sizeCost) CallCost(function, overload string, args []ref.Val, _ ref.Val) *uint64 {
	if overload != "" && overload != overloads.AddList {
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

// ErrTooExpensive tells that an evaluation was ended because it cost more than a rule may.
var ErrTooExpensive = errors.New("the expression costs too much to evaluate")
