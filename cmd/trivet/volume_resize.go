package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet/api"
)

func newVolumeResize(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "resize NAME SIZE",
		Short: "Make a volume larger, in use or not; volumes never shrink",
		Long: "Make a volume SIZE large, rounded up to whole MiB, and return once its replicas have agreed on it. The " +
			"size\n" +
			"that it has is success, a smaller one is refused. The block device of a node that has it attached follows at\n" +
			"once; a filesystem on it is grown afterwards, by resize2fs or xfs_growfs, which Kubernetes does by itself.",
		Example: "  trivet volume resize db 20Gi",
		Args:    exactArgs("NAME", "SIZE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			sizeBytes, err := parseSize(args[1])
			if err != nil {
				return err
			}
			return o.call(cmd, func(ctx context.Context, c *client) error {
				v, err := c.ExpandVolume(ctx, &api.ExpandVolumeRequest{Name: args[0], SizeBytes: sizeBytes})
				if err != nil {
					return err
				}
				return o.showVolume(cmd, v)
			})
		},
	}
}
