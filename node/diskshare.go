package node

import (
	"context"
	"sync"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/stage"
	"github.com/trivet-csi/trivet/iothrottle"
	"github.com/trivet-csi/trivet/replication"
)

// diskShare shares one disk out between the volumes whose replicas on it lead, wherever they are attached, and
// background work: rebuild, scrub and cleaning (decision 0029). It is a replication.DiskShare.
type diskShare struct {
	scheduler *iothrottle.Scheduler

	mu     sync.Mutex
	cat    Catalogue       // nil until the node is open: all volumes are alike
	stages *stage.Registry // nil: nothing is measured
	open   map[*diskTurns]struct{}
}

var _ replication.DiskShare = (*diskShare)(nil)

func newDiskShare() *diskShare {
	return &diskShare{scheduler: iothrottle.NewDiskScheduler(), open: make(map[*diskTurns]struct{})}
}

// connect says where the shares of volumes stand.
func (d *diskShare) connect(cat Catalogue, stages *stage.Registry) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cat, d.stages = cat, stages
}

// Open implements replication.DiskShare.
func (d *diskShare) Open(id trivet.VolumeID) replication.Turns {
	d.mu.Lock()
	defer d.mu.Unlock()
	stages := d.stages.Open(id)
	t := &diskTurns{
		Class: d.scheduler.Class(d.shareLocked(id), meterOf(stages, stage.DiskTurn)), disk: d, volume: id, stages: stages,
	}
	d.open[t] = struct{}{}
	return t
}

// Background implements replication.DiskShare.
func (d *diskShare) Background(ctx context.Context, bytes int) (release func(), err error) {
	return d.scheduler.Background(ctx, bytes)
}

// shareLocked returns what the catalogue gives a volume. One that is not known, or has parameters of a newer version,
// has the default: to hold nothing back is no way out, for that would take from the others.
func (d *diskShare) shareLocked(id trivet.VolumeID) iothrottle.Share {
	if d.cat != nil {
		if v, ok := d.cat.Local().Volume(id); ok {
			if share, err := shareOf(v.Params); err == nil {
				return share
			}
		}
	}
	return iothrottle.Share{Weight: priorityDefault}
}

// follow makes shares follow the catalogue.
func (d *diskShare) follow() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for t := range d.open {
		t.SetShare(d.shareLocked(t.volume))
	}
}

// diskTurns is a volume's part of a disk.
type diskTurns struct {
	*iothrottle.Class
	disk   *diskShare
	volume trivet.VolumeID
	stages *stage.Volume
}

// Close implements replication.Turns.
func (t *diskTurns) Close() {
	t.disk.mu.Lock()
	delete(t.disk.open, t)
	t.disk.mu.Unlock()
	t.Class.Close()
	t.stages.Close()
}
