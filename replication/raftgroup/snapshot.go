package raftgroup

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
)

const magicSnapshot = "trvtsnp\x01"

// snapshotRecord says up to where the state machine stands in for the log. It is all that is kept
// of a snapshot: the state machine is durable itself.
//
//	frame (encode.go) over:
//	index u64 | term u64 | machine u64 | configuration index u64 | members
type snapshotRecord struct {
	index, term uint64 // last entry that is covered
	machine     uint64 // the machine's applied index that covers it: no-ops never reach a machine
	config      groupConfig
}

func (r snapshotRecord) encode() []byte {
	b := put64(nil, r.index, r.term, r.machine, r.config.index)
	return sealFrame(magicSnapshot, putMembers(b, r.config.members))
}

func decodeSnapshot(b []byte) (snapshotRecord, []byte, error) {
	payload, rest, err := openFrame(magicSnapshot, b)
	if err != nil {
		return snapshotRecord{}, nil, err
	}
	d := decoder{b: payload}
	r := snapshotRecord{index: d.u64(), term: d.u64(), machine: d.u64()}
	r.config.index = d.u64()
	r.config.members = d.members()
	if err := d.finish("snapshot record"); err != nil {
		return snapshotRecord{}, nil, err
	}
	return r, rest, r.check()
}

// check returns ErrCorrupt unless the record can have been written by us.
func (r snapshotRecord) check() error {
	err := validateMembers(r.config.members)
	if err == nil && (r.index == 0 || r.term == 0 || r.machine > r.index ||
		r.config.index > r.index || r.config.index == 0) {
		err = fmt.Errorf("impossible order")
	}
	if err != nil {
		return fmt.Errorf("snapshot of entry %d, term %d, machine %d, configuration %d: %v: %w",
			r.index, r.term, r.machine, r.config.index, err, trivet.ErrCorrupt)
	}
	return nil
}

func (r snapshotRecord) id() string { return fmt.Sprintf("%d-%d", r.term, r.index) }

func (r snapshotRecord) meta(sizeBytes int64) *raft.SnapshotMeta {
	return &raft.SnapshotMeta{
		Version: 1, ID: r.id(), Index: r.index, Term: r.term, Size: sizeBytes,
		Configuration: toConfiguration(r.config.members), ConfigurationIndex: r.config.index,
	}
}

// snapshotStore is the library's SnapshotStore. It holds one record.
type snapshotStore struct {
	fs    vfs.FS
	dir   string
	guard *diskGuard
	fsm   *fsm

	mu  sync.Mutex
	rec snapshotRecord // zero: none
}

var _ raft.SnapshotStore = (*snapshotStore)(nil)

func openSnapshots(fs vfs.FS, dir string, guard *diskGuard) (*snapshotStore, error) {
	s := &snapshotStore{fs: fs, dir: dir, guard: guard}
	b, err := readFile(fs, dir, fileSnapshot, frameBytesMax)
	if isNotExist(err) {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	rec, rest, err := decodeSnapshot(b)
	if err == nil && len(rest) != 0 {
		err = fmt.Errorf("snapshot record: %d bytes too many: %w", len(rest), trivet.ErrCorrupt)
	}
	s.rec = rec
	return s, err
}

func (s *snapshotStore) record() snapshotRecord {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rec
}

// put replaces the record durably.
func (s *snapshotStore) put(rec snapshotRecord) error {
	if err := rec.check(); err != nil {
		return err
	}
	err := s.guard.run("write snapshot record", func() error { return writeFile(s.fs, s.dir, fileSnapshot, rec.encode()) })
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rec = rec
	return nil
}

// Create begins the record of a snapshot that was taken here.
func (s *snapshotStore) Create(version raft.SnapshotVersion, index, term uint64, configuration raft.Configuration,
	configurationIndex uint64, _ raft.Transport,
) (raft.SnapshotSink, error) {
	if version != 1 {
		return nil, fmt.Errorf("snapshot version %d: %w", version, trivet.ErrInvalid)
	}
	members, err := fromConfiguration(configuration)
	if err != nil {
		return nil, err
	}
	rec := snapshotRecord{index: index, term: term, config: groupConfig{configurationIndex, members}}
	return &snapshotSink{store: s, rec: rec}, nil
}

// List returns the one snapshot, if there is one. Its size is known only once it is open.
func (s *snapshotStore) List() ([]*raft.SnapshotMeta, error) {
	rec := s.record()
	if rec.index == 0 {
		return nil, nil
	}
	return []*raft.SnapshotMeta{rec.meta(0)}, nil
}

// Open returns the recorded snapshot, for a follower whose entries are gone, and costs nothing: the
// follower pulls the state by itself (catchup.go). The library goes on from the index in this meta once
// the transport has called it sent, not from that in its request (replication.go:370), so the transport
// gets hold of it.
func (s *snapshotStore) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	rec := s.record()
	if rec.index == 0 {
		return nil, nil, fmt.Errorf("open snapshot %s: %w", id, trivet.ErrNotFound)
	}
	meta := rec.meta(0)
	return meta, &stateOffer{meta: meta, rec: rec}, nil
}

// stateOffer is what a leader offers to a follower in place of the data of a snapshot.
type stateOffer struct {
	meta *raft.SnapshotMeta // the one that the library holds
	rec  snapshotRecord
}

// Read returns io.EOF.
func (o *stateOffer) Read([]byte) (int, error) { return 0, io.EOF }

// Close has nothing to let go.
func (o *stateOffer) Close() error { return nil }

// image pins the state machine as it is now, or what of it turns a machine with that Want into it, and
// returns what it stands for, which may lie beyond the recorded snapshot: so what a follower restores is
// never ahead of the index that it is told (H7). When nothing was applied since, the recorded index is
// kept, as it may cover no-ops. ErrUnavailable: there is no state yet, or not a whole one.
func (s *snapshotStore) image(want []byte) (Image, snapshotRecord, error) {
	img, index, term, config, err := s.fsm.pin(want)
	if err != nil {
		return nil, snapshotRecord{}, err
	}
	rec := s.record()
	if rec.index == 0 || index > rec.machine {
		rec = snapshotRecord{index: index, term: term, machine: index, config: config}
	}
	if err := rec.check(); err != nil {
		return nil, snapshotRecord{}, errors.Join(err, img.Close())
	}
	return img, rec, nil
}

// snapshotSink records one snapshot when closed.
type snapshotSink struct {
	store   *snapshotStore
	rec     snapshotRecord
	covered bool
	done    bool
}

// cover notes that the machine's durable state includes everything up to the snapshot's index.
func (k *snapshotSink) cover(machine uint64) { k.rec.machine, k.covered = machine, true }

func (k *snapshotSink) ID() string { return k.rec.id() }

// Write refuses: the image is never stored.
func (k *snapshotSink) Write([]byte) (int, error) {
	return 0, fmt.Errorf("write to snapshot %s: %w", k.rec.id(), trivet.ErrInvalid)
}

// Close writes the record. It refuses unless the state behind it was seen to be durable (H1).
func (k *snapshotSink) Close() error {
	if k.done {
		return nil
	}
	if !k.covered {
		return fmt.Errorf("snapshot %s: state is not known to be durable: %w", k.rec.id(), trivet.ErrInvalid)
	}
	k.done = true
	return k.store.put(k.rec)
}

// Cancel drops the snapshot.
func (k *snapshotSink) Cancel() error {
	k.done = true
	return nil
}
