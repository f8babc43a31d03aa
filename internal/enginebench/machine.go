package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// cost is what a piece of work took.
type cost struct {
	blocks  int64
	wall    time.Duration
	cpu     time.Duration
	mallocs uint64
}

func costNow() (cost, error) {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return cost{}, err
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return cost{
		wall: time.Duration(time.Now().UnixNano()), cpu: time.Duration(u.Utime.Nano() + u.Stime.Nano()),
		mallocs: m.Mallocs,
	}, nil
}

func (c cost) since(b cost) cost {
	return cost{blocks: c.blocks, wall: c.wall - b.wall, cpu: c.cpu - b.cpu, mallocs: c.mallocs - b.mallocs}
}

// readBytes is what this process has had read from disks so far.
func readBytes() (int64, error) {
	b, err := os.ReadFile("/proc/self/io")
	if err != nil {
		return 0, err
	}
	return parseReadBytes(b)
}

func parseReadBytes(b []byte) (int64, error) {
	for line := range bytes.Lines(b) {
		if s, ok := strings.CutPrefix(string(line), "read_bytes:"); ok {
			return strconv.ParseInt(strings.TrimSpace(s), 10, 64)
		}
	}
	return 0, errors.New("/proc/self/io has no read_bytes")
}

// fadviseDontNeed is POSIX_FADV_DONTNEED.
const fadviseDontNeed = 4

// forget drops the files of a directory from the page cache.
func forget(dir string) error {
	return filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		err = f.Sync() // dirty pages stay
		if _, _, errno := syscall.Syscall6(syscall.SYS_FADVISE64, f.Fd(), 0, 0, fadviseDontNeed, 0, 0); errno != 0 {
			err = errors.Join(err, &os.PathError{Op: "fadvise", Path: path, Err: errno})
		}
		return errors.Join(err, f.Close())
	})
}

// checkRoom returns an error when the filesystem of dir has less room than need, in bytes.
func checkRoom(dir string, need int64) error {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	if free := int64(st.Bavail) * st.Bsize; free < need {
		return fmt.Errorf("%s has %d MiB free, and %d MiB are needed: choose another -dir, or a smaller -mib",
			dir, free>>20, need>>20)
	}
	return nil
}

// directFile opens a file past the page cache, where the filesystem takes that.
func directFile(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_DIRECT|flags, 0o600)
	if errors.Is(err, syscall.EINVAL) {
		return os.OpenFile(path, os.O_RDWR|flags, 0o600)
	}
	return f, err
}
