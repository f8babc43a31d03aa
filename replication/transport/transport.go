// Package transport carries messages between nodes: requests with one reply each, multiplexed over
// one mutually authenticated TLS 1.3 connection per direction and pair of nodes.
//
// It knows nothing of Raft. raftgroup sends Raft RPCs over it and replication sends volume I/O;
// each registers a handler per Kind. A node is addressed by its NodeID; an AddressBook, fed by the
// catalogue, says where it listens. The sender that a handler sees is the one in the peer's
// certificate, never one that the message claims.
//
// What it guarantees: a message arrives whole or not at all, and is at most MessageBytesMax; an urgent
// one (heartbeats, votes and their like) waits for at most one frame of 64 KiB that is being written;
// the groups share what is left by bytes, so one with a deep queue does not hold up the others; a
// malformed frame ends its connection and no other; and everything is bounded (Limits). It also
// watches the processes of other nodes: see Watcher.
//
// Network is the seam for tests: Memory is the same thing within one process, with faults.
package transport

import (
	"context"

	"github.com/trivet-csi/trivet"
)

// Kind says which handler a message is for. Values are part of the wire format.
type Kind uint8

// The message kinds. Raft kinds belong to raftgroup, the others to replication, node and controller.
const (
	KindAppendEntries  Kind = 1
	KindRequestVote    Kind = 2
	KindRequestPreVote Kind = 3
	KindTimeoutNow     Kind = 4
	// 5 to 7 pushed a snapshot to a follower; retired before any release.
	KindHeartbeats Kind = 8  // of many groups at once
	KindStanding   Kind = 9  // who should succeed a leader whose process is gone
	KindTransfer   Kind = 10 // the leader announces whom it hands over to
	KindFetch      Kind = 11 // the leader tells a follower to pull its state, and asks how far it is
	KindImageOpen  Kind = 12 // a follower pulls: pin an image of the state
	KindImageRead  Kind = 13 // a piece of it
	KindImageClose Kind = 14 // let it go
	KindLogEntry   Kind = 15 // a replica whose log is damaged asks for an entry of it

	KindVolumeWrite    Kind = 16 // replication: write, discard, write-zeroes proposals
	KindVolumeRead     Kind = 17
	KindVolumeStatus   Kind = 18
	KindVolumeStages   Kind = 24 // watch a volume for a while
	KindVolumeFreeze   Kind = 27 // the holder of a volume has its group make a snapshot
	KindVolumeSnapRead Kind = 28 // read what a snapshot shows
	KindVolumeDelta    Kind = 29 // list what two snapshots show differently

	KindVolumeMark  Kind = 30 // pin a volume at a mark in its log, and tell its digest there
	KindVolumeScrub Kind = 31 // compare and repair the blocks of replicas

	KindMetaPropose Kind = 32 // controller: forward a catalogue command to the leader
	KindMetaRead    Kind = 33

	KindSnapshotBarrier Kind = 38 // node: a step of making a group of snapshots at one point
	KindVolumeAllocated Kind = 39 // replication: list the blocks that hold data
	KindVolumeUsage     Kind = 40 // what a replica's blocks are there for
)

// MessageBytesMax bounds a whole message, header included. The largest is an AppendEntries of
// 4 MiB (raft-and-pebble.md section 2.3) with its entry headers.
const MessageBytesMax = 8 << 20

// Message is one request or reply.
type Message struct {
	Kind  Kind
	Group trivet.VolumeID  // MetaGroup for the catalogue
	From  trivet.ReplicaID // sending replica, for Raft kinds; empty otherwise
	To    trivet.ReplicaID // addressed replica, for Raft kinds; empty otherwise
	Body  []byte           // encoded by the user of Kind; the receiver owns it
}

// Handler answers one request. The reply's Kind and Group are filled in by the transport. An
// error reaches the caller with its sentinel (errors.Is works across the wire) and its text.
// Handlers run concurrently, one goroutine each, in no particular order; ctx ends when the caller
// gives up or the connection ends. The handler owns m.Body for good, and gives its reply's Body away:
// what is received is not pooled, because the log's cache keeps the entries of an AppendEntries as
// they came, and a buffer that is reused under a reader is the worst kind of damage (H25).
type Handler func(ctx context.Context, from trivet.NodeID, m Message) (Message, error)

// Network sends messages and hands received ones to handlers. It is safe for concurrent use.
type Network interface {
	// Local returns the node whose certificate this end presents.
	Local() trivet.NodeID

	// Call sends m to a node and waits for its reply. A message to Local is handed to the handler
	// directly. It returns ErrUnavailable when the node cannot be reached or the connection breaks
	// before the reply (the outcome is then unknown), or what the handler returned.
	// m.Body may be reused once Call returns.
	Call(ctx context.Context, to trivet.NodeID, m Message) (Message, error)

	// Handle registers the handler of a kind. It panics when the kind has one already.
	// REQUIRES: called before the first message of that kind may arrive.
	Handle(kind Kind, h Handler)
}

// AddressBook says where nodes listen, as host:port. The zero result means unknown.
type AddressBook interface {
	Address(node trivet.NodeID) string
}
