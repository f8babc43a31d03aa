package controller_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

// startMender runs the mender of a node until the end of the test. The store's leader is n1.
func startMender(t *testing.T, b *bench, node trivet.NodeID, replaceAfter time.Duration) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	m := controller.NewMender(b.store, node, replaceAfter, nil)
	go func() {
		defer close(done)
		m.Run(ctx)
	}()
	t.Cleanup(func() { cancel(); <-done })
}

// shape says where the replicas of a volume are and how they are, by node.
func (b *bench) shape(name string) string {
	v, _ := b.store.Local().VolumeByName(name)
	var out []string
	for n := 1; n <= 9; n++ {
		for _, r := range v.Replicas {
			if r.Node == nodeID(n) {
				out = append(out, fmt.Sprintf("%s:%s", r.Node, r.State))
			}
		}
	}
	return strings.Join(out, " ")
}

// later lets d pass, in which everybody does what there is to do.
func later(d time.Duration) {
	time.Sleep(d) // of the bubble's clock
	synctest.Wait()
}

func TestMenderFollowsWhatIsWanted(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 6)
		v := b.create(t, "v", nil)
		startMender(t, b, "n1", time.Minute)
		later(time.Minute)
		assert.Equal(t, "n1:Ready n2:Ready n3:Ready", b.shape("v"))

		_, err := b.SetReplicas(soon(t), v.ID, 5)
		require.NoError(t, err)
		later(10 * time.Second)
		assert.Equal(t, "n1:Ready n2:Ready n3:Ready n4:Ready n5:Ready", b.shape("v"))
		_, err = b.SetReplicas(soon(t), v.ID, 2)
		require.ErrorIs(t, err, trivet.ErrInvalid)

		_, err = b.CordonNode(soon(t), "n2", false, true)
		require.NoError(t, err)
		later(10 * time.Second)
		assert.Equal(t, "n1:Ready n3:Ready n4:Ready n5:Ready n6:Ready", b.shape("v"))
		left, err := b.Remaining(soon(t), "n2")
		require.NoError(t, err)
		assert.Empty(t, left)

		_, err = b.CordonNode(soon(t), "n3", false, true)
		require.NoError(t, err)
		later(10 * time.Second)
		left, err = b.Remaining(soon(t), "n3")
		require.NoError(t, err)
		require.Len(t, left, 1)
		assert.Equal(t, "v", left[0].Name)
		assert.Contains(t, left[0].Why, "cordoned: n2")

		_, err = b.SetReplicas(soon(t), v.ID, 1)
		require.NoError(t, err)
		later(30 * time.Second)
		got, _ := b.store.Local().Volume(v.ID)
		assert.Len(t, got.Replicas, 1)
		assert.Empty(t, got.Retired)
		require.NoError(t, b.DeleteVolume(soon(t), v.ID))
	})
}

// TestMenderReplacesTheDead: nothing is written when a lease runs out, and the mender notices all the same;
// but only the one that leads, and not before it has led for replaceAfter itself.
func TestMenderReplacesTheDead(t *testing.T) {
	for _, node := range []trivet.NodeID{"n1", "n2"} {
		t.Run(string(node), func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				b := newBench(t, 4)
				b.create(t, "v", nil)
				b.agents.set(t, func() { b.agents.dead["n3"] = true })
				dead := testNode(3, time.Now().Add(-2*time.Hour)) // for an hour
				dead.Incarnation = uuid(0xf, 99)
				b.store.must(t, meta.Command{RegisterNode: &meta.RegisterNode{Node: dead}})
				startMender(t, b, node, 10*time.Minute)
				later(9 * time.Minute)
				assert.Equal(t, "n1:Ready n2:Ready n3:Ready", b.shape("v"))
				later(2 * time.Minute)
				if node == "n1" {
					assert.Equal(t, "n1:Ready n2:Ready n4:Ready", b.shape("v"))
				} else {
					assert.Equal(t, "n1:Ready n2:Ready n3:Ready", b.shape("v"), "another node leads the catalogue")
				}
			})
		})
	}
}

// TestMenderTriesElsewhere: a node that does not bring up the replica is not tried again and again.
func TestMenderTriesElsewhere(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 5)
		v := b.create(t, "v", nil)
		b.agents.set(t, func() { b.agents.faulty["n4"], b.agents.dead["n4"] = true, false })
		tries := 0
		b.store.before = func(c meta.Command) bool {
			if c.AddReplica != nil && c.AddReplica.Replica.Node == "n4" {
				tries++
			}
			return true
		}
		startMender(t, b, "n1", 10*time.Minute)
		b.store.must(t, meta.Command{ReportReplica: &meta.ReportReplica{
			Volume: v.ID, Replica: v.Replicas[0].ID, State: meta.ReplicaFaulted, Reason: "rotten",
		}})
		lost := v.Replicas[0].Node
		later(30 * time.Second)
		assert.Equal(t, 1, tries)
		got, _ := b.store.Local().Volume(v.ID)
		assert.Nil(t, got.ReplicaOn(lost))
		require.NotNil(t, got.ReplicaOn("n5"))
		assert.Equal(t, meta.ReplicaReady, got.ReplicaOn("n5").State)
	})
}

func TestMoveReplica(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 6)
		v := b.create(t, "v", nil)
		now := time.Now()
		full := testNode(5, now)
		full.Disks[0].FreeBytes = gib / 2
		b.store.must(t, meta.Command{RegisterNode: &meta.RegisterNode{Node: full}})
		down := testNode(6, now.Add(-2*time.Hour))
		down.Incarnation = uuid(0xf, 99)
		b.store.must(t, meta.Command{RegisterNode: &meta.RegisterNode{Node: down}})
		for _, tc := range []struct {
			from, to trivet.NodeID
			want     error
			text     string
		}{
			{"n1", "n9", trivet.ErrNotFound, `node "n9" is unknown`},
			{"n9", "n4", trivet.ErrNotFound, `node "n9" is unknown`},
			{"n4", "n1", trivet.ErrNotFound, "no replica on n4"},
			{"n1", "n2", trivet.ErrExists, "n2 has a replica already"},
			{"n1", "n5", trivet.ErrNoSpace, "too little room: n5"},
			{"n1", "n6", trivet.ErrInvalid, "node n6 is down"},
		} {
			_, err := b.MoveReplica(soon(t), v.ID, tc.from, tc.to)
			require.ErrorIs(t, err, tc.want, tc.text)
			require.ErrorContains(t, err, tc.text)
		}
		_, err := b.MoveReplica(soon(t), 99, "n1", "n4")
		require.ErrorIs(t, err, trivet.ErrNotFound)
		_, err = b.CordonNode(soon(t), "n4", true, false)
		require.NoError(t, err)
		_, err = b.MoveReplica(soon(t), v.ID, "n1", "n4")
		require.ErrorContains(t, err, "node n4 is cordoned")
		_, err = b.CordonNode(soon(t), "n4", false, false)
		require.NoError(t, err)

		b.agents.set(t, func() { b.agents.dead["n4"] = true })
		moved, err := b.MoveReplica(soon(t), v.ID, "n1", "n4")
		require.NoError(t, err)
		assert.Equal(t, meta.ReplicaJoining, moved.ReplicaOn("n4").State)
		again, err := b.MoveReplica(soon(t), v.ID, "n1", "n4")
		require.NoError(t, err, "it is under way")
		assert.Equal(t, moved.Revision, again.Revision)
		_, err = b.MoveReplica(soon(t), v.ID, "n2", "n3")
		require.ErrorIs(t, err, trivet.ErrExists)
		left, err := b.Remaining(soon(t), "n1")
		require.NoError(t, err)
		require.Len(t, left, 1)
		assert.Equal(t, "a replica is being made on n4, in place of the one on n1", left[0].Why)

		b.agents.set(t, func() { b.agents.dead["n4"] = false })
		later(time.Second)
		assert.Equal(t, "n2:Ready n3:Ready n4:Ready", b.shape("v"))

		for n := 2; n <= 3; n++ { // two of three lost: nothing can be changed
			got, _ := b.store.Local().Volume(v.ID)
			b.store.must(t, meta.Command{ReportReplica: &meta.ReportReplica{
				Volume: v.ID, Replica: got.ReplicaOn(nodeID(n)).ID, State: meta.ReplicaFaulted, Reason: "rotten",
			}})
		}
		_, err = b.MoveReplica(soon(t), v.ID, "n2", "n1")
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		require.ErrorContains(t, err, "no majority")
	})
}
