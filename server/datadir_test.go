package server

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// TestDataDirIsFreeBesideAFork: a child that another goroutine starts has all descriptors until it runs its program.
// The directory is free all the same once it is closed.
func TestDataDirIsFreeBesideAFork(t *testing.T) {
	t.Parallel()
	path, whose := t.TempDir(), owner{Cluster: "c", Node: "n"}
	d, err := openDataDir(path, whose)
	require.NoError(t, err)
	child, err := syscall.Dup(int(d.lock.Fd())) // the same open file, as in a child
	require.NoError(t, err)
	defer syscall.Close(child) //nolint:errcheck // nothing was written
	_, err = openDataDir(path, whose)
	require.ErrorIs(t, err, trivet.ErrInUse)
	require.NoError(t, d.close())
	d, err = openDataDir(path, whose)
	require.NoError(t, err)
	require.NoError(t, d.close())
}

// TestDataDirWithThePlace: where the node stands is written there before its server starts for the first time; any
// other file is of somebody else.
func TestDataDirWithThePlace(t *testing.T) {
	t.Parallel()
	path, whose := t.TempDir(), owner{Cluster: "c", Node: "n"}
	require.NoError(t, os.WriteFile(filepath.Join(path, "place.json"), []byte("{}"), 0o600))
	d, err := openDataDir(path, whose)
	require.NoError(t, err)
	require.NoError(t, d.close())

	path = t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(path, "places.json"), []byte("{}"), 0o600))
	_, err = openDataDir(path, whose)
	require.ErrorIs(t, err, trivet.ErrInvalid)
	require.ErrorContains(t, err, "places.json")
}
