package procs

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// TestPass: who has gone on for long enough lets others run, once, and begins anew.
func TestPass(t *testing.T) {
	was := letOthers
	defer func() { letOthers = was }()
	n := 0
	letOthers = func() {
		n++
		was()
	}
	synctest.Test(t, func(*testing.T) {
		var turns Turns
		turns.Pass() // nobody knows since when it has gone on
		require.Equal(t, 1, n)
		for range 3 {
			time.Sleep(turnMax - 1)
			turns.Pass()
			time.Sleep(time.Nanosecond)
			turns.Pass()
			turns.Pass()
		}
		require.Equal(t, 4, n)
	})
}
