package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet/api"
)

// groupView is what `-o json` prints of a group of snapshots.
type groupView struct {
	ID          string         `json:"id"`
	Name        string         `json:"name"`
	State       string         `json:"state"`
	Reason      string         `json:"reason,omitempty"`
	Created     string         `json:"created"`
	HeldSeconds float64        `json:"heldSeconds"` // the longest time that writes to one of the volumes waited
	Snapshots   []snapshotView `json:"snapshots"`
}

func groupOf(g *api.SnapshotGroup) groupView {
	view := groupView{
		ID: g.GetId(), Name: g.GetName(), State: g.GetState(), Reason: g.GetReason(), Created: g.GetCreated(),
		HeldSeconds: g.GetHeldSeconds(), Snapshots: []snapshotView{},
	}
	for _, s := range g.GetSnapshots() {
		view.Snapshots = append(view.Snapshots, snapshotOf(s))
	}
	return view
}

// showGroup prints one group and its snapshots.
func (o *options) showGroup(cmd *cobra.Command, g *api.SnapshotGroup) error {
	view, out := groupOf(g), cmd.OutOrStdout()
	if err := o.show(out, view, snapshotTable(view.Snapshots)); err != nil || o.output == outputJSON {
		return err
	}
	fmt.Fprintf(out, "group %s (%s): %s\n", view.Name, view.ID, view.State)
	if view.Reason != "" {
		fmt.Fprintf(out, "reason: %s\n", view.Reason)
	}
	if view.HeldSeconds > 0 {
		fmt.Fprintf(out, "writes were held for %v at most\n",
			time.Duration(view.HeldSeconds*float64(time.Second)).Round(10*time.Microsecond))
	}
	return nil
}

func (o *options) createGroup(cmd *cobra.Command, name string, volumes []string) error {
	return o.call(cmd, func(ctx context.Context, c *client) error {
		g, err := c.CreateSnapshotGroup(ctx, &api.CreateSnapshotGroupRequest{Name: name, Volumes: volumes})
		if err != nil {
			return err
		}
		return o.showGroup(cmd, g)
	})
}

func (o *options) getGroup(cmd *cobra.Command, name string) error {
	return o.call(cmd, func(ctx context.Context, c *client) error {
		g, err := c.GetSnapshotGroup(ctx, &api.SnapshotGroupRequest{Name: name})
		if err != nil {
			return err
		}
		return o.showGroup(cmd, g)
	})
}
