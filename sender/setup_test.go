package sender

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/sender/sendertest"
)

const (
	hmacSecret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
	edSecret   = "whsk_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
)

// plainSecret is used by its characters, which no base64 and no URL would bear.
const plainSecret = "s3cr3t, \"grüezi\" %20"

// patience is for what has to come on a busy machine.
const patience = 30 * time.Second

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bundle is a client with what it reports to.
type bundle struct {
	*Client
	t        *testing.T
	registry *prometheus.Registry
	logs     *observer.ObservedLogs
	moves    []string // of circuits; read it when no Send is in flight
}

func setup(t *testing.T, rt http.RoundTripper) *bundle {
	t.Helper()
	core, logs := observer.New(zap.DebugLevel)
	b := &bundle{t: t, registry: prometheus.NewRegistry(), logs: logs}
	c, err := New(Config{
		Logger: zap.New(core), Version: "1.2.3", Registerer: b.registry, Source: "/walhook/default/walhook", RoundTripper: rt,
		OnStateChange: func(id string, from, to State) {
			b.moves = append(b.moves, fmt.Sprintf("%s: %s → %s", id, from, to))
		},
	})
	require.NoError(t, err)
	b.Client = c
	t.Cleanup(b.leave)
	return b
}

// leave closes every connection, which one of HTTP/2 allows only some time after its last stream.
func (b *bundle) leave() {
	b.Close()
	if b.room.connections() == 0 {
		return
	}
	require.Eventually(b.t, func() bool {
		b.Close()
		return b.room.connections() == 0
	}, patience, time.Millisecond)
}

func (b *bundle) send(e *outbox.Endpoint) outbox.Outcome {
	return b.Send(b.t.Context(), outbox.Attempt{Event: event(), Endpoint: e, Number: 1})
}

func event() *outbox.Event {
	return &outbox.Event{
		ID: "evt_1", Type: "invoice.paid", Key: "inv-7", JSON: true, Data: []byte(`{"amount": 120.50}`),
		Time: time.Date(2026, 3, 1, 12, 30, 15, 123456000, time.FixedZone("", 3600)),
	}
}

func endpoint(url string, change ...func(*outbox.Endpoint)) *outbox.Endpoint {
	e := outbox.DefaultEndpoint()
	e.ID, e.URL = "billing", url
	for _, f := range change {
		f(&e)
	}
	return &e
}

func signed(e *outbox.Endpoint) { e.Secrets = []outbox.Secret{hmacSecret} }

// signing is one scheme or more of those with a name.
func signing(schemes ...outbox.Scheme) (all []outbox.Signing) {
	for _, s := range schemes {
		all = append(all, outbox.Signing{Scheme: s})
	}
	return all
}

// custom is the custom scheme at its defaults.
func custom(header string) outbox.Signing {
	s := outbox.CustomSigning()
	s.Header = header
	return s
}

// plain signs by one scheme with two secrets.
func plain(scheme outbox.Scheme) func(*outbox.Endpoint) {
	return func(e *outbox.Endpoint) {
		e.Secrets, e.Signing = []outbox.Secret{plainSecret, "older"}, signing(scheme)
	}
}

func cloudEvents(e *outbox.Endpoint)       { e.Format = outbox.FormatCloudEvents }
func cloudEventsBinary(e *outbox.Endpoint) { e.Format = outbox.FormatCloudEventsBinary }

func timeout(d time.Duration) func(*outbox.Endpoint) {
	return func(e *outbox.Endpoint) { e.Timeout = d }
}

// clientPair is a certificate and its key in PEM.
func clientPair(t *testing.T) (cert string, key outbox.Secret) {
	t.Helper()
	pair, cert, err := sendertest.Certificate("client.example", time.Time{})
	require.NoError(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	require.NoError(t, err)
	return cert, outbox.Secret(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// fake is a network for bubbles: it answers as it is told, at the pace of the bubble's clock.
type fake func(*http.Request) (*http.Response, error)

func (f fake) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func answer(status int, header ...string) (*http.Response, error) {
	h := make(http.Header)
	for i := 0; i+1 < len(header); i += 2 {
		h.Set(header[i], header[i+1])
	}
	return &http.Response{StatusCode: status, Header: h, Body: http.NoBody}, nil
}

// pass lets a bubble's clock go on.
func pass(d time.Duration) { <-time.After(d) }

// hang waits until the request's context ends.
func hang(r *http.Request) (*http.Response, error) {
	<-r.Context().Done()
	return nil, r.Context().Err()
}
