package meta_test

import (
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// groupOf asks for a group of volumes, whose snapshots have the IDs 10*id and up, as the volumes are now.
func groupOf(m *meta.Machine, id trivet.SnapshotGroupID, name string, volumes ...trivet.VolumeID) meta.Command {
	c := &meta.CreateSnapshotGroup{ID: id, Name: name, Created: day}
	for i, volume := range volumes {
		v, _ := m.State().Volume(volume)
		c.Members = append(c.Members, meta.NewMember{
			Snapshot: trivet.SnapshotID(10*uint64(id) + uint64(i)), Volume: volume, IfRevision: max(1, v.Revision),
		})
	}
	return meta.Command{CreateSnapshotGroup: c}
}

func attachTo(v, n int) meta.Command {
	c := attach(n, false, 0)
	c.Attach.Volume = trivet.VolumeID(v)
	return c
}

func beginGroup(id trivet.SnapshotGroupID, n int) meta.Command {
	return meta.Command{BeginSnapshotGroup: &meta.BeginSnapshotGroup{
		Group: id, Node: nodeID(n), Incarnation: incarnation(n),
	}}
}

// groupReady reports a group as Ready, with these members frozen by the process of node n.
func groupReady(id trivet.SnapshotGroupID, n int, members ...trivet.SnapshotID) meta.Command {
	r := &meta.ReportSnapshotGroup{Group: id, Node: nodeID(n), Incarnation: incarnation(n), State: meta.GroupReady}
	for _, s := range members {
		r.Frozen = append(r.Frozen, meta.FrozenMember{Snapshot: s, SizeBytes: 1 << 30, Generation: 4, Held: 1000})
	}
	return meta.Command{ReportSnapshotGroup: r}
}

func groupFailed(id trivet.SnapshotGroupID, n int) meta.Command {
	return meta.Command{ReportSnapshotGroup: &meta.ReportSnapshotGroup{
		Group: id, Node: nodeID(n), Incarnation: incarnation(n), State: meta.GroupFailed, Reason: "late",
	}}
}

func ungroup(id trivet.SnapshotGroupID) meta.Command {
	return meta.Command{DeleteSnapshotGroup: &meta.DeleteSnapshotGroup{Group: id}}
}

func groupState(m *meta.Machine, id trivet.SnapshotGroupID) meta.SnapshotGroupState {
	g, ok := m.State().SnapshotGroup(id)
	if !ok {
		return "gone"
	}
	return g.State
}

// withGroup is a cluster with volumes 1, which node n1 writes, and 2, which nobody has, and their group 7, "g", of snapshots
// 70 and 71.
func withGroup(t *testing.T) *meta.Machine {
	t.Helper()
	m := cluster(t)
	for id := 1; id <= 2; id++ {
		mustApply(t, m, meta.Command{CreateVolume: &meta.CreateVolume{Volume: volume(id, meta.ReclaimDelete, 1, 2, 3)}})
		for n := 1; n <= 3; n++ {
			mustApply(t, m, report(id, n, meta.ReplicaReady))
		}
	}
	mustApply(t, m, attach(1, false, 0))
	mustApply(t, m, meta.Command{ReportFence: &meta.ReportFence{Volume: 1, Epoch: 1}})
	mustApply(t, m, groupOf(m, 7, "g", 1, 2))
	return m
}

func TestGroupIsMadeOnce(t *testing.T) {
	t.Parallel()
	m := withGroup(t)
	g, _ := m.State().SnapshotGroup(7)
	require.Equal(t, []meta.GroupMember{{Snapshot: 70, Volume: 1, Epoch: 1}, {Snapshot: 71, Volume: 2}}, g.Members)
	s, ok := m.State().SnapshotByName("g/name-2")
	require.True(t, ok)
	require.Equal(t, trivet.SnapshotID(71), s.ID)
	require.Equal(t, trivet.SnapshotGroupID(7), s.Group)
	require.Len(t, m.State().UnsettledGroups(), 1)

	before := m.State()
	res := m.Apply(groupOf(m, 8, "g", 2, 1))
	require.NoError(t, res.Err)
	require.Equal(t, trivet.SnapshotGroupID(7), res.Group.ID, "the same name and volumes")
	require.Same(t, before, m.State())
	require.ErrorIs(t, m.Apply(groupOf(m, 8, "g", 1)).Err, trivet.ErrExists, "other volumes")
	require.ErrorIs(t, m.Apply(groupOf(m, 7, "h", 1)).Err, trivet.ErrExists, "the ID")
	require.ErrorIs(t, m.Apply(groupOf(m, 8, "h", 1, 9)).Err, trivet.ErrNotFound)
	late := groupOf(m, 8, "h", 1, 2)
	mustApply(t, m, beginGroup(7, 1))
	require.ErrorIs(t, m.Apply(late).Err, trivet.ErrPending, "decided on another revision")
	mustApply(t, m, attachTo(2, 2))
	require.ErrorIs(t, m.Apply(groupOf(m, 8, "h", 1, 2)).Err, trivet.ErrPending, "the epoch of 2 is not fenced")
	_, ok = m.State().SnapshotByName("h/name-1")
	require.False(t, ok, "all or nothing")
}

// TestGroupBecomesReady: what nobody may write comes by itself, the rest with the group, at once; the members stay with
// it until it is deleted, and its record goes with the last of theirs.
func TestGroupBecomesReady(t *testing.T) {
	t.Parallel()
	m := withGroup(t)
	require.ErrorIs(t, m.Apply(frozen(70)).Err, trivet.ErrInvalid, "somebody writes it: alone it is no point of the group's")
	mustApply(t, m, frozen(71))
	require.Equal(t, meta.SnapshotReady, stateOf(m, 71))
	require.ErrorIs(t, m.Apply(groupReady(7, 1, 70)).Err, trivet.ErrInvalid, "nobody has begun")
	mustApply(t, m, beginGroup(7, 1))
	require.ErrorIs(t, m.Apply(beginGroup(7, 2)).Err, trivet.ErrInUse)
	require.ErrorIs(t, m.Apply(groupReady(7, 2, 70)).Err, trivet.ErrInvalid, "another process")
	require.ErrorIs(t, m.Apply(groupReady(7, 1)).Err, trivet.ErrInvalid, "70 is not made")
	before := m.State().Revision()
	mustApply(t, m, beginGroup(7, 1))
	require.Equal(t, before, m.State().Revision(), "the same again")

	res := m.Apply(groupReady(7, 1, 70))
	require.NoError(t, res.Err)
	require.Equal(t, meta.GroupReady, res.Group.State)
	require.EqualValues(t, 1000, res.Group.Held)
	s, _ := m.State().Snapshot(70)
	require.Equal(t, meta.SnapshotReady, s.State)
	require.EqualValues(t, 4, s.Generation)
	require.Empty(t, m.State().UnsettledGroups())
	for _, late := range []meta.Command{groupFailed(7, 2), beginGroup(7, 2), groupReady(7, 1, 70)} {
		require.NoError(t, m.Apply(late).Err)
		require.Equal(t, meta.GroupReady, groupState(m, 7))
	}

	err := m.Apply(unsnap(70)).Err
	require.ErrorIs(t, err, trivet.ErrInUse)
	require.ErrorContains(t, err, `"g"`)
	mustApply(t, m, ungroup(7))
	require.Equal(t, meta.GroupDeleting, groupState(m, 7))
	_, named := m.State().SnapshotGroupByName("g")
	require.False(t, named)
	mustApply(t, m, groupOf(m, 9, "g", 2)) // the names are free
	mustApply(t, m, dropped(70))
	require.Equal(t, meta.GroupDeleting, groupState(m, 7))
	mustApply(t, m, dropped(71))
	require.Equal(t, meta.SnapshotGroupState("gone"), groupState(m, 7))
	require.NoError(t, m.Apply(ungroup(7)).Err)
	mustImage(t, m.State())
}

// TestGroupFails: with it go all its snapshots, made or not; its record stays, to say why, until it is deleted.
func TestGroupFails(t *testing.T) {
	t.Parallel()
	detach := meta.Command{Detach: &meta.Detach{Volume: 1}}
	for name, tt := range map[string]struct {
		why  []meta.Command
		want string
	}{
		"reported":                 {[]meta.Command{groupFailed(7, 3)}, "late"},
		"reported while it begins": {[]meta.Command{beginGroup(7, 1), groupFailed(7, 3)}, "late"},
		"the writer goes":          {[]meta.Command{detach, beginGroup(7, 1)}, "attached, detached or opened anew"},
		"a writer comes": {
			[]meta.Command{beginGroup(7, 1), attachTo(2, 3), groupReady(7, 1, 70, 71)},
			"attached, detached or opened anew",
		},
		"the writer's process": {
			[]meta.Command{beginGroup(7, 1), {TakeOver: &meta.TakeOver{Volume: 1, Node: "n1"}}, groupReady(7, 1, 70)},
			"attached, detached or opened anew",
		},
		"a member cannot be made": {[]meta.Command{{ReportSnapshot: &meta.ReportSnapshot{
			Snapshot: 71, State: meta.SnapshotFailed, Reason: "too many",
		}}}, "too many"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := withGroup(t)
			if !strings.Contains(name, "cannot") {
				mustApply(t, m, frozen(71))
			}
			for _, c := range tt.why {
				mustApply(t, m, c)
			}
			g, _ := m.State().SnapshotGroup(7)
			require.Equal(t, meta.GroupFailed, g.State)
			require.Contains(t, g.Reason, tt.want)
			require.Equal(t, meta.SnapshotDeleting, stateOf(m, 70))
			require.Equal(t, meta.SnapshotDeleting, stateOf(m, 71))
			require.Empty(t, m.State().UnsettledGroups())
			mustApply(t, m, groupReady(7, 1, 70))
			require.Equal(t, meta.GroupFailed, groupState(m, 7), "a late copy")
			mustApply(t, m, dropped(70))
			mustApply(t, m, dropped(71))
			require.Equal(t, meta.GroupFailed, groupState(m, 7))
			mustImage(t, m.State())
			mustApply(t, m, ungroup(7))
			require.Equal(t, meta.SnapshotGroupState("gone"), groupState(m, 7))
		})
	}
}

// TestGroupOfAVolumeThatIsRestored: a group is not deleted while a volume is brought back to a member.
func TestGroupOfAVolumeThatIsRestored(t *testing.T) {
	t.Parallel()
	m := withGroup(t)
	mustApply(t, m, frozen(71))
	mustApply(t, m, beginGroup(7, 1))
	mustApply(t, m, groupReady(7, 1, 70))
	v, _ := m.State().Volume(2)
	mustApply(t, m, meta.Command{Restore: &meta.Restore{Snapshot: 71, IfRevision: v.Revision}})
	require.ErrorIs(t, m.Apply(ungroup(7)).Err, trivet.ErrPending)
}

func TestGroupCommandsRefused(t *testing.T) {
	t.Parallel()
	m := withGroup(t)
	edit := func(f func(*meta.CreateSnapshotGroup)) meta.Command {
		c := groupOf(m, 8, "x", 1, 2)
		f(c.CreateSnapshotGroup)
		return c
	}
	many := make([]trivet.VolumeID, 65)
	for i := range many {
		many[i] = trivet.VolumeID(i + 1)
	}
	withReason, failed := groupReady(7, 1, 70), groupFailed(7, 1)
	withReason.ReportSnapshotGroup.Reason = "x"
	failed.ReportSnapshotGroup.Frozen = groupReady(7, 1, 70).ReportSnapshotGroup.Frozen
	for name, c := range map[string]meta.Command{
		"no volumes": groupOf(m, 8, "x"), "no id": groupOf(m, 0, "x", 1), "no name": groupOf(m, 8, "", 1),
		"reserved": groupOf(m, 8, "clone", 1), "slash": groupOf(m, 8, "a/b", 1), "too many": groupOf(m, 8, "x", many...),
		"volume twice":   groupOf(m, 8, "x", 1, 1),
		"snapshot twice": edit(func(c *meta.CreateSnapshotGroup) { c.Members[1].Snapshot = c.Members[0].Snapshot }),
		"no revision":    edit(func(c *meta.CreateSnapshotGroup) { c.Members[1].IfRevision = 0 }),
		"no snapshot":    edit(func(c *meta.CreateSnapshotGroup) { c.Members[1].Snapshot = 0 }),
		"begin nothing":  beginGroup(0, 1), "delete nothing": ungroup(0), "failed for nothing": func() meta.Command {
			c := groupFailed(7, 1)
			c.ReportSnapshotGroup.Reason = ""
			return c
		}(),
		"ready with a reason": withReason, "failed with members": failed,
		"another state": {ReportSnapshotGroup: &meta.ReportSnapshotGroup{
			Group: 7, Node: "n1", Incarnation: incarnation(1), State: meta.GroupDeleting,
		}},
		"no size": {ReportSnapshotGroup: &meta.ReportSnapshotGroup{
			Group: 7, Node: "n1", Incarnation: incarnation(1), State: meta.GroupReady, Frozen: []meta.FrozenMember{{Snapshot: 70}},
		}},
	} {
		require.ErrorIs(t, c.Validate(), trivet.ErrInvalid, name)
	}
}

// TestImageOfGroups: groups are in the image, which has no section for them without, and one around groups that cannot be
// opens nothing.
func TestImageOfGroups(t *testing.T) {
	t.Parallel()
	require.NotContains(t, string(mustImage(t, withSnapshot(t).State())), "snapshotGroups")
	m := withGroup(t)
	mustApply(t, m, frozen(71))
	create := groupOf(m, 9, "second", 2)
	mustApply(t, m, create)
	mustApply(t, m, beginGroup(7, 1))
	b := mustImage(t, m.State())
	read, err := meta.DecodeImage(b)
	require.NoError(t, err)
	require.Equal(t, m.State(), read)
	golden := map[string][]byte{"image-snapgroup.v4": b}
	for name, c := range map[string]meta.Command{
		"command-group.v1": create, "command-groupbegin.v1": beginGroup(7, 1), "command-ungroup.v1": ungroup(7),
		"command-groupready.v1": groupReady(7, 1, 70), "command-groupfailed.v1": groupFailed(7, 1),
	} {
		if golden[name], err = c.Encode(); err != nil {
			t.Fatal(err)
		}
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

	body := string(b[16 : len(b)-4])
	at := strings.Index(body, `"snapshotGroups":[`)
	in := func(old, bad string) string { return body[:at] + strings.Replace(body[at:], old, bad, 1) }
	for want, bad := range map[string]string{
		"does not know it":      in(`,{"snapshot":71,"volume":2,"epoch":0}`, ``),
		"is no snapshot of":     in(`{"snapshot":70,"volume":1`, `{"snapshot":70,"volume":2`),
		"have the name":         in(`"name":"second"`, `"name":"g"`),
		"is there twice":        in(`"id":9,`, `"id":7,`),
		`state "Odd"`:           in(`"state":"Freezing"`, `"state":"Odd"`),
		"is Freezing by \"\"":   in(`"owner":"n1",`, ``),
		"is Ready without":      in(`"state":"Freezing"`, `"state":"Ready"`),
		"without snap-00000000": in(`"snapshot":70,`, `"snapshot":79,`),
	} {
		require.NotEqual(t, body, bad, want)
		_, err := meta.DecodeImage(framed([]byte(bad)))
		require.ErrorIs(t, err, trivet.ErrCorrupt, want)
		require.ErrorContains(t, err, want)
	}
}

// randomGroupCommands are the commands of this file for randomCommand; v is the volume that it drew.
func randomGroupCommands(r *rand.Rand, m *meta.Machine, v meta.Volume) []func() meta.Command {
	id, groups := trivet.SnapshotGroupID(1+r.Intn(6)), m.State().SnapshotGroups()
	var members []trivet.SnapshotID
	if len(groups) > 0 && r.Intn(5) > 0 {
		g := groups[r.Intn(len(groups))]
		id = g.ID
		for _, mm := range g.Members {
			members = append(members, mm.Snapshot)
		}
	}
	n := 1 + r.Intn(2)
	next := func() meta.Command { // what comes next of one that is being made
		all := m.State().UnsettledGroups()
		if len(all) == 0 {
			return ungroup(id)
		}
		g := all[r.Intn(len(all))]
		if g.State != meta.GroupFreezing {
			return beginGroup(g.ID, n)
		}
		c := groupReady(g.ID, n)
		for _, mm := range g.Members {
			c.ReportSnapshotGroup.Frozen = append(c.ReportSnapshotGroup.Frozen, meta.FrozenMember{
				Snapshot: mm.Snapshot, SizeBytes: 1 << 30, Generation: 4,
			})
		}
		c.ReportSnapshotGroup.Node, c.ReportSnapshotGroup.Incarnation = g.Owner, g.OwnerIncarnation
		return c
	}
	return []func() meta.Command{
		next, next, next,
		func() meta.Command {
			volumes := []trivet.VolumeID{max(1, v.ID)}
			if all := m.State().Volumes(); len(all) > 0 && r.Intn(2) == 0 {
				if other := all[r.Intn(len(all))].ID; other != volumes[0] {
					volumes = append(volumes, other)
				}
			}
			c := groupOf(m, id, []string{"a", "b", "c"}[r.Intn(3)], volumes...)
			for i := range c.CreateSnapshotGroup.Members {
				c.CreateSnapshotGroup.Members[i].Snapshot = trivet.SnapshotID(100*r.Intn(100) + i + 1)
			}
			return c
		},
		func() meta.Command { return beginGroup(id, n) },
		func() meta.Command { return groupReady(id, n, members...) },
		func() meta.Command { return groupFailed(id, n) },
		func() meta.Command { return ungroup(id) },
	}
}
