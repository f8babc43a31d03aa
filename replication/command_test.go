package replication

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

const testVolume = trivet.VolumeID(0x0102030405060708)

// block returns n blocks that tell where each came from.
func block(n int, seed byte) []byte {
	p := make([]byte, n*trivet.BlockSize)
	for i := range p {
		p[i] = seed + byte(i/trivet.BlockSize) + byte(i%251)
	}
	return p
}

func sealed(r request) request {
	r.seal(testVolume)
	return r
}

func writeReq(epoch trivet.Epoch, seq, low uint64, lba trivet.LBA, data []byte) request {
	return sealed(request{
		op: opWrite, epoch: epoch, seq: seq, low: low, lba: lba,
		arg: uint64(len(data) / trivet.BlockSize), data: data,
	})
}

func zeroReq(op opCode, epoch trivet.Epoch, seq, low uint64, lba trivet.LBA, n uint64) request {
	return sealed(request{op: op, epoch: epoch, seq: seq, low: low, lba: lba, arg: n})
}

func everyKind() []request {
	return []request{
		writeReq(3, 7, 5, 11, block(2, 1)),
		zeroReq(opDiscard, 3, 8, 5, 1, 9),
		zeroReq(opWriteZeroes, 3, 9, 5, 4, lbaMax),
		sealed(request{op: opFence, epoch: 4}),
		sealed(request{op: opResize, arg: 1 << 30}),
		sealed(request{op: opWipe, epoch: 4}),
		writeReq(4, 1, 1, 0, block(16, 2)),
	}
}

func TestEntryRoundTrip(t *testing.T) {
	t.Parallel()
	want := everyKind()
	b := appendEntry(nil, testVolume, want)
	assert.Len(t, b, entrySize(want))
	got, err := decodeEntry(nil, testVolume, b)
	require.NoError(t, err)
	require.Len(t, got, len(want))
	for i := range want {
		assert.Equal(t, want[i].op, got[i].op)
		assert.True(t, bytes.Equal(want[i].data, got[i].data), "data of request %d", i)
		want[i].data, got[i].data = nil, nil
		assert.Equal(t, want[i], got[i])
	}
}

// The bytes of version 1 stay readable for ever.
func TestEntryGolden(t *testing.T) {
	t.Parallel()
	got := hex.Dump(appendEntry(nil, testVolume, everyKind()[1:6]))
	got += fmt.Sprintf("sha256 with writes: %x\n", sha256.Sum256(appendEntry(nil, testVolume, everyKind())))
	path := filepath.Join("testdata", "entry_v1.hex")
	if os.Getenv("REWRITE") != "" {
		require.NoError(t, os.WriteFile(path, []byte(got), 0o644))
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.Equal(t, string(want), got)
}

// Any changed bit of an entry is found: no request is applied that a client did not send (I12, H25).
func TestEntryDamage(t *testing.T) {
	t.Parallel()
	whole := appendEntry(nil, testVolume, everyKind()[:6])
	step := 1
	for at := 0; at < len(whole); at += step {
		for bit := range 8 {
			b := bytes.Clone(whole)
			b[at] ^= 1 << bit
			_, err := decodeEntry(nil, testVolume, b)
			require.ErrorIs(t, err, trivet.ErrCorrupt, "byte %d bit %d", at, bit)
		}
		if at > entryHeaderBytes+6*headerBytes {
			step = 97
		}
	}
	for n := range len(whole) {
		if _, err := decodeEntry(nil, testVolume, whole[:n]); err == nil {
			t.Fatalf("an entry cut to %d of %d bytes was accepted", n, len(whole))
		}
	}
	_, err := decodeEntry(nil, testVolume, append(bytes.Clone(whole), 0))
	require.ErrorIs(t, err, trivet.ErrCorrupt)
	_, err = decodeEntry(nil, testVolume+1, whole)
	require.ErrorIs(t, err, trivet.ErrCorrupt)
}

// A request whose checksum is right is still refused when its form is wrong.
func TestRequestCheck(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		req  request
	}{
		{"write without data", request{op: opWrite, seq: 1, low: 1}},
		{"write of half a block", request{op: opWrite, seq: 1, low: 1, arg: 1, data: make([]byte, 2048)}},
		{"write with a wrong count", request{op: opWrite, seq: 1, low: 1, arg: 2, data: make([]byte, 4096)}},
		{"write of too much", request{op: opWrite, seq: 1, low: 1, arg: 17, data: make([]byte, 17*4096)}},
		{"write without sequence", request{op: opWrite, low: 1, arg: 1, data: make([]byte, 4096)}},
		{"write with low above seq", request{op: opWrite, seq: 1, low: 2, arg: 1, data: make([]byte, 4096)}},
		{"write with low zero", request{op: opWrite, seq: 1, arg: 1, data: make([]byte, 4096)}},
		{"write beyond any volume", request{op: opWrite, seq: 1, low: 1, lba: lbaMax, arg: 1, data: make([]byte, 4096)}},
		{"discard of nothing", request{op: opDiscard, seq: 1, low: 1}},
		{"discard of too much", request{op: opDiscard, seq: 1, low: 1, arg: lbaMax + 1}},
		{"discard with data", request{op: opDiscard, seq: 1, low: 1, arg: 1, data: make([]byte, 4096)}},
		{"fence at epoch zero", request{op: opFence}},
		{"fence with a sequence", request{op: opFence, epoch: 1, seq: 1, low: 1}},
		{"wipe with an argument", request{op: opWipe, epoch: 1, arg: 1}},
		{"freeze of nothing", request{op: opFreeze, epoch: 1}},
		{"freeze with a sequence", request{op: opFreeze, epoch: 1, arg: 7, seq: 1, low: 1}},
		{"freeze of blocks", request{op: opFreeze, epoch: 1, arg: 7, lba: 1}},
		{"rollback at no epoch", request{op: opRollback, arg: 7}},
		{"rollback to nothing", request{op: opRollback, epoch: 1}},
		{"drop of nothing", request{op: opDrop}},
		{"drop at an epoch", request{op: opDrop, epoch: 1, arg: 7}},
		{"resize to half a block", request{op: opResize, arg: 2048}},
		{"resize beyond the limit", request{op: opResize, arg: trivet.VolumeSizeMax + trivet.BlockSize}},
		{"unknown", request{op: 99}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			require.ErrorIs(t, tt.req.check(), trivet.ErrInvalid)
		})
	}
	for _, r := range everyKind() {
		require.NoError(t, r.check(), "%s", r.op)
	}
}

func FuzzDecodeEntry(f *testing.F) {
	f.Add(appendEntry(nil, testVolume, everyKind()[:6]))
	f.Add(appendEntry(nil, testVolume, everyKind()[3:4]))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		reqs, err := decodeEntry(nil, testVolume, b)
		if err != nil {
			require.ErrorIs(t, err, trivet.ErrCorrupt)
			return
		}
		require.Equal(t, b, appendEntry(nil, testVolume, reqs))
	})
}

// The log cuts entries where payloadAt says, so it must find the data of every entry and be wrong about no other bytes.
func TestPayloadAt(t *testing.T) {
	t.Parallel()
	reqs := everyKind()
	b := appendEntry(nil, testVolume, reqs)
	at := payloadAt(b)
	want := append(bytes.Clone(reqs[0].data), reqs[6].data...)
	require.Equal(t, want, b[at:])
	none := appendEntry(nil, testVolume, reqs[1:3])
	require.Equal(t, len(none), payloadAt(none), "no data")
	for name, odd := range map[string][]byte{
		"empty": {}, "short": b[:entryHeaderBytes-1], "cut": b[:len(b)-1], "longer": append(bytes.Clone(b), 0),
		"another version": append([]byte{entryVersion + 1}, b[1:]...), "heads cut": b[:entryHeaderBytes+1],
	} {
		require.Equal(t, len(odd), payloadAt(odd), name)
	}
}
