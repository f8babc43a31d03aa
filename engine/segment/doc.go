// Package segment is the shared log of one disk: the Raft logs, terms and votes of every group that
// lives there, in recycled segment files of a fixed size, and the place where their blocks are read.
//
// # What it guarantees
//
//   - When Append, TruncateSuffix, TrimPrefix, Reset, SetStable or DeleteGroup returns nil, or the Wait
//     of their ticket does, the change is on stable storage. Each of them is there whole or not at all
//     after a crash: an Append of many entries, one that overwrites a tail, a term with its vote (D5, H9).
//   - A torn tail, which nobody was told about, is cut. Rot is told from it and is reported as
//     trivet.ErrCorrupt, never truncated away (H23); a damaged payload takes down its own entry only (H38).
//   - Read returns the bytes that were appended, or an error: trivet.ErrNotFound only for an entry that
//     the log does not hold, trivet.ErrCorrupt for one that it should hold and cannot give (H22, H24).
//   - A recycled segment cannot bring back the dead: every record carries, in its checksum, the random
//     incarnation of the segment that it was written for.
//   - After the first failed write or flush the whole log is poisoned: every later call fails with that
//     error and Options.Fatal is called once (H28).
//
// # How to use it
//
// Format once, then Open. Failed tells those who have nothing to write that the log is poisoned. Group gives
// the handle of one group; it needs no creation. Append waits for the disk; AppendAsync returns a Ticket that
// waits for that very write. Locate tells where an entry's payload stands, and pins it there; ReadAt reads a
// block in place. An owner that keeps such places over a restart opens with Options.Hold, pins what it needs,
// and calls Release. A log with a DataLane also takes blocks that have no entry, with Store: what an owner copies
// out of segments that it wants to have back, or gets from elsewhere.
//
// # What it leaves to its caller
//
// That one process at a time has the directory open; room on the disk (H26: a disk without room for the next
// file refuses entries with ErrNoSpace and still takes terms, votes and trims, up to an eighth of a segment and not
// over a restart: keep a reserve); when to trim (H1); and what entries mean. A lost directory, or a lost
// newest segment file, looks like an older log: compare with your own applied index (H4). Blocks of the data lane are
// not the log's to check: their owner has their checksums.
package segment
