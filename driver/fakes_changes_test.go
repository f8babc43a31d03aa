package driver_test

import (
	"context"
	"fmt"
	"sync"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/driver"
)

// fakeChanges keeps what snapshots show, block by block.
type fakeChanges struct {
	hooks

	mu        sync.Mutex
	snapshots map[trivet.SnapshotID]*meta.Snapshot
	shows     map[trivet.SnapshotID][]byte // one byte a block; zero = nothing was written
	pageN     int                          // extents that are sent at a time
	breakAt   int64                        // the offset at which no replica answers any more; 0 = none
}

func newFakeChanges() *fakeChanges {
	return &fakeChanges{
		snapshots: make(map[trivet.SnapshotID]*meta.Snapshot), shows: make(map[trivet.SnapshotID][]byte), pageN: 3,
	}
}

// put adds a snapshot that shows blocks.
func (c *fakeChanges) put(s meta.Snapshot, blocks []byte) meta.Snapshot {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.ID == 0 {
		s.ID = trivet.NewSnapshotID()
	}
	if s.State == "" {
		s.State = meta.SnapshotReady
	}
	s.SizeBytes = int64(len(blocks)) * trivet.BlockSize
	c.snapshots[s.ID], c.shows[s.ID] = &s, blocks
	return s
}

// breaks makes replicas answer no more from an offset on; 0 = they do.
func (c *fakeChanges) breaks(at int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.breakAt = at
}

func (c *fakeChanges) Snapshot(ctx context.Context, id trivet.SnapshotID) (meta.Snapshot, error) {
	if err := c.run(ctx, "Snapshot", id); err != nil {
		return meta.Snapshot{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s, ok := c.snapshots[id]
	if !ok {
		return meta.Snapshot{}, fmt.Errorf("snapshot %s: %w", id, trivet.ErrNotFound)
	}
	return *s, nil
}

func (c *fakeChanges) Changes(ctx context.Context, from trivet.SnapshotID, to *meta.Snapshot, off int64,
	send func([]driver.Extent) error,
) error {
	if err := c.run(ctx, "Changes", off); err != nil {
		return err
	}
	c.mu.Lock()
	base, blocks, page, breakAt := c.shows[from], c.shows[to.ID], c.pageN, c.breakAt
	c.mu.Unlock()
	var out []driver.Extent
	for i := off / trivet.BlockSize; i < int64(len(blocks)); i++ {
		if breakAt > 0 && i*trivet.BlockSize >= breakAt {
			return fmt.Errorf("no replica answers: %w", trivet.ErrUnavailable)
		}
		var was byte
		if int(i) < len(base) {
			was = base[i]
		}
		if blocks[i] == was {
			continue
		}
		out = append(out, driver.Extent{OffsetBytes: i * trivet.BlockSize, SizeBytes: trivet.BlockSize})
		if len(out) == page {
			if err := send(out); err != nil {
				return err
			}
			out = nil
		}
	}
	return send(out)
}
