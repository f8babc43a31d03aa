// Package cache keeps blocks of a volume in memory, above the replicated device: a write-back cache whose
// acknowledged writes outlive the process, and a read cache with read-ahead.
//
//	config.go, device.go,  settings, opening, writes, draining, changes while in use
//	set.go
//	writeback.go, pace.go, what is written back, when, in which order, and how writers are slowed down
//	flushqueue.go
//	tune.go, adapt.go      how large and how many write-backs, and how far ahead, by what is measured
//	through.go             discards, and writes that go through
//	read.go, readahead.go  hits, fills, sequential runs
//	allocated.go           which blocks hold data
//	slots.go, index.go,    the table: which slot holds which block, in which state
//	policy.go
//	mapping.go, format.go, the memory, shared with the file of a tmpfs; its lock and whose it is
//	locked.go
//	pool.go                one memory for all volumes of a node
//
// What it guarantees, in the mode writeBack:
//   - A write is acknowledged once it is in the mapping, whole. The death of the process, at any instruction, loses
//     none: the next process finds in the file exactly the writes that were acknowledged, and perhaps some of those
//     that were under way, each whole (up to AtomicWriteBytes).
//   - Flush is a barrier: when it returns nil, everything that was acknowledged before is below, and the device below
//     was flushed. Once a write-back failed, every write and flush fails until the volume is detached (H14).
//   - Blocks are written back only if nobody else had the volume since they were written: the file names the epoch,
//     and the epoch is raised under the file's lock (H13). After a fence they are dropped, with a word in the log,
//     and every call returns ErrFenced.
//   - Going down with the machine is that of a disk with a volatile cache, at most Deadline old. A write of up to
//     AtomicWriteBytes then is there whole or not at all, unless a later write covered a part of it before it was
//     written back; then that holds for each block.
//
// In the other modes a write is acknowledged by the device below; only copies for reads are kept.
//
// What it leaves to its caller: one process raises the epoch at a time, in the order that Locked describes; the device
// below keeps what it acknowledged when this process dies; nobody else changes the blocks (Settings.NoClean if so).
package cache
