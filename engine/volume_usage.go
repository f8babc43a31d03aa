package engine

import (
	"context"
	"errors"
	"fmt"

	"github.com/trivet-csi/trivet"
)

// VolumeUsage says what the blocks of a volume are there for, in bytes of data: whole blocks, tombstones and the map
// not counted. LiveBytes + SnapshotBytes - SharedBytes + OtherBytes is what the volume has in the log or the store.
// A place in the log that a clone was flattened to counts for both volumes.
type VolumeUsage struct {
	LiveBytes     int64 // what the live state shows
	SnapshotBytes int64 // what snapshots show and the live state does not; one content of a block counts once
	SharedBytes   int64 // of these, what is another volume's, looked up beneath until it is flattened
	OtherBytes    int64 // what neither shows: to be swept, or kept for clones
}

// Usage counts now, exactly, as of one moment. It reads the map of the volume, half a microsecond for each version of a
// block, and no data. Errors as of Digest, and that of ctx.
func (v *Volume) Usage(ctx context.Context) (VolumeUsage, error) {
	u, _, err := v.UsageOfSnapshots(ctx)
	return u, err
}

// UsageOfSnapshots is Usage and, for each generation that a snapshot holds, the bytes that nothing else shows, neither
// another snapshot nor the live state: what comes back when that snapshot alone is deleted. Several that show the same
// old blocks have none of them to themselves; SnapshotBytes counts them once.
func (v *Volume) UsageOfSnapshots(ctx context.Context) (VolumeUsage, map[trivet.Generation]int64, error) {
	alone := map[trivet.Generation]int64{}
	u, err := v.usage(ctx, alone)
	if err != nil {
		return VolumeUsage{}, nil, fmt.Errorf("usage of %s: %w", v.id, err)
	}
	return u, alone, nil
}

func (v *Volume) usage(ctx context.Context, alone map[trivet.Generation]int64) (u VolumeUsage, err error) {
	if err := v.e.enter(); err != nil {
		return u, err
	}
	defer v.e.exit()
	snap := v.e.db.NewSnapshot()
	defer func() { err = errors.Join(err, toErr(snap.Close())) }()
	w, r, err := v.pinnedWalk(snap)
	if err != nil {
		return u, err
	}
	defer func() { err = w.close(err) }()
	gens := r.state.shownGenerations()
	for _, gen := range gens[1:] {
		alone[gen] = 0
	}
	var shown []content
	for i := 0; ; i++ {
		if i%sweepChunkN == 0 && ctx.Err() != nil {
			return u, ctx.Err()
		}
		ok, err := w.next()
		if err != nil || !ok {
			return u, err
		}
		shown = w.contents(shown[:0], gens)
		u.add(w, shown)
		addAlone(alone, w, shown)
	}
}

// addAlone counts one block for the snapshots that alone show what they show of it.
func addAlone(alone map[trivet.Generation]int64, w *walker, shown []content) {
	for k := range shown {
		c := &shown[k]
		if c.newest != c.oldest || c.newest == Live || c.x == nil || c.x == w.below {
			continue
		}
		again := false // after a rollback
		for i := range shown {
			again = again || i != k && shown[i].x == c.x
		}
		if !again {
			alone[c.newest] += trivet.BlockSize
		}
	}
}

// add counts one block, of which generations show contents, the live one first.
func (u *VolumeUsage) add(w *walker, shown []content) {
	for i := range w.vs {
		if !w.vs[i].isTombstone() {
			u.OtherBytes += trivet.BlockSize // until it turns out to be shown
		}
	}
	seen := func(k int) bool { // a rollback has one content shown again after another
		for i := range shown[:k] {
			if shown[i].x == shown[k].x {
				return true
			}
		}
		return false
	}
	for k := range shown {
		x := shown[k].x
		if x == nil || seen(k) {
			continue
		}
		if k == 0 {
			u.LiveBytes += trivet.BlockSize
		} else {
			u.SnapshotBytes += trivet.BlockSize
		}
		if x == w.below {
			u.SharedBytes += trivet.BlockSize
		} else {
			u.OtherBytes -= trivet.BlockSize
		}
	}
}
