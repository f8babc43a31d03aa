package engine_test

import (
	"errors"
	"io"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

func noPace(int) error { return nil }

// The digest of an image is that of the volume at the image's moment, whatever was written since, and it can be
// taken while the volume is written to.
func TestImageDigest(t *testing.T) {
	t.Parallel()
	e := mustOpen(t, vfs.NewMem())
	v := mustVolume(t, e, vol1, 1024)
	mustCommit(t, v, op{lba: 0, n: 16, stamp: 1}, op{lba: 700, n: 16, stamp: 2})
	mustCommit(t, v, op{lba: 4, n: 2, stamp: 0})
	want, err := v.Digest()
	require.NoError(t, err)
	img, err := v.Image(nil)
	require.NoError(t, err)
	for i := range uint32(40) {
		mustCommit(t, v, op{lba: trivet.LBA(16 * i), n: 16, stamp: 10 + i})
	}
	steps := 0
	got, err := img.Digest(func(n int) error {
		assert.Positive(t, n)
		steps++
		mustCommit(t, v, op{lba: 0, n: 1, stamp: 99}) // nothing is held that an applier needs
		return nil
	})
	require.NoError(t, err)
	assert.Equal(t, want, got)
	assert.Positive(t, steps)
	_, err = io.ReadAll(img)
	require.ErrorIs(t, err, trivet.ErrInvalid, "it is a digest or a stream")
	require.NoError(t, img.Close())
	_, err = img.Digest(noPace)
	require.ErrorIs(t, err, trivet.ErrClosed)
	now, err := v.Digest()
	require.NoError(t, err)
	assert.NotEqual(t, want, now)
}

// A large volume is read step by step, and an error of the pace ends it there.
func TestImageDigestPace(t *testing.T) {
	t.Parallel()
	e := mustOpen(t, vfs.NewMem())
	v := mustVolume(t, e, vol1, 4096)
	for i := range trivet.LBA(48) {
		mustCommit(t, v, op{lba: 16 * i, n: 16, stamp: uint32(i) + 1}) // 3 MiB
	}
	want, err := v.Digest()
	require.NoError(t, err)
	errStop := errors.New("stop")
	for stop := range 5 {
		img, err := v.Image(nil)
		require.NoError(t, err)
		read := 0
		got, err := img.Digest(func(n int) error {
			if read == stop<<20 {
				return errStop
			}
			read += n
			return nil
		})
		if stop < 3 {
			require.ErrorIs(t, err, errStop)
			require.Equal(t, stop<<20, read)
		} else {
			require.NoError(t, err)
			require.Equal(t, want, got)
		}
		require.NoError(t, img.Close())
	}
	img, err := v.Image(nil)
	require.NoError(t, err)
	_, err = img.Digest(func(int) error { return img.Close() })
	require.ErrorIs(t, err, trivet.ErrClosed)
}
