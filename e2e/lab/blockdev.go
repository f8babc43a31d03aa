package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Loop devices and FUSE connections belong to the machine, not to a namespace: what a driver in a pod
// made outlives its node. A loop device whose file is served by a FUSE server that is stuck or half
// dead hangs everybody who touches it, and the server's own threads with it, so that it cannot even be
// killed. Hence the order: abort the FUSE connections, which turns every waiting request into an
// error, then kill, then free the loop devices. Nothing here opens, stats or lists such a file.

const (
	loopClrFD    = 0x4C01 // LOOP_CLR_FD, linux/loop.h
	loopFreeWait = 20 * time.Second
)

// loopsInUse returns the numbers of the loop devices that have a file.
func loopsInUse() ([]int, error) {
	paths, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, fmt.Errorf("list loop devices: %w", err)
	}
	var numbers []int
	for _, p := range paths {
		if n, err := strconv.Atoi(strings.TrimPrefix(strings.Split(p, "/")[3], "loop")); err == nil {
			numbers = append(numbers, n)
		}
	}
	return numbers, nil
}

// backingFile is the kernel's name of the file of a loop device, as seen by whoever set it up; empty
// when it has none. Reading it touches neither the device nor the file.
func backingFile(number int) string {
	text, err := os.ReadFile(fmt.Sprintf("/sys/block/loop%d/loop/backing_file", number))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// nodePlaces are where in a node loop devices have their files: those of Trivet and those that kubelet
// makes for volumes in block mode.
var nodePlaces = []string{"/run/trivet/", "/var/lib/kubelet/", "/var/lib/trivet/"}

// findDevices adds to the state the loop devices and FUSE connections that the nodes have made. It
// reads the mounts of the nodes' processes, so it finds most while these live, and only what the
// names of backing files tell afterwards.
func (s *state) findDevices(dir string) error {
	hostMounts, err := readMounts("self")
	if err != nil {
		return err
	}
	hostFuse, hostPoints := map[uint64]bool{}, map[string]bool{}
	for _, m := range hostMounts {
		hostPoints[m.point] = true
		if isFuse(m) {
			hostFuse[m.minor] = true
		}
	}
	mounted, err := s.nodeMounts()
	if err != nil {
		return err
	}
	loops, err := loopsInUse()
	if err != nil {
		return err
	}
	inNode := map[int]bool{}
	for _, m := range mounted {
		if isFuse(m) && !hostFuse[m.minor] && !slices.Contains(s.FuseOurs, m.minor) {
			s.FuseOurs = append(s.FuseOurs, m.minor)
		}
		if m.major == loopMajor {
			inNode[int(m.minor)] = true
		}
	}
	for _, n := range loops {
		named := strings.HasPrefix(backingFile(n), dir+"/") || inNodePlace(backingFile(n), hostPoints)
		if (named || inNode[n]) && !slices.Contains(s.LoopsOld, n) && !slices.Contains(s.LoopsOurs, n) {
			s.LoopsOurs = append(s.LoopsOurs, n)
		}
	}
	return nil
}

// inNodePlace says whether the name of a loop device's file can only be one of a node. The kernel
// writes / for a file whose mount namespace is gone: that of a node whose init was killed. No regular
// file has this name otherwise, except one that was unmounted lazily; it is of no use to anyone either.
func inNodePlace(file string, hostPoints map[string]bool) bool {
	if file == "/" {
		return true
	}
	return !hostPoints[file] && slices.ContainsFunc(nodePlaces, func(place string) bool {
		return strings.HasPrefix(file, place)
	})
}

const loopMajor = 7 // Documentation/admin-guide/devices.txt

func isFuse(m mount) bool {
	return m.kind == "fuse" || strings.HasPrefix(m.kind, "fuse.") || m.kind == "fuseblk"
}

// nodeMounts returns the mounts of every mount namespace in the nodes.
func (s *state) nodeMounts() ([]mount, error) {
	inits := map[int]bool{}
	for _, n := range s.Nodes {
		if n.Init.alive() {
			inits[n.Init.PID] = true
		}
	}
	if len(inits) == 0 {
		return nil, nil
	}
	pids, err := allPIDs()
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	var all []mount
	for _, pid := range pids {
		ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
		if err != nil || seen[ns] || !descendsFromAny(pid, inits) {
			continue
		}
		seen[ns] = true
		if mounts, err := readMounts(strconv.Itoa(pid)); err == nil { // else it ended meanwhile
			all = append(all, mounts...)
		}
	}
	return all, nil
}

// abortFuse aborts FUSE connections by the kernel's control filesystem, mounted for the moment. A
// connection that is gone is no error.
func abortFuse(dir string, connections []uint64) error {
	if len(connections) == 0 {
		return nil
	}
	at := filepath.Join(dir, "fusectl")
	if err := os.MkdirAll(at, 0o700); err != nil {
		return fmt.Errorf("abort FUSE connections: %w", err)
	}
	if err := syscall.Mount("fusectl", at, "fusectl", 0, ""); err != nil {
		return fmt.Errorf("abort FUSE connections: mount fusectl: %w", err)
	}
	var errs []error
	for _, n := range connections {
		err := os.WriteFile(filepath.Join(at, strconv.FormatUint(n, 10), "abort"), []byte("1"), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("abort FUSE connection %d: %w", n, err))
		}
	}
	if err := syscall.Unmount(at, 0); err != nil {
		errs = append(errs, fmt.Errorf("abort FUSE connections: unmount fusectl: %w", err))
	}
	return errors.Join(append(errs, os.Remove(at))...)
}

// freeLoops takes the file from each loop device and waits until the kernel has let it go. Each round
// tries them all: kubelet puts a loop device of its own over the volume of a pod in block mode, and the
// lower one is not free before the upper is.
func freeLoops(ctx context.Context, numbers []int) error {
	ctx, cancel := context.WithTimeout(ctx, loopFreeWait)
	defer cancel()
	return until(ctx, "the loop devices are free", func(ctx context.Context) (bool, error) {
		var errs []error
		free := true
		for _, n := range numbers {
			if backingFile(n) != "" {
				free = false
				errs = append(errs, clearLoop(ctx, n))
			}
		}
		return free, errors.Join(errs...)
	})
}

// clearLoop runs in a goroutine that it may leave behind: opening a loop device that hangs cannot be
// interrupted, and a program that says so is better than one that hangs as well.
func clearLoop(ctx context.Context, number int) error {
	done := make(chan error, 1)
	go func() {
		f, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", number), os.O_RDONLY, 0)
		if err != nil {
			done <- err
			return
		}
		defer f.Close()
		if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), loopClrFD, 0); errno != 0 && errno != syscall.ENXIO {
			done <- fmt.Errorf("free /dev/loop%d: %w", number, errno)
			return
		}
		done <- nil
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("free /dev/loop%d: it hangs: %w", number, ctx.Err())
	}
}
