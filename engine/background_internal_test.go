package engine

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// TestCleaningWaitsForItsTurn: the background copies nothing before it is its turn, and each copy ends with the
// release; when the disk runs full nothing is waited for.
func TestCleaningWaitsForItsTurn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cfg := logConfig(t, vfs.NewMem(), nil)
		var asked, inside atomic.Int64
		errNo := errors.New("not now")
		turn := make(chan error)
		cfg.Background = func(ctx context.Context, bytes int) (func(), error) {
			asked.Add(int64(bytes))
			select {
			case err := <-turn:
				if err != nil {
					return nil, err
				}
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			inside.Add(1)
			return func() { inside.Add(-1) }, nil
		}
		e, v := mustStore(t, cfg, 256)
		defer func() { require.NoError(t, e.Close()) }()
		fragment := func(x uint32) {
			write(t, v, x, 0, 256)
			for lba := trivet.LBA(0); lba < 256; lba += 2 {
				write(t, v, x+1, lba, 1)
			}
			settle(t, v)
		}
		fragment(1)
		e.clean.target = 0.9
		round := func() (CleanStats, error) { return e.clean.round(t.Context(), true) }

		done := make(chan struct{})
		go func() {
			defer close(done)
			stats, err := round()
			assert.ErrorIs(t, err, errNo)
			assert.Zero(t, stats.CopiedBytes)
		}()
		synctest.Wait()
		require.Positive(t, asked.Load())
		turn <- errNo
		<-done

		asked.Store(0)
		stop := make(chan struct{})
		go func() {
			for {
				select {
				case turn <- nil:
				case <-stop:
					return
				}
			}
		}()
		stats, err := round()
		require.NoError(t, err)
		require.Positive(t, stats.CopiedBytes)
		require.GreaterOrEqual(t, asked.Load(), stats.CopiedBytes, "what is copied was asked for")
		require.Zero(t, inside.Load())
		close(stop)
		synctest.Wait()

		fragment(3)
		asked.Store(0)
		e.clean.pressure.Store(true)
		stats, err = round()
		require.NoError(t, err)
		require.Positive(t, stats.CopiedBytes)
		require.Zero(t, asked.Load(), "there is a hurry")
	})
}
