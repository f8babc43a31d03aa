package engine

import (
	"bytes"
	"encoding/hex"
	"flag"
	"hash/crc32"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// golden compares got with a file of hex in testdata/golden, or writes it under -rewrite.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", "golden", name)
	if f := flag.Lookup("rewrite"); f != nil && f.Value.String() == "true" {
		var s strings.Builder
		for c := range chunks(hex.EncodeToString(got), 96) {
			s.WriteString(c + "\n")
		}
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(s.String()), 0o644))
	}
	require.Equal(t, goldenBytes(t, name), got, "the format has changed: stores in the field cannot be read")
}

func goldenBytes(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", "golden", name))
	require.NoError(t, err)
	b, err := hex.DecodeString(strings.ReplaceAll(string(text), "\n", ""))
	require.NoError(t, err)
	return b
}

func chunks(s string, n int) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for len(s) > 0 {
			k := min(n, len(s))
			if !yield(s[:k]) {
				return
			}
			s = s[k:]
		}
	}
}

func patternBlock() []byte {
	p := make([]byte, trivet.BlockSize)
	for i := range p {
		p[i] = byte(i*7 + i>>8)
	}
	return p
}

func fullRecord() record {
	return record{
		replica: "11112222-3333-4444-5555-666677778888", restoring: true, state: State{
			SizeBytes: 10 << 30, Generation: 3, Epoch: 0x0102030405060708, AppliedIndex: 42, AppliedTerm: 7,
			Session: []byte("session"), Config: []byte("config"),
		},
		journal: journal{floor: 17, bytes: 1 << 20},
		have:    coverage{{0x1234, 42}, {0x5678, 0}, {lbaMax, 30}},
	}
}

// snapshotsRecord has what came with version 3.
func snapshotsRecord(id trivet.VolumeID) record {
	r := fullRecord()
	r.restoring, r.have, r.sweep = false, nil, true
	r.state.Generation = 9
	r.state.Snapshots = []Snapshot{{0x1122334455667788, 0}, {7, 6}, {8, 8}}
	r.layers = []layer{{0, Base{0x99, 4}, 1000}, {8, Base{id, 6}, lbaMax}}
	return r
}

func TestGolden(t *testing.T) {
	const id, lba = trivet.VolumeID(0x0123456789abcdef), trivet.LBA(0x1_2345_6789)
	key := appendBlockKey(nil, id, lba, 5)
	golden(t, "volume_key", appendVolumeKey(nil, id))
	golden(t, "block_key", key)
	data := make([]byte, dataValueBytes)
	putData(data, patternBlock(), place(key))
	golden(t, "block_value", data)
	tomb := make([]byte, valueHeadBytes)
	putTombstone(tomb, place(key))
	golden(t, "tombstone_value", tomb)
	at := make([]byte, refValueBytes)
	putRef(at, 0x01020304, ref{0x0a0b0c0d0e0f, 0x1112})
	golden(t, "ref_value", at)
	r := fullRecord()
	golden(t, "volume_record", appendRecord(nil, id, &r))
	snaps := snapshotsRecord(id)
	golden(t, "volume_record_v3", appendRecord(nil, id, &snaps))
	golden(t, "store_format_v3", appendStoreFormat(nil, storeVersion))
	require.Equal(t, goldenBytes(t, "store_format"), appendStoreFormat(nil, 2), "of version 2, still read")
	jkey := appendJournalKey(nil, id, 0x99)
	golden(t, "journal_key", jkey)
	golden(t, "journal_value", appendJournalValue(nil, jkey, testExtents()))
	golden(t, "want", appendWant(nil, &want{id, 42, r.have}))
}

func testExtents() []extent { return []extent{{0, 1}, {130, 16}, {lbaMax - 3, 3}} }

// A record of version 1, from before the journal, is still read.
func TestRecordVersion1(t *testing.T) {
	const id = trivet.VolumeID(0x0123456789abcdef)
	old := goldenBytes(t, "volume_record_v1")
	got, err := decodeRecord(id, old)
	require.NoError(t, err)
	want := fullRecord()
	want.journal, want.have = journal{floor: 42}, wholly(0)
	require.Equal(t, want, got)
	for i := range old {
		b := bytes.Clone(old)
		b[i] ^= 0x11
		_, err := decodeRecord(id, b)
		require.ErrorIs(t, err, trivet.ErrCorrupt, "byte %d", i)
	}
}

func TestRoundTrip(t *testing.T) {
	for _, bk := range []blockKey{{1, 0, 0}, {math.MaxUint64, lbaMax - 1, math.MaxUint32}, {7, 1 << 30, 9}} {
		k := appendBlockKey(nil, bk.volume, bk.lba, bk.gen)
		got, err := decodeBlockKey(k)
		require.NoError(t, err)
		assert.Equal(t, bk, got)
		v := make([]byte, dataValueBytes)
		putData(v, patternBlock(), place(k))
		data, sum, err := decodeValue(v, k, bk)
		require.NoError(t, err)
		assert.Equal(t, patternBlock(), data)
		assert.Equal(t, BlockSum(bk.volume, bk.lba, data), sum)
		tomb := make([]byte, valueHeadBytes)
		putTombstone(tomb, place(k))
		data, _, err = decodeValue(tomb, k, bk)
		require.NoError(t, err)
		assert.Nil(t, data)
	}
	_, err := decodeBlockKey(appendBlockKey(nil, 1, lbaMax, 0))
	require.ErrorIs(t, err, trivet.ErrCorrupt)
	for _, r := range []record{
		fullRecord(), {replica: "r", state: State{SizeBytes: trivet.BlockSize}}, snapshotsRecord(5),
	} {
		b := appendRecord(nil, 5, &r)
		require.Len(t, b, r.encodedBytes())
		got, err := decodeRecord(5, b)
		require.NoError(t, err)
		assert.Equal(t, r, got)
		_, err = decodeRecord(6, b)
		require.ErrorIs(t, err, trivet.ErrCorrupt, "the record of another volume")
	}
}

// Every single damaged byte is seen, in every format.
func TestEveryFlipIsSeen(t *testing.T) {
	const id, lba = 9, 77
	bk := blockKey{id, lba, 1}
	key := appendBlockKey(nil, id, lba, 1)
	value := make([]byte, dataValueBytes)
	putData(value, patternBlock(), place(key))
	tomb := make([]byte, valueHeadBytes)
	putTombstone(tomb, place(key))
	at := make([]byte, refValueBytes)
	putRef(at, 7, ref{0x100, 3})
	r, jkey := fullRecord(), appendJournalKey(nil, id, 5)
	snaps := snapshotsRecord(id)
	for name, c := range map[string]struct {
		bytes  []byte
		decode func(b []byte) error
	}{
		"value":     {value, func(b []byte) error { _, _, err := decodeValue(b, key, bk); return err }},
		"tombstone": {tomb, func(b []byte) error { _, _, err := decodeValue(b, key, bk); return err }},
		"ref":       {at, func(b []byte) error { _, _, err := decodeRef(b, bk); return sumless(b, at, err) }},
		"record":    {appendRecord(nil, id, &r), func(b []byte) error { _, err := decodeRecord(id, b); return err }},
		"snapshots": {appendRecord(nil, id, &snaps), func(b []byte) error { _, err := decodeRecord(id, b); return err }},
		"store":     {appendStoreFormat(nil, 2), func(b []byte) error { _, err := decodeStoreFormat(b); return err }},
		"journal": {appendJournalValue(nil, jkey, testExtents()), func(b []byte) error {
			return decodeJournalValue(b, jkey, func(extent) {})
		}},
		"want": {appendWant(nil, &want{id, 42, r.have}), func(b []byte) error {
			if _, err := decodeWant(b); err != nil {
				require.ErrorIs(t, err, trivet.ErrInvalid)
				return trivet.ErrCorrupt
			}
			return nil
		}},
	} {
		require.NoError(t, c.decode(c.bytes), name)
		for i := range c.bytes {
			for _, mask := range []byte{0x01, 0x80, 0xff} {
				b := bytes.Clone(c.bytes)
				b[i] ^= mask
				require.ErrorIs(t, c.decode(b), trivet.ErrCorrupt, "%s, byte %d, mask %x", name, i, mask)
			}
		}
		for n := range c.bytes {
			require.ErrorIs(t, c.decode(c.bytes[:n]), trivet.ErrCorrupt, "%s cut at %d", name, n)
		}
		require.ErrorIs(t, c.decode(append(bytes.Clone(c.bytes), 0)), trivet.ErrCorrupt, "%s and more", name)
	}
}

func TestNewerVersionsAreRefused(t *testing.T) {
	r := fullRecord()
	b := appendRecord(nil, 1, &r)
	b[0] = recordVersion + 1
	b = append(b[:len(b)-4], be32(recordSum(1, b[:len(b)-4]))...)
	_, err := decodeRecord(1, b)
	require.ErrorIs(t, err, trivet.ErrInvalid)
	require.NotErrorIs(t, err, trivet.ErrCorrupt)
}

func be32(x uint32) []byte { return []byte{byte(x >> 24), byte(x >> 16), byte(x >> 8), byte(x)} }

// The properties that Pebble demands of a comparer, on all kinds of keys that we have.
func TestComparer(t *testing.T) {
	c := newComparer().EnsureDefaults()
	keys := [][]byte{{tableFormat}, {tableVolume}, {tableBlock}, {tableJournal}, {tableEnd}, appendVolumeKey(nil, 1)}
	for _, id := range []trivet.VolumeID{1, 2, 0xff, math.MaxUint64} {
		lower, upper := volumeBlocks(id)
		keys = append(keys, lower, upper, appendVolumeKey(nil, id))
		lower, upper = volumeJournal(id)
		keys = append(keys, lower, upper, appendJournalKey(nil, id, 0), appendJournalKey(nil, id, math.MaxUint64))
		for _, lba := range []trivet.LBA{0, 1, 0x80, 0x81, 0xff, 0xffff, 0x10000, math.MaxUint64} {
			keys = append(keys, appendBlockPrefix(nil, id, lba))
			for _, gen := range []trivet.Generation{0, 1, math.MaxUint32} {
				keys = append(keys, appendBlockKey(nil, id, lba, gen))
			}
		}
	}
	for _, a := range keys {
		n := c.Split(a)
		require.Equal(t, n, c.Split(a[:n]), "the prefix of %x is a prefix", a)
		if next := c.ImmediateSuccessor(nil, a[:n]); assert.Equal(t, len(next), c.Split(next), "after %x", a[:n]) {
			assert.Negative(t, c.Compare(a, next), "%x and its prefix's successor %x", a, next)
		}
		for _, b := range keys {
			cmp, m := c.Compare(a, b), c.Split(b)
			require.Equal(t, cmp == 0, c.Equal(a, b))
			prefixCmp := bytes.Compare(a[:n], b[:m])
			if prefixCmp != 0 {
				require.Equal(t, prefixCmp, cmp, "%x and %x", a, b)
				if prefixCmp < 0 {
					require.LessOrEqual(t, c.Compare(c.ImmediateSuccessor(nil, a[:n]), b), 0, "%x and %x", a, b)
				}
				continue
			}
			require.Equal(t, c.ComparePointSuffixes(a[n:], b[m:]), cmp, "%x and %x", a, b)
			if cmp < 0 {
				sep := c.Separator(nil, a, b)
				require.LessOrEqual(t, c.Compare(a, sep), 0)
				require.Negative(t, c.Compare(sep, b))
			}
		}
	}
	newest, older := appendBlockKey(nil, 1, 1, 9), appendBlockKey(nil, 1, 1, 8)
	require.Negative(t, c.Compare(newest, older), "the newest generation comes first")
}

func FuzzDecodeKey(f *testing.F) {
	f.Add(appendBlockKey(nil, 1, 2, 3))
	f.Add(appendVolumeKey(nil, 1))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if bk, err := decodeBlockKey(b); err == nil {
			require.Equal(t, b, appendBlockKey(nil, bk.volume, bk.lba, bk.gen))
		} else {
			require.ErrorIs(t, err, trivet.ErrCorrupt)
		}
		if id, err := decodeVolumeKey(b); err == nil {
			require.Equal(t, b, appendVolumeKey(nil, id))
		}
		require.LessOrEqual(t, splitKey(b), len(b))
		if version, err := decodeStoreFormat(b); err == nil {
			require.Equal(t, b, appendStoreFormat(nil, version))
		}
	})
}

// sumless stands for the check of the data, which is what shows a change of sum or place.
func sumless(b, want []byte, err error) error {
	if err == nil && len(b) == len(want) && !bytes.Equal(b, want) {
		return trivet.ErrCorrupt
	}
	return err
}

func FuzzDecodeRef(f *testing.F) {
	v := make([]byte, refValueBytes)
	putRef(v, 1, ref{2, 3})
	f.Add(v)
	f.Fuzz(func(t *testing.T, b []byte) {
		at, sum, err := decodeRef(b, blockKey{1, 2, 3})
		if err != nil {
			require.ErrorIs(t, err, trivet.ErrCorrupt)
			return
		}
		again := make([]byte, refValueBytes)
		putRef(again, sum, at)
		require.Equal(t, b, again)
	})
}

func FuzzDecodeValue(f *testing.F) {
	key := appendBlockKey(nil, 1, 2, 3)
	v := make([]byte, dataValueBytes)
	putData(v, patternBlock(), place(key))
	f.Add(v)
	tomb := make([]byte, valueHeadBytes)
	putTombstone(tomb, place(key))
	f.Add(tomb)
	f.Fuzz(func(t *testing.T, b []byte) {
		data, sum, err := decodeValue(b, key, blockKey{1, 2, 3})
		if err != nil {
			require.ErrorIs(t, err, trivet.ErrCorrupt)
			return
		}
		require.Equal(t, sumAt(data, place(key)), sum)
	})
}

func FuzzDecodeRecord(f *testing.F) {
	r := fullRecord()
	f.Add(appendRecord(nil, 1, &r), true)
	f.Add(appendRecord(nil, 1, &r), false)
	snaps := snapshotsRecord(1)
	f.Add(appendRecord(nil, 1, &snaps), true)
	f.Fuzz(func(t *testing.T, b []byte, fixSum bool) {
		if fixSum && len(b) >= 4 { // or no fuzzer gets past the checksum
			b = append(bytes.Clone(b[:len(b)-4]), be32(recordSum(1, b[:len(b)-4]))...)
		}
		r, err := decodeRecord(1, b)
		if err != nil {
			require.True(t, isAny(err, trivet.ErrCorrupt, trivet.ErrInvalid), "%v", err)
			return
		}
		if b[0] > 1 {
			require.Equal(t, b, appendRecord(nil, 1, &r))
		}
	})
}

func FuzzDecodeJournal(f *testing.F) {
	key := appendJournalKey(nil, 1, 2)
	f.Add(appendJournalValue(nil, key, testExtents()), true)
	f.Fuzz(func(t *testing.T, b []byte, fixSum bool) {
		if fixSum && len(b) >= 4 {
			b = append(bytes.Clone(b[:len(b)-4]), be32(journalSum(key, b[:len(b)-4]))...)
		}
		var xs []extent
		err := decodeJournalValue(b, key, func(x extent) { xs = append(xs, x) })
		if err != nil {
			require.ErrorIs(t, err, trivet.ErrCorrupt)
			return
		}
		again := appendJournalValue(nil, key, xs) // shorter, where b has long varints
		require.Len(t, again, journalValueBytes(xs))
		require.LessOrEqual(t, len(again), len(b))
		require.NotEmpty(t, xs)
		require.LessOrEqual(t, xs[len(xs)-1].end(), trivet.LBA(lbaMax))
	})
}

func FuzzDecodeWant(f *testing.F) {
	r := fullRecord()
	f.Add(appendWant(nil, &want{1, 42, r.have}), true)
	f.Fuzz(func(t *testing.T, b []byte, fixSum bool) {
		if fixSum && len(b) >= 4 {
			b = append(bytes.Clone(b[:len(b)-4]), be32(crc32.Checksum(b[:len(b)-4], castagnoli))...)
		}
		w, err := decodeWant(b)
		if err != nil {
			require.ErrorIs(t, err, trivet.ErrInvalid)
			return
		}
		require.NoError(t, w.have.check())
		again := appendWant(nil, &w)
		require.Equal(t, b, again)
	})
}
