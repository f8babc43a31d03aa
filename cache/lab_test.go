package cache_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/cache"
	"github.com/trivet-csi/trivet/internal/faultdev"
)

const (
	cluster = trivet.ClusterID("11111111-2222-4333-8444-555555555555")
	volume  = trivet.VolumeID(0x7)
	small   = 512 << 10
)

// tmpfsDir returns a directory of its own on a tmpfs, or one on disk where there is none.
func tmpfsDir(t testing.TB) string {
	t.Helper()
	if cache.CheckDir("/dev/shm") != nil {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp("/dev/shm", "trivet-cache-test-")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func config(mode cache.Mode, bytes int64) cache.Config {
	return cache.Config{
		Cluster: cluster, Volume: volume, Epoch: 1, Settings: cache.Settings{Mode: mode, Bytes: bytes},
		Deadline: time.Hour, // so that tests say when
	}
}

// open opens a cache in front of next as a process would whose catalogue shows cfg.Epoch.
func open(t testing.TB, path string, next trivet.Device, cfg cache.Config) *cache.Device {
	t.Helper()
	l, err := cache.Lock(path)
	require.NoError(t, err)
	require.NoError(t, l.Adopt(cfg.Cluster, cfg.Volume, cfg.Epoch))
	d, err := cache.Open(next, l, cfg)
	require.NoError(t, err)
	return d
}

func file(t testing.TB) string {
	t.Helper()
	return filepath.Join(tmpfsDir(t), volume.String()+".cache")
}

// lab is a cache over a faulty disk in memory.
type lab struct {
	t    testing.TB
	path string
	mem  *faultdev.Mem
	disk *faultdev.Device
	*cache.Device
}

func newLab(t testing.TB, cfg cache.Config) *lab {
	t.Helper()
	l := &lab{t: t, path: file(t), mem: faultdev.NewMem(8 << 20)}
	l.disk = faultdev.Wrap(l.mem)
	l.Device = open(t, l.path, l.disk, cfg)
	t.Cleanup(func() { _ = l.Abandon() })
	return l
}

func block(b byte) []byte { return blocks(b, 1) }

func blocks(b byte, n int) []byte {
	p := make([]byte, n*trivet.BlockSize)
	for i := range p {
		p[i] = b
	}
	return p
}

func (l *lab) write(lba int64, b byte, n int) {
	l.t.Helper()
	require.NoError(l.t, l.WriteAt(context.Background(), blocks(b, n), lba*trivet.BlockSize))
}

// holds asserts what a block of dev reads as.
func holds(t testing.TB, dev trivet.Device, lba int64, want byte) {
	t.Helper()
	p := make([]byte, trivet.BlockSize)
	require.NoError(t, dev.ReadAt(context.Background(), p, lba*trivet.BlockSize))
	require.Equal(t, block(want), p, "block %d holds %d, not %d", lba, p[0], want)
}
