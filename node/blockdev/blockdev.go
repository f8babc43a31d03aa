// Package blockdev shows a trivet.Device as a kernel block device, by a FUSE filesystem of one
// regular file with a loop device on top, and serves Devices to NBD clients.
//
// What it guarantees:
//   - No page cache below the block device's own: the loop device and the file both use direct
//     I/O, and pages are dropped at attach and detach (H30).
//   - fsync and FUA become Flush; discards become Discard; explicit zeroing becomes WriteZeroes.
//   - A request may wait in the Device for minutes; others go on meanwhile.
//   - Once the Device is fenced, every request fails with EIO.
//   - Attach records what it is about to make, so Cleanup can undo it after a SIGKILL.
//
// What it leaves to its caller: mounting, and keeping the process away from its own volumes: it
// must never write to a filesystem on one, nor call sync(2), which waits for itself. Needs root
// (CAP_SYS_ADMIN), /dev/fuse and /dev/loop-control.
package blockdev

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// Config says what to attach, and how it is called.
type Config struct {
	// Name of the attachment: the volume's ID. It names a folder, so it has no '/'.
	Name string

	// RunDir is a folder on the host's filesystem for records and mount points; one sub-folder
	// each attachment. It is created if absent. Attach and Cleanup must agree on it.
	RunDir string

	// Device to show. The caller still owns it, and keeps it open until Detach has returned.
	Device trivet.Device

	// Logger; nil discards.
	Logger *slog.Logger
}

// Validate returns ErrInvalid and names the field that is wrong.
func (c Config) Validate() error {
	if err := trivet.ValidateName(c.Name); err != nil {
		return fmt.Errorf("blockdev config: name: %w", err)
	}
	if strings.HasPrefix(c.Name, ".") {
		return fmt.Errorf("blockdev config: name %q begins with a dot: %w", c.Name, trivet.ErrInvalid)
	}
	if !filepath.IsAbs(c.RunDir) {
		return fmt.Errorf("blockdev config: run dir %q is not absolute: %w", c.RunDir, trivet.ErrInvalid)
	}
	if c.Device == nil {
		return fmt.Errorf("blockdev config: device is nil: %w", trivet.ErrInvalid)
	}
	if n := c.Device.Size(); n <= 0 || n%trivet.BlockSize != 0 {
		return fmt.Errorf("blockdev config: device has %d bytes, want whole blocks: %w", n, trivet.ErrInvalid)
	}
	return nil
}

// Attachment is a Device shown as a kernel block device. Its methods may be called concurrently.
type Attachment struct {
	name   string
	point  string // of the FUSE file
	device trivet.Device
	server *fuseServer
	loop   loopDevice
	folder *folder
	log    *slog.Logger

	mu      sync.Mutex
	ending  *ending // the Detach under way, or the last one
	closed  bool    // nothing is left
	loopOff bool    // the loop device was freed
}

// Attach shows cfg.Device as a block device; Path tells which. It returns ErrInUse if an
// attachment of that name exists, in this process or another. If a dead process left one, its
// remains are removed first, as Cleanup does. On error nothing is left behind.
func Attach(ctx context.Context, cfg Config) (*Attachment, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	log = log.With("component", "blockdev", "volume", cfg.Name)
	path, err := attachmentPath(cfg.RunDir, cfg.Name)
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", cfg.Name, err)
	}
	dir, err := lockFolder(path, true)
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", cfg.Name, err)
	}
	if err := cleanFolder(ctx, dir, log); err != nil {
		dir.unlock()
		return nil, fmt.Errorf("attach %s: remove what a dead process left: %w", cfg.Name, err)
	}
	a := &Attachment{name: cfg.Name, point: dir.file(deviceName), device: cfg.Device, folder: dir, log: log}
	if err := a.open(ctx); err != nil {
		return nil, fmt.Errorf("attach %s: %w", cfg.Name, errors.Join(err, dir.remove()))
	}
	log.Info("attached", "device", a.Path(), "size", cfg.Device.Size())
	return a, nil
}

// attachmentPath makes RunDir and returns the attachment's folder, free of symbolic links, as
// the kernel will show it.
func attachmentPath(runDir, name string) (string, error) {
	if err := os.MkdirAll(runDir, 0o700); err != nil {
		return "", fmt.Errorf("make run dir: %w", err)
	}
	real, err := filepath.EvalSymlinks(runDir)
	if err != nil {
		return "", fmt.Errorf("resolve run dir: %w", err)
	}
	return filepath.Join(real, name), nil
}

// open mounts the file, serves it and configures the loop device. On error it has undone all
// but the folder.
func (a *Attachment) open(ctx context.Context) (err error) {
	_, tick, err := processState(os.Getpid())
	if err != nil {
		return err
	}
	rec := record{
		Version: recordVersion, Name: a.name, Point: a.point, Loop: noLoop,
		BootID: bootID(), PID: os.Getpid(), StartTick: tick,
	}
	if err := os.WriteFile(a.point, nil, 0o600); err != nil {
		return fmt.Errorf("make mount point: %w", err)
	}
	if err := a.folder.write(rec); err != nil {
		return err
	}
	if err := a.serve(ctx); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			// Whatever ctx says, leave nothing behind.
			err = errors.Join(err, a.endServer(context.WithoutCancel(ctx)))
		}
	}()
	file, err := openFile(a.point)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(file) }() // nothing was written
	a.loop, err = configureLoop(ctx, file, loopTag(a.name), func(number int) error {
		rec.Loop = number
		return a.folder.write(rec)
	})
	return err
}

// serve mounts the FUSE file and waits until the kernel has greeted the server.
func (a *Attachment) serve(ctx context.Context) error {
	fd, err := mountFuse(a.name, a.point)
	if err != nil {
		return err
	}
	a.server, err = newFuseServer(fd, a.device, a.log)
	if err != nil {
		return errors.Join(err, unmountFuse(ctx, a.point))
	}
	a.server.start(context.WithoutCancel(ctx)) // lives until Detach
	select {
	case <-a.server.inited: // before, a loop device would see no file, or an empty one
		return nil
	case <-a.server.ended:
		err = a.server.err()
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	return errors.Join(fmt.Errorf("wait for the kernel: %w", err), a.endServer(context.WithoutCancel(ctx)))
}

// Path returns the block device, such as /dev/loop3. After Detach another may get it.
func (a *Attachment) Path() string { return a.loop.path() }

// Err returns nil while the attachment works. It returns why once it is dead, for good: ErrFenced, or
// that the connection to the kernel was cut. A dead attachment answers EIO; unmount what is
// mounted on it, expect to have lost what was not fsynced, and Detach. After Detach: ErrClosed.
func (a *Attachment) Err() error {
	if err := a.server.err(); err != nil {
		return fmt.Errorf("attachment %s: %w", a.name, err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return fmt.Errorf("attachment %s: %w", a.name, trivet.ErrClosed)
	}
	return nil
}

// Grow tells the kernel the size that the Device has now. Call it after the Device has grown;
// calling it again is harmless. A filesystem on the device has to be grown afterwards.
func (a *Attachment) Grow(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("grow %s: %w", a.name, context.Cause(ctx))
	}
	if err := a.Err(); err != nil {
		return fmt.Errorf("grow: %w", err)
	}
	want := a.device.Size()
	file, _, err := fileSize(a.point)
	if err != nil {
		return fmt.Errorf("grow %s: %w", a.name, err)
	}
	got, err := growLoop(a.loop)
	if err != nil {
		return fmt.Errorf("grow %s: %w", a.name, err)
	}
	if got < want {
		return fmt.Errorf("grow %s: device has %d bytes, file %d, loop device %d: %w",
			a.name, want, file, got, trivet.ErrUnavailable)
	}
	a.log.Info("grown", "device", a.Path(), "size", got)
	return nil
}
