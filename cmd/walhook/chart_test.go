package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/sender/sendertest"
)

var chartDir = filepath.Join("..", "..", "charts", "walhook")

func readChart(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(chartDir, filepath.FromSlash(name)))
	require.NoError(t, err)
	return text
}

// schemaNode is as much of a JSON schema as the chart's uses for what may stand where.
type schemaNode struct {
	Ref                  string                 `json:"$ref"`
	Properties           map[string]*schemaNode `json:"properties"`
	AdditionalProperties any                    `json:"additionalProperties"`
	Items                *schemaNode            `json:"items"`
	AnyOf                []*schemaNode          `json:"anyOf"`
	Enum                 []any                  `json:"enum"`
	Defs                 map[string]*schemaNode `json:"$defs"`
}

type valuesSchema struct{ root *schemaNode }

func readSchema(t *testing.T) valuesSchema {
	t.Helper()
	s := valuesSchema{root: &schemaNode{}}
	require.NoError(t, json.Unmarshal(readChart(t, "values.schema.json"), s.root))
	return s
}

// sections gives the keys of every section that a node allows, and the words where it allows but some, by
// path; a list is in no path.
func (s valuesSchema) sections(n *schemaNode, path string, found map[string][]string) {
	if name, isRef := strings.CutPrefix(n.Ref, "#/$defs/"); isRef {
		n = s.root.Defs[name]
	}
	if n.Items != nil {
		s.sections(n.Items, path, found)
	}
	for _, one := range n.AnyOf {
		s.sections(one, path, found)
	}
	if n.Enum != nil {
		for _, word := range n.Enum {
			found[path] = append(found[path], fmt.Sprint(word))
		}
		slices.Sort(found[path])
	}
	if n.Properties == nil {
		return
	}
	found[path] = slices.Sorted(maps.Keys(n.Properties))
	for key, child := range n.Properties {
		s.sections(child, strings.TrimPrefix(path+"."+key, "."), found)
	}
}

// nonesuch is a value for a node that has, in every section of it, a key that nothing knows, and a word where
// only some are known.
func (s valuesSchema) nonesuch(n *schemaNode) any {
	if name, isRef := strings.CutPrefix(n.Ref, "#/$defs/"); isRef {
		n = s.root.Defs[name]
	}
	if n.Items != nil {
		if item := s.nonesuch(n.Items); item != nil {
			return []any{item}
		}
		return nil
	}
	for _, one := range n.AnyOf {
		if made := s.nonesuch(one); made != nil {
			return made
		}
	}
	if n.Enum != nil {
		return "nonesuch"
	}
	if n.Properties == nil {
		return nil
	}
	section := map[string]any{"nonesuch": 1}
	for key, child := range n.Properties {
		if made := s.nonesuch(child); made != nil {
			section[key] = made
		}
	}
	return section
}

// What the chart's schema lets through the program must take, and the other way round.
func TestTheChartKnowsTheKeysOfTheConfiguration(t *testing.T) {
	s := readSchema(t)
	config := s.root.Defs["config"]
	want := map[string][]string{}
	s.sections(config, "", want)
	require.Contains(t, want, "endpoints.auth.oauth2")
	require.Contains(t, want["cdc.recover"], "auto")

	asked, err := yaml.Marshal(s.nonesuch(config))
	require.NoError(t, err)
	_, err = load(string(asked), noEnv)
	var cerr *ConfigError
	require.ErrorAs(t, err, &cerr)
	got := map[string][]string{}
	index := regexp.MustCompile(`\[\d+\]`)
	for _, p := range cerr.Problems {
		place, unknown := strings.CutSuffix(index.ReplaceAllString(p.Key, ""), "nonesuch")
		if place = strings.TrimSuffix(place, "."); unknown || len(want[place]) > 0 && strings.Contains(p.Text, "nonesuch") {
			got[place] = strings.Split(p.Allowed, ", ")
			slices.Sort(got[place])
		}
	}
	require.Equal(t, got, want, "the program's keys, and those of values.schema.json under config")
}

// A value that is not in values.yaml is in no documentation; one that is not in the schema cannot be set.
func TestTheChartsValuesAndTheirSchemaAgree(t *testing.T) {
	s := readSchema(t)
	want := map[string][]string{}
	s.sections(s.root, "", want)
	var values map[string]any
	require.NoError(t, yaml.Unmarshal(readChart(t, "values.yaml"), &values))
	for path, keys := range want {
		if section := s.at(path); section.Properties == nil || path == "config" || strings.HasPrefix(path, "config.") || slices.Contains([]string{"imagePullSecrets", "secrets"}, path) {
			continue // lists, and what the test above is about
		}
		section := values
		for key := range strings.SplitSeq(path, ".") {
			if path != "" {
				section, _ = section[key].(map[string]any)
			}
		}
		have := slices.Sorted(maps.Keys(section))
		if path == "resources" {
			keys = have // claims are rare
		}
		require.Equal(t, keys, have, "values.yaml, under %q", path)
	}
	strict(t, s.root, "values")
}

// at is the node of a path.
func (s valuesSchema) at(path string) *schemaNode {
	n := s.root
	for key := range strings.SplitSeq(path, ".") {
		if path == "" {
			break
		}
		if n = n.Properties[key]; n.Items != nil {
			n = n.Items
		}
		if name, isRef := strings.CutPrefix(n.Ref, "#/$defs/"); isRef {
			n = s.root.Defs[name]
		}
	}
	return n
}

// strict demands that a section refuses what it does not know.
func strict(t *testing.T, n *schemaNode, path string) {
	t.Helper()
	if n.Properties != nil {
		require.Equal(t, false, n.AdditionalProperties, path)
	}
	for key, child := range n.Properties {
		strict(t, child, path+"."+key)
	}
	for key, child := range n.Defs {
		strict(t, child, key)
	}
	for _, child := range append(n.AnyOf, n.Items) {
		if child != nil {
			strict(t, child, path)
		}
	}
}

// chartSeries are the series that the chart's texts name, with the labels that they are asked for.
var (
	seriesName   = regexp.MustCompile(`\b((?:walhook|process)_[a-z_]*[a-z])(?:\{([^{}]*)\})?`)
	seriesLabel  = regexp.MustCompile(`(\w+)(=~|!~|!=|=)"([^"]*)"`)
	groupedBy    = regexp.MustCompile(`\bby \(([^)]*)\)`)
	scrapeLabels = []string{"namespace", "job", "pod"}
)

// An alert on a series that nobody makes never comes, and nobody notices.
func TestAlertsAndDashboardAskForSeriesThatExist(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	p := start(t, b.config(endpoint("billing", rx, ""))).streaming()
	b.produce(1, 5, 5)
	requireAll(t, rx, 5)
	_, text := p.get("/metrics")
	labels := map[string]map[string][]string{}                           // series → label → values
	sample := regexp.MustCompile(`^(?:# TYPE )?(\w+)(?:\{(.*)\})? \S+$`) // a histogram's own name has no sample
	known := slices.Clone(scrapeLabels)
	for line := range strings.Lines(text) {
		m := sample.FindStringSubmatch(strings.TrimSpace(line))
		if m == nil {
			continue
		}
		if labels[m[1]] == nil {
			labels[m[1]] = map[string][]string{}
		}
		for _, l := range seriesLabel.FindAllStringSubmatch(m[2], -1) {
			labels[m[1]][l[1]] = append(labels[m[1]][l[1]], l[3])
			known = append(known, l[1])
		}
	}

	alerts := strings.NewReplacer("{{ $all }}", "{}", ", {{ $only }}", "").Replace(string(readChart(t, "templates/_alerts.tpl")))
	pages, err := os.ReadFile(filepath.Join("..", "..", "docs", "alerts.md"))
	require.NoError(t, err)
	for name, text := range map[string]string{
		"templates/_alerts.tpl": alerts,
		"files/dashboard.json":  strings.ReplaceAll(string(readChart(t, "files/dashboard.json")), `\"`, `"`),
		"docs/alerts.md":        string(pages),
	} {
		found := seriesName.FindAllStringSubmatch(text, -1)
		require.NotEmpty(t, found, name)
		for _, m := range found {
			have := labels[m[1]]
			require.NotNil(t, have, "%s: there is no series %s", name, m[1])
			for _, l := range seriesLabel.FindAllStringSubmatch(m[2], -1) {
				if slices.Contains(scrapeLabels, l[1]) {
					continue
				}
				require.Contains(t, have, l[1], "%s: %s has no label %s", name, m[1], l[1])
				if l[2] == "=" {
					require.Contains(t, have[l[1]], l[3], "%s: %s{%s}", name, m[1], l[0])
				}
			}
		}
		for _, m := range groupedBy.FindAllStringSubmatch(text, -1) {
			for label := range strings.SplitSeq(m[1], ", ") {
				require.Contains(t, known, label, name)
			}
		}
	}
}

func TestEveryAlertHasItsPage(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "alerts.md"))
	require.NoError(t, err)
	names := func(pattern, text string) (all []string) {
		for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
			all = append(all, m[1])
		}
		return all
	}
	alerts := names(`(?m)^- alert: (\w+)$`, string(readChart(t, "templates/_alerts.tpl")))
	require.NotEmpty(t, alerts)
	require.ElementsMatch(t, alerts, names(`(?m)^## (Walhook\w+)$`, string(page)))
}

func TestTheDashboardIsOneThatGrafanaReads(t *testing.T) {
	var d struct {
		UID, Title string
		Panels     []struct {
			ID      int
			Type    string
			GridPos struct{ X, Y, W, H int }
			Targets []struct{ Expr string }
		}
	}
	require.NoError(t, json.Unmarshal(readChart(t, "files/dashboard.json"), &d))
	require.NotEmpty(t, d.UID)
	seen := map[int]bool{}
	taken := map[[2]int]int{}
	for _, p := range d.Panels {
		require.False(t, seen[p.ID], "panel %d is there twice", p.ID)
		seen[p.ID] = true
		require.Equal(t, p.Type != "row", len(p.Targets) > 0, "panel %d", p.ID)
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			require.Less(t, x, 24)
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				require.Zero(t, taken[[2]int{x, y}], "panels %d and %d overlap", p.ID, taken[[2]int{x, y}])
				taken[[2]int{x, y}] = p.ID
			}
		}
	}
}

// What the chart makes of values is a configuration that the program takes. `make chart` names helm.
func TestTheChartRendersConfigurationsThatLoad(t *testing.T) {
	helm := os.Getenv("WALHOOK_TEST_HELM")
	if helm == "" {
		t.Skip("WALHOOK_TEST_HELM names no helm; make chart does")
	}
	files, err := filepath.Glob(filepath.Join(chartDir, "ci", "*-values.yaml"))
	require.NoError(t, err)
	require.NotEmpty(t, files)
	const someSecret = "whsec_c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0"
	env := envOf(map[string]string{"WALHOOK_DATABASE_URL": "postgres://app@db/shop", "CRM_URL": "https://crm.example.com"})
	contents := map[string]string{"database/uri": "postgres://app@db/shop", "database/url": "postgres://app@pooler/shop", "database/direct_url": "postgres://app@db/shop"}
	mounted := regexp.MustCompile(`\$\{file:/run/secrets/walhook/([^}]*)\}`)
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), "-values.yaml"), func(t *testing.T) {
			out, err := exec.CommandContext(t.Context(), helm, "template", "shop", chartDir, "--values", file, "--api-versions", "monitoring.coreos.com/v1").Output()
			require.NoError(t, err)
			configs := 0
			for doc := range strings.SplitSeq(string(out), "\n---\n") {
				var m struct {
					Kind string
					Data map[string]string
				}
				require.NoError(t, yaml.Unmarshal([]byte(doc), &m))
				if text, has := m.Data["walhook.yaml"]; m.Kind == "ConfigMap" && has {
					configs++
					dir := t.TempDir()
					text = mounted.ReplaceAllStringFunc(text, func(ref string) string {
						name := mounted.FindStringSubmatch(ref)[1]
						path := filepath.Join(dir, filepath.FromSlash(name))
						require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
						require.NoError(t, os.WriteFile(path, []byte(cmp.Or(contents[name], someSecret)), 0o600))
						return "${file:" + path + "}"
					})
					_, err := load(text, env)
					require.NoError(t, err, text)
				}
			}
			require.Equal(t, !strings.HasPrefix(filepath.Base(file), "existing-configmap"), configs > 0)
		})
	}
}
