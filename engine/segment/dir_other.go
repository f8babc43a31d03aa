//go:build !linux

package segment

import "os"

func openDirect(path string, flags int) (*os.File, error) {
	return os.OpenFile(path, os.O_RDWR|flags, fileMode)
}

func setAside(*os.File, int64) error { return nil }

func syncData(f *os.File) error { return f.Sync() }
