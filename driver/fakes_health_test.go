package driver_test

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

// patchArgs is what a hook on SetParams sees.
type patchArgs struct {
	volume trivet.VolumeID
	patch  map[string]string
}

func (c *fakeController) SetParams(ctx context.Context, id trivet.VolumeID, patch map[string]string,
) (meta.Volume, error) {
	if err := c.run(ctx, "SetParams", patchArgs{id, patch}); err != nil {
		return meta.Volume{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	v, ok := c.volumes[id]
	if !ok {
		return meta.Volume{}, fmt.Errorf("set parameters of %s: %w", id, trivet.ErrNotFound)
	}
	params, err := controller.WithMutable(v.Params, patch)
	if err != nil {
		return meta.Volume{}, fmt.Errorf("set parameters of %s: %w", id, err)
	}
	v.Params = params
	return *v, nil
}

// fallIll makes a volume have conditions from now on.
func (c *fakeController) fallIll(id trivet.VolumeID, conditions ...trivet.Condition) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ill == nil {
		c.ill = make(map[trivet.VolumeID][]trivet.Condition)
	}
	c.ill[id] = conditions
}

func (c *fakeController) VolumeHealth(ctx context.Context, id trivet.VolumeID) (controller.VolumeHealth, error) {
	if err := c.run(ctx, "VolumeHealth", id); err != nil {
		return controller.VolumeHealth{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	v, ok := c.volumes[id]
	if !ok {
		return controller.VolumeHealth{}, fmt.Errorf("health of %s: %w", id, trivet.ErrNotFound)
	}
	return controller.VolumeHealth{Volume: *v, Conditions: c.ill[id]}, nil
}

func (c *fakeController) Unhealthy(ctx context.Context) ([]controller.VolumeHealth, error) {
	if err := c.run(ctx, "Unhealthy", nil); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []controller.VolumeHealth
	for id, v := range c.volumes {
		if len(c.ill[id]) > 0 {
			out = append(out, controller.VolumeHealth{Volume: *v, Conditions: c.ill[id]})
		}
	}
	slices.SortFunc(out, func(a, b controller.VolumeHealth) int { return cmp.Compare(a.Volume.ID, b.Volume.ID) })
	return out, nil
}

// fakeIllness is what is wrong with a fakeNode.
type fakeIllness struct {
	volumes map[trivet.VolumeID][]trivet.Condition // those here; without conditions they are well
	storage []trivet.Condition
}

func (n *fakeNode) VolumeHealth(id trivet.VolumeID) ([]trivet.Condition, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	_, staged := n.staged[id]
	found, here := n.ill.volumes[id]
	return found, here || staged
}

func (n *fakeNode) StorageHealth() []trivet.Condition {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.ill.storage
}

// fallIll makes a volume have conditions on the node from now on.
func (n *fakeNode) fallIll(id trivet.VolumeID, conditions ...trivet.Condition) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ill.volumes == nil {
		n.ill.volumes = make(map[trivet.VolumeID][]trivet.Condition)
	}
	n.ill.volumes[id] = conditions
}

// failStorage makes the node itself have conditions from now on.
func (n *fakeNode) failStorage(conditions ...trivet.Condition) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ill.storage = conditions
}

// requestOf returns the fingerprint by which a create finds what the same one made.
func requestOf(t *testing.T, req *csi.CreateVolumeRequest) string {
	t.Helper()
	params, err := controller.ParseParams(req.GetParameters())
	require.NoError(t, err)
	return params.Fingerprint()
}
