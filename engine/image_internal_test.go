package engine

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"runtime/debug"
	"slices"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

func isAny(err error, targets ...error) bool {
	for _, x := range targets {
		if errors.Is(err, x) {
			return true
		}
	}
	return false
}

// testImage builds a stream by hand, apart from the encoder under test: blocks at LBA 0 and 2, a
// tombstone at LBA 1.
func testImage() []byte {
	r := record{replica: "r", state: State{SizeBytes: 4 * trivet.BlockSize, Generation: 1, AppliedIndex: 5}}
	h := imageHeader{volume: 1, blockN: 2, tombstoneN: 1, stateBytes: uint32(r.encodedBytes())}
	b := appendRecord(appendImageHeader(nil, &h), 1, &r)
	sum := sha256.New()
	sum.Write(b)
	for lba := range trivet.LBA(3) {
		kind, data := kindData, patternBlock()
		if lba == 1 {
			kind, data = kindTombstone, nil
		}
		head := appendImageRecordHead(nil, kind, blockKey{1, lba, 1}, BlockSum(1, lba, data))
		sum.Write(head)
		b = append(append(b, head...), data...)
	}
	trailer := binary.BigEndian.AppendUint64([]byte{imageTrailerKind}, 3)
	sum.Write(trailer)
	return append(b, sum.Sum(trailer)...)
}

// readImage decodes a whole stream and counts its records.
func readImage(b []byte) (n int, err error) {
	ir, err := newImageReader(bytes.NewReader(b))
	if err != nil {
		return 0, err
	}
	for {
		if _, _, err := ir.next(); errors.Is(err, io.EOF) {
			return n, nil
		} else if err != nil {
			return n, err
		}
		n++
	}
}

func TestImageStreamRefusesEveryDamage(t *testing.T) {
	good := testImage()
	n, err := readImage(good)
	require.NoError(t, err)
	require.Equal(t, 3, n)
	for i := range good {
		b := bytes.Clone(good)
		b[i] ^= 0x10
		_, err := readImage(b)
		require.ErrorIs(t, err, trivet.ErrCorrupt, "byte %d", i)
	}
	for n := range good {
		_, err := readImage(good[:n])
		require.ErrorIs(t, err, trivet.ErrCorrupt, "cut at %d", n)
	}
	_, err = readImage(append(bytes.Clone(good), 0))
	require.ErrorIs(t, err, trivet.ErrCorrupt, "followed by a byte")
}

// Whole records that are well formed, but lost, doubled, swapped or out of place.
func TestImageStreamRefusesMovedRecords(t *testing.T) {
	good := testImage()
	const blockBytes = imageRecordHeadBytes + trivet.BlockSize
	end := len(good) - imageTrailerBytes
	start := end - 2*blockBytes - imageRecordHeadBytes
	first, second, third := good[start:start+blockBytes],
		good[start+blockBytes:start+blockBytes+imageRecordHeadBytes], good[end-blockBytes:end]
	far := appendImageRecordHead(nil, kindTombstone, blockKey{1, 4, 1}, BlockSum(1, 4, nil))
	young := appendImageRecordHead(nil, kindTombstone, blockKey{1, 1, 2}, BlockSum(1, 1, nil))
	for name, records := range map[string][][]byte{
		"lost":                  {first, third},
		"doubled":               {first, first, second, third},
		"swapped":               {second, first, third},
		"other kinds":           {first, second, second},
		"beyond the size":       {first, third, far},
		"beyond the generation": {first, young, third},
	} {
		b := bytes.Join(append(append([][]byte{good[:start]}, records...), good[end:]), nil)
		_, err := readImage(b)
		require.ErrorIs(t, err, trivet.ErrCorrupt, name)
	}
}

// FuzzImage mutates a stream with its checksums made good again, so that the fuzzer gets inside.
func FuzzImage(f *testing.F) {
	f.Add(testImage(), false)
	f.Add(testImage(), true)
	f.Add([]byte(imageMagic), true)
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix && len(b) >= imageHeaderBytes {
			b = bytes.Clone(b)
			binary.BigEndian.PutUint32(b[40:], crc32.Checksum(b[:40], castagnoli))
			n := int(binary.BigEndian.Uint32(b[32:]))
			if n >= 4 && n <= len(b)-imageHeaderBytes {
				state := b[imageHeaderBytes : imageHeaderBytes+n]
				id := trivet.VolumeID(binary.BigEndian.Uint64(b[8:]))
				copy(state[n-4:], be32(recordSum(id, state[:n-4])))
			}
		}
		if _, err := readImage(b); err != nil {
			require.True(t, isAny(err, trivet.ErrCorrupt, trivet.ErrInvalid), "%v", err)
		}
	})
}

// The stream that the engine makes is, byte for byte, the one made by hand above and kept in testdata.
func TestGoldenImage(t *testing.T) {
	golden(t, "image", testImage())
	e, err := Open(damageConfig(vfs.NewMem()))
	require.NoError(t, err)
	defer func() { require.NoError(t, e.Close()) }()
	require.NoError(t, e.CreateVolume(1, "r", 4*trivet.BlockSize))
	v, err := e.OpenVolume(1)
	require.NoError(t, err)
	st := v.State()
	st.Generation = 1
	require.NoError(t, v.NewBatch().Commit(st))
	st.AppliedIndex = 5
	b := v.NewBatch()
	for lba := range trivet.LBA(3) {
		require.NoError(t, b.Write(lba, patternBlock()))
	}
	require.NoError(t, b.Zero(1, 1))
	require.NoError(t, b.Commit(st))
	i, err := v.Image()
	require.NoError(t, err)
	got, err := io.ReadAll(i)
	require.NoError(t, err)
	require.NoError(t, i.Close())
	require.Equal(t, testImage(), got)
	require.NoError(t, v.Restore(bytes.NewReader(testImage())))
	p := make([]byte, 4*trivet.BlockSize)
	require.NoError(t, v.ReadAt(p, 0))
	zero := make([]byte, trivet.BlockSize)
	require.Equal(t, slices.Concat(patternBlock(), zero, patternBlock(), zero), p)
}

// The data path does not allocate per block.
func TestAllocations(t *testing.T) {
	race := debug.BuildSetting{Key: "-race", Value: "true"}
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, race) {
		t.Skip("under the race detector Pebble copies what it returns")
	}
	cfg := damageConfig(vfs.NewMem())
	cfg.MemTableBytes = 64 << 20 // no flush under the measurement
	e, v := mustStore(t, cfg, 64)
	defer func() { require.NoError(t, e.Close()) }()
	data := bytes.Repeat(patternBlock(), 32)
	st := v.State()
	write := func(n int) func() {
		return func() {
			b := v.NewBatch()
			require.NoError(t, b.Write(0, data[:n*trivet.BlockSize]))
			st.AppliedIndex++
			require.NoError(t, b.Commit(st))
		}
	}
	read := func(n int) func() {
		return func() { require.NoError(t, v.ReadAt(data[:n*trivet.BlockSize], 0)) }
	}
	for name, f := range map[string]func(n int) func(){"write": write, "read": read} {
		few, many := testing.AllocsPerRun(50, f(2)), testing.AllocsPerRun(50, f(32))
		t.Logf("%s: %v allocations for 2 blocks, %v for 32", name, few, many)
		require.Less(t, many-few, 15.0, "%s of 30 blocks more", name)
	}
}
