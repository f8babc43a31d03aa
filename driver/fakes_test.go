package driver_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/node"
)

const (
	thisNode  = trivet.NodeID("node-a")
	otherNode = trivet.NodeID("node-b")
	thisZone  = "zone-1"
)

// hooks let a test stand before every method of a fake: fail it, hold it up, or see its arguments.
type hooks struct {
	mu     sync.Mutex
	before map[string]func(ctx context.Context, arg any) error
}

func (h *hooks) on(method string, f func(ctx context.Context, arg any) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.before == nil {
		h.before = make(map[string]func(context.Context, any) error)
	}
	h.before[method] = f
}

func (h *hooks) fail(method string, err error) {
	h.on(method, func(context.Context, any) error { return err })
}

func (h *hooks) run(ctx context.Context, method string, arg any) error {
	h.mu.Lock()
	f := h.before[method]
	h.mu.Unlock()
	if f == nil {
		return nil
	}
	return f(ctx, arg)
}

// fakeController keeps volumes in memory by the rules of the real one.
type fakeController struct {
	hooks

	mu      sync.Mutex
	volumes map[trivet.VolumeID]*meta.Volume
	ill     map[trivet.VolumeID][]trivet.Condition
	snaps   map[trivet.SnapshotID]*meta.Snapshot
	groups  map[trivet.SnapshotGroupID]*meta.SnapshotGroup
}

func newFakeController() *fakeController {
	return &fakeController{
		volumes: make(map[trivet.VolumeID]*meta.Volume), snaps: make(map[trivet.SnapshotID]*meta.Snapshot),
		groups: make(map[trivet.SnapshotGroupID]*meta.SnapshotGroup),
	}
}

func (c *fakeController) CreateVolume(ctx context.Context, r controller.CreateRequest) (meta.Volume, error) {
	if err := c.run(ctx, "CreateVolume", r); err != nil {
		return meta.Volume{}, err
	}
	params, err := controller.ParseParams(r.Params)
	if err != nil {
		return meta.Volume{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, v := range c.volumes {
		if v.Name != r.Name {
			continue
		}
		if v.SizeBytes < r.RequiredBytes || r.LimitBytes > 0 && v.SizeBytes > r.LimitBytes ||
			v.Request != params.Fingerprint()+r.Source.String() {
			return meta.Volume{}, fmt.Errorf("create volume %q: %w", r.Name, trivet.ErrExists)
		}
		return *v, nil
	}
	size, err := c.sizeLocked(&r)
	if err != nil {
		return meta.Volume{}, err
	}
	v := &meta.Volume{
		ID: trivet.NewVolumeID(), Name: r.Name, SizeBytes: size, Phase: meta.PhaseBound,
		Request: params.Fingerprint() + r.Source.String(),
	}
	c.volumes[v.ID] = v
	return *v, nil
}

func (c *fakeController) DeleteVolume(ctx context.Context, id trivet.VolumeID) error {
	if err := c.run(ctx, "DeleteVolume", id); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	v, ok := c.volumes[id]
	if !ok {
		return fmt.Errorf("delete volume %s: %w", id, trivet.ErrNotFound)
	}
	if v.Attached != nil {
		return fmt.Errorf("delete volume %s: attached to %s: %w", id, v.Attached.Node, trivet.ErrInUse)
	}
	delete(c.volumes, id)
	return nil
}

func (c *fakeController) Volume(ctx context.Context, id trivet.VolumeID) (meta.Volume, error) {
	if err := c.run(ctx, "Volume", id); err != nil {
		return meta.Volume{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	v, ok := c.volumes[id]
	if !ok {
		return meta.Volume{}, fmt.Errorf("volume %s: %w", id, trivet.ErrNotFound)
	}
	return *v, nil
}

func (c *fakeController) Volumes(ctx context.Context) ([]meta.Volume, error) {
	if err := c.run(ctx, "Volumes", nil); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []meta.Volume
	for _, v := range c.volumes {
		out = append(out, *v)
	}
	return out, nil
}

// attachArgs is what a hook on Attach sees.
type attachArgs struct {
	volume   trivet.VolumeID
	node     trivet.NodeID
	mode     meta.AccessMode
	readOnly bool
}

func (c *fakeController) Attach(ctx context.Context, id trivet.VolumeID, n trivet.NodeID, mode meta.AccessMode,
	readOnly bool,
) (meta.Volume, error) {
	if err := c.run(ctx, "Attach", attachArgs{id, n, mode, readOnly}); err != nil {
		return meta.Volume{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	v, ok := c.volumes[id]
	if !ok || n != thisNode && n != otherNode {
		return meta.Volume{}, fmt.Errorf("attach %s to %s: %w", id, n, trivet.ErrNotFound)
	}
	if a := v.Attached; a != nil {
		switch {
		case a.Node != n:
			return meta.Volume{}, fmt.Errorf("attach %s to %s: held by %s: %w", id, n, a.Node, trivet.ErrInUse)
		case a.Mode != mode || a.ReadOnly != readOnly:
			return meta.Volume{}, fmt.Errorf("attach %s to %s: attached otherwise: %w", id, n, trivet.ErrExists)
		}
		return *v, nil
	}
	v.Epoch++
	v.FencedEpoch = v.Epoch
	v.Attached = &meta.Attachment{Node: n, Mode: mode, ReadOnly: readOnly, Epoch: v.Epoch}
	return *v, nil
}

func (c *fakeController) Detach(ctx context.Context, id trivet.VolumeID, n trivet.NodeID) error {
	if err := c.run(ctx, "Detach", n); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	v, ok := c.volumes[id]
	if !ok {
		return fmt.Errorf("detach %s: %w", id, trivet.ErrNotFound)
	}
	if v.Attached != nil && (n == "" || v.Attached.Node == n) {
		v.Epoch++
		v.FencedEpoch, v.Attached = v.Epoch, nil
	}
	return nil
}

func (c *fakeController) Capacity(ctx context.Context, params, segment map[string]string) (int64, int64, error) {
	if err := c.run(ctx, "Capacity", [2]map[string]string{params, segment}); err != nil {
		return 0, 0, err
	}
	return 100 << 30, 40 << 30, nil
}

// put adds a volume as it stands, for states that no request leads to.
func (c *fakeController) put(v meta.Volume) meta.Volume {
	c.mu.Lock()
	defer c.mu.Unlock()
	if v.ID == 0 {
		v.ID = trivet.NewVolumeID()
	}
	c.volumes[v.ID] = &v
	return v
}

// fakeNode makes the directories and files that a real one would mount over.
type fakeNode struct {
	hooks

	info node.Info
	ill  fakeIllness

	mu        sync.Mutex
	staged    map[trivet.VolumeID]node.StageRequest
	published map[string]node.PublishRequest // by target
	sizes     map[trivet.VolumeID]int64      // of devices that were expanded
}

func newFakeNode() *fakeNode {
	return &fakeNode{
		info:      node.Info{Node: thisNode, Zone: thisZone},
		staged:    make(map[trivet.VolumeID]node.StageRequest),
		published: make(map[string]node.PublishRequest),
		sizes:     make(map[trivet.VolumeID]int64),
	}
}

func (n *fakeNode) Info() node.Info {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.info
}

// stands has the node stand elsewhere from now on.
func (n *fakeNode) stands(zone, rack string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.info.Zone, n.info.Rack = zone, rack
}

func (n *fakeNode) Stage(ctx context.Context, r node.StageRequest) error {
	if err := n.run(ctx, "Stage", r); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.staged[r.Volume] = r
	return nil
}

func (n *fakeNode) Unstage(ctx context.Context, id trivet.VolumeID, path string) error {
	if err := n.run(ctx, "Unstage", path); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.staged, id)
	return nil
}

func (n *fakeNode) Publish(ctx context.Context, r node.PublishRequest) error {
	if err := n.run(ctx, "Publish", r); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if s, ok := n.staged[r.Volume]; !ok || s.StagingPath != r.StagingPath {
		return fmt.Errorf("publish %s: %w", r.Volume, node.ErrNotStaged)
	}
	for target, p := range n.published {
		if p.Volume == r.Volume && target != r.TargetPath && r.Mode == meta.SingleNodeSingleWriter {
			return fmt.Errorf("publish %s: published at another target: %w", r.Volume, trivet.ErrInUse)
		}
	}
	n.published[r.TargetPath] = r
	if r.Block {
		return os.WriteFile(r.TargetPath, nil, 0o600)
	}
	if err := os.Mkdir(r.TargetPath, 0o750); err != nil && !os.IsExist(err) {
		return err
	}
	return nil
}

func (n *fakeNode) Unpublish(ctx context.Context, id trivet.VolumeID, path string) error {
	if err := n.run(ctx, "Unpublish", path); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if p, ok := n.published[path]; !ok || p.Volume != id {
		return nil
	}
	delete(n.published, path)
	return os.Remove(path)
}

func (n *fakeNode) Stats(ctx context.Context, id trivet.VolumeID, path string) (node.VolumeStats, error) {
	if err := n.run(ctx, "Stats", path); err != nil {
		return node.VolumeStats{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	s, staged := n.staged[id]
	p, published := n.published[filepath.Clean(path)]
	switch {
	case published && p.Volume == id && p.Block, staged && s.StagingPath == path && s.Block:
		return node.VolumeStats{Block: true, TotalBytes: 64 << 20}, nil
	case published && p.Volume == id, staged && s.StagingPath == path:
		return node.VolumeStats{
			TotalBytes: 64 << 20, UsedBytes: 1 << 20, AvailableBytes: 62 << 20,
			TotalInodes: 1000, UsedInodes: 11, FreeInodes: 989,
		}, nil
	default:
		return node.VolumeStats{}, fmt.Errorf("volume %s is not at %q: %w", id, path, trivet.ErrNotFound)
	}
}
