package main

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc/pgtest"
)

// composeService is what the test takes from a service of compose.yaml.
type composeService struct {
	Command     []string
	Environment map[string]string
	Volumes     []string
	DependsOn   map[string]struct{ Condition string } `yaml:"depends_on"`
	Healthcheck struct{ Test []string }
	Ports       []string
}

// compose.yaml without an engine: its commands, files and variables, as they stand there, with addresses of this
// machine in the place of the services' names.
func TestComposeShowsDeliveries(t *testing.T) {
	t.Parallel()
	for _, program := range []string{"node", "psql"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip("needs " + program)
		}
	}
	root, err := filepath.Abs(filepath.Join("..", ".."))
	require.NoError(t, err)
	text, err := os.ReadFile(filepath.Join(root, "compose.yaml"))
	require.NoError(t, err)
	var file struct {
		Services map[string]composeService
	}
	require.NoError(t, yaml.Unmarshal(text, &file))
	services := file.Services

	// Who waits for whom, and that it can tell.
	require.Equal(t, []string{"postgres", "-c", "wal_level=logical"}, services["postgres"].Command)
	for name, s := range services {
		for on, how := range s.DependsOn {
			require.Equal(t, "service_healthy", how.Condition, "%s of %s", on, name)
			if on != "walhook" { // whose health check is the image's
				require.NotEmpty(t, services[on].Healthcheck.Test, on)
			}
		}
	}

	url := pgtest.DB(t)
	places := strings.NewReplacer("/compose/", filepath.Join(root, "docs", "compose")+"/",
		"postgres://postgres:shop@postgres:5432/shop?sslmode=disable", url)
	begin := func(s composeService, args ...string) *logBuffer {
		said := &logBuffer{changed: make(chan struct{})}
		cmd := exec.Command(s.Command[0])
		for _, arg := range append(s.Command[1:], args...) {
			cmd.Args = append(cmd.Args, places.Replace(arg))
		}
		cmd.Env = os.Environ()
		for name, value := range s.Environment {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
		cmd.Stdout, cmd.Stderr = said, said
		cmd.SysProcAttr = dieWithUs()
		require.NoError(t, cmd.Start())
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
		return said
	}

	table := strings.Split(services["postgres"].Volumes[0], ":")
	require.Equal(t, "/docker-entrypoint-initdb.d/outbox.sql", table[1])
	sql, err := os.ReadFile(filepath.Join(root, table[0]))
	require.NoError(t, err)
	pgtest.Exec(t, url, string(sql))

	receiver := services["receiver"]
	require.Equal(t, "3000", receiver.Environment["PORT"])
	require.Contains(t, strings.Join(receiver.Healthcheck.Test, " "), "http://127.0.0.1:3000'")
	receiver.Environment["PORT"] = "0"
	received := begin(receiver)
	port := regexp.MustCompile(`\d+$`).FindString(received.line(t, "receiver on port"))

	walhook := services["walhook"]
	settings, err := os.ReadFile(places.Replace(walhook.Environment["WALHOOK_CONFIG"]))
	require.NoError(t, err)
	require.Equal(t, "http://receiver:3000/hooks", walhook.Environment["RECEIVER_URL"])
	walhook.Environment["RECEIVER_URL"] = "http://127.0.0.1:" + port + "/hooks"
	config := os.Expand(string(settings), func(name string) string {
		value, given := walhook.Environment[name]
		require.True(t, given, name)
		return places.Replace(value)
	})
	path := filepath.Join(t.TempDir(), "walhook.yaml")
	slot := "compose_" + port
	config += fmt.Sprintf("cdc: {slot: %s, publication: %s}\nserver: {listen: \"127.0.0.1:0\"}\n", slot, slot)
	require.NoError(t, os.WriteFile(path, []byte(config), 0o600))
	p := start(t, path).streaming()

	producer := services["producer"]
	require.Equal(t, "postgres", producer.Environment["PGHOST"])
	producer.Environment = nil
	begin(producer, "--dbname", url)
	first := received.line(t, "✓ verified", `{"type":"order.placed","timestamp":"`, `"amount": 120.50`)
	eventually(t, "a second event", func() bool { return strings.Count(received.String(), "✓ verified") > 1 })
	require.NotContains(t, received.String(), "✗")

	forged, err := http.NewRequest(http.MethodPost, "http://127.0.0.1:"+port+"/hooks", strings.NewReader("{}"))
	require.NoError(t, err)
	forged.Header.Set("webhook-id", "1")
	forged.Header.Set("webhook-signature", "v1,"+strings.Repeat("A", 43)+"=")
	answer, err := http.DefaultClient.Do(forged)
	require.NoError(t, err)
	defer answer.Body.Close()
	require.Equal(t, http.StatusUnauthorized, answer.StatusCode, first)
	p.stop()
}
