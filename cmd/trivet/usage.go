package main

import (
	"fmt"
	"io"

	"github.com/trivet-csi/trivet/api"
)

// usageView says what the blocks of a volume are there for: used + snapshot + other = unique + shared.
type usageView struct {
	UsedBytes     int64  `json:"usedBytes"`     // what the volume shows
	SnapshotBytes int64  `json:"snapshotBytes"` // what only snapshots show
	OtherBytes    int64  `json:"otherBytes"`    // to be removed, or kept for clones
	SharedBytes   int64  `json:"sharedBytes"`   // of these, what is still the volume's that it is a copy of
	UniqueBytes   int64  `json:"uniqueBytes"`   // what it has for itself, on each replica's disk
	Node          string `json:"node"`          // that counted
	Counted       string `json:"counted"`
}

func usageOf(u *api.VolumeUsage) *usageView {
	if u == nil {
		return nil
	}
	return &usageView{
		UsedBytes: u.GetUsedBytes(), SnapshotBytes: u.GetSnapshotBytes(), OtherBytes: u.GetOtherBytes(),
		SharedBytes: u.GetSharedBytes(), UniqueBytes: u.GetUniqueBytes(), Node: u.GetNode(), Counted: u.GetCounted(),
	}
}

// print writes a line about what adds up.
func (u *usageView) print(w io.Writer) {
	if u == nil {
		return
	}
	fmt.Fprintf(w, "bytes: used %s + snapshots %s + to be removed %s = unique %s + shared %s\n", sizeText(u.UsedBytes),
		sizeText(u.SnapshotBytes), sizeText(u.OtherBytes), sizeText(u.UniqueBytes), sizeText(u.SharedBytes))
}

// usageTable is the wide list of volumes.
func usageTable(volumes []volumeView) table {
	t := volumeTable(volumes)
	t.header = append(t.header, "USED", "SNAPSHOTS", "SHARED", "UNIQUE")
	for i := range volumes {
		cells := []string{"", "", "", ""}
		if u := volumes[i].Usage; u != nil {
			cells = []string{
				sizeText(u.UsedBytes), sizeText(u.SnapshotBytes), sizeText(u.SharedBytes), sizeText(u.UniqueBytes),
			}
		}
		t.rows[i] = append(t.rows[i], cells...)
	}
	return t
}
