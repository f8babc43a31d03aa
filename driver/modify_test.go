package driver_test

import (
	"context"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
)

func TestModifyVolumeCodes(t *testing.T) {
	t.Parallel()
	modify := func(params map[string]string) func(context.Context, *harness, string) error {
		return func(ctx context.Context, h *harness, handle string) error {
			_, err := h.ControllerModifyVolume(ctx, &csi.ControllerModifyVolumeRequest{
				VolumeId: handle, MutableParameters: params,
			})
			return err
		}
	}
	good := modify(map[string]string{"iopsLimit": "500"})
	of := func(handle string, params map[string]string) func(context.Context, *testing.T, *harness) error {
		return func(ctx context.Context, _ *testing.T, h *harness) error { return modify(params)(ctx, h, handle) }
	}
	fresh := func(params map[string]string) func(context.Context, *testing.T, *harness) error {
		return existing(modify(params))
	}
	bad := map[string]string{"colour": "red"}
	runRows(t, append(hostileRows(good),
		row{"plain", existing(good), codes.OK, ""},
		row{"all that may change", fresh(map[string]string{
			"iopsLimit": "1k", "readIopsLimit": "1k", "writeIopsLimit": "1k", "bandwidthLimit": "1Mi",
			"readBandwidthLimit": "1Mi", "writeBandwidthLimit": "1Mi", "burst": "5", "iopsReservation": "10",
			"priority": "70", "ioScheduler": "fair", "cacheMode": "writeBack", "cacheSize": "1Mi", "readAhead": "0",
			"eviction": "lfu", "adaptive": "on", "replicas": "5", "dataLocality": "preferred",
		}), codes.OK, ""},
		row{"back to the default", fresh(map[string]string{"iopsLimit": ""}), codes.OK, ""},
		row{"no id", of("", map[string]string{"iopsLimit": "5"}), codes.InvalidArgument, "volume_id"},
		row{"no parameters", of(unknown, nil), codes.InvalidArgument, "mutable_parameters"},
		row{"unknown volume", of(unknown, bad), codes.NotFound, unknown},
		row{"foreign volume", of(foreign, bad), codes.NotFound, foreign},
		row{"unknown key", fresh(bad), codes.InvalidArgument, "colour"},
		row{"a key of creation", fresh(map[string]string{"spread": "zone"}), codes.InvalidArgument, "spread"},
		row{"filesystem", fresh(map[string]string{
			"csi.storage.k8s.io/fstype": "xfs",
		}), codes.InvalidArgument, "fstype"},
		row{"bad value", fresh(map[string]string{"priority": "high"}), codes.InvalidArgument, "high"},
		row{"two replicas", fresh(map[string]string{"replicas": "2"}), codes.InvalidArgument, "replicas"},
		row{"one key twice", fresh(map[string]string{"burst": "1", "BURST": "2"}), codes.InvalidArgument, "the same"},
		row{"contradiction", fresh(map[string]string{
			"iopsLimit": "5", "iopsReservation": "6",
		}), codes.InvalidArgument, "iopsReservation"},
		row{"too large", fresh(map[string]string{
			"iopsLimit": strings.Repeat("5", 4097),
		}), codes.InvalidArgument, "mutable_parameters has"},
		row{"no quorum", failing("SetParams", trivet.ErrUnavailable, good), codes.Unavailable, ""},
		row{"no leader", failing("SetParams", trivet.ErrNotLeader, good), codes.Unavailable, ""},
		row{"no quorum to read", failing("Volume", trivet.ErrUnavailable, good), codes.Unavailable, ""},
		row{"busy", failing("SetParams", trivet.ErrPending, good), codes.Aborted, ""},
	))
}

// TestModifyIsAllOrNothing: one bad key among good ones, and nothing has changed.
func TestModifyIsAllOrNothing(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	handle := h.mustCreate(t, "a")
	modify := func(params map[string]string) error {
		_, err := h.ControllerModifyVolume(t.Context(), &csi.ControllerModifyVolumeRequest{
			VolumeId: handle, MutableParameters: params,
		})
		return err
	}
	id, err := trivet.ParseVolumeID(handle)
	require.NoError(t, err)
	params := func() map[string]string {
		v, err := h.ctrl.Volume(t.Context(), id)
		require.NoError(t, err)
		return v.Params
	}
	require.NoError(t, modify(map[string]string{"iopsLimit": "500", "PRIORITY": "70"}))
	want := map[string]string{"iopsLimit": "500", "priority": "70"}
	require.Equal(t, want, params())
	requireCode(t, codes.InvalidArgument, modify(map[string]string{"iopsLimit": "7", "reclaimPolicy": "retain"}))
	require.Equal(t, want, params())
}

// TestModifyForgetsWhoseClaimItIs: the keys that csi-resizer adds with --extra-modify-metadata are no parameters.
func TestModifyForgetsWhoseClaimItIs(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	handle := h.mustCreate(t, "a")
	var patches []map[string]string
	h.ctrl.on("SetParams", func(_ context.Context, arg any) error {
		patches = append(patches, arg.(patchArgs).patch)
		return nil
	})
	claim := map[string]string{
		"csi.storage.k8s.io/pvc/name": "data-0", "csi.storage.k8s.io/pvc/namespace": "default",
		"csi.storage.k8s.io/pv/name": "pvc-1",
	}
	_, err := h.ControllerModifyVolume(t.Context(), &csi.ControllerModifyVolumeRequest{
		VolumeId: handle, MutableParameters: claim,
	})
	require.NoError(t, err)
	require.Empty(t, patches)
	claim["burst"] = "9"
	_, err = h.ControllerModifyVolume(t.Context(), &csi.ControllerModifyVolumeRequest{
		VolumeId: handle, MutableParameters: claim,
	})
	require.NoError(t, err)
	require.Equal(t, []map[string]string{{"burst": "9"}}, patches)
}

// TestCreateWithMutableParameters: a VolumeAttributesClass goes before the StorageClass, and belongs to the request.
func TestCreateWithMutableParameters(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	var asked controller.CreateRequest
	h.ctrl.on("CreateVolume", func(_ context.Context, arg any) error {
		asked = arg.(controller.CreateRequest)
		return nil
	})
	create := func(mutable map[string]string) (*csi.CreateVolumeResponse, error) {
		req := createReq("a")
		req.Parameters = map[string]string{"Replicas": "3", "IOPSLimit": "100", "spread": "node"}
		req.MutableParameters = mutable
		return h.CreateVolume(t.Context(), req)
	}
	made, err := create(map[string]string{"iopslimit": "500", "replicas": "1"})
	require.NoError(t, err)
	require.Equal(t, map[string]string{"iopsLimit": "500", "replicas": "1", "spread": "node"}, asked.Params)
	again, err := create(map[string]string{"replicas": "1", "iopsLimit": "500"})
	require.NoError(t, err)
	require.Equal(t, made.GetVolume().GetVolumeId(), again.GetVolume().GetVolumeId())

	_, err = create(map[string]string{"replicas": "1", "iopsLimit": "501"})
	requireCode(t, codes.AlreadyExists, err)
	_, err = create(map[string]string{"spread": "zone"})
	requireCode(t, codes.InvalidArgument, err)
	_, err = create(map[string]string{"iopsReservation": "101"})
	requireCode(t, codes.InvalidArgument, err)
}

// TestValidateMutableParameters: what a volume could not be given is not confirmed, and says why.
func TestValidateMutableParameters(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	handle := h.mustCreate(t, "a")
	validate := func(mutable map[string]string) *csi.ValidateVolumeCapabilitiesResponse {
		resp, err := h.ValidateVolumeCapabilities(t.Context(), &csi.ValidateVolumeCapabilitiesRequest{
			VolumeId: handle, VolumeCapabilities: createReq("").GetVolumeCapabilities(), MutableParameters: mutable,
		})
		require.NoError(t, err)
		return resp
	}
	yes := validate(map[string]string{"burst": "9"})
	require.NotNil(t, yes.GetConfirmed())
	require.Equal(t, map[string]string{"burst": "9"}, yes.GetConfirmed().GetMutableParameters())
	no := validate(map[string]string{"colour": "red"})
	require.Nil(t, no.GetConfirmed())
	require.Contains(t, no.GetMessage(), "colour")
}
