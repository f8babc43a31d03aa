package replication_test

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/engine/segment"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// flipsN is how many bits TestScrubFindsAllFlips changes: `make scrub` says 10 000, the figure of the design.
var flipsN = flag.Int("flips", 200, "bits that are flipped for the scrub to find") //nolint:gochecknoglobals // a flag

const (
	figureVolume  = trivet.VolumeID(0xf11b)
	figureSegment = 8 << 20
	// blocksPerFlip is how many blocks there are for each bit that is flipped.
	blocksPerFlip = 2
	// figurePatience bounds what is waited for, in real time: a test that hangs is worse than one that fails.
	figurePatience = 5 * time.Minute
)

// realNode is a machine whose disk is a directory.
type realNode struct {
	id   trivet.NodeID
	dir  string
	log  *segment.Log
	eng  *engine.Engine
	net  *transport.MemoryNode
	host *replication.Host
}

// countSilence counts the questions of scrubs and repairs that got no answer, as when the machine stood still.
type countSilence struct {
	*transport.MemoryNode
	n *atomic.Int64
}

func (c countSilence) Call(ctx context.Context, to trivet.NodeID, m transport.Message) (transport.Message, error) {
	out, err := c.MemoryNode.Call(ctx, to, m)
	if err != nil && m.Kind == transport.KindVolumeScrub {
		c.n.Add(1)
	}
	return out, err
}

func (f *figure) openReal(t *testing.T, id trivet.NodeID, dir string) *realNode {
	t.Helper()
	n := &realNode{id: id, dir: dir, net: f.hub.Node(id)}
	opts := segment.Options{
		Dir: segment.NewOSDir(filepath.Join(dir, "log")), Disk: "00000000-0000-4000-8000-00000000d15c", Lanes: 1,
		SegmentBytes: figureSegment, DataLane: true, Hold: true,
	}
	fatal := func(err error) { t.Errorf("fatal on %s: %v", id, err) }
	opts.Fatal = fatal
	var err error
	if n.log, err = segment.Open(opts); errors.Is(err, trivet.ErrNotFound) {
		require.NoError(t, segment.Format(opts))
		n.log, err = segment.Open(opts)
	}
	require.NoError(t, err)
	n.eng, err = engine.Open(engine.Config{
		FS: vfs.Default, Dir: filepath.Join(dir, "engine"), CacheBytes: 1 << 20, MemTableBytes: 4 << 20, Log: n.log,
		Fatal: fatal, OnCorruption: func(err error) {
			f.reported.Add(1)
			t.Errorf("damage was not repaired on %s: %v", id, err)
		},
	})
	require.NoError(t, err)
	n.host, err = replication.NewHost(replication.HostConfig{
		Network: countSilence{n.net, &f.silent}, Mux: raftgroup.NewMux(n.net), Fatal: fatal,
		Timing: raftgroup.Timing{Heartbeat: 2 * time.Second}, // five test processes may share this machine
	})
	require.NoError(t, err)
	return n
}

func (n *realNode) spec(members []raftgroup.Member, sizeBytes int64) replication.ReplicaSpec {
	s := replication.ReplicaSpec{
		Volume: figureVolume, SizeBytes: sizeBytes, Members: members,
		Disk: replication.Disk{ID: "d", Dir: n.dir, Engine: n.eng, Log: n.log},
	}
	for _, m := range members {
		if m.Node == n.id {
			s.Replica = m.Replica
		}
	}
	return s
}

func (n *realNode) close(t *testing.T) {
	t.Helper()
	require.NoError(t, errors.Join(n.host.Close(), n.eng.Close(), n.log.Close(), n.net.Close()))
}

// figureBlock has the block's number, and a version, all over.
func figureBlock(p []byte, seed uint64, lba trivet.LBA) {
	rnd := rand.NewPCG(seed, uint64(lba))
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], rnd.Uint64())
	}
}

// flipOnDisk changes one bit in each of the given blocks, in every copy that the files of a disk have of it, and
// returns how many blocks it found. A write that was sent again, as to a new leader, stands in two entries of the log.
func flipOnDisk(t *testing.T, dir string, seed uint64, lbas map[trivet.LBA]int) int {
	t.Helper()
	first := map[uint64]trivet.LBA{} // the first eight bytes of a block are like no other's
	p := make([]byte, trivet.BlockSize)
	for lba := range lbas {
		figureBlock(p, seed, lba)
		first[binary.LittleEndian.Uint64(p)] = lba
	}
	names, err := filepath.Glob(filepath.Join(dir, "log", "*"))
	require.NoError(t, err)
	found := map[trivet.LBA]bool{}
	for _, name := range names {
		b, err := os.ReadFile(name)
		require.NoError(t, err)
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		require.NoError(t, err)
		for off := 0; off+trivet.BlockSize <= len(b); off += trivet.BlockSize {
			lba, ok := first[binary.LittleEndian.Uint64(b[off:])]
			if !ok {
				continue
			}
			bit := lbas[lba]
			_, err := f.WriteAt([]byte{b[off+bit/8] ^ 1<<(bit%8)}, int64(off+bit/8))
			require.NoError(t, err)
			found[lba] = true
		}
		require.NoError(t, f.Sync())
		require.NoError(t, f.Close())
	}
	return len(found)
}

// figure is a volume on three machines with real disks.
type figure struct {
	seed     uint64
	size     int64
	hub      *transport.Memory
	members  []raftgroup.Member
	dirs     []string
	nodes    []*realNode
	reported atomic.Int64 // damage that was not repaired
	silent   atomic.Int64 // questions of scrubs and repairs without an answer
}

func newFigure(t *testing.T, seed uint64, blockN int) *figure {
	t.Helper()
	f := &figure{
		seed: seed, size: int64(blockN) * trivet.BlockSize, hub: transport.NewMemory(seed),
		dirs: []string{t.TempDir(), t.TempDir(), t.TempDir()},
	}
	for i := range f.dirs {
		f.members = append(f.members, raftgroup.Member{
			Node:    trivet.NodeID(fmt.Sprintf("n%d", i+1)),
			Replica: trivet.ReplicaID(fmt.Sprintf("00000000-0000-4000-8000-%012d", i+1)),
		})
	}
	f.start(t, true)
	began := time.Now()
	for err := trivet.ErrNotLeader; err != nil; {
		require.Less(t, time.Since(began), figurePatience)
		r, none := f.leader(t.Context())
		require.NoError(t, none)
		if err = r.Fence(t.Context(), 1); !replaced(err) {
			require.NoError(t, err)
		}
	}
	return f
}

func (f *figure) start(t *testing.T, create bool) {
	t.Helper()
	f.nodes = nil
	for i, m := range f.members {
		n := f.openReal(t, m.Node, f.dirs[i])
		f.nodes = append(f.nodes, n)
		spec := n.spec(f.members, f.size)
		if create {
			require.NoError(t, n.host.CreateReplica(t.Context(), spec))
		}
		require.NoError(t, n.host.OpenReplica(t.Context(), spec))
	}
}

func (f *figure) stop(t *testing.T) {
	t.Helper()
	for _, n := range f.nodes {
		require.NoError(t, n.eng.Flush())
		n.close(t)
	}
}

func (f *figure) leader(ctx context.Context) (*replication.Replica, error) {
	ctx, cancel := context.WithTimeout(ctx, figurePatience)
	defer cancel()
	for {
		for _, n := range f.nodes {
			if r, ok := n.host.Replica(figureVolume); ok && r.Status().IsLeader {
				return r, nil
			}
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// scrub scrubs the volume, from the beginning when the leader has changed, or a replica could not take part, or did
// not answer when it was asked for its copy of what is left: real time passes, and the disk may be busy for seconds.
func (f *figure) scrub(t *testing.T) replication.ScrubRange {
	t.Helper()
	for began := time.Now(); ; {
		silent := f.silent.Load()
		sum, err := scrubAll(t.Context(), func() (*replication.Replica, error) { return f.leader(t.Context()) },
			replication.ScrubOptions{})
		if !replaced(err) && len(sum.Absent) == 0 && (sum.Left == 0 || f.silent.Load() == silent) {
			require.NoError(t, err)
			return sum
		}
		require.Less(t, time.Since(began), figurePatience, "%v, absent %v, %d left", err, sum.Absent, sum.Left)
	}
}

// replaced reports whether an error says that a leader is none any more, or cannot reach a majority.
func replaced(err error) bool {
	return errors.Is(err, trivet.ErrNotLeader) || errors.Is(err, trivet.ErrUnavailable)
}

func (f *figure) open(t *testing.T) *replication.Volume {
	t.Helper()
	v, err := replication.OpenVolume(replication.VolumeConfig{
		ID: figureVolume, SizeBytes: f.size, Epoch: 1, Members: f.members, Network: f.hub.Node("client"),
		IOTimeout: figurePatience,
	})
	require.NoError(t, err)
	return v
}

// fill writes every block, and waits until all replicas have it.
func (f *figure) fill(t *testing.T, v *replication.Volume) {
	t.Helper()
	const batch = 64 * trivet.BlockSize
	for off := int64(0); off < f.size; off += batch {
		p := make([]byte, min(batch, f.size-off))
		for i := 0; i < len(p); i += trivet.BlockSize {
			figureBlock(p[i:i+trivet.BlockSize], f.seed, trivet.LBA((off+int64(i))/trivet.BlockSize))
		}
		require.NoError(t, v.WriteAt(t.Context(), p, off))
	}
	require.NoError(t, v.Flush(t.Context()))
	awaitLevel(t, f.nodes)
}

// flip changes a bit in each of n blocks, each on one replica.
func (f *figure) flip(t *testing.T, n int) {
	t.Helper()
	rnd := rand.New(rand.NewPCG(f.seed, 1))
	per := []map[trivet.LBA]int{{}, {}, {}}
	for _, lba := range rnd.Perm(int(f.size / trivet.BlockSize))[:n] {
		per[rnd.IntN(3)][trivet.LBA(lba)] = rnd.IntN(8 * trivet.BlockSize)
	}
	for i, n := range f.nodes {
		require.Equal(t, len(per[i]), flipOnDisk(t, n.dir, f.seed, per[i]), "on %s", n.id)
	}
}

// readBeside reads blocks at random until the returned function is called, which tells how many, and how many of them
// were wrong.
func (f *figure) readBeside(t *testing.T, v *replication.Volume) (stop func() (reads, wrong int64)) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var readers sync.WaitGroup
	var reads, wrong atomic.Int64
	for i := range uint64(2) {
		readers.Go(func() {
			rnd := rand.New(rand.NewPCG(f.seed, i+2))
			p, want := make([]byte, trivet.BlockSize), make([]byte, trivet.BlockSize)
			for ctx.Err() == nil {
				lba := trivet.LBA(rnd.Int64N(f.size / trivet.BlockSize))
				if err := v.ReadAt(ctx, p, int64(lba)*trivet.BlockSize); err != nil {
					if ctx.Err() == nil {
						t.Errorf("read block %d: %v", lba, err)
					}
					return
				}
				if figureBlock(want, f.seed, lba); string(p) != string(want) {
					wrong.Add(1)
				}
				reads.Add(1)
			}
		})
	}
	return func() (int64, int64) {
		cancel()
		readers.Wait()
		return reads.Load(), wrong.Load()
	}
}

// TestScrubFindsAllFlips: of seeded flips, each of one bit in a block of one replica, on real files, a scrub finds and
// repairs every one, and while it does, no read shows anything but what was written (H22).
func TestScrubFindsAllFlips(t *testing.T) {
	seed, flips := rand.Uint64(), *flipsN
	if testing.Short() {
		flips = min(flips, 64)
	}
	t.Logf("seed %d, %d flips", seed, flips)
	f := newFigure(t, seed, flips*blocksPerFlip)
	v := f.open(t)
	f.fill(t, v)
	f.flip(t, flips)
	stop := f.readBeside(t, v)
	sum := f.scrub(t)
	reads, wrong := stop()
	found, repaired := int64(0), int64(0)
	for _, n := range f.nodes {
		r, ok := n.host.Replica(figureVolume)
		require.True(t, ok)
		st := r.Integrity()
		found, repaired = found+st.Found, repaired+st.Repaired
		assert.Zero(t, st.Failed)
	}
	t.Logf("%d found by the scrub, %d in all with those that reads met, %d repaired; %d blocks read beside it",
		sum.Found, found, repaired, reads)
	assert.Zero(t, wrong, "wrong bytes were served")
	assert.Zero(t, sum.Left)
	assert.EqualValues(t, flips, found, "by the scrub, and by the reads that came before it")
	assert.EqualValues(t, flips, repaired)
	assert.LessOrEqual(t, sum.Found, found)
	again := f.scrub(t)
	assert.Zero(t, again.Found, "%v", again.Findings)
	assert.Equal(t, 3*f.size, again.CheckedBytes)

	// The repairs are on the disks, and damaged entries of the log are no reason not to start again.
	require.NoError(t, v.Close())
	f.stop(t)
	f.start(t, false)
	again = f.scrub(t)
	assert.Zero(t, again.Found, "%v", again.Findings)
	v = f.open(t)
	p, want := make([]byte, trivet.BlockSize), make([]byte, trivet.BlockSize)
	for lba := range trivet.LBA(f.size / trivet.BlockSize) {
		require.NoError(t, v.ReadAt(t.Context(), p, int64(lba)*trivet.BlockSize))
		figureBlock(want, seed, lba)
		require.Equal(t, want, p, "block %d", lba)
	}
	require.NoError(t, v.Close())
	f.stop(t)
	assert.Zero(t, f.reported.Load())
}

// awaitLevel waits until all replicas have applied what the one ahead has.
func awaitLevel(t *testing.T, nodes []*realNode) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), figurePatience)
	defer cancel()
	for {
		indexes := map[uint64]bool{}
		for _, n := range nodes {
			r, ok := n.host.Replica(figureVolume)
			require.True(t, ok)
			indexes[r.Status().Applied] = true
		}
		if len(indexes) == 1 {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatal("replicas do not come level")
		case <-time.After(10 * time.Millisecond):
		}
	}
}
