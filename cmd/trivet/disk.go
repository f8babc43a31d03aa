package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet/api"
)

func newDisk(o *options) *cobra.Command {
	return group("disk", "See where the bytes of the disks are", newDiskShow(o))
}

type diskUseView struct {
	Node      string `json:"node"`
	ID        string `json:"id"`
	Path      string `json:"path"`
	Size      int64  `json:"sizeBytes"`
	Available int64  `json:"availableBytes"`
	Reserve   int64  `json:"reserveBytes"`
	Room      int64  `json:"roomBytes"`
	Live      int64  `json:"liveBytes"`
	Snapshot  int64  `json:"snapshotBytes"`
	Retained  int64  `json:"retainedBytes"`
	Garbage   int64  `json:"garbageBytes"`
	FreeFile  int64  `json:"freeFileBytes"`
	Segments  int64  `json:"segments"`
}

func newDiskShow(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "show [NODE]",
		Short: "Show where the bytes of the disks of a node are, or of all nodes that are up",
		Long: "Show where the bytes of the disks of a node are, or of all nodes that are up. LIVE to FREE-FILES are the " +
			"files of\n" +
			"the disk's log: blocks of volumes, blocks that only snapshots need, entries that the log keeps for itself, what\n" +
			"was overwritten or deleted and is not cleaned yet, and files that wait to be used again. ROOM is what volumes " +
			"may\n" +
			"still write: AVAILABLE in the filesystem and files ready to be used again, without the RESERVE.",
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				resp, err := c.ListNodes(ctx, &api.ListNodesRequest{})
				if err != nil {
					return err
				}
				views, found := []diskUseView{}, false
				for _, n := range resp.GetNodes() {
					if len(args) > 0 && n.GetId() != args[0] {
						continue
					}
					found = true
					if len(args) == 0 && n.GetState() != "Up" {
						continue
					}
					got, err := o.disksOf(ctx, n.GetAddress())
					if err != nil {
						return fmt.Errorf("disks of %s: %w", n.GetId(), err)
					}
					views = append(views, got...)
				}
				if !found {
					return fmt.Errorf("node %q: not found", args[0])
				}
				return o.show(cmd.OutOrStdout(), views, diskUseTable(views))
			})
		},
	}
}

func (o *options) disksOf(ctx context.Context, address string) ([]diskUseView, error) {
	c, err := o.dial(address)
	if err != nil {
		return nil, err
	}
	defer c.conn.Close()
	resp, err := c.ShowDisks(ctx, &api.ShowDisksRequest{})
	if err != nil {
		return nil, err
	}
	views := make([]diskUseView, 0, len(resp.GetDisks()))
	for _, d := range resp.GetDisks() {
		views = append(views, diskUseView{
			Node: resp.GetNode(), ID: d.GetId(), Path: d.GetPath(), Size: d.GetSizeBytes(), Available: d.GetAvailableBytes(),
			Reserve: d.GetReserveBytes(), Room: d.GetRoomBytes(), Live: d.GetLiveBytes(), Snapshot: d.GetSnapshotBytes(),
			Retained: d.GetRetainedBytes(), Garbage: d.GetGarbageBytes(), FreeFile: d.GetFreeFileBytes(),
			Segments: d.GetSegments(),
		})
	}
	return views, nil
}

func diskUseTable(views []diskUseView) table {
	t := table{header: []string{
		"NODE", "PATH", "SIZE", "AVAILABLE", "RESERVE", "ROOM", "LIVE", "SNAPSHOT", "RETAINED", "GARBAGE", "FREE-FILES",
		"SEGMENTS",
	}}
	for _, v := range views {
		row := []string{v.Node, v.Path}
		for _, n := range []int64{
			v.Size, v.Available, v.Reserve, v.Room, v.Live, v.Snapshot, v.Retained, v.Garbage, v.FreeFile,
		} {
			row = append(row, sizeText(n))
		}
		t.rows = append(t.rows, append(row, itoa(v.Segments)))
	}
	return t
}
