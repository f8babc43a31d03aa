package raftgroup_test

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// manyLog makes the log of a disk with room for many groups.
func manyLog(t *testing.T, fs vfs.FS) *segment.Log {
	t.Helper()
	opts := segment.Options{
		Dir: raftgroup.LogDir(fs, "/log"), Disk: "11111111-2222-4333-8444-555555555555", Lanes: 1, SegmentBytes: 1 << 20,
	}
	require.NoError(t, segment.Format(opts))
	log, err := segment.Open(opts)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, log.Close()) })
	return log
}

// manyGroups starts so many groups of the same two nodes beside each other, and returns those of each.
func manyGroups(t *testing.T, net *transport.Memory, n int) map[string][]*raftgroup.Group {
	t.Helper()
	groups := map[string][]*raftgroup.Group{}
	for _, name := range []string{"a", "b"} {
		mux := raftgroup.NewMux(net.Node(trivet.NodeID(name)))
		fs := vfs.NewMem()
		log := manyLog(t, fs)
		for i := range n {
			machine, err := openKV(fs, fmt.Sprintf("/machine-%d", i))
			require.NoError(t, err)
			cfg := raftgroup.Config{
				Group: testGroup + trivet.VolumeID(i), Replica: replicaID(name), FS: fs, Dir: fmt.Sprintf("/groups/%d", i),
				Network: mux, Machine: machine, Timing: raftgroup.Timing{Heartbeat: heartbeat}, Log: log,
				BootTime: func() time.Duration { return time.Since(time.Unix(0, 0)) },
				Fatal:    func(err error) { t.Error(err) },
			}
			require.NoError(t, raftgroup.Create(cfg, members("a", "b")))
			g, err := raftgroup.Open(cfg)
			require.NoError(t, err)
			groups[name] = append(groups[name], g)
		}
	}
	t.Cleanup(func() {
		for _, list := range groups {
			for _, g := range list {
				require.NoError(t, g.Close())
			}
		}
		require.NoError(t, net.Close())
	})
	return groups
}

// 200 idle groups: their heartbeats travel together, at most one message per tick and direction, and
// every leader keeps its lease by them.
func TestHeartbeatsOfManyGroups(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const groupN = 200
		net := transport.NewMemory(1)
		var mu sync.Mutex
		messages, beats, alone := 0, 0, 0
		groups := manyGroups(t, net, groupN)
		pass(5 * heartbeat) // elections
		defer net.Lose(func(e transport.Envelope) bool {
			mu.Lock()
			defer mu.Unlock()
			switch {
			case e.Reply:
			case e.Message.Kind == transport.KindHeartbeats:
				messages++
				beats += raftgroup.BeatN(e.Message.Body)
			case e.Message.Kind == transport.KindAppendEntries:
				messages++
				alone++
			}
			return false
		})()
		const seconds = 2
		for range seconds * 4 {
			pass(250 * time.Millisecond)
			leased := 0
			for i := range groupN {
				for _, name := range []string{"a", "b"} {
					if _, err := groups[name][i].ReadGate(); err == nil {
						leased++
					}
				}
			}
			require.Equal(t, groupN, leased, "groups with a lease")
		}
		mu.Lock()
		defer mu.Unlock()
		require.LessOrEqual(t, messages-alone, (seconds*5/2+1)*2, "one message per turn and direction")
		require.Greater(t, beats, seconds*groupN*2, "each group every 0.4 heartbeats")
		require.Less(t, beats, seconds*groupN*3, "and no more often")
		require.Less(t, alone, seconds*groupN/4, "nothing is told again")
		t.Logf("%d heartbeats of %d groups in %d s: %d messages, %d of them with one", beats+alone, groupN, seconds,
			messages, alone)
	})
}

// Each heartbeat of a message is judged alone: one that hangs, one of a stranger, one with the name of
// another node's replica, one with entries and one for nobody do not harm the one beside them (H37, S3).
func TestHeartbeatsAreJudgedAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		hang := make(chan struct{})
		defer close(hang)
		c.configure = func(cfg *raftgroup.Config) {
			cfg.IsMember = func(id trivet.ReplicaID, _ trivet.NodeID) bool {
				if id == replicaID("h") {
					<-hang // a catalogue that does not answer
				}
				return false
			}
		}
		for _, name := range []string{"a", "b", "c"} {
			require.NoError(t, raftgroup.Create(c.nodes[name].config(), members("a", "b", "c")))
			c.nodes[name].mustOpen()
		}
		c.mustPut("x", "1")
		c.converge()
		l := c.leader()
		victim := c.nodes[c.others(l.name)[0]]
		third := c.nodes[c.others(l.name, victim.name)[0]]
		term := raftgroup.RaftTerm(victim.group)
		first, last := raftgroup.LogBounds(victim.group)
		item := func(as string, body []byte) transport.Message {
			return transport.Message{Group: testGroup, From: replicaID(as), To: replicaID(victim.name), Body: body}
		}
		good := item(l.name, raftgroup.HeartbeatBody(term))
		nobody := good
		nobody.Group++
		evil := raftgroup.HeartbeatBody(term + 100)
		list := []transport.Message{
			good, item("h", evil), item("z", evil), item(third.name, evil), nobody,
			item(l.name, raftgroup.AppendBody(term, last, term, []byte("x=evil"))), item(l.name, []byte("junk")), good,
		}
		began := time.Now()
		reply, err := l.link.Call(t.Context(), trivet.NodeID(victim.name), transport.Message{
			Kind: transport.KindHeartbeats, Body: raftgroup.BeatsBody(list...),
		})
		require.NoError(t, err)
		require.LessOrEqual(t, time.Since(began), 70*time.Millisecond, "the one that hangs is not waited for")
		terms, ok, errs, err := raftgroup.BeatAnswers(reply.Body)
		require.NoError(t, err)
		require.Len(t, errs, len(list))
		for _, i := range []int{0, 7} {
			require.NoError(t, errs[i])
			require.True(t, ok[i])
			require.Equal(t, term, terms[i])
		}
		for i, want := range map[int]error{
			1: trivet.ErrUnavailable, 2: trivet.ErrInvalid, 3: trivet.ErrInvalid, 4: trivet.ErrNotFound,
			5: trivet.ErrInvalid, 6: trivet.ErrInvalid,
		} {
			require.ErrorIs(t, errs[i], want, "%d", i)
		}

		// And all of them from a node that is none.
		reply, err = c.net.Node("rogue").Call(t.Context(), trivet.NodeID(victim.name), transport.Message{
			Kind: transport.KindHeartbeats, Body: raftgroup.BeatsBody(item(l.name, evil), item("z", evil), item("z", nil)),
		})
		require.NoError(t, err)
		_, _, errs, err = raftgroup.BeatAnswers(reply.Body)
		require.NoError(t, err)
		for i, err := range errs {
			require.ErrorIs(t, err, trivet.ErrInvalid, "%d", i)
		}
		_, err = l.link.Call(t.Context(), trivet.NodeID(victim.name), transport.Message{
			Kind: transport.KindHeartbeats, Body: []byte("junk"),
		})
		require.Error(t, err)
		require.Equal(t, term, raftgroup.RaftTerm(victim.group))
		f, n := raftgroup.LogBounds(victim.group)
		require.Equal(t, []uint64{first, last}, []uint64{f, n})
		require.Equal(t, l, c.leader())
	})
}

// S3: no kind of Raft message is taken from a node that the group's configuration does not put it on.
func TestRogueKinds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		c.converge()
		l := c.leader()
		victim := c.nodes[c.others(l.name)[0]]
		third := c.nodes[c.others(l.name, victim.name)[0]]
		term := raftgroup.RaftTerm(victim.group)
		for kind := transport.KindAppendEntries; kind < transport.KindVolumeWrite; kind++ {
			if kind == transport.KindHeartbeats {
				continue // TestHeartbeatsAreJudgedAlone
			}
			for _, from := range []*transport.MemoryNode{c.net.Node("rogue"), third.link} {
				for _, as := range []trivet.ReplicaID{replicaID(l.name), replicaID("z"), ""} {
					_, err := from.Call(t.Context(), trivet.NodeID(victim.name), transport.Message{
						Kind: kind, Group: testGroup, From: as, To: replicaID(victim.name), Body: raftgroup.HeartbeatBody(term + 100),
					})
					if retired := kind > transport.KindTimeoutNow && kind < transport.KindHeartbeats; !retired &&
						kind <= transport.KindLogEntry {
						require.ErrorIs(t, err, trivet.ErrInvalid, "kind %d of %s as %q", kind, from.Local(), as)
					} else {
						require.ErrorContains(t, err, "no handler", "a new kind belongs into this test")
					}
				}
			}
		}
		require.Equal(t, term, raftgroup.RaftTerm(victim.group))
		require.Equal(t, l, c.leader())
	})
}
