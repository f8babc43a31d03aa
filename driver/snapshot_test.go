package driver_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

// unknownSnapshot is a handle of the right form that names no snapshot.
const unknownSnapshot = "snap-0123456789abcdef"

// snapshotCall sends a changed CreateSnapshot request for the snapshot "s".
func snapshotCall(change func(*csi.CreateSnapshotRequest)) func(context.Context, *harness, string) error {
	return func(ctx context.Context, h *harness, handle string) error {
		req := &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: handle}
		change(req)
		_, err := h.CreateSnapshot(ctx, req)
		return err
	}
}

// mustSnapshot makes a snapshot of a volume.
func (h *harness) mustSnapshot(t *testing.T, handle, name string) *csi.Snapshot {
	t.Helper()
	resp, err := h.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: handle})
	require.NoError(t, err)
	return resp.GetSnapshot()
}

// mustVolumeID parses a handle.
func mustVolumeID(t *testing.T, handle string) trivet.VolumeID {
	t.Helper()
	id, err := trivet.ParseVolumeID(handle)
	require.NoError(t, err)
	return id
}

func TestCreateSnapshotCodes(t *testing.T) {
	t.Parallel()
	type request = csi.CreateSnapshotRequest
	with := func(change func(*request)) func(context.Context, *testing.T, *harness) error {
		return existing(snapshotCall(change))
	}
	same := snapshotCall(func(*request) {})
	// again returns a row body that makes the snapshot "s" of a volume and then sends a changed request.
	again := func(change func(*testing.T, *harness, *request)) func(context.Context, *testing.T, *harness) error {
		return func(ctx context.Context, t *testing.T, h *harness) error {
			t.Helper()
			handle := h.mustCreate(t, "a")
			h.mustSnapshot(t, handle, "s")
			return snapshotCall(func(r *request) { change(t, h, r) })(ctx, h, handle)
		}
	}
	runRows(t, append(renamed(hostileRows(same), "source_volume_id"),
		row{"plain", with(func(*request) {}), codes.OK, ""},
		row{"attached", func(ctx context.Context, t *testing.T, h *harness) error {
			t.Helper()
			handle := h.mustCreate(t, "a")
			h.mustAttach(t, handle)
			return same(ctx, h, handle)
		}, codes.OK, ""},
		row{"name of 128 bytes of unicode", with(func(r *request) { r.Name = strings.Repeat("é", 64) }), codes.OK, ""},
		row{"no name", with(func(r *request) { r.Name, r.SourceVolumeId = "", foreign }), codes.InvalidArgument, "name"},
		row{"name too long", with(func(r *request) {
			r.Name = strings.Repeat("x", 129)
		}), codes.InvalidArgument, "name"},
		row{"name with a control character", with(func(r *request) { r.Name = "a\x07" }), codes.InvalidArgument, "name"},
		row{"name of those that clones make", with(func(r *request) {
			r.Name = meta.HiddenPrefix + "a"
		}), codes.InvalidArgument, "name"},
		row{"no volume", with(func(r *request) { r.SourceVolumeId = "" }), codes.InvalidArgument, "source_volume_id"},
		row{"unknown volume", with(func(r *request) { r.SourceVolumeId = unknown }), codes.NotFound, unknown},
		row{"foreign volume", with(func(r *request) { r.SourceVolumeId = foreign }), codes.NotFound, foreign},
		row{"a snapshot", with(func(r *request) { r.SourceVolumeId = unknownSnapshot }), codes.NotFound, unknownSnapshot},
		row{"metadata of the sidecar", with(func(r *request) {
			r.Parameters = map[string]string{
				"csi.storage.k8s.io/volumesnapshot/name": "s", "csi.storage.k8s.io/volumesnapshot/namespace": "default",
				"csi.storage.k8s.io/volumesnapshotcontent/name": "c",
			}
		}), codes.OK, ""},
		row{"parameter", with(func(r *request) {
			r.Parameters, r.SourceVolumeId = map[string]string{"ttl": "1h"}, foreign
		}), codes.InvalidArgument, "ttl"},
		row{"topology", with(func(r *request) {
			r.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: topologies(controller.TopologyZone, thisZone)}
		}), codes.OK, ""},
		row{"foreign topology key", with(func(r *request) {
			r.AccessibilityRequirements = &csi.TopologyRequirement{Preferred: topologies("other.example/rack", "r1")}
		}), codes.InvalidArgument, "topology key"},
		row{"same again", again(func(*testing.T, *harness, *request) {}), codes.OK, ""},
		row{"same name of another volume", again(func(t *testing.T, h *harness, r *request) {
			t.Helper()
			r.SourceVolumeId = h.mustCreate(t, "b")
		}), codes.AlreadyExists, ""},
		row{"same again, volume kept for it", again(func(t *testing.T, h *harness, r *request) {
			t.Helper()
			h.setPhase(t, r.SourceVolumeId, meta.PhaseKept)
		}), codes.OK, ""},
		row{"same name, other volume is kept", again(func(t *testing.T, h *harness, r *request) {
			t.Helper()
			r.SourceVolumeId = h.ctrl.put(meta.Volume{Name: "b", Phase: meta.PhaseKept}).ID.String()
		}), codes.AlreadyExists, ""},
		row{"other name, volume is kept", again(func(t *testing.T, h *harness, r *request) {
			t.Helper()
			h.setPhase(t, r.SourceVolumeId, meta.PhaseKept)
			r.Name = "other"
		}), codes.NotFound, "Kept"},
		row{"no quorum", failing("CreateSnapshot", trivet.ErrUnavailable, same), codes.Unavailable, ""},
		row{"no quorum to look", failing("Volume", trivet.ErrUnavailable, same), codes.Unavailable, ""},
		row{"no leader", failing("CreateSnapshot", trivet.ErrNotLeader, same), codes.Unavailable, ""},
		row{"volume is busy", failing("CreateSnapshot", trivet.ErrPending, same), codes.Aborted, ""},
		row{"too many", failing("CreateSnapshot", trivet.ErrNoSpace, same), codes.ResourceExhausted, ""},
		row{"too late", failing("CreateSnapshot", context.DeadlineExceeded, same), codes.DeadlineExceeded, ""},
	))
}

// renamed returns rows with another field in what they say.
func renamed(rows []row, field string) []row {
	for i := range rows {
		rows[i].says = field
	}
	return rows
}

// setPhase changes the phase of a volume in the fake's catalogue.
func (h *harness) setPhase(t *testing.T, handle string, p meta.Phase) {
	t.Helper()
	h.ctrl.mu.Lock()
	defer h.ctrl.mu.Unlock()
	h.ctrl.volumes[mustVolumeID(t, handle)].Phase = p
}

func TestSnapshotIsDescribed(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	handle := h.mustCreate(t, "a")
	s := h.mustSnapshot(t, handle, "s")
	require.Equal(t, handle, s.GetSourceVolumeId())
	require.EqualValues(t, 64<<20, s.GetSizeBytes())
	require.True(t, s.GetReadyToUse())
	require.True(t, s.GetCreationTime().IsValid())
	require.Positive(t, s.GetCreationTime().AsTime().Unix())
	require.Empty(t, s.GetAccessibleTopology(), "it can be used everywhere")
	require.Empty(t, s.GetGroupSnapshotId())
	require.Equal(t, s.GetSnapshotId(), h.mustSnapshot(t, handle, "s").GetSnapshotId(), "the same again")
	require.NotEqual(t, s.GetSnapshotId(), h.mustSnapshot(t, handle, "other").GetSnapshotId())
}

// A snapshot that the volume's group refused for good has no ID that the orchestrator knows: nobody else could
// remove it, and every later try would fail for it.
func TestFailedSnapshotIsForgotten(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	handle := h.mustCreate(t, "a")
	other := h.ctrl.putSnapshot(meta.Snapshot{Name: "other", Volume: mustVolumeID(t, handle), State: meta.SnapshotFailed})
	h.ctrl.putSnapshot(meta.Snapshot{Name: "s", Volume: mustVolumeID(t, handle), State: meta.SnapshotFailed})
	err := snapshotCall(func(*csi.CreateSnapshotRequest) {})(t.Context(), h, handle)
	requireCode(t, codes.ResourceExhausted, err)
	require.True(t, h.mustSnapshot(t, handle, "s").GetReadyToUse(), "the next try makes it")
	_, err = h.ctrl.Snapshot(t.Context(), other.ID)
	require.NoError(t, err, "another one is left alone")
}

func TestDeleteSnapshotCodes(t *testing.T) {
	t.Parallel()
	del := func(ctx context.Context, h *harness, handle string) error {
		_, err := h.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: handle})
		return err
	}
	of := func(handle string) func(context.Context, *testing.T, *harness) error {
		return func(ctx context.Context, _ *testing.T, h *harness) error { return del(ctx, h, handle) }
	}
	known := func(ctx context.Context, h *harness, _ string) error { return del(ctx, h, unknownSnapshot) }
	runRows(t, append(renamed(hostileRows(del), "snapshot_id"),
		row{"no id", of(""), codes.InvalidArgument, "snapshot_id"},
		row{"unknown", of(unknownSnapshot), codes.OK, ""},
		row{"foreign", of("reallyfakesnapshotid"), codes.OK, ""},
		row{"a volume", of(unknown), codes.OK, ""},
		row{"no quorum", failing("DeleteSnapshot", trivet.ErrUnavailable, known), codes.Unavailable, ""},
		row{"being restored", failing("DeleteSnapshot", trivet.ErrPending, known), codes.Aborted, ""},
		row{"twice", func(ctx context.Context, t *testing.T, h *harness) error {
			t.Helper()
			s := h.mustSnapshot(t, h.mustCreate(t, "a"), "s")
			require.NoError(t, del(ctx, h, s.GetSnapshotId()))
			_, err := h.GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: s.GetSnapshotId()})
			requireCode(t, codes.NotFound, err)
			return del(ctx, h, s.GetSnapshotId())
		}, codes.OK, ""},
	))
}

func TestGetSnapshotCodes(t *testing.T) {
	t.Parallel()
	get := func(ctx context.Context, h *harness, handle string) error {
		_, err := h.GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: handle})
		return err
	}
	of := func(handle string) func(context.Context, *testing.T, *harness) error {
		return func(ctx context.Context, _ *testing.T, h *harness) error { return get(ctx, h, handle) }
	}
	put := func(s meta.Snapshot) func(context.Context, *testing.T, *harness) error {
		return func(ctx context.Context, _ *testing.T, h *harness) error {
			return get(ctx, h, h.ctrl.putSnapshot(s).ID.String())
		}
	}
	runRows(t, append(renamed(hostileRows(get), "snapshot_id"),
		row{"no id", of(""), codes.InvalidArgument, "snapshot_id"},
		row{"unknown", of(unknownSnapshot), codes.NotFound, unknownSnapshot},
		row{"foreign", of("none-exist-id"), codes.NotFound, "none-exist-id"},
		row{"ready", put(meta.Snapshot{State: meta.SnapshotReady}), codes.OK, ""},
		row{"not cut yet", put(meta.Snapshot{State: meta.SnapshotCreating}), codes.OK, ""},
		row{"refused", put(meta.Snapshot{State: meta.SnapshotFailed}), codes.NotFound, "Failed"},
		row{"deleted, a clone needs it", put(meta.Snapshot{State: meta.SnapshotDeleting}), codes.NotFound, "Deleting"},
		row{"of the making of a clone", put(meta.Snapshot{
			Name: meta.HiddenPrefix + "c", State: meta.SnapshotReady,
		}), codes.NotFound, ""},
		row{"no quorum", failing("Snapshot", trivet.ErrUnavailable, func(ctx context.Context, h *harness, _ string) error {
			return get(ctx, h, unknownSnapshot)
		}), codes.Unavailable, ""},
	))
}

func TestSnapshotThatIsNotCut(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	s := h.ctrl.putSnapshot(meta.Snapshot{State: meta.SnapshotCreating, Name: "s", Volume: 1})
	got, err := h.GetSnapshot(t.Context(), &csi.GetSnapshotRequest{SnapshotId: s.ID.String()})
	require.NoError(t, err)
	require.False(t, got.GetSnapshot().GetReadyToUse())
	require.Zero(t, got.GetSnapshot().GetSizeBytes(), "zero says that it is unknown")
	require.EqualValues(t, 1_700_000_000, got.GetSnapshot().GetCreationTime().GetSeconds())
	list, err := h.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{SnapshotId: s.ID.String()})
	require.NoError(t, err)
	require.Empty(t, list.GetEntries(), "only what is cut is listed")
}

// mustList returns the IDs of a list.
func (h *harness) mustList(t *testing.T, req *csi.ListSnapshotsRequest) (ids []string, next string) {
	t.Helper()
	resp, err := h.ListSnapshots(t.Context(), req)
	require.NoError(t, err)
	for _, e := range resp.GetEntries() {
		ids = append(ids, e.GetSnapshot().GetSnapshotId())
	}
	return ids, resp.GetNextToken()
}

func TestListSnapshots(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	a, b := h.mustCreate(t, "a"), h.mustCreate(t, "b")
	var all []string
	for i := range 5 {
		all = append(all, h.mustSnapshot(t, a, fmt.Sprint("s", i)).GetSnapshotId())
	}
	ofB := h.mustSnapshot(t, b, "t").GetSnapshotId()
	all = append(all, ofB)
	slices.Sort(all)
	for _, s := range []meta.Snapshot{
		{State: meta.SnapshotCreating},
		{State: meta.SnapshotFailed},
		{State: meta.SnapshotDeleting},
		{State: meta.SnapshotReady, Name: meta.HiddenPrefix + "c"},
	} {
		s.Volume = mustVolumeID(t, a)
		h.ctrl.putSnapshot(s)
	}
	for name, tc := range map[string]struct {
		req  *csi.ListSnapshotsRequest
		want []string
	}{
		"all":            {&csi.ListSnapshotsRequest{}, all},
		"of a volume":    {&csi.ListSnapshotsRequest{SourceVolumeId: b}, []string{ofB}},
		"one":            {&csi.ListSnapshotsRequest{SnapshotId: all[2]}, all[2:3]},
		"both fit":       {&csi.ListSnapshotsRequest{SnapshotId: ofB, SourceVolumeId: b}, []string{ofB}},
		"both do not":    {&csi.ListSnapshotsRequest{SnapshotId: ofB, SourceVolumeId: a}, nil},
		"unknown":        {&csi.ListSnapshotsRequest{SnapshotId: unknownSnapshot}, nil},
		"foreign":        {&csi.ListSnapshotsRequest{SnapshotId: "none-exist-id"}, nil},
		"unknown volume": {&csi.ListSnapshotsRequest{SourceVolumeId: unknown}, nil},
		"foreign volume": {&csi.ListSnapshotsRequest{SourceVolumeId: foreign}, nil},
	} {
		got, next := h.mustList(t, tc.req)
		assert.Equal(t, tc.want, got, name)
		assert.Empty(t, next, name)
	}
}

func TestListSnapshotsInPages(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	a := h.mustCreate(t, "a")
	var all []string
	for i := range 6 {
		all = append(all, h.mustSnapshot(t, a, fmt.Sprint("s", i)).GetSnapshotId())
	}
	slices.Sort(all)
	first, token := h.mustList(t, &csi.ListSnapshotsRequest{MaxEntries: 2})
	require.Equal(t, all[:2], first)
	// The token is good when the last snapshot of its page goes, and others of the list.
	for _, id := range []string{all[1], all[4]} {
		_, err := h.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: id})
		require.NoError(t, err)
	}
	second, token := h.mustList(t, &csi.ListSnapshotsRequest{MaxEntries: 2, StartingToken: token, SourceVolumeId: a})
	require.Equal(t, all[2:4], second)
	third, token := h.mustList(t, &csi.ListSnapshotsRequest{MaxEntries: 2, StartingToken: token})
	require.Equal(t, all[5:], third)
	require.Empty(t, token)

	for name, tc := range map[string]struct {
		req  *csi.ListSnapshotsRequest
		want codes.Code
	}{
		"negative":    {&csi.ListSnapshotsRequest{MaxEntries: -1}, codes.InvalidArgument},
		"bad token":   {&csi.ListSnapshotsRequest{StartingToken: "invalid-token"}, codes.Aborted},
		"a volume":    {&csi.ListSnapshotsRequest{StartingToken: a}, codes.Aborted},
		"endless one": {&csi.ListSnapshotsRequest{StartingToken: strings.Repeat("x", 4000)}, codes.Aborted},
	} {
		_, err := h.ListSnapshots(t.Context(), tc.req)
		t.Log(name)
		requireCode(t, tc.want, err)
	}
	h.ctrl.fail("Snapshots", trivet.ErrUnavailable)
	_, err := h.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{})
	requireCode(t, codes.Unavailable, err)
}

// sources are the two kinds of a volume_content_source.
func ofSnapshot(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id},
	}}
}

func ofVolume(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
		Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: id},
	}}
}

// copyRow is a row that makes a volume and its snapshot, and then a copy of one of them.
func copyRow(name string, want codes.Code, says string,
	change func(t *testing.T, h *harness, volume, snapshot string, r *csi.CreateVolumeRequest),
) row {
	return row{name, func(ctx context.Context, t *testing.T, h *harness) error {
		t.Helper()
		volume := h.mustCreate(t, "a")
		snapshot := h.mustSnapshot(t, volume, "s").GetSnapshotId()
		req := createReq("copy")
		change(t, h, volume, snapshot, req)
		resp, err := h.CreateVolume(ctx, req)
		if err == nil && req.GetVolumeContentSource() != nil {
			require.Equal(t, req.GetVolumeContentSource().String(), resp.GetVolume().GetContentSource().String(),
				"the provisioner deletes a volume that does not say what it is of")
			require.GreaterOrEqual(t, resp.GetVolume().GetCapacityBytes(), int64(64<<20))
		}
		return err
	}, want, says}
}

func TestCreateVolumeFromSource(t *testing.T) {
	t.Parallel()
	type request = csi.CreateVolumeRequest
	runRows(t, []row{
		copyRow("snapshot", codes.OK, "", func(_ *testing.T, _ *harness, _, s string, r *request) {
			r.VolumeContentSource = ofSnapshot(s)
		}),
		copyRow("volume", codes.OK, "", func(_ *testing.T, _ *harness, v, _ string, r *request) {
			r.VolumeContentSource = ofVolume(v)
		}),
		copyRow("no size", codes.OK, "", func(_ *testing.T, _ *harness, _, s string, r *request) {
			r.VolumeContentSource, r.CapacityRange = ofSnapshot(s), nil
		}),
		// xfs needs 300 MiB, but the size is that of the source, and the filesystem is there.
		copyRow("no size, xfs", codes.OK, "", func(t *testing.T, h *harness, _, _ string, r *request) {
			t.Helper()
			v := h.ctrl.put(meta.Volume{Name: "x", Phase: meta.PhaseBound, SizeBytes: 1 << 30})
			r.VolumeContentSource, r.CapacityRange = ofVolume(v.ID.String()), nil
			r.VolumeCapabilities[0].GetMount().FsType = "xfs"
		}),
		copyRow("larger", codes.OK, "", func(_ *testing.T, _ *harness, _, s string, r *request) {
			r.VolumeContentSource, r.CapacityRange.RequiredBytes = ofSnapshot(s), 1<<30
		}),
		copyRow("smaller", codes.OutOfRange, "67108864", func(_ *testing.T, _ *harness, _, s string, r *request) {
			r.VolumeContentSource, r.CapacityRange.RequiredBytes = ofSnapshot(s), 1<<20
		}),
		copyRow("smaller than a volume", codes.OutOfRange, "67108864", func(_ *testing.T, _ *harness, v, _ string,
			r *request,
		) {
			r.VolumeContentSource, r.CapacityRange.RequiredBytes = ofVolume(v), 1<<20
		}),
		copyRow("limit below", codes.OutOfRange, "", func(_ *testing.T, _ *harness, _, s string, r *request) {
			r.VolumeContentSource, r.CapacityRange = ofSnapshot(s), &csi.CapacityRange{LimitBytes: 1 << 20}
		}),
		copyRow("no type", codes.InvalidArgument, "type is missing", func(_ *testing.T, _ *harness, _, _ string, r *request) {
			r.VolumeContentSource = &csi.VolumeContentSource{}
		}),
		copyRow("no snapshot", codes.InvalidArgument, "snapshot_id", func(_ *testing.T, _ *harness, _, _ string, r *request) {
			r.VolumeContentSource = ofSnapshot("")
		}),
		copyRow("no volume", codes.InvalidArgument, "volume_id", func(_ *testing.T, _ *harness, _, _ string, r *request) {
			r.VolumeContentSource = ofVolume("")
		}),
		copyRow("hostile", codes.InvalidArgument, "snapshot_id", func(_ *testing.T, _ *harness, _, _ string, r *request) {
			r.VolumeContentSource = ofSnapshot("../x")
		}),
		copyRow("invalid before unknown", codes.InvalidArgument, "topology", func(_ *testing.T, _ *harness, _, _ string,
			r *request,
		) {
			r.VolumeContentSource = ofSnapshot("none-exist-id")
			r.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: topologies("other.example/rack", "r1")}
		}),
		copyRow("foreign snapshot", codes.NotFound, "none-exist-id", func(_ *testing.T, _ *harness, _, _ string, r *request) {
			r.VolumeContentSource = ofSnapshot("none-exist-id")
		}),
		copyRow("foreign volume", codes.NotFound, foreign, func(_ *testing.T, _ *harness, _, _ string, r *request) {
			r.VolumeContentSource = ofVolume(foreign)
		}),
		copyRow("unknown snapshot", codes.NotFound, unknownSnapshot, func(_ *testing.T, _ *harness, _, _ string, r *request) {
			r.VolumeContentSource = ofSnapshot(unknownSnapshot)
		}),
		copyRow("unknown volume", codes.NotFound, unknown, func(_ *testing.T, _ *harness, _, _ string, r *request) {
			r.VolumeContentSource = ofVolume(unknown)
		}),
		copyRow("deleted volume, kept", codes.NotFound, "Kept", func(t *testing.T, h *harness, v, _ string, r *request) {
			t.Helper()
			h.setPhase(t, v, meta.PhaseKept)
			r.VolumeContentSource = ofVolume(v)
		}),
		copyRow("snapshot of a deleted volume", codes.OK, "", func(t *testing.T, h *harness, v, s string, r *request) {
			t.Helper()
			h.setPhase(t, v, meta.PhaseKept)
			r.VolumeContentSource = ofSnapshot(s)
		}),
		copyRow("no quorum", codes.Unavailable, "", func(_ *testing.T, h *harness, v, _ string, r *request) {
			h.ctrl.fail("CloneVolume", trivet.ErrUnavailable)
			r.VolumeContentSource = ofVolume(v)
		}),
		copyRow("source is not cut yet", codes.Aborted, "", func(_ *testing.T, h *harness, _, s string, r *request) {
			h.ctrl.fail("CreateVolume", trivet.ErrPending)
			r.VolumeContentSource = ofSnapshot(s)
		}),
		copyRow("not in that topology", codes.ResourceExhausted, "", func(_ *testing.T, h *harness, _, s string, r *request) {
			h.ctrl.fail("CreateVolume", trivet.ErrNoSpace)
			r.VolumeContentSource = ofSnapshot(s)
		}),
	})
}

// TestCreateVolumeFromSourceAgain: a name is one request's, source included.
func TestCreateVolumeFromSourceAgain(t *testing.T) {
	t.Parallel()
	type request = csi.CreateVolumeRequest
	first := func(t *testing.T, h *harness, src *csi.VolumeContentSource) {
		t.Helper()
		req := createReq("copy")
		req.VolumeContentSource = src
		_, err := h.CreateVolume(t.Context(), req)
		require.NoError(t, err)
	}
	runRows(t, []row{
		copyRow("same again", codes.OK, "", func(t *testing.T, h *harness, _, s string, r *request) {
			t.Helper()
			first(t, h, ofSnapshot(s))
			r.VolumeContentSource = ofSnapshot(s)
		}),
		copyRow("same name, no source", codes.AlreadyExists, "", func(t *testing.T, h *harness, _, s string, r *request) {
			t.Helper()
			first(t, h, ofSnapshot(s))
		}),
		copyRow("same name, other source", codes.AlreadyExists, "", func(t *testing.T, h *harness, v, s string, r *request) {
			t.Helper()
			first(t, h, ofSnapshot(s))
			r.VolumeContentSource = ofVolume(v)
		}),
		copyRow("same name, now with a source", codes.AlreadyExists, "", func(t *testing.T, h *harness, _, s string,
			r *request,
		) {
			t.Helper()
			h.mustCreate(t, "copy")
			r.VolumeContentSource = ofSnapshot(s)
		}),
	})
}

// A volume's copy is a copy of the volume, not of nothing, and the request is passed on as it is.
func TestSourceReachesTheController(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	a := h.mustCreate(t, "a")
	s := h.mustSnapshot(t, a, "s").GetSnapshotId()
	seen := map[string]controller.CreateRequest{}
	note := func(method string) {
		h.ctrl.on(method, func(_ context.Context, arg any) error {
			seen[method], _ = arg.(controller.CreateRequest)
			return nil
		})
	}
	note("CreateVolume")
	note("CloneVolume")
	req := createReq("c")
	req.VolumeContentSource = ofVolume(a)
	req.AccessibilityRequirements = &csi.TopologyRequirement{Preferred: topologies(controller.TopologyZone, thisZone)}
	_, err := h.CreateVolume(t.Context(), req)
	require.NoError(t, err)
	require.Equal(t, controller.CopyOf{Volume: mustVolumeID(t, a)}, seen["CloneVolume"].Source)
	require.Equal(t, thisZone, seen["CloneVolume"].Preferred[0][controller.TopologyZone])
	clear(seen)
	req.Name, req.VolumeContentSource = "r", ofSnapshot(s)
	_, err = h.CreateVolume(t.Context(), req)
	require.NoError(t, err)
	require.Equal(t, s, seen["CreateVolume"].Source.Snapshot.String())
	require.Equal(t, []string{"CreateVolume"}, slices.Collect(maps.Keys(seen)))
}
