package engine_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
)

// genEntry is one entry of a volume's log in the model.
type genEntry struct {
	st       engine.State
	ops      []op
	rollback trivet.Generation // engine.Live: none
}

// genVolume is the model of a volume: its log, and by index what it and each of its generations show.
type genVolume struct {
	id    trivet.VolumeID
	base  engine.Base // what it was cloned from; the zero value: nothing
	log   []genEntry
	shows []map[trivet.Generation][]uint32 // by index; engine.Live is one of them
}

func (g *genVolume) state() engine.State {
	st := g.log[len(g.log)-1].st
	st.Snapshots = slices.Clone(st.Snapshots)
	return st
}

func (g *genVolume) now() map[trivet.Generation][]uint32 { return g.shows[len(g.shows)-1] }

// genModel applies the entries of a few volumes to two replicas, each on a disk of its own, which lag, crash, sweep and
// flatten as they like, and catch up by entries or by images. Whatever they do, each shows what the model does, and
// both have one digest at one index.
type genModel struct {
	t     *testing.T
	rng   *rand.Rand
	lost  *rand.Rand // by crashes; how much is drawn from it hangs on what Pebble has written by then
	fs    [2]*vfs.MemFS
	e     [2]*engine.Engine
	vols  map[trivet.VolumeID]*genVolume
	next  trivet.VolumeID
	stamp uint32
	snap  uint64
	did   map[string]int
}

const genBlocks = 40

func newGenModel(t *testing.T, seed uint64) *genModel {
	m := &genModel{t: t, rng: seeds(t, seed), vols: map[trivet.VolumeID]*genVolume{}, next: 1, did: map[string]int{}}
	m.lost = rand.New(rand.NewPCG(seed, 1))
	for i := range m.e {
		m.fs[i] = vfs.NewCrashableMem()
		m.open(i)
	}
	m.create()
	return m
}

func (m *genModel) open(i int) {
	var err error
	m.e[i], err = engine.Open(config(m.fs[i]))
	require.NoError(m.t, err)
}

func (m *genModel) close() {
	for _, e := range m.e {
		require.NoError(m.t, e.Close())
	}
}

func (m *genModel) volume(i int, id trivet.VolumeID) *engine.Volume {
	v, err := m.e[i].OpenVolume(id)
	require.NoError(m.t, err)
	return v
}

// any is a random volume.
func (m *genModel) any() *genVolume {
	ids := make([]trivet.VolumeID, 0, len(m.vols))
	for id := range m.vols {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return m.vols[ids[m.rng.IntN(len(ids))]]
}

// add enters a volume into the model.
func (m *genModel) add(base engine.Base, live []uint32) *genVolume {
	g := &genVolume{id: m.next, base: base}
	m.next++
	g.log = []genEntry{{st: engine.State{SizeBytes: genBlocks * bs}}}
	g.shows = []map[trivet.Generation][]uint32{{engine.Live: live}}
	m.vols[g.id] = g
	return g
}

func (m *genModel) create() {
	g := m.add(engine.Base{}, make([]uint32, genBlocks))
	for _, e := range m.e {
		require.NoError(m.t, e.CreateVolume(g.id, "r", genBlocks*bs))
	}
}

// entry appends a random entry to the log of a volume.
func (m *genModel) entry(g *genVolume) {
	st, show := g.state(), map[trivet.Generation][]uint32{}
	for gen, blocks := range g.now() {
		show[gen] = blocks // never changed in place
	}
	st.AppliedIndex++
	x := genEntry{rollback: engine.Live}
	for range m.rng.IntN(4) {
		n := 1 + m.rng.Int64N(5)
		o := op{lba: trivet.LBA(m.rng.Int64N(genBlocks - n + 1)), n: n}
		if m.rng.IntN(4) > 0 {
			m.stamp++
			o.stamp = m.stamp
		}
		if m.rng.IntN(25) == 0 {
			o = op{0, genBlocks, 0}
		}
		x.ops = append(x.ops, o)
	}
	live := slices.Clone(show[engine.Live])
	for _, o := range x.ops {
		for i := range o.n {
			live[int64(o.lba)+i] = o.stamp
		}
	}
	show[engine.Live] = live
	switch k := m.rng.IntN(14); {
	case k < 3 && len(st.Snapshots) < 12:
		m.freeze(&st, show)
	case k < 5 && len(st.Snapshots) > 0:
		i := m.rng.IntN(len(st.Snapshots))
		delete(show, st.Snapshots[i].Generation)
		st.Snapshots = slices.Delete(st.Snapshots, i, i+1)
		m.did["delete"]++
	case k < 6 && len(st.Snapshots) > 0:
		x.rollback = st.Snapshots[m.rng.IntN(len(st.Snapshots))].Generation
		back := show[x.rollback]
		if m.rng.IntN(2) == 0 {
			m.freeze(&st, show)
		} else {
			st.Generation++
		}
		show[engine.Live] = back
		m.did["rollback"]++
	}
	if len(st.Snapshots) == 0 {
		st.Snapshots = nil
	}
	x.st = st
	g.log, g.shows = append(g.log, x), append(g.shows, show)
}

func (m *genModel) freeze(st *engine.State, show map[trivet.Generation][]uint32) {
	m.snap++
	show[st.Generation] = show[engine.Live]
	st.Snapshots = append(st.Snapshots, engine.Snapshot{ID: m.snap, Generation: st.Generation})
	st.Generation++
	m.did["freeze"]++
}

// apply brings a replica up to an index by entries.
func (m *genModel) apply(i int, g *genVolume, upTo uint64) {
	v := m.volume(i, g.id)
	for at := v.State().AppliedIndex + 1; at <= upTo; at++ {
		x := g.log[at]
		require.NoError(m.t, engine.Housekeep(v))
		b := v.NewBatch()
		for _, o := range x.ops {
			require.NoError(m.t, o.addTo(b))
		}
		if x.rollback != engine.Live {
			require.NoError(m.t, b.Rollback(x.rollback))
		}
		require.NoError(m.t, b.Commit(x.st))
	}
}

func (m *genModel) last(g *genVolume) uint64 { return uint64(len(g.log) - 1) }

// clone makes a volume out of a random snapshot, on both disks.
func (m *genModel) clone(g *genVolume) {
	st := g.state()
	if len(st.Snapshots) == 0 || len(m.vols) > 5 {
		return
	}
	base := engine.Base{Volume: g.id, Generation: st.Snapshots[m.rng.IntN(len(st.Snapshots))].Generation}
	c := m.add(base, g.now()[base.Generation])
	for i, e := range m.e {
		m.apply(i, g, m.last(g))
		require.NoError(m.t, e.CreateClone(c.id, "r", genBlocks*bs, base))
	}
	m.did["clone"]++
}

// drop drops a volume from both disks, unless one of them needs it for a clone.
func (m *genModel) drop(g *genVolume) {
	for i, e := range m.e {
		if len(engine.Dependants(e, g.id)) > 0 {
			require.ErrorIs(m.t, e.DropVolume(g.id), trivet.ErrInUse)
			m.did["drop refused"]++
			if i > 0 {
				require.NoError(m.t, engine.SweepNow(e))
				require.NoError(m.t, e.DropVolume(g.id))
				continue
			}
			return
		}
		if i == 0 && len(m.vols) == 1 {
			return
		}
		require.NoError(m.t, e.DropVolume(g.id))
	}
	delete(m.vols, g.id)
	m.did["drop"]++
}

func (m *genModel) step() {
	g, i := m.any(), m.rng.IntN(2)
	switch k := m.rng.IntN(100); {
	case k < 50:
		m.entry(g)
		m.apply(0, g, m.last(g))
		if m.rng.IntN(3) > 0 {
			m.apply(1, g, m.last(g))
		}
	case k < 60:
		m.checkVolume(i, g)
	case k < 63:
		require.NoError(m.t, engine.SweepNow(m.e[i]))
	case k < 76:
		require.NoError(m.t, engine.SweepStep(m.volume(i, g.id)))
	case k < 79:
		require.NoError(m.t, m.e[i].Close())
		m.open(i)
	case k < 84:
		m.crash(i)
	case k < 90:
		m.catchUp(g)
	case k < 94:
		m.clone(g)
	case k < 96:
		m.drop(g)
	case k < 97 && len(m.vols) < 5:
		m.create()
	default:
		m.digests(g)
	}
}

// crash loses what was not flushed, of one disk.
func (m *genModel) crash(i int) {
	fs := m.fs[i].CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: unsynced[m.rng.IntN(len(unsynced))], RNG: m.lost})
	require.NoError(m.t, m.e[i].Close())
	m.fs[i] = fs
	m.open(i)
	for _, g := range m.vols { // a clone needs that its parent has applied the freeze
		m.apply(i, g, m.last(g))
	}
	m.did["crash"]++
}

// catchUp brings the second replica to where the first is, by an image.
func (m *genModel) catchUp(g *genVolume) {
	m.apply(0, g, m.last(g))
	v := m.volume(1, g.id)
	behind := v.State().AppliedIndex < m.last(g)
	if m.rng.IntN(2) == 0 {
		require.NoError(m.t, engine.SweepStep(m.volume(0, g.id)))
	}
	var want []byte
	if m.rng.IntN(4) > 0 {
		want = v.Want()
	}
	image, err := m.volume(0, g.id).Image(want)
	require.NoError(m.t, err)
	b, err := io.ReadAll(image)
	require.NoError(m.t, err)
	require.NoError(m.t, image.Close())
	err = v.Restore(bytes.NewReader(b))
	if len(engine.Dependants(m.e[1], g.id)) > 0 {
		require.ErrorIs(m.t, err, trivet.ErrInUse, "a clone needs it as it is")
		return
	}
	require.NoError(m.t, err)
	if behind {
		m.did["catch up"]++
	}
	m.checkVolume(1, g)
	m.digests(g)
}

// digests compares the replicas at one index.
func (m *genModel) digests(g *genVolume) {
	var d [2][32]byte
	for i := range m.e {
		m.apply(i, g, m.last(g))
		var err error
		d[i], err = m.volume(i, g.id).Digest()
		require.NoError(m.t, err)
	}
	require.Equal(m.t, d[0], d[1], "%s at index %d", g.id, m.last(g))
}

// checkVolume compares all that a replica shows of a volume with the model.
func (m *genModel) checkVolume(i int, g *genVolume) {
	v := m.volume(i, g.id)
	st := v.State()
	require.Equal(m.t, g.log[st.AppliedIndex].st, st)
	shows := g.shows[st.AppliedIndex]
	m.checkUsage(v, shows)
	for gen, want := range shows {
		p := make([]byte, genBlocks*bs)
		require.NoError(m.t, v.ReadAtGeneration(p, 0, gen))
		for k, stamp := range want {
			require.Equal(m.t, block(stamp, trivet.LBA(k)), p[k*bs:(k+1)*bs],
				"%s block %d of generation %d at %+v on %d", g.id, k, gen, st, i)
		}
		k := m.rng.IntN(genBlocks)
		wantStamp(m.t, v, gen, trivet.LBA(k), want[k])
		m.checkExtents(v, shows, gen)
	}
}

// checkUsage: what the live state shows is exact, and all adds up to what the store has.
func (m *genModel) checkUsage(v *engine.Volume, shows map[trivet.Generation][]uint32) {
	u, err := v.Usage(m.t.Context())
	require.NoError(m.t, err)
	live := int64(0)
	for _, stamp := range shows[engine.Live] {
		if stamp != 0 {
			live += bs
		}
	}
	require.Equal(m.t, live, u.LiveBytes)
	n, err := engine.DataVersions(v)
	require.NoError(m.t, err)
	require.Equal(m.t, int64(n)*bs, u.LiveBytes+u.SnapshotBytes-u.SharedBytes+u.OtherBytes)
	require.GreaterOrEqual(m.t, min(u.SnapshotBytes, u.SharedBytes, u.OtherBytes), int64(0))
}

// checkExtents compares Allocated and Delta with the model.
func (m *genModel) checkExtents(v *engine.Volume, shows map[trivet.Generation][]uint32, gen trivet.Generation) {
	xs, next, err := v.Allocated(gen, 0, genBlocks)
	require.NoError(m.t, err)
	require.Equal(m.t, trivet.LBA(genBlocks), next)
	require.Equal(m.t, extentsOf(func(i int) bool { return shows[gen][i] != 0 }), xs)
	for from, old := range shows {
		xs, _, err := v.Delta(from, gen, 0, genBlocks)
		require.NoError(m.t, err)
		listed := make([]bool, genBlocks)
		for _, x := range xs {
			for i := range x.BlockN {
				listed[int64(x.LBA)+i] = true
			}
		}
		for i := range old {
			if old[i] != shows[gen][i] {
				require.True(m.t, listed[i], "block %d differs between generations %d and %d", i, from, gen)
			}
		}
	}
}

func extentsOf(has func(i int) bool) (xs []engine.Extent) {
	for i := range genBlocks {
		switch k := len(xs); {
		case !has(i):
		case k > 0 && xs[k-1].LBA+trivet.LBA(xs[k-1].BlockN) == trivet.LBA(i):
			xs[k-1].BlockN++
		default:
			xs = append(xs, engine.Extent{LBA: trivet.LBA(i), BlockN: 1})
		}
	}
	return xs
}

// TestGenerationModel: see genModel.
func TestGenerationModel(t *testing.T) {
	seedN, steps := uint64(6), 500
	if testing.Short() {
		seedN, steps = 2, 250
	}
	did := map[string]int{}
	for seed := range seedN {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			m := newGenModel(t, seed)
			defer m.close()
			m.did = did
			for range steps {
				m.step()
			}
			for _, g := range m.vols {
				m.digests(g)
				for i := range m.e {
					m.checkVolume(i, g)
				}
			}
			for _, e := range m.e {
				require.NoError(t, engine.CheckLive(e))
				require.NoError(t, engine.SweepNow(e))
				require.NoError(t, engine.CheckLive(e))
			}
			m.checkSwept()
		})
	}
	t.Log(did)
	for _, what := range []string{"freeze", "delete", "rollback", "clone", "crash", "catch up"} { // the rest is rare
		require.NotZero(t, did[what], "%s never happened: the test is void", what)
	}
}

// checkSwept: after a sweep nothing is kept that nobody sees, and after one of all blocks there are no tombstones that
// hide nothing either: a block that was written and zeroed in one entry leaves one, which is not owed.
func (m *genModel) checkSwept() {
	for id, g := range m.vols {
		for i := range m.e {
			v := m.volume(i, id)
			require.Empty(m.t, engine.Dependants(m.e[i], id), "all is flattened")
			u, err := v.Usage(m.t.Context())
			require.NoError(m.t, err)
			require.Zero(m.t, u.SharedBytes+u.OtherBytes, "all that is there is shown")
			require.NoError(m.t, engine.SweepWhole(v))
			require.False(m.t, engine.SweepOwed(v), "%s on %d", id, i)
			n, err := engine.Versions(v)
			require.NoError(m.t, err)
			most := 0
			gens := []trivet.Generation{engine.Live}
			for _, s := range slices.Backward(g.state().Snapshots) {
				gens = append(gens, s.Generation)
			}
			for k := range genBlocks {
				prev := uint32(0) // of the next older generation
				for _, gen := range slices.Backward(gens) {
					if stamp := g.now()[gen][k]; stamp != prev {
						most, prev = most+1, stamp
					}
				}
			}
			// A block that became the same again is one content more to the store, so count these apart.
			require.LessOrEqual(m.t, n, most+m.again(g, gens), "%s on %d", id, i)
		}
	}
}

// again counts what follows itself: a version that shows the same as the one before it is still one.
func (m *genModel) again(g *genVolume, gens []trivet.Generation) (n int) {
	for k := range genBlocks {
		for i := range len(gens) - 1 {
			if stamp := g.now()[gens[i]][k]; stamp == g.now()[gens[i+1]][k] && stamp != 0 {
				n++
			}
		}
	}
	return n
}
