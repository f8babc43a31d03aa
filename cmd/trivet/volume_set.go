package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet/api"
)

func newVolumeSet(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "set NAME KEY=VALUE...",
		Short: "Change parameters of a volume, in use or not; an empty value is the default",
		Example: "  trivet volume set db iopsLimit=500 burst=30\n" +
			"  trivet volume set db iopsLimit=",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usageError{fmt.Errorf("want NAME and at least one KEY=VALUE")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			parameters, err := parsePairs("parameter", args[1:])
			if err != nil {
				return err
			}
			return o.call(cmd, func(ctx context.Context, c *client) error {
				v, err := c.SetVolume(ctx, &api.SetVolumeRequest{Name: args[0], Parameters: parameters})
				if err != nil {
					return err
				}
				return o.showVolume(cmd, v)
			})
		},
	}
}

// parsePairs reads KEY=VALUE words; one key twice is an error.
func parsePairs(what string, words []string) (map[string]string, error) {
	pairs := map[string]string{}
	for _, w := range words {
		key, value, ok := strings.Cut(w, "=")
		if !ok || key == "" {
			return nil, usageError{fmt.Errorf("%s %q: want KEY=VALUE", what, w)}
		}
		if _, twice := pairs[key]; twice {
			return nil, usageError{fmt.Errorf("%s %q is given twice", what, key)}
		}
		pairs[key] = value
	}
	return pairs, nil
}

// pairsText writes pairs in the order of their keys.
func pairsText(pairs map[string]string) string {
	words := make([]string, 0, len(pairs))
	for _, key := range slices.Sorted(maps.Keys(pairs)) {
		words = append(words, key+"="+pairs[key])
	}
	return strings.Join(words, " ")
}
