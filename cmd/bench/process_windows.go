package main

import (
	"os"
	"os/exec"
)

func apart(*exec.Cmd) {}

// peakInAll is not known here.
func peakInAll(*os.ProcessState) int64 { return 0 }
