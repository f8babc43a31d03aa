package controller

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// The catalogue's log is its own, in its own directory, and not a part of a data disk's. A node may lose any
// of its data disks, and one that is taken out or replaced, without losing its member of the meta group;
// on a data disk's log the member would die with that disk, and its state, which is here, with it (H4).
// One small lane is enough for the few commands of a catalogue; 8 MiB take the largest entry.
const (
	logDir                 = "log"
	logLanes               = 1
	logSegmentBytesDefault = 8 << 20
)

// withLog is groupConfig with the open log. It makes the log for a group that was never created, and for no
// other: a lost log has forgotten votes (H10). REQUIRES: openMu.
func (c *Catalogue) withLog(id identity) (raftgroup.Config, error) {
	cfg := c.groupConfig(id)
	c.mu.Lock()
	closed := c.closed
	c.mu.Unlock()
	if closed {
		return cfg, trivet.ErrClosed
	}
	if c.metaLog == nil {
		l, err := c.openLog(id, cfg)
		if err != nil {
			return cfg, fmt.Errorf("log of the catalogue: %w", err)
		}
		c.metaLog = l
	}
	cfg.Log = c.metaLog
	return cfg, nil
}

func (c *Catalogue) openLog(id identity, cfg raftgroup.Config) (*segment.Log, error) {
	path := c.cfg.FS.PathJoin(c.cfg.Dir, logDir)
	opts := segment.Options{
		Dir: raftgroup.LogDir(c.cfg.FS, path), Disk: trivet.DiskID(id.Replica), Fatal: c.cfg.Fatal,
		Lanes: logLanes, SegmentBytes: c.cfg.LogSegmentBytes,
	}
	l, err := segment.Open(opts)
	if !errors.Is(err, trivet.ErrNotFound) {
		return l, err
	}
	created, existsErr := raftgroup.Exists(cfg)
	if existsErr != nil {
		return nil, existsErr
	}
	if created {
		return nil, fmt.Errorf("it is gone from %s; this member has forgotten its votes, so remove %s, and the node joins "+
			"anew: %v: %w", path, c.cfg.Dir, err, trivet.ErrCorrupt)
	}
	if err := formatLog(c.cfg.FS, path, opts); err != nil {
		return nil, err
	}
	return segment.Open(opts)
}

// formatLog makes the log under another name first: what a crash leaves of it is not taken for a log.
func formatLog(fsys vfs.FS, path string, opts segment.Options) error {
	tmp := path + tmpSuffix
	if err := fsys.RemoveAll(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	opts.Dir = raftgroup.LogDir(fsys, tmp)
	if err := segment.Format(opts); err != nil {
		return err
	}
	if err := fsys.Rename(tmp, path); err != nil {
		return err
	}
	return syncDir(fsys, fsys.PathDir(path))
}
