// Package pgtest runs real throwaway Postgres servers: for every test that touches Postgres,
// and for `walhook demo`. Nothing is mocked, so what a test sees is what Postgres does.
//
// Most tests want a database and nothing else:
//
//	url := pgtest.DB(t) // fresh and empty, gone with its slots after the test
//
// All of a test binary's databases share one server, which starts with the first DB and ends
// with the process. Tests that stop, kill, promote or configure a server take one of their own:
//
//	server := pgtest.New(t, pgtest.Config{Settings: map[string]string{"max_slot_wal_keep_size": "1MB"}})
//	err := server.Stop(ctx, pgtest.Immediate)
//	err = server.Start(ctx) // the same data, the same port
//
// Two variables choose the Postgres:
//
//	WALHOOK_TEST_PG_BIN        the bin directory that Find answers, whatever else is installed
//	WALHOOK_TEST_DATABASE_URL  a running server in which DB makes its databases; New still starts its own
//
// # Promises
//
//   - Find fails, and so does the test, where no Postgres is installed; nothing is skipped in silence.
//   - A Server listens on 127.0.0.1 alone, trusts everybody there, and does not sync to disk:
//     it survives the end of any process, not of the machine. Never keep anything in one.
//   - Nothing is left behind: Close ends the processes and removes the directory, and where our
//     process ends without Close (a panic, a test's time-out, kill -9), a watchdog does the same.
//   - A running Server has no goroutine, so that goleak has nothing to except.
//   - Root is fine. Postgres refuses to run as root, so its processes then run as the user
//     postgres, or else nobody, and own their directory.
//
// # States
//
//	Start ──► running ──Stop, Kill, or a crash──► stopped ──Start──► running …
//	             └───────────────Close──────────────┴──► closed
package pgtest
