package replication

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/replication/transport"
)

const (
	// suspectsMax bounds the damaged blocks that wait for their repair. What is more is met again, by a read or the scrub.
	suspectsMax = 4096
	// repairsMax is how many blocks of one replica are repaired, from its start on, before it counts as lost: 256 MiB. A
	// disk on which so much rots should be given up, not mended.
	repairsMax = 1 << 16
	// repairRetryMin and repairRetryMax bound the pause before a repair that nobody could help with is tried again.
	repairRetryMin = time.Second
	repairRetryMax = time.Minute
	// repairTimeout bounds one message of a repair.
	repairTimeout = 5 * time.Second
	// fixTimeout bounds one message that has blocks fetched, written and flushed.
	fixTimeout = 30 * time.Second
	// readTimeout bounds what a read waits for a repair, and then for each replica that could answer in place of this one.
	// The client allows its first attempt a second; what takes longer goes on in the background.
	readTimeout = 300 * time.Millisecond
)

// IntegrityStats tells what was checked of a replica since it was opened; that it was opened again by itself, for a
// damaged log, does not count. Counts only rise.
type IntegrityStats struct {
	CheckedBytes int64 // read by scrubs
	Found        int64 // damaged or differing blocks
	Repaired     int64 // of them, those that were made whole
	Failed       int64 // of them, those that nobody has a good copy of
	Elsewhere    int64 // reads answered with the blocks of another replica
}

// repairer makes damaged blocks of a replica whole with what the others have, and answers reads from them meanwhile.
// Blocks are known by the checksum in the map, which is replicated and does not rot unnoticed: data that match it are
// the data, whichever replica they come from and however far that is.
type repairer struct {
	r    *Replica
	net  transport.Network
	vol  *engine.Volume
	log  *slog.Logger
	turn chan struct{} // one place: repairs of a replica take turns, so that none is counted twice

	checked, found, repaired, failed, elsewhere atomic.Int64

	// open are damaged blocks that were counted as found, and wait for somebody with a good copy. Under turn.
	open map[engine.BlockVersion]bool

	mu       sync.Mutex
	suspects map[trivet.LBA]bool
	wake     chan struct{} // capacity 1
}

func newRepairer(r *Replica, net transport.Network) *repairer {
	return &repairer{
		r: r, net: net, vol: r.machine.vol, log: r.log, turn: make(chan struct{}, 1),
		open: make(map[engine.BlockVersion]bool), suspects: make(map[trivet.LBA]bool), wake: make(chan struct{}, 1),
	}
}

func (rp *repairer) stats() IntegrityStats {
	return IntegrityStats{
		CheckedBytes: rp.checked.Load(), Found: rp.found.Load(), Repaired: rp.repaired.Load(), Failed: rp.failed.Load(),
		Elsewhere: rp.elsewhere.Load(),
	}
}

// goOn counts on from where an earlier repairer of the same replica has ended, within this process.
func (rp *repairer) goOn(old *repairer) {
	rp.turn <- struct{}{} // a repair that has begun already is short, and ends with its replica
	defer rp.endTurn()
	for b := range old.open {
		rp.open[b] = true
	}
	was := old.stats()
	rp.checked.Add(was.CheckedBytes)
	rp.found.Add(was.Found)
	rp.repaired.Add(was.Repaired)
	rp.failed.Add(was.Failed)
	rp.elsewhere.Add(was.Elsewhere)
}

// suspect is what the engine tells of each damaged block that is met. It does not block.
func (rp *repairer) suspect(b *engine.BlockError) {
	rp.mu.Lock()
	if len(rp.suspects) < suspectsMax {
		rp.suspects[b.LBA] = true
	}
	rp.mu.Unlock()
	select {
	case rp.wake <- struct{}{}:
	default:
	}
}

func (rp *repairer) take() []trivet.LBA {
	rp.mu.Lock()
	defer rp.mu.Unlock()
	var all []trivet.LBA
	for lba := range rp.suspects {
		all = append(all, lba)
	}
	return all
}

func (rp *repairer) settled(lba trivet.LBA) {
	rp.mu.Lock()
	defer rp.mu.Unlock()
	delete(rp.suspects, lba)
}

// run repairs what was met, until ctx ends. What nobody can help with now is tried again.
func (rp *repairer) run(ctx context.Context) {
	pause := repairRetryMin
	for {
		var again <-chan time.Time
		if waiting := rp.round(ctx); waiting {
			again = time.After(pause)
			pause = min(2*pause, repairRetryMax)
		} else {
			pause = repairRetryMin
		}
		select {
		case <-rp.wake:
		case <-again:
		case <-ctx.Done():
			return
		}
	}
}

// round tries all suspects once, and reports whether some have to wait.
func (rp *repairer) round(ctx context.Context) (waiting bool) {
	for _, lba := range rp.take() {
		if ctx.Err() != nil {
			return false
		}
		switch out, err := rp.mend(ctx, lba, 1); {
		case err != nil && !errors.Is(err, trivet.ErrCorrupt): // else the map is damaged, which was reported
			rp.log.Warn("a damaged block waits for its repair", "lba", lba, "err", err)
			waiting = true
		case out.open > 0:
			waiting = true
		default:
			rp.settled(lba)
		}
	}
	return waiting
}

// mended is what became of damaged blocks.
type mended struct {
	found    int
	repaired int
	lost     int // every other replica has said that its copy is damaged as well
	open     int // somebody may have a good copy, and did not answer, or not with it
}

func (m *mended) add(o mended) {
	m.found, m.repaired, m.lost, m.open = m.found+o.found, m.repaired+o.repaired, m.lost+o.lost, m.open+o.open
}

// mend finds out which blocks of a range are damaged, and repairs them.
func (rp *repairer) mend(ctx context.Context, lba trivet.LBA, blockN int64) (mended, error) {
	if err := rp.takeTurn(ctx); err != nil {
		return mended{}, err
	}
	defer rp.endTurn()
	bad, err := rp.vol.Damaged(lba, blockN)
	if err != nil {
		return mended{}, err
	}
	return rp.fix(ctx, bad)
}

func (rp *repairer) takeTurn(ctx context.Context) error {
	select {
	case rp.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for another repair: %w: %w", ctx.Err(), trivet.ErrUnavailable)
	}
}

func (rp *repairer) endTurn() { <-rp.turn }

// fix repairs damaged blocks with what others have. Those that were written or repaired since they were found do not
// count. REQUIRES: its turn.
func (rp *repairer) fix(ctx context.Context, bad []engine.BadBlock) (out mended, err error) {
	bad, err = rp.vol.StillBad(bad)
	for len(bad) > 0 && err == nil {
		n := min(len(bad), fetchBlocksMax)
		var part mended
		part, err = rp.fixSome(ctx, bad[:n])
		out.add(part)
		bad = bad[n:]
	}
	return out, err
}

func (rp *repairer) fixSome(ctx context.Context, bad []engine.BadBlock) (mended, error) {
	out := mended{found: len(bad)}
	rp.foundAgain(bad)
	wants := make([]engine.BlockVersion, len(bad))
	for i := range bad {
		wants[i] = bad[i].BlockVersion
	}
	data, lost := rp.fetch(ctx, wants)
	var helped []engine.BadBlock
	good := map[engine.BlockVersion][]byte{}
	for i := range bad {
		switch {
		case data[i] != nil:
			helped, good[bad[i].BlockVersion] = append(helped, bad[i]), data[i]
		case lost[i]:
			out.lost++
			rp.failed.Add(1)
			rp.log.Error("a block is damaged on every replica", "lba", bad[i].LBA, "generation", bad[i].Generation)
			rp.vol.ReportDamage(fmt.Sprintf("block %d of %s is damaged on every replica", bad[i].LBA, rp.vol.ID()))
		default:
			out.open++
			rp.leaveOpen(bad[i].BlockVersion)
		}
	}
	err := rp.replace(helped, good, &out)
	if out.repaired > 0 {
		rp.log.Warn("repaired damaged blocks", "blocks", out.repaired, "lba", bad[0].LBA)
	}
	return out, err
}

// replace gives damaged blocks their data back. Those for which it had no effect are looked at again: a block that was
// written meanwhile is as good as repaired, one that is damaged at another place by now stays open, for the next try.
func (rp *repairer) replace(bad []engine.BadBlock, data map[engine.BlockVersion][]byte, out *mended) error {
	repairs := make([]engine.Repair, len(bad))
	for i := range bad {
		var err error
		if repairs[i], err = bad[i].With(rp.vol.ID(), data[bad[i].BlockVersion]); err != nil {
			return err // fetch has verified it
		}
	}
	n, err := rp.vol.Replace(repairs)
	out.repaired += n
	rp.counted(n)
	if err != nil {
		out.open += len(repairs) - n
		return err
	}
	if n == len(bad) {
		return nil
	}
	bad, err = rp.vol.StillBad(bad)
	out.open += len(bad)
	for i := range bad {
		rp.leaveOpen(bad[i].BlockVersion)
	}
	return err
}

// foundAgain counts damaged blocks, except those that were counted when nobody could help. REQUIRES: its turn.
func (rp *repairer) foundAgain(bad []engine.BadBlock) {
	for i := range bad {
		if !rp.open[bad[i].BlockVersion] {
			rp.found.Add(1)
		}
		delete(rp.open, bad[i].BlockVersion)
	}
}

// leaveOpen remembers a block that was counted and not made whole. REQUIRES: its turn.
func (rp *repairer) leaveOpen(b engine.BlockVersion) {
	if len(rp.open) < suspectsMax {
		rp.open[b] = true
	}
}

// counted takes note of repairs, and gives the replica up when there were too many.
func (rp *repairer) counted(n int) {
	if total := rp.repaired.Add(int64(n)); n > 0 && total >= repairsMax && total-int64(n) < repairsMax {
		rp.vol.ReportDamage(fmt.Sprintf("%d damaged blocks were repaired: the disk is failing", total))
	}
}

// fetch asks the other replicas for versions of blocks, at most fetchBlocksMax of them. data has the verified data of
// those that somebody has; lost says of which every other replica has answered that its copy is damaged.
func (rp *repairer) fetch(ctx context.Context, wants []engine.BlockVersion) (data [][]byte, lost []bool) {
	data, lost = make([][]byte, len(wants)), make([]bool, len(wants))
	for i := range lost {
		lost[i] = true
	}
	for _, node := range rp.r.otherNodes() {
		var items []scrubItem
		var at []int
		for i, w := range wants {
			if data[i] == nil {
				items, at = append(items, scrubItem{BlockVersion: w}), append(at, i)
			}
		}
		if len(items) == 0 {
			break
		}
		reply, err := rp.r.askScrub(ctx, rp.net, node, &scrubRequest{op: scrubFetch, items: items})
		if err == nil {
			err = checkFetched(items, &reply)
		}
		if err != nil {
			rp.log.Warn("a replica does not help with a repair", "node", node, "err", err)
			for _, i := range at {
				lost[i] = false
			}
			continue
		}
		rest := reply.data
		for k, i := range at {
			switch reply.items[k].flag {
			case itemHas:
				block := rest[:trivet.BlockSize]
				rest = rest[trivet.BlockSize:]
				if engine.BlockSum(rp.vol.ID(), wants[i].LBA, block) == wants[i].Sum {
					data[i] = block
				}
				lost[i] = false
			case itemNone:
				lost[i] = false
			}
		}
	}
	return data, lost
}

// checkFetched returns ErrCorrupt unless a reply is one to a fetch of these items.
func checkFetched(items []scrubItem, r *scrubReply) error {
	if len(r.items) != len(items) {
		return fmt.Errorf("%d items, asked for %d: %w", len(r.items), len(items), trivet.ErrCorrupt)
	}
	n := 0
	for i := range items {
		if r.items[i].BlockVersion != items[i].BlockVersion {
			return fmt.Errorf("item %d is of block %d, asked for %d: %w", i, r.items[i].LBA, items[i].LBA, trivet.ErrCorrupt)
		}
		if r.items[i].flag == itemHas {
			n++
		}
	}
	if len(r.data) != n*trivet.BlockSize {
		return fmt.Errorf("%d bytes with %d blocks: %w", len(r.data), n, trivet.ErrCorrupt)
	}
	return nil
}

// read answers a read that has met damage here: with this replica's own blocks once they are repaired, or else with
// those of another one that has applied at least as much. cause is the damage. ErrCorrupt: no replica has good ones.
// ErrUnavailable: nobody can say at the moment.
func (rp *repairer) read(ctx context.Context, p []byte, lba trivet.LBA, cause error) error {
	mendCtx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	out, err := rp.mend(mendCtx, lba, int64(len(p)/trivet.BlockSize))
	if err == nil && out.lost == 0 && out.open == 0 {
		if err = rp.r.readBlocks(p, lba); !errors.Is(err, trivet.ErrCorrupt) {
			return err
		}
	}
	if err != nil {
		rp.log.Warn("blocks cannot be repaired", "lba", lba, "err", err)
	}
	return rp.readElsewhere(ctx, p, lba, cause)
}

// readElsewhere fills p from another replica. What that shows must not be newer than what a read here shows next: a
// reader would see the volume go back.
func (rp *repairer) readElsewhere(ctx context.Context, p []byte, lba trivet.LBA, cause error) error {
	index, open := rp.r.machine.newest.Load(), false
	for _, node := range rp.r.otherNodes() {
		callCtx, cancel := context.WithTimeout(ctx, readTimeout)
		reply, err := rp.r.askScrub(callCtx, rp.net, node, &scrubRequest{
			op: scrubReadAt, index: index, lba: lba, blockN: int64(len(p) / trivet.BlockSize),
		})
		cancel()
		switch {
		case errors.Is(err, trivet.ErrCorrupt):
			rp.log.Error("another replica has no good copy either", "lba", lba, "node", node, "err", err)
			continue
		case err != nil:
			rp.log.Warn("another replica cannot answer a read", "lba", lba, "node", node, "err", err)
			open = true
			continue
		case len(reply.data) != len(p) || len(reply.items) != 1 ||
			reply.items[0].Sum != readSum(rp.vol.ID(), lba, reply.data):
			rp.log.Error("the answer of another replica is damaged", "lba", lba, "node", node)
			open = true
			continue
		case reply.index > rp.r.machine.view.Load().AppliedIndex:
			open = true // it is ahead: ask again
			continue
		}
		copy(p, reply.data)
		rp.elsewhere.Add(1)
		return nil
	}
	if open {
		return fmt.Errorf("no good copy can be reached now: %v: %w", cause, trivet.ErrUnavailable)
	}
	rp.log.Error("a read fails: no replica has a good copy", "lba", lba, "err", cause)
	rp.vol.ReportDamage(cause.Error())
	return cause
}

// otherNodes are those of the other members, voters first.
func (r *Replica) otherNodes() []trivet.NodeID {
	var voters, learners []trivet.NodeID
	for _, m := range r.group.Status().Members {
		switch {
		case m.Replica == r.spec.Replica:
		case m.Learner:
			learners = append(learners, m.Node)
		default:
			voters = append(voters, m.Node)
		}
	}
	return append(voters, learners...)
}

// askScrub sends one message of KindVolumeScrub.
func (r *Replica) askScrub(ctx context.Context, net transport.Network, node trivet.NodeID, req *scrubRequest) (
	scrubReply, error,
) {
	limit := repairTimeout
	if req.op == scrubFix {
		limit = fixTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	m, err := net.Call(ctx, node, transport.Message{
		Kind: transport.KindVolumeScrub, Group: r.spec.Volume, Body: req.append(nil),
	})
	if err != nil {
		return scrubReply{}, err
	}
	return decodeScrubReply(m.Body)
}

// startRepair has damaged blocks of the replica repaired from now on. REQUIRES: nobody else has seen r yet.
func (r *Replica) startRepair(net transport.Network, turn func(ctx context.Context, bytes int64) error) {
	r.repair, r.markers, r.scrubTurn = newRepairer(r, net), r.machine.markers, turn
	r.machine.vol.WatchDamage(r.repair.suspect)
	r.watch.Go(func() { r.repair.run(r.life) })
}
