package sim

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// A snapshot may show what was there at one moment between the ask and the answer, and then the same for ever. A
// rollback is a change to what it shows.
func TestAlbum(t *testing.T) {
	t.Parallel()
	block := func(v version) []byte {
		p := make([]byte, trivet.BlockSize)
		if v > 0 {
			stamp(p, 0, 1, v)
		}
		return p
	}
	o := newOracle(1)
	a := &album{o: o}
	change := func(w write, acked bool) {
		_, ok := o.begin(0, 1, w)
		require.True(t, ok)
		o.end(0, 1, acked)
	}
	take := func() *frozen { // versions 1 to 3 are there, 2 acknowledged before, 3 under way
		f := a.freeze()
		f.floor = []version{2}
		f.ceil = []version{3}
		return f
	}
	change(write{epoch: 1}, true)
	change(write{epoch: 1}, true)
	first := a.freeze()
	change(write{epoch: 1}, true)
	a.add(first)
	change(write{epoch: 1}, true) // after the answer
	assert.Equal(t, []version{2}, first.floor)
	assert.Equal(t, []version{3}, first.ceil)
	for v, ok := range map[version]bool{0: false, 1: false, 2: true, 3: true, 4: false} {
		err := a.check(take(), 0, block(v))
		assert.Equal(t, ok, err == nil, "version %d: %v", v, err)
	}
	require.NoError(t, a.check(first, 0, block(3)))
	require.NoError(t, a.check(first, 0, block(3)))
	require.Error(t, a.check(first, 0, block(2)), "it showed version 3 before")
	was, ok := a.known(first)
	require.True(t, ok)
	require.Equal(t, []version{3}, was)

	versions, ok := o.beginEach(0, 1, func(i int) write { return write{back: true, was: was[i], epoch: 1} })
	require.True(t, ok)
	require.Equal(t, []version{5}, versions)
	o.end(0, 1, true)
	require.NoError(t, o.check(0, block(3), o.floors(0, 1)), "what the snapshot showed is there again")
	require.Error(t, o.check(0, block(4), o.floors(0, 1)), "what was written since is gone")
	second := a.freeze()
	a.add(second)
	require.NoError(t, a.check(second, 0, block(3)))

	release, ok := a.hold(second)
	require.True(t, ok)
	require.False(t, a.drop(second), "a rollback looks at it")
	release()
	require.True(t, a.drop(second))
	_, ok = a.hold(second)
	require.False(t, ok)
	require.Equal(t, []*frozen{first}, a.all())
}
