package lab

import (
	"context"
	"fmt"
	"os"
)

// helperVariable is in the environment of a helper, and names which one it is.
const helperVariable = "TRIVET_E2E_HELPER"

// Hook must be the first call in main of every program that calls [Up]. In a process that the lab
// started as one of its helpers (the init of a node, the name server) it does the helper's work and
// never returns; in any other it does nothing.
func Hook() {
	helper := os.Getenv(helperVariable)
	if helper == "" {
		return
	}
	if err := os.Unsetenv(helperVariable); err != nil {
		panic(err) // only for a malformed name
	}
	run, ok := map[string]func(context.Context, []string) error{
		"node": runNode,
		"dns":  runDNS,
		"ssh":  runSSH,
	}[helper]
	if !ok {
		fmt.Fprintf(os.Stderr, "lab: no helper is called %s\n", helper)
		os.Exit(2)
	}
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "lab %s: %v\n", helper, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// startHelper starts this very program as one of the lab's helpers.
func (s starter) startHelper(name, helper string, args []string, flags uintptr, files ...*os.File) (process, error) {
	argv := append([]string{"/proc/self/exe"}, args...)
	return s.start(name, argv, []string{helperVariable + "=" + helper}, flags, files...)
}
