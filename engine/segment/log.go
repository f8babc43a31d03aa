package segment

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/trivet-csi/trivet"
)

const (
	segmentBytesMin = 64 << 10
	segmentBytesMax = 1 << 30

	defaultLanes        = 4
	defaultSegmentBytes = 64 << 20
	defaultCacheBytes   = 64 << 20
	defaultQueueBytes   = 64 << 20
)

// Options say where a log lives and what it may take.
type Options struct {
	Dir  Dir
	Disk trivet.DiskID // a log of another disk is refused (H11)

	// Fatal is told, once, of the first failed write or flush, on a goroutine of the log. It must not
	// wait for Close. Nil = nobody is told.
	Fatal func(error)

	// Lanes and SegmentBytes are fixed by Format; Open finds them on the disk. 0 = 4 and 64 MiB.
	// Lanes is at most 16, SegmentBytes a multiple of 4096 from 64 KiB to 1 GiB.
	Lanes        int
	SegmentBytes int64

	// DataLane has Format add a lane for blocks that have no entry (Log.Store); Open finds it.
	DataLane bool

	// Room is asked before a file of so many bytes is made for entries that are still to come: an error has them
	// refused with ErrNoSpace if it wraps ENOSPC. It is not asked for what a lane cannot do without: its first file
	// after Open, and one for terms, votes and marks, whose failure would be the end of the log. Nil = there is room.
	Room func(fileBytes int64) error

	// CacheBytes bounds the data of entries that are kept in memory, over all lanes, beside those that
	// are not yet durable. 0 = 64 MiB.
	CacheBytes int64

	// QueueBytes bounds the data of changes that wait for the disk, over all lanes; who comes then,
	// waits. 0 = 64 MiB.
	QueueBytes int64

	// Hold keeps every segment from being recycled until Release, so that an owner can first pin what
	// it has kept places in.
	Hold bool

	// Rand draws incarnations, one call at a time; nil = crypto/rand. Tests give it a seed.
	Rand func() uint64
}

func (o Options) withDefaults() Options {
	if o.Lanes == 0 {
		o.Lanes = defaultLanes
	}
	if o.SegmentBytes == 0 {
		o.SegmentBytes = defaultSegmentBytes
	}
	if o.CacheBytes == 0 {
		o.CacheBytes = defaultCacheBytes
	}
	if o.QueueBytes == 0 {
		o.QueueBytes = defaultQueueBytes
	}
	if o.Rand == nil {
		o.Rand = func() uint64 {
			var b [8]byte
			_, _ = rand.Read(b[:]) // never fails since Go 1.24
			return binary.LittleEndian.Uint64(b[:])
		}
	}
	return o
}

// Validate returns ErrInvalid and names the bad field.
func (o Options) Validate() error {
	o = o.withDefaults()
	if _, err := parseDisk(o.Disk); err != nil {
		return fmt.Errorf("segment options: Disk: %w", err)
	}
	for field, bad := range map[string]bool{
		"Dir":          o.Dir == nil,
		"Lanes":        o.Lanes < 1 || o.Lanes+o.dataLanes() > lanesMax,
		"SegmentBytes": o.SegmentBytes < segmentBytesMin || o.SegmentBytes > segmentBytesMax || o.SegmentBytes%pageBytes != 0,
		"CacheBytes":   o.CacheBytes < 0,
		"QueueBytes":   o.QueueBytes < 0,
	} {
		if bad {
			return fmt.Errorf("segment options: %s: %w", field, trivet.ErrInvalid)
		}
	}
	return nil
}

// dataLanes is how many lanes Format adds for blocks without entries.
func (o Options) dataLanes() int {
	if o.DataLane {
		return 1
	}
	return 0
}

// shape is what Format fixes.
type shape struct {
	disk         diskUUID
	lanes        uint32 // all of them
	data         uint32 // of them, the last, for blocks without entries: 0 or 1
	segmentBytes int64
}

// checkpointMax bounds a checkpoint, appendMax one call of Append, carryMax what one new segment takes
// over from old ones. Together they fit into a segment.
func (s shape) checkpointMax() int64 { return s.segmentBytes/2 - 2*pageBytes }
func (s shape) appendMax() int64     { return s.segmentBytes / 4 }
func (s shape) carryMax() int64      { return s.segmentBytes / 8 }

// laneOf returns the lane of a group's entries.
func (s shape) laneOf(id trivet.VolumeID) int { return int(uint64(id) % uint64(s.lanes-s.data)) }

// Log is the log of one disk. It is safe for concurrent use.
type Log struct {
	opts  Options
	shape shape
	lanes []*lane
	stop  chan struct{}
	wg    sync.WaitGroup // the writers, and the makers of new files

	randMu    sync.Mutex // held over opts.Rand
	failed    atomic.Pointer[failure]
	failedCh  chan struct{} // closed once failed is set
	closeOnce sync.Once
	closeErr  error
}

type failure struct{ err error }

func (l *Log) incarnation() uint64 {
	l.randMu.Lock()
	defer l.randMu.Unlock()
	return l.opts.Rand()
}

func slotName(lane int, slot uint64) string { return fmt.Sprintf("seg-%02x-%08x", lane, slot) }

func parseSlotName(name string) (lane int, slot uint64, ok bool) {
	n, err := fmt.Sscanf(name, "seg-%02x-%08x", &lane, &slot)
	return lane, slot, err == nil && n == 2 && slotName(lane, slot) == name
}

// Format makes an empty log. It returns ErrExists when the directory has segment files, be they remains
// of a Format that a crash interrupted: the caller knows whether its disk is new, and empties it.
func Format(opts Options) error {
	if err := opts.Validate(); err != nil {
		return err
	}
	opts = opts.withDefaults()
	err := opts.Dir.Make()
	var names []string
	if err == nil {
		names, err = opts.Dir.List()
	}
	if err != nil {
		return fmt.Errorf("format log: %w", err)
	}
	for _, name := range names {
		if _, _, ok := parseSlotName(name); ok {
			return fmt.Errorf("format log: file %s is there: %w", name, trivet.ErrExists)
		}
	}
	disk, _ := parseDisk(opts.Disk) // Validate looked at it
	data := opts.dataLanes()
	s := shape{disk: disk, lanes: uint32(opts.Lanes + data), data: uint32(data), segmentBytes: opts.SegmentBytes}
	for i := range int(s.lanes) {
		f, err := opts.Dir.Create(slotName(i, 0), s.segmentBytes)
		if err == nil {
			h := segmentHeader{number: 1, incarnation: opts.Rand(), lane: uint32(i)}
			_, err = activate(f, s, h, nil)
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			return fmt.Errorf("format lane %d: %w", i, err)
		}
	}
	return nil
}

// activate makes a file a segment: header and checkpoint in one write and one flush, before anything else
// is written to it. It returns the offset of the first batch.
func activate(f File, s shape, h segmentHeader, groups []groupCheckpoint) (int64, error) {
	body := appendCheckpoint(nil, groups)
	h.disk, h.lanes, h.data, h.segmentBytes = s.disk, s.lanes, s.data, s.segmentBytes
	h.checkpointBytes, h.checkpointSum = uint32(len(body)), checksum(body)
	b := alignedBytes(h.start())
	h.encode(b)
	copy(b[pageBytes:], body)
	if err := writeDurable(f, b, 0); err != nil {
		return 0, fmt.Errorf("begin segment %d: %w", h.number, err)
	}
	return h.start(), nil
}

func writeDurable(f File, b []byte, off int64) error {
	n, err := f.WriteAt(b, off)
	if err == nil && n < len(b) {
		err = fmt.Errorf("wrote %d of %d bytes", n, len(b))
	}
	if err != nil {
		return err
	}
	return f.Sync()
}

// Open recovers the log and starts its writers. It returns ErrNotFound when there is none, ErrInvalid when
// it belongs to another disk, and ErrCorrupt when damage of a newest segment makes the state of a lane
// unknown; then nothing was changed. A torn tail is cut; damaged entries are found by Read.
func Open(opts Options) (*Log, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	l := &Log{opts: opts.withDefaults(), stop: make(chan struct{}), failedCh: make(chan struct{})}
	if err := l.recover(); err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	for _, lane := range l.lanes {
		lane.start()
	}
	return l, nil
}

// Group returns the handle of a group. It is there without being created: empty, with a zero Stable.
func (l *Log) Group(id trivet.VolumeID) *Group {
	lane := l.lanes[l.shape.laneOf(id)]
	lane.mu.Lock()
	defer lane.mu.Unlock()
	return lane.groupLocked(id)
}

// Groups returns the IDs of the groups that have entries or a Stable.
func (l *Log) Groups() []trivet.VolumeID {
	var out []trivet.VolumeID
	for _, lane := range l.lanes {
		lane.mu.Lock()
		for id, g := range lane.groups {
			if !g.accepted.pristine() {
				out = append(out, id)
			}
		}
		lane.mu.Unlock()
	}
	return out
}

// AppendBytesMax returns how much one Append may put into the log: a quarter of a segment, record headers
// (at most 64 bytes each, but for descriptions of blocks) and two pages included.
func (l *Log) AppendBytesMax() int64 { return l.shape.appendMax() }

// Failed returns a channel that is closed when the log is poisoned, so that who has nothing to write hears
// of it too. Err then says why.
func (l *Log) Failed() <-chan struct{} { return l.failedCh }

// Err returns the error that poisoned the log, nil when none did.
func (l *Log) Err() error { return l.failure() }

// failure returns the error that poisoned the log, nil when none did.
func (l *Log) failure() error {
	if f := l.failed.Load(); f != nil {
		return f.err
	}
	return nil
}

// fail poisons the log and returns the error that did it first.
func (l *Log) fail(err error) error {
	err = fmt.Errorf("segment log has failed: %w", err)
	if !l.failed.CompareAndSwap(nil, &failure{err}) {
		return l.failure()
	}
	close(l.failedCh)
	for _, lane := range l.lanes {
		lane.wakeAll()
	}
	if l.opts.Fatal != nil {
		l.wg.Go(func() { l.opts.Fatal(err) }) // whoever writes may be its caller; Close waits for a writer, so wg is not 0
	}
	return err
}

// Release ends the Hold of Open: segments that nobody pinned may be recycled from now on.
func (l *Log) Release() {
	for _, lane := range l.lanes {
		lane.mu.Lock()
		lane.hold, lane.collectable = false, true
		lane.mu.Unlock()
		lane.wakeUp()
	}
}

// Close writes what is queued, marks the end of every lane, and stops. It is idempotent; the error is that
// of a poisoned log or of closing a file. Calls after it return ErrClosed.
func (l *Log) Close() error {
	l.closeOnce.Do(func() {
		for _, lane := range l.lanes {
			lane.mu.Lock()
			lane.closed = true
			lane.room.Broadcast()
			lane.mu.Unlock()
		}
		close(l.stop)
		l.wg.Wait()
		l.closeErr = l.failure()
		for _, lane := range l.lanes {
			l.closeErr = errors.Join(l.closeErr, lane.closeFiles())
		}
	})
	return l.closeErr
}
