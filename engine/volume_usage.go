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
	u, err := v.usage(ctx)
	if err != nil {
		return VolumeUsage{}, fmt.Errorf("usage of %s: %w", v.id, err)
	}
	return u, nil
}

func (v *Volume) usage(ctx context.Context) (u VolumeUsage, err error) {
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
