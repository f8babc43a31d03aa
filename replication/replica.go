package replication

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/internal/stage"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// Replica is one running copy of a volume: a member of its Raft group, with the state machine and,
// while it leads, the queue in front of the log. All methods may be called concurrently.
type Replica struct {
	spec    ReplicaSpec
	machine *machine
	group   *raftgroup.Group
	batcher *batcher
	lease   time.Duration // longest read lease of a leader of the group
	stages  *stage.Volume // what is measured of it
	repair  *repairer
	markers *markers
	life    context.Context // ends with close
	// scrubTurn is HostConfig.ScrubTurn.
	scrubTurn func(ctx context.Context, bytes int64) error
	reads     *stage.Meter
	turns     Turns // on its disk; nil: none to wait for
	log       *slog.Logger

	network   transport.Network
	verifying verifications // of learners, while it leads

	roomElsewhere func(trivet.VolumeID) error // HostConfig.RoomElsewhere; may be nil

	cancel context.CancelFunc // ends watch
	watch  sync.WaitGroup     // watchLeader, and verifications

	closing sync.Once
	closed  error // of the first close
}

// ReplicaStatus says how a replica is doing.
type ReplicaStatus struct {
	raftgroup.Status
	Replica   trivet.ReplicaID  // whose status it is
	Epoch     trivet.Epoch      // as applied here: a follower may lag
	SizeBytes int64             // as applied here
	UsedBytes int64             // space that the blocks take on this disk; -1 when it could not be read
	Snapshots []engine.Snapshot // as applied here; not to be changed
	// Progress is another number whenever the replica came a step further: an entry arrived or was applied,
	// bytes of a catch-up arrived, or blocks were read to compare them with the leader's. It means nothing else.
	Progress uint64
}

// startReplica starts the goroutine that tells the batcher who leads.
func startReplica(ctx context.Context, s ReplicaSpec, m *machine, g *raftgroup.Group, lease time.Duration,
	log *slog.Logger, stages *stage.Volume,
) *Replica {
	ctx, cancel := context.WithCancel(ctx)
	r := &Replica{
		spec: s, machine: m, group: g, lease: lease, log: log, cancel: cancel, stages: stages, life: ctx,
		batcher: newBatcher(ctx, s.Volume, g.Propose),
	}
	r.verifying.life = ctx
	if s.Disk.Share != nil {
		r.turns = s.Disk.Share.Open(s.Volume)
	}
	r.batcher.waiting, r.reads = stages.Meter(stage.Queue), stages.Meter(stage.ServeRead)
	r.watch.Go(func() { r.watchLeader(ctx) })
	return r
}

func (r *Replica) watchLeader(ctx context.Context) {
	var led bool
	for {
		changed := r.group.Changed() // before Status, or a change in between is missed
		st := r.group.Status()
		r.batcher.setLeader(st.IsLeader, st.Term)
		if st.IsLeader != led {
			led = st.IsLeader
			r.log.Info("leadership changed", "leading", led, "term", st.Term)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// close stops the replica and waits for its goroutines.
func (r *Replica) close() error {
	r.closing.Do(func() {
		r.verifying.close()
		// What a read meets from here on waits for the next who opens it: it is not damage that nobody can repair.
		r.machine.vol.WatchDamage(func(*engine.BlockError) {})
		r.cancel()
		r.watch.Wait()
		r.markers.close()
		r.batcher.close()
		r.closed = r.group.Close()
		r.machine.marks.close()
		if r.turns != nil {
			r.turns.Close()
		}
		r.stages.Close()
	})
	return r.closed
}

// Changed returns a channel that is closed at the next change of leader or term.
func (r *Replica) Changed() <-chan struct{} { return r.group.Changed() }

// Status returns how the replica is doing now.
func (r *Replica) Status() ReplicaStatus {
	v := r.machine.view.Load()
	used, err := r.machine.vol.UsedBytes()
	if err != nil {
		used = -1
	}
	st := r.group.Status()
	return ReplicaStatus{
		Status: st, Replica: r.spec.Replica, Epoch: v.Epoch, SizeBytes: v.SizeBytes, UsedBytes: used,
		Snapshots: v.Snapshots,
		Progress:  st.LastIndex + st.Applied + uint64(st.CatchUp.DoneBytes) + r.machine.marks.moved(),
	}
}

// leader returns the node that leads, as far as this replica knows, in which term, and what is closed
// at a change.
func (r *Replica) leader() (node trivet.NodeID, term uint64, changed <-chan struct{}) {
	changed = r.group.Changed() // before the look, so that no change is missed
	s := r.group.Status()
	return s.LeaderNode, s.Term, changed
}

// write puts a request of a session into the log and returns once it is applied here.
func (r *Replica) write(ctx context.Context, req *request) (term uint64, err error) {
	if err := req.check(); err != nil {
		return 0, err
	}
	if !req.op.sessioned() {
		return 0, fmt.Errorf("%s is not for clients: %w", req.op, trivet.ErrInvalid)
	}
	if v := r.machine.view.Load(); req.epoch < v.Epoch { // true for good: spare the log an entry
		return 0, result{out: outFenced, epoch: v.Epoch}.err(req)
	}
	// Only a leader may say so, and only before the log: whether a write applies must not depend on a
	// replica's disk (H26). Discards and zeroes need no room.
	if req.op == opWrite && r.batcher.leads() {
		if !r.spec.Disk.Engine.HasRoom(int64(len(req.data))) {
			return 0, fmt.Errorf("disk %s of the leader is full: %w", r.spec.Disk.ID, trivet.ErrNoSpace)
		}
		if r.roomElsewhere != nil {
			if err := r.roomElsewhere(r.spec.Volume); err != nil {
				return 0, err
			}
		}
	}
	if r.turns == nil || !r.batcher.leads() { // one that does not lead says so at once
		return r.batcher.submit(ctx, req)
	}
	began, err := r.takeTurn(ctx, len(req.data))
	if err != nil {
		return 0, err
	}
	defer func() { r.turns.Release(len(req.data), time.Since(began)) }()
	return r.batcher.submit(ctx, req)
}

// takeTurn waits until the disk may take on a request, and returns when that was. What followers append is not held
// back like this: a late append would hold up its whole group.
func (r *Replica) takeTurn(ctx context.Context, n int) (time.Time, error) {
	if err := r.turns.Acquire(ctx, n); err != nil {
		return time.Time{}, fmt.Errorf("wait for disk %s: %w", r.spec.Disk.ID, err)
	}
	return time.Now(), nil
}

// read fills p. It returns the term in which this replica may answer; a client that has seen a higher
// one must not use the data, unless it asked for less than ReadStrong. ErrNotLeader: ask the leader.
func (r *Replica) read(ctx context.Context, p []byte, req *readRequest) (term uint64, err error) {
	if err := r.checkReadEpoch(req.epoch, false); err != nil {
		return 0, err
	}
	if r.turns != nil && (req.level != levelStrong || r.batcher.leads()) {
		began, err := r.takeTurn(ctx, len(p))
		if err != nil {
			return 0, err
		}
		defer func() { r.turns.Release(len(p), time.Since(began)) }()
	}
	if req.level != levelStrong {
		return r.readApplied(p, req)
	}
	if term, err = r.readGate(ctx, req.epoch); err != nil { // before the read: the answer is as new as the gate (I15)
		return 0, err
	}
	err = r.readBlocks(p, req.lba)
	if errors.Is(err, trivet.ErrCorrupt) {
		err = r.repair.read(ctx, p, req.lba, err)
	}
	return term, err
}

// readGate returns the term in which this replica may answer a strong read at an epoch, from now on. Where two write, a
// lease will not do: what backs it up is that a Volume has seen the term of its own last write, and here the other one
// may have made it. So a quorum is asked, for all reads that wait.
func (r *Replica) readGate(ctx context.Context, epoch trivet.Epoch) (term uint64, err error) {
	many := manyWrite(r.machine.view.Load().Session)
	if many {
		term, err = r.group.ReadRound(ctx)
	} else {
		term, err = r.group.ReadGate()
	}
	if err != nil {
		return 0, err
	}
	if err := r.checkReadEpoch(epoch, true); err != nil {
		return 0, err
	}
	if !many && manyWrite(r.machine.view.Load().Session) {
		return 0, fmt.Errorf("epoch %d of two writers has just begun: %w", epoch, trivet.ErrUnavailable)
	}
	return term, nil
}

// readApplied answers from what this replica has applied, whoever leads. For a session that must be all
// that the session has written or read; until it has done either, the fence of its epoch stands for
// what was there before.
func (r *Replica) readApplied(p []byte, req *readRequest) (term uint64, err error) {
	has := r.machine.view.Load()
	if req.level == levelSession && (has.AppliedIndex < req.index || has.Epoch < req.epoch) {
		return 0, fmt.Errorf("replica is at index %d, epoch %d, the session at %d, %d: %w",
			has.AppliedIndex, has.Epoch, req.index, req.epoch, trivet.ErrNotLeader)
	}
	err = r.readBlocks(p, req.lba)
	if errors.Is(err, trivet.ErrOutOfRange) || errors.Is(err, trivet.ErrCorrupt) {
		r.log.Warn("read is left to the leader", "lba", req.lba, "err", err)
		return 0, fmt.Errorf("%v: %w", err, trivet.ErrNotLeader) // not grown yet, or damaged here only
	}
	if r.machine.restored.Load() { // the reply could not tell how new the blocks are
		return 0, fmt.Errorf("replica is being restored: %w", trivet.ErrUnavailable)
	}
	return r.group.Status().Term, err
}

func (r *Replica) readBlocks(p []byte, lba trivet.LBA) error {
	defer r.reads.Begin().End()
	size := r.machine.view.Load().SizeBytes
	if lba >= lbaMax {
		return fmt.Errorf("block %d: %w", lba, trivet.ErrOutOfRange)
	}
	if err := trivet.CheckRange(int64(lba)*trivet.BlockSize, int64(len(p)), size); err != nil {
		return err
	}
	return r.machine.vol.ReadAt(p, lba)
}

// checkReadEpoch refuses an epoch below the volume's on any replica. Only one that leads knows that
// an epoch is too high: others may not have applied its fence yet.
func (r *Replica) checkReadEpoch(epoch trivet.Epoch, leading bool) error {
	has := r.machine.view.Load().Epoch
	switch {
	case epoch < has:
		return fmt.Errorf("volume is fenced at epoch %d, request has epoch %d: %w", has, epoch, trivet.ErrFenced)
	case epoch > has && leading:
		return fmt.Errorf("volume is at epoch %d, request has epoch %d, which was never fenced in: %w",
			has, epoch, trivet.ErrInvalid)
	}
	return nil
}

// Fence commits epoch in the volume's group: from then on every replica refuses the writes and reads
// of lower epochs. It returns only after every read lease that an older leader may hold has run out,
// so once it is back no request of a lower epoch succeeds anywhere (H12). It is idempotent: the same
// epoch again gives nil, after the same wait; a lower one ErrFenced. ErrNotLeader: ask the leader;
// ErrUnavailable and context errors: outcome unknown, ask again.
func (r *Replica) Fence(ctx context.Context, epoch trivet.Epoch) error {
	return r.fence(ctx, &request{op: opFence, epoch: epoch})
}

func (r *Replica) fence(ctx context.Context, req *request) error {
	if err := r.command(ctx, req); err != nil {
		return fmt.Errorf("fence %s at epoch %d: %w", r.spec.Volume, req.epoch, err)
	}
	// A quarter more than a lease, for clocks that do not run alike.
	t := time.NewTimer(r.lease + r.lease/4)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("fence %s at epoch %d: wait for leases: %w", r.spec.Volume, req.epoch, ctx.Err())
	}
}

// Wipe makes the whole volume read as zeroes on every replica. epoch must be the volume's: fence in a
// fresh one first, so that no attachment writes meanwhile. Idempotent. ErrNotLeader: ask the leader;
// ErrFenced: another attachment came; ErrUnavailable: outcome unknown, ask again.
func (r *Replica) Wipe(ctx context.Context, epoch trivet.Epoch) error {
	if err := r.command(ctx, &request{op: opWipe, epoch: epoch}); err != nil {
		return fmt.Errorf("wipe %s at epoch %d: %w", r.spec.Volume, epoch, err)
	}
	return nil
}

// Resize makes the volume sizeBytes large on every replica. Idempotent. ErrOutOfRange: the volume is
// larger, and never shrinks; ErrInvalid: not whole blocks or above VolumeSizeMax; ErrNotLeader: ask the
// leader; ErrUnavailable: outcome unknown, ask again. A Volume learns of it by SetSize.
func (r *Replica) Resize(ctx context.Context, sizeBytes int64) error {
	if err := r.command(ctx, &request{op: opResize, arg: uint64(sizeBytes)}); err != nil {
		return fmt.Errorf("resize %s to %d bytes: %w", r.spec.Volume, sizeBytes, err)
	}
	return nil
}

// command proposes one request without a session as an entry of its own.
func (r *Replica) command(ctx context.Context, req *request) error {
	_, err := r.propose(ctx, req)
	return err
}

func (r *Replica) propose(ctx context.Context, req *request) (result, error) {
	if err := req.check(); err != nil {
		return result{}, err
	}
	req.seal(r.spec.Volume)
	entry := appendEntry(nil, r.spec.Volume, []request{*req})
	results, err := proposeEntry(ctx, r.group.Propose, entry, 1)
	if ctx.Err() != nil && err != nil && !errors.Is(err, trivet.ErrNotLeader) {
		return result{}, ctx.Err()
	}
	if err != nil {
		return result{}, err
	}
	return results[0], results[0].err(req)
}

// TransferTo moves leadership to another replica of the volume. ErrNotLeader: ask the leader.
func (r *Replica) TransferTo(ctx context.Context, to trivet.ReplicaID) error {
	if err := r.group.TransferTo(ctx, to); err != nil {
		return fmt.Errorf("transfer leadership of %s to %s: %w", r.spec.Volume, to, err)
	}
	return nil
}
