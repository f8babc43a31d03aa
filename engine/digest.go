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
	all := newDigester(&r.state, &blockReader{e: v.e})
	for more := true; more; {
		if more, err = all.next(w); err != nil {
			return d, err
		}
	}
	return all.sum(), nil
}

// digestStepBytes is how much of a volume Image.Digest reads between two looks at its pace.
const digestStepBytes = 1 << 20

// Digest returns what Volume.Digest was at the moment of the image, and reads as much for it. An image is
// read or its digest is taken: Read fails from then on. pace is called before each MiB of blocks at the most, with
// the bytes that will be read; an error of it ends the work and is returned. ErrCorrupt: a block is damaged, and
// the engine's events tell of it; ErrClosed: the image or the engine was closed meanwhile.
func (i *Image) Digest(pace func(bytes int) error) ([32]byte, error) {
	d, err := i.digest(pace)
	if err != nil {
		i.e.health.corruptBlock(err)
		return d, fmt.Errorf("digest of the image of %s: %w", i.volume, err)
	}
	return d, nil
}

func (i *Image) digest(pace func(bytes int) error) ([32]byte, error) {
	d := newDigester(&i.state, &i.blocks)
	for begun := false; ; begun = true {
		if err := pace(digestStepBytes); err != nil {
			return [32]byte{}, err
		}
		more, err := i.digestStep(d, begun)
		if err != nil {
			return [32]byte{}, err
		}
		if !more {
			return d.sum(), nil
		}
	}
}

// digestStep hashes the next digestStepBytes of blocks, and reports whether there are more.
func (i *Image) digestStep(d *digester, begun bool) (more bool, err error) {
	if err := i.e.enter(); err != nil {
		return false, err
	}
	defer i.e.exit()
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.snap == nil {
		return false, trivet.ErrClosed
	}
	if !begun {
		i.buf, i.end = nil, fmt.Errorf("its digest was taken: %w", trivet.ErrInvalid)
		if err := i.w.seek(0); err != nil {
			return false, err
		}
	}
	for n := 0; n < digestStepBytes; n += trivet.BlockSize {
		if more, err := d.next(i.w); err != nil || !more {
			return false, err
		}
	}
	return i.w.hasNext(), toErr(i.w.it.Error())
}

// digester hashes the state of a volume, then its blocks in order (digest_blocks.go).
type digester struct {
	h      hash.Hash
	blocks *blockReader
	gens   []trivet.Generation // that the volume shows, newest first

	shown []content // buffers
	buf   []byte
}

func newDigester(s *State, blocks *blockReader) *digester {
	d := &digester{h: sha256.New(), blocks: blocks, gens: s.shownGenerations()}
	hashState(d.h, s)
	return d
}

func (d *digester) sum() [32]byte { return [32]byte(d.h.Sum(nil)) }

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
