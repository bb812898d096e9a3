package sender

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/walhook/walhook/outbox"
)

// form is how one header of a scheme is made.
type form struct {
	header    string
	algorithm string // of the HMAC
	encoding  string
	prefix    string // before each signature
	content   string // what is signed
	lead      string // before all signatures
	many      bool   // the header holds a signature of every secret, else only of the newest
}

// presets are the schemes with a name, as their receivers know them:
//
//   - GitHub sends both its headers, the older one for those that know no other
//     (https://docs.github.com/en/webhooks/webhook-events-and-payloads#delivery-headers).
//   - Stripe repeats v1 while a secret is being changed (https://docs.stripe.com/webhooks#verify-manually).
//   - Shopify: https://shopify.dev/docs/apps/build/webhooks/verify-deliveries.
//   - NFE.io has a header for those who check by its documentation, and one for those who do by its npm package.
var presets = map[outbox.Scheme][]form{
	outbox.SchemeGitHub: {
		{header: "X-Hub-Signature-256", algorithm: "sha256", encoding: "hex", prefix: "sha256=", content: "{body}"},
		{header: "X-Hub-Signature", algorithm: "sha1", encoding: "hex", prefix: "sha1=", content: "{body}"},
	},
	outbox.SchemeStripe: {
		{header: "Stripe-Signature", algorithm: "sha256", encoding: "hex", lead: "t={timestamp}", prefix: ",v1=", content: "{timestamp}.{body}", many: true},
	},
	outbox.SchemeShopify: {
		{header: "X-Shopify-Hmac-Sha256", algorithm: "sha256", encoding: "base64", content: "{body}"},
	},
	outbox.SchemeNFEio: {
		{header: "X-Hub-Signature", algorithm: "sha1", encoding: "HEX", prefix: "sha1=", content: "{body}"},
		{header: "X-NFE-Signature", algorithm: "sha256", encoding: "hex", content: "{body}"},
	},
}

// standard is Standard Webhooks 1.0.0
// (https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md). Its
// prefixes, and for ed25519 the algorithm, come with the secrets.
var standard = form{header: headerSignature, encoding: "base64", content: "{id}.{timestamp}.{body}"}

var algorithms = map[string]*macs{"sha1": {make: sha1.New}, "sha256": {make: sha256.New}, "sha512": {make: sha512.New}}

// signature is one header that signs a request: a form with its keys, ready for use.
type signature struct {
	header   string
	encoding string
	lead     []piece // without the body
	content  []piece
	between  string // two signatures
	keys     []secretKey
}

// secretKey makes signatures with one secret. Exactly one of macs and ed is set.
type secretKey struct {
	prefix string // before its signatures
	macs   *macs
	key    []byte // of the macs: no longer than a block of their hash function
	ed     ed25519.PrivateKey
}

// newMAC is a secretKey that signs by HMAC.
func newMAC(by *macs, key []byte, prefix string) secretKey {
	m := by.get()
	if len(key) > m.BlockSize() {
		m.Reset()
		m.Write(key)
		key = m.Sum(nil)
	}
	by.put(m)
	return secretKey{prefix: prefix, macs: by, key: key}
}

// macs make the HMACs of a hash function, with whatever key. crypto/hmac's are of one key each, with a kilobyte of their own: with
// thousands of keys none of that is in a processor's cache when it is wanted, and to begin anew costs
// one key more than the two blocks that are hashed here. A test holds them to crypto/hmac.
type macs struct {
	make func() hash.Hash
	free sync.Pool // of *mac
}

// mac is an HMAC as RFC 2104 has it: H(K xor opad, H(K xor ipad, text)).
type mac struct {
	hash.Hash        // of the text so far
	pad       []byte // K xor ipad, later K xor opad
	text, sum []byte // buffers
}

const (
	innerPad = 0x36
	outerPad = 0x5c
)

func (s *macs) get() *mac {
	if m, ok := s.free.Get().(*mac); ok {
		return m
	}
	h := s.make()
	return &mac{Hash: h, pad: make([]byte, h.BlockSize())}
}

func (s *macs) put(m *mac) {
	clear(m.pad)
	s.free.Put(m)
}

// begin begins one of no text yet.
func (m *mac) begin(key []byte) {
	clear(m.pad)
	copy(m.pad, key)
	for i := range m.pad {
		m.pad[i] ^= innerPad
	}
	m.Reset()
	m.Write(m.pad)
}

// end gives the HMAC, which holds until the next one.
func (m *mac) end() []byte {
	m.sum = m.Sum(m.sum[:0])
	for i := range m.pad {
		m.pad[i] ^= innerPad ^ outerPad
	}
	m.Reset()
	m.Write(m.pad)
	m.Write(m.sum)
	m.sum = m.Sum(m.sum[:0])
	return m.sum
}

// parseSigning makes ready what signs the requests of an endpoint: nothing where its scheme is
// none, or standard without a secret.
func parseSigning(e *outbox.Endpoint) (all []signature, errs []error) {
	if len(e.Signing) == 0 {
		return nil, []error{fmt.Errorf("signing: is empty; %s sends unsigned", outbox.SchemeNone)}
	}
	asStandard := e.SignsBy(outbox.SchemeStandard)
	asTheyAre := slices.IndexFunc(e.Signing, func(s outbox.Signing) bool { // the first to use the secrets' own characters
		return s.Scheme == outbox.SchemeCustom || presets[s.Scheme] != nil
	})
	var standardKeys []secretKey
	for i, secret := range e.Secrets {
		switch {
		case asStandard:
			key, err := parseSecret(secret.Reveal())
			if err != nil {
				errs = append(errs, fmt.Errorf("secrets[%d]: %w", i, err))
				continue
			}
			standardKeys = append(standardKeys, key)
		case asTheyAre >= 0 && secret == "":
			errs = append(errs, fmt.Errorf("secrets[%d]: is empty", i))
		}
	}
	if asTheyAre >= 0 && len(e.Secrets) == 0 {
		errs = append(errs, fmt.Errorf("secrets: is missing; %s signing needs one", e.Signing[asTheyAre].Scheme))
	}

	first := make(map[string]outbox.Scheme) // by the header it sets, in lower case
	if e.SignsBy(outbox.SchemeNFEio) {
		for _, beside := range []string{headerHookID, headerHookAttempts} {
			first[strings.ToLower(beside)] = outbox.SchemeNFEio
		}
	}
	for i, s := range e.Signing {
		at := "signing"
		if len(e.Signing) > 1 {
			at = fmt.Sprintf("signing[%d]", i)
		}
		forms := presets[s.Scheme]
		switch s.Scheme {
		case outbox.SchemeStandard:
			forms = []form{standard}
		case outbox.SchemeNone:
			if len(e.Signing) > 1 {
				errs = append(errs, fmt.Errorf("%s: none stands alone", at))
			}
		case outbox.SchemeCustom:
			if wrong := checkCustom(s, at); wrong != nil {
				errs = append(errs, wrong...)
				continue
			}
			forms = []form{{header: s.Header, algorithm: s.Algorithm, encoding: s.Encoding, prefix: s.Prefix, content: s.Content}}
		default:
			if forms == nil {
				errs = append(errs, fmt.Errorf("%s: %q is not one of standard, github, stripe, shopify, nfeio, none, custom", at, s.Scheme))
			}
		}
		for _, f := range forms {
			lower := strings.ToLower(f.header)
			if other := first[lower]; other != "" {
				errs = append(errs, fmt.Errorf("%s: %s sets the header %s, which %s sets already", at, s.Scheme, f.header, other))
			}
			first[lower] = s.Scheme
			made := f.with(e.Secrets)
			if s.Scheme == outbox.SchemeStandard {
				if len(standardKeys) == 0 {
					continue // sent unsigned
				}
				made.keys, made.between = standardKeys, " "
			}
			all = append(all, made)
		}
	}
	return all, errs
}

// with makes a form ready for use with the secrets' characters as they are.
func (f form) with(secrets []outbox.Secret) signature {
	s := signature{header: f.header, encoding: f.encoding}
	s.lead, _ = parseContent(f.lead)
	s.content, _ = parseContent(f.content)
	if algorithm := algorithms[f.algorithm]; algorithm != nil {
		for i, secret := range secrets {
			if i == 0 || f.many {
				s.keys = append(s.keys, newMAC(algorithm, []byte(secret.Reveal()), f.prefix))
			}
		}
	}
	return s
}

// checkCustom checks the settings of the custom scheme. Its errors show none that might be a
// secret in the wrong place.
func checkCustom(s outbox.Signing, at string) (errs []error) {
	wrong := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf(at+"."+key+": "+format, args...))
	}
	if algorithms[s.Algorithm] == nil {
		wrong("algorithm", "is not one of sha1, sha256, sha512")
	}
	if s.Encoding != "hex" && s.Encoding != "HEX" && s.Encoding != "base64" {
		wrong("encoding", "is not one of hex, HEX, base64")
	}
	lower := strings.ToLower(s.Header)
	switch {
	case s.Header == "":
		wrong("header", "is missing")
	case !validHeaderName(s.Header):
		wrong("header", "is not a valid header name")
	case lower == headerSignature: // some have borrowed the name alone
	case reservedHeader(lower), lower == "user-agent", lower == "idempotency-key", lower == headerTraceparent:
		wrong("header", "%s is set by walhook and cannot be given", s.Header)
	}
	if !validHeaderValue(s.Prefix) {
		wrong("prefix", "holds a line break, NUL or another control character")
	}
	pieces, err := parseContent(s.Content)
	switch {
	case err != nil:
		wrong("content", "%w", err)
	case !slices.ContainsFunc(pieces, func(p piece) bool { return p.stand != itself }):
		wrong("content", "holds none of {body}, {id}, {timestamp}")
	}
	return errs
}

// stand is what a piece of signed content stands for.
type stand int

const (
	itself stand = iota // its text
	theBody
	theID
	theTimestamp
)

// piece is a part of what is signed.
type piece struct {
	stand stand
	text  string
}

var placeholder = regexp.MustCompile(`\{[A-Za-z][A-Za-z0-9_]*\}`)

// parseContent reads text with {body}, {id} and {timestamp} in it. Other braces are text.
func parseContent(s string) (pieces []piece, err error) {
	for s != "" {
		at := placeholder.FindStringIndex(s)
		if at == nil {
			return append(pieces, piece{text: s}), nil
		}
		if at[0] > 0 {
			pieces = append(pieces, piece{text: s[:at[0]]})
		}
		switch s[at[0]:at[1]] {
		case "{body}":
			pieces = append(pieces, piece{stand: theBody})
		case "{id}":
			pieces = append(pieces, piece{stand: theID})
		case "{timestamp}":
			pieces = append(pieces, piece{stand: theTimestamp})
		default:
			return nil, errors.New("holds a {…} that is not one of {body}, {id}, {timestamp}")
		}
		s = s[at[1]:]
	}
	return pieces, nil
}

// append writes a piece that is not the body.
func (p piece) append(dst []byte, id, timestamp string) []byte {
	switch p.stand {
	case theID:
		return append(dst, id...)
	case theTimestamp:
		return append(dst, timestamp...)
	}
	return append(dst, p.text...)
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
		return newMAC(algorithms["sha256"], key, "v1,"), nil
	}
	if enc, ok := strings.CutPrefix(secret, "whsk_"); ok {
		key, err := base64.StdEncoding.DecodeString(enc)
		if err != nil {
			return secretKey{}, errors.New("what follows whsk_ is not base64 (standard alphabet, padded)")
		}
		switch len(key) {
		case ed25519.SeedSize:
			return secretKey{ed: ed25519.NewKeyFromSeed(key), prefix: "v1a,"}, nil
		case ed25519.PrivateKeySize:
			ed := ed25519.NewKeyFromSeed(key[:ed25519.SeedSize])
			if !ed.Equal(ed25519.PrivateKey(key)) {
				return secretKey{}, errors.New("the two halves of the ed25519 key do not belong together")
			}
			return secretKey{ed: ed, prefix: "v1a,"}, nil
		}
		return secretKey{}, fmt.Errorf("whsk_ holds %d bytes; an ed25519 seed has %d, a private key %d",
			len(key), ed25519.SeedSize, ed25519.PrivateKeySize)
	}
	if strings.HasPrefix(secret, "whpk_") {
		return secretKey{}, errors.New("whpk_ is a public key, which cannot sign; use the whsk_ that belongs to it")
	}
	return secretKey{}, errors.New("must begin with whsec_ (HMAC-SHA256) or whsk_ (ed25519)")
}

// sign returns the value of the header: a signature of each key, over the very bytes of the body.
func (s *signature) sign(id, timestamp string, b *body) string {
	const one = len(" v1a,") + 88 // more than most need
	out := make([]byte, 0, len(s.keys)*one)
	for _, p := range s.lead {
		out = p.append(out, id, timestamp)
	}
	for i := range s.keys {
		k := &s.keys[i]
		if i > 0 {
			out = append(out, s.between...)
		}
		out = append(out, k.prefix...)
		if k.ed != nil {
			out = s.encode(out, ed25519.Sign(k.ed, s.signed(id, timestamp, b)))
			continue
		}
		m := k.macs.get()
		m.begin(k.key)
		m.text = m.text[:0]
		for _, p := range s.content {
			if p.stand != theBody {
				m.text = p.append(m.text, id, timestamp)
				continue
			}
			m.Write(m.text)
			m.text = m.text[:0]
			for _, part := range b.parts {
				m.Write(part)
			}
		}
		m.Write(m.text)
		out = s.encode(out, m.end())
		k.macs.put(m)
	}
	return string(out)
}

// signed is all that is signed in one piece, because ed25519 reads it twice.
func (s *signature) signed(id, timestamp string, b *body) []byte {
	all := make([]byte, 0, int64(len(id)+len(timestamp)+16)+b.size())
	for _, p := range s.content {
		if p.stand != theBody {
			all = p.append(all, id, timestamp)
			continue
		}
		for _, part := range b.parts {
			all = append(all, part...)
		}
	}
	return all
}

func (s *signature) encode(dst, sum []byte) []byte {
	if s.encoding == "base64" {
		return base64.StdEncoding.AppendEncode(dst, sum)
	}
	begin := len(dst)
	dst = hex.AppendEncode(dst, sum)
	if s.encoding == "HEX" {
		copy(dst[begin:], bytes.ToUpper(dst[begin:]))
	}
	return dst
}
