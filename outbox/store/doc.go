// Package store keeps the schema walhook: what is parked or dead, how far the slot is settled,
// and the migrations that make its tables. All SQL on that schema is here.
//
// # Promises
//
//   - What goes in comes out byte for byte, also what Postgres' text and json do not take.
//   - A write that returned nil is durable, whatever synchronous_commit the role, the database
//     or the server has. A write that returned an error may have been applied: its answer can
//     get lost. Doing it again does no harm.
//   - A write is one transaction, however many changes it has, and one round trip; a few where many rows are new, and as
//     many as it has parts where it is to go in parts.
//   - A write of a holder whose slot another instance has taken since changes nothing and fails
//     with outbox.ErrFenced. Who takes the slot waits for the writes that were before it.
//   - A Fill is one transaction too, of any length in little memory: rows of a snapshot and the
//     checkpoint behind them stand there together, or neither does.
//   - Whoever finds the checkpoint of a database that was copied, restored or cloned is told
//     so, and has changed nothing.
//   - An event stays as long as one delivery needs it, whoever writes at the same time: another
//     lane, another instance, a command.
//   - No read is longer than what it returns: each follows an index from its first row on,
//     whatever the planner's statistics say. Backlogs alone counts, in indexes.
//   - It works through a transaction pooler: nothing depends on the session. One that knows no
//     prepared statements wants default_query_exec_mode=cache_describe in the URL.
//
// It starts no goroutine but the pool's and a Fill's, and needs no Postgres to be opened.
//
// # States
//
//	(no row) ──insert──► parked ──► sending ──► (no row: delivered, discarded)
//	                       ▲  ▲        │
//	                       │  └────────┤ retry, or the holder died
//	                       │           ▼
//	                       └─operator─ dead
//
// A slot's checkpoint:
//
//	(no row) ──Announce──► announced, at 0/0 ──Fill──► held ──SaveCheckpoint, Claim, Fill──► held
//	   └─────────────────Claim, Fill───────────────────▲
package store
