package raftgroup_test

import (
	"fmt"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

func TestOneReplica(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a")
		a := c.leader()
		a.mustSet("x", "1")
		old, err := a.group.Propose(t.Context(), []byte("x=2"))
		require.NoError(t, err)
		require.Equal(t, "1", old)
		require.NoError(t, a.group.Barrier(t.Context()))
		s := a.group.Status()
		require.True(t, s.IsLeader)
		require.Equal(t, replicaID("a"), s.Leader)
		require.Equal(t, trivet.NodeID("a"), s.LeaderNode)
		require.Equal(t, members("a"), s.Members)
		a.stop()
		a.mustOpen()
		c.leader()
		require.Equal(t, "2", a.machine.get("x"))
	})
}

func TestThreeReplicas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		for k := range 100 {
			c.mustPut(fmt.Sprint(k), "v")
		}
		c.converge()
		old := c.leader()
		old.die()
		n := c.leader()
		require.NotEqual(t, old.name, n.name)
		n.mustSet("after", "1")
		old.mustOpen()
		c.converge()
	})
}
