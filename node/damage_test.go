package node

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/engine"
)

// Damage on a disk takes the replicas out of service that it may have touched, once, and no others; nor one that is
// made there afterwards.
func TestAgentReportsDamage(t *testing.T) {
	t.Parallel()
	bench(t, 3, func(t *testing.T, b *agentBench) {
		b.ready(t, 3)
		own := b.cat.volume(vol).Replicas[0].ID
		rot := func(first, last trivet.VolumeID) error {
			return &engine.DamageError{Table: "7.sst", First: first, Last: last, Cause: "checksum"}
		}
		b.damage.add(rot(vol+1, vol+9))
		b.damage.add(errors.New("not a DamageError"))
		settle()
		require.Equal(t, meta.ReplicaReady, b.cat.volume(vol).Replicas[0].State)

		b.damage.add(rot(vol-1, vol))
		b.damage.add(rot(0, vol+1))
		settle()
		v := b.cat.volume(vol)
		require.Equal(t, meta.ReplicaFaulted, v.Replicas[0].State)
		require.Equal(t, damageReason+"engine table 7.sst: checksum: "+trivet.ErrCorrupt.Error(), v.Replicas[0].Reason)
		require.Equal(t, meta.ReplicaReady, v.Replicas[1].State)
		reports := b.cat.count(func(c meta.Command) bool {
			return c.ReportReplica != nil && c.ReportReplica.State == meta.ReplicaFaulted
		})
		require.Equal(t, 1, reports)
		require.NotNil(t, b.host.replica(vol), "it runs on")

		later := meta.Volume{ID: vol, Replicas: []meta.Replica{{ID: "later"}, {ID: own}}}
		require.Len(t, b.agent.damageOf(&later), 1)
		require.Empty(t, b.fatals())
	})
}

// Damage that is met while the process starts waits for the catalogue, which may still be behind.
func TestDamageWaitsForTheCatalogue(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newAgentBench(3)
		b.start()
		settle()
		b.agent.close()
		b.cat.freeze(true)
		b.cat.addVolume(vol, 3, nil)
		for i := 1; i <= 3; i++ {
			b.cat.report(vol, i, meta.ReplicaReady)
		}
		time.Sleep(2 * leaseLen)
		b.damage.add(&engine.DamageError{First: vol, Last: vol})
		b.cfg.Self.Incarnation = testUUID(0x3fe)
		b.start()
		defer func() { b.agent.close() }()
		settle()
		b.cat.freeze(false)
		settle()
		require.Equal(t, meta.ReplicaFaulted, b.cat.volume(vol).Replicas[0].State)
		require.Empty(t, b.fatals())
	})
}

// The damage that an engine meets reaches its disk: it has no room for new replicas any more.
func TestDamagedDiskHasNoRoom(t *testing.T) {
	t.Parallel()
	dir, _ := mustFormat(t)
	d := mustOpenDisk(t, dir)
	require.NoError(t, d.engine.CreateVolume(vol, testReplica(1), 64*trivet.BlockSize))
	v, err := d.engine.OpenVolume(vol)
	require.NoError(t, err)
	b := v.NewBatch()
	p := make([]byte, 32*trivet.BlockSize)
	for i := range p {
		p[i] = byte(i >> 8)
	}
	require.NoError(t, b.Write(0, p))
	require.NoError(t, b.Commit(engine.State{SizeBytes: 64 * trivet.BlockSize, AppliedIndex: 1}))
	u, err := d.Usage()
	require.NoError(t, err)
	require.Positive(t, u.FreeBytes)
	require.NoError(t, d.Close())
	rotLargestTable(t, filepath.Join(dir, engineDir))

	d = mustOpenDisk(t, dir)
	defer func() { require.NoError(t, d.Close()) }()
	v, err = d.engine.OpenVolume(vol)
	require.NoError(t, err)
	for range 3 {
		require.ErrorIs(t, v.ReadAt(p, 0), trivet.ErrCorrupt)
	}
	news := d.damage.since(0) // the map is read when the disk is opened
	require.Len(t, news, 1)
	assert.True(t, news[0].Touches(vol))
	assert.Empty(t, d.damage.since(1))
	u, err = d.Usage()
	require.NoError(t, err)
	require.Zero(t, u.FreeBytes)
}

// rotLargestTable flips a bit in the middle of the largest table of a store.
func rotLargestTable(t *testing.T, dir string) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.sst"))
	require.NoError(t, err)
	var largest string
	var size int64
	for _, name := range names {
		st, err := os.Stat(name)
		require.NoError(t, err)
		if st.Size() > size {
			largest, size = name, st.Size()
		}
	}
	f, err := os.OpenFile(largest, os.O_RDWR, 0)
	require.NoError(t, err)
	one := make([]byte, 1)
	_, err = f.ReadAt(one, size/2)
	require.NoError(t, err)
	one[0] ^= 8
	_, err = f.WriteAt(one, size/2)
	require.NoError(t, err)
	require.NoError(t, f.Close())
}
