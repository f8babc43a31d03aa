package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
)

// controllerImage is how upstream's manifest names the image of its snapshot-controller: often that of the release
// before.
var controllerImage = regexp.MustCompile(`registry\.k8s\.io/sig-storage/snapshot-controller:\S+`)

// InstallSnapshots gives the cluster what one that takes snapshots has, whatever its drivers are: the kinds of
// external-snapshotter, and its snapshot-controller, from upstream's own manifests.
func (c *Cluster) InstallSnapshots(ctx context.Context) error {
	folder := c.cache.program("snapshots")
	kinds, err := filepath.Glob(filepath.Join(folder, "*.storage.k8s.io_*.yaml"))
	if err != nil || len(kinds) == 0 {
		return fmt.Errorf("find the kinds of snapshots in %s: %d files, %w", folder, len(kinds), err)
	}
	for _, path := range kinds {
		if _, err := c.Kubectl(ctx, "apply", "-f", path); err != nil {
			return err
		}
		if _, err := c.Kubectl(ctx, "wait", "--for=condition=established", "-f", path); err != nil {
			return err
		}
	}
	for _, name := range []string{"rbac-snapshot-controller.yaml", "setup-snapshot-controller.yaml"} {
		text, err := os.ReadFile(filepath.Join(folder, name))
		if err != nil {
			return fmt.Errorf("manifest of the snapshot-controller: %w", err)
		}
		text = controllerImage.ReplaceAll(text, []byte(SnapshotControllerImage))
		if _, err := c.KubectlInput(ctx, string(text), "apply", "-f", "-"); err != nil {
			return err
		}
	}
	return nil
}
