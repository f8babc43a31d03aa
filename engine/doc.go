// Package engine is the store of one disk: the replicated state of every volume replica that lives there, and the map
// that says where each of its blocks stands in the disk's log (engine/segment), in one Pebble store. The blocks
// themselves are written once, by the log; without one they are values of the store. DESIGN.md tells how.
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
//   - A damaged block never leaves in an image (H21); a damaged image never becomes a volume, nor does one
//     that reads back from this disk otherwise than the source had it.
//   - An image made for a volume's Want turns that volume into its source's, from any source that is not
//     behind, and carries no more than what changed as far as the source's journal reaches back.
//   - A snapshot shows what the volume did when it was taken, until State leaves it out; so does a clone until it is
//     dropped, whatever becomes of the snapshot. Freeze, clone and rollback cost the same whatever the volume holds.
//     What nobody shows any more is removed in the background, and never anything else.
//   - A dropped volume's bytes never show again, in no later volume.
//   - Damage is told, once for each table or volume (Config.OnCorruption), and costs neither the good blocks nor
//     a core: compactions that meet it are tried again later and later (compactions.go, H22, H38).
//   - A segment of the log that a block may still be read from, now, after a crash, or by an image that is open,
//     stays pinned; one that nothing refers to is given back. Live blocks that keep a segment nearly empty are
//     copied out of it, sorted, to the log's data lane.
//   - After a background I/O error nothing is acknowledged any more, and Config.Fatal is called once (H28).
//
// # How to use it
//
// Open the engine of a disk, CreateVolume once per replica, OpenVolume, then per group of log entries
// NewBatch, Refer (or Write) and Zero, Commit with the new State. Flush, then DurableState, before the log is cut.
// A volume has one applier at a time and any number of readers; volumes are independent of each other.
//
// # How a replica catches up
//
// Each Commit sets a journal key in its own Pebble batch: the extents that it touched, 25 to 33 bytes for one
// extent (journal.go). A volume claims to be at its applied index; while a Restore is under way it
// claims, block by block, the index that it had before or one that a Restore brought (coverage.go). Volume.Want
// tells that; Volume.Image elsewhere merges the journal above the claimed indexes into a BlockSet, takes everything
// where the journal does not reach, and streams these blocks out of a Pebble snapshot (image_format.go),
// so that neither compactions nor drops nor new writes touch them (H6, H7).
//
// Volume.Restore sets a durable mark before the first block changes. From then on the volume can only go
// forward: the mark has the index that the image brings, and an older image is refused, because blocks of
// that index may be there already. A claim needs only that a block is as of some index from the claimed one up to
// the mark's: what changed since the claimed one comes again in any later image. So a claim may always be
// lowered, and a new one is made only after the range was flushed, read back and found equal to the source's
// digest (H21). The last batch sets State and takes the mark off.
//
// # What it leaves to its caller
//
// Which entry may apply (epochs, sequences, repeated entries), what Session and Config mean, and the
// order of entries: a Batch trusts them, except that index, term, epoch, generation and size never go
// back. That equal indexes mean equal content on all replicas is what a log gives; images rest on it.
// The caller asks HasRoom before it accepts a write; a full disk is a background I/O error (H26).
// The log must have been opened with Hold, and closes after the engine.
// Loss of the store's manifest, or a damaged manifest that Pebble reads as a shorter one, gives an older
// but consistent state: the caller must compare State with its log before it starts (H4, I1).
package engine
