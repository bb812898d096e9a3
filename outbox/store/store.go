package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"

	"github.com/walhook/walhook/outbox"
)

const (
	// Connections are what a Store opens at most: a lane's write, the drain's reads, the checkpoint and a
	// command side by side.
	Connections = 6
	// connectTimeout holds where the URL has no connect_timeout.
	connectTimeout = 10 * time.Second
	// callTimeout bounds every call, so that a server that vanished is noticed.
	callTimeout = 30 * time.Second
	// deadlockTries is how often a transaction is begun that Postgres rolled back for another's sake.
	deadlockTries = 4
)

// Config is what a Store needs.
type Config struct {
	// URL is read at each connect, so that a changed password is picked up.
	URL      func() (string, error)
	Slot     string
	Instance string
	Logger   *zap.Logger
}

// Store is the schema walhook in a Postgres. Its methods may be called from any goroutine.
type Store struct {
	slot     string
	instance string
	log      *zap.Logger
	pool     *pgxpool.Pool
	epoch    atomic.Int64 // of our claim; unclaimed before it
	seen     atomic.Int64 // of the checkpoint that was read last; unclaimed before it
	// asciiOnly: the database's encoding is not UTF-8, so that it may lack any other character.
	asciiOnly atomic.Bool
	from17    atomic.Bool // the server's version
	sample    sample
	// They are copyRows, partEvents, partRows, partUpdates, fillBeat and fillSilence but in tests.
	copyRows                          int
	partEvents, partRows, partUpdates int
	beat, silence                     time.Duration
}

// unclaimed is the epoch that no checkpoint has. (One that was announced has zero.)
const unclaimed = -1

var _ outbox.Store = (*Store)(nil)

// Open prepares a Store. It does not connect: the first call does, and fails while Postgres is away.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	conn, err := connConfig(cfg.URL)
	if err != nil {
		return nil, err
	}
	// The pool takes nothing of the URL but how to connect.
	poolConfig, err := pgxpool.ParseConfig("")
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	s := &Store{slot: cfg.Slot, instance: cfg.Instance, log: cfg.Logger, copyRows: copyRows, partEvents: partEvents, partRows: partRows, partUpdates: partUpdates, beat: fillBeat, silence: fillSilence}
	s.epoch.Store(unclaimed)
	s.seen.Store(unclaimed)
	if s.log == nil {
		s.log = zap.NewNop()
	}
	poolConfig.ConnConfig = conn
	poolConfig.MaxConns = Connections
	poolConfig.MaxConnIdleTime = 5 * time.Minute
	poolConfig.BeforeConnect = func(_ context.Context, c *pgx.ConnConfig) error {
		fresh, err := connConfig(cfg.URL)
		if err != nil {
			return err
		}
		*c = *fresh
		return nil
	}
	poolConfig.AfterConnect = func(_ context.Context, c *pgx.Conn) error {
		s.asciiOnly.Store(c.PgConn().ParameterStatus("server_encoding") != "UTF8")
		major, _, _ := strings.Cut(c.PgConn().ParameterStatus("server_version"), ".")
		n, _ := strconv.Atoi(major)
		s.from17.Store(n >= 17)
		c.TypeMap().RegisterType(pgLSN)
		return nil
	}
	if s.pool, err = pgxpool.NewWithConfig(ctx, poolConfig); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	return s, nil
}

// Close waits for calls under way and closes all connections.
func (s *Store) Close() { s.pool.Close() }

// connConfig is the present URL with what we need of every session. These few settings a
// transaction pooler keeps for its client; all others are made in each transaction.
func connConfig(read func() (string, error)) (*pgx.ConnConfig, error) {
	url, err := read()
	if err != nil {
		return nil, fmt.Errorf("read database URL: %w", err)
	}
	c, err := pgx.ParseConfig(url)
	if err != nil {
		return nil, fmt.Errorf("read database URL: %w", err)
	}
	for name, value := range map[string]string{"timezone": "UTC", "datestyle": "ISO", "client_encoding": "UTF8"} {
		c.RuntimeParams[name] = value
	}
	if c.RuntimeParams["application_name"] == "" {
		c.RuntimeParams["application_name"] = "walhook"
	}
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = connectTimeout
	}
	// URLs for poolers ask for these two, which send a []byte for text as bytea. This one needs no
	// prepared statements either.
	if m := c.DefaultQueryExecMode; m == pgx.QueryExecModeExec || m == pgx.QueryExecModeSimpleProtocol {
		c.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
	}
	// Of several hosts the one that takes writes: the primary, after a failover too.
	if c.ValidateConnect == nil {
		c.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	}
	return c, nil
}

// begin does not trust the role's defaults: our locks need read committed. But where somebody
// made the server read-only, as some do when its disk is full, it stays so for us too.
const begin = `begin isolation level read committed`

// settings hold until the transaction ends. All our statements look rows up by index; the
// planner's statistics of a queue are wrong whenever it matters, and a plan that reads the
// whole table once is the outage, so it is given no other choice.
const settings = `
select
	set_config('synchronous_commit', 'on', true),
	set_config('statement_timeout', '25s', true),
	set_config('lock_timeout', '10s', true),
	set_config('idle_in_transaction_session_timeout', '25s', true),
	set_config('enable_seqscan', 'off', true),
	set_config('enable_bitmapscan', 'off', true),
	set_config('enable_hashjoin', 'off', true),
	set_config('enable_mergejoin', 'off', true),
	set_config('jit', 'off', true)`

// transactionTimeout is there from 17 on.
const transactionTimeout = `
select set_config('transaction_timeout', '0', true)`

const hold = `
select walhook.hold($1, $2)`

// fenced is the SQLSTATE that walhook.hold raises.
const fenced = "WH001"

// step is one statement of a transaction.
type step struct {
	what  string // for errors
	sql   string
	args  []any
	copy  *copying             // instead of sql; it takes a round trip of its own
	pause func() bool          // instead of sql; called when what is before it is done, and tells whether to pause again
	begin func()               // called before the transaction, each time that it is begun; nil is nothing
	row   func(pgx.Rows) error // called for each row; nil where there is none of interest
	tag   func(pgconn.CommandTag)
}

// apart tells whether a step cannot go in one round trip with others.
func (st step) apart() bool { return st.copy != nil || st.pause != nil }

// held is the transaction of a holder: it fails with ErrFenced where the slot was taken.
func (s *Store) held(ctx context.Context, steps ...step) error {
	return s.plain(ctx, append([]step{{what: "hold slot", sql: hold, args: []any{s.slot, s.epoch.Load()}}}, steps...)...)
}

// plain is a transaction that anybody may do.
func (s *Store) plain(ctx context.Context, steps ...step) error {
	all := []step{{what: "begin", sql: begin}, {what: "settings", sql: settings}}
	if s.from17.Load() && slices.ContainsFunc(steps, step.apart) {
		all = append(all, step{what: "settings", sql: transactionTimeout})
	}
	return s.run(ctx, append(append(all, steps...), step{what: "commit", sql: "commit"}))
}

// run sends the steps. Where Postgres rolled the transaction back for the
// sake of another, it is begun again.
func (s *Store) run(ctx context.Context, steps []step) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	for try := 1; ; try++ {
		err := s.runOnce(ctx, steps)
		var refused *pgconn.PgError
		if !errors.As(err, &refused) {
			return err
		}
		if refused.Code == fenced {
			return outbox.ErrFenced
		}
		const deadlock, serialization, unique, unsupported = "40P01", "40001", "23505", "0A000" // the last one for row-level security
		if (refused.Code == unique || refused.Code == unsupported) && slices.ContainsFunc(steps, func(st step) bool { return st.copy != nil }) {
			return errNotCopied
		}
		if (refused.Code != deadlock && refused.Code != serialization) || try == deadlockTries {
			return err
		}
	}
}

func (s *Store) runOnce(ctx context.Context, steps []step) error {
	for _, st := range steps {
		if st.begin != nil {
			st.begin()
		}
	}
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer conn.Release()

	err = send(ctx, conn, steps)
	// Else the pool would throw the connection away.
	if pg := conn.Conn().PgConn(); err != nil && !pg.IsClosed() && pg.TxStatus() != 'I' {
		_, _ = conn.Exec(ctx, "rollback")
	}
	return err
}

// session is where steps are sent.
type session interface {
	SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults
	CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, rows pgx.CopyFromSource) (int64, error)
}

// send sends the steps, all between two that are apart in one round trip.
func send(ctx context.Context, to session, steps []step) error {
	for len(steps) > 0 {
		n := slices.IndexFunc(steps, step.apart)
		if n < 0 {
			n = len(steps)
		}
		if n > 0 {
			if err := sendBatch(ctx, to, steps[:n]); err != nil {
				return err
			}
		}
		if n == len(steps) {
			return nil
		}
		next := steps[n]
		steps = steps[n+1:]
		if next.pause != nil {
			if !next.pause() {
				steps = slices.DeleteFunc(slices.Clone(steps), func(st step) bool { return st.pause != nil })
			}
			continue
		}
		if _, err := to.CopyFrom(ctx, pgx.Identifier{"walhook", next.copy.table}, next.copy.columns, next.copy.rows()); err != nil {
			return fmt.Errorf("%s: %w", next.what, err)
		}
	}
	return nil
}

func sendBatch(ctx context.Context, to session, steps []step) (err error) {
	var batch pgx.Batch
	for _, st := range steps {
		batch.Queue(st.sql, st.args...)
	}
	results := to.SendBatch(ctx, &batch)
	for _, st := range steps {
		if err = st.read(results); err != nil {
			err = fmt.Errorf("%s: %w", st.what, err)
			break
		}
	}
	if closeErr := results.Close(); err == nil {
		err = closeErr
	}
	return err
}

func (st step) read(results pgx.BatchResults) error {
	rows, err := results.Query()
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if st.row == nil {
			continue
		}
		if err := st.row(rows); err != nil {
			return err
		}
	}
	rows.Close()
	if err := rows.Err(); err != nil {
		return err
	}
	if st.tag != nil {
		st.tag(rows.CommandTag())
	}
	return nil
}
