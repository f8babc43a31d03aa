package node

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/internal/stage"
	"github.com/trivet-csi/trivet/iothrottle"
)

// The parameters of a volume that shape its data path. Their values are canonical: decimal numbers,
// in requests and bytes per second; absent or zero means no limit.
const (
	paramIOPSLimit           = "iopsLimit"
	paramReadIOPSLimit       = "readIopsLimit"
	paramWriteIOPSLimit      = "writeIopsLimit"
	paramBandwidthLimit      = "bandwidthLimit"
	paramReadBandwidthLimit  = "readBandwidthLimit"
	paramWriteBandwidthLimit = "writeBandwidthLimit"
	paramBurst               = "burst" // seconds
	paramIOPSReservation     = "iopsReservation"
	paramPriority            = "priority"        // absent: priorityDefault
	paramReads               = "readConsistency" // absent: ReadStrong
)

// path is the data path of one attachment, above the replicated volume: a Device, whose settings follow
// the volume's parameters while it is open.
type path struct {
	trivet.Device // the top of the stack

	throttle  *iothrottle.Throttle
	scheduled *iothrottle.Scheduled
	cache     *caching
	stages    *stage.Volume // what is measured of it
	shared    bool          // another node may write the volume too
}

// shared is what the data paths of a node have in common.
type shared struct {
	scheduler *iothrottle.Scheduler
	stages    *stage.Registry // nil = nothing is measured
}

// stack builds the data path; read it from the kernel device on the left to the Raft group on the right.
// The cache is open already: it belongs to an epoch, which is not for the stack to know. The path closes stages.
func stack(cached *caching, v *meta.Volume, with *shared, stages *stage.Volume) (*path, error) {
	limits, share, err := qosOf(v)
	if err != nil {
		return nil, err
	}
	scheduled := with.scheduler.Device(cached, share, meterOf(stages, stage.Scheduler))
	stages.SetCache(cached.counts)
	throttle := iothrottle.NewWith(scheduled, limits, iothrottle.Options{Meter: meterOf(stages, stage.Throttle)})
	return &path{
		Device:   protect(probeRequests(throttle, stages), v.Attached != nil && v.Attached.ReadOnly),
		throttle: throttle, scheduled: scheduled, cache: cached, stages: stages, shared: sharedWriter(v),
	}, nil
}

// Allocated implements trivet.Allocator, by all stages of the path.
func (p *path) Allocated(ctx context.Context, off, n int64, runs []trivet.Run) (int, error) {
	return trivet.AllocatedOf(ctx, p.Device, off, n, runs)
}

// meterOf returns a Meter for iothrottle, which tells no Meter by nil.
func meterOf(stages *stage.Volume, s stage.Stage) iothrottle.Meter {
	if stages == nil {
		return nil
	}
	return stages.Meter(s)
}

// close takes the path out of what it shares with others. REQUIRES: called once, when no request comes any more.
func (p *path) close() {
	p.stages.SetCache(nil)
	p.scheduled.Close()
	p.stages.Close()
}

// checkSettings returns ErrInvalid for parameters that no data path can be opened with. It comes before the group is
// opened: an epoch has one, and a group that a cache has written to cannot be thrown away (H39).
func checkSettings(v *meta.Volume) error {
	if _, _, err := qosOf(v); err != nil {
		return err
	}
	if _, _, err := cacheOf(v); err != nil {
		return fmt.Errorf("data path of %s: %w", v.ID, err)
	}
	return nil
}

// apply makes the open path follow v's parameters, without a pause.
func (p *path) apply(v *meta.Volume) error {
	limits, share, err := qosOf(v)
	if err != nil {
		return err
	}
	if limits != p.throttle.Limits() {
		p.throttle.SetLimits(limits)
	}
	if share != p.scheduled.Share() {
		p.scheduled.SetShare(share)
	}
	if err := p.cache.apply(v); err != nil {
		return fmt.Errorf("data path of %s: %w", v.ID, err)
	}
	return nil
}

// qosOf returns what a volume may do by itself and beside others.
func qosOf(v *meta.Volume) (iothrottle.Limits, iothrottle.Share, error) {
	limits, err := limitsOf(v.Params)
	if err != nil {
		return limits, iothrottle.Share{}, fmt.Errorf("data path of %s: %w", v.ID, err)
	}
	share, err := shareOf(v.Params)
	if err != nil {
		return limits, share, fmt.Errorf("data path of %s: %w", v.ID, err)
	}
	return limits, share, nil
}

// priorityDefault is that of controller.PriorityDefault, which canonical parameters leave out.
const priorityDefault = 50

func shareOf(params map[string]string) (iothrottle.Share, error) {
	share := iothrottle.Share{Weight: priorityDefault}
	reservation, err := limitOf(params, paramIOPSReservation)
	if err != nil {
		return share, err
	}
	share.Reservation = reservation
	if params[paramPriority] != "" {
		priority, err := limitOf(params, paramPriority)
		if err != nil {
			return share, err
		}
		share.Weight = int(min(priority, 100))
	}
	return share, nil
}

// drain returns once everything that was acknowledged is committed.
func (p *path) drain(ctx context.Context) error {
	release, err := p.cache.Drain(ctx)
	if err == nil {
		release()
	}
	return err
}

// readsOf returns how reads of this attachment may be answered: one that can write sees its own writes,
// whatever the volume allows.
func readsOf(v *meta.Volume) trivet.ReadConsistency {
	reads := trivet.ReadConsistency(v.Params[paramReads])
	if sharedWriter(v) {
		return trivet.ReadStrong // a session knows of its own writes only
	}
	if reads == trivet.ReadEventual && (v.Attached == nil || !v.Attached.ReadOnly) {
		return trivet.ReadSession
	}
	return reads
}

func limitsOf(params map[string]string) (iothrottle.Limits, error) {
	var l iothrottle.Limits
	var burstSeconds int64
	for _, f := range []struct {
		key string
		at  *int64
	}{
		{paramIOPSLimit, &l.IOPS},
		{paramReadIOPSLimit, &l.ReadIOPS},
		{paramWriteIOPSLimit, &l.WriteIOPS},
		{paramBandwidthLimit, &l.BytesPerSec},
		{paramReadBandwidthLimit, &l.ReadBytesPerSec},
		{paramWriteBandwidthLimit, &l.WriteBytesPerSec},
		{paramBurst, &burstSeconds},
	} {
		var err error
		if *f.at, err = limitOf(params, f.key); err != nil {
			return iothrottle.Limits{}, err
		}
	}
	l.Burst = time.Duration(min(burstSeconds, int64(iothrottle.BurstMax/time.Second))) * time.Second
	return l, nil
}

func limitOf(params map[string]string, key string) (int64, error) {
	s, ok := params[key]
	if !ok || s == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("parameter %s=%q: want a decimal number: %w", key, s, trivet.ErrInvalid)
	}
	return n, nil
}

// protect returns next, without its writing methods when readOnly is set.
func protect(next trivet.Device, readOnly bool) trivet.Device {
	if !readOnly {
		return next
	}
	return &readOnlyDevice{next}
}

// readOnlyDevice refuses every change of the device below: not one byte of a volume that is attached
// read-only changes, whatever the filesystem on it would like to do (journal replay included).
type readOnlyDevice struct{ trivet.Device }

var errReadOnly = fmt.Errorf("volume is attached read-only: %w", trivet.ErrInvalid)

// WriteAt refuses.
func (d *readOnlyDevice) WriteAt(context.Context, []byte, int64) error { return errReadOnly }

// Discard refuses.
func (d *readOnlyDevice) Discard(context.Context, int64, int64) error { return errReadOnly }

// WriteZeroes refuses.
func (d *readOnlyDevice) WriteZeroes(context.Context, int64, int64) error { return errReadOnly }

// Flush has nothing to flush.
func (d *readOnlyDevice) Flush(context.Context) error { return nil }

// Allocated implements trivet.Allocator.
func (d *readOnlyDevice) Allocated(ctx context.Context, off, n int64, runs []trivet.Run) (int, error) {
	return trivet.AllocatedOf(ctx, d.Device, off, n, runs)
}
