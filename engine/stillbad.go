package engine

import (
	"errors"
	"fmt"

	"github.com/trivet-csi/trivet"
)

// StillBad returns those of damaged blocks that the map has still the same value for, and those that cleaning has put
// elsewhere and that are damaged there too: the others were written or repaired since they were found.
func (v *Volume) StillBad(bad []BadBlock) ([]BadBlock, error) {
	if err := v.e.enter(); err != nil {
		return nil, fmt.Errorf("look for damage in %s: %w", v.id, err)
	}
	defer v.e.exit()
	hold := v.e.live.hold() // before the map is asked
	defer v.e.live.end(hold)
	blocks := blockReader{e: v.e}
	var still []BadBlock
	for _, b := range bad {
		isBad, err := v.isStillBad(&b, &blocks)
		if err != nil {
			return nil, fmt.Errorf("look for damage in %s: %w", v.id, err)
		}
		if isBad {
			still = append(still, b)
		}
	}
	return still, nil
}

// isStillBad brings b up to where the block stands now. REQUIRES: entered; a hold.
func (v *Volume) isStillBad(b *BadBlock, blocks *blockReader) (bool, error) {
	bk := blockKey{v.id, b.LBA, b.Generation}
	key := appendBlockKey(nil, v.id, b.LBA, b.Generation)
	now, err := v.e.valueOrNone(key)
	switch {
	case err != nil:
		return false, err
	case sameValue(now, b.value):
		return true, nil
	case !isMoved(b.value, now, bk):
		return false, nil
	}
	_, _, err = blocks.value(now, key, bk)
	if !errors.Is(err, trivet.ErrCorrupt) {
		return false, err
	}
	b.value = now
	return true, nil
}

// isMoved reports whether a value of the map is that of the same data at another place: cleaning has moved them, or a
// repair has.
func isMoved(was, now []byte, bk blockKey) bool {
	if !isRef(was) || !isRef(now) {
		return false
	}
	_, old, err := decodeRef(was, bk)
	if err != nil {
		return false
	}
	_, sum, err := decodeRef(now, bk)
	return err == nil && sum == old
}
