package raftgroup

import (
	"context"
	"fmt"
	"time"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/transport"
)

// receive answers one Raft message. from is the node in the sender's certificate.
func (g *Group) receive(ctx context.Context, from trivet.NodeID, m transport.Message) ([]byte, error) {
	if err := g.authorise(m.Kind, m.From, from); err != nil {
		g.log.Warn("raft message refused", "from", string(from), "replica", string(m.From), "kind", int(m.Kind), "err", err)
		return nil, err
	}
	if g.guard.failed() != nil {
		return nil, fmt.Errorf("replica failed: %w", trivet.ErrUnavailable)
	}
	body, err := g.dispatch(ctx, address(m.From, from), m)
	if g.guard.failed() != nil { // meanwhile: what the library answers may rest on nothing
		return nil, fmt.Errorf("replica failed: %w", trivet.ErrUnavailable)
	}
	return body, err
}

func (g *Group) dispatch(ctx context.Context, sender raft.ServerAddress, m transport.Message) ([]byte, error) {
	switch m.Kind {
	case transport.KindFetch:
		return g.onFetch(sender, m.Body)
	case transport.KindImageOpen, transport.KindImageRead, transport.KindImageClose:
		return g.onImage(ctx, m.Kind, sender, m.Body)
	case transport.KindLogEntry:
		return g.onEntry(m.Body)
	}
	i := g.running()
	if i == nil {
		return g.receiveStopped(sender, m)
	}
	header := raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(m.From), Addr: []byte(sender)}
	switch m.Kind {
	case transport.KindAppendEntries:
		return i.onAppend(ctx, header, m.Body)
	case transport.KindRequestVote, transport.KindRequestPreVote:
		return i.onVote(ctx, header, m.Kind == transport.KindRequestPreVote, m.Body)
	case transport.KindTimeoutNow:
		return i.onTimeoutNow(ctx, header, m.Body)
	case transport.KindStanding:
		return i.onStanding(m.Body)
	case transport.KindTransfer:
		return i.onTransfer(header, m.Body)
	}
	return nil, fmt.Errorf("kind %d: %w", m.Kind, trivet.ErrInvalid)
}

// authorise returns ErrInvalid unless the sender may send such a message (H37). The library takes
// entries, snapshots and TimeoutNow of any sender with a high enough term, so this is the only
// thing between a group and any other holder of a valid certificate.
//
//   - A replica in the group's configuration must be on the node that the configuration says.
//   - Another one may send entries and the call to fetch the state only, to a replica that waits to be
//     added or lags behind, or pull an image, and only if the catalogue, where it is asked, knows it as a
//     member on that node. So known, it may also stand for election, before a replica that has no leader: this one
//     may have missed that the other was added, and its vote may be the one that is wanting (Ongaro's thesis, 4.1:
//     servers vote for candidates outside of their configuration). The log decides, as always.
//
// Nothing in a message says who its leader or candidate is: that is made from the sender.
func (g *Group) authorise(kind transport.Kind, id trivet.ReplicaID, node trivet.NodeID) error {
	if _, _, err := parseAddress(address(id, node)); err != nil {
		return err
	}
	members := g.store.latestConfig().members
	if m, ok := findMember(members, id); ok {
		if m.Node != node {
			return fmt.Errorf("replica %s is on node %s, message comes from %s: %w", id, m.Node, node, trivet.ErrInvalid)
		}
		return nil
	}
	known := g.cfg.IsMember != nil && g.cfg.IsMember(id, node)
	switch kind {
	case transport.KindRequestVote, transport.KindRequestPreVote, transport.KindStanding:
		i := g.running()
		known = known && len(members) > 0 && i != nil && i.leaderless()
	case transport.KindTimeoutNow, transport.KindTransfer:
		known = false
	default:
		known = known || g.cfg.IsMember == nil && len(members) == 0
	}
	if known {
		return nil
	}
	return fmt.Errorf("replica %s on %s is no member: %w", id, node, trivet.ErrInvalid)
}

// deliver hands a request to the library's main goroutine and waits for its answer.
func (i *instance) deliver(ctx context.Context, command any) (any, error) {
	resp := make(chan raft.RPCResponse, 1)
	select {
	case i.t.rpc <- raft.RPC{Command: command, RespChan: resp}:
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", context.Cause(ctx), trivet.ErrUnavailable)
	case <-i.stopping:
		return nil, fmt.Errorf("group stops: %w", trivet.ErrUnavailable)
	}
	select {
	case r := <-resp:
		return r.Response, r.Error
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", context.Cause(ctx), trivet.ErrUnavailable)
	case <-i.stopping:
		return nil, fmt.Errorf("group stops: %w", trivet.ErrUnavailable)
	}
}

func (i *instance) onAppend(ctx context.Context, header raft.RPCHeader, body []byte) ([]byte, error) {
	req, err := decodeAppend(body)
	if err != nil {
		return nil, err
	}
	req.RPCHeader, req.Leader = header, header.Addr //nolint:staticcheck // the library still reads Leader
	var out any
	answered := false
	if isHeartbeat(req) {
		if i.g.guard.stalled() {
			return nil, fmt.Errorf("disk hangs: %w", trivet.ErrUnavailable) // D8
		}
		out, answered = i.fastHeartbeat(req)
	}
	if !answered {
		if out, err = i.deliver(ctx, i.understood(req)); err != nil {
			return nil, err
		}
	}
	if resp, ok := out.(*raft.AppendEntriesResponse); ok && resp.Success && !isHeartbeat(req) {
		// Gate 1 (durable.go). Also for a copy of a request, which stored nothing, and for one without entries: the
		// leader takes either for proof that this log reaches so far.
		if err := i.awaitDurable(ctx, req.PrevLogEntry+uint64(len(req.Entries))); err != nil {
			return nil, err
		}
	}
	return i.appendReply(out)
}

// understood returns an AppendEntries as the library takes it rightly.
//
// It asks its log for the entry before the new ones, and knows that of a snapshot only when that is its very last one
// (raft.go:1491 of v1.8.0). But the log of a replica that has pulled its state begins behind the snapshot
// (install.go), and when everything in it conflicts with the leader's, no request would ever be taken: the leader
// walks back to the start of its log, offers the snapshot, hears that it is there, goes on behind it, and is refused,
// round and round without a pause. What a snapshot covers is committed, so its last entry matches, and the check can
// be left out.
//
// And it commits up to its own last entry (raft.go:1581), where a leader vouches only for the last one that it has sent
// (Ongaro and Ousterhout, Raft, figure 2, AppendEntries 5): what stands behind that may conflict.
func (i *instance) understood(req *raft.AppendEntriesRequest) *raft.AppendEntriesRequest {
	out := *req
	out.LeaderCommitIndex = min(req.LeaderCommitIndex, req.PrevLogEntry+uint64(len(req.Entries)))
	if rec := i.g.snaps.record(); req.PrevLogEntry == rec.index && req.PrevLogTerm == rec.term {
		if first, last := i.g.seglog.bounds(); first == rec.index+1 && last >= first {
			out.PrevLogEntry, out.PrevLogTerm = 0, 0
		}
	}
	return &out
}

// appendReply encodes the library's answer to an AppendEntries.
func (i *instance) appendReply(out any) ([]byte, error) {
	resp, ok := out.(*raft.AppendEntriesResponse)
	if !ok {
		return nil, fmt.Errorf("answer is a %T: %w", out, trivet.ErrUnavailable)
	}
	reply := appendReply{
		term: resp.Term, lastLog: resp.LastLog, stamp: i.stamp(),
		success: resp.Success, noRetryBackoff: resp.NoRetryBackoff,
	}
	if resp.Success {
		reply.promise = i.g.cfg.Timing.Heartbeat
	}
	return reply.encode(), nil
}

// awaitDurable waits for the log of this replica. The wait ends with this run of the library: its answer must not
// leave once another may have a different log.
func (i *instance) awaitDurable(ctx context.Context, index uint64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(i.t.ctx, cancel)
	defer stop()
	if err := i.g.store.durable.wait(ctx, index); err != nil {
		return fmt.Errorf("%w: %w", err, trivet.ErrUnavailable)
	}
	return nil
}

// quickBeat answers a heartbeat that the fast path takes, without waiting for anything. Whatever else it may be, or be
// wrong with, false: then it goes the common way, which says so.
func (g *Group) quickBeat(from trivet.NodeID, b beat) ([]byte, bool) {
	i := g.running()
	m, member := findMember(g.store.latestConfig().members, b.from) // not authorise, which may ask and wait
	if i == nil || !member || m.Node != from || len(b.body) != emptyAppendBytes || g.guard.stalled() ||
		g.guard.failed() != nil {
		return nil, false
	}
	req, err := decodeAppend(b.body)
	if err != nil || !isHeartbeat(req) {
		return nil, false
	}
	req.RPCHeader = i.beatHeader(b.from, from)
	req.Leader = req.RPCHeader.Addr //nolint:staticcheck // the library still reads it
	out, answered := i.fastHeartbeat(req)
	if !answered || g.guard.failed() != nil {
		return nil, false
	}
	body, err := i.appendReply(out)
	return body, err == nil
}

// beatHeader returns the header of a heartbeat, the same one for each of a leader: the library does not change it.
func (i *instance) beatHeader(id trivet.ReplicaID, node trivet.NodeID) raft.RPCHeader {
	if h := i.beater.Load(); h != nil && h.id == id && h.node == node {
		return h.header
	}
	h := &beater{id: id, node: node, header: raft.RPCHeader{
		ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(id), Addr: []byte(address(id, node)),
	}}
	i.beater.Store(h)
	return h.header
}

// beater is who sent the last heartbeat.
type beater struct {
	id     trivet.ReplicaID
	node   trivet.NodeID
	header raft.RPCHeader
}

// fastHeartbeat answers a heartbeat beside the library's main goroutine, which may be busy with the
// disk. That goroutine stamps entries with the current term, so the handler must not change term or
// state under it: one that does let a deposed leader append under its successor's term (D9). Hence
// only a follower, in the heartbeat's own term, which cannot stand for election before the handler is done: the library
// has no timer that would make it (pace.go), and TimeoutNow closes this path first. All else goes to the main
// goroutine, a follower without a fresh contact too: what it hears may be all that is left of an old leader.
func (i *instance) fastHeartbeat(req *raft.AppendEntriesRequest) (any, bool) {
	i.fast.RLock()
	defer i.fast.RUnlock()
	if req.Term != i.r.CurrentTerm() || i.r.State() != raft.Follower ||
		time.Since(i.r.LastContact()) >= i.g.cfg.Timing.Heartbeat/2 || time.Now().Before(i.fastClosed) {
		return nil, false
	}
	resp := make(chan raft.RPCResponse, 1)
	i.t.heartbeat(raft.RPC{Command: req, RespChan: resp})
	select {
	case r := <-resp:
		return r.Response, r.Error == nil
	default: // the library shuts down
		return nil, false
	}
}

func (i *instance) onVote(ctx context.Context, header raft.RPCHeader, pre bool, body []byte) ([]byte, error) {
	v, err := decodeVote(body)
	if err != nil {
		return nil, err
	}
	// Before a restart this replica may have promised its leader not to help another one (H8).
	if time.Now().Before(i.quarantine) {
		return verdict{term: i.r.CurrentTerm()}.encode(), nil
	}
	from := trivet.ReplicaID(header.ID)
	if m, ok := findMember(i.g.store.latestConfig().members, from); !ok || m.Learner {
		// It has become a voter since, or it would not stand, and authorise has let it pass. With an ID the library
		// would look for it in the configuration that it has here (raft.go:1658).
		header.ID = nil
	}
	if pre {
		out, err := i.deliver(ctx, &raft.RequestPreVoteRequest{
			RPCHeader: header, Term: v.term, LastLogIndex: v.lastIndex, LastLogTerm: v.lastTerm,
		})
		if err != nil {
			return nil, err
		}
		if r, ok := out.(*raft.RequestPreVoteResponse); ok {
			return verdict{term: r.Term, yes: r.Granted}.encode(), nil
		}
		return nil, fmt.Errorf("answer is a %T: %w", out, trivet.ErrUnavailable)
	}
	out, err := i.deliver(ctx, &raft.RequestVoteRequest{
		Candidate: header.Addr, //nolint:staticcheck // the library still reads it
		RPCHeader: header, Term: v.term, LastLogIndex: v.lastIndex, LastLogTerm: v.lastTerm,
		LeadershipTransfer: i.privileged(v, from),
	})
	if err != nil {
		return nil, err
	}
	if r, ok := out.(*raft.RequestVoteResponse); ok {
		return verdict{term: r.Term, yes: r.Granted}.encode(), nil
	}
	return nil, fmt.Errorf("answer is a %T: %w", out, trivet.ErrUnavailable)
}

// onTimeoutNow makes this replica stand for election at once, for its own leader only, and only
// while our clock reading in the message is fresh: the leader counts on its being without effect
// some time after (transferVoid).
func (i *instance) onTimeoutNow(ctx context.Context, header raft.RPCHeader, body []byte) ([]byte, error) {
	req, err := decodeTimeoutNow(body)
	if err != nil {
		return nil, err
	}
	_, leader := i.r.LeaderWithID()
	me, _ := findMember(i.g.store.latestConfig().members, i.g.cfg.Replica)
	age := time.Duration(i.stamp() - req.stamp)
	if string(leader) != string(header.ID) || req.term != i.r.CurrentTerm() || i.r.State() != raft.Follower ||
		me.Replica == "" || me.Learner || age < 0 || age >= i.g.cfg.Timing.Heartbeat {
		return nil, fmt.Errorf("leader %s of term %d asks for an election, own leader is %q of term %d, %v ago: %w",
			header.ID, req.term, string(leader), i.r.CurrentTerm(), age, trivet.ErrInvalid)
	}
	i.fast.Lock()
	i.fastClosed = time.Now().Add(i.g.cfg.Timing.Heartbeat)
	i.fast.Unlock()
	if _, err := i.deliver(ctx, &raft.TimeoutNowRequest{RPCHeader: header}); err != nil {
		return nil, err
	}
	return verdict{term: req.term, yes: true}.encode(), nil
}

// stamp is this replica's clock, from an origin that no other run of the library shares.
func (i *instance) stamp() uint64 { return i.stampBase + uint64(time.Since(i.g.started)) }
