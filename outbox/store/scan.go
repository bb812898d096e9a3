package store

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
)

// A page is found in the order of its index and cut by its bytes, and only then is what is large looked at: at the
// places where the same snapshot has just seen it. Carried along, it would be copied from one step of the plan to the next,
// which takes longer than all else. A delivery whose event was deleted by hand is passed over.
const (
	pageStart = `
select
	e.id, e.type, e.key, e.tenant, e.time, e.headers, e.headers_raw, e.data, e.raw, e.is_json, e.committed_at,
	p.order_key, p.attempts, p.next_attempt_at, p.commit_lsn, p.ordinal, p.total
from (
	select
		*,
		row_number() over w as n,
		sum(bytes) over w as upto,
		count(*) over () as total
	from (
		select e.ctid as place, e.bytes, d.order_key, d.attempts, d.next_attempt_at, d.commit_lsn, d.ordinal
		from walhook.deliveries d
		join walhook.events e on e.id = d.event_id
		where d.state = 'parked'`

	pageEnd = `
		limit $2::int + 1
	) page
	window w as (order by %[1]s rows unbounded preceding)
) p
join walhook.events e on e.ctid = p.place
where n <= $2
and (n = 1 or upto <= $3)
order by %[1]s`

	byPosition = `commit_lsn, ordinal`

	scanAll = pageStart + `
		and d.endpoint_id = $1
		and (d.commit_lsn, d.ordinal) > ($4::text::pg_lsn, $5::bigint)
		and d.order_key not in (select unnest($6::text[]))
		order by d.commit_lsn, d.ordinal` + pageEnd

	scanKey = pageStart + `
		and coalesce(d.endpoint_id, '') = $1
		and (d.commit_lsn, d.ordinal) > ($4::text::pg_lsn, $5::bigint)
		and hashtextextended(d.order_key, 0) = hashtextextended($6::text, 0)
		and d.order_key = $6
		and d.order_key <> ''
		order by d.commit_lsn, d.ordinal` + pageEnd

	scanDue = pageStart + `
		and d.endpoint_id = $1
		and d.order_key = ''
		and d.next_attempt_at <= $4
		order by d.next_attempt_at, d.commit_lsn, d.ordinal` + pageEnd
)

// Scan reads an endpoint's parked deliveries in commit order.
func (s *Store) Scan(ctx context.Context, endpointID string, after cdc.Position, skip []string, limit int, maxBytes int64) ([]outbox.Stored, bool, error) {
	cleaned := make([]string, len(skip))
	for i, key := range skip {
		cleaned[i] = clean(key)
	}
	p := page{limit: limit}
	err := s.plain(ctx, p.step("scan", fmt.Sprintf(scanAll, byPosition),
		clean(endpointID), limit, maxBytes, after.Commit.String(), int64(after.Ordinal), cleaned))
	if err != nil {
		return nil, false, fmt.Errorf("read parked: %w", err)
	}
	return p.rows, p.more(), nil
}

// ScanKey reads the parked deliveries of one order key in commit order. Deliveries without a
// key have no such order, so the empty key finds none.
func (s *Store) ScanKey(ctx context.Context, endpointID, key string, after cdc.Position, limit int, maxBytes int64) ([]outbox.Stored, bool, error) {
	p := page{limit: limit}
	err := s.plain(ctx, p.step("scan key", fmt.Sprintf(scanKey, byPosition),
		clean(endpointID), limit, maxBytes, after.Commit.String(), int64(after.Ordinal), clean(key)))
	if err != nil {
		return nil, false, fmt.Errorf("read parked: %w", err)
	}
	return p.rows, p.more(), nil
}

// page gathers the rows of a pageStart … pageEnd.
type page struct {
	limit int
	rows  []outbox.Stored
	total int // of the rows that were found, one more than the limit at most

	// Of the row that is read, what does not stand in its Stored as it is.
	headersRaw, raw []byte
	commit          uint64
	at, due, done   pgtype.Timestamptz
}

// more tells that rows follow the last one, for the limit's or the bytes' sake.
func (p *page) more() bool { return p.total > len(p.rows) }

func (p *page) step(what, sql string, args ...any) step {
	return step{what: what, sql: sql, args: args, row: func(r pgx.Rows) error {
		if len(p.rows) == 0 {
			p.rows = make([]outbox.Stored, 0, p.limit)
		}
		return p.scan(r)
	}}
}

func (p *page) scan(r pgx.Rows) error {
	e := &outbox.Event{}
	p.rows = append(p.rows, outbox.Stored{Event: e})
	stored := &p.rows[len(p.rows)-1]
	p.headersRaw, p.raw = nil, nil
	err := r.Scan(&e.ID, &e.Type, &e.Key, &e.Tenant, &p.at, &e.Headers, &p.headersRaw, &e.Data, &p.raw, &e.JSON, &p.done,
		&stored.OrderKey, &stored.Attempts, &p.due, &p.commit, &e.Position.Ordinal, &p.total)
	if err != nil {
		return err
	}
	if p.headersRaw != nil {
		e.Headers = p.headersRaw
	}
	if p.raw != nil {
		e.Data = p.raw
	}
	e.Time, e.Commit, stored.Due = moment(p.at), moment(p.done), moment(p.due)
	e.Position.Commit = cdc.LSN(p.commit)
	return nil
}

// moment is zero for null, and in UTC.
func moment(t pgtype.Timestamptz) time.Time {
	if !t.Valid {
		return time.Time{}
	}
	return t.Time.UTC()
}

// A key is named once, however many of its deliveries are due: equal times are stepped over at
// once. A key whose deliveries have many different times can use the steps up; then the call
// names fewer keys than there are and tells that more are due now.
const dueKeys = `
with recursive due as (
	(
		select d.next_attempt_at, hashtextextended(d.order_key, 0) as hash, d.order_key
		from walhook.deliveries d
		where d.endpoint_id = $1
		and d.state = 'parked'
		and d.order_key <> ''
		and d.next_attempt_at <= $2
		order by d.next_attempt_at, hashtextextended(d.order_key, 0)
		limit 1
	)
	union all
	select later.*
	from due
	cross join lateral (
		select d.next_attempt_at, hashtextextended(d.order_key, 0) as hash, d.order_key
		from walhook.deliveries d
		where d.endpoint_id = $1
		and d.state = 'parked'
		and d.order_key <> ''
		and d.next_attempt_at <= $2
		and (d.next_attempt_at, hashtextextended(d.order_key, 0)) > (due.next_attempt_at, due.hash)
		order by d.next_attempt_at, hashtextextended(d.order_key, 0)
		limit 1
	) later
)
select next_attempt_at, order_key
from due
limit $3`

// dueSteps is how many (time, key) pairs are looked at to name limit keys.
func dueSteps(limit int) int { return 4*limit + 100 }

// least and not min: each side follows its own index to its first row.
const nextDue = `
select least(
	(
		select d.next_attempt_at
		from walhook.deliveries d
		where d.endpoint_id = $1
		and d.state = 'parked'
		and d.order_key <> ''
		and d.next_attempt_at > $2
		order by d.next_attempt_at
		limit 1
	),
	(
		select d.next_attempt_at
		from walhook.deliveries d
		where d.endpoint_id = $1
		and d.state = 'parked'
		and d.order_key = ''
		and d.next_attempt_at > $2
		order by d.next_attempt_at
		limit 1
	)
)`

// Due names what has a retry due at now: at most limit keys and loose deliveries together.
// Where more are due than it names, next is not after now.
func (s *Store) Due(ctx context.Context, endpointID string, now time.Time, limit int, maxBytes int64) ([]string, []outbox.Stored, time.Time, error) {
	endpointID = clean(endpointID)
	var (
		found  []dueKey
		steps  int
		future pgtype.Timestamptz
		loose  = page{limit: limit}
	)
	keysStep := step{what: "keys", sql: dueKeys, args: []any{endpointID, now, dueSteps(limit)}, row: func(r pgx.Rows) error {
		var k dueKey
		err := r.Scan(&k.at, &k.key)
		steps++
		if !slices.ContainsFunc(found, func(f dueKey) bool { return f.key == k.key }) {
			found = append(found, k)
		}
		return err
	}}
	nextStep := step{what: "next", sql: nextDue, args: []any{endpointID, now}, row: func(r pgx.Rows) error { return r.Scan(&future) }}
	looseStep := loose.step("loose", fmt.Sprintf(scanDue, "next_attempt_at, commit_lsn, ordinal"), endpointID, limit, maxBytes, now)
	if err := s.plain(ctx, keysStep, looseStep, nextStep); err != nil {
		return nil, nil, time.Time{}, fmt.Errorf("read due: %w", err)
	}
	keys, rows, cut := soonest(found, loose.rows, limit)
	next := moment(future)
	if cut || loose.more() || steps == dueSteps(limit) {
		next = now
	}
	return keys, rows, next, nil
}

// dueKey is an order key and when its first retry is due.
type dueKey struct {
	at  time.Time
	key string
}

// soonest takes the limit first of both, which are in order.
func soonest(keys []dueKey, loose []outbox.Stored, limit int) (named []string, rows []outbox.Stored, cut bool) {
	k, l := 0, 0
	for k+l < limit && (k < len(keys) || l < len(loose)) {
		if l == len(loose) || k < len(keys) && !keys[k].at.After(loose[l].Due) {
			named = append(named, keys[k].key)
			k++
		} else {
			l++
		}
	}
	return named, loose[:l], k < len(keys) || l < len(loose)
}
