package engine

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

// Config says where the store is and what happens when it fails.
type Config struct {
	FS         vfs.FS // vfs.Default when nil
	Dir        string // made when missing; one engine at a time
	CacheBytes int64  // block cache; 0 = 64 MiB
	// MemTableBytes is the size of the write buffer; 0 = 64 MiB, with a Log 16 MiB. Up to four of them are in
	// memory.
	MemTableBytes int64
	// JournalBytes bounds the change journal of each volume; 0 = 16 MiB, enough for the last 600 000 batches
	// of one extent. A replica that was away for longer than the journal reaches back gets everything anew.
	JournalBytes int64
	// BatchBytesMax bounds a Batch; 0 = 256 MiB, and more is not allowed: Pebble's own limit is 4 GiB, and a panic.
	BatchBytesMax int
	Logger        *slog.Logger // nil: none

	// Log is the disk's log, which the engine refers to instead of storing blocks again (Batch.Refer), in which it
	// pins what it refers to, and of which it cleans the segments. It must be open until Close has returned, with
	// Options.Hold, which Open releases once it has pinned what the store refers to. nil: blocks are values.
	Log *segment.Log
	// CleanTarget is the share of the segments' space that live blocks should take; below it the emptiest segments
	// are cleaned. 0 = 0.7; negative: only Clean does it. At most 0.95. It needs a log with a data lane.
	CleanTarget float64
	// SweepRate bounds the versions of blocks that the background looks at in a second, where snapshots were deleted,
	// and clones are to be flattened. 0 = 200 000; negative: only Sweep does it.
	SweepRate int

	// Background, unless nil, is asked before each piece of background work that reads or writes the disk: it waits for
	// the turn of so many bytes beside the requests of volumes, or returns the error of ctx, and release ends the piece.
	// Whoever calls it must not wait for a request of a volume before release. nil: such work goes on at once.
	Background func(ctx context.Context, bytes int) (release func(), err error)

	// Fatal is called once, on the first I/O error in the background, or with a *DamageError when damage keeps
	// the disk from taking more writes. From then on nothing that changes or flushes succeeds. It runs on a
	// goroutine of Pebble, with locks held: it must not call the engine. It should end the
	// process; when it returns although Pebble cannot go on (its manifest is not on disk), the engine panics.
	// Close after it need not return: Pebble may wait for work that cannot end. nil: only the engine's calls tell.
	Fatal func(error)

	// OnCorruption is called when damage is met on the disk, by a read or in the background, under the same
	// rules as Fatal: once for each table, or volume with a damaged block, and once more when it keeps the
	// disk from compacting. It must not block. The error is a *DamageError, an ErrCorrupt. nil: only logged.
	OnCorruption func(error)

	tableBlockBytes int  // tests only; 0 = tableBlockBytesDefault
	imageRangeBytes int  // tests only; 0 = imageRangeBytesDefault
	ownsLog         bool // tests only: Log ends with the engine, and with an Open that fails
}

// Validate returns ErrInvalid and names the bad field.
func (c Config) Validate() error {
	switch {
	case c.Dir == "":
		return fmt.Errorf("engine config: Dir is empty: %w", trivet.ErrInvalid)
	case c.CacheBytes < 0:
		return fmt.Errorf("engine config: CacheBytes is %d: %w", c.CacheBytes, trivet.ErrInvalid)
	case c.MemTableBytes < 0 || c.MemTableBytes > 1<<30:
		return fmt.Errorf("engine config: MemTableBytes is %d: %w", c.MemTableBytes, trivet.ErrInvalid)
	case c.CleanTarget > cleanTargetMax || c.CleanTarget != c.CleanTarget:
		return fmt.Errorf("engine config: CleanTarget is %g: %w", c.CleanTarget, trivet.ErrInvalid)
	case c.JournalBytes < 0:
		return fmt.Errorf("engine config: JournalBytes is %d: %w", c.JournalBytes, trivet.ErrInvalid)
	case c.BatchBytesMax < 0 || c.BatchBytesMax > batchBytesMax:
		return fmt.Errorf("engine config: BatchBytesMax is %d: %w", c.BatchBytesMax, trivet.ErrInvalid)
	}
	return nil
}

// Engine is one disk's store. All methods may be called concurrently.
type Engine struct {
	db     *pebble.DB
	lock   *pebble.Lock
	health *health
	space  *space
	log    *segment.Log // nil: blocks are values
	live   *live        // nil when log is
	clean  *cleaner     // nil when log has no data lane

	sweeper *sweeper
	bases   bases

	owns *segment.Log // that Close closes, too; tests only

	batchBytes      int   // bound of a batch
	journalBytes    int64 // bound per volume
	imageRangeBytes int

	// Close waits for calls. No lock for readers and writers does for that: a call may wait for a disk or a turn, and in
	// a bubble of simulated time nothing goes on while anybody waits for a lock.
	callsMu sync.Mutex // guards closed, and Add before Wait
	closed  bool
	calls   sync.WaitGroup
	gone    chan struct{} // closed at the end of Close

	// mu guards the set of volumes. It is held over the flush that makes a create or drop durable:
	// both are rare, and a second one must not return before the first is durable.
	mu   sync.Mutex
	open map[trivet.VolumeID]*Volume

	turn chan struct{} // held over what moves Pebble's sequence numbers (commit.go)
	// level0Until is how many flushes may end before level 0 may be full; under turn.
	level0Until uint64
	committed   atomic.Uint64 // batches
	flushed     atomic.Uint64 // batches known durable
	flushDue    atomic.Bool   // a flush is waiting for its time

	imagesMu sync.Mutex
	images   map[*Image]struct{} // Close unpins what is left
	views    views               // and these
}

// Open opens the store in cfg.Dir and makes it when the directory is empty. ErrInUse: another engine
// has it open. ErrInvalid: bad config, or a store of a newer version. ErrCorrupt: it is damaged.
func Open(cfg Config) (*Engine, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.FS == nil {
		cfg.FS = vfs.Default
	}
	if cfg.CacheBytes == 0 {
		cfg.CacheBytes = cacheBytesDefault
	}
	if cfg.MemTableBytes == 0 {
		cfg.MemTableBytes = memTableBytesDefault
		if cfg.Log != nil {
			cfg.MemTableBytes = memTableRefBytes
		}
	}
	if cfg.SweepRate == 0 {
		cfg.SweepRate = sweepRateDefault
	}
	if cfg.BatchBytesMax == 0 {
		cfg.BatchBytesMax = batchBytesMax
	}
	if cfg.JournalBytes == 0 {
		cfg.JournalBytes = journalBytesDefault
	}
	if cfg.tableBlockBytes == 0 {
		cfg.tableBlockBytes = tableBlockBytesDefault
	}
	if cfg.imageRangeBytes == 0 {
		cfg.imageRangeBytes = imageRangeBytesDefault
	}
	e, err := open(cfg)
	if err != nil {
		if cfg.ownsLog {
			err = errors.Join(err, cfg.Log.Close())
		}
		return nil, fmt.Errorf("open engine in %s: %w", cfg.Dir, err)
	}
	return e, nil
}

func open(cfg Config) (*Engine, error) {
	if err := cfg.FS.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	lock, err := pebble.LockDirectory(cfg.Dir, cfg.FS)
	if err != nil {
		return nil, fmt.Errorf("lock: %v: %w", err, trivet.ErrInUse)
	}
	h := newHealth(cfg)
	opts := options(cfg, h)
	opts.Lock = lock
	db, err := openPebble(cfg.Dir, opts, h)
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	e := &Engine{
		gone:   make(chan struct{}),
		turn:   make(chan struct{}, 1),
		db:     db,
		lock:   lock,
		health: h,
		open:   make(map[trivet.VolumeID]*Volume),
		images: make(map[*Image]struct{}),

		batchBytes:      cfg.BatchBytesMax,
		journalBytes:    cfg.JournalBytes,
		imageRangeBytes: cfg.imageRangeBytes,
	}
	e.sweeper, e.bases.n = newSweeper(e, cfg.SweepRate), map[Base]int{}
	e.space = newSpace(cfg.FS, cfg.Dir, func() uint64 { return db.Metrics().MemTable.Size })
	if err := e.checkFormat(); err != nil {
		return nil, errors.Join(err, e.Close())
	}
	if err := e.openLog(&cfg); err != nil {
		return nil, errors.Join(err, e.Close())
	}
	if err := e.openBases(); err != nil {
		return nil, errors.Join(err, e.Close())
	}
	e.sweeper.start()
	return e, nil
}

// openLog finds out what the store refers to in the log, pins it, and starts to clean.
func (e *Engine) openLog(cfg *Config) error {
	if cfg.Log == nil {
		return nil
	}
	var wake func()
	if cfg.Log.HasDataLane() {
		e.clean = newCleaner(e, cfg.CleanTarget)
		e.clean.background = cfg.Background
		wake, e.space.tight = e.clean.poke, e.clean.setPressure
	} else {
		wake = func() {}
	}
	e.log, e.live = cfg.Log, newLive(cfg.Log, &e.committed, wake)
	e.space.log = cfg.Log
	if e.clean != nil {
		e.live.target = e.clean.target
	}
	if err := e.countAll(); err != nil {
		return err
	}
	cfg.Log.Release()
	if cfg.ownsLog {
		e.owns = cfg.Log
	}
	if e.clean != nil && cfg.CleanTarget >= 0 {
		e.clean.start()
	}
	return nil
}

// openPebble opens Pebble. A fatal failure inside becomes an error, whichever goroutine it is on: what
// Pebble starts while it opens, such as a flush of what it replayed, runs beside it. That goroutine then
// ends, and so does the one that opens, which is why it is one of our own. A DB that failed so is
// neither used nor closed: its Close would wait for the dead flush. When the goroutine that opens is the one
// that failed, its end is waited for: only then has Pebble let go of the lock, and a retry can have it.
func openPebble(dir string, opts *pebble.Options, h *health) (*pebble.DB, error) {
	var db *pebble.DB
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done) // also when Fatalf ended the goroutine
		defer func() {
			// Pebble panics when it fails to open beside a compaction that it has begun, whose table it
			// finds in use (internal/genericcache/shard.go:322 of v2.1.7): that is a failed Open, no more.
			if p := recover(); p != nil {
				db, err = nil, fmt.Errorf("pebble panicked: %v", p)
			}
		}()
		db, err = h.runOpen(dir, opts)
		if err != nil && (strings.Contains(err.Error(), missingTable) || !optionsMatch(dir, opts)) {
			err = fmt.Errorf("%w: %w", err, trivet.ErrCorrupt)
		}
	}()
	select {
	case <-done:
	case <-h.failed:
		if h.openerFailed.Load() {
			<-done
		} // else Pebble may wait for the flush that failed
	}
	h.opening.Store(false)
	if failure := h.check(); failure != nil {
		return nil, failure
	}
	return db, toErr(err)
}

// optionsMatch reports whether Pebble's own record of the options in dir agrees with opts, as far as it can be read. It
// is a text without a checksum: one that does not agree has rotted, or the store is not ours.
func optionsMatch(dir string, opts *pebble.Options) bool {
	names, err := opts.FS.List(dir)
	if err != nil {
		return true
	}
	ours := opts.Clone()
	ours.EnsureDefaults()
	for _, name := range names {
		if !strings.HasPrefix(name, "OPTIONS-") {
			continue
		}
		f, err := opts.FS.Open(opts.FS.PathJoin(dir, name))
		if err != nil {
			continue
		}
		text, err := io.ReadAll(f)
		if errors.Join(err, f.Close()) == nil && ours.CheckCompatibility(dir, string(text)) != nil {
			return false
		}
	}
	return true
}

// missingTable is in Pebble's error for tables that its manifest names and the directory has not (version_set.go,
// checkConsistency). Nothing but damage does that: a manifest whose end has rotted reads as a shorter one, which names
// tables that were removed since.
const missingTable = "unknown to the objstorage provider"

// toErr adds ErrCorrupt to Pebble's own error of that meaning.
func toErr(err error) error {
	if err != nil && pebble.IsCorruptionError(err) && !errors.Is(err, trivet.ErrCorrupt) {
		return fmt.Errorf("%v: %w", err, trivet.ErrCorrupt)
	}
	return err
}

// The store format record, big endian: "trvt", version (4), CRC32C of both (4). The version counts
// changes to keys, values and records that an older program must not touch: 2 came with the change
// journal, which an older program would not go on writing; 3 with references into the log.
const (
	storeMagic         = "trvt"
	storeVersion       = 3
	storeFormatBytes   = 12
	storeFormatSumFrom = 8
)

func appendStoreFormat(dst []byte, version uint32) []byte {
	start := len(dst)
	dst = binary.BigEndian.AppendUint32(append(dst, storeMagic...), version)
	return binary.BigEndian.AppendUint32(dst, crc32.Checksum(dst[start:], castagnoli))
}

// decodeStoreFormat returns ErrCorrupt for what appendStoreFormat does not make.
func decodeStoreFormat(b []byte) (version uint32, err error) {
	if len(b) != storeFormatBytes || string(b[:4]) != storeMagic ||
		binary.BigEndian.Uint32(b[storeFormatSumFrom:]) != crc32.Checksum(b[:storeFormatSumFrom], castagnoli) {
		return 0, fmt.Errorf("store format record %x: %w", b, trivet.ErrCorrupt)
	}
	return binary.BigEndian.Uint32(b[4:]), nil
}

// checkFormat refuses a store that this program does not know, and marks an empty one.
func (e *Engine) checkFormat() error {
	v, closer, err := e.db.Get([]byte{tableFormat})
	if errors.Is(err, pebble.ErrNotFound) {
		return e.initFormat()
	}
	if err != nil {
		return toErr(err)
	}
	version, err := decodeStoreFormat(v)
	if err := errors.Join(err, closer.Close()); err != nil {
		return err
	}
	switch version {
	case storeVersion:
		return nil
	case 1, 2: // records without a journal say that it begins at their index (decodeRecord); values stay values
		return e.setFormat()
	}
	return fmt.Errorf("store format %d, this program knows %d: %w", version, storeVersion, trivet.ErrInvalid)
}

func (e *Engine) initFormat() error {
	it, err := e.db.NewIter(nil)
	if err != nil {
		return toErr(err)
	}
	has := it.First()
	if err := it.Close(); err != nil {
		return toErr(err)
	}
	if has {
		return fmt.Errorf("store has keys but no format record: %w", trivet.ErrCorrupt)
	}
	return e.setFormat()
}

// setFormat marks the store as of this program's version, durably.
func (e *Engine) setFormat() error {
	b := e.db.NewBatch()
	defer func() { _ = b.Close() }() // memory only
	if err := b.Set([]byte{tableFormat}, appendStoreFormat(nil, storeVersion), nil); err != nil {
		return err
	}
	if err := e.apply(b); err != nil {
		return err
	}
	return e.flush()
}

// enter begins a call. The caller must exit, and must not enter again before.
func (e *Engine) enter() error {
	e.callsMu.Lock()
	defer e.callsMu.Unlock()
	if e.closed {
		return trivet.ErrClosed
	}
	e.calls.Add(1)
	return nil
}

// enterWrite begins a call that changes something or promises durability.
func (e *Engine) enterWrite() error {
	if err := e.enter(); err != nil {
		return err
	}
	if err := e.health.check(); err != nil {
		e.exit()
		return err
	}
	return nil
}

func (e *Engine) exit() { e.calls.Done() }

// Close flushes and closes. It waits for calls under way; open images end with ErrClosed, and volumes
// with it. Idempotent. After a failure nothing is flushed, and the failure is returned.
func (e *Engine) Close() error {
	if e.clean != nil {
		e.clean.stop()
	}
	e.sweeper.stop()
	e.callsMu.Lock()
	first := !e.closed
	e.closed = true
	e.callsMu.Unlock()
	if !first {
		<-e.gone
		return nil
	}
	defer close(e.gone)
	e.calls.Wait()
	var err error
	if err = e.health.check(); err == nil {
		err = e.flush()
	}
	for i := range e.images {
		err = errors.Join(err, i.unpin())
	}
	clear(e.images)
	err = errors.Join(err, e.views.closeAll())
	err = errors.Join(err, toErr(e.db.Close()), e.lock.Close())
	if e.owns != nil {
		err = errors.Join(err, e.owns.Close())
	}
	if err != nil {
		return fmt.Errorf("close engine: %w", err)
	}
	return nil
}
