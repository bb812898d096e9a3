package store

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc/pgtest"
	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/outbox/outboxtest"
)

func TestReadyTellsWhatIsMissing(t *testing.T) {
	b := empty(t, pgtest.DB(t))
	require.ErrorIs(t, b.Ready(t.Context()), ErrNoSchema)
	require.NoError(t, b.Migrate(t.Context()))
	require.NoError(t, b.Ready(t.Context()))
	b.exec("insert into walhook.schema_migrations (version) values (9999)")
	require.ErrorIs(t, b.Ready(t.Context()), ErrNewerSchema)
}

func TestRegisteredEndpointsAreKeptAsGiven(t *testing.T) {
	b := setup(t)
	until := time.Now().Add(time.Hour).Truncate(time.Microsecond).UTC()
	in := Registered{Registration: outbox.Registration{
		URL: "https://a.example/ü?x=1", Tenant: "acme", Events: []string{"a.*", "b,\"c"}, Filter: "true",
		Secrets: []outbox.Secret{"whsec_YQ==", "whsec_Yg=="}, PreviousUntil: until,
		Settings: json.RawMessage(`{"timeout": "3s"}`), Status: "enabled", Description: "it's",
	}}
	made, err := b.Register(t.Context(), in)
	require.NoError(t, err)
	require.Regexp(t, "^ep_[0-9a-f]{32}$", made.ID)
	all, err := b.Registered(t.Context(), "")
	require.NoError(t, err)
	made.CreatedAt, made.UpdatedAt = made.CreatedAt.UTC(), made.UpdatedAt.UTC()
	require.Equal(t, []Registered{made}, all)
	_, err = b.Register(t.Context(), made)
	require.ErrorIs(t, err, ErrTaken)

	changed := all[0]
	changed.Status = "paused"
	require.NoError(t, b.UpdateRegistered(t.Context(), changed))
	require.ErrorIs(t, b.UpdateRegistered(t.Context(), changed), ErrChanged, "it is another version now")
	all, err = b.Registered(t.Context(), made.ID)
	require.NoError(t, err)
	require.Equal(t, outbox.Paused, all[0].Status)
	require.NoError(t, b.Unregister(t.Context(), made.ID))
	all, err = b.Registered(t.Context(), "")
	require.NoError(t, err)
	require.Empty(t, all)
}

func TestEndpointMadeByPlainSQLIsRead(t *testing.T) {
	b := setup(t)
	b.exec("insert into walhook.endpoints (id, url) values ('plain', 'https://a.example')")
	all, err := b.Registered(t.Context(), "plain")
	require.NoError(t, err)
	require.Equal(t, []string{"*"}, all[0].Events)
	require.Len(t, all[0].Secrets, 1)
	require.JSONEq(t, "{}", string(all[0].Settings))
	require.Zero(t, all[0].PreviousUntil)
}

// stored writes a parked, a dead and a sending delivery of endpoint a, and one of b for the first event.
func stored(t *testing.T, b *bundle) {
	t.Helper()
	event := outboxtest.Event
	dead := outboxtest.Park("a", event(2, "k"))
	dead.State, dead.Attempts, dead.Status, dead.Detail, dead.Reason = outbox.StateDead, 11, 500, "500 Internal Server Error", outbox.ReasonStatus
	sending := outboxtest.Park("a", event(3, "k"))
	sending.State = outbox.StateSending
	due := outboxtest.Park("a", event(4, "k"))
	due.Due = time.Now().Add(time.Hour)
	require.NoError(t, b.Write(t.Context(), []outbox.Change{
		outboxtest.Park("a", event(1, "")), dead, sending, due, outboxtest.Park("b", event(1, "")),
	}))
}

func TestRecordsAreFiltered(t *testing.T) {
	b := setup(t)
	stored(t, b)
	n := func(f Filter) int {
		all, more, err := b.Records(t.Context(), f, -1, 10)
		require.NoError(t, err)
		require.False(t, more)
		return len(all)
	}
	e := outboxtest.Event(1, "")
	require.Equal(t, 5, n(Filter{}))
	require.Equal(t, 4, n(Filter{Endpoint: "a"}))
	require.Equal(t, 2, n(Filter{Event: e.ID}))
	require.Equal(t, 1, n(Filter{State: outbox.StateDead}))
	require.Equal(t, 1, n(Filter{Reason: outbox.ReasonStatus}))
	require.Equal(t, 5, n(Filter{Type: e.Type[:2] + "*"}))
	require.Equal(t, 0, n(Filter{Type: "%"}))
	require.Equal(t, 0, n(Filter{Since: time.Now().Add(time.Hour)}))
	require.Equal(t, 0, n(Filter{Tenant: "nobody"}))
	newest, more, err := b.Records(t.Context(), Filter{}, 0, 2)
	require.NoError(t, err)
	require.True(t, more)
	require.Greater(t, newest[0].ID, newest[1].ID)
	d, err := b.Delivery(t.Context(), newest[0].ID)
	require.NoError(t, err)
	require.Equal(t, outboxtest.Event(1, "").Data, d.Event.Data)
	none, err := b.Delivery(t.Context(), 1<<60)
	require.NoError(t, err)
	require.Nil(t, none)
}

func TestRetryAndDiscardLeaveAloneWhatIsBeingSent(t *testing.T) {
	b := setup(t)
	stored(t, b)
	all, _, err := b.Records(t.Context(), Filter{Endpoint: "a"}, -1, 10)
	require.NoError(t, err)
	var ids []int64
	for _, d := range all {
		ids = append(ids, d.ID)
	}
	n, err := b.Retry(t.Context(), ids)
	require.NoError(t, err)
	require.EqualValues(t, 3, n)
	all, _, err = b.Records(t.Context(), Filter{Endpoint: "a"}, -1, 10)
	require.NoError(t, err)
	require.Equal(t, outbox.StateParked, all[0].State)
	require.Zero(t, all[0].Due, "it waits for its turn as before")
	require.Equal(t, outbox.StateParked, all[1].State)
	require.Zero(t, all[1].Attempts)
	require.Equal(t, 500, all[1].Status, "the last answer is kept")
	require.WithinDuration(t, time.Now(), all[1].Due, time.Minute)
	require.Equal(t, outbox.StateSending, all[2].State)
	require.WithinDuration(t, time.Now(), all[3].Due, time.Minute)

	n, err = b.Discard(t.Context(), all)
	require.NoError(t, err)
	require.EqualValues(t, 3, n)
	require.Equal(t, 2, b.count("deliveries"))
	require.Equal(t, 2, b.count("events"), "the one being sent, and the one that endpoint b needs")
	queues, err := b.Queues(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 1, queues["a"].Parked)
	require.EqualValues(t, 1, queues["b"].Parked)
	require.NotZero(t, queues["b"].Oldest)
}
