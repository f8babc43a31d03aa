package engine_test

import (
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
)

// checkCrashed compares what a crash left of all volumes with the model at their own indexes, finishes the work that is
// owed, and compares again.
func (m *genModel) checkCrashed(e *engine.Engine) error {
	ids, err := e.Volumes()
	if err != nil {
		return err
	}
	for _, sweep := range []bool{false, true} {
		if sweep {
			if err := errors.Join(engine.SweepNow(e), engine.CheckLive(e)); err != nil {
				return err
			}
		}
		for _, id := range ids {
			v, err := e.OpenVolume(id)
			if err != nil {
				return err
			}
			if v.Restoring() {
				continue
			}
			at := v.State().AppliedIndex
			for gen, want := range m.vols[id].shows[at] {
				p := make([]byte, genBlocks*bs)
				if err := v.ReadAtGeneration(p, 0, gen); err != nil {
					return err
				}
				for k, stamp := range want {
					if string(p[k*bs:(k+1)*bs]) != string(block(stamp, trivet.LBA(k))) {
						return fmt.Errorf("block %d of %s at index %d, generation %d, swept %t: %x, want stamp %d",
							k, id, at, gen, sweep, p[k*bs:k*bs+8], stamp)
					}
				}
			}
		}
	}
	return nil
}

// TestCrashWithGenerations crashes at every file operation while snapshots come and go, volumes are cloned, rolled
// back, swept and flattened: every volume that is there shows what it and its snapshots did at its applied index.
func TestCrashWithGenerations(t *testing.T) {
	steps := 150
	if testing.Short() {
		steps = 50
	}
	m := &genModel{t: t, rng: seeds(t, 5), vols: map[trivet.VolumeID]*genVolume{}, next: 1, did: map[string]int{}}
	hookRNG := seeds(t, 6)
	mem := vfs.NewCrashableMem()
	var mu sync.Mutex // guards armed and points, and keeps the crashes in order
	armed, points := false, 0
	fs := hook(mem, func(op errorfs.Op) {
		mu.Lock()
		defer mu.Unlock()
		if !armed {
			return
		}
		points++
		e, err := crashed(mem, unsynced[points%len(unsynced)], hookRNG)
		if err == nil {
			err = errors.Join(m.checkCrashed(e), e.Close())
		}
		if err != nil {
			t.Errorf("crash at %s of %s: %v", kindName(op), op.Path, err)
		}
	})
	m.e[0] = mustOpen(t, fs)
	m.e[1] = mustOpen(t, vfs.NewMem())
	m.create()
	arm := func(on bool) {
		mu.Lock()
		defer mu.Unlock()
		armed = on
	}
	for range steps {
		g := m.any()
		switch k := m.rng.IntN(10); {
		case k < 7:
			m.entry(g) // first: the hook may find it on disk before Commit returns
			arm(true)
			m.apply(0, g, m.last(g))
		case k < 8:
			m.apply(0, g, m.last(g))
			m.clone(g)
		default:
			arm(true)
			require.NoError(t, engine.SweepStep(m.volume(0, g.id)))
		}
		if m.rng.IntN(6) == 0 {
			require.NoError(t, m.e[0].Flush())
		}
		arm(false)
	}
	t.Logf("%d crash points, %v", points, m.did)
	require.Greater(t, points, steps/2)
	for _, what := range []string{"freeze", "delete", "rollback", "clone"} {
		require.NotZero(t, m.did[what], "%s never happened: the test is void", what)
	}
}

// A freeze, a clone and a rollback change the same few bytes of the store whatever the volume holds, and under however
// many snapshots; and what 250 snapshots show is what they did.
func TestGenerationsCostTheSame(t *testing.T) {
	type cost struct{ batches, bytes int64 }
	measure := func(blockN, snapshots int) (costs [3]cost) {
		e := mustOpen(t, vfs.NewMem())
		v := mustVolume(t, e, vol1, int64(blockN))
		mustCommit(t, v, op{0, int64(blockN), 1})
		for i := range snapshots {
			require.NoError(t, freeze(v, uint64(i), op{trivet.LBA(i % blockN), 1, uint32(i + 2)}))
		}
		for i, f := range []func(){
			func() { require.NoError(t, freeze(v, 1000)) },
			func() {
				base := engine.Base{Volume: vol1, Generation: trivet.Generation(snapshots)}
				require.NoError(t, e.CreateClone(vol2, "r", int64(blockN)*bs, base))
			},
			func() {
				st := v.State()
				st.AppliedIndex++
				st.Generation++
				b := v.NewBatch()
				require.NoError(t, b.Rollback(0))
				require.NoError(t, b.Commit(st))
			},
		} {
			n, bytes := engine.Written(e)
			f()
			n2, bytes2 := engine.Written(e)
			costs[i] = cost{n2 - n, bytes2 - bytes}
		}
		for i := range snapshots {
			wantStamp(t, v, trivet.Generation(i), trivet.LBA(i%blockN), uint32(i+2))
		}
		return costs
	}
	few, many := measure(16, 1), measure(512, 1)
	require.Equal(t, few, many)
	under := measure(16, 250)
	for i := range few {
		require.Equal(t, few[i].batches, under[i].batches)
		require.LessOrEqual(t, under[i].bytes-few[i].bytes, int64(250*12), "the list of snapshots alone")
	}
}
