package main

import (
	"context"
	"fmt"
)

// registeredEndpoints stand in the table in scenario 8.
const registeredEndpoints = 10_000

// Rows of scenario 8 have a tenant and one of ten types. All else is as in fill.
const (
	tenantColumn = `alter table outbox add column tenant_id text`
	fillTenants  = `
create or replace procedure fill(first bigint, rows int, per int, keys int, pad text, len int) language plpgsql as $$
begin
	for i in 0 .. rows - 1 loop
		insert into outbox values (first + i, 'key-' || (first + i) %% keys, 'order.' || (i / %[1]d) %% 10,
			jsonb_build_object('at', 0, 'pad', substr(pad, 1 + i %% 4096 * 7919 %% 4096, len)), 'tenant-' || i %% %[1]d);
		if i %% per = per - 1 then
			commit;
		end if;
	end loop;
	commit;
end $$`
)

// registry is one way to register the endpoints.
type registry struct {
	tenants int
	events  string // SQL of an endpoint's globs, from its number i
	url     string // SQL of its path
}

// many is scenario 8.
func many(ctx context.Context, l *lab) error {
	f := l.plainForm()
	one, err := l.tenants(ctx, f, 1000, nil, 1)
	if err != nil {
		return fmt.Errorf("one endpoint: %w", err)
	}
	// An endpoint of the tenant i % 1000 wants the type i / 1000.
	each, err := l.tenants(ctx, f, 1000, &registry{tenants: 1000, events: `array['order.' || i / 1000]`, url: `'/all'`}, 1)
	if err != nil {
		return fmt.Errorf("one match: %w", err)
	}
	few := f
	few.rows, few.keys = max(1, f.rows/100), 100
	hundred, err := l.tenants(ctx, few, 100, &registry{tenants: 100, events: `'{*}'::text[]`, url: `'/e' || i`}, 100)
	if err != nil {
		return fmt.Errorf("a hundred matches: %w", err)
	}
	for _, v := range []struct {
		of      string
		m       measured
		matches float64
		d       demand
	}{
		{"10,000 endpoints, 1 match", each, 1, atLeast(0.9)},
		{"10,000 endpoints, 100 match", hundred, 100, demand{}},
	} {
		l.say("%s: %s deliveries/s; one endpoint %s", v.of, number(v.m.rate), number(one.rate))
		l.report.compare(v.of, "events", v.m.rate/v.matches, "/s", one.rate, "one endpoint", v.m.rate/v.matches/one.rate, v.d)
		if v.matches > 1 {
			l.report.compare(v.of, "deliveries", v.m.rate, "/s", one.rate, "one endpoint", v.m.rate/one.rate, demand{})
		}
		l.report.compare(v.of, "CPU a delivery", v.m.cpu, "µs", one.cpu, "one endpoint", v.m.cpu/one.cpu, demand{})
		l.report.compare(v.of, "peak RSS", mebibytes(v.m.usage.peak), "MiB", mebibytes(one.usage.peak), "one endpoint", float64(v.m.usage.peak)/float64(one.usage.peak), demand{})
		l.report.add(v.of, "parked", float64(v.m.written.parked), "", demand{})
	}
	return nil
}

// tenants drains rows of many tenants: to one endpoint of the file where there is no registry,
// else to those in the table.
func (l *lab) tenants(ctx context.Context, f form, tenants int, reg *registry, matches int) (m measured, err error) {
	db, err := l.database(ctx)
	if err != nil {
		return m, err
	}
	if _, err := db.conn.PgConn().Exec(ctx, tenantColumn+";"+fmt.Sprintf(fillTenants, tenants)).ReadAll(); err != nil {
		return m, err
	}
	db.columns = ", columns: {tenant: tenant_id}"
	db.sections = "defaults: {network: {allow: [\"127.0.0.0/8\"]}}\n"
	var endpoints []string
	if reg == nil {
		endpoints = append(endpoints, l.endpoint("all", `tenant: "*"`))
	}
	s, err := db.walhook(ctx, db.slot+"-start", endpoints...)
	if err != nil {
		return m, err
	}
	if reg != nil {
		err = db.register(ctx, reg)
	}
	if err != nil {
		return m, fmt.Errorf("%w; the end of walhook's log: %s", err, s.tail())
	}
	if _, err := s.end(); err != nil {
		return m, err
	}
	e := expectation{First: l.takeIDs(f.rows), Count: f.rows, Target: int64(f.rows * matches), Keys: int64(f.keys), Signed: true}
	if err := db.fill(ctx, e.First, f.rows, f.per, f.keys, f.size); err != nil {
		return m, err
	}
	if m, err = db.deliver(ctx, db.slot+"-drain", e, nil, endpoints...); err != nil {
		return m, err
	}
	return m, db.drop(ctx)
}

// register inserts the endpoints, and waits until walhook has them.
func (db *database) register(ctx context.Context, reg *registry) error {
	_, err := db.conn.Exec(ctx, fmt.Sprintf(`
insert into walhook.endpoints (id, url, tenant, events, secrets)
select 'e' || i, $1::text || %s, 'tenant-' || i %% %d, %s, array[$2::text]
from generate_series(0, %d) i`, reg.url, reg.tenants, reg.events, registeredEndpoints-1), "http://"+db.lab.addr, secret())
	if err != nil {
		return fmt.Errorf("register endpoints: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	err = db.settled(ctx)
	if err != nil {
		return err
	}
	var valid int
	var why string
	if err := db.conn.QueryRow(ctx, "select count(*) filter (where status = 'enabled'), coalesce(max(status_reason), '') from walhook.endpoints").Scan(&valid, &why); err != nil {
		return err
	}
	if valid != registeredEndpoints {
		return fmt.Errorf("%d of %d endpoints are valid: %s", valid, registeredEndpoints, why)
	}
	return nil
}

// settled waits until walhook has confirmed all that is in the WAL now.
func (db *database) settled(ctx context.Context) error {
	var now string
	if err := db.conn.QueryRow(ctx, "select pg_current_wal_insert_lsn()::text").Scan(&now); err != nil {
		return err
	}
	return eventually(ctx, "settle", func() (done bool, err error) {
		err = db.conn.QueryRow(ctx, "select confirmed_flush_lsn >= $2::text::pg_lsn from pg_replication_slots where slot_name = $1", db.slot, now).Scan(&done)
		return done, err
	})
}
