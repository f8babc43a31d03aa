package segment

import (
	"errors"
	"os"
	"syscall"
)

// openDirect opens a file past the page cache: log data is written once and mostly read from our own
// cache, and a flush then has nothing of other files to write. Some filesystems refuse O_DIRECT with
// EINVAL (tmpfs before Linux 6.6); there the page cache and fdatasync do.
func openDirect(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_DIRECT|flags, fileMode)
	if errors.Is(err, syscall.EINVAL) {
		return os.OpenFile(path, os.O_RDWR|flags, fileMode)
	}
	return f, err
}

// freeBytes returns what a process without privileges may still write to the filesystem of path.
func freeBytes(path string) (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(path, &st); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return int64(st.Bavail) * st.Bsize, nil //nolint:gosec // far from it
}

// setAside has the filesystem find room for a new file in one piece. Those that cannot are not asked to.
func setAside(f *os.File, sizeBytes int64) error {
	for {
		err := syscall.Fallocate(int(f.Fd()), 0, 0, sizeBytes)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err == nil, errors.Is(err, syscall.EOPNOTSUPP):
			return nil
		default:
			return &os.PathError{Op: "fallocate", Path: f.Name(), Err: err}
		}
	}
}

func syncData(f *os.File) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var syncErr error
	err = conn.Control(func(fd uintptr) {
		for {
			if syncErr = syscall.Fdatasync(int(fd)); syncErr != syscall.EINTR { //nolint:errorlint // errno as it is
				return
			}
		}
	})
	if err == nil && syncErr != nil {
		err = &os.PathError{Op: "fdatasync", Path: f.Name(), Err: syncErr}
	}
	return err
}
