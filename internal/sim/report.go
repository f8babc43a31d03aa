package sim

import (
	"fmt"
	"time"
)

// Report says what happened in a run.
type Report struct {
	Calls       int // reads, writes, discards, write-zeroes and flushes asked for while faults lasted
	Succeeded   int // of these
	Writes      int // acknowledged changes
	Reads       int // checked reads
	Probes      int // checked reads of single machines
	StaleWrites int // of fenced epochs, all refused or unanswered
	Faults      Faults
	Exits       int    // machines that stopped themselves because of a fault
	Refused     int    // replicas that were refused or reported because their disk had rotted
	Violations  int    // answers and states that must not be
	TakeOvers   int    //
	Changes     int    // of the members, finished
	Elections   uint64 // highest term

	WriterChanges int // a second writer came, or one of two went
	Leaders       int // changes of the highest term seen
	Restores      int // snapshots installed
	Flushes       int // flushes before log compaction
	Snapshots     int // made
	SnapReads     int // checked reads of snapshots and clones
	Rollbacks     int //
	Clones        int //
	Flips         int // blocks that were damaged under running machines
	Scrubs        int // passes over the whole volume
	Repaired      int // blocks, by these
	LongestGap    time.Duration
	Healed        time.Duration // from the end of the faults until the core served and agreed
	History       *History      // to be checked outside of the bubble
}

// String returns one line of figures, with the share of calls that were served and the floor below which a run says
// nothing, and one of faults by class.
func (r Report) String() string {
	share := 0
	if r.Calls > 0 {
		share = 100 * r.Succeeded / r.Calls
	}
	return fmt.Sprintf("calls=%d served=%d (%d%%, floor %d%%) writes=%d reads=%d probes=%d staleWrites=%d "+
		"crashes=%d exits=%d refused=%d takeovers=%d writers=%d changes=%d terms=%d leaders=%d restores=%d flushes=%d "+
		"longestGap=%v healed=%v violations=%d\n    snapshots=%d reads=%d rollbacks=%d clones=%d flips=%d scrubs=%d "+
		"repaired=%d\n    faults=%d: %v", r.Calls, r.Succeeded, share,
		int(100*activityFloor), r.Writes, r.Reads, r.Probes, r.StaleWrites, r.Crashes(), r.Exits, r.Refused,
		r.TakeOvers, r.WriterChanges, r.Changes, r.Elections, r.Leaders, r.Restores, r.Flushes,
		r.LongestGap.Round(time.Millisecond),
		r.Healed.Round(time.Millisecond), r.Violations, r.Snapshots, r.SnapReads, r.Rollbacks, r.Clones, r.Flips, r.Scrubs,
		r.Repaired, r.Faults.Sum(), r.Faults)
}

// Crashes returns how often a machine lost power.
func (r Report) Crashes() int {
	f := r.Faults
	return f[FaultCrash] + f[FaultCrashVote] + 3*f[FaultCrashAll] + f[FaultRot] + f[FaultWipe] + f[FaultReplace] +
		2*f[FaultSwap]
}

// Add adds the figures of another run; of gaps, terms and healing times it keeps the longest.
func (r *Report) Add(o Report) {
	r.Calls += o.Calls
	r.Succeeded += o.Succeeded
	r.Writes += o.Writes
	r.Reads += o.Reads
	r.Probes += o.Probes
	r.StaleWrites += o.StaleWrites
	for i, n := range o.Faults {
		r.Faults[i] += n
	}
	r.Exits += o.Exits
	r.Refused += o.Refused
	r.Violations += o.Violations
	r.TakeOvers += o.TakeOvers
	r.Changes += o.Changes
	r.WriterChanges += o.WriterChanges
	r.Elections = max(r.Elections, o.Elections)
	r.Leaders += o.Leaders
	r.Restores += o.Restores
	r.Flushes += o.Flushes
	r.Snapshots += o.Snapshots
	r.SnapReads += o.SnapReads
	r.Rollbacks += o.Rollbacks
	r.Clones += o.Clones
	r.Flips += o.Flips
	r.Scrubs += o.Scrubs
	r.Repaired += o.Repaired
	r.LongestGap = max(r.LongestGap, o.LongestGap)
	r.Healed = max(r.Healed, o.Healed)
}
