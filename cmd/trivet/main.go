// Command trivet is the whole of Trivet in one binary: the server that runs on every node, the
// commands of an operator, and a throw-away cluster to try it on. `trivet help` lists them.
//
// It exits with 0 only when what was asked is done, with 1 on an error and with 2 on wrong usage.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// version is set by the linker (Makefile).
var version = "unknown"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := newRoot().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "trivet: %s\n", explain(err))
		var usage usageError
		if errors.As(err, &usage) {
			os.Exit(2)
		}
		os.Exit(1)
	}
}
