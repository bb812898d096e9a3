package sender

import (
	"io"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/outbox/rule"
	"github.com/walhook/walhook/sender/sendertest"
)

// transformed compiles a transform: body, form, headers, url and method by their keys.
func transformed(t *testing.T, rules map[string]string) func(*outbox.Endpoint) {
	t.Helper()
	return func(e *outbox.Endpoint) {
		var errs [4]error
		for key, src := range rules {
			switch key {
			case "body":
				e.Transform.Body, errs[0] = rule.CompileBody(src)
			case "form":
				e.Transform.Form, errs[1] = rule.CompileForm(src)
			case "headers":
				e.Transform.Headers, errs[2] = rule.CompileHeaders(src)
			case "url":
				e.Transform.URL, errs[3] = rule.CompileTarget(src)
			case "method":
				e.Transform.Method = src
			}
		}
		for _, err := range errs {
			require.NoError(t, err)
		}
	}
}

func TestTransformsMakeTheRequest(t *testing.T) {
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{hmacSecret}})
	b := setup(t, nil)
	for name, c := range map[string]struct {
		rules       map[string]string
		format      outbox.Format
		method      string
		path        string
		body        string
		contentType string
		header      map[string]string
	}{
		"body": {
			rules: map[string]string{"body": `{'action': type, 'payload': data, 'total': data.amount}`},
			body:  `{"action":"invoice.paid","payload":{"amount": 120.50},"total":120.50}`,
		},
		"body instead of a CloudEvent": {
			rules: map[string]string{"body": `data.amount`}, format: outbox.FormatCloudEvents, body: `120.50`,
		},
		"body of a binary CloudEvent": {
			rules: map[string]string{"body": `[key]`}, format: outbox.FormatCloudEventsBinary, body: `["inv-7"]`,
			header: map[string]string{"ce-id": "evt_1"},
		},
		"form": {
			rules: map[string]string{"form": `{'contact': {'email': key + '@example.com', 'total': data.amount}}`},
			body:  "contact%5Bemail%5D=inv-7%40example.com&contact%5Btotal%5D=120.50", contentType: "application/x-www-form-urlencoded",
		},
		"headers": {
			rules:  map[string]string{"headers": `{'X-Key': key, 'x-env': 'by rule', 'User-Agent': 'acme/' + id}`},
			body:   `{"type":"invoice.paid","timestamp":"2026-03-01T11:30:15.123456Z","data":{"amount": 120.50}}`,
			header: map[string]string{"X-Key": "inv-7", "X-Env": "by rule", "User-Agent": "acme/evt_1"},
		},
		"method and url": {
			rules: map[string]string{"method": "PUT", "url": `'/v1/invoices/' + url.encode(key) + '?at=' + string(data.amount)`, "body": `{}`},
			body:  `{}`, method: "PUT", path: "/v1/invoices/inv-7?at=120.50",
		},
		"a path that is encoded": {
			rules: map[string]string{"url": `'/a%2Fb/' + url.encode('ü/?#')`, "body": `{}`}, body: `{}`, path: "/a%2Fb/%C3%BC%2F%3F%23",
		},
		"delete": {rules: map[string]string{"method": "DELETE", "body": `null`}, body: "null", method: "DELETE"},
	} {
		for attempt := 1; attempt <= 2; attempt++ {
			before := rx.Count()
			ep := endpoint(rx.URL()+"?token=operator", signed, transformed(t, c.rules), func(e *outbox.Endpoint) {
				e.ID, e.Headers = "e-"+name, map[string]string{"X-Env": "prod"}
				if c.format != "" {
					e.Format = c.format
				}
			})
			require.Equal(t, outbox.Delivered, b.send(ep).Verdict, name)
			got := rx.Requests()[before]
			require.NoError(t, got.Invalid, name) // the signature is over the body that was made
			require.Equal(t, c.body, string(got.Body), name)
			require.Equal(t, orElse(c.method, "POST"), got.Method, name)
			require.Equal(t, orElse(c.path, "/hooks?token=operator"), got.Path, name)
			require.Equal(t, []string{orElse(c.contentType, "application/json")}, got.Header.Values("Content-Type"), name)
			require.Equal(t, "evt_1", got.ID, name)
			for key, value := range c.header {
				require.Equal(t, []string{value}, got.Header.Values(key), name)
			}
		}
	}
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

func TestATransformThatFailsKillsItsDeliveryAlone(t *testing.T) {
	sent := 0
	b := setup(t, fake(func(*http.Request) (*http.Response, error) { sent++; return answer(204) }))
	for name, c := range map[string]struct {
		rules  map[string]string
		change func(*outbox.Endpoint)
		reason outbox.Reason
		detail string
	}{
		"a missing member":          {rules: map[string]string{"body": `data.missing`}, detail: "transform.body: no such key: missing"},
		"a form that is none":       {rules: map[string]string{"form": `data.amount`}, detail: "transform.form: the result is double, not a map"},
		"a header with a line":      {rules: map[string]string{"headers": `{'X-A': "a\r\nX-B: b"}`}, detail: `transform.headers: "X-A" would have a line break`},
		"a header with NUL":         {rules: map[string]string{"headers": `{'X-A': "\u0000"}`}, detail: `"X-A" would have a line break, NUL`},
		"a header's name":           {rules: map[string]string{"headers": `{data.?x.orValue("X A: b\n"): 'a'}`}, detail: `"X A: b\n" is not a valid header name`},
		"a header of walhook's":     {rules: map[string]string{"headers": `{'Webhook-Id': 'x'}`}, detail: `"Webhook-Id" is set by walhook`},
		"a header of HTTP's":        {rules: map[string]string{"headers": `{'Transfer-Encoding': 'x'}`}, detail: `"Transfer-Encoding" is set by walhook`},
		"a signature":               {rules: map[string]string{"headers": `{'x-hub-signature': 'x'}`}, change: plain("github"), detail: `"x-hub-signature" is set by walhook`},
		"a header twice":            {rules: map[string]string{"headers": `{'X-A': 'x', 'x-a': 'y'}`}, detail: `is there twice`},
		"a header that is a number": {rules: map[string]string{"headers": `{'X-A': data.amount}`}, detail: `the header "X-A" is double, not a string`},
		"headers without end":       {rules: map[string]string{"headers": `{'X-A': lists.range(9000).map(x, 'a').join()}`}, detail: "more than 8192 bytes of headers"},
		"another host":              {rules: map[string]string{"url": `'//' + id + '/'`}, detail: "transform.url: the result begins with //"},
		"no path":                   {rules: map[string]string{"url": `'https://evil.example/'`}, detail: "transform.url: the result does not begin with /"},
		"too large":                 {rules: map[string]string{"body": `[data, data]`}, change: func(e *outbox.Endpoint) { e.MaxPayload = 30 }, reason: outbox.ReasonTooLarge, detail: "max_payload, 30 bytes"},
		"too large by a little":     {rules: map[string]string{"body": `data`}, change: func(e *outbox.Endpoint) { e.MaxPayload = 17 }, reason: outbox.ReasonTooLarge, detail: "17 bytes"},
		"too expensive":             {rules: map[string]string{"body": `lists.range(2000).map(x, lists.range(2000 + data.size()).size())`}, detail: rule.ErrTooExpensive.Error()},
	} {
		change := c.change
		if change == nil {
			change = func(*outbox.Endpoint) {}
		}
		ep := endpoint("http://127.0.0.1/", transformed(t, c.rules), change, func(e *outbox.Endpoint) { e.ID = name })
		o := b.send(ep)
		require.Equal(t, outbox.Dead, o.Verdict, name)
		require.Equal(t, orElse(string(c.reason), string(outbox.ReasonTransform)), string(o.Reason), name)
		require.Contains(t, o.Detail, c.detail, name)
		require.Less(t, len(o.Detail), 400, name)
		require.Equal(t, Closed, b.targets[ep.ID].circuit.state, name)
	}
	require.Zero(t, sent)
}

func TestATransformIsCheckedAtLoad(t *testing.T) {
	for want, rules := range map[string]map[string]string{
		"transform: has both body and form":                              {"body": `{}`, "form": `{}`},
		`transform.method: "GET" is not one of POST, PUT, PATCH, DELETE`: {"method": "GET"},
	} {
		require.ErrorContains(t, Validate(*endpoint("https://h", transformed(t, rules))), want)
	}
}

// What a rule makes is made anew for each attempt, from what does not change.
func TestEachAttemptOfATransformHasTheSameBytes(t *testing.T) {
	var bodies []string
	b := setup(t, fake(func(r *http.Request) (*http.Response, error) {
		text, err := io.ReadAll(r.Body)
		require.NoError(t, err)
		bodies = append(bodies, string(text)+r.URL.String()+r.Header.Get("X-A"))
		return answer(503)
	}))
	ep := endpoint("http://127.0.0.1/", transformed(t, map[string]string{
		"body": `{'b': data, 'a': {'z': time, 'y': headers}, 'c': {true: 1, 'x': 2, 3: 3}}`, "headers": `{'X-A': string(time)}`, "url": `'/' + key`,
	}))
	e := event()
	e.Headers = []byte(`{"q":1,"p":2,"o":[3,{"n":1,"m":2}]}`)
	for n := 1; n <= 20; n++ {
		b.Send(t.Context(), outbox.Attempt{Event: e, Endpoint: ep, Number: n})
	}
	require.NotEmpty(t, bodies)
	for _, one := range bodies {
		require.Equal(t, bodies[0], one)
	}
}
