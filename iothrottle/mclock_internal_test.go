package iothrottle

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// loadClass is a class of the simulation: a closed loop of depthN requests, each sent again when it ended.
type loadClass struct {
	*class
	depthN  int
	cost    float64
	off     bool // sends no more
	got     float64
	oldest  float64 // longest wait, s
	servedN int
}

// bed is a storage of slots servers that take service for a request of cost 1, with an mclock before it, in
// virtual time.
type bed struct {
	t       *testing.T
	core    mclock
	classes []*loadClass
	slotN   int
	service float64 // s
	now     float64 // s
	ends    []ending
	seed    uint64
}

type ending struct {
	at float64
	c  *loadClass
}

func at(seconds float64) time.Duration { return time.Duration(seconds * float64(time.Second)) }

func (b *bed) add(s Share, depthN int, cost float64) *loadClass {
	c := &loadClass{class: b.core.add(s), depthN: depthN, cost: cost}
	b.classes = append(b.classes, c)
	return c
}

func (b *bed) send(c *loadClass) {
	b.core.enqueue(at(b.now), &waiter{class: c.class, cost: c.cost})
}

// run goes on for seconds and counts what each class got in that time.
func (b *bed) run(seconds float64) {
	for _, c := range b.classes {
		c.got, c.oldest, c.servedN = 0, 0, 0
	}
	until := b.now + seconds
	for {
		b.fill()
		if len(b.ends) == 0 {
			require.Fail(b.t, "nothing runs", "seed %d at %v", b.seed, b.now)
		}
		first := 0
		for i := range b.ends {
			if b.ends[i].at < b.ends[first].at {
				first = i
			}
		}
		e := b.ends[first]
		if e.at > until {
			b.now = until
			return
		}
		b.ends = append(b.ends[:first], b.ends[first+1:]...)
		b.now = e.at
		if !e.c.off {
			b.send(e.c)
		}
	}
}

// fill gives the storage what it may have. Work-conserving: a slot is free only when nobody waits, or a limit
// holds back all who do.
func (b *bed) fill() {
	for len(b.ends) < b.slotN {
		w, wait := b.core.next(at(b.now))
		if w == nil {
			for _, c := range b.classes {
				if c.first != nil {
					require.Positive(b.t, c.share.Limit, "seed %d at %v: a free slot, and one without a limit waits", b.seed, b.now)
					require.Positive(b.t, wait, "seed %d at %v", b.seed, b.now)
				}
			}
			return
		}
		for _, c := range b.classes {
			if c.class == w.class {
				c.got += w.cost
				c.servedN++
				c.oldest = max(c.oldest, b.now-w.came)
				b.ends = append(b.ends, ending{b.now + b.service*w.cost, c})
			}
		}
	}
}

func (b *bed) capacity() float64 { return float64(b.slotN) / b.service }

// TestReservationsAndShares runs random classes that always want more than there is, and checks after a while
// of settling, over 20 s: each class gets what it reserved; beyond that, shares are in proportion to the
// weights, so that no class is below its share unless it is at its reservation and others above theirs
// are none; all of the capacity is used; and nobody waits for longer than its part of the capacity explains.
func TestReservationsAndShares(t *testing.T) {
	t.Parallel()
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 11))
		b := &bed{t: t, seed: seed, slotN: 8 << rng.IntN(3), service: 0.0005 * float64(1+rng.IntN(20))}
		left := 0.9 * b.capacity()
		for range 2 + rng.IntN(8) {
			s := Share{Weight: rng.IntN(101)}
			if rng.IntN(2) == 0 {
				s.Reservation = int64(rng.Float64() * left)
				left -= float64(s.Reservation)
			}
			cost := float64(1)
			if rng.IntN(3) == 0 {
				cost += rng.Float64() * 3
			}
			b.add(s, 4*b.slotN, cost)
		}
		for _, c := range b.classes {
			for range c.depthN {
				b.send(c)
			}
		}
		b.run(3)
		b.run(20)
		checkShares(t, b, 20)
	}
}

func checkShares(t *testing.T, b *bed, seconds float64) {
	t.Helper()
	total, level := 0.0, math.Inf(1)
	describe := ""
	for i, c := range b.classes {
		total += c.got
		describe += fmt.Sprintf("\n%d: %+v cost %.2f got %.1f/s", i, c.share, c.cost, c.got/seconds)
	}
	slack := 0.03*total/float64(len(b.classes)) + 10*float64(b.slotN)
	require.InEpsilon(t, b.capacity()*seconds, total, 0.02, "seed %d: the whole capacity is used%s", b.seed, describe)
	for _, c := range b.classes {
		reserved := float64(c.share.Reservation) * seconds
		require.Greater(t, c.got, reserved-slack, "seed %d: below its reservation%s", b.seed, describe)
		if c.got > reserved+2*slack { // served by weight: all of these are at one level
			level = min(level, c.got/c.share.weight())
		}
	}
	for _, c := range b.classes {
		if c.got > float64(c.share.Reservation)*seconds+2*slack {
			require.LessOrEqual(t, c.got, level*c.share.weight()+2*slack,
				"seed %d: above its share while another is below%s", b.seed, describe)
		} else {
			require.GreaterOrEqual(t, c.got, min(level, 1e18)*c.share.weight()-2*slack,
				"seed %d: below its share, at its reservation%s", b.seed, describe)
		}
		rate := c.got / seconds
		require.Less(t, c.oldest, 3*float64(c.depthN)*c.cost/rate+1, "seed %d: starved%s", b.seed, describe)
	}
}

// TestNobodyStarves: the least of all, beside the greatest with reservations of more than there is, still goes.
func TestNobodyStarves(t *testing.T) {
	t.Parallel()
	b := &bed{t: t, slotN: 8, service: 0.001}
	b.add(Share{Weight: 100, Reservation: 4000}, 64, 1)
	b.add(Share{Weight: 100, Reservation: 3000}, 64, 1)
	least := b.add(Share{Weight: 0}, 1, 1)
	for _, c := range b.classes {
		for range c.depthN {
			b.send(c)
		}
	}
	b.run(20)
	require.Greater(t, least.servedN, 60, "1000 a second are not reserved, and of those a 201st part is its")
	require.Less(t, least.oldest, 1.0)
}

// TestIdleIsNotSavedUp: a class that was idle for long comes back to its share, and does not take revenge; and
// one that had everything meanwhile is not punished for it.
func TestIdleIsNotSavedUp(t *testing.T) {
	t.Parallel()
	b := &bed{t: t, slotN: 8, service: 0.001}
	busy := b.add(Share{Weight: 50}, 32, 1)
	late := b.add(Share{Weight: 50, Reservation: 100}, 32, 1)
	for range busy.depthN {
		b.send(busy)
	}
	b.run(60)
	require.InEpsilon(t, b.capacity()*60, busy.got, 0.02, "alone, it has everything")
	for range late.depthN {
		b.send(late)
	}
	for range 5 {
		b.run(0.5)
		require.InEpsilon(t, b.capacity()/4, busy.got, 0.05)
		require.InEpsilon(t, b.capacity()/4, late.got, 0.05)
	}
}

// TestReservationIsNotHeldAgainstAClass: one that had more than its share for long, because that much is reserved,
// has its share when that becomes the larger of the two.
func TestReservationIsNotHeldAgainstAClass(t *testing.T) {
	t.Parallel()
	b := &bed{t: t, slotN: 8, service: 0.001}
	one := b.add(Share{Weight: 1, Reservation: 3000}, 32, 1)
	for range 9 {
		b.add(Share{Weight: 1}, 32, 1)
	}
	for _, c := range b.classes {
		for range c.depthN {
			b.send(c)
		}
	}
	b.run(60)
	require.InEpsilon(t, 3000*60, one.got, 0.02)
	for _, c := range b.classes[2:] {
		c.off = true
	}
	b.run(0.5)
	b.run(4)
	require.InEpsilon(t, 4000*4, one.got, 0.02, "half of everything")
}

// TestChangedShareCountsAtOnce changes weights and reservations under load.
func TestChangedShareCountsAtOnce(t *testing.T) {
	t.Parallel()
	b := &bed{t: t, slotN: 8, service: 0.001}
	one, two := b.add(Share{Weight: 10}, 64, 1), b.add(Share{Weight: 10}, 64, 1)
	for _, c := range b.classes {
		for range c.depthN {
			b.send(c)
		}
	}
	for _, step := range []struct {
		one, two Share
		want     float64 // of one, as part of the capacity
	}{
		{Share{Weight: 10}, Share{Weight: 10}, 0.5},
		{Share{Weight: 30}, Share{Weight: 10}, 0.75},
		{Share{Weight: 30}, Share{Weight: 10, Reservation: 6000}, 0.25},
		{Share{Weight: 1}, Share{Weight: 99}, 0.01},
		{Share{Weight: 1, Reservation: 4000}, Share{Weight: 99, Reservation: 1000}, 0.5},
		{Share{Weight: 10}, Share{Weight: 10}, 0.5},
	} {
		b.core.set(one.class, at(b.now), step.one)
		b.core.set(two.class, at(b.now), step.two)
		b.run(0.2)
		b.run(2)
		require.InDelta(t, step.want*b.capacity(), one.got/2, 0.02*b.capacity(), "%+v", step)
	}
}

// TestLimitTags: a class gets no more than its limit, others what that leaves, and next says when to look again.
func TestLimitTags(t *testing.T) {
	t.Parallel()
	b := &bed{t: t, slotN: 8, service: 0.001}
	limited, free := b.add(Share{Weight: 100, Limit: 500}, 32, 1), b.add(Share{Weight: 1}, 32, 1)
	for _, c := range b.classes {
		for range c.depthN {
			b.send(c)
		}
	}
	b.run(5)
	require.InEpsilon(t, 500*5, limited.got, 0.02)
	require.InEpsilon(t, 7500*5, free.got, 0.02)

	var m mclock
	c := m.add(Share{Limit: 10})
	for range 2 {
		m.enqueue(0, &waiter{class: c, cost: 1})
	}
	w, _ := m.next(0)
	require.NotNil(t, w)
	w, wait := m.next(0)
	require.Nil(t, w)
	require.Equal(t, 100*time.Millisecond, wait)
	w, _ = m.next(wait)
	require.NotNil(t, w)
	_, wait = m.next(wait)
	require.Negative(t, wait, "nobody waits")
}

// TestCancel takes requests out of every place of a queue.
func TestCancel(t *testing.T) {
	t.Parallel()
	for out := range 4 {
		var m mclock
		c := m.add(Share{})
		ws := make([]*waiter, 4)
		for i := range ws {
			ws[i] = &waiter{class: c, cost: 1}
			m.enqueue(0, ws[i])
		}
		require.True(t, m.cancel(ws[out]))
		extra := &waiter{class: c, cost: 1}
		m.enqueue(0, extra)
		for i, w := range slices.Concat(ws, []*waiter{extra}) {
			if i == out {
				continue
			}
			got, _ := m.next(0)
			require.Same(t, w, got, "without %d", out)
			require.False(t, m.cancel(w), "it was let go")
		}
		got, _ := m.next(0)
		require.Nil(t, got)
	}
}
