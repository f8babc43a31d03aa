package replication

import (
	"context"
	"errors"
	"fmt"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/transport"
)

// handleWrite answers KindVolumeWrite.
func (h *Host) handleWrite(ctx context.Context, from trivet.NodeID, m transport.Message) (transport.Message, error) {
	req, err := decodeWrite(m.Body)
	if err != nil {
		return transport.Message{}, err
	}
	out, err := h.write(ctx, from, m.Group, &req)
	if err != nil {
		return transport.Message{}, err
	}
	return transport.Message{Body: out.append(nil)}, nil
}

// handleRead answers KindVolumeRead.
func (h *Host) handleRead(ctx context.Context, from trivet.NodeID, m transport.Message) (transport.Message, error) {
	req, err := decodeRead(m.Body)
	if err != nil {
		return transport.Message{}, err
	}
	body, data := newReadReply(int(req.blockN) * trivet.BlockSize)
	out, err := h.read(ctx, from, m.Group, data, &req)
	if err != nil {
		return transport.Message{}, err
	}
	if out.code != codeDone {
		return transport.Message{Body: out.append(nil)}, nil
	}
	out.crc = readSum(m.Group, req.lba, data)
	out.putHeader(body)
	return transport.Message{Body: body}, nil
}

// handleStatus answers KindVolumeStatus, which has no body.
func (h *Host) handleStatus(_ context.Context, _ trivet.NodeID, m transport.Message) (transport.Message, error) {
	r, ok := h.Replica(m.Group)
	if !ok {
		return transport.Message{}, fmt.Errorf("%s has no running replica on %s: %w",
			m.Group, h.cfg.Network.Local(), trivet.ErrNotFound)
	}
	st := r.Status()
	out := RemoteStatus{
		Replica: r.spec.Replica, Leader: st.Leader, LeaderNode: st.LeaderNode, IsLeader: st.IsLeader,
		Term: st.Term, Commit: st.Commit, Applied: st.Applied,
		Epoch: st.Epoch, SizeBytes: st.SizeBytes, UsedBytes: st.UsedBytes,
		LastIndex: st.LastIndex, LastTerm: st.LastTerm,
	}
	return transport.Message{Body: out.append(nil)}, nil
}

// QueryStatus asks a node how its replica of a volume is doing. ErrNotFound: it runs none;
// ErrUnavailable: it did not answer.
func QueryStatus(ctx context.Context, n transport.Network, node trivet.NodeID, id trivet.VolumeID) (
	RemoteStatus, error,
) {
	m, err := n.Call(ctx, node, transport.Message{Kind: transport.KindVolumeStatus, Group: id})
	if err != nil {
		return RemoteStatus{}, fmt.Errorf("status of %s on %s: %w", id, node, err)
	}
	s, err := decodeStatus(m.Body)
	if err != nil {
		return RemoteStatus{}, fmt.Errorf("status of %s on %s: %w", id, node, err)
	}
	return s, nil
}

// write hands a request of node from to the replica here. A replica that does not lead is not an
// error but a reply with the leader's name.
func (h *Host) write(ctx context.Context, from trivet.NodeID, id trivet.VolumeID, req *request) (reply, error) {
	r, err := h.admit(from, id, req.epoch)
	if err != nil {
		return reply{}, err
	}
	if r == nil {
		return reply{code: codeNotLeader}, nil
	}
	term, err := r.write(ctx, req)
	return r.reply(term, err)
}

// read fills p for node from.
func (h *Host) read(ctx context.Context, from trivet.NodeID, id trivet.VolumeID, p []byte, req *readRequest) (
	reply, error,
) {
	r, err := h.admit(from, id, req.epoch)
	if err != nil {
		return reply{}, err
	}
	if r == nil {
		return reply{code: codeNotLeader}, nil
	}
	term, err := r.read(ctx, p, req)
	return r.reply(term, err)
}

// admit returns the replica of a volume, or nil when none runs here.
func (h *Host) admit(from trivet.NodeID, id trivet.VolumeID, epoch trivet.Epoch) (*Replica, error) {
	if h.cfg.Authorize != nil {
		if err := h.cfg.Authorize(from, id, epoch); err != nil {
			return nil, fmt.Errorf("node %s at epoch %d: %w", from, epoch, err)
		}
	}
	r, ok := h.Replica(id)
	if !ok {
		return nil, nil //nolint:nilnil // "not here" is an answer, not an error
	}
	return r, nil
}

func (r *Replica) reply(term uint64, err error) (reply, error) {
	switch {
	case errors.Is(err, trivet.ErrNotLeader):
		return reply{code: codeNotLeader, node: r.group.Status().LeaderNode}, nil
	case errors.Is(err, trivet.ErrClosed): // ours, not the client's
		return reply{}, fmt.Errorf("replica %s is closing: %w", r.spec.Replica, trivet.ErrUnavailable)
	case err != nil:
		return reply{}, err
	}
	return reply{
		code: codeDone, term: term, epoch: r.machine.view.Load().Epoch, index: r.machine.newest.Load(),
	}, nil
}
