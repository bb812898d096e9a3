package main

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc/pgtest"
)

func TestDropSlotLeavesNothingThatKeepsWAL(t *testing.T) {
	t.Parallel()
	s := newSite(t, pgtest.DB(t))
	s.runs(func() {})
	require.Equal(t, "1 slots, 2 publications", s.left())

	code, out, errs := s.walhook("drop-slot", "--wait", "10s")
	require.Equal(t, exitDone, code, out+errs)
	require.Contains(t, out, "✓ slot "+s.name+": dropped\n")
	require.Contains(t, out, "✓ publication "+s.name+": dropped\n")
	require.Contains(t, out, "✓ publication "+s.name+"_endpoints: dropped\n")
	require.Contains(t, out, "drop schema walhook cascade")
	require.Equal(t, "0 slots, 0 publications", s.left())
	require.Equal(t, "1", s.ask("select count(*)::text from walhook.checkpoints where slot = $1", s.name), "what is parked, and how far it was, stays")

	code, out, errs = s.walhook("drop-slot")
	require.Equal(t, exitDone, code, out+errs)
	require.Contains(t, out, "- slot "+s.name+": there is none\n")

	code, out, _ = s.walhook("check")
	require.Equal(t, exitFailed, code, "a start afterwards asks about the events in between")
	require.Contains(t, out, "--recover")
}

func TestDropSlotWaitsForWhoHoldsIt(t *testing.T) {
	t.Parallel()
	s := newSite(t, pgtest.DB(t))
	s.exec("select pg_create_logical_replication_slot('$slot', 'pgoutput'); create publication $slot for table public.outbox")
	holder := s.hold("walhook")

	code, out, errs := s.walhook("drop-slot", "--wait", "0s")
	require.Equal(t, exitFailed, code, out+errs)
	require.Contains(t, out, "is held by pid")
	require.Equal(t, "1 slots, 1 publications", s.left(), "nothing is dropped where the slot is not")

	dropped := make(chan int, 1)
	config := s.write()
	go func() {
		code, _, _ := walhook(t, "drop-slot", "--wait", "10m", "--config", config)
		dropped <- code
	}()
	require.NoError(t, holder.Close(context.Background()))
	require.Equal(t, exitDone, <-dropped)
	require.Equal(t, "0 slots, 0 publications", s.left())
}

func TestDropSlotTakesOnlyWhatIsItsOwn(t *testing.T) {
	t.Parallel()
	s := newSite(t, pgtest.DB(t))
	s.exec("select pg_create_logical_replication_slot('$slot', 'test_decoding'); create publication $slot for table public.outbox")
	s.restrict("replication")

	code, out, errs := s.walhook("drop-slot")
	require.Equal(t, exitUsage, code, out+errs)
	require.Contains(t, out, "test_decoding")
	require.Equal(t, "1 slots, 1 publications", s.left())

	s.exec("select pg_drop_replication_slot('$slot'); select pg_create_logical_replication_slot('$slot', 'pgoutput')")
	code, out, errs = s.walhook("drop-slot")
	require.Equal(t, exitDone, code, out+errs)
	require.Contains(t, out, "- publication "+s.name+": kept, it is not this role's")
	require.Contains(t, out, `drop publication if exists "`+s.name+`"`)
	require.Equal(t, "0 slots, 1 publications", s.left())

	s.cdc = ", create: false"
	code, out, errs = s.walhook("drop-slot")
	require.Equal(t, exitDone, code, out+errs)
	require.Contains(t, out, "cdc.create is false")
}

// left is what there is of the slot and its publications.
func (s *site) left() string {
	s.t.Helper()
	return s.ask(`select format('%s slots, %s publications',
		(select count(*) from pg_replication_slots where slot_name = $1),
		(select count(*) from pg_publication where starts_with(pubname, $1)))`, s.name)
}
