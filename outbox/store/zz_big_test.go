package store

import (
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/outbox/outboxtest"
)

func TestBig(t *testing.T) {
	if os.Getenv("BIG") == "" {
		t.Skip()
	}
	b := setup(t)
	ctx := t.Context()
	start := time.Now()
	did := func(what string) { t.Logf("%-40s %v", what, time.Since(start).Round(10*time.Microsecond)); start = time.Now() }
	ex := func(sql string) { _, err := b.pool.Exec(ctx, sql); require.NoError(t, err) }
	// 1M of one key first, then 1M of 100k keys, then 1M loose, all for endpoint a; 1M dead for b
	ex("set synchronous_commit=off")
	ex(`insert into walhook.events (id,type,key,is_json,bytes,data,commit_lsn,ordinal) select 'e'||n,'t','',true,2,'{}',('1/'||to_hex(n/1000))::pg_lsn, n%1000 from generate_series(0,2999999) n`)
	did("events")
	ex(`insert into walhook.deliveries (endpoint_id,event_id,state,order_key,commit_lsn,ordinal,next_attempt_at)
	 select 'a','e'||n,'parked', case when n < 1000000 then 'big' when n < 2000000 then 'k'||n%100000 else '' end,('1/'||to_hex(n/1000))::pg_lsn, n%1000, case when n < 1000000 or n%10=0 then '2026-01-01'::timestamptz end from generate_series(0,2999999) n`)
	did("3M deliveries")
	ex(`insert into walhook.deliveries (endpoint_id,event_id,state,order_key,commit_lsn,ordinal)
	 select 'b','e'||n,'dead', '', ('1/'||to_hex(n/1000))::pg_lsn, n%1000 from generate_series(0,999999) n`)
	did("1M dead")
	for _, round := range []string{"cold, no vacuum", "warm", "vacuumed"} {
		t.Log(round)
		if round == "vacuumed" {
			ex("vacuum analyze walhook.deliveries")
			ex("vacuum analyze walhook.events")
			start = time.Now()
		}
		_, err := b.Backlogs(ctx)
		require.NoError(t, err)
		did("Backlogs of 4M")
		rows, _, err := b.Scan(ctx, "a", cdc.Position{}, nil, 500, 1<<20)
		require.NoError(t, err)
		require.Len(t, rows, 500)
		did("Scan 500")
		rows, _, err = b.Scan(ctx, "a", cdc.Position{}, []string{"big"}, 500, 1<<20)
		require.NoError(t, err)
		require.Len(t, rows, 500)
		did("Scan 500 behind 1M of a skipped key")
		_, _, err = b.ScanKey(ctx, "a", "k7", cdc.Position{}, 500, 1<<20)
		require.NoError(t, err)
		did("ScanKey")
		_, _, err = b.ScanKey(ctx, "a", "big", rows[0].Event.Position, 500, 1<<20)
		require.NoError(t, err)
		did("ScanKey behind 1M")
		keys, loose, _, err := b.Due(ctx, "a", time.Now(), 100, 1<<20)
		require.NoError(t, err)
		did("Due 100")
		t.Log(len(keys), len(loose))
		require.NoError(t, b.Write(ctx, batchOf(5000000+len(round)*1000, 1000, 10)))
		did("Write 1000")
	}
	n, err := b.GC(ctx)
	require.NoError(t, err)
	require.Zero(t, n)
	did("GC of 3M")
	n, err = b.Bury(ctx, "a", "x")
	require.NoError(t, err)
	did("Bury 3M")
	t.Log(n)
	var ch []outbox.Change
	for i := range 1000 {
		e := outboxtest.Event(1, "")
		e.ID = "e" + itoa(i*2000)
		ch = append(ch, outboxtest.Move("a", e, outbox.StateGone))
	}
	start = time.Now()
	require.NoError(t, b.Write(ctx, ch))
	did("Remove 1000 scattered")
	var s1, s2 string
	b.query("select pg_size_pretty(pg_table_size('walhook.deliveries')), pg_size_pretty(pg_indexes_size('walhook.deliveries'))", &s1, &s2)
	t.Log(s1, s2)
}

func itoa(n int) string {
	s := ""
	for ; n > 0; n /= 10 {
		s = string(rune('0'+n%10)) + s
	}
	return s
}
