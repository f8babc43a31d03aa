package main

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// waitEvery is the pause between two looks of a command that waits for what the cluster does by itself.
const waitEvery = 500 * time.Millisecond

// await calls look until it says that it is done, or ctx ends: then the error says what was left. A server
// that does not answer for a while is asked again.
func await(ctx context.Context, what string, look func(ctx context.Context) (left string, err error)) error {
	left := "nothing is known yet"
	for {
		now, err := look(ctx)
		switch code := status.Code(err); {
		case err == nil && now == "":
			return nil
		case err == nil:
			left = now
		case code != codes.Unavailable && code != codes.Aborted && code != codes.DeadlineExceeded:
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: not finished (%w): %s\n  It goes on; the same command waits again, and --timeout gives it "+
				"longer", what, context.Cause(ctx), left)
		case <-time.After(waitEvery):
		}
	}
}
