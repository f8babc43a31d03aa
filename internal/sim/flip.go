package sim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/replication"
)

const (
	flipsMax      = 8 // blocks at a time
	tamperMax     = 4
	scrubPatience = 15 * time.Second
)

// flip changes bits of blocks that a running machine has, in a snapshot as often as not, and scrubs the volume. No more
// machines than a minority ever have such blocks, so each can be repaired, and nobody may be told of any.
func (n *nemesis) flip(ctx context.Context, node *Node) (made bool, err error) {
	if !node.Up() || !n.spare(node) {
		return false, nil
	}
	vol, err := node.Blocks()
	if err != nil {
		return false, nil //nolint:nilerr // it has no replica, or goes down
	}
	hits := 0
	for range 1 + n.rnd.IntN(flipsMax) {
		gen := engine.Live
		if st := vol.State(); len(st.Snapshots) > 0 && n.rnd.IntN(2) == 0 {
			gen = st.Snapshots[n.rnd.IntN(len(st.Snapshots))].Generation
		}
		p := make([]byte, trivet.BlockSize)
		if err := vol.ReadAtGeneration(p, trivet.LBA(n.rnd.IntN(n.sim.opts.BlockN)), gen); err != nil || isZero(p) {
			continue
		}
		k, err := node.flip(p)
		if err != nil {
			return false, err
		}
		hits += k
	}
	if hits == 0 {
		return false, nil
	}
	n.flipped[node] = true
	n.sim.flipped.Store(true)
	n.sim.count(func(r *Report) { r.Flips += hits })
	n.replays.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, scrubPatience)
		defer cancel()
		_, _ = n.sim.scrub(ctx, false) // while faults last it need not come to an end
	})
	return true, nil
}

// flip changes a bit of every copy of a block in the log of a machine that runs.
func (n *Node) flip(block []byte) (hits int, err error) {
	n.mu.Lock()
	mem := n.mem
	n.mu.Unlock()
	names, err := mem.List(logDir)
	if err != nil {
		return 0, fmt.Errorf("flip on %s: %w", n.id, err)
	}
	for _, name := range names {
		k, err := flipIn(mem, mem.PathJoin(logDir, name), block)
		if err != nil {
			return hits, fmt.Errorf("flip on %s: %w", n.id, err)
		}
		hits += k
	}
	return hits, nil
}

// flipIn is rotIn of a file that is written at the same time.
func flipIn(mem *vfs.MemFS, name string, block []byte) (hits int, err error) {
	f, err := mem.OpenReadWrite(name, vfs.WriteCategoryUnspecified)
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }() // memory
	b := make([]byte, 64*trivet.BlockSize)
	for off := int64(0); ; off += int64(len(b)) {
		n, err := f.ReadAt(b, off)
		if err != nil && !errors.Is(err, io.EOF) {
			return hits, err
		}
		for at := 0; at+len(block) <= n; at += len(block) {
			if string(b[at:at+len(block)]) != string(block) {
				continue
			}
			mid := at + len(block)/2
			if _, err := f.WriteAt([]byte{b[mid] ^ 1}, off+int64(mid)); err != nil {
				return hits, err
			}
			hits++
		}
		if n < len(b) {
			return hits, nil
		}
	}
}

// scrub makes one pass over the volume, through whoever leads. It finds nothing where nobody has damaged anything.
func (s *sim) scrub(ctx context.Context, verify bool) (sum replication.ScrubRange, err error) {
	o := replication.ScrubOptions{Verify: verify}
	for !sum.Done {
		var got replication.ScrubRange
		err := s.cluster.lead(ctx, func(r *replication.Replica) (err error) {
			got, err = r.ScrubRange(ctx, o)
			if errors.Is(err, trivet.ErrInvalid) { // lost messages look like a program that does not know the question
				err = fmt.Errorf("%v: %w", err, trivet.ErrUnavailable)
			}
			return err
		})
		if err != nil {
			return sum, err
		}
		if got.Found > 0 && !s.flipped.Load() && !s.rotten.Load() {
			s.violate(fmt.Errorf("a scrub has found what nobody has changed: %v", got.Findings))
		}
		sum.Found, sum.Repaired, sum.Left = sum.Found+got.Found, sum.Repaired+got.Repaired, sum.Left+got.Left
		sum.Findings, sum.Absent = append(sum.Findings, got.Findings...), got.Absent
		sum.Next, sum.Done, o.From = got.Next, got.Done, got.Next
	}
	s.count(func(r *Report) {
		r.Scrubs++
		r.Repaired += int(sum.Repaired)
	})
	return sum, nil
}

// mend scrubs the volume, when nothing disturbs any more: all that is damaged is repaired, so the next pass finds
// nothing, and the replicas have what they had.
func (s *sim) mend(ctx context.Context, when string, nodes []*Node) error {
	for _, verify := range []bool{false, true} {
		sum, err := s.scrub(ctx, verify)
		if err != nil {
			return fmt.Errorf("scrub %s: %w", when, err)
		}
		if sum.Left > 0 && !s.rotten.Load() {
			s.violate(fmt.Errorf("%s: a scrub has found %d blocks and left %d, with %v away: %v", when, sum.Found, sum.Left,
				sum.Absent, sum.Findings))
		}
	}
	return s.cluster.converge(ctx, nodes)
}

// tamper changes the map of one replica so that it says something else than the others, as a lost write of a table
// would, and has it scrubbed. Nobody reads meanwhile: no read could tell. The others are right, because they are
// more; what they have, all replicas must have afterwards.
func (s *sim) tamper(ctx context.Context, rnd *rand.Rand, nodes []*Node) error {
	if s.swarm.rates[FaultFlip] == 0 || s.rotten.Load() || len(nodes)-1 <= len(s.cluster.Members())/2 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, livenessMax)
	defer cancel()
	n, err := s.spoil(nodes[rnd.IntN(len(nodes))], rnd)
	if err != nil || n == 0 {
		return err
	}
	s.flipped.Store(true)
	sum, err := s.scrub(ctx, false)
	if err != nil {
		return fmt.Errorf("scrub: %w", err)
	}
	// A block that cleaning or a repair moves meanwhile is the next scrub's, which is not counted as left.
	again := sum
	for range scrubsMax {
		if again, err = s.scrub(ctx, false); err != nil {
			return fmt.Errorf("scrub again: %w", err)
		}
		if again.Found == 0 {
			break
		}
	}
	if sum.Found < int64(n) || sum.Left > 0 || again.Found > 0 {
		s.violate(fmt.Errorf("%d blocks of one replica are others, and a scrub has found %d and left %d, the last %d: %v", n,
			sum.Found, sum.Left, again.Found, sum.Findings))
	}
	return nil
}

// scrubsMax is how many scrubs it may take until one finds nothing.
const scrubsMax = 3

// spoil makes blocks of a replica others: data that nobody has written, or zeroes. It returns how many.
func (s *sim) spoil(node *Node, rnd *rand.Rand) (int, error) {
	vol, err := node.Blocks()
	if err != nil {
		return 0, err
	}
	view, err := vol.View(0, int64(s.opts.BlockN))
	if errors.Is(err, trivet.ErrUnavailable) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer func() { _ = view.Close() }() // only read
	var repairs []engine.Repair
	for _, i := range rnd.Perm(s.opts.BlockN)[:tamperMax] {
		lba := trivet.LBA(i)
		has, _, err := view.Versions(lba, 1)
		if err != nil {
			return 0, err
		}
		if len(has) == 0 || has[0].LBA != lba {
			continue
		}
		var p []byte
		if rnd.IntN(2) == 0 {
			p = make([]byte, trivet.BlockSize)
			stamp(p, lba, 1, neverIssued)
			has[0].Sum = engine.BlockSum(volumeID, lba, p)
		}
		r, err := view.Repair(has[0], p)
		if err != nil {
			return 0, err
		}
		repairs = append(repairs, r)
	}
	return vol.Replace(repairs)
}
