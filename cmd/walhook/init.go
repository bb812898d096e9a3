package main

import (
	"context"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox/store"
)

// initOptions are the flags of walhook init.
type initOptions struct {
	*options
	apply    bool
	adminURL string
	role     string
	grant    bool // the schema walhook is not the role's own
	provider cdc.Provider
}

func initCommand(o *options) *cobra.Command {
	in := &initOptions{options: o}
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Print the SQL that a DBA runs once: role, grants, publication, schema",
		Long: `Prints the SQL that a DBA runs once: the role, its grants, the schema walhook and the
publication. Running it again changes nothing. After it, walhook needs a role with nothing but
LOGIN, REPLICATION and these grants. The SQL fits the provider of Postgres that the server shows,
or --provider.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := o.load()
			if err != nil {
				return err
			}
			return in.run(cmd.Context(), cfg, cmd.OutOrStdout())
		},
	}
	cmd.Flags().BoolVar(&in.apply, "apply", false, "run it instead of printing it")
	cmd.Flags().StringVar(&in.adminURL, "admin-url", "", "run it through this database URL, as its role (default $WALHOOK_ADMIN_URL, then database.url)")
	cmd.Flags().StringVar(&in.role, "role", "", "the role that walhook will connect as (default the user of database.url)")
	cmd.Flags().BoolVar(&in.grant, "grant", false, "leave the schema walhook to the admin and only grant the role its use; later versions then need init again")
	providerFlag(cmd, &in.provider)
	return cmd
}

func (in *initOptions) run(ctx context.Context, cfg *Config, out io.Writer) error {
	own, err := cdc.ReadURL(cfg.Database.URL.Reveal())
	if err != nil {
		return failed{fmt.Errorf("%s: database.url: %w", cfg.Path, err), exitUsage}
	}
	p := &setup{role: in.role, database: own.Database, grant: in.grant, apply: in.apply, cdc: streamConfig(cfg, nil, nil)}
	if p.role == "" {
		p.role = own.User
	}
	if p.role == "" {
		return usageError{errors.New("database.url names no user, so --role must")}
	}
	if p.role == own.User {
		if p.verifier, err = scramVerifier(own.Password); err != nil {
			return err
		}
	}
	admin := in.adminURL
	if admin == "" {
		admin, _ = in.env("WALHOOK_ADMIN_URL")
	}
	if admin == "" {
		admin = cfg.Database.URL.Reveal()
	} else {
		as, err := cdc.ReadURL(admin)
		if err != nil {
			return usageError{fmt.Errorf("--admin-url: %w", err)}
		}
		if as.Database != own.Database {
			return usageError{fmt.Errorf("--admin-url leads to database %s, but database.url to %s: the tables and the publication are in the latter", as.Database, own.Database)}
		}
	}

	// Printing does without an answer: the SQL then looks for itself.
	look, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	if in.apply {
		look = ctx
	}
	p.known, err = cdc.LookAtRole(look, admin, p.role)
	if p.provider = in.provider; p.provider == "" {
		p.provider = p.known.Provider
	}
	if p.provider.PlainPassword() {
		p.verifier = ""
	}
	if !in.apply {
		p.print(out)
		return nil
	}
	if err != nil {
		return fmt.Errorf("init: %w", err)
	}
	return p.runOn(ctx, admin, out)
}

// setup is what init will do.
type setup struct {
	role     string
	verifier string // of the role's password; empty where it is not known
	database string
	grant    bool
	apply    bool
	known    cdc.RoleState // zero where the server was not asked
	provider cdc.Provider  // empty where it is not known
	cdc      cdc.Config
}

// setupStep is one part of the SQL.
type setupStep struct {
	title string
	sql   string
	skip  string // why it is not needed
}

func (p *setup) steps() []setupStep {
	role := setupStep{title: "the role " + p.role, sql: cdc.RoleSQL(p.role, p.verifier)}
	replication := setupStep{title: "its right to replicate", sql: cdc.ReplicationSQL(p.role, p.provider)}
	grants := setupStep{title: "its rights on the database and the outbox", sql: cdc.GrantSQL(p.role, p.cdc.Tables)}
	schema := setupStep{title: "the schema walhook", sql: store.SetupSQL()}
	whose := setupStep{title: "the schema walhook is the role's own", sql: cdc.OwnerSQL(p.role)}
	if p.grant {
		whose = setupStep{title: "its rights on the schema walhook", sql: store.GrantSQL(p.role)}
	}
	if p.known.Exists {
		role.skip = "exists"
	}
	switch {
	case p.known.Replication:
		replication.skip = "has it"
	case !p.provider.MayReplicate(p.role, p.known.Version):
		replication.skip = "not to be had: " + p.provider.Title() + " gives it to no role of one's own at this version of Postgres (use --role postgres)"
	}
	if p.apply && p.known.Itself { // what is printed, somebody else will run
		const itself = "is the role that runs this"
		grants.skip, whose.skip = itself, itself
	}
	return []setupStep{
		role, replication, grants, schema, whose,
		{title: "the publication " + p.cdc.Publication, sql: cdc.PublicationSQL(p.cdc.Publication, p.cdc.Tables)},
		{title: "the publication " + p.cdc.Mirror.Publication + ", of the endpoints that an app registers", sql: p.cdc.Mirror.SetupSQL()},
	}
}

func (p *setup) print(w io.Writer) {
	at := ""
	if p.provider != "" && p.provider != cdc.Plain {
		at = " at " + p.provider.Title()
	}
	fmt.Fprintf(w, `-- What walhook needs%s, to be run once in database %s by
-- %s.
-- Running it again changes nothing.
--
--   walhook init | psql --set ON_ERROR_STOP=1 'postgres://…/…'     or     walhook init --apply --admin-url 'postgres://…/…'
--
-- The server needs wal_level = logical, and walhook check tells what is still missing:
-- %s
`, at, oneLine(p.database), p.provider.Admin(), p.provider.WALLevel())
	for i, st := range p.steps() {
		fmt.Fprintf(w, "\n-- %d. %s\n", i+1, oneLine(st.title))
		sql := strings.TrimSpace(st.sql)
		if st.skip != "" {
			fmt.Fprintf(w, "-- Not needed: %s.\n", st.skip)
			sql = "-- " + strings.ReplaceAll(sql, "\n", "\n-- ")
		}
		fmt.Fprintln(w, sql)
		if i > 0 || st.skip != "" {
			continue
		}
		if p.verifier == "" && !p.provider.PlainPassword() {
			fmt.Fprintf(w, "-- Give it the password of database.url; in psql:  \\password %s\n", oneLine(p.role))
		}
		if note := p.provider.RoleNote(p.role); note != "" {
			fmt.Fprintf(w, "-- %s\n", oneLine(note))
		}
	}
	fmt.Fprintf(w, "\n-- The slot: walhook makes it at its first start (cdc.create), and REPLICATION is enough for that.\n-- Without cdc.create, when all of the above is there:\n-- %s", cdc.SlotSQL(p.cdc.Slot))
}

// oneLine keeps a name within its comment.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' {
			return '?'
		}
		return r
	}, s)
}

func (p *setup) runOn(ctx context.Context, admin string, out io.Writer) error {
	var todo []setupStep
	var texts []string
	for _, st := range p.steps() {
		if st.skip != "" {
			fmt.Fprintf(out, "- %s: %s\n", st.title, st.skip)
			continue
		}
		todo, texts = append(todo, st), append(texts, st.sql)
	}
	reached := false
	err := cdc.Apply(ctx, admin, texts, func(i int, err error) {
		reached = true
		if err != nil {
			fmt.Fprintf(out, "✗ %s\n    %v\n", todo[i].title, err)
			return
		}
		fmt.Fprintf(out, "✓ %s\n", todo[i].title)
	})
	if err != nil {
		if !reached {
			return fmt.Errorf("init: %w", err)
		}
		return errors.New("init stopped there; " + p.applyRemedy(err))
	}
	if p.verifier == "" && !p.known.Exists {
		note := "alter role … password '…', as in database.url"
		if p.provider.PlainPassword() {
			note = p.provider.RoleNote(p.role)
		}
		fmt.Fprintf(out, "! role %s has no password yet: %s\n", p.role, note)
	}
	fmt.Fprintln(out, "walhook check tells what is still missing")
	return nil
}

func (p *setup) applyRemedy(err error) string {
	switch text := err.Error(); {
	case strings.Contains(text, "SQLSTATE 42501"):
		remedy := "it needs " + p.provider.Admin() + ": walhook init --apply --admin-url 'postgres://…'"
		if note := p.provider.RoleNote(p.role); note != "" && !p.known.Exists {
			remedy += ". " + note
		}
		return remedy
	case strings.Contains(text, "SQLSTATE 55P03"):
		return "a long transaction writes to the outbox, so it could not be locked; run it again"
	case strings.Contains(text, "SQLSTATE 42P01"), strings.Contains(text, "SQLSTATE 3F000"):
		return "create the outbox table first, or correct outbox[].table (upper and lower case count)"
	}
	return "what was done before stays, and running it again goes on"
}

// scramVerifier is what Postgres keeps of a password (RFC 5803). It goes into the SQL in the
// password's place, so that neither a terminal nor the server's log ever shows that. It is
// empty for a password that would have to be normalized first (RFC 8265), and for none.
func scramVerifier(password string) (string, error) {
	for i := range len(password) {
		if password[i] < ' ' || password[i] > '~' {
			return "", nil
		}
	}
	if password == "" {
		return "", nil
	}
	const rounds = 4096 // Postgres' own
	salt := make([]byte, 16)
	_, _ = rand.Read(salt) // never fails
	salted, err := pbkdf2.Key(sha256.New, password, salt, rounds, sha256.Size)
	if err != nil {
		return "", fmt.Errorf("derive password verifier: %w", err)
	}
	mac := func(text string) []byte {
		h := hmac.New(sha256.New, salted)
		h.Write([]byte(text))
		return h.Sum(nil)
	}
	stored := sha256.Sum256(mac("Client Key"))
	b64 := base64.StdEncoding.EncodeToString
	return fmt.Sprintf("SCRAM-SHA-256$%d:%s$%s:%s", rounds, b64(salt), b64(stored[:]), b64(mac("Server Key"))), nil
}
