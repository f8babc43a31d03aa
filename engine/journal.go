package engine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"math/bits"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
)

// The change journal says which blocks each batch touched. Every Commit that touches blocks sets one
// journal key in the same Pebble batch, so that no crash can part the two. The value, version 1:
//
//	 0
//	+---------+--------------+------------------------------+-----------------------------+
//	| version | extents (uv) | per extent: gap, blocks (uv) | CRC32C of key and these (4) |
//	+---------+--------------+------------------------------+-----------------------------+
//
// uv is an unsigned varint. Extents rise and do not touch; a gap is the number of blocks since the end
// of the extent before. A batch of one extent takes 8 to 16 bytes beside a key of 17.
//
// The journal of a volume is bounded (Config.JournalBytes). Its oldest part goes first, by a range delete in
// the batch that would exceed the bound; the volume record says in the same batch from which index on
// the journal is complete.
const (
	journalVersion      byte = 1
	journalKeyBytes          = 1 + 8 + 8
	journalHeadBytes         = 1
	journalExtentsMax        = batchBytesMax // more cannot be in a batch
	journalTrimDivisor       = 16            // each trim frees this part of the bound, so that trims are rare
	journalBytesDefault      = 16 << 20
	touchedRetainedN         = 4 << 10 // a larger buffer of extents is not kept for the next batch
)

// journal is what the volume record says of the volume's journal.
type journal struct {
	floor uint64 // the journal has every batch with an applied index above it
	bytes int64  // of its keys and values
}

// uvarintBytes is what x takes as a varint.
func uvarintBytes(x uint64) int { return (bits.Len64(x|1) + 6) / 7 }

func journalValueBytes(xs []extent) int {
	n, end := journalHeadBytes+uvarintBytes(uint64(len(xs)))+4, trivet.LBA(0)
	for _, x := range xs {
		n += uvarintBytes(uint64(x.lba-end)) + uvarintBytes(uint64(x.n))
		end = x.end()
	}
	return n
}

// appendJournalValue appends the value of a batch that touched xs. REQUIRES: xs is as of mergeExtents.
func appendJournalValue(dst, key []byte, xs []extent) []byte {
	start, end := len(dst), trivet.LBA(0)
	dst = binary.AppendUvarint(append(dst, journalVersion), uint64(len(xs)))
	for _, x := range xs {
		dst = binary.AppendUvarint(dst, uint64(x.lba-end))
		dst = binary.AppendUvarint(dst, uint64(x.n))
		end = x.end()
	}
	return binary.BigEndian.AppendUint32(dst, journalSum(key, dst[start:]))
}

func journalSum(key, body []byte) uint32 {
	return crc32.Update(crc32.Update(0, castagnoli, key), castagnoli, body)
}

// decodeJournalValue calls add with each extent. It returns ErrCorrupt for anything that
// appendJournalValue does not make for that key; what was added by then is of no use.
func decodeJournalValue(v, key []byte, add func(extent)) error {
	bad := func(what string) error {
		return fmt.Errorf("journal value %x at %x: %s: %w", v[:min(len(v), 32)], key, what, trivet.ErrCorrupt)
	}
	if len(v) < journalHeadBytes+1+4 {
		return bad("too short")
	}
	body := v[:len(v)-4]
	if binary.BigEndian.Uint32(v[len(v)-4:]) != journalSum(key, body) {
		return bad("checksum")
	}
	if body[0] != journalVersion {
		return bad("version")
	}
	n, k := binary.Uvarint(body[1:])
	if k <= 0 || n == 0 || n > journalExtentsMax {
		return bad("number of extents")
	}
	body = body[1+k:]
	end := trivet.LBA(0)
	for i := range n {
		gap, k := binary.Uvarint(body)
		blockN, k2 := binary.Uvarint(body[max(k, 0):])
		if k <= 0 || k2 <= 0 || gap > lbaMax || blockN == 0 || blockN > lbaMax || gap == 0 && i > 0 {
			return bad("extent")
		}
		x := extent{end + trivet.LBA(gap), int64(blockN)}
		if end = x.end(); end > lbaMax {
			return bad("extent beyond the largest volume")
		}
		add(x)
		body = body[k+k2:]
	}
	if len(body) != 0 {
		return bad("length")
	}
	return nil
}

// journalNext adds the journal of a commit to its batch, and returns what the record must say of it.
// REQUIRES: entered; old is the volume's record.
func (b *Batch) journalNext(old *record, index uint64) (journal, error) {
	j := old.journal
	if b.back != nil { // anything may have changed
		return b.v.journalAnew(b.b, max(index, old.state.AppliedIndex+1))
	}
	if len(b.touched) == 0 {
		return j, nil
	}
	b.touched = mergeExtents(b.touched)
	bytes := int64(journalKeyBytes + journalValueBytes(b.touched))
	switch {
	case index == old.state.AppliedIndex:
		// Who has this index may have it without what comes now, so nothing is known for it.
		return b.v.journalAnew(b.b, index+1)
	case bytes > b.v.e.journalBytes:
		return b.v.journalAnew(b.b, index)
	}
	if j.bytes+bytes > b.v.e.journalBytes {
		var err error
		if j, err = b.v.journalTrim(b.b, old, bytes); err != nil {
			return journal{}, err
		}
	}
	op := b.b.SetDeferred(journalKeyBytes, int(bytes)-journalKeyBytes)
	appendJournalKey(op.Key[:0], b.v.id, index)
	appendJournalValue(op.Value[:0], op.Key, b.touched)
	j.bytes += bytes
	return j, op.Finish()
}

// journalAnew drops the journal, so that it begins after the index floor.
func (v *Volume) journalAnew(b *pebble.Batch, floor uint64) (journal, error) {
	v.e.flushSoon()
	lower, upper := volumeJournal(v.id)
	return journal{floor: floor}, b.DeleteRange(lower, upper, nil)
}

// journalTrim drops the oldest part, so that room is left for more bytes and for some time. A journal that cannot
// be read is dropped whole: it only saves work.
func (v *Volume) journalTrim(b *pebble.Batch, old *record, more int64) (journal, error) {
	j := old.journal
	target := v.e.journalBytes - max(v.e.journalBytes/journalTrimDivisor, more)
	lower, upper := volumeJournal(v.id)
	it, err := v.e.db.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: upper})
	if err != nil {
		return journal{}, toErr(err)
	}
	for ok := it.First(); ok && j.bytes > target; ok = it.Next() {
		_, index, err := decodeJournalKey(it.Key())
		value, verr := it.ValueAndErr()
		if errors.Join(err, verr) != nil {
			break
		}
		j.floor = index
		j.bytes -= int64(journalKeyBytes + len(value))
	}
	damaged := closeIter(it, nil) != nil
	if damaged || j.bytes > target {
		return v.journalAnew(b, old.state.AppliedIndex)
	}
	v.e.flushSoon()
	return j, b.DeleteRange(lower, appendJournalKey(nil, v.id, j.floor+1), nil)
}

// ChangedSince returns the blocks that batches with an applied index above index have touched, up to
// the last Commit. ok is false when the journal does not reach back so far, or cannot be read; then any
// block may have changed. ErrUnavailable: Restoring. ErrNotFound: dropped.
func (v *Volume) ChangedSince(index uint64) (set *BlockSet, ok bool, err error) {
	if err := v.e.enter(); err != nil {
		return nil, false, fmt.Errorf("changes of %s: %w", v.id, err)
	}
	defer v.e.exit()
	snap := v.e.db.NewSnapshot()
	defer func() { err = errors.Join(err, toErr(snap.Close())) }()
	it, r, err := v.pinned(snap)
	if err != nil {
		return nil, false, fmt.Errorf("changes of %s: %w", v.id, err)
	}
	if err := closeIter(it, nil); err != nil {
		return nil, false, fmt.Errorf("changes of %s: %w", v.id, err)
	}
	if index < r.journal.floor {
		return nil, false, nil
	}
	set = new(BlockSet)
	if err := readJournal(snap, v.id, index, func(_ uint64, x extent) { set.add(x) }); err != nil {
		return nil, false, nil //nolint:nilerr // a journal that cannot be read knows nothing
	}
	return set, true, nil
}

// readJournal calls add with each extent of each batch above index since.
func readJournal(src iterable, id trivet.VolumeID, since uint64, add func(index uint64, x extent)) (err error) {
	if since == math.MaxUint64 {
		return nil
	}
	_, upper := volumeJournal(id)
	it, err := src.NewIter(&pebble.IterOptions{LowerBound: appendJournalKey(nil, id, since+1), UpperBound: upper})
	if err != nil {
		return toErr(err)
	}
	defer func() { err = closeIter(it, err) }()
	for ok := it.First(); ok; ok = it.Next() {
		_, index, err := decodeJournalKey(it.Key())
		if err != nil {
			return err
		}
		v, err := it.ValueAndErr()
		if err != nil {
			return toErr(err)
		}
		if err := decodeJournalValue(v, it.Key(), func(x extent) { add(index, x) }); err != nil {
			return err
		}
	}
	return toErr(it.Error())
}
