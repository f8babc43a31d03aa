package driver

import (
	"errors"
	"fmt"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// filesystems are the ones that a volume can be formatted with. Empty means the node's default.
var filesystems = []string{"", "ext4", "xfs"}

// errCapability: the capability is well formed, but no volume has it. What that means depends on
// the RPC: an invalid argument, a failed precondition, or "not confirmed".
var errCapability = errors.New("unsupported volume capability")

// capability is a volume capability in our words.
type capability struct {
	block      bool
	fsType     string   // empty when block
	mountFlags []string // nil when block
	mode       meta.AccessMode
	readOnly   bool // follows from the mode
}

// capabilityOf translates c. It returns ErrInvalid when c is missing or malformed, and
// errCapability when no volume can have it.
func capabilityOf(c *csi.VolumeCapability) (capability, error) {
	var out capability
	if c == nil {
		return out, fmt.Errorf("volume_capability is missing: %w", trivet.ErrInvalid)
	}
	switch t := c.GetAccessType().(type) {
	case *csi.VolumeCapability_Block:
		out.block = true
	case *csi.VolumeCapability_Mount:
		if g := t.Mount.GetVolumeMountGroup(); g != "" {
			return out, fmt.Errorf("volume_mount_group: %w", errCapability)
		}
		out.fsType, out.mountFlags = t.Mount.GetFsType(), t.Mount.GetMountFlags()
	default:
		return out, fmt.Errorf("volume_capability: access_type is missing: %w", trivet.ErrInvalid)
	}
	var err error
	if out.mode, err = modeOf(c.GetAccessMode().GetMode()); err != nil {
		return out, err
	}
	if out.mode == meta.MultiNodeMultiWriter && !out.block {
		return out, fmt.Errorf("access mode %s of a filesystem (two nodes may write a raw block volume only): %w",
			c.GetAccessMode().GetMode(), errCapability)
	}
	out.readOnly = out.mode.Reads()
	if !slices.Contains(filesystems, out.fsType) {
		return out, fmt.Errorf("fs_type %q (ext4 and xfs are supported): %w", out.fsType, errCapability)
	}
	return out, nil
}

// modeOf translates an access mode. SINGLE_NODE_WRITER is what an orchestrator says that does not
// know the two newer modes; the specification gives it the rules of the stricter one.
func modeOf(m csi.VolumeCapability_AccessMode_Mode) (meta.AccessMode, error) {
	switch m {
	case csi.VolumeCapability_AccessMode_UNKNOWN:
		return "", fmt.Errorf("volume_capability: access_mode is missing: %w", trivet.ErrInvalid)
	case csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER,
		csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER:
		return meta.SingleNodeSingleWriter, nil
	case csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER:
		return meta.SingleNodeMultiWriter, nil
	case csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY:
		return meta.SingleNodeReader, nil
	case csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY:
		return meta.MultiNodeReader, nil
	case csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER:
		return meta.MultiNodeMultiWriter, nil
	default:
		return "", fmt.Errorf("access mode %s (one node writes a volume, or several read it): %w", m, errCapability)
	}
}

// checkCapabilities returns ErrInvalid unless there is at least one capability and a volume can
// have all of them. A volume can have any mix of them: none is decided at its creation.
func checkCapabilities(cs []*csi.VolumeCapability) error {
	if len(cs) == 0 {
		return fmt.Errorf("volume_capabilities are missing: %w", trivet.ErrInvalid)
	}
	for _, c := range cs {
		if _, err := capabilityOf(c); err != nil {
			return asInvalid(err)
		}
	}
	return nil
}

// asInvalid makes an invalid argument of errCapability, as the Controller service answers it.
func asInvalid(err error) error { return as(err, trivet.ErrInvalid) }

// asPrecondition makes a failed precondition of errCapability, as the Node service answers it.
func asPrecondition(err error) error { return as(err, errPrecondition) }

func as(err, sentinel error) error {
	if errors.Is(err, errCapability) {
		return fmt.Errorf("%w: %w", err, sentinel)
	}
	return err
}
