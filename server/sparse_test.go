package server_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// requireSparse asks which parts of an export hold data, which are the bytes from 5 to 9 MiB of 64, and copies it
// without looking for zeroes: what is a hole in it is a hole in the copy.
func requireSparse(t *testing.T, uri, to string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "nbdinfo", "--map", "--json", uri).Output()
	require.NoError(t, err)
	var runs []struct{ Offset, Length, Type int64 }
	require.NoError(t, json.Unmarshal(out, &runs), string(out))
	held := map[int64]int64{}
	for _, r := range runs {
		if r.Type == 0 {
			held[r.Offset] = r.Length
		} else {
			require.EqualValues(t, 3, r.Type, "a hole that reads as zeroes")
		}
	}
	require.Equal(t, map[int64]int64{5 << 20: 4 << 20}, held)
	require.NoError(t, os.Remove(to))
	run(t, "nbdcopy", "--sparse=0", uri, to)
	st, err := os.Stat(to)
	require.NoError(t, err)
	require.EqualValues(t, 64<<20, st.Size())
	require.LessOrEqual(t, st.Sys().(*syscall.Stat_t).Blocks*512, int64(5<<20), "the copy is not sparse")
}
