package driver

import (
	"fmt"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/node"
)

// nodeTopology returns the segment at which a node stands.
func nodeTopology(i node.Info) *csi.Topology {
	s := map[string]string{controller.TopologyNode: string(i.Node)}
	if i.Zone != "" {
		s[controller.TopologyZone] = i.Zone
	}
	if i.Rack != "" {
		s[controller.TopologyRack] = i.Rack
	}
	return &csi.Topology{Segments: s}
}

// segmentsOf checks topologies that the orchestrator sent and returns them by our own keys.
// Segments without any key say nothing and are dropped.
func segmentsOf(field string, ts []*csi.Topology) ([]map[string]string, error) {
	var out []map[string]string
	for _, t := range ts {
		s, err := segmentOf(field, t)
		if err != nil {
			return nil, err
		}
		if len(s) > 0 {
			out = append(out, s)
		}
	}
	return out, nil
}

// segmentOf is segmentsOf for one. Keys differ by more than their case (spec, message Topology),
// so they are compared without regard to it.
func segmentOf(field string, t *csi.Topology) (map[string]string, error) {
	out := make(map[string]string, len(t.GetSegments()))
	for k, v := range t.GetSegments() {
		key := strings.ToLower(k)
		if key != controller.TopologyNode && key != controller.TopologyZone && key != controller.TopologyRack {
			return nil, fmt.Errorf("%s: unknown topology key %q: %w", field, k, trivet.ErrInvalid)
		}
		if _, twice := out[key]; twice {
			return nil, fmt.Errorf("%s: topology key %q is given twice: %w", field, key, trivet.ErrInvalid)
		}
		if !controller.ValidSegment(v) {
			return nil, fmt.Errorf("%s: bad value %q of topology key %q: %w", field, v, k, trivet.ErrInvalid)
		}
		out[key] = v
	}
	return out, nil
}
