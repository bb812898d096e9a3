//go:build unix

package main

import (
	"math"
	"syscall"
)

// maxDescriptors is the process' limit; zero where there is none.
func maxDescriptors() int {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil || uint64(l.Cur) > math.MaxInt32 {
		return 0
	}
	return int(l.Cur)
}
