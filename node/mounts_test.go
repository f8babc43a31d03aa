package node

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/node/blockdev"
)

const (
	stagingDir = "/kubelet/staging"
	targetA    = "/kubelet/pods/a/mount"
	targetB    = "/kubelet/pods/b/mount"
)

func stageReq() StageRequest {
	return StageRequest{Volume: vol, StagingPath: stagingDir, MountFlags: []string{"noatime"}}
}

func publishReq(target string) PublishRequest {
	return PublishRequest{Volume: vol, StagingPath: stagingDir, TargetPath: target, Mode: meta.SingleNodeMultiWriter}
}

func TestStagePublishAndBack(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	ctx := t.Context()
	for range 3 { // every call is idempotent
		require.NoError(t, b.mounts.stage(ctx, stageReq()))
	}
	assert.Equal(t, []string{"ext4", "noatime"}, b.mounter.options[stagingDir])
	for range 3 {
		require.NoError(t, b.mounts.publish(ctx, publishReq(targetA)))
	}
	ro := publishReq(targetB)
	ro.ReadOnly = true
	require.NoError(t, b.mounts.publish(ctx, ro))
	assert.False(t, b.mounter.ro[targetA])
	assert.True(t, b.mounter.ro[targetB])
	assert.Equal(t, 3, b.mounter.mountedN())

	s, err := b.mounts.stats(ctx, vol, targetA)
	require.NoError(t, err)
	assert.EqualValues(t, 42, s.TotalBytes)
	_, err = b.mounts.stats(ctx, vol, "some/path")
	require.ErrorIs(t, err, trivet.ErrNotFound)

	require.ErrorIs(t, b.mounts.unstage(ctx, vol, stagingDir), trivet.ErrInUse)
	assert.Equal(t, 3, b.mounter.mountedN(), "a refused unstage takes nothing away")
	for range 3 {
		require.NoError(t, b.mounts.unpublish(ctx, vol, targetA))
		require.NoError(t, b.mounts.unpublish(ctx, vol, targetB))
	}
	for range 3 {
		require.NoError(t, b.mounts.unstage(ctx, vol, stagingDir))
	}
	assert.Zero(t, b.mounter.mountedN())
	assert.Empty(t, b.mounter.made)
	assert.Empty(t, b.mounter.devices)
	assert.Empty(t, b.mounts.records.list())
	files, err := os.ReadDir(filepath.Join(b.runDir, "volumes"))
	require.NoError(t, err)
	assert.Empty(t, files)
}

func TestStageBlock(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	r := StageRequest{Volume: vol, StagingPath: stagingDir, Block: true}
	require.NoError(t, b.mounts.stage(t.Context(), r))
	assert.Zero(t, b.mounter.mountedN(), "a block volume is attached and not mounted")
	p := publishReq(targetA)
	require.ErrorIs(t, b.mounts.publish(t.Context(), p), ErrNotStaged, "staged in another form")
	p.Block = true
	require.NoError(t, b.mounts.publish(t.Context(), p))
	s, err := b.mounts.stats(t.Context(), vol, targetA)
	require.NoError(t, err)
	assert.Equal(t, VolumeStats{Block: true, TotalBytes: 64 << 20}, s)
	require.NoError(t, b.mounts.unpublish(t.Context(), vol, targetA))
	require.NoError(t, b.mounts.unstage(t.Context(), vol, stagingDir))
	assert.Empty(t, b.mounter.devices)
}

func TestStageErrors(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		prepare func(t *testing.T, b *mountBench)
		edit    func(r *StageRequest)
		want    error
	}{
		{"unknown volume", nil, func(r *StageRequest) { r.Volume = 99 }, trivet.ErrNotFound},
		{"nobody holds it", nil, nil, trivet.ErrInUse},
		{"another node holds it", func(_ *testing.T, b *mountBench) {
			b.grant("n2", meta.SingleNodeMultiWriter, false)
		}, nil, trivet.ErrInUse},
		{"catalogue is away", func(_ *testing.T, b *mountBench) { b.cat.setDown(true) }, nil, trivet.ErrUnavailable},
		{"no volume", nil, func(r *StageRequest) { r.Volume = 0 }, trivet.ErrInvalid},
		{"no path", nil, func(r *StageRequest) { r.StagingPath = "" }, trivet.ErrInvalid},
		{"the root", nil, func(r *StageRequest) { r.StagingPath = "//" }, trivet.ErrInvalid},
		{"relative", nil, func(r *StageRequest) { r.StagingPath = "a/b" }, trivet.ErrInvalid},
		{"dot dot", nil, func(r *StageRequest) { r.StagingPath = "/a/../etc" }, trivet.ErrInvalid},
		{"newline", nil, func(r *StageRequest) { r.StagingPath = "/a\nb" }, trivet.ErrInvalid},
		{"filesystem", nil, func(r *StageRequest) { r.FSType = "ntfs" }, ErrUnsupported},
		{"filesystem injection", nil, func(r *StageRequest) { r.FSType = "ext4 -O x" }, ErrUnsupported},
		{"option", nil, func(r *StageRequest) { r.MountFlags = []string{"suid"} }, ErrUnsupported},
		{"staged elsewhere", func(t *testing.T, b *mountBench) {
			t.Helper()
			b.grant("n1", meta.SingleNodeMultiWriter, false)
			require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
		}, func(r *StageRequest) { r.StagingPath = "/other" }, trivet.ErrExists},
		{"staged with other options", func(t *testing.T, b *mountBench) {
			t.Helper()
			b.grant("n1", meta.SingleNodeMultiWriter, false)
			require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
		}, func(r *StageRequest) { r.MountFlags = nil }, trivet.ErrExists},
		{"something else is mounted there", func(_ *testing.T, b *mountBench) {
			b.grant("n1", meta.SingleNodeMultiWriter, false)
			b.mounter.table[stagingDir] = []uint64{5}
		}, nil, trivet.ErrInUse},
		{"another call is under way", func(t *testing.T, b *mountBench) {
			t.Helper()
			unlock, err := b.mounts.ops.try(vol)
			require.NoError(t, err)
			t.Cleanup(unlock)
		}, nil, trivet.ErrPending},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := newMountBench(t)
			if tt.prepare != nil {
				tt.prepare(t, b)
			}
			r := stageReq()
			if tt.edit != nil {
				tt.edit(&r)
			}
			require.ErrorIs(t, b.mounts.stage(t.Context(), r), tt.want)
		})
	}
}

func TestPublishErrors(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		prepare func(t *testing.T, b *mountBench)
		edit    func(r *PublishRequest)
		want    error
	}{
		{"no staging path", nil, func(r *PublishRequest) { r.StagingPath = "" }, ErrNotStaged},
		{"staged elsewhere", nil, func(r *PublishRequest) { r.StagingPath = "/other" }, ErrNotStaged},
		{"not staged at all", nil, func(r *PublishRequest) { r.Volume = 99 }, ErrNotStaged},
		{"no target", nil, func(r *PublishRequest) { r.TargetPath = "" }, trivet.ErrInvalid},
		{"target outside", nil, func(r *PublishRequest) { r.TargetPath = "/a/../../etc" }, trivet.ErrInvalid},
		{"target is the root", nil, func(r *PublishRequest) { r.TargetPath = "/" }, trivet.ErrInvalid},
		{"option", nil, func(r *PublishRequest) { r.MountFlags = []string{"dev"} }, ErrUnsupported},
		{
			"same target, other options", nil, func(r *PublishRequest) { r.TargetPath, r.ReadOnly = targetA, true },
			trivet.ErrExists,
		},
		{
			"second target of a volume for one", nil, func(r *PublishRequest) { r.Mode = meta.SingleNodeSingleWriter },
			trivet.ErrInUse,
		},
		{"something else is mounted there", func(_ *testing.T, b *mountBench) {
			b.mounter.table[targetB] = []uint64{5}
		}, nil, trivet.ErrInUse},
		{"the staging mount is gone", func(_ *testing.T, b *mountBench) {
			delete(b.mounter.table, stagingDir)
		}, nil, ErrNotStaged},
		{"the device is dead", func(_ *testing.T, b *mountBench) {
			b.kernel().die(trivet.ErrFenced)
		}, nil, ErrNotStaged},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := newMountBench(t)
			b.grant("n1", meta.SingleNodeMultiWriter, false)
			require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
			require.NoError(t, b.mounts.publish(t.Context(), publishReq(targetA)))
			before := b.mounter.mountedN()
			if tt.prepare != nil {
				tt.prepare(t, b)
				before = b.mounter.mountedN()
			}
			r := publishReq(targetB)
			if tt.edit != nil {
				tt.edit(&r)
			}
			require.ErrorIs(t, b.mounts.publish(t.Context(), r), tt.want)
			assert.Equal(t, before, b.mounter.mountedN())
		})
	}
}

// A failed mount leaves nothing: the kubelet will not unstage what was never staged.
func TestFailedStageAndPublishLeaveNothing(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	b.mounter.failing = errors.New("mkfs failed")
	require.ErrorContains(t, b.mounts.stage(t.Context(), stageReq()), "mkfs failed")
	assert.Empty(t, b.mounter.devices)
	assert.Empty(t, b.mounts.records.list())

	b.mounter.failing = nil
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	assert.Equal(t, 1, b.groupN(), "the same epoch has the same group (H39)")
	b.mounter.failing = errors.New("bind failed")
	require.ErrorContains(t, b.mounts.publish(t.Context(), publishReq(targetA)), "bind failed")
	assert.Empty(t, b.mounts.records.get(vol).Published)
	require.NoError(t, b.mounts.unstage(t.Context(), vol, stagingDir))
}

// H39: the writes of an epoch are counted from one by one group; staging again within the epoch goes
// on counting.
func TestEpochHasOneGroup(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	for range 3 {
		require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
		require.NoError(t, b.mounts.unstage(t.Context(), vol, stagingDir))
		b.mounts.sweep()
	}
	assert.Equal(t, 1, b.groupN())
	assert.False(t, b.group().isClosed())

	first := b.group()
	b.revoke()
	b.mounts.sweep()
	assert.True(t, first.isClosed(), "an attachment that is over is closed")
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	assert.Equal(t, 2, b.groupN())
	assert.Equal(t, b.cat.volume(vol).Epoch, b.group().cfg.Epoch)
}

// H14: a group that lost a write fails every Flush of its epoch, so the next use gets another epoch.
func TestPoisonedGroupGetsANewEpoch(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	require.NoError(t, b.mounts.unstage(t.Context(), vol, stagingDir))
	first := b.group()
	first.poison()
	b.mustStageAnew(t, first.cfg.Epoch)
	assert.True(t, first.isClosed())
	assert.Greater(t, b.group().cfg.Epoch, first.cfg.Epoch)
}

// H12: no device is shown before everything older is fenced.
func TestStageWaitsForTheFence(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.cat.must(meta.Command{Attach: &meta.Attach{Volume: vol, Node: "n1", Mode: meta.SingleNodeMultiWriter}})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := b.mounts.stage(ctx, stageReq())
	require.ErrorIs(t, err, trivet.ErrUnavailable)
	assert.Zero(t, b.groupN())
	done := make(chan error, 1)
	go func() { done <- b.mounts.stage(t.Context(), stageReq()) }()
	b.fence()
	require.NoError(t, <-done)
	assert.EqualValues(t, 1, b.group().cfg.Epoch, "a retry does not raise the epoch")
}

// mustStageAnew stages, and fences the epoch that is reserved for it above old.
func (b *mountBench) mustStageAnew(t *testing.T, old trivet.Epoch) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- b.mounts.stage(t.Context(), stageReq()) }()
	for {
		changed := b.cat.Changed()
		if b.cat.volume(vol).Epoch > old {
			break
		}
		select {
		case <-changed:
		case err := <-done:
			require.Fail(t, "staged without a new epoch", "%v", err)
		}
	}
	b.fence()
	require.NoError(t, <-done)
}

// H31: a new process of the node has an epoch of its own, so the old one is fenced.
func TestNewProcessTakesOver(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	require.NoError(t, b.mounts.publish(t.Context(), publishReq(targetA)))
	old := b.group().cfg.Epoch

	n, _ := b.cat.Local().Node("n1")
	n.Incarnation = testUUID(0x302)
	b.cat.must(meta.Command{RegisterNode: &meta.RegisterNode{Node: n}})
	b.process(t, n.Incarnation)
	require.NoError(t, b.mounts.cleanUp(t.Context(), blockdev.Leftovers{RunDir: filepath.Join(b.runDir, "blockdev")}, nil))
	assert.Zero(t, b.mounter.mountedN(), "what the dead process mounted is gone")
	assert.True(t, b.mounter.shaded[targetA])
	_, err := b.mounts.stats(t.Context(), vol, targetA)
	require.ErrorIs(t, err, trivet.ErrNotFound)

	b.mustStageAnew(t, old)
	assert.Greater(t, b.group().cfg.Epoch, old)
	require.NoError(t, b.mounts.publish(t.Context(), publishReq(targetA)))
	assert.Equal(t, 2, b.mounter.mountedN())
	assert.Len(t, b.mounter.table[targetA], 1, "the shade is gone")
	require.NoError(t, b.mounts.unpublish(t.Context(), vol, targetA))
	require.NoError(t, b.mounts.unstage(t.Context(), vol, stagingDir))
	assert.Empty(t, b.mounts.records.list())
}

// H13: after a forced detach and a new grant, the old device is discarded with all its mounts.
func TestStageDiscardsAFencedAttachment(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	require.NoError(t, b.mounts.publish(t.Context(), publishReq(targetA)))
	b.mounter.busy[stagingDir] = true
	old, oldDevice := b.group(), b.kernel()
	b.revoke()
	b.grant("n2", meta.SingleNodeMultiWriter, false)
	b.revoke()
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	oldDevice.die(trivet.ErrFenced)

	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	assert.True(t, old.isClosed())
	assert.NotEqual(t, oldDevice.Path(), b.kernel().Path())
	assert.True(t, b.mounter.lazy[stagingDir])
	assert.True(t, b.mounter.shaded[targetA])
	assert.Equal(t, 1, b.mounter.mountedN())
	require.NoError(t, b.mounts.unpublish(t.Context(), vol, targetA))
	b.mounter.busy[stagingDir] = false
	require.NoError(t, b.mounts.unstage(t.Context(), vol, stagingDir))
}

// H31: a device whose connection to the kernel broke is replaced; the epoch, and so the group, stay.
func TestStageReplacesADeadDevice(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	require.NoError(t, b.mounts.publish(t.Context(), publishReq(targetA)))
	dead := b.kernel()
	dead.die(trivet.ErrUnavailable)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	assert.NotEqual(t, dead.Path(), b.kernel().Path())
	assert.Equal(t, 1, b.groupN())
	assert.True(t, b.mounter.shaded[targetA])
	require.NoError(t, b.mounts.publish(t.Context(), publishReq(targetA)))
	assert.Len(t, b.mounter.table[targetA], 1)
}

func TestBusyMountStays(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	require.NoError(t, b.mounts.publish(t.Context(), publishReq(targetA)))
	b.mounter.busy[targetA], b.mounter.busy[stagingDir] = true, true
	require.ErrorIs(t, b.mounts.unpublish(t.Context(), vol, targetA), trivet.ErrInUse)
	b.mounter.busy[targetA] = false
	require.NoError(t, b.mounts.unpublish(t.Context(), vol, targetA))
	require.ErrorIs(t, b.mounts.unstage(t.Context(), vol, stagingDir), trivet.ErrInUse)
	assert.NotEmpty(t, b.mounter.devices)
	b.mounter.busy[stagingDir] = false
	require.NoError(t, b.mounts.unstage(t.Context(), vol, stagingDir))
}

func TestReadOnlyAttachment(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.grant("n1", meta.SingleNodeReader, false)
	r := stageReq()
	r.FSType = "xfs"
	r.MountFlags = append(r.MountFlags, "discard")
	require.NoError(t, b.mounts.stage(t.Context(), r))
	assert.Equal(t, []string{"xfs", "noatime", "ro"}, b.mounter.options[stagingDir])
	require.NoError(t, b.mounts.publish(t.Context(), publishReq(targetA)))
	assert.True(t, b.mounter.ro[targetA])
	device := b.mounts.attacher.get(vol).path
	require.ErrorIs(t, device.WriteAt(t.Context(), make([]byte, 4096), 0), trivet.ErrInvalid)
	require.ErrorIs(t, device.Discard(t.Context(), 0, 4096), trivet.ErrInvalid)
	require.ErrorIs(t, device.WriteZeroes(t.Context(), 0, 4096), trivet.ErrInvalid)
	require.NoError(t, device.Flush(t.Context()))
}

func TestLeaderFollowsTheAttachment(t *testing.T) {
	t.Parallel()
	for _, follow := range []bool{true, false} {
		b := newMountBench(t)
		b.mounts.attacher.follow = follow
		other := testReplica(int(vol)<<4 | 2)
		b.cat.must(meta.Command{ReportLeader: &meta.ReportLeader{Volume: vol, Replica: other, Term: 1}})
		b.grant("n1", meta.SingleNodeMultiWriter, false)
		_, err := b.mounts.attach(t.Context(), vol)
		require.NoError(t, err)
		want := trivet.ReplicaID("")
		if follow {
			want = testReplica(int(vol)<<4 | 1)
		}
		assert.Equal(t, want, b.cat.volume(vol).WantLeader)
	}
}

func TestAttachAndDetach(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	first, err := b.mounts.attach(t.Context(), vol)
	require.NoError(t, err)
	again, err := b.mounts.attach(t.Context(), vol)
	require.NoError(t, err)
	assert.Equal(t, first, again)
	device, name, readOnly, err := b.mounts.openNBD(t.Context(), vol)
	require.NoError(t, err)
	assert.Equal(t, vol.String(), name)
	assert.False(t, readOnly)
	assert.EqualValues(t, 64<<20, device.Size())
	require.NoError(t, b.mounts.detach(t.Context(), vol))
	require.NoError(t, b.mounts.detach(t.Context(), vol))
	b.revoke()
	b.mounts.sweep()
	assert.False(t, b.group().isClosed(), "NBD still serves it")
	b.mounts.attacher.useNBD(vol, -1)
	b.mounts.sweep()
	assert.True(t, b.group().isClosed())
}

func TestCloseTakesEverythingOff(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	require.NoError(t, b.mounts.publish(t.Context(), publishReq(targetA)))
	b.mounter.busy[targetA], b.mounter.busy[stagingDir] = true, true
	require.NoError(t, b.mounts.close(t.Context()))
	assert.Zero(t, b.mounter.mountedN())
	assert.True(t, b.mounter.shaded[targetA], "a container that starts again must not write to the machine's disk")
	assert.Empty(t, b.mounter.devices)
	assert.True(t, b.group().isClosed())

	// The next process knows of the shade, and unpublishing removes it.
	b.process(t, testUUID(0x302))
	require.NoError(t, b.mounts.cleanUp(t.Context(), blockdev.Leftovers{RunDir: filepath.Join(b.runDir, "blockdev")}, nil))
	require.NoError(t, b.mounts.unpublish(t.Context(), vol, targetA))
	assert.Empty(t, b.mounter.table[targetA])
	assert.Empty(t, b.mounter.made)
	assert.Empty(t, b.mounts.records.list())
}

// Clean-up must not touch what was mounted at a recorded path since.
func TestCleanUpLeavesForeignMounts(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	b.mounter.table[stagingDir] = []uint64{5}
	b.process(t, testUUID(0x302))
	require.NoError(t, b.mounts.cleanUp(t.Context(), blockdev.Leftovers{RunDir: filepath.Join(b.runDir, "blockdev")}, nil))
	assert.Equal(t, []uint64{5}, b.mounter.table[stagingDir])
}
