package overlay

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// Config says over what an overlay lies, and where it is kept.
type Config struct {
	Path   string // of the file, absolute, on a tmpfs; its folder is made if absent
	Volume trivet.VolumeID
	Next   trivet.Device // is only read
	Memory *Memory
}

// Device is an overlay. It implements trivet.Device, but for Discard, which needs as much room as WriteZeroes. It does
// not say what is allocated. It is safe for concurrent use.
type Device struct {
	next   trivet.Device
	path   string
	memory *Memory

	heldN atomic.Int64 // blocks that are here
	full  atomic.Bool  // a write was refused
	lost  atomic.Bool  // the Device below is fenced

	// mu is held over reads and writes of the file: it is memory.
	mu     sync.RWMutex
	f      *os.File // nil once closed
	held   map[trivet.LBA]place
	free   []int32 // slots
	slotN  int32
	seq    uint64 // of the last write
	broken error  // a write to the file failed; what it left must never be committed
	head   [headBytes]byte

	step func(b []byte, at int64) // in tests: called before each write to the file, where a kill may come
}

// place is where a block is.
type place struct {
	slot int32
	crc  uint32
}

var _ trivet.Device = (*Device)(nil)

// Create makes an empty overlay. A file that is there is replaced: whoever left it is not served any more.
func Create(cfg Config) (*Device, error) {
	if err := os.MkdirAll(filepath.Dir(cfg.Path), 0o700); err != nil {
		return nil, fmt.Errorf("overlay: %w", err)
	}
	if err := Remove(cfg.Path); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(cfg.Path, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("overlay: %w", err)
	}
	if _, err := f.WriteAt(encodeHeader(cfg.Volume), 0); err != nil {
		return nil, errors.Join(fmt.Errorf("overlay %s: %w", cfg.Path, err), f.Close(), Remove(cfg.Path))
	}
	return newDevice(cfg, f), nil
}

func newDevice(cfg Config, f *os.File) *Device {
	return &Device{
		next: cfg.Next, path: cfg.Path, memory: cfg.Memory, f: f, held: make(map[trivet.LBA]place),
	}
}

// Remove removes the file of an overlay that no process has open. None is success.
func Remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove overlay: %w", err)
	}
	return nil
}

// ReadAt implements trivet.Device.
func (d *Device) ReadAt(ctx context.Context, p []byte, off int64) error {
	if d.lost.Load() {
		return fencedError(off)
	}
	if d.heldN.Load() == 0 {
		return d.below(ctx, p, off)
	}
	if err := trivet.CheckRange(off, int64(len(p)), d.Size()); err != nil {
		return fmt.Errorf("read through overlay: %w", err)
	}
	// A block never leaves an overlay: what is here before the read below is here after it.
	from, to := d.missing(off, int64(len(p)))
	if from < to {
		if err := d.below(ctx, p[from:to], off+from); err != nil {
			return err
		}
	}
	return d.readHeld(p, off)
}

func (d *Device) below(ctx context.Context, p []byte, off int64) error {
	err := d.next.ReadAt(ctx, p, off)
	if err != nil && errors.Is(err, trivet.ErrFenced) {
		d.lost.Store(true)
	}
	return err //nolint:wrapcheck // a stage adds nothing
}

func fencedError(off int64) error {
	return fmt.Errorf("overlay at byte %d: the volume below is another's: %w", off, trivet.ErrFenced)
}

// missing returns the stretch of [off, off+n), counted from off, outside of which every block is here.
func (d *Device) missing(off, n int64) (from, to int64) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	from = n
	for at := int64(0); at < n; at += trivet.BlockSize {
		if _, ok := d.held[trivet.LBA((off+at)/trivet.BlockSize)]; !ok {
			from, to = min(from, at), at+trivet.BlockSize
		}
	}
	return from, to
}

// readHeld reads those blocks that are here, and leaves the rest of p alone.
func (d *Device) readHeld(p []byte, off int64) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	for at := int64(0); at < int64(len(p)); at += trivet.BlockSize {
		lba := trivet.LBA((off + at) / trivet.BlockSize)
		s, ok := d.held[lba]
		if !ok {
			continue
		}
		if d.f == nil {
			return fmt.Errorf("read block %d in overlay %s: %w", lba, d.path, trivet.ErrClosed)
		}
		b := p[at : at+trivet.BlockSize]
		if _, err := d.f.ReadAt(b, dataAt(s.slot)); err != nil {
			return fmt.Errorf("read block %d in overlay %s: %w", lba, d.path, err)
		}
		if got := crc32.Checksum(b, castagnoli); got != s.crc {
			return fmt.Errorf("block %d in overlay %s: checksum %08x, computed %08x: %w", lba, d.path, s.crc, got,
				trivet.ErrCorrupt)
		}
	}
	return nil
}

// WriteAt implements trivet.Device. ErrNoSpace: the Memory is used up; nothing has changed.
func (d *Device) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := d.check(ctx, off, int64(len(p))); err != nil {
		return fmt.Errorf("write to overlay: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	err := d.writeLocked(p, trivet.LBA(off/trivet.BlockSize), int64(len(p)/trivet.BlockSize))
	return d.refusedLocked(err)
}

var zeroes [trivet.BlockSize]byte

// WriteZeroes implements trivet.Device. Zeroes take as much room as anything else. ErrNoSpace: nothing has changed.
func (d *Device) WriteZeroes(ctx context.Context, off, n int64) error {
	if err := d.check(ctx, off, n); err != nil {
		return fmt.Errorf("write zeroes to overlay: %w", err)
	}
	return d.zero(off, n, true)
}

// Discard implements trivet.Device: it writes zeroes, so it takes room and gives none back. ErrNoSpace: nothing has
// changed, and Full does not tell of it, for nobody relies on a discard.
func (d *Device) Discard(ctx context.Context, off, n int64) error {
	size := d.Size()
	switch {
	case off < 0 || n < 0:
		return fmt.Errorf("discard %d bytes at %d in overlay: %w", n, off, trivet.ErrInvalid)
	case off > size || n > size-off:
		return fmt.Errorf("discard %d bytes at %d in overlay of %d: %w", n, off, size, trivet.ErrOutOfRange)
	}
	first, blockN := trivet.AlignInwards(off, n)
	if err := d.check(ctx, int64(first)*trivet.BlockSize, blockN*trivet.BlockSize); err != nil {
		return fmt.Errorf("discard in overlay: %w", err)
	}
	return d.zero(int64(first)*trivet.BlockSize, blockN*trivet.BlockSize, false)
}

func (d *Device) zero(off, n int64, relied bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := d.writeLocked(zeroes[:], trivet.LBA(off/trivet.BlockSize), n/trivet.BlockSize)
	if relied {
		return d.refusedLocked(err)
	}
	return err
}

// Flush implements trivet.Device. There is nothing to wait for: what an overlay holds does not outlive the machine.
func (d *Device) Flush(ctx context.Context) error {
	if d.lost.Load() {
		return fencedError(0)
	}
	return ctx.Err() //nolint:wrapcheck // says all
}

// Size implements trivet.Device.
func (d *Device) Size() int64 { return d.next.Size() }

// Full returns ErrNoSpace if a write was ever refused for want of room, in this process or before: what reads show may
// be half of what was meant. Nil of a nil Device.
func (d *Device) Full() error {
	if d == nil || !d.full.Load() {
		return nil
	}
	return fmt.Errorf("the overlay of %d bytes had no room (the overlays of this node have %d of %d): %w",
		d.Bytes(), d.memory.UsedBytes(), d.memory.MaxBytes(), trivet.ErrNoSpace)
}

// Bytes returns how much memory the overlay takes. Zero of a nil Device.
func (d *Device) Bytes() int64 {
	if d == nil {
		return 0
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	return int64(d.slotN) / chunkSlotN * chunkBytes
}

// Close leaves the overlay to the next process. What is called later is ErrClosed, as far as it needs the file. Nil of
// a nil Device, and the second time.
func (d *Device) Close() error {
	if d == nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.f == nil {
		return nil
	}
	f := d.f
	d.f = nil
	d.memory.give(int64(d.slotN) / chunkSlotN * chunkBytes)
	if err := f.Close(); err != nil {
		return fmt.Errorf("close overlay: %w", err)
	}
	return nil
}

// Remove closes the overlay and removes its file. Nil of a nil Device.
func (d *Device) Remove() error {
	if d == nil {
		return nil
	}
	return errors.Join(Remove(d.path), d.Close())
}

func (d *Device) check(ctx context.Context, off, n int64) error {
	if d.lost.Load() {
		return fencedError(off)
	}
	if err := trivet.CheckRange(off, n, d.Size()); err != nil {
		return err //nolint:wrapcheck // the caller does
	}
	return ctx.Err() //nolint:wrapcheck // the caller does
}

// refusedLocked notes that a write was refused for want of room.
func (d *Device) refusedLocked(err error) error {
	if err == nil || !errors.Is(err, trivet.ErrNoSpace) || d.f == nil || d.full.Swap(true) {
		return err
	}
	if werr := d.putLocked([]byte{1}, fullAt); werr != nil {
		d.broken = fmt.Errorf("write to overlay %s: %w", d.path, werr)
		return errors.Join(err, d.broken)
	}
	return err
}

func (d *Device) putLocked(b []byte, at int64) error {
	if d.step != nil {
		d.step(b, at)
	}
	_, err := d.f.WriteAt(b, at)
	return err //nolint:wrapcheck // the caller does
}

// writeLocked writes blockN blocks from first on: p, or p over and over if it is one block. They go to free slots, so
// that a block which was acknowledged stays whole until its successor counts, and count by one write, of the commit.
func (d *Device) writeLocked(p []byte, first trivet.LBA, blockN int64) error {
	switch {
	case d.f == nil:
		return fmt.Errorf("write to overlay %s: %w", d.path, trivet.ErrClosed)
	case d.broken != nil:
		return d.broken
	case blockN == 0:
		return nil
	}
	if err := d.growLocked(blockN - int64(len(d.free))); err != nil {
		return err
	}
	taken := d.free[len(d.free)-int(blockN):]
	d.free = d.free[:len(d.free)-int(blockN)]
	if err := d.fillLocked(p, first, taken); err != nil {
		d.broken = fmt.Errorf("write to overlay %s: %w", d.path, err)
		return d.broken
	}
	for i := range taken { // superseded slots are free now, and take the places of taken that were read
		lba := trivet.LBA(int64(first) + int64(i))
		old, ok := d.held[lba]
		d.held[lba] = place{taken[i], crc32.Checksum(blockOf(p, i), castagnoli)}
		if ok {
			d.free = append(d.free, old.slot)
		}
	}
	d.heldN.Store(int64(len(d.held)))
	return nil
}

// blockOf returns the ith block of p, or p if it is one block.
func blockOf(p []byte, i int) []byte {
	if len(p) == trivet.BlockSize {
		return p
	}
	return p[i*trivet.BlockSize:][:trivet.BlockSize]
}

// fillLocked writes data and heads into slots, and then the commit that makes them count.
func (d *Device) fillLocked(p []byte, first trivet.LBA, slots []int32) error {
	seq := d.seq + 1
	for i, slot := range slots {
		b := blockOf(p, i)
		if err := d.putLocked(b, dataAt(slot)); err != nil {
			return err
		}
		h := head{seq: seq, lba: trivet.LBA(int64(first) + int64(i)), crc: crc32.Checksum(b, castagnoli)}
		h.encode(d.head[:])
		if err := d.putLocked(d.head[:], headAt(slot)); err != nil {
			return err
		}
	}
	binary.LittleEndian.PutUint64(d.head[:], seq)
	if err := d.putLocked(d.head[:8], commitAt); err != nil {
		return err
	}
	d.seq = seq
	return nil
}

// growLocked adds slots, slotN at least, or none and returns ErrNoSpace. Their pages are there when it returns, so that
// no later write fails for want of them.
func (d *Device) growLocked(slotN int64) error {
	if slotN <= 0 {
		return nil
	}
	chunks := (slotN + chunkSlotN - 1) / chunkSlotN
	if !d.memory.take(chunks * chunkBytes) {
		return fmt.Errorf("overlay %s: %d bytes more than the %d of %d that the overlays of this node have: %w", d.path,
			chunks*chunkBytes, d.memory.UsedBytes(), d.memory.MaxBytes(), trivet.ErrNoSpace)
	}
	err := unix.Fallocate(int(d.f.Fd()), 0, chunkAt(int64(d.slotN)/chunkSlotN), chunks*chunkBytes)
	if err != nil {
		d.memory.give(chunks * chunkBytes)
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.ENOMEM) {
			return fmt.Errorf("overlay %s: its filesystem is full: %w: %w", d.path, err, trivet.ErrNoSpace)
		}
		return fmt.Errorf("overlay %s: %w", d.path, err)
	}
	end := d.slotN + int32(chunks*chunkSlotN)
	for slot := end - 1; slot >= d.slotN; slot-- {
		d.free = append(d.free, slot)
	}
	d.slotN = end
	return nil
}
