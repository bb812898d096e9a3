package cdc

import (
	"context"
	"fmt"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/zap"
)

// failoverVersion is the first server whose slots can survive the promotion of a standby.
const failoverVersion = 170000

// keepOnFailover makes a slot from before into one that standbys take over. There is no SQL for it,
// only this replication command of version 17.
func (s *Stream) keepOnFailover(ctx context.Context, conn *pgconn.PgConn, sv *Survey, slot *Slot) {
	if !s.cfg.Failover || sv.Version < failoverVersion || slot.Failover || slot.Temporary || slot.ActivePID != 0 {
		return
	}
	if _, err := conn.Exec(ctx, "ALTER_REPLICATION_SLOT "+quoteName(slot.Name)+" (FAILOVER true)").ReadAll(); err != nil {
		s.log.Warn("the slot could not be made one that standbys take over", zap.Error(err))
		return
	}
	s.log.Info("standbys take the slot over from now on, where they are set up to", zap.String("slot", slot.Name))
}

// StandbyHost is what one of the hosts of the URL says of itself, where it is a standby.
type StandbyHost struct {
	Host     string
	Reached  error // nil: it was asked
	SlotSync bool  // sync_replication_slots
	Feedback bool  // hot_standby_feedback
	Physical string
	Conninfo string // primary_conninfo; empty where the role may not see it
	Database string
	Slot     *Slot // its copy of ours
}

const standbySQL = `
select current_setting('sync_replication_slots', true) = 'on', current_setting('hot_standby_feedback') = 'on',
       coalesce(current_setting('primary_slot_name', true), ''),
       coalesce((select setting from pg_settings where name = 'primary_conninfo'), ''), current_database()`

// lookAtStandbys asks the hosts of the URL that are in recovery.
func (cfg *Config) lookAtStandbys(ctx context.Context) []StandbyHost {
	c, err := cfg.parse()
	if err != nil {
		return nil
	}
	var out []StandbyHost
	seen := []string{}
	hosts := append([]*pgconn.FallbackConfig{{Host: c.Host, Port: c.Port, TLSConfig: c.TLSConfig}}, c.Fallbacks...)
	if !slices.ContainsFunc(hosts, func(h *pgconn.FallbackConfig) bool { return h.Host != c.Host || h.Port != c.Port }) {
		return nil
	}
	for _, h := range hosts {
		where := net.JoinHostPort(h.Host, strconv.Itoa(int(h.Port)))
		if slices.Contains(seen, where) {
			continue
		}
		seen = append(seen, where)
		one := c.Copy()
		one.Host, one.Port, one.TLSConfig = h.Host, h.Port, h.TLSConfig
		one.Fallbacks, one.ValidateConnect = nil, nil
		for _, f := range hosts { // its own way without TLS, where sslmode has one
			if f != h && f.Host == h.Host && f.Port == h.Port {
				one.Fallbacks = append(one.Fallbacks, f)
			}
		}
		if st := lookAtStandby(ctx, one, cfg.Slot); st != nil {
			st.Host = where
			out = append(out, *st)
		}
	}
	return out
}

// lookAtStandby is nil where the host is no standby.
func lookAtStandby(ctx context.Context, c *pgx.ConnConfig, slot string) *StandbyHost {
	st := &StandbyHost{}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := pgx.ConnectConfig(ctx, c)
	if err != nil {
		st.Reached = redact(err)
		return st
	}
	defer closeSQL(conn)
	var recovering bool
	if err := conn.QueryRow(ctx, "select pg_is_in_recovery()").Scan(&recovering); err != nil || !recovering {
		return nil
	}
	var on *bool
	if st.Reached = conn.QueryRow(ctx, standbySQL).Scan(&on, &st.Feedback, &st.Physical, &st.Conninfo, &st.Database); st.Reached != nil {
		return st
	}
	st.SlotSync = on != nil && *on
	st.Slot, st.Reached = readSlot(ctx, conn, slot)
	return st
}

// ready tells whether the stream would go on after the standby's promotion, and else why not.
func (st *StandbyHost) ready(p Provider) (bool, string) {
	switch {
	case st.Reached != nil:
		return false, "it cannot be asked: " + st.Reached.Error()
	case !st.SlotSync:
		return false, p.standby(slotSyncParameter()) + " (with hot_standby_feedback, primary_slot_name, and a dbname in primary_conninfo)"
	case !st.Feedback:
		return false, p.standby(feedbackParameter())
	case st.Physical == "":
		return false, p.standby(parameter{name: "primary_slot_name", value: "'<a physical slot of the primary>'", number: "<a physical slot of the primary>"})
	case st.Conninfo != "" && !namesDatabase(st.Conninfo):
		return false, p.standby(parameter{name: "primary_conninfo", value: "'<as it is> dbname=" + st.Database + "'", number: "<as it is> dbname=" + st.Database})
	case st.Slot == nil:
		return false, "the slot has not come there yet; it does within seconds where primary_conninfo names a dbname"
	case !st.Slot.usable():
		return false, "its copy of the slot is invalid (" + st.Slot.Invalid + ")"
	case !st.Slot.Synced || st.Slot.Temporary:
		return false, "its copy of the slot is not lasting yet: it becomes so when walhook has confirmed something newer"
	}
	return true, ""
}

var (
	quotedValue = regexp.MustCompile(`'(\\.|[^'\\])*'`)
	namedDB     = regexp.MustCompile(`(^|\s)dbname\s*=\s*\S`)
)

// namesDatabase tells whether a connection string, whose values may hold anything, has a dbname.
func namesDatabase(conninfo string) bool {
	return strings.Contains(conninfo, "://") || namedDB.MatchString(quotedValue.ReplaceAllString(conninfo, "v"))
}

// waitable are the physical slots to be named in synchronized_standby_slots. One that nobody uses, as a
// backup or a standby of old leaves it, would stop everything.
func (a *Around) waitable() []string {
	var slots []string
	for i := range a.Standbys {
		if slot := a.Standbys[i].Physical; slot != "" && slices.Contains(a.Attached, slot) {
			slots = append(slots, slot)
		}
	}
	switch {
	case len(slots) > 0:
		return slots
	case len(a.Attached) > 0:
		return a.Attached
	}
	return a.Physical
}

// judgeFailover tells what a failover would cost.
func (s *Survey) judgeFailover(cfg *Config, ok func(string, string, ...any), warn func(string, string, string)) {
	a, p := s.Around, s.advise(cfg)
	if len(a.Physical) == 0 && len(a.Standbys) == 0 {
		return // no standby in sight
	}
	if s.Version < failoverVersion {
		warn("failover", "a promoted standby will not have the slot: before Postgres 17 slots stay behind",
			"walhook then says so and sends again from the outbox what may have been missed, by itself with cdc.recover: auto; or keep the slot by Patroni's permanent slots or the extension pg_failover_slots")
		return
	}
	for i := range a.Standbys {
		st := &a.Standbys[i]
		if ready, why := st.ready(p); ready {
			ok("failover", "standby %s is ready to take slot %s over", st.Host, cfg.Slot)
		} else {
			warn("failover", "standby "+st.Host+" is not ready to take slot "+cfg.Slot+" over", why)
		}
	}
	if s.Slot != nil && !s.Slot.Failover {
		warn("failover", "slot "+s.Slot.Name+" is not one that standbys take over", "walhook makes it one when it takes the slot the next time (cdc.failover: auto)")
	}
	if strings.TrimSpace(s.StandbyNames) == "" {
		warn("failover", "synchronized_standby_slots is empty", "a standby that is promoted may lack what walhook has sent or parked already; on the primary: "+p.set(standbySlotsParameter(a.waitable())))
		return
	}
	for _, name := range strings.Split(s.StandbyNames, ",") {
		name = strings.Trim(strings.TrimSpace(name), `"`)
		if !slices.Contains(a.Attached, name) {
			warn("failover", "no standby is attached to slot "+name+", which synchronized_standby_slots names",
				"nothing is sent until it is back: start the standby, or take it out of synchronized_standby_slots on the primary")
		}
	}
}

const physicalSQL = `
select slot_name, active
from pg_replication_slots
where slot_type = 'physical'
and not temporary
order by slot_name`

func (a *Around) readPhysical(ctx context.Context, conn *pgx.Conn) error {
	rows, err := conn.Query(ctx, physicalSQL)
	if err != nil {
		return fmt.Errorf("read physical slots: %w", err)
	}
	var name string
	var active bool
	_, err = pgx.ForEachRow(rows, []any{&name, &active}, func() error {
		a.Physical = append(a.Physical, name)
		if active {
			a.Attached = append(a.Attached, name)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("read physical slots: %w", err)
	}
	return nil
}

// standbyWait is the walsender's wait event while the standbys of synchronized_standby_slots have not got what
// it is about to send.
const standbyWait = "WaitForStandbyConfirmation"

// standbyLook is how often the wait for a standby is looked at.
const standbyLook = time.Second

// awaitStandby returns when the walsender does not wait for a standby, and says meanwhile that it does.
func (s *Stream) awaitStandby(ctx context.Context, conn *pgx.Conn, sv *Survey) error {
	said := false
	defer func() { // also where the look failed: the next one says it again
		if said && ctx.Err() == nil {
			s.setStatus(Streaming, nil)
		}
	}()
	for sv.Slot != nil && sv.Slot.Wait == standbyWait && sleep(ctx, standbyLook) {
		slot, err := readSlot(ctx, conn, s.cfg.Slot)
		if err != nil {
			return err
		}
		before := sv.Slot
		if sv.Slot = slot; slot == nil || slot.Wait != standbyWait || said || slot.ActivePID != before.ActivePID {
			continue
		}
		said = true // twice in a row: not only for a moment
		s.setStatus(Waiting, &Fault{
			State:  Waiting,
			Reason: "Postgres sends nothing until the standbys of synchronized_standby_slots (" + sv.StandbyNames + ") have it",
			Remedy: "start the standby, or take it out of synchronized_standby_slots on the primary",
		})
	}
	return nil
}
