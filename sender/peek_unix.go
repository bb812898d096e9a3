//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package sender

import (
	"errors"
	"syscall"
)

// canPeek tells whether this system lets us look at a connection without reading from it; without that there are no wires.
const canPeek = true

// empty tells whether nothing has come on a socket, not its end either.
func empty(fd uintptr) bool {
	var b [1]byte
	_, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	return errors.Is(err, syscall.EAGAIN)
}
