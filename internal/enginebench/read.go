package main

import (
	"errors"
	"math"
	"os"
	"path/filepath"

	"github.com/trivet-csi/trivet"
)

// plainChunkBytes is how much of the plain file is written at once.
const plainChunkBytes = 1 << 20

// read measures single blocks at random places of a volume that was written at random, the map cold at first, in turns
// with reads of a plain file.
func (b *bench) read(dir string) (err error) {
	cfg := b.config(filepath.Join(dir, "store"))
	if err := os.Mkdir(cfg.dir, 0o700); err != nil {
		return err
	}
	b.note("read: a store of %d MiB is written, in order and at random", b.o.mib)
	if err := b.fillForReads(cfg); err != nil {
		return err
	}
	b.note("read: a plain file of %d MiB is written", b.o.mib)
	plain, err := plainFile(filepath.Join(dir, "plain"), b.o.mib<<20)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, plain.Close()) }()
	cfg.manual = true // nothing but the reads
	s, r, err := openOne(cfg, b.o.mib<<20)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	s.calm()
	if err := forget(dir); err != nil {
		return err
	}
	each := max(r.blockN/2/int64(b.o.rounds), int64(b.o.goroutines))
	b.note("read: %d rounds of %d blocks each, %d goroutines", b.o.rounds, each, b.o.goroutines)
	fromDisk, ours := int64(0), newReaders(b.o.goroutines)
	theirs := newReaders(b.o.goroutines)
	engine, file, err := inTurns(b.o.rounds, func() (float64, error) {
		before, err := readBytes()
		if err != nil {
			return 0, err
		}
		rate, err := ours.rate(each, r.blockN, r.vol.ReadAt)
		after, ioErr := readBytes()
		fromDisk += after - before
		return rate, errors.Join(err, ioErr)
	}, func() (float64, error) {
		return theirs.rate(each, r.blockN, func(p []byte, lba trivet.LBA) error {
			_, err := plain.ReadAt(p, int64(lba)*trivet.BlockSize)
			return err
		})
	})
	if err != nil {
		return err
	}
	perRound := max(each/int64(b.o.goroutines), 1) * int64(b.o.goroutines)
	got := compared("4 KiB random reads a second, median", 0, median(engine), median(file), atLeast(0.7))
	got.ratio = medianRatio(engine, file)
	printFigures(b.out, "cold reads, many at a time", "O_DIRECT", []figure{
		alone("bytes read from the disk for each byte returned", 3,
			perByte(fromDisk, perRound*int64(b.o.rounds)*trivet.BlockSize), atMost(1.1)),
		got,
	})
	return nil
}

// perByte is what was read for each byte; a filesystem that does not count gives nothing.
func perByte(fromDisk, returned int64) float64 {
	if fromDisk == 0 {
		return math.NaN()
	}
	return float64(fromDisk) / float64(returned)
}

func (b *bench) fillForReads(cfg storeConfig) (err error) {
	s, r, err := openOne(cfg, b.o.mib<<20)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if _, err := r.write(r.blockN, b.o.entryBlocks, inOrder(r.blockN), b.bufs); err != nil {
		return err
	}
	if _, err := r.write(r.blockN, b.o.entryBlocks, atRandom(r.blockN, newRand(4)), b.bufs); err != nil {
		return err
	}
	if err := s.settle(); err != nil {
		return err
	}
	_, err = s.log.Shrink(math.MaxInt) // what filling took and cleaning gave back is room for the plain file
	return err
}

// plainFile makes a file of random content, and opens it past the page cache.
func plainFile(path string, sizeBytes int64) (_ *os.File, err error) {
	f, err := directFile(path, os.O_CREATE|os.O_EXCL)
	if err != nil {
		return nil, err
	}
	chunk := payloads(1, plainChunkBytes, newRand(5))[0]
	for off := int64(0); off < sizeBytes && err == nil; off += plainChunkBytes {
		_, err = f.WriteAt(chunk[:min(plainChunkBytes, sizeBytes-off)], off)
	}
	if err = errors.Join(err, f.Sync()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
