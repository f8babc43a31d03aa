package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet/api"
)

func newReplica(o *options) *cobra.Command {
	return group("replica", "See the replicas of a volume and move them", newReplicaList(o), newReplicaMove(o))
}

func newReplicaList(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "list NAME",
		Short: "List the replicas of a volume, those included that left it and whose data is still to be removed",
		Args:  exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				v, err := c.GetVolume(ctx, &api.VolumeRequest{Name: args[0]})
				if err != nil {
					return err
				}
				view := volumeOf(v)
				return o.show(cmd.OutOrStdout(), slices.Concat(view.Replicas, view.Retired), replicaTable(view))
			})
		},
	}
}

func newReplicaMove(o *options) *cobra.Command {
	var wait bool
	cmd := &cobra.Command{
		Use:   "move NAME FROM-NODE TO-NODE",
		Short: "Move a volume's replica from one node to another",
		Long: "Make a replica of the volume on TO-NODE, on its emptiest disk, fill it, and take the one on\n" +
			"FROM-NODE out once the new one has everything and votes. The volume stays in use.",
		Args: exactArgs("NAME", "FROM-NODE", "TO-NODE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				v, err := c.MoveReplica(ctx, &api.MoveReplicaRequest{Name: args[0], From: args[1], To: args[2]})
				if err != nil {
					return err
				}
				if wait {
					if v, err = awaitMove(ctx, c, v, args[2]); err != nil {
						return err
					}
				}
				return o.showVolume(cmd, v)
			})
		},
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "return once the old replica has left, at most --timeout")
	return cmd
}

// awaitMove waits until the replica that is being made on node is the only one of its move.
func awaitMove(ctx context.Context, c *client, v *api.Volume, node string) (*api.Volume, error) {
	made := ""
	for _, r := range v.GetReplicas() {
		if r.GetNode() == node {
			made = r.GetId()
		}
	}
	err := await(ctx, fmt.Sprintf("move replica of %q to %s", v.GetName(), node),
		func(ctx context.Context) (string, error) {
			now, err := c.GetVolume(ctx, &api.VolumeRequest{Name: v.GetId()})
			if err != nil {
				return "", err
			}
			v = now
			return moveLeft(v, made)
		})
	return v, err
}

// moveLeft says what is left of a move to the replica made; an error when it was given up.
func moveLeft(v *api.Volume, made string) (string, error) {
	i := slices.IndexFunc(v.GetReplicas(), func(r *api.Replica) bool { return r.GetId() == made })
	if i < 0 || v.GetReplicas()[i].GetState() == "Leaving" {
		return "", fmt.Errorf("the new replica %s was given up; `trivet volume show %s` shows how the volume is", made,
			v.GetName())
	}
	for _, r := range v.GetReplicas() {
		if changing(r.GetState()) {
			return fmt.Sprintf("the replica on %s is %s", r.GetNode(), r.GetState()), nil
		}
	}
	return "", nil
}

// changing reports whether a replica in that state is on its way in or out.
func changing(state string) bool {
	return state == "Joining" || state == "Filling" || state == "Leaving"
}

func newVolumeSetReplicas(o *options) *cobra.Command {
	var wait bool
	cmd := &cobra.Command{
		Use:   "set-replicas NAME N",
		Short: "Say how many replicas a volume should have: 1, 3 or 5; it stays in use meanwhile",
		Args:  exactArgs("NAME", "N"),
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := strconv.Atoi(args[1])
			if err != nil || n != 1 && n != 3 && n != 5 {
				return usageError{fmt.Errorf("%q replicas: want 1, 3 or 5", args[1])}
			}
			return o.call(cmd, func(ctx context.Context, c *client) error {
				v, err := c.SetReplicas(ctx, &api.SetReplicasRequest{Name: args[0], Count: int32(n)})
				if err != nil {
					return err
				}
				if wait {
					err := await(ctx, fmt.Sprintf("set replicas of %q to %d", v.GetName(), n),
						func(ctx context.Context) (string, error) {
							now, err := c.GetVolume(ctx, &api.VolumeRequest{Name: v.GetId()})
							if err != nil {
								return "", err
							}
							v = now
							return replicasLeft(v), nil
						})
					if err != nil {
						return err
					}
				}
				return o.showVolume(cmd, v)
			})
		},
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "return once it has them, at most --timeout")
	return cmd
}

// replicasLeft says what a volume lacks of the replicas that are wanted.
func replicasLeft(v *api.Volume) string {
	ready := 0
	for _, r := range v.GetReplicas() {
		if s := r.GetState(); s == "Ready" || s == "Parked" {
			ready++
		}
	}
	if want := int(v.GetWantReplicas()); ready != want || len(v.GetReplicas()) != want {
		left := fmt.Sprintf("%d of %d replicas are ready, want %d", ready, len(v.GetReplicas()), want)
		if v.GetPending() != "" {
			left += ": " + v.GetPending()
		}
		return left
	}
	return ""
}
