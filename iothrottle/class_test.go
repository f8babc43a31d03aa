package iothrottle_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/iothrottle"
)

// ask keeps n requests of 4 KiB of a class on a storage until stop.
func ask(t *testing.T, c *iothrottle.Class, d *disk, n int) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			for ctx.Err() == nil && c.Acquire(ctx, 4096) == nil {
				began := time.Now()
				_ = d.do(ctx)
				c.Release(4096, time.Since(began))
			}
		})
	}
	return func() { cancel(); wg.Wait() }
}

// TestDiskKeepsSomethingForTheBackground: beside volumes that want all of a slow disk, background work gets its
// reservation and no more; alone it gets everything.
func TestDiskKeepsSomethingForTheBackground(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := iothrottle.NewDiskScheduler()
		on := &storage{slots: make(chan struct{}, 8)}
		on.service.Store(int64(4 * time.Millisecond)) // 2000 a second
		a, b, background := &disk{on: on}, &disk{on: on}, &disk{on: on}
		ca := s.Class(iothrottle.Share{Weight: 100}, nil)
		m := &meter{}
		cb := s.Class(iothrottle.Share{Weight: 50}, m)
		stopA, stopB := ask(t, ca, a, 256), ask(t, cb, b, 256)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				for ctx.Err() == nil {
					release, err := s.Background(ctx, 64<<10)
					if err != nil {
						return
					}
					_ = background.do(ctx)
					release()
				}
			})
		}
		during(5 * time.Second)
		got := during(20*time.Second, a, b, background)
		assert.InEpsilon(t, 32*20, got[2], 0.05, "by weight alone it would be 13 a second: %v", got)
		assert.InEpsilon(t, 2, float64(got[0])/float64(got[1]), 0.05, "%v", got)
		assert.InEpsilon(t, 2000*20, got[0]+got[1]+got[2], 0.02, "work-conserving: %v", got)
		assert.Positive(t, m.held.Load(), "the wait is measured")

		cb.SetShare(iothrottle.Share{Weight: 100})
		require.Equal(t, iothrottle.Share{Weight: 100}, cb.Share())
		during(time.Second)
		got = during(10*time.Second, a, b)
		assert.InEpsilon(t, 1, float64(got[0])/float64(got[1]), 0.05, "changed live: %v", got)
		stopA()
		stopB()
		ca.Close()
		cb.Close()
		got = during(10*time.Second, background)
		assert.InEpsilon(t, 20_000, got[0], 0.05, "alone it has it all")
		cancel()
		wg.Wait()
		assert.Zero(t, s.Stats().Inside)
		assert.Zero(t, s.Stats().WaitingN)
	})
}

func TestClassAllocatesNothing(t *testing.T) {
	c := iothrottle.NewDiskScheduler().Class(iothrottle.Share{Weight: 1}, nil)
	ctx := t.Context()
	require.Zero(t, testing.AllocsPerRun(1000, func() {
		_ = c.Acquire(ctx, 4096)
		c.Release(4096, time.Microsecond)
	}))
}

func BenchmarkClass(b *testing.B) {
	c := iothrottle.NewDiskScheduler().Class(iothrottle.Share{Weight: 1}, nil)
	ctx := b.Context()
	b.ReportAllocs()
	for b.Loop() {
		_ = c.Acquire(ctx, 4096)
		c.Release(4096, time.Microsecond)
	}
}
