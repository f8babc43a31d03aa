package main

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/engine/segment"
)

const (
	volumeID  = trivet.VolumeID(1)
	replicaID = trivet.ReplicaID("00000000-0000-4000-8000-000000000001")
	diskID    = trivet.DiskID("00000000-0000-4000-8000-000000000002")

	// retainedBytes of entries stay in the log behind what is durable, and it is cut each time that so many were
	// written, as raftgroup does.
	retainedBytes = 64 << 20

	// snapshotsMax of a volume, with the clone's own.
	snapshotsMax = engine.SnapshotsMax
)

// storeConfig says what kind of store is opened.
type storeConfig struct {
	dir          string
	refs         bool // blocks are references into the log, else values of the map
	manual       bool // cleaning and sweeping only when asked
	segmentBytes int64
}

// store is a log and an engine on it.
type store struct {
	cfg     storeConfig
	log     *segment.Log
	eng     *engine.Engine
	logTook time.Duration // to open it
	engTook time.Duration
}

func openStore(cfg storeConfig) (*store, error) {
	opts := segment.Options{
		Dir: segment.NewOSDir(filepath.Join(cfg.dir, "log")), Disk: diskID, Lanes: 4, SegmentBytes: cfg.segmentBytes,
		DataLane: cfg.refs, Hold: cfg.refs,
	}
	s, began := &store{cfg: cfg}, time.Now()
	var err error
	s.log, err = segment.Open(opts)
	if errors.Is(err, trivet.ErrNotFound) {
		if err = segment.Format(opts); err == nil {
			s.log, err = segment.Open(opts)
		}
	}
	if err != nil {
		return nil, err
	}
	s.logTook, began = time.Since(began), time.Now()
	c := engine.Config{Dir: filepath.Join(cfg.dir, "engine"), Fatal: func(err error) { panic(err) }}
	if cfg.refs {
		c.Log = s.log
	}
	if cfg.manual {
		c.CleanTarget, c.SweepRate = -1, -1
	}
	if s.eng, err = engine.Open(c); err != nil {
		return nil, errors.Join(err, s.log.Close())
	}
	s.engTook = time.Since(began)
	return s, nil
}

func (s *store) close() error { return errors.Join(s.eng.Close(), s.log.Close()) }

// replica opens a volume, which is made when it is not there.
func (s *store) replica(id trivet.VolumeID, sizeBytes int64) (*replica, error) {
	v, err := s.eng.OpenVolume(id)
	if errors.Is(err, trivet.ErrNotFound) {
		if err = s.eng.CreateVolume(id, replicaID, sizeBytes); err == nil {
			v, err = s.eng.OpenVolume(id)
		}
	}
	if err != nil {
		return nil, err
	}
	return &replica{s: s, vol: v, grp: s.log.Group(id), st: v.State(), blockN: sizeBytes / trivet.BlockSize}, nil
}

// openOne opens a store and its one volume.
func openOne(cfg storeConfig, sizeBytes int64) (*store, *replica, error) {
	s, err := openStore(cfg)
	if err != nil {
		return nil, nil, err
	}
	r, err := s.replica(volumeID, sizeBytes)
	if err != nil {
		return nil, nil, errors.Join(err, s.close())
	}
	return s, r, nil
}

// settle has cleaning do all that it still owes.
func (s *store) settle() error {
	for range 64 {
		stats, err := s.eng.Clean()
		if err != nil || stats.CopiedBytes == 0 {
			return err
		}
	}
	return nil
}

// trim has the log give back the files that nobody needs, as the background does in the minutes after.
func (s *store) trim() error {
	for left := int64(1); left > 0; {
		var err error
		if _, left, err = s.log.Trim(); err != nil {
			return err
		}
	}
	return nil
}

// calm waits, for a while, until the map is not merged any more.
func (s *store) calm() {
	for range 50 {
		n := s.eng.WrittenBytes()
		time.Sleep(100 * time.Millisecond)
		if s.eng.WrittenBytes() == n {
			return
		}
	}
}

// written is what the log and the map have written, in bytes.
func (s *store) written() int64 {
	n := s.eng.WrittenBytes()
	for _, l := range s.log.Stats() {
		n += l.WrittenBytes
	}
	return n
}

// cleaned is what cleaning has copied, in bytes.
func (s *store) cleaned() (n int64) {
	for _, l := range s.log.Stats() {
		n += l.StoredBytes
	}
	return n
}

// files is what they take, in bytes.
func (s *store) files() (n int64, err error) {
	err = filepath.WalkDir(s.cfg.dir, func(_ string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			var info fs.FileInfo
			if info, err = e.Info(); err == nil {
				n += info.Size()
			}
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // compacted away meanwhile
		}
		return err
	})
	return n, err
}

// replica applies entries to a volume, as a replica does.
type replica struct {
	s      *store
	vol    *engine.Volume
	grp    *segment.Group
	st     engine.State
	blockN int64
	trimAt uint64
	one    [1]segment.Entry
}

// entry logs one entry with blocks at lbas, and applies it.
func (r *replica) entry(lbas []trivet.LBA, payload []byte) error {
	index := r.st.AppliedIndex + 1
	payload = payload[:len(lbas)*trivet.BlockSize]
	r.one[0] = segment.Entry{Index: index, Term: 1, Payload: payload}
	if err := r.grp.Append(r.one[:]); err != nil {
		return err
	}
	b := r.vol.NewBatch()
	if err := r.refer(b, index, lbas, payload); err != nil {
		return errors.Join(err, b.Close())
	}
	return r.commit(b, index)
}

// refer adds an entry's blocks to a batch, each run of them at once.
func (r *replica) refer(b *engine.Batch, index uint64, lbas []trivet.LBA, payload []byte) error {
	at, err := r.grp.Locate(index)
	if err != nil {
		return err
	}
	defer r.s.log.Unpin(at.Segment)
	return r.referAt(b, at, lbas, payload)
}

func (r *replica) referAt(b *engine.Batch, at segment.Place, lbas []trivet.LBA, payload []byte) error {
	if !r.s.cfg.refs {
		at.Bytes = 0
	}
	for i := 0; i < len(lbas); {
		n := 1
		for i+n < len(lbas) && lbas[i+n] == lbas[i]+trivet.LBA(n) {
			n++
		}
		from, to := i*trivet.BlockSize, (i+n)*trivet.BlockSize
		if err := b.Refer(lbas[i], payload[from:to], at, int64(from)); err != nil {
			return err
		}
		i += n
	}
	return nil
}

// commit ends a batch of entries up to index.
func (r *replica) commit(b *engine.Batch, index uint64) error {
	st := r.st
	st.AppliedIndex, st.AppliedTerm = index, 1
	if err := b.Commit(st); err != nil {
		return err
	}
	r.st = st
	return nil
}

// write logs and applies entries until n blocks are written, and has them on the disk.
func (r *replica) write(n int64, entryBlocks int, next places, bufs [][]byte) (done int64, err error) {
	if done, err = r.entries(n, entryBlocks, next, bufs); err != nil {
		return done, err
	}
	return done, r.s.eng.Flush()
}

// entries logs and applies entries until n blocks are written, and cuts the log as it goes.
func (r *replica) entries(n int64, entryBlocks int, next places, bufs [][]byte) (done int64, err error) {
	lbas := make([]trivet.LBA, entryBlocks)
	every := retainedN(entryBlocks)
	for i := 0; done < n; i++ {
		next(lbas)
		if err := r.entry(lbas, bufs[i%len(bufs)]); err != nil {
			return done, err
		}
		done += int64(entryBlocks)
		if r.st.AppliedIndex >= r.trimAt+every {
			r.trimAt = r.st.AppliedIndex
			if err := r.trim(r.trimAt, every); err != nil {
				return done, err
			}
		}
	}
	return done, nil
}

// retainedN is how many entries make retainedBytes.
func retainedN(entryBlocks int) uint64 {
	return uint64(max(retainedBytes/(entryBlocks*trivet.BlockSize), 1))
}

// trim flushes the map and cuts the log, but for so many entries.
func (r *replica) trim(index, retained uint64) error {
	if err := r.s.eng.Flush(); err != nil {
		return err
	}
	if index <= retained {
		return nil
	}
	return r.grp.TrimPrefix(index - retained)
}

// freeze logs an entry that takes a snapshot, and returns how long it takes to apply that.
func (r *replica) freeze() (time.Duration, error) {
	st := r.st
	st.Snapshots = append(st.Snapshots, engine.Snapshot{ID: uint64(st.Generation) + 1, Generation: st.Generation})
	st.Generation++
	st.AppliedIndex++
	st.AppliedTerm = 1
	r.one[0] = segment.Entry{Index: st.AppliedIndex, Term: 1, Data: []byte("freeze")}
	if err := r.grp.Append(r.one[:]); err != nil {
		return 0, err
	}
	began := time.Now()
	if err := r.vol.NewBatch().Commit(st); err != nil {
		return 0, fmt.Errorf("snapshot %d: %w", len(st.Snapshots), err)
	}
	r.st = st
	return time.Since(began), nil
}
