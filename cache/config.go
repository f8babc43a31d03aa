package cache

import (
	"fmt"
	"log/slog"
	"time"

	"github.com/trivet-csi/trivet"
)

// Mode says when a write is acknowledged.
type Mode string

// The modes.
const (
	WriteBack    Mode = "writeBack"    // once it is in the mapping, which outlives the process
	WriteThrough Mode = "writeThrough" // once it is below; the cache keeps a copy for reads
	WriteAround  Mode = "writeAround"  // once it is below; only reads fill the cache
)

// Modes lists the modes.
func Modes() []Mode { return []Mode{WriteBack, WriteThrough, WriteAround} }

// Settings are what may be changed while the cache is in use. The zero value caches nothing.
type Settings struct {
	Mode     Mode     // "" = WriteThrough
	Eviction Eviction // "" = LRU
	Order    Order    // of write-backs; "" = OrderDeadline
	// Bytes of blocks, dirty and clean, at most; at least 512 KiB, or 0: no cache, everything passes through.
	Bytes int64
	// ReadAheadBytes is how far ahead of a sequential reader blocks are fetched, at most; 0 = not at all.
	ReadAheadBytes int64
	// Adaptive lets the size and the number of write-backs, and how far is read ahead, follow what is measured: within
	// 64 or 128 KiB, 8 to 32, and ReadAheadBytes. Without it they are 64 KiB, Config.Depth and ReadAheadBytes.
	Adaptive bool
	// NoClean is for attachments of two writers: the other may change the blocks below. No copies are kept for reads,
	// and WriteBack means WriteThrough.
	NoClean bool
}

// Validate returns ErrInvalid naming the field.
func (s *Settings) Validate() error {
	switch s.Mode {
	case "", WriteBack, WriteThrough, WriteAround:
	default:
		return fmt.Errorf("cache mode %q: want one of %v: %w", s.Mode, Modes(), trivet.ErrInvalid)
	}
	if _, err := newPolicy(s.Eviction, 0); err != nil {
		return err
	}
	if err := s.Order.check(); err != nil {
		return err
	}
	if s.Bytes < 0 || s.Bytes > 0 && s.Bytes < slotsMin*trivet.BlockSize || s.Bytes > slotsMax*trivet.BlockSize {
		return fmt.Errorf("cache of %d bytes: want 0, or at least %d: %w", s.Bytes, slotsMin*trivet.BlockSize,
			trivet.ErrInvalid)
	}
	if s.ReadAheadBytes < 0 || s.ReadAheadBytes > ReadAheadMax {
		return fmt.Errorf("read-ahead of %d bytes: want 0 to %d: %w", s.ReadAheadBytes, ReadAheadMax, trivet.ErrInvalid)
	}
	return nil
}

func (s *Settings) slots() int { return int(s.Bytes / trivet.BlockSize) }

// Config says whose cache it is and how it works.
type Config struct {
	Cluster trivet.ClusterID
	Volume  trivet.VolumeID
	Epoch   trivet.Epoch // granted to this process and fenced
	Settings
	// Resume says that whoever used the Device of the predecessor goes on without having seen it die: what was lost
	// there must stay lost (H14). Without it an opened cache starts well.
	Resume bool
	// Depth is how many write-backs are in flight at most, unless Adaptive; 0 = 16. Of those of at most 16 KiB there may
	// be as many more as are as long together, were they of one block each.
	Depth int
	// Deadline is how old a dirty block may get before it is written back; 0 = 5 s.
	Deadline time.Duration
	Meters   Meters
	Logger   *slog.Logger // nil discards
}

// Meter is told of each request that comes and goes, and for how long it was there, by many goroutines at once. It must
// not block.
type Meter interface {
	Enter()
	Leave(d time.Duration)
}

// Meters measure a Device; nil = not measured.
type Meters struct {
	Own       Meter // reads and writes, until they are answered or passed on to the Device below
	Room      Meter // writes that the dirty limit holds back; what passes at once is not counted
	WriteBack Meter // write-backs, from the copy of their blocks until they are below
}

const (
	depthDefault    = 16
	depthMax        = 128
	deadlineDefault = 5 * time.Second // as vm.dirty_writeback_centisecs of the kernel
)

// Validate returns ErrInvalid naming the field.
func (c *Config) Validate() error {
	switch {
	case c.Volume == trivet.MetaGroup:
		return fmt.Errorf("cache: Volume is not set: %w", trivet.ErrInvalid)
	case len(c.Cluster) > 36:
		return fmt.Errorf("cache of %s: Cluster %q is no UUID: %w", c.Volume, c.Cluster, trivet.ErrInvalid)
	case c.Epoch == 0:
		return fmt.Errorf("cache of %s: Epoch is not set: %w", c.Volume, trivet.ErrInvalid)
	case c.Depth < 0 || c.Depth > depthMax:
		return fmt.Errorf("cache of %s: Depth %d is not 0 to %d: %w", c.Volume, c.Depth, depthMax, trivet.ErrInvalid)
	case c.Deadline < 0:
		return fmt.Errorf("cache of %s: Deadline %v is negative: %w", c.Volume, c.Deadline, trivet.ErrInvalid)
	}
	if err := c.Settings.Validate(); err != nil {
		return fmt.Errorf("cache of %s: %w", c.Volume, err)
	}
	return nil
}

func (c Config) withDefaults() Config {
	if c.Depth == 0 {
		c.Depth = depthDefault
	}
	if c.Deadline == 0 {
		c.Deadline = deadlineDefault
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}
