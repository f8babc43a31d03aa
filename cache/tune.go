package cache

import (
	"math"
	"math/rand/v2"
	"time"
)

// What write-back may work with: longest requests of 64 to 128 KiB, 8 to 32 under way.
var (
	// Nothing in between: a write of 64 KiB, as those of streams are, does not fit in behind another then.
	sizeSteps = [...]int{pieceBlocks, flightBlocksMax}
	// Steps of a third and more: what a smaller one changes would be lost in betterBy.
	depthSteps = [...]int{8, 12, depthDefault, 24, adaptiveDepthMax}
)

const (
	flightBlocksMax  = 2 * pieceBlocks
	adaptiveDepthMax = 32

	// trialTime and trialRounds are how long an interval of a trial lasts at least: so long, and until each request of
	// the largest depth has been replaced so many times. What ends in the first round was sent before it began.
	trialTime   = 100 * time.Millisecond
	trialRounds = 4
	// powerRate is r of the generalised power: how much more the rate weighs than the latency.
	powerRate = 8
	// betterBy is by how much a candidate must win, as a rate at equal latency; less is noise.
	betterBy = 1.02
	// restMax bounds how many intervals pass between trials that change nothing; it doubles up to there.
	restMax = 64
)

// workMode is what write-back works with.
type workMode struct {
	blocks int // of the longest request
	depth  int // requests under way
}

// tuner finds the workMode by trials while the storage is kept busy. It is pure: time comes in as arguments.
//
// The rule is that of PCC (Dong, Li, Zarchy, Godfrey and Schapira, "PCC: Re-architecting Congestion Control for
// Consistent High Performance", NSDI 2015, section 3.2, randomised controlled trials): four intervals, two with what is
// in force and two with the candidate, in random order in each half; the candidate wins if it was better in both
// halves. Then it is in force, and the next candidate lies one step further; if it did not win, the next trial is of
// the other direction, then of the other setting. What is better is the generalised power rate^r/latency (Kleinrock,
// "Power and Deterministic Rules of Thumb for Probabilistic Problems in Computer Communications", ICC 1979; the
// operating point that BBR looks for too): more is put under way as long as it gets more done, and no more, for what is
// beyond that only makes flushes and reads wait.
//
// Vegas and gradients of the latency were not taken, as both have to know the latency of the idle storage, and here a
// longer request takes longer by right.
type tuner struct {
	rand *rand.PCG

	at   [2]int // place in sizeSteps and depthSteps of what is in force
	knob int    // what the trial is about
	up   bool   // in which direction
	lost int    // trials in a row that changed nothing

	phase int     // interval of the trial, 0 to 3; negative: intervals to rest
	swap  [2]bool // in which halves the candidate comes first
	power [4]float64

	began  time.Duration // of the interval
	n      int           // requests that ended in it
	blocks int           // of those, after the first round
	first  time.Duration // when the first round had ended
	took   time.Duration // sum of latencies, after the first round
	idleN  int           // of those, how many ended while fewer than depth were under way
}

func newTuner(seed uint64) *tuner {
	t := &tuner{rand: rand.NewPCG(seed, 1), at: [2]int{0, 2}, knob: 1, up: true}
	t.begin()
	return t
}

// mode returns what write-back should work with now.
func (t *tuner) mode() workMode {
	at := t.at
	if t.candidateRuns() {
		at = t.candidate()
	}
	return workMode{blocks: sizeSteps[at[0]], depth: depthSteps[at[1]]}
}

func (t *tuner) candidateRuns() bool {
	return t.phase >= 0 && (t.phase%2 == 0) == t.swap[t.phase/2]
}

func (t *tuner) candidate() [2]int {
	at := t.at
	if t.up {
		at[t.knob]++
	} else {
		at[t.knob]--
	}
	return at
}

func (t *tuner) possible() bool {
	at := t.candidate()[t.knob]
	return at >= 0 && at < [2]int{len(sizeSteps), len(depthSteps)}[t.knob]
}

// begin begins a trial.
func (t *tuner) begin() {
	for !t.possible() {
		t.turn()
	}
	bits := t.rand.Uint64()
	t.phase, t.swap = 0, [2]bool{bits&1 != 0, bits&2 != 0}
}

// turn goes to the next candidate: the other direction, then the other setting.
func (t *tuner) turn() {
	if t.up = !t.up; t.up {
		t.knob = 1 - t.knob
	}
}

// landed takes note of a request of n blocks that ended at now after took. busy says that as many were under way as
// may be. It reports whether mode may have changed.
func (t *tuner) landed(now, took time.Duration, n int, busy bool) bool {
	t.n++
	round := t.mode().depth
	switch {
	case t.n < round:
		return false
	case t.n == round:
		t.first = now
		return false
	}
	t.blocks += n
	t.took += took
	if !busy {
		t.idleN++
	}
	counted := t.n - round
	if now-t.began < trialTime || counted < trialRounds*round {
		return false
	}
	rate := float64(t.blocks) / max(now-t.first, 1).Seconds()
	latency := max(t.took/time.Duration(counted), 1).Seconds()
	idle := t.idleN*10 > counted
	t.began, t.n, t.blocks, t.took, t.idleN = now, 0, 0, 0, 0
	if idle { // says nothing about what the storage can do: the trial begins again
		t.phase = min(t.phase, 0)
		return true
	}
	t.ended(powerRate*math.Log(rate) - math.Log(latency))
	return true
}

// ended ends an interval, with the logarithm of its power.
func (t *tuner) ended(power float64) {
	if t.phase < 0 {
		if t.phase++; t.phase == 0 {
			t.begin()
		}
		return
	}
	t.power[t.phase] = power
	if t.phase++; t.phase < len(t.power) {
		return
	}
	won := true
	for half, first := range t.swap {
		with, without := t.power[2*half], t.power[2*half+1]
		if !first {
			with, without = without, with
		}
		won = won && with-without > powerRate*math.Log(betterBy)
	}
	if won {
		t.at = t.candidate()
		t.lost = 0
		t.begin()
		return
	}
	t.turn()
	t.lost++
	t.phase = -min(1<<min(t.lost/4, 6), restMax)
}

// aheadTuner finds how far to read ahead: twice the bandwidth-delay product, as BBR has it for data under way
// (Cardwell, Cheng, Gunn, Hassas Yeganeh and Jacobson, "BBR: Congestion-Based Congestion Control", ACM Queue 2016: the
// windowed maximum of the rate, gain 2). A window that holds the reader back makes the rate, and so doubles from epoch
// to epoch until the rate follows no more; what is read ahead beyond that only takes memory and time from others. The
// latency is a running mean and not BBR's minimum, since fetches of one window wait for each other on the storage. It
// is pure.
type aheadTuner struct {
	began   time.Duration // of the epoch
	blocks  int           // read in it
	rates   [aheadEpochs]float64
	epoch   int
	latency float64 // s, of a fetch, running mean
}

const (
	aheadEpochs = 10
	aheadEpoch  = 100 * time.Millisecond
	aheadGain   = 2
	aheadMeans  = 8
)

// read takes note of blocks that a sequential reader was given.
func (t *aheadTuner) read(now time.Duration, n int) {
	if passed := now - t.began; passed >= aheadEpoch {
		if passed < 2*aheadEpoch { // else the reader rested, and it was not the window
			t.rates[t.epoch%aheadEpochs] = float64(t.blocks) / passed.Seconds()
			t.epoch++
		}
		t.began, t.blocks = now, 0
	}
	t.blocks += n
}

// fetched takes note of how long a fetch took.
func (t *aheadTuner) fetched(took time.Duration) {
	if t.latency == 0 {
		t.latency = took.Seconds()
	}
	t.latency += (took.Seconds() - t.latency) / aheadMeans
}

// limit returns how many blocks to read ahead, at most most.
func (t *aheadTuner) limit(most int) int {
	best := 0.0
	for _, r := range t.rates {
		best = max(best, r)
	}
	if best == 0 || t.latency == 0 {
		return most // nothing is known yet
	}
	return min(max(int(aheadGain*best*t.latency), aheadFirst), most)
}
