package controller

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// liveParams are the parameters that may change while a volume exists, in use or not: what a
// VolumeAttributesClass may say. The others decide how a volume is made.
var liveParams = []string{
	ParamIOPSLimit,
	ParamReadIOPSLimit,
	ParamWriteIOPSLimit,
	ParamBandwidthLimit,
	ParamReadBandwidthLimit,
	ParamWriteBandwidthLimit,
	ParamBurst,
	ParamIOPSReservation,
	ParamPriority,
	ParamIOScheduler,
	ParamCacheMode,
	ParamCacheSize,
	ParamReadAhead,
	ParamEviction,
	ParamAdaptive,
}

// LiveParams returns the canonical names of the parameters that SetParams changes, sorted.
func LiveParams() []string { return slices.Sorted(slices.Values(liveParams)) }

// SetParams changes parameters of a volume, all of patch or nothing, and returns the volume as it is then.
// Keys and values are those of a StorageClass; an empty value is the default. The node that has the volume
// attached follows as soon as it hears of it. The same again: nil.
//
// ErrInvalid names the key that is unknown, given twice, malformed or not to be changed, or what
// contradicts another parameter; ErrNotFound: no such volume.
func (c *Controller) SetParams(ctx context.Context, id trivet.VolumeID, patch map[string]string) (meta.Volume, error) {
	for {
		s, err := c.store.Read(ctx)
		if err != nil {
			return meta.Volume{}, fmt.Errorf("set parameters of %s: %w", id, err)
		}
		v, err := lookUp(s, id)
		if err != nil {
			return meta.Volume{}, fmt.Errorf("set parameters of %s: %w", id, err)
		}
		change, err := patchParams(v.Params, patch)
		if err != nil {
			return meta.Volume{}, fmt.Errorf("set parameters of %s: %w", id, err)
		}
		if len(change) == 0 {
			return v, nil
		}
		res, err := c.store.Propose(ctx, meta.Command{SetParams: &meta.SetParams{
			Volume: id, Params: change, IfRevision: v.Revision,
		}})
		if errors.Is(err, trivet.ErrPending) {
			continue // it has changed since it was read, and this may contradict it now
		}
		if err != nil {
			return meta.Volume{}, err
		}
		return *res.Volume, nil
	}
}

// patchParams returns what is to be changed in canonical parameters so that patch holds; empty values remove.
func patchParams(have, patch map[string]string) (map[string]string, error) {
	if len(patch) == 0 {
		return nil, fmt.Errorf("no parameters are given; %s can be changed: %w", strings.Join(LiveParams(), ", "),
			trivet.ErrInvalid)
	}
	if _, err := ParseParams(patch); err != nil {
		return nil, err // before the keys are looked at: unknown, twice and malformed are said as in a create
	}
	merged, changed := maps.Clone(have), map[string]bool{}
	if merged == nil {
		merged = map[string]string{}
	}
	for _, key := range slices.Sorted(maps.Keys(patch)) {
		i := slices.IndexFunc(liveParams, func(k string) bool { return strings.EqualFold(k, key) })
		if i < 0 {
			return nil, fmt.Errorf("parameter %q cannot be changed, only %s: %w", key, strings.Join(LiveParams(), ", "),
				trivet.ErrInvalid)
		}
		merged[liveParams[i]], changed[liveParams[i]] = patch[key], true
	}
	p, err := ParseParams(merged)
	if err != nil {
		return nil, err
	}
	canonical, change := p.Map(), map[string]string{}
	for key := range changed {
		if canonical[key] != have[key] {
			change[key] = canonical[key]
		}
	}
	return change, nil
}
