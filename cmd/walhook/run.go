package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sync/errgroup"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/outbox/store"
	"github.com/walhook/walhook/sender"
)

const (
	// gracePeriod is how long a stop waits for what is in flight.
	gracePeriod = 10 * time.Second
	// fileLook is how often the configuration file is looked at.
	fileLook = 2 * time.Second
)

func runCommand(o *options) *cobra.Command {
	order := ""
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the sidecar",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			once := cdc.Recovery(order)
			if !slices.Contains([]cdc.Recovery{cdc.RecoverAsk, cdc.RecoverMissed, cdc.RecoverAll, cdc.RecoverNone}, once) {
				return failed{fmt.Errorf("--recover=%s: want --recover (the rows that may have been missed), --recover=all (however many they are) or --recover=none (go on without them)", order), exitUsage}
			}
			cfg, err := o.load()
			if err != nil {
				return err
			}
			lines := newLogQueue(cmd.ErrOrStderr())
			signal.Ignore(syscall.SIGPIPE) // of a log whose reader is gone
			log, err := newLogger(cfg.Log, lines)
			if err != nil {
				return err
			}
			defer func() { _ = log.Sync() }()
			defer zap.RedirectStdLog(log)() // net/http speaks there of what receivers send unasked
			hostLimits().say(log, cfg.Endpoints)
			keepWithinMemory(log, memlimit.FromCgroup)
			s := newSidecar(cfg, o, log)
			s.once, s.lines = once, lines
			s.tracing = newTracing(o.env, log)
			defer s.tracing.close()
			return s.run(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&order, "recover", "", "where events may have been missed when it starts, send them again from the outbox: those that may have been `missed`, all, or none")
	cmd.Flags().Lookup("recover").NoOptDefVal = string(cdc.RecoverMissed)
	return cmd
}

func newLogger(c Log, w io.Writer) (*zap.Logger, error) {
	level, err := zapcore.ParseLevel(c.Level)
	if err != nil {
		return nil, fmt.Errorf("log.level: %w", err)
	}
	ec := zap.NewProductionEncoderConfig()
	ec.TimeKey = "time"
	ec.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	ec.EncodeDuration = zapcore.StringDurationEncoder
	enc := zapcore.NewJSONEncoder(ec)
	if c.Format == "console" {
		ec.EncodeLevel = zapcore.CapitalLevelEncoder
		enc = zapcore.NewConsoleEncoder(ec)
	}
	out := logOutput(w, enc)
	return zap.New(zapcore.NewCore(enc, out, level), zap.ErrorOutput(out)), nil
}

// sidecar is `walhook run`: the pipeline, made anew where the database's history is, and the
// HTTP server, which outlives pipelines.
type sidecar struct {
	opts    *options
	log     *zap.Logger
	lines   *logQueue    // of log, if it has one
	tracing *tracing     // nil: off
	once    cdc.Recovery // what the first pipeline is told to do about events that were missed

	refused atomic.Bool // the file that is there now is not in force

	mu  sync.Mutex // guards what follows
	cfg *Config
	now *pipeline
}

func newSidecar(cfg *Config, o *options, log *zap.Logger) *sidecar {
	return &sidecar{opts: o, log: log, cfg: cfg}
}

// run starts in this order: HTTP, so that a start that waits can be asked why; then the
// pipeline. It stops in the opposite one.
func (s *sidecar) run(ctx context.Context) error {
	srv, err := s.listen()
	if err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	serveCtx, stopServing := context.WithCancel(context.Background())
	defer stopServing()
	g.Go(func() error { return srv.serve(serveCtx) })
	g.Go(func() error {
		defer stopServing()
		return s.pipelines(gctx)
	})
	g.Go(func() error { return s.watchFile(gctx) })
	return g.Wait()
}

// pipelines runs one pipeline after the other. A new one is needed where what is in memory has
// lost its ground: another timeline, or another holder.
func (s *sidecar) pipelines(ctx context.Context) error {
	for {
		s.mu.Lock()
		cfg := s.cfg
		s.mu.Unlock()
		p, err := newPipeline(cfg, s.once, s.databaseURL, s.tracing.tracer(), s.log)
		if err != nil {
			return err
		}
		p.reg.MustRegister(s.reloadFailed())
		if s.lines != nil {
			p.reg.MustRegister(s.lines.metric())
		}
		s.mu.Lock()
		s.now = p
		s.mu.Unlock()
		err = p.run(ctx)
		p.ended(err)
		if p.stream.Streamed() {
			s.once = cdc.RecoverAsk // an order is for what the start finds
		}
		switch {
		case errors.Is(err, cdc.ErrLost) && ctx.Err() == nil:
			s.log.Warn("starting again to recover", zap.Error(err))
			continue
		case ctx.Err() != nil && !errors.Is(err, cdc.ErrNewHistory) && !errors.Is(err, cdc.ErrTaken) && !errors.Is(err, outbox.ErrFenced):
			return err
		case ctx.Err() != nil:
			s.log.Warn("another instance has gone on before we had stopped", zap.Error(err))
			return nil
		case errors.Is(err, cdc.ErrNewHistory), errors.Is(err, cdc.ErrTaken), errors.Is(err, outbox.ErrFenced):
			s.log.Warn("starting again from the checkpoint", zap.Error(err))
		case err != nil:
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
	}
}

// databaseURL reads the configuration anew, so that a rotated password is taken up at the next
// connect; a file that is broken at the moment leaves the URL as it was.
func (s *sidecar) databaseURL(replication bool) (string, error) {
	s.mu.Lock()
	cfg := s.cfg
	s.mu.Unlock()
	if fresh, err := LoadConfig(cfg.Path, s.opts.env); err == nil {
		cfg = fresh
	}
	if replication {
		return cfg.Database.Replication().Reveal(), nil
	}
	return cfg.Database.URL.Reveal(), nil
}

// watchFile reloads the endpoints on SIGHUP and when the content of the file changes, or of one
// that it refers to: a secret, a certificate. What is broken is said once, and looked at again
// when it changes.
func (s *sidecar) watchFile(ctx context.Context) error {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	tick := time.NewTicker(fileLook)
	defer tick.Stop()
	s.mu.Lock()
	path, last := s.cfg.Path, s.cfg.inputs
	s.mu.Unlock()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hup:
		case <-tick.C:
			if !last.changed() {
				continue
			}
		}
		last = s.reload(ctx, path)
	}
}

// reload takes up the endpoints of the file, and tells which files it found.
func (s *sidecar) reload(ctx context.Context, path string) inputs {
	cfg, read, err := loadConfig(path, s.opts.env)
	s.refused.Store(err != nil)
	if err != nil {
		s.log.Error("the configuration is broken, the old one stays in force", zap.Error(err))
		return read
	}
	s.mu.Lock()
	old := s.cfg
	if needsRestart(old, cfg) {
		s.log.Warn("only endpoints are taken up while running; the other changes wait for a restart")
	}
	fresh := *old
	fresh.Defaults, fresh.Endpoints, fresh.inputs = cfg.Defaults, cfg.Endpoints, cfg.inputs
	s.cfg = &fresh
	p := s.now
	s.mu.Unlock()
	if p == nil {
		return read
	}
	if err := p.setEndpoints(ctx, cfg, cfg.Endpoints); err != nil {
		s.refused.Store(true)
		s.log.Error("the endpoints could not be taken up, the old ones stay in force", zap.Error(err))
		return read
	}
	s.log.Info("configuration reloaded", zap.Int("endpoints", len(cfg.Endpoints)))
	return read
}

// reloadFailed tells whether what the file says is in force.
func (s *sidecar) reloadFailed() prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "walhook_config_reload_failed",
		Help: "1 while the configuration file, or one that it refers to, is refused and the one before stays in force; the log says what is wrong. Worry at 1: a restart would fail.",
	}, func() float64 {
		if s.refused.Load() {
			return 1
		}
		return 0
	})
}

var password = regexp.MustCompile(`(://[^:/@]*):.*@|(?:^|[\s?&])password\s*=\s*('(?:[^'\\]|\\.)*'|[^\s&]*)`)

// needsRestart tells whether more has changed than is taken up while running: the endpoints, and
// the database's password.
func needsRestart(a, b *Config) bool {
	address := func(c *Config) string { return password.ReplaceAllString(c.Database.Replication().Reveal(), "$1") }
	return address(a) != address(b) || a.CDC != b.CDC || !slices.Equal(a.Outbox, b.Outbox) ||
		a.Buffer != b.Buffer || a.Server != b.Server || a.Metrics != b.Metrics || a.Log != b.Log
}

// pipeline is everything between the slot and the endpoints, with metrics of its own.
type pipeline struct {
	log    *zap.Logger
	reg    *prometheus.Registry
	store  *store.Store
	client *sender.Client
	relay  *outbox.Relay
	stream *cdc.Stream
	claims *claims

	nudged chan struct{} // holds one while a command wants us to look

	mu        sync.Mutex            // guards what follows
	preparing error                 // why the stream has not started yet
	cfg       *Config               // whose defaults endpoints of the table stand on
	states    []store.EndpointState // that are in force
	endpoints []*outbox.Endpoint
}

func newPipeline(cfg *Config, once cdc.Recovery, url func(replication bool) (string, error), tracer trace.Tracer, log *zap.Logger) (*pipeline, error) {
	p := &pipeline{log: log, reg: prometheus.NewRegistry(), cfg: cfg, endpoints: cfg.Endpoints, nudged: make(chan struct{}, 1)}
	mapper, err := outbox.NewMapper(cfg.Outbox)
	if err != nil {
		return nil, failed{err, exitUsage}
	}
	p.store, err = store.Open(context.Background(), store.Config{
		URL:  func() (string, error) { return url(false) },
		Slot: cfg.CDC.Slot, Instance: cfg.CDC.Instance, Logger: log,
	})
	if err != nil {
		return nil, failed{err, exitUsage}
	}
	room := hostLimits()
	labels := outbox.NewLabels(cfg.Metrics.MaxEndpoints)
	p.client, err = sender.New(sender.Config{
		Logger: log, Version: version, Registerer: p.reg, Labels: labels, Tracer: tracer, MaxAttempts: room.attempts, MaxIdleConns: room.idle,
		Source: eventSource(cfg),
		OnStateChange: func(id string, from, to sender.State) { // a probe that fails is no news
			if from == sender.Closed || to == sender.Closed {
				p.relay.CircuitMoved(id, to == sender.Open)
			}
		},
	})
	if err != nil {
		return nil, err
	}
	p.claims = &claims{store: p.store, gave: func(st store.EndpointState) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.states = append(slices.Clone(p.states), st)
	}}
	p.relay, err = outbox.New(outbox.Config{
		Mapper: mapper, Store: p.store, Claims: p.claims, Sender: p.client, Endpoints: cfg.Endpoints,
		MaxEvents: cfg.Buffer.Events, MaxBytes: cfg.Buffer.Bytes, SpillAfter: cfg.Buffer.SpillAfter,
		Logger: log, Registerer: p.reg, Labels: labels,
		Roll: p.store, Register: func(g outbox.Registration) (*outbox.Endpoint, error) { return parseRegistered(p.config(), g) },
	})
	if err != nil {
		return nil, failed{err, exitUsage}
	}
	stream := streamConfig(cfg, func() (string, error) { return url(true) }, log)
	stream.Once = once
	stream.Channel, stream.Notified = store.Channel, p.notified
	p.stream = cdc.New(stream, p.relay, p.claims)
	p.export()
	return p, nil
}

// eventSource is where events come from, as CloudEvents calls it.
func eventSource(cfg *Config) string { return "/walhook/" + cfg.CDC.Instance + "/" + cfg.CDC.Slot }

// streamConfig is the part of the configuration that the stream reads.
func streamConfig(cfg *Config, url func() (string, error), log *zap.Logger) cdc.Config {
	c := cdc.Config{
		URL:         url,
		Slot:        cfg.CDC.Slot,
		Publication: cfg.CDC.Publication,
		Create:      cfg.CDC.Create,
		Failover:    cfg.CDC.Failover == "auto",
		Snapshot:    cfg.CDC.Snapshot == "initial",
		MaxRecovery: cfg.CDC.MaxRecovery,
		MaxStall:    cfg.Buffer.SpillAfter,
		Notices:     true,
		Mirror:      cdc.Mirror{Table: store.RegistryTable, Publication: registryPublication(cfg.CDC.Publication)},
		Logger:      log,
	}
	if cfg.CDC.Recover == "auto" {
		c.Recover = cdc.RecoverMissed
	}
	for _, src := range cfg.Outbox {
		if src.Messages != "" {
			c.Messages = true
			continue
		}
		schema, name, _ := outbox.ParseTable(src.Table) // the loader has parsed it before
		c.Tables = append(c.Tables, cdc.Table{Schema: schema, Name: name})
	}
	return c
}

// run prepares the schema and relays until ctx ends.
func (p *pipeline) run(ctx context.Context) error {
	if !p.prepare(ctx) {
		return nil
	}
	if err := p.setEndpoints(ctx, p.config(), p.fileEndpoints()); err != nil {
		return err
	}
	listening, stop := context.WithCancel(ctx)
	var listener sync.WaitGroup
	listener.Go(func() { p.listen(listening) })
	err := p.relay.Run(ctx, p.stream, gracePeriod)
	stop()
	listener.Wait()
	var fault *cdc.Fault
	if errors.As(err, &fault) && fault.Config {
		return failed{err, exitUsage}
	}
	return err
}

const remedyNewerSchema = "run the newer walhook that migrated it"

// prepare migrates the schema walhook, waiting for whatever can be mended outside. It tells
// false where ctx ended first.
func (p *pipeline) prepare(ctx context.Context) bool {
	wait := 100 * time.Millisecond
	said := ""
	for {
		err := p.store.Migrate(ctx)
		if errors.Is(err, store.ErrNewerSchema) {
			err = &cdc.Fault{State: cdc.Waiting, Reason: err.Error(), Remedy: remedyNewerSchema}
		}
		p.mu.Lock()
		p.preparing = err
		p.mu.Unlock()
		if err == nil {
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		f := cdc.FaultOf(err)
		if f.Reason != said {
			said = f.Reason
			p.log.Error("waiting: "+f.Reason, zap.Error(f.Err), zap.String("remedy", f.Remedy))
		}
		t := time.NewTimer(time.Duration(float64(wait) * (0.8 + 0.4*rand.Float64())))
		select {
		case <-ctx.Done():
			t.Stop()
			return false
		case <-t.C:
		}
		wait = min(2*wait, 5*time.Second)
	}
}

func (p *pipeline) config() *Config {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cfg
}

func (p *pipeline) fileEndpoints() []*outbox.Endpoint {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.endpoints
}

// notified hears that a command may have changed something.
func (p *pipeline) notified() {
	select {
	case p.nudged <- struct{}{}:
	default:
	}
}

// listen takes up what commands have changed: statuses of endpoints of the file, and deliveries.
func (p *pipeline) listen(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.nudged:
		}
		p.relay.RecountSoon()
		states, err := p.store.LoadEndpointStates(ctx)
		p.mu.Lock()
		before := p.states
		p.mu.Unlock()
		if err != nil || slices.Equal(states, before) {
			continue
		}
		for _, was := range before {
			if !slices.ContainsFunc(states, func(s store.EndpointState) bool { return s.EndpointID == was.EndpointID }) {
				p.log.Info("endpoint is enabled again", zap.String("endpoint", was.EndpointID))
			}
		}
		if err := p.setEndpoints(ctx, p.config(), p.fileEndpoints()); err != nil {
			p.log.Error("the statuses of endpoints could not be taken up", zap.Error(err))
		}
	}
}

// setEndpoints takes up the endpoints of the file, with the statuses that we gave them ourselves.
func (p *pipeline) setEndpoints(ctx context.Context, cfg *Config, eps []*outbox.Endpoint) error {
	p.mu.Lock()
	p.cfg, p.endpoints = cfg, eps
	waiting := p.preparing
	p.mu.Unlock()
	if waiting != nil {
		return nil // run takes them up when the schema is there
	}
	states, err := p.store.LoadEndpointStates(ctx)
	if err != nil {
		p.log.Warn("the statuses of endpoints cannot be read", zap.Error(err))
	} else {
		p.mu.Lock()
		p.states = states
		p.mu.Unlock()
	}
	out := make([]*outbox.Endpoint, len(eps))
	for i, ep := range eps {
		out[i] = ep
		for _, st := range states {
			if st.EndpointID == ep.ID && st.Status != ep.Status {
				changed := *ep
				changed.Status = st.Status
				out[i] = &changed
				p.log.Warn("endpoint is "+string(st.Status), zap.String("endpoint", ep.ID), zap.String("reason", st.Reason), zap.Time("since", st.Since))
			}
		}
	}
	return p.relay.SetEndpoints(out)
}

// ended leaves what /readyz says until the next pipeline: nobody here holds the slot.
func (p *pipeline) ended(why error) {
	f := &cdc.Fault{State: cdc.Connecting, Reason: "stopped", Err: why}
	if why != nil {
		f.Reason = "starting again"
	}
	p.mu.Lock()
	p.preparing = f
	p.mu.Unlock()
	p.close()
}

func (p *pipeline) close() {
	p.client.Close()
	p.store.Close()
}

// export registers the metrics that belong to no package alone.
func (p *pipeline) export() {
	gauge := func(name, help string, f func() float64) {
		p.reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f))
	}
	gauge("walhook_buffer_events", "Events in memory. Worry when it stays at buffer.events.", func() float64 {
		n, _ := p.relay.Buffer()
		return float64(n)
	})
	gauge("walhook_buffer_bytes", "Bytes of events in memory. Worry when it stays at buffer.bytes.", func() float64 {
		_, n := p.relay.Buffer()
		return float64(n)
	})
	gauge("walhook_watermark_lag_bytes", "WAL received that is not settled. Worry when it only grows.", func() float64 {
		return float64(p.lag())
	})
	gauge("walhook_watermark_stuck_seconds", "For how long the slot has been kept from moving: since then the oldest row is owed, or the checkpoint cannot be written. Worry when it stays above buffer.spill_after: the schema walhook cannot be written, and the slot keeps WAL.", func() float64 {
		return p.relay.Stuck().Seconds()
	})
	gauge("walhook_clock_ahead_seconds", "How far the server's clock is ahead of this machine's, looked at every 30 s. Worry beyond 30 s either way: receivers refuse timestamps that are 5 minutes off.", func() float64 {
		if sv := p.stream.Status().Survey; sv != nil {
			return sv.Clock.Seconds()
		}
		return 0
	})
	gauge("walhook_slot_retained_bytes", "WAL that the server keeps for the slot, looked at every 30 s. Worry when it nears max_slot_wal_keep_size or the free disk.", func() float64 {
		if sv := p.stream.Status().Survey; sv != nil && sv.Slot != nil {
			return float64(sv.Slot.Retained)
		}
		return 0
	})
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "walhook_build_info", Help: "Always 1; its labels say which walhook this is. Worry when instances differ for longer than an upgrade takes.",
		ConstLabels: prometheus.Labels{"version": version, "commit": commitID, "go_version": runtime.Version()},
	})
	build.Set(1)
	gauge("walhook_slot_keep_limit_bytes", "The server's max_slot_wal_keep_size, beyond which the slot is lost; -1 is no limit. Worry at no limit: a slot that nobody reads fills the disk.", func() float64 {
		if sv := p.stream.Status().Survey; sv != nil && sv.KeepSize >= 0 {
			return float64(sv.KeepSize << 20)
		}
		return -1
	})
	p.reg.MustRegister(build, &walStatus{p.stream}, &streamState{p}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
}

// lag is how far the watermark is behind what was received, in bytes of WAL.
func (p *pipeline) lag() int64 {
	received, low := p.stream.Received(), p.relay.Low().LSN
	if received <= low || low == 0 {
		return 0
	}
	return int64(received - low)
}

// walStatus is 1 for the present wal_status of the slot.
type walStatus struct{ stream *cdc.Stream }

var walStatusDesc = prometheus.NewDesc("walhook_slot_wal_status", "1 for the slot's wal_status, looked at every 30 s. Worry at anything but reserved.", []string{"status"}, nil)

func (w *walStatus) Describe(ch chan<- *prometheus.Desc) { ch <- walStatusDesc }

func (w *walStatus) Collect(ch chan<- prometheus.Metric) {
	present := ""
	if sv := w.stream.Status().Survey; sv != nil && sv.Slot != nil {
		present = sv.Slot.WALStatus
	}
	collectOne(ch, walStatusDesc, present, []string{"reserved", "extended", "unreserved", "lost"})
}

// collectOne is a series for each label, 1 for the present one.
func collectOne[T ~string](ch chan<- prometheus.Metric, desc *prometheus.Desc, present T, all []T) {
	for _, label := range all {
		v := 0.0
		if label == present {
			v = 1
		}
		ch <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, v, string(label))
	}
}

// streamState is 1 for the present state of the stream.
type streamState struct{ of *pipeline }

var streamStateDesc = prometheus.NewDesc("walhook_stream_state", "1 for the present state of the stream, as /readyz tells it. Worry at anything but streaming and standby that lasts; at lost, events may have been missed.", []string{"state"}, nil)

func (s *streamState) Describe(ch chan<- *prometheus.Desc) { ch <- streamStateDesc }

func (s *streamState) Collect(ch chan<- prometheus.Metric) {
	s.of.mu.Lock()
	preparing := s.of.preparing
	s.of.mu.Unlock()
	present := s.of.stream.Status().State
	if preparing != nil { // the stream has not begun
		present = cdc.FaultOf(preparing).State
	}
	collectOne(ch, streamStateDesc, present, []cdc.State{cdc.Connecting, cdc.Streaming, cdc.Standby, cdc.Waiting, cdc.Recovering, cdc.Lost})
}

// claims gives the stream and the relay the record of who holds the slot and how far it is settled.
type claims struct {
	store *store.Store
	gave  func(store.EndpointState) // hears of statuses that we gave

	mu    sync.Mutex // guards epoch
	epoch int64      // of our last claim; zero before the first
}

// Read is the record as the stream needs it.
func (c *claims) Read(ctx context.Context, systemID string) (*cdc.Record, error) {
	saved, ok, err := c.store.Checkpoint(ctx, systemID)
	if err != nil || !ok {
		return nil, copyFault(err)
	}
	return &cdc.Record{LSN: saved.LSN, Xmin: saved.SnapXmin, Proven: saved.ProvenXmin, Gap: saved.Gap, Tables: saved.Tables, Mirrored: saved.Registry}, nil
}

func (c *claims) Announce(ctx context.Context, s cdc.Session) error {
	return copyFault(c.store.Announce(ctx, holder(s)))
}

// Mark fails as Claim does where somebody else held the slot since our last claim.
func (c *claims) Mark(ctx context.Context, gap string) error {
	err := c.store.SaveGap(ctx, gap)
	if errors.Is(err, outbox.ErrFenced) {
		return cdc.Halt(outbox.ErrFenced)
	}
	return err
}

func (c *claims) Proven(asOf time.Time) { c.store.Proven(asOf) }

// Claim fails with ErrFenced where somebody else held the slot since our last claim: what is in
// memory may have been sent by them.
func (c *claims) Claim(ctx context.Context, s cdc.Session) (outbox.Checkpoint, bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	claimed, err := c.store.Claim(ctx, holder(s))
	if err != nil {
		return outbox.Checkpoint{}, false, copyFault(err)
	}
	if c.epoch != 0 && claimed.Epoch != c.epoch {
		return outbox.Checkpoint{}, false, outbox.ErrFenced
	}
	c.epoch = claimed.Epoch
	return claimed.Checkpoint, claimed.First, nil
}

func (c *claims) Fill(ctx context.Context, s cdc.Session, xmin uint64) (outbox.Filling, error) {
	f, err := c.store.Fill(ctx, holder(s), xmin)
	if err != nil {
		return nil, copyFault(err)
	}
	return f, nil
}

func holder(s cdc.Session) store.Holder {
	return store.Holder{SystemIdentifier: s.SystemID, At: s.Slot.Confirmed, Tables: s.Tables, Xmin: s.Xmin}
}

// copyFault says what a copy of a database is to wait for.
func copyFault(err error) error {
	var copied *store.CopyError
	if !errors.As(err, &copied) {
		return err
	}
	return &cdc.Fault{
		State:  cdc.Waiting,
		Reason: "this database is a copy, or was restored: nothing is sent until it is adopted",
		Err:    err,
		Remedy: copied.AdoptSQL(),
	}
}

func (c *claims) Emit(ctx context.Context, notices [][]byte) error { return c.store.Emit(ctx, notices) }

func (c *claims) Alone(ctx context.Context) (bool, error) { return c.store.Alone(ctx) }

func (c *claims) SetStatus(ctx context.Context, endpointID string, status outbox.Status, reason string) error {
	st := store.EndpointState{EndpointID: endpointID, Status: status, Reason: reason, Since: time.Now()}
	if err := c.store.SaveEndpointState(ctx, st); err != nil {
		return err
	}
	c.gave(st)
	return nil
}
