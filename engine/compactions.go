package engine

import (
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

// After a compaction met damage none begins for damagePauseMin, then twice as long each time, at most
// damagePauseMax. Damage that is damageForget old counts no more. When damageStuckN compactions in a row met it,
// they do not get past it.
const (
	damagePauseMin = time.Second
	damagePauseMax = 5 * time.Minute
	damageForget   = 2 * damagePauseMax
	damageStuckN   = 7
)

// compactions grants Pebble its compactions: as many as Pebble asks for, as its own ConcurrencyLimitScheduler does,
// but none for a while after one met a damaged block. Pebble begins such a compaction again at once and for
// ever when the table lies in level 0 (compaction.go:390 of v2.1.7 marks no problem span there, and 2614 knows no
// backoff), each time with a search for the flipped bit that takes a tenth of a second of CPU for a block of 16 KiB.
//
// There is no ticker. What can make room for a waiting compaction is the end of another, the end of a flush
// (UpdateGetAllowedWithoutPermission) and the end of a pause.
//
// Locks: Pebble calls with DB.mu held, so mu must not be held while the DB is called (compaction_scheduler.go:37).
type compactions struct {
	mu       sync.Mutex
	db       pebble.DBForCompaction
	running  int
	granting bool
	idle     sync.Cond // granting has ended
	again    bool      // something was refused while granting
	closed   bool

	paused   *time.Timer // not nil during a pause
	pause    time.Duration
	damageN  int
	damageAt time.Time
}

var (
	_ pebble.CompactionScheduler   = (*compactions)(nil)
	_ pebble.CompactionGrantHandle = (*compactions)(nil)
)

func newCompactions() *compactions {
	c := &compactions{}
	c.idle.L = &c.mu
	return c
}

// damaged begins a pause. It reports whether compactions do not get past the damage.
func (c *compactions) damaged() (stuck bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if now.Sub(c.damageAt) >= damageForget {
		c.damageN, c.pause = 0, 0
	}
	c.damageN++
	c.damageAt = now
	c.pause = min(max(2*c.pause, damagePauseMin), damagePauseMax)
	if c.paused != nil {
		c.paused.Stop()
	}
	if !c.closed {
		c.paused = time.AfterFunc(c.pause, c.resume)
	}
	return c.damageN >= damageStuckN
}

// stuck reports whether compactions do not get past damage.
func (c *compactions) stuck() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.damageN >= damageStuckN
}

// resume ends a pause. One that was begun anew meanwhile ends earlier than it should, which costs one try.
func (c *compactions) resume() {
	c.mu.Lock()
	c.paused = nil
	c.mu.Unlock()
	c.grant()
}

// roomLocked reports whether one more compaction may run.
func (c *compactions) roomLocked() bool {
	return c.db != nil && !c.closed && c.paused == nil && c.db.GetAllowedWithoutPermission() > c.running
}

// Register implements pebble.CompactionScheduler.
func (c *compactions) Register(_ int, db pebble.DBForCompaction) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.db = db
}

// Unregister implements pebble.CompactionScheduler. The DB is not called any more when it returns.
func (c *compactions) Unregister() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.paused != nil {
		c.paused.Stop()
	}
	for c.granting {
		c.idle.Wait()
	}
}

// TrySchedule implements pebble.CompactionScheduler. Pebble remembers that it was refused, and is asked by grant.
func (c *compactions) TrySchedule() (bool, pebble.CompactionGrantHandle) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.roomLocked() {
		c.again = c.granting
		return false, nil
	}
	c.running++
	return true, c
}

// UpdateGetAllowedWithoutPermission implements pebble.CompactionScheduler. Pebble calls it with its locks held, so the
// grant is another goroutine's, which Unregister waits for.
func (c *compactions) UpdateGetAllowedWithoutPermission() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.roomLocked() {
		return
	}
	if c.granting {
		c.again = true
		return
	}
	c.granting = true
	go c.grants()
}

// Done implements pebble.CompactionGrantHandle: a compaction is over.
func (c *compactions) Done() {
	c.mu.Lock()
	c.running--
	c.mu.Unlock()
	c.grant()
}

// grant begins what waits and may run.
func (c *compactions) grant() {
	c.mu.Lock()
	if c.granting {
		c.again = true
		c.mu.Unlock()
		return
	}
	c.granting = true
	c.mu.Unlock()
	c.grants()
}

// grants is grant. REQUIRES: granting was set for this call.
func (c *compactions) grants() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.again = true; c.again; {
		c.again = false
		for c.roomLocked() {
			c.running++ // before Schedule, whose compaction may be Done before it returns
			c.mu.Unlock()
			waiting, _ := c.db.GetWaitingCompaction()
			begun := waiting && c.db.Schedule(c)
			c.mu.Lock()
			if !begun {
				c.running--
				break
			}
		}
	}
	c.granting = false
	c.idle.Broadcast()
}

// Started implements pebble.CompactionGrantHandle.
func (c *compactions) Started() {}

// MeasureCPU implements pebble.CompactionGrantHandle.
func (c *compactions) MeasureCPU(pebble.CompactionGoroutineKind) {}

// CumulativeStats implements pebble.CompactionGrantHandle.
func (c *compactions) CumulativeStats(pebble.CompactionGrantHandleStats) {}
