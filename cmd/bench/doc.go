// Command bench measures walhook against what the machine allows: `make bench`. It is no part of
// the program that is shipped.
//
// All that a figure is compared with is measured in the same run, on the same machine, next to
// it, so that the ratios hold where the absolute figures do not. What is measured runs as a
// process of its own: walhook as users run it, and the limits and the receiver as this program
// again, in a role (see role). So CPU time and the peak of the resident memory are those of one
// thing alone.
//
//	load ──INSERT──► Postgres ──WAL──► walhook ─────┐
//	                     │                          ├──HTTP──► receiver ──► what came, and when
//	                     └────────WAL──► limits ────┘
//
// # Limits
//
//	read     (a) pglogrepl reads the WAL, parses every message and drops it
//	send     (b) 64 workers send the same requests, by net/http or by fasthttp. No Postgres
//	chain    (c) (a) into (b): rows go through a channel to 64 workers, which render the same body
//
// A limit does what cannot be left out and nothing else: it keeps no order, settles nothing,
// retries nothing, and where walhook signs it sends a constant of the same length.
//
// # What is measured
//
//   - Throughput is what the receiver counted between the first and the last receipt.
//   - CPU and memory are those of the process from its start to the last receipt: user and system
//     time of /proc/PID/stat, VmHWM of /proc/PID/status; elsewhere than on Linux what the kernel
//     says when the process has ended.
//   - Latency is from the commit's time in the WAL, which the body holds, and from the moment before the
//     INSERT is sent, which the payload holds, to the receipt. The clock is the same. The load is
//     open: what is late is sent late, and counted as late, but never left out.
//   - Percentiles are of all values, by nearest rank; nothing is put in buckets.
//   - What walhook writes to the database is the sum of the row counts of pg_stat_user_tables over its schema;
//     what of it went into walhook.deliveries was parked. A drain with parked rows took the slow path for them.
//   - Each event is counted by its id at the receiver. A lost, repeated, invented or overtaking
//     event fails the run, whatever its speed.
//
// # Postgres
//
// A throwaway server of this machine's programs, with wal_level=logical and the settings in
// serverSettings. fsync is off unless --fsync: the figures are those of walhook and not of the
// disk. (With it on, a commit's time in the WAL is that before the disk has it.) autovacuum is
// off, because it would begin at another moment in each run.
package main
