package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

const (
	// requestBytesMax is the longest read or write that the kernel or an NBD client may send.
	requestBytesMax = 1 << 20

	// smallBytes is what a small buffer holds; most requests of a filesystem fit.
	smallBytes = 16 << 10

	// headRoom lies before the payload of each buffer, for the header of a request or a reply:
	// so both are read and written in one piece, and the payload is page-aligned.
	headRoom = 4096
)

// buffer holds the payload of one request, and its header in front.
type buffer struct {
	mem   []byte // headRoom + capacity bytes
	small bool
}

// payload returns the first n bytes of the payload.
func (b *buffer) payload(n int64) []byte { return b.mem[headRoom : headRoom+n] }

// withHeader returns the last headN bytes of the head room and n bytes of payload.
func (b *buffer) withHeader(headN, n int64) []byte { return b.mem[headRoom-headN : headRoom+n] }

// bufPool is a fixed set of buffers in one arena, outside the Go heap, touched and locked in
// memory before use. The data path must not allocate: under memory pressure the kernel writes
// back to us while our own allocation waits for that writeback, for ever. And the first touch
// of a page costs more than the request.
type bufPool struct {
	arena []byte
	small chan *buffer
	large chan *buffer
}

// newBufPool maps an arena with the given numbers of buffers.
func newBufPool(smallN, largeN int) (*bufPool, error) {
	const smallStep, largeStep = headRoom + smallBytes, headRoom + requestBytesMax
	arena, err := unix.Mmap(-1, 0, smallN*smallStep+largeN*largeStep,
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map buffers: %w", err)
	}
	p := &bufPool{arena: arena, small: make(chan *buffer, smallN), large: make(chan *buffer, largeN)}
	// Both are improvements only: huge pages may be off and the memlock limit may be low.
	_ = unix.Madvise(arena, unix.MADV_HUGEPAGE)
	if unix.Mlock(arena) != nil {
		for i := 0; i < len(arena); i += os.Getpagesize() {
			arena[i] = 0
		}
	}
	for range smallN {
		p.small <- &buffer{mem: arena[:smallStep:smallStep], small: true}
		arena = arena[smallStep:]
	}
	for range largeN {
		p.large <- &buffer{mem: arena[:largeStep:largeStep]}
		arena = arena[largeStep:]
	}
	return p, nil
}

// get returns a buffer for n bytes of payload, at most requestBytesMax. It waits while all are
// in use and fails when ctx ends. The caller gives the buffer back with put.
func (p *bufPool) get(ctx context.Context, n int64) (*buffer, error) {
	if n > requestBytesMax {
		return nil, fmt.Errorf("buffer for %d bytes: most is %d: %w", n, requestBytesMax, trivet.ErrInvalid)
	}
	from := p.large
	if n <= smallBytes {
		from = p.small
	}
	select {
	case b := <-from:
		return b, nil
	default:
	}
	select {
	case b := <-from:
		return b, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for a buffer: %w", context.Cause(ctx))
	}
}

// put gives b back. Nil is a no-op.
func (p *bufPool) put(b *buffer) {
	switch {
	case b == nil:
	case b.small:
		p.small <- b
	default:
		p.large <- b
	}
}

// close frees the arena. It refuses, and leaks rather than crashes, if a buffer is still out.
func (p *bufPool) close() error {
	if len(p.small) < cap(p.small) || len(p.large) < cap(p.large) {
		return errors.New("free buffers: some are still in use")
	}
	if err := unix.Munmap(p.arena); err != nil {
		return fmt.Errorf("free buffers: %w", err)
	}
	return nil
}
