package engine

import (
	"encoding/binary"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/stretchr/testify/require"
)

// TestPoliteFilter: what writes tables lets others have the processor on every level, and the filters are those of
// Pebble.
func TestPoliteFilter(t *testing.T) {
	plain := bloom.FilterPolicy(bloomBitsPerKey)
	o := options(Config{}, newHealth(Config{}))
	for i, l := range o.Levels {
		require.Equal(t, politeFilter{plain}, l.FilterPolicy, i)
		require.Equal(t, plain.Name(), l.FilterPolicy.Name(), i)
	}
	polite := o.Levels[0].FilterPolicy.NewWriter(pebble.TableFilter)
	passed := 0
	polite.(*politeFilterWriter).pass = func() { passed++ }
	want := plain.NewWriter(pebble.TableFilter)
	const keyN = 3*politeEvery + 1
	for i := range uint64(keyN) {
		key := binary.BigEndian.AppendUint64(nil, i)
		polite.AddKey(key)
		want.AddKey(key)
	}
	require.Equal(t, 3, passed)
	require.Equal(t, want.Finish(nil), polite.Finish(nil))
}
