package replication

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/stage"
	"github.com/trivet-csi/trivet/replication/transport"
)

// A request of KindVolumeStages is the length of the window in milliseconds, 8 bytes, big endian; the reply
// is a stage.Window as JSON, in which unknown fields are ignored: a report for people, not a protocol that
// anything rests on.

// handleStages answers KindVolumeStages, once the window is over.
func (h *Host) handleStages(ctx context.Context, _ trivet.NodeID, m transport.Message) (transport.Message, error) {
	if len(m.Body) != 8 {
		return transport.Message{}, fmt.Errorf("watch %s: %d bytes, want 8: %w", m.Group, len(m.Body), trivet.ErrInvalid)
	}
	millis := min(binary.BigEndian.Uint64(m.Body), uint64(stage.WindowMax/time.Millisecond)+1) // Watch refuses the 1
	w, err := h.cfg.Stages.Watch(ctx, m.Group, time.Duration(millis)*time.Millisecond)
	if err != nil {
		return transport.Message{}, err
	}
	w.Node = string(h.cfg.Network.Local())
	for i := range w.Stages {
		w.Stages[i].Node = w.Node
	}
	body, err := json.Marshal(w)
	if err != nil {
		return transport.Message{}, fmt.Errorf("watch %s: %w", m.Group, err)
	}
	return transport.Message{Body: body}, nil
}

// QueryStages has a node watch a volume for d, and returns what it saw. ErrNotFound: it does not serve the
// volume; ErrInvalid: d is zero or longer than stage.WindowMax; ErrUnavailable: it did not answer.
func QueryStages(ctx context.Context, n transport.Network, node trivet.NodeID, id trivet.VolumeID, d time.Duration) (
	stage.Window, error,
) {
	body := binary.BigEndian.AppendUint64(nil, uint64(max(d, 0)/time.Millisecond))
	m, err := n.Call(ctx, node, transport.Message{Kind: transport.KindVolumeStages, Group: id, Body: body})
	if err != nil {
		return stage.Window{}, fmt.Errorf("watch %s on %s: %w", id, node, err)
	}
	var w stage.Window
	if err := json.Unmarshal(m.Body, &w); err != nil {
		return stage.Window{}, fmt.Errorf("watch %s on %s: %v: %w", id, node, err, trivet.ErrCorrupt)
	}
	return w, nil
}
