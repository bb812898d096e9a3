package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// newReceiver plays the role in this process, and returns what talks to it.
func newReceiver(t *testing.T) (orders *json.Encoder, words *json.Decoder, addr string) {
	t.Helper()
	stdin, in := io.Pipe()
	out, stdout := io.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- play(context.Background(), roleReceiver, stdin, stdout) }()
	t.Cleanup(func() {
		require.NoError(t, in.Close())
		require.NoError(t, <-ended)
	})
	orders, words = json.NewEncoder(in), json.NewDecoder(out)
	var ready word
	require.NoError(t, words.Decode(&ready))
	require.Equal(t, "ready", ready.Event)
	return orders, words, ready.Addr
}

func ask(t *testing.T, orders *json.Encoder, words *json.Decoder, o order) word {
	t.Helper()
	go func() { _ = orders.Encode(o) }()
	var w word
	require.NoError(t, words.Decode(&w))
	return w
}

func TestTheReceiverSeesWhatIsLostRepeatedInventedAndOvertaken(t *testing.T) {
	for _, client := range []string{netHTTP, fastHTTP} {
		orders, words, addr := newReceiver(t)
		require.Equal(t, "expecting", ask(t, orders, words, order{Do: "expect", Expect: &expectation{First: 100, Count: 6, Keys: 2, Target: 5}}).Event)
		p, err := newPoster(client, "http://"+addr+"/a")
		require.NoError(t, err)
		reached := make(chan word, 1)
		go func() {
			var w word
			_ = words.Decode(&w)
			reached <- w
		}()
		// 102 and 100 are of one key; 101 and 103 of the other.
		for _, id := range []int{102, 100, 101, 103, 103, 99, 106, 104} {
			require.NoError(t, p.post(fmt.Sprint(id), []byte("{}")))
		}
		require.Equal(t, "reached", (<-reached).Event)
		got := ask(t, orders, words, order{Do: "result"}).Result
		require.EqualValues(t, 8, got.Requests)
		require.EqualValues(t, 5, got.Distinct)
		require.EqualValues(t, 1, got.Repeated)
		require.EqualValues(t, 2, got.Invented)
		require.EqualValues(t, 1, got.Overtaken)
		require.EqualError(t, got.wrong(6), "of 6 deliveries 1 were lost, 1 repeated, 2 invented, 1 out of order, 0 wrongly signed")
		require.Positive(t, got.rate())
	}
}

func TestTheReceiverTellsHowLongItTook(t *testing.T) {
	orders, words, addr := newReceiver(t)
	ask(t, orders, words, order{Do: "expect", Expect: &expectation{First: 1, Count: 2, Timed: true}})
	p, err := newPoster(netHTTP, "http://"+addr)
	require.NoError(t, err)
	inserted := time.Now().Add(-3 * time.Second)
	body := appendBody(nil, parcel{kind: eventType, at: inserted.Add(time.Second), data: []byte(payload(inserted.UnixNano(), padding(100), 100))})
	require.NoError(t, p.post("1", body))
	got := ask(t, orders, words, order{Do: "result"}).Result
	require.InDelta(t, 3*time.Second, got.FromInsert[0], float64(time.Second))
	require.InDelta(t, 2*time.Second, got.FromCommit[0], float64(time.Second))
	require.EqualValues(t, time.Second, got.FromInsert[0]-got.FromCommit[0])
}

func TestTheReceiverChecksSignatures(t *testing.T) {
	orders, words, addr := newReceiver(t)
	ask(t, orders, words, order{Do: "expect", Expect: &expectation{First: 1, Count: 2, Signed: true}})
	p, err := newPoster(fastHTTP, "http://"+addr)
	require.NoError(t, err)
	require.NoError(t, p.post("1", []byte("{}")), "with a signature that is none")
	require.EqualValues(t, 1, ask(t, orders, words, order{Do: "result"}).Result.Unsigned)
}

func TestABatchHasTheIDsOfItsElements(t *testing.T) {
	t.Parallel()
	var ids []string
	eachInBatch([]byte(`[{"id":"7","type":"a","data":{"id": "8"}},{"id":"9","type":"b","data":{}}]`), func(id []byte) { ids = append(ids, string(id)) })
	require.Equal(t, []string{"7", "9"}, ids)
}

func TestAPayloadHasTheSizeThatItSays(t *testing.T) {
	t.Parallel()
	for _, size := range []int{200, 1000, 16_000} {
		require.Len(t, payload(0, padding(size), size), size)
	}
	body := []byte(`{"type":"a","timestamp":"2026-01-31T15:00:00.123456Z","data":` + payload(42, padding(100), 100) + "}")
	require.EqualValues(t, 42, insertedAt(body))
	require.Equal(t, time.Date(2026, 1, 31, 15, 0, 0, 123456000, time.UTC).UnixNano(), committedAt(body))
	require.Zero(t, insertedAt([]byte("{}")))
	require.Zero(t, committedAt([]byte("{}")))
}

func TestTheChainRendersTheFormatStandard(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 1, 31, 15, 0, 0, 123456000, time.FixedZone("", 3600))
	body := appendBody(nil, parcel{kind: "order.changed", at: at, data: []byte(`{"n": 1}`)})
	require.Equal(t, `{"type":"order.changed","timestamp":"2026-01-31T14:00:00.123456Z","data":{"n": 1}}`, string(body))
}

func TestARoleEndsWithItsStdin(t *testing.T) {
	t.Parallel()
	require.Error(t, play(context.Background(), "no such role", bytes.NewReader([]byte(`{"do":"x"}`)), io.Discard))
}
