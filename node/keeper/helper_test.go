package keeper

import (
	"log/slog"
	"runtime"
	"testing"
)

func newTestLog(t *testing.T) *slog.Logger {
	t.Helper()
	return slog.New(slog.NewTextHandler(t.Output(), nil))
}

// lockThread keeps the goroutine on its thread for good.
func lockThread() { runtime.LockOSThread() }
