package engine

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// What a deleted volume held is never read again (S13): one tenant after the other has a volume on a small disk, whose
// log is used again and again, with cleaning, discards and crashes that lose any part of what was not synced. A block
// reads as what its own tenant wrote there, or as zeroes; one that the tenant never wrote reads as zeroes, though
// every tenant before has written it.
func TestDeletedDataNeverShows(t *testing.T) {
	const tenants, blockN = 40, 96
	rng := rand.New(rand.NewPCG(13, 0))
	lost := rand.New(rand.NewPCG(13, 1)) // how much is drawn from it hangs on what Pebble has written by then
	mem := vfs.NewCrashableMem()
	e, err := Open(logConfig(t, mem, nil))
	require.NoError(t, err)
	crashes, recycled := 0, int64(0)
	for tenant := range uint32(tenants) {
		id := damagedID + trivet.VolumeID(tenant)
		require.NoError(t, e.CreateVolume(id, "r", blockN*trivet.BlockSize))
		v, err := e.OpenVolume(id)
		require.NoError(t, err)
		requireOwn(t, v, tenant, nil)
		written := map[trivet.LBA]bool{}
		for range 12 {
			lba, n := trivet.LBA(rng.IntN(blockN-16)), trivet.LBA(1+rng.IntN(16))
			if tenant%2 == 1 && lba+n > blockN/2 { // what the tenant before has written, this one leaves alone
				continue
			}
			write(t, v, 1+tenant, lba, n)
			for i := range n {
				written[lba+i] = true
			}
			if rng.IntN(3) == 0 {
				b := v.NewBatch()
				require.NoError(t, b.Zero(lba, int64(n)))
				st := v.State()
				st.AppliedIndex++
				require.NoError(t, b.Commit(st))
			}
			if rng.IntN(3) == 0 {
				settle(t, v)
			}
			if rng.IntN(3) == 0 {
				_, err = e.Clean()
				require.NoError(t, err)
			}
			requireOwn(t, v, tenant, written)
		}
		if rng.IntN(2) == 0 { // the power goes
			require.NoError(t, e.Flush())
			before := mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(101), RNG: lost})
			for _, s := range e.log.Stats() {
				recycled += s.Recycled
			}
			require.NoError(t, e.Close())
			mem = before
			e, err = Open(logConfig(t, mem, nil))
			require.NoError(t, err)
			v, err = e.OpenVolume(id)
			require.NoError(t, err)
			requireOwn(t, v, tenant, written)
			crashes++
		}
		settle(t, v)
		require.NoError(t, e.DropVolume(id))
		require.NoError(t, e.log.Group(id).DeleteGroup())
		_, err = e.Clean()
		require.NoError(t, err)
	}
	for _, s := range e.log.Stats() {
		recycled += s.Recycled
	}
	require.NoError(t, e.Close())
	t.Logf("%d crashes, %d segments recycled", crashes, recycled)
	require.Greater(t, crashes, tenants/4, "hardly anything crashed")
	require.Greater(t, recycled, int64(tenants/4), "the log was hardly used again")
}

// requireOwn checks that every block is what the tenant wrote, or zeroes where it may not have written.
func requireOwn(t testing.TB, v *Volume, tenant uint32, written map[trivet.LBA]bool) {
	t.Helper()
	p := make([]byte, v.State().SizeBytes)
	require.NoError(t, v.ReadAt(p, 0))
	zero := make([]byte, trivet.BlockSize)
	for lba := range trivet.LBA(len(p) / trivet.BlockSize) {
		got := p[lba*trivet.BlockSize : (lba+1)*trivet.BlockSize]
		switch own := numbered(1+tenant, lba); {
		case bytes.Equal(got, zero):
		case written[lba] && bytes.Equal(got, own):
		default:
			require.Fail(t, "somebody else's data", "block %d of tenant %d, written %t: % x",
				lba, tenant, written[lba], got[:16])
		}
	}
}

// A reference of a new volume to what is still there of a deleted one, as damage or a mistake of ours might make it, is
// damage and never data: the checksum covers volume and block number (H24, S13).
func TestReferenceToAnothersBlock(t *testing.T) {
	mem := vfs.NewMem()
	e, old := mustStore(t, logConfig(t, mem, nil), 64)
	write(t, old, 7, 0, 8)
	at, sum, err := lookRef(e, old.id, 3)
	require.NoError(t, err)
	require.NoError(t, e.log.Pin(at.seg)) // it is not used again meanwhile
	require.NoError(t, e.DropVolume(old.id))
	for name, lba := range map[string]trivet.LBA{"same block": 3, "another": 4} {
		id := damagedID + 100 + trivet.VolumeID(lba)
		require.NoError(t, e.CreateVolume(id, "r", 64*trivet.BlockSize))
		v, err := e.OpenVolume(id)
		require.NoError(t, err)
		var value [refValueBytes]byte
		putRef(value[:], sum, at)
		require.NoError(t, e.db.Set(appendBlockKey(nil, id, lba, 0), value[:], pebble.NoSync))
		p := make([]byte, trivet.BlockSize)
		err = v.ReadAt(p, lba)
		require.ErrorIs(t, err, trivet.ErrCorrupt, name)
		require.NotContains(t, string(p), string(numbered(7, 3)[:16]), name)
	}
	e.log.Unpin(at.seg)
	require.NoError(t, e.Close())
}

// lookRef returns where a block of a volume's first generation stands, and its checksum.
func lookRef(e *Engine, id trivet.VolumeID, lba trivet.LBA) (ref, uint32, error) {
	val, closer, err := e.db.Get(appendBlockKey(nil, id, lba, 0))
	if err != nil {
		return ref{}, 0, err
	}
	defer closer.Close()
	return decodeRef(val, blockKey{volume: id, lba: lba})
}
