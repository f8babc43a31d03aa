// Package replication keeps a volume on several nodes and gives it to one of them as a
// trivet.Device.
//
// Volume is that Device. It runs on the node that holds the attachment, finds the replica that
// leads the volume's Raft group, numbers its requests and sends each again until one leader has
// answered it. Host runs the replicas of a node and answers such requests; Replica is one running
// copy. A write is one request in a log entry, gathered with others by the leader; the state
// machine of each copy applies it to its engine.Volume.
//
// What it guarantees:
//   - WriteAt, Discard and WriteZeroes return once a quorum has the request in its log on stable
//     storage and the leader has applied it. The Device is write-through: Flush has nothing to wait for.
//   - A request is applied at most once, and never after a later write to the same block, however
//     often it was sent (the session window, H39).
//   - A request of an older attachment is refused by the state machine of every replica (the fence,
//     H12), and the reads of that attachment end before Fence returns.
//   - A read returns the last acknowledged write of its block or a later one.
//   - A block whose checksum does not match is never applied and never returned (I12).
//
// What it leaves to its caller: granting epochs (the catalogue), choosing where replicas live,
// asking for Fence before a new attachment is used, and stopping the process when Fatal is called.
//
// DESIGN.md tells the path of a request, the formats and the failure cases.
package replication
