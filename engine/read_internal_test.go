package engine

import (
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// lookOne takes the short way to one block.
func lookOne(t *testing.T, v *Volume, lba trivet.LBA) (content []byte, done bool) {
	t.Helper()
	p, sc := make([]byte, trivet.BlockSize), new(readScratch)
	p[0] = 0xff
	done, err := v.lookUpOne(p, lba, v.layout.Load(), sc)
	require.NoError(t, err)
	return p, done
}

// The short way to one block is for a volume whose blocks have one version each.
func TestOneBlockHasOneVersion(t *testing.T) {
	_, v := mustStoreFor(t, 4)
	require.NoError(t, writeNumbered(v, 7, 1, 1))
	p, done := lookOne(t, v, 1)
	require.True(t, done)
	require.Equal(t, numbered(7, 1), p)
	p, done = lookOne(t, v, 2)
	require.True(t, done)
	require.Equal(t, make([]byte, trivet.BlockSize), p, "a block that nobody wrote")

	st := v.State()
	st.AppliedIndex++
	st.Generation, st.Snapshots = 1, []Snapshot{{ID: 1}}
	require.NoError(t, v.NewBatch().Commit(st))
	for lba := range trivet.LBA(3) {
		_, done = lookOne(t, v, lba)
		require.False(t, done)
	}
	require.NoError(t, writeNumbered(v, 8, 1, 1))
	p = make([]byte, trivet.BlockSize)
	require.NoError(t, v.ReadAt(p, 1))
	require.Equal(t, numbered(8, 1), p)
}

// What changes beside the look makes it void: here, while it reads a table.
func TestOneBlockIsLookedUpAgain(t *testing.T) {
	for name, change := range map[string]func(*Volume){
		"nothing":    func(*Volume) {},
		"a snapshot": func(v *Volume) { v.gen.Add(1) },
		"a clone":    func(v *Volume) { v.layout.Add(1) },
		"a restore":  func(v *Volume) { v.usable.Add(2) },
	} {
		for _, lba := range []trivet.LBA{1, 2} { // written, and not
			synctest.Test(t, func(t *testing.T) {
				var beside atomic.Pointer[func()]
				cfg := damageConfig(errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
					if op.Kind == errorfs.OpFileReadAt {
						if f := beside.Swap(nil); f != nil {
							(*f)()
						}
					}
					return nil
				})))
				e, v := mustStore(t, cfg, 4)
				require.NoError(t, writeNumbered(v, 7, 1, 1))
				require.NoError(t, writeNumbered(v, 7, 3, 1))
				require.NoError(t, e.Flush())
				synctest.Wait() // nobody else reads tables any more
				f := func() { change(v) }
				beside.Store(&f)
				_, done := lookOne(t, v, lba)
				require.Nil(t, beside.Load(), "no table was read")
				require.Equal(t, name == "nothing", done, "%s, block %d", name, lba)
				require.NoError(t, e.Close())
			})
		}
	}
}
