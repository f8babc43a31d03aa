package driver

import (
	"errors"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/trivet-csi/trivet"
)

// FuzzRequest feeds what a client may send to everything that looks at a request before the
// controller or the node does. A request is accepted within its limits or refused with a sentinel.
func FuzzRequest(f *testing.F) {
	seed := &csi.CreateVolumeRequest{
		Name:          "pvc-1",
		CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 20},
		VolumeCapabilities: []*csi.VolumeCapability{{
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{
				FsType: "ext4", MountFlags: []string{"noatime", "commit=5000"},
			}},
		}},
		Parameters: map[string]string{"replicas": "3"},
		Secrets:    map[string]string{"key": "hunter22"},
		AccessibilityRequirements: &csi.TopologyRequirement{
			Preferred: []*csi.Topology{{Segments: map[string]string{"topology.csi.trivet.dev/zone": "z"}}},
		},
	}
	wire, err := proto.Marshal(seed)
	require.NoError(f, err)
	f.Add(wire, "/var/lib/kubelet/x", "vol-0123456789abcdef")
	f.Add([]byte{}, "../x", "")
	seed.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: "snap-0123456789abcdef"},
	}}
	wire, err = proto.Marshal(seed)
	require.NoError(f, err)
	f.Add(wire, "/x", "snap-0123456789abcdef")
	f.Fuzz(func(t *testing.T, wire []byte, path, handle string) {
		if clean, err := checkPath("p", path); err == nil {
			require.True(t, strings.HasPrefix(clean, "/") && clean != "/" && !strings.Contains(clean, "/../"), clean)
		} else {
			require.ErrorIs(t, err, trivet.ErrInvalid)
		}
		if id, err := parseVolume(handle); err == nil {
			require.Equal(t, handle, id.String())
			require.NoError(t, checkVolumeID(handle))
		}
		if id, err := parseSnapshot(handle); err == nil {
			require.Equal(t, handle, id.String())
			require.NoError(t, checkHandle("snapshot_id", handle))
		}
		req := &csi.CreateVolumeRequest{}
		if proto.Unmarshal(wire, req) != nil {
			return
		}
		before := proto.Clone(req)
		logged := loggable{req}.LogValue().String()
		for _, secret := range req.GetSecrets() {
			if len(secret) >= 16 { // long enough not to stand there by chance
				require.NotContains(t, scrub(secret, req), secret)
				plain := proto.Clone(req).(*csi.CreateVolumeRequest)
				plain.Secrets = nil
				if !strings.Contains((loggable{plain}).LogValue().String(), secret) {
					require.NotContains(t, logged, secret)
				}
			}
		}
		require.True(t, proto.Equal(before, req), "logging must not change the request")
		if err := checkLimits(req); err != nil {
			require.ErrorIs(t, err, trivet.ErrInvalid)
			return
		}
		r, err := createRequest(req)
		if err != nil {
			require.True(t, errors.Is(err, trivet.ErrInvalid) || errors.Is(err, trivet.ErrOutOfRange) ||
				errors.Is(err, trivet.ErrNotFound) && req.GetVolumeContentSource() != nil, err)
			return
		}
		require.NoError(t, trivet.ValidateName(r.Name))
		require.False(t, r.RequiredBytes < 0 || r.LimitBytes > 0 && r.RequiredBytes > r.LimitBytes)
	})
}
