//go:build !unix

package pgtest

import (
	"errors"
	"os"
)

// Elsewhere the package builds, so that the commands which use it do, and starts nothing.
var errUnsupported = errors.New("throwaway Postgres servers run on Linux, macOS and BSD only")

type owner struct{}

type watchdog struct{}

func unprivileged() (*owner, error) { return nil, errUnsupported }

func give(string, *owner) error   { return errUnsupported }
func reaches(string, *owner) bool { return false }
func reap(int) (bool, error)      { return true, errUnsupported }
func signalStop(int, Mode) error  { return errUnsupported }
func signalReload(int) error      { return errUnsupported }
func killTree(int) error          { return errUnsupported }
func removeSharedMemory([]byte)   {}
func (*watchdog) watch(int) error { return errUnsupported }
func (*watchdog) close() error    { return errUnsupported }

func startWatchdog(string) (*watchdog, error) { return nil, errUnsupported }

func spawn(*owner, string, *os.File, string, ...string) (int, error) { return 0, errUnsupported }
