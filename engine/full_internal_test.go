package engine

import (
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// smallDisk is a filesystem of a size, which says how much of it is free, and has no room for another file at its end.
type smallDisk struct {
	vfs.FS
	total int64
}

func (d *smallDisk) used() (n int64) {
	for _, dir := range []string{"disk", "disk.log"} {
		names, _ := d.List(dir) // none: nothing is there yet
		for _, name := range names {
			if st, err := d.Stat(d.PathJoin(dir, name)); err == nil && !st.IsDir() {
				n += st.Size()
			}
		}
	}
	return n
}

func (d *smallDisk) GetDiskUsage(string) (vfs.DiskUsage, error) {
	used := d.used()
	return vfs.DiskUsage{
		TotalBytes: uint64(d.total), UsedBytes: uint64(used), AvailBytes: uint64(max(d.total-used, 0)),
	}, nil
}

func (d *smallDisk) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	if d.PathDir(name) == "disk.log" && d.total-d.used() < testSegmentBytes {
		return nil, syscall.ENOSPC
	}
	return d.FS.Create(name, c)
}

// looks has the engine ask the disk, as it does every second, and tells whether so many bytes may be written.
func looks(e *Engine, n int64) bool {
	e.space.mu.Lock()
	e.space.looked = time.Time{}
	e.space.mu.Unlock()
	return e.HasRoom(n)
}

// A disk that is full for writers is not full for the cleaner: it may copy into what is kept in reserve, and what it
// empties makes room for writers again, without a restart (H26).
func TestCleaningMakesRoomOnAFullDisk(t *testing.T) {
	const segN, blockN, each = 200, 2560, 4
	mem := vfs.NewCrashableMem()
	d := &smallDisk{FS: mem, total: segN * testSegmentBytes}
	e, v := mustStore(t, logConfig(t, d, nil), blockN)
	defer func() { require.NoError(t, e.Close()) }()
	version := make([]uint32, blockN)
	put := func(x uint32, lba trivet.LBA) {
		write(t, v, x, lba, each)
		for i := range trivet.LBA(each) {
			version[lba+i] = x
		}
	}
	x := uint32(1)
	for ; x <= blockN/each; x++ {
		put(x, trivet.LBA(x-1)*each)
	}
	for rnd := rand.New(rand.NewPCG(1, 1)); looks(e, each*trivet.BlockSize); x++ { // so all segments stay half alive
		put(x, trivet.LBA(rnd.IntN(blockN/each)*each))
		require.Less(t, x, uint32(20000), "the disk never runs full")
		if x%64 == 0 {
			settle(t, v)
		}
	}
	settle(t, v)
	for i := 0; !looks(e, 4*testSegmentBytes); i++ {
		require.Less(t, i, 1000, "cleaning makes no room")
		_, err := e.Clean()
		require.NoError(t, err)
		settle(t, v)
	}
	require.NoError(t, CheckLive(e))
	requireNumbers(t, v, blockN, func(lba trivet.LBA) uint32 { return version[lba] })
	write(t, v, 9999, 0, each)
}
