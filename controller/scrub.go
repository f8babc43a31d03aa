package controller

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// Scrub begins a pass over all replicas of a volume, of which the nodes then make what they find right, or with verify
// only tell. While a pass of the same kind is under way it sets the rate of that one. rateBytes is what each replica
// reads a second at most, 0 = without a limit. It returns the volume as the catalogue has it then.
//
// ErrPending: a verify is under way, and has to end before a scrub. ErrInvalid: the volume is not Available, Bound or
// Released. ErrNotFound: no such volume.
func (c *Controller) Scrub(ctx context.Context, id trivet.VolumeID, verify bool, rateBytes int64) (meta.Volume, error) {
	for {
		s, err := c.store.Read(ctx)
		if err != nil {
			return meta.Volume{}, fmt.Errorf("scrub %s: %w", id, err)
		}
		v, err := lookUp(s, id)
		if err != nil {
			return meta.Volume{}, fmt.Errorf("scrub %s: %w", id, err)
		}
		pass := uint64(1)
		if v.Scrub != nil {
			pass = v.Scrub.Pass + 1
			if v.Scrub.Running && v.Scrub.Verify == verify {
				pass = v.Scrub.Pass
			}
		}
		res, err := c.store.Propose(ctx, meta.Command{StartScrub: &meta.StartScrub{
			Volume: id, Pass: pass, Verify: verify, RateBytes: rateBytes, Time: time.Now(),
		}})
		if errors.Is(err, trivet.ErrPending) && ctx.Err() == nil && c.passMoved(id, v.Scrub) {
			continue // another pass began or ended since the look
		}
		if err != nil {
			return meta.Volume{}, err
		}
		return *res.Volume, nil
	}
}

// passMoved reports whether the pass over a volume is another one than before.
func (c *Controller) passMoved(id trivet.VolumeID, before *meta.Scrub) bool {
	v, ok := c.store.Local().Volume(id)
	if !ok || v.Scrub == nil || before == nil {
		return ok && (v.Scrub == nil) != (before == nil)
	}
	return v.Scrub.Pass != before.Pass || v.Scrub.Running != before.Running
}
