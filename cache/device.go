package cache

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/trivet-csi/trivet"
)

const (
	pieceBlocks = trivet.AtomicWriteBytes / trivet.BlockSize

	// dirtyShare is how many of the slots, in per cent, may hold what is not written back: the rest is for fills.
	dirtyShare = 75
	// backgroundShare of the dirty limit, in per cent: from there on blocks are written back before their deadline.
	backgroundShare = 10
	// slotsMin lets a few of the longest writes be under way at once.
	slotsMin = 8 * pieceBlocks
)

// Device is a cache in front of a Device. See the package comment for what it promises in which mode. It is safe for
// concurrent use.
//
// REQUIRES of the Device below: a write that returned outlives this process (a quorum has committed it).
type Device struct {
	next trivet.Device
	cfg  Config
	log  *slog.Logger
	lock *Locked // nil: no file, so never writeBack

	start   time.Time // the instant that durations count from
	kick    chan struct{}
	all     []*flight
	idle    chan *flight // flights at rest
	shorts  chan *flight // short flights at rest
	work    chan *flight
	thin    chan struct{} // ends a flyer beyond the first ones
	loading []int32       // of the flusher: the slots of the flight to come
	extraN  int           // of the flusher: flyers beyond the first ones
	fetch   chan fetch    // read-ahead to do
	queue   *flushQueue   // of the flusher, and the table that its blocks are in
	queueOf *slots

	sleeper  sleeper
	waitingN atomic.Int32 // flyers that wait for work

	life   context.Context // ends by Close
	end    context.CancelCauseFunc
	group  errgroup.Group
	closes sync.Mutex // held by Close and Set: one at a time

	mu      sync.Mutex
	set     Settings
	t       *slots // nil: no memory; everything passes through
	err     error  // sticky: fenced, closed, or a lost write-back (H14)
	fenced  bool
	closed  bool
	running bool // the goroutines were started
	seq     uint64
	flushTo uint64  // write back up to this one now
	urgent  int     // who waits for room or for an empty cache
	holdN   int     // who holds writes
	activeN int     // writes, discards and reads that use slots outside of mu
	spans   []span  // ranges that are in use below
	armed   bool    // the flusher wakes up at the next deadline
	fills   []*fill // under way
	rest    []*fill // at rest
	changed signal
	pace    pacer
	streams streams

	mode    workMode  // of write-backs, at the moment
	parked  []*flight // those that are not needed with so few under way
	activeF int       // flights that are not parked
	aloftN  int       // long flights that are being carried
	tune    *tuner    // nil until set.Adaptive
	ahead   aheadTuner
	stats   Stats
}

var _ trivet.Device = (*Device)(nil)

// Open puts a cache in front of next and closes l when the Device is closed. l must have been adopted; blocks that it
// holds are dirty again and are written back from now on. On an error l stays open.
//
// l = nil is a cache in plain memory. It is never writeBack: that mode then means writeThrough.
func Open(next trivet.Device, l *Locked, cfg Config) (*Device, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	d := &Device{
		next: next, cfg: cfg, log: cfg.Logger.With("component", "cache", "volume", cfg.Volume.String()), lock: l,
		start: time.Now(), kick: make(chan struct{}, 1), set: cfg.Settings,
	}
	d.adaptLocked()
	d.life, d.end = context.WithCancelCause(context.Background()) //nolint:forbidigo // ended by Close
	if l != nil && l.there && l.head.epoch != cfg.Epoch && l.head.next != cfg.Epoch {
		l.stale = true // the epoch was raised by somebody else since Adopt
	}
	if err := d.openSlots(); err != nil {
		return nil, fmt.Errorf("open cache of %s: %w", cfg.Volume, err)
	}
	return d, nil
}

// openSlots takes over what the file holds, or begins anew.
func (d *Device) openSlots() error {
	if d.lock == nil || !d.lock.there || d.lock.head.slotN == 0 {
		return d.beginOrPass()
	}
	h := &d.lock.head
	lost, err := d.lock.Dirty()
	if err != nil {
		return err
	}
	if d.lock.stale || h.dropped || lost == 0 {
		if lost > 0 {
			d.log.Error("dropping acknowledged writes of an attachment that is over: the volume belonged to others since",
				"bytes", lost, "epoch", h.epoch, "now", d.cfg.Epoch)
		}
		return d.beginOrPass()
	}
	m, err := newMapping(d.lock.f, int(h.slotN))
	if err != nil {
		return err
	}
	if d.t, err = newSlots(m, d.cfg.Volume, d.set.Eviction); err != nil {
		return errors.Join(err, m.close())
	}
	d.t.dirty.byRegion(d.set.Order == OrderFair)
	seq, n, lostErr := d.t.recover(d.now() - d.cfg.Deadline)
	d.seq = seq
	poison := h.poisoned && d.cfg.Resume
	if lostErr != nil {
		d.log.Error("acknowledged writes are damaged in the cache and lost", "err", lostErr)
		if d.cfg.Resume {
			poison = true
		}
	}
	if poison {
		d.err = fmt.Errorf("%s: a write was lost before this process took over: %w", d.cfg.Volume, trivet.ErrUnavailable)
	}
	h.epoch, h.next, h.poisoned = d.cfg.Epoch, d.cfg.Epoch, poison
	d.putHeader()
	d.log.Info("took over the writes of a process that died", "blocks", n, "epoch", d.cfg.Epoch)
	d.run()
	return nil
}

// beginOrPass begins anew. Where there is no memory everything passes through: that is slower, and nothing else.
func (d *Device) beginOrPass() error {
	err := d.begin(d.set)
	if errors.Is(err, trivet.ErrNoSpace) {
		d.log.Warn("no memory for the cache: the volume is written through", "bytes", d.set.Bytes, "err", err)
		return nil
	}
	return err
}

// begin makes an empty table, in a file that holds nothing of value.
func (d *Device) begin(s Settings) error {
	slotN := s.slots()
	if d.lock != nil {
		if err := d.lock.f.Truncate(0); err != nil {
			return err
		}
		d.lock.there = false
	}
	if slotN == 0 {
		d.t = nil
		return nil
	}
	l := d.lock
	var f *os.File
	if l != nil {
		f = l.f
	}
	m, err := newMapping(f, slotN)
	if err != nil {
		if f != nil {
			err = errors.Join(err, f.Truncate(0)) // what was reserved
		}
		return err
	}
	if d.t, err = newSlots(m, d.cfg.Volume, s.Eviction); err != nil {
		return errors.Join(err, m.close())
	}
	d.t.dirty.byRegion(s.Order == OrderFair)
	m.commit(d.seq)
	if l != nil {
		l.head = header{
			generation: 1, cluster: d.cfg.Cluster, volume: d.cfg.Volume, epoch: d.cfg.Epoch, next: d.cfg.Epoch,
			slotN: uint32(slotN),
		}
		l.there, l.stale = true, false
		m.writeHeader(&l.head)
	}
	d.run()
	return nil
}

// putHeader writes the header after a change. REQUIRES: there is a file and a mapping of it.
func (d *Device) putHeader() {
	d.lock.head.generation++
	d.t.m.writeHeader(&d.lock.head)
}

func (d *Device) now() time.Duration { return time.Since(d.start) }

// Size implements trivet.Device.
func (d *Device) Size() int64 { return d.next.Size() }

// WriteAt implements trivet.Device. In writeBack it returns once the write is in the mapping.
func (d *Device) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := trivet.CheckRange(off, int64(len(p)), d.next.Size()); err != nil {
		return fmt.Errorf("write %s: %w", d.cfg.Volume, err)
	}
	own := begin(d.cfg.Meters.Own)
	defer own.end()
	mode, err := d.enter(ctx)
	if err != nil {
		return err
	}
	defer d.leave()
	if mode != WriteBack {
		own.end()
		return d.writeThrough(ctx, p, off, mode)
	}
	for first := true; len(p) > 0 || first; first = false {
		n := len(p)
		if n > trivet.AtomicWriteBytes { // only then is it atomic per block alone: cut at multiples
			n = trivet.AtomicWriteBytes - int(off%trivet.AtomicWriteBytes)
		}
		if n == 0 {
			break
		}
		if err := d.writeBack(ctx, p[:n], trivet.LBA(off/trivet.BlockSize)); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// enter counts a call that changes blocks in, once nobody holds writes, and returns the mode that holds for it.
func (d *Device) enter(ctx context.Context) (Mode, error) {
	d.mu.Lock()
	for d.err == nil && d.holdN > 0 {
		if err := d.waitLocked(ctx); err != nil {
			d.mu.Unlock()
			return "", err
		}
	}
	defer d.mu.Unlock()
	if d.err != nil {
		return "", d.err
	}
	d.activeN++
	return d.modeLocked(), nil
}

func (d *Device) leave() {
	d.mu.Lock()
	d.activeN--
	if d.activeN == 0 {
		d.changed.fire()
	}
	d.mu.Unlock()
}

func (d *Device) modeLocked() Mode {
	switch {
	case d.t == nil, d.set.Mode == "":
		return WriteThrough
	case d.set.Mode == WriteBack && (d.lock == nil || d.set.NoClean):
		return WriteThrough // it would not outlive the process; another writer would not see it
	}
	return d.set.Mode
}

// waitLocked waits for a change, or the end of ctx. It lets go of mu meanwhile.
func (d *Device) waitLocked(ctx context.Context) error {
	ch := d.changed.wait()
	d.mu.Unlock()
	defer d.mu.Lock()
	select {
	case <-ch:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the cache of %s: %w", d.cfg.Volume, context.Cause(ctx))
	}
}

// writeBack acknowledges at most AtomicWriteBytes as one write.
func (d *Device) writeBack(ctx context.Context, p []byte, lba trivet.LBA) error {
	var room [pieceBlocks]int32
	taken := room[:len(p)/trivet.BlockSize]
	if err := d.takeSlots(ctx, taken); err != nil {
		return err
	}
	for i, s := range taken {
		d.t.crc[s] = d.t.m.fill(s, p[i*trivet.BlockSize:(i+1)*trivet.BlockSize])
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		d.t.giveBack(taken)
		return d.err
	}
	d.seq++
	d.t.acknowledge(taken, lba, d.seq, d.now())
	d.spoilFillsLocked(lba, int64(len(taken)))
	d.stats.Writes++
	d.stats.WrittenBytes += uint64(len(p))
	d.wakeFlusherLocked()
	return nil
}

// takeSlots takes slots for a write, after the delay that the dirty limit asks for.
func (d *Device) takeSlots(ctx context.Context, taken []int32) error {
	d.mu.Lock()
	limit := d.dirtyLimitLocked()
	wait := d.pace.delay(d.now(), len(taken), d.t.unwritten(), limit)
	d.mu.Unlock()
	var held timing
	if wait > 0 {
		held = begin(d.cfg.Meters.Room)
	}
	defer func() { held.end() }()
	if err := d.sleeper.sleep(ctx, wait); err != nil {
		return fmt.Errorf("write to the cache of %s: %w", d.cfg.Volume, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if wait > 0 {
		d.stats.Delayed++
		d.stats.DelayedFor += wait
	}
	waits := false
	defer func() {
		if waits {
			d.urgent--
		}
	}()
	for {
		switch {
		case d.err != nil:
			return d.err
		case d.t.unwritten()+len(taken) <= limit && d.t.take(taken):
			return nil
		}
		if !waits {
			waits = true
			d.urgent++
			d.stats.Stalled++
			if wait == 0 {
				held = begin(d.cfg.Meters.Room)
			}
		}
		d.wakeFlusherLocked()
		if err := d.waitLocked(ctx); err != nil {
			return err
		}
	}
}

func (d *Device) dirtyLimitLocked() int { return max(d.t.m.slotN*dirtyShare/100, pieceBlocks) }
