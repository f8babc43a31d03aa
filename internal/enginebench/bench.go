package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
)

// bench runs phases. Each has a directory of its own, which is removed before the next.
type bench struct {
	o     options
	base  string
	out   io.Writer
	notes io.Writer // progress
	began time.Time
	bufs  [][]byte // of entries

	removeOnce sync.Once
	removeErr  error
}

func newBench(o options, out, notes io.Writer) (*bench, error) {
	base, err := os.MkdirTemp(o.dir, "enginebench-")
	if err != nil {
		return nil, err
	}
	return &bench{
		o: o, base: base, out: out, notes: notes, began: time.Now(),
		bufs: payloads(8, max(streamBlocks, o.entryBlocks)*trivet.BlockSize, newRand(1)),
	}, nil
}

// remove removes all that is on the disk.
func (b *bench) remove() error {
	b.removeOnce.Do(func() { b.removeErr = os.RemoveAll(b.base) })
	return b.removeErr
}

// note says what is going on.
func (b *bench) note(format string, args ...any) {
	fmt.Fprintf(b.notes, "%6.1f s  %s\n", time.Since(b.began).Seconds(), fmt.Sprintf(format, args...))
}

func (b *bench) run() error {
	chosen := strings.Split(b.o.phases, ",")
	need := b.o.needBytes(chosen)
	b.note("%s: up to %d MiB of the disk are needed", b.base, need>>20)
	if err := checkRoom(b.base, need); err != nil {
		return err
	}
	fmt.Fprintf(b.out, "volume of %d MiB, %d overwrites in entries of %d blocks, runs %t, segments of %d MiB\n",
		b.o.mib, b.o.overwrites, b.o.entryBlocks, b.o.run, b.o.segmentMiB)
	for _, p := range chosen {
		dir := filepath.Join(b.base, p)
		if err := errors.Join(b.phase(p, dir), os.RemoveAll(dir)); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
	}
	b.note("done")
	return nil
}

func (b *bench) phase(name, dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	switch name {
	case "apply":
		return b.apply(dir)
	case "write":
		return b.write(dir)
	case "read":
		return b.read(dir)
	case "snapshots":
		return b.snapshots(dir)
	case "latency":
		return b.latency(dir)
	}
	return b.crash(dir)
}

// needBytes is the most of the disk that a phase takes. A volume that is written over takes its size in the files
// of its lane, which stay there, and in the data lane what cleaning makes of it, 1/0.7 of its size; the rest is for
// bursts, and for the first segments of all lanes.
func (o *options) needBytes(chosen []string) (need int64) {
	for _, p := range chosen {
		n := 11 * o.mib << 20 / 4
		switch p {
		case "snapshots":
			n = 2*o.snapVolumeBytes()*(1+snapOverwrites) + 2*int64(o.spreadBlocks)*trivet.BlockSize
		case "latency":
			n += int64(o.entries*o.entryBlocks) * trivet.BlockSize
		case "crash":
			n = o.backlogMiB << 20 * 5 / 4
		}
		need = max(need, n+512<<20+10*o.segmentMiB<<20)
	}
	return need
}

func (b *bench) config(dir string) storeConfig {
	return storeConfig{dir: dir, refs: true, segmentBytes: b.o.segmentMiB << 20}
}
