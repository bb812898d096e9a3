package outbox

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestRegistryMatchesTenantsFirstAndFailsClosed(t *testing.T) {
	of := func(id, tenant string, status Status, events ...string) *Endpoint {
		return &Endpoint{ID: id, Tenant: tenant, Status: status, Events: events}
	}
	r, err := NewRegistry([]*Endpoint{
		of("none", "", Enabled, "*"),
		of("all", "*", Enabled, "*"),
		of("acme", "acme", Enabled, "*"),
		of("orders", "acme", Enabled, "order.*", "refund"),
		of("paused", "acme", Paused, "*"),
		of("disabled", "acme", Disabled, "*"),
		of("nothing", "*", Enabled),
	})
	require.NoError(t, err)
	for _, c := range []struct {
		tenant, eventType string
		want              []string
	}{
		{"", "order.created", []string{"none", "all"}},
		{"acme", "order.created", []string{"all", "acme", "orders", "paused"}},
		{"acme", "refund", []string{"all", "acme", "orders", "paused"}},
		{"acme", "order", []string{"all", "acme", "paused"}},
		{"*", "order.created", []string{"all"}}, // a tenant of that name is no wildcard
		{"Acme", "order.created", []string{"all"}},
		{"acme2", "refund", []string{"all"}},
	} {
		ids := []string{}
		for _, e := range r.Match(c.tenant, c.eventType) {
			ids = append(ids, e.ID)
		}
		require.Equal(t, c.want, ids, "%s of %q", c.eventType, c.tenant)
	}
	require.Equal(t, "acme", r.Endpoint("acme").ID)
	require.Nil(t, r.Endpoint("Acme"))
	require.Len(t, r.Endpoints(), 7)
}

func TestRegistryRefusesOneIDForTwo(t *testing.T) {
	_, err := NewRegistry([]*Endpoint{{ID: "a"}, {ID: "b"}, {ID: "a"}})
	require.EqualError(t, err, `endpoint id "a" is used twice`)
}
