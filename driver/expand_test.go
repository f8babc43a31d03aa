package driver_test

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/node"
)

func expandReq(handle string) *csi.ControllerExpandVolumeRequest {
	return &csi.ControllerExpandVolumeRequest{
		VolumeId: handle, CapacityRange: &csi.CapacityRange{RequiredBytes: 128 << 20},
	}
}

func TestControllerExpandCodes(t *testing.T) {
	t.Parallel()
	type request = csi.ControllerExpandVolumeRequest
	expand := func(change func(*request)) func(context.Context, *harness, string) error {
		return func(ctx context.Context, h *harness, handle string) error {
			req := expandReq(handle)
			change(req)
			_, err := h.ControllerExpandVolume(ctx, req)
			return err
		}
	}
	with := func(change func(*request)) func(context.Context, *testing.T, *harness) error {
		return existing(expand(change))
	}
	same := expand(func(*request) {})
	phase := func(p meta.Phase, before meta.Phase) func(context.Context, *testing.T, *harness) error {
		return func(ctx context.Context, _ *testing.T, h *harness) error {
			v := meta.Volume{Name: "p", Phase: p, SizeBytes: 64 << 20}
			if before != "" {
				v.Rollback = &meta.Rollback{Snapshot: 1, Before: before}
			}
			return same(ctx, h, h.ctrl.put(v).ID.String())
		}
	}
	runRows(t, append(hostileRows(same),
		row{"plain", with(func(*request) {}), codes.OK, ""},
		row{"no id", with(func(r *request) { r.VolumeId = "" }), codes.InvalidArgument, "volume_id"},
		row{"no range", with(func(r *request) {
			r.CapacityRange, r.VolumeId = nil, foreign
		}), codes.InvalidArgument, "capacity_range"},
		row{"empty range", with(func(r *request) {
			r.CapacityRange = &csi.CapacityRange{}
		}), codes.InvalidArgument, "capacity_range"},
		row{"negative", with(func(r *request) {
			r.CapacityRange.RequiredBytes = -1
		}), codes.InvalidArgument, "capacity_range"},
		row{"limit below size", with(func(r *request) {
			r.CapacityRange.LimitBytes = 1 << 20
		}), codes.OutOfRange, "capacity_range"},
		row{"limit below what it has", with(func(r *request) {
			r.CapacityRange = &csi.CapacityRange{LimitBytes: 1 << 20}
		}), codes.OutOfRange, "67108864"},
		row{"smaller", with(func(r *request) { r.CapacityRange.RequiredBytes = 1 }), codes.OK, ""},
		row{"malformed capability", with(func(r *request) {
			r.VolumeCapability = &csi.VolumeCapability{}
		}), codes.InvalidArgument, "access_type"},
		row{"unsupported capability", with(func(r *request) {
			r.VolumeCapability, r.VolumeId = mountCap(mnmw), foreign
		}), codes.InvalidArgument, "MULTI_NODE"},
		row{"unknown volume", with(func(r *request) { r.VolumeId = unknown }), codes.NotFound, unknown},
		row{"foreign volume", with(func(r *request) { r.VolumeId = foreign }), codes.NotFound, foreign},
		row{"kept for its snapshots", phase(meta.PhaseKept, ""), codes.NotFound, "Kept"},
		row{"brought back to a snapshot", phase(meta.PhaseRestoring, meta.PhaseBound), codes.OK, ""},
		row{"released, and brought back", phase(meta.PhaseRestoring, meta.PhaseReleased), codes.NotFound, "Restoring"},
		row{"no quorum", failing("ExpandVolume", trivet.ErrUnavailable, same), codes.Unavailable, ""},
		row{"busy", failing("ExpandVolume", trivet.ErrPending, same), codes.Aborted, ""},
		row{"no disk is that large", failing("ExpandVolume", trivet.ErrOutOfRange, same), codes.OutOfRange, ""},
		row{"no room", failing("ExpandVolume", trivet.ErrNoSpace, same), codes.ResourceExhausted, ""},
	))
}

func TestControllerExpandAnswers(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		attach bool
		cap    *csi.VolumeCapability
		onNode bool
	}{
		"nothing said":           {false, nil, true},
		"nothing said, attached": {true, nil, true},
		"mount":                  {false, mountCap(snmw), true},
		"mount, attached":        {true, mountCap(snmw), true},
		"block":                  {false, blockCap(snmw), false},
		"block, attached":        {true, blockCap(snmw), true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := open(t, nil)
			handle := h.mustCreate(t, "a")
			if tc.attach {
				h.mustAttach(t, handle)
			}
			req := expandReq(handle)
			req.VolumeCapability = tc.cap
			for range 2 {
				resp, err := h.ControllerExpandVolume(t.Context(), req)
				require.NoError(t, err)
				require.EqualValues(t, 128<<20, resp.GetCapacityBytes())
				require.Equal(t, tc.onNode, resp.GetNodeExpansionRequired())
			}
		})
	}
}

// A limit alone is no wish for a larger volume: not even for the default size of new ones.
func TestExpandToALimit(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	handle := h.mustCreate(t, "a")
	var seen expandArgs
	h.ctrl.on("ExpandVolume", func(_ context.Context, arg any) error {
		seen, _ = arg.(expandArgs)
		return nil
	})
	resp, err := h.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{
		VolumeId: handle, CapacityRange: &csi.CapacityRange{LimitBytes: 10 << 30},
	})
	require.NoError(t, err)
	require.EqualValues(t, 64<<20, resp.GetCapacityBytes())
	require.Equal(t, expandArgs{1, 10 << 30}, seen, "zero would be the default size")
}

func TestNodeExpandCodes(t *testing.T) {
	t.Parallel()
	type request = csi.NodeExpandVolumeRequest
	expand := func(change func(*request)) func(context.Context, *harness, string) error {
		return func(ctx context.Context, h *harness, handle string) error {
			req := &request{
				VolumeId: handle, VolumePath: filepath.Join(h.dir, "staging"),
				CapacityRange: &csi.CapacityRange{RequiredBytes: 128 << 20}, VolumeCapability: mountCap(snmw),
			}
			change(req)
			_, err := h.NodeExpandVolume(ctx, req)
			return err
		}
	}
	with := func(change func(*harness, *request)) func(context.Context, *testing.T, *harness) error {
		return func(ctx context.Context, t *testing.T, h *harness) error {
			t.Helper()
			handle := h.mustCreate(t, "a")
			_, err := h.NodeStageVolume(ctx, h.stageReq(handle))
			require.NoError(t, err)
			_, err = h.NodePublishVolume(ctx, h.nodePublishReq(handle, "target"))
			require.NoError(t, err)
			return expand(func(r *request) { change(h, r) })(ctx, h, handle)
		}
	}
	same := expand(func(*request) {})
	runRows(t, append(hostileRows(same),
		row{"at the staging path", with(func(*harness, *request) {}), codes.OK, ""},
		row{"at the target", with(func(h *harness, r *request) {
			r.VolumePath = filepath.Join(h.dir, "target")
		}), codes.OK, ""},
		row{"device path of kubelet", with(func(h *harness, r *request) {
			r.VolumePath, r.StagingTargetPath = "csi-0123abcd", filepath.Join(h.dir, "staging")
		}), codes.OK, ""},
		row{"no range", with(func(_ *harness, r *request) { r.CapacityRange = nil }), codes.OK, ""},
		row{"no capability", with(func(_ *harness, r *request) { r.VolumeCapability = nil }), codes.OK, ""},
		row{"no id", with(func(_ *harness, r *request) { r.VolumeId = "" }), codes.InvalidArgument, "volume_id"},
		row{"no path", with(func(_ *harness, r *request) {
			r.VolumePath, r.VolumeId = "", foreign
		}), codes.InvalidArgument, "volume_path"},
		row{"negative", with(func(_ *harness, r *request) {
			r.CapacityRange.RequiredBytes = -1
		}), codes.InvalidArgument, "capacity_range"},
		row{"limit below what it has", with(func(_ *harness, r *request) {
			r.CapacityRange = &csi.CapacityRange{LimitBytes: 1 << 20}
		}), codes.OutOfRange, "67108864"},
		row{"unsupported capability", with(func(_ *harness, r *request) {
			r.VolumeCapability = mountCap(mnmw)
		}), codes.InvalidArgument, "MULTI_NODE"},
		row{"unknown volume", with(func(_ *harness, r *request) { r.VolumeId = unknown }), codes.NotFound, ""},
		row{"foreign volume", with(func(_ *harness, r *request) { r.VolumeId = foreign }), codes.NotFound, foreign},
		row{"not at that path", with(func(_ *harness, r *request) { r.VolumePath = "some/path" }), codes.NotFound, ""},
		row{"nowhere", with(func(_ *harness, r *request) {
			r.VolumePath, r.StagingTargetPath = "some/path", "/other"
		}), codes.NotFound, ""},
		row{"device cannot grow in use", failing("Expand", trivet.ErrInUse, same), codes.FailedPrecondition, ""},
		row{"tool is missing", failing("Expand", node.ErrUnsupported, same), codes.FailedPrecondition, ""},
		row{"volume is smaller", failing("Expand", trivet.ErrOutOfRange, same), codes.OutOfRange, ""},
		row{"busy", failing("Expand", trivet.ErrPending, same), codes.Aborted, ""},
		row{"no quorum", failing("Expand", trivet.ErrUnavailable, same), codes.Unavailable, ""},
	))
}

// TestNodeExpandAnswers: the size of the device is what kubelet writes into the claim's status.
func TestNodeExpandAnswers(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	handle := h.mustCreate(t, "a")
	_, err := h.NodeStageVolume(t.Context(), h.stageReq(handle))
	require.NoError(t, err)
	for range 2 {
		resp, err := h.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{
			VolumeId: handle, VolumePath: filepath.Join(h.dir, "staging"),
			CapacityRange: &csi.CapacityRange{RequiredBytes: 128 << 20},
		})
		require.NoError(t, err)
		require.EqualValues(t, 128<<20, resp.GetCapacityBytes())
	}
}
