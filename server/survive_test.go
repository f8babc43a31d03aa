package server_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/node/keeper"
	"github.com/trivet-csi/trivet/server"
)

// survivalNode is the node whose server is killed.
const survivalNode = 2

// kept is a fleet whose servers have a keeper, and what a pod on one node needs.
type kept struct {
	*fleet

	t       *testing.T
	csi     *grpc.ClientConn
	process *process

	id, staging, target string
}

func newKept(t *testing.T) *kept {
	t.Helper()
	if testing.Short() {
		t.Skip("kills processes for a minute; not with -short")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount")
	}
	for _, path := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(path); err != nil {
			t.Skip("needs ", path)
		}
	}
	if _, err := exec.LookPath("fio"); err != nil {
		t.Skip("needs fio")
	}
	dir := t.TempDir()
	f := &kept{t: t}
	t.Cleanup(func() {
		if t.Failed() && f.fleet != nil { // servers hand their devices over when they are stopped
			dropDevices(t, f.dir)
			require.NoError(t, os.RemoveAll(f.dir))
		}
	})
	socket := filepath.Join(dir, "keeper", "sock")
	k, err := keeper.Open(keeper.Config{Socket: socket, Watchdog: 2 * time.Minute})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- k.Serve(ctx) }()
	t.Cleanup(func() { cancel(); require.NoError(t, <-ended) })
	f.fleet = newFleet(t, func(cfg *server.Config) {
		cfg.CSI = "unix://" + filepath.Join(dir, string(cfg.Node)+".sock")
		if string(cfg.Node) == fmt.Sprintf("node-%d", survivalNode) { // a keeper is a machine's own
			cfg.KeeperSocket = socket
		}
		host, port, err := net.SplitHostPort(cfg.Listen)
		require.NoError(t, err)
		cfg.MetricsAddr = net.JoinHostPort(host, "1"+port)
	})
	f.staging, f.target = filepath.Join(dir, "staging"), filepath.Join(dir, "pod", "mount")
	for _, d := range []string{f.staging, filepath.Dir(f.target)} {
		require.NoError(t, os.MkdirAll(d, 0o750))
	}
	t.Cleanup(func() { // after a failure only
		for _, p := range []string{f.target, f.staging} {
			for unix.Unmount(p, unix.MNT_DETACH) == nil {
				continue
			}
		}
	})
	f.process = f.processes[survivalNode]
	f.csi, err = grpc.NewClient(f.process.cfg.CSI, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, f.csi.Close()) })
	f.eventually("cluster init", func(ctx context.Context) error {
		_, err := f.processes[0].admin.InitCluster(ctx, &api.InitClusterRequest{})
		return err
	})
	f.awaitUp()
	return f
}

// dropDevices ends the loop devices and mounts below dir.
func dropDevices(t *testing.T, dir string) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	require.NoError(t, err)
	var below []string
	for line := range strings.Lines(string(mounts)) {
		if at := strings.Fields(line)[1]; strings.HasPrefix(at, dir+"/") {
			below = append(below, at)
		}
	}
	slices.Reverse(below)
	for _, at := range below {
		loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
		require.NoError(t, err)
		for _, loop := range loops {
			name := filepath.Base(filepath.Dir(filepath.Dir(loop)))
			if file, err := os.ReadFile(loop); err == nil && strings.TrimSpace(string(file)) == at {
				t.Logf("left behind: %s: %v", name, exec.Command("losetup", "-d", "/dev/"+name).Run())
			}
		}
		t.Logf("left behind: %s: %v", at, unix.Unmount(at, unix.MNT_DETACH))
	}
}

func capabilityOf(fsType string) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fsType}},
	}
}

// up does what Kubernetes does for a pod with a claim.
func (f *kept) up(fsType string, sizeBytes int64) {
	f.t.Helper()
	ctrl, node := csi.NewControllerClient(f.csi), csi.NewNodeClient(f.csi)
	capability := capabilityOf(fsType)
	f.eventually("create, attach and mount", func(ctx context.Context) error {
		created, err := ctrl.CreateVolume(ctx, &csi.CreateVolumeRequest{
			Name: "kept-" + fsType, CapacityRange: &csi.CapacityRange{RequiredBytes: sizeBytes},
			VolumeCapabilities: []*csi.VolumeCapability{capability},
		})
		if err != nil {
			return err
		}
		f.id = created.GetVolume().GetVolumeId()
		published, err := ctrl.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{
			VolumeId: f.id, NodeId: string(f.process.cfg.Node), VolumeCapability: capability,
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
		_, err = node.NodePublishVolume(ctx, f.publishRequest(fsType, published.GetPublishContext()))
		return err
	})
}

func (f *kept) publishRequest(fsType string, publishContext map[string]string) *csi.NodePublishVolumeRequest {
	return &csi.NodePublishVolumeRequest{
		VolumeId: f.id, PublishContext: publishContext, StagingTargetPath: f.staging, TargetPath: f.target,
		VolumeCapability: capabilityOf(fsType),
	}
}

// down takes the pod away again, and the attachment with it.
func (f *kept) down() {
	f.t.Helper()
	node := csi.NewNodeClient(f.csi)
	f.eventually("unmount and detach", func(ctx context.Context) error {
		_, err := node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: f.id, TargetPath: f.target})
		if err != nil {
			return err
		}
		_, err = node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: f.id, StagingTargetPath: f.staging})
		if err != nil {
			return err
		}
		_, err = csi.NewControllerClient(f.csi).ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{
			VolumeId: f.id, NodeId: string(f.process.cfg.Node),
		})
		return err
	})
}

// device returns the loop device that a path is mounted from.
func (f *kept) device() string {
	f.t.Helper()
	var st unix.Stat_t
	require.NoError(f.t, unix.Stat(f.target, &st))
	name, err := os.Readlink("/sys/dev/block/7:" + strconv.Itoa(int(unix.Minor(st.Dev))))
	require.NoError(f.t, err)
	return filepath.Base(name)
}

// writtenTo returns how many bytes were ever written to a block device (Documentation/block/stat.rst).
func writtenTo(t *testing.T, device string) int64 {
	t.Helper()
	b, err := os.ReadFile("/sys/block/" + device + "/stat")
	require.NoError(t, err)
	n, err := strconv.ParseInt(strings.Fields(string(b))[6], 10, 64)
	require.NoError(t, err)
	return n * 512
}

// complaints returns the kernel's messages about errors on a device that are in its ring and were not in it before.
// Those of a device that others had under that name are in before; older ones may have left the ring meanwhile.
func complaints(t *testing.T, device string, before []string) []string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "dmesg").Output()
	if err != nil {
		t.Log("no dmesg: ", err)
	}
	about := regexp.MustCompile(`(?i)\b` + device + `\b.*error|error.*\b` + device + `\b`)
	var found []string
	for line := range strings.Lines(string(out)) { // each begins with its time, so no two are alike
		if about.MatchString(line) && !slices.Contains(before, line) {
			found = append(found, line)
		}
	}
	return found
}

// TestPodSurvivesItsServer kills the server of the node three times under a pod that writes, and then
// stops it in good order, as an upgrade does: the pod sees pauses, and neither it nor fsck an error.
func TestPodSurvivesItsServer(t *testing.T) {
	f := newKept(t)
	for _, fs := range []struct {
		name      string
		sizeBytes int64
		check     []string
	}{
		{"ext4", 128 << 20, []string{"fsck.ext4", "-f", "-n"}},
		{"xfs", 320 << 20, []string{"xfs_repair", "-n"}},
	} {
		if _, err := exec.LookPath(fs.check[0]); err != nil {
			t.Skip("needs ", fs.check[0])
		}
		f.up(fs.name, fs.sizeBytes)
		device := f.device()
		before := complaints(t, device, nil)
		type result struct {
			out []byte
			err error
		}
		done, last := make(chan result, 1), make(chan struct{})
		noMore := sync.OnceFunc(func() { close(last) })
		t.Cleanup(noMore)
		go func() { // again and again: it must not end before the last hit, however quick it is
			for {
				out, err := exec.Command("fio", "--name=x", "--directory="+f.target, "--ioengine=libaio", "--direct=1",
					"--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k", "--iodepth=16", "--size=48m", "--fsync=32", "--loops=3",
					"--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0").CombinedOutput()
				select {
				case <-last:
				default:
					if err == nil {
						continue
					}
				}
				done <- result{out, err}
				return
			}
		}()
		for round, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGKILL, syscall.SIGKILL, syscall.SIGTERM} {
			next := writtenTo(t, device) + 16<<20
			require.Eventually(t, func() bool {
				return len(done) > 0 || writtenTo(t, device) > next
			}, 2*time.Minute, 5*time.Millisecond, "%s, round %d: no progress", fs.name, round)
			if len(done) > 0 {
				break // fio failed
			}
			f.process.end(t, sig)
			f.start(f.process)
			f.kubeletAsks(fs.name)
		}
		noMore()
		r := <-done
		require.NoError(t, r.err, "%s", r.out)
		require.Equal(t, device, f.device(), "the same device all along")
		require.Empty(t, complaints(t, device, before), "the kernel noticed")
		f.down()
		f.check(fs.name, fs.check)
	}
}

// kubeletAsks publishes once more while the volume is being resumed, as the kubelet does all the time: it
// is put off or told that all is well, and no second device is made.
func (f *kept) kubeletAsks(fsType string) {
	f.t.Helper()
	node := csi.NewNodeClient(f.csi)
	f.eventually("publish again", func(ctx context.Context) error {
		_, err := node.NodePublishVolume(ctx, f.publishRequest(fsType, nil))
		switch status.Code(err) {
		case codes.OK, codes.Unavailable, codes.Aborted, codes.DeadlineExceeded:
		default:
			require.NoError(f.t, err)
		}
		return err
	})
}

// check runs fsck on the volume and gives it back.
func (f *kept) check(fsType string, command []string) {
	f.t.Helper()
	name := "kept-" + fsType
	var device string
	f.eventually("attach for fsck", func(ctx context.Context) error {
		r, err := f.process.admin.AttachVolume(ctx, &api.VolumeRequest{Name: name})
		device = r.GetDevice()
		return err
	})
	out, err := exec.CommandContext(f.t.Context(), command[0], append(command[1:], device)...).CombinedOutput()
	require.NoError(f.t, err, "%s", out)
	f.eventually("detach", func(ctx context.Context) error {
		_, err := f.process.admin.DetachVolume(ctx, &api.DetachVolumeRequest{Name: name})
		return err
	})
}

// TestSharedDeviceSurvivesItsServer kills the server of one of two nodes that write a volume: its device goes on, a
// write that came meanwhile is carried out, and nothing that the other node has written is overwritten.
func TestSharedDeviceSurvivesItsServer(t *testing.T) {
	f := newKept(t)
	m := &migration{t: t, dir: filepath.Dir(f.staging)}
	for _, p := range f.processes {
		conn, err := grpc.NewClient(p.cfg.CSI, grpc.WithTransportCredentials(insecure.NewCredentials()))
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, conn.Close()) })
		m.nodes, m.conns = append(m.nodes, string(p.cfg.Node)), append(m.conns, conn)
	}
	require.NoError(t, again(t, func() error {
		created, err := csi.NewControllerClient(m.conns[0]).CreateVolume(t.Context(), &csi.CreateVolumeRequest{
			Name: "kept-shared", CapacityRange: &csi.CapacityRange{RequiredBytes: 64 << 20},
			VolumeCapabilities: []*csi.VolumeCapability{m.capability()},
		})
		m.volume = created.GetVolume().GetVolumeId()
		return err
	}))
	here, other := m.stage(survivalNode), m.stage(0)
	program, err := os.OpenFile(here, os.O_RDWR|unix.O_DIRECT, 0) // goes on using it
	require.NoError(t, err)
	defer program.Close()
	for round, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGKILL, syscall.SIGTERM} {
		m.write(here, 3, byte('a'+round))
		m.requireReads(other, 3, byte('a'+round))
		f.process.end(t, sig)
		m.write(other, 3, byte('m'+round)) // waits until the lease of the other is out, no longer
		wrote, block := make(chan error, 1), alignedBlock(t, byte('q'+round))
		go func() {
			_, err := program.WriteAt(block, 5*trivet.BlockSize)
			wrote <- err
		}()
		f.start(f.process)
		require.NoError(t, <-wrote, "round %d", round)
		m.requireReads(other, 5, byte('q'+round))
		m.requireReads(here, 3, byte('m'+round))
	}
	require.NoError(t, program.Close())
	m.leave(0)
	m.write(here, 3, 'z')
	m.leave(survivalNode)
}

// alignedBlock is pattern in memory that a direct write can be made from.
func alignedBlock(t *testing.T, b byte) []byte {
	t.Helper()
	p, err := unix.Mmap(-1, 0, trivet.BlockSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	require.NoError(t, err)
	t.Cleanup(func() { _ = unix.Munmap(p) })
	copy(p, pattern(b))
	return p
}
