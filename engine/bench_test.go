package engine_test

import (
	"bytes"
	"io"
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/engine/segment"
)

const benchBlocksN = 1 << 14 // 64 MiB

func benchVolume(b *testing.B) (*engine.Engine, *engine.Volume) {
	b.Helper()
	e, err := engine.Open(engine.Config{Dir: b.TempDir(), Fatal: func(err error) { b.Error(err) }})
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, e.Close()) })
	require.NoError(b, e.CreateVolume(1, "00000000-0000-4000-8000-000000000001", benchBlocksN*trivet.BlockSize))
	v, err := e.OpenVolume(1)
	require.NoError(b, err)
	return e, v
}

// BenchmarkCommit applies entries of 16 blocks each at random places, as a follower does.
func BenchmarkCommit(b *testing.B) {
	_, v := benchVolume(b)
	r := rand.New(rand.NewPCG(1, 2))
	data := make([]byte, 16*trivet.BlockSize)
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		st := v.State()
		st.AppliedIndex++
		st.AppliedTerm = 1
		batch := v.NewBatch()
		require.NoError(b, batch.Write(trivet.LBA(r.IntN(benchBlocksN-16)), data))
		require.NoError(b, batch.Commit(st))
	}
}

// BenchmarkRead reads single blocks at random places of a filled volume.
func BenchmarkRead(b *testing.B) {
	e, v := benchVolume(b)
	data := make([]byte, 16*trivet.BlockSize)
	for i := range data {
		data[i] = byte(i*7 + 1)
	}
	for lba := trivet.LBA(0); lba < benchBlocksN; lba += 16 {
		st := v.State()
		st.AppliedIndex++
		st.AppliedTerm = 1
		batch := v.NewBatch()
		require.NoError(b, batch.Write(lba, data))
		require.NoError(b, batch.Commit(st))
	}
	require.NoError(b, e.Flush())
	r := rand.New(rand.NewPCG(3, 4))
	block := make([]byte, trivet.BlockSize)
	b.SetBytes(trivet.BlockSize)
	b.ReportAllocs()
	for b.Loop() {
		require.NoError(b, v.ReadAt(block, trivet.LBA(r.IntN(benchBlocksN))))
	}
}

// benchRefs is benchVolume with a log, which blocks are referred to in and nobody cleans.
func benchRefs(b *testing.B, blockN int64) (*engine.Engine, *engine.Volume) {
	b.Helper()
	cfg := engine.Config{Dir: b.TempDir(), CleanTarget: -1}
	require.NoError(b, engine.WithLog(&cfg, segment.NewOSDir(b.TempDir())))
	e, err := engine.Open(cfg)
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, e.Close()) })
	return e, mustVolume(b, e, 1, blockN)
}

// BenchmarkLookUp reads single blocks of a volume of which every other block was written, at random, and refers to the
// log: all to the same place, which the disk has at hand.
func BenchmarkLookUp(b *testing.B) {
	const blockN = 1 << 20
	e, v := benchRefs(b, blockN)
	data := bytes.Repeat([]byte{1}, trivet.BlockSize)
	at, err := engine.LogOf(e).Store(1, make([]segment.BlockInfo, 1), data)
	require.NoError(b, err)
	r := rand.New(rand.NewPCG(7, 8))
	for i, chunk := range slices.Collect(slices.Chunk(r.Perm(blockN/2), 64)) {
		st := v.State()
		st.AppliedIndex++
		st.AppliedTerm = 1
		batch := v.NewBatch()
		for _, k := range chunk {
			require.NoError(b, batch.Refer(trivet.LBA(2*k), data, at, 0))
		}
		require.NoError(b, batch.Commit(st))
		if i%1024 == 1023 {
			require.NoError(b, e.Flush())
		}
	}
	engine.LogOf(e).Unpin(at.Segment)
	p := make([]byte, trivet.BlockSize)
	for odd, name := range []string{"written", "never"} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				require.NoError(b, v.ReadAt(p, trivet.LBA(2*r.IntN(blockN/2)+odd)))
			}
		})
	}
}

// BenchmarkReadScattered reads runs of blocks, one read at a time, of a volume whose blocks were written one by one and
// in no order.
func BenchmarkReadScattered(b *testing.B) {
	const blockN = 1 << 12
	e, v := benchRefs(b, blockN)
	r := rand.New(rand.NewPCG(5, 6))
	for i, lba := range r.Perm(blockN) {
		mustCommit(b, v, op{trivet.LBA(lba), 1, 1})
		if i%512 == 511 {
			require.NoError(b, e.Flush())
			require.NoError(b, engine.TrimLog(v))
		}
	}
	for _, n := range []int{2, 32, 256} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			p := make([]byte, n*trivet.BlockSize)
			b.SetBytes(int64(len(p)))
			b.ReportAllocs()
			for b.Loop() {
				require.NoError(b, v.ReadAt(p, trivet.LBA(r.IntN(blockN-n))))
			}
		})
	}
}

// fillBench writes the whole volume in entries of 16 blocks.
func fillBench(b *testing.B, v *engine.Volume, blockN trivet.LBA) {
	b.Helper()
	data := make([]byte, 16*trivet.BlockSize)
	for i := range data {
		data[i] = byte(i*7 + 1)
	}
	for lba := trivet.LBA(0); lba < blockN; lba += 16 {
		st := v.State()
		st.AppliedIndex++
		st.AppliedTerm = 1
		batch := v.NewBatch()
		require.NoError(b, batch.Write(lba, data))
		require.NoError(b, batch.Commit(st))
	}
}

// BenchmarkImage reads a whole image, without sending it.
func BenchmarkImage(b *testing.B) {
	e, v := benchVolume(b)
	fillBench(b, v, benchBlocksN)
	require.NoError(b, e.Flush())
	b.SetBytes(benchBlocksN * trivet.BlockSize)
	b.ReportAllocs()
	for b.Loop() {
		i, err := v.Image(nil)
		require.NoError(b, err)
		_, err = io.Copy(io.Discard, i)
		require.NoError(b, err)
		require.NoError(b, i.Close())
	}
}

// BenchmarkCatchUp transfers the last quarter of a volume from one engine to another, flushes, read-back and all.
func BenchmarkCatchUp(b *testing.B) {
	_, src := benchVolume(b)
	_, v := benchVolume(b)
	fillBench(b, src, benchBlocksN)
	fillBench(b, v, benchBlocksN)
	b.SetBytes(benchBlocksN / 4 * trivet.BlockSize)
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		fillBench(b, src, benchBlocksN/4)
		b.StartTimer()
		i, err := src.Image(v.Want())
		require.NoError(b, err)
		require.NoError(b, v.Restore(i))
		require.NoError(b, i.Close())
	}
}

// BenchmarkRefer applies entries of 16 blocks each, at random places, that stand in the log already: what is left of
// a write once its bytes are on the disk.
func BenchmarkRefer(b *testing.B) {
	cfg := engine.Config{Dir: b.TempDir() + "/engine", Fatal: func(err error) { b.Error(err) }}
	require.NoError(b, engine.WithLog(&cfg, segment.NewOSDir(b.TempDir()+"/log")))
	e, err := engine.Open(cfg)
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, e.Close()) })
	require.NoError(b, e.CreateVolume(1, "r", benchBlocksN*trivet.BlockSize))
	v, err := e.OpenVolume(1)
	require.NoError(b, err)
	r := rand.New(rand.NewPCG(1, 2))
	data := make([]byte, 4*trivet.BlockSize)
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	log := engine.LogOf(e)
	at, err := log.Store(1, make([]segment.BlockInfo, 4), data)
	require.NoError(b, err)
	b.SetBytes(16 * trivet.BlockSize)
	b.ReportAllocs()
	for b.Loop() {
		st := v.State()
		st.AppliedIndex++
		st.AppliedTerm = 1
		batch := v.NewBatch()
		for range 16 {
			require.NoError(b, batch.Refer(trivet.LBA(r.IntN(benchBlocksN)), data[:trivet.BlockSize], at, 0))
		}
		require.NoError(b, batch.Commit(st))
	}
	log.Unpin(at.Segment)
}
