package outbox

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/cdc/pgtest"
	"github.com/walhook/walhook/outbox/rule"
)

var committed = time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC)

// relation makes a table of "name type" columns.
func relation(table string, columns ...string) *cdc.Relation {
	schema, name, err := ParseTable(table)
	if err != nil {
		panic(err)
	}
	rel := &cdc.Relation{OID: 16385, Schema: schema, Name: name}
	for _, c := range columns {
		name, typ, _ := strings.Cut(c, " ")
		rel.Columns = append(rel.Columns, cdc.Column{Name: name, TypeOID: oidOf(typ)})
	}
	return rel
}

func oidOf(typ string) uint32 {
	switch typ {
	case "varchar":
		return oidVarchar
	case "enum":
		return 16400
	case "hstore":
		return 16500
	}
	for oid, name := range typeNames {
		if name == typ {
			return oid
		}
	}
	panic(typ)
}

const null = "\x00null"

func rowOf(rel *cdc.Relation, values ...string) *cdc.Row {
	r := &cdc.Row{Position: cdc.Position{Commit: 0x16B374D848, Ordinal: 3}, CommitTime: committed, Relation: rel}
	for _, v := range values {
		if v == null {
			r.Values = append(r.Values, nil)
		} else {
			r.Values = append(r.Values, append(make([]byte, 0, len(v)+1), v...)) // never nil
		}
	}
	return r
}

func message(prefix, content string) *cdc.Row {
	return &cdc.Row{Position: cdc.Position{Commit: 0x16B374D848, Ordinal: 3}, CommitTime: committed, Prefix: prefix, Content: []byte(content)}
}

func mapper(t testing.TB, sources ...Source) *Mapper {
	t.Helper()
	m, err := NewMapper(sources)
	require.NoError(t, err)
	return m
}

// mapOne maps one row of one table.
func mapOne(t testing.TB, s Source, rel *cdc.Relation, values ...string) *Event {
	t.Helper()
	e, err := mapper(t, s).Map(rowOf(rel, values...))
	require.NoError(t, err)
	require.NotNil(t, e)
	return e
}

func buried(t testing.TB, m *Mapper, r *cdc.Row) (*Event, string) {
	t.Helper()
	e, err := m.Map(r)
	var bad *UnmappableError
	require.ErrorAs(t, err, &bad)
	require.NotNil(t, e)
	require.NotEmpty(t, e.ID)
	require.True(t, json.Valid(e.Data))
	require.True(t, e.JSON)
	require.Equal(t, r.Position, e.Position)
	require.False(t, e.Time.IsZero())
	return e, bad.Reason
}

func TestOwnShapeNeedsNoColumns(t *testing.T) {
	rel := relation("outbox", "id uuid", "event_type text", "aggregate_id text", "payload jsonb", "headers jsonb", "created_at timestamptz", "tenant_id text")
	e := mapOne(t, Source{Table: "public.outbox"}, rel,
		"0b7c1c3e-0000-4000-8000-000000000001", "order.created", "42", `{"a": 1}`, `{"traceparent": "00-x"}`, "2026-02-03 04:05:06.789+00", "acme")
	require.Equal(t, &Event{
		ID: "0b7c1c3e-0000-4000-8000-000000000001", Type: "order.created", Key: "42",
		Time:    time.Date(2026, 2, 3, 4, 5, 6, 789e6, time.UTC),
		Headers: []byte(`{"traceparent": "00-x"}`), Data: []byte(`{"a": 1}`), JSON: true,
		Position: cdc.Position{Commit: 0x16B374D848, Ordinal: 3}, Commit: committed,
	}, e, "and no tenant, which is never guessed")
	require.Equal(t, "acme", mapOne(t, Source{Table: "outbox", Tenant: Column{Name: "tenant_id"}}, rel,
		"0b7c1c3e-0000-4000-8000-000000000001", "order.created", "42", `{}`, null, null, "acme").Tenant)
}

func TestDetection(t *testing.T) {
	for _, c := range []struct {
		name    string
		columns []string
		want    string
	}{
		{
			"debezium",
			[]string{"id uuid", "aggregatetype varchar", "aggregateid varchar", "type varchar", "payload jsonb"},
			"id: id (uuid), type: type (character varying), key: aggregateid (character varying), data: payload (jsonb), tenant: none, headers: none, time: none",
		},
		{
			"case and underscores",
			[]string{"Id bigint", "EventType text", "AggregateId bigint", "Payload json", "OccurredAt timestamp"},
			"id: Id (bigint), type: EventType (text), key: AggregateId (bigint), data: Payload (json), tenant: none, headers: none, time: OccurredAt (timestamp)",
		},
		{
			"MassTransit",
			[]string{"SequenceNumber bigint", "MessageId uuid", "MessageType text", "Body text", "Headers text", "SentTime timestamptz"},
			"id: MessageId (uuid), type: MessageType (text), key: none, data: Body (text), tenant: none, headers: Headers (text), time: none",
		},
		{
			"CAP",
			[]string{"Id bigint", "Version varchar", "Name varchar", "Content text", "Added timestamp"},
			"id: Id (bigint), type: Name (character varying), key: none, data: Content (text), tenant: none, headers: none, time: none",
		},
		{
			"the contract's names come first",
			[]string{"uuid uuid", "id bigint", "name text", "type text", "event_type text", "data jsonb", "payload jsonb", "occurred_at timestamptz", "created_at timestamptz", "key text", "aggregate_id text"},
			"id: id (bigint), type: event_type (text), key: aggregate_id (text), data: payload (jsonb), tenant: none, headers: none, time: created_at (timestamptz)",
		},
		{
			"unlikely types are passed over",
			[]string{"id uuid", "type integer", "topic enum", "payload boolean", "data bytea", "headers hstore", "metadata text", "key jsonb", "time interval", "timestamp text"},
			"id: id (uuid), type: topic (user type 16400), key: none, data: data (bytea), tenant: none, headers: none, time: none",
		},
		{
			"lower case wins over its double",
			[]string{"Payload jsonb", "payload json", "id uuid", "type text"},
			"id: id (uuid), type: type (text), key: none, data: payload (json), tenant: none, headers: none, time: none",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			rel := relation("outbox", c.columns...)
			m := mapper(t, Source{Table: "outbox"})
			require.NoError(t, m.Resolve(rel))
			require.Equal(t, c.want, m.Describe(rel))
		})
	}
}

func TestWhatIsGivenIsNotGuessedAgain(t *testing.T) {
	rel := relation("outbox", "id uuid", "type text", "key text", "headers jsonb", "metadata jsonb", "created_at timestamptz")
	m := mapper(t, Source{Table: "outbox", Data: Column{Name: "headers"}, Key: Column{Constant: true}, Time: Column{Constant: true}})
	require.Equal(t, `id: id (uuid), type: type (text), key: none, data: headers (jsonb), tenant: none, headers: metadata (jsonb), time: none`, m.Describe(rel))
}

func TestAColumnMayServeTwice(t *testing.T) {
	rel := relation("outbox", "id bigint", "type text", "payload jsonb")
	e := mapOne(t, Source{Table: "outbox", Key: Column{Name: "id"}}, rel, "7", "t", "1")
	require.Equal(t, []string{"7", "7"}, []string{e.ID, e.Key})
}

func TestSchemaErrorSaysWhichColumnsWerePassedOver(t *testing.T) {
	err := mapper(t, Source{Table: "outbox"}).Resolve(relation("outbox", "id bigint", "type integer", "payload jsonb"))
	require.ErrorContains(t, err, "a column of text; type is integer, and taken only where the configuration names it\n")
}

func TestSchemaErrorSaysWhatToWrite(t *testing.T) {
	for _, c := range []struct {
		name   string
		source Source
		rel    *cdc.Relation
		golden string
	}{
		{
			"nothing found",
			Source{Table: "events", IDPrefix: "e_"},
			relation("events", "number integer", "kind enum", "subject text", "blob jsonb", "occurred_at timestamptz"),
			`outbox[0] (public.events): columns.id: not found by name; looked for id, event_id, message_id, uuid, event_uuid, message_uuid, event_identifier, guid, outbox_id (in any case, with or without underscores): a column of uuid, integer or text
columns.type: not found by name; looked for event_type, type, message_type, event_name, topic, name (in any case, with or without underscores): a column of text
columns.data: not found by name; looked for payload, data, body, event_data, event_payload, message_body, content, message, event_body, serialized_event (in any case, with or without underscores): a column of jsonb, json, text or bytea
The table's columns: number integer, kind user type 16400, subject text, blob jsonb, occurred_at timestamptz
Write in the configuration where each part of an event comes from:

outbox:
  - table: public.events
    columns:
      id: number   # <-- not found by name: check this guess; or {expr: …}
      type: subject   # <-- not found by name: check this guess; or {value: …}; or {expr: …}
      data: blob   # <-- not found by name: check this guess; or {value: …}; or {expr: …}
      time: occurred_at
    id_prefix: e_
`,
		},
		{
			"nothing there",
			Source{Table: `"My Schema"."Out.box"`},
			relation(`"My Schema"."Out.box"`, "amount numeric"),
			`outbox[0] ("My Schema"."Out.box"): columns.id: not found by name; looked for id, event_id, message_id, uuid, event_uuid, message_uuid, event_identifier, guid, outbox_id (in any case, with or without underscores): a column of uuid, integer or text
columns.type: not found by name; looked for event_type, type, message_type, event_name, topic, name (in any case, with or without underscores): a column of text
columns.data: not found by name; looked for payload, data, body, event_data, event_payload, message_body, content, message, event_body, serialized_event (in any case, with or without underscores): a column of jsonb, json, text or bytea
The table's columns: amount numeric
Write in the configuration where each part of an event comes from:

outbox:
  - table: "\"My Schema\".\"Out.box\""
    columns:
      id: id   # <-- not found by name; or {expr: …}
      type: {value: "order.created"}   # <-- not found by name: check this guess; or {value: …}; or {expr: …}
      data: {expr: "row"}   # <-- not found by name: check this guess; or {value: …}; or {expr: …}

An event needs an id. To give the table one:

alter table "My Schema"."Out.box" add column id uuid not null default gen_random_uuid();
`,
		},
		{
			"configured and missing",
			Source{
				Table: "outbox", Type: Column{Name: "eventType"}, Data: Column{Expr: "{'a': row.payloud}"},
				Tenant: Column{Name: "customer"}, Headers: Column{Name: "id"}, Key: Column{Constant: true},
			},
			relation("outbox", "id uuid", "event_type text", "payload jsonb", "meta jsonb"),
			`outbox[0] (public.outbox): columns.type: the table has no column "eventType"; the nearest is "event_type" (names are taken as written, case and all)
columns.data: the expression {'a': row.payloud} reads the column "payloud", which the table has not; the nearest is "payload"
columns.tenant: the table has no column "customer"
columns.headers: column "id" is of type uuid, which cannot be an event's headers; that is a column of jsonb, json or text that holds a JSON object
The table's columns: id uuid, event_type text, payload jsonb, meta jsonb
Write in the configuration where each part of an event comes from:

outbox:
  - table: public.outbox
    columns:
      id: id
      type: event_type   # <-- was eventType; or {value: …}; or {expr: …}
      key: {value: ""}
      data: {expr: "{'a': row.payloud}"}   # <-- reads payloud
`,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := mapper(t, c.source)
			err := m.Resolve(c.rel)
			var schema *SchemaError
			require.ErrorAs(t, err, &schema)
			require.Equal(t, c.golden, err.Error())

			e, err := m.Map(rowOf(c.rel, make([]string, len(c.rel.Columns))...))
			require.Nil(t, e)
			require.ErrorAs(t, err, &schema)

			// What it says to write is YAML, and names the same table.
			snippet, _, _ := strings.Cut(schema.Help[strings.Index(schema.Help, "outbox:"):], "\n\nAn event")
			var config struct {
				Outbox []struct {
					Table   string
					Columns map[string]any
				}
			}
			require.NoError(t, yaml.Unmarshal([]byte(snippet), &config))
			schemaName, name, err := ParseTable(config.Outbox[0].Table)
			require.NoError(t, err)
			require.Equal(t, [2]string{c.rel.Schema, c.rel.Name}, [2]string{schemaName, name})
			require.Contains(t, config.Outbox[0].Columns, "data")
		})
	}
}

func TestSchemaErrorEndsWhenTheColumnIsBack(t *testing.T) {
	m := mapper(t, Source{Table: "outbox"})
	good := relation("outbox", "id uuid", "type text", "payload jsonb")
	gone := relation("outbox", "id uuid", "type text")
	_, err := m.Map(rowOf(good, "a", "t", "1"))
	require.NoError(t, err)
	_, err = m.Map(rowOf(gone, "a", "t"))
	require.ErrorAs(t, err, new(*SchemaError))
	_, err = m.Map(rowOf(good, "a", "t", "1"))
	require.NoError(t, err)
}

func TestStrangersAreIgnored(t *testing.T) {
	m := mapper(t, Source{Table: "outbox"}, Source{Messages: "walhook"})
	for _, r := range []*cdc.Row{
		rowOf(relation("walhook.deliveries", "id bigint"), "1"),
		rowOf(relation("other.outbox", "id bigint"), "1"),
		rowOf(relation("OUTBOX", "id bigint"), "1"),
		message("other", `{}`),
		message("walhook2", `{}`),
	} {
		e, err := m.Map(r)
		require.NoError(t, err)
		require.Nil(t, e)
	}
	require.NoError(t, m.Resolve(relation("other.outbox", "id bigint")))
	for i := range 3 * maxPlans { // FOR ALL TABLES
		_, err := m.Map(rowOf(relation(fmt.Sprintf("t%d", i), "id bigint"), "1"))
		require.NoError(t, err)
	}
	require.LessOrEqual(t, len(m.plans), maxPlans)
}

func TestConfigMistakesNameTheirPlace(t *testing.T) {
	_, err := NewMapper([]Source{
		{Table: "outbox"},
		{Table: "outbox", ID: Column{Value: "x"}, Type: Column{Expr: "row.a +"}, Key: Column{Name: "a", Expr: "row.b"}, Headers: Column{Value: "[1]"}, Time: Column{Value: "soon"}},
		{Table: "a.b.c", IDPrefix: "a.b", Type: Column{Constant: true}, Data: Column{Constant: true}},
		{},
		{Table: "x", Messages: "y"},
		{Messages: "walhook", ID: Column{Name: "id"}},
		{Table: "public.outbox"},
		{Table: "walhook.deliveries"},
		{Messages: "m"},
		{Messages: "m"},
		{Table: `"a`, ID: Column{Name: `"a" b`}},
	})
	require.Error(t, err)
	for _, want := range []string{
		"outbox[1].columns.id.value: every event needs an id of its own",
		"outbox[1].columns.type.expr: ERROR: <input>:1:8: Syntax error",
		"outbox[1].columns.key: one of a column's name, {expr: …} and {value: …}",
		"outbox[1].columns.headers.value: \"[1]\" is not a JSON object",
		"outbox[1].columns.time.value: \"soon\": is not a time",
		"outbox[2].table: table \"a.b.c\": more than one dot",
		"outbox[2].id_prefix: \"a.b\": only letters, digits, _ : and -",
		"outbox[2].columns.type.value: a type may not be empty",
		"outbox[2].columns.data.value: an empty payload is no JSON",
		"outbox[3].table: is missing",
		"outbox[4].table: one of table and messages",
		"outbox[5].columns.id: a message has no columns",
		"outbox[6].table: public.outbox is the table of outbox[0] already",
		"outbox[7].table: the tables of the schema walhook are walhook's own",
		"outbox[9].messages: \"m\" is the prefix of outbox[8] already",
		"outbox[10].table: table \"\\\"a\": a double quote is not closed",
		"outbox[10].columns.id: column \"a\" b: there is text behind",
	} {
		require.ErrorContains(t, err, want)
	}
	s := Source{Table: "x", Type: Column{Expr: "1 +"}}
	require.ErrorContains(t, s.Validate(), "columns.type.expr: ERROR")
}

func TestParseTable(t *testing.T) {
	for in, want := range map[string][2]string{
		"outbox":                {"public", "outbox"},
		"public.OutboxEvent":    {"public", "OutboxEvent"},
		`"My Schema"."Out.box"`: {"My Schema", "Out.box"},
		`app."say ""hi"""`:      {"app", `say "hi"`},
		`"a"`:                   {"public", "a"},
		`Ünï.täble`:             {"Ünï", "täble"},
		`app.drop table x; --`:  {"app", "drop table x; --"},
		strings.Repeat("x", 63): {"public", strings.Repeat("x", 63)},
	} {
		schema, name, err := ParseTable(in)
		require.NoError(t, err, in)
		require.Equal(t, want, [2]string{schema, name}, in)
	}
	for _, in := range []string{"", ".", "a.", ".a", `""`, `"a`, `"a"b`, `a"b"`, "a.b.c", " a", "a. b", "a\x00", strings.Repeat("x", 64)} {
		_, _, err := ParseTable(in)
		require.Error(t, err, in)
	}
}

func FuzzParseTable(f *testing.F) {
	for _, s := range []string{"a.b", `"a""b"."c.d"`, `"`, `"".""`, "a.b.c", " "} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		schema, name, err := ParseTable(in)
		if err != nil {
			return
		}
		again, name2, err := ParseTable(tableText(schema, name))
		require.NoError(t, err)
		require.Equal(t, [2]string{schema, name}, [2]string{again, name2})
		s2, n2, err := ParseTable(sqlTable(schema, name))
		require.NoError(t, err)
		require.Equal(t, [2]string{schema, name}, [2]string{s2, n2})
		if utf8.ValidString(in) {
			var back string
			require.NoError(t, yaml.Unmarshal([]byte(yamlText(in)), &back))
			require.Equal(t, in, back)
		}
	})
}

func TestIDs(t *testing.T) {
	source := Source{Table: "outbox", IDPrefix: "o_"}
	for _, c := range []struct{ typ, in, want string }{
		{"uuid", "0b7c1c3e-0000-4000-8000-000000000001", "o_0b7c1c3e-0000-4000-8000-000000000001"},
		{"bigint", "-5", "o_-5"},
		{"text", "a.b c/é%", "o_a%2Eb%20c%2F%C3%A9%25"},
		{"text", "evt_1:2-3", "o_evt_1:2-3"},
		{"character", "01HX   ", "o_01HX"},
	} {
		rel := relation("outbox", "id "+c.typ, "type text", "payload jsonb")
		require.Equal(t, c.want, mapOne(t, source, rel, c.in, "t", "1").ID)
	}
}

func TestIDPrefixesMustPartWhatMayBeEqual(t *testing.T) {
	uuid := func(table string) *cdc.Relation { return relation(table, "id uuid", "type text", "payload json") }
	number := func(table string) *cdc.Relation { return relation(table, "id bigint", "type text", "payload json") }
	for _, c := range []struct {
		name    string
		sources []Source
		rels    []*cdc.Relation
		bad     string
	}{
		{"uuids", []Source{{Table: "a"}, {Table: "b"}}, []*cdc.Relation{uuid("a"), uuid("b")}, ""},
		{"one number", []Source{{Table: "a"}, {Table: "b"}}, []*cdc.Relation{uuid("a"), number("b")}, ""},
		{"two numbers", []Source{{Table: "a"}, {Table: "b"}}, []*cdc.Relation{number("a"), number("b")}, `outbox[1].id_prefix: its ids (bigint) may be equal to those of outbox[0] (bigint), as not both are uuids: give each source an id_prefix of its own, such as "b_"`},
		{"parted", []Source{{Table: "a", IDPrefix: "a_"}, {Table: "b"}}, []*cdc.Relation{number("a"), number("b")}, ""},
		{"parted by a digit", []Source{{Table: "a", IDPrefix: "1"}, {Table: "b"}}, []*cdc.Relation{number("a"), number("b")}, "outbox[1].id_prefix"},
		{"not resolved yet", []Source{{Table: "a"}, {Table: "b"}}, []*cdc.Relation{number("a")}, ""},
		{"messages", []Source{{Table: "a"}, {Messages: "my.m"}}, []*cdc.Relation{number("a")}, `(chosen by the senders of messages) may be equal to those of outbox[0] (bigint), as not both are uuids: give each source an id_prefix of its own, such as "my_m_"`},
		{"messages and uuids", []Source{{Table: "a"}, {Messages: "m"}}, []*cdc.Relation{uuid("a")}, ""},
		{"expressions", []Source{{Table: "a", ID: Column{Expr: "row.id"}}, {Messages: "m"}}, []*cdc.Relation{uuid("a")}, "(an expression)"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := mapper(t, c.sources...)
			for _, rel := range c.rels {
				require.NoError(t, m.Resolve(rel))
			}
			if c.bad == "" {
				require.NoError(t, m.CheckIDs())
			} else {
				require.ErrorContains(t, m.CheckIDs(), c.bad)
			}
		})
	}
}

func TestPayloads(t *testing.T) {
	for _, c := range []struct {
		typ, in, want string
		json          bool
	}{
		{"jsonb", `{"a": 1}`, `{"a": 1}`, true},
		{"json", `{"a":1, "a":2, "n": 1234567890123456789012345678901234567890}`, `{"a":1, "a":2, "n": 1234567890123456789012345678901234567890}`, true},
		{"json", null, `null`, true},
		{"text", null, `null`, true},
		{"text", ` {"a":1}`, ` {"a":1}`, true},
		{"text", `a=1&b=2`, `a=1&b=2`, false},
		{"text", ``, ``, false},
		{"varchar", `"x"`, `"x"`, true},
		{"bytea", `\x7b7d`, `{}`, true},
		{"bytea", `\x00ff`, "\x00\xff", false},
		{"bytea", `\x`, "", false},
		{"integer", `5`, `5`, true},
		{"numeric", `1.50`, `1.50`, true},
		{"numeric", `NaN`, `NaN`, false},
		{"boolean", `t`, `true`, true},
		{"boolean", `f`, `false`, true},
		{"hstore", `"a"=>"1"`, `"a"=>"1"`, false},
		{"text[]", `{a,b}`, `{a,b}`, false},
	} {
		rel := relation("outbox", "id uuid", "type text", "p "+c.typ)
		e := mapOne(t, Source{Table: "outbox", Data: Column{Name: "p"}}, rel, "a", "t", c.in)
		require.Equal(t, c.want, string(e.Data), c.in)
		require.NotNil(t, e.Data)
		require.Equal(t, c.json, e.JSON, c.in)
	}
}

func TestHeaders(t *testing.T) {
	for _, c := range []struct{ typ, in, want, reason string }{
		{"jsonb", `{"a": "b"}`, `{"a": "b"}`, ""},
		{"json", " {\"a\":1}\n", `{"a":1}`, ""},
		{"jsonb", `null`, ``, ""},
		{"jsonb", null, ``, ""},
		{"text", ``, ``, ""},
		{"text", `[]`, ``, ""},
		{"text", `{"a":"b"}`, `{"a":"b"}`, ""},
		{"jsonb", `[1]`, ``, `headers: "[1]" is not a JSON object`},
		{"jsonb", `"x"`, ``, `headers: "\"x\"" is not a JSON object`},
		{"text", `{"a"`, ``, `headers: "{\"a\"" is not valid JSON`},
	} {
		rel := relation("outbox", "id uuid", "type text", "payload json", "headers "+c.typ)
		m := mapper(t, Source{Table: "outbox"})
		r := rowOf(rel, "a", "t", "1", c.in)
		if c.reason != "" {
			e, reason := buried(t, m, r)
			require.Equal(t, c.reason, reason)
			require.Equal(t, "a", e.ID)
			continue
		}
		e, err := m.Map(r)
		require.NoError(t, err)
		require.Equal(t, c.want, string(e.Headers))
		require.Equal(t, c.want == "", e.Headers == nil)
	}
}

func TestTimes(t *testing.T) {
	for _, c := range []struct{ typ, in, want string }{
		{"timestamptz", "2026-02-03 04:05:06.789+00", "2026-02-03T04:05:06.789Z"},
		{"timestamptz", "2026-02-03 04:05:06+00", "2026-02-03T04:05:06Z"},
		{"timestamptz", "2026-02-03 04:05:06.789012+05:30", "2026-02-02T22:35:06.789012Z"},
		{"timestamptz", "0001-01-02 00:00:00+00", "0001-01-02T00:00:00Z"},
		{"timestamptz", null, "2026-02-03T04:05:06Z"},
		{"timestamp", "2024-02-29 23:59:59.000001", "2024-02-29T23:59:59.000001Z"},
		{"date", "2026-02-03", "2026-02-03T00:00:00Z"},
		{"text", "2026-02-03T04:05:06.123456789Z", "2026-02-03T04:05:06.123456Z"},
		{"text", "2026-02-03T04:05:06-08:00", "2026-02-03T12:05:06Z"},
		{"integer", "1770091506", "2026-02-03T04:05:06Z"},
		{"bigint", "1770091506789", "2026-02-03T04:05:06.789Z"},
		{"bigint", "1770091506789012", "2026-02-03T04:05:06.789012Z"},
		{"bigint", "1770091506789012345", "2026-02-03T04:05:06.789012Z"},
		{"bigint", "0", "1970-01-01T00:00:00Z"},
		{"bigint", "-1", "1969-12-31T23:59:59Z"},
		{"numeric", "1770091506.789012", "2026-02-03T04:05:06.789012Z"},
		{"double precision", "1770091506789.5", "2026-02-03T04:05:06.7895Z"},
		{"enum", "2026-02-03 04:05:06.789+00", "2026-02-03T04:05:06.789Z"}, // a domain
		{"enum", "1770091506", "2026-02-03T04:05:06Z"},
	} {
		rel := relation("outbox", "id uuid", "type text", "payload json", "at "+c.typ)
		e := mapOne(t, Source{Table: "outbox", Time: Column{Name: "at"}}, rel, "a", "t", "1", c.in)
		require.Equal(t, c.want, e.Time.Format(time.RFC3339Nano), c.in)
	}
	for _, c := range []struct{ typ, in, want string }{
		{"timestamptz", "infinity", "years 1 to 9999"},
		{"timestamptz", "-infinity", "years 1 to 9999"},
		{"timestamptz", "0044-03-15 00:00:00+00 BC", "years 1 to 9999"},
		{"timestamptz", "12026-02-03 04:05:06.1+00", "years 1 to 9999"},
		{"timestamptz", "294276-01-01 00:00:00+00", "years 1 to 9999"},
		{"text", "0001-01-01T00:00:00+05:00", "years 1 to 9999"},
		{"text", "yesterday", "is not a time"},
		{"text", "", "is not a time"},
		{"text", "2026-02-30", "is not a time"},
		{"text", "1770091506", "is not a time"},
		{"bigint", "99999999999999999999", "is not a number"},
		{"double precision", "1.7e+300", "is not a number"},
	} {
		rel := relation("outbox", "id uuid", "type text", "payload json", "at "+c.typ)
		_, reason := buried(t, mapper(t, Source{Table: "outbox", Time: Column{Name: "at"}}), rowOf(rel, "a", "t", "1", c.in))
		require.Contains(t, reason, c.want, c.in)
	}
}

// timeForms are what parseTimestamp reads, in time.Parse's words.
var timeForms = []string{
	"2006-01-02", "2006-01-02 15:04:05", "2006-01-02 15:04:05Z07", "2006-01-02 15:04:05Z07:00", "2006-01-02 15:04:05Z0700", "2006-01-02 15:04:05Z07:00:00",
}

func FuzzTime(f *testing.F) {
	for _, s := range []string{
		"2026-02-03 04:05:06.789+00", "2026-02-03", "2026-02-03T04:05:06Z", "2026-02-03 04:05:06-15:59:59", "2026-02-03 04:05:06+0530", "infinity", "12026-02-03 04:05:06.1+00",
		"0044-03-15 00:00:00+00 BC", "2024-02-29 23:59:59", "1900-02-29", "1770091506.5", "0000-01-01", "2026-02-03 04:05:06.", "00001-01-10",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		_, _ = parseEpoch(s)
		got, err := parseTimestamp(s)
		if err != nil {
			return
		}
		require.Equal(t, got, got.Truncate(time.Microsecond))
		form := strings.NewReplacer("T", " ", "t", " ", "z", "Z").Replace(s)
		for _, layout := range timeForms {
			if want, err := time.Parse(layout, form); err == nil {
				require.True(t, want.Truncate(time.Microsecond).Equal(got), "%s: got %v, want %v", s, got, want)
				return
			}
		}
		t.Fatalf("%q is read as %v, but time.Parse does not take it", s, got)
	})
}

func TestEveryTimeIsReadBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		at := time.UnixMicro(rapid.Int64Range(-62135596800000000, 253402300799999999).Draw(t, "µs")).UTC()
		for _, layout := range []string{"2006-01-02 15:04:05.999999-07", time.RFC3339Nano, "2006-01-02 15:04:05.999999"} {
			got, err := parseTimestamp(at.Format(layout))
			require.NoError(t, err)
			require.True(t, at.Equal(got))
		}
		if at.Year() > 1 && at.Year() < 9999 {
			zone := time.FixedZone("", rapid.IntRange(-15*60, 15*60).Draw(t, "zone")*60)
			got, err := parseTimestamp(at.In(zone).Format(time.RFC3339Nano))
			require.NoError(t, err)
			require.True(t, at.Equal(got))
		}
	})
}

func TestExpressionsAndConstants(t *testing.T) {
	rel := relation("outbox", "id bigint", "aggregatetype text", "type text", "payload jsonb", "n numeric", "raw bytea", "ok boolean", "at timestamptz", "f real", "long numeric")
	values := []string{"7", "order", "created", `{"customer": {"id": 12345678901234567890}, "ts": 1770091506789}`, "10.50", `\x6869`, "t", "2026-02-03 04:05:06.789+00", "1.5", "123456789012345678901234567890"}
	e := mapOne(t, Source{
		Table:   "outbox",
		ID:      Column{Expr: `row.aggregatetype + '_' + string(row.id)`},
		Type:    Column{Expr: `row.aggregatetype + '.' + row.type`},
		Key:     Column{Expr: `row.payload.customer.id`},
		Tenant:  Column{Value: "acme"},
		Headers: Column{Expr: `{'x-ok': row.ok, 'raw': string(row.raw)}`},
		Time:    Column{Expr: `row.payload.ts`},
		Data:    Column{Expr: `{'n': row.n, 'at': row.at, 'year': row.at.getFullYear(), 'f': row.f, 'missing': row.?missing.orValue(0), 'long': row.long}`},
	}, rel, values...)
	require.Equal(t, "order_7", e.ID)
	require.Equal(t, "order.created", e.Type)
	require.Equal(t, "12345678901234567890", e.Key)
	require.Equal(t, "acme", e.Tenant)
	require.Equal(t, `{"raw":"hi","x-ok":true}`, string(e.Headers))
	require.Equal(t, "2026-02-03T04:05:06.789Z", e.Time.Format(time.RFC3339Nano))
	require.Equal(t, `{"at":"2026-02-03T04:05:06.789Z","f":1.5,"long":"123456789012345678901234567890","missing":0,"n":10.50,"year":2026}`, string(e.Data))
	require.True(t, e.JSON)

	whole := mapOne(t, Source{Table: "outbox", Data: Column{Expr: `row`}, Type: Column{Value: "order.created"}}, rel, values...)
	require.Equal(t, "order.created", whole.Type)
	require.Contains(t, string(whole.Data), `"aggregatetype":"order"`)
	require.Nil(t, whole.Headers)

	_, reason := buried(t, mapper(t, Source{Table: "outbox", Type: Column{Expr: `row.aggregatetype + '.' + row.type`}}),
		rowOf(rel, "7", null, "created", "1", null, null, null, null, null, null))
	require.Equal(t, "type: the expression failed: no such overload: _+_ (NULL: row.aggregatetype)", reason)

	_, reason = buried(t, mapper(t, Source{Table: "outbox", Key: Column{Expr: `row.payload.k`}}),
		rowOf(rel, "7", "a", "created", strings.Repeat("[", 20000), null, null, null, null, null, null))
	require.Contains(t, reason, "key: the expression failed: column payload: ")

	// An expression that fails does not leave its row behind for the next one.
	m := mapper(t, Source{Table: "outbox", Key: Column{Expr: `row.payload.k`}})
	buried(t, m, rowOf(rel, "7", "a", "created", `{}`, null, null, null, null, null, null))
	require.Empty(t, m.row)
}

// A row can make an expression cost more than any row is worth: it alone pays.
func TestARowThatMakesAnExpressionTooExpensiveIsBuried(t *testing.T) {
	rel := relation("outbox", "id bigint", "type text", "payload jsonb")
	m := mapper(t, Source{Table: "outbox", Key: Column{Expr: `row.payload.all(a, row.payload.all(b, a + b >= 0)) ? 'all' : 'some'`}})
	_, reason := buried(t, m, rowOf(rel, "7", "t", "["+strings.Repeat("1,", 3000)+"1]"))
	require.Contains(t, reason, "key: the expression failed: "+rule.ErrTooExpensive.Error())
	e, err := m.Map(rowOf(rel, "8", "t", "[1,2]"))
	require.NoError(t, err)
	require.Equal(t, "all", e.Key)
}

func TestUnmappableRowsAreBuriedWithAllThatCouldBeRead(t *testing.T) {
	rel := relation("outbox", "id text", "event_type text", "aggregate_id text", "payload text", "n integer", "ok boolean", "j jsonb", "created_at timestamptz")
	m := mapper(t, Source{Table: "outbox", IDPrefix: "p_"})

	e, reason := buried(t, m, rowOf(rel, null, null, "k", "x", "5", "t", `{"a": 1}`, "infinity"))
	require.Equal(t, `id is NULL; type is NULL; time: "infinity": is not within the years 1 to 9999`, reason)
	require.Equal(t, "unmappable_16-B374D848_3", e.ID)
	require.Equal(t, "k", e.Key)
	require.Equal(t, committed, e.Time)
	require.Equal(t, `{"id":null,"event_type":null,"aggregate_id":"k","payload":"x","n":5,"ok":true,"j":{"a": 1},"created_at":"infinity"}`, string(e.Data))
	again, _ := buried(t, m, rowOf(rel, null, null, "k", "x", "5", "t", `{"a": 1}`, "infinity"))
	require.Equal(t, e, again)

	e, reason = buried(t, m, rowOf(rel, "a.b", "", "k", "x", null, null, null, null))
	require.Equal(t, "type is empty", reason)
	require.Equal(t, "p_a%2Eb", e.ID)

	e, reason = buried(t, m, rowOf(rel, strings.Repeat("é", 80), "t", strings.Repeat("k", 2000), "x", null, null, null, null))
	require.Equal(t, "id is too long: 482 bytes of at most 256; key is too long: 2000 bytes of at most 1024", reason)
	require.Equal(t, "unmappable_16-B374D848_3", e.ID)
	require.Len(t, e.Key, maxKeyLen)

	// What Postgres could not store as text never gets as far as the store.
	for _, bad := range []string{"a\x00b", "a\xffb"} {
		for i := 1; i < 3; i++ {
			values := []string{"id", "t", "k", "x", null, null, null, null}
			values[i] = bad
			e, _ = buried(t, m, rowOf(rel, values...))
			require.Equal(t, "p_id", e.ID)
			require.NoError(t, checkText(e.Type+e.Key, maxKeyLen))
		}
	}

	short := rowOf(rel, "id")
	e, reason = buried(t, m, short)
	require.Equal(t, "the row has 1 values, the table 8 columns", reason)
	require.Equal(t, `{"id":"id"}`, string(e.Data))

	_, err := m.Map(rowOf(rel, null, "t", "k", "x", null, null, null, null))
	require.EqualError(t, err, "map row 16/B374D848:3 of outbox[0] (public.outbox): id is NULL")

	rel = relation("outbox", "id text", "type text", "data bytea")
	for _, bad := range []string{`\000\001`, `\x0`, `\xzz`} {
		e, reason = buried(t, m, rowOf(rel, "id", "t", bad))
		require.Contains(t, reason, "data: a bytea")
		require.Equal(t, "p_id", e.ID)
	}
}

func TestMessages(t *testing.T) {
	m := mapper(t, Source{Messages: "walhook", IDPrefix: "m_"})
	data := `{ "n" : 1234567890123456789012345678901234567890, "a":[ "]}\"", {"x":1e5}], "a":null }`
	e, err := m.Map(message("walhook", ` { "id" : "a\u0062c" , "type":"order.created","key":7,"tenant":"acme","other":[{"id":1}],"time":"2026-02-03T04:05:06.789Z","headers":{"h":"1"}, "data":`+data+"\n} "))
	require.NoError(t, err)
	require.Equal(t, &Event{
		ID: "m_abc", Type: "order.created", Key: "7", Tenant: "acme", Time: time.Date(2026, 2, 3, 4, 5, 6, 789e6, time.UTC),
		Headers: []byte(`{"h":"1"}`), Data: []byte(data), JSON: true,
		Position: cdc.Position{Commit: 0x16B374D848, Ordinal: 3}, Commit: committed,
	}, e)

	e, err = m.Map(message("walhook", `{"id":12,"type":"t","key":null,"headers":null,"time":1770091506.789}`))
	require.NoError(t, err)
	require.Equal(t, "m_12", e.ID)
	require.Equal(t, "null", string(e.Data))
	require.True(t, e.JSON)
	require.Empty(t, e.Key)
	require.Nil(t, e.Headers)
	require.Equal(t, "2026-02-03T04:05:06.789Z", e.Time.Format(time.RFC3339Nano))

	for content, want := range map[string]string{
		``:                                "the message is not valid JSON",
		`{"id":1`:                         "the message is not valid JSON",
		"{\"id\":\"\xff\"}":               "the message is not valid JSON",
		`[1]`:                             `the message is not a JSON object but "[1]"`,
		`{}`:                              "id is missing or empty; type is missing or empty",
		`{"id":"","type":null}`:           "id is missing or empty; type is missing or empty",
		`{"id":{},"type":1}`:              `id is not a string or a number but "{}"; type is not a string but "1"`,
		`{"id":1,"type":"t","key":[]}`:    `key is not a string or a number but "[]"`,
		`{"id":1,"type":"t","headers":1}`: `headers: "1" is not a JSON object`,
		`{"id":1,"type":"t","time":"x"}`:  `time: "x": is not a time: want RFC 3339 or Postgres' ISO form`,
		`{"id":1,"type":"a\u0000"}`:       "type holds a zero byte",
	} {
		e, reason := buried(t, m, message("walhook", content))
		require.Equal(t, want, reason, content)
		if json.Valid([]byte(content)) && utf8.ValidString(content) {
			require.Equal(t, content, string(e.Data))
		}
	}
}

func FuzzMessage(f *testing.F) {
	for _, s := range []string{
		`{"id":1,"type":"t","data":{"a":[1,"]"]}}`, `{"id":"\ud800","type":"\"","data":"x"}`, `{}`, `[]`, ` { } `, `{"data":-1.5e+3 ,"id":"a"}`, `{"id":1,"id":2,"type":"t"}`, `{"i\u0064":1,"type":"t"}`,
	} {
		f.Add([]byte(s))
	}
	m, err := NewMapper([]Source{{Messages: "m"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		r := message("m", string(content))
		e, err := m.Map(r)
		require.NotNil(t, e)
		require.NoError(t, checkText(e.ID+e.Type+e.Key+e.Tenant, 4096))
		if err != nil {
			require.ErrorAs(t, err, new(*UnmappableError))
			require.True(t, json.Valid(e.Data))
			return
		}
		var want struct {
			ID, Type, Key, Tenant, Time, Headers, Data json.RawMessage
		}
		members := map[string]json.RawMessage{} // case counts
		require.NoError(t, json.Unmarshal(content, &members))
		want.Data = members["data"]
		if want.Data == nil {
			want.Data = jsonNull
		}
		require.Equal(t, string(want.Data), string(e.Data))
		var typ string
		require.NoError(t, json.Unmarshal(members["type"], &typ))
		require.Equal(t, typ, e.Type)
		require.True(t, e.JSON && json.Valid(e.Data))
	})
}

func FuzzEncode(f *testing.F) {
	f.Add("a.b%2E é\x00\xff")
	f.Fuzz(func(t *testing.T, s string) {
		out := encode(s)
		require.Len(t, out, encodedLen(s))
		var back []byte
		for i := 0; i < len(out); i++ {
			if out[i] != '%' {
				require.Contains(t, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_:-", out[i:i+1])
				back = append(back, out[i])
				continue
			}
			var c byte
			_, err := fmt.Sscanf(out[i+1:i+3], "%02X", &c)
			require.NoError(t, err)
			back = append(back, c)
			i += 2
		}
		require.Equal(t, s, string(back), "two ids never become one")
	})
}

func TestEventsOwnTheirBytes(t *testing.T) {
	m := mapper(t, Source{Table: "outbox", Tenant: Column{Name: "tenant"}, Key: Column{Expr: "row.aggregate_id"}}, Source{Messages: "m"})
	rel := relation("outbox", "id text", "type text", "aggregate_id text", "tenant text", "headers jsonb", "payload jsonb")
	for _, size := range []int{1, ownData} {
		payload := `"` + strings.Repeat("x", size) + `"`
		for _, r := range []*cdc.Row{
			rowOf(rel, "id", "t", "k", "n", `{"h":1}`, payload),
			message("m", `{"id":"id","type":"t","key":"k","tenant":"n","headers":{"h":1},"data":`+payload+`}`),
		} {
			e, err := m.Map(r)
			require.NoError(t, err)
			for _, v := range append(r.Values, r.Content) {
				copy(v, bytes.Repeat([]byte{'!'}, len(v)))
			}
			require.Equal(t, []string{"id", "t", "k", "n", `{"h":1}`, payload}, []string{e.ID, e.Type, e.Key, e.Tenant, string(e.Headers), string(e.Data)})
			require.Equal(t, []int{len(e.Headers), len(e.Data)}, []int{cap(e.Headers), cap(e.Data)}, "an append would write over a neighbour")
		}
	}
}

func TestTypesAreKeptOnceEachUpToALimit(t *testing.T) {
	m := mapper(t, Source{Table: "outbox"})
	rel := relation("outbox", "id text", "type text", "payload jsonb")
	for i := range 2 * maxTypes {
		typ := fmt.Sprintf("type.%d", i)
		e, err := m.Map(rowOf(rel, "id", typ, "1"))
		require.NoError(t, err)
		require.Equal(t, typ, e.Type)
	}
	require.Len(t, m.types, maxTypes)
}

func FuzzMapRow(f *testing.F) {
	f.Add("id", "t", "k", `{}`, `{"a":1}`, "2026-02-03 04:05:06+00")
	f.Add("", "", "", `[`, `\x00`, "infinity")
	f.Fuzz(func(t *testing.T, id, typ, key, headers, data, at string) {
		for _, types := range [][]string{
			{"id text", "type text", "key text", "headers text", "payload text", "created_at timestamptz"},
			{"id bigint", "type enum", "key bigint", "headers jsonb", "payload bytea", "created_at bigint"},
		} {
			m := mapper(t, Source{Table: "outbox", Tenant: Column{Expr: "row.payload"}})
			r := rowOf(relation("outbox", types...), id, typ, key, headers, data, at)
			e, err := m.Map(r)
			require.NotNil(t, e)
			require.NoError(t, checkText(e.ID, maxIDLen))
			require.NoError(t, checkText(e.Type, maxTypeLen))
			require.NoError(t, checkText(e.Key, maxKeyLen))
			require.NoError(t, checkText(e.Tenant, maxTenantLen))
			if err != nil {
				require.ErrorAs(t, err, new(*UnmappableError))
				require.True(t, json.Valid(e.Data) && utf8.Valid(e.Data))
			}
		}
	})
}

// What this package says of how Postgres prints, asked of Postgres itself.
func TestPostgresPrintsAsWeRead(t *testing.T) {
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, pgtest.DB(t))
	require.NoError(t, err)
	defer conn.Close(ctx)
	for _, set := range []string{"set datestyle = 'ISO'", "set timezone = 'UTC'", "set bytea_output = 'hex'", "set extra_float_digits = 3"} {
		_, err := conn.Exec(ctx, set)
		require.NoError(t, err)
	}
	res := conn.PgConn().ExecParams(ctx, `
		select id, ' x.y '::text as type, 'k  '::char(5) as key, payload, '{"a":1}'::jsonb as headers, at as created_at
		from (values
			(gen_random_uuid(), 'abc'::bytea, timestamptz '2026-02-03 04:05:06.000001+05:30'),
			(gen_random_uuid(), '', timestamptz '0001-01-01 00:00:00+00'),
			(gen_random_uuid(), null, null),
			(gen_random_uuid(), '1', timestamptz '9999-12-31 23:59:59.999999+00'),
			(gen_random_uuid(), '1', timestamptz 'infinity'),
			(gen_random_uuid(), '1', timestamptz '0044-03-15 BC'),
			(gen_random_uuid(), '1', timestamptz '10000-01-01')
		) as t (id, payload, at)`, nil, nil, nil, nil)
	rel := &cdc.Relation{Schema: "public", Name: "outbox"}
	for _, f := range res.FieldDescriptions() {
		rel.Columns = append(rel.Columns, cdc.Column{Name: f.Name, TypeOID: f.DataTypeOID})
	}
	m := mapper(t, Source{Table: "outbox"})
	require.NoError(t, m.Resolve(rel))
	var times, data []string
	for res.NextRow() {
		e, err := m.Map(&cdc.Row{Relation: rel, Values: res.Values(), CommitTime: committed})
		if err != nil {
			require.ErrorContains(t, err, errTimeRange.Error())
			times = append(times, "none")
			continue
		}
		times = append(times, e.Time.Format(time.RFC3339Nano))
		data = append(data, string(e.Data))
		require.Equal(t, "k", e.Key)
		require.Equal(t, " x.y ", e.Type)
		require.Equal(t, `{"a": 1}`, string(e.Headers))
		require.Len(t, e.ID, 36)
	}
	_, err = res.Close()
	require.NoError(t, err)
	require.Equal(t, []string{"2026-02-02T22:35:06.000001Z", "2026-02-03T04:05:06Z", "2026-02-03T04:05:06Z", "9999-12-31T23:59:59.999999Z", "none", "none", "none"}, times)
	require.Equal(t, []string{"abc", "", "null", "1"}, data)
}

func BenchmarkMap(b *testing.B) {
	payload := `{"order": "` + strings.Repeat("x", 1000) + `"}`
	id, at := "0b7c1c3e-0000-4000-8000-000000000001", "2026-02-03 04:05:06.789+00"
	own := []string{"id uuid", "event_type text", "aggregate_id text", "payload jsonb", "headers jsonb", "created_at timestamptz"}
	text := []string{"id uuid", "event_type text", "aggregate_id text", "payload text", "headers jsonb", "created_at timestamptz"}
	bin := []string{"id uuid", "event_type text", "aggregate_id text", "payload bytea", "headers jsonb", "created_at timestamptz"}
	values := []string{id, "order.created", "42", payload, `{"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}`, at}
	with := func(payload string) []string {
		v := append([]string(nil), values...)
		v[3] = payload
		return v
	}
	for _, c := range []struct {
		name   string
		source Source
		row    *cdc.Row
	}{
		{"jsonb", Source{Table: "outbox"}, rowOf(relation("outbox", own...), values...)},
		{"jsonb-100kB", Source{Table: "outbox"}, rowOf(relation("outbox", own...), with(`"`+strings.Repeat("x", 100_000)+`"`)...)},
		{"text", Source{Table: "outbox"}, rowOf(relation("outbox", text...), values...)},
		{"bytea", Source{Table: "outbox"}, rowOf(relation("outbox", bin...), with(fmt.Sprintf(`\x%x`, payload))...)},
		{"expr", Source{Table: "outbox", Type: Column{Expr: "row.event_type + '.v1'"}}, rowOf(relation("outbox", own...), values...)},
		{"expr-json", Source{Table: "outbox", Key: Column{Expr: "row.payload.order"}}, rowOf(relation("outbox", own...), with(`{"order": "1", "pad": "`+strings.Repeat("x", 1000)+`"}`)...)},
		{"message", Source{Messages: "m"}, message("m", `{"id":"`+id+`","type":"order.created","key":"42","time":"2026-02-03T04:05:06.789Z","data":`+payload+`}`)},
		{"ignored", Source{Table: "outbox"}, rowOf(relation("other", own...), values...)},
	} {
		b.Run(c.name, func(b *testing.B) {
			m := mapper(b, c.source)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := m.Map(c.row); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("time", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := parseTime(at, oidTimestamptz); err != nil {
				b.Fatal(err)
			}
		}
	})
}
