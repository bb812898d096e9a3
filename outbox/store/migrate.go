package store

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"
)

// ErrNewerSchema is what Migrate answers where a newer walhook has migrated the schema.
var ErrNewerSchema = errors.New("the schema walhook is newer than this program")

// Newer is an ErrNewerSchema that tells the versions.
func Newer(version int) error {
	return fmt.Errorf("%w: it is at version %d, this program at %d", ErrNewerSchema, version, SchemaVersion())
}

// migrateTimeout is for the statements and for another instance that migrates first.
const migrateTimeout = 5 * time.Minute

// Migrations are sql/0001_….sql and so on. They only go forward, only add, and each can be run
// twice, as SetupSQL does.
//
//go:embed sql/*.sql
var migrationFiles embed.FS

// migrations returns the texts; the first is version 1.
func migrations() []string {
	names, err := fs.Glob(migrationFiles, "sql/*.sql") // in the order of their names
	if err != nil {
		panic(err)
	}
	texts := make([]string, len(names))
	for i, name := range names {
		text, err := migrationFiles.ReadFile(name)
		if err != nil || !strings.HasPrefix(name, fmt.Sprintf("sql/%04d_", i+1)) {
			panic(fmt.Sprintf("migration %s stands where version %d is due: %v", name, i+1, err))
		}
		texts[i] = string(text)
	}
	return texts
}

// SchemaVersion is the version of the schema walhook that this program was written for.
func SchemaVersion() int { return len(migrations()) }

const lockMigrations = `
select pg_advisory_xact_lock(hashtextextended('walhook.schema_migrations', 0))`

const recordMigration = `
insert into walhook.schema_migrations (version)
values (%d)
on conflict do nothing`

// SetupSQL is the text that makes the schema walhook with its tables, or brings it up to date;
// running it again changes nothing. GrantSQL lets a role that does not own them work with them.
func SetupSQL() string {
	var b strings.Builder
	fmt.Fprintf(&b, "-- The schema walhook, version %d.\nbegin;\n%s;\n\ncreate schema if not exists walhook;\n", SchemaVersion(), lockMigrations)
	for i, text := range migrations() {
		fmt.Fprintf(&b, "\n%s"+recordMigration+";\n", text, i+1)
	}
	b.WriteString("\ncommit;\n")
	return b.String()
}

// GrantSQL is the text that gives the role what it needs of the schema walhook, and no more.
// Migrations of later versions are then for the owner to run.
func GrantSQL(role string) string {
	r := pgx.Identifier{role}.Sanitize()
	return "grant usage on schema walhook to " + r + ";\n" +
		"grant select, insert, update, delete on all tables in schema walhook to " + r + ";\n" +
		"grant execute on all functions in schema walhook to " + r + ";\n"
}

// Migrate brings the schema to this program's version. It needs no right to create anything
// where that is its version already. Two instances may call it at once.
func (s *Store) Migrate(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, migrateTimeout)
	defer cancel()
	err := pgx.BeginTxFunc(ctx, s.pool, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(tx pgx.Tx) error {
		return s.migrate(ctx, tx)
	})
	if err != nil && !errors.Is(err, ErrNewerSchema) {
		return fmt.Errorf("migrate schema walhook: %w", err)
	}
	return err
}

func (s *Store) migrate(ctx context.Context, tx pgx.Tx) error {
	texts := migrations()
	at, err := schemaVersion(ctx, tx)
	if err != nil {
		return err
	}
	if at < len(texts) {
		if _, err := tx.Exec(ctx, lockMigrations); err != nil {
			return fmt.Errorf("lock: %w", err)
		}
		if at, err = schemaVersion(ctx, tx); err != nil { // another may have been first
			return err
		}
	}
	if at > len(texts) {
		return Newer(at)
	}
	if at == len(texts) {
		return nil
	}
	// A table is altered once nobody is in a transaction with it, and whoever comes meanwhile waits
	// behind us: so not for long, and not for a process that was stopped.
	if _, err := tx.Exec(ctx, "set local lock_timeout = '10s'"); err != nil {
		return fmt.Errorf("settings: %w", err)
	}
	if _, err := tx.Exec(ctx, endFrozen, s.silence.Seconds()); err != nil {
		return fmt.Errorf("end frozen sessions: %w", err)
	}
	// Asked first: create … if not exists wants the right to create even where it does nothing.
	var exists bool
	if err := tx.QueryRow(ctx, "select to_regnamespace('walhook') is not null").Scan(&exists); err != nil {
		return fmt.Errorf("look for schema: %w", err)
	}
	if !exists {
		if _, err := tx.Exec(ctx, "create schema walhook"); err != nil {
			return fmt.Errorf("create schema: %w", err)
		}
	}
	for v := at + 1; v <= len(texts); v++ {
		sql := texts[v-1] + fmt.Sprintf(recordMigration, v)
		if _, err := tx.Conn().PgConn().Exec(ctx, sql).ReadAll(); err != nil {
			return fmt.Errorf("to version %d: %w", v, err)
		}
	}
	s.log.Info("schema migrated", zap.Int("from", at), zap.Int("to", len(texts)))
	return nil
}

// schemaVersion is zero where there is no schema.
func schemaVersion(ctx context.Context, tx pgx.Tx) (version int, err error) {
	var exists bool
	if err := tx.QueryRow(ctx, "select to_regclass('walhook.schema_migrations') is not null").Scan(&exists); err != nil {
		return 0, fmt.Errorf("look for version: %w", err)
	}
	if !exists {
		return 0, nil
	}
	err = tx.QueryRow(ctx, "select coalesce(max(version), 0) from walhook.schema_migrations").Scan(&version)
	if err != nil {
		return 0, fmt.Errorf("read version: %w", err)
	}
	return version, nil
}
