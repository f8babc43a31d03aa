package node

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication"
)

func recoverFrom(b *groupBench, i int) {
	v := b.cat.volume(vol)
	b.cat.must(meta.Command{RecoverVolume: &meta.RecoverVolume{Volume: vol, Replica: ours(i), IfRevision: v.Revision}})
}

// Two of three machines are gone for good. The operator gives them up: the third goes on alone with all that it had,
// the holder is fenced, replicas are added again, and what the lost machines have never comes back, though they do
// (H34, H10).
func TestGroupRecovers(t *testing.T) {
	for _, parkAfter := range []time.Duration{-1, 5 * time.Second} {
		t.Run(fmt.Sprint(parkAfter), func(t *testing.T) {
			inGroups(t, 5, parkAfter, func(t *testing.T, b *groupBench) {
				d := b.attach()
				p := bytes.Repeat([]byte{7}, trivet.BlockSize)
				require.NoError(t, d.WriteAt(t.Context(), p, 5*trivet.BlockSize))
				b.until("the third has it", func() bool {
					_, lead := b.leader()
					r, ok := b.nodes[3].host.Replica(vol)
					return lead != nil && ok && r.Status().Applied == lead.Status().LastIndex
				})
				b.nodes[1].kill()
				b.nodes[2].kill()
				v := b.cat.volume(vol)
				short, err := replication.OpenVolume(replication.VolumeConfig{
					ID: vol, SizeBytes: 64 << 20, Epoch: v.Epoch, Members: mayLead(&v),
					Network: b.net.Node("other"), IOTimeout: 5 * time.Second,
				})
				require.NoError(t, err)
				require.ErrorIs(t, short.WriteAt(t.Context(), p, 0), trivet.ErrUnavailable, "no majority")
				require.NoError(t, short.Close())

				recoverFrom(b, 3)
				v = b.cat.volume(vol)
				assert.Equal(t, trivet.NodeID("n1"), v.Detaching)
				assert.Len(t, v.Retired, 2)
				b.until("it is recovered, and fenced", func() bool {
					v := b.cat.volume(vol)
					return v.Recover == "" && v.Holder() == "" && v.FencedEpoch == v.Epoch
				})
				require.ErrorIs(t, d.WriteAt(t.Context(), p, 0), trivet.ErrFenced)
				require.NoError(t, d.Close())

				b.add(4, 4, "")
				b.until("a second one has joined", func() bool {
					v := b.cat.volume(vol)
					r := v.Replica(ours(4))
					return r != nil && r.State == meta.ReplicaReady
				})
				b.nodes[1].boot()
				b.nodes[2].boot()
				b.until("what the lost had is removed", b.has(0, 3, 4))
				assert.Empty(t, b.nodes[1].holds())
				assert.Empty(t, b.nodes[2].holds())

				d = b.attach()
				got := make([]byte, trivet.BlockSize)
				require.NoError(t, d.ReadAt(t.Context(), got, 5*trivet.BlockSize))
				assert.Equal(t, p, got)
				b.write(d)()
				b.requireGroup(3, 4)
				require.NoError(t, d.Close())
			})
		})
	}
}

// The machine crashes before it is the only voter, or after it and before anybody heard.
func TestGroupRecoversAfterCrash(t *testing.T) {
	for _, after := range []bool{false, true} {
		t.Run(fmt.Sprint(after), func(t *testing.T) {
			inGroups(t, 3, -1, func(t *testing.T, b *groupBench) {
				d := b.attach()
				b.write(d)()
				require.NoError(t, d.Close())
				b.nodes[1].kill()
				b.nodes[2].kill()
				b.trip = &trip{at: 1, after: after}
				b.nodes[3].kill()
				b.nodes[3].boot()
				recoverFrom(b, 3)
				b.until("it is recovered", func() bool {
					v := b.cat.volume(vol)
					return v.Recover == "" && v.FencedEpoch == v.Epoch
				})
				require.True(t, b.trip.reached(), "nothing crashed")
				d = b.attachTo("n3")
				b.write(d)()
				require.NoError(t, d.Close())
			})
		})
	}
}

// A copy of the catalogue that lags says that the volume is to be recovered; it was long ago, and has its members
// again.
func TestAgentRecoversByLinearizableRead(t *testing.T) {
	t.Parallel()
	v := meta.Volume{ID: vol, Phase: meta.PhaseBound, Recover: ours(1), Replicas: []meta.Replica{
		{ID: ours(1), Node: "n1", Disk: testDisk(1), State: meta.ReplicaReady},
	}}
	acts := plan("n1", &v, local{disks: map[trivet.DiskID]bool{testDisk(1): true}})
	require.Len(t, acts, 1)
	assert.Equal(t, doRecover, acts[0].verb)
	cat := newFakeCatalogue() // in which the volume is not, nor is it recovered
	host := newFakeHost()
	w := &worker{agent: &Agent{cfg: agentConfig{ID: "n1"}, cat: cat, host: host}, volume: vol, log: loggerOr(nil)}
	require.NoError(t, w.recover(t.Context(), acts[0]))
	assert.Nil(t, host.replica(vol))
	assert.False(t, restful(&v), "it is awake until it is recovered")
}
