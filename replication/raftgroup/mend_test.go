package raftgroup_test

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// mendable starts a cluster whose members mend their logs, and puts 20 values.
func mendable(t *testing.T, names ...string) *cluster {
	t.Helper()
	c := newCluster(t, names...)
	c.configure = func(cfg *raftgroup.Config) { cfg.MendLog = true }
	for _, name := range names {
		require.NoError(t, raftgroup.Create(c.nodes[name].config(), members(names...)))
		c.nodes[name].mustOpen()
	}
	c.putAll(20, 1)
	c.converge()
	return c
}

func (c *cluster) putAll(n, round int) {
	for k := range n {
		c.mustPut(fmt.Sprint(k), value(k, round))
	}
}

func value(k, round int) string { return fmt.Sprintf("value %02d of round %d.", k, round) }

func (c *cluster) requireAll(n, round int) {
	c.t.Helper()
	for name, node := range c.nodes {
		for k := 0; node.group != nil && k < n; k++ {
			require.Equal(c.t, value(k, round), node.machine.get(fmt.Sprint(k)), "%d on %s", k, name)
		}
	}
}

// rot changes a byte of every copy of something in the log of a machine that is down, at an offset in it.
func (n *node) rot(what []byte, off int) {
	n.c.t.Helper()
	require.Nil(n.c.t, n.log, "it runs")
	n.flip(what, off)
}

// rotRunning is rot on a machine whose log nobody writes to at the moment.
func (n *node) rotRunning(what string) {
	n.c.t.Helper()
	synctest.Wait()
	n.flip([]byte(what), 1)
}

func (n *node) flip(what []byte, off int) {
	n.c.t.Helper()
	names, err := n.fs.List("/disk/log")
	require.NoError(n.c.t, err)
	hits := 0
	for _, name := range names {
		data, err := n.fs.UnsafeGetFileDataBuffer("/disk/log/" + name)
		require.NoError(n.c.t, err)
		for at := 0; ; at++ {
			next := bytes.Index(data[at:], what)
			if next < 0 {
				break
			}
			at += next
			data[at+off] ^= 1
			hits++
		}
	}
	require.Positive(n.c.t, hits, "%q is not in the log of %s", what, n.name)
}

func (n *node) rotValue(k, round int) { n.c.t.Helper(); n.rot([]byte(value(k, round)), 1) }

func (n *node) damaged() int { return n.group.Status().Damaged }

// A member that cannot read an entry which it has acknowledged gets that entry from the others and takes part again,
// its log as long as it was and begun where it began; after a restart, too.
func TestHoleIsMended(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := mendable(t, "a", "b", "c")
		b := c.nodes["b"]
		first, last := raftgroup.LogBounds(b.group)
		b.die()
		b.rotValue(7, 1)
		b.rotValue(11, 1)
		b.mustOpen()
		require.Equal(t, 2, b.damaged())
		st := b.group.Status()
		require.Equal(t, last, st.LastIndex)
		require.Less(t, st.WholeIndex, st.LastIndex)
		c.eventually("it is mended", func() bool { return b.damaged() == 0 && !b.group.Status().CatchUp.Active })
		again, end := raftgroup.LogBounds(b.group)
		require.Equal(t, first, again)
		require.GreaterOrEqual(t, end, last)
		c.converge()
		c.requireAll(20, 1)
		b.die()
		b.mustOpen()
		require.Zero(t, b.damaged(), "for good")
		c.converge()
	})
}

// H23: what only a member with a hole has acknowledged beside one that is down is not lost to one that never had it.
func TestHoleDoesNotVote(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := mendable(t, "a", "b", "c")
		late := c.nodes["c"]
		late.die()
		c.mustPut("7", "acknowledged by two")
		first := c.nodes["a"]
		first.die()
		b := c.nodes["b"]
		b.die()
		b.rot([]byte("acknowledged by two"), 3)
		b.mustOpen()
		late.mustOpen()
		pass(20 * heartbeat)
		for _, n := range []*node{b, late} {
			st := n.group.Status()
			require.Empty(t, st.Leader, "of %s", n.name)
			require.Empty(t, n.fatals())
		}
		require.Equal(t, 1, b.damaged())
		_, err := b.group.ReadGate()
		require.Error(t, err)
		first.mustOpen()
		c.converge()
		for name, n := range c.nodes {
			require.Equal(t, "acknowledged by two", n.machine.get("7"), name)
		}
	})
}

// All members have a hole, each another one, and there is nobody who could lead. They mend each other.
func TestHolesInDifferentPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := mendable(t, "a", "b", "c")
		for _, n := range c.nodes {
			n.die()
		}
		for i, name := range []string{"a", "b", "c"} {
			c.nodes[name].rotValue(5*i+1, 1)
			c.nodes[name].rotValue(5*i+2, 1)
			c.nodes[name].mustOpen()
			assert.Equal(t, 2, c.nodes[name].damaged())
		}
		c.converge()
		c.requireAll(20, 1)
	})
}

// An entry that no disk has any more is waited for, and nobody makes one up.
func TestHoleInAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := mendable(t, "a", "b", "c")
		for _, n := range c.nodes {
			n.die()
		}
		for _, n := range c.nodes {
			n.rotValue(7, 1)
			n.mustOpen()
		}
		pass(time20)
		for name, n := range c.nodes {
			require.Equal(t, 1, n.damaged(), name)
			require.Empty(t, n.group.Status().Leader)
			require.Empty(t, n.fatals())
		}
		// An operator gives up what is from there on, on one of them.
		a := c.nodes["a"]
		end := a.group.Status().WholeIndex
		a.stop()
		c.configure = func(cfg *raftgroup.Config) {
			cfg.MendLog, cfg.Recover, cfg.RecoverLearners = true, true, members("b", "c")
		}
		a.mustOpen()
		c.leader("a")
		require.Greater(t, a.group.Status().LastIndex, end)
		require.Equal(t, value(6, 1), a.machine.get("6"))
		require.Empty(t, a.machine.get("8"))
		require.NoError(t, a.set("8", "anew"))
		c.eventually("the others take what there is", func() bool {
			b, l := c.nodes["b"], c.nodes["c"]
			return b.machine.get("8") == "anew" && l.machine.get("8") == "anew" && b.damaged()+l.damaged() == 0
		})
		for _, n := range c.nodes {
			require.Empty(t, n.machine.get("9"))
			require.Empty(t, n.fatals())
		}
	})
}

const time20 = 20 * heartbeat

// The others have compacted the entry away: a state that covers it is pulled, and what the log has behind that stays.
func TestHoleThatIsCompacted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := mendable(t, "a", "b", "c")
		b := c.nodes["b"]
		b.die()
		compact := func(cfg *raftgroup.Config) { cfg.MendLog, cfg.SnapshotBytes = true, 64<<10 }
		c.configure = compact
		for _, name := range []string{"a", "c"} {
			c.nodes[name].die()
			c.nodes[name].mustOpen()
		}
		for round := 2; round < 40; round++ {
			c.putAll(20, round)
		}
		for _, name := range []string{"a", "c"} {
			c.nodes[name].compacted(40)
		}
		b.rotValue(7, 1)
		b.mustOpen()
		c.converge()
		c.requireAll(20, 39)
		require.Zero(t, b.damaged())
		b.die()
		b.mustOpen()
		require.Zero(t, b.damaged())
		c.converge()
	})
}

// An image that ends within the log: the entries behind it stay, as this member has acknowledged them.
func TestHoleIsCoveredWithinTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := mendable(t, "a", "b", "c")
		b := c.nodes["b"]
		_, err := c.nodes["a"].machine.Flush()
		require.NoError(t, err)
		a, late := c.nodes["a"], c.nodes["c"]
		late.die()
		c.mustPut("20", value(20, 1))
		b.die()
		_, last := raftgroup.LogBounds(a.group)
		a.die()
		// a has lost the entry, too, but not what it did; the one behind it is on a and b only.
		a.rotValue(7, 1)
		b.rotValue(7, 1)
		a.mustOpen()
		require.Zero(t, a.damaged(), "its state stands in for the entry")
		b.mustOpen()
		c.eventually("b is whole", func() bool { return b.damaged() == 0 && !b.group.Status().CatchUp.Active })
		first, end := raftgroup.LogBounds(b.group)
		require.Greater(t, first, uint64(8))
		require.GreaterOrEqual(t, end, last)
		require.LessOrEqual(t, first, last, "what it has acknowledged is still in its log")
		c.converge()
		late.mustOpen()
		c.converge()
		c.requireAll(21, 1)
	})
}

// The configuration is an entry as well. While it cannot be read the members are not known, so it is not replaced by
// an older one, and the leader that makes contact has it.
func TestHoleInTheConfiguration(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := mendable(t, "a", "b", "c")
		b := c.nodes["b"]
		_, err := b.machine.Flush()
		require.NoError(t, err)
		b.die()
		b.rot([]byte(replicaID("c")), 3)
		c.configure = func(cfg *raftgroup.Config) {
			cfg.MendLog = true
			cfg.IsMember = func(trivet.ReplicaID, trivet.NodeID) bool { return true }
		}
		b.mustOpen()
		require.Equal(t, 1, b.damaged())
		require.Empty(t, b.group.Status().Members)
		c.converge()
		require.Zero(t, b.damaged())
		require.Len(t, b.group.Status().Members, 3)
	})
}

// An entry is asked for by its term as well: another one at its index is of another history.
func TestEntryOfAnotherTerm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := mendable(t, "a", "b", "c")
		a, b := c.nodes["a"], c.nodes["b"]
		first, last := raftgroup.LogBounds(b.group)
		for _, tt := range []struct {
			index, term uint64
			want        bool
		}{
			{last, raftgroup.LogTerm(b.group, last), true},
			{last, raftgroup.LogTerm(b.group, last) + 1, false},
			{last + 1, raftgroup.LogTerm(b.group, last), false},
			{first - 1, 1, false},
		} {
			reply, err := a.link.Call(t.Context(), "b", transport.Message{
				Kind: transport.KindLogEntry, Group: testGroup, From: replicaID("a"), To: replicaID("b"),
				Body: raftgroup.EntryAskBody(tt.index, tt.term),
			})
			require.NoError(t, err)
			has, err := raftgroup.EntryGiven(reply.Body)
			require.NoError(t, err)
			require.Equal(t, tt.want, has, "%+v", tt)
		}
	})
}

// Whoever is asked for an entry that has rotted on its own disk is suspect itself, and tells it.
func TestAskedForARottenEntry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := mendable(t, "a", "b", "c")
		told := make(chan error, 9)
		c.configure = func(cfg *raftgroup.Config) {
			cfg.MendLog = true
			cfg.Damaged = func(err error) { told <- err }
		}
		a, b := c.nodes["a"], c.nodes["b"]
		b.die()
		b.mustOpen() // nothing of its log is in memory now
		c.converge()
		at := uint64(0)
		for index, e := range b.machine.seen() {
			if strings.Contains(e, value(7, 1)) {
				at = index
			}
		}
		require.NotZero(t, at)
		b.rotRunning(value(7, 1))
		_, err := a.link.Call(t.Context(), "b", transport.Message{
			Kind: transport.KindLogEntry, Group: testGroup, From: replicaID("a"), To: replicaID("b"),
			Body: raftgroup.EntryAskBody(at, raftgroup.LogTerm(b.group, at)),
		})
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		require.ErrorIs(t, <-told, trivet.ErrCorrupt)
		require.Empty(t, b.fatals())
		b.stop()
		b.group, err = raftgroup.Open(b.config()) // as its owner does
		require.NoError(t, err)
		require.Zero(t, b.damaged(), "its state stands in for the entry")
		c.converge()
		c.requireAll(20, 1)
	})
}

// One member alone has nobody to ask. It says so and goes on waiting; with an operator's word it goes on without.
func TestHoleAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := mendable(t, "a")
		a := c.nodes["a"]
		a.die()
		a.rotValue(7, 1)
		a.mustOpen()
		pass(time20)
		require.Equal(t, 1, a.damaged())
		require.Empty(t, a.fatals())
		ctx, cancel := context.WithTimeout(t.Context(), heartbeat)
		defer cancel()
		_, err := a.group.Propose(ctx, []byte("x=y"))
		require.Error(t, err)
		a.stop()
		c.configure = func(cfg *raftgroup.Config) { cfg.MendLog, cfg.Recover = true, true }
		a.mustOpen()
		c.mustPut("x", "y")
		require.Equal(t, value(6, 1), a.machine.get("6"))
		require.Empty(t, a.machine.get("7"))
		require.Empty(t, a.machine.get("8"))
	})
}

// The very last entry of the log, which the state has: the log is emptied behind the snapshot that stands in for it.
func TestLastEntryMayRot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a")
		a := c.nodes["a"]
		c.mustPut("last", "rot me last")
		_, err := a.machine.Flush()
		require.NoError(t, err)
		applied, _ := a.machine.Applied()
		_, last := raftgroup.LogBounds(a.group)
		require.Equal(t, last, applied)
		a.die()
		a.rot([]byte("rot me last"), 0)
		a.mustOpen()
		c.mustPut("more", "1")
		require.Equal(t, "rot me last", a.machine.get("last"))
		a.die()
		a.mustOpen()
		c.mustPut("more", "2")
	})
}
