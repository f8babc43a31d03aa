package raftgroup

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/transport"
)

const (
	chunkBytes   = 1 << 20 // of a snapshot, in one message
	chunkTimeout = 30 * time.Second
)

// peerTransport is the library's Transport for one run of it. What it sends dies with ctx.
type peerTransport struct {
	g         *Group
	ctx       context.Context // the lifetime of one instance
	rpc       chan raft.RPC
	heartbeat func(raft.RPC) // the library's fast path
	proofTerm atomic.Uint64  // in which this replica stands because the leader's process is gone
}

var (
	_ raft.Transport   = (*peerTransport)(nil)
	_ raft.WithPreVote = (*peerTransport)(nil)
)

func (t *peerTransport) Consumer() <-chan raft.RPC { return t.rpc }

func (t *peerTransport) LocalAddr() raft.ServerAddress { return t.g.addr }

func (t *peerTransport) EncodePeer(_ raft.ServerID, a raft.ServerAddress) []byte { return []byte(a) }

func (t *peerTransport) DecodePeer(b []byte) raft.ServerAddress { return raft.ServerAddress(b) }

func (t *peerTransport) SetHeartbeatHandler(h func(raft.RPC)) { t.heartbeat = h }

// AppendEntriesPipeline is refused: one failed request left a follower without replication until
// the leader restarted (D7).
func (t *peerTransport) AppendEntriesPipeline(raft.ServerID, raft.ServerAddress) (raft.AppendPipeline, error) {
	return nil, raft.ErrPipelineReplicationNotSupported
}

// call sends one message to a peer and returns the body of its reply. timeout 0 = none.
func (t *peerTransport) call(id raft.ServerID, to raft.ServerAddress, kind transport.Kind, body []byte,
	timeout time.Duration,
) ([]byte, error) {
	if t.g.guard.failed() != nil {
		return nil, fmt.Errorf("replica failed: %w", trivet.ErrUnavailable)
	}
	replica, node, err := parseAddress(to)
	if err != nil {
		return nil, err
	}
	if string(replica) != string(id) {
		return nil, fmt.Errorf("server %q has address %q: %w", string(id), string(to), trivet.ErrInvalid)
	}
	ctx := t.ctx
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	if kind == transport.KindAppendEntries && len(body) == emptyAppendBytes && !t.g.cfg.Network.alone() {
		b := beat{group: t.g.cfg.Group, from: t.g.cfg.Replica, to: replica, body: body}
		return t.g.cfg.Network.beats.call(ctx, node, b, t.g.guard.stalled)
	}
	reply, err := t.g.cfg.Network.net.Call(ctx, node, transport.Message{
		Kind: kind, Group: t.g.cfg.Group, From: t.g.cfg.Replica, To: replica, Body: body,
	})
	return reply.Body, err
}

func isHeartbeat(r *raft.AppendEntriesRequest) bool {
	return r.PrevLogEntry == 0 && r.PrevLogTerm == 0 && len(r.Entries) == 0 && r.LeaderCommitIndex == 0
}

// bound drops the entries that do not fit in one message. The library reads the request again after
// the call and sends the rest with the next one.
func bound(r *raft.AppendEntriesRequest) {
	size := 0
	for i, e := range r.Entries {
		if size += len(e.Data); size > appendBytesMax && i > 0 {
			r.Entries = r.Entries[:i]
			return
		}
	}
}

func (t *peerTransport) AppendEntries(id raft.ServerID, to raft.ServerAddress, req *raft.AppendEntriesRequest,
	resp *raft.AppendEntriesResponse,
) error {
	// A leader whose disk hangs must not be kept in office by other goroutines of the library. Not by
	// heartbeats alone: an empty AppendEntries, sent every CommitTimeout, does as well (D8).
	if t.g.guard.stalled() {
		return fmt.Errorf("append to replica of %s: disk hangs: %w", t.g.cfg.Group, trivet.ErrUnavailable)
	}
	timeout := 10 * t.g.cfg.Timing.Heartbeat
	if isHeartbeat(req) {
		timeout = t.g.cfg.Timing.Heartbeat
	}
	bound(req)
	body, err := encodeAppend(req)
	if err != nil {
		return err
	}
	sent := t.g.now() // before sending: the lease counts from here
	b, err := t.call(id, to, transport.KindAppendEntries, body, timeout)
	if err != nil {
		return err
	}
	r, err := decodeAppendReply(b)
	if err != nil {
		return err
	}
	*resp = raft.AppendEntriesResponse{
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(id), Addr: []byte(to)},
		Term:      r.term, LastLog: r.lastLog, Success: r.success, NoRetryBackoff: r.noRetryBackoff,
	}
	t.g.lease.setStamp(trivet.ReplicaID(id), r.stamp)
	if r.success && r.term == req.Term {
		var match uint64
		if !isHeartbeat(req) {
			match = req.PrevLogEntry + uint64(len(req.Entries))
		}
		t.g.lease.acked(req.Term, trivet.ReplicaID(id), sent, r.promise, match)
	}
	return nil
}

func (t *peerTransport) vote(id raft.ServerID, to raft.ServerAddress, kind transport.Kind, v voteRequest,
) (verdict, error) {
	b, err := t.call(id, to, kind, v.encode(), t.g.cfg.Timing.Heartbeat)
	if err != nil {
		return verdict{}, err
	}
	return decodeVerdict(b)
}

func (t *peerTransport) RequestVote(id raft.ServerID, to raft.ServerAddress, req *raft.RequestVoteRequest,
	resp *raft.RequestVoteResponse,
) error {
	why := byElection
	if req.LeadershipTransfer {
		why = byTransfer
		if req.Term == t.proofTerm.Load() {
			why = byProof
		}
	}
	r, err := t.vote(id, to, transport.KindRequestVote, voteRequest{req.Term, req.LastLogIndex, req.LastLogTerm, why})
	if err != nil {
		return err
	}
	resp.Term, resp.Granted = r.term, r.yes
	return nil
}

// errPreVote stands for any failed pre-vote call: the library takes an error for a granted one when
// its text has certain words, and the text may come from the peer.
var errPreVote = errors.New("pre-vote call failed")

func (t *peerTransport) RequestPreVote(id raft.ServerID, to raft.ServerAddress, req *raft.RequestPreVoteRequest,
	resp *raft.RequestPreVoteResponse,
) error {
	r, err := t.vote(id, to, transport.KindRequestPreVote,
		voteRequest{req.Term, req.LastLogIndex, req.LastLogTerm, byElection})
	if err != nil {
		t.g.log.Debug("pre-vote call failed", "peer", string(id), "err", err)
		return errPreVote
	}
	resp.Term, resp.Granted = r.term, r.yes
	return nil
}

// TimeoutNow carries our term and the peer's own clock reading, so that a copy that was held up
// somewhere has no effect. The lease is void already (TransferTo).
func (t *peerTransport) TimeoutNow(id raft.ServerID, to raft.ServerAddress, _ *raft.TimeoutNowRequest,
	_ *raft.TimeoutNowResponse,
) error {
	req := timeoutNow{term: t.g.stable.record().term, stamp: t.g.lease.stamp(trivet.ReplicaID(id))}
	_, err := t.call(id, to, transport.KindTimeoutNow, req.encode(), t.g.cfg.Timing.Heartbeat)
	return err
}

// InstallSnapshot sends an image that snapshotStore.Open returned.
func (t *peerTransport) InstallSnapshot(id raft.ServerID, to raft.ServerAddress, req *raft.InstallSnapshotRequest,
	resp *raft.InstallSnapshotResponse, data io.Reader,
) error {
	img, ok := data.(*imageReader)
	if !ok {
		return fmt.Errorf("snapshot is a %T: %w", data, trivet.ErrInvalid)
	}
	begin := snapshotBegin{term: req.Term, rec: img.rec, sizeBytes: req.Size}
	v, err := t.verdict(id, to, transport.KindSnapshotBegin, begin.encode(), chunkTimeout)
	if err != nil {
		return err
	}
	if v.id != 0 {
		if v, err = t.sendImage(id, to, v.id, img); err != nil {
			return err
		}
	}
	resp.Term, resp.Success = v.term, v.yes
	if v.yes {
		t.g.lease.acked(req.Term, trivet.ReplicaID(id), instant{}, 0, img.rec.index)
	}
	return nil
}

func (t *peerTransport) sendImage(id raft.ServerID, to raft.ServerAddress, transfer uint64, r io.Reader,
) (verdict, error) {
	buf := make([]byte, chunkBytes)
	var sum uint32
	for off, done := int64(0), false; !done; {
		n, err := io.ReadFull(r, buf)
		done = errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !done {
			return verdict{}, fmt.Errorf("read image at byte %d: %w", off, err)
		}
		if n == 0 {
			break
		}
		sum = crc32.Update(sum, crcTable(), buf[:n])
		chunk := snapshotChunk{id: transfer, offset: off, data: buf[:n]}
		if _, err := t.verdict(id, to, transport.KindSnapshotChunk, chunk.encode(), chunkTimeout); err != nil {
			return verdict{}, err
		}
		off += int64(n)
	}
	// The peer restores before it answers, and that may take long.
	return t.verdict(id, to, transport.KindSnapshotEnd, snapshotEnd{id: transfer, sum: sum}.encode(), 0)
}

func (t *peerTransport) verdict(id raft.ServerID, to raft.ServerAddress, kind transport.Kind, body []byte,
	timeout time.Duration,
) (verdict, error) {
	b, err := t.call(id, to, kind, body, timeout)
	if err != nil {
		return verdict{}, err
	}
	return decodeVerdict(b)
}
