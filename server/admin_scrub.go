package server

import (
	"context"
	"fmt"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/controller/meta"
)

// ScrubVolume implements api.AdminServer.
func (a *admin) ScrubVolume(ctx context.Context, r *api.ScrubVolumeRequest) (*api.ScrubStatus, error) {
	if r.GetRateBytes() < 0 {
		return nil, fmt.Errorf("scrub %q: rate of %d bytes per second: %w", r.GetName(), r.GetRateBytes(), trivet.ErrInvalid)
	}
	v, err := a.find(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	if v, err = a.s.controller.Scrub(ctx, v.ID, r.GetVerify(), r.GetRateBytes()); err != nil {
		return nil, err
	}
	return scrubStatus(&v), nil
}

// GetScrub implements api.AdminServer.
func (a *admin) GetScrub(ctx context.Context, r *api.VolumeRequest) (*api.ScrubStatus, error) {
	v, err := a.find(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	return scrubStatus(&v), nil
}

func scrubStatus(v *meta.Volume) *api.ScrubStatus {
	out := &api.ScrubStatus{Id: v.ID.String(), Name: v.Name}
	s := v.Scrub
	if s == nil {
		return out
	}
	out.Pass, out.Running, out.Verify, out.RateBytes = s.Pass, s.Running, s.Verify, s.RateBytes
	out.Started, out.Ended, out.LastScrub = timeText(s.Started), timeText(s.Ended), timeText(s.LastEnded)
	out.NextBlock, out.CheckedBytes = uint64(s.Next), s.CheckedBytes
	out.Found, out.Repaired, out.Left, out.Findings = s.Found, s.Repaired, s.Left, s.Findings
	for _, n := range s.Absent {
		out.Absent = append(out.Absent, string(n))
	}
	return out
}

func timeText(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.Format(time.RFC3339)
}
