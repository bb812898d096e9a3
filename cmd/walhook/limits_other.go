//go:build !unix

package main

// maxDescriptors is the process' limit; zero where there is none.
func maxDescriptors() int { return 0 }
