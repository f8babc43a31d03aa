//go:build !linux

package procs

// yield does nothing here.
func yield() {}
