// Package outbox decides what is sent to whom, when, and in which order. A row of cdc becomes an
// Event (Mapper), the Registry says which endpoints want it, the Ledger notes that it is owed, and
// the Lane of each endpoint sends it in its turn or parks it. All waiting and all ordering of
// walhook is here.
//
// It owns Event, Endpoint, Registry, Delivery, Outcome, Ledger, Lane and Relay, and what it asks of
// others: a Store (the schema walhook), a Sender (one attempt), a Stream (the WAL).
//
// # Promises
//
//   - Ledger.Low never passes an unsettled delivery. Settled is: delivered, wanted by nobody, or
//     committed to the store. The slot is told only what a checkpoint in the store already says.
//   - A delivery is settled once, or never because the process ended; then its row comes again.
//   - While anything of a key (ordering key) or of an endpoint (ordering all) is parked, in flight
//     or owed, nothing newer of it is attempted. A dead delivery frees its key when its death is
//     written. What was parked with one ordering keeps it.
//   - A delivery that an open circuit holds spends no attempt. The probe is the oldest one parked.
//   - A delivery has one attempt and one more for each step of its schedule, over all restarts.
//   - A batch ends as a whole, and holds its events in commit order. No two batches with events of one
//     key (ordering key) are in flight at once.
//   - Attempts of an endpoint, or of a group that shares a rate, begin no faster than rate_limit says;
//     those of a group begin in turns.
//   - No delivery holds the watermark for longer than SpillAfter while the store can be written.
//   - A row that cannot be understood is one dead delivery and stops nothing.
//   - A clean stop repeats nothing. After a crash comes again what was in flight, and what was
//     settled since the last checkpoint.
//   - Memory is bounded: three quarters of the buffer by what the stream brings, a quarter by what is
//     read back from the store, and a few rows more for each lane, so that none of them stands still.
//   - Nothing is sent when Postgres was not heard of for 15 s.
//
// It never judges an answer (Sender does), knows no SQL (Store does) and no LSN that cdc did not
// give it, waits for no receiver on the stream's goroutine, and gives nothing up: a park that fails
// is tried until it succeeds, its key blocked meanwhile.
//
// # States
//
// Of a lane. With ordering key they are also, one by one, those of its keys: a blocked key parks,
// a key that is being read back drains.
//
//	flowing ──Retry|Held──► parking ──probe Delivered──► draining ──nothing parked──► flowing
//	                          ▲────────Retry|Held────────────┘
//
// A lane begins draining where the store holds something for it. It also drains, without parking
// first, what has waited in memory for too long: then new deliveries go behind it, through the
// store, until it has caught up; at the end they wait in memory, so that it does.
//
// Of a delivery:
//
//	owed ─► delivered                                   (in memory; the WAL is its durability)
//	  └──► parked(due) ─► sending ─► delivered | parked | dead        dead ─► parked (by an operator)
//
// Of a circuit, which only sender knows; here it is a Held with the time of the next probe:
//
//	closed ─► open ─► half-open ─► closed | open
//
// # Reading back
//
// What is read back must not overtake what is not read yet, and a read shows the store as it was
// when the read began. Four rules keep the order; each was broken once, and the model found it.
//
//   - A row whose delivery was parked again since is not taken, nor what lies behind it, until that
//     change is committed and read (sees: held, ghosts).
//   - Nothing is taken that lies behind a row whose insert was on its way when the read began
//     (sight.untold).
//   - A drain, or a blocked key, has ended only when a read that began with nothing on its way found
//     no more, and nothing was put on its way since (whole).
//   - After a crash the store can be ahead of the stream, which brings again what was in memory: a row
//     waits until the stream has come to it (sight.reach).
//
// Locks are taken in this order: Relay.changing, Relay.mu, Lane.mu, then Ledger.mu, journal.mu, or
// paces.mu and pace.mu.
// None is held across a call of Store, Sender or Stream.
package outbox
