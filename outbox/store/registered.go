package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/walhook/walhook/outbox"
)

// What is in this file and in admin.go is done by commands, beside a walhook that runs: so it asks
// for no epoch, and never waits long for a lock.

// Registered is a row of walhook.endpoints.
type Registered struct {
	outbox.Registration
	CreatedAt time.Time
	UpdatedAt time.Time // also tells one version of the row from another
}

// What may become of a registered endpoint.
var (
	ErrTaken   = errors.New("there is an endpoint of that id already")
	ErrChanged = errors.New("the endpoint was changed or removed by somebody else meanwhile")
)

const selectRegistered = `
select
	id, url, tenant, events, coalesce(filter, ''), secrets, previous_secrets_until, settings::text,
	status, status_reason, description, created_at, updated_at
from walhook.endpoints
where $1 = '' or id = $1
order by id`

// Registered reads the registered endpoints, in the order of their ids: all of them, or the one of
// an id that is not empty.
func (s *Store) Registered(ctx context.Context, id string) ([]Registered, error) {
	var all []Registered
	err := s.plain(ctx, step{what: "read", sql: selectRegistered, args: []any{clean(id)}, row: func(r pgx.Rows) error {
		var (
			e        Registered
			secrets  []string
			until    pgtype.Timestamptz
			settings string
		)
		err := r.Scan(&e.ID, &e.URL, &e.Tenant, &e.Events, &e.Filter, &secrets, &until, &settings,
			&e.Status, &e.StatusReason, &e.Description, &e.CreatedAt, &e.UpdatedAt)
		for _, secret := range secrets {
			e.Secrets = append(e.Secrets, outbox.Secret(secret))
		}
		e.PreviousUntil, e.Settings = moment(until), json.RawMessage(settings)
		e.CreatedAt, e.UpdatedAt = e.CreatedAt.UTC(), e.UpdatedAt.UTC()
		all = append(all, e)
		return err
	}})
	if err != nil {
		return nil, fmt.Errorf("read endpoints: %w", err)
	}
	return all, nil
}

const insertRegistered = `
insert into walhook.endpoints
	(id, url, tenant, events, filter, secrets, previous_secrets_until, settings, status, status_reason, description)
values (
	coalesce(nullif($1, ''), 'ep_' || replace(gen_random_uuid()::text, '-', '')),
	$2, $3, $4::text[], nullif($5, ''), $6::text[], $7, $8::text::jsonb, $9, $10, $11
)
returning id, created_at, updated_at`

// Register inserts an endpoint and returns it with its id, which is made where it has none. It
// fails with ErrTaken where there is one of its id.
func (s *Store) Register(ctx context.Context, e Registered) (Registered, error) {
	err := s.plain(ctx, step{what: "insert", sql: insertRegistered, args: registeredArgs(e), row: func(r pgx.Rows) error {
		return r.Scan(&e.ID, &e.CreatedAt, &e.UpdatedAt)
	}})
	var refused *pgconn.PgError
	const unique = "23505"
	switch {
	case errors.As(err, &refused) && refused.Code == unique:
		return e, ErrTaken
	case err != nil:
		return e, fmt.Errorf("add endpoint: %w", err)
	}
	return e, nil
}

func registeredArgs(e Registered) []any {
	secrets := make([]string, len(e.Secrets))
	for i, secret := range e.Secrets {
		secrets[i] = secret.Reveal()
	}
	events := e.Events
	if events == nil {
		events = []string{}
	}
	return []any{
		e.ID, e.URL, e.Tenant, events, e.Filter, secrets, timestamp(e.PreviousUntil), string(e.Settings), e.Status, e.StatusReason, e.Description,
	}
}

const updateRegistered = `
update walhook.endpoints
set
	url = $2, tenant = $3, events = $4::text[], filter = nullif($5, ''), secrets = $6::text[], previous_secrets_until = $7,
	settings = $8::text::jsonb, status = $9, status_reason = $10, description = $11, updated_at = clock_timestamp()
where id = $1
and updated_at = $12
returning updated_at`

// UpdateRegistered writes an endpoint in the place of the version that it was read as. It fails
// with ErrChanged where that is not the present one.
func (s *Store) UpdateRegistered(ctx context.Context, e Registered) error {
	found := false
	err := s.plain(ctx, step{what: "update", sql: updateRegistered, args: append(registeredArgs(e), e.UpdatedAt), row: func(r pgx.Rows) error {
		found = true
		return r.Scan(&e.UpdatedAt)
	}})
	switch {
	case err != nil:
		return fmt.Errorf("change endpoint: %w", err)
	case !found:
		return ErrChanged
	}
	return nil
}

const deleteRegistered = `
delete from walhook.endpoints
where id = $1`

// Unregister removes an endpoint; what is parked for it is discarded by whoever runs.
func (s *Store) Unregister(ctx context.Context, id string) error {
	err := s.plain(ctx, step{what: "delete", sql: deleteRegistered, args: []any{id}})
	if err != nil {
		return fmt.Errorf("remove endpoint: %w", err)
	}
	return nil
}
