package engine_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

const (
	bs   = trivet.BlockSize
	vol1 = trivet.VolumeID(0x1111)
	vol2 = trivet.VolumeID(0x2222)
)

// seeds makes a random source and prints how to get it again.
func seeds(t testing.TB, seed uint64) *rand.Rand {
	t.Helper()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// config has a small memtable, so that tests meet flushes and compactions.
// It refers to a small log on the same disk, which ends with the engine, and is cleaned by commit alone, and swept
// when a test says so.
func config(fs vfs.FS) engine.Config {
	cfg := engine.Config{
		FS: fs, Dir: "disk", CacheBytes: 1 << 20, MemTableBytes: 256 << 10, CleanTarget: -1, SweepRate: -1,
	}
	if err := engine.WithLog(&cfg, raftgroup.LogDir(fs, "disk.log")); err != nil {
		panic(err) // whatever a test has done, a log can be opened
	}
	return cfg
}

// mustOpen opens an engine that fails the test when it fails, and closes with the test.
func mustOpen(t testing.TB, fs vfs.FS) *engine.Engine {
	t.Helper()
	cfg := config(fs)
	cfg.Fatal = func(err error) { t.Errorf("fatal: %v", err) }
	e, err := engine.Open(cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, e.Close()) })
	return e
}

func mustVolume(t testing.TB, e *engine.Engine, id trivet.VolumeID, blockN int64) *engine.Volume {
	t.Helper()
	require.NoError(t, e.CreateVolume(id, "replica-1", blockN*bs))
	v, err := e.OpenVolume(id)
	require.NoError(t, err)
	return v
}

// block is the content that stamp stands for; zero stands for zeroes.
func block(stamp uint32, lba trivet.LBA) []byte {
	p := make([]byte, bs)
	if stamp != 0 {
		for i := 0; i < bs; i += 16 {
			binary.BigEndian.PutUint32(p[i:], stamp)
			binary.BigEndian.PutUint32(p[i+4:], uint32(i))
			binary.BigEndian.PutUint64(p[i+8:], uint64(lba))
		}
	}
	return p
}

// op is one change of a batch: n blocks from lba on get the stamp, or zeroes when it is 0.
type op struct {
	lba   trivet.LBA
	n     int64
	stamp uint32
}

// addTo adds the change to a batch, one that writes by way of the log, as replication does.
func (o op) addTo(b *engine.Batch) error {
	if o.stamp == 0 {
		return b.Zero(o.lba, o.n)
	}
	p := make([]byte, 0, o.n*bs)
	for i := range trivet.LBA(o.n) {
		p = append(p, block(o.stamp, o.lba+i)...)
	}
	err := engine.WriteByLog(b, o.lba, p)
	for i := range p { // the batch must have copied
		p[i] = 0xee
	}
	return err
}

// commit applies ops at the next index.
func commit(v *engine.Volume, ops ...op) error {
	st := v.State()
	st.AppliedIndex++
	return commitState(v, st, ops...)
}

func commitState(v *engine.Volume, st engine.State, ops ...op) error {
	if err := engine.Housekeep(v); err != nil {
		return err
	}
	b := v.NewBatch()
	for _, o := range ops {
		if err := o.addTo(b); err != nil {
			return errors.Join(err, b.Close())
		}
	}
	return b.Commit(st)
}

func mustCommit(t testing.TB, v *engine.Volume, ops ...op) {
	t.Helper()
	require.NoError(t, commit(v, ops...))
}

// history is a model of one volume: the stamp of each block at each applied index.
type history struct {
	mu   sync.Mutex
	at   [][]uint32 // by index
	base uint64     // index of at[0]
}

func newHistory(blockN int64) *history {
	return &history{at: [][]uint32{make([]uint32, blockN)}}
}

func (h *history) add(ops ...op) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := append([]uint32(nil), h.at[len(h.at)-1]...)
	for _, o := range ops {
		for i := range o.n {
			s[int64(o.lba)+i] = o.stamp
		}
	}
	h.at = append(h.at, s)
}

// check compares the whole volume with the model at the volume's own applied index.
func (h *history) check(v *engine.Volume) error {
	st := v.State()
	h.mu.Lock()
	if st.AppliedIndex < h.base || st.AppliedIndex-h.base >= uint64(len(h.at)) {
		h.mu.Unlock()
		return fmt.Errorf("applied index %d was never committed", st.AppliedIndex)
	}
	want := h.at[st.AppliedIndex-h.base]
	h.mu.Unlock()
	return checkStamps(v, want)
}

// checkStamps compares blocks, read in two ways, with their stamps.
func checkStamps(v *engine.Volume, want []uint32) error {
	all := make([]byte, len(want)*bs)
	if err := v.ReadAt(all, 0); err != nil {
		return err
	}
	one := make([]byte, bs)
	for i, stamp := range want {
		lba := trivet.LBA(i)
		if err := v.ReadAt(one, lba); err != nil {
			return err
		}
		exp := string(block(stamp, lba))
		if string(one) != exp || string(all[i*bs:(i+1)*bs]) != exp {
			return fmt.Errorf("block %d at index %d: want stamp %d, got %x alone and %x in a run", lba,
				v.State().AppliedIndex, stamp, one[:4], all[i*bs:i*bs+4])
		}
	}
	return nil
}

// randomOps draws a batch: writes, zeroes, discards of any length.
func randomOps(rng *rand.Rand, blockN int64, stamp *uint32) []op {
	ops := make([]op, 1+rng.IntN(4))
	for i := range ops {
		n := 1 + rng.Int64N(8)
		if rng.IntN(10) == 0 {
			n = 1 + rng.Int64N(blockN) // a large one
		}
		n = min(n, blockN)
		ops[i] = op{lba: trivet.LBA(rng.Int64N(blockN - n + 1)), n: n}
		if rng.IntN(3) > 0 {
			*stamp++
			ops[i].stamp = *stamp
		}
	}
	return ops
}
