package outbox

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"time"

	"github.com/walhook/walhook/outbox/rule"
)

// Secret is a signing key or a credential. It prints as [redacted] wherever it is printed
// by accident; Reveal is the one way to its characters.
type Secret string

// Reveal returns the characters of the secret.
func (s Secret) Reveal() string { return string(s) }

const redacted = "[redacted]"

// Format has every verb of fmt print the same, %x and %q too. What fmt, json or a log reaches by
// reflection is safe as well, but for an unexported field, whose methods nobody can call (a struct
// that keeps a Secret in one has a Format of its own), and for the key of a map in JSON.
func (Secret) Format(f fmt.State, _ rune)   { _, _ = io.WriteString(f, redacted) }
func (Secret) String() string               { return redacted }
func (Secret) MarshalJSON() ([]byte, error) { return json.Marshal(redacted) }
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Ordering is the promise an endpoint has about the order in which its events come.
type Ordering string

// The orderings.
const (
	OrderKey  Ordering = "key"  // events of one key in commit order, one at a time; keys are free of each other
	OrderNone Ordering = "none" // no order, most parallel
	OrderAll  Ordering = "all"  // one strict sequence
)

// Format is the shape of a request's body.
type Format string

// The formats.
const (
	FormatStandard Format = "standard" // {"type", "timestamp", "data"}
	FormatRaw      Format = "raw"      // the payload alone

	// CloudEvents 1.0: one JSON object with attributes and data, or the payload alone, with the
	// attributes as headers.
	FormatCloudEvents       Format = "cloudevents"
	FormatCloudEventsBinary Format = "cloudevents-binary"
)

// Scheme names a way of signing requests.
type Scheme string

// The schemes.
const (
	SchemeStandard Scheme = "standard" // Standard Webhooks 1.0.0
	SchemeGitHub   Scheme = "github"
	SchemeStripe   Scheme = "stripe"
	SchemeShopify  Scheme = "shopify"
	SchemeNFEio    Scheme = "nfeio"
	SchemeNone     Scheme = "none" // no signature, whatever secrets there are; alone
	SchemeCustom   Scheme = "custom"
)

// Signing is one way in which requests are signed. All but its scheme is of the custom one alone.
type Signing struct {
	Scheme Scheme

	Algorithm string // of the HMAC: sha1, sha256 or sha512
	Encoding  string // hex, HEX or base64
	Header    string
	Prefix    string // stands before the signature in the header
	Content   string // what is signed: text in which {body}, {id} and {timestamp} are replaced
}

// CustomSigning is the custom scheme with every setting at its default; Header is the user's to give.
func CustomSigning() Signing {
	return Signing{Scheme: SchemeCustom, Algorithm: "sha256", Encoding: "hex", Content: "{body}"}
}

// Status is what an endpoint is allowed to receive.
type Status string

// The statuses.
const (
	Enabled  Status = "enabled"
	Paused   Status = "paused"   // events are parked, nothing is sent
	Disabled Status = "disabled" // new events pass it by; what is parked stays
)

// Origin tells who registered an endpoint, hence how far its URL is trusted.
type Origin string

// The origins.
const (
	FromFile  Origin = "file"  // the operator's: any address
	FromTable Origin = "table" // other people's: public addresses over https only
)

// Endpoint is a URL with its subscription, secrets and delivery policy. It is immutable;
// a reload brings a new one with the same ID.
type Endpoint struct {
	ID     string
	Origin Origin
	Status Status
	URL    string

	Tenant string       // exactly this tenant; "*" all; empty only events without one
	Events []string     // globs on the type
	Filter *rule.Filter // of those, the events it wants; nil all

	Secrets []Secret  // newest first; all sign where the scheme's header holds several signatures, else the newest
	Signing []Signing // one or more; every request carries the signatures of all
	Format  Format
	Headers map[string]string // sent as they are with every request
	Auth    Auth

	PreviousUntil time.Time // from then on the newest secret alone signs; zero: all of them do

	Transform Transform

	Ordering    Ordering
	Timeout     time.Duration // of one attempt, from dial to the answer's status line
	Concurrency int           // attempts in flight at once
	RateLimit   RateLimit
	Batch       Batch
	Retry       RetryPolicy
	Breaker     BreakerPolicy

	DisableAfter time.Duration // of unbroken failure; zero never
	MaxPayload   int64         // bytes of body
	Network      Network
	TLS          TLS
	Proxy        Secret // URL of the proxy that connections go through, with its password; empty or NoProxy: none
}

// NoProxy in the place of a proxy's URL says that there is to be none, whatever the environment names.
const NoProxy Secret = "none"

// Auth is how requests prove to the receiver whose they are, beside their signature. At most one
// of Basic, Bearer and OAuth2 is set: they share a header. MTLS may stand beside each.
type Auth struct {
	Basic  *Basic
	Bearer Secret
	OAuth2 *OAuth2
	MTLS   *KeyPair
}

// Format prints nothing of the credentials. (fmt prints what a pointer leads to without asking it,
// where a verb does not suit pointers: so these have to be asked before.)
func (Auth) Format(f fmt.State, _ rune)    { _, _ = io.WriteString(f, redacted) }
func (Basic) Format(f fmt.State, _ rune)   { _, _ = io.WriteString(f, redacted) }
func (OAuth2) Format(f fmt.State, _ rune)  { _, _ = io.WriteString(f, redacted) }
func (KeyPair) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// Basic is a user name and password, sent with every request.
type Basic struct {
	Username string
	Password Secret
}

// OAuth2 is where bearer tokens come from: the grant of client credentials (RFC 6749, 4.4).
type OAuth2 struct {
	TokenURL     Secret // its query may hold a credential
	ClientID     string
	ClientSecret Secret
	Scopes       []string
}

// KeyPair is a certificate with its chain, and its private key, both in PEM.
type KeyPair struct {
	Cert string
	Key  Secret
}

// Transform makes of an event what its endpoint understands. What is nil, or empty, is as the
// endpoint's format has it.
type Transform struct {
	Body    *rule.Body // the whole body, in whatever format; one of Body and Form at most
	Form    *rule.Form
	Headers *rule.Headers // beside the endpoint's own, or in their place
	Method  string        // POST, PUT, PATCH or DELETE; empty is POST
	URL     *rule.Target  // in the place of the URL's path and query
}

// rules tells whether there is a transform at all, and whether it may look into the event's JSON.
func (t *Transform) rules() (some, parses bool) {
	if t.Body != nil {
		some, parses = true, parses || t.Body.Parses()
	}
	if t.Form != nil {
		some, parses = true, parses || t.Form.Parses()
	}
	if t.Headers != nil {
		some, parses = true, parses || t.Headers.Parses()
	}
	if t.URL != nil {
		some, parses = true, parses || t.URL.Parses()
	}
	return some, parses
}

// rules tells whether the endpoint has rules, and whether they may look into an event's JSON.
func (ep *Endpoint) rules() (some, parses bool) {
	some, parses = ep.Transform.rules()
	if ep.Filter != nil {
		some, parses = true, parses || ep.Filter.Parses()
	}
	return some, parses
}

// RetryPolicy says when a failed delivery is tried again and when it is given up.
type RetryPolicy struct {
	Schedule []time.Duration // the wait before the 2nd, 3rd, … attempt; after the last the delivery is dead
	Jitter   float64         // 0.2 spreads a wait by ±20 %
	MaxAge   time.Duration   // older than this since its commit, a delivery is dead; zero never
	DeadOn   []int           // status codes not worth a retry
}

// BreakerPolicy says when an endpoint's circuit opens. It opens on either rule.
type BreakerPolicy struct {
	ConsecutiveFailures int
	FailureRate         float64 // of MinRequests or more completed attempts within Window
	MinRequests         int
	Window              time.Duration
	OpenFor             time.Duration // until one probe is let through
}

// Network narrows or widens the addresses an endpoint may be reached at.
type Network struct {
	Allow []netip.Prefix
	Deny  []netip.Prefix
}

// TLS is how an endpoint proves who it is.
type TLS struct {
	CA         string // PEM of the only accepted authorities; empty for the system's
	MinVersion string // "1.2" or "1.3"
}

// String names an endpoint, and so do %+v, %#v and JSON: its URL and headers hold credentials as
// often as not.
func (ep Endpoint) String() string               { return "endpoint " + ep.ID }
func (ep Endpoint) GoString() string             { return ep.String() }
func (ep Endpoint) MarshalJSON() ([]byte, error) { return json.Marshal(ep.String()) }

// SignsBy tells whether a scheme is among those that sign the endpoint's requests.
func (ep *Endpoint) SignsBy(s Scheme) bool {
	return slices.ContainsFunc(ep.Signing, func(own Signing) bool { return own.Scheme == s })
}

// orderKey is what orders an event at this endpoint.
func (ep *Endpoint) orderKey(e *Event) string {
	switch ep.Ordering {
	case OrderAll:
		return "*"
	case OrderKey:
		return e.Key
	}
	return ""
}

// DefaultEndpoint holds every setting at its default; URL and ID are the user's to give.
func DefaultEndpoint() Endpoint {
	return Endpoint{
		Origin:      FromFile,
		Status:      Enabled,
		Events:      []string{"*"},
		Signing:     []Signing{{Scheme: SchemeStandard}},
		Format:      FormatStandard,
		Ordering:    OrderKey,
		Timeout:     15 * time.Second,
		Concurrency: 64,
		Batch:       Batch{MaxEvents: 1},
		Retry: RetryPolicy{
			Schedule: []time.Duration{
				5 * time.Second, time.Minute, 5 * time.Minute, 30 * time.Minute, 2 * time.Hour,
				5 * time.Hour, 10 * time.Hour, 14 * time.Hour, 20 * time.Hour, 24 * time.Hour,
			},
			Jitter: 0.2,
			MaxAge: 7 * 24 * time.Hour,
		},
		Breaker: BreakerPolicy{
			ConsecutiveFailures: 5,
			FailureRate:         0.5,
			MinRequests:         20,
			Window:              30 * time.Second,
			OpenFor:             30 * time.Second,
		},
		DisableAfter: 5 * 24 * time.Hour,
		MaxPayload:   1 << 20,
		TLS:          TLS{MinVersion: "1.2"},
	}
}
