package replication

import (
	"fmt"
	"slices"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
)

// outcome says what applying a request did. It is a pure function of the log.
type outcome uint8

const (
	outApplied   outcome = iota // done now
	outDuplicate                // done before, by an earlier copy
	outFenced                   // epoch below the volume's (I6)
	outNotYet                   // epoch above the volume's: no fence has granted it
	outStale                    // sequence settled long ago, or too far ahead
	outRange                    // outside the volume
	outShrink                   // resize to less than the volume has
	outFull                     // as many snapshots as a volume may have
	outUnknown                  // no such snapshot
	outStranger                 // of a writer that the fence has not named
)

// result is what the leader learns of one request: the outcome, and the state that explains it.
type result struct {
	out       outcome
	epoch     trivet.Epoch // of the volume
	sizeBytes int64        // of the volume

	generation trivet.Generation // of the snapshot, of a freeze
	index      uint64            // of the entry, of opScrub only
}

// err translates a result for the client. nil means that the request is in effect.
func (r result) err(req *request) error {
	switch r.out {
	case outApplied, outDuplicate:
		return nil
	case outFenced:
		return fmt.Errorf("volume is fenced at epoch %d, request has epoch %d: %w",
			r.epoch, req.epoch, trivet.ErrFenced)
	case outNotYet:
		return fmt.Errorf("volume is at epoch %d, request has epoch %d, which was never fenced in: %w",
			r.epoch, req.epoch, trivet.ErrInvalid)
	case outStale:
		return fmt.Errorf("sequence %d of epoch %d is outside the session window: %w",
			req.seq&^writerBit, req.epoch, trivet.ErrInvalid)
	case outStranger:
		return fmt.Errorf("nobody is writer %d at epoch %d: %w", req.seq>>63, req.epoch, trivet.ErrInvalid)
	case outRange:
		return fmt.Errorf("%d blocks from %d, volume has %d bytes: %w", req.arg, req.lba, r.sizeBytes, trivet.ErrOutOfRange)
	case outShrink:
		return fmt.Errorf("resize to %d bytes, volume has %d and never shrinks: %w",
			req.arg, r.sizeBytes, trivet.ErrOutOfRange)
	case outFull:
		return fmt.Errorf("volume has %d snapshots, the most there may be: %w", engine.SnapshotsMax, trivet.ErrNoSpace)
	case outUnknown:
		return fmt.Errorf("volume has no snapshot %s: %w", trivet.SnapshotID(req.arg), trivet.ErrNotFound)
	}
	panic(fmt.Sprintf("outcome %d is unknown", r.out))
}

// effect is what a request does to the blocks.
type effect uint8

const (
	effectNone effect = iota
	effectWrite
	effectZero // lba and blockN of the change
	effectMark // a view of these blocks is taken; nothing changes
	effectBack // to the generation of the change
)

// change is an effect and the blocks it touches.
type change struct {
	effect effect
	lba    trivet.LBA
	blockN int64

	generation trivet.Generation
}

// core decides what requests may do: the fence, the session window and the size, without any block.
// It is pure, so every replica decides alike.
type core struct {
	epoch     trivet.Epoch
	sizeBytes int64
	win       *window // of writer 0; nil: nobody has that number
	win1      *window // of writer 1
	since     Writers // the sessions that the windows are of

	generation trivet.Generation
	snapshots  []engine.Snapshot // ascending; replaced, never changed in place: views show it
}

// step applies the next request of the log to c and says what to do to the blocks.
// REQUIRES: req.check() == nil.
func (c *core) step(req *request) (result, change) {
	out, ch := c.decide(req)
	res := result{out: out, epoch: c.epoch, sizeBytes: c.sizeBytes}
	if i := c.snapshot(req.arg); req.op == opFreeze && i >= 0 {
		res.generation = c.snapshots[i].Generation
	}
	return res, ch
}

func (c *core) decide(req *request) (outcome, change) {
	switch req.op {
	case opFence:
		return c.fenceWriters(req.epoch, Alone(req.epoch)), change{}
	case opFenceWriters:
		return c.fenceWriters(req.epoch, req.writers()), change{}
	case opResize:
		return c.resize(int64(req.arg)), change{}
	case opWipe:
		if out := c.checkEpoch(req.epoch); out != outApplied {
			return out, change{}
		}
		return outApplied, change{effect: effectZero, blockN: c.sizeBytes / trivet.BlockSize}
	case opFreeze:
		return c.freeze(req), change{}
	case opDrop:
		return c.drop(req.arg), change{}
	case opMark:
		return outApplied, change{}
	case opScrub:
		return outApplied, change{effect: effectMark, lba: req.lba, blockN: int64(req.arg)}
	case opRollback:
		return c.rollback(req)
	}
	return c.data(req)
}

// snapshot returns the place of a snapshot, or -1.
func (c *core) snapshot(id uint64) int {
	return slices.IndexFunc(c.snapshots, func(s engine.Snapshot) bool { return s.ID == id })
}

// freeze keeps the current generation as a snapshot and begins the next. A copy is told by its ID, whatever epoch it
// has: what it asked for is so. A first one must come from whoever may write, or from nobody's epoch: a holder that
// was fenced cannot say that what it wrote is all there.
func (c *core) freeze(req *request) outcome {
	if c.snapshot(req.arg) >= 0 {
		return outDuplicate
	}
	if out := c.checkEpoch(req.epoch); out != outApplied {
		return out
	}
	if len(c.snapshots) >= engine.SnapshotsMax {
		return outFull
	}
	c.snapshots = append(c.snapshots, engine.Snapshot{ID: req.arg, Generation: c.generation})
	c.generation++
	return outApplied
}

// rollback has the volume show a snapshot, in a generation of its own. A copy at the same epoch does it once more: the
// epoch was reserved for it, so nobody has written in between.
func (c *core) rollback(req *request) (outcome, change) {
	if out := c.checkEpoch(req.epoch); out != outApplied {
		return out, change{}
	}
	i := c.snapshot(req.arg)
	if i < 0 {
		return outUnknown, change{}
	}
	c.generation++
	return outApplied, change{effect: effectBack, generation: c.snapshots[i].Generation}
}

// drop forgets a snapshot. It needs no epoch: no holder reads or writes by one.
func (c *core) drop(id uint64) outcome {
	i := c.snapshot(id)
	if i < 0 {
		return outDuplicate
	}
	c.snapshots = slices.Concat(c.snapshots[:i], c.snapshots[i+1:])
	return outApplied
}

func (c *core) resize(sizeBytes int64) outcome {
	switch {
	case sizeBytes < c.sizeBytes:
		return outShrink
	case sizeBytes == c.sizeBytes:
		return outDuplicate
	}
	c.sizeBytes = sizeBytes
	return outApplied
}

func (c *core) checkEpoch(epoch trivet.Epoch) outcome {
	switch {
	case epoch < c.epoch:
		return outFenced
	case epoch > c.epoch:
		return outNotYet
	}
	return outApplied
}

func (c *core) data(req *request) (outcome, change) {
	if out := c.checkEpoch(req.epoch); out != outApplied {
		return out, change{}
	}
	writer, seq := writerOf(req.seq)
	win := c.windowOf(writer)
	if win == nil {
		return outStranger, change{}
	}
	win.raise(req.low &^ writerBit)
	st, ok := win.lookup(seq)
	switch {
	case !ok:
		return outStale, change{}
	case st == seqApplied:
		return outDuplicate, change{}
	case st == seqRefused:
		return outRange, change{}
	}
	blockN := uint64(c.sizeBytes / trivet.BlockSize)
	if uint64(req.lba) > blockN || req.arg > blockN-uint64(req.lba) {
		win.settle(seq, seqRefused)
		return outRange, change{}
	}
	win.settle(seq, seqApplied)
	ch := change{effect: effectZero, lba: req.lba, blockN: int64(req.arg)}
	if req.op == opWrite {
		ch.effect = effectWrite
	}
	return outApplied, ch
}
