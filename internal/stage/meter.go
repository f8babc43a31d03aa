package stage

import (
	"math"
	"math/bits"
	"sync/atomic"
	"time"
)

// A histogram in the manner of HdrHistogram (G. Tene): each power of two is cut into subN equal buckets, so
// that a value is known to within 1/subN of itself, in fixed memory and with one addition. The unit is 64 ns,
// less than two readings of the clock take.
//
//	units   0 1 … 7 | 8 9 … 15 | 16 18 … 30 | 32 36 … 60 | …
//	bucket  0 1 … 7 | 8 9 … 15 | 16 17 … 23 | 24 25 … 31 | …
const (
	unitBits = 6 // 2^6 ns
	subBits  = 3
	subN     = 1 << subBits

	// unitsMax is 2^30 units, 69 s, which is longer than a request may wait; what is longer counts as that.
	unitsMaxBits = 30
	bucketN      = (unitsMaxBits - subBits + 1) * subN
)

// bucketOf returns the bucket of a duration.
func bucketOf(d time.Duration) int {
	u := uint64(max(d, 0)) >> unitBits
	u = min(u, 1<<unitsMaxBits-1)
	shift := max(bits.Len64(u)-1-subBits, 0)
	return shift<<subBits + int(u>>shift)
}

// bucketEnd returns the first duration above a bucket.
func bucketEnd(i int) time.Duration {
	if i < subN {
		return time.Duration(i+1) << unitBits
	}
	shift := i>>subBits - 1
	u := uint64(i) - uint64(shift)<<subBits + 1
	return time.Duration(u<<shift) << unitBits
}

// Meter measures one stage of one volume. All methods may be called concurrently and on nil.
type Meter struct {
	arrivedN atomic.Uint64
	leftN    atomic.Uint64
	bytes    atomic.Uint64
	sumNanos atomic.Uint64
	squares  atomic.Uint64 // bits of a float64: the sum of the squares, in s²
	buckets  [bucketN]atomic.Uint64
}

// Enter counts a request that comes into the stage. Leave must follow.
func (m *Meter) Enter() {
	if m != nil {
		m.arrivedN.Add(1)
	}
}

// Leave counts a request that leaves the stage after d.
func (m *Meter) Leave(d time.Duration) {
	if m == nil {
		return
	}
	d = max(d, 0)
	m.buckets[bucketOf(d)].Add(1)
	m.sumNanos.Add(uint64(d))
	if d > 0 {
		x := d.Seconds() * d.Seconds()
		for {
			old := m.squares.Load()
			if m.squares.CompareAndSwap(old, math.Float64bits(math.Float64frombits(old)+x)) {
				break
			}
		}
	}
	m.leftN.Add(1)
}

// LeaveSince is Leave of a request that came when Now returned began.
func (m *Meter) LeaveSince(began time.Duration) {
	if m != nil {
		m.Leave(Now() - began)
	}
}

// Span is a request in a stage. The zero value measures nothing.
type Span struct {
	meter *Meter
	began time.Duration
}

// Begin is Enter, and keeps the time.
func (m *Meter) Begin() Span {
	if m == nil {
		return Span{}
	}
	m.Enter()
	return Span{m, Now()}
}

// End is Leave. REQUIRES: called once.
func (s Span) End() { s.meter.LeaveSince(s.began) }

// Observe counts a request that has been in the stage for d.
func (m *Meter) Observe(d time.Duration) {
	m.Enter()
	m.Leave(d)
}

// AddBytes counts data of requests.
func (m *Meter) AddBytes(n int) {
	if m != nil {
		m.bytes.Add(uint64(n))
	}
}

// Inside returns how many requests are in the stage now.
func (m *Meter) Inside() int64 {
	left := m.leftN.Load() // first: it may only be too small then
	return int64(m.arrivedN.Load() - left)
}

// Totals is what a Meter has counted since it was made. Two of the same Meter, one taken from the other by
// Sub, are what happened in between.
type Totals struct {
	ArrivedN, LeftN, Bytes uint64
	Sum                    time.Duration // of the times of those that left
	Squares                float64       // sum of the squares of those times, s²

	buckets [bucketN]uint64
}

// Totals returns what was counted so far. What is observed meanwhile may be in some of the figures only.
func (m *Meter) Totals() *Totals {
	t := &Totals{
		LeftN: m.leftN.Load(), ArrivedN: m.arrivedN.Load(), Bytes: m.bytes.Load(),
		Sum: time.Duration(m.sumNanos.Load()), Squares: math.Float64frombits(m.squares.Load()),
	}
	for i := range m.buckets {
		t.buckets[i] = m.buckets[i].Load()
	}
	return t
}

// Sub takes earlier away. REQUIRES: both are of one Meter.
func (t *Totals) Sub(earlier *Totals) {
	t.ArrivedN -= earlier.ArrivedN
	t.LeftN -= earlier.LeftN
	t.Bytes -= earlier.Bytes
	t.Sum -= earlier.Sum
	t.Squares = max(t.Squares-earlier.Squares, 0)
	for i := range t.buckets {
		t.buckets[i] -= earlier.buckets[i]
	}
}

// Mean returns the mean time of those that left; 0 when none did.
func (t *Totals) Mean() time.Duration {
	if t.LeftN == 0 {
		return 0
	}
	return t.Sum / time.Duration(t.LeftN)
}

// Variance returns the variance of the times, in s².
func (t *Totals) Variance() float64 {
	if t.LeftN == 0 {
		return 0
	}
	mean := t.Sum.Seconds() / float64(t.LeftN)
	return max(t.Squares/float64(t.LeftN)-mean*mean, 0)
}

// Quantile returns a time that a share of q (0 to 1) of the requests did not exceed, to within an eighth above
// the true one. 0 when there were none.
func (t *Totals) Quantile(q float64) time.Duration {
	var n uint64
	for _, c := range t.buckets {
		n += c
	}
	if n == 0 {
		return 0
	}
	want, seen := max(uint64(math.Ceil(q*float64(n))), 1), uint64(0)
	for i, c := range t.buckets {
		if seen += c; seen >= want {
			return bucketEnd(i)
		}
	}
	return bucketEnd(bucketN - 1)
}

// Bounds are the upper ends, in ascending order, by which Cumulative counts: powers of two of 64 ns, at which the
// fine buckets end too, so that nothing is estimated.
var Bounds = func() []time.Duration {
	var bounds []time.Duration
	for _, power := range []int{8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 22, 24, 26, 28} { // 16 µs to 17 s
		bounds = append(bounds, time.Duration(1)<<(power+unitBits))
	}
	return bounds
}()

// Cumulative returns for each of Bounds how many requests were below it, and how many there were at all.
func (t *Totals) Cumulative() (below []uint64, all uint64) {
	below = make([]uint64, len(Bounds))
	next := 0
	for i, c := range t.buckets {
		for next < len(Bounds) && bucketEnd(i) > Bounds[next] {
			below[next] = all
			next++
		}
		all += c
	}
	for ; next < len(Bounds); next++ {
		below[next] = all
	}
	return below, all
}
