package raftgroup_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
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

// onChange calls f before every change of a filesystem, with its number.
type onChange struct {
	n int
	f func(n int)
}

func (o *onChange) String() string { return "change" }

func (o *onChange) MaybeError(op errorfs.Op) error {
	if op.Kind.ReadOrWrite() == errorfs.OpIsWrite {
		o.f(o.n)
		o.n++
	}
	return nil
}

// through makes what a group does to its disk, its log included, pass through something.
func (n *node) through(cfg *raftgroup.Config, wrap func(vfs.FS) vfs.FS) {
	n.closeLog()
	cfg.FS = wrap(n.fs)
	cfg.Log = n.diskLog(cfg.FS)
}

// A crash before any change of Create: the directory does not open, or it opens complete; Create
// again makes it whole in any case.
func TestCreateCrash(t *testing.T) {
	for _, percent := range []int{0, 40, 100} {
		for n, done := 0, false; !done; n++ {
			synctest.Test(t, func(t *testing.T) { done = !createCrash(t, n, percent) })
		}
	}
}

func createCrash(t *testing.T, n, percent int) bool {
	c := newCluster(t, "a")
	a := c.nodes["a"]
	var after *vfs.MemFS
	rng := rand.New(rand.NewPCG(uint64(n), uint64(percent)))
	cfg := a.config()
	crash := func(k int) {
		if k == n {
			after = a.fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: rng})
		}
	}
	a.through(&cfg, func(fs vfs.FS) vfs.FS { return errorfs.Wrap(fs, &onChange{f: crash}) })
	require.NoError(t, raftgroup.Create(cfg, members("a")))
	if after == nil {
		return false
	}
	a.fs = after
	there, err := raftgroup.Exists(a.config())
	require.NoError(t, err)
	if err := a.open(); there {
		require.NoError(t, err)
		a.stop()
	} else {
		require.ErrorIs(t, err, trivet.ErrNotFound)
	}
	require.NoError(t, raftgroup.Create(a.config(), members("a")))
	require.NoError(t, raftgroup.Create(a.config(), members("a")))
	a.mustOpen()
	c.leader()
	a.mustSet("x", "1")
	return true
}

func TestCreate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a")
		a := c.nodes["a"]
		require.ErrorIs(t, raftgroup.Create(a.config(), members("b")), trivet.ErrInvalid)
		twice := append(members("a"), members("a")...)
		require.ErrorIs(t, raftgroup.Create(a.config(), twice), trivet.ErrInvalid)
		learner := members("a")
		learner[0].Learner = true
		require.ErrorIs(t, raftgroup.Create(a.config(), learner), trivet.ErrInvalid)

		there, err := raftgroup.Exists(a.config())
		require.NoError(t, err)
		require.False(t, there)
		require.NoError(t, raftgroup.Create(a.config(), members("b", "a")))
		require.NoError(t, raftgroup.Create(a.config(), members("a", "b")), "the order does not matter")
		require.ErrorIs(t, raftgroup.Create(a.config(), members("a")), trivet.ErrExists)
		other := a.config()
		other.Group++
		require.ErrorIs(t, raftgroup.Create(other, members("a", "b")), trivet.ErrExists)
		_, err = raftgroup.Exists(other)
		require.ErrorIs(t, err, trivet.ErrInvalid)
		a.mustOpen()
		_, err = raftgroup.Open(a.config())
		require.ErrorIs(t, err, trivet.ErrInUse, "I9")
		require.NoError(t, a.group.Close())
		require.NoError(t, a.group.Close())
	})
}

// H10: a replica that lost its data, or a part of it, does not come back under its old name.
func TestWipedReplicaDoesNotOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a")
		a := c.leader()
		a.mustSet("x", "1")
		a.stop()
		dir := a.config().Dir
		whole := a.fs.CrashClone(vfs.CrashCloneCfg{})
		names, err := whole.List(dir)
		require.NoError(t, err)
		require.Equal(t, []string{"superblock"}, names, "all else is in the log")
		a.fs = whole.CrashClone(vfs.CrashCloneCfg{})
		require.NoError(t, a.fs.Remove(dir+"/superblock"))
		require.ErrorIs(t, a.open(), trivet.ErrNotFound)
		require.ErrorIs(t, raftgroup.Create(a.config(), members("a")), trivet.ErrCorrupt, "it is not ours to wipe")

		a.fs = whole.CrashClone(vfs.CrashCloneCfg{})
		require.NoError(t, a.fs.RemoveAll(dir))
		require.ErrorIs(t, a.open(), trivet.ErrNotFound)
		require.NoError(t, a.fs.MkdirAll(dir, 0o755))
		require.ErrorIs(t, a.open(), trivet.ErrNotFound, "an empty directory")
		require.ErrorIs(t, raftgroup.Create(a.config(), members("a")), trivet.ErrCorrupt, "the log knows it")

		// A lost log is an empty one here, as if somebody had formatted it again.
		a.fs = whole.CrashClone(vfs.CrashCloneCfg{})
		require.NoError(t, a.fs.RemoveAll("/disk/log"))
		require.ErrorIs(t, a.open(), trivet.ErrCorrupt)
		require.ErrorContains(t, a.open(), "knows nothing of the group")
		require.NoError(t, a.fs.RemoveAll("/machine"))
		require.ErrorIs(t, a.open(), trivet.ErrCorrupt, "without anything applied, too: it may have voted")
	})
}

// The same for one that joined, and never had an entry or a vote: its log says that it was created.
func TestWipedJoinerDoesNotOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a")
		a := c.nodes["a"]
		require.NoError(t, raftgroup.Create(a.config(), nil))
		a.mustOpen()
		a.stop()
		a.closeLog()
		require.NoError(t, a.fs.RemoveAll("/disk/log"))
		require.ErrorIs(t, a.open(), trivet.ErrCorrupt)
	})
}

// H11: another replica's disk is refused, and so is a disk that was carried to another node.
func TestForeignDirectory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b")
		c.leader()
		a, b := c.nodes["a"], c.nodes["b"]
		a.stop()
		b.stop()
		a.fs, b.fs = b.fs, a.fs
		require.ErrorIs(t, a.open(), trivet.ErrInvalid)
		require.ErrorIs(t, raftgroup.Destroy(a.config()), trivet.ErrInvalid)
		cfg := a.config()
		cfg.Replica = replicaID("b")
		_, err := raftgroup.Open(cfg)
		require.ErrorIs(t, err, trivet.ErrInvalid, "b's disk on node a")
	})
}

// H4, I1: a state that does not belong to the log is refused, either way.
func TestStateAndLogMustAgree(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a")
		c.configure = func(cfg *raftgroup.Config) { cfg.SnapshotBytes = 256 << 10 }
		a := c.nodes["a"]
		require.NoError(t, raftgroup.Create(a.config(), members("a")))
		fresh := a.fs.CrashClone(vfs.CrashCloneCfg{})
		a.mustOpen()
		c.leader()
		for k := range 10 {
			a.mustSet(fmt.Sprint(k), "1")
		}
		a.stop()
		_, err := a.machine.Flush()
		require.NoError(t, err)
		early := a.fs.CrashClone(vfs.CrashCloneCfg{})

		// The log of the beginning under the state of later.
		a.fs = fresh.CrashClone(vfs.CrashCloneCfg{})
		copyDir(t, early, a.fs, "/machine")
		require.ErrorIs(t, a.open(), trivet.ErrCorrupt)
		require.ErrorContains(t, a.open(), "state is ahead of the log")
		require.ErrorContains(t, a.open(), "replace it by a replica with a new ID")

		a.fs = early.CrashClone(vfs.CrashCloneCfg{})
		a.mustOpen()
		c.leader()
		for k := range 300 {
			a.mustSet(fmt.Sprint(k), strings.Repeat("v", 100))
		}
		a.compacted(20)
		a.stop()
		late := a.fs.CrashClone(vfs.CrashCloneCfg{})

		// The state of the beginning under the log of later.
		a.fs = late.CrashClone(vfs.CrashCloneCfg{})
		require.NoError(t, a.fs.RemoveAll("/machine"))
		require.NoError(t, a.fs.MkdirAll("/machine", 0o755))
		copyDir(t, early, a.fs, "/machine")
		require.ErrorIs(t, a.open(), trivet.ErrCorrupt)
		require.ErrorContains(t, a.open(), "state is behind the snapshot")

		a.fs = late
		a.mustOpen()
		c.leader()
	})
}

// TestCutBytes: the log is compacted, for which the machine is flushed, once CutBytes were written, and down to
// SnapshotBytes; already after these while the disk runs full, also where nothing is written any more.
func TestCutBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const kept = 64 << 10 // bytes: 16 entries
		var tight atomic.Bool
		c := newCluster(t, "a")
		c.configure = func(cfg *raftgroup.Config) {
			cfg.SnapshotBytes, cfg.CutBytes, cfg.Tight = kept, 20*kept, tight.Load
		}
		a := c.nodes["a"]
		require.NoError(t, raftgroup.Create(a.config(), members("a")))
		a.mustOpen()
		c.leader()
		write := func(n int) (last uint64) {
			for range n {
				a.mustSet("k", "v")
			}
			synctest.Wait()
			_, last = raftgroup.LogBounds(a.group)
			return last
		}
		first, _ := raftgroup.LogBounds(a.group)
		at := write(200)
		time.Sleep(time.Minute)
		now, _ := raftgroup.LogBounds(a.group)
		require.Equal(t, first, now, "after 200 entries")
		write(200)
		a.compacted(at)

		at = write(150)
		time.Sleep(time.Minute)
		now, _ = raftgroup.LogBounds(a.group)
		require.Less(t, now, at-100)
		tight.Store(true)
		a.compacted(at - 100)
		at = write(150)
		a.compacted(at - 100)
	})
}

// TestStartLeavesApplied: a start reads no more entries than it must that the machine has, whatever the log keeps.
func TestStartLeavesApplied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		c.configure = func(cfg *raftgroup.Config) { cfg.SnapshotBytes, cfg.CutBytes = 512<<10, 64<<20 }
		for name, n := range c.nodes {
			require.NoError(t, raftgroup.Create(n.config(), members("a", "b", "c")), name)
			n.mustOpen()
		}
		a := c.leader()
		for k := range 100 {
			a.mustSet(fmt.Sprint(k), "1")
		}
		first, last := raftgroup.LogBounds(a.group)
		fresh := raftgroup.SnapshotIndex(a.group)
		_, err := a.machine.Flush()
		require.NoError(t, err)
		applied, _ := a.machine.Applied()
		require.Greater(t, applied, fresh+90)
		a.stop()
		a.mustOpen()
		require.Equal(t, applied, raftgroup.SnapshotIndex(a.group))
		now, _ := raftgroup.LogBounds(a.group)
		require.Equal(t, first, now, "for those that lag")
		require.GreaterOrEqual(t, applied, last-1)

		a = c.leader()
		a.mustSet("x", "1") // less than is worth a record
		a.mustSet("y", "1")
		_, err = a.machine.Flush()
		require.NoError(t, err)
		before := raftgroup.SnapshotIndex(a.group)
		a.stop()
		a.mustOpen()
		require.Equal(t, before, raftgroup.SnapshotIndex(a.group))
		a = c.leader()
		a.mustSet("z", "1")
		c.converge()
	})
}

func copyDir(t *testing.T, from, to *vfs.MemFS, dir string) {
	t.Helper()
	require.NoError(t, to.MkdirAll(dir, 0o755))
	names, err := from.List(dir)
	require.NoError(t, err)
	for _, name := range names {
		require.NoError(t, vfs.CopyAcrossFS(from, dir+"/"+name, to, dir+"/"+name))
	}
}

// H23 at the level of a group: damage is refused, and never costs the other replicas anything. Damage of
// one entry refuses its group alone (H38): the log itself opens.
func TestDamagedLogIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		for k := range 20 {
			c.mustPut(fmt.Sprint(k), "damage me")
		}
		c.converge()
		b := c.nodes["b"]
		b.die()
		names, err := b.fs.List("/disk/log")
		require.NoError(t, err)
		found := false
		for _, name := range names {
			data, err := b.fs.UnsafeGetFileDataBuffer("/disk/log/" + name)
			require.NoError(t, err)
			if at := bytes.Index(data, []byte("=damage me")); at >= 0 && !found {
				data[at+1] ^= 1
				found = true
			}
		}
		require.True(t, found)
		before := diskFiles(t, b.fs, "/disk/log")
		require.ErrorIs(t, b.open(), trivet.ErrCorrupt)
		b.closeLog()
		require.Subset(t, diskFiles(t, b.fs, "/disk/log"), before, "a damaged log is not cut")
		c.mustPut("more", "1")
		c.converge()
	})
}

// An entry that has rotted although the state machine has made it durable is of use to nobody here: the replica
// opens, its log begins behind that entry, and a follower that lacks it pulls the state.
func TestAppliedEntryMayRot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		for k := range 20 {
			c.mustPut(fmt.Sprint(k), fmt.Sprintf("damage me %02d.", k))
		}
		c.converge()
		b := c.nodes["b"]
		_, err := b.machine.Flush()
		require.NoError(t, err)
		before, _ := b.machine.Applied()
		b.die()
		names, err := b.fs.List("/disk/log")
		require.NoError(t, err)
		found := 0
		for _, name := range names {
			data, err := b.fs.UnsafeGetFileDataBuffer("/disk/log/" + name)
			require.NoError(t, err)
			if at := bytes.Index(data, []byte("damage me 07.")); at >= 0 {
				data[at+1] ^= 1
				found++
			}
		}
		require.Equal(t, 1, found)
		b.mustOpen()
		applied, _ := b.machine.Applied()
		require.Equal(t, before, applied)
		c.mustPut("more", "1")
		c.converge()
		require.Equal(t, "damage me 07.", b.machine.get("7"))
		require.Equal(t, "1", b.machine.get("more"))
		b.die()
		b.mustOpen() // the entry is gone
		c.mustPut("more", "2")
		c.converge()
		require.Empty(t, b.fatals())
	})
}

// diskFiles returns the sizes of the files of a directory.
func diskFiles(t *testing.T, fs vfs.FS, dir string) map[string]int64 {
	t.Helper()
	names, err := fs.List(dir)
	require.NoError(t, err)
	out := map[string]int64{}
	for _, name := range names {
		s, err := fs.Stat(dir + "/" + name)
		require.NoError(t, err)
		out[name] = s.Size()
	}
	return out
}

// H1: the log is never cut above what the state machine has made durable. A crash that loses all that
// was not flushed loses no acknowledged value, and a machine that only claims to flush is found out.
func TestCompactionNeedsFlush(t *testing.T) {
	for _, lie := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			c := newCluster(t, "a")
			c.configure = func(cfg *raftgroup.Config) { cfg.SnapshotBytes = 128 << 10 }
			a := c.nodes["a"]
			require.NoError(t, raftgroup.Create(a.config(), members("a")))
			a.mustOpen()
			a.machine.lieOnFlush = lie
			c.leader()
			for k := range 300 {
				a.mustSet(fmt.Sprint(k), "value")
			}
			a.compacted(50)
			a.crash(0, nil)
			if lie {
				require.ErrorIs(t, a.open(), trivet.ErrCorrupt)
				return
			}
			a.mustOpen()
			c.leader()
			for k := range 300 {
				require.Equal(t, "value", a.machine.get(fmt.Sprint(k)), "lost %d", k)
			}
		})
	}
}

// slowRemove removes a directory file by file, the superblock last, as a disk may.
type slowRemove struct{ vfs.FS }

func (s slowRemove) RemoveAll(dir string) error {
	names, err := s.List(dir)
	if err != nil {
		return s.Remove(dir) // a file
	}
	slices.Sort(names)
	for _, name := range names {
		if err := errors.Join(s.Remove(s.PathJoin(dir, name)), syncDir(s.FS, dir)); err != nil {
			return err
		}
	}
	return s.Remove(dir)
}

func TestDestroyCrash(t *testing.T) {
	for _, percent := range []int{0, 40, 100} {
		for n, done := 0, false; !done; n++ {
			synctest.Test(t, func(t *testing.T) { done = !destroyCrash(t, n, percent) })
		}
	}
}

func destroyCrash(t *testing.T, n, percent int) bool {
	c := newCluster(t, "a")
	a := c.nodes["a"]
	require.NoError(t, raftgroup.Create(a.config(), members("a")))
	a.mustOpen()
	c.leader()
	a.mustSet("x", "1")
	a.stop()
	var after *vfs.MemFS
	rng := rand.New(rand.NewPCG(uint64(n), uint64(percent)))
	cfg := a.config()
	crash := func(k int) {
		if k == n {
			after = a.fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: rng})
		}
	}
	a.through(&cfg, func(fs vfs.FS) vfs.FS { return slowRemove{errorfs.Wrap(fs, &onChange{f: crash})} })
	require.NoError(t, raftgroup.Destroy(cfg))
	require.NoError(t, raftgroup.Destroy(cfg))
	if after == nil {
		return false
	}
	a.fs = after
	// It opens whole, or not at all.
	if err := a.open(); err == nil {
		c.leader()
		require.Equal(t, "1", a.machine.get("x"))
		a.stop()
	} else {
		require.ErrorIs(t, err, trivet.ErrNotFound)
	}
	if there, err := raftgroup.Exists(a.config()); err != nil || there || n%2 == 0 {
		require.NoError(t, raftgroup.Destroy(a.config()))
	}
	there, err := raftgroup.Exists(a.config())
	require.NoError(t, err)
	require.False(t, there)
	require.NoError(t, a.fs.RemoveAll("/machine"))
	require.NoError(t, raftgroup.Create(a.config(), members("a")))
	a.mustOpen()
	c.leader()
	return true
}

// A replica that is about to rest keeps the last entries of its log only, and all of its state; a follower that lacked
// what was cut gets it all the same.
func TestRestCutsTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		l := c.leader()
		away := c.others(l.name)[0]
		l.mustSet("first", "1")
		c.converge()
		c.nodes[away].stop()
		for k := range 60 {
			l.mustSet(fmt.Sprint(k), "value")
		}
		_, end := raftgroup.LogBounds(l.group)
		for _, name := range c.others(away) {
			c.eventually("everything applied", func() bool { return c.nodes[name].machine.get("59") != "" })
		}
		for _, name := range c.others(away) {
			n := c.nodes[name]
			n.group.Rest()
			first, last := raftgroup.LogBounds(n.group)
			require.Equal(t, end, last)
			require.Less(t, last-first, uint64(16))
			n.group.Rest()
			again, _ := raftgroup.LogBounds(n.group)
			require.Equal(t, first, again, "nothing is left to cut")
			n.stop()
		}
		for _, n := range c.nodes {
			n.mustOpen()
		}
		c.leader()
		c.converge()
		require.Equal(t, "value", c.nodes[away].machine.get("59"))
		require.Equal(t, "1", c.nodes[away].machine.get("first"))
	})
}
