// Package outboxtest has an outbox.Store in memory, for tests of whatever waits and orders, and
// the Suite that keeps it honest: outbox/store passes the same.
//
// The Store starts no goroutine and reads no clock, so it may live in a synctest bubble. It can
// be told to fail, to lose its answer, to wait, and to be fenced.
package outboxtest
