package trivet

import "context"

// Run is a stretch of a Device that is alike: blocks that hold data, or blocks that do not and so
// read as zeroes.
type Run struct {
	LenBytes  int64 // a multiple of BlockSize, never zero
	Allocated bool
}

// Allocator is implemented by a Device that can tell which of its blocks hold data. It is optional:
// who asks must take everything for data when a Device does not implement it, and a stage of the data
// path that holds blocks of its own answers for these too.
type Allocator interface {
	// Allocated describes the whole blocks [off, off+n), which must be in range, by runs that follow
	// each other from off on. It fills runs and returns how many it used, at least one; they may end
	// before off+n, so the caller asks again from there, but never after. A block that holds data is
	// never called free; one that holds none may be called allocated. Errors as ReadAt.
	Allocated(ctx context.Context, off, n int64, runs []Run) (int, error)
}

// AllocatedOf asks d which of its blocks hold data, as Allocator says; everything does when d cannot
// tell. A stage of the data path that holds no blocks of its own passes the question on with it.
// ErrInvalid, ErrOutOfRange: as CheckRange. REQUIRES: runs is not empty, n is not zero.
func AllocatedOf(ctx context.Context, d Device, off, n int64, runs []Run) (int, error) {
	if a, ok := d.(Allocator); ok {
		return a.Allocated(ctx, off, n, runs)
	}
	if err := CheckRange(off, n, d.Size()); err != nil {
		return 0, err
	}
	runs[0] = Run{LenBytes: n, Allocated: true}
	return 1, nil
}
