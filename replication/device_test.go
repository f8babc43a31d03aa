package replication_test

import (
	"testing"

	"github.com/trivet-csi/trivet/internal/faultdev/devtest"
	"github.com/trivet-csi/trivet/internal/sim"
	"github.com/trivet-csi/trivet/replication"
)

// The replicated volume keeps the contract of a Device: discards and zeroes are aligned inwards (H18), and keep their
// place among the writes (H19). Its replicas are equal afterwards, however their batches were cut.
func TestVolumeIsADevice(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		devtest.Run(t, v, devtest.Options{OpsN: 150, RequestBytesMax: 256 << 10})
		requireEqualReplicas(t, c)
	})
}
