// Package csicall calls a CSI driver as kubelet and the sidecars do, for programs and tests that stand in for them: a
// call whose answer is that it may work later is made again for a minute. Any other error is the caller's at once.
package csicall

import (
	"context"
	"path"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	patience   = time.Minute
	retryPause = 100 * time.Millisecond
)

// Again is an interceptor for connections to a driver. A machine that stands still for some seconds costs a node its
// lease and a volume its leader; what a call in such a moment wanted it gets a little later.
func Again(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, call grpc.UnaryInvoker,
	opts ...grpc.CallOption,
) error {
	for began := time.Now(); ; {
		err := call(ctx, method, req, reply, conn, opts...)
		if err == nil || !mayWorkLater(path.Base(method), err) || time.Since(began) > patience {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(retryPause):
		}
	}
}

// mayWorkLater reports whether an error says nothing about the driver but that it cannot do it now.
func mayWorkLater(method string, err error) bool {
	st := status.Convert(err)
	switch st.Code() {
	case codes.Unavailable, codes.DeadlineExceeded:
		return true
	case codes.Aborted: // somebody else works on it; a list cannot be continued by that token ever
		return !strings.Contains(method, "List")
	case codes.ResourceExhausted: // a node has lost its lease: the message names those that are down
		return method == "CreateVolume" && strings.Contains(st.Message(), "; down: ")
	case codes.FailedPrecondition: // by who looks at all devices, or a child of ours that has not come to its program yet
		return strings.HasPrefix(method, "NodeUn") && strings.Contains(st.Message(), "in use")
	default:
		return false
	}
}
