package replication

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

const (
	// ioTimeoutDefault is how long I/O waits across leader changes: a filesystem that gets an error
	// goes read-only, so a blip must be a pause.
	ioTimeoutDefault = 60 * time.Second
	// requestsInFlight bounds the requests of a Volume, and so its memory: 64 KiB each. Further calls
	// wait for a place.
	requestsInFlight = 128
)

// VolumeConfig says which volume to open, and as whom.
type VolumeConfig struct {
	ID        trivet.VolumeID
	SizeBytes int64
	// Epoch was granted by the catalogue to this process alone, for one Volume: sequences count from
	// one in each epoch, so a second Volume with the same epoch would be taken for copies of the first.
	Epoch   trivet.Epoch
	Members []raftgroup.Member // where replicas are
	// Writer is the number of this writer, of those that may write at Epoch (Replica.FenceWriters).
	Writer int
	// Renew, when set, is asked for the epoch at which this writer's session goes on once the one before is fenced, since
	// another writer has come or gone. It waits until that one is fenced in. ErrFenced: the session is over. It
	// may be called concurrently. nil: the session has one epoch. Others write as well then, or may come to, so
	// ReadConsistency must be ReadStrong.
	Renew func(ctx context.Context, fenced trivet.Epoch) (trivet.Epoch, error)
	// ReadConsistency says who may answer reads; "" = ReadStrong. See the constants for what each costs.
	ReadConsistency trivet.ReadConsistency
	// FindMembers, when set, says where they are now. It is asked after each attempt that found no leader, so
	// it must be fast and must not call the Volume; an empty answer changes nothing. nil: Members for good.
	FindMembers func() []raftgroup.Member
	// IOTimeout bounds how long one call waits across leader changes; 0 = 60 s.
	IOTimeout time.Duration
	Network   transport.Network
	// Host of this node, if it has one: a replica that leads here is called without a detour.
	Host   *Host
	Logger *slog.Logger // may be nil
}

// Validate returns ErrInvalid naming a field that is not usable.
func (c *VolumeConfig) Validate() error {
	switch {
	case c.ID == trivet.MetaGroup:
		return fmt.Errorf("volume config: ID is not set: %w", trivet.ErrInvalid)
	case c.Epoch == 0:
		return fmt.Errorf("volume config of %s: Epoch is not set: %w", c.ID, trivet.ErrInvalid)
	case c.SizeBytes <= 0 || c.SizeBytes > trivet.VolumeSizeMax || c.SizeBytes%trivet.BlockSize != 0:
		return fmt.Errorf("volume config of %s: SizeBytes %d is not 1 block to %d bytes in whole blocks: %w",
			c.ID, c.SizeBytes, int64(trivet.VolumeSizeMax), trivet.ErrInvalid)
	case len(c.Members) == 0:
		return fmt.Errorf("volume config of %s: Members is empty: %w", c.ID, trivet.ErrInvalid)
	case c.Network == nil:
		return fmt.Errorf("volume config of %s: Network is not set: %w", c.ID, trivet.ErrInvalid)
	case c.IOTimeout < 0:
		return fmt.Errorf("volume config of %s: IOTimeout %v is negative: %w", c.ID, c.IOTimeout, trivet.ErrInvalid)
	case c.Writer < 0 || c.Writer >= WritersMax:
		return fmt.Errorf("volume config of %s: Writer %d is not 0 to %d: %w", c.ID, c.Writer, WritersMax-1,
			trivet.ErrInvalid)
	}
	level, err := levelOf(c.ReadConsistency)
	if err == nil && c.Renew != nil && level != levelStrong {
		err = fmt.Errorf("volume config of %s: ReadConsistency %s where others may write: %w", c.ID, c.ReadConsistency,
			trivet.ErrInvalid)
	}
	return err
}

// Volume is a trivet.Device over the group of a volume, from any node of the cluster. It is
// write-through: see Flush. It is safe for concurrent use.
//
// A call that finds no leader waits for one, up to IOTimeout, and then returns ErrUnavailable: whether
// it took effect is unknown. After ErrFenced every call returns ErrFenced at once.
type Volume struct {
	cfg     VolumeConfig
	log     *slog.Logger
	route   *route
	scout   scout
	session *session
	slots   chan struct{} // one per request in flight
	bounds  *bounds
	stats   stats
	size    atomic.Int64
	epoch   atomic.Uint64 // of what is sent; Renew raises it
	level   readLevel
	seen    atomic.Uint64 // newest entry whose effect this Volume has been told of (ReadSession)

	life context.Context // ends by Close or a fence, with the cause
	end  context.CancelCauseFunc

	mu       sync.Mutex
	flushErr error          // sticky: a write whose outcome is unknown (H14)
	calls    sync.WaitGroup // running calls; added to under mu, while life lasts
}

var _ trivet.Device = (*Volume)(nil)

// OpenVolume returns the Device. It does no I/O. ErrInvalid: cfg is not usable.
func OpenVolume(cfg VolumeConfig) (*Volume, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.IOTimeout == 0 {
		cfg.IOTimeout = ioTimeoutDefault
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	v := &Volume{
		cfg:     cfg,
		log:     cfg.Logger.With("component", "replication", "volume", cfg.ID.String(), "epoch", uint64(cfg.Epoch)),
		route:   newRoute(cfg.Members, cfg.FindMembers, cfg.Network.Local()),
		session: newSession(),
		slots:   make(chan struct{}, requestsInFlight),
	}
	v.size.Store(cfg.SizeBytes)
	v.epoch.Store(uint64(cfg.Epoch))
	v.level, _ = levelOf(cfg.ReadConsistency)                     // Validate has refused what is none
	v.life, v.end = context.WithCancelCause(context.Background()) // outlives every call
	v.bounds = &bounds{life: v.life, timeout: cfg.IOTimeout}
	return v, nil
}

// Size implements trivet.Device.
func (v *Volume) Size() int64 { return v.size.Load() }

// SetSize tells the Volume that Replica.Resize has made it larger. ErrOutOfRange: it would shrink;
// ErrInvalid: not whole blocks.
func (v *Volume) SetSize(sizeBytes int64) error {
	if sizeBytes%trivet.BlockSize != 0 || sizeBytes > trivet.VolumeSizeMax {
		return fmt.Errorf("set size of %s to %d bytes: %w", v.cfg.ID, sizeBytes, trivet.ErrInvalid)
	}
	for {
		old := v.size.Load()
		if sizeBytes < old {
			return fmt.Errorf("set size of %s to %d bytes, it has %d: %w", v.cfg.ID, sizeBytes, old, trivet.ErrOutOfRange)
		}
		if v.size.CompareAndSwap(old, sizeBytes) {
			return nil
		}
	}
}

// ReadAt implements trivet.Device. It returns what the last acknowledged write left, or a later one, unless
// ReadConsistency allows less.
func (v *Volume) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := trivet.CheckRange(off, int64(len(p)), v.Size()); err != nil {
		return fmt.Errorf("read %s: %w", v.cfg.ID, err)
	}
	return v.call(ctx, func(ctx context.Context) error {
		return v.pieces(ctx, off, int64(len(p)), readBytesMax, func(ctx context.Context, at, n int64) error {
			return v.readPiece(ctx, p[at-off:at-off+n], trivet.LBA(at/trivet.BlockSize))
		})
	})
}

// WriteAt implements trivet.Device. When it returns nil, the write is committed by a quorum. Up to
// AtomicWriteBytes it is applied whole or not at all, wherever it starts; a longer one is cut at
// multiples of that into pieces, which are committed in any order.
func (v *Volume) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := trivet.CheckRange(off, int64(len(p)), v.Size()); err != nil {
		return fmt.Errorf("write %s: %w", v.cfg.ID, err)
	}
	return v.call(ctx, func(ctx context.Context) error {
		return v.pieces(ctx, off, int64(len(p)), trivet.AtomicWriteBytes, func(ctx context.Context, at, n int64) error {
			data := p[at-off : at-off+n]
			return v.change(ctx, request{
				op: opWrite, lba: trivet.LBA(at / trivet.BlockSize), arg: uint64(n / trivet.BlockSize), data: data,
			})
		})
	})
}

// Discard implements trivet.Device: any range within the volume is aligned inwards (H18).
func (v *Volume) Discard(ctx context.Context, off, n int64) error {
	if off < 0 || n < 0 {
		return fmt.Errorf("discard %d bytes at byte %d of %s: %w", n, off, v.cfg.ID, trivet.ErrInvalid)
	}
	if size := v.Size(); off > size || n > size-off {
		return fmt.Errorf("discard %d bytes at byte %d of %s, which has %d: %w", n, off, v.cfg.ID, size, trivet.ErrOutOfRange)
	}
	lba, blockN := trivet.AlignInwards(off, n)
	return v.zero(ctx, opDiscard, lba, blockN)
}

// WriteZeroes implements trivet.Device.
func (v *Volume) WriteZeroes(ctx context.Context, off, n int64) error {
	if err := trivet.CheckRange(off, n, v.Size()); err != nil {
		return fmt.Errorf("write zeroes to %s: %w", v.cfg.ID, err)
	}
	return v.zero(ctx, opWriteZeroes, trivet.LBA(off/trivet.BlockSize), n/trivet.BlockSize)
}

func (v *Volume) zero(ctx context.Context, op opCode, lba trivet.LBA, blockN int64) error {
	return v.call(ctx, func(ctx context.Context) error {
		if blockN == 0 {
			return nil
		}
		return v.change(ctx, request{op: op, lba: lba, arg: uint64(blockN)})
	})
}

// Flush implements trivet.Device. Every write that returned before is committed by a quorum already,
// so there is nothing to wait for and no leader to ask: a fence that came since does not undo what was
// committed. It fails once the Volume is fenced or closed, and for good once a write failed whose
// outcome is unknown: the caller may have counted on it (H14).
func (v *Volume) Flush(ctx context.Context) error {
	return v.call(ctx, func(context.Context) error {
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.flushErr != nil {
			return fmt.Errorf("flush %s: an earlier write was lost: %w", v.cfg.ID, v.flushErr)
		}
		return nil
	})
}

// VolumeStats tells how calm the I/O was.
type VolumeStats struct {
	// LongestPause is the longest time that a call which ended since the last call of Stats took to
	// find a leader that answered; 0 when every first attempt did.
	LongestPause time.Duration
	// Retries counts attempts beyond the first since OpenVolume.
	Retries uint64
}

// Stats returns the figures and starts LongestPause anew.
func (v *Volume) Stats() VolumeStats { return v.stats.take() }

// Close ends outstanding calls with ErrClosed and waits for them. What they asked for may still
// happen. Idempotent.
func (v *Volume) Close() error {
	v.mu.Lock() // so that no call begins after Wait
	v.end(fmt.Errorf("%s: %w", v.cfg.ID, trivet.ErrClosed))
	v.mu.Unlock()
	v.calls.Wait()
	v.bounds.close()
	return nil
}

// atEpoch calls f with the epoch of this Volume, and again with each that follows while the session goes on. What was
// refused as fenced may have been applied by an earlier copy, so f sends the same sequence again.
func (v *Volume) atEpoch(ctx context.Context, f func(epoch trivet.Epoch) error) error {
	for {
		epoch := trivet.Epoch(v.epoch.Load())
		err := f(epoch)
		if v.cfg.Renew == nil || !errors.Is(err, trivet.ErrFenced) || v.life.Err() != nil {
			return err
		}
		if err := v.renew(ctx, epoch); err != nil {
			return err
		}
	}
}

func (v *Volume) renew(ctx context.Context, fenced trivet.Epoch) error {
	if trivet.Epoch(v.epoch.Load()) > fenced {
		return nil // another call has been told
	}
	next, err := v.cfg.Renew(ctx, fenced)
	switch {
	case err != nil && ctx.Err() != nil:
		return giveUp(ctx, v.cfg.IOTimeout, err)
	case err != nil:
		return err
	case next <= fenced:
		return fmt.Errorf("epoch %d follows %d, which is fenced: %w", next, fenced, trivet.ErrFenced)
	}
	for {
		old := v.epoch.Load()
		if uint64(next) <= old || v.epoch.CompareAndSwap(old, uint64(next)) {
			v.log.Info("another writer has come or gone: going on at a new epoch", "now", uint64(next))
			return nil
		}
	}
}

// call runs f with a context that ends after IOTimeout, with Close or with a fence. Others have the same one.
func (v *Volume) call(ctx context.Context, f func(ctx context.Context) error) error {
	v.mu.Lock()
	if v.life.Err() != nil {
		v.mu.Unlock()
		return context.Cause(v.life)
	}
	v.calls.Add(1)
	v.mu.Unlock()
	defer v.calls.Done()

	bound := v.bounds.enter(ctx)
	defer v.bounds.leave(bound)
	err := f(bound.ctx)
	if errors.Is(err, trivet.ErrFenced) {
		v.end(fmt.Errorf("%s at epoch %d: %w", v.cfg.ID, v.epoch.Load(), trivet.ErrFenced))
		v.log.Warn("volume is fenced: another attachment owns it", "err", err)
	}
	return err
}
