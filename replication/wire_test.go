package replication

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

func TestWriteMessage(t *testing.T) {
	t.Parallel()
	for _, want := range everyKind() {
		b := appendWrite(nil, &want)
		got, err := decodeWrite(b)
		require.NoError(t, err, "%s", want.op)
		require.NoError(t, got.verify(testVolume))
		assert.True(t, bytes.Equal(want.data, got.data))
		want.data, got.data = nil, nil
		assert.Equal(t, want, got)
		for _, bad := range [][]byte{b[:len(b)-1], append(bytes.Clone(b), 0), b[:writeHeaderBytes-1], nil} {
			_, err := decodeWrite(bad)
			require.ErrorIs(t, err, trivet.ErrInvalid)
		}
	}
}

func TestReadMessage(t *testing.T) {
	t.Parallel()
	want := readRequest{level: levelEventual, blockN: 256, epoch: 9, lba: lbaMax - 1, index: 1 << 40}
	got, err := decodeRead(want.append(nil))
	require.NoError(t, err)
	assert.Equal(t, want, got)
	for _, bad := range []readRequest{{blockN: 0}, {blockN: 257}, {blockN: 1, lba: lbaMax}, {blockN: 1, level: levelEnd}} {
		_, err := decodeRead(bad.append(nil))
		require.ErrorIs(t, err, trivet.ErrInvalid)
	}
}

func TestReplyMessage(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		reply reply
	}{
		{"write", reply{term: 4, epoch: 2}},
		{"read", reply{term: 4, epoch: 2, index: 1 << 33, crc: 77, data: block(2, 3)}},
		{"not the leader", reply{code: codeNotLeader, node: "node-b"}},
		{"no leader known", reply{code: codeNotLeader}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := tt.reply.append(nil)
			got, err := decodeReply(b, len(tt.reply.data))
			require.NoError(t, err)
			assert.Equal(t, tt.reply, got)
			_, err = decodeReply(b[:len(b)-1], len(tt.reply.data))
			require.ErrorIs(t, err, trivet.ErrCorrupt)
			_, err = decodeReply(append(bytes.Clone(b), 0), len(tt.reply.data))
			require.ErrorIs(t, err, trivet.ErrCorrupt)
		})
	}
}

func TestStatusMessage(t *testing.T) {
	t.Parallel()
	want := RemoteStatus{
		Replica: "r1", Leader: "r2", LeaderNode: "node-b", IsLeader: true, Term: 1, Commit: 2, Applied: 3,
		Epoch: 4, SizeBytes: 5, UsedBytes: -1, LastIndex: 6, LastTerm: 7,
	}
	b := want.append(nil)
	got, err := decodeStatus(b)
	require.NoError(t, err)
	assert.Equal(t, want, got)
	old := len(b) - 16 // of a node that does not say where its log ends
	for n := range len(b) {
		got, err := decodeStatus(b[:n])
		if n == old {
			require.NoError(t, err)
			want.LastIndex, want.LastTerm = 0, 0
			assert.Equal(t, want, got)
			continue
		}
		require.ErrorIs(t, err, trivet.ErrCorrupt)
	}
}

func FuzzDecodeWrite(f *testing.F) {
	for _, r := range everyKind()[:6] {
		f.Add(appendWrite(nil, &r))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := decodeWrite(b); err == nil {
			require.Equal(t, b, appendWrite(nil, &r))
		}
	})
}

func FuzzDecodeRead(f *testing.F) {
	f.Add((&readRequest{blockN: 1, epoch: 2, lba: 3}).append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := decodeRead(b); err == nil {
			require.Equal(t, b, r.append(nil))
		}
	})
}

func FuzzDecodeReply(f *testing.F) {
	f.Add((&reply{term: 1, epoch: 2}).append(nil), 0)
	f.Add((&reply{code: codeNotLeader, node: "n"}).append(nil), 0)
	f.Add((&reply{term: 1, epoch: 2, data: make([]byte, 8)}).append(nil), 8)
	f.Fuzz(func(t *testing.T, b []byte, dataN int) {
		if dataN < 0 || dataN > readBytesMax {
			return
		}
		if r, err := decodeReply(b, dataN); err == nil {
			require.Equal(t, b, r.append(nil))
		}
	})
}

func FuzzDecodeStatus(f *testing.F) {
	f.Add((&RemoteStatus{Replica: "a", Leader: "b", LeaderNode: "c"}).append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := decodeStatus(b); err == nil {
			again, err := decodeStatus(s.append(nil))
			require.NoError(t, err)
			require.Equal(t, s, again)
		}
	})
}
