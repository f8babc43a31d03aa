package cache

import (
	"sync"

	"github.com/trivet-csi/trivet"
)

// Pool divides the cache memory of a node among its volumes: each gets what it asks for as long as there is enough,
// else a share by weight. It is safe for concurrent use. It hands out numbers only; whoever asks sets the cache to
// what it was granted, and says so.
type Pool struct {
	total int64

	mu     sync.Mutex
	claims map[trivet.VolumeID]claim
}

// claim is what a volume asks for and has.
type claim struct {
	want, has int64
	weight    int64
}

// NewPool returns a pool of total bytes.
func NewPool(total int64) *Pool { return &Pool{total: total, claims: make(map[trivet.VolumeID]claim)} }

// Ask returns how many bytes the cache of a volume may have now; the volume is taken to have them from here on. weight
// is 1 or more. It is less than its share while others still have more than theirs: ask again once they have asked.
func (p *Pool) Ask(id trivet.VolumeID, want int64, weight int) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	free := p.total
	for other, c := range p.claims {
		if other != id {
			free -= c.has
		}
	}
	p.claims[id] = claim{want: want, weight: int64(max(weight, 1))}
	grant := min(p.shareLocked(id), max(free, 0))
	grant -= grant % (slotsMin * trivet.BlockSize)
	c := p.claims[id]
	c.has = grant
	p.claims[id] = c
	return grant
}

// Leave gives back what a volume has.
func (p *Pool) Leave(id trivet.VolumeID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.claims, id)
}

// shareLocked is max-min fairness by weight: whoever wants less than its part gets that, and the rest is divided
// again among the others.
func (p *Pool) shareLocked(id trivet.VolumeID) int64 {
	left, weights := p.total, int64(0)
	for _, c := range p.claims {
		weights += c.weight
	}
	content := make(map[trivet.VolumeID]bool, len(p.claims))
	for {
		more := false
		for other, c := range p.claims {
			if !content[other] && c.want <= left*c.weight/weights {
				if other == id {
					return c.want
				}
				content[other], more = true, true
				left -= c.want
				if weights -= c.weight; weights == 0 {
					return c.want
				}
			}
		}
		if !more {
			return left * p.claims[id].weight / weights
		}
	}
}
