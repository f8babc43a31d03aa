package trivet

import (
	"context"
	"fmt"
)

// Device is a block device. Each stage of the data path (throttle, cache, replication) takes the
// Device below it and is a Device itself, as handlers wrap each other in net/http.
//
// Contract:
//   - Offsets and lengths are in bytes and multiples of BlockSize, else ErrInvalid; a range must lie
//     within Size, else ErrOutOfRange. Discard alone need not be aligned: it drops the whole blocks
//     within the range.
//   - ReadAt fills all of p or fails. A block never written, discarded or zeroed reads as zeroes.
//   - WriteAt returns once the write is visible to every later ReadAt. It need not be durable:
//     the Device is a disk with a volatile cache. A write of at most AtomicWriteBytes is applied
//     whole or not at all, a larger one is atomic per block.
//   - Discard gives the space back; the range then reads as zeroes. WriteZeroes has the same effect,
//     but is never a hint. Both are ordered with writes like a write.
//   - Flush is a barrier: when it returns nil, every write, discard and write-zeroes that returned
//     before the call is committed by a quorum and on stable storage. Once it failed because a
//     covered write was lost, every later Flush fails too (fsyncgate, H14).
//   - Overlapping concurrent writes have no defined order, but each block holds one of them whole.
//   - After ErrFenced every call returns ErrFenced.
//   - The caller owns p again as soon as the call returns; an implementation never keeps it.
//   - All methods may be called concurrently. ctx ends the wait, not necessarily the effect: after
//     a context error a write may still happen.
type Device interface {
	// ReadAt reads len(p) bytes at byte offset off into p.
	ReadAt(ctx context.Context, p []byte, off int64) error

	// WriteAt writes p at byte offset off.
	WriteAt(ctx context.Context, p []byte, off int64) error

	// Discard drops the whole blocks within [off, off+n) bytes.
	Discard(ctx context.Context, off, n int64) error

	// WriteZeroes makes [off, off+n) bytes read as zeroes.
	WriteZeroes(ctx context.Context, off, n int64) error

	// Flush makes every write that was acknowledged before the call durable on a quorum.
	Flush(ctx context.Context) error

	// Size returns the size in bytes, a multiple of BlockSize. It may grow, never shrink.
	Size() int64
}

// CheckRange returns ErrInvalid unless off and n are multiples of BlockSize and not negative, and
// ErrOutOfRange unless [off, off+n) lies within sizeBytes.
func CheckRange(off, n, sizeBytes int64) error {
	if off < 0 || n < 0 || off%BlockSize != 0 || n%BlockSize != 0 {
		return fmt.Errorf("range at byte %d of %d bytes: not in whole %d-byte blocks: %w", off, n, BlockSize, ErrInvalid)
	}
	if off > sizeBytes || n > sizeBytes-off {
		return fmt.Errorf("range at byte %d of %d bytes: device has %d bytes: %w", off, n, sizeBytes, ErrOutOfRange)
	}
	return nil
}

// AlignInwards returns the whole blocks within [off, off+n) bytes, as first block and count. The
// count is zero when the range holds no whole block (H18).
func AlignInwards(off, n int64) (LBA, int64) {
	first := (off + BlockSize - 1) / BlockSize
	end := (off + n) / BlockSize
	if end <= first {
		return LBA(first), 0
	}
	return LBA(first), end - first
}
