package driver_test

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestTenAtOnce: of ten equal calls at once one does the work, the others are told to come back, and when they do
// they find what the first has made.
func TestTenAtOnce(t *testing.T) {
	t.Parallel()
	for name, prepare := range map[string]func(*testing.T, *harness) (method string, call func() (string, error)){
		"CreateSnapshot": func(t *testing.T, h *harness) (string, func() (string, error)) {
			t.Helper()
			handle := h.mustCreate(t, "a")
			return "CreateSnapshot", func() (string, error) {
				r, err := h.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: handle})
				return r.GetSnapshot().GetSnapshotId(), err
			}
		},
		"DeleteSnapshot": func(t *testing.T, h *harness) (string, func() (string, error)) {
			t.Helper()
			s := h.mustSnapshot(t, h.mustCreate(t, "a"), "s")
			return "DeleteSnapshot", func() (string, error) {
				_, err := h.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: s.GetSnapshotId()})
				return "", err
			}
		},
		"restore": func(t *testing.T, h *harness) (string, func() (string, error)) {
			t.Helper()
			req := createReq("copy")
			req.VolumeContentSource = ofSnapshot(h.mustSnapshot(t, h.mustCreate(t, "a"), "s").GetSnapshotId())
			return "CreateVolume", func() (string, error) {
				r, err := h.CreateVolume(t.Context(), req)
				return r.GetVolume().GetVolumeId(), err
			}
		},
		"clone": func(t *testing.T, h *harness) (string, func() (string, error)) {
			t.Helper()
			req := createReq("copy")
			req.VolumeContentSource = ofVolume(h.mustCreate(t, "a"))
			return "CloneVolume", func() (string, error) {
				r, err := h.CreateVolume(t.Context(), req)
				return r.GetVolume().GetVolumeId(), err
			}
		},
		"ControllerExpandVolume": func(t *testing.T, h *harness) (string, func() (string, error)) {
			t.Helper()
			req := expandReq(h.mustCreate(t, "a"))
			return "ExpandVolume", func() (string, error) {
				_, err := h.ControllerExpandVolume(t.Context(), req)
				return "", err
			}
		},
		"CreateVolumeGroupSnapshot": func(t *testing.T, h *harness) (string, func() (string, error)) {
			t.Helper()
			req := &csi.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: []string{h.mustCreate(t, "a")}}
			return "CreateSnapshotGroup", func() (string, error) {
				r, err := h.groups().CreateVolumeGroupSnapshot(t.Context(), req)
				return r.GetGroupSnapshot().GetGroupSnapshotId(), err
			}
		},
		"DeleteVolumeGroupSnapshot": func(t *testing.T, h *harness) (string, func() (string, error)) {
			t.Helper()
			g, _ := h.mustGroup(t)
			return "DeleteSnapshotGroup", func() (string, error) {
				_, err := h.groups().DeleteVolumeGroupSnapshot(t.Context(), &csi.DeleteVolumeGroupSnapshotRequest{
					GroupSnapshotId: g.GetGroupSnapshotId(),
				})
				return "", err
			}
		},
		"NodeExpandVolume": func(t *testing.T, h *harness) (string, func() (string, error)) {
			t.Helper()
			handle := h.mustCreate(t, "a")
			_, err := h.NodeStageVolume(t.Context(), h.stageReq(handle))
			require.NoError(t, err)
			return "Expand", func() (string, error) {
				_, err := h.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{
					VolumeId: handle, VolumePath: filepath.Join(h.dir, "staging"),
				})
				return "", err
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := open(t, nil)
			method, call := prepare(t, h)
			tenAtOnce(t, h, method, call)
		})
	}
}

// tenAtOnce calls ten times at once while the method under the call, of either fake, does not return.
func tenAtOnce(t *testing.T, h *harness, method string, call func() (string, error)) {
	t.Helper()
	const calls = 10
	entered, leave := make(chan struct{}, calls), make(chan struct{})
	hold := func(context.Context, any) error {
		entered <- struct{}{}
		<-leave
		return nil
	}
	h.ctrl.on(method, hold)
	h.node.on(method, hold)
	type answer struct {
		id  string
		err error
	}
	answers := make(chan answer, calls)
	for range calls {
		go func() { id, err := call(); answers <- answer{id, err} }()
	}
	for range calls - 1 { // the one that works cannot answer before it is let
		a := <-answers
		assert.Equal(t, codes.Aborted, status.Code(a.err), "%v", a.err)
	}
	close(leave)
	one := <-answers
	require.NoError(t, one.err)
	require.Len(t, entered, 1, "one alone has worked")
	again, err := call()
	require.NoError(t, err)
	require.Equal(t, one.id, again)
}

// What holds up the growth of a volume, which may be a majority that is gone, does not keep it from being detached.
func TestDetachWhileGrowing(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	handle := h.mustCreate(t, "a")
	h.mustAttach(t, handle)
	entered, leave := make(chan struct{}), make(chan struct{})
	h.ctrl.on("ExpandVolume", func(context.Context, any) error { close(entered); <-leave; return nil })
	done := make(chan error, 1)
	go func() { _, err := h.ControllerExpandVolume(t.Context(), expandReq(handle)); done <- err }()
	<-entered
	_, err := h.ControllerUnpublishVolume(t.Context(), &csi.ControllerUnpublishVolumeRequest{
		VolumeId: handle, NodeId: string(thisNode),
	})
	require.NoError(t, err)
	close(leave)
	require.NoError(t, <-done)
}
