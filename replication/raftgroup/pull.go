package raftgroup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/transport"
)

const (
	readAhead    = 2                // pieces asked for before they are wanted
	pieceTimeout = 30 * time.Second // for one
	pieceTries   = 4
	pieceRetry   = 100 * time.Millisecond
)

// pull is an image of another replica, as an io.Reader. Read returns the same error for ever once the
// source cannot be read; failed tells that from what the reader of the stream did not like about it.
type pull struct {
	g      *Group
	from   raft.ServerAddress
	opened imageOpened
	ctx    context.Context // from open to close
	cancel context.CancelFunc
	jobs   sync.WaitGroup

	ahead []chan arrival // pieces that were asked for, in order
	asked uint64         // offset of the next to be asked for
	rest  []byte         // of the piece in hand
	last  bool           // nothing follows it
	err   error

	release func() // gives back the turn of the piece in hand; nil: it has none

	gotBytes atomic.Int64
}

type arrival struct {
	piece imagePiece
	err   error
}

// send sends a message of a catch-up to another replica of the group, whether or not the library runs.
func (g *Group) send(ctx context.Context, to raft.ServerAddress, kind transport.Kind, body []byte,
	timeout time.Duration,
) ([]byte, error) {
	replica, node, err := parseAddress(to)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	reply, err := g.cfg.Network.net.Call(ctx, node, transport.Message{
		Kind: kind, Group: g.cfg.Group, From: g.cfg.Replica, To: replica, Body: body,
	})
	return reply.Body, err
}

// openPull asks for an image for a machine with that Want. The caller must close it.
func (g *Group) openPull(ctx context.Context, from raft.ServerAddress, want []byte) (*pull, error) {
	b, err := g.send(ctx, from, transport.KindImageOpen, imageOpen{want: want}.encode(), pieceTimeout)
	if err != nil {
		return nil, err
	}
	opened, err := decodeImageOpened(b)
	if err != nil {
		return nil, err
	}
	p := &pull{g: g, from: from, opened: opened}
	p.ctx, p.cancel = context.WithCancel(ctx)
	p.jobs.Go(p.keepAlive)
	return p, nil
}

// close ends the pull and tells the source, which would find out by itself.
func (p *pull) close(restored bool) {
	p.written()
	body := imageClose{id: p.opened.id, restored: restored}.encode()
	if _, err := p.g.send(p.ctx, p.from, transport.KindImageClose, body, p.g.cfg.Timing.Heartbeat); err != nil {
		p.g.log.Debug("image not closed", "from", string(p.from), "err", err)
	}
	p.cancel()
	p.jobs.Wait()
}

// failed returns why the source could not be read.
func (p *pull) failed() error { return p.err }

// keepAlive tells the source that this side lives, however long the state machine or the limit of the
// rate take.
func (p *pull) keepAlive() {
	tick := time.NewTicker(imageIdle / 3)
	defer tick.Stop()
	body := imageRead{id: p.opened.id, offset: keepAlive}.encode()
	for {
		select {
		case <-tick.C:
		case <-p.ctx.Done():
			return
		}
		_, err := p.g.send(p.ctx, p.from, transport.KindImageRead, body, imageIdle/3)
		if err != nil && p.ctx.Err() == nil {
			p.g.log.Debug("image not kept alive", "from", string(p.from), "err", err)
		}
	}
}

// Read implements io.Reader.
func (p *pull) Read(b []byte) (int, error) {
	for len(p.rest) == 0 && p.err == nil {
		if p.last {
			return 0, io.EOF
		}
		p.err = p.next()
	}
	if p.err != nil {
		return 0, p.err
	}
	n := copy(b, p.rest)
	p.rest = p.rest[n:]
	return n, nil
}

// next takes the next piece in hand and asks for more ahead of it.
func (p *pull) next() error {
	p.written() // the piece before: the machine wants more
	for len(p.ahead) <= readAhead {
		off, got := p.asked, make(chan arrival, 1)
		p.jobs.Go(func() {
			piece, err := p.fetch(off)
			got <- arrival{piece, err}
		})
		p.ahead = append(p.ahead, got)
		p.asked += uint64(p.opened.pieceN)
	}
	a := <-p.ahead[0]
	p.ahead = p.ahead[1:]
	if a.err != nil {
		return a.err
	}
	if err := p.wait(len(a.piece.data)); err != nil {
		return err
	}
	// Only now, for what the machine does with the piece: whoever has a turn of a disk must not wait for another node,
	// which may wait for a turn of its own to read for us.
	if yield := p.g.cfg.Background; yield != nil {
		var err error
		if p.release, err = yield(p.ctx, len(a.piece.data)); err != nil {
			return err
		}
	}
	p.gotBytes.Add(int64(len(a.piece.data)))
	p.g.catch.got(p.gotBytes.Load())
	p.rest, p.last = a.piece.data, a.piece.last
	return nil
}

// wait holds the reader back to the limit that all groups of the process share. What was read ahead is
// in memory then; no more is asked for meanwhile.
func (p *pull) wait(n int) error {
	limit := p.g.cfg.CatchUpLimit
	for limit != nil && n > 0 {
		part := min(n, max(limit.Burst(), 1))
		if err := limit.WaitN(p.ctx, part); err != nil {
			return fmt.Errorf("wait for %d bytes of the catch-up limit: %w", part, err)
		}
		n -= part
	}
	return nil
}

// written gives back the turn of the piece in hand.
func (p *pull) written() {
	if p.release != nil {
		p.release()
		p.release = nil
	}
}

// fetch gets one piece. A damaged one, or one that got lost, is asked for again.
func (p *pull) fetch(off uint64) (imagePiece, error) {
	body := imageRead{id: p.opened.id, offset: off}
	for try := 1; ; try++ {
		piece, err := p.fetchOnce(body)
		if err == nil {
			return piece, nil
		}
		again := errors.Is(err, trivet.ErrUnavailable) || errors.Is(err, errDamagedPiece) ||
			errors.Is(err, context.DeadlineExceeded)
		if !again || try == pieceTries || p.ctx.Err() != nil {
			return imagePiece{}, fmt.Errorf("read image %d of %s at %d: %w", p.opened.id, p.from, off, err)
		}
		p.g.log.Warn("piece of an image is read again", "from", string(p.from), "offset", off, "err", err)
		select {
		case <-time.After(pieceRetry):
		case <-p.ctx.Done():
		}
	}
}

// errDamagedPiece is ours: a source that cannot read its image says ErrCorrupt too, and that stays.
var errDamagedPiece = errors.New("piece is damaged")

func (p *pull) fetchOnce(req imageRead) (imagePiece, error) {
	b, err := p.g.send(p.ctx, p.from, transport.KindImageRead, req.encode(), pieceTimeout)
	if err != nil {
		return imagePiece{}, err
	}
	piece, err := decodeImagePiece(b)
	if err != nil {
		return imagePiece{}, fmt.Errorf("%w: %w", err, errDamagedPiece)
	}
	if piece.offset != req.offset || !piece.last && len(piece.data) != p.opened.pieceN {
		return imagePiece{}, fmt.Errorf("got %d bytes at %d, last %t: %w", len(piece.data), piece.offset, piece.last,
			trivet.ErrInvalid)
	}
	return piece, nil
}
