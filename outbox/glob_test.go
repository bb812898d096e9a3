package outbox

import (
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func TestGlob(t *testing.T) {
	for _, c := range []struct {
		pattern, s string
		want       bool
	}{
		{"*", "", true},
		{"*", "a.b", true},
		{"**", "a", true},
		{"invoice.*", "invoice.paid", true},
		{"invoice.*", "invoice.paid.late", true},
		{"invoice.*", "invoice.", true},
		{"invoice.*", "invoice", false},
		{"invoice.*", "Invoice.paid", false},
		{"*.paid", "invoice.paid", true},
		{"*.paid", "invoice.paid.late", false},
		{"a?c", "abc", true},
		{"a?c", "aéc", true},
		{"a?c", "ac", false},
		{"?", "€", true},
		{"*??", "€", false},
		{"a.c", "abc", false},
		{"[ab]", "a", false},
		{"[ab]", "[ab]", true},
		{`a\*`, `a\b`, true},
		{"a*b*c", "a.b.b.c", true},
		{"a*b*c", "a.c.b", false},
	} {
		g := CompileGlob(c.pattern)
		require.Equal(t, c.want, g.Match(c.s), "%q on %q", c.pattern, c.s)
		require.Equal(t, c.pattern, g.String())
	}
	require.False(t, CompileGlob("").Match("a"))
}

func TestGlobAgreesWithRegexp(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pattern := rapid.StringOfN(rapid.RuneFrom([]rune(`ab.é€*?[\`)), 0, 12, -1).Draw(t, "pattern")
		s := rapid.StringOfN(rapid.RuneFrom([]rune(`ab.é€*?[\`)), 0, 12, -1).Draw(t, "s")
		re := strings.NewReplacer(`\*`, `.*`, `\?`, `.`).Replace(regexp.QuoteMeta(pattern))
		g := CompileGlob(pattern)
		require.Equal(t, regexp.MustCompile(`(?s)\A`+re+`\z`).MatchString(s), g.Match(s))
	})
}

func TestGlobDoesNotBlowUp(t *testing.T) {
	g := CompileGlob(strings.Repeat("*a", 2000) + "b")
	start := time.Now()
	require.False(t, g.Match(strings.Repeat("a", 20000)))
	require.Less(t, time.Since(start), 5*time.Second)
}

func BenchmarkGlob(b *testing.B) {
	g := CompileGlob("*.order.*.v?")
	b.ReportAllocs()
	for b.Loop() {
		g.Match("shop.order.created.v2")
	}
}
