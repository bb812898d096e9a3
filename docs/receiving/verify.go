// A receiver of webhooks that verifies them by Standard Webhooks, with the standard library alone.
package main

import (
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

type key struct {
	version string // of its signatures: v1 for whsec_ (HMAC-SHA256), v1a for whpk_ (ed25519)
	bytes   []byte
}

// parse reads secrets: during a rotation there are two, later one again.
func parse(secrets string) (keys []key, err error) {
	for _, secret := range strings.Fields(secrets) {
		kind, text, _ := strings.Cut(secret, "_")
		version := map[string]string{"whsec": "v1", "whpk": "v1a"}[kind]
		bytes, err := base64.StdEncoding.DecodeString(text)
		if err != nil || version == "" || len(bytes) == 0 || version == "v1a" && len(bytes) != ed25519.PublicKeySize {
			return nil, errors.New("a secret is whsec_ or whpk_ and base64")
		}
		keys = append(keys, key{version, bytes})
	}
	return keys, nil
}

func (k key) signed(content, signature []byte) bool {
	if k.version == "v1a" {
		return ed25519.Verify(k.bytes, content, signature)
	}
	mac := hmac.New(sha256.New, k.bytes)
	mac.Write(content)
	return hmac.Equal(mac.Sum(nil), signature) // in constant time
}

// verify takes the body as it came: JSON that was parsed and printed again has another signature.
func verify(keys []key, header http.Header, body []byte) error {
	id, timestamp := header.Get("webhook-id"), header.Get("webhook-timestamp")
	seconds, err := strconv.ParseInt(timestamp, 10, 64)
	if err != nil || time.Since(time.Unix(seconds, 0)).Abs() > 5*time.Minute {
		return errors.New("webhook-timestamp is missing or too far from now")
	}
	content := append([]byte(id+"."+timestamp+"."), body...)
	for _, one := range strings.Fields(header.Get("webhook-signature")) {
		version, text, _ := strings.Cut(one, ",")
		signature, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			continue
		}
		for _, k := range keys {
			if k.version == version && k.signed(content, signature) {
				return nil
			}
		}
	}
	return errors.New("no signature is of a secret that we have")
}

func main() {
	keys, err := parse(os.Getenv("WEBHOOK_SECRETS"))
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
		if err != nil {
			w.WriteHeader(http.StatusRequestEntityTooLarge)
			return
		}
		if err := verify(keys, r.Header, body); err != nil {
			http.Error(w, err.Error(), http.StatusUnauthorized)
			return
		}
		fmt.Println(r.Header.Get("webhook-id")) // here: write it down, then answer
		w.WriteHeader(http.StatusNoContent)
	})))
}
