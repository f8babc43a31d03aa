package engine

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
)

// verify compares what the store has, since the digest before and up to a block, with a digest of the source or of
// what was received. When they differ, nothing is claimed of it any more.
func (x *restorer) verify(to trivet.LBA, digest [32]byte) error {
	e := x.v.e
	if err := e.enterWrite(); err != nil {
		return err
	}
	defer e.exit()
	if err := e.flush(); err != nil { // first: what is read back is what the disk has
		return err
	}
	got, err := x.readBack()
	if err == nil && got != digest {
		err = fmt.Errorf("blocks %d to %d read back as %x, want %x: %w", x.claimed, to, got, digest, trivet.ErrCorrupt)
	}
	index := x.begin.record.state.AppliedIndex
	if err != nil {
		if !errors.Is(err, trivet.ErrCorrupt) {
			return err
		}
		to, index = max(to, x.inside), 0
	}
	claimErr := x.claim(to, index)
	x.claimed, x.extents = to, x.extents[:0]
	x.received.Reset()
	if err != nil && claimErr == nil {
		claimErr = e.flush()
	}
	return errors.Join(err, claimErr)
}

// claim says from now on that the blocks not claimed yet, up to one, are as of an index. REQUIRES: entered.
func (x *restorer) claim(to trivet.LBA, index uint64) error {
	if to == x.claimed {
		return nil
	}
	x.v.mu.Lock()
	next := x.v.rec
	next.state = next.state.clone()
	x.v.mu.Unlock()
	next.have = next.have.set(x.claimed, to, index)
	b := x.v.e.newBatch()
	defer func() { _ = b.Close() }() // memory only
	return x.v.apply(b, &next, nil)
}

// readBack is the digest of what the store has of the blocks written since the last one.
func (x *restorer) readBack() (d [32]byte, err error) {
	h := newVersionHash()
	blocks := blockReader{e: x.v.e}
	if len(x.extents) == 0 {
		return [32]byte(h.Sum(nil)), nil
	}
	it, err := x.v.e.db.NewIter(&pebble.IterOptions{
		LowerBound: appendBlockPrefix(nil, x.v.id, x.extents[0].lba),
		UpperBound: appendBlockPrefix(nil, x.v.id, x.extents[len(x.extents)-1].end()),
	})
	if err != nil {
		return d, toErr(err)
	}
	defer func() { err = closeIter(it, err) }()
	for _, run := range x.extents {
		end := appendBlockPrefix(nil, x.v.id, run.end())
		ok := it.SeekGE(appendBlockPrefix(nil, x.v.id, run.lba))
		for ; ok && bytes.Compare(it.Key(), end) < 0; ok = it.Next() {
			bk, err := decodeBlockKey(it.Key())
			if err != nil {
				return d, err
			}
			data, sum, err := blocks.at(it, bk)
			if err != nil {
				return d, err
			}
			if x.begin.volume != x.v.id { // the source's sum names its own volume
				sum = BlockSum(x.begin.volume, bk.lba, data)
			}
			h.add(bk, data == nil, sum)
		}
		if err := it.Error(); err != nil {
			return d, toErr(err)
		}
	}
	return [32]byte(h.Sum(nil)), nil
}

// settle claims what was written before the image broke off, so that it need not come again. What it cannot
// verify stays unclaimed.
func (x *restorer) settle() error {
	if len(x.extents) == 0 && x.written == x.claimed || x.written < x.claimed {
		return nil
	}
	if err := x.verify(x.written, [32]byte(x.received.Sum(nil))); err != nil {
		return fmt.Errorf("what arrived before: %w", err)
	}
	if err := x.v.e.Flush(); err != nil {
		return fmt.Errorf("what arrived before: %w", err)
	}
	return nil
}
