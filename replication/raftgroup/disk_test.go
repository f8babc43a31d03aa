package raftgroup_test

import (
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// stallDisk is a filesystem whose flushes can be made to hang or to fail.
type stallDisk struct {
	mu   sync.Mutex
	hang chan struct{}
	err  error
}

func (d *stallDisk) stall() (resume func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	ch := make(chan struct{})
	d.hang = ch
	return sync.OnceFunc(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.hang = nil
		close(ch)
	})
}

func (d *stallDisk) fail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.err = err
}

func (d *stallDisk) MaybeError(op errorfs.Op) error {
	switch op.Kind {
	case errorfs.OpFileSync, errorfs.OpFileSyncData:
		if !strings.HasPrefix(op.Path, "/disk/log/") {
			return nil
		}
	default:
		return nil
	}
	d.mu.Lock()
	hang, err := d.hang, d.err
	d.mu.Unlock()
	if hang != nil {
		<-hang
	}
	return err
}

func (d *stallDisk) String() string { return "stall" }

// stallDisks gives every node such a disk beneath its log.
func stallDisks(c *cluster) map[string]*stallDisk {
	disks := map[string]*stallDisk{}
	for name := range c.nodes {
		disks[name] = &stallDisk{}
	}
	c.configure = func(cfg *raftgroup.Config) {
		for name, n := range c.nodes {
			if cfg.Replica == replicaID(name) {
				cfg.FS = errorfs.Wrap(vfs.FS(n.fs), disks[name])
			}
		}
	}
	return disks
}

// D8: a leader whose disk hangs gives way after two seconds, and its process ends after ten.
func TestDiskStall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		disks := stallDisks(c)
		for _, n := range c.nodes {
			require.NoError(t, raftgroup.Create(n.config(), members("a", "b", "c")))
			n.mustOpen()
		}
		old := c.leader()
		resume := disks[old.name].stall()
		defer resume()
		start := time.Now()
		require.ErrorIs(t, old.set("x", "lost"), trivet.ErrUnavailable)
		require.Less(t, time.Since(start), 3*time.Second, "a proposal must not wait for the disk")
		next := c.leader(c.others(old.name)...)
		require.Less(t, time.Since(start), 6*time.Second)
		next.mustSet("x", "1")
		require.Empty(t, old.fatals())
		pass(time.Until(start.Add(11 * time.Second)))
		require.Len(t, old.fatals(), 1)
		require.ErrorContains(t, old.fatals()[0], "hangs")
		resume()
		old.die()
		old.mustOpen()
		old.fatal = nil
		c.converge()
	})
}

// The same for a follower: it must not be counted as alive.
func TestDiskStallOfFollowers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		disks := stallDisks(c)
		for _, n := range c.nodes {
			require.NoError(t, raftgroup.Create(n.config(), members("a", "b", "c")))
			n.mustOpen()
		}
		l := c.leader()
		var resume []func()
		for _, name := range c.others(l.name) {
			resume = append(resume, disks[name].stall())
		}
		require.ErrorIs(t, l.set("x", "1"), trivet.ErrUnavailable)
		c.eventually("the leader gives up", func() bool { return !l.group.Status().IsLeader })
		for _, f := range resume {
			f()
		}
		c.converge()
	})
}

// H28: after a failed flush nothing is written any more, and nothing is acknowledged.
func TestFailedFlushIsFatal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a")
		disks := stallDisks(c)
		a := c.nodes["a"]
		require.NoError(t, raftgroup.Create(a.config(), members("a")))
		a.mustOpen()
		c.leader()
		a.mustSet("x", "1")
		disks["a"].fail(errors.New("input/output error"))
		require.ErrorIs(t, a.set("x", "2"), trivet.ErrUnavailable)
		synctest.Wait() // the caller hears of it before Fatal does
		require.Len(t, a.fatals(), 1)
		disks["a"].fail(nil)
		require.ErrorIs(t, a.set("x", "3"), trivet.ErrUnavailable, "the disk works again, but is not to be trusted")
		_, err := a.group.ReadGate()
		require.Error(t, err)
		require.Len(t, a.fatals(), 1)
		a.die()
		a.mustOpen()
		c.leader()
		require.NotEmpty(t, a.machine.get("x"))
	})
}

// H28, H38: the log is shared, so its failure ends every group on the disk, once, and those that had nothing to
// write as well: they must not lead or vote on a log that they cannot write.
func TestPoisonedLogEndsEveryGroup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a")
		disks := stallDisks(c)
		a := c.nodes["a"]
		require.NoError(t, raftgroup.Create(a.config(), members("a")))
		a.mustOpen()
		c.leader()
		var fatal atomic.Int32
		m, err := openKV(a.fs, "/machine-2")
		require.NoError(t, err)
		cfg := a.config()
		cfg.Group, cfg.Dir, cfg.Machine = testGroup+1, "/disk/groups/w", m
		cfg.Fatal = func(error) { fatal.Add(1) }
		require.NoError(t, raftgroup.Create(cfg, members("a")))
		idle, err := raftgroup.Open(cfg)
		require.NoError(t, err)
		defer func() { require.NoError(t, idle.Close()) }()
		c.eventually("the idle group leads", func() bool {
			_, err := idle.ReadGate()
			return err == nil
		})
		require.Zero(t, fatal.Load())

		disks["a"].fail(errors.New("input/output error"))
		require.ErrorIs(t, a.set("x", "1"), trivet.ErrUnavailable)
		synctest.Wait()
		require.Len(t, a.fatals(), 1)
		require.Equal(t, int32(1), fatal.Load())
		_, err = idle.ReadGate()
		require.Error(t, err)
		pass(time.Minute)
		require.Equal(t, int32(1), fatal.Load())
	})
}

// An apply that fails ends the replica: it would diverge if it went on.
func TestFailedApplyIsFatal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a")
		a := c.leader()
		a.mustSet("x", "1")
		a.machine.fail(errors.New("input/output error"))
		require.ErrorIs(t, a.set("x", "2"), trivet.ErrUnavailable)
		require.Len(t, a.fatals(), 1)
		a.machine.fail(nil)
		require.Error(t, a.set("x", "3"))
		require.Equal(t, "1", a.machine.get("x"))
	})
}
