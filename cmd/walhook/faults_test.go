package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// lastFault is the number of the last case in docs/faults.md.
const lastFault = 142

// A test in docs/faults.md is written with its package and, where one case of it is meant, that
// case: `cdc.TestX/a_case`. A row without one says why: "none: …".
var (
	faultRow  = regexp.MustCompile(`^\| *([0-9]+) *\|`)
	faultTest = regexp.MustCompile("`(?:([a-z0-9_/]+)\\.)?((?:Test|Fuzz|Benchmark)[A-Za-z0-9_]*)(?:/([^`]+))?`")
	faultNone = regexp.MustCompile(`^none: .{20}`)
)

// testFunction is one test of the module.
type testFunction struct {
	dir  string
	text string // of its file, with _ for spaces, as in the names of cases
}

// testFunctions are all tests of the module, by their names.
func testFunctions(t *testing.T) map[string][]testFunction {
	t.Helper()
	root, err := filepath.Abs("../..")
	require.NoError(t, err)
	out := map[string][]testFunction{}
	require.NoError(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (strings.HasPrefix(d.Name(), ".") && path != root || d.Name() == "testdata" || d.Name() == "bin"):
			return filepath.SkipDir
		case !strings.HasSuffix(path, "_test.go"):
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, text, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		for _, decl := range f.Decls {
			if fn, ok := decl.(*ast.FuncDecl); ok && fn.Recv == nil && faultTest.MatchString("`"+fn.Name.Name+"`") {
				out[fn.Name.Name] = append(out[fn.Name.Name], testFunction{filepath.ToSlash(dir), strings.ReplaceAll(string(text), " ", "_")})
			}
		}
		return nil
	}))
	return out
}

// docs/faults.md and the tests agree: every case is there once, and every test that the page names
// exists.
func TestEveryFaultHasItsTest(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../docs/faults.md")
	require.NoError(t, err)
	tests := testFunctions(t)
	times := map[int]int{}
	for i, line := range strings.Split(string(page), "\n") {
		at := "docs/faults.md:" + strconv.Itoa(i+1)
		for _, m := range faultTest.FindAllStringSubmatch(line, -1) {
			dir, name, inner := m[1], m[2], m[3]
			found := tests[name]
			if dir != "" {
				found = slices.DeleteFunc(slices.Clone(found), func(f testFunction) bool { return f.dir != dir })
			}
			if len(found) != 1 {
				t.Errorf("%s: %s: %d tests have this name, one should", at, m[0], len(found))
				continue
			}
			for part := range strings.SplitSeq(inner, "/") {
				if part != "" && !strings.Contains(found[0].text, `"`+part+`"`) {
					t.Errorf("%s: %s: there is no such case of it", at, m[0])
				}
			}
		}
		row := faultRow.FindStringSubmatch(line)
		if row == nil {
			continue
		}
		n, err := strconv.Atoi(row[1])
		require.NoError(t, err)
		times[n]++
		cells := strings.Split(strings.TrimSuffix(strings.TrimSpace(line), "|"), "|")
		if len(cells) != 5 {
			t.Errorf("%s: case %d has %d columns, not 4", at, n, len(cells)-1)
			continue
		}
		if last := strings.TrimSpace(cells[4]); !faultTest.MatchString(last) && !faultNone.MatchString(last) {
			t.Errorf("%s: case %d names no test and no reason (none: …) but %q", at, n, last)
		}
		if strings.TrimSpace(cells[2]) == "" || strings.TrimSpace(cells[3]) == "" {
			t.Errorf("%s: case %d says too little", at, n)
		}
	}
	for n := 1; n <= lastFault; n++ {
		if times[n] != 1 {
			t.Errorf("case %d stands %d times in docs/faults.md", n, times[n])
		}
		delete(times, n)
	}
	require.Empty(t, times, "cases beyond the last")
}
