package engine_test

import (
	"bytes"
	"errors"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
)

// Readers see whole commits, of the live state and of snapshots, while the volume is frozen, rolled back, cloned, swept
// and flattened beside them.
func TestReadersBesideGenerations(t *testing.T) {
	const blockN, rounds = 24, 60
	cfg := config(vfs.NewMem())
	cfg.SweepRate = 1 << 20
	e, err := engine.Open(cfg)
	require.NoError(t, err)
	defer func() { require.NoError(t, e.Close()) }()
	v := mustVolume(t, e, vol1, blockN)
	done := make(chan struct{})
	var wg sync.WaitGroup
	alike := func(v *engine.Volume, gen trivet.Generation) bool {
		p := make([]byte, blockN*bs)
		err := v.ReadAtGeneration(p, 0, gen)
		if errors.Is(err, trivet.ErrNotFound) && (gen != engine.Live || v.ID() != vol1) {
			return true // deleted meanwhile
		}
		for i := 1; err == nil && i < blockN; i++ {
			if !bytes.Equal(p[:4], p[i*bs:i*bs+4]) {
				t.Errorf("%s, generation %d: block 0 has %x, block %d has %x", v.ID(), gen, p[:4], i, p[i*bs:i*bs+4])
				return false
			}
		}
		return noError(t, err)
	}
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if !alike(v, engine.Live) {
					return
				}
				for _, s := range v.State().Snapshots {
					if !alike(v, s.Generation) {
						return
					}
				}
				if c, err := e.OpenVolume(vol2); err == nil && !alike(c, engine.Live) {
					return
				}
			}
		})
	}
	wg.Go(func() {
		defer close(done)
		for i := range uint32(rounds) {
			if !generationRound(t, e, v, i+1, blockN) {
				return
			}
		}
	})
	wg.Wait()
	engine.StopSweeper(e)
	require.NoError(t, engine.SweepNow(e))
	require.NoError(t, engine.CheckLive(e))
}

// generationRound writes a stamp everywhere, takes a snapshot, and now and then deletes, rolls back and clones.
func generationRound(t *testing.T, e *engine.Engine, v *engine.Volume, i uint32, blockN int64) bool {
	if !noError(t, freeze(v, uint64(i), op{12, blockN - 12, i}, op{0, 12, i})) {
		return false
	}
	st := v.State()
	if len(st.Snapshots) > 4 && !noError(t, thaw(v, int(i)%len(st.Snapshots))) {
		return false
	}
	if i%3 == 0 {
		st = v.State()
		gen := st.Snapshots[0].Generation
		st.AppliedIndex++
		st.Generation++
		b := v.NewBatch()
		if !noError(t, errors.Join(b.Rollback(gen), b.Commit(st))) {
			return false
		}
	}
	if i%5 == 0 {
		base := engine.Base{Volume: vol1, Generation: v.State().Snapshots[0].Generation}
		return noError(t, errors.Join(e.DropVolume(vol2), e.CreateClone(vol2, "r", blockN*bs, base)))
	}
	return true
}
