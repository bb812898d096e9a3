package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/walhook/walhook/cdc"
	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/outbox/store"
	"github.com/walhook/walhook/sender"
)

const (
	// databaseTime bounds the whole look at the database.
	databaseTime = 30 * time.Second
	// reachAtOnce is how many endpoints are connected to side by side.
	reachAtOnce = 128
	// certificateSoon is when a certificate that expires is worth a warning.
	certificateSoon = 14 * day
)

func checkCommand(o *options) *cobra.Command {
	c := &checkOptions{options: o}
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Look at config, database and endpoints; say what is wrong and what mends it",
		Long: `Looks at the config, the database and the endpoints, changes nothing and sends nothing.
✓ is well, ! may hurt some day, ✗ keeps walhook from working; below ! and ✗ stands what to do.
What to do differs from one provider of Postgres to the next: whose it is, the server shows, and
--provider overrides. The exit code is 0 without any ✗, 1 with one, and 2 where the config is
broken; with --strict a ! counts as a ✗.

With --live it only asks the instance on this machine whether it works, at the configuration's
server.listen: the health check of a container.`,
	}
	asksLive := cmd.Flags().Bool("live", false, "only ask the walhook that runs here whether it works")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *asksLive {
			return live(cmd.Context(), o, cmd.OutOrStdout())
		}
		return check(cmd.Context(), c, cmd.OutOrStdout())
	}
	cmd.Flags().StringVarP(&o.output, "output", "o", "table", "table or json")
	cmd.Flags().BoolVar(&c.configOnly, "config-only", false, "look at the config and at what it refers to, and at nothing else")
	cmd.Flags().BoolVar(&c.strict, "strict", false, "exit with 1 for a warning too")
	providerFlag(cmd, &c.provider)
	return cmd
}

// checkOptions are the flags of walhook check.
type checkOptions struct {
	*options
	configOnly bool
	strict     bool
	provider   cdc.Provider
}

// providerFlag has a command take --provider.
func providerFlag(cmd *cobra.Command, to *cdc.Provider) {
	cmd.Flags().Var(&providerValue{to}, "provider", "give the advice for plain, rds, cloudsql, azure, supabase, neon or cloudnativepg (default what the server shows)")
}

// providerValue is a cdc.Provider as a flag.
type providerValue struct{ to *cdc.Provider }

func (v *providerValue) String() string {
	if v.to == nil {
		return ""
	}
	return string(*v.to)
}

func (v *providerValue) Type() string { return "name" }

func (v *providerValue) Set(name string) (err error) {
	*v.to, err = cdc.ParseProvider(name)
	return err
}

// grade is how well one thing is.
type grade string

const (
	well    grade = "ok"
	warning grade = "warning"
	broken  grade = "failed"
)

func (g grade) mark() string { return map[grade]string{well: "✓", warning: "!", broken: "✗"}[g] }

// result is one line of a check.
type result struct {
	Topic  string `json:"topic"`
	Grade  grade  `json:"status"`
	Text   string `json:"text"`
	Remedy string `json:"remedy,omitempty"`
}

func check(ctx context.Context, o *checkOptions, out io.Writer) error {
	if o.output != "table" && o.output != "json" {
		return usageError{fmt.Errorf("--output %s: want table or json", o.output)}
	}
	cfg, err := o.load()
	var wrong *ConfigError
	if errors.As(err, &wrong) {
		results := configResults(wrong)
		if err := report(out, o.output, o.provider, results); err != nil {
			return err
		}
		return failed{fmt.Errorf("%s is broken: %s", wrong.File, count(len(results), "mistake")), exitUsage}
	}
	if err != nil {
		return err
	}
	if mistakes := checkURLs(cfg); len(mistakes) > 0 {
		if err := report(out, o.output, o.provider, mistakes); err != nil {
			return err
		}
		return failed{fmt.Errorf("%s is broken: %s", cfg.Path, count(len(mistakes), "mistake")), exitUsage}
	}
	if o.configOnly {
		return report(out, o.output, o.provider, []result{soundConfig(cfg)})
	}
	results, provider := inspect(ctx, cfg, o.provider)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := report(out, o.output, provider, results); err != nil {
		return err
	}
	faults, warnings := 0, 0
	for _, r := range results {
		switch r.Grade {
		case broken:
			faults++
		case warning:
			warnings++
		}
	}
	switch {
	case faults > 0:
		return failed{fmt.Errorf("check found %s", count(faults, "fault")), exitFailed}
	case warnings > 0 && o.strict:
		return failed{fmt.Errorf("check found %s, which --strict does not let pass", count(warnings, "warning")), exitFailed}
	}
	return nil
}

func count(n int, of string) string {
	if n != 1 {
		of += "s"
	}
	return fmt.Sprintf("%d %s", n, of)
}

func report(w io.Writer, form string, provider cdc.Provider, results []result) error {
	if form == "json" {
		worst := well
		for _, r := range results {
			if r.Grade == broken || r.Grade == warning && worst == well {
				worst = r.Grade
			}
		}
		enc := json.NewEncoder(w)
		enc.SetEscapeHTML(false)
		enc.SetIndent("", "  ")
		return enc.Encode(struct {
			Status   grade        `json:"status"`
			Provider cdc.Provider `json:"provider"`
			Results  []result     `json:"results"`
		}{worst, provider, results})
	}
	var b strings.Builder
	for _, r := range results {
		fmt.Fprintf(&b, "%s %-12s%s\n", r.Grade.mark(), r.Topic, strings.ReplaceAll(r.Text, "\n", "; "))
		if r.Remedy != "" {
			remedy := strings.ReplaceAll(strings.TrimSpace(r.Remedy), "\n", "\n      ")
			fmt.Fprintf(&b, "    → %s\n", strings.ReplaceAll(remedy, "\n      \n", "\n\n"))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func configResults(wrong *ConfigError) []result {
	var results []result
	for _, p := range wrong.Problems {
		text := wrong.File
		if p.Line > 0 {
			text += fmt.Sprintf(":%d:%d", p.Line, p.Column)
		}
		if p.Key != "" {
			text += ": " + p.Key
		}
		r := result{Topic: "config", Grade: broken, Text: text + ": " + p.Text, Remedy: "correct it there"}
		if p.Allowed != "" {
			r.Remedy = "allowed: " + p.Allowed
		}
		results = append(results, r)
	}
	return results
}

// checkURLs reads the database URLs as a connect would: the loader knows only how they begin.
func checkURLs(cfg *Config) []result {
	var results []result
	for _, u := range []struct {
		key string
		url outbox.Secret
	}{{"database.url", cfg.Database.URL}, {"database.replication_url", cfg.Database.ReplicationURL}} {
		if u.url == "" {
			continue
		}
		if _, err := cdc.ReadURL(u.url.Reveal()); err != nil {
			f := cdc.FaultOf(err)
			text := f.Reason
			if f.Err != nil {
				text = f.Err.Error()
			}
			results = append(results, result{Topic: "config", Grade: broken, Text: cfg.Path + ": " + u.key + ": " + text, Remedy: "allowed: " + databaseURLRule})
		}
	}
	return results
}

// soundConfig is the line about a config without mistakes.
func soundConfig(cfg *Config) result {
	return result{Topic: "config", Grade: well, Text: fmt.Sprintf("%s: %s, %s", cfg.Path, count(len(cfg.Outbox), "source"), count(len(cfg.Endpoints), "endpoint"))}
}

// inspect looks at everything at once; what it finds stands in a fixed order. The provider is asked of the
// server where it is not given.
func inspect(ctx context.Context, cfg *Config, provider cdc.Provider) ([]result, cdc.Provider) {
	results := []result{soundConfig(cfg)}
	var database []result
	endpoints := make([][]result, len(cfg.Endpoints))
	var g errgroup.Group
	g.Go(func() error {
		ctx, cancel := context.WithTimeout(ctx, databaseTime)
		defer cancel()
		database, provider = checkDatabase(ctx, cfg, provider)
		return nil
	})
	g.Go(func() error {
		var reach errgroup.Group
		reach.SetLimit(reachAtOnce)
		for i, e := range cfg.Endpoints {
			reach.Go(func() error {
				endpoints[i] = checkEndpoint(ctx, i, e)
				return nil
			})
		}
		return reach.Wait()
	})
	_ = g.Wait() // none of them fails
	results = append(results, database...)
	for _, e := range endpoints {
		results = append(results, e...)
	}
	return results, provider
}

func faultResult(topic string, f *cdc.Fault) result {
	return result{Topic: topic, Grade: broken, Text: f.Cause(), Remedy: f.Remedy}
}

func checkDatabase(ctx context.Context, cfg *Config, provider cdc.Provider) ([]result, cdc.Provider) {
	read := func(s outbox.Secret) func() (string, error) {
		return func() (string, error) { return s.Reveal(), nil }
	}
	stream := streamConfig(cfg, read(cfg.Database.Replication()), nil)
	stream.Provider = provider
	survey, err := cdc.Examine(ctx, &stream)
	var results []result
	if err != nil {
		results = append(results, faultResult("database", cdc.FaultOf(err)))
		if cfg.Database.ReplicationURL == "" {
			return results, provider // the other connection would only say so again
		}
		results[0].Text = "database.replication_url: " + results[0].Text
	} else {
		if provider == "" {
			provider = survey.Provider
		}
		results = append(results, surveyResults(survey, &stream)...)
		results = append(results, checkColumns(survey, cfg.Outbox)...)
	}
	schema, err := cdc.InspectSchema(ctx, read(cfg.Database.URL))
	if err != nil {
		return append(results, faultResult("database", cdc.FaultOf(err))), provider
	}
	results = append(results, checkPooler(cfg, schema)...)
	results = append(results, checkSchema(schema)...)
	if survey != nil {
		results = append(results, checkConnections(survey)...)
		found := checkCheckpoint(ctx, survey, schema, cfg, &stream)
		if survey.Slot == nil && found[0].Grade == broken { // then it will not be created
			results = slices.DeleteFunc(results, func(r result) bool { return r.Topic == "slot" })
		}
		results = append(results, found...)
	}
	return results, provider
}

// checkPooler judges the way of the store's connections, where that of replication is another.
func checkPooler(cfg *Config, sc *cdc.Schema) []result {
	switch {
	case cfg.Database.ReplicationURL == "" || sc.Pooler == "":
		return nil
	case sc.Prepares:
		return []result{{
			Topic: "pooler", Grade: warning, Text: "database.url leads through " + sc.Pooler,
			Remedy: "in transaction mode a statement that one session prepared is unknown to the next: add default_query_exec_mode=cache_describe to database.url; " +
				"not needed where the pooler is in session mode, or keeps track of prepared statements (PgBouncer 1.21 and later, max_prepared_statements)",
		}}
	}
	return []result{{Topic: "pooler", Grade: well, Text: "database.url leads through " + sc.Pooler + ", database.replication_url does not"}}
}

// streamConnections are those of one walhook beside the store's: the stream, its watch, and one for a while at a start.
const streamConnections = 3

// checkConnections tells where the role may not have as many connections as two instances hold.
func checkConnections(s *cdc.Survey) []result {
	const wanted = 2 * (store.Connections + streamConnections)
	limit := s.Around.ConnectionLimit
	if limit < 0 || limit >= wanted {
		return nil
	}
	return []result{{
		Topic: "role", Grade: warning, Text: fmt.Sprintf("role %s may have %s at a time", s.Role, count(limit, "connection")),
		Remedy: fmt.Sprintf("two instances hold up to %d: %s", wanted, cdc.ConnectionLimitSQL(s.Role, wanted)),
	}}
}

// surveyResults is how the stream itself would judge what was found.
func surveyResults(s *cdc.Survey, stream *cdc.Config) []result {
	var results []result
	for _, f := range s.Findings(stream) {
		r := result{Topic: f.Topic, Grade: well, Text: f.Text}
		switch {
		case f.Fault != nil:
			r = faultResult(f.Topic, f.Fault)
		case f.Warn != "":
			r.Grade, r.Remedy = warning, f.Warn
		}
		if f.Table != nil && f.Table.OID == 0 && s.Around != nil {
			if near := nearestTable(f.Table.Table, s.Around.Names); near != "" {
				r.Remedy = "did you mean " + near + "? " + r.Remedy
			}
		}
		results = append(results, r)
	}
	return results
}

// nearestTable is the table that a name which does not exist was most likely meant for, as the
// configuration would have it.
func nearestTable(missing cdc.Table, names []cdc.Table) string {
	fold := func(s string) string { return strings.ReplaceAll(strings.ToLower(s), "_", "") }
	best, least := "", 2+len(missing.Name)/3
	for _, n := range names {
		d := distance(fold(missing.Name), fold(n.Name))
		if n.Schema != missing.Schema {
			d++
		}
		if d < least {
			best, least = strings.ReplaceAll(n.Schema+"."+n.Name, `"`, `""`), d
			if strings.Count(best, ".") > 1 || strings.Contains(best, `"`) {
				best = n.String()
			}
		}
	}
	return best
}

// checkColumns maps the tables that were found as a start would.
func checkColumns(s *cdc.Survey, sources []outbox.Source) []result {
	mapper, err := outbox.NewMapper(sources)
	if err != nil { // the loader has seen to that
		return []result{{Topic: "columns", Grade: broken, Text: err.Error()}}
	}
	var results []result
	for i := range s.Tables {
		t := &s.Tables[i]
		if t.OID == 0 || t.Kind != 'r' && t.Kind != 'p' {
			continue
		}
		rel := t.Relation()
		var wrong *outbox.SchemaError
		if err := mapper.Resolve(rel); errors.As(err, &wrong) {
			results = append(results, result{Topic: "columns", Grade: broken, Text: wrong.Source + ": " + wrong.Problem, Remedy: wrong.Help})
			continue
		}
		results = append(results, result{Topic: "columns", Grade: well, Text: t.String() + ": " + mapper.Describe(rel)})
	}
	if err := mapper.CheckIDs(); err != nil {
		for line := range strings.SplitSeq(err.Error(), "\n") {
			what, how, _ := strings.Cut(line, ": give ")
			results = append(results, result{Topic: "columns", Grade: broken, Text: what, Remedy: "give " + how})
		}
	}
	return results
}

// checkSchema tells how the store's start would go.
func checkSchema(sc *cdc.Schema) []result {
	bad := func(text, remedy string) []result {
		return []result{{Topic: "schema", Grade: broken, Text: text, Remedy: remedy}}
	}
	const initApply = "run the SQL that `walhook init` prints (walhook init --apply --admin-url 'postgres://…')"
	now := store.SchemaVersion()
	switch {
	case !sc.Exists && sc.CreateDB:
		return []result{{Topic: "schema", Grade: well, Text: "schema walhook will be created"}}
	case !sc.Exists:
		return bad("schema walhook does not exist, and role "+sc.Role+" may not create it", initApply)
	case !sc.Usage, sc.Version == now && len(sc.Denied) > 0:
		what := "schema walhook"
		if sc.Usage {
			what = strings.Join(sc.Denied, ", ") + " of schema walhook"
		}
		return bad("role "+sc.Role+" may not use "+what, "as the owner of the schema:\n"+store.GrantSQL(sc.Role))
	case sc.Version > now:
		return bad(store.Newer(sc.Version).Error(), remedyNewerSchema)
	case sc.Version < now && !sc.Owned && !(sc.Version == 0 && sc.Create):
		return bad(fmt.Sprintf("schema walhook is at version %d, this program needs %d, and role %s may not migrate it", sc.Version, now, sc.Role), initApply)
	case sc.Version < now:
		return []result{{Topic: "schema", Grade: well, Text: fmt.Sprintf("schema walhook at version %d will be migrated to %d", sc.Version, now)}}
	}
	return []result{{Topic: "schema", Grade: well, Text: fmt.Sprintf("schema walhook, version %d", sc.Version)}}
}

// checkCheckpoint judges whose the checkpoints are as the store's claim would, and then, as the
// stream would, whether ours belongs to the slot.
func checkCheckpoint(ctx context.Context, s *cdc.Survey, sc *cdc.Schema, cfg *Config, stream *cdc.Config) []result {
	system := s.Around.System
	switch {
	case system != "" && sc.System != "" && system != sc.System, s.Database != sc.Database:
		return []result{{
			Topic: "checkpoint", Grade: broken,
			Text:   store.ErrOtherServer.Error() + " or databases: " + sc.Database + " and " + s.Database,
			Remedy: "make both name the same database of the same server, the former through the pooler, the latter directly",
		}}
	case system == "":
		system = sc.System
	}
	if copied, err := findCopy(ctx, sc, cfg, system); err != nil {
		return []result{faultResult("checkpoint", cdc.FaultOf(err))}
	} else if copied != nil {
		return []result{{
			Topic: "checkpoint", Grade: broken,
			Text:   fmt.Sprintf("this database is a copy, or was restored: the checkpoint of slot %s is of %s, but this is %s", copied.Slot, copied.Stored, copied.Here),
			Remedy: "nothing is sent from here until you adopt it: " + copied.AdoptSQL(),
		}}
	}
	var rec *cdc.Record
	for _, c := range sc.Checkpoints {
		if c.Slot == cfg.CDC.Slot {
			rec = &c.Record
		}
	}
	if rec != nil && rec.Gap == "" {
		if why := s.Drift(stream, rec); why != "" {
			rec.Gap = why
		}
	}
	if f := s.Judge(stream, rec, sc.FlushLSN); f != nil {
		return []result{faultResult("checkpoint", f)}
	}
	if rec == nil {
		return []result{{Topic: "checkpoint", Grade: well, Text: "no checkpoint yet: the first start makes it"}}
	}
	return []result{{Topic: "checkpoint", Grade: well, Text: "checkpoint at " + rec.LSN.String() + " of instance " + cfg.CDC.Instance}}
}

// findCopy asks the store whether the checkpoints are another database's. A schema that is yet to
// be migrated cannot be asked.
func findCopy(ctx context.Context, sc *cdc.Schema, cfg *Config, system string) (*store.CopyError, error) {
	if len(sc.Checkpoints) == 0 || sc.Version != store.SchemaVersion() {
		return nil, nil
	}
	st, err := store.Open(ctx, store.Config{
		URL: func() (string, error) { return cfg.Database.URL.Reveal(), nil }, Slot: cfg.CDC.Slot, Instance: cfg.CDC.Instance, Logger: zap.NewNop(),
	})
	if err != nil {
		return nil, err
	}
	defer st.Close()
	var copied *store.CopyError
	if _, _, err = st.Checkpoint(ctx, system); errors.As(err, &copied) {
		return copied, nil
	}
	return nil, err
}

// checkEndpoint connects to an endpoint without sending anything.
func checkEndpoint(ctx context.Context, i int, e *outbox.Endpoint) []result {
	key := fmt.Sprintf("endpoints[%d]", i)
	one := func(g grade, text, remedy string) result {
		return result{Topic: "endpoint", Grade: g, Text: e.ID + ": " + text, Remedy: remedy}
	}
	host, scheme := "", ""
	if u, err := url.Parse(e.URL); err == nil {
		host, scheme = u.Hostname(), u.Scheme
	}
	var results []result
	reached, err := sender.Reach(ctx, e)
	if err != nil {
		results = append(results, one(broken, host+": "+err.Error(), reachRemedy(err, key)))
	} else {
		text := host + " answers at " + reached.Address
		switch {
		case reached.Proxy && reached.TLS:
			text = host + " answers through the proxy at " + reached.Address
		case reached.Proxy:
			text = host + " is behind the proxy at " + reached.Address + ", which answers"
		}
		if reached.TLS {
			text += ", certificate until " + reached.CertExpires.UTC().Format(time.DateOnly)
		}
		results = append(results, one(well, text, ""))
		if reached.TLS && time.Until(reached.CertExpires) < certificateSoon {
			results = append(results, one(warning, "its certificate expires on "+reached.CertExpires.UTC().Format(time.DateTime), "have the receiver renew it; deliveries fail from then on"))
		}
	}
	if scheme == "http" && (reached.Proxy || !loopback(host, reached.Address)) {
		results = append(results, one(warning, "its URL is plain http", "whoever is in between reads and alters events: use https in "+key+".url"))
	}
	if e.SignsBy(outbox.SchemeStandard) && len(e.Secrets) == 0 {
		results = append(results, one(warning, "its requests are not signed", key+`.secrets: ["whsec_…"] (32 random bytes: echo whsec_$(openssl rand -base64 32)), or signing: none to say that it is meant so`))
	}
	return results
}

func reachRemedy(err error, key string) string {
	var u *sender.Unreached
	if !errors.As(err, &u) {
		return "correct " + key
	}
	const parked = "; until then its deliveries are parked"
	switch u.Reason {
	case outbox.ReasonDNS:
		return "correct the host in " + key + ".url, or the DNS of this machine" + parked
	case outbox.ReasonConnect:
		return "start the receiver, or correct " + key + ".url" + parked
	case outbox.ReasonTimeout:
		return "let this machine through to the receiver (firewall, routes, proxy), or correct " + key + ".url" + parked
	case outbox.ReasonTLS:
		return "have the receiver's certificate mended, or name its authority in " + key + ".tls.ca" + parked
	case outbox.ReasonRefusedAddress:
		return "allow the address in " + key + ".network.allow, or take it out of network.deny; deliveries to it are dead at once"
	}
	return "look at the receiver, or correct " + key + ".url" + parked
}

// loopback tells whether host, or else the address it led to, is this machine.
func loopback(host, address string) bool {
	if ap, err := netip.ParseAddrPort(address); err == nil {
		return ap.Addr().Unmap().IsLoopback()
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
