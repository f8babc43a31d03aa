package engine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
)

// DamageError is what Config.OnCorruption is told: a block or a table of the disk does not hold what was written.
// errors.Is(err, trivet.ErrCorrupt) holds. Nothing of it is ever returned as data; what a volume has elsewhere on
// the disk is still good, and is read.
type DamageError struct {
	Table string // file; empty when a single block is damaged, or no file is to blame
	// First and Last are the volumes that may have lost something, and all between them.
	First, Last trivet.VolumeID
	Cause       string
}

// Error implements error.
func (e *DamageError) Error() string {
	where := "engine"
	if e.Table != "" {
		where = "engine table " + e.Table
	}
	return fmt.Sprintf("%s: %s: %v", where, e.Cause, trivet.ErrCorrupt)
}

// Unwrap returns trivet.ErrCorrupt.
func (e *DamageError) Unwrap() error { return trivet.ErrCorrupt }

// Touches reports whether a volume may have lost something.
func (e *DamageError) Touches(id trivet.VolumeID) bool { return e.First <= id && id <= e.Last }

// volumeMax is the last volume that there can be.
const volumeMax = ^trivet.VolumeID(0)

// touched returns the volumes of which a table with these bounds may hold something: those of the bounds, when both
// are in one of our key tables, else all.
func touched(lo, hi []byte) (first, last trivet.VolumeID) {
	const n = 1 + 8 // table and volume
	if len(lo) < n || len(hi) < n || lo[0] != hi[0] || lo[0] == tableFormat {
		return 0, volumeMax
	}
	return trivet.VolumeID(binary.BigEndian.Uint64(lo[1:])), trivet.VolumeID(binary.BigEndian.Uint64(hi[1:]))
}

// reported remembers what the owner was told, so that it is told once: a table is met with each read of the bad
// block, and each compaction.
type reported struct {
	mu  sync.Mutex
	key map[string]bool
}

// reportedMax bounds what is remembered. A disk with more damage than that has been given up long since.
const reportedMax = 4096

func (r *reported) first(key string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.key[key] || len(r.key) >= reportedMax {
		return false
	}
	if r.key == nil {
		r.key = make(map[string]bool)
	}
	r.key[key] = true
	return true
}

// corrupt reports damage, once for each key. Reads that meet it return ErrCorrupt; the engine goes on, so that the
// replica can be repaired and the other volumes of the disk do not suffer (H38).
func (h *health) corrupt(key string, e *DamageError) {
	if !h.reported.first(key) {
		return
	}
	h.log.Error("engine found damage", "err", e)
	if h.onCorrupt != nil {
		h.onCorrupt(e)
	}
}

// corruptTable reports a table in which Pebble met damage.
func (h *health) corruptTable(i pebble.DataCorruptionInfo) {
	e := &DamageError{Table: i.Path, Cause: i.String()}
	e.First, e.Last = touched(i.Bounds.Start, i.Bounds.End.Key)
	h.corrupt(i.Path, e)
}

// corruptBlock reports a volume of which a block, read whole, is not what was written there (H24).
func (h *health) corruptBlock(err error) {
	var b *BlockError
	if errors.As(err, &b) {
		h.corrupt(b.Volume.String(), &DamageError{First: b.Volume, Last: b.Volume, Cause: err.Error()})
	}
}

// compactionFailed is told of the damage that a compaction met. Nothing was lost by it, and it is no reason to take the
// disk's other volumes down. But when compactions do not get past it, all volumes of the disk have to go: level 0
// grows until writes stop.
func (h *health) compactionFailed(err error) {
	if info := pebble.ExtractDataCorruptionInfo(err); info != nil {
		h.corruptTable(*info)
	} else {
		h.corrupt("", &DamageError{Last: volumeMax, Cause: err.Error()})
	}
	if h.compactions.damaged() {
		h.corrupt("stuck", &DamageError{
			Last: volumeMax, Cause: fmt.Sprintf("%d compactions in a row met damage: %v", damageStuckN, err),
		})
		h.checkStall()
	}
}
