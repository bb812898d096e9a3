package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/stretchr/testify/require"
)

// A release has one version: of its tag, its chart, the image that the chart names, and the changelog.
func TestAReleaseOfTwoVersionsIsRefused(t *testing.T) {
	t.Parallel()
	script, err := filepath.Abs("../../.ci/release-check")
	require.NoError(t, err)
	chart := func(version, app, image string) string {
		return "name: walhook\nversion: " + version + "\nappVersion: " + app +
			"\nannotations:\n  artifacthub.io/images: |\n    - name: walhook\n      image: ghcr.io/walhook/walhook:" + image + "\n"
	}
	const log = "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-01-31\n\n### Added\n\n- this\n\n## [1.2.2] - 2026-01-01\n\n- that\n"
	good := chart("1.2.3", "1.2.3", "1.2.3")
	for name, c := range map[string]struct{ tag, chart, log, want string }{
		"one version":          {"v1.2.3", good, log, ""},
		"no tag yet":           {"", good, "# Changelog\n\n## [Unreleased]\n\n- this\n", ""},
		"another tag":          {"v1.2.4", good, log, "appVersion in charts/walhook/Chart.yaml is '1.2.3', not '1.2.4'"},
		"a tag of no version":  {"1.2.3", good, log, "tag '1.2.3' is not as v1.2.3"},
		"another chart":        {"v1.2.3", chart("1.2.2", "1.2.3", "1.2.3"), log, "version in charts/walhook/Chart.yaml is '1.2.2', not '1.2.3'"},
		"another app":          {"v1.2.3", chart("1.2.3", `"1.2.2"`, "1.2.3"), log, "appVersion in charts/walhook/Chart.yaml is '1.2.2', not '1.2.3'"},
		"another image":        {"v1.2.3", chart("1.2.3", "1.2.3", "1.2.2"), log, "walhook:1.2.2', not 'ghcr.io/walhook/walhook:1.2.3'"},
		"an old changelog":     {"v1.2.3", good, strings.ReplaceAll(log, "1.2.3", "1.2.1"), "the newest version in CHANGELOG.md is '1.2.1', not '1.2.3'"},
		"something unreleased": {"v1.2.3", good, strings.Replace(log, "## [Unreleased]\n", "## [Unreleased]\n\n### Added\n\n- more\n", 1), "under [Unreleased] is '- more'"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			text, err := os.ReadFile(script)
			require.NoError(t, err)
			for path, text := range map[string]string{
				".ci/release-check": string(text), "charts/walhook/Chart.yaml": c.chart, "CHANGELOG.md": c.log,
			} {
				path = filepath.Join(dir, path)
				require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
				require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
			}
			out, err := exec.Command("sh", filepath.Join(dir, ".ci", "release-check"), c.tag).CombinedOutput()
			if c.want == "" {
				require.NoError(t, err, string(out))
				require.Empty(t, string(out))
				return
			}
			require.Error(t, err)
			require.Contains(t, string(out), c.want)
		})
	}
}

// What a workflow runs is a target of the Makefile or a script of .ci, so that a person can run it too. What it adds are
// the runner's own means: an output of a step, a look at the image, the release's page.
func TestWorkflowsRunNoStepThatTheProjectCannot(t *testing.T) {
	t.Parallel()
	makefile, err := os.ReadFile("../../Makefile")
	require.NoError(t, err)
	paths, err := filepath.Glob("../../.github/workflows/*.yml")
	require.NoError(t, err)
	require.NotEmpty(t, paths)
	pinned := regexp.MustCompile(`^[\w-]+/[\w-]+@v\d+$`)
	for _, path := range paths {
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		var workflow struct {
			Permissions map[string]string
			Jobs        map[string]struct {
				Steps []struct{ Run, Uses string }
			}
		}
		require.NoError(t, yaml.Unmarshal(text, &workflow))
		require.Equal(t, map[string]string{"contents": "read"}, workflow.Permissions, path)
		for job, j := range workflow.Jobs {
			for _, step := range j.Steps {
				words := strings.Fields(step.Run)
				switch {
				case step.Uses != "":
					require.Regexp(t, pinned, step.Uses, job)
				case words[0] == "make":
					for _, word := range words[1:] {
						if !strings.Contains(word, "=") {
							require.Regexp(t, `(?m)^`+regexp.QuoteMeta(word)+`:`, string(makefile), "%s: %s", job, step.Run)
						}
					}
				case strings.HasPrefix(words[0], ".ci/"):
					require.FileExists(t, filepath.Join("../..", words[0]), step.Run)
				default:
					require.Contains(t, []string{"echo", "docker", "gh"}, words[0], "%s: %s", job, step.Run)
				}
			}
		}
	}
}
