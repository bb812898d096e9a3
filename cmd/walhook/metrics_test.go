package main

import (
	"net/http"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/sender/sendertest"
)

func TestMetricsAreSoundAndSayWhenToWorry(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	down := sendertest.New(t, sendertest.Config{Respond: func(sendertest.Request) sendertest.Answer {
		return sendertest.Status(http.StatusServiceUnavailable)
	}})
	config := b.config(endpoint("billing", rx, ""), endpoint("crm", down, "")+"\nmetrics: {max_endpoints: 1}")
	p := start(t, config).streaming()
	b.produce(1, 20, 3)
	requireAll(t, rx, 20)

	var text string
	eventually(t, "the deliveries are counted", func() bool {
		_, text = p.get("/metrics")
		return strings.Contains(text, `walhook_deliveries_total{endpoint="billing",outcome="delivered"} 20`)
	})
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	require.NoError(t, err)
	require.Empty(t, problems)

	docs, err := os.ReadFile("../../docs/metrics.md")
	require.NoError(t, err)
	families := regexp.MustCompile(`(?m)^# HELP (walhook_\w+) (.*)$`).FindAllStringSubmatch(text, -1)
	require.Greater(t, len(families), 15)
	for _, f := range families {
		require.Contains(t, f[2], "Worry", "the help of %s", f[1])
		require.Contains(t, string(docs), "`"+f[1], "docs/metrics.md")
	}
	for _, name := range regexp.MustCompile("`(walhook_\\w+)").FindAllStringSubmatch(string(docs), -1) {
		if name[1] != "walhook_oldest_parked_seconds" { // only while something is parked
			require.Contains(t, text, "\n# HELP "+name[1]+" ", "a series of docs/metrics.md")
		}
	}
	require.Regexp(t, `(?m)^walhook_build_info\{commit="[^"]+",go_version="go1[^"]+",version="[^"]+"\} 1$`, text)
	require.Contains(t, text, "\ngo_goroutines ")
	require.Contains(t, text, "\nprocess_open_fds ")
	require.NotContains(t, text, `endpoint=""`)
	require.NotContains(t, text, `endpoint="crm"`)
	require.Contains(t, text, `walhook_breaker_state{endpoint="other"}`)

	// Refused while the file is broken, and no more when it is mended.
	require.Contains(t, text, "walhook_config_reload_failed 0")
	good, err := os.ReadFile(config)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(config, []byte("nonsense: 1\n"), 0o600))
	require.NoError(t, p.cmd.Process.Signal(syscall.SIGHUP))
	p.log.line(t, "the configuration is broken")
	_, text = p.get("/metrics")
	require.Contains(t, text, "walhook_config_reload_failed 1")
	require.NoError(t, os.WriteFile(config, good, 0o600))
	require.NoError(t, p.cmd.Process.Signal(syscall.SIGHUP))
	p.log.line(t, "configuration reloaded")
	_, text = p.get("/metrics")
	require.Contains(t, text, "walhook_config_reload_failed 0")
	p.stop()
}
