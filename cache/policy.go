package cache

import (
	"fmt"
	"math/rand/v2"

	"github.com/trivet-csi/trivet"
)

// Eviction says which clean block makes room for another.
type Eviction string

// The policies. None of the well-kept libraries fits: they own keys and values and allocate for each, while here a
// policy only orders the slots of a fixed table.
const (
	LRU    Eviction = "lru"    // the one not used for longest; the default
	LFU    Eviction = "lfu"    // the one used least often, of a sample
	FIFO   Eviction = "fifo"   // the one kept for longest
	Random Eviction = "random" // any
)

// Evictions lists the policies.
func Evictions() []Eviction { return []Eviction{LRU, LFU, FIFO, Random} }

// policy orders the clean slots. It is told of each slot that becomes clean, is hit, or is clean no more.
type policy interface {
	add(slot int32)
	hit(slot int32)
	remove(slot int32)
	victim() int32 // does not remove it; none if there is no clean slot
}

// newPolicy returns ErrInvalid for an unknown name. "" = LRU.
func newPolicy(e Eviction, slotN int) (policy, error) {
	switch e {
	case LRU, "":
		return &queue{list: newList(slotN), renew: true}, nil
	case FIFO:
		return &queue{list: newList(slotN)}, nil
	case Random:
		return newSampler(slotN, false), nil
	case LFU:
		return newSampler(slotN, true), nil
	}
	return nil, fmt.Errorf("eviction %q: want one of %v: %w", e, Evictions(), trivet.ErrInvalid)
}

// queue is LRU (renew) and FIFO.
type queue struct {
	list  *list
	renew bool
}

func (q *queue) add(slot int32)    { q.list.pushBack(slot) }
func (q *queue) remove(slot int32) { q.list.remove(slot) }
func (q *queue) victim() int32     { return q.list.head }

func (q *queue) hit(slot int32) {
	if q.renew {
		q.list.remove(slot)
		q.list.pushBack(slot)
	}
}

const (
	// sampleN is how many slots LFU compares; Redis takes 5 of them, and 10 hardly differ from the true order
	// (https://redis.io/docs/latest/develop/reference/eviction/).
	sampleN = 8
	// ageEvery is after how many hits per slot all counts are halved, so that what was once hot goes.
	ageEvery = 8
)

// sampler is Random, and LFU by sampling.
type sampler struct {
	slots []int32 // the clean ones, in no order
	at    []int32 // by slot: its place in slots
	uses  []uint8 // by slot; nil: Random
	hitN  int
	rand  *rand.PCG
}

func newSampler(slotN int, counting bool) *sampler {
	s := &sampler{slots: make([]int32, 0, slotN), at: make([]int32, slotN), rand: rand.NewPCG(1, uint64(slotN))}
	if counting {
		s.uses = make([]uint8, slotN)
	}
	return s
}

func (s *sampler) add(slot int32) {
	s.at[slot] = int32(len(s.slots))
	s.slots = append(s.slots, slot)
	if s.uses != nil {
		s.uses[slot] = 1
	}
}

func (s *sampler) remove(slot int32) {
	last := s.slots[len(s.slots)-1]
	s.slots[s.at[slot]], s.at[last] = last, s.at[slot]
	s.slots = s.slots[:len(s.slots)-1]
}

func (s *sampler) hit(slot int32) {
	if s.uses == nil {
		return
	}
	if s.uses[slot] < 255 {
		s.uses[slot]++
	}
	if s.hitN++; s.hitN >= ageEvery*cap(s.slots) {
		s.hitN = 0
		for i := range s.uses {
			s.uses[i] /= 2
		}
	}
}

func (s *sampler) victim() int32 {
	if len(s.slots) == 0 {
		return none
	}
	pick := func() int32 { return s.slots[s.rand.Uint64()%uint64(len(s.slots))] }
	best := pick()
	if s.uses == nil {
		return best
	}
	for range sampleN - 1 {
		if c := pick(); s.uses[c] < s.uses[best] {
			best = c
		}
	}
	return best
}

// none is no slot.
const none = int32(-1)

// list is a doubly linked list of slots, without allocation.
type list struct {
	prev, next []int32
	head, tail int32
	n          int
}

func newList(slotN int) *list {
	return &list{prev: make([]int32, slotN), next: make([]int32, slotN), head: none, tail: none}
}

func (l *list) pushBack(s int32) { l.insertAfter(s, l.tail) }

// insertAfter puts s behind at; at = none: in front.
func (l *list) insertAfter(s, at int32) {
	next := l.head
	if at != none {
		next = l.next[at]
		l.next[at] = s
	} else {
		l.head = s
	}
	l.prev[s], l.next[s] = at, next
	if next != none {
		l.prev[next] = s
	} else {
		l.tail = s
	}
	l.n++
}

func (l *list) remove(s int32) {
	prev, next := l.prev[s], l.next[s]
	if prev != none {
		l.next[prev] = next
	} else {
		l.head = next
	}
	if next != none {
		l.prev[next] = prev
	} else {
		l.tail = prev
	}
	l.n--
}

// replace puts s in the place of old.
func (l *list) replace(old, s int32) {
	prev := l.prev[old]
	l.remove(old)
	l.insertAfter(s, prev)
}
