package keeper

import (
	"errors"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

var testDevice = Device{Kind: KindUblk, Number: 7, Tag: 0xfedcba9876543210}

// fakeEnder notes what it is to end.
type fakeEnder struct {
	mu     sync.Mutex
	cannot error // for good
	fails  int   // so many times
	ended  []Device
}

func (f *fakeEnder) Available(DeviceKind) error { return f.cannot }

func (f *fakeEnder) End(d Device) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = append(f.ended, d)
	if f.fails > 0 {
		f.fails--
		return errors.New("not now")
	}
	return nil
}

func (f *fakeEnder) all() []Device {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]Device(nil), f.ended...)
}

// TestDeviceIsWatched: over the socket, with the death of the server and of the keeper.
func TestDeviceIsWatched(t *testing.T) {
	t.Parallel()
	socket, ender := filepath.Join(t.TempDir(), "keeper", "sock"), &fakeEnder{}
	first := startWith(t, Config{Socket: socket, Watchdog: time.Hour, Ender: ender})
	c, other := first.client(t), first.client(t)
	require.NoError(t, c.Watch("vol-1", testDevice))
	require.NoError(t, c.Watch("vol-1", testDevice), "again is harmless")
	require.True(t, c.Holds("vol-1"))
	require.ErrorIs(t, other.Watch("vol-1", testDevice), trivet.ErrInUse)
	_, _, err := other.Take("vol-1")
	require.ErrorIs(t, err, trivet.ErrNotFound, "there is no connection")
	wait, err := other.Watchdog()
	require.NoError(t, err)
	require.Equal(t, time.Hour, wait)
	entries, err := other.List()
	require.NoError(t, err)
	want := Entry{Name: "vol-1", Facts: testDevice.facts(), Device: true, Claimed: true, Served: true}
	require.Equal(t, []Entry{want}, entries)
	require.Equal(t, testDevice, deviceOf(entries[0].Facts))

	first.stop()
	second := startWith(t, Config{Socket: socket, Watchdog: time.Millisecond, Ender: ender})
	require.Eventually(t, func() bool { return len(second.list()) == 1 }, time.Minute, time.Millisecond)
	require.Empty(t, ender.all(), "served")
	c.Close() // as a death does
	require.Eventually(t, func() bool { return len(second.list()) == 0 }, time.Minute, time.Millisecond)
	require.Equal(t, []Device{testDevice}, ender.all())
}

// TestDeviceWatchdog counts time without a server, and tries again what fails.
func TestDeviceWatchdog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ender := &fakeEnder{fails: 2}
		k := &Keeper{
			watchdog: 10 * time.Minute, log: newTestLog(t), entries: map[string]*entry{}, sessions: map[*session]struct{}{},
			ender: ender,
		}
		pass := func(d time.Duration) {
			<-time.After(d)
			synctest.Wait()
		}
		serve := func(s *session) {
			require.NoError(t, k.watch(s, &message{name: "vol-1", facts: testDevice.facts()}))
		}
		one := &session{}
		serve(one)
		pass(time.Hour)
		require.NoError(t, k.release(one, "vol-1"))
		pass(9 * time.Minute)
		serve(one)
		pass(time.Hour)
		require.Empty(t, ender.all(), "served again in time")
		require.NoError(t, k.release(one, "vol-1"))
		pass(10 * time.Minute)
		require.Len(t, ender.all(), 1)
		require.Len(t, k.list(), 1, "it failed")
		pass(2 * endRetry)
		require.Equal(t, []Device{testDevice, testDevice, testDevice}, ender.all())
		require.Empty(t, k.list())

		ender.fails = 1
		serve(one)
		require.NoError(t, k.release(one, "vol-1"))
		pass(10 * time.Minute)
		serve(one)
		pass(time.Hour)
		require.Len(t, ender.all(), 4, "a server came back before it was tried again")
		require.NoError(t, k.drop(one, "vol-1", false))
		require.Empty(t, k.list())
		pass(time.Hour)
		require.Len(t, ender.all(), 4)
	})
}

// TestDeviceIsRefused by a keeper that could not end one: the server shall say so, and not learn it years later.
func TestDeviceIsRefused(t *testing.T) {
	t.Parallel()
	require.ErrorIs(t, start(t).client(t).Watch("vol-1", testDevice), trivet.ErrUnavailable)
	socket := filepath.Join(t.TempDir(), "keeper", "sock")
	r := startWith(t, Config{Socket: socket, Ender: &fakeEnder{cannot: errors.New("no driver")}})
	require.ErrorIs(t, r.client(t).Watch("vol-1", testDevice), trivet.ErrUnavailable)
	require.Empty(t, r.list())
	wait, err := r.client(t).Watchdog()
	require.NoError(t, err)
	require.Equal(t, DefaultWatchdog, wait)
}
