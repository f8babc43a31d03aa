// Package faultdev holds the Devices that tests stand on: Mem, a trivet.Device in memory, and
// Device, a wrapper around any trivet.Device that records requests, fails them and holds them
// back. Sub-package devtest checks any trivet.Device against a byte-array model.
//
// Nothing here is for production, but Mem keeps the whole contract of trivet.Device, so a test
// that passes over Mem may only fail over another Device if that one breaks the contract.
package faultdev

import (
	"context"
	"fmt"
	"sync"

	"github.com/trivet-csi/trivet"
)

// chunkBytes is the unit in which Mem allocates; untouched chunks cost nothing.
const chunkBytes = 256 << 10

var _ trivet.Device = (*Mem)(nil)

// Mem is a sparse Device in memory. It is safe for concurrent use. Reads and writes take effect
// at one instant, so it is stricter than the contract asks for.
type Mem struct {
	mu        sync.RWMutex
	sizeBytes int64
	chunks    map[int64][]byte // by chunk number; an absent chunk reads as zeroes
}

// NewMem returns a Mem of sizeBytes bytes that reads as zeroes. It panics unless sizeBytes is a
// positive multiple of trivet.BlockSize.
func NewMem(sizeBytes int64) *Mem {
	if sizeBytes <= 0 || sizeBytes%trivet.BlockSize != 0 {
		panic(fmt.Sprintf("faultdev: size of %d bytes is not in whole blocks", sizeBytes))
	}
	return &Mem{sizeBytes: sizeBytes, chunks: make(map[int64][]byte)}
}

// Touch allocates all of the device, so that no later write allocates. For tests that must not
// allocate while the kernel writes back to them.
func (m *Mem) Touch() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := int64(0); i*chunkBytes < m.sizeBytes; i++ {
		if m.chunks[i] == nil {
			clear(m.chunkLocked(i)) // real writes: the heap hands out pages that were never touched
		}
	}
}

// Grow enlarges the device to sizeBytes bytes; a smaller or equal size is a no-op. It panics
// unless sizeBytes is in whole blocks.
func (m *Mem) Grow(sizeBytes int64) {
	if sizeBytes%trivet.BlockSize != 0 {
		panic(fmt.Sprintf("faultdev: size of %d bytes is not in whole blocks", sizeBytes))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sizeBytes = max(m.sizeBytes, sizeBytes)
}

// ReadAt implements trivet.Device.
func (m *Mem) ReadAt(ctx context.Context, p []byte, off int64) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if err := m.checkLocked(ctx, off, int64(len(p))); err != nil {
		return fmt.Errorf("memory read: %w", err)
	}
	for len(p) > 0 {
		n := min(int64(len(p)), chunkBytes-off%chunkBytes)
		if c := m.chunks[off/chunkBytes]; c != nil {
			copy(p[:n], c[off%chunkBytes:])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+n
	}
	return nil
}

// WriteAt implements trivet.Device.
func (m *Mem) WriteAt(ctx context.Context, p []byte, off int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.checkLocked(ctx, off, int64(len(p))); err != nil {
		return fmt.Errorf("memory write: %w", err)
	}
	for len(p) > 0 {
		n := copy(m.chunkLocked(off / chunkBytes)[off%chunkBytes:], p)
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// Discard implements trivet.Device. A range that leaves the device is ErrOutOfRange.
func (m *Mem) Discard(ctx context.Context, off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if off < 0 || n < 0 {
		return fmt.Errorf("memory discard at byte %d of %d bytes: %w", off, n, trivet.ErrInvalid)
	}
	if off > m.sizeBytes || n > m.sizeBytes-off {
		return fmt.Errorf("memory discard at byte %d of %d bytes: device has %d: %w",
			off, n, m.sizeBytes, trivet.ErrOutOfRange)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("memory discard: %w", err)
	}
	first, blocksN := trivet.AlignInwards(off, n)
	m.zeroLocked(int64(first)*trivet.BlockSize, blocksN*trivet.BlockSize)
	return nil
}

// WriteZeroes implements trivet.Device.
func (m *Mem) WriteZeroes(ctx context.Context, off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.checkLocked(ctx, off, n); err != nil {
		return fmt.Errorf("memory write zeroes: %w", err)
	}
	m.zeroLocked(off, n)
	return nil
}

// Flush implements trivet.Device. Memory has no stable storage; it returns at once.
func (m *Mem) Flush(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("memory flush: %w", err)
	}
	return nil
}

// Size implements trivet.Device.
func (m *Mem) Size() int64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.sizeBytes
}

func (m *Mem) checkLocked(ctx context.Context, off, n int64) error {
	if err := trivet.CheckRange(off, n, m.sizeBytes); err != nil {
		return err //nolint:wrapcheck // the caller wraps
	}
	return ctx.Err()
}

func (m *Mem) chunkLocked(i int64) []byte {
	c := m.chunks[i]
	if c == nil {
		c = make([]byte, chunkBytes)
		m.chunks[i] = c
	}
	return c
}

// zeroLocked clears a range. A whole device may be one request, so it walks the shorter of the
// range and the chunks that exist.
func (m *Mem) zeroLocked(off, n int64) {
	first, end := off/chunkBytes, (off+n+chunkBytes-1)/chunkBytes
	if end-first <= int64(len(m.chunks)) {
		for i := first; i < end; i++ {
			m.zeroChunkLocked(i, off, n)
		}
		return
	}
	for i := range m.chunks {
		m.zeroChunkLocked(i, off, n)
	}
}

// zeroChunkLocked clears the part of [off, off+n) that lies in chunk i. The chunk stays
// allocated: see Touch.
func (m *Mem) zeroChunkLocked(i, off, n int64) {
	from, to := max(off-i*chunkBytes, 0), min(off+n-i*chunkBytes, chunkBytes)
	if c := m.chunks[i]; c != nil && from < to {
		clear(c[from:to])
	}
}
