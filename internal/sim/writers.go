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

// Two writers (decision 0030). In some seeds a second seat comes and goes beside the first, each with a session of its
// own, and a new process takes over from one of them; users sit at either. Each change has an epoch, whose fence names
// the sessions. Both write to the same blocks at once now and then: what is found there is for porcupine to judge, to
// which all users are one history.

// writersEvery is at most how long it takes until the writers change again.
const writersEvery = 4 * time.Second

// pair is what a catalogue would know of two writers. Under sim.mu, but for reserved.
type pair struct {
	seats    [replication.WritersMax]*seat // nil: nobody has that number
	since    replication.Writers
	epoch    trivet.Epoch  // fenced in, of all seats
	changed  chan struct{} // closed at the next change
	reserved trivet.Epoch  // highest of all; of the nemesis's goroutine
}

func newPair() *pair { return &pair{changed: make(chan struct{})} }

// reserve returns an epoch that nobody was given: one whose fence may be in, though nobody was told so, is never
// fenced again with other sessions.
func (p *pair) reserve() trivet.Epoch {
	p.reserved++
	return p.reserved
}

// grant makes seats those that may write. It returns those that may not any more. REQUIRES: sim.mu.
func (p *pair) grant(epoch trivet.Epoch, since replication.Writers, seats [replication.WritersMax]*seat) []*seat {
	var gone []*seat
	for i, old := range p.seats {
		if old != nil && p.since[i] != since[i] {
			gone = append(gone, old)
		}
	}
	p.epoch, p.since, p.seats = epoch, since, seats
	close(p.changed)
	p.changed = make(chan struct{})
	return gone
}

// renew is VolumeConfig.Renew of a session.
func (s *sim) renew(writer int, since trivet.Epoch) func(context.Context, trivet.Epoch) (trivet.Epoch, error) {
	return func(ctx context.Context, fenced trivet.Epoch) (trivet.Epoch, error) {
		for {
			s.mu.Lock()
			epoch, now, changed := s.pair.epoch, s.pair.since[writer], s.pair.changed
			s.mu.Unlock()
			switch {
			case now != since:
				return 0, fmt.Errorf("session of writer %d since epoch %d is over: %w", writer, since, trivet.ErrFenced)
			case epoch > fenced:
				return epoch, nil
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return 0, ctx.Err()
			}
		}
	}
}

// openSeat opens the volume for a seat, whose session begins with its epoch.
func (s *sim) openSeat(at *seat, writer int) (err error) {
	if s.pair == nil {
		at.volume, err = s.cluster.OpenVolume(at.node, at.epoch, ioTimeout)
		return err
	}
	c := s.cluster
	cfg := c.volumeConfig(at.node, at.epoch, ioTimeout, c.Members(), c.Members, trivet.ReadStrong)
	cfg.Writer, cfg.Renew = writer, s.renew(writer, at.epoch)
	at.volume, err = replication.OpenVolume(cfg)
	return err
}

// OpenWriter opens the volume on a machine as one of two writers.
func (c *Cluster) OpenWriter(node trivet.NodeID, epoch trivet.Epoch, writer int,
	renew func(context.Context, trivet.Epoch) (trivet.Epoch, error),
) (*replication.Volume, error) {
	cfg := c.volumeConfig(node, epoch, 0, c.Members(), c.Members, trivet.ReadStrong)
	cfg.Writer, cfg.Renew = writer, renew
	return replication.OpenVolume(cfg)
}

// FenceWriters is Fence for the sessions of two.
func (c *Cluster) FenceWriters(ctx context.Context, epoch trivet.Epoch, w replication.Writers) error {
	return c.lead(ctx, func(r *replication.Replica) error { return r.FenceWriters(ctx, epoch, w) })
}

// seats returns all that hold the volume now.
func (s *sim) seats() []*seat {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pair == nil {
		if s.seat == nil {
			return nil
		}
		return []*seat{s.seat}
	}
	var out []*seat
	for _, at := range s.pair.seats {
		if at != nil {
			out = append(out, at)
		}
	}
	return out
}

// sits reports whether a machine holds the volume, alone or beside another.
func (s *sim) sits(node trivet.NodeID) bool {
	for _, at := range s.seats() {
		if at.node == node {
			return true
		}
	}
	return false
}

// anySeat draws where a user sits; with one seat nothing is drawn.
func (s *sim) anySeat(rnd *rand.Rand) *seat {
	if s.pair == nil {
		return s.holder()
	}
	all := s.seats()
	return all[rnd.IntN(len(all))]
}

// seated makes next the only one who holds the volume and returns who held it before.
func (s *sim) seated(next *seat) []*seat {
	gone := s.seats()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seat = next
	if s.pair != nil {
		s.pair.grant(next.epoch, replication.Alone(next.epoch), [replication.WritersMax]*seat{next})
		s.oracle.newEra()
	}
	return gone
}

// changeWriters is a task of the nemesis: a second writer comes, one of two goes, or a new process takes over from it.
func (n *nemesis) changeWriters(ctx context.Context) error {
	n.later(writersEvery, n.changeWriters)
	where := ClientNode
	if node := n.pick(); node.Up() && n.rnd.IntN(2) == 0 {
		where = node.ID()
	}
	ctx, cancel := context.WithTimeout(ctx, 8*time.Second)
	defer cancel()
	err := n.sim.changeWriters(ctx, n.rnd, where)
	switch {
	case errors.Is(err, context.DeadlineExceeded): // the fence may be in: both wait until the next change
		return nil
	case err != nil:
		return fmt.Errorf("change of writers: %w", err)
	}
	n.sim.count(func(r *Report) { r.WriterChanges++ })
	return nil
}

func (s *sim) changeWriters(ctx context.Context, rnd *rand.Rand, where trivet.NodeID) error {
	s.mu.Lock()
	since, seats := s.pair.since, s.pair.seats
	s.mu.Unlock()
	writer := rnd.IntN(replication.WritersMax)
	leaves := seats[0] != nil && seats[1] != nil && rnd.IntN(3) > 0
	if (seats[0] == nil) != (seats[1] == nil) {
		writer = 0
		if seats[0] != nil {
			writer = 1
		}
	}
	epoch := s.pair.reserve()
	since[writer], seats[writer] = 0, nil
	if !leaves {
		since[writer] = epoch
	}
	if err := s.cluster.FenceWriters(ctx, epoch, since); err != nil {
		return fmt.Errorf("fence in epoch %d of %v: %w", epoch, since, err)
	}
	if !leaves {
		next := s.newSeat(epoch, where)
		if err := s.openSeat(next, writer); err != nil {
			return err
		}
		seats[writer] = next
	}
	s.mu.Lock()
	for i, at := range seats {
		if at != nil && i != writer { // it goes on, at this epoch
			on := *at
			on.epoch = epoch
			seats[i] = &on
		}
	}
	s.seat = seats[0]
	if s.seat == nil {
		s.seat = seats[1]
	}
	gone := s.pair.grant(epoch, since, seats)
	s.mu.Unlock()
	s.log.Debug("writers changed", "epoch", uint64(epoch), "since", fmt.Sprint(since), "leaves", leaves)
	return s.dismiss(ctx, gone)
}

// newSeat is a seat on a machine, or without a replica when that is down.
func (s *sim) newSeat(epoch trivet.Epoch, node trivet.NodeID) *seat {
	at := &seat{epoch: epoch, node: node, session: s.session()}
	if n := s.cluster.Node(node); n != nil {
		if at.life = n.current(); at.life == nil {
			at.node = ClientNode
		}
	}
	return at
}

// dismiss lets old holders try, and closes what they have.
func (s *sim) dismiss(ctx context.Context, gone []*seat) error {
	var errs []error
	for _, old := range gone {
		s.zombie(ctx, old)
		s.count(func(r *Report) { r.LongestGap = max(r.LongestGap, old.volume.Stats().LongestPause) })
		errs = append(errs, old.volume.Close())
	}
	return errors.Join(errs...)
}
