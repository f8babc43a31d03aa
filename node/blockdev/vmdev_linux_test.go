package blockdev

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// sharedDev is a Device in a file of shared memory, so that it outlives the process that serves it, as a
// replicated volume does. It is a disk with a volatile cache: what was written reads back at once, and
// reaches the durable half with the next Flush only. Counters and the gate are in the file too.
//
//	page 0   counters and switches, u64 each
//	visible  sizeMax bytes, what ReadAt sees
//	durable  sizeMax bytes, what a power cut would leave
//	dirty    a byte each block: visible differs from durable
type sharedDev struct {
	mem      []byte
	visible  []byte
	durable  []byte
	dirty    []byte
	flushing sync.Mutex // of this process; two never serve at a time
}

// Words of page 0.
const (
	wordReads = iota
	wordWrites
	wordDiscards
	wordZeroes
	wordFlushes
	wordHold // while not zero, writes wait for ever before they take effect
	wordHeld // writes that wait
	wordSize // bytes; grows
	wordSizeMax
	wordServed // processes that have served the Device
)

var _ trivet.Device = (*sharedDev)(nil)

// makeShared makes the file. Device and file have sizeBytes and room for sizeMax.
func makeShared(t *testing.T, path string, sizeBytes, sizeMax int64) *sharedDev {
	t.Helper()
	f, err := os.Create(path)
	require.NoError(t, err)
	require.NoError(t, f.Truncate(trivet.BlockSize+2*sizeMax+sizeMax/trivet.BlockSize))
	var head [(wordSizeMax + 1) * 8]byte
	binary.NativeEndian.PutUint64(head[wordSize*8:], uint64(sizeBytes))
	binary.NativeEndian.PutUint64(head[wordSizeMax*8:], uint64(sizeMax))
	_, err = f.WriteAt(head[:], 0)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	d, err := openShared(path)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, unix.Munmap(d.mem)) }) // or the guest runs out of memory
	return d
}

// openShared maps the file, until the process ends.
func openShared(path string) (*sharedDev, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	d := &sharedDev{mem: mem}
	n := d.word(wordSizeMax).Load()
	d.visible, d.durable, d.dirty = mem[trivet.BlockSize:][:n], mem[trivet.BlockSize+n:][:n], mem[trivet.BlockSize+2*n:]
	return d, nil
}

func (d *sharedDev) word(i int) *atomic.Uint64 { return (*atomic.Uint64)(unsafe.Pointer(&d.mem[8*i])) }

// count returns a counter and sets it to zero.
func (d *sharedDev) count(i int) int { return int(d.word(i).Swap(0)) }

// forget sets all counters to zero.
func (d *sharedDev) forget() {
	for i := wordReads; i <= wordFlushes; i++ {
		d.word(i).Store(0)
	}
}

func (d *sharedDev) Size() int64 { return int64(d.word(wordSize).Load()) }

func (d *sharedDev) ReadAt(_ context.Context, p []byte, off int64) error {
	d.word(wordReads).Add(1)
	if err := trivet.CheckRange(off, int64(len(p)), d.Size()); err != nil {
		return err
	}
	copy(p, d.visible[off:])
	return nil
}

func (d *sharedDev) WriteAt(ctx context.Context, p []byte, off int64) error {
	d.word(wordWrites).Add(1)
	if err := trivet.CheckRange(off, int64(len(p)), d.Size()); err != nil {
		return err
	}
	if d.word(wordHold).Load() != 0 {
		d.word(wordHeld).Add(1)
		<-ctx.Done() // the process is about to be killed
		return context.Cause(ctx)
	}
	copy(d.visible[off:], p)
	d.touch(off, int64(len(p)))
	return nil
}

func (d *sharedDev) Discard(_ context.Context, off, n int64) error {
	d.word(wordDiscards).Add(1)
	return d.zero(off, n)
}

func (d *sharedDev) WriteZeroes(_ context.Context, off, n int64) error {
	d.word(wordZeroes).Add(1)
	return d.zero(off, n)
}

func (d *sharedDev) zero(off, n int64) error {
	if err := trivet.CheckRange(off, n, d.Size()); err != nil {
		return err
	}
	clear(d.visible[off : off+n])
	d.touch(off, n)
	return nil
}

func (d *sharedDev) touch(off, n int64) {
	for i := off / trivet.BlockSize; i < (off+n)/trivet.BlockSize; i++ {
		d.dirty[i] = 1
	}
}

func (d *sharedDev) Flush(context.Context) error {
	d.word(wordFlushes).Add(1)
	d.flushing.Lock()
	defer d.flushing.Unlock()
	for i := range d.dirty {
		if d.dirty[i] != 0 {
			d.dirty[i] = 0
			at := i * trivet.BlockSize
			copy(d.durable[at:], d.visible[at:at+trivet.BlockSize])
		}
	}
	return nil
}

// TestSharedDev tests the tests' own Device: what is not flushed is not durable, and survives a mapping.
func TestSharedDev(t *testing.T) {
	path := t.TempDir() + "/dev"
	d := makeShared(t, path, 1<<20, 2<<20)
	one := bytes.Repeat([]byte{1}, trivet.BlockSize)
	require.NoError(t, d.WriteAt(t.Context(), one, trivet.BlockSize))
	require.NotEqual(t, one, d.durable[trivet.BlockSize:2*trivet.BlockSize])
	other, err := openShared(path)
	require.NoError(t, err)
	require.NoError(t, other.Flush(t.Context()))
	require.Equal(t, one, d.durable[trivet.BlockSize:2*trivet.BlockSize])
	require.NoError(t, other.Discard(t.Context(), 0, 1<<20))
	require.Equal(t, one, d.durable[trivet.BlockSize:2*trivet.BlockSize])
	require.Equal(t, make([]byte, trivet.BlockSize), d.visible[trivet.BlockSize:2*trivet.BlockSize])
	require.Equal(t, 1, d.count(wordWrites))
	require.Zero(t, d.count(wordWrites))
	require.ErrorIs(t, d.ReadAt(t.Context(), one, 1<<20), trivet.ErrOutOfRange)
	d.word(wordSize).Store(2 << 20)
	require.NoError(t, other.ReadAt(t.Context(), one, 1<<20))
	d.word(wordHold).Store(1)
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("gone")
	cancel(gone)
	require.ErrorIs(t, d.WriteAt(ctx, one, 0), gone)
	require.Equal(t, 1, d.count(wordHeld))
}
