package outbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/walhook/walhook/cdc"
)

// Registration is a row of walhook.endpoints.
type Registration struct {
	ID            string
	URL           string
	Tenant        string
	Events        []string
	Filter        string          // empty: none
	Secrets       []Secret        // newest first
	PreviousUntil time.Time       // from then on the newest one alone signs; zero: all of them do
	Settings      json.RawMessage // every other setting, an object
	Status        Status          // also Invalid
	StatusReason  string
	Description   string
	Created       time.Time // tells it from another one of its id
}

// Invalid is the status of a registration that is no valid endpoint.
const Invalid Status = "invalid"

// interest is what of a registration decides which events it gets, so what has to be known of its past.
// The rest, secrets among it, holds for whatever is still to be sent.
type interest struct {
	Tenant string   `json:"tenant"`
	Events []string `json:"events"`
	Filter string   `json:"filter,omitempty"`
	Wants  bool     `json:"wants"`           // it is valid and not disabled
	Since  string   `json:"since,omitempty"` // the position of its registration; empty: it was there before the slot

	Created int64 `json:"created,omitempty"` // Registration.Created in microseconds
}

// Version is what a registration was interested in from a position on.
type Version struct {
	EndpointID string
	At         cdc.Position
	Content    []byte // nil: it was removed
}

// Roll keeps the registrations. Its writes carry the holder's epoch, but for Mark.
type Roll interface {
	// Decode reads a row of the registry as the stream has it. values may be the old ones of a delete.
	Decode(rel *cdc.Relation, values [][]byte) (Registration, error)
	// Owner names another slot that delivers to the registered endpoints; empty where none does. What is parked
	// for an endpoint cannot be told apart by slot, so only one of them may.
	Owner(ctx context.Context) (slot string, err error)
	// Load gives the registrations there are, and their versions.
	Load(ctx context.Context) (all []Registration, versions []Version, err error)
	// Replace puts the versions in the place of all there are. complete tells that every change from
	// there on will be saved, so that a later start may rely on them.
	Replace(ctx context.Context, versions []Version, complete bool) error
	// Save adds versions.
	Save(ctx context.Context, versions []Version) error
	// Prune drops the versions that no stream from the checkpoint on has use for.
	Prune(ctx context.Context) error
	// Mark gives a registration a status in the place of another one, or of whatever it has where that is
	// empty: what others have made of it since stays. It fails with ErrNoEndpoint where there is none of that.
	Mark(ctx context.Context, endpointID string, from, to Status, reason string) error
	// Drop discards what is parked for an endpoint of events before a position.
	Drop(ctx context.Context, endpointID string, before cdc.Position) (int64, error)
}

// ErrNoEndpoint is what a Roll answers that knows no endpoint of an id.
var ErrNoEndpoint = errors.New("no such endpoint in walhook.endpoints")

// registered is a registration as the stream has come to it.
type registered struct {
	row      Registration
	then     *interest // as of where the stream was taken up, until it has come to what the row says
	last     string    // its last version
	endpoint *Endpoint
	off      bool         // disabled by us; the row will say so
	wrong    string       // why it is not valid, as its row will say
	since    cdc.Position // of its registration; zero: it was there before the slot
}

// clerk writes down what the stream brings of the registry, in its order, and marks rows. A write that
// fails is tried again for ever; what it stands for is owed until it is done.
type clerk struct {
	roll Roll
	log  *zap.Logger

	mu       sync.Mutex // guards what follows
	versions []Version
	done     []func()
	marks    map[string]mark
	busy     bool
	saved    bool          // something was saved since the last Prune
	idle     chan struct{} // closed when nothing is left; nil while nobody waits
	signal   chan struct{}
}

// The stream brings a commit a moment before others see it.
const (
	maxUnseen  = 20
	unseenWait = 25 * time.Millisecond
)

type mark struct {
	from   Status // that we saw; empty: whatever it is
	status Status
	reason string
	unseen int // how often its row was not there
}

func newClerk(roll Roll, log *zap.Logger) *clerk {
	return &clerk{roll: roll, log: log.Named("registry"), marks: map[string]mark{}, signal: make(chan struct{}, 1)}
}

func (c *clerk) wake() {
	select {
	case c.signal <- struct{}{}:
	default:
	}
}

func (c *clerk) save(versions []Version, done func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.versions = append(c.versions, versions...)
	c.done = append(c.done, done)
	c.wake()
}

func (c *clerk) mark(endpointID string, from, status Status, reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.marks[endpointID] = mark{from: from, status: status, reason: reason}
	c.wake()
}

// run writes until ctx ends. It returns ErrFenced where another instance has taken over.
func (c *clerk) run(ctx context.Context) error {
	for {
		c.mu.Lock()
		versions, done, marks := c.versions, c.done, c.marks
		c.versions, c.done, c.marks = nil, nil, map[string]mark{}
		if c.busy = len(done)+len(marks) > 0; !c.busy && c.idle != nil {
			close(c.idle)
			c.idle = nil
		}
		c.saved = c.saved || len(versions) > 0
		busy := c.busy
		c.mu.Unlock()
		if !busy {
			select {
			case <-ctx.Done():
				return nil
			case <-c.signal:
			}
			continue
		}
		if err := c.try(ctx, func() error { return c.roll.Save(ctx, versions) }); err != nil {
			return fenced(err)
		}
		for _, f := range done {
			f()
		}
		for id, m := range marks {
			err := c.try(ctx, func() error {
				err := c.roll.Mark(ctx, id, m.from, m.status, m.reason)
				if errors.Is(err, ErrNoEndpoint) {
					c.again(id, m)
					return nil
				}
				return err
			})
			if err != nil {
				return fenced(err)
			}
		}
	}
}

// again marks a row a little later, unless it is marked otherwise by then. One that is not there after
// a while was removed.
func (c *clerk) again(endpointID string, m mark) {
	if m.unseen++; m.unseen > maxUnseen {
		return
	}
	time.AfterFunc(time.Duration(m.unseen)*unseenWait, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if _, newer := c.marks[endpointID]; !newer {
			c.marks[endpointID] = m
			c.wake()
		}
	})
}

func fenced(err error) error {
	if errors.Is(err, ErrFenced) {
		return err
	}
	return nil // ctx has ended
}

// try repeats a write until it is done. It gives up at the end of ctx, and where we are fenced.
func (c *clerk) try(ctx context.Context, write func() error) error {
	backoff, said := 50*time.Millisecond, false
	for {
		err := write()
		switch {
		case err == nil:
			if said {
				c.log.Info("the registry can be written again")
			}
			return nil
		case errors.Is(err, ErrFenced), ctx.Err() != nil:
			return err
		case !said:
			said = true
			c.log.Error("the registry cannot be written; the slot waits for it", zap.Error(err))
		}
		t := time.NewTimer(backoff)
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
		backoff = min(2*backoff, journalMaxBackoff)
	}
}

// prune drops versions of the past, if there may be any.
func (c *clerk) prune(ctx context.Context) {
	c.mu.Lock()
	saved := c.saved
	c.saved = false
	c.mu.Unlock()
	if !saved {
		return
	}
	if err := c.roll.Prune(ctx); err != nil {
		c.mu.Lock()
		c.saved = true
		c.mu.Unlock()
	}
}

// flush waits until everything is written, or until ctx ends.
func (c *clerk) flush(ctx context.Context) error {
	c.mu.Lock()
	if !c.busy && len(c.done)+len(c.marks) == 0 {
		c.mu.Unlock()
		return nil
	}
	if c.idle == nil {
		c.idle = make(chan struct{})
	}
	idle := c.idle
	c.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// enroll takes the registry as it is: a new slot begins with it.
func (r *Relay) enroll(rows []Registration) (versions []Version) {
	r.changing.Lock()
	defer r.changing.Unlock()
	r.table = make(map[string]*registered, len(rows))
	for _, row := range rows {
		g := &registered{row: row}
		r.judge(g)
		g.last = string(g.version())
		r.table[row.ID] = g
		versions = append(versions, Version{EndpointID: row.ID, Content: []byte(g.last)})
	}
	r.takeUp()
	return versions
}

// resume takes the registry as it was at a checkpoint. Who is in it and had no version then will come by
// the stream, and who had one and is not in it will go; until then what is parked for either stays.
func (r *Relay) resume(rows []Registration, versions []Version, at Checkpoint) {
	r.changing.Lock()
	defer r.changing.Unlock()
	r.table = make(map[string]*registered, len(rows))
	for _, row := range rows {
		r.table[row.ID] = &registered{row: row, then: &interest{}}
	}
	slices.SortFunc(versions, func(a, b Version) int { return a.At.Compare(b.At) })
	for _, v := range versions {
		if v.At.Ordinal > 0 && v.At.Commit >= at.LSN && v.At.Compare(at.Position) > 0 {
			continue // it comes again
		}
		g := r.table[v.EndpointID]
		if g == nil {
			g = &registered{row: Registration{ID: v.EndpointID, Status: Disabled}}
			r.table[v.EndpointID] = g
		}
		var then interest
		if v.Content != nil && json.Unmarshal(v.Content, &then) != nil {
			then = interest{} // not one of ours
		}
		g.since, _ = cdc.ParsePosition(then.Since)
		if g.then, g.last = &then, string(v.Content); v.Content == nil && g.row.URL == "" {
			delete(r.table, v.EndpointID)
		}
	}
	for id, g := range r.table {
		if at := g.then.Created; at != 0 && at != g.row.Created.UnixMicro() { // the id is another one's by now
			g.row = Registration{ID: id, Status: Disabled}
		}
	}
	for _, row := range rows { // in their order, as who joins a group first says its rate
		if g := r.table[row.ID]; g != nil {
			r.judge(g)
		}
	}
	for _, g := range r.table {
		if g.endpoint == nil {
			r.judge(g)
		}
	}
	r.takeUp()
}

// readRegistry takes up the registry as of the checkpoint: as the stream read it, or from the store.
func (r *Relay) readRegistry(ctx context.Context, s cdc.Session, at Checkpoint, opened bool) error {
	owner, err := r.cfg.Roll.Owner(ctx)
	if err != nil {
		return fmt.Errorf("read the registry: %w", err)
	}
	if r.foreign = owner != ""; r.foreign {
		r.log.Warn("walhook.endpoints is another slot's: its endpoints get nothing from this one", zap.String("slot", owner),
			zap.String("remedy", "where that slot is gone for good: delete from walhook.checkpoints where slot = '"+owner+"'"))
		return nil
	}
	if s.Mirror != nil {
		versions := r.enroll(r.decode(s.Mirror.Rows))
		for i := range versions {
			versions[i].At = cdc.Position{Commit: at.LSN}
		}
		if err := r.cfg.Roll.Replace(ctx, versions, s.Mirror.Live); err != nil {
			return fmt.Errorf("write the registry down: %w", err)
		}
		return nil
	}
	if opened {
		return nil
	}
	rows, versions, err := r.cfg.Roll.Load(ctx)
	if err != nil {
		return fmt.Errorf("read the registry: %w", err)
	}
	r.resume(rows, versions, at)
	return nil
}

func (r *Relay) decode(rows []*cdc.Row) (all []Registration) {
	for _, row := range rows {
		g, err := r.cfg.Roll.Decode(row.Relation, row.Values)
		if err != nil {
			r.log.Error("a row of walhook.endpoints cannot be read and is passed over", zap.Error(err))
			continue
		}
		all = append(all, g)
	}
	return all
}

// disableRegistered disables an endpoint of the registry, unless it has another address by now; its row
// will say so.
func (r *Relay) disableRegistered(ep *Endpoint, why string) {
	r.changing.Lock()
	defer r.changing.Unlock()
	id := ep.ID
	g := r.table[id]
	if g == nil || g.endpoint.URL != ep.URL {
		return
	}
	r.clerk.mark(id, "", Disabled, why)
	g.off = true
	r.judge(g)
	r.mu.Lock()
	r.registry.set(g.endpoint)
	r.rerouted()
	l := r.lanes[id]
	r.mu.Unlock()
	if l != nil {
		l.setEndpoint(g.endpoint)
	}
}

// takeUp puts the endpoints in force, those of the registry as they were judged.
func (r *Relay) takeUp() {
	if err := r.install(r.file); err != nil {
		r.log.Error("the registry could not be taken up", zap.Error(err))
	}
}

func (r *Relay) inFile(id string) bool {
	return slices.ContainsFunc(r.file, func(e *Endpoint) bool { return e.ID == id })
}

// noAddress is the address of an endpoint that nothing is sent to.
const noAddress = "https://walhook.invalid/"

// judge makes the endpoint of a registration. One that is not valid is disabled, so that what is parked
// for it stays; its row is marked.
func (r *Relay) judge(g *registered) {
	row := g.row
	if g.then != nil {
		row.Tenant, row.Events, row.Filter = g.then.Tenant, g.then.Events, g.then.Filter
	}
	ep, err := r.cfg.Register(row)
	if err == nil && r.inFile(row.ID) {
		err = errors.New("the configuration file has an endpoint of this id")
	}
	if err == nil {
		err = r.joins(ep)
	}
	if err != nil {
		none := DefaultEndpoint()
		if ep = &none; g.then != nil { // what it wanted then is kept for it, and no more
			was := Registration{ID: row.ID, URL: noAddress, Tenant: row.Tenant, Events: row.Events, Filter: row.Filter}
			if sound, wrong := r.cfg.Register(was); wrong == nil {
				ep = sound
			}
		}
		ep.ID, ep.Tenant, ep.Events = row.ID, row.Tenant, row.Events
	}
	ep.Origin, ep.Status = FromTable, Enabled
	reason := ""
	if err != nil {
		reason = err.Error()
	} else {
		g.wrong = ""
	}
	switch {
	case row.Status == Disabled, g.off:
		ep.Status = Disabled
	case err != nil:
		ep.Status = Disabled
		if (row.Status != Invalid || row.StatusReason != reason) && g.wrong != reason {
			r.log.Warn("an endpoint of walhook.endpoints is not valid", zap.String("endpoint", row.ID), zap.String("reason", reason))
			r.clerk.mark(row.ID, row.Status, Invalid, reason)
			g.wrong = reason
			r.herald.tell(r.noticeOf(TypeInvalid, row.ID, row.Tenant, endpointNotice{row.ID, reason}))
		}
	case row.Status == Invalid:
		r.log.Info("an endpoint of walhook.endpoints is valid again", zap.String("endpoint", row.ID))
		r.clerk.mark(row.ID, Invalid, Enabled, "")
	case row.Status == Paused:
		ep.Status = Paused
	}
	if g.then != nil && !g.then.Wants {
		ep.Status = Disabled
	} else if g.then != nil && ep.Status == Disabled && !g.off {
		ep.Status = Paused // its events are kept until the stream comes to where it was disabled
	}
	g.endpoint = ep
}

// joins refuses an endpoint of the registry that has another rate than its group. Of two rows, the one
// that came later is the one that is wrong.
func (r *Relay) joins(ep *Endpoint) error {
	if ep.RateLimit.Group == "" {
		return nil
	}
	groups := Groups{}
	for _, e := range r.file {
		if err := groups.Join(e); err != nil {
			return err
		}
	}
	for id, g := range r.table {
		if e := g.endpoint; id != ep.ID && e != nil && e.Status != Disabled && e.RateLimit.Group == ep.RateLimit.Group {
			_ = groups.Join(e)
		}
	}
	return groups.Join(ep)
}

// registeredSince is the position at which an endpoint of the registry was registered; zero is not known.
func (r *Relay) registeredSince(id string) cdc.Position {
	r.changing.Lock()
	defer r.changing.Unlock()
	if g := r.table[id]; g != nil {
		return g.since
	}
	return cdc.Position{}
}

// version is the content of a Version that says what the registration is now.
func (g *registered) version() []byte {
	is := interest{Tenant: g.row.Tenant, Events: g.row.Events, Filter: g.row.Filter, Wants: g.endpoint.Status != Disabled}
	if g.since != (cdc.Position{}) {
		is.Since = g.since.String()
	}
	if !g.row.Created.IsZero() {
		is.Created = g.row.Created.UnixMicro()
	}
	content, err := json.Marshal(is)
	if err != nil {
		panic(err) // strings always encode
	}
	return content
}

// register takes a change of the registry, between the rows around it.
func (r *Relay) register(row *cdc.Row) {
	now := time.Now()
	if r.foreign {
		r.ledger.Open(row.Position, 0, now)
		return
	}
	r.changing.Lock()
	defer r.changing.Unlock()
	var versions []Version
	switch row.Op {
	case cdc.Truncate:
		for id := range r.table {
			versions = append(versions, r.strike(id, row.Position)...)
		}
	case cdc.Delete:
		if was, err := r.cfg.Roll.Decode(row.Relation, row.Old); err == nil {
			versions = r.strike(was.ID, row.Position)
		}
	default:
		is, err := r.cfg.Roll.Decode(row.Relation, row.Values)
		if err != nil {
			r.log.Error("a row of walhook.endpoints cannot be read; it stays as it was", zap.Error(err))
			break
		}
		if row.Partial {
			r.log.Error("a change of walhook.endpoints came without its large values and is passed over: alter table walhook.endpoints replica identity full, then update the row again", zap.String("endpoint", is.ID))
			break
		}
		if row.Op == cdc.Update && len(row.Old) > 0 {
			if was, err := r.cfg.Roll.Decode(row.Relation, row.Old); err == nil && was.ID != is.ID {
				versions = r.strike(was.ID, row.Position)
			}
		}
		versions = append(versions, r.enter(is, row.Position)...)
	}
	if len(versions) == 0 {
		r.ledger.Open(row.Position, 0, now)
		return
	}
	sp := r.ledger.Open(row.Position, 1, now)
	r.clerk.save(versions, func() { r.ledger.Settle(sp) })
}

// enter takes up a new or changed registration. It is called with changing locked.
func (r *Relay) enter(row Registration, at cdc.Position) (versions []Version) {
	g := r.table[row.ID]
	if g == nil {
		g = &registered{since: at}
		r.table[row.ID] = g
	}
	if g.last == "" { // its row was read before the stream came to its registration
		g.since = at
	}
	if g.off && row.Status == Enabled && g.row.Status != Enabled {
		g.off = false // somebody enabled it again
	}
	if row.Status != g.row.Status && row.Status != Invalid {
		g.wrong = "" // the row does not say it any more
	}
	g.row, g.then = row, nil
	r.judge(g)
	if now := string(g.version()); now != g.last {
		g.last = now
		versions = []Version{{row.ID, at, []byte(now)}}
	}
	if r.inFile(row.ID) || r.wasOfFile(row.ID) {
		return versions
	}
	r.mu.Lock()
	r.registry.set(g.endpoint)
	r.rerouted()
	l := r.lanes[row.ID]
	r.mu.Unlock()
	if l != nil {
		l.setEndpoint(g.endpoint)
	}
	return versions
}

// strike removes a registration. What is in memory for it goes on for a while, what is parked is
// discarded. It is called with changing locked.
func (r *Relay) strike(id string, at cdc.Position) []Version {
	delete(r.table, id)
	gone := []Version{{EndpointID: id, At: at}}
	if r.inFile(id) {
		return gone
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.registry.remove(id)
	r.rerouted()
	l := r.lanes[id]
	delete(r.lanes, id)
	if !r.stopping {
		r.leave(id, l, &at)
	}
	return gone
}
