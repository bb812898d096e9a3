package outbox

import (
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/walhook/walhook/cdc"
)

// Past picks events of former times, as their tables still have them. What is empty picks all.
type Past struct {
	Since, Until time.Time // of the event: since included, until not
	IDs          []string
	Keys         []string
	Types        []Glob
	Tenants      []string
}

// Has tells whether an event is picked. One whose time nobody knows is in no span of time.
func (p *Past) Has(e *Event) bool {
	switch {
	case p.timed() && e.Time.IsZero(),
		!p.Since.IsZero() && e.Time.Before(p.Since),
		!p.Until.IsZero() && !e.Time.Before(p.Until),
		len(p.IDs) > 0 && !slices.Contains(p.IDs, e.ID),
		len(p.Keys) > 0 && !slices.Contains(p.Keys, e.Key),
		len(p.Tenants) > 0 && !slices.Contains(p.Tenants, e.Tenant),
		len(p.Types) > 0 && !slices.ContainsFunc(p.Types, func(g Glob) bool { return g.Match(e.Type) }):
		return false
	}
	return true
}

func (p *Past) timed() bool { return !p.Since.IsZero() || !p.Until.IsZero() }

// Narrow says which rows of a table can hold the events that are picked, as far as columns alone
// tell, and by which columns they are nearest to the order of their commits. It fails where a
// span of time is asked for and nothing tells the time of the table's events.
func (m *Mapper) Narrow(rel *cdc.Relation, p *Past) (where []cdc.Condition, order []string, err error) {
	plan := m.planOf(rel)
	switch {
	case plan.source == nil:
		return nil, nil, fmt.Errorf("no source is the table %s", tableText(rel.Schema, rel.Name))
	case plan.err != nil:
		return nil, nil, plan.err
	}
	column := func(at part) (string, origin) {
		o := plan.parts[at]
		if o.kind != fromColumn {
			return "", o
		}
		return rel.Columns[o.column].Name, o
	}
	equal := func(at part, values []string) {
		name, o := column(at)
		if name == "" || len(values) == 0 || slices.Contains(values, "") { // NULL is the empty text too
			return
		}
		if values, as := typed(values, o.oid); as != "" {
			where = append(where, cdc.Condition{Column: name, Is: cdc.Equal, Values: values, Type: as})
		}
	}

	if len(p.IDs) > 0 {
		ids := []string{}
		for _, id := range p.IDs {
			if rest, ok := strings.CutPrefix(id, plan.source.IDPrefix); ok {
				if own, err := url.PathUnescape(rest); err == nil && own != "" {
					ids = append(ids, own)
				}
			}
		}
		if len(ids) == 0 { // none of them is of this source
			ids = []string{p.IDs[0]}
		}
		equal(partID, ids)
	}
	equal(partKey, p.Keys)
	equal(partTenant, p.Tenants)
	if types, plain := plainGlobs(p.Types); plain {
		equal(partType, types)
	}

	name, at := column(partTime)
	if p.timed() {
		switch {
		case at.kind == nowhere, at.kind == fromValue:
			return nil, nil, fmt.Errorf("%s: nothing tells the time of its events; name their column in columns.time", plan.source.label())
		case name != "" && (at.oid == oidTimestamptz || at.oid == oidTimestamp || at.oid == oidDate):
			if !p.Since.IsZero() {
				where = append(where, cdc.Condition{Column: name, Is: cdc.From, Values: []string{timeText(p.Since)}, Type: cdc.AsTime})
			}
			if !p.Until.IsZero() { // a bit more: Postgres counts in microseconds
				where = append(where, cdc.Condition{Column: name, Is: cdc.Before, Values: []string{timeText(p.Until.Add(time.Microsecond))}, Type: cdc.AsTime})
			}
		}
	}
	switch serial := m.Serial(rel); {
	case serial != "":
		order = []string{serial}
	case name != "":
		order = []string{name}
	}
	return where, order, nil
}

func timeText(t time.Time) string {
	return t.UTC().Truncate(time.Microsecond).Format(time.RFC3339Nano)
}

// typed are values that a column of a type may hold, and as what they are compared; empty where
// they are better not compared by Postgres.
func typed(values []string, oid uint32) (sound []string, as string) {
	keep := func(ok func(string) bool) []string {
		return slices.DeleteFunc(slices.Clone(values), func(v string) bool { return !ok(v) })
	}
	switch {
	case isInteger(oid):
		return keep(func(v string) bool { _, err := strconv.ParseInt(v, 10, 64); return err == nil }), cdc.AsInteger
	case oid == oidUUID:
		return keep(isUUID), cdc.AsUUID
	case isText(oid):
		return keep(func(v string) bool { return strings.IndexByte(v, 0) < 0 }), cdc.AsText
	}
	return nil, ""
}

// isUUID tells whether s is a uuid as Postgres prints it.
func isUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i, c := range []byte(s) {
		if dash := i == 8 || i == 13 || i == 18 || i == 23; dash != (c == '-') || !dash && !strings.ContainsRune("0123456789abcdef", rune(c)) {
			return false
		}
	}
	return true
}

func plainGlobs(globs []Glob) (types []string, plain bool) {
	for _, g := range globs {
		text := g.String()
		if strings.ContainsAny(text, "*?") {
			return nil, false
		}
		types = append(types, text)
	}
	return types, true
}
