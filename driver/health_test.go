package driver_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// The conditions of these tests, and what CSI calls them.
var (
	degraded = trivet.Condition{Status: trivet.HealthDegraded, Reason: "NodeDown", Message: "node b is down"}
	cutOff   = trivet.Condition{Status: trivet.HealthInaccessible, Reason: "NoQuorum", Message: "1 of 3"}
	lost     = trivet.Condition{Status: trivet.HealthDataLoss, Reason: "NoGoodCopy", Message: "none"}
)

// told writes conditions in short, as they were answered.
func told(h *csi.VolumeHealth) []string {
	var out []string
	for _, e := range h.GetHealthStatuses() {
		out = append(out, fmt.Sprintf("%s %s: %s", e.GetStatus(), e.GetReason(), e.GetMessage()))
	}
	return out
}

func volumeID(t *testing.T, handle string) trivet.VolumeID {
	t.Helper()
	id, err := trivet.ParseVolumeID(handle)
	require.NoError(t, err)
	return id
}

func TestVolumeHealthCodes(t *testing.T) {
	t.Parallel()
	controllerHealth := func(ctx context.Context, h *harness, handle string) error {
		_, err := h.ControllerGetVolumeHealth(ctx, &csi.ControllerGetVolumeHealthRequest{VolumeId: handle})
		return err
	}
	nodeHealth := func(ctx context.Context, h *harness, handle string) error {
		_, err := h.NodeGetVolumeHealth(ctx, &csi.NodeGetVolumeHealthRequest{VolumeId: handle})
		return err
	}
	list := func(n int32, token string) func(context.Context, *harness, string) error {
		return func(ctx context.Context, h *harness, _ string) error {
			_, err := h.ControllerListVolumeHealth(ctx, &csi.ControllerListVolumeHealthRequest{
				MaxEntries: n, StartingToken: token,
			})
			return err
		}
	}
	for name, get := range map[string]func(context.Context, *harness, string) error{
		"controller": controllerHealth, "node": nodeHealth,
	} {
		of := func(handle string) func(context.Context, *testing.T, *harness) error {
			return func(ctx context.Context, _ *testing.T, h *harness) error { return get(ctx, h, handle) }
		}
		in := func(p meta.Phase) func(context.Context, *testing.T, *harness) error {
			return func(ctx context.Context, _ *testing.T, h *harness) error {
				v := meta.Volume{Phase: p}
				if p == meta.PhaseRestoring {
					v.Rollback = &meta.Rollback{Before: meta.PhaseBound}
				}
				return get(ctx, h, h.ctrl.put(v).ID.String())
			}
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			runRows(t, append(hostileRows(get),
				row{"plain", existing(get), codes.OK, ""},
				row{"no id", of(""), codes.InvalidArgument, "volume_id"},
				row{"unknown", of(unknown), codes.NotFound, unknown},
				row{"foreign", of(foreign), codes.NotFound, foreign},
				row{"kept for its snapshots", in(meta.PhaseKept), codes.NotFound, "Kept"},
				row{"released", in(meta.PhaseReleased), codes.NotFound, "Released"},
				row{"being restored", in(meta.PhaseRestoring), codes.OK, ""},
				row{"failed", in(meta.PhaseFailed), codes.OK, ""},
				row{"no quorum", failing("VolumeHealth", trivet.ErrUnavailable, get), codes.Unavailable, ""},
				row{"no leader", failing("VolumeHealth", trivet.ErrNotLeader, get), codes.Unavailable, ""},
			))
		})
	}
	runRows(t, []row{
		{"list", existing(list(0, "")), codes.OK, ""},
		{"negative", existing(list(-1, "")), codes.InvalidArgument, "max_entries"},
		{"token that was never given out", existing(list(0, "invalid-token")), codes.Aborted, "token"},
		{"overlong token", existing(list(0, strings.Repeat("t", 200))), codes.Aborted, "token"},
		{"no quorum to list", failing("Unhealthy", trivet.ErrUnavailable, list(0, "")), codes.Unavailable, ""},
	})
}

// TestVolumeHealth: all of it is told, and a volume that is well is told with nothing.
func TestVolumeHealth(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	handle := h.mustCreate(t, "a")
	get := func() *csi.VolumeHealth {
		resp, err := h.ControllerGetVolumeHealth(t.Context(), &csi.ControllerGetVolumeHealthRequest{VolumeId: handle})
		require.NoError(t, err)
		require.Equal(t, handle, resp.GetVolumeHealth().GetVolumeId())
		return resp.GetVolumeHealth()
	}
	require.Empty(t, told(get()))
	h.ctrl.fallIll(volumeID(t, handle), degraded, cutOff, lost)
	require.Equal(t, []string{
		"DEGRADED NodeDown: node b is down", "INACCESSIBLE NoQuorum: 1 of 3", "DATA_LOSS NoGoodCopy: none",
	}, told(get()))
	long := degraded
	long.Message = strings.Repeat("ü", 1000)
	h.ctrl.fallIll(volumeID(t, handle), long)
	got := get().GetHealthStatuses()[0].GetMessage()
	require.LessOrEqual(t, len(got), 1024)
	require.True(t, utf8.ValidString(got))
	require.True(t, strings.HasSuffix(got, "…"))
}

// TestListVolumeHealth: those that are ill, and of them those that the orchestrator knows, page by page.
func TestListVolumeHealth(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	h.mustCreate(t, "well")
	want := map[string]bool{}
	for _, name := range []string{"a", "b", "c"} {
		handle := h.mustCreate(t, name)
		h.ctrl.fallIll(volumeID(t, handle), degraded)
		want[handle] = true
	}
	kept := h.ctrl.put(meta.Volume{Phase: meta.PhaseKept})
	h.ctrl.fallIll(kept.ID, degraded)
	req, got, pages := &csi.ControllerListVolumeHealthRequest{MaxEntries: 2}, map[string]bool{}, 0
	for {
		resp, err := h.ControllerListVolumeHealth(t.Context(), req)
		require.NoError(t, err)
		require.LessOrEqual(t, len(resp.GetEntries()), 2)
		for _, e := range resp.GetEntries() {
			got[e.GetVolumeId()] = true
			require.NotEmpty(t, e.GetHealthStatuses())
		}
		if pages++; resp.GetNextToken() == "" {
			break
		}
		req.StartingToken = resp.GetNextToken()
	}
	require.Equal(t, want, got)
	require.Equal(t, 2, pages)
}

// TestNodeVolumeHealth: what the node knows by itself and what the catalogue knows are one list, in which each status
// and reason is once; and the node tells what it knows while the catalogue does not answer.
func TestNodeVolumeHealth(t *testing.T) {
	t.Parallel()
	fenced := trivet.Condition{Status: trivet.HealthInaccessible, Reason: "Fenced", Message: "by epoch 3"}
	h := open(t, nil)
	handle := h.mustCreate(t, "a")
	id := volumeID(t, handle)
	get := func() ([]string, error) {
		resp, err := h.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: handle})
		return told(resp.GetVolumeHealth()), err
	}
	got, err := get()
	require.NoError(t, err)
	require.Empty(t, got)

	h.ctrl.fallIll(id, degraded, trivet.Condition{Status: fenced.Status, Reason: fenced.Reason, Message: "too"})
	h.node.fallIll(id, fenced)
	got, err = get()
	require.NoError(t, err)
	require.Equal(t, []string{"INACCESSIBLE Fenced: by epoch 3; too", "DEGRADED NodeDown: node b is down"}, got)

	h.ctrl.fail("VolumeHealth", trivet.ErrUnavailable)
	got, err = get()
	require.NoError(t, err)
	require.Equal(t, []string{"INACCESSIBLE Fenced: by epoch 3"}, got)
	h.node.fallIll(id)
	_, err = get()
	requireCode(t, codes.Unavailable, err)

	// Deleted under its user: what is here is told.
	h.ctrl.fail("VolumeHealth", trivet.ErrNotFound)
	h.node.fallIll(id, fenced)
	got, err = get()
	require.NoError(t, err)
	require.Equal(t, []string{"INACCESSIBLE Fenced: by epoch 3"}, got)
}

func TestNodeStorageHealth(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	get := func() []string {
		resp, err := h.NodeGetStorageHealth(t.Context(), &csi.NodeGetStorageHealthRequest{})
		require.NoError(t, err)
		var out []string
		for _, b := range resp.GetBackendHealth() {
			out = append(out, fmt.Sprintf("%s %s: %s", b.GetStatus(), b.GetReason(), b.GetMessage()))
		}
		return out
	}
	require.Empty(t, get())
	h.node.failStorage(
		trivet.Condition{Status: trivet.HealthInaccessible, Reason: "CutOff", Message: "no majority"},
		trivet.Condition{Status: trivet.HealthDegraded, Reason: "DiskFull", Message: "disk /d"},
	)
	require.Equal(t, []string{"STORAGE_UNREACHABLE CutOff: no majority", "STORAGE_DEGRADED DiskFull: disk /d"}, get())
}
