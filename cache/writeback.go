package cache

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/trivet-csi/trivet"
)

// batchMax is how many dirty blocks the flusher puts in order at a time: 32 MiB.
const batchMax = 8192

const (
	// shortBlocks is the longest write-back of a short flight.
	shortBlocks = 4
	shortsMax   = 256
)

// shorts is how many short flights there are beside Depth long ones: of single blocks, which is what random
// writes leave, they keep as many bytes under way as long ones do, so that the device below can gather them. A
// Depth of 1 is one at a time all the same.
func (c *Config) shorts() int { return min((c.Depth-1)*pieceBlocks+1, shortsMax) }

// flight is one write-back: neighbouring blocks, at most AtomicWriteBytes, or, if Adaptive, up to twice as many. A
// short one has at most shortBlocks.
type flight struct {
	short bool
	buf   []byte
	lba   trivet.LBA
	slots []int32
	cover uint64 // the lowest; noCover while at rest. Guarded by Device.mu
	began time.Duration
}

const noCover = ^uint64(0)

// thinAfter is for how long nothing is to be done before flyers that short flights needed end.
const thinAfter = time.Second

// run starts the goroutines, once there is memory to look after.
func (d *Device) run() {
	if d.running {
		return
	}
	d.running = true
	n, shortsN := max(d.cfg.Depth, adaptiveDepthMax), d.cfg.shorts()
	d.work = make(chan *flight, n+shortsN)
	d.idle, d.shorts = make(chan *flight, n), make(chan *flight, shortsN)
	d.parked = d.makeFlights(n, flightBlocksMax) // not adaptive, half of the half is used
	d.unparkLocked()
	for _, f := range d.makeFlights(shortsN, shortBlocks) {
		f.short = true
		d.shorts <- f
	}
	for range n {
		d.group.Go(func() error { d.fly(nil); return nil })
	}
	d.thin = make(chan struct{})
	d.loading = make([]int32, 0, flightBlocksMax)
	d.queue = newFlushQueue(d.cfg.Deadline)
	d.spans = make([]span, 0, 2*n+shortsN)
	d.group.Go(func() error { d.flusher(); return nil })
	d.runReadAhead()
	d.kick <- struct{}{}
}

// makeFlights makes n flights of at most so many blocks. Their memory is taken up as it is used.
func (d *Device) makeFlights(n, blocks int) []*flight {
	most := blocks * trivet.BlockSize
	buf := make([]byte, n*most)
	fs := make([]*flight, 0, n)
	for i := range n {
		fs = append(fs, &flight{buf: buf[i*most : (i+1)*most], slots: make([]int32, 0, blocks), cover: noCover})
	}
	d.all = append(d.all, fs...)
	return fs
}

// wakeFlusherLocked wakes the flusher if there is something to do before the next deadline.
func (d *Device) wakeFlusherLocked() {
	if d.t == nil || d.t.dirty.n == 0 {
		return
	}
	if d.armed && d.urgent == 0 && d.flushTo < d.t.cover[d.t.dirty.head] &&
		d.t.dirty.n < d.dirtyLimitLocked()*backgroundShare/100 {
		return
	}
	select {
	case d.kick <- struct{}{}:
	default:
	}
}

// flusher writes back what is due.
func (d *Device) flusher() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-d.life.Done():
			return
		case <-d.kick:
		case <-timer.C:
			d.thinOut()
		}
		next := d.pass()
		if d.extraN > 0 {
			next = min(next, thinAfter)
		}
		timer.Reset(next)
	}
}

// pass starts write-backs until nothing more can be started, and returns when the next deadline is.
func (d *Device) pass() time.Duration {
	for {
		d.mu.Lock()
		next := d.collectLocked()
		d.mu.Unlock()
		if len(d.queue.items) == 0 {
			return next
		}
		d.queue.arrange()
		started, ok := d.startAll()
		if !ok {
			return time.Hour
		}
		if !started {
			return next // all in the way of others, whose end kicks the flusher
		}
	}
}

// startAll starts a write-back for all of the queue that is not in the way of others, and reports whether there was
// any; not ok: the Device is closing. One flight of each kind is at hand for each block, as what it needs shows only
// under the lock; so there is never more under way than all flights of one kind and some of the other.
func (d *Device) startAll() (started, ok bool) {
	var short, long *flight
	defer func() {
		if short != nil {
			d.shorts <- short // has room for all, as has idle
		}
		if long != nil {
			d.idle <- long
		}
	}()
	for {
		if short == nil {
			select {
			case short = <-d.shorts:
			case <-d.life.Done():
				return started, false
			}
		}
		if long == nil {
			select {
			case long = <-d.idle:
			case <-d.life.Done():
				return started, false
			}
		}
		w, more := d.queue.next(d.now())
		if !more {
			return started, true
		}
		d.mu.Lock()
		f := d.loadLocked(short, long, w)
		d.mu.Unlock()
		switch f {
		case nil:
			continue
		case short:
			short = nil
		default:
			long = nil
		}
		started = true
		d.queue.flew(f.lba + trivet.LBA(len(f.slots)))
		d.work <- f // has room for all
		if int(d.waitingN.Load()) < len(d.work) && d.extraN < cap(d.shorts) {
			d.extraN++
			d.group.Go(func() error { d.fly(d.thin); return nil })
		}
	}
}

// thinOut ends the flyers beyond the first ones that have nothing to do.
func (d *Device) thinOut() {
	for d.extraN > 0 {
		select {
		case d.thin <- struct{}{}:
			d.extraN--
		default:
			return
		}
	}
}

// collectLocked lists what is to be written back now, oldest first, and returns how long the rest may wait.
func (d *Device) collectLocked() time.Duration {
	d.queue.begin(d.set.Order)
	d.armed = d.t != nil && d.err == nil && d.t.dirty.n > 0
	if d.t == nil || d.err != nil || d.t.dirty.n == 0 {
		return time.Hour
	}
	t, now := d.t, d.now()
	d.queueOf = t
	all := d.urgent > 0 || t.dirty.n >= d.dirtyLimitLocked()*backgroundShare/100
	// What is nearly due goes along, so that neighbours written one after the other leave together.
	nearly := time.Duration(0)
	if age := now - t.since[t.dirty.head]; age >= d.cfg.Deadline {
		nearly = d.cfg.Deadline / 2
	} else {
		nearly = d.cfg.Deadline
	}
	isDue := func(s int32) bool { return all || t.cover[s] <= d.flushTo || now-t.since[s] >= nearly }
	if d.set.Order == OrderFair {
		d.collectTurns(isDue)
	} else {
		for s := t.dirty.head; s != none && !d.queue.full() && isDue(s); s = t.dirty.next[s] {
			d.queue.add(t.due(s))
		}
	}
	return max(d.cfg.Deadline-(now-t.since[t.dirty.head]), time.Millisecond)
}

// collectTurns lists one turn of each region that has anything due. Whose turn could not be had goes first next time.
func (d *Device) collectTurns(isDue func(int32) bool) {
	t := d.t
	last := t.dirty.regions.first.before
	for turn := int32(0); !d.queue.full(); turn++ {
		r := t.dirty.regions.first
		t.dirty.regions.first = r.after
		for s, n := r.head, 0; s != none && n < quantumBlocks && !d.queue.full() && isDue(s); s, n = r.next[s], n+1 {
			w := t.due(s)
			w.turn = turn
			d.queue.add(w)
		}
		if r == last {
			return
		}
	}
}

func (t *slots) due(s int32) due {
	return due{lba: t.lba[s], slot: s, seq: t.seq[s], since: t.since[s]}
}

// loadLocked makes a flight of w and its dirty neighbours, the short one if they fit. What is left of one write stays
// together, as long as no other write has covered a part of it: so it reaches the device below whole or not at all. A
// flight that is longer than AtomicWriteBytes has no write in it that lies across a multiple of that, for there the
// device below cuts. Nil: w is gone, or in the way of another write-back or an operation that goes through; never are
// two of one block under way.
func (d *Device) loadLocked(short, long *flight, w due) *flight {
	t := d.t
	if t == nil || t != d.queueOf || d.err != nil || t.state[w.slot] != dirty || t.seq[w.slot] != w.seq {
		return nil
	}
	first := w.lba
	for first > 0 { // the beginning of its write
		s := t.index.get(first - 1)
		if s == none || t.state[s] != dirty || t.seq[s] != w.seq {
			break
		}
		first--
	}
	if d.inUseLocked(first, int64(w.lba-first)+1) {
		return nil
	}
	d.loading = d.loading[:0]
	cut := false // a write of the flight lies on both sides of a multiple of AtomicWriteBytes
	for writes := 0; ; writes++ {
		at := first + trivet.LBA(len(d.loading))
		run := t.runOf(at)
		cut = cut || at/pieceBlocks != (at+trivet.LBA(max(run, 1))-1)/pieceBlocks
		cutBelow := len(d.loading)+run > pieceBlocks
		if run == 0 || len(d.loading)+run > d.mode.blocks || cutBelow && cut || d.inUseLocked(at, int64(run)) {
			if writes == 0 {
				return nil
			}
			d.stats.Merged += uint64(writes - 1)
			break
		}
		for i := range run {
			d.loading = append(d.loading, t.index.get(at+trivet.LBA(i)))
		}
	}
	f := long
	if len(d.loading) <= shortBlocks {
		f = short
	} else {
		d.aloftN++
	}
	f.lba, f.slots, f.cover, f.began = first, append(f.slots[:0], d.loading...), noCover, d.now()
	for _, s := range f.slots {
		f.cover = min(f.cover, t.cover[s])
		t.launch(s)
	}
	d.spans = append(d.spans, span{f.lba, int64(len(f.slots)), false})
	d.stats.WriteBacks++
	d.stats.WriteBackBytes += uint64(len(f.slots)) * trivet.BlockSize
	return f
}

// runOf returns how many dirty blocks of one write there are from lba on.
func (t *slots) runOf(lba trivet.LBA) int {
	n := 0
	seq := uint64(0)
	for ; n < pieceBlocks; n++ {
		s := t.index.get(lba + trivet.LBA(n))
		if s == none || t.state[s] != dirty || n > 0 && t.seq[s] != seq {
			break
		}
		seq = t.seq[s]
	}
	return n
}

// fly carries out write-backs, until thin, if there is one, says that it is too many.
func (d *Device) fly(thin <-chan struct{}) {
	for {
		d.waitingN.Add(1)
		select {
		case <-d.life.Done():
			return
		case <-thin:
			d.waitingN.Add(-1)
			return
		case f := <-d.work:
			d.waitingN.Add(-1)
			under := begin(d.cfg.Meters.WriteBack)
			err := d.carry(f)
			under.end()
			d.land(f, err)
		}
	}
}

func (d *Device) carry(f *flight) error {
	for i, s := range f.slots {
		if err := d.t.m.verify(s, f.lba+trivet.LBA(i), d.t.crc[s]); err != nil {
			return fmt.Errorf("cache of %s: %w", d.cfg.Volume, err)
		}
		copy(f.buf[i*trivet.BlockSize:], d.t.m.block(s))
	}
	p := f.buf[:len(f.slots)*trivet.BlockSize]
	return d.next.WriteAt(d.life, p, int64(f.lba)*trivet.BlockSize)
}

// land notes how a write-back went.
func (d *Device) land(f *flight, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dropSpanLocked(f.lba, int64(len(f.slots)), false)
	f.cover = noCover
	keep := !d.set.NoClean
	for _, s := range f.slots {
		if err != nil {
			d.t.crashed(s)
		} else {
			d.t.landed(s, keep)
		}
	}
	switch {
	case err == nil:
		now := d.now()
		d.pace.done(f.began, now, len(f.slots))
		if !f.short { // how many short ones are under way is not for the tuner to say
			d.learnLocked(now, now-f.began, len(f.slots))
		}
	case errors.Is(err, trivet.ErrFenced):
		d.fenceLocked(err)
	case d.life.Err() == nil: // else Close has broken it off
		d.poisonLocked(err)
	}
	d.restLocked(f)
	d.changed.fire()
	d.wakeFlusherLocked()
}

// poisonLocked makes every later call that changes or flushes fail: a write that was acknowledged may be lost, and
// whoever asks must not be told later that all is well (fsyncgate, H14). The blocks stay in the mapping: the next
// attachment writes them back.
func (d *Device) poisonLocked(cause error) {
	if d.err != nil {
		return
	}
	d.err = fmt.Errorf("%s: a write-back failed: %w", d.cfg.Volume, cause)
	if d.lock != nil {
		d.lock.head.poisoned = true
		d.putHeader()
	}
	d.log.Error("a write-back failed; writes and flushes fail until the volume is detached",
		"bytes", int64(d.t.unwritten())*trivet.BlockSize, "err", cause)
}

// Flush implements trivet.Device: a barrier. Everything that was acknowledged before is below, and the device below
// was flushed, when it returns nil.
func (d *Device) Flush(ctx context.Context) error {
	d.mu.Lock()
	err := d.writtenBackLocked(ctx, d.seq)
	d.stats.Flushes++
	d.mu.Unlock()
	if err != nil {
		return err
	}
	return d.noteFence(d.next.Flush(ctx))
}

// writtenBackLocked waits until every write up to seq is below.
func (d *Device) writtenBackLocked(ctx context.Context, seq uint64) error {
	for {
		switch {
		case d.err != nil:
			return d.err
		case d.t == nil || d.oldestLocked() > seq:
			return nil
		}
		d.flushTo = max(d.flushTo, seq)
		d.wakeFlusherLocked()
		if err := d.waitLocked(ctx); err != nil {
			return err
		}
	}
}

// oldestLocked returns the oldest write that is not below; the highest number if there is none.
func (d *Device) oldestLocked() uint64 {
	oldest := noCover
	if s := d.t.dirty.head; s != none {
		oldest = d.t.cover[s]
	}
	for _, f := range d.all {
		oldest = min(oldest, f.cover)
	}
	return oldest
}
