package engine

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
)

// health hears what goes wrong inside Pebble, and remembers the first failure.
type health struct {
	log       *slog.Logger
	onFatal   func(error)
	onCorrupt func(error)

	compactions *compactions
	reported    reported
	flushes     atomic.Uint64 // of memtables, that have ended
	compacted   chan struct{} // a compaction has ended since somebody looked
	l0Stalls    atomic.Bool   // writes wait for level 0

	opening      atomic.Bool // Open is under way and turns a fatal failure into its error
	openerFailed atomic.Bool // the failure was on the goroutine of runOpen; set before failed is closed
	once         sync.Once
	failed       chan struct{} // closed after err is set
	err          error         // read only once failed is closed
}

// fatalPanic is what leaves Pebble after a failure from which it must not return.
type fatalPanic struct {
	msg   string
	cause error // may be nil
}

// Error implements error; the runtime prints it.
func (p fatalPanic) Error() string { return p.msg }

// Unwrap returns what Pebble complained of.
func (p fatalPanic) Unwrap() error { return p.cause }

func newHealth(cfg Config) *health {
	h := &health{
		log: cfg.Logger, onFatal: cfg.Fatal, onCorrupt: cfg.OnCorruption,
		compactions: newCompactions(), compacted: make(chan struct{}, 1), failed: make(chan struct{}),
	}
	if h.log == nil {
		h.log = slog.New(slog.DiscardHandler)
	}
	h.opening.Store(true)
	return h
}

// check returns the first failure, once there is one.
func (h *health) check() error {
	select {
	case <-h.failed:
		return h.err
	default:
		return nil
	}
}

// fail poisons the engine with its first failure and tells the owner; it reports whether this was the
// first. Pebble repeats a failed flush for ever, tens of thousands of times a second, so later ones
// are dropped.
func (h *health) fail(err error) (first bool) {
	h.once.Do(func() {
		first = true
		h.err = err
		close(h.failed)
		h.log.Error("engine failed", "err", err)
		if h.onFatal != nil && !h.opening.Load() { // else Open returns it
			h.onFatal(err)
		}
	})
	return first
}

func (h *health) listener() *pebble.EventListener {
	return &pebble.EventListener{
		BackgroundError: func(err error) {
			if pebble.IsCorruptionError(err) {
				h.compactionFailed(err)
				return
			}
			h.fail(fmt.Errorf("engine background work: %w", err))
		},
		CompactionEnd: func(pebble.CompactionInfo) {
			select {
			case h.compacted <- struct{}{}:
			default:
			}
		},
		DataCorruption:  h.corruptTable,
		FlushEnd:        func(pebble.FlushInfo) { h.flushes.Add(1) },
		WriteStallBegin: func(i pebble.WriteStallBeginInfo) { h.log.Warn("engine writes stall", "reason", i.Reason) },
		WriteStallEnd:   func() { h.log.Info("engine writes go on") },
	}
}

// Infof implements pebble.Logger.
func (h *health) Infof(format string, args ...any) {
	if h.log.Enabled(context.Background(), slog.LevelDebug) { //nolint:contextcheck // level only
		h.log.Debug("pebble", "msg", fmt.Sprintf(format, args...))
	}
}

// Errorf implements pebble.Logger.
func (h *health) Errorf(format string, args ...any) {
	h.log.Error("pebble", "msg", fmt.Sprintf(format, args...))
}

// Fatalf implements pebble.Logger. Pebble calls it where going on would lose data, for instance when
// the manifest cannot be synced, so it must never return: if the owner does not end the process (or
// this goroutine), the panic does. An owner that knows already, and lives on without this disk, is not
// told again: then only the goroutine ends. While the engine opens, the goroutine ends too, and Open
// returns the failure.
func (h *health) Fatalf(format string, args ...any) {
	p := fatalPanic{msg: "engine: " + fmt.Sprintf(format, args...)}
	for _, a := range args {
		if err, ok := a.(error); ok {
			p.cause = err
		}
	}
	opening := h.opening.Load()
	if opening && inRunOpen() {
		h.openerFailed.Store(true)
	}
	if h.fail(p) && !opening {
		panic(p)
	}
	runtime.Goexit()
}

// runOpen is pebble.Open; Fatalf looks for it on its stack.
//
//go:noinline
func (h *health) runOpen(dir string, opts *pebble.Options) (*pebble.DB, error) {
	return pebble.Open(dir, opts)
}

// inRunOpen reports whether the calling goroutine is inside runOpen.
func inRunOpen() bool {
	pcs := make([]uintptr, 128)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(1, pcs)])
	for {
		f, more := frames.Next()
		if strings.HasSuffix(f.Function, "(*health).runOpen") {
			return true
		}
		if !more {
			return false
		}
	}
}
