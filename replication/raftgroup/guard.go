package raftgroup

import (
	"fmt"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
)

const (
	stallQuiet = 2 * time.Second  // a write takes longer: stop sending and answering heartbeats
	stallFatal = 10 * time.Second // and longer: stop the process

	// stallTicks looks at a write that hangs, a second apart, come before it is taken for hung: after a machine stood
	// still, as one does that is moved to other hardware, each write under way has taken long, and ends a moment later.
	stallTick  = time.Second
	stallTicks = int((stallFatal - stallQuiet) / stallTick)
)

// diskGuard stands before every write of a group. After the first failed write it refuses all
// others and calls fatal: a file whose fsync failed once cannot be trusted again (H28), and the
// library goes on with a wrong idea of its log (raft.go:1562). From then on the group is dead: no
// message leaves it, no answer is given, nothing is applied, so it does not matter what the library
// still believes, and a host may close the group instead of ending the process.
//
// It also watches for a disk that hangs: the library's heartbeats would go on, and nobody would
// elect a leader whose disk works (D8).
type diskGuard struct {
	fatal   func(error)
	rot     func(error) // called in place of fatal for an entry that cannot be read
	onStall func()      // called when a write has taken stallQuiet, and when it ends after all

	mu     sync.Mutex
	err    error // first failure; sticky
	closed bool
	nextID uint64
	starts map[uint64]time.Time // of the writes under way
	quiet  *time.Timer
	dead   *time.Timer
	oldest uint64 // the write that dead looks at
	ticks  int    // how often it has
}

// run does one write. It returns the error of the write, or of an earlier one.
func (d *diskGuard) run(what string, write func() error) error {
	id, err := d.begin()
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	err = write()
	d.end(id)
	if err == nil {
		return nil
	}
	err = fmt.Errorf("%s: %w", what, err)
	d.fail(err)
	return err
}

func (d *diskGuard) begin() (uint64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.err != nil:
		return 0, fmt.Errorf("an earlier write failed: %w", d.err)
	case d.closed:
		return 0, trivet.ErrClosed
	}
	if d.quiet == nil {
		d.starts = make(map[uint64]time.Time)
		d.quiet = time.AfterFunc(stallQuiet, d.timeQuiet)
		d.dead = time.AfterFunc(stallQuiet, d.timeDead)
	}
	d.nextID++
	d.starts[d.nextID] = time.Now()
	d.armLocked()
	return d.nextID, nil
}

func (d *diskGuard) end(id uint64) {
	d.mu.Lock()
	hung := time.Since(d.starts[id]) >= stallQuiet
	delete(d.starts, id)
	d.armLocked()
	d.mu.Unlock()
	if hung && d.onStall != nil {
		d.onStall()
	}
}

// armLocked sets the timers for the oldest write under way.
func (d *diskGuard) armLocked() {
	oldest, age, busy := d.oldestLocked()
	if !busy {
		d.quiet.Stop()
		d.dead.Stop()
		return
	}
	if age < stallQuiet {
		d.quiet.Reset(stallQuiet - age)
	}
	if oldest != d.oldest {
		d.oldest, d.ticks = oldest, 0
		d.dead.Reset(max(stallQuiet-age, 0) + stallTick)
	}
}

// oldestLocked returns the oldest write under way and how long it has taken.
func (d *diskGuard) oldestLocked() (id uint64, age time.Duration, busy bool) {
	var began time.Time
	for i, t := range d.starts {
		if !busy || i < id {
			id, began, busy = i, t, true
		}
	}
	if !busy {
		return 0, 0, false
	}
	return id, time.Since(began), true
}

func (d *diskGuard) timeQuiet() {
	if d.stalled() && d.onStall != nil {
		d.onStall()
	}
}

func (d *diskGuard) timeDead() {
	d.mu.Lock()
	oldest, age, busy := d.oldestLocked()
	if !busy || oldest != d.oldest || d.closed {
		d.mu.Unlock()
		return // armed for another meanwhile, or for none
	}
	d.ticks++
	hung := age >= stallFatal && d.ticks >= stallTicks
	if !hung {
		d.dead.Reset(stallTick)
	}
	d.mu.Unlock()
	if hung {
		d.fail(fmt.Errorf("a write to the log hangs since %v: %w", age, trivet.ErrUnavailable))
	}
}

// fail records the first failure and calls fatal with it.
func (d *diskGuard) fail(err error) { d.failWith(err, d.fatal) }

// damaged is fail for an entry that was written whole and cannot be read any more: the replica is suspect, and the disk
// takes writes as ever.
func (d *diskGuard) damaged(err error) {
	tell := d.rot
	if tell == nil {
		tell = d.fatal
	}
	d.failWith(err, tell)
}

func (d *diskGuard) failWith(err error, tell func(error)) {
	d.mu.Lock()
	first := d.err == nil && !d.closed
	if first {
		d.err = err
	}
	d.mu.Unlock()
	if first && tell != nil {
		tell(err)
	}
}

// poison refuses all later writes because of a failure that fatal knows of.
func (d *diskGuard) poison(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err == nil {
		d.err = err
	}
}

// failed returns the first failure.
func (d *diskGuard) failed() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// stalled reports that a write hangs, or that one failed.
func (d *diskGuard) stalled() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, age, _ := d.oldestLocked()
	return d.err != nil || age >= stallQuiet
}

// close makes every later write fail with ErrClosed, which is no failure of the disk.
func (d *diskGuard) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	if d.quiet != nil {
		d.quiet.Stop()
		d.dead.Stop()
	}
}
