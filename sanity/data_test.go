package sanity

import (
	"bytes"
	"cmp"
	"context"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet/internal/csicall"
)

// plugin is the driver of one node as kubelet and the sidecars use it.
type plugin struct {
	csi.ControllerClient
	csi.NodeClient

	t    *testing.T
	conn *grpc.ClientConn
	dir  string
	node string
}

func openPlugin(t *testing.T) *plugin {
	t.Helper()
	requireMachine(t)
	endpoint := startCluster(t)
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithUnaryInterceptor(csicall.Again))
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, conn.Close()) })
	p := &plugin{
		ControllerClient: csi.NewControllerClient(conn), NodeClient: csi.NewNodeClient(conn), t: t, conn: conn,
		dir: t.TempDir(),
	}
	failOnLeftMounts(t, p.dir)
	info, err := p.NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
	require.NoError(t, err)
	p.node = info.GetNodeId()
	return p
}

// capability of a filesystem, or of a block volume when fsType is empty.
func capability(fsType string) *csi.VolumeCapability {
	c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{
		Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER,
	}}
	if fsType == "" {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	} else {
		c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fsType}}
	}
	return c
}

// create makes a volume, of a source or of nothing, and returns its handle.
func (p *plugin) create(name, fsType string, sizeBytes int64, source *csi.VolumeContentSource) string {
	p.t.Helper()
	resp, err := p.CreateVolume(p.t.Context(), &csi.CreateVolumeRequest{
		Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: sizeBytes},
		VolumeCapabilities: []*csi.VolumeCapability{capability(fsType)}, VolumeContentSource: source,
	})
	require.NoError(p.t, err)
	return resp.GetVolume().GetVolumeId()
}

// snapshot makes one, and returns its handle.
func (p *plugin) snapshot(name, volume string) string {
	p.t.Helper()
	resp, err := p.CreateSnapshot(p.t.Context(), &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: volume})
	require.NoError(p.t, err)
	require.True(p.t, resp.GetSnapshot().GetReadyToUse())
	return resp.GetSnapshot().GetSnapshotId()
}

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

// use attaches, stages and publishes a volume, and returns where a pod would find it and what undoes all that.
func (p *plugin) use(volume, fsType string) (target string, undo func()) {
	p.t.Helper()
	ctx := p.t.Context()
	staging := filepath.Join(p.dir, "staging-"+volume)
	target = filepath.Join(p.dir, "target-"+volume)
	require.NoError(p.t, os.Mkdir(staging, 0o700))
	attached, err := p.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{
		VolumeId: volume, NodeId: p.node, VolumeCapability: capability(fsType),
	})
	require.NoError(p.t, err)
	_, err = p.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
		VolumeId: volume, StagingTargetPath: staging, VolumeCapability: capability(fsType),
		PublishContext: attached.GetPublishContext(),
	})
	require.NoError(p.t, err)
	_, err = p.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId: volume, StagingTargetPath: staging, TargetPath: target, VolumeCapability: capability(fsType),
		PublishContext: attached.GetPublishContext(),
	})
	require.NoError(p.t, err)
	return target, func() {
		p.t.Helper()
		ctx := context.WithoutCancel(ctx)
		_, err := p.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: volume, TargetPath: target})
		assert.NoError(p.t, err)
		_, err = p.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: volume, StagingTargetPath: staging})
		assert.NoError(p.t, err)
		_, err = p.ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: volume, NodeId: p.node})
		assert.NoError(p.t, err)
		assert.NoError(p.t, os.Remove(staging))
	}
}

// expand makes a volume in use larger, as resizer and kubelet do it.
func (p *plugin) expand(volume, path, fsType string, sizeBytes int64) {
	p.t.Helper()
	ctx := p.t.Context()
	resp, err := p.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{
		VolumeId: volume, CapacityRange: &csi.CapacityRange{RequiredBytes: sizeBytes}, VolumeCapability: capability(fsType),
	})
	require.NoError(p.t, err)
	require.Equal(p.t, sizeBytes, resp.GetCapacityBytes())
	require.True(p.t, resp.GetNodeExpansionRequired(), "it is attached")
	node, err := p.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{
		VolumeId: volume, VolumePath: path, CapacityRange: &csi.CapacityRange{RequiredBytes: sizeBytes},
		StagingTargetPath: filepath.Join(p.dir, "staging-"+volume), VolumeCapability: capability(fsType),
	})
	require.NoError(p.t, err)
	require.Equal(p.t, sizeBytes, node.GetCapacityBytes())
}

// noise returns n bytes that a seed decides.
func noise(seed uint64, n int) []byte {
	out := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed)})
	_, _ = r.Read(out) // never fails
	return out
}

// hasSysResource reports whether this process, in which the servers run, may grow an ext4 in use.
func hasSysResource(t *testing.T) bool {
	t.Helper()
	const capSysResource = 24 // capability.h
	status, err := os.ReadFile("/proc/self/status")
	require.NoError(t, err)
	_, rest, ok := strings.Cut(string(status), "CapEff:")
	require.True(t, ok)
	effective, err := strconv.ParseUint(strings.Fields(rest)[0], 16, 64)
	require.NoError(t, err)
	return effective&(1<<capSysResource) != 0
}

// write writes data at the beginning of a file, or of a device, and syncs it.
func write(t *testing.T, path string, data []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	require.NoError(t, err)
	_, err = f.WriteAt(data, 0)
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	require.NoError(t, f.Close())
}

// requireFile compares the first bytes of a file, or of a device.
func requireFile(t *testing.T, path string, want []byte) {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	got := make([]byte, len(want))
	_, err = io.ReadFull(f, got)
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got), "%s shows other bytes", path)
}

// sizeOf returns the bytes of the filesystem at a path, or of the block device.
func sizeOf(t *testing.T, path, fsType string) int64 {
	t.Helper()
	if fsType == "" {
		f, err := os.Open(path)
		require.NoError(t, err)
		defer f.Close()
		end, err := f.Seek(0, io.SeekEnd)
		require.NoError(t, err)
		return end
	}
	var st syscall.Statfs_t
	require.NoError(t, syscall.Statfs(path, &st))
	return int64(st.Blocks) * st.Bsize
}

// TestDataOfCopies: what csi-sanity does not look at. A snapshot of a volume in use shows the bytes of its moment,
// after its volume is gone too; copies show them and are independent, one may be larger; volumes grow in use; a copy of
// an xfs is mounted beside its source.
func TestDataOfCopies(t *testing.T) {
	if testing.Short() {
		t.Skip("formats and mounts for some seconds; not with -short")
	}
	p := openPlugin(t)
	t.Run("kinds", func(t *testing.T) {
		t.Run("ext4", func(t *testing.T) { p.copies(t, "ext4", volumeBytes) })
		t.Run("xfs", func(t *testing.T) {
			for _, tool := range []string{"mkfs.xfs", "xfs_growfs"} {
				if _, err := exec.LookPath(tool); err != nil {
					t.Skipf("needs %s: %v", tool, err)
				}
			}
			p.copies(t, "xfs", 300<<20)
		})
		t.Run("block", func(t *testing.T) { p.copies(t, "", volumeBytes) })
	})
	p.requireNothing(t)
}

// copies is the life of one volume and its copies.
func (p *plugin) copies(t *testing.T, fsType string, size int64) {
	t.Helper()
	t.Parallel()
	all := *p
	p = &all
	p.t = t
	kind, larger := cmp.Or(fsType, "block")+"-", 2*size
	if fsType == "ext4" && !hasSysResource(t) {
		t.Log("ext4 grows only for a process with CAP_SYS_RESOURCE, which this one has not: sizes stay as they are")
		larger = size
	}
	before, after, later := noise(1, 1<<20), noise(2, 1<<20), noise(3, 1<<20)
	file := func(target string) string {
		if fsType == "" {
			return target
		}
		return filepath.Join(target, "data")
	}
	source := p.create(kind+"source", fsType, size, nil)
	target, undo := p.use(source, fsType)
	write(t, file(target), before)
	snap := p.snapshot(kind+"snap", source) // of a volume in use
	write(t, file(target), after)
	clone := p.create(kind+"clone", fsType, size, ofVolume(source))
	write(t, file(target), later)
	restored := p.create(kind+"restored", fsType, larger, ofSnapshot(snap))

	// Both beside their source, in use with it, on one node.
	restoredAt, undoRestored := p.use(restored, fsType)
	cloneAt, undoClone := p.use(clone, fsType)
	requireFile(t, file(restoredAt), before)
	requireFile(t, file(cloneAt), after)
	requireFile(t, file(target), later)
	if larger > size {
		assert.Greater(t, sizeOf(t, restoredAt, fsType), sizeOf(t, cloneAt, fsType)*3/2, "it fills the larger volume")
	}
	write(t, file(restoredAt), noise(4, 1<<20)) // which nobody else may see
	requireFile(t, file(cloneAt), after)

	small := sizeOf(t, target, fsType)
	p.expand(source, target, fsType, larger)
	requireFile(t, file(target), later)
	if larger > size {
		assert.Greater(t, sizeOf(t, target, fsType), small*3/2, "grown while it is in use")
	}
	undo()
	undoRestored()
	undoClone()

	// The snapshot outlives its volume, and what it shows.
	for _, handle := range []string{source, restored, clone} {
		_, err := p.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: handle})
		require.NoError(t, err)
	}
	_, err := p.CreateVolume(t.Context(), &csi.CreateVolumeRequest{
		Name: kind + "of-a-deleted", VolumeCapabilities: []*csi.VolumeCapability{capability(fsType)},
		VolumeContentSource: ofVolume(source),
	})
	require.Equal(t, codes.NotFound, status.Code(err), "%v", err)
	last := p.create(kind+"last", fsType, size, ofSnapshot(snap))
	lastAt, undoLast := p.use(last, fsType)
	requireFile(t, file(lastAt), before)
	undoLast()
	_, err = p.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: last})
	require.NoError(t, err)
	_, err = p.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: snap})
	require.NoError(t, err)
}

// requireNothing stops the test unless all is deleted that CSI knows of.
func (p *plugin) requireNothing(t *testing.T) {
	t.Helper()
	list, err := p.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{})
	require.NoError(t, err)
	require.Empty(t, list.GetEntries())
	volumes, err := p.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	require.NoError(t, err)
	require.Empty(t, volumes.GetEntries())
}
