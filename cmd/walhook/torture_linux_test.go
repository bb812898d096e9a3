package main

import "syscall"

// dieWithUs has the kernel end a child when its parent is gone, however that went: a test that is
// killed leaves no walhook behind, not even a frozen one.
func dieWithUs() *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }
