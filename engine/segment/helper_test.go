package segment

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

const testDisk = trivet.DiskID("6f1c0de0-1111-4222-8333-444455556666")

// testOptions are those of a small log. Little stays in memory, so that reads go to the disk.
func testOptions(dir Dir, seed uint64) Options {
	rng := rand.New(rand.NewPCG(seed, 99))
	return Options{
		Dir: dir, Disk: testDisk, Lanes: 2, SegmentBytes: segmentBytesMin, CacheBytes: 1, Rand: rng.Uint64,
	}
}

// newTestLog formats and opens a log in memory.
func newTestLog(t testing.TB, change ...func(*Options)) (*Log, *MemDir) {
	t.Helper()
	dir := NewMemDir()
	opts := testOptions(dir, 1)
	for _, f := range change {
		f(&opts)
	}
	require.NoError(t, Format(opts))
	return mustOpen(t, opts), dir
}

func mustOpen(t testing.TB, opts Options) *Log {
	t.Helper()
	l, err := Open(opts)
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() }) // the test may have poisoned it
	return l
}

// end returns where the lane of a group ends.
func end(g *Group) (number uint64, name string, pos int64) {
	g.lane.mu.Lock()
	defer g.lane.mu.Unlock()
	return g.lane.cur.number, g.lane.cur.name, g.lane.pos
}

func curNumber(g *Group) uint64 {
	number, _, _ := end(g)
	return number
}

// testEntry makes an entry whose content follows from seed.
func testEntry(seed, index, term uint64, dataBytes, pagesN int) Entry {
	rng := rand.New(rand.NewPCG(seed, index))
	e := Entry{Index: index, Term: term, Type: byte(seed)}
	e.Data, e.Payload = make([]byte, dataBytes), make([]byte, pagesN*pageBytes)
	for _, b := range [][]byte{e.Data, e.Payload} {
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
	}
	if seed%2 == 0 {
		for i := range pagesN {
			e.Blocks = append(e.Blocks, BlockInfo{LBA: trivet.LBA(rng.Uint64()), CRC: uint32(i)})
		}
	}
	return e
}

func sameEntry(a, b Entry) bool {
	return a.Index == b.Index && a.Term == b.Term && a.Type == b.Type && bytes.Equal(a.Data, b.Data) &&
		bytes.Equal(a.Payload, b.Payload) && slices.Equal(a.Blocks, b.Blocks)
}

// model is what a group should hold.
type model struct {
	first   uint64
	entries []Entry
	stable  Stable
}

func newModel() *model { return &model{first: 1} }

func (m *model) last() uint64 { return m.first + uint64(len(m.entries)) - 1 }

func (m *model) clone() *model { return &model{m.first, slices.Clone(m.entries), m.stable} }

// same tells from the bounds alone that the group cannot hold the model.
func (m *model) bounds(g *Group) error {
	first, last := g.FirstLast()
	if first != m.first || last != m.last() {
		return fmt.Errorf("has entries %d to %d, want %d to %d", first, last, m.first, m.last())
	}
	if got := g.Stable(); got != m.stable {
		return fmt.Errorf("stable is %+v, want %+v", got, m.stable)
	}
	return nil
}

// matches returns nil when the group holds exactly the model.
func (m *model) matches(g *Group) error {
	if err := m.bounds(g); err != nil {
		return err
	}
	for _, want := range m.entries {
		got, err := g.Read(want.Index)
		if err != nil {
			return err
		}
		if !sameEntry(got, want) {
			return fmt.Errorf("entry %d of term %d is not what was written in term %d", got.Index, got.Term, want.Term)
		}
	}
	for _, index := range []uint64{0, m.first - 1, m.last() + 1} {
		if _, err := g.Read(index); !errors.Is(err, trivet.ErrNotFound) {
			return fmt.Errorf("read of missing entry %d: %w", index, err)
		}
	}
	return nil
}

// op is one change of a group and of its model.
type op struct {
	what  string
	start func(g *Group) (*Ticket, error)
	apply func(m *model)
}

// randomOp draws a change that is valid for m. A lazy group is hardly ever trimmed.
func randomOp(rng *rand.Rand, m *model, lazy bool) op {
	n := len(m.entries)
	limit := 24
	if lazy {
		limit = 200
	}
	switch k := rng.IntN(40); {
	case n > limit || k < 4 && n > 1 && !lazy:
		return trimOp(m.first + uint64(rng.IntN(n)))
	case k < 7 && n > 1:
		return truncateOp(m.first + uint64(1+rng.IntN(n-1)))
	case k < 11:
		s := Stable{Term: m.stable.Term + uint64(rng.IntN(3)), VoteTerm: m.stable.VoteTerm}
		if s.Term > s.VoteTerm {
			s.VoteTerm, s.Vote = s.Term, fmt.Sprintf("node-%d", rng.IntN(1000))
		} else {
			s.Vote = m.stable.Vote
		}
		return stableOp(s)
	case k == 11 && !lazy:
		return resetOp(m.last() + 1 + uint64(rng.IntN(5)))
	case k == 12 && !lazy && rng.IntN(4) == 0:
		return op{"delete", func(g *Group) (*Ticket, error) {
			return g.change("delete", &record{kind: kindDelete}, nil)
		}, func(m *model) { *m = *newModel() }}
	}
	return randomAppend(rng, m)
}

func randomAppend(rng *rand.Rand, m *model) op {
	next, term := m.last()+1, uint64(1)
	if n := len(m.entries); n > 0 {
		term = m.entries[n-1].Term
		if rng.IntN(5) == 0 { // overwrite a tail
			next = m.first + uint64(rng.IntN(n))
			term++
		}
	}
	var entries []Entry
	for i := range 1 + rng.IntN(3) {
		pagesN := 0
		if i < 2 && rng.IntN(3) > 0 {
			pagesN = rng.IntN(2)
		}
		entries = append(entries, testEntry(rng.Uint64(), next+uint64(i), term, rng.IntN(300), pagesN))
	}
	return appendOp(entries)
}

func appendOp(entries []Entry) op {
	return op{
		"append", func(g *Group) (*Ticket, error) { return g.AppendAsync(entries) },
		func(m *model) {
			if len(m.entries) == 0 {
				m.first = entries[0].Index
			}
			m.entries = append(slices.Clone(m.entries[:entries[0].Index-m.first]), entries...)
		},
	}
}

func truncateOp(from uint64) op {
	return op{
		"truncate", func(g *Group) (*Ticket, error) { return g.TruncateSuffixAsync(from) },
		func(m *model) { m.entries = m.entries[:from-m.first] },
	}
}

func trimOp(to uint64) op {
	return op{
		"trim", func(g *Group) (*Ticket, error) {
			return g.change("trim", &record{kind: kindTrim, index: to}, nil)
		},
		func(m *model) { m.entries, m.first = m.entries[to+1-m.first:], to+1 },
	}
}

func resetOp(next uint64) op {
	return op{
		"reset", func(g *Group) (*Ticket, error) {
			return g.change("reset", &record{kind: kindReset, index: next}, nil)
		},
		func(m *model) { m.entries, m.first = nil, next },
	}
}

func stableOp(s Stable) op {
	return op{
		"stable", func(g *Group) (*Ticket, error) {
			return g.change("set", &record{kind: kindStable, term: s.Term, index: s.VoteTerm, data: []byte(s.Vote)}, nil)
		},
		func(m *model) { m.stable = s },
	}
}
