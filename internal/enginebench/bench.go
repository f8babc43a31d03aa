package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/engine/segment"
)

const (
	volumeID = trivet.VolumeID(1)
	replica  = trivet.ReplicaID("00000000-0000-4000-8000-000000000001")
	diskID   = trivet.DiskID("00000000-0000-4000-8000-000000000002")

	// retainedN entries stay in the log behind what is durable, and it is cut each trimN entries, as raftgroup does
	// in bytes: 64 MiB of entries of 64 KiB.
	retainedN = 1024
	trimN     = 1024
)

type options struct {
	dir         string
	mib         int64
	overwrites  int
	entryBlocks int
	run         bool
	openBlocks  int
}

// store is a log and an engine on it.
type store struct {
	refs bool
	dir  string
	log  *segment.Log
	eng  *engine.Engine
	vol  *engine.Volume
	grp  *segment.Group
	rng  *rand.Rand
}

func openStore(dir string, refs bool, sizeBytes int64) (*store, error) {
	opts := segment.Options{
		Dir: segment.NewOSDir(filepath.Join(dir, "log")), Disk: diskID, Lanes: 4, SegmentBytes: 16 << 20,
		DataLane: refs, Hold: refs,
	}
	log, err := segment.Open(opts)
	if errors.Is(err, trivet.ErrNotFound) {
		if err = segment.Format(opts); err == nil {
			log, err = segment.Open(opts)
		}
	}
	if err != nil {
		return nil, err
	}
	s := &store{refs: refs, dir: dir, log: log, grp: log.Group(volumeID), rng: rand.New(rand.NewPCG(1, 2))}
	cfg := engine.Config{Dir: filepath.Join(dir, "engine"), Fatal: func(err error) { panic(err) }}
	if refs {
		cfg.Log = log
	}
	if s.eng, err = engine.Open(cfg); err != nil {
		return nil, errors.Join(err, log.Close())
	}
	if err = s.eng.CreateVolume(volumeID, replica, sizeBytes); err == nil {
		s.vol, err = s.eng.OpenVolume(volumeID)
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *store) close() error { return errors.Join(s.eng.Close(), s.log.Close()) }

// entry appends one entry with blocks at lbas, and applies it, as a replica does.
func (s *store) entry(lbas []trivet.LBA, payload []byte) error {
	st := s.vol.State()
	st.AppliedIndex++
	st.AppliedTerm = 1
	e := segment.Entry{Index: st.AppliedIndex, Term: 1, Payload: payload}
	if err := s.grp.Append([]segment.Entry{e}); err != nil {
		return err
	}
	at, err := s.grp.Locate(st.AppliedIndex)
	if err != nil {
		return err
	}
	defer s.log.Unpin(at.Segment)
	if !s.refs {
		at.Bytes = 0
	}
	b := s.vol.NewBatch()
	for i, lba := range lbas {
		from := i * trivet.BlockSize
		if err := b.Refer(lba, payload[from:from+trivet.BlockSize], at, int64(from)); err != nil {
			return errors.Join(err, b.Close())
		}
	}
	if err := b.Commit(st); err != nil {
		return err
	}
	if st.AppliedIndex%trimN == 0 {
		return s.trim(st.AppliedIndex)
	}
	return nil
}

func (s *store) trim(index uint64) error {
	if err := s.eng.Flush(); err != nil {
		return err
	}
	if index <= retainedN {
		return nil
	}
	return s.grp.TrimPrefix(index - retainedN)
}

// cost is what a phase took.
type cost struct {
	blocks  int64
	wall    time.Duration
	cpu     time.Duration
	mallocs uint64
}

func snapshot() (cost, error) {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return cost{}, err
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return cost{
		wall: time.Duration(time.Now().UnixNano()), cpu: time.Duration(u.Utime.Nano() + u.Stime.Nano()),
		mallocs: m.Mallocs,
	}, nil
}

func (c cost) since(b cost) cost {
	return cost{blocks: c.blocks, wall: c.wall - b.wall, cpu: c.cpu - b.cpu, mallocs: c.mallocs - b.mallocs}
}

// payloads are buffers of random content: the log keeps an entry's until it is evicted, so they are never written
// again.
func payloads(n, bytes int, rng *rand.Rand) [][]byte {
	out := make([][]byte, n)
	for i := range out {
		out[i] = segment.Buffer(int64(bytes))
		for k := 0; k < bytes; k += 8 {
			x := rng.Uint64()
			for j := range 8 {
				out[i][k+j] = byte(x >> (8 * j))
			}
		}
	}
	return out
}

// overwrite writes n blocks in entries.
func (s *store) overwrite(o options, n int64) (cost, error) {
	total := o.mib << 20 / trivet.BlockSize
	bufs := payloads(8, o.entryBlocks*trivet.BlockSize, s.rng)
	lbas := make([]trivet.LBA, o.entryBlocks)
	before, err := snapshot()
	if err != nil {
		return cost{}, err
	}
	done := int64(0)
	for i := 0; done < n; i++ {
		first := trivet.LBA(s.rng.Int64N(total - int64(o.entryBlocks) + 1))
		for k := range lbas {
			lbas[k] = first + trivet.LBA(k)
			if !o.run {
				lbas[k] = trivet.LBA(s.rng.Int64N(total))
			}
		}
		if err := s.entry(lbas, bufs[i%len(bufs)]); err != nil {
			return cost{}, err
		}
		done += int64(o.entryBlocks)
	}
	if err := s.eng.Flush(); err != nil {
		return cost{}, err
	}
	after, err := snapshot()
	after.blocks = done
	return after.since(before), err
}

// written is what the log and the store have written, in bytes.
func (s *store) written() int64 {
	n := s.eng.WrittenBytes()
	for _, l := range s.log.Stats() {
		n += l.WrittenBytes
	}
	return n
}

// space is what the files take.
func (s *store) space() (n int64, err error) {
	err = filepath.Walk(s.dir, func(_ string, info os.FileInfo, err error) error {
		if err == nil && !info.IsDir() {
			n += info.Size()
		}
		if errors.Is(err, os.ErrNotExist) {
			return nil // compacted away meanwhile
		}
		return err
	})
	return n, err
}

type result struct {
	write    cost
	amp      float64
	space    int64
	usage    engine.LogUsage
	openTook time.Duration
}

func bench(o options) error {
	base, err := os.MkdirTemp(o.dir, "enginebench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(base) //nolint:errcheck // nothing of it is needed
	var res [2]result
	for i, refs := range []bool{true, false} {
		if res[i], err = measure(filepath.Join(base, fmt.Sprint(i)), refs, o); err != nil {
			return err
		}
	}
	report(o, res[0], res[1])
	return nil
}

func measure(dir string, refs bool, o options) (r result, err error) {
	s, err := openStore(dir, refs, o.mib<<20)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	total := o.mib << 20 / trivet.BlockSize
	fill := o
	fill.run = true
	if _, err := s.overwrite(fill, total); err != nil { // mostly there, and the caches are warm
		return r, err
	}
	before := s.written()
	if r.write, err = s.overwrite(o, int64(o.overwrites)*total); err != nil {
		return r, err
	}
	for range 64 { // settled: what cleaning still owes counts
		stats, err := s.eng.Clean()
		if err != nil {
			return r, err
		}
		if stats.CopiedBytes == 0 {
			break
		}
	}
	r.amp = float64(s.written()-before) / float64(r.write.blocks*trivet.BlockSize)
	if r.space, err = s.space(); err != nil {
		return r, err
	}
	r.usage = s.eng.LogUsage()
	if refs {
		r.openTook, err = openTime(dir+"-open", o)
	}
	return r, err
}

// openTime makes a store of many live blocks and times its start. The blocks stand in few places: a start reads the
// map only.
func openTime(dir string, o options) (time.Duration, error) {
	s, err := openStore(dir, true, 100<<30)
	if err != nil {
		return 0, err
	}
	p := payloads(1, 16*trivet.BlockSize, s.rng)[0]
	step := trivet.LBA(100<<30/trivet.BlockSize) / trivet.LBA(o.openBlocks)
	lbas := make([]trivet.LBA, 16)
	for k := 0; k < o.openBlocks; k += len(lbas) {
		for i := range lbas {
			lbas[i] = trivet.LBA(k+i) * step
		}
		if k == 0 {
			err = s.entry(lbas, p)
		} else {
			err = s.again(lbas, p)
		}
		if err != nil {
			return 0, errors.Join(err, s.close())
		}
	}
	if err := s.close(); err != nil {
		return 0, err
	}
	began := time.Now()
	if s, err = openStore(dir, true, 100<<30); err != nil {
		return 0, err
	}
	took := time.Since(began)
	return took, s.close()
}

// again applies an entry whose blocks stand where those of the first do.
func (s *store) again(lbas []trivet.LBA, payload []byte) error {
	at, err := s.grp.Locate(1)
	if err != nil {
		return err
	}
	defer s.log.Unpin(at.Segment)
	st := s.vol.State()
	st.AppliedIndex++
	b := s.vol.NewBatch()
	for i, lba := range lbas {
		from := i * trivet.BlockSize
		if err := b.Refer(lba, payload[from:from+trivet.BlockSize], at, int64(from)); err != nil {
			return errors.Join(err, b.Close())
		}
	}
	return b.Commit(st)
}

func report(o options, refs, values result) {
	row := func(what string, a, b float64, format string) {
		ratio := "-"
		if b != 0 {
			ratio = fmt.Sprintf("%.2f", a/b)
		}
		fmt.Fprintf(os.Stdout, "%-44s "+format+"  "+format+"  %6s\n", what, a, b, ratio)
	}
	us := func(c cost) float64 { return float64(c.cpu.Microseconds()) / float64(c.blocks) }
	rate := func(c cost) float64 { return float64(c.blocks*trivet.BlockSize) / 1e6 / c.wall.Seconds() }
	mallocs := func(c cost) float64 { return float64(c.mallocs) / float64(c.blocks) }
	fmt.Fprintf(os.Stdout, "volume of %d MiB, %d overwrites in entries of %d blocks, runs %t\n",
		o.mib, o.overwrites, o.entryBlocks, o.run)
	fmt.Fprintf(os.Stdout, "%-44s %9s  %9s  %6s\n", "", "refs", "values", "ratio")
	row("log + apply, MB/s (one writer, waits)", rate(refs.write), rate(values.write), "%9.1f")
	row("CPU a block, µs, cleaning included", us(refs.write), us(values.write), "%9.2f")
	row("allocations a block", mallocs(refs.write), mallocs(values.write), "%9.2f")
	row("bytes written for each byte, settled", refs.amp, values.amp, "%9.2f")
	row("files, MiB", float64(refs.space)/(1<<20), float64(values.space)/(1<<20), "%9.0f")
	u, mib := refs.usage, func(n int64) float64 { return float64(n) / (1 << 20) }
	fmt.Fprintf(os.Stdout, "of the log, MiB: live %.0f, retained %.0f, garbage and padding %.0f, free files %.0f\n",
		mib(u.LiveBytes), mib(u.RetainedBytes), mib(u.GarbageBytes), mib(u.FreeBytes))
	row(fmt.Sprintf("start with %d live blocks, s", o.openBlocks), refs.openTook.Seconds(), 0, "%9.2f")
}
