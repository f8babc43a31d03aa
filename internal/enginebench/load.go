package main

import (
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

func newRand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 2)) }

// places fills lbas with where the blocks of the next entry go.
type places func(lbas []trivet.LBA)

// inOrder goes through a volume from its beginning to its end, and again.
func inOrder(blockN int64) places {
	next := int64(0)
	return func(lbas []trivet.LBA) {
		for i := range lbas {
			lbas[i] = trivet.LBA(next)
			next = (next + 1) % blockN
		}
	}
}

// atRandom gives each block a place of its own.
func atRandom(blockN int64, rng *rand.Rand) places {
	return func(lbas []trivet.LBA) {
		for i := range lbas {
			lbas[i] = trivet.LBA(rng.Int64N(blockN))
		}
	}
}

// inRuns gives each entry one place.
func inRuns(blockN int64, rng *rand.Rand) places {
	return func(lbas []trivet.LBA) {
		first := trivet.LBA(rng.Int64N(blockN - int64(len(lbas)) + 1))
		for i := range lbas {
			lbas[i] = first + trivet.LBA(i)
		}
	}
}

// spread puts n blocks at equal distances over a volume.
func spread(blockN, n int64) places {
	next := int64(0)
	return func(lbas []trivet.LBA) {
		for i := range lbas {
			lbas[i] = trivet.LBA(next * (blockN / n))
			next = (next + 1) % n
		}
	}
}

// payloads are buffers of random content, for the whole run: the log keeps an entry's until it is evicted, so they are
// never written again.
func payloads(n, bytes int, rng *rand.Rand) [][]byte {
	out := make([][]byte, n)
	for i := range out {
		out[i] = segment.Buffer(int64(bytes))
		for k := 0; k < bytes; k += 8 {
			x := rng.Uint64()
			for j := range 8 {
				out[i][k+j] = byte(x >> (8 * j))
			}
		}
	}
	return out
}

// readers are goroutines with a buffer and a source of places each.
type readers struct {
	bufs [][]byte
	rngs []*rand.Rand
}

func newReaders(n int) *readers {
	r := &readers{}
	for i := range n {
		r.bufs = append(r.bufs, segment.Buffer(trivet.BlockSize))
		r.rngs = append(r.rngs, newRand(uint64(i)+100))
		clear(r.bufs[i]) // touched
	}
	return r
}

// rate reads n single blocks at random places, all readers at a time, and returns how many a second.
func (r *readers) rate(n, blockN int64, read func(p []byte, lba trivet.LBA) error) (float64, error) {
	var wg sync.WaitGroup
	errs := make([]error, len(r.bufs))
	each := max(n/int64(len(r.bufs)), 1)
	began := time.Now()
	for i, p := range r.bufs {
		wg.Go(func() {
			for k := int64(0); k < each && errs[i] == nil; k++ {
				errs[i] = read(p, trivet.LBA(r.rngs[i].Int64N(blockN)))
			}
		})
	}
	wg.Wait()
	took := time.Since(began)
	return float64(each*int64(len(r.bufs))) / took.Seconds(), errors.Join(errs...)
}

// inTurns measures two things in turns, and the other first in every second round.
func inTurns(rounds int, a, b func() (float64, error)) (as, bs []float64, err error) {
	for i := range rounds {
		var x, y float64
		if i%2 == 0 {
			if x, err = a(); err == nil {
				y, err = b()
			}
		} else if y, err = b(); err == nil {
			x, err = a()
		}
		if err != nil {
			return nil, nil, err
		}
		as, bs = append(as, x), append(bs, y)
	}
	return as, bs, nil
}

// quantile returns the smallest value that a share q of all does not exceed.
func quantile[T float64 | time.Duration](xs []T, q float64) T {
	if len(xs) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(xs))
	return s[min(int(q*float64(len(s))), len(s)-1)]
}

func median[T float64 | time.Duration](xs []T) T { return quantile(xs, 0.5) }

// medianRatio is the median of the ratios of each round.
func medianRatio(as, bs []float64) float64 {
	out := make([]float64, len(as))
	for i := range as {
		out[i] = as[i] / bs[i]
	}
	return median(out)
}
