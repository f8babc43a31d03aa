package overlay

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/faultdev"
)

// crashSpan is what of the device TestKilledAtEachWrite writes.
const crashSpan = 24 * trivet.BlockSize

// TestKilledAtEachWrite takes what a SIGKILL would leave before a write to the file, and half-way through it, and
// goes on with that: every write that was acknowledged is there, and the one under way whole or not at all. So it is
// after further writes and another restart.
func TestKilledAtEachWrite(t *testing.T) {
	t.Parallel()
	for seed := range uint64(6) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewPCG(seed, 1))
			cfg := Config{
				Path: filepath.Join(t.TempDir(), "x"), Volume: 7, Next: faultdev.NewMem(1 << 20), Memory: NewMemory(64 << 20),
			}
			d, err := Create(cfg)
			require.NoError(t, err)
			acked := make([]byte, crashSpan)
			var next []byte // what is to be seen once the write under way counts
			killedN := 0
			d.step = func(b []byte, at int64) {
				if rng.IntN(3) > 0 {
					return
				}
				killedN++
				requireSurvives(t, cfg, rng, acked, next, nil, 0)
				if len(b) == trivet.BlockSize { // what is shorter does not fall apart
					requireSurvives(t, cfg, rng, acked, next, b[:len(b)/2], at)
				}
			}
			for range 60 {
				n := 1 + rng.IntN(4)
				at := rng.IntN(crashSpan/trivet.BlockSize-n) * trivet.BlockSize
				p := make([]byte, n*trivet.BlockSize)
				for i := range n {
					copy(p[i*trivet.BlockSize:][:trivet.BlockSize], bytes.Repeat([]byte{byte(1 + rng.IntN(255))}, trivet.BlockSize))
				}
				next = bytes.Clone(acked)
				copy(next[at:], p)
				require.NoError(t, d.WriteAt(t.Context(), p, int64(at)))
				acked = next
			}
			require.Greater(t, killedN, 50)
			require.NoError(t, d.Remove())
		})
	}
}

// requireSurvives opens a copy of the file, in which half of a write more is done, as another process would.
func requireSurvives(t *testing.T, cfg Config, rng *rand.Rand, acked, next, half []byte, at int64) {
	t.Helper()
	left, err := os.ReadFile(cfg.Path)
	require.NoError(t, err)
	copy(left[at:], half)
	cfg.Path += ".left"
	require.NoError(t, os.WriteFile(cfg.Path, left, 0o600))
	d, err := Open(cfg)
	require.NoError(t, err)
	got := make([]byte, crashSpan)
	require.NoError(t, d.ReadAt(t.Context(), got, 0))
	require.True(t, bytes.Equal(got, acked) || bytes.Equal(got, next), "an acknowledged write is lost, or another is torn")
	for range 3 { // and what was never acknowledged does not come back
		at := rng.IntN(crashSpan/trivet.BlockSize) * trivet.BlockSize
		p := bytes.Repeat([]byte{byte(1 + rng.IntN(255))}, trivet.BlockSize)
		require.NoError(t, d.WriteAt(t.Context(), p, int64(at)))
		copy(got[at:], p)
		require.NoError(t, d.Close())
		d, err = Open(cfg)
		require.NoError(t, err)
		again := make([]byte, crashSpan)
		require.NoError(t, d.ReadAt(t.Context(), again, 0))
		require.True(t, bytes.Equal(got, again))
	}
	require.NoError(t, d.Remove())
}

// TestFailedWriteIsTheLast: what it left in the file must never be committed by a later one.
func TestFailedWriteIsTheLast(t *testing.T) {
	t.Parallel()
	cfg := Config{
		Path: filepath.Join(t.TempDir(), "x"), Volume: 7, Next: faultdev.NewMem(1 << 20), Memory: NewMemory(4 << 20),
	}
	d, err := Create(cfg)
	require.NoError(t, err)
	p := bytes.Repeat([]byte{'a'}, 2*trivet.BlockSize)
	require.NoError(t, d.WriteAt(t.Context(), p, 0))
	rw := d.f
	ro, err := os.Open(cfg.Path)
	require.NoError(t, err)
	n := 0
	d.step = func([]byte, int64) {
		if n++; n == 4 { // the head of the second block
			d.f = ro
		}
	}
	require.Error(t, d.WriteAt(t.Context(), bytes.Repeat([]byte{'b'}, 2*trivet.BlockSize), 0))
	d.f, d.step = rw, nil
	require.NoError(t, ro.Close())
	require.Error(t, d.WriteAt(t.Context(), p[:trivet.BlockSize], 8*trivet.BlockSize))
	require.NoError(t, d.Close())
	d, err = Open(cfg)
	require.NoError(t, err)
	got := make([]byte, len(p))
	require.NoError(t, d.ReadAt(t.Context(), got, 0))
	require.Equal(t, p, got)
	require.NoError(t, d.Remove())
}

// FuzzOpen: whatever is in the file, it is opened or refused, and what is opened can be read and written.
func FuzzOpen(f *testing.F) {
	cfg := Config{Volume: 7, Next: faultdev.NewMem(1 << 20), Memory: NewMemory(4 << 20)}
	cfg.Path = filepath.Join(f.TempDir(), "x")
	d, err := Create(cfg)
	require.NoError(f, err)
	require.NoError(f, d.WriteAt(f.Context(), make([]byte, 3*trivet.BlockSize), 0))
	require.NoError(f, d.Close())
	good, err := os.ReadFile(cfg.Path)
	require.NoError(f, err)
	f.Add(good[:2*pageBytes], uint32(0), byte(0))
	f.Add(good[:2*pageBytes], uint32(pageBytes), byte(1))
	f.Fuzz(func(t *testing.T, b []byte, at uint32, with byte) {
		cfg := cfg
		cfg.Path, cfg.Memory = filepath.Join(t.TempDir(), "x"), NewMemory(4<<20)
		whole := append(bytes.Clone(b), make([]byte, max(len(good)-len(b), 0))...)
		whole[int(at)%len(whole)] ^= with
		require.NoError(t, os.WriteFile(cfg.Path, whole, 0o600))
		d, err := Open(cfg)
		if err != nil {
			require.Zero(t, cfg.Memory.UsedBytes())
			return
		}
		p := bytes.Repeat([]byte{'x'}, trivet.BlockSize)
		require.NoError(t, d.WriteAt(t.Context(), p, 0))
		got := make([]byte, trivet.BlockSize)
		require.NoError(t, d.ReadAt(t.Context(), got, 0))
		require.Equal(t, p, got)
		require.NoError(t, d.Remove())
	})
}

// TestFormat: the bytes of version 1.
func TestFormat(t *testing.T) {
	t.Parallel()
	b := encodeHeader(7)
	require.Equal(t, []byte("TRVTOVL1\x01\x00\x00\x00"), b[:12])
	require.Equal(t, "idH\xe0\x07\x00\x00\x00\x00\x00\x00\x00", string(b[12:24]))
	var h [headBytes]byte
	head{seq: 2, lba: 3, crc: 4}.encode(h[:])
	require.Equal(t, "\x02\x00\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00\x04\x00\x00\x00", string(h[:20]))
	got, err := decodeHead(h[:])
	require.NoError(t, err)
	require.Equal(t, head{seq: 2, lba: 3, crc: 4}, got)
	require.Equal(t, int64(4096+64), headAt(1))
	require.Equal(t, int64(4096+65*4096+2*4096), dataAt(65))
}
