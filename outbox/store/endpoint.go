package store

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walhook/walhook/outbox"
)

// EndpointState is a status that walhook itself gave to an endpoint of the file, which cannot
// say it: disabled by a 410, paused by a command. It outlives restarts.
type EndpointState struct {
	EndpointID string
	Status     outbox.Status
	Reason     string
	Since      time.Time
}

const loadEndpointStates = `
select endpoint_id, status, reason, since
from walhook.endpoint_states
order by endpoint_id`

// LoadEndpointStates reads all states.
func (s *Store) LoadEndpointStates(ctx context.Context) ([]EndpointState, error) {
	var all []EndpointState
	err := s.plain(ctx, step{what: "read", sql: loadEndpointStates, row: func(r pgx.Rows) error {
		var e EndpointState
		err := r.Scan(&e.EndpointID, &e.Status, &e.Reason, &e.Since)
		e.Since = e.Since.UTC()
		all = append(all, e)
		return err
	}})
	if err != nil {
		return nil, fmt.Errorf("load endpoint states: %w", err)
	}
	return all, nil
}

const saveEndpointState = `
insert into walhook.endpoint_states (endpoint_id, status, reason, since)
values ($1, $2, $3, $4)
on conflict (endpoint_id) do update
	set status = excluded.status, reason = excluded.reason, since = excluded.since`

// SaveEndpointState records the state in the place of an earlier one. Commands do it too, so
// it asks for no epoch.
func (s *Store) SaveEndpointState(ctx context.Context, e EndpointState) error {
	err := s.plain(ctx, step{what: "write", sql: saveEndpointState, args: []any{
		clean(e.EndpointID), clean(string(e.Status)), cleanDetail(e.Reason, s.asciiOnly.Load()), e.Since,
	}})
	if err != nil {
		return fmt.Errorf("save endpoint state: %w", err)
	}
	return nil
}

const deleteEndpointState = `
delete from walhook.endpoint_states
where endpoint_id = $1`

// DeleteEndpointState lets the file decide again. It does nothing where there is no state.
func (s *Store) DeleteEndpointState(ctx context.Context, endpointID string) error {
	err := s.plain(ctx, step{what: "delete", sql: deleteEndpointState, args: []any{clean(endpointID)}})
	if err != nil {
		return fmt.Errorf("delete endpoint state: %w", err)
	}
	return nil
}
