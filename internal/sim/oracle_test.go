package sim

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// The oracle accepts what a register may return, and nothing else.
func TestOracle(t *testing.T) {
	t.Parallel()
	block := func(lba trivet.LBA, epoch trivet.Epoch, v version) []byte {
		p := make([]byte, trivet.BlockSize)
		stamp(p, lba, epoch, v)
		return p
	}
	zero := make([]byte, trivet.BlockSize)
	// Block 0: version 1 acknowledged, 2 a discard without an answer, 3 acknowledged, 4 without an answer.
	setup := func() *oracle {
		o := newOracle(2)
		for i, acked := range []bool{true, false, true, false} {
			_, ok := o.begin(0, 1, write{zero: i == 1, epoch: 1})
			require.True(t, ok)
			o.end(0, 1, acked)
		}
		return o
	}
	damaged := block(0, 1, 3)
	damaged[1000] ^= 1
	tests := []struct {
		name  string
		p     []byte
		floor version
		ok    bool
	}{
		{"acknowledged", block(0, 1, 3), 3, true},
		{"later, without an answer", block(0, 1, 4), 3, true},
		{"lost", block(0, 1, 1), 3, false},
		{"zero though written", zero, 3, false},
		{"zero, when the read began before", zero, 1, true},
		{"never issued", block(0, 1, 5), 3, false},
		{"data where a discard was", block(0, 1, 2), 1, false},
		{"wrong epoch", block(0, 2, 3), 3, false},
		{"another block", block(1, 1, 3), 3, false},
		{"damaged", damaged, 3, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			o := setup()
			assert.Equal(t, []version{3}, o.floors(0, 1))
			err := o.check(0, tt.p, []version{tt.floor})
			assert.Equal(t, tt.ok, err == nil, "%v", err)
		})
	}
	o := setup()
	require.NoError(t, o.check(0, block(0, 1, 4), o.floors(0, 1)))
	require.Error(t, o.check(0, block(0, 1, 3), o.floors(0, 1)), "version 4 was seen already")
	_, ok := o.begin(0, 1, write{})
	require.True(t, ok)
	_, ok = o.begin(0, 2, write{})
	require.False(t, ok, "one change to a block at a time")
}
