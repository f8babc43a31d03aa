// Package raftgroup runs one Raft group per volume: hashicorp/raft behind adapters that we own.
//
// It guarantees that every replica applies the same entries in the same order, that an entry whose
// Propose returned is on the stable storage of a quorum, and that ReadGate is true on one replica
// at a time at most. The library's known defects (D1 to D9, DESIGN.md) are dealt with in
// the adapters: its log, its vote, its snapshots, its messages and its reads all pass through code
// of this package, and nothing here needs a fork.
//
//	Create   writes the group's directory and its place in the disk's log, once, on the word of the catalogue
//	Open     checks that directory, state machine and log agree, and starts the replica
//	Propose  appends an entry; ReadGate says whether a read may be served here and now, by a lease; ReadRound asks
//	         a quorum
//	Close    stops it; Destroy removes the directory and what the log has of it
//
// What it leaves to its caller: where replicas are and who may change that, retries, and what the
// entries mean (StateMachine). DESIGN.md tells the path of a message and the failure cases.
package raftgroup

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/time/rate"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
	"github.com/trivet-csi/trivet/internal/stage"
)

const (
	// EntryBytesMax is the largest proposal in bytes.
	EntryBytesMax = 1 << 20

	// WantBytesMax is the largest StateMachine.Want in bytes.
	WantBytesMax = 1 << 10

	// MembersMax is the largest number of members of one group, learners included.
	MembersMax = 32

	heartbeatDefault     = time.Second
	snapshotBytesDefault = 64 << 20
	cutBytesDefault      = 256 << 20
	appendEntriesMax     = 32      // entries in one AppendEntries
	appendBytesMax       = 4 << 20 // bytes of entries in one AppendEntries; one entry may pass it
	tellCommitDefault    = time.Second
	proposalsMax         = 1024 // waiting for an answer, per group
)

// Member is one replica in a group's configuration.
type Member struct {
	Replica trivet.ReplicaID
	Node    trivet.NodeID
	Learner bool // no vote yet
}

// Entry is one committed log entry. Exactly one of Data and Members is set.
type Entry struct {
	Index, Term uint64
	Data        []byte // a proposal; valid only during Apply, and never to be written to
	// Stored is where the blocks at the end of Data (Config.PayloadAt) stand in the disk's log, on stable storage.
	// Its segment is pinned until Apply returns. Bytes is 0 when the entry has no blocks, or the log no such entry.
	Stored  segment.Place
	Members []Member // a configuration change
}

// StateMachine is what a group replicates. Apply is called by one goroutine at a time; Flush, Image
// and Applied may be called while it runs; Restore is called while nothing else is but Applied.
type StateMachine interface {
	// Apply applies entries in order, skipping those at or below Applied, as one atomic step with
	// the applied index, and returns one result per entry (nil for skipped and configuration entries).
	// A non-nil error is an I/O error or damage: the group calls Config.Fatal and answers nothing more.
	Apply(entries []Entry) ([]any, error)
	// Applied returns index and term of the last applied entry (memory view). 0,0 for a new one.
	Applied() (index, term uint64)
	// Flush makes everything applied durable and returns the applied index read back from durable state.
	Flush() (index uint64, err error)
	// Want says what this machine has, so that another replica's Image can leave it out: at most
	// WantBytesMax, meaningful to the same kind of machine only. nil = everything is wanted. While
	// Restoring it also says how far the Restore got.
	Want() []byte
	// Image pins a consistent image: the state at the Applied index of this moment, or what turns the
	// state of a machine with that Want into it.
	Image(want []byte) (Image, error)
	// Restore brings the state to that of an image. Durable when it returns. It may be repeated after a
	// crash or an error, with another image made for the Want of then; until one has finished,
	// Restoring is true, across restarts too. ErrInvalid, and nothing is changed: the image is older than
	// Applied, or it leaves out what this machine has and is older than what a begun Restore has taken. A
	// whole one (of Want nil) is good whatever was begun. ErrCorrupt: the image is damaged, and another one
	// may be tried; ErrNoSpace: it may be tried again. Other errors than these and those of r are fatal.
	Restore(r io.Reader) error
	// Restoring reports an interrupted Restore (H5).
	Restoring() bool
}

// Image is a pinned image of a state machine.
type Image interface {
	io.ReadCloser
	// Size estimates the bytes of the whole image, for progress only: it may turn out longer or shorter.
	Size() int64
}

// Timing holds the periods of a group. They must be the same on all its members.
type Timing struct {
	Heartbeat time.Duration // follower gives up on a silent leader after 1..1.5 of these; 0 = 1 s
	Lease     time.Duration // read lease from send time; 0 = 0.75 Heartbeat; must be < Heartbeat
}

func (t Timing) withDefaults() Timing {
	if t.Heartbeat == 0 {
		t.Heartbeat = heartbeatDefault
	}
	if t.Lease == 0 {
		t.Lease = t.Heartbeat * 3 / 4
	}
	return t
}

// Config says which replica of which group to run, and on what.
type Config struct {
	Group   trivet.VolumeID
	Replica trivet.ReplicaID
	FS      vfs.FS // vfs.Default when nil
	Dir     string // owned by the group: superblock and snapshot
	// Log is the log of the disk that Dir is on. It keeps the group's entries, term and vote, under its
	// Group, so no two replicas of a group may share one. It must be open for as long as the group is. An
	// entry must fit into a quarter of a segment on every member: 8 MiB segments take any. Must be set.
	Log     *segment.Log
	Network *Mux
	Machine StateMachine
	// PayloadAt, when set, returns where in a proposal's data the blocks of trivet.BlockSize begin that run to its end;
	// its length when there are none. The log keeps them at a multiple of the block size, so that the machine can
	// refer to them there (Entry.Stored). It must be total, and always answer the same for the same data.
	PayloadAt func(data []byte) int
	Timing    Timing
	// TellCommit is how soon followers hear of a committed entry that no other follows: after one to two of these. Each
	// such entry then costs a message to each follower. 0 = 1 s; at least 1 ms.
	TellCommit time.Duration
	// SnapshotBytes of log stay when it is compacted, each entry counted in pages of 4 KiB, as it takes them on the disk.
	// 0 = 64 MiB. Up to three times as much is kept for followers that lag, and 16 times for one that pulls the state.
	SnapshotBytes int64
	// CutBytes of log are written from one compaction to the next: it flushes the machine and writes a snapshot record.
	// 0 = SnapshotBytes, or 256 MiB where these are 0 too. No more than SnapshotBytes while Tight, if set, reports that
	// the disk runs full.
	CutBytes int64
	Tight    func() bool
	// OverlapFlush lets a leader send entries while its own disk still flushes them; what is answered and applied
	// still waits for both (durable.go). Members may differ in it.
	OverlapFlush bool
	// Stages is where appends to the log and the way to followers are measured; nil = not at all.
	Stages *stage.Volume
	Logger *slog.Logger // nil = discard
	// Fatal is told of an I/O error or a broken invariant and must stop the process. It is called
	// once, with locks held: it must not call the group. If it returns, as in tests, the group answers
	// nothing more. Must be set.
	Fatal func(error)
	// Damaged, when set, is told in place of Fatal that an entry of the group's own log cannot be read any more. It is
	// called once, with locks held: it must not block nor call the group, and have it closed and opened again. Until
	// then the group is as dead as after Fatal: nothing leaves it, so the others elect another leader. Open cuts the log
	// behind entries that the state machine has, and refuses the replica for any other, as after a restart (rot.go).
	// What else fails meanwhile is told by Open, or by the log's own Fatal. nil: damage is told to Fatal.
	Damaged func(error)
	// MendLog opens a replica whose log has entries that are damaged and that the state machine has not applied: it takes
	// no part in the group (Status.Damaged) until it has them from other members, and then goes on under its name. So
	// it is for a group that nobody else makes replicas for. false: Open returns ErrCorrupt. Entries that the state
	// machine has are cut off in both cases.
	MendLog bool
	// IsMember answers, from the catalogue, whether a replica that the group's own configuration
	// does not know is a member on that node: a follower that lags far behind needs it to accept
	// its leader. nil = the group's own configuration alone decides.
	IsMember func(trivet.ReplicaID, trivet.NodeID) bool

	// Recover makes this replica the only voter before it starts: see recover.go, and only after everybody else was
	// given up. Again: no effect. With MendLog, a log with damaged entries ends before the first that the state machine
	// does not have (Status.WholeIndex).
	Recover bool
	// RecoverLearners stay in the group as learners when Recover gives up the others: replicas that live, and whose logs
	// the caller has seen to be no newer than this one's.
	RecoverLearners []Member
	// RestedSince is since when, at the latest, no process has run this replica; the zero time when that
	// is not known. Within a Heartbeat of the end of an earlier run a replica votes for nobody, because it
	// may have promised so (lease.go); the group of a volume that was parked need not wait for that.
	RestedSince time.Time
	// CatchUpLimit bounds in bytes per second what this replica pulls of the state of others; shared by the
	// groups of a process, it bounds them together. Its burst, at least 1, is what may pass at once. nil = no
	// limit.
	CatchUpLimit *rate.Limiter
	// Background, unless nil, is asked before each piece of a state of others is restored here, and before each that
	// others pull is read: it returns when that does not disturb anybody, or when ctx ends, and release is called when
	// the disk has done it. Nothing waits for another node in between.
	Background func(ctx context.Context, bytes int) (release func(), err error)
	// BootTime is a clock that also runs while the machine is suspended, from any origin. nil = the
	// kernel's CLOCK_BOOTTIME where there is one.
	BootTime func() time.Duration

	pieceBytes int // of images that this replica shows; tests have small ones
}

// Validate returns ErrInvalid naming the first field that Open cannot work with.
func (c Config) Validate() error {
	if err := c.validateLog(); err != nil {
		return err
	}
	t := c.Timing.withDefaults()
	var what string
	switch {
	case c.Network == nil:
		what = "network is nil"
	case c.Machine == nil:
		what = "machine is nil"
	case c.Fatal == nil:
		what = "fatal is nil"
	case t.Heartbeat < 20*time.Millisecond:
		what = fmt.Sprintf("heartbeat %v is below 20ms", t.Heartbeat)
	case t.Lease <= 0 || t.Lease >= t.Heartbeat:
		what = fmt.Sprintf("lease %v is not below the heartbeat %v", t.Lease, t.Heartbeat)
	case c.TellCommit != 0 && c.TellCommit < time.Millisecond:
		what = fmt.Sprintf("time to tell of a commit %v is below 1ms", c.TellCommit)
	case c.SnapshotBytes < 0:
		what = "snapshot bytes are negative"
	case c.CutBytes < 0:
		what = "cut bytes are negative"
	default:
		return nil
	}
	return fmt.Errorf("group %s: %s: %w", c.Group, what, trivet.ErrInvalid)
}

// validateLog checks the fields that Create and Destroy use.
func (c Config) validateLog() error {
	if c.Log == nil {
		return fmt.Errorf("group %s: log is nil: %w", c.Group, trivet.ErrInvalid)
	}
	return c.validateStore()
}

// validateStore checks the fields that Exists uses.
func (c Config) validateStore() error {
	if c.Dir == "" {
		return fmt.Errorf("group %s: dir is empty: %w", c.Group, trivet.ErrInvalid)
	}
	if err := validateReplicaID(c.Replica); err != nil {
		return fmt.Errorf("group %s: %w", c.Group, err)
	}
	return nil
}

func (c Config) withDefaults() Config {
	c.Timing = c.Timing.withDefaults()
	c.TellCommit = cmp.Or(c.TellCommit, tellCommitDefault)
	if c.FS == nil {
		c.FS = vfs.Default
	}
	if c.SnapshotBytes == 0 {
		c.SnapshotBytes = snapshotBytesDefault
		c.CutBytes = cmp.Or(c.CutBytes, cutBytesDefault)
	}
	c.CutBytes = cmp.Or(c.CutBytes, c.SnapshotBytes)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.BootTime == nil {
		c.BootTime = bootTime
	}
	if c.pieceBytes == 0 {
		c.pieceBytes = pieceBytes
	}
	return c
}
