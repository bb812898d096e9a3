package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox/store"
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
	Minimum              *float64               `json:"minimum"`
	Maximum              *float64               `json:"maximum"`
	Pattern              string                 `json:"pattern"`
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
		found[path] = slices.Compact(found[path]) // one section may be allowed in two ways
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

// leaves calls visit with every place of the configuration that bounds or forms a single value, as the
// keys that lead there; a list is the key "0".
func (s valuesSchema) leaves(n *schemaNode, path []string, visit func(path []string, n *schemaNode)) {
	if name, isRef := strings.CutPrefix(n.Ref, "#/$defs/"); isRef {
		n = s.root.Defs[name]
	}
	if n.Minimum != nil || n.Pattern != "" {
		visit(slices.Clone(path), n)
	}
	for _, one := range n.AnyOf {
		s.leaves(one, path, visit)
	}
	if n.Items != nil {
		s.leaves(n.Items, append(path, "0"), visit)
	}
	for key, child := range n.Properties {
		s.leaves(child, append(path, key), visit)
	}
}

// complaints are what the program says of a value at a place of an otherwise sound configuration.
func complaints(t *testing.T, path []string, v any) (all []string) {
	t.Helper()
	config := map[string]any{
		"database": map[string]any{"url": "postgres://db/shop"}, "outbox": []any{map[string]any{"table": "outbox"}},
		"endpoints": []any{map[string]any{"url": "https://a.example.com"}},
	}
	place := ""
	for i := len(path) - 1; i >= 0; i-- {
		if path[i] == "0" {
			v, place = []any{v}, "[0]"+place
		} else {
			v, place = map[string]any{path[i]: v}, "."+path[i]+place
		}
	}
	for key, made := range v.(map[string]any) {
		if key == "endpoints" && path[len(path)-1] != "url" {
			made.([]any)[0].(map[string]any)["url"] = "https://a.example.com"
		}
		config[key] = made
	}
	text, err := yaml.Marshal(config)
	require.NoError(t, err)
	_, err = load(string(text), noEnv)
	var cerr *ConfigError
	if errors.As(err, &cerr) {
		for _, p := range cerr.Problems {
			if p.Key == strings.TrimPrefix(place, ".") {
				all = append(all, p.Text)
			}
		}
	}
	return all
}

// A number that the schema lets through and the program does not would end in a crash loop; the other way
// round it could not be set.
func TestTheChartBoundsNumbersAsTheProgramDoes(t *testing.T) {
	s := readSchema(t)
	tried := 0
	s.leaves(s.root.Defs["config"], nil, func(path []string, n *schemaNode) {
		if n.Minimum == nil || path[len(path)-1] == "min_version" {
			return
		}
		tried++
		low, high := *n.Minimum, *n.Maximum
		step := 1.0
		if low != math.Trunc(low) || high == 1 {
			step = 0.001
		}
		for _, x := range []float64{low, high} {
			said := slices.DeleteFunc(complaints(t, path, asWritten(x)), func(text string) bool { return strings.Contains(text, "more than max_payload") }) // which is another value
			require.Empty(t, said, "%s: %v", path, x)
		}
		if high == 0 { // 0 is never
			return
		}
		for _, x := range []float64{low - step, high + step} {
			require.NotEmpty(t, complaints(t, path, asWritten(x)), "%s: %v", path, x)
		}
	})
	require.Greater(t, tried, 20)
}

// asWritten is x as people write it.
func asWritten(x float64) any {
	if x == math.Trunc(x) {
		return int64(x)
	}
	return x
}

func TestTheChartFormsValuesAsTheProgramDoes(t *testing.T) {
	s := readSchema(t)
	// Each is right in some places and wrong in others, and nowhere right and out of range.
	samples := []string{
		"15s", "500ms", "1d", "1d12h", "12h1d", "1.5h", "15", "s", "fast", "1 h", "64MiB", "1.5 MB", "2mib", "64 megs", "2M", "5/s", "100/m", "5/day", "5 per second",
		"shop", "Shop", "sh.op", "shop hook", "shöp", "10.0.0.0/8", "fd00::/8", "10.0.0.1", "10.0.0.0/8/8", "true", "yes", "1.2", "1.4", "https://a.example.com", "ftp://a",
		":9090", "0.0.0.0:9090", "9090", "github", "gitlab",
	}
	for _, key := range []string{"timeout", "max_payload", "rate_limit", "slot", "allow", "create", "min_version", "url", "id", "listen", "signing"} {
		found := false
		s.leaves(s.root.Defs["config"], nil, func(path []string, n *schemaNode) {
			last := path[len(path)-1]
			if last == "0" {
				last = path[len(path)-2]
			}
			if n.Pattern == "" || last != key || len(path) > 1 && path[0] == "outbox" || path[0] == "database" {
				return
			}
			found = true
			form := regexp.MustCompile(n.Pattern)
			for _, sample := range samples {
				if numeric := regexp.MustCompile(`^[0-9.]+$`).MatchString(sample); numeric && (key == "timeout" || key == "max_payload") {
					continue // a size without a unit is bytes, and may be out of range
				}
				said := complaints(t, path, sample)
				said = slices.DeleteFunc(said, func(text string) bool {
					return strings.Contains(text, "out of range") || strings.Contains(text, "secret")
				})
				require.Equal(t, len(said) == 0, form.MatchString(sample), "%s: %q; the program says %q", path, sample, said)
			}
		})
		require.True(t, found, key)
	}
}

// asKubernetes are values that are what Kubernetes has there: its keys are not values.yaml's to list.
var asKubernetes = []string{
	"imagePullSecrets", "secrets", "extraEnv", "extraEnvFrom", "extraVolumeMounts", "resources", "startupProbe", "livenessProbe", "readinessProbe", "tolerations", "hostAliases",
}

// A value that is not in values.yaml is in no documentation; one that is not in the schema cannot be set.
func TestTheChartsValuesAndTheirSchemaAgree(t *testing.T) {
	s := readSchema(t)
	want := map[string][]string{}
	s.sections(s.root, "", want)
	var values map[string]any
	require.NoError(t, yaml.Unmarshal(readChart(t, "values.yaml"), &values))
	for path, keys := range want {
		if first, _, _ := strings.Cut(path, "."); first == "config" || slices.Contains(asKubernetes, first) || s.at(path).Properties == nil {
			continue // the first is what the tests above are about
		}
		section := values
		for key := range strings.SplitSeq(path, ".") {
			if path != "" {
				section, _ = section[key].(map[string]any)
			}
		}
		have := slices.Sorted(maps.Keys(section))
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
	sick := newReceiver(t)
	sick.Refuse()
	p := start(t, b.config(endpoint("billing", rx, ""), endpoint("sick", sick, ""))).streaming()
	b.produce(1, 5, 5)
	requireAll(t, rx, 5)
	// One series is there only where something is parked, and when the store was looked at since.
	eventually(t, "it to be parked", func() bool { return b.parked() == 5 })
	text := ""
	eventually(t, "the oldest to be seen", func() bool {
		b.exec("notify " + store.Channel)
		_, text = p.get("/metrics")
		return strings.Contains(text, `walhook_oldest_parked_seconds{`)
	})
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

// The sidecar without Helm is copied as it stands.
func TestThePlainSidecarOfTheReadmeIsWhole(t *testing.T) {
	_, text, _ := strings.Cut(string(readChart(t, "README.md")), "Without Helm, in any pod:\n\n```yaml\n")
	text, _, _ = strings.Cut(text, "```")
	var pod struct {
		InitContainers []struct {
			Args         []string
			VolumeMounts []struct{ Name, MountPath string } `yaml:"volumeMounts"`
			Policy       string                             `yaml:"restartPolicy"`
			StartupProbe map[string]any                     `yaml:"startupProbe"`
		} `yaml:"initContainers"`
		Volumes []struct{ Name string }
	}
	require.NoError(t, yaml.Unmarshal([]byte(text), &pod))
	require.Len(t, pod.InitContainers, 1)
	c := pod.InitContainers[0]
	require.Equal(t, []string{"run"}, c.Args)
	require.Equal(t, "Always", c.Policy)
	require.NotEmpty(t, c.StartupProbe)
	require.Len(t, c.VolumeMounts, len(pod.Volumes))
	for i, m := range c.VolumeMounts {
		require.Equal(t, pod.Volumes[i].Name, m.Name)
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
