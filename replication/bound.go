package replication

import (
	"context"
	"reflect"
	"sync"
	"time"
)

const (
	// boundShare of IOTimeout is for how long calls share a bound, and so by how much the last of them has less.
	boundShare = 64
	// boundsN is how many callers' contexts are remembered: the write-back cache has one, each connection of a kernel
	// device or an NBD client another.
	boundsN = 4
)

// bounds hands out the contexts of a Volume's calls. Calls of one caller's context that begin within
// IOTimeout/boundShare share one: three contexts and a timer for each request were a twentieth of the CPU of random
// writes.
type bounds struct {
	life    context.Context // of the Volume; the cause of its end is that of all bounds
	timeout time.Duration

	mu   sync.Mutex
	some [boundsN]*bound
	next int // to be replaced
}

// bound is a context that some calls share.
type bound struct {
	ctx    context.Context
	cancel func()
	parent context.Context
	born   time.Time
	usersN int
	retire bool // no more users come
}

// enter returns the bound of a call with the caller's context ctx, which ends with ctx, with the Volume's life, or
// when IOTimeout has passed, less a share of it at most. The caller calls leave once.
func (s *bounds) enter(ctx context.Context) *bound {
	now := time.Now()
	if !reflect.TypeOf(ctx).Comparable() {
		b := s.make(ctx, now)
		b.usersN, b.retire = 1, true
		return b
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	at := s.next
	for i, b := range s.some {
		if b != nil && b.parent == ctx {
			if now.Sub(b.born) < s.timeout/boundShare {
				b.usersN++
				return b
			}
			at = i
			break
		}
	}
	if at == s.next {
		s.next = (s.next + 1) % boundsN
	}
	if old := s.some[at]; old != nil {
		s.retireLocked(old)
	}
	b := s.make(ctx, now)
	b.usersN = 1
	s.some[at] = b
	return b
}

func (s *bounds) make(parent context.Context, now time.Time) *bound {
	ctx, timedOut := context.WithTimeoutCause(parent, s.timeout, errIOTimeout)
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.life, func() { cancel(context.Cause(s.life)) })
	return &bound{
		ctx: ctx, parent: parent, born: now,
		cancel: func() {
			stop()
			cancel(nil)
			timedOut()
		},
	}
}

func (s *bounds) leave(b *bound) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.usersN--; b.usersN == 0 && b.retire {
		b.cancel()
	}
}

func (s *bounds) retireLocked(b *bound) {
	if b.retire = true; b.usersN == 0 {
		b.cancel()
	}
}

// close retires all. REQUIRES: no call begins any more.
func (s *bounds) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, b := range s.some {
		if b != nil {
			s.retireLocked(b)
			s.some[i] = nil
		}
	}
}
