package sendertest

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"strconv"
	"testing"
	"time"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
	"github.com/stretchr/testify/require"
)

const secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

func post(t *testing.T, rx *Receiver, id, body string) (status int, err error) {
	t.Helper()
	wh, err := standardwebhooks.NewWebhook(secret)
	require.NoError(t, err)
	now := time.Now()
	sig, err := wh.Sign(id, now, []byte(body))
	require.NoError(t, err)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, rx.URL(), bytes.NewReader([]byte(body)))
	require.NoError(t, err)
	req.Header.Set("webhook-id", id)
	req.Header.Set("webhook-attempt", "2")
	req.Header.Set("webhook-timestamp", strconv.FormatInt(now.Unix(), 10))
	req.Header.Set("webhook-signature", sig)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	return res.StatusCode, res.Body.Close()
}

func TestReceiverAnswersByScriptAndRemembers(t *testing.T) {
	rx := New(t, Config{Secrets: []string{secret}})
	rx.Script(append(Times(2, Status(503, "Retry-After", "1")), Reset(), Body(200, "fine"))...)
	var got []int
	for range 5 {
		status, _ := post(t, rx, "evt_1", `{"type":"a.b","timestamp":"2026-01-01T00:00:00Z","data":{"key":"k","seq":3}}`)
		got = append(got, status)
	}
	require.Equal(t, []int{503, 503, 0, 200, 204}, got)
	last := rx.Requests()[4]
	require.NoError(t, last.Invalid)
	require.Equal(t, "a.b", last.Type)
	require.Equal(t, 2, last.Attempt)
	require.Equal(t, 5, last.Turn)
	require.JSONEq(t, `{"key":"k","seq":3}`, string(last.Data))
	require.Equal(t, map[string]int{"evt_1": 2}, Duplicates(rx.Requests()))
	key, n := Fields("key", "seq")(last)
	require.Equal(t, "k", key)
	require.EqualValues(t, 3, n)
}

func TestReceiverSeesAWrongSignature(t *testing.T) {
	for _, s := range []string{
		"whsec_" + base64.StdEncoding.EncodeToString([]byte("another")),
		"whsk_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
	} {
		rx, err := Open(Config{Secrets: []string{secret, s}})
		require.NoError(t, err)
		_, err = post(t, rx, "evt_1", `{}`)
		require.NoError(t, err)
		require.ErrorContains(t, rx.Requests()[0].Invalid, "secrets[1]")
		rx.Close()
	}
}

func TestReceiverRefusesAndComesBackAtTheSameAddress(t *testing.T) {
	rx := New(t, Config{})
	url := rx.URL()
	for range 3 {
		rx.Refuse()
		_, err := post(t, rx, "a", `{}`)
		require.ErrorContains(t, err, "refused")
		require.NoError(t, rx.Reopen())
		_, err = post(t, rx, "a", `{}`)
		require.NoError(t, err)
	}
	require.Equal(t, url, rx.URL())
	require.Equal(t, 3, rx.Count())
}

func TestWaitingEndsBySignalOrWithItsContext(t *testing.T) {
	rx := New(t, Config{Keep: 2})
	go func() {
		for i := range 5 {
			_, _ = post(t, rx, fmt.Sprint("evt_", i), `{}`)
		}
	}()
	require.NoError(t, rx.WaitFor(t.Context(), 5))
	require.NoError(t, rx.WaitUntil(t.Context(), func(all []Request) bool {
		return len(all) == 2 && all[1].ID == "evt_4" && all[1].Status == 204
	}))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, rx.WaitFor(ctx, 6), context.Canceled)
}

func TestDisorderNamesWhatCameLate(t *testing.T) {
	request := func(id, key string, n int64, status int) Request {
		return Request{ID: id, Status: status, Data: []byte(fmt.Sprintf(`{"k":%q,"n":%d}`, key, n))}
	}
	place := Fields("k", "n")
	require.NoError(t, Disorder([]Request{
		request("1", "a", 1, 200), request("2", "b", 9, 200), request("3", "a", 2, 503), request("4", "b", 10, 200),
		request("3", "a", 2, 204), request("1", "a", 1, 200), // a repeat is no disorder
		request("5", "", 1, 200), request("6", "", 0, 200), // neither are events without a key
	}, place))
	require.EqualError(t, Disorder([]Request{
		request("1", "a", 2, 200), request("2", "a", 1, 200), request("3", "a", 3, 200),
	}, place), "key a: 2 (1) came behind 1 (2)")
}
