package replication

import (
	"encoding/hex"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// twoWindows is a core with two writers, whose windows differ.
func twoWindows() *core {
	c := &core{epoch: 9, win: newWindow(), win1: newWindow(), since: Writers{4, 9}}
	c.win.raise(7)
	c.win.settle(7, seqApplied)
	c.win.settle(9, seqRefused)
	c.win1.settle(1, seqApplied)
	return c
}

// The bytes of sessions stay readable for ever: of one writer as version 1, of two, or of one who stayed, as version 2.
// So does a fence of writers in the log.
func TestSessionsGolden(t *testing.T) {
	t.Parallel()
	alone := &core{epoch: 9, win: twoWindows().win, since: Alone(9)}
	stayed := &core{epoch: 9, win1: twoWindows().win, since: Writers{0, 4}}
	var b strings.Builder
	for _, c := range []*core{alone, twoWindows(), stayed} {
		b.WriteString(hex.Dump(c.appendSessions(nil)) + "\n")
	}
	fence := sealed(request{op: opFenceWriters, epoch: 9, seq: 4, low: 9})
	b.WriteString(hex.Dump(appendEntry(nil, testVolume, []request{fence})))
	path := filepath.Join("testdata", "writers_v2.hex")
	if os.Getenv("REWRITE") != "" {
		require.NoError(t, os.WriteFile(path, []byte(b.String()), 0o644))
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.Equal(t, string(want), b.String())
	assert.Equal(t, twoWindows().win.append(nil), alone.appendSessions(nil), "what a build reads that knows one writer")
	assert.True(t, manyWrite(twoWindows().appendSessions(nil)))
	assert.False(t, manyWrite(alone.appendSessions(nil)))
	assert.False(t, manyWrite(stayed.appendSessions(nil)))
	_, err = decodeWindow(twoWindows().appendSessions(nil))
	require.ErrorIs(t, err, trivet.ErrCorrupt, "such a build refuses two")
}

// Sessions that appendSessions does not make are refused.
func TestSessionsRefused(t *testing.T) {
	t.Parallel()
	good := twoWindows().appendSessions(nil)
	edit := func(f func(b []byte) []byte) []byte { return f(append([]byte(nil), good...)) }
	for name, b := range map[string][]byte{
		"no writers":            {sessionsVersion, 0},
		"a third writer":        edit(func(b []byte) []byte { b[1] = 4; return b }),
		"cut":                   good[:len(good)-1],
		"one writer too many":   edit(func(b []byte) []byte { b[1] = 1; return b }),
		"longer":                append(append([]byte(nil), good...), 0),
		"began in the future":   edit(func(b []byte) []byte { b[9] = 10; return b }),
		"began at no epoch":     edit(func(b []byte) []byte { b[9] = 0; return b }),
		"alone, as version 2":   append([]byte{sessionsVersion, 1, 0, 0, 0, 0, 0, 0, 0, 9}, newWindow().appendBody(nil)...),
		"version of the future": {sessionsVersion + 1, 1},
		"nothing but a version": {sessionsVersion},
	} {
		c := core{epoch: 9}
		require.ErrorIs(t, c.loadSessions(b), trivet.ErrCorrupt, name)
	}
}

func FuzzLoadSessions(f *testing.F) {
	f.Add(twoWindows().appendSessions(nil), uint64(9))
	f.Add((&core{epoch: 3, win: newWindow(), since: Alone(3)}).appendSessions(nil), uint64(3))
	f.Add((&core{epoch: 9, win1: newWindow(), since: Writers{0, 4}}).appendSessions(nil), uint64(9))
	f.Add([]byte{}, uint64(0))
	f.Fuzz(func(t *testing.T, b []byte, epoch uint64) {
		c := core{epoch: trivet.Epoch(epoch)}
		if err := c.loadSessions(b); err != nil {
			require.ErrorIs(t, err, trivet.ErrCorrupt)
			return
		}
		if len(b) > 0 {
			require.Equal(t, b, c.appendSessions(nil))
		}
	})
}

// A request that names a writer says so in both numbers; a fence names at least one, and none of the future.
func TestWriterRequests(t *testing.T) {
	t.Parallel()
	data := make([]byte, trivet.BlockSize)
	const w = writerBit
	for name, r := range map[string]request{
		"sequence 0 of writer 1":       {op: opWrite, seq: w, low: w, arg: 1, data: data},
		"low of another writer":        {op: opWrite, seq: w | 2, low: 1, arg: 1, data: data},
		"low 0 of writer 1":            {op: opWrite, seq: w | 2, low: w, arg: 1, data: data},
		"low above seq":                {op: opWrite, seq: w | 2, low: w | 3, arg: 1, data: data},
		"fence of nobody":              {op: opFenceWriters, epoch: 3},
		"fence of a session to come":   {op: opFenceWriters, epoch: 3, seq: 4},
		"fence of writers, no epoch":   {op: opFenceWriters, seq: 1},
		"fence of writers with an arg": {op: opFenceWriters, epoch: 3, seq: 1, arg: 1},
		"fence of writers, of blocks":  {op: opFenceWriters, epoch: 3, seq: 1, lba: 1},
	} {
		require.ErrorIs(t, r.check(), trivet.ErrInvalid, name)
	}
	require.NoError(t, (&request{op: opWrite, seq: w | 2, low: w | 1, arg: 1, data: data}).check())
	require.NoError(t, (&request{op: opFenceWriters, epoch: 3, low: 2}).check())
}

// Two writers are two cores with a writer each, whatever comes when and is stored in between: neither window knows of
// the other.
func TestWritersModel(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	for range 20 {
		both := &core{epoch: 1, sizeBytes: twinBytes, win: newWindow(), since: Alone(1)}
		alone := [WritersMax]*core{both.clone()}
		epoch, since := trivet.Epoch(1), Alone(1)
		top := [WritersMax]uint64{1, 1}
		for range 600 {
			if rnd.IntN(12) == 0 {
				w := rnd.IntN(WritersMax)
				epoch += trivet.Epoch(1 + rnd.IntN(2))
				if since[w] = epoch; since[1-w] != 0 && rnd.IntN(3) == 0 {
					since[w] = 0
				}
				alone[w], top[w] = nil, 1
				for i, s := range since {
					switch {
					case s == epoch:
						alone[i] = &core{sizeBytes: twinBytes, win: newWindow()}
					case s != 0 && alone[i] == nil:
						t.Fatal("a session goes on that never was")
					}
					if alone[i] != nil {
						alone[i].epoch = epoch
					}
				}
				res, _ := both.step(&request{op: opFenceWriters, epoch: epoch, seq: uint64(since[0]), low: uint64(since[1])})
				require.Equal(t, outApplied, res.out)
			}
			w := rnd.IntN(WritersMax)
			seq := max(1, top[w]-min(top[w]-1, rnd.Uint64N(12)))
			if rnd.IntN(2) == 0 {
				seq = top[w]
				top[w]++
			}
			low := seq - min(seq-1, rnd.Uint64N(9))
			r := request{op: opDiscard, epoch: epoch, seq: seq, low: low, lba: trivet.LBA(rnd.IntN(twinBlocks + 2)), arg: 1}
			want := outStranger
			if alone[w] != nil {
				res, _ := alone[w].step(&r)
				want = res.out
			}
			r.seq, r.low = r.seq|uint64(w)<<63, r.low|uint64(w)<<63
			got, _ := both.step(&r)
			require.Equal(t, want, got.out, "sequence %d of writer %d, low %d", seq, w, low)
			if rnd.IntN(40) == 0 {
				stored := both.appendSessions(nil)
				require.NoError(t, both.loadSessions(stored))
				require.Equal(t, stored, both.appendSessions(nil))
			}
		}
	}
}

func (c *core) clone() *core {
	out := *c
	win := *c.win
	out.win = &win
	return &out
}
