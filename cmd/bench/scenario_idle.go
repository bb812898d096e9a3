package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// What other tables get in scenario 10, in a second.
const (
	otherRows = 1000
	otherSize = 1000
)

// idle is scenario 10: nothing for walhook to do, first in a database at rest, then in one where others write.
func idle(ctx context.Context, l *lab) error {
	db, err := l.prepared(ctx, l.endpoint("idle"))
	if err != nil {
		return err
	}
	for _, statement := range []string{
		"create table other (id bigserial primary key, filler text)",
		"alter database " + db.slot + " set log_min_messages = log",
		"alter database " + db.slot + " set log_statement = 'all'",
	} {
		if _, err := db.conn.Exec(ctx, statement); err != nil {
			return err
		}
	}
	s, err := db.walhook(ctx, db.slot+"-idle", l.endpoint("idle"))
	if err != nil {
		return err
	}
	// What belongs to the start is over.
	err = db.settled(ctx)
	if err == nil {
		err = until(ctx, time.Now().Add(2*time.Second))
	}
	if err == nil {
		err = db.idleFor(ctx, s, "at rest", nil)
	}
	if err == nil {
		err = db.idleFor(ctx, s, "others write", db.others)
	}
	if err != nil {
		return fmt.Errorf("%w; the end of walhook's log: %s", err, s.tail())
	}
	if _, err := s.end(); err != nil {
		return err
	}
	return db.drop(ctx)
}

// idleFor looks on for a minute.
func (db *database) idleFor(ctx context.Context, s *sidecar, of string, others func(context.Context) error) error {
	l := db.lab
	span := l.span(time.Minute)
	before, known := s.used()
	logged, err := os.Stat(l.server.LogFile())
	if err != nil {
		return err
	}
	watch, err := db.watchWAL(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, span)
	defer cancel()
	wrote := make(chan error, 1)
	go func() {
		if others == nil {
			wrote <- nil
			return
		}
		wrote <- others(ctx)
	}()
	most := before.resident
	for until(ctx, time.Now().Add(time.Second)) == nil {
		u, _ := s.used()
		most = max(most, u.resident)
	}
	err = <-wrote
	wal, watched := watch()
	if err = errors.Join(err, watched, s.ended()); err != nil {
		return err
	}
	after, _ := s.used()
	cpu := milliseconds(after.cpu - before.cpu)
	if !known { // and so told only when it has ended
		cpu, most = nan, 0
	}
	statements, err := statementsSince(l.server.LogFile(), logged.Size())
	if err != nil {
		return err
	}
	times := map[string]int{}
	for _, text := range statements {
		times[text]++
	}
	for _, text := range slices.Sorted(maps.Keys(times)) {
		l.say("%s: %d × %.100s", of, times[text], text)
	}
	minutes := span.Minutes()
	rss := atMost(25)
	l.report.add(of, "RSS at most", mebibytes(most), "MiB", rss)
	l.report.add(of, "CPU in a minute", cpu/minutes, "ms", demand{})
	if others == nil {
		l.report.add(of, "queries in a minute", float64(len(statements))/minutes, "", atMost(queriesInAMinute))
		return nil
	}
	l.report.add(of, "queries in a minute", float64(len(statements))/minutes, "", demand{})
	wal.add(l.report, of, "", atMost(16))
	return nil
}

// queriesInAMinute are those of two looks at the catalogue, a dozen statements each, and a few besides.
const queriesInAMinute = 30

// others writes to another table until ctx ends.
func (db *database) others(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, db.url)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	const beat = 20 * time.Millisecond
	each := int(otherRows * beat / time.Second)
	filler := padding(otherSize)
	for due := time.Now(); until(ctx, due) == nil; due = due.Add(beat) {
		// The last one is not cut short.
		if _, err := conn.Exec(context.WithoutCancel(ctx), "insert into other (filler) select $1 from generate_series(1, $2::int)", filler, each); err != nil {
			return fmt.Errorf("write to another table: %w", err)
		}
	}
	return nil
}

// statementsSince are those of walhook in Postgres' log from an offset on.
func statementsSince(file string, offset int64) ([]string, error) {
	log, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return statements(log[min(offset, int64(len(log))):]), nil
}

func statements(log []byte) (all []string) {
	open := false // the lines of a statement but the first begin with a tab
	for line := range bytes.Lines(log) {
		if line[0] == '\t' {
			if open {
				all[len(all)-1] = strings.TrimSpace(all[len(all)-1] + " " + strings.TrimSpace(string(line)))
			}
			continue
		}
		open = false
		who, what, found := strings.Cut(strings.TrimSpace(string(line)), ": LOG:  ")
		if !found || !strings.HasPrefix(who, "walhook") {
			continue
		}
		kind, text, _ := strings.Cut(what, ":")
		if kind == "statement" || strings.HasPrefix(kind, "execute ") {
			all = append(all, strings.TrimSpace(text))
			open = true
		}
	}
	return all
}
