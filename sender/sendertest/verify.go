package sendertest

import (
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strings"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
)

// verifier checks the signature of one secret. It shares no code with the sender.
type verifier func(header http.Header, body []byte) error

// newVerifier makes the receiver's side of a secret: whsec_ by the official library, whsk_ and
// whpk_ by crypto/ed25519, since that library knows v1 only.
func newVerifier(secret string) (verifier, error) {
	switch {
	case strings.HasPrefix(secret, "whsec_"):
		wh, err := standardwebhooks.NewWebhook(secret)
		if err != nil {
			return nil, errors.New("not a whsec_ secret")
		}
		return func(h http.Header, body []byte) error { return wh.Verify(body, h) }, nil
	case strings.HasPrefix(secret, "whsk_"), strings.HasPrefix(secret, "whpk_"):
		key, err := base64.StdEncoding.DecodeString(secret[len("whsk_"):])
		if err != nil {
			return nil, errors.New("not base64")
		}
		switch {
		case len(key) == ed25519.PrivateKeySize:
			key = key[ed25519.SeedSize:]
		case strings.HasPrefix(secret, "whsk_") && len(key) == ed25519.SeedSize:
			key = ed25519.NewKeyFromSeed(key).Public().(ed25519.PublicKey)
		case len(key) != ed25519.PublicKeySize:
			return nil, errors.New("not an ed25519 key")
		}
		return func(h http.Header, body []byte) error { return verifyEd25519(key, h, body) }, nil
	}
	return nil, errors.New("begins with none of whsec_, whsk_, whpk_")
}

func verifyEd25519(key ed25519.PublicKey, h http.Header, body []byte) error {
	content := h.Get("webhook-id") + "." + h.Get("webhook-timestamp") + "." + string(body)
	for one := range strings.FieldsSeq(h.Get("webhook-signature")) {
		enc, ok := strings.CutPrefix(one, "v1a,")
		if !ok {
			continue
		}
		sig, err := base64.StdEncoding.DecodeString(enc)
		if err == nil && ed25519.Verify(key, []byte(content), sig) {
			return nil
		}
	}
	return errors.New("no v1a signature matches")
}

// verify returns what is wrong with a request's signatures: every secret has to have made one.
func verify(vs []verifier, h http.Header, body []byte) error {
	var errs []error
	for i, v := range vs {
		if err := v(h, body); err != nil {
			errs = append(errs, fmt.Errorf("secrets[%d]: %w", i, err))
		}
	}
	return errors.Join(errs...)
}
