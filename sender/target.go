package sender

import (
	"cmp"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/walhook/walhook/outbox"
)

// What an endpoint's own headers may take, in bytes: a value, and all of them with their names.
// Servers refuse more, most of them at 8 KiB or 16 KiB in all.
const (
	maxHeaderValue = 8 << 10
	maxHeaders     = 32 << 10
)

// headerSize is what headers take on the wire of HTTP/1.1.
func headerSize(h http.Header) (size int) {
	for name, values := range h {
		for _, v := range values {
			size += len(name) + len(v) + len(": \r\n")
		}
	}
	return size
}

// maxURL is how long an endpoint's URL may be; most servers refuse longer ones.
const maxURL = 8192

// target is an endpoint made ready: everything that would be the same for each of its requests.
// It is immutable and lives as long as its *outbox.Endpoint.
type target struct {
	endpoint *outbox.Endpoint
	base     *http.Request // with method and URL
	header   http.Header   // goes with every request
	fields   []field       // the same, ready
	// signatures are the headers that sign a request, each by its scheme and secrets.
	signatures []signature
	newest     []signature // the same by the newest secret alone
	nfeio      bool        // NFE.io's headers beside its signatures are sent too
	source     string      // of events, as CloudEvents calls it
	taken      []string    // headers, in lower case, that a transform may not set
	tokens     *tokens     // that OAuth 2.0 gives; nil where it is not used
	tls        *tls.Config
	way        way
	route      string // equal for targets that may share connections

	wired   bool   // its requests may go by wires, where its host speaks HTTP/1.1
	address string // host and port, as they are dialled
	path    string // and query

	rt      http.RoundTripper
	pool    *transport // that rt is; nil where a test gave another
	circuit *circuit   // outlives the target
	codes   *codes     // outlives the target
	lamp    *lamp      // outlives the target
	share   *share     // outlives the target
}

// Validate checks all that the sender will need of an endpoint. Every mistake is in the
// joined error, each beginning with its key (`secrets[0]: …`), none showing a secret.
func Validate(e outbox.Endpoint) error {
	_, err := parse(&e)
	return err
}

// parse makes of an endpoint all that needs no Client.
func parse(e *outbox.Endpoint) (*target, error) {
	var errs []error
	t := &target{
		endpoint: e,
		way:      way{guard: guard{origin: e.Origin, allow: plainPrefixes(e.Network.Allow), deny: plainPrefixes(e.Network.Deny)}},
	}

	to, err := parseURL(e)
	if err != nil {
		errs = append(errs, fmt.Errorf("url: %w", err))
	} else {
		t.way.guard.plain = to.Scheme == "http"
		t.base = &http.Request{
			Method: cmp.Or(e.Transform.Method, http.MethodPost), URL: to, Host: to.Host,
			Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		}
	}

	if e.Timeout <= 0 {
		errs = append(errs, errors.New("timeout: must be more than 0"))
	}

	switch e.Format {
	case outbox.FormatStandard, outbox.FormatRaw, outbox.FormatCloudEvents, outbox.FormatCloudEventsBinary:
	default:
		errs = append(errs, fmt.Errorf("format: %q is not one of standard, raw, cloudevents, cloudevents-binary", e.Format))
	}

	errs = append(errs, checkTransform(&e.Transform)...)
	if e.Batch.MaxEvents > 1 {
		if e.Format == outbox.FormatCloudEventsBinary {
			errs = append(errs, errors.New("batch.max_events: must be 1 with format cloudevents-binary, which has no batches"))
		}
		if tr := e.Transform; tr.Form != nil || tr.Headers != nil || tr.URL != nil {
			errs = append(errs, errors.New("transform: form, headers and url are about one event, and batch.max_events puts several into a request"))
		}
	}
	if e.MaxPayload > 0 && e.Batch.MaxBytes > e.MaxPayload {
		errs = append(errs, fmt.Errorf("batch.max_bytes: is more than max_payload, which is %d", e.MaxPayload))
	}

	var wrong []error
	t.signatures, wrong = parseSigning(e)
	errs = append(errs, wrong...)
	t.nfeio = e.SignsBy(outbox.SchemeNFEio)
	if e.Format == outbox.FormatCloudEventsBinary {
		for _, s := range t.signatures {
			if slices.Contains(attributeHeaders, strings.ToLower(s.header)) {
				errs = append(errs, fmt.Errorf("signing: sets the header %s, which format %s sets already", s.header, e.Format))
			}
		}
	}

	authorization, tokens, wrong := parseAuth(e)
	errs = append(errs, wrong...)
	t.tokens = tokens
	t.taken = t.takenHeaders()
	t.header, wrong = parseHeaders(e.Headers, t.taken)
	errs = append(errs, wrong...)
	if authorization != "" {
		t.header[headerAuthorization] = []string{authorization}
	}
	if authorization != "" || tokens != nil {
		for _, s := range t.signatures {
			if strings.EqualFold(s.header, headerAuthorization) {
				errs = append(errs, errors.New("signing: sets the header Authorization, which auth sets already"))
			}
		}
	}
	if size := headerSize(t.header); size > maxHeaders {
		errs = append(errs, fmt.Errorf("headers: have %d bytes together, %d are allowed", size, maxHeaders))
	}

	t.tls, wrong = parseTLS(e)
	errs = append(errs, wrong...)
	if e.Auth.MTLS != nil && t.way.guard.plain {
		errs = append(errs, errors.New("auth.mtls: needs a url that begins with https://"))
	}
	if t.way.proxy, err = parseProxy(e.Proxy); err != nil {
		errs = append(errs, fmt.Errorf("proxy: %w", err))
	}

	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	port := cmp.Or(to.Port(), map[string]string{"http": "80", "https": "443"}[to.Scheme])
	t.address, t.path = net.JoinHostPort(to.Hostname(), port), to.RequestURI()
	t.wired = canPeek && t.way.proxy == nil && t.tokens == nil && plainHost(to.Host)
	t.newest = t.signatures
	if !e.PreviousUntil.IsZero() {
		t.newest = slices.Clone(t.signatures)
		for i := range t.newest {
			t.newest[i].keys = t.newest[i].keys[:1]
		}
	}
	t.route = t.routeOf()
	return t, nil
}

// routeOf is equal for targets that may share connections: those that are reached by the same rules, and no others. The guard
// judges when a connection is made, not when it is used again.
func (t *target) routeOf() string {
	e := t.endpoint
	b := append(append([]byte(nil), e.Origin...), ' ')
	b = strconv.AppendBool(b, t.way.guard.plain)
	for _, prefixes := range [][]netip.Prefix{e.Network.Allow, e.Network.Deny} {
		for b = append(b, ';'); len(prefixes) > 0; prefixes = prefixes[1:] {
			b = append(prefixes[0].AppendTo(b), ' ')
		}
	}
	b = append(append(b, ';'), e.TLS.MinVersion...)
	if secrets := t.transportSecrets(); slices.ContainsFunc(secrets, func(s string) bool { return s != "" }) {
		hashed := sha256.New()
		for _, part := range secrets {
			fmt.Fprintf(hashed, "%d:%s", len(part), part)
		}
		b = hex.AppendEncode(append(b, ';'), hashed.Sum(nil))
	}
	return string(b)
}

// transportSecrets is what makes a connection and is too long, or too private, to name it by.
func (t *target) transportSecrets() []string {
	e := t.endpoint
	parts := []string{e.TLS.CA, "", "", ""}
	if e.Auth.MTLS != nil {
		parts[1], parts[2] = e.Auth.MTLS.Cert, e.Auth.MTLS.Key.Reveal()
	}
	if t.way.proxy != nil {
		parts[3] = e.Proxy.Reveal()
	}
	return parts
}

// Format keeps an endpoint's credentials out of whatever prints by reflection.
func (t *target) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, t.endpoint.String()) }

// parseURL checks an endpoint's URL. Its errors never show it: its query may hold a credential.
func parseURL(e *outbox.Endpoint) (*url.URL, error) {
	return parseAddress(e.URL, e.Origin, e.Origin == outbox.FromFile || len(e.Network.Allow) > 0)
}

// parseAddress checks where requests are sent to; plain says whether that may be by plain http.
func parseAddress(address string, origin outbox.Origin, plain bool) (*url.URL, error) {
	if address == "" {
		return nil, errors.New("is missing")
	}
	if len(address) > maxURL {
		return nil, fmt.Errorf("is longer than %d bytes", maxURL)
	}
	to, err := url.Parse(address)
	if err != nil {
		return nil, errors.New("is not a valid URL")
	}
	switch {
	case to.Scheme != "http" && to.Scheme != "https":
		return nil, errors.New("must begin with https:// or http://")
	case to.Hostname() == "":
		return nil, errors.New("has no host")
	case to.User != nil:
		return nil, errors.New("holds a user name or password, which are given in auth")
	case to.Scheme == "http" && !plain:
		return nil, errors.New("must begin with https://")
	case strings.Contains(to.Hostname(), "%") && origin != outbox.FromFile:
		return nil, errors.New("its address has a zone")
	case strings.Contains(to.Hostname(), ":"):
		if _, err := netip.ParseAddr(to.Hostname()); err != nil {
			return nil, errors.New("its host is not a valid IPv6 address")
		}
	}
	if p := to.Port(); p != "" {
		if n, err := strconv.Atoi(p); err != nil || n < 1 || n > 65535 {
			return nil, errors.New("its port is not one of 1 to 65535")
		}
	}
	to.Host = strings.TrimSuffix(to.Host, ":")
	to.Fragment, to.RawFragment = "", ""
	return to, nil
}

// reserved header names are the sender's or HTTP's own to set.
var reserved = []string{
	"host", "transfer-encoding", "connection", "keep-alive", "proxy-connection", "proxy-authorization", "te", "trailer", "upgrade", "expect",
}

// reservedHeader tells whether a header, in lower case, is the sender's or HTTP's own to set.
func reservedHeader(name string) bool {
	return slices.Contains(reserved, name) || strings.HasPrefix(name, "content-") || strings.HasPrefix(name, "webhook-")
}

// takenHeaders are those, in lower case, that the endpoint's own settings have the sender set.
func (t *target) takenHeaders() []string {
	var names []string
	for _, s := range t.signatures {
		names = append(names, strings.ToLower(s.header))
	}
	if t.nfeio {
		names = append(names, strings.ToLower(headerHookID), strings.ToLower(headerHookAttempts))
	}
	if t.endpoint.Format == outbox.FormatCloudEventsBinary {
		names = append(names, attributeHeaders...)
	}
	if a := t.endpoint.Auth; a.Basic != nil || a.Bearer != "" || a.OAuth2 != nil {
		names = append(names, "authorization")
	}
	return names
}

// parseHeaders checks the headers an endpoint sends with every request, of which none may be
// taken. An error names its header and never shows a value, which may be a credential.
func parseHeaders(given map[string]string, taken []string) (http.Header, []error) {
	var errs []error
	headers := make(http.Header, len(given)+8)
	seen := make(map[string]string, len(given))
	for _, name := range slices.Sorted(maps.Keys(given)) {
		lower, value := strings.ToLower(name), given[name]
		why := ""
		switch {
		case !validHeaderName(name):
			why = "is not a valid header name"
		case lower == "authorization" && slices.Contains(taken, lower):
			why = "is set by auth; give one of them"
		case reservedHeader(lower), slices.Contains(taken, lower):
			why = "is set by walhook and cannot be given"
		case seen[lower] != "":
			why = "is the same header as " + seen[lower]
		case !validHeaderValue(value):
			why = "its value holds a line break, NUL or another control character"
		case len(value) > maxHeaderValue:
			why = fmt.Sprintf("its value is larger than %d bytes", maxHeaderValue)
		}
		if why != "" {
			if !validHeaderName(name) {
				name = strconv.Quote(name)
			}
			errs = append(errs, fmt.Errorf("headers.%s: %s", name, why))
			continue
		}
		seen[lower] = name
		headers[spelled(name)] = []string{value}
	}
	return headers, errs
}

// spelled is a header's name as it is sent: as it was written, but for those that are looked for by name.
func spelled(name string) string {
	switch lower := strings.ToLower(name); lower {
	case "user-agent", "idempotency-key":
		return http.CanonicalHeaderKey(name)
	case headerTraceparent:
		return headerTraceparent
	}
	return name
}

// validHeaderName tells whether s is a token of RFC 9110.
func validHeaderName[T string | []byte](s T) bool {
	for i := range len(s) {
		c := s[i]
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && !strings.ContainsRune("!#$%&'*+-.^_`|~", rune(c)) {
			return false
		}
	}
	return len(s) > 0
}

// validHeaderValue tells whether s may stand in a header: no control characters but the tab.
func validHeaderValue[T string | []byte](s T) bool {
	for i := range len(s) {
		if s[i] < ' ' && s[i] != '\t' || s[i] == 0x7f {
			return false
		}
	}
	return true
}

// plainTLS are the settings of the many endpoints that say nothing else of TLS, by their min_version. They are cloned where
// they are used.
var plainTLS = map[string]*tls.Config{
	"":    {MinVersion: tls.VersionTLS12},
	"1.2": {MinVersion: tls.VersionTLS12},
	"1.3": {MinVersion: tls.VersionTLS13},
}

// parseTLS reads the endpoint's TLS settings. It reads no file: what an endpoint says may be a
// stranger's word, and who knows better has read its files before.
func parseTLS(e *outbox.Endpoint) (cfg *tls.Config, errs []error) {
	cfg, known := plainTLS[e.TLS.MinVersion]
	switch {
	case !known:
		errs = append(errs, fmt.Errorf(`tls.min_version: %q is not one of "1.2", "1.3"`, e.TLS.MinVersion))
		cfg = &tls.Config{}
	case e.TLS.CA == "" && e.Auth.MTLS == nil:
		return cfg, nil
	default:
		cfg = cfg.Clone()
	}
	switch {
	case e.TLS.CA == "":
	case !isPEM(e.TLS.CA):
		errs = append(errs, errors.New("tls.ca: is not PEM, and no file is read for an endpoint"))
	default:
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM([]byte(e.TLS.CA)) {
			errs = append(errs, errors.New("tls.ca: holds no certificate in PEM"))
		}
	}
	if e.Auth.MTLS != nil {
		pair, err := parseKeyPair(e.Auth.MTLS)
		if err != nil {
			return nil, append(errs, err)
		}
		// Not cfg.Certificates: of those none is sent where the receiver names other authorities,
		// and nobody says so.
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return pair, nil }
	}
	return cfg, errs
}
