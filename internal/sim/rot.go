package sim

import (
	"bytes"
	"fmt"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
)

// Rot changes a bit of every copy that the disk of the machine has of a block of a volume, while the machine runs, and
// returns how many there were. What cannot be repaired is a failure of the run, unless Excuse says otherwise.
func (n *Node) Rot(block []byte) (int, error) {
	if len(block) != trivet.BlockSize {
		return 0, fmt.Errorf("rot on %s: block of %d bytes: %w", n.id, len(block), trivet.ErrInvalid)
	}
	n.mu.Lock()
	mem := n.mem
	n.mu.Unlock()
	names, err := mem.List(logDir)
	if err != nil {
		return 0, fmt.Errorf("rot on %s: %w", n.id, err)
	}
	hits := 0
	for _, name := range names {
		k, err := rotIn(mem, mem.PathJoin(logDir, name), block)
		if err != nil {
			return hits, fmt.Errorf("rot on %s: %w", n.id, err)
		}
		hits += k
	}
	return hits, nil
}

// Excuse lets the machine report damage from now on.
func (n *Node) Excuse() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.rotted = true
	if n.life != nil {
		n.life.rotten.Store(true)
	}
}

func rotIn(mem *vfs.MemFS, name string, block []byte) (hits int, err error) {
	b, err := mem.UnsafeGetFileDataBuffer(name)
	if err != nil {
		return 0, err
	}
	for off := 0; off+len(block) <= len(b); off += len(block) {
		if bytes.Equal(b[off:off+len(block)], block) {
			b[off+len(block)/2] ^= 1
			hits++
		}
	}
	return hits, nil
}

// Tamper changes the state of the machine's replica behind the back of its group, as no fault of a disk could: for
// tests of what compares replicas. REQUIRES: nothing is being applied.
func (n *Node) Tamper(f func(*engine.State)) error {
	vol, err := n.Blocks()
	if err != nil {
		return err
	}
	b, st := vol.NewBatch(), vol.State()
	f(&st)
	if err := b.Commit(st); err != nil {
		return err
	}
	return n.Spec().Disk.Engine.Flush()
}

// Damaged reports whether a machine has met damage that it could not repair since this was asked last.
func (c *Cluster) Damaged() bool { return c.hasDamage() }
