package replication

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

const (
	// findingsMax is how many things that were found are told one by one, of one range.
	findingsMax = 32
	// markWait is how long the leader waits for a replica that has not applied a marker, or does not answer.
	markWait = 20 * time.Second
	// wakeWait is how long the first range of a pass waits for replicas that do not run: all nodes open theirs when the
	// pass begins, and one may be later than the others.
	wakeWait = 10 * time.Second
	// askPause is the time between two questions to a replica that does not answer.
	askPause = 100 * time.Millisecond
)

// ScrubOptions say which range is scrubbed, and how.
type ScrubOptions struct {
	From trivet.LBA // block to begin at
	// RateBytes is how many bytes a second each replica reads at most; 0 = no limit.
	RateBytes int64
	// Verify compares and reads, and repairs nothing.
	Verify bool
}

// ScrubRange is what the scrub of one range found.
type ScrubRange struct {
	Next         trivet.LBA // where to go on, unless Done
	Done         bool       // this was the last range
	CheckedBytes int64      // read by all replicas
	Found        int64      // blocks that are damaged on a replica, or differ from the majority's
	Repaired     int64      // of them
	Left         int64      // of them, those that could not be repaired; what was written meanwhile is neither
	Findings     []string   // what was found, in words; not all of it when it is much
	Absent       []trivet.NodeID
}

func (s *ScrubRange) note(format string, args ...any) {
	if len(s.Findings) < findingsMax {
		s.Findings = append(s.Findings, fmt.Sprintf(format, args...))
	}
}

// scrubbed is one replica in the scrub of a range.
type scrubbed struct {
	raftgroup.Member
	reply scrubReply
	err   error
}

// ScrubRange scrubs the next 32 MiB or so of the volume, on all replicas. A marker in the log makes each pin a view
// of the same moment; each reads every block in it that the volume or a snapshot shows, compares it with its own
// checksum, and repairs what is damaged with the data of another. Then the leader compares digests of the maps. Where
// they differ it compares block by block, and has the minority take what the majority has; whose snapshots differ, that
// replica is lost. Writes go on meanwhile, and win. A volume that lies upon another one, or was set back, is scrubbed
// as it shows.
//
// ErrNotLeader: ask the leader. ErrUnavailable: less than a majority of the voters takes part, or one left in the
// middle; the same again later. Replicas that do not take part are named.
func (r *Replica) ScrubRange(ctx context.Context, o ScrubOptions) (ScrubRange, error) {
	out, err := r.scrubRange(ctx, o)
	if err != nil {
		return out, fmt.Errorf("scrub %s from block %d: %w", r.spec.Volume, o.From, err)
	}
	return out, nil
}

// scrubTries is how often a range is scrubbed in which blocks are left: what nobody could give was written by others
// meanwhile, most likely, or they were busy.
const scrubTries = 3

// scrubRange scrubs a range, and again while blocks of it are left. Each block that was found is counted once: as
// repaired, or by the last try.
func (r *Replica) scrubRange(ctx context.Context, o ScrubOptions) (sum ScrubRange, err error) {
	var settled ScrubRange
	for try := 1; ; try++ {
		out, leftN, err := r.scrubOnce(ctx, o)
		if err != nil && try > 1 {
			r.log.Warn("blocks that were left are not looked at again", "lba", o.From, "left", sum.Left, "err", err)
			return sum, nil
		}
		if err != nil {
			return out, err
		}
		settled.take(&out)
		sum = out
		sum.CheckedBytes, sum.Repaired, sum.Findings = settled.CheckedBytes, settled.Repaired, settled.Findings
		sum.Found = settled.Found + out.Left
		if leftN == 0 || o.Verify || try == scrubTries {
			return sum, nil
		}
	}
}

// take adds what is settled of a try: what is left will be found again.
func (s *ScrubRange) take(o *ScrubRange) {
	s.CheckedBytes += o.CheckedBytes
	s.Found += o.Found - o.Left
	s.Repaired += o.Repaired
	for _, f := range o.Findings {
		if !slices.Contains(s.Findings, f) {
			s.note("%s", f)
		}
	}
}

// scrubOnce scrubs a range. leftN is how many blocks are left of which another try may repair some.
func (r *Replica) scrubOnce(ctx context.Context, o ScrubOptions) (out ScrubRange, leftN int64, err error) {
	if !r.group.Status().IsLeader {
		return out, 0, trivet.ErrNotLeader
	}
	patience := time.Duration(0)
	if o.From == 0 { // the group may just have been woken for this
		patience = wakeWait
	}
	all, err := r.present(ctx, patience, &out)
	if err != nil {
		return out, 0, err
	}
	blockN, last, err := r.machine.vol.RunOf(o.From, scrubRangeN)
	if err != nil {
		return out, 0, err
	}
	index, err := r.mark(ctx, o.From, blockN)
	if err != nil {
		return out, 0, err
	}
	defer r.unmark(context.WithoutCancel(ctx), index, all)
	r.each(ctx, all, &scrubRequest{
		op: scrubCheck, index: index, rate: o.RateBytes, repair: !o.Verify, blockN: scrubWithOlder,
	})
	if all, err = r.enough(all, &out); err != nil { // one may be catching up, for hours
		return out, 0, err
	}
	for _, s := range all {
		out.CheckedBytes += s.reply.blockN * trivet.BlockSize
		out.Found += s.reply.found
		out.Repaired += s.reply.repaired
		out.Left += s.reply.left
		for _, i := range s.reply.items {
			out.note("block %d is damaged on %s", i.LBA, s.Node)
		}
	}
	leftN = out.Left
	r.compareStates(ctx, index, all, o.Verify, &out)
	r.compareOlder(ctx, index, all, o.Verify, &out)
	n, err := r.compareBlocks(ctx, o, index, blockN, all, &out)
	if err != nil {
		return out, 0, err
	}
	out.Next, out.Done = o.From+trivet.LBA(blockN), last
	return out, leftN + n, nil
}

// present finds out which voters take part. A program that does not know markers would stop when it applies one. It
// does not know the question either, and then there is no marker: ErrInvalid.
func (r *Replica) present(ctx context.Context, patience time.Duration, out *ScrubRange) ([]*scrubbed, error) {
	var all []*scrubbed
	for _, m := range r.group.Status().Members {
		if !m.Learner {
			all = append(all, &scrubbed{Member: m})
		}
	}
	slices.SortFunc(all, func(a, b *scrubbed) int { return cmp.Compare(a.Node, b.Node) })
	var calls sync.WaitGroup
	for _, s := range all {
		calls.Go(func() { s.err = r.probe(ctx, s.Node, patience) })
	}
	calls.Wait()
	for _, s := range all {
		if s.err == nil {
			continue
		}
		if _, err := QueryStatus(ctx, r.repair.net, s.Node, r.spec.Volume); err != nil {
			continue // it is not there at all
		}
		if s.err = r.probe(ctx, s.Node, 0); s.err != nil {
			return nil, fmt.Errorf("the replica on %s runs, and does not know what a scrub is; upgrade that node first: %v: %w",
				s.Node, s.err, trivet.ErrInvalid)
		}
	}
	return r.enough(all, out)
}

// enough leaves out those that did not answer, and names them. ErrUnavailable: the rest is no majority.
func (r *Replica) enough(all []*scrubbed, out *ScrubRange) (rest []*scrubbed, err error) {
	for _, s := range all {
		if s.err == nil {
			rest = append(rest, s)
			continue
		}
		r.log.Warn("a replica takes no part in the scrub", "node", s.Node, "err", s.err)
		out.Absent = append(out.Absent, s.Node)
	}
	if voters := len(rest) + len(out.Absent); len(rest) < voters/2+1 {
		return nil, fmt.Errorf("%d of %d replicas answer: %w", len(rest), voters, trivet.ErrUnavailable)
	}
	return rest, nil
}

// probe asks a replica whether it takes part, again for a while if it is not there.
func (r *Replica) probe(ctx context.Context, node trivet.NodeID, patience time.Duration) error {
	for began := time.Now(); ; {
		_, err := r.askScrub(ctx, r.repair.net, node, &scrubRequest{op: scrubProbe})
		if !errors.Is(err, trivet.ErrUnavailable) || ctx.Err() != nil || time.Since(began) >= patience {
			return err
		}
		pause(ctx, askPause)
	}
}

// mark puts a marker into the log and returns its index.
func (r *Replica) mark(ctx context.Context, lba trivet.LBA, blockN int64) (uint64, error) {
	req := &request{op: opScrub, lba: lba, arg: uint64(blockN)}
	if err := req.check(); err != nil {
		return 0, err
	}
	req.seal(r.spec.Volume)
	results, err := proposeEntry(ctx, r.group.Propose, appendEntry(nil, r.spec.Volume, []request{*req}), 1)
	if err != nil {
		return 0, err
	}
	return results[0].index, results[0].err(req)
}

func (r *Replica) unmark(ctx context.Context, index uint64, all []*scrubbed) {
	r.each(ctx, all, &scrubRequest{op: scrubDone, index: index})
}

// each asks all replicas the same, together, and again while they are not done, or do not answer for a while.
func (r *Replica) each(ctx context.Context, all []*scrubbed, req *scrubRequest) {
	var calls errgroup.Group
	for _, s := range all {
		calls.Go(func() error {
			s.reply, s.err = r.untilDone(ctx, s.Node, req)
			return nil
		})
	}
	_ = calls.Wait() // each has its own
}

func (r *Replica) untilDone(ctx context.Context, node trivet.NodeID, req *scrubRequest) (scrubReply, error) {
	silent := time.Time{}
	for {
		reply, err := r.askScrub(ctx, r.repair.net, node, req)
		switch {
		case err == nil && !reply.more:
			return reply, nil
		case err == nil:
			silent = time.Time{}
			continue
		case ctx.Err() != nil || req.op == scrubDone:
			return reply, err
		case !errors.Is(err, trivet.ErrUnavailable) && !errors.Is(err, context.DeadlineExceeded):
			return reply, err
		case silent.IsZero():
			silent = time.Now()
		case time.Since(silent) > markWait:
			return reply, err
		}
		pause(ctx, askPause)
	}
}

// majority returns the value that most of the voters have, absent ones counted as against it; false when there is none.
func majority[V comparable](values []V, absentN int) (most V, ok bool) {
	count := map[V]int{}
	for _, v := range values {
		count[v]++
	}
	for v, n := range count {
		if n > (len(values)+absentN)/2 {
			return v, true
		}
	}
	return most, false
}

// compareStates accuses a replica whose size, epoch, session or members differ from the others': nothing repairs that.
func (r *Replica) compareStates(ctx context.Context, index uint64, all []*scrubbed, verify bool, out *ScrubRange) {
	states := make([][32]byte, len(all))
	for i, s := range all {
		states[i] = s.reply.state
	}
	r.accuse(ctx, index, all, states, "state", verify, out)
}

// compareOlder accuses a replica whose snapshots show something else than the others'. What a snapshot shows is never
// written again, so this is no block to be repaired but a map that was wrong when it was kept: the replica is made
// anew. Programs that do not tell what their snapshots show are not compared.
func (r *Replica) compareOlder(ctx context.Context, index uint64, all []*scrubbed, verify bool, out *ScrubRange) {
	older := make([][32]byte, len(all))
	for i, s := range all {
		if len(s.reply.data) != len(older[i]) {
			return
		}
		older[i] = [32]byte(s.reply.data)
	}
	r.accuse(ctx, index, all, older, "content of snapshots", verify, out)
}

// accuse tells replicas whose digest of something is not that of the majority.
func (r *Replica) accuse(ctx context.Context, index uint64, all []*scrubbed, digests [][32]byte, what string,
	verify bool, out *ScrubRange,
) {
	right, ok := majority(digests, len(out.Absent))
	if !ok && allEqual(digests) {
		return
	}
	for i, s := range all {
		switch {
		case ok && digests[i] == right:
		case ok:
			out.Found++
			out.Left++
			out.note("the %s of the replica on %s is not that of the majority", what, s.Node)
			if !verify {
				if _, err := r.askScrub(ctx, r.repair.net, s.Node, &scrubRequest{op: scrubAccuse, index: index}); err != nil {
					r.log.Error("a replica that differs was not told", "what", what, "node", s.Node, "err", err)
				}
			}
		case i == 0:
			out.Found++
			out.Left++
			out.note("replicas differ in %s, and no majority agrees", what)
		}
	}
}

func allEqual[V comparable](values []V) bool {
	for _, v := range values {
		if v != values[0] {
			return false
		}
	}
	return true
}

// compareBlocks compares the maps of the range, by their digests first. leftN are the blocks that a replica could not
// be given.
func (r *Replica) compareBlocks(ctx context.Context, o ScrubOptions, index uint64, blockN int64, all []*scrubbed,
	out *ScrubRange,
) (leftN int64, err error) {
	digests := make([][32]byte, len(all))
	for i, s := range all {
		digests[i] = s.reply.blocks
	}
	if allEqual(digests) {
		return 0, nil
	}
	r.log.Error("replicas differ", "index", index, "lba", o.From, "blocks", blockN)
	end := o.From + trivet.LBA(blockN)
	for at := o.From; at < end; {
		lists, next, err := r.versions(ctx, index, at, end, all)
		if err != nil {
			return 0, err
		}
		fixes := r.judge(lists, all, out)
		for i, s := range all {
			if o.Verify || len(fixes[i]) == 0 {
				continue
			}
			for part := range slices.Chunk(fixes[i], scrubFixMax) {
				reply, err := r.untilDone(ctx, s.Node, &scrubRequest{op: scrubFix, index: index, items: part})
				if err != nil {
					return 0, fmt.Errorf("repair blocks on %s: %w", s.Node, err)
				}
				out.Repaired += reply.repaired
				out.Left += reply.left
				leftN += reply.left
			}
		}
		if o.Verify {
			for i := range fixes {
				out.Left += int64(len(fixes[i]))
			}
		}
		at = next
	}
	return leftN, nil
}

// scrubFixMax is how many blocks one message asks to be repaired: so many are fetched and written well within
// fixTimeout.
const scrubFixMax = 4 * fetchBlocksMax

// versions asks each replica for what its view has from a block on, as far as all lists reach.
func (r *Replica) versions(ctx context.Context, index uint64, at, end trivet.LBA, all []*scrubbed) (
	lists []map[trivet.LBA]scrubItem, next trivet.LBA, err error,
) {
	next = end
	replies := make([]scrubReply, len(all))
	for i, s := range all {
		if replies[i], err = r.untilDone(ctx, s.Node, &scrubRequest{op: scrubVersions, index: index, lba: at}); err != nil {
			return nil, 0, fmt.Errorf("compare with %s: %w", s.Node, err)
		}
		if replies[i].next <= at {
			return nil, 0, fmt.Errorf("compare with %s: goes on at block %d after %d: %w", s.Node, replies[i].next, at,
				trivet.ErrCorrupt)
		}
		next = min(next, replies[i].next)
	}
	for i := range replies {
		list := make(map[trivet.LBA]scrubItem, len(replies[i].items))
		for _, x := range replies[i].items {
			if x.LBA < next {
				list[x.LBA] = x
			}
		}
		lists = append(lists, list)
	}
	return lists, next, nil
}

// judge compares lists block by block, and returns what each replica has to change.
func (r *Replica) judge(lists []map[trivet.LBA]scrubItem, all []*scrubbed, out *ScrubRange) [][]scrubItem {
	fixes := make([][]scrubItem, len(all))
	known := map[trivet.LBA]bool{}
	for _, list := range lists {
		for lba := range list {
			known[lba] = true
		}
	}
	lbas := make([]trivet.LBA, 0, len(known))
	for lba := range known {
		lbas = append(lbas, lba)
	}
	slices.Sort(lbas)
	for _, lba := range lbas {
		// What reads alike is alike, of whatever generation: replicas sweep and flatten each at its own pace.
		sums := make([]scrubItem, len(lists))
		for i, list := range lists {
			x := list[lba] // none: reads as zeroes
			sums[i].LBA, sums[i].Sum, sums[i].flag = lba, x.Sum, x.flag
		}
		if allEqual(sums) {
			continue
		}
		right, ok := majority(sums, len(out.Absent))
		if !ok {
			out.Found++
			out.Left++
			out.note("block %d is different on all replicas", lba)
			r.log.Error("replicas differ, and no majority agrees", "lba", lba)
			continue
		}
		fix := right
		for i := range lists { // for programs that repair the very generation
			if sums[i] == right && right.flag == itemHas {
				fix.Generation = lists[i][lba].Generation
			}
		}
		for i, s := range all {
			if sums[i] != right {
				fixes[i] = append(fixes[i], fix)
				out.Found++
				out.note("block %d on %s is not what the majority has", lba, s.Node)
			}
		}
	}
	return fixes
}

// Integrity returns what was checked and repaired of this replica since it was opened (IntegrityStats).
func (r *Replica) Integrity() IntegrityStats { return r.repair.stats() }
