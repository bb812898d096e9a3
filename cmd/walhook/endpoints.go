package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/outbox/store"
	"github.com/walhook/walhook/sender"
)

func endpointsCommand(o *options) *cobra.Command {
	e := &endpointsCommands{o}
	cmd := group("endpoints", "Look at endpoints and change those of the table",
		e.list(), e.show(), e.add(), e.update(),
		e.status("pause", "Park what comes for an endpoint and send nothing", outbox.Paused),
		e.status("resume", "End a pause", outbox.Enabled),
		e.status("disable", "Let new events pass an endpoint by", outbox.Disabled),
		e.status("enable", "Have an endpoint get events again, whatever stopped it", outbox.Enabled),
		e.remove(), e.rotate(), e.test())
	cmd.Long = `Endpoints of the configuration file can be shown, paused, resumed, disabled, enabled and tested;
all else is done in the file. Those of the table walhook.endpoints can be changed in every way. What
is changed takes effect in a running walhook within seconds.`
	outputFlag(cmd, o)
	return cmd
}

type endpointsCommands struct{ *options }

// do runs a command with the tables open.
func (o *options) do(f func(ctx context.Context, d *desk, cmd *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		d, err := o.desk(cmd.Context())
		if err != nil {
			return err
		}
		defer d.close()
		return f(cmd.Context(), d, cmd, args)
	}
}

// known is an endpoint of the file or of the table.
type known struct {
	id     string
	origin outbox.Origin
	status outbox.Status
	reason string            // of the status
	ep     *outbox.Endpoint  // nil where it does not validate
	row    *store.Registered // of the table
}

// endpoints are all endpoints, those of the file first.
func (d *desk) endpoints(ctx context.Context) ([]known, error) {
	states, err := d.store.LoadEndpointStates(ctx)
	if err != nil {
		return nil, said(err)
	}
	rows, err := d.store.Registered(ctx, "")
	if err != nil {
		return nil, said(err)
	}
	var all []known
	ofFile := map[string]bool{}
	for _, ep := range d.cfg.Endpoints {
		k := known{id: ep.ID, origin: outbox.FromFile, status: ep.Status, ep: ep}
		for _, st := range states {
			if st.EndpointID == ep.ID {
				k.status, k.reason = st.Status, st.Reason
			}
		}
		changed := *ep
		changed.Status = k.status
		k.ep = &changed
		ofFile[ep.ID] = true
		all = append(all, k)
	}
	for i := range rows {
		row := &rows[i]
		k := known{id: row.ID, origin: outbox.FromTable, status: outbox.Status(row.Status), reason: row.StatusReason, row: row}
		if ofFile[row.ID] {
			k.status, k.reason = outbox.Invalid, "the configuration file has an endpoint of this id"
		} else if k.ep, err = parseRegistered(d.cfg, row.Registration); err != nil {
			k.status, k.reason = outbox.Invalid, strings.ReplaceAll(err.Error(), "\n", "; ")
		}
		all = append(all, k)
	}
	return all, nil
}

// endpoint finds one endpoint by its id.
func (d *desk) endpoint(ctx context.Context, id string) (known, error) {
	all, err := d.endpoints(ctx)
	if err != nil {
		return known{}, err
	}
	i := slices.IndexFunc(all, func(k known) bool { return k.id == id })
	if i >= 0 {
		return all[i], nil
	}
	ids := make([]string, len(all))
	for i, k := range all {
		ids[i] = k.id
	}
	return known{}, fmt.Errorf("there is no endpoint %q%s; see walhook endpoints list", printable(id), didYouMean(id, ids))
}

// registered is endpoint for what can be done in the table alone.
func (d *desk) registered(ctx context.Context, id, what string) (known, error) {
	k, err := d.endpoint(ctx, id)
	if err == nil && k.origin == outbox.FromFile {
		return k, fmt.Errorf("endpoint %s stands in the configuration file: %s it in %s", k.id, what, d.cfg.Path)
	}
	return k, err
}

// shownEndpoint is an endpoint in JSON.
type shownEndpoint struct {
	ID          string         `json:"id"`
	Origin      outbox.Origin  `json:"origin"`
	Status      outbox.Status  `json:"status"`
	Reason      string         `json:"status_reason,omitempty"`
	Tenant      string         `json:"tenant"`
	Events      []string       `json:"events"`
	URL         string         `json:"url"`
	Parked      int64          `json:"parked"`
	Dead        int64          `json:"dead"`
	Oldest      *time.Time     `json:"oldest_parked_at"`
	Description string         `json:"description,omitempty"`
	Filter      string         `json:"filter,omitempty"`
	Secrets     *int           `json:"secrets,omitempty"` // how many
	Previous    *time.Time     `json:"previous_secrets_until,omitempty"`
	Effective   map[string]any `json:"effective,omitempty"`
	Settings    any            `json:"settings,omitempty"`
	Created     *time.Time     `json:"created_at,omitempty"`
	Updated     *time.Time     `json:"updated_at,omitempty"`
	Errors      []shownError   `json:"last_errors,omitempty"`
}

type shownError struct {
	State  outbox.State  `json:"state"`
	Reason outbox.Reason `json:"reason"`
	Status int           `json:"last_status,omitempty"`
	Detail string        `json:"last_error,omitempty"`
	Event  string        `json:"event"`
	At     time.Time     `json:"at"`
}

func shown(k known, q store.Queue) shownEndpoint {
	s := shownEndpoint{ID: k.id, Origin: k.origin, Status: k.status, Reason: k.reason, Parked: q.Parked, Dead: q.Dead, Oldest: optional(q.Oldest)}
	if k.ep != nil {
		s.Tenant, s.Events, s.URL = k.ep.Tenant, k.ep.Events, sender.ShownURL(k.ep.URL)
	} else {
		s.Tenant, s.Events, s.URL = k.row.Tenant, k.row.Events, sender.ShownURL(k.row.URL)
	}
	return s
}

func (e *endpointsCommands) list() *cobra.Command {
	return &cobra.Command{Use: "list", Short: "List all endpoints, of the file and of the table", Args: noArgs, RunE: e.do(func(ctx context.Context, d *desk, cmd *cobra.Command, _ []string) error {
		all, err := d.endpoints(ctx)
		if err != nil {
			return err
		}
		queues, err := d.store.Queues(ctx)
		if err != nil {
			return said(err)
		}
		list := make([]shownEndpoint, len(all))
		for i, k := range all {
			list[i] = shown(k, queues[k.id])
		}
		if e.output == "json" {
			return writeJSON(cmd.OutOrStdout(), struct {
				Endpoints []shownEndpoint `json:"endpoints"`
			}{list}, "  ")
		}
		c := newColumns(cmd.OutOrStdout(), "ID", "ORIGIN", "STATUS", "TENANT", "EVENTS", "URL", "PARKED", "DEAD", "OLDEST")
		for i, s := range list {
			c.row(s.ID, s.Origin, s.Status, s.Tenant, strings.Join(s.Events, ","), s.URL, s.Parked, s.Dead, age(queues[all[i].id].Oldest))
		}
		return c.flush()
	})}
}

// lastErrors is how many deliveries show tells of.
const lastErrors = 5

func (e *endpointsCommands) show() *cobra.Command {
	return &cobra.Command{Use: "show ID", Short: "Show one endpoint", Args: oneArg("the id of an endpoint"), RunE: e.do(func(ctx context.Context, d *desk, cmd *cobra.Command, args []string) error {
		k, err := d.endpoint(ctx, args[0])
		if err != nil {
			return err
		}
		queues, err := d.store.Queues(ctx)
		if err != nil {
			return said(err)
		}
		s := shown(k, queues[k.id])
		if k.row != nil {
			n := len(k.row.Secrets)
			s.Secrets, s.Previous = &n, optional(k.row.PreviousUntil)
			s.Created, s.Updated = optional(k.row.CreatedAt), optional(k.row.UpdatedAt)
			s.Description, s.Filter, s.Settings = k.row.Description, k.row.Filter, shownSettings(k.row.Settings)
		} else {
			n := len(k.ep.Secrets)
			s.Secrets = &n
		}
		if k.ep != nil {
			s.Effective = effective(k.ep)
		}
		found, _, err := d.store.Records(ctx, store.Filter{Endpoint: k.id}, 0, lastErrors)
		if err != nil {
			return said(err)
		}
		for _, r := range found {
			s.Errors = append(s.Errors, shownError{r.State, r.Reason, r.Status, r.Detail, r.EventID, r.Created})
		}
		if e.output == "json" {
			return writeJSON(cmd.OutOrStdout(), s, "  ")
		}
		return s.print(cmd.OutOrStdout())
	})}
}

func (s *shownEndpoint) print(w io.Writer) error {
	c := newColumns(w)
	line := func(name string, cell any) { c.row(name+":", cell) }
	line("id", s.ID)
	line("origin", s.Origin)
	line("status", s.Status)
	if s.Reason != "" {
		line("reason", s.Reason)
	}
	line("url", s.URL)
	line("tenant", s.Tenant)
	line("events", strings.Join(s.Events, ", "))
	if s.Filter != "" {
		line("filter", s.Filter)
	}
	if s.Description != "" {
		line("description", s.Description)
	}
	secrets := fmt.Sprint(*s.Secrets)
	if s.Previous != nil && *s.Secrets > 1 {
		secrets += ", all but the newest until " + when(*s.Previous)
	}
	line("secrets", secrets)
	if s.Created != nil {
		line("created", *s.Created)
		line("updated", *s.Updated)
	}
	oldest := ""
	if s.Oldest != nil {
		oldest = ", the oldest since " + when(*s.Oldest)
	}
	line("parked", fmt.Sprint(s.Parked)+oldest)
	line("dead", s.Dead)
	for _, name := range slices.Sorted(maps.Keys(s.Effective)) {
		line(name, inJSON(s.Effective[name]))
	}
	if s.Settings != nil {
		line("settings", inJSON(s.Settings))
	}
	if err := c.flush(); err != nil || len(s.Errors) == 0 {
		return err
	}
	fmt.Fprintln(w, "\nnewest deliveries that wait or died:")
	c = newColumns(w, "AT", "STATE", "REASON", "STATUS", "ERROR", "EVENT")
	for _, r := range s.Errors {
		c.row(r.At, r.State, r.Reason, number(r.Status), r.Detail, r.Event)
	}
	return c.flush()
}

// number is empty for zero.
func number(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprint(n)
}

func inJSON(v any) string {
	if s, ok := v.(string); ok {
		return s
	}
	b, err := json.Marshal(v)
	if err != nil {
		return ""
	}
	return string(b)
}

// effective are the settings in force that hold no credential, whoever gave them.
func effective(ep *outbox.Endpoint) map[string]any {
	schedule := make([]string, len(ep.Retry.Schedule))
	for i, step := range ep.Retry.Schedule {
		schedule[i] = formatDuration(step)
	}
	signing := make([]string, len(ep.Signing))
	for i, s := range ep.Signing {
		signing[i] = string(s.Scheme)
	}
	m := map[string]any{
		"signing": signing, "format": string(ep.Format), "ordering": string(ep.Ordering), "timeout": formatDuration(ep.Timeout), "concurrency": ep.Concurrency,
		"retry.schedule": schedule, "retry.max_age": formatDuration(ep.Retry.MaxAge), "disable_after": formatDuration(ep.DisableAfter), "max_payload": ep.MaxPayload,
		"breaker": fmt.Sprintf("after %d failures in a row, or %v of %d or more within %s; open for %s", ep.Breaker.ConsecutiveFailures,
			ep.Breaker.FailureRate, ep.Breaker.MinRequests, formatDuration(ep.Breaker.Window), formatDuration(ep.Breaker.OpenFor)),
	}
	if len(ep.Headers) > 0 {
		m["headers"] = slices.Sorted(maps.Keys(ep.Headers))
	}
	if len(ep.Retry.DeadOn) > 0 {
		m["retry.dead_on"] = ep.Retry.DeadOn
	}
	if len(ep.Network.Allow) > 0 {
		m["network.allow"] = ep.Network.Allow
	}
	if len(ep.Network.Deny) > 0 {
		m["network.deny"] = ep.Network.Deny
	}
	return m
}

// openSettings are those whose values hold no credential; of all others only the keys are shown.
var openSettings = []string{
	"signing", "format", "ordering", "timeout", "concurrency", "rate_limit", "batch", "retry", "breaker", "disable_after", "max_payload", "network",
}

// shownSettings are the settings of a row with nothing in them that may be a credential.
func shownSettings(text json.RawMessage) any {
	var settings map[string]any
	if err := json.Unmarshal(text, &settings); err != nil {
		return nil
	}
	for key, v := range settings {
		if !slices.Contains(openSettings, key) {
			settings[key] = veiled(v)
		}
	}
	return settings
}

func veiled(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for key := range v {
			v[key] = veiled(v[key])
		}
		return v
	case []any:
		for i := range v {
			v[i] = veiled(v[i])
		}
		return v
	}
	return "[redacted]"
}

// edit is what add and update are told.
type edit struct {
	id, url, tenant, filter, description string
	events, secrets, set, unset          []string
}

func (e *edit) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&e.url, "url", "", "where to send: https://…")
	f.StringSliceVar(&e.events, "events", nil, "globs on the type, as in invoice.*,order.paid")
	f.StringVar(&e.tenant, "tenant", "", "exactly this tenant; * for all")
	f.StringVar(&e.filter, "filter", "", "CEL over the event")
	f.StringVar(&e.description, "description", "", "for people")
	f.StringArrayVar(&e.secrets, "secret", nil, "newest first; - reads lines from stdin, where neither a shell nor ps shows them")
	f.StringArrayVar(&e.set, "set", nil, "another setting, as in retry.max_age=2d, headers.X-Env=prod or format=raw; the value is YAML")
}

// apply puts what was given into a row.
func (e *edit) apply(cmd *cobra.Command, row *store.Registered) error {
	given := cmd.Flags().Changed
	for name, to := range map[string]*string{"url": &row.URL, "tenant": &row.Tenant, "filter": &row.Filter, "description": &row.Description} {
		if given(name) {
			*to = map[string]string{"url": e.url, "tenant": e.tenant, "filter": e.filter, "description": e.description}[name]
		}
	}
	if given("events") {
		row.Events = e.events
	}
	if given("secret") {
		row.Secrets, row.PreviousUntil = nil, time.Time{}
		for _, s := range e.secrets {
			if s != "-" {
				row.Secrets = append(row.Secrets, outbox.Secret(s))
				continue
			}
			text, err := io.ReadAll(io.LimitReader(cmd.InOrStdin(), maxConfig))
			if err != nil {
				return fmt.Errorf("read secrets: %w", err)
			}
			for line := range strings.Lines(string(text)) {
				if line = strings.TrimSpace(line); line != "" {
					row.Secrets = append(row.Secrets, outbox.Secret(line))
				}
			}
		}
	}
	settings := map[string]any{}
	if len(row.Settings) > 0 {
		if err := json.Unmarshal(row.Settings, &settings); err != nil {
			return errors.New("its settings are not a JSON object")
		}
	}
	for _, s := range e.set {
		key, text, ok := strings.Cut(s, "=")
		if !ok || key == "" || text == "" {
			return usageError{errors.New("--set wants key=value, as in retry.max_age=2d")}
		}
		var v any
		if err := yaml.Unmarshal([]byte(text), &v); err != nil {
			return usageError{fmt.Errorf("--set %s: the value is not YAML", safeKey(key))}
		}
		if err := put(settings, key, v); err != nil {
			return err
		}
	}
	for _, key := range e.unset {
		if err := put(settings, key, nil); err != nil {
			return err
		}
	}
	text, err := json.Marshal(settings)
	if err != nil {
		return usageError{errors.New("--set: a value has no form in JSON")}
	}
	row.Settings = text
	return nil
}

// put sets a dotted key; nil takes it away.
func put(settings map[string]any, dotted string, v any) error {
	path := strings.Split(dotted, ".")
	if slices.Contains(rowKeys, path[0]) || path[0] == "description" || path[0] == "status" {
		return usageError{fmt.Errorf("--set %s: it has a flag of its own, or a command", path[0])}
	}
	if path[0] == "headers" && len(path) > 2 { // a header's name may have dots
		path = []string{"headers", strings.Join(path[1:], ".")}
	}
	for _, key := range path[:len(path)-1] {
		below, ok := settings[key].(map[string]any)
		if !ok {
			below = map[string]any{}
			settings[key] = below
		}
		settings = below
	}
	if last := path[len(path)-1]; v == nil {
		delete(settings, last)
	} else {
		settings[last] = v
	}
	return nil
}

// newSecret is 32 random bytes as Standard Webhooks writes them.
func newSecret() outbox.Secret {
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails
	return outbox.Secret("whsec_" + base64.StdEncoding.EncodeToString(key))
}

// done tells what became of an endpoint. secret is one that was made just now, the only way in
// which any is ever printed.
func (e *endpointsCommands) done(w io.Writer, id string, status outbox.Status, text string, secret outbox.Secret) error {
	if e.output == "json" {
		return writeJSON(w, struct {
			ID     string        `json:"id"`
			Status outbox.Status `json:"status,omitempty"`
			Secret string        `json:"secret,omitempty"`
		}{id, status, secret.Reveal()}, "  ")
	}
	fmt.Fprintf(w, "endpoint %s %s\n", id, text)
	if secret != "" {
		fmt.Fprintf(w, "secret: %s\n(it is not shown again)\n", secret.Reveal())
	}
	return nil
}

// refusedRow says what is wrong with the row that a command would have written.
func refusedRow(err error) error {
	return usageError{errors.New(strings.ReplaceAll(err.Error(), "\n", "\n         "))}
}

func (e *endpointsCommands) add() *cobra.Command {
	in := &edit{}
	cmd := &cobra.Command{Use: "add --url URL", Short: "Add an endpoint to the table", Args: noArgs, RunE: e.do(func(ctx context.Context, d *desk, cmd *cobra.Command, _ []string) error {
		row := store.Registered{Registration: outbox.Registration{ID: in.id, Events: []string{"*"}, Status: outbox.Enabled}}
		if err := in.apply(cmd, &row); err != nil {
			return err
		}
		var secret outbox.Secret
		if !cmd.Flags().Changed("secret") {
			secret = newSecret()
			row.Secrets = []outbox.Secret{secret}
		}
		if _, err := parseRegistered(d.cfg, row.Registration); err != nil {
			return refusedRow(err)
		}
		if slices.ContainsFunc(d.cfg.Endpoints, func(ep *outbox.Endpoint) bool { return ep.ID == row.ID }) {
			return usageError{fmt.Errorf("--id %s: %s has an endpoint of this id", row.ID, d.cfg.Path)}
		}
		row, err := d.store.Register(ctx, row)
		switch {
		case errors.Is(err, store.ErrTaken):
			return usageError{fmt.Errorf("--id %s: %w", row.ID, err)}
		case err != nil:
			return said(err)
		}
		return e.done(cmd.OutOrStdout(), row.ID, outbox.Enabled, "added; it gets what is committed from now on", secret)
	})}
	in.flags(cmd)
	cmd.Flags().StringVar(&in.id, "id", "", "its id (default one that is made)")
	return cmd
}

func (e *endpointsCommands) update() *cobra.Command {
	in := &edit{}
	cmd := &cobra.Command{Use: "update ID", Short: "Change an endpoint of the table", Args: oneArg("the id of an endpoint"), RunE: e.do(func(ctx context.Context, d *desk, cmd *cobra.Command, args []string) error {
		k, err := d.registered(ctx, args[0], "change")
		if err != nil {
			return err
		}
		row := *k.row
		if err := in.apply(cmd, &row); err != nil {
			return err
		}
		if row.Status == outbox.Invalid { // it was taken back from there, or it fails below
			row.Status, row.StatusReason = outbox.Enabled, ""
		}
		if _, err := parseRegistered(d.cfg, row.Registration); err != nil {
			return refusedRow(err)
		}
		if err := d.store.UpdateRegistered(ctx, row); err != nil {
			return written(err)
		}
		return e.done(cmd.OutOrStdout(), row.ID, outbox.Status(row.Status), "changed", "")
	})}
	in.flags(cmd)
	cmd.Flags().StringArrayVar(&in.unset, "unset", nil, "take a setting back to its default, as in retry.max_age")
	return cmd
}

// written is said, but for what a second try mends.
func written(err error) error {
	if errors.Is(err, store.ErrChanged) {
		return fmt.Errorf("%w: try again", err)
	}
	return said(err)
}

func (e *endpointsCommands) status(use, about string, to outbox.Status) *cobra.Command {
	reason := ""
	cmd := &cobra.Command{Use: use + " ID", Short: about, Args: oneArg("the id of an endpoint"), RunE: e.do(func(ctx context.Context, d *desk, cmd *cobra.Command, args []string) error {
		k, err := d.endpoint(ctx, args[0])
		if err != nil {
			return err
		}
		switch {
		case k.status == outbox.Invalid:
			return fmt.Errorf("endpoint %s is invalid: %s", k.id, printable(k.reason))
		case use == "resume" && k.status == outbox.Disabled:
			return fmt.Errorf("endpoint %s is disabled and not paused (%s): walhook endpoints enable %s", k.id, printable(k.reason), k.id)
		}
		if k.origin == outbox.FromFile {
			if to == outbox.Enabled {
				err = d.store.DeleteEndpointState(ctx, k.id)
			} else {
				err = d.store.SaveEndpointState(ctx, store.EndpointState{EndpointID: k.id, Status: to, Reason: reason, Since: time.Now()})
			}
			if err == nil {
				err = d.store.Nudge(ctx)
			}
		} else {
			row := *k.row
			row.Status, row.StatusReason = to, reason
			err = d.store.UpdateRegistered(ctx, row)
		}
		if err != nil {
			return written(err)
		}
		return e.done(cmd.OutOrStdout(), k.id, to, "is "+string(to), "")
	})}
	if to != outbox.Enabled {
		cmd.Flags().StringVar(&reason, "reason", "by command", "why, for people")
	}
	return cmd
}

func (e *endpointsCommands) remove() *cobra.Command {
	return &cobra.Command{Use: "remove ID", Short: "Remove an endpoint of the table; what is parked for it is discarded", Args: oneArg("the id of an endpoint"), RunE: e.do(func(ctx context.Context, d *desk, cmd *cobra.Command, args []string) error {
		k, err := d.registered(ctx, args[0], "remove")
		if err != nil {
			return err
		}
		if err := d.store.Unregister(ctx, k.id); err != nil {
			return said(err)
		}
		return e.done(cmd.OutOrStdout(), k.id, "", "removed", "")
	})}
}

func (e *endpointsCommands) rotate() *cobra.Command {
	overlap := ""
	cmd := &cobra.Command{Use: "rotate-secret ID", Short: "Give an endpoint of the table a new secret, which is printed", Args: oneArg("the id of an endpoint")}
	cmd.Long = `Puts a new secret in front of the present one. For the overlap both sign every request, so that a
receiver verifies with either; then the new one signs alone.`
	cmd.Flags().StringVar(&overlap, "overlap", "24h", "how long the present secret goes on signing too; 0 drops it at once")
	cmd.RunE = e.do(func(ctx context.Context, d *desk, cmd *cobra.Command, args []string) error {
		both, err := flagDuration("overlap", overlap)
		if err != nil {
			return err
		}
		k, err := d.registered(ctx, args[0], "rotate the secret of")
		if err != nil {
			return err
		}
		if k.ep == nil {
			return fmt.Errorf("endpoint %s is invalid: %s", k.id, printable(k.reason))
		}
		row := *k.row
		if err := rotatable(k.ep, row.Secrets, both); err != nil {
			return fmt.Errorf("endpoint %s %w", k.id, err)
		}
		secret := newSecret()
		secrets := []outbox.Secret{secret}
		text := "has a new secret, which signs alone from now on"
		row.PreviousUntil = time.Time{}
		if both > 0 && len(row.Secrets) > 0 {
			secrets = append(secrets, row.Secrets[0])
			row.PreviousUntil = time.Now().Add(both)
			text = "has a new secret; the one before signs too until " + when(row.PreviousUntil)
		}
		row.Secrets = secrets
		if err := d.store.UpdateRegistered(ctx, row); err != nil {
			return written(err)
		}
		return e.done(cmd.OutOrStdout(), k.id, "", text, secret)
	})
	return cmd
}

// rotatable tells why a new secret cannot be made for an endpoint.
func rotatable(ep *outbox.Endpoint, secrets []outbox.Secret, overlap time.Duration) error {
	if ep.SignsBy(outbox.SchemeNone) {
		return errors.New("signs nothing (signing: none)")
	}
	if len(secrets) > 0 && strings.HasPrefix(secrets[0].Reveal(), "whsk_") {
		return errors.New("signs with an ed25519 key, of which the receiver needs the public half: make one, and give it with walhook endpoints update --secret")
	}
	for _, s := range ep.Signing {
		if overlap > 0 && s.Scheme != outbox.SchemeStandard && s.Scheme != outbox.SchemeStripe {
			return fmt.Errorf("signs by %s, which has room for one signature: there is no overlap, so give the receiver the new secret and --overlap 0 at the same time", s.Scheme)
		}
	}
	return nil
}

// flagDuration reads a duration as the configuration has it; 0 is none.
func flagDuration(name, text string) (time.Duration, error) {
	d, wrong := parseDuration(text)
	if wrong == "" && (d < 0 || d > 365*day) {
		wrong = "is out of range"
	}
	if wrong != "" {
		return 0, usageError{fmt.Errorf("--%s: %q %s (allowed: 0 to 365d)", name, text, wrong)}
	}
	return d, nil
}

// newClient is a sender of the command's own, with circuits of its own.
func (d *desk) newClient() (*sender.Client, error) {
	room := hostLimits()
	return sender.New(sender.Config{Version: version, Source: eventSource(d.cfg), MaxAttempts: room.attempts, MaxIdleConns: room.idle})
}

func (e *endpointsCommands) test() *cobra.Command {
	return &cobra.Command{Use: "test ID", Short: "Send an endpoint one signed event walhook.test, and show request and answer", Args: oneArg("the id of an endpoint"), RunE: e.do(func(ctx context.Context, d *desk, cmd *cobra.Command, args []string) error {
		k, err := d.endpoint(ctx, args[0])
		if err != nil {
			return err
		}
		if k.ep == nil {
			return fmt.Errorf("endpoint %s is invalid: %s", k.id, printable(k.reason))
		}
		client, err := d.newClient()
		if err != nil {
			return err
		}
		defer client.Close()
		now := time.Now().UTC()
		ev := &outbox.Event{ID: "test_" + strings.ToLower(rand.Text()), Type: "walhook.test", Time: now, Commit: now, JSON: true, Data: []byte(`{"message":"This is a test."}`)}
		if k.ep.Tenant != "*" {
			ev.Tenant = k.ep.Tenant
		}
		x := client.Try(ctx, outbox.Alone(ev, k.ep))
		took := time.Since(now)
		if err := e.exchanged(cmd.OutOrStdout(), k.ep, ev.ID, x, took); err != nil {
			return err
		}
		if x.Outcome.Verdict != outbox.Delivered {
			return failed{fmt.Errorf("endpoint %s: %s", k.id, printable(x.Outcome.Detail)), exitFailed}
		}
		return nil
	})}
}

// exchanged prints what was sent and what came back.
func (e *endpointsCommands) exchanged(w io.Writer, ep *outbox.Endpoint, id string, x *sender.Exchange, took time.Duration) error {
	flat := func(h http.Header) map[string]string {
		m := map[string]string{}
		for name, values := range h {
			m[name] = strings.Join(values, ", ")
		}
		return m
	}
	var asked, answer *message
	if x.Method != "" {
		asked = &message{Line: x.Method + " " + x.URL, Headers: flat(x.Header), Body: string(x.Body)}
	}
	if x.Status != "" {
		answer = &message{Line: x.Proto + " " + x.Status, Headers: flat(x.Answer), Body: strings.ToValidUTF8(string(x.Text), "\uFFFD"), Cut: x.Cut}
	}
	if e.output == "json" {
		return writeJSON(w, struct {
			ID       string        `json:"id"`
			Event    string        `json:"event"`
			Verdict  string        `json:"verdict"`
			Reason   outbox.Reason `json:"reason,omitempty"`
			Status   int           `json:"status,omitempty"`
			Detail   string        `json:"detail,omitempty"`
			Seconds  float64       `json:"seconds"`
			Request  *message      `json:"request"`
			Response *message      `json:"response"`
		}{ep.ID, id, x.Outcome.Verdict.String(), x.Outcome.Reason, x.Outcome.Status, x.Outcome.Detail, took.Seconds(), asked, answer}, "  ")
	}
	var b strings.Builder
	asked.print(&b, ">")
	answer.print(&b, "<")
	if x.Outcome.Verdict == outbox.Delivered {
		fmt.Fprintf(&b, "delivered in %s\n", shortly(took))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// message is a request or an answer as people see it.
type message struct {
	Line    string            `json:"line"`
	Headers map[string]string `json:"headers"`
	Body    string            `json:"body"`
	Cut     bool              `json:"cut,omitempty"` // the body is longer
}

// print has a mark before each line; nil prints nothing.
func (m *message) print(b *strings.Builder, mark string) {
	if m == nil {
		return
	}
	fmt.Fprintf(b, "%s %s\n", mark, printable(m.Line))
	for _, name := range slices.Sorted(maps.Keys(m.Headers)) {
		fmt.Fprintf(b, "%s %s: %s\n", mark, printable(name), printable(m.Headers[name]))
	}
	fmt.Fprintln(b, mark)
	if m.Body != "" {
		for line := range strings.SplitSeq(strings.TrimSuffix(page(m.Body), "\n"), "\n") {
			fmt.Fprintf(b, "%s %s\n", mark, line)
		}
	}
	if m.Cut {
		fmt.Fprintf(b, "%s …\n", mark)
	}
	fmt.Fprintln(b)
}
