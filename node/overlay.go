package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node/overlay"
)

// A filesystem that is attached for reading only is mounted read-only, and its kernel replays what the journal holds
// all the same: into an overlay between the kernel device and the volume, which belongs to the device and goes with it
// (decision 0039). So the mount shows what was synced, and the volume does not change.

const (
	overlaySuffix = ".overlay"
	// ReplayBytesDefault is what the overlays of a node may take together. The journal of ext4 has 256 MiB or less up to
	// a volume of 64 GiB, and 1 GiB at most (mke2fs(8)); what a replay changes is a part of it.
	ReplayBytesDefault = 256 << 20
	// ReplayBytesMin is the least that they can do with.
	ReplayBytesMin = overlay.MinBytes
)

// overlays is what a node knows about overlays: where they are, and the memory for all.
type overlays struct {
	dir    string
	memory *overlay.Memory
}

// newOverlays keeps them beside the caches, on a tmpfs, or in the run directory if there is none.
func newOverlays(cfg *Config) *overlays {
	o := &overlays{dir: cfg.CacheDir, memory: overlay.NewMemory(ReplayBytesDefault)}
	if o.dir == "" {
		o.dir = filepath.Join(cfg.RunDir, "overlays")
	}
	if cfg.ReplayBytes != 0 {
		o.memory = overlay.NewMemory(cfg.ReplayBytes)
	}
	return o
}

func (o *overlays) path(id trivet.VolumeID) string {
	return filepath.Join(o.dir, id.String()+overlaySuffix)
}

// create makes an empty overlay over next at file; nil if file is empty.
func (o *overlays) create(id trivet.VolumeID, file string, next trivet.Device) (*overlay.Device, error) {
	if file == "" {
		return nil, nil //nolint:nilnil // none
	}
	return overlay.Create(overlay.Config{Path: file, Volume: id, Next: next, Memory: o.memory})
}

// open goes on with the overlay of a kernel device that goes on; nil if file is empty. Without all of it the device
// would show another volume than before: an overlay that is gone or damaged is a final error.
func (o *overlays) open(id trivet.VolumeID, file string, next trivet.Device) (*overlay.Device, error) {
	if file == "" {
		return nil, nil //nolint:nilnil // none
	}
	d, err := overlay.Open(overlay.Config{Path: file, Volume: id, Next: next, Memory: o.memory})
	return d, finalIf(err, trivet.ErrNotFound, trivet.ErrCorrupt, trivet.ErrInvalid)
}

// tidy removes the overlays of devices that are gone: all but those of the volumes in keep.
func (o *overlays) tidy(keep []string) error {
	entries, err := os.ReadDir(o.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("overlays: %w", err)
	}
	var errs []error
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), overlaySuffix)
		if !ok || slices.Contains(keep, name) {
			continue
		}
		if _, err := trivet.ParseVolumeID(name); err == nil {
			errs = append(errs, overlay.Remove(filepath.Join(o.dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// device returns what the kernel sees.
func (at *attached) device() trivet.Device {
	if at.overlay != nil {
		return at.overlay
	}
	return at.path
}

// detach removes the kernel device, and the overlay with it. What an overlay had no room for the kernel could not write
// back. It tells once, and nobody wants it any more.
func (at *attached) detach(ctx context.Context) error {
	err := at.kernel.Detach(ctx)
	if err != nil && !errors.Is(err, trivet.ErrInUse) && at.overlay.Full() != nil {
		err = at.kernel.Detach(ctx)
	}
	return err
}

// replayError is why a filesystem is not mounted although mount(2) may have been content: what it shows would be half
// of what was synced.
type replayError struct{ error }

func (e replayError) Unwrap() error { return e.error }

// replayed returns a replayError unless the overlay of the device, if it has one, took all that the kernel wrote.
func replayed(id trivet.VolumeID, at *attached) error {
	full := at.overlay.Full()
	if full == nil {
		return nil
	}
	return replayError{fmt.Errorf("the journal of %s cannot be replayed for a reader: attach it once for writing, which "+
		"replays it for good, or give this node more by --replay-memory: %w", id, full)}
}

// OverlayBytes returns how much memory the overlay of a volume takes that is attached here to be read; false if it has
// none.
func (n *Node) OverlayBytes(id trivet.VolumeID) (int64, bool) {
	at := n.mounts.attacher.get(id)
	if at == nil || at.overlay == nil {
		return 0, false
	}
	return at.overlay.Bytes(), true
}
