package engine

import (
	"encoding/binary"
	"fmt"
	"sort"

	"github.com/trivet-csi/trivet"
)

// SnapshotsMax bounds the snapshots that one volume keeps.
const SnapshotsMax = 1024

// Live is the generation to ask for what the volume shows now. It is not 0: generation 0 is a snapshot's as any
// other may be, that of a snapshot taken before the first.
const Live = ^trivet.Generation(0)

// Snapshot is a generation that is kept: what the volume showed when the next one began. Its ID is the caller's.
type Snapshot struct {
	ID         uint64
	Generation trivet.Generation
}

// snapshotAt finds the snapshot that holds a generation.
func (s *State) snapshotAt(gen trivet.Generation) (Snapshot, bool) {
	i := sort.Search(len(s.Snapshots), func(i int) bool { return s.Snapshots[i].Generation >= gen })
	if i == len(s.Snapshots) || s.Snapshots[i].Generation != gen {
		return Snapshot{}, false
	}
	return s.Snapshots[i], true
}

// checkSnapshots returns ErrInvalid when they do not rise by generation, up to below that of the volume.
func (s *State) checkSnapshots() error {
	if len(s.Snapshots) > SnapshotsMax {
		return fmt.Errorf("%d snapshots, want at most %d: %w", len(s.Snapshots), SnapshotsMax, trivet.ErrInvalid)
	}
	for i, x := range s.Snapshots {
		if x.Generation >= s.Generation || i > 0 && x.Generation <= s.Snapshots[i-1].Generation {
			return fmt.Errorf("snapshot %d holds generation %d of a volume at %d, after %v: %w", x.ID, x.Generation,
				s.Generation, s.Snapshots[:i], trivet.ErrInvalid)
		}
	}
	return nil
}

// sameN is how many snapshots both begin with: all of them but in commits that take or delete one, so that others do
// not have to look for each.
func (s *State) sameN(old *State) (n int) {
	for n < len(s.Snapshots) && n < len(old.Snapshots) && s.Snapshots[n] == old.Snapshots[n] {
		n++
	}
	return n
}

// keepsAllOf reports whether every generation that old keeps is kept.
func (s *State) keepsAllOf(old *State) bool {
	for _, x := range old.Snapshots[s.sameN(old):] {
		if _, kept := s.snapshotAt(x.Generation); !kept {
			return false
		}
	}
	return true
}

// snapshotsFollow returns ErrInvalid for a snapshot that nothing was kept for: one that appears has the generation that
// ends with this commit, and one that stays has its ID.
func (s *State) snapshotsFollow(old *State) error {
	for _, x := range s.Snapshots[s.sameN(old):] {
		had, ok := old.snapshotAt(x.Generation)
		if ok && had.ID != x.ID || !ok && x.Generation != old.Generation {
			return fmt.Errorf("snapshot %d appears at generation %d of a volume at %d, held by %v: %w", x.ID, x.Generation,
				old.Generation, old.Snapshots, trivet.ErrInvalid)
		}
	}
	return nil
}

// Base is what a volume shows where it has no block of its own.
type Base struct {
	Volume     trivet.VolumeID
	Generation trivet.Generation // of that volume
}

// layer is a run of generations of a volume, from one up to the next layer, with what lies beneath: a block that none
// of these generations has is shown as the base shows it. Beneath the first generation nothing lies without a layer.
// Layers are a matter of one replica: flattening takes them away, on each disk at its own pace.
type layer struct {
	from   trivet.Generation
	base   Base
	blockN int64 // what the base has from there on is not shown
}

const (
	layerBytes    = 4 + 8 + 4 + 8
	snapshotBytes = 8 + 4

	// layersMax bounds what a record is read with. A layer without a generation that anybody may look at is taken away,
	// so there are at most as many as snapshots, twice, and the live state.
	layersMax = 2*SnapshotsMax + 2
)

// appendSnapshots and appendLayers append the number of items (2) and each item, as the record has it.
func appendSnapshots(dst []byte, ss []Snapshot) []byte {
	be := binary.BigEndian
	dst = be.AppendUint16(dst, uint16(len(ss)))
	for _, s := range ss {
		dst = be.AppendUint32(be.AppendUint64(dst, s.ID), uint32(s.Generation))
	}
	return dst
}

func appendLayers(dst []byte, ls []layer) []byte {
	be := binary.BigEndian
	dst = be.AppendUint16(dst, uint16(len(ls)))
	for _, l := range ls {
		dst = be.AppendUint64(be.AppendUint32(dst, uint32(l.from)), uint64(l.base.Volume))
		dst = be.AppendUint64(be.AppendUint32(dst, uint32(l.base.Generation)), uint64(l.blockN))
	}
	return dst
}

// cutItems cuts a number (2), and as many items of a size, off b; none is nil.
func cutItems[T any](b []byte, size, most int, item func(b []byte) T) (xs []T, rest []byte, ok bool) {
	if len(b) < 2 {
		return nil, nil, false
	}
	n := int(binary.BigEndian.Uint16(b))
	if b = b[2:]; n > most || len(b) < n*size {
		return nil, nil, false
	}
	for range n {
		xs = append(xs, item(b))
		b = b[size:]
	}
	return xs, b, true
}

func decodeSnapshot(b []byte) Snapshot {
	return Snapshot{binary.BigEndian.Uint64(b), trivet.Generation(binary.BigEndian.Uint32(b[8:]))}
}

func decodeLayer(b []byte) layer {
	be := binary.BigEndian
	return layer{
		from:   trivet.Generation(be.Uint32(b)),
		base:   Base{trivet.VolumeID(be.Uint64(b[4:])), trivet.Generation(be.Uint32(b[12:]))},
		blockN: int64(be.Uint64(b[16:])),
	}
}

// checkLayers returns ErrCorrupt for layers that no volume has: they rise, only the first may be of another volume, and
// then lies beneath everything, and the others show what is older than they are.
func checkLayers(id trivet.VolumeID, s *State, ls []layer) error {
	for i, l := range ls {
		self := l.base.Volume == id
		if i > 0 && l.from <= ls[i-1].from || l.from > s.Generation || self && l.base.Generation >= l.from ||
			!self && l.from != 0 || l.blockN <= 0 || l.blockN > lbaMax {
			return fmt.Errorf("layers %v of %s at generation %d: %w", ls, id, s.Generation, trivet.ErrCorrupt)
		}
	}
	return nil
}
