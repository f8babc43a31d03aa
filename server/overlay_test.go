package server_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// syncTo writes a file and syncs it.
func syncTo(t *testing.T, path string, p []byte) {
	t.Helper()
	f, err := os.Create(path)
	require.NoError(t, err)
	_, err = f.Write(p)
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	require.NoError(t, f.Close())
}

// direct reads all of a block device past the page cache.
func direct(t *testing.T, device string) [32]byte {
	t.Helper()
	f, err := os.OpenFile(device, os.O_RDONLY|unix.O_DIRECT, 0)
	require.NoError(t, err)
	defer f.Close()
	p, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	require.NoError(t, err)
	defer func() { require.NoError(t, unix.Munmap(p)) }()
	h := sha256.New()
	for {
		n, err := f.Read(p)
		h.Write(p[:n])
		if errors.Is(err, io.EOF) {
			return [32]byte(h.Sum(nil))
		}
		require.NoError(t, err)
	}
}

// metrics returns what the server of the node tells Prometheus.
func (f *kept) metrics() string {
	f.t.Helper()
	var body []byte
	f.eventually("metrics", func(ctx context.Context) error {
		at := "http://" + f.process.cfg.MetricsAddr + "/metrics"
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, at, http.NoBody)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err = io.ReadAll(resp.Body)
		return err
	})
	return string(body)
}

// readerOf makes a volume of a snapshot of the one that is in use, for pods that read it, and gives it to one.
func (f *kept) readerOf(fsType, source string) {
	f.t.Helper()
	ctrl, node := csi.NewControllerClient(f.csi), csi.NewNodeClient(f.csi)
	capability := capabilityOf(fsType)
	capability.AccessMode.Mode = csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
	content := &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: source},
	}}
	f.eventually("restore, attach and mount to read", func(ctx context.Context) error {
		created, err := ctrl.CreateVolume(ctx, &csi.CreateVolumeRequest{
			Name: "reader-" + fsType, VolumeCapabilities: []*csi.VolumeCapability{capability}, VolumeContentSource: content,
		})
		if err != nil {
			return err
		}
		f.id = created.GetVolume().GetVolumeId()
		published, err := ctrl.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{
			VolumeId: f.id, NodeId: string(f.process.cfg.Node), VolumeCapability: capability, Readonly: true,
		})
		if err != nil {
			return err
		}
		_, err = node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
			VolumeId: f.id, PublishContext: published.GetPublishContext(), StagingTargetPath: f.staging,
			VolumeCapability: capability,
		})
		if err != nil {
			return err
		}
		_, err = node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
			VolumeId: f.id, PublishContext: published.GetPublishContext(), StagingTargetPath: f.staging, TargetPath: f.target,
			VolumeCapability: capability, Readonly: true,
		})
		return err
	})
}

// TestReaderSurvivesItsServer: a snapshot that is taken while its source is mounted holds a dirty journal. Who reads
// what was restored from it sees all that was synced, before its server is killed and after, and when the next one
// has ended in good order.
func TestReaderSurvivesItsServer(t *testing.T) {
	f := newKept(t)
	for _, fs := range []struct {
		name      string
		sizeBytes int64
	}{{"ext4", 128 << 20}, {"xfs", 320 << 20}} {
		if _, err := exec.LookPath("mkfs." + fs.name); err != nil {
			t.Skip("needs mkfs.", fs.name)
		}
		first, second := bytes.Repeat([]byte("first "), 50_000), bytes.Repeat([]byte("second"), 50_000)
		f.up(fs.name, fs.sizeBytes)
		syncTo(t, filepath.Join(f.target, "first"), first)
		syncTo(t, filepath.Join(f.target, "second"), second)
		var snapshot string
		f.eventually("snapshot while mounted", func(ctx context.Context) error {
			s, err := csi.NewControllerClient(f.csi).CreateSnapshot(ctx, &csi.CreateSnapshotRequest{
				SourceVolumeId: f.id, Name: "of-" + fs.name,
			})
			snapshot = s.GetSnapshot().GetSnapshotId()
			if err == nil && !s.GetSnapshot().GetReadyToUse() {
				err = errors.New("not ready yet")
			}
			return err
		})
		f.down()

		f.readerOf(fs.name, snapshot)
		overlays := filepath.Join(f.process.cfg.CacheDir, "*", string(f.process.cfg.Node), f.id+".overlay")
		requireOne(t, overlays)
		require.Contains(t, f.metrics(), `trivet_overlay_bytes{volume="reader-`+fs.name+`"} `)
		requireFile(t, filepath.Join(f.target, "first"), first)
		device := "/dev/" + f.device()
		before := direct(t, device)
		for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
			f.process.end(t, sig)
			f.start(f.process)
			f.eventually("the device goes on", func(context.Context) error { // waits in the kernel until then
				_, err := os.Stat(f.target)
				return err
			})
			require.Equal(t, before, direct(t, device), "the device shows something else after %s", sig)
			requireFile(t, filepath.Join(f.target, "first"), first)
			requireFile(t, filepath.Join(f.target, "second"), second)
			require.ErrorIs(t, os.WriteFile(filepath.Join(f.target, "new"), nil, 0o600), unix.EROFS)
			requireOne(t, overlays)
		}
		f.down()
		left, err := filepath.Glob(overlays)
		require.NoError(t, err)
		require.Empty(t, left, "unstaged, and its overlay is still there")
	}
}

func requireOne(t *testing.T, pattern string) {
	t.Helper()
	found, err := filepath.Glob(pattern)
	require.NoError(t, err)
	require.Len(t, found, 1, pattern)
}

func requireFile(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got), "%s: %d bytes, not those that were synced", path, len(got))
}
