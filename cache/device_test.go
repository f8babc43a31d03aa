package cache_test

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/cache"
	"github.com/trivet-csi/trivet/internal/faultdev"
	"github.com/trivet-csi/trivet/internal/faultdev/devtest"
)

func TestContract(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name string
		set  cache.Settings
		file bool
	}{
		{"write back", cache.Settings{Mode: cache.WriteBack, Bytes: 4 << 20, ReadAheadBytes: 1 << 20}, true},
		{"write back, small", cache.Settings{Mode: cache.WriteBack, Bytes: small, ReadAheadBytes: 64 << 10}, true},
		{"write through", cache.Settings{Mode: cache.WriteThrough, Bytes: small, ReadAheadBytes: 1 << 20}, true},
		{"write around", cache.Settings{Mode: cache.WriteAround, Bytes: small}, false},
		{"two writers", cache.Settings{Mode: cache.WriteThrough, Bytes: small, NoClean: true}, false},
		{"no memory", cache.Settings{Mode: cache.WriteBack}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			next := faultdev.NewMem(8 << 20)
			cfg := config(cache.WriteBack, 0)
			cfg.Settings, cfg.Deadline = tc.set, 10*time.Millisecond
			var d *cache.Device
			var err error
			if tc.file {
				d = open(t, file(t), next, cfg)
			} else if d, err = cache.Open(next, nil, cfg); err != nil {
				require.NoError(t, err)
			}
			devtest.Run(t, d, devtest.Options{SpanBytes: 4 << 20})
			want := make([]byte, 8<<20)
			require.NoError(t, d.ReadAt(t.Context(), want, 0))
			require.NoError(t, d.Close(t.Context()))
			got := make([]byte, 8<<20)
			require.NoError(t, next.ReadAt(t.Context(), got, 0))
			require.Equal(t, want, got, "what was below after Close differs from what was read before")
		})
	}
}

// TestModel compares with an array of bytes, through switches of every setting, drains, and deaths after which a
// successor takes over.
func TestModel(t *testing.T) {
	t.Parallel()
	seeds := 20
	if testing.Short() {
		seeds = 2
	}
	for seed := range seeds {
		r := rand.New(rand.NewPCG(uint64(seed), 1))
		m := &model{t: t, r: r, path: file(t), next: faultdev.NewMem(2 << 20), mem: make([]byte, 2<<20)}
		m.cfg = config(cache.WriteBack, small)
		m.cfg.ReadAheadBytes, m.cfg.Deadline = 128<<10, time.Duration(r.IntN(20)+1)*time.Millisecond
		m.d = open(t, m.path, m.next, m.cfg)
		for i := range 1500 {
			if !m.step() {
				t.Fatalf("seed %d, step %d", seed, i)
			}
		}
		require.NoError(t, m.d.Detach(t.Context()))
		require.NoFileExists(t, m.path)
		got := make([]byte, len(m.mem))
		require.NoError(t, m.next.ReadAt(t.Context(), got, 0))
		require.Equal(t, m.mem, got, "seed %d", seed)
	}
}

type model struct {
	t    *testing.T
	r    *rand.Rand
	path string
	next *faultdev.Mem
	mem  []byte
	cfg  cache.Config
	d    *cache.Device
}

func (m *model) span(max int) (int64, int64) {
	blocksN := len(m.mem) / trivet.BlockSize
	lba := m.r.IntN(blocksN)
	n := 1 + m.r.IntN(min(max, blocksN-lba))
	return int64(lba) * trivet.BlockSize, int64(n) * trivet.BlockSize
}

func (m *model) step() bool {
	ctx := m.t.Context()
	switch k := m.r.IntN(100); {
	case k < 45:
		off, n := m.span(40)
		p := make([]byte, n)
		for i := 0; i < len(p); i += 64 {
			binary.LittleEndian.PutUint64(p[i:], m.r.Uint64())
		}
		require.NoError(m.t, m.d.WriteAt(ctx, p, off))
		copy(m.mem[off:], p)
	case k < 75:
		off, n := m.span(80)
		p := make([]byte, n)
		require.NoError(m.t, m.d.ReadAt(ctx, p, off))
		return string(p) == string(m.mem[off:off+n])
	case k < 83:
		off, n := m.span(60)
		if k%2 == 0 {
			require.NoError(m.t, m.d.Discard(ctx, off, n))
		} else {
			require.NoError(m.t, m.d.WriteZeroes(ctx, off, n))
		}
		clear(m.mem[off : off+n])
	case k < 88:
		require.NoError(m.t, m.d.Flush(ctx))
	case k < 94:
		m.cfg.Mode = cache.Modes()[m.r.IntN(3)]
		m.cfg.Eviction = cache.Evictions()[m.r.IntN(4)]
		m.cfg.Order = cache.Orders()[m.r.IntN(3)]
		m.cfg.NoClean = m.r.IntN(5) == 0
		m.cfg.Bytes = []int64{0, small, small, 2 * small}[m.r.IntN(4)]
		require.NoError(m.t, m.d.Set(ctx, m.cfg.Settings))
	case k < 97:
		release, err := m.d.Drain(ctx)
		require.NoError(m.t, err)
		got := make([]byte, len(m.mem))
		require.NoError(m.t, m.next.ReadAt(ctx, got, 0))
		same := string(got) == string(m.mem)
		release()
		return same
	default:
		require.NoError(m.t, m.d.Abandon())
		l, err := cache.Lock(m.path)
		require.NoError(m.t, err)
		require.NoError(m.t, l.Adopt(cluster, volume, m.cfg.Epoch))
		m.cfg.Epoch++
		m.d, err = cache.Open(m.next, l, m.cfg)
		require.NoError(m.t, err)
	}
	return true
}

// TestNoAllocation: a server that allocates while the kernel writes back to it may deadlock.
func TestNoAllocation(t *testing.T) {
	cfg := config(cache.WriteBack, 4<<20)
	mem := faultdev.NewMem(8 << 20)
	mem.Touch()
	d := open(t, file(t), mem, cfg)
	defer func() { require.NoError(t, d.Detach(context.Background())) }()
	ctx := context.Background()
	p := blocks(3, 4)
	i := int64(0)
	step := func(n int64) int64 { i += n; return i % 1000 * trivet.BlockSize }
	for name, f := range map[string]func(){
		"write":    func() { _ = d.WriteAt(ctx, p, step(7)) },
		"read hit": func() { _ = d.ReadAt(ctx, p, 0) },
		"read":     func() { _ = d.ReadAt(ctx, p, (1000+step(5)/trivet.BlockSize)*trivet.BlockSize) },
	} {
		f()
		if n := testing.AllocsPerRun(2000, f); n > 0 {
			t.Errorf("%s: %.2f allocations", name, n)
		}
	}
}

func TestCloseKeepsWhatIsDirty(t *testing.T) {
	t.Parallel()
	l := newLab(t, config(cache.WriteBack, small))
	l.write(5, 1, 1)
	l.disk.Inject(faultdev.Fault{Match: faultdev.OfKind(faultdev.Write), Err: trivet.ErrUnavailable})
	require.Error(t, l.Close(t.Context()))
	require.FileExists(t, l.path)
	l.disk.Heal()
	cfg := config(cache.WriteBack, small)
	d := open(t, l.path, l.disk, cfg)
	holds(t, d, 5, 1)
	require.NoError(t, d.Flush(t.Context()), "a new attachment starts well")
	holds(t, l.mem, 5, 1)
	require.NoError(t, d.Close(t.Context()))
	_, err := os.Stat(l.path)
	require.ErrorIs(t, err, os.ErrNotExist)
}

// TestNoMemoryPassesThrough: a tmpfs that is full costs speed, not the volume.
func TestNoMemoryPassesThrough(t *testing.T) {
	t.Parallel()
	cfg := config(cache.WriteBack, 1<<40) // more than any machine of ours has
	mem := faultdev.NewMem(1 << 20)
	var st unix.Statfs_t
	path := file(t)
	require.NoError(t, unix.Statfs(filepath.Dir(path), &st))
	if st.Type != unix.TMPFS_MAGIC || st.Bfree*uint64(st.Bsize) >= 1<<40 {
		t.Skip("no tmpfs, or one of more than 1 TiB")
	}
	d := open(t, path, mem, cfg)
	require.NoError(t, d.WriteAt(t.Context(), block(1), 0))
	holds(t, mem, 0, 1)
	require.NoError(t, d.Detach(t.Context()))
}

// BenchmarkCache shows the cost of the cache itself: the device below is memory.
func BenchmarkCache(b *testing.B) {
	mem := faultdev.NewMem(64 << 20)
	mem.Touch()
	cfg := config(cache.WriteBack, 32<<20)
	cfg.Deadline = 5 * time.Second
	d := open(b, file(b), mem, cfg)
	defer func() { require.NoError(b, d.Detach(context.Background())) }()
	p := block(1)
	r := rand.New(rand.NewPCG(1, 1))
	off := func() int64 { return r.Int64N(4096) * trivet.BlockSize }
	for _, bench := range []struct {
		name string
		f    func() error
	}{
		{"write", func() error { return d.WriteAt(b.Context(), p, off()) }},
		{"read", func() error { return d.ReadAt(b.Context(), p, off()) }},
		{"write and flush", func() error {
			if err := d.WriteAt(b.Context(), p, off()); err != nil {
				return err
			}
			return d.Flush(b.Context())
		}},
	} {
		b.Run(bench.name, func(b *testing.B) {
			b.SetBytes(trivet.BlockSize)
			b.ReportAllocs()
			for b.Loop() {
				if err := bench.f(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
