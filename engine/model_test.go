package engine_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
)

// disk is the model: a volume is a slice of bytes and a state.
type disk struct {
	data  []byte
	state engine.State
}

// machine runs random operations on an engine and on the model.
type machine struct {
	t   *testing.T
	rng *rand.Rand
	fs  vfs.FS
	e   *engine.Engine
	m   map[trivet.VolumeID]*disk
}

func (m *machine) open() {
	var err error
	m.e, err = engine.Open(config(m.fs))
	require.NoError(m.t, err)
}

func (m *machine) volume(id trivet.VolumeID) *engine.Volume {
	v, err := m.e.OpenVolume(id)
	require.NoError(m.t, err)
	return v
}

// TestModel: whatever is done, reads are those of a slice of bytes.
func TestModel(t *testing.T) {
	ops := 800
	if testing.Short() {
		ops = 150
	}
	for seed := range uint64(3) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			m := &machine{t: t, rng: seeds(t, seed), fs: vfs.NewMem(), m: map[trivet.VolumeID]*disk{}}
			m.open()
			defer func() { require.NoError(t, m.e.Close()) }()
			for i := range ops {
				m.step()
				if i%40 == 39 {
					m.keepRoom()
				}
			}
			for id := range m.m {
				m.checkAll(id)
			}
			require.NoError(t, engine.CheckLive(m.e))
		})
	}
}

// keepRoom trims the log, as Raft's compaction does: it has no room for all that the model writes.
func (m *machine) keepRoom() {
	require.NoError(m.t, m.e.Flush())
	for id := range m.m {
		require.NoError(m.t, engine.TrimLog(m.volume(id)))
	}
	_, err := m.e.Clean()
	require.NoError(m.t, err)
}

func (m *machine) step() {
	id := trivet.VolumeID(1 + m.rng.IntN(4))
	d := m.m[id]
	if d == nil {
		n := 16 + m.rng.Int64N(200)
		require.NoError(m.t, m.e.CreateVolume(id, "r", n*bs))
		m.m[id] = &disk{data: make([]byte, n*bs), state: engine.State{SizeBytes: n * bs}}
		m.checkAll(id)
		return
	}
	switch x := m.rng.IntN(200); {
	case x < 100:
		m.apply(id, d)
	case x < 190:
		m.read(id, d)
	case x < 191:
		require.NoError(m.t, m.e.Flush())
	case x < 192:
		require.NoError(m.t, engine.TrimLog(m.volume(id)))
		_, err := m.e.Clean()
		require.NoError(m.t, err)
		require.NoError(m.t, engine.CheckLive(m.e))
	case x < 194:
		require.NoError(m.t, m.e.Close())
		m.open()
	case x < 196:
		m.checkAll(id)
	case x < 197:
		require.NoError(m.t, m.e.DropVolume(id))
		delete(m.m, id)
	default:
		m.copyTo(id, trivet.VolumeID(1+m.rng.IntN(4)))
	}
}

// apply commits a random batch, sometimes with a larger volume or the next generation.
func (m *machine) apply(id trivet.VolumeID, d *disk) {
	v := m.volume(id)
	b := v.NewBatch()
	st := d.state
	st.AppliedIndex += 1 + uint64(m.rng.IntN(3))
	st.Session = fmt.Appendf(nil, "session %d", st.AppliedIndex)
	if m.rng.IntN(20) == 0 && st.SizeBytes < 600*bs {
		st.SizeBytes += bs * (1 + m.rng.Int64N(20))
		d.data = append(d.data, make([]byte, st.SizeBytes-int64(len(d.data)))...)
	}
	if m.rng.IntN(30) == 0 {
		st.Generation++
	}
	size := st.SizeBytes / bs
	for range 1 + m.rng.IntN(5) {
		n := 1 + m.rng.Int64N(6)
		if m.rng.IntN(8) == 0 {
			n = 1 + m.rng.Int64N(size)
		}
		n = min(n, size)
		lba := m.rng.Int64N(size - n + 1)
		part := d.data[lba*bs : (lba+n)*bs]
		if m.rng.IntN(3) == 0 {
			clear(part)
			require.NoError(m.t, b.Zero(trivet.LBA(lba), n))
			continue
		}
		for i := range n {
			fillRandom(m.rng, part[i*bs:(i+1)*bs])
		}
		if m.rng.IntN(8) == 0 { // a block that is in no log, as of an image into an engine without data lane
			require.NoError(m.t, b.Write(trivet.LBA(lba), part))
			continue
		}
		require.NoError(m.t, engine.WriteByLog(b, trivet.LBA(lba), part))
	}
	require.NoError(m.t, b.Commit(st))
	d.state = st
}

// fillRandom makes a block that is all zeroes one time in five.
func fillRandom(rng *rand.Rand, p []byte) {
	clear(p)
	if rng.IntN(5) == 0 {
		return
	}
	x := rng.Uint64() | 1
	for i := 0; i < len(p); i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		p[i], p[i+1], p[i+7] = byte(x), byte(x>>8), byte(x>>16)
	}
}

func (m *machine) read(id trivet.VolumeID, d *disk) {
	size := int64(len(d.data)) / bs
	n := 1 + m.rng.Int64N(min(20, size))
	lba := m.rng.Int64N(size - n + 1)
	p := bytes.Repeat([]byte{0x5a}, int(n*bs))
	require.NoError(m.t, m.volume(id).ReadAt(p, trivet.LBA(lba)))
	for i := range n {
		want, got := d.data[(lba+i)*bs:(lba+i+1)*bs], p[i*bs:(i+1)*bs]
		require.True(m.t, bytes.Equal(want, got), "block %d of %s at %+v, read in a run of %d from %d: %x for %x",
			lba+i, id, d.state, n, lba, got[:8], want[:8])
	}
}

func (m *machine) checkAll(id trivet.VolumeID) {
	d, v := m.m[id], m.volume(id)
	p := make([]byte, len(d.data))
	require.NoError(m.t, v.ReadAt(p, 0))
	require.True(m.t, bytes.Equal(d.data, p), "%s", id)
	require.Equal(m.t, d.state, v.State())
}

// copyTo restores an image of one volume into another, which may be itself or newer than the image.
func (m *machine) copyTo(from, to trivet.VolumeID) {
	src, dst := m.m[from], m.m[to]
	if dst == nil {
		return
	}
	image, err := m.volume(from).Image(nil)
	require.NoError(m.t, err)
	defer func() { require.NoError(m.t, image.Close()) }()
	require.Equal(m.t, src.state, image.State())
	m.apply(from, src) // must not show in the image
	b, err := io.ReadAll(image)
	require.NoError(m.t, err)
	err = m.volume(to).Restore(bytes.NewReader(b))
	if image.State().AppliedIndex < dst.state.AppliedIndex {
		require.ErrorIs(m.t, err, trivet.ErrInvalid)
		return
	}
	require.NoError(m.t, err)
	digest, err := m.volume(from).Digest()
	require.NoError(m.t, err)
	require.NotZero(m.t, digest)
	m.readBack(to, dst, image.State(), b)
	m.checkAll(from)
}

// readBack takes the restored content into the model after comparing it with a second restore of the
// same image on another disk, under the image's own volume.
func (m *machine) readBack(to trivet.VolumeID, dst *disk, st engine.State, image []byte) {
	e, err := engine.Open(config(vfs.NewMem()))
	require.NoError(m.t, err)
	defer func() { require.NoError(m.t, e.Close()) }()
	require.NoError(m.t, e.CreateVolume(to, "other", bs))
	twin, err := e.OpenVolume(to)
	require.NoError(m.t, err)
	require.NoError(m.t, twin.Restore(bytes.NewReader(image)))
	d1, err := twin.Digest()
	require.NoError(m.t, err)
	d2, err := m.volume(to).Digest()
	require.NoError(m.t, err)
	require.Equal(m.t, d1, d2, "two replicas made from one image")
	dst.state, dst.data = st, make([]byte, st.SizeBytes)
	require.NoError(m.t, m.volume(to).ReadAt(dst.data, 0))
	m.checkAll(to)
}

// Replicas that applied the same entries in different batches, with other memtables, one of them
// reopened now and then, have the same digest (I4, H3).
func TestDigestOfTwins(t *testing.T) {
	rng := seeds(t, 11)
	fs := vfs.NewMem()
	a, b := mustOpen(t, vfs.NewMem()), mustOpen(t, fs)
	va, vb := mustVolume(t, a, vol1, 128), mustVolume(t, b, vol1, 128)
	var stamp uint32
	var pending []op
	for i := range 120 {
		ops := randomOps(rng, 128, &stamp)
		mustCommit(t, va, ops...)
		pending = append(pending, ops...)
		if rng.IntN(4) > 0 {
			continue
		}
		require.NoError(t, commitState(vb, va.State(), pending...))
		pending = nil
		if i%10 == 0 {
			require.NoError(t, b.Flush())
		}
		if i%7 != 0 {
			continue
		}
		da, err := va.Digest()
		require.NoError(t, err)
		db, err := vb.Digest()
		require.NoError(t, err)
		require.Equal(t, da, db)
		// One block or one field of the state more, and they differ.
		st := va.State()
		st.Session = append(st.Session, 1)
		require.NoError(t, commitState(va, st))
		da2, err := va.Digest()
		require.NoError(t, err)
		require.NotEqual(t, da, da2)
		st.Session = st.Session[:len(st.Session)-1]
		require.NoError(t, commitState(va, st))
	}
}

// Many volumes and many readers at once: a reader sees whole batches only.
func TestConcurrentVolumes(t *testing.T) {
	e := mustOpen(t, vfs.NewMem())
	const blockN, commits = 24, 40
	var wg sync.WaitGroup
	for id := trivet.VolumeID(1); id <= 3; id++ {
		v := mustVolume(t, e, id, blockN)
		done := make(chan struct{})
		wg.Go(func() {
			defer close(done)
			for i := range uint32(commits) {
				// Each batch sets all blocks to one stamp, in an order of its own.
				stamp := i%3 + uint32(id)*10
				if !noError(t, commit(v, op{12, 12, stamp}, op{0, 12, stamp})) {
					return
				}
				if i%20 == 0 && !noError(t, e.Flush()) {
					return
				}
			}
		})
		for range 2 {
			wg.Go(func() {
				p := make([]byte, blockN*bs)
				for {
					select {
					case <-done:
						return
					default:
					}
					if !noError(t, v.ReadAt(p, 0)) {
						return
					}
					for i := 1; i < blockN; i++ {
						if !bytes.Equal(p[:4], p[i*bs:i*bs+4]) {
							t.Errorf("%s: block 0 has %x, block %d has %x", v.ID(), p[:4], i, p[i*bs:i*bs+4])
							return
						}
					}
				}
			})
		}
	}
	wg.Wait()
}

// noError is for goroutines other than the test's.
func noError(t *testing.T, err error) bool {
	if err != nil {
		t.Error(err)
	}
	return err == nil
}
