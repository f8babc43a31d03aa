package driver

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node"
)

func TestToStatus(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		err  error
		want codes.Code
	}{
		{trivet.ErrNotFound, codes.NotFound},
		{trivet.ErrExists, codes.AlreadyExists},
		{trivet.ErrInUse, codes.FailedPrecondition},
		{trivet.ErrFenced, codes.FailedPrecondition},
		{trivet.ErrNotLeader, codes.Unavailable},
		{trivet.ErrUnavailable, codes.Unavailable},
		{trivet.ErrClosed, codes.Unavailable},
		{trivet.ErrPending, codes.Aborted},
		{trivet.ErrNoSpace, codes.ResourceExhausted},
		{trivet.ErrOutOfRange, codes.OutOfRange},
		{trivet.ErrCorrupt, codes.DataLoss},
		{trivet.ErrInvalid, codes.InvalidArgument},
		{node.ErrNotStaged, codes.FailedPrecondition},
		{node.ErrUnsupported, codes.FailedPrecondition},
		{errPrecondition, codes.FailedPrecondition},
		{errToken, codes.Aborted},
		{errPanic, codes.Internal},
		{context.Canceled, codes.Canceled},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{errors.New("anything else"), codes.Internal},
		{status.Error(codes.Unimplemented, "no such method"), codes.Unimplemented},
		{status.Error(codes.PermissionDenied, "not yours"), codes.PermissionDenied},
		{asInvalid(fmt.Errorf("mode: %w", errCapability)), codes.InvalidArgument},
		{asPrecondition(fmt.Errorf("mode: %w", errCapability)), codes.FailedPrecondition},
		// Where two are wrapped, the one that leaves the outcome open counts.
		{fmt.Errorf("%w after %w", trivet.ErrNotFound, trivet.ErrUnavailable), codes.Unavailable},
		{fmt.Errorf("%w after %w", trivet.ErrNoSpace, context.DeadlineExceeded), codes.DeadlineExceeded},
	} {
		t.Run(tt.err.Error(), func(t *testing.T) {
			t.Parallel()
			for _, err := range []error{tt.err, fmt.Errorf("attach vol to node: %w", tt.err)} {
				st := status.Convert(ToStatus(err))
				assert.Equal(t, tt.want, st.Code())
				assert.Empty(t, st.Details())
				assert.Contains(t, st.Message(), status.Convert(tt.err).Message())
			}
		})
	}
}

// TestCodesAreUnique: a second row for the same error would never be reached.
func TestCodesAreUnique(t *testing.T) {
	t.Parallel()
	seen := make(map[error]bool)
	for _, c := range codeOf {
		assert.False(t, seen[c.err], "%v stands twice: the second is never reached", c.err)
		seen[c.err] = true
	}
}
