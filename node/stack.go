package node

import (
	"context"
	"fmt"
	"strconv"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/iothrottle"
)

// The parameters of a volume that shape its data path. Their values are canonical: decimal numbers,
// in requests and bytes per second; absent or zero means no limit.
const (
	paramIOPSLimit      = "iopsLimit"
	paramBandwidthLimit = "bandwidthLimit"
	paramReads          = "readConsistency" // absent: ReadStrong
)

// path is the data path of one attachment, above the replicated volume: a Device, whose settings follow
// the volume's parameters while it is open.
type path struct {
	trivet.Device // the top of the stack

	throttle *iothrottle.Throttle
	cache    *caching
}

// stack builds the data path; read it from the kernel device on the left to the Raft group on the right.
// The cache is open already: it belongs to an epoch, which is not for the stack to know.
func stack(cached *caching, v *meta.Volume) (*path, error) {
	limits, err := limitsOf(v.Params)
	if err != nil {
		return nil, fmt.Errorf("data path of %s: %w", v.ID, err)
	}
	throttle := iothrottle.New(cached, limits)
	return &path{
		Device:   protect(throttle, v.Attached != nil && v.Attached.ReadOnly),
		throttle: throttle,
		cache:    cached,
	}, nil
}

// checkSettings returns ErrInvalid for parameters that no data path can be opened with. It comes before the group is
// opened: an epoch has one, and a group that a cache has written to cannot be thrown away (H39).
func checkSettings(v *meta.Volume) error {
	_, err := limitsOf(v.Params)
	if err == nil {
		_, _, err = cacheOf(v)
	}
	if err != nil {
		return fmt.Errorf("data path of %s: %w", v.ID, err)
	}
	return nil
}

// apply makes the open path follow v's parameters, without a pause.
func (p *path) apply(v *meta.Volume) error {
	limits, err := limitsOf(v.Params)
	if err != nil {
		return fmt.Errorf("data path of %s: %w", v.ID, err)
	}
	if limits != p.throttle.Limits() {
		p.throttle.SetLimits(limits)
	}
	if err := p.cache.apply(v); err != nil {
		return fmt.Errorf("data path of %s: %w", v.ID, err)
	}
	return nil
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
	if reads == trivet.ReadEventual && (v.Attached == nil || !v.Attached.ReadOnly) {
		return trivet.ReadSession
	}
	return reads
}

func limitsOf(params map[string]string) (iothrottle.Limits, error) {
	iops, err := limitOf(params, paramIOPSLimit)
	if err != nil {
		return iothrottle.Limits{}, err
	}
	bytes, err := limitOf(params, paramBandwidthLimit)
	return iothrottle.Limits{IOPS: iops, BytesPerSec: bytes}, err
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
