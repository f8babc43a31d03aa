package main

import (
	"errors"
	"fmt"
	"math"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
)

// orderedPasses is how often the volume is written over in order.
const orderedPasses = 2

// streamBlocks is the least size of entries of writes in order: replication cuts a stream of writes into such of
// 128 KiB.
const streamBlocks = 32

// writeResult is what one kind of store took.
type writeResult struct {
	random     cost
	orderedAmp float64
	randomAmp  float64
	files      int64 // bytes
	usage      engine.LogUsage
}

// write measures overwrites of a full volume, in order and at random, of references and of values.
func (b *bench) write(dir string) error {
	res, err := ofBothKinds(b, dir, b.overwrites)
	if err != nil {
		return err
	}
	b.reportWrites(res[0], res[1])
	return nil
}

// overwrites measures one kind.
func (b *bench) overwrites(cfg storeConfig, kind string) (w writeResult, err error) {
	s, r, err := openOne(cfg, b.o.mib<<20)
	if err != nil {
		return w, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	b.note("write: %s: %d MiB are filled", kind, b.o.mib)
	ordered := inOrder(r.blockN)
	if _, err := r.write(r.blockN, b.o.entryBlocks, ordered, b.bufs); err != nil {
		return w, err
	}
	b.note("write: %s: %d times over, in order", kind, orderedPasses)
	if _, w.orderedAmp, err = b.amplification(r, orderedPasses, max(streamBlocks, b.o.entryBlocks), ordered); err != nil {
		return w, err
	}
	b.note("write: %s: %d times over, at random", kind, b.o.overwrites)
	random := atRandom(r.blockN, newRand(3))
	if b.o.run {
		random = inRuns(r.blockN, newRand(3))
	}
	if w.random, w.randomAmp, err = b.amplification(r, b.o.overwrites, b.o.entryBlocks, random); err != nil {
		return w, err
	}
	if err := s.trim(); err != nil {
		return w, err
	}
	w.usage = s.eng.LogUsage()
	w.files, err = s.files()
	return w, err
}

// amplification writes a volume over, and returns what that cost and how many bytes were written for each one of
// blocks, with what cleaning still owes at the end.
func (b *bench) amplification(r *replica, passes, entryBlocks int, next places) (c cost, amp float64, err error) {
	if err := r.s.settle(); err != nil {
		return c, 0, err
	}
	written := r.s.written()
	before, err := costNow()
	if err != nil {
		return c, 0, err
	}
	done, err := r.write(int64(passes)*r.blockN, entryBlocks, next, b.bufs)
	if err != nil {
		return c, 0, err
	}
	after, err := costNow()
	if err != nil {
		return c, 0, err
	}
	if err := r.s.settle(); err != nil {
		return c, 0, err
	}
	c = after.since(before)
	c.blocks = done
	return c, float64(r.s.written()-written) / float64(done*trivet.BlockSize), nil
}

// spaceRatio is what files take for each byte of live blocks; what the log retains for itself does not count.
func spaceRatio(files int64, u engine.LogUsage) float64 {
	if u.LiveBytes == 0 {
		return math.NaN()
	}
	return float64(files-u.RetainedBytes) / float64(u.LiveBytes)
}

func (b *bench) reportWrites(refs, values writeResult) {
	mib := func(n int64) float64 { return float64(n) / (1 << 20) }
	printFigures(b.out, "write, one writer that waits, cleaned", "values", append(costFigures(refs.random, values.random),
		compared("bytes written for each byte, in order, settled", 2, refs.orderedAmp, values.orderedAmp, valueAtMost(1.15)),
		compared("bytes written for each byte, random, settled", 2, refs.randomAmp, values.randomAmp, valueAtMost(2.2)),
		compared("files, MiB", 0, mib(refs.files), mib(values.files), wanted{}),
		alone("files but for the retained log / live blocks", 2, spaceRatio(refs.files, refs.usage), atMost(1.5)),
		alone("the same without files that are free", 2, spaceRatio(refs.files-refs.usage.FreeBytes, refs.usage), wanted{}),
	))
	u := refs.usage
	fmt.Fprintf(b.out, "of the log, MiB: live %.0f, retained %.0f, garbage and padding %.0f, free files %.0f\n",
		mib(u.LiveBytes), mib(u.RetainedBytes), mib(u.GarbageBytes), mib(u.FreeBytes))
}

// costFigures are what logging and applying blocks takes.
func costFigures(refs, values cost) []figure {
	us := func(c cost) float64 { return float64(c.cpu.Nanoseconds()) / 1e3 / float64(c.blocks) }
	rate := func(c cost) float64 { return float64(c.blocks*trivet.BlockSize) / 1e6 / c.wall.Seconds() }
	mallocs := func(c cost) float64 { return float64(c.mallocs) / float64(c.blocks) }
	return []figure{
		compared("log + apply, MB/s", 1, rate(refs), rate(values), atLeast(1.5)),
		compared("CPU a block, µs", 2, us(refs), us(values), valueAtMost(9)),
		compared("allocations a block", 2, mallocs(refs), mallocs(values), valueAtMost(0)),
	}
}
