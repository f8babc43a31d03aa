//go:build !linux

package segment

import (
	"math"
	"os"
)

func openDirect(path string, flags int) (*os.File, error) {
	return os.OpenFile(path, os.O_RDWR|flags, fileMode)
}

// freeBytes cannot tell here.
func freeBytes(string) (int64, error) { return math.MaxInt64, nil }

func setAside(*os.File, int64) error { return nil }

func syncData(f *os.File) error { return f.Sync() }
