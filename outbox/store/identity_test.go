package store

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/url"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/walhook/walhook/cdc/pgtest"
	"github.com/walhook/walhook/outbox"
)

func TestCopyOfTheDatabaseIsNotTakenOver(t *testing.T) {
	const elsewhere = "hosts = 'primary:5432,secondary:5432', server = '10.0.0.5:5432'"
	for name, c := range map[string]struct {
		change  string // what makes it a copy
		slot    string
		first   bool // the slot begins anew once it is adopted
		differs string
		adopt   string // where it is always the same
	}{
		"another cluster":          {"system_identifier = '42'", "walhook", true, "another cluster", ""},
		"another database":         {"database = 'it''s'", "walhook", true, "another database", ""},
		"another instance":         {"instance = 'production'", "walhook", false, "another instance", "update walhook.checkpoints set instance = 'it''s mine';"},
		"another name of slot":     {"system_identifier = '42'", "staging", true, "another cluster", ""},
		"slot and instance differ": {"instance = 'production'", "staging", true, "another instance", "update walhook.checkpoints set instance = 'it''s mine';"},
		"another server":           {elsewhere, "walhook", false, "another server", "update walhook.checkpoints set hosts = null, server = null;"},
		"server and instance differ": {
			"instance = 'production', " + elsewhere, "walhook", false, "another instance, another server",
			"update walhook.checkpoints set hosts = null, server = null, instance = 'it''s mine';",
		},
		"everything differs": {
			"system_identifier = '42', database = 'app', instance = 'production', " + elsewhere, "walhook", true,
			"another cluster, another database, another instance, another server", "",
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := setup(t)
			s := open(t, b.url, c.slot, "it's mine")
			b.exec("update walhook.checkpoints set instance = 'it''s mine'; update walhook.checkpoints set " + c.change)
			_, err := s.Claim(t.Context(), b.holder(555))
			var copied *CopyError
			require.ErrorAs(t, err, &copied)
			require.Equal(t, "walhook", copied.Slot)
			require.Equal(t, b.here("it's mine"), copied.Here)
			require.Equal(t, b.saved().Identity, copied.Stored)
			require.ErrorContains(t, err, copied.AdoptSQL())
			require.ErrorContains(t, err, ": "+c.differs+"; to go on")
			if c.adopt != "" {
				require.Equal(t, c.adopt, copied.AdoptSQL())
			}
			require.ErrorIs(t, s.Write(t.Context(), []outbox.Change{park(1)}), outbox.ErrFenced)
			require.NoError(t, b.Write(t.Context(), []outbox.Change{park(1)}), "nothing was changed")

			// Whoever only reads, announces or fills is told the same.
			_, _, readErr := s.Checkpoint(t.Context(), b.system)
			_, fillErr := s.Fill(t.Context(), b.holder(555), 1)
			for _, err := range []error{readErr, fillErr, s.Announce(t.Context(), b.holder(0))} {
				var again *CopyError
				require.ErrorAs(t, err, &again)
				require.Equal(t, copied, again)
			}
			_, _, err = s.Checkpoint(t.Context(), "")
			require.NoError(t, err, "nobody asks")

			b.exec(copied.AdoptSQL())
			claimed, err := s.Claim(t.Context(), b.holder(555))
			require.NoError(t, err)
			require.Equal(t, c.first, claimed.First)
			require.NoError(t, s.Write(t.Context(), []outbox.Change{park(2)}))
			_, ok, err := s.Checkpoint(t.Context(), b.system)
			require.NoError(t, err)
			require.True(t, ok)
		})
	}
}

// here is the identity of whoever comes by b's URL.
func (b *bundle) here(instance string) Identity {
	address, err := url.Parse(b.url)
	require.NoError(b.t, err)
	return Identity{
		SystemIdentifier: b.system, Database: strings.TrimPrefix(address.Path, "/"), Instance: instance,
		Hosts: address.Host, Server: address.Host,
	}
}

// One text adopts whatever a schema of several slots has.
func TestEveryCheckpointIsAdoptedAtOnce(t *testing.T) {
	b := setup(t)
	for _, slot := range []string{"a", "b", "c", "d"} {
		_, err := open(t, b.url, slot, "default").Claim(t.Context(), b.holder(7))
		require.NoError(t, err)
	}
	b.exec(`
		update walhook.checkpoints set system_identifier = '42' where slot = 'a';
		update walhook.checkpoints set instance = 'production' where slot = 'b';
		update walhook.checkpoints set hosts = 'primary:5432', server = '5432' where slot = 'c'`)
	_, err := b.Claim(t.Context(), b.holder(7))
	var copied *CopyError
	require.ErrorAs(t, err, &copied)
	b.exec(copied.AdoptSQL())
	claimed, err := b.Claim(t.Context(), b.holder(7))
	require.NoError(t, err)
	require.False(t, claimed.First)
	require.Equal(t, 4, b.count("checkpoints"), "only the other cluster's was deleted")
}

func TestIdentityOfServers(t *testing.T) {
	place := func(hosts, server string) Identity { return Identity{Hosts: hosts, Server: server} }
	stored := place("db-1:5432,db-2:5432", "10.0.0.5:5432")
	for name, c := range map[string]struct {
		here Identity
		copy bool
	}{
		"the same":                       {stored, false},
		"proxy in front":                 {place("pooler:6432", "10.0.0.5:5432"), false},
		"pod with another address":       {place("db-1:5432,db-2:5432", "10.0.9.9:5432"), false},
		"failover and another host more": {place("db-2:5432,db-3:5432", "10.0.0.6:5432"), false},
		"another port of the same host":  {place("db-1:5433", "10.0.0.5:5433"), true},
		"clone elsewhere":                {place("clone:5432", "10.0.9.9:5432"), true},
		"name that only begins so":       {place("db-1:543", "10.0.9.9:5432"), true},
		"unix socket in place of TCP":    {place("/run/postgresql:5432", "5432"), true},
		"server not known":               {place("clone:5432", ""), false},
		"hosts not known":                {place("", "10.0.9.9:5432"), false},
	} {
		require.Equal(t, c.copy, len(c.here.Differs(stored)) > 0, name)
		require.Equal(t, c.copy, len(stored.Differs(c.here)) > 0, name)
	}
	require.Empty(t, place("clone:5432", "10.0.9.9:5432").Differs(Identity{}), "a checkpoint of version 1")
}

func TestHostsOfTheURLAreSortedAndNamedOnce(t *testing.T) {
	for address, want := range map[string]string{
		"postgres://db-2:5432,db-1:5433,db-2/app":            "db-1:5433,db-2:5432",
		"postgres://db/app?sslmode=prefer":                   "db:5432",
		"postgres://[::1]:5433/app?sslmode=disable":          "[::1]:5433",
		"host=/var/run/postgresql port=5433 sslmode=disable": "/var/run/postgresql:5433",
	} {
		c, err := connConfig(func() (string, error) { return address, nil })
		require.NoError(t, err)
		require.Equal(t, want, hostsOf(c))
	}
}

// docs/faults.md 36: identifier, database and instance are all copied with the files.
func TestCopyOfTheFilesIsNotTakenOver(t *testing.T) {
	original, clone := pgtest.New(t, pgtest.Config{}), pgtest.New(t, pgtest.Config{})
	b := empty(t, original.URL())
	require.NoError(t, b.Migrate(t.Context()))
	_, err := b.Claim(t.Context(), b.holder(100))
	require.NoError(t, err)
	require.NoError(t, b.Write(t.Context(), []outbox.Change{park(1)}))

	require.NoError(t, original.Stop(t.Context(), pgtest.Fast))
	require.NoError(t, clone.Stop(t.Context(), pgtest.Fast))
	out, err := exec.Command("sh", "-c", `rm -r "$1"/* && cp -a "$0"/. "$1"`, original.DataDir(), clone.DataDir()).CombinedOutput()
	require.NoError(t, err, string(out))
	require.NoError(t, original.Start(t.Context()))
	require.NoError(t, clone.Start(t.Context()))

	c := empty(t, clone.URL())
	require.Equal(t, b.system, c.system)
	_, _, err = c.Checkpoint(t.Context(), c.system)
	var copied *CopyError
	require.ErrorAs(t, err, &copied)
	_, err = c.Claim(t.Context(), c.holder(100))
	require.ErrorAs(t, err, &copied)
	require.ErrorContains(t, err, "another server")
	require.Equal(t, "update walhook.checkpoints set hosts = null, server = null;", copied.AdoptSQL())

	_, err = open(t, original.URL(), "walhook", "default").Claim(t.Context(), b.holder(100))
	require.NoError(t, err, "the original goes on")
	c.exec(copied.AdoptSQL())
	claimed, err := c.Claim(t.Context(), c.holder(100))
	require.NoError(t, err)
	require.False(t, claimed.First)
	require.Equal(t, c.here("default").Hosts, c.saved().Hosts)
	_, err = open(t, clone.URL(), "walhook", "default").Claim(t.Context(), c.holder(100))
	require.NoError(t, err, "it was adopted once and for all")
}

func TestProxyInFrontIsNoCopy(t *testing.T) {
	b := setup(t)
	proxy := newProxy(t, b)
	s := open(t, proxy.url, "walhook", "default")
	_, _, err := s.Checkpoint(t.Context(), b.system)
	require.NoError(t, err)
	_, err = s.Claim(t.Context(), b.holder(1))
	require.NoError(t, err)
	saved := b.saved()
	require.Equal(t, proxy.host, saved.Hosts, "the new one is known from now on")
	require.Equal(t, b.here("").Server, saved.Server)
}

func TestServerThatMovedBehindItsNameIsNoCopy(t *testing.T) {
	b := setup(t)
	b.exec("update walhook.checkpoints set server = '10.0.0.5:5432'")
	_, err := b.Claim(t.Context(), b.holder(1))
	require.NoError(t, err)
	require.Equal(t, b.here("default"), b.saved().Identity)

	b.exec("update walhook.checkpoints set hosts = null, server = null")
	_, err = b.Claim(t.Context(), b.holder(1))
	require.NoError(t, err)
	require.Equal(t, b.here("default"), b.saved().Identity, "what was not known is now")
}

// proxy stands between a store and its server. Once it has passed a message with cutAfter in it on to
// the server, it waits for the answer and then cuts the connection instead of passing it on.
type proxy struct {
	url, host string
	cutAfter  []byte
}

func newProxy(t *testing.T, b *bundle) *proxy {
	address, err := url.Parse(b.url)
	require.NoError(t, err)
	server := address.Host
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	p := &proxy{host: listener.Addr().String()}
	address.Host = p.host
	p.url = address.String()
	var group sync.WaitGroup
	t.Cleanup(func() {
		listener.Close()
		group.Wait() // its stores are closed by now
	})
	group.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("tcp", server)
			if err != nil {
				t.Error(err)
				client.Close()
				continue
			}
			var mu sync.Mutex // guards cut
			cut := false
			pass := func(from, to net.Conn, look func([]byte) bool) {
				defer from.Close()
				defer to.Close()
				for buf := make([]byte, 1<<16); ; {
					n, err := from.Read(buf)
					if err != nil {
						if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
							t.Log(err)
						}
						return
					}
					if !look(buf[:n]) {
						return
					}
					if _, err := to.Write(buf[:n]); err != nil {
						return
					}
				}
			}
			group.Go(func() {
				pass(client, up, func(b []byte) bool {
					mu.Lock()
					defer mu.Unlock()
					cut = cut || p.cutAfter != nil && bytes.Contains(b, p.cutAfter)
					return true
				})
			})
			group.Go(func() {
				pass(up, client, func([]byte) bool {
					mu.Lock()
					defer mu.Unlock()
					return !cut
				})
			})
		}
	})
	return p
}
