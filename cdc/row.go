package cdc

import "time"

// Relation describes a published table as the server announced it. A change of the table
// makes a new Relation, so whoever has prepared something for one may keep it under the pointer.
type Relation struct {
	OID     uint32
	Schema  string
	Name    string
	Columns []Column
}

// Column is one column of a Relation, in the order of a Row's Values.
type Column struct {
	Name    string
	TypeOID uint32
}

// Row is one committed insert, or one transactional logical message (then Relation is nil).
//
// Values and Content alias the receive buffer: they hold until the call that brought the
// Row returns, and whoever keeps a byte of them copies it.
type Row struct {
	Position
	CommitTime time.Time // by the server's clock, to the microsecond
	Relation   *Relation
	Values     [][]byte // text form, one for each column of Relation; nil is NULL
	Prefix     string   // of a logical message
	Content    []byte   // of a logical message
}
