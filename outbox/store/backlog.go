package store

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
)

// Both counts read an index that has nothing else in it.
const backlogs = `
select coalesce(c.endpoint_id, ''), c.parked, c.dead, least(k.next_attempt_at, l.next_attempt_at), o.created_at
from (
	select endpoint_id, sum(parked)::bigint as parked, sum(dead)::bigint as dead
	from (
		select endpoint_id, count(*) as parked, 0 as dead
		from walhook.deliveries
		where state in ('parked', 'sending')
		group by endpoint_id
		union all
		select endpoint_id, 0, count(*)
		from walhook.deliveries
		where state = 'dead'
		group by endpoint_id
	) counts
	group by endpoint_id
) c
left join lateral (
	select d.next_attempt_at
	from walhook.deliveries d
	where d.endpoint_id = c.endpoint_id
	and d.state = 'parked'
	and d.order_key <> ''
	and d.next_attempt_at is not null
	order by d.next_attempt_at
	limit 1
) k on true
left join lateral (
	select d.next_attempt_at
	from walhook.deliveries d
	where d.endpoint_id = c.endpoint_id
	and d.state = 'parked'
	and d.order_key = ''
	and d.next_attempt_at is not null
	order by d.next_attempt_at
	limit 1
) l on true
left join lateral (
	select d.created_at
	from walhook.deliveries d
	where d.endpoint_id = c.endpoint_id
	and d.state in ('parked', 'sending')
	order by d.commit_lsn, d.ordinal
	limit 1
) o on true
order by 1`

// Backlogs counts what is stored, an entry an endpoint, the empty id for rows that could not be
// mapped. What is being sent counts as parked. A million rows take about a tenth of a second.
func (s *Store) Backlogs(ctx context.Context) ([]outbox.Backlog, error) {
	var all []outbox.Backlog
	err := s.plain(ctx, step{what: "count", sql: backlogs, row: func(r pgx.Rows) error {
		var b outbox.Backlog
		var next, oldest pgtype.Timestamptz
		err := r.Scan(&b.EndpointID, &b.Parked, &b.Dead, &next, &oldest)
		b.NextDue, b.Oldest = moment(next), moment(oldest)
		all = append(all, b)
		return err
	}})
	if err != nil {
		return nil, fmt.Errorf("count backlogs: %w", err)
	}
	return all, nil
}

// buryBatch is how many deliveries one transaction of Bury changes.
const buryBatch = 10000

const bury = `
with batch as materialized (
	select id, commit_lsn, ordinal
	from walhook.deliveries
	where endpoint_id = $1
	and state in ('parked', 'sending')
	and (commit_lsn, ordinal) >= ($3::text::pg_lsn, $4::bigint)
	order by commit_lsn, ordinal
	limit $5
), buried as (
	update walhook.deliveries
	set state = 'dead', reason = $2, next_attempt_at = null
	where id = any(array(select id from batch))
)
select commit_lsn::text, ordinal, count(*) over ()
from batch
order by commit_lsn desc, ordinal desc
limit 1`

// Bury makes the parked deliveries of an endpoint dead, those that are being sent too.
func (s *Store) Bury(ctx context.Context, endpointID string, reason outbox.Reason) (total int64, err error) {
	var after cdc.Position
	for {
		var commit string
		var n int64
		err := s.held(ctx, step{
			what: "update", sql: bury, args: []any{clean(endpointID), clean(string(reason)), after.Commit.String(), int64(after.Ordinal), buryBatch},
			row: func(r pgx.Rows) error { return r.Scan(&commit, &after.Ordinal, &n) },
		})
		if err != nil {
			return total, fmt.Errorf("bury deliveries: %w", err)
		}
		total += n
		if n < buryBatch {
			return total, nil
		}
		if after.Commit, err = cdc.ParseLSN(commit); err != nil {
			return total, fmt.Errorf("bury deliveries: %w", err)
		}
	}
}

// gcBatch is how many events one transaction of GC looks at.
const gcBatch = 1000

// Lateral and with a limit, else Postgres may read all deliveries to answer for a batch.
const findOrphans = `
select e.id, d.needed is null
from (
	select id
	from walhook.events
	where id > $1
	order by id
	limit $2
) e
left join lateral (
	select true as needed
	from walhook.deliveries
	where event_id = e.id
	limit 1
) d on true
order by e.id`

// GC deletes the events that no delivery needs, which only SQL by hand leaves behind. It reads
// the ids of all events, in batches.
func (s *Store) GC(ctx context.Context) (total int64, err error) {
	last := ""
	for {
		var seen int
		var orphans []string
		find := step{what: "find", sql: findOrphans, args: []any{last, gcBatch}, row: func(r pgx.Rows) error {
			var orphan bool
			err := r.Scan(&last, &orphan)
			seen++
			if orphan {
				orphans = append(orphans, last)
			}
			return err
		}}
		if err := s.plain(ctx, find); err != nil {
			return total, fmt.Errorf("collect events: %w", err)
		}
		if len(orphans) > 0 {
			var n int64
			err := s.plain(ctx,
				step{what: "lock", sql: lockEvents, args: []any{orphans}},
				step{what: "delete", sql: deleteEvents, args: []any{orphans}, tag: func(t pgconn.CommandTag) { n = t.RowsAffected() }},
			)
			if err != nil {
				return total, fmt.Errorf("collect events: %w", err)
			}
			total += n
		}
		if seen < gcBatch {
			return total, nil
		}
	}
}
