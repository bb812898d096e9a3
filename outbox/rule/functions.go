package rule

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
)

const (
	// maxMade is how long a text may be that one call of a function makes. The cost limit comes
	// too late for it: a call is priced when it has been made, and a megabyte with each letter
	// replaced by a megabyte is a terabyte by then.
	maxMade = 10 << 20
	maxList = 100_000 // elements that lists.range() may make
)

var errMade = fmt.Errorf("a text longer than %d MiB", maxMade>>20)

// functions are those of CEL's extensions whose own form would let a cheap call run for hours or fill the
// memory, with the same names and results, and the few that walhook adds. base64 is here since ext.Encoders
// brings a YAML parser along: half a megabyte in the program, and a few lines of YAML may stand for gigabytes.
var functions = []cel.EnvOption{
	cel.Function("base64.decode",
		cel.Overload("base64_decode_string", []*cel.Type{cel.StringType}, cel.BytesType,
			cel.UnaryBinding(func(s ref.Val) ref.Val { return decodeBase64(string(s.(types.String))) }))),
	cel.Function("base64.encode",
		cel.Overload("base64_encode_bytes", []*cel.Type{cel.BytesType}, cel.StringType,
			cel.UnaryBinding(func(b ref.Val) ref.Val {
				return types.String(base64.StdEncoding.EncodeToString(b.(types.Bytes)))
			}))),
	cel.Function("replace",
		cel.MemberOverload("string_replace_string_string", []*cel.Type{cel.StringType, cel.StringType, cel.StringType}, cel.StringType,
			cel.FunctionBinding(func(args ...ref.Val) ref.Val { return replace(args, -1) })),
		cel.MemberOverload("string_replace_string_string_int", []*cel.Type{cel.StringType, cel.StringType, cel.StringType, cel.IntType}, cel.StringType,
			cel.FunctionBinding(func(args ...ref.Val) ref.Val { return replace(args, int64(args[3].(types.Int))) }))),
	cel.Function("join",
		cel.MemberOverload("list_join", []*cel.Type{cel.ListType(cel.StringType)}, cel.StringType,
			cel.UnaryBinding(func(list ref.Val) ref.Val { return join(list.(traits.Lister), "") })),
		cel.MemberOverload("list_join_string", []*cel.Type{cel.ListType(cel.StringType), cel.StringType}, cel.StringType,
			cel.BinaryBinding(func(list, between ref.Val) ref.Val {
				return join(list.(traits.Lister), string(between.(types.String)))
			}))),
	cel.Function("indexOf",
		cel.MemberOverload("string_index_of_string", []*cel.Type{cel.StringType, cel.StringType}, cel.IntType,
			cel.BinaryBinding(func(s, part ref.Val) ref.Val { return indexOf(s, part, 0) })),
		cel.MemberOverload("string_index_of_string_int", []*cel.Type{cel.StringType, cel.StringType, cel.IntType}, cel.IntType,
			cel.FunctionBinding(func(args ...ref.Val) ref.Val { return indexOf(args[0], args[1], int64(args[2].(types.Int))) }))),
	cel.Function("lastIndexOf",
		cel.MemberOverload("string_last_index_of_string", []*cel.Type{cel.StringType, cel.StringType}, cel.IntType,
			cel.BinaryBinding(func(s, part ref.Val) ref.Val { return lastIndexOf(s, part, -1, false) })),
		cel.MemberOverload("string_last_index_of_string_int", []*cel.Type{cel.StringType, cel.StringType, cel.IntType}, cel.IntType,
			cel.FunctionBinding(func(args ...ref.Val) ref.Val {
				return lastIndexOf(args[0], args[1], int64(args[2].(types.Int)), true)
			}))),
	cel.Function("distinct",
		cel.MemberOverload("list_distinct", []*cel.Type{cel.ListType(cel.TypeParamType("T"))}, cel.ListType(cel.TypeParamType("T")),
			cel.UnaryBinding(distinct))),
	cel.Function("json.encode",
		cel.Overload("walhook_json_encode", []*cel.Type{cel.DynType}, cel.StringType,
			cel.UnaryBinding(func(v ref.Val) ref.Val {
				w := jsonWriter{limit: maxMade}
				if err := w.value(v); err != nil {
					return types.WrapErr(fmt.Errorf("json.encode: %w", err))
				}
				return types.String(w.buf)
			}))),
	cel.Function("url.encode",
		cel.Overload("walhook_url_encode", []*cel.Type{cel.StringType}, cel.StringType,
			cel.UnaryBinding(func(s ref.Val) ref.Val {
				return types.String(appendPercent(nil, string(s.(types.String)), "-._~", false))
			}))),
}

// decodeBase64 reads the standard alphabet, with padding or without.
func decodeBase64(s string) ref.Val {
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		b, err = base64.RawStdEncoding.DecodeString(s)
	}
	if err != nil {
		return types.WrapErr(err)
	}
	return types.Bytes(b)
}

func replace(args []ref.Val, n int64) ref.Val {
	s, old, by := string(args[0].(types.String)), string(args[1].(types.String)), string(args[2].(types.String))
	times := int64(strings.Count(s, old))
	if n >= 0 {
		times = min(times, n)
	}
	if grows := int64(len(by) - len(old)); grows > 0 && times > maxMade/grows {
		return types.WrapErr(fmt.Errorf("replace() would make %w", errMade))
	}
	return types.String(strings.Replace(s, old, by, int(times)))
}

func join(list traits.Lister, between string) ref.Val {
	var made strings.Builder
	n := 0
	for it := list.Iterator(); it.HasNext() == types.True; n++ {
		s, ok := it.Next().(types.String)
		if !ok {
			return types.NewErr("join() wants a list of strings; string() makes them")
		}
		if n > 0 {
			made.WriteString(between)
		}
		if made.Len()+len(s) > maxMade {
			return types.WrapErr(fmt.Errorf("join() would make %w", errMade))
		}
		made.WriteString(string(s))
	}
	return types.String(made.String())
}

// byteOf is where the rune of that number begins; false where there are not so many.
func byteOf(s string, n int64) (int, bool) {
	for i := range s {
		if n == 0 {
			return i, true
		}
		n--
	}
	return len(s), n == 0
}

var errIndex = errors.New("index out of range")

func indexOf(in, of ref.Val, from int64) ref.Val {
	s, part := string(in.(types.String)), string(of.(types.String))
	if from < 0 {
		return types.WrapErr(fmt.Errorf("%w: %d", errIndex, from))
	}
	begin, there := byteOf(s, from)
	switch {
	case part == "":
		return types.Int(min(from, int64(utf8.RuneCountInString(s))))
	case !there:
		return types.Int(-1)
	}
	i := strings.Index(s[begin:], part)
	if i < 0 {
		return types.Int(-1)
	}
	return types.Int(from + int64(utf8.RuneCountInString(s[begin:begin+i])))
}

// lastIndexOf finds the last part that begins at or before a rune, where that is given.
func lastIndexOf(in, of ref.Val, from int64, given bool) ref.Val {
	s, part := string(in.(types.String)), string(of.(types.String))
	if given && from < 0 {
		return types.WrapErr(fmt.Errorf("%w: %d", errIndex, from))
	}
	runes := int64(utf8.RuneCountInString(s))
	if part == "" {
		if given {
			runes = min(from, runes)
		}
		return types.Int(runes)
	}
	within := s
	if given {
		if from >= runes {
			return types.Int(-1)
		}
		begin, _ := byteOf(s, from)
		within = s[:min(len(s), begin+len(part))]
	}
	i := strings.LastIndex(within, part)
	if i < 0 {
		return types.Int(-1)
	}
	return types.Int(utf8.RuneCountInString(s[:i]))
}

// distinct compares each element with each, so a long list is refused.
func distinct(v ref.Val) ref.Val {
	list := v.(traits.Lister)
	n, _ := list.Size().(types.Int)
	s := scale{left: maxCost / max(1, int(n))}
	if s.value(list); s.left < 0 {
		return types.NewErr("distinct() of too long a list")
	}
	var kept []ref.Val
next:
	for it := list.Iterator(); it.HasNext() == types.True; {
		e := it.Next()
		for _, k := range kept {
			if types.Equal(k, e) == types.True {
				continue next
			}
		}
		kept = append(kept, e)
	}
	return types.NewRefValList(types.DefaultTypeAdapter, kept)
}

// appendPercent writes s with all but letters, digits and some more as %XX; plus writes a space
// as +.
func appendPercent(dst []byte, s, more string, plus bool) []byte {
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.IndexByte(more, c) >= 0:
			dst = append(dst, c)
		case c == ' ' && plus:
			dst = append(dst, '+')
		default:
			const hex = "0123456789ABCDEF"
			dst = append(dst, '%', hex[c>>4], hex[c&15])
		}
	}
	return dst
}
