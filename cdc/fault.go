package cdc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
)

// State is where the stream stands. It is the status that /readyz reports.
type State string

// The states of a stream.
const (
	Connecting State = "connecting" // on the way, or on the way back after a passing error
	Streaming  State = "streaming"
	Standby    State = "standby"    // another process holds the slot
	Waiting    State = "waiting"    // something outside must be mended first
	Recovering State = "recovering" // rows are read from their tables, for a slot that is new
	Lost       State = "lost"       // the slot is gone, invalid, or was moved by somebody else; or rows were kept out of it
)

// Fault says why the stream does not run and what mends it. Everything a Fault names can be
// mended from outside while we wait, so it is tried again and never ends the process, except
// that a Config fault ends a start.
type Fault struct {
	State  State
	Reason string // one sentence
	Remedy string // what to do, usually SQL; may be empty
	Config bool   // the configuration contradicts the database
	Err    error

	missed *missed // how what was missed is found; nil where nothing was, or nothing can be
	gap    string  // what the book is to say of it; empty where the slot itself tells
}

// Cause is the reason with what the server or the network said, without the remedy.
func (f *Fault) Cause() string {
	if f.Err == nil {
		return f.Reason
	}
	return f.Reason + ": " + f.Err.Error()
}

func (f *Fault) Error() string {
	s := f.Cause()
	if f.Remedy != "" {
		s += "; to mend it: " + f.Remedy
	}
	return s
}

func (f *Fault) Unwrap() error { return f.Err }

// ErrNewHistory says that the server at the other end is not the one we streamed from: another
// system, or another timeline after a failover. What is in memory may never have happened
// there, so everything starts again from the checkpoint.
var ErrNewHistory = errors.New("the database has a new history")

// ErrTaken says that another process has the slot that was ours, and sends what we have in memory.
var ErrTaken = errors.New("another process has taken the slot")

// errShutdown says that the server wants to shut down and waits for our confirmation.
var errShutdown = errors.New("the server is shutting down")

// errStalled says that the sink had no room for longer than Config.MaxStall.
var errStalled = errors.New("no room for more rows")

// errSilent says that the server sent nothing for too long.
var errSilent = errors.New("the server is silent")

// FaultOf judges an error of connecting or streaming. Every error becomes a Fault: a passing
// one with State Connecting.
func FaultOf(err error) *Fault {
	var f *Fault
	if errors.As(err, &f) {
		return f
	}
	f = &Fault{State: Connecting, Reason: "the replication connection ended", Err: redact(err)}
	switch {
	case errors.Is(err, errShutdown), errors.Is(err, errSilent):
		return f
	case errors.Is(err, errStalled):
		f.State = Waiting
		f.Reason = "the buffer is full and could not be parked in time, so the WAL is left to the server for now"
		f.Remedy = "look for errors of the schema walhook in the log; where there are none, Postgres is too busy to take the parked deliveries"
		f.Err = nil
		return f
	case errors.Is(err, errUnknownMessage), errors.Is(err, errUnknownRelation), errors.Is(err, errMalformed), errors.Is(err, errTruncated):
		f.State = Waiting
		f.Reason = "Postgres sent a message that this walhook cannot read, and that may hold rows"
		f.Remedy = "use a walhook that knows this version of Postgres; nothing behind the message is confirmed meanwhile"
		return f
	}
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		var connect *pgconn.ConnectError
		var parse *pgconn.ParseConfigError
		var op *net.OpError
		switch {
		case errors.As(err, &parse):
			f.State, f.Reason = Waiting, "database.url cannot be read"
			f.Config = true
		case errors.As(err, &connect), errors.As(err, &op):
			f.Reason = "Postgres cannot be reached"
		case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
			f.Reason = "Postgres closed the connection"
		case errors.Is(err, context.DeadlineExceeded):
			f.Reason = "Postgres does not answer"
		}
		return f
	}
	f.State = Waiting
	if refusedByPooler(pg) {
		f.Reason = "a pooler stands before Postgres and does not let a stream through"
		f.Remedy = Provider("").direct(Route{}) + "; walhook check says which that is"
		return f
	}
	switch pg.Code {
	case "55006": // object_in_use, in the server's language
		f.State = Standby
		f.Reason = "another process holds the slot"
	case "57P01", "57P02", "57P03", "57P05", "08006", "08001", "08004", "40001", "40P01", "57014", "55P03":
		f.State = Connecting
		f.Reason = "Postgres ended the connection"
	case "28P01", "28000":
		f.Reason = "Postgres refused the role or its password"
		f.Remedy = "check user and password in database.url and the server's pg_hba.conf (replication connections need a line for this database)"
	case "3D000":
		f.Reason = "the database of database.url does not exist"
	case codeDenied:
		f.Reason = "a right is missing"
		f.Remedy = "run the SQL that `walhook init` prints"
	case "53300":
		f.Reason = "Postgres has no connection left"
		f.Remedy = "raise max_connections or max_wal_senders, or the role's CONNECTION LIMIT"
	case "53400":
		f.Reason = "Postgres has no replication slot left"
		f.Remedy = "raise max_replication_slots and restart Postgres, or drop a slot that nobody uses (select * from pg_replication_slots)"
	case codeNoPublication:
		f.Reason = "the slot's WAL is from before the publication existed"
	case "55000":
		f.Reason = "Postgres refuses to stream"
		if strings.Contains(pg.Message, "replication slot") {
			f.State = Lost
			f.Reason = "the slot is invalid"
		}
		if strings.Contains(pg.Message, "wal_level") {
			f.Reason, f.Remedy = "wal_level is not logical", remedyWALLevel
		}
	case "22021", "22P05": // character_not_in_repertoire, untranslatable_character
		f.Reason = "a row of the WAL holds characters that cannot be had as UTF-8"
		f.Remedy = remedySkip
	case "XX000":
		f.Reason = "Postgres failed while decoding"
		if strings.Contains(pg.Message, "memory alloc request") {
			f.Remedy = "a row is too large to be streamed as text (over 1 GB); " + remedySkip
		}
	default:
		f.State = Connecting
		f.Reason = "Postgres reported an error"
	}
	return f
}

// refusedByPooler knows the words of PgBouncer and of RDS Proxy, which take no replication.
func refusedByPooler(pg *pgconn.PgError) bool {
	return strings.Contains(pg.Message, "unsupported startup parameter") || strings.Contains(pg.Message, "support streaming replication mode")
}

// codeNoPublication is undefined_object: in a stream it is the publication, in the stream's past.
const codeNoPublication = "42704"

// remedySkip leaves a row behind that can never be read.
const remedySkip = "to go on without it, and without what committed before it and was not sent: with an LSN behind its commit, select pg_replication_slot_advance(<slot>, <lsn>); update walhook.checkpoints set lsn = <lsn>, commit_lsn = null, ordinal = null where slot = <slot>"

const remedyWALLevel = "alter system set wal_level = logical; then restart Postgres (on a managed service: the parameter rds.logical_replication, cloudsql.logical_decoding or its like)"

// redact takes the password out of connection errors, which print what they connected with.
func redact(err error) error {
	var parse *pgconn.ParseConfigError
	if errors.As(err, &parse) {
		return errors.New("it is not a Postgres URL or key=value list")
	}
	var connect *pgconn.ConnectError
	if errors.As(err, &connect) {
		if inner := errors.Unwrap(connect); inner != nil {
			return fmt.Errorf("connect: %w", inner)
		}
	}
	return err
}
