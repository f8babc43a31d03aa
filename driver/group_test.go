package driver_test

import (
	"context"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// unknownGroup is a handle of the right form that names no group of snapshots.
const unknownGroup = "snapgroup-0123456789abcdef"

// groups is the third service of a driver that is reached over one connection.
func (h *harness) groups() csi.GroupControllerClient { return csi.NewGroupControllerClient(h.conn) }

func TestGroupCapabilities(t *testing.T) {
	t.Parallel()
	resp, err := open(t, nil).groups().GroupControllerGetCapabilities(t.Context(),
		&csi.GroupControllerGetCapabilitiesRequest{})
	require.NoError(t, err)
	require.Len(t, resp.GetCapabilities(), 1)
	require.Equal(t, csi.GroupControllerServiceCapability_RPC_CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT,
		resp.GetCapabilities()[0].GetRpc().GetType())
}

// mustGroup makes a group of two new volumes.
func (h *harness) mustGroup(t *testing.T) (g *csi.VolumeGroupSnapshot, volumes []string) {
	t.Helper()
	volumes = []string{h.mustCreate(t, "a"), h.mustCreate(t, "b")}
	resp, err := h.groups().CreateVolumeGroupSnapshot(t.Context(), &csi.CreateVolumeGroupSnapshotRequest{
		Name: "g", SourceVolumeIds: volumes,
	})
	require.NoError(t, err)
	return resp.GetGroupSnapshot(), volumes
}

func TestCreateGroupCodes(t *testing.T) {
	t.Parallel()
	type request = csi.CreateVolumeGroupSnapshotRequest
	group := func(change func(*request)) func(context.Context, *harness, string) error {
		return func(ctx context.Context, h *harness, handle string) error {
			req := &request{Name: "g", SourceVolumeIds: []string{handle}}
			change(req)
			_, err := h.groups().CreateVolumeGroupSnapshot(ctx, req)
			return err
		}
	}
	with := func(change func(*request)) func(context.Context, *testing.T, *harness) error {
		return existing(group(change))
	}
	same := group(func(*request) {})
	again := func(change func(*testing.T, *harness, *request)) func(context.Context, *testing.T, *harness) error {
		return func(ctx context.Context, t *testing.T, h *harness) error {
			t.Helper()
			_, volumes := h.mustGroup(t)
			return group(func(r *request) { r.SourceVolumeIds = volumes; change(t, h, r) })(ctx, h, "")
		}
	}
	runRows(t, append(renamed(hostileRows(same), "source_volume_ids"),
		row{"plain", with(func(*request) {}), codes.OK, ""},
		row{"no name", with(func(r *request) { r.Name = "" }), codes.InvalidArgument, "name"},
		row{"name too long", with(func(r *request) {
			r.Name = strings.Repeat("x", 129)
		}), codes.InvalidArgument, "name"},
		row{"no volumes", with(func(r *request) { r.SourceVolumeIds = nil }), codes.InvalidArgument, "source_volume_ids"},
		row{"a volume twice", with(func(r *request) {
			r.SourceVolumeIds = append(r.SourceVolumeIds, r.SourceVolumeIds[0])
		}), codes.InvalidArgument, "twice"},
		row{"parameter", with(func(r *request) {
			r.Parameters, r.SourceVolumeIds = map[string]string{"ttl": "1h"}, []string{foreign}
		}), codes.InvalidArgument, "ttl"},
		row{"policy of the class among its parameters", with(func(r *request) {
			r.Parameters = map[string]string{"deletionPolicy": "Retain"}
		}), codes.OK, ""},
		row{"unknown policy among the parameters", with(func(r *request) {
			r.Parameters = map[string]string{"deletionPolicy": "Never"}
		}), codes.InvalidArgument, "deletionPolicy"},
		row{"metadata of the sidecar", with(func(r *request) {
			r.Parameters = map[string]string{"csi.storage.k8s.io/volumegroupsnapshot/name": "g"}
		}), codes.OK, ""},
		row{"unknown volume", with(func(r *request) {
			r.SourceVolumeIds = append(r.SourceVolumeIds, unknown)
		}), codes.NotFound, unknown},
		row{"foreign volume", with(func(r *request) {
			r.SourceVolumeIds = append(r.SourceVolumeIds, foreign)
		}), codes.NotFound, foreign},
		row{"same again", again(func(*testing.T, *harness, *request) {}), codes.OK, ""},
		row{"same again, other order", again(func(_ *testing.T, _ *harness, r *request) {
			r.SourceVolumeIds[0], r.SourceVolumeIds[1] = r.SourceVolumeIds[1], r.SourceVolumeIds[0]
		}), codes.OK, ""},
		row{"same again, volume kept for it", again(func(t *testing.T, h *harness, r *request) {
			t.Helper()
			h.setPhase(t, r.SourceVolumeIds[0], meta.PhaseKept)
		}), codes.OK, ""},
		row{"other name, volume kept", again(func(t *testing.T, h *harness, r *request) {
			t.Helper()
			h.setPhase(t, r.SourceVolumeIds[0], meta.PhaseKept)
			r.Name = "other"
		}), codes.NotFound, "Kept"},
		row{"same name, fewer volumes", again(func(_ *testing.T, _ *harness, r *request) {
			r.SourceVolumeIds = r.SourceVolumeIds[:1]
		}), codes.AlreadyExists, ""},
		row{"no quorum", failing("CreateSnapshotGroup", trivet.ErrUnavailable, same), codes.Unavailable, ""},
		row{"no quorum to look", failing("Volume", trivet.ErrUnavailable, same), codes.Unavailable, ""},
		row{"volume is busy", failing("CreateSnapshotGroup", trivet.ErrPending, same), codes.Aborted, ""},
		row{"too many", failing("CreateSnapshotGroup", trivet.ErrNoSpace, same), codes.ResourceExhausted, ""},
	))
}

func TestGroupIsDescribed(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	g, volumes := h.mustGroup(t)
	require.True(t, g.GetReadyToUse())
	require.EqualValues(t, 1_700_000_000, g.GetCreationTime().GetSeconds())
	require.Len(t, g.GetSnapshots(), 2)
	list, err := h.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{})
	require.NoError(t, err)
	require.Len(t, list.GetEntries(), 2, "members are snapshots as any other")
	for i, s := range g.GetSnapshots() {
		require.Equal(t, volumes[i], s.GetSourceVolumeId())
		require.Equal(t, g.GetGroupSnapshotId(), s.GetGroupSnapshotId())
		require.True(t, s.GetReadyToUse())
		got, err := h.GetSnapshot(t.Context(), &csi.GetSnapshotRequest{SnapshotId: s.GetSnapshotId()})
		require.NoError(t, err)
		require.Equal(t, g.GetGroupSnapshotId(), got.GetSnapshot().GetGroupSnapshotId())
	}
	got, err := h.groups().GetVolumeGroupSnapshot(t.Context(), &csi.GetVolumeGroupSnapshotRequest{
		GroupSnapshotId: g.GetGroupSnapshotId(),
		SnapshotIds:     []string{g.GetSnapshots()[1].GetSnapshotId(), g.GetSnapshots()[0].GetSnapshotId()},
	})
	require.NoError(t, err)
	require.Equal(t, g.String(), got.GetGroupSnapshot().String())

	_, err = h.groups().DeleteVolumeGroupSnapshot(t.Context(), &csi.DeleteVolumeGroupSnapshotRequest{
		GroupSnapshotId: g.GetGroupSnapshotId(),
		SnapshotIds:     []string{g.GetSnapshots()[0].GetSnapshotId(), g.GetSnapshots()[1].GetSnapshotId()},
	})
	require.NoError(t, err)
	ids, _ := h.mustList(t, &csi.ListSnapshotsRequest{})
	require.Empty(t, ids, "its snapshots went with it")
}

// A group that is not made yet is shown, and not taken for one that is.
func TestGroupThatIsNotCut(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	id := h.ctrl.putGroup(meta.GroupFreezing, 1).ID.String()
	got, err := h.groups().GetVolumeGroupSnapshot(t.Context(), &csi.GetVolumeGroupSnapshotRequest{GroupSnapshotId: id})
	require.NoError(t, err)
	require.False(t, got.GetGroupSnapshot().GetReadyToUse())
	require.False(t, got.GetGroupSnapshot().GetSnapshots()[0].GetReadyToUse())
}

// Nobody has the ID of a group that failed: the next try must not meet it.
func TestFailedGroupIsForgotten(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	handle := h.mustCreate(t, "a")
	failed := h.ctrl.putGroup(meta.GroupFailed, mustVolumeID(t, handle))
	req := &csi.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: []string{handle}}
	_, err := h.groups().CreateVolumeGroupSnapshot(t.Context(), req)
	requireCode(t, codes.Unavailable, err)
	resp, err := h.groups().CreateVolumeGroupSnapshot(t.Context(), req)
	require.NoError(t, err)
	require.NotEqual(t, failed.ID.String(), resp.GetGroupSnapshot().GetGroupSnapshotId())
}

func TestGetGroupCodes(t *testing.T) {
	t.Parallel()
	type request = csi.GetVolumeGroupSnapshotRequest
	get := func(ctx context.Context, h *harness, handle string) error {
		_, err := h.groups().GetVolumeGroupSnapshot(ctx, &request{GroupSnapshotId: handle})
		return err
	}
	of := func(handle string) func(context.Context, *testing.T, *harness) error {
		return func(ctx context.Context, _ *testing.T, h *harness) error { return get(ctx, h, handle) }
	}
	in := func(state meta.SnapshotGroupState) func(context.Context, *testing.T, *harness) error {
		return func(ctx context.Context, _ *testing.T, h *harness) error {
			return get(ctx, h, h.ctrl.putGroup(state, 1).ID.String())
		}
	}
	runRows(t, append(renamed(hostileRows(get), "group_snapshot_id"),
		row{"no id", of(""), codes.InvalidArgument, "group_snapshot_id"},
		row{"unknown", of(unknownGroup), codes.NotFound, unknownGroup},
		row{"foreign", of("fake-group-id"), codes.NotFound, "fake-group-id"},
		row{"a snapshot", of(unknownSnapshot), codes.NotFound, unknownSnapshot},
		row{"ready", in(meta.GroupReady), codes.OK, ""},
		row{"failed", in(meta.GroupFailed), codes.NotFound, "Failed"},
		row{"being deleted", in(meta.GroupDeleting), codes.NotFound, "Deleting"},
		row{"no quorum", failing("SnapshotGroup", trivet.ErrUnavailable, func(ctx context.Context, h *harness,
			_ string,
		) error {
			return get(ctx, h, unknownGroup)
		}), codes.Unavailable, ""},
		row{"other snapshots", func(ctx context.Context, t *testing.T, h *harness) error {
			t.Helper()
			g, _ := h.mustGroup(t)
			_, err := h.groups().GetVolumeGroupSnapshot(ctx, &request{
				GroupSnapshotId: g.GetGroupSnapshotId(), SnapshotIds: []string{g.GetSnapshots()[0].GetSnapshotId()},
			})
			return err
		}, codes.InvalidArgument, "snapshot_ids"},
	))
}

func TestDeleteGroupCodes(t *testing.T) {
	t.Parallel()
	type request = csi.DeleteVolumeGroupSnapshotRequest
	del := func(ctx context.Context, h *harness, handle string) error {
		_, err := h.groups().DeleteVolumeGroupSnapshot(ctx, &request{GroupSnapshotId: handle})
		return err
	}
	of := func(handle string) func(context.Context, *testing.T, *harness) error {
		return func(ctx context.Context, _ *testing.T, h *harness) error { return del(ctx, h, handle) }
	}
	made := func(change func(g *csi.VolumeGroupSnapshot, r *request)) func(context.Context, *testing.T, *harness) error {
		return func(ctx context.Context, t *testing.T, h *harness) error {
			t.Helper()
			g, _ := h.mustGroup(t)
			r := &request{GroupSnapshotId: g.GetGroupSnapshotId()}
			change(g, r)
			_, err := h.groups().DeleteVolumeGroupSnapshot(ctx, r)
			return err
		}
	}
	runRows(t, append(renamed(hostileRows(del), "group_snapshot_id"),
		row{"no id", of(""), codes.InvalidArgument, "group_snapshot_id"},
		row{"unknown", of(unknownGroup), codes.OK, ""},
		row{"foreign", of("fake-group-id"), codes.OK, ""},
		row{"ids were never learned", made(func(*csi.VolumeGroupSnapshot, *request) {}), codes.OK, ""},
		row{"other snapshots", made(func(g *csi.VolumeGroupSnapshot, r *request) {
			r.SnapshotIds = []string{g.GetSnapshots()[0].GetSnapshotId(), unknownSnapshot}
		}), codes.InvalidArgument, "snapshot_ids"},
		row{"one snapshot twice", made(func(g *csi.VolumeGroupSnapshot, r *request) {
			r.SnapshotIds = []string{g.GetSnapshots()[0].GetSnapshotId(), g.GetSnapshots()[0].GetSnapshotId()}
		}), codes.InvalidArgument, "snapshot_ids"},
		row{"being deleted", func(ctx context.Context, _ *testing.T, h *harness) error {
			return del(ctx, h, h.ctrl.putGroup(meta.GroupDeleting, 1).ID.String())
		}, codes.OK, ""},
		row{"no quorum to look", failing("SnapshotGroup", trivet.ErrUnavailable, func(ctx context.Context, h *harness,
			_ string,
		) error {
			return del(ctx, h, unknownGroup)
		}), codes.Unavailable, ""},
		row{"no quorum", func(ctx context.Context, t *testing.T, h *harness) error {
			t.Helper()
			g, _ := h.mustGroup(t)
			h.ctrl.fail("DeleteSnapshotGroup", trivet.ErrUnavailable)
			return del(ctx, h, g.GetGroupSnapshotId())
		}, codes.Unavailable, ""},
		row{"a snapshot of it alone", func(ctx context.Context, t *testing.T, h *harness) error {
			t.Helper()
			g, _ := h.mustGroup(t)
			_, err := h.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: g.GetSnapshots()[0].GetSnapshotId()})
			return err
		}, codes.InvalidArgument, unknownGroup[:len("snapgroup-")]},
	))
}

// TestProxyPassesGroupCallsOn: a csi-controller offers them too.
func TestProxyPassesGroupCallsOn(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	conn := openProxy(t, u, nil)
	made, err := csi.NewControllerClient(conn).CreateVolume(t.Context(), createReq("a"))
	require.NoError(t, err)
	c := csi.NewGroupControllerClient(conn)
	caps, err := c.GroupControllerGetCapabilities(t.Context(), &csi.GroupControllerGetCapabilitiesRequest{})
	require.NoError(t, err)
	require.Len(t, caps.GetCapabilities(), 1)
	g, err := c.CreateVolumeGroupSnapshot(t.Context(), &csi.CreateVolumeGroupSnapshotRequest{
		Name: "g", SourceVolumeIds: []string{made.GetVolume().GetVolumeId()},
	})
	require.NoError(t, err)
	require.Len(t, g.GetGroupSnapshot().GetSnapshots(), 1)
	_, err = c.GetVolumeGroupSnapshot(t.Context(), &csi.GetVolumeGroupSnapshotRequest{GroupSnapshotId: unknownGroup})
	requireCode(t, codes.NotFound, err)
	require.Contains(t, u.calls, "/csi.v1.GroupController/CreateVolumeGroupSnapshot")
}
