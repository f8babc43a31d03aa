package node

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/cache"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/internal/faultdev"
	"github.com/trivet-csi/trivet/replication"
)

// cacheBench is a mountBench whose volume is writeBack, over a disk in memory that outlives processes and refuses old
// epochs as a group does.
type cacheBench struct {
	*mountBench
	t    *testing.T
	disk *faultdev.Device
	dir  string
}

// epochDevice is a disk as the holder of an epoch sees it.
type epochDevice struct {
	trivet.Device
	cat   *fakeCatalogue
	epoch trivet.Epoch
}

func (d *epochDevice) Close() error { return nil }

func (d *epochDevice) SetSize(int64) error { return trivet.ErrInvalid } // no volume grows in these tests

func (d *epochDevice) WriteAt(ctx context.Context, p []byte, off int64) error {
	if d.cat.volume(vol).FencedEpoch > d.epoch {
		return trivet.ErrFenced
	}
	return d.Device.WriteAt(ctx, p, off)
}

func newCacheBench(t *testing.T, params map[string]string) *cacheBench {
	t.Helper()
	b := &cacheBench{
		mountBench: &mountBench{cat: newFakeCatalogue(), mounter: newFakeMounter(), runDir: t.TempDir()},
		t:          t, disk: faultdev.Wrap(faultdev.NewMem(64 << 20)), dir: filepath.Join(t.TempDir(), "c", "n1"),
	}
	for n := 1; n <= 3; n++ {
		b.cat.addNode(n)
	}
	b.cat.addVolume(vol, 3, params)
	for n := 1; n <= 3; n++ {
		b.cat.report(vol, n, meta.ReplicaReady)
	}
	b.start(0x301)
	return b
}

// start starts a process of node n1; what an earlier one had stays as its death left it.
func (b *cacheBench) start(incarnation int) {
	n, _ := b.cat.Local().Node("n1")
	if n.Incarnation != testUUID(incarnation) {
		n.Incarnation = testUUID(incarnation)
		b.cat.must(meta.Command{RegisterNode: &meta.RegisterNode{Node: n}})
	}
	b.process(b.t, n.Incarnation)
	a := b.mounts.attacher
	a.caches = newCaches(&Config{CacheDir: b.dir, CacheBytes: 4 << 20, Cluster: trivet.ClusterID(testUUID(1))})
	a.caches.deadline = time.Hour // nothing is written back before a test wants it, however slow the machine is
	a.openGroup = func(c replication.VolumeConfig) (groupDevice, error) {
		return &epochDevice{Device: b.disk, cat: b.cat, epoch: c.Epoch}, nil
	}
}

// die leaves everything as SIGKILL does.
func (b *cacheBench) die() {
	for _, p := range b.mounts.attacher.paths() {
		p.cache.stop()
		<-p.cache.done
		require.NoError(b.t, p.cache.Abandon())
	}
}

func (b *cacheBench) mapping() string { return filepath.Join(b.dir, vol.String()+".cache") }

func (b *cacheBench) write(lba int64, value byte) {
	p := b.mounts.attacher.get(vol).path
	require.NoError(b.t, p.WriteAt(b.t.Context(), bytes.Repeat([]byte{value}, trivet.BlockSize), lba*trivet.BlockSize))
}

func (b *cacheBench) below(lba int64) byte {
	p := make([]byte, trivet.BlockSize)
	require.NoError(b.t, b.disk.ReadAt(b.t.Context(), p, lba*trivet.BlockSize))
	return p[0]
}

// recovering runs what a node does at its start, and plays the leader's agent.
func (b *cacheBench) recovering() {
	done := make(chan struct{})
	go func() { b.mounts.recoverCaches(b.t.Context()); close(done) }()
	for {
		changed := b.cat.Changed()
		if v := b.cat.volume(vol); v.FencedEpoch < v.Epoch {
			b.fence()
		}
		select {
		case <-done:
			return
		case <-changed:
		}
	}
}

func writeBackParams() map[string]string {
	return map[string]string{"cacheMode": "writeBack", "cacheSize": "1048576"}
}

func TestNextProcessWritesBackUnasked(t *testing.T) {
	t.Parallel()
	b := newCacheBench(t, writeBackParams())
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	b.write(3, 7)
	require.Zero(t, b.below(3), "acknowledged by the cache alone")
	b.die()
	require.FileExists(t, b.mapping())
	b.start(0x302)
	b.recovering()
	require.EqualValues(t, 7, b.below(3))
	require.EqualValues(t, 2, b.mounts.attacher.get(vol).epoch, "at an epoch of its own")
	require.NoError(t, b.mounts.attacher.drop(vol))
	require.NoFileExists(t, b.mapping(), "nothing is left in it")
}

// H13: the volume went elsewhere while the process was dead, and even came back.
func TestBlocksOfALostAttachmentAreDropped(t *testing.T) {
	t.Parallel()
	for _, back := range []bool{false, true} {
		b := newCacheBench(t, writeBackParams())
		b.grant("n1", meta.SingleNodeMultiWriter, false)
		require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
		b.write(3, 7)
		b.die()
		b.revoke()
		if back {
			b.grant("n1", meta.SingleNodeMultiWriter, false)
		}
		b.start(0x302)
		b.recovering()
		require.Zero(t, b.below(3))
		if back {
			b.write(4, 1)
			require.NoError(t, b.mounts.attacher.drop(vol))
			require.EqualValues(t, 1, b.below(4))
		}
		require.Zero(t, b.below(3))
		require.NoFileExists(t, b.mapping())
	}
}

// The mapping is locked before the epoch is raised: else two processes could both take the blocks for theirs.
func TestMappingIsLockedBeforeTheEpochRises(t *testing.T) {
	t.Parallel()
	b := newCacheBench(t, writeBackParams())
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.NoError(t, os.MkdirAll(b.dir, 0o700))
	other, err := cache.Lock(b.mapping())
	require.NoError(t, err)
	b.start(0x302)
	require.ErrorIs(t, b.mounts.stage(t.Context(), stageReq()), trivet.ErrInUse)
	require.EqualValues(t, 1, b.cat.volume(vol).Epoch)
	require.NoError(t, other.Close())
}

// H14: after a lost write-back the next user gets a new epoch, and what was acknowledged is written back there.
func TestPoisonedCacheGetsANewEpoch(t *testing.T) {
	t.Parallel()
	b := newCacheBench(t, writeBackParams())
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	b.write(3, 7)
	b.disk.FailNth(faultdev.Write, 1, trivet.ErrUnavailable)
	p := b.mounts.attacher.get(vol).path
	require.ErrorIs(t, p.Flush(t.Context()), trivet.ErrUnavailable)
	require.ErrorIs(t, p.Flush(t.Context()), trivet.ErrUnavailable)
	require.NoError(t, b.mounts.unstage(t.Context(), vol, stagingDir))
	b.mustStageAnew(t, 1)
	p = b.mounts.attacher.get(vol).path
	require.NoError(t, p.Flush(t.Context()))
	require.EqualValues(t, 7, b.below(3))
}

// A detach has written everything back before the right to write ends.
func TestUnstageDrains(t *testing.T) {
	t.Parallel()
	b := newCacheBench(t, writeBackParams())
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	b.write(3, 7)
	require.NoError(t, b.mounts.unstage(t.Context(), vol, stagingDir))
	require.EqualValues(t, 7, b.below(3))
	_, _, _, err := b.mounts.openNBD(t.Context(), vol)
	require.NoError(t, err)
	b.write(4, 8)
	b.mounts.closeNBD(vol)
	require.EqualValues(t, 8, b.below(4))
	b.revoke()
	b.mounts.sweep()
	require.NoFileExists(t, b.mapping())
}

// The mode is switched live, in both directions, on a volume that began without a file.
func TestCacheModeIsSwitchedLive(t *testing.T) {
	t.Parallel()
	b := newCacheBench(t, nil)
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	require.NoDirExists(t, b.dir, "nothing is made that nobody wants")
	p := b.mounts.attacher.get(vol).path
	b.write(1, 1)
	require.EqualValues(t, 1, b.below(1))
	v := b.cat.volume(vol)
	switchTo := func(params map[string]string) {
		v.Params = params
		require.NoError(t, p.apply(&v))
		want, _, err := cacheOf(&v)
		require.NoError(t, err)
		require.Eventually(t, func() bool {
			st := p.cache.Stats()
			return st.Mode == want.Mode && st.Bytes == want.Bytes
		}, time.Minute, time.Millisecond)
	}
	switchTo(writeBackParams())
	b.write(2, 2)
	require.Zero(t, b.below(2))
	switchTo(map[string]string{})
	require.EqualValues(t, 2, b.below(2), "written back before the switch was over")
	b.write(3, 3)
	require.EqualValues(t, 3, b.below(3))
	require.NoError(t, b.mounts.attacher.drop(vol))
	require.NoFileExists(t, b.mapping())
}

// Without a directory nothing is writeBack, and nothing fails.
func TestWriteBackWithoutADirectoryGoesThrough(t *testing.T) {
	t.Parallel()
	b := newCacheBench(t, writeBackParams())
	b.mounts.attacher.caches.dir = ""
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	b.write(3, 7)
	require.EqualValues(t, 7, b.below(3))
}

// A file that is not ours keeps the volume from being attached, and is left alone.
func TestForeignMappingIsLeftAlone(t *testing.T) {
	t.Parallel()
	b := newCacheBench(t, writeBackParams())
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.NoError(t, os.MkdirAll(b.dir, 0o700))
	foreign := bytes.Repeat([]byte("not a cache!"), 1000)
	require.NoError(t, os.WriteFile(b.mapping(), foreign, 0o600))
	b.recovering()
	require.ErrorIs(t, b.mounts.stage(t.Context(), stageReq()), trivet.ErrCorrupt)
	now, err := os.ReadFile(b.mapping())
	require.NoError(t, err)
	require.Equal(t, foreign, now)
}

func TestCacheSettings(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		params map[string]string
		mode   cache.Mode
		bytes  int64
		ahead  int64
		bad    bool
	}{
		{"none", nil, cache.WriteThrough, 0, 1 << 20, false},
		{"write back", map[string]string{"cacheMode": "writeBack"}, cache.WriteBack, 64 << 20, 1 << 20, false},
		{"sizes", map[string]string{"cacheSize": "1048576", "readAhead": "0"}, cache.WriteThrough, 1 << 20, 0, false},
		{"off", map[string]string{"cacheMode": "writeBack", "cacheSize": "0"}, cache.WriteBack, 0, 1 << 20, false},
		{"mode", map[string]string{"cacheMode": "maybe"}, "", 0, 0, true},
		{"size", map[string]string{"cacheSize": "1Mi"}, "", 0, 0, true},
		{"small", map[string]string{"cacheSize": "4096"}, "", 0, 0, true},
		{"eviction", map[string]string{"eviction": "mru"}, "", 0, 0, true},
	} {
		s, _, err := cacheOf(&meta.Volume{Params: tc.params})
		if tc.bad {
			assert.ErrorIs(t, err, trivet.ErrInvalid, tc.name)
			continue
		}
		require.NoError(t, err, tc.name)
		assert.Equal(t, tc.mode, s.Mode, tc.name)
		assert.Equal(t, tc.bytes, s.Bytes, tc.name)
		assert.Equal(t, tc.ahead, s.ReadAheadBytes, tc.name)
	}
}
