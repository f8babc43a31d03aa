// Package driver is the gRPC skin of Trivet: the Identity, Controller and Node services of the
// Container Storage Interface, specification 1.13, on one unix socket.
//
// It decides nothing about volumes. It checks requests, calls the Controller (what may happen in
// the cluster) or the Node (what happens on this machine), and translates results and errors;
// errors.go alone knows gRPC codes. An RPC method reads: validate, call, translate.
//
// There are three ways in. A node's Server offers all three services on its socket and registers them
// with the kubelet. RegisterController adds the controller service to a gRPC server that is reached
// over mutual TLS. A Proxy offers that one on a socket far from any node, for the sidecars of
// Kubernetes: each call goes to a server of the cluster.
//
// What it guarantees to the container orchestrator:
//   - A malformed request is INVALID_ARGUMENT before anything is looked up.
//   - The same request twice gives the same answer; removing what is absent succeeds.
//   - Two calls that work on the same volume at once: the second is ABORTED.
//   - An outcome that is not known is UNAVAILABLE, never a code that the orchestrator takes for
//     "nothing is in progress".
//   - Secrets, and mount flags, which may hold some, never reach the log.
//
// A volume may begin as a copy of a snapshot or of another volume, and may be larger than that; volumes grow
// while they are in use (docs/decisions/0031-copies-over-csi.md).
//
// # Topology
//
// A node reports topology.csi.trivet.dev/node and, when it has them, topology.csi.trivet.dev/zone and /rack.
// Requirements of CreateVolume steer the placement of replicas. The answer names no accessible
// topology: a volume can be attached at every node, because a node without a replica reaches it
// over the network. Naming all nodes of today instead would freeze them into the
// PersistentVolume's immutable node affinity and shut out the nodes of tomorrow. With
// WaitForFirstConsumer the scheduler's choice arrives as the first preferred segment, so a replica
// is placed there when the node has room.
//
// volume_context is empty: what a node must know of a volume can change, so it stands in the
// catalogue, and a PersistentVolume written by hand needs no more than the volume handle.
package driver

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/node"
)

const (
	schemeUnix = "unix://"

	// socketPathMax is the longest path, in bytes, of a socket: sun_path of unix(7) less its NUL,
	// less what is added to the name under which it is made.
	socketPathMax = 107 - len(socketNewPrefix) - len(socketNewSuffix)

	stopTimeoutDefault = 30 * time.Second
)

// Controller is what the driver needs of the cluster. Its methods are safe for concurrent use and
// return errors that wrap the sentinels of package trivet; controller.Controller documents them.
type Controller interface {
	CreateVolume(ctx context.Context, r controller.CreateRequest) (meta.Volume, error)
	DeleteVolume(ctx context.Context, id trivet.VolumeID) error
	Volume(ctx context.Context, id trivet.VolumeID) (meta.Volume, error)
	// Volumes is linearizable: the attacher takes its answer for the truth about attachments.
	Volumes(ctx context.Context) ([]meta.Volume, error)
	Attach(ctx context.Context, id trivet.VolumeID, node trivet.NodeID, mode meta.AccessMode,
		readOnly bool) (meta.Volume, error)
	// Detach ends the attachment of node, or of whichever node holds the volume when it is empty.
	Detach(ctx context.Context, id trivet.VolumeID, node trivet.NodeID) error
	// Capacity returns the bytes available to, and the size in bytes of the largest, new volume
	// with these parameters; an empty segment means the whole cluster.
	Capacity(ctx context.Context, params, segment map[string]string) (available, largest int64, err error)

	Modifier
	Examiner
	Snapshotter
	Expander
	GroupSnapshotter
}

// Node is what the driver needs of this machine. node.Node documents the methods.
type Node interface {
	Info() node.Info
	Stage(ctx context.Context, r node.StageRequest) error
	Unstage(ctx context.Context, id trivet.VolumeID, stagingPath string) error
	Publish(ctx context.Context, r node.PublishRequest) error
	Unpublish(ctx context.Context, id trivet.VolumeID, targetPath string) error
	Stats(ctx context.Context, id trivet.VolumeID, path string) (node.VolumeStats, error)
	Expand(ctx context.Context, id trivet.VolumeID, path string, requiredBytes int64) (int64, error)

	NodeExaminer
}

var (
	_ Controller = (*controller.Controller)(nil)
	_ Node       = (*node.Node)(nil)
)

// Config says what to serve and where.
type Config struct {
	// Endpoint is the socket: unix:// and an absolute path. Required.
	Endpoint string

	// Controller and Node do the work. Required.
	Controller Controller
	Node       Node

	// Changes tells what snapshots hold. Required.
	Changes Changes

	// Ready reports whether the catalogue is joined, so that requests can be served. Called by
	// every Probe; must not block. Required.
	Ready func() bool

	// Version is the vendor version that GetPluginInfo reports. Required.
	Version string

	// RegisterDir is the directory, absolute, in which kubelet looks for plugins to register:
	// /var/lib/kubelet/plugins_registry, unless the kubelet lives elsewhere. Kubelet must see the
	// socket of Endpoint under the same path. Empty: no registration.
	RegisterDir string

	// StopTimeout bounds how long Close waits for running calls before it cuts them off.
	// Zero means 30 s.
	StopTimeout time.Duration

	// SnapshotTopology advertises SNAPSHOT_ACCESSIBILITY_CONSTRAINTS, which is alpha and which no
	// released orchestrator uses: for conformance tests.
	SnapshotTopology bool

	// Logger receives one debug record per request and answer, secrets stripped. Nil discards.
	Logger *slog.Logger
}

// Validate returns ErrInvalid naming the first field that is missing or wrong.
func (c *Config) Validate() error {
	switch {
	case c.Controller == nil:
		return fmt.Errorf("config: Controller is nil: %w", trivet.ErrInvalid)
	case c.Node == nil:
		return fmt.Errorf("config: Node is nil: %w", trivet.ErrInvalid)
	case c.Changes == nil:
		return fmt.Errorf("config: Changes is nil: %w", trivet.ErrInvalid)
	case c.Ready == nil:
		return fmt.Errorf("config: Ready is nil: %w", trivet.ErrInvalid)
	case c.Version == "":
		return fmt.Errorf("config: Version is empty: %w", trivet.ErrInvalid)
	case c.StopTimeout < 0:
		return fmt.Errorf("config: StopTimeout %s is negative: %w", c.StopTimeout, trivet.ErrInvalid)
	}
	if _, err := socketPath(c.Endpoint); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	if c.RegisterDir != "" {
		if _, err := socketPath(registrationEndpoint(c.RegisterDir)); err != nil {
			return fmt.Errorf("config: RegisterDir: %w", err)
		}
	}
	return validateInfo(c.Node.Info())
}

// validateInfo checks what kubelet will make labels of: a bad value would let the node register
// with no topology, or not at all, long after the start.
func validateInfo(i node.Info) error {
	if err := trivet.ValidateNodeID(string(i.Node)); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	if len(i.Node) > controller.SegmentMax {
		return fmt.Errorf("config: node name %q has %d bytes; a topology value may have %d: %w",
			i.Node, len(i.Node), controller.SegmentMax, trivet.ErrInvalid)
	}
	if i.Zone != "" {
		if err := controller.ValidateSegment("config: zone", i.Zone); err != nil {
			return err
		}
	}
	if i.Rack != "" {
		if err := controller.ValidateSegment("config: rack", i.Rack); err != nil {
			return err
		}
	}
	if i.MaxVolumes < 0 {
		return fmt.Errorf("config: MaxVolumes %d is negative: %w", i.MaxVolumes, trivet.ErrInvalid)
	}
	return nil
}

// socketPath returns the path of an endpoint of the form unix:///path.
func socketPath(endpoint string) (string, error) {
	path, ok := strings.CutPrefix(endpoint, schemeUnix)
	switch {
	case !ok:
		return "", fmt.Errorf("endpoint %q: want %s and an absolute path: %w", endpoint, schemeUnix, trivet.ErrInvalid)
	case !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/":
		return "", fmt.Errorf("endpoint %q: want an absolute, clean path: %w", endpoint, trivet.ErrInvalid)
	case len(path) > socketPathMax:
		return "", fmt.Errorf("endpoint %q: path has %d bytes, at most %d are allowed: %w",
			endpoint, len(path), socketPathMax, trivet.ErrInvalid)
	}
	return path, nil
}
