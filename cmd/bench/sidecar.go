package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// sidecar is a walhook that runs.
type sidecar struct {
	*process
	addr string // of its health and metrics
	log  string // file
}

// startPatience is how long a walhook may take until it streams.
const startPatience = 60 * time.Second

// walhook starts the program that is measured, on db, with endpoints as in the configuration
// file, and returns when it streams. label names its log and its profiles.
func (db *database) walhook(ctx context.Context, label string, endpoints ...string) (s *sidecar, err error) {
	l := db.lab
	var text strings.Builder
	fmt.Fprintf(&text, "database: {url: %q}\ncdc: {slot: %s, publication: %s}\noutbox: [{table: public.outbox%s}]\n", db.url, db.slot, db.slot, db.columns)
	text.WriteString("server: {listen: \"127.0.0.1:0\"}\n" + db.sections + "endpoints:\n")
	for _, e := range endpoints {
		text.WriteString("  - " + e + "\n")
	}
	config := filepath.Join(l.dir, label+".yaml")
	if err := os.WriteFile(config, []byte(text.String()), 0o600); err != nil {
		return nil, err
	}
	s = &sidecar{log: filepath.Join(l.dir, label+".log")}
	file, err := os.Create(s.log)
	if err != nil {
		return nil, err
	}
	defer file.Close() // the process has its own
	cmd := exec.Command(l.program, "run", "--config", config)
	cmd.Stderr = file
	if l.options.profile != "" {
		cmd.Env = append(os.Environ(), "WALHOOK_PROFILE="+filepath.Join(l.options.profile, label))
	}
	if s.process, err = start("walhook", cmd); err != nil {
		return nil, err
	}
	l.running = append(l.running, s.process)
	ctx, cancel := context.WithTimeoutCause(ctx, startPatience, errors.New("it does not stream"))
	defer cancel()
	if err := eventually(ctx, "start walhook", func() (bool, error) { return s.streams(ctx) }); err != nil {
		return nil, errors.Join(fmt.Errorf("%w; the end of its log: %s", err, s.tail()), s.stop())
	}
	return s, nil
}

func (s *sidecar) streams(ctx context.Context) (bool, error) {
	if err := s.ended(); err != nil {
		return false, err
	}
	if s.addr == "" {
		log, err := os.ReadFile(s.log)
		if err != nil {
			return false, err
		}
		_, rest, _ := bytes.Cut(log, []byte(`"serving health`))
		_, rest, found := bytes.Cut(rest, []byte(`"addr":"`))
		if !found {
			return false, nil
		}
		addr, _, _ := bytes.Cut(rest, []byte{'"'})
		s.addr = string(addr)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.addr+"/readyz", http.NoBody)
	if err != nil {
		return false, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false, nil //nolint:nilerr // asked again
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode == http.StatusOK && bytes.Contains(text, []byte(`"streaming"`)), err
}

func (s *sidecar) tail() string {
	log, _ := os.ReadFile(s.log)
	return string(log[max(0, len(log)-2000):])
}

// end stops walhook and tells what it used: until now where that is known, or else in all.
func (s *sidecar) end() (usage, error) {
	u, known := s.used()
	err := s.stop()
	if !known {
		u = s.usedInAll()
	}
	if err != nil {
		return u, fmt.Errorf("%w; the end of its log: %s", err, s.tail())
	}
	return u, nil
}

// written are the rows that walhook has written to its schema.
type written struct {
	all    int64 // inserted, updated, deleted
	parked int64 // inserted into walhook.deliveries
}

func (w written) since(before written) written {
	return written{w.all - before.all, w.parked - before.parked}
}

// written asks Postgres for its counts. Those of a session are complete when it has ended (on
// Postgres 14 half a second later), so it waits until none of walhook's is left.
func (db *database) written(ctx context.Context) (w written, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, startPatience, errors.New("walhook's sessions do not end"))
	defer cancel()
	err = eventually(ctx, "count rows written", func() (gone bool, err error) {
		err = db.conn.QueryRow(ctx, "select count(*) = 0 from pg_stat_activity where datname = current_database() and application_name like 'walhook%'").Scan(&gone)
		return gone, err
	})
	if err != nil {
		return w, err
	}
	err = db.conn.QueryRow(ctx, rowsWritten).Scan(&w.all, &w.parked)
	if err != nil {
		return w, fmt.Errorf("count rows written: %w", err)
	}
	return w, nil
}

const rowsWritten = `
select coalesce(sum(n_tup_ins + n_tup_upd + n_tup_del), 0)::bigint,
       coalesce(sum(n_tup_ins) filter (where relname = 'deliveries'), 0)::bigint
from pg_stat_user_tables
where schemaname = 'walhook'`

// endpoint is one of the receiver's, as it stands in the configuration file; more are further settings.
func (l *lab) endpoint(id string, more ...string) string { return endpointAt(id, l.url(id), more...) }

func endpointAt(id, url string, more ...string) string {
	settings := append([]string{"id: " + id, fmt.Sprintf("url: %q", url), fmt.Sprintf("secrets: [%q]", secret())}, more...)
	return "{" + strings.Join(settings, ", ") + "}"
}

func (l *lab) url(id string) string { return "http://" + l.addr + "/" + id }
