package rule

import (
	"fmt"
	"slices"
	"strings"
	"sync"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/types"
)

// rowVar is the one variable of a Column: the row, a map from column name to value.
const rowVar = "row"

// columnEnv is the language of the expressions under outbox[].columns.
var columnEnv = sync.OnceValues(func() (*cel.Env, error) {
	env, err := base()
	if err != nil {
		return nil, err
	}
	return env.Extend(cel.Variable(rowVar, cel.MapType(cel.StringType, cel.DynType)))
})

// Column is an expression over a row that gives the text of one field of an event. It is
// immutable and may be used by many goroutines.
type Column struct {
	program
	reads Reads
}

// Reads says which columns of the row an expression looks at.
type Reads struct {
	Columns []string // looked at by name; evaluation fails where one of them is not in the row
	Maybe   []string // looked at only if they are there: has(row.x), row.?x, 'x' in row
	All     bool     // the row as a whole, or by names known at run time only
}

// CompileColumn compiles an expression over row.
func CompileColumn(source string) (*Column, error) {
	env, err := columnEnv()
	if err != nil {
		return nil, fmt.Errorf("set up the expression language: %w", err)
	}
	p, err := compile(env, source, maxCost)
	if err != nil {
		return nil, err
	}
	if !givesText(p.result) {
		return nil, fmt.Errorf("expression %q gives %s, which has no text", source, p.result)
	}
	return &Column{program: p, reads: readsOf(p.ast)}, nil
}

// Source is the expression as it was written.
func (c *Column) Source() string { return c.source }

// Reads says which columns Text needs to find in the row.
func (c *Column) Reads() Reads { return c.reads }

// Text evaluates the expression. Its result is text as it is; a number as the row has it, or, where one was computed, as JSON
// writes it; a bool as JSON; a time as RFC 3339 in UTC; a duration as CEL's string(); a list or map as JSON with the keys of maps
// sorted; bytes as the text they are in UTF-8. null tells that the result was null, or an optional without a value.
//
// The text may share memory with strings of the row. An error says nothing about the next row.
func (c *Column) Text(row map[string]any) (text string, null bool, err error) {
	v, err := c.eval(rowActivation(row))
	if err != nil {
		return "", false, err
	}
	return textOf(v)
}

// rowActivation gives cel-go the variable row without another map around it.
type rowActivation map[string]any

func (r rowActivation) ResolveName(name string) (any, bool) {
	if name != rowVar {
		return nil, false
	}
	return map[string]any(r), true
}

func (rowActivation) Parent() cel.Activation { return nil }

func givesText(t *cel.Type) bool {
	switch t.Kind() {
	case types.TypeKind, types.ErrorKind, types.UnknownKind, types.UnspecifiedKind:
		return false
	}
	return true
}

// readsOf finds every use of the variable row. What it does not understand reads all of it.
func readsOf(tree *ast.AST) Reads {
	var r Reads
	root := ast.NavigateAST(tree)
	for _, c := range ast.MatchDescendants(root, ast.KindMatcher(ast.ComprehensionKind)) {
		if loop := c.AsComprehension(); loop.IterVar() == rowVar || loop.IterVar2() == rowVar || loop.AccuVar() == rowVar {
			return Reads{All: true} // some row is another variable of that name
		}
	}
	for _, ident := range ast.MatchDescendants(root, ast.KindMatcher(ast.IdentKind)) {
		if strings.TrimPrefix(ident.AsIdent(), ".") != rowVar {
			continue
		}
		switch name, how := lookup(ident); how {
		case surely:
			r.Columns = append(r.Columns, name)
		case maybe:
			r.Maybe = append(r.Maybe, name)
		default:
			r.All = true
		}
	}
	slices.Sort(r.Maybe)
	r.Maybe = slices.Compact(r.Maybe)
	slices.Sort(r.Columns)
	r.Columns = slices.Compact(r.Columns)
	// A column that is also tested for may be missing: the test guards the look.
	r.Columns = slices.DeleteFunc(r.Columns, func(name string) bool {
		_, tested := slices.BinarySearch(r.Maybe, name)
		return tested
	})
	return r
}

type look uint8

const (
	entirely look = iota
	surely
	maybe
)

// lookup says what the expression around one mention of row takes of it.
func lookup(ident ast.NavigableExpr) (name string, how look) {
	parent, ok := ident.Parent()
	if !ok {
		return "", entirely
	}
	switch parent.Kind() {
	case ast.SelectKind:
		s := parent.AsSelect()
		if s.IsTestOnly() {
			return s.FieldName(), maybe
		}
		return s.FieldName(), surely
	case ast.CallKind:
		call := parent.AsCall()
		args := call.Args()
		if len(args) != 2 {
			return "", entirely
		}
		key, how := args[1], surely
		switch call.FunctionName() {
		case operators.Index:
		case operators.OptIndex, operators.OptSelect:
			how = maybe
		case operators.In:
			key, how = args[0], maybe
		default:
			return "", entirely
		}
		if key.Kind() == ast.LiteralKind {
			if name, ok := key.AsLiteral().(types.String); ok {
				return string(name), how
			}
		}
	}
	return "", entirely
}
