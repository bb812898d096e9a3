package outbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/walhook/walhook/cdc"
)

// Stream is the stream of rows as the relay steers it.
type Stream interface {
	// Run hands rows to the relay until ctx ends.
	Run(ctx context.Context) error
	// Drain stops handing rows on, but keeps the connection.
	Drain()
	// Confirm lets the server forget what lies below at, once the stream has passed proof.
	Confirm(at, proof cdc.LSN)
	// Confirmed waits until the server shows what was last confirmed.
	Confirmed(ctx context.Context) error
	// Lag asks the server how far it is ahead, and how much more it may write.
	Lag(ctx context.Context) (cdc.Lag, error)
}

// Claims is the record of who holds the slot and how far it is settled.
type Claims interface {
	// Claim makes us the holder and returns the record; first tells that there was none.
	Claim(ctx context.Context, s cdc.Session) (c Checkpoint, first bool, err error)
	// Fill begins to park rows for a new slot.
	Fill(ctx context.Context, s cdc.Session, xmin uint64) (Filling, error)
	// Alone tells whether no other slot has a record in this schema: what is parked for an endpoint
	// that we do not know could be another walhook's.
	Alone(ctx context.Context) (bool, error)
	// SetStatus keeps the status that we gave an endpoint through restarts.
	SetStatus(ctx context.Context, endpointID string, status Status, reason string) error
	// Emit writes notices into the WAL, as logical messages with NoticePrefix.
	Emit(ctx context.Context, notices [][]byte) error
}

// Config is what a Relay needs.
type Config struct {
	Mapper     *Mapper
	Store      Store
	Claims     Claims
	Sender     Sender
	Endpoints  []*Endpoint   // of the file
	MaxEvents  int           // in memory
	MaxBytes   int64         // in memory
	SpillAfter time.Duration // how long a delivery may hold the watermark
	Logger     *zap.Logger
	Registerer prometheus.Registerer
	Labels     *Labels // of endpoints in metrics

	// Roll keeps the endpoints that an app registers; nil: there are none. Register makes an
	// endpoint of a row; its error tells whoever wrote the row what is wrong with it.
	Roll     Roll
	Register func(Registration) (*Endpoint, error)
}

const (
	// lease is how long we may send without having heard from Postgres. Another instance may have
	// the slot after that.
	lease = 15 * time.Second

	checkpointEvery = time.Second
	// Less WAL than this behind the last checkpoint is our own, or the server's own, and no reason
	// for another one: while nothing happens, nothing is written.
	quietBytes = 8 << 10

	recountEvery   = 30 * time.Second
	overflowAfter  = 16 << 20 // bytes by which the WAL may grow while the buffer is full
	overflowBehind = 64 << 20 // bytes of WAL not yet received, from which on growth is too much
	overflowGrowth = 1 << 20  // bytes in a second: less is our own checkpoints', and the server's
	overflowLook   = 100 * time.Millisecond
	heldBytes      = 8 << 20 // of WAL: from here on it is worth asking whether the slot is safe
	maxRoutes      = 10_000
	maxTold        = 1_000
	buryAgain      = 5 * time.Second
)

// Relay takes rows from the stream, maps them to events, and gives each to the lanes of the
// endpoints that want it. It is the cdc.Sink of the stream.
type Relay struct {
	cfg     Config
	log     *zap.Logger
	metrics *metrics
	ledger  *Ledger
	journal *journal
	clerk   *clerk // nil without a Roll
	herald  *herald
	store   Store
	sender  Sender

	sendCtx  context.Context // of all attempts and loads; ends when the grace period does
	stopSend context.CancelFunc
	crew     *crew

	heard  atomic.Pointer[time.Time] // when Postgres was last heard of
	lapsed atomic.Bool               // a lane waits for the lease, or for the stream, and is to be woken
	eager  atomic.Bool               // some endpoint wants notices
	caught atomic.Bool               // the stream has come to where the WAL ended when we took the slot
	counts chan struct{}             // holds one while a recount is wanted before its time
	aside  sync.WaitGroup            // endpoints being disabled or removed
	paces  paces

	lingering lingering

	unsaved atomic.Pointer[unsaved] // why the watermark cannot be written down; nil while it can

	foreign bool // the registry is another slot's; the stream's goroutine alone looks

	changing sync.Mutex             // one change of the endpoints at a time; guards the next two
	file     []*Endpoint            // of the file
	table    map[string]*registered // of the registry, by id

	mu       sync.Mutex    // guards what follows
	stopping bool          // nothing is sent for the first time any more
	saver    *checkpointer // of Run
	registry *Registry
	lanes    map[string]*Lane
	retired  map[*Lane]bool           // of endpoints that were struck out; they may send what they have
	burying  map[string]bool          // of leaving, those whose parked deliveries are to be dead
	leaving  map[string]chan struct{} // endpoints that are gone, until what was parked for them is dead
	routes   map[route][]*Lane
	claimed  bool
	opened   bool               // the lanes know what the store holds
	backlog  map[string]Backlog // of lanes that do not exist yet
	told     map[string]bool    // types that were said to be unwanted
}

type route struct{ tenant, eventType string }

// New makes a Relay that has not started.
func New(cfg Config) (*Relay, error) {
	reg, err := NewRegistry(cfg.Endpoints)
	if err != nil {
		return nil, err
	}
	r := &Relay{
		cfg: cfg, log: cfg.Logger.Named("outbox"),
		metrics:  newMetrics(cfg.Registerer, cfg.Labels),
		ledger:   NewLedger(cfg.MaxEvents, cfg.MaxBytes),
		store:    cfg.Store,
		sender:   cfg.Sender,
		registry: reg,
		file:     cfg.Endpoints,
		lanes:    map[string]*Lane{},
		retired:  map[*Lane]bool{},
		leaving:  map[string]chan struct{}{},
		burying:  map[string]bool{},
		routes:   map[route][]*Lane{},
		told:     map[string]bool{},
		counts:   make(chan struct{}, 1),
	}
	r.journal = newJournal(cfg.Store, r.log, cfg.MaxEvents, cfg.MaxBytes)
	r.herald = &herald{emit: cfg.Claims.Emit, log: r.log, signal: make(chan struct{}, 1)}
	r.eager.Store(reg.own > 0)
	for _, ep := range cfg.Endpoints {
		r.cfg.Labels.Of(ep.ID)
	}
	if cfg.Roll != nil {
		r.clerk = newClerk(cfg.Roll, r.log)
	}
	r.sendCtx, r.stopSend = context.WithCancel(context.Background())
	r.crew = newCrew(r.sendCtx)
	r.journal.lull = r.crew.nextLull
	return r, nil
}

// Run relays until ctx ends, then stops in order within grace: intake first, then what is in
// flight; what waits is parked, and what was settled is confirmed, so that the next start
// repeats nothing. It returns an error where it could not go on.
func (r *Relay) Run(ctx context.Context, src Stream, grace time.Duration) error {
	work, stopWork := context.WithCancel(context.Background())
	defer stopWork()
	defer r.stopSend()
	c := &checkpointer{r: r, src: src, turn: make(chan struct{}, 1)}
	c.turn <- struct{}{}
	r.mu.Lock()
	r.saver = c
	r.mu.Unlock()
	g, work := errgroup.WithContext(work)
	lost := make(chan error, 1)
	g.Go(func() error {
		err := src.Run(work)
		if errors.Is(err, cdc.ErrLost) { // what came before it is still good
			lost <- err
			return nil
		}
		return err
	})
	g.Go(func() error { return r.journal.run(work) })
	if r.clerk != nil {
		g.Go(func() error { return r.clerk.run(work) })
	}
	g.Go(func() error { return r.herald.run(work) })
	g.Go(func() error { return r.tick(work, c) })
	g.Go(func() error { return r.look(work, src) })
	var missed error
	select {
	case missed = <-lost:
		r.stop(work, src, c, grace)
		stopWork()
	case <-ctx.Done():
		r.stop(work, src, c, grace)
		stopWork()
	case <-work.Done():
		r.closeLanes()
		r.stopSend()
		r.waitLanes(context.Background())
	}
	err := g.Wait()
	if missed != nil && (err == nil || errors.Is(err, context.Canceled)) {
		return missed
	}
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		return nil
	}
	return err
}

// stop ends the work in order. work outlives it.
func (r *Relay) stop(work context.Context, src Stream, c *checkpointer, grace time.Duration) {
	r.log.Info("stopping", zap.Duration("grace", grace))
	deadline, cancel := context.WithTimeout(work, grace)
	defer cancel()
	src.Drain()
	r.closeLanes()
	// Where the stream is down, another instance may take the slot before we are through.
	if err := c.save(deadline, true); err != nil {
		r.log.Warn("another instance has taken the slot", zap.Error(err))
	}
	r.waitLanes(deadline)
	r.stopSend() // attempts that are still in flight are cut short and parked
	r.waitLanes(work)

	last, cancelLast := context.WithTimeout(work, 5*time.Second)
	defer cancelLast()
	r.mu.Lock()
	claimed := r.claimed
	r.mu.Unlock()
	if !claimed {
		return
	}
	if err := r.journal.flush(last); err != nil {
		r.log.Error("not everything could be parked: some events will come again", zap.Error(r.journal.err()))
	}
	if r.clerk != nil {
		if err := r.clerk.flush(last); err != nil {
			r.log.Error("not every change of the registry could be written down: it will come again", zap.Error(err))
		}
	}
	if err := c.end(last); err != nil {
		r.log.Error("the last checkpoint could not be written: some events will come again", zap.Error(err))
		return
	}
	seen, cancelSeen := context.WithTimeout(last, 2*time.Second)
	defer cancelSeen()
	if err := src.Confirmed(seen); err != nil {
		r.log.Debug("the slot was not seen to move; the checkpoint has it", zap.Error(err))
	}
	r.log.Info("stopped", zap.Stringer("lsn", r.ledger.Low().LSN))
}

func (r *Relay) closeLanes() {
	r.mu.Lock()
	r.stopping = true
	r.mu.Unlock()
	for _, l := range r.allLanes() {
		l.close()
	}
}

// waitLanes waits until nothing is in flight, or until ctx ends.
func (r *Relay) waitLanes(ctx context.Context) {
	done := make(chan struct{})
	lanes := r.allLanes()
	go func() {
		defer close(done)
		for _, l := range lanes {
			l.workers.Wait()
		}
		r.aside.Wait()
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

func (r *Relay) allLanes() []*Lane {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]*Lane, 0, len(r.lanes))
	for _, l := range r.lanes {
		out = append(out, l)
	}
	for l := range r.retired {
		out = append(out, l)
	}
	return out
}

// tick does what time asks for: spilling and checkpoints.
func (r *Relay) tick(ctx context.Context, c *checkpointer) error {
	every := max(r.cfg.SpillAfter/10, 10*time.Millisecond)
	spill := time.NewTicker(every)
	defer spill.Stop()
	save := time.NewTicker(checkpointEvery)
	defer save.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-spill.C:
			r.spill()
			r.wakeLapsed()
		case <-save.C:
			if err := c.save(ctx, false); err != nil {
				return err
			}
		}
	}
}

// look asks the database, now and then, what tick must not wait for: how much WAL piles up, and
// what is parked.
func (r *Relay) look(ctx context.Context, src Stream) error {
	every := time.NewTicker(overflowLook)
	defer every.Stop()
	recount := time.NewTicker(recountEvery)
	defer recount.Stop()
	w := overflow{r: r, src: src}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-every.C:
			w.look(ctx)
		case <-recount.C:
			r.recount(ctx)
		case <-r.counts:
			r.recount(ctx)
		}
	}
}

// spill parks what has held the watermark for too long. While the buffer is full and stays
// full it is not as patient, unless the machine is the limit: to write all that down would make it slower yet.
func (r *Relay) spill() {
	strained := r.ledger.Adapt(r.cfg.SpillAfter, time.Now())
	oldest := r.ledger.Oldest()
	if oldest.IsZero() {
		return
	}
	now := time.Now()
	patience := r.cfg.SpillAfter
	if full := r.ledger.FullSince(); !strained && !full.IsZero() && now.Sub(full) > patience/4 {
		patience /= 4
	}
	if before := now.Add(-patience); oldest.Before(before) {
		for _, l := range r.allLanes() {
			l.spill(before)
		}
	}
}

// overflow watches the WAL that the server keeps for us. While the machine is the limit it is
// right to read no faster than we send; where the endpoints are, the WAL would pile up, and their
// deliveries have to go the slow way. So they have where the slot nears what the server will keep for it.
type overflow struct {
	r     *Relay
	src   Stream
	next  time.Time
	full  int // looks at a full buffer since next was set
	looks int
	least int64 // of the lag since the buffer filled up
	last  int64 // lag at the look before
	grew  int   // looks in a row at which the lag had grown
	armed bool
	short bool // the slot is near its limit, and the log says so
}

func (o *overflow) look(ctx context.Context) {
	now := time.Now()
	if o.next.IsZero() {
		o.next = now.Add(time.Second)
	}
	o.looks++
	if !o.r.ledger.FullSince().IsZero() {
		o.full++
	}
	if now.Before(o.next) {
		return
	}
	busy := o.full*2 > o.looks
	o.next, o.full, o.looks = now.Add(time.Second), 0, 0
	if !busy {
		o.armed, o.grew = false, 0
	}
	if !busy && !o.short && o.r.ledger.Opened().LSN < o.r.ledger.Low().LSN+heldBytes {
		return
	}
	ask, cancel := context.WithTimeout(ctx, 10*time.Second)
	lag, err := o.src.Lag(ask)
	cancel()
	if err != nil {
		return
	}
	short := lag.Limit > 0 && lag.Safe < lag.Limit/2
	if short != o.short {
		if o.short = short; short {
			o.r.log.Warn("the slot nears max_slot_wal_keep_size: everything in memory is parked, so that it can move",
				zap.Int64("safe_wal_bytes", lag.Safe), zap.Int64("max_slot_wal_keep_bytes", lag.Limit))
		} else {
			o.r.log.Info("the slot is far from max_slot_wal_keep_size again", zap.Int64("safe_wal_bytes", lag.Safe))
		}
	}
	if short {
		for _, l := range o.r.allLanes() {
			l.overflow()
			l.spill(now)
		}
		return
	}
	if !busy {
		return
	}
	if o.grew++; !o.armed || lag.Behind < o.last+overflowGrowth {
		o.grew = 0
	}
	o.last = lag.Behind
	if !o.armed || lag.Behind < o.least {
		o.armed, o.least = true, lag.Behind
		return
	}
	after, much := int64(overflowAfter), int64(overflowBehind)
	if lag.Limit > 0 {
		after, much = min(after, lag.Limit/4), min(much, lag.Limit/4)
	}
	// Where it is much already, two seconds in a row tell enough: a process that is often ended would
	// never see it grow by more.
	if lag.Behind > o.least+after || lag.Behind > much && o.grew >= 2 {
		o.r.log.Warn("the WAL grows faster than the endpoints take events: their deliveries go through walhook.deliveries", zap.Int64("lag_bytes", lag.Behind))
		for _, l := range o.r.allLanes() {
			l.overflow()
		}
		o.armed, o.grew = false, 0
	}
}

// checkpointer writes the watermark down, at most once a second and not at all while nothing
// happens.
type checkpointer struct {
	r   *Relay
	src Stream

	turn  chan struct{} // holds one: whoever took it may use what follows
	ended bool          // the last one is written
	saved Checkpoint
	proof cdc.LSN // behind the commit that saved it
	first cdc.LSN // proof of the first: the WAL ended below when we took the slot
	busy  bool    // there was more to save than our own writes; the next save takes up the tail
}

// unsaved is a watermark that the slot cannot follow, because it is not written down.
type unsaved struct {
	since time.Time
	err   error // of the latest write
}

// save writes the watermark where there is reason to; where all is set, also for less.
func (c *checkpointer) save(ctx context.Context, all bool) error {
	<-c.turn
	defer func() { c.turn <- struct{}{} }()
	r := c.r
	r.mu.Lock()
	claimed := r.claimed
	r.mu.Unlock()
	if !claimed || c.ended {
		return nil
	}
	if c.first != 0 && !r.caught.Load() && r.ledger.Opened().LSN >= c.first {
		r.caught.Store(true)
		r.rouse()
	}
	low := r.ledger.Low()
	if low == c.saved || low.LSN == 0 {
		return nil
	}
	busy := low.Position != c.saved.Position || low.LSN > c.proof+quietBytes
	failing := r.unsaved.Load()
	if !busy && !c.busy && !all && failing == nil {
		return nil
	}
	began := time.Now()
	if err := c.write(ctx, low); err != nil {
		if errors.Is(err, ErrFenced) {
			return err
		}
		if ctx.Err() != nil {
			return nil
		}
		now := &unsaved{since: began, err: err}
		if failing != nil {
			now.since = failing.since
		} else {
			r.log.Warn("the checkpoint cannot be written, the slot stays where it is", zap.Error(err))
		}
		r.unsaved.Store(now)
		return nil
	}
	if failing != nil {
		r.unsaved.Store(nil)
		r.log.Info("the checkpoint can be written again")
	}
	c.busy = busy
	return nil
}

func (c *checkpointer) write(ctx context.Context, low Checkpoint) error {
	save, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	proof, err := c.r.store.SaveCheckpoint(save, low)
	if err != nil {
		return err
	}
	c.saved, c.proof = low, proof
	if c.first == 0 {
		c.first = proof
	}
	c.src.Confirm(low.LSN, proof)
	return nil
}

// end writes the last checkpoint; none comes behind it.
func (c *checkpointer) end(ctx context.Context) error {
	<-c.turn
	defer func() { c.turn <- struct{}{} }()
	c.ended = true
	return c.write(ctx, c.r.ledger.Low())
}

// Leave writes down what is settled, because the slot is about to be let go.
func (r *Relay) Leave(ctx context.Context) {
	r.mu.Lock()
	c := r.saver
	r.mu.Unlock()
	if c == nil {
		return
	}
	if err := c.save(ctx, true); err != nil {
		r.log.Warn("another instance has taken the slot", zap.Error(err))
	}
}

// RecountSoon has the lanes look soon at what the store holds, because somebody else has changed it.
// They do so by themselves within 30 s.
func (r *Relay) RecountSoon() {
	select {
	case r.counts <- struct{}{}:
	default:
	}
}

// recount compares what the lanes know with what the store holds.
func (r *Relay) recount(ctx context.Context) {
	r.mu.Lock()
	opened := r.opened
	r.mu.Unlock()
	if !opened {
		return
	}
	read, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for _, l := range r.allLanes() {
		l.counting()
	}
	backlogs, err := r.store.Backlogs(read)
	if err != nil {
		return
	}
	byID := map[string]Backlog{}
	for _, b := range backlogs {
		byID[b.EndpointID] = b
		if b.Parked > 0 && b.EndpointID != "" {
			r.laneByID(b.EndpointID)
		}
	}
	for _, l := range r.allLanes() {
		l.recount(byID[l.id])
	}
	r.metrics.unmapped(byID[""].Dead)
	r.showOldest(backlogs)
	if r.clerk != nil {
		r.clerk.prune(read)
	}
}

// showOldest shows how long deliveries of our endpoints have been parked.
func (r *Relay) showOldest(backlogs []Backlog) {
	since := map[string]time.Time{}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, b := range backlogs {
		if b.Oldest.IsZero() || r.registry.Endpoint(b.EndpointID) == nil {
			continue
		}
		label, _ := r.cfg.Labels.Of(b.EndpointID)
		if at, known := since[label]; !known || b.Oldest.Before(at) {
			since[label] = b.Oldest
		}
	}
	r.metrics.oldest.since.Store(&since)
}

// leased tells whether Postgres was heard of lately enough to send anything.
func (r *Relay) leased() bool {
	if heard := r.heard.Load(); heard != nil {
		// The monotonic clock stands still while the machine sleeps, the other one can be set back.
		now := time.Now()
		if max(now.Sub(*heard), now.Round(0).Sub(heard.Round(0))) < lease {
			return true
		}
	}
	r.lapsed.Store(true)
	return false
}

// rouse wakes the lanes at the next tick, while the lease holds.
func (r *Relay) rouse() { r.lapsed.Store(true) }

// reach is how far the stream has come. What a crash left in the store may be ahead of it, and
// of older rows of its key that were in memory and come again: it waits for them.
type reach struct {
	all bool
	at  Checkpoint
}

func (r reach) has(p cdc.Position) bool {
	return r.all || p.Commit < r.at.LSN || p.Compare(r.at.Position) <= 0
}

func (r *Relay) reached() reach {
	if r.caught.Load() {
		return reach{all: true}
	}
	return reach{at: r.ledger.Opened()}
}

func (r *Relay) wakeLapsed() {
	if r.lapsed.Load() && r.leased() {
		r.lapsed.Store(false)
		for _, l := range r.allLanes() {
			l.kick()
		}
	}
}

// disable stops an endpoint that must not be called again. What is parked for it stays. It is
// called from an attempt that has not ended yet.
func (r *Relay) disable(ep *Endpoint, why string) {
	r.aside.Go(func() {
		r.log.Warn("endpoint disabled", zap.String("endpoint", ep.ID), zap.String("reason", why))
		r.herald.tell(r.noticeOf(TypeDisabled, ep.ID, ep.Tenant, endpointNotice{ep.ID, why}))
		if ep.Origin == FromTable {
			r.disableRegistered(ep, why)
			return
		}
		ctx, cancel := context.WithTimeout(r.sendCtx, 10*time.Second)
		defer cancel()
		if err := r.cfg.Claims.SetStatus(ctx, ep.ID, Disabled, why); err != nil {
			r.log.Error("the endpoint's status could not be written: it is disabled until the restart", zap.String("endpoint", ep.ID), zap.Error(err))
		}
		r.changing.Lock()
		defer r.changing.Unlock()
		eps := slices.Clone(r.file)
		for i, e := range eps {
			if e.ID == ep.ID {
				off := *e
				off.Status = Disabled
				eps[i] = &off
			}
		}
		if err := r.install(eps); err != nil {
			r.log.Error("the endpoint could not be disabled", zap.String("endpoint", ep.ID), zap.Error(err))
		}
	})
}

// SetEndpoints replaces the endpoints of the file, and has those of the registry made anew. Those
// with a known id keep what was learned of them: their lane, their circuit, what is parked. What
// was parked for an endpoint that is gone from the file dies, where it can be seen and sent again. An id that
// comes back is another endpoint: SetEndpoints waits until the one before it has left.
func (r *Relay) SetEndpoints(endpoints []*Endpoint) error {
	r.changing.Lock()
	for left := r.leftBy(endpoints); left != nil; left = r.leftBy(endpoints) {
		r.changing.Unlock()
		<-left
		r.changing.Lock()
	}
	defer r.changing.Unlock()
	return r.setEndpoints(endpoints)
}

// leftBy is closed when one of the endpoints that are still leaving has left; nil where none is.
func (r *Relay) leftBy(endpoints []*Endpoint) <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, ep := range endpoints {
		if left := r.leaving[ep.ID]; left != nil && !r.stopping {
			return left
		}
	}
	return nil
}

// setEndpoints is called with changing locked.
func (r *Relay) setEndpoints(file []*Endpoint) error {
	before := r.file
	r.file = file
	for _, id := range slices.Sorted(maps.Keys(r.table)) {
		r.judge(r.table[id])
	}
	if err := r.install(file); err != nil {
		r.file = before
		return err
	}
	return nil
}

// install puts the endpoints of the file, and those of the registry as they are, in the place of all. It is called
// with changing locked.
func (r *Relay) install(file []*Endpoint) error {
	before := r.file
	r.file = file
	all := slices.Clone(file)
	for _, id := range slices.Sorted(maps.Keys(r.table)) {
		if !r.inFile(id) && !r.wasOfFile(id) {
			all = append(all, r.table[id].endpoint)
		}
	}
	reg, err := NewRegistry(all)
	if err != nil {
		r.file = before
		return err
	}
	r.mu.Lock()
	if r.stopping {
		r.mu.Unlock()
		return nil
	}
	r.registry = reg
	for _, ep := range before {
		if reg.Endpoint(ep.ID) == nil && r.lanes[ep.ID] == nil && r.leaving[ep.ID] == nil {
			r.metrics.forget(ep.ID)
		}
	}
	for _, ep := range file {
		r.cfg.Labels.Of(ep.ID)
	}
	r.rerouted()
	changed := map[*Lane]*Endpoint{}
	for id, l := range r.lanes {
		if ep := reg.Endpoint(id); ep == nil {
			delete(r.lanes, id)
			l.remove()
			r.leave(id, l, nil)
		} else {
			changed[l] = ep
		}
	}
	r.mu.Unlock()
	for l, ep := range changed {
		l.setEndpoint(ep)
	}
	return nil
}

// wasOfFile tells whether an id is still that of an endpoint of the file, which is about to leave: what is
// parked for that one is not for a row of its id, which has to wait.
func (r *Relay) wasOfFile(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.lanes[id]
	return r.burying[id] || l != nil && l.now.Load().Origin == FromFile
}

// rerouted forgets the routes, as the registry has changed. It is called with mu locked.
func (r *Relay) rerouted() {
	clear(r.routes)
	r.eager.Store(r.registry.own > 0)
}

// leave ends what there is for an endpoint that is gone, when its lane, where it had one, has come
// to rest. What is parked for it is dead, or, where the registry struck it out, discarded as far as it is of
// before. It is called with mu locked.
func (r *Relay) leave(endpointID string, l *Lane, before *cdc.Position) {
	left, earlier := make(chan struct{}), r.leaving[endpointID]
	r.leaving[endpointID] = left
	if before == nil {
		r.burying[endpointID] = true
	}
	if l != nil {
		r.retired[l] = true
		if before != nil {
			l.strike(*before)
		}
	}
	r.aside.Go(func() {
		if earlier != nil {
			select {
			case <-earlier:
			case <-r.sendCtx.Done():
			}
		}
		if l != nil {
			if before != nil {
				l.goOn()
				l.retire(r.sendCtx)
			}
			l.workers.Wait()
		}
		for r.journal.flush(r.sendCtx) != nil || r.clear(r.sendCtx, endpointID, before) != nil {
			t := time.NewTimer(buryAgain)
			select {
			case <-t.C:
				continue
			case <-r.sendCtx.Done(): // the next start does it
				t.Stop()
			}
			break
		}
		r.sender.Forget(endpointID)
		if l != nil {
			l.m.leave()
		}
		r.mu.Lock()
		if r.lanes[endpointID] == nil {
			r.metrics.forget(endpointID)
			if l != nil && r.paces.leave(l.now.Load()) {
				r.rouse()
			}
		}
		delete(r.retired, l)
		if r.leaving[endpointID] == left {
			delete(r.leaving, endpointID)
		}
		if before == nil {
			delete(r.burying, endpointID)
		}
		r.mu.Unlock()
		close(left)
		if before != nil {
			return
		}
		r.changing.Lock()
		defer r.changing.Unlock()
		if r.table[endpointID] != nil { // a row of its id has waited for this
			r.takeUp()
		}
	})
}

func (r *Relay) clear(ctx context.Context, endpointID string, before *cdc.Position) error {
	if before == nil {
		return r.bury(ctx, endpointID)
	}
	n, err := r.cfg.Roll.Drop(ctx, endpointID, *before)
	switch {
	case err != nil:
		r.log.Error("parked deliveries of an endpoint that was removed could not be discarded", zap.String("endpoint", endpointID), zap.Error(err))
	case n > 0:
		r.metrics.discarded(endpointID, n)
		r.log.Info("an endpoint was removed; what was parked for it is discarded", zap.String("endpoint", endpointID), zap.Int64("deliveries", n))
	}
	return err
}

func (r *Relay) bury(ctx context.Context, endpointID string) error {
	n, err := r.store.Bury(ctx, endpointID, ReasonRemoved)
	switch {
	case err != nil:
		r.log.Error("parked deliveries of an endpoint that is gone could not be made dead", zap.String("endpoint", endpointID), zap.Error(err))
	case n > 0:
		r.log.Warn("an endpoint is gone; what was parked for it is dead now", zap.String("endpoint", endpointID), zap.Int64("deliveries", n))
	}
	return err
}

// Resolve checks the columns of every table against its source.
func (r *Relay) Resolve(tables []cdc.Found) error {
	for i := range tables {
		if err := r.cfg.Mapper.Resolve(tables[i].Relation()); err != nil {
			return &cdc.Fault{State: cdc.Waiting, Config: true, Reason: "the outbox table cannot be read as configured", Err: err}
		}
	}
	if err := r.cfg.Mapper.CheckIDs(); err != nil {
		return &cdc.Fault{State: cdc.Waiting, Config: true, Reason: "ids of several sources may be equal", Err: err}
	}
	return nil
}

// Claim takes over as the holder of the slot. The first time it opens the lanes with what the
// store holds for them, so that nothing of the stream overtakes what is parked.
func (r *Relay) Claim(ctx context.Context, s cdc.Session) (cdc.Resume, error) {
	c, first, err := r.cfg.Claims.Claim(ctx, s)
	if errors.Is(err, ErrFenced) {
		return cdc.Resume{}, cdc.Halt(err)
	}
	if err != nil {
		return cdc.Resume{}, err
	}
	r.Touch()
	r.ledger.Reset(c)
	r.mu.Lock()
	opened := r.opened
	if first && !r.claimed {
		r.caught.Store(true) // positions in the store, if any, are of another WAL
	}
	r.claimed = true
	r.mu.Unlock()
	if r.cfg.Roll != nil {
		if err := r.readRegistry(ctx, s, c, opened); err != nil {
			return cdc.Resume{}, err
		}
	}
	if !opened {
		if err := r.open(ctx); err != nil {
			return cdc.Resume{}, err
		}
	}
	return cdc.Resume{LSN: c.LSN, Position: c.Position}, nil
}

func (r *Relay) open(ctx context.Context) error {
	backlogs, err := r.store.Backlogs(ctx)
	if err != nil {
		return fmt.Errorf("read what is parked: %w", err)
	}
	alone, err := r.cfg.Claims.Alone(ctx)
	if err != nil {
		return fmt.Errorf("read what is parked: %w", err)
	}
	r.mu.Lock()
	r.opened = true
	r.backlog = map[string]Backlog{}
	for _, b := range backlogs {
		r.backlog[b.EndpointID] = b
	}
	r.mu.Unlock()
	r.showOldest(backlogs)
	for _, b := range backlogs {
		if since := r.registeredSince(b.EndpointID); since != (cdc.Position{}) {
			// An endpoint of its id was there before, and what was parked for that one may be there still.
			if _, err := r.cfg.Roll.Drop(ctx, b.EndpointID, since); err != nil {
				return err
			}
		}
		switch {
		case b.EndpointID == "":
			r.metrics.unmapped(b.Dead)
		case r.laneByID(b.EndpointID) != nil || b.Parked == 0:
		case alone:
			r.mu.Lock()
			if !r.stopping && r.leaving[b.EndpointID] == nil {
				r.leave(b.EndpointID, nil, nil)
			}
			r.mu.Unlock()
		default:
			r.log.Warn("deliveries are parked for an endpoint that is not ours; they are left to the other slots of this schema", zap.String("endpoint", b.EndpointID), zap.Int64("parked", b.Parked))
		}
	}
	return nil
}

// laneByID finds or makes the lane of an endpoint; nil where there is no such endpoint.
func (r *Relay) laneByID(id string) *Lane {
	r.mu.Lock()
	defer r.mu.Unlock()
	if ep := r.registry.Endpoint(id); ep != nil {
		return r.laneLocked(ep)
	}
	return nil
}

func (r *Relay) laneLocked(ep *Endpoint) *Lane {
	l := r.lanes[ep.ID]
	if l == nil {
		l = newLane(r, ep)
		r.lanes[ep.ID] = l
		if left := r.leaving[ep.ID]; left != nil && !r.stopping {
			l.wait()
			r.aside.Go(func() {
				select {
				case <-left:
					l.goOn()
				case <-r.sendCtx.Done():
				}
			})
		}
		if r.stopping {
			l.close()
		}
		l.open(r.backlog[ep.ID])
		delete(r.backlog, ep.ID)
	}
	return l
}

// Touch notes that Postgres was heard of.
func (r *Relay) Touch() {
	now := time.Now()
	r.heard.Store(&now)
}

// Room is nil while there is room for another event, else a channel that is closed when there is. Memory that is waited
// for is held by no batch for the sake of others that might come.
func (r *Relay) Room() <-chan struct{} {
	room := r.ledger.Room()
	if room != nil {
		r.lingering.wake()
	}
	return room
}

// Row maps a row and gives it to the lanes. It never waits.
func (r *Relay) Row(row *cdc.Row) error {
	if row.Relation != nil && row.Relation.Mirror {
		r.register(row)
		return nil
	}
	if row.Relation == nil && row.Prefix == NoticePrefix {
		r.notice(row)
		return nil
	}
	ev, err := r.cfg.Mapper.Map(row)
	now := time.Now()
	var unmappable *UnmappableError
	switch {
	case errors.As(err, &unmappable):
		r.buryRow(ev, unmappable, now)
		return nil
	case err != nil:
		return &cdc.Fault{State: cdc.Waiting, Reason: "the rows of the outbox table cannot be read any more", Err: err}
	case ev == nil:
		r.ledger.Open(row.Position, 0, now)
		return nil
	}
	if r.route(ev, r.lanesFor(ev), now) {
		r.metrics.routed.Inc()
	} else {
		r.metrics.unmatched.Inc()
	}
	return nil
}

// route gives an event to the lanes whose filters want it, and tells false where none does.
func (r *Relay) route(ev *Event, to []*Lane, now time.Time) bool {
	lanes, refused := sift(ev, to)
	if len(lanes)+len(refused) == 0 {
		r.ledger.Open(ev.Position, 0, now)
		return false
	}
	r.ledger.Hold(ev, len(lanes)+len(refused))
	sp := r.ledger.Open(ev.Position, len(lanes)+len(refused), now)
	r.crew.handOver(func() {
		for _, l := range lanes {
			l.add(ev, sp, now)
		}
		for _, f := range refused {
			f.lane.refuse(ev, sp, now, f.why)
		}
	})
	return true
}

// buryRow makes one dead delivery of a row that cannot be understood, so that it neither stops
// the stream nor is lost.
func (r *Relay) buryRow(ev *Event, why *UnmappableError, now time.Time) {
	r.log.Warn("a row cannot be mapped: it is a dead delivery now", zap.String("event", ev.ID), zap.Stringer("position", ev.Position), zap.String("reason", why.Reason))
	r.metrics.unmappable.Inc()
	r.ledger.Hold(ev, 1)
	sp := r.ledger.Open(ev.Position, 1, now)
	c := Change{Event: ev, Insert: true, State: StateDead, Reason: ReasonUnmappable, Detail: why.Reason}
	c.Notice = r.deathOf(ev, "", 0, Outcome{Reason: c.Reason, Detail: c.Detail})
	r.journal.put(c, func() {
		r.ledger.Settle(sp)
		r.ledger.Release(sp, ev)
	})
}

// lanesFor finds who wants an event. The answer is remembered for its tenant and type.
func (r *Relay) lanesFor(ev *Event) []*Lane {
	r.mu.Lock()
	defer r.mu.Unlock()
	to := route{ev.Tenant, ev.Type}
	lanes, known := r.routes[to]
	if known {
		return lanes
	}
	if len(r.routes) >= maxRoutes {
		clear(r.routes)
	}
	for _, ep := range r.registry.Match(ev.Tenant, ev.Type) {
		lanes = append(lanes, r.laneLocked(ep))
	}
	r.routes[to] = lanes
	if len(lanes) == 0 && !r.told[ev.Type] && len(r.told) < maxTold {
		r.told[ev.Type] = true
		r.log.Info("no endpoint wants events of this type; they are counted and done", zap.String("type", ev.Type))
	}
	return lanes
}

// Commit closes a transaction.
func (r *Relay) Commit(end cdc.LSN) { r.ledger.Close(end) }

// Idle says that nothing below at is missing.
func (r *Relay) Idle(at cdc.LSN) { r.ledger.Close(at) }

// Buffer tells how many events, and bytes of them, are in memory.
func (r *Relay) Buffer() (events, bytes int64) { return r.ledger.Held() }

// Stuck is for how long the slot has been kept from moving: the row at the watermark has been owed
// since then, or the watermark cannot be written down.
func (r *Relay) Stuck() (stuck time.Duration) {
	if oldest := r.ledger.Oldest(); !oldest.IsZero() {
		stuck = time.Since(oldest)
	}
	if u := r.unsaved.Load(); u != nil {
		stuck = max(stuck, time.Since(u.since))
	}
	return stuck
}

// Low is the watermark.
func (r *Relay) Low() Checkpoint { return r.ledger.Low() }

// Fault is why the schema walhook cannot be written now, and so the slot keeps its WAL; nil where
// nothing is known against it.
func (r *Relay) Fault() error {
	if err := r.journal.err(); err != nil {
		return fmt.Errorf("nothing can be parked: %w", err)
	}
	if u := r.unsaved.Load(); u != nil {
		return fmt.Errorf("the checkpoint cannot be written, so the slot stays where it is: %w", u.err)
	}
	return nil
}
