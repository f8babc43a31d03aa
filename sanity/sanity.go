// Package sanity runs csi-sanity, the conformance tests of the Container Storage Interface, against
// a real cluster: three servers in this process with TLS between them, replicas on disk, kernel
// block devices, mkfs and mounts. It needs root, loop devices and FUSE, and is skipped without.
//
// Ginkgo allows one suite a process, so the variants stand in packages of their own: sanity/mount
// and sanity/block. The driver's own tests run the same specs over fakes, without privileges.
package sanity

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/gomega"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"

	"github.com/trivet-csi/trivet/internal/csicall"
	"github.com/trivet-csi/trivet/internal/testutil"
	"github.com/trivet-csi/trivet/server"
)

// Access types of the volumes under test.
const (
	Mount = "mount"
	Block = "block"
)

// volumeBytes is the size of each volume; several live at once.
const volumeBytes = 64 << 20

// Run runs every spec that is not of a capability of a later version, and fails when one is skipped
// for another reason, or when a mount is left behind. It may be called once a process.
func Run(t *testing.T, access string) {
	t.Helper()
	if testing.Short() {
		t.Skip("formats and mounts for half a minute; not with -short")
	}
	requireMachine(t)
	endpoint := startCluster(t)
	dir := t.TempDir()
	failOnLeftMounts(t, dir)

	c := sanity.NewTestConfig()
	c.Address, c.DialOptions = endpoint, append(c.DialOptions, grpc.WithUnaryInterceptor(csicall.Again))
	c.TestVolumeSize, c.TestVolumeExpandSize = volumeBytes, 2*volumeBytes
	c.TestVolumeAccessType = access
	c.TestVolumeParameters = map[string]string{"replicas": "3"}
	c.TestVolumeMutableParameters = map[string]string{"iopsLimit": "5k", "priority": "70"}
	usePaths(t, &c, dir)

	gomega.RegisterFailHandler(ginkgo.Fail)
	sc := sanity.GinkgoTest(&c)
	defer sc.Finalize() //nolint:misspell // its name
	ginkgo.ReportAfterSuite("every advertised capability is tried", checkReport)
	ginkgo.RunSpecs(t, "csi-sanity, "+access)
}

// startCluster starts three servers in this process, each in a zone of its own, which advertise all that csi-sanity can
// try, and returns the CSI endpoint of the first. They are closed at the end of the test; what they left mounted then
// keeps their folder from being removed, which fails the test.
func startCluster(t *testing.T) (endpoint string) {
	t.Helper()
	const nodesN = 3
	c := testutil.StartCluster(t, nodesN, func(i int, cfg *server.Config) {
		cfg.Zone, cfg.SnapshotTopology = fmt.Sprintf("zone-%d", i), true
	})
	return c.CSI(0)
}

// requireMachine skips the test unless this machine can attach and mount volumes.
func requireMachine(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes block devices and mounts them")
	}
	for _, dev := range []string{"/dev/loop-control", "/dev/fuse"} {
		if _, err := os.Stat(dev); err != nil {
			t.Skipf("needs %s: %v", dev, err)
		}
	}
	for _, tool := range []string{"mkfs.ext4", "blkid"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s: %v", tool, err)
		}
	}
}

// usePaths gives every spec directories of its own: with the two fixed ones that csi-sanity uses by
// itself, one mount that is left behind fails every later spec, and none says why.
func usePaths(t *testing.T, c *sanity.TestConfig, dir string) {
	t.Helper()
	c.TargetPath, c.StagingPath = filepath.Join(dir, "target"), filepath.Join(dir, "staging")
	make1 := func(path string) (string, error) {
		return os.MkdirTemp(dir, filepath.Base(path)+"-*") //nolint:usetesting // one a spec, removed by it
	}
	remove := func(path string) error {
		err := os.Remove(path)
		assert.NoError(t, err, "a spec left something behind") // csi-sanity ignores what we return
		return err
	}
	c.CreateTargetDir, c.CreateStagingDir = make1, make1
	c.RemoveTargetPath, c.RemoveStagingPath = remove, remove
	c.CheckPath = checkPath
}

// checkPath says what is at path. csi-sanity asks it of a published target only, so what is there
// must be mounted: a driver that makes a directory and mounts nothing passes every other check.
func checkPath(path string) (sanity.PathKind, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return sanity.PathIsNotFound, nil
	}
	if err != nil {
		return "", err
	}
	mounts, err := mountsUnder(path)
	if err != nil {
		return "", err
	}
	switch {
	case len(mounts) == 0:
		return "", fmt.Errorf("%s is there, but nothing is mounted on it", path)
	case info.IsDir():
		return sanity.PathIsDir, nil
	case info.Mode()&os.ModeDevice != 0:
		return sanity.PathIsOther, nil
	default:
		return sanity.PathIsFile, nil
	}
}

// mountsUnder returns the mount points at dir and below, the last mounted first.
func mountsUnder(dir string) ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []string
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		const mountPoint = 4 // fields of proc_pid_mountinfo(5), from 0
		fields := strings.Fields(lines.Text())
		if len(fields) > mountPoint && (fields[mountPoint] == dir || strings.HasPrefix(fields[mountPoint], dir+"/")) {
			out = append([]string{fields[mountPoint]}, out...)
		}
	}
	return out, lines.Err()
}

// failOnLeftMounts fails the test, at its end, when anything is mounted below dir, and unmounts it
// so that dir can be removed.
func failOnLeftMounts(t *testing.T, dir string) {
	t.Helper()
	t.Cleanup(func() {
		mounts, err := mountsUnder(dir)
		require.NoError(t, err)
		assert.Empty(t, mounts, "mounts left behind")
		for _, m := range mounts {
			assert.NoError(t, syscall.Unmount(m, syscall.MNT_DETACH), m)
		}
	})
}
