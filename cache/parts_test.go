package cache

import (
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// TestGolden: a mapping of version 1 stays readable, and is still written like that.
func TestGolden(t *testing.T) {
	t.Parallel()
	m := &mapping{b: make([]byte, fileBytes(2)), slotN: 2, data: dataOff(2)}
	h := header{
		generation: 1, cluster: "11111111-2222-4333-8444-555555555555", volume: 0x0102030405060708, epoch: 9, next: 10,
		slotN: 2, poisoned: true,
	}
	m.writeHeader(&h)
	crc := m.fill(1, []byte("block of data"))
	m.publish(1, h.volume, 42, 77, crc)
	m.commit(77)
	got := append([]byte(nil), m.b[:slotsAt+2*slotHeadBytes]...)
	path := filepath.Join("testdata", "mapping-v1.bin")
	if os.Getenv("TRIVET_WRITE_GOLDEN") != "" {
		require.NoError(t, os.WriteFile(path, got, 0o600))
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, want, got)
	back, there, err := decodeHeader(want)
	require.NoError(t, err)
	require.True(t, there)
	require.Equal(t, h, back)
	copy(m.b, want)
	st, full, err := m.read(1, h.volume)
	require.NoError(t, err)
	require.True(t, full)
	require.Equal(t, slotState{42, 77, crc}, st)
	_, full, err = m.read(0, h.volume)
	require.NoError(t, err)
	require.False(t, full)
	_, _, err = m.read(1, h.volume+1)
	require.ErrorIs(t, err, trivet.ErrCorrupt, "another volume's")
	m.block(1)[4000]++
	_, _, err = m.read(1, h.volume)
	require.ErrorIs(t, err, trivet.ErrCorrupt)
}

// TestUnacknowledgedStaysSo: what recovery found unacknowledged must not count when later sequences do.
func TestUnacknowledgedStaysSo(t *testing.T) {
	t.Parallel()
	m := &mapping{b: make([]byte, fileBytes(4)), slotN: 4, data: dataOff(4)}
	for s, seq := range []uint64{4, 5} {
		m.publish(int32(s), 7, trivet.LBA(s), seq, m.fill(int32(s), []byte{1}))
	}
	m.commit(4)
	for range 2 {
		table, err := newSlots(m, 7, LRU)
		require.NoError(t, err)
		_, n, err := table.recover(0)
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.NotEqual(t, none, table.index.get(0))
		require.Equal(t, none, table.index.get(1))
		m.commit(6)
	}
}

func TestNewerFormatIsRefused(t *testing.T) {
	t.Parallel()
	m := &mapping{b: make([]byte, fileBytes(0))}
	m.writeHeader(&header{generation: 2, volume: 1, epoch: 1})
	binary.LittleEndian.PutUint32(m.b[8:], formatVersion+1)
	path := filepath.Join(t.TempDir(), "c")
	require.NoError(t, os.WriteFile(path, m.b, 0o600))
	_, err := Lock(path)
	require.ErrorIs(t, err, trivet.ErrInvalid)
	require.ErrorContains(t, err, "format version 2")
	require.FileExists(t, path)
	m.b[0]++
	require.NoError(t, os.WriteFile(path, m.b, 0o600))
	_, err = Lock(path)
	require.ErrorIs(t, err, trivet.ErrCorrupt)
}

// TestRefusedFileIsFreeBesideAFork: a child that another goroutine starts has all descriptors until it runs its
// program. A file that was refused is free all the same, and refused for the same reason again.
func TestRefusedFileIsFreeBesideAFork(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "c")
	require.NoError(t, os.WriteFile(path, []byte(strings.Repeat("no cache", 100)), 0o600))
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	child, err := unix.Dup(int(f.Fd())) // the same open file, as in a child
	require.NoError(t, err)
	defer unix.Close(child) //nolint:errcheck // nothing was written
	_, err = (&Locked{path: path, f: f}).take()
	require.ErrorIs(t, err, trivet.ErrCorrupt)
	require.NoError(t, f.Close())
	_, err = Lock(path)
	require.ErrorIs(t, err, trivet.ErrCorrupt)
}

func FuzzHeader(f *testing.F) {
	m := &mapping{b: make([]byte, fileBytes(0))}
	f.Add(append([]byte(nil), m.b...))
	m.writeHeader(&header{generation: 2, volume: 1, epoch: 1, slotN: 5})
	f.Add(append([]byte(nil), m.b...))
	m.writeHeader(&header{generation: 3, volume: 1, epoch: 2, slotN: 5, dropped: true})
	f.Add(append([]byte(nil), m.b...))
	f.Fuzz(func(t *testing.T, page []byte) {
		h, there, err := decodeHeader(page)
		if err != nil || !there {
			require.Equal(t, header{}, h)
			return
		}
		require.LessOrEqual(t, h.slotN, uint32(slotsMax))
		b := h.encode()
		again, err := decodeCopy(b[:])
		require.NoError(t, err)
		require.Equal(t, h, again)
	})
}

func TestIndexModel(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(3, 3))
	x, want := newIndex(64), map[trivet.LBA]int32{}
	for range 200_000 {
		lba := trivet.LBA(r.Uint64N(200))
		if r.IntN(2) == 0 {
			lba <<= 40
		}
		switch got := x.get(lba); {
		case r.IntN(2) == 0 || len(want) == 64:
			x.del(lba)
			delete(want, lba)
		default:
			s, ok := want[lba]
			require.Equal(t, ok, got != none)
			require.True(t, !ok || s == got)
			want[lba] = int32(r.IntN(64))
			x.put(lba, want[lba])
		}
	}
	for lba, s := range want {
		require.Equal(t, s, x.get(lba))
	}
}

func TestEvictions(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		e    Eviction
		want int32
	}{{LRU, 1}, {FIFO, 0}, {LFU, 2}} {
		p, err := newPolicy(tc.e, 3)
		require.NoError(t, err)
		for s := range int32(3) {
			p.add(s)
		}
		for _, s := range []int32{1, 1, 1, 2, 0, 0, 0} {
			p.hit(s)
		}
		require.Equal(t, tc.want, p.victim(), tc.e)
		p.remove(tc.want)
		require.NotEqual(t, tc.want, p.victim(), tc.e)
	}
	p, err := newPolicy(Random, 3)
	require.NoError(t, err)
	require.Equal(t, none, p.victim())
	p.add(2)
	require.EqualValues(t, 2, p.victim())
	_, err = newPolicy("mru", 3)
	require.ErrorIs(t, err, trivet.ErrInvalid)
}

func TestReadAheadGrowsAndStops(t *testing.T) {
	t.Parallel()
	var s streams
	const limit = 256
	lba, ahead, most := trivet.LBA(1000), trivet.LBA(0), 0
	for range 400 {
		from, n, _ := s.note(lba, 4, limit)
		if n > 0 {
			if ahead != 0 {
				require.Equal(t, ahead, from, "without a gap or an overlap")
			}
			ahead = from + trivet.LBA(n)
		}
		lba += 4
		if ahead > 0 {
			require.GreaterOrEqual(t, ahead, lba-4)
			most = max(most, int(ahead-lba))
		}
	}
	require.Equal(t, limit, most)
	r := rand.New(rand.NewPCG(1, 1))
	for range 10_000 {
		_, n, _ := s.note(trivet.LBA(1<<30+r.Uint64N(1<<30)), 4, limit)
		require.Zero(t, n, "random reads bring nothing along")
	}
	// Two readers side by side are two runs.
	brought := 0
	for i := range trivet.LBA(100) {
		for _, base := range []trivet.LBA{1 << 40, 1 << 41} {
			_, n, _ := s.note(base+4*i, 4, limit)
			brought += n
		}
	}
	require.Greater(t, brought, 800)
}

// TestPace: writers meet the speed of the device smoothly: the delay grows with the fill, and a writer that is faster
// settles below the limit.
func TestPace(t *testing.T) {
	t.Parallel()
	const limit = 1000
	p := pacer{}
	require.Zero(t, p.delay(0, 16, limit/2, limit))
	last := time.Duration(0)
	for unwritten := limit / 2; unwritten <= limit; unwritten += 50 {
		p := pacer{perBlock: float64(100 * time.Microsecond)}
		p.delay(0, 16, unwritten, limit)
		d := p.delay(0, 16, unwritten, limit)
		require.GreaterOrEqual(t, d, last, "at %d", unwritten)
		last = d
	}
	// A device of 10 000 blocks/s, and a writer that would do a hundred times as much.
	p = pacer{}
	p.done(0, 1600*time.Microsecond, 16) // before that nothing is known, and the table itself is the limit
	now, dirty, drained := 2*time.Millisecond, 0, 0.0
	for range 20_000 {
		wait := max(p.delay(now, 16, dirty, limit), 10*time.Microsecond)
		drained += wait.Seconds() * 10_000
		for drained >= 16 && dirty >= 16 {
			drained, dirty = drained-16, dirty-16
			p.done(now, now+1600*time.Microsecond, 16)
		}
		now += wait
		dirty += 16
		require.Less(t, dirty, limit, "at %v", now)
	}
	require.InDelta(t, 750, dirty, 150, "three quarters of the limit")
}

func TestPool(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	p := NewPool(64 * mib)
	require.EqualValues(t, 40*mib, p.Ask(1, 40*mib, 50))
	require.EqualValues(t, 24*mib, p.Ask(2, 64*mib, 50), "no more than is free")
	require.EqualValues(t, 32*mib, p.Ask(1, 40*mib, 50), "each a half")
	require.EqualValues(t, 32*mib, p.Ask(2, 64*mib, 50))
	require.EqualValues(t, 8*mib, p.Ask(1, 8*mib, 50), "who wants less")
	require.EqualValues(t, 56*mib, p.Ask(2, 64*mib, 50), "leaves the rest to others")
	require.EqualValues(t, 0, p.Ask(3, 64*mib, 150))
	p.Leave(1)
	require.EqualValues(t, 16*mib, p.Ask(2, 64*mib, 50), "a quarter by weight")
	require.EqualValues(t, 48*mib, p.Ask(3, 64*mib, 150))
	p.Leave(2)
	require.EqualValues(t, 64*mib, p.Ask(3, 64*mib, 150))
	require.EqualValues(t, 0, NewPool(0).Ask(1, mib, 1))
}
