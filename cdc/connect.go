package cdc

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
)

const applicationName = "walhook"

// pinned are the settings that decide how values print. A row that is read again must give
// the same bytes, or its signature changes with the role's defaults.
var pinned = map[string]string{
	"datestyle":          "ISO",
	"intervalstyle":      "postgres",
	"extra_float_digits": "3",
	"bytea_output":       "hex",
	"timezone":           "UTC",
	"client_encoding":    "UTF8",
	"search_path":        "pg_catalog",
}

func (cfg *Config) parse() (*pgx.ConnConfig, error) {
	url, err := cfg.URL()
	if err != nil {
		return nil, err
	}
	c, err := pgx.ParseConfig(url)
	if err != nil {
		return nil, err
	}
	for k, v := range pinned {
		c.RuntimeParams[k] = v
	}
	if c.RuntimeParams["application_name"] == "" {
		c.RuntimeParams["application_name"] = applicationName
	}
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = 10 * time.Second
	}
	// The fallback of a single host is its way without TLS; of a read-only one the survey tells more.
	if c.ValidateConnect == nil && slices.ContainsFunc(c.Fallbacks, func(f *pgconn.FallbackConfig) bool { return f.Host != c.Host || f.Port != c.Port }) {
		c.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	}
	return c, nil
}

// connectSQL opens an ordinary connection, for the catalogue.
func (cfg *Config) connectSQL(ctx context.Context) (*pgx.Conn, error) {
	c, err := cfg.parse()
	if err != nil {
		return nil, err
	}
	c.RuntimeParams["statement_timeout"] = "30000"
	c.RuntimeParams["lock_timeout"] = "2000"
	return pgx.ConnectConfig(ctx, c)
}

// connectLong is connectSQL for what takes its time. Rows are read as they are, or not at all.
func (cfg *Config) connectLong(ctx context.Context) (*pgx.Conn, error) {
	c, err := cfg.parse()
	if err != nil {
		return nil, err
	}
	c.RuntimeParams["statement_timeout"] = "0"
	c.RuntimeParams["idle_in_transaction_session_timeout"] = "0"
	c.RuntimeParams["lock_timeout"] = "10000"
	c.RuntimeParams["row_security"] = "off"
	c.AfterConnect = forRows
	return pgx.ConnectConfig(ctx, c)
}

// connectReplication opens a connection that takes replication commands. notice hears what
// the server says beside the stream.
func (cfg *Config) connectReplication(ctx context.Context, notice func(*pgconn.Notice)) (*pgconn.PgConn, error) {
	c, err := cfg.parse()
	if err != nil {
		return nil, err
	}
	c.RuntimeParams["replication"] = "database"
	c.RuntimeParams["statement_timeout"] = "0"
	c.RuntimeParams["lock_timeout"] = "0"                        // a new slot waits for whoever writes
	c.RuntimeParams["idle_in_transaction_session_timeout"] = "0" // a new slot's snapshot is held while rows are read under it
	c.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) { notice(n) }
	c.AfterConnect = forRows
	c.BuildFrontend = func(r io.Reader, w io.Writer) *pgproto3.Frontend {
		return pgproto3.NewFrontend(bufio.NewReaderSize(r, streamBuffer), w)
	}
	return pgconn.ConnectConfig(ctx, &c.Config)
}

// streamBuffer is how much is read at once from the stream, in bytes. pgx reads 8 KiB, which was an eighth of all that
// a drain took.
const streamBuffer = 64 << 10

// forRows sets up a session that reads rows.
func forRows(ctx context.Context, conn *pgconn.PgConn) error {
	if err := takeBytes(ctx, conn); err != nil {
		return err
	}
	return patient(ctx, conn)
}

// patient has the server leave alone a session that says nothing for long, or whose transaction takes
// long, whatever the defaults. (transaction_timeout is there from 17 on.)
func patient(ctx context.Context, conn *pgconn.PgConn) error {
	_, err := conn.Exec(ctx, "select set_config(name, '0', false) from pg_settings where name in ('idle_session_timeout', 'transaction_timeout')").ReadAll()
	return err
}

// takeBytes has rows of a database that checks no encoding come as they are. It may hold what is no
// UTF-8, and would refuse to send such a row as that, for ever.
func takeBytes(ctx context.Context, conn *pgconn.PgConn) error {
	if conn.ParameterStatus("server_encoding") != "SQL_ASCII" {
		return nil
	}
	_, err := conn.Exec(ctx, "set client_encoding to 'SQL_ASCII'").ReadAll()
	return err
}

// connectPooled opens an ordinary connection with nothing that a pooler would refuse, as the store does.
func (cfg *Config) connectPooled(ctx context.Context) (*pgx.Conn, error) {
	c, err := cfg.parse()
	if err != nil {
		return nil, err
	}
	for name := range pinned {
		switch name {
		case "timezone", "datestyle", "client_encoding":
		default:
			delete(c.RuntimeParams, name)
		}
	}
	c.DefaultQueryExecMode = pgx.QueryExecModeExec // no statement that another session would have
	return pgx.ConnectConfig(ctx, c)
}

func closeSQL(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = conn.Close(ctx)
}

// Address is where a database URL leads, and as whom.
type Address struct {
	User     string
	Password string
	Database string
}

// ReadURL reads a database URL with what the environment adds to it. The error is a *Fault.
func ReadURL(url string) (Address, error) {
	c, err := pgx.ParseConfig(url)
	var file *fs.PathError
	if errors.As(err, &file) {
		return Address{}, &Fault{State: Waiting, Reason: "a file that it names cannot be read", Err: file, Config: true}
	}
	if err != nil {
		return Address{}, FaultOf(err)
	}
	a := Address{User: c.User, Password: c.Password, Database: c.Database}
	if a.Database == "" {
		a.Database = a.User
	}
	return a, nil
}

// connectFault is FaultOf for people who set up a connection: it says which part of the URL or
// of the server is to blame.
func connectFault(err error) *Fault { return Provider("").connectFault(err) }

// connectFault is that with the provider's advice. One that is not known is told by the name of its host.
func (p Provider) connectFault(err error) *Fault {
	f := FaultOf(err)
	var connect *pgconn.ConnectError
	if !errors.As(err, &connect) {
		return f
	}
	c := connect.Config
	route := Route{Host: c.Host, Port: c.Port, User: c.User}
	if p == "" {
		p = route.provider()
	}
	where := net.JoinHostPort(c.Host, strconv.Itoa(int(c.Port)))
	if strings.HasPrefix(c.Host, "/") {
		where = c.Host
	}
	because := func(remedy, format string, a ...any) *Fault {
		return &Fault{State: f.State, Reason: fmt.Sprintf(format, a...), Remedy: remedy}
	}
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		pooler, sure := route.pooler()
		switch {
		case refusedByPooler(pg), sure && pg.Code != "28P01" && pg.Code != "28000" && pg.Code != "3D000":
			f := because(p.direct(route), "at %s stands %s, which does not let a stream through", where, pooler)
			f.Err = errors.New(pg.Message)
			return f
		case pg.Code == "28P01":
			return because("correct the password in database.url, or: alter role "+quoteName(c.User)+" password '…'", "Postgres at %s refuses the password of role %s", where, c.User)
		case pg.Code == "28000" && strings.Contains(pg.Message, "pg_hba.conf") && p.Managed():
			return because("where it says \"no encryption\", sslmode=require in database.url; else correct user and database there (pg_hba.conf is the provider's)",
				"Postgres at %s does not let us in: %s", where, pg.Message)
		case pg.Code == "28000" && strings.Contains(pg.Message, "pg_hba.conf"):
			return because("add to pg_hba.conf: host "+quoteName(c.Database)+" "+quoteName(c.User)+" <address of walhook> scram-sha-256, then select pg_reload_conf(); where it says \"no encryption\", sslmode=require in database.url may be enough",
				"Postgres at %s does not let us in: %s", where, pg.Message)
		case pg.Code == "28000" && strings.Contains(pg.Message, "does not exist"):
			return because("correct the user in database.url, or run the SQL that `walhook init` prints", "there is no role %s at %s", c.User, where)
		case pg.Code == "28000" && strings.Contains(pg.Message, "not permitted to log in"):
			return because("alter role "+quoteName(c.User)+" with login", "role %s may not log in at %s", c.User, where)
		case pg.Code == "3D000":
			return because("correct the database in database.url, or: create database "+quoteName(c.Database), "there is no database %s at %s", c.Database, where)
		case pg.Code == "42704", pg.Code == "22023":
			return because("correct the parameters behind the ? of database.url", "Postgres at %s does not take a parameter of database.url: %s", where, pg.Message)
		}
		return f
	}
	var dns *net.DNSError
	var timeout net.Error
	var verify *tls.CertificateVerificationError
	var header tls.RecordHeaderError
	plain := c.TLSConfig == nil || slices.ContainsFunc(c.Fallbacks, func(f *pgconn.FallbackConfig) bool { return f.TLSConfig == nil })
	inner := strings.ReplaceAll(errors.Unwrap(connect).Error(), "\n", "; ")
	switch {
	case errors.As(err, &dns):
		return because("correct the host in database.url, or the DNS of this machine", "the host %s of database.url cannot be looked up", c.Host)
	case errors.As(err, &verify):
		return because("name its authority in database.url (sslrootcert=/path), or use the name that the certificate is for; sslmode=require encrypts without looking at it", "the certificate of Postgres at %s is not trusted: %s", where, verify.Err)
	case !plain && (strings.Contains(inner, "refused TLS") || errors.As(err, &header)):
		return because("turn on ssl at the server, or, on a network that you trust, sslmode=disable in database.url", "Postgres at %s speaks no TLS, which sslmode in database.url asks for", where)
	case strings.Contains(inner, "read only connection"):
		return because("list the primary too, or wait for a failover to end", "no host of database.url takes writes")
	case !plain && (strings.Contains(inner, "tls: ") || strings.Contains(inner, "x509: ")):
		return because("see sslmode, sslrootcert, sslcert and sslkey in database.url", "no TLS with Postgres at %s: %s", where, inner)
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, os.ErrNotExist):
		return because("start Postgres there, or correct host and port in database.url", "nothing listens at %s: the connection was refused", where)
	case errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, context.DeadlineExceeded):
		return because("correct host and port in database.url, or let this machine through the firewall (on a cloud: security group, authorized networks)", "%s does not answer", where)
	}
	return f
}
