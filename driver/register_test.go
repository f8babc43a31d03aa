package driver_test

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/require"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/driver"
	"github.com/trivet-csi/trivet/node"
)

// TestRegistration does what kubelet's plugin watcher does with a socket that appears.
func TestRegistration(t *testing.T) {
	t.Parallel()
	var out buffer
	dir := t.TempDir()
	cfg := config(t)
	cfg.Endpoint = "unix://" + filepath.Join(t.TempDir(), trivet.DriverName, "csi.sock") // its folder is ours to make
	cfg.RegisterDir, cfg.Logger = dir, slog.New(slog.NewTextHandler(&out, nil))
	s, err := driver.Open(t.Context(), cfg)
	require.NoError(t, err)

	// Every socket in the directory is a plugin to kubelet, unless its name begins with a dot.
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 1)
	kubelet := registration.NewRegistrationClient(dial(t, "unix://"+filepath.Join(dir, entries[0].Name())))
	info, err := kubelet.GetInfo(t.Context(), &registration.InfoRequest{})
	require.NoError(t, err)
	require.Equal(t, registration.CSIPlugin, info.GetType())
	require.Equal(t, trivet.DriverName, info.GetName())
	require.Equal(t, []string{"1.0.0"}, info.GetSupportedVersions())

	node := csi.NewNodeClient(dial(t, "unix://"+info.GetEndpoint()))
	_, err = node.NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
	require.NoError(t, err, "the endpoint in GetInfo is the driver's")

	_, err = kubelet.NotifyRegistrationStatus(t.Context(), &registration.RegistrationStatus{Error: "no such node"})
	require.NoError(t, err)
	require.Contains(t, out.String(), "no such node")
	require.Contains(t, out.String(), "level=ERROR")

	require.NoError(t, s.Close())
	entries, err = os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, entries, "kubelet forgets the driver when its socket goes")
}

// TestRegistrationAfterCrash: a killed process leaves its socket behind, and kubelet must see the new
// one appear.
func TestRegistrationAfterCrash(t *testing.T) {
	t.Parallel()
	cfg := config(t)
	cfg.RegisterDir = t.TempDir()
	path := filepath.Join(cfg.RegisterDir, trivet.DriverName+"-reg.sock")
	leaveStaleSocket(t, path)
	before, err := os.Stat(path)
	require.NoError(t, err)
	s, err := driver.Open(t.Context(), cfg)
	require.NoError(t, err)
	after, err := os.Stat(path)
	require.NoError(t, err)
	require.False(t, os.SameFile(before, after))
	require.NoError(t, s.Close())
}

func TestRegistrationImpossible(t *testing.T) {
	t.Parallel()
	cfg := config(t)
	cfg.RegisterDir = filepath.Join(t.TempDir(), "missing")
	_, err := driver.Open(t.Context(), cfg)
	require.ErrorContains(t, err, "register with kubelet")
	require.NoFileExists(t, cfg.Endpoint[len("unix://"):], "nothing is left behind")

	cfg.RegisterDir = "relative"
	_, err = driver.Open(t.Context(), cfg)
	require.ErrorIs(t, err, trivet.ErrInvalid)
	require.ErrorContains(t, err, "RegisterDir")
}

// TestRegistrationFollowsThePlace: a kubelet asks for the topology when a socket appears and never again, so another
// appears when the node stands elsewhere, and none when it does not.
func TestRegistrationFollowsThePlace(t *testing.T) {
	t.Parallel()
	cfg := config(t)
	cfg.RegisterDir = t.TempDir()
	n := cfg.Node.(*fakeNode)
	n.stands("a", "")
	path := filepath.Join(cfg.RegisterDir, trivet.DriverName+"-reg.sock")
	s, err := driver.Open(t.Context(), cfg)
	require.NoError(t, err)
	before, err := os.Stat(path)
	require.NoError(t, err)
	for _, place := range [][2]string{{"b", ""}, {"b", "r1"}, {"", ""}} {
		n.stands(place[0], place[1])
		require.Eventually(t, func() bool {
			after, err := os.Stat(path)
			if err != nil || os.SameFile(before, after) && before.ModTime().Equal(after.ModTime()) {
				return false
			}
			before = after
			return true
		}, time.Minute, 10*time.Millisecond, "%q", place)
		kubelet := registration.NewRegistrationClient(dial(t, "unix://"+path))
		info, err := kubelet.GetInfo(t.Context(), &registration.InfoRequest{})
		require.NoError(t, err)
		told, err := csi.NewNodeClient(dial(t, "unix://"+info.GetEndpoint())).NodeGetInfo(t.Context(),
			&csi.NodeGetInfoRequest{})
		require.NoError(t, err)
		require.Equal(t, place[0], told.GetAccessibleTopology().GetSegments()["topology.csi.trivet.dev/zone"])
		require.Equal(t, place[1], told.GetAccessibleTopology().GetSegments()["topology.csi.trivet.dev/rack"])
	}
	require.NoError(t, s.Close())
	require.NoFileExists(t, path)
}

// TestRegistrationStays: as long as nothing changes the kubelet is left alone.
func TestRegistrationStays(t *testing.T) {
	t.Parallel()
	cfg := config(t)
	cfg.RegisterDir = t.TempDir()
	asked := make(chan struct{})
	cfg.Node = &watchedNode{fakeNode: cfg.Node.(*fakeNode), asked: asked}
	path := filepath.Join(cfg.RegisterDir, trivet.DriverName+"-reg.sock")
	go func() { // of Open: validated, limits of the controller, told
		for range 3 {
			<-asked
		}
	}()
	s, err := driver.Open(t.Context(), cfg)
	require.NoError(t, err)
	before, err := os.Stat(path)
	require.NoError(t, err)
	for range 2 { // after the second the first look is over
		<-asked
	}
	after, err := os.Stat(path)
	require.NoError(t, err)
	require.True(t, os.SameFile(before, after))
	require.Equal(t, before.ModTime(), after.ModTime())
	go func() {
		for range asked {
			continue
		}
	}()
	require.NoError(t, s.Close())
	close(asked)
}

// watchedNode says when it is asked where it stands.
type watchedNode struct {
	*fakeNode

	asked chan struct{}
}

func (n *watchedNode) Info() node.Info {
	n.asked <- struct{}{}
	return n.fakeNode.Info()
}
