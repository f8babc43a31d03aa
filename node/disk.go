package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/engine/segment"
	"github.com/trivet-csi/trivet/replication"
)

// The files of a disk's directory. Everything below engine belongs to package engine, below log to
// engine/segment, below groups to package replication; the server may keep other folders beside them.
const (
	superblockFile = "superblock"
	lockFile       = "lock"
	engineDir      = "engine"
)

const bootIDFile = "/proc/sys/kernel/random/boot_id"

// DiskConfig says which directory is a disk, and whose it must be.
type DiskConfig struct {
	Dir        string           // absolute; one filesystem, given to Trivet alone
	Cluster    trivet.ClusterID // of this server
	Node       trivet.NodeID    // of this server
	CacheBytes int64            // block cache of the engine; 0 = the engine's default
	// LogLanes and LogSegmentBytes are the shape of the log that FormatDisk makes: it takes two to three
	// segments for each lane, and more while groups are far behind. 0 = by the size of the filesystem (log.go).
	LogLanes        int
	LogSegmentBytes int64
	// CleanTarget is the share of the log's segments that live blocks should take (engine.Config). 0 = 0.7.
	CleanTarget float64
	Logger      *slog.Logger // nil discards
	// Fatal is called when the disk must not be used any more: an I/O error, or another process on
	// it. The process has to stop. REQUIRES: not nil for OpenDisk.
	Fatal func(error)
}

// Validate names the field that is missing or malformed.
func (c *DiskConfig) Validate() error {
	if !filepath.IsAbs(c.Dir) || filepath.Clean(c.Dir) != c.Dir || c.Dir == "/" {
		return fmt.Errorf("disk directory %q: want a clean absolute path: %w", c.Dir, trivet.ErrInvalid)
	}
	if err := trivet.ValidateUUID(string(c.Cluster)); err != nil {
		return fmt.Errorf("cluster of disk %s: %w", c.Dir, err)
	}
	if err := trivet.ValidateNodeID(string(c.Node)); err != nil {
		return fmt.Errorf("node of disk %s: %w", c.Dir, err)
	}
	return nil
}

// Disk is an opened disk: its directory is locked against other processes, its log and its engine run.
// It is safe for concurrent use.
type Disk struct {
	id     trivet.DiskID
	dir    string
	place  place
	lock   *os.File
	holder holder
	log    *segment.Log
	engine *engine.Engine
	damage damages
	share  *diskShare
}

// holder is what the lock file says of the process that has the disk. It is there for the error
// message and as a second line behind flock, which some network filesystems do not honour between
// machines: whoever overwrites it is noticed by Verify (I9).
type holder struct {
	Boot    string        `json:"boot"` // boot ID of the machine
	Node    trivet.NodeID `json:"node"`
	PID     int           `json:"pid"`
	Process string        `json:"process"` // UUID drawn when the disk was opened
}

// FormatDisk makes an empty directory a disk with a new ID and returns it. The directory may hold
// lost+found and nothing else; it is not made. A directory that is a disk already gives ErrExists,
// one with other content ErrInvalid: Trivet never formats what it has not been given empty, so that
// a lost mount or a wrong path does not turn into a fresh disk (H10).
func FormatDisk(cfg DiskConfig) (trivet.DiskID, error) {
	if err := cfg.Validate(); err != nil {
		return "", fmt.Errorf("format disk: %w", err)
	}
	lock, err := lockDisk(cfg.Dir)
	if err != nil {
		return "", fmt.Errorf("format disk %s: %w", cfg.Dir, err)
	}
	defer unlockDisk(lock) //nolint:errcheck // nothing was written through it
	if err := checkFormattable(cfg.Dir); err != nil {
		return "", fmt.Errorf("format disk %s: %w", cfg.Dir, err)
	}
	sb := superblock{
		Cluster: cfg.Cluster, Node: cfg.Node, Disk: trivet.DiskID(trivet.NewUUID()),
		Formatted: time.Now().UTC().Truncate(time.Second),
	}
	err = formatLog(&cfg, sb.Disk)
	if err == nil {
		err = writeSuperblock(cfg.Dir, &sb)
	}
	if err == nil {
		err = placeLog(cfg.Dir)
	}
	if err != nil {
		return "", fmt.Errorf("format disk %s: %w", cfg.Dir, err)
	}
	return sb.Disk, nil
}

func checkFormattable(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.Name() == superblockFile }) {
		return fmt.Errorf("it is a disk already: %w", trivet.ErrExists)
	}
	for _, e := range entries {
		switch e.Name() {
		case lockFile, superblockFile + ".tmp", logTmpDir, "lost+found":
		default:
			return fmt.Errorf("it is not empty (it holds %q); give an empty directory, or check that the right "+
				"filesystem is mounted there: %w", e.Name(), trivet.ErrInvalid)
		}
	}
	return nil
}

// writeSuperblock fills in sb.Place and writes the file atomically and durably. The inode of the
// temporary file is that of the final one, since a rename keeps it.
func writeSuperblock(dir string, sb *superblock) error {
	tmp := filepath.Join(dir, superblockFile+".tmp")
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // closed and checked below; this one covers early returns
	if sb.Place, err = placeOf(dir, tmp); err != nil {
		return err
	}
	b, err := sb.encode()
	if err != nil {
		return err
	}
	if _, err := f.Write(b); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(tmp, filepath.Join(dir, superblockFile)); err != nil {
		return err
	}
	return syncDir(dir)
}

// OpenDisk locks the disk, checks that it is this node's and in its place, and opens its log and its engine.
// Every error says what the operator should do. ErrNotFound: the directory is not formatted;
// ErrInUse: another process has it; ErrInvalid: it belongs to another cluster or node, or is a copy;
// ErrCorrupt: its superblock is damaged, or its log is, or is gone.
func OpenDisk(cfg DiskConfig) (*Disk, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("open disk: %w", err)
	}
	if cfg.Fatal == nil {
		return nil, fmt.Errorf("open disk %s: Fatal is not set: %w", cfg.Dir, trivet.ErrInvalid)
	}
	d, err := openDisk(cfg)
	if err != nil {
		return nil, fmt.Errorf("open disk %s: %w", cfg.Dir, err)
	}
	return d, nil
}

func openDisk(cfg DiskConfig) (*Disk, error) {
	// Look before locking: locking makes the lock file, and a directory that is not ours stays
	// untouched.
	sb, err := readSuperblock(cfg.Dir)
	if err != nil {
		return nil, err
	}
	if err := sb.checkOwner(cfg); err != nil {
		return nil, err
	}
	lock, err := lockDisk(cfg.Dir)
	if err != nil {
		return nil, err
	}
	d := &Disk{id: sb.Disk, dir: cfg.Dir, place: sb.Place, lock: lock, share: newDiskShare()}
	if err := d.start(cfg); err != nil {
		_ = unlockDisk(lock) // the first error counts
		return nil, err
	}
	return d, nil
}

func (d *Disk) start(cfg DiskConfig) error {
	if err := d.checkPlace(); err != nil {
		return err
	}
	if err := d.writeHolder(cfg.Node); err != nil {
		return err
	}
	log, err := openLog(&cfg, d.id)
	if err != nil {
		return err
	}
	e, err := engine.Open(engine.Config{
		FS: vfs.Default, Dir: filepath.Join(d.dir, engineDir), CacheBytes: cfg.CacheBytes, Log: log,
		CleanTarget: cfg.CleanTarget, Background: d.share.Background,
		Logger: loggerOr(cfg.Logger).With("disk", d.id), Fatal: cfg.Fatal, OnCorruption: d.damage.add,
	})
	if err != nil {
		return errors.Join(err, log.Close())
	}
	d.log, d.engine = log, e
	return nil
}

func readSuperblock(dir string) (*superblock, error) {
	b, err := os.ReadFile(filepath.Join(dir, superblockFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("it has no superblock; if this is a new disk, format it; if it is not, its content is "+
			"gone or its filesystem is not mounted: %w", trivet.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return decodeSuperblock(b)
}

func (s *superblock) checkOwner(cfg DiskConfig) error {
	if s.Cluster != cfg.Cluster {
		return fmt.Errorf("disk %s belongs to cluster %s, this server to %s; give this server a disk of its own: %w",
			s.Disk, s.Cluster, cfg.Cluster, trivet.ErrInvalid)
	}
	if s.Node != cfg.Node {
		return fmt.Errorf("disk %s belongs to node %s, this server is %s; bring it back to %s, or empty it and format "+
			"it anew: %w", s.Disk, s.Node, cfg.Node, s.Node, trivet.ErrInvalid)
	}
	return nil
}

func (d *Disk) checkPlace() error {
	now, err := placeOf(d.dir, filepath.Join(d.dir, superblockFile))
	if err != nil {
		return err
	}
	if now != d.place {
		return fmt.Errorf("this directory is a copy of disk %s (formatted as %+v, found as %+v); a copy is as old as "+
			"the moment it was made and must never vote; use the original, or empty this one and format it anew: %w",
			d.id, d.place, now, trivet.ErrInvalid)
	}
	return nil
}

// ID returns the UUID in the superblock.
func (d *Disk) ID() trivet.DiskID { return d.id }

// Dir returns the disk's directory. The server may keep the meta group in a folder of its own there.
func (d *Disk) Dir() string { return d.dir }

// Engine returns the disk's store.
func (d *Disk) Engine() *engine.Engine { return d.engine }

// Verify checks that the directory is still the disk that was opened and that no other process has
// taken it: ErrFenced if one has, ErrInvalid if the directory was replaced (I9, H11). The agent
// calls it with every renewal of the node lease.
func (d *Disk) Verify() error {
	if err := d.checkPlace(); err != nil {
		return fmt.Errorf("verify disk %s: %w", d.dir, err)
	}
	h, err := readHolder(filepath.Join(d.dir, lockFile))
	if err != nil {
		return fmt.Errorf("verify disk %s: %w", d.dir, err)
	}
	if h != d.holder {
		return fmt.Errorf("verify disk %s: process %d on node %s (boot %s) has taken it: %w",
			d.dir, h.PID, h.Node, h.Boot, trivet.ErrFenced)
	}
	return nil
}

// Usage returns the disk's record for the catalogue, with its size and what volumes may still use: the
// free space above the engine's reserve (H26), and none once the disk has met damage (damage.go). Files of
// the log that wait to be used again are free.
func (d *Disk) Usage() (meta.Disk, error) {
	u, err := d.engine.Usage()
	if err != nil {
		return meta.Disk{}, fmt.Errorf("usage of disk %s: %w", d.dir, err)
	}
	free := max(0, u.FreeBytes-u.ReserveBytes)
	if len(d.damage.since(0)) > 0 {
		free = 0
	}
	return meta.Disk{ID: d.id, Path: d.dir, SizeBytes: u.TotalBytes, FreeBytes: free}, nil
}

// Replication returns the disk as package replication wants it.
func (d *Disk) Replication() replication.Disk {
	return replication.Disk{ID: d.id, Dir: d.dir, FS: vfs.Default, Engine: d.engine, Log: d.log, Share: d.share}
}

// replicas lists what lies on the disk, known to the catalogue or not.
func (d *Disk) replicas() (map[trivet.VolumeID]trivet.ReplicaID, error) {
	ids, err := d.engine.Volumes()
	if err != nil {
		return nil, fmt.Errorf("list replicas of disk %s: %w", d.dir, err)
	}
	found := make(map[trivet.VolumeID]trivet.ReplicaID, len(ids))
	for _, id := range ids {
		v, err := d.engine.OpenVolume(id)
		if err != nil {
			return nil, fmt.Errorf("list replicas of disk %s: %w", d.dir, err)
		}
		found[id] = v.Replica()
	}
	return found, nil
}

// Close closes engine and log and gives the directory free. REQUIRES: no replica on it runs.
func (d *Disk) Close() error {
	err := errors.Join(d.engine.Close(), d.log.Close())
	if cerr := unlockDisk(d.lock); err == nil && !errors.Is(cerr, os.ErrClosed) {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("close disk %s: %w", d.dir, err)
	}
	return nil
}

// lockDisk takes the flock of the directory and keeps it until unlockDisk or the end of the process.
func lockDisk(dir string) (*os.File, error) {
	path := filepath.Join(dir, lockFile)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close() //nolint:errcheck // nothing was written
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		h, herr := readHolder(path)
		if herr != nil {
			return nil, fmt.Errorf("another process has locked it; stop that one first: %w", trivet.ErrInUse)
		}
		return nil, fmt.Errorf("process %d of node %s has locked it; stop that one first: %w", h.PID, h.Node, trivet.ErrInUse)
	}
	return f, nil
}

// unlockDisk gives the flock up and closes the file. Not by closing alone: a child that is between fork and exec holds
// the descriptor, and so the lock, a moment longer.
func unlockDisk(lock *os.File) error {
	_ = unix.Flock(int(lock.Fd()), unix.LOCK_UN) // if it fails, closing does it
	return lock.Close()
}

func (d *Disk) writeHolder(node trivet.NodeID) error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	d.holder = holder{Boot: boot, Node: node, PID: os.Getpid(), Process: trivet.NewUUID()}
	b, err := json.Marshal(d.holder)
	if err != nil {
		return err
	}
	if err := d.lock.Truncate(0); err != nil {
		return err
	}
	_, err = d.lock.WriteAt(append(b, '\n'), 0)
	return err
}

func readHolder(path string) (holder, error) {
	var h holder
	b, err := os.ReadFile(path)
	if err != nil {
		return h, err
	}
	if err := json.Unmarshal(b, &h); err != nil {
		return h, fmt.Errorf("lock file %s: %w", path, err)
	}
	return h, nil
}

func bootID() (string, error) {
	b, err := os.ReadFile(bootIDFile)
	return strings.TrimSpace(string(b)), err
}

func placeOf(dir, file string) (place, error) {
	d, err := inodeOf(dir)
	if err != nil {
		return place{}, err
	}
	f, err := inodeOf(file)
	return place{Dir: d, File: f}, err
}

// inodeOf follows symlinks: an operator may configure one as the disk's directory.
func inodeOf(path string) (inode, error) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_INO|unix.STATX_BTIME, &st)
	if err != nil {
		return inode{}, &fs.PathError{Op: "statx", Path: path, Err: err}
	}
	n := inode{Number: st.Ino}
	if st.Mask&unix.STATX_BTIME != 0 {
		n.Born = st.Btime.Sec*int64(time.Second) + int64(st.Btime.Nsec)
	}
	return n, nil
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // read-only handle
	return f.Sync()
}

func loggerOr(l *slog.Logger) *slog.Logger {
	if l == nil {
		return slog.New(slog.DiscardHandler)
	}
	return l
}
