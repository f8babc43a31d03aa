package meta

import (
	"fmt"

	"github.com/trivet-csi/trivet"
)

// Growth (H20). A volume has three sizes: the one with which it began, for a replica that is made anew and may be
// given the log from its first entry (I13); the one that its group has committed; and the one that is wanted.
//
//	Start=1 Size=1                 nothing has grown
//	  GrowVolume 3 ──► Size=1 Want=3         the volume is awake until its leader has committed 3
//	  ReportSize 3 ──► Start=1 Size=3        every replica has 3, or will before it applies a later write
//
// The size in the catalogue follows that of the group and is never ahead of it, so whoever opens the volume by the
// catalogue gets a size up to which writes are accepted. It may be behind: a leader that died between commit and
// report left it so, and the next one reports. Nothing shrinks.
//
// Invariant: StartSizeBytes <= SizeBytes; WantSizeBytes is 0 or above SizeBytes.

// Start returns the size in bytes with which the volume began.
func (v *Volume) Start() int64 {
	if v.StartSizeBytes > 0 {
		return v.StartSizeBytes
	}
	return v.SizeBytes
}

// Growing reports whether the volume's group has not committed the size that is wanted yet.
func (v *Volume) Growing() bool { return v.WantSizeBytes > v.SizeBytes }

func (g *GrowVolume) op() string { return fmt.Sprintf("grow %s to %d bytes", g.Volume, g.SizeBytes) }

func (g *GrowVolume) validate() error {
	return firstError(validateVolume(g.Volume), validateSize(g.SizeBytes))
}

func (g *GrowVolume) apply(d *draft) error {
	v, err := d.edit(g.Volume)
	if err != nil {
		return err
	}
	has := max(v.SizeBytes, v.WantSizeBytes)
	switch {
	case g.SizeBytes < has && v.Growing():
		return fmt.Errorf("volume is growing to %d bytes and never shrinks: %w", has, trivet.ErrOutOfRange)
	case g.SizeBytes < has:
		return fmt.Errorf("volume has %d bytes and never shrinks: %w", has, trivet.ErrOutOfRange)
	case g.SizeBytes == has:
		return nil
	}
	if err := firstError(v.unmoved(g.IfRevision), v.settled()); err != nil {
		return err
	}
	v.WantSizeBytes = g.SizeBytes
	d.put(v)
	return nil
}

func (r *ReportSize) op() string {
	return fmt.Sprintf("report size of %s as %d bytes", r.Volume, r.SizeBytes)
}

func (r *ReportSize) validate() error {
	return firstError(validateVolume(r.Volume), validateSize(r.SizeBytes))
}

func (r *ReportSize) apply(d *draft) error {
	v, err := d.edit(r.Volume)
	if err != nil {
		return nil //nolint:nilerr // a late copy: the volume is gone
	}
	if r.SizeBytes <= v.SizeBytes {
		return nil // late
	}
	v.StartSizeBytes = v.Start()
	v.SizeBytes = r.SizeBytes
	if !v.Growing() {
		v.WantSizeBytes = 0
	}
	d.put(v)
	return nil
}

// sizeProblem names the first invariant that the sizes of v break.
func (v *Volume) sizeProblem() string {
	switch {
	case v.StartSizeBytes < 0 || v.StartSizeBytes > v.SizeBytes:
		return fmt.Sprintf("began with %d bytes, has %d", v.StartSizeBytes, v.SizeBytes)
	case v.WantSizeBytes != 0 && v.WantSizeBytes <= v.SizeBytes:
		return fmt.Sprintf("wants %d bytes, has %d", v.WantSizeBytes, v.SizeBytes)
	}
	return ""
}

func validateSize(sizeBytes int64) error {
	if sizeBytes <= 0 || sizeBytes > trivet.VolumeSizeMax || sizeBytes%trivet.BlockSize != 0 {
		return fmt.Errorf("size of %d bytes: want whole %d-byte blocks, 1 to %d bytes: %w",
			sizeBytes, trivet.BlockSize, int64(trivet.VolumeSizeMax), trivet.ErrInvalid)
	}
	return nil
}
