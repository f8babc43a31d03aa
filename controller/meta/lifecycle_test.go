package meta_test

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// sentinels by the names used in the table.
var sentinels = map[string]error{
	"!InUse": trivet.ErrInUse, "!Exist": trivet.ErrExists, "!None": trivet.ErrNotFound,
	"!Range": trivet.ErrOutOfRange, "!Inval": trivet.ErrInvalid, "!Wait": trivet.ErrPending, "!Fence": trivet.ErrFenced,
}

// The whole life of a volume: what each command (row) does in each situation (column). A word is
// the phase afterwards, "=" no effect at all, "!X" a refusal with that sentinel that changes nothing.
// Avail and Recycle are short for Available and Recycling. The volume has the policy retain and one
// replica; policies have their own table below.
const lifecycle = `
           | Creating Avail    Bound    Attached Fencing Detaching Released Recycle  Deleting Failed   FailHeld Gone
attach1    | !Wait    Bound    Bound    =        =       !Wait     !Inval   !Inval   !Inval   !Inval   =        !None
attach2    | !Wait    Bound    Bound    !InUse   !InUse  !InUse    !Inval   !Inval   !Inval   !Inval   !InUse   !None
attach1ro  | !Wait    Bound    Bound    !Exist   !Exist  !Wait     !Inval   !Inval   !Inval   !Inval   !Exist   !None
attachLate | !Wait    !Wait    !Wait    =        =       !Wait     !Inval   !Inval   !Inval   !Inval   =        !None
attachOdd  | !None    !None    !None    !None    !None   !None     !None    !None    !None    !None    !None    !None
takeover1  | !Fence   !Fence   !Fence   Bound    Bound   !Fence    !Fence   !Fence   !Fence   !Fence   Failed   !None
takeover2  | !Fence   !Fence   !Fence   !Fence   !Fence  !Fence    !Fence   !Fence   !Fence   !Fence   !Fence   !None
takeSame   | !Fence   !Fence   !Fence   =        =       !Fence    !Fence   !Fence   !Fence   !Fence   =        !None
takeOld    | !Fence   !Fence   !Fence   !Fence   !Fence  !Fence    !Fence   !Fence   !Fence   !Fence   !Fence   !None
detach1    | =        =        =        Bound    Bound   =         =        =        =        =        Failed   =
detach2    | =        =        =        =        =       =         =        =        =        =        =        =
detachAny  | =        =        =        Bound    Bound   =         =        =        =        =        Failed   =
detachLate | =        =        =        =        =       =         =        =        =        =        =        =
fence      | !Inval   =        =        =        Bound   Bound     =        Recycle  =        =        =        =
fenceNext  | !Inval   !Inval   !Inval   !Inval   !Inval  !Inval    !Inval   !Inval   !Inval   !Inval   !Inval   =
release    | Deleting Released Released !InUse   !InUse  !InUse    =        =        =        Released !InUse   =
releaseOld | !Wait    !Wait    !Wait    !Wait    !Wait   !Wait     =        =        =        !Wait    !Wait    =
discard    | Deleting Deleting Deleting !InUse   !InUse  !InUse    Deleting Deleting =        Deleting !InUse   =
delete     | !Inval   !Inval   !Inval   !Inval   !Inval  !Inval    Deleting !Inval   !Inval   Deleting !InUse   !None
recycle    | !Inval   !Inval   !Inval   !Inval   !Inval  !Inval    Recycle  !Inval   !Inval   Recycle  !InUse   !None
retain     | !Inval   !Inval   !Inval   !Inval   !Inval  !Inval    Avail    !Inval   !Inval   Avail    !InUse   !None
wiped      | =        =        =        =        =       =         =        Avail    =        =        =        !None
wipedLate  | =        =        =        =        =       =         =        =        =        =        =        !None
fail       | Failed   Failed   Failed   Failed   Failed  Failed    Failed   Failed   !Inval   =        =        !None
ready      | Avail    =        =        =        =       =         =        =        =        =        =        !None
creating   | !Inval   !Inval   !Inval   !Inval   !Inval  !Inval    !Inval   !Inval   !Inval   !Inval   !Inval   !Inval
faulted    | Creating Avail    Bound    Bound    Bound   Bound     Released Recycle  =        Failed   Failed   !None
removed    | !Inval   !Inval   !Inval   !Inval   !Inval  !Inval    !Inval   !Inval   gone     !Inval   !Inval   =
grow       | !Wait    Avail    Bound    Bound    Bound   Bound     Released !Inval   !Inval   !Inval   !Inval   !None
growLess   | !Range   !Range   !Range   !Range   !Range  !Range    !Range   !Range   !Range   !Range   !Range   !None
sized      | Creating Avail    Bound    Bound    Bound   Bound     Released Recycle  Deleting Failed   Failed   =
create     | Creating Bound    =        =        =       =         !Exist   !Wait    Creating =        =        Creating
createOdd  | !Exist   !Exist   !Exist   !Exist   !Exist  !Exist    !Exist   !Exist   Creating !Exist   !Exist   Creating
`

func attach(n int, ro bool, epoch trivet.Epoch) meta.Command {
	return meta.Command{Attach: &meta.Attach{
		Volume: 1, Node: nodeID(n), Mode: meta.SingleNodeSingleWriter, ReadOnly: ro, Epoch: epoch,
	}}
}

// commandOf makes the command of a row; v is the volume as it stands (zero when gone).
func commandOf(t *testing.T, row string, v meta.Volume) meta.Command {
	t.Helper()
	again := volume(1, meta.ReclaimRetain, 1)
	again.ID = 99 // a proposer draws a new one each time
	odd := again.Clone()
	odd.Request = "other"
	now, earlier := max(v.Epoch, 1), trivet.Epoch(1000)
	if v.Epoch > 1 {
		earlier = v.Epoch - 1
	}
	commands := map[string]meta.Command{
		"attach1":    attach(1, false, v.Epoch+1),
		"attach2":    attach(2, false, 0),
		"attach1ro":  attach(1, true, 0),
		"attachLate": attach(1, false, v.Epoch+1000),
		"attachOdd":  attach(9, false, 0),
		"takeover1":  {TakeOver: &meta.TakeOver{Volume: 1, Node: "n1"}},
		"takeover2":  {TakeOver: &meta.TakeOver{Volume: 1, Node: "n2"}},
		"takeSame":   {TakeOver: &meta.TakeOver{Volume: 1, Node: "n1", Incarnation: incarnation(1)}},
		"takeOld":    {TakeOver: &meta.TakeOver{Volume: 1, Node: "n1", Incarnation: incarnation(77)}},
		"detach1":    {Detach: &meta.Detach{Volume: 1, Node: "n1", Epoch: v.Epoch}},
		"detach2":    {Detach: &meta.Detach{Volume: 1, Node: "n2"}},
		"detachAny":  {Detach: &meta.Detach{Volume: 1}},
		"detachLate": {Detach: &meta.Detach{Volume: 1, Node: "n1", Epoch: v.Epoch + 1000}},
		"fence":      {ReportFence: &meta.ReportFence{Volume: 1, Epoch: now}},
		"fenceNext":  {ReportFence: &meta.ReportFence{Volume: 1, Epoch: v.Epoch + 1}},
		"release":    {Release: &meta.Release{Volume: 1, IfRevision: v.Revision}},
		"releaseOld": {Release: &meta.Release{Volume: 1, IfRevision: 1}},
		"discard":    {Release: &meta.Release{Volume: 1, Discard: true}},
		"delete":     {Reclaim: &meta.Reclaim{Volume: 1, Policy: meta.ReclaimDelete}},
		"recycle":    {Reclaim: &meta.Reclaim{Volume: 1, Policy: meta.ReclaimRecycle}},
		"retain":     {Reclaim: &meta.Reclaim{Volume: 1, Policy: meta.ReclaimRetain}},
		"wiped":      {ReportWiped: &meta.ReportWiped{Volume: 1, Epoch: now}},
		"wipedLate":  {ReportWiped: &meta.ReportWiped{Volume: 1, Epoch: earlier}},
		"fail":       {Fail: &meta.Fail{Volume: 1, Reason: "broken"}},
		"ready":      report(1, 1, meta.ReplicaReady),
		"creating":   report(1, 1, meta.ReplicaCreating),
		"faulted":    report(1, 1, meta.ReplicaFaulted),
		"removed":    report(1, 1, meta.ReplicaRemoved),
		"grow":       {GrowVolume: &meta.GrowVolume{Volume: 1, SizeBytes: 2 << 30}},
		"growLess":   {GrowVolume: &meta.GrowVolume{Volume: 1, SizeBytes: 1 << 20}},
		"sized":      {ReportSize: &meta.ReportSize{Volume: 1, SizeBytes: 2 << 30}},
		"create":     {CreateVolume: &meta.CreateVolume{Volume: again, Claim: true}},
		"createOdd":  {CreateVolume: &meta.CreateVolume{Volume: odd, Claim: true}},
	}
	c, ok := commands[row]
	require.True(t, ok, row)
	return c
}

// situation brings volume 1 into the situation of a column.
func situation(t *testing.T, column string) *meta.Machine {
	t.Helper()
	m := cluster(t)
	do := func(row string) {
		v, _ := m.State().Volume(1)
		mustApply(t, m, commandOf(t, row, v))
	}
	mustApply(t, m, meta.Command{CreateVolume: &meta.CreateVolume{Volume: volume(1, meta.ReclaimRetain, 1)}})
	if column == "Creating" {
		return m
	}
	do("ready")
	script, ok := map[string][]string{
		"Avail":     {"release", "recycle", "fence", "wiped"},
		"Bound":     {"attach1", "fence", "detach1", "fence"},
		"Attached":  {"attach1", "fence"},
		"Fencing":   {"attach1"},
		"Detaching": {"attach1", "fence", "detach1"},
		"Released":  {"attach1", "fence", "detach1", "fence", "release"},
		"Recycle":   {"attach1", "fence", "detach1", "fence", "release", "recycle"},
		"Deleting":  {"attach1", "fence", "detach1", "fence", "discard"},
		"Failed":    {"attach1", "fence", "detach1", "fence", "fail"},
		"FailHeld":  {"attach1", "fence", "fail"},
		"Gone":      {"attach1", "fence", "detach1", "fence", "discard", "removed"},
	}[column]
	require.True(t, ok, column)
	for _, row := range script {
		do(row)
	}
	return m
}

func TestLifecycle(t *testing.T) {
	t.Parallel()
	lines := strings.Split(strings.TrimSpace(lifecycle), "\n")
	_, head, _ := strings.Cut(lines[0], "|")
	columns := strings.Fields(head)
	for _, line := range lines[1:] {
		row, rest, _ := strings.Cut(line, "|")
		row = strings.TrimSpace(row)
		cells := strings.Fields(rest)
		require.Len(t, cells, len(columns), row)
		for i, column := range columns {
			t.Run(row+"/"+column, func(t *testing.T) {
				t.Parallel()
				m := situation(t, column)
				before := m.State()
				v, _ := before.Volume(1)
				checkCell(t, m, m.Apply(commandOf(t, row, v)), before, cells[i])
				_, err := meta.DecodeImage(mustImage(t, m.State())) // checks the invariants
				require.NoError(t, err)
			})
		}
	}
}

func checkCell(t *testing.T, m *meta.Machine, res meta.Result, before *meta.State, want string) {
	t.Helper()
	if sentinel, ok := sentinels[want]; ok {
		require.ErrorIs(t, res.Err, sentinel)
		assert.Same(t, before, m.State())
		assert.Nil(t, res.Volume)
		return
	}
	require.NoError(t, res.Err)
	switch want {
	case "=":
		assert.Same(t, before, m.State())
		assert.Equal(t, before.Revision(), res.Revision)
	case "gone":
		assert.Nil(t, res.Volume)
		assert.Empty(t, m.State().Volumes())
	default:
		require.NotNil(t, res.Volume)
		long := strings.NewReplacer("Avail", "Available", "Recycle", "Recycling").Replace(want)
		assert.Equal(t, meta.Phase(long), res.Volume.Phase)
		assert.Equal(t, before.Revision()+1, res.Revision)
		assert.Equal(t, res.Revision, res.Volume.Revision)
		kept, ok := m.State().Volume(res.Volume.ID)
		require.True(t, ok)
		assert.Equal(t, *res.Volume, kept)
	}
}

// TestReleasePolicies: what each policy does when the claim ends, by the phase it ends in.
func TestReleasePolicies(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		policy                  meta.ReclaimPolicy
		creating, bound, failed meta.Phase
	}{
		{meta.ReclaimDelete, meta.PhaseDeleting, meta.PhaseDeleting, meta.PhaseDeleting},
		{meta.ReclaimRetain, meta.PhaseDeleting, meta.PhaseReleased, meta.PhaseReleased},
		{meta.ReclaimRecycle, meta.PhaseDeleting, meta.PhaseRecycling, meta.PhaseReleased},
	} {
		for phase, want := range map[string]meta.Phase{"creating": tc.creating, "bound": tc.bound, "failed": tc.failed} {
			t.Run(string(tc.policy)+"/"+phase, func(t *testing.T) {
				t.Parallel()
				m := cluster(t)
				create := meta.CreateVolume{Volume: volume(1, tc.policy, 1), Claim: true}
				mustApply(t, m, meta.Command{CreateVolume: &create})
				if phase != "creating" {
					res := mustApply(t, m, report(1, 1, meta.ReplicaReady))
					assert.Equal(t, meta.PhaseBound, res.Volume.Phase)
				}
				if phase == "failed" {
					mustApply(t, m, meta.Command{Fail: &meta.Fail{Volume: 1, Reason: "x"}})
				}
				res := mustApply(t, m, meta.Command{Release: &meta.Release{Volume: 1}})
				assert.Equal(t, want, res.Volume.Phase)
				assert.False(t, res.Volume.Claimed)
				_, named := m.State().VolumeByName("name-1")
				assert.Equal(t, want != meta.PhaseDeleting, named, "only a volume being deleted loses its name")
				wantEpoch := trivet.Epoch(0)
				if want == meta.PhaseRecycling {
					wantEpoch = 1 // the wipe happens behind a fence
				}
				assert.Equal(t, wantEpoch, res.Volume.Epoch)
			})
		}
	}
}

// TestReclaimNeedsReplicas: data can be kept or wiped only where replicas were made.
func TestReclaimNeedsReplicas(t *testing.T) {
	t.Parallel()
	m := cluster(t)
	mustApply(t, m, meta.Command{CreateVolume: &meta.CreateVolume{Volume: volume(1, meta.ReclaimDelete, 1, 2, 3)}})
	mustApply(t, m, report(1, 1, meta.ReplicaReady))
	mustApply(t, m, meta.Command{Fail: &meta.Fail{Volume: 1, Reason: "x"}})
	for _, policy := range []meta.ReclaimPolicy{meta.ReclaimRecycle, meta.ReclaimRetain} {
		res := m.Apply(meta.Command{Reclaim: &meta.Reclaim{Volume: 1, Policy: policy}})
		require.ErrorIs(t, res.Err, trivet.ErrInvalid)
		require.ErrorContains(t, res.Err, "2 of 3")
	}
	res := m.Apply(meta.Command{Reclaim: &meta.Reclaim{Volume: 1, Policy: meta.ReclaimDelete, IfRevision: 1}})
	require.ErrorIs(t, res.Err, trivet.ErrPending)
	mustApply(t, m, meta.Command{Reclaim: &meta.Reclaim{Volume: 1, Policy: meta.ReclaimDelete}})
}

// TestWipedReportsTheFence: the wipe was committed at the reserved epoch, so the fence was too.
func TestWipedReportsTheFence(t *testing.T) {
	t.Parallel()
	m := situation(t, "Recycle")
	v, _ := m.State().Volume(1)
	require.Greater(t, v.Epoch, v.FencedEpoch)
	res := mustApply(t, m, commandOf(t, "wiped", v))
	assert.Equal(t, res.Volume.Epoch, res.Volume.FencedEpoch)
	assert.Equal(t, "name-1", res.Volume.Name)
}

func TestUsable(t *testing.T) {
	t.Parallel()
	m := situation(t, "Fencing")
	v, _ := m.State().Volume(1)
	epoch := v.Attached.Epoch
	assert.False(t, v.Usable("n1", epoch), "the fence is not committed")
	mustApply(t, m, commandOf(t, "fence", v))
	v, _ = m.State().Volume(1)
	assert.True(t, v.Usable("n1", epoch))
	assert.False(t, v.Usable("n2", epoch))
	assert.Equal(t, trivet.NodeID("n1"), v.Holder())
	mustApply(t, m, commandOf(t, "takeover1", v))
	v, _ = m.State().Volume(1)
	assert.False(t, v.Usable("n1", epoch), "the old process is fenced")
	mustApply(t, m, commandOf(t, "detach1", v))
	v, _ = m.State().Volume(1)
	assert.Equal(t, trivet.NodeID("n1"), v.Holder(), "until the fence is committed")
	mustApply(t, m, commandOf(t, "fence", v))
	v, _ = m.State().Volume(1)
	assert.Empty(t, v.Holder())
}

func TestNodes(t *testing.T) {
	t.Parallel()
	m := cluster(t)
	renew := func(inc string, until time.Time, disks ...meta.Disk) meta.Result {
		return m.Apply(meta.Command{RenewLease: &meta.RenewLease{Node: "n1", Incarnation: inc, Until: until, Disks: disks}})
	}
	res := renew(incarnation(1), day.Add(time.Minute), meta.Disk{ID: diskID(1), SizeBytes: 5, FreeBytes: 3})
	require.NoError(t, res.Err)
	assert.Equal(t, day.Add(time.Minute), res.Node.LeaseUntil)
	assert.Equal(t, int64(3), res.Node.Disks[0].FreeBytes)
	assert.Equal(t, "/d", res.Node.Disks[0].Path)
	assert.True(t, res.Node.Alive(day))
	assert.False(t, res.Node.Alive(day.Add(time.Minute)))

	res = renew(incarnation(1), day) // late
	require.NoError(t, res.Err)
	assert.Equal(t, day.Add(time.Minute), res.Node.LeaseUntil)
	require.ErrorIs(t, renew(incarnation(1), day, meta.Disk{ID: diskID(2)}).Err, trivet.ErrNotFound)
	require.ErrorIs(t, renew(incarnation(9), day).Err, trivet.ErrFenced)

	// A new process replaces the old one, whose late registration must not fence it.
	fresh := node(1)
	fresh.Incarnation = incarnation(50)
	res = mustApply(t, m, meta.Command{RegisterNode: &meta.RegisterNode{Node: fresh}})
	assert.Equal(t, []string{incarnation(1)}, res.Node.Replaced)
	require.ErrorIs(t, m.Apply(meta.Command{RegisterNode: &meta.RegisterNode{Node: node(1)}}).Err, trivet.ErrFenced)
	require.ErrorIs(t, renew(incarnation(1), day).Err, trivet.ErrFenced)
	require.NoError(t, renew(incarnation(50), day.Add(time.Hour)).Err)
	res = mustApply(t, m, meta.Command{RegisterNode: &meta.RegisterNode{Node: fresh}})
	assert.Equal(t, day.Add(time.Hour), res.Node.LeaseUntil, "a late copy does not shorten the lease")

	moved := node(2)
	moved.Disks[0].ID = diskID(1)
	res = m.Apply(meta.Command{RegisterNode: &meta.RegisterNode{Node: moved}})
	require.ErrorIs(t, res.Err, trivet.ErrInUse)
	require.ErrorContains(t, res.Err, "belongs to node n1")
	for i := range 20 { // the memory of old incarnations is bounded
		fresh.Incarnation = incarnation(100 + i)
		res = mustApply(t, m, meta.Command{RegisterNode: &meta.RegisterNode{Node: fresh}})
	}
	assert.Len(t, res.Node.Replaced, 8)
}

func TestInitCluster(t *testing.T) {
	t.Parallel()
	m := meta.NewMachine(nil)
	require.ErrorIs(t, m.Apply(meta.Command{RegisterNode: &meta.RegisterNode{Node: node(1)}}).Err, trivet.ErrInvalid)
	init := func(n int) meta.Result {
		return m.Apply(meta.Command{InitCluster: &meta.InitCluster{Cluster: trivet.ClusterID(uuid(1, n)), Time: day}})
	}
	require.NoError(t, init(1).Err)
	require.NoError(t, init(1).Err)
	assert.Equal(t, meta.Revision(1), m.State().Revision())
	require.ErrorIs(t, init(2).Err, trivet.ErrExists)
	assert.Equal(t, day, m.State().Created())
}

func TestLeader(t *testing.T) {
	t.Parallel()
	m := cluster(t)
	mustApply(t, m, meta.Command{CreateVolume: &meta.CreateVolume{Volume: volume(1, meta.ReclaimDelete, 1, 2, 3)}})
	rep := func(n int, term uint64) meta.Result {
		return m.Apply(meta.Command{ReportLeader: &meta.ReportLeader{Volume: 1, Replica: replicaID(10 + n), Term: term}})
	}
	want := func(n int) meta.Result {
		return m.Apply(meta.Command{WantLeader: &meta.WantLeader{Volume: 1, Replica: replicaID(10 + n)}})
	}
	assert.Equal(t, replicaID(11), rep(1, 3).Volume.Leader)
	assert.Equal(t, replicaID(12), want(2).Volume.WantLeader)
	assert.Equal(t, replicaID(12), rep(1, 3).Volume.WantLeader, "not the wanted one")
	res := rep(2, 4)
	assert.Equal(t, replicaID(12), res.Volume.Leader)
	assert.Empty(t, res.Volume.WantLeader)
	assert.Equal(t, replicaID(12), rep(1, 3).Volume.Leader, "a late report of an older term")
	assert.Empty(t, want(2).Volume.WantLeader, "it leads already")
	require.ErrorIs(t, rep(9, 5).Err, trivet.ErrNotFound)
	require.ErrorIs(t, want(9).Err, trivet.ErrNotFound)
	want(3)
	assert.Empty(t, want(2).Volume.WantLeader, "withdrawn")

	// Leadership was to follow an attachment that is over: its node may be dead by now, and a leader
	// that keeps trying to hand over to it would serve nobody.
	for n := 1; n <= 3; n++ {
		mustApply(t, m, meta.Command{ReportReplica: &meta.ReportReplica{
			Volume: 1, Replica: replicaID(10 + n), State: meta.ReplicaReady,
		}})
	}
	mustApply(t, m, attach(3, false, 0))
	want(3)
	res = mustApply(t, m, meta.Command{Detach: &meta.Detach{Volume: 1}})
	assert.Empty(t, res.Volume.WantLeader)
}

// TestRetiredIsBounded: what is retired on disks that are gone does not add up for ever; what is retired
// on disks that are there is remembered until it is removed, and no more is made until then.
func TestRetiredIsBounded(t *testing.T) {
	t.Parallel()
	for _, gone := range []bool{true, false} {
		m := cluster(t)
		mustApply(t, m, meta.Command{CreateVolume: &meta.CreateVolume{Volume: volume(1, meta.ReclaimDelete, 1)}})
		mustApply(t, m, report(1, 1, meta.ReplicaReady))
		var last error
		for i := range 50 {
			nd := node(2)
			nd.Incarnation = incarnation(100 + i)
			if gone {
				nd.Disks[0].ID = diskID(100 + i)
			}
			mustApply(t, m, meta.Command{RegisterNode: &meta.RegisterNode{Node: nd}})
			v, _ := m.State().Volume(1)
			last = m.Apply(meta.Command{AddReplica: &meta.AddReplica{Volume: 1, IfRevision: v.Revision, Replica: meta.Replica{
				ID: replicaID(100 + i), Node: "n2", Disk: nd.Disks[0].ID,
			}}}).Err
			if last == nil {
				mustApply(t, m, meta.Command{RemoveReplica: &meta.RemoveReplica{Volume: 1, Replica: replicaID(100 + i)}})
			}
		}
		v, _ := m.State().Volume(1)
		if gone {
			require.NoError(t, last)
			assert.Len(t, v.Retired, 31, "one less than the bound, or nothing could be added")
			assert.Equal(t, replicaID(149), v.Retired[30].ID, "the oldest are forgotten")
		} else {
			require.ErrorIs(t, last, trivet.ErrInvalid)
			assert.Len(t, v.Retired, 32)
			assert.Equal(t, replicaID(100), v.Retired[0].ID)
		}
	}
}

// TestCreateWithoutReplicas: it claims what is there, and makes nothing.
func TestCreateWithoutReplicas(t *testing.T) {
	t.Parallel()
	m := cluster(t)
	bare := volume(1, meta.ReclaimDelete)
	bare.ID = 99 // a proposer draws a new one each time
	claim := meta.Command{CreateVolume: &meta.CreateVolume{Volume: bare, Claim: true}}
	require.ErrorIs(t, m.Apply(claim).Err, trivet.ErrNotFound)
	assert.False(t, m.State().Used(99))

	mustApply(t, m, meta.Command{CreateVolume: &meta.CreateVolume{Volume: volume(1, meta.ReclaimDelete, 1)}})
	mustApply(t, m, report(1, 1, meta.ReplicaReady))
	res := mustApply(t, m, claim)
	assert.Equal(t, trivet.VolumeID(1), res.Volume.ID)
	assert.Equal(t, meta.PhaseBound, res.Volume.Phase)
	assert.Equal(t, 1, res.Volume.WantReplicas)
}
