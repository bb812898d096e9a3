//go:build bench_profile

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/pprof"
)

// profile writes where the process spends its time to $WALHOOK_PROFILE.cpu, and all that it has
// allocated to $WALHOOK_PROFILE.allocs, when it ends.
func profile() (end func()) {
	prefix := os.Getenv("WALHOOK_PROFILE")
	if prefix == "" {
		return func() {}
	}
	cpu, err := os.Create(prefix + ".cpu")
	if err == nil {
		err = pprof.StartCPUProfile(cpu)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "walhook: profile: %v\n", err)
		return func() {}
	}
	return func() {
		pprof.StopCPUProfile()
		allocs, err := os.Create(prefix + ".allocs")
		if err == nil {
			err = pprof.Lookup("allocs").WriteTo(allocs, 0)
		}
		if err := errors.Join(err, closeAll(cpu, allocs)); err != nil {
			fmt.Fprintf(os.Stderr, "walhook: profile: %v\n", err)
		}
	}
}

func closeAll(files ...io.Closer) (err error) {
	for _, f := range files {
		err = errors.Join(err, f.Close())
	}
	return err
}
