package cdc

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
)

// LSN is a byte position in the write-ahead log, as Postgres' pg_lsn. Zero is no position
// at all and is never sent to a server.
type LSN uint64

// ParseLSN reads Postgres' text form, two hexadecimal numbers with a slash: 16/B374D848.
func ParseLSN(s string) (LSN, error) {
	hi, lo, ok := strings.Cut(s, "/")
	if !ok {
		return 0, fmt.Errorf("parse LSN %q: want two hexadecimal numbers with a slash", s)
	}
	h, err := strconv.ParseUint(hi, 16, 32)
	if err != nil {
		return 0, fmt.Errorf("parse LSN %q: %w", s, err)
	}
	l, err := strconv.ParseUint(lo, 16, 32)
	if err != nil {
		return 0, fmt.Errorf("parse LSN %q: %w", s, err)
	}
	return LSN(h<<32 | l), nil
}

// String is Postgres' text form of the position.
func (l LSN) String() string { return fmt.Sprintf("%X/%X", uint32(l>>32), uint32(l)) }

// Position places a row among all rows that ever committed: first by its transaction's
// commit, then by its turn inside that transaction. The LSN of the change itself does not
// order rows (transactions interleave in the WAL, and the rows of one COPY share one LSN),
// so it is not kept.
type Position struct {
	Commit  LSN    // where the commit record of the row's transaction begins
	Ordinal uint64 // the row's turn among the rows we receive of its transaction, from 1
}

// Compare is negative where p comes before q, zero where they are one position.
func (p Position) Compare(q Position) int {
	if c := cmp.Compare(p.Commit, q.Commit); c != 0 {
		return c
	}
	return cmp.Compare(p.Ordinal, q.Ordinal)
}

// String is the commit's LSN and the ordinal with a colon: 16/B374D848:3.
func (p Position) String() string { return p.Commit.String() + ":" + strconv.FormatUint(p.Ordinal, 10) }

// ParsePosition reads what String writes.
func ParsePosition(s string) (p Position, err error) {
	lsn, ordinal, ok := strings.Cut(s, ":")
	if !ok {
		return p, fmt.Errorf("parse position %q: want an LSN and a number with a colon", s)
	}
	if p.Commit, err = ParseLSN(lsn); err != nil {
		return Position{}, err
	}
	if p.Ordinal, err = strconv.ParseUint(ordinal, 10, 64); err != nil {
		return Position{}, fmt.Errorf("parse position %q: %w", s, err)
	}
	return p, nil
}
