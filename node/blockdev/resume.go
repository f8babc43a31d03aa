package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/trivet-csi/trivet"
)

// Resume goes on with the attachment of that name whose process is dead, or has called Release: its
// block device, and what is mounted on it, stay as they are; requests that were not answered are
// answered now, from cfg.Device, some of them a second time. So cfg.Device must hold every write
// that was answered, and nothing of the earlier process may reach it any more (H13, H31: the epoch of the
// earlier process is fenced). cfg.Kind is not used: the record has it. With cfg.Shared, requests that would change
// the Device a second time fail with EIO instead, from when on they are certain not to change it any more.
//
// ErrNotFound: there is no such attachment. ErrInUse: its process lives. Any other error: it cannot be
// resumed, or not now, and is as before; Leftovers.CleanOne removes it.
func Resume(ctx context.Context, cfg Config) (*Attachment, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	path, err := attachmentPath(cfg.RunDir, cfg.Name)
	if err != nil {
		return nil, fmt.Errorf("resume %s: %w", cfg.Name, err)
	}
	dir, err := lockFolder(path, false)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("resume %s: %w", cfg.Name, trivet.ErrNotFound)
	} else if err != nil {
		return nil, fmt.Errorf("resume %s: %w", cfg.Name, err)
	}
	s := newSite(cfg, dir)
	t, rec, err := s.resumable(ctx)
	if err == nil && cfg.Shared && !tells(rec.Kind) {
		err = fmt.Errorf("kernel device by %s: %w: %w", rec.Kind, errUntold, trivet.ErrClosed)
	}
	if err == nil {
		var dev kernelDev
		if dev, err = t.resume(ctx, s, rec); err == nil {
			s.log.Info("resumed", "device", dev.path(), "size", cfg.Device.Size())
			return newAttachment(s, dev), nil
		}
	}
	dir.unlock()
	return nil, fmt.Errorf("resume %s: %w", cfg.Name, err)
}

// resumable returns the record in the folder and its transport, or why it cannot be resumed.
func (s *site) resumable(ctx context.Context) (transport, record, error) {
	rec, err := s.folder.read()
	if errors.Is(err, os.ErrNotExist) {
		return nil, rec, fmt.Errorf("no record: %w", trivet.ErrNotFound)
	}
	if err != nil {
		return nil, rec, err
	}
	t := transportOf(rec.Kind)
	switch {
	case t == nil:
		return nil, rec, fmt.Errorf("kernel device by %s: not in this build: %w", rec.Kind, trivet.ErrUnavailable)
	case rec.BootID != bootID():
		return nil, rec, fmt.Errorf("record of an earlier boot: %w", trivet.ErrNotFound)
	case s.folder.corpse: // some of its threads may still answer the kernel
		return nil, rec, fmt.Errorf("process %d was killed and cannot die: %w", rec.PID, trivet.ErrInUse)
	}
	return t, rec, t.resumable(ctx, s, rec)
}

// tells reports whether devices of a kind are tellers.
func tells(k Kind) bool { return k == KindFUSE }

// errUntold is why the device of a shared volume does not outlive its process.
var errUntold = fmt.Errorf("another node may write the volume, and a device of this kind does not tell which requests "+
	"are sent again (%s does)", KindFUSE)

// Resent returns what was sent again since this process has the device. False: devices of this kind do not tell.
func (a *Attachment) Resent() (Resent, bool) {
	t, ok := a.dev.(teller)
	if !ok {
		return Resent{}, false
	}
	return t.resent(), true
}

// Survives returns nil if the device outlives this process: another can Resume it after a Release or a
// SIGKILL. If not, it says why; that may change while there is no keeper.
func (a *Attachment) Survives() error {
	if err := a.Err(); err != nil {
		return err
	}
	if _, ok := a.dev.(teller); a.shared && !ok {
		return fmt.Errorf("%s: %w: %w", a.Path(), errUntold, trivet.ErrUnavailable)
	}
	return a.dev.survives()
}

// Release stops serving the device and leaves it in place for another process to Resume: who uses it
// waits meanwhile. It takes no more requests, waits for those under way as long as ctx lasts, leaves
// the rest unanswered, and flushes the Device; a failed flush is only logged, for what was answered is
// in the Device in any case. If the device would not survive (see Survives) it returns
// ErrUnavailable and changes nothing. Afterwards the Attachment is closed.
func (a *Attachment) Release(ctx context.Context) error {
	if err := a.Survives(); err != nil {
		return fmt.Errorf("release %s: %w", a.name, err)
	}
	a.mu.Lock()
	if a.ending != nil || a.closed {
		a.mu.Unlock()
		return fmt.Errorf("release %s: it is being detached: %w", a.name, trivet.ErrPending)
	}
	e := a.endLocked(ctx, "release", a.release)
	a.mu.Unlock()
	<-e.done
	return e.err
}

func (a *Attachment) release(ctx context.Context) error {
	if err := a.dev.release(ctx); err != nil {
		return err
	}
	if err := a.device.Flush(ctx); err != nil {
		a.log.Warn("released without a flush", "err", err)
	}
	a.log.Info("released", "device", a.Path())
	a.folder.unlock()
	return nil
}
