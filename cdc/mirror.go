package cdc

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/zap"
)

// MirrorFound is what the catalogue has of Config.Mirror.
type MirrorFound struct {
	Exists      bool // the table
	Publication bool
	Published   bool // every change of the table, by the publication
}

const mirrorSQL = `
select exists (select from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = $1 and c.relname = $2),
       exists (select from pg_publication where pubname = $3),
       exists (select from pg_publication p
               join pg_publication_tables t on t.pubname = p.pubname
               where p.pubname = $3 and t.schemaname = $1 and t.tablename = $2
               and p.pubinsert and p.pubupdate and p.pubdelete and p.pubtruncate)`

func (cfg *Config) surveyMirror(ctx context.Context, conn *pgx.Conn) (m MirrorFound, err error) {
	if cfg.Mirror == (Mirror{}) {
		return m, nil
	}
	t := cfg.Mirror.Table
	if err := conn.QueryRow(ctx, mirrorSQL, t.Schema, t.Name, cfg.Mirror.Publication).Scan(&m.Exists, &m.Publication, &m.Published); err != nil {
		return m, fmt.Errorf("read publication of %s: %w", t, err)
	}
	return m, nil
}

// SQL makes the publication of the mirrored table.
func (m Mirror) SQL() string {
	return "create publication " + quoteName(m.Publication) + " for table " + m.Table.String()
}

// SetupSQL is SQL where the publication is not there yet.
func (m Mirror) SetupSQL() string {
	return block("    if not exists (select from pg_publication where pubname = " + quoteText(m.Publication) + ") then\n" +
		"        " + m.SQL() + ";\n" +
		"    end if;")
}

// judgeMirror says whether changes of the mirrored table will come. That they do not is no fault: all
// else goes on.
func (s *Survey) judgeMirror(cfg *Config, ok func(string, string, ...any), warn func(string, string, string)) {
	const still = "until then its rows are read at a start only; as its owner: "
	m := cfg.Mirror
	switch {
	case m == (Mirror{}) || !s.Mirror.Exists:
	case s.Mirror.Published:
		ok("publication", "publication %s", m.Publication)
	case s.Mirror.Publication:
		warn("publication", "publication "+m.Publication+" does not publish all changes of "+m.Table.String(),
			still+"drop publication "+quoteName(m.Publication)+"; "+m.SQL())
	case cfg.Create && s.CreateDB:
		ok("publication", "publication %s will be created", m.Publication)
	default:
		warn("publication", "publication "+m.Publication+" does not exist, so changes of "+m.Table.String()+" are not seen", still+m.SQL())
	}
}

// publishMirror creates the publication of the mirrored table where that is allowed.
func (s *Stream) publishMirror(ctx context.Context, conn *pgx.Conn, sv *Survey) error {
	m := s.cfg.Mirror
	if sv.Mirror.Published || !sv.Mirror.Exists {
		return nil
	}
	var err error
	if s.cfg.Create && !sv.Mirror.Publication {
		_, err = conn.Exec(ctx, m.SQL())
		var pg *pgconn.PgError
		switch {
		case err == nil:
			s.log.Info("published", zap.String("publication", m.Publication), zap.Stringer("table", m.Table))
			fallthrough
		case errors.As(err, &pg) && pg.Code == "42710": // another instance was faster
			sv.Mirror.Publication, sv.Mirror.Published = true, true
			return nil
		case errors.As(err, &pg) && pg.Code == codeDenied, errors.As(err, &pg) && pg.Code == "55P03":
		default:
			return fmt.Errorf("publish %s: %w", m.Table, err)
		}
	}
	if !s.unpublished {
		s.unpublished = true
		s.log.Warn("changes of "+m.Table.String()+" are not published: its rows are read at a start only", zap.Error(err), zap.String("remedy", m.SQL()))
	}
	return nil
}

// readMirror reads the mirrored table: under the snapshot of a new slot, so that the stream goes on
// exactly there, or as it is now where there is none.
func (s *Stream) readMirror(ctx context.Context, snapshot string) ([]*Row, error) {
	conn, err := s.cfg.connectLong(ctx)
	if err != nil {
		return nil, connectFault(err)
	}
	defer closeSQL(conn)
	t := s.cfg.Mirror.Table
	f := Found{Table: t}
	var names []string
	var types []uint32
	begin := "begin isolation level repeatable read read only"
	if snapshot != "" {
		begin += "; set transaction snapshot " + quoteText(snapshot)
	}
	if _, err := conn.PgConn().Exec(ctx, begin).ReadAll(); err != nil {
		return nil, fmt.Errorf("read %s: take the slot's snapshot: %w", t, err)
	}
	err = conn.QueryRow(ctx, "select c.oid, array_agg(a.attname::text order by a.attnum), array_agg(a.atttypid order by a.attnum)"+
		" from pg_class c join pg_namespace n on n.oid = c.relnamespace join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped"+
		" where n.nspname = $1 and c.relname = $2 group by c.oid", t.Schema, t.Name).Scan(&f.OID, &names, &types)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", t, err)
	}
	columns := make([]string, len(names))
	for i, name := range names {
		f.Columns = append(f.Columns, Column{Name: name, TypeOID: types[i]})
		columns[i] = quoteName(name)
	}
	rel := f.Relation()
	rel.Mirror = true
	rows := []*Row{}
	results := conn.PgConn().Exec(ctx, "select "+strings.Join(columns, ", ")+" from "+t.String())
	defer func() { _ = results.Close() }()
	for results.NextResult() {
		r := results.ResultReader()
		for r.NextRow() {
			row := &Row{Relation: rel, Values: make([][]byte, len(columns))}
			for i, v := range r.Values() {
				if v != nil {
					row.Values[i] = append([]byte{}, v...)
				}
			}
			rows = append(rows, row)
		}
		if _, err := r.Close(); err != nil {
			return nil, fmt.Errorf("read %s: %w", t, err)
		}
	}
	return rows, results.Close()
}

// mirrorOf is the mirrored table as a new slot's snapshot has it.
func (s *Stream) mirrorOf(ctx context.Context, sv *Survey, snapshot string) (*Mirrored, error) {
	if s.cfg.Mirror == (Mirror{}) || !sv.Mirror.Exists {
		return nil, nil
	}
	s.mirrorFrom, s.mirrorGone = 0, false
	rows, err := s.readMirror(ctx, snapshot)
	return &Mirrored{Rows: rows, Live: sv.Mirror.Published}, err
}

// mirrored decides whether the session brings the changes of the mirrored table, and reads its rows
// where the sink does not have them as of start.
//
// Postgres refuses to read WAL with a publication that is younger. A slot that is older than the
// publication is therefore read without it until its checkpoint has passed the place where it was first seen.
func (s *Stream) mirrored(ctx context.Context, sv *Survey, rec *Record, start, flushed LSN) (m *Mirrored, follow bool, err error) {
	if s.cfg.Mirror == (Mirror{}) || !sv.Mirror.Exists {
		return nil, false, nil
	}
	switch {
	case !sv.Mirror.Published:
		s.mirrorFrom = 0
	case s.mirrorGone, s.mirrorFrom == 0 && (rec == nil || !rec.Mirrored):
		s.mirrorGone, s.mirrorFrom = false, flushed
	case s.mirrorFrom == 0:
		return nil, true, nil
	}
	if follow = sv.Mirror.Published && start >= s.mirrorFrom; follow {
		s.mirrorFrom = 0
	}
	rows, err := s.readMirror(ctx, "")
	return &Mirrored{Rows: rows, Live: follow}, follow, err
}

// overtaken tells whether the stream has come to where the publication of the mirrored table can be
// read, for which it has to begin anew. It has the checkpoint written for that, once.
func (r *reader) overtaken(ctx context.Context) error {
	s := r.s
	if r.follow || s.mirrorFrom == 0 || r.inTx || s.open {
		return nil
	}
	s.mu.Lock()
	told, received := s.told, s.received
	s.mu.Unlock()
	if told >= s.mirrorFrom {
		return &Fault{State: Connecting, Reason: "publication " + s.cfg.Mirror.Publication + " can be read from here on"}
	}
	if received >= s.mirrorFrom && !r.saved {
		r.saved = true
		leave, cancel := context.WithTimeout(ctx, s.cfg.MaxStall)
		defer cancel()
		s.sink.Leave(leave)
	}
	return nil
}

// ofMirror tells whether a complaint of the server is about the publication of the mirrored table,
// which is gone or younger than the WAL: the next session does without it at first.
func (s *Stream) ofMirror(message string) bool {
	return s.cfg.Mirror.Publication != "" && strings.Contains(message, s.cfg.Mirror.Publication) // in whatever quotes the server's language has
}
