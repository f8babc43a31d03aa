// Package blockdev shows a trivet.Device as a kernel block device, by one of several transports
// (transport.go), and serves Devices to NBD clients.
//
// What it guarantees:
//   - No page cache below the block device's own: the loop device and the file both use direct
//     I/O, and pages are dropped at attach and detach (H30).
//   - fsync and FUA become Flush; discards become Discard; explicit zeroing becomes WriteZeroes.
//   - A request may wait in the Device for minutes; others go on meanwhile.
//   - Once the Device is fenced, every request fails with EIO.
//   - Attach records what it is about to make, so Cleanup can undo it after a SIGKILL, or Resume go on
//     with it: then whoever uses the device has seen a pause and nothing else (resume.go).
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

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node/keeper"
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

	// Kind of the kernel device; zero = KindAuto.
	Kind Kind

	// Keeper holds what the kernel would take away with this process; the caller closes it after the last
	// Detach or Release. Nil: a device of KindFUSE does not outlive the process.
	Keeper *keeper.Client

	// Shared: another node may write the volume beside this one. What an earlier process had begun to write is then
	// not written again by Resume, over what the other node has written since, but fails with EIO (H39). KindAuto takes
	// a kind that can tell such requests, if there is a Keeper.
	Shared bool

	// Buffers that this attachment shares with the others of the node; nil = it has all it can use itself.
	Buffers *Buffers

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
	if _, err := ParseKind(string(c.Kind)); err != nil {
		return fmt.Errorf("blockdev config: %w", err)
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
	dev    kernelDev
	device trivet.Device
	folder *folder
	shared bool
	log    *slog.Logger

	mu     sync.Mutex
	ending *ending // the Detach or Release under way
	closed bool    // nothing is left, or nothing that is ours
}

// Attach shows cfg.Device as a block device; Path tells which. It returns ErrInUse if an
// attachment of that name exists, in this process or another, and ErrUnavailable if the machine has no
// kernel device of cfg.Kind. If a dead process left one, its remains are removed first, as Cleanup
// does. On error nothing is left behind.
func Attach(ctx context.Context, cfg Config) (*Attachment, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	t, err := choose(cfg.Kind, preferenceFor(&cfg))
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", cfg.Name, err)
	}
	path, err := attachmentPath(cfg.RunDir, cfg.Name)
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", cfg.Name, err)
	}
	dir, err := lockFolder(path, true)
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", cfg.Name, err)
	}
	s := newSite(cfg, dir)
	if err := s.clean(ctx); err != nil {
		dir.unlock()
		return nil, fmt.Errorf("attach %s: remove what a dead process left: %w", cfg.Name, err)
	}
	dev, err := t.attach(ctx, s)
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", cfg.Name, errors.Join(err, dir.remove()))
	}
	s.log.Info("attached", "device", dev.path(), "size", cfg.Device.Size())
	return newAttachment(s, dev), nil
}

func newAttachment(s *site, dev kernelDev) *Attachment {
	return &Attachment{name: s.name, dev: dev, device: s.device, folder: s.folder, shared: s.shared, log: s.log}
}

func newSite(cfg Config, dir *folder) *site {
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &site{
		name: cfg.Name, device: cfg.Device, folder: dir, keeper: cfg.Keeper, shared: cfg.Shared, buffers: cfg.Buffers,
		log: log.With("component", "blockdev", "volume", cfg.Name),
	}
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

// Path returns the block device, such as /dev/loop3. After Detach another may get it.
func (a *Attachment) Path() string { return a.dev.path() }

// Err returns nil while the attachment works. It returns why once it is dead, for good: ErrFenced, or
// that the connection to the kernel was cut. A dead attachment answers EIO; unmount what is
// mounted on it, expect to have lost what was not fsynced, and Detach. After Detach: ErrClosed.
func (a *Attachment) Err() error {
	if err := a.dev.err(); err != nil {
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
	if err := a.dev.grow(ctx); err != nil {
		return fmt.Errorf("grow %s: %w", a.name, err)
	}
	return nil
}
