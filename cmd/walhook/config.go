package main

import (
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"math"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/outbox/rule"
	"github.com/walhook/walhook/sender"
)

// defaultConfigPath is read where neither --config nor WALHOOK_CONFIG names a file.
const defaultConfigPath = "walhook.yaml"

// Config is one whole configuration file with every default filled in and every value
// checked: a reader of it finds nothing unset and nothing out of range.
type Config struct {
	Path      string // the file it came from
	Database  Database
	CDC       CDC
	Outbox    []outbox.Source
	Defaults  outbox.Endpoint    // what an endpoint is before its own settings; without ID and URL
	Endpoints []*outbox.Endpoint // in the order of the file
	Buffer    Buffer
	Server    Server
	Metrics   Metrics
	Log       Log

	environment func(*url.URL) (*url.URL, error) // the proxy that it names for a URL: see proxied
	inputs      inputs                           // the files it is made of, Path among them
}

// Database says where Postgres is. The URLs hold passwords, hence their type.
type Database struct {
	URL            outbox.Secret
	ReplicationURL outbox.Secret // empty: URL serves for replication too
}

// Replication is the address that replication connections go to.
func (d Database) Replication() outbox.Secret {
	if d.ReplicationURL != "" {
		return d.ReplicationURL
	}
	return d.URL
}

// CDC names the slot and publication that rows arrive through.
type CDC struct {
	Slot        string
	Publication string
	Instance    string // of the checkpoint: a copy of the database has another one and sends nothing
	Create      bool   // make slot and publication where they are missing
	Snapshot    string // "initial": the rows that are there before the slot are sent too; or "never"
	Recover     string // "auto": what a lost slot may have missed is sent again; "ask": once told to
	MaxRecovery int    // rows that are sent again without a question
	Failover    string // "auto": a failover slot on Postgres 17 and later
}

// Buffer bounds what is held in memory.
type Buffer struct {
	Events     int
	Bytes      int64
	SpillAfter time.Duration // a delivery that holds the watermark for longer is parked
}

// Server is the HTTP side: health, metrics, API.
type Server struct {
	Listen string
	Token  outbox.Secret // of /api; empty: served on loopback only
}

// Metrics bounds what /metrics says.
type Metrics struct {
	MaxEndpoints int // that have series of their own; the others share endpoint="other"
}

// Log is how much is logged, and in which form.
type Log struct {
	Level  string // debug, info, warn or error
	Format string // json or console
}

// defaultConfig is the configuration before the file is read; what has no default there
// (database.url, outbox) is demanded by the loader.
func defaultConfig() *Config {
	return &Config{
		CDC: CDC{
			Slot:        "walhook",
			Publication: "walhook",
			Instance:    "default",
			Create:      true,
			Snapshot:    "never",
			Recover:     "ask",
			MaxRecovery: 10_000,
			Failover:    "auto",
		},
		Defaults: outbox.DefaultEndpoint(),
		Buffer:   Buffer{Events: 10_000, Bytes: 64 << 20, SpillAfter: time.Second},
		Server:   Server{Listen: ":8080"},
		Metrics:  Metrics{MaxEndpoints: 200},
		Log:      Log{Level: "info", Format: "json"},
	}
}

// configPath is the file that is read: the one given, else the one WALHOOK_CONFIG names,
// else walhook.yaml in the working directory.
func configPath(given string, env func(string) (string, bool)) string {
	if given != "" {
		return given
	}
	if p, ok := env("WALHOOK_CONFIG"); ok && p != "" {
		return p
	}
	return defaultConfigPath
}

// LoadConfig reads the configuration file at path (see configPath for an empty one), strictly:
// every key is known, every value is checked, and nothing the file says is ignored. Variables
// come from env. All mistakes are reported at once in a *ConfigError, which never contains
// the value of a secret, of a variable, or of anything else that may hold a credential.
func LoadConfig(path string, env func(string) (string, bool)) (*Config, error) {
	c, _, err := loadConfig(path, env)
	return c, err
}

// loadConfig is LoadConfig, and tells which files were read, also where they make no configuration.
func loadConfig(path string, env func(string) (string, bool)) (*Config, inputs, error) {
	path = configPath(path, env)
	l := &loader{file: filepath.Clean(path), env: env}
	src, ok := l.open()
	if !ok {
		return nil, l.inputs(), l.err()
	}
	c, err := l.load(src)
	if err != nil {
		return nil, l.inputs(), err
	}
	c.inputs = l.inputs()
	return c, c.inputs, nil
}

// load is LoadConfig once the file has been read.
func (l *loader) load(src []byte) (*Config, error) {
	c := defaultConfig()
	c.Path = l.file
	c.environment = environmentProxy(l.env)
	if root, ok := l.parse(src); ok {
		l.config(root, c)
	}
	if err := l.err(); err != nil {
		return nil, err
	}
	return c, nil
}

// The patterns of names. A slot's is Postgres' own.
var (
	slotName   = regexp.MustCompile(`^[a-z0-9_]{1,63}$`)
	endpointID = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,128}$`)
	headerName = regexp.MustCompile("^[A-Za-z0-9!#$%&'*+.^_`|~-]+$") // a token of RFC 9110
)

const (
	slotNameRule   = "1 to 63 of a-z, 0-9 and _"
	endpointIDRule = "1 to 128 letters, digits, _, - and ."
	day            = 24 * time.Hour
)

func (l *loader) config(root value, c *Config) {
	var sources, endpoints, defaults value
	keep := func(at *value) func(value) { return func(v value) { *at = v } }
	seen := l.section(root,
		field{"database", func(v value) { l.database(v, &c.Database) }},
		field{"cdc", func(v value) { l.cdc(v, &c.CDC) }},
		field{"outbox", keep(&sources)},
		field{"defaults", keep(&defaults)},
		field{"endpoints", keep(&endpoints)},
		field{"buffer", func(v value) {
			l.section(v,
				field{"events", l.integer(&c.Buffer.Events, 1, 10_000_000)},
				field{"bytes", l.size(&c.Buffer.Bytes, 1<<20, 1<<40)},
				field{"spill_after", l.duration(&c.Buffer.SpillAfter, 10*time.Millisecond, time.Minute)})
		}},
		field{"server", func(v value) {
			l.section(v,
				field{"listen", l.listen(&c.Server.Listen)},
				field{"token", l.secret(&c.Server.Token)})
		}},
		field{"metrics", func(v value) {
			l.section(v, field{"max_endpoints", l.integer(&c.Metrics.MaxEndpoints, 0, 100_000)})
		}},
		field{"log", func(v value) {
			l.section(v,
				field{"level", oneOf(l, &c.Log.Level, "debug", "info", "warn", "error")},
				field{"format", oneOf(l, &c.Log.Format, "json", "console")})
		}})

	if !seen["database"] {
		l.missing(root, "database.url", databaseURLRule)
	}
	if seen["outbox"] {
		c.Outbox = l.sources(root, sources)
	} else {
		l.missing(root, "outbox", "a list of sources, as in [{table: public.outbox}]")
	}
	// The defaults are read first, wherever they stand in the file.
	sound := true
	if seen["defaults"] {
		sound = l.defaults(defaults, endpoints, &c.Defaults)
	}
	if seen["endpoints"] { // there may be none: apps register theirs in walhook.endpoints
		c.Endpoints = l.endpoints(endpoints, c.Defaults, sound, c.environment)
	}
}

const databaseURLRule = `postgres://user:password@host:port/database?sslmode=…, or host=… dbname=…`

func (l *loader) database(v value, d *Database) {
	address := func(dst *outbox.Secret, optional bool) func(value) {
		return func(v value) {
			s, ok := l.scalar(v, sensitive)
			if !ok {
				return
			}
			rest, isURL := strings.CutPrefix(s.text, "postgres://")
			if !isURL {
				rest, isURL = strings.CutPrefix(s.text, "postgresql://")
			}
			switch {
			case s.text == "" && optional:
			case s.text == "":
				l.problem(v, "is empty", databaseURLRule)
			case isURL && rest != "", !strings.Contains(s.text, "://") && strings.Contains(s.text, "="):
				*dst = outbox.Secret(s.text)
			default:
				l.problem(v, "is not the address of a Postgres database", databaseURLRule)
			}
		}
	}
	var key outbox.Secret
	seen := l.section(v,
		field{"url", address(&d.URL, false)},
		field{"replication_url", address(&d.ReplicationURL, true)},
		field{"password", l.secret(&key)})
	if seen != nil && !seen["url"] {
		l.missing(v, v.path+".url", databaseURLRule)
	}
	for _, of := range []*outbox.Secret{&d.URL, &d.ReplicationURL} {
		switch {
		case key == "" || *of == "":
		case password.MatchString(of.Reveal()):
			l.problem(v, "has a password beside an address that has one", "one of them")
		default:
			*of = withPassword(*of, key)
		}
	}
}

// withPassword is the address of a database with a password that stands beside it: as it is, so
// that a secret that a machine made needs no encoding by hand.
func withPassword(address, key outbox.Secret) outbox.Secret {
	text := address.Reveal()
	switch {
	case !strings.Contains(text, "://"):
		text += " password='" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(key.Reveal()) + "'"
	case strings.Contains(text, "?"):
		text += "&password=" + strings.ReplaceAll(url.QueryEscape(key.Reveal()), "+", "%20")
	default:
		text += "?password=" + strings.ReplaceAll(url.QueryEscape(key.Reveal()), "+", "%20")
	}
	return outbox.Secret(text)
}

func (l *loader) cdc(v value, c *CDC) {
	l.section(v,
		field{"slot", l.name(&c.Slot, slotName.MatchString, slotNameRule)},
		field{"publication", l.name(&c.Publication, func(s string) bool { return s != "" && len(s) <= 63 && !strings.ContainsRune(s, 0) }, "1 to 63 bytes")},
		field{"instance", l.name(&c.Instance, endpointID.MatchString, endpointIDRule)},
		field{"create", l.boolean(&c.Create)},
		field{"snapshot", oneOf(l, &c.Snapshot, "never", "initial")},
		field{"recover", oneOf(l, &c.Recover, "ask", "auto")},
		field{"max_recovery", l.integer(&c.MaxRecovery, 1, 1_000_000_000)},
		field{"failover", oneOf(l, &c.Failover, "auto")})
	if c.Snapshot == "initial" && !c.Create {
		l.problem(v, "snapshot: initial needs a slot that walhook makes itself", "create: true, or snapshot: never")
	}
}

// sources reads the outbox tables and message prefixes, and has them checked as far as that
// goes without a database.
func (l *loader) sources(root, v value) []outbox.Source {
	items, ok := l.items(v)
	if ok && len(items) == 0 {
		l.problem(v, "is empty", "one source or more, as in [{table: public.outbox}]")
	}
	all := make([]outbox.Source, 0, len(items))
	sound := true
	for _, item := range items {
		before := len(l.problems)
		s := l.source(item)
		if len(l.problems) == before {
			if err := s.Validate(); err != nil {
				l.foreign(item, err)
			}
		}
		sound = sound && len(l.problems) == before
		all = append(all, s)
	}
	if sound { // then what is left to find is between them
		if _, err := outbox.NewMapper(all); err != nil {
			l.foreign(root, err)
		}
	}
	return all
}

func (l *loader) source(v value) outbox.Source {
	var s outbox.Source
	notEmpty := func(s string) bool { return s != "" }
	seen := l.section(v,
		field{"table", l.name(&s.Table, notEmpty, "schema.table, as in public.outbox")},
		field{"messages", l.name(&s.Messages, notEmpty, "the prefix given to pg_logical_emit_message")},
		field{"columns", func(v value) {
			l.section(v,
				field{"id", l.column(&s.ID)},
				field{"type", l.column(&s.Type)},
				field{"key", l.column(&s.Key)},
				field{"data", l.column(&s.Data)},
				field{"tenant", l.column(&s.Tenant)},
				field{"headers", l.column(&s.Headers)},
				field{"time", l.column(&s.Time)})
		}},
		field{"id_prefix", l.text(&s.IDPrefix)})
	switch {
	case seen == nil: // not a mapping, which has been said
	case seen["table"] && seen["messages"]:
		l.problem(v, "has both table and messages", "one of them; make two sources of it")
	case !seen["table"] && !seen["messages"]:
		l.missing(v, v.path+".table", "table: schema.table, or messages: prefix")
	}
	return s
}

// column reads where one part of an event comes from: a column's name, {expr: CEL} or
// {value: constant}.
func (l *loader) column(c *outbox.Column) func(value) {
	return func(v value) {
		if !isMapping(v) {
			l.name(&c.Name, func(s string) bool { return s != "" }, "a column's name, {expr: …} or {value: …}")(v)
			return
		}
		seen := l.section(v,
			field{"expr", l.name(&c.Expr, func(s string) bool { return strings.TrimSpace(s) != "" }, "a CEL expression, as in \"row.kind + '.' + row.type\"")},
			field{"value", func(v value) { c.Constant = true; l.text(&c.Value)(v) }})
		if seen != nil && len(seen) != 1 {
			l.problem(v, "wants one of expr and value", "a column's name, {expr: …} or {value: …}")
		}
	}
}

// defaults reads what is under every endpoint; sound says that nothing was wrong with it. Secrets
// without a scheme, and a scheme without secrets, are judged where an endpoint has both.
func (l *loader) defaults(v, endpoints value, e *outbox.Endpoint) (sound bool) {
	before := len(l.problems)
	seen := l.section(v, l.endpointFields(e)...)
	if len(l.problems) == before {
		some := *e
		some.ID, some.URL = "defaults", "https://localhost"
		switch {
		case len(some.Secrets) == 0:
			some.Secrets = []outbox.Secret{anySecret}
		case !seen["signing"] && l.eachSays("signing", endpoints):
			some.Signing = []outbox.Signing{{Scheme: outbox.SchemeNone}}
		}
		if err := sender.Validate(some); err != nil {
			l.foreign(v, err)
		}
	}
	return len(l.problems) == before
}

// anySecret is one that every scheme takes.
const anySecret outbox.Secret = "whsec_YW55"

// eachSays tells whether every section of a list has a key, and nothing about it if not.
func (l *loader) eachSays(key string, list value) bool {
	known := len(l.problems)
	defer func() { l.problems = l.problems[:known] }()
	items, ok := l.items(list)
	return ok && !slices.ContainsFunc(items, func(item value) bool {
		entries, _ := l.list(item)
		return !slices.ContainsFunc(entries, func(e entry) bool { return e.name == key })
	})
}

// endpoints reads the endpoints of the file, each over the defaults. What is wrong with those
// is not said again for each.
func (l *loader) endpoints(v value, defaults outbox.Endpoint, defaultsSound bool, environment func(*url.URL) (*url.URL, error)) []*outbox.Endpoint {
	items, _ := l.items(v)
	all := make([]*outbox.Endpoint, 0, len(items))
	first := make(map[string]value)
	groups := make(outbox.Groups)
	for _, item := range items {
		e, sound := l.endpoint(item, defaults)
		if e.ID != "" {
			if other, taken := first[e.ID]; taken {
				l.problem(item, "has the id "+strconv.Quote(e.ID)+" of "+other.path, "a different id for each endpoint")
			} else {
				first[e.ID] = item
			}
		}
		if sound && defaultsSound {
			if err := proxied(&e, environment); err != nil {
				l.problem(item, err.Error(), "proxy: http://proxy:3128 of its own, or proxy: none")
			}
			if err := sender.Validate(e); err != nil {
				l.foreign(item, err)
			}
			if err := groups.Join(&e); err != nil {
				l.foreign(item, err)
			}
		}
		all = append(all, &e)
	}
	return all
}

// endpoint reads one endpoint; sound says that nothing was wrong with it.
func (l *loader) endpoint(v value, defaults outbox.Endpoint) (e outbox.Endpoint, sound bool) {
	before := len(l.problems)
	e = defaults
	e.Headers = maps.Clone(defaults.Headers)
	fields := append([]field{
		{"id", l.name(&e.ID, endpointID.MatchString, endpointIDRule)},
		{"url", l.endpointURL(&e.URL)},
	}, l.endpointFields(&e)...)
	seen := l.section(v, fields...)
	switch {
	case seen == nil:
	case !seen["url"]:
		l.missing(v, v.path+".url", "https://… or http://…")
	case !seen["id"] && e.URL != "":
		e.ID = derivedID(e.URL)
	}
	return e, len(l.problems) == before
}

// endpointFields are the settings that an endpoint and the defaults share.
func (l *loader) endpointFields(e *outbox.Endpoint) []field {
	return []field{
		{"tenant", l.text(&e.Tenant)},
		{"events", l.globs(&e.Events)},
		{"filter", expression(l, &e.Filter, rule.CompileFilter, filterRule)},
		{"secrets", l.secrets(&e.Secrets)},
		{"signing", l.signing(&e.Signing)},
		{"format", oneOf(l, &e.Format, outbox.FormatStandard, outbox.FormatRaw, outbox.FormatCloudEvents, outbox.FormatCloudEventsBinary)},
		{"transform", l.transform(&e.Transform)},
		{"auth", l.auth(e)},
		{"headers", l.headers(&e.Headers)},
		{"ordering", oneOf(l, &e.Ordering, outbox.OrderKey, outbox.OrderNone, outbox.OrderAll)},
		{"timeout", l.duration(&e.Timeout, time.Millisecond, 10*time.Minute)},
		{"concurrency", l.integer(&e.Concurrency, 1, 10_000)},
		{"rate_limit", l.rateLimit(&e.RateLimit)},
		{"batch", func(v value) {
			l.section(v,
				field{"max_events", l.integer(&e.Batch.MaxEvents, 1, 1000)},
				field{"max_bytes", l.size(&e.Batch.MaxBytes, 1, 1<<30)},
				field{"linger", l.duration(&e.Batch.Linger, 0, time.Minute)})
		}},
		{"retry", func(v value) {
			l.section(v,
				field{"schedule", l.schedule(&e.Retry.Schedule)},
				field{"jitter", l.decimal(&e.Retry.Jitter, 0, 1)},
				field{"max_age", l.durationOrNever(&e.Retry.MaxAge, time.Second, 365*day)},
				field{"dead_on", l.codes(&e.Retry.DeadOn)})
		}},
		{"breaker", func(v value) {
			l.section(v,
				field{"consecutive_failures", l.integer(&e.Breaker.ConsecutiveFailures, 1, 100_000)},
				field{"failure_rate", l.decimal(&e.Breaker.FailureRate, 0.01, 1)},
				field{"min_requests", l.integer(&e.Breaker.MinRequests, 1, 100_000)},
				field{"window", l.duration(&e.Breaker.Window, 100*time.Millisecond, day)},
				field{"open_for", l.duration(&e.Breaker.OpenFor, 10*time.Millisecond, day)})
		}},
		{"disable_after", l.durationOrNever(&e.DisableAfter, time.Second, 365*day)},
		{"max_payload", l.size(&e.MaxPayload, 1, 1<<30)},
		{"network", func(v value) {
			l.section(v,
				field{"allow", l.prefixes(&e.Network.Allow)},
				field{"deny", l.prefixes(&e.Network.Deny)})
		}},
		{"tls", func(v value) {
			l.section(v,
				field{"ca", l.pem(e, &e.TLS.CA)},
				field{"min_version", oneOf(l, &e.TLS.MinVersion, "1.2", "1.3")})
		}},
		{"proxy", func(v value) {
			if l.isOneOf(v, outbox.NoProxy.Reveal()) { // no secret: it stands in messages
				e.Proxy = outbox.NoProxy
				return
			}
			l.secret(&e.Proxy)(v)
			if e.Origin != outbox.FromFile {
				l.problem(v, "is the operator's to say", "leave it out")
			}
		}},
	}
}

// auth reads how an endpoint is told whose requests they are. It takes the place of what the
// defaults say: half of one and half of another are none.
func (l *loader) auth(e *outbox.Endpoint) func(value) {
	return func(v value) {
		var a outbox.Auth
		l.section(v,
			field{"basic", func(v value) {
				a.Basic = &outbox.Basic{}
				l.section(v,
					field{"username", l.text(&a.Basic.Username)},
					field{"password", l.secret(&a.Basic.Password)})
			}},
			field{"bearer", l.credential(&a.Bearer)},
			field{"oauth2", func(v value) {
				a.OAuth2 = &outbox.OAuth2{}
				l.section(v,
					field{"token_url", l.credential(&a.OAuth2.TokenURL)},
					field{"client_id", l.text(&a.OAuth2.ClientID)},
					field{"client_secret", l.credential(&a.OAuth2.ClientSecret)},
					field{"scopes", l.scopes(&a.OAuth2.Scopes)})
			}},
			field{"mtls", func(v value) {
				a.MTLS = &outbox.KeyPair{}
				key := ""
				l.section(v,
					field{"cert", l.pem(e, &a.MTLS.Cert)},
					field{"key", l.pem(e, &key)})
				a.MTLS.Key = outbox.Secret(key)
			}})
		e.Auth = a
	}
}

// credential is a secret that must not be empty: nothing would be sent in its place, unnoticed.
func (l *loader) credential(dst *outbox.Secret) func(value) {
	return func(v value) {
		l.secret(dst)(v)
		if s, wrong := l.peek(v); wrong == (Problem{}) && s.text == "" {
			l.problem(v, "is empty", "a value, or no such key at all")
		}
	}
}

func (l *loader) scopes(dst *[]string) func(value) {
	return func(v value) {
		items, ok := l.items(v)
		if !ok {
			return
		}
		*dst = make([]string, len(items))
		for i, item := range items {
			l.name(&(*dst)[i], func(s string) bool { return s != "" }, "the name of a scope")(item)
		}
	}
}

// maxPEM is more than any bundle of authorities has.
const maxPEM = 4 << 20

// pem reads certificates or a key: PEM, or, where the operator says so, the path of a file with
// it. What a row of the table names is never opened: the file would be this host's, the row
// anybody's.
func (l *loader) pem(e *outbox.Endpoint, dst *string) func(value) {
	return func(v value) {
		s, ok := l.scalar(v, sensitive)
		switch {
		case !ok:
		case s.text == "", strings.Contains(s.text, "-----BEGIN "):
			*dst = s.text
		case e.Origin != outbox.FromFile:
			l.problem(v, "is not PEM", "-----BEGIN …; the path of a file is for endpoints of the configuration file")
		default:
			content, err := l.read(s.text, maxPEM)
			if err != nil {
				l.problem(v, "is neither PEM nor a file that can be read: "+err.Error(), "a path, or -----BEGIN …")
				return
			}
			*dst = string(content)
		}
	}
}

var (
	filterRule    = `true or false in CEL over ` + strings.Join(rule.Variables, ", ") + `, as in "data.amount > 100"`
	transformRule = "CEL over " + strings.Join(rule.Variables, ", ")
)

// expression reads an expression and compiles it; an empty one is none.
func expression[T any](l *loader, dst **T, compile func(string) (*T, error), allowed string) func(value) {
	return func(v value) {
		s, ok := l.scalar(v, public)
		if !ok {
			return
		}
		if *dst = nil; strings.TrimSpace(s.text) == "" {
			return
		}
		made, err := compile(s.text)
		if err != nil {
			l.uncompiled(v, err, allowed)
			return
		}
		*dst = made
	}
}

// transform reads the rules that make a request. A section that gives one of body and form has
// done with the other of the defaults.
func (l *loader) transform(t *outbox.Transform) func(value) {
	return func(v value) {
		given := *t
		given.Body, given.Form = nil, nil
		seen := l.section(v,
			field{"body", expression(l, &given.Body, rule.CompileBody, transformRule+`, as in "{'event': type, 'payload': data}"`)},
			field{"form", expression(l, &given.Form, rule.CompileForm, `a map in `+transformRule+`, as in "{'contact': {'email': data.email}}"`)},
			field{"headers", expression(l, &given.Headers, rule.CompileHeaders, `a map of strings in `+transformRule+`, as in "{'X-Tenant': tenant}"`)},
			field{"method", oneOf(l, &given.Method, "POST", "PUT", "PATCH", "DELETE")},
			field{"url", expression(l, &given.URL, rule.CompileTarget, `a path in `+transformRule+`, as in "'/contacts/' + url.encode(data.id)"`)})
		switch {
		case given.Body != nil && given.Form != nil:
			l.problem(v, "has both body and form", "one of them: a request has one body")
		case !seen["body"] && !seen["form"]:
			given.Body, given.Form = t.Body, t.Form
		case !seen["body"] && given.Form == nil:
			given.Body = t.Body
		case !seen["form"] && given.Body == nil:
			given.Form = t.Form
		}
		*t = given
	}
}

// endpointURL reads an endpoint's URL. It never quotes it: paths and queries of webhook URLs
// are credentials as often as not.
func (l *loader) endpointURL(dst *string) func(value) {
	const rule = "https://host/path or http://host/path"
	return func(v value) {
		s, ok := l.scalar(v, sensitive)
		if !ok {
			return
		}
		u, err := url.Parse(s.text)
		switch {
		case s.text == "":
			l.problem(v, "is empty", rule)
		case err != nil:
			l.problem(v, "is not a URL", rule)
		case u.Scheme != "https" && u.Scheme != "http":
			l.problem(v, "does not begin with https:// or http://", rule)
		case u.Hostname() == "":
			l.problem(v, "names no host", rule)
		default:
			*dst = s.text
		}
	}
}

// derivedID is the id of an endpoint that was given none: its host, and eight digits of a
// digest where the URL says more than that. The digest stands in for path and query because
// ids are seen in logs and metrics, where a token from a URL must not appear.
func derivedID(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return ""
	}
	clean := func(r rune) rune {
		if r < 128 && endpointID.MatchString(string(r)) {
			return r
		}
		return '-'
	}
	id := strings.Trim(strings.Map(clean, strings.ToLower(u.Host)), "-")
	rest := u.EscapedPath()
	if u.RawQuery != "" {
		rest += "?" + u.RawQuery
	}
	if len(id) > 100 || id == "" || (rest != "" && rest != "/") {
		sum := sha256.Sum256([]byte(strings.ToLower(u.Host) + rest))
		id = strings.Trim(id[:min(len(id), 100)]+"-"+hex.EncodeToString(sum[:4]), "-")
	}
	return id
}

func (l *loader) globs(dst *[]string) func(value) {
	const rule = `one glob or more, as in ["invoice.*"]; ["*"] is every type`
	return func(v value) {
		items, ok := l.items(v)
		if !ok {
			return
		}
		if len(items) == 0 {
			l.problem(v, "is empty", rule)
		}
		globs := make([]string, len(items))
		for i, item := range items {
			l.name(&globs[i], func(s string) bool { return s != "" }, rule)(item)
		}
		*dst = globs
	}
}

func (l *loader) secrets(dst *[]outbox.Secret) func(value) {
	return func(v value) {
		items, ok := l.items(v)
		if !ok {
			return
		}
		*dst = nil
		for _, item := range items {
			s, ok := l.scalar(item, sensitive)
			if ok && s.text == "" {
				l.problem(item, "is empty", "whsec_… or whsk_…; any text where signing is not standard")
			}
			*dst = append(*dst, outbox.Secret(s.text))
		}
	}
}

// signing reads one scheme or a list of them: names, and sections for the custom one.
func (l *loader) signing(dst *[]outbox.Signing) func(value) {
	names := []outbox.Scheme{
		outbox.SchemeStandard, outbox.SchemeGitHub, outbox.SchemeStripe, outbox.SchemeShopify, outbox.SchemeNFEio, outbox.SchemeNone,
	}
	one := func(v value) outbox.Signing {
		if !isMapping(v) {
			var s outbox.Signing
			oneOf(l, &s.Scheme, names...)(v)
			return s
		}
		s := outbox.CustomSigning()
		seen := l.section(v,
			field{"algorithm", oneOf(l, &s.Algorithm, "sha1", "sha256", "sha512")},
			field{"encoding", oneOf(l, &s.Encoding, "hex", "HEX", "base64")},
			field{"header", l.name(&s.Header, headerName.MatchString, "the name of a header, as in X-Signature")},
			field{"prefix", l.text(&s.Prefix)},
			field{"content", l.name(&s.Content, func(s string) bool { return s != "" }, "text with {body}, {id}, {timestamp}")})
		if seen != nil && !seen["header"] {
			l.missing(v, v.path+".header", "the name of a header, as in X-Signature")
		}
		return s
	}
	return func(v value) {
		if _, several := v.node.(*ast.SequenceNode); !several {
			*dst = []outbox.Signing{one(v)}
			return
		}
		items, _ := l.items(v)
		if len(items) == 0 {
			l.problem(v, "is empty", "none for requests without a signature")
		}
		*dst = nil
		for _, item := range items {
			*dst = append(*dst, one(item))
		}
	}
}

// headers are merged into what the defaults gave, by name without regard to case.
func (l *loader) headers(dst *map[string]string) func(value) {
	return func(v value) {
		entries, ok := l.entries(v, "a header's name and its value, as in {X-Env: prod}")
		if !ok {
			return
		}
		if *dst == nil {
			*dst = make(map[string]string, len(entries))
		}
		for _, e := range entries {
			s, ok := l.scalar(e.value, sensitive)
			if !ok {
				continue
			}
			if !headerName.MatchString(e.name) {
				l.problem(e.value, "is not the name of a header", "letters, digits and -")
				continue
			}
			maps.DeleteFunc(*dst, func(name, _ string) bool { return strings.EqualFold(name, e.name) })
			(*dst)[e.name] = s.text
		}
	}
}

// rateLimit reads a rate, or {group, rate}; empty text is no limit.
func (l *loader) rateLimit(dst *outbox.RateLimit) func(value) {
	perTime := func(v value) {
		s, ok := l.scalar(v, public)
		if !ok {
			return
		}
		r, err := outbox.ParseRate(s.text)
		if err != nil {
			l.problem(v, s.shown()+" is not a rate in range", outbox.RateForms)
			return
		}
		dst.Rate = r
	}
	return func(v value) {
		switch {
		case !isMapping(v) && l.isOneOf(v, ""):
			*dst = outbox.RateLimit{}
		case !isMapping(v):
			*dst = outbox.RateLimit{}
			perTime(v)
		default:
			seen := l.section(v,
				field{"group", l.name(&dst.Group, endpointID.MatchString, endpointIDRule)},
				field{"rate", perTime})
			if seen != nil && !seen["rate"] && dst.Rate == (outbox.Rate{}) {
				l.missing(v, v.path+".rate", outbox.RateForms)
			}
		}
	}
}

func (l *loader) schedule(dst *[]time.Duration) func(value) {
	return func(v value) {
		items, ok := l.items(v)
		if !ok {
			return
		}
		if len(items) > 100 {
			l.problem(v, "has "+strconv.Itoa(len(items))+" steps", "0 to 100")
		}
		*dst = nil
		for _, item := range items {
			var step time.Duration
			l.duration(&step, time.Millisecond, day)(item)
			*dst = append(*dst, step)
		}
	}
}

func (l *loader) codes(dst *[]int) func(value) {
	return func(v value) {
		items, ok := l.items(v)
		if !ok {
			return
		}
		*dst = nil
		for _, item := range items {
			var code int
			l.integer(&code, 300, 599)(item)
			*dst = append(*dst, code)
		}
	}
}

func (l *loader) prefixes(dst *[]netip.Prefix) func(value) {
	return func(v value) {
		items, ok := l.items(v)
		if !ok {
			return
		}
		*dst = []netip.Prefix{} // none is said, and not nothing: see narrow
		for _, item := range items {
			s, ok := l.scalar(item, public)
			if !ok {
				continue
			}
			p, err := netip.ParsePrefix(s.text)
			if a, aerr := netip.ParseAddr(s.text); aerr == nil && a.Zone() == "" {
				p, err = netip.PrefixFrom(a, a.BitLen()), nil
			}
			if err != nil {
				l.problem(item, s.shown()+" is not a range of addresses", "CIDR or address, as in 10.0.0.0/8, fd00::/8 or 192.0.2.7")
				continue
			}
			*dst = append(*dst, p.Masked())
		}
	}
}

func (l *loader) listen(dst *string) func(value) {
	const rule = "address:port, as in :8080 or 127.0.0.1:8080"
	return func(v value) {
		s, ok := l.scalar(v, public)
		if !ok {
			return
		}
		_, port, err := net.SplitHostPort(s.text)
		if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || n > math.MaxUint16 {
			l.problem(v, s.shown()+" is not an address to listen on", rule)
			return
		}
		*dst = s.text
	}
}
