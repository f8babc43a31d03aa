package server

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/trivet-csi/trivet/internal/stage"
	"github.com/trivet-csi/trivet/node"
)

var descHold = desc("trivet_snapshot_hold_seconds",
	"Time for which writes to a volume attached here were held for a snapshot, single or in a group.", "kind")

func holdMetrics(out chan<- prometheus.Metric, h *node.HoldTimes) {
	for kind, m := range map[string]*stage.Meter{"single": &h.Single, "group": &h.Group} {
		t := m.Totals()
		below, all := t.Cumulative()
		buckets := make(map[float64]uint64, len(below))
		for i, bound := range stage.Bounds {
			buckets[bound.Seconds()] = below[i]
		}
		out <- prometheus.MustNewConstHistogram(descHold, all, t.Sum.Seconds(), buckets, kind)
	}
}
