package cdc

import (
	"context"
	"fmt"
	"strings"
)

// selection is the query that reads rows of the table as text, as pgoutput prints them, in the
// order of the columns of rel. Among equals they are in the order of the table.
func (f *Found) selection(rel *Relation, where string, order ...string) string {
	columns := make([]string, len(rel.Columns))
	for i, c := range rel.Columns {
		columns[i] = quoteName(c.Name)
	}
	by := ""
	for _, name := range order {
		by += quoteName(name) + ", "
	}
	return "select " + strings.Join(columns, ", ") + " from " + f.from() + where + " order by " + by + "tableoid, ctid"
}

// Condition narrows what ReadTable reads. A row where the column is NULL meets none.
type Condition struct {
	Column string
	Is     Comparison
	Values []string // one, but for Equal
	Type   string   // as what the values are compared
}

// Comparison is how a Condition's column stands to its values.
type Comparison string

// The comparisons.
const (
	Equal  Comparison = "="  // to one of them
	From   Comparison = ">=" // it and what is more
	Before Comparison = "<"
)

// The types of a Condition.
const (
	AsText    = "text"
	AsInteger = "bigint"
	AsUUID    = "uuid"
	AsTime    = "timestamptz"
)

// sql is the condition with its values as parameter n.
func (c Condition) sql(n int) (string, any, error) {
	switch c.Type {
	case AsText, AsInteger, AsUUID, AsTime:
	default:
		return "", nil, fmt.Errorf("compare column %s: no such type", c.Column)
	}
	if c.Is == Equal {
		return fmt.Sprintf("%s = any($%d::text[]::%s[])", quoteName(c.Column), n, c.Type), c.Values, nil
	}
	return fmt.Sprintf("%s %s $%d::text::%s", quoteName(c.Column), c.Is, n, c.Type), c.Values[0], nil
}

// readBatch is how many rows of a table are in memory at once.
const readBatch = 100

// ReadTable reads the rows of a table that meet all conditions, as they are at one moment, in the
// order of the columns of these names. begun is told how many they are; then row is called for each, with
// the values that the stream would bring, but with no position and no time of its commit, which a
// table does not tell. row may take its time: the server keeps what it found aside, and no
// transaction is open meanwhile. The error is what row returned, or a *Fault.
func ReadTable(ctx context.Context, cfg *Config, f *Found, conditions []Condition, order []string, begun func(rows int64), row func(*Row) error) error {
	where := ""
	var args []any
	for i, c := range conditions {
		sql, arg, err := c.sql(i + 1)
		if err != nil {
			return err
		}
		where += map[bool]string{true: " where ", false: " and "}[i == 0] + sql
		args = append(args, arg)
	}
	conn, err := cfg.connectLong(ctx)
	if err != nil {
		return connectFault(err)
	}
	defer closeSQL(conn)
	rel := f.Relation()
	read := func(err error) error { return FaultOf(fmt.Errorf("read %s: %w", f.Table, err)) }
	tx, err := conn.Begin(ctx)
	if err != nil {
		return read(err)
	}
	if _, err := tx.Exec(ctx, "declare walhook_rows scroll cursor with hold for "+f.selection(rel, where, order...), args...); err != nil {
		return read(err)
	}
	if err := tx.Commit(ctx); err != nil { // here the server reads it all
		return read(err)
	}
	moved, err := conn.Exec(ctx, "move forward all in walhook_rows")
	if err != nil {
		return read(err)
	}
	if _, err := conn.Exec(ctx, "move absolute 0 in walhook_rows"); err != nil {
		return read(err)
	}
	begun(moved.RowsAffected())
	for {
		results, err := conn.PgConn().Exec(ctx, fmt.Sprintf("fetch %d from walhook_rows", readBatch)).ReadAll()
		if err != nil {
			return read(err)
		}
		for _, values := range results[0].Rows {
			if err := row(&Row{Relation: rel, Values: values}); err != nil {
				return err
			}
		}
		if len(results[0].Rows) < readBatch {
			return nil
		}
	}
}
