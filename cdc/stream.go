package cdc

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"go.uber.org/zap"
)

// Config is what a Stream needs to know.
type Config struct {
	URL         func() (string, error) // asked at every connect, so that a rotated password is taken up
	Slot        string
	Publication string
	Tables      []Table
	Messages    bool // ask for logical messages too
	Notices     bool // ask for them, but none that is lost is missed
	Mirror      Mirror
	Create      bool // create publication and slot where they are missing
	Failover    bool // make the slot a failover slot where the server knows them (17 and later)
	Snapshot    bool // the rows that are there before the slot are handed on too
	Recover     Recovery
	Once        Recovery // instead of Recover, for what the start finds
	MaxRecovery int      // rows that RecoverMissed sends without a question
	MaxStall    time.Duration
	Provider    Provider // whose advice is given; empty: that of whom the server shows
	Logger      *zap.Logger

	// Notified, if set, hears of every NOTIFY on Channel while the slot is ours, and once when the
	// listening begins, for what came before. It must not wait.
	Channel  string
	Notified func()

	temporary bool // the slot ends with the connection
}

// Mirror names a table of which every change is handed on, not inserts alone, in commit order with
// the rows of all others. It has a publication of its own: one that published the updates of the
// others would have Postgres refuse those of a table without a key. The zero Mirror is none.
type Mirror struct {
	Table       Table
	Publication string
}

// Session is what a Sink learns when the slot is ours.
type Session struct {
	SystemID string
	Timeline int32
	Database string
	Version  int
	Slot     Slot              // as it was just before
	Tables   map[string]uint32 // OIDs by the tables' names as SQL takes them
	Xmin     uint64            // every transaction id below it had ended when the slot was made; zero is not known
	Mirror   *Mirrored         // nil: the sink has the rows of Config.Mirror from before
}

// Mirrored is Config.Mirror as it was when the slot was made, or else as it is now.
type Mirrored struct {
	Rows []*Row // inserts, without a position
	Live bool   // every change from here on will come
}

// Resume is where a session takes up the stream: rows of transactions whose commit record
// lies below LSN, and rows up to Position, are settled and are not handed on again.
type Resume struct {
	LSN      LSN
	Position Position
}

// Sink receives what a Stream reads. Its methods are called from the one goroutine of
// Stream.Run, and none of them may wait for a receiver of webhooks.
type Sink interface {
	// Resolve sees the tables as the catalogue has them, before the slot is taken. An error ends
	// the attempt: a *Fault is reported as it is.
	Resolve(tables []Found) error
	// Claim makes us the holder. It is called once a session, when the server has given us the
	// slot and before the first row.
	Claim(ctx context.Context, s Session) (Resume, error)
	// Room is nil while there is room for a row, else a channel that is closed when there is.
	Room() <-chan struct{}
	// Row takes a row. An error ends the session; the row comes again in the next one.
	Row(r *Row) error
	// Commit closes the transaction of the rows before it, if there were any. end is where its
	// commit record ends.
	Commit(end LSN)
	// Idle says that everything that committed below at was handed on. No transaction is open.
	Idle(at LSN)
	// Touch says that the server was heard of just now.
	Touch()
	// Leave says that the slot is about to be let go for want of room: another instance may take
	// it, so what is settled is to be written down first.
	Leave(ctx context.Context)
	// Fill takes rows that the stream will not bring, for a slot that begins at s.Slot. xmin is the
	// oldest transaction id that may commit behind that.
	Fill(ctx context.Context, s Session, xmin uint64) (Fill, error)
}

const (
	maxStatusInterval = 10 * time.Second
	maxSilence        = 30 * time.Second
	minBackoff        = 100 * time.Millisecond
	maxBackoff        = 10 * time.Second
	standbyPoll       = time.Second
	surveyInterval    = 30 * time.Second
	openTimeout       = 30 * time.Second // of each step of a connect, but for the making of a slot
	claimTimeout      = 2 * time.Minute  // each step of it has a limit of its own; rules are compiled too
	// A walhook answers the server every 10 s at least, and one that has not heard from it for 15 s
	// sends nothing.
	frozenAfter = 20 * time.Second
	// A server in fast shutdown asks for a reply in a tight loop until everything is confirmed;
	// an ordinary one asks once per wal_sender_timeout.
	shutdownAsks   = 20
	shutdownWindow = time.Second
)

// Stream reads a slot. Make it with New, run it once.
type Stream struct {
	cfg  Config
	sink Sink
	book Book
	log  *zap.Logger

	limits limits

	handing sync.Mutex    // held while a row is handed on, so that none is after Drain
	drained chan struct{} // closed by Drain

	mu       sync.Mutex // guards what follows
	status   Status
	conn     *pgconn.PgConn // of the running session
	next     confirmation   // waits for its proof
	last     confirmation   // the newest; where it differs from next, it waits for its turn
	told     LSN            // the last position that a status gave as confirmed
	received LSN            // highest position received on the running connection
	survey   *Survey

	wake atomic.Bool // a status is wanted before the next timer

	// What follows belongs to the goroutine of Run.
	systemID  string
	timeline  int32
	high      Position // the last row handed on
	end       LSN      // end of the last transaction handed on whole
	open      bool     // rows of high's transaction were handed on and its commit was not
	discarded bool     // something was read and not handed on, so the position must not move
	patience  time.Duration
	streamed  bool      // a session has been through at least once
	since     time.Time // when the last session began to stream; zero where it did not get there
	pid       int32     // of the server's process behind our last connection
	recovery  Recovery
	cost      *cost  // of a recovery; nil: not counted
	gap       string // why rows may be missing, as the book says or will say
	garbled   bool   // the last session met a row that could not be read
	holder    holder

	mirrorFrom  LSN  // from here on the publication of Config.Mirror can be read; zero: it is read, or is not there
	followed    bool // the last session brought the changes of Config.Mirror
	mirrorGone  bool // the last session could not be read with it
	unpublished bool // it is not there, and the log says so
}

// limits are the constants of the same purpose, but in tests.
type limits struct{ silence, open, survey, backoff, frozen time.Duration }

// confirmation is a position that the server may be told once the stream has passed proof.
type confirmation struct{ at, proof LSN }

// Status is where a Stream stands, for people and for /readyz.
type Status struct {
	State  State
	Fault  *Fault // nil while all is well
	Since  time.Time
	Heard  time.Time // when the server was last heard of
	Survey *Survey   // the latest look at the catalogue; nil before the first
}

// New makes a Stream that has not started.
func New(cfg Config, sink Sink, book Book) *Stream {
	recovery := cfg.Recover
	if cfg.Once != RecoverAsk {
		recovery = cfg.Once
	}
	return &Stream{
		cfg: cfg, sink: sink, book: book, recovery: recovery, log: cfg.Logger.Named("cdc"),
		limits:  limits{silence: maxSilence, open: openTimeout, survey: surveyInterval, backoff: maxBackoff, frozen: frozenAfter},
		drained: make(chan struct{}),
		status:  Status{State: Connecting, Since: time.Now()},
	}
}

// Run streams until ctx ends, then returns nil. It returns an error only where waiting cannot
// help: ErrNewHistory, ErrLost, ErrTaken, a Config fault before the first session, or what Claim and Row
// return wrapped in Halt.
func (s *Stream) Run(ctx context.Context) error {
	backoff := minBackoff
	s.patience = s.limits.silence
	for {
		s.since = time.Time{}
		err := s.session(ctx)
		if ctx.Err() != nil {
			return nil
		}
		var halt *haltError
		if errors.As(err, &halt) {
			return halt.err
		}
		if errors.Is(err, ErrNewHistory) {
			return err
		}
		f := FaultOf(err)
		if f.Config && !s.streamed {
			return f
		}
		if f.State == Standby && s.streamed {
			return ErrTaken
		}
		if f.State == Standby { // the server has said who holds the slot
			s.touch(time.Now())
		}
		s.setStatus(f.State, f)
		if !s.since.IsZero() && time.Since(s.since) > backoff {
			backoff = minBackoff // it was worth its wait; the next failure is another one
		}
		wait := backoff
		switch {
		case f.State == Standby:
			wait = standbyPoll
			s.watchHolder(ctx)
		case errors.Is(err, errShutdown):
			wait = max(wait, 2*time.Second) // to come back at once would hold up the shutdown again
		case errors.Is(err, errStalled):
			if room := s.sink.Room(); room != nil {
				select {
				case <-ctx.Done():
					return nil
				case <-s.drained: // no room is needed to confirm
				case <-room:
				}
			}
			wait = minBackoff // we closed it ourselves, and may go on
		}
		if f.State != Standby {
			backoff = min(2*backoff, s.limits.backoff)
		}
		if !sleep(ctx, jitter(wait)) {
			return nil
		}
	}
}

// Halt wraps an error of a Sink that ends Run.
func Halt(err error) error { return &haltError{err} }

type haltError struct{ err error }

func (h *haltError) Error() string { return h.err.Error() }
func (h *haltError) Unwrap() error { return h.err }

// Drain stops handing rows on: when it returns, no further Row is called. The connection stays,
// so that what was handed on can still be confirmed.
func (s *Stream) Drain() {
	s.handing.Lock()
	defer s.handing.Unlock()
	if !s.draining() {
		close(s.drained)
	}
}

func (s *Stream) draining() bool {
	select {
	case <-s.drained:
		return true
	default:
		return false
	}
}

// Confirm lets the server forget the WAL below at, as soon as the stream itself has passed
// proof: a position behind the commit that recorded at. Until then a failover could bring up a
// standby that has the slot's position but not the record. It is monotonic and may be called
// from any goroutine.
func (s *Stream) Confirm(at, proof LSN) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if at <= s.last.at {
		return
	}
	// The one that waits is kept. A proof is where the WAL ended when it was given, and a stream
	// that reads a second behind would never pass the newest of one a second.
	s.last = confirmation{at, proof}
	if s.next.at <= s.told {
		s.next = s.last
	}
	s.wakeLocked()
}

// Confirmed waits until the server itself shows that the slot is at or behind the last position
// confirmed, or until ctx ends. A status that was sent is not always a status that was read.
func (s *Stream) Confirmed(ctx context.Context) error {
	s.mu.Lock()
	want := s.last.at
	s.mu.Unlock()
	if want == 0 {
		return nil
	}
	conn, err := s.cfg.connectSQL(ctx)
	if err != nil {
		return fmt.Errorf("ask for the slot's position: %w", redact(err))
	}
	defer closeSQL(conn)
	for {
		slot, err := readSlot(ctx, conn, s.cfg.Slot)
		if err != nil {
			return err
		}
		if slot == nil || slot.Confirmed >= want {
			return nil
		}
		s.poke()
		if !sleep(ctx, 10*time.Millisecond) {
			return ctx.Err()
		}
	}
}

// Lag is how the server's WAL stands to the slot, in bytes.
type Lag struct {
	Behind int64 // WAL that was written and not received
	Safe   int64 // WAL that may still be written before the slot is lost; only where there is a Limit
	Limit  int64 // max_slot_wal_keep_size; zero is none
}

const lagSQL = `
select pg_wal_lsn_diff(pg_current_wal_lsn(), $2::text::pg_lsn)::bigint,
       coalesce((select safe_wal_size from pg_replication_slots where slot_name = $1), 0),
       greatest((select setting::bigint from pg_settings where name = 'max_slot_wal_keep_size'), 0) << 20`

// Lag asks the server.
func (s *Stream) Lag(ctx context.Context) (Lag, error) {
	conn, err := s.cfg.connectSQL(ctx)
	if err != nil {
		return Lag{}, redact(err)
	}
	defer closeSQL(conn)
	s.mu.Lock()
	received := s.received
	s.mu.Unlock()
	var lag Lag
	if err := conn.QueryRow(ctx, lagSQL, s.cfg.Slot, received.String()).Scan(&lag.Behind, &lag.Safe, &lag.Limit); err != nil {
		return Lag{}, fmt.Errorf("ask for the end of the WAL: %w", err)
	}
	return lag, nil
}

// Received is the highest position received on the running connection, or on the last one.
func (s *Stream) Received() LSN {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.received
}

// Streamed tells, once Run has ended, whether it ever got to streaming.
func (s *Stream) Streamed() bool { return s.streamed }

// Status tells where the stream stands.
func (s *Stream) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.status
	st.Survey = s.survey
	return st
}

// poke makes the reader look up from the socket.
func (s *Stream) poke() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wakeLocked()
}

func (s *Stream) wakeLocked() {
	s.wake.Store(true)
	if s.conn != nil {
		_ = s.conn.Conn().SetReadDeadline(time.Unix(1, 0))
	}
}

func (s *Stream) setStatus(state State, f *Fault) {
	s.mu.Lock()
	old := s.status
	same := old.State == state && (old.Fault == nil) == (f == nil) && (f == nil || old.Fault.Reason == f.Reason)
	if !same {
		s.status.State, s.status.Since = state, time.Now()
	}
	s.status.Fault = f
	s.mu.Unlock()
	if same {
		return
	}
	switch {
	case state == Streaming:
		s.log.Info("streaming", zap.String("slot", s.cfg.Slot))
	case f == nil:
		s.log.Info(string(state))
	case state == Standby:
		s.log.Info("standing by: another process holds the slot", zap.String("slot", s.cfg.Slot))
	case state == Recovering:
		s.log.Info("recovering: " + f.Reason)
	case state == Connecting:
		s.log.Warn("reconnecting: "+f.Reason, zap.Error(f.Err))
	default:
		s.log.Error(string(state)+": "+f.Reason, zap.Error(f.Err), zap.String("remedy", f.Remedy))
	}
}

// session is one connection from its first byte to its last.
func (s *Stream) session(ctx context.Context) (err error) {
	sv, err := s.prepare(ctx)
	if err != nil {
		return err
	}
	open, cancel := context.WithTimeout(ctx, s.limits.open)
	defer cancel()
	notices := make(chan *pgconn.Notice, 1)
	conn, err := s.cfg.connectReplication(open, func(n *pgconn.Notice) {
		s.log.Info("Postgres says", zap.String("severity", n.Severity), zap.String("message", n.Message), zap.String("code", n.Code))
		if fatalNotice(n) {
			select {
			case notices <- n:
			default:
			}
		}
	})
	if err != nil {
		return connectFault(err)
	}
	// The socket is closed, not the protocol: a goodbye waits for a walsender that may be
	// waiting for us.
	defer func() {
		s.mu.Lock()
		s.conn = nil
		s.mu.Unlock()
		_ = conn.Conn().Close()
	}()

	id, err := pglogrepl.IdentifySystem(open, conn)
	if err != nil {
		return fmt.Errorf("identify system: %w", err)
	}
	if s.systemID != "" && (s.systemID != id.SystemID || s.timeline != id.Timeline) {
		return ErrNewHistory
	}
	// In this order: a holder that is at work moves first the WAL, then its checkpoint, then the slot.
	rec, err := s.book.Read(open, id.SystemID)
	if err != nil {
		return err
	}
	now, err := pglogrepl.IdentifySystem(open, conn)
	if err != nil {
		return fmt.Errorf("identify system: %w", err)
	}
	slot := sv.Slot
	if slot == nil && rec != nil && rec.LSN != 0 {
		if err := s.lookAgain(open); err != nil {
			return err
		}
	}
	f := sv.Judge(&s.cfg, rec, LSN(now.XLogPos))
	if f == nil && slot == nil && s.cfg.Snapshot {
		rec = &Record{}
		if err := s.book.Announce(open, Session{SystemID: id.SystemID, Database: sv.Database}); err != nil {
			return err
		}
		f = sv.Judge(&s.cfg, rec, LSN(now.XLogPos))
	}
	if f == nil { // an order is for what the start finds, also where another instance has the slot
		s.recovery = s.cfg.Recover
	}
	var xmin uint64
	var mirror *Mirrored
	made := f != nil || slot == nil
	switch {
	case f != nil && f.missed != nil:
		slot, mirror, err = s.recover(ctx, conn, id, sv, rec, f)
	case f != nil:
		err = f
	case slot == nil:
		if xmin, err = s.oldestRunning(open); err == nil {
			slot, mirror, err = s.newSlot(ctx, conn, sv)
		}
	}
	if err != nil {
		return err
	}
	var at LSN
	if rec != nil && f == nil {
		at = rec.LSN
	}
	s.keepOnFailover(open, conn, sv, slot)
	start := max(at, slot.Confirmed, s.end)
	if start == 0 {
		return &Fault{State: Connecting, Reason: "slot " + s.cfg.Slot + " is being made by somebody else"}
	}
	follow := mirror != nil && mirror.Live
	if !made {
		if mirror, follow, err = s.mirrored(open, sv, rec, start, LSN(now.XLogPos)); err != nil {
			return err
		}
	}
	// A row's turn in its transaction counts the changes of the mirrored table that came with it.
	if s.open && follow != s.followed {
		return ErrNewHistory
	}
	s.followed = follow
	if err := s.start(ctx, conn, start, follow); err != nil {
		return fmt.Errorf("start replication: %w", err)
	}
	s.pid = int32(conn.PID())
	claimCtx, cancelClaim := context.WithTimeout(ctx, claimTimeout)
	resume, err := s.sink.Claim(claimCtx, Session{
		SystemID: id.SystemID, Timeline: id.Timeline, Database: sv.Database, Version: sv.Version, Slot: *slot, Tables: sv.tables(), Xmin: xmin, Mirror: mirror,
	})
	cancelClaim()
	if err != nil {
		return err
	}
	if rec != nil && rec.Mirrored && !follow {
		resume.Position = Position{} // it was counted with them: better its transaction again than too little of it
	}
	if s.open && s.high.Commit < max(start, resume.LSN) {
		// The transaction that a lost connection cut in two was settled without us, so it does
		// not come again.
		s.open = false
		s.sink.Commit(max(start, resume.LSN))
	}
	s.systemID, s.timeline = id.SystemID, id.Timeline
	s.mu.Lock()
	s.conn = conn
	s.received = start
	s.told = max(slot.Confirmed, s.told)
	s.mu.Unlock()
	s.streamed, s.since, s.holder = true, time.Now(), holder{}
	s.setStatus(Streaming, nil)
	s.book.Proven(sv.at)

	watchCtx, stopWatch := context.WithCancel(ctx)
	watched := make(chan error, 1)
	var watching sync.WaitGroup
	watching.Go(func() {
		if err := s.watch(watchCtx, sv); err != nil {
			watched <- err
			s.poke()
		}
	})
	defer watching.Wait()
	defer stopWatch()
	r := &reader{s: s, conn: conn, interval: statusInterval(sv.SenderTimeout), resume: resume, notices: notices, watched: watched, follow: follow}
	r.dec.mirror = s.cfg.Mirror.Table
	err = r.run(ctx)
	var pg *pgconn.PgError
	var fault *Fault
	gap := ""
	switch {
	case errors.As(err, &pg) && pg.Code == codeNoPublication && s.ofMirror(pg.Message):
		s.mirrorGone = true
		err = &Fault{State: Connecting, Reason: "the slot's WAL is from before publication " + s.cfg.Mirror.Publication + " existed", Err: err}
	case errors.As(err, &pg) && pg.Code == codeNoPublication:
		gap = "the slot's WAL is from before publication " + s.cfg.Publication + " existed, and cannot be read with it"
	case errors.As(err, &fault):
		gap = fault.gap
	}
	if gap != "" {
		if markErr := s.mark(ctx, gap); markErr != nil {
			s.log.Warn("it is written down before the next session", zap.Error(markErr))
		}
	}
	if errors.Is(err, errStalled) {
		leave, cancel := context.WithTimeout(ctx, s.cfg.MaxStall) // the socket is unread meanwhile
		s.sink.Leave(leave)
		cancel()
	}
	return err
}

// prepare looks at the catalogue, mends what may be mended, and says what stands in the way.
func (s *Stream) prepare(ctx context.Context) (*Survey, error) {
	ctx, cancel := context.WithTimeout(ctx, s.limits.open)
	defer cancel()
	conn, err := s.cfg.connectSQL(ctx)
	if err != nil {
		return nil, connectFault(err)
	}
	defer closeSQL(conn)
	// In this order: a record that another instance has made since we looked tells of tables that we
	// have not seen yet.
	rec, err := s.book.Read(ctx, "")
	if err != nil {
		return nil, err
	}
	sv, err := survey(ctx, conn, &s.cfg)
	if err != nil {
		return nil, err
	}
	defer func() { s.setSurvey(sv) }()
	if rec == nil || rec.Gap != "" { // nothing can be missed, or it is written down although the answer was lost
		s.gap = ""
	}
	why := s.gap
	if rec != nil && why == "" {
		why = sv.Drift(&s.cfg, rec)
	}
	if why != "" && rec != nil && rec.Gap == "" {
		if err := s.mark(ctx, why); err != nil {
			return nil, err
		}
	}
	findings := sv.Findings(&s.cfg)
	if sv.Slot == nil && rec != nil && rec.LSN != 0 { // it is lost, and not one that is yet to be made
		findings = slices.DeleteFunc(findings, func(f Finding) bool { return f.Topic == "slot" })
	}
	if f := firstFault(findings); f != nil {
		return nil, f
	}
	if err := s.sink.Resolve(sv.Tables); err != nil {
		return nil, err
	}
	if s.garbled { // the table can be read again, but not what the WAL has of the time before
		s.garbled = false
		if err := s.mark(ctx, "rows in the WAL cannot be read as the outbox table was then"); err != nil {
			return nil, err
		}
	}
	published, err := s.publish(ctx, conn, sv)
	if err != nil {
		return nil, err
	}
	if err := s.publishMirror(ctx, conn, sv); err != nil {
		return nil, err
	}
	if published {
		after, err := survey(ctx, conn, &s.cfg)
		if err != nil {
			return nil, err
		}
		sv = after
	}
	if sv.Slot != nil && sv.Slot.ActivePID != 0 && sv.Slot.ActivePID == s.pid {
		// It is our own last connection, of which the server does not know yet that it is gone:
		// nobody to stand by for. Where it has ended meanwhile, so much the better.
		_, _ = conn.Exec(ctx, "select pg_terminate_backend($1, 2000)", s.pid)
	}
	return sv, nil
}

func (s *Stream) setSurvey(sv *Survey) {
	s.mu.Lock()
	before := s.survey
	s.survey = sv
	s.mu.Unlock()
	if off := sv.ClockOff(); off != "" && (before == nil || before.ClockOff() == "") {
		s.log.Warn(off+": latencies, retry times and max_age mean little, and receivers refuse timestamps that are minutes off; let both follow NTP", zap.Duration("ahead", sv.Clock))
	}
}

// oldestRunning is a transaction id below which all have ended. Asked before a slot is made, it
// tells which rows are from before the slot.
func (s *Stream) oldestRunning(ctx context.Context) (uint64, error) {
	conn, err := s.cfg.connectSQL(ctx)
	if err != nil {
		return 0, connectFault(err)
	}
	defer closeSQL(conn)
	return readXmin(ctx, conn)
}

func readXmin(ctx context.Context, conn *pgx.Conn) (xmin uint64, err error) {
	if err := conn.QueryRow(ctx, "select pg_snapshot_xmin(pg_current_snapshot())::text::bigint").Scan(&xmin); err != nil {
		return 0, fmt.Errorf("read snapshot: %w", err)
	}
	return xmin, nil
}

// lookAgain tells whether another instance has made the slot, and its checkpoint, since we looked.
func (s *Stream) lookAgain(ctx context.Context) error {
	conn, err := s.cfg.connectSQL(ctx)
	if err != nil {
		return connectFault(err)
	}
	defer closeSQL(conn)
	slot, err := readSlot(ctx, conn, s.cfg.Slot)
	if err == nil && slot != nil {
		return &Fault{State: Connecting, Reason: "slot " + s.cfg.Slot + " was made by somebody else just now"}
	}
	return err
}

// publish creates the publication, or adds the tables that it lacks. The tables are locked
// first: old minor versions lose the rows of a transaction that is open meanwhile.
func (s *Stream) publish(ctx context.Context, conn *pgx.Conn, sv *Survey) (done bool, err error) {
	tables, _ := sv.unpublished()
	if sv.Publication != nil && len(tables) == 0 {
		return false, nil
	}
	if h := sv.Slot; h != nil && h.ActivePID != 0 && h.ActivePID != s.pid {
		// Whoever holds the slot may not know the table, as in a rolling deploy that adds it: its rows
		// would be passed over.
		return false, &Fault{State: Standby, Reason: "another process holds the slot; the publication waits for it"}
	}
	missing, sql := tableList(tables), createPublication(s.cfg.Publication, tables)
	if sv.Publication != nil {
		sql = addTables(s.cfg.Publication, tables)
	}
	err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if len(tables) > 0 {
			if _, err := tx.Exec(ctx, "lock table "+missing+" in share row exclusive mode"); err != nil {
				return err
			}
		}
		_, err := tx.Exec(ctx, sql)
		return err
	})
	var pg *pgconn.PgError
	switch {
	case err == nil:
		s.log.Info("published", zap.String("publication", s.cfg.Publication), zap.Stringers("tables", tables))
		return true, nil
	case errors.As(err, &pg) && pg.Code == codeDenied:
		return false, &Fault{State: Waiting, Reason: "role " + sv.Role + " may not publish " + missing, Err: err, Remedy: "run the SQL that `walhook init` prints, or as the owner: " + sql}
	case errors.As(err, &pg) && pg.Code == "55P03":
		return false, &Fault{State: Connecting, Reason: "a long transaction writes to " + missing + ", so it cannot be added to the publication yet", Err: err}
	case errors.As(err, &pg) && pg.Code == "42710": // another instance was faster
		return true, nil
	}
	return false, fmt.Errorf("publish: %w", err)
}

// createSlot makes the slot. With export the new slot's snapshot may be taken over by another
// session, until conn's next command.
func (s *Stream) createSlot(ctx context.Context, conn *pgconn.PgConn, sv *Survey, export bool) (slot *Slot, snapshot string, err error) {
	action, option := "NOEXPORT_SNAPSHOT", "nothing"
	if export {
		action, option = "EXPORT_SNAPSHOT", "export"
	}
	if sv.Version >= failoverVersion && s.cfg.Failover {
		action = "(SNAPSHOT '" + option + "', FAILOVER true)"
	}
	// Postgres waits here for every transaction that writes; say for whom, rather than time out.
	tell, done := context.WithCancel(ctx)
	var telling sync.WaitGroup
	telling.Go(func() { s.tellWait(tell, conn.PID()) })
	res, err := pglogrepl.CreateReplicationSlot(ctx, conn, s.cfg.Slot, "pgoutput", pglogrepl.CreateReplicationSlotOptions{
		Mode: pglogrepl.LogicalReplication, SnapshotAction: action, Temporary: s.cfg.temporary,
	})
	done()
	telling.Wait()
	if err != nil {
		return nil, "", fmt.Errorf("create slot: %w", err)
	}
	at, err := ParseLSN(res.ConsistentPoint)
	if err != nil {
		return nil, "", fmt.Errorf("create slot: %w", err)
	}
	s.log.Info("created slot", zap.String("slot", s.cfg.Slot), zap.Stringer("lsn", at))
	return &Slot{Name: s.cfg.Slot, Plugin: "pgoutput", Database: sv.Database, WALStatus: "reserved", Failover: sv.Version >= failoverVersion && s.cfg.Failover, Confirmed: at, Restart: at}, res.SnapshotName, nil
}

// newSlot makes the slot, and reads the mirrored table as of there.
func (s *Stream) newSlot(ctx context.Context, conn *pgconn.PgConn, sv *Survey) (*Slot, *Mirrored, error) {
	slot, snapshot, err := s.createSlot(ctx, conn, sv, s.cfg.Mirror != (Mirror{}))
	if err != nil {
		return nil, nil, err
	}
	mirror, err := s.mirrorOf(ctx, sv, snapshot)
	if err == nil {
		return slot, mirror, nil
	}
	// A slot that is there without a record would begin with the table as it is by then.
	sql, sqlErr := s.cfg.connectSQL(ctx)
	if sqlErr == nil {
		defer closeSQL(sql)
		sqlErr = s.dropUnread(ctx, sql, slot)
	}
	if sqlErr != nil {
		s.log.Warn("the new slot could not be dropped", zap.Error(sqlErr))
	}
	return nil, nil, err
}

// tellWait says for whom the walsender pid waits.
func (s *Stream) tellWait(ctx context.Context, pid uint32) {
	for sleep(ctx, time.Second) {
		conn, err := s.cfg.connectSQL(ctx)
		if err != nil {
			continue
		}
		var pids string
		err = conn.QueryRow(ctx, "select array_to_string(pg_blocking_pids($1), ', ')", pid).Scan(&pids)
		closeSQL(conn)
		if err == nil && pids != "" {
			s.setStatus(Waiting, &Fault{
				State:  Waiting,
				Reason: "the new slot waits for the write transaction of pid " + pids + " to end",
				Remedy: "wait, or see what it does: select * from pg_stat_activity where pid in (" + pids + ") (pid 0 is one of pg_prepared_xacts)",
			})
		}
	}
}

// holder is who has the slot while we stand by.
type holder struct {
	pid   int32
	reply time.Time // the last one that the server had of it, by the holder's clock
	since time.Time // when we first saw that reply, by ours
}

// The server shows replies, and the state, only to roles with the rights of pg_read_all_stats. To others
// a holder that answers would look like one that never did, so they leave it to wal_sender_timeout.
const holderSQL = `
select r.pid, coalesce(r.reply_time, r.backend_start)
from pg_replication_slots s
join pg_stat_replication r on r.pid = s.active_pid
where s.slot_name = $1
and r.application_name = current_setting('application_name')
and r.state is not null`

// watchHolder ends the connection of another walhook that has the slot and is frozen or cut off: the
// server would wait for it for wal_sender_timeout.
func (s *Stream) watchHolder(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, s.limits.open)
	defer cancel()
	conn, err := s.cfg.connectSQL(ctx)
	if err != nil {
		return
	}
	defer closeSQL(conn)
	var now holder
	if err := conn.QueryRow(ctx, holderSQL, s.cfg.Slot).Scan(&now.pid, &now.reply); err != nil {
		s.holder = holder{}
		return
	}
	if now.pid != s.holder.pid || !now.reply.Equal(s.holder.reply) {
		now.since = time.Now()
		s.holder = now
	}
	if silent := time.Since(s.holder.since); silent > s.limits.frozen {
		s.log.Warn("the holder of the slot does not answer the server: its connection is ended", zap.Int32("pid", now.pid), zap.Duration("silent", silent))
		if _, err := conn.Exec(ctx, "select pg_terminate_backend($1)", now.pid); err != nil {
			s.log.Warn("it could not be ended; the server does it after wal_sender_timeout", zap.Error(err))
		}
	}
}

func (s *Stream) start(ctx context.Context, conn *pgconn.PgConn, at LSN, follow bool) error {
	ctx, cancel := context.WithTimeout(ctx, s.limits.open)
	defer cancel()
	// Identifier first, then literal: the option is a list of identifiers inside a string.
	name := quoteName(s.cfg.Publication)
	if follow {
		name += "," + quoteName(s.cfg.Mirror.Publication)
	}
	name = strings.ReplaceAll(name, "'", "''")
	args := []string{"proto_version '1'", "publication_names '" + name + "'"}
	if s.cfg.Messages || s.cfg.Notices {
		args = append(args, "messages 'true'")
	}
	return pglogrepl.StartReplication(ctx, conn, s.cfg.Slot, pglogrepl.LSN(at), pglogrepl.StartReplicationOptions{
		Mode: pglogrepl.LogicalReplication, PluginArgs: args,
	})
}

// statusInterval is how often a status is due: often enough for the server's patience, of
// which some operators leave 5 s and some (zero) any amount.
func statusInterval(senderTimeout time.Duration) time.Duration {
	if senderTimeout == 0 {
		return maxStatusInterval
	}
	return min(maxStatusInterval, senderTimeout/3)
}

// watch looks at the catalogue now and then for what the stream itself cannot show: a table
// dropped and created again, a publication altered, a slot about to be lost. Its session also
// shows a fast shutdown, which ends ordinary sessions at once, but a walsender only when we
// have read, and confirmed, all the WAL there is.
func (s *Stream) watch(ctx context.Context, began *Survey) error {
	rec := &Record{Tables: began.tables()}
	wait := time.Duration(0)
	for sleep(ctx, wait) {
		conn, err := s.cfg.connectSQL(ctx)
		var pg *pgconn.PgError
		switch {
		case errors.As(err, &pg) && pg.Code == "57P03":
			return errShutdown
		case err != nil: // the stream itself will notice
			wait = s.limits.survey
			continue
		}
		err = s.watchOn(ctx, conn, began, rec)
		closeSQL(conn)
		var f *Fault
		if errors.As(err, &f) {
			return f
		}
		wait = minBackoff
	}
	return nil
}

// watchOn returns when conn's session ends, or with a Fault.
func (s *Stream) watchOn(ctx context.Context, conn *pgx.Conn, began *Survey, rec *Record) error {
	if err := patient(ctx, conn.PgConn()); err != nil {
		return err
	}
	s.listen(ctx, conn)
	for {
		if err := s.awaitNotices(ctx, conn); !pgconn.Timeout(err) || ctx.Err() != nil {
			return err
		}
		ask, cancel := context.WithTimeout(ctx, s.limits.open)
		sv, err := survey(ask, conn, &s.cfg)
		cancel()
		if err != nil {
			return err
		}
		s.setSurvey(sv)
		if why := sv.Drift(&s.cfg, rec); why != "" {
			return &Fault{State: Lost, Reason: why + ": rows inserted since may be in the table only", gap: why}
		}
		if f := firstFault(sv.Findings(&s.cfg)); f != nil {
			return f
		}
		if sv.Mirror.Published && !began.Mirror.Published {
			return &Fault{State: Connecting, Reason: "publication " + s.cfg.Mirror.Publication + " is there now"}
		}
		s.book.Proven(sv.at)
		if err := s.awaitStandby(ctx, conn, sv); err != nil {
			return err
		}
	}
}

// listen has conn hear of what is said on the channel. Where it cannot, the stream does without.
func (s *Stream) listen(ctx context.Context, conn *pgx.Conn) {
	if s.cfg.Notified == nil {
		return
	}
	if _, err := conn.Exec(ctx, "listen "+quoteName(s.cfg.Channel)); err != nil && ctx.Err() == nil {
		s.log.Warn("notices cannot be listened for", zap.String("channel", s.cfg.Channel), zap.Error(redact(err)))
	}
	s.cfg.Notified()
}

// awaitNotices passes on what is said on the channel until the next look at the catalogue is due.
// It never returns nil.
func (s *Stream) awaitNotices(ctx context.Context, conn *pgx.Conn) error {
	look, cancel := context.WithTimeout(ctx, s.limits.survey)
	defer cancel()
	for {
		if _, err := conn.WaitForNotification(look); err != nil {
			return err
		}
		if s.cfg.Notified != nil {
			s.cfg.Notified()
		}
	}
}

// fatalNotice tells a notice that means events are being skipped. Postgres 18 goes on without
// a publication that is gone and says so in a warning only.
func fatalNotice(n *pgconn.Notice) bool {
	return n.Routine == "LoadPublications" || strings.Contains(n.Message, "skipped loading publication") // it may be in the server's language
}

// reader reads one connection.
type reader struct {
	s        *Stream
	conn     *pgconn.PgConn
	dec      decoder
	interval time.Duration
	resume   Resume
	notices  <-chan *pgconn.Notice
	watched  <-chan error
	follow   bool // the changes of Config.Mirror come
	saved    bool // the checkpoint was written for want of them

	inTx     bool // between Begin and Commit
	commit   LSN  // of the open transaction
	time     time.Time
	ordinal  uint64
	began    time.Time
	sent     time.Time
	heard    time.Time
	asked    int // replies asked for in the window, with no data between
	askedAt  time.Time
	row      Row
	touchAt  time.Time
	deadline time.Time
}

func (r *reader) run(ctx context.Context) error {
	defer context.AfterFunc(ctx, r.s.poke)()
	r.began = time.Now()
	r.heard = r.began
	if err := r.sendStatus(false); err != nil {
		return err
	}
	r.arm()
	for {
		msg, err := r.conn.ReceiveMessage(context.Background())
		switch {
		case err == nil:
			if err := r.message(ctx, msg); err != nil {
				return err
			}
		case pgconn.Timeout(err): // by arm or by wakeLocked
			r.deadline = time.Time{}
		default:
			if fatal := r.fatal(); fatal != nil {
				return fatal
			}
			return err
		}
		if r.s.wake.Load() || r.heard.After(r.deadline) { // heard is now, but behind a timeout, where the deadline is zero
			if err := r.timer(ctx); err != nil {
				return err
			}
		}
	}
}

// arm sets the read deadline to the next moment at which something is to be done although
// nothing arrives.
func (r *reader) arm() {
	r.deadline = time.Now().Add(r.interval)
	_ = r.conn.Conn().SetReadDeadline(r.deadline)
	if r.s.wake.Load() { // a wake between the last timer and this deadline
		r.deadline = time.Unix(1, 0)
		_ = r.conn.Conn().SetReadDeadline(r.deadline)
	}
}

func (r *reader) fatal() error {
	select {
	case err := <-r.watched:
		return err
	case n := <-r.notices:
		if r.s.ofMirror(n.Message) {
			r.s.mirrorGone = true
			return &Fault{State: Connecting, Reason: "publication " + r.s.cfg.Mirror.Publication + " cannot be read (" + n.Message + ")"}
		}
		gone := "publication " + r.s.cfg.Publication + " is gone, and Postgres skips its events"
		return &Fault{State: Lost, Reason: gone + " (" + n.Message + ")", gap: gone}
	default:
		return nil
	}
}

func (r *reader) timer(ctx context.Context) error {
	woken := r.s.wake.Swap(false) // before looking, so that what comes after the look wakes again
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := r.fatal(); err != nil {
		return err
	}
	now := time.Now()
	quiet := now.Sub(r.heard)
	if quiet > r.s.patience {
		r.s.patience = min(2*r.s.patience, 10*time.Minute) // a server busy with a huge transaction is silent too
		return errSilent
	}
	if err := r.overtaken(ctx); err != nil {
		return err
	}
	moved := r.s.advance()
	if due := now.Sub(r.sent) >= r.interval; moved || due || (woken && now.Sub(r.sent) >= 100*time.Millisecond) {
		if err := r.sendStatus(quiet >= r.interval); err != nil {
			return err
		}
	}
	r.arm()
	return nil
}

// advance takes up what Confirm wants as far as the stream has passed its proof.
func (s *Stream) advance() (moved bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range [...]confirmation{s.next, s.last} {
		if c.at > s.told && max(c.at, c.proof) <= s.received {
			s.told, s.next, moved = c.at, s.last, true
		}
	}
	return moved
}

// sendStatus reports write as what was received and flush as what is confirmed. write = flush
// would make the server ask again at once; a zero flush would become write.
func (r *reader) sendStatus(ask bool) error {
	s := r.s
	s.mu.Lock()
	confirmed, received := s.told, s.received
	s.mu.Unlock()
	if confirmed == 0 {
		panic("cdc: a status without a confirmed position")
	}
	received = max(received, confirmed)
	err := pglogrepl.SendStandbyStatusUpdate(context.Background(), r.conn, pglogrepl.StandbyStatusUpdate{
		WALWritePosition: pglogrepl.LSN(received),
		WALFlushPosition: pglogrepl.LSN(confirmed),
		WALApplyPosition: pglogrepl.LSN(confirmed),
		ReplyRequested:   ask,
	})
	if err != nil {
		return fmt.Errorf("send status: %w", err)
	}
	r.sent = time.Now()
	return nil
}

func (r *reader) message(ctx context.Context, msg pgproto3.BackendMessage) error {
	switch m := msg.(type) {
	case *pgproto3.CopyData:
		r.heard = time.Now()
		if r.heard.Sub(r.touchAt) > 100*time.Millisecond {
			r.touchAt = r.heard
			r.s.sink.Touch()
			r.s.touch(r.heard)
		}
		if len(m.Data) == 0 {
			return errors.New("an empty replication message")
		}
		switch m.Data[0] {
		case 'w':
			if len(m.Data) < 25 {
				return errTruncated
			}
			r.asked = 0
			return r.data(ctx, m.Data[25:])
		case 'k':
			return r.keepalive(m.Data[1:])
		default:
			return fmt.Errorf("unknown replication message %q", m.Data[0])
		}
	case *pgproto3.ErrorResponse:
		return pgconn.ErrorResponseToPgError(m)
	case *pgproto3.NoticeResponse, *pgproto3.ParameterStatus:
		return r.fatal()
	case *pgproto3.CopyDone, *pgproto3.CommandComplete:
		return errShutdown
	default:
		return fmt.Errorf("unexpected message %T in the stream", msg)
	}
}

// keepalive layout: Int64 end of WAL, Int64 clock, Byte1 reply requested.
func (r *reader) keepalive(b []byte) error {
	if len(b) < 17 {
		return errTruncated
	}
	at := LSN(binary.BigEndian.Uint64(b))
	r.receive(at)
	if r.heard.Sub(r.began) > r.s.patience { // it speaks while it decodes
		r.s.patience = r.s.limits.silence
	}
	// Inside a transaction the position says nothing of what we were given, and neither does it
	// before the transaction that a lost connection cut in two has come again.
	if !r.inTx && !r.s.open && !r.s.discarded {
		r.s.sink.Idle(at)
	}
	moved := r.s.advance()
	if b[16] == 1 {
		now := time.Now()
		if r.asked == 0 || now.Sub(r.askedAt) > shutdownWindow {
			r.asked, r.askedAt = 0, now
		}
		if r.asked++; r.asked > shutdownAsks {
			return errShutdown
		}
		return r.sendStatus(false)
	}
	if moved {
		return r.sendStatus(false)
	}
	return nil
}

func (r *reader) receive(at LSN) {
	s := r.s
	s.mu.Lock()
	s.received = max(s.received, at)
	s.mu.Unlock()
}

func (s *Stream) touch(at time.Time) {
	s.mu.Lock()
	s.status.Heard = at
	s.mu.Unlock()
}

func (r *reader) data(ctx context.Context, b []byte) error {
	m, err := r.dec.decode(b)
	if err != nil {
		return err
	}
	s := r.s
	switch m.kind {
	case kindBegin:
		r.inTx, r.commit, r.time, r.ordinal = true, m.lsn, m.time, 0
	case kindInsert:
		r.row = Row{Relation: m.relation, Values: m.values}
		return r.hand(ctx)
	case kindChange:
		r.row = Row{Op: m.op, Relation: m.relation, Values: m.values, Old: m.old, Partial: m.partial}
		return r.hand(ctx)
	case kindMessage:
		if m.transactional {
			r.row = Row{Prefix: m.prefix, Content: m.content}
			return r.hand(ctx)
		}
	case kindCommit:
		r.inTx = false
		r.receive(m.endLSN)
		s.patience = s.limits.silence
		if r.commit < r.resume.LSN || s.discarded {
			break
		}
		s.open = false
		s.end = m.endLSN
		s.sink.Commit(m.endLSN)
	}
	return nil
}

// hand gives the row to the sink in its turn, unless it is known there already.
func (r *reader) hand(ctx context.Context) error {
	s := r.s
	r.ordinal++
	r.row.Position = Position{Commit: r.commit, Ordinal: r.ordinal}
	r.row.CommitTime = r.time
	at := r.row.Position
	if at.Commit < r.resume.LSN || at.Compare(r.resume.Position) <= 0 || at.Compare(s.high) <= 0 {
		return nil
	}
	if err := r.awaitRoom(ctx); err != nil {
		return err
	}
	s.handing.Lock()
	defer s.handing.Unlock()
	if s.discarded = s.discarded || s.draining(); s.discarded {
		return nil
	}
	if err := s.sink.Row(&r.row); err != nil {
		var f *Fault
		s.garbled = errors.As(err, &f)
		return err
	}
	s.high, s.open = at, true
	return nil
}

// awaitRoom waits for the sink, answering for us meanwhile, but leaves the socket unread no
// longer than MaxStall.
func (r *reader) awaitRoom(ctx context.Context) error {
	room := r.s.sink.Room()
	if room == nil || r.s.draining() {
		return nil
	}
	stall := time.NewTimer(r.s.cfg.MaxStall)
	defer stall.Stop()
	status := time.NewTimer(max(0, r.interval-time.Since(r.sent)))
	defer status.Stop()
	for room != nil {
		select {
		case <-room:
			room = r.s.sink.Room()
		case <-ctx.Done():
			return ctx.Err()
		case <-r.s.drained:
			return nil
		case <-status.C:
			if err := r.sendStatus(false); err != nil {
				return err
			}
			status.Reset(r.interval)
		case <-stall.C:
			return errStalled
		}
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

func jitter(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (0.8 + 0.4*rand.Float64()))
}
