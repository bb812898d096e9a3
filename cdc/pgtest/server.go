package pgtest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// Config says what server to start. The zero Config is a good one.
type Config struct {
	Bin      string            // directory of initdb and postgres; what Find finds where empty
	Dir      string            // where the server makes its directory; that for temporary files where empty
	Settings map[string]string // over the defaults, by their names in postgresql.conf
}

// defaultSettings make a server that decodes its WAL and has no secrets and no future.
var defaultSettings = map[string]string{
	"listen_addresses":        "127.0.0.1",
	"unix_socket_directories": "", // macOS' temporary directory is too long a path for one
	"wal_level":               "logical",
	"max_wal_senders":         "20",
	"max_replication_slots":   "20",
	"fsync":                   "off",
}

// startTimeout bounds a start whose context has no end of its own.
const startTimeout = 60 * time.Second

// Mode is how a server stops.
type Mode int

const (
	Fast      Mode = iota // sends all WAL to those who stream it, then ends; sessions are cut off
	Smart                 // waits for every session to end by itself
	Immediate             // at once, without a checkpoint: the next start recovers, as after a crash
)

// String is the mode's name in pg_ctl.
func (m Mode) String() string { return [...]string{"fast", "smart", "immediate"}[m] }

// Server is a throwaway Postgres. It belongs to the user postgres, who needs no password.
type Server struct {
	bin      string
	dir      string
	port     int
	owner    *owner
	watchdog *watchdog

	mu       sync.Mutex // guards all below
	settings map[string]string
	pid      int // 0 while no process is ours to reap
	closed   bool
	standbys int
}

// Start makes a new cluster on a free port and returns when it answers. Where ctx has no
// deadline, it has a minute. Close ends it and removes all that was made.
func Start(ctx context.Context, config Config) (*Server, error) {
	s, err := prepare(config)
	if err != nil {
		return nil, fmt.Errorf("start Postgres: %w", err)
	}
	if err := s.create(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("start Postgres: %w", err), s.Close())
	}
	return s, nil
}

// prepare finds the programs and a directory where their user can work, watched from the
// first moment.
func prepare(config Config) (*Server, error) {
	s := &Server{bin: config.Bin, settings: maps.Clone(defaultSettings)}
	maps.Copy(s.settings, config.Settings)
	var err error
	if s.bin == "" {
		if s.bin, err = Find(); err != nil {
			return nil, err
		}
	}
	if s.owner, err = unprivileged(); err != nil {
		return nil, err
	}
	parent := config.Dir
	if parent == "" {
		parent = os.TempDir()
		if !reaches(parent, s.owner) {
			parent = "/tmp"
		}
	}
	if !reaches(parent, s.owner) {
		return nil, fmt.Errorf("%s is closed to the user that Postgres runs as", parent)
	}
	if s.dir, err = os.MkdirTemp(parent, "walhook-pg-"); err != nil {
		return nil, err
	}
	if s.dir, err = filepath.Abs(s.dir); err != nil {
		return nil, err
	}
	if s.watchdog, err = startWatchdog(s.dir); err != nil {
		return nil, errors.Join(err, os.RemoveAll(s.dir))
	}
	if err := errors.Join(give(s.dir, s.owner), s.reachBin()); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// reachBin copies an installation that the server's user cannot get at, as one in root's cache
// directory. Postgres finds its libraries relative to its programs, wherever they lie.
func (s *Server) reachBin() error {
	if reaches(filepath.Join(s.bin, "initdb"), s.owner) && reaches(filepath.Join(s.bin, "postgres"), s.owner) {
		return nil
	}
	from, home := filepath.Dir(s.bin), filepath.Join(s.dir, "postgres")
	for _, part := range []string{filepath.Base(s.bin), "lib", "lib64", "share"} {
		err := os.CopyFS(filepath.Join(home, part), os.DirFS(filepath.Join(from, part)))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("copy programs: %w", err)
		}
	}
	s.bin = filepath.Join(home, filepath.Base(s.bin))
	return filepath.Walk(home, func(path string, _ os.FileInfo, err error) error {
		return errors.Join(err, give(path, s.owner))
	})
}

func (s *Server) create(ctx context.Context) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	if err := s.initdb(ctx); err != nil {
		return err
	}
	return s.startOnFreePort(ctx)
}

func (s *Server) initdb(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.spawn("initdb", "-D", s.DataDir(), "-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync"); err != nil {
		return err
	}
	if err := s.awaitEnd(ctx); err != nil {
		return fmt.Errorf("initdb: %w%s", err, s.complaint(0))
	}
	conf, err := os.OpenFile(filepath.Join(s.DataDir(), "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = conf.WriteString("\ninclude 'walhook.conf'\n")
	return errors.Join(err, conf.Close())
}

// startOnFreePort tries again with another port: between finding a free one and binding it,
// somebody else may.
func (s *Server) startOnFreePort(ctx context.Context) error {
	for try := 1; ; try++ {
		var err error
		if s.port, err = freePort(); err != nil {
			return err
		}
		err = s.start(ctx)
		if err == nil || try == 5 || !strings.Contains(err.Error(), "TCP/IP sockets") {
			return err
		}
	}
}

// freePort picks below the range from which systems give ports to outgoing connections: one of
// those could take the port while its server is stopped.
func freePort() (int, error) {
	for range 100 {
		port := 15000 + rand.IntN(15000)
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err == nil {
			return port, l.Close()
		}
	}
	return 0, errors.New("no free port between 15000 and 30000")
}

// Start starts a stopped server again, with its data and on its port, and returns when it answers.
func (s *Server) Start(ctx context.Context) error {
	if err := s.start(ctx); err != nil {
		return fmt.Errorf("start Postgres: %w", err)
	}
	return nil
}

func (s *Server) start(ctx context.Context) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return errors.New("the server is closed")
	case s.running():
		return errors.New("it is running")
	}
	if err := s.writeSettings(); err != nil {
		return err
	}
	var logged int64
	if info, err := os.Stat(s.LogFile()); err == nil {
		logged = info.Size()
	}
	if err := s.spawn("postgres", "-D", s.DataDir(), "-p", strconv.Itoa(s.port)); err != nil {
		return err
	}
	err := await(ctx, func() bool { return !s.running() || s.answers(ctx) })
	if err == nil && s.pid == 0 {
		err = errors.New("it ended at once")
	}
	if err != nil {
		return errors.Join(fmt.Errorf("%w%s", err, s.complaint(logged)), s.kill())
	}
	return nil
}

// answers asks only where the data directory says that our server is ready: another one might
// have the port.
func (s *Server) answers(ctx context.Context) bool {
	lines := strings.Split(string(s.pidFile()), "\n")
	if len(lines) < 8 || lines[0] != strconv.Itoa(s.pid) || strings.TrimSpace(lines[7]) != "ready" {
		return false
	}
	conn, err := pgconn.Connect(ctx, s.URL())
	if err != nil {
		return false
	}
	_ = conn.Close(ctx)
	return true
}

// pidFile is postmaster.pid: process, data directory, time, port, socket, address, shared memory, state.
func (s *Server) pidFile() []byte {
	content, _ := os.ReadFile(filepath.Join(s.DataDir(), "postmaster.pid"))
	return content
}

// Stop stops the server and returns when its process has ended, or with an error when ctx
// ends first; the server then goes on stopping. A server that is not running is well stopped.
func (s *Server) Stop(ctx context.Context, mode Mode) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.running() {
		return nil
	}
	if err := signalStop(s.pid, mode); err != nil {
		return fmt.Errorf("stop Postgres: %w", err)
	}
	if err := await(ctx, func() bool { return !s.running() }); err != nil {
		return fmt.Errorf("stop Postgres: %s shutdown: %w", mode, err)
	}
	return nil
}

// Kill ends all the server's processes at once with SIGKILL, as the kernel does when memory
// runs out. Clients are told nothing.
func (s *Server) Kill() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.kill()
}

func (s *Server) kill() error {
	if !s.running() {
		return nil
	}
	err := killTree(s.pid)
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	err = errors.Join(err, await(ctx, func() bool { return !s.running() }))
	removeSharedMemory(s.pidFile())
	if err != nil {
		return fmt.Errorf("kill Postgres: %w", err)
	}
	return nil
}

// Close ends the server and removes its directory. It may be called again.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	err := s.kill()
	err = errors.Join(err, os.RemoveAll(s.dir), s.watchdog.close())
	if err != nil {
		return fmt.Errorf("close Postgres: %w", err)
	}
	return nil
}

// Set changes settings. A running server reads them before Set returns: new sessions have them
// at once, old ones before their next statement, and those that only a start can change are
// kept for the next Start.
func (s *Server) Set(ctx context.Context, settings map[string]string) error {
	s.mu.Lock()
	maps.Copy(s.settings, settings)
	err := s.writeSettings()
	s.mu.Unlock()
	if err != nil {
		return fmt.Errorf("set: %w", err)
	}
	return s.Reload(ctx)
}

// Reload makes the server read its configuration files again, and returns when it has.
func (s *Server) Reload(ctx context.Context) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.running() {
		return nil
	}
	const loaded = "select pg_conf_load_time()"
	before, err := s.query(ctx, loaded)
	if err != nil {
		return fmt.Errorf("reload: %w", err)
	}
	if err := signalReload(s.pid); err != nil {
		return fmt.Errorf("reload: %w", err)
	}
	var failure error
	err = await(ctx, func() bool {
		var now string
		now, failure = s.query(ctx, loaded)
		return failure != nil || now != before
	})
	if err = errors.Join(err, failure); err != nil {
		return fmt.Errorf("reload: %w", err)
	}
	return nil
}

func (s *Server) query(ctx context.Context, sql string) (string, error) {
	conn, err := pgconn.Connect(ctx, s.URL())
	if err != nil {
		return "", err
	}
	defer conn.Close(ctx)
	return queryOn(ctx, conn, sql)
}

// queryOn returns the first value of the last statement's first row, as text.
func queryOn(ctx context.Context, conn *pgconn.PgConn, sql string) (string, error) {
	results, err := conn.Exec(ctx, sql).ReadAll()
	if err != nil || len(results) == 0 {
		return "", err
	}
	if rows := results[len(results)-1].Rows; len(rows) > 0 && len(rows[0]) > 0 {
		return string(rows[0][0]), nil
	}
	return "", nil
}

func (s *Server) writeSettings() error {
	quote := strings.NewReplacer(`\`, `\\`, `'`, `''`)
	var conf strings.Builder
	for _, name := range slices.Sorted(maps.Keys(s.settings)) {
		fmt.Fprintf(&conf, "%s = '%s'\n", name, quote.Replace(s.settings[name]))
	}
	path := filepath.Join(s.DataDir(), "walhook.conf")
	return errors.Join(os.WriteFile(path, []byte(conf.String()), 0o600), give(path, s.owner))
}

// spawn starts one of Postgres' programs, whose output goes to the log.
func (s *Server) spawn(program string, args ...string) error {
	log, err := os.OpenFile(s.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	if s.pid, err = spawn(s.owner, s.dir, log, filepath.Join(s.bin, program), args...); err != nil {
		return err
	}
	return s.watchdog.watch(s.pid)
}

func (s *Server) running() bool { alive, _ := s.alive(); return alive }

// alive reaps a process that has ended, whoever ended it, and then tells how it did.
func (s *Server) alive() (alive bool, how error) {
	if s.pid == 0 {
		return false, nil
	}
	ended, how := reap(s.pid)
	if !ended {
		return true, nil
	}
	s.pid = 0
	return false, errors.Join(how, s.watchdog.watch(0))
}

// awaitEnd waits for a program that ends by itself.
func (s *Server) awaitEnd(ctx context.Context) error {
	var how error
	err := await(ctx, func() (ended bool) {
		alive, err := s.alive()
		how = err
		return !alive
	})
	return errors.Join(err, how)
}

// complaint is the end of what the log says since then, on one line: Postgres gives the reason
// in the lines above its FATAL.
func (s *Server) complaint(since int64) string {
	log, err := os.ReadFile(s.LogFile())
	if err != nil || int64(len(log)) <= since {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(log[since:])), "\n")
	return ": " + strings.Join(lines[max(0, len(lines)-5):], "; ")
}

// URL is the address of the database postgres, for psql as well as for pgx.
func (s *Server) URL() string { return s.URLFor("postgres") }

// URLFor is the address of a database of this server.
func (s *Server) URLFor(database string) string {
	u := url.URL{
		Scheme: "postgres", User: url.User("postgres"),
		Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)), Path: "/" + database,
	}
	return u.String()
}

// Port is the same for as long as the Server lives.
func (s *Server) Port() int { return s.port }

// Bin is the directory of the programs that run.
func (s *Server) Bin() string { return s.bin }

// Dir holds all that the server made, and goes with it.
func (s *Server) Dir() string { return s.dir }

// DataDir is the cluster itself.
func (s *Server) DataDir() string { return filepath.Join(s.dir, "data") }

// LogFile is where the server writes its log.
func (s *Server) LogFile() string { return filepath.Join(s.dir, "log") }

func bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, startTimeout)
}

// await asks until the answer is yes, or ctx ends.
func await(ctx context.Context, done func() bool) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}
