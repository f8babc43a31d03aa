package node

import (
	"context"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/stage"
)

// probe is a Device that measures how long the Device below takes.
type probe struct {
	next                        trivet.Device
	read, write, discard, flush *stage.Meter
}

// probeRequests measures whole requests, by kind.
func probeRequests(next trivet.Device, v *stage.Volume) *probe {
	return &probe{
		next: next, read: v.Meter(stage.Read), write: v.Meter(stage.Write), discard: v.Meter(stage.Discard),
		flush: v.Meter(stage.Flush),
	}
}

// probeStage measures all requests that reach a stage together.
func probeStage(next trivet.Device, v *stage.Volume, s stage.Stage) *probe {
	m := v.Meter(s)
	return &probe{next: next, read: m, write: m, discard: m, flush: m}
}

// ReadAt implements trivet.Device.
func (p *probe) ReadAt(ctx context.Context, b []byte, off int64) error {
	span := p.read.Begin()
	err := p.next.ReadAt(ctx, b, off)
	p.read.AddBytes(len(b))
	span.End()
	return err
}

// WriteAt implements trivet.Device.
func (p *probe) WriteAt(ctx context.Context, b []byte, off int64) error {
	span := p.write.Begin()
	err := p.next.WriteAt(ctx, b, off)
	p.write.AddBytes(len(b))
	span.End()
	return err
}

// Discard implements trivet.Device.
func (p *probe) Discard(ctx context.Context, off, n int64) error {
	span := p.discard.Begin()
	err := p.next.Discard(ctx, off, n)
	span.End()
	return err
}

// WriteZeroes implements trivet.Device.
func (p *probe) WriteZeroes(ctx context.Context, off, n int64) error {
	span := p.discard.Begin()
	err := p.next.WriteZeroes(ctx, off, n)
	span.End()
	return err
}

// Flush implements trivet.Device.
func (p *probe) Flush(ctx context.Context) error {
	span := p.flush.Begin()
	err := p.next.Flush(ctx)
	span.End()
	return err
}

// Size implements trivet.Device.
func (p *probe) Size() int64 { return p.next.Size() }

// Allocated implements trivet.Allocator. It is not a request that moves data, and not measured.
func (p *probe) Allocated(ctx context.Context, off, n int64, runs []trivet.Run) (int, error) {
	return trivet.AllocatedOf(ctx, p.next, off, n, runs)
}
