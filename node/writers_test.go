package node

import (
	"context"
	"os"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/cache"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication"
)

// TestWriterBesideAnotherCachesNothing: whatever the volume's cacheMode, a write is below before it is acknowledged,
// and a read finds what the other node has written meanwhile.
func TestWriterBesideAnotherCachesNothing(t *testing.T) {
	t.Parallel()
	b := newCacheBench(t, writeBackParams())
	b.grant("n1", meta.MultiNodeMultiWriter, false)
	_, err := b.mounts.attach(t.Context(), vol)
	require.NoError(t, err)
	b.write(3, 7)
	require.EqualValues(t, 7, b.below(3))
	p := b.mounts.attacher.get(vol).path
	require.Equal(t, cache.WriteThrough, p.cache.Settings().Mode)
	_, err = os.Lstat(b.mapping())
	require.ErrorIs(t, err, os.ErrNotExist)

	got := make([]byte, trivet.BlockSize)
	require.NoError(t, p.ReadAt(t.Context(), got, 3*trivet.BlockSize))
	other := make([]byte, trivet.BlockSize)
	other[0] = 8
	require.NoError(t, b.disk.WriteAt(t.Context(), other, 3*trivet.BlockSize)) // by the other node
	require.NoError(t, p.ReadAt(t.Context(), got, 3*trivet.BlockSize))
	require.EqualValues(t, 8, got[0])
	b.mounts.follow() // nor once the settings are looked at again
	require.Equal(t, cache.WriteThrough, p.cache.Settings().Mode)
	require.Equal(t, trivet.ReadStrong, readsOf(ptr(b.cat.volume(vol))))
}

// TestWriterDropsWhatAnEarlierAttachmentLeft: what a process of a writeBack attachment has left is not written over
// what two writers have written since (H13).
func TestWriterDropsWhatAnEarlierAttachmentLeft(t *testing.T) {
	t.Parallel()
	b := newCacheBench(t, writeBackParams())
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	_, err := b.mounts.attach(t.Context(), vol)
	require.NoError(t, err)
	b.write(3, 7)
	b.die()
	b.revoke()
	b.grant("n1", meta.MultiNodeMultiWriter, false)
	b.start(0x302)
	b.recovering()
	require.Zero(t, b.below(3))
	_, err = os.Lstat(b.mapping())
	require.ErrorIs(t, err, os.ErrNotExist)
}

// TestWriterFollowsItsSession: an open volume goes on at the epochs at which another writer comes and goes, once they
// are fenced, and is over with its session.
func TestWriterFollowsItsSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newMountBench(t)
		b.grant("n3", meta.MultiNodeMultiWriter, false)
		b.grant("n1", meta.MultiNodeMultiWriter, false)
		_, err := b.mounts.attach(t.Context(), vol)
		require.NoError(t, err)
		cfg := b.group().cfg
		assert.Equal(t, trivet.Epoch(2), cfg.Epoch)
		assert.Equal(t, 1, cfg.Writer)
		assert.Empty(t, b.cat.volume(vol).WantLeader, "neither draws the leadership to itself")

		type renewed struct {
			epoch trivet.Epoch
			err   error
		}
		renew := func(fenced trivet.Epoch) <-chan renewed {
			out := make(chan renewed, 1)
			go func() {
				e, err := cfg.Renew(t.Context(), fenced)
				out <- renewed{e, err}
			}()
			synctest.Wait()
			return out
		}
		next := renew(2)
		assert.Empty(t, next, "the copy of the catalogue has not heard of anything")
		b.cat.must(meta.Command{Detach: &meta.Detach{Volume: vol, Node: "n3"}})
		synctest.Wait()
		assert.Empty(t, next, "the epoch is not fenced in")
		b.mounts.sweep()
		b.fence()
		assert.Equal(t, renewed{epoch: 3}, <-next)
		b.grant("n2", meta.MultiNodeMultiWriter, false)
		assert.Equal(t, renewed{epoch: 4}, <-renew(3))
		b.mounts.sweep()
		_, err = b.mounts.attach(t.Context(), vol)
		require.NoError(t, err)
		assert.Equal(t, 1, b.groupN(), "it is the same session: its writes are counted by one group (H39)")
		assert.False(t, b.group().isClosed())

		n, _ := b.cat.Local().Node("n1")
		n.Incarnation = testUUID(0x302)
		b.cat.must(meta.Command{RegisterNode: &meta.RegisterNode{Node: n}})
		b.cat.must(meta.Command{TakeOver: &meta.TakeOver{Volume: vol, Node: "n1"}}) // by a new process
		over := <-renew(4)
		require.ErrorIs(t, over.err, trivet.ErrFenced)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err = cfg.Renew(ctx, 4)
		require.ErrorIs(t, err, trivet.ErrFenced)
		for _, p := range b.mounts.attacher.paths() {
			p.cache.stop()
			<-p.cache.done
		}
	})
}

// TestResumeOfTwoWriters: it goes on after the fence, whoever came or went beside it, and the device knows that what
// was under way must not be written again (H39). One that was detached meanwhile does not.
func TestResumeOfTwoWriters(t *testing.T) {
	const two = meta.MultiNodeMultiWriter
	leave := func(b *resumeBench, node trivet.NodeID) {
		b.cat.must(meta.Command{Detach: &meta.Detach{Volume: vol, Node: node}})
		b.mounts.sweep()
		b.fence()
	}
	for name, tt := range map[string]struct {
		change func(b *resumeBench)
		lost   bool
	}{
		"alone":          {func(*resumeBench) {}, false},
		"another comes":  {func(b *resumeBench) { b.grant("n3", two, false) }, false},
		"comes and goes": {func(b *resumeBench) { b.grant("n3", two, false); leave(b, "n3") }, false},
		"detached":       {func(b *resumeBench) { b.revoke() }, true},
		"detached, back": {func(b *resumeBench) { b.revoke(); b.grant("n1", two, false) }, true},
		"beside, and back": {func(b *resumeBench) {
			b.grant("n3", two, false)
			leave(b, "n1")
			b.grant("n1", two, false)
		}, true},
		"left to another": {func(b *resumeBench) { b.grant("n3", two, false); leave(b, "n1") }, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newResumeBenchOf(t, two)
				tt.change(b)
				l := b.leftover(t)
				done := make(chan struct{})
				go func() { b.mounts.resume(t.Context(), l); close(done) }()
				synctest.Wait()
				require.Zero(t, b.resumedN, "before the fence")
				if tt.lost {
					<-done
					b.requireGivenUp(t)
					return
				}
				b.fence()
				<-done
				require.True(t, b.resumedShared)
				b.requireResumed(t)
			})
		})
	}
}

// TestPlanFencesWriters: the fence of an epoch names the sessions that write at it, if they are others than one of its
// own.
func TestPlanFencesWriters(t *testing.T) {
	t.Parallel()
	const two = meta.MultiNodeMultiWriter
	second := []meta.Attachment{{Mode: two, Epoch: 5, Writer: 1}}
	for _, tt := range []struct {
		name     string
		attached *meta.Attachment
		also     []meta.Attachment
		want     replication.Writers
	}{
		{"nobody", nil, nil, replication.Writers{}},
		{"one writer", &meta.Attachment{Mode: meta.SingleNodeMultiWriter, Epoch: 5}, nil, replication.Writers{}},
		{"the first of two", &meta.Attachment{Mode: two, Epoch: 5}, nil, replication.Writers{}},
		{"the second joins", &meta.Attachment{Mode: two, Epoch: 5, Since: 3}, second, replication.Writers{3, 5}},
		{"the first has left", &meta.Attachment{Mode: two, Epoch: 5, Since: 4, Writer: 1}, nil, replication.Writers{0, 4}},
	} {
		v := &meta.Volume{
			ID: vol, Phase: meta.PhaseBound, Epoch: 5, FencedEpoch: 4, Attached: tt.attached, Also: tt.also,
			Leader: "r1", Replicas: []meta.Replica{{ID: "r1", Node: "n1", Disk: "d1", State: meta.ReplicaReady}},
		}
		l := local{status: replication.ReplicaStatus{}}
		l.status.IsLeader = true
		acts := planLeader(v, &v.Replicas[0], l)
		require.NotEmpty(t, acts, tt.name)
		assert.Equal(t, action{verb: doFence, disk: "d1", id: "r1", epoch: 5, writers: tt.want}, acts[0], tt.name)
	}
}
