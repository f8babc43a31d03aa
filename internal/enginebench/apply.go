package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/trivet-csi/trivet"
)

// writersN is how many volumes are written at a time in the phase apply, as the prototype's figures were taken
// (design.md, section 8: 8 × 64 KiB).
const writersN = 8

// apply measures logging and applying entries of several volumes at a time, of references and of values: each volume,
// which is full, is written over once. Nothing is cleaned meanwhile.
func (b *bench) apply(dir string) error {
	costs, err := ofBothKinds(b, dir, func(cfg storeConfig, kind string) (cost, error) {
		cfg.manual = true
		return b.appliedAtATime(cfg, kind)
	})
	if err != nil {
		return err
	}
	printFigures(b.out, "log + apply, 8 writers, nothing cleaned", "values", costFigures(costs[0], costs[1]))
	return nil
}

// ofBothKinds measures something of a store of references, and of one of values.
func ofBothKinds[T any](b *bench, dir string, measure func(cfg storeConfig, kind string) (T, error)) (
	res [2]T, err error,
) {
	for i, kind := range []string{"references", "values"} {
		cfg := b.config(filepath.Join(dir, kind))
		cfg.refs = kind == "references"
		if err := os.Mkdir(cfg.dir, 0o700); err != nil {
			return res, err
		}
		if res[i], err = measure(cfg, kind); err != nil {
			return res, fmt.Errorf("%s: %w", kind, err)
		}
		if err := os.RemoveAll(cfg.dir); err != nil {
			return res, err
		}
	}
	return res, nil
}

func (b *bench) appliedAtATime(cfg storeConfig, kind string) (c cost, err error) {
	s, err := openStore(cfg)
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	replicas := make([]*replica, writersN)
	for i := range replicas {
		if replicas[i], err = s.replica(volumeID+trivet.VolumeID(i), b.o.mib<<20/writersN); err != nil {
			return c, err
		}
	}
	b.note("apply: %s: %d volumes are filled", kind, writersN)
	if _, err := b.atATime(replicas, inOrder); err != nil {
		return c, err
	}
	s.calm()
	b.note("apply: %s: over, at random", kind)
	before, err := costNow()
	if err != nil {
		return c, err
	}
	seed := uint64(100)
	done, err := b.atATime(replicas, func(blockN int64) places {
		seed++
		return atRandom(blockN, newRand(seed))
	})
	if err != nil {
		return c, err
	}
	after, err := costNow()
	c = after.since(before)
	c.blocks = done
	return c, err
}

// atATime writes all volumes at a time, as much as they hold, and returns how many blocks that were.
func (b *bench) atATime(replicas []*replica, where func(blockN int64) places) (done int64, err error) {
	var wg sync.WaitGroup
	errs, ns := make([]error, len(replicas)), make([]int64, len(replicas))
	for i, r := range replicas {
		next := where(r.blockN)
		wg.Go(func() { ns[i], errs[i] = r.write(r.blockN, b.o.entryBlocks, next, b.bufs) })
	}
	wg.Wait()
	for _, n := range ns {
		done += n
	}
	return done, errors.Join(errs...)
}
