package sender

import (
	"crypto/ed25519"
	"encoding/base64"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/sender/sendertest"
)

// standardOf is the one signature of an endpoint with these secrets and the scheme standard.
func standardOf(t *testing.T, secrets ...outbox.Secret) *signature {
	t.Helper()
	all, errs := parseSigning(endpoint("https://x.example/", func(e *outbox.Endpoint) { e.Secrets = secrets }))
	require.Empty(t, errs)
	require.Len(t, all, 1)
	return &all[0]
}

// The vector of the official libraries; the ed25519 signature was made by node's crypto.
func TestSignaturesAreThoseOfTheSpecification(t *testing.T) {
	b := &body{parts: [3][]byte{[]byte(`{"test"`), []byte(`: 2432232314`), []byte(`}`)}}
	const want = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE= " +
		"v1a,yoUrgEkc12aGqm0n4Sydmdz55xJfTz4AsAgieHFjmkR7LJtqVCZOQYzvvHjI5kAey+r4iaBGxTFRrl2iBQxtDQ=="
	signature := standardOf(t, hmacSecret, edSecret)
	for range 3 { // a hash used again signs the same
		require.Equal(t, want, signature.sign("msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", b))
	}
}

func TestOfficialLibraryVerifiesEachOfSeveralSecrets(t *testing.T) {
	second := "whsec_" + base64.StdEncoding.EncodeToString([]byte("another key, of thirty-two bytes"))
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{hmacSecret, second, edSecret}})
	c := setup(t, nil)
	e := endpoint(rx.URL(), func(e *outbox.Endpoint) { e.Secrets = []outbox.Secret{hmacSecret, outbox.Secret(second), edSecret} })

	require.Equal(t, outbox.Delivered, c.send(e).Verdict)

	got := rx.Requests()[0]
	require.NoError(t, got.Invalid)
	parts := strings.Fields(got.Header.Get("webhook-signature"))
	require.Len(t, parts, 3)
	require.WithinDuration(t, time.Now(), got.Timestamp, 5*time.Second)
}

func TestReceiverRefusesASignatureOfAnotherSecret(t *testing.T) {
	rx, err := sendertest.Open(sendertest.Config{Secrets: []string{"whsec_" + base64.StdEncoding.EncodeToString([]byte("wrong"))}})
	require.NoError(t, err)
	defer rx.Close()
	c := setup(t, nil)
	c.send(endpoint(rx.URL(), signed))
	require.Error(t, rx.Requests()[0].Invalid)
}

func TestPrivateKeyOf64BytesSignsAsItsSeed(t *testing.T) {
	seed, _ := base64.StdEncoding.DecodeString(strings.TrimPrefix(edSecret, "whsk_"))
	whole := "whsk_" + base64.StdEncoding.EncodeToString(ed25519.NewKeyFromSeed(seed))
	b := &body{parts: [3][]byte{nil, []byte("x"), nil}}
	require.Equal(t, standardOf(t, edSecret).sign("a", "1", b), standardOf(t, outbox.Secret(whole)).sign("a", "1", b))
}

func TestEverySignatureVerifiesWhateverTheBody(t *testing.T) {
	wh, err := standardwebhooks.NewWebhook(hmacSecret)
	require.NoError(t, err)
	for _, content := range []string{"", "null", `{"a":"` + strings.Repeat("ü", 100_000) + `"}`, "\x00\xff\xfe"} {
		now := strconv.FormatInt(time.Now().Unix(), 10)
		b := &body{parts: [3][]byte{nil, []byte(content), nil}}
		h := http.Header{}
		h.Set("webhook-id", "evt%2E1")
		h.Set("webhook-timestamp", now)
		h.Set("webhook-signature", standardOf(t, hmacSecret).sign("evt%2E1", now, b))
		require.NoError(t, wh.Verify([]byte(content), h))
	}
}
