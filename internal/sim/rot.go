package sim

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
)

// Rot changes a bit of every copy that the disk of the machine has of a block of a volume, while the machine runs, and
// returns how many there were. What cannot be repaired is a failure of the run, unless Excuse says otherwise.
func (n *Node) Rot(block []byte) (int, error) { return n.eachCopy(block, true) }

// Copies returns how many copies of a block of a volume the disk of the machine has.
func (n *Node) Copies(block []byte) (int, error) { return n.eachCopy(block, false) }

func (n *Node) eachCopy(block []byte, rot bool) (int, error) {
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
		k, err := eachCopyIn(mem, mem.PathJoin(logDir, name), block, rot)
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

// eachCopyIn goes by the filesystem and its locks: the log may write to the file meanwhile, or remove it.
func eachCopyIn(mem *vfs.MemFS, name string, block []byte, rot bool) (hits int, err error) {
	b, err := contents(mem, name)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	for off := 0; off+len(block) <= len(b); off += len(block) {
		if !bytes.Equal(b[off:off+len(block)], block) {
			continue
		}
		if !rot {
			hits++
			continue
		}
		f, err := mem.OpenReadWrite(name, vfs.WriteCategoryUnspecified)
		if err != nil {
			return hits, err
		}
		at := off + len(block)/2
		if _, err = f.WriteAt([]byte{b[at] ^ 1}, int64(at)); err != nil {
			return hits, errors.Join(err, f.Close())
		}
		hits++
		if err := f.Close(); err != nil { // without a sync: a crash forgets it
			return hits, err
		}
	}
	return hits, nil
}

// contents returns what a file holds.
func contents(mem *vfs.MemFS, name string) ([]byte, error) {
	f, err := mem.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // memory
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	b := make([]byte, st.Size())
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) { // it has shrunk
		return nil, err
	}
	return b[:n], nil
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
