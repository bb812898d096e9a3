package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/sender/sendertest"
)

// What is here holds endpoints that an app registers in walhook.endpoints.

// loopback lets endpoints of the table reach receivers of the test.
func (b *bench) loopback(config string) string {
	b.t.Helper()
	text, err := os.ReadFile(config)
	require.NoError(b.t, err)
	changed := strings.Replace(string(text), "defaults: {", "defaults: {network: {allow: [127.0.0.0/8]}, ", 1)
	require.NotEqual(b.t, string(text), changed)
	require.NoError(b.t, os.WriteFile(config, []byte(changed), 0o600))
	return config
}

// got tells which numbers came to each path of the receiver, in the order in which they first came.
func got(requests []sendertest.Request) map[string][]int {
	all := map[string][]int{}
	for _, r := range requests {
		var body struct{ Data struct{ N int } }
		if json.Unmarshal(r.Body, &body) != nil {
			continue
		}
		if !slices.Contains(all[r.Path], body.Data.N) {
			all[r.Path] = append(all[r.Path], body.Data.N)
		}
	}
	return all
}

func (b *bench) status(id string) (status, reason string) {
	b.t.Helper()
	if b.sql == nil {
		b.sql = b.conn()
	}
	require.NoError(b.t, b.sql.QueryRow(b.t.Context(), "select status, status_reason from walhook.endpoints where id = $1", id).Scan(&status, &reason))
	return status, reason
}

func TestEndpointGetsTheEventOfItsOwnTransactionAndNoneFromBefore(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	file, rx := newReceiver(t), newReceiver(t)
	p := start(t, b.loopback(b.config(endpoint("file", file, "")))).streaming()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	event := func(n int) string {
		return fmt.Sprintf("insert into outbox (aggregatetype, aggregateid, type, payload) values ('order', 'k', 'order.changed', '{\"n\":%d}')", n)
	}
	b.exec(event(1))
	b.exec(fmt.Sprintf("begin; insert into walhook.endpoints (id, url, secrets) values ('mine', '%s/mine', '{%s}'); %s; commit", rx.URL(), testSecret, event(2)))
	b.exec(event(3))
	require.NoError(t, rx.WaitFor(ctx, 2))
	b.exec("update walhook.endpoints set events = '{invoice.*}' where id = 'mine'")
	b.exec(event(4))
	b.exec(fmt.Sprintf("begin; update walhook.endpoints set events = '{*}', url = '%s/moved'; %s; commit", rx.URL(), event(5)))
	require.NoError(t, rx.WaitFor(ctx, 3))
	b.exec("delete from walhook.endpoints")
	b.exec(event(6))
	require.NoError(t, file.WaitFor(ctx, 6))
	require.Equal(t, map[string][]int{"/hooks/mine": {2, 3}, "/hooks/moved": {5}}, got(rx.Requests()))
	p.stop()
	require.Zero(t, b.ask("select count(*) from walhook.deliveries"))
	for _, r := range rx.Requests() {
		require.NoError(t, r.Invalid)
	}
}

// Of each endpoint its events are known exactly, as one transaction says which endpoints there are and
// inserts an event with their names: all of them, and no other, are to get it. The process is killed meanwhile.
func TestEndpointsGetExactlyWhatWasCommittedWhileTheyWereThere(t *testing.T) {
	t.Parallel()
	for _, kill := range []bool{false, true} {
		t.Run(fmt.Sprintf("killed=%t", kill), func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			file, rx := newReceiver(t), sendertest.New(t, sendertest.Config{}) // of secrets that only the table knows
			config := b.loopback(b.config(endpoint("file", file, "")))
			p := start(t, config).streaming()
			ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
			defer cancel()
			const clients, rounds = 4, 250
			var mu sync.Mutex
			want := map[string][]int{}
			var events int
			var wg sync.WaitGroup
			for c := range clients {
				conn := b.conn()
				wg.Go(func() {
					random := rand.New(rand.NewPCG(1, uint64(c)))
					here := map[string]string{} // type that an endpoint of this client wants, by its id
					for range rounds {
						var sql []string
						switch id := fmt.Sprintf("c%d-%d", c, random.IntN(6)); {
						case here[id] == "" && random.IntN(4) == 0:
							here[id] = fmt.Sprintf("order.t%d-%d", c, random.IntN(3))
							sql = append(sql, fmt.Sprintf("insert into walhook.endpoints (id, url, events) values ('%s', '%s/%[1]s', '{%[3]s}')", id, rx.URL(), here[id]))
						case here[id] != "" && random.IntN(4) == 0:
							here[id] = fmt.Sprintf("order.t%d-%d", c, random.IntN(3))
							sql = append(sql, fmt.Sprintf("update walhook.endpoints set events = '{%s}' where id = '%s'", here[id], id))
						case here[id] != "" && !kill && random.IntN(8) == 0: // what a crash cut off of one that is removed is discarded
							delete(here, id)
							sql = append(sql, fmt.Sprintf("delete from walhook.endpoints where id = '%s'", id))
						}
						mu.Lock()
						for range 1 + random.IntN(3) {
							events++
							eventType := fmt.Sprintf("t%d-%d", c, random.IntN(3))
							sql = append(sql, fmt.Sprintf(`insert into outbox (aggregatetype, aggregateid, type, payload) values ('order', '%d', 'order.%s', '{"n":%d}')`, c, eventType, events))
							for id, wants := range here {
								if wants == "order."+eventType {
									want["/hooks/"+id] = append(want["/hooks/"+id], events)
								}
							}
						}
						mu.Unlock()
						tx := "begin; " + strings.Join(sql, "; ") + "; commit"
						if random.IntN(2) == 0 {
							tx = strings.Join(sql[:1], "; ") + "; " + "begin; " + strings.Join(append(sql[1:], "select 1"), "; ") + "; commit"
						}
						if _, err := conn.Exec(context.Background(), tx, pgx.QueryExecModeSimpleProtocol); err != nil {
							t.Errorf("%s: %v", tx, err)
							return
						}
					}
				})
			}
			if kill {
				for n := range 3 {
					require.NoError(t, file.WaitFor(ctx, 200*(n+1)))
					p.kill()
					p = start(t, config).streaming()
				}
			}
			wg.Wait()
			require.NoError(t, file.WaitUntil(ctx, func(all []sendertest.Request) bool { return len(all) >= events && len(got(all)["/hooks"]) == events }))
			total := 0
			for _, numbers := range want {
				total += len(numbers)
			}
			_ = rx.WaitUntil(ctx, func(requests []sendertest.Request) bool {
				if len(requests) < total {
					return false
				}
				all := got(requests)
				for path, numbers := range want {
					if len(all[path]) < len(numbers) {
						return false
					}
				}
				return true
			})
			p.stop()
			all := got(rx.Requests())
			for path, numbers := range want {
				require.ElementsMatch(t, numbers, all[path], path)
			}
			require.Len(t, all, len(want))
			if !kill {
				require.Zero(t, b.ask("select count(*) from walhook.deliveries"))
			}
			require.Less(t, b.ask("select count(*) from walhook.endpoint_versions"), int64(1000))
		})
	}
}

func TestRowThatIsNoEndpointIsMarkedAndMended(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	file, rx := newReceiver(t), sendertest.New(t, sendertest.Config{})
	config := b.loopback(b.config(endpoint("file", file, "")))
	p := start(t, config).streaming()
	for id, values := range map[string]string{
		"scheme":   `'ftp://example.com', '{}'`,
		"key":      `'https://example.com/', '{"timeuot": "5s"}'`,
		"value":    `'https://example.com/', '{"timeout": "soon"}'`,
		"variable": `'https://example.com/', '{"headers": {"X-Env": "${PATH}", "X-File": "${file:/etc/passwd}"}}'`,
		"column":   `'https://example.com/', '{"secrets": ["whsec_YW55"]}'`,
		"file":     `'https://example.com/', '{}'`,
	} {
		b.exec(fmt.Sprintf("insert into walhook.endpoints (id, url, settings) values ('%s', %s)", id, values))
	}
	eventually(t, "the invalid endpoints", func() bool { return b.ask("select count(*) from walhook.endpoints where status = 'invalid'") == 5 })
	for id, want := range map[string]string{
		"scheme": "https://", "key": "timeuot", "value": "timeout", "column": "settings.secrets", "file": "configuration file",
	} {
		status, reason := b.status(id)
		require.Equal(t, "invalid", status, id)
		require.Contains(t, reason, want, id)
	}
	status, _ := b.status("variable")
	require.Equal(t, "enabled", status, "text of the table is taken as it stands")
	b.exec(fmt.Sprintf("update walhook.endpoints set url = '%s/mended' where id = 'scheme'", rx.URL()))
	b.insert("k")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	require.NoError(t, rx.WaitFor(ctx, 1))
	eventually(t, "a mended endpoint", func() bool { s, reason := b.status("scheme"); return s == "enabled" && reason == "" })
	p.stop()

	// The same after a restart.
	b.exec("update walhook.endpoints set url = 'nothing' where id = 'scheme'")
	p = start(t, config).streaming()
	eventually(t, "an invalid endpoint", func() bool { s, _ := b.status("scheme"); return s == "invalid" })
	p.stop()
}

// Two slots cannot tell apart what is parked for an endpoint, so one of them delivers to it.
func TestOneOfTwoWalhooksInADatabaseServesTheRegistry(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	one, two, rx := newReceiver(t), newReceiver(t), sendertest.New(t, sendertest.Config{})
	config := b.loopback(b.config(endpoint("one", one, "")))
	first := start(t, config).streaming()
	other := &bench{t: t, url: b.url, dir: t.TempDir(), slot: b.slot + "b"}
	second := start(t, other.loopback(other.config(endpoint("two", two, "")))).streaming()
	b.exec(fmt.Sprintf("insert into walhook.endpoints (id, url) values ('mine', '%s')", rx.URL()))
	for i := range 5 {
		b.insert(fmt.Sprint(i))
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	require.NoError(t, one.WaitFor(ctx, 5))
	require.NoError(t, two.WaitFor(ctx, 5))
	require.NoError(t, rx.WaitFor(ctx, 5))
	second.stop()
	first.stop()
	require.Len(t, rx.Requests(), 5)
}

func (b *bench) event(key string, n int) string {
	return fmt.Sprintf("insert into outbox (aggregatetype, aggregateid, type, payload) values ('order', '%s', 'order.changed', '{\"n\":%d}')", key, n)
}

// pass inserts an event of that number and waits until the receiver has it: the stream has come so far.
func (b *bench) pass(rx *sendertest.Receiver, n int) {
	b.t.Helper()
	b.exec(b.event("pass", n))
	ctx, cancel := context.WithTimeout(b.t.Context(), patience)
	defer cancel()
	require.NoError(b.t, rx.WaitUntil(ctx, func(all []sendertest.Request) bool { return slices.Contains(got(all)["/hooks"], n) }))
}

func TestGoneOfTheOldAddressLeavesTheNewOneAlone(t *testing.T) {
	t.Parallel()
	for how, sql := range map[string]string{
		"registered again": "begin; delete from walhook.endpoints; insert into walhook.endpoints (id, url) values ('x', '%s/new'); commit",
		"changed":          "update walhook.endpoints set url = '%s/new'",
	} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			file, rx, old := newReceiver(t), sendertest.New(t, sendertest.Config{}), sendertest.New(t, sendertest.Config{})
			late := make(chan struct{})
			old.Script(sendertest.On(late, sendertest.Status(http.StatusGone)))
			p := start(t, b.loopback(b.config(endpoint("file", file, "")))).streaming()
			b.exec(fmt.Sprintf("insert into walhook.endpoints (id, url) values ('x', '%s/old')", old.URL()))
			b.exec(b.event("k", 1))
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			require.NoError(t, old.WaitFor(ctx, 1))
			b.exec(fmt.Sprintf(sql, rx.URL()))
			b.pass(file, 2)
			close(late)
			b.exec(b.event("other", 3))
			require.NoError(t, rx.WaitUntil(ctx, func(all []sendertest.Request) bool { return slices.Contains(got(all)["/hooks/new"], 3) }))
			status, reason := b.status("x")
			require.Equal(t, "enabled", status, reason)
			b.pass(file, 4)
			p.stop()
			status, reason = b.status("x")
			require.Equal(t, "enabled", status, reason)
		})
	}
}

func TestInvalidRowThatIsEnabledUnmendedIsMarkedAgain(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	file := newReceiver(t)
	p := start(t, b.loopback(b.config(endpoint("file", file, "")))).streaming()
	b.exec("insert into walhook.endpoints (id, url) values ('x', 'ftp://nothing')")
	for range 2 {
		eventually(t, "the mark", func() bool {
			status, reason := b.status("x")
			return status == "invalid" && strings.Contains(reason, "https://")
		})
		b.exec("update walhook.endpoints set status = 'enabled', status_reason = ''")
	}
	eventually(t, "the mark", func() bool { status, _ := b.status("x"); return status == "invalid" })
	p.stop()
}

// Who disables an endpoint is obeyed, though we learn only then that it was once invalid.
func TestMistakeOfThePastDoesNotEnableWhatIsDisabledByNow(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	file, rx := newReceiver(t), sendertest.New(t, sendertest.Config{})
	config := b.loopback(b.config(endpoint("file", file, "")))
	start(t, config).streaming().stop()
	b.exec("insert into walhook.endpoints (id, url) values ('x', 'ftp://nothing')")
	b.exec(fmt.Sprintf("update walhook.endpoints set url = '%s/x'", rx.URL()))
	b.exec("update walhook.endpoints set status = 'disabled'")
	p := start(t, config).streaming()
	b.pass(file, 1)
	p.stop() // its marks are written by now
	p = start(t, config).streaming()
	b.pass(file, 2)
	p.stop()
	status, _ := b.status("x")
	require.Equal(t, "disabled", status)
	require.Empty(t, rx.Requests())
}

// Not even for the moment that its mistakes would take to be told.
func TestHugeRowKeepsNobodyWaiting(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	file := newReceiver(t)
	config := b.loopback(b.config(endpoint("file", file, "")))
	p := start(t, config).streaming()
	b.exec("insert into walhook.endpoints (id, url, settings) select 'x', 'https://example.com/', jsonb_object_agg('k' || i, '{}'::jsonb) from generate_series(1, 100000) i")
	b.pass(file, 1)
	eventually(t, "the mark", func() bool {
		status, reason := b.status("x")
		return status == "invalid" && strings.Contains(reason, "bytes")
	})
	p.stop()
	p = start(t, config).streaming()
	b.pass(file, 2)
	p.stop()
}

// An id that was removed and registered again is another endpoint, also for a stream that comes to that late.
func TestNewOwnerOfAnIDGetsNothingOfTheOneBefore(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	file, rx := newReceiver(t), sendertest.New(t, sendertest.Config{})
	config := b.loopback(b.config(endpoint("file", file, "")))
	p := start(t, config).streaming()
	b.exec(fmt.Sprintf("insert into walhook.endpoints (id, url) values ('x', '%s/old')", rx.URL()))
	b.pass(file, 1)
	p.stop()
	b.exec(b.event("k", 2))
	b.exec(fmt.Sprintf("begin; delete from walhook.endpoints; insert into walhook.endpoints (id, url) values ('x', '%s/new'); commit", rx.URL()))
	b.exec(b.event("k", 3))
	p = start(t, config).streaming()
	b.pass(file, 4)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	require.NoError(t, rx.WaitFor(ctx, 3))
	eventually(t, "nothing to be left of the one before", func() bool { return b.ask("select count(*) from walhook.deliveries") == 0 })
	p.stop()
	all := got(rx.Requests())
	require.Equal(t, []int{1}, all["/hooks/old"])
	require.ElementsMatch(t, []int{3, 4}, all["/hooks/new"])
}

// What is kept for an endpoint that is invalid by now is what it wanted while it was not.
func TestEventsOfTheTimeBeforeAMistakeAreFiltered(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	file, rx := newReceiver(t), sendertest.New(t, sendertest.Config{})
	config := b.loopback(b.config(endpoint("file", file, "")))
	p := start(t, config).streaming()
	b.exec(fmt.Sprintf("insert into walhook.endpoints (id, url, filter) values ('x', '%s/x', 'data.n > 100')", rx.URL()))
	b.pass(file, 1)
	p.stop()
	b.exec(b.event("k", 2))
	b.exec(b.event("k", 200))
	b.exec("update walhook.endpoints set url = 'ftp://nothing'")
	p = start(t, config).streaming()
	b.pass(file, 3)
	b.exec(fmt.Sprintf("update walhook.endpoints set url = '%s/x'", rx.URL()))
	b.exec(b.event("k", 300))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	require.NoError(t, rx.WaitFor(ctx, 2))
	p.stop()
	require.Equal(t, []int{200, 300}, got(rx.Requests())["/hooks/x"])
}

// What was parked for an endpoint of the file is not for a row that has its id when it is gone.
func TestTheFileEndpointsBacklogIsNotForTheRowOfItsID(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	file, rx, down := newReceiver(t), sendertest.New(t, sendertest.Config{}), newReceiver(t)
	down.Refuse()
	p := start(t, b.loopback(b.config(endpoint("file", file, ""), endpoint("x", down, "")))).streaming()
	b.pass(file, 1)
	b.exec(fmt.Sprintf("insert into walhook.endpoints (id, url) values ('x', '%s/row')", rx.URL()))
	b.pass(file, 2)
	eventually(t, "an invalid row", func() bool { status, _ := b.status("x"); return status == "invalid" })
	b.loopback(b.config(endpoint("file", file, "")))
	eventually(t, "a valid row", func() bool { status, _ := b.status("x"); return status == "enabled" })
	eventually(t, "dead deliveries", func() bool {
		return b.ask("select count(*) from walhook.deliveries where state = 'dead' and reason = 'endpoint_removed'") == 2
	})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	n := 3
	eventually(t, "the row's own events", func() bool {
		b.pass(file, n)
		n++
		return len(rx.Requests()) > 0
	})
	require.NoError(t, rx.WaitFor(ctx, 1))
	p.stop()
	require.NotContains(t, got(rx.Requests())["/hooks/row"], 1)
	require.NotContains(t, got(rx.Requests())["/hooks/row"], 2)
}
