package store

import (
	"bytes"
	"encoding/json"
	"strings"
	"unicode/utf8"
)

const (
	// detailLimit is how many bytes of a failure's description are kept.
	detailLimit = 1000
	// headersDepth is how many brackets headers may have to stand in a json column: its parser
	// recurses, and how deep it may is the server's max_stack_depth.
	headersDepth = 500
)

// isText tells whether a text column gives b back as it is. asciiOnly is for databases of
// another encoding, which may lack any other character.
func isText(b []byte, asciiOnly bool) bool {
	if bytes.IndexByte(b, 0) >= 0 {
		return false
	}
	if asciiOnly {
		return isASCII(b)
	}
	return utf8.Valid(b)
}

func isASCII[T []byte | string](s T) bool {
	for i := range len(s) {
		if s[i] >= utf8.RuneSelf {
			return false
		}
	}
	return true
}

// isHeaders tells whether a json column takes b and gives it back as it is.
func isHeaders(b []byte, asciiOnly bool) bool {
	return isText(b, asciiOnly) && bytes.Count(b, []byte("{"))+bytes.Count(b, []byte("[")) <= headersDepth && json.Valid(b)
}

// clean makes any text one that Postgres takes; what is one already stays as it is.
func clean(s string) string {
	if utf8.ValidString(s) && strings.IndexByte(s, 0) < 0 {
		return s
	}
	return strings.ToValidUTF8(strings.ReplaceAll(s, "\x00", "\uFFFD"), "\uFFFD")
}

// cleanDetail is clean for text of HTTP peers, which is for people: shortened where it is
// long, and without characters that the database may not have.
func cleanDetail(s string, asciiOnly bool) string {
	s = clean(s)
	if len(s) > detailLimit {
		s = strings.ToValidUTF8(s[:detailLimit], "")
	}
	if !asciiOnly || isASCII(s) {
		return s
	}
	return strings.Map(func(r rune) rune {
		if r >= utf8.RuneSelf {
			return '?'
		}
		return r
	}, s)
}
