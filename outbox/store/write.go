package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/walhook/walhook/outbox"
)

// A statement takes at most so many rows and bytes of content, so that neither the message nor
// an array in the server's memory gets large. A Write of more has more statements, in the same
// transaction and round trip.
const (
	chunkRows  = 4000
	chunkBytes = 8 << 20
)

// WriteInParts inserts so many events, or deliveries, or updates so many, at once as take Postgres a quarter of a millisecond where
// an event has a kilobyte, or as many as make mostParts parts: a half of that is what an insert costs whatever is in it.
const (
	partEvents  = 3
	partRows    = 9
	partUpdates = 4
	mostParts   = 8
)

// Write applies the changes in one durable transaction. They name each endpoint and event at
// most once, so their order among each other is of no consequence but for the new rows' ids.
func (s *Store) Write(ctx context.Context, changes []outbox.Change) error {
	if len(changes) == 0 {
		return nil
	}
	inserts, updates, gone := split(changes)
	ascii := s.asciiOnly.Load()
	rest := slices.Concat(updateSteps(updates, ascii), removeSteps(gone, nil), noticeSteps(changes))
	var err error
	many := len(inserts) >= s.copyRows
	if many {
		err = s.held(ctx, append(copySteps(inserts, ascii), rest...)...)
	}
	if !many || errors.Is(err, errNotCopied) {
		err = s.held(ctx, append(insertSteps(inserts, ascii), rest...)...)
	}
	if err != nil {
		return fmt.Errorf("write deliveries: %w", err)
	}
	return nil
}

// WriteInParts inserts and updates in many small statements, with a pause before each. What is gone is removed in one piece: so its
// rows are locked in the order in which others lock them.
func (s *Store) WriteInParts(ctx context.Context, changes []outbox.Change, pause func() bool) error {
	if len(changes) == 0 {
		return nil
	}
	if !pause() || len(changes) <= s.partRows {
		return s.Write(ctx, changes)
	}
	inserts, updates, gone := split(changes)
	ascii := s.asciiOnly.Load()
	var steps []step
	events := eventsOf(inserts)
	for part := range slices.Chunk(events, max(s.partEvents, atMostParts(len(events)))) {
		steps = append(steps, step{pause: pause}, insertEventsStep(part, ascii))
	}
	for part := range slices.Chunk(inserts, max(s.partRows, atMostParts(len(inserts)))) {
		steps = append(steps, step{pause: pause}, insertDeliveriesStep(part, ascii))
	}
	for part := range slices.Chunk(updateSteps(updates, ascii), max(s.partUpdates, atMostParts(len(updates)))) {
		steps = append(append(steps, step{pause: pause}), part...)
	}
	steps = append(append(steps, step{pause: pause}), removeSteps(gone, nil)...)
	if err := s.held(ctx, append(steps, noticeSteps(changes)...)...); err != nil {
		return fmt.Errorf("write deliveries: %w", err)
	}
	return nil
}

// atMostParts is how many of n there are in each of mostParts parts.
func atMostParts(n int) int { return (n + mostParts - 1) / mostParts }

// noticeSteps write the changes' notices into the WAL.
func noticeSteps(changes []outbox.Change) (steps []step) {
	var notices [][]byte
	for _, c := range changes {
		if c.Notice != nil {
			notices = append(notices, c.Notice)
		}
	}
	if len(notices) > 0 {
		steps = append(steps, emitStep(notices))
	}
	return steps
}

// split sorts changes by what is to be done, without a copy where it is the same for all.
func split(changes []outbox.Change) (inserts, updates, gone []outbox.Change) {
	into := func(c *outbox.Change) *[]outbox.Change {
		switch {
		case c.State == outbox.StateGone: // also of a new one: an earlier write of it may have been applied
			return &gone
		case c.Insert:
			return &inserts
		default:
			return &updates
		}
	}
	first := into(&changes[0])
	if !slices.ContainsFunc(changes, func(c outbox.Change) bool { return into(&c) != first }) {
		*first = changes
		return inserts, updates, gone
	}
	for i := range changes {
		to := into(&changes[i])
		*to = append(*to, changes[i])
	}
	return inserts, updates, gone
}

// contentsOf are the events of changes by their ids.
func contentsOf(changes []outbox.Change) map[string]*outbox.Event {
	contents := make(map[string]*outbox.Event, len(changes))
	for _, c := range changes {
		if id := clean(c.Event.ID); contents[id] == nil {
			contents[id] = c.Event
		}
	}
	return contents
}

// eventsOf are the events of changes in the order of their ids, as they are locked when they are removed.
func eventsOf(changes []outbox.Change) []*outbox.Event {
	contents := contentsOf(changes)
	events := make([]*outbox.Event, 0, len(contents))
	for _, id := range slices.Sorted(maps.Keys(contents)) {
		events = append(events, contents[id])
	}
	return events
}

// insertSteps insert new deliveries, and their events.
func insertSteps(inserts []outbox.Change, ascii bool) (steps []step) {
	for part := range chunks(eventsOf(inserts), contentSize) {
		steps = append(steps, insertEventsStep(part, ascii))
	}
	for part := range chunks(inserts, noSize) {
		steps = append(steps, insertDeliveriesStep(part, ascii))
	}
	return steps
}

func contentSize(e *outbox.Event) int { return len(e.Headers) + len(e.Data) }

// noSize is for what has no content worth counting.
func noSize[E any](E) int { return 0 }

// chunks cuts all into parts of at most chunkRows and, beyond a part's first, chunkBytes.
func chunks[E any](all []E, size func(E) int) func(yield func([]E) bool) {
	return func(yield func([]E) bool) {
		for len(all) > 0 {
			n, sum := 1, size(all[0])
			for n < len(all) && n < chunkRows && sum+size(all[n]) <= chunkBytes {
				sum += size(all[n])
				n++
			}
			if !yield(all[:n]) {
				return
			}
			all = all[n:]
		}
	}
}

// An event that is there already is not changed but locked, so that whoever removes the last
// delivery of it meanwhile waits, and then sees ours.
const insertEvents = `
insert into walhook.events
	(id, type, key, tenant, time, headers, headers_raw, data, raw, is_json, bytes, commit_lsn, ordinal, committed_at)
select
	c.id, c.type, c.key, c.tenant, c.time, c.headers::json, c.headers_raw, c.data, c.raw, c.is_json, c.bytes,
	c.commit_lsn::pg_lsn, c.ordinal, c.committed_at
from unnest(
	$1::text[], $2::text[], $3::text[], $4::text[], $5::timestamptz[], $6::text[], $7::bytea[], $8::text[], $9::bytea[],
	$10::boolean[], $11::int[], $12::text[], $13::bigint[], $14::timestamptz[]
) as c (id, type, key, tenant, time, headers, headers_raw, data, raw, is_json, bytes, commit_lsn, ordinal, committed_at)
on conflict (id) do update
	set type = excluded.type
	where false`

func insertEventsStep(events []*outbox.Event, ascii bool) step {
	n := len(events)
	var (
		id, typ, key, tenant = make([]string, n), make([]string, n), make([]string, n), make([]string, n)
		headers, headersRaw  = make([][]byte, n), make([][]byte, n)
		data, raw            = make([][]byte, n), make([][]byte, n)
		isJSON               = make([]bool, n)
		size                 = make([]int32, n)
		commitLSN            = make([]string, n)
		ordinal              = make([]int64, n)
		at, committed        = make([]pgtype.Timestamptz, n), make([]pgtype.Timestamptz, n)
	)
	for i, e := range events {
		id[i], typ[i], key[i], tenant[i] = clean(e.ID), clean(e.Type), clean(e.Key), clean(e.Tenant)
		at[i], committed[i] = timestamp(e.Time), timestamp(e.Commit)
		headers[i], headersRaw[i], data[i], raw[i] = contentColumns(e, ascii)
		isJSON[i], size[i] = e.JSON, int32(contentSize(e))
		commitLSN[i], ordinal[i] = e.Position.Commit.String(), int64(e.Position.Ordinal)
	}
	return step{what: "insert events", sql: insertEvents, args: []any{
		id, typ, key, tenant, at, headers, headersRaw, data, raw, isJSON, size, commitLSN, ordinal, committed,
	}}
}

// contentColumns are what stands in the columns of an event's content; nil is NULL.
func contentColumns(e *outbox.Event, ascii bool) (headers, headersRaw, data, raw []byte) {
	if isHeaders(e.Headers, ascii) {
		headers = e.Headers
	} else if len(e.Headers) > 0 {
		headersRaw = e.Headers
	}
	if isText(e.Data, ascii) {
		data = notNil(e.Data)
	} else {
		raw = e.Data
	}
	return headers, headersRaw, data, raw
}

// notNil keeps an empty payload from being stored as none.
func notNil(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}

// timestamp is null for the zero time.
func timestamp(t time.Time) pgtype.Timestamptz {
	return pgtype.Timestamptz{Time: t, Valid: !t.IsZero()}
}

const insertDeliveries = `
insert into walhook.deliveries
	(endpoint_id, event_id, order_key, state, reason, attempts, next_attempt_at, last_status, last_error, commit_lsn, ordinal)
select
	nullif(c.endpoint_id, ''), c.event_id, c.order_key, c.state, c.reason, c.attempts, c.next_attempt_at,
	nullif(c.status, 0), nullif(c.detail, ''), c.commit_lsn::pg_lsn, c.ordinal
from unnest(
	$1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::int[], $7::timestamptz[], $8::int[], $9::text[],
	$10::text[], $11::bigint[]
) as c (endpoint_id, event_id, order_key, state, reason, attempts, next_attempt_at, status, detail, commit_lsn, ordinal)
on conflict (event_id, coalesce(endpoint_id, '')) do nothing`

func insertDeliveriesStep(changes []outbox.Change, ascii bool) step {
	n := len(changes)
	orderKey, commitLSN, ordinal := make([]string, n), make([]string, n), make([]int64, n)
	for i, c := range changes {
		orderKey[i] = clean(c.OrderKey)
		commitLSN[i], ordinal[i] = c.Event.Position.Commit.String(), int64(c.Event.Position.Ordinal)
	}
	r := newRows(changes, ascii)
	return step{what: "insert deliveries", sql: insertDeliveries, args: []any{
		r.endpoint, r.event, orderKey, r.state, r.reason, r.attempts, r.due, r.status, r.detail, commitLSN, ordinal,
	}}
}

// What the last attempt met stays until another attempt has met something.
//
// It is a statement for each row, all sent at once. As one statement it would be a join, and
// against a table whose statistics are of a quieter hour Postgres may read all of it for each row.
const updateDelivery = `
update walhook.deliveries
set
	state = $3,
	reason = coalesce(nullif($4, ''), reason),
	attempts = $5,
	next_attempt_at = $6,
	last_status = case when $7 = 0 and $8 = '' then last_status else nullif($7, 0) end,
	last_error = case when $7 = 0 and $8 = '' then last_error else nullif($8, '') end
where event_id = $2
and coalesce(endpoint_id, '') = $1`

func updateSteps(changes []outbox.Change, ascii bool) []step {
	r, steps := newRows(changes, ascii), make([]step, len(changes))
	for i := range changes {
		steps[i] = step{what: "update delivery", sql: updateDelivery, args: []any{
			r.endpoint[i], r.event[i], r.state[i], r.reason[i], r.attempts[i], r.due[i], r.status[i], r.detail[i],
		}}
	}
	return steps
}

// rows are changes turned by a quarter: one array a column.
type rows struct {
	endpoint, event, state, reason, detail []string
	attempts, status                       []int32
	due                                    []pgtype.Timestamptz
}

func newRows(changes []outbox.Change, ascii bool) rows {
	n := len(changes)
	r := rows{
		endpoint: make([]string, n), event: make([]string, n), state: make([]string, n), reason: make([]string, n),
		detail: make([]string, n), attempts: make([]int32, n), status: make([]int32, n), due: make([]pgtype.Timestamptz, n),
	}
	for i, c := range changes {
		r.endpoint[i], r.event[i] = clean(c.EndpointID), clean(c.Event.ID)
		r.state[i], r.reason[i] = string(c.State), clean(string(c.Reason))
		r.attempts[i], r.status[i], r.detail[i] = int32(c.Attempts), int32(c.Status), cleanDetail(c.Detail, ascii)
		r.due[i] = dueColumn(&c)
	}
	return r
}

// dueColumn is null for what is dead, or waits for its turn.
func dueColumn(c *outbox.Change) pgtype.Timestamptz {
	if c.State == outbox.StateDead {
		return pgtype.Timestamptz{}
	}
	return timestamp(c.Due)
}

// ownStatement is how many deliveries of an endpoint are deleted in a statement of their own, rather than
// pair by pair.
const ownStatement = 16

// In the order of the index the look-ups cost a half: Postgres sorts an array itself, pairs are sorted by us.
const deleteOfEndpoint = `
delete from walhook.deliveries
where event_id = any($2::text[])
and coalesce(endpoint_id, '') = $1`

// Each row is looked up by itself, and the rows then by their ids. As a join it would invite
// Postgres to read the whole table for each of them, where its statistics are of a quieter hour.
const deleteDeliveries = `
delete from walhook.deliveries
where id = any(array(
	select d.id
	from unnest($1::text[], $2::text[]) as c (endpoint_id, event_id)
	cross join lateral (
		select id
		from walhook.deliveries
		where event_id = c.event_id
		and coalesce(endpoint_id, '') = c.endpoint_id
		limit 1
	) d
))`

// An event is locked before it is asked whether a delivery needs it, and in a statement of its
// own: the next one then sees the deliveries of all who had the lock before us.
const lockEvents = `
select count(*)
from (
	select
	from walhook.events
	where id = any($1::text[])
	order by id
	for update
) locked`

// The sublink is asked for each row that the index gives. A join would be an invitation here too.
const deleteEvents = `
delete from walhook.events e
where id = any($1::text[])
and (
	select true
	from walhook.deliveries
	where event_id = e.id
	limit 1
) is null`

// removeSteps delete deliveries, and the events that nobody else needs. tag, if any, is told of each statement that
// deletes deliveries.
func removeSteps(gone []outbox.Change, tag func(pgconn.CommandTag)) (steps []step) {
	if len(gone) == 0 {
		return nil
	}
	byEndpoint := map[string][]string{}
	for _, c := range gone {
		endpoint := clean(c.EndpointID)
		byEndpoint[endpoint] = append(byEndpoint[endpoint], clean(c.Event.ID))
	}
	var pairs [][2]string // event, endpoint
	for _, endpoint := range slices.Sorted(maps.Keys(byEndpoint)) {
		ids := byEndpoint[endpoint]
		if len(ids) < ownStatement {
			for _, id := range ids {
				pairs = append(pairs, [2]string{id, endpoint})
			}
			continue
		}
		for part := range chunks(ids, noSize) {
			steps = append(steps, step{what: "delete deliveries", sql: deleteOfEndpoint, args: []any{endpoint, part}, tag: tag})
		}
	}
	slices.SortFunc(pairs, func(a, b [2]string) int { return strings.Compare(a[0], b[0]) })
	for part := range chunks(pairs, noSize) {
		endpoints, ids := make([]string, len(part)), make([]string, len(part))
		for i, pair := range part {
			ids[i], endpoints[i] = pair[0], pair[1]
		}
		steps = append(steps, step{what: "delete deliveries", sql: deleteDeliveries, args: []any{endpoints, ids}, tag: tag})
	}
	return append(steps, removeEventsSteps(gone)...)
}

// removeEventsSteps delete the events of deliveries that were deleted before them, where no other
// delivery needs them.
func removeEventsSteps(gone []outbox.Change) (steps []step) {
	ids := make([]string, len(gone))
	for i, c := range gone {
		ids[i] = clean(c.Event.ID)
	}
	slices.Sort(ids)
	for part := range chunks(slices.Compact(ids), noSize) {
		steps = append(steps,
			step{what: "lock events", sql: lockEvents, args: []any{part}},
			step{what: "delete events", sql: deleteEvents, args: []any{part}},
		)
	}
	return steps
}

// A message of a transaction comes in the stream as its rows do.
const emit = `
select count(pg_logical_emit_message(true, $1, c.content))
from unnest($2::text[]) as c (content)`

func emitStep(notices [][]byte) step {
	return step{what: "emit notices", sql: emit, args: []any{outbox.NoticePrefix, notices}}
}

// Emit writes notices into the WAL.
func (s *Store) Emit(ctx context.Context, notices [][]byte) error {
	if err := s.plain(ctx, emitStep(notices)); err != nil {
		return fmt.Errorf("emit notices: %w", err)
	}
	return nil
}
