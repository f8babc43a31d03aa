package driver_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/node"
)

// unknown is a handle of the right form that names no volume; foreign was never ours.
const (
	unknown = "vol-0123456789abcdef"
	foreign = "some-other-drivers-volume"
)

// hostile are handles that must reach neither a path nor a log as they are (S7).
var hostile = []string{"../etc", "a/b", "vol-\x00", "-rf", ".", "..", `a\b`, strings.Repeat("v", 129), "new\nline"}

// row is one line of a table of the specification: a call on a fresh driver and its code.
type row struct {
	name string
	call func(ctx context.Context, t *testing.T, h *harness) error
	want codes.Code
	says string // part of the message
}

// runRows runs every row against a driver of its own.
func runRows(t *testing.T, rows []row) {
	t.Helper()
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			err := r.call(t.Context(), t, open(t, nil))
			requireCode(t, r.want, err)
			require.Contains(t, status.Convert(err).Message(), r.says)
		})
	}
}

// create returns a row body that sends a changed CreateVolume request.
func create(change func(*csi.CreateVolumeRequest)) func(context.Context, *testing.T, *harness) error {
	return func(ctx context.Context, _ *testing.T, h *harness) error {
		req := createReq("a")
		change(req)
		_, err := h.CreateVolume(ctx, req)
		return err
	}
}

// createOverOther returns a row body that makes a volume and then sends a changed request.
func createOverOther(change func(*csi.CreateVolumeRequest)) func(context.Context, *testing.T, *harness) error {
	return func(ctx context.Context, t *testing.T, h *harness) error {
		t.Helper()
		h.mustCreate(t, "a")
		return create(change)(ctx, t, h)
	}
}

// existing returns a row body that calls with the handle of a new volume.
func existing(call func(context.Context, *harness, string) error) func(context.Context, *testing.T, *harness) error {
	return func(ctx context.Context, t *testing.T, h *harness) error {
		t.Helper()
		return call(ctx, h, h.mustCreate(t, "a"))
	}
}

// failing returns a row body that calls when a method of the controller fails.
func failing(method string, with error, call func(context.Context, *harness, string) error,
) func(context.Context, *testing.T, *harness) error {
	return func(ctx context.Context, t *testing.T, h *harness) error {
		t.Helper()
		handle := h.mustCreate(t, "a")
		err := fmt.Errorf("meta group: %w", with)
		h.ctrl.fail(method, err)
		h.node.fail(method, err)
		return call(ctx, h, handle)
	}
}

func topologies(key, value string) []*csi.Topology {
	return []*csi.Topology{{Segments: map[string]string{key: value}}}
}

func TestCreateVolumeCodes(t *testing.T) {
	t.Parallel()
	callCreate := func(ctx context.Context, h *harness, _ string) error {
		_, err := h.CreateVolume(ctx, createReq("b"))
		return err
	}
	runRows(t, []row{
		{"plain", create(func(*csi.CreateVolumeRequest) {}), codes.OK, ""},
		{"block", create(func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities = []*csi.VolumeCapability{blockCap(snsw), mountCap(snw), mountCap(snro)}
		}), codes.OK, ""},
		{"name of 128 bytes of unicode", create(func(r *csi.CreateVolumeRequest) {
			r.Name = strings.Repeat("é", 64)
		}), codes.OK, ""},
		{"no name", create(func(r *csi.CreateVolumeRequest) { r.Name = "" }), codes.InvalidArgument, "name"},
		{"name too long", create(func(r *csi.CreateVolumeRequest) {
			r.Name = strings.Repeat("x", 129)
		}), codes.InvalidArgument, "name"},
		{"name with a control character", create(func(r *csi.CreateVolumeRequest) {
			r.Name = "a\x07"
		}), codes.InvalidArgument, "name"},
		{"no capabilities", create(func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities = nil
		}), codes.InvalidArgument, "volume_capabilities"},
		{"no access type", create(func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0].AccessType = nil
		}), codes.InvalidArgument, "access_type"},
		{"no access mode", create(func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0].AccessMode = nil
		}), codes.InvalidArgument, "access_mode"},
		{"many nodes", create(func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities = append(r.VolumeCapabilities, mountCap(mnmw))
		}), codes.InvalidArgument, "MULTI_NODE_MULTI_WRITER"},
		{"unknown filesystem", create(func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0].GetMount().FsType = "ntfs; rm"
		}), codes.InvalidArgument, "fs_type"},
		{"mount group", create(func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0].GetMount().VolumeMountGroup = "1000"
		}), codes.InvalidArgument, "volume_mount_group"},
		{"no capacity range", create(func(r *csi.CreateVolumeRequest) { r.CapacityRange = nil }), codes.OK, ""},
		{"negative size", create(func(r *csi.CreateVolumeRequest) {
			r.CapacityRange.RequiredBytes = -1
		}), codes.InvalidArgument, "capacity_range"},
		{"negative limit", create(func(r *csi.CreateVolumeRequest) {
			r.CapacityRange.LimitBytes = -1
		}), codes.InvalidArgument, "capacity_range"},
		{"limit below size", create(func(r *csi.CreateVolumeRequest) {
			r.CapacityRange.LimitBytes = 1 << 20
		}), codes.OutOfRange, "capacity_range"},
		{"mutable parameters", create(func(r *csi.CreateVolumeRequest) {
			r.MutableParameters = map[string]string{"iopsLimit": "5"}
		}), codes.OK, ""},
		{"parameters too large", create(func(r *csi.CreateVolumeRequest) {
			r.Parameters["x"] = strings.Repeat("x", 4096)
		}), codes.InvalidArgument, "parameters has"},
		{"mount flags too large", create(func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0].GetMount().MountFlags = []string{strings.Repeat("x", 4000), strings.Repeat("y", 97)}
		}), codes.InvalidArgument, "mount_flags has"},
		{"foreign topology key", create(func(r *csi.CreateVolumeRequest) {
			r.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: topologies("other.example/rack", "r1")}
		}), codes.InvalidArgument, "topology key"},
		{"bad topology value", create(func(r *csi.CreateVolumeRequest) {
			r.AccessibilityRequirements = &csi.TopologyRequirement{Preferred: topologies(controller.TopologyZone, "-z")}
		}), codes.InvalidArgument, "bad value"},
		{"unknown parameter", create(func(r *csi.CreateVolumeRequest) {
			r.Parameters["replcias"] = "3"
		}), codes.InvalidArgument, "replcias"},
		{"same again", createOverOther(func(*csi.CreateVolumeRequest) {}), codes.OK, ""},
		{"same name, range that fits", createOverOther(func(r *csi.CreateVolumeRequest) {
			r.CapacityRange = &csi.CapacityRange{RequiredBytes: 1 << 20, LimitBytes: 1 << 30}
		}), codes.OK, ""},
		{"same name, larger", createOverOther(func(r *csi.CreateVolumeRequest) {
			r.CapacityRange.RequiredBytes = 1 << 30
		}), codes.AlreadyExists, ""},
		{"same name, other parameters", createOverOther(func(r *csi.CreateVolumeRequest) {
			r.Parameters["replicas"] = "5"
		}), codes.AlreadyExists, ""},
		{"same name, another claim", createOverOther(func(r *csi.CreateVolumeRequest) {
			r.Parameters["csi.storage.k8s.io/pvc/name"] = "data-0"
			r.Parameters["csi.storage.k8s.io/pvc/namespace"] = "default"
			r.Parameters["csi.storage.k8s.io/pv/name"] = "pvc-1"
		}), codes.OK, ""},
		{"no room", failing("CreateVolume", trivet.ErrNoSpace, callCreate), codes.ResourceExhausted, ""},
		{"no quorum", failing("CreateVolume", trivet.ErrUnavailable, callCreate), codes.Unavailable, ""},
		{"no leader", failing("CreateVolume", trivet.ErrNotLeader, callCreate), codes.Unavailable, ""},
		{"still creating", failing("CreateVolume", trivet.ErrPending, callCreate), codes.Aborted, ""},
		{"too late", failing("CreateVolume", context.DeadlineExceeded, callCreate), codes.DeadlineExceeded, ""},
	})
}

func TestDeleteVolumeCodes(t *testing.T) {
	t.Parallel()
	del := func(ctx context.Context, h *harness, handle string) error {
		_, err := h.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: handle})
		return err
	}
	of := func(handle string) func(context.Context, *testing.T, *harness) error {
		return func(ctx context.Context, _ *testing.T, h *harness) error { return del(ctx, h, handle) }
	}
	runRows(t, append(hostileRows(del),
		row{"no id", of(""), codes.InvalidArgument, "volume_id"},
		row{"unknown", of(unknown), codes.OK, ""},
		row{"foreign", of(foreign), codes.OK, ""},
		row{"the catalogue", of("meta"), codes.OK, ""},
		row{"no quorum", failing("DeleteVolume", trivet.ErrUnavailable, del), codes.Unavailable, ""},
		row{"attached", func(ctx context.Context, t *testing.T, h *harness) error {
			t.Helper()
			handle := h.mustCreate(t, "a")
			h.mustAttach(t, handle)
			return del(ctx, h, handle)
		}, codes.FailedPrecondition, string(thisNode)},
		row{"twice", func(ctx context.Context, t *testing.T, h *harness) error {
			t.Helper()
			handle := h.mustCreate(t, "a")
			require.NoError(t, del(ctx, h, handle))
			_, err := h.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: handle})
			requireCode(t, codes.NotFound, err)
			return del(ctx, h, handle)
		}, codes.OK, ""},
	))
}

// hostileRows calls with every hostile handle.
func hostileRows(call func(context.Context, *harness, string) error) []row {
	rows := make([]row, 0, len(hostile))
	for _, handle := range hostile {
		rows = append(rows, row{
			fmt.Sprintf("hostile handle %.20q", handle),
			func(ctx context.Context, _ *testing.T, h *harness) error { return call(ctx, h, handle) },
			codes.InvalidArgument, "volume_id",
		})
	}
	return rows
}

func TestControllerPublishCodes(t *testing.T) {
	t.Parallel()
	publish := func(change func(*csi.ControllerPublishVolumeRequest)) func(context.Context, *harness, string) error {
		return func(ctx context.Context, h *harness, handle string) error {
			req := publishReq(handle)
			change(req)
			_, err := h.ControllerPublishVolume(ctx, req)
			return err
		}
	}
	same := publish(func(*csi.ControllerPublishVolumeRequest) {})
	fresh := func(change func(*csi.ControllerPublishVolumeRequest)) func(context.Context, *testing.T, *harness) error {
		return func(ctx context.Context, t *testing.T, h *harness) error {
			t.Helper()
			return publish(change)(ctx, h, h.mustCreate(t, "a"))
		}
	}
	attached := func(change func(*csi.ControllerPublishVolumeRequest)) func(context.Context, *testing.T, *harness) error {
		return func(ctx context.Context, t *testing.T, h *harness) error {
			t.Helper()
			handle := h.mustCreate(t, "a")
			h.mustAttach(t, handle)
			return publish(change)(ctx, h, handle)
		}
	}
	type request = csi.ControllerPublishVolumeRequest
	runRows(t, append(hostileRows(same),
		row{"plain", fresh(func(*request) {}), codes.OK, ""},
		row{"no id", fresh(func(r *request) { r.VolumeId = "" }), codes.InvalidArgument, "volume_id"},
		row{"no node", fresh(func(r *request) { r.NodeId, r.VolumeId = "", foreign }), codes.InvalidArgument, "node_id"},
		row{"no capability", fresh(func(r *request) {
			r.VolumeCapability, r.VolumeId = nil, foreign
		}), codes.InvalidArgument, "volume_capability"},
		row{"many nodes", fresh(func(r *request) {
			r.VolumeCapability = mountCap(mnmw)
		}), codes.InvalidArgument, "MULTI_NODE"},
		row{"unknown volume", fresh(func(r *request) { r.VolumeId = unknown }), codes.NotFound, unknown},
		row{"foreign volume", fresh(func(r *request) { r.VolumeId = foreign }), codes.NotFound, foreign},
		row{"unknown node", fresh(func(r *request) { r.NodeId = "node-z" }), codes.NotFound, "node-z"},
		row{"impossible node", fresh(func(r *request) { r.NodeId = "Node_Z" }), codes.NotFound, "Node_Z"},
		row{"overlong node", fresh(func(r *request) {
			r.NodeId = strings.Repeat("n", 257)
		}), codes.InvalidArgument, "node_id"},
		row{"same again", attached(func(*request) {}), codes.OK, ""},
		row{"same node, read-only", attached(func(r *request) { r.Readonly = true }), codes.AlreadyExists, ""},
		row{"same node, other mode", attached(func(r *request) {
			r.VolumeCapability = mountCap(snsw)
		}), codes.AlreadyExists, ""},
		row{"other node", attached(func(r *request) {
			r.NodeId = string(otherNode)
		}), codes.FailedPrecondition, string(thisNode)},
		row{"no quorum", failing("Attach", trivet.ErrUnavailable, same), codes.Unavailable, ""},
		row{"still creating", failing("Attach", trivet.ErrPending, same), codes.Aborted, ""},
	))
}

func TestControllerUnpublishCodes(t *testing.T) {
	t.Parallel()
	unpublish := func(nodeID string) func(context.Context, *harness, string) error {
		return func(ctx context.Context, h *harness, handle string) error {
			_, err := h.ControllerUnpublishVolume(ctx,
				&csi.ControllerUnpublishVolumeRequest{VolumeId: handle, NodeId: nodeID})
			return err
		}
	}
	of := func(handle, nodeID string) func(context.Context, *testing.T, *harness) error {
		return func(ctx context.Context, _ *testing.T, h *harness) error { return unpublish(nodeID)(ctx, h, handle) }
	}
	here := unpublish(string(thisNode))
	runRows(t, append(hostileRows(here),
		row{"no id", of("", string(thisNode)), codes.InvalidArgument, "volume_id"},
		row{"unknown volume", of(unknown, string(thisNode)), codes.OK, ""},
		row{"foreign volume", of(foreign, string(thisNode)), codes.OK, ""},
		row{"not attached", existing(here), codes.OK, ""},
		row{"unknown node", existing(unpublish("node-z")), codes.OK, ""},
		row{"impossible node", existing(unpublish("Node_Z")), codes.OK, ""},
		row{"node of another attachment", func(ctx context.Context, t *testing.T, h *harness) error {
			t.Helper()
			handle := h.mustCreate(t, "a")
			h.mustAttach(t, handle)
			require.NoError(t, unpublish(string(otherNode))(ctx, h, handle))
			require.NotNil(t, h.attachment(t, handle), "the holder lost its attachment")
			return here(ctx, h, handle)
		}, codes.OK, ""},
		row{"no quorum", failing("Detach", trivet.ErrUnavailable, here), codes.Unavailable, ""},
	))
}

// attachment returns the attachment in the fake's catalogue.
func (h *harness) attachment(t *testing.T, handle string) *meta.Attachment {
	t.Helper()
	id, err := trivet.ParseVolumeID(handle)
	require.NoError(t, err)
	v, err := h.ctrl.Volume(t.Context(), id)
	require.NoError(t, err)
	return v.Attached
}

func TestLookupCodes(t *testing.T) {
	t.Parallel()
	get := func(ctx context.Context, h *harness, handle string) error {
		_, err := h.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: handle})
		return err
	}
	validate := func(ctx context.Context, h *harness, handle string) error {
		_, err := h.ValidateVolumeCapabilities(ctx, &csi.ValidateVolumeCapabilitiesRequest{
			VolumeId: handle, VolumeCapabilities: []*csi.VolumeCapability{mountCap(snmw)},
		})
		return err
	}
	for name, call := range map[string]func(context.Context, *harness, string) error{
		"ControllerGetVolume": get, "ValidateVolumeCapabilities": validate,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			of := func(handle string) func(context.Context, *testing.T, *harness) error {
				return func(ctx context.Context, _ *testing.T, h *harness) error { return call(ctx, h, handle) }
			}
			phase := func(p meta.Phase) func(context.Context, *testing.T, *harness) error {
				return func(ctx context.Context, _ *testing.T, h *harness) error {
					return call(ctx, h, h.ctrl.put(meta.Volume{Phase: p}).ID.String())
				}
			}
			runRows(t, append(hostileRows(call),
				row{"plain", existing(call), codes.OK, ""},
				row{"no id", of(""), codes.InvalidArgument, "volume_id"},
				row{"unknown", of(unknown), codes.NotFound, unknown},
				row{"foreign", of(foreign), codes.NotFound, foreign},
				row{"kept after deletion", phase(meta.PhaseReleased), codes.NotFound, "Released"},
				row{"being deleted", phase(meta.PhaseDeleting), codes.NotFound, "Deleting"},
				row{"failed", phase(meta.PhaseFailed), codes.OK, ""},
				row{"no quorum", failing("Volume", trivet.ErrUnavailable, call), codes.Unavailable, ""},
			))
		})
	}
}

func TestNodeStageCodes(t *testing.T) {
	t.Parallel()
	type request = csi.NodeStageVolumeRequest
	stage := func(change func(*request)) func(context.Context, *harness, string) error {
		return func(ctx context.Context, h *harness, handle string) error {
			req := h.stageReq(handle)
			change(req)
			_, err := h.NodeStageVolume(ctx, req)
			return err
		}
	}
	with := func(change func(*request)) func(context.Context, *testing.T, *harness) error {
		return existing(stage(change))
	}
	same := stage(func(*request) {})
	runRows(t, append(append(hostileRows(same), pathRows("staging_target_path", func(p string) func(
		context.Context, *testing.T, *harness) error {
		return with(func(r *request) { r.StagingTargetPath = p })
	})...),
		row{"plain", with(func(*request) {}), codes.OK, ""},
		row{"block", with(func(r *request) { r.VolumeCapability = blockCap(snmw) }), codes.OK, ""},
		row{"no id", with(func(r *request) { r.VolumeId = "" }), codes.InvalidArgument, "volume_id"},
		row{"no capability", with(func(r *request) {
			r.VolumeCapability, r.VolumeId = nil, foreign
		}), codes.InvalidArgument, "volume_capability"},
		row{"no access mode", with(func(r *request) {
			r.VolumeCapability.AccessMode = nil
		}), codes.InvalidArgument, "access_mode"},
		row{"many nodes", with(func(r *request) {
			r.VolumeCapability = mountCap(mnmw)
		}), codes.FailedPrecondition, "MULTI_NODE"},
		row{"unknown filesystem", with(func(r *request) {
			r.VolumeCapability.GetMount().FsType = "ntfs"
		}), codes.FailedPrecondition, "fs_type"},
		row{"bad publish context", with(func(r *request) {
			r.PublishContext["readOnly"] = "perhaps"
		}), codes.InvalidArgument, "publish_context"},
		row{"foreign volume", with(func(r *request) { r.VolumeId = foreign }), codes.NotFound, foreign},
		row{"unknown volume", failing("Stage", trivet.ErrNotFound, same), codes.NotFound, ""},
		row{"staged otherwise", failing("Stage", trivet.ErrExists, same), codes.AlreadyExists, ""},
		row{"held by another node", failing("Stage", trivet.ErrInUse, same), codes.FailedPrecondition, ""},
		row{"fenced", failing("Stage", trivet.ErrFenced, same), codes.FailedPrecondition, ""},
		row{"option not allowed", failing("Stage", node.ErrUnsupported, same), codes.FailedPrecondition, ""},
		row{"no quorum", failing("Stage", trivet.ErrUnavailable, same), codes.Unavailable, ""},
		row{"damaged", failing("Stage", trivet.ErrCorrupt, same), codes.DataLoss, ""},
	))
}

// pathRows are the refusals of a path by form.
func pathRows(field string, with func(string) func(context.Context, *testing.T, *harness) error) []row {
	paths := []string{
		"", "relative/path", "/", "//", "/a/../../etc", "/a/..", "/nul\x00", "/" + strings.Repeat("p", 4096),
	}
	rows := make([]row, 0, len(paths))
	for _, p := range paths {
		rows = append(rows, row{fmt.Sprintf("path %.20q", p), with(p), codes.InvalidArgument, field})
	}
	return rows
}

func TestNodePublishCodes(t *testing.T) {
	t.Parallel()
	type request = csi.NodePublishVolumeRequest
	publish := func(change func(*request)) func(context.Context, *harness, string) error {
		return func(ctx context.Context, h *harness, handle string) error {
			req := h.nodePublishReq(handle, "target")
			change(req)
			_, err := h.NodePublishVolume(ctx, req)
			return err
		}
	}
	with := func(change func(*request)) func(context.Context, *testing.T, *harness) error {
		return func(ctx context.Context, t *testing.T, h *harness) error {
			t.Helper()
			handle := h.mustCreate(t, "a")
			_, err := h.NodeStageVolume(ctx, h.stageReq(handle))
			require.NoError(t, err)
			return publish(change)(ctx, h, handle)
		}
	}
	same := publish(func(*request) {})
	runRows(t, append(append(hostileRows(same), pathRows("target_path", func(p string) func(
		context.Context, *testing.T, *harness) error {
		return with(func(r *request) { r.TargetPath = p })
	})...),
		row{"plain", with(func(*request) {}), codes.OK, ""},
		row{"no id", with(func(r *request) { r.VolumeId = "" }), codes.InvalidArgument, "volume_id"},
		row{"no capability", with(func(r *request) { r.VolumeCapability = nil }), codes.InvalidArgument, "capability"},
		row{"no staging path", with(func(r *request) {
			r.StagingTargetPath = ""
		}), codes.FailedPrecondition, "staging_target_path"},
		row{"bad staging path", with(func(r *request) {
			r.StagingTargetPath = "a/b"
		}), codes.InvalidArgument, "staging_target_path"},
		row{"many nodes", with(func(r *request) {
			r.VolumeCapability = mountCap(mnmw)
		}), codes.FailedPrecondition, "MULTI_NODE"},
		row{"not staged", existing(same), codes.FailedPrecondition, "not staged"},
		row{"published otherwise", failing("Publish", trivet.ErrExists, same), codes.AlreadyExists, ""},
		row{"other target of a single writer", failing("Publish", trivet.ErrInUse, same), codes.FailedPrecondition, ""},
		row{"foreign volume", with(func(r *request) { r.VolumeId = foreign }), codes.NotFound, foreign},
	))
}

func TestNodeUndoCodes(t *testing.T) {
	t.Parallel()
	type call = func(ctx context.Context, h *harness, handle, path string) error
	for name, c := range map[string]struct {
		call   call
		method string
		field  string
	}{
		"NodeUnstageVolume": {func(ctx context.Context, h *harness, handle, path string) error {
			_, err := h.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: handle, StagingTargetPath: path})
			return err
		}, "Unstage", "staging_target_path"},
		"NodeUnpublishVolume": {func(ctx context.Context, h *harness, handle, path string) error {
			_, err := h.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: handle, TargetPath: path})
			return err
		}, "Unpublish", "target_path"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			at := func(path string) func(context.Context, *harness, string) error {
				return func(ctx context.Context, h *harness, handle string) error { return c.call(ctx, h, handle, path) }
			}
			of := func(handle string) func(context.Context, *testing.T, *harness) error {
				return func(ctx context.Context, _ *testing.T, h *harness) error { return c.call(ctx, h, handle, "/a") }
			}
			runRows(t, append(append(hostileRows(at("/a")), pathRows(c.field, func(p string) func(
				context.Context, *testing.T, *harness) error {
				return existing(at(p))
			})...),
				row{"no id", of(""), codes.InvalidArgument, "volume_id"},
				row{"nothing there", of(unknown), codes.OK, ""},
				row{"foreign", of(foreign), codes.OK, ""},
				row{"unknown to the node", failing(c.method, trivet.ErrNotFound, at("/a")), codes.OK, ""},
				row{"in use", failing(c.method, trivet.ErrInUse, at("/a")), codes.FailedPrecondition, ""},
				row{"no quorum", failing(c.method, trivet.ErrUnavailable, at("/a")), codes.Unavailable, ""},
			))
		})
	}
}

func TestNodeStatsCodes(t *testing.T) {
	t.Parallel()
	at := func(path string) func(context.Context, *harness, string) error {
		return func(ctx context.Context, h *harness, handle string) error {
			_, err := h.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: handle, VolumePath: path})
			return err
		}
	}
	of := func(handle, path string) func(context.Context, *testing.T, *harness) error {
		return func(ctx context.Context, _ *testing.T, h *harness) error { return at(path)(ctx, h, handle) }
	}
	runRows(t, append(hostileRows(at("/a")),
		row{"no id", of("", "/a"), codes.InvalidArgument, "volume_id"},
		row{"no path", of(unknown, ""), codes.InvalidArgument, "volume_path"},
		row{"unknown volume", of(unknown, "/a"), codes.NotFound, ""},
		row{"foreign volume", of(foreign, "some/path"), codes.NotFound, ""},
		row{"not at that path", existing(at("some/path")), codes.NotFound, ""},
		row{"no answer", failing("Stats", trivet.ErrUnavailable, at("/a")), codes.Unavailable, ""},
	))
}
