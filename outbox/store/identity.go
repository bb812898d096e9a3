package store

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Identity is whose checkpoint it is.
type Identity struct {
	SystemIdentifier string // of the cluster, as IDENTIFY_SYSTEM tells it
	Database         string
	Instance         string
	Hosts            string // of the URL, as host:port,host:port; empty not known
	Server           string // the server's own address:port, or the port of one that is reached by a unix socket; empty not known
}

func (i Identity) String() string {
	text := fmt.Sprintf("instance %s of database %s in cluster %s", i.Instance, i.Database, i.SystemIdentifier)
	if i.Hosts != "" && i.Server != "" {
		text += fmt.Sprintf(" on server %s behind %s", i.Server, i.Hosts)
	}
	return text
}

// Differs names what of stored makes it another's checkpoint; nothing where it is ours. The
// files of a cluster may be copied, identifier and all: then neither the URL's hosts nor the server's own
// address are those that are stored. One of them alone changes when a proxy is put in front, when a
// pod moves, and when one of the URL's hosts takes over from another.
func (i Identity) Differs(stored Identity) (what []string) {
	if i.SystemIdentifier != stored.SystemIdentifier {
		what = append(what, "cluster")
	}
	if i.Database != stored.Database {
		what = append(what, "database")
	}
	if i.Instance != stored.Instance {
		what = append(what, "instance")
	}
	if i.isElsewhere(stored) {
		what = append(what, "server")
	}
	return what
}

func (i Identity) isElsewhere(stored Identity) bool {
	if i.Hosts == "" || i.Server == "" || stored.Hosts == "" || stored.Server == "" || i.Server == stored.Server {
		return false
	}
	known := strings.Split(stored.Hosts, ",")
	return !slices.ContainsFunc(strings.Split(i.Hosts, ","), func(host string) bool { return slices.Contains(known, host) })
}

// CopyError is what Claim answers where a checkpoint was written by another instance, in another
// database or on another server: this one is a restore or a copy, and may be about to send again what the
// original sends. Nothing was changed.
type CopyError struct {
	Slot   string   // of the checkpoint
	Stored Identity // what the checkpoint says
	Here   Identity // where we are

	more []Identity // of all slots' checkpoints that are not ours, with Stored
}

func (e *CopyError) Error() string {
	return fmt.Sprintf("the checkpoint of slot %s is of %s, but this is %s: another %s; to go on in its place run: %s",
		e.Slot, e.Stored, e.Here, strings.Join(e.Here.Differs(e.Stored), ", another "), e.AdoptSQL())
}

// AdoptSQL is the SQL after which Claim succeeds, for all checkpoints and all that differs.
// Positions of another cluster or database mean nothing here, so then the slot begins anew; what is
// parked stays and is sent.
func (e *CopyError) AdoptSQL() string {
	var sql, set []string
	for _, stored := range append(slices.Clone(e.more), e.Stored) {
		what := e.Here.Differs(stored)
		if slices.Contains(what, "cluster") || slices.Contains(what, "database") {
			sql = append(sql, fmt.Sprintf("delete from walhook.checkpoints where system_identifier <> %s or database <> %s;",
				literal(e.Here.SystemIdentifier), literal(e.Here.Database)))
			continue
		}
		if slices.Contains(what, "instance") {
			set = append(set, "instance = "+literal(e.Here.Instance))
		}
		if slices.Contains(what, "server") {
			set = append(set, "hosts = null, server = null")
		}
	}
	slices.Sort(set)
	if set = slices.Compact(set); len(set) > 0 {
		sql = append(sql, "update walhook.checkpoints set "+strings.Join(set, ", ")+";")
	}
	return strings.Join(slices.Compact(sql), " ")
}

func literal(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }

// ErrOtherServer is what Claim answers where the replication connection and ours lead to
// different clusters.
var ErrOtherServer = errors.New("database.url and database.replication_url lead to different clusters")

// sameServer compares the cluster of our connections with the one of the slot's.
func (s *Store) sameServer(ctx context.Context, systemIdentifier string) error {
	var ours string
	err := s.pool.QueryRow(ctx, "select system_identifier::text from pg_control_system()").Scan(&ours)
	var refused *pgconn.PgError
	const insufficientPrivilege = "42501" // everybody may, unless somebody revoked it
	if errors.As(err, &refused) && refused.Code == insufficientPrivilege {
		return nil
	}
	if err != nil {
		return fmt.Errorf("identify server: %w", err)
	}
	if ours != systemIdentifier {
		return fmt.Errorf("%w: %s and %s", ErrOtherServer, ours, systemIdentifier)
	}
	return nil
}

const identify = `
select current_database(), coalesce(host(inet_server_addr()), ''), current_setting('port')`

// identify tells where the connection has led us.
func (s *Store) identify(ctx context.Context, conn *pgx.Conn, systemIdentifier string) (Identity, error) {
	here := Identity{SystemIdentifier: systemIdentifier, Instance: s.instance, Hosts: hostsOf(conn.Config())}
	var address, port string
	if err := conn.QueryRow(ctx, identify).Scan(&here.Database, &address, &port); err != nil {
		return Identity{}, fmt.Errorf("identify database: %w", err)
	}
	if here.Server = port; address != "" {
		here.Server = net.JoinHostPort(address, port)
	}
	return here, nil
}

// hostsOf are the hosts of a URL. The driver lists one of them more than once where it may try it
// with TLS and without.
func hostsOf(c *pgx.ConnConfig) string {
	hosts := []string{net.JoinHostPort(c.Host, strconv.Itoa(int(c.Port)))}
	for _, f := range c.Fallbacks {
		hosts = append(hosts, net.JoinHostPort(f.Host, strconv.Itoa(int(f.Port))))
	}
	slices.Sort(hosts)
	return strings.Join(slices.Compact(hosts), ",")
}
