package controller

import (
	"context"
	"fmt"
	"slices"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// SegmentMax is the longest value of a topology segment in bytes (CSI spec, message Topology).
const SegmentMax = 63

// ValidSegment reports whether s can be the value of a topology key: 1 to 63 letters, digits, '-', '_' or '.', with a
// letter or digit at both ends.
func ValidSegment(s string) bool {
	if s == "" || len(s) > SegmentMax || !alphanumeric(s[0]) || !alphanumeric(s[len(s)-1]) {
		return false
	}
	return !slices.ContainsFunc([]byte(s), func(b byte) bool {
		return !alphanumeric(b) && b != '-' && b != '_' && b != '.'
	})
}

// ValidateSegment returns ErrInvalid, naming what the value is, unless it is one.
func ValidateSegment(what, value string) error {
	if ValidSegment(value) {
		return nil
	}
	return fmt.Errorf("%s %q is not a topology value (1 to %d letters, digits, '-', '_', '.', with a letter or digit at "+
		"both ends): %w", what, value, SegmentMax, trivet.ErrInvalid)
}

func alphanumeric(b byte) bool {
	return b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9'
}

// PlaceNode says in which zone and rack a node stands; nil: as it is. With own the node's server says both itself
// again. ErrInvalid for what no topology could name. ErrNotFound.
func (c *Controller) PlaceNode(ctx context.Context, node trivet.NodeID, zone, rack *string, own bool,
) (meta.Node, error) {
	for key, value := range map[string]*string{"zone": zone, "rack": rack} {
		if value == nil || *value == "" {
			continue
		}
		if err := ValidateSegment(key, *value); err != nil {
			return meta.Node{}, err
		}
	}
	cmd := &meta.PlaceNode{Node: node, Zone: zone, Rack: rack, Own: own}
	res, err := c.store.Propose(ctx, meta.Command{PlaceNode: cmd})
	if err != nil {
		return meta.Node{}, err
	}
	if res.Node == nil {
		return meta.Node{}, fmt.Errorf("catalogue returned no node: %w", trivet.ErrUnavailable)
	}
	return *res.Node, nil
}
