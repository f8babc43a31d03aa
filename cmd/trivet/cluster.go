package main

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet/api"
)

func newCluster(o *options) *cobra.Command {
	init := &cobra.Command{
		Use:   "init",
		Short: "Give birth to a cluster on the server in --server; the others join it through their --seed",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				resp, err := c.InitCluster(ctx, &api.InitClusterRequest{})
				if err != nil {
					return err
				}
				view := map[string]string{"cluster": resp.GetCluster(), "node": resp.GetNode()}
				return o.show(cmd.OutOrStdout(), view, table{
					header: []string{"CLUSTER", "FIRST NODE"},
					rows:   [][]string{{resp.GetCluster(), resp.GetNode()}},
				})
			})
		},
	}
	status := &cobra.Command{
		Use:   "status",
		Short: "Show the catalogue's leader, the nodes, the volumes by phase and what needs attention",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				resp, err := c.ClusterStatus(ctx, &api.ClusterStatusRequest{})
				if err != nil {
					return err
				}
				return o.showStatus(cmd, resp)
			})
		},
	}
	return group("cluster", "Make a cluster and see how it is", init, status, newClusterRecover(o))
}

type statusView struct {
	Cluster  string           `json:"cluster"`
	Leader   string           `json:"leader"`
	Revision uint64           `json:"revision"`
	Nodes    []nodeView       `json:"nodes"`
	Volumes  map[string]int32 `json:"volumesByPhase"`
	Warnings []string         `json:"warnings"`
}

func (o *options) showStatus(cmd *cobra.Command, resp *api.ClusterStatusResponse) error {
	view := statusView{
		Cluster: resp.GetCluster(), Leader: resp.GetLeader(), Revision: resp.GetRevision(), Nodes: []nodeView{},
		Volumes: resp.GetVolumesByPhase(), Warnings: append([]string{}, resp.GetWarnings()...),
	}
	for _, n := range resp.GetNodes() {
		view.Nodes = append(view.Nodes, nodeOf(n))
	}
	out := cmd.OutOrStdout()
	if o.output == outputTable {
		fmt.Fprintf(out, "cluster %s, catalogue led by %s at revision %d\n\n", view.Cluster, view.Leader, view.Revision)
	}
	if err := o.show(out, view, nodeTable(view.Nodes)); err != nil {
		return err
	}
	if o.output == outputJSON {
		return nil
	}
	fmt.Fprint(out, "\nvolumes:")
	for _, phase := range slices.Sorted(maps.Keys(view.Volumes)) {
		fmt.Fprintf(out, " %d %s", view.Volumes[phase], phase)
	}
	if len(view.Volumes) == 0 {
		fmt.Fprint(out, " none")
	}
	fmt.Fprintln(out)
	for _, w := range view.Warnings {
		fmt.Fprintf(out, "warning: %s\n", w)
	}
	return nil
}

func newNode(o *options) *cobra.Command {
	list := &cobra.Command{
		Use:   "list",
		Short: "List the nodes with their state, role and disks",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				resp, err := c.ListNodes(ctx, &api.ListNodesRequest{})
				if err != nil {
					return err
				}
				nodes := []nodeView{}
				for _, n := range resp.GetNodes() {
					nodes = append(nodes, nodeOf(n))
				}
				return o.show(cmd.OutOrStdout(), nodes, nodeTable(nodes))
			})
		},
	}
	return group("node", "See the nodes, keep replicas off them and empty them",
		list, newNodeCordon(o), newNodeUncordon(o), newNodeDrain(o), newNodePlace(o),
		newNodeForget(o))
}
