package sender

import (
	"crypto/ed25519"
	"encoding/base64"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
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

// While a secret is being changed both verify, from the end of the overlap on the new one alone.
func TestFromTheEndOfItsOverlapAnOldSecretSignsNoMore(t *testing.T) {
	fresh := "whsec_" + base64.StdEncoding.EncodeToString([]byte("another key, of thirty-two bytes"))
	verifies := func(got http.Header, body []byte, secret string) bool {
		wh, err := standardwebhooks.NewWebhook(secret)
		require.NoError(t, err)
		return wh.VerifyIgnoringTimestamp(body, got) == nil // a bubble's clock stands elsewhere
	}
	synctest.Test(t, func(t *testing.T) {
		var header http.Header
		var body []byte
		b := setup(t, fake(func(r *http.Request) (*http.Response, error) {
			header = make(http.Header)
			for name, values := range r.Header {
				if len(values) > 0 {
					header.Set(name, values[0])
				}
			}
			body, _ = io.ReadAll(r.Body)
			return answer(200)
		}))
		until := time.Now().Add(24 * time.Hour)
		both := endpoint("https://x.example/", func(e *outbox.Endpoint) {
			e.Secrets, e.PreviousUntil = []outbox.Secret{outbox.Secret(fresh), hmacSecret, edSecret}, until
			e.Signing = signing("standard", "stripe", "github")
		})
		for _, c := range []struct {
			after time.Duration
			old   bool
		}{{0, true}, {24*time.Hour - time.Nanosecond, true}, {time.Nanosecond, false}, {1000 * time.Hour, false}} {
			pass(c.after)
			require.Equal(t, outbox.Delivered, b.send(both).Verdict)
			require.True(t, verifies(header, body, fresh), "the new one signs at all times")
			require.Equal(t, c.old, verifies(header, body, hmacSecret), "until %s, now %s", until, time.Now())
			require.Equal(t, c.old, strings.Contains(header.Get("webhook-signature"), "v1a,"))
			stripe := strings.Count(header.Get("Stripe-Signature"), "v1=")
			require.Equal(t, c.old, stripe == 3, "%d signatures", stripe)
			require.NotEmpty(t, header.Get("X-Hub-Signature-256"))
		}
		// Without an end, all of them go on; with one that is long over and a single secret, that one does.
		require.Equal(t, outbox.Delivered, b.send(endpoint("https://x.example/", func(e *outbox.Endpoint) { e.Secrets = both.Secrets })).Verdict)
		require.True(t, verifies(header, body, hmacSecret))
		require.Equal(t, outbox.Delivered, b.send(endpoint("https://x.example/", func(e *outbox.Endpoint) {
			e.Secrets, e.PreviousUntil = both.Secrets[:1], time.Now().Add(-time.Hour)
		})).Verdict)
		require.True(t, verifies(header, body, fresh))
		require.Equal(t, outbox.Delivered, b.send(endpoint("https://x.example/", func(e *outbox.Endpoint) { e.PreviousUntil = time.Now() })).Verdict)
		require.Empty(t, header.Get("webhook-signature"))
	})
}
