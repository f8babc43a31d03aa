package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet/api"
)

func newVolumeLabel(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "label NAME KEY=VALUE... KEY-...",
		Short: "Give a volume labels (KEY=VALUE) and take others away (KEY-)",
		Example: "  trivet volume label db tier=gold example.com/team=shop\n" +
			"  trivet volume label db tier-\n" +
			"  trivet volume list --selector 'tier=gold,!old'",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usageError{fmt.Errorf("want NAME and at least one KEY=VALUE or KEY-")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			set, remove, err := parseLabels(args[1:])
			if err != nil {
				return err
			}
			return o.call(cmd, func(ctx context.Context, c *client) error {
				v, err := c.SetLabels(ctx, &api.SetLabelsRequest{Name: args[0], Labels: set, Remove: remove})
				if err != nil {
					return err
				}
				return o.showVolume(cmd, v)
			})
		},
	}
}

// parseLabels reads KEY=VALUE and KEY- words; one key twice is an error.
func parseLabels(words []string) (set map[string]string, remove []string, err error) {
	var pairs []string
	for _, w := range words {
		if key, ok := strings.CutSuffix(w, "-"); ok && !strings.Contains(w, "=") {
			if slices.Contains(remove, key) {
				return nil, nil, usageError{fmt.Errorf("label %q is given twice", key)}
			}
			remove = append(remove, key)
			continue
		}
		pairs = append(pairs, w)
	}
	set, err = parsePairs("label", pairs)
	if err != nil {
		return nil, nil, err
	}
	for _, key := range remove {
		if _, twice := set[key]; twice || key == "" {
			return nil, nil, usageError{fmt.Errorf("label %q: want KEY=VALUE or KEY-, and each key once", key)}
		}
	}
	return set, remove, nil
}
