package meta_test

import (
	"math/rand"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

func randomPlace(r *rand.Rand, node trivet.NodeID) meta.Command {
	p := &meta.PlaceNode{Node: node}
	switch r.Intn(4) {
	case 0:
		p.Own = true
	case 1:
		p.Rack = new([]string{"", "r"}[r.Intn(2)])
	default:
		p.Zone = new([]string{"", "a", "b"}[r.Intn(3)])
	}
	return meta.Command{PlaceNode: p}
}

// randomCommand draws commands about few things, so that they meet: about half take effect.
func randomCommand(r *rand.Rand, m *meta.Machine) meta.Command {
	id, n := 1+r.Intn(6), 1+r.Intn(4)
	vid := trivet.VolumeID(id)
	if vols := m.State().Volumes(); len(vols) > 0 && r.Intn(5) > 0 {
		vid = vols[r.Intn(len(vols))].ID
	}
	v, _ := m.State().Volume(vid)
	epoch := trivet.Epoch(max(1, int(v.Epoch)+r.Intn(4)-2))
	policy := []meta.ReclaimPolicy{meta.ReclaimDelete, meta.ReclaimRetain, meta.ReclaimRecycle}[r.Intn(3)]
	zone := time.FixedZone("x", r.Intn(7200)) // proposers live in different zones
	when := day.Add(time.Duration(r.Intn(1e6)) * time.Millisecond).In(zone)
	commands := []func() meta.Command{
		func() meta.Command {
			nd := node(n)
			nd.Incarnation, nd.LeaseUntil = incarnation(r.Intn(20)), when
			return meta.Command{RegisterNode: &meta.RegisterNode{Node: nd}}
		},
		func() meta.Command {
			nd, _ := m.State().Node(nodeID(n))
			return meta.Command{RenewLease: &meta.RenewLease{
				Node: nodeID(n), Incarnation: incarnation(n), Until: when, Disks: nd.Disks,
			}}
		},
		func() meta.Command {
			fresh := volume(id, policy, [][]int{{1}, {1, 2, 3}, {2}}[r.Intn(3)]...)
			fresh.ID, fresh.Created = trivet.VolumeID(r.Intn(500)), when
			if r.Intn(2) == 0 {
				fresh.Params[meta.ParamReclaimWipe] = "zero"
			}
			return meta.Command{CreateVolume: &meta.CreateVolume{Volume: fresh, Claim: r.Intn(2) == 0}}
		},
		func() meta.Command {
			if vols := m.State().Volumes(); len(vols) > 0 {
				v := vols[r.Intn(len(vols))]
				states := []meta.ReplicaState{
					meta.ReplicaReady, meta.ReplicaReady, meta.ReplicaFaulted, meta.ReplicaRemoved,
					meta.ReplicaFilling, meta.ReplicaLeft,
				}
				all := slices.Concat(v.Replicas, v.Retired)
				return meta.Command{ReportReplica: &meta.ReportReplica{
					Volume: v.ID, Replica: all[r.Intn(len(all))].ID, State: states[r.Intn(len(states))],
				}}
			}
			return report(id, n, meta.ReplicaReady)
		},
		func() meta.Command {
			modes := []meta.AccessMode{
				meta.SingleNodeSingleWriter, meta.SingleNodeMultiWriter, meta.SingleNodeReader,
				meta.MultiNodeReader, meta.MultiNodeReader, meta.MultiNodeReader,
				meta.MultiNodeMultiWriter, meta.MultiNodeMultiWriter, meta.MultiNodeMultiWriter,
			}
			return meta.Command{Attach: &meta.Attach{Volume: vid, Node: nodeID(n), Mode: modes[r.Intn(len(modes))]}}
		},
		func() meta.Command { return meta.Command{TakeOver: &meta.TakeOver{Volume: vid, Node: nodeID(n)}} },
		func() meta.Command {
			add := &meta.AddReplica{Volume: vid, IfRevision: max(1, v.Revision), Replica: meta.Replica{
				ID: replicaID(1000 + r.Intn(1000)), Node: nodeID(n), Disk: diskID(n),
			}}
			if len(v.Replicas) > 0 && r.Intn(2) == 0 {
				add.Replica.Replaces = v.Replicas[r.Intn(len(v.Replicas))].ID
			}
			return meta.Command{AddReplica: add}
		},
		func() meta.Command {
			if len(v.Replicas) == 0 {
				return meta.Command{SetReplicas: &meta.SetReplicas{Volume: vid, Count: []int{1, 3, 5}[r.Intn(3)]}}
			}
			return meta.Command{RemoveReplica: &meta.RemoveReplica{
				Volume: vid, Replica: v.Replicas[r.Intn(len(v.Replicas))].ID,
			}}
		},
		func() meta.Command {
			on := r.Intn(3) == 0
			return meta.Command{CordonNode: &meta.CordonNode{Node: nodeID(n), Cordoned: on, Draining: on && r.Intn(2) == 0}}
		},
		func() meta.Command { return randomPlace(r, nodeID(n)) },
		func() meta.Command {
			return meta.Command{Time: when, Detach: &meta.Detach{
				Volume: vid, Node: []trivet.NodeID{"", nodeID(n)}[r.Intn(2)], Forced: r.Intn(2) == 0,
			}}
		},
		func() meta.Command {
			node, _ := m.State().Node(nodeID(n))
			until := node.LeaseUntil.Add(time.Duration(r.Intn(2)) * time.Second) // as it is, or not
			return meta.Command{Time: when, Detach: &meta.Detach{Volume: vid, Node: nodeID(n), Forced: true, IfLease: until}}
		},
	}
	commands = append(commands, randomSizeCommands(r, vid)...)
	d := drawn{id: id, n: n, volume: vid, v: v, epoch: epoch, policy: policy, when: when}
	commands = append(commands, randomMore(r, d)...)
	commands = append(commands, randomSnapshotCommands(r, m, v)...)
	commands = append(commands, randomGroupCommands(r, m, v)...)
	c := commands[r.Intn(len(commands))]()
	if c.Attach != nil || c.ReportReplica != nil || c.CreateVolume != nil || c.AddReplica != nil || r.Intn(3) > 0 {
		return c
	}
	return commands[3]()
}

func randomSizeCommands(r *rand.Rand, vid trivet.VolumeID) []func() meta.Command {
	return []func() meta.Command{
		func() meta.Command {
			return meta.Command{GrowVolume: &meta.GrowVolume{Volume: vid, SizeBytes: 1<<30 + int64(r.Intn(9))<<20}}
		},
		func() meta.Command {
			return meta.Command{ReportSize: &meta.ReportSize{Volume: vid, SizeBytes: 1<<30 + int64(r.Intn(9))<<20}}
		},
	}
}

// drawn is what randomCommand drew for whichever command it will be.
type drawn struct {
	id, n  int
	volume trivet.VolumeID
	v      meta.Volume // nothing without such a volume
	epoch  trivet.Epoch
	policy meta.ReclaimPolicy
	when   time.Time
}

func randomMore(r *rand.Rand, d drawn) []func() meta.Command {
	return []func() meta.Command{
		func() meta.Command { return meta.Command{ForgetNode: randomForget(r, d.n)} },
		func() meta.Command { return meta.Command{SetParams: randomParams(r, d.volume, d.v.Revision)} },
		func() meta.Command {
			return meta.Command{SetLabels: &meta.SetLabels{
				Volume: d.volume, Labels: map[string]string{"tier": []string{"", "1", "2"}[r.Intn(3)]},
				Remove: []string{"a", "b", "c"}[:r.Intn(3)], IfRevision: d.v.Revision * meta.Revision(r.Intn(2)),
			}}
		},
		func() meta.Command { return randomScrub(r, &d.v, d.volume) },
		func() meta.Command {
			if len(d.v.Replicas) == 0 || r.Intn(4) > 0 {
				return meta.Command{ReportRecovered: &meta.ReportRecovered{
					Volume: d.volume, Replica: max(d.v.Recover, replicaID(1)),
				}}
			}
			return meta.Command{Time: d.when, RecoverVolume: &meta.RecoverVolume{
				Volume: d.volume, Replica: d.v.Replicas[r.Intn(len(d.v.Replicas))].ID, IfRevision: max(d.v.Revision, 1),
			}}
		},
		func() meta.Command {
			return meta.Command{ReportFence: &meta.ReportFence{Volume: d.volume, Epoch: d.epoch}}
		},
		func() meta.Command {
			return meta.Command{ReportWiped: &meta.ReportWiped{Volume: d.volume, Epoch: d.epoch}}
		},
		func() meta.Command {
			return meta.Command{Time: d.when, By: nodeID(d.n), Release: &meta.Release{
				Volume: d.volume, Discard: r.Intn(4) == 0, SkipWipe: r.Intn(8) == 0,
			}}
		},
		func() meta.Command { return meta.Command{Reclaim: &meta.Reclaim{Volume: d.volume, Policy: d.policy}} },
		func() meta.Command { return meta.Command{Fail: &meta.Fail{Volume: d.volume, Reason: "seed"}} },
		func() meta.Command {
			return meta.Command{WantLeader: &meta.WantLeader{Volume: d.volume, Replica: replicaID(d.id*10 + d.n)}}
		},
		func() meta.Command {
			return meta.Command{ReportLeader: &meta.ReportLeader{
				Volume: d.volume, Replica: replicaID(d.id*10 + d.n), Term: uint64(r.Intn(5)),
			}}
		},
	}
}

func randomForget(r *rand.Rand, n int) *meta.ForgetNode {
	return &meta.ForgetNode{
		Node: nodeID(n), Time: day.Add(time.Duration(2*r.Intn(2)-1) * time.Hour), Allow: r.Intn(8) > 0,
	}
}

// TestDeterminism: the same log gives the same bytes, whether applied as structs or decoded, in one
// go or through images at random points; epochs never fall (I7); IDs once used stay used (H35). What an
// image refuses (two changes of one volume at once, I11) never comes about.
func TestDeterminism(t *testing.T) {
	t.Parallel()
	moved, grouped := map[meta.ReplicaState]int{}, map[meta.SnapshotGroupState]int{}
	for seed := range int64(8) {
		r := rand.New(rand.NewSource(seed))
		live, logged := cluster(t), cluster(t)
		effects := 0
		epochs, used := map[trivet.VolumeID]trivet.Epoch{}, map[trivet.VolumeID]bool{}
		for step := range 1000 {
			c := randomCommand(r, live)
			if c.Validate() != nil {
				continue
			}
			b, err := c.Encode()
			require.NoError(t, err)
			decoded, err := meta.Decode(b)
			require.NoError(t, err)
			before := live.State().Revision()
			one, two := live.Apply(c), logged.Apply(decoded)
			require.Equal(t, one.Revision, two.Revision, "seed %d step %d %s", seed, step, c.Op())
			require.Equal(t, one.Volume, two.Volume, "seed %d step %d %s", seed, step, c.Op())
			require.Equal(t, errorText(one.Err), errorText(two.Err))
			if one.Revision != before {
				effects++
			}
			if r.Intn(10) == 0 {
				restored, err := meta.DecodeImage(mustImage(t, logged.State()))
				require.NoError(t, err, "seed %d step %d %s", seed, step, c.Op())
				logged = meta.NewMachine(restored)
			}
			for _, g := range live.State().SnapshotGroups() {
				grouped[g.State]++
			}
			for _, v := range live.State().Volumes() {
				if c := v.Change(); c != nil {
					moved[c.State]++
				}
				require.GreaterOrEqual(t, v.Epoch, epochs[v.ID])
				epochs[v.ID], used[v.ID] = v.Epoch, true
			}
		}
		require.Equal(t, mustImage(t, live.State()), mustImage(t, logged.State()), "seed %d", seed)
		for id := range used {
			require.True(t, logged.State().Used(id))
		}
		require.NoError(t, live.State().Audit().Verify())
		require.NotEmpty(t, live.State().Audit().Records)
		require.Greater(t, effects, 60, "seed %d: too little happened for the test to mean anything", seed)
	}
	require.Len(t, moved, 3, "not every change of members came about: %v", moved)
	require.Len(t, grouped, 5, "not every state of a group came about: %v", grouped)
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// FuzzCommand: whatever comes over the wire is refused or a command that can be encoded again,
// applied without a panic, and leaves a catalogue that keeps its invariants.
func FuzzCommand(f *testing.F) {
	r := rand.New(rand.NewSource(1))
	m := meta.NewMachine(nil)
	for range 200 {
		if b, err := randomCommand(r, m).Encode(); err == nil {
			f.Add(b)
		}
	}
	f.Add([]byte("\x01" + `{"initCluster":{"cluster":"` + uuid(1, 1) + `","time":"2026-11-25T12:00:00Z"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := meta.Decode(b)
		if err != nil {
			require.ErrorIs(t, err, trivet.ErrInvalid)
			return
		}
		encoded, err := c.Encode()
		require.NoError(t, err)
		again, err := meta.Decode(encoded)
		require.NoError(t, err)
		twice, err := again.Encode()
		require.NoError(t, err)
		require.Equal(t, encoded, twice)
		for _, column := range []string{"Bound", "Attached", "Detaching", "Recycle"} {
			m := situation(t, column)
			m.Apply(c)
			image := mustImage(t, m.State())
			s, err := meta.DecodeImage(image)
			require.NoError(t, err)
			require.Equal(t, image, mustImage(t, s))
		}
	})
}

// FuzzImage mutates the JSON within a valid frame, to get past the checksum.
func FuzzImage(f *testing.F) {
	m := meta.NewMachine(nil)
	m.Apply(meta.Command{InitCluster: &meta.InitCluster{Cluster: trivet.ClusterID(uuid(1, 1)), Time: day}})
	m.Apply(meta.Command{RegisterNode: &meta.RegisterNode{Node: node(1)}})
	m.Apply(meta.Command{CreateVolume: &meta.CreateVolume{Volume: volume(1, meta.ReclaimDelete, 1)}})
	m.Apply(report(1, 1, meta.ReplicaReady))
	m.Apply(attach(1, false, 0))
	image, err := m.State().EncodeImage()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(image[16 : len(image)-4])
	f.Fuzz(func(t *testing.T, body []byte) {
		b := framed(body)
		if _, err := meta.DecodeImage(body); err == nil {
			t.Fatal("accepted without a frame")
		}
		s, err := meta.DecodeImage(b)
		if err != nil {
			require.ErrorIs(t, err, trivet.ErrCorrupt)
			return
		}
		once := mustImage(t, s)
		again, err := meta.DecodeImage(once)
		require.NoError(t, err)
		require.Equal(t, once, mustImage(t, again))
		meta.NewMachine(s).Apply(attach(1, true, 0))
	})
}

func randomScrub(r *rand.Rand, v *meta.Volume, id trivet.VolumeID) meta.Command {
	pass, next := uint64(r.Intn(2)), trivet.LBA(0)
	if v.Scrub != nil {
		pass, next = v.Scrub.Pass+uint64(r.Intn(2)), v.Scrub.Next
	}
	if pass == 0 || r.Intn(2) == 0 {
		return meta.Command{StartScrub: &meta.StartScrub{Volume: id, Pass: pass, Verify: r.Intn(3) == 0, Time: day}}
	}
	return meta.Command{ReportScrub: &meta.ReportScrub{
		Volume: id, Pass: pass, From: next, Next: next + trivet.LBA(1+r.Intn(9)), Done: r.Intn(4) == 0, Found: 1, Time: day,
		Findings: []string{"seed"},
	}}
}

func randomParams(r *rand.Rand, id trivet.VolumeID, now meta.Revision) *meta.SetParams {
	p := &meta.SetParams{Volume: id, Params: map[string]string{}}
	for range 1 + r.Intn(3) {
		p.Params[[]string{"iopsLimit", "burst", "priority"}[r.Intn(3)]] = []string{"", "1", "2"}[r.Intn(3)]
	}
	if r.Intn(2) == 0 {
		p.IfRevision = now
	}
	if r.Intn(3) == 0 {
		p.Replicas = 1 + 2*r.Intn(3)
	}
	return p
}
