package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/node/blockdev"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// cluster is up to three real nodes in one process: real disks, engines, groups, kernel devices and
// mounts. Only the network and the catalogue's group are left out.
type cluster struct {
	t   *testing.T
	dir string
	hub *transport.Memory
	cat *fakeCatalogue

	incarnations int
	nodes        map[int]*clusterNode
}

type clusterNode struct {
	*Node

	disk *Disk
	net  *transport.MemoryNode
}

func newCluster(t *testing.T, n int) *cluster {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("no FUSE: ", err)
	}
	if testing.Short() {
		t.Skip("runs real groups")
	}
	return openCluster(t, t.TempDir(), n)
}

// openCluster starts n nodes whose disks lie in dir, and formats those that are new.
func openCluster(t *testing.T, dir string, n int) *cluster {
	t.Helper()
	c := &cluster{t: t, dir: dir, hub: transport.NewMemory(1), cat: newFakeCatalogue(), nodes: map[int]*clusterNode{}}
	t.Cleanup(c.close)
	for i := 1; i <= n; i++ {
		require.NoError(t, os.MkdirAll(c.path(i, "disk"), 0o700))
		if _, err := FormatDisk(c.diskConfig(i)); err != nil {
			require.ErrorIs(t, err, trivet.ErrExists)
		}
		c.start(i)
	}
	return c
}

func (c *cluster) path(i int, elem string) string {
	return filepath.Join(c.dir, fmt.Sprint(testNodeID(i)), elem)
}

func (c *cluster) logger(i int) *slog.Logger {
	return slog.New(slog.NewTextHandler(c.t.Output(), nil)).With("on", testNodeID(i))
}

func (c *cluster) fatal(i int) func(error) {
	return func(err error) { c.t.Errorf("fatal on node %d: %v", i, err) }
}

func (c *cluster) diskConfig(i int) DiskConfig {
	return DiskConfig{
		Dir: c.path(i, "disk"), Cluster: testCluster, Node: testNodeID(i), CacheBytes: 8 << 20, Fatal: c.fatal(i),
		LogLanes: 1, LogSegmentBytes: 8 << 20,
	}
}

// start starts a process of node i.
func (c *cluster) start(i int) {
	c.t.Helper()
	disk, err := OpenDisk(c.diskConfig(i))
	require.NoError(c.t, err)
	network := c.hub.Node(testNodeID(i))
	c.incarnations++
	cfg := DefaultConfig()
	cfg.ID, cfg.Address, cfg.Incarnation = testNodeID(i), fmt.Sprintf("10.0.0.%d:7000", i), testUUID(0x1000+c.incarnations)
	cfg.Disks, cfg.RunDir, cfg.Catalogue = []*Disk{disk}, c.path(i, "run"), c.cat
	cfg.Network, cfg.Mux = network, raftgroup.NewMux(network)
	cfg.Timing = raftgroup.Timing{Heartbeat: 500 * time.Millisecond}
	cfg.Logger, cfg.Fatal = c.logger(i), c.fatal(i)
	n, err := Open(c.t.Context(), cfg)
	require.NoError(c.t, err)
	c.nodes[i] = &clusterNode{Node: n, disk: disk, net: network}
	c.await("node is registered", func() bool {
		reg, ok := c.cat.Local().Node(testNodeID(i))
		return ok && reg.Incarnation == cfg.Incarnation
	})
}

func (c *cluster) stop(i int) {
	c.t.Helper()
	n := c.nodes[i]
	delete(c.nodes, i)
	assert.NoError(c.t, n.Close())
	assert.NoError(c.t, n.net.Close())
	assert.NoError(c.t, n.disk.Close())
}

func (c *cluster) close() {
	for i := range c.nodes {
		c.stop(i)
	}
	assert.NoError(c.t, c.hub.Close())
}

// await waits until the catalogue says so.
func (c *cluster) await(what string, is func() bool) {
	c.t.Helper()
	limit := time.After(time.Minute)
	for {
		changed := c.cat.Changed()
		if is() {
			return
		}
		select {
		case <-changed:
		case <-limit:
			require.Fail(c.t, "waited in vain: "+what)
		}
	}
}

// create makes a volume with a replica on each of nodes 1 to n.
func (c *cluster) create(n int, sizeBytes int64) {
	c.t.Helper()
	v := meta.Volume{
		ID: vol, Name: "data", SizeBytes: sizeBytes, Reclaim: meta.ReclaimDelete, Request: "r", Created: time.Unix(1e9, 0),
	}
	for i := 1; i <= n; i++ {
		v.Replicas = append(v.Replicas, meta.Replica{
			ID: trivet.ReplicaID(trivet.NewUUID()), Node: testNodeID(i), Disk: c.nodes[i].disk.ID(),
			State: meta.ReplicaCreating,
		})
	}
	c.cat.must(meta.Command{CreateVolume: &meta.CreateVolume{Volume: v}})
	c.await("volume is available", func() bool { return c.cat.volume(vol).Phase == meta.PhaseAvailable })
}

func (c *cluster) attach(i int) {
	c.t.Helper()
	c.cat.must(meta.Command{Attach: &meta.Attach{Volume: vol, Node: testNodeID(i), Mode: meta.SingleNodeMultiWriter}})
}

func (c *cluster) detach() {
	c.t.Helper()
	c.cat.must(meta.Command{Detach: &meta.Detach{Volume: vol}})
	c.await("detach is fenced", func() bool { v := c.cat.volume(vol); return v.Holder() == "" })
}

// remove deletes the volume and waits until no disk has any of it.
func (c *cluster) remove() {
	c.t.Helper()
	c.cat.must(meta.Command{Release: &meta.Release{Volume: vol, Discard: true}})
	c.await("volume is gone", func() bool { _, ok := c.cat.Local().Volume(vol); return !ok })
	for i, n := range c.nodes {
		left, err := n.disk.replicas()
		require.NoError(c.t, err)
		assert.Empty(c.t, left)
		require.NoDirExists(c.t, filepath.Join(c.path(i, "disk"), "groups", vol.String()))
	}
}

// consumer is what the kubelet does for one pod on node i.
type consumer struct {
	c               *cluster
	n               *clusterNode
	staging, target string
	block           bool
}

func (c *cluster) consumer(i int) *consumer {
	c.t.Helper()
	u := &consumer{c: c, n: c.nodes[i], staging: c.path(i, "staging"), target: filepath.Join(c.path(i, "pod"), "mount")}
	require.NoError(c.t, os.MkdirAll(u.staging, 0o750))
	require.NoError(c.t, os.MkdirAll(filepath.Dir(u.target), 0o750))
	c.t.Cleanup(func() { // after a failure only
		for _, p := range []string{u.target, u.staging} {
			for unix.Unmount(p, unix.MNT_DETACH) == nil {
				continue
			}
		}
	})
	return u
}

func (u *consumer) file(name string) string { return filepath.Join(u.target, name) }

func (u *consumer) up(fsType string) {
	u.c.t.Helper()
	ctx, cancel := context.WithTimeout(u.c.t.Context(), 2*time.Minute)
	defer cancel()
	for range 2 { // the kubelet repeats itself
		require.NoError(u.c.t, u.n.Stage(ctx, StageRequest{
			Volume: vol, StagingPath: u.staging, FSType: fsType, Block: u.block, MountFlags: []string{"noatime"},
		}))
	}
	for range 2 {
		require.NoError(u.c.t, u.n.Publish(ctx, PublishRequest{
			Volume: vol, StagingPath: u.staging, TargetPath: u.target, FSType: fsType, Block: u.block,
			Mode: meta.SingleNodeMultiWriter,
		}))
	}
}

func (u *consumer) down() {
	u.c.t.Helper()
	for range 2 {
		require.NoError(u.c.t, u.n.Unpublish(u.c.t.Context(), vol, u.target))
	}
	for range 2 {
		require.NoError(u.c.t, u.n.Unstage(u.c.t.Context(), vol, u.staging))
	}
	u.c.requireNothingMounted()
	require.NoFileExists(u.c.t, u.target)
	require.NoDirExists(u.c.t, u.target)
}

func (c *cluster) requireNothingMounted() {
	c.t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(c.t, err)
	require.NotContains(c.t, string(mounts), c.dir)
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	require.NoError(c.t, err)
	for _, l := range loops {
		b, err := os.ReadFile(l)
		if err == nil {
			require.NotContains(c.t, string(b), c.dir)
		}
	}
	for i := range c.nodes {
		for _, sub := range []string{"volumes", "blockdev"} {
			left, err := os.ReadDir(filepath.Join(c.path(i, "run"), sub))
			if !os.IsNotExist(err) {
				require.NoError(c.t, err)
			}
			require.Empty(c.t, left, sub)
		}
	}
}

func mustWriteSynced(t *testing.T, path string, b []byte) {
	t.Helper()
	f, err := os.Create(path)
	require.NoError(t, err)
	_, err = f.Write(b)
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	require.NoError(t, f.Close())
}

func content() []byte { return []byte(strings.Repeat("three legs hold the pot\n", 50_000)) }

func TestEndToEndOneReplica(t *testing.T) {
	c := newCluster(t, 1)
	c.create(1, 96<<20)
	c.attach(1)
	u := c.consumer(1)
	u.up("ext4")
	mustWriteSynced(t, u.file("f"), content())
	s, err := u.n.Stats(t.Context(), vol, u.target)
	require.NoError(t, err)
	assert.Greater(t, s.UsedBytes, int64(len(content())))
	u.down()
	u.up("ext4") // within the same attachment
	got, err := os.ReadFile(u.file("f"))
	require.NoError(t, err)
	assert.Equal(t, content(), got)
	u.down()
	c.detach()
	c.remove()
}

func TestEndToEndThreeReplicas(t *testing.T) {
	c := newCluster(t, 3)
	c.create(3, 320<<20) // xfs takes no less than 300 MB
	// H30: what one node wrote is what the next one reads, and the one after it.
	for round := range 3 {
		i := round%2 + 1
		// Once is enough: a machine that stands still may lose the leadership again, and nobody asks for it any more.
		followed := c.cat.once(func(st *meta.State) bool {
			v, _ := st.Volume(vol)
			return v.Leader == v.ReplicaOn(testNodeID(i)).ID
		})
		c.attach(i)
		u := c.consumer(i)
		u.up("xfs")
		if round > 0 {
			got, err := os.ReadFile(u.file("f"))
			require.NoError(t, err)
			assert.Equal(t, append(content(), byte(round-1)), got)
		}
		mustWriteSynced(t, u.file("f"), append(content(), byte(round)))
		select {
		case <-followed:
		case <-time.After(time.Minute):
			require.Fail(t, "leadership does not follow the attachment")
		}
		mustWriteSynced(t, u.file("g"), content())
		u.down()
		c.detach()
	}
	c.remove()
}

// A volume of which one replica's node is away still works, and the node catches up.
func TestEndToEndNodeAway(t *testing.T) {
	c := newCluster(t, 3)
	c.create(3, 96<<20)
	c.attach(1)
	u := c.consumer(1)
	u.up("ext4")
	c.stop(3)
	mustWriteSynced(t, u.file("f"), content())
	c.start(3)
	mustWriteSynced(t, u.file("g"), content())
	u.down()
	c.detach()
	c.remove()
}

func TestEndToEndBlock(t *testing.T) {
	c := newCluster(t, 1)
	c.create(1, 96<<20)
	c.attach(1)
	u := c.consumer(1)
	u.block = true
	u.up("")
	f, err := os.OpenFile(u.target, os.O_RDWR|unix.O_EXCL, 0)
	require.NoError(t, err)
	_, err = f.WriteAt(content()[:8192], 4096)
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	require.NoError(t, f.Close())
	s, err := u.n.Stats(t.Context(), vol, u.target)
	require.NoError(t, err)
	assert.Equal(t, VolumeStats{Block: true, TotalBytes: 96 << 20}, s)
	u.down()
	u.up("")
	got := make([]byte, 8192)
	f, err = os.Open(u.target)
	require.NoError(t, err)
	_, err = f.ReadAt(got, 4096)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	assert.Equal(t, content()[:8192], got)
	u.down()
	c.detach()
	c.remove()
}

// A process that stops while a volume is in use writes back what is dirty, takes the mounts away and
// leaves a shade; the next process stages the same content at an epoch of its own.
func TestEndToEndRestartInUse(t *testing.T) {
	c := newCluster(t, 1)
	c.create(1, 96<<20)
	c.attach(1)
	u := c.consumer(1)
	u.up("ext4")
	require.NoError(t, os.WriteFile(u.file("f"), content(), 0o600)) // no fsync
	before := c.cat.volume(vol)
	c.stop(1)
	require.ErrorIs(t, os.WriteFile(u.file("g"), nil, 0o600), unix.EROFS)
	c.start(1)
	u.n = c.nodes[1]
	u.up("ext4")
	got, err := os.ReadFile(u.file("f"))
	require.NoError(t, err)
	assert.Equal(t, content(), got)
	after := c.cat.volume(vol)
	assert.Greater(t, after.Epoch, before.Epoch)
	u.down()
	c.detach()
	c.remove()
}

// crashDirEnv makes TestCrashHelper play the process that is killed.
const crashDirEnv = "TRIVET_TEST_CRASH_DIR"

func TestCrashHelper(t *testing.T) {
	dir := os.Getenv(crashDirEnv)
	if dir == "" {
		t.Skip("runs as a child of TestEndToEndCrash only")
	}
	c := openCluster(t, dir, 1)
	c.create(1, 96<<20)
	c.attach(1)
	u := c.consumer(1)
	u.up("ext4")
	mustWriteSynced(t, u.file("f"), content())
	require.NoError(t, os.WriteFile(c.path(1, "ready"), nil, 0o600))
	select {} // until killed
}

// H31: what a killed process leaves is taken away by the next one, and its mount points cannot be
// written to in the meantime.
func TestEndToEndCrash(t *testing.T) {
	probe := newCluster(t, 0) // for its skips, and a directory
	dir := probe.dir
	helper := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestCrashHelper$")
	helper.Env = append(os.Environ(), crashDirEnv+"="+dir)
	require.NoError(t, helper.Start())
	target := filepath.Join(probe.path(1, "pod"), "mount")
	t.Cleanup(func() {
		for _, p := range []string{target, probe.path(1, "staging")} {
			_ = unix.Unmount(p, unix.MNT_DETACH)
		}
		_, _ = blockdev.Cleanup(context.WithoutCancel(t.Context()), probe.path(1, "run/blockdev"), nil)
	})
	ready := func() bool { _, err := os.Stat(probe.path(1, "ready")); return err == nil }
	require.Eventually(t, ready, time.Minute, 20*time.Millisecond)
	require.NoError(t, helper.Process.Kill())
	require.Error(t, helper.Wait())
	f, err := os.Create(filepath.Join(target, "g")) // the dead mount is still there
	if err == nil {
		require.Error(t, f.Sync())
		_ = f.Close() // as dead
	}

	c := openCluster(t, dir, 1)
	n := c.nodes[1]
	require.ErrorIs(t, os.WriteFile(filepath.Join(target, "g"), nil, 0o600), unix.EROFS)
	replicas, err := n.disk.replicas()
	require.NoError(t, err)
	assert.Len(t, replicas, 1, "a replica that the catalogue has never heard of is left alone (H35)")
	require.NoError(t, n.Unpublish(t.Context(), vol, target))
	require.NoError(t, n.Unstage(t.Context(), vol, c.path(1, "staging")))
	require.NoDirExists(t, target)
	c.requireNothingMounted()
}

func TestEndToEndNBD(t *testing.T) {
	c := newCluster(t, 1)
	c.create(1, 96<<20)
	c.attach(1)
	ctx, cancel := context.WithCancel(t.Context())
	socket := c.path(1, "nbd.sock")
	greeting := make([]byte, 8)
	err := c.nodes[1].ServeNBD(ctx, vol, NBDService{Socket: socket, Ready: func(_ string, at net.Addr) error {
		defer cancel()
		conn, err := new(net.Dialer).DialContext(ctx, at.Network(), at.String())
		if err != nil {
			return err
		}
		_, err = io.ReadFull(conn, greeting)
		return errors.Join(err, conn.Close())
	}})
	require.NoError(t, err)
	assert.Equal(t, "NBDMAGIC", string(greeting))
	require.NoFileExists(t, socket)
	c.detach()
	c.remove()
}
