package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/time/rate"

	"github.com/walhook/walhook/cdc"
)

const (
	// demoEvents make a story of half a minute.
	demoEvents = 3000
	demoLength = 30 * time.Second
	// Fewer events come no slower than this, and end sooner.
	demoLeastRate = 100
	// gentleRate is the shop's pace, in events a second, when the story has been told.
	gentleRate = 8
	// outageStep is the longest that each half of the outage lasts. Both together have to end long
	// before the retries of crm's schedule do: six probes of the breaker fail in them, and the
	// oldest delivery, which is the probe, has thirteen attempts.
	outageStep = 7 * time.Second

	demoLook  = 100 * time.Millisecond // how often the sidecar is looked at
	demoStart = 60 * time.Second       // for the sidecar's start, while nothing is known to be wrong
	// demoMend is how long a start may wait for something that somebody would have to mend.
	demoMend = 4 * time.Second
	// demoStill is how long nothing may move before what is missing counts as lost.
	demoStill = 20 * time.Second
	// demoHurry is what Ctrl-C leaves to what is on its way.
	demoHurry = 10 * time.Second
)

func demoCommand(o *options) *cobra.Command {
	var d demo
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Play the whole thing on a throwaway Postgres, with a shop and two receivers",
		Long: `Plays the whole thing: a shop that inserts events into an outbox table, walhook beside it exactly
as "walhook run" is, and two receivers that check every signature, one of which fails for a
while. At the end it compares what was committed with what arrived.

The Postgres is a throwaway one, of the programs found on this machine or else downloaded. With
--database-url it is yours (wal_level = logical, a role that may replicate and create schemas);
the demo then makes the schemas walhook_demo and walhook there, a publication walhook_demo and
a slot walhook_demo_<the database's oid>, and drops them at the end. It refuses a database that
has a walhook already.

With --exit it ends by itself. The exit code is 0 only if every committed event arrived at both
receivers, signed, once, and in the order of its key, and nothing that was rolled back did.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if d.events < 1 {
				return usageError{errors.New("--events: want 1 or more")}
			}
			d.env = o.env
			d.screen = newScreen(cmd.OutOrStdout())
			return d.run(cmd.Context())
		},
	}
	cmd.Flags().IntVar(&d.events, "events", demoEvents, "events that the shop commits before the end of the story")
	cmd.Flags().BoolVar(&d.exit, "exit", false, "end by itself; otherwise the shop goes on at a gentle pace until Ctrl-C")
	cmd.Flags().BoolVar(&d.verbose, "verbose", false, "show the sidecar's log instead of writing it to a file")
	cmd.Flags().StringVar(&d.database, "database-url", "", "a Postgres of yours instead of a throwaway one")
	return cmd
}

// demo is `walhook demo`. The sidecar in it is made by newSidecar from a configuration file, and
// seen from outside: by its metrics, its health, and what arrives.
type demo struct {
	events   int
	exit     bool
	verbose  bool
	database string
	env      func(string) (string, bool)
	screen   *screen

	dir        string
	db         *demoDatabase
	books      *books
	shop       *shop
	storefront *till
	crm        *till
	sidecar    *sidecar
	walhook    *task
	trade      *task
	seen       sight // as of the last look
	hurried    bool  // what was on its way was not waited for
	asked      int   // customers who waited for the hero of the story
	outage     window
}

// window is a span of time: from belongs to it, to does not.
type window struct{ from, to time.Time }

// sight is what a look at the sidecar showed.
type sight struct {
	at                time.Time
	storefrontBreaker float64 // as in walhook_breaker_state
	crmBreaker        float64
	parked            float64 // for crm
	behind            bool    // something was parked for crm since it last caught up
	wal               slotWAL
	walAt             time.Time
	worst             int64 // bytes of WAL to be confirmed at once, in the outage
}

// The values of walhook_breaker_state that the demo tells of.
const breakerClosed, breakerOpen = 0, 2

// task is something that runs beside the story.
type task struct {
	stop context.CancelFunc
	done chan struct{}
	err  error // once done is closed
}

func begin(f func(context.Context) error) *task {
	ctx, stop := context.WithCancel(context.Background())
	t := &task{stop: stop, done: make(chan struct{})}
	go func() {
		defer close(t.done)
		t.err = f(ctx)
	}()
	return t
}

func (t *task) ended() bool {
	select {
	case <-t.done:
		return true
	default:
		return false
	}
}

// end stops the task and waits for it. It may be called on a nil task, and again.
func (t *task) end() error {
	if t == nil {
		return nil
	}
	t.stop()
	<-t.done
	return t.err
}

func (d *demo) run(ctx context.Context) (err error) {
	// A terminal that is closed ends the demo as Ctrl-C does, and so does an output that nobody
	// reads any more, which would otherwise kill us before we have cleared up.
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGHUP)
	defer stop()
	pipe := make(chan os.Signal, 1)
	signal.Notify(pipe, syscall.SIGPIPE)
	defer signal.Stop(pipe)
	d.screen.unread = stop

	d.screen.line("walhook demo: a shop, its outbox table, walhook beside it, and two receivers of webhooks, one of which will fail.\n")
	if d.db, err = openDemoDatabase(ctx, d.database, d.screen); err != nil {
		return interrupted(ctx, err)
	}
	defer func() { err = errors.Join(err, d.db.close()) }()
	if d.dir, err = d.db.directory(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(d.dir)) }()

	if err := d.open(ctx); err != nil {
		d.close()
		return interrupted(ctx, err)
	}
	var problems []string
	err = d.story(ctx)
	if ctx.Err() != nil {
		d.screen.say("Stopping: the shop closes, and crm is well. What is on its way may still arrive; Ctrl-C again does not wait for it.")
		if err = nil; d.exit {
			err = errors.New("it was interrupted before its end")
		}
	}
	if err != nil {
		problems = append(problems, err.Error())
	}
	if err == nil || ctx.Err() != nil {
		patience, cancel := d.patience(ctx)
		problems = append(problems, d.settle(patience)...)
		cancel()
	}
	problems = append(problems, d.close()...)
	problems = append(problems, d.summary()...)
	if len(problems) == 0 {
		d.screen.line("\nPASS: every committed event arrived at both, signed, once, and in the order of its key.")
		return nil
	}
	d.screen.line("\nFAIL")
	for _, p := range problems {
		d.screen.line("  " + p)
	}
	if ctx.Err() == nil && !d.verbose {
		if kept, err := d.keepLog(); err == nil {
			d.screen.line("The sidecar's log: " + kept)
		}
	}
	return failed{errors.New("the demo failed: " + problems[0]), exitFailed}
}

// keepLog saves the log from being cleared up.
func (d *demo) keepLog() (string, error) {
	text, err := os.ReadFile(d.logFile())
	if err != nil {
		return "", err
	}
	file, err := os.CreateTemp("", "walhook-demo-*.log")
	if err != nil {
		return "", err
	}
	_, err = file.Write(text)
	return file.Name(), errors.Join(err, file.Close())
}

// interrupted says so instead of what the interruption broke.
func interrupted(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	return failed{err, exitFailed}
}

// patience is for what is on its way at the end: without a limit (settle has one of its own), or
// short after a Ctrl-C, and over at the second one.
func (d *demo) patience(ctx context.Context) (context.Context, context.CancelFunc) {
	after := context.WithoutCancel(ctx)
	if ctx.Err() == nil {
		return context.WithCancel(after)
	}
	after, stop := signal.NotifyContext(after, os.Interrupt)
	after, cancel := context.WithTimeout(after, demoHurry)
	return after, func() { cancel(); stop() }
}

func (d *demo) logFile() string { return filepath.Join(d.dir, "walhook.log") }

// open makes the receivers, the configuration and the shop, and starts walhook. It returns when
// walhook is ready.
func (d *demo) open(ctx context.Context) error {
	d.books = newBooks()
	var err error
	if d.storefront, err = openTill("storefront", d.books); err != nil {
		return err
	}
	if d.crm, err = openTill("crm", d.books); err != nil {
		return err
	}
	listen, err := freeLoopback()
	if err != nil {
		return err
	}
	if err := d.start(listen); err != nil {
		return err
	}
	if d.shop, err = openShop(ctx, d.db, d.books); err != nil {
		return err
	}
	d.introduce(listen)
	return d.awaitReady(ctx)
}

// demoConfig is what the sidecar reads, and what whoever looks around may read and edit.
const demoConfig = `# What "walhook demo" runs on. Edited while it runs, the endpoints are taken up at once.
database:
  url: ${WALHOOK_DATABASE_URL}
cdc: {slot: %s, publication: walhook_demo}
outbox:
  - table: walhook_demo.outbox
endpoints:
  - id: storefront
    url: %s
    secrets: [%s]
  - id: crm
    url: %s
    secrets: [%s]
    breaker: {open_for: 2s}   # shortened for the story: the default is 30s
    retry: {schedule: [1s, 2s, 4s, 4s, 4s, 4s, 4s, 4s, 4s, 4s, 4s, 4s]}   # the default is 5s, 1m, 5m, 30m, 2h, …
server: {listen: "%s"}
`

// start runs the sidecar: what `walhook run --config FILE` does.
func (d *demo) start(listen string) error {
	path := filepath.Join(d.dir, "walhook.yaml")
	text := fmt.Sprintf(demoConfig, d.db.slot, d.storefront.rx.URL(), d.storefront.secret, d.crm.rx.URL(), d.crm.secret, listen)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		return err
	}
	o := &options{config: path, env: func(name string) (string, bool) {
		if name == "WALHOOK_DATABASE_URL" {
			return d.db.url, true
		}
		return d.env(name)
	}}
	cfg, err := o.load()
	if err != nil {
		return err
	}
	out, format := io.Writer(d.screen), Log{Level: cfg.Log.Level, Format: "console"}
	if !d.verbose {
		file, err := os.OpenFile(d.logFile(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			return err
		}
		out, format = file, cfg.Log
	}
	log, err := newLogger(format, out)
	if err != nil {
		return err
	}
	d.sidecar = newSidecar(cfg, o, log)
	d.walhook = begin(func(ctx context.Context) error {
		err := d.sidecar.run(ctx)
		if file, ok := out.(*os.File); ok {
			err = errors.Join(err, file.Close())
		}
		return err
	})
	return nil
}

// introduce says who is there and how to look around.
func (d *demo) introduce(listen string) {
	row := func(name, what string) { d.screen.line(fmt.Sprintf("  %-11s %s", name, what)) }
	row("outbox", "walhook_demo.outbox (id, event_type, aggregate_id, payload, headers, created_at)")
	row("storefront", d.storefront.rx.URL()+", a receiver that checks every signature")
	row("crm", d.crm.rx.URL()+", another. It will fail; for a story of seconds its breaker opens")
	row("", "for 2 s (default 30 s) and it is tried again after 1 s, 2 s, 4 s (default 5 s, 1 m, 5 m, …)")
	row("config", filepath.Join(d.dir, "walhook.yaml"))
	if d.verbose {
		row("log", "here")
	} else {
		row("log", d.logFile())
	}
	d.screen.line("\nTo look around meanwhile:")
	if psql, err := exec.LookPath("psql"); err == nil {
		d.screen.line(fmt.Sprintf("  %s '%s' -c 'select endpoint_id, state, reason, count(*) from walhook.deliveries group by 1, 2, 3'", filepath.Base(psql), d.db.shown()))
	} else {
		d.screen.line("  " + d.db.shown() + "  (what waits is in walhook.deliveries)")
	}
	d.screen.line("  curl http://" + listen + "/metrics")
	d.screen.line("  curl http://" + listen + "/readyz\n")
}

// awaitReady waits for the sidecar, saying what it waits for.
func (d *demo) awaitReady(ctx context.Context) error {
	began := time.Now()
	said := ""
	var waits time.Time // since when somebody would have to mend something
	for {
		h := d.sidecar.health()
		if h.ready {
			return nil
		}
		if d.walhook.ended() {
			return fmt.Errorf("walhook ended: %w", cmp.Or(d.walhook.err, errors.New("without an error")))
		}
		if h.Reason != "" && h.Reason != said && h.Reason != "starting" {
			said = h.Reason
			d.screen.say("walhook is " + h.Status + ": " + h.Reason)
		}
		stuck := h.Status == string(cdc.Waiting) || h.Status == string(cdc.Lost)
		switch {
		case !stuck:
			waits = time.Time{}
		case waits.IsZero():
			waits = time.Now()
		}
		if stuck && time.Since(waits) > demoMend || time.Since(began) > demoStart {
			reason := cmp.Or(h.Reason, h.Status)
			if h.Remedy != "" {
				reason += "; to mend it: " + h.Remedy
			}
			return errors.New("walhook does not get ready: " + reason)
		}
		if err := d.pause(ctx); err != nil {
			return err
		}
	}
}

func (d *demo) pause(ctx context.Context) error {
	select {
	case <-time.After(demoLook):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// story tells what happens, from the first order until the shop has committed all its events
// and, without --exit, until ctx ends.
func (d *demo) story(ctx context.Context) error {
	pace := max(demoLeastRate, float64(d.events)/demoLength.Seconds())
	d.trade = begin(func(ctx context.Context) error { return d.shop.open(ctx, d.events, rate.Limit(pace)) })
	share := func(percent int) func() bool {
		return func() bool { return d.books.count() >= d.events*percent/100 }
	}
	within := func(limit time.Duration, enough func() bool) func() bool {
		end := time.Now().Add(limit)
		return func() bool { return enough() || time.Now().After(end) }
	}

	d.screen.say(fmt.Sprintf("The shop opens: orders are placed, paid, packed, shipped, each step a row in the outbox, about %.0f a second from %d connections. "+
		"Some transactions are rolled back; of those nobody may hear.", pace, shopConnections))
	d.screen.say(fmt.Sprintf("%q is out of stock. Customers ask to be told (stock.requested).", heroTitle))
	if err := d.watch(ctx, share(20)); err != nil {
		return err
	}

	d.crm.fail(true)
	d.outage.from = time.Now()
	d.screen.say("crm answers 503 to everything. What fails is written to walhook.deliveries, to be tried again; nothing is lost, and storefront must not notice.")
	if err := d.watch(ctx, within(outageStep, share(40))); err != nil {
		return err
	}

	d.crm.refuse()
	d.screen.say("crm refuses connections now, as a program that is gone. " + d.meanwhile())
	if err := d.watch(ctx, within(outageStep/2, share(50))); err != nil {
		return err
	}
	asked, err := d.shop.restock(heroProduct)
	if err != nil {
		return fmt.Errorf("the shop: %w", err)
	}
	if d.asked = asked; asked > 0 {
		d.screen.say(fmt.Sprintf("%q is back in stock (product.restocked), and %s have asked for it. crm, still away, has to hear of that after their requests.", heroTitle, thousands(asked)))
	}
	if err := d.watch(ctx, within(outageStep/2, share(60))); err != nil {
		return err
	}

	d.screen.say("crm is back. The breaker lets one delivery through when its time is up, the oldest; if that succeeds, the rest follows. " + d.meanwhile())
	if err := d.crm.recover(ctx); err != nil {
		return err
	}
	d.outage.to = time.Now()
	if err := d.watch(ctx, d.trade.ended); err != nil {
		return err
	}
	if err := d.trade.end(); err != nil {
		return err
	}
	if d.exit {
		d.screen.say("The shop closes. What is on its way has to arrive, and the slot to have let go of the WAL.")
		return nil
	}
	d.screen.say(fmt.Sprintf("That was the story. The shop goes on, %d events a second. Ctrl-C ends it, with the sum of it all.", gentleRate))
	d.trade = begin(func(ctx context.Context) error { return d.shop.open(ctx, 1<<62, gentleRate) })
	return d.watch(ctx, func() bool { return false })
}

func (d *demo) meanwhile() string {
	p := d.books.latency(d.storefront, window{d.outage.from, time.Now()})
	return fmt.Sprintf("%s of its deliveries wait; storefront had its own within %s (99 of 100); %s of WAL are not confirmed.",
		thousands(int(d.seen.parked)), shortly(p.p99), size(d.seen.wal.unconfirmed))
}

// watch looks at everything until enough is true, and says what has changed. It returns an error
// where a part of the demo has ended before its time.
func (d *demo) watch(ctx context.Context, enough func() bool) error {
	for !enough() {
		if d.walhook.ended() {
			return fmt.Errorf("walhook ended: %w", cmp.Or(d.walhook.err, errors.New("without an error")))
		}
		if d.trade.ended() && d.trade.err != nil {
			return fmt.Errorf("the shop: %w", d.trade.err)
		}
		if err := d.pause(ctx); err != nil {
			return err
		}
		d.look(ctx)
	}
	return nil
}

// look takes the numbers of the moment and tells of what has changed since the last look.
func (d *demo) look(ctx context.Context) {
	before, now := d.seen, d.seen
	now.at = time.Now()
	metric := d.metrics()
	now.storefrontBreaker, now.crmBreaker = metric["walhook_breaker_state/storefront"], metric["walhook_breaker_state/crm"]
	now.parked = metric["walhook_parked/crm"]
	now.behind = before.behind || now.parked > 0
	if now.at.Sub(before.walAt) > time.Second {
		if wal, err := d.db.slotWAL(ctx); err == nil {
			now.wal, now.walAt = wal, now.at
			if !d.outage.from.IsZero() && d.outage.to.IsZero() {
				now.worst = max(now.worst, wal.unconfirmed)
			}
		}
	}
	if before.crmBreaker == breakerClosed && now.crmBreaker == breakerOpen {
		d.screen.say("crm's breaker opened after five failures in a row: no more requests are spent on it but a probe every 2 s. Its events are parked, and the slot moves on.")
	}
	if before.crmBreaker != breakerClosed && now.crmBreaker == breakerClosed {
		d.screen.say(fmt.Sprintf("crm's breaker closed: the probe got through. What is parked, %s deliveries a moment ago, follows in the order of the commits.", thousands(int(before.parked))))
	}
	if now.behind && now.parked == 0 && now.crmBreaker == breakerClosed && !d.outage.to.IsZero() {
		now.behind = false
		d.screen.say(fmt.Sprintf("crm has caught up, %s after it came back: nothing is parked any more.", shortly(now.at.Sub(d.outage.to))))
	}
	if before.storefrontBreaker == breakerClosed && now.storefrontBreaker != breakerClosed {
		d.screen.say("storefront's breaker opened. That is not in the script.")
	}
	d.seen = now
	state := "open"
	if now.crmBreaker == breakerClosed {
		state = "closed"
	}
	d.screen.progress(fmt.Sprintf("committed %s · storefront %s · crm %s, parked %s, breaker %s",
		thousands(d.books.count()), thousands(d.books.arrived(d.storefront)), thousands(d.books.arrived(d.crm)), thousands(int(now.parked)), state))
}

// metrics are the sidecar's gauges by name and endpoint, as name/endpoint.
func (d *demo) metrics() map[string]float64 {
	d.sidecar.mu.Lock()
	p := d.sidecar.now
	d.sidecar.mu.Unlock()
	if p == nil {
		return nil
	}
	families, err := p.reg.Gather()
	if err != nil {
		return nil
	}
	values := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, label := range m.GetLabel() {
				if label.GetName() == "endpoint" && m.GetGauge() != nil {
					values[f.GetName()+"/"+label.GetValue()] = m.GetGauge().GetValue()
				}
			}
		}
	}
	return values
}

// settle closes the shop and waits until everything has arrived, nothing is parked, and the slot
// has let go of it. It returns what has not come about once nothing moves any more.
func (d *demo) settle(ctx context.Context) (left []string) {
	if err := d.trade.end(); err != nil {
		return []string{"the shop: " + err.Error()}
	}
	if err := d.crm.recover(ctx); err != nil {
		return []string{err.Error()}
	}
	if d.outage.to.IsZero() {
		d.outage.to = time.Now()
	}
	moved, had, owed := time.Now(), -1, true
	err := d.watch(ctx, func() bool {
		arrived := d.books.arrived(d.storefront) + d.books.arrived(d.crm)
		if arrived != had {
			had, moved = arrived, time.Now()
		}
		if owed = arrived < 2*d.books.count(); !owed {
			left = d.db.leftovers(ctx, d.books.lastWritten())
		}
		return !owed && len(left) == 0 || time.Since(moved) > demoStill
	})
	if owed { // the audit tells of them; what else is left follows from that
		left, d.hurried = nil, ctx.Err() != nil
	}
	if err != nil && ctx.Err() == nil {
		left = append(left, err.Error())
	}
	if wal, err := d.db.slotWAL(ctx); err == nil {
		d.seen.wal = wal
	}
	return left
}

// close ends what is running, from the shop to the receivers, and tells what did not end well.
func (d *demo) close() (problems []string) {
	note := func(what string, err error) {
		if err != nil {
			problems = append(problems, what+": "+err.Error())
		}
	}
	_ = d.trade.end() // its error has been told
	if d.shop != nil {
		d.shop.close()
	}
	early := d.walhook != nil && d.walhook.ended()
	if err := d.walhook.end(); !early {
		note("walhook did not stop well", err)
	}
	for _, t := range []*till{d.storefront, d.crm} {
		if t != nil {
			t.rx.Close()
		}
	}
	d.screen.clear()
	return problems
}

// freeLoopback finds a port that stays free while nobody listens on it: below the range from
// which systems give ports to outgoing connections.
func freeLoopback() (string, error) {
	for range 100 {
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(10000+mathrand.IntN(5000)))
		if l, err := net.Listen("tcp", addr); err == nil {
			return addr, l.Close()
		}
	}
	return "", errors.New("no free port between 10000 and 15000")
}

func newWebhookSecret() string {
	key := make([]byte, 24)
	_, _ = rand.Read(key) // it never fails
	return "whsec_" + base64.StdEncoding.EncodeToString(key)
}

// heroProduct is the game of which the story tells.
const heroProduct, heroTitle = 1, "Hollow Harbour"
