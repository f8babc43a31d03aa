package sim

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"github.com/trivet-csi/trivet"
)

// Fault is a class of faults.
type Fault int

// The classes that the nemesis draws from. Faults of the links (loss, duplicates, delay, reorder), slow
// flushes and skewed timers last for the whole run and have no class.
const (
	FaultCrash      Fault = iota // power cut of one machine, at or between operations on its disk
	FaultCrashAll                // of all
	FaultRestart                 // orderly stop
	FaultIsolate                 // one machine is cut off
	FaultOneWay                  // one direction of one link is cut
	FaultBridge                  // two machines see a third, but not each other
	FaultClog                    // one direction of a link holds everything
	FaultHoldWrite               // some of the volume's requests are held over elections (H39)
	FaultHoldLog                 // some of the log's requests are held
	FaultHoldReply               // some of the log's replies are held (D4)
	FaultDepose                  // a leader is deposed and does not notice (H8, D9)
	FaultReplay                  // requests of the last seconds arrive again
	FaultPause                   // a machine stands still: its messages both ways and its log
	FaultTransfer                // leadership moves
	FaultTakeOver                // the volume moves, the old holder goes on (H12)
	FaultStall                   // the log's flushes hang (D8, H27)
	FaultEIO                     // one operation on a disk fails (H28)
	FaultENOSPC                  // all that need room fail (H26)
	FaultNearlyFull              // the disk says that it is nearly full
	FaultRot                     // a bit flips on the disk of a machine that is down (H22, H23)
	FaultMemory                  // a bit flips in memory (H25)
	FaultWipe                    // a machine comes back with an empty disk (H10)
	FaultSwap                    // two machines come back with each other's disk (H11)
	FaultResize                  // the volume grows (H20)
	FaultMove                    // a replica joins the group, another leaves it (H33)
	FaultReplace                 // a disk is lost for good, its replica replaced under a new name (H10)
	FaultHoldBeat                // answers to heartbeats are held, and arrive together (D4, H8)
	FaultSuspend                 // a machine is suspended: a pause in which only its boot clock runs on (H29)
	FaultClock                   // a machine's boot clock jumps forward (H29)
	FaultCrashVote               // power cut of a machine while it votes (D5)
	FaultSnapshot                // a snapshot is made, read, compared with another, or deleted
	FaultRollback                // the volume is set back to a snapshot
	FaultFlip                    // bits of a block flip under a running machine, and the volume is scrubbed (H22, H24)
	FaultClean                   // a machine cleans its log and sweeps, with a power cut or without (H6)
	faultN
)

// class says how a class is drawn.
type class struct {
	name      string
	perMinute float64 // at most
}

// classes are the ranges of hazards.md, section 3, cut down where an hour of them would leave nothing
// that is served: a machine that is down takes seconds to come back.
func classes() [faultN]class {
	return [faultN]class{
		FaultCrash: {"crash", 8}, FaultCrashAll: {"crashAll", 0.7}, FaultRestart: {"restart", 2},
		FaultIsolate: {"isolate", 3}, FaultOneWay: {"oneWay", 3}, FaultBridge: {"bridge", 2}, FaultClog: {"clog", 2},
		FaultHoldWrite: {"holdWrite", 4}, FaultHoldLog: {"holdLog", 2}, FaultHoldReply: {"holdReply", 3},
		FaultDepose: {"depose", 4}, FaultReplay: {"replay", 6}, FaultPause: {"pause", 4},
		FaultTransfer: {"transfer", 6}, FaultTakeOver: {"takeOver", 6}, FaultStall: {"stall", 1.5},
		FaultEIO: {"eio", 2}, FaultENOSPC: {"enospc", 0.7}, FaultNearlyFull: {"nearlyFull", 0.7},
		FaultRot: {"rot", 1}, FaultMemory: {"memory", 6}, FaultWipe: {"wipe", 0.3}, FaultSwap: {"swap", 0.5},
		FaultResize: {"resize", 1}, FaultMove: {"move", 2}, FaultReplace: {"replace", 0.3},
		FaultHoldBeat: {"holdBeat", 4}, FaultSuspend: {"suspend", 1.5}, FaultClock: {"clock", 2},
		FaultCrashVote: {"crashVote", 3},
		FaultSnapshot:  {"snapshot", 12}, FaultRollback: {"rollback", 1.5}, FaultFlip: {"flip", 2}, FaultClean: {"clean", 3},
	}
}

// String returns the name of the class in reports.
func (f Fault) String() string { return classes()[f].name }

// ParseFault returns the class of that name; ErrInvalid when there is none.
func ParseFault(name string) (Fault, error) {
	for i, c := range classes() {
		if c.name == name {
			return Fault(i), nil
		}
	}
	return 0, fmt.Errorf("no class of faults is called %q: %w", name, trivet.ErrInvalid)
}

// swarm is what one seed does more or less of: each leaves out about half of the classes and draws the
// rates of the others, because runs that do a bit of everything find less than runs that differ (Groce
// et al., Swarm Testing, ISSTA 2012).
type swarm struct {
	replicas        int
	spares          int             // machines without a replica, at first
	rates           [faultN]float64 // per minute
	drop, duplicate float64
	delayMean       time.Duration
	flush           time.Duration // mean latency of a flush of the log
	skew            []float64
	unsyncedPercent int // -1: drawn anew at each crash
	snapshotBytes   int64
	overlap         bool  // HostConfig.OverlapFlush
	session         bool  // the holder reads by ReadSession
	staleWriter     bool  // a holder of an old epoch that never gives up
	writers         bool  // a second writer comes and goes
	sweepRate       int   // engine.Config.SweepRate: a low one has volumes lie upon others for long; 0 = the default
	logCacheBytes   int64 // little has entries read from the disk, where bits may have flipped; 0 = the default: none is
}

// ratesMax bounds the faults of all classes together, per minute.
const ratesMax = 24

func drawSwarm(seed uint64) swarm {
	rnd := newRand(seed, 1)
	s := swarm{
		replicas:        3,
		delayMean:       time.Duration(logUniform(rnd, 0.5, 40) * float64(time.Millisecond)),
		snapshotBytes:   int64(logUniform(rnd, 64<<10, 2<<20)),
		unsyncedPercent: []int{-1, 0, 25, 50, 75, 100}[rnd.IntN(6)],
		staleWriter:     rnd.IntN(2) == 0,
	}
	if rnd.IntN(6) == 0 {
		s.replicas = 5
	}
	if rnd.IntN(2) == 0 {
		s.drop = logUniform(rnd, 0.001, 0.05)
	}
	if rnd.IntN(2) == 0 {
		s.duplicate = rnd.Float64() * 0.5
	}
	if rnd.IntN(2) == 0 {
		s.flush = time.Duration(logUniform(rnd, 0.1, 60) * float64(time.Millisecond))
	}
	if rnd.IntN(3) == 0 {
		for range s.replicas {
			// The fence waits a quarter longer than a lease; two clocks that differ by more break it.
			s.skew = append(s.skew, 0.9+0.2*rnd.Float64())
		}
	}
	sum := 0.0
	all := classes()
	for i, c := range all[:FaultSnapshot] {
		if rnd.IntN(2) == 0 || Fault(i) == FaultCrash {
			s.rates[i] = c.perMinute * (0.1 + 0.9*rnd.Float64())
			sum += s.rates[i]
		}
	}
	for i := range s.rates {
		s.rates[i] *= min(1, ratesMax/sum)
	}
	s.session = rnd.IntN(5) == 0
	s.overlap = rnd.IntN(2) == 0
	s.spares = 1 + rnd.IntN(2)
	s.drawGenerations(newRand(seed, 13))
	s.writers = !s.session && s.rates[FaultSnapshot] == 0 && newRand(seed, 24).IntN(2) == 0
	return s
}

// drawGenerations draws what is done to snapshots, and to blocks that lie still. These come on top of the other classes
// and do not thin them out: most of them are requests, and no faults.
func (s *swarm) drawGenerations(rnd *rand.Rand) {
	for f := FaultSnapshot; f < faultN; f++ {
		if rnd.IntN(2) == 0 {
			s.rates[f] = classes()[f].perMinute * (0.1 + 0.9*rnd.Float64())
		}
	}
	if s.rates[FaultRollback]+s.rates[FaultClean] > 0 && s.rates[FaultSnapshot] == 0 {
		s.rates[FaultSnapshot] = classes()[FaultSnapshot].perMinute / 2 // or there is nothing to go back to
	}
	if rnd.IntN(2) == 0 {
		s.sweepRate = int(logUniform(rnd, 10, 100))
	}
	if rnd.IntN(2) == 0 {
		s.logCacheBytes = int64(logUniform(rnd, 16<<10, 512<<10))
	}
}

// alone takes out what the oracle does not know how to judge where two write: what snapshots show.
func (s *swarm) alone() {
	for _, f := range []Fault{FaultSnapshot, FaultRollback, FaultClean} {
		s.rates[f] = 0
	}
}

// logUniform draws from [least, most], small values as often as large ones.
func logUniform(rnd *rand.Rand, least, most float64) float64 {
	return least * math.Exp(rnd.Float64()*math.Log(most/least))
}

// only leaves the given classes and nothing else, and makes them frequent.
func (s *swarm) only(fs []Fault) {
	s.rates = [faultN]float64{}
	for _, f := range fs {
		s.rates[f] = 3 * classes()[f].perMinute
	}
}

// overlapped turns OverlapFlush on, with flushes that take their time: what is in memory only must be there for a
// crash to take.
func (s *swarm) overlapped(seed uint64) {
	s.overlap = true
	s.flush = max(s.flush, time.Duration(logUniform(newRand(seed, 12), 2, 100)*float64(time.Millisecond)))
}

func (s *swarm) total() float64 {
	sum := 0.0
	for _, r := range s.rates {
		sum += r
	}
	return sum
}

// draw returns the pause to the next fault and its class.
func (s *swarm) draw(rnd *rand.Rand) (time.Duration, Fault) {
	total := s.total()
	pause := time.Duration(rnd.ExpFloat64() * float64(time.Minute) / total)
	k := rnd.Float64() * total
	for f, r := range s.rates {
		if k -= r; k < 0 && r > 0 {
			return pause, Fault(f)
		}
	}
	return pause, FaultCrash
}

// Faults counts faults by class.
type Faults [faultN]int

// Sum returns how many there were, of all classes.
func (f Faults) Sum() int {
	n := 0
	for _, k := range f {
		n += k
	}
	return n
}

// String lists the classes that occurred.
func (f Faults) String() string {
	var b strings.Builder
	for i, n := range f {
		if n > 0 {
			if b.Len() > 0 {
				b.WriteByte(' ')
			}
			b.WriteString(Fault(i).String())
			b.WriteByte('=')
			b.WriteString(strconv.Itoa(n))
		}
	}
	return b.String()
}
