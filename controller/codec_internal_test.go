package controller

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

func TestResultCodec(t *testing.T) {
	t.Parallel()
	v := meta.Volume{ID: 7, Name: "x", Replicas: []meta.Replica{{ID: "r"}}}
	v.Attached = &meta.Attachment{Node: "n1", Epoch: 3}
	n := meta.Node{ID: "n1", LeaseUntil: time.Unix(5, 0).UTC()}
	all := []error{
		trivet.ErrNotFound, trivet.ErrExists, trivet.ErrInUse, trivet.ErrFenced, trivet.ErrPending, trivet.ErrNoSpace,
		trivet.ErrOutOfRange, trivet.ErrInvalid,
	}
	for _, sentinel := range append(all, nil) {
		want := meta.Result{Revision: 9, Volume: &v, Node: &n}
		if sentinel != nil {
			want = meta.Result{Revision: 9, Err: fmt.Errorf("attach: held by n1: %w", sentinel)}
		}
		b, err := encodeResult(want)
		require.NoError(t, err)
		got, err := decodeResult(b)
		require.NoError(t, err)
		require.Equal(t, want.Volume, got.Volume)
		require.Equal(t, want.Node, got.Node)
		require.Equal(t, want.Revision, got.Revision)
		if sentinel == nil {
			require.NoError(t, got.Err)
			continue
		}
		require.EqualError(t, got.Err, want.Err.Error())
		for _, other := range all {
			require.Equal(t, errors.Is(want.Err, other), errors.Is(got.Err, other), other)
		}
	}
}

func testIdentity() identity {
	return identity{
		Cluster: testCluster, Node: "n1", Replica: trivet.ReplicaID(testUUID(1, 1)), State: stateMember,
	}
}

// FuzzWire: what comes from another node is refused or understood, and never a panic.
func FuzzWire(f *testing.F) {
	res, err := encodeResult(meta.Result{Revision: 1, Err: trivet.ErrInUse})
	require.NoError(f, err)
	add, err := addMember{Node: "n1", Replica: trivet.ReplicaID(testUUID(1, 1))}.encode()
	require.NoError(f, err)
	f.Add(res)
	f.Add(add)
	f.Add(request{op: opRead}.encode())
	f.Add(encodeIndex(7))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := decodeRequest(b); err == nil {
			require.Equal(t, b, r.encode())
		}
		if i, err := decodeIndex(b); err == nil {
			require.Equal(t, b, encodeIndex(i))
		}
		if a, err := decodeAddMember(b); err == nil {
			require.NoError(t, a.validate())
		} else {
			require.ErrorIs(t, err, trivet.ErrInvalid)
		}
		if r, err := decodeResult(b); err == nil {
			again, err := encodeResult(r)
			if err == nil {
				_, err = decodeResult(again)
				require.NoError(t, err)
			}
		}
	})
}

// FuzzFiles: what stands on the disk is refused or understood. Bodies are sealed here, to get past
// the checksum.
func FuzzFiles(f *testing.F) {
	id, err := testIdentity().encode()
	require.NoError(f, err)
	snap, err := snapshot{index: 3, term: 2, state: &meta.State{}}.encode()
	require.NoError(f, err)
	for _, b := range [][]byte{id, snap} {
		f.Add(b)
		f.Add(b[frameHeader : len(b)-frameTrailer])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, magic := range []string{identityMagic, snapshotMagic} {
			body, err := unseal(magic, seal(magic, b))
			require.NoError(t, err)
			require.Equal(t, string(b), string(body))
			if body, err = unseal(magic, b); err == nil {
				require.Equal(t, b, seal(magic, body))
			}
		}
		for _, in := range [][]byte{b, seal(identityMagic, b)} {
			if i, err := decodeIdentity(in); err == nil {
				require.NoError(t, trivet.ValidateUUID(string(i.Replica)))
			}
		}
		for _, in := range [][]byte{b, seal(snapshotMagic, b)} {
			if s, err := decodeSnapshot(in); err == nil {
				_, err := s.encode()
				require.NoError(t, err)
			}
		}
	})
}

// TestFileDamage flips every byte of both files: never accepted.
func TestFileDamage(t *testing.T) {
	t.Parallel()
	id, err := testIdentity().encode()
	require.NoError(t, err)
	snap, err := snapshot{index: 3, term: 2, state: testState(t, time.Now())}.encode()
	require.NoError(t, err)
	for i := range id {
		bad := append([]byte{}, id...)
		bad[i] ^= 1
		_, err := decodeIdentity(bad)
		require.Error(t, err, "byte %d", i)
	}
	for i := range snap {
		bad := append([]byte{}, snap...)
		bad[i] ^= 1
		_, err := decodeSnapshot(bad)
		require.Error(t, err, "byte %d", i)
	}
}
