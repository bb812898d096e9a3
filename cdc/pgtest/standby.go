package pgtest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strconv"

	"github.com/jackc/pgx/v5/pgconn"
)

// Standby makes a physical hot standby of a running server, which streams from it through a
// physical slot of its own: standby_1 for the first, standby_2 for the next. It has the
// primary's settings, hot_standby_feedback, and then config's; what the primary waits for is not
// among them, because none of it would be there after a promotion. The returned server answers
// queries; the primary may be closed before or after it.
func (s *Server) Standby(ctx context.Context, config Config) (*Server, error) {
	ctx, cancel := bounded(ctx)
	defer cancel()
	s.mu.Lock()
	s.standbys++
	slot := fmt.Sprintf("standby_%d", s.standbys)
	settings := maps.Clone(s.settings)
	s.mu.Unlock()

	delete(settings, "synchronized_standby_slots")
	delete(settings, "synchronous_standby_names")
	settings["hot_standby_feedback"] = "on"
	settings["wal_retrieve_retry_interval"] = "200ms" // from 5 s: how soon it is back after a cut
	settings["primary_conninfo"] = fmt.Sprintf("host=127.0.0.1 port=%d user=postgres dbname=postgres application_name=%s", s.port, slot)
	settings["primary_slot_name"] = slot
	maps.Copy(settings, config.Settings)
	config.Settings = settings
	if config.Bin == "" {
		config.Bin = s.bin
	}
	standby, err := prepare(config)
	if err != nil {
		return nil, fmt.Errorf("start standby: %w", err)
	}
	err = s.copyTo(ctx, standby, slot)
	if err == nil {
		err = standby.startOnFreePort(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start standby: %w", err), standby.Close())
	}
	return standby, nil
}

// FailoverStandby is Standby by the book for failover slots, which Postgres has from 17 on: the
// standby keeps a copy of each of them, and the primary's logical walsenders send nothing that
// the standby does not have. FailoverReady tells when a slot would survive.
func (s *Server) FailoverStandby(ctx context.Context, config Config) (*Server, error) {
	settings := map[string]string{"sync_replication_slots": "on"}
	maps.Copy(settings, config.Settings)
	config.Settings = settings
	standby, err := s.Standby(ctx, config)
	if err != nil {
		return nil, err
	}
	standby.mu.Lock()
	slot := standby.settings["primary_slot_name"]
	standby.mu.Unlock()
	if err := s.Set(ctx, map[string]string{"synchronized_standby_slots": slot}); err != nil {
		return nil, errors.Join(fmt.Errorf("start standby: %w", err), standby.Close())
	}
	return standby, nil
}

// FailoverReady tells whether a logical slot would survive the promotion of this standby now. The
// copy of a slot becomes lasting only when the primary's own has moved after the copy was made,
// so: when its reader confirms something behind a pg_log_standby_snapshot(), which a server does
// by itself every 15 s.
func (s *Server) FailoverReady(ctx context.Context, slot string) (bool, error) {
	n, err := s.query(ctx, "select count(*) from pg_replication_slots where slot_name = '"+slot+
		"' and synced and not temporary and invalidation_reason is null")
	if err != nil {
		return false, fmt.Errorf("look for slot %s on the standby: %w", slot, err)
	}
	return n == "1", nil
}

// Version is server_version_num, 150018 for 15.18.
func (s *Server) Version(ctx context.Context) (int, error) {
	version, err := s.query(ctx, "show server_version_num")
	if err != nil {
		return 0, fmt.Errorf("ask for the version: %w", err)
	}
	return strconv.Atoi(version)
}

// copyTo takes a base backup by the functions of the manual's "Making a Base Backup Using the
// Low Level API", because the smallest builds of Postgres come without pg_basebackup. The slot
// keeps the WAL that the copy needs to become whole.
func (s *Server) copyTo(ctx context.Context, standby *Server, slot string) error {
	conn, err := pgconn.Connect(ctx, s.URL())
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	start, stop := "pg_backup_start('pgtest', true)", "pg_backup_stop(false)"
	if version, err := queryOn(ctx, conn, "show server_version_num"); err != nil {
		return err
	} else if n, _ := strconv.Atoi(version); n < 150000 {
		start, stop = "pg_start_backup('pgtest', true, false)", "pg_stop_backup(false)"
	}
	if _, err := queryOn(ctx, conn, "select pg_create_physical_replication_slot('"+slot+"', true)"); err != nil {
		return err
	}
	if _, err := queryOn(ctx, conn, "select "+start); err != nil {
		return err
	}
	if err := copyData(s.DataDir(), standby.DataDir(), standby.owner); err != nil {
		return fmt.Errorf("copy data: %w", err)
	}
	label, err := queryOn(ctx, conn, "select labelfile from "+stop)
	if err != nil {
		return err
	}
	for name, content := range map[string]string{"backup_label": label, "standby.signal": ""} {
		path := filepath.Join(standby.DataDir(), name)
		if err := errors.Join(os.WriteFile(path, []byte(content), 0o600), give(path, standby.owner)); err != nil {
			return err
		}
	}
	return nil
}

// notCopied are the directories that the manual says to leave out of a base backup, and the files.
var (
	notCopied      = map[string]bool{"pg_wal": true, "pg_replslot": true, "pg_dynshmem": true, "pg_notify": true, "pg_serial": true, "pg_snapshots": true, "pg_stat_tmp": true, "pg_subtrans": true}
	notCopiedFiles = map[string]bool{"postmaster.pid": true, "postmaster.opts": true}
)

// copyData copies a data directory while its server works on it: files come and go, and a
// page may be torn, which replaying the WAL since the backup's start mends.
func copyData(from, to string, owner *owner) error {
	err := filepath.WalkDir(from, func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, relative)
		switch {
		case entry.IsDir():
			if err := errors.Join(os.Mkdir(target, 0o700), give(target, owner)); err != nil {
				return err
			}
			if notCopied[relative] {
				return fs.SkipDir
			}
			return nil
		case notCopiedFiles[relative] || !entry.Type().IsRegular():
			return nil
		}
		content, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return errors.Join(err, os.WriteFile(target, content, 0o600), give(target, owner))
	})
	// The server wants it there, and nothing in it.
	status := filepath.Join(to, "pg_wal", "archive_status")
	return errors.Join(err, os.Mkdir(status, 0o700), give(status, owner))
}

// Promote makes a standby a primary, and returns when it takes writes.
func (s *Server) Promote(ctx context.Context) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	if promoted, err := s.query(ctx, "select pg_promote(true, 60)"); err != nil {
		return fmt.Errorf("promote: %w", err)
	} else if promoted != "t" {
		return errors.New("promote: not done after a minute")
	}
	return nil
}
