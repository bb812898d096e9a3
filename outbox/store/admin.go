package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/walhook/walhook/outbox"
)

// ErrNoSchema is what Ready answers where the tables that this program knows are not there.
var ErrNoSchema = errors.New("the schema walhook is not there, or older than this program")

const versionThere = `
select to_regclass('walhook.schema_migrations') is not null`

const versionNow = `
select coalesce(max(version), 0)
from walhook.schema_migrations`

// Ready tells whether the schema is of this program's version: nil, ErrNoSchema or ErrNewerSchema.
func (s *Store) Ready(ctx context.Context) error {
	there, version := false, 0
	err := s.plain(ctx, step{what: "look", sql: versionThere, row: func(r pgx.Rows) error { return r.Scan(&there) }})
	if err == nil && there {
		err = s.plain(ctx, step{what: "read", sql: versionNow, row: func(r pgx.Rows) error { return r.Scan(&version) }})
	}
	switch {
	case err != nil:
		return fmt.Errorf("read the version of schema walhook: %w", err)
	case version > SchemaVersion():
		return ErrNewerSchema
	case version < SchemaVersion():
		return ErrNoSchema
	}
	return nil
}

// Channel is where Nudge notifies.
const Channel = "walhook"

const nudge = `
select pg_notify('` + Channel + `', '')`

// Nudge has every walhook of this database look at once at what a command has changed in
// walhook.deliveries or walhook.endpoint_states, where it would look within 30 s.
func (s *Store) Nudge(ctx context.Context) error {
	if err := s.plain(ctx, step{what: "notify", sql: nudge}); err != nil {
		return fmt.Errorf("tell the running walhook: %w", err)
	}
	return nil
}

// Queue is what is stored for one endpoint.
type Queue struct {
	Parked int64
	Dead   int64
	Oldest time.Time // when the first of the parked was; zero where there is none
}

const queues = `
select
	coalesce(endpoint_id, ''), count(*) filter (where state <> 'dead'), count(*) filter (where state = 'dead'),
	min(created_at) filter (where state <> 'dead')
from walhook.deliveries
group by 1`

// Queues counts what is stored by endpoint. It reads all of walhook.deliveries.
func (s *Store) Queues(ctx context.Context) (map[string]Queue, error) {
	all := map[string]Queue{}
	err := s.plain(ctx, step{what: "count", sql: queues, row: func(r pgx.Rows) error {
		var (
			id     string
			q      Queue
			oldest pgtype.Timestamptz
		)
		err := r.Scan(&id, &q.Parked, &q.Dead, &oldest)
		q.Oldest = moment(oldest)
		all[id] = q
		return err
	}})
	if err != nil {
		return nil, fmt.Errorf("count deliveries: %w", err)
	}
	return all, nil
}

// Filter picks deliveries. What is zero picks all.
type Filter struct {
	IDs      []int64
	Endpoint string
	Event    string // its id
	Type     string // a glob
	Tenant   string
	NoTenant bool // only events without a tenant
	State    outbox.State
	Reason   outbox.Reason
	Since    time.Time // of when it was parked or died
}

// Empty tells whether the filter picks everything.
func (f *Filter) Empty() bool {
	return len(f.IDs) == 0 && f.Endpoint == "" && f.Event == "" && f.Type == "" && f.Tenant == "" && !f.NoTenant &&
		f.State == "" && f.Reason == "" && f.Since.IsZero()
}

// Record is a row of walhook.deliveries as people see it, with what its event is.
type Record struct {
	ID         int64
	EndpointID string // empty: a row that could not be mapped
	EventID    string
	State      outbox.State
	Reason     outbox.Reason
	Attempts   int
	Due        time.Time // zero waits for its turn, or is dead
	Status     int       // of the last answer; zero where there was none
	Detail     string    // of the last attempt
	Created    time.Time

	Type, Key, Tenant string
	Committed         time.Time
	Event             *outbox.Event // of Delivery alone; nil where it was deleted by hand
}

const selectRecords = `
select
	d.id, coalesce(d.endpoint_id, ''), d.event_id, d.state, d.reason, d.attempts, d.next_attempt_at,
	coalesce(d.last_status, 0), coalesce(d.last_error, ''), d.created_at,
	coalesce(e.type, ''), coalesce(e.key, ''), coalesce(e.tenant, ''), e.committed_at
from walhook.deliveries d
left join walhook.events e on e.id = d.event_id
where true`

// conditions are the filter in SQL, with their arguments.
func (f *Filter) conditions() (sql string, args []any) {
	var b strings.Builder
	add := func(condition string, arg any) {
		args = append(args, arg)
		fmt.Fprintf(&b, "\nand "+condition, len(args))
	}
	if len(f.IDs) > 0 {
		add("d.id = any($%d::bigint[])", f.IDs)
	}
	if f.Endpoint != "" {
		add("d.endpoint_id = $%d", clean(f.Endpoint))
	}
	if f.Event != "" {
		add("d.event_id = $%d", clean(f.Event))
	}
	if f.Type != "" {
		add("e.type like $%d", clean(like(f.Type)))
	}
	if f.Tenant != "" {
		add("e.tenant = $%d", clean(f.Tenant))
	}
	if f.NoTenant {
		b.WriteString("\nand e.tenant = ''")
	}
	if f.State != "" {
		add("d.state = $%d", clean(string(f.State)))
	}
	if f.Reason != "" {
		add("d.reason = $%d", clean(string(f.Reason)))
	}
	if !f.Since.IsZero() {
		add("d.created_at >= $%d", f.Since)
	}
	return b.String(), args
}

// like is a glob as SQL's like has it.
func like(glob string) string {
	return strings.NewReplacer(`\`, `\\`, "%", `\%`, "_", `\_`, "*", "%", "?", "_").Replace(glob)
}

// Records reads deliveries, at most limit: those behind an id in the order of their ids, or, where
// that is zero, the newest first. (Behind -1 are all.) more tells that there are others.
func (s *Store) Records(ctx context.Context, f Filter, after int64, limit int) (all []Record, more bool, err error) {
	where, args := f.conditions()
	sql := selectRecords + where
	if after == 0 {
		sql += "\norder by d.id desc"
	} else {
		args = append(args, after)
		sql += fmt.Sprintf("\nand d.id > $%d\norder by d.id", len(args))
	}
	args = append(args, limit+1)
	sql += fmt.Sprintf("\nlimit $%d", len(args))
	err = s.plain(ctx, step{what: "read", sql: sql, args: args, row: func(r pgx.Rows) error {
		var (
			d              Record
			due, committed pgtype.Timestamptz
		)
		err := r.Scan(&d.ID, &d.EndpointID, &d.EventID, &d.State, &d.Reason, &d.Attempts, &due,
			&d.Status, &d.Detail, &d.Created, &d.Type, &d.Key, &d.Tenant, &committed)
		d.Due, d.Created, d.Committed = moment(due), d.Created.UTC(), moment(committed)
		all = append(all, d)
		return err
	}})
	if err != nil {
		return nil, false, fmt.Errorf("read deliveries: %w", err)
	}
	if len(all) > limit {
		return all[:limit], true, nil
	}
	return all, false, nil
}

const selectEvent = `
select time, headers, headers_raw, data, raw, is_json, committed_at
from walhook.events
where id = $1`

// Delivery reads one delivery with its event; nil where there is none.
func (s *Store) Delivery(ctx context.Context, id int64) (*Record, error) {
	found, _, err := s.Records(ctx, Filter{IDs: []int64{id}}, 0, 1)
	if err != nil || len(found) == 0 {
		return nil, err
	}
	d := &found[0]
	err = s.plain(ctx, step{what: "read event", sql: selectEvent, args: []any{d.EventID}, row: func(r pgx.Rows) error {
		e := &outbox.Event{ID: d.EventID, Type: d.Type, Key: d.Key, Tenant: d.Tenant}
		var (
			headersRaw, raw []byte
			at, committed   pgtype.Timestamptz
		)
		err := r.Scan(&at, &e.Headers, &headersRaw, &e.Data, &raw, &e.JSON, &committed)
		if headersRaw != nil {
			e.Headers = headersRaw
		}
		if raw != nil {
			e.Data = raw
		}
		e.Time, e.Commit = moment(at), moment(committed)
		d.Event = e
		return err
	}})
	if err != nil {
		return nil, fmt.Errorf("read delivery: %w", err)
	}
	return d, nil
}

// What is dead begins anew. What is parked without a time waits for what comes before it in its
// key, and goes on doing so.
const retry = `
update walhook.deliveries
set
	state = 'parked',
	attempts = case when state = 'dead' then 0 else attempts end,
	next_attempt_at = case when state = 'parked' and next_attempt_at is null then null else now() end
where id = any($1::bigint[])
and endpoint_id is not null
and state in ('parked', 'dead')`

// Retry makes dead deliveries parked again, with all their attempts, and parked ones due now. It
// leaves alone what is being sent.
func (s *Store) Retry(ctx context.Context, ids []int64) (changed int64, err error) {
	err = s.plain(ctx, step{what: "update", sql: retry, args: []any{ids}, tag: func(t pgconn.CommandTag) { changed = t.RowsAffected() }})
	if err != nil {
		return 0, fmt.Errorf("retry deliveries: %w", err)
	}
	return changed, nil
}

const discard = `
delete from walhook.deliveries
where id = any($1::bigint[])
and state in ('parked', 'dead')`

// Discard deletes deliveries, and the events that no other delivery needs. It leaves alone what is
// being sent.
func (s *Store) Discard(ctx context.Context, all []Record) (deleted int64, err error) {
	ids, events := make([]int64, len(all)), make([]outbox.Change, len(all))
	for i, d := range all {
		ids[i] = d.ID
		events[i].Event = &outbox.Event{ID: d.EventID}
	}
	steps := append([]step{{what: "delete deliveries", sql: discard, args: []any{ids}, tag: func(t pgconn.CommandTag) { deleted = t.RowsAffected() }}},
		removeEventsSteps(events)...)
	if err := s.plain(ctx, steps...); err != nil {
		return 0, fmt.Errorf("discard deliveries: %w", err)
	}
	return deleted, nil
}
