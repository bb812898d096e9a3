package main

import (
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/sender/sendertest"
)

// A start that waits for its database is live, though not ready: whoever kills it mends nothing.
func TestCheckLiveOfAStartThatWaits(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	b.exec("alter table outbox rename to outbox_away")
	p := start(t, b.config(endpoint("billing", rx, "")))
	p.log.line(t, "does not exist")
	code, _ := p.get("/readyz")
	require.Equal(t, http.StatusServiceUnavailable, code)
	path := serverConfig(t, p.addr)
	code, out, errs := walhook(t, "check", "--live", "--config", path)
	require.Zero(t, code, out+errs)
	require.Equal(t, "✓ live        walhook answers at "+p.addr+"\n", out)

	p.kill()
	code, out, errs = walhook(t, "check", "--live", "--config", path)
	require.Equal(t, exitFailed, code)
	require.Contains(t, out, "✗ live        server.listen "+p.addr+": ")
	require.Contains(t, out, "refused")
	require.Contains(t, errs, "not live")
	code, out, _ = walhook(t, "check", "--live", "--config", path, "--output", "json")
	require.Equal(t, exitFailed, code)
	require.Contains(t, out, `"status": "failed"`)
}

// serverConfig is a configuration of which all but the address is broken, as after a reload that was refused.
func serverConfig(t *testing.T, listen string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "walhook.yaml")
	require.NoError(t, os.WriteFile(path, []byte("database: {nonsense: ${NOT_SET}}\nserver: {listen: \""+listen+"\"}\n"), 0o600))
	return path
}

func TestCheckLiveAsksNobodyButWalhook(t *testing.T) {
	answer := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		live   bool
	}{
		"walhook":      {answer, true},
		"another":      {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("hello")) }, false},
		"an error":     {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) }, false},
		"a redirect":   {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/ok", http.StatusFound) }, false},
		"other's path": {http.NotFound, false},
	} {
		t.Run(name, func(t *testing.T) {
			mux := http.NewServeMux()
			mux.Handle("GET /healthz", c.answer)
			mux.Handle("GET /ok", answer)
			s := httptest.NewServer(mux)
			defer s.Close()
			t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
			got := askLive(t.Context(), s.Listener.Addr().String())
			require.Equal(t, c.live, got.Grade == well, got.Text)
		})
	}
}

// An instance that took the connection and then hangs is not live, and the question ends in time.
func TestCheckLiveDoesNotWaitForOneThatHangs(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	got := askLive(t.Context(), ln.Addr().String())
	require.Equal(t, broken, got.Grade)
	require.Contains(t, got.Text, "deadline exceeded")
}

func TestLiveIsAskedOverLoopbackAtWhatIsListenedOn(t *testing.T) {
	t.Parallel()
	both := []string{"127.0.0.1:9090", "[::1]:9090"}
	for listen, want := range map[string][]string{
		":9090":            both,
		"0.0.0.0:9090":     both,
		"[::]:9090":        both,
		"127.0.0.1:9090":   {"127.0.0.1:9090"},
		"[::1]:9090":       {"[::1]:9090"},
		"10.1.2.3:9090":    {"10.1.2.3:9090"},
		"localhost:9090":   {"localhost:9090"},
		"[fe80::1%lo]:909": {"[fe80::1%lo]:909"},
	} {
		got, err := loopbackOf(listen)
		require.NoError(t, err)
		require.Equal(t, want, got, listen)
	}
	_, err := loopbackOf("127.0.0.1:0")
	require.ErrorContains(t, err, "port 0")
}

func TestLiveReadsTheAddressAndNothingElse(t *testing.T) {
	t.Parallel()
	env := envOf(map[string]string{"PORT": "9191"})
	for text, want := range map[string]string{
		"":                               ":8080",
		"server: {listen: \":9090\"}":    ":9090",
		"server:\n  listen: :${PORT}":    ":9191",
		"server: {listen: \":${NOPE}\"}": ":8080",
		"server: {listen: 17}":           ":8080",
		"server: []":                     ":8080",
		"server:":                        ":8080",
		"outbox: [\n":                    ":8080",
		"database: {url: ${file:/nonesuch}}\nserver: {listen: \"[::]:7070\", tokn: x}": "[::]:7070",
	} {
		path := filepath.Join(t.TempDir(), "walhook.yaml")
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		require.Equal(t, want, listenAddress(path, env), text)
	}
	require.Equal(t, ":8080", listenAddress(filepath.Join(t.TempDir(), "none"), noEnv))
	code, _, errs := walhook(t, "check", "--live", "--output", "xml")
	require.Equal(t, exitUsage, code)
	require.True(t, strings.Contains(errs, "--output xml"), errs)
}
