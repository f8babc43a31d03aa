package blockdev

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/faultdev"
)

// FuzzNBDNegotiate: whatever a client says, the handshake ends, without a panic and without
// sending more than a bounded answer to each option; and without TLS nothing is agreed on where TLS is asked for.
func FuzzNBDNegotiate(f *testing.F) {
	flags := []byte{0, 0, 0, 1}
	with := func(options ...[]byte) []byte { return append(bytes.Clone(flags), bytes.Join(options, nil)...) }
	f.Add(flags, false)
	f.Add(with(nbdOption(nbdOptGo, nbdInfoData("v", 0, 1, 3))), false)
	f.Add(with(nbdOption(nbdOptExportName, []byte("v"))), false)
	f.Add(with(bytes.Repeat(nbdOption(nbdOptList, nil), 70)), false)
	f.Add(with(nbdOption(nbdOptInfo, []byte{255, 255, 255, 255, 0, 0})), false)
	f.Add(with(nbdOption(nbdOptStructuredReply, nil), nbdOption(nbdOptSetMeta, nbdMetaData("v", "base:", nbdAllocation)),
		nbdOption(nbdOptListMeta, nbdMetaData("")), nbdOption(nbdOptExtended, nil),
		nbdOption(nbdOptGo, nbdInfoData("v"))), false)
	f.Add(with(nbdOption(nbdOptGo, nbdInfoData("v")), nbdOption(nbdOptStartTLS, nil)), true)
	errNoTLS := errors.New("no tls here")
	f.Fuzz(func(t *testing.T, in []byte, secured bool) {
		var out bytes.Buffer
		h := &nbdHandshake{
			export: &nbdExport{name: "v", device: faultdev.NewMem(1 << 20)}, rw: readWriter{bytes.NewReader(in), &out},
		}
		if secured {
			h.startTLS = func() (io.ReadWriter, error) { return nil, errNoTLS }
		}
		ready, err := h.negotiate()
		require.False(t, ready && (err != nil || secured))
		require.LessOrEqual(t, out.Len(), 18+134+nbdOptionsMax*256)
		if err == nil && !ready {
			require.True(t, bytes.Contains(in, nbdOption(nbdOptAbort, nil)[:12]), "only an abort ends it in peace")
		}
	})
}

// fuzzConn is a client that has said all it will and reads everything.
type fuzzConn struct {
	io.Reader
	io.Writer
}

func (fuzzConn) Close() error { return nil }

// FuzzNBDRequests: whatever a client sends after the handshake, serving ends without a panic,
// with all buffers back and each reply whole, in the form that was agreed on.
func FuzzNBDRequests(f *testing.F) {
	for _, mode := range []nbdMode{nbdSimple, nbdStructured} {
		f.Add(append(nbdHeader(nbdCmdWrite, 0, 1, 0, 4096), make([]byte, 4096)...), uint8(mode))
		f.Add(nbdHeader(nbdCmdRead, 0, 1, 0, 8192), uint8(mode))
		f.Add(nbdHeader(nbdCmdRead, 0, 1, 1<<63, 1<<31), uint8(mode))
		f.Add(append(nbdHeader(nbdCmdTrim, 1, 1, 0, 1<<20), nbdHeader(nbdCmdDisconnect, 0, 2, 0, 0)...), uint8(mode))
		f.Add(nbdHeader(nbdCmdWrite, 0, 1, 0, 2<<20), uint8(mode))
		f.Add(nbdHeader(nbdCmdBlockStatus, nbdFlagReqOne, 1, 0, 4<<20), uint8(mode))
		f.Add(nbdHeader(nbdCmdRead, nbdFlagDF, 1, 0, 4<<20), uint8(mode))
	}
	f.Add(append(nbdExtHeader(nbdCmdWrite, nbdFlagPayloadLen, 1, 0, 4096), make([]byte, 4096)...), uint8(nbdExtended))
	f.Add(nbdExtHeader(nbdCmdWriteZeroes, 0, 1, 0, 1<<63), uint8(nbdExtended))
	f.Add(nbdExtHeader(nbdCmdBlockStatus, nbdFlagPayloadLen, 1, 0, 64), uint8(nbdExtended))
	f.Add(nbdExtHeader(nbdCmdRead, 0, 1, 0, 3<<20), uint8(nbdExtended))
	pool, err := newBufPool(4, 2)
	require.NoError(f, err)
	f.Cleanup(func() { _ = pool.close() })
	e := &nbdExport{name: "v", device: faultdev.NewMem(4 << 20)}
	f.Fuzz(func(t *testing.T, in []byte, form uint8) {
		var out bytes.Buffer
		mode := nbdMode(form % 3)
		c := newNBDConn(fuzzConn{nil, &out}, bufio.NewReader(bytes.NewReader(in)), e, &nbdHandshake{mode: mode, status: true})
		c.pool = pool
		err := c.serve(t.Context())
		if err != nil {
			require.True(t, errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
				errors.Is(err, trivet.ErrInvalid) || errors.Is(err, context.Canceled), "%v", err)
		}
		require.Len(t, pool.small, cap(pool.small))
		require.Len(t, pool.large, cap(pool.large))
		if mode == nbdSimple && out.Len() >= 4 {
			require.EqualValues(t, nbdSimpleMagic, binary.BigEndian.Uint32(out.Bytes()))
		}
		if mode != nbdSimple {
			requireWholeChunks(t, mode, out.Bytes())
		}
	})
}

// requireWholeChunks checks that b is a sequence of chunks without a byte more.
func requireWholeChunks(t *testing.T, mode nbdMode, b []byte) {
	t.Helper()
	for len(b) > 0 {
		if mode == nbdExtended {
			require.GreaterOrEqual(t, len(b), nbdExtChunkBytes)
			require.EqualValues(t, nbdExtChunkMagic, binary.BigEndian.Uint32(b))
			n := binary.BigEndian.Uint64(b[24:])
			require.LessOrEqual(t, n, uint64(len(b)-nbdExtChunkBytes))
			b = b[nbdExtChunkBytes+n:]
			continue
		}
		require.GreaterOrEqual(t, len(b), nbdChunkBytes)
		require.EqualValues(t, nbdChunkMagic, binary.BigEndian.Uint32(b))
		n := binary.BigEndian.Uint32(b[16:])
		require.LessOrEqual(t, uint64(n), uint64(len(b)-nbdChunkBytes))
		b = b[nbdChunkBytes+n:]
	}
}
