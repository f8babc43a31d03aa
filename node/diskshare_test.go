package node

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/internal/stage"
	"github.com/trivet-csi/trivet/iothrottle"
)

// countedShare is a diskShare that counts background work.
type countedShare struct {
	*diskShare
	background atomic.Int64 // bytes
}

func newCountedShare(cat Catalogue) *countedShare {
	s := &countedShare{diskShare: newDiskShare()}
	s.connect(cat, stage.NewRegistry())
	return s
}

func (s *countedShare) Background(ctx context.Context, bytes int) (func(), error) {
	s.background.Add(int64(bytes))
	return s.diskShare.Background(ctx, bytes)
}

// served returns how many requests have taken their turn, and the volume's part of the disk, if a replica runs.
func (s *countedShare) served() (uint64, *diskTurns) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for t := range s.open {
		return t.stages.Meter(stage.DiskTurn).Totals().LeftN, t
	}
	return 0, nil
}

// TestGroupSharesItsDisk: requests wait for their turn on the disk of the leader, and on no other; the share follows
// the catalogue; a rebuild is background work on both its disks; and a replica that is parked leaves its disk.
func TestGroupSharesItsDisk(t *testing.T) {
	inGroups(t, 4, time.Second, func(t *testing.T, b *groupBench) {
		d := b.attach()
		p := make([]byte, 8*trivet.BlockSize)
		for range 100 { // more than a log keeps, so that a new replica has to be filled
			require.NoError(t, d.WriteAt(t.Context(), p, 0))
			require.NoError(t, d.ReadAt(t.Context(), p, 0))
		}
		lead, _ := b.leader()
		for _, g := range b.nodes {
			n, turns := g.share.served()
			if g != lead {
				assert.Zero(t, n, "n%d", g.n)
				continue
			}
			assert.EqualValues(t, 200, n)
			require.Equal(t, iothrottle.Share{Weight: 50}, turns.Share())
			b.cat.edit(vol, func(v *meta.Volume) {
				v.Params = map[string]string{"priority": "80", "iopsReservation": "7"}
			})
			g.share.follow()
			require.Equal(t, iothrottle.Share{Weight: 80, Reservation: 7}, turns.Share())
			b.cat.edit(vol, func(v *meta.Volume) { v.Params = map[string]string{"priority": "of a newer version"} })
			g.share.follow()
			require.Equal(t, iothrottle.Share{Weight: 50}, turns.Share())
		}

		gone := b.nodes[others(lead.n)[0]]
		gone.kill()
		require.Zero(t, b.nodes[4].share.background.Load())
		b.add(4, 4, ours(gone.n))
		b.until("another one has taken its place", b.has(1, lead.n, others(lead.n)[1], 4))
		assert.Positive(t, b.nodes[4].share.background.Load(), "what was restored")
		assert.Positive(t, lead.share.background.Load()+b.nodes[others(lead.n)[1]].share.background.Load(),
			"what was read for it")

		b.detach(d)
		b.until("it is parked", func() bool { _, turns := lead.share.served(); return turns == nil })
		synctest.Wait()
		require.Empty(t, lead.share.open)
		require.Zero(t, lead.share.scheduler.Stats().Inside)
	})
}
