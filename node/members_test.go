package node

import (
	"bytes"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/engine/segment"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// A disk is wiped: a new replica is filled on the new disk, and the old record leaves (H10).
func TestGroupWipedDisk(t *testing.T) {
	inGroups(t, 3, -1, func(t *testing.T, b *groupBench) {
		d := b.attach()
		stop := b.write(d)
		g := b.nodes[2]
		g.kill()
		g.wipe()
		g.boot()
		b.until("the old one is found to be gone", func() bool {
			v := b.cat.volume(vol)
			return v.Replica(ours(2)).State == meta.ReplicaFaulted
		})
		b.add(4, 2, ours(2))
		b.until("the new one has taken its place", b.has(1, 1, 3, 4))
		stop()
		b.requireGroup(1, 3, 4)
		assert.Equal(t, ours(4), g.holds())
		require.NoError(t, d.Close())
	})
}

// A replica moves under writes, the leader's own: leadership goes first, the data last.
func TestGroupMovesReplica(t *testing.T) {
	inGroups(t, 4, -1, func(t *testing.T, b *groupBench) {
		d := b.attach()
		stop := b.write(d)
		old, _ := b.leader()
		b.add(4, 4, ours(old.n))
		rest := others(old.n)
		b.until("it has moved", b.has(0, rest[0], rest[1], 4))
		stop()
		b.requireGroup(rest[0], rest[1], 4)
		assert.Empty(t, old.holds())
		assert.False(t, old.runs())
		require.NoError(t, d.Close())
	})
}

func others(n int) []int {
	var out []int
	for i := 1; i <= 3; i++ {
		if i != n {
			out = append(out, i)
		}
	}
	return out
}

// A node does not come back: its replica is replaced without it, and should it come back all the same, it
// removes what it has.
func TestGroupNodeNeverReturns(t *testing.T) {
	inGroups(t, 4, -1, func(t *testing.T, b *groupBench) {
		d := b.attach()
		stop := b.write(d)
		gone, _ := b.leader()
		gone.kill()
		rest := others(gone.n)
		b.add(4, 4, ours(gone.n))
		b.until("it is replaced", b.has(1, rest[0], rest[1], 4))
		stop()
		b.requireGroup(rest[0], rest[1], 4)
		<-time.After(time.Minute)
		gone.boot()
		require.Equal(t, ours(gone.n), gone.found)
		b.until("what it had is removed", b.has(0, rest[0], rest[1], 4))
		assert.Empty(t, gone.holds())
		b.requireGroup(rest[0], rest[1], 4)
		require.NoError(t, d.Close())
	})
}

// forgetful is a machine that loses the k-th entry that it is given, and applies the one before again: nothing shows
// it but its blocks.
type forgetful struct {
	raftgroup.StateMachine
	k    int
	last []byte
}

func (m *forgetful) Apply(entries []raftgroup.Entry) ([]any, error) {
	entries = slices.Clone(entries)
	for i := range entries {
		if e := &entries[i]; e.Data != nil {
			if m.k--; m.k == 0 {
				e.Data, e.Stored = m.last, segment.Place{}
			}
			m.last = bytes.Clone(e.Data)
		}
	}
	return m.StateMachine.Apply(entries)
}

// reasonOf waits for the catalogue to give a reason for what has become of a replica, which is not there for long.
func (b *groupBench) reasonOf(id trivet.ReplicaID) <-chan string {
	reason := make(chan string, 1)
	b.cat.once(func(st *meta.State) bool {
		v, _ := st.Volume(vol)
		for _, r := range append(slices.Clone(v.Replicas), v.Retired...) {
			if r.ID == id && r.Reason != "" {
				reason <- r.Reason
				return true
			}
		}
		return false
	})
	return reason
}

// A new replica that is not what its leader is gets no vote: it is given up, the reason stays with it, its node
// removes it, and another one can be made in its place (I14, H21).
func TestGroupGivesUpOneThatDiffers(t *testing.T) {
	inGroups(t, 4, -1, func(t *testing.T, b *groupBench) {
		bad := true
		b.wrap = func(g *groupNode, m raftgroup.StateMachine) raftgroup.StateMachine {
			if g.n == 4 && bad {
				bad = false
				return &forgetful{StateMachine: m, k: 4}
			}
			return m
		}
		d := b.attach()
		for i := range int64(8) {
			require.NoError(t, d.WriteAt(t.Context(), bytes.Repeat([]byte{byte(i + 1)}, trivet.BlockSize), i*trivet.BlockSize))
		}
		stop := b.write(d)
		b.add(4, 4, ours(1))
		reason := b.reasonOf(ours(4))
		b.until("it is given up", b.has(0, 1, 2, 3))
		assert.Contains(t, <-reason, "digest")
		assert.Empty(t, b.nodes[4].holds())
		b.add(5, 4, ours(1))
		b.until("another one has taken its place", b.has(0, 2, 3, 5))
		stop()
		b.requireGroup(2, 3, 5)
		require.NoError(t, d.Close())
	})
}

// A parked volume wakes for a change of its members, on every node, and is parked again after it.
func TestGroupWakesForChange(t *testing.T) {
	inGroups(t, 4, 5*time.Second, func(t *testing.T, b *groupBench) {
		d := b.attach()
		b.write(d)()
		b.detach(d)
		parked := func() bool {
			for _, g := range b.nodes {
				if g.runs() {
					return false
				}
			}
			return true
		}
		b.until("it is parked", parked)
		b.add(4, 4, ours(1))
		b.until("it has moved", b.has(0, 2, 3, 4))
		b.until("it is parked again", parked)
		d = b.attach()
		b.write(d)()
		b.requireGroup(2, 3, 4)
		require.NoError(t, d.Close())
	})
}

// A damaged replica is replaced on its own disk: its remains go first, and only because the catalogue says
// that the new one replaces it (H35).
func TestGroupReplacedOnItsDisk(t *testing.T) {
	for _, replaces := range []bool{true, false} {
		t.Run(fmt.Sprint(replaces), func(t *testing.T) {
			inGroups(t, 3, -1, func(t *testing.T, b *groupBench) {
				d := b.attach()
				b.write(d)()
				b.cat.must(meta.Command{ReportReplica: &meta.ReportReplica{
					Volume: vol, Replica: ours(2), State: meta.ReplicaFaulted, Reason: "damaged",
				}})
				if replaces {
					b.add(4, 2, ours(2))
					b.until("the new one has taken its place", b.has(0, 1, 3, 4))
					b.requireGroup(1, 3, 4)
					assert.Equal(t, ours(4), b.nodes[2].holds())
				} else {
					b.add(4, 2, "")
					b.until("it is refused", func() bool {
						v := b.cat.volume(vol) // one that never was a member is Retired at once, and nothing is left of it
						return v.Replica(ours(4)) == nil && len(v.Retired) == 0
					})
					assert.Equal(t, ours(2), b.nodes[2].holds(), "what may be somebody's data stays")
				}
				require.NoError(t, d.Close())
			})
		})
	}
}

// The machine that does a step crashes before it, or after it and before anybody heard: whichever step it is,
// the move is finished all the same.
func TestGroupCrashAtEachStep(t *testing.T) {
	for _, after := range []bool{false, true} {
		t.Run(fmt.Sprintf("after=%v", after), func(t *testing.T) {
			for at, more := 1, true; more; at++ {
				name := fmt.Sprintf("step=%d", at)
				more = t.Run(name, func(t *testing.T) { crashAtStep(t, at, after) }) && at < stepsOfAMove
			}
		})
	}
}

// stepsOfAMove is how many changes a move takes at least: make, Filling, learner, promote, Ready, pass on
// leadership, remove, Left, destroy, Removed.
const stepsOfAMove = 10

func crashAtStep(t *testing.T, at int, after bool) {
	t.Helper()
	inGroups(t, 4, -1, func(t *testing.T, b *groupBench) {
		d := b.attach()
		old, _ := b.leader()
		b.trip = &trip{at: at, after: after}
		for _, g := range b.nodes {
			g.kill()
			g.boot()
		}
		b.until("a leader", func() bool { old, _ = b.leader(); return old != nil })
		stop := b.write(d)
		b.add(4, 4, ours(old.n))
		rest := others(old.n)
		b.until("it has moved", b.has(0, rest[0], rest[1], 4))
		stop()
		require.True(t, b.trip.reached(), "nothing crashed")
		b.requireGroup(rest[0], rest[1], 4)
		assert.Empty(t, old.holds())
		require.NoError(t, d.Close())
	})
}

// The group is changed by what the catalogue says now. A copy that lags shows a replica as Filling whose data is
// gone by now.
func TestAgentChangesByLinearizableRead(t *testing.T) {
	t.Parallel()
	bench(t, 4, func(t *testing.T, b *agentBench) {
		r := b.ready(t, 3)
		join := meta.Replica{ID: testReplica(0x99), Node: "n4", Disk: testDisk(4), State: meta.ReplicaFilling}
		r.lead(false)
		b.cat.edit(vol, func(v *meta.Volume) { v.Replicas = append(v.Replicas, join) })
		b.cat.freeze(true)
		b.cat.edit(vol, func(v *meta.Volume) { v.Replicas = v.Replicas[:3] })
		r.lead(true)
		settle()
		assert.Len(t, r.Status().Members, 3)
		b.cat.freeze(false)
		settle()

		// A learner that came in all the same, from a leader that asked just before, is taken out again.
		require.NoError(t, r.AddLearner(t.Context(), raftgroup.Member{Replica: join.ID, Node: join.Node}))
		r.lead(true)
		settle()
		assert.Len(t, r.Status().Members, 3)
	})
}

// Leadership is wanted on a node that is dead: its replica is replaced all the same.
func TestAgentReplacesWhereLeadershipIsWanted(t *testing.T) {
	t.Parallel()
	bench(t, 4, func(t *testing.T, b *agentBench) {
		r := b.ready(t, 3)
		r.stays = true
		b.cat.must(meta.Command{WantLeader: &meta.WantLeader{Volume: vol, Replica: ours(2)}})
		b.cat.edit(vol, func(v *meta.Volume) {
			v.Replicas = append(v.Replicas, meta.Replica{
				ID: ours(4), Node: "n4", Disk: testDisk(4), State: meta.ReplicaFilling, Replaces: ours(2),
			})
		})
		settle()
		v := b.cat.volume(vol)
		assert.Equal(t, meta.ReplicaReady, v.Replica(ours(4)).State)
		assert.Nil(t, v.Replica(ours(2)))
		assert.Equal(t, ours(2), v.Retired[0].ID)
	})
}

// A replica that leaves its group and has lost its data is not reported: it goes in any case, and a report would
// take it for one that is to be replaced.
func TestAgentLeavingReplicaWithoutData(t *testing.T) {
	t.Parallel()
	bench(t, 3, func(t *testing.T, b *agentBench) {
		b.ready(t, 3)
		b.agent.close()
		b.cat.edit(vol, func(v *meta.Volume) { v.Replicas[0].State = meta.ReplicaLeaving })
		b.host = newFakeHost()
		b.host.lost[vol] = trivet.ErrNotFound
		b.cfg.Self.Incarnation = testUUID(0x400)
		b.start()
		settle()
		assert.Equal(t, meta.ReplicaLeaving, b.cat.volume(vol).Replicas[0].State)
	})
}

// A node fills a replica of two groups at a time, the others wait; a receiver that is not alive holds no place.
func TestAgentBoundsFills(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newAgentBench(5)
		b.start()
		defer func() { b.agent.close() }()
		synctest.Wait()
		var rs []*fakeReplica
		filled := func() (n int) {
			for _, r := range rs {
				n += len(r.Status().Members) - 3
			}
			return n
		}
		for id := trivet.VolumeID(1); id <= 4; id++ {
			b.cat.addVolume(id, 3, nil)
			b.cat.report(id, 2, meta.ReplicaReady)
			b.cat.report(id, 3, meta.ReplicaReady)
			settle()
			r := b.host.replica(id)
			r.lags = true
			r.lead(true)
			rs = append(rs, r)
		}
		settle()
		fill := func(id trivet.VolumeID, node int) {
			b.cat.edit(id, func(v *meta.Volume) {
				v.Replicas = append(v.Replicas, meta.Replica{
					ID: testReplica(int(id)<<4 | 9), Node: testNodeID(node), Disk: testDisk(node), State: meta.ReplicaFilling,
				})
			})
		}
		for id := trivet.VolumeID(1); id <= 4; id++ {
			fill(id, 4)
		}
		settle()
		assert.Equal(t, fillsMax, filled())
		for _, r := range rs { // those that are under way get through
			if len(r.Status().Members) > 3 {
				r.mu.Lock()
				r.lags = false
				r.mu.Unlock()
				break
			}
		}
		settle()
		assert.Equal(t, fillsMax+1, filled())
		n, _ := b.cat.Local().Node("n4")
		n.LeaseUntil, n.Incarnation = time.Now().Add(-time.Minute), testUUID(0x999)
		b.cat.must(meta.Command{RegisterNode: &meta.RegisterNode{Node: n}})
		settle()
		assert.Equal(t, fillsMax+2, filled(), "nothing goes to a node that is not alive")
	})
}
