package raftgroup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/transport"
)

// The source's side of a catch-up: images of this replica's state, pinned for other members that pull
// them. What is applied here is committed, so any member's image will do, not the leader's alone.

const (
	pieceBytes    = 512 << 10 // of an image, in one message
	pieceBytesMax = 1 << 20   // that we accept
	// piecesKept is how many of the newest pieces stay, to be asked for again: two that the follower reads
	// ahead, the one that it has in hand, and one more.
	piecesKept = readAhead + 2

	imagesMax        = 4  // open, per group
	imagesProcessMax = 16 // and of all groups of a process: each pins files of the engine

	imageIdle  = 30 * time.Second // without a sign of the follower an image is dropped (H6)
	imageStuck = 10 * time.Minute // without a new piece too: nobody may pin our disk for ever
	// holdAfter is how long the log is kept for a follower that has restored an image, starts, and is about
	// to go on from there.
	holdAfter = 30 * time.Second
)

// served is an image that a follower pulls. It has two deadlines: one for any sign of the follower, one
// for progress.
type served struct {
	id     uint64
	to     raft.ServerAddress
	img    Image
	pieceN int
	idle   *time.Timer
	stuck  *time.Timer

	turn   chan struct{} // one place: who has it may use what follows
	next   uint64        // number of the piece that the image yields next
	ended  bool          // it has none
	err    error         // of reading it; sticky
	pieces [piecesKept]imagePiece
}

// hold keeps the log for a follower from an index on.
type hold struct {
	from  uint64
	until time.Time // zero: as long as its image is open
}

// images are those that one group serves.
type images struct {
	budget chan struct{} // shared by the groups of a process: one place per open image

	mu     sync.Mutex
	last   uint64 // ID
	closed bool
	open   map[uint64]*served
	holds  map[raft.ServerAddress]hold
	jobs   sync.WaitGroup
}

func newImages(budget chan struct{}) *images {
	return &images{
		budget: budget, last: randomUint64(), // so that no ID of an earlier run means anything
		open: make(map[uint64]*served), holds: make(map[raft.ServerAddress]hold),
	}
}

// add registers an image for a follower, in place of the one that it had. The image is closed if there
// is no room: ErrPending.
func (t *images) add(to raft.ServerAddress, img Image, from uint64, pieceN int) (*served, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.open {
		if s.to == to {
			t.dropLocked(s)
		}
	}
	full := len(t.open) >= imagesMax || t.closed
	if !full {
		select {
		case t.budget <- struct{}{}:
		default:
			full = true
		}
	}
	if full {
		return nil, errors.Join(fmt.Errorf("%d images are open: %w", len(t.open), trivet.ErrPending), img.Close())
	}
	t.last++
	s := &served{id: t.last, to: to, img: img, pieceN: pieceN, turn: make(chan struct{}, 1)}
	s.idle = time.AfterFunc(imageIdle, func() { t.drop(s, false) })
	s.stuck = time.AfterFunc(imageStuck, func() { t.drop(s, false) })
	t.open[s.id] = s
	t.holds[to] = hold{from: from}
	return s, nil
}

// enter lets close wait for a caller that pins an image; false once it is too late.
func (t *images) enter() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.closed {
		t.jobs.Add(1)
	}
	return !t.closed
}

// find returns an image of that follower and keeps it alive.
func (t *images) find(to raft.ServerAddress, id uint64) (*served, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.open[id]
	if s == nil || s.to != to {
		return nil, fmt.Errorf("image %d of %s is not open: %w", id, to, trivet.ErrNotFound)
	}
	s.idle.Reset(imageIdle)
	return s, nil
}

// drop closes an image. After a restore the log is kept a little longer.
func (t *images) drop(s *served, restored bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.open[s.id] != s {
		return
	}
	h := t.holds[s.to]
	t.dropLocked(s)
	if restored {
		h.until = time.Now().Add(holdAfter)
		t.holds[s.to] = h
	}
}

func (t *images) dropLocked(s *served) {
	delete(t.open, s.id)
	delete(t.holds, s.to)
	s.idle.Stop()
	s.stuck.Stop()
	t.jobs.Go(func() {
		s.turn <- struct{}{} // for good: the image may be read at this moment
		_ = s.img.Close()    // only read
		<-t.budget
	})
}

// close drops everything and waits.
func (t *images) close() {
	t.mu.Lock()
	t.closed = true
	for _, s := range t.open {
		t.dropLocked(s)
	}
	t.mu.Unlock()
	t.jobs.Wait()
}

// heldFrom returns from which index on the log is wanted by those who pull images.
func (t *images) heldFrom() (uint64, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var from uint64
	for to, h := range t.holds {
		if !h.until.IsZero() && time.Now().After(h.until) {
			delete(t.holds, to)
			continue
		}
		if from == 0 || h.from < from {
			from = h.from
		}
	}
	return from, from > 0
}

// piece returns a message with a piece, by its number: the next one, one of the last, or one that is a
// little ahead, because two requests may overtake each other.
func (s *served) piece(ctx context.Context, n uint64, yield turnTaker) ([]byte, error) {
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", context.Cause(ctx), trivet.ErrUnavailable)
	}
	if n >= s.next+piecesKept || n+piecesKept < s.next {
		return nil, fmt.Errorf("piece %d of image %d, next is %d: %w", n, s.id, s.next, trivet.ErrInvalid)
	}
	for n >= s.next && !s.ended {
		if err := s.produceInTurn(ctx, yield); err != nil {
			return nil, err
		}
		if s.err != nil {
			return nil, s.err
		}
	}
	p := imagePiece{last: true} // a read ahead past the end
	if n < s.next {
		p = s.pieces[n%piecesKept]
	}
	p.offset = n * uint64(s.pieceN)
	return p.encode(), nil // a copy, while it is our turn: the slot will be used again (H25)
}

// turnTaker is Config.Background.
type turnTaker func(ctx context.Context, bytes int) (release func(), err error)

// produceInTurn reads the next piece when it is the turn of background work on the disk. An error that does not stick
// says that it was not in time.
func (s *served) produceInTurn(ctx context.Context, yield turnTaker) error {
	if s.err != nil {
		return nil //nolint:nilerr // the caller returns it
	}
	if yield != nil {
		release, err := yield(ctx, s.pieceN)
		if err != nil {
			return fmt.Errorf("%w: %w", err, trivet.ErrUnavailable)
		}
		defer release()
	}
	s.err = s.produce()
	return nil
}

// produce reads the next piece. The buffers go round.
func (s *served) produce() error {
	slot := &s.pieces[s.next%piecesKept]
	buf := slot.data
	if cap(buf) < s.pieceN {
		buf = make([]byte, s.pieceN)
	}
	n, err := io.ReadFull(s.img, buf[:s.pieceN])
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("read image %d at piece %d: %w", s.id, s.next, err)
	}
	s.stuck.Reset(imageStuck)
	s.ended = err != nil
	*slot = imagePiece{data: buf[:n], last: s.ended}
	s.next++
	return nil
}

// onImage serves the messages of a follower that catches up.
func (g *Group) onImage(ctx context.Context, kind transport.Kind, follower raft.ServerAddress, body []byte,
) ([]byte, error) {
	switch kind {
	case transport.KindImageOpen:
		return g.onImageOpen(follower, body)
	case transport.KindImageRead:
		return g.onImageRead(ctx, follower, body)
	}
	req, err := decodeImageClose(body)
	if err != nil {
		return nil, err
	}
	if s, err := g.images.find(follower, req.id); err == nil { // else it is gone already
		g.images.drop(s, req.restored)
	}
	return verdict{term: g.stable.record().term, yes: true}.encode(), nil
}

func (g *Group) onImageOpen(follower raft.ServerAddress, body []byte) ([]byte, error) {
	req, err := decodeImageOpen(body)
	if err != nil {
		return nil, err
	}
	if !g.images.enter() {
		return nil, fmt.Errorf("group closes: %w", trivet.ErrUnavailable)
	}
	defer g.images.jobs.Done()
	img, rec, err := g.snaps.image(req.want)
	if err != nil {
		return nil, err
	}
	out := imageOpened{sizeBytes: img.Size(), pieceN: g.cfg.pieceBytes, rec: rec}
	s, err := g.images.add(follower, img, rec.index, out.pieceN)
	if err != nil {
		return nil, err
	}
	out.id = s.id
	g.log.Info("image opened", "for", string(follower), "index", rec.index, "term", rec.term, "bytes", out.sizeBytes)
	return out.encode(), nil
}

func (g *Group) onImageRead(ctx context.Context, follower raft.ServerAddress, body []byte) ([]byte, error) {
	req, err := decodeImageRead(body)
	if err != nil {
		return nil, err
	}
	s, err := g.images.find(follower, req.id)
	if err != nil {
		return nil, err
	}
	if req.offset == keepAlive {
		return imagePiece{offset: keepAlive}.encode(), nil
	}
	if req.offset%uint64(s.pieceN) != 0 {
		return nil, fmt.Errorf("image read at %d, pieces have %d bytes: %w", req.offset, s.pieceN, trivet.ErrInvalid)
	}
	p, err := s.piece(ctx, req.offset/uint64(s.pieceN), g.cfg.Background)
	if err != nil {
		if errors.Is(err, trivet.ErrCorrupt) {
			g.log.Error("image cannot be read", "for", string(follower), "err", err)
		}
		return nil, err
	}
	return p, nil
}
