package outbox

import (
	"strings"
	"unicode/utf8"
)

// Glob is a pattern over event types: * is any run of characters, dots too, also none; ? is one
// character; case matters and everything else stands for itself. Matching takes no more than
// the product of the two lengths, whatever the pattern.
type Glob struct {
	pattern string
	kind    globKind
	fixed   string // what is left of the pattern where its kind needs no walk
}

type globKind uint8

const (
	globWalk   globKind = iota
	globAll             // *
	globExact           // no * and no ?
	globPrefix          // one *, at the end
)

// CompileGlob reads a pattern. There is none that is wrong; the empty one matches no type, for none is empty.
func CompileGlob(pattern string) Glob {
	g := Glob{pattern: pattern}
	if pattern == "" {
		g.kind = globExact
		return g
	}
	switch head := strings.TrimRight(pattern, "*"); {
	case head == "":
		g.kind = globAll
	case strings.ContainsAny(head, "*?"):
		g.kind = globWalk
	case head == pattern:
		g.kind, g.fixed = globExact, head
	default:
		g.kind, g.fixed = globPrefix, head
	}
	return g
}

// String is the pattern as it was written.
func (g Glob) String() string { return g.pattern }

// Match tells whether the pattern covers the whole of s.
func (g Glob) Match(s string) bool {
	switch g.kind {
	case globAll:
		return true
	case globExact:
		return s == g.fixed
	case globPrefix:
		return strings.HasPrefix(s, g.fixed)
	}
	return walkGlob(g.pattern, s)
}

// walkGlob needs to remember the last star alone: where a later part fails, an earlier star
// could only take what this one can take too.
func walkGlob(pattern, s string) bool {
	p, i := 0, 0
	star, mark := -1, 0 // the last star, and up to where of s it has taken
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, i
			p++
		case p < len(pattern) && pattern[p] == '?':
			i += runeLen(s[i:])
			p++
		case p < len(pattern) && pattern[p] == s[i]:
			i++
			p++
		case star >= 0:
			mark += runeLen(s[mark:]) // by characters, or ? would count the bytes of one
			p, i = star+1, mark
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}

func runeLen(s string) int {
	_, n := utf8.DecodeRuneInString(s)
	return n
}
