package sender

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/outbox"
)

// docs is a file of the documentation.
func docs(t *testing.T, path string) (at string) {
	t.Helper()
	at, err := filepath.Abs(filepath.Join("..", "docs", filepath.FromSlash(path)))
	require.NoError(t, err)
	return at
}

// need is the path of a program, without which the test is skipped, as it is where a command that
// tells whether all is there fails.
func need(t *testing.T, program string, probe ...string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Skip("needs ", program, ": ", err)
	}
	if len(probe) > 0 {
		if out, err := exec.Command(path, probe...).CombinedOutput(); err != nil {
			t.Skipf("needs %s %s: %v\n%s", program, strings.Join(probe, " "), err, out)
		}
	}
	return path
}

// start runs a receiver of docs/receiving.md on a port of this machine until the test ends.
func start(t *testing.T, secrets []string, program func(port string) *exec.Cmd) (url string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	address := l.Addr().String()
	require.NoError(t, l.Close())
	_, port, err := net.SplitHostPort(address)
	require.NoError(t, err)
	cmd := program(port)
	cmd.Env = append(os.Environ(), "PORT="+port, "WEBHOOK_SECRETS="+strings.Join(secrets, " "))
	var log bytes.Buffer // read it when the program has ended
	cmd.Stdout, cmd.Stderr = &log, &log
	require.NoError(t, cmd.Start())
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
		if t.Failed() {
			t.Log(log.String())
		}
	})
	for deadline := time.Now().Add(patience); ; {
		conn, err := net.DialTimeout("tcp", address, time.Second)
		if err == nil {
			require.NoError(t, conn.Close())
			return "http://" + address + "/hooks"
		}
		select {
		case <-ended:
			t.Fatal("it ended at once")
		case <-time.After(10 * time.Millisecond):
		}
		require.True(t, time.Now().Before(deadline), "it does not listen: %v", err)
	}
}

// crafted is a request that nobody of ours has made, signed as Standard Webhooks says.
type crafted struct {
	at      time.Time
	body    string
	signs   []string // whsec_ and whsk_
	altered func(h http.Header, body *[]byte)
}

func (c crafted) signature(id, timestamp string) string {
	var all []string
	content := []byte(id + "." + timestamp + "." + c.body)
	for _, secret := range c.signs {
		kind, text, _ := strings.Cut(secret, "_")
		key, _ := base64.StdEncoding.DecodeString(text)
		if kind == "whsk" {
			all = append(all, "v1a,"+base64.StdEncoding.EncodeToString(ed25519.Sign(ed25519.NewKeyFromSeed(key), content)))
			continue
		}
		mac := hmac.New(sha256.New, key)
		mac.Write(content)
		all = append(all, "v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil)))
	}
	return strings.Join(all, " ")
}

// post returns the answer's status, or zero where the receiver went before it had read all.
func (c crafted) post(t *testing.T, url string) (status int) {
	t.Helper()
	id, timestamp := "evt_1", strconv.FormatInt(c.at.Unix(), 10)
	header := http.Header{"Content-Type": {"application/json"}}
	header.Set(headerID, id) // in another case than walhook's
	header.Set(headerTimestamp, timestamp)
	header.Set(headerSignature, c.signature(id, timestamp))
	body := []byte(c.body)
	if c.altered != nil {
		c.altered(header, &body)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, bytes.NewReader(body))
	require.NoError(t, err)
	req.Header = header
	transport := &http.Transport{DisableKeepAlives: true}
	res, err := transport.RoundTrip(req)
	if err != nil {
		return 0
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, res.Body)
	return res.StatusCode
}

const otherSecret = "whsec_YW5vdGhlciBrZXksIG9mIHRoaXJ0eS10d28gYnl0ZXM="

// publicKey is what a receiver gets of edSecret.
func publicKey() string {
	seed, _ := base64.StdEncoding.DecodeString(strings.TrimPrefix(edSecret, "whsk_"))
	return "whpk_" + base64.StdEncoding.EncodeToString(ed25519.NewKeyFromSeed(seed).Public().(ed25519.PublicKey))
}

// hmacCases holds what is said of receivers with whsec_ secrets on docs/receiving.md.
func hmacCases(t *testing.T, program func(port string) *exec.Cmd) {
	url := start(t, []string{hmacSecret, otherSecret}, program)
	sendAll(t, url, []deliverable{
		{"the secret", []outbox.Secret{hmacSecret}, 204},
		{"the older secret", []outbox.Secret{otherSecret}, 204},
		{"both, and one that the receiver has not", []outbox.Secret{edSecret, "whsec_YW55", otherSecret, hmacSecret}, 204},
		{"another secret", []outbox.Secret{"whsec_YW55"}, 401},
		{"ed25519 alone", []outbox.Secret{edSecret}, 401},
		{"unsigned", nil, 401},
	})
	sound := []string{hmacSecret}
	craftAll(t, url, sound, func(content string) string { return "v1a," + strings.TrimPrefix(content, "v1,") })
}

// edCases holds the same with the public key of a whsk_.
func edCases(t *testing.T, program func(port string) *exec.Cmd) {
	url := start(t, []string{publicKey(), otherSecret}, program)
	sendAll(t, url, []deliverable{
		{"ed25519", []outbox.Secret{edSecret}, 204},
		{"beside others", []outbox.Secret{"whsec_YW55", edSecret}, 204},
		{"hmac", []outbox.Secret{otherSecret}, 204},
		{"another key", []outbox.Secret{"whsk_AQECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="}, 401},
		// Who knows the public key must not be able to sign with it.
		{"hmac by the public key", []outbox.Secret{outbox.Secret("whsec_" + strings.TrimPrefix(publicKey(), "whpk_"))}, 401},
	})
	craftAll(t, url, []string{edSecret}, func(content string) string { return "v1," + strings.TrimPrefix(content, "v1a,") })
}

type deliverable struct {
	name    string
	secrets []outbox.Secret
	status  int
}

func sendAll(t *testing.T, url string, all []deliverable) {
	t.Helper()
	b := setup(t, nil)
	for _, c := range all {
		require.Equal(t, c.status, b.send(endpoint(url, func(e *outbox.Endpoint) {
			e.ID, e.Secrets, e.Breaker = c.name, c.secrets, outbox.BreakerPolicy{}
		})).Status, c.name)
	}
	// On the way somebody changes a digit.
	tampered := setup(t, fake(func(r *http.Request) (*http.Response, error) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return nil, err
		}
		body = bytes.Replace(body, []byte("120.50"), []byte("920.50"), 1)
		r.Body, r.GetBody = io.NopCloser(bytes.NewReader(body)), nil
		return (&http.Transport{DisableKeepAlives: true}).RoundTrip(r)
	}))
	require.Equal(t, 401, tampered.send(endpoint(url, func(e *outbox.Endpoint) { e.Secrets = all[0].secrets })).Status)
}

func craftAll(t *testing.T, url string, sound []string, other func(signature string) string) {
	t.Helper()
	const body = `{"type": "invoice.paid",  "data": {"amount": 120.50}}`
	set := func(name, value string) func(http.Header, *[]byte) {
		return func(h http.Header, _ *[]byte) { h.Set(name, value) }
	}
	without := func(name string) func(http.Header, *[]byte) {
		return func(h http.Header, _ *[]byte) { h.Del(name) }
	}
	signed := func(by func(string) string) func(http.Header, *[]byte) {
		return func(h http.Header, _ *[]byte) { h.Set(headerSignature, by(h.Get(headerSignature))) }
	}
	now := time.Now()
	for _, c := range []struct {
		name   string
		status int
		crafted
	}{
		{"as it is", 204, crafted{at: now}},
		{"4 minutes old", 204, crafted{at: now.Add(-4 * time.Minute)}},
		{"4 minutes ahead", 204, crafted{at: now.Add(4 * time.Minute)}},
		{"6 minutes old", 401, crafted{at: now.Add(-6 * time.Minute)}},
		{"6 minutes ahead", 401, crafted{at: now.Add(6 * time.Minute)}},
		{"a year old", 401, crafted{at: now.AddDate(-1, 0, 0)}},
		{"beyond ASCII", 204, crafted{at: now, body: "{\"a\": \"grüezi \u2028\"}"}},
		{"another id", 401, crafted{at: now, altered: set(headerID, "evt_2")}},
		{"another time", 401, crafted{at: now, altered: set(headerTimestamp, strconv.FormatInt(now.Unix()+1, 10))}},
		{"no id", 401, crafted{at: now, altered: without(headerID)}},
		{"no time", 401, crafted{at: now, altered: without(headerTimestamp)}},
		{"no signature", 401, crafted{at: now, altered: without(headerSignature)}},
		{"a time that is none", 401, crafted{at: now, altered: set(headerTimestamp, "soon")}},
		{"a signature of another kind", 401, crafted{at: now, altered: signed(other)}},
		{"rubbish before it", 204, crafted{at: now, altered: signed(func(s string) string {
			return "v1,!!!! v1a,é v2,AAAA v1,AAAA v1a,AAAA v1, v1a, " + s
		})}},
		{"half of it", 401, crafted{at: now, altered: signed(func(s string) string { return s[:24] })}},
		{"spaces removed", 401, crafted{at: now, altered: func(_ http.Header, body *[]byte) { *body = bytes.ReplaceAll(*body, []byte("  "), []byte(" ")) }}},
		{"a body at the limit", 204, crafted{at: now, body: `"` + strings.Repeat("x", 1<<20-2) + `"`}},
	} {
		if c.signs = sound; c.body == "" {
			c.body = body
		}
		require.Equal(t, c.status, c.post(t, url), c.name)
	}
	require.Contains(t, []int{413, 0}, crafted{at: now, body: strings.Repeat("1", 1<<20+1), signs: sound}.post(t, url), "a body above the limit")

	// Who goes in the middle of a body takes nothing down.
	conn, err := net.Dial("tcp", strings.TrimSuffix(strings.TrimPrefix(url, "http://"), "/hooks"))
	require.NoError(t, err)
	_, err = io.WriteString(conn, "POST /hooks HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
	require.NoError(t, err)
	abort(conn)
	require.Equal(t, 204, crafted{at: now, body: body, signs: sound}.post(t, url))
}

// The receivers of docs/receiving.md take what is sent to them, and nothing that somebody else
// made, changed on its way, or kept for later.
func TestReceiversOfTheDocs(t *testing.T) {
	in := func(program, file string, probe ...string) func(*testing.T) func(string) *exec.Cmd {
		return func(t *testing.T) func(string) *exec.Cmd {
			path := need(t, program, probe...)
			return func(port string) *exec.Cmd {
				if program == "php" {
					return exec.Command(path, "-S", "127.0.0.1:"+port, docs(t, file))
				}
				return exec.Command(path, docs(t, file))
			}
		}
	}
	for name, language := range map[string]struct {
		program   func(*testing.T) func(port string) *exec.Cmd
		edProgram func(*testing.T) func(port string) *exec.Cmd // where ed25519 needs more
	}{
		"go":            {program: built("receiving/verify.go")},
		"node":          {program: in("node", "receiving/verify.mjs")},
		"python":        {program: in("python3", "receiving/verify.py"), edProgram: in("python3", "receiving/verify.py", "-c", "import cryptography")},
		"ruby":          {program: in("ruby", "receiving/verify.rb", "-e", "require 'webrick'")},
		"php":           {program: in("php", "receiving/verify.php"), edProgram: in("php", "receiving/verify.php", "-r", "exit(extension_loaded('sodium') ? 0 : 1);")},
		"go by library": {program: built("receiving/library/verify.go")},
	} {
		t.Run(name, func(t *testing.T) {
			program := language.program(t)
			t.Run("hmac", func(t *testing.T) { hmacCases(t, program) })
			if strings.HasSuffix(name, "by library") {
				return // it knows v1 alone
			}
			t.Run("ed25519", func(t *testing.T) {
				if language.edProgram != nil {
					program = language.edProgram(t)
				}
				edCases(t, program)
			})
		})
	}
}

// built is a program in Go.
func built(file string) func(*testing.T) func(port string) *exec.Cmd {
	return func(t *testing.T) func(string) *exec.Cmd {
		binary := filepath.Join(t.TempDir(), "receiver")
		out, err := exec.CommandContext(t.Context(), need(t, "go"), "build", "-o", binary, docs(t, file)).CombinedOutput()
		require.NoError(t, err, string(out))
		return func(string) *exec.Cmd { return exec.Command(binary) }
	}
}

// The one with the npm package, which `make judges` installs.
func TestOtherPeoplesCodeInTheReceiverOfTheDocs(t *testing.T) {
	dir := os.Getenv("WALHOOK_TEST_JUDGES")
	if dir == "" {
		t.Skip("needs npm packages, which `make judges` installs")
	}
	node := need(t, "node")
	there := t.TempDir() // a module looks for others beside it
	require.NoError(t, os.Symlink(filepath.Join(dir, "node_modules"), filepath.Join(there, "node_modules")))
	text, err := os.ReadFile(docs(t, "receiving/library/verify.mjs"))
	require.NoError(t, err)
	file := filepath.Join(there, "verify.mjs")
	require.NoError(t, os.WriteFile(file, text, 0o600))
	hmacCases(t, func(string) *exec.Cmd { return exec.Command(node, file) })
}

// What the page shows is what was run.
func TestThePageShowsTheReceiversThatRun(t *testing.T) {
	page, err := os.ReadFile(docs(t, "receiving.md"))
	require.NoError(t, err)
	names := map[string]string{".go": "go", ".mjs": "js", ".py": "python", ".rb": "ruby", ".php": "php"}
	files, err := filepath.Glob(docs(t, "receiving/verify.*"))
	require.NoError(t, err)
	library, err := filepath.Glob(docs(t, "receiving/library/verify.*"))
	require.NoError(t, err)
	require.Len(t, append(files, library...), 7)
	for _, file := range append(files, library...) {
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		block := fmt.Sprintf("```%s\n%s```\n", names[filepath.Ext(file)], text)
		require.True(t, strings.Contains(string(page), block), "docs/receiving.md does not show %s as it is", filepath.Base(file))
	}
}

// The commands that make a pair of ed25519 keys make one.
func TestKeysMadeAsTheDocsSay(t *testing.T) {
	need(t, "openssl")
	need(t, "base64")
	page, err := os.ReadFile(docs(t, "receiving.md"))
	require.NoError(t, err)
	_, commands, found := strings.Cut(string(page), "```sh\n")
	require.True(t, found)
	commands, _, _ = strings.Cut(commands, "```")
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), need(t, "sh"), "-ec", commands)
	cmd.Dir = t.TempDir()
	out, err := cmd.Output()
	require.NoError(t, err)
	lines := strings.Fields(string(out))
	require.Len(t, lines, 2)
	secret, err := parseSecret(lines[0])
	require.NoError(t, err)
	require.Equal(t, lines[1], "whpk_"+base64.StdEncoding.EncodeToString(secret.ed.Public().(ed25519.PublicKey)))
}
