package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/walhook/walhook/cdc"
)

// readyz asks once.
func (p *program) readyz() (ready bool, h health) {
	p.t.Helper()
	code, body := p.get("/readyz")
	require.NoError(p.t, json.Unmarshal([]byte(body), &h), body)
	require.Contains(p.t, []int{http.StatusOK, http.StatusServiceUnavailable}, code)
	return code == http.StatusOK, h
}

// What keeps the slot from moving makes it unready, and says why, although every event is delivered.
func TestItIsUnreadyWhileTheSlotCannotMove(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	well, sick := newReceiver(t), newReceiver(t)
	p := start(t, b.config(endpoint("well", well, ""), endpoint("sick", sick, `, events: ["other"]`))).streaming()
	b.produce(1, 10, 2)
	requireAll(t, well, 10)
	ready, h := p.readyz()
	require.True(t, ready, h)

	// Nothing has to be parked here: checkpoints alone fail.
	b.exec(`create function no() returns trigger language plpgsql as $$ begin raise 'not today'; end $$`)
	b.exec(`create trigger no before insert or update on walhook.checkpoints for each row execute function no()`)
	b.produce(1, 10, 2)
	requireAll(t, well, 20)
	eventually(t, "it to be unready", func() bool { ready, h = p.readyz(); return !ready })
	require.Equal(t, "streaming", h.Status)
	require.Contains(t, h.Reason, "the checkpoint cannot be written")
	require.Contains(t, h.Reason, "not today")
	_, metrics := p.get("/metrics")
	require.NotContains(t, metrics, "\nwalhook_watermark_stuck_seconds 0\n")
	b.exec(`drop trigger no on walhook.checkpoints`)
	eventually(t, "it to be ready again", func() bool { ready, h = p.readyz(); return ready })
	_, metrics = p.get("/metrics")
	require.Contains(t, metrics, "\nwalhook_watermark_stuck_seconds 0\n")

	// Here a delivery can neither be sent nor parked.
	sick.Refuse()
	b.exec(`create trigger no before insert on walhook.deliveries for each row execute function no()`)
	b.exec(`insert into outbox (aggregateid, type, payload) values ('k', 'other', '{}')`)
	eventually(t, "it to be unready", func() bool { ready, h = p.readyz(); return !ready })
	require.Contains(t, h.Reason, "nothing can be parked")
	require.Contains(t, h.Reason, "not today")
	b.exec(`drop trigger no on walhook.deliveries`)

	// An endpoint that is down is no reason.
	eventually(t, "it to be parked", func() bool { return b.parked() == 1 })
	eventually(t, "it to be ready with a sick endpoint", func() bool { ready, h = p.readyz(); return ready })
	require.NoError(t, sick.Reopen())
	p.stop()
}

// Between two pipelines nobody holds the slot.
func TestItIsUnreadyWhenThePipelineHasEnded(t *testing.T) {
	s := newSidecar(mustLoad(t, threeLines, noEnv), &options{env: noEnv}, zap.NewNop())
	p, err := newPipeline(s.cfg, cdc.RecoverAsk, s.databaseURL, nil, s.log)
	require.NoError(t, err)
	s.now = p
	p.ended(fmt.Errorf("run: %w", cdc.ErrNewHistory))
	h := s.health()
	require.False(t, h.ready)
	require.Equal(t, string(cdc.Connecting), h.Status)
	require.Contains(t, h.Reason, cdc.ErrNewHistory.Error())
}

// A standby whose server has gone silent may be standing by for nobody.
func TestAStandbyIsReadyWhileTheServerAnswers(t *testing.T) {
	for _, c := range []struct {
		st   cdc.Status
		want bool
	}{
		{cdc.Status{State: cdc.Standby, Heard: time.Now()}, true},
		{cdc.Status{State: cdc.Standby, Heard: time.Now().Add(-silentAfter - time.Second)}, false},
	} {
		require.Equal(t, c.want, standsAlone(c.st) == "")
	}
}

// An older program in front of a schema that a newer one has migrated, as after a rollback.
func TestANewerSchemaIsCalledThat(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := newReceiver(t)
	config := b.config(endpoint("billing", rx, ""))
	start(t, config).streaming().stop()
	b.exec("insert into walhook.schema_migrations (version) values (999)")
	b.produce(1, 10, 2)
	p := start(t, config)
	p.log.line(t, `"level":"error"`, "waiting: the schema walhook is newer than this program: it is at version 999", remedyNewerSchema)
	ready, h := p.readyz()
	require.False(t, ready)
	require.Contains(t, h.Reason, "the schema walhook is newer than this program")
	require.Zero(t, rx.Count())

	b.exec("delete from walhook.schema_migrations where version = 999")
	requireAll(t, rx, 10)
}
