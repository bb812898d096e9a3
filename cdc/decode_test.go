package cdc

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"flag"
	"fmt"
	"maps"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc/pgtest"
)

var update = flag.Bool("update", false, "rewrite the golden files under testdata")

// goldenFrames has a line for each message that a real server sent: its bytes, and what they mean.
const goldenFrames = "testdata/pgoutput.golden"

// everyKind makes a server send every message of protocol version 1, in each of its forms.
var everyKind = []string{
	`create type mood as enum ('happy', 'so so');
	create table whole (id bigint primary key, type text, data jsonb, note text, mood mood, raw bytea, "at ""Noon""" timestamptz);
	alter table whole replica identity full;
	create table keyed (id int primary key, big text);
	alter table keyed alter column big set storage external;
	create table nothing ();
	create publication every for all tables`,

	// Type, Relation, Insert: all values, all NULL but the key, empty ones; one transaction
	`insert into whole values
		(1, 'invoice.paid', '{"amount": 1.50}', 'Grüße, 世界', 'so so', '\x00ff', '2026-01-02 03:04:05.678901+00'),
		(2, null, null, null, null, null, null), (-3, '', '{}', '', 'happy', '', 'infinity')`,
	`insert into keyed values (1, repeat('x', 2100))`,
	`insert into nothing default values`,

	// Update: the old key with an unchanged value, nothing old, the whole old row
	`update keyed set id = 2`,
	`update keyed set big = 'small'`,
	`update whole set note = 'changed' where id = 1`,

	// Delete: by the key, with the whole row. Truncate.
	`delete from keyed`,
	`delete from whole where id < 0`,
	`truncate keyed, whole restart identity cascade`,

	// logical messages, amidst rows and outside of a transaction
	`begin; insert into keyed values (3, 'between'); select pg_logical_emit_message(true, 'walhook', '{"id": 1}');
	 select pg_logical_emit_message(true, '', ''); insert into keyed values (4, 'messages'); commit`,
	`select pg_logical_emit_message(false, 'walhook', 'at once')`,

	// a changed Relation
	`alter table keyed rename column big to "Größe"; alter table keyed add extra numeric(10, 2) default 1`,
	`insert into keyed values (5, 'five')`,

	// Origin
	`select pg_replication_origin_create('golden_' || current_database());
	 select pg_replication_origin_session_setup('golden_' || current_database())`,
	`begin; select pg_replication_origin_xact_setup('0/ABCDEF', '2020-02-03 04:05:06.000007+00');
	 insert into keyed values (6, 'from afar'); commit`,
	`select pg_replication_origin_session_reset(); select pg_replication_origin_drop('golden_' || current_database())`,

	`select pg_logical_emit_message(true, 'the end', '')`,
}

// capture has a server play everyKind and returns all frames up to the end, as text and as binary.
func capture(t *testing.T) [][]byte {
	t.Helper()
	url := pgtest.DB(t)
	database, _, _ := strings.Cut(url[strings.LastIndex(url, "/")+1:], "?")
	pgtest.Exec(t, url, everyKind[0])
	slots := []string{database + "_text", database + "_binary"}
	for _, slot := range slots {
		pgtest.Exec(t, url, "select pg_create_logical_replication_slot('"+slot+"', 'pgoutput')")
	}
	conn, err := pgconn.Connect(t.Context(), url)
	require.NoError(t, err)
	for _, sql := range everyKind[1:] {
		_, err := conn.Exec(t.Context(), sql).ReadAll()
		require.NoError(t, err, sql)
	}
	require.NoError(t, conn.Close(t.Context()))
	frames := stream(t, url, slots[0])
	return append(frames, stream(t, url, slots[1], "binary 'true'")...)
}

func stream(t *testing.T, url, slot string, options ...string) (frames [][]byte) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	config, err := pgconn.ParseConfig(url)
	require.NoError(t, err)
	config.RuntimeParams["replication"] = "database"
	conn, err := pgconn.ConnectConfig(ctx, config)
	require.NoError(t, err)
	defer func() { _ = conn.Close(context.Background()) }()
	options = append(options, "proto_version '1'", "publication_names 'every'", "messages 'true'")
	require.NoError(t, pglogrepl.StartReplication(ctx, conn, slot, 0, pglogrepl.StartReplicationOptions{PluginArgs: options}))
	for atEnd := false; ; {
		received, err := conn.ReceiveMessage(ctx)
		require.NoError(t, err)
		data, ok := received.(*pgproto3.CopyData)
		require.True(t, ok, "%T: %+[1]v", received)
		if data.Data[0] != pglogrepl.XLogDataByteID {
			continue
		}
		log, err := pglogrepl.ParseXLogData(data.Data[1:])
		require.NoError(t, err)
		frames = append(frames, bytes.Clone(log.WALData))
		atEnd = atEnd || log.WALData[0] == 'M' && bytes.Contains(log.WALData, []byte("the end"))
		if atEnd && log.WALData[0] == 'C' {
			return frames
		}
	}
}

// golden returns the frames of the golden file, in the order in which they came.
func golden(t testing.TB) [][]byte {
	t.Helper()
	content, err := os.ReadFile(goldenFrames)
	require.NoError(t, err)
	var frames [][]byte
	for line := range strings.Lines(string(content)) {
		frame, err := hex.DecodeString(strings.SplitN(line, " ", 2)[0])
		require.NoError(t, err)
		frames = append(frames, frame)
	}
	require.NotEmpty(t, frames)
	return frames
}

// learned is a decoder that has seen all frames, and so knows every relation of theirs as
// it was at the end of them.
func learned(t testing.TB, frames [][]byte) *decoder {
	t.Helper()
	d := new(decoder)
	for _, frame := range frames {
		_, err := d.decode(frame)
		require.NoError(t, err)
	}
	return d
}

// describe tells what a frame means, on one line.
func describe(frame []byte, m message) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%c", frame[0])
	switch m.kind {
	case kindBegin:
		fmt.Fprintf(&b, " begin: commit %s at %s, xid %d", m.lsn, m.time.Format(time.RFC3339Nano), m.xid)
	case kindCommit:
		fmt.Fprintf(&b, " commit: %s to %s at %s", m.lsn, m.endLSN, m.time.Format(time.RFC3339Nano))
	case kindRelation:
		fmt.Fprintf(&b, " relation: %+v", *m.relation)
	case kindMessage:
		fmt.Fprintf(&b, " message: transactional %t, %s, %q %q", m.transactional, m.lsn, m.prefix, m.content)
	case kindInsert:
		fmt.Fprintf(&b, " insert: %s.%s (%d)", m.relation.Schema, m.relation.Name, len(m.values))
		for i, value := range m.values {
			if value == nil {
				fmt.Fprintf(&b, " %s=NULL", m.relation.Columns[i].Name)
			} else {
				fmt.Fprintf(&b, " %s=%q", m.relation.Columns[i].Name, value)
			}
		}
	case kindSkipped:
		b.WriteString(" skipped")
	}
	return b.String()
}

func TestDecodeGoldenFrames(t *testing.T) {
	var frames [][]byte
	if *update {
		frames = capture(t)
	} else {
		frames = golden(t)
	}
	var got strings.Builder
	var d decoder
	kinds := map[byte]int{}
	for _, frame := range frames {
		m, err := d.decode(frame)
		require.NoError(t, err, "%q", frame)
		kinds[frame[0]]++
		fmt.Fprintf(&got, "%x %s\n", frame, describe(frame, m))
		if m.kind == kindMessage && m.prefix == "the end" {
			d = decoder{} // the next frames are another connection's
		}
	}
	for _, kind := range []byte("BCRIMYOUDT") {
		require.NotZero(t, kinds[kind], "no golden frame of kind %q", kind)
	}
	if *update {
		require.NoError(t, os.MkdirAll("testdata", 0o755))
		require.NoError(t, os.WriteFile(goldenFrames, []byte(got.String()), 0o644))
	}
	want, err := os.ReadFile(goldenFrames)
	require.NoError(t, err)
	require.Equal(t, string(want), got.String())
}

// A second opinion on the golden frames, and on those that the present server sends.
func TestDecodeAgreesWithPglogrepl(t *testing.T) {
	for name, frames := range map[string][][]byte{"golden": golden(t), "live": capture(t)} {
		var d decoder
		for _, frame := range frames {
			m, err := d.decode(frame)
			require.NoError(t, err, "%s %q", name, frame)
			requireAgreement(t, frame, m)
		}
	}
}

func requireAgreement(t *testing.T, frame []byte, m message) {
	t.Helper()
	theirs, err := pglogrepl.Parse(frame)
	if m.kind == kindInsert && len(m.values) == 0 {
		require.Error(t, err, "pglogrepl has learned to read a row without columns")
		return
	}
	if m.kind == kindSkipped && err != nil {
		return // pglogrepl asks for more bytes than the shortest of these have
	}
	require.NoError(t, err, "%q", frame)
	switch their := theirs.(type) {
	case *pglogrepl.BeginMessage:
		require.Equal(t, kindBegin, m.kind)
		require.Equal(t, uint64(their.FinalLSN), uint64(m.lsn))
		require.Equal(t, their.Xid, m.xid)
		requireSameTime(t, their.CommitTime, m.time)
	case *pglogrepl.CommitMessage:
		require.Equal(t, kindCommit, m.kind)
		require.Equal(t, uint64(their.CommitLSN), uint64(m.lsn))
		require.Equal(t, uint64(their.TransactionEndLSN), uint64(m.endLSN))
		requireSameTime(t, their.CommitTime, m.time)
	case *pglogrepl.RelationMessage:
		require.Equal(t, kindRelation, m.kind)
		require.Equal(t, their.RelationID, m.relation.OID)
		if their.Namespace == "" {
			their.Namespace = "pg_catalog"
		}
		require.Equal(t, their.Namespace, m.relation.Schema)
		require.Equal(t, their.RelationName, m.relation.Name)
		require.Len(t, m.relation.Columns, len(their.Columns))
		for i, column := range their.Columns {
			require.Equal(t, Column{Name: column.Name, TypeOID: column.DataType}, m.relation.Columns[i])
		}
	case *pglogrepl.InsertMessage:
		require.Equal(t, kindInsert, m.kind)
		require.Equal(t, their.RelationID, m.relation.OID)
		require.Len(t, m.values, len(their.Tuple.Columns))
		for i, column := range their.Tuple.Columns {
			if column.DataType == pglogrepl.TupleDataTypeNull {
				require.Nil(t, m.values[i])
				continue
			}
			require.NotNil(t, m.values[i], "empty is not NULL")
			require.Equal(t, string(column.Data), string(m.values[i]))
		}
	case *pglogrepl.LogicalDecodingMessage:
		require.Equal(t, kindMessage, m.kind)
		if frame[1] <= 1 { // pglogrepl compares the whole byte of flags
			require.Equal(t, their.Transactional, m.transactional)
		}
		require.Equal(t, uint64(their.LSN), uint64(m.lsn))
		require.Equal(t, their.Prefix, m.prefix)
		require.Equal(t, string(their.Content), string(m.content))
	default:
		require.Equal(t, kindSkipped, m.kind, "%T", theirs)
	}
}

// requireSameTime leaves out the years in which pglogrepl's sum of nanoseconds overflows.
func requireSameTime(t *testing.T, theirs, ours time.Time) {
	t.Helper()
	if ours.Year() > 1700 && ours.Year() < 2250 {
		require.WithinDuration(t, theirs, ours, 0)
	}
	require.Equal(t, time.UTC, ours.Location())
}

func TestDecodeRefusesEveryTruncation(t *testing.T) {
	frames := golden(t)
	d := learned(t, frames)
	before := maps.Clone(d.relations)
	for _, frame := range frames {
		for n := range frame {
			m, err := d.decode(frame[:n])
			require.ErrorIs(t, err, errTruncated, "%d bytes of %q", n, frame)
			require.Zero(t, m)
		}
		_, err := d.decode(append(bytes.Clone(frame), 0))
		require.ErrorIs(t, err, errMalformed, "%q and a zero", frame)
	}
	require.Equal(t, before, d.relations)
	for oid, relation := range before {
		require.Same(t, relation, d.relations[oid], "a broken Relation message was taken")
	}
}

func TestDecodeRefuses(t *testing.T) {
	insert := func(oid uint32, tuple string) string {
		return "I" + string(binary.BigEndian.AppendUint32(nil, oid)) + tuple
	}
	for name, test := range map[string]struct {
		frame string
		is    error
		says  string
	}{
		"nothing at all":                  {"", errTruncated, "it is empty"},
		"a message of protocol version 2": {"S\x00\x00\x00\x01\x01", errUnknownMessage, `unknown message 'S' (0x53)`},
		"a byte that is no letter":        {"\x00", errUnknownMessage, `unknown message '\x00' (0x00)`},
		"a row nobody announced":          {insert(8, "N\x00\x01n"), errUnknownRelation, "OID 8"},
		"a row too narrow":                {insert(7, "N\x00\x01n"), errMalformed, "1 values for the 2 columns of public.t"},
		"a row too wide":                  {insert(7, "N\x00\x03nnn"), errMalformed, "3 values for the 2 columns of public.t"},
		"a new row with a value unsent":   {insert(7, "N\x00\x02nu"), errMalformed, "unchanged value"},
		"an old row inserted":             {insert(7, "O\x00\x02nn"), errMalformed, `'O' where one of "N" belongs`},
		"a value of no known kind":        {insert(7, "N\x00\x02n?"), errMalformed, `'?' where one of "tbnu" belongs`},
		"a value of length -1":            {insert(7, "N\x00\x02nt\xff\xff\xff\xff"), errMalformed, "length -1"},
		"a value of length 2147483647":    {insert(7, "N\x00\x02nt\x7f\xff\xff\xff..."), errTruncated, ""},
		"65535 values in no bytes":        {insert(7, "N\xff\xff"), errTruncated, ""},
		"65535 columns in no bytes":       {"R\x00\x00\x00\x07s\x00t\x00d\xff\xff", errTruncated, ""},
		"4294967295 relations truncated":  {"T\xff\xff\xff\xff\x00", errTruncated, ""},
		"a message of length -2147483648": {"M\x01\x00\x00\x00\x00\x00\x00\x00\x01p\x00\x80\x00\x00\x00", errMalformed, "length -2147483648"},
		"a time beyond the calendar": {
			"B\x00\x00\x00\x00\x00\x00\x00\x01\x7f\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x01",
			errMalformed, "a time beyond all calendars",
		},
	} {
		t.Run(name, func(t *testing.T) {
			var d decoder
			_, err := d.decode(relationFrame(7, "public", "t", "a", "b"))
			require.NoError(t, err)
			m, err := d.decode([]byte(test.frame))
			require.ErrorIs(t, err, test.is)
			require.ErrorContains(t, err, test.says)
			require.Zero(t, m)
		})
	}
}

func TestDecodeRelationWithoutSchemaIsOfTheCatalogue(t *testing.T) {
	m, err := new(decoder).decode(relationFrame(7, "", "pg_class", "oid"))
	require.NoError(t, err)
	require.Equal(t, "pg_catalog", m.relation.Schema)
}

func TestDecodeRelationAnewMakesANewRelation(t *testing.T) {
	var d decoder
	one, err := d.decode(relationFrame(7, "public", "t", "a"))
	require.NoError(t, err)
	two, err := d.decode(relationFrame(7, "public", "t", "b"))
	require.NoError(t, err)
	require.NotSame(t, one.relation, two.relation)
	require.Equal(t, "a", one.relation.Columns[0].Name, "who kept the old one still has the old columns")
	row, err := d.decode(insertFrame(7, "x"))
	require.NoError(t, err)
	require.Same(t, two.relation, row.relation)
}

func TestDecodeInsertAllocatesNothing(t *testing.T) {
	d, frame := outboxRow(t)
	require.Zero(t, testing.AllocsPerRun(1000, func() { _, _ = d.decode(frame) }))
	message := []byte("M\x01\x00\x00\x00\x00\x00\x00\x00\x01walhook\x00\x00\x00\x00\x02{}")
	require.Zero(t, testing.AllocsPerRun(1000, func() { _, _ = d.decode(message) }))
}

// Whatever the bytes, decode does not panic, and what it reads pglogrepl reads the same way.
func FuzzDecode(f *testing.F) {
	frames := golden(f)
	relations := learned(f, frames).relations
	for _, frame := range frames {
		f.Add(frame)
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		d := decoder{relations: maps.Clone(relations)}
		m, err := d.decode(frame)
		if err != nil {
			require.Zero(t, m)
			return
		}
		requireAgreement(t, frame, m)
	})
}

// outboxRow is an insert of 1 KB in a usual outbox table, and a decoder that knows the table.
func outboxRow(t testing.TB) (*decoder, []byte) {
	var d decoder
	_, err := d.decode(relationFrame(16384, "public", "outbox", "id", "event_type", "aggregate_id", "tenant_id", "payload", "headers", "created_at"))
	require.NoError(t, err)
	payload := `{"amount": 150, "note": "` + strings.Repeat("x", 800) + `"}`
	return &d, insertFrame(16384, "0198c1f2-6b1e-7c3a-9d52-0a1b2c3d4e5f", "invoice.paid", "customer-1234567", "acme",
		payload, `{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}`, "2026-01-02 03:04:05.678901+00")
}

func BenchmarkDecodeInsert(b *testing.B) {
	d, frame := outboxRow(b)
	b.Run("walhook", func(b *testing.B) {
		b.SetBytes(int64(len(frame)))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := d.decode(frame); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("pglogrepl", func(b *testing.B) {
		b.SetBytes(int64(len(frame)))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := pglogrepl.Parse(frame); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func relationFrame(oid uint32, schema, name string, columns ...string) []byte {
	frame := binary.BigEndian.AppendUint32([]byte{'R'}, oid)
	frame = append(frame, schema+"\x00"+name+"\x00d"...)
	frame = binary.BigEndian.AppendUint16(frame, uint16(len(columns)))
	for _, column := range columns {
		frame = append(frame, "\x00"+column+"\x00\x00\x00\x00\x19\xff\xff\xff\xff"...) // text, no modifier
	}
	return frame
}

func insertFrame(oid uint32, values ...string) []byte {
	frame := append(binary.BigEndian.AppendUint32([]byte{'I'}, oid), 'N')
	frame = binary.BigEndian.AppendUint16(frame, uint16(len(values)))
	for _, value := range values {
		frame = binary.BigEndian.AppendUint32(append(frame, 't'), uint32(len(value)))
		frame = append(frame, value...)
	}
	return frame
}
