package raftgroup

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
)

// A snapshot from the leader never passes through the library, which would leave a log in memory
// that the disk no longer has (D6), and a record of a restore that may not have happened (H5).
// Instead:
//
//  1. the image is spooled to a file while the group runs on;
//  2. the library is stopped;
//  3. the complete file gets its name, durably: from here on the restore will be finished, by Open
//     if need be;
//  4. the state machine is restored, the snapshot recorded, the log emptied, the file removed;
//  5. the library starts afresh, and only now the leader hears of success.
//
// An entry of the log that this replica may have acknowledged is never dropped: if the log holds
// the snapshot's last entry, the log stays and the image is not even asked for.
//
//	frame (encode.go) over term u64, size u64, and the snapshot record's own frame
//	image, size bytes
//	crc32c of the image u32

const magicInstall = "trvtins\x01"

// spool is an image that arrives.
type spool struct {
	id     uint64
	sender raft.ServerAddress
	begin  snapshotBegin
	f      vfs.File
	have   int64
	sum    uint32
}

// installer holds the one transfer that a group may receive at a time.
type installer struct {
	mu    sync.Mutex // held over disk I/O, and over a restore
	last  uint64
	spool *spool
}

func (b snapshotBegin) header() []byte {
	return sealFrame(magicInstall, append(put64(nil, b.term, uint64(b.sizeBytes)), b.rec.encode()...))
}

func decodeInstallHeader(raw []byte) (snapshotBegin, int, error) {
	payload, rest, err := openFrame(magicInstall, raw)
	if err != nil {
		return snapshotBegin{}, 0, err
	}
	d := decoder{b: payload}
	b := snapshotBegin{term: d.u64(), sizeBytes: int64(d.u64())}
	b.rec, d.b, err = decodeSnapshot(d.b)
	if err == nil {
		err = d.finish("install header")
	}
	if err == nil && (b.sizeBytes < 0 || b.rec.term > b.term) {
		err = fmt.Errorf("install header: %d bytes, term %d: %w", b.sizeBytes, b.term, trivet.ErrCorrupt)
	}
	return b, len(raw) - len(rest), err
}

// have reports whether the log and state of this replica include the snapshot already.
func (g *Group) have(rec snapshotRecord) bool {
	if applied, _ := g.cfg.Machine.Applied(); applied >= rec.machine && applied > 0 && g.coveredBy(applied) >= rec.index {
		return true
	}
	term, ok := g.seglog.term(rec.index)
	return ok && term == rec.term
}

// coveredBy returns the highest index known to be applied when the machine's is applied.
func (g *Group) coveredBy(applied uint64) uint64 {
	if rec := g.snaps.record(); applied >= rec.machine {
		return max(applied, rec.index)
	}
	return applied
}

// onSnapshotBegin opens a transfer, or answers for good: yes when nothing is missing here, no when
// the leader is an old one.
func (g *Group) onSnapshotBegin(sender raft.ServerAddress, body []byte) ([]byte, error) {
	b, err := decodeSnapshotBegin(body)
	if err != nil {
		return nil, err
	}
	if !g.install.mu.TryLock() {
		return nil, fmt.Errorf("another snapshot is being restored: %w", trivet.ErrPending)
	}
	defer g.install.mu.Unlock()
	term := g.stable.record().term
	if b.term < term {
		return verdict{term: term}.encode(), nil
	}
	if g.have(b.rec) {
		return verdict{term: b.term, yes: true}.encode(), nil
	}
	if err := g.dropSpoolLocked(); err != nil {
		return nil, err
	}
	f, err := g.cfg.FS.Create(g.path(fileInstall+tmpSuffix), writeCategory)
	if err != nil {
		return nil, err
	}
	g.install.last++
	s := &spool{id: g.install.last, sender: sender, begin: b, f: f}
	g.install.spool = s
	if _, err := f.Write(b.header()); err != nil {
		return nil, errors.Join(err, g.dropSpoolLocked())
	}
	g.log.Info("snapshot arrives", "from", string(sender), "index", b.rec.index, "term", b.rec.term, "bytes", b.sizeBytes)
	return verdict{term: b.term, id: s.id}.encode(), nil
}

func (g *Group) dropSpoolLocked() error {
	s := g.install.spool
	if s == nil {
		return nil
	}
	g.install.spool = nil
	return errors.Join(s.f.Close(), removeFile(g.cfg.FS, g.cfg.Dir, fileInstall+tmpSuffix))
}

// currentSpool returns the transfer of that sender and number. REQUIRES: install.mu.
func (g *Group) currentSpool(sender raft.ServerAddress, id uint64) (*spool, error) {
	s := g.install.spool
	if s == nil || s.id != id || s.sender != sender {
		return nil, fmt.Errorf("transfer %d from %s is not the current one: %w", id, sender, trivet.ErrNotFound)
	}
	return s, nil
}

func (g *Group) onSnapshotChunk(sender raft.ServerAddress, body []byte) ([]byte, error) {
	c, err := decodeSnapshotChunk(body)
	if err != nil {
		return nil, err
	}
	if !g.install.mu.TryLock() {
		return nil, fmt.Errorf("another snapshot is being restored: %w", trivet.ErrPending)
	}
	defer g.install.mu.Unlock()
	s, err := g.currentSpool(sender, c.id)
	if err != nil {
		return nil, err
	}
	if c.offset != s.have {
		return nil, fmt.Errorf("chunk of %d bytes at %d, have %d: %w", len(c.data), c.offset, s.have, trivet.ErrInvalid)
	}
	s.sum = crc32.Update(s.sum, crcTable(), c.data)
	if _, err := s.f.Write(c.data); err != nil {
		return nil, errors.Join(err, g.dropSpoolLocked())
	}
	s.have += int64(len(c.data))
	return verdict{term: s.begin.term, yes: true}.encode(), nil
}

// onSnapshotEnd restores the image. It runs to its end whether or not the caller still waits.
func (g *Group) onSnapshotEnd(sender raft.ServerAddress, body []byte) ([]byte, error) {
	e, err := decodeSnapshotEnd(body)
	if err != nil {
		return nil, err
	}
	if !g.install.mu.TryLock() {
		return nil, fmt.Errorf("another snapshot is being restored: %w", trivet.ErrPending)
	}
	defer g.install.mu.Unlock()
	s, err := g.currentSpool(sender, e.id)
	if err != nil {
		return nil, err
	}
	if s.sum != e.sum {
		return nil, errors.Join(fmt.Errorf("image of %d bytes has checksum %08x, sent %08x: %w",
			s.have, s.sum, e.sum, trivet.ErrCorrupt), g.dropSpoolLocked())
	}
	s.begin.sizeBytes = s.have // announced was an estimate
	if _, err := s.f.WriteAt(s.begin.header(), 0); err != nil {
		return nil, errors.Join(err, g.dropSpoolLocked())
	}
	if _, err := s.f.Write(put32(nil, s.sum)); err != nil {
		return nil, errors.Join(err, g.dropSpoolLocked())
	}
	if err := s.f.Sync(); err != nil {
		return nil, errors.Join(err, g.dropSpoolLocked())
	}
	v, err := g.restart(func() (verdict, error) { return g.installSpool(s) })
	if err != nil {
		return nil, err
	}
	return v.encode(), nil
}

// installSpool runs while the library is stopped. REQUIRES: install.mu.
func (g *Group) installSpool(s *spool) (verdict, error) {
	// Term, log and state may have moved while the image arrived.
	if term := g.stable.record().term; s.begin.term < term {
		return verdict{term: term}, g.dropSpoolLocked()
	}
	v := verdict{term: s.begin.term, yes: true}
	if g.have(s.begin.rec) {
		return v, g.dropSpoolLocked()
	}
	g.install.spool = nil
	if err := s.f.Close(); err != nil {
		return verdict{}, err
	}
	if err := g.cfg.FS.Rename(g.path(fileInstall+tmpSuffix), g.path(fileInstall)); err != nil {
		return verdict{}, err
	}
	if err := syncDir(g.cfg.FS, g.cfg.Dir); err != nil {
		return verdict{}, err
	}
	return v, g.finishInstall()
}

// finishInstall does step 4, and does nothing when no restore is due. It may be repeated after a
// crash at any point. REQUIRES: the library is stopped.
func (g *Group) finishInstall() error {
	f, err := g.cfg.FS.Open(g.path(fileInstall))
	if isNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	b, err := g.restoreFrom(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("restore the received snapshot: %w", err)
	}
	if err := g.stable.setTerm(b.term); err != nil {
		return err
	}
	if g.snaps.record().index != b.rec.index {
		if err := g.snaps.put(b.rec); err != nil {
			return err
		}
	}
	if term, ok := g.seglog.term(b.rec.index); !ok || term != b.rec.term {
		if err := g.store.install(b.rec.index, b.rec.config); err != nil {
			return err
		}
	}
	g.fsm.setConfig(b.rec.config)
	g.log.Info("snapshot restored", "index", b.rec.index, "term", b.rec.term, "bytes", b.sizeBytes)
	return removeFile(g.cfg.FS, g.cfg.Dir, fileInstall)
}

// restoreFrom checks the whole file before it lets the state machine drop what it has.
func (g *Group) restoreFrom(f vfs.File) (snapshotBegin, error) {
	head := make([]byte, frameBytesMax)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return snapshotBegin{}, err
	}
	b, headBytes, err := decodeInstallHeader(head[:n])
	if err != nil {
		return snapshotBegin{}, err
	}
	image := func() *io.SectionReader { return io.NewSectionReader(f, int64(headBytes), b.sizeBytes) }
	hash := crc32.New(crcTable())
	if n, err := io.Copy(hash, image()); err != nil {
		return snapshotBegin{}, err
	} else if n != b.sizeBytes {
		return snapshotBegin{}, fmt.Errorf("image has %d of %d bytes: %w", n, b.sizeBytes, trivet.ErrCorrupt)
	}
	var tail [4]byte
	if err := readFull(f, tail[:], int64(headBytes)+b.sizeBytes); err != nil {
		return snapshotBegin{}, err
	}
	if sum := binary.LittleEndian.Uint32(tail[:]); sum != hash.Sum32() {
		return snapshotBegin{}, fmt.Errorf("image: checksum %08x, stored %08x: %w", hash.Sum32(), sum, trivet.ErrCorrupt)
	}
	if index, _ := g.cfg.Machine.Applied(); index == b.rec.machine && !g.cfg.Machine.Restoring() {
		return b, nil // a crash came after the restore
	}
	if err := g.cfg.Machine.Restore(image()); err != nil {
		return snapshotBegin{}, err
	}
	if index, _ := g.cfg.Machine.Applied(); index != b.rec.machine || g.cfg.Machine.Restoring() {
		return snapshotBegin{}, fmt.Errorf("restored state is at index %d, want %d: %w",
			index, b.rec.machine, trivet.ErrCorrupt)
	}
	return b, nil
}
