package cdc

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
)

// Provider is who runs the server. What has to be set is the same everywhere; where, and by whom, is not.
// The zero Provider is one that is not known, and is taken for Plain.
type Provider string

// The providers. What is said of each was read in its own documentation or code; none was tried on the
// service itself (docs/providers.md).
const (
	Plain         Provider = "plain" // whoever may change postgresql.conf
	RDS           Provider = "rds"   // Amazon RDS and Aurora
	CloudSQL      Provider = "cloudsql"
	Azure         Provider = "azure" // Azure Database for PostgreSQL, Flexible Server
	Supabase      Provider = "supabase"
	Neon          Provider = "neon"
	CloudNativePG Provider = "cloudnativepg"
)

// Providers are all of them.
func Providers() []Provider {
	return []Provider{Plain, RDS, CloudSQL, Azure, Supabase, Neon, CloudNativePG}
}

// ParseProvider reads a name as --provider takes it.
func ParseProvider(name string) (Provider, error) {
	if p := Provider(name); slices.Contains(Providers(), p) {
		return p, nil
	}
	names := make([]string, 0, len(houses))
	for _, p := range Providers() {
		names = append(names, string(p))
	}
	return "", fmt.Errorf("provider %q: want %s", name, strings.Join(names, ", "))
}

// Title is the provider's name for people.
func (p Provider) Title() string { return p.house().title }

// house is what is known of one provider.
type house struct {
	title string
	sign  string   // how its server is told: the prefix of settings that no other has
	roles []string // roles that no other has
	hosts []string // ends of its host names

	// parameter says how a parameter of the server is set, where own does not say it.
	parameter func(parameter) string
	own       map[string]string
	confirmed []string // parameters of which its documentation says that they may be set; nil where all may
	// replicate lets the role replicate.
	replicate func(role string) string
	// direct is the address without a pooler in between.
	direct func(Route) string
	// standby has a standby take failover slots over; empty where its parameters say it all.
	standby string
	admin   string // who may run what init prints
	alone   string // the one role that may replicate before aloneTo
	aloneTo int
	note    func(role string) string // what else a DBA should know of the role; nil where nothing
	relays  bool                     // its own relay stands before every server, so that what tells a pooler elsewhere tells nothing
	plain   bool                     // a password must be given as it is, not as its verifier
	managed bool                     // the machine, pg_hba.conf and the superuser are the provider's
}

// parameter is one that walhook asks to be set, in the two spellings that there are.
type parameter struct {
	name    string
	value   string // as SQL takes it
	number  string // in the parameter's own unit, as forms of providers take it
	restart bool
}

func (p parameter) yaml() string { return strings.Trim(p.value, "'") }

func logicalLevel() parameter {
	return parameter{name: "wal_level", value: "logical", number: "logical", restart: true}
}

func slotsParameter(n int) parameter {
	return parameter{name: "max_replication_slots", value: strconv.Itoa(n), number: strconv.Itoa(n), restart: true}
}

func sendersParameter(n int) parameter {
	return parameter{name: "max_wal_senders", value: strconv.Itoa(n), number: strconv.Itoa(n), restart: true}
}

func keepParameter() parameter {
	return parameter{name: "max_slot_wal_keep_size", value: "'10GB'", number: "10240"}
}

func idleParameter() parameter {
	return parameter{name: "idle_replication_slot_timeout", value: "0", number: "0"}
}

func patienceParameter() parameter {
	return parameter{name: "wal_sender_timeout", value: "'60s'", number: "60000"}
}

func syncNamesParameter(names string) parameter {
	return parameter{name: "synchronous_standby_names", value: quoteText(names), number: names}
}

func standbySlotsParameter(slots []string) parameter {
	names := strings.Join(slots, ",")
	return parameter{name: "synchronized_standby_slots", value: quoteText(names), number: names}
}

func slotSyncParameter() parameter {
	return parameter{name: "sync_replication_slots", value: "on", number: "on"}
}

func feedbackParameter() parameter {
	return parameter{name: "hot_standby_feedback", value: "on", number: "on"}
}

func attribute(role string) string {
	return "alter role " + quoteName(role) + " with replication"
}

// houses is all that is known of providers. Each answers every question, if need be that it cannot be done.
var houses = map[Provider]house{
	Plain: {
		title: "Postgres",
		admin: "a superuser, or the owner of the outbox tables who may also create roles",
		parameter: func(p parameter) string {
			set := "alter system set " + p.name + " = " + p.value
			if p.restart {
				return set + "; then restart Postgres"
			}
			return set + "; select pg_reload_conf()"
		},
		replicate: attribute,
		direct: func(r Route) string {
			if r.Server != "" {
				return "the address of Postgres itself, which the pooler reaches at " + r.Server
			}
			return "the address of Postgres itself"
		},
	},
	RDS: {
		title: "Amazon RDS or Aurora", managed: true,
		admin: "the master user, or another member of rds_superuser who owns the outbox tables",
		sign:  "rds", roles: []string{"rds_superuser", "rds_replication", "rdsadmin"}, hosts: []string{".rds.amazonaws.com", ".amazonaws.com.cn"},
		confirmed: []string{"max_replication_slots", "max_wal_senders", "sync_replication_slots", "hot_standby_feedback", "synchronized_standby_slots"},
		parameter: func(p parameter) string {
			set := "in the DB parameter group of the instance (Aurora: the DB cluster parameter group): " + p.name + " = " + p.number
			if p.restart {
				return set + "; then reboot it"
			}
			return set
		},
		own: map[string]string{
			"wal_level": "in a DB parameter group of your own (Aurora: a DB cluster parameter group): rds.logical_replication = 1; then reboot the instance, which sets wal_level",
			"max_slot_wal_keep_size": "A limit below the free storage puts the database first, where the DB parameter group has it: max_slot_wal_keep_size = 10240 (MB); else have yourself told of free storage that shrinks. " +
				"(Aurora keeps the WAL in the storage of the cluster.)",
		},
		replicate: func(role string) string { return "grant rds_replication to " + quoteName(role) },
		direct: func(Route) string {
			return "the endpoint of the DB instance (Aurora: the writer endpoint of the cluster), not one of RDS Proxy, which does not pass replication on"
		},
		standby: "in the parameter group of the read replica: rds.logical_replication = 1, sync_replication_slots = 1, hot_standby_feedback = 1, rds.logical_slot_sync_dbname = a database that exists",
	},
	CloudSQL: {
		title: "Google Cloud SQL", managed: true,
		admin: "the user postgres, or another with cloudsqlsuperuser who owns the outbox tables",
		sign:  "cloudsql", roles: []string{"cloudsqlsuperuser", "cloudsqladmin"}, hosts: []string{".sql.goog"},
		confirmed: []string{"cloudsql.logical_decoding"},
		parameter: func(p parameter) string {
			set := "edit the instance, Flags: " + p.name + " = " + p.number
			if p.restart {
				return set + ", which restarts it"
			}
			return set
		},
		own: map[string]string{
			"wal_level": "edit the instance, Flags: cloudsql.logical_decoding = on, which restarts it and sets wal_level",
			"max_slot_wal_keep_size": "A limit below the free storage puts the database first, where Cloud SQL has the flag for this version: edit the instance, Flags: max_slot_wal_keep_size = 10240 (MB); " +
				"else have yourself told of storage that fills up",
		},
		replicate: attribute, // by a member of cloudsqlsuperuser
		direct: func(Route) string {
			return "the instance at port 5432, past Managed Connection Pooling"
		},
		standby: "on Enterprise Plus, as its page \"Advanced DR with logical failover slot\" says",
	},
	Azure: {
		title: "Azure Database for PostgreSQL", managed: true,
		admin: "the server's admin, a member of azure_pg_admin, who owns the outbox tables",
		sign:  "azure", roles: []string{"azure_pg_admin", "azuresu"}, hosts: []string{".postgres.database.azure.com", ".postgres.database.chinacloudapi.cn"},
		confirmed: []string{"wal_level", "max_replication_slots", "max_wal_senders", "idle_replication_slot_timeout", "hot_standby_feedback"},
		parameter: func(p parameter) string {
			set := "Server parameters: " + p.name + " = " + p.number + ", save"
			if p.restart {
				return set + " and restart the server"
			}
			return set
		},
		own: map[string]string{
			"max_slot_wal_keep_size": "Azure keeps max_slot_wal_keep_size at -1 and lets nobody change it: have yourself told of storage that fills up. " +
				"When it does, Azure drops slots that nobody reads",
		},
		standby:   "Azure's high availability does not carry logical slots over, says its page, which names the extension pg_failover_slots; without it, cdc.recover tells what walhook does",
		replicate: attribute, // by the admin, a member of azure_pg_admin
		direct: func(r Route) string {
			return "the same host at port 5432 (6432 is its PgBouncer)" + r.at(r.Host, 5432)
		},
	},
	Supabase: {
		title: "Supabase", managed: true,
		admin: "the role postgres", alone: "postgres", aloneTo: 170000,
		roles: []string{"supabase_admin"}, hosts: []string{".supabase.co", ".supabase.com"},
		parameter: func(p parameter) string {
			self := " (self-hosted: alter system set " + p.name + " = " + p.value + ")"
			switch p.name {
			case "max_replication_slots", "max_wal_senders", "max_slot_wal_keep_size", "wal_sender_timeout": // what its CLI knows
				return "supabase --experimental --project-ref <ref> postgres-config update --config " + p.name + "=" + p.yaml() + ", which restarts the database" + self
			}
			return "ask Supabase for " + p.name + " = " + p.yaml() + self
		},
		own: map[string]string{
			"wal_level": "ask Supabase for wal_level = logical (self-hosted: alter system set wal_level = logical; then restart Postgres)",
		},
		replicate: func(role string) string {
			return "as the role postgres: alter role " + quoteName(role) + " with replication"
		},
		direct: func(r Route) string {
			ref := "<ref>"
			if _, of, found := strings.Cut(r.User, "."); found { // as the pooler's users are called
				ref = of
			} else if strings.HasPrefix(r.Host, "db.") {
				ref, _, _ = strings.Cut(strings.TrimPrefix(r.Host, "db."), ".")
			}
			return "the direct connection, db." + ref + ".supabase.co:5432, as a user without the suffix ." + ref + "; it answers on IPv6, on IPv4 with the IPv4 add-on alone"
		},
	},
	Neon: {
		title: "Neon", managed: true, relays: true, plain: true,
		admin: "a member of neon_superuser, as the roles of the Neon Console are, who owns the outbox tables",
		note: func(role string) string {
			return "A role made in the Neon Console, its CLI or API can replicate in any case; of one made by SQL that is not sure. Neon takes a password only as it is (psql's \\password does not work): alter role " + quoteName(role) + " password '<as in database.url>'"
		},
		sign: "neon", roles: []string{"neon_superuser"}, hosts: []string{".neon.tech"},
		parameter: func(p parameter) string {
			return "Neon sets " + p.name + " itself: ask its support for " + p.name + " = " + p.yaml()
		},
		own: map[string]string{
			"wal_level": "Neon Console, Settings, Logical Replication: Enable. It restarts all computes of the project and cannot be taken back",
			"max_slot_wal_keep_size": "Neon sets max_slot_wal_keep_size itself, and removes a slot that nobody has read for about 40 hours; a branch that is restored has none either. " +
				"walhook then says that its slot is lost, and cdc.recover tells what it does",
		},
		replicate: func(role string) string {
			return "use a role made in the Neon Console, its CLI or API: those have the right. For one made by SQL, as a member of neon_superuser, where Neon lets you: alter role " + quoteName(role) + " with replication"
		},
		direct: func(r Route) string {
			if host, found := strings.CutSuffix(strings.SplitN(r.Host+".", ".", 2)[0], "-pooler"); found {
				_, domain, _ := strings.Cut(r.Host, ".")
				return "the host without -pooler" + r.at(host+"."+domain, r.Port)
			}
			return "the host without -pooler"
		},
	},
	CloudNativePG: {
		title: "CloudNativePG",
		admin: "a superuser (spec.enableSuperuserAccess: true), or, once the role is there, the owner of the outbox tables",
		note: func(role string) string {
			return "Without a superuser, the operator makes the role. In the Cluster: spec.managed.roles: [{name: " + strconv.Quote(role) + ", ensure: present, login: true, replication: true, passwordSecret: {name: <a secret with username and password>}}]"
		},
		sign: "cnpg", roles: []string{"streaming_replica", "cnpg_pooler_pgbouncer"},
		parameter: func(p parameter) string {
			set := "in the Cluster: spec.postgresql.parameters." + p.name + `: "` + p.yaml() + `"`
			if p.restart {
				return set + "; the operator restarts what it must"
			}
			return set
		},
		own: map[string]string{
			"synchronous_standby_names":  "in the Cluster: spec.postgresql.synchronous, of which the operator makes synchronous_standby_names",
			"synchronized_standby_slots": "in the Cluster (operator 1.27 and later): spec.replicationSlots.highAvailability.synchronizeLogicalDecoding: true",
		},
		replicate: func(role string) string {
			return "in the Cluster: spec.managed.roles: [{name: " + strconv.Quote(role) + ", ensure: present, login: true, replication: true, passwordSecret: {name: …}}] (or, as a superuser: alter role " + quoteName(role) + " with replication)"
		},
		direct: func(Route) string {
			return "the service <cluster>-rw at port 5432, not that of a Pooler"
		},
		standby: `in the Cluster (operator 1.27 and later): spec.replicationSlots.highAvailability.synchronizeLogicalDecoding: true, spec.postgresql.parameters: {sync_replication_slots: "on", hot_standby_feedback: "on"}`,
	},
}

func (p Provider) house() house {
	if h, known := houses[p]; known {
		return h
	}
	return houses[Plain]
}

// set says how a parameter is set.
func (p Provider) set(param parameter) string {
	h := p.house()
	if own, has := h.own[param.name]; has {
		return own
	}
	set := h.parameter(param)
	if h.confirmed != nil && !slices.Contains(h.confirmed, param.name) {
		set += " (where it may be set there, of which we found no word)"
	}
	return set
}

// limit says how the WAL that slots keep is limited, in sentences of its own.
func (p Provider) limit() string {
	set := p.set(keepParameter())
	if _, own := p.house().own[keepParameter().name]; own {
		return set
	}
	return "A limit below the free space puts the database first: " + set
}

// replicate says how a role comes to replicate.
func (p Provider) replicate(role string, version int) string {
	h := p.house()
	if !p.MayReplicate(role, version) {
		return fmt.Sprintf("connect as the role %s: before Postgres %d %s lets no other role replicate", h.alone, h.aloneTo/10000, h.title)
	}
	return h.replicate(role)
}

// direct says where replication finds Postgres without a pooler in between.
func (p Provider) direct(r Route) string {
	return "set database.replication_url to " + p.house().direct(r)
}

// standby says what a standby lacks, in the provider's own words where it has some.
func (p Provider) standby(param parameter) string {
	if own := p.house().standby; own != "" {
		return own
	}
	return "there: " + p.set(param)
}

// WALLevel says how the server comes to write what a stream needs.
func (p Provider) WALLevel() string { return p.set(logicalLevel()) }

// Admin is who may run what a DBA is to run.
func (p Provider) Admin() string { return p.house().admin }

// RoleNote is what else there is to know about making a role; empty where nothing.
func (p Provider) RoleNote(role string) string {
	if note := p.house().note; note != nil {
		return note(role)
	}
	return ""
}

// MayReplicate tells whether a role other than the provider's own can be given the right. A version of zero is
// not known.
func (p Provider) MayReplicate(role string, version int) bool {
	h := p.house()
	return h.alone == "" || role == h.alone || version == 0 || version >= h.aloneTo
}

// PlainPassword tells that a password must be given to the server as it is.
func (p Provider) PlainPassword() bool { return p.house().plain }

// Managed tells that superusers and pg_hba.conf are not the customer's.
func (p Provider) Managed() bool { return p.house().managed }

// Route is the way that a connection took.
type Route struct {
	Host   string
	Port   uint16
	User   string
	Server string // where the server itself says that it listens; empty where it does not
}

// at is an address that can be copied, where the host is known.
func (r Route) at(host string, port uint16) string {
	if host == "" || strings.HasPrefix(host, "/") {
		return ""
	}
	return ": " + net.JoinHostPort(host, strconv.Itoa(int(port)))
}

// provider is whose host it is, as far as its name tells.
func (r Route) provider() Provider {
	for _, p := range Providers() {
		for _, end := range houses[p].hosts {
			if strings.HasSuffix(strings.ToLower(r.Host), end) {
				return p
			}
		}
	}
	return ""
}

// pooler is what the address tells of a pooler. A port is only a hint.
func (r Route) pooler() (name string, sure bool) {
	host := strings.ToLower(r.Host)
	first, rest, _ := strings.Cut(host, ".")
	switch {
	case strings.HasSuffix(first, "-pooler"):
		return "Neon's PgBouncer", true
	case strings.HasSuffix(host, ".pooler.supabase.com"):
		return "Supavisor", true
	case strings.HasPrefix(rest, "proxy-") && strings.Contains(rest, ".rds.amazonaws.com"):
		return "RDS Proxy", true
	case r.Port == 6543 && r.provider() == Supabase:
		return "Supabase's PgBouncer", true
	case r.Port == 6432:
		return "PgBouncer or its like", false
	}
	return "a pooler", false
}

// poolerOf is what stands between us and Postgres. A direct connection has the server's own process id as the
// key to cancel it; a pooler gives keys of its own, in every mode.
func poolerOf(conn *pgx.Conn, r Route, backend uint32, p Provider) string {
	name, sure := r.pooler()
	if sure || !p.house().relays && conn.PgConn().PID() != backend {
		return name
	}
	return ""
}

func routeOf(conn *pgx.Conn) Route {
	c := conn.Config()
	// Of several hosts, the one that was taken.
	if host, port, err := net.SplitHostPort(conn.PgConn().Conn().RemoteAddr().String()); err == nil && len(c.Fallbacks) > 0 {
		for _, f := range c.Fallbacks {
			if f.Host == host && strconv.Itoa(int(f.Port)) == port {
				return Route{Host: f.Host, Port: f.Port, User: c.User}
			}
		}
	}
	return Route{Host: c.Host, Port: c.Port, User: c.User}
}

// Settings that an extension has declared show in pg_settings. One that only stands in the configuration
// file does not, but can be asked for by its name.
const signsSQL = `
select array(select distinct split_part(name, '.', 1) from pg_settings where split_part(name, '.', 1) = any ($1) and name like '%.%')
         || array(select s from unnest($2::text[]) as s where current_setting(s, true) is not null),
       array(select rolname::text from pg_roles where rolname = any ($3))`

// marks are settings that each of the providers' servers has, asked for by name.
var marks = map[string]Provider{
	"rds.logical_replication":   RDS,
	"cloudsql.logical_decoding": CloudSQL,
	"azure.extensions":          Azure,
	"cnpg.config_sha256":        CloudNativePG,
}

// providerOf is who runs the server. Its own settings decide, then its roles (which a dump may have brought
// from elsewhere), then the name of the host.
func providerOf(ctx context.Context, conn *pgx.Conn) (Provider, error) {
	var signs, roles, asked []string
	for _, h := range houses {
		if h.sign != "" {
			signs = append(signs, h.sign)
		}
		roles = append(roles, h.roles...)
	}
	for mark := range marks {
		asked = append(asked, mark)
	}
	var foundSigns, foundRoles []string
	if err := conn.QueryRow(ctx, signsSQL, signs, asked, roles).Scan(&foundSigns, &foundRoles); err != nil {
		return "", fmt.Errorf("look for the provider: %w", err)
	}
	for _, p := range Providers() {
		if h := houses[p]; h.sign != "" && slices.Contains(foundSigns, h.sign) {
			return p, nil
		}
	}
	for mark, p := range marks {
		if slices.Contains(foundSigns, mark) {
			return p, nil
		}
	}
	for _, p := range Providers() {
		if slices.ContainsFunc(houses[p].roles, func(r string) bool { return slices.Contains(foundRoles, r) }) {
			return p, nil
		}
	}
	if p := routeOf(conn).provider(); p != "" {
		return p, nil
	}
	return Plain, nil
}
