package cdc

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// What follows is the SQL that a DBA runs once. Each text can be run twice; the second time
// changes nothing.

// block is PL/pgSQL whose text may hold any name.
func block(body string) string {
	tag := "$walhook$"
	for strings.Contains(body, tag) {
		tag = tag[:len(tag)-1] + "_$"
	}
	return "do " + tag + "\nbegin\n" + body + "\nend " + tag + ";\n"
}

// RoleSQL makes the role. verifier is what Postgres is to keep as its password; the role can
// log in with none where it is empty, until it is given one.
func RoleSQL(role, verifier string) string {
	password := ""
	if verifier != "" {
		password = " password " + quoteText(verifier)
	}
	return block("    if not exists (select from pg_roles where rolname = " + quoteText(role) + ") then\n" +
		"        create role " + quoteName(role) + " login" + password + ";\n" +
		"    end if;")
}

// ReplicationSQL lets the role replicate. Amazon RDS has a role for that instead of the attribute: the SQL
// looks for it itself, where the provider is not known.
func ReplicationSQL(role string, p Provider) string {
	switch p {
	case RDS:
		return p.replicate(role, 0) + ";\n"
	case Plain, "":
	default:
		return attribute(role) + ";\n"
	}
	return block("    if exists (select from pg_roles where rolname = " + quoteText(role) + " and (rolreplication or rolsuper)) then\n" +
		"        return;\n" +
		"    elsif exists (select from pg_roles where rolname = 'rds_replication') then\n" +
		"        grant rds_replication to " + quoteName(role) + ";\n" +
		"    else\n" +
		"        alter role " + quoteName(role) + " with replication;\n" +
		"    end if;")
}

// GrantSQL lets the role connect to the database it is run in, and read the tables.
func GrantSQL(role string, tables []Table) string {
	r := quoteName(role)
	sql := block("    execute format('grant connect on database %I to %I', current_database(), " + quoteText(role) + ");")
	var schemas []string
	for _, t := range tables {
		if !slices.Contains(schemas, t.Schema) {
			schemas = append(schemas, t.Schema)
			sql += "grant usage on schema " + quoteName(t.Schema) + " to " + r + ";\n"
		}
	}
	for _, t := range tables {
		sql += "grant select on table " + t.String() + " to " + r + ";\n"
	}
	return sql
}

// OwnerSQL gives the schema walhook, with all that is in it, to the role. Whoever is no
// superuser must be a member of the role for that.
func OwnerSQL(role string) string {
	r, text := quoteName(role), quoteText(role)
	id := quoteText(r) + "::regrole"
	body := `declare
    item text;
begin
    if not pg_has_role(current_user, ` + text + `, 'usage') then
        execute format('grant ` + strings.ReplaceAll(strings.ReplaceAll(r, "%", "%%"), "'", "''") + ` to %I', current_user);
    end if;
    alter schema walhook owner to ` + r + `;
    for item in
        select format('table walhook.%I', c.relname) from pg_class c
        where c.relnamespace = 'walhook'::regnamespace and c.relkind in ('r', 'p') and c.relowner <> ` + id + `
        union all
        select format('function %s', p.oid::regprocedure) from pg_proc p
        where p.pronamespace = 'walhook'::regnamespace and p.proowner <> ` + id + `
    loop
        execute format('alter %s owner to %I', item, ` + text + `);
    end loop;`
	return strings.Replace(block(body), "\nbegin\ndeclare", "\ndeclare", 1)
}

// PublicationSQL makes the publication, or has it publish what the stream needs. What it adds is
// locked first: old minor versions lose the rows of a transaction that is open meanwhile. It
// waits for one no longer than a few seconds, because everybody who writes would wait behind it.
func PublicationSQL(name string, tables []Table) string {
	n, text := quoteName(name), quoteText(name)
	var b strings.Builder
	b.WriteString("begin;\nset local lock_timeout = '5s';\n")
	lock := func(tables ...Table) string {
		if len(tables) == 0 {
			return ""
		}
		return "        lock table " + tableList(tables) + " in share row exclusive mode;\n"
	}
	var body strings.Builder
	body.WriteString("    if not exists (select from pg_publication where pubname = " + text + ") then\n" +
		lock(tables...) +
		"        " + createPublication(name, tables) + ";\n" +
		"        return;\n" +
		"    end if;\n" +
		"    if not (select pubinsert from pg_publication where pubname = " + text + ") then\n" +
		"        alter publication " + n + " set (publish = 'insert');\n" +
		"    end if;\n" +
		"    if not (select pubviaroot from pg_publication where pubname = " + text + ") then\n" +
		"        alter publication " + n + " set (publish_via_partition_root = true);\n" +
		"    end if;")
	for _, t := range tables {
		body.WriteString("\n    if not exists (select from pg_publication_tables where pubname = " + text +
			" and schemaname = " + quoteText(t.Schema) + " and tablename = " + quoteText(t.Name) + ") then\n" +
			lock(t) +
			"        " + addTables(name, []Table{t}) + ";\n" +
			"    end if;")
	}
	b.WriteString(block(body.String()) + "commit;\n")
	return b.String()
}

// ConnectionLimitSQL lets the role have that many connections.
func ConnectionLimitSQL(role string, limit int) string {
	return fmt.Sprintf("alter role %s connection limit %d", quoteName(role), limit)
}

// SlotSQL makes the slot. The stream does that by itself.
func SlotSQL(slot string) string {
	return "select pg_create_logical_replication_slot(" + quoteText(slot) + ", 'pgoutput');\n"
}

// RoleState is what LookAtRole finds.
type RoleState struct {
	Exists      bool
	Replication bool // or superuser
	Itself      bool // it is the role that looked
	Provider    Provider
	Version     int // server_version_num
}

const roleSQL = `
select current_user = $1,
       exists (select from pg_roles where rolname = $1),
       exists (select from pg_roles where rolname = $1 and (rolreplication or rolsuper))
         or exists (select from pg_roles where rolname = 'rds_replication' and pg_has_role(coalesce((select oid from pg_roles where rolname = $1), 0), oid, 'usage')),
       current_setting('server_version_num')::int`

// LookAtRole asks whether the role is there. The error is a *Fault.
func LookAtRole(ctx context.Context, url, role string) (RoleState, error) {
	var s RoleState
	conn, err := (&Config{URL: func() (string, error) { return url, nil }}).connectSQL(ctx)
	if err != nil {
		return s, connectFault(err)
	}
	defer closeSQL(conn)
	if err := conn.QueryRow(ctx, roleSQL, role).Scan(&s.Itself, &s.Exists, &s.Replication, &s.Version); err != nil {
		return s, FaultOf(fmt.Errorf("look for role: %w", err))
	}
	if s.Provider, err = providerOf(ctx, conn); err != nil {
		return s, FaultOf(err)
	}
	return s, nil
}

// Apply runs texts of SQL, each as it stands, one after the other on one connection, and tells
// of each how it ended. It stops at the first that fails.
func Apply(ctx context.Context, url string, texts []string, ended func(i int, err error)) error {
	c, err := (&Config{URL: func() (string, error) { return url, nil }}).parse()
	if err != nil {
		return FaultOf(err)
	}
	conn, err := pgx.ConnectConfig(ctx, c)
	if err != nil {
		return connectFault(err)
	}
	defer closeSQL(conn)
	for i, text := range texts {
		_, err := conn.PgConn().Exec(ctx, text).ReadAll()
		ended(i, err)
		if err != nil {
			return err
		}
	}
	return nil
}

const (
	slotOfSQL        = "select plugin, coalesce(database, ''), current_database(), coalesce(active_pid, 0) from pg_replication_slots where slot_name = $1"
	publicationOfSQL = "select pg_has_role(current_user, pubowner, 'usage') from pg_publication where pubname = $1"
	// dropLook is how often a slot that somebody holds is tried again.
	dropLook = 250 * time.Millisecond
)

// DropSlot drops the slot of cfg, and tells whether there was one. While somebody holds it, it waits,
// but no longer than wait: whoever reads from it is not disturbed. A slot that another plugin or
// database uses stays, as it is not walhook's. The error is a *Fault.
func DropSlot(ctx context.Context, cfg Config, wait time.Duration) (dropped bool, err error) {
	conn, err := cfg.connectSQL(ctx)
	if err != nil {
		return false, connectFault(err)
	}
	defer closeSQL(conn)
	for until := time.Now().Add(wait); ; {
		var plugin, database, here string
		var pid int32
		err := conn.QueryRow(ctx, slotOfSQL, cfg.Slot).Scan(&plugin, &database, &here, &pid)
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			return false, nil
		case err != nil:
			return false, FaultOf(fmt.Errorf("look for slot: %w", err))
		case plugin != "pgoutput" || database != here:
			return false, &Fault{State: Waiting, Reason: fmt.Sprintf("slot %s is of plugin %q and database %q, not walhook's", cfg.Slot, plugin, database), Remedy: "name walhook's own in cdc.slot", Config: true}
		}
		if pid == 0 {
			_, err = conn.Exec(ctx, "select pg_drop_replication_slot($1)", cfg.Slot)
			var pg *pgconn.PgError
			switch {
			case err == nil:
				return true, nil
			case errors.As(err, &pg) && pg.Code == "42704": // undefined_object: somebody was faster
				return false, nil
			case !errors.As(err, &pg) || pg.Code != "55006": // object_in_use
				return false, FaultOf(fmt.Errorf("drop slot: %w", err))
			}
		}
		if time.Now().After(until) {
			return false, &Fault{State: Waiting, Reason: fmt.Sprintf("slot %s is held by pid %d", cfg.Slot, pid), Remedy: "stop walhook first"}
		}
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-time.After(dropLook):
		}
	}
}

// DropPublications drops those of the named publications that the role may drop, and tells which
// stay because they are somebody else's. One that is not there is in neither.
func DropPublications(ctx context.Context, cfg Config, names ...string) (dropped, kept []string, err error) {
	conn, err := cfg.connectSQL(ctx)
	if err != nil {
		return nil, nil, connectFault(err)
	}
	defer closeSQL(conn)
	for _, name := range names {
		var ours bool
		err := conn.QueryRow(ctx, publicationOfSQL, name).Scan(&ours)
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			continue
		case err != nil:
			return dropped, kept, FaultOf(fmt.Errorf("look for publication: %w", err))
		case !ours:
			kept = append(kept, name)
			continue
		}
		if _, err := conn.Exec(ctx, DropPublicationSQL(name)); err != nil {
			return dropped, kept, FaultOf(fmt.Errorf("drop publication: %w", err))
		}
		dropped = append(dropped, name)
	}
	return dropped, kept, nil
}

// DropPublicationSQL drops a publication where there is one.
func DropPublicationSQL(name string) string { return "drop publication if exists " + quoteName(name) }
