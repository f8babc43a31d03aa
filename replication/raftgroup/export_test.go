package raftgroup

import (
	"time"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
)

// What the contract tests need from inside.

// VerifyLeader asks the library whether it leads, which is what reads must not rest on (D3, D4).
func VerifyLeader(g *Group) error { return g.running().r.VerifyLeader().Error() }

// StartVerify is VerifyLeader in two steps.
func StartVerify(g *Group) func() error { return g.running().r.VerifyLeader().Error }

// RaftApply proposes past our own check for leadership.
func RaftApply(g *Group, data []byte) error { return g.running().r.Apply(data, 0).Error() }

// RaftTerm is the library's current term.
func RaftTerm(g *Group) uint64 { return g.running().r.CurrentTerm() }

// TimeoutNowBody is what g, as leader, would send to a follower now.
func TimeoutNowBody(g *Group, to trivet.ReplicaID) []byte {
	return timeoutNow{term: RaftTerm(g), stamp: g.lease.stamp(to)}.encode()
}

// OldTimeoutNowBody carries a clock reading that is too old.
func OldTimeoutNowBody(g *Group, to trivet.ReplicaID, age time.Duration) []byte {
	return timeoutNow{term: RaftTerm(g), stamp: g.lease.stamp(to) - uint64(age)}.encode()
}

// VoteBody is a RequestVote, by one who says that the leader asked it to stand if transfer.
func VoteBody(term, lastIndex, lastTerm uint64, transfer bool) []byte {
	why := byElection
	if transfer {
		why = byTransfer
	}
	return voteRequest{term, lastIndex, lastTerm, why}.encode()
}

// ProofVoteBody is a RequestVote by one who says that the leader's process is gone.
func ProofVoteBody(term, lastIndex, lastTerm uint64) []byte {
	return voteRequest{term, lastIndex, lastTerm, byProof}.encode()
}

// StandingBody asks who knows that the leader of a term is gone, Proven reads the answer, and
// TransferBody announces a handover.
func StandingBody(term uint64) []byte { return standingRequest{term: term}.encode() }

// Proven reads the answer to StandingBody.
func Proven(body []byte) (bool, error) {
	s, err := decodeStanding(body)
	return s.proven, err
}

// TransferBody announces a handover.
func TransferBody(term uint64, to trivet.ReplicaID) []byte {
	return transferNotice{term: term, to: to}.encode()
}

// Granted reads the answer to VoteBody.
func Granted(body []byte) (term uint64, yes bool, err error) {
	v, err := decodeVerdict(body)
	return v.term, v.yes, err
}

// AppendBody is an AppendEntries of one command; IsHeartbeatBody and LogEntries look into one.
func AppendBody(term, prevIndex, prevTerm uint64, data []byte) []byte {
	r := &raft.AppendEntriesRequest{Term: term, PrevLogEntry: prevIndex, PrevLogTerm: prevTerm}
	if data != nil {
		r.Entries = []*raft.Log{{Index: prevIndex + 1, Term: term, Data: data}}
	}
	b, err := encodeAppend(r)
	if err != nil {
		panic(err)
	}
	return b
}

// CommitBody is AppendBody by a leader that has committed up to an index.
func CommitBody(term, prevIndex, prevTerm, commit uint64, data []byte) []byte {
	r, err := decodeAppend(AppendBody(term, prevIndex, prevTerm, data))
	if err != nil {
		panic(err)
	}
	r.LeaderCommitIndex = commit
	b, err := encodeAppend(r)
	if err != nil {
		panic(err)
	}
	return b
}

// Appended reads the answer to AppendBody.
func Appended(body []byte) (success bool, lastLog uint64, err error) {
	r, err := decodeAppendReply(body)
	return r.success, r.lastLog, err
}

// AppendAfter returns the entry that an AppendEntries goes on from.
func AppendAfter(body []byte) uint64 {
	r, err := decodeAppend(body)
	if err != nil {
		return 0
	}
	return r.PrevLogEntry
}

// IsHeartbeatBody reports whether an AppendEntries is a heartbeat.
func IsHeartbeatBody(body []byte) bool {
	r, err := decodeAppend(body)
	return err == nil && isHeartbeat(r)
}

// FetchBody says that the leader's state goes to the end of its log, and must be pulled.
func FetchBody(g *Group) []byte {
	_, last := g.seglog.bounds()
	term, _ := g.seglog.term(last)
	rec := snapshotRecord{index: last, term: term, machine: last, config: g.store.latestConfig()}
	return fetchAsk{term: RaftTerm(g), rec: rec}.encode()
}

// Fetched reads the answer to FetchBody.
func Fetched(body []byte) (done bool, index uint64, err error) {
	r, err := decodeFetchReply(body)
	return r.done, r.at.index, err
}

// ImageOpenBody asks for a whole image; ImageOpened reads the answer.
func ImageOpenBody() []byte { return imageOpen{}.encode() }

// ImageOpened reads the answer to ImageOpenBody.
func ImageOpened(body []byte) (id uint64, err error) {
	r, err := decodeImageOpened(body)
	return r.id, err
}

// ImageReadBody asks for a piece; IsKeepAlive tells whether such a message asks for none.
func ImageReadBody(id, offset uint64) []byte { return imageRead{id, offset}.encode() }

// IsKeepAlive reports whether an ImageRead asks for nothing.
func IsKeepAlive(body []byte) bool {
	r, err := decodeImageRead(body)
	return err == nil && r.offset == keepAlive
}

// EntryAskBody asks for an entry of the log; EntryGiven reads the answer.
func EntryAskBody(index, term uint64) []byte { return entryAsk{index: index, term: term}.encode() }

// EntryGiven reports whether an answer to EntryAskBody has the entry.
func EntryGiven(body []byte) (bool, error) {
	e, err := decodeEntryReply(body)
	return e != nil, err
}

// Restored reports whether an ImageClose says that all was restored.
func Restored(body []byte) bool {
	r, err := decodeImageClose(body)
	return err == nil && r.restored
}

// OpenImages returns how many images a replica shows, and those of its process.
func OpenImages(g *Group) (own, process int) {
	g.images.mu.Lock()
	defer g.images.mu.Unlock()
	return len(g.images.open), len(g.images.budget)
}

// SetPieceBytes sets the size of the pieces of images.
func SetPieceBytes(c *Config, n int) { c.pieceBytes = n }

// LogBounds returns the first and last index of the log.
func LogBounds(g *Group) (first, last uint64) { return g.seglog.bounds() }

// SnapshotIndex returns the index of the recorded snapshot.
func SnapshotIndex(g *Group) uint64 { return g.snaps.record().index }

// AppendCommitBody is an AppendEntries without entries that tells of a commit.
func AppendCommitBody(term, prevIndex, prevTerm, commit uint64) []byte {
	return mustAppend(&raft.AppendEntriesRequest{
		Term: term, PrevLogEntry: prevIndex, PrevLogTerm: prevTerm, LeaderCommitIndex: commit,
	})
}

// OpenImages returns how many images the groups of a process show.
func (m *Mux) OpenImages() int { return len(m.images) }

// ForgeDone turns the answer to FetchBody into one that claims to be done at an entry.
func ForgeDone(body []byte, index, term uint64) []byte {
	r, err := decodeFetchReply(body)
	if err != nil {
		panic(err)
	}
	r.done, r.at = true, logPosition{term: term, index: index}
	return r.encode()
}

// LogTerm returns the term of an entry of the log.
func LogTerm(g *Group, index uint64) uint64 {
	term, _ := g.seglog.term(index)
	return term
}

// Adopt makes a follower or candidate follow a newer term, as if from had asked for votes in it.
func Adopt(g *Group, term uint64, from trivet.ReplicaID) { g.running().adopt(term, from) }

// Resting returns how many calls of the library rest.
func Resting(g *Group) int { return int(g.running().t.rests.n.Load()) }

// RestBehind rests in the place of a follower's call, which was told of so many commits less than there are.
func RestBehind(g *Group, id trivet.ReplicaID, behind uint64) (woken <-chan struct{}) {
	i := g.running()
	_, last := g.seglog.bounds()
	return i.t.rests.enter(id, i.r.CurrentTerm(), told{match: last, commit: i.t.commit(i) - behind})
}

// Expected returns how many proposals wait for their results.
func Expected(g *Group) int {
	g.fsm.expected.mu.Lock()
	defer g.fsm.expected.mu.Unlock()
	return len(g.fsm.expected.by)
}

// Refused proposes past everything of ours, and reports whether the library has refused at once.
func Refused(g *Group, data []byte) (refusal bool, err error) {
	f := g.running().r.Apply(data, time.Minute)
	return refused(f), f.Error()
}

// StopRaft stops the library behind our back.
func StopRaft(g *Group) error { return g.running().r.Shutdown().Error() }
