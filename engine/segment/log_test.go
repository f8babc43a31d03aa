package segment

import (
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// The log against slices: every operation on six groups in two lanes, with restarts. Lazy groups keep old
// entries, so that segments are carried forward.
func TestModel(t *testing.T) {
	steps := 100_000
	if testing.Short() {
		steps = 5000
	}
	const seed = 4
	rng := rand.New(rand.NewPCG(seed, 0))
	dir := NewMemDir()
	opts := testOptions(dir, seed)
	require.NoError(t, Format(opts))
	l := mustOpen(t, opts)
	models := map[trivet.VolumeID]*model{}
	var moved, recycled int64
	for i := range steps {
		id := trivet.VolumeID(1 + rng.IntN(6))
		m := models[id]
		if m == nil {
			m = newModel()
			models[id] = m
		}
		if id < 3 && rng.IntN(50) > 0 {
			continue
		}
		o := randomOp(rng, m, id < 3)
		ticket, err := o.start(l.Group(id))
		require.NoError(t, err, "step %d: %s", i, o.what)
		o.apply(m)
		if rng.IntN(4) == 0 {
			require.NoError(t, ticket.Err(), "step %d: %s", i, o.what)
			require.NoError(t, m.matches(l.Group(id)), "step %d: %s", i, o.what)
		}
		if rng.IntN(400) == 0 {
			for _, s := range l.Stats() {
				moved += s.MovedBytes
				recycled += s.Recycled
			}
			require.NoError(t, l.Close())
			l = mustOpen(t, opts)
			for id, m := range models {
				require.NoError(t, m.matches(l.Group(id)), "step %d: group %d after a restart", i, id)
			}
		}
	}
	names, err := dir.List()
	require.NoError(t, err)
	t.Logf("%d files, %d bytes moved, %d segments recycled", len(names), moved, recycled)
	require.Positive(t, moved)
	require.Positive(t, recycled)
	require.Less(t, len(names), 40, "files are not used again")
}
