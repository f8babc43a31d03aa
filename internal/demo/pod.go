package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

func capability() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: "ext4"}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER},
	}
}

func (d *demo) staging(s *server) string { return filepath.Join(d.dir, s.name, "staging") }

// publish does what Kubernetes does to bring the volume to a pod on s.
func (d *demo) publish(ctx context.Context, s *server) error {
	for _, dir := range []string{d.staging(s), filepath.Dir(d.target())} {
		if err := os.MkdirAll(dir, 0o750); err != nil {
			return err
		}
	}
	id := d.volume.GetVolumeId()
	attached, err := csi.NewControllerClient(s.conn).ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{
		VolumeId: id, NodeId: s.name, VolumeCapability: capability(), VolumeContext: d.volume.GetVolumeContext(),
	})
	if err != nil {
		return fmt.Errorf("ControllerPublishVolume on %s: %w", s.name, err)
	}
	node := csi.NewNodeClient(s.conn)
	_, err = node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
		VolumeId: id, PublishContext: attached.GetPublishContext(), StagingTargetPath: d.staging(s),
		VolumeCapability: capability(), VolumeContext: d.volume.GetVolumeContext(),
	})
	if err != nil {
		return fmt.Errorf("NodeStageVolume on %s: %w", s.name, err)
	}
	_, err = node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId: id, PublishContext: attached.GetPublishContext(), StagingTargetPath: d.staging(s),
		TargetPath: d.target(), VolumeCapability: capability(), VolumeContext: d.volume.GetVolumeContext(),
	})
	if err != nil {
		return fmt.Errorf("NodePublishVolume on %s: %w", s.name, err)
	}
	return nil
}

// unpublish is the reverse of publish.
func (d *demo) unpublish(ctx context.Context, s *server) error {
	id := d.volume.GetVolumeId()
	node := csi.NewNodeClient(s.conn)
	_, err := node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: d.target()})
	if err != nil {
		return fmt.Errorf("NodeUnpublishVolume on %s: %w", s.name, err)
	}
	_, err = node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: d.staging(s)})
	if err != nil {
		return fmt.Errorf("NodeUnstageVolume on %s: %w", s.name, err)
	}
	_, err = csi.NewControllerClient(s.conn).ControllerUnpublishVolume(ctx,
		&csi.ControllerUnpublishVolumeRequest{VolumeId: id, NodeId: s.name})
	if err != nil {
		return fmt.Errorf("ControllerUnpublishVolume of %s: %w", s.name, err)
	}
	return nil
}

// writeFile writes n random bytes to a file of the pod, a MiB at a time with an fsync after each,
// and calls after with the count flushed so far. It returns the longest write or fsync.
func (d *demo) writeFile(ctx context.Context, name string, n int64, after func(written int64) error) (
	pause time.Duration, err error,
) {
	f, err := os.OpenFile(filepath.Join(d.target(), name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() {
		if closeErr := f.Close(); err == nil {
			err = closeErr
		}
	}()
	sum, chunk := sha256.New(), make([]byte, 1<<20)
	for written := int64(0); written < n; {
		if err := ctx.Err(); err != nil {
			return pause, err
		}
		began, err := writeChunk(f, sum, chunk)
		pause = max(pause, time.Since(began))
		if err != nil {
			return pause, fmt.Errorf("write %s at byte %d: %w", name, written, err)
		}
		written += int64(len(chunk))
		if after != nil {
			if err := after(written); err != nil {
				return pause, err
			}
		}
	}
	d.sums[name] = hex.EncodeToString(sum.Sum(nil))
	return pause, nil
}

func writeChunk(f *os.File, sum hash.Hash, chunk []byte) (began time.Time, err error) {
	if _, err := rand.Read(chunk); err != nil {
		return time.Now(), err
	}
	sum.Write(chunk)
	began = time.Now()
	if _, err := f.Write(chunk); err != nil {
		return began, err
	}
	return began, f.Sync()
}

// verify reads every file back and compares its checksum with the one kept when it was written.
func (d *demo) verify() error {
	for name, want := range d.sums {
		f, err := os.Open(filepath.Join(d.target(), name))
		if err != nil {
			return err
		}
		sum := sha256.New()
		_, err = io.Copy(sum, f)
		f.Close()
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		if got := hex.EncodeToString(sum.Sum(nil)); got != want {
			return fmt.Errorf("%s has checksum %s, was written with %s", name, got, want)
		}
	}
	return nil
}
