package node

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// Catalogue is the node's way to the catalogue: a local copy to plan by, a linearizable read for
// what cannot be undone, and commands. It is safe for concurrent use.
type Catalogue interface {
	// Local returns this node's copy, which may lag behind. It is never nil and must not be changed.
	Local() *meta.State

	// Changed returns a channel that is closed at the next change of Local. Take it before reading
	// Local, or a change in between is missed.
	Changed() <-chan struct{}

	// Read returns a state at least as new as every command that any node had committed before the
	// call. ErrUnavailable without a quorum.
	Read(ctx context.Context) (*meta.State, error)

	// Propose applies a command. The error says that the outcome is unknown or that the command did
	// not get through; a refusal by the catalogue is in the result.
	Propose(ctx context.Context, c meta.Command) (meta.Result, error)
}

// propose is Propose with both kinds of error in one place.
func propose(ctx context.Context, cat Catalogue, c meta.Command) (meta.Result, error) {
	res, err := cat.Propose(ctx, c)
	if err == nil {
		err = res.Err
	}
	return res, err
}

// Authorizer returns the check of the data path on a leader: it is given the node that a request
// comes from, as its certificate says, and the epoch that the request carries, and returns ErrFenced
// if the catalogue knows that the node does not hold that epoch (H12, S4).
//
// The state machine of every replica refuses all epochs but the current one; this check adds that
// nobody uses the epoch of another node. It judges only what the local copy is sure of. An epoch
// that it has not heard of yet is let through, or a copy that lags would refuse the rightful holder.
func Authorizer(cat Catalogue) func(from trivet.NodeID, volume trivet.VolumeID, epoch trivet.Epoch) error {
	return func(from trivet.NodeID, volume trivet.VolumeID, epoch trivet.Epoch) error {
		newest, fenced, held, ok := cat.Local().Epochs(volume, from)
		if !ok || epoch > newest {
			return nil
		}
		if held != 0 && held == epoch || (epoch < newest && epoch >= fenced) {
			return nil // its own, or about to be fenced: the state machine says when
		}
		return fmt.Errorf("%s from %s at epoch %d: node does not hold that epoch: %w", volume, from, epoch, trivet.ErrFenced)
	}
}

// memberChecker returns what a group asks about a replica that its own configuration does not know: whether
// the local copy of the catalogue has it on that node, as one that may be in the group (H37).
func memberChecker(cat Catalogue) func(trivet.VolumeID, trivet.ReplicaID, trivet.NodeID) bool {
	return func(volume trivet.VolumeID, replica trivet.ReplicaID, node trivet.NodeID) bool {
		v, ok := cat.Local().Volume(volume)
		return ok && slices.Contains(mayLead(&v), raftgroup.Member{Replica: replica, Node: node})
	}
}

// replicaHost is what the agent needs of replication.Host.
type replicaHost interface {
	CreateReplica(ctx context.Context, s replication.ReplicaSpec) error
	OpenReplica(ctx context.Context, s replication.ReplicaSpec) error
	RecoverReplica(ctx context.Context, s replication.ReplicaSpec) error
	ParkReplica(ctx context.Context, s replication.ReplicaSpec) error
	DestroyReplica(ctx context.Context, s replication.ReplicaSpec) error
	running(id trivet.VolumeID) (runningReplica, bool)
}

// runningReplica is what the agent needs of replication.Replica. Changed returns a channel that is
// closed when the replica's leader or term changes, or nil if it cannot tell: then it is asked for
// its Status now and then.
type runningReplica interface {
	Status() replication.ReplicaStatus
	Changed() <-chan struct{}
	Fence(ctx context.Context, epoch trivet.Epoch) error
	FenceWriters(ctx context.Context, epoch trivet.Epoch, w replication.Writers) error
	Wipe(ctx context.Context, epoch trivet.Epoch) error
	Resize(ctx context.Context, sizeBytes int64) error
	TransferTo(ctx context.Context, to trivet.ReplicaID) error
	AddLearner(ctx context.Context, m raftgroup.Member) error
	Promote(ctx context.Context, id trivet.ReplicaID) error
	Remove(ctx context.Context, id trivet.ReplicaID) error
	Freeze(ctx context.Context, epoch trivet.Epoch, id trivet.SnapshotID) (replication.Frozen, error)
	DropSnapshot(ctx context.Context, id trivet.SnapshotID) error
	ScrubRange(ctx context.Context, o replication.ScrubOptions) (replication.ScrubRange, error)
	Rollback(ctx context.Context, epoch trivet.Epoch, id trivet.SnapshotID) error
}

// realHost is the Host of package replication behind replicaHost.
type realHost struct{ *replication.Host }

func (h realHost) running(id trivet.VolumeID) (runningReplica, bool) {
	r, ok := h.Replica(id)
	return r, ok
}

var _ replicaHost = realHost{}

// isLoss reports whether err says that a replica's data is gone or contradicts itself, as opposed
// to an attempt that may succeed later.
func isLoss(err error) bool {
	return errors.Is(err, trivet.ErrNotFound) || errors.Is(err, trivet.ErrCorrupt) || errors.Is(err, trivet.ErrExists)
}
