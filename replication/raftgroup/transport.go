package raftgroup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/transport"
)

// How a leader waits for a follower that pulls the state: it asks after 200 ms, 400 ms and so on, and gives
// up on one that says nothing of use for some heartbeats.
const (
	fetchEvery    = 200 * time.Millisecond
	fetchEveryMax = time.Second
	fetchSilent   = 5

	// toldFor is for how many Heartbeats a follower that answers is not told again of a commit index that it knows. One
	// that was started anew, and has forgotten it, is known by its clock readings (leaseTable.setStamp).
	toldFor = 120
)

// peerTransport is the library's Transport for one run of it. What it sends dies with ctx.
type peerTransport struct {
	g         *Group
	ctx       context.Context // the lifetime of one instance
	rpc       chan raft.RPC
	heartbeat func(raft.RPC) // the library's fast path
	proofTerm atomic.Uint64  // in which this replica stands because the leader's process is gone
	resigned  atomic.Uint64  // in which this replica leads and has to give up (pace.go)
	rests     resting        // calls that have nothing to tell
	silence   silence        // followers that do not answer
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
	replica, node, err := t.addressee(id, to)
	if err != nil {
		return nil, err
	}
	ctx := t.ctx
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	reply, err := t.g.cfg.Network.net.Call(ctx, node, transport.Message{
		Kind: kind, Group: t.g.cfg.Group, From: t.g.cfg.Replica, To: replica, Body: body,
	})
	return reply.Body, err
}

// addressee checks that this replica may send, and takes an address apart.
func (t *peerTransport) addressee(id raft.ServerID, to raft.ServerAddress) (trivet.ReplicaID, trivet.NodeID, error) {
	if t.g.guard.failed() != nil {
		return "", "", fmt.Errorf("replica failed: %w", trivet.ErrUnavailable)
	}
	replica, node, err := parseAddress(to)
	if err == nil && string(replica) != string(id) {
		err = fmt.Errorf("server %q has address %q: %w", string(id), string(to), trivet.ErrInvalid)
	}
	return replica, node, err
}

// mute returns an error while this replica must not keep itself in office. A leader whose disk hangs must not be
// kept there by other goroutines of the library. Not by heartbeats alone: an empty AppendEntries, sent every
// CommitTimeout, does as well (D8).
func (t *peerTransport) mute() error {
	if t.g.guard.stalled() {
		return fmt.Errorf("append to replica of %s: disk hangs: %w", t.g.cfg.Group, trivet.ErrUnavailable)
	}
	return nil
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
	if t.resigned.Load() == req.Term {
		deny(id, req, resp)
		return nil
	}
	if err := t.mute(); err != nil {
		return err
	}
	timeout := 10 * t.g.cfg.Timing.Heartbeat
	if isHeartbeat(req) {
		timeout = t.g.cfg.Timing.Heartbeat
	}
	bound(req)
	// Gate 3 (durable.go). The library makes the figure anew for each request.
	req.LeaderCommitIndex = min(req.LeaderCommitIndex, t.g.store.durable.index())
	if t.spare(trivet.ReplicaID(id), req, resp) {
		spared := t.rest(trivet.ReplicaID(id), req, resp)
		if t.resigned.Load() == req.Term {
			deny(id, req, resp)
			return nil
		}
		if spared {
			return nil
		}
	}
	b, sent, err := t.send(id, to, req, timeout)
	if err != nil {
		return err
	}
	r, err := decodeAppendReply(b)
	if err != nil {
		return err
	}
	t.g.lease.setStamp(trivet.ReplicaID(id), r.stamp)
	if r.success && r.term == req.Term {
		t.g.lease.acked(req.Term, trivet.ReplicaID(id), sent, r.promise, 0) // kept whatever our disk does
		if err := t.matched(trivet.ReplicaID(id), req, sent); err != nil {
			return err
		}
	}
	*resp = raft.AppendEntriesResponse{
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(id), Addr: []byte(to)},
		Term:      r.term, LastLog: r.lastLog, Success: r.success, NoRetryBackoff: r.noRetryBackoff,
	}
	return nil
}

// send sends a request, and notes which followers can be reached.
func (t *peerTransport) send(id raft.ServerID, to raft.ServerAddress, req *raft.AppendEntriesRequest,
	timeout time.Duration,
) ([]byte, instant, error) {
	b, sent, err := t.sendAppend(id, to, req, timeout)
	replica := trivet.ReplicaID(id)
	if isHeartbeat(req) { // of the library's own, which asks whether it still leads
		return b, sent, err
	}
	if err != nil && unreachable(err) && t.silence.failed(replica) > silentAfter {
		b, sent, err = t.outwait(id, to, req, timeout)
	}
	if err == nil {
		t.silence.answered(replica)
	}
	return b, sent, err
}

// matched is told that a follower has everything up to the end of a request. It is gate 2 (durable.go): the answer
// counts once this leader has as much on its own disk, because the library counts the leader without asking.
func (t *peerTransport) matched(id trivet.ReplicaID, req *raft.AppendEntriesRequest, sent instant) error {
	if isHeartbeat(req) {
		return nil
	}
	match := req.PrevLogEntry + uint64(len(req.Entries))
	if err := t.g.store.durable.wait(t.ctx, match); err != nil {
		return err
	}
	t.g.lease.acked(req.Term, id, instant{}, 0, match)
	t.g.lease.tell(req.Term, id, told{match, req.LeaderCommitIndex, sent})
	return nil
}

// sendBuffers are *[]byte for requests with entries: a follower gets the same bytes in a message of its own, and
// fresh memory costs more than copying into old.
var sendBuffers sync.Pool

// sendAppend sends a request and returns the body of the reply, and a moment before it was sent: the lease counts from
// there. The request is copied before Call returns.
func (t *peerTransport) sendAppend(id raft.ServerID, to raft.ServerAddress, req *raft.AppendEntriesRequest,
	timeout time.Duration,
) ([]byte, instant, error) {
	if len(req.Entries) == 0 {
		body, err := encodeAppend(req)
		if err != nil {
			return nil, instant{}, err
		}
		sent := t.g.now()
		reply, err := t.call(id, to, transport.KindAppendEntries, body, timeout)
		return reply, sent, err
	}
	size := appendBytes(req)
	buf, ok := sendBuffers.Get().(*[]byte)
	if !ok || cap(*buf) < size {
		b := make([]byte, 0, size)
		buf = &b
	}
	defer sendBuffers.Put(buf)
	body, err := appendAppend((*buf)[:0], req)
	if err != nil {
		return nil, instant{}, err
	}
	defer t.g.sends.Begin().End()
	sent := t.g.now()
	reply, err := t.call(id, to, transport.KindAppendEntries, body, timeout)
	return reply, sent, err
}

// spare answers here, without sending it, an AppendEntries that would tell its follower nothing: no entries, after an
// entry that the follower is known to have in this term, and a commit index that it was told; a replica that was
// started anew has forgotten it, and is told again. The library sends one every
// CommitTimeout to each follower of each idle group, and the follower takes it on its main goroutine. Only while
// heartbeats are answered. It then rests (rest.go).
func (t *peerTransport) spare(id trivet.ReplicaID, req *raft.AppendEntriesRequest,
	resp *raft.AppendEntriesResponse,
) bool {
	if len(req.Entries) > 0 || isHeartbeat(req) {
		return false
	}
	if !t.informed(id, req.Term, told{match: req.PrevLogEntry, commit: req.LeaderCommitIndex}) {
		return false
	}
	*resp = raft.AppendEntriesResponse{
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(id)},
		Term:      req.Term, LastLog: req.PrevLogEntry, Success: true,
	}
	return true
}

// informed reports whether a follower answers heartbeats and was told just that a short while ago.
func (t *peerTransport) informed(id trivet.ReplicaID, term uint64, what told) bool {
	beat := t.g.cfg.Timing.Heartbeat
	what.sent = t.g.now()
	return t.g.lease.answered(term, id, beat, what.sent) && t.g.lease.knows(term, id, what, toldFor*beat)
}

// deny answers what makes the library's leader step down: no to a heartbeat that it was asked to confirm its
// leadership with, a newer term to anything else. Its term stays what it is.
func deny(id raft.ServerID, req *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) {
	*resp = raft.AppendEntriesResponse{
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(id)}, Term: req.Term + 1,
	}
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

// InstallSnapshot tells a follower to pull the state (catchup.go), and holds the call until it has. To
// refuse would not do: only a success moves the index that the library sends next (replication.go:370), and
// from where that stands now it can send nothing, because its log begins later (replication.go:223). The
// follower would be stuck until the next term, wherever it got to by other means.
//
// The library then takes the follower to be where the meta of the snapshot says (replication.go:370, 371),
// and at this moment that becomes where the follower really is, provided that this leader has the same entry there.
func (t *peerTransport) InstallSnapshot(id raft.ServerID, to raft.ServerAddress, req *raft.InstallSnapshotRequest,
	resp *raft.InstallSnapshotResponse, data io.Reader,
) error {
	offer, ok := data.(*stateOffer)
	if !ok {
		return fmt.Errorf("snapshot is a %T: %w", data, trivet.ErrInvalid)
	}
	body := fetchAsk{term: req.Term, rec: offer.rec}.encode()
	every := fetchEvery
	for heard := time.Now(); ; every = min(2*every, fetchEveryMax) {
		r, err := t.askFetch(id, to, body)
		switch {
		case err == nil && r.term > req.Term:
			resp.Term = r.term
			return nil
		case err == nil && r.done:
			same, err := t.matches(req.Term, r.at)
			switch {
			case errors.Is(err, trivet.ErrNotFound): // our log was cut beyond it: another round, from here
				body = fetchAsk{term: req.Term, rec: t.g.snaps.record()}.encode()
			case err != nil:
				return fmt.Errorf("%s has pulled the state: %w", to, err)
			case same:
				offer.meta.Index, offer.meta.Term = r.at.index, r.at.term
				req.LastLogIndex, req.LastLogTerm = r.at.index, r.at.term
				resp.Term, resp.Success = req.Term, true
				t.g.lease.acked(req.Term, trivet.ReplicaID(id), instant{}, 0, r.at.index)
				return nil
			}
		case err == nil:
			heard = time.Now()
		case !errors.Is(err, trivet.ErrUnavailable) && !errors.Is(err, context.DeadlineExceeded):
			return err
		}
		if silent := time.Since(heard); silent > fetchSilent*t.g.cfg.Timing.Heartbeat {
			return fmt.Errorf("%s pulls the state, no use of it for %v: %w", to, silent, errors.Join(err, trivet.ErrUnavailable))
		}
		if err := t.await(req.Term, id, every, nil); err != nil {
			return err
		}
	}
}

func (t *peerTransport) askFetch(id raft.ServerID, to raft.ServerAddress, body []byte) (fetchReply, error) {
	b, err := t.call(id, to, transport.KindFetch, body, t.g.cfg.Timing.Heartbeat)
	if err != nil {
		return fetchReply{}, err
	}
	return decodeFetchReply(b)
}

// await waits, for d or until woken is closed, and returns an error when there is nothing to wait for any more. A call
// of the library is not told when its leader steps down.
func (t *peerTransport) await(term uint64, id raft.ServerID, d time.Duration, woken <-chan struct{}) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-woken:
	case <-t.ctx.Done():
		return context.Cause(t.ctx)
	}
	i := t.g.running()
	if i == nil || i.t != t || i.r.State() != raft.Leader || i.r.CurrentTerm() != term || t.resigned.Load() == term {
		return fmt.Errorf("replica leads no more in term %d: %w", term, trivet.ErrNotLeader)
	}
	if _, ok := findMember(t.g.store.latestConfig().members, trivet.ReplicaID(id)); !ok {
		return fmt.Errorf("replica %s is no member any more: %w", string(id), trivet.ErrNotFound)
	}
	return nil
}

// matches reports whether this leader's log has, durably, the entry at which a follower is. Then both have the same up
// to there (log matching: Ongaro's thesis, 3.5), and it is no matter whether the leader knows it as committed: one that
// has started again, and needs that follower for its quorum, will not know before it counts it. ErrNotFound: its log
// does not reach back so far.
func (t *peerTransport) matches(term uint64, at logPosition) (bool, error) {
	i := t.g.running()
	if i == nil || i.t != t || i.r.CurrentTerm() != term {
		return false, fmt.Errorf("replica leads no more in term %d: %w", term, trivet.ErrNotLeader)
	}
	have, ok := t.g.seglog.term(at.index)
	if rec := t.g.snaps.record(); !ok && rec.index == at.index {
		have, ok = rec.term, true
	}
	if at.index > i.r.CommitIndex() {
		return ok && have == at.term && at.index <= t.g.store.durable.index(), nil // gate 2 (durable.go)
	}
	switch {
	case !ok:
		return false, fmt.Errorf("entry %d is gone from the log: %w", at.index, trivet.ErrNotFound)
	case have != at.term:
		return false, fmt.Errorf("entry %d has term %d there and %d here: %w", at.index, at.term, have, trivet.ErrCorrupt)
	}
	return true, nil
}
