package replication

import (
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

func TestWindow(t *testing.T) {
	t.Parallel()
	type op struct {
		seq, low uint64
		want     seqState
		ok       bool
	}
	tests := []struct {
		name string
		ops  []op // each settles as applied when unseen
	}{
		{"first", []op{{1, 1, seqUnseen, true}}},
		{"a copy is known", []op{{1, 1, seqUnseen, true}, {1, 1, seqApplied, true}}},
		{"a copy below the mark is refused", []op{
			{1, 1, seqUnseen, true}, {2, 2, seqUnseen, true}, {1, 1, seqUnseen, false},
		}},
		{"an unseen one below the mark is refused", []op{{5, 4, seqUnseen, true}, {3, 1, seqUnseen, false}}},
		{"out of order", []op{
			{3, 1, seqUnseen, true}, {1, 1, seqUnseen, true}, {2, 1, seqUnseen, true}, {2, 1, seqApplied, true},
		}},
		{"the highest in the window", []op{{windowN, 1, seqUnseen, true}, {1, 1, seqUnseen, true}}},
		{"above the window", []op{{windowN + 1, 1, seqUnseen, false}}},
		{"the mark jumps over all", []op{
			{2, 1, seqUnseen, true},
			{windowN * 3, windowN * 3, seqUnseen, true},
			{2, 1, seqUnseen, false},
			{windowN*3 + 2, 1, seqUnseen, true},
		}},
		{"states do not survive a lap", []op{
			{2, 1, seqUnseen, true}, {windowN + 1, windowN, seqUnseen, true}, {windowN + 2, windowN, seqUnseen, true},
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWindow()
			for i, o := range tt.ops {
				w.raise(o.low)
				st, ok := w.lookup(o.seq)
				assert.Equal(t, o.want, st, "step %d", i)
				assert.Equal(t, o.ok, ok, "step %d", i)
				if ok && st == seqUnseen {
					w.settle(o.seq, seqApplied)
				}
			}
		})
	}
}

// naiveWindow says the same as window and never forgets.
type naiveWindow struct {
	mark uint64
	seen map[uint64]seqState
}

// A window agrees with the naive one over random requests, and so does every window that was
// encoded and decoded on the way.
func TestWindowModel(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	for range 40 {
		w, naive := newWindow(), naiveWindow{mark: 1, seen: map[uint64]seqState{}}
		span := uint64(1 + rnd.IntN(2*windowN))
		top := uint64(1)
		for range 2000 {
			seq := top + rnd.Uint64N(span)
			if rnd.IntN(3) == 0 {
				seq = max(1, top-min(top, rnd.Uint64N(span)))
			}
			low := max(1, seq-min(seq, rnd.Uint64N(span)))
			w.raise(low)
			naive.mark = max(naive.mark, low)
			st, ok := w.lookup(seq)
			inside := seq >= naive.mark && seq < naive.mark+windowN
			require.Equal(t, inside, ok, "sequence %d, mark %d", seq, naive.mark)
			if !ok {
				continue
			}
			require.Equal(t, naive.seen[seq], st, "sequence %d", seq)
			if st == seqUnseen {
				st = seqState(1 + rnd.IntN(2))
				w.settle(seq, st)
				naive.seen[seq] = st
			}
			top = max(top, seq-rnd.Uint64N(min(seq, 8)))
			if rnd.IntN(50) == 0 {
				again, err := decodeWindow(w.append(nil))
				require.NoError(t, err)
				require.Equal(t, w.append(nil), again.append(nil))
				w = again
			}
		}
	}
}

// Equal histories make equal bytes, however the window was stored in between: the digest of a
// replica covers them.
func TestWindowEncodingIsCanonical(t *testing.T) {
	t.Parallel()
	a, b := newWindow(), newWindow()
	for s := uint64(1); s < 3*windowN; s += 3 {
		for _, w := range []*window{a, b} {
			w.raise(max(1, s-min(s, 50)))
			w.settle(s, seqApplied)
		}
		var err error
		b, err = decodeWindow(b.append(nil))
		require.NoError(t, err)
	}
	assert.Equal(t, a.append(nil), b.append(nil))
	assert.LessOrEqual(t, len(a.append(nil)), windowHeaderBytes+windowN/4)
}

func FuzzDecodeWindow(f *testing.F) {
	w := newWindow()
	f.Add(w.append(nil))
	w.settle(3, seqApplied)
	w.settle(9, seqRefused)
	f.Add(w.append(nil))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		w, err := decodeWindow(b)
		if err != nil {
			require.ErrorIs(t, err, trivet.ErrCorrupt)
			return
		}
		if len(b) > 0 {
			require.Equal(t, b, w.append(nil))
		}
		require.LessOrEqual(t, w.high-w.mark, uint64(windowN))
	})
}
