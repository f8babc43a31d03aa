package engine

import (
	"encoding/binary"
	"errors"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/trivet-csi/trivet"
)

// TestReadsNeverGoBack: what was committed is what is read, and after a flush what the disk has, though other volumes
// are being committed to and memtables change all the time.
func TestReadsNeverGoBack(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(32)) // the kernel stops threads anywhere
	flushes := 300
	if testing.Short() {
		flushes /= 5
	}
	e, err := Open(damageConfig(vfs.NewMem()))
	require.NoError(t, err)
	const n = 16
	var vols [n]*Volume
	var applied [n]atomic.Uint64
	for i := range vols {
		require.NoError(t, e.CreateVolume(trivet.VolumeID(i+1), "r", trivet.BlockSize))
		vols[i], err = e.OpenVolume(trivet.VolumeID(i + 1))
		require.NoError(t, err)
	}
	var done atomic.Bool
	var g errgroup.Group
	defer func() {
		done.Store(true)
		require.NoError(t, errors.Join(g.Wait(), e.Close()))
	}()
	for i, v := range vols {
		g.Go(func() error {
			for st := v.State(); !done.Load(); {
				st.AppliedIndex++
				st.AppliedTerm = 1
				b := v.NewBatch()
				if err := errors.Join(b.Write(0, numbered(uint32(st.AppliedIndex), 0)), b.Commit(st)); err != nil {
					return err
				}
				applied[i].Store(st.AppliedIndex)
			}
			return nil
		})
	}
	var before [n]uint64
	p := make([]byte, trivet.BlockSize)
	for range flushes {
		for i := range vols {
			before[i] = applied[i].Load()
		}
		require.NoError(t, e.Flush())
		for i, v := range vols {
			st, err := v.DurableState()
			require.NoError(t, err)
			require.GreaterOrEqual(t, st.AppliedIndex, before[i], "on the disk, of volume %d", i)
			require.NoError(t, v.ReadAt(p, 0))
			if before[i] > 0 {
				require.GreaterOrEqual(t, binary.BigEndian.Uint32(p), uint32(before[i]), "read, of volume %d", i)
			}
		}
	}
}

// TestDiscardsReachTheDisk: a range deletion is on the disk after rangeDelFlush, without anybody's flush.
func TestDiscardsReachTheDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, v := mustStore(t, damageConfig(vfs.NewMem()), deleteRangeFromN)
		b := v.NewBatch()
		require.NoError(t, b.Zero(0, deleteRangeFromN))
		require.NoError(t, b.Commit(State{AppliedIndex: 1, AppliedTerm: 1, SizeBytes: v.State().SizeBytes}))
		require.Less(t, e.flushed.Load(), e.committed.Load())
		time.Sleep(rangeDelFlush) // of the bubble
		synctest.Wait()
		require.Equal(t, e.committed.Load(), e.flushed.Load())
		require.NoError(t, e.Close())
	})
}
