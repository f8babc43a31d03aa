package controller

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// Labels of a volume have the syntax that Kubernetes gives them, so that those of a PersistentVolume may be the same:
// a key of at most 63 letters, digits, '-', '_' and '.', perhaps behind a DNS name and a '/', and a value of as many,
// or none (https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/).

// CheckLabels returns ErrInvalid, with the label, for one that has not the syntax.
func CheckLabels(all map[string]string) error {
	for _, key := range slices.Sorted(maps.Keys(all)) {
		if err := checkLabelKey(key); err != nil {
			return err
		}
		if wrong := validation.IsValidLabelValue(all[key]); len(wrong) > 0 {
			return fmt.Errorf("label %q: value %q: %s: %w", key, all[key], strings.Join(wrong, "; "), trivet.ErrInvalid)
		}
	}
	return nil
}

func checkLabelKey(key string) error {
	if wrong := validation.IsQualifiedName(key); len(wrong) > 0 {
		return fmt.Errorf("label %q: %s: %w", key, strings.Join(wrong, "; "), trivet.ErrInvalid)
	}
	return nil
}

// ParseSelector returns what says whether labels match a selector, such as tier=gold,env in (prod,test),!old; the empty
// one matches all. ErrInvalid for one that has not the syntax.
func ParseSelector(text string) (matches func(map[string]string) bool, err error) {
	s, err := labels.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("selector %q: %v: %w", text, err, trivet.ErrInvalid)
	}
	return func(all map[string]string) bool { return s.Matches(labels.Set(all)) }, nil
}

// SetLabels gives a volume labels and takes those of the keys in remove away, and returns the volume as it is then. The
// same again: nil. ErrInvalid names what has not the syntax, or is set and removed; ErrNotFound: no such volume.
func (c *Controller) SetLabels(ctx context.Context, id trivet.VolumeID, set map[string]string, remove []string,
) (meta.Volume, error) {
	fail := func(err error) (meta.Volume, error) { return meta.Volume{}, fmt.Errorf("label %s: %w", id, err) }
	if err := CheckLabels(set); err != nil {
		return fail(err)
	}
	for _, key := range remove {
		if err := checkLabelKey(key); err != nil {
			return fail(err)
		}
	}
	for {
		s, err := c.store.Read(ctx)
		if err != nil {
			return fail(err)
		}
		v, err := lookUp(s, id)
		if err != nil {
			return fail(err)
		}
		// Decided on one revision: a late copy of this must not undo what was said after it.
		res, err := c.store.Propose(ctx, meta.Command{SetLabels: &meta.SetLabels{
			Volume: id, Labels: set, Remove: remove, IfRevision: v.Revision,
		}})
		if errors.Is(err, trivet.ErrPending) {
			continue // it has changed since it was read
		}
		if err != nil {
			return fail(err)
		}
		return *res.Volume, nil
	}
}
