package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
)

// RegistryTable is where an app registers endpoints.
var RegistryTable = cdc.Table{Schema: "walhook", Name: "endpoints"}

var _ outbox.Roll = (*Store)(nil)

// types reads what Postgres prints.
var types = pgtype.NewMap()

// Decode reads a row of walhook.endpoints as the stream has it. Columns that it does not know are left alone.
func (s *Store) Decode(rel *cdc.Relation, values [][]byte) (g outbox.Registration, err error) {
	if len(values) != len(rel.Columns) {
		return g, fmt.Errorf("walhook.endpoints: %d values for %d columns", len(values), len(rel.Columns))
	}
	for i, c := range rel.Columns {
		if values[i] == nil {
			continue
		}
		text := string(values[i])
		switch c.Name {
		case "id":
			g.ID = text
		case "url":
			g.URL = text
		case "tenant":
			g.Tenant = text
		case "filter":
			g.Filter = text
		case "settings":
			g.Settings = []byte(text)
		case "status":
			g.Status = outbox.Status(text)
		case "status_reason":
			g.StatusReason = text
		case "description":
			g.Description = text
		case "events":
			err = types.Scan(pgtype.TextArrayOID, pgtype.TextFormatCode, values[i], &g.Events)
		case "secrets":
			var secrets []string
			err = types.Scan(pgtype.TextArrayOID, pgtype.TextFormatCode, values[i], &secrets)
			g.Secrets = secretsOf(secrets)
		case "previous_secrets_until", "created_at":
			var at pgtype.Timestamptz
			err = types.Scan(pgtype.TimestamptzOID, pgtype.TextFormatCode, values[i], &at)
			if c.Name == "created_at" {
				g.Created = moment(at)
			} else {
				g.PreviousUntil = moment(at)
			}
		}
		if err != nil { // not with the value: it may be a secret
			return g, fmt.Errorf("walhook.endpoints: %s of %q cannot be read", c.Name, g.ID)
		}
	}
	if g.ID == "" {
		return g, errors.New("walhook.endpoints: a row without an id")
	}
	return g, nil
}

func secretsOf(texts []string) []outbox.Secret {
	all := make([]outbox.Secret, len(texts))
	for i, t := range texts {
		all[i] = outbox.Secret(t)
	}
	return all
}

const otherOwner = `
select coalesce(min(slot), '')
from walhook.checkpoints
where registry
and slot <> $1`

// Owner names another slot whose checkpoint says that it follows the registry.
func (s *Store) Owner(ctx context.Context) (slot string, err error) {
	err = s.plain(ctx, step{what: "read", sql: otherOwner, args: []any{s.slot}, row: func(r pgx.Rows) error { return r.Scan(&slot) }})
	if err != nil {
		return "", fmt.Errorf("read checkpoints: %w", err)
	}
	return slot, nil
}

const selectRegistrations = `
select
	id, url, tenant, events, coalesce(filter, ''), secrets, previous_secrets_until, settings::text, status, status_reason, description, created_at
from walhook.endpoints
order by created_at, id`

const selectVersions = `
select endpoint_id, commit_lsn::text, ordinal, content
from walhook.endpoint_versions
where slot = $1`

// Load reads the registrations there are, and the versions of them that are kept.
func (s *Store) Load(ctx context.Context) (all []outbox.Registration, versions []outbox.Version, err error) {
	err = s.plain(ctx,
		step{what: "endpoints", sql: selectRegistrations, row: func(r pgx.Rows) error {
			g, err := scanRegistration(r)
			all = append(all, g)
			return err
		}},
		step{what: "versions", sql: selectVersions, args: []any{s.slot}, row: func(r pgx.Rows) error {
			var v outbox.Version
			var commit string
			err := r.Scan(&v.EndpointID, &commit, &v.At.Ordinal, &v.Content)
			if err == nil {
				v.At.Commit, err = cdc.ParseLSN(commit)
			}
			versions = append(versions, v)
			return err
		}})
	if err != nil {
		return nil, nil, fmt.Errorf("read registry: %w", err)
	}
	return all, versions, nil
}

func scanRegistration(r pgx.Rows) (g outbox.Registration, err error) {
	var secrets []string
	var settings string
	var end, created pgtype.Timestamptz
	err = r.Scan(&g.ID, &g.URL, &g.Tenant, &g.Events, &g.Filter, &secrets, &end, &settings, &g.Status, &g.StatusReason, &g.Description, &created)
	g.Secrets, g.PreviousUntil, g.Settings, g.Created = secretsOf(secrets), moment(end), []byte(settings), moment(created)
	return g, err
}

const deleteVersions = `
delete from walhook.endpoint_versions
where slot = $1`

const insertVersions = `
insert into walhook.endpoint_versions (slot, endpoint_id, commit_lsn, ordinal, content)
select $1, c.endpoint_id, c.commit_lsn::pg_lsn, c.ordinal, c.content::json
from unnest($2::text[], $3::text[], $4::bigint[], $5::text[]) as c (endpoint_id, commit_lsn, ordinal, content)
on conflict (slot, endpoint_id, commit_lsn, ordinal) do update
	set content = excluded.content`

const setRegistry = `
update walhook.checkpoints
set registry = $2
where slot = $1`

func (s *Store) insertVersionsSteps(versions []outbox.Version) (steps []step) {
	for part := range chunks(versions, func(outbox.Version) int { return 0 }) {
		n := len(part)
		ids, commits, ordinals, contents := make([]string, n), make([]string, n), make([]int64, n), make([][]byte, n)
		for i, v := range part {
			ids[i], commits[i], ordinals[i], contents[i] = v.EndpointID, v.At.Commit.String(), int64(v.At.Ordinal), v.Content
		}
		steps = append(steps, step{what: "insert", sql: insertVersions, args: []any{s.slot, ids, commits, ordinals, contents}})
	}
	return steps
}

// Replace puts the versions in the place of all there are. With complete, the checkpoint says that
// every later one will be saved before it moves on.
func (s *Store) Replace(ctx context.Context, versions []outbox.Version, complete bool) error {
	steps := append([]step{{what: "delete", sql: deleteVersions, args: []any{s.slot}}}, s.insertVersionsSteps(versions)...)
	steps = append(steps, step{what: "update", sql: setRegistry, args: []any{s.slot, complete}})
	if err := s.held(ctx, steps...); err != nil {
		return fmt.Errorf("replace registry: %w", err)
	}
	return nil
}

// Save adds versions.
func (s *Store) Save(ctx context.Context, versions []outbox.Version) error {
	if len(versions) == 0 {
		return nil
	}
	if err := s.held(ctx, s.insertVersionsSteps(versions)...); err != nil {
		return fmt.Errorf("save registry: %w", err)
	}
	return nil
}

// A version is of use while a stream from the checkpoint on may come to rows before the next one.
const pruneVersions = `
delete from walhook.endpoint_versions v
using walhook.checkpoints c
where v.slot = $1
and c.slot = $1
and (
	v.content is null and v.commit_lsn < c.lsn
	or exists (
		select
		from walhook.endpoint_versions n
		where n.slot = $1
		and n.endpoint_id = v.endpoint_id
		and n.commit_lsn < c.lsn
		and (n.commit_lsn, n.ordinal) > (v.commit_lsn, v.ordinal)
	)
)`

// Prune drops the versions that no stream from the checkpoint on has use for.
func (s *Store) Prune(ctx context.Context) error {
	if err := s.held(ctx, step{what: "delete", sql: pruneVersions, args: []any{s.slot}}); err != nil {
		return fmt.Errorf("prune registry: %w", err)
	}
	return nil
}

const setStatus = `
with there as (
	select status, status_reason
	from walhook.endpoints
	where id = $1
	for update
), changed as (
	update walhook.endpoints
	set status = $2, status_reason = $3, updated_at = now()
	where id = $1
	and (status, status_reason) is distinct from ($2, $3)
	and ($4 = '' or status = $4)
	returning id
)
select (select count(*) from changed) + (
	select count(*)
	from there
	where $4 = '' or $4 = $2 and (status, status_reason) = ($2, $3)
)`

// Mark gives a registration a status in the place of another one; from empty is any. It fails with
// ErrNoEndpoint where none of that is seen: the stream may bring a row before it is visible to others.
func (s *Store) Mark(ctx context.Context, endpointID string, from, status outbox.Status, reason string) error {
	var seen int
	err := s.plain(ctx, step{
		what: "update", sql: setStatus, args: []any{endpointID, string(status), cleanDetail(reason, s.asciiOnly.Load()), string(from)},
		row: func(r pgx.Rows) error { return r.Scan(&seen) },
	})
	if err == nil && seen == 0 {
		err = outbox.ErrNoEndpoint
	}
	if err != nil {
		return fmt.Errorf("set status of endpoint: %w", err)
	}
	return nil
}

const findParked = `
select event_id
from walhook.deliveries
where endpoint_id = $1
and state in ('parked', 'sending')
and (commit_lsn, ordinal) < ($2::text::pg_lsn, $3::bigint)
order by commit_lsn, ordinal
limit $4`

// Drop discards what is parked for an endpoint of events before a position, and the content that nobody
// else needs.
func (s *Store) Drop(ctx context.Context, endpointID string, before cdc.Position) (total int64, err error) {
	endpointID = clean(endpointID)
	for {
		var gone []outbox.Change
		find := step{what: "find", sql: findParked, args: []any{endpointID, before.Commit.String(), int64(before.Ordinal), buryBatch}, row: func(r pgx.Rows) error {
			e := &outbox.Event{}
			gone = append(gone, outbox.Change{EndpointID: endpointID, Event: e, State: outbox.StateGone})
			return r.Scan(&e.ID)
		}}
		if err := s.plain(ctx, find); err != nil {
			return total, fmt.Errorf("discard deliveries: %w", err)
		}
		if len(gone) == 0 {
			return total, nil
		}
		var n int64
		steps := removeSteps(gone, func(t pgconn.CommandTag) { n += t.RowsAffected() })
		steps[0].begin = func() { n = 0 } // it may be begun again, after a deadlock
		if err := s.held(ctx, steps...); err != nil {
			return total, fmt.Errorf("discard deliveries: %w", err)
		}
		if total += n; len(gone) < buryBatch {
			return total, nil
		}
	}
}
