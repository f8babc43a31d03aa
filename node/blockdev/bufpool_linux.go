package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

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
	mem   []byte   // headRoom + capacity bytes
	home  *bufPool // that it goes back to
	small bool
}

// payload returns the first n bytes of the payload.
func (b *buffer) payload(n int64) []byte { return b.mem[headRoom : headRoom+n] }

// withHeader returns the last headN bytes of the head room and n bytes of payload.
func (b *buffer) withHeader(headN, n int64) []byte { return b.mem[headRoom-headN : headRoom+n] }

// Buffers is the reserve of buffers that the attachments of a node share. Each attachment has a few of
// its own, so that those whose Device does not answer, which may hold the whole reserve, never keep
// another from going on. Without a shared reserve each attachment has as many as it can ever use.
//
// The memory, 14 MiB and 2.2 MiB for each attachment, is mapped at the first attach; the reserve stays as
// long as the process, for a device that is in use when all else is closed is served to the end. A Buffers
// is safe for concurrent use.
type Buffers struct {
	mu   sync.Mutex
	pool *bufPool // nil before the first use
}

// Own buffers of an attachment that has a reserve to fall back on: one long request being read and one
// being served, so that the reader and a worker never wait for each other.
const (
	ownSmallN = 8
	ownLargeN = 2
)

// newPool returns the buffers of one attachment, which close frees. b may be nil.
func (b *Buffers) newPool() (*bufPool, error) {
	if b == nil {
		return newBufPool(fuseSmallN, fuseLargeN)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.pool == nil {
		reserve, err := newBufPool(fuseSmallN, fuseLargeN)
		if err != nil {
			return nil, err
		}
		b.pool = reserve
	}
	own, err := newBufPool(ownSmallN, ownLargeN)
	if err != nil {
		return nil, err
	}
	own.reserve = b.pool
	return own, nil
}

// bufPool is a fixed set of buffers in one arena, outside the Go heap, touched and locked in
// memory before use. The data path must not allocate: under memory pressure the kernel writes
// back to us while our own allocation waits for that writeback, for ever. And the first touch
// of a page costs more than the request.
type bufPool struct {
	arena []byte
	small chan *buffer
	large chan *buffer

	// reserve has the buffers to take when all of the pool's own are in use; nil = none.
	reserve *bufPool
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
		p.small <- &buffer{mem: arena[:smallStep:smallStep], home: p, small: true}
		arena = arena[smallStep:]
	}
	for range largeN {
		p.large <- &buffer{mem: arena[:largeStep:largeStep], home: p}
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
	own, reserve := p.queue(n), p.reserve.queue(n)
	select {
	case b := <-own:
		return b, nil
	default:
	}
	select {
	case b := <-own:
		return b, nil
	case b := <-reserve:
		return b, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for a buffer: %w", context.Cause(ctx))
	}
}

// queue returns where the free buffers for n bytes wait; nil, on which a receive waits for ever, of no
// pool.
func (p *bufPool) queue(n int64) chan *buffer {
	switch {
	case p == nil:
		return nil
	case n <= smallBytes:
		return p.small
	}
	return p.large
}

// put gives b back to where it came from. Nil is a no-op.
func (p *bufPool) put(b *buffer) {
	switch {
	case b == nil:
	case b.small:
		b.home.small <- b
	default:
		b.home.large <- b
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
