package rule

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func row() map[string]any {
	payload, err := ParseJSON([]byte(`{"n":9007199254740993,"big":18446744073709551615,"f":12.5,"s":"<a&b>","list":[3,1],"deep":{"b":1,"a":null}}`))
	if err != nil {
		panic(err)
	}
	return map[string]any{
		"aggregatetype": "order", "type": "created", "n": int64(7), "u": uint64(8), "f": 1e21, "half": 0.5, "whole": 3.0,
		"ok": true, "none": nil, "at": time.Date(2026, 2, 3, 4, 5, 6, 789000000, time.UTC),
		"raw": []byte("hi"), "bad": []byte{0xff}, "payload": payload, "My Col": "x",
	}
}

func TestTextOfEveryKindOfResult(t *testing.T) {
	for src, want := range map[string]string{
		`row.aggregatetype + '.' + row.type`: "order.created",
		`row['type']`:                        "created",
		"row.`My Col`":                       "x",
		`row.n`:                              "7",
		`row.n * 6`:                          "42",
		`row.u`:                              "8",
		`row.f`:                              "1e+21",
		`row.half`:                           "0.5",
		`row.whole`:                          "3",
		`double('NaN')`:                      "NaN",
		`row.ok`:                             "true",
		`row.n > 6.5`:                        "true",
		`row.at`:                             "2026-02-03T04:05:06.789Z",
		`row.at + duration('1h')`:            "2026-02-03T05:05:06.789Z",
		`duration('90m')`:                    "5400s",
		`string(row.at)`:                     "2026-02-03T04:05:06.789Z",
		`row.raw`:                            "hi",
		`base64.encode(row.bad)`:             "/w==",
		`row.payload.n`:                      "9007199254740993",
		`row.payload.big`:                    "18446744073709551615",
		`row.payload.deep`:                   `{"a":null,"b":1}`,
		`row.payload.list`:                   `[3,1]`,
		`[row.payload.s, row.at, row.bad, row.half, row.whole]`: `["<a&b>","2026-02-03T04:05:06.789Z","/w==",0.5,3]`,
		`{'b': row.none, 'a': row.ok, 'c': {1: 2u}}`:            `{"a":true,"b":null,"c":{"1":2}}`,
		`row.?gone.orValue('x')`:                                "x",
		`row.?type`:                                             "created",
		`has(row.gone) ? row.gone : 'y'`:                        "y",
		`row.type.upperAscii()`:                                 "CREATED",
		`cel.bind(t, row.type, t + t)`:                          "createdcreated",
	} {
		c, err := CompileColumn(src)
		require.NoError(t, err, src)
		got, null, err := c.Text(row())
		require.NoError(t, err, src)
		require.False(t, null, src)
		require.Equal(t, want, got, src)
	}
	for _, src := range []string{`null`, `row.none`, `row.?gone`, `optional.of(row.none)`} {
		c, err := CompileColumn(src)
		require.NoError(t, err, src)
		_, null, err := c.Text(row())
		require.NoError(t, err, src)
		require.True(t, null, src)
	}
}

func TestMistakesFailAtLoadWithACaret(t *testing.T) {
	for src, want := range map[string]string{
		`row.type +`:               "mismatched input",
		"row.type\n + foo":         "ERROR: <input>:2:4: undeclared reference to 'foo'",
		`'a' + 1`:                  "no matching overload",
		``:                         "mismatched input",
		`row.type.matches('(')`:    "invalid matches argument",
		`type(row.n)`:              "gives type",
		strings.Repeat("a", 17000): "expression code point size exceeds limit",
		`timestamp('yesterday')`:   "invalid timestamp argument",
	} {
		_, err := CompileColumn(src)
		require.ErrorContains(t, err, want, src)
	}
	_, err := CompileColumn("row.type + foo")
	require.Contains(t, err.Error(), "\n | row.type + foo\n | ...........^")
}

func TestFailuresOfOneRow(t *testing.T) {
	for src, want := range map[string]string{
		`row.none + 'x'`:  "no such overload",
		`row.gone`:        "no such key: gone",
		`row.n / 0`:       "division by zero",
		`row.bad`:         "base64.encode() makes it text",
		`[double('NaN')]`: "JSON has no number",
		`[type(row.n)]`:   "has no JSON",
	} {
		c, err := CompileColumn(src)
		require.NoError(t, err, src)
		_, _, err = c.Text(row())
		require.ErrorContains(t, err, want, src)
	}
}

func TestCostIsBounded(t *testing.T) {
	list := make([]any, 3000)
	for i := range list {
		list[i] = int64(i)
	}
	c, err := CompileColumn(`row.l.all(a, row.l.all(b, a + b >= 0))`)
	require.NoError(t, err)
	start := time.Now()
	_, _, err = c.Text(map[string]any{"l": list})
	require.ErrorIs(t, err, ErrTooExpensive)
	require.Less(t, time.Since(start), 5*time.Second)

	for _, seed := range []string{`row.s`, `"x"`, `row.l`, `[1]`} {
		doubled := "x22 == x22"
		for i := 22; i > 0; i-- {
			doubled = fmt.Sprintf("cel.bind(x%d, x%d + x%d, %s)", i, i-1, i-1, doubled)
		}
		c, err = CompileColumn("cel.bind(x0, " + seed + ", " + doubled + ")")
		if errors.Is(err, ErrTooExpensive) {
			continue // better still
		}
		require.NoError(t, err)
		start = time.Now()
		_, _, err = c.Text(map[string]any{"s": strings.Repeat("x", 1000), "l": list})
		require.ErrorIs(t, err, ErrTooExpensive, seed)
		require.Less(t, time.Since(start), 5*time.Second, seed)
	}

	c, err = CompileColumn(`row.l.map(x, row.s)`) // cheap to build, 12 GB of text
	require.NoError(t, err)
	_, _, err = c.Text(map[string]any{"l": list, "s": strings.Repeat("x", 4<<20)})
	require.ErrorIs(t, err, ErrTooLong)
}

func TestReadsAreKnownAtLoad(t *testing.T) {
	for src, want := range map[string]Reads{
		`row.a + row.b.c + row["d"] + row.a`:    {Columns: []string{"a", "b", "d"}},
		"row.`x y`":                             {Columns: []string{"x y"}},
		`has(row.a) ? row.a : row.b`:            {Columns: []string{"b"}, Maybe: []string{"a"}},
		`'a' in row`:                            {Maybe: []string{"a"}},
		`row.?a.orValue(row[?"b"].orValue(''))`: {Maybe: []string{"a", "b"}},
		`row`:                                   {All: true},
		`row[row.k]`:                            {Columns: []string{"k"}, All: true},
		`row.map(k, k)`:                         {All: true},
		`row.list.map(x, row.b)`:                {Columns: []string{"b", "list"}},
		`row.list.map(row, row.b)`:              {All: true},
		`[row.a].exists(x, x == row.?b.orValue('')) ? 'y' : 'n'`: {Columns: []string{"a"}, Maybe: []string{"b"}},
		`{'k': row.a}`:                   {Columns: []string{"a"}},
		`"constant"`:                     {},
		`.row.a`:                         {Columns: []string{"a"}},
		`cel.bind(row, {'a': 1}, row.a)`: {All: true},
	} {
		c, err := CompileColumn(src)
		require.NoError(t, err, src)
		got := c.Reads()
		require.Equal(t, want.All, got.All, src)
		require.ElementsMatch(t, want.Columns, got.Columns, src)
		require.ElementsMatch(t, want.Maybe, got.Maybe, src)
	}
}

func TestParseJSON(t *testing.T) {
	for _, bad := range []string{``, `{`, `1 2`, strings.Repeat("[", 20000)} {
		_, err := ParseJSON([]byte(bad))
		require.Error(t, err)
	}
	v, err := ParseJSON([]byte(` [1, -0, 1.0, 1.5, 123456789012345678901234567890, 1e400] `))
	require.NoError(t, err)
	require.Equal(t, []any{int64(1), Number("-0"), Number("1.0"), 1.5, Number("123456789012345678901234567890"), Number("1e400")}, v)
}

func FuzzCompileColumn(f *testing.F) {
	for _, s := range []string{`row.a`, `row['a'] + "x"`, `has(row.a)`, `row.l.map(x, x)`, "row.`a b`", `{1: row}`, `'\u0000'`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, src string) {
		c, err := CompileColumn(src)
		if err != nil {
			return
		}
		a, nullA, errA := c.Text(row())
		b, nullB, errB := c.Text(row())
		require.Equal(t, errA == nil, errB == nil)
		require.Equal(t, nullA, nullB)
		require.Equal(t, a, b)
	})
}

func BenchmarkColumnText(b *testing.B) {
	c, err := CompileColumn(`row.aggregatetype + '.' + row.type`)
	require.NoError(b, err)
	r := row()
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := c.Text(r); err != nil {
			b.Fatal(err)
		}
	}
}
