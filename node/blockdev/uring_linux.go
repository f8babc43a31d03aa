package blockdev

import (
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// io_uring (io_uring(7), io_uring_setup(2), io_uring_enter(2); include/uapi/linux/io_uring.h): as much
// as ublk needs, which takes commands by no other way. A ring is two queues shared with the kernel: we
// append submissions at the tail of one and take completions from the head of the other.
//
//	submission, 64 bytes, or 128 with uringSQE128:
//	  opcode u8 | flags u8 | ioprio u16 | fd i32 | cmd_op u32, pad u32 (or offset u64) | address u64 |
//	  length u32 | op flags u32 | user data u64 | 16 bytes | command, 16 bytes (80 with uringSQE128)
//	completion, 16 bytes:
//	  user data u64 | result i32 | flags u32
const (
	uringSQE128 = 1 << 10 // IORING_SETUP_SQE128

	uringOpRead = 22 // IORING_OP_READ
	uringOpCmd  = 46 // IORING_OP_URING_CMD

	uringEnterGetEvents = 1

	uringOffSQ   = 0
	uringOffSQEs = 0x10000000

	uringFeatSingleMmap = 1 << 0
	uringFeatNodrop     = 1 << 1

	uringSQEBytes  = 64
	uringCQEBytes  = 16
	uringCmdOffset = 48 // of the command in a submission
)

// uringParams is struct io_uring_params, 120 bytes.
type uringParams struct {
	sqEntries, cqEntries, flags, sqThreadCPU, sqThreadIdle, features, wqFD uint32
	resv                                                                   [3]uint32
	sq                                                                     struct {
		head, tail, ringMask, ringEntries, flags, dropped, array, resv1 uint32
		userAddr                                                        uint64
	}
	cq struct {
		head, tail, ringMask, ringEntries, overflow, cqes, flags, resv1 uint32
		userAddr                                                        uint64
	}
}

// uring is a ring. It belongs to one goroutine at a time.
type uring struct {
	fd      int
	rings   []byte // both queues
	sqes    []byte
	sqeStep uint32

	sqHead, sqTail, cqHead, cqTail *uint32 // in rings
	sqMask, cqMask                 uint32
	sqArray, cqeAt                 uint32
	pending                        uint32 // submissions that the kernel was not told of
}

// openUring makes a ring for entries submissions at once, a power of two. ErrUnavailable if the kernel or
// its administrator (kernel.io_uring_disabled) has none.
func openUring(entries, flags uint32) (*uring, error) {
	p := uringParams{flags: flags}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(entries), uintptr(unsafe.Pointer(&p)), 0)
	switch {
	case errno == unix.ENOSYS, errno == unix.EPERM:
		return nil, fmt.Errorf("io_uring is not allowed here (sysctl kernel.io_uring_disabled, seccomp): %w: %w",
			errno, trivet.ErrUnavailable)
	case errno != 0:
		return nil, fmt.Errorf("set up io_uring: %w", errno)
	}
	unix.CloseOnExec(int(fd))
	r := &uring{fd: int(fd), sqeStep: uringSQEBytes}
	if p.features&(uringFeatSingleMmap|uringFeatNodrop) != uringFeatSingleMmap|uringFeatNodrop {
		err := fmt.Errorf("io_uring features %#x: too old: %w", p.features, trivet.ErrUnavailable)
		return nil, errors.Join(err, r.close())
	}
	if flags&uringSQE128 != 0 {
		r.sqeStep *= 2
	}
	if err := r.mmap(&p); err != nil {
		return nil, errors.Join(err, r.close())
	}
	return r, nil
}

func (r *uring) mmap(p *uringParams) (err error) {
	size := max(p.sq.array+4*p.sqEntries, p.cq.cqes+uringCQEBytes*p.cqEntries)
	const prot, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_POPULATE
	if r.rings, err = unix.Mmap(r.fd, uringOffSQ, int(size), prot, flags); err != nil {
		return fmt.Errorf("map io_uring: %w", err)
	}
	if r.sqes, err = unix.Mmap(r.fd, uringOffSQEs, int(p.sqEntries*r.sqeStep), prot, flags); err != nil {
		return fmt.Errorf("map io_uring: %w", err)
	}
	r.sqHead, r.sqTail = r.word(p.sq.head), r.word(p.sq.tail)
	r.cqHead, r.cqTail = r.word(p.cq.head), r.word(p.cq.tail)
	r.sqMask, r.cqMask = *r.word(p.sq.ringMask), *r.word(p.cq.ringMask)
	r.sqArray, r.cqeAt = p.sq.array, p.cq.cqes
	return nil
}

func (r *uring) word(at uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.rings[at])) }

// close frees the ring. The kernel cancels what is under way.
func (r *uring) close() error {
	var errs []error
	for _, m := range [][]byte{r.rings, r.sqes} {
		if m != nil {
			errs = append(errs, unix.Munmap(m))
		}
	}
	errs = append(errs, unix.Close(r.fd))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close io_uring: %w", err)
	}
	return nil
}

// push appends a zeroed submission for the caller to fill before the next push or enter. Nil if the queue
// is full; enter empties it.
func (r *uring) push() []byte {
	tail := *r.sqTail // ours alone
	if tail-atomic.LoadUint32(r.sqHead) > r.sqMask {
		return nil
	}
	i := tail & r.sqMask
	*r.word(r.sqArray + 4*i) = i
	sqe := r.sqes[i*r.sqeStep : (i+1)*r.sqeStep]
	clear(sqe)
	// The kernel reads up to the tail only during enter (no SQPOLL), so the entry may be filled after this.
	atomic.StoreUint32(r.sqTail, tail+1)
	r.pending++
	return sqe
}

// enter submits what was pushed and waits for a number of completions. It returns early after a signal.
// The calling thread blocks in the kernel.
func (r *uring) enter(wait uint32) error {
	var flags uintptr
	if wait > 0 {
		flags = uringEnterGetEvents
	}
	n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(r.pending), uintptr(wait), flags, 0, 0)
	switch errno {
	case 0:
		r.pending -= uint32(n)
	case unix.EINTR, unix.EAGAIN, unix.EBUSY: // the last two: completions have to be taken first
	default:
		return fmt.Errorf("enter io_uring: %w", errno)
	}
	return nil
}

// pop takes one completion.
func (r *uring) pop() (userData uint64, result int32, ok bool) {
	head := *r.cqHead // ours alone
	if head == atomic.LoadUint32(r.cqTail) {
		return 0, 0, false
	}
	at := r.cqeAt + (head&r.cqMask)*uringCQEBytes
	userData = *(*uint64)(unsafe.Pointer(&r.rings[at]))
	result = *(*int32)(unsafe.Pointer(&r.rings[at+8]))
	atomic.StoreUint32(r.cqHead, head+1)
	return userData, result, true
}

// putCmd fills a submission with a command of a driver. The command's own bytes follow at uringCmdOffset.
func putCmd(sqe []byte, fd int, op uint32, userData uint64) {
	sqe[0] = uringOpCmd
	*(*int32)(unsafe.Pointer(&sqe[4])) = int32(fd)
	*(*uint32)(unsafe.Pointer(&sqe[8])) = op
	*(*uint64)(unsafe.Pointer(&sqe[32])) = userData
}

// putRead fills a submission with a read into memory that the garbage collector does not move: a mapping,
// or what is referenced until the completion.
func putRead(sqe []byte, fd int, to unsafe.Pointer, n uint32, userData uint64) {
	sqe[0] = uringOpRead
	*(*int32)(unsafe.Pointer(&sqe[4])) = int32(fd)
	*(*uint64)(unsafe.Pointer(&sqe[16])) = uint64(uintptr(to))
	*(*uint32)(unsafe.Pointer(&sqe[24])) = n
	*(*uint64)(unsafe.Pointer(&sqe[32])) = userData
}
