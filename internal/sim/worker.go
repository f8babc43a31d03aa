package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication"
)

const (
	thinkMean = 80 * time.Millisecond
	hotN      = 8 // blocks that half of the calls go to
)

// seat is one attachment of the volume.
type seat struct {
	volume *replication.Volume
	epoch  trivet.Epoch
	node   trivet.NodeID
	life   *life // of its machine; nil for one without a replica
	// session reads are in order for as long as the seat is not taken by the next.
	session bool
}

// alive reports whether the seat's machine has not died: what a dead one was told, nobody knows.
func (s *seat) alive() bool { return s.life == nil || !s.life.isDead() }

// takeOver fences in the next epoch, opens the volume on a node and leaves the old holder alive, as a
// machine that does not know yet that it was replaced (H12).
func (s *sim) takeOver(ctx context.Context, node trivet.NodeID) error {
	s.mu.Lock()
	old, reserved := s.seat, s.reserved
	s.mu.Unlock()
	epoch := trivet.Epoch(1)
	if old != nil {
		epoch = max(old.epoch, reserved) + 1
	}
	if s.pair != nil {
		epoch = s.pair.reserve()
	}
	if err := s.cluster.Fence(ctx, epoch); err != nil {
		return fmt.Errorf("fence in epoch %d: %w", epoch, err)
	}
	next := s.newSeat(epoch, node)
	if err := s.openSeat(next, 0); err != nil {
		return err
	}
	gone := s.seated(next)
	s.log.Debug("volume taken over", "epoch", next.epoch, "on", next.node)
	return s.dismiss(ctx, gone)
}

// zombie lets the old holder try: after the fence, nothing of what it asks may succeed.
func (s *sim) zombie(ctx context.Context, old *seat) {
	ctx, cancel := context.WithTimeout(ctx, ioTimeout/2)
	defer cancel()
	p := make([]byte, trivet.BlockSize)
	stamp(p, 0, old.epoch, neverIssued)
	if err := old.volume.ReadAt(ctx, make([]byte, trivet.BlockSize), 0); err == nil && !old.session {
		s.violate(fmt.Errorf("read of fenced epoch %d succeeded", old.epoch))
	}
	if err := old.volume.WriteAt(ctx, p, 0); err == nil {
		s.violate(fmt.Errorf("write of fenced epoch %d succeeded", old.epoch))
	}
	if err := old.volume.Discard(ctx, 0, trivet.BlockSize); err == nil {
		s.violate(fmt.Errorf("discard of fenced epoch %d succeeded", old.epoch))
	}
}

// worker uses the volume, one call after the other.
type worker struct {
	sim *sim
	rnd *rand.Rand
	// unrecorded reads are judged by the oracle only: dozens at a time are more than porcupine can order.
	unrecorded bool
}

func (w *worker) run(ctx context.Context) {
	for {
		think := time.Duration(w.rnd.ExpFloat64() * float64(thinkMean))
		if Sleep(ctx, think) != nil {
			return
		}
		seat := w.sim.anySeat(w.rnd)
		lba, n := w.extent()
		var err error
		var busy bool
		switch k := w.rnd.IntN(100); {
		case k < 55:
			busy, err = w.write(ctx, seat, lba, n)
		case k < 80:
			err = w.read(ctx, seat, lba, n)
		case k < 90:
			busy, err = w.zero(ctx, seat, lba, n, seat.volume.Discard)
		case k < 95:
			busy, err = w.zero(ctx, seat, lba, n, seat.volume.WriteZeroes)
		default:
			if err = seat.volume.Flush(ctx); errors.Is(err, trivet.ErrUnavailable) {
				err = nil // sticky after a write that was given up, as promised
			}
		}
		if ctx.Err() != nil || busy {
			continue
		}
		if errors.Is(err, trivet.ErrFenced) || errors.Is(err, trivet.ErrClosed) {
			// The seat is gone: fenced, or its machine crashed. Nothing to learn until it is taken again.
			if Sleep(ctx, 10*pollEvery) != nil {
				return
			}
			continue
		}
		w.sim.count(func(r *Report) {
			r.Calls++
			if err == nil {
				r.Succeeded++
			}
		})
	}
}

// extent draws a range: mostly short, at times longer than an atomic write, and mostly in a hot corner,
// so that blocks are written again and again.
func (w *worker) extent() (trivet.LBA, int) {
	n := 1 + w.rnd.IntN(4)
	if w.rnd.IntN(16) == 0 {
		n = 1 + w.rnd.IntN(40)
	}
	span := w.sim.opts.BlockN
	if w.rnd.IntN(2) == 0 {
		span = min(span, hotN)
	}
	n = min(n, span)
	return trivet.LBA(w.rnd.IntN(span - n + 1)), n
}

func (w *worker) write(ctx context.Context, seat *seat, lba trivet.LBA, n int) (busy bool, err error) {
	o := w.sim.oracle
	versions, ok := o.begin(lba, n, write{epoch: seat.epoch, contend: w.sim.pair != nil && w.rnd.IntN(4) == 0})
	if !ok {
		return true, nil
	}
	p := make([]byte, n*trivet.BlockSize)
	for i, v := range versions {
		stamp(p[i*trivet.BlockSize:(i+1)*trivet.BlockSize], lba+trivet.LBA(i), seat.epoch, v)
	}
	h := w.sim.history.begin(lba, n, false, versions)
	err = seat.volume.WriteAt(ctx, p, int64(lba)*trivet.BlockSize)
	acked := err == nil && seat.alive()
	for at := 0; at < len(p); at += trivet.BlockSize {
		p[at]++ // ours again: whoever still reads it is found out (H25)
	}
	w.sim.history.end(h, acked, nil)
	o.end(lba, n, acked)
	return false, w.changed(err)
}

func (w *worker) zero(ctx context.Context, seat *seat, lba trivet.LBA, n int,
	do func(ctx context.Context, off, n int64) error,
) (busy bool, err error) {
	o := w.sim.oracle
	if _, ok := o.begin(lba, n, write{zero: true, epoch: seat.epoch}); !ok {
		return true, nil
	}
	h := w.sim.history.begin(lba, n, false, make([]version, n))
	err = do(ctx, int64(lba)*trivet.BlockSize, int64(n)*trivet.BlockSize)
	acked := err == nil && seat.alive()
	w.sim.history.end(h, acked, nil)
	o.end(lba, n, acked)
	return false, w.changed(err)
}

func (w *worker) changed(err error) error {
	if err == nil {
		w.sim.count(func(r *Report) { r.Writes++ })
	}
	return w.expected(err)
}

func (w *worker) read(ctx context.Context, seat *seat, lba trivet.LBA, n int) error {
	floors := w.sim.oracle.floors(lba, n)
	p := make([]byte, n*trivet.BlockSize)
	var h []opRef
	if !w.unrecorded {
		h = w.sim.history.begin(lba, n, true, nil)
	}
	err := seat.volume.ReadAt(ctx, p, int64(lba)*trivet.BlockSize)
	if err != nil || !seat.alive() || seat.session && w.sim.holder() != seat {
		w.sim.history.end(h, false, nil)
		return w.expected(err)
	}
	w.sim.history.end(h, true, found(p))
	w.sim.count(func(r *Report) { r.Reads++ })
	if err := w.sim.oracle.check(lba, p, floors); err != nil {
		w.sim.violate(fmt.Errorf("read at epoch %d on %s: %w", seat.epoch, seat.node, err))
	}
	return nil
}

// found returns the version that each block claims to be; whether it tells the truth, the oracle says.
func found(p []byte) []version {
	out := make([]version, len(p)/trivet.BlockSize)
	for i := range out {
		if b := p[i*trivet.BlockSize : (i+1)*trivet.BlockSize]; !isZero(b) {
			out[i] = stampedVersion(b)
		}
	}
	return out
}

// expected passes on an error that faults may cause, and reports any other. After any error of a change
// its effect is unknown: an answer like "no space" may be to a second copy, when the first is in the log.
func (w *worker) expected(err error) error {
	s := w.sim
	if errors.Is(err, trivet.ErrCorrupt) {
		s.damaged.Store(true)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, trivet.ErrUnavailable), errors.Is(err, trivet.ErrFenced), errors.Is(err, trivet.ErrClosed),
		errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded),
		errors.Is(err, trivet.ErrNoSpace) && s.full.Load(),
		errors.Is(err, trivet.ErrCorrupt) && (s.rotten.Load() || s.noisy.Load()),
		errors.Is(err, trivet.ErrInvalid) && s.noisy.Load(): // a bit of the head of a message
		return err
	}
	s.violate(fmt.Errorf("unexpected answer: %w", err))
	return err
}
