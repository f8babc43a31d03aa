package controller_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

// cordon is a command with an effect that is easy to see.
func cordon(node trivet.NodeID) meta.Command {
	return meta.Command{CordonNode: &meta.CordonNode{Node: node, Cordoned: true}}
}

// H34: two of three members are gone for good. The third becomes the only voter when an operator says so; what it knew
// is still there, and new members take the place of the lost ones.
func TestCatalogueRecover(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := cluster(t)
		_, err := g.cats["n1"].Propose(minute(t), cordon("n2"))
		require.NoError(t, err)
		eventually(t, "n3 has it", func() bool {
			n, _ := g.cats["n3"].Local().Node("n2")
			return n.Cordoned
		})
		_, err = g.cats["n3"].Recover(minute(t), true)
		require.ErrorIs(t, err, trivet.ErrInvalid, "a majority lives")
		g.kill(t, "n1")
		_, err = g.cats["n3"].Recover(minute(t), true)
		require.ErrorIs(t, err, trivet.ErrInvalid, "a majority lives")
		g.kill(t, "n2")

		n3 := g.cats["n3"]
		plan, err := n3.Recover(minute(t), false)
		require.NoError(t, err)
		require.Len(t, plan.Lost, 2)
		require.Empty(t, plan.Kept)
		require.Equal(t, trivet.NodeID("n3"), plan.Survivor.Node)
		require.Len(t, n3.Roles(), 3, "nothing was done")
		done, err := n3.Recover(minute(t), true)
		require.NoError(t, err)
		require.Equal(t, plan.Lost, done.Lost)
		require.Equal(t, map[trivet.NodeID]bool{"n3": true}, n3.Roles())
		s, err := n3.Read(minute(t))
		require.NoError(t, err)
		lost, _ := s.Node("n2")
		assert.True(t, lost.Cordoned)
		assert.Empty(t, lost.MetaReplica, "its member is struck")
		records := s.Audit().Records
		last := records[len(records)-1]
		assert.Equal(t, meta.AuditRecover, last.Kind)
		assert.Equal(t, trivet.NodeID("n3"), last.Node)
		assert.Contains(t, last.Detail, "lost: n1, n2")
		_, err = n3.Recover(minute(t), true)
		require.ErrorIs(t, err, trivet.ErrInvalid, "it is done")

		g.disks["n1"] = nil // a new machine under an old name
		g.join(t, "n3", 1)
		g.join(t, "n3", 4)
		g.awaitVoters(t, 3)
		g.kill(t, "n3")
		_, err = g.cats["n4"].Propose(minute(t), cordon("n1"))
		require.NoError(t, err)
	})
}

// The lost members come back with what they had, against the operator's word. They have a majority of the group that
// was, and may elect a leader of it; nobody in the recovered catalogue listens to them.
func TestCatalogueRecoverLeavesTheLostAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := cluster(t)
		g.kill(t, "n1")
		g.kill(t, "n2")
		n3 := g.cats["n3"]
		_, err := n3.Recover(minute(t), true)
		require.NoError(t, err)
		back := func() {
			for _, id := range []trivet.NodeID{"n1", "n2"} {
				require.NoError(t, g.boot(t, id).Open(t.Context()))
			}
			eventually(t, "they lead what was", func() bool {
				return g.cats["n1"].Leader() != "" && g.cats["n2"].Leader() != ""
			})
		}
		for range 5 { // until their term is above that of the recovered group
			back()
			g.kill(t, "n1")
			g.kill(t, "n2")
		}
		back()
		_, err = g.cats["n1"].Propose(minute(t), cordon("n1"))
		require.NoError(t, err)
		<-time.After(time.Minute)
		require.Equal(t, trivet.NodeID("n3"), n3.Leader())
		s, err := n3.Read(minute(t))
		require.NoError(t, err)
		n1, _ := s.Node("n1")
		require.False(t, n1.Cordoned)
		require.Equal(t, map[trivet.NodeID]bool{"n3": true}, n3.Roles())
	})
}

// A learner lives too. The member with the newest log is the one to recover, and the other one stays.
func TestCatalogueRecoverKeepsWhoLives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := cluster(t)
		g.join(t, "n1", 4)
		eventually(t, "n4 is a learner", func() bool {
			voter, ok := g.cats["n1"].Roles()["n4"]
			return ok && !voter
		})
		has := func(c *controller.Catalogue) bool {
			n, _ := c.Local().Node("n1")
			return n.Cordoned
		}
		g.hub.Partition([]trivet.NodeID{"n1", "n2", "n4"}, []trivet.NodeID{"n3"})
		eventually(t, "a majority goes on", func() bool {
			leader := g.cats["n4"].Leader()
			return leader == "n1" || leader == "n2"
		})
		_, err := g.cats["n4"].Propose(minute(t), cordon("n1"))
		require.NoError(t, err)
		eventually(t, "the learner has it", func() bool { return has(g.cats["n4"]) })
		g.kill(t, "n1")
		g.kill(t, "n2")
		g.hub.HealAll()
		_, err = g.cats["n3"].Recover(minute(t), true)
		require.ErrorIs(t, err, trivet.ErrInvalid)
		require.ErrorContains(t, err, "the log of n4 is newer")

		plan, err := g.cats["n4"].Recover(minute(t), true)
		require.NoError(t, err)
		require.Len(t, plan.Kept, 1)
		require.Equal(t, trivet.NodeID("n3"), plan.Kept[0].Node)
		register(t, g.cats["n3"], 3) // its lease has run out
		eventually(t, "both vote", func() bool {
			roles := g.cats["n4"].Roles()
			return roles["n3"] && roles["n4"] && len(roles) == 2
		})
		require.True(t, has(g.cats["n3"]), "what only the learner had")
	})
}
