package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet/api"
)

func newVolume(o *options) *cobra.Command {
	return group("volume", "Make, attach and remove volumes",
		newVolumeCreate(o), newVolumeList(o), newVolumeShow(o), newVolumeAttach(o), newVolumeDetach(o),
		newVolumeServe(o), newVolumeDelete(o), newVolumeMoveLeader(o), newVolumeReclaim(o), newVolumeSetReplicas(o),
		newVolumeSet(o), newVolumeExplain(o), newVolumeScrub(o), newVolumeVerify(o), newVolumeResize(o), newVolumeClone(o),
		newVolumePV(o), newVolumeLabel(o),
		newVolumeVerb(o, "release NAME", "End the claim of a volume; its reclaim policy decides what follows",
			func(ctx context.Context, c *client, args []string) (*api.Volume, error) {
				return c.ReleaseVolume(ctx, &api.VolumeRequest{Name: args[0]})
			}),
	)
}

// showVolume prints one volume: a line about it and a line for each replica.
func (o *options) showVolume(cmd *cobra.Command, v *api.Volume) error {
	view := volumeOf(v)
	out := cmd.OutOrStdout()
	if o.output == outputJSON {
		return o.show(out, view, table{})
	}
	if err := o.show(out, view, volumeTable([]volumeView{view})); err != nil {
		return err
	}
	if view.Reason != "" {
		fmt.Fprintf(out, "reason: %s\n", view.Reason)
	}
	if view.Device != "" {
		fmt.Fprintf(out, "device: %s\n", view.Device)
	}
	fmt.Fprintf(out, "replicas wanted: %d\n", view.Want)
	if len(view.Parameters) > 0 {
		fmt.Fprintf(out, "parameters: %s\n", pairsText(view.Parameters))
	}
	if len(view.Labels) > 0 {
		fmt.Fprintf(out, "labels: %s\n", pairsText(view.Labels))
	}
	view.Usage.print(out)
	if view.WantSize > 0 {
		fmt.Fprintf(out, "growing to: %s\n", sizeText(view.WantSize))
	}
	if view.Pending != "" {
		fmt.Fprintf(out, "pending: %s\n", view.Pending)
	}
	fmt.Fprintln(out)
	return o.show(out, view, replicaTable(view))
}

// newVolumeVerb makes a command whose arguments are the words of use after the first, and which shows
// the volume that verb returns.
func newVolumeVerb(o *options, use, short string,
	verb func(ctx context.Context, c *client, args []string) (*api.Volume, error),
) *cobra.Command {
	return &cobra.Command{
		Use:   use,
		Short: short,
		Args:  exactArgs(strings.Fields(use)[1:]...),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				v, err := verb(ctx, c, args)
				if err != nil {
					return err
				}
				return o.showVolume(cmd, v)
			})
		},
	}
}

func newVolumeCreate(o *options) *cobra.Command {
	var (
		size           string
		params, labels []string
	)
	cmd := &cobra.Command{
		Use:   "create NAME --size SIZE",
		Short: "Create a volume; the same command again is success",
		Example: "  trivet volume create db --size 10Gi\n" +
			"  trivet volume create scratch --size 1Gi --param replicas=1 --param iopsLimit=500",
		Args: exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			sizeBytes, err := parseSize(size)
			if err != nil {
				return err
			}
			parameters, err := parsePairs("--param", params)
			if err != nil {
				return err
			}
			named, err := parsePairs("--label", labels)
			if err != nil {
				return err
			}
			return o.call(cmd, func(ctx context.Context, c *client) error {
				v, err := c.CreateVolume(ctx, &api.CreateVolumeRequest{
					Name: args[0], SizeBytes: sizeBytes, Parameters: parameters, Labels: named,
				})
				if err != nil {
					return err
				}
				return o.showVolume(cmd, v)
			})
		},
	}
	cmd.Flags().StringVar(&size, "size", "", "size, as 10Gi or 512Mi")
	cmd.Flags().StringArrayVar(&params, "param", nil, "StorageClass parameter KEY=VALUE; may be given several times")
	cmd.Flags().StringArrayVar(&labels, "label", nil, "label KEY=VALUE of a new volume; may be given several times")
	if err := cmd.MarkFlagRequired("size"); err != nil {
		panic(err) // the flag is defined a few lines above
	}
	return cmd
}

func newVolumeList(o *options) *cobra.Command {
	var wide bool
	var selector string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the volumes",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				resp, err := c.ListVolumes(ctx, &api.ListVolumesRequest{Usage: wide, Selector: selector})
				if err != nil {
					return err
				}
				volumes := []volumeView{}
				for _, v := range resp.GetVolumes() {
					volumes = append(volumes, volumeOf(v))
				}
				if wide {
					return o.show(cmd.OutOrStdout(), volumes, usageTable(volumes))
				}
				return o.show(cmd.OutOrStdout(), volumes, volumeTable(volumes))
			})
		},
	}
	cmd.Flags().BoolVar(&wide, "wide", false, "with what their blocks are there for, counted in the last minute")
	cmd.Flags().StringVarP(&selector, "selector", "l", "",
		"only those whose labels match, as 'tier=gold,env in (prod,test),!old'")
	return cmd
}

func newVolumeShow(o *options) *cobra.Command {
	return newVolumeVerb(o, "show NAME", "Show a volume and its replicas",
		func(ctx context.Context, c *client, args []string) (*api.Volume, error) {
			return c.GetVolume(ctx, &api.VolumeRequest{Name: args[0]})
		})
}

func newVolumeAttach(o *options) *cobra.Command {
	var node string
	var r api.VolumeRequest
	cmd := &cobra.Command{
		Use:   "attach NAME",
		Short: "Attach a volume to a node as a block device and print the device",
		Long: "Attach a volume to a node as a block device and print the device. With --shared two nodes may have it at\n" +
			"a time, and both write, as on a shared disk: no filesystem but one made for that survives it.",
		Args: exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			address, err := o.addressOf(cmd, node)
			if err != nil {
				return err
			}
			return o.callAt(cmd, address, func(ctx context.Context, c *client) error {
				r.Name = args[0]
				resp, err := c.AttachVolume(ctx, &r)
				if err != nil {
					return err
				}
				if o.output == outputJSON {
					return o.show(cmd.OutOrStdout(), volumeOf(resp.GetVolume()), table{})
				}
				_, err = fmt.Fprintln(cmd.OutOrStdout(), resp.GetDevice())
				return err
			})
		},
	}
	cmd.Flags().StringVar(&node, "node", "", "node to attach to (default: the one in --server)")
	sharedFlags(cmd, &r.Shared, &r.With)
	return cmd
}

func newVolumeDetach(o *options) *cobra.Command {
	var (
		node  string
		force bool
	)
	cmd := &cobra.Command{
		Use:   "detach NAME",
		Short: "Detach a volume from a node",
		Long: "Detach a volume from the node in --server or --node. With --force the node that holds the volume\n" +
			"is fenced even if it does not answer: what it has not flushed is lost, and it can never write again.",
		Args: exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			address, err := o.addressOf(cmd, node)
			if err != nil {
				return err
			}
			return o.callAt(cmd, address, func(ctx context.Context, c *client) error {
				v, err := c.DetachVolume(ctx, &api.DetachVolumeRequest{Name: args[0], Force: force})
				if err != nil {
					return err
				}
				return o.showVolume(cmd, v)
			})
		},
	}
	cmd.Flags().StringVar(&node, "node", "", "node to detach from (default: the one in --server)")
	cmd.Flags().BoolVar(&force, "force", false, "fence whichever node holds it")
	return cmd
}

func newVolumeDelete(o *options) *cobra.Command {
	var skipWipe bool
	cmd := &cobra.Command{
		Use:   "delete NAME",
		Short: "Delete a volume and its data, whatever its reclaim policy; an absent one is success",
		Args:  exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				if _, err := c.DeleteVolume(ctx, &api.VolumeRequest{Name: args[0], SkipWipe: skipWipe}); err != nil {
					return err
				}
				return o.show(cmd.OutOrStdout(), map[string]string{"deleted": args[0]},
					table{rows: [][]string{{"deleted " + args[0]}}})
			})
		},
	}
	cmd.Flags().BoolVar(&skipWipe, "skip-wipe", false, "of a volume with reclaimWipe=zero: do not wipe it first")
	return cmd
}

func newVolumeMoveLeader(o *options) *cobra.Command {
	return newVolumeVerb(o, "move-leader NAME NODE", "Move the leadership of a volume to its replica on a node",
		func(ctx context.Context, c *client, args []string) (*api.Volume, error) {
			return c.MoveLeader(ctx, &api.MoveLeaderRequest{Name: args[0], Node: args[1]})
		})
}

func newVolumeReclaim(o *options) *cobra.Command {
	return newVolumeVerb(o, "reclaim NAME delete|recycle",
		"Delete a released volume, or wipe it and make it available again",
		func(ctx context.Context, c *client, args []string) (*api.Volume, error) {
			return c.ReclaimVolume(ctx, &api.ReclaimVolumeRequest{Name: args[0], Policy: args[1]})
		})
}
