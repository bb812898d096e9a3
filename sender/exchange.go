package sender

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/walhook/walhook/outbox"
)

// maxSeen is how much of an answer's body, in bytes, an Exchange holds.
const maxSeen = 4 << 10

// Exchange is one attempt for people to look at. No credential of ours is in it, also where the
// receiver sends back what it got: those that it knows are taken out of its answer.
type Exchange struct {
	Outcome outbox.Outcome

	Method string
	URL    string      // without the query's values; empty where no request was made
	Header http.Header // what the endpoint's settings give is [redacted]
	Body   []byte

	Proto  string // of the answer; empty where there was none
	Status string
	Answer http.Header // without cookies
	Text   []byte      // the beginning of its body
	Cut    bool        // there was more of it
}

// Try is Send for somebody who watches.
func (c *Client) Try(ctx context.Context, a outbox.Attempt) *Exchange {
	x := &Exchange{}
	x.Outcome = c.send(ctx, a, x)
	return x
}

const redacted = "[redacted]"

// asked notes the request. It does nothing to a nil Exchange, nor does answered.
func (x *Exchange) asked(t *target, req *http.Request) {
	if x == nil {
		return
	}
	x.Method, x.URL, x.Header = req.Method, ShownURL(req.URL.String()), http.Header{}
	for name, values := range req.Header {
		lower := strings.ToLower(name)
		if values == nil {
			continue
		}
		if !t.shows(lower) {
			values = []string{redacted}
		}
		x.Header[name] = slices.Clone(values)
	}
	if body, err := req.GetBody(); err == nil {
		x.Body, _ = io.ReadAll(body)
	}
}

// credentials are those of the endpoint and of the request, a fetched token too, in the forms in which a receiver has
// them, the longest first. What is too short to be one is left out, or it would veil half an answer.
func (t *target) credentials(req *http.Request) (all []string) {
	add := func(values ...string) {
		for _, v := range values {
			if len(v) >= 4 {
				all = append(all, v)
			}
		}
	}
	for _, s := range t.endpoint.Secrets {
		add(s.Reveal())
		if _, key, prefixed := strings.Cut(s.Reveal(), "_"); prefixed {
			add(key)
		}
	}
	for name, values := range req.Header {
		if t.shows(strings.ToLower(name)) {
			continue
		}
		for _, v := range values {
			add(v)
			if _, credential, ok := strings.Cut(v, " "); ok && strings.EqualFold(name, "Authorization") { // behind Basic or Bearer
				add(credential)
			}
		}
	}
	if basic := t.endpoint.Auth.Basic; basic != nil {
		add(basic.Password.Reveal())
	}
	if oauth2 := t.endpoint.Auth.OAuth2; oauth2 != nil {
		add(oauth2.ClientSecret.Reveal())
	}
	if query := req.URL.RawQuery; query != "" {
		add(query)
		for _, values := range req.URL.Query() {
			for _, v := range values {
				if len(v) >= 8 { // most of what stands there is none
					add(v, url.QueryEscape(v))
				}
			}
		}
	}
	slices.SortFunc(all, func(a, b string) int { return len(b) - len(a) })
	return slices.Compact(all)
}

// shows tells whether a request's header, in lower case, is one that every request has or that its
// receiver checks, and so no credential.
func (t *target) shows(name string) bool {
	if name == "authorization" { // whoever sets it
		return false
	}
	for given := range t.endpoint.Headers {
		if strings.EqualFold(given, name) {
			return false
		}
	}
	return name == "user-agent" || name == headerTraceparent || strings.HasPrefix(name, "content-") || strings.HasPrefix(name, "webhook-") ||
		slices.Contains(t.taken, name)
}

// answered notes the answer to a request, as far as it is shown.
func (x *Exchange) answered(t *target, req *http.Request, res *http.Response) {
	if x == nil {
		return
	}
	var veils []string
	longest := 0
	for _, credential := range t.credentials(req) {
		veils = append(veils, credential, redacted)
		longest = max(longest, len(credential))
	}
	veil := strings.NewReplacer(veils...).Replace // of several that fit the first one given, the longest, counts
	x.Proto, x.Status, x.Answer = res.Proto, veil(res.Status), res.Header.Clone()
	if x.Answer.Get("Set-Cookie") != "" {
		x.Answer.Set("Set-Cookie", redacted)
	}
	for _, values := range x.Answer {
		for i := range values {
			values[i] = veil(values[i])
		}
	}
	// So much more is read, and taken off again, that no piece of a credential stands at the end.
	text, _ := io.ReadAll(io.LimitReader(res.Body, int64(maxSeen+max(longest, 1))))
	x.Text = []byte(veil(string(text)))
	if len(text) > maxSeen {
		x.Text, x.Cut = x.Text[:max(0, len(x.Text)-max(longest, 1)+1)], true
	}
	if len(x.Text) > maxSeen {
		x.Text, x.Cut = x.Text[:maxSeen], true
	}
}

// ShownURL is an endpoint's URL as it may be shown: who reads it learns nothing of what stands in
// its query, which may be a credential.
func ShownURL(address string) string {
	before, _, query := strings.Cut(address, "?")
	scheme, rest, ok := strings.Cut(before, "://")
	if !ok {
		return redacted
	}
	host, path, _ := strings.Cut(rest, "/")
	if i := strings.LastIndexByte(host, '@'); i >= 0 {
		host = redacted + host[i:]
	}
	shown := scheme + "://" + host
	if path != "" {
		shown += "/" + path
	}
	if query {
		shown += "?" + redacted
	}
	return shown
}
