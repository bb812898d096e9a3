package cdc

import (
	"context"
	"fmt"
	"time"
)

// Book is what is written down of a slot, in the same database, so that a start knows what the
// slot was before it believes what it is. None of its methods needs to hold the slot.
type Book interface {
	// Read is what is written down; nil where nothing is. A *Fault says that it was written in
	// another database than the one of systemID: this is a copy, and must send nothing.
	Read(ctx context.Context, systemID string) (*Record, error)
	// Announce writes down, before the slot is made, that its first snapshot is to be taken.
	Announce(ctx context.Context, s Session) error
	// Mark writes down why committed rows may be missing from the stream. The first reason stays.
	Mark(ctx context.Context, gap string) error
	// Proven says that publication and tables were found as they should be by a look that began at asOf.
	Proven(asOf time.Time)
}

// Record is what a Book says of a slot.
type Record struct {
	LSN    LSN               // everything that committed below is settled; zero: the first snapshot is not finished
	Xmin   uint64            // every transaction id below it had ended before LSN; zero is not known
	Proven uint64            // Xmin as of the last look that found publication and tables as they should be
	Gap    string            // why committed rows may be missing from the stream; empty where nothing is known
	Tables map[string]uint32 // OIDs of the published tables by their names as SQL takes them, and their entries in the publication; nil is not known

	Mirrored bool // the sink has the rows of Config.Mirror as of LSN
}

// missed is how the rows are found that the stream may have missed.
type missed struct {
	xmin    uint64 // rows of older transactions are settled; zero is not known
	initial bool   // all rows there are, because the first snapshot was asked for
}

// Judge tells what keeps a start from taking up the stream where the record says. flushed is how
// far the WAL was flushed after the record had been read; rec is nil where there is none.
func (s *Survey) Judge(cfg *Config, rec *Record, flushed LSN) *Fault {
	const what = "what may have been missed"
	slot := s.Slot
	switch {
	case rec == nil && slot == nil:
		return nil
	case slot != nil && slot.unmade():
		return &Fault{State: Connecting, Reason: "slot " + slot.Name + " is being made by somebody else"}
	case rec == nil && !slot.usable():
		f := cfg.lostSlot(slot, nil)
		f.Remedy = fmt.Sprintf("nothing was ever read from it: select pg_drop_replication_slot(%s), and a new one is made", quoteText(slot.Name))
		return f
	case rec == nil && cfg.Snapshot:
		return &Fault{
			State:  Waiting,
			Reason: "slot " + slot.Name + " is there already, so what was in the tables before it cannot be told from what it brings, and cdc.snapshot: initial cannot be done",
			Remedy: fmt.Sprintf("let walhook make the slot: select pg_drop_replication_slot(%s); or set cdc.snapshot: never", quoteText(slot.Name)),
		}
	case rec == nil:
		return nil
	case rec.LSN == 0:
		return &Fault{State: Recovering, Reason: "the first snapshot is not finished", missed: &missed{initial: true}}
	case rec.Gap != "":
		return &Fault{State: Lost, Reason: rec.Gap + ": rows committed since may be in the outbox table only", Remedy: cfg.remedyRecover(what), missed: &missed{xmin: rec.Proven}}
	case slot == nil:
		return &Fault{
			State:  Lost,
			Reason: "slot " + cfg.Slot + " is gone, although a checkpoint at " + rec.LSN.String() + " tells of it: events since may be in the outbox table only",
			Remedy: cfg.remedyRecover(what), missed: &missed{xmin: rec.Xmin},
		}
	case !slot.usable():
		return cfg.lostSlot(slot, &missed{xmin: rec.Xmin})
	case rec.LSN > max(flushed, s.FlushLSN):
		return &Fault{
			State:  Lost,
			Reason: fmt.Sprintf("the checkpoint is at %s, but the WAL of this server ends at %s: it is another history (a restored or promoted database)", rec.LSN, max(flushed, s.FlushLSN)),
			Remedy: "`walhook run --recover=all` sends all rows of the outbox again; " + cfg.remedyNone(),
			missed: &missed{}, // transaction ids of another history tell nothing
		}
	case slot.Confirmed > rec.LSN:
		return &Fault{
			State:  Lost,
			Reason: fmt.Sprintf("slot %s stands at %s, but we have settled only up to %s: somebody else read or advanced it, and events in between may be in the outbox table only", slot.Name, slot.Confirmed, rec.LSN),
			Remedy: cfg.remedyRecover(what), missed: &missed{xmin: rec.Xmin},
		}
	}
	return nil
}

// unmade tells a logical slot that another session is making at this moment: it has a database, and
// no plugin yet.
func (s *Slot) unmade() bool { return s.Plugin == "" && s.Database != "" }

func (s *Slot) usable() bool { return s.WALStatus != "lost" && s.Invalid == "" }

func (cfg *Config) lostSlot(slot *Slot, m *missed) *Fault {
	why := slot.Invalid
	if why == "" {
		why = "its WAL was removed"
	}
	return &Fault{
		State: Lost, missed: m, Remedy: cfg.remedyRecover("what may have been missed"),
		Reason: "slot " + slot.Name + " is invalid (" + why + "): events since " + slot.Confirmed.String() + " may be in the outbox table only",
	}
}

// remedyRecover are the two ways out of a loss.
func (cfg *Config) remedyRecover(what string) string {
	return "`walhook run --recover`, or cdc.recover: auto, makes a new slot and sends " + what + "; " + cfg.remedyNone()
}

func (cfg *Config) remedyNone() string {
	remedy := "`walhook run --recover=none` goes on from now on, without it"
	if cfg.Snapshot { // what forgets the slot would have all rows of the table sent as at the first start
		return remedy
	}
	slot := quoteText(cfg.Slot)
	return fmt.Sprintf("%s, as does: select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = %s; delete from walhook.checkpoints where slot = %s", remedy, slot, slot)
}

// Drift tells what in the catalogue has kept, or may have kept, rows of a table out of the stream
// that used to stream; empty where nothing has. A table that is new to the configuration is none of it.
func (s *Survey) Drift(cfg *Config, rec *Record) string {
	p := s.Publication
	for i := range s.Tables {
		f := &s.Tables[i]
		was, known := rec.Tables[f.String()]
		entry := rec.Tables[s.entryOf(f)]
		if !known || f.OID == 0 { // what is not there is waited for; what comes in its place has another OID
			continue
		}
		switch {
		case p == nil:
			return "publication " + cfg.Publication + " was dropped"
		case !f.Published && f.OID == was:
			return "table " + f.String() + " was not in publication " + cfg.Publication + " any more"
		case f.OID != was && (f.Listed || !f.Published):
			return "table " + f.String() + " is not the one that it was (dropped and created again, or another one was renamed)"
		case f.RowFilter != "":
			return "publication " + cfg.Publication + " left out rows of " + f.String()
		case !p.Insert:
			return "publication " + cfg.Publication + " did not publish inserts"
		case !p.ViaRoot && f.Kind == 'p':
			return "publication " + cfg.Publication + " published the partitions of " + f.String() + " under their own names"
		case entry != 0 && f.Entry != 0 && f.Entry != entry:
			return "table " + f.String() + " was taken out of publication " + cfg.Publication + " or published in part, and put back"
		}
	}
	return ""
}

// tables are the OIDs of the tables that are there, and what tells their entries in the publication
// from any before or after: what was set and taken away again has left no other trace.
func (s *Survey) tables() map[string]uint32 {
	m := make(map[string]uint32, 2*len(s.Tables))
	for i := range s.Tables {
		f := &s.Tables[i]
		if f.OID != 0 {
			m[f.String()] = f.OID
		}
		if f.Entry != 0 {
			m[s.entryOf(f)] = f.Entry
		}
	}
	return m
}

// entryOf is by what name a Record has the entry of a table.
func (s *Survey) entryOf(f *Found) string {
	if s.Publication == nil {
		return ""
	}
	return f.String() + " in " + quoteName(s.Publication.Name)
}
