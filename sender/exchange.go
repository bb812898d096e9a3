package sender

import (
	"context"
	"io"
	"net/http"
	"slices"
	"strings"

	"github.com/walhook/walhook/outbox"
)

// maxSeen is how much of an answer's body, in bytes, an Exchange holds.
const maxSeen = 4 << 10

// Exchange is one attempt for people to look at. No credential of ours is in it, unless the
// receiver sent one back.
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

// shows tells whether a request's header, in lower case, is one that every request has or that its
// receiver checks, and so no credential.
func (t *target) shows(name string) bool {
	for given := range t.endpoint.Headers {
		if strings.EqualFold(given, name) {
			return false
		}
	}
	return name == "user-agent" || name == headerTraceparent || strings.HasPrefix(name, "content-") || strings.HasPrefix(name, "webhook-") ||
		slices.Contains(t.taken, name)
}

func (x *Exchange) answered(res *http.Response) {
	if x == nil {
		return
	}
	x.Proto, x.Status, x.Answer = res.Proto, res.Status, res.Header.Clone()
	if x.Answer.Get("Set-Cookie") != "" {
		x.Answer.Set("Set-Cookie", redacted)
	}
	x.Text, _ = io.ReadAll(io.LimitReader(res.Body, maxSeen+1))
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
