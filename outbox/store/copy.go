package store

import (
	"errors"
	"maps"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/walhook/walhook/outbox"
)

// copyRows is how many new deliveries make COPY worth its round trips. With it Postgres fills a
// page at a time, writes one WAL record for it, which it then decodes as one, and looks for no conflict
// at each row: that is a half of what an insert costs.
const copyRows = 20

// copying is a COPY into a table of walhook's.
type copying struct {
	table   string
	columns []string
	rows    func() pgx.CopyFromSource // asked for when the steps before are done
}

// pgLSN is of the type pg_lsn, which pgx does not know: 64 bits on the wire, as xid8 has.
var pgLSN = &pgtype.Type{Name: "pg_lsn", OID: 3220, Codec: pgtype.Uint64Codec{}}

// An event that is there stays as it is, locked as insertEvents locks it, and so does each delivery of it.
const lockStored = `
select e.id, array(
	select coalesce(endpoint_id, '')
	from walhook.deliveries
	where event_id = e.id
)
from (
	select id
	from walhook.events
	where id = any($1::text[])
	order by id
	for update
) e`

var errNotCopied = errors.New("it cannot be copied")

// copySteps do what insertSteps do. They fail with errNotCopied where somebody else inserts
// the same meanwhile, where a delivery lost its event by hand, or where the server copies nothing into these tables.
func copySteps(inserts []outbox.Change, ascii bool) []step {
	contents := contentsOf(inserts)
	ids := slices.Sorted(maps.Keys(contents))
	stored, delivered := map[string]bool{}, map[[2]string]bool{} // events, and event and endpoint
	lock := step{what: "lock stored events", sql: lockStored, args: []any{ids}, begin: func() { clear(stored); clear(delivered) }, row: func(r pgx.Rows) error {
		var (
			id        string
			endpoints []string
		)
		err := r.Scan(&id, &endpoints)
		stored[id] = true
		for _, endpoint := range endpoints {
			delivered[[2]string{id, endpoint}] = true
		}
		return err
	}}
	events := step{what: "copy events", copy: &copying{table: "events", columns: eventColumns, rows: func() pgx.CopyFromSource {
		fresh := ids
		if len(stored) > 0 {
			fresh = slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return stored[id] })
		}
		values := make([]any, len(eventColumns))
		return pgx.CopyFromSlice(len(fresh), func(i int) ([]any, error) {
			eventValues(values, contents[fresh[i]], ascii)
			return values, nil
		})
	}}}
	deliveries := step{what: "copy deliveries", copy: &copying{table: "deliveries", columns: deliveryColumns, rows: func() pgx.CopyFromSource {
		fresh := inserts
		if len(stored) > 0 {
			fresh = slices.DeleteFunc(slices.Clone(inserts), func(c outbox.Change) bool {
				return delivered[[2]string{clean(c.Event.ID), clean(c.EndpointID)}]
			})
		}
		values := make([]any, len(deliveryColumns))
		return pgx.CopyFromSlice(len(fresh), func(i int) ([]any, error) {
			deliveryValues(values, &fresh[i], ascii)
			return values, nil
		})
	}}}
	return []step{lock, events, deliveries}
}

var (
	eventColumns = []string{
		"id", "type", "key", "tenant", "time", "headers", "headers_raw", "data", "raw", "is_json", "bytes", "commit_lsn", "ordinal",
		"committed_at",
	}
	deliveryColumns = []string{
		"endpoint_id", "event_id", "order_key", "state", "reason", "attempts", "next_attempt_at", "last_status", "last_error",
		"commit_lsn", "ordinal",
	}
)

func eventValues(v []any, e *outbox.Event, ascii bool) {
	headers, headersRaw, data, raw := contentColumns(e, ascii)
	v[0], v[1], v[2], v[3], v[4] = clean(e.ID), clean(e.Type), clean(e.Key), clean(e.Tenant), timestamp(e.Time)
	v[5], v[6], v[7], v[8] = headers, headersRaw, data, raw
	v[9], v[10], v[11], v[12], v[13] = e.JSON, int32(contentSize(e)), uint64(e.Position.Commit), int64(e.Position.Ordinal), timestamp(e.Commit)
}

func deliveryValues(v []any, c *outbox.Change, ascii bool) {
	v[0], v[1], v[2], v[3], v[4] = nullable(clean(c.EndpointID)), clean(c.Event.ID), clean(c.OrderKey), string(c.State), clean(string(c.Reason))
	v[5], v[6], v[7], v[8] = int32(c.Attempts), dueColumn(c), nullable(int32(c.Status)), nullable(cleanDetail(c.Detail, ascii))
	v[9], v[10] = uint64(c.Event.Position.Commit), int64(c.Event.Position.Ordinal)
}

// nullable is nil, so NULL, for a zero value.
func nullable[T comparable](v T) any {
	var zero T
	if v == zero {
		return nil
	}
	return v
}
