package driver

import (
	"context"
	"fmt"
	"strconv"
	"sync"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// Keys of publish_context.
const (
	// contextEpoch is the epoch of the attachment, for people who read the VolumeAttachment. A node
	// never acts on it: it takes its epoch from the catalogue, so an old context replayed to it
	// grants nothing.
	contextEpoch = "epoch"

	// contextReadOnly is "true" when the attachment is read-only, else absent.
	contextReadOnly = "readOnly"
)

// ControllerPublishVolume attaches a volume to a node. It answers OK only when every older
// attachment is fenced by the volume's own group.
func (s *controllerServer) ControllerPublishVolume(ctx context.Context, req *csi.ControllerPublishVolumeRequest,
) (*csi.ControllerPublishVolumeResponse, error) {
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	if req.GetNodeId() == "" {
		return nil, fmt.Errorf("node_id is missing: %w", trivet.ErrInvalid)
	}
	c, err := capabilityOf(req.GetVolumeCapability())
	if err != nil {
		return nil, asInvalid(err)
	}
	id, err := parseVolume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	node, err := parseNode(req.GetNodeId())
	if err != nil {
		return nil, err
	}
	done, err := s.busy.start(id.String())
	if err != nil {
		return nil, err
	}
	defer done()
	release, err := s.attaches.reserve(ctx, id, node)
	if err != nil {
		return nil, err
	}
	defer release()
	v, err := s.ctrl.Attach(ctx, id, node, c.mode, c.readOnly || req.GetReadonly())
	if err != nil {
		return nil, err
	}
	held := v.GrantOf(node)
	if held == nil || !v.Usable(node, held.Epoch) {
		return nil, fmt.Errorf("attach %s to %s: epoch %d is not fenced yet (fenced: %d): %w",
			id, node, v.Epoch, v.FencedEpoch, trivet.ErrUnavailable)
	}
	return &csi.ControllerPublishVolumeResponse{PublishContext: publishContext(held)}, nil
}

func publishContext(a *meta.Attachment) map[string]string {
	out := map[string]string{contextEpoch: strconv.FormatUint(uint64(a.Epoch), 10)}
	if a.ReadOnly {
		out[contextReadOnly] = strconv.FormatBool(true)
	}
	return out
}

// parseNode returns the node of that name; a name that no node can have is of no node.
func parseNode(s string) (trivet.NodeID, error) {
	if err := trivet.ValidateNodeID(s); err != nil {
		return "", fmt.Errorf("node %q cannot exist: %w", s, trivet.ErrNotFound)
	}
	return trivet.NodeID(s), nil
}

// ControllerUnpublishVolume detaches a volume from a node, or from all when node_id is empty. It
// answers OK once that node can write no more. A volume or node that is unknown is detached.
func (s *controllerServer) ControllerUnpublishVolume(ctx context.Context, req *csi.ControllerUnpublishVolumeRequest,
) (*csi.ControllerUnpublishVolumeResponse, error) {
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	resp := &csi.ControllerUnpublishVolumeResponse{}
	id, err := parseVolume(req.GetVolumeId())
	if err != nil {
		return resp, nil //nolint:nilerr // what never was holds nothing
	}
	var node trivet.NodeID
	if req.GetNodeId() != "" {
		if node, err = parseNode(req.GetNodeId()); err != nil {
			return resp, nil //nolint:nilerr // a node that cannot exist holds nothing
		}
	}
	done, err := s.busy.start(id.String())
	if err != nil {
		return nil, err
	}
	defer done()
	if err := s.ctrl.Detach(ctx, id, node); err != nil && !absent(err) {
		return nil, err
	}
	return resp, nil
}

// attachLimit refuses attachments beyond the number that a node can hold. The scheduler keeps to
// the limit too, but counts what it has seen; this counts what is so.
//
// The count and the attach are not one step in the catalogue: two driver processes may together
// exceed the limit. The attacher calls one of them only, the one beside the elected leader.
type attachLimit struct {
	ctrl Controller
	max  int64 // volumes per node; 0 = no limit

	mu      sync.Mutex
	pending map[trivet.NodeID]map[trivet.VolumeID]struct{} // attaches under way here
}

func newAttachLimit(c Controller, limit int64) *attachLimit {
	return &attachLimit{ctrl: c, max: limit, pending: make(map[trivet.NodeID]map[trivet.VolumeID]struct{})}
}

// reserve takes a place for the volume at the node until release is called. It returns ErrNoSpace
// when all are taken. A volume that the node holds already needs none.
func (a *attachLimit) reserve(ctx context.Context, id trivet.VolumeID, node trivet.NodeID) (release func(), err error) {
	if a.max == 0 {
		return func() {}, nil
	}
	a.begin(id, node) // before the count, so that of two racing calls at least one sees the other
	release = func() { a.end(id, node) }
	volumes, err := a.ctrl.Volumes(ctx)
	if err != nil {
		release()
		return nil, err
	}
	if n := a.others(id, node, volumes); n >= a.max {
		release()
		return nil, fmt.Errorf("attach %s to %s: node holds %d volumes, its limit is %d: %w",
			id, node, n, a.max, trivet.ErrNoSpace)
	}
	return release, nil
}

func (a *attachLimit) begin(id trivet.VolumeID, node trivet.NodeID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.pending[node] == nil {
		a.pending[node] = make(map[trivet.VolumeID]struct{})
	}
	a.pending[node][id] = struct{}{}
}

func (a *attachLimit) end(id trivet.VolumeID, node trivet.NodeID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.pending[node], id)
	if len(a.pending[node]) == 0 {
		delete(a.pending, node)
	}
}

// others counts the volumes other than id that are attached, or being attached, to node; zero when
// the node holds id itself.
func (a *attachLimit) others(id trivet.VolumeID, node trivet.NodeID, volumes []meta.Volume) int64 {
	held := make(map[trivet.VolumeID]struct{})
	for i := range volumes {
		if !holds(&volumes[i], node) {
			continue
		}
		if volumes[i].ID == id {
			return 0
		}
		held[volumes[i].ID] = struct{}{}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for other := range a.pending[node] {
		held[other] = struct{}{}
	}
	delete(held, id)
	return int64(len(held))
}

// holds reports whether node may still do I/O on v: it is attached there, or its detach waits for
// the fence.
func holds(v *meta.Volume, node trivet.NodeID) bool {
	return v.Detaching == node || v.GrantOf(node) != nil
}
