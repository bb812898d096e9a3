package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"
)

// shopConnections trade at the same time.
const shopConnections = 4

var (
	games     = []string{heroTitle, "Iron Orchard", "Moth and Lantern", "Salt Road", "The Ninth Tide", "Paper Kingdoms", "Quiet Engines", "Ashfall Rally"}
	customers = []string{"ada", "bela", "cem", "dora", "eino", "fatma", "gus", "hana", "ivo", "jun", "kofi", "lena"}
	statuses  = map[string]string{"created": "paid", "paid": "packed", "packed": "shipped", "shipped": "delivered"}
)

// shop is the app: it sells games and knows nothing of webhooks. Beside what it changes it
// inserts a row into its outbox table, in the same transaction.
type shop struct {
	books *books
	conns []*pgx.Conn // one for each of the workers

	mu   sync.Mutex // guards what follows
	till *pgx.Conn  // for what the story asks for
	left int        // events still to be committed
}

func openShop(ctx context.Context, db *demoDatabase, b *books) (*shop, error) {
	s := &shop{books: b}
	for range shopConnections + 1 {
		conn, err := pgx.Connect(ctx, db.url)
		if err != nil {
			s.close()
			return nil, fmt.Errorf("open the shop: %w", err)
		}
		s.conns = append(s.conns, conn)
	}
	s.till, s.conns = s.conns[0], s.conns[1:]
	for i, title := range games {
		stock := 1000
		if i == 0 {
			stock = 0
		}
		const stockUp = `
insert into walhook_demo.products (id, title, stock)
values ($1, $2, $3)`
		if _, err := s.till.Exec(ctx, stockUp, i+1, title, stock); err != nil {
			s.close()
			return nil, fmt.Errorf("open the shop: %w", err)
		}
	}
	return s, nil
}

func (s *shop) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	for _, conn := range append(s.conns, s.till) {
		if conn != nil {
			_ = conn.Close(ctx)
		}
	}
}

// open trades until so many events are committed, at a pace in events a second, or until ctx
// ends. A transaction that has begun is always finished, so that what became of it is known.
func (s *shop) open(ctx context.Context, events int, pace rate.Limit) error {
	s.mu.Lock()
	s.left = events
	s.mu.Unlock()
	limit := rate.NewLimiter(pace, max(int(pace/20), mostRows))
	g, ctx := errgroup.WithContext(ctx)
	for _, conn := range s.conns {
		g.Go(func() error {
			for {
				do, rows := s.next()
				if rows == 0 || limit.WaitN(ctx, rows) != nil {
					s.giveBack(rows)
					return nil
				}
				kept, err := s.deal(conn, do, rand.IntN(25) == 0)
				s.giveBack(rows - kept)
				if err != nil {
					return err
				}
			}
		})
	}
	return g.Wait()
}

// next decides what happens in the shop, and sets aside the rows that it may insert at most.
func (s *shop) next() (do transaction, rows int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch roll := rand.IntN(100); {
	case s.left == 0:
		return nil, 0
	case roll < 3 && s.left >= mostRows:
		do, rows = cart, mostRows
	case roll < 13 && s.left >= 2:
		do, rows = buyNow, 2
	case roll < 28:
		do, rows = placeOrder, 1
	case roll < 76:
		do, rows = advanceOrder, 1
	case roll < 94:
		do, rows = askForStock, 1
	default:
		do, rows = restockAny, 1
	}
	s.left -= rows
	return do, rows
}

func (s *shop) giveBack(rows int) {
	s.mu.Lock()
	s.left += rows
	s.mu.Unlock()
}

// restock brings stock of one product, and tells how many had asked for it. It does nothing
// where the shop may not commit another event.
func (s *shop) restock(product int) (asked int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.left == 0 {
		return 0, nil
	}
	s.left--
	_, err = s.deal(s.till, func(ctx context.Context, tx pgx.Tx) (rows []event, err error) {
		rows, asked, err = restock(ctx, tx, product)
		return rows, err
	}, false)
	return asked, err
}

// transaction changes the shop's own tables and says what events that makes.
type transaction func(context.Context, pgx.Tx) ([]event, error)

// mostRows is how many events a transaction has at most.
const mostRows = 3

// event is a row to be inserted into the outbox.
type event struct {
	kind, key string
	version   int // of the key
	data      map[string]any
}

const insertEvent = `
insert into walhook_demo.outbox (event_type, aggregate_id, payload, headers)
values ($1, $2, $3, $4)
returning id::text, payload::text, pg_current_wal_insert_lsn()::text`

// deal does one transaction and enters it into the books. It returns how many events it committed.
func (s *shop) deal(conn *pgx.Conn, do transaction, changeOfMind bool) (kept int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	tx, err := conn.Begin(ctx)
	if err != nil {
		return 0, err
	}
	defer func() { _ = tx.Rollback(ctx) }() // nothing after a commit
	events, err := do(ctx, tx)
	if errors.Is(err, pgx.ErrNoRows) { // there is no order to advance
		return 0, tx.Rollback(ctx)
	}
	if err != nil {
		return 0, err
	}
	sales := make([]sale, 0, len(events))
	var written string
	for _, e := range events {
		e.data["version"] = e.version
		payload, err := json.Marshal(e.data)
		if err != nil {
			return 0, err
		}
		headers := fmt.Sprintf(`{"traceparent": "00-%016x%016x-%016x-01"}`, rand.Uint64(), rand.Uint64()|1, rand.Uint64()|1)
		sold := sale{kind: e.kind, key: e.key, version: e.version}
		var stored string
		if err := tx.QueryRow(ctx, insertEvent, e.kind, e.key, string(payload), headers).Scan(&sold.id, &stored, &written); err != nil {
			return 0, err
		}
		sold.sum = sumOf(e.kind, stored)
		sales = append(sales, sold)
	}
	if changeOfMind {
		s.books.undo(sales)
		return 0, tx.Rollback(ctx)
	}
	at := time.Now()
	if err := tx.Commit(ctx); err != nil {
		return 0, err
	}
	s.books.commit(sales, at, written)
	return len(sales), nil
}

func productKey(id int) string { return fmt.Sprintf("product-%d", id) }

func orderEvent(id int64, product, customer, status string, version int) event {
	return event{
		kind: "order." + status, key: fmt.Sprintf("order-%d", id), version: version,
		data: map[string]any{"order": id, "product": product, "customer": customer, "status": status},
	}
}

func insertOrder(ctx context.Context, tx pgx.Tx, status string, version int) (id int64, product, customer string, err error) {
	const insert = `
insert into walhook_demo.orders (product, customer, status, version)
values ($1, $2, $3, $4)
returning id`
	product, customer = games[1+rand.IntN(len(games)-1)], customers[rand.IntN(len(customers))]
	err = tx.QueryRow(ctx, insert, product, customer, status, version).Scan(&id)
	return id, product, customer, err
}

func placeOrder(ctx context.Context, tx pgx.Tx) ([]event, error) {
	id, product, customer, err := insertOrder(ctx, tx, "created", 1)
	return []event{orderEvent(id, product, customer, "created", 1)}, err
}

// buyNow has two events of one key in one transaction.
func buyNow(ctx context.Context, tx pgx.Tx) ([]event, error) {
	id, product, customer, err := insertOrder(ctx, tx, "paid", 2)
	return []event{orderEvent(id, product, customer, "created", 1), orderEvent(id, product, customer, "paid", 2)}, err
}

// cart has an event each of several keys in one transaction.
func cart(ctx context.Context, tx pgx.Tx) ([]event, error) {
	var all []event
	for range mostRows {
		one, err := placeOrder(ctx, tx)
		if err != nil {
			return nil, err
		}
		all = append(all, one...)
	}
	return all, nil
}

// advanceOrder takes the order that has waited longest, passing over those that other
// connections are busy with.
func advanceOrder(ctx context.Context, tx pgx.Tx) ([]event, error) {
	const pick = `
select id, product, customer, status
from walhook_demo.orders
where status <> 'delivered'
order by updated_at
limit 1
for update skip locked`
	const advance = `
update walhook_demo.orders
set status = $2, version = version + 1, updated_at = clock_timestamp()
where id = $1
returning version`
	var id int64
	var product, customer, status string
	if err := tx.QueryRow(ctx, pick).Scan(&id, &product, &customer, &status); err != nil {
		return nil, err
	}
	status = statuses[status]
	var version int
	err := tx.QueryRow(ctx, advance, id, status).Scan(&version)
	return []event{orderEvent(id, product, customer, status, version)}, err
}

// askForStock is most often about the game of which the story tells.
func askForStock(ctx context.Context, tx pgx.Tx) ([]event, error) {
	const ask = `
update walhook_demo.products
set waiting = waiting + 1, version = version + 1
where id = $1
returning title, version`
	product, customer := heroProduct, customers[rand.IntN(len(customers))]
	if rand.IntN(2) == 0 {
		product = 1 + rand.IntN(len(games))
	}
	var title string
	var version int
	err := tx.QueryRow(ctx, ask, product).Scan(&title, &version)
	return []event{{
		kind: "stock.requested", key: productKey(product), version: version,
		data: map[string]any{"product": title, "customer": customer},
	}}, err
}

func restockAny(ctx context.Context, tx pgx.Tx) ([]event, error) {
	events, _, err := restock(ctx, tx, 2+rand.IntN(len(games)-1))
	return events, err
}

func restock(ctx context.Context, tx pgx.Tx, product int) (events []event, asked int, err error) {
	const add = `
with before as materialized (
	select id, waiting
	from walhook_demo.products
	where id = $1
	for update
)
update walhook_demo.products p
set stock = p.stock + 20, waiting = 0, version = p.version + 1
from before b
where p.id = b.id
returning p.title, p.version, b.waiting`
	var title string
	var version int
	err = tx.QueryRow(ctx, add, product).Scan(&title, &version, &asked)
	return []event{{
		kind: "product.restocked", key: productKey(product), version: version,
		data: map[string]any{"product": title, "units": 20, "asked": asked},
	}}, asked, err
}
