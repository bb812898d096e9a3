package cdc

import "time"

// Relation describes a published table as the server announced it. A change of the table
// makes a new Relation, so whoever has prepared something for one may keep it under the pointer.
type Relation struct {
	OID     uint32
	Schema  string
	Name    string
	Columns []Column
	Mirror  bool // it is Config.Mirror, so updates and deletes of it come too
}

// Column is one column of a Relation, in the order of a Row's Values.
type Column struct {
	Name    string
	TypeOID uint32
}

// Op is what a transaction did to a row.
type Op uint8

// The operations. All but Insert come of Config.Mirror alone.
const (
	Insert   Op = iota
	Update      // Old and Values
	Delete      // Old
	Truncate    // of all rows; neither
)

// Row is one committed insert, or one transactional logical message (then Relation is nil), or
// any change of Config.Mirror.
//
// Values, Old and Content alias the receive buffer: they hold until the call that brought the
// Row returns, and whoever keeps a byte of them copies it.
type Row struct {
	Position
	CommitTime time.Time // by the server's clock, to the microsecond
	Op         Op
	Relation   *Relation
	Values     [][]byte // text form, one for each column of Relation; nil is NULL
	Old        [][]byte // as Values, before the change: what the table's replica identity has, nil for the rest
	Partial    bool     // large values that did not change are missing, as the replica identity is not full
	Prefix     string   // of a logical message
	Content    []byte   // of a logical message
}
