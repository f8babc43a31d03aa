package meta

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/trivet-csi/trivet"
)

func (p *SetParams) op() string {
	what := slices.Sorted(maps.Keys(p.Params))
	if p.Replicas > 0 && p.Params["replicas"] == "" {
		what = append(what, "replicas")
	}
	return fmt.Sprintf("set %s of %s", strings.Join(what, ", "), p.Volume)
}

func (p *SetParams) validate() error {
	switch {
	case p.Replicas != 0:
		if err := validateCount(p.Replicas); err != nil {
			return err
		}
	case len(p.Params) == 0:
		return fmt.Errorf("no parameters are given: %w", trivet.ErrInvalid)
	}
	return firstError(validateVolume(p.Volume), validateParams(p.Params))
}

func (p *SetParams) apply(d *draft) error {
	v, err := d.edit(p.Volume)
	if err != nil {
		return err
	}
	if v.Phase == PhaseDeleting {
		return fmt.Errorf("volume is %s: %w", v.Phase, trivet.ErrInvalid)
	}
	if err := v.unmoved(p.IfRevision); err != nil {
		return err
	}
	changed := false
	for key, value := range p.Params {
		if v.Params[key] == value {
			continue
		}
		changed = true
		if value == "" {
			delete(v.Params, key)
			continue
		}
		if v.Params == nil {
			v.Params = make(map[string]string)
		}
		v.Params[key] = value
	}
	if p.Replicas != 0 && v.WantReplicas != p.Replicas {
		v.WantReplicas, changed = p.Replicas, true
	}
	if !changed {
		return nil
	}
	if len(v.Params) == 0 {
		v.Params = nil // as an image has it
	}
	if err := validateParams(v.Params); err != nil {
		return err
	}
	d.put(v)
	return nil
}

func validateParams(params map[string]string) error {
	return validatePairs("parameter", params, paramsMax)
}

// validatePairs bounds what parameters or labels may add to the catalogue, and refuses what JSON could not carry.
func validatePairs(what string, pairs map[string]string, most int) error {
	if len(pairs) > most {
		return fmt.Errorf("%d %ss, at most %d are allowed: %w", len(pairs), what, most, trivet.ErrInvalid)
	}
	for _, k := range slices.Sorted(maps.Keys(pairs)) { // sorted: the same error on every member
		if k == "" {
			return fmt.Errorf("%s without a name: %w", what, trivet.ErrInvalid)
		}
		err := firstError(validateText(what, k, textBytesMax), validateText(what+" "+k, pairs[k], textBytesMax))
		if err != nil {
			return err
		}
	}
	return nil
}
