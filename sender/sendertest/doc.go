// Package sendertest is a webhook receiver that does as it is told: it answers, hangs, resets
// or refuses by a script, checks signatures with other people's code, and remembers all that came.
//
// It stands on a real socket and takes no testing.TB, so that walhook's demo can show it to a
// person; New is the small wrapper for tests. Whoever waits for it waits by signal.
//
//	rx := sendertest.New(t, sendertest.Config{Secrets: []string{secret}})
//	rx.Script(sendertest.Times(5, sendertest.Status(503))...)
//	…
//	require.NoError(t, rx.WaitFor(t.Context(), 6))
//	require.NoError(t, sendertest.Disorder(rx.Requests(), sendertest.Fields("key", "seq")))
package sendertest
