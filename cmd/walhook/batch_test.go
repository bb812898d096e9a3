package main

import (
	"context"
	"encoding/json"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/sender/sendertest"
)

// unpacked are the events of the batches that were accepted, each as if it had come alone.
func unpacked(t *testing.T, batches []sendertest.Request) (events []sendertest.Request) {
	t.Helper()
	for _, b := range batches {
		if b.Status/100 != 2 {
			continue
		}
		var elements []struct {
			ID   string
			Data json.RawMessage
		}
		require.NoError(t, b.Invalid)
		require.NoError(t, json.Unmarshal(b.Body, &elements))
		for _, e := range elements {
			events = append(events, sendertest.Request{ID: e.ID, Data: e.Data, Status: b.Status})
		}
	}
	return events
}

// Batches at a shared rate, some of which fail, through stops and starts: each event arrives once
// and in its place.
func TestBatchesAtARateLoseAndRepeatNothing(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	var n atomic.Int64
	respond := func(sendertest.Request) sendertest.Answer {
		if n.Add(1)%5 == 0 {
			return sendertest.Status(429)
		}
		return sendertest.Status(200)
	}
	one := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}, Respond: respond})
	other := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	const more = ", rate_limit: {group: crm, rate: 40/s}, batch: {max_events: 50, linger: 100ms}"
	config := b.config(endpoint("one", one, more), endpoint("other", other, more+", ordering: all"))
	p := start(t, config).streaming()
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.produce(4, 500, 7)
	}()
	for range 2 {
		requireAtLeast(t, other, other.Count()+8)
		p.stop()
		p = start(t, config).streaming()
	}
	<-done
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, rx := range []*sendertest.Receiver{one, other} {
		var got []sendertest.Request
		require.NoError(t, rx.WaitUntil(ctx, func(batches []sendertest.Request) bool {
			got = unpacked(t, batches)
			return len(got) >= 2000
		}))
		require.Len(t, got, 2000)
		for id, times := range sendertest.Duplicates(got) {
			t.Errorf("%s came %d times", id, times)
		}
		require.NoError(t, sendertest.Disorder(got, sendertest.Fields("key", "n")))
		require.Less(t, len(succeeded(rx)), 1000)
	}
	eventually(t, "nothing parked", func() bool { return b.ask("select count(*) from walhook.deliveries") == 0 })
	p.stop()
}
