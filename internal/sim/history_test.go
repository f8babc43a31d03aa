package sim

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The history is linearizable exactly when a register could have given its answers. An unanswered write
// may take effect late, an unanswered zero may explain zeroes, and a lost write is found.
func TestHistory(t *testing.T) {
	t.Parallel()
	write := func(h *History, v version, ok bool) { h.end(h.begin(0, 1, false, []version{v}), ok, nil) }
	read := func(h *History, v version) { h.end(h.begin(0, 1, true, nil), true, []version{v}) }
	tests := []struct {
		name string
		play func(h *History)
		ok   bool
	}{
		{"last write", func(h *History) { write(h, 1, true); write(h, 2, true); read(h, 2) }, true},
		{"lost write", func(h *History) { write(h, 1, true); write(h, 2, true); read(h, 1) }, false},
		{"unanswered, late", func(h *History) { write(h, 1, false); write(h, 2, true); read(h, 2); read(h, 1) }, true},
		{"unanswered, undone", func(h *History) { write(h, 1, true); write(h, 2, false); read(h, 2); read(h, 1) }, false},
		{"unanswered zero", func(h *History) { write(h, 1, true); write(h, 0, false); read(h, 0) }, true},
		{"two of many unanswered zeroes", func(h *History) {
			for v := version(1); v <= 30; v++ {
				write(h, v, true)
				write(h, 0, false)
				read(h, v)
				if v == 11 || v == 22 {
					read(h, 0)
					read(h, 0)
				}
			}
		}, true},
		{"zero from nowhere", func(h *History) { write(h, 1, true); read(h, 0) }, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := newHistory(1)
			tt.play(h)
			err := h.Check(time.Minute)
			require.Equal(t, tt.ok, err == nil, "%v", err)
		})
	}
}
