package engine

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
)

// digestLabel begins what is hashed; it changes with the rules.
const digestLabel = "trivet volume digest 1\n"

// Digest is SHA-256 over the State and over what the volume and each of its snapshots show: LBA and checksum of each
// block that reads as other than never written, as of one moment. Replicas of a volume have the same digest at the same
// applied index (I4), however their blocks got there, and whatever each has swept or flattened. It reads and verifies
// every block that is shown, so it is a scrub as well: ErrCorrupt, and no digest, when one is damaged. ErrUnavailable:
// Restoring. ErrNotFound: dropped.
func (v *Volume) Digest() ([32]byte, error) {
	d, err := v.digest()
	if err != nil {
		return [32]byte{}, fmt.Errorf("digest of %s: %w", v.id, err)
	}
	return d, nil
}

func (v *Volume) digest() (d [32]byte, err error) {
	if err := v.e.enter(); err != nil {
		return d, err
	}
	defer v.e.exit()
	hold := v.e.live.hold() // before the snapshot
	defer v.e.live.end(hold)
	snap := v.e.db.NewSnapshot()
	defer func() { err = errors.Join(err, toErr(snap.Close())) }()
	w, r, err := v.pinnedWalk(snap)
	if err != nil {
		return d, err
	}
	defer func() { err = w.close(err) }()
	h := sha256.New()
	hashState(h, &r.state)
	if err := hashBlocks(h, w, &blockReader{e: v.e}, r.state.shownGenerations()); err != nil {
		return d, err
	}
	return [32]byte(h.Sum(nil)), nil
}

// hashState hashes all fields of a state, each with a fixed width or its length in front.
func hashState(h hash.Hash, s *State) {
	be, b := binary.BigEndian, []byte(digestLabel)
	b = be.AppendUint64(b, uint64(s.SizeBytes))
	b = be.AppendUint32(b, uint32(s.Generation))
	b = be.AppendUint64(b, uint64(s.Epoch))
	b = be.AppendUint64(b, s.AppliedIndex)
	b = be.AppendUint64(b, s.AppliedTerm)
	b = append(be.AppendUint64(b, uint64(len(s.Session))), s.Session...)
	b = append(be.AppendUint64(b, uint64(len(s.Config))), s.Config...)
	if len(s.Snapshots) > 0 { // else as before there were any
		b = appendSnapshots(b, s.Snapshots)
	}
	h.Write(b) //nolint:errcheck // a hash never fails
}

// pinned opens an iterator over all blocks of the volume in a snapshot, and reads the record in it, so
// that blocks and state belong together without stopping the applier.
func (v *Volume) pinned(snap *pebble.Snapshot) (*pebble.Iterator, record, error) {
	lower, upper := volumeBlocks(v.id)
	it, err := v.view(snap, &pebble.IterOptions{LowerBound: lower, UpperBound: upper})
	if err != nil {
		return nil, record{}, err
	}
	r, err := readRecord(snap, nil, v.id)
	if err == nil && r.restoring {
		err = fmt.Errorf("restore is not complete: %w", trivet.ErrUnavailable)
	}
	if err != nil {
		return nil, record{}, closeIter(it, err)
	}
	return it, r, nil
}
