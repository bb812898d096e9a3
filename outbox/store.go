package outbox

import (
	"context"
	"errors"
	"time"

	"github.com/walhook/walhook/cdc"
)

// State is the state of a row of walhook.deliveries.
type State string

// The states of a stored delivery. Gone is no row at all.
const (
	StateParked  State = "parked"
	StateSending State = "sending" // stored while its request is in flight
	StateDead    State = "dead"
	StateGone    State = "gone"
)

// Change is one row of walhook.deliveries to be written. The row is named by endpoint and event.
type Change struct {
	EndpointID string // empty for a row that could not be mapped
	Event      *Event
	OrderKey   string // what the endpoint orders the delivery by; empty has no order
	Insert     bool   // the row is new: with it go the event's content, and a row that is there already stays as it is
	State      State
	Reason     Reason
	Attempts   int
	Due        time.Time // of the retry; zero waits for its turn
	Status     int
	Detail     string
	Notice     []byte // to be written into the WAL with it; nil is none
}

// Stored is a delivery read back from walhook.deliveries with its event.
type Stored struct {
	Event    *Event
	OrderKey string
	Attempts int
	Due      time.Time // zero waits for its turn
}

// Checkpoint is how far a slot is settled.
type Checkpoint struct {
	LSN      cdc.LSN      // everything that committed below is settled; what the slot may confirm
	Position cdc.Position // within the transaction that follows, the last row of which all before it are settled
}

// Backlog is what one endpoint has in the store.
type Backlog struct {
	EndpointID string
	Parked     int64
	Dead       int64
	NextDue    time.Time // the earliest retry; zero where there is none
	Oldest     time.Time // when the first of the parked, in commit order, was parked; zero where there is none
}

// Store is the schema walhook as the outbox sees it. Every write carries the holder's epoch
// and fails with ErrFenced where another instance has taken the slot since.
type Store interface {
	// Write applies the changes in one durable transaction, in their order. It keeps nothing of the slice.
	Write(ctx context.Context, changes []Change) error
	// WriteInParts is Write for a machine that has more urgent work: pause is called before each part of it, and returns when
	// a processor may be busy with that for a moment. Where it tells false, the rest goes at once.
	WriteInParts(ctx context.Context, changes []Change, pause func() bool) error

	// Scan reads parked deliveries of an endpoint in commit order from behind after: at most
	// limit rows and, beyond the first, at most maxBytes of content. Keys named in skip are left out. more
	// tells that rows may follow the last one returned.
	Scan(ctx context.Context, endpointID string, after cdc.Position, skip []string, limit int, maxBytes int64) (rows []Stored, more bool, err error)
	// ScanKey is Scan for one order key.
	ScanKey(ctx context.Context, endpointID, key string, after cdc.Position, limit int, maxBytes int64) (rows []Stored, more bool, err error)
	// Due names what has a retry due at now, soonest first, at most limit: the order keys, each
	// once, and of the deliveries without one, themselves. next is when the next one is due; zero where nothing is.
	Due(ctx context.Context, endpointID string, now time.Time, limit int, maxBytes int64) (keys []string, loose []Stored, next time.Time, err error)
	// Backlogs counts what is stored, an entry an endpoint.
	Backlogs(ctx context.Context) ([]Backlog, error)
	// Bury makes the parked deliveries of an endpoint dead.
	Bury(ctx context.Context, endpointID string, reason Reason) (int64, error)

	// SaveCheckpoint records how far the slot is settled and returns a position behind the
	// record's commit: once the stream has passed it, the slot may be told.
	SaveCheckpoint(ctx context.Context, c Checkpoint) (proof cdc.LSN, err error)
}

// ErrFenced is what a Store answers to a write of a holder whose slot another instance has taken.
var ErrFenced = errors.New("another instance holds the slot")
