package main

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// call posts with an id and returns the answer's status.
func call(ctx context.Context, url, id string) (int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader("{}"))
	if err != nil {
		return 0, err
	}
	req.Header["webhook-id"] = []string{id}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}

func TestTheReceiverMisbehavesOnSomePathsOnly(t *testing.T) {
	orders, words, addr := newReceiver(t)
	ask(t, orders, words, order{Do: "expect", Expect: &expectation{First: 1, Count: 100, Conduct: map[string]conduct{
		"/slow":    {Delay: 50 * time.Millisecond},
		"/refuses": {Status: 503},
		"/hangs":   {Hang: true},
		"/aside":   {Aside: true},
	}}})
	url := "http://" + addr
	for id, want := range map[string]struct {
		path   string
		status int
	}{"1": {"/well", 204}, "2": {"/slow", 204}, "3": {"/refuses", 503}, "4": {"/aside", 204}} {
		began := time.Now()
		status, err := call(t.Context(), url+want.path, id)
		require.NoError(t, err)
		require.Equal(t, want.status, status, want.path)
		if want.path == "/slow" {
			require.GreaterOrEqual(t, time.Since(began), 50*time.Millisecond)
		}
	}
	let := make(chan error, 1)
	go func() {
		_, err := call(t.Context(), url+"/hangs", "5")
		let <- err
	}()
	// The request that hangs is the fourth that counts.
	var got *observations
	require.Eventually(t, func() bool {
		got = ask(t, orders, words, order{Do: "result"}).Result
		return got.Requests == 4
	}, 10*time.Second, 5*time.Millisecond)
	require.EqualValues(t, 2, got.Distinct)
	require.EqualValues(t, 2, got.Refused)
	select {
	case err := <-let:
		t.Fatalf("it was answered: %v", err)
	default:
	}
	ask(t, orders, words, order{Do: "expect", Expect: &expectation{First: 1, Count: 2}})
	require.NoError(t, <-let, "what hung is let go")
	status, err := call(t.Context(), url+"/refuses", "1")
	require.NoError(t, err)
	require.Equal(t, 204, status, "and all is well again")
}

func TestTheReceiverComesUpWhereItIsTold(t *testing.T) {
	orders, words, _ := newReceiver(t)
	addr, err := freeAddr()
	require.NoError(t, err)
	_, err = call(t.Context(), "http://"+addr, "1")
	require.Error(t, err)
	ask(t, orders, words, order{Do: "expect", Expect: &expectation{First: 1, Count: 2}})
	require.Equal(t, "open", ask(t, orders, words, order{Do: "open", Addr: addr}).Event)
	status, err := call(t.Context(), "http://"+addr, "1")
	require.NoError(t, err)
	require.Equal(t, 204, status)
}
