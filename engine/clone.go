package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

// cloneDepthMax bounds how many volumes lie beneath one another: a read of the topmost may look at all of them.
const cloneDepthMax = 8

// CreateClone is CreateVolume of a volume that begins with what a snapshot of another one on this disk shows, up to
// sizeBytes. It costs the same whatever that is: blocks are looked up beneath, until the background has taken over the
// references to them (Flattened). Until then the other volume cannot be dropped, nor restored, and keeps what the clone
// shows even if the snapshot is deleted. ErrUnavailable: the other volume is not on this disk, has no such snapshot yet
// or any more, is being restored, or lies on too many others: try again, or elsewhere.
func (e *Engine) CreateClone(id trivet.VolumeID, replica trivet.ReplicaID, sizeBytes int64, base Base) error {
	l := layer{base: base, blockN: sizeBytes / trivet.BlockSize}
	if err := e.createVolume(id, replica, sizeBytes, []layer{l}); err != nil {
		return fmt.Errorf("create %s for replica %s as clone of %s, generation %d: %w", id, replica, base.Volume,
			base.Generation, err)
	}
	return nil
}

// lockBase keeps what is to lie beneath a new volume as it is until unlock is called. REQUIRES: entered; e.mu.
func (e *Engine) lockBase(id trivet.VolumeID, base Base) (unlock func(), err error) {
	if base.Volume == id {
		return nil, fmt.Errorf("clone of itself: %w", trivet.ErrInvalid)
	}
	v, err := e.openVolumeLocked(base.Volume)
	if errors.Is(err, trivet.ErrNotFound) {
		return nil, fmt.Errorf("%s is not on this disk: %w", base.Volume, trivet.ErrUnavailable)
	}
	if err != nil {
		return nil, err
	}
	v.applyMu.Lock()
	v.mu.Lock()
	defer v.mu.Unlock()
	_, kept := v.rec.state.snapshotAt(base.Generation)
	if v.rec.restoring || !kept {
		v.applyMu.Unlock()
		return nil, fmt.Errorf("%s keeps %v, restoring %t: %w", base.Volume, v.rec.state.Snapshots, v.rec.restoring,
			trivet.ErrUnavailable)
	}
	if n, err := e.depth(v.rec.layers, base.Volume); err != nil || n >= cloneDepthMax {
		v.applyMu.Unlock()
		return nil, errors.Join(err, fmt.Errorf("%d volumes lie beneath it: %w", n, trivet.ErrUnavailable))
	}
	return v.applyMu.Unlock, nil
}

// depth counts the volumes beneath one.
func (e *Engine) depth(layers []layer, id trivet.VolumeID) (n int, err error) {
	for len(layers) > 0 && layers[0].base.Volume != id && n < cloneDepthMax {
		id = layers[0].base.Volume
		r, err := readRecord(e.db, nil, id)
		if err != nil {
			return n, err
		}
		layers, n = r.layers, n+1
	}
	return n, nil
}

// Flattened reports whether the volume shows nothing but its own blocks: no other volume lies beneath it, and it is
// not looked up beneath a rollback.
func (v *Volume) Flattened() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.rec.layers) == 0
}

// Bases are the generations of other volumes that lie beneath this one.
func (v *Volume) Bases() (out []Base) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, l := range v.rec.layers {
		if l.base.Volume != v.id {
			out = append(out, l.base)
		}
	}
	return out
}

// Flatten does now, at full speed, what the background does: it returns once Flattened. No data are copied.
func (v *Volume) Flatten(ctx context.Context) error {
	for !v.Flattened() {
		err := ctx.Err()
		done := false
		if err == nil {
			_, done, err = v.sweepSome()
		}
		if err == nil && done && !v.Flattened() {
			err = fmt.Errorf("dropped, or restore is not complete: %w", trivet.ErrUnavailable)
		}
		if err != nil {
			return fmt.Errorf("flatten %s: %w", v.id, err)
		}
	}
	return nil
}

// flattenSome makes some of the blocks that the lowest layer shows the volume's own, at the first generation of that
// layer: its references then say what the layer did. After the last it takes the layer away. It returns how many
// versions it looked at. It may be interrupted anywhere, and begins anew after a restart: what is there is left.
// REQUIRES: entered; applyMu; r is the record, with a layer.
func (v *Volume) flattenSome(r *record) (n int, err error) {
	hold := v.e.live.hold() // before the snapshot
	defer v.e.live.end(hold)
	snap := v.e.db.NewSnapshot()
	defer func() { err = errors.Join(err, toErr(snap.Close())) }()
	w, err := walk(snap, v.id, r.layers, v.flatAt, lbaMax, nil)
	if err != nil {
		return 0, err
	}
	defer func() { err = w.close(err) }()
	f := &flattener{v: v, w: w, b: v.e.newBatch(), low: r.layers[0]}
	defer func() { _ = f.b.Close() }() // memory only
	for _, gen := range v.asked(r) {
		if l, ok := layerOf(r.layers, gen); ok && l == f.low {
			f.gens = append(f.gens, gen)
		}
	}
	for ; n < sweepChunkN && len(f.gens) > 0; n += len(w.vs) + 1 {
		ok, err := w.next()
		if err == nil && ok {
			err = f.block()
		}
		if err != nil {
			return n, err
		}
		if !ok {
			break
		}
	}
	if n < sweepChunkN || len(f.gens) == 0 {
		return n, v.flattened(f, r)
	}
	if err := f.apply(nil); err != nil {
		return n, err
	}
	v.flatAt = w.lba + 1
	return n, nil
}

// flattened takes the lowest layer away, with the last of its blocks.
func (v *Volume) flattened(f *flattener, r *record) error {
	next := *r
	next.layers, next.sweep = slices.Clone(r.layers[1:]), true
	if err := f.apply(&next); err != nil {
		return err
	}
	v.flatAt = 0
	if len(next.layers) == 0 {
		v.layout.Add(1) // after: who looks at one version of a block from now on finds it
	}
	v.owe(true, nil)
	v.e.release(v.id, r.layers[:1])
	return nil
}

// release counts layers off that lie beneath a volume no more, and has swept what was kept for them.
func (e *Engine) release(id trivet.VolumeID, layers []layer) {
	for _, base := range e.bases.add(id, layers, -1) {
		e.sweeper.owedAll(base)
	}
}

// flattener makes one batch of flattenSome.
type flattener struct {
	v    *Volume
	w    *walker
	b    *pebble.Batch
	low  layer
	gens []trivet.Generation // that are asked for and look at the layer first

	placed []placed
}

// placed is a version that a batch puts, of a block that stands in the log.
type placed struct {
	lba trivet.LBA
	gen trivet.Generation
	at  ref
}

// block puts what the layer shows of the walker's block, if a generation shows it: its reference, or a tombstone where
// it shows nothing and an older version would come through.
func (f *flattener) block() error {
	w := f.w
	falls := slices.ContainsFunc(f.gens, func(gen trivet.Generation) bool {
		i := slices.IndexFunc(w.vs, func(x version) bool { return x.gen <= gen })
		return i < 0 || w.vs[i].gen < f.low.from
	})
	if !falls {
		return nil
	}
	x := w.below
	if f.low.base.Volume == w.id {
		x = w.content(f.low.base.Generation)
	}
	key := appendBlockKey(nil, w.id, w.lba, f.low.from)
	if x == nil {
		if len(w.vs) == 0 || w.vs[len(w.vs)-1].gen >= f.low.from {
			return nil
		}
		val := make([]byte, valueHeadBytes)
		putTombstone(val, place(key))
		return f.b.Set(key, val, nil)
	}
	if isRef(x.val) {
		at, _, err := decodeRef(x.val, blockKey{w.id, w.lba, f.low.from})
		if err != nil {
			return err
		}
		f.placed = append(f.placed, placed{w.lba, f.low.from, at})
	}
	return f.b.Set(key, x.val, nil)
}

// apply applies the batch, with a record when next is not nil, and counts what it puts.
func (f *flattener) apply(next *record) error {
	live := f.v.e.live
	if live == nil {
		return f.v.applyLocked(f.b, next, nil)
	}
	var claims []*segLive
	defer func() { live.unclaim(claims) }()
	seen := map[segment.ID]bool{}
	for _, x := range f.placed {
		if seen[x.at.seg] {
			continue
		}
		s, err := live.claim(x.at.seg) // it is still there: the hold is older than what was read
		if err != nil {
			return err
		}
		seen[x.at.seg], claims = true, append(claims, s)
	}
	return f.v.applyLocked(f.b, next, func() { live.put(f.v.id, f.placed) })
}

// put counts versions of blocks that a batch has added where there were none. The segments are claimed.
func (l *live) put(id trivet.VolumeID, xs []placed) {
	l.mu.Lock()
	defer l.mu.Unlock()
	v := l.volLocked(id)
	for _, x := range xs {
		s := l.segs[x.at.seg]
		l.countLocked(v, s, 1)
		if x.gen == v.gen {
			v.swap(x.lba, s.ord)
		} else {
			v.whole = false
		}
	}
}

// Rollback makes the volume, from the commit of this batch on, show what a snapshot shows; the snapshots stay. It must
// be the last thing in the batch, whose State has a higher Generation, and costs the same whatever has changed: the
// background removes what nobody shows any more. ErrNotFound: no snapshot holds the generation.
func (b *Batch) Rollback(gen trivet.Generation) error {
	err := b.touch(0, 0, 0)
	if err == nil {
		b.v.mu.Lock()
		_, kept := b.v.rec.state.snapshotAt(gen)
		b.v.mu.Unlock()
		if b.back = new(gen); !kept {
			b.back, err = nil, fmt.Errorf("no snapshot holds it: %w", trivet.ErrNotFound)
		}
	}
	if err != nil {
		return fmt.Errorf("roll %s back to generation %d: %w", b.v.id, gen, err)
	}
	return nil
}

// rolledBack are the layers of a volume after a rollback, without those that no generation looks at that is asked for.
func (v *Volume) rolledBack(next *record, to trivet.Generation) []layer {
	all := append(slices.Clone(next.layers), layer{next.state.Generation, Base{v.id, to}, lbaMax})
	asked := v.e.bases.of(next.state.shownGenerations(), v.id)
	var out []layer
	for i := len(all) - 1; i >= 0; i-- {
		if !slices.ContainsFunc(asked, func(gen trivet.Generation) bool {
			l, ok := layerOf(all, gen)
			return ok && l == all[i]
		}) {
			continue
		}
		out = append(out, all[i])
		if all[i].base.Volume == v.id {
			asked = append(asked, all[i].base.Generation)
		}
	}
	slices.Reverse(out)
	return out
}
