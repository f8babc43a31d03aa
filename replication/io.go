package replication

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/transport"
)

// pieces calls f for the parts of [off, off+n) bytes. A range of at most sizeMax is one part, a longer
// one is cut at multiples of sizeMax. The parts run together, one of them on the calling goroutine;
// the first error ends the others.
func (v *Volume) pieces(ctx context.Context, off, n, sizeMax int64,
	f func(ctx context.Context, at, n int64) error,
) error {
	if n == 0 {
		return nil
	}
	if n <= sizeMax {
		return f(ctx, off, n)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var running sync.WaitGroup
	var once sync.Once
	var first error
	room := make(chan struct{}, requestsInFlight/4) // a huge call leaves room for others
	for at, end := off, off+n; at < end; {
		next := min(end, at-at%sizeMax+sizeMax)
		from, size := at, next-at
		room <- struct{}{} // f ends with ctx, so this never waits for longer than the call may take
		running.Go(func() {
			defer func() { <-room }()
			if err := f(ctx, from, size); err != nil {
				once.Do(func() {
					first = err
					cancel(err)
				})
			}
		})
		at = next
	}
	running.Wait()
	return first
}

// change numbers, seals and sends one request, and waits until it is applied.
func (v *Volume) change(ctx context.Context, req request) error {
	if err := v.takeSlot(ctx); err != nil {
		return fmt.Errorf("%s block %d of %s: %w", req.op, req.lba, v.cfg.ID, err)
	}
	defer func() { <-v.slots }()
	seq, low, err := v.session.begin(ctx)
	if err != nil {
		return fmt.Errorf("%s block %d of %s: %w", req.op, req.lba, v.cfg.ID, giveUp(ctx, v.cfg.IOTimeout, err))
	}
	defer v.session.end(seq)
	writer := uint64(v.cfg.Writer) << 63
	req.seq, req.low = seq|writer, low|writer
	err = v.atEpoch(ctx, func(epoch trivet.Epoch) error {
		req := req
		req.epoch = epoch
		req.seal(v.cfg.ID)
		var body []byte // encoded for the first remote attempt, the same bytes for each
		return v.callLeader(ctx, false, func(ctx context.Context, node trivet.NodeID) (reply, error) {
			if v.cfg.Host != nil && node == v.cfg.Network.Local() {
				return v.cfg.Host.write(ctx, node, v.cfg.ID, &req)
			}
			if body == nil {
				body = appendWrite(make([]byte, 0, writeHeaderBytes+len(req.data)), &req)
			}
			return v.send(ctx, node, transport.KindVolumeWrite, body, 0)
		})
	})
	if err == nil {
		return nil
	}
	err = fmt.Errorf("%s block %d of %s: %w", req.op, req.lba, v.cfg.ID, err)
	if errors.Is(err, trivet.ErrUnavailable) {
		v.poison(err)
	}
	return err
}

// poison makes every later Flush fail: nobody can say whether the write is in.
func (v *Volume) poison(err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.flushErr == nil {
		v.flushErr = err
		v.log.Error("a write was given up: flush fails until the volume is attached anew", "err", err)
	}
}

// readBeside tries the replica on this node, if it may answer. Without an answer others are to be asked,
// unless the error is that the volume is fenced, which any replica knows for good.
func (v *Volume) readBeside(ctx context.Context, attempt attemptFunc) (done bool, err error) {
	if v.level == levelStrong || v.cfg.Host == nil {
		return false, nil
	}
	out, err := attempt(ctx, v.cfg.Network.Local())
	switch {
	case errors.Is(err, trivet.ErrFenced):
		return false, err
	case err != nil || out.code != codeDone:
		return false, nil //nolint:nilerr // whatever it is, others may know better
	}
	v.note(out.index)
	return true, nil
}

// note remembers what this session has seen.
func (v *Volume) note(index uint64) {
	for {
		old := v.seen.Load()
		if index <= old || v.seen.CompareAndSwap(old, index) {
			return
		}
	}
}

// readPiece fills p from the leader, or from a replica that will do for the volume's consistency.
func (v *Volume) readPiece(ctx context.Context, p []byte, lba trivet.LBA) error {
	if err := v.takeSlot(ctx); err != nil {
		return fmt.Errorf("read block %d of %s: %w", lba, v.cfg.ID, err)
	}
	defer func() { <-v.slots }()
	err := v.atEpoch(ctx, func(epoch trivet.Epoch) error { return v.readAtEpoch(ctx, p, lba, epoch) })
	if err != nil {
		return fmt.Errorf("read block %d of %s: %w", lba, v.cfg.ID, err)
	}
	return nil
}

func (v *Volume) readAtEpoch(ctx context.Context, p []byte, lba trivet.LBA, epoch trivet.Epoch) error {
	req := readRequest{
		level: v.level, blockN: uint32(len(p) / trivet.BlockSize), epoch: epoch, lba: lba, index: v.seen.Load(),
	}
	attempt := func(ctx context.Context, node trivet.NodeID) (reply, error) {
		if v.cfg.Host != nil && node == v.cfg.Network.Local() {
			return v.cfg.Host.read(ctx, node, v.cfg.ID, p, &req)
		}
		out, err := v.send(ctx, node, transport.KindVolumeRead, req.append(nil), len(p))
		if err != nil || out.code != codeDone {
			return out, err
		}
		if got := readSum(v.cfg.ID, lba, out.data); got != out.crc {
			return reply{}, fmt.Errorf("reply of %s has crc32c %08x, want %08x: %w", node, got, out.crc, trivet.ErrCorrupt)
		}
		copy(p, out.data)
		return out, nil
	}
	done, err := v.readBeside(ctx, attempt)
	if !done && err == nil {
		err = v.callLeader(ctx, v.level == levelStrong, attempt)
	}
	return err
}

func (v *Volume) send(ctx context.Context, node trivet.NodeID, kind transport.Kind, body []byte, dataN int) (
	reply, error,
) {
	m, err := v.cfg.Network.Call(ctx, node, transport.Message{Kind: kind, Group: v.cfg.ID, Body: body})
	if err != nil {
		return reply{}, err
	}
	return decodeReply(m.Body, dataN)
}

func (v *Volume) takeSlot(ctx context.Context) error {
	select {
	case v.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return giveUp(ctx, v.cfg.IOTimeout, errors.New("too many requests in flight"))
	}
}
