package overlay

import "sync"

// MinBytes is the least that a Memory is of use with: xfs writes some 2 MiB whenever it is mounted, even after a clean
// unmount (xlog_clear_stale_blocks, fs/xfs/xfs_log_recover.c).
const MinBytes = 4 << 20

// Memory bounds what the overlays of a node take together. It is safe for concurrent use.
type Memory struct {
	max int64

	mu   sync.Mutex
	used int64
}

// NewMemory returns a Memory of maxBytes, none of which is used.
func NewMemory(maxBytes int64) *Memory { return &Memory{max: maxBytes} }

// MaxBytes returns how much there is.
func (m *Memory) MaxBytes() int64 { return m.max }

// UsedBytes returns how much is in use. It is more than there is where an earlier process was granted more.
func (m *Memory) UsedBytes() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.used
}

// take takes n bytes, all or none.
func (m *Memory) take(n int64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n > m.max-m.used {
		return false
	}
	m.used += n
	return true
}

// inherit takes what an earlier process took.
func (m *Memory) inherit(n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used += n
}

func (m *Memory) give(n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used -= n
}
