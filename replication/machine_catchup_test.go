package replication

import (
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

var errCut = errors.New("the source died")

// cutAfter passes n bytes, counts them, and then fails; n < 0 passes all.
type cutAfter struct {
	r       io.Reader
	n, seen int
}

func (c *cutAfter) Read(p []byte) (int, error) {
	if c.n >= 0 {
		if c.seen == c.n {
			return 0, errCut
		}
		p = p[:min(len(p), c.n-c.seen)]
	}
	n, err := c.r.Read(p)
	c.seen += n
	return n, err
}

// applyUpTo applies a log in pieces, from where the machine is up to a position.
func applyUpTo(t *testing.T, m *testMachine, rnd *rand.Rand, log []raftgroup.Entry, end int) {
	t.Helper()
	applied, _ := m.Applied()
	at := 0
	for at < end && log[at].Index <= applied {
		at++
	}
	for at < end {
		n := min(1+rnd.IntN(8), end-at)
		_, err := m.Apply(log[at : at+n])
		require.NoError(t, err)
		at += n
	}
}

// requireUnusable: nothing counts as applied, nothing may be read, applied or sent (H5).
func requireUnusable(t *testing.T, m *testMachine, log []raftgroup.Entry, epoch trivet.Epoch) {
	t.Helper()
	require.True(t, m.Restoring())
	index, term := m.Applied()
	require.Equal(t, []uint64{0, 0}, []uint64{index, term})
	require.GreaterOrEqual(t, m.view.Load().Epoch, epoch, "I7")
	_, err := m.Apply(log[len(log)-1:])
	require.ErrorIs(t, err, trivet.ErrUnavailable)
	_, err = m.Image(nil)
	require.ErrorIs(t, err, trivet.ErrUnavailable)
	durable, err := m.Flush()
	require.NoError(t, err)
	require.Zero(t, durable)
}

// Two sources at different places of one log, and a replica that is brought up now by entries, now by images that
// break off, and crashes in between: it ends equal to the sources, and is unusable while it is neither.
func TestMachineCatchUp(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 8))
	log := randomLog(rnd, 500)
	sources := []*testMachine{newTestMachine(t), newTestMachine(t)}
	target := openTestMachine(t, vfs.NewCrashableMem())
	defer func() { require.NoError(t, target.eng.Close()) }()
	cuts := 0
	for end := 10; end < len(log); end += rnd.IntN(20) {
		src := sources[rnd.IntN(2)]
		applyUpTo(t, src, rnd, log, end)
		switch k := rnd.IntN(10); {
		case k < 2:
			target.crash(t, rnd, rnd.IntN(101))
		case k < 4 && !target.Restoring():
			applyUpTo(t, target, rnd, log, end-rnd.IntN(10))
		default:
			cuts += cutRestore(t, rnd, target, src, log)
		}
	}
	require.Positive(t, cuts, "the test is void")
	for _, src := range sources {
		applyUpTo(t, src, rnd, log, len(log))
	}
	img, err := sources[1].Image(target.Want())
	require.NoError(t, err)
	require.NoError(t, target.Restore(img))
	require.NoError(t, img.Close())
	require.Equal(t, sources[0].digest(t), target.digest(t))
	require.Equal(t, sources[0].core, target.core)
	applyUpTo(t, target, rnd, log, len(log))
	require.Equal(t, sources[1].digest(t), target.digest(t), "nothing is applied twice")
}

// cutRestore restores from a source, which may break off (1) or be refused.
func cutRestore(t *testing.T, rnd *rand.Rand, target, src *testMachine, log []raftgroup.Entry) int {
	t.Helper()
	epoch := target.view.Load().Epoch
	wasRestoring := target.Restoring()
	before, _ := target.Applied()
	img, err := src.Image(target.Want())
	if errors.Is(err, trivet.ErrInvalid) {
		return 0 // the source is behind
	}
	require.NoError(t, err)
	defer func() { require.NoError(t, img.Close()) }()
	cut := &cutAfter{r: img, n: -1}
	if rnd.IntN(2) == 0 {
		cut.n = rnd.IntN(40 << 10)
	}
	err = target.Restore(cut)
	if err == nil {
		want, _ := src.Applied()
		got, _ := target.Applied()
		require.Equal(t, want, got)
		require.Equal(t, src.digest(t), target.digest(t))
		return 0
	}
	require.ErrorIs(t, err, errCut)
	if wasRestoring || target.Restoring() {
		requireUnusable(t, target, log, epoch)
		return 1
	}
	after, _ := target.Applied() // it broke off before it began
	require.Equal(t, before, after)
	return 0
}

// A replica that missed 8 of 64 blocks is sent these and little more, and a wipe costs nothing.
func TestMachineImageCarriesWhatChanged(t *testing.T) {
	t.Parallel()
	src, target := newTestMachine(t), newTestMachine(t)
	index, seq := uint64(0), uint64(0)
	both := []*testMachine{src, target}
	apply := func(ms []*testMachine, reqs ...request) {
		index++
		for i := range reqs {
			if reqs[i].op == opWrite {
				seq++
				reqs[i] = writeReq(1, seq, seq, reqs[i].lba, reqs[i].data)
			}
		}
		e := raftgroup.Entry{Index: index, Term: 1, Data: appendEntry(nil, testVolume, reqs)}
		for _, m := range ms {
			_, err := m.Apply([]raftgroup.Entry{e})
			require.NoError(t, err)
		}
	}
	catchUp := func() int {
		img, err := src.Image(target.Want())
		require.NoError(t, err)
		r := &cutAfter{r: img, n: -1}
		require.NoError(t, target.Restore(r))
		require.NoError(t, img.Close())
		require.Equal(t, src.digest(t), target.digest(t))
		return r.seen
	}
	apply(both, sealed(request{op: opFence, epoch: 1}))
	for lba := trivet.LBA(0); lba < twinBlocks; lba += 8 {
		apply(both, request{op: opWrite, lba: lba, data: block(8, byte(lba)+1)})
	}
	apply(both[:1], request{op: opWrite, lba: 20, data: block(8, 99)})
	assert.InDelta(t, 8*trivet.BlockSize, catchUp(), 2000)
	assert.Less(t, catchUp(), 2000, "nothing changed")
	apply(both[:1], sealed(request{op: opWipe, epoch: 1}))
	assert.Less(t, catchUp(), 2000, "a wipe")
	assert.Zero(t, target.view.Load().AppliedIndex-index)
}
