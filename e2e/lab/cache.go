package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// cache is the folder of binaries made by build.sh: Go programs at its top, Debian packages unpacked
// below deb. Nothing in it is changed by the lab.
type cache string

func (c cache) program(name string) string { return filepath.Join(string(c), name) }

func (c cache) deb(path string) string { return filepath.Join(string(c), "deb", path) }

// programs are what build.sh builds from Go modules.
var programs = []string{
	"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kubectl",
	"csi-provisioner", "csi-attacher", "csi-resizer", "csi-snapshotter", "snapshot-controller", "pause",
}

// debs are the files of Debian packages that the lab runs.
var debs = []string{
	"usr/bin/containerd", "usr/bin/ctr", "usr/bin/containerd-shim-runc-v2", "usr/sbin/runc", "usr/lib/cni/ptp",
	"usr/lib/cni/host-local", "usr/lib/cni/loopback", "bin/busybox",
}

func (c cache) check() error {
	if c == "" {
		return errors.New("lab: no folder of binaries is given; e2e/build.sh makes one, and --print names it")
	}
	var missing []string
	for _, p := range programs {
		if _, err := os.Stat(c.program(p)); err != nil {
			missing = append(missing, p)
		}
	}
	for _, p := range debs {
		if _, err := os.Stat(c.deb(p)); err != nil {
			missing = append(missing, p)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("folder of binaries %s lacks %s; run e2e/build.sh", string(c), strings.Join(missing, ", "))
	}
	return nil
}

// FindCache returns the folder of binaries that build.sh in the folder e2e names; whether everything
// is in it, [Up] checks.
func FindCache(ctx context.Context, e2e string) (string, error) { return askBuild(ctx, e2e, "--print") }

// FindUpstream returns the folder of Kubernetes' own tests of storage drivers, which build.sh --upstream builds.
func FindUpstream(ctx context.Context, e2e string) (string, error) {
	return findPart(ctx, e2e, "upstream")
}

// FindPopulator returns the path of the volume populator that Kubernetes' own tests use, which build.sh --upstream
// builds too.
func FindPopulator(ctx context.Context, e2e string) (string, error) {
	dir, err := findPart(ctx, e2e, "populator")
	return filepath.Join(dir, "hello-populator"), err
}

// FindHelm returns the path of Helm's program, which build.sh --helm builds.
func FindHelm(ctx context.Context, e2e string) (string, error) {
	dir, err := findPart(ctx, e2e, "helm")
	return filepath.Join(dir, "helm"), err
}

// findPart returns the folder of a part that is built only when it is asked for.
func findPart(ctx context.Context, e2e, part string) (string, error) {
	dir, err := askBuild(ctx, e2e, "--print-"+part)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(dir); err != nil {
		return "", fmt.Errorf("%s is not built yet: %w; run e2e/build.sh --helm, or --upstream for the rest", part, err)
	}
	return dir, nil
}

func askBuild(ctx context.Context, e2e, question string) (string, error) {
	script := filepath.Join(e2e, "build.sh")
	out, err := exec.CommandContext(ctx, script, question).Output()
	if err != nil {
		return "", fmt.Errorf("ask %s for the folder of binaries: %w", script, withStderr(err))
	}
	return strings.TrimSpace(string(out)), nil
}

// withStderr adds what a command said on its standard error, if it was kept.
func withStderr(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) && len(exit.Stderr) > 0 {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
	}
	return err
}
