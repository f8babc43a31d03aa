package replication

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// A learner gets its vote only after all of its blocks and state were found equal to the leader's at one index of the
// log (I14, H21; docs/decisions/0027). The leader has the learner await a mark, awaits it itself, puts it into the
// log, and compares the two digests once they are taken. Reads, writes and the log go on meanwhile.

const (
	// verifyWait is how long Promote waits for a comparison before it answers ErrPending: enough for a small volume
	// whose learner hears of the mark by the next heartbeat.
	verifyWait = 2 * time.Second

	verifyPollMin = 50 * time.Millisecond
	verifyPollMax = time.Second
	verifyTries   = 10 // questions in a row without an answer
)

// verification is the comparison of a learner with its leader.
type verification struct {
	learner raftgroup.Member
	term    uint64 // of the leader
	cancel  context.CancelFunc
	done    chan struct{} // closed once err is set
	err     error         // nil: equal; ErrCorrupt: different, which stays so; others: nothing is known
}

// verifications of one replica; the zero value, with life set, is ready.
type verifications struct {
	life context.Context //nolint:containedctx // that of the replica, which ends what is done in the background

	mu     sync.Mutex
	closed bool
	last   *verification // there is one change of members at a time
}

// close lets no more of them begin.
func (vs *verifications) close() {
	vs.mu.Lock()
	defer vs.mu.Unlock()
	vs.closed = true
}

// verify returns nil once a learner was found equal to this leader in the leader's current term, and ErrPending while
// that is not known. ErrCorrupt: it differs, and must be made anew.
func (r *Replica) verify(ctx context.Context, m raftgroup.Member, term uint64) error {
	v, err := r.verification(m, term)
	if err != nil {
		return err
	}
	wait := time.NewTimer(verifyWait)
	defer wait.Stop()
	select {
	case <-v.done:
	case <-wait.C:
		return fmt.Errorf("its blocks are being compared with the leader's: %w", trivet.ErrPending)
	case <-ctx.Done():
		return ctx.Err()
	}
	if v.err != nil && !errors.Is(v.err, trivet.ErrCorrupt) {
		r.verifying.forget(v)
		return fmt.Errorf("its blocks were not compared: %v: %w", v.err, trivet.ErrPending)
	}
	return v.err
}

// verification returns that of a learner in this term, which it begins if there is none.
func (r *Replica) verification(m raftgroup.Member, term uint64) (*verification, error) {
	vs := &r.verifying
	vs.mu.Lock()
	defer vs.mu.Unlock()
	if vs.closed {
		return nil, fmt.Errorf("replica %s: %w", r.spec.Replica, trivet.ErrClosed)
	}
	if v := vs.last; v != nil {
		if v.learner.Replica == m.Replica && v.term == term {
			return v, nil
		}
		v.cancel()
	}
	ctx, cancel := context.WithCancel(vs.life)
	v := &verification{learner: m, term: term, cancel: cancel, done: make(chan struct{})}
	vs.last = v
	r.watch.Go(func() {
		defer close(v.done)
		defer cancel()
		began := time.Now()
		index, err := r.compare(ctx, v)
		log := r.log.With("learner", string(m.Replica), "node", string(m.Node), "index", index, "took", time.Since(began))
		switch {
		case err == nil:
			log.Info("a learner has the same blocks as its leader")
		case errors.Is(err, trivet.ErrCorrupt):
			log.Error("a learner differs from its leader and gets no vote", "err", err)
		default:
			log.Debug("a learner was not compared with its leader", "err", err)
		}
		v.err = err
	})
	return v, nil
}

// forget makes room for another attempt.
func (vs *verifications) forget(v *verification) {
	vs.mu.Lock()
	defer vs.mu.Unlock()
	if vs.last == v {
		vs.last = nil
	}
}

// compare puts a mark into the log and compares both digests at it. ErrCorrupt only when the learner is to blame, as
// far as that can be known: a block of its own that it cannot read, or another digest than this leader's, all of whose
// blocks have the checksums that they were written with.
func (r *Replica) compare(ctx context.Context, v *verification) (index uint64, err error) {
	name := 1 + rand.Uint64N(1<<63)
	own := r.machine.marks
	if err := own.await(name); err != nil {
		return 0, err
	}
	defer own.drop(name)
	defer r.endMark(v, name)
	if _, err := r.askMark(ctx, v, markAsk{verb: markAwait, name: name}); err != nil {
		return 0, err
	}
	if err := r.command(ctx, &request{op: opMark, arg: name}); err != nil {
		return 0, fmt.Errorf("mark %s: %w", r.spec.Volume, err)
	}
	failed, poll := 0, time.NewTimer(0)
	defer poll.Stop()
	for wait := verifyPollMin; ; wait = min(2*wait, verifyPollMax) {
		select {
		case <-poll.C:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
		if st := r.group.Status(); !st.IsLeader || st.Term != v.term {
			return 0, trivet.ErrNotLeader
		}
		mine := own.ask(name, r.machine.view.Load().AppliedIndex, 0)
		theirs, err := r.askMark(ctx, v, markAsk{verb: markTell, name: name, hashed: mine.hashed})
		if failed++; err == nil {
			failed = 0
			if done, err := judge(mine, theirs); done {
				return mine.index, err
			}
		} else if failed == verifyTries {
			return 0, err
		}
		poll.Reset(wait)
	}
}

// judge compares what the leader and a learner say of a mark; done is false while it is too early to tell.
func judge(mine, theirs markReport) (done bool, err error) {
	switch {
	case mine.state == markDamaged: // which its agent hears from the engine
		return true, fmt.Errorf("the leader's own blocks cannot be read: %s: %w", mine.reason, trivet.ErrUnavailable)
	case mine.state == markUnknown:
		return true, fmt.Errorf("the leader's own digest was not taken: %w", trivet.ErrUnavailable)
	case theirs.state == markDamaged:
		return true, fmt.Errorf("learner cannot read its blocks: %s: %w",
			strings.ToValidUTF8(theirs.reason, "?"), trivet.ErrCorrupt)
	case theirs.state == markUnknown:
		return true, fmt.Errorf("learner was restarted: %w", trivet.ErrUnavailable)
	case theirs.state == markAwaited && mine.index > 0 && theirs.applied >= mine.index:
		return true, fmt.Errorf("learner is at index %d and did not see the mark at %d: %w", theirs.applied, mine.index,
			trivet.ErrUnavailable)
	case mine.state != markTaken || theirs.state != markTaken:
		return false, nil
	case mine.index != theirs.index || mine.digest != theirs.digest:
		return true, fmt.Errorf("learner has digest %x at index %d, the leader %x at %d: %w", theirs.digest[:8], theirs.index,
			mine.digest[:8], mine.index, trivet.ErrCorrupt)
	}
	return true, nil
}

// endMark lets the learner forget a mark; it would by itself, after markIdle.
func (r *Replica) endMark(v *verification, name uint64) {
	ctx, cancel := context.WithTimeout(r.verifying.life, verifyPollMax)
	defer cancel()
	if _, err := r.askMark(ctx, v, markAsk{verb: markDrop, name: name}); err != nil {
		r.log.Debug("learner was not told that a comparison is over", "learner", string(v.learner.Replica), "err", err)
	}
}

// markVerb is what a KindVolumeMark asks for.
type markVerb uint8

const (
	markAwait markVerb = 1 // await the mark
	markTell  markVerb = 2 // tell how far it is
	markDrop  markVerb = 3 // forget it
)

// markAsk is the body of a KindVolumeMark; the volume is the message's Group, the replica its To. Big endian.
//
//	request                                 reply
//	0         1      2      8      16       0         1       2      8         16      24       32       64
//	+---------+------+------+------+--------+---------+-------+------+---------+-------+--------+--------+--------+
//	| version | verb | zero | name | hashed | version | state | zero | applied | index | hashed | digest | reason |
//	+---------+------+------+------+--------+---------+-------+------+---------+-------+--------+--------+--------+
//
// hashed of the request are bytes that the replica which asks is done with.
type markAsk struct {
	verb   markVerb
	name   uint64
	hashed uint64
}

const (
	markAskBytes       = 24
	markReportBytes    = 64     // without the reason
	markReasonBytesMax = 1 << 9 // what the catalogue takes, with room for what is added
)

func (a markAsk) encode() []byte {
	b := []byte{wireVersion, byte(a.verb), 0, 0, 0, 0, 0, 0}
	b = binary.BigEndian.AppendUint64(b, a.name)
	return binary.BigEndian.AppendUint64(b, a.hashed)
}

// decodeMarkAsk is the inverse of encode; ErrInvalid for anything else.
func decodeMarkAsk(b []byte) (markAsk, error) {
	if len(b) != markAskBytes || b[0] != wireVersion || b[1] < byte(markAwait) || b[1] > byte(markDrop) ||
		[6]byte(b[2:8]) != [6]byte{} {
		return markAsk{}, fmt.Errorf("mark request of %d bytes: want version %d: %w", len(b), wireVersion, trivet.ErrInvalid)
	}
	a := markAsk{
		verb: markVerb(b[1]), name: binary.BigEndian.Uint64(b[8:]), hashed: binary.BigEndian.Uint64(b[16:]),
	}
	if a.name == 0 {
		return markAsk{}, fmt.Errorf("mark request without a name: %w", trivet.ErrInvalid)
	}
	return a, nil
}

func (m *markReport) encode() []byte {
	b := []byte{wireVersion, byte(m.state), 0, 0, 0, 0, 0, 0}
	for _, n := range []uint64{m.applied, m.index, m.hashed} {
		b = binary.BigEndian.AppendUint64(b, n)
	}
	b = append(b, m.digest[:]...)
	return append(b, m.reason[:min(len(m.reason), markReasonBytesMax)]...)
}

// decodeMarkReport is the inverse of encode. What is none tells nothing of the volume: ErrUnavailable.
func decodeMarkReport(b []byte) (markReport, error) {
	if len(b) < markReportBytes || len(b) > markReportBytes+markReasonBytesMax || b[0] != wireVersion ||
		b[1] > byte(markDamaged) || [6]byte(b[2:8]) != [6]byte{} {
		return markReport{}, fmt.Errorf("mark report of %d bytes: want version %d: %w", len(b), wireVersion,
			trivet.ErrUnavailable)
	}
	num := func(i int) uint64 { return binary.BigEndian.Uint64(b[8+8*i:]) }
	return markReport{
		state: markState(b[1]), applied: num(0), index: num(1), hashed: num(2), digest: [32]byte(b[32:64]),
		reason: string(b[markReportBytes:]),
	}, nil
}

// askMark asks a learner about a mark.
func (r *Replica) askMark(ctx context.Context, v *verification, a markAsk) (markReport, error) {
	ctx, cancel := context.WithTimeout(ctx, verifyPollMax)
	defer cancel()
	reply, err := r.network.Call(ctx, v.learner.Node, transport.Message{
		Kind: transport.KindVolumeMark, Group: r.spec.Volume, From: r.spec.Replica, To: v.learner.Replica, Body: a.encode(),
	})
	if err != nil {
		return markReport{}, fmt.Errorf("ask %s on %s about a mark of %s: %v: %w", v.learner.Replica, v.learner.Node,
			r.spec.Volume, err, trivet.ErrUnavailable)
	}
	return decodeMarkReport(reply.Body)
}

// handleMark answers KindVolumeMark, to nodes with a replica in the volume's group: a digest costs as much as reading
// the whole volume.
func (h *Host) handleMark(_ context.Context, from trivet.NodeID, m transport.Message) (transport.Message, error) {
	a, err := decodeMarkAsk(m.Body)
	if err != nil {
		return transport.Message{}, err
	}
	r, ok := h.Replica(m.Group)
	if !ok || r.spec.Replica != m.To {
		return transport.Message{}, fmt.Errorf("replica %s of %s does not run on %s: %w", m.To, m.Group,
			h.cfg.Network.Local(), trivet.ErrNotFound)
	}
	if asks, ok := r.Status().Member(m.From); !ok || asks.Node != from || asks.Learner {
		return transport.Message{}, fmt.Errorf("replica %s on %s has no vote in %s: %w", m.From, from, m.Group,
			trivet.ErrInvalid)
	}
	marks, applied := r.machine.marks, r.machine.view.Load().AppliedIndex
	switch a.verb {
	case markAwait:
		if err := marks.await(a.name); err != nil {
			return transport.Message{}, err
		}
	case markDrop:
		marks.drop(a.name)
	case markTell:
	}
	rep := marks.ask(a.name, applied, a.hashed)
	return transport.Message{Body: rep.encode()}, nil
}
