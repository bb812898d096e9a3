package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"github.com/walhook/walhook/outbox"
)

// ConfigError is everything that is wrong with a configuration file, in the file's order.
type ConfigError struct {
	File     string
	Problems []Problem
}

// Problem is one mistake in a configuration file.
type Problem struct {
	Line, Column int    // from 1; zero where the file itself is the problem
	Key          string // endpoints[0].timeout; empty for a mistake in the YAML
	Text         string // what is wrong
	Allowed      string // what may stand there instead; may be empty
}

// Error has a line for each problem: file:line:column: key: what is wrong (allowed: …).
func (e *ConfigError) Error() string {
	lines := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		var b strings.Builder
		b.WriteString(e.File)
		if p.Line > 0 {
			fmt.Fprintf(&b, ":%d:%d", p.Line, p.Column)
		}
		if p.Key != "" {
			b.WriteString(": " + p.Key)
		}
		b.WriteString(": " + p.Text)
		if p.Allowed != "" {
			b.WriteString(" (allowed: " + p.Allowed + ")")
		}
		lines[i] = b.String()
	}
	return strings.Join(lines, "\n")
}

// ExitCode is the process's: 2 is wrong usage or config.
func (e *ConfigError) ExitCode() int { return 2 }

// loader reads one file. It walks the parsed YAML by itself instead of decoding into structs:
// a decoder stops at the first mistake, quotes the source (secrets too) beside it, and has
// made up its mind about a value's type before a variable is put in.
type loader struct {
	file     string
	env      func(string) (string, bool)
	aliases  map[*ast.AliasNode]ast.Node
	problems []Problem
	hidden   []string           // values that no message may contain
	files    map[string]content // read so far, each once: two readings may differ
	merges   int                // merge keys (<<) followed so far
	literal  bool               // nothing is put in for ${…}: what is read is not the operator's
}

// value is a place in the file. Its node is never an alias, an anchor or a tag, and is nil
// where the file has nothing.
type value struct {
	node ast.Node
	path string
	line int
	col  int
}

// entry is a key of a mapping with its value.
type entry struct {
	name      string
	line, col int
	value     value
}

// field is a key that a section may have, and how its value is read.
type field struct {
	name string
	read func(value)
}

// maxConfig bounds the file and what ${file:…} brings in; both are a few KB in real life.
const maxConfig = 1 << 20

// open reads the file.
func (l *loader) open() (src []byte, ok bool) {
	src, err := l.read(l.file, maxConfig)
	if err != nil {
		allowed := ""
		if errors.Is(err, fs.ErrNotExist) {
			allowed = "a file named by --config or WALHOOK_CONFIG, or ./" + defaultConfigPath
		}
		l.problem(value{}, "cannot be read: "+err.Error(), allowed)
		return nil, false
	}
	return src, true
}

// parse turns the file into its tree.
func (l *loader) parse(src []byte) (root value, ok bool) {
	// A parser's message may quote what it stumbled over, and a parser may panic on what
	// nobody thought of. Neither reaches the user.
	defer func() {
		if recover() != nil {
			l.problem(value{}, "is not YAML that can be understood", "")
			root, ok = value{}, false
		}
	}()
	text := strings.TrimPrefix(string(src), "\ufeff")
	if !utf8.ValidString(text) || strings.ContainsFunc(text, isMask) {
		l.problem(value{}, "is not UTF-8 text", "")
		return value{}, false
	}
	file, err := parser.ParseBytes([]byte(mask(text)), 0, parser.AllowDuplicateMapKey())
	if err != nil {
		where, what := value{line: 1, col: 1}, "is not YAML that can be understood"
		if yerr, ok := errors.AsType[yaml.Error](err); ok {
			if t := yerr.GetToken(); t != nil && t.Position != nil {
				where.line, where.col = t.Position.Line, t.Position.Column
			}
			// The parser's messages quote at most a key or a character, and single words of
			// a misread value can look like either: what is quoted is left out.
			what = "is not YAML: " + quoted.ReplaceAllString(unmask(yerr.GetMessage()), "…")
		}
		l.problem(where, what, "")
		return value{}, false
	}
	root = value{line: 1, col: 1}
	for i, doc := range file.Docs {
		if i > 0 && doc.Body != nil {
			at := l.value(doc.Body, "")
			l.problem(at, "is a second YAML document", "one document")
			return value{}, false
		}
	}
	l.aliases = make(map[*ast.AliasNode]ast.Node)
	anchors := make(anchorWalk)
	for _, doc := range file.Docs {
		if doc.Body != nil {
			ast.Walk(visit(func(n ast.Node) { anchors.see(n, l.aliases) }), doc.Body)
			root = l.value(doc.Body, "")
		}
	}
	return root, true
}

var quoted = regexp.MustCompile(`"[^"]*"`)

// anchorWalk resolves aliases while the file is walked in order: an alias means the last
// anchor of its name before it.
type anchorWalk map[string]ast.Node

func (a anchorWalk) see(n ast.Node, aliases map[*ast.AliasNode]ast.Node) {
	switch n := n.(type) {
	case *ast.AnchorNode:
		if n.Name != nil {
			a[n.Name.GetToken().Value] = n.Value
		}
	case *ast.AliasNode:
		if n.Value != nil {
			aliases[n] = a[n.Value.GetToken().Value]
		}
	}
}

type visit func(ast.Node)

func (v visit) Visit(n ast.Node) ast.Visitor { v(n); return v }

// YAML takes the braces of an unquoted ${VAR} inside {…} for its own. So a reference's
// punctuation is swapped for characters of a private plane while the file is parsed, one for
// one, which keeps columns true.
const maskBase = 0x10FF00

var reference = regexp.MustCompile(`\$\{[^\n"'\\{}]*\}`)

func isMask(r rune) bool { return r >= maskBase && r < maskBase+128 }

func mask(s string) string {
	return reference.ReplaceAllStringFunc(s, func(ref string) string {
		return strings.Map(func(r rune) rune {
			if strings.ContainsRune("{}[],:#", r) {
				return maskBase + r
			}
			return r
		}, ref)
	})
}

func unmask(s string) string {
	if !strings.ContainsFunc(s, isMask) {
		return s
	}
	return strings.Map(func(r rune) rune {
		if isMask(r) {
			return r - maskBase
		}
		return r
	}, s)
}

// value finds out where n is and looks through anchors, aliases and YAML's own tags.
func (l *loader) value(n ast.Node, path string) value {
	v := value{path: path}
	for range 100 { // an alias may point to an alias; a circle ends here
		if n == nil {
			return v
		}
		if t := n.GetToken(); t != nil && t.Position != nil && v.line == 0 {
			v.line, v.col = t.Position.Line, t.Position.Column
		}
		switch wrapped := n.(type) {
		case *ast.AnchorNode:
			n = wrapped.Value
		case *ast.AliasNode:
			if n = l.aliases[wrapped]; n == nil {
				l.problem(v, "refers to an anchor that is not there", "")
			}
		case *ast.TagNode:
			n = wrapped.Value
		default:
			v.node = n
			// The token of a block mapping is its first colon; its first key is what one looks for.
			if first := firstKey(n); first != nil && first.GetToken() != nil {
				v.line, v.col = first.GetToken().Position.Line, first.GetToken().Position.Column
			}
			return v
		}
	}
	return v
}

func firstKey(n ast.Node) ast.MapKeyNode {
	switch n := n.(type) {
	case *ast.MappingNode:
		if !n.IsFlowStyle && len(n.Values) > 0 {
			return n.Values[0].Key
		}
	case *ast.MappingValueNode:
		return n.Key
	}
	return nil
}

func isMapping(v value) bool {
	switch v.node.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return true
	}
	return false
}

func isNull(v value) bool {
	_, null := v.node.(*ast.NullNode)
	return null || v.node == nil
}

// problem notes a mistake at v.
func (l *loader) problem(v value, text, allowed string) {
	l.problems = append(l.problems, Problem{Line: v.line, Column: v.col, Key: v.path, Text: text, Allowed: allowed})
}

// missing notes that a key is not in the section at v.
func (l *loader) missing(v value, path, allowed string) {
	l.problem(value{path: path, line: v.line, col: v.col}, "is missing", allowed)
}

// foreign notes what another package says about the section at v. Its words are searched
// for what must not be seen, and the line of the key they begin with is found.
func (l *loader) foreign(v value, err error) {
	if many, ok := err.(interface{ Unwrap() []error }); ok {
		for _, one := range many.Unwrap() {
			l.foreign(v, one)
		}
		return
	}
	text := l.redacted(err.Error())
	text, _, _ = strings.Cut(text, "\n") // one line for each problem; CEL draws a picture below its own
	if key, what, ok := strings.Cut(text, ": "); ok && keyPath.MatchString(key) {
		l.problem(l.find(v, key), what, "")
		return
	}
	l.problem(v, text, "")
}

// redacted is a text without the values that no message may contain.
func (l *loader) redacted(text string) string {
	// The longest first: a URL goes before the token inside it.
	slices.SortFunc(l.hidden, func(a, b string) int { return len(b) - len(a) })
	for _, secret := range l.hidden {
		text = strings.ReplaceAll(text, secret, "[redacted]")
	}
	return text
}

// uncompiled notes what is wrong with the expression at v: the first mistake, with its line and
// column in the expression. What else follows in CEL's message draws a picture of it.
func (l *loader) uncompiled(v value, err error, allowed string) {
	text, _, _ := strings.Cut(l.redacted(err.Error()), "\n")
	text = strings.TrimSuffix(strings.TrimPrefix(text, "ERROR: "), " (in container '')")
	if at, found := strings.CutPrefix(text, "<input>:"); found {
		text = "is no valid CEL: " + at
	}
	l.problem(v, text, allowed)
}

var (
	keyPath = regexp.MustCompile(`^[a-z][a-z_]*(?:\[\d+\]|\.[A-Za-z0-9_-]+)*$`)
	step    = regexp.MustCompile(`^\.?([^.\[\]]+)|^\[(\d+)\]`)
)

// find goes down from v along a path like secrets[1] or tls.ca, as far as the file goes.
func (l *loader) find(v value, path string) value {
	whole := strings.TrimPrefix(v.path+"."+path, ".")
	for path != "" {
		m := step.FindStringSubmatch(path)
		if m == nil {
			break
		}
		path = path[len(m[0]):]
		next := value{}
		if i, err := strconv.Atoi(m[2]); err == nil {
			if seq, ok := v.node.(*ast.SequenceNode); ok && i < len(seq.Values) {
				next = l.value(seq.Values[i], whole)
			}
		} else if isMapping(v) {
			entries, _ := l.list(v)
			if j := slices.IndexFunc(entries, func(e entry) bool { return strings.EqualFold(e.name, m[1]) }); j >= 0 {
				next = entries[j].value
			}
		}
		if next.line == 0 {
			break
		}
		v = next
	}
	v.path = whole
	return v
}

// err is all problems so far, in the order of the file, or nil.
func (l *loader) err() error {
	if len(l.problems) == 0 {
		return nil
	}
	slices.SortStableFunc(l.problems, func(a, b Problem) int {
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return a.Column - b.Column
	})
	return &ConfigError{File: l.file, Problems: slices.Compact(l.problems)}
}

// section reads a mapping whose keys are known, and says which were there; nil where v is
// no mapping.
func (l *loader) section(v value, fields ...field) map[string]bool {
	names := make([]string, len(fields))
	for i, f := range fields {
		names[i] = f.name
	}
	entries, ok := l.entries(v, strings.Join(names, ", "))
	if !ok {
		return nil
	}
	seen := make(map[string]bool, len(entries))
	for _, e := range entries {
		i := slices.Index(names, e.name)
		if i < 0 && l.literal && len(l.problems) >= maxMistakes {
			continue
		}
		if i < 0 {
			l.problem(value{path: e.value.path, line: e.line, col: e.col},
				"unknown key"+didYouMean(e.name, names), strings.Join(names, ", "))
			continue
		}
		seen[e.name] = true
		fields[i].read(e.value)
	}
	return seen
}

// entries are the keys of a mapping, each once; none where nothing was written. allowed
// says which they may be.
func (l *loader) entries(v value, allowed string) ([]entry, bool) {
	if isNull(v) {
		return nil, true
	}
	if !isMapping(v) {
		l.problem(v, "is "+kind(v)+", not a section of keys", allowed)
		return nil, false
	}
	all, ok := l.list(v)
	if !ok {
		return nil, false
	}
	once := all[:0]
	for _, e := range all {
		if i := slices.IndexFunc(once, func(o entry) bool { return o.name == e.name }); i >= 0 {
			l.problem(value{path: e.value.path, line: e.line, col: e.col},
				"is given twice, first in line "+strconv.Itoa(once[i].line), "")
			continue
		}
		once = append(once, e)
	}
	return once, true
}

// list is the keys of a mapping as they are written, and after them what merge keys (<<)
// add.
func (l *loader) list(v value) ([]entry, bool) {
	var pairs []*ast.MappingValueNode
	switch n := v.node.(type) {
	case *ast.MappingNode:
		pairs = n.Values
	case *ast.MappingValueNode:
		pairs = []*ast.MappingValueNode{n}
	}
	var all []entry
	var merged []value
	for _, pair := range pairs {
		at := l.value(pair.Key, v.path)
		if _, ok := pair.Key.(*ast.MergeKeyNode); ok {
			merged = append(merged, l.value(pair.Value, v.path))
			continue
		}
		name, ok := scalarText(at.node)
		switch {
		case !ok:
			l.problem(at, "has a key that is not a word", "")
			return nil, false
		case pair.Start == nil || pair.Start.Type != token.MappingValueType:
			// {token: abc, def}: the word may be half of a secret, so it is not repeated.
			l.problem(at, "has a word without a value", "key: value")
			continue
		}
		path := safeKey(name)
		if v.path != "" {
			path = v.path + "." + path
		}
		e := entry{name: name, line: at.line, col: at.col, value: l.value(pair.Value, path)}
		if e.value.line == 0 || isNull(e.value) {
			e.value.line, e.value.col = at.line, at.col
		}
		all = append(all, e)
	}
	for _, m := range merged {
		sources := []value{m}
		if seq, ok := m.node.(*ast.SequenceNode); ok {
			sources = sources[:0]
			for _, n := range seq.Values {
				sources = append(sources, l.value(n, v.path))
			}
		}
		for _, s := range sources {
			if l.merges++; !isMapping(s) || l.merges > 1000 { // a circle, too, ends here
				l.problem(s, "cannot be merged here", "a mapping, and not the one it stands in")
				return nil, false
			}
			more, ok := l.list(s)
			if !ok {
				return nil, false
			}
			for _, e := range more {
				// What is written in the section itself wins, then what was merged first.
				if !slices.ContainsFunc(all, func(o entry) bool { return o.name == e.name }) {
					all = append(all, e)
				}
			}
		}
	}
	return all, true
}

// items are the elements of a list; none where nothing was written.
func (l *loader) items(v value) ([]value, bool) {
	if isNull(v) {
		return nil, true
	}
	seq, ok := v.node.(*ast.SequenceNode)
	if !ok {
		l.problem(v, "is "+kind(v)+", not a list", "[one, two] or a line with - for each")
		return nil, false
	}
	all := make([]value, len(seq.Values))
	for i, n := range seq.Values {
		all[i] = l.value(n, v.path+"["+strconv.Itoa(i)+"]")
		if all[i].line == 0 {
			all[i].line, all[i].col = v.line, v.col
		}
	}
	return all, true
}

func kind(v value) string {
	switch v.node.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a section of keys"
	case *ast.SequenceNode:
		return "a list"
	}
	return "a single value"
}

// scalarText is a scalar as it is written in the file: 1.10 stays 1.10.
func scalarText(n ast.Node) (string, bool) {
	switch n := n.(type) {
	case *ast.StringNode:
		return unmask(n.Value), true
	case *ast.LiteralNode:
		return unmask(n.Value.Value), true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return unmask(n.GetToken().Value), true
	}
	return "", false
}

// safeKey is a key as it may be printed: a value that slipped into a key's place (a colon
// without a space after it) is cut off.
func safeKey(name string) string {
	for i, r := range name {
		odd := (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '_' && r != '-' && r != '.'
		if odd || i == 40 {
			return name[:i] + "…"
		}
		if p := name[:i]; p == "whsec_" || p == "whsk_" {
			return p + "…"
		}
	}
	return name
}

// sensitivity says whether a value may be quoted in an error.
type sensitivity bool

const (
	public    sensitivity = false
	sensitive sensitivity = true
)

// scalar is a single value after its variables were put in.
type scalar struct {
	text string
	from string // the reference it came through, ${VAR}; empty where it stands in the file
	kept sensitivity
}

// shown is how a message speaks of the value. What came through a variable is not quoted,
// whatever its key: variables get mixed up.
func (s scalar) shown() string {
	switch {
	case s.from != "":
		return "the value of " + s.from
	case bool(s.kept), looksSecret.MatchString(s.text):
		return "the value"
	case len(s.text) > 60:
		return strconv.Quote(s.text[:60]) + "…"
	}
	return strconv.Quote(s.text)
}

var looksSecret = regexp.MustCompile(`(?i)whsec_|whsk_|://|bearer |password`)

// scalar reads a single value, as text.
func (l *loader) scalar(v value, as sensitivity) (scalar, bool) {
	s, wrong := l.peek(v)
	if wrong != (Problem{}) {
		l.problem(v, wrong.Text, wrong.Allowed)
		return scalar{}, false
	}
	s.kept = as
	if (bool(as) || s.from != "") && len(s.text) >= 4 && !slices.Contains(l.hidden, s.text) {
		l.hidden = append(l.hidden, s.text)
	}
	return s, true
}

// peek is scalar without saying anything about what is wrong.
func (l *loader) peek(v value) (scalar, Problem) {
	if isNull(v) {
		return scalar{}, Problem{Text: "has no value", Allowed: "a value, or no such key at all"}
	}
	text, ok := scalarText(v.node)
	if !ok {
		return scalar{}, Problem{Text: "is " + kind(v) + ", not a single value"}
	}
	if l.literal {
		return scalar{text: text}, Problem{}
	}
	return l.substitute(text)
}

// variable is the name of an environment variable.
var variable = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// substitute puts variables into a value: ${VAR}, ${VAR:-default} (where VAR is unset or
// empty), ${file:/path} (without its last line's end). What is put in is not searched for
// variables again. $${ is a plain ${.
func (l *loader) substitute(text string) (scalar, Problem) {
	const forms = "${VAR}, ${VAR:-default}, ${file:/path}; $${ for a plain ${"
	var s scalar
	var out strings.Builder
	if l.literal {
		return scalar{text: text}, Problem{}
	}
	for {
		i := strings.Index(text, "${")
		if i < 0 {
			out.WriteString(text)
			s.text = out.String()
			return s, Problem{}
		}
		if i > 0 && text[i-1] == '$' {
			out.WriteString(text[:i-1] + "${")
			text = text[i+2:]
			continue
		}
		out.WriteString(text[:i])
		body, rest, closed := strings.Cut(text[i+2:], "}")
		if !closed {
			return s, Problem{Text: "has a ${ without its }", Allowed: forms}
		}
		text = rest
		put, ref, wrong := l.lookUp(body)
		if wrong != "" {
			return s, Problem{Text: wrong, Allowed: forms}
		}
		out.WriteString(put)
		if s.from == "" {
			s.from = ref
		}
	}
}

// lookUp finds what ${body} stands for, and how it is called in a message.
func (l *loader) lookUp(body string) (put, ref, wrong string) {
	if path, ok := strings.CutPrefix(body, "file:"); ok {
		if !filepath.IsAbs(path) {
			return "", "", "refers to a file without saying where it is: ${file:…} wants an absolute path"
		}
		content, err := l.read(path, maxConfig)
		if err != nil {
			return "", "", fmt.Sprintf("refers to file %s, which cannot be read: %s", path, err)
		}
		s := strings.TrimSuffix(string(content), "\n")
		return strings.TrimSuffix(s, "\r"), "${file:" + path + "}", ""
	}
	name, fallback, hasFallback := strings.Cut(body, ":-")
	if !variable.MatchString(name) {
		return "", "", "has a ${…} that names no variable"
	}
	if strings.Contains(fallback, "${") {
		return "", "", "has a ${…} inside the default of ${" + name + "}"
	}
	ref = "${" + name + "}"
	val, set := l.env(name)
	switch {
	case hasFallback && val == "":
		return fallback, ref, ""
	case !set:
		return "", "", "needs the environment variable " + name + ", which is not set"
	}
	return val, ref, ""
}

// content is what a file held, or why it could not be read.
type content struct {
	bytes []byte
	err   error
	limit int64 // of its size
}

// read reads a file that the configuration is made of.
func (l *loader) read(path string, limit int64) ([]byte, error) {
	c, known := l.files[path]
	if !known {
		c.limit = limit
		c.bytes, c.err = readSmall(path, limit)
		if l.files == nil {
			l.files = make(map[string]content)
		}
		l.files[path] = c
	}
	return c.bytes, c.err
}

// inputs are the files that a configuration is made of, each with what was found there.
type inputs map[string]input

type input struct {
	digest [sha256.Size]byte // of what it held, or of why it could not be read
	limit  int64             // of its size
}

func (c content) digest() [sha256.Size]byte {
	if c.err != nil {
		return sha256.Sum256([]byte("cannot be read: " + c.err.Error()))
	}
	return sha256.Sum256(append([]byte("read: "), c.bytes...))
}

func (l *loader) inputs() inputs {
	in := make(inputs, len(l.files))
	for path, c := range l.files {
		in[path] = input{c.digest(), c.limit}
	}
	return in
}

// changed tells whether one of the files is not what it was. Links are followed, so that the
// swap of a mounted volume is seen.
func (in inputs) changed() bool {
	for path, was := range in {
		var c content
		if c.bytes, c.err = readSmall(path, was.limit); c.digest() != was.digest {
			return true
		}
	}
	return false
}

// readSmall reads a file of at most limit bytes. Its errors do not repeat the path.
func readSmall(path string, limit int64) ([]byte, error) {
	bare := func(err error) error {
		if perr, ok := errors.AsType[*fs.PathError](err); ok {
			return perr.Err
		}
		return err
	}
	info, err := os.Stat(path) // first, since opening a pipe would wait for its writer
	if err != nil {
		return nil, bare(err)
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, bare(err)
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, bare(err)
	}
	if int64(len(content)) > limit {
		return nil, errors.New("larger than " + formatSize(limit))
	}
	return content, nil
}

// What follows reads single values into where they belong, each with its check.

// text is any text, also an empty one.
func (l *loader) text(dst *string) func(value) {
	return l.name(dst, func(string) bool { return true }, "")
}

// name is text that must be valid; rule is valid in words.
func (l *loader) name(dst *string, valid func(string) bool, rule string) func(value) {
	return func(v value) {
		s, ok := l.scalar(v, public)
		switch {
		case !ok:
		case valid(s.text):
			*dst = s.text
		case s.text == "":
			l.problem(v, "is empty", rule)
		default:
			l.problem(v, s.shown()+" will not do", rule)
		}
	}
}

func (l *loader) secret(dst *outbox.Secret) func(value) {
	return func(v value) {
		if s, ok := l.scalar(v, sensitive); ok {
			*dst = outbox.Secret(s.text)
		}
	}
}

func oneOf[T ~string](l *loader, dst *T, allowed ...T) func(value) {
	names := make([]string, len(allowed))
	for i, a := range allowed {
		names[i] = string(a)
	}
	return func(v value) {
		s, ok := l.scalar(v, public)
		if !ok {
			return
		}
		if !slices.Contains(names, s.text) {
			hint := ""
			if s.from == "" {
				hint = didYouMean(s.text, names)
			}
			l.problem(v, s.shown()+" is not known"+hint, strings.Join(names, ", "))
			return
		}
		*dst = T(s.text)
	}
}

// isOneOf says whether v is one of names, and nothing about it if not.
func (l *loader) isOneOf(v value, names ...string) bool {
	s, wrong := l.peek(v)
	return wrong == (Problem{}) && slices.Contains(names, s.text)
}

func (l *loader) boolean(dst *bool) func(value) {
	return func(v value) {
		s, ok := l.scalar(v, public)
		if !ok {
			return
		}
		if s.text != "true" && s.text != "false" {
			l.problem(v, s.shown()+" is neither true nor false", "true, false")
			return
		}
		*dst = s.text == "true"
	}
}

func (l *loader) integer(dst *int, low, high int) func(value) {
	return func(v value) {
		s, ok := l.scalar(v, public)
		if !ok {
			return
		}
		allowed := strconv.Itoa(low) + " to " + strconv.Itoa(high)
		n, err := strconv.Atoi(s.text)
		switch {
		case err != nil && !errors.Is(err, strconv.ErrRange):
			l.problem(v, s.shown()+" is not a whole number", allowed)
		case err != nil || n < low || n > high:
			l.problem(v, s.shown()+" is out of range", allowed)
		default:
			*dst = n
		}
	}
}

func (l *loader) decimal(dst *float64, low, high float64) func(value) {
	return func(v value) {
		s, ok := l.scalar(v, public)
		if !ok {
			return
		}
		allowed := strconv.FormatFloat(low, 'g', -1, 64) + " to " + strconv.FormatFloat(high, 'g', -1, 64)
		x, err := strconv.ParseFloat(s.text, 64)
		switch {
		case err != nil && !errors.Is(err, strconv.ErrRange):
			l.problem(v, s.shown()+" is not a number", allowed)
		case err != nil || !(x >= low && x <= high): // NaN is in no range
			l.problem(v, s.shown()+" is out of range", allowed)
		default:
			*dst = x
		}
	}
}

func (l *loader) duration(dst *time.Duration, low, high time.Duration) func(value) {
	return func(v value) {
		l.span(v, dst, formatDuration(low)+" to "+formatDuration(high), func(d time.Duration) bool { return d >= low && d <= high })
	}
}

// durationOrNever takes 0 too, which is never.
func (l *loader) durationOrNever(dst *time.Duration, low, high time.Duration) func(value) {
	return func(v value) {
		l.span(v, dst, formatDuration(low)+" to "+formatDuration(high)+", or 0 for never",
			func(d time.Duration) bool { return d == 0 || d >= low && d <= high })
	}
}

func (l *loader) span(v value, dst *time.Duration, allowed string, valid func(time.Duration) bool) {
	s, ok := l.scalar(v, public)
	if !ok {
		return
	}
	d, wrong := parseDuration(s.text)
	switch {
	case wrong != "":
		l.problem(v, s.shown()+" "+wrong, allowed)
	case !valid(d):
		l.problem(v, s.shown()+" is out of range", allowed)
	default:
		*dst = d
	}
}

func (l *loader) size(dst *int64, low, high int64) func(value) {
	return func(v value) {
		s, ok := l.scalar(v, public)
		if !ok {
			return
		}
		allowed := formatSize(low) + " to " + formatSize(high)
		n, ok := parseSize(s.text)
		switch {
		case !ok:
			l.problem(v, s.shown()+" is not a size, as 64MiB, 1MB or 1048576 is", allowed)
		case n < low || n > high:
			l.problem(v, s.shown()+" is out of range", allowed)
		default:
			*dst = n
		}
	}
}

var (
	days    = regexp.MustCompile(`^(\d+(?:\.\d+)?)d`)
	numeral = regexp.MustCompile(`^\d+(?:\.\d+)?$`)
	sized   = regexp.MustCompile(`^(\d+(?:\.\d+)?) ?([A-Za-z]*)$`)
)

// parseDuration reads what time.ParseDuration reads, and days: 7d, 1d12h. Without a sign.
func parseDuration(s string) (d time.Duration, wrong string) {
	const notOne = "is not a duration, as 500ms, 15s, 5m, 2h or 7d is"
	switch {
	case s == "0":
		return 0, ""
	case numeral.MatchString(s):
		return 0, "has no unit, as 15s, 5m or 7d has"
	case s == "" || s[0] == '-' || s[0] == '+':
		return 0, notOne
	}
	if m := days.FindStringSubmatch(s); m != nil {
		n, err := strconv.ParseFloat(m[1], 64)
		if err != nil || n > 100_000 {
			return 0, "is out of range"
		}
		d, s = time.Duration(math.Round(n*float64(day))), s[len(m[0]):]
	}
	if s == "" {
		return d, ""
	}
	rest, err := time.ParseDuration(s)
	if err != nil || s[0] == '-' || s[0] == '+' || rest > math.MaxInt64-d {
		return 0, notOne
	}
	return d + rest, ""
}

// formatDuration is the shortest form that parseDuration reads.
func formatDuration(d time.Duration) string {
	if d > 0 && d%day == 0 {
		return strconv.FormatInt(int64(d/day), 10) + "d"
	}
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// units of sizes, the larger ones first for formatSize.
var units = []struct {
	name  string
	bytes int64
}{
	{"TiB", 1 << 40},
	{"GiB", 1 << 30},
	{"MiB", 1 << 20},
	{"KiB", 1 << 10},
	{"TB", 1e12},
	{"GB", 1e9},
	{"MB", 1e6},
	{"KB", 1e3},
	{"B", 1},
}

// parseSize reads bytes: 64MiB, 1MB, 1.5 GB, 1048576.
func parseSize(s string) (int64, bool) {
	m := sized.FindStringSubmatch(s)
	if m == nil {
		return 0, false
	}
	unit := int64(1)
	if m[2] != "" {
		unit = 0
		for _, u := range units {
			if strings.EqualFold(u.name, m[2]) {
				unit = u.bytes
			}
		}
	}
	n, err := strconv.ParseFloat(m[1], 64)
	n *= float64(unit)
	if err != nil || unit == 0 || n != math.Trunc(n) || n >= 1<<62 {
		return 0, false
	}
	return int64(n), true
}

// formatSize is the shortest exact form that parseSize reads.
func formatSize(n int64) string {
	for _, u := range units {
		if n >= u.bytes && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10)
}

// didYouMean suggests the known name that a misspelt one is nearest to.
func didYouMean(name string, known []string) string {
	plain := func(s string) string {
		return strings.ToLower(strings.NewReplacer("_", "", "-", "").Replace(s))
	}
	if len(name) > 40 {
		return ""
	}
	best, least := "", 1+len(name)/3
	for _, k := range known {
		if d := distance(plain(name), plain(k)); d <= least && d < len(k) && (best == "" || d < least) {
			best, least = k, d
		}
	}
	if best == "" {
		return ""
	}
	return ", did you mean " + best + "?"
}

// distance is the number of letters to insert, drop, change or swap with their neighbour
// to get from a to b.
func distance(a, b string) int {
	var before, last []int
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		before, last, row = last, row, make([]int, len(b)+1)
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
	}
	return row[len(b)]
}
