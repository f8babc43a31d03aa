package iothrottle

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestBucketHoldsTheRate drives a bucket with random costs and arrivals and checks the two
// promises of a token bucket over every run: never more than rate·time + one bucket + one
// request, and, while someone waits, never less than rate·time − one request.
func TestBucketHoldsTheRate(t *testing.T) {
	t.Parallel()
	for seed := range uint64(50) {
		rng := rand.New(rand.NewPCG(seed, 0))
		rate := int64(1) << rng.IntN(31)
		costMax := 1 + rng.Int64N(2*rate)
		var b bucket
		b.setRate(0, rate, 0)
		now, spent := time.Duration(0), 0.0
		for range 500 {
			cost := float64(1 + rng.Int64N(costMax))
			if w := b.wait(now, cost); w > 0 {
				require.Positive(t, b.wait(now+w/2, cost), "seed %d: no need to wait the whole %s", seed, w)
				now += w
				require.Zero(t, b.wait(now, cost), "seed %d: the wait of %s was too short", seed, w)
			}
			b.take(cost)
			spent += cost
			limit := now.Seconds()*float64(rate) + b.depth + float64(costMax)
			require.LessOrEqual(t, spent, limit*(1+1e-6), "seed %d at %s", seed, now)
			require.GreaterOrEqual(t, spent*(1+1e-6), now.Seconds()*float64(rate)-b.depth, "seed %d at %s", seed, now)
		}
	}
}

func TestBucketDebtIsPaidAtTheNewRate(t *testing.T) {
	t.Parallel()
	var b bucket
	b.setRate(0, 1000, 0) // holds 100
	require.Zero(t, b.wait(0, 10_000), "a full bucket serves any request")
	b.take(10_000)
	require.Equal(t, 9901*time.Millisecond, b.wait(0, 1))
	b.setRate(0, 100_000, 0)
	require.Equal(t, 99_010*time.Microsecond, b.wait(0, 1))
	b.setRate(0, 0, 0)
	require.Zero(t, b.wait(0, 1<<40), "unlimited")
}

func TestBucketTinyRateNeverOverflows(t *testing.T) {
	t.Parallel()
	var b bucket
	b.setRate(0, 1, 0)
	b.take(1 << 60)
	require.Equal(t, waitMax, b.wait(0, 1))
	require.Equal(t, waitMax, b.wait(1<<62, 1))
}

func TestBucketTimeNeverRunsBack(t *testing.T) {
	t.Parallel()
	var b bucket
	b.setRate(0, 10, 0)
	b.take(1)
	before := b.wait(time.Second, 1)
	b.take(1)
	require.Zero(t, before)
	require.NotPanics(t, func() { b.wait(0, 1) })
	require.Equal(t, time.Second, b.at, "an earlier instant must not move the bucket")
}
