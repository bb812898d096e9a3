package outbox_test

import (
	"context"
	"fmt"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/outbox/outboxtest"
	"github.com/walhook/walhook/outbox/rule"
)

func BenchmarkLedger(b *testing.B) {
	now := time.Now()
	pos := func(i int) cdc.Position { return cdc.Position{Commit: cdc.LSN(i), Ordinal: 1} }
	b.Run("InOrder", func(b *testing.B) {
		l := outbox.NewLedger(1000, 1<<20)
		b.ReportAllocs()
		for i := 1; b.Loop(); i++ {
			s := l.Open(pos(i), 1, now)
			l.Close(cdc.LSN(i))
			l.Settle(s)
		}
	})
	// One row is owed all the time, a thousand others end in the opposite order.
	b.Run("BehindOne", func(b *testing.B) {
		l := outbox.NewLedger(1000, 1<<20)
		l.Open(pos(1), 1, now)
		open := make([]*outbox.Span, 0, 1000)
		b.ReportAllocs()
		for i := 2; b.Loop(); i++ {
			if open = append(open, l.Open(pos(i), 1, now)); len(open) == cap(open) {
				for len(open) > 0 {
					l.Settle(open[len(open)-1])
					open = open[:len(open)-1]
				}
			}
		}
	})
}

// instant answers at once.
type instant struct {
	sent atomic.Int64
	want int64
	done chan struct{}
}

func (s *instant) Send(context.Context, outbox.Attempt) outbox.Outcome {
	if s.sent.Add(1) == s.want {
		close(s.done)
	}
	return outbox.Outcome{Verdict: outbox.Delivered, Status: 200}
}

func (s *instant) Forget(string) {}

// rowsOf hands n rows on as fast as there is room.
type rowsOf struct {
	relay *outbox.Relay
	n     int
	row   func(i int) *cdc.Row
}

func (s *rowsOf) Run(ctx context.Context) error {
	if _, err := s.relay.Claim(ctx, cdc.Session{}); err != nil {
		return err
	}
	for i := range s.n {
		for room := s.relay.Room(); room != nil; room = s.relay.Room() {
			select {
			case <-room:
			case <-ctx.Done():
				return nil
			}
		}
		s.relay.Touch()
		row := s.row(i)
		if err := s.relay.Row(row); err != nil {
			return err
		}
		s.relay.Commit(row.Commit + 48)
	}
	<-ctx.Done()
	return nil
}

func (s *rowsOf) Drain()                               {}
func (s *rowsOf) Confirm(_, _ cdc.LSN)                 {}
func (s *rowsOf) Confirmed(context.Context) error      { return nil }
func (s *rowsOf) Lag(context.Context) (cdc.Lag, error) { return cdc.Lag{}, nil }

type noClaims struct{ *flaky }

func (noClaims) Claim(context.Context, cdc.Session) (outbox.Checkpoint, bool, error) {
	return outbox.Checkpoint{LSN: 1}, true, nil
}

// BenchmarkRelayHotPath is rows in, attempts out; the network and the database are free.
func BenchmarkRelayHotPath(b *testing.B) {
	for _, c := range []struct {
		name      string
		keys      int
		endpoints int
		ordering  outbox.Ordering
		filter    string
	}{
		{"Unkeyed", 0, 1, outbox.OrderKey, ""},
		{"Keys1000", 1000, 1, outbox.OrderKey, ""},
		{"OneKey", 1, 1, outbox.OrderKey, ""},
		{"All", 1000, 1, outbox.OrderAll, ""},
		{"Keys1000Endpoints10", 1000, 10, outbox.OrderKey, ""},
		{"FilterOnType", 1000, 1, outbox.OrderKey, "type == 'order.created'"},
		{"FilterOnData", 1000, 1, outbox.OrderKey, "data.amount > 10.0"},
		{"FilterOnDataEndpoints10", 1000, 10, outbox.OrderKey, "data.amount > 10.0"},
	} {
		b.Run(c.name, func(b *testing.B) {
			m, err := outbox.NewMapper([]outbox.Source{{Table: "public.outbox"}})
			require.NoError(b, err)
			var wants *rule.Filter
			if c.filter != "" {
				wants, err = rule.CompileFilter(c.filter)
				require.NoError(b, err)
			}
			var endpoints []*outbox.Endpoint
			for i := range c.endpoints {
				endpoints = append(endpoints, endpoint("e"+strconv.Itoa(i), func(e *outbox.Endpoint) { e.Ordering, e.Concurrency, e.Filter = c.ordering, 64, wants }))
			}
			keys := make([][]byte, max(1, c.keys))
			for i := range keys {
				if c.keys > 0 {
					keys[i] = fmt.Appendf(nil, "key-%d", i)
				}
			}
			send := &instant{want: int64(b.N * c.endpoints), done: make(chan struct{})}
			r, err := outbox.New(outbox.Config{
				Mapper: m, Store: outboxtest.New(), Claims: noClaims{}, Sender: send, Endpoints: endpoints,
				MaxEvents: 10_000, MaxBytes: 64 << 20, SpillAfter: time.Minute, Logger: logger, Registerer: prometheus.NewRegistry(),
			})
			require.NoError(b, err)
			typ, data, at := []byte("order.created"), []byte(`{"order": 4711, "amount": 12.5, "customer": "c-19"}`), time.Now()
			row := cdc.Row{CommitTime: at, Relation: outboxRelation, Values: make([][]byte, 4)}
			id := make([]byte, 0, 20)
			src := &rowsOf{relay: r, n: b.N, row: func(i int) *cdc.Row {
				id = strconv.AppendInt(id[:0], int64(i), 10)
				row.Position = cdc.Position{Commit: cdc.LSN(100 * (i + 1)), Ordinal: 1}
				row.Values[0], row.Values[1], row.Values[2], row.Values[3] = id, typ, keys[i%len(keys)], data
				return &row
			}}
			ctx, cancel := context.WithCancel(b.Context())
			ended := make(chan error)
			b.ReportAllocs()
			b.ResetTimer()
			go func() { ended <- r.Run(ctx, src, time.Minute) }()
			<-send.done
			b.StopTimer()
			cancel()
			require.NoError(b, <-ended)
		})
	}
}
