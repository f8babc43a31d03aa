package node

import (
	"fmt"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
)

// DiskUse says where the bytes of a disk are.
type DiskUse struct {
	ID    trivet.DiskID
	Path  string
	Space engine.Usage    // of the filesystem, with the log's files that are ready to be used again
	Log   engine.LogUsage // of the log's files

	ReadyBytes int64 // of Space.FreeBytes, what is not free in the filesystem but in files of the log
	RoomBytes  int64 // what volumes may still write
}

// DiskUse returns where the bytes of each disk of the node are, in the order of its configuration.
func (n *Node) DiskUse() ([]DiskUse, error) {
	out := make([]DiskUse, 0, len(n.cfg.Disks))
	for _, d := range n.cfg.Disks {
		space, err := d.engine.Usage()
		if err != nil {
			return nil, fmt.Errorf("use of disk %s: %w", d.id, err)
		}
		out = append(out, DiskUse{
			ID: d.id, Path: d.dir, Space: space, Log: d.engine.LogUsage(), ReadyBytes: d.log.ReadyBytes(),
			RoomBytes: max(space.FreeBytes-space.ReserveBytes, 0),
		})
	}
	return out, nil
}
