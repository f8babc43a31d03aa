package cache

import (
	"slices"
	"time"

	"github.com/trivet-csi/trivet"
)

// state of a slot, in memory.
type state uint8

const (
	free   state = iota
	taken        // a writer or a fill copies into it
	dirty        // acknowledged, to be written back; in the dirty list and the index
	flying       // being written back; in the index
	orphan       // being written back, but superseded meanwhile; free once that is over
	clean        // as on the device below; in the index and the policy
)

// slots is the table of a cache's slots. Each block has at most one slot in the index. Guarded by Device.mu.
type slots struct {
	m      *mapping
	volume trivet.VolumeID
	free   []int32 // stack
	index  *index
	policy policy
	dirty  *dirtySlots // in the order of cover

	state []state
	lba   []trivet.LBA
	seq   []uint64 // of the write that it holds
	// cover is the oldest write that is not below yet and that this slot stands for: its own, or that of a dirty slot
	// which it superseded. A flush waits for it (H15), and it keeps the place in the dirty list, so a block that is
	// written over and over is written back in time.
	cover []uint64
	since []time.Duration // when the write of cover came
	crc   []uint32

	flyingN int // flying and orphan
	takenN  int
	cleanN  int
}

func newSlots(m *mapping, volume trivet.VolumeID, e Eviction) (*slots, error) {
	n := m.slotN
	p, err := newPolicy(e, n)
	if err != nil {
		return nil, err
	}
	t := &slots{
		m: m, volume: volume, free: make([]int32, 0, n), index: newIndex(n), policy: p,
		state: make([]state, n), lba: make([]trivet.LBA, n), seq: make([]uint64, n), cover: make([]uint64, n),
		since: make([]time.Duration, n), crc: make([]uint32, n),
	}
	t.dirty = newDirtySlots(t.lba)
	for s := range int32(n) {
		t.free = append(t.free, int32(n)-1-s)
	}
	return t, nil
}

// setPolicy puts another policy in place; it learns the order of the slots, not of their use.
func (t *slots) setPolicy(e Eviction) error {
	p, err := newPolicy(e, t.m.slotN)
	if err != nil {
		return err
	}
	for s, st := range t.state {
		if st == clean {
			p.add(int32(s))
		}
	}
	t.policy = p
	return nil
}

// unwritten counts the blocks that are not below yet, as far as memory goes.
func (t *slots) unwritten() int { return t.dirty.n + t.flyingN + t.takenN }

// take takes len(dst) slots, from the free and the clean ones, or none at all.
func (t *slots) take(dst []int32) bool {
	if len(t.free)+t.cleanN < len(dst) {
		return false
	}
	for i := range dst {
		if len(t.free) == 0 {
			t.dropClean(t.policy.victim())
		}
		s := t.free[len(t.free)-1]
		t.free = t.free[:len(t.free)-1]
		t.state[s] = taken
		dst[i] = s
	}
	t.takenN += len(dst)
	return true
}

// giveBack undoes take.
func (t *slots) giveBack(taken []int32) {
	t.takenN -= len(taken)
	for _, s := range taken {
		t.release(s)
	}
}

// release frees a slot that is in no list. Its header is free already.
func (t *slots) release(s int32) {
	t.state[s] = free
	t.free = append(t.free, s)
}

func (t *slots) dropClean(s int32) {
	t.policy.remove(s)
	t.index.del(t.lba[s])
	t.cleanN--
	t.release(s)
}

// acknowledge makes taken, filled slots the contents of the blocks from lba on, as one write.
func (t *slots) acknowledge(taken []int32, lba trivet.LBA, seq uint64, now time.Duration) {
	for i, s := range taken {
		t.m.publish(s, t.volume, lba+trivet.LBA(i), seq, t.crc[s])
	}
	t.m.commit(seq)
	t.takenN -= len(taken)
	for i, s := range taken {
		at := lba + trivet.LBA(i)
		t.state[s], t.lba[s], t.seq[s], t.cover[s], t.since[s] = dirty, at, seq, seq, now
		t.supersede(t.index.get(at), s)
		t.index.put(at, s)
	}
}

// supersede makes s, which is dirty, follow old, which may be none. old's header is invalidated before s can be
// written back and freed, or a successor would find the older block alone.
func (t *slots) supersede(old, s int32) {
	if old == none {
		t.dirty.pushBack(s)
		return
	}
	switch t.state[old] {
	case dirty:
		t.cover[s], t.since[s] = t.cover[old], t.since[old]
		t.dirty.replace(old, s)
		t.m.invalidate(old)
		t.release(old)
		return
	case flying:
		t.state[old] = orphan
		t.m.invalidate(old)
	case clean:
		t.policy.remove(old)
		t.cleanN--
		t.release(old)
	case free, taken, orphan:
		panic("cache: a slot in the index holds no block")
	}
	t.dirty.pushBack(s)
}

// forget drops a block that something newer stands for below: a discard, or a write that went through. Blocks
// written after seq stay. REQUIRES: it is not flying.
func (t *slots) forget(s int32, seq uint64) {
	switch t.state[s] {
	case clean:
		t.dropClean(s)
	case dirty:
		if t.seq[s] > seq {
			return
		}
		t.m.invalidate(s)
		t.dirty.remove(s)
		t.index.del(t.lba[s])
		t.release(s)
	case free, taken, flying, orphan:
		panic("cache: forgot a slot that is in use")
	}
}

// each calls f for every block in [lba, lba+n) that has a slot. It walks the shorter of the range and the table.
func (t *slots) each(lba trivet.LBA, n int64, f func(s int32)) {
	if n <= int64(len(t.state)) {
		for i := range n {
			if s := t.index.get(lba + trivet.LBA(i)); s != none {
				f(s)
			}
		}
		return
	}
	for s, st := range t.state {
		if at := t.lba[s]; st >= dirty && st != orphan && at >= lba && int64(at-lba) < n {
			f(int32(s))
		}
	}
}

// launch makes a dirty slot flying.
func (t *slots) launch(s int32) {
	t.dirty.remove(s)
	t.state[s] = flying
	t.flyingN++
}

// landed says that a flying or orphaned slot is below. The block stays as a clean one if keep is set.
func (t *slots) landed(s int32, keep bool) {
	t.flyingN--
	if t.state[s] == orphan {
		t.release(s)
		return
	}
	t.m.invalidate(s)
	if !keep {
		t.index.del(t.lba[s])
		t.release(s)
		return
	}
	t.state[s] = clean
	t.cleanN++
	t.policy.add(s)
}

// crashed puts a flying slot back among the dirty ones: its write-back failed. An orphan has a successor.
func (t *slots) crashed(s int32) {
	t.flyingN--
	if t.state[s] == orphan {
		t.release(s)
		return
	}
	t.state[s] = dirty
	after := t.dirty.tail
	for after != none && t.cover[after] > t.cover[s] {
		after = t.dirty.prev[after]
	}
	t.dirty.insertAfter(s, after)
}

// addClean makes a taken, filled slot a clean block. REQUIRES: lba has no slot.
func (t *slots) addClean(s int32, lba trivet.LBA) {
	t.takenN--
	t.state[s], t.lba[s] = clean, lba
	t.index.put(lba, s)
	t.cleanN++
	t.policy.add(s)
}

// wipe drops everything that is dirty, and returns how many blocks that were.
func (t *slots) wipe() int {
	n := 0
	for s := t.dirty.head; s != none; s = t.dirty.head {
		t.m.invalidate(s)
		t.dirty.remove(s)
		t.index.del(t.lba[s])
		t.release(s)
		n++
	}
	for s, st := range t.state {
		if st == flying {
			t.m.invalidate(int32(s))
			t.index.del(t.lba[s])
			t.state[s] = orphan
			n++
		}
	}
	return n
}

// dropAllClean empties the clean side.
func (t *slots) dropAllClean() {
	for s, st := range t.state {
		if st == clean {
			t.dropClean(int32(s))
		}
	}
}

// recover makes what a predecessor left dirty again: of each block the newest write that was acknowledged. Everything
// else is invalidated, before a new sequence could make it count. It returns the highest sequence, how many blocks it
// found, and one error for those that are damaged, which are lost.
func (t *slots) recover(now time.Duration) (uint64, int, error) {
	committed := t.m.committed()
	var lost error
	var found []int32
	for s := range int32(t.m.slotN) {
		st, full, err := t.m.read(s, t.volume)
		switch {
		case !full:
			continue
		case err != nil:
			t.m.invalidate(s)
			lost = err
			continue
		case st.seq > committed: // its write was never acknowledged
			t.m.invalidate(s)
			continue
		}
		t.lba[s], t.seq[s], t.cover[s], t.crc[s], t.since[s] = st.lba, st.seq, st.seq, st.crc, now
		if old := t.index.get(st.lba); old != none {
			if t.seq[old] > st.seq {
				t.m.invalidate(s)
				continue
			}
			t.m.invalidate(old)
			t.state[old] = free
		}
		t.state[s] = dirty
		t.index.put(st.lba, s)
		found = append(found, s)
	}
	found = slices.DeleteFunc(found, func(s int32) bool { return t.state[s] != dirty })
	slices.SortFunc(found, func(a, b int32) int { return int(int64(t.seq[a] - t.seq[b])) })
	for _, s := range found {
		t.dirty.pushBack(s)
	}
	t.free = slices.DeleteFunc(t.free, func(s int32) bool { return t.state[s] != free })
	return committed, len(found), lost
}
