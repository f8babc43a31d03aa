package driver_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// controllerCalls are the calls of the controller service, each with the method of the catalogue's that it needs. A
// call that is added to the driver belongs here, too.
func controllerCalls() map[string]struct {
	method string
	call   func(ctx context.Context, h *harness, handle string) error
} {
	type call = struct {
		method string
		call   func(ctx context.Context, h *harness, handle string) error
	}
	one := func(method string, f func(context.Context, *harness, string) error) call { return call{method, f} }
	calls := map[string]call{
		"CreateVolume": one("CreateVolume", func(ctx context.Context, h *harness, _ string) error {
			_, err := h.CreateVolume(ctx, createReq("another"))
			return err
		}),
		"DeleteVolume": one("DeleteVolume", func(ctx context.Context, h *harness, handle string) error {
			_, err := h.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: handle})
			return err
		}),
		"ControllerPublishVolume": one("Attach", func(ctx context.Context, h *harness, handle string) error {
			_, err := h.ControllerPublishVolume(ctx, publishReq(handle))
			return err
		}),
		"ControllerUnpublishVolume": one("Detach", func(ctx context.Context, h *harness, handle string) error {
			_, err := h.ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: handle})
			return err
		}),
		"ValidateVolumeCapabilities": one("Volume", func(ctx context.Context, h *harness, handle string) error {
			_, err := h.ValidateVolumeCapabilities(ctx, &csi.ValidateVolumeCapabilitiesRequest{
				VolumeId: handle, VolumeCapabilities: createReq("").GetVolumeCapabilities(),
			})
			return err
		}),
		"ListVolumes": one("Volumes", func(ctx context.Context, h *harness, _ string) error {
			_, err := h.ListVolumes(ctx, &csi.ListVolumesRequest{})
			return err
		}),
		"GetCapacity": one("Capacity", func(ctx context.Context, h *harness, _ string) error {
			_, err := h.GetCapacity(ctx, &csi.GetCapacityRequest{})
			return err
		}),
		"ControllerGetVolume": one("Volume", func(ctx context.Context, h *harness, handle string) error {
			_, err := h.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: handle})
			return err
		}),
		"ControllerModifyVolume": one("SetParams", func(ctx context.Context, h *harness, handle string) error {
			_, err := h.ControllerModifyVolume(ctx, &csi.ControllerModifyVolumeRequest{
				VolumeId: handle, MutableParameters: map[string]string{"burst": "1"},
			})
			return err
		}),
		"ControllerGetVolumeHealth": one("VolumeHealth", func(ctx context.Context, h *harness, handle string) error {
			_, err := h.ControllerGetVolumeHealth(ctx, &csi.ControllerGetVolumeHealthRequest{VolumeId: handle})
			return err
		}),
		"ControllerListVolumeHealth": one("Unhealthy", func(ctx context.Context, h *harness, _ string) error {
			_, err := h.ControllerListVolumeHealth(ctx, &csi.ControllerListVolumeHealthRequest{})
			return err
		}),
	}
	maps.Copy(calls, copyCalls())
	return calls
}

// copyCalls are those of controllerCalls that are about snapshots and growth.
func copyCalls() map[string]struct {
	method string
	call   func(ctx context.Context, h *harness, handle string) error
} {
	type call = struct {
		method string
		call   func(ctx context.Context, h *harness, handle string) error
	}
	const some = "snap-00000000000000aa"
	return map[string]call{
		"CreateSnapshot": {"CreateSnapshot", func(ctx context.Context, h *harness, handle string) error {
			_, err := h.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: handle})
			return err
		}},
		"DeleteSnapshot": {"DeleteSnapshot", func(ctx context.Context, h *harness, _ string) error {
			_, err := h.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: some})
			return err
		}},
		"GetSnapshot": {"Snapshot", func(ctx context.Context, h *harness, _ string) error {
			_, err := h.GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: some})
			return err
		}},
		"ListSnapshots": {"Snapshots", func(ctx context.Context, h *harness, _ string) error {
			_, err := h.ListSnapshots(ctx, &csi.ListSnapshotsRequest{})
			return err
		}},
		"ControllerExpandVolume": {"ExpandVolume", func(ctx context.Context, h *harness, handle string) error {
			_, err := h.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{
				VolumeId: handle, CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 30},
			})
			return err
		}},
	}
}

// TestUnknownOutcomeIsNotFinal: whoever has no quorum, no leader, or is being shut down, may have done it all the same.
// Such an error is UNAVAILABLE whatever else it wraps: a final code would tell the orchestrator that nothing was done.
func TestUnknownOutcomeIsNotFinal(t *testing.T) {
	t.Parallel()
	for name, c := range controllerCalls() {
		for _, unknown := range []error{trivet.ErrUnavailable, trivet.ErrNotLeader, trivet.ErrClosed} {
			for _, with := range []error{
				nil, trivet.ErrNotFound, trivet.ErrExists, trivet.ErrInvalid, trivet.ErrNoSpace, trivet.ErrInUse,
				context.DeadlineExceeded, errors.New("something else"),
			} {
				t.Run(fmt.Sprintf("%s: %v, %v", name, unknown, with), func(t *testing.T) {
					t.Parallel()
					h := open(t, nil)
					handle := h.mustCreate(t, "a")
					h.ctrl.fail(c.method, errors.Join(with, fmt.Errorf("meta group: %w", unknown)))
					requireCode(t, codes.Unavailable, c.call(t.Context(), h, handle))
				})
			}
		}
	}
}

// TestCallsAreAllChecked: the table above has what the driver advertises.
func TestCallsAreAllChecked(t *testing.T) {
	t.Parallel()
	calls := controllerCalls()
	for _, m := range csi.Controller_ServiceDesc.Methods {
		h := open(t, nil)
		if _, listed := calls[m.MethodName]; listed || m.MethodName == "ControllerGetCapabilities" {
			continue
		}
		err := h.conn.Invoke(t.Context(), "/"+csi.Controller_ServiceDesc.ServiceName+"/"+m.MethodName,
			&csi.ProbeRequest{}, &csi.ProbeResponse{})
		require.Equal(t, codes.Unimplemented, status.Code(err), "%s is served and not in the table", m.MethodName)
	}
}

// TestRetryFindsWhatADeadlineLeft: the caller's deadline passes while the volume is being made; the work goes on,
// and the same call later has it.
func TestRetryFindsWhatADeadlineLeft(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	asked, goOn, done := make(chan struct{}), make(chan struct{}), make(chan struct{})
	request := requestOf(t, createReq("a"))
	h.ctrl.on("CreateVolume", func(context.Context, any) error { // whoever works on it does not look at the deadline
		close(asked)
		<-goOn
		defer close(done)
		h.ctrl.put(meta.Volume{Name: "a", SizeBytes: 64 << 20, Phase: meta.PhaseBound, Request: request})
		return fmt.Errorf("replicas: still waiting: %w", trivet.ErrUnavailable)
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	result := make(chan error, 1)
	go func() {
		_, err := h.CreateVolume(ctx, createReq("a"))
		result <- err
	}()
	<-asked
	cancel()
	require.Equal(t, codes.Canceled, status.Code(<-result))

	// The same name meanwhile: somebody works on it, and nothing is made twice.
	_, err := h.CreateVolume(t.Context(), createReq("a"))
	requireCode(t, codes.Aborted, err)
	close(goOn)
	<-done
	h.ctrl.on("CreateVolume", nil)
	var made *csi.CreateVolumeResponse
	require.Eventually(t, func() bool { // until the first call has let go of the name
		made, err = h.CreateVolume(t.Context(), createReq("a"))
		return err == nil
	}, waitMax, pollEvery)
	volumes, err := h.ctrl.Volumes(t.Context())
	require.NoError(t, err)
	require.Len(t, volumes, 1)
	require.Equal(t, volumes[0].ID.String(), made.GetVolume().GetVolumeId())
}
