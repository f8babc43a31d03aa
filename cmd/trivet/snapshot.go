package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet/api"
)

func newSnapshot(o *options) *cobra.Command {
	return group("snapshot", "Make, restore and remove snapshots of volumes",
		newSnapshotCreate(o), newSnapshotList(o), newSnapshotShow(o), newSnapshotDelete(o), newSnapshotRestore(o),
		newSnapshotDiff(o))
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
	Group       string   `json:"group,omitempty"` // ID of the group that it was made with
	GroupName   string   `json:"groupName,omitempty"`
}

func snapshotOf(s *api.Snapshot) snapshotView {
	return snapshotView{
		ID: s.GetId(), Name: s.GetName(), Volume: s.GetVolume(), VolumeName: s.GetVolumeName(), State: s.GetState(),
		Reason: s.GetReason(), SizeBytes: s.GetSizeBytes(), Generation: s.GetGeneration(), Created: s.GetCreated(),
		HeldSeconds: s.GetHeldSeconds(), Clones: s.GetClones(), Group: s.GetGroup(), GroupName: s.GetGroupName(),
	}
}

func snapshotTable(all []snapshotView) table {
	t := table{header: []string{"NAME", "VOLUME", "GROUP", "STATE", "SIZE", "CREATED", "ID"}}
	for _, s := range all {
		t.rows = append(t.rows, []string{
			s.Name, s.VolumeName, s.GroupName, s.State, sizeText(s.SizeBytes), s.Created, s.ID,
		})
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
	var group string
	cmd := &cobra.Command{
		Use:   "create VOLUME NAME | create --group NAME VOLUME...",
		Short: "Make a snapshot of a volume, or of several at one point; the same command again is success",
		Long: "Make a snapshot of a volume, in use or not. It shows every write that was acknowledged before, cached or\n" +
			"not. A filesystem on it is as after a power cut: it replays its journal when the snapshot is restored. Run\n" +
			"sync, or fsfreeze, first for files that programs have not synced.\n\n" +
			"With --group, snapshots of several volumes are made at one point: what was written to one after something was\n" +
			"written to another is in its snapshot only if that is in the other's. Writes to all of them wait for some\n" +
			"milliseconds. The snapshots are named NAME/VOLUME, and are deleted together.",
		Args: func(cmd *cobra.Command, args []string) error {
			if group == "" {
				return exactArgs("VOLUME", "NAME")(cmd, args)
			}
			if len(args) == 0 {
				return usageError{errors.New("name the volumes of the group")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if group != "" {
				return o.createGroup(cmd, group, args)
			}
			return o.call(cmd, func(ctx context.Context, c *client) error {
				s, err := c.CreateSnapshot(ctx, &api.CreateSnapshotRequest{Volume: args[0], Name: args[1]})
				if err != nil {
					return err
				}
				return o.showSnapshot(cmd, s)
			})
		},
	}
	cmd.Flags().StringVar(&group, "group", "", "make snapshots of several volumes at one point, as a group of this name")
	return cmd
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
	var group bool
	cmd := &cobra.Command{
		Use:   "show SNAPSHOT | show --group GROUP",
		Short: "Show a snapshot, or a group of them",
		Args:  exactArgs("SNAPSHOT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if group {
				return o.getGroup(cmd, args[0])
			}
			return o.call(cmd, func(ctx context.Context, c *client) error {
				s, err := c.GetSnapshot(ctx, &api.SnapshotRequest{Name: args[0]})
				if err != nil {
					return err
				}
				return o.showSnapshot(cmd, s)
			})
		},
	}
	cmd.Flags().BoolVar(&group, "group", false, "show a group of snapshots, by its name or ID")
	return cmd
}

func newSnapshotDelete(o *options) *cobra.Command {
	var group bool
	cmd := &cobra.Command{
		Use:   "delete SNAPSHOT | delete --group GROUP",
		Short: "Delete a snapshot; an absent one is success",
		Long: "Delete a snapshot. Its space comes back in the background. While a clone of it is not flattened yet, it\n" +
			"stays, as Deleting, and goes by itself. One that was made in a group goes with the group only: --group\n" +
			"deletes a group with all its snapshots.",
		Args: exactArgs("SNAPSHOT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				var err error
				if group {
					_, err = c.DeleteSnapshotGroup(ctx, &api.SnapshotGroupRequest{Name: args[0]})
				} else {
					_, err = c.DeleteSnapshot(ctx, &api.SnapshotRequest{Name: args[0]})
				}
				if err != nil {
					return err
				}
				return o.show(cmd.OutOrStdout(), map[string]string{"deleted": args[0]},
					table{rows: [][]string{{"deleted " + args[0]}}})
			})
		},
	}
	cmd.Flags().BoolVar(&group, "group", false, "delete a group of snapshots, by its name or ID")
	return cmd
}

func newSnapshotRestore(o *options) *cobra.Command {
	var (
		size         string
		params       []string
		inPlace, yes bool
	)
	cmd := &cobra.Command{
		Use:   "restore SNAPSHOT NEWVOLUME | restore --in-place --yes SNAPSHOT",
		Short: "Make a volume that begins with what a snapshot shows, or bring its own volume back to it",
		Long: "Make a volume that begins with what a snapshot shows; the same command again is success. With --in-place\n" +
			"the snapshot's own volume is brought back to it: what was written since is gone, unless a later snapshot\n" +
			"has it. That volume must not be attached.",
		Args: func(cmd *cobra.Command, args []string) error {
			if inPlace {
				return exactArgs("SNAPSHOT")(cmd, args)
			}
			return exactArgs("SNAPSHOT", "NEWVOLUME")(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			sizeBytes, parameters, err := copyFlags(size, params)
			if err != nil {
				return err
			}
			switch {
			case inPlace && (size != "" || len(params) > 0):
				return usageError{errors.New("--size and --param are for a new volume, not for --in-place")}
			case inPlace && !yes:
				return usageError{fmt.Errorf("what was written to the volume since %q is lost; say --yes if you mean it, and make "+
					"a snapshot of it first if you are not sure", args[0])}
			}
			return o.call(cmd, func(ctx context.Context, c *client) error {
				r := &api.RestoreSnapshotRequest{
					Snapshot: args[0], SizeBytes: sizeBytes, Parameters: parameters, InPlace: inPlace,
				}
				if !inPlace {
					r.Name = args[1]
				}
				v, err := c.RestoreSnapshot(ctx, r)
				if err != nil {
					return err
				}
				return o.showVolume(cmd, v)
			})
		},
	}
	addCopyFlags(cmd, &size, &params)
	cmd.Flags().BoolVar(&inPlace, "in-place", false, "bring the snapshot's own volume back to it")
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask: what was written since is lost")
	return cmd
}

func addCopyFlags(cmd *cobra.Command, size *string, params *[]string) {
	cmd.Flags().StringVar(size, "size", "", "size of the new volume, as 10Gi; at least that of the source (default)")
	cmd.Flags().StringArrayVar(params, "param", nil,
		"StorageClass parameter KEY=VALUE; with any given, none is taken from the source")
}

// copyFlags reads what addCopyFlags has added.
func copyFlags(size string, params []string) (sizeBytes int64, parameters map[string]string, err error) {
	if size != "" {
		if sizeBytes, err = parseSize(size); err != nil {
			return 0, nil, err
		}
	}
	parameters, err = parsePairs("--param", params)
	return sizeBytes, parameters, err
}

func newVolumeClone(o *options) *cobra.Command {
	var (
		size   string
		params []string
	)
	cmd := &cobra.Command{
		Use:   "clone SOURCE NEW",
		Short: "Make a volume that begins as a copy of another, in use or not; the same command again is success",
		Args:  exactArgs("SOURCE", "NEW"),
		RunE: func(cmd *cobra.Command, args []string) error {
			sizeBytes, parameters, err := copyFlags(size, params)
			if err != nil {
				return err
			}
			return o.call(cmd, func(ctx context.Context, c *client) error {
				v, err := c.CloneVolume(ctx, &api.CloneVolumeRequest{
					Source: args[0], Name: args[1], SizeBytes: sizeBytes, Parameters: parameters,
				})
				if err != nil {
					return err
				}
				return o.showVolume(cmd, v)
			})
		},
	}
	addCopyFlags(cmd, &size, &params)
	return cmd
}

// extentView is a run of bytes.
type extentView struct {
	Offset    int64 `json:"offset"`
	SizeBytes int64 `json:"sizeBytes"`
}

func newSnapshotDiff(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "diff FROM TO",
		Short: "List what a snapshot shows differently from an earlier one, in bytes",
		Long: "List the ranges, in bytes and in order, in which snapshot TO may show something else than the earlier\n" +
			"snapshot FROM of the same volume. With - for FROM, the ranges in which TO holds data. Nothing that differs\n" +
			"is left out.",
		Args: exactArgs("FROM", "TO"),
		RunE: func(cmd *cobra.Command, args []string) error {
			from := strings.TrimPrefix(args[0], "-")
			return o.call(cmd, func(ctx context.Context, c *client) error {
				stream, err := c.DiffSnapshots(ctx, &api.DiffSnapshotsRequest{From: from, To: args[1]})
				if err != nil {
					return err
				}
				all := []extentView{}
				for {
					page, err := stream.Recv()
					if errors.Is(err, io.EOF) {
						break
					}
					if err != nil {
						return err
					}
					for _, x := range page.GetExtents() {
						all = appendRun(all, extentView{x.GetOffset(), x.GetSizeBytes()})
					}
				}
				t := table{header: []string{"OFFSET", "SIZE"}}
				for _, x := range all {
					t.rows = append(t.rows, []string{itoa(x.Offset), itoa(x.SizeBytes)})
				}
				return o.show(cmd.OutOrStdout(), all, t)
			})
		},
	}
}

// appendRun appends a range, or makes the last one longer that it follows.
func appendRun(all []extentView, x extentView) []extentView {
	if n := len(all); n > 0 && all[n-1].Offset+all[n-1].SizeBytes == x.Offset {
		all[n-1].SizeBytes += x.SizeBytes
		return all
	}
	return append(all, x)
}
