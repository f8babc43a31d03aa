package engine

import (
	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet/internal/procs"
)

// politeEvery is after how many keys, and politeBlocks after how many blocks, work in the background looks whether it
// is another's turn: some 20 to 50 µs.
const (
	politeEvery  = 64
	politeBlocks = 16
)

// politeFilter is a filter policy whose writers let others have the processor: of all that Pebble calls as it flushes
// and merges, for each key and on the goroutine that does it, they alone are never called for a request.
type politeFilter struct{ pebble.FilterPolicy }

// NewWriter implements pebble.FilterPolicy.
func (p politeFilter) NewWriter(kind pebble.FilterType) pebble.FilterWriter {
	return &politeFilterWriter{FilterWriter: p.FilterPolicy.NewWriter(kind), pass: new(procs.Turns).Pass}
}

type politeFilterWriter struct {
	pebble.FilterWriter
	pass func()
	keyN int
}

// AddKey implements pebble.FilterWriter.
func (w *politeFilterWriter) AddKey(key []byte) {
	w.FilterWriter.AddKey(key)
	if w.keyN++; w.keyN%politeEvery == 0 {
		w.pass()
	}
}
