package rule

import (
	"slices"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/overloads"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
)

// Between a function and its arguments stand calls that no source can write. They let functions
// see numbers as CEL knows them (a Number is one of ours), and make the rule pay for all that lies in a list
// or map before a function walks through it: CEL prices it by its length alone, so that forty
// lists in each other, [x, x] of the one before, could be compared for hours at a cost of forty.
const (
	asNumber = "@number" // a number as functions compute with it; anything else as it is
	weighed  = "@weighed"
	inside   = "@inside"   // weighed, and without a Number in it
	elements = "@elements" // inside of a list; a map as it is, as in looks only for a key of it
	matched  = "@matched"  // a text that a regular expression reads, at the price of that
	pattern  = "@pattern"  // a regular expression that is to be compiled, at the price of that, if it is short enough
)

var guards = []cel.EnvOption{
	guardFunction(asNumber, func(v ref.Val) ref.Val {
		if n, ok := v.(Number); ok {
			return n.plain()
		}
		return v
	}),
	guardFunction(weighed, func(v ref.Val) ref.Val { return v }),
	guardFunction(matched, func(v ref.Val) ref.Val { return v }),
	guardFunction(pattern, func(v ref.Val) ref.Val {
		if text, ok := v.(types.String); ok && len(text) > maxPattern {
			return types.NewErr("a regular expression of %d bytes, where %d are allowed", len(text), maxPattern)
		}
		return v
	}),
	guardFunction(inside, within),
	guardFunction(elements, func(v ref.Val) ref.Val {
		if _, ok := v.(traits.Mapper); ok {
			return v
		}
		return within(v)
	}),
}

// within is v without a Number in it. What weighs too much is not copied: the guard's price ends
// the evaluation.
func within(v ref.Val) ref.Val {
	if *price(v) > maxCost {
		return v
	}
	return plainly(v)
}

func guardFunction(name string, binding func(ref.Val) ref.Val) cel.EnvOption {
	t := cel.TypeParamType("T")
	return cel.Function(name, cel.Overload(name, []*cel.Type{t}, t, cel.UnaryBinding(binding)))
}

// handsOn are the functions that only choose among their arguments or wrap them; string writes a Number as it is.
var handsOn = []string{
	operators.Conditional, operators.LogicalAnd, operators.LogicalOr, operators.LogicalNot,
	operators.NotStrictlyFalse, operators.OptSelect,
	"optional.of", "optional.none", "or", "orValue", "value", "hasValue",
	overloads.Size, overloads.TypeConvertDyn, overloads.TypeConvertString,
	asNumber, weighed, inside, elements, matched, pattern,
}

// guardFor names the guard before an argument; empty where there is none.
func guardFor(function string, arg int) string {
	switch function {
	case operators.Index, operators.OptIndex:
		if arg == 0 {
			return ""
		}
		return asNumber
	case operators.Add, overloads.TypeConvertType:
		return asNumber
	case operators.In:
		if arg == 1 {
			return elements
		}
	case "slice", "flatten", "reverse", "first", "last", "optional.unwrap", "unwrapOpt", "json.encode":
		return weighed
	case overloads.Matches:
		if arg == 0 {
			return matched
		}
		return pattern
	case "@sortByAssociatedKeys":
		if arg == 0 {
			return weighed
		}
	}
	if slices.Contains(handsOn, function) {
		return ""
	}
	return inside
}

// guarded puts the guards into an expression.
type guarded struct{}

func (guarded) Optimize(ctx *cel.OptimizerContext, tree *ast.AST) *ast.AST {
	for id := range ctx.MacroCalls() {
		ctx.ClearMacroCall(id) // nobody prints the expression
	}
	for _, e := range ast.MatchDescendants(ast.NavigateAST(tree), ast.KindMatcher(ast.CallKind)) {
		call := e.AsCall()
		at := 0 // of the argument, the receiver counted
		guard := func(arg ast.Expr) ast.Expr {
			name := guardFor(call.FunctionName(), at)
			at++
			if name == "" || !mayNeed(name, arg, tree.GetType(arg.ID())) {
				return arg
			}
			return ctx.NewCall(name, arg)
		}
		var target ast.Expr
		if call.IsMemberFunction() {
			target = guard(call.Target())
		}
		args := make([]ast.Expr, 0, len(call.Args()))
		for _, arg := range call.Args() {
			args = append(args, guard(arg))
		}
		if target != nil {
			e.SetKindCase(ctx.NewMemberCall(call.FunctionName(), target, args...))
		} else {
			e.SetKindCase(ctx.NewCall(call.FunctionName(), args...))
		}
	}
	return tree
}

// mayNeed tells whether an argument may be, at run time, something that a guard is for.
func mayNeed(guard string, arg ast.Expr, t *cel.Type) bool {
	switch arg.Kind() {
	case ast.LiteralKind:
		return false
	case ast.ListKind:
		if !slices.ContainsFunc(arg.AsList().Elements(), func(e ast.Expr) bool { return e.Kind() != ast.LiteralKind }) {
			return false
		}
	}
	if guard == matched || guard == pattern {
		return true
	}
	switch t.Kind() {
	case types.BoolKind, types.IntKind, types.UintKind, types.DoubleKind, types.StringKind, types.BytesKind,
		types.TimestampKind, types.DurationKind, types.NullTypeKind, types.TypeKind:
		return false
	case types.ListKind, types.MapKind:
		return guard != asNumber
	}
	return true
}

// scale weighs values: one for each, and one for every ten characters in a list or map. It
// stops when nothing is left.
type scale struct{ left int }

// price is what the guard of an argument costs: nothing for what is no list or map.
func price(v ref.Val) *uint64 {
	s := scale{left: maxCost}
	switch v.(type) {
	case traits.Mapper, traits.Lister, *types.Optional:
		s.value(v)
	}
	p := uint64(maxCost - s.left)
	return &p
}

func (s *scale) value(v any) {
	if s.left--; s.left < 0 {
		return
	}
	switch v := v.(type) {
	case string:
		s.left -= len(v) / 10
	case []byte:
		s.left -= len(v) / 10
	case types.String:
		s.left -= len(v) / 10
	case types.Bytes:
		s.left -= len(v) / 10
	case map[string]any:
		for key, e := range v {
			s.left -= len(key) / 10
			if s.value(e); s.left < 0 {
				return
			}
		}
	case []any:
		for _, e := range v {
			if s.value(e); s.left < 0 {
				return
			}
		}
	case *types.Optional:
		if v.HasValue() {
			s.value(v.GetValue())
		}
	case traits.Mapper:
		if native, ok := v.Value().(map[string]any); ok {
			s.value(native)
			return
		}
		for it := v.Iterator(); it.HasNext() == types.True && s.left >= 0; {
			key := it.Next()
			s.value(key)
			s.value(v.Get(key))
		}
	case traits.Lister:
		if native, ok := v.Value().([]any); ok {
			s.value(native)
			return
		}
		for it := v.Iterator(); it.HasNext() == types.True && s.left >= 0; {
			s.value(it.Next())
		}
	}
}
