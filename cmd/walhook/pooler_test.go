package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc/pgtest"
)

// refused are the settings that PgBouncer takes from no client, unless it is told to overlook them.
const refused = "bytea_output, extra_float_digits, intervalstyle, search_path, statement_timeout, lock_timeout, idle_in_transaction_session_timeout"

// pgbouncer starts a PgBouncer before the site's server and has database.url lead through it.
func (s *site) pgbouncer(mode, overlook string) {
	t := s.t
	t.Helper()
	path, err := exec.LookPath("pgbouncer")
	if err != nil {
		if path, err = exec.LookPath("/usr/sbin/pgbouncer"); err != nil {
			t.Skip("there is no pgbouncer here (Debian: apt-get install pgbouncer)")
		}
	}
	server, err := url.Parse(s.admin)
	require.NoError(t, err)
	free, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	_, port, _ := net.SplitHostPort(free.Addr().String())
	require.NoError(t, free.Close())

	dir, err := os.MkdirTemp("", "walhook-pgbouncer-")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o755)) //nolint:gosec // PgBouncer leaves root behind and reads it as another user
	ini := filepath.Join(dir, "pgbouncer.ini")
	require.NoError(t, os.WriteFile(ini, []byte(fmt.Sprintf(`[databases]
* = host=%s port=%s user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %s
unix_socket_dir =
auth_type = any
pool_mode = %s
ignore_startup_parameters = %s
`, server.Hostname(), server.Port(), port, mode, overlook)), 0o644)) //nolint:gosec // there is no secret in it
	args := []string{ini}
	if os.Getuid() == 0 {
		args = []string{"-u", "nobody", ini}
	}
	cmd := exec.Command(path, args...)
	log, err := cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	lines := bufio.NewScanner(log)
	var said []string
	for lines.Scan() && !strings.Contains(lines.Text(), "process up") {
		said = append(said, lines.Text())
	}
	require.Contains(t, lines.Text(), "process up", strings.Join(said, "\n"))
	drained := make(chan struct{})
	go func() { _, _ = io.Copy(io.Discard, log); close(drained) }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-drained
		_ = cmd.Wait()
	})
	through := *server
	through.Host = net.JoinHostPort("127.0.0.1", port)
	through.RawQuery = "sslmode=disable"
	s.url = through.String()
}

func (s *site) serverAt() string {
	u, err := url.Parse(s.admin)
	require.NoError(s.t, err)
	return u.Host
}

func TestCheckRecognisesAPooler(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"transaction", "session"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, pgtest.DB(t))
			s.pgbouncer(mode, "")
			s.finds(1, "✗", "database", "stands a pooler, which does not let a stream through: unsupported startup parameter",
				"set database.replication_url to the address of Postgres itself, which the pooler reaches at "+s.serverAt())
			_, out, _ := s.walhook("check", "--provider", "azure")
			requireLine(t, out, "✗", "database", "stands a pooler", "the same host at port 5432 (6432 is its PgBouncer): 127.0.0.1:5432")
			s.direct = s.admin // as it says
			s.finds(0, "✓", "role", "may replicate", "")
			s.finds(0, "!", "pooler", "database.url leads through a pooler", "default_query_exec_mode=cache_describe")
			s.url += "&default_query_exec_mode=cache_describe"
			s.finds(0, "✓", "pooler", "database.url leads through a pooler, database.replication_url does not", "")
		})
	}
}

// A pooler that overlooks what it does not know lets ordinary connections through and only then refuses.
func TestCheckRecognisesAPoolerThatOverlooks(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"transaction", "session"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, pgtest.DB(t))
			s.pgbouncer(mode, refused)
			s.url += "&default_query_exec_mode=exec"
			code, out, errs := s.walhook("check")
			if code == exitDone { // from 1.23 on replication is passed on
				requireLine(t, out, "!", "pooler", "between walhook and Postgres stands a pooler", "which the pooler reaches at "+s.serverAt())
				return
			}
			require.Equal(t, exitFailed, code, out+errs)
			requireLine(t, out, "✗", "pooler", "between walhook and Postgres stands a pooler, which does not pass replication on", "set database.replication_url to the address of Postgres itself, which the pooler reaches at "+s.serverAt())
		})
	}
}

// With the two lines that check asks for, walhook works behind a pooler in transaction mode.
func TestRunBehindAPooler(t *testing.T) {
	t.Parallel()
	s := newSite(t, pgtest.DB(t))
	s.pgbouncer("transaction", "")
	s.direct, s.url = s.admin, s.url+"&default_query_exec_mode=cache_describe"
	got := make(chan string, 8)
	rx := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got <- string(body)
	}))
	t.Cleanup(rx.Close)
	s.hooks = rx.URL
	s.runs(func() {
		s.exec(`insert into public.outbox (event_type, payload) values ('order.created', '{"n": 1}')`)
		require.Contains(t, <-got, `"data":{"n": 1}`)
	})
}
