package controller

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// DeleteVolume ends the claim of a volume and returns once its reclaim policy has been carried out:
// under delete its replicas are gone from every disk, under recycle it is wiped and Available, under
// retain it is Released with its data. Unknown: nil. ErrInUse names the node that holds it.
func (c *Controller) DeleteVolume(ctx context.Context, id trivet.VolumeID) error {
	return c.end(ctx, "delete", meta.Release{Volume: id}, true)
}

// DiscardUnwiped is Discard without the wipe that the parameter reclaimWipe asks for: of a volume whose group may never
// be able to do it. What is on its disks is removed there, not overwritten.
func (c *Controller) DiscardUnwiped(ctx context.Context, id trivet.VolumeID) error {
	return c.end(ctx, "discard", meta.Release{Volume: id, Discard: true, SkipWipe: true}, true)
}

// Discard is DeleteVolume with the policy delete, whatever the volume's own is: an operator's delete.
func (c *Controller) Discard(ctx context.Context, id trivet.VolumeID) error {
	return c.end(ctx, "discard", meta.Release{Volume: id, Discard: true}, true)
}

// Release is DeleteVolume without the wait: the reclaim policy is decided, agents carry it out.
func (c *Controller) Release(ctx context.Context, id trivet.VolumeID) error {
	return c.end(ctx, "release", meta.Release{Volume: id}, false)
}

func (c *Controller) end(ctx context.Context, verb string, r meta.Release, wait bool) error {
	unlock, err := c.busy.lock("volume " + r.Volume.String())
	if err != nil {
		return err
	}
	defer unlock()
	for {
		s, err := c.store.Read(ctx)
		if err != nil {
			return fmt.Errorf("%s volume %s: %w", verb, r.Volume, err)
		}
		v, ok := s.Volume(r.Volume)
		if !ok || !r.Discard && ended(&v) {
			return nil
		}
		r.IfRevision = v.Revision
		res, err := c.store.Propose(ctx, meta.Command{Release: &r})
		if errors.Is(err, trivet.ErrPending) && v.Phase != meta.PhaseRestoring {
			continue // it has changed since it was read
		}
		if err != nil {
			return fmt.Errorf("%s volume %s: %w", verb, r.Volume, err)
		}
		if !wait {
			return nil
		}
		return c.await(ctx, fmt.Sprintf("%s volume %s", verb, r.Volume), res.Revision, reclaimed(r.Volume))
	}
}

// ended reports whether the claim on v has ended before and the policy is carried out. Without this
// a repeated delete would wipe a recycled volume again and again.
func ended(v *meta.Volume) bool {
	return v.Phase == meta.PhaseReleased ||
		v.Phase == meta.PhaseAvailable && !v.Claimed && v.Reclaim == meta.ReclaimRecycle
}

// reclaimed is done when nothing is left to do for the released volume.
func reclaimed(id trivet.VolumeID) func(*meta.State) (bool, error) {
	return func(s *meta.State) (bool, error) {
		v, ok := s.Volume(id)
		if !ok {
			return true, nil
		}
		switch v.Phase {
		case meta.PhaseDeleting, meta.PhaseRecycling:
			return false, nil
		case meta.PhaseFailed:
			return false, fmt.Errorf("%s is %s: %s: %w", id, v.Phase, v.Reason, trivet.ErrUnavailable)
		case meta.PhaseReleased, meta.PhaseAvailable, meta.PhaseBound, meta.PhaseCreating, meta.PhaseRestoring:
		case meta.PhaseKept: // for as long as it has snapshots
		}
		return true, nil // Bound: it has a new owner already
	}
}

// Reclaim applies a policy to a Released or Failed volume by hand; retain makes it Available with
// its data. It does not wait for the agents. ErrNotFound; ErrInvalid in another phase; ErrInUse.
func (c *Controller) Reclaim(ctx context.Context, id trivet.VolumeID, policy meta.ReclaimPolicy) error {
	unlock, err := c.busy.lock("volume " + id.String())
	if err != nil {
		return err
	}
	defer unlock()
	_, err = c.store.Propose(ctx, meta.Command{Reclaim: &meta.Reclaim{Volume: id, Policy: policy}})
	return err
}

// Attach gives a node the right to do I/O on a volume, and returns the volume once the fence behind
// every earlier attachment is committed: then Volume.Usable holds for the node and the epoch in
// Volume.Attached. The same again returns the same.
//
// ErrNotFound: no such volume or node. ErrInUse names the node that holds it. ErrExists: the node
// holds it with another mode. ErrInvalid: it is not in a phase to be attached. ErrPending: it is
// still being created. ErrUnavailable: the node is away, or there is no quorum.
func (c *Controller) Attach(ctx context.Context, id trivet.VolumeID, node trivet.NodeID, mode meta.AccessMode,
	readOnly bool,
) (meta.Volume, error) {
	return c.attach(ctx, meta.Attach{Volume: id, Node: node, Mode: mode, ReadOnly: readOnly})
}

func (c *Controller) attach(ctx context.Context, a meta.Attach) (meta.Volume, error) {
	id, node := a.Volume, a.Node
	unlock, err := c.busy.lock("volume " + id.String())
	if err != nil {
		return meta.Volume{}, err
	}
	defer unlock()
	for {
		v, err := c.readToAttach(ctx, id, node)
		if err != nil {
			return meta.Volume{}, err
		}
		a.Epoch = v.Epoch + 1
		if a.Mode == meta.MultiNodeReader {
			a.IfRevision = v.Revision
		}
		res, err := c.store.Propose(ctx, meta.Command{Attach: &a})
		if errors.Is(err, trivet.ErrPending) && v.Phase != meta.PhaseCreating && v.Phase != meta.PhaseRestoring {
			continue // another epoch was reserved since it was read
		}
		if err != nil {
			return meta.Volume{}, err
		}
		return c.awaitFence(ctx, id, node, res.Revision)
	}
}

// readToAttach reads the volume, and waits while the node's own earlier attachment is being fenced. A node that is away
// gets no new attachment: nobody there would use it, and whoever moves its pods would have to fence it again.
func (c *Controller) readToAttach(ctx context.Context, id trivet.VolumeID, node trivet.NodeID) (meta.Volume, error) {
	what := fmt.Sprintf("attach %s to %s", id, node)
	s, err := c.store.Read(ctx)
	if err != nil {
		return meta.Volume{}, fmt.Errorf("%s: %w", what, err)
	}
	v, ok := s.Volume(id)
	if !ok {
		return v, fmt.Errorf("%s: volume: %w", what, trivet.ErrNotFound)
	}
	n, ok := s.Node(node)
	switch {
	case !ok:
		return v, fmt.Errorf("%s: node: %w", what, trivet.ErrNotFound)
	case !n.Alive(time.Now()) && v.GrantOf(node) == nil:
		return v, fmt.Errorf("%s: the node is away, its lease ran out at %s: %w", what, n.LeaseUntil.Format(time.RFC3339),
			trivet.ErrUnavailable)
	}
	if !ends(&v, node) {
		return v, nil
	}
	err = c.await(ctx, what+": fence of its earlier attachment", s.Revision(), func(s *meta.State) (bool, error) {
		v, ok = s.Volume(id)
		return !ok || !ends(&v, node), nil
	})
	if err == nil && !ok {
		err = fmt.Errorf("%s: volume: %w", what, trivet.ErrNotFound)
	}
	return v, err
}

// awaitFence waits until node may use the volume.
func (c *Controller) awaitFence(ctx context.Context, id trivet.VolumeID, node trivet.NodeID,
	since meta.Revision,
) (meta.Volume, error) {
	var v meta.Volume
	what := fmt.Sprintf("attach %s to %s: fence", id, node)
	err := c.await(ctx, what, since, func(s *meta.State) (bool, error) {
		v, _ = s.Volume(id)
		held := v.GrantOf(node)
		if held == nil {
			return false, fmt.Errorf("attach %s to %s: it was detached meanwhile: %w", id, node, trivet.ErrPending)
		}
		return v.Usable(node, held.Epoch), nil
	})
	if err != nil {
		return meta.Volume{}, err
	}
	return v, nil
}

// Detach ends the attachment of node, or of all that hold the volume when it is empty, and
// returns once the fence behind it is committed: from then on nothing that the node still sends is
// accepted, and its reads have ended. One of several readers is fenced together with the last of them:
// until then nobody can write what it may still read. Not attached there, or unknown: nil.
func (c *Controller) Detach(ctx context.Context, id trivet.VolumeID, node trivet.NodeID) error {
	return c.detach(ctx, id, node, false)
}

// ForceDetach is Detach of a node that does not let go of the volume, which leaves an audit record.
func (c *Controller) ForceDetach(ctx context.Context, id trivet.VolumeID, node trivet.NodeID) error {
	return c.detach(ctx, id, node, true)
}

// detach does it by force, too, when the node does not live: nobody can have unmounted there.
func (c *Controller) detach(ctx context.Context, id trivet.VolumeID, node trivet.NodeID, force bool) error {
	unlock, err := c.busy.lock("volume " + id.String())
	if err != nil {
		return err
	}
	defer unlock()
	for {
		s, err := c.store.Read(ctx)
		if err != nil {
			return fmt.Errorf("detach %s from %s: %w", id, node, err)
		}
		v, ok := s.Volume(id)
		if !ok || node == "" && v.Holder() == "" || node != "" && !v.Holds(node) {
			return nil
		}
		since, fence, holder := s.Revision(), v.Epoch, node
		if holder == "" {
			holder = v.Holder()
		}
		if held := v.GrantOf(holder); held != nil {
			end := detachOf(&v, held, node)
			n, ok := s.Node(held.Node)
			end.Forced = force || ok && !n.Alive(time.Now())
			res, err := c.store.Propose(ctx, meta.Command{Detach: end})
			if errors.Is(err, trivet.ErrPending) {
				continue // another reader has come or gone since it was read
			}
			if err != nil {
				return err
			}
			if res.Volume != nil && res.Volume.GrantOf(holder) != nil {
				continue // taken over by a new process since it was read
			}
			if res.Volume != nil && stays(res.Volume) {
				return nil // others go on reading
			}
			since = res.Revision
			if res.Volume != nil {
				fence = res.Volume.Epoch
			}
		}
		what := fmt.Sprintf("detach %s from %s: fence", id, holder)
		return c.await(ctx, what, since, func(s *meta.State) (bool, error) {
			v, ok := s.Volume(id)
			return !ok || v.FencedEpoch >= fence, nil
		})
	}
}

// detachOf returns the command that ends the attachment held of v, or all of them when node is empty and
// there are several.
func detachOf(v *meta.Volume, held *meta.Attachment, node trivet.NodeID) *meta.Detach {
	d := &meta.Detach{Volume: v.ID, Node: held.Node, Epoch: held.Epoch}
	if held.Mode == meta.MultiNodeReader {
		d.IfRevision = v.Revision
	}
	if node == "" && len(v.Also) > 0 {
		d.Node = ""
	}
	return d
}

// MoveLeader asks that the volume's replica on node lead its group, and returns once it reported
// that it does. ErrNotFound when the volume has no replica there.
func (c *Controller) MoveLeader(ctx context.Context, id trivet.VolumeID, node trivet.NodeID) error {
	what := fmt.Sprintf("move leader of %s to %s", id, node)
	s, err := c.store.Read(ctx)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	v, err := lookUp(s, id)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	r := v.ReplicaOn(node)
	if r == nil {
		return fmt.Errorf("%s: no replica there: %w", what, trivet.ErrNotFound)
	}
	res, err := c.store.Propose(ctx, meta.Command{WantLeader: &meta.WantLeader{Volume: id, Replica: r.ID}})
	if err != nil {
		return err
	}
	return c.await(ctx, what, res.Revision, func(s *meta.State) (bool, error) {
		v, err := lookUp(s, id)
		return v.Leader == r.ID, err
	})
}
