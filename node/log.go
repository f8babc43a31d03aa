package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/engine/segment"
)

// The log of a disk is made under logTmpDir, and gets its name once the superblock is written: so a crash
// while formatting leaves nothing that could be taken for a disk, and a disk without logDir and logTmpDir
// has lost its log.
const (
	logDir    = "log"
	logTmpDir = "log.tmp"
)

// The shape of a log. Four lanes wrote 14 % more small entries than one on the disk where it was measured
// (docs of engine/segment; design, section 8), and a recovery reads one segment of each. 64 MiB hold the state of
// 800 000 entries, and rolls are rare; 8 MiB are the least that takes the largest entry of a group.
const (
	logLanesMax        = 4
	logSegmentBytesMin = 8 << 20
	logSegmentBytesMax = 64 << 20

	// logFilesN is how many files a lane has at least while it works: the current segment, the next, and one
	// of which entries are still kept. All lanes together may take the logShare-th part of the disk for them.
	logFilesN = 3
	logShare  = 10
)

// logShape returns lanes and segment size for a filesystem of totalBytes: as large as its share allows, with
// fewer lanes only where even the smallest segments would pass it. The data lane comes on top of lanes, and counts.
func logShape(totalBytes int64) (lanes int, segmentBytes int64) {
	budget := totalBytes / logShare / logFilesN
	for lanes = logLanesMax; lanes > 1 && int64(lanes+1)*logSegmentBytesMin > budget; {
		lanes /= 2
	}
	segmentBytes = logSegmentBytesMin
	for segmentBytes < logSegmentBytesMax && 2*segmentBytes*int64(lanes+1) <= budget {
		segmentBytes *= 2
	}
	return lanes, segmentBytes
}

// formatLog makes the log of a new disk. What a crash left of an earlier one is removed.
func formatLog(cfg *DiskConfig, id trivet.DiskID) error {
	usage, err := vfs.Default.GetDiskUsage(cfg.Dir)
	if err != nil {
		return fmt.Errorf("size of the filesystem: %w", err)
	}
	lanes, segmentBytes := logShape(int64(usage.TotalBytes))
	if cfg.LogLanes != 0 {
		lanes = cfg.LogLanes
	}
	if cfg.LogSegmentBytes != 0 {
		segmentBytes = cfg.LogSegmentBytes
	}
	dir := filepath.Join(cfg.Dir, logTmpDir)
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return segment.Format(segment.Options{
		Dir: segment.NewOSDir(dir), Disk: id, Lanes: lanes, SegmentBytes: segmentBytes, DataLane: true,
	})
}

// placeLog gives the log its name, durably, if a crash has kept FormatDisk from it.
func placeLog(dir string) error {
	err := os.Rename(filepath.Join(dir, logTmpDir), filepath.Join(dir, logDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return syncDir(dir)
}

// openLog recovers the log of a disk, and holds its segments until the engine opens. Its first failure is the
// process's (H28).
func openLog(cfg *DiskConfig, id trivet.DiskID) (*segment.Log, error) {
	if err := placeLog(cfg.Dir); err != nil {
		return nil, err
	}
	dir := filepath.Join(cfg.Dir, logDir)
	usage, err := vfs.Default.GetDiskUsage(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("size of the filesystem: %w", err)
	}
	// The engine refers to blocks in it: nothing is recycled before it has pinned them.
	files := segment.NewOSDir(dir)
	log, err := segment.Open(segment.Options{
		Dir: files, Room: files.Leave(engine.LogLeaves(int64(usage.TotalBytes))), Disk: id, Hold: true, Fatal: cfg.Fatal,
	})
	switch {
	case errors.Is(err, trivet.ErrNotFound):
		return nil, fmt.Errorf("its log is gone from %s; its replicas have forgotten their votes, so empty this disk and "+
			"format it anew, and they will be replaced: %v: %w", dir, err, trivet.ErrCorrupt)
	case errors.Is(err, trivet.ErrCorrupt):
		return nil, fmt.Errorf("its log in %s is damaged; empty this disk and format it anew, and its replicas will be "+
			"replaced: %w", dir, err)
	}
	return log, err
}
