package node

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/node/blockdev"
)

// resumeBench is a mountBench whose kernel devices survive. What package blockdev says of the device that
// the last process left is faked; everything else is as in mountBench.
type resumeBench struct {
	*mountBench

	checkErr  error // of the device
	resumeErr error
	resumedN  int

	resumedShared bool         // the device was told that another node may write
	fencedAt      trivet.Epoch // the group's fence when the device was resumed
	aborted       bool
	busyN         int // more tries to clean up find the device in use
}

// newResumeBench has vol staged and published by a first process, which has been killed.
func newResumeBench(t *testing.T) *resumeBench {
	t.Helper()
	return newResumeBenchOf(t, meta.SingleNodeMultiWriter)
}

// newResumeBenchOf is newResumeBench with another access mode.
func newResumeBenchOf(t *testing.T, mode meta.AccessMode) *resumeBench {
	t.Helper()
	b := &resumeBench{mountBench: newMountBench(t)}
	b.survive = true
	b.grant("n1", mode, false)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	require.NoError(t, b.mounts.publish(t.Context(), publishReq(targetA)))
	if over := b.mounts.attacher.get(vol).overlay; over != nil { // a journal
		require.NoError(t, over.WriteAt(t.Context(), journal, trivet.BlockSize))
	}
	b.next(t, 0x302)
	return b
}

// endPaths ends, with the test, what a process has running for its open data paths: a bubble ends with all in it.
func (b *resumeBench) endPaths(t *testing.T, m *mounts) {
	t.Helper()
	t.Cleanup(func() {
		for _, p := range m.attacher.paths() {
			p.cache.stop()
			<-p.cache.done
		}
	})
}

// next starts another process, without a word to the last one.
func (b *resumeBench) next(t *testing.T, incarnation int) {
	t.Helper()
	n, _ := b.cat.Local().Node("n1")
	n.Incarnation = testUUID(incarnation)
	b.cat.must(meta.Command{RegisterNode: &meta.RegisterNode{Node: n}})
	b.endPaths(t, b.mounts)
	b.process(t, n.Incarnation)
	b.endPaths(t, b.mounts)
	b.mounts.attacher.resume = func(_ context.Context, c blockdev.Config) (kernelDevice, error) {
		b.mu.Lock()
		err := b.resumeErr
		b.mu.Unlock()
		if err != nil {
			return nil, err
		}
		if c.Name != vol.String() || c.Device == nil {
			return nil, fmt.Errorf("resume of %q: %w", c.Name, trivet.ErrInvalid)
		}
		b.resumedN++
		b.resumedShared = c.Shared
		b.fencedAt = b.cat.volume(vol).FencedEpoch
		return &fakeKernel{bench: b.mountBench, path: b.kernel().path, device: c.Device}, nil
	}
}

// leftover is what takeStock finds of the last process.
func (b *resumeBench) leftover(t *testing.T) leftover {
	t.Helper()
	unlock, err := b.mounts.ops.try(vol)
	require.NoError(t, err)
	return leftover{id: vol, all: fakeLeft{b}, unlock: unlock}
}

// fakeLeft plays blockdev.Leftovers.
type fakeLeft struct{ b *resumeBench }

func (f fakeLeft) Check(context.Context, string) error { return f.b.checkErr }

func (f fakeLeft) Abort(context.Context, string) error {
	f.b.aborted = true
	return nil
}

func (f fakeLeft) CleanOne(context.Context, string) error {
	if !f.b.aborted {
		return fmt.Errorf("clean before abort: %w", trivet.ErrInvalid)
	}
	if f.b.busyN > 0 {
		f.b.busyN--
		return fmt.Errorf("a pod has it: %w", trivet.ErrInUse)
	}
	delete(f.b.mounter.devices, f.b.kernel().path)
	return nil
}

// requireResumed checks that all is as it was, at a fenced epoch of the new process.
func (b *resumeBench) requireResumed(t *testing.T) {
	t.Helper()
	v := b.cat.volume(vol)
	require.Equal(t, 1, b.resumedN)
	require.Equal(t, b.mounts.attacher.process, v.Attached.Incarnation)
	require.Equal(t, v.Epoch, b.fencedAt, "resumed before everything older was fenced (H13, H31)")
	require.Equal(t, v.Epoch, b.group().cfg.Epoch)
	require.Equal(t, v.Epoch, b.mounts.records.get(vol).Epoch)
	require.Equal(t, 2, b.mounter.mountedN(), "the mounts stay")
	require.False(t, b.mounter.shaded[targetA])
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	require.NoError(t, b.mounts.publish(t.Context(), publishReq(targetA)))
	require.NoError(t, b.mounts.unpublish(t.Context(), vol, targetA))
	require.NoError(t, b.mounts.unstage(t.Context(), vol, stagingDir))
	require.Empty(t, b.mounts.records.list())
	require.Empty(t, b.mounter.devices)
	require.Len(t, b.kernels, 1, "no second device was made")
}

// requireGivenUp checks that nothing of the old attachment is left.
func (b *resumeBench) requireGivenUp(t *testing.T) {
	t.Helper()
	require.Zero(t, b.resumedN)
	require.True(t, b.aborted)
	require.Zero(t, b.mounter.mountedN())
	require.True(t, b.mounter.shaded[targetA])
	require.Zero(t, b.mounts.records.get(vol).Epoch)
	require.Empty(t, b.mounter.devices)
}

// TestResumeAfterTheFence: the new process serves the device only once the epoch of the old one is
// fenced, and puts everybody off until then.
func TestResumeAfterTheFence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newResumeBench(t)
		l := b.leftover(t)
		done := make(chan struct{})
		go func() { b.mounts.resume(t.Context(), l); close(done) }()
		synctest.Wait()
		v := b.cat.volume(vol)
		require.Less(t, v.FencedEpoch, v.Epoch, "taken over and not fenced yet")
		require.Zero(t, b.resumedN)
		require.ErrorIs(t, b.mounts.stage(t.Context(), stageReq()), trivet.ErrPending)
		require.ErrorIs(t, b.mounts.publish(t.Context(), publishReq(targetB)), trivet.ErrPending)
		require.ErrorIs(t, b.mounts.unpublish(t.Context(), vol, targetA), trivet.ErrPending)
		_, err := b.mounts.attach(t.Context(), vol)
		require.ErrorIs(t, err, trivet.ErrPending)
		_, err = b.mounts.stats(t.Context(), vol, targetA)
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		b.fence()
		<-done
		b.requireResumed(t)
	})
}

// TestResumeReader: a reader's take-over raises no epoch, and is no break.
func TestResumeReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newResumeBenchOf(t, meta.MultiNodeReader)
		epoch := b.cat.volume(vol).Epoch
		b.mounts.resume(t.Context(), b.leftover(t))
		require.Equal(t, epoch, b.cat.volume(vol).Epoch)
		require.Equal(t, 1, b.resumedN)
	})
}

// TestResumeWaitsForTheCatalogue: without a quorum nothing is given up.
func TestResumeWaitsForTheCatalogue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newResumeBench(t)
		b.cat.setDown(true)
		b.resumeErr = fmt.Errorf("the keeper has not heard of the death yet: %w", trivet.ErrInUse)
		l := b.leftover(t)
		done := make(chan struct{})
		go func() { b.mounts.resume(t.Context(), l); close(done) }()
		synctest.Wait()
		b.cat.setDown(false)
		<-b.cat.once(func(st *meta.State) bool {
			v, _ := st.Volume(vol)
			return v.Attached.Incarnation == b.mounts.attacher.process
		})
		synctest.Wait()
		b.fence()
		synctest.Wait()
		require.False(t, b.aborted)
		b.mu.Lock()
		b.resumeErr = nil
		b.mu.Unlock()
		<-done
		b.requireResumed(t)
	})
}

// TestResumeOfACrashedResume: processes that die at any step of the resume do not keep the next one
// from it.
func TestResumeOfACrashedResume(t *testing.T) {
	for _, mode := range []meta.AccessMode{meta.SingleNodeMultiWriter, meta.MultiNodeMultiWriter} {
		t.Run(string(mode), func(t *testing.T) { testResumeOfACrashedResume(t, mode) })
	}
}

func testResumeOfACrashedResume(t *testing.T, mode meta.AccessMode) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := newResumeBenchOf(t, mode)
		if mode == meta.MultiNodeMultiWriter {
			b.grant("n3", mode, false) // which raises the epoch, and is no break either
		}
		for i := range 3 { // each took over; the first two died before they could write it down
			atTakeOver := &watchedCatalogue{fakeCatalogue: b.cat, mounts: b.mounts}
			b.mounts.attacher.cat = atTakeOver
			ctx, cancel := context.WithCancel(t.Context())
			l := b.leftover(t)
			done := make(chan struct{})
			go func() { b.mounts.resume(ctx, l); close(done) }()
			synctest.Wait()
			cancel()
			<-done
			if i < 2 {
				require.NoError(t, b.mounts.records.put(atTakeOver.rec))
			}
			require.Zero(t, b.resumedN)
			require.Equal(t, 2, b.mounter.mountedN(), "a process that ends takes nothing away")
			if i == 1 && mode == meta.MultiNodeMultiWriter {
				b.cat.must(meta.Command{Detach: &meta.Detach{Volume: vol, Node: "n3"}})
			}
			b.next(t, 0x400+i)
		}
		l := b.leftover(t)
		done := make(chan struct{})
		go func() { b.mounts.resume(t.Context(), l); close(done) }()
		synctest.Wait()
		b.fence()
		<-done
		b.requireResumed(t)
	})
}

// watchedCatalogue remembers the record as it stands on disk when the volume is taken over.
type watchedCatalogue struct {
	*fakeCatalogue

	mounts *mounts
	rec    record
}

func (c *watchedCatalogue) Propose(ctx context.Context, cmd meta.Command) (meta.Result, error) {
	if cmd.TakeOver != nil {
		c.rec = c.mounts.records.get(vol)
	}
	return c.fakeCatalogue.Propose(ctx, cmd)
}

// TestResumeIsRefused: whoever may have missed a write of another node must not go on.
func TestResumeIsRefused(t *testing.T) {
	for name, change := range map[string]func(b *resumeBench){
		"detached":          func(b *resumeBench) { b.revoke() },
		"held elsewhere":    func(b *resumeBench) { b.revoke(); b.grant("n2", meta.SingleNodeMultiWriter, false) },
		"detached and back": func(b *resumeBench) { b.revoke(); b.grant("n1", meta.SingleNodeMultiWriter, false) },
		"elsewhere and back": func(b *resumeBench) {
			b.revoke()
			b.grant("n2", meta.SingleNodeMultiWriter, false)
			b.revoke()
			b.grant("n1", meta.SingleNodeMultiWriter, false)
		},
		"the device is dead": func(b *resumeBench) { b.checkErr = trivet.ErrClosed },
		"the keeper is away": func(b *resumeBench) { b.checkErr = trivet.ErrUnavailable },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newResumeBench(t)
				change(b)
				b.mounts.resume(t.Context(), b.leftover(t))
				b.requireGivenUp(t)
			})
		})
	}
}

// TestResumeGivesUpUntilItIsDone: a device that is in use when it is given up goes as soon as it can, and nobody
// waits for that meanwhile; once the volume is attached anew, it is the new attachment's.
func TestResumeGivesUpUntilItIsDone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newResumeBench(t)
		b.revoke()
		b.busyN = 3
		l := b.leftover(t)
		done := make(chan struct{})
		go func() { b.mounts.resume(t.Context(), l); close(done) }()
		synctest.Wait()
		require.Equal(t, 2, b.busyN)
		require.NoError(t, b.mounts.unpublish(t.Context(), vol, targetA))
		<-done
		require.Zero(t, b.busyN)
		require.Empty(t, b.mounter.devices)
		unlock, err := b.mounts.ops.try(vol)
		require.NoError(t, err)
		unlock()
	})
	synctest.Test(t, func(t *testing.T) {
		b := newResumeBench(t)
		b.revoke()
		b.busyN = 3
		l := b.leftover(t)
		done := make(chan struct{})
		go func() { b.mounts.resume(t.Context(), l); close(done) }()
		synctest.Wait()
		rec := b.mounts.records.get(vol)
		rec.Epoch = 77
		require.NoError(t, b.mounts.records.put(rec))
		<-done
		require.Equal(t, 2, b.busyN, "it is not touched any more")
		require.EqualValues(t, 77, b.mounts.records.get(vol).Epoch)
	})
}

// TestResumeIsRefusedAtTheLastMoment: the volume goes to another node while the fence is awaited.
func TestResumeIsRefusedAtTheLastMoment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newResumeBench(t)
		l := b.leftover(t)
		done := make(chan struct{})
		go func() { b.mounts.resume(t.Context(), l); close(done) }()
		synctest.Wait()
		b.revoke()
		b.grant("n2", meta.SingleNodeMultiWriter, false)
		<-done
		b.requireGivenUp(t)
	})
}

// TestCloseHandsOver: a process that stops leaves what survives it, mounts and all, unless told not to.
func TestCloseHandsOver(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.survive = true
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	require.NoError(t, b.mounts.publish(t.Context(), publishReq(targetA)))
	require.NoError(t, b.mounts.close(t.Context()))
	assert.Equal(t, 2, b.mounter.mountedN())
	assert.Len(t, b.mounter.devices, 1)
	assert.ErrorIs(t, b.kernel().Err(), trivet.ErrClosed, "released")
	assert.True(t, b.group().isClosed())
	assert.Equal(t, b.cat.volume(vol).Epoch, b.mounts.records.get(vol).Epoch)
}

// TestResumeEndsWhatCloseBegan: a process that ended while the keeper was away, and a process had the device open, had
// to leave it to nobody; the keeper has it all the same, and the next process removes it, when nobody has it open.
func TestResumeEndsWhatCloseBegan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &resumeBench{mountBench: newMountBench(t)}
		b.survive, b.keeperAway, b.open = true, true, true
		b.grant("n1", meta.SingleNodeMultiWriter, false)
		require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
		require.NoError(t, b.mounts.close(t.Context()))
		require.Zero(t, b.mounter.mountedN())
		require.Len(t, b.mounter.devices, 1)
		require.NotZero(t, b.mounts.records.get(vol).Epoch)

		b.keeperAway = false
		b.next(t, 0x302)
		l := b.leftover(t)
		done := make(chan struct{})
		go func() { b.mounts.resume(t.Context(), l); close(done) }()
		synctest.Wait()
		b.fence()
		synctest.Wait()
		require.Equal(t, 1, b.resumedN)
		require.ErrorIs(t, b.mounts.unstage(t.Context(), vol, stageReq().StagingPath), trivet.ErrPending,
			"Kubernetes does not think that it is gone")
		b.mounter.mu.Lock()
		b.open = false
		b.mounter.mu.Unlock()
		<-done
		require.Empty(t, b.mounter.devices)
		require.NoError(t, b.mounts.unstage(t.Context(), vol, stageReq().StagingPath))
		require.Empty(t, b.mounts.records.list())
	})
}

func TestCloseDetachesWhenTold(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.survive, b.mounts.detachOnStop = true, true
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	require.NoError(t, b.mounts.close(t.Context()))
	assert.Zero(t, b.mounter.mountedN())
	assert.Empty(t, b.mounter.devices)
	assert.Empty(t, b.mounts.records.list())
}

// TestCloseLeavesWhatWasNotResumed: stopping in the middle of the resume takes nothing away.
func TestCloseLeavesWhatWasNotResumed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newResumeBench(t)
		b.resumeErr = trivet.ErrUnavailable
		l := b.leftover(t)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { b.mounts.resume(ctx, l); close(done) }()
		synctest.Wait()
		b.fence()
		synctest.Wait()
		cancel()
		<-done
		require.NoError(t, b.mounts.close(t.Context()))
		require.True(t, b.group().isClosed())
		require.Equal(t, 2, b.mounter.mountedN())
		require.False(t, b.aborted)
		require.NotZero(t, b.mounts.records.get(vol).Epoch)
	})
}

// TestTakeStockWithoutDevices: a record whose device is gone is cleaned up after, whatever its epoch.
func TestTakeStockWithoutDevices(t *testing.T) {
	t.Parallel()
	b := newResumeBench(t)
	left, err := b.mounts.takeStock(t.Context(), blockdev.Leftovers{RunDir: b.runDir + "/blockdev"})
	require.NoError(t, err)
	require.Empty(t, left)
	require.Zero(t, b.mounter.mountedN())
	require.True(t, b.mounter.shaded[targetA])
	require.NoError(t, b.mounts.unpublish(t.Context(), vol, targetA))
	require.Empty(t, b.mounts.records.list())
}
