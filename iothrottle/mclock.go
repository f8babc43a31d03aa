package iothrottle

import (
	"math"
	"time"
)

// Share is what a volume may have beside the others of a Scheduler.
type Share struct {
	// Reservation is how many requests per second the volume gets whatever the others want, as far as the
	// storage can do that many for all who have one. 0 = none.
	Reservation int64
	// Weight says in what proportion what is left goes to those who want it; less than 1 counts as 1.
	Weight int
	// Limit is how many requests per second the volume gets at most. 0 = none. (A Throttle above is more exact
	// over short times, and knows bytes; this is the tag of the algorithm.)
	Limit int64
}

// mclock decides whose request goes next: mClock, after Gulati, Merchant and Varman, "mClock: Handling
// Throughput Variability for Hypervisor IO Scheduling", OSDI 2010, algorithm 1. Each class has three tags, which
// say when its next request is due by its reservation (R), how far its share has been served (P), and when it
// may go by its limit (L). As long as a class is behind its reservation, the smallest R goes; else, among those
// within their limit, the smallest P, and what is served by weight is not charged to the reservation.
//
// Two things differ from the paper. A tag is made when a request becomes the first of its class, not when it
// arrives, so that a changed Share counts at once; with a queue of one class that is the same. And P tags are
// those of start-time fair queueing (Goyal, Vin and Cheng 1996; for many requests at a time: Jin, Chase and Kaur
// 2004): a class that was idle begins where the others are, at the P of what was served last, instead of
// shifting the tags of all others to the clock.
//
// It is pure: time comes in as a duration since any instant, and it must not run back.
type mclock struct {
	classes []*class
	virtual float64 // P of what was served last
}

// class is a volume, or background work.
type class struct {
	share Share

	first, last *waiter // first come, first served
	inside      int     // let go and not finished; the Scheduler counts
	closed      bool    // to be removed when it has nothing to do; the Scheduler does

	reserved float64 // s: R of the request after the last that was served by reservation
	served   float64 // P of the next request, before max
	limited  float64 // s: L of the next request, before max
}

// waiter is a request that waits.
type waiter struct {
	class *class
	cost  float64       // in requests
	came  float64       // s
	gone  bool          // was let go
	next  *waiter       // behind it in its class
	turn  chan struct{} // of capacity 1: gets a token when the request is let go while somebody waits
}

// leadMax bounds by how many requests a class can be ahead of its share because its reservation is larger. Without
// it, one that was for long would get nothing beyond its reservation for as long again, when others leave and
// its share has become the larger of the two.
const leadMax = 256

func (s Share) weight() float64 { return float64(max(s.Weight, 1)) }

// add adds a class.
func (m *mclock) add(s Share) *class {
	c := &class{share: s}
	m.classes = append(m.classes, c)
	return c
}

// remove takes a class out. REQUIRES: its queue is empty.
func (m *mclock) remove(c *class) {
	for i, x := range m.classes {
		if x == c {
			m.classes = append(m.classes[:i], m.classes[i+1:]...)
			return
		}
	}
}

// set changes the share of a class from its next request on. What a larger reservation would have given in the
// past is not made up for, and what a smaller limit would have held back in the future is not waited for.
func (m *mclock) set(c *class, now time.Duration, s Share) {
	if c.share.Reservation == 0 {
		c.reserved = now.Seconds()
	}
	c.share = s
	c.reserved = min(c.reserved, now.Seconds()+perUnit(s.Reservation))
	c.limited = min(c.limited, now.Seconds()+perUnit(s.Limit))
	c.served = min(c.served, m.virtual) // what it got by the old share is not held against it
}

func perUnit(perSecond int64) float64 {
	if perSecond <= 0 {
		return math.Inf(1)
	}
	return 1 / float64(perSecond)
}

// enqueue puts a request at the end of its class.
func (m *mclock) enqueue(now time.Duration, w *waiter) {
	c := w.class
	w.came, w.next, w.gone = now.Seconds(), nil, false
	if c.first == nil {
		c.first = w
	} else {
		c.last.next = w
	}
	c.last = w
}

// cancel takes a request out again. It reports false when it was let go already.
func (m *mclock) cancel(w *waiter) bool {
	if w.gone {
		return false
	}
	c, at, before := w.class, &w.class.first, (*waiter)(nil)
	for *at != w {
		before, at = *at, &(*at).next
	}
	*at = w.next
	if c.last == w {
		c.last = before
	}
	return true
}

// tags returns R, P and L of the first request of a class.
func (c *class) tags(virtual float64) (r, p, l float64) {
	came := c.first.came
	r, p = math.Inf(1), max(c.served, virtual)
	if c.share.Reservation > 0 {
		r = max(c.reserved, came)
	}
	if c.share.Limit > 0 {
		l = max(c.limited, came)
	}
	return r, p, l
}

// next takes the request that goes next. Without one it returns how long until a limit lets one go, or a negative
// duration when nobody waits.
func (m *mclock) next(now time.Duration) (*waiter, time.Duration) {
	at := now.Seconds()
	var due, fair *class
	dueTag, fairTag, earliest := math.Inf(1), math.Inf(1), math.Inf(1)
	for _, c := range m.classes {
		if c.first == nil {
			continue
		}
		r, p, l := c.tags(m.virtual)
		if r <= at && r < dueTag {
			due, dueTag = c, r
		}
		switch {
		case l > at:
			earliest = min(earliest, l, max(r, at))
		case p < fairTag:
			fair, fairTag = c, p
		}
	}
	switch {
	case due != nil:
		return m.serve(due, true), 0
	case fair != nil:
		return m.serve(fair, false), 0
	case math.IsInf(earliest, 1):
		return nil, -1
	}
	return nil, max(time.Duration(math.Ceil((earliest-at)*float64(time.Second))), 1)
}

// serve takes the first request of a class and moves the tags on.
func (m *mclock) serve(c *class, byReservation bool) *waiter {
	w := c.first
	r, p, l := c.tags(m.virtual)
	c.served = p + w.cost/c.share.weight()
	if byReservation {
		c.reserved = r + w.cost/float64(c.share.Reservation)
		c.served = min(c.served, max(p, m.virtual+leadMax/c.share.weight()))
	} else {
		m.virtual = max(m.virtual, p)
	}
	if c.share.Limit > 0 {
		c.limited = l + w.cost/float64(c.share.Limit)
	}
	if c.first = w.next; c.first == nil {
		c.last = nil
	}
	w.gone, w.next = true, nil
	return w
}
