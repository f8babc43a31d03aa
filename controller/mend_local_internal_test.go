package controller

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/controller/meta"
)

// awayBench is volume 1 on n1 to n3, with dataLocality as given, attached to n4.
func awayBench(t *testing.T, locality string) *mendBench {
	t.Helper()
	b := newMendBench(t)
	b.do(meta.Command{Detach: &meta.Detach{Volume: 1, Node: "n1"}})
	b.do(meta.Command{ReportFence: &meta.ReportFence{Volume: 1, Epoch: 2}})
	b.do(meta.Command{Attach: &meta.Attach{Volume: 1, Node: "n4", Mode: meta.SingleNodeMultiWriter}})
	if locality != "" {
		b.do(meta.Command{SetParams: &meta.SetParams{
			Volume: 1, Params: map[string]string{ParamDataLocality: locality},
		}})
	}
	require.Empty(t, b.says(), "not at once")
	return b
}

func TestReplicaFollowsTheAttachment(t *testing.T) {
	t.Parallel()
	b := awayBench(t, LocalityPreferred)
	b.later(followAfter - time.Second)
	require.Empty(t, b.says())
	b.later(time.Second)
	require.Equal(t, "v1 +n4-n1; ", b.says(), "in place of the one on the fullest disk")
	require.Empty(t, b.says(), "one change at a time")
	v, _ := b.m.State().Volume(1)
	added := v.ReplicaOn("n4").ID
	for _, state := range []meta.ReplicaState{meta.ReplicaFilling, meta.ReplicaReady} {
		b.do(meta.Command{ReportReplica: &meta.ReportReplica{Volume: 1, Replica: added, State: state}})
	}
	require.Equal(t, "v1 leader n4; ", b.says())
	require.Empty(t, b.says(), "it is asked for")
	b.do(meta.Command{ReportReplica: &meta.ReportReplica{Volume: 1, Replica: volumeReplica(11), State: meta.ReplicaLeft}})
	b.do(meta.Command{ReportLeader: &meta.ReportLeader{Volume: 1, Replica: added}})
	b.later(time.Hour)
	require.Empty(t, b.says())
}

func TestReplicaDoesNotFollow(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		locality string
		change   func(b *mendBench)
		want     string
	}{
		"nobody asked":       {"", func(*mendBench) {}, ""},
		"a cordoned node":    {LocalityPreferred, func(b *mendBench) { b.cordon(4, false) }, ""},
		"a node gone silent": {LocalityPreferred, func(b *mendBench) { b.node(4, b.now.Add(-time.Second), true) }, ""},
		"healing goes first": {LocalityPreferred, func(b *mendBench) {
			b.report(12, meta.ReplicaFaulted, "rot")
		}, "v1 +n5-n2; "},
		"a node is away": {LocalityPreferred, func(b *mendBench) { b.node(2, b.now.Add(-time.Second), true) }, ""},
		"it moved on": {LocalityPreferred, func(b *mendBench) {
			b.do(meta.Command{Detach: &meta.Detach{Volume: 1, Node: "n4"}})
			b.do(meta.Command{ReportFence: &meta.ReportFence{Volume: 1, Epoch: 4}})
			b.do(meta.Command{Attach: &meta.Attach{Volume: 1, Node: "n5", Mode: meta.SingleNodeMultiWriter}})
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := awayBench(t, tc.locality)
			b.later(followAfter)
			tc.change(b)
			require.Equal(t, tc.want, b.says())
		})
	}
}
