package sim

import (
	"context"
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/trivet-csi/trivet"
)

func usage(avail uint64) vfs.DiskUsage {
	return vfs.DiskUsage{TotalBytes: 100 << 30, AvailBytes: avail, UsedBytes: 100<<30 - avail}
}

// swapDisk gives a machine that is down another disk, and returns the one that it had.
func (n *Node) swapDisk(mem *vfs.MemFS) *vfs.MemFS {
	n.mu.Lock()
	defer n.mu.Unlock()
	old := n.mem
	n.mem = mem
	return old
}

// rot flips bits on the disk of a machine while it is down. What it holds may be the only other copy of
// something acknowledged, so no more machines rot than a minority.
func (n *nemesis) rot(ctx context.Context, node *Node) (made bool, err error) {
	if !n.spare(node) {
		return false, nil
	}
	if _, err := n.crash(ctx, node, 0); err != nil {
		return false, err
	}
	dir := []string{diskDir + "/engine", diskDir + "/groups", logDir}[n.rnd.IntN(3)]
	what, err := node.rot(n.rnd, 1+n.rnd.IntN(4), dir)
	if err != nil {
		return false, err
	}
	n.rotten[node] = true
	n.sim.rotten.Store(true)
	n.sim.log.Debug("bits flipped", "node", node.ID(), "where", what)
	return true, nil
}

// wipe boots a machine with an empty disk. Its replica must not open: it would vote without knowing
// what it has voted, and for what it has lost (H10). Then the right disk is mounted again.
func (n *nemesis) wipe(ctx context.Context, node *Node) (made bool, err error) {
	if !node.hasReplica() {
		return false, nil
	}
	if _, err := n.crash(ctx, node, 0); err != nil {
		return false, err
	}
	right := node.swapDisk(vfs.NewCrashableMem())
	if err := node.format(); err != nil {
		return false, err
	}
	err = node.Start(ctx)
	if err == nil {
		n.sim.violate(fmt.Errorf("replica on %s opened on an empty disk", node.ID()))
	} else if !errors.Is(err, trivet.ErrNotFound) {
		n.sim.violate(fmt.Errorf("replica on %s with an empty disk: want not found: %w", node.ID(), err))
	}
	if err := node.Stop(); err != nil {
		return false, err
	}
	node.swapDisk(right)
	return true, nil
}

// swap boots two machines with each other's disk: neither replica may open (H11).
func (n *nemesis) swap(ctx context.Context) (made bool, err error) {
	var whole []*Node
	for _, node := range n.sim.cluster.Nodes() {
		if !n.rotten[node] && !n.flipped[node] && node.hasReplica() {
			whole = append(whole, node)
		}
	}
	if len(whole) < 2 {
		return false, nil
	}
	p := n.rnd.Perm(len(whole))
	a, b := whole[p[0]], whole[p[1]]
	for _, node := range []*Node{a, b} {
		if _, err := n.crash(ctx, node, 0); err != nil {
			return false, err
		}
	}
	exchange := func(wrong bool) {
		a.swapDisk(b.swapDisk(a.swapDisk(nil)))
		a.swapped.Store(wrong)
		b.swapped.Store(wrong)
	}
	exchange(true)
	for _, node := range []*Node{a, b} {
		if err := node.Start(ctx); err == nil {
			n.sim.violate(fmt.Errorf("replica on %s opened on another machine's disk", node.ID()))
		} else if !errors.Is(err, trivet.ErrCorrupt) && !errors.Is(err, trivet.ErrInvalid) {
			n.sim.violate(fmt.Errorf("replica on %s with another machine's disk: %w", node.ID(), err))
		}
		if err := node.Stop(); err != nil {
			return false, err
		}
	}
	exchange(false)
	return true, nil
}
