package main

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const module = "github.com/walhook/walhook/"

// left tells for each room of the house what stands to its left: data flows right, imports run
// left. A package may also import its own sub-packages, and those their parent.
var left = map[string][]string{
	"cdc":    nil,
	"outbox": {"cdc"},
	"sender": {"outbox", "cdc"},
	"cmd":    {"sender", "outbox", "cdc"},
}

// knownAlone tells which dependencies may be seen in one place only, tests aside.
var knownAlone = map[string][]string{
	"github.com/jackc/pglogrepl":      {"cdc", "cmd/bench"},                                              // a limit
	"github.com/jackc/pgx":            {"cdc", "cdc/pgtest", "outbox/store", "cmd/walhook", "cmd/bench"}, // the commands act for an app or a DBA
	"github.com/sony/gobreaker":       {"sender"},
	"cel.dev/cel-go":                  {"outbox/rule"},
	"github.com/spf13/cobra":          {"cmd/walhook"},
	"github.com/goccy/go-yaml":        {"cmd/walhook"},
	"github.com/stretchr/testify":     {"outbox/outboxtest"},
	"github.com/fergusstrange":        {"cdc/pgtest"},
	"net/http":                        {"sender", "sender/sendertest", "cmd/walhook", "cmd/bench"},
	"github.com/standard-webhooks":    {"sender/sendertest"},
	"pgregory.net/rapid":              {"outbox/outboxtest"},
	"code.dny.dev/ssrf":               {"sender"},
	"golang.org/x/net":                {"cmd/walhook"}, // the rules of NO_PROXY
	"github.com/Shopify/toxiproxy":    nil,
	"github.com/prometheus/client_go": {"outbox", "sender", "cmd/walhook"},
	"go.opentelemetry.io":             {"sender", "cmd/walhook"},
	"go.opentelemetry.io/otel/sdk":    {"cmd/walhook"},
	"go.opentelemetry.io/otel/export": {"cmd/walhook"},
	"go.opentelemetry.io/proto":       {"cmd/walhook"},
}

func eachFile(t *testing.T, see func(dir, path string, imports []string, comment bool)) {
	t.Helper()
	root, err := filepath.Abs("../..")
	require.NoError(t, err)
	require.NoError(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && path != root || d.Name() == "testdata" || d.Name() == "bin" || d.Name() == "docs") { // docs: what others write
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		var imports []string
		for _, i := range f.Imports {
			name, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				return err
			}
			imports = append(imports, name)
		}
		see(filepath.ToSlash(dir), path, imports, f.Doc != nil)
		return nil
	}))
}

func TestImportsRunLeft(t *testing.T) {
	t.Parallel()
	eachFile(t, func(dir, path string, imports []string, _ bool) {
		room, _, _ := strings.Cut(dir, "/")
		allowed, known := left[room]
		require.True(t, known, "%s stands in no room of the house", path)
		for _, name := range imports {
			inner, ours := strings.CutPrefix(name, module)
			if !ours {
				continue
			}
			to, _, _ := strings.Cut(inner, "/")
			if to != room {
				require.Contains(t, allowed, to, "%s imports %s, which stands to its right", path, name)
			}
		}
	})
}

func TestWhatOnePackageKnowsAloneStaysThere(t *testing.T) {
	t.Parallel()
	eachFile(t, func(dir, path string, imports []string, _ bool) {
		if strings.HasSuffix(path, "_test.go") {
			return
		}
		for _, name := range imports {
			for dep, where := range knownAlone {
				if strings.HasPrefix(name, dep) {
					require.Contains(t, where, dir, "%s imports %s", path, name)
				}
			}
		}
	})
}

// fasthttp measures net/http, and walhook is not to have two clients by the way.
func TestWhatTheBenchMeasuresWithStaysThere(t *testing.T) {
	t.Parallel()
	eachFile(t, func(dir, path string, imports []string, _ bool) {
		for _, name := range imports {
			if dir != "cmd/bench" {
				require.NotContains(t, name, "github.com/valyala/", path)
			}
			require.NotEqual(t, module+"cmd/bench", name, path)
		}
	})
}

func TestEveryPackageSaysWhatItIs(t *testing.T) {
	t.Parallel()
	said := map[string]bool{}
	eachFile(t, func(dir, path string, _ []string, comment bool) {
		if !strings.HasSuffix(path, "_test.go") {
			said[dir] = said[dir] || comment
		}
	})
	for dir, ok := range said {
		require.True(t, ok, "package %s has no comment", dir)
	}
}
