package kube_test

import (
	"context"
	"errors"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	coordinationv1 "k8s.io/api/coordination/v1"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/kube"
)

// leases is one Lease, with the checks that an API server makes.
type leases struct {
	mu      sync.Mutex
	lease   *coordinationv1.Lease
	version int
}

func (l *leases) Lease(context.Context, string) (*coordinationv1.Lease, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lease == nil {
		return nil, trivet.ErrNotFound
	}
	return l.lease.DeepCopy(), nil
}

func (l *leases) CreateLease(_ context.Context, n *coordinationv1.Lease) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lease != nil {
		return trivet.ErrExists
	}
	l.store(n)
	return nil
}

func (l *leases) UpdateLease(_ context.Context, n *coordinationv1.Lease) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n.ResourceVersion != l.lease.ResourceVersion {
		return trivet.ErrPending
	}
	l.store(n)
	return nil
}

func (l *leases) store(n *coordinationv1.Lease) {
	l.version++
	l.lease = n.DeepCopy()
	l.lease.ResourceVersion = strconv.Itoa(l.version)
}

// cut is the way of one process to the API server, which may be cut off.
type cut struct {
	*leases

	mu  sync.Mutex
	off bool
}

func (c *cut) set(off bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.off = off
}

func (c *cut) err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.off {
		return trivet.ErrUnavailable
	}
	return nil
}

func (c *cut) Lease(ctx context.Context, name string) (*coordinationv1.Lease, error) {
	if err := c.err(); err != nil {
		return nil, err
	}
	return c.leases.Lease(ctx, name)
}

func (c *cut) CreateLease(ctx context.Context, n *coordinationv1.Lease) error {
	return errors.Join(c.err(), c.leases.CreateLease(ctx, n))
}

func (c *cut) UpdateLease(ctx context.Context, n *coordinationv1.Lease) error {
	if err := c.err(); err != nil {
		return err
	}
	return c.leases.UpdateLease(ctx, n)
}

// TestElector: of two processes one leads, never both; the other takes over when the first is cut off, within the
// Lease and two rounds, and at once when it ends in good order.
func TestElector(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		shared := &leases{}
		first, second := &cut{leases: shared}, &cut{leases: shared}
		a := kube.NewElector(first, "l", "a", nil)
		b := kube.NewElector(second, "l", "b", nil)
		ctxA, endA := context.WithCancel(t.Context())
		ctxB, endB := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		defer wg.Wait()
		defer endB()
		defer endA()
		wg.Go(func() { a.Run(ctxA) })
		synctest.Wait()
		require.True(t, a.Leads())
		wg.Go(func() { b.Run(ctxB) })
		// pass lets time go by, looking all the time, and returns how long it took until b leads.
		pass := func(length time.Duration) (took time.Duration) {
			took = -1
			for at := time.Duration(0); at < length; at += 50 * time.Millisecond {
				<-time.After(50 * time.Millisecond)
				require.False(t, a.Leads() && b.Leads(), "two lead")
				if took < 0 && b.Leads() {
					took = at
				}
			}
			return took
		}
		assert.Negative(t, pass(time.Minute), "a leads as long as it can")
		require.True(t, a.Leads())

		first.set(true)
		took := pass(20 * time.Second)
		assert.Greater(t, took, 6*time.Second)
		assert.Less(t, took, 15*time.Second)
		assert.False(t, a.Leads())
		first.set(false)
		assert.Zero(t, pass(time.Minute), "who leads goes on")

		endB()
		pass(5 * time.Second)
		assert.True(t, a.Leads(), "b gave it back")
	})
}
