package trivet

import "errors"

// The sentinel errors. Packages wrap them with the operation and the names involved; callers
// test with errors.Is. driver/errors.go and node/blockdev/errno.go translate them, and nothing
// else does.
var (
	// ErrNotFound: the named thing does not exist. Check the name; a delete may treat it as done.
	ErrNotFound = errors.New("not found")

	// ErrExists: the name is taken by a thing with other parameters. Choose another name or ask
	// for the same parameters.
	ErrExists = errors.New("already exists")

	// ErrInUse: the volume is held by another node or still attached. Detach it there first; the
	// message names the holder.
	ErrInUse = errors.New("in use")

	// ErrFenced: a newer attachment owns the volume. Stop for good: drop unwritten data, never
	// retry with the same epoch.
	ErrFenced = errors.New("fenced")

	// ErrNotLeader: this replica does not lead its group. Ask the leader; nothing was done.
	ErrNotLeader = errors.New("not leader")

	// ErrUnavailable: no quorum, no leader, or no answer in time. The outcome is unknown; the same
	// request may be sent again.
	ErrUnavailable = errors.New("unavailable")

	// ErrPending: another operation on the same thing is under way. Try again later.
	ErrPending = errors.New("operation pending")

	// ErrNoSpace: no disk has room, or too few nodes can take a replica. Add disks, or delete.
	ErrNoSpace = errors.New("no space left")

	// ErrOutOfRange: offset, length or size lies outside what the thing has. Correct the request.
	ErrOutOfRange = errors.New("out of range")

	// ErrCorrupt: stored bytes fail their checksum or contradict each other. Never use the data;
	// repair the replica from the others.
	ErrCorrupt = errors.New("corrupt")

	// ErrClosed: the object was closed. A programming error, or a shutdown under way.
	ErrClosed = errors.New("closed")

	// ErrInvalid: the request is malformed. Correct it; it will never succeed as it is.
	ErrInvalid = errors.New("invalid argument")
)
