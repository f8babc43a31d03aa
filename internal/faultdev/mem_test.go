package faultdev_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/faultdev"
	"github.com/trivet-csi/trivet/internal/faultdev/devtest"
)

func TestMemConforms(t *testing.T) {
	t.Parallel()
	devtest.TestDevice(t, faultdev.NewMem(8<<20))
}

func TestTouchedMemConforms(t *testing.T) {
	t.Parallel()
	m := faultdev.NewMem(1 << 20)
	m.Touch()
	devtest.TestDevice(t, m)
}

func TestWrapperConforms(t *testing.T) {
	t.Parallel()
	devtest.TestDevice(t, faultdev.Wrap(faultdev.NewMem(8<<20)))
}

func TestMemZeroesVastRangesCheaply(t *testing.T) {
	t.Parallel()
	m := faultdev.NewMem(trivet.VolumeSizeMax)
	p := make([]byte, trivet.BlockSize)
	p[0] = 1
	require.NoError(t, m.WriteAt(t.Context(), p, 1<<40))
	require.NoError(t, m.Discard(t.Context(), 0, trivet.VolumeSizeMax))
	require.NoError(t, m.ReadAt(t.Context(), p, 1<<40))
	require.Zero(t, p[0])
}

func TestMemGrows(t *testing.T) {
	t.Parallel()
	m := faultdev.NewMem(trivet.BlockSize)
	p := make([]byte, trivet.BlockSize)
	require.ErrorIs(t, m.WriteAt(t.Context(), p, trivet.BlockSize), trivet.ErrOutOfRange)
	m.Grow(2 * trivet.BlockSize)
	require.NoError(t, m.WriteAt(t.Context(), p, trivet.BlockSize))
	m.Grow(trivet.BlockSize)
	require.EqualValues(t, 2*trivet.BlockSize, m.Size(), "a device never shrinks")
}

func TestFailNth(t *testing.T) {
	t.Parallel()
	boom := errors.New("boom")
	mem := faultdev.NewMem(1 << 20)
	d := faultdev.Wrap(mem)
	d.FailNth(faultdev.Write, 2, boom)
	p := make([]byte, trivet.BlockSize)
	p[0] = 9
	require.NoError(t, d.WriteAt(t.Context(), p, 0))
	require.NoError(t, d.ReadAt(t.Context(), p, 0), "reads do not count")
	require.ErrorIs(t, d.WriteAt(t.Context(), p, 2*trivet.BlockSize), boom)
	require.NoError(t, d.WriteAt(t.Context(), p, 0))
	require.NoError(t, mem.ReadAt(t.Context(), p, 2*trivet.BlockSize))
	require.Zero(t, p[0], "a failed write has no effect")
}

func TestFailAfterEffectAndHeal(t *testing.T) {
	t.Parallel()
	mem := faultdev.NewMem(1 << 20)
	d := faultdev.Wrap(mem)
	d.Inject(faultdev.Fault{
		Match: faultdev.Touches(trivet.BlockSize, 1), Err: trivet.ErrUnavailable, After: true,
	})
	p := make([]byte, trivet.BlockSize)
	p[0] = 9
	require.NoError(t, d.WriteAt(t.Context(), p, 0))
	require.ErrorIs(t, d.WriteAt(t.Context(), p, trivet.BlockSize), trivet.ErrUnavailable)
	require.ErrorIs(t, d.WriteAt(t.Context(), p, trivet.BlockSize), trivet.ErrUnavailable, "for ever")
	require.NoError(t, d.Flush(t.Context()))
	clear(p)
	require.NoError(t, mem.ReadAt(t.Context(), p, trivet.BlockSize))
	require.EqualValues(t, 9, p[0], "the effect came before the error")
	d.Heal()
	require.NoError(t, d.ReadAt(t.Context(), p, trivet.BlockSize))
	require.Equal(t, 3, d.Count(faultdev.Write))
	require.Equal(t, faultdev.Op{Seq: 4, Kind: faultdev.Flush}, d.Ops()[3])
}

func TestGate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := faultdev.Wrap(faultdev.NewMem(1 << 20))
		g := d.Hold(faultdev.OfKind(faultdev.Flush))
		done := make(chan error, 3)
		for range 2 {
			go func() { done <- d.Flush(t.Context()) }()
			require.Equal(t, faultdev.Flush, (<-g.Arrived()).Kind)
		}
		require.NoError(t, d.ReadAt(t.Context(), make([]byte, trivet.BlockSize), 0), "others pass")
		synctest.Wait()
		require.Empty(t, done)
		g.Step()
		synctest.Wait()
		require.Len(t, done, 1)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { done <- d.Flush(ctx) }()
		synctest.Wait()
		cancel()
		synctest.Wait()
		require.Len(t, done, 2)
		g.Open()
		synctest.Wait()
		require.Len(t, done, 3)
		require.NoError(t, <-done)
		require.ErrorIs(t, <-done, context.Canceled)
		require.NoError(t, <-done)
		require.NoError(t, d.Flush(t.Context()), "an open gate stays open")
	})
}
