package main

import (
	"math"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"go.uber.org/zap"

	"github.com/walhook/walhook/outbox"
)

const (
	// ownDescriptors are kept back from sending: for the pool, the stream and the advisory lock,
	// the listener and whoever asks for metrics, the runtime, the files of a reload.
	ownDescriptors = 64
	// An attempt has two descriptors for a moment (a name is asked for by IPv4 and IPv6, and two
	// addresses may be raced), and one connection may stay idle for each.
	descriptorsPerAttempt = 3
	// mostIdle connections are as many as are worth their memory: each has buffers, and under net/http two goroutines.
	mostIdle = 1024
	// enoughAttempts at once, or one for each endpoint where those are more, are what a limit should allow.
	enoughAttempts = 1000
)

// limits are what this host allows in descriptors, and what is made of it.
type limits struct {
	descriptors int // of the process; zero is no limit
	attempts    int // in flight at once; zero is no limit
	idle        int // connections kept
}

// hostLimits reads the limit of the process, whose soft one Go has raised to the hard one.
func hostLimits() limits { return limitsOf(maxDescriptors()) }

func limitsOf(descriptors int) limits {
	if descriptors == 0 {
		return limits{idle: mostIdle}
	}
	attempts := max(1, (descriptors-min(ownDescriptors, descriptors/2))/descriptorsPerAttempt)
	return limits{descriptors: descriptors, attempts: attempts, idle: min(attempts, mostIdle)}
}

// say tells once, at the start, what the limits allow, and warns where that is little for these endpoints.
func (l limits) say(log *zap.Logger, endpoints []*outbox.Endpoint) {
	if l.descriptors == 0 {
		return
	}
	fields := []zap.Field{zap.Int("limit", l.descriptors), zap.Int("attempts_at_once", l.attempts), zap.Int("idle_connections", l.idle)}
	if want := attemptsWanted(endpoints); l.attempts < want {
		log.Warn("few file descriptors for these endpoints: attempts may have to wait for each other; raise the limit (ulimit -n, LimitNOFILE)",
			append(fields, zap.Int("endpoints", len(endpoints)), zap.Int("sensible_limit", want*descriptorsPerAttempt+ownDescriptors))...)
		return
	}
	log.Info("file descriptors", fields...)
}

// attemptsWanted is how many attempts at once these endpoints may sensibly ask for.
func attemptsWanted(endpoints []*outbox.Endpoint) int {
	all := 0
	for _, e := range endpoints {
		all += e.Concurrency
	}
	return min(all, max(enoughAttempts, len(endpoints)))
}

// memoryShare is the part of a container's memory that the heap and the runtime may have before the collector
// works harder. The rest is for what it does not count: the program's own pages, sockets.
const memoryShare = 0.8

// keepWithinMemory has the collector know of the container's memory limit, or else it would let the heap grow to twice what
// is in use, and the kernel end the process. GOMEMLIMIT, where somebody has set it, stays as it is.
func keepWithinMemory(log *zap.Logger, container memlimit.Provider) {
	limit, err := memlimit.Set(memlimit.WithRatio(memoryShare), memlimit.WithProvider(container))
	switch {
	case err != nil: // a host without cgroups
		log.Debug("the memory limit cannot be told", zap.Error(err))
	case limit < math.MaxInt64:
		log.Info("memory limit", zap.Int64("go_memory_limit_bytes", limit))
	}
}
