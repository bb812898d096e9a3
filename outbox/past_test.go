package outbox

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc"
)

func TestPastHasExactlyWhatWasAskedFor(t *testing.T) {
	noon := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	e := &Event{ID: "o_1", Key: "k", Type: "order.paid", Tenant: "acme", Time: noon}
	for name, c := range map[string]struct {
		past Past
		want bool
	}{
		"nothing asked":       {Past{}, true},
		"since is included":   {Past{Since: noon}, true},
		"until is not":        {Past{Until: noon}, false},
		"between":             {Past{Since: noon.Add(-1), Until: noon.Add(1)}, true},
		"too late":            {Past{Since: noon.Add(1)}, false},
		"id":                  {Past{IDs: []string{"x", "o_1"}}, true},
		"another id":          {Past{IDs: []string{"1"}}, false},
		"key":                 {Past{Keys: []string{"k"}}, true},
		"another key":         {Past{Keys: []string{"K"}}, false},
		"tenant":              {Past{Tenants: []string{"acme"}}, true},
		"events without one":  {Past{Tenants: []string{""}}, false},
		"type by glob":        {Past{Types: []Glob{CompileGlob("order.*")}}, true},
		"one of the globs":    {Past{Types: []Glob{CompileGlob("x"), CompileGlob("*.paid")}}, true},
		"another type":        {Past{Types: []Glob{CompileGlob("order")}}, false},
		"all, but one misses": {Past{IDs: []string{"o_1"}, Keys: []string{"no"}}, false},
	} {
		require.Equal(t, c.want, c.past.Has(e), name)
	}
	require.False(t, (&Past{Until: noon}).Has(&Event{}), "an event whose time nobody knows")
	require.True(t, (&Past{}).Has(&Event{}))
}

func TestNarrowAsksTheTableForNoLessThanThePastHas(t *testing.T) {
	rel := &cdc.Relation{OID: 1, Schema: "public", Name: "outbox", Columns: []cdc.Column{
		{Name: "id", TypeOID: oidInt8},
		{Name: "type", TypeOID: oidText},
		{Name: "key", TypeOID: oidUUID},
		{Name: "payload", TypeOID: oidJSONB},
		{Name: "created_at", TypeOID: oidTimestamp},
		{Name: "who", TypeOID: oidText},
	}}
	m, err := NewMapper([]Source{{Table: "outbox", IDPrefix: "o_", Tenant: Column{Expr: "row.who"}}})
	require.NoError(t, err)
	at := time.Date(2026, 1, 1, 12, 0, 0, 1, time.FixedZone("", 3600))
	uuid := "0197c1f0-0000-7000-8000-000000000001"
	where, order, err := m.Narrow(rel, &Past{
		Since: at, Until: at, IDs: []string{"o_7", "7", "o_x"}, Keys: []string{uuid, "no uuid"}, Types: []Glob{CompileGlob("a")}, Tenants: []string{"acme"},
	})
	require.NoError(t, err)
	require.Equal(t, []string{"id"}, order)
	require.Equal(t, []cdc.Condition{
		{Column: "id", Is: cdc.Equal, Values: []string{"7"}, Type: cdc.AsInteger},
		{Column: "key", Is: cdc.Equal, Values: []string{uuid}, Type: cdc.AsUUID},
		{Column: "type", Is: cdc.Equal, Values: []string{"a"}, Type: cdc.AsText},
		{Column: "created_at", Is: cdc.From, Values: []string{"2026-01-01T11:00:00Z"}, Type: cdc.AsTime},
		{Column: "created_at", Is: cdc.Before, Values: []string{"2026-01-01T11:00:00.000001Z"}, Type: cdc.AsTime},
	}, where)

	where, _, err = m.Narrow(rel, &Past{Keys: []string{""}, Types: []Glob{CompileGlob("a.*")}})
	require.NoError(t, err)
	require.Empty(t, where, "an empty key may be NULL, and a glob is not for Postgres")

	rel.Columns[4].Name = "later"
	rel = &cdc.Relation{OID: 1, Schema: "public", Name: "outbox", Columns: rel.Columns}
	_, _, err = m.Narrow(rel, &Past{Since: at})
	require.ErrorContains(t, err, "nothing tells the time of its events")
	_, _, err = m.Narrow(rel, &Past{IDs: []string{"o_1"}})
	require.NoError(t, err)
}
