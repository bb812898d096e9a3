package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/token"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/sender"
)

// registryPublication is what publishes walhook.endpoints, beside the publication of the outbox.
func registryPublication(publication string) string {
	const suffix = "_endpoints"
	return publication[:min(len(publication), 63-len(suffix))] + suffix
}

// rowKeys are the settings that have a column of their own.
var rowKeys = []string{"id", "url", "tenant", "events", "filter", "secrets"}

// maxRegistered bounds a row, whose writers need not be friends; a rule may have 16 KiB, and a bundle of
// certificates is not much longer.
const maxRegistered = 128 << 10

// maxMistakes is how many mistakes of a row are told.
const maxMistakes = 20

// parseRegistered makes an endpoint of a row of walhook.endpoints, by the rules of the file and over its
// defaults. Nothing in a row is more than it says: other people write them, so no variable is put in. The error
// tells its writer what is wrong, a line a mistake.
func parseRegistered(cfg *Config, row outbox.Registration) (*outbox.Endpoint, error) {
	size := len(row.URL) + len(row.Tenant) + len(row.Filter) + len(row.Settings)
	for _, s := range row.Events {
		size += len(s)
	}
	for _, s := range row.Secrets {
		size += len(s.Reveal())
	}
	if size > maxRegistered {
		return nil, fmt.Errorf("has %d bytes (allowed: up to %d)", size, maxRegistered)
	}
	l := &loader{literal: true}
	settings, err := readObject(row.Settings)
	if err != nil {
		return nil, errors.New("settings: is not a JSON object")
	}
	if strings.ContainsFunc(row.URL+row.Tenant+row.Filter+strings.Join(row.Events, "")+string(row.Settings), isMask) {
		return nil, errors.New("holds characters of a private plane that no setting needs")
	}
	var problems []string
	own := map[string]any{"url": row.URL}
	if row.ID != "" {
		own["id"] = row.ID
	}
	if row.Tenant != "" {
		own["tenant"] = row.Tenant
	}
	if row.Events != nil {
		own["events"] = texts(row.Events)
	}
	if row.Filter != "" {
		own["filter"] = row.Filter
	}
	if len(row.Secrets) > 0 {
		secrets := make([]string, len(row.Secrets))
		for i, s := range row.Secrets {
			secrets[i] = s.Reveal()
		}
		own["secrets"] = texts(secrets)
	}
	for _, key := range slices.Sorted(maps.Keys(settings)) {
		if slices.Contains(rowKeys, key) {
			problems = append(problems, "settings."+key+": has a column of its own")
			continue
		}
		own[key] = settings[key]
	}
	base := cfg.stranger()
	base.Tenant, base.Network = "", outbox.Network{} // whose events it gets is the row's to say, never a default's
	root := value{node: jsonNode(own)}
	e, sound := l.endpoint(root, base)
	e.Network = narrow(cfg.Defaults.Network, e.Network)
	if sound && len(problems) == 0 {
		if err := proxied(&e, cfg.environment); err != nil {
			l.foreign(root, err)
		}
		if err := sender.Validate(e); err != nil {
			l.foreign(root, err)
		}
	}
	e.PreviousUntil = row.PreviousUntil
	for _, p := range l.problems {
		text := strings.TrimPrefix(p.Key, ".")
		if text != "" {
			text += ": "
		}
		text += p.Text
		if p.Allowed != "" {
			text += " (allowed: " + p.Allowed + ")"
		}
		problems = append(problems, text)
	}
	if len(problems) > 0 {
		return nil, errors.New(strings.Join(problems, "\n"))
	}
	if row.Status != "" {
		e.Status = row.Status
	}
	return &e, nil
}

// readObject reads a JSON object; numbers stay as they are written.
func readObject(text []byte) (map[string]any, error) {
	if len(text) == 0 {
		return nil, nil
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	var object map[string]any
	if err := dec.Decode(&object); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows it")
	}
	return object, nil
}

func texts(all []string) []any {
	out := make([]any, len(all))
	for i, s := range all {
		out[i] = s
	}
	return out
}

// jsonNode is a decoded JSON value as the tree that the loader walks.
func jsonNode(v any) ast.Node {
	at := func(text string) *token.Token { return token.String(text, text, nil) }
	switch v := v.(type) {
	case nil:
		return ast.Null(token.New("null", "null", nil))
	case map[string]any:
		m := ast.Mapping(at(""), true)
		for _, key := range slices.Sorted(maps.Keys(v)) {
			m.Values = append(m.Values, ast.MappingValue(token.MappingValue(nil), ast.String(at(key)), jsonNode(v[key])))
		}
		return m
	case []any:
		s := ast.Sequence(at(""), true)
		for _, item := range v {
			s.Values = append(s.Values, jsonNode(item))
		}
		return s
	case bool:
		text := "false"
		if v {
			text = "true"
		}
		return ast.String(at(text))
	case json.Number:
		return ast.String(at(v.String()))
	default:
		return ast.String(at(v.(string)))
	}
}
