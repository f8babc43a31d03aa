package cache

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// Locked is a mapping file that no other process has. Whoever takes a volume over does, in this order: Lock, Adopt
// with the epoch that the catalogue shows, raise the epoch, wait for its fence, Open. So two processes never both
// believe that the dirty blocks are theirs, and blocks are written back only if nobody else had the volume since.
type Locked struct {
	path string
	f    *os.File

	head  header
	there bool // head counts: some process has completed a header
	stale bool // the blocks are of an attachment that is over
}

// Lock opens the mapping file at path, making an empty one if there is none, and locks it. ErrInUse: another process
// has it. ErrInvalid, ErrCorrupt: a newer version wrote it, or it is damaged or no mapping at all; it is left alone.
// Call Close, or Open a Device, which closes it.
func Lock(path string) (*Locked, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, fmt.Errorf("lock cache: %w", err)
		}
		l := &Locked{path: path, f: f}
		ours, err := l.take()
		if err == nil && ours {
			return l, nil
		}
		_ = f.Close() // nothing was written
		if err != nil {
			return nil, fmt.Errorf("lock cache %s: %w", path, err)
		}
	}
}

// take locks the file and reads its header. False: the file was removed meanwhile. Only what is ours
// stays locked.
func (l *Locked) take() (ours bool, err error) {
	if err := unix.Flock(int(l.f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return false, fmt.Errorf("another process has it: %w", trivet.ErrInUse)
		}
		return false, err
	}
	defer func() {
		if !ours {
			_ = l.unlock() // closing tells what is wrong with the file
		}
	}()
	mine, err := l.f.Stat()
	if err != nil {
		return false, err
	}
	if now, err := os.Stat(l.path); err != nil || !os.SameFile(mine, now) {
		return false, nil //nolint:nilerr // gone: try the one that is there now
	}
	page := make([]byte, pageBytes)
	n, err := l.f.ReadAt(page, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	if l.head, l.there, err = decodeHeader(page[:n]); err != nil {
		return false, fmt.Errorf("refused, remove it by hand if nothing in it is wanted: %w", err)
	}
	if l.there && mine.Size() < fileBytes(int(l.head.slotN)) {
		return false, fmt.Errorf("refused: %d bytes, its header claims %d slots: %w", mine.Size(), l.head.slotN,
			trivet.ErrCorrupt)
	}
	return true, nil
}

// Path returns the path of the file.
func (l *Locked) Path() string { return l.path }

// Dirty returns how many bytes of acknowledged writes the file holds that were not written back.
func (l *Locked) Dirty() (int64, error) {
	if !l.there || l.head.slotN == 0 || l.head.dropped {
		return 0, nil
	}
	m, err := newMapping(l.f, int(l.head.slotN))
	if err != nil {
		return 0, fmt.Errorf("look into cache %s: %w", l.path, err)
	}
	blocks := map[trivet.LBA]bool{}
	committed := m.committed()
	for s := range int32(m.slotN) {
		if st, full, err := m.read(s, l.head.volume); full && (err != nil || st.seq <= committed) {
			blocks[st.lba] = true
		}
	}
	return int64(len(blocks)) * trivet.BlockSize, m.close()
}

// Adopt decides whose blocks the file holds. current is the epoch of the attachment of this node, read from the
// catalogue linearizably and under this lock, before it is raised. The blocks are ours to write back if they were
// written at that epoch, or if a process before us died between raising the epoch to current and opening the file:
// then nobody else can have written in between. If not, they are dropped when the file is opened (H13).
//
// ErrInvalid: the file is another volume's or cluster's, or of a later epoch than the catalogue knows. It is left
// alone.
func (l *Locked) Adopt(cluster trivet.ClusterID, volume trivet.VolumeID, current trivet.Epoch) error {
	h := &l.head
	switch {
	case !l.there:
		return nil
	case h.cluster != cluster || h.volume != volume:
		return fmt.Errorf("cache %s holds %s of cluster %s, not %s of %s; remove it by hand if nothing in it is wanted: %w",
			l.path, h.volume, h.cluster, volume, cluster, trivet.ErrInvalid)
	case h.epoch > current:
		return fmt.Errorf("cache %s is of epoch %d, the catalogue knows %d; was the catalogue restored? Remove the file by "+
			"hand if nothing in it is wanted: %w", l.path, h.epoch, current, trivet.ErrInvalid)
	case current != h.epoch && current != h.next:
		l.stale = true
		return nil
	}
	h.epoch, h.next = current, current+1
	return l.writeHeader()
}

// writeHeader makes l.head count. REQUIRES: no mapping of the file is open.
func (l *Locked) writeHeader() error {
	l.head.generation++
	b := l.head.encode()
	at := int64(l.head.generation%2) * headCopyAt
	// The order of mapping.writeHeader: magic away, the rest, magic.
	for _, w := range []struct{ from, to int64 }{{0, 0}, {8, headBytes}, {0, 8}} {
		p := b[w.from:w.to]
		if w.to == 0 {
			p = make([]byte, 8)
		}
		if _, err := l.f.WriteAt(p, at+w.from); err != nil {
			return fmt.Errorf("header of cache %s: %w", l.path, err)
		}
	}
	return nil
}

// Close unlocks the file and leaves it.
func (l *Locked) Close() error { return errors.Join(l.unlock(), l.f.Close()) }

// unlock gives the lock up, which closing alone may not: a child that is between fork and exec holds the descriptor,
// and so the lock, a moment longer.
func (l *Locked) unlock() error { return unix.Flock(int(l.f.Fd()), unix.LOCK_UN) }

// Remove removes the file and unlocks it, whatever is in it.
func (l *Locked) Remove() error {
	err := os.Remove(l.path)
	return errors.Join(err, l.Close())
}

// CheckDir returns ErrInvalid unless dir, or what there is of it, lies on a tmpfs: memory that outlives the process,
// and is gone when the machine goes down.
func CheckDir(dir string) error {
	for at := dir; ; at = filepath.Dir(at) {
		var st unix.Statfs_t
		err := unix.Statfs(at, &st)
		if errors.Is(err, unix.ENOENT) && at != filepath.Dir(at) {
			continue
		}
		if err != nil {
			return fmt.Errorf("cache directory %s: %w", dir, err)
		}
		if st.Type != unix.TMPFS_MAGIC {
			return fmt.Errorf("cache directory %s is not on a tmpfs: %w", dir, trivet.ErrInvalid)
		}
		return nil
	}
}
