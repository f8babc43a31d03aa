package node

import "github.com/trivet-csi/trivet/internal/stage"

// HoldTimes measure for how long writes were held on this node, once for each volume and snapshot. They may be read
// at any time.
type HoldTimes struct {
	Single stage.Meter // for the snapshot of one volume
	Group  stage.Meter // for a group of snapshots
}

// HoldTimes returns for how long writes were held for snapshots since the node is open.
func (n *Node) HoldTimes() *HoldTimes { return &n.mounts.holdTimes }
