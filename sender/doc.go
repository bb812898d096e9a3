// Package sender makes one attempt: it posts one event to one endpoint and says what came of it.
//
// It owns the request's bytes, the signatures, the access tokens, the connection, the endpoint's
// circuit, the guard that judges the address dialled, and the one function that judges an answer (judge, in
// outcome.go). It knows net/http and gobreaker; nothing else in the house does.
//
// What it promises:
//
//   - An attempt ends. One deadline, the endpoint's timeout, spans dial, handshake, request,
//     answer and what is read of the answer's body, whatever the receiver does.
//   - The status line decides. A body that hangs, breaks or never ends turns no 2xx into a failure.
//   - What is signed is what is sent, byte for byte, and a payload is never decoded.
//   - A batch is one request and one outcome. An event of which no request can be made is left out of
//     it, told of with its reason, and says nothing of the others.
//   - A connection that the receiver closed while it was idle costs no attempt: the same request goes
//     again on a fresh one. What comes on an idle one is no answer to anything.
//   - By whichever way a request goes, a wire of ours or net/http, the same bytes mean the same (wire.go).
//   - A circuit hears of each attempt exactly once, also after a panic or a cancel, so a probe
//     can never leave it half-open for ever.
//   - What this host lacks (descriptors, ports, memory) spends no attempt and counts against no
//     circuit: the delivery is held for a moment. Attempts of all endpoints together are bounded
//     below the limit of open files, and none that hangs can have all of them (room.go).
//   - Behind a proxy the guard judges what it judges without one: the proxy is asked for the address.
//   - One request for an access token is under way at a time, made by an attempt and within its
//     time; one that fails is a failure of that endpoint, and of no other.
//   - No outcome, log line, metric or error holds a URL, a query or a secret.
//
// What it never does: wait for anything but the network, (up to roomWait) a place in it and (up to shareWait)
// a connection that others have,
// retry, queue, follow a redirect, start a goroutine that outlives a request (net/http keeps two for each of its idle connections,
// for at most idleConnTimeout), read a file, use a proxy that the endpoint does not name, or read an event's data
// but by the rules of its endpoint's transform.
//
// # Life of an endpoint
//
// Endpoints are immutable, and a reload brings a new *outbox.Endpoint with the same id. What
// was made of its settings (keys, headers, URL, transport) is a target, cached by the pointer
// and renewed with it. What was learned of it (its circuit and its counters, and its access token
// where that is still asked for in the same way) is kept by id and survives, until Forget.
//
// # Circuit
//
//	            ConsecutiveFailures in a row, or
//	            FailureRate of MinRequests in Window
//	┌────────┐ ─────────────────────────────────────► ┌──────┐
//	│ closed │                                        │ open │ ◄─────────┐
//	└────────┘ ◄──────────────┐                       └──────┘           │
//	 all may send             │                        none may (Held)   │ the probe failed
//	                          │ the probe              after OpenFor,    │
//	                          │ was delivered          by the next Send  │
//	                          │                           ▼              │
//	                          │                     ┌───────────┐        │
//	                          └──────────────────── │ half-open │ ───────┘
//	                                                └───────────┘
//	                                         one may send, the others are Held
//
// A result that counts neither way (outcome.go says which) leaves the circuit as it is; a
// half-open one lets the next probe through. Time alone moves nothing: an open circuit becomes
// half-open when somebody asks, so who holds a delivery asks again at Outcome.Until.
package sender
