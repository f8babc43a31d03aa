package node

import (
	"context"
	"errors"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// ErrNotStaged says that Publish was asked for a volume that is not staged at the given path. The
// driver answers FAILED_PRECONDITION, upon which the kubelet stages again.
var ErrNotStaged = errors.New("volume is not staged")

// ErrUnsupported says that the request is well formed but asks for what the machine cannot do: an
// unknown filesystem, a mount option that is not allowed, a mkfs that is not installed. The driver
// answers FAILED_PRECONDITION ("exceeds capabilities").
var ErrUnsupported = errors.New("not supported on this node")

// StageRequest asks for a volume to be attached to this machine and, unless Block is set, formatted
// (when blank) and mounted at StagingPath.
type StageRequest struct {
	Volume      trivet.VolumeID
	StagingPath string   // absolute; the container orchestrator has made it
	FSType      string   // ext4, xfs or empty (ext4); ignored when Block
	MountFlags  []string // mount options from an allow-list; ignored when Block
	Block       bool     // raw block device: attach only
	ReadOnly    bool     // mount read-only
}

// PublishRequest asks for a staged volume to appear at TargetPath: a bind mount of the staged
// filesystem, or of the device node when Block is set.
type PublishRequest struct {
	Volume      trivet.VolumeID
	StagingPath string // as given to Stage
	TargetPath  string // absolute; made by Publish, its parent is made by the orchestrator
	FSType      string
	MountFlags  []string
	Block       bool
	ReadOnly    bool
	Mode        meta.AccessMode // SingleNodeSingleWriter allows one target at a time
}

// VolumeStats is the use of a volume. For a block volume TotalBytes alone is set.
type VolumeStats struct {
	Block          bool
	TotalBytes     int64
	UsedBytes      int64
	AvailableBytes int64 // to unprivileged users
	TotalInodes    int64
	UsedInodes     int64
	FreeInodes     int64
}

// Info is what the node tells Kubernetes about itself.
type Info struct {
	Node       trivet.NodeID
	Zone       string // empty when unknown
	Rack       string // empty when unknown
	MaxVolumes int64  // volumes that can be attached here at a time; 0 = no limit known
}

// Info returns the node's name, zone, rack and limit. Zone and rack may change: somebody may say so in the catalogue
// (meta.PlaceNode).
func (n *Node) Info() Info {
	i := Info{Node: n.cfg.ID, Zone: n.cfg.Zone, Rack: n.cfg.Rack, MaxVolumes: n.cfg.maxVolumes()}
	if said, ok := n.cfg.Catalogue.Local().Node(n.cfg.ID); ok {
		if said.ZoneSet {
			i.Zone = said.Zone
		}
		if said.RackSet {
			i.Rack = said.Rack
		}
	}
	return i
}

// Stage attaches the volume, formats it when it is blank and mounts it at StagingPath. The same
// call again returns nil.
//
// Errors: ErrInvalid for a malformed request; ErrUnsupported for a filesystem or option that this
// machine does not allow; ErrNotFound for an unknown volume; ErrInUse when the catalogue does not
// say that this node holds the volume; ErrExists when it is staged with other arguments;
// ErrPending while another call works on the same volume; ErrUnavailable when the catalogue or the
// volume's group gave no answer in time.
func (n *Node) Stage(ctx context.Context, r StageRequest) error { return n.mounts.stage(ctx, r) }

// Unstage unmounts what Stage mounted and detaches the volume. A volume that is not staged is
// success. It returns ErrInUse while the volume is published or a process uses the mount.
func (n *Node) Unstage(ctx context.Context, id trivet.VolumeID, stagingPath string) error {
	return n.mounts.unstage(ctx, id, stagingPath)
}

// Publish makes a staged volume appear at TargetPath. The same call again returns nil; the same
// target with other arguments is ErrExists; another target of a SingleNodeSingleWriter volume is
// ErrInUse; a volume that is not staged at StagingPath is ErrNotStaged.
func (n *Node) Publish(ctx context.Context, r PublishRequest) error { return n.mounts.publish(ctx, r) }

// Unpublish unmounts and removes targetPath. A target that is not published is success.
func (n *Node) Unpublish(ctx context.Context, id trivet.VolumeID, targetPath string) error {
	return n.mounts.unpublish(ctx, id, targetPath)
}

// Stats returns the use of the volume staged or published at path. ErrNotFound when the volume is
// not at path, whatever path looks like.
func (n *Node) Stats(ctx context.Context, id trivet.VolumeID, path string) (VolumeStats, error) {
	return n.mounts.stats(ctx, id, path)
}

// Expand makes the kernel device of a volume that is staged or published at path as large as the volume, and then
// the filesystem on it, in use or not. It returns the size of the device in bytes. The same again: nil.
//
// ErrNotFound: the volume is not at path. ErrOutOfRange: the volume itself is smaller than requiredBytes (0 = not
// checked): it has to be resized first. ErrInUse: a device of this kind keeps its size while it is in use.
// ErrUnsupported: the tool for the filesystem is missing. ErrPending and ErrUnavailable as in Stage.
func (n *Node) Expand(ctx context.Context, id trivet.VolumeID, path string, requiredBytes int64) (int64, error) {
	return n.mounts.expand(ctx, id, path, requiredBytes)
}
