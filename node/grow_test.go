package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication"
)

func grow(mib int64) meta.Command {
	return meta.Command{GrowVolume: &meta.GrowVolume{Volume: vol, SizeBytes: mib << 20}}
}

func sized(mib int64) meta.Command {
	return meta.Command{ReportSize: &meta.ReportSize{Volume: vol, SizeBytes: mib << 20}}
}

// followGrowth runs what makes open volumes follow, as Node does, and lets it come to rest.
func (b *mountBench) followGrowth(t *testing.T) (settle func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { b.mounts.growKernels(ctx); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
	return func() {
		b.mounts.followSizes()
		synctest.Wait()
	}
}

// The group's device grows when the catalogue says that the group has grown, not when it is wanted, and the kernel's
// after it.
func TestDeviceFollowsTheSize(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newMountBench(t)
		settle := b.followGrowth(t)
		b.grant("n1", meta.SingleNodeMultiWriter, false)
		require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
		b.cat.must(grow(128))
		settle()
		assert.EqualValues(t, 64<<20, b.group().Size(), "not committed yet")
		assert.Empty(t, b.kernel().grown)
		b.cat.must(sized(128))
		settle()
		assert.EqualValues(t, 128<<20, b.mounts.attacher.get(vol).path.Size())
		assert.Equal(t, []int64{128 << 20}, b.kernel().grown)
		settle()
		assert.Len(t, b.kernel().grown, 1, "once is enough")

		// While something else is done with the volume the device waits, and is grown after it.
		unlock, err := b.mounts.ops.try(vol)
		require.NoError(t, err)
		b.cat.must(sized(192))
		settle()
		assert.EqualValues(t, 192<<20, b.group().Size(), "requests beyond the old end are served already")
		assert.Len(t, b.kernel().grown, 1)
		unlock()
		<-time.After(2 * growRetry)
		synctest.Wait()
		assert.Equal(t, []int64{128 << 20, 192 << 20}, b.kernel().grown)

		// One that cannot is not asked for ever: it has the new size when it is attached anew.
		b.kernel().refuse(fmt.Errorf("%w: %w", trivet.ErrInUse, errors.ErrUnsupported))
		b.cat.must(sized(256))
		settle()
		assert.Empty(t, b.mounts.growing.list())
		b.kernel().refuse(errors.New("for the moment"))
		b.cat.must(sized(320))
		settle()
		assert.Len(t, b.mounts.growing.list(), 1)
		b.kernel().refuse(nil)
		<-time.After(2 * growRetry)
		synctest.Wait()
		assert.Empty(t, b.mounts.growing.list())
		require.NoError(t, b.mounts.close(t.Context()))
	})
}

// A volume that grows while it is being opened has the new size all the same.
func TestOpenOfWhatGrows(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	open := b.mounts.attacher.openGroup
	b.mounts.attacher.openGroup = func(c replication.VolumeConfig) (groupDevice, error) {
		b.cat.must(sized(128)) // and nobody sees yet that it is open
		return open(c)
	}
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	assert.EqualValues(t, 128<<20, b.group().Size())
}

func TestExpand(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	ctx := t.Context()
	_, err := b.mounts.expand(ctx, vol, stagingDir, 0)
	require.ErrorIs(t, err, trivet.ErrNotFound)
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.NoError(t, b.mounts.stage(ctx, stageReq()))
	require.NoError(t, b.mounts.publish(ctx, publishReq(targetA)))
	_, err = b.mounts.expand(ctx, vol, targetA, 128<<20)
	require.ErrorIs(t, err, trivet.ErrOutOfRange)
	b.cat.must(sized(128)) // nothing follows by itself in this test
	for range 2 {
		size, err := b.mounts.expand(ctx, vol, targetA, 128<<20)
		require.NoError(t, err)
		assert.EqualValues(t, 128<<20, size)
	}
	assert.Equal(t, []int64{128 << 20, 128 << 20}, b.kernel().grown)
	want := "ext4 on " + b.kernel().path + " at " + stagingDir
	assert.Equal(t, []string{want, want}, b.mounter.fsGrown, "the filesystem is grown where it is staged")

	b.kernel().refuse(fmt.Errorf("%w: %w", trivet.ErrInUse, errors.ErrUnsupported))
	_, err = b.mounts.expand(ctx, vol, targetA, 0)
	require.ErrorIs(t, err, trivet.ErrInUse)
	assert.Len(t, b.mounter.fsGrown, 2, "the filesystem is never grown beyond its device")
}

// Every volume that grows in use is grown by its node, too. Kubelet's call waits for that instead of failing.
func TestExpandBesideGrowth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newMountBench(t)
		b.grant("n1", meta.SingleNodeMultiWriter, false)
		require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
		b.cat.must(sized(128))
		unlock, err := b.mounts.ops.try(vol)
		require.NoError(t, err)
		_, err = b.mounts.expand(t.Context(), vol, stagingDir, 0)
		require.ErrorIs(t, err, trivet.ErrPending, "something else is at it, for nobody knows how long")

		b.mounts.growing.add(vol)
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = b.mounts.expand(short, vol, stagingDir, 0)
		require.ErrorIs(t, err, trivet.ErrPending)
		done := make(chan error, 1)
		go func() { _, err := b.mounts.expand(t.Context(), vol, stagingDir, 128<<20); done <- err }()
		synctest.Wait()
		require.Empty(t, done)
		unlock()
		require.NoError(t, <-done)
		require.Len(t, b.mounter.fsGrown, 1)
		require.NoError(t, b.mounts.close(t.Context()))
	})
}

func TestExpandWithoutFilesystem(t *testing.T) {
	t.Parallel()
	for name, set := range map[string]func(*StageRequest){
		"block":     func(r *StageRequest) { r.Block = true },
		"read-only": func(r *StageRequest) { r.ReadOnly = true },
	} {
		b := newMountBench(t)
		b.grant("n1", meta.SingleNodeMultiWriter, false)
		r := stageReq()
		set(&r)
		require.NoError(t, b.mounts.stage(t.Context(), r), name)
		b.cat.must(sized(128))
		size, err := b.mounts.expand(t.Context(), vol, stagingDir, 0)
		require.NoError(t, err, name)
		assert.EqualValues(t, 128<<20, size, name)
		assert.Empty(t, b.mounter.fsGrown, name)
	}
}

func TestPlanSize(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		want, has, group int64
		does             int64
	}{
		"nothing":                   {0, 64, 64, 0},
		"wanted":                    {128, 64, 64, 128},
		"committed, not reported":   {128, 64, 128, 128},
		"group is ahead of both":    {128, 64, 192, 192},
		"catalogue brought back":    {0, 64, 128, 128},
		"leader has not applied it": {0, 128, 64, 0},
	} {
		v := meta.Volume{ID: vol, SizeBytes: tc.has, WantSizeBytes: tc.want, Phase: meta.PhaseBound}
		got := planSize(&v, &meta.Replica{}, local{status: replication.ReplicaStatus{SizeBytes: tc.group}})
		if tc.does == 0 {
			assert.Empty(t, got, name)
			continue
		}
		require.Len(t, got, 1, name)
		assert.Equal(t, tc.does, got[0].sizeBytes, name)
		v.Phase = meta.PhaseDeleting
		assert.Empty(t, planSize(&v, &meta.Replica{}, local{}), name)
	}
}

// The size that a volume began with is what a joiner is made with: it is given the log from its first entry, in
// which a write beyond the first size was refused before the volume grew (I13). And a parked volume wakes to grow.
func TestGroupGrowsParkedThenJoins(t *testing.T) {
	inGroups(t, 4, 5*time.Second, func(t *testing.T, b *groupBench) {
		parked := func() bool {
			for _, g := range b.nodes {
				if g.runs() {
					return false
				}
			}
			return true
		}
		d := b.attach()
		require.NoError(t, d.SetSize(128<<20)) // ahead of the group
		p, off := endOf(128)
		require.ErrorIs(t, d.WriteAt(t.Context(), p, off), trivet.ErrOutOfRange)
		b.detach(d)
		b.until("it is parked", parked)
		b.cat.must(grow(128))
		b.until("it has grown", b.grown(128))
		b.until("it is parked again", parked)
		d = b.attach()
		assert.EqualValues(t, 128<<20, d.Size())
		b.add(4, 4, ours(1))
		b.until("it has moved", b.has(0, 2, 3, 4))
		b.requireGroup(2, 3, 4)
		b.requireSize(128)
		got := make([]byte, trivet.BlockSize)
		require.NoError(t, d.ReadAt(t.Context(), got, off))
		assert.Zero(t, got[0], "the write was refused")
		b.writeEnd(d, 128)
		require.NoError(t, d.Close())
	})
}

// Whichever step of a move the volume grows at, and whichever machine crashes at it, before it or after it and before
// anybody heard: the volume has its size in the end, on every replica, and what was written beyond the old end (H20).
func TestGroupGrowsAtEachStepOfAMove(t *testing.T) {
	steps := stepsOfAMove + 2 // Resize, ReportSize
	for _, after := range []bool{false, true} {
		for at := 1; at <= steps; at++ {
			if testing.Short() && at%3 != 1 {
				continue
			}
			t.Run(fmt.Sprintf("after=%v,step=%d", after, at), func(t *testing.T) { growAtStep(t, at, after) })
		}
	}
}

func growAtStep(t *testing.T, at int, after bool) {
	t.Helper()
	inGroups(t, 4, -1, func(t *testing.T, b *groupBench) {
		d := b.attach()
		b.trip = &trip{at: at, after: after}
		for _, g := range b.nodes {
			g.kill()
			g.boot()
		}
		var old *groupNode
		b.until("a leader", func() bool { old, _ = b.leader(); return old != nil })
		stop := b.write(d)
		b.add(4, 4, ours(old.n))
		if at > 1 { // the step before the one at which a machine crashes
			b.until("it is on its way", func() bool { return b.trip.done() >= at-1 })
		}
		b.cat.must(grow(128))
		rest := others(old.n)
		b.until("it has grown", b.grown(128))
		require.NoError(t, d.SetSize(128<<20)) // as the attacher does
		b.writeEnd(d, 128)
		b.until("it has moved", b.has(0, rest[0], rest[1], 4))
		stop()
		require.True(t, b.trip.reached(), "nothing crashed")
		b.requireGroup(rest[0], rest[1], 4)
		b.requireSize(128)
		b.readEnd(d, 128)
		require.NoError(t, d.Close())
	})
}

func (b *groupBench) grown(mib int64) func() bool {
	return func() bool { return b.cat.volume(vol).SizeBytes == mib<<20 }
}

func endOf(mib int64) ([]byte, int64) {
	return bytes.Repeat([]byte{0xe0}, trivet.BlockSize), mib<<20 - trivet.BlockSize
}

func (b *groupBench) writeEnd(d *replication.Volume, mib int64) {
	b.t.Helper()
	p, off := endOf(mib)
	require.NoError(b.t, d.WriteAt(b.t.Context(), p, off))
}

func (b *groupBench) readEnd(d *replication.Volume, mib int64) {
	b.t.Helper()
	want, off := endOf(mib)
	got := make([]byte, trivet.BlockSize)
	require.NoError(b.t, d.ReadAt(b.t.Context(), got, off))
	require.Equal(b.t, want, got)
}

// requireSize demands that every replica that runs has, in the end, the size (I13).
func (b *groupBench) requireSize(mib int64) {
	b.t.Helper()
	b.until(fmt.Sprintf("every replica has %d MiB", mib), func() bool {
		for _, g := range b.nodes {
			if r, ok := g.host.Replica(vol); ok && r.Status().SizeBytes != mib<<20 {
				return false
			}
		}
		return true
	})
}
