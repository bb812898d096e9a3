package pgtest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"
)

// ErrNoPostgres tells that this machine has no Postgres server, and what to do about it.
var ErrNoPostgres = errors.New("no Postgres server found: install one (" + installHint() +
	") or set WALHOOK_TEST_PG_BIN to the directory of its initdb and postgres")

func installHint() string {
	if runtime.GOOS == "darwin" {
		return "brew install postgresql@17"
	}
	return "Debian, Ubuntu: apt-get install postgresql; Fedora, RHEL: dnf install postgresql-server; Alpine: apk add postgresql"
}

// usualPlaces are where packages put Postgres' server programs, which most of them keep out of PATH.
var usualPlaces = []string{
	"/usr/lib/postgresql/*/bin",                       // Debian, Ubuntu
	"/usr/pgsql-*/bin",                                // RHEL, Fedora, from postgresql.org
	"/usr/libexec/postgresql*",                        // Alpine
	"/opt/homebrew/opt/postgresql@*/bin",              // macOS on ARM
	"/usr/local/opt/postgresql@*/bin",                 // macOS on Intel
	"/home/linuxbrew/.linuxbrew/opt/postgresql@*/bin", // Homebrew on Linux
	"/Applications/Postgres.app/Contents/Versions/*/bin",
	"/usr/local/pgsql/bin", // make install
}

// Find returns the directory of initdb and postgres: what WALHOOK_TEST_PG_BIN says, else the
// first on PATH, else what pg_config says, else the newest in the usual places. Otherwise the
// error is ErrNoPostgres.
func Find() (string, error) {
	if bin := os.Getenv("WALHOOK_TEST_PG_BIN"); bin != "" {
		if !hasServer(bin) {
			return "", fmt.Errorf("WALHOOK_TEST_PG_BIN: no initdb and postgres in %s", bin)
		}
		return filepath.Abs(bin)
	}
	for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
		if filepath.IsAbs(dir) && hasServer(dir) {
			return unlinked(dir), nil
		}
	}
	if out, err := exec.Command("pg_config", "--bindir").Output(); err == nil {
		if dir := strings.TrimSpace(string(out)); hasServer(dir) {
			return dir, nil
		}
	}
	var found []string
	for _, pattern := range usualPlaces {
		dirs, _ := filepath.Glob(pattern)
		found = append(found, slices.DeleteFunc(dirs, func(dir string) bool { return !hasServer(dir) })...)
	}
	if len(found) == 0 {
		return "", ErrNoPostgres
	}
	return slices.MaxFunc(found, func(a, b string) int { return cmp.Compare(majorOf(a), majorOf(b)) }), nil
}

// unlinked is where the programs really are, where a directory on PATH holds only links to them.
func unlinked(dir string) string {
	program, err := filepath.EvalSymlinks(filepath.Join(dir, "postgres"))
	if err != nil || !hasServer(filepath.Dir(program)) {
		return dir
	}
	return filepath.Dir(program)
}

// hasServer looks for the two programs that Start needs.
func hasServer(dir string) bool {
	for _, name := range []string{"initdb", "postgres"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.IsDir() || info.Mode()&0o111 == 0 {
			return false
		}
	}
	return true
}

var digits = regexp.MustCompile(`\d+`)

// majorOf is the version in a path as /usr/lib/postgresql/15/bin, and 0 where it has none.
func majorOf(dir string) int {
	major, _ := strconv.Atoi(digits.FindString(dir))
	return major
}

// Fetch is the last resort where Find has nothing: it downloads Postgres (some 30 MB, from Maven
// Central) to the user's cache directory, once, and returns the directory of its programs.
// What it does goes to log. A download whose ctx ends goes on unheeded until the process ends.
func Fetch(ctx context.Context, log io.Writer) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	return fetch(ctx, log, embeddedpostgres.DefaultConfig(), filepath.Join(cache, "walhook"))
}

func fetch(ctx context.Context, log io.Writer, config embeddedpostgres.Config, cache string) (string, error) {
	const version = embeddedpostgres.V17
	home := filepath.Join(cache, "postgres-"+string(version))
	if hasServer(filepath.Join(home, "bin")) {
		return filepath.Join(home, "bin"), nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", fmt.Errorf("download Postgres: %w", err)
	}
	scratch, err := os.MkdirTemp(cache, "download-")
	if err != nil {
		return "", fmt.Errorf("download Postgres: %w", err)
	}
	port, err := freePort()
	if err != nil {
		return "", fmt.Errorf("download Postgres: %w", err)
	}
	fmt.Fprintf(log, "downloading Postgres %s to %s\n", version, home)
	ended := make(chan error, 1)
	go func() {
		// The library's own output is that of a server which nobody will see.
		err := download(config.Version(version).Logger(io.Discard).Port(uint32(port)), scratch, home)
		ended <- errors.Join(err, os.RemoveAll(scratch))
	}()
	select {
	case <-ctx.Done():
		return "", fmt.Errorf("download Postgres: %w", context.Cause(ctx))
	case err := <-ended:
		if err != nil {
			return "", fmt.Errorf("download Postgres: %w; %w", err, ErrNoPostgres)
		}
		return filepath.Join(home, "bin"), nil
	}
}

// download fills home. The library's only way to a download is to start a server, so one is
// started and stopped again; that it cannot (as root, say) does not matter once the programs are there.
func download(config embeddedpostgres.Config, scratch, home string) error {
	unpacked := filepath.Join(scratch, "postgres")
	server := embeddedpostgres.NewDatabase(config.CachePath(scratch).BinariesPath(unpacked).
		RuntimePath(filepath.Join(scratch, "runtime")))
	err := server.Start()
	if err == nil {
		err = server.Stop()
	}
	if !hasServer(filepath.Join(unpacked, "bin")) {
		return errors.New(firstLine(cmp.Or(err, errors.New("the archive has no server")).Error()))
	}
	// In one step, so that an interrupted download never looks like a whole one.
	if err := os.Rename(unpacked, home); err != nil && !hasServer(filepath.Join(home, "bin")) {
		return err
	}
	return nil
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}
