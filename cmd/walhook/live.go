package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"time"
)

// liveTime bounds the question and its answer: container engines give a health check some seconds.
const liveTime = 2 * time.Second

// live is `walhook check --live`, the health check of a container: does the instance beside us work? It asks /healthz,
// not /readyz: one that stands by, or waits for a database that is down, is well, and to kill it would mend nothing.
// The exit code is 0 or 1 whatever is wrong: engines know no other.
func live(ctx context.Context, o *options, out io.Writer) error {
	if o.output != "table" && o.output != "json" {
		return usageError{fmt.Errorf("--output %s: want table or json", o.output)}
	}
	r := askLive(ctx, listenAddress(o.config, o.env))
	if err := report(out, o.output, "", []result{r}); err != nil {
		return err
	}
	if r.Grade == broken {
		return failed{errors.New("walhook is not live"), exitFailed}
	}
	return nil
}

// listenAddress is server.listen alone, and its default where the file does not say, cannot be read, or is wrong: a
// file that was refused on a reload leaves the instance running on what was there before.
func listenAddress(path string, env func(string) (string, bool)) string {
	listen := defaultConfig().Server.Listen
	l := &loader{file: filepath.Clean(configPath(path, env)), env: env}
	if src, ok := l.open(); ok {
		if root, ok := l.parse(src); ok {
			l.listen(&listen)(l.find(root, "server.listen"))
		}
	}
	return listen
}

// askLive asks whoever listens at that address for /healthz. No proxy is asked, whatever the environment says.
func askLive(ctx context.Context, listen string) result {
	r := result{Topic: "live", Grade: broken, Text: "server.listen " + listen + ": "}
	targets, err := loopbackOf(listen)
	if err != nil {
		r.Text += err.Error()
		r.Remedy = "give server.listen a port that is known beforehand"
		return r
	}
	ctx, cancel := context.WithTimeout(ctx, liveTime)
	defer cancel()
	transport := &http.Transport{DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	var wrong []string
	for _, target := range targets {
		err := healthz(ctx, client, target)
		if err == nil {
			return result{Topic: "live", Grade: well, Text: "walhook answers at " + target}
		}
		wrong = append(wrong, err.Error())
	}
	r.Text += strings.Join(wrong, "; ")
	r.Remedy = "look at the log of walhook run, or whether its server.listen is the one of this configuration"
	return r
}

func healthz(ctx context.Context, client *http.Client, target string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+target+"/healthz", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64))
	if err == nil && (resp.StatusCode != http.StatusOK || strings.TrimSpace(string(body)) != "ok") {
		err = fmt.Errorf("%s answers %s, as walhook does not", target, resp.Status)
	}
	return err
}

// loopbackOf is where somebody on this machine reaches a listener: a host that stands for all addresses is on both loopbacks, of
// which a machine may lack one.
func loopbackOf(listen string) ([]string, error) {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return nil, err
	}
	if strings.Trim(port, "0") == "" {
		return nil, errors.New("port 0 is another one at each start")
	}
	if ip, err := netip.ParseAddr(host); host != "" && (err != nil || !ip.IsUnspecified()) {
		return []string{net.JoinHostPort(host, port)}, nil
	}
	return []string{net.JoinHostPort("127.0.0.1", port), net.JoinHostPort("::1", port)}, nil
}
