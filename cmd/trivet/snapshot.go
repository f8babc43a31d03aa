package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet/api"
)

func newSnapshot(o *options) *cobra.Command {
	return group("snapshot", "Make and remove snapshots of volumes",
		newSnapshotCreate(o), newSnapshotList(o), newSnapshotShow(o), newSnapshotDelete(o))
}

// snapshotView is what `-o json` prints.
type snapshotView struct {
	ID          string   `json:"id"`
	Name        string   `json:"name"`
	Volume      string   `json:"volume"`
	VolumeName  string   `json:"volumeName"`
	State       string   `json:"state"`
	Reason      string   `json:"reason,omitempty"`
	SizeBytes   int64    `json:"sizeBytes"`
	Generation  uint32   `json:"generation"`
	Created     string   `json:"created"`
	HeldSeconds float64  `json:"heldSeconds"` // how long writes waited for it
	Clones      []string `json:"clones,omitempty"`
}

func snapshotOf(s *api.Snapshot) snapshotView {
	return snapshotView{
		ID: s.GetId(), Name: s.GetName(), Volume: s.GetVolume(), VolumeName: s.GetVolumeName(), State: s.GetState(),
		Reason: s.GetReason(), SizeBytes: s.GetSizeBytes(), Generation: s.GetGeneration(), Created: s.GetCreated(),
		HeldSeconds: s.GetHeldSeconds(), Clones: s.GetClones(),
	}
}

func snapshotTable(all []snapshotView) table {
	t := table{header: []string{"NAME", "VOLUME", "STATE", "SIZE", "CREATED", "ID"}}
	for _, s := range all {
		t.rows = append(t.rows, []string{s.Name, s.VolumeName, s.State, sizeText(s.SizeBytes), s.Created, s.ID})
	}
	return t
}

// showSnapshot prints one snapshot.
func (o *options) showSnapshot(cmd *cobra.Command, s *api.Snapshot) error {
	view, out := snapshotOf(s), cmd.OutOrStdout()
	if err := o.show(out, view, snapshotTable([]snapshotView{view})); err != nil || o.output == outputJSON {
		return err
	}
	if view.Reason != "" {
		fmt.Fprintf(out, "reason: %s\n", view.Reason)
	}
	if view.HeldSeconds > 0 {
		fmt.Fprintf(out, "writes were held for %v\n",
			time.Duration(view.HeldSeconds*float64(time.Second)).Round(10*time.Microsecond))
	}
	if len(view.Clones) > 0 {
		fmt.Fprintf(out, "needed by clones until they are flattened: %s\n", strings.Join(view.Clones, ", "))
	}
	return nil
}

func newSnapshotCreate(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "create VOLUME NAME",
		Short: "Make a snapshot of a volume, in use or not; the same command again is success",
		Long: "Make a snapshot of a volume, in use or not. It shows every write that was acknowledged before, cached or\n" +
			"not. A filesystem on it is as after a power cut: it replays its journal when the snapshot is restored. Run\n" +
			"sync, or fsfreeze, first for files that programs have not synced.",
		Args: exactArgs("VOLUME", "NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				s, err := c.CreateSnapshot(ctx, &api.CreateSnapshotRequest{Volume: args[0], Name: args[1]})
				if err != nil {
					return err
				}
				return o.showSnapshot(cmd, s)
			})
		},
	}
}

func newSnapshotList(o *options) *cobra.Command {
	var volume string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the snapshots",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				resp, err := c.ListSnapshots(ctx, &api.ListSnapshotsRequest{Volume: volume})
				if err != nil {
					return err
				}
				all := []snapshotView{}
				for _, s := range resp.GetSnapshots() {
					all = append(all, snapshotOf(s))
				}
				slices.SortFunc(all, func(a, b snapshotView) int {
					return cmp.Or(cmp.Compare(a.VolumeName, b.VolumeName), cmp.Compare(a.Volume, b.Volume),
						cmp.Compare(a.Generation, b.Generation), cmp.Compare(a.Name, b.Name))
				})
				return o.show(cmd.OutOrStdout(), all, snapshotTable(all))
			})
		},
	}
	cmd.Flags().StringVar(&volume, "volume", "", "only those of this volume")
	return cmd
}

func newSnapshotShow(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "show SNAPSHOT",
		Short: "Show a snapshot",
		Args:  exactArgs("SNAPSHOT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				s, err := c.GetSnapshot(ctx, &api.SnapshotRequest{Name: args[0]})
				if err != nil {
					return err
				}
				return o.showSnapshot(cmd, s)
			})
		},
	}
}

func newSnapshotDelete(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "delete SNAPSHOT",
		Short: "Delete a snapshot; an absent one is success",
		Long: "Delete a snapshot. Its space comes back in the background. While a clone of it is not flattened yet, it\n" +
			"stays, as Deleting, and goes by itself.",
		Args: exactArgs("SNAPSHOT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				if _, err := c.DeleteSnapshot(ctx, &api.SnapshotRequest{Name: args[0]}); err != nil {
					return err
				}
				return o.show(cmd.OutOrStdout(), map[string]string{"deleted": args[0]},
					table{rows: [][]string{{"deleted " + args[0]}}})
			})
		},
	}
}
