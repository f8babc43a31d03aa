package blockdev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/faultdev"
)

// TestVMRelease lets a server go while a write waits in the Device, and another in the same process go
// on: the writer is not told of the cancelled request. It is what an upgrade does.
func TestVMRelease(t *testing.T) {
	eachKind(t, func(t *testing.T, kind Kind) {
		dev := makeShared(t, filepath.Join(t.TempDir(), "dev"), vmBytes, vmBytesMax)
		cfg := Config{Name: "vol", RunDir: t.TempDir(), Device: dev, Kind: kind}
		a, err := Attach(t.Context(), cfg)
		require.NoError(t, err)
		require.NoError(t, a.dev.survives())
		d, dir := a.dev, a.folder
		f := openBlock(t, d.path(), 0)
		data := pages(t, 1<<20, 1)
		for round := range 3 {
			data[0] = byte(round)
			dev.word(wordHold).Store(1)
			written := make(chan error, 1)
			go func() {
				_, err := f.WriteAt(data, 1<<20)
				written <- err
			}()
			require.Eventually(t, func() bool { return dev.count(wordHeld) > 0 }, time.Minute, time.Millisecond)
			require.NoError(t, d.release(t.Context()))
			dir.unlock()
			select {
			case err := <-written:
				t.Fatalf("round %d: the writer did not wait: %v", round, err)
			default:
			}
			dev.word(wordHold).Store(0)
			d, dir = vmResume(t, cfg)
			require.NoError(t, <-written)
			require.True(t, bytes.Equal(data, dev.visible[1<<20:2<<20]), "round %d", round)
		}
		require.NoError(t, f.Close())
		require.NoError(t, d.detach(t.Context()))
		require.NoError(t, dir.remove())
		vmNothingLeft(t, cfg.RunDir)
	})
}

// TestVMReconnects cuts the socket under a live server, as the kernel does when it finds fault with an
// answer: the server hands in a new one and the writer sees a pause.
func TestVMReconnects(t *testing.T) {
	eachKind(t, func(t *testing.T, kind Kind) {
		a, dev, runDir := vmAttach(t, kind)
		d, ok := a.dev.(*nbdDev)
		if !ok {
			return // ublk has no connection
		}
		f := openBlock(t, a.Path(), 0)
		data := pages(t, 1<<20, 7)
		for round := range 3 {
			data[0] = byte(round)
			d.mu.Lock()
			require.NoError(t, d.conn.Close())
			d.mu.Unlock()
			_, err := f.WriteAt(data, 0)
			require.NoError(t, err)
			require.True(t, bytes.Equal(data, dev.visible[:1<<20]))
		}
		require.NoError(t, a.Err())
		require.NoError(t, f.Close())
		require.NoError(t, a.Detach(t.Context()))
		vmNothingLeft(t, runDir)
	})
}

// TestVMFenced is H31's and H12's end in the kernel: everything fails once the volume is another node's,
// the attachment says so, and it can be removed.
func TestVMFenced(t *testing.T) {
	eachKind(t, func(t *testing.T, kind Kind) {
		dev := faultdev.Wrap(faultdev.NewMem(vmBytes))
		runDir := t.TempDir()
		a, err := Attach(t.Context(), Config{Name: "vol", RunDir: runDir, Device: dev, Kind: kind})
		require.NoError(t, err)
		t.Cleanup(func() { _ = a.Detach(context.WithoutCancel(t.Context())) })
		f := openBlock(t, a.Path(), 0)
		data := pages(t, 4096, 1)
		_, err = f.WriteAt(data, 0)
		require.NoError(t, err)
		dev.FailNth(faultdev.Write, 1, trivet.ErrNoSpace)
		_, err = f.WriteAt(data, 0)
		if kind == KindNBD { // nbd.c makes one error of all
			require.ErrorIs(t, err, unix.EIO)
		} else {
			require.ErrorIs(t, err, unix.ENOSPC)
		}
		require.NoError(t, a.Err())
		dev.FailNth(faultdev.Write, 1, trivet.ErrFenced) // once: what comes after must fail by itself
		_, err = f.WriteAt(data, 0)
		require.ErrorIs(t, err, unix.EIO)
		require.ErrorIs(t, a.Err(), trivet.ErrFenced)
		n := len(dev.Ops())
		_, err = f.ReadAt(data, 0)
		require.ErrorIs(t, err, unix.EIO)
		require.ErrorIs(t, f.Sync(), unix.EIO)
		require.Len(t, dev.Ops(), n, "nothing reaches the Device any more")
		require.NoError(t, f.Close())
		require.NoError(t, a.Detach(t.Context()), "a dead one goes too")
		vmNothingLeft(t, runDir)
	})
}

// TestVMAllocations holds the promise that the data path does not allocate: under memory pressure the kernel
// writes back to a server whose allocation waits for that writeback, for ever.
func TestVMAllocations(t *testing.T) {
	eachKind(t, func(t *testing.T, kind Kind) {
		a, _, _ := vmAttach(t, kind)
		f := openBlock(t, a.Path(), 0)
		small, large := pages(t, 4096, 1), pages(t, 1<<20, 1)
		requests := func(n int) {
			for i := range n {
				_, err := f.WriteAt(small, int64(i)*4096)
				_, err2 := f.ReadAt(small, int64(i)*4096)
				if i%50 == 0 {
					_, err3 := f.WriteAt(large, 1<<20)
					err = errors.Join(err, err3, f.Sync())
				}
				require.NoError(t, errors.Join(err, err2))
			}
		}
		requests(50)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		requests(250)
		runtime.ReadMemStats(&after)
		perRequest := float64(after.Mallocs-before.Mallocs) / 500
		t.Logf("%.3f allocations a request", perRequest)
		require.Less(t, perRequest, 0.2, "the test itself has some")
	})
}

// TestMortal runs everywhere.
func TestMortal(t *testing.T) {
	t.Parallel()
	for _, kind := range []faultdev.Kind{
		faultdev.Read, faultdev.Write, faultdev.Discard, faultdev.WriteZeroes, faultdev.Flush,
	} {
		t.Run(kind.String(), func(t *testing.T) {
			t.Parallel()
			dev := faultdev.Wrap(faultdev.NewMem(1 << 20))
			m := &mortal{Device: dev, log: newSite(Config{}, nil).log}
			calls := map[faultdev.Kind]func() error{
				faultdev.Read:        func() error { return m.ReadAt(t.Context(), make([]byte, 4096), 0) },
				faultdev.Write:       func() error { return m.WriteAt(t.Context(), make([]byte, 4096), 0) },
				faultdev.Discard:     func() error { return m.Discard(t.Context(), 0, 4096) },
				faultdev.WriteZeroes: func() error { return m.WriteZeroes(t.Context(), 0, 4096) },
				faultdev.Flush:       func() error { return m.Flush(t.Context()) },
			}
			dev.FailNth(kind, 1, trivet.ErrUnavailable)
			require.ErrorIs(t, calls[kind](), trivet.ErrUnavailable)
			require.NoError(t, m.err(), "not for good")
			require.NoError(t, calls[kind]())
			dev.FailNth(kind, 1, trivet.ErrFenced)
			require.ErrorIs(t, calls[kind](), trivet.ErrFenced)
			require.ErrorIs(t, m.err(), trivet.ErrFenced)
			n := len(dev.Ops())
			for _, call := range calls {
				require.ErrorIs(t, call(), trivet.ErrFenced)
			}
			require.Len(t, dev.Ops(), n)
		})
	}
}

func onlyOn(cpu int) *unix.CPUSet {
	set := new(unix.CPUSet)
	set.Set(cpu)
	return set
}

// TestVMFullQueue kills a server that holds every request the kernel may have under way. ublk then has
// no slot by which it would notice the death at once, and takes a look at the requests to see it.
func TestVMFullQueue(t *testing.T) {
	const slots = ublkQueuesMax * ublkDepth
	eachKind(t, func(t *testing.T, kind Kind) {
		devFile, runDir := filepath.Join(t.TempDir(), "dev"), t.TempDir()
		dev := makeShared(t, devFile, vmBytes, vmBytesMax)
		h := startHelper(t, "attach", kind, devFile, runDir)
		f := openBlock(t, h.path, 0)
		data := pages(t, 4096, 5)
		dev.word(wordHold).Store(1)
		const writersN = 4 * slots // on every processor enough to fill its queue
		written := make(chan error, writersN)
		for i := range int64(writersN) {
			go func() {
				// A request goes into its processor's queue, and the scheduler may leave all writers on one.
				runtime.LockOSThread() // for good: the thread ends with it
				err := unix.SchedSetaffinity(0, onlyOn(int(i)%runtime.NumCPU()))
				if err == nil {
					_, err = f.WriteAt(data, i*4096)
				}
				written <- err
			}()
		}
		inflight := func() int {
			var reads, writes int
			b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(h.path), "inflight"))
			require.NoError(t, err)
			_, err = fmt.Sscan(string(b), &reads, &writes)
			require.NoError(t, err)
			return writes
		}
		full := slots
		if kind == KindNBD { // more do not fit into our workers, and the socket between
			full = slots / 2
		}
		require.Eventually(t, func() bool { return inflight() >= full }, time.Minute, 10*time.Millisecond)
		h.kill(t)
		dev.word(wordHold).Store(0)
		began := time.Now()
		h = startHelper(t, "resume", kind, devFile, runDir)
		for range writersN {
			require.NoError(t, <-written)
		}
		t.Logf("all written %.1f s after the new process began", time.Since(began).Seconds())
		for i := range writersN {
			require.Equal(t, data, dev.visible[i*4096:(i+1)*4096])
		}
		require.NoError(t, f.Close())
		h.detach(t)
		vmNothingLeft(t, runDir)
	})
}
