package blockdev

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// errnoOf says which errno the kernel, or an NBD client, sees. The first match wins. None of
// the values may be ENOSYS or EOPNOTSUPP: on those the kernel stops asking for good.
var errnoOf = []struct {
	err   error
	errno unix.Errno
}{
	{trivet.ErrFenced, unix.EIO}, // first: whatever else went wrong, the volume is not ours any more
	{trivet.ErrCorrupt, unix.EIO},
	{trivet.ErrNoSpace, unix.ENOSPC},
	{trivet.ErrInvalid, unix.EINVAL},
	{trivet.ErrOutOfRange, unix.EINVAL},
	{trivet.ErrNotFound, unix.ENODEV},
	{trivet.ErrInUse, unix.EIO},
	{trivet.ErrPending, unix.EIO},
	{trivet.ErrNotLeader, unix.EIO},
	{trivet.ErrUnavailable, unix.EIO},
	{trivet.ErrClosed, unix.EIO},
}

// toErrno is the only place where an error of a Device becomes an errno; wrapped errors match
// too. Nil is 0; anything unknown, ended contexts included, is EIO.
func toErrno(err error) unix.Errno {
	if err == nil {
		return 0
	}
	for _, c := range errnoOf {
		if errors.Is(err, c.err) {
			return c.errno
		}
	}
	return unix.EIO
}
