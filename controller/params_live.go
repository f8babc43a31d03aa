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
	ParamReplicas,
	ParamDataLocality,
}

// LiveParams returns the canonical names of the parameters that SetParams changes, sorted.
func LiveParams() []string { return slices.Sorted(slices.Values(liveParams)) }

// SetParams changes parameters of a volume, all of patch or nothing, and returns the volume as it is then.
// Keys and values are those of a StorageClass; an empty value is the default. The node that has the volume
// attached follows as soon as it hears of it. The same again: nil.
//
// ErrInvalid names the key that is unknown, given twice, malformed or not to be changed, or what
// contradicts another parameter; ErrNotFound: no such volume. Another number of replicas is wanted from then on, in the
// same step as the rest; the cluster's mender adds or removes them one by one (SetReplicas).
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
		change, err := patchParams(&v, patch)
		if err != nil {
			return meta.Volume{}, fmt.Errorf("set parameters of %s: %w", id, err)
		}
		if len(change.Params) == 0 && change.Replicas == 0 {
			return v, nil
		}
		res, err := c.store.Propose(ctx, meta.Command{SetParams: change})
		if errors.Is(err, trivet.ErrPending) {
			continue // it has changed since it was read, and this may contradict it now
		}
		if err != nil {
			return meta.Volume{}, err
		}
		return *res.Volume, nil
	}
}

// patchParams returns the command by which patch holds of a volume; one with neither parameters nor replicas when it
// does already.
func patchParams(v *meta.Volume, patch map[string]string) (*meta.SetParams, error) {
	if len(patch) == 0 {
		return nil, fmt.Errorf("no parameters are given; %s can be changed: %w", strings.Join(LiveParams(), ", "),
			trivet.ErrInvalid)
	}
	named, err := livePatch(patch)
	if err != nil {
		return nil, err
	}
	merged := maps.Clone(v.Params)
	if merged == nil {
		merged = map[string]string{}
	}
	maps.Copy(merged, named)
	p, err := ParseParams(merged)
	if err != nil {
		return nil, err
	}
	out := &meta.SetParams{Volume: v.ID, Params: map[string]string{}, IfRevision: v.Revision}
	canonical := p.Map()
	for key := range named {
		if canonical[key] != v.Params[key] {
			out.Params[key] = canonical[key]
		}
	}
	// An operator's set-replicas has changed what is wanted and not the parameter, so one says nothing of the other.
	if _, given := named[ParamReplicas]; given && p.Replicas != v.WantReplicas {
		out.Replicas = p.Replicas
	}
	return out, nil
}

// livePatch returns patch by the canonical names of its keys. ErrInvalid names the first that is unknown, given twice,
// malformed or not to be changed.
func livePatch(patch map[string]string) (map[string]string, error) {
	if _, err := ParseParams(patch); err != nil {
		return nil, err // before the keys are looked at: unknown, twice and malformed are said as in a create
	}
	out := make(map[string]string, len(patch))
	for _, key := range slices.Sorted(maps.Keys(patch)) {
		i := slices.IndexFunc(liveParams, func(k string) bool { return strings.EqualFold(k, key) })
		if i < 0 {
			return nil, fmt.Errorf("parameter %q cannot be changed, only %s: %w", key, strings.Join(LiveParams(), ", "),
				trivet.ErrInvalid)
		}
		out[liveParams[i]] = patch[key]
	}
	return out, nil
}

// WithMutable returns the parameters of a volume that is created by params, of a StorageClass, and by mutable, of a
// VolumeAttributesClass, whose values go before those of params. ErrInvalid as for SetParams, and for what contradicts
// itself.
func WithMutable(params, mutable map[string]string) (map[string]string, error) {
	named, err := livePatch(mutable)
	if err != nil || len(named) == 0 {
		return params, err
	}
	out := make(map[string]string, len(params)+len(named))
	for key, value := range params {
		overruled := slices.ContainsFunc(liveParams, func(k string) bool {
			_, given := named[k]
			return given && strings.EqualFold(k, key)
		})
		if !overruled {
			out[key] = value
		}
	}
	maps.Copy(out, named)
	_, err = ParseParams(out)
	return out, err
}

// WithoutMetadata returns params without the keys by which sidecars name the claim that they are about
// (--extra-create-metadata, --extra-modify-metadata); params itself when it has none.
func WithoutMetadata(params map[string]string) map[string]string {
	isMetadata := func(key string) bool { return slices.Contains(ignoredParams, strings.ToLower(key)) }
	if !slices.ContainsFunc(slices.Collect(maps.Keys(params)), isMetadata) {
		return params
	}
	out := maps.Clone(params)
	maps.DeleteFunc(out, func(key, _ string) bool { return isMetadata(key) })
	return out
}
