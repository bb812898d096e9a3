package sender

import (
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"hash"
	"strings"
	"sync"
)

// Signatures follow Standard Webhooks 1.0.0
// (https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md):
// the signed content is id.timestamp.body, and every secret adds one signature to the list.

// secretKey is a parsed secret, exactly one of its fields set.
type secretKey struct {
	macs *sync.Pool // of *mac, for whsec_
	ed   ed25519.PrivateKey
}

// mac is an HMAC with the buffers it needs, so that a signature allocates nothing of its own.
type mac struct {
	hash   hash.Hash
	prefix []byte
	sum    []byte
}

// parseSecret reads whsec_ (an HMAC key in base64) or whsk_ (an ed25519 seed or private key in
// base64). Its errors never hold a character of the secret.
func parseSecret(secret string) (secretKey, error) {
	secret = strings.TrimSpace(secret) // a mounted file ends with a newline
	if secret == "" {
		return secretKey{}, errors.New("is empty")
	}
	if enc, ok := strings.CutPrefix(secret, "whsec_"); ok {
		key, err := base64.StdEncoding.DecodeString(enc)
		if err != nil {
			return secretKey{}, errors.New("what follows whsec_ is not base64 (standard alphabet, padded)")
		}
		if len(key) == 0 {
			return secretKey{}, errors.New("no key follows whsec_")
		}
		return secretKey{macs: &sync.Pool{New: func() any { return &mac{hash: hmac.New(sha256.New, key)} }}}, nil
	}
	if enc, ok := strings.CutPrefix(secret, "whsk_"); ok {
		key, err := base64.StdEncoding.DecodeString(enc)
		if err != nil {
			return secretKey{}, errors.New("what follows whsk_ is not base64 (standard alphabet, padded)")
		}
		switch len(key) {
		case ed25519.SeedSize:
			return secretKey{ed: ed25519.NewKeyFromSeed(key)}, nil
		case ed25519.PrivateKeySize:
			ed := ed25519.NewKeyFromSeed(key[:ed25519.SeedSize])
			if !ed.Equal(ed25519.PrivateKey(key)) {
				return secretKey{}, errors.New("the two halves of the ed25519 key do not belong together")
			}
			return secretKey{ed: ed}, nil
		}
		return secretKey{}, fmt.Errorf("whsk_ holds %d bytes; an ed25519 seed has %d, a private key %d",
			len(key), ed25519.SeedSize, ed25519.PrivateKeySize)
	}
	if strings.HasPrefix(secret, "whpk_") {
		return secretKey{}, errors.New("whpk_ is a public key, which cannot sign; use the whsk_ that belongs to it")
	}
	return secretKey{}, errors.New("must begin with whsec_ (HMAC-SHA256) or whsk_ (ed25519)")
}

// sign returns the value of webhook-signature: a signature for each key, with a space between.
func sign(keys []secretKey, id, timestamp string, b *body) string {
	const one = len("v1a,") + 88 // the longer of the two schemes
	out := make([]byte, 0, len(keys)*(one+1))
	for i, k := range keys {
		if i > 0 {
			out = append(out, ' ')
		}
		if k.ed != nil {
			out = append(out, "v1a,"...)
			out = base64.StdEncoding.AppendEncode(out, ed25519.Sign(k.ed, signedContent(id, timestamp, b)))
			continue
		}
		m := k.macs.Get().(*mac)
		m.prefix = appendSignedPrefix(m.prefix[:0], id, timestamp)
		m.hash.Reset()
		m.hash.Write(m.prefix)
		for _, part := range b.parts {
			m.hash.Write(part)
		}
		m.sum = m.hash.Sum(m.sum[:0])
		out = append(out, "v1,"...)
		out = base64.StdEncoding.AppendEncode(out, m.sum)
		k.macs.Put(m)
	}
	return string(out)
}

// signedContent is all that is signed in one piece, because ed25519 reads it twice.
func signedContent(id, timestamp string, b *body) []byte {
	content := make([]byte, 0, int64(len(id)+len(timestamp)+2)+b.size())
	content = appendSignedPrefix(content, id, timestamp)
	for _, part := range b.parts {
		content = append(content, part...)
	}
	return content
}

func appendSignedPrefix(dst []byte, id, timestamp string) []byte {
	dst = append(dst, id...)
	dst = append(dst, '.')
	dst = append(dst, timestamp...)
	return append(dst, '.')
}
