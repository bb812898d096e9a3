package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/sender"
)

const (
	// An event that fails is tried again so often, each time after a longer wait, and not for longer
	// than replayPatience: who replays looks on.
	replayTries    = 4
	replayWait     = time.Second
	replayPatience = 2 * time.Minute
	// giveUpAfter is how many events in a row may fail before an endpoint gets no more.
	giveUpAfter = 10
	// maxReplayLanes is how many events are sent to one endpoint at once, of as many keys.
	maxReplayLanes = 64
	// maxToldFailures is how many failures are kept for the summary.
	maxToldFailures = 1000
	// restTime is how long an interrupted replay reads on, to say from when on to go on.
	restTime = 5 * time.Second
)

// replayOptions are the flags of walhook replay.
type replayOptions struct {
	*options
	endpoints, ids, keys, types, tenants []string
	since, until, rate                   string
	dry, all                             bool
}

func replayCommand(o *options) *cobra.Command {
	in := &replayOptions{options: o}
	cmd := &cobra.Command{
		Use:   "replay",
		Short: "Send past outbox rows again",
		Long: `Sends rows that the outbox table still has once more, to the endpoints that want them, with the same
webhook-id and the header webhook-replay: true. It is sent by this process: a running walhook, its
breakers and its live events are left alone. The events of a key go one at a time, in the order of
their rows. What a running walhook has parked is not looked at.`,
		Args: noArgs,
	}
	f := cmd.Flags()
	f.StringSliceVar(&in.endpoints, "endpoint", nil, "only to these endpoints (default all that want the event)")
	f.BoolVar(&in.all, "all-endpoints", false, "to all endpoints that want the event, which is the default")
	f.StringVar(&in.since, "since", "", "of this time on: RFC 3339, or a duration ago, as in 2h; the event's own time counts")
	f.StringVar(&in.until, "until", "", "up to this time, which is not included")
	f.StringSliceVar(&in.ids, "id", nil, "webhook-ids")
	f.StringArrayVar(&in.keys, "key", nil, "of this key; may be repeated")
	f.StringSliceVar(&in.types, "type", nil, "of these types; globs")
	f.StringArrayVar(&in.tenants, "tenant", nil, "of this tenant; \"\" for events without one")
	f.StringVar(&in.rate, "rate", "10/s", "requests in a time, of all endpoints together: 10/s, 100/m")
	f.BoolVar(&in.dry, "dry-run", false, "count, and send nothing")
	outputFlag(cmd, o)
	cmd.RunE = o.do(func(ctx context.Context, d *desk, cmd *cobra.Command, _ []string) error { return in.run(ctx, d, cmd) })
	return cmd
}

// past reads the flags that pick events.
func (in *replayOptions) past(cmd *cobra.Command) (*outbox.Past, error) {
	p := &outbox.Past{IDs: in.ids, Keys: in.keys, Tenants: in.tenants}
	for _, t := range in.types {
		p.Types = append(p.Types, outbox.CompileGlob(t))
	}
	for name, values := range map[string][]string{"endpoint": in.endpoints, "id": in.ids, "type": in.types} {
		if cmd.Flags().Changed(name) && (len(values) == 0 || slices.Contains(values, "")) { // an unset variable of a script must not mean all
			return nil, usageError{fmt.Errorf("--%s is empty", name)}
		}
	}
	var err error
	if p.Since, err = flagTime(cmd, "since", in.since); err != nil {
		return nil, err
	}
	if p.Until, err = flagTime(cmd, "until", in.until); err != nil {
		return nil, err
	}
	switch {
	case in.all && len(in.endpoints) > 0:
		return nil, usageError{errors.New("one of --endpoint and --all-endpoints")}
	case !p.Until.IsZero() && !p.Since.Before(p.Until):
		return nil, usageError{errors.New("--until is not behind --since")}
	case p.Since.IsZero() && len(p.IDs) == 0 && len(p.Keys) == 0:
		return nil, usageError{errors.New("say which events: --since, --id or --key")}
	}
	return p, nil
}

// parseRate reads 10/s.
func parseRate(text string) (rate.Limit, error) {
	n, per, _ := strings.Cut(text, "/")
	unit := map[string]time.Duration{"s": time.Second, "m": time.Minute, "h": time.Hour}[per]
	v, err := strconv.ParseFloat(n, 64)
	if unit == 0 || err != nil || !(v > 0 && v <= 100_000) {
		return 0, usageError{fmt.Errorf("--rate %q: want a number and a time, as in 10/s, 100/m or 1000/h", printable(text))}
	}
	return rate.Limit(v / unit.Seconds()), nil
}

func (in *replayOptions) run(ctx context.Context, d *desk, cmd *cobra.Command) error {
	past, err := in.past(cmd)
	if err != nil {
		return err
	}
	limit, err := parseRate(in.rate)
	if err != nil {
		return err
	}
	r := &replay{cfg: d.cfg, past: past, limiter: rate.NewLimiter(limit, 1), sum: replaySum{DryRun: in.dry, Failed: []replayFailure{}, Endpoints: map[string]*replayCount{}}}
	if err := r.choose(ctx, d, in.endpoints); err != nil {
		return err
	}
	if r.mapper, err = outbox.NewMapper(d.cfg.Outbox); err != nil {
		return failed{err, exitUsage}
	}
	if r.tables, err = r.survey(ctx); err != nil {
		return err
	}
	screen := newScreen(cmd.ErrOrStderr())
	for _, why := range r.left {
		screen.line(why)
	}
	if !in.dry {
		if r.client, err = d.newClient(); err != nil {
			return err
		}
		defer r.client.Close()
	}
	err = r.all(ctx, screen)
	screen.clear()
	if err != nil {
		return said(err)
	}
	if in.output == "json" {
		err = writeJSON(cmd.OutOrStdout(), &r.sum, "  ")
	} else {
		err = r.sum.print(cmd.OutOrStdout())
	}
	switch {
	case err != nil:
		return err
	case r.sum.Stopped:
		return failed{errors.New(r.sum.next("the replay was stopped")), exitFailed}
	case r.sum.FailedCount > 0:
		return failed{errors.New(r.sum.next(count(int(r.sum.FailedCount), "event") + " could not be delivered")), exitFailed}
	}
	return nil
}

// replay is one run of the command.
type replay struct {
	cfg     *Config
	past    *outbox.Past
	limiter *rate.Limiter
	targets *outbox.Registry
	mapper  *outbox.Mapper
	tables  []cdc.Found
	client  *sender.Client // nil: only counted
	left    []string       // what is left out, and why

	begin  time.Time
	grace  context.Context // of attempts: it ends some time after an interrupt
	hash   maphash.Seed
	lanes  map[string][]chan outbox.Attempt // by endpoint
	lost   map[string]int                   // endpoints' failures in a row, guarded by mu
	mu     sync.Mutex                       // guards what follows
	sum    replaySum
	total  int64     // rows
	read   int64     // of them
	missed time.Time // time of the first event that is still to be sent, of those that an interrupt kept from it
}

// replaySum is what a replay has done.
type replaySum struct {
	DryRun      bool                    `json:"dry_run"`
	Stopped     bool                    `json:"stopped"`
	Matched     int64                   `json:"matched"`       // events
	Unwanted    int64                   `json:"unwanted"`      // of them, those that no endpoint wants
	Refused     int                     `json:"filter_failed"` // deliveries that a filter could not judge
	Unmappable  int64                   `json:"unmappable"`    // rows
	Deliveries  int64                   `json:"deliveries"`
	Delivered   int64                   `json:"delivered"`
	FailedCount int64                   `json:"failed_count"`
	Failed      []replayFailure         `json:"failed"` // the first of them
	Endpoints   map[string]*replayCount `json:"endpoints"`
	Since       *time.Time              `json:"go_on_since,omitempty"`
}

type replayCount struct {
	Deliveries int64 `json:"deliveries"`
	Delivered  int64 `json:"delivered"`
	Failed     int64 `json:"failed"`
}

type replayFailure struct {
	ID       string        `json:"id"`
	Endpoint string        `json:"endpoint"`
	Reason   outbox.Reason `json:"reason"`
	Status   int           `json:"status,omitempty"`
	Detail   string        `json:"detail"`
	at       time.Time
}

// choose finds the endpoints that get anything.
func (r *replay) choose(ctx context.Context, d *desk, ids []string) error {
	all, err := d.endpoints(ctx)
	if err != nil {
		return err
	}
	var to []*outbox.Endpoint
	for _, id := range ids {
		if !slices.ContainsFunc(all, func(k known) bool { return k.id == id }) {
			_, err := d.endpoint(ctx, id)
			return err
		}
	}
	for _, k := range all {
		switch named := slices.Contains(ids, k.id); {
		case len(ids) > 0 && !named:
		case k.ep != nil && k.status == outbox.Enabled:
			to = append(to, k.ep)
		case named:
			return fmt.Errorf("endpoint %s is %s (%s), so nothing is sent to it", k.id, k.status, printable(cmp.Or(k.reason, "no reason given")))
		default:
			r.left = append(r.left, fmt.Sprintf("endpoint %s is %s and left out", k.id, k.status))
		}
	}
	if len(to) == 0 {
		return errors.New("there is no endpoint to send to")
	}
	r.targets, err = outbox.NewRegistry(to)
	return err
}

// survey looks at the tables, and holds them against their sources.
func (r *replay) survey(ctx context.Context) ([]cdc.Found, error) {
	stream := r.stream()
	sv, err := cdc.Inspect(ctx, &stream)
	if err != nil {
		return nil, said(err)
	}
	for _, s := range r.cfg.Outbox {
		if s.Messages != "" {
			r.left = append(r.left, "messages of the prefix "+printable(s.Messages)+" are in no table and cannot be replayed")
		}
	}
	for i := range sv.Tables {
		f := &sv.Tables[i]
		if f.OID == 0 {
			return nil, fmt.Errorf("table %s does not exist", f.Table)
		}
		rel := f.Relation()
		if err := r.mapper.Resolve(rel); err != nil {
			return nil, failed{err, exitUsage}
		}
		if _, _, err := r.mapper.Narrow(rel, r.past); err != nil {
			return nil, failed{fmt.Errorf("%w, or pick events by --id or --key alone", err), exitUsage}
		}
	}
	if len(sv.Tables) == 0 {
		return nil, errors.New("no source is a table: messages of pg_logical_emit_message are kept nowhere and cannot be replayed")
	}
	return sv.Tables, nil
}

func (r *replay) stream() cdc.Config {
	return streamConfig(r.cfg, func() (string, error) { return r.cfg.Database.Replication().Reveal(), nil }, zap.NewNop())
}

// errRest ends the reading of an interrupted replay.
var errRest = errors.New("interrupted")

// all reads the tables and sends what they have. An interrupt ends it without an error.
func (r *replay) all(ctx context.Context, screen *screen) error {
	r.begin, r.hash, r.lanes, r.lost = time.Now(), maphash.MakeSeed(), map[string][]chan outbox.Attempt{}, map[string]int{}
	grace, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	r.grace = grace
	defer context.AfterFunc(ctx, func() { time.AfterFunc(gracePeriod, cut) })()

	told, stop := context.WithCancel(grace)
	var telling, sending sync.WaitGroup
	telling.Go(func() { r.tell(told, screen) })
	defer telling.Wait()
	defer stop()

	var until time.Time // where it was interrupted: how long to read on
	read, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(restTime, end) })()
	var err error
	for i := range r.tables {
		f, stream := &r.tables[i], r.stream()
		where, order, _ := r.mapper.Narrow(f.Relation(), r.past) // survey has looked
		err = cdc.ReadTable(read, &stream, f, where, order, r.begun, func(row *cdc.Row) error {
			if ctx.Err() != nil && until.IsZero() {
				until = time.Now().Add(restTime)
			}
			if !until.IsZero() && time.Now().After(until) {
				return errRest
			}
			return r.take(ctx, row, &sending)
		})
		if err != nil {
			break
		}
	}
	for _, lanes := range r.lanes {
		for _, lane := range lanes {
			close(lane)
		}
	}
	sending.Wait()
	if ctx.Err() == nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sum.Stopped = true
	r.sum.Since = optional(r.missed)
	return nil
}

// begun hears how many rows a table has.
func (r *replay) begun(rows int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.total += rows
}

// take maps a row and gives it to the lanes of those who want it.
func (r *replay) take(ctx context.Context, row *cdc.Row, sending *sync.WaitGroup) error {
	r.mu.Lock()
	r.read++
	r.mu.Unlock()
	ev, err := r.mapper.Map(row)
	var unmappable *outbox.UnmappableError
	switch {
	case errors.As(err, &unmappable):
		r.mu.Lock()
		defer r.mu.Unlock()
		r.sum.Unmappable++
		return nil
	case err != nil:
		return err
	case ev == nil || !r.past.Has(ev):
		return nil
	}
	at := ev.Time
	if ev.Commit = r.begin; ev.Time.IsZero() { // nothing tells it any more
		ev.Time = r.begin
	}
	if ctx.Err() != nil {
		r.miss(at)
		return nil
	}
	to, refused := r.targets.Wants(ev)
	r.mu.Lock()
	r.sum.Matched++
	r.sum.Refused += len(refused)
	if len(to) == 0 {
		r.sum.Unwanted++
	}
	for _, ep := range to {
		r.sum.Deliveries++
		r.count(ep).Deliveries++
	}
	r.mu.Unlock()
	if r.client == nil {
		return nil
	}
	for _, ep := range to {
		select {
		case r.lane(ctx, ep, ev, sending) <- again(ev, ep):
		case <-ctx.Done():
			r.miss(at)
		}
	}
	return nil
}

func again(ev *outbox.Event, to *outbox.Endpoint) outbox.Attempt {
	a := outbox.Alone(ev, to)
	a.Replay = true
	return a
}

// count is called with mu locked.
func (r *replay) count(ep *outbox.Endpoint) *replayCount {
	c := r.sum.Endpoints[ep.ID]
	if c == nil {
		c = &replayCount{}
		r.sum.Endpoints[ep.ID] = c
	}
	return c
}

// lane is where an event waits for its turn: with all others of its key.
func (r *replay) lane(ctx context.Context, ep *outbox.Endpoint, ev *outbox.Event, sending *sync.WaitGroup) chan outbox.Attempt {
	lanes := r.lanes[ep.ID]
	if lanes == nil {
		n := min(ep.Concurrency, maxReplayLanes)
		if ep.Ordering == outbox.OrderAll {
			n = 1
		}
		lanes = make([]chan outbox.Attempt, n)
		for i := range lanes {
			lanes[i] = make(chan outbox.Attempt, 4)
			sending.Go(func() {
				for a := range lanes[i] {
					r.send(ctx, a)
				}
			})
		}
		r.lanes[ep.ID] = lanes
	}
	key := ev.Key
	if key == "" || ep.Ordering == outbox.OrderNone {
		key = ev.ID
	}
	return lanes[maphash.String(r.hash, key)%uint64(len(lanes))]
}

// send delivers one event, or counts it as failed.
func (r *replay) send(ctx context.Context, a outbox.Attempt) {
	id := a.Endpoint.ID
	r.mu.Lock()
	lost := r.lost[id] >= giveUpAfter
	r.mu.Unlock()
	if lost {
		r.fail(a, outbox.Outcome{Detail: fmt.Sprintf("not tried: %d events before it could not be delivered", giveUpAfter)})
		return
	}
	began := time.Now()
	for tries := 0; ; {
		if r.limiter.Wait(ctx) != nil {
			r.miss(a.Event.Time)
			return
		}
		a.Number = tries + 1
		out := r.client.Send(r.grace, a)
		wait := replayWait << tries
		switch out.Verdict {
		case outbox.Delivered:
			r.mu.Lock()
			r.sum.Delivered++
			r.count(a.Endpoint).Delivered++
			r.lost[id] = 0
			r.mu.Unlock()
			return
		case outbox.Cut:
			r.miss(a.Event.Time)
			return
		case outbox.Held:
			wait = max(time.Until(out.Until), 0)
		default:
			tries++
			wait = max(wait, out.RetryAfter)
		}
		if out.Verdict == outbox.Dead || out.Gone || tries == replayTries || time.Since(began)+wait > replayPatience {
			r.fail(a, out)
			return
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			r.miss(a.Event.Time)
			return
		}
	}
}

func (r *replay) fail(a outbox.Attempt, out outbox.Outcome) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lost[a.Endpoint.ID]++
	r.sum.FailedCount++
	r.count(a.Endpoint).Failed++
	if len(r.sum.Failed) < maxToldFailures {
		r.sum.Failed = append(r.sum.Failed, replayFailure{a.Event.ID, a.Endpoint.ID, out.Reason, out.Status, out.Detail, a.Event.Time})
	}
}

// miss notes that an interrupt kept an event of that time from being sent.
func (r *replay) miss(at time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !at.IsZero() && !at.Equal(r.begin) && (r.missed.IsZero() || at.Before(r.missed)) {
		r.missed = at
	}
}

// tell shows how far it is.
func (r *replay) tell(ctx context.Context, screen *screen) {
	every := time.NewTicker(200 * time.Millisecond)
	defer every.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-every.C:
		}
		r.mu.Lock()
		text := fmt.Sprintf("%s %s of %s rows, %s delivered, %s failed", bar(float64(r.sum.Delivered+r.sum.FailedCount)*float64(r.read), float64(r.sum.Deliveries)*float64(r.total)), thousands(int(r.read)), thousands(int(r.total)),
			thousands(int(r.sum.Delivered)), thousands(int(r.sum.FailedCount)))
		r.mu.Unlock()
		screen.progress(text)
	}
}

// bar is how much of a whole is done, drawn.
func bar(part, whole float64) string {
	const width = 24
	done := 0
	if whole > 0 {
		done = int(width * min(part/whole, 1))
	}
	return "[" + strings.Repeat("#", done) + strings.Repeat(".", width-done) + "]"
}

func (s *replaySum) print(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s", count(int(s.Matched), "event"))
	if s.Unwanted > 0 {
		fmt.Fprintf(&b, ", %d of them wanted by no endpoint", s.Unwanted)
	}
	if s.Refused > 0 {
		fmt.Fprintf(&b, "; %s", count(s.Refused, "filter failure"))
	}
	if s.Unmappable > 0 {
		fmt.Fprintf(&b, "; %s cannot be mapped and left out", count(int(s.Unmappable), "row"))
	}
	fmt.Fprintln(&b)
	if _, err := io.WriteString(w, b.String()); err != nil {
		return err
	}
	if len(s.Endpoints) > 0 {
		names := []string{"ENDPOINT", "DELIVERIES"}
		if !s.DryRun {
			names = append(names, "DELIVERED", "FAILED")
		}
		c := newColumns(w, names...)
		for _, id := range slices.Sorted(maps.Keys(s.Endpoints)) {
			n := s.Endpoints[id]
			if s.DryRun {
				c.row(id, n.Deliveries)
			} else {
				c.row(id, n.Deliveries, n.Delivered, n.Failed)
			}
		}
		if err := c.flush(); err != nil {
			return err
		}
	}
	if len(s.Failed) == 0 {
		return nil
	}
	fmt.Fprintln(w, "\nfailed:")
	c := newColumns(w, "ID", "ENDPOINT", "STATUS", "ERROR")
	for _, f := range s.Failed[:min(len(s.Failed), 20)] {
		c.row(f.ID, f.Endpoint, number(f.Status), f.Detail)
	}
	if more := s.FailedCount - 20; more > 0 {
		c.row(fmt.Sprintf("and %d more", more))
	}
	return c.flush()
}

// maxIDsSaid is how many ids stand in the command that sends failures again.
const maxIDsSaid = 20

// next says what happened and how to go on.
func (s *replaySum) next(what string) string {
	switch {
	case s.Stopped && s.Since != nil:
		return what + "; to go on: walhook replay --since " + s.Since.Format(time.RFC3339Nano) + " and the other flags as before"
	case s.Stopped:
		return what
	}
	byEndpoint := map[string][]string{}
	first := map[string]time.Time{}
	for _, f := range s.Failed {
		byEndpoint[f.Endpoint] = append(byEndpoint[f.Endpoint], f.ID)
		if at := first[f.Endpoint]; at.IsZero() || f.at.Before(at) {
			first[f.Endpoint] = f.at
		}
	}
	text := what + "; to send them again:"
	for _, id := range slices.Sorted(maps.Keys(byEndpoint)) {
		text += "\n    walhook replay --endpoint " + id
		if ids := byEndpoint[id]; len(ids) <= maxIDsSaid && s.Endpoints[id].Failed == int64(len(ids)) {
			text += " --id " + strings.Join(ids, ",")
		} else {
			text += " --since " + first[id].UTC().Format(time.RFC3339Nano)
		}
	}
	return text
}
