package main

import (
	"context"
	"fmt"
	"hash/maphash"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/sender/sendertest"
)

// sale is an event that the shop inserted.
type sale struct {
	id, kind, key string
	version       int    // its number among those of its key
	sum           uint64 // of type and payload
	at            time.Time
}

// receipt is an event that a receiver accepted.
type receipt struct {
	id  string
	sum uint64
	at  time.Time
}

var sumSeed = maphash.MakeSeed()

// sumOf is a digest of what must not change on the way: the type, and the payload byte for byte.
func sumOf(kind, payload string) uint64 {
	var h maphash.Hash
	h.SetSeed(sumSeed)
	_, _ = h.WriteString(kind)
	_ = h.WriteByte(0)
	_, _ = h.WriteString(payload)
	return h.Sum64()
}

// books are kept by the shop and the receivers, and know nothing of walhook: at the end they say
// what was committed and what arrived.
type books struct {
	mu           sync.Mutex // guards what follows, and the receipts of the tills
	committed    []sale
	transactions int
	undone       map[string]bool // ids of rows that were rolled back
	rollbacks    int
	written      cdc.LSN // where the WAL was after the last committed row
}

func newBooks() *books { return &books{undone: map[string]bool{}} }

func (b *books) commit(sales []sale, at time.Time, written string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.transactions++
	for _, s := range sales {
		s.at = at
		b.committed = append(b.committed, s)
	}
	if lsn, err := cdc.ParseLSN(written); err == nil {
		b.written = max(b.written, lsn)
	}
}

func (b *books) undo(sales []sale) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rollbacks++
	for _, s := range sales {
		b.undone[s.id] = true
	}
}

func (b *books) count() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.committed)
}

// arrived is how many different events a receiver has accepted.
func (b *books) arrived(t *till) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(t.first)
}

func (b *books) lastWritten() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.written.String()
}

// till is one of the receivers, and what it accepted.
type till struct {
	name    string
	secret  string
	rx      *sendertest.Receiver
	books   *books
	failing atomic.Bool
	refuses bool // the story's alone

	// Guarded by books.mu.
	receipts []receipt
	first    map[string]time.Time
	requests int
	forged   int // requests whose signature is not valid
}

func openTill(name string, b *books) (*till, error) {
	t := &till{name: name, secret: newWebhookSecret(), books: b, first: map[string]time.Time{}}
	// Its port has to be free still when it listens again after a while.
	addr, err := freeLoopback()
	if err != nil {
		return nil, err
	}
	if t.rx, err = sendertest.Open(sendertest.Config{Addr: addr, Secrets: []string{t.secret}, Keep: 1, Respond: t.respond}); err != nil {
		return nil, err
	}
	return t, nil
}

func (t *till) respond(r sendertest.Request) sendertest.Answer {
	t.books.mu.Lock()
	defer t.books.mu.Unlock()
	t.requests++
	switch {
	case r.Invalid != nil:
		t.forged++
		return sendertest.Status(http.StatusUnauthorized)
	case t.failing.Load():
		return sendertest.Status(http.StatusServiceUnavailable)
	}
	t.receipts = append(t.receipts, receipt{id: r.ID, sum: sumOf(r.Type, string(r.Data)), at: r.At})
	if _, ok := t.first[r.ID]; !ok {
		t.first[r.ID] = r.At
	}
	return sendertest.Status(http.StatusNoContent)
}

func (t *till) fail(on bool) { t.failing.Store(on) }

// refuse closes the receiver: who connects is refused.
func (t *till) refuse() {
	t.rx.Refuse()
	t.refuses = true
}

// recover ends whatever is wrong with the receiver.
func (t *till) recover(ctx context.Context) error {
	t.failing.Store(false)
	for t.refuses {
		err := t.rx.Reopen()
		if err == nil {
			t.refuses = false
			return nil
		}
		select {
		case <-time.After(demoLook): // somebody else has the port for a moment
		case <-ctx.Done():
			return fmt.Errorf("open %s again: %w", t.name, err)
		}
	}
	return nil
}

// account is the comparison of what was committed with what a receiver accepted.
type account struct {
	delivered, repeated, lost, undone, unknown, disordered, changed int
	problems                                                        []string // in words, the first of each kind with an example
}

// audit compares. Order is judged by the first acceptance of each event: a key's versions have
// to rise. A repeat is no disorder, but it is a repeat.
func audit(name string, committed []sale, undone map[string]bool, receipts []receipt) account {
	var a account
	known := make(map[string]*sale, len(committed))
	for i := range committed {
		known[committed[i].id] = &committed[i]
	}
	var example [6]string
	note := func(kind int, format string, args ...any) {
		if example[kind] == "" {
			example[kind] = fmt.Sprintf(format, args...)
		}
	}
	seen := make(map[string]bool, len(receipts))
	newest := map[string]*sale{}
	for _, r := range receipts {
		s := known[r.id]
		switch {
		case s == nil && undone[r.id]:
			a.undone++
			note(2, "%s", r.id)
			continue
		case s == nil:
			a.unknown++
			note(3, "%q", r.id)
			continue
		case seen[r.id]:
			a.repeated++
			note(1, "%s of %s, %s", s.kind, s.key, s.id)
			continue
		}
		seen[r.id] = true
		a.delivered++
		if r.sum != s.sum {
			a.changed++
			note(5, "%s of %s, %s", s.kind, s.key, s.id)
		}
		if before := newest[s.key]; before != nil && s.version < before.version {
			a.disordered++
			note(4, "%s of %s (its number %d) after %s (%d)", s.kind, s.key, s.version, before.kind, before.version)
			continue
		}
		newest[s.key] = s
	}
	for i := range committed {
		if s := &committed[i]; !seen[s.id] {
			a.lost++
			note(0, "%s of %s, %s", s.kind, s.key, s.id)
		}
	}
	for kind, n := range []int{a.lost, a.repeated, a.undone, a.unknown, a.disordered, a.changed} {
		if n > 0 {
			what := [...]string{"never arrived", "came more than once", "came although rolled back", "came that nobody inserted", "came in the wrong order", "came changed"}[kind]
			a.problems = append(a.problems, fmt.Sprintf("%s: %s events %s, as %s", name, thousands(n), what, example[kind]))
		}
	}
	return a
}

// percentiles of the time from just before the COMMIT was sent to the arrival.
type percentiles struct {
	n        int
	p50, p99 time.Duration
}

// latency is of the first arrivals at a receiver of what was committed within w; a zero w is all.
func (b *books) latency(t *till, w window) percentiles {
	b.mu.Lock()
	defer b.mu.Unlock()
	var took []time.Duration
	for _, s := range b.committed {
		if at, ok := t.first[s.id]; ok && (w.from.IsZero() || !s.at.Before(w.from) && s.at.Before(w.to)) {
			took = append(took, at.Sub(s.at))
		}
	}
	if len(took) == 0 {
		return percentiles{}
	}
	slices.Sort(took)
	return percentiles{n: len(took), p50: took[len(took)/2], p99: took[min(len(took)*99/100, len(took)-1)]}
}

// heardBeforeRestock is how many requests for the hero of the story arrived before the news that
// it was back; ok is false where that did not arrive.
func (b *books) heardBeforeRestock(t *till) (requests int, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	kind := map[string]string{}
	for _, s := range b.committed {
		if s.key == productKey(heroProduct) {
			kind[s.id] = s.kind
		}
	}
	for _, r := range t.receipts {
		switch kind[r.id] {
		case "stock.requested":
			requests++
			delete(kind, r.id)
		case "product.restocked":
			return requests, true
		}
	}
	return requests, false
}

// summary prints what came of it all and returns what is wrong with it.
func (d *demo) summary() (problems []string) {
	b := d.books
	tills := []*till{d.storefront, d.crm}
	accounts := make([]account, len(tills))
	var requests, forged [2]int
	for i, t := range tills {
		b.mu.Lock()
		accounts[i] = audit(t.name, b.committed, b.undone, t.receipts)
		requests[i], forged[i] = t.requests, t.forged
		if accounts[i].lost > 0 && d.hurried {
			accounts[i].problems[0] = fmt.Sprintf("%s: %s events were still on their way", t.name, thousands(accounts[i].lost))
		}
		if t.forged > 0 {
			accounts[i].problems = append(accounts[i].problems, fmt.Sprintf("%s: %s requests had no valid signature", t.name, thousands(t.forged)))
		}
		b.mu.Unlock()
		problems = append(problems, accounts[i].problems...)
	}
	keys := map[string]bool{}
	for _, s := range b.committed {
		keys[s.key] = true
	}

	row := func(name string, of func(i int) string, rest string) {
		line := fmt.Sprintf("  %-34s%12s%12s   %s", name, of(0), of(1), rest)
		d.screen.line(strings.TrimRight(line, " "))
	}
	number := func(name string, of func(account) int, rest string) {
		row(name, func(i int) string { return thousands(of(accounts[i])) }, rest)
	}
	d.screen.line("")
	row("", func(i int) string { return tills[i].name }, "")
	number("delivered", func(a account) int { return a.delivered },
		fmt.Sprintf("of %s events, committed in %s transactions", thousands(len(b.committed)), thousands(b.transactions)))
	lost := "lost"
	if d.hurried {
		lost = "not waited for"
	}
	number(lost, func(a account) int { return a.lost }, "")
	number("repeated", func(a account) int { return a.repeated }, "")
	number("rolled back, yet sent", func(a account) int { return a.undone + a.unknown },
		fmt.Sprintf("of %s rows in %s transactions", thousands(len(b.undone)), thousands(b.rollbacks)))
	number("out of order", func(a account) int { return a.disordered },
		fmt.Sprintf("in %s keys, by first delivery", thousands(len(keys))))
	number("payload changed", func(a account) int { return a.changed }, "byte for byte")
	row("signatures verified", func(i int) string { return thousands(requests[i] - forged[i]) }, "of all requests, those answered 503 too")
	row("signatures wrong", func(i int) string { return thousands(forged[i]) }, "")
	times := func(name string, w window, of func(percentiles) time.Duration, rest string) {
		row(name, func(i int) string { return shortly(of(b.latency(tills[i], w))) }, rest)
	}
	p50 := func(p percentiles) time.Duration { return p.p50 }
	p99 := func(p percentiles) time.Duration { return p.p99 }
	times("commit to delivery, p50", window{}, p50, "from just before COMMIT is sent to the receiver")
	times("                    p99", window{}, p99, "")
	if !d.outage.from.IsZero() {
		times("committed in the outage, p50", d.outage, p50, "crm was away for "+shortly(d.outage.to.Sub(d.outage.from)))
		times("                         p99", d.outage, p99, "")
	}
	d.screen.line("")
	if heard, ok := b.heardBeforeRestock(d.crm); ok && d.asked > 0 {
		d.screen.line(fmt.Sprintf("%q: crm heard of %s of the %s requests before it heard that the game was back.", heroTitle, thousands(heard), thousands(d.asked)))
	}
	wal := d.seen.wal
	d.screen.line(fmt.Sprintf("WAL: %s written; at the end the slot has %s to confirm, and the server keeps %s for it; in the outage there were %s to confirm at most.",
		size(wal.written), size(wal.unconfirmed), size(wal.kept), size(d.seen.worst)))
	return problems
}
