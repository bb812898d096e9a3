package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// maxrssUnit is the unit of ru_maxrss in bytes.
const maxrssUnit = 1 << 10

// clockTick is the unit of times in /proc/PID/stat: USER_HZ, which is 100 on every Linux that Go knows.
const clockTick = 10 * time.Millisecond

// processUsage reads /proc.
func processUsage(pid int) (u usage, known bool) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return u, false
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return u, false
	}
	var okCPU, okPeak, okResident bool
	u.cpu, okCPU = cpuOfStat(string(stat))
	u.peak, okPeak = ofStatus(string(status), "VmHWM:")
	u.resident, okResident = ofStatus(string(status), "VmRSS:")
	return u, okCPU && okPeak && okResident
}

// stolen is the time in which the host gave the processors to others while something here could have run.
func stolen() (time.Duration, bool) {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, false
	}
	return stealOfStat(string(stat))
}

// stealOfStat is the eighth number of all processors' line of /proc/stat, proc_stat(5).
func stealOfStat(stat string) (time.Duration, bool) {
	line, _, _ := strings.Cut(stat, "\n")
	fields := strings.Fields(line)
	if len(fields) < 9 || fields[0] != "cpu" {
		return 0, false
	}
	ticks, err := strconv.ParseInt(fields[8], 10, 64)
	return time.Duration(ticks) * clockTick, err == nil
}

// cpuOfStat is utime + stime, the 14th and 15th field; the second, the name, may hold anything.
func cpuOfStat(stat string) (time.Duration, bool) {
	i := strings.LastIndexByte(stat, ')')
	if i < 0 {
		return 0, false
	}
	fields := strings.Fields(stat[i+1:])
	if len(fields) < 13 {
		return 0, false
	}
	user, errUser := strconv.ParseInt(fields[11], 10, 64)
	system, errSystem := strconv.ParseInt(fields[12], 10, 64)
	return time.Duration(user+system) * clockTick, errUser == nil && errSystem == nil
}

// ofStatus is a line of /proc/PID/status, in bytes.
func ofStatus(status, name string) (int64, bool) {
	for line := range strings.Lines(status) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return kib << 10, err == nil
		}
	}
	return 0, false
}
