package meta

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/trivet-csi/trivet"
)

func (l *SetLabels) op() string {
	what := append(slices.Sorted(maps.Keys(l.Labels)), l.Remove...)
	return fmt.Sprintf("set labels %s of %s", strings.Join(what, ", "), l.Volume)
}

func (l *SetLabels) validate() error {
	if len(l.Labels) == 0 && len(l.Remove) == 0 {
		return fmt.Errorf("no labels are given: %w", trivet.ErrInvalid)
	}
	if len(l.Remove) > labelsMax {
		return fmt.Errorf("%d labels to remove, at most %d are allowed: %w", len(l.Remove), labelsMax, trivet.ErrInvalid)
	}
	for _, key := range l.Remove {
		if _, both := l.Labels[key]; both {
			return fmt.Errorf("label %q is set and removed: %w", key, trivet.ErrInvalid)
		}
		if err := validateText("label", key, textBytesMax); err != nil {
			return err
		}
	}
	return firstError(validateVolume(l.Volume), validateLabels(l.Labels))
}

func (l *SetLabels) apply(d *draft) error {
	v, err := d.edit(l.Volume)
	if err != nil {
		return err
	}
	if err := v.unmoved(l.IfRevision); err != nil {
		return err
	}
	labels := maps.Clone(v.Labels)
	if labels == nil {
		labels = make(map[string]string, len(l.Labels))
	}
	maps.Copy(labels, l.Labels)
	for _, key := range l.Remove {
		delete(labels, key)
	}
	if maps.Equal(labels, v.Labels) {
		return nil
	}
	if err := validateLabels(labels); err != nil {
		return err
	}
	if v.Labels = labels; len(labels) == 0 {
		v.Labels = nil // as an image has it
	}
	d.put(v)
	return nil
}

func validateLabels(labels map[string]string) error { return validatePairs("label", labels, labelsMax) }
