package replication

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/transport"
)

// Frozen says what a snapshot shows.
type Frozen struct {
	Generation trivet.Generation // of the volume, which the snapshot keeps
	SizeBytes  int64             // of the volume; when a freeze is repeated, what it has become since
}

// frozenBytes is a Frozen on the wire: generation (8), size (8).
const frozenBytes = 16

func (f Frozen) append(dst []byte) []byte {
	dst = binary.BigEndian.AppendUint64(dst, uint64(f.Generation))
	return binary.BigEndian.AppendUint64(dst, uint64(f.SizeBytes))
}

func decodeFrozen(b []byte) Frozen {
	return Frozen{trivet.Generation(binary.BigEndian.Uint64(b)), int64(binary.BigEndian.Uint64(b[8:]))}
}

// Freeze makes a snapshot of the volume, at an epoch which must be the volume's, and returns once a quorum has it:
// what was acknowledged before the call is in it, what is written after it returned is not. It costs one log entry,
// whatever the volume holds. A snapshot that is there already is success, at any epoch. ErrFenced: the epoch is not
// the volume's any more; ErrNoSpace: it has as many snapshots as it may; ErrNotLeader: ask the leader;
// ErrUnavailable: outcome unknown, ask again.
func (r *Replica) Freeze(ctx context.Context, epoch trivet.Epoch, id trivet.SnapshotID) (Frozen, error) {
	f, err := r.freeze(ctx, &request{op: opFreeze, epoch: epoch, arg: uint64(id)})
	if err != nil {
		return Frozen{}, fmt.Errorf("freeze %s of %s at epoch %d: %w", id, r.spec.Volume, epoch, err)
	}
	return f, nil
}

func (r *Replica) freeze(ctx context.Context, req *request) (Frozen, error) {
	res, err := r.propose(ctx, req)
	if err != nil {
		return Frozen{}, err
	}
	return Frozen{Generation: res.generation, SizeBytes: res.sizeBytes}, nil
}

// DropSnapshot makes the volume forget a snapshot; what it alone showed is removed in the background. One that is not
// there is success. ErrNotLeader: ask the leader; ErrUnavailable: outcome unknown, ask again.
func (r *Replica) DropSnapshot(ctx context.Context, id trivet.SnapshotID) error {
	if err := r.command(ctx, &request{op: opDrop, arg: uint64(id)}); err != nil {
		return fmt.Errorf("drop %s of %s: %w", id, r.spec.Volume, err)
	}
	return nil
}

// Rollback makes the volume show a snapshot from now on; all snapshots stay. epoch must be the volume's, and reserved
// for this: a late copy must not undo what was written since. Idempotent. ErrNotFound: no such snapshot; ErrFenced: an
// attachment came; ErrNotLeader: ask the leader; ErrUnavailable: outcome unknown, ask again.
func (r *Replica) Rollback(ctx context.Context, epoch trivet.Epoch, id trivet.SnapshotID) error {
	if err := r.command(ctx, &request{op: opRollback, epoch: epoch, arg: uint64(id)}); err != nil {
		return fmt.Errorf("roll %s back to %s at epoch %d: %w", r.spec.Volume, id, epoch, err)
	}
	return nil
}

// Freeze makes a snapshot of the volume for its holder: what this Volume has acknowledged is in it, and so is what
// others know of. Whoever keeps writes back, as a cache does, has to write them before. Errors as of WriteAt, and
// those of Replica.Freeze; the same snapshot may be asked for again.
func (v *Volume) Freeze(ctx context.Context, id trivet.SnapshotID) (Frozen, error) {
	var out Frozen
	err := v.call(ctx, func(ctx context.Context) error {
		return v.atEpoch(ctx, func(epoch trivet.Epoch) (err error) {
			out, err = v.freezeAtEpoch(ctx, epoch, id)
			return err
		})
	})
	if err != nil {
		return Frozen{}, fmt.Errorf("freeze %s of %s: %w", id, v.cfg.ID, err)
	}
	return out, nil
}

func (v *Volume) freezeAtEpoch(ctx context.Context, epoch trivet.Epoch, id trivet.SnapshotID) (out Frozen, err error) {
	req := request{op: opFreeze, epoch: epoch, arg: uint64(id)}
	if err := req.check(); err != nil {
		return out, err
	}
	req.seal(v.cfg.ID)
	body := appendWrite(nil, &req)
	err = v.callLeader(ctx, false, func(ctx context.Context, node trivet.NodeID) (reply, error) {
		rep, err := v.freezeAt(ctx, node, &req, body)
		if err == nil && rep.code == codeDone {
			out = decodeFrozen(rep.data)
		}
		return rep, err
	})
	return out, err
}

func (v *Volume) freezeAt(ctx context.Context, node trivet.NodeID, req *request, body []byte) (reply, error) {
	if v.cfg.Host != nil && node == v.cfg.Network.Local() {
		own := *req
		return v.cfg.Host.freeze(ctx, node, v.cfg.ID, &own)
	}
	return v.send(ctx, node, transport.KindVolumeFreeze, body, frozenBytes)
}

// handleFreeze answers KindVolumeFreeze, whose body is that of a write with a freeze in it, and whose reply carries a
// Frozen.
func (h *Host) handleFreeze(ctx context.Context, from trivet.NodeID, m transport.Message) (transport.Message, error) {
	req, err := decodeWrite(m.Body)
	if err != nil {
		return transport.Message{}, err
	}
	if err := req.verify(m.Group); err != nil {
		return transport.Message{}, err
	}
	out, err := h.freeze(ctx, from, m.Group, &req)
	if err != nil {
		return transport.Message{}, err
	}
	return transport.Message{Body: out.append(nil)}, nil
}

func (h *Host) freeze(ctx context.Context, from trivet.NodeID, id trivet.VolumeID, req *request) (reply, error) {
	if req.op != opFreeze {
		return reply{}, fmt.Errorf("%s is not for clients: %w", req.op, trivet.ErrInvalid)
	}
	r, err := h.admit(from, id, req.epoch)
	if err != nil {
		return reply{}, err
	}
	if r == nil {
		return reply{code: codeNotLeader}, nil
	}
	st := r.group.Status()
	if !st.IsLeader {
		return reply{code: codeNotLeader, node: st.LeaderNode}, nil
	}
	f, err := r.freeze(ctx, req)
	out, err := r.reply(st.Term, err)
	if err == nil && out.code == codeDone {
		out.data = f.append(nil)
	}
	return out, err
}
