package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc/pgtest"
	"github.com/walhook/walhook/sender/sendertest"
)

// What is here holds the life of a slot: its first snapshot, its loss and its recovery.

// cdc adds to the part cdc of a configuration.
func (b *bench) cdc(config, more string) string {
	b.t.Helper()
	text, err := os.ReadFile(config)
	require.NoError(b.t, err)
	changed := strings.Replace(string(text), "publication: "+b.slot+"}", "publication: "+b.slot+", "+more+"}", 1)
	require.NotEqual(b.t, string(text), changed)
	require.NoError(b.t, os.WriteFile(config, []byte(changed), 0o600))
	return config
}

// fill commits n rows at once, of 50 keys of their own.
func (b *bench) fill(n int) {
	b.t.Helper()
	b.exec(fmt.Sprintf(`insert into outbox (aggregatetype, aggregateid, type, payload)
		select 'order', 'filled-' || i %% 50, 'order.changed', jsonb_build_object('key', 'filled-' || i %% 50, 'n', i)::text from generate_series(1, %d) i`, n))
}

// insert commits a row of a key of its own.
func (b *bench) insert(key string) {
	b.t.Helper()
	b.exec(fmt.Sprintf(`insert into outbox (aggregatetype, aggregateid, type, payload) values ('order', '%s', 'order.changed', '{"key":"%[1]s","n":1}')`, key))
}

// dropSlot takes the slot from whoever has it.
func (b *bench) dropSlot() {
	b.t.Helper()
	b.exec(fmt.Sprintf(`do $$
		begin
			loop
				begin
					perform pg_terminate_backend(active_pid, 5000) from pg_replication_slots where slot_name = '%s';
					perform pg_drop_replication_slot('%[1]s');
					return;
				exception when object_in_use then
				end;
			end loop;
		end $$`, b.slot))
}

func newReceiver(t *testing.T) *sendertest.Receiver {
	t.Helper()
	return sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
}

func TestRowsFromBeforeTheSlotArriveOnceAndBeforeTheirSuccessors(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.fill(5000)
	rx := newReceiver(t)
	config := b.cdc(b.config(endpoint("billing", rx, "")), "snapshot: initial")
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.produce(2, 400, 7)
	}()
	p := start(t, config).streaming()
	<-done
	b.exec(`insert into outbox (aggregatetype, aggregateid, type, payload)
		select 'order', 'filled-' || i, 'order.changed', jsonb_build_object('key', 'filled-' || i, 'n', 5001)::text from generate_series(0, 49) i`)
	requireAll(t, rx, 5850)
	require.Zero(t, repeats(rx))
	p.log.line(t, "the first snapshot is taken", `"rows":`)
	p.stop()
}

func TestKillAmidstTheFirstSnapshotLosesAndRepeatsNothing(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.fill(2000)
	rx := newReceiver(t)
	b.exec("alter table outbox rename to outbox_away")
	config := b.cdc(b.config(endpoint("billing", rx, "")), "snapshot: initial")
	p := start(t, config)
	p.log.line(t, "does not exist")
	conn := b.conn()
	held, err := conn.Begin(t.Context())
	require.NoError(t, err)
	_, err = held.Exec(t.Context(), "lock table walhook.events in share mode")
	require.NoError(t, err)
	b.exec("alter table outbox_away rename to outbox")
	p.log.line(t, "created slot")
	eventually(t, "a row to be parked", func() bool {
		return b.ask("select count(*) from pg_locks where relation = 'walhook.events'::regclass and not granted") > 0
	})
	p.kill()
	require.NoError(t, held.Rollback(t.Context()))
	require.EqualValues(t, 1, b.ask("select count(*) from pg_replication_slots where slot_name = '"+b.slot+"'"))
	b.insert("between")
	start(t, config).streaming()
	requireAll(t, rx, 2001)
	require.Zero(t, repeats(rx))
}

func TestSlotLostUnderLoadIsRecoveredInTheSameProcess(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := newReceiver(t)
	p := start(t, b.cdc(b.config(endpoint("billing", rx, "")), "recover: auto")).streaming()
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.produce(3, 1500, 7)
	}()
	var seen []string
	watched, stop := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)
		for {
			select {
			case <-stop:
				return
			default:
			}
			resp, err := http.Get("http://" + p.addr + "/readyz")
			if err != nil {
				t.Errorf("readyz: %v", err)
				return
			}
			var body bytes.Buffer
			_, _ = body.ReadFrom(resp.Body)
			_ = resp.Body.Close()
			status, _, _ := strings.Cut(strings.TrimPrefix(body.String(), `{"status":"`), `"`)
			if len(seen) == 0 || seen[len(seen)-1] != status {
				seen = append(seen, status)
			}
		}
	}()
	for n := range 2 {
		requireAtLeast(t, rx, 500*(n+1))
		b.dropSlot()
		eventually(t, "the slot to be there again", func() bool {
			return b.ask("select count(*) from pg_replication_slots where slot_name = '"+b.slot+"' and active") > 0
		})
	}
	<-done
	requireAll(t, rx, 4500)
	eventually(t, "streaming", func() bool {
		_, ready := p.get("/readyz")
		return strings.Contains(ready, `"status":"streaming"`)
	})
	close(stop)
	<-watched
	t.Logf("%s, %d repeats", seen, repeats(rx))
	require.Contains(t, seen, "lost")
	_, metrics := p.get("/metrics")
	require.Contains(t, metrics, `walhook_stream_state{state="streaming"} 1`)
	require.Contains(t, metrics, `walhook_stream_state{state="lost"} 0`)
	p.log.line(t, "recovered: the rows that may have been missed are parked")
	p.stop()
}

func TestLossWaitsForAnOrder(t *testing.T) {
	t.Parallel()
	for _, order := range []string{"--recover", "--recover=none", "--recover=all"} {
		t.Run(order, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			rx := newReceiver(t)
			config := b.config(endpoint("billing", rx, ""))
			p := start(t, config).streaming()
			b.produce(1, 20, 3)
			requireAll(t, rx, 20)
			b.dropSlot()
			b.insert("missed")
			p.log.line(t, `"msg":"lost: slot`, "--recover")
			code, ready := p.get("/readyz")
			require.Equal(t, http.StatusServiceUnavailable, code)
			require.Contains(t, ready, `"status":"lost"`)
			require.Contains(t, ready, "rows that may have been missed")
			_, metrics := p.get("/metrics")
			require.Contains(t, metrics, `walhook_stream_state{state="lost"} 1`)
			code, out, _ := walhook(t, "check", "--config", config)
			require.Equal(t, exitFailed, code)
			requireLine(t, out, "✗", "checkpoint", "is gone, although a checkpoint", "--recover")
			p.stop()

			p = start(t, config, order).streaming()
			b.insert("after")
			missed := func(q sendertest.Request) bool { return strings.Contains(string(q.Body), `"missed"`) }
			if order == "--recover=none" {
				requireAll(t, rx, 21)
				require.False(t, slices.ContainsFunc(rx.Requests(), missed))
			} else {
				requireAll(t, rx, 22)
				require.True(t, slices.ContainsFunc(rx.Requests(), missed))
			}
			p.stop()
		})
	}
}

func TestOrdersAndConfigsThatMeanNothingEndWithCode2(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	config := b.config(endpoint("billing", newReceiver(t), ""))
	code, _, errs := walhook(t, "run", "--config", config, "--recover=wrong")
	require.Equal(t, exitUsage, code)
	require.Contains(t, errs, "--recover=wrong")
	code, _, errs = walhook(t, "run", "--config", b.cdc(config, "snapshot: initial, create: false"))
	require.Equal(t, exitUsage, code)
	require.Contains(t, errs, "snapshot: initial needs a slot that walhook makes itself")
}

// The files of a cluster are copied, identifier, slot and all.
func TestCopiedClusterSendsNothingUntilItIsAdopted(t *testing.T) {
	t.Parallel()
	server := pgtest.New(t, pgtest.Config{})
	b := newBenchOn(t, server.URL())
	rx := newReceiver(t)
	p := start(t, b.config(endpoint("billing", rx, ""))).streaming()
	b.insert("one")
	requireAll(t, rx, 1)
	p.stop()
	b.insert("two") // both would send it
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	require.NoError(t, server.Stop(ctx, pgtest.Fast))
	other := pgtest.New(t, pgtest.Config{})
	require.NoError(t, other.Stop(ctx, pgtest.Fast))
	require.NoError(t, os.RemoveAll(other.DataDir()))
	out, err := exec.CommandContext(ctx, "cp", "-a", server.DataDir(), other.DataDir()).CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.NoError(t, server.Start(ctx))
	require.NoError(t, other.Start(ctx))

	c := &bench{t: t, url: other.URL(), dir: t.TempDir(), slot: b.slot}
	copied := newReceiver(t)
	config := c.config(endpoint("billing", copied, ""))
	q := start(t, config)
	q.log.line(t, "this database is a copy", "update walhook.checkpoints set hosts = null, server = null")
	c.insert("three")
	code, ready := q.get("/readyz")
	require.Equal(t, http.StatusServiceUnavailable, code)
	require.Contains(t, ready, `"status":"waiting"`)
	code, text, _ := walhook(t, "check", "--config", config)
	require.Equal(t, exitFailed, code)
	requireLine(t, text, "✗", "checkpoint", "is a copy", "hosts = null, server = null")
	require.Empty(t, copied.Requests())

	p = start(t, filepath.Join(b.dir, "walhook.yaml")).streaming()
	requireAll(t, rx, 2)
	require.Empty(t, copied.Requests())
	c.exec("update walhook.checkpoints set hosts = null, server = null")
	q.streaming()
	requireAll(t, copied, 2)
	p.stop()
	q.stop()
}

func TestTableMadeAnewWhileDownIsReadWhole(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := newReceiver(t)
	config := b.cdc(b.config(endpoint("billing", rx, "")), "recover: auto")
	p := start(t, config).streaming()
	b.insert("old")
	requireAll(t, rx, 1)
	p.stop()
	b.exec("drop table outbox; create table outbox (id bigint primary key generated always as identity (start 1000), aggregatetype text, aggregateid text, type text, payload text)")
	b.fill(100)
	p = start(t, config).streaming()
	b.insert("new")
	requireAll(t, rx, 102)
	p.stop()
}

func TestChangesOfTheTableWhileRowsFlowLoseNothing(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := newReceiver(t)
	p := start(t, b.config(endpoint("billing", rx, ""))).streaming()
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.produce(3, 700, 7)
	}()
	for i, sql := range []string{
		"alter table outbox add column more int default 7",
		"alter table outbox rename column more to other",
		"alter table outbox alter column other type bigint",
		"create index on outbox (aggregateid)",
		"vacuum full outbox",
		"alter table outbox drop column other",
		"alter table outbox alter column aggregateid type varchar(200)",
		"alter table outbox set (fillfactor = 70)",
		"alter table outbox add constraint named check (type <> '')",
		"analyze outbox",
		"alter table outbox replica identity full",
		"create table child () inherits (outbox)",
		"reindex table outbox",
		"comment on table outbox is 'of the app'",
		"delete from outbox where id % 3 = 0",
		"begin; alter table outbox rename to away; alter table away rename to outbox; commit",
	} {
		requireAtLeast(t, rx, 50*(i+1))
		b.exec(sql)
	}
	<-done
	requireAll(t, rx, 2100)
	require.Zero(t, repeats(rx))
	require.NotContains(t, p.log.String(), `"msg":"lost`)
	p.stop()
}

func TestCheckTellsALossThatNobodyHasSeenYet(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ sql, says string }{
		"slot dropped":          {"", "is gone, although a checkpoint"},
		"slot advanced":         {"select pg_logical_emit_message(true, 'x', 'x'); select pg_replication_slot_advance('$s', pg_current_wal_lsn())", "somebody else read or advanced it"},
		"publication dropped":   {"drop publication $s", "was dropped"},
		"table taken out":       {"alter publication $s drop table outbox", "was not in publication"},
		"taken out and put in":  {"alter publication $s drop table outbox; alter publication $s add table outbox", "put back"},
		"table made anew":       {"drop table outbox; create table outbox (id bigserial primary key, aggregatetype text, aggregateid text, type text, payload text)", "is not the one that it was"},
		"inserts not published": {"alter publication $s set (publish = 'update')", "did not publish inserts"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			rx := newReceiver(t)
			config := b.config(endpoint("billing", rx, ""))
			p := start(t, config).streaming()
			b.insert("one")
			requireAll(t, rx, 1)
			p.stop()
			if c.sql == "" {
				b.dropSlot()
			} else {
				b.exec(strings.ReplaceAll(c.sql, "$s", b.slot))
			}
			code, out, _ := walhook(t, "check", "--config", config)
			require.Equal(t, exitFailed, code)
			requireLine(t, out, "✗", "checkpoint", c.says, "--recover")
		})
	}
}
