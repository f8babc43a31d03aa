package driver

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node"
)

var (
	// errPrecondition: the request is well formed, but must not be made in this state, or asks for
	// more than the volume can do.
	errPrecondition = errors.New("failed precondition")

	// errToken: a list was to be continued by a token that was never given out.
	errToken = errors.New("list again with an empty token")
)

// codeOf says which code stands for which error. The order matters where an error wraps two of
// them: codes by which the orchestrator knows that the outcome is open come before the ones that
// it takes for final, for a final answer to a volume that was made after all would leak it.
var codeOf = []struct {
	err  error
	code codes.Code
}{
	{trivet.ErrUnavailable, codes.Unavailable},
	{trivet.ErrNotLeader, codes.Unavailable},
	{trivet.ErrClosed, codes.Unavailable}, // a shutdown under way: the next process answers
	{trivet.ErrPending, codes.Aborted},
	{errToken, codes.Aborted},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{context.Canceled, codes.Canceled},
	{trivet.ErrInvalid, codes.InvalidArgument},
	{trivet.ErrCorrupt, codes.DataLoss},
	{trivet.ErrNotFound, codes.NotFound},
	{trivet.ErrExists, codes.AlreadyExists},
	{trivet.ErrInUse, codes.FailedPrecondition},
	{trivet.ErrFenced, codes.FailedPrecondition},
	{node.ErrNotStaged, codes.FailedPrecondition},
	{node.ErrUnsupported, codes.FailedPrecondition},
	{errPrecondition, codes.FailedPrecondition},
	{trivet.ErrNoSpace, codes.ResourceExhausted},
	{trivet.ErrOutOfRange, codes.OutOfRange},
}

// absent reports whether err says that the thing is not there, and that for certain: with an error whose outcome is
// open it does not.
func absent(err error) bool { return err != nil && status.Code(ToStatus(err)) == codes.NotFound }

// ToStatus is the only place where an error becomes a gRPC status; the administration API uses it
// too. The first match in codeOf wins; wrapped errors match too. What is a status already passes
// through, such as "unimplemented" of the generated code. The details are empty, as the CSI
// specification demands. REQUIRES: err != nil.
func ToStatus(err error) error {
	for _, c := range codeOf {
		if errors.Is(err, c.err) {
			return status.Error(c.code, err.Error())
		}
	}
	if st, ok := status.FromError(err); ok {
		return status.Error(st.Code(), st.Message())
	}
	return status.Error(codes.Internal, err.Error())
}
