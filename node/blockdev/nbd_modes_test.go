package blockdev

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/faultdev"
)

// TestNBDLongRequests: reads and writes longer than a buffer are cut, and are one request still.
func TestNBDLongRequests(t *testing.T) {
	t.Parallel()
	const long = 32 << 20
	data := make([]byte, long)
	rnd := rand.NewChaCha8([32]byte{1})
	_, _ = rnd.Read(data) // never fails
	for _, mode := range []nbdMode{nbdSimple, nbdStructured, nbdExtended} {
		r := startNBD(t, 64<<20)
		c := goNBDAs(t, r.dial(t), "vol-1", mode)
		r.dev.Forget()
		require.NoError(t, <-c.start(nbdCmdWrite, nbdFlagFUA, 4096, long, data, nil))
		ops := r.dev.Ops()
		require.Equal(t, faultdev.Flush, ops[len(ops)-1].Kind, "one flush, after all parts")
		require.Equal(t, 1, r.dev.Count(faultdev.Flush))
		require.Equal(t, long>>20, r.dev.Count(faultdev.Write))
		got := make([]byte, long)
		require.NoError(t, c.ReadAt(t.Context(), got, 4096))
		require.True(t, bytes.Equal(data, got))

		r.dev.FailNth(faultdev.Write, 2, trivet.ErrNoSpace)
		err := <-c.start(nbdCmdWrite, nbdFlagFUA, 0, 3<<20, data[:3<<20], nil)
		require.ErrorIs(t, err, trivet.ErrNoSpace)
		require.Equal(t, 1, r.dev.Count(faultdev.Flush), "no flush for what failed")
		require.NoError(t, c.Flush(t.Context()))

		r.dev.FailNth(faultdev.Read, 2, trivet.ErrCorrupt)
		err = c.ReadAt(t.Context(), got[:3<<20], 0)
		if mode == nbdSimple { // its header has said that all is well
			require.ErrorIs(t, err, io.ErrUnexpectedEOF)
			continue
		}
		require.ErrorIs(t, err, trivet.ErrUnavailable, "EIO")
		require.ErrorContains(t, err, trivet.ErrCorrupt.Error(), "structured errors say why")
		require.NoError(t, c.ReadAt(t.Context(), got[:3<<20], 0))
	}
}

// TestNBDHoles: structured reads send stretches of zeroes as holes, unless the client wants one chunk.
func TestNBDHoles(t *testing.T) {
	t.Parallel()
	for _, mode := range []nbdMode{nbdStructured, nbdExtended} {
		r := startNBD(t, 8<<20)
		c := goNBDAs(t, r.dial(t), "vol-1", mode)
		require.NoError(t, c.WriteAt(t.Context(), bytes.Repeat([]byte{7}, 4096), 2<<20-4096))
		got := bytes.Repeat([]byte{9}, 4<<20)
		require.NoError(t, c.ReadAt(t.Context(), got, 0))
		require.Equal(t, 3, c.holesN)
		require.Equal(t, 1, c.chunksN)
		want := make([]byte, 4<<20)
		copy(want[2<<20-4096:], bytes.Repeat([]byte{7}, 4096))
		require.True(t, bytes.Equal(want, got))

		require.NoError(t, <-c.start(nbdCmdRead, nbdFlagDF, 4<<20, 1<<20, nil, got[:1<<20]))
		require.Equal(t, 3, c.holesN)
		require.Equal(t, 2, c.chunksN)
		err := <-c.start(nbdCmdRead, nbdFlagDF, 0, 2<<20, nil, got[:2<<20])
		require.ErrorIs(t, err, unix.EOVERFLOW)
	}
}

// allocatedDevice knows that its first two MiB are data, and that each second MiB then is.
type allocatedDevice struct{ trivet.Device }

func (d allocatedDevice) Allocated(_ context.Context, off, n int64, runs []trivet.Run) (int, error) {
	used := 0
	for ; n > 0 && used < len(runs); used++ {
		mib := off >> 20
		run := min(n, (mib+1)<<20-off)
		runs[used] = trivet.Run{LenBytes: run, Allocated: mib < 2 || mib%2 == 1}
		off, n = off+run, n-run
	}
	return used, nil
}

func TestNBDBlockStatus(t *testing.T) {
	t.Parallel()
	data, hole := trivet.Run{LenBytes: 1 << 20, Allocated: true}, trivet.Run{LenBytes: 1 << 20}
	for _, mode := range []nbdMode{nbdStructured, nbdExtended} {
		r := startNBD(t, 8<<20)
		c := goNBDAs(t, r.dial(t), "vol-1", mode)
		call := c.begin(nbdCmdBlockStatus, 0, 4096, 6<<20, nil, nil)
		require.NoError(t, <-call.done)
		require.Equal(t, []trivet.Run{{LenBytes: 6 << 20, Allocated: true}}, call.runs, "who cannot tell says data")

		r = startNBDWith(t, 8<<20, func(cfg *NBDConfig) { cfg.Device = allocatedDevice{cfg.Device} })
		c = goNBDAs(t, r.dial(t), "vol-1", mode)
		call = c.begin(nbdCmdBlockStatus, 0, 1<<20, 3<<20, nil, nil)
		require.NoError(t, <-call.done)
		require.Equal(t, []trivet.Run{data, hole, data}, call.runs)
		call = c.begin(nbdCmdBlockStatus, nbdFlagReqOne, 2<<20, 3<<20, nil, nil)
		require.NoError(t, <-call.done)
		require.Equal(t, []trivet.Run{hole}, call.runs)
		require.ErrorIs(t, <-c.start(nbdCmdBlockStatus, 0, 0, 0, nil, nil), trivet.ErrInvalid)
		require.ErrorIs(t, <-c.start(nbdCmdBlockStatus, 0, 0, 9<<20, nil, nil), trivet.ErrInvalid)
	}
}

// TestNBDExtendedLengths: what needs no payload may be as long as the volume.
func TestNBDExtendedLengths(t *testing.T) {
	t.Parallel()
	const size = 16 << 40
	r := startNBD(t, size)
	c := goNBDAs(t, r.dial(t), "", nbdExtended)
	for _, command := range []uint16{nbdCmdTrim, nbdCmdWriteZeroes, nbdCmdCache} {
		require.NoError(t, <-c.start(command, 0, 0, size, nil, nil))
	}
	require.Equal(t, []faultdev.Op{
		{Seq: 1, Kind: faultdev.Discard, LenBytes: size}, {Seq: 2, Kind: faultdev.WriteZeroes, LenBytes: size},
	}, r.dev.Ops())
	call := c.begin(nbdCmdBlockStatus, 0, 0, size, nil, nil)
	require.NoError(t, <-call.done)
	require.Equal(t, []trivet.Run{{LenBytes: size, Allocated: true}}, call.runs)
	for _, n := range []int64{size + 4096, -4096} {
		require.ErrorIs(t, <-c.start(nbdCmdTrim, 0, 0, n, nil, nil), trivet.ErrInvalid)
	}
	err := <-c.start(nbdCmdBlockStatus, nbdFlagPayloadLen, 0, 4096, make([]byte, 4096), nil)
	require.ErrorIs(t, err, trivet.ErrInvalid, "a payload that nobody asked for is skipped")
	require.NoError(t, c.Flush(t.Context()))

	c = goNBDAs(t, r.dial(t), "", nbdStructured)
	call = c.begin(nbdCmdBlockStatus, 0, 0, 0xfffff000, nil, nil)
	require.NoError(t, <-call.done)
	require.Equal(t, []trivet.Run{{LenBytes: 0xfffff000, Allocated: true}}, call.runs)
}

// TestNBDContextIsOfItsExport: a context counts for the export name that it was chosen for.
func TestNBDContextIsOfItsExport(t *testing.T) {
	t.Parallel()
	r := startNBD(t, 1<<20)
	for name, want := range map[string]error{"vol-1": nil, "": trivet.ErrInvalid} {
		conn := r.dial(t)
		greetNBD(t, conn)
		askNBD(t, conn, nbdOptStructuredReply, nil, nbdRepAck)
		askNBD(t, conn, nbdOptSetMeta, nbdMetaData("vol-1", nbdAllocation), nbdRepMeta, nbdRepAck)
		c := enterNBD(t, conn, name, nbdStructured)
		require.ErrorIs(t, <-c.start(nbdCmdBlockStatus, 0, 0, 4096, nil, nil), want, "%q", name)
	}
}

func TestNBDReadOnly(t *testing.T) {
	t.Parallel()
	r := startNBDWith(t, 1<<20, func(cfg *NBDConfig) { cfg.ReadOnly = true })
	c := goNBDAs(t, r.dial(t), "", nbdStructured)
	require.EqualValues(t, nbdReadOnly, c.flags&(nbdReadOnly|nbdWritableFlags))
	for _, command := range []uint16{nbdCmdWrite, nbdCmdTrim, nbdCmdWriteZeroes} {
		data := make([]byte, 4096*(command&1))
		require.ErrorIs(t, <-c.start(command, 0, 0, 4096, data, nil), unix.EPERM)
	}
	require.Empty(t, r.dev.Ops())
	require.NoError(t, c.ReadAt(t.Context(), make([]byte, 4096), 0))
	require.NoError(t, c.Flush(t.Context()))
}

// TestNBDAllocatesNothing: thousands of requests cost no allocation (package comment of bufPool).
func TestNBDAllocatesNothing(t *testing.T) { // not parallel: it counts
	for _, mode := range []nbdMode{nbdSimple, nbdStructured} {
		var in bytes.Buffer
		const n = 20000
		for i := range uint64(n / 4) {
			in.Write(nbdHeader(nbdCmdWrite, nbdFlagFUA, i, 0, 4096))
			in.Write(make([]byte, 4096))
			in.Write(nbdHeader(nbdCmdRead, 0, i, 0, 4096))
			in.Write(nbdHeader(nbdCmdRead, 0, i, 0, 64<<10))
			in.Write(nbdHeader(nbdCmdTrim, 0, i, 0, 4096))
		}
		in.Write(nbdHeader(nbdCmdDisconnect, 0, 0, 0, 0))
		e := &nbdExport{device: quickDevice{}}
		c := newNBDConn(fuzzConn{nil, io.Discard}, bufio.NewReaderSize(&in, nbdReaderBytes), e, &nbdHandshake{mode: mode})
		pool, err := newBufPool(nbdSmallN, nbdLargeN)
		require.NoError(t, err)
		c.pool = pool
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		require.NoError(t, c.serve(t.Context()))
		runtime.ReadMemStats(&after)
		require.NoError(t, pool.close())
		require.Less(t, after.Mallocs-before.Mallocs, uint64(n/20), "for %d requests", n) // workers, and the runtime's own
	}
}

// quickDevice is a nullDevice that takes every request.
type quickDevice struct{ nullDevice }

func (quickDevice) Discard(context.Context, int64, int64) error { return nil }
func (quickDevice) Flush(context.Context) error                 { return nil }
