package cdc

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"time"
)

// What can be wrong with a message. Each means that the two sides do not speak the same
// language, or that bytes were lost; no row is to blame, and none may be skipped for it.
var (
	errTruncated       = errors.New("truncated message")
	errMalformed       = errors.New("malformed message")
	errUnknownMessage  = errors.New("unknown message")
	errUnknownRelation = errors.New("row of a relation that was not announced")
)

// kind says which message it is, and so which fields of it are set.
type kind uint8

const (
	kindSkipped  kind = iota // well-formed, and of no interest: Type, Origin, and changes of tables of which only inserts count
	kindBegin                // lsn, time, xid
	kindCommit               // lsn, endLSN, time
	kindRelation             // relation
	kindInsert               // relation, values
	kindChange               // op, relation, values, old: of the mirrored table
	kindMessage              // lsn, transactional, prefix, content
)

// message is one message of the stream. All that it points to, but for relation and prefix,
// holds until the decoder's next call, or until the caller changes the decoded bytes.
type message struct {
	kind          kind
	transactional bool      // or else sent at once, before and whether or not its transaction commits
	xid           uint32    // a label: it comes round again after 2^32 transactions
	lsn           LSN       // of the commit record, in Begin (that is still to come) and Commit; of a logical message itself
	endLSN        LSN       // behind the commit record
	time          time.Time // of the commit, by the server's clock
	op            Op
	partial       bool // a value that did not change was not sent
	relation      *Relation
	values        [][]byte
	old           [][]byte
	prefix        string
	content       []byte
}

// decoder reads the messages that the plugin pgoutput sends in protocol version 1, without
// streaming of open transactions, as the manual's chapter "Logical Replication Message
// Formats" has them (Postgres 14 to 18 send the same). It trusts no length and no count, so
// that no input makes it panic or allocate more than the input's own size suggests.
//
// The zero decoder is ready for a connection, and for no other one after it: the server
// announces each relation once to each.
type decoder struct {
	relations map[uint32]*Relation // by OID, as last announced
	mirror    Table                // of which every change counts; zero is none
	values    [][]byte             // lent to the last insert
	old       [][]byte             // lent to the last change
	prefix    string               // the last message's, because the next one's is likely the same
}

// decode reads the one message that data holds, neither less nor more.
func (d *decoder) decode(data []byte) (message, error) {
	if len(data) == 0 {
		return message{}, fmt.Errorf("decode: %w: it is empty", errTruncated)
	}
	var m message
	in := input{rest: data[1:]}
	switch data[0] {
	case 'B':
		m = message{kind: kindBegin, lsn: in.lsn(), time: in.time(), xid: in.uint32()}
	case 'C':
		in.take(1) // flags, unused
		m = message{kind: kindCommit, lsn: in.lsn(), endLSN: in.lsn(), time: in.time()}
	case 'I':
		d.insert(&in, &m)
	case 'R':
		d.relation(&in, &m)
	case 'M':
		d.message(&in, &m)
	case 'Y':
		in.take(4)      // OID
		in.terminated() // schema
		in.terminated() // name
	case 'O':
		in.take(8)      // LSN of the commit on the origin
		in.terminated() // name
	case 'U':
		d.update(&in, &m)
	case 'D':
		oid := in.uint32()
		in.expect(in.byte(), "KO")
		d.tuple(&in, &d.old)
		d.values = d.values[:0]
		d.change(&in, &m, Delete, oid)
	case 'T':
		relations := in.uint32()
		in.take(1) // CASCADE, RESTART IDENTITY
		d.values, d.old = d.values[:0], d.old[:0]
		for rest := in.take(4 * int64(relations)); len(rest) > 0; rest = rest[4:] {
			if oid := binary.BigEndian.Uint32(rest); m.kind == kindSkipped {
				d.change(&in, &m, Truncate, oid)
			}
		}
	default:
		return message{}, fmt.Errorf("decode: %w %q (0x%02x)", errUnknownMessage, data[0], data[0])
	}
	if in.err == nil && len(in.rest) > 0 {
		in.fail(fmt.Errorf("%w: %d bytes too many", errMalformed, len(in.rest)))
	}
	if in.err != nil {
		return message{}, fmt.Errorf("decode message %q: %w", data[0], in.err)
	}
	return m, nil
}

func (d *decoder) insert(in *input, m *message) {
	oid := in.uint32()
	in.expect(in.byte(), "N")
	unchanged := d.tuple(in, &d.values)
	if in.err != nil {
		return
	}
	relation := d.relations[oid]
	switch {
	case relation == nil:
		in.fail(fmt.Errorf("%w: OID %d", errUnknownRelation, oid))
	case len(d.values) != len(relation.Columns):
		in.fail(fmt.Errorf("%w: %d values for the %d columns of %s.%s", errMalformed,
			len(d.values), len(relation.Columns), relation.Schema, relation.Name))
	case unchanged:
		in.fail(fmt.Errorf("%w: a new row of %s.%s with an unchanged value", errMalformed, relation.Schema, relation.Name))
	}
	*m = message{kind: kindInsert, relation: relation, values: d.values}
}

// update reads the new row of an update, and before it the old one where the table's replica
// identity sends it. A large value that did not change is taken from there.
func (d *decoder) update(in *input, m *message) {
	oid := in.uint32()
	mark := in.byte()
	d.old = d.old[:0]
	if mark == 'K' || mark == 'O' { // the old key, or the whole old row
		d.tuple(in, &d.old)
		mark = in.byte()
	}
	in.expect(mark, "N")
	partial := false
	if d.tuple(in, &d.values) {
		for i, v := range d.values {
			if !isUnchanged(v) {
				continue
			}
			if d.values[i] = nil; i < len(d.old) {
				d.values[i] = d.old[i]
			}
			partial = partial || d.values[i] == nil
		}
	}
	if d.change(in, m, Update, oid); m.kind == kindChange {
		m.partial = partial
	}
}

// change fills in the message where the change is of the mirrored table.
func (d *decoder) change(in *input, m *message, op Op, oid uint32) {
	relation := d.relations[oid]
	if in.err != nil || relation == nil || !relation.Mirror {
		return
	}
	columns := len(relation.Columns)
	if op == Delete && len(d.old) != columns || op == Update && (len(d.values) != columns || len(d.old) != columns && len(d.old) != 0) {
		in.fail(fmt.Errorf("%w: %d and %d values for the %d columns of %s.%s", errMalformed,
			len(d.old), len(d.values), columns, relation.Schema, relation.Name))
	}
	*m = message{kind: kindChange, op: op, relation: relation, values: d.values, old: d.old}
}

// unchangedMark stands for a value that was not sent.
var unchangedMark = []byte{'u'}

func isUnchanged(v []byte) bool { return len(v) == 1 && &v[0] == &unchangedMark[0] }

// tuple reads a row's values and tells whether one is "unchanged", that is not sent; only the new
// row of an update may have such.
func (d *decoder) tuple(in *input, into *[][]byte) (unchanged bool) {
	*into = (*into)[:0]
	for columns := in.uint16(); columns > 0; columns-- {
		var value []byte
		switch mark := in.byte(); mark {
		case 't', 'b':
			value = in.take(int64(in.int32()))
		case 'n':
		case 'u':
			value, unchanged = unchangedMark, true
		default:
			in.expect(mark, "tbnu")
		}
		if in.err != nil {
			return false
		}
		*into = append(*into, value)
	}
	return unchanged
}

func (d *decoder) relation(in *input, m *message) {
	r := &Relation{OID: in.uint32(), Schema: string(in.terminated()), Name: string(in.terminated())}
	if r.Schema == "" {
		r.Schema = "pg_catalog"
	}
	in.take(1) // replica identity
	columns := int(in.uint16())
	const least = 1 + 1 + 4 + 4 // bytes for a column
	if in.err == nil && columns*least > len(in.rest) {
		in.fail(errTruncated)
	}
	if in.err != nil {
		return
	}
	r.Columns = make([]Column, 0, columns)
	for range columns {
		in.take(1) // flags: part of the key
		column := Column{Name: string(in.terminated()), TypeOID: in.uint32()}
		in.take(4) // type modifier
		r.Columns = append(r.Columns, column)
	}
	if in.err != nil || len(in.rest) > 0 { // decode tells of the latter
		return
	}
	if d.relations == nil {
		d.relations = make(map[uint32]*Relation)
	}
	r.Mirror = d.mirror.Name != "" && r.Schema == d.mirror.Schema && r.Name == d.mirror.Name
	d.relations[r.OID] = r
	*m = message{kind: kindRelation, relation: r}
}

func (d *decoder) message(in *input, m *message) {
	*m = message{kind: kindMessage, transactional: in.byte()&1 != 0, lsn: in.lsn()}
	if prefix := in.terminated(); string(prefix) != d.prefix {
		d.prefix = string(prefix)
	}
	m.prefix = d.prefix
	m.content = in.take(int64(in.int32()))
}

// input is what is left of a message. The first thing that is wrong stays in err, and
// everything read after it is zero.
type input struct {
	rest []byte
	err  error
}

func (in *input) fail(err error) {
	if in.err == nil {
		in.rest, in.err = nil, err
	}
}

// take is never nil but after a failure: an empty value is not NULL.
func (in *input) take(n int64) []byte {
	if n < 0 {
		in.fail(fmt.Errorf("%w: length %d", errMalformed, n))
		return nil
	}
	if n > int64(len(in.rest)) {
		in.fail(errTruncated)
		return nil
	}
	taken := in.rest[:n:n]
	in.rest = in.rest[n:]
	return taken
}

func (in *input) byte() byte {
	if b := in.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (in *input) uint16() uint16 {
	if b := in.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (in *input) uint32() uint32 {
	if b := in.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (in *input) uint64() uint64 {
	if b := in.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (in *input) int32() int32 { return int32(in.uint32()) }
func (in *input) lsn() LSN     { return LSN(in.uint64()) }

// time reads microseconds since the year 2000.
func (in *input) time() time.Time {
	const epoch = 946_684_800_000_000 // 2000-01-01, in microseconds since 1970
	micros := int64(in.uint64())
	if micros > math.MaxInt64-epoch {
		in.fail(fmt.Errorf("%w: a time beyond all calendars", errMalformed))
		return time.Time{}
	}
	return time.UnixMicro(micros + epoch).UTC()
}

// terminated reads up to a zero byte, and passes over it.
func (in *input) terminated() []byte {
	end := bytes.IndexByte(in.rest, 0)
	if end < 0 {
		in.fail(errTruncated)
		return nil
	}
	s := in.rest[:end]
	in.rest = in.rest[end+1:]
	return s
}

// expect holds a mark against those that may stand in its place.
func (in *input) expect(mark byte, allowed string) {
	if in.err == nil && bytes.IndexByte([]byte(allowed), mark) < 0 {
		in.fail(fmt.Errorf("%w: %q where one of %q belongs", errMalformed, mark, allowed))
	}
}
