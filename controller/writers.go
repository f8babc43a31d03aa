package controller

import (
	"context"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// AttachBeside is Attach for one of two nodes that both write (meta.MultiNodeMultiWriter): with names the other one,
// and nobody else may join; empty: whichever node comes second. It returns once the fence is committed behind which
// both write. Errors as of Attach; ErrInUse names all nodes that hold the volume.
func (c *Controller) AttachBeside(ctx context.Context, id trivet.VolumeID, node, with trivet.NodeID) (
	meta.Volume, error,
) {
	return c.attach(ctx, meta.Attach{Volume: id, Node: node, Mode: meta.MultiNodeMultiWriter, With: with})
}

// stays reports whether others go on at the epoch that v has, after node was detached: it needs no fence of its own.
// That of a writer who goes on does.
func stays(v *meta.Volume) bool { return v.Attached != nil && v.Attached.Mode == meta.MultiNodeReader }

// ends reports whether node's attachment is over, but not fenced yet.
func ends(v *meta.Volume, node trivet.NodeID) bool {
	return v.Detaching == node && v.Attached == nil || v.Leaving == node
}
