package iothrottle_test

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/faultdev"
	"github.com/trivet-csi/trivet/internal/faultdev/devtest"
	"github.com/trivet-csi/trivet/iothrottle"
)

// storage is what several devices share: slotN requests at a time, each for service. Others wait in a queue
// that knows no shares, as that of a disk does.
type storage struct {
	slots   chan struct{}
	service atomic.Int64 // ns
	inside  atomic.Int64 // in the queue and in the slots
	most    atomic.Int64
}

// disk is a volume on a storage, which only counts.
type disk struct {
	trivet.Device
	on   *storage
	got  atomic.Int64
	slow atomic.Int64 // extra, ns
}

func (d *disk) do(ctx context.Context) error {
	n := d.on.inside.Add(1)
	defer d.on.inside.Add(-1)
	for most := d.on.most.Load(); n > most && !d.on.most.CompareAndSwap(most, n); most = d.on.most.Load() {
	}
	select {
	case d.on.slots <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	time.Sleep(time.Duration(d.on.service.Load() + d.slow.Load()))
	<-d.on.slots
	d.got.Add(1)
	return nil
}

func (d *disk) WriteAt(ctx context.Context, _ []byte, _ int64) error { return d.do(ctx) }
func (d *disk) ReadAt(ctx context.Context, _ []byte, _ int64) error  { return d.do(ctx) }
func (d *disk) Flush(context.Context) error                          { return nil }

func TestSchedulerConforms(t *testing.T) {
	t.Parallel()
	s := iothrottle.NewScheduler()
	d := s.Device(faultdev.NewMem(8<<20), iothrottle.Share{Weight: 50}, nil)
	devtest.Run(t, d, devtest.Options{OpsN: 200})
	d.Close()
	assert.Equal(t, 0, s.Stats().WaitingN)
	assert.Zero(t, s.Stats().Inside)
}

// rig is a Scheduler over a storage of 8 slots and 1 ms, in a bubble.
type rig struct {
	s       *iothrottle.Scheduler
	storage *storage
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{iothrottle.NewScheduler(), &storage{slots: make(chan struct{}, 8)}}
	r.storage.service.Store(int64(time.Millisecond))
	return r
}

func (r *rig) volume(share iothrottle.Share) (*iothrottle.Scheduled, *disk) {
	d := &disk{on: r.storage}
	return r.s.Device(d, share, nil), d
}

// during returns what each disk did in the time.
func during(d time.Duration, disks ...*disk) []int64 {
	before := make([]int64, len(disks))
	for i, x := range disks {
		before[i] = x.got.Load()
	}
	time.Sleep(d)
	synctest.Wait()
	for i, x := range disks {
		before[i] = x.got.Load() - before[i]
	}
	return before
}

// TestSchedulerDividesWhatThereIs: volumes that want more than there is get it by weight and reservation,
// background work gets one part, and nothing is lost of the 8000 a second that the storage can do.
func TestSchedulerDividesWhatThereIs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		va, a := r.volume(iothrottle.Share{Weight: 20})
		vb, b := r.volume(iothrottle.Share{Weight: 60})
		vc, c := r.volume(iothrottle.Share{Weight: 1, Reservation: 2000})
		var stops []func()
		for _, v := range []trivet.Device{va, vb, vc} {
			stops = append(stops, load(t, v, 128, 4096))
		}
		ctx, cancel := context.WithCancel(t.Context())
		background := &disk{on: r.storage}
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() {
				for {
					release, err := r.s.Background(ctx, 4096)
					if err != nil {
						return
					}
					_ = background.do(ctx)
					release()
				}
			})
		}
		during(5 * time.Second)
		got := during(10*time.Second, a, b, c, background)
		assert.InEpsilon(t, 20_000, got[2], 0.05, "reserved: %v", got)
		assert.InEpsilon(t, 60_000*20/81, got[0], 0.05, "%v", got)
		assert.InEpsilon(t, 60_000*60/81, got[1], 0.05, "%v", got)
		assert.InEpsilon(t, 60_000/81, got[3], 0.2, "background yields, but is not starved: %v", got)
		assert.InEpsilon(t, 80_000, got[0]+got[1]+got[2]+got[3], 0.02, "work-conserving: %v", got)
		st := r.s.Stats()
		assert.InEpsilon(t, 8000, st.Capacity, 0.1)
		assert.Less(t, st.Window, 256.0, "the queue below stays short")

		vc.SetShare(iothrottle.Share{Weight: 80})
		require.Equal(t, 80, vc.Share().Weight)
		during(time.Second)
		got = during(10*time.Second, a, b, c)
		assert.InEpsilon(t, 80_000*80/161, got[2], 0.05, "changed live: %v", got)
		stops[0]()
		stops[1]()
		cancel()
		wg.Wait()
		got = during(time.Second, c)
		assert.InEpsilon(t, 8000, got[0], 0.03, "what others leave")
		stops[2]()
		assert.Zero(t, r.s.Stats().Inside)
		assert.Zero(t, r.s.Stats().WaitingN)
	})
}

// TestAloneIsNeverHeldBack: more than the window is let through when nobody else is there.
func TestAloneIsNeverHeldBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		v, _ := r.volume(iothrottle.Share{Weight: 1})
		stop := load(t, v, 2000, 4096)
		during(time.Second)
		require.EqualValues(t, 2000, r.storage.most.Load())
		stop()
	})
}

// TestFlushPassesTheScheduler while all else waits.
func TestFlushPassesTheScheduler(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.storage.service.Store(int64(time.Hour))
		va, _ := r.volume(iothrottle.Share{})
		vb, _ := r.volume(iothrottle.Share{})
		stopA, stopB := load(t, va, 200, 4096), load(t, vb, 200, 4096)
		synctest.Wait()
		require.Positive(t, r.s.Stats().WaitingN)
		require.NoError(t, vb.Flush(t.Context()))
		stopA()
		stopB()
	})
}

// TestGivingUpAWait: a request whose context ends leaves the queue, is not sent, and its place goes to others.
func TestGivingUpAWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		m := &meter{}
		va, _ := r.volume(iothrottle.Share{})
		b := &disk{on: r.storage}
		vb := r.s.Device(b, iothrottle.Share{}, m)
		r.storage.service.Store(int64(10 * time.Second))
		stop := load(t, va, 8, 4096) // every slot is taken, and b is not alone
		synctest.Wait()
		var wg sync.WaitGroup
		for range 500 {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				assert.ErrorIs(t, vb.WriteAt(ctx, make([]byte, 4096), 0), context.DeadlineExceeded)
			})
		}
		synctest.Wait()
		waiting := r.s.Stats().WaitingN
		require.Positive(t, waiting)
		wg.Wait()
		require.Zero(t, r.s.Stats().WaitingN)
		require.EqualValues(t, 500, m.left.Load())
		require.Equal(t, time.Duration(waiting)*time.Second, time.Duration(m.held.Load()), "what the meter is told")
		require.Zero(t, b.got.Load())
		r.storage.service.Store(int64(time.Millisecond))
		stop()
		require.NoError(t, vb.WriteAt(t.Context(), make([]byte, 4096), 0))
		require.Zero(t, r.s.Stats().Inside, "every place was given back")
	})
}

// TestClosedWithRequestsWaiting: they are served all the same, and then the volume is out.
func TestClosedWithRequestsWaiting(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		va, _ := r.volume(iothrottle.Share{Weight: 1})
		vb, b := r.volume(iothrottle.Share{Weight: 1})
		stop := load(t, va, 200, 4096)
		synctest.Wait()
		var wg sync.WaitGroup
		for range 200 {
			wg.Go(func() { assert.NoError(t, vb.WriteAt(t.Context(), make([]byte, 4096), 0)) })
		}
		synctest.Wait()
		require.Positive(t, r.s.Stats().WaitingN)
		vb.Close()
		wg.Wait()
		assert.EqualValues(t, 200, b.got.Load())
		stop()
		va.Close()
		assert.Zero(t, r.s.Stats().Inside)
	})
}

// TestLargeRequestsCountForMore: with equal weights, a volume of 1 MiB requests gets a sixteenth of the requests.
func TestLargeRequestsCountForMore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		va, a := r.volume(iothrottle.Share{Weight: 10})
		vb, b := r.volume(iothrottle.Share{Weight: 10})
		b.slow.Store(int64(15 * time.Millisecond)) // as a storage would be with 16 times the data
		stopA, stopB := load(t, va, 256, 4096), load(t, vb, 256, 1<<20)
		during(5 * time.Second)
		got := during(20*time.Second, a, b)
		assert.InEpsilon(t, 16, float64(got[0])/float64(got[1]), 0.1, "%v", got)
		stopA()
		stopB()
	})
}

func TestSchedulingAllocatesNothing(t *testing.T) {
	s := iothrottle.NewScheduler()
	d := s.Device(&sink{}, iothrottle.Share{Weight: 1}, nil)
	p, ctx := make([]byte, 4096), t.Context()
	assert.Zero(t, testing.AllocsPerRun(1000, func() { _ = d.WriteAt(ctx, p, 0) }))
}

func BenchmarkScheduled(b *testing.B) {
	s := iothrottle.NewScheduler()
	d := s.Device(&sink{}, iothrottle.Share{Weight: 1}, nil)
	p, ctx := make([]byte, 4096), b.Context()
	b.ReportAllocs()
	for b.Loop() {
		_ = d.WriteAt(ctx, p, 0)
	}
}
