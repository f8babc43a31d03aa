package meta_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

var day = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

// uuid makes readable UUIDs: kind tells disks from replicas, n which one.
func uuid(kind, n int) string { return fmt.Sprintf("%08x-0000-4000-8000-%012x", kind, n) }

func diskID(n int) trivet.DiskID       { return trivet.DiskID(uuid(0xd, n)) }
func replicaID(n int) trivet.ReplicaID { return trivet.ReplicaID(uuid(0xe, n)) }
func incarnation(n int) string         { return uuid(0xf, n) }

func nodeID(n int) trivet.NodeID { return trivet.NodeID(fmt.Sprintf("n%d", n)) }

func node(n int) meta.Node {
	return meta.Node{
		ID: nodeID(n), Address: fmt.Sprintf("n%d:7000", n), Zone: fmt.Sprintf("z%d", n%3),
		MetaReplica: trivet.ReplicaID(uuid(0xc, n)), Incarnation: incarnation(n), LeaseUntil: day,
		Disks: []meta.Disk{{ID: diskID(n), Path: "/d", SizeBytes: 100 << 30, FreeBytes: 90 << 30}},
	}
}

// volume has a replica on each of the nodes given, which carry the numbers of their nodes.
func volume(id int, policy meta.ReclaimPolicy, nodes ...int) meta.Volume {
	v := meta.Volume{
		ID: trivet.VolumeID(id), Name: fmt.Sprintf("name-%d", id), SizeBytes: 1 << 30, Reclaim: policy,
		Params: map[string]string{"replicas": fmt.Sprint(len(nodes))}, Request: "req", Created: day,
	}
	for _, n := range nodes {
		v.Replicas = append(v.Replicas, meta.Replica{
			ID: replicaID(id*10 + n), Node: nodeID(n), Disk: diskID(n), State: meta.ReplicaCreating,
		})
	}
	return v
}

// cluster returns a machine with three nodes.
func cluster(t *testing.T) *meta.Machine {
	t.Helper()
	m := meta.NewMachine(nil)
	mustApply(t, m, meta.Command{InitCluster: &meta.InitCluster{Cluster: trivet.ClusterID(uuid(1, 1)), Time: day}})
	for n := 1; n <= 3; n++ {
		mustApply(t, m, meta.Command{RegisterNode: &meta.RegisterNode{Node: node(n)}})
	}
	return m
}

func mustApply(t *testing.T, m *meta.Machine, c meta.Command) meta.Result {
	t.Helper()
	res := m.Apply(c)
	require.NoError(t, res.Err)
	return res
}

func mustImage(t *testing.T, s *meta.State) []byte {
	t.Helper()
	b, err := s.EncodeImage()
	require.NoError(t, err)
	return b
}

func TestStateIsASnapshot(t *testing.T) {
	t.Parallel()
	m := cluster(t)
	mustApply(t, m, meta.Command{CreateVolume: &meta.CreateVolume{Volume: volume(1, meta.ReclaimDelete, 1)}})
	before := m.State()
	image := mustImage(t, before)

	// Neither later commands nor a reader's own changes may show in a State.
	v, ok := before.Volume(1)
	require.True(t, ok)
	v.Params["replicas"] = "9"
	v.Replicas[0].State = meta.ReplicaFaulted
	n, ok := before.Node("n1")
	require.True(t, ok)
	n.Disks[0].FreeBytes = 0
	mustApply(t, m, report(1, 1, meta.ReplicaReady))
	mustApply(t, m, meta.Command{RenewLease: &meta.RenewLease{
		Node: "n1", Incarnation: incarnation(1), Until: day.Add(time.Hour), Disks: []meta.Disk{{ID: diskID(1), SizeBytes: 1}},
	}})
	mustApply(t, m, meta.Command{CreateVolume: &meta.CreateVolume{Volume: volume(2, meta.ReclaimDelete, 1)}})

	assert.Equal(t, image, mustImage(t, before))
	assert.NotEqual(t, image, mustImage(t, m.State()))
	assert.Len(t, before.Volumes(), 1)
	assert.Len(t, m.State().Volumes(), 2)
}

func report(vol, node int, state meta.ReplicaState) meta.Command {
	return meta.Command{ReportReplica: &meta.ReportReplica{
		Volume: trivet.VolumeID(vol), Replica: replicaID(vol*10 + node), State: state,
	}}
}

func TestSortedAndFound(t *testing.T) {
	t.Parallel()
	m := cluster(t)
	for _, id := range []int{900, 3, 77, 5000, 41} {
		mustApply(t, m, meta.Command{CreateVolume: &meta.CreateVolume{Volume: volume(id, meta.ReclaimDelete, 1, 2, 3)}})
	}
	var ids []int
	for _, v := range m.State().Volumes() {
		ids = append(ids, int(v.ID))
	}
	assert.Equal(t, []int{3, 41, 77, 900, 5000}, ids)
	v, ok := m.State().VolumeByName("name-77")
	require.True(t, ok)
	assert.Equal(t, trivet.VolumeID(77), v.ID)
	_, ok = m.State().VolumeByName("name-78")
	assert.False(t, ok)
	nodes := m.State().Nodes()
	require.Len(t, nodes, 3)
	assert.Equal(t, trivet.NodeID("n1"), nodes[0].ID)
	assert.Equal(t, trivet.NodeID("n3"), nodes[2].ID)
	assert.Equal(t, trivet.ClusterID(uuid(1, 1)), m.State().Cluster())
	assert.Equal(t, meta.Revision(9), m.State().Revision())
}

// TestUsedIDs: the ID of a volume that is gone is refused for ever, also after a restore (H35).
func TestUsedIDs(t *testing.T) {
	t.Parallel()
	m := cluster(t)
	mustApply(t, m, meta.Command{CreateVolume: &meta.CreateVolume{Volume: volume(1, meta.ReclaimDelete, 1)}})
	mustApply(t, m, meta.Command{Release: &meta.Release{Volume: 1}})
	mustApply(t, m, report(1, 1, meta.ReplicaRemoved))
	_, ok := m.State().Volume(1)
	require.False(t, ok)

	restored, err := meta.DecodeImage(mustImage(t, m.State()))
	require.NoError(t, err)
	for name, m := range map[string]*meta.Machine{"live": m, "restored": meta.NewMachine(restored)} {
		again := volume(1, meta.ReclaimDelete, 1)
		again.Name = "another-" + name
		res := m.Apply(meta.Command{CreateVolume: &meta.CreateVolume{Volume: again}})
		require.ErrorIs(t, res.Err, trivet.ErrExists, name)
		assert.True(t, m.State().Used(1), name)
		assert.Nil(t, res.Volume, name)
	}
}

// TestGolden keeps every version of both formats readable for ever. Regenerate with REWRITE=1 only the
// newest, and only before it was ever released.
func TestGolden(t *testing.T) {
	t.Parallel()
	m := cluster(t)
	create := meta.Command{CreateVolume: &meta.CreateVolume{Volume: volume(7, meta.ReclaimRetain, 1, 2, 3), Claim: true}}
	mustApply(t, m, create)
	for n := 1; n <= 3; n++ {
		mustApply(t, m, report(7, n, meta.ReplicaReady))
	}
	mustApply(t, m, meta.Command{Attach: &meta.Attach{Volume: 7, Node: "n2", Mode: meta.SingleNodeMultiWriter}})
	mustApply(t, m, meta.Command{RegisterNode: &meta.RegisterNode{Node: node(4)}})
	mustApply(t, m, meta.Command{CordonNode: &meta.CordonNode{Node: "n3", Cordoned: true, Draining: true}})
	v, _ := m.State().Volume(7)
	add := meta.Command{AddReplica: &meta.AddReplica{Volume: 7, IfRevision: v.Revision, Replica: meta.Replica{
		ID: replicaID(74), Node: "n4", Disk: diskID(4), Replaces: replicaID(73),
	}}}
	mustApply(t, m, add)
	for _, r := range []meta.Command{
		report(7, 4, meta.ReplicaFilling), report(7, 4, meta.ReplicaReady), report(7, 3, meta.ReplicaLeft),
	} {
		mustApply(t, m, r)
	}
	mustApply(t, m, meta.Command{CreateVolume: &meta.CreateVolume{
		Volume: volume(8, meta.ReclaimRetain, 1), Claim: true,
	}})
	mustApply(t, m, report(8, 1, meta.ReplicaReady))
	read := meta.Command{Attach: &meta.Attach{Volume: 8, Node: "n1", Mode: meta.MultiNodeReader}}
	mustApply(t, m, read)
	v, _ = m.State().Volume(8)
	join := meta.Command{Attach: &meta.Attach{
		Volume: 8, Node: "n2", Mode: meta.MultiNodeReader, Epoch: 2, IfRevision: v.Revision,
	}}
	mustApply(t, m, join)
	params := meta.Command{
		SetParams: &meta.SetParams{Volume: 7, IfRevision: 9, Params: map[string]string{"iopsLimit": "100", "burst": ""}},
	}
	scrub := meta.Command{StartScrub: &meta.StartScrub{Volume: 7, Pass: 1, RateBytes: 1 << 20, Time: day}}
	mustApply(t, m, scrub)
	scrubbed := meta.Command{ReportScrub: &meta.ReportScrub{
		Volume: 7, Pass: 1, Next: 8192, Time: day, CheckedBytes: 96 << 20, Found: 2, Repaired: 1, Left: 1,
		Findings: []string{"block 7 is damaged on n2"}, Absent: []trivet.NodeID{"n3"},
	}}
	mustApply(t, m, scrubbed)
	commands := map[string]meta.Command{
		"command-scrub.v1": scrub, "command-scrubbed.v1": scrubbed,
		"command.v1": create, "command-add.v1": add, "command-join.v1": join, "command-params.v1": params,
	}
	growing := meta.Command{GrowVolume: &meta.GrowVolume{Volume: 8, SizeBytes: 4 << 30, IfRevision: 19}}
	mustApply(t, m, growing)
	mustApply(t, m, meta.Command{ReportSize: &meta.ReportSize{Volume: 8, SizeBytes: 3 << 30}})
	commands["command-grow.v1"] = growing
	commands["command-labels.v1"] = meta.Command{
		SetLabels: &meta.SetLabels{
			Volume: 7, IfRevision: 9, Labels: map[string]string{"tier": "gold"}, Remove: []string{"old"},
		},
	}
	commands["command-place.v1"] = meta.Command{
		PlaceNode: &meta.PlaceNode{Node: "n2", Zone: new("west"), Rack: new("")},
	}
	detach := meta.Command{Time: day, By: "n1", Detach: &meta.Detach{Volume: 7, Node: "n2", Forced: true}}
	gone := meta.NewMachine(m.State())
	mustApply(t, gone, detach)
	commands["command-audited.v1"] = detach
	golden := map[string][]byte{"image-grow.v4": mustImage(t, m.State()), "image-audit.v4": mustImage(t, gone.State())}
	for name, c := range commands {
		b, err := c.Encode()
		require.NoError(t, err)
		golden[name] = b
	}
	for name, got := range golden {
		path := filepath.Join("testdata", name)
		if os.Getenv("REWRITE") != "" {
			require.NoError(t, os.WriteFile(path, got, 0o600))
		}
		want, err := os.ReadFile(path)
		require.NoError(t, err)
		assert.Equal(t, string(want), string(got), name)
	}
	for name, wanted := range map[string]int{"image.v1": 0, "image.v2": 3, "image.v3": 3, "image-grow.v4": 3} {
		old, err := os.ReadFile(filepath.Join("testdata", name))
		require.NoError(t, err)
		s, err := meta.DecodeImage(old)
		require.NoError(t, err, name)
		v, ok := s.Volume(7)
		require.True(t, ok, name)
		assert.Equal(t, trivet.NodeID("n2"), v.Attached.Node, name)
		assert.Equal(t, wanted, v.WantReplicas, name)
		assert.Equal(t, 3, v.Want(), name)
		if v, ok := s.Volume(8); ok {
			assert.Equal(t, int64(1<<30), v.Start(), name)
			assert.Equal(t, []trivet.NodeID{"n1", "n2"}, v.Holders(), name)
		}
	}
}

func TestCodecRefuses(t *testing.T) {
	t.Parallel()
	good, err := meta.Command{Release: &meta.Release{Volume: 1}}.Encode()
	require.NoError(t, err)
	for _, tc := range []struct {
		name string
		in   []byte
	}{
		{"empty", nil},
		{"version only", good[:1]},
		{"other version", append([]byte{9}, good[1:]...)},
		{"cut", good[:len(good)-1]},
		{"something after", append(append([]byte{}, good...), " {}"...)},
		{"no operation", []byte("\x01{}")},
		{"two operations", []byte("\x01" + `{"release":{"volume":1},"detach":{"volume":1}}`)},
		{"unknown operation", []byte("\x01" + `{"release":{"volume":1},"erase":{}}`)},
		{"unknown field", []byte("\x01" + `{"release":{"volume":1,"force":true}}`)},
		{"volume zero", []byte("\x01" + `{"release":{"volume":0}}`)},
		{"too long", append(append([]byte{}, good...), make([]byte, meta.CommandBytesMax)...)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			_, err := meta.Decode(tc.in)
			assert.ErrorIs(t, err, trivet.ErrInvalid)
		})
	}
	_, err = meta.Command{}.Encode()
	require.ErrorIs(t, err, trivet.ErrInvalid)
	assert.Equal(t, "command", meta.Command{}.Op())
	for name, c := range map[string]meta.Command{
		"no revision": {AddReplica: &meta.AddReplica{Volume: 1, Replica: meta.Replica{
			ID: replicaID(1), Node: "n1", Disk: diskID(1),
		}}},
		"a state": {AddReplica: &meta.AddReplica{Volume: 1, IfRevision: 1, Replica: meta.Replica{
			ID: replicaID(1), Node: "n1", Disk: diskID(1), State: meta.ReplicaReady,
		}}},
		"itself": {AddReplica: &meta.AddReplica{Volume: 1, IfRevision: 1, Replica: meta.Replica{
			ID: replicaID(1), Node: "n1", Disk: diskID(1), Replaces: replicaID(1),
		}}},
		"two replicas":         {SetReplicas: &meta.SetReplicas{Volume: 1, Count: 2}},
		"no parameters":        {SetParams: &meta.SetParams{Volume: 1}},
		"four replicas":        {SetParams: &meta.SetParams{Volume: 1, Replicas: 4}},
		"a nameless parameter": {SetParams: &meta.SetParams{Volume: 1, Params: map[string]string{"": "1"}}},
		"no text":              {SetParams: &meta.SetParams{Volume: 1, Params: map[string]string{"a": "\xff"}}},
		"no labels":            {SetLabels: &meta.SetLabels{Volume: 1}},
		"a nameless label":     {SetLabels: &meta.SetLabels{Volume: 1, Labels: map[string]string{"": "1"}}},
		"a label both ways": {SetLabels: &meta.SetLabels{
			Volume: 1, Labels: map[string]string{"a": ""}, Remove: []string{"a"},
		}},
		"no text to remove":      {SetLabels: &meta.SetLabels{Volume: 1, Remove: []string{"\xff"}}},
		"labels of nothing":      {SetLabels: &meta.SetLabels{Labels: map[string]string{"a": "1"}}},
		"parameters of nothing":  {SetParams: &meta.SetParams{Params: map[string]string{"a": "1"}}},
		"draining, not cordoned": {CordonNode: &meta.CordonNode{Node: "n1", Draining: true}},
		"joining reported":       report(1, 1, meta.ReplicaJoining),
		"leaving reported":       report(1, 1, meta.ReplicaLeaving),
	} {
		require.ErrorIs(t, c.Validate(), trivet.ErrInvalid, name)
	}
}

// TestParamsReadBack: a state after changes of parameters is the one that its image gives, also when none is left.
func TestParamsReadBack(t *testing.T) {
	t.Parallel()
	m := cluster(t)
	v := volume(1, meta.ReclaimDelete, 1)
	v.Params = nil
	mustApply(t, m, meta.Command{CreateVolume: &meta.CreateVolume{Volume: v}})
	for _, value := range []string{"1", "2", ""} {
		mustApply(t, m, meta.Command{SetParams: &meta.SetParams{Volume: 1, Params: map[string]string{"a": value}}})
		read, err := meta.DecodeImage(mustImage(t, m.State()))
		require.NoError(t, err)
		assert.Equal(t, m.State(), read)
	}
}

// TestLabels: what a volume was made with, changed, taken away, and read back from an image each time.
func TestLabels(t *testing.T) {
	t.Parallel()
	m := cluster(t)
	v := volume(1, meta.ReclaimDelete, 1)
	v.Labels = map[string]string{"tier": "gold", "old": ""}
	mustApply(t, m, meta.Command{CreateVolume: &meta.CreateVolume{Volume: v}})
	for _, tt := range []struct {
		set    map[string]string
		remove []string
		want   map[string]string
	}{
		{map[string]string{"tier": "gold"}, []string{"none"}, map[string]string{"tier": "gold", "old": ""}},
		{map[string]string{"tier": "", "a": "1"}, []string{"old"}, map[string]string{"tier": "", "a": "1"}},
		{nil, []string{"a", "tier"}, nil},
		{map[string]string{"b": "2"}, nil, map[string]string{"b": "2"}},
	} {
		before, _ := m.State().Volume(1)
		set := meta.Command{SetLabels: &meta.SetLabels{
			Volume: 1, Labels: tt.set, Remove: tt.remove, IfRevision: before.Revision,
		}}
		mustApply(t, m, set)
		now, _ := m.State().Volume(1)
		assert.Equal(t, tt.want, now.Labels)
		read, err := meta.DecodeImage(mustImage(t, m.State()))
		require.NoError(t, err)
		assert.Equal(t, m.State(), read)
		if now.Revision != before.Revision {
			require.ErrorIs(t, m.Apply(set).Err, trivet.ErrPending, "a late copy")
		}
	}
	many := map[string]string{}
	for i := range 64 {
		many[fmt.Sprint(i)] = ""
	}
	res := m.Apply(meta.Command{SetLabels: &meta.SetLabels{Volume: 1, Labels: many}})
	require.ErrorIs(t, res.Err, trivet.ErrInvalid, "65 with the one that is there")
	many["more"] = ""
	v = volume(2, meta.ReclaimDelete, 1)
	v.Labels = many
	require.ErrorIs(t, m.Apply(meta.Command{CreateVolume: &meta.CreateVolume{Volume: v}}).Err, trivet.ErrInvalid)
}

// TestImageRefusesWhatCannotBe: a valid frame around a volume with two replicas on their way (I11), one that
// is there twice, or one that is retired as a member.
func TestImageRefusesWhatCannotBe(t *testing.T) {
	t.Parallel()
	m := cluster(t)
	mustApply(t, m, meta.Command{CreateVolume: &meta.CreateVolume{Volume: volume(1, meta.ReclaimDelete, 1, 2, 3)}})
	b := mustImage(t, m.State())
	body := string(b[16 : len(b)-4])
	two := strings.ReplaceAll(body, string(replicaID(12)), string(replicaID(11)))
	retired := strings.Replace(body, `"wantReplicas":3`, `"wantReplicas":3,"retired":[{"id":"`+string(replicaID(99))+
		`","node":"n1","disk":"`+string(diskID(1))+`","state":"Ready"}]`, 1)
	for want, bad := range map[string]string{
		"3 replicas on their way": strings.ReplaceAll(body, `"state":"Creating"`, `"state":"Filling"`),
		"is there twice":          two,
		"is retired as Ready":     retired,
	} {
		require.NotEqual(t, body, bad)
		_, err := meta.DecodeImage(framed([]byte(bad)))
		require.ErrorIs(t, err, trivet.ErrCorrupt)
		require.ErrorContains(t, err, want)
	}
	_, err := meta.DecodeImage(framed([]byte(body)))
	require.NoError(t, err)
}

// framed makes an image of a body, whatever that holds.
func framed(body []byte) []byte {
	b := append([]byte("TMIM\x03\x00\x00\x00"), binary.LittleEndian.AppendUint64(nil, uint64(len(body)))...)
	b = append(b, body...)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
}

// TestImageDamage flips each byte and cuts at each length: never accepted, never a panic.
func TestImageDamage(t *testing.T) {
	t.Parallel()
	b := mustImage(t, cluster(t).State())
	_, err := meta.DecodeImage(b)
	require.NoError(t, err)
	for i := range b {
		bad := append([]byte{}, b...)
		bad[i] ^= 0x10
		_, err := meta.DecodeImage(bad)
		require.Truef(t, errors.Is(err, trivet.ErrCorrupt) || errors.Is(err, trivet.ErrInvalid), "flip at %d: %v", i, err)
		_, err = meta.DecodeImage(b[:i])
		require.ErrorIsf(t, err, trivet.ErrCorrupt, "cut at %d", i)
	}
}
