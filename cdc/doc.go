// Package cdc is every way a committed row can reach us: the publication that names the
// tables, the logical replication slot, and the stream read from it. It knows nothing of
// webhooks.
//
// It promises:
//
//   - A row is handed on only after it committed, in commit order, once per process. A lost
//     connection is made again and resumes where it broke off, inside a transaction too.
//
//   - The server is told to forget WAL only by Stream.Confirm, and never more than was
//     confirmed. A status sets all three positions: write is the highest position received,
//     flush and apply are what was confirmed, none is zero.
//
//   - The socket is never left unread for longer than Config.MaxStall. A walsender that
//     cannot write can hang the checkpointer of the whole cluster, so where the sink has no
//     room for that long, the connection is closed.
//
//   - It never gives up and never guesses: what cannot go on is a Fault, with its cause and
//     the SQL that mends it, and is tried again.
//
//   - A slot is made anew, where a record tells that there was one, only as a recovery: the rows
//     that may have been missed are read from their tables under the new slot's snapshot, and
//     taken together with the new position or not at all. The first snapshot is the same without a record.
//
//     connecting ─► streaming ─► connecting …  |  standby (another holds the slot)
//     │            ▲                      |  waiting (something outside must be mended)
//     ├─► recovering (rows from tables)   |
//     └────────────▲──────────────────────|  lost (the slot is gone, invalid or not ours,
//     └──── told to recover ──     or rows were kept out of it)
//
// The messages and the commands are those of the Postgres documentation, chapters
// "Streaming Replication Protocol" and "Logical Streaming Replication Protocol".
package cdc
