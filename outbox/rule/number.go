package rule

import (
	"reflect"
	"strconv"
	"strings"

	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
)

// Number is a number that no int64, uint64 or double is written like: 1.10, 12345678901234567890123, 1e400.
// Handed on, it is the text it was read from; computed with, it is the nearest double. guard.go
// sees to it that no function of CEL meets one but string(), which gives the text.
type Number string

var (
	_ ref.Val       = Number("")
	_ traits.Zeroer = Number("")
)

// ParseNumber reads a number as JSON and Postgres write one. It is an int64 or uint64 where it is written as an integer and
// fits, a float64 where that prints as the same text, else a Number.
func ParseNumber(text string) any {
	if !strings.ContainsAny(text, ".eE") {
		if i, err := strconv.ParseInt(text, 10, 64); err == nil && text != "-0" {
			return i
		}
		if u, err := strconv.ParseUint(text, 10, 64); err == nil {
			return u
		}
		return Number(text)
	}
	if f, err := strconv.ParseFloat(text, 64); err == nil {
		var buf [32]byte
		if string(appendDouble(buf[:0], f)) == text {
			return f
		}
	}
	return Number(text)
}

// plain is the value that functions compute with.
func (n Number) plain() ref.Val {
	f, err := strconv.ParseFloat(string(n), 64)
	if err != nil {
		return types.NewErr("the number %.40s is out of range", string(n))
	}
	return types.Double(f)
}

// Equal compares the values, as CEL does with doubles.
func (n Number) Equal(other ref.Val) ref.Val {
	if o, ok := other.(Number); ok {
		if o == n {
			return types.True
		}
		other = o.plain()
	}
	return types.Equal(n.plain(), other)
}

// ConvertToType gives the number's own text as a string.
func (n Number) ConvertToType(t ref.Type) ref.Val {
	if t == types.StringType {
		return types.String(n)
	}
	return n.plain().ConvertToType(t)
}

// ConvertToNative gives a double.
func (n Number) ConvertToNative(t reflect.Type) (any, error) { return n.plain().ConvertToNative(t) }

// Type is that of a double.
func (n Number) Type() ref.Type { return types.DoubleType }

// Value is a float64.
func (n Number) Value() any { return n.plain().Value() }

// IsZeroValue tells whether the number is 0.
func (n Number) IsZeroValue() bool { return n.plain() == types.Double(0) }

// appendDouble writes a double as encoding/json does: integers without a point, no exponent
// unless it is far from one. It must be finite.
func appendDouble(dst []byte, f float64) []byte {
	format := byte('f')
	if abs := max(f, -f); abs != 0 && (abs < 1e-6 || abs >= 1e21) {
		format = 'e'
	}
	begin := len(dst)
	dst = strconv.AppendFloat(dst, f, format, -1, 64)
	if n := len(dst); format == 'e' && n-begin >= 4 && dst[n-4] == 'e' && dst[n-3] == '-' && dst[n-2] == '0' {
		dst[n-2] = dst[n-1] // e-09 is written e-9
		dst = dst[:n-1]
	}
	return dst
}

// plainAdapter shows what lies in a list or map as the values that functions compute with.
type plainAdapter struct{}

// NativeToValue is asked for each element when it is looked at.
func (plainAdapter) NativeToValue(v any) ref.Val {
	switch v := v.(type) {
	case Number:
		return v.plain()
	case map[string]any:
		return types.NewStringInterfaceMap(plainAdapter{}, v)
	case []any:
		return types.NewDynamicList(plainAdapter{}, v)
	}
	return types.DefaultTypeAdapter.NativeToValue(v)
}

// plainly is v without a Number in it. What an expression built itself is copied.
func plainly(v ref.Val) ref.Val {
	switch v := v.(type) {
	case Number:
		return v.plain()
	case *types.Optional:
		if v.HasValue() {
			return types.OptionalOf(plainly(v.GetValue()))
		}
	case traits.Mapper:
		if native, ok := v.Value().(map[string]any); ok {
			return types.NewStringInterfaceMap(plainAdapter{}, native)
		}
		copied := map[ref.Val]ref.Val{}
		for it := v.Iterator(); it.HasNext() == types.True; {
			key := it.Next()
			copied[plainly(key)] = plainly(v.Get(key))
		}
		return types.NewRefValMap(types.DefaultTypeAdapter, copied)
	case traits.Lister:
		if native, ok := v.Value().([]any); ok {
			return types.NewDynamicList(plainAdapter{}, native)
		}
		var copied []ref.Val
		for it := v.Iterator(); it.HasNext() == types.True; {
			copied = append(copied, plainly(it.Next()))
		}
		return types.NewRefValList(types.DefaultTypeAdapter, copied)
	}
	return v
}
