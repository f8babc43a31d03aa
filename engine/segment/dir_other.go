//go:build !linux

package segment

import "os"

func openDirect(path string) (*os.File, error) { return os.OpenFile(path, os.O_RDWR, 0) }

func syncData(f *os.File) error { return f.Sync() }
