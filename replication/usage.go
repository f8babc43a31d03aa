package replication

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/replication/transport"
)

// VolumeUsage is what the blocks of a replica are there for, in bytes of data. Replicas of a volume agree on Live and
// Snapshot at one index; what is shared with another volume, or waits to be removed, each has for itself.
type VolumeUsage struct {
	engine.VolumeUsage

	// Alone are the bytes that come back when one snapshot alone is deleted.
	Alone map[trivet.SnapshotID]int64 `json:"alone,omitempty"`
	// Node counted it, and finished at Counted, by its clock.
	Node    trivet.NodeID `json:"node"`
	Counted time.Time     `json:"counted"`
	// Index of the newest entry that was applied before it was counted.
	Index uint64 `json:"index"`
}

// UniqueBytes are the bytes that the volume has for itself, on each replica's disk: Live + Snapshot + Other = Unique +
// Shared. Blocks that a copy has taken over from its source count for both.
func (u *VolumeUsage) UniqueBytes() int64 {
	return u.LiveBytes + u.SnapshotBytes + u.OtherBytes - u.SharedBytes
}

// usages is what was counted, so that it is not counted again and again. One count runs at a time on a node.
type usages struct {
	turn chan struct{} // capacity 1

	mu    sync.Mutex
	known map[trivet.VolumeID]VolumeUsage
}

func newUsages() *usages {
	return &usages{turn: make(chan struct{}, 1), known: map[trivet.VolumeID]VolumeUsage{}}
}

// A request of KindVolumeUsage is how old the answer may be in milliseconds, 8 bytes, big endian; the reply is a
// VolumeUsage as JSON, in which unknown fields are ignored: a report for people, not a protocol that anything rests on.

// handleUsage answers KindVolumeUsage.
func (h *Host) handleUsage(ctx context.Context, _ trivet.NodeID, m transport.Message) (transport.Message, error) {
	if len(m.Body) != 8 {
		return transport.Message{}, fmt.Errorf("usage of %s: %d bytes, want 8: %w", m.Group, len(m.Body), trivet.ErrInvalid)
	}
	millis := min(binary.BigEndian.Uint64(m.Body), uint64(time.Hour/time.Millisecond))
	u, err := h.Usage(ctx, m.Group, time.Duration(millis)*time.Millisecond)
	if err != nil {
		return transport.Message{}, err
	}
	body, err := json.Marshal(u)
	if err != nil {
		return transport.Message{}, fmt.Errorf("usage of %s: %w", m.Group, err)
	}
	return transport.Message{Body: body}, nil
}

// QueryUsage asks a node what the blocks of its replica of a volume are there for; the answer may be so old. It takes
// half a microsecond for each version of a block to count, and one volume is counted at a time on a node. ErrNotFound:
// it has no replica; ErrUnavailable: it did not answer, or the replica is not whole.
func QueryUsage(ctx context.Context, n transport.Network, node trivet.NodeID, id trivet.VolumeID, age time.Duration) (
	VolumeUsage, error,
) {
	body := binary.BigEndian.AppendUint64(nil, uint64(max(age, 0)/time.Millisecond))
	m, err := n.Call(ctx, node, transport.Message{Kind: transport.KindVolumeUsage, Group: id, Body: body})
	if err != nil {
		return VolumeUsage{}, fmt.Errorf("usage of %s on %s: %w", id, node, err)
	}
	var u VolumeUsage
	if err := json.Unmarshal(m.Body, &u); err != nil {
		return VolumeUsage{}, fmt.Errorf("usage of %s on %s: %v: %w", id, node, err, trivet.ErrCorrupt)
	}
	return u, nil
}

// Usage is QueryUsage of this node.
func (h *Host) Usage(ctx context.Context, id trivet.VolumeID, age time.Duration) (VolumeUsage, error) {
	if u, ok := h.KnownUsage(id); ok && time.Since(u.Counted) <= age {
		return u, nil
	}
	select {
	case h.usages.turn <- struct{}{}:
		defer func() { <-h.usages.turn }()
	case <-ctx.Done():
		return VolumeUsage{}, fmt.Errorf("usage of %s: others are counted first: %w: %w", id, ctx.Err(),
			trivet.ErrUnavailable)
	}
	vol, err := h.stored(id)
	if err != nil {
		return VolumeUsage{}, err
	}
	st := vol.State()
	if u, ok := h.KnownUsage(id); ok && u.Index == st.AppliedIndex && u.OtherBytes == 0 && u.SharedBytes == 0 {
		u.Counted = time.Now() // nothing was written, and nothing is being swept or flattened
		h.usages.note(id, u)
		return u, nil
	}
	u := VolumeUsage{Node: h.cfg.Network.Local(), Index: st.AppliedIndex}
	var alone map[trivet.Generation]int64
	if u.VolumeUsage, alone, err = vol.UsageOfSnapshots(ctx); err != nil {
		return VolumeUsage{}, err
	}
	for _, s := range vol.State().Snapshots {
		if n, ok := alone[s.Generation]; ok {
			if u.Alone == nil {
				u.Alone = map[trivet.SnapshotID]int64{}
			}
			u.Alone[trivet.SnapshotID(s.ID)] = n
		}
	}
	u.Counted = time.Now()
	h.usages.note(id, u)
	return u, nil
}

// KnownUsage returns what Usage returned last for a volume, and whether it did.
func (h *Host) KnownUsage(id trivet.VolumeID) (VolumeUsage, bool) {
	h.usages.mu.Lock()
	defer h.usages.mu.Unlock()
	u, ok := h.usages.known[id]
	return u, ok
}

// ForgetUsage drops what is known of volumes that keep does not want.
func (h *Host) ForgetUsage(keep func(trivet.VolumeID) bool) {
	h.usages.mu.Lock()
	defer h.usages.mu.Unlock()
	for id := range h.usages.known {
		if !keep(id) {
			delete(h.usages.known, id)
		}
	}
}

func (u *usages) note(id trivet.VolumeID, now VolumeUsage) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.known[id] = now
}

// stored finds the replica of a volume on a disk of this node that is whole, whether its group runs or not.
func (h *Host) stored(id trivet.VolumeID) (*engine.Volume, error) {
	if r, ok := h.Replica(id); ok {
		return r.machine.vol, nil
	}
	for i := range h.cfg.Disks {
		vol, err := h.cfg.Disks[i].Engine.OpenVolume(id)
		if notFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if vol.Restoring() {
			return nil, fmt.Errorf("%s on %s is not whole: %w", id, h.cfg.Network.Local(), trivet.ErrUnavailable)
		}
		return vol, nil
	}
	return nil, fmt.Errorf("no disk of %s has a replica of %s: %w", h.cfg.Network.Local(), id, trivet.ErrNotFound)
}
