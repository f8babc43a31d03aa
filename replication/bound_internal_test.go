package replication

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// plain is a context that cannot be compared.
type plain struct {
	context.Context

	_ []int
}

// TestBounds: calls share a context, which ends for none of them late, nor much too early.
func TestBounds(t *testing.T) {
	t.Parallel()
	const timeout = 64 * time.Second
	begin := func(t *testing.T) (*bounds, context.CancelCauseFunc) {
		life, end := context.WithCancelCause(t.Context())
		return &bounds{life: life, timeout: timeout}, end
	}
	for name, test := range map[string]func(t *testing.T){
		"shared for a while, and each has nearly its time": func(t *testing.T) {
			s, _ := begin(t)
			first := s.enter(t.Context())
			time.Sleep(time.Second - 1)
			second := s.enter(t.Context())
			require.Same(t, first, second)
			time.Sleep(time.Nanosecond)
			third := s.enter(t.Context())
			require.NotSame(t, first, third)
			time.Sleep(timeout - time.Second - 1)
			require.NoError(t, second.ctx.Err())
			time.Sleep(time.Nanosecond)
			synctest.Wait()
			require.ErrorIs(t, context.Cause(first.ctx), errIOTimeout)
			require.NoError(t, third.ctx.Err())
			for _, b := range []*bound{first, second, third} {
				s.leave(b)
			}
			s.close()
		},
		"ended with its caller alone": func(t *testing.T) {
			s, _ := begin(t)
			one, cancel := context.WithCancel(t.Context())
			mine, other := s.enter(one), s.enter(t.Context())
			cancel()
			require.ErrorIs(t, mine.ctx.Err(), context.Canceled)
			require.NoError(t, other.ctx.Err())
			s.leave(mine)
			s.leave(other)
			s.close()
		},
		"ended with the volume, for its reason": func(t *testing.T) {
			s, end := begin(t)
			b := s.enter(t.Context())
			end(trivet.ErrFenced)
			synctest.Wait()
			require.ErrorIs(t, context.Cause(b.ctx), trivet.ErrFenced)
			s.leave(b)
			s.close()
		},
		"kept until the last has left": func(t *testing.T) {
			s, _ := begin(t)
			first := s.enter(t.Context())
			second := s.enter(t.Context())
			time.Sleep(2 * time.Second)
			next := s.enter(t.Context())
			s.leave(first)
			require.NoError(t, second.ctx.Err())
			s.leave(second)
			require.Error(t, second.ctx.Err(), "nothing of it is left")
			s.leave(next)
			require.NoError(t, next.ctx.Err(), "for those to come")
			s.close()
			require.Error(t, next.ctx.Err())
		},
		"for many callers": func(t *testing.T) {
			s, _ := begin(t)
			var all []*bound
			for range 3 * boundsN {
				ctx, cancel := context.WithCancelCause(t.Context())
				b := s.enter(ctx)
				require.NoError(t, b.ctx.Err())
				why := errors.New("why")
				defer func() {
					require.NoError(t, b.ctx.Err())
					cancel(why)
					require.ErrorIs(t, context.Cause(b.ctx), why)
					s.leave(b)
				}()
				all = append(all, b)
			}
			require.NotSame(t, all[0], s.enter(all[0].parent), "forgotten")
			last := all[len(all)-1]
			require.Same(t, last, s.enter(last.parent))
			s.leave(last)
		},
		"not shared where callers cannot be told apart": func(t *testing.T) {
			s, _ := begin(t)
			first := s.enter(plain{Context: t.Context()})
			second := s.enter(plain{Context: t.Context()})
			require.NotSame(t, first, second)
			s.leave(first)
			require.Error(t, first.ctx.Err())
			require.NoError(t, second.ctx.Err())
			s.leave(second)
		},
	} {
		t.Run(name, func(t *testing.T) { synctest.Test(t, test) })
	}
}
