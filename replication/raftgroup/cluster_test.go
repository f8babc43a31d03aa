package raftgroup_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

const (
	testGroup = trivet.VolumeID(0x7a)
	heartbeat = time.Second
)

// cluster is a few nodes in one process, each with one replica of one group. It lives in a synctest
// bubble, so its seconds cost nothing.
type cluster struct {
	t     *testing.T
	net   *transport.Memory
	nodes map[string]*node
	// configure changes the configuration of every Open.
	configure func(*raftgroup.Config)
	// segmentBytes of the log that a new disk gets; 64 KiB, so that segments come and go.
	segmentBytes int64
	// wrap stands around the network of every node.
	wrap func(*node) transport.Network
	// patience of eventually, in the bubble's time.
	patience time.Duration
}

// node is one machine. A restart makes a new process on the same disk, a crash on what the disk kept.
type node struct {
	c       *cluster
	name    string
	fs      *vfs.MemFS
	link    *transport.MemoryNode
	mux     *raftgroup.Mux
	machine *kv
	group   *raftgroup.Group
	log     *segment.Log // of the process, over logFS
	logFS   *vfs.MemFS

	mu    sync.Mutex
	fatal []error
}

func replicaID(name string) trivet.ReplicaID {
	return trivet.ReplicaID(fmt.Sprintf("00000000-0000-4000-8000-0000000000%02x", name[0]))
}

func member(name string) raftgroup.Member {
	return raftgroup.Member{Replica: replicaID(name), Node: trivet.NodeID(name)}
}

func members(names ...string) []raftgroup.Member {
	var out []raftgroup.Member
	for _, n := range names {
		out = append(out, member(n))
	}
	return out
}

// newCluster makes nodes without a group.
func newCluster(t *testing.T, names ...string) *cluster {
	t.Helper()
	return newClusterOn(t, nil, names...)
}

// newClusterOn is newCluster with something around the network of every node.
func newClusterOn(t *testing.T, wrap func(*node) transport.Network, names ...string) *cluster {
	t.Helper()
	c := &cluster{
		t: t, net: transport.NewMemory(1), nodes: map[string]*node{}, wrap: wrap, segmentBytes: 64 << 10,
		patience: time.Minute,
	}
	c.net.SetDefaultFaults(transport.Faults{Delay: transport.Uniform(time.Millisecond, 5*time.Millisecond)})
	for _, name := range names {
		n := &node{c: c, name: name, fs: vfs.NewCrashableMem()}
		c.nodes[name] = n
		n.connect()
	}
	t.Cleanup(func() {
		for _, n := range c.nodes {
			n.stop()
			n.closeLog()
		}
		require.NoError(t, c.net.Close())
	})
	return c
}

// startCluster makes nodes with a group of all of them, and starts it.
func startCluster(t *testing.T, names ...string) *cluster {
	t.Helper()
	c := newCluster(t, names...)
	for _, name := range names {
		n := c.nodes[name]
		require.NoError(t, raftgroup.Create(n.config(), members(names...)))
		n.mustOpen()
	}
	return c
}

func (n *node) connect() {
	n.link = n.c.net.Node(trivet.NodeID(n.name))
	if n.c.wrap == nil {
		n.mux = raftgroup.NewMux(n.link)
	} else {
		n.mux = raftgroup.NewMux(n.c.wrap(n))
	}
}

func (n *node) config() raftgroup.Config {
	cfg := raftgroup.Config{
		Group: testGroup, Replica: replicaID(n.name), FS: n.fs, Dir: "/disk/groups/v", Network: n.mux, Machine: n.machine,
		Timing:   raftgroup.Timing{Heartbeat: heartbeat},
		BootTime: func() time.Duration { return time.Since(time.Unix(0, 0)) },
		Fatal: func(err error) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.fatal = append(n.fatal, err)
		},
	}
	if n.c.configure != nil {
		n.c.configure(&cfg)
	}
	cfg.Log = n.diskLog(cfg.FS)
	return cfg
}

// diskLog returns the log of the disk that the node has now, opened by way of fs. A new disk is formatted.
func (n *node) diskLog(fs vfs.FS) *segment.Log {
	n.c.t.Helper()
	if n.log != nil && n.logFS == n.fs {
		return n.log
	}
	n.closeLog()
	opts := segment.Options{
		Dir: raftgroup.LogDir(fs, "/disk/log"), Disk: "11111111-2222-4333-8444-555555555555", Lanes: 1,
		SegmentBytes: n.c.segmentBytes,
	}
	if names, err := opts.Dir.List(); err != nil || len(names) == 0 {
		opts.Dir = raftgroup.LogDir(n.fs, "/disk/log")
		require.NoError(n.c.t, segment.Format(opts))
		opts.Dir = raftgroup.LogDir(fs, "/disk/log")
	}
	log, err := segment.Open(opts)
	require.NoError(n.c.t, err)
	n.log, n.logFS = log, n.fs
	return log
}

// closeLog ends what the process has of its log.
func (n *node) closeLog() {
	if n.log == nil {
		return
	}
	if err := n.log.Close(); n.log.Err() == nil {
		require.NoError(n.c.t, err)
	}
	n.log = nil
}

func (n *node) open() error {
	m, err := openKV(n.fs, "/machine")
	if err != nil {
		return err
	}
	n.machine = m
	n.group, err = raftgroup.Open(n.config())
	return err
}

func (n *node) mustOpen() {
	n.c.t.Helper()
	require.NoError(n.c.t, n.open())
}

func (n *node) stop() {
	if n.group != nil {
		require.NoError(n.c.t, n.group.Close())
		n.group = nil
	}
}

// crash kills the process and the power: of what was not synced, percent survives.
func (n *node) crash(percent int, rng *rand.Rand) {
	after := n.fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: rng})
	n.die()
	n.fs = after
}

// die ends the process without a word to the others.
func (n *node) die() {
	require.NoError(n.c.t, n.link.Close())
	n.stop()
	n.closeLog()
	n.connect()
}

func (n *node) fatals() []error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]error(nil), n.fatal...)
}

// eventually waits for a condition, in the bubble's time.
func (c *cluster) eventually(what string, cond func() bool) {
	c.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(c.patience); !cond(); <-tick.C {
		require.True(c.t, time.Now().Before(end), "never came true: %s", what)
	}
}

// pass lets time pass.
func pass(d time.Duration) { <-time.After(d) }

// leader waits for one replica that leads and may serve reads, and returns it.
func (c *cluster) leader(among ...string) *node {
	c.t.Helper()
	var found *node
	c.eventually("a leader", func() bool {
		found = nil
		for name, n := range c.nodes {
			if n.group == nil || len(among) > 0 && !contains(among, name) {
				continue
			}
			if _, err := n.group.ReadGate(); err == nil {
				found = n
			}
		}
		return found != nil
	})
	return found
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}

// others returns the names of the running nodes but the given ones.
func (c *cluster) others(not ...string) []string {
	var out []string
	for name, n := range c.nodes {
		if n.group != nil && !contains(not, name) {
			out = append(out, name)
		}
	}
	return out
}

func (n *node) set(k, v string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*heartbeat)
	defer cancel()
	_, err := n.group.Propose(ctx, []byte(k+"="+v))
	return err
}

func (n *node) mustSet(k, v string) {
	n.c.t.Helper()
	require.NoError(n.c.t, n.set(k, v))
}

// mustPut sets on whoever leads, again until it is done.
func (c *cluster) mustPut(k, v string) {
	c.t.Helper()
	c.eventually("set "+k, func() bool { return c.leader().set(k, v) == nil })
}

// converge waits until all running replicas have applied the same, and compares what they applied.
func (c *cluster) converge() {
	c.t.Helper()
	c.mustPut("converge", fmt.Sprint(time.Now().UnixNano()))
	leader := c.leader()
	want, _ := leader.machine.Applied()
	for name, n := range c.nodes {
		if n.group == nil {
			continue
		}
		c.eventually(name+" catches up", func() bool {
			have, _ := n.machine.Applied()
			return have >= want
		})
	}
	c.noDivergence()
	for name, n := range c.nodes {
		if n.group != nil {
			require.Equal(c.t, leader.machine.data(), n.machine.data(), "state of %s", name)
			require.Empty(c.t, n.fatals(), "fatal errors of %s", name)
		}
	}
}

// noDivergence compares every entry that any two replicas applied.
func (c *cluster) noDivergence() {
	c.t.Helper()
	all := map[uint64]string{}
	for name, n := range c.nodes {
		if n.machine == nil {
			continue
		}
		for index, e := range n.machine.seen() {
			if old, ok := all[index]; ok {
				require.Equal(c.t, old, e, "entry %d as applied by %s", index, name)
			}
			all[index] = e
		}
	}
}

// compacted waits until a replica has cut its log beyond an index.
func (n *node) compacted(beyond uint64) {
	n.c.t.Helper()
	n.c.eventually("log of "+n.name+" is compacted", func() bool {
		first, _ := raftgroup.LogBounds(n.group)
		return first > beyond
	})
}
