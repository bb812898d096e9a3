package sender

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/walhook/walhook/outbox"
)

const headerAuthorization = "Authorization"

const (
	// tokenTimeout bounds one request for an access token, where the attempt's own time does not sooner.
	tokenTimeout = 10 * time.Second
	// tokenAhead is how long before its end a token is fetched anew, or a fifth of its life where
	// that is less; tokenMargin, or a tenth, is how long before it is not used any more: it has to
	// be good yet when the receiver reads it.
	tokenAhead  = time.Minute
	tokenMargin = 10 * time.Second
	// tokenRefreshPause is how long a refresh that failed is not tried again while the old token serves.
	tokenRefreshPause = 30 * time.Second
	// maxTokenLife is the longest that a server's expires_in is believed.
	maxTokenLife = 365 * 24 * time.Hour
)

// parseAuth makes ready how requests say whose they are: a header that is always the same, or
// tokens. Its errors hold none of what it was given.
func parseAuth(e *outbox.Endpoint) (authorization string, k *tokens, errs []error) {
	a := e.Auth
	var given []string
	if a.Basic != nil {
		given = append(given, "basic")
		switch b := a.Basic; {
		case b.Username == "" && b.Password == "":
			errs = append(errs, errors.New("auth.basic.username: is missing"))
		case strings.Contains(b.Username, ":"):
			errs = append(errs, errors.New("auth.basic.username: holds a colon, which ends a user name (RFC 7617)"))
		case !validHeaderValue(b.Username), strings.ContainsRune(b.Username, '\t'):
			errs = append(errs, errors.New("auth.basic.username: holds a line break, NUL or another control character"))
		case !validHeaderValue(b.Password.Reveal()), strings.ContainsRune(b.Password.Reveal(), '\t'):
			errs = append(errs, errors.New("auth.basic.password: holds a line break, NUL or another control character"))
		}
		authorization = basic(a.Basic.Username, a.Basic.Password.Reveal())
	}
	if a.Bearer != "" {
		given = append(given, "bearer")
		if !visible(a.Bearer.Reveal()) {
			errs = append(errs, errors.New("auth.bearer: holds a space, a line break or another character that a token cannot have"))
		}
		authorization = "Bearer " + a.Bearer.Reveal()
	}
	if len(authorization) > maxHeaderValue {
		errs = append(errs, fmt.Errorf("auth.%s: makes a header larger than %d bytes", given[0], maxHeaderValue))
	}
	if a.OAuth2 != nil {
		given = append(given, "oauth2")
		var wrong []error
		k, wrong = parseTokens(a.OAuth2, e.Origin)
		errs = append(errs, wrong...)
	}
	if len(given) > 1 {
		errs = append(errs, fmt.Errorf("auth: has both %s and %s; they share a header, so it is one of basic, bearer, oauth2", given[0], given[1]))
	}
	return authorization, k, errs
}

// basic is the value of a header by RFC 7617.
func basic(username, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(username+":"+password))
}

// visible tells whether s is a token: visible ASCII and some of it.
func visible(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}

// parseKeyPair makes a client's certificate ready.
func parseKeyPair(p *outbox.KeyPair) (*tls.Certificate, error) {
	switch {
	case p.Cert == "":
		return nil, errors.New("auth.mtls.cert: is missing")
	case p.Key == "":
		return nil, errors.New("auth.mtls.key: is missing")
	case !isPEM(p.Cert):
		return nil, errors.New("auth.mtls.cert: is not a certificate in PEM")
	case !isPEM(p.Key.Reveal()):
		return nil, errors.New("auth.mtls.key: is not a private key in PEM")
	}
	pair, err := tls.X509KeyPair([]byte(p.Cert), []byte(p.Key.Reveal()))
	if err != nil {
		return nil, fmt.Errorf("auth.mtls: %w", err)
	}
	return &pair, nil
}

func isPEM(s string) bool { return strings.Contains(s, "-----BEGIN ") }

// tokens has the access token of one endpoint, by OAuth 2.0's grant of client credentials (RFC
// 6749, 4.4). One request for a token is under way at a time, made by the attempt that found
// one wanting; the others wait for it, each within its own time. Before a token's end, one
// attempt fetches the next while the others go on with the old one.
//
// It is not golang.org/x/oauth2: a token request goes by the endpoint's own way (guard, proxy,
// TLS, connections), follows no redirect, and its failure is judged like any other, while that
// package's error holds what the server answered.
type tokens struct {
	cfg *outbox.OAuth2
	at  *url.URL

	mu      sync.Mutex // guards what follows
	token   string     // empty: none
	refresh time.Time  // from then on an attempt fetches the next one; zero never
	expires time.Time  // from then on it is not used; zero never
	flight  *fetch     // under way; nil where none is
	known   bool       // whether inBody is known
	inBody  bool       // the server wants id and secret in the body, not in Authorization
}

// Format keeps the token and the secret out of whatever prints by reflection.
func (k *tokens) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[tokens]") }

// fetch is a token request under way.
type fetch struct {
	done  chan struct{} // closed when it has ended
	token string
	err   error
}

// tokenFault is why there is no access token.
type tokenFault struct {
	detail     string // where an answer came, or err is nil
	retryAfter string // the answer's header
	err        error
}

func (f *tokenFault) Error() string { return "no access token" }
func (f *tokenFault) Unwrap() error { return f.err }

// errFetcherLeft is the end of a fetch whose attempt ended first: who waits fetches by itself.
var errFetcherLeft = errors.New("the attempt that fetched a token ended")

func parseTokens(o *outbox.OAuth2, origin outbox.Origin) (k *tokens, errs []error) {
	at, err := parseAddress(o.TokenURL.Reveal(), origin, origin == outbox.FromFile)
	if err != nil {
		errs = append(errs, fmt.Errorf("auth.oauth2.token_url: %w", err))
	}
	if o.ClientID == "" {
		errs = append(errs, errors.New("auth.oauth2.client_id: is missing"))
	}
	if o.ClientSecret == "" {
		errs = append(errs, errors.New("auth.oauth2.client_secret: is missing"))
	}
	for i, s := range o.Scopes {
		if !visible(s) || strings.ContainsAny(s, `"\`) { // RFC 6749, 3.3
			errs = append(errs, fmt.Errorf("auth.oauth2.scopes[%d]: is not the name of a scope", i))
		}
	}
	return &tokens{cfg: o, at: at}, errs
}

// get returns the endpoint's token, fetched where there is none that serves.
func (k *tokens) get(ctx context.Context, t *target) (string, error) {
	for {
		k.mu.Lock()
		now := time.Now()
		usable := k.token != "" && (k.expires.IsZero() || now.Before(k.expires))
		if usable && (k.flight != nil || k.refresh.IsZero() || now.Before(k.refresh)) {
			token := k.token
			k.mu.Unlock()
			return token, nil
		}
		if f := k.flight; f != nil {
			k.mu.Unlock()
			select {
			case <-f.done:
				if f.err == errFetcherLeft {
					continue
				}
				return f.token, f.err
			case <-ctx.Done():
				return "", &tokenFault{err: ctx.Err()}
			}
		}
		f := &fetch{done: make(chan struct{}), err: errFetcherLeft} // also where what follows panics
		k.flight = f
		k.mu.Unlock()
		return k.fetch(ctx, t, f, usable)
	}
}

// fetch ends f with a new token, or, where the old one is usable yet, at worst with that.
func (k *tokens) fetch(parent context.Context, t *target, f *fetch, usable bool) (token string, err error) {
	limit := tokenTimeout
	if usable { // the attempt must not lose its time over what can wait
		limit = min(limit, t.endpoint.Timeout/3)
	}
	ctx, cancel := context.WithTimeout(parent, limit)
	defer cancel()
	defer func() {
		k.mu.Lock()
		k.flight = nil
		k.mu.Unlock()
		close(f.done)
	}()
	begin := time.Now()
	granted, err := k.request(ctx, t)
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case err == nil:
		k.token, k.refresh, k.expires = granted.token, time.Time{}, time.Time{}
		if life := granted.life; life > 0 {
			k.refresh = begin.Add(life - min(tokenAhead, life/5))
			k.expires = begin.Add(life - min(tokenMargin, life/10))
		}
		f.token, f.err = k.token, nil
		return k.token, nil
	case usable && k.token != "" && parent.Err() == nil: // it was not dropped meanwhile
		k.refresh = time.Now().Add(tokenRefreshPause)
		f.token, f.err = k.token, nil
		return k.token, nil
	case parent.Err() != nil:
		return "", &tokenFault{err: parent.Err()}
	case ctx.Err() != nil:
		err = &tokenFault{detail: "no answer within " + limit.String()}
	}
	f.err = err
	return "", err
}

// drop forgets a token that the receiver does not take.
func (k *tokens) drop(token string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.token == token {
		k.token = ""
	}
}

// granted is a token with its life; zero where it has no end.
type granted struct {
	token string
	life  time.Duration
}

// request asks for a token. Id and secret go into Authorization, where every server has to look
// for them (RFC 6749, 2.3.1), and into the body for those that do not.
func (k *tokens) request(ctx context.Context, t *target) (granted, error) {
	k.mu.Lock()
	known, inBody := k.known, k.inBody
	k.mu.Unlock()
	got, refused, err := k.ask(ctx, t, inBody)
	if refused && !known {
		if again, _, wrong := k.ask(ctx, t, true); wrong == nil {
			got, inBody, err = again, true, nil
		}
	}
	if err != nil {
		return granted{}, err
	}
	k.mu.Lock()
	k.known, k.inBody = true, inBody
	k.mu.Unlock()
	return got, nil
}

// ask makes one request for a token. refused says that the client was not taken for whom it says it is.
func (k *tokens) ask(ctx context.Context, t *target, inBody bool) (got granted, refused bool, err error) {
	form := url.Values{"grant_type": {"client_credentials"}}
	if len(k.cfg.Scopes) > 0 {
		form.Set("scope", strings.Join(k.cfg.Scopes, " "))
	}
	header := http.Header{
		"Content-Type":       {"application/x-www-form-urlencoded"},
		"Accept":             {"application/json"},
		"User-Agent":         t.header["User-Agent"],
		headerIdempotencyKey: nil, // see message.request
	}
	id, secret := k.cfg.ClientID, k.cfg.ClientSecret.Reveal()
	if inBody {
		form.Set("client_id", id)
		form.Set("client_secret", secret)
	} else {
		header[headerAuthorization] = []string{basic(url.QueryEscape(id), url.QueryEscape(secret))}
	}
	content := []byte(form.Encode())
	req := (&http.Request{
		Method: http.MethodPost, URL: k.at, Host: k.at.Host, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: header, ContentLength: int64(len(content)),
		GetBody: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil },
	}).WithContext(ctx)
	req.Body, _ = req.GetBody()
	res, err := t.trip(ctx, req)
	if err != nil {
		return granted{}, false, &tokenFault{err: err}
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(res.Body, maxBodyBytes+1))
	if err != nil {
		return granted{}, false, &tokenFault{err: err}
	}
	got, fault := readToken(res.StatusCode, answer)
	if fault != nil {
		fault.retryAfter = res.Header.Get("Retry-After")
		return granted{}, res.StatusCode == http.StatusUnauthorized || res.StatusCode == http.StatusBadRequest, fault
	}
	return got, false, nil
}

// oauthErrors are the errors of RFC 6749, 5.2: the only words of a server's that are repeated.
var oauthErrors = []string{
	"invalid_request", "invalid_client", "invalid_grant", "unauthorized_client", "unsupported_grant_type", "invalid_scope",
}

// readToken judges what a token server answered.
func readToken(status int, answer []byte) (granted, *tokenFault) {
	if len(answer) > maxBodyBytes {
		return granted{}, &tokenFault{detail: fmt.Sprintf("the token server's answer is larger than %d bytes", maxBodyBytes)}
	}
	var said struct {
		Token string      `json:"access_token"`
		Life  json.Number `json:"expires_in"` // seconds; some servers quote them
		Error string      `json:"error"`
	}
	err := json.Unmarshal(answer, &said)
	if status/100 != 2 {
		detail := "the token server answered " + strconv.Itoa(status)
		if text := http.StatusText(status); text != "" {
			detail += " " + text
		}
		switch {
		case status/100 == 3:
			detail += ": redirects are not followed"
		case err == nil && slices.Contains(oauthErrors, said.Error):
			detail += ": " + said.Error
		}
		return granted{}, &tokenFault{detail: detail}
	}
	switch {
	case err != nil:
		return granted{}, &tokenFault{detail: "the token server's answer is not the JSON of RFC 6749"}
	case !visible(said.Token):
		return granted{}, &tokenFault{detail: "the token server's answer holds no access_token that can stand in a header"}
	case len("Bearer ")+len(said.Token) > maxHeaderValue:
		return granted{}, &tokenFault{detail: fmt.Sprintf("the access token makes a header larger than %d bytes", maxHeaderValue)}
	}
	got := granted{token: said.Token}
	if seconds, err := said.Life.Float64(); err == nil && seconds > 0 {
		got.life = time.Duration(min(seconds, maxTokenLife.Seconds()) * float64(time.Second))
	}
	return got, nil
}

// takeOver keeps what an endpoint's predecessor learned, where it asks the same server in the same way.
func (t *target) takeOver(old *target) {
	if t.tokens != nil && old.tokens != nil && t.route == old.route && reflect.DeepEqual(t.tokens.cfg, old.tokens.cfg) {
		t.tokens = old.tokens
	}
}

// authorize gives a request its access token, where the endpoint wants one.
func (t *target) authorize(ctx context.Context, req *http.Request) (token string, err error) {
	if t.tokens == nil {
		return "", nil
	}
	if token, err = t.tokens.get(ctx, t); err == nil {
		req.Header[headerAuthorization] = []string{"Bearer " + token}
	}
	return token, err
}
