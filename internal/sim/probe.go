package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

const (
	probeMean    = 40 * time.Millisecond
	probeTimeout = 250 * time.Millisecond
	neverIssued  = version(1 << 30) // of a write that may not happen: it is found wherever it lands
)

// probe asks single machines, with no memory of terms seen elsewhere: a deposed leader that still
// believes in its lease answers, and the oracle sees how old the answer is (H8, I15).
func (s *sim) probe(ctx context.Context, rnd *rand.Rand) {
	w := &worker{sim: s, rnd: rnd}
	for !s.session() && Sleep(ctx, time.Duration(rnd.ExpFloat64()*float64(probeMean))) == nil {
		at := s.holder()
		v, err := s.openAt(rnd, at.epoch)
		if err != nil {
			s.violate(err)
			return
		}
		lba, n := w.extent()
		err = w.read(ctx, &seat{volume: v, epoch: at.epoch, node: "probe"}, lba, n)
		if err == nil {
			s.count(func(r *Report) { r.Probes++ })
		}
		if err := v.Close(); err != nil {
			s.violate(err)
		}
	}
}

// session reports whether the holder reads by session. It then sees what it did itself in order, but not in order
// with what others see, so nobody else may be asked: another reader may have seen a write before the holder
// was told that it is in.
func (s *sim) session() bool { return s.swarm.session }

// stubborn reads the hot corner from one machine, again and again for as long as a deposed leader may
// believe in itself, over links that no fault cuts.
func (s *sim) stubborn(ctx context.Context, node *Node) {
	if s.session() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	at := s.holder()
	v, err := s.cluster.openVolume(ProbeNode, at.epoch, probeTimeout, []raftgroup.Member{
		{Replica: node.ReplicaID(), Node: node.ID()},
	}, nil, trivet.ReadStrong)
	if err != nil {
		s.violate(err)
		return
	}
	w := &worker{sim: s, unrecorded: true}
	var reads sync.WaitGroup
	for Sleep(ctx, 10*time.Millisecond) == nil {
		reads.Go(func() {
			if w.read(ctx, &seat{volume: v, epoch: at.epoch, node: "stubborn"}, 0, min(hotN, s.opts.BlockN)) == nil {
				s.count(func(r *Report) { r.Probes++ })
			}
		})
	}
	reads.Wait()
	if err := v.Close(); err != nil {
		s.violate(err)
	}
}

// openAt opens the volume for requests to one machine only.
func (s *sim) openAt(rnd *rand.Rand, epoch trivet.Epoch) (*replication.Volume, error) {
	members := s.cluster.Members()
	one := []raftgroup.Member{members[rnd.IntN(len(members))]}
	return s.cluster.openVolume(ClientNode, epoch, probeTimeout, one, nil, trivet.ReadStrong)
}

// stale is the holder of an epoch that was fenced, which does not give up: it asks every machine, also
// one that leads and has not applied the fence yet (H12).
func (s *sim) stale(ctx context.Context, rnd *rand.Rand) {
	w := &worker{sim: s, rnd: rnd}
	for Sleep(ctx, time.Duration(rnd.ExpFloat64()*float64(probeMean))) == nil {
		at := s.holder()
		if at.epoch < 2 {
			continue
		}
		old := at.epoch - 1 // fenced before the holder of at.epoch was told so
		v, err := s.openAt(rnd, old)
		if err != nil {
			s.violate(err)
			return
		}
		lba, _ := w.extent()
		p := make([]byte, trivet.BlockSize)
		stamp(p, lba, old, neverIssued)
		if err := v.WriteAt(ctx, p, int64(lba)*trivet.BlockSize); err == nil {
			s.violate(fmt.Errorf("write of fenced epoch %d succeeded at epoch %d", old, at.epoch))
		}
		s.count(func(r *Report) { r.StaleWrites++ })
		if err := v.Close(); err != nil {
			s.violate(err)
		}
	}
}
