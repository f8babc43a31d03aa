package engine

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// crashLog commits entries from one index up to another: each gives an eighth of the blocks a stamp, or, every
// fifth, takes them away.
func crashLog(v *Volume, blockN trivet.LBA, from, to uint64) error {
	part := blockN / 8
	for i := from; i < to; i++ {
		b := v.NewBatch()
		lba := trivet.LBA(i*3%8) * part
		var err error
		if i%5 == 4 {
			err = b.Zero(lba, int64(part))
		} else {
			for k := range part {
				err = errors.Join(err, b.Write(lba+k, numbered(uint32(i+1), lba+k)))
			}
		}
		st := v.State()
		st.AppliedIndex = i + 1
		if err := errors.Join(err, b.Commit(st)); err != nil {
			return err
		}
	}
	return nil
}

// resumed opens what a crash leaves, finishes the job from a source that is further on, and compares. It returns what
// the crash left.
func resumed(cfg Config, other *Volume, want [32]byte) (found coverage, restoring bool, err error) {
	e, err := Open(cfg)
	if err != nil {
		return nil, false, err
	}
	defer func() { err = errors.Join(err, e.Close()) }()
	v, err := e.OpenVolume(damagedID)
	if err != nil {
		return nil, false, err
	}
	r := v.recordNow()
	found, restoring = r.covers(), v.Restoring()
	img, err := other.Image(v.Want())
	if err != nil {
		return nil, false, err
	}
	b, err := readUntil(img, 1<<30)
	if err := errors.Join(err, img.Close(), v.Restore(bytes.NewReader(b))); err != nil {
		return nil, false, err
	}
	d, err := v.Digest()
	if err == nil && d != want {
		err = errors.New("the digest differs")
	}
	return found, restoring, err
}

// TestCrashAtEveryFileOperationOfCatchUp: whatever a crash leaves of a Restore, an image of another source that is
// further on makes it whole, and the part that was verified before the crash is still claimed.
func TestCrashAtEveryFileOperationOfCatchUp(t *testing.T) {
	sizes := []struct {
		blockN trivet.LBA
		every  int // crashes are taken at each so many operations
	}{{64, 2}, {1024, 48}}
	if testing.Short() {
		sizes = sizes[:1]
	}
	for _, c := range sizes {
		t.Run(fmt.Sprint(c.blockN), func(t *testing.T) { crashCatchUp(t, c.blockN, c.every) })
	}
}

func crashCatchUp(t *testing.T, blockN trivet.LBA, every int) {
	srcCfg := damageConfig(vfs.NewMem())
	srcCfg.imageRangeBytes = int(blockN) * trivet.BlockSize / 16
	e1, first := mustStore(t, srcCfg, int64(blockN))
	e2, other := mustStore(t, damageConfig(vfs.NewMem()), int64(blockN))
	require.NoError(t, errors.Join(crashLog(first, blockN, 0, 14), crashLog(other, blockN, 0, 17)))
	defer func() { require.NoError(t, errors.Join(e1.Close(), e2.Close())) }()
	want, err := other.Digest()
	require.NoError(t, err)

	mem := vfs.NewCrashableMem()
	var mu sync.Mutex
	rng := rand.New(rand.NewPCG(3, uint64(blockN)))
	armed, ops, points := false, 0, 0
	seen := map[uint64]int{}
	fs := errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if op.Kind.ReadOrWrite() != errorfs.OpIsWrite {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		if ops++; !armed || ops%every > 0 {
			return nil
		}
		points++
		percent := []int{0, 25, 50, 75, 100}[points%5]
		cfg := damageConfig(mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: rng}))
		found, restoring, err := resumed(cfg, other, want)
		if err != nil {
			t.Errorf("crash at operation %d of %s, %d %% unsynced kept, with %v, restoring %t: %v", op.Kind, op.Path,
				percent, found, restoring, err)
			return nil
		}
		claimed := found.lowest(0, 1) // of the first range
		if restoring {
			claimed += 100
		}
		seen[claimed]++
		return nil
	}))
	e, v := mustStore(t, damageConfig(fs), int64(blockN))
	require.NoError(t, crashLog(v, blockN, 0, 6))
	require.NoError(t, e.Flush())
	img, err := first.Image(v.Want())
	require.NoError(t, err)
	mu.Lock()
	armed = true
	mu.Unlock()
	require.NoError(t, v.Restore(img))
	mu.Lock()
	armed = false
	mu.Unlock()
	require.NoError(t, img.Close())
	t.Logf("%d crashes; claims of the first block, 100 more while restoring: %v", points, seen)
	require.Positive(t, seen[106], "marked, nothing claimed")
	require.Positive(t, seen[114], "marked, the first range claimed")
	require.Greater(t, points, 15)
	require.NoError(t, e.Close())
}
