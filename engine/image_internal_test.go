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

// testStream builds streams by hand, apart from the encoder under test.
type testStream struct {
	b   []byte
	sum uint32
	n   uint64
}

func newTestStream() *testStream {
	b := append([]byte("TRVIMG"), 0, 2)
	return &testStream{b: b, sum: crc32.Checksum(b, castagnoli)}
}

func (s *testStream) part(kind byte, body ...[]byte) *testStream {
	all := slices.Concat(body...)
	p := slices.Concat([]byte{kind}, be32(uint32(len(all))), all)
	s.sum = crc32.Update(crc32.Checksum(be32(s.sum), castagnoli), castagnoli, p)
	s.b = append(append(s.b, p...), be32(s.sum)...)
	s.n++
	return s
}

func be64(x uint64) []byte { return binary.BigEndian.AppendUint64(nil, x) }

func (s *testStream) begin(base coverage) *testStream {
	r := record{replica: "r", state: State{SizeBytes: 4 * trivet.BlockSize, Generation: 1, AppliedIndex: 5}}
	return s.part(1, be64(1), be64(0), base.append(nil), appendRecord(nil, 1, &r))
}

func (s *testStream) blocks(to uint64, items ...[]byte) *testStream {
	return s.part(2, be64(to), slices.Concat(items...))
}

// digest is that of versions, given as their LBA (8), generation (4), 1 for a tombstone (1), sum (4).
func (s *testStream) digest(to uint64, versions ...[]byte) *testStream {
	d := sha256.Sum256(slices.Concat(versions...))
	return s.part(3, be64(to), be64(uint64(len(versions))), d[:])
}

func (s *testStream) end() []byte { return s.part(4, be64(s.n)).b }

func dataItem(lba uint64, gen uint32) []byte {
	sum := BlockSum(1, trivet.LBA(lba), patternBlock())
	return slices.Concat([]byte{1}, be64(lba), be32(gen), be32(sum), patternBlock())
}

func tombItem(lba uint64, gen uint32) []byte {
	return slices.Concat([]byte{2}, be64(lba), be32(gen), be32(BlockSum(1, trivet.LBA(lba), nil)))
}

func absentItem(lba, n uint64) []byte { return slices.Concat([]byte{3}, be64(lba), be64(n)) }

func dataVersion(lba uint64, gen uint32) []byte {
	return slices.Concat(be64(lba), be32(gen), []byte{0}, be32(BlockSum(1, trivet.LBA(lba), patternBlock())))
}

func tombVersion(lba uint64, gen uint32) []byte {
	return slices.Concat(be64(lba), be32(gen), []byte{1}, be32(BlockSum(1, trivet.LBA(lba), nil)))
}

// testImage has blocks at LBA 0 and 2, and a tombstone at LBA 1.
func testImage() []byte {
	return newTestStream().begin(wholly(0)).
		blocks(lbaMax, dataItem(0, 1), tombItem(1, 1), dataItem(2, 1), absentItem(3, lbaMax-3)).
		digest(lbaMax, dataVersion(0, 1), tombVersion(1, 1), dataVersion(2, 1)).end()
}

// readImage decodes a whole stream and counts its items.
func readImage(b []byte) (n int, err error) {
	ir, err := newImageReader(bytes.NewReader(b))
	if err != nil {
		return 0, err
	}
	for {
		p, err := ir.next()
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
		n += len(p.items)
	}
}

func TestImageStreamRefusesEveryDamage(t *testing.T) {
	good := testImage()
	n, err := readImage(good)
	require.NoError(t, err)
	require.Equal(t, 4, n)
	for i := range good {
		b := bytes.Clone(good)
		b[i] ^= 0x10
		_, err := readImage(b)
		if i == 6 || i == 7 {
			require.ErrorIs(t, err, trivet.ErrInvalid, "another version")
			continue
		}
		require.ErrorIs(t, err, trivet.ErrCorrupt, "byte %d", i)
	}
	for n := range good {
		_, err := readImage(good[:n])
		require.ErrorIs(t, err, trivet.ErrCorrupt, "cut at %d", n)
	}
	_, err = readImage(append(bytes.Clone(good), 0))
	require.ErrorIs(t, err, trivet.ErrCorrupt, "followed by a byte")
}

// Streams with good checksums that no source makes.
func TestImageStreamRefusesNonsense(t *testing.T) {
	full, part := wholly(0), coverage{{1, 3}, {lbaMax, 0}}
	rest := absentItem(3, lbaMax-3)
	end0, d0, d2 := absentItem(1, lbaMax-1), dataVersion(0, 1), dataVersion(2, 1)
	begin := func() *testStream { return newTestStream().begin(full) }
	good := begin().blocks(lbaMax, dataItem(0, 1), end0).digest(lbaMax, d0)
	_, err := readImage(good.end())
	require.NoError(t, err)
	_, err = readImage(newTestStream().begin(part).blocks(lbaMax, end0).digest(lbaMax).end())
	require.NoError(t, err, "block 0 is not needed")
	_, err = readImage(begin().blocks(0, dataItem(0, 1)).blocks(lbaMax, dataItem(0, 0), end0).
		digest(lbaMax, d0, dataVersion(0, 0)).end())
	require.NoError(t, err, "a block in two parts")
	for name, b := range map[string][]byte{
		"nothing begins":        newTestStream().blocks(0).end(),
		"begins twice":          begin().begin(full).end(),
		"no base":               newTestStream().begin(nil).end(),
		"base beyond the index": newTestStream().begin(wholly(6)).end(),
		"a hole":                begin().blocks(lbaMax, dataItem(0, 1), dataItem(2, 1), rest).digest(lbaMax, d0, d2).end(),
		"a hole before a run":   begin().blocks(lbaMax, end0).digest(lbaMax).end(),
		"a hole at the end":     begin().blocks(lbaMax, dataItem(0, 1)).digest(lbaMax, d0).end(),
		"a hole in part":        newTestStream().begin(part).blocks(lbaMax, absentItem(2, lbaMax-2)).digest(lbaMax).end(),
		"swapped":               begin().blocks(lbaMax, end0, dataItem(0, 1)).digest(lbaMax, d0).end(),
		"doubled":               begin().blocks(lbaMax, dataItem(0, 1), dataItem(0, 1), end0).end(),
		"newer after older":     begin().blocks(lbaMax, dataItem(0, 0), dataItem(0, 1), end0).end(),
		"older in another part": begin().blocks(1, dataItem(0, 1)).blocks(lbaMax, dataItem(0, 0), end0).end(),
		"beyond the size":       begin().blocks(5, absentItem(0, 4), dataItem(4, 1)).end(),
		"beyond the generation": begin().blocks(1, dataItem(0, 2)).end(),
		"beyond all volumes":    begin().blocks(lbaMax, absentItem(0, lbaMax+1)).end(),
		"an empty run":          begin().blocks(lbaMax, absentItem(0, 0)).end(),
		"unknown item":          begin().blocks(1, slices.Concat([]byte{9}, be64(0), be64(1))).end(),
		"cut item":              begin().blocks(1, dataItem(0, 1)[:100]).end(),
		"goes back":             begin().blocks(2, absentItem(0, 2)).blocks(1).end(),
		"complete too early":    begin().blocks(0, absentItem(0, 2)).end(),
		"digest elsewhere":      begin().blocks(2, absentItem(0, 2)).digest(1).end(),
		"digest inside a block": begin().blocks(0, dataItem(0, 1)).digest(0, d0).end(),
		"digest of fewer":       begin().blocks(lbaMax, dataItem(0, 1), end0).digest(lbaMax).end(),
		"no digest":             begin().blocks(lbaMax, absentItem(0, lbaMax)).end(),
		"ends early":            begin().blocks(2, absentItem(0, 2)).digest(2).end(),
		"other number of parts": good.part(4, be64(9)).b,
		"unknown part":          begin().part(7).end(),
	} {
		_, err := readImage(b)
		require.ErrorIs(t, err, trivet.ErrCorrupt, name)
	}
	item := dataItem(0, 1)
	item[20] ^= 1
	_, err = readImage(begin().blocks(1, item).end())
	var be *BlockError
	require.ErrorAs(t, err, &be, "a part is sound, a block in it is not")
}

// A stream without digests is refused before it fills the memory.
func TestImageStreamNeedsDigests(t *testing.T) {
	s := newTestStream().begin(coverage{{lbaMax - 1, 5}, {lbaMax, 0}})
	run := bytes.Repeat(absentItem(0, 1), imagePartBytes/imageAbsentBytes)
	lba := uint64(0)
	for range imageRangeBytesMax/imagePartBytes + 1 {
		for i := 0; i < len(run); i += imageAbsentBytes {
			copy(run[i+1:], be64(lba))
			lba += 2
		}
		s.blocks(lba, run)
	}
	_, err := readImage(s.b)
	require.ErrorIs(t, err, trivet.ErrCorrupt)
	require.ErrorContains(t, err, "no digest")
}

// FuzzImage mutates a stream with its checksums made good again, so that the fuzzer gets inside.
func FuzzImage(f *testing.F) {
	f.Add(testImage(), false)
	f.Add(testImage(), true)
	f.Add([]byte(imageMagic), true)
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix {
			b = fixImage(bytes.Clone(b))
		}
		if _, err := readImage(b); err != nil {
			require.True(t, isAny(err, trivet.ErrCorrupt, trivet.ErrInvalid), "%v", err)
		}
	})
}

// fixImage makes the checksums of parts, and of the record, good.
func fixImage(b []byte) []byte {
	if len(b) < imageHeadBytes {
		return b
	}
	sum := crc32.Checksum(b[:imageHeadBytes], castagnoli)
	for at := imageHeadBytes; len(b)-at >= partHeadBytes; {
		n := int(binary.BigEndian.Uint32(b[at+1:]))
		if n > len(b)-at-partHeadBytes-partSumBytes {
			break
		}
		body := b[at+partHeadBytes : at+partHeadBytes+n]
		if b[at] == partBegin && n > beginFixedBytes {
			if _, rec, ok := cutCoverage(body[beginFixedBytes:]); ok && len(rec) >= 4 {
				id := trivet.VolumeID(binary.BigEndian.Uint64(body))
				copy(rec[len(rec)-4:], be32(recordSum(id, rec[:len(rec)-4])))
			}
		}
		end := at + partHeadBytes + n
		sum = partSum(sum, b[at:end])
		copy(b[end:], be32(sum))
		at = end + partSumBytes
	}
	return b
}

// The stream that the engine makes is, byte for byte, one made by hand, and the one that is kept in testdata is read.
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
		if lba != 1 {
			require.NoError(t, b.Write(lba, patternBlock()))
		}
	}
	require.NoError(t, b.Commit(st)) // of block 1 there is nothing: a tombstone that hides nothing is not sent
	i, err := v.Image(nil)
	require.NoError(t, err)
	got, err := io.ReadAll(i)
	require.NoError(t, err)
	require.NoError(t, i.Close())
	want := newTestStream().begin(wholly(0)).
		blocks(lbaMax, dataItem(0, 1), absentItem(1, 1), dataItem(2, 1), absentItem(3, lbaMax-3)).
		digest(lbaMax, dataVersion(0, 1), dataVersion(2, 1)).end()
	require.Equal(t, want, got)
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
