package node

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

func goldenSuperblock() superblock {
	return superblock{
		Cluster:   "11111111-1111-4111-8111-111111111111",
		Node:      "n1",
		Disk:      "22222222-2222-4222-8222-222222222222",
		Formatted: time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC),
		Place: place{
			Dir:  inode{Number: 2, Born: 1700000000000000000},
			File: inode{Number: 12, Born: 1700000000000000001},
		},
	}
}

// The bytes of version 3 stay readable for ever: never change the golden file.
func TestSuperblockGolden(t *testing.T) {
	t.Parallel()
	want, err := os.ReadFile(filepath.Join("testdata", "superblock-v3"))
	require.NoError(t, err)
	sb := goldenSuperblock()
	got, err := sb.encode()
	require.NoError(t, err)
	assert.Equal(t, string(want), string(got))
	back, err := decodeSuperblock(want)
	require.NoError(t, err)
	assert.Equal(t, &sb, back)
}

// A disk of an older layout is whole, but not ours to read: the log of its groups is elsewhere, or has no lane for
// blocks.
func TestSuperblockOfOlderVersion(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"1", "2"} {
		b, err := os.ReadFile(filepath.Join("testdata", "superblock-v"+version))
		require.NoError(t, err)
		_, err = decodeSuperblock(b)
		require.ErrorIs(t, err, trivet.ErrInvalid)
		assert.ErrorContains(t, err, "superblock "+version)
		assert.ErrorContains(t, err, "format it anew")
	}
}

func TestSuperblockRefusesEveryDamage(t *testing.T) {
	t.Parallel()
	sb := goldenSuperblock()
	good, err := sb.encode()
	require.NoError(t, err)
	for i := range good {
		for _, flip := range []byte{0x01, 0x80} {
			bad := bytes.Clone(good)
			bad[i] ^= flip
			_, err := decodeSuperblock(bad)
			require.ErrorIs(t, err, trivet.ErrCorrupt, "byte %d flipped by %x", i, flip)
		}
		_, err := decodeSuperblock(good[:i])
		require.ErrorIs(t, err, trivet.ErrCorrupt, "cut at byte %d", i)
	}
}

func TestSuperblockOfNewerVersion(t *testing.T) {
	t.Parallel()
	sb := goldenSuperblock()
	b, err := sb.encode()
	require.NoError(t, err)
	text := strings.Replace(string(b), "superblock 3\n", "superblock 4\n", 1)
	_, err = decodeSuperblock([]byte(text))
	require.ErrorIs(t, err, trivet.ErrCorrupt, "the version is covered by the checksum")
	_, err = decodeSuperblock(resign(text))
	require.ErrorIs(t, err, trivet.ErrInvalid)
	assert.ErrorContains(t, err, "superblock 4")
}

func TestSuperblockRefusesMalformedFields(t *testing.T) {
	t.Parallel()
	sb := goldenSuperblock()
	b, err := sb.encode()
	require.NoError(t, err)
	for _, tt := range []struct{ name, old, new string }{
		{"cluster is no uuid", `"cluster":"1111`, `"cluster":"xxxx`},
		{"node is a path", `"node":"n1"`, `"node":"../n1"`},
		{"disk is empty", `"disk":"22222222-2222-4222-8222-222222222222"`, `"disk":""`},
		{"unknown field", `"node":`, `"extra":1,"node":`},
		{"second value", "}\n", "} {}\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			text := strings.Replace(string(b), tt.old, tt.new, 1)
			require.NotEqual(t, string(b), text)
			_, err := decodeSuperblock(resign(text))
			require.ErrorIs(t, err, trivet.ErrCorrupt)
		})
	}
}

// resign gives an altered superblock a checksum that fits.
func resign(text string) []byte {
	body := text[:strings.LastIndex(text, "crc32c ")]
	return appendChecksum([]byte(body))
}

func FuzzDecodeSuperblock(f *testing.F) {
	sb := goldenSuperblock()
	good, err := sb.encode()
	require.NoError(f, err)
	f.Add(good)
	f.Add([]byte(""))
	f.Add(resign("trivet superblock 3\n{}\ncrc32c "))
	f.Fuzz(func(t *testing.T, b []byte) {
		sb, err := decodeSuperblock(b)
		if err != nil {
			require.Nil(t, sb)
			return
		}
		again, err := sb.encode()
		require.NoError(t, err)
		back, err := decodeSuperblock(again)
		require.NoError(t, err)
		require.Equal(t, sb, back)
	})
}
