package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet/api"
)

func newNodeCordon(o *options) *cobra.Command {
	return newNodeVerb(o, "cordon", "Place no more replicas on a node; those it has stay",
		&api.CordonNodeRequest{Cordoned: true})
}

func newNodeUncordon(o *options) *cobra.Command {
	return newNodeVerb(o, "uncordon", "Place replicas on a node again; this ends a drain, too", &api.CordonNodeRequest{})
}

// newNodeVerb makes a command that marks a node as r says.
func newNodeVerb(o *options, verb, short string, r *api.CordonNodeRequest) *cobra.Command {
	return &cobra.Command{
		Use:   verb + " NAME",
		Short: short,
		Args:  exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				st, err := c.CordonNode(ctx, &api.CordonNodeRequest{
					Node: args[0], Cordoned: r.GetCordoned(), Draining: r.GetDraining(),
				})
				if err != nil {
					return err
				}
				view := nodeOf(st.GetNode())
				return o.show(cmd.OutOrStdout(), view, nodeTable([]nodeView{view}))
			})
		},
	}
}

func newNodeDrain(o *options) *cobra.Command {
	var wait bool
	cmd := &cobra.Command{
		Use:   "drain NAME",
		Short: "Move the replicas and leaders of a node elsewhere, and place no more there",
		Long: "Move the replicas and leaders of a node elsewhere, a few at a time, and place no more there, until\n" +
			"`trivet node uncordon NAME`. Prints what is left on the node and what it waits for. Volumes that are\n" +
			"attached to the node stay so: move what uses them (kubectl drain) or detach them.",
		Example: "  trivet node drain n3 --wait --timeout 2h",
		Args:    exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				st, err := c.CordonNode(ctx, &api.CordonNodeRequest{Node: args[0], Cordoned: true, Draining: true})
				if err != nil {
					return err
				}
				var waitErr error
				if wait {
					waitErr = await(ctx, "drain "+args[0], func(ctx context.Context) (string, error) {
						now, err := c.GetNode(ctx, &api.NodeRequest{Node: args[0]})
						if err != nil {
							return "", err
						}
						st = now
						return drainLeft(st)
					})
				}
				if err := o.showDrain(cmd, st); err != nil {
					return err
				}
				return waitErr
			})
		},
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "return once no replica is left, at most --timeout")
	return cmd
}

// drainLeft says how much is left on a node that is being drained; an error when somebody ended that.
func drainLeft(st *api.NodeStatus) (string, error) {
	if !st.GetNode().GetDraining() {
		return "", fmt.Errorf("node %s was uncordoned meanwhile", st.GetNode().GetId())
	}
	n := 0
	for _, r := range st.GetRemaining() {
		if r.GetReplica() != "" {
			n++
		}
	}
	if n == 0 {
		return "", nil
	}
	return fmt.Sprintf("replicas left: %d", n), nil
}

type drainView struct {
	Node      nodeView        `json:"node"`
	Remaining []remainingView `json:"remaining"`
}

type remainingView struct {
	Volume   string `json:"volume"`
	Name     string `json:"name"`
	Replica  string `json:"replica,omitempty"`
	State    string `json:"state,omitempty"`
	Leader   bool   `json:"leader"`
	Attached bool   `json:"attached"`
	Reason   string `json:"reason,omitempty"`
}

func drainOf(st *api.NodeStatus) drainView {
	view := drainView{Node: nodeOf(st.GetNode()), Remaining: []remainingView{}}
	for _, r := range st.GetRemaining() {
		view.Remaining = append(view.Remaining, remainingView{
			Volume: r.GetVolume(), Name: r.GetName(), Replica: r.GetReplica(), State: r.GetState(), Leader: r.GetLeader(),
			Attached: r.GetAttached(), Reason: r.GetReason(),
		})
	}
	return view
}

// showDrain prints a node and what is left on it.
func (o *options) showDrain(cmd *cobra.Command, st *api.NodeStatus) error {
	view, out := drainOf(st), cmd.OutOrStdout()
	if err := o.show(out, view, nodeTable([]nodeView{view.Node})); err != nil || o.output == outputJSON {
		return err
	}
	fmt.Fprintln(out)
	if len(view.Remaining) == 0 {
		fmt.Fprintln(out, "nothing is left on it")
		return nil
	}
	return o.show(out, view, remainingTable(view.Remaining))
}

func remainingTable(remaining []remainingView) table {
	yes := map[bool]string{true: "yes"}
	t := table{header: []string{"VOLUME", "REPLICA", "STATE", "LEADER", "ATTACHED", "WAITS FOR"}}
	for _, r := range remaining {
		t.rows = append(t.rows, []string{r.Name, r.Replica, r.State, yes[r.Leader], yes[r.Attached], r.Reason})
	}
	return t
}

func newNodePlace(o *options) *cobra.Command {
	var (
		zone, rack string
		own        bool
	)
	cmd := &cobra.Command{
		Use:   "place NAME",
		Short: "Say in which zone and rack a node stands",
		Long: "Say in which zone and rack a node stands, at once and whatever its server says of itself when it starts\n" +
			"again, until --own. Replicas stay where they are. On Kubernetes the CSI controller does this from labels,\n" +
			"and would say them again.",
		Example: "  trivet node place n3 --zone west --rack r7\n  trivet node place n3 --rack ''",
		Args:    exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			r := &api.PlaceNodeRequest{Node: args[0], Own: own}
			if cmd.Flags().Changed("zone") {
				r.Zone = &zone
			}
			if cmd.Flags().Changed("rack") {
				r.Rack = &rack
			}
			if own != (r.Zone == nil && r.Rack == nil) {
				return usageError{errors.New("give --zone, --rack or both, or else --own")}
			}
			return o.call(cmd, func(ctx context.Context, c *client) error {
				st, err := c.PlaceNode(ctx, r)
				if err != nil {
					return err
				}
				view := nodeOf(st.GetNode())
				return o.show(cmd.OutOrStdout(), view, nodeTable([]nodeView{view}))
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&zone, "zone", "", "its zone; empty: none")
	f.StringVar(&rack, "rack", "", "its rack, within the zone; empty: none")
	f.BoolVar(&own, "own", false, "let its server say both again, by its own flags")
	return cmd
}

type forgetView struct {
	Forgotten []string `json:"forgotten"`
}

func newNodeForget(o *options) *cobra.Command {
	var allow bool
	cmd := &cobra.Command{
		Use:   "forget NAME",
		Short: "Take a node that does not come back off the record",
		Long: "Take a node that does not come back off the record. Refused while it is up, while a volume is attached\n" +
			"to it, and while it has replicas: drain it first, or wait until they are replaced. It leaves the\n" +
			"catalogue, what it had of deleted volumes is no longer waited for, and nothing may join under its\n" +
			"name until `trivet node forget NAME --allow`. Prints the nodes that are forgotten.",
		Args: exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				resp, err := c.ForgetNode(ctx, &api.ForgetNodeRequest{Node: args[0], Allow: allow})
				if err != nil {
					return err
				}
				view := forgetView{Forgotten: append([]string{}, resp.GetForgotten()...)}
				t := table{header: []string{"FORGOTTEN"}}
				for _, name := range view.Forgotten {
					t.rows = append(t.rows, []string{name})
				}
				return o.show(cmd.OutOrStdout(), view, t)
			})
		},
	}
	cmd.Flags().BoolVar(&allow, "allow", false, "let a forgotten node join again, as a new one, with empty directories")
	return cmd
}
