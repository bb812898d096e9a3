package rule

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func event(data string) *Event {
	return &Event{
		ID: "evt_1", Type: "order.created", Key: "42", Tenant: "acme", Time: time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC),
		Headers: []byte(`{"source":"shop","n":1.10}`), Data: []byte(data), JSON: true,
	}
}

const order = `{"z": 1, "amount": 120.50, "id": 12345678901234567890123, "qty": 3, "u": 18446744073709551615, "huge": 1e400, ` +
	`"neg0": -0, "exp": 1E5, "one": 1.0, "small": 0.1, "vip": true, "none": null, "email": "a+b@example.com", ` +
	`"tags": ["new", "eu"], "items": [{"sku": "x", "price": 1.10}, {"sku": "y", "price": 2.00}]}`

func TestFilters(t *testing.T) {
	for src, want := range map[string]bool{
		`true`:              true,
		`data.amount > 100`: true,
		`100 < data.amount`: true,
		`data.amount == 120.5 && 120.5 == data.amount`:                    true,
		`data.one == 1 && data.one + 1.0 == 2.0 && 1.5 + data.one == 2.5`: true,
		`data.id > 1e22`: true,
		`string(data.id) == '12345678901234567890123' && string(data.amount) == '120.50'`:              true,
		`data.u == 18446744073709551615u`:                                                              true,
		`data.neg0 == 0`:                                                                               true,
		`type(data.amount) == double && type(data.qty) == int`:                                         true,
		`data.items.exists(i, i.price == 1.1) && data.items.all(i, i.price < 3)`:                       true,
		`data.items.map(i, i.price) == [1.1, 2.0] && [1.1, 2] == data.items.map(i, i.price)`:           true,
		`data.items[0] == {'sku': 'x', 'price': 1.1} && {'sku': 'x', 'price': 1.1} == data.items[0]`:   true,
		`{'sku': 'x', 'price': 1.1} in data.items && 1.1 in data.items.map(i, i.price)`:                true,
		`data.items.map(i, i.price).sort()[1] == 2.0 && math.greatest(data.amount, data.one) == 120.5`: true,
		`data.tags[data.one] == 'eu'`:                                                                  true,
		`data.amount in [120.5, 1.0]`:                                                                  true,
		`int(data.amount) == 120 && double(data.exp) == 100000.0`:                                      true,
		`'vip' in data && !('other' in data) && has(data.vip)`:                                         true,
		`data.vip`:                                    true,
		`data.?missing.orValue(1) == 2`:               false,
		`type.startsWith('order.')`:                   true,
		`headers.source == 'shop'`:                    true,
		`headers.n == 1.1`:                            true,
		`id + key + tenant == 'evt_142acme'`:          true,
		`time < timestamp('2026-02-03T05:00:00Z')`:    true,
		`'eu' in data.tags`:                           true,
		`data.none == null`:                           true,
		`data.email.matches('^[^@]+@example\\.com$')`: true,
		`id.matches(id)`:                              true,
		`data.tags.join('-') == 'new-eu' && data.email.replace('@', ' at ') == 'a+b at example.com'`:                                     true,
		`'äbcäb'.indexOf('b') == 1 && 'äbcäb'.lastIndexOf('ä') == 3 && 'äbcäb'.indexOf('b', 2) == 4 && 'äbcäb'.lastIndexOf('b', 3) == 1`: true,
		`[1, 1.0, 2, data.one].distinct() == [1, 2]`: true,
		`base64.decode('aGVsbG8=') == b'hello' && base64.decode('aGVsbG8') == b'hello' && base64.encode(b'hello') == 'aGVsbG8='`: true,
	} {
		f, err := CompileFilter(src)
		require.NoError(t, err, src)
		got, err := f.Wants(event(order))
		require.NoError(t, err, src)
		require.Equal(t, want, got, src)
		require.Equal(t, src, f.Source())
	}
}

func TestAFilterOfAnotherTypeFailsAtLoad(t *testing.T) {
	for src, want := range map[string]string{
		`1 + 1`:           "gives int, where true or false is wanted",
		`type`:            "gives string",
		`payload.amount`:  "undeclared reference to 'payload'",
		`tenant > 5`:      "no matching overload",
		`data.amount > `:  "Syntax error",
		`yaml.parse(id)`:  "undeclared reference to 'yaml'",
		`@inside(data)`:   "Syntax error",
		`id.matches('(')`: "invalid matches argument",
		`lists.range(9000).map(x, lists.range(9000)).size() > 1`: ErrTooExpensive.Error(),
	} {
		_, err := CompileFilter(src)
		require.ErrorContains(t, err, want, src)
	}
}

func TestARuleThatFailsOnOneEventSaysWhy(t *testing.T) {
	for src, want := range map[string]string{
		`data.missing > 1`:                        "no such key: missing",
		`data["absent"] > 1`:                      "no such key: absent",
		`data.amount`:                             "the result is double, not true or false",
		`data.tags > 1`:                           "no such overload",
		`data.huge > 1`:                           "the number 1e400 is out of range",
		`data.qty / 0 == 1`:                       "division by zero",
		`headers.missing == ''`:                   "no such key: missing",
		`{'a': 1}[data.vip ? 'hunter2' : ''] > 1`: "…",
	} {
		f, err := CompileFilter(src)
		require.NoError(t, err, src)
		_, err = f.Wants(event(order))
		require.ErrorContains(t, err, want, src)
		require.NotContains(t, err.Error(), "hunter2")
	}
	f, err := CompileFilter(`int(data.text) > 1`)
	require.NoError(t, err)
	_, err = f.Wants(event(`{"text":"` + strings.Repeat("ä", 5000) + `"}`))
	require.Error(t, err)
	require.Less(t, len(err.Error()), 400)
	raw := event("hello")
	raw.JSON = false
	_, err = f.Wants(raw)
	require.ErrorContains(t, err, "the payload is not JSON")
}

func TestJSONIsParsedOnlyWhenARuleLooksAtIt(t *testing.T) {
	lazy, err := CompileFilter(`type == 'order.created' || data.amount > 1`)
	require.NoError(t, err)
	require.True(t, lazy.Parses())
	e := event(`{"amount": 1`) // what says it is JSON, and is not
	wants, err := lazy.Wants(e)
	require.NoError(t, err)
	require.True(t, wants)
	e.Type = "other"
	_, err = lazy.Wants(e)
	require.ErrorContains(t, err, "unexpected EOF")

	plain, err := CompileFilter(`type == 'x' && key != '' && time > timestamp(0)`)
	require.NoError(t, err)
	require.False(t, plain.Parses())
}

func TestManyRulesShareOneEvent(t *testing.T) {
	f, err := CompileFilter(`data.items.all(i, i.price > 1) && headers.source == 'shop'`)
	require.NoError(t, err)
	b, err := CompileBody(`{'a': data.items, 'b': headers}`)
	require.NoError(t, err)
	e := event(order)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 50 {
				wants, err := f.Wants(e)
				require.NoError(t, err)
				require.True(t, wants)
				text, err := b.JSON(e, 0)
				require.NoError(t, err)
				require.Equal(t, `{"a":[{"price":1.10,"sku":"x"},{"price":2.00,"sku":"y"}],"b":{"n":1.10,"source":"shop"}}`, string(text))
			}
		})
	}
	all.Wait()
}

func TestNumbersPassUntouchedUnlessComputedWith(t *testing.T) {
	for src, want := range map[string]string{
		`data`:              order, // its own text, members in their order
		`{'payload': data}`: `{"payload":` + order + `}`,
		`[data.id, data.amount, data.huge, data.neg0, data.exp, data.one, data.u, data.small]`: `[12345678901234567890123,120.50,1e400,-0,1E5,1.0,18446744073709551615,0.1]`,
		`{'a': data.vip ? data.amount : 0}`:                                                    `{"a":120.50}`,
		`data.items.map(i, {'p': i.price})`:                                                    `[{"p":1.10},{"p":2.00}]`,
		`data.items.filter(i, i.price > 1.5)`:                                                  `[{"price":2.00,"sku":"y"}]`,
		`data.items.map(i, i.price) + [data.one]`:                                              `[1.10,2.00,1.0]`,
		`data.items.map(i, i.price).reverse()`:                                                 `[2.00,1.10]`,
		`[data.items.map(i, i.price)].flatten()`:                                               `[1.10,2.00]`,
		`data.items.sortBy(i, -i.price)[0].price`:                                              `2.00`,
		`data.?one.orValue(2)`:                                                                 `1.0`,
		`cel.bind(x, data.amount, {'x': x, 'y': x * 2.0})`:                                     `{"x":120.50,"y":241}`,
		`data.amount + 0.0`:                                                                    `120.5`,
		`double(data.amount)`:                                                                  `120.5`,
		`'R$ ' + string(data.amount)`:                                                          `"R$ 120.50"`,
		`string(data.id)`:                                                                      `"12345678901234567890123"`,
		`json.encode({'n': data.amount, 'h': '<&>'})`:                                          `"{\"h\":\"<&>\",\"n\":120.50}"`,
		`optional.of(data.one)`:                                                                `1.0`,
		`data.?gone`:                                                                           `null`,
		`data.items[0].price`:                                                                  `1.10`,
		`dyn(data.amount)`:                                                                     `120.50`,
		`{'at': time, 'b': b'hi', 'd': duration('90s')}`:                                       `{"at":"2026-02-03T04:05:06Z","b":"aGk=","d":"90s"}`,
	} {
		b, err := CompileBody(src)
		require.NoError(t, err, src)
		got, err := b.JSON(event(order), 0)
		require.NoError(t, err, src)
		require.Equal(t, want, string(got), src)
	}
	for _, number := range []string{"1.10", "-0.0", "1e-7", "0.0000001", "1e21", "1000000000000000000000", "9007199254740993", "0", "-1", "1.7976931348623157e308", "5e-324", "1E+2", "100.0"} {
		for _, src := range []string{`data.n`, `[data][0].n`, `data`, `data.?n`} {
			b, err := CompileBody(src)
			require.NoError(t, err)
			got, err := b.JSON(event(`{"n":`+number+`}`), 0)
			require.NoError(t, err)
			require.Equal(t, number, strings.TrimSuffix(strings.TrimPrefix(string(got), `{"n":`), "}"), src)
		}
	}
}

func TestBodiesAreBounded(t *testing.T) {
	b, err := CompileBody(`data`)
	require.NoError(t, err)
	_, err = b.JSON(event(order), 10)
	require.ErrorIs(t, err, ErrTooLong)
	_, err = CompileBody(`type(data)`)
	require.ErrorContains(t, err, "gives type")
}

func TestForms(t *testing.T) {
	for src, want := range map[string]string{
		`{'contact': {'email': data.email, 'tags': data.tags}}`: `contact%5Bemail%5D=a%2Bb%40example.com&contact%5Btags%5D%5B0%5D=new&contact%5Btags%5D%5B1%5D=eu`,
		`{'items': data.items}`:                                 `items%5B0%5D%5Bprice%5D=1.10&items%5B0%5D%5Bsku%5D=x&items%5B1%5D%5Bprice%5D=2.00&items%5B1%5D%5Bsku%5D=y`,
		`{'b': 'x y', 'a': data.id, 'c': true, 'n': null, 'e': [], 'm': {}, 'o': data.?gone, 't': time}`: `a=12345678901234567890123&b=x+y&c=true&t=2026-02-03T04%3A05%3A06Z`,
		`{'p[x]&=': 'é~*-._\n'}`: `p%5Bx%5D%26%3D=%C3%A9%7E*-._%0A`,
		`{}`:                     ``,
		`data.items[0]`:          `price=1.10&sku=x`,
	} {
		f, err := CompileForm(src)
		require.NoError(t, err, src)
		got, err := f.Encode(event(order), 0)
		require.NoError(t, err, src)
		require.Equal(t, want, string(got), src)
	}
	_, err := CompileForm(`[1]`)
	require.ErrorContains(t, err, "where a map is wanted")
	for data, want := range map[string]string{
		`[1]`: "the result is list, not a map",
		`{"a":` + strings.Repeat(`[`, 70) + strings.Repeat(`]`, 70) + `}`: "no deeper than 64",
		`{"a":"` + strings.Repeat("x", 200) + `"}`:                        ErrTooLong.Error(),
	} {
		f, err := CompileForm(`data`)
		require.NoError(t, err)
		_, err = f.Encode(event(data), 100)
		require.ErrorContains(t, err, want)
	}
}

func TestHeaderExpressions(t *testing.T) {
	h, err := CompileHeaders(`{'X-Tenant': tenant, 'X-Amount': string(data.amount), 'X-None': data.?gone, 'X-Null': null}`)
	require.NoError(t, err)
	got, err := h.All(event(order))
	require.NoError(t, err)
	require.Equal(t, []Header{{"X-Amount", "120.50"}, {"X-Tenant", "acme"}}, got)

	for src, want := range map[string]string{
		`{'a': 1}`: "gives map(string, int), where a map of strings is wanted",
		`{1: 'a'}`: "gives map(int, string)",
		`'X-A: b'`: "gives string",
		`[tenant]`: "gives list(string)",
	} {
		_, err := CompileHeaders(src)
		require.ErrorContains(t, err, want, src)
	}
	for src, want := range map[string]string{
		`{'X-A': data.amount}`: `the header "X-A" is double, not a string`,
		`data.items`:           "the result is list, not a map of strings",
	} {
		h, err := CompileHeaders(src)
		require.NoError(t, err, src)
		_, err = h.All(event(order))
		require.ErrorContains(t, err, want, src)
	}
}

func TestAPathNamesNoHost(t *testing.T) {
	path := func(src, data string) (string, error) {
		p, err := CompileTarget(src)
		require.NoError(t, err, src)
		return p.Path(event(data))
	}
	got, err := path(`'/v1/contacts/' + url.encode(data.email) + '?src=' + url.encode('a b/ü')`, order)
	require.NoError(t, err)
	require.Equal(t, "/v1/contacts/a%2Bb%40example.com?src=a%20b%2F%C3%BC", got)
	for bad, want := range map[string]string{
		"":                              "does not begin with /",
		"//evil.example":                "names a host",
		"https://evil.example/":         "does not begin with /",
		`/\\evil.example`:               "0x5c",
		`/a\r\nHost: evil`:              "0x0d",
		"/a b":                          "0x20",
		"/a#b":                          "fragment",
		"/ü":                            "0xc3",
		"/a%2":                          "two hex digits",
		"/a/../b":                       ". or .. as a segment",
		"/a/%2E%2e":                     ". or .. as a segment",
		"/" + strings.Repeat("a", 9000): "longer than 8192",
	} {
		_, err := path(`data.p`, `{"p":"`+bad+`"}`)
		require.ErrorContains(t, err, want, bad)
	}
	_, err = path(`data.p`, `{"p":1}`)
	require.ErrorContains(t, err, "the result is int, not a string")
	_, err = CompileTarget(`1`)
	require.ErrorContains(t, err, "where a string is wanted")
}

// Each of these is cheap by the number of its operations, and would run for minutes or fill the
// memory if a function were let loose on what it was given.
func TestBombsGoOffAtLoadOrAtOnce(t *testing.T) {
	chain := func(seed, step, last string, n int) string {
		src := strings.ReplaceAll(last, "X", fmt.Sprintf("x%d", n))
		for i := n; i > 0; i-- {
			src = fmt.Sprintf("cel.bind(x%d, %s, %s)", i, strings.ReplaceAll(step, "X", fmt.Sprintf("x%d", i-1)), src)
		}
		return "cel.bind(x0, " + seed + ", " + src + ")"
	}
	big := `{"p":"` + strings.Repeat("(a*){1000}", 200) + `","s":"` + strings.Repeat("a", 1<<20) + `","sb":"` + strings.Repeat("a", 1<<19) + `b","l":[` + strings.Repeat("1,", 200_000) + `1]}`
	for name, src := range map[string]string{
		"lists in lists, compared":            chain("dyn([1])", "dyn([X, X])", "X == X", 40),
		"maps in maps, compared":              chain("dyn({'a': 1})", "dyn({'a': X, 'b': X})", "X != X", 40),
		"lists in lists, looked for":          chain("dyn([1])", "dyn([X, X])", "X in [X, 1]", 40),
		"lists in lists, formatted":           chain("dyn([1])", "dyn([X, X])", "'%s'.format([X]) == ''", 40),
		"lists in lists, flattened":           chain("dyn([1])", "dyn([X, X])", "[X].flatten(100).size() > 1", 40),
		"lists in lists, encoded":             chain("dyn([1])", "dyn([X, X])", "json.encode(X) == ''", 40),
		"text in text":                        `data.s.replace('a', data.s).size() > 1`,
		"text between letters":                `data.s.replace('', data.s).size() > 1`,
		"text doubled":                        chain("data.s", "X + X", "X == ''", 30),
		"text joined":                         `[data.s, data.s, data.s, data.s, data.s, data.s, data.s, data.s, data.s, data.s, data.s].join(data.s).size() > 1`,
		"many joined":                         `data.l.map(x, 'a').join(data.s).size() > 1`,
		"the same text joined":                `lists.range(1000).map(x, data.s).join().size() > 1`,
		"a needle as long as the hay":         `lists.range(50).map(x, data.s.indexOf(data.sb)).size() > 1`,
		"distinct":                            `data.l.distinct().size() > 1`,
		"distinct of a range":                 `lists.range(100000).distinct().size() > 1`,
		"a range":                             `lists.range(1000000000).size() > 1`,
		"loops in loops":                      `data.l.all(a, data.l.all(b, a == b))`,
		"a list doubled":                      chain("data.l", "X + X", "X == []", 30),
		"a list compared often":               `data.l.all(a, data.l == data.l)`,
		"a list searched often":               `data.l.all(a, !(2 in data.l))`,
		"a regular expression":                `data.l.all(a, data.s.matches('(a*)*(a*)*b'))`,
		"a regular expression of a long text": `!data.s.matches('(a{1,20}){1,5}b')`,
		"a regular expression of its own":     `!data.s.matches(data.s)`,
		"a regular expression for all":        `data.l.all(a, !id.matches(data.s))`,
		"regular expressions that grow":       `data.l.all(a, !id.matches(data.p))`,
		"a regular expression that is made":   chain(`'(a{30}){30}'`, "X + ''", "lists.range(30000).all(a, !id.matches(X))", 3),
		"a long regular expression":           `id.matches('((a{1,30}){1,15})*b')`,
	} {
		begin := time.Now()
		f, err := CompileFilter(src)
		if err == nil {
			_, err = f.Wants(event(big))
		}
		require.Error(t, err, name)
		require.Less(t, time.Since(begin), time.Minute, name) // a bomb takes hours; a busy machine some seconds
		t.Log(name, time.Since(begin).Round(time.Millisecond), err)
	}
	b, err := CompileBody(chain("dyn([1])", "dyn([X, X])", "X", 60))
	require.NoError(t, err)
	_, err = b.JSON(event(big), 1<<20)
	require.ErrorIs(t, err, ErrTooLong)
	b, err = CompileBody(`lists.range(1000).map(x, data.s)`)
	require.NoError(t, err)
	_, err = b.JSON(event(big), 0)
	require.ErrorIs(t, err, ErrTooLong)
}

func TestARegularExpressionIsPricedByWhatItIsCompiledTo(t *testing.T) {
	for pattern, size := range map[string]uint64{
		"": 0, "404": 3, "12}": 3, "a{3}b{2,5}": 10 * 15, "a{2,}": 5 * 2, "(a{30}){30}": 11 * 900, "(a{90}){90}": 11 * 1000,
		"a{99999999999999999999}{4}": 26 * 1000, "a{-3}": 5, "{": 1,
	} {
		require.Equal(t, size, regexSize(pattern), pattern)
	}
}

func FuzzEventRules(f *testing.F) {
	for _, s := range []string{`data.amount > 1`, `{'a': data}`, `'/' + id`, `data.items.map(i, i.price)`, `{'a': [1, {'b': null}]}`} {
		f.Add(s, order)
	}
	f.Fuzz(func(t *testing.T, src, data string) {
		_, err := ParseJSON([]byte(data))
		e := event(data)
		e.JSON = err == nil
		if r, err := CompileFilter(src); err == nil {
			_, _ = r.Wants(e)
		}
		if r, err := CompileTarget(src); err == nil {
			if p, err := r.Path(e); err == nil {
				require.Regexp(t, `^/([!-~&&[^/]]|$)?`, p)
			}
		}
		if r, err := CompileForm(src); err == nil {
			_, _ = r.Encode(e, 1<<16)
		}
		r, err := CompileBody(src)
		if err != nil {
			return
		}
		a, errA := r.JSON(e, 1<<16)
		b, errB := r.JSON(event2(e), 1<<16)
		require.Equal(t, errA == nil, errB == nil)
		require.Equal(t, a, b)
		if errA == nil {
			_, err := ParseJSON(a)
			require.NoError(t, err, string(a))
		}
	})
}

func event2(e *Event) *Event {
	return &Event{ID: e.ID, Type: e.Type, Key: e.Key, Tenant: e.Tenant, Time: e.Time, Headers: e.Headers, Data: e.Data, JSON: e.JSON}
}

func BenchmarkFilter(b *testing.B) {
	for _, src := range []string{`type == 'order.created'`, `data.amount > 100`, `data.items.exists(i, i.price > 1.5)`} {
		f, err := CompileFilter(src)
		if err != nil {
			b.Fatal(err)
		}
		b.Run("parsed/"+src, func(b *testing.B) {
			e := event(order)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := f.Wants(e); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run("fresh/"+src, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := f.Wants(event(order)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkBody(b *testing.B) {
	body, err := CompileBody(`{'event': type, 'payload': data, 'total': data.amount, 'skus': data.items.map(i, i.sku)}`)
	if err != nil {
		b.Fatal(err)
	}
	e := event(order)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := body.JSON(e, 0); err != nil {
			b.Fatal(err)
		}
	}
}
