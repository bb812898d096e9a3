package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"

	"github.com/walhook/walhook/cdc"
)

// silentAfter is how long the server may be unheard of, and stuckAfter how long the watermark
// may be held, before the sidecar is not ready.
const (
	silentAfter = 45 * time.Second
	stuckAfter  = 30 * time.Second
	// clockOffAfter leaves a minute of what receivers take.
	clockOffAfter = 4 * time.Minute
)

// server is health and metrics over HTTP.
type server struct {
	http *http.Server
	ln   net.Listener
}

func (s *sidecar) listen() (*server, error) {
	ln, err := net.Listen("tcp", s.cfg.Server.Listen)
	if err != nil {
		return nil, failed{fmt.Errorf("server.listen: %w", err), exitFailed}
	}
	s.log.Info("serving health and metrics", zap.Stringer("addr", ln.Addr()))
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		h := s.health()
		w.Header().Set("content-type", "application/json")
		if !h.ready {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		_ = json.NewEncoder(w).Encode(h)
	})
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		p := s.now
		s.mu.Unlock()
		if p == nil {
			http.Error(w, "starting", http.StatusServiceUnavailable)
			return
		}
		promhttp.HandlerFor(p.reg, promhttp.HandlerOpts{}).ServeHTTP(w, r)
	})
	return &server{ln: ln, http: &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}}, nil
}

func (s *server) serve(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() {
		shut, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = s.http.Shutdown(shut)
	})()
	if err := s.http.Serve(s.ln); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve HTTP: %w", err)
	}
	return nil
}

// health is the answer of /readyz.
type health struct {
	Status   string `json:"status"` // streaming, standby, connecting, waiting, recovering, lost
	Reason   string `json:"reason,omitempty"`
	Remedy   string `json:"remedy,omitempty"`
	LagBytes int64  `json:"lag_bytes"`

	ready bool
}

func (s *sidecar) health() health {
	s.mu.Lock()
	p := s.now
	s.mu.Unlock()
	if p == nil {
		return health{Status: string(cdc.Connecting), Reason: "starting"}
	}
	p.mu.Lock()
	preparing := p.preparing
	p.mu.Unlock()
	if preparing != nil {
		f := cdc.FaultOf(preparing)
		return health{Status: string(f.State), Reason: f.Cause(), Remedy: f.Remedy}
	}
	st := p.stream.Status()
	h := health{Status: string(st.State), LagBytes: p.lag()}
	if st.Fault != nil {
		h.Reason, h.Remedy = st.Fault.Cause(), st.Fault.Remedy
	}
	switch st.State {
	case cdc.Standby:
		silent := standsAlone(st)
		h.ready, h.Reason = silent == "", cmp.Or(silent, h.Reason)
	case cdc.Streaming:
		switch stuck := p.relay.Stuck(); {
		case time.Since(st.Heard) > silentAfter:
			h.Reason = "Postgres is silent"
		case p.relay.Fault() != nil:
			h.Reason = p.relay.Fault().Error()
		case st.Survey != nil && st.Survey.Clock.Abs() > clockOffAfter+st.Survey.Blur:
			h.Reason = st.Survey.ClockOff() + ": receivers refuse what is 5 minutes off"
		case stuck > stuckAfter:
			h.Reason = fmt.Sprintf("the watermark has not moved for %s", stuck.Round(time.Second))
		default:
			h.ready = true
		}
	}
	return h
}

// standsAlone says why a standby may be standing by for nobody. It asks every second; an answer that
// does not come may be the end of the holder, too.
func standsAlone(st cdc.Status) (reason string) {
	if silent := time.Since(st.Heard); silent > silentAfter {
		return fmt.Sprintf("Postgres has not said for %s whether the slot is held", silent.Round(time.Second))
	}
	return ""
}
