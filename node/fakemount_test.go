package node

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/node/blockdev"
	"github.com/trivet-csi/trivet/replication"
)

// fakeMounter is a mount table in memory.
type fakeMounter struct {
	mu      sync.Mutex
	devices map[string]uint64   // device path to number
	table   map[string][]uint64 // target to the devices stacked there; the last one is seen
	made    map[string]bool     // targets that Bind made
	options map[string][]string // of the last FormatAndMount at a target
	ro      map[string]bool     // read-only binds
	shaded  map[string]bool
	lazy    map[string]bool // targets that were unmounted lazily
	busy    map[string]bool
	failing error // of FormatAndMount, Bind and GrowFilesystem
	fsGrown []string

	growFailing error // of GrowFilesystem alone

	mounting func(device string) error // what the kernel does with a device while it mounts it
}

func newFakeMounter() *fakeMounter {
	return &fakeMounter{
		devices: map[string]uint64{}, table: map[string][]uint64{}, made: map[string]bool{}, options: map[string][]string{},
		ro: map[string]bool{}, shaded: map[string]bool{}, lazy: map[string]bool{}, busy: map[string]bool{},
	}
}

func (m *fakeMounter) FormatAndMount(_ context.Context, device, target, fsType string, options []string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failing != nil {
		return m.failing
	}
	if m.mounting != nil {
		if err := m.mounting(device); err != nil {
			return err
		}
	}
	m.table[target] = append(m.table[target], m.devices[device])
	m.options[target] = append([]string{fsType}, options...)
	return nil
}

func (m *fakeMounter) Bind(source, target string, block, readOnly bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failing != nil {
		return m.failing
	}
	number := m.devices[source]
	if !block {
		stack := m.table[source]
		number = stack[len(stack)-1]
	}
	m.made[target] = true
	m.table[target] = append(m.table[target], number)
	m.ro[target] = readOnly
	return nil
}

func (m *fakeMounter) Shade(target string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.shaded[target] = true
	m.table[target] = append(m.table[target], 999)
	return nil
}

func (m *fakeMounter) Unmount(target string, lazy bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	stack := m.table[target]
	if len(stack) == 0 {
		return nil
	}
	if m.busy[target] && !lazy {
		return fmt.Errorf("unmount %s: %w", target, trivet.ErrInUse)
	}
	m.table[target] = stack[:len(stack)-1]
	m.lazy[target] = lazy
	return nil
}

func (m *fakeMounter) GrowFilesystem(_ context.Context, device, target, fsType string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fsGrown = append(m.fsGrown, fsType+" on "+device+" at "+target)
	return errors.Join(m.failing, m.growFailing)
}

func (m *fakeMounter) Remove(target string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.table[target]) > 0 {
		return errors.New("still mounted")
	}
	delete(m.made, target)
	return nil
}

func (m *fakeMounter) Mounted(target string) (uint64, bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	stack := m.table[target]
	if len(stack) == 0 {
		return 0, false, nil
	}
	return stack[len(stack)-1], true, nil
}

func (m *fakeMounter) DeviceNumber(device string) (uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, ok := m.devices[device]
	if !ok {
		return 0, fmt.Errorf("%s: %w", device, trivet.ErrNotFound)
	}
	return n, nil
}

func (m *fakeMounter) Usage(string) (VolumeStats, error) { return VolumeStats{TotalBytes: 42}, nil }

// mountedN counts all mounts but shades.
func (m *fakeMounter) mountedN() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := 0
	for _, stack := range m.table {
		for _, device := range stack {
			if device != 999 {
				n++
			}
		}
	}
	return n
}

// fakeGroup is a replicated volume that is only opened and closed.
type fakeGroup struct {
	trivet.Device // nil: no I/O in these tests

	cfg replication.VolumeConfig

	mu       sync.Mutex
	closed   bool
	flushErr error
}

func (g *fakeGroup) Size() int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.cfg.SizeBytes
}

func (g *fakeGroup) SetSize(sizeBytes int64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.cfg.SizeBytes = sizeBytes
	return nil
}

func (g *fakeGroup) Flush(context.Context) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.flushErr
}

func (g *fakeGroup) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	return nil
}

// Freeze is no business of mounts' tests.
func (g *fakeGroup) Freeze(context.Context, trivet.SnapshotID) (replication.Frozen, error) {
	return replication.Frozen{}, trivet.ErrUnavailable
}

func (g *fakeGroup) poison() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.flushErr = trivet.ErrUnavailable
}

func (g *fakeGroup) isClosed() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.closed
}

// fakeKernel is a kernel device of a fakeMounter.
type fakeKernel struct {
	bench  *mountBench
	path   string
	device trivet.Device

	mu     sync.Mutex
	failN  int // more calls of Detach fail
	err    error
	grown  []int64 // sizes that Grow found
	cannot error   // Grow
}

func (k *fakeKernel) Grow(context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.cannot != nil {
		return k.cannot
	}
	k.grown = append(k.grown, k.bench.group().Size())
	return nil
}

func (k *fakeKernel) refuse(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.cannot = err
}

func (k *fakeKernel) Path() string { return k.path }

func (k *fakeKernel) Err() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.err
}

func (k *fakeKernel) die(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.err = err
}

func (k *fakeKernel) Survives() error {
	if !k.bench.survive || k.bench.keeperAway {
		return trivet.ErrUnavailable
	}
	return k.Err()
}

func (k *fakeKernel) Resent() (blockdev.Resent, bool) {
	return blockdev.Resent{Repeated: 5, Refused: 2}, true
}

func (k *fakeKernel) Release(context.Context) error {
	k.die(trivet.ErrClosed)
	return nil
}

func (k *fakeKernel) Detach(context.Context) error {
	k.mu.Lock()
	failing := k.failN > 0
	k.failN--
	k.mu.Unlock()
	if failing {
		return errors.New("write back: input/output error")
	}
	m := k.bench.mounter
	m.mu.Lock()
	defer m.mu.Unlock()
	if k.bench.open {
		return fmt.Errorf("%s is open: %w", k.path, trivet.ErrInUse)
	}
	for target, stack := range m.table {
		for _, n := range stack {
			if n == m.devices[k.path] {
				return fmt.Errorf("%s is mounted at %s: %w", k.path, target, trivet.ErrInUse)
			}
		}
	}
	delete(m.devices, k.path)
	return nil
}

// mountBench is the part of node n1 that stages volumes, over fakes.
type mountBench struct {
	cat     *fakeCatalogue
	mounter *fakeMounter
	mounts  *mounts
	runDir  string
	survive bool // kernel devices survive their process

	keeperAway bool // devices do not know that they survive
	open       bool // a process has the device open

	mu      sync.Mutex
	groups  []*fakeGroup
	kernels []*fakeKernel
}

// newMountBench has volume vol, ready on n1 to n3, and not attached.
func newMountBench(t *testing.T) *mountBench {
	t.Helper()
	b := &mountBench{cat: newFakeCatalogue(), mounter: newFakeMounter(), runDir: t.TempDir()}
	for n := 1; n <= 3; n++ {
		b.cat.addNode(n)
	}
	b.cat.addVolume(vol, 3, map[string]string{"iopsLimit": "1000", "bandwidthLimit": "1048576"})
	for n := 1; n <= 3; n++ {
		b.cat.report(vol, n, meta.ReplicaReady)
	}
	b.process(t, testUUID(0x301))
	return b
}

// process starts the process with that incarnation, on what an earlier one left.
func (b *mountBench) process(t *testing.T, incarnation string) {
	t.Helper()
	cfg := Config{ID: "n1", Incarnation: incarnation, RunDir: b.runDir, Catalogue: b.cat, FollowAttachment: true}
	recs, err := openRecords(filepath.Join(b.runDir, "volumes"), "boot-1")
	require.NoError(t, err)
	b.mounts = &mounts{
		attacher: newAttacher(&cfg), mounter: b.mounter, records: recs, log: loggerOr(nil), growing: newVolumeSet(),
	}
	a := b.mounts.attacher
	a.registered = func(context.Context) error { return nil }
	a.openGroup = func(c replication.VolumeConfig) (groupDevice, error) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.groups = append(b.groups, &fakeGroup{cfg: c})
		return b.groups[len(b.groups)-1], nil
	}
	a.show = func(_ context.Context, c blockdev.Config) (kernelDevice, error) {
		b.mu.Lock()
		defer b.mu.Unlock()
		k := &fakeKernel{bench: b, path: fmt.Sprintf("/dev/loop%d", len(b.kernels)), device: c.Device}
		b.kernels = append(b.kernels, k)
		b.mounter.mu.Lock()
		defer b.mounter.mu.Unlock()
		b.mounter.devices[k.path] = uint64(100 + len(b.kernels))
		return k, nil
	}
}

func (b *mountBench) group() *fakeGroup {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.groups[len(b.groups)-1]
}

func (b *mountBench) groupN() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.groups)
}

func (b *mountBench) kernel() *fakeKernel {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.kernels[len(b.kernels)-1]
}

// grant attaches vol to node and lets its group fence.
func (b *mountBench) grant(node trivet.NodeID, mode meta.AccessMode, readOnly bool) {
	b.cat.must(meta.Command{Attach: &meta.Attach{Volume: vol, Node: node, Mode: mode, ReadOnly: readOnly}})
	b.fence()
}

// revoke detaches vol from every node.
func (b *mountBench) revoke() {
	b.cat.must(meta.Command{Detach: &meta.Detach{Volume: vol}})
	b.fence()
}

// fence plays the agent of the group's leader.
func (b *mountBench) fence() {
	b.cat.must(meta.Command{ReportFence: &meta.ReportFence{Volume: vol, Epoch: b.cat.volume(vol).Epoch}})
}
