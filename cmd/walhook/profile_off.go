//go:build !bench_profile

package main

// profile is for builds with the tag bench_profile alone, which `make bench` makes and nobody ships.
func profile() (end func()) { return func() {} }
