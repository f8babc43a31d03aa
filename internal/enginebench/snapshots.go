package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
)

// snapOverwrites is how often a volume is written over, a part after each of its snapshots.
const snapOverwrites = 2

// snapVolumeBytes is the size of the volumes that are read with and without snapshots.
func (o *options) snapVolumeBytes() int64 { return max(o.mib/4, 1) << 20 }

// snapshots measures freezes and clones, and reads of a volume with many snapshots.
func (b *bench) snapshots(dir string) error {
	few, many, err := b.freezes(filepath.Join(dir, "freezes"))
	if err != nil {
		return err
	}
	with, without, err := b.readsUnder(filepath.Join(dir, "reads"))
	if err != nil {
		return err
	}
	ms := func(ds []time.Duration) float64 { return float64(median(ds).Nanoseconds()) / 1e6 }
	o := &b.o
	sizes := fmt.Sprintf("%g GiB to %g GiB, 1 snapshot", float64(o.largeMiB)/1024, float64(o.smallMiB)/1024)
	counts := fmt.Sprintf("%d snapshots to 1, %g GiB", o.snapshots, float64(o.largeMiB)/1024)
	reads := compared(fmt.Sprintf("4 KiB random reads a second, %d snapshots to none", o.snapshots), 0,
		median(with), median(without), atLeast(0.8))
	reads.ratio = medianRatio(with, without)
	printFigures(b.out, "snapshots", "", []figure{
		compared("freeze, ms: "+sizes, 3, ms(few.large.freeze), ms(few.small.freeze), atMost(2)),
		compared("freeze, ms: "+counts, 3, ms(many.large.freeze), ms(few.large.freeze), atMost(2)),
		compared("clone, ms: "+sizes, 3, ms(few.large.clone), ms(few.small.clone), atMost(2)),
		compared("clone, ms: "+counts, 3, ms(many.large.clone), ms(few.large.clone), atMost(2)),
		reads,
	})
	return nil
}

// snapTimes are those of one volume.
type snapTimes struct{ freeze, clone []time.Duration }

type sizedTimes struct{ small, large snapTimes }

// freezes times freezes and clones of a small and of a large sparse volume with the same number of live blocks, in
// turns: with one snapshot, and with many. Nothing sweeps or flattens meanwhile.
func (b *bench) freezes(dir string) (few, many sizedTimes, err error) {
	cfg := b.config(dir)
	cfg.manual = true
	s, err := openStore(cfg)
	if err != nil {
		return few, many, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	b.note("snapshots: %d times, with one snapshot", b.o.rounds)
	id := volumeID
	var small, large *replica
	for i := range b.o.rounds { // each of new volumes: to delete a snapshot is work of its own
		if small, err = b.spreadVolume(s, id, b.o.smallMiB<<20); err != nil {
			return few, many, err
		}
		if large, err = b.spreadVolume(s, id+1, b.o.largeMiB<<20); err != nil {
			return few, many, err
		}
		for _, r := range []*replica{small, large} {
			if _, err := r.freeze(); err != nil {
				return few, many, err
			}
		}
		if err := few.take(i, small, large, id+2); err != nil {
			return few, many, err
		}
		id += 4
	}
	b.note("snapshots: %d times, with %d snapshots and more", b.o.rounds, b.o.snapshots)
	for _, r := range []*replica{small, large} {
		next := spread(r.blockN, int64(b.o.spreadBlocks))
		for len(r.st.Snapshots) < b.o.snapshots {
			if _, err := r.write(1, b.o.entryBlocks, next, b.bufs); err != nil {
				return few, many, err
			}
			if _, err := r.freeze(); err != nil {
				return few, many, err
			}
		}
	}
	for i := range b.o.rounds {
		if err := many.take(i, small, large, id); err != nil {
			return few, many, err
		}
		id += 2
	}
	return few, many, nil
}

// spreadVolume makes a volume with blocks all over it.
func (b *bench) spreadVolume(s *store, id trivet.VolumeID, sizeBytes int64) (*replica, error) {
	r, err := s.replica(id, sizeBytes)
	if err != nil {
		return nil, err
	}
	n := int64(b.o.spreadBlocks)
	_, err = r.write(n, b.o.entryBlocks, spread(r.blockN, n), b.bufs)
	return r, err
}

// take times the small and the large volume, the other first in every second round.
func (t *sizedTimes) take(round int, small, large *replica, clone trivet.VolumeID) error {
	if round%2 == 0 {
		return errors.Join(t.small.take(small, clone), t.large.take(large, clone+1))
	}
	return errors.Join(t.large.take(large, clone), t.small.take(small, clone+1))
}

// take times one freeze, and one clone of it, which is dropped. The map is flushed before, so that all find alike.
func (t *snapTimes) take(r *replica, clone trivet.VolumeID) error {
	if err := r.s.eng.Flush(); err != nil {
		return err
	}
	took, err := r.freeze()
	if err != nil {
		return err
	}
	t.freeze = append(t.freeze, took)
	base := engine.Base{Volume: r.vol.ID(), Generation: r.st.Generation - 1}
	began := time.Now()
	if err := r.s.eng.CreateClone(clone, replicaID, r.st.SizeBytes, base); err != nil {
		return err
	}
	t.clone = append(t.clone, time.Since(began))
	return r.s.eng.DropVolume(clone)
}

// readsUnder reads two volumes that were written alike, in turns: one with many snapshots, the blocks of which are
// spread over all generations, and one without.
func (b *bench) readsUnder(dir string) (with, without []float64, err error) {
	cfg := b.config(dir)
	cfg.manual = true
	b.note("snapshots: two volumes of %d MiB, one with %d snapshots", b.o.snapVolumeBytes()>>20, b.o.snapshots)
	if err := b.fillForSnapshots(cfg); err != nil {
		return nil, nil, err
	}
	s, err := openStore(cfg)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	frozen, err := s.replica(volumeID, b.o.snapVolumeBytes())
	if err != nil {
		return nil, nil, err
	}
	plain, err := s.replica(volumeID+1, b.o.snapVolumeBytes())
	if err != nil {
		return nil, nil, err
	}
	if n := len(frozen.st.Snapshots); n != b.o.snapshots || len(plain.st.Snapshots) != 0 {
		return nil, nil, fmt.Errorf("volumes have %d and %d snapshots, want %d and none", n, len(plain.st.Snapshots),
			b.o.snapshots)
	}
	s.calm()
	each := max(frozen.blockN, int64(b.o.goroutines))
	b.note("snapshots: %d rounds of %d reads each, %d goroutines", b.o.rounds, each, b.o.goroutines)
	ours, theirs := newReaders(b.o.goroutines), newReaders(b.o.goroutines)
	read := func(rs *readers, r *replica) func() (float64, error) {
		return func() (float64, error) { return rs.rate(each, r.blockN, r.vol.ReadAt) }
	}
	for _, warm := range []func() (float64, error){read(ours, frozen), read(theirs, plain)} {
		if _, err := warm(); err != nil { // both maps are in memory then, as far as they fit
			return nil, nil, err
		}
	}
	return inTurns(b.o.rounds, read(ours, frozen), read(theirs, plain))
}

// fillForSnapshots fills both volumes, and writes them over alike, piece by piece, with a snapshot of one of them
// before each piece.
func (b *bench) fillForSnapshots(cfg storeConfig) (err error) {
	s, err := openStore(cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	var rs [2]*replica
	var next [2]places
	for i := range rs {
		r, err := s.replica(volumeID+trivet.VolumeID(i), b.o.snapVolumeBytes())
		if err != nil {
			return err
		}
		if _, err := r.write(r.blockN, b.o.entryBlocks, inOrder(r.blockN), b.bufs); err != nil {
			return err
		}
		rs[i], next[i] = r, atRandom(r.blockN, newRand(6))
	}
	piece := rs[0].blockN * snapOverwrites / int64(b.o.snapshots)
	for range b.o.snapshots {
		if _, err := rs[0].freeze(); err != nil {
			return err
		}
		for i, r := range rs {
			if _, err := r.entries(piece, b.o.entryBlocks, next[i], b.bufs); err != nil {
				return err
			}
		}
	}
	return s.eng.Flush()
}
