package controller

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

const testCluster = trivet.ClusterID("00000001-0000-4000-8000-000000000001")

// crashPoint is what a crash at one moment leaves, and what had been promised by then.
type crashPoint struct {
	fs       *vfs.MemFS
	promised uint64
}

// crashes takes a crash point before every operation on a file system.
type crashes struct {
	mu       sync.Mutex
	mem      *vfs.MemFS
	points   []crashPoint
	promised uint64
}

func newCrashes() *crashes { return &crashes{mem: vfs.NewCrashableMem()} }

// fs returns the file system that is watched.
func (c *crashes) fs() vfs.FS {
	return errorfs.Wrap(c.mem, errorfs.InjectorFunc(func(errorfs.Op) error { c.take(); return nil }))
}

func (c *crashes) take() {
	c.mu.Lock()
	defer c.mu.Unlock()
	seed := uint64(len(c.points))
	c.points = append(c.points, crashPoint{
		fs: c.mem.CrashClone(vfs.CrashCloneCfg{
			UnsyncedDataPercent: []int{0, 50, 100}[seed%3], RNG: rand.New(rand.NewPCG(seed, 1)),
		}),
		promised: c.promised,
	})
}

func (c *crashes) promise(n uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.promised = n
}

// testEntry is log entry i: the cluster's birth, then registrations of nodes.
func testEntry(t *testing.T, i uint64) raftgroup.Entry {
	t.Helper()
	c := meta.Command{InitCluster: &meta.InitCluster{Cluster: testCluster, Time: time.Unix(0, 0)}}
	if i > 1 {
		c = meta.Command{RegisterNode: &meta.RegisterNode{Node: meta.Node{
			ID: trivet.NodeID(fmt.Sprintf("n%d", i%7)), Address: fmt.Sprintf("a:%d", i), Incarnation: trivet.NewUUID(),
		}}}
	}
	data, err := c.Encode()
	require.NoError(t, err)
	return raftgroup.Entry{Index: i, Term: 1 + i/10, Data: data}
}

func imageOf(t *testing.T, s *meta.State) string {
	t.Helper()
	b, err := s.EncodeImage()
	require.NoError(t, err)
	return string(b)
}

// TestFlushSurvivesCrashes: after a crash at any operation the file holds a whole state, of an index
// that Flush had not yet passed over (H1, H2, H5).
func TestFlushSurvivesCrashes(t *testing.T) {
	t.Parallel()
	c := newCrashes()
	require.NoError(t, makeDir(c.mem, "data/meta"))
	m := newMachine(c.fs(), "data/meta")
	require.NoError(t, m.load())
	history := map[uint64]string{0: imageOf(t, m.view().state)}
	for i := uint64(1); i <= 40; i++ {
		_, err := m.Apply([]raftgroup.Entry{testEntry(t, i)})
		require.NoError(t, err)
		history[i] = imageOf(t, m.view().state)
		if i%4 != 0 {
			continue
		}
		if i%8 == 0 { // a restore in between, of what a leader would send
			img, err := m.Image(nil)
			require.NoError(t, err)
			require.NoError(t, m.Restore(img))
		}
		index, err := m.Flush()
		require.NoError(t, err)
		require.Equal(t, i, index)
		c.promise(index)
	}
	c.take()
	require.Greater(t, len(c.points), 50)
	for n, p := range c.points {
		back := newMachine(p.fs, "data/meta")
		require.NoError(t, back.load(), "crash %d", n)
		index, _ := back.Applied()
		require.GreaterOrEqual(t, index, p.promised, "crash %d: lost what Flush had promised", n)
		require.Equal(t, history[index], imageOf(t, back.view().state), "crash %d: index %d has another state", n, index)
		for i := index + 1; i <= 40; i++ { // the log above it is applied again, from before it
			_, err := back.Apply([]raftgroup.Entry{{Index: index, Term: 1, Data: []byte("applied already: skipped")}})
			require.NoError(t, err)
		}
	}
}

// TestFlushFailures: whichever operation fails, Flush says so and promises nothing that is not there.
func TestFlushFailures(t *testing.T) {
	t.Parallel()
	failed := 0
	for n := int32(0); ; n++ {
		mem := vfs.NewCrashableMem()
		require.NoError(t, makeDir(mem, "data/meta"))
		m := newMachine(mem, "data/meta")
		_, err := m.Apply([]raftgroup.Entry{testEntry(t, 1)})
		require.NoError(t, err)
		promised, err := m.Flush()
		require.NoError(t, err)
		_, err = m.Apply([]raftgroup.Entry{testEntry(t, 2)})
		require.NoError(t, err)
		inject := errorfs.OnIndex(n)
		m.fs = errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
			if err := inject.MaybeError(op); err != nil {
				return errors.New("injected")
			}
			return nil
		}))
		index, err := m.Flush()
		back := newMachine(mem.CrashClone(vfs.CrashCloneCfg{}), "data/meta")
		require.NoError(t, back.load())
		durable, _ := back.Applied()
		require.GreaterOrEqual(t, durable, promised)
		if err != nil {
			failed++
			require.Zero(t, index)
			continue
		}
		require.Equal(t, uint64(2), durable)
		if inject.Load() >= 0 {
			break // n lies behind the last operation
		}
	}
	require.Greater(t, failed, 5)
}

func TestApplyStopsAtTheUnknown(t *testing.T) {
	t.Parallel()
	m := newMachine(vfs.NewMem(), "x")
	_, err := m.Apply([]raftgroup.Entry{testEntry(t, 1)})
	require.NoError(t, err)
	before := m.view()
	_, err = m.Apply([]raftgroup.Entry{testEntry(t, 2), {Index: 3, Term: 1, Data: []byte("\x09{}")}})
	require.ErrorIs(t, err, trivet.ErrInvalid)
	require.Equal(t, before, m.view(), "a batch is applied whole or not at all")
	results, err := m.Apply([]raftgroup.Entry{
		testEntry(t, 1), {Index: 2, Term: 1, Members: []raftgroup.Member{{Replica: "r"}}}, testEntry(t, 3),
	})
	require.NoError(t, err)
	require.Len(t, results, 3)
	require.Nil(t, results[0])
	require.Nil(t, results[1])
	require.IsType(t, meta.Result{}, results[2])
	index, _ := m.Applied()
	require.Equal(t, uint64(3), index)
}

// TestRestoreIsWhole: a damaged or cut image changes nothing.
func TestRestoreIsWhole(t *testing.T) {
	t.Parallel()
	source := newMachine(vfs.NewMem(), "x")
	_, err := source.Apply([]raftgroup.Entry{testEntry(t, 1), testEntry(t, 2)})
	require.NoError(t, err)
	img, err := source.Image(nil)
	require.NoError(t, err)
	size := img.Size()
	b, err := io.ReadAll(img)
	require.NoError(t, err)
	require.Len(t, b, int(size))
	require.Equal(t, size, img.Size(), "also after it was read")

	mem := vfs.NewMem()
	require.NoError(t, makeDir(mem, "x"))
	m := newMachine(mem, "x")
	before := m.view()
	for _, bad := range [][]byte{nil, b[:len(b)/2], append(bytes.Clone(b), 0), append([]byte{'X'}, b[1:]...)} {
		require.ErrorIs(t, m.Restore(bytes.NewReader(bad)), trivet.ErrCorrupt)
		require.Equal(t, before, m.view())
		require.False(t, m.Restoring())
	}
	changed := m.changedChan()
	require.NoError(t, m.Restore(bytes.NewReader(b)))
	<-changed
	require.Equal(t, imageOf(t, source.view().state), imageOf(t, m.view().state))
	index, err := m.Flush()
	require.NoError(t, err)
	require.Equal(t, uint64(2), index)
}

// TestBootstrapSurvivesCrashes: after a crash at any operation of a bootstrap, another one finishes
// it, or says that it is done; and once it returned, it is done.
func TestBootstrapSurvivesCrashes(t *testing.T) {
	t.Parallel()
	c := newCrashes()
	synctest.Test(t, func(t *testing.T) {
		cat, end := bootCatalogue(t, c.fs())
		defer end()
		require.NoError(t, cat.Bootstrap(testContext(t)))
		c.promise(1)
		c.take()
	})
	step := 1
	if testing.Short() {
		step = 5
	}
	finished := 0
	for n := len(c.points) - 1; n >= 0; n -= step {
		p := c.points[n]
		synctest.Test(t, func(t *testing.T) {
			cat, end := bootCatalogue(t, p.fs)
			defer end()
			joined := cat.Joined()
			if p.promised > 0 {
				require.True(t, joined, "crash %d", n)
			}
			err := cat.Bootstrap(testContext(t))
			if joined {
				require.ErrorIs(t, err, trivet.ErrExists, "crash %d", n)
				require.NoError(t, cat.Open(testContext(t)))
			} else {
				require.NoError(t, err, "crash %d", n)
				finished++
			}
			s, err := cat.Read(testContext(t))
			require.NoError(t, err, "crash %d", n)
			require.Equal(t, testCluster, s.Cluster(), "crash %d", n)
		})
	}
	require.Positive(t, finished)
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func bootCatalogue(t *testing.T, fs vfs.FS) (_ *Catalogue, end func()) {
	t.Helper()
	hub := transport.NewMemory(1)
	network := hub.Node("n1")
	cat, err := NewCatalogue(CatalogueConfig{
		Node: "n1", Cluster: testCluster, Dir: "data/meta", FS: fs, Network: network, Mux: raftgroup.NewMux(network),
		Timing: raftgroup.Timing{Heartbeat: 100 * time.Millisecond}, LogSegmentBytes: 256 << 10,
		Fatal: func(err error) { t.Errorf("fatal: %v", err) },
	})
	require.NoError(t, err)
	return cat, func() {
		require.NoError(t, cat.Close())
		require.NoError(t, hub.Close())
	}
}
