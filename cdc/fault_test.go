package cdc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

func TestEveryErrorIsAFault(t *testing.T) {
	pg := func(code, message string) error { return &pgconn.PgError{Code: code, Message: message} }
	for _, c := range []struct {
		err    error
		state  State
		reason string
		remedy bool
	}{
		{errShutdown, Connecting, "the replication connection ended", false},
		{errSilent, Connecting, "the replication connection ended", false},
		{errStalled, Waiting, "the buffer is full", true},
		{errTruncated, Waiting, "cannot read", true},
		{errMalformed, Waiting, "cannot read", true},
		{errUnknownMessage, Waiting, "cannot read", true},
		{errUnknownRelation, Waiting, "cannot read", true},
		{io.ErrUnexpectedEOF, Connecting, "Postgres closed the connection", false},
		{context.DeadlineExceeded, Connecting, "Postgres does not answer", false},
		{pg("55006", `replication slot "a" is active for PID 1`), Standby, "another process holds the slot", false},
		{pg("55006", `Replikations-Slot »a« ist aktiv für PID 1`), Standby, "another process holds the slot", false},
		{pg("57P01", ""), Connecting, "Postgres ended the connection", false},
		{pg("57P02", ""), Connecting, "Postgres ended the connection", false},
		{pg("57P03", ""), Connecting, "Postgres ended the connection", false},
		{pg("57014", ""), Connecting, "Postgres ended the connection", false},
		{pg("28P01", ""), Waiting, "refused the role or its password", true},
		{pg("28000", ""), Waiting, "refused the role or its password", true},
		{pg("3D000", ""), Waiting, "does not exist", false},
		{pg("42501", ""), Waiting, "a right is missing", true},
		{pg("53300", ""), Waiting, "no connection left", true},
		{pg("53400", ""), Waiting, "no replication slot left", true},
		{pg("42704", `publication "p" does not exist`), Waiting, "before the publication existed", false},
		{pg("55000", `logical decoding requires "wal_level" >= "logical"`), Waiting, "wal_level is not logical", true},
		{pg("55000", `can no longer access replication slot "a"`), Lost, "the slot is invalid", false},
		{pg("55000", `cannot read from logical replication slot "a"`), Lost, "the slot is invalid", false},
		{pg("22021", ""), Waiting, "as UTF-8", true},
		{pg("22P05", ""), Waiting, "as UTF-8", true},
		{pg("XX000", "invalid memory alloc request size 1200000003"), Waiting, "failed while decoding", true},
		{pg("53100", "no space left on device"), Connecting, "Postgres reported an error", false},
		{errors.New("anything"), Connecting, "the replication connection ended", false},
	} {
		f := FaultOf(fmt.Errorf("start replication: %w", c.err))
		require.Equal(t, c.state, f.State, "%v", c.err)
		require.Contains(t, f.Reason, c.reason, "%v", c.err)
		require.Equal(t, c.remedy, f.Remedy != "", "%v: %s", c.err, f.Remedy)
		require.False(t, f.Config, "%v", c.err)
		require.Same(t, f, FaultOf(fmt.Errorf("again: %w", f)))
	}
}

func TestConfirmedOfNothingIsAtOnce(t *testing.T) {
	s := New(Config{Logger: zap.NewNop()}, &sink{}, &sink{})
	require.NoError(t, s.Confirmed(t.Context()))
}

func TestMinorVersionsThatLoseRowsAreKnown(t *testing.T) {
	for version, loses := range map[int]bool{
		140017: true, 140018: false, 150012: true, 150013: false, 160008: true, 160009: false,
		170004: true, 170005: false, 180000: false, 190000: false,
	} {
		require.Equal(t, loses, losesOnAddTable(version), version)
	}
}

// PG 18 skips a publication that is gone, and says so in the language of lc_messages.
func TestNoticeOfSkippedEventsIsKnownInEveryLanguage(t *testing.T) {
	t.Parallel()
	require.True(t, fatalNotice(&pgconn.Notice{Message: `skipped loading publication "p"`}))
	require.True(t, fatalNotice(&pgconn.Notice{Message: `das Laden der Publikation »p« wurde übersprungen`, Routine: "LoadPublications"}))
	require.False(t, fatalNotice(&pgconn.Notice{Message: "checkpoint complete", Routine: "LogCheckpointEnd"}))
}

// Instances that start at once see the slot that one of them is making.
func TestASlotThatIsBeingMadeIsNoFault(t *testing.T) {
	cfg := Config{Slot: "s"}
	sv := &Survey{Version: 150000, Database: "d", WALLevel: "logical", Replication: true, Publication: &Publication{Insert: true}, Slot: &Slot{Name: "s", Database: "d"}}
	require.Nil(t, firstFault(sv.Findings(&cfg)))
	require.Equal(t, Connecting, sv.Judge(&cfg, nil, 1).State)
	sv.Slot.Database = "" // a physical one
	f := firstFault(sv.Findings(&cfg))
	require.NotNil(t, f)
	require.True(t, f.Config)
}
