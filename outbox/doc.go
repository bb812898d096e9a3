// Package outbox turns committed rows into events and brings each event to every endpoint that
// wants it. All waiting and all ordering lives here: a delivery that waits in two places would be
// overtaken between them.
//
// It owns the words Event, Endpoint, Delivery and Outcome; the Registry (who wants what), the
// Ledger (what is owed, and how much memory is held), the Lane of each endpoint (queue, order,
// retry time), the journal (writes to the store, in batches) and the Relay, which ties them to the
// stream. The schema walhook is behind the interface Store, one HTTP attempt behind Sender.
//
// It promises:
//
//   - Ledger.Low never passes an unsettled delivery. Settled is: delivered, wanted by nobody, or
//     committed to the schema walhook. The slot is told of it only when the stream has passed the
//     commit of the checkpoint that says so, hence of everything that the checkpoint counts on.
//   - A delivery is settled exactly once, or never because the process ended; then its row comes
//     again.
//   - While anything of a lane (ordering all) or of a key (ordering key) is parked, nothing newer of
//     it is sent. A lane whose store holds something starts draining, never flowing. What a crash
//     left in the store waits until the stream has come to it, for older rows of its key may come
//     again before it. A park that fails is tried until it succeeds; its key stays blocked, the
//     buffer fills, and the stream waits.
//   - A delivery that an open circuit holds spends no attempt. The probe is the oldest parked
//     delivery whose retry is due, or due within the breaker's open_for.
//   - A row that cannot be understood is one dead delivery. It stops nothing.
//   - Memory is bounded: the buffer counts events and bytes, and says when there is room again.
//
// It never waits for a receiver with a lock held, never drops a delivery, and never sends anything
// when Postgres has not been heard of for the time of the lease.
//
//	lane:      flowing ──Held|cannot keep up──► parking ──time is up──► draining ──nothing parked──► flowing
//	                                              ▲──────────Held──────────┘
//	delivery:  owed ─► delivered                            (in memory; the WAL is its durability)
//	             └──► parked(due) ─► sending ─► delivered | parked | dead       dead ─► parked (by an operator)
//	key:       free ──Retry──► blocked until its retry is due ──► its rows in order ──none left──► free
package outbox
