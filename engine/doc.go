// Package engine is the store of one disk: the blocks and the replicated state of every volume
// replica that lives there, in one Pebble store.
//
// # What it guarantees
//
//   - The effects of applied log entries and the applied index go to disk in one atomic batch, and
//     batches become durable in the order of their commit. After a crash a volume is exactly as it
//     was at State().AppliedIndex, which may lie before the last Commit (H2): the Raft log is the
//     write-ahead log, Pebble has none. DurableState tells how far the log may be cut (H1).
//   - A read returns the bytes that were written or ErrCorrupt, never anything else: each block
//     carries a CRC32C over its bytes, its volume and its block number, made before the write and
//     checked after every read (H22, H24).
//   - An interrupted Restore is seen as such after the crash, for ever, until a Restore completes (H5).
//   - A damaged block never leaves in an image (H21); a damaged image never becomes a volume.
//   - A dropped volume's bytes never show again, in no later volume.
//   - After a background I/O error nothing is acknowledged any more, and Config.Fatal is called once (H28).
//
// # How to use it
//
// Open the engine of a disk, CreateVolume once per replica, OpenVolume, then per group of log entries
// NewBatch, Write and Zero, Commit with the new State. Flush, then DurableState, before the log is cut.
// A volume has one applier at a time and any number of readers; volumes are independent of each other.
//
// # What it leaves to its caller
//
// Which entry may apply (epochs, sequences, repeated entries), what Session and Config mean, and the
// order of entries: a Batch trusts them, except that index, term, epoch, generation and size never go
// back. The caller asks HasRoom before it accepts a write; a full disk is a background I/O error (H26).
// Loss of the store's manifest, or a damaged manifest that Pebble reads as a shorter one, gives an older
// but consistent state: the caller must compare State with its log before it starts (H4, I1).
package engine
