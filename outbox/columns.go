package outbox

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
	"unsafe"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox/rule"
)

// How long the parts of an event may be, in bytes. They stand in headers and in keys of indexes
// (Postgres refuses an entry of more than a third of a page, and then nothing more could be parked).
const (
	maxIDLen     = 256 // prefix and percent-encoding included
	maxPrefixLen = 64
	maxTypeLen   = 256
	maxKeyLen    = 1024
	maxTenantLen = 256
)

const (
	maxTypes = 4096 // distinct event types that are kept as one string each
	maxPlans = 1024 // relations remembered; a new one comes with each change of a table and each reconnect

	// From this size on the payload has memory of its own, so that whoever keeps an event's key
	// or id for long keeps no megabyte with it.
	ownData = 4 << 10
)

// Source is one way in which rows become events: a table, or a prefix of logical messages.
type Source struct {
	Table    string // schema.table, or table of the schema public; case taken as written, SQL quotes allowed
	Messages string // the prefix given to pg_logical_emit_message; exactly one of the two is set
	IDPrefix string

	// Where the parts of an event come from. What is zero is found by the names of the table's columns, all but Tenant.
	ID, Type, Key, Data, Tenant, Headers, Time Column
}

// Column says where one part of an event comes from: a column of the row, an expression over it,
// or the same text for every row. The zero Column is none of them.
type Column struct {
	Name  string // as written: case counts, SQL quotes allowed
	Expr  string // CEL over row
	Value string
	// Constant tells an empty Value from none. {value: ""} keeps a column that is there by
	// name from being taken as the key, the headers or the time.
	Constant bool
}

func (c Column) constant() bool { return c.Constant || c.Value != "" }

// String is the column as the configuration has it.
func (c Column) String() string {
	switch {
	case c.Name != "":
		return yamlText(c.Name)
	case c.Expr != "":
		return "{expr: " + yamlQuote(c.Expr) + "}"
	case c.constant():
		return "{value: " + yamlQuote(c.Value) + "}"
	}
	return ""
}

// part is one of what an event is made of.
type part uint8

const (
	partID part = iota
	partType
	partKey
	partData
	partTenant
	partHeaders
	partTime
	numParts
)

var partNames = [numParts]string{"id", "type", "key", "data", "tenant", "headers", "time"}

func (p part) String() string { return partNames[p] }

func (s *Source) column(p part) Column {
	return [numParts]Column{s.ID, s.Type, s.Key, s.Data, s.Tenant, s.Headers, s.Time}[p]
}

// Validate finds the mistakes that need no database to be seen. Each is an error of its own
// (Unwrap() []error), beginning with its key within the source: columns.type.expr: ….
func (s *Source) Validate() error {
	_, err := compileSource(0, *s)
	return err
}

// source is a Source with its names read and its expressions compiled.
type source struct {
	Source
	index        int // in the configuration
	schema, name string
	exprs        [numParts]*rule.Column

	resolved bool // at least once
	idOID    uint32
	idColumn bool // the id comes from a column, of type idOID
}

// label names the source in an error: outbox[1] (public.outbox).
func (s *source) label() string { return fmt.Sprintf("outbox[%d] (%s)", s.index, s.what()) }

func (s *source) what() string {
	if s.Messages != "" {
		return "messages " + s.Messages
	}
	return tableText(s.schema, s.name)
}

func compileSource(index int, in Source) (*source, error) {
	s := &source{Source: in, index: index}
	var faults []error
	fault := func(key, format string, args ...any) { faults = append(faults, fmt.Errorf(key+": "+format, args...)) }
	switch {
	case in.Table != "" && in.Messages != "":
		fault("table", "one of table and messages, not both; make two sources of it")
	case in.Table == "" && in.Messages == "":
		fault("table", "is missing: give table: schema.table, or messages: prefix")
	case in.Table != "":
		var err error
		if s.schema, s.name, err = ParseTable(in.Table); err != nil {
			fault("table", "%w", err)
		} else if s.schema == "walhook" {
			fault("table", "the tables of the schema walhook are walhook's own")
		}
	case in.Messages == NoticePrefix:
		fault("messages", "walhook.events is the prefix of walhook's own messages")
	case len(in.Messages) > 63:
		fault("messages", "a prefix has at most 63 bytes")
	}
	if len(in.IDPrefix) > maxPrefixLen {
		fault("id_prefix", "has at most %d bytes", maxPrefixLen)
	}
	if encodedLen(in.IDPrefix) != len(in.IDPrefix) {
		fault("id_prefix", "%q: only letters, digits, _ : and - may stand in a webhook-id", in.IDPrefix)
	}
	for p := range numParts {
		c, key := in.column(p), "columns."+p.String()
		given := 0
		for _, set := range []bool{c.Name != "", c.Expr != "", c.constant()} {
			if set {
				given++
			}
		}
		switch {
		case given == 0:
		case in.Messages != "":
			fault(key, "a message has no columns; its parts are the members of its JSON object")
		case given > 1:
			fault(key, "one of a column's name, {expr: …} and {value: …}")
		case c.Name != "":
			if _, err := columnName(c.Name); err != nil {
				fault(key, "%w", err)
			}
		case c.Expr != "":
			var err error
			if s.exprs[p], err = rule.CompileColumn(c.Expr); err != nil {
				fault(key+".expr", "%w", err)
			}
		default:
			if err := checkConstant(p, c.Value); err != nil {
				fault(key+".value", "%w", err)
			}
		}
	}
	return s, errors.Join(faults...)
}

// checkConstant judges a text that every event of a source would have.
func checkConstant(p part, value string) error {
	switch p {
	case partID:
		return errors.New("every event needs an id of its own, so it cannot be a constant")
	case partType:
		if value == "" {
			return errors.New("a type may not be empty")
		}
		return checkText(value, maxTypeLen)
	case partKey:
		return checkText(value, maxKeyLen)
	case partTenant:
		return checkText(value, maxTenantLen)
	case partHeaders:
		_, err := headersText(value, false)
		return err
	case partData:
		if value == "" {
			return errors.New(`an empty payload is no JSON: write {value: "null"} or {value: "{}"}`)
		}
	case partTime:
		if value != "" {
			_, err := parseTime(value, 0)
			return err
		}
	}
	return nil
}

// ParseTable reads a table's name as the configuration has it: schema.table, or table alone,
// which is one of public. Case counts. What is in double quotes, as SQL has them, may hold dots and quotes.
func ParseTable(s string) (schema, name string, err error) {
	first, rest, err := identifier(s)
	if err != nil {
		return "", "", fmt.Errorf("table %q: %w", s, err)
	}
	if rest == "" {
		return "public", first, nil
	}
	second, rest, err := identifier(rest[1:])
	if err == nil && rest != "" {
		err = errors.New("more than one dot: want schema.table, with double quotes around a name that has dots of its own")
	}
	if err != nil {
		return "", "", fmt.Errorf("table %q: %w", s, err)
	}
	return first, second, nil
}

// identifier reads one name up to a dot that is not quoted, which rest begins with, or the end.
func identifier(s string) (name, rest string, err error) {
	if strings.HasPrefix(s, `"`) {
		var b strings.Builder
		for rest = s[1:]; ; {
			head, tail, closed := strings.Cut(rest, `"`)
			b.WriteString(head)
			if !closed {
				return "", "", errors.New("a double quote is not closed")
			}
			if !strings.HasPrefix(tail, `"`) {
				rest = tail
				break
			}
			b.WriteByte('"') // "" is one quote within the name
			rest = tail[1:]
		}
		if rest != "" && rest[0] != '.' {
			return "", "", errors.New("there is text behind the closing double quote")
		}
		name = b.String()
	} else {
		if i := strings.IndexByte(s, '.'); i >= 0 {
			s, rest = s[:i], s[i:]
		}
		if strings.Contains(s, `"`) {
			return "", "", errors.New("a double quote within a name: put the whole name in quotes and double it")
		}
		if strings.TrimSpace(s) != s {
			return "", "", errors.New("a name begins or ends with a space: if it is meant, put it in double quotes")
		}
		name = s
	}
	return name, rest, checkName(name)
}

func checkName(name string) error {
	switch {
	case name == "":
		return errors.New("a name is empty")
	case strings.ContainsRune(name, 0):
		return errors.New("a name holds a zero byte")
	case len(name) > 63:
		cut := name[:63]
		for !utf8.ValidString(cut) && len(cut) > 59 {
			cut = cut[:len(cut)-1]
		}
		return fmt.Errorf("a name has more than 63 bytes, where Postgres cuts it off: write %s", cut)
	}
	return nil
}

// columnName reads a column's name as the configuration has it. Only a name that begins with a
// double quote is a quoted one; dots need no quotes.
func columnName(s string) (string, error) {
	if !strings.HasPrefix(s, `"`) {
		return s, checkName(s)
	}
	name, rest, err := identifier(s)
	if err == nil && rest != "" {
		err = errors.New("there is text behind the closing double quote")
	}
	if err != nil {
		return "", fmt.Errorf("column %s: %w", s, err)
	}
	return name, nil
}

// UnmappableError tells that one row cannot become an event. The next one may well.
type UnmappableError struct {
	Source   string // outbox[0] (public.outbox)
	Position cdc.Position
	Reason   string // for people; quotes a few bytes of the row at most
}

func (e *UnmappableError) Error() string {
	return fmt.Sprintf("map row %v of %s: %s", e.Position, e.Source, e.Reason)
}

// SchemaError tells that no row of a table can become an event while table and configuration
// are as they are.
type SchemaError struct {
	Source  string // outbox[0] (public.outbox)
	Problem string // a line for each
	Help    string // the table's columns, and the configuration to write
}

func (e *SchemaError) Error() string { return e.Source + ": " + e.Problem + "\n" + e.Help }

// Mapper turns rows into events. It is used by one goroutine.
//
// It promises: a row gives the same event whenever it comes, byte for byte. A row that cannot be
// understood comes back as an UnmappableError beside an event that can be buried; only what makes every row
// of a table unreadable is a SchemaError. Nothing in an event aliases the row.
type Mapper struct {
	sources  []*source
	tables   map[[2]string]*source // by schema and name
	oids     map[uint32]*source    // by the OIDs that the catalogue had for them
	prefixes map[string]*source

	plans map[*cdc.Relation]*plan
	last  *plan             // of the row before, most likely of this one
	types map[string]string // the event types seen, at most maxTypes
	row   map[string]any    // what expressions read of the row being mapped
}

// NewMapper compiles the sources. Its error holds every mistake, each with its place: outbox[1].columns.id.expr: ….
func NewMapper(sources []Source) (*Mapper, error) {
	m := &Mapper{
		tables:   make(map[[2]string]*source),
		oids:     make(map[uint32]*source),
		prefixes: make(map[string]*source),
		plans:    make(map[*cdc.Relation]*plan),
		types:    make(map[string]string),
		row:      make(map[string]any),
	}
	var faults []error
	for i, in := range sources {
		at := fmt.Sprintf("outbox[%d]", i)
		s, err := compileSource(i, in)
		if err != nil {
			for _, one := range err.(interface{ Unwrap() []error }).Unwrap() {
				faults = append(faults, fmt.Errorf("%s.%w", at, one))
			}
			continue
		}
		if in.Messages != "" {
			if other := m.prefixes[in.Messages]; other != nil {
				faults = append(faults, fmt.Errorf("%s.messages: %q is the prefix of outbox[%d] already", at, in.Messages, other.index))
				continue
			}
			m.prefixes[in.Messages] = s
		} else {
			table := [2]string{s.schema, s.name}
			if other := m.tables[table]; other != nil {
				faults = append(faults, fmt.Errorf("%s.table: %s is the table of outbox[%d] already", at, s.what(), other.index))
				continue
			}
			m.tables[table] = s
		}
		m.sources = append(m.sources, s)
	}
	if err := errors.Join(faults...); err != nil {
		return nil, err
	}
	return m, nil
}

// CheckIDs finds sources whose rows might get the same webhook-id. What a table's ids are is
// known once it has been resolved; one that has not been is passed over.
func (m *Mapper) CheckIDs() error {
	var faults []error
	var seen []*source
	for _, s := range m.sources {
		if s.Messages == "" && (!s.resolved || (s.idColumn && s.idOID == oidUUID)) {
			continue
		}
		for _, other := range seen {
			if s.mayEqual(other) || other.mayEqual(s) {
				faults = append(faults, fmt.Errorf("outbox[%d].id_prefix: its ids (%s) may be equal to those of outbox[%d] (%s), as not both are uuids: give each source an id_prefix of its own, such as %q",
					s.index, s.idKind(), other.index, other.idKind(), prefixFrom(s.name+s.Messages)))
			}
		}
		seen = append(seen, s)
	}
	return errors.Join(faults...)
}

// mayEqual tells whether the prefixes leave room for equal ids: they are the same, or what
// the longer one has more could be the beginning of an integer.
func (s *source) mayEqual(longer *source) bool {
	more, ok := strings.CutPrefix(longer.IDPrefix, s.IDPrefix)
	if !ok {
		return false
	}
	return more == "" || (s.idColumn && isInteger(s.idOID) && strings.Trim(more, "-0123456789") == "")
}

// prefixFrom makes an id_prefix of a name.
func prefixFrom(name string) string {
	out := []byte(name[:min(len(name), maxPrefixLen-1)])
	for i, c := range out {
		if !plain[c] {
			out[i] = '_'
		}
	}
	return string(out) + "_"
}

func (s *source) idKind() string {
	switch {
	case s.Messages != "":
		return "chosen by the senders of messages"
	case s.idColumn:
		return typeName(s.idOID)
	}
	return "an expression"
}

// plan is how the rows of one relation become events.
type plan struct {
	relation *cdc.Relation
	source   *source      // nil: no source names the table
	err      *SchemaError // why no row can be mapped
	parts    [numParts]origin
	reads    []int // the columns that expressions read
}

// origin is where one part comes from.
type origin struct {
	kind   originKind
	column int
	oid    uint32
	expr   *rule.Column
	value  string
}

type originKind uint8

const (
	nowhere originKind = iota
	fromColumn
	fromExpr
	fromValue
)

// Resolve checks the source of a table, if there is one, against the table as it is now. Its
// error is a *SchemaError. A relation that was not resolved before is when its first row comes.
func (m *Mapper) Resolve(rel *cdc.Relation) error {
	p := m.resolve(rel)
	if p.err != nil {
		return p.err
	}
	if p.source != nil {
		m.oids[rel.OID] = p.source
	}
	return nil
}

// Serial is the column of integers that the ids of a table come from; empty where they come from
// something else.
func (m *Mapper) Serial(rel *cdc.Relation) string {
	p := m.planOf(rel)
	if id := p.parts[partID]; p.source != nil && p.err == nil && id.kind == fromColumn && isInteger(id.oid) {
		return rel.Columns[id.column].Name
	}
	return ""
}

// Describe says in one line where the parts of the events come from, for people to check what
// was guessed. It is empty where there is nothing to say.
func (m *Mapper) Describe(rel *cdc.Relation) string {
	p := m.planOf(rel)
	if p.source == nil || p.err != nil {
		return ""
	}
	var b strings.Builder
	for i, o := range p.parts {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(part(i).String() + ": ")
		switch o.kind {
		case fromColumn:
			b.WriteString(columnText(rel.Columns[o.column].Name) + " (" + typeName(o.oid) + ")")
		case nowhere:
			b.WriteString("none")
		default:
			b.WriteString(p.source.column(part(i)).String())
		}
	}
	return b.String()
}

func (m *Mapper) planOf(rel *cdc.Relation) *plan {
	if p := m.plans[rel]; p != nil {
		return p
	}
	return m.resolve(rel)
}

func (m *Mapper) resolve(rel *cdc.Relation) *plan {
	p := &plan{relation: rel, source: m.tables[[2]string{rel.Schema, rel.Name}]}
	if p.source == nil { // the rows of a table that was renamed still are that table's
		p.source = m.oids[rel.OID]
	}
	if p.source != nil {
		p.fill()
	}
	if len(m.plans) >= maxPlans {
		clear(m.plans)
	}
	m.plans[rel] = p
	m.last = nil
	return p
}

// fill finds the origin of every part, or the whole of what is wrong.
func (p *plan) fill() {
	s, cols := p.source, p.relation.Columns
	var problems []string
	var wrong [numParts]string // a comment for each part that is not as it must be
	problem := func(at part, comment, format string, args ...any) {
		problems = append(problems, fmt.Sprintf("columns."+at.String()+": "+format, args...))
		wrong[at] = comment
	}
	taken := make(map[int]bool) // columns that the configuration gives to a part
	all := false
	reads := make(map[int]bool)
	for at := range numParts {
		c, o := s.column(at), &p.parts[at]
		switch {
		case c.Name != "":
			name, _ := columnName(c.Name)
			i := slices.IndexFunc(cols, func(c cdc.Column) bool { return c.Name == name })
			if i < 0 {
				if near := nearest(name, cols); near != "" {
					problem(at, "was "+columnText(name), "the table has no column %q; the nearest is %q (names are taken as written, case and all)", name, near)
				} else {
					problem(at, "was "+columnText(name), "the table has no column %q", name)
				}
				continue
			}
			taken[i] = true
			*o = origin{kind: fromColumn, column: i, oid: cols[i].TypeOID}
			if !possible(at, o.oid) {
				problem(at, "", "column %q is of type %s, which cannot be an event's %s; that is %s", name, typeName(o.oid), at, wanted[at])
			}
		case c.Expr != "":
			*o = origin{kind: fromExpr, expr: s.exprs[at]}
			r := o.expr.Reads()
			all = all || r.All
			for _, name := range r.Columns {
				i := slices.IndexFunc(cols, func(c cdc.Column) bool { return c.Name == name })
				if i < 0 {
					hint := ""
					if near := nearest(name, cols); near != "" {
						hint = fmt.Sprintf("; the nearest is %q", near)
					}
					problem(at, "reads "+columnText(name), "the expression %s reads the column %q, which the table has not%s", c.Expr, name, hint)
				}
			}
			for i, col := range cols {
				if r.All || slices.Contains(r.Columns, col.Name) || slices.Contains(r.Maybe, col.Name) {
					reads[i] = true
				}
			}
		case c.constant():
			if c.Value != "" {
				*o = origin{kind: fromValue, value: c.Value}
			}
		}
	}
	for at := range numParts {
		if s.column(at) != (Column{}) || at == partTenant {
			continue
		}
		if i := guess(at, cols, taken); i >= 0 {
			p.parts[at] = origin{kind: fromColumn, column: i, oid: cols[i].TypeOID}
		} else if needed(at) {
			problem(at, "not found by name", "not found by name; looked for %s (in any case, with or without underscores): %s%s",
				strings.Join(guesses[at], ", "), wanted[at], unlikely(at, cols))
		}
	}
	for i := range cols {
		if reads[i] || all {
			p.reads = append(p.reads, i)
		}
	}
	if problems != nil {
		p.err = &SchemaError{Source: s.label(), Problem: strings.Join(problems, "\n"), Help: p.help(wrong, taken)}
		return
	}
	s.resolved = true
	s.idOID, s.idColumn = p.parts[partID].oid, p.parts[partID].kind == fromColumn
}

// guesses are the names, whatever their case and underscores, by which a column is known for what it
// is. Where a table has several of them the first in the list wins: the contract's own names, then
// Debezium's, then what other outboxes call it (MassTransit, CAP, Symfony, Spring Modulith, Rails
// Event Store, Eventuate, Axon among them). The tenant is never guessed: a wrong one would show one customer's events to another.
var guesses = [numParts][]string{
	partID:   {"id", "event_id", "message_id", "uuid", "event_uuid", "message_uuid", "event_identifier", "guid", "outbox_id"},
	partType: {"event_type", "type", "message_type", "event_name", "topic", "name"},
	partKey: {
		"aggregate_id", "aggregate_identifier", "aggregate_uuid", "partition_key", "ordering_key", "message_key", "key",
		"entity_id", "stream_id", "routing_key",
	},
	partData:    {"payload", "data", "body", "event_data", "event_payload", "message_body", "content", "message", "event_body", "serialized_event"},
	partHeaders: {"headers", "metadata", "attributes", "meta", "event_headers", "message_headers"},
	partTime: {
		"created_at", "occurred_at", "occurred_on", "event_time", "event_timestamp", "timestamp", "time", "inserted_at",
		"created", "created_on", "creation_time", "publication_date",
	},
}

// wanted says of what type the column of a part is.
var wanted = [numParts]string{
	partID:      "a column of uuid, integer or text",
	partType:    "a column of text",
	partKey:     "a column of text, uuid or integer",
	partData:    "a column of jsonb, json, text or bytea",
	partTenant:  "a column of text, uuid or integer",
	partHeaders: "a column of jsonb, json or text that holds a JSON object",
	partTime:    "a column of timestamptz, timestamp, date, integer (since 1970) or text (RFC 3339)",
}

// needed tells whether there is no event without the part.
func needed(at part) bool { return at == partID || at == partType || at == partData }

// guess finds the column for a part by its name, or -1. A column whose type is not likely is passed over; so is,
// for a part that an event can do without, one that the configuration gives to another part.
func guess(at part, cols []cdc.Column, taken map[int]bool) int {
	for _, name := range guesses[at] {
		found := -1
		for i, c := range cols {
			if fold(c.Name) != fold(name) || (taken[i] && !needed(at)) {
				continue
			}
			if !likely(at, c.TypeOID) && !(at == partHeaders && name == "headers" && isText(c.TypeOID)) {
				continue
			}
			if found < 0 || c.Name == strings.ToLower(c.Name) && cols[found].Name != strings.ToLower(cols[found].Name) {
				found = i // of payload and "Payload", payload
			}
		}
		if found >= 0 {
			return found
		}
	}
	return -1
}

// unlikely names the columns that were passed over for their type.
func unlikely(at part, cols []cdc.Column) string {
	var out string
	for _, c := range cols {
		if slices.ContainsFunc(guesses[at], func(name string) bool { return fold(name) == fold(c.Name) }) {
			out += fmt.Sprintf("; %s is %s, and taken only where the configuration names it", columnText(c.Name), typeName(c.TypeOID))
		}
	}
	return out
}

func fold(name string) string { return strings.ReplaceAll(strings.ToLower(name), "_", "") }

// The types of Postgres that matter here, by the OIDs that pg_type.dat gives them for ever.
const (
	oidBool        = 16
	oidBytea       = 17
	oidChar        = 18
	oidName        = 19
	oidInt8        = 20
	oidInt2        = 21
	oidInt4        = 23
	oidText        = 25
	oidJSON        = 114
	oidFloat4      = 700
	oidFloat8      = 701
	oidBpchar      = 1042
	oidVarchar     = 1043
	oidDate        = 1082
	oidTimestamp   = 1114
	oidTimestamptz = 1184
	oidNumeric     = 1700
	oidUUID        = 2950
	oidJSONB       = 3802

	firstUserOID = 16384 // enums, domains, citext, hstore: what is below one is not known
)

func isInteger(oid uint32) bool { return oid == oidInt8 || oid == oidInt4 || oid == oidInt2 }
func isText(oid uint32) bool    { return oid == oidText || oid == oidVarchar || oid == oidBpchar }
func isNumber(oid uint32) bool {
	return isInteger(oid) || oid == oidNumeric || oid == oidFloat4 || oid == oidFloat8
}
func isJSON(oid uint32) bool { return oid == oidJSON || oid == oidJSONB }

// possible tells whether a column that the configuration names can be what it says. A type
// of the user's own always can.
func possible(at part, oid uint32) bool {
	if oid >= firstUserOID {
		return true
	}
	switch at {
	case partID:
		return oid != oidBool && !isJSON(oid)
	case partHeaders:
		return isJSON(oid) || isText(oid)
	case partTime:
		return isText(oid) || isNumber(oid) || oid == oidTimestamptz || oid == oidTimestamp || oid == oidDate
	}
	return true
}

// likely is possible for a column that is only guessed, and stricter: a wrong guess must not
// make every row fail, or give it a time that means something else.
func likely(at part, oid uint32) bool {
	own := oid >= firstUserOID
	switch at {
	case partID:
		return own || isText(oid) || isInteger(oid) || oid == oidUUID || oid == oidNumeric
	case partType:
		return own || isText(oid) || oid == oidName
	case partKey, partTenant:
		return own || isText(oid) || isInteger(oid) || oid == oidUUID || oid == oidNumeric
	case partData:
		return own || isText(oid) || isJSON(oid) || oid == oidBytea
	case partHeaders:
		return isJSON(oid)
	case partTime:
		return oid == oidTimestamptz || oid == oidTimestamp || oid == oidDate || oid == oidInt8
	}
	return false
}

// typeNames are the common types as SQL calls them.
var typeNames = map[uint32]string{
	oidBool: "boolean", oidBytea: "bytea", oidChar: `"char"`, oidName: "name", oidInt8: "bigint", oidInt2: "smallint", oidInt4: "integer",
	oidText: "text", oidJSON: "json", oidFloat4: "real", oidFloat8: "double precision", oidBpchar: "character", oidVarchar: "character varying",
	oidDate: "date", oidTimestamp: "timestamp", oidTimestamptz: "timestamptz", oidNumeric: "numeric", oidUUID: "uuid", oidJSONB: "jsonb",
	26: "oid", 142: "xml", 790: "money", 869: "inet", 1083: "time", 1186: "interval", 1266: "timetz", 3614: "tsvector", 5069: "xid8",
	1000: "boolean[]", 1007: "integer[]", 1009: "text[]", 1015: "character varying[]", 1016: "bigint[]", 2951: "uuid[]", 3807: "jsonb[]", 199: "json[]",
}

func typeName(oid uint32) string {
	if name := typeNames[oid]; name != "" {
		return name
	}
	if oid >= firstUserOID {
		return "user type " + strconv.FormatUint(uint64(oid), 10) // the number of it in pg_type
	}
	return "type " + strconv.FormatUint(uint64(oid), 10)
}

// help writes the table's columns and the configuration that would do, with what is not known
// filled in as well as can be guessed.
func (p *plan) help(wrong [numParts]string, taken map[int]bool) string {
	s, cols := p.source, p.relation.Columns
	var b strings.Builder
	b.WriteString("The table's columns: ")
	for i, c := range cols {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(columnText(c.Name) + " " + typeName(c.TypeOID))
	}
	if len(cols) == 0 {
		b.WriteString("none")
	}
	for _, o := range p.parts {
		if o.kind == fromColumn {
			taken[o.column] = true
		}
	}
	fmt.Fprintf(&b, "\nWrite in the configuration where each part of an event comes from:\n\noutbox:\n  - table: %s\n    columns:\n", yamlText(tableText(s.schema, s.name)))
	addID := false
	for at := range numParts {
		o, c := p.parts[at], s.column(at)
		switch {
		case wrong[at] != "" && c.Expr != "":
			fmt.Fprintf(&b, "      %v: %v   # <-- %s\n", at, c, wrong[at])
		case wrong[at] != "" || (o.kind == fromColumn && !possible(at, o.oid)):
			comment := wrong[at]
			if comment == "" {
				comment = "was " + columnText(cols[o.column].Name)
			}
			value, sure := p.suggest(at, taken)
			switch {
			case value == "" && at == partID:
				value, addID = "id", true
			case value == "":
				continue // not needed, and nothing to offer
			case !sure:
				comment += ": check this guess"
			}
			if at != partID {
				comment += "; or {value: …}"
			}
			fmt.Fprintf(&b, "      %v: %s   # <-- %s; or {expr: …}\n", at, value, comment)
		case o.kind == fromColumn:
			fmt.Fprintf(&b, "      %v: %s\n", at, yamlText(columnText(cols[o.column].Name)))
		case c != (Column{}):
			fmt.Fprintf(&b, "      %v: %v\n", at, c)
		}
	}
	if s.IDPrefix != "" {
		fmt.Fprintf(&b, "    id_prefix: %s\n", yamlText(s.IDPrefix))
	}
	if addID {
		fmt.Fprintf(&b, "\nAn event needs an id. To give the table one:\n\nalter table %s add column id uuid not null default gen_random_uuid();\n", sqlTable(s.schema, s.name))
	}
	return b.String()
}

// suggest offers something for a part that could not be resolved; sure where it is the column
// that the user most likely meant.
func (p *plan) suggest(at part, taken map[int]bool) (value string, sure bool) {
	cols := p.relation.Columns
	if name, _ := columnName(p.source.column(at).Name); name != "" {
		if near := nearest(name, cols); near != "" {
			for _, c := range cols {
				if c.Name == near && likely(at, c.TypeOID) {
					return yamlText(columnText(near)), true
				}
			}
		}
	}
	best, rank := -1, 0
	for i, c := range cols {
		if taken[i] || !likely(at, c.TypeOID) {
			continue
		}
		if r := taste(at, c.TypeOID); r > rank {
			best, rank = i, r
		}
	}
	if best >= 0 {
		taken[best] = true
		return yamlText(columnText(cols[best].Name)), false
	}
	switch at {
	case partType:
		return `{value: "order.created"}`, false
	case partData:
		return `{expr: "row"}`, false // the whole row as a JSON object
	}
	return "", false
}

// taste ranks types by how well they suit a part of which nothing else is known.
func taste(at part, oid uint32) int {
	order := map[part][]uint32{
		partID:   {oidUUID, oidInt8, oidInt4, oidText, oidVarchar},
		partType: {oidText, oidVarchar},
		partData: {oidJSONB, oidJSON, oidBytea, oidText, oidVarchar},
		partTime: {oidTimestamptz, oidTimestamp},
	}[at]
	if i := slices.Index(order, oid); i >= 0 {
		return len(order) - i + 1
	}
	if at == partType && oid >= firstUserOID {
		return 1 // an enum, perhaps
	}
	return 0
}

// nearest is the column whose name is most like the one given, or "" where none is.
func nearest(name string, cols []cdc.Column) string {
	best, least := "", max(2, len(name)/3)+1
	for _, c := range cols {
		if d := distance(fold(name), fold(c.Name)); d < least {
			best, least = c.Name, d
		}
	}
	return best
}

// distance counts the letters to insert, remove or replace to make a out of b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j]+1, row[j+1]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}

// tableText is a table's name as the configuration has it, quoted where it must be.
func tableText(schema, name string) string { return tablePart(schema) + "." + tablePart(name) }

func tablePart(s string) string {
	for _, r := range s {
		if r != '_' && !unicode.IsLetter(r) && !unicode.IsDigit(r) {
			return sqlQuote(s)
		}
	}
	return s
}

// columnText is a column's name as the configuration has it.
func columnText(s string) string {
	if strings.HasPrefix(s, `"`) {
		return sqlQuote(s)
	}
	return s
}

func sqlTable(schema, name string) string { return sqlQuote(schema) + "." + sqlQuote(name) }
func sqlQuote(s string) string            { return `"` + strings.ReplaceAll(s, `"`, `""`) + `"` }

// yamlText writes a string so that YAML reads it back as one.
func yamlText(s string) string {
	for _, r := range s {
		if r != '_' && r != '.' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') {
			return yamlQuote(s)
		}
	}
	if s == "" || s[0] <= '9' || slices.Contains([]string{"null", "true", "false", "yes", "no", "on", "off", "y", "n"}, strings.ToLower(s)) {
		return yamlQuote(s)
	}
	return s
}

func yamlQuote(s string) string { return jsonText(s) } // JSON's strings are YAML's

func jsonText(s string) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(s); err != nil {
		return `""`
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// draft is an event on its way: its strings still alias the row.
type draft struct {
	id, typ, key, tenant, headers string

	data []byte
	json bool // data is JSON without a look
	hex  bool // data are hexadecimal digits
	time time.Time

	bad   bool
	fault [numParts + 1]string // the first of each part
}

// wholeRow stands for a fault of all parts at once.
const wholeRow = numParts

func (d *draft) reject(at part, format string, args ...any) {
	d.bad = true
	if d.fault[at] == "" {
		d.fault[at] = fmt.Sprintf(format, args...)
	}
}

func (d *draft) reason() string {
	if whole := d.fault[wholeRow]; whole != "" {
		return whole
	}
	return strings.Join(slices.DeleteFunc(d.fault[:], func(f string) bool { return f == "" }), "; ")
}

// Map makes the event of a row. A row that no source names has neither event nor error.
//
// With a *UnmappableError comes an event to bury: what could be read of it, the whole row as
// JSON in Data, and an id made of the position where the row's own is of no use. A *SchemaError
// comes alone.
func (m *Mapper) Map(r *cdc.Row) (*Event, error) {
	if r.Relation == nil {
		s := m.prefixes[r.Prefix]
		if s == nil {
			return nil, nil
		}
		var d draft
		d.readMessage(r.Content)
		return m.finish(r, s, &d)
	}
	p := m.last
	if p == nil || p.relation != r.Relation {
		p = m.planOf(r.Relation)
		m.last = p
	}
	switch {
	case p.source == nil:
		return nil, nil
	case p.err != nil:
		return nil, p.err
	}
	var d draft
	if len(r.Values) == len(r.Relation.Columns) {
		m.readRow(r, p, &d)
	} else {
		d.reject(wholeRow, "the row has %d values, the table %d columns", len(r.Values), len(r.Relation.Columns))
	}
	return m.finish(r, p.source, &d)
}

func (m *Mapper) readRow(r *cdc.Row, p *plan, d *draft) {
	var unread error // why expressions cannot look at the row
	if p.reads != nil {
		defer clear(m.row) // it aliases the row
		for _, i := range p.reads {
			c := &r.Relation.Columns[i]
			v, err := ruleValue(r.Values[i], c.TypeOID)
			if err != nil {
				unread = fmt.Errorf("column %s: %w", c.Name, err)
			}
			m.row[c.Name] = v
		}
	}
	for at := range numParts {
		o := &p.parts[at]
		var text string
		null := false
		switch o.kind {
		case nowhere:
			null = true
		case fromColumn:
			v := r.Values[o.column]
			text, null = view(v), v == nil
			if o.oid == oidBpchar {
				text = strings.TrimRight(text, " ") // padding, which SQL does not count either
			}
		case fromValue:
			text = o.value
		case fromExpr:
			err := unread
			if err == nil {
				text, null, err = o.expr.Text(m.row)
			}
			if err != nil {
				d.reject(at, "%v: the expression failed: %v%s", at, err, m.nulls(o.expr))
				continue
			}
		}
		d.read(at, text, null, o)
	}
}

// nulls names the columns that are NULL of those an expression reads: the usual reason for it
// to fail.
func (m *Mapper) nulls(e *rule.Column) string {
	var names []string
	for _, name := range e.Reads().Columns {
		if v, ok := m.row[name]; ok && v == nil {
			names = append(names, "row."+name)
		}
	}
	if names == nil {
		return ""
	}
	return " (NULL: " + strings.Join(names, ", ") + ")"
}

// read takes one part of a table's row.
func (d *draft) read(at part, text string, null bool, o *origin) {
	var err error
	switch at {
	case partID:
		if d.id = text; null {
			d.reject(partID, "id is NULL")
		}
	case partType:
		if d.typ = text; null {
			d.reject(partType, "type is NULL")
		}
	case partKey:
		d.key = text
	case partTenant:
		d.tenant = text
	case partHeaders:
		if !null {
			if d.headers, err = headersText(text, isJSON(o.oid)); err != nil {
				d.reject(partHeaders, "headers: %v", err)
			}
		}
	case partTime:
		if !null {
			if d.time, err = parseTime(text, o.oid); err != nil {
				d.reject(partTime, "time: %v", err)
			}
		}
	case partData:
		switch {
		case null:
			d.data, d.json = jsonNull, true
		case isJSON(o.oid):
			d.data, d.json = bytesOf(text), true
		case o.oid == oidBytea:
			digits, ok := strings.CutPrefix(text, `\x`)
			if d.data, d.hex = bytesOf(digits), ok; !ok {
				d.reject(partData, `data: a bytea that does not begin with \x: is bytea_output hex on this connection?`)
			}
		case o.oid == oidBool:
			d.data, d.json = bytesOf(strconv.FormatBool(text == "t")), true
		default:
			d.data = bytesOf(text)
		}
	}
}

var jsonNull = []byte("null")

// finish checks a draft and copies it into an event: one allocation for the event, one for all
// its bytes.
func (m *Mapper) finish(r *cdc.Row, s *source, d *draft) (*Event, error) {
	idLen := len(s.IDPrefix) + encodedLen(d.id)
	if d.id == "" {
		d.reject(partID, "id is empty")
	}
	if idLen > maxIDLen {
		d.reject(partID, "id is too long: %d bytes of at most %d", idLen, maxIDLen)
	}
	typ, known := m.types[d.typ]
	if !known {
		if d.typ == "" {
			d.reject(partType, "type is empty")
		}
		if err := checkText(d.typ, maxTypeLen); err != nil {
			d.reject(partType, "type %v", err)
		}
		if !d.bad && len(m.types) < maxTypes {
			typ = strings.Clone(d.typ)
			m.types[typ] = typ
			known = true
		}
	}
	if err := checkText(d.key, maxKeyLen); err != nil {
		d.reject(partKey, "key %v", err)
	}
	if err := checkText(d.tenant, maxTenantLen); err != nil {
		d.reject(partTenant, "tenant %v", err)
	}
	if d.bad {
		return m.bury(r, s, d)
	}

	dataLen := len(d.data)
	if d.hex {
		dataLen = hex.DecodedLen(dataLen)
	}
	small := idLen + len(d.key) + len(d.tenant) + len(d.headers)
	if !known {
		small += len(d.typ)
	}
	if dataLen < ownData {
		small += dataLen
	}
	buf := make([]byte, 0, small)
	keep := func(s string) string {
		if s == "" {
			return ""
		}
		buf = append(buf, s...)
		return view(buf[len(buf)-len(s):])
	}
	e := &Event{Position: r.Position, Commit: r.CommitTime, Time: d.time}
	if e.Time.IsZero() {
		e.Time = r.CommitTime.UTC()
	}
	buf = append(buf, s.IDPrefix...)
	buf = appendEncoded(buf, d.id)
	e.ID = view(buf)
	if e.Type = typ; !known {
		e.Type = keep(d.typ)
	}
	e.Key = keep(d.key)
	e.Tenant = keep(d.tenant)
	if d.headers != "" {
		from := len(buf)
		buf = append(buf, d.headers...)
		e.Headers = buf[from:len(buf):len(buf)]
	}
	to := buf
	if dataLen >= ownData {
		to = make([]byte, 0, dataLen)
	}
	from := len(to)
	if d.hex {
		var err error
		if to, err = hex.AppendDecode(to, d.data); err != nil {
			d.reject(partData, "data: a bytea that is not hexadecimal: %v", err)
			return m.bury(r, s, d)
		}
	} else {
		to = append(to, d.data...)
	}
	e.Data = to[from:len(to):len(to)]
	e.JSON = d.json || json.Valid(e.Data)
	return e, nil
}

// bury makes the event of a row that cannot have one, for people to look at.
func (m *Mapper) bury(r *cdc.Row, s *source, d *draft) (*Event, error) {
	e := &Event{
		ID:       s.IDPrefix + encode(d.id),
		Type:     legible(d.typ, maxTypeLen),
		Key:      legible(d.key, maxKeyLen),
		Tenant:   legible(d.tenant, maxTenantLen),
		Time:     d.time,
		Data:     rowJSON(r),
		JSON:     true,
		Position: r.Position,
		Commit:   r.CommitTime,
	}
	if d.id == "" || len(e.ID) > maxIDLen {
		e.ID = fmt.Sprintf("unmappable_%s_%d", strings.ReplaceAll(r.Commit.String(), "/", "-"), r.Ordinal)
	}
	if d.headers != "" {
		e.Headers = []byte(d.headers)
	}
	if e.Time.IsZero() {
		e.Time = r.CommitTime.UTC()
	}
	return e, &UnmappableError{Source: s.label(), Position: r.Position, Reason: d.reason()}
}

// rowJSON is a row for people to read: its columns, or the message, as JSON.
func rowJSON(r *cdc.Row) []byte {
	if r.Relation == nil {
		if utf8.Valid(r.Content) && json.Valid(r.Content) {
			return bytes.Clone(r.Content)
		}
		return []byte(jsonText(string(r.Content)))
	}
	out := []byte{'{'}
	for i, v := range r.Values {
		name, oid := "column "+strconv.Itoa(i+1), uint32(0)
		if i < len(r.Relation.Columns) {
			name, oid = r.Relation.Columns[i].Name, r.Relation.Columns[i].TypeOID
		}
		if i > 0 {
			out = append(out, ',')
		}
		out = append(append(out, jsonText(name)...), ':')
		switch {
		case v == nil:
			out = append(out, "null"...)
		case oid == oidBool:
			out = strconv.AppendBool(out, string(v) == "t")
		case (isJSON(oid) || isNumber(oid)) && utf8.Valid(v) && json.Valid(v):
			out = append(out, v...)
		default:
			out = append(out, jsonText(string(v))...)
		}
	}
	return append(out, '}')
}

// checkText refuses what Postgres could not store as text, or not in an index.
func checkText(s string, maxLen int) error {
	switch {
	case len(s) > maxLen:
		return fmt.Errorf("is too long: %d bytes of at most %d", len(s), maxLen)
	case strings.IndexByte(s, 0) >= 0:
		return errors.New("holds a zero byte")
	case !utf8.ValidString(s):
		return errors.New("is not UTF-8")
	}
	return nil
}

// legible makes text that checkText takes out of any.
func legible(s string, maxLen int) string {
	s = strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
	if len(s) > maxLen {
		s = strings.ToValidUTF8(s[:maxLen], "")
	}
	return strings.Clone(s)
}

// headersText takes a JSON object as it is, and what says that there are no headers as none: null, nothing, and
// [], which is how PHP writes an empty map. sound tells that it is JSON for sure.
func headersText(text string, sound bool) (string, error) {
	text = strings.Trim(text, " \t\r\n")
	switch {
	case text == "" || text == "null" || text == "[]":
		return "", nil
	case text[0] != '{':
		return "", fmt.Errorf("%s is not a JSON object", clip(text))
	case !sound && !json.Valid(bytesOf(text)):
		return "", fmt.Errorf("%s is not valid JSON", clip(text))
	}
	return text, nil
}

// clip quotes the beginning of a text in an error.
func clip(s string) string {
	if len(s) > 40 {
		s = s[:40] + "…"
	}
	return strconv.Quote(s)
}

// view is b as a string without a copy: true for as long as nobody writes to b.
func view(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// bytesOf is s as bytes without a copy, to be read only.
func bytesOf(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) }

// plain are the bytes that stand in a webhook-id as they are. The dot is not among them, as it
// parts the id from the timestamp in what is signed.
var plain = func() (t [256]bool) {
	for _, c := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_:-") {
		t[c] = true
	}
	return t
}()

func encodedLen(s string) int {
	n := len(s)
	for i := range len(s) {
		if !plain[s[i]] {
			n += 2
		}
	}
	return n
}

func appendEncoded(dst []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; plain[c] {
			dst = append(dst, c)
		} else {
			dst = append(dst, '%', "0123456789ABCDEF"[c>>4], "0123456789ABCDEF"[c&15])
		}
	}
	return dst
}

func encode(s string) string { return string(appendEncoded(nil, s)) }

// ruleValue is a column's value as expressions see it: integers, doubles, bools and NULL as such, json and jsonb
// parsed, bytea as bytes, timestamps as times, the rest as text. A numeric is an integer or a
// double where nothing is lost by it, else text: two ids must not become one by rounding.
func ruleValue(v []byte, oid uint32) (any, error) {
	if v == nil {
		return nil, nil
	}
	text := view(v)
	switch oid {
	case oidBool:
		return text == "t", nil
	case oidInt2, oidInt4, oidInt8:
		return strconv.ParseInt(text, 10, 64)
	case oidFloat4, oidFloat8:
		return strconv.ParseFloat(text, 64)
	case oidNumeric:
		if i, err := strconv.ParseInt(text, 10, 64); err == nil {
			return i, nil
		}
		if f, err := strconv.ParseFloat(text, 64); err == nil && f-f == 0 && len(strings.Trim(text, "-.0")) <= 16 { // 15 digits and a point
			return rule.ParseNumber(text), nil // 1.10 is computed with as 1.1, and handed on as 1.10
		}
	case oidJSON, oidJSONB:
		return rule.ParseJSON(v)
	case oidBytea:
		if digits, ok := strings.CutPrefix(text, `\x`); ok {
			return hex.DecodeString(digits)
		}
	case oidTimestamptz, oidTimestamp:
		if t, err := parseTimestamp(text); err == nil {
			return t, nil
		}
	}
	return text, nil
}

// parseTime reads an event's time from a column of that type; zero or a user's own type takes
// all forms. It is in UTC and cut to microseconds: the store keeps no more, and a parked event must have
// the same body as one that is sent at once.
func parseTime(text string, oid uint32) (time.Time, error) {
	var t time.Time
	var err error
	switch {
	case isNumber(oid):
		t, err = parseEpoch(text)
	case oid != 0 && oid < firstUserOID:
		t, err = parseTimestamp(text)
	default:
		if t, err = parseTimestamp(text); errors.Is(err, errTimeForm) {
			if n, bad := parseEpoch(text); bad == nil {
				t, err = n, nil
			}
		}
	}
	if err != nil {
		return time.Time{}, fmt.Errorf("%s: %w", clip(text), err)
	}
	return t, nil
}

var (
	errTimeForm  = errors.New("is not a time: want RFC 3339 or Postgres' ISO form")
	errTimeRange = errors.New("is not within the years 1 to 9999")
	errEpochForm = errors.New("is not a number of seconds, milli-, micro- or nanoseconds since 1970")
)

// parseTimestamp reads 2026-02-03 04:05:06.789+00 as Postgres prints it with DateStyle ISO, a
// date alone, and RFC 3339. Without a zone it is UTC.
func parseTimestamp(s string) (time.Time, error) {
	if s == "infinity" || s == "-infinity" || strings.HasSuffix(s, " BC") {
		return time.Time{}, errTimeRange
	}
	year, n := digits(s)
	if n < 4 || n > 6 || (n > 4 && s[0] == '0') {
		return time.Time{}, errTimeForm
	}
	month, ok1 := after(s, n, '-')
	day, ok2 := after(s, n+3, '-')
	if !ok1 || !ok2 || month < 1 || month > 12 || day < 1 || day > daysIn(year, month) {
		return time.Time{}, errTimeForm
	}
	var hour, minute, second, micro, offset int
	if s = s[n+6:]; s != "" {
		sep := s[0]
		var ok0 bool
		hour, ok0 = after(s, 0, sep)
		minute, ok1 = after(s, 3, ':')
		second, ok2 = after(s, 6, ':')
		if (sep != ' ' && sep != 'T' && sep != 't') || !ok0 || !ok1 || !ok2 || hour > 23 || minute > 59 || second > 59 {
			return time.Time{}, errTimeForm
		}
		s = s[9:]
		if strings.HasPrefix(s, ".") {
			_, n := digits(s[1:])
			if n == 0 {
				return time.Time{}, errTimeForm
			}
			for i := 1; i <= 6; i++ {
				micro *= 10
				if i <= n {
					micro += int(s[i] - '0')
				}
			}
			s = s[n+1:]
		}
		var ok bool
		if offset, ok = zone(s); !ok {
			return time.Time{}, errTimeForm
		}
	}
	if year < 1 || year > 9999 {
		return time.Time{}, errTimeRange
	}
	t := time.Date(year, time.Month(month), day, hour, minute, second, micro*1000, time.UTC)
	if offset != 0 {
		if t = t.Add(-time.Duration(offset) * time.Second); t.Year() < 1 || t.Year() > 9999 {
			return time.Time{}, errTimeRange
		}
	}
	return t, nil
}

// zone reads what stands behind the time: nothing, Z, +05, +05:30, +05:30:15 or +0530, in seconds east.
func zone(s string) (seconds int, ok bool) {
	if s == "" || s == "Z" || s == "z" || s == "+00" {
		return 0, true
	}
	if s[0] != '+' && s[0] != '-' {
		return 0, false
	}
	hour, ok := after(s, 0, s[0])
	if !ok || hour > 15 { // Postgres' own limit; the world's is 14
		return 0, false
	}
	seconds = hour * 3600
	rest := s[3:]
	if len(rest) == 2 { // +0530
		minute, n := digits(rest)
		if n != 2 || minute > 59 {
			return 0, false
		}
		seconds += minute * 60
		rest = ""
	}
	for unit := 60; rest != ""; unit /= 60 {
		v, ok := after(rest, 0, ':')
		if !ok || v > 59 || unit == 0 {
			return 0, false
		}
		seconds += v * unit
		rest = rest[3:]
	}
	if s[0] == '-' {
		seconds = -seconds
	}
	return seconds, true
}

// digits reads the digits that s begins with, at most 9 of them, and counts all.
func digits(s string) (value, n int) {
	for n < len(s) && s[n] >= '0' && s[n] <= '9' {
		if n < 9 {
			value = value*10 + int(s[n]-'0')
		}
		n++
	}
	return value, n
}

// after reads the two digits behind the separator that must be at s[i].
func after(s string, i int, sep byte) (int, bool) {
	if len(s) < i+3 || s[i] != sep || s[i+1] < '0' || s[i+1] > '9' || s[i+2] < '0' || s[i+2] > '9' {
		return 0, false
	}
	return int(s[i+1]-'0')*10 + int(s[i+2]-'0'), true
}

func daysIn(year, month int) int {
	switch month {
	case 4, 6, 9, 11:
		return 30
	case 2:
		if year%4 == 0 && (year%100 != 0 || year%400 == 0) {
			return 29
		}
		return 28
	}
	return 31
}

// parseEpoch reads a time as a number since 1970. Its size tells the unit: as seconds, today's milliseconds would be
// in the year 57,000.
func parseEpoch(s string) (time.Time, error) {
	number, negative := strings.CutPrefix(s, "-")
	whole, fraction, _ := strings.Cut(number, ".")
	n, err := strconv.ParseInt(whole, 10, 64)
	if err != nil || whole[0] == '+' {
		return time.Time{}, errEpochForm
	}
	for i := range len(fraction) {
		if fraction[i] < '0' || fraction[i] > '9' {
			return time.Time{}, errEpochForm
		}
	}
	if len(fraction) > 9 {
		fraction = fraction[:9]
	}
	micros := n
	places := 0 // of the fraction that are microseconds
	switch {
	case n < 1e11:
		micros, places = n*1e6, 6
	case n < 1e14:
		micros, places = n*1e3, 3
	case n < 1e17:
	default:
		micros = n / 1e3
	}
	for unit, i := int64(1), places-1; i >= 0; unit, i = unit*10, i-1 {
		if i < len(fraction) {
			micros += unit * int64(fraction[i]-'0')
		}
	}
	if negative {
		micros = -micros
	}
	return time.UnixMicro(micros).UTC(), nil
}

// readMessage takes the parts out of a logical message, a JSON object: id (string or number), type, key, tenant,
// time (RFC 3339, or a number since 1970), headers, data. Others are ignored; of two with one
// name the last counts.
func (d *draft) readMessage(content []byte) {
	if !utf8.Valid(content) || !json.Valid(content) {
		d.reject(wholeRow, "the message is not valid JSON")
		return
	}
	content = bytes.Trim(content, " \t\r\n")
	if content[0] != '{' {
		d.reject(wholeRow, "the message is not a JSON object but %s", clip(view(content)))
		return
	}
	d.data, d.json = jsonNull, true
	var headers, at []byte
	members(content, func(name string, value []byte) {
		switch name {
		case "id":
			d.id = d.scalar(partID, value, true)
		case "type":
			d.typ = d.scalar(partType, value, false)
		case "key":
			d.key = d.scalar(partKey, value, true)
		case "tenant":
			d.tenant = d.scalar(partTenant, value, true)
		case "time":
			at = value
		case "headers":
			headers = value
		case "data":
			d.data = value
		}
	})
	if d.id == "" {
		d.reject(partID, "id is missing or empty")
	}
	if d.typ == "" {
		d.reject(partType, "type is missing or empty")
	}
	var err error
	if headers != nil {
		if d.headers, err = headersText(view(headers), true); err != nil {
			d.reject(partHeaders, "headers: %v", err)
		}
	}
	if text := d.scalar(partTime, at, true); text != "" {
		oid := uint32(oidText)
		if at[0] != '"' {
			oid = oidNumeric
		}
		if d.time, err = parseTime(text, oid); err != nil {
			d.reject(partTime, "time: %v", err)
		}
	}
}

// scalar reads a string, or a number as it is written. null is nothing.
func (d *draft) scalar(at part, value []byte, number bool) string {
	switch {
	case len(value) == 0 || value[0] == 'n':
		return ""
	case value[0] == '"':
		return unquote(value)
	case number && (value[0] == '-' || (value[0] >= '0' && value[0] <= '9')):
		return view(value)
	}
	kind := "a string"
	if number {
		kind = "a string or a number"
	}
	d.reject(at, "%v is not %s but %s", at, kind, clip(view(value)))
	return ""
}

// unquote reads a JSON string that is known to be valid; without escapes it is not copied.
func unquote(value []byte) string {
	if bytes.IndexByte(value, '\\') < 0 {
		return view(value[1 : len(value)-1])
	}
	var s string
	if err := json.Unmarshal(value, &s); err != nil {
		return ""
	}
	return s
}

// members goes through an object, valid JSON without space around it, and gives each member's value as the bytes
// it is written in.
func members(object []byte, each func(name string, value []byte)) {
	i := space(object, 1)
	for object[i] != '}' {
		end := skip(object, i)
		name := unquote(object[i:end])
		i = space(object, space(object, end)+1) // the colon
		end = skip(object, i)
		each(name, object[i:end])
		if i = space(object, end); object[i] == ',' {
			i = space(object, i+1)
		}
	}
}

func space(b []byte, i int) int {
	for b[i] == ' ' || b[i] == '\t' || b[i] == '\n' || b[i] == '\r' {
		i++
	}
	return i
}

// skip finds the end of the value that begins at i.
func skip(b []byte, i int) int {
	depth := 0
	for ; ; i++ {
		switch b[i] {
		case '"':
			for i++; b[i] != '"'; i++ {
				if b[i] == '\\' {
					i++
				}
			}
		case '{', '[':
			depth++
			continue
		case '}', ']':
			depth--
		default:
			if depth == 0 { // a number, true, false or null
				for strings.IndexByte(" \t\r\n,}]", b[i]) < 0 {
					i++
				}
				return i
			}
			continue
		}
		if depth == 0 {
			return i + 1
		}
	}
}
