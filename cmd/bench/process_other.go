//go:build !linux

package main

import "time"

// maxrssUnit is the unit of ru_maxrss in bytes, as macOS has it.
const maxrssUnit = 1

// processUsage knows nothing of processes that run: usedInAll does, of those that have ended.
func processUsage(int) (usage, bool) { return usage{}, false }

// stolen is not known.
func stolen() (time.Duration, bool) { return 0, false }
