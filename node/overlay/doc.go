// Package overlay puts a small private layer over a Device that must not change: reads see the layer first, writes go
// into it and never below. A filesystem that is attached for reading only replays its journal into one.
//
// What it guarantees:
//   - The Device below is only ever read.
//   - The layer is a file, on a tmpfs, which outlives the process: after a SIGKILL, Open finds every write that was
//     acknowledged, and none in part.
//   - The layers of a node together take no more than their Memory; a write beyond it is ErrNoSpace, and Full tells
//     of it ever after, in later processes too.
//   - While nothing was written, a read costs one load more than without, and allocates nothing.
//
// What it leaves to its caller: that nothing below changes as long as the layer is there, that one process at a time
// has the file, and to remove it.
package overlay
