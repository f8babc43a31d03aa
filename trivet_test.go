package trivet_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

func TestVolumeIDRoundTrip(t *testing.T) {
	t.Parallel()
	for range 100 {
		id := trivet.NewVolumeID()
		back, err := trivet.ParseVolumeID(id.String())
		require.NoError(t, err)
		require.Equal(t, id, back)
	}
	assert.Equal(t, "meta", trivet.MetaGroup.String())
}

func TestParseVolumeIDRefuses(t *testing.T) {
	t.Parallel()
	for _, s := range []string{
		"", "meta", "vol-", "vol-1", "vol-000000000000000g", "vol-0000000000000000", "VOL-00000000000000aa",
		"vol-00000000000000AA", "vol-00000000000000aaa", "../vol-00000000000000aa", "vol-00000000000000a\x00",
	} {
		_, err := trivet.ParseVolumeID(s)
		assert.ErrorIs(t, err, trivet.ErrInvalid, "%q", s)
	}
}

func TestUUID(t *testing.T) {
	t.Parallel()
	require.NoError(t, trivet.ValidateUUID(trivet.NewUUID()))
	first, second := trivet.NewUUID(), trivet.NewUUID()
	assert.NotEqual(t, first, second)
	for _, s := range []string{
		"", "x", strings.Repeat("0", 36), "0000000g-0000-0000-0000-000000000000", "../../../../../../../../etc/passwd-12",
		"AAAAAAAA-0000-0000-0000-000000000000",
	} {
		assert.ErrorIs(t, trivet.ValidateUUID(s), trivet.ErrInvalid, "%q", s)
	}
}

func TestValidateName(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"a", "pvc-1", "Datenträger 7", strings.Repeat("x", 128), "日本語", "a..b"} {
		assert.NoError(t, trivet.ValidateName(s), "%q", s)
	}
	for _, s := range []string{
		"", ".", "..", "a/b", `a\b`, "a\x00b", "a\nb", "a\u0085b", "-rf", strings.Repeat("x", 129), strings.Repeat("x", 300),
		"a\xff",
	} {
		assert.ErrorIs(t, trivet.ValidateName(s), trivet.ErrInvalid, "%q", s)
	}
}

func TestValidateNodeID(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"a", "node-1", "ip-10-0-0-1.eu.internal"} {
		assert.NoError(t, trivet.ValidateNodeID(s), "%q", s)
	}
	for _, s := range []string{"", "-a", "a-", "A", "a..b", "a/b", "a@b", "..", strings.Repeat("a", 64), "a_b", "a\x00"} {
		assert.ErrorIs(t, trivet.ValidateNodeID(s), trivet.ErrInvalid, "%q", s)
	}
}

func TestCheckRange(t *testing.T) {
	t.Parallel()
	const size = 16 * trivet.BlockSize
	tests := []struct {
		name    string
		off, n  int64
		wantErr error
	}{
		{"all", 0, size, nil},
		{"empty at the end", size, 0, nil},
		{"last block", size - trivet.BlockSize, trivet.BlockSize, nil},
		{"past the end", size, trivet.BlockSize, trivet.ErrOutOfRange},
		{"overflowing length", trivet.BlockSize, 1<<63 - trivet.BlockSize, trivet.ErrOutOfRange},
		{"negative offset", -trivet.BlockSize, trivet.BlockSize, trivet.ErrInvalid},
		{"negative length", 0, -trivet.BlockSize, trivet.ErrInvalid},
		{"odd offset", 512, trivet.BlockSize, trivet.ErrInvalid},
		{"odd length", 0, 512, trivet.ErrInvalid},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			assert.ErrorIs(t, trivet.CheckRange(tt.off, tt.n, size), tt.wantErr)
		})
	}
}

// TestAlignInwards compares with the definition: the blocks that lie whole within the range (H18).
func TestAlignInwards(t *testing.T) {
	t.Parallel()
	const unit = trivet.BlockSize / 4
	for off := int64(0); off < 3*trivet.BlockSize; off += unit {
		for n := int64(0); n < 4*trivet.BlockSize; n += unit {
			var want []trivet.LBA
			for lba := int64(0); lba < 8; lba++ {
				if lba*trivet.BlockSize >= off && (lba+1)*trivet.BlockSize <= off+n {
					want = append(want, trivet.LBA(lba))
				}
			}
			first, count := trivet.AlignInwards(off, n)
			require.Equal(t, len(want), int(count), "off %d n %d", off, n)
			if count > 0 {
				require.Equal(t, want[0], first, "off %d n %d", off, n)
			}
		}
	}
}
