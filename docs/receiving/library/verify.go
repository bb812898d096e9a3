// A receiver of webhooks that verifies them with the library of Standard Webhooks.
package main

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"slices"
	"strings"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
)

func main() {
	var verifiers []*standardwebhooks.Webhook // one for each secret: during a rotation there are two
	for _, secret := range strings.Fields(os.Getenv("WEBHOOK_SECRETS")) {
		v, err := standardwebhooks.NewWebhook(secret)
		if err != nil {
			log.Fatal(err)
		}
		verifiers = append(verifiers, v)
	}
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
		if err != nil {
			w.WriteHeader(http.StatusRequestEntityTooLarge)
			return
		}
		if !slices.ContainsFunc(verifiers, func(v *standardwebhooks.Webhook) bool { return v.Verify(body, r.Header) == nil }) {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		fmt.Println(r.Header.Get("webhook-id")) // here: write it down, then answer
		w.WriteHeader(http.StatusNoContent)
	})))
}
