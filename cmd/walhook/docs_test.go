package main

import (
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc/pgtest"
	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/sender/sendertest"
)

// pages are all that people read, by their path from the root.
func pages(t *testing.T) map[string]string {
	t.Helper()
	root := filepath.Join("..", "..")
	all := map[string]string{}
	add := func(path string) {
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		name, err := filepath.Rel(root, path)
		require.NoError(t, err)
		all[filepath.ToSlash(name)] = string(text)
	}
	tops, err := filepath.Glob(filepath.Join(root, "*.md"))
	require.NoError(t, err)
	for _, path := range append(tops, filepath.Join(root, "charts", "walhook", "README.md")) {
		add(path)
	}
	require.NoError(t, filepath.WalkDir(filepath.Join(root, "docs"), func(path string, _ fs.DirEntry, err error) error {
		if err == nil && filepath.Ext(path) == ".md" {
			add(path)
		}
		return err
	}))
	require.Greater(t, len(all), 10)
	return all
}

var (
	fencedBlock = regexp.MustCompile("(?ms)^[ ]*```.*?^[ ]*```[ ]*$")
	codeSpan    = regexp.MustCompile("`+[^`\n]*`+")
	pageLink    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading     = regexp.MustCompile(`(?m)^#{1,6} +(.*?) *$`)
	linkText    = regexp.MustCompile(`\[([^\]]*)\]\([^)]*\)`)
)

// anchors are those of a page's headings, as GitHub makes them.
func anchors(page string) (all []string) {
	for _, h := range heading.FindAllStringSubmatch(fencedBlock.ReplaceAllString(page, ""), -1) {
		slug := strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case unicode.IsLetter(r), unicode.IsNumber(r), r == '-', r == '_':
				return unicode.ToLower(r)
			}
			return -1
		}, linkText.ReplaceAllString(h[1], "$1"))
		all = append(all, slug)
	}
	return all
}

func TestEveryLinkOfThePagesLeadsSomewhere(t *testing.T) {
	t.Parallel()
	all := pages(t)
	links := 0
	for name, page := range all {
		page = codeSpan.ReplaceAllString(fencedBlock.ReplaceAllString(page, ""), "")
		for _, m := range pageLink.FindAllStringSubmatch(page, -1) {
			to, err := url.Parse(m[1])
			require.NoError(t, err, "%s: %s", name, m[1])
			if to.IsAbs() {
				continue
			}
			links++
			target := name
			if to.Path != "" {
				target = filepath.ToSlash(filepath.Join(filepath.Dir(name), filepath.FromSlash(to.Path)))
				_, err := os.Stat(filepath.Join("..", "..", filepath.FromSlash(target)))
				require.NoError(t, err, "%s links to %s", name, m[1])
			}
			if to.Fragment != "" {
				require.Contains(t, anchors(all[target]), to.Fragment, "%s links to %s", name, m[1])
			}
		}
	}
	require.Greater(t, links, 40)
}

// Who reads the first page finds all others from there.
func TestTheFirstPageLeadsToAllOthers(t *testing.T) {
	t.Parallel()
	all := pages(t)
	_, more, found := strings.Cut(all["README.md"], "\n## More\n")
	require.True(t, found)
	for name := range all {
		if filepath.Dir(name) == "docs" {
			require.Contains(t, more, "("+name+")", "README.md, section More")
		}
	}
}

// command is walhook as it is written on a page, to the end of the line or of its code.
var command = regexp.MustCompile("(?m)(?:^ +(?:\\$ )?|`|/)walhook ([a-z][^`\n]*)")

// What people copy from the pages is a command that there is, with flags that it has.
func TestEveryCommandOfThePagesExists(t *testing.T) {
	t.Parallel()
	seen := 0
	for name, page := range pages(t) {
		for _, m := range command.FindAllStringSubmatch(page, -1) {
			words := strings.Fields(m[1])
			for i, w := range words {
				if strings.HasPrefix(w, "#") || w == "|" || w == "&&" || w == ">" { // a comment, the shell's
					words = words[:i]
					break
				}
			}
			cmd, rest, err := rootCommand(noEnv).Find(words)
			if err == nil && cmd.HasSubCommands() && len(rest) > 0 && !strings.HasPrefix(rest[0], "-") {
				require.Fail(t, "no such command", "%s: walhook %s", name, m[1])
			}
			if err != nil || cmd == cmd.Root() {
				require.Fail(t, "no such command", "%s: walhook %s", name, m[1])
			}
			seen++
			for _, w := range rest {
				flag, isFlag := strings.CutPrefix(w, "--")
				if !isFlag || flag == "" {
					continue
				}
				flag, _, _ = strings.Cut(strings.TrimRight(flag, ".,;:)]"), "=")
				known := func(of *pflag.FlagSet) bool { return of.Lookup(flag) != nil }
				require.True(t, flag == "help" || known(cmd.Flags()) || known(cmd.InheritedFlags()) || known(cmd.PersistentFlags()),
					"%s: walhook %s has no flag --%s", name, cmd.Name(), flag)
			}
		}
	}
	require.Greater(t, seen, 40)
}

var sqlComment = regexp.MustCompile(`(?m)--.*$`)

// fenced are the blocks of a page in a language.
func fenced(page, language string) (all []string) {
	for _, m := range regexp.MustCompile("(?s)```"+language+"\n(.*?)```").FindAllStringSubmatch(page, -1) {
		all = append(all, m[1])
	}
	return all
}

// The statements of docs/receiving.md let each event through once, also when it comes twice at a time.
func TestRepeatsAreDroppedAsTheDocsSay(t *testing.T) {
	t.Parallel()
	blocks := fenced(pages(t)["docs/receiving.md"], "sql")
	url := pgtest.DB(t)
	statement := func(begins string) string {
		for _, block := range blocks {
			if i := strings.Index(block, begins); i >= 0 {
				sql, _, _ := strings.Cut(block[i:], ";\n")
				return sql
			}
		}
		require.Fail(t, "not on the page", begins)
		return ""
	}
	for _, begins := range []string{"create table webhooks_seen", "create table webhook_inbox"} {
		pgtest.Exec(t, url, statement(begins))
	}
	ctx := t.Context()
	connect := func() *pgx.Conn {
		conn, err := pgx.Connect(ctx, url)
		require.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close(ctx) })
		return conn
	}
	first, second, watch := connect(), connect(), connect()
	insert := statement("insert into webhooks_seen")
	seen := func(end string) (rows int64) {
		_, err := first.Exec(ctx, "begin")
		require.NoError(t, err)
		tag, err := first.Exec(ctx, insert, "evt_1")
		require.NoError(t, err)
		require.EqualValues(t, 1, tag.RowsAffected())
		done := make(chan error, 1)
		go func() {
			tag, err := second.Exec(ctx, insert, "evt_1")
			rows = tag.RowsAffected()
			done <- err
		}()
		require.Eventually(t, func() bool { // it waits
			var waits bool
			err := watch.QueryRow(ctx, "select wait_event_type = 'Lock' from pg_stat_activity where pid = $1", second.PgConn().PID()).Scan(&waits)
			return err == nil && waits
		}, patience, 5*time.Millisecond)
		_, err = first.Exec(ctx, end)
		require.NoError(t, err)
		require.NoError(t, <-done)
		return rows
	}
	require.EqualValues(t, 1, seen("rollback"), "it was not done, so it is done now")
	pgtest.Exec(t, url, "delete from webhooks_seen")
	require.Zero(t, seen("commit"), "it was done already")

	for _, want := range []int64{1, 0} {
		tag, err := first.Exec(ctx, statement("insert into webhook_inbox"), "evt_1", `{"type": "invoice.paid"}`)
		require.NoError(t, err)
		require.Equal(t, want, tag.RowsAffected())
	}
	tag, err := first.Exec(ctx, statement("delete from webhooks_seen"))
	require.NoError(t, err)
	require.Zero(t, tag.RowsAffected())
}

// The statements of the pages are ones that Postgres takes, with the tables that are there.
func TestEveryStatementOfThePagesIsSQL(t *testing.T) {
	t.Parallel()
	c := newCounter(t)
	conn := c.conn()
	c.exec("drop table outbox")
	all := pages(t)
	for _, page := range []string{"README.md", "docs/receiving.md"} { // their tables first
		for _, block := range fenced(all[page], "sql") {
			if strings.HasPrefix(block, "create table") {
				c.exec(block)
			}
		}
	}
	seen := 0
	for name, page := range all {
		for _, block := range fenced(page, "sql") {
			for statement := range strings.SplitSeq(sqlComment.ReplaceAllString(block, ""), ";") {
				if strings.TrimSpace(statement) == "" || strings.Contains(statement, "(...)") {
					continue
				}
				_, err := conn.Prepare(t.Context(), "", statement)
				require.NoError(t, err, "%s:\n%s", name, statement)
				seen++
			}
		}
	}
	require.Greater(t, seen, 20)
}

// docs/operating.md, Moving: under its new name the slot goes on where the old one stood.
func TestTheSlotIsRenamedAsTheDocsSay(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	rx := sendertest.New(t, sendertest.Config{Secrets: []string{testSecret}})
	path := b.config(endpoint("billing", rx, ""))
	p := start(t, path).streaming()
	b.produce(2, 100, 5)
	requireAll(t, rx, 200)
	p.stop()
	b.produce(2, 50, 5)

	var sql string
	for _, block := range fenced(pages(t)["docs/operating.md"], "sql") {
		if strings.Contains(block, "pg_copy_logical_replication_slot") {
			sql = strings.NewReplacer("'walhook'", "'"+b.slot+"'", "'walhook_2'", "'"+b.slot+"_2'").Replace(block)
		}
	}
	for statement := range strings.SplitSeq(strings.TrimSpace(sql), ";\n") {
		b.exec(statement)
	}
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, []byte(strings.Replace(string(text), "slot: "+b.slot, "slot: "+b.slot+"_2", 1)), 0o600))
	p = start(t, path).streaming()
	b.produce(2, 50, 5)
	requireAll(t, rx, 400)
	require.Zero(t, repeats(rx))
	require.Zero(t, b.ask("select count(*) from pg_replication_slots where slot_name = '"+b.slot+"'"))
	p.stop()
}

var indentedBlock = regexp.MustCompile(`(?m)(?:^ {4}.*\n|^\n)*^ {4}.*\n`)

// codeOf are a page's blocks of code, fenced and indented.
func codeOf(page string) (all []string) {
	for _, block := range append(fencedBlock.FindAllString(page, -1), indentedBlock.FindAllString(fencedBlock.ReplaceAllString(page, ""), -1)...) {
		all = append(all, strings.TrimSpace(block))
	}
	return all
}

// Who reads Portuguese is given the same configuration, SQL and commands.
func TestThePortuguesePageHasTheSameCode(t *testing.T) {
	t.Parallel()
	all := pages(t)
	english, portuguese := codeOf(all["README.md"]), codeOf(all["README.pt-BR.md"])
	require.Greater(t, len(english), 7)
	for _, block := range english {
		require.Contains(t, portuguese, block)
	}
	example, err := os.ReadFile(filepath.Join("..", "..", "docs", "examples", "nfeio.yaml"))
	require.NoError(t, err)
	head, config, _ := strings.Cut(string(example), "\ndatabase:")
	comment := strings.ReplaceAll(head, "\n#   ", "\n")
	for _, block := range portuguese {
		if slices.Contains(english, block) {
			continue
		}
		code := strings.TrimSpace(strings.TrimSuffix(block[strings.Index(block, "\n"):], "```"))
		require.True(t, strings.TrimSpace("database:"+config) == code || strings.Contains(comment, code), block)
	}
}

// The formulas of docs/sizing.md have the code's numbers in them.
func TestSizingKnowsTheLimitsOfTheCode(t *testing.T) {
	t.Parallel()
	page := pages(t)["docs/sizing.md"]
	c := defaultConfig()
	for _, says := range []string{
		fmt.Sprintf("attempts at once  ≤  (limit of open files − %d) ÷ %d\n", ownDescriptors, descriptorsPerAttempt),
		fmt.Sprintf("sensible limit    =  %d × min(sum of concurrency, max(%d, endpoints)) + %d\n", descriptorsPerAttempt, enoughAttempts, ownDescriptors),
		fmt.Sprintf("up to %d idle ones", mostIdle),
		fmt.Sprintf("and %d bytes for itself", (&outbox.Event{}).Size()),
		fmt.Sprintf("`buffer.bytes` (%s)", formatSize(c.Buffer.Bytes)),
		fmt.Sprintf("spill_after %s", formatDuration(c.Buffer.SpillAfter)),
		fmt.Sprintf("%d ÷ 0.1 s = %d/s", c.Defaults.Concurrency, c.Defaults.Concurrency*10),
	} {
		require.Contains(t, page, says)
	}
}
